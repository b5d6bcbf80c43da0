/* A pool of threads that sleep between calls. One call at a time uses it; others do their work alone. */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define MOST 256

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static int started;             /* threads of the pool */
static unsigned long call;      /* number of the call */
static int wanted, busy;        /* threads that may still join the call; that are in it */
static syncnorm_part current;   /* what the call does */
static void *current_work;
static long current_parts;
static atomic_long next_part;
static int watches_forks;

static void work_on(void) {
  for (long part; (part = atomic_fetch_add_explicit(&next_part, 1, memory_order_relaxed)) < current_parts;)
    current(current_work, part);
}

static void *serve(void *unused) {
  unsigned long seen = 0;
  (void)unused;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (call == seen || wanted == 0) {
      if (wanted == 0) seen = call;
      pthread_cond_wait(&begun, &lock);
    }
    seen = call;
    wanted--;
    busy++;
    pthread_mutex_unlock(&lock);
    work_on();
    pthread_mutex_lock(&lock);
    if (--busy == 0) pthread_cond_signal(&ended);
  }
  return 0;
}

/* A forked child has none of the threads. */
static void forget(void) {
  pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t none = PTHREAD_COND_INITIALIZER;
  in_use = lock = fresh;
  begun = ended = none;
  started = wanted = busy = 0;
}

/* Signals are for the program's own threads. */
static void start(int threads) {
  pthread_attr_t attributes;
  sigset_t all, before;
  if (!watches_forks) watches_forks = pthread_atfork(0, 0, forget) == 0;
  if (!watches_forks || pthread_attr_init(&attributes) != 0) return;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  for (pthread_t thread; started < threads && started < MOST; started++)
    if (pthread_create(&thread, &attributes, serve, 0) != 0) break;
  pthread_sigmask(SIG_SETMASK, &before, 0);
  pthread_attr_destroy(&attributes);
}

void syncnorm_parallel(syncnorm_part run, void *work, long parts, int threads) {
  if (threads > parts) threads = (int)parts;
  if (threads <= 1 || pthread_mutex_trylock(&in_use) != 0) {
    for (long part = 0; part < parts; part++) run(work, part);
    return;
  }
  pthread_mutex_lock(&lock);
  start(threads - 1);
  current = run, current_work = work, current_parts = parts;
  atomic_store_explicit(&next_part, 0, memory_order_relaxed);
  wanted = threads - 1 < started ? threads - 1 : started;
  call++;
  pthread_cond_broadcast(&begun);
  pthread_mutex_unlock(&lock);
  work_on();
  pthread_mutex_lock(&lock);
  wanted = 0;
  while (busy > 0) pthread_cond_wait(&ended, &lock);
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&in_use);
}

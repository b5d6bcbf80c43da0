/* Sums over the members of a group on one host, through memory that they share.
 *
 * Messages are numbered. A member writes number s into its own buffer s % RING and then stores s in
 * `published` (release); the others wait for that (acquire) and read. A member has at most AHEAD
 * messages that it has published and not summed, and sums them in order.
 *
 * No buffer is written while somebody still reads it, with no word of who has read what: before a
 * member writes s, it has summed s - AHEAD, so every other one has published s - AHEAD, and had by
 * then summed all up to s - 2 * AHEAD = s - RING, which is what the buffer held. */
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define AHEAD 4
#define RING (2 * AHEAD)
#define CAPACITY (1L << 20) /* numbers; pages that no message has touched take no memory */
#define TOKEN 40
#define PAGE 4096

enum { DONE, NOT_YET, MIXED, BROKEN, LEFT };

typedef struct {
  alignas(64) _Atomic uint32_t published; /* the last message that can be read; a futex */
  _Atomic uint32_t sleepers;              /* those that sleep until it changes */
  _Atomic uint32_t left;                  /* it sends nothing more */
} Member;

typedef struct {
  alignas(64) char token[TOKEN];
  alignas(64) _Atomic uint32_t broken; /* somebody has given up: all do */
  Member members[];
} Shared;

typedef struct {
  alignas(64) int64_t size, count, identity; /* `count` numbers here, of a message of `size`; 0: no identity */
  alignas(64) double numbers[CAPACITY];
} Buffer;

/* One member's view. */
typedef struct {
  Shared *shared;
  Buffer *buffers; /* (members, RING) */
  size_t bytes;
  int me, members;
  uint32_t sent;
  int64_t spin_ns, nap_ns;
} View;

static size_t bytes_of_head(int members) {
  size_t bytes = sizeof(Shared) + (size_t)members * sizeof(Member);
  return (bytes + PAGE - 1) / PAGE * PAGE;
}

int64_t syncnorm_messages_bytes(int members) {
  return (int64_t)(bytes_of_head(members) + (size_t)members * RING * sizeof(Buffer));
}

int64_t syncnorm_messages_capacity(void) { return CAPACITY; }
int syncnorm_messages_ahead(void) { return AHEAD; }

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

static void sleep_until_changed(_Atomic uint32_t *word, uint32_t from, int64_t ns) {
#ifdef __linux__
  struct timespec most = {ns / 1000000000, ns % 1000000000};
  syscall(SYS_futex, word, FUTEX_WAIT, from, &most, 0, 0);
#else
  struct timespec nap = {0, ns < 50000 ? ns : 50000};
  (void)word, (void)from;
  nanosleep(&nap, 0);
#endif
}

static void wake(_Atomic uint32_t *word) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
#else
  (void)word;
#endif
}

/* Maps the segment; null if that fails, or if it does not begin with this token. */
View *syncnorm_messages_open(int fd, int me, int members, const char *token, int64_t spin_ns, int64_t nap_ns) {
  size_t bytes = (size_t)syncnorm_messages_bytes(members);
  View *view = calloc(1, sizeof *view);
  if (!view) return 0;
  void *base = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) {
    free(view);
    return 0;
  }
#ifdef MADV_DONTFORK
  madvise(base, bytes, MADV_DONTFORK);
#endif
  Shared *shared = base;
  if (strncmp(shared->token, token, TOKEN - 1) != 0) {
    munmap(base, bytes);
    free(view);
    return 0;
  }
  *view = (View){shared, (Buffer *)((char *)base + bytes_of_head(members)), bytes, me, members, 0, spin_ns, nap_ns};
  return view;
}

static void wake_all(View *view) {
  for (int r = 0; r < view->members; r++) wake(&view->shared->members[r].published);
}

/* Ends this member's part: the others see it if they wait for it. */
void syncnorm_messages_close(View *view) {
  if (!view) return;
  atomic_store(&view->shared->members[view->me].left, 1);
  wake(&view->shared->members[view->me].published);
  munmap(view->shared, view->bytes);
  free(view);
}

/* Has all members give up, now and later. */
void syncnorm_messages_give_up(View *view) {
  if (!view) return;
  atomic_store(&view->shared->broken, 1);
  wake_all(view);
}

static Buffer *buffer_of(View *view, int member, uint32_t number) {
  return &view->buffers[member * RING + number % RING];
}

static int has_come(View *view, int member, uint32_t number) {
  uint32_t last = atomic_load_explicit(&view->shared->members[member].published, memory_order_acquire);
  return (int32_t)(last - number) >= 0;
}

/* Publishes the next message, of at most CAPACITY numbers; returns its number, at least 1, or -1 if the segment is
 * broken. The caller has at most AHEAD - 1 messages that it has not summed. */
int64_t syncnorm_messages_send(View *view, const double *numbers, int64_t count, int64_t size, int64_t identity) {
  if (!view || atomic_load_explicit(&view->shared->broken, memory_order_acquire)) return -1;
  uint32_t number = view->sent + 1;
  Buffer *buffer = buffer_of(view, view->me, number);
  Member *mine = &view->shared->members[view->me];
  buffer->size = size, buffer->count = count, buffer->identity = identity;
  memcpy(buffer->numbers, numbers, (size_t)count * sizeof(double));
  view->sent = number;
  atomic_store(&mine->published, number); /* sequentially consistent: before the look at the sleepers */
  if (atomic_load(&mine->sleepers)) wake(&mine->published);
  return number;
}

/* True for each member whose message has not come; returns how many have not. */
int syncnorm_messages_missing(View *view, int64_t number, unsigned char *is_missing) {
  int missing = 0;
  for (int r = 0; r < view->members; r++) missing += is_missing[r] = !has_come(view, r, (uint32_t)number);
  return missing;
}

/* True once no one has to wait for this message, as it has come from all or never will. */
int syncnorm_messages_is_there(View *view, int64_t number) {
  if (!view || atomic_load(&view->shared->broken)) return 1;
  for (int r = 0; r < view->members; r++)
    if (!has_come(view, r, (uint32_t)number)) return 0;
  return 1;
}

static int wait_for(View *view, int r, uint32_t number, int64_t *spin_until) {
  Member *member = &view->shared->members[r];
  while (!has_come(view, r, number)) {
    if (atomic_load_explicit(&view->shared->broken, memory_order_relaxed)) return BROKEN;
    if (atomic_load(&member->left)) return has_come(view, r, number) ? DONE : LEFT;
    if (view->spin_ns > 0) {
      if (*spin_until == 0) *spin_until = now_ns() + view->spin_ns;
      for (int i = 0; i < 64; i++) {
        if (has_come(view, r, number)) return DONE;
        pause_briefly();
      }
      if (now_ns() < *spin_until) continue;
    }
    atomic_fetch_add(&member->sleepers, 1);
    uint32_t last = atomic_load(&member->published);
    if ((int32_t)(last - number) < 0) sleep_until_changed(&member->published, last, view->nap_ns);
    atomic_fetch_sub(&member->sleepers, 1);
    return has_come(view, r, number) ? DONE : NOT_YET;
  }
  return DONE;
}

/* Sums the message of this number over all members, in their order, into `total` (count numbers). Returns NOT_YET after
 * a nap, so that the caller can look at signals, its peers and the clock. All members return MIXED alike. */
int syncnorm_messages_sum(View *view, int64_t number, double *total, int64_t count) {
  if (!view || atomic_load_explicit(&view->shared->broken, memory_order_acquire)) return BROKEN;
  int64_t spin_until = 0, identity = 0;
  for (int r = 0; r < view->members; r++) {
    int state = r == view->me ? DONE : wait_for(view, r, (uint32_t)number, &spin_until);
    if (state != DONE) return state;
  }
  const Buffer *first = buffer_of(view, 0, (uint32_t)number);
  for (int r = 0; r < view->members; r++) {
    const Buffer *buffer = buffer_of(view, r, (uint32_t)number);
    if (buffer->size != first->size) return MIXED;
    if (identity == 0) identity = buffer->identity;
    if (buffer->identity != 0 && buffer->identity != identity) return MIXED;
  }
  /* A member without data sends `size` zeros, where the others have `count` numbers. */
  int64_t most = first->count < count ? first->count : count;
  memcpy(total, first->numbers, (size_t)most * sizeof(double));
  if (most < count) memset(total + most, 0, (size_t)(count - most) * sizeof(double));
  for (int r = 1; r < view->members; r++) {
    const Buffer *buffer = buffer_of(view, r, (uint32_t)number);
    const double *restrict numbers = buffer->numbers;
    double *restrict sum = total;
    most = buffer->count < count ? buffer->count : count;
    for (int64_t i = 0; i < most; i++) sum[i] += numbers[i];
  }
  return DONE;
}

/* Publishes a message and sums it, where the caller has no other that it has not summed. Returns the message's number
 * if it is not summed yet, to be passed to `sum`; else -1 - state: DONE, MIXED or BROKEN, which is also that nothing
 * was published. */
int64_t syncnorm_messages_exchange(View *view, const double *numbers, double *total, int64_t count, int64_t size,
                                   int64_t identity) {
  int64_t number = syncnorm_messages_send(view, numbers, count, size, identity);
  if (number < 0) return -1 - BROKEN;
  int state = syncnorm_messages_sum(view, number, total, count);
  return state == DONE || state == MIXED ? -1 - state : number;
}

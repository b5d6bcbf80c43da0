/* Sums of random sizes between processes, over the functions of messages.c, which stands before it:
 *   stress PROCESSES MESSAGES SEED. Ends with 0 if each sum is right. */
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>

static uint64_t random_of(uint64_t *state) {
  *state += 0x9e3779b97f4a7c15u;
  uint64_t z = (*state ^ (*state >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static double number_of(int member, int64_t message, int64_t i) {
  return (double)((member + 1) * ((message * 31 + i) % 1021));
}

/* Mostly small, and some that cross pages. */
static int64_t size_of(uint64_t *state) {
  uint64_t drawn = random_of(state);
  return 1 + (int64_t)(drawn >> 8) % (drawn % 64 ? 40 : drawn % 1024 ? 3000 : 60000);
}

static int is_right(const double *total, int64_t count, int64_t message, int members) {
  for (int64_t i = 0; i < count; i++)
    if (total[i] != number_of(0, message, i) * (double)(members * (members + 1) / 2)) return 0;
  return 1;
}

static int one_member(int fd, int me, int members, int64_t messages, uint64_t seed) {
  View *view = syncnorm_messages_open(fd, me, members, "stress", 20000, 50000000);
  if (!view) return 2;
  uint64_t sizes = seed, own = seed + 1 + (uint64_t)me;
  int64_t sent = 0, summed = 0, pending[AHEAD];
  static double numbers[60001], total[60001];
  while (summed < messages) {
    /* Each is ahead as far as it likes. */
    if (sent < messages && sent - summed < AHEAD && (sent == summed || random_of(&own) % 2)) {
      int64_t count = pending[sent % AHEAD] = size_of(&sizes);
      for (int64_t i = 0; i < count; i++) numbers[i] = number_of(me, sent, i);
      sent++;
      if (sent == summed + 1 && random_of(&own) % 2) {
        int64_t state = syncnorm_messages_exchange(view, numbers, total, count, count + 1, sent);
        if (state == -1 - DONE && !is_right(total, count, summed++, members)) return 6;
        if (state != -1 - DONE && state != sent) return 7;
        continue;
      }
      if (syncnorm_messages_send(view, numbers, count, count + 1, sent) != sent) return 3;
      continue;
    }
    int64_t count = pending[summed % AHEAD];
    int state;
    while ((state = syncnorm_messages_sum(view, summed + 1, total, count)) == NOT_YET) {}
    if (state != DONE) return 4;
    if (!is_right(total, count, summed++, members)) return 5;
  }
  syncnorm_messages_close(view);
  return 0;
}

int main(int argc, char **argv) {
  if (argc != 4) return 1;
  int members = atoi(argv[1]), failed = 0;
  pid_t pids[64];
  FILE *file = tmpfile();
  if (!file || ftruncate(fileno(file), syncnorm_messages_bytes(members)) || pwrite(fileno(file), "stress", 6, 0) != 6)
    return 1;
  for (int me = 0; me < members; me++)
    if (!(pids[me] = fork())) _exit(one_member(fileno(file), me, members, atoll(argv[2]), strtoull(argv[3], 0, 10)));
  for (int ended = 0; ended < members; ended++) {
    int status;
    pid_t pid = wait(&status);
    for (int me = 0; me < members; me++) {
      if (pids[me] == pid) pids[me] = 0;
      if (status && pids[me]) kill(pids[me], SIGKILL); /* it would wait for the one that failed */
    }
    if (status && !failed) fprintf(stderr, "a member ended with %d\n", WEXITSTATUS(status)), failed = 1;
  }
  return failed;
}

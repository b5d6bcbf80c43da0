// NCCL's collectives between processes of one machine. A communicator is a piece of shared memory
// with a slot for each rank. A collective is done when it is called, and waits for all ranks: ranks
// that call those of two communicators in different orders hang here, as NCCL's documents warn.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define SLOT ((size_t)8 << 20)
#define HANG_SECONDS 120

enum { SUCCESS = 0, SYSTEM_ERROR = 2 };
enum type { INT8, UINT8, INT32, UINT32, INT64, UINT64, HALF, FLOAT, DOUBLE, BFLOAT16 };
// Whatever is above is a sum, multiplied before: by DistributedDataParallel, for a mean.
enum op { SUM, PRODUCT, MAX, MIN, MEAN };

static const size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};

struct area {
    _Atomic int arrived;
    _Atomic int round;
};

struct comm {
    int size, rank, splits;
    uint64_t id;
    struct area* area;
    char* slots;
};

typedef struct {
    char bytes[128];
} unique_id;

static uint64_t hash(const void* p, size_t size) {
    uint64_t value = 14695981039346656037ull;
    for (size_t i = 0; i < size; i++) value = (value ^ ((const uint8_t*)p)[i]) * 1099511628211ull;
    return value;
}

static char* slot(struct comm* comm, int rank) { return comm->slots + rank * SLOT; }

static int wait_for_all(struct comm* comm) {
    int round = atomic_load(&comm->area->round);
    if (atomic_fetch_add(&comm->area->arrived, 1) == comm->size - 1) {
        atomic_store(&comm->area->arrived, 0);
        atomic_fetch_add(&comm->area->round, 1);
        return SUCCESS;
    }
    for (time_t start = time(NULL); atomic_load(&comm->area->round) == round; usleep(20)) {
        if (time(NULL) - start > HANG_SECONDS) {
            fprintf(stderr, "stand-in for NCCL: rank %d is alone in a collective\n", comm->rank);
            return SYSTEM_ERROR;
        }
    }
    return SUCCESS;
}

static int join(struct comm** made, uint64_t id, int size, int rank) {
    char name[64];
    snprintf(name, sizeof name, "/syncnorm-stand-in-%016llx", (unsigned long long)id);
    size_t bytes = 4096 + size * SLOT;
    int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, bytes)) return SYSTEM_ERROR;
    char* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (p == MAP_FAILED) return SYSTEM_ERROR;
    *made = malloc(sizeof **made);
    **made = (struct comm){size, rank, 0, id, (struct area*)p, p + 4096};
    int status = wait_for_all(*made);
    shm_unlink(name);  // all have it
    return status;
}

int ncclGetVersion(int* version) {
    *version = 22809;
    return SUCCESS;
}

int ncclGetUniqueId(unique_id* id) {
    FILE* random = fopen("/dev/urandom", "rb");
    int is_read = random != NULL && fread(id, sizeof *id, 1, random) == 1;
    if (random) fclose(random);
    return is_read ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommInitRankConfig(struct comm** made, int size, unique_id id, int rank, void* config) {
    return join(made, hash(&id, sizeof id), size, rank);
}

int ncclCommInitRank(struct comm** made, int size, unique_id id, int rank) {
    return ncclCommInitRankConfig(made, size, id, rank, NULL);
}

int ncclCommSplit(struct comm* comm, int color, int key, struct comm** made, void* config) {
    int wanted[2] = {color, key}, size = 0, rank = 0;
    memcpy(slot(comm, comm->rank), wanted, sizeof wanted);
    if (wait_for_all(comm)) return SYSTEM_ERROR;
    for (int i = 0; i < comm->size; i++) {
        int* other = (int*)slot(comm, i);
        if (other[0] != color) continue;
        size++;
        rank += other[1] < key || (other[1] == key && i < comm->rank);
    }
    if (wait_for_all(comm)) return SYSTEM_ERROR;
    uint64_t facts[3] = {comm->id, (uint64_t)color, (uint64_t)++comm->splits};
    *made = NULL;
    return color < 0 ? SUCCESS : join(made, hash(facts, sizeof facts), size, rank);
}

int ncclCommCount(struct comm* comm, int* size) {
    *size = comm->size;
    return SUCCESS;
}

int ncclCommUserRank(struct comm* comm, int* rank) {
    *rank = comm->rank;
    return SUCCESS;
}

int ncclCommGetAsyncError(struct comm* comm, int* error) {
    *error = SUCCESS;
    return SUCCESS;
}

const char* ncclGetErrorString(int error) { return "an error of the stand-in for NCCL"; }

const char* ncclGetLastError(struct comm* comm) { return ncclGetErrorString(0); }

static float to_float(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static double combined(double a, double b, int op) {
    switch (op) {
    case PRODUCT: return a * b;
    case MAX: return a > b ? a : b;
    case MIN: return a < b ? a : b;
    default: return a + b;
    }
}

// In the order of the ranks, so that all have the same bits.
#define REDUCE(T, READ, WRITE)                                                       \
    for (size_t i = 0; i < count; i++) {                                             \
        double value = READ(((T*)slot(comm, 0))[i]);                                 \
        for (int rank = 1; rank < comm->size; rank++) {                              \
            value = combined(value, READ(((T*)slot(comm, rank))[i]), op);            \
        }                                                                            \
        ((T*)out)[i] = WRITE(op == MEAN ? value / comm->size : value);               \
    }                                                                                \
    break

static void reduce(struct comm* comm, void* out, size_t count, int type, int op) {
    switch (type) {
    case INT8: REDUCE(int8_t, , );
    case UINT8: REDUCE(uint8_t, , );
    case INT32: REDUCE(int32_t, , );
    case UINT32: REDUCE(uint32_t, , );
    case INT64: REDUCE(int64_t, , );
    case UINT64: REDUCE(uint64_t, , );
    case HALF: REDUCE(_Float16, , );
    case FLOAT: REDUCE(float, , );
    case DOUBLE: REDUCE(double, , );
    case BFLOAT16: REDUCE(uint16_t, to_float, to_bfloat16);
    default: abort();
    }
}

// A collective of `count` numbers, a slot at a time: each rank leaves its own, and takes what it
// wants when all have done so.
#define BY_SLOTS(LEAVE, TAKE)                                                        \
    for (size_t size = SIZES[type], done = 0, n; done < count; done += n) {          \
        n = count - done < SLOT / size ? count - done : SLOT / size;                 \
        LEAVE;                                                                       \
        if (wait_for_all(comm)) return SYSTEM_ERROR;                                 \
        TAKE;                                                                        \
        if (wait_for_all(comm)) return SYSTEM_ERROR;                                 \
    }                                                                                \
    return SUCCESS

#define FROM ((const char*)from + done * size)
#define TO ((char*)to + done * size)

int ncclAllReduce(
    const void* from, void* to, size_t count, int type, int op, struct comm* comm, void* stream) {
    BY_SLOTS(memcpy(slot(comm, comm->rank), FROM, n * size), reduce(comm, TO, n, type, op));
}

int ncclReduce(
    const void* from, void* to, size_t count, int type, int op, int root, struct comm* comm,
    void* stream) {
    BY_SLOTS(memcpy(slot(comm, comm->rank), FROM, n * size),
             if (comm->rank == root) reduce(comm, TO, n, type, op));
}

int ncclBroadcast(
    const void* from, void* to, size_t count, int type, int root, struct comm* comm, void* stream) {
    BY_SLOTS(if (comm->rank == root) memcpy(slot(comm, root), FROM, n * size),
             memcpy(TO, slot(comm, root), n * size));
}

int ncclAllGather(
    const void* from, void* to, size_t count, int type, struct comm* comm, void* stream) {
    BY_SLOTS(memcpy(slot(comm, comm->rank), FROM, n * size),
             for (int rank = 0; rank < comm->size; rank++)
                 memcpy(TO + rank * count * size, slot(comm, rank), n * size));
}

int ncclBcast(void* p, size_t count, int type, int root, struct comm* comm, void* stream) {
    return ncclBroadcast(p, p, count, type, root, comm, stream);
}

// What nobody has asked for yet is an error rather than nothing.
static int is_missing(const char* name) {
    fprintf(stderr, "stand-in for NCCL: %s is not there\n", name);
    return SYSTEM_ERROR;
}

#define MISSING(name) int name(void) { return is_missing(#name); }
MISSING(ncclReduceScatter)
MISSING(ncclSend)
MISSING(ncclRecv)
MISSING(ncclAlltoAll)
MISSING(ncclCommInitAll)
MISSING(ncclCommInitRankScalable)
MISSING(ncclCommShrink)

// The functions of CUDA's runtime and driver that torch and Triton call, for devices that are not
// there: memory is the host's, all work is done when it is asked for, and a kernel does nothing.
// Those that are not here return 0, see __main__.py.

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_BLOCKS (1 << 16)
#define GIB (1ull << 30)

static __thread int current_device;

static int device_count(void) {
    const char* given = getenv("STAND_IN_DEVICES");
    return given ? atoi(given) : 2;
}

// Memory, and what kind it is of.

struct block {
    uintptr_t at;
    size_t size;
    enum cudaMemoryType type;
    int device;
};

static struct block blocks[MOST_BLOCKS];
static int block_count;
static pthread_mutex_t block_lock = PTHREAD_MUTEX_INITIALIZER;

static void note(void* p, size_t size, enum cudaMemoryType type) {
    pthread_mutex_lock(&block_lock);
    if (block_count == MOST_BLOCKS) abort();
    blocks[block_count++] = (struct block){(uintptr_t)p, size, type, current_device};
    pthread_mutex_unlock(&block_lock);
}

static void forget(void* p) {
    pthread_mutex_lock(&block_lock);
    for (int i = 0; i < block_count; i++) {
        if (blocks[i].at == (uintptr_t)p) {
            blocks[i] = blocks[--block_count];
            break;
        }
    }
    pthread_mutex_unlock(&block_lock);
}

static int find(const void* p, struct block* found) {
    int is_found = 0;
    pthread_mutex_lock(&block_lock);
    for (int i = 0; i < block_count && !is_found; i++) {
        if ((uintptr_t)p - blocks[i].at < blocks[i].size) {
            *found = blocks[i];
            is_found = 1;
        }
    }
    pthread_mutex_unlock(&block_lock);
    return is_found;
}

static cudaError_t allocate(void** p, size_t size, enum cudaMemoryType type) {
    if (posix_memalign(p, 512, size ? size : 512)) return cudaErrorMemoryAllocation;
    memset(*p, 0xFF, size);  // NaN, so that what no kernel has written is seen
    note(*p, size, type);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t size) { return allocate(p, size, cudaMemoryTypeDevice); }

cudaError_t cudaHostAlloc(void** p, size_t size, unsigned flags) {
    return allocate(p, size, cudaMemoryTypeHost);
}

cudaError_t cudaFree(void* p) {
    forget(p);
    free(p);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }

cudaError_t cudaHostRegister(void* p, size_t size, unsigned flags) {
    note(p, size, cudaMemoryTypeHost);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* p) {
    forget(p);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes) {
    *free_bytes = *all_bytes = 80 * GIB;
    pthread_mutex_lock(&block_lock);
    for (int i = 0; i < block_count; i++) {
        int is_here = blocks[i].type == cudaMemoryTypeDevice && blocks[i].device == current_device;
        *free_bytes -= is_here ? blocks[i].size : 0;
    }
    pthread_mutex_unlock(&block_lock);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* p) {
    struct block found;
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    if (find(p, &found)) {
        attributes->type = found.type;
        attributes->device = found.device;
        attributes->devicePointer = (void*)p;
        attributes->hostPointer = found.type == cudaMemoryTypeHost ? (void*)p : NULL;
    }
    return cudaSuccess;
}

// Triton asks whether a kernel may be given an address.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr p) {
    struct block found;
    if (!find((void*)p, &found)) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr*)value = p;
    return CUDA_SUCCESS;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
    memmove(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, kind);
}

cudaError_t cudaMemcpyPeerAsync(
    void* to, int to_device, const void* from, int from_device, size_t size, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
    enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t i = 0; i < height; i++) {
        memmove((char*)to + i * to_pitch, (const char*)from + i * from_pitch, width);
    }
    return cudaSuccess;
}

cudaError_t cudaMemset(void* p, int value, size_t size) {
    memset(p, value, size);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) {
    return cudaMemset(p, value, size);
}

// Devices: H100s, as far as somebody asks.

cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

CUresult cuDeviceGet(CUdevice* device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}

#undef cudaGetDeviceProperties
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "a stand-in");
    of->major = 9;
    of->multiProcessorCount = 132;
    of->totalGlobalMem = 80 * GIB;
    of->warpSize = 32;
    of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->maxGridSize[0] = 0x7fffffff;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    of->regsPerBlock = of->regsPerMultiprocessor = 65536;
    of->sharedMemPerBlock = 49152;
    of->sharedMemPerMultiprocessor = 233472;
    of->sharedMemPerBlockOptin = 232448;
    of->maxThreadsPerMultiProcessor = 2048;
    of->maxBlocksPerMultiProcessor = 32;
    of->l2CacheSize = 50 << 20;
    of->unifiedAddressing = of->concurrentKernels = of->pciBusID = 1;
    return cudaSuccess;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
    return (cudaError_t)cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device);
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    snprintf(text, size, "0000:%02d:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    *can = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// Newer versions of Triton ask these, too.
CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* is_active) {
    if (flags) *flags = 0;
    *is_active = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

const char* cudaGetErrorName(cudaError_t error) { return "an error of the stand-in"; }

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = cudaGetErrorName(cudaErrorUnknown);
    return CUDA_SUCCESS;
}

static long nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult* result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (*function == NULL) *function = (void*)nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// Streams and events: all is over when it is asked.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    *stream = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = 0.01f;
    return cudaSuccess;
}

// Graphs: one is captured at a time. What it holds is known in operators.py.

static cudaStream_t captured;
static unsigned long long captures;
static int is_capturing, is_for_all_threads, is_broken;
static pthread_t capturing_thread;
static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    captured = stream, captures++, is_broken = 0;
    is_for_all_threads = mode == cudaStreamCaptureModeGlobal;
    capturing_thread = pthread_self();
    is_capturing = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = (cudaGraph_t)(uintptr_t)captures;
    is_capturing = 0;
    return is_broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    CUstreamCaptureMode before = thread_mode;
    thread_mode = *mode, *mode = before;
    return CUDA_SUCCESS;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
    return (cudaError_t)cuThreadExchangeStreamCaptureMode((CUstreamCaptureMode*)mode);
}

// A look at an event ends the capture of another thread, unless it is told to spare it.
cudaError_t cudaEventQuery(cudaEvent_t event) {
    int is_other = is_capturing && !pthread_equal(capturing_thread, pthread_self());
    if (!is_other || !is_for_all_threads || thread_mode != CU_STREAM_CAPTURE_MODE_GLOBAL)
        return cudaSuccess;
    is_broken = 1;
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
    *status = is_capturing && stream == captured ? cudaStreamCaptureStatusActive
                                                 : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
    size_t* count) {
    if (id) *id = captures;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(
    cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned flags) {
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

// Kernels: those of torch are registered when it is loaded, those of Triton loaded one by one.

void** __cudaRegisterFatBinary(void* binary) {
    static void* handle[1];
    return handle;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(
    dim3 grid, dim3 block, size_t size, struct CUstream_st* stream) {
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* size, void* stream) {
    *size = 0;
    *(void**)stream = NULL;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
    static char symbols[1 << 20];
    *p = symbols;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* of, const void* function) {
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 32;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* function, int size, size_t shared, unsigned flags) {
    *blocks = 4;
    return cudaSuccess;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    *module = malloc(1);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = malloc(1);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

// Handles that somebody looks at.

static char handle[64];

int cublasCreate_v2(void** of) {
    *of = handle;
    return 0;
}

int cublasLtCreate(void** of) { return cublasCreate_v2(of); }

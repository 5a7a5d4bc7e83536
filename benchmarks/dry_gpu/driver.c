/* A CUDA driver without a GPU: what Triton's launcher calls, checked against the documented limits. Nothing runs.
 *
 * Compiled to libcuda.so.1 by __init__.py. Functions of the real driver that are missing here (allocation, copies,
 * synchronisation) cannot be called: looking them up fails. Launches come from several threads, hence the atomics. */
#include <cuda.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char name[128];
  int dynamic_shared; /* what cuFuncSetAttribute allowed */
} Function;

enum { DEVICES = 8, TEXT = 1 << 20, DEFAULT_SHARED = 48 << 10 };
static int shared_limit[DEVICES]; /* dynamic shared memory of a block, per device */
static long launches, maps, errors;
static char text[TEXT]; /* one line per launch, map and error, until it is full */
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* --- for the tests --- */
long dry_launches(void) { return __atomic_load_n(&launches, __ATOMIC_SEQ_CST); }
long dry_maps(void) { return __atomic_load_n(&maps, __ATOMIC_SEQ_CST); }
long dry_errors(void) { return __atomic_load_n(&errors, __ATOMIC_SEQ_CST); }
const char *dry_text(void) { return text; }
void dry_clear(void) {
  pthread_mutex_lock(&lock);
  used = 0, text[0] = 0, launches = maps = errors = 0;
  pthread_mutex_unlock(&lock);
}
void dry_device(int device, int shared) { shared_limit[device] = shared; }

static void note(const char *line) {
  pthread_mutex_lock(&lock);
  size_t length = strlen(line);
  if (used + length + 2 < TEXT) {
    memcpy(text + used, line, length);
    used += length;
    text[used++] = '\n', text[used] = 0;
  }
  pthread_mutex_unlock(&lock);
}

/* Counts an error and returns what the real driver would. */
static CUresult refuse(const char *what, const char *rule) {
  char line[256];
  __atomic_add_fetch(&errors, 1, __ATOMIC_SEQ_CST);
  snprintf(line, sizeof line, "error %s: %s", what, rule);
  note(line);
  return CUDA_ERROR_INVALID_VALUE;
}

/* --- devices, contexts and modules --- */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) {
  if (number < 0 || number >= DEVICES || !shared_limit[number]) return CUDA_ERROR_INVALID_DEVICE;
  return *device = number, CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit[device]; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit[device] + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
/* Linked with by Triton since 3.8 */
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **message) {
  return *message = "refused by the dry driver", CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->dynamic_shared = DEFAULT_SHARED;
  return *function = (CUfunction)made, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *own = (Function *)function;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: own->dynamic_shared = value; return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: return CUDA_SUCCESS;
  default: return CUDA_ERROR_NOT_SUPPORTED; /* as drivers do that know no shared memory mode, which Triton 3.8 tries */
  }
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *number, CUfunction function, const CUlaunchConfig *config) {
  return *number = 1, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

/* --- launches: CUDA programming guide, "technical specifications per compute capability" ---
 * The stream is the number of the device (__init__.py). */
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  Function *own = (Function *)function;
  size_t device = (size_t)c->hStream;
  char line[256];
  __atomic_add_fetch(&launches, 1, __ATOMIC_SEQ_CST);
  snprintf(line, sizeof line, "launch %s grid %u %u %u block %u shared %u", own->name, c->gridDimX, c->gridDimY,
           c->gridDimZ, c->blockDimX, c->sharedMemBytes);
  note(line);
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ) return refuse(own->name, "a grid dimension is 0");
  if (c->gridDimX > 0x7fffffffu) return refuse(own->name, "grid x is above 2^31 - 1");
  if (c->gridDimY > 65535 || c->gridDimZ > 65535) return refuse(own->name, "grid y or z is above 65535");
  if (!c->blockDimX || c->blockDimX * c->blockDimY * c->blockDimZ > 1024)
    return refuse(own->name, "a block has no thread or more than 1024");
  if (device >= DEVICES || c->sharedMemBytes > (unsigned)shared_limit[device])
    return refuse(own->name, "more shared memory than the device has");
  if (c->sharedMemBytes > (unsigned)own->dynamic_shared)
    return refuse(own->name, "more than 48 KiB of shared memory without the function's attribute");
  if (!parameters) return refuse(own->name, "no parameters");
  return CUDA_SUCCESS;
}

/* --- tensor maps: the rules in the documentation of cuTensorMapEncodeTiled ---
 * Left out: that each stride be a multiple of the one before. The driver does not ask for it, and layouts whose heads
 * lie closer together than their tokens would not be possible. */
static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 4;
  }
}

static const char *broken_rule(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                               const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                               const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                               CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                               CUtensorMapFloatOOBfill fill) {
  if ((size_t)map % 64) return "the map is not aligned to 64 bytes";
  if (rank < 1 || rank > 5) return "the rank is not in 1..5";
  if (!address || (size_t)address % 16) return "the address is not aligned to 16 bytes";
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return "interleaved, which no kernel here uses";
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32) return "a size is not in 1..2^32";
    if (!box[i] || box[i] > 256) return "a box size is not in 1..256";
    if (!element_strides[i] || element_strides[i] > 8) return "an element stride is not in 1..8";
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (!strides[i] || strides[i] % 16 || strides[i] >= 1ull << 40) return "a stride is not a multiple of 16 below 2^40";
  unsigned inner = box[0] * bytes_of(type);
  if (inner % 16) return "the box's inner size is not a multiple of 16 bytes";
  unsigned spans[] = {0, 32, 64, 128};
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return "an unknown swizzle";
  if (spans[swizzle] && inner > spans[swizzle]) return "the box's inner size is above the swizzle's";
  if (promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B) return "an unknown L2 promotion";
  int is_float = type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA && !is_float) return "NaN fill of integers";
  return NULL;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  __atomic_add_fetch(&maps, 1, __ATOMIC_SEQ_CST);
  const char *rule = broken_rule(map, type, rank, address, sizes, strides, box, element_strides, interleave, swizzle,
                                 promotion, fill);
  memset(map, 0, sizeof *map);
  return rule ? refuse("tensor map", rule) : CUDA_SUCCESS;
}

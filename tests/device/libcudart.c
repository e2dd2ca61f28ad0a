/* The runtime of the driver in libcuda.c: as much of libcudart.so.12 as Mooncake's CUDA wheel links to.
 *
 * What its TCP and intra-node NVLink transports do with a device's memory is done, at once and in order: streams and
 * events are names. The rest answers that it is not supported. Like the real one it needs no context from its caller.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { char bytes[64]; } Handle;
typedef struct { int type, device; void *on_device, *on_host; } Attributes;
enum { OK = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801 };

int cuInit(unsigned);
int cuDeviceGetCount(int *);
int cuDevicePrimaryCtxRetain(void **, int);
int cuCtxPushCurrent_v2(void *);
int cuCtxPopCurrent_v2(void **);
int cuPointerGetAttribute(void *, int, uint64_t);
int cuMemAlloc_v2(uint64_t *, size_t);
int cuMemFree_v2(uint64_t);
int cuMemcpyHtoD_v2(uint64_t, const void *, size_t);
int cuMemcpyDtoH_v2(void *, uint64_t, size_t);
int fake_copy(uint64_t, uint64_t, size_t);
int cuIpcGetMemHandle(Handle *, uint64_t);
int cuIpcOpenMemHandle_v2(uint64_t *, Handle, unsigned);
int cuIpcCloseMemHandle(uint64_t);

static __thread int chosen;

static void enter(void) {
  static void *contexts[16];
  cuInit(0);
  if (!contexts[chosen]) cuDevicePrimaryCtxRetain(&contexts[chosen], chosen);
  cuCtxPushCurrent_v2(contexts[chosen]);
}

static int leave(int code) {
  void *context;
  cuCtxPopCurrent_v2(&context);
  return code;
}

static int on_device(const void *pointer) {
  int kind = 0;
  return cuPointerGetAttribute(&kind, 2, (uint64_t)pointer) == OK && kind == 2;
}

int cudaGetDeviceCount(int *count) { cuInit(0); return cuDeviceGetCount(count); }
int cudaGetDevice(int *device) { *device = chosen; return OK; }
int cudaSetDevice(int device) { chosen = device; return OK; }
int cudaGetLastError(void) { return OK; }
const char *cudaGetErrorString(int code) { return code ? "an error of paper" : "no error"; }
int cudaDeviceGetPCIBusId(char *id, int n, int device) { (void)device; strncpy(id, "0000:00:00.0", (size_t)n); return OK; }

int cudaPointerGetAttributes(Attributes *said, const void *pointer) {
  memset(said, 0, sizeof *said);
  if (!on_device(pointer)) return OK; /* 0: memory that no runtime knows */
  said->type = 2, said->on_device = (void *)pointer;
  return cuPointerGetAttribute(&said->device, 9, (uint64_t)pointer);
}

int cudaMemcpy(void *to, const void *from, size_t n, int kind) {
  (void)kind;
  enter();
  if (on_device(to) && on_device(from)) return leave(fake_copy((uint64_t)to, (uint64_t)from, n));
  if (on_device(to)) return leave(cuMemcpyHtoD_v2((uint64_t)to, from, n));
  if (on_device(from)) return leave(cuMemcpyDtoH_v2(to, (uint64_t)from, n));
  memcpy(to, from, n);
  return leave(OK);
}

int cudaMalloc(void **pointer, size_t n) { enter(); return leave(cuMemAlloc_v2((uint64_t *)pointer, n)); }
int cudaFree(void *pointer) { enter(); return leave(pointer ? cuMemFree_v2((uint64_t)pointer) : OK); }
int cudaIpcGetMemHandle(Handle *handle, void *pointer) { enter(); return leave(cuIpcGetMemHandle(handle, (uint64_t)pointer)); }
int cudaIpcOpenMemHandle(void **pointer, Handle handle, unsigned flags) {
  enter();
  return leave(cuIpcOpenMemHandle_v2((uint64_t *)pointer, handle, flags));
}
int cudaIpcCloseMemHandle(void *pointer) { enter(); return leave(cuIpcCloseMemHandle((uint64_t)pointer)); }

int cudaMemcpyBatchAsync(
    void **to, void **from, size_t *n, size_t count, void *how, size_t *which, size_t hows, size_t *failed, void *stream) {
  (void)how, (void)which, (void)hows, (void)stream;
  for (size_t i = 0; i < count; i++) {
    int code = cudaMemcpy(to[i], from[i], n[i], 4);
    if (code) return *failed = i, code;
  }
  return OK;
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *given) { (void)stream; function(given); return OK; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { (void)flags; *stream = &chosen; return OK; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { (void)flags; *event = &chosen; return OK; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = device != peer; return OK; }

#define ANSWER(name, code) int name(void) { return code; }
ANSWER(cudaStreamDestroy, OK)
ANSWER(cudaEventDestroy, OK)
ANSWER(cudaEventRecord, OK)
ANSWER(cudaEventSynchronize, OK)
ANSWER(cudaDeviceEnablePeerAccess, OK)
ANSWER(cudaStreamQuery, OK)
ANSWER(cudaStreamSynchronize, OK)
ANSWER(cudaHostRegister, OK)
ANSWER(cudaHostUnregister, OK)
ANSWER(cudaFreeHost, NOT_SUPPORTED)
ANSWER(cudaGetDeviceProperties_v2, NOT_SUPPORTED)
ANSWER(cudaHostAlloc, NOT_SUPPORTED)
ANSWER(cudaHostGetDevicePointer, NOT_SUPPORTED)
ANSWER(cudaMemset, NOT_SUPPORTED)
ANSWER(cudaMemsetAsync, NOT_SUPPORTED)

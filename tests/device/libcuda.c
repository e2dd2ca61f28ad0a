/* A driver without a device: the calls of libcuda.so.1 that pdctl makes, with the driver's own signatures.
 *
 * Memory of a "device" is shared memory that is mapped twice: where the pointer says, without any right, so that a
 * processor that follows it gets SIGSEGV and the kernel EFAULT, and once more where only cuMemcpy* goes. A handle names
 * it for other processes, as long as its process lives. What needs a context refuses without one, as the driver does.
 * fake_seen() says what was called, and on which thread.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };
enum { DEVICES = 2, MOST = 4096, TITLE = 16 };

typedef struct { char bytes[64]; } Handle;
typedef struct { int pid, number, device; uint64_t size; } Named;
typedef struct { uint64_t pointer, size; char *data; int device, number, shareable, imported; } Allocation;

static Allocation table[MOST];
static int made, is_open, retained[DEVICES], contexts[DEVICES] = {10, 11};
static __thread void *stack[64];
static __thread int depth;
static char seen[1 << 16];
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

const char *fake_seen(void) { return seen; }
int fake_retained(int device) { return retained[device]; }
int fake_open_allocations(void) {
  int n = 0;
  for (int i = 0; i < made; i++) n += table[i].pointer != 0;
  return n;
}
void fake_not_shareable(uint64_t pointer) {
  for (int i = 0; i < made; i++) if (table[i].pointer == pointer) table[i].shareable = 0;
}

static void note(const char *what) {
  char name[TITLE] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  pthread_mutex_lock(&gate);
  size_t used = strlen(seen);
  snprintf(seen + used, sizeof seen - used, "%s %s\n", what, name);
  pthread_mutex_unlock(&gate);
}

static int current(void) { return depth && stack[depth - 1] ? *(int *)stack[depth - 1] - 10 : -1; }

static Allocation *at(uint64_t pointer) {
  for (int i = 0; i < made; i++)
    if (table[i].pointer && pointer >= table[i].pointer && pointer < table[i].pointer + table[i].size) return &table[i];
  return NULL;
}

static void path(char *out, size_t n, int pid, int number) { snprintf(out, n, "/pdctl-fake-gpu-%d-%d", pid, number); }

static int map(const char *name, int flags, uint64_t size, int device, int number, uint64_t *pointer) {
  int fd = shm_open(name, O_RDWR | flags, 0600);
  if (fd < 0 || (flags && ftruncate(fd, (off_t)size))) return INVALID_VALUE;
  char *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  void *far = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  close(fd);
  pthread_mutex_lock(&gate);
  table[made++] = (Allocation){(uint64_t)far, size, data, device, number, 1, !flags};
  pthread_mutex_unlock(&gate);
  *pointer = (uint64_t)far;
  return OK;
}

static int drop(uint64_t pointer, int imported) {
  Allocation *it = at(pointer);
  char name[64];
  if (!it || it->pointer != pointer || it->imported != imported) return INVALID_VALUE;
  munmap(it->data, it->size);
  munmap((void *)it->pointer, it->size);
  path(name, sizeof name, getpid(), it->number);
  if (!imported) shm_unlink(name);
  it->pointer = 0;
  return OK;
}

int cuInit(unsigned flags) { note("cuInit"); is_open = 1; return flags ? INVALID_VALUE : OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return is_open ? OK : NOT_INITIALIZED; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < DEVICES ? OK : INVALID_DEVICE; }
int cuDeviceGetName(char *name, int n, int device) { snprintf(name, n, "A device of paper %d", device); return OK; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0xa0 + device, 16); return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { note("retain"); retained[device]++; *context = &contexts[device]; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { note("release"); retained[device]--; return OK; }
int cuCtxSetCurrent(void *context) { note("set"); if (!depth) depth = 1; stack[depth - 1] = context; return OK; }
int cuCtxPushCurrent_v2(void *context) { stack[depth++] = context; return OK; }
int cuCtxPopCurrent_v2(void **context) { if (!depth) return INVALID_CONTEXT; *context = stack[--depth]; return OK; }
int cuCtxGetCurrent(void **context) { *context = depth ? stack[depth - 1] : NULL; return OK; }
int cuCtxSynchronize(void) { return current() < 0 ? INVALID_CONTEXT : OK; }

int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  Allocation *it = at(pointer);
  if (!it) return INVALID_VALUE;
  *(int *)data = attribute == 2 ? 2 : attribute == 9 ? it->device : attribute == 10 ? it->shareable : 0;
  return OK;
}

int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t pointer) {
  Allocation *it = at(pointer);
  if (current() < 0) return INVALID_CONTEXT;
  if (!it) return INVALID_VALUE;
  *base = it->pointer, *size = it->size;
  return OK;
}

int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
  char name[64];
  note("alloc");
  if (current() < 0) return INVALID_CONTEXT;
  path(name, sizeof name, getpid(), made);
  return map(name, O_CREAT, size, current(), made, pointer);
}

int cuMemFree_v2(uint64_t pointer) { return drop(pointer, 0); }

static char *inside(uint64_t pointer, size_t n) {
  Allocation *it = at(pointer);
  return it && pointer + n <= it->pointer + it->size ? it->data + (pointer - it->pointer) : NULL;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) {
  char *data = inside(to, n);
  if (current() < 0) return INVALID_CONTEXT;
  return data ? (memcpy(data, from, n), OK) : INVALID_VALUE;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) {
  char *data = inside(from, n);
  if (current() < 0) return INVALID_CONTEXT;
  return data ? (memcpy(to, data, n), OK) : INVALID_VALUE;
}

int cuIpcGetMemHandle(Handle *handle, uint64_t pointer) {
  Allocation *it = at(pointer);
  note("share");
  if (current() < 0) return INVALID_CONTEXT;
  if (!it || !it->shareable || it->imported) return INVALID_VALUE;
  Named named = {getpid(), it->number, it->device, it->size};
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &named, sizeof named);
  return OK;
}

int cuIpcOpenMemHandle_v2(uint64_t *pointer, Handle handle, unsigned flags) {
  Named named;
  char name[64];
  note("open");
  memcpy(&named, &handle, sizeof named);
  if (current() < 0 || named.pid == getpid()) return INVALID_CONTEXT;
  if (flags != 1 || current() != named.device || kill(named.pid, 0)) return INVALID_VALUE;
  path(name, sizeof name, named.pid, named.number);
  return map(name, 0, named.size, named.device, named.number, pointer);
}

int cuIpcCloseMemHandle(uint64_t pointer) {
  note("close");
  return current() < 0 ? INVALID_CONTEXT : drop(pointer, 1);
}

int fake_copy(uint64_t to, uint64_t from, size_t n) {
  char *there = inside(to, n), *here = inside(from, n);
  return there && here ? (memmove(there, here, n), OK) : INVALID_VALUE;
}

/* What Mooncake's CUDA wheel links to beside, and does not call over TCP. */
#define ANSWER(name) int name(void) { return 801; }
ANSWER(cuCtxGetDevice)
ANSWER(cuDeviceGetAttribute)
ANSWER(cuGetErrorString)
ANSWER(cuMemAddressFree)
ANSWER(cuMemAddressReserve)
ANSWER(cuMemCreate)
ANSWER(cuMemExportToShareableHandle)
ANSWER(cuMemGetAllocationGranularity)
ANSWER(cuMemGetHandleForAddressRange)
ANSWER(cuMemImportFromShareableHandle)
ANSWER(cuMemMap)
ANSWER(cuMemRelease)
ANSWER(cuMemSetAccess)
ANSWER(cuMemUnmap)
ANSWER(cuPointerSetAttribute)

int cuGetErrorName(int code, const char **name) {
  *name = code == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : NULL;
  return *name ? OK : INVALID_VALUE;
}

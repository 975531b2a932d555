// A CUDA driver without a card: device memory is system memory, and there is only `capacity` of it.
//
// It has the calls that comfy-aimdo makes, and no more. Copies are done when they return, so streams and events are
// empty words. A page that is not mapped cannot be read or written: what ComfyUI has evicted ends the process.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
typedef unsigned long long address;

// comfy-aimdo puts a jump over the first bytes of these functions: the padding is room for it
#define CALL __attribute__((noinline, used, patchable_function_entry(32))) int

static size_t capacity = (size_t)8 << 30, used;
static int current;
void standin_set_capacity(size_t bytes) { capacity = bytes; }
void standin_set_device(int device) { current = device; }
size_t standin_used(void) { return used; }

static int reserve(size_t size) {
    if (used + size > capacity) return OUT_OF_MEMORY;
    used += size;
    return SUCCESS;
}

// two devices, which share their memory
CALL cuInit(unsigned flags) { return SUCCESS; }
CALL cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 2 ? SUCCESS : INVALID; }
CALL cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return SUCCESS; }
CALL cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "system memory"); return SUCCESS; }
CALL cuDeviceGetUuid(char *uuid, int device) { memset(uuid, device, 16); return SUCCESS; }
CALL cuDeviceTotalMem(size_t *size, int device) { *size = capacity; return SUCCESS; }
CALL cuCtxGetDevice(int *device) { *device = current; return SUCCESS; }
CALL cuCtxSynchronize(void) { return SUCCESS; }
CALL cuGetErrorString(int error, const char **text) { *text = "an error of the stand-in"; return SUCCESS; }
CALL cuMemGetInfo(size_t *free, size_t *total) { *free = capacity - used; *total = capacity; return SUCCESS; }

// allocations: their size is kept in front of them
enum { FRONT = 64 };
static int allocate(address *result, size_t size) {
    if (reserve(size)) return OUT_OF_MEMORY;
    char *memory = aligned_alloc(FRONT, (size + 2 * FRONT - 1) / FRONT * FRONT);
    *(size_t *)memory = size;
    *result = (address)(memory + FRONT);
    return SUCCESS;
}
static int release(address allocation) {
    char *memory = (char *)allocation - FRONT;
    used -= *(size_t *)memory;
    free(memory);
    return SUCCESS;
}
CALL cuMemAlloc(address *result, size_t size) { return allocate(result, size); }
CALL cuMemAlloc_v2(address *result, size_t size) { return allocate(result, size); }
CALL cuMemAllocAsync(address *result, size_t size, void *stream) { return allocate(result, size); }
CALL cuMemAllocAsync_ptsz(address *result, size_t size, void *stream) { return allocate(result, size); }
CALL cuMemFree(address allocation) { return release(allocation); }
CALL cuMemFree_v2(address allocation) { return release(allocation); }
CALL cuMemFreeAsync(address allocation, void *stream) { return release(allocation); }
CALL cuMemFreeAsync_ptsz(address allocation, void *stream) { return release(allocation); }

// host memory is all alike
CALL cuMemAllocHost(void **result, size_t size) { *result = malloc(size); return SUCCESS; }
CALL cuMemFreeHost(void *memory) { free(memory); return SUCCESS; }
CALL cuMemHostRegister(void *memory, size_t size, unsigned flags) { return SUCCESS; }
CALL cuMemHostUnregister(void *memory) { return SUCCESS; }
CALL cuMemcpyHtoDAsync(address to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return SUCCESS;
}

// virtual memory: a handle is its size, and pages lose their content when they are unmapped
static int unmapped(void *at, size_t size, int fixed, void **result) {
    *result = mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
    return *result == MAP_FAILED ? OUT_OF_MEMORY : SUCCESS;
}
CALL cuMemAddressReserve(address *result, size_t size, size_t alignment, address wish, address flags) {
    return unmapped(NULL, size, 0, (void **)result);
}
CALL cuMemAddressFree(address at, size_t size) { munmap((void *)at, size); return SUCCESS; }
CALL cuMemCreate(address *handle, size_t size, const void *properties, address flags) {
    *handle = size;
    return reserve(size);
}
CALL cuMemRelease(address handle) { used -= handle; return SUCCESS; }
CALL cuMemMap(address at, size_t size, size_t offset, address handle, address flags) {
    return mprotect((void *)at, size, PROT_READ | PROT_WRITE) ? INVALID : SUCCESS;
}
CALL cuMemSetAccess(address at, size_t size, const void *access, size_t count) { return SUCCESS; }
CALL cuMemUnmap(address at, size_t size) {
    void *result;
    return unmapped((void *)at, size, MAP_FIXED, &result);
}

CALL cuEventCreate(void **event, unsigned flags) { *event = &used; return SUCCESS; }
CALL cuEventDestroy(void *event) { return SUCCESS; }
CALL cuEventRecord(void *event, void *stream) { return SUCCESS; }
CALL cuEventSynchronize(void *event) { return SUCCESS; }

// a flag asks for the calls of a thread's own default stream, which have names of their own
static int find(const char *name, void **function, address flags) {
    char symbol[128];
    int own_stream = flags & 2 && (!strcmp(name, "cuMemAllocAsync") || !strcmp(name, "cuMemFreeAsync"));
    snprintf(symbol, sizeof symbol, "%s%s", name, own_stream ? "_ptsz" : "");
    void *library = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
    *function = library ? dlsym(library, symbol) : NULL;
    if (!*function) fprintf(stderr, "the stand-in for CUDA's driver has no %s\n", symbol);
    return *function ? SUCCESS : NOT_FOUND;
}
CALL cuGetProcAddress(const char *name, void **function, int version, address flags, int *status) {
    return find(name, function, flags);
}
CALL cuGetProcAddress_v2(const char *name, void **function, int version, address flags, int *status) {
    return find(name, function, flags);
}

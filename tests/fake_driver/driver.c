// A small stand-in for NVIDIA's libcuda.so.1: it loads nothing and runs nothing, and reports every
// launch to the tests. NVIDIA's Python packages run on it unchanged.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int Result;  // CUresult: 0 is success
typedef struct {     // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} Config;
typedef Result (*OnLaunch)(const char* kernel, const Config* config, void* context, void** values);

enum { DEVICES = 2, KERNELS = 64 };
static OnLaunch on_launch;           // null: launches are only counted
static long launches;
static int major = 7, minor = 5;     // compute capability
static char failing[64];             // the function that fails
static Result failure;
static char kernels[KERNELS][64];    // a kernel's handle is the address of its name
static __thread void* context;       // a device's primary context is its index plus one

#define MAY_FAIL if (!strcmp(failing, __func__)) return failure

// ---- for the tests -----------------------------------------------------------------------------

void fake_reset(void) {
  on_launch = 0;
  launches = failure = 0;
  failing[0] = 0;
}
void fake_on_launch(OnLaunch function) { on_launch = function; }
void fake_fail(const char* function, Result with) {
  snprintf(failing, sizeof failing, "%s", function);
  failure = with;
}
long fake_launches(void) { return launches; }

// ---- what cuda-core calls ----------------------------------------------------------------------

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int* count) { return *count = DEVICES, 0; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? major : attribute == 76 ? minor : 1;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** made, int device) {
  return *made = (void*)(intptr_t)(device + 1), 0;
}
Result cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
Result cuCtxSetCurrent(void* made) {
  MAY_FAIL;
  return context = made, 0;
}
Result cuCtxGetCurrent(void** current) { return *current = context, 0; }
Result cuCtxGetDevice(int* device) { return *device = (int)(intptr_t)context - 1, 0; }
Result cuGetErrorName(Result error, const char** name) { return *name = "CUDA_ERROR_FAKE", 0; }
Result cuGetErrorString(Result error, const char** text) { return *text = "as the test says", 0; }
Result cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d,
                         void* e, unsigned f) {
  MAY_FAIL;
  return *library = (void*)1, 0;
}
Result cuLibraryUnload(void* library) { return 0; }
Result cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  MAY_FAIL;
  for (int i = 0; i < KERNELS; i++) {
    if (!kernels[i][0]) snprintf(kernels[i], sizeof kernels[i], "%s", name);
    if (!strcmp(kernels[i], name)) return *kernel = kernels[i], 0;
  }
  return 2;
}
Result cuLaunchKernelEx(const Config* config, const char* kernel, void** values, void** extra) {
  MAY_FAIL;
  launches++;
  return on_launch ? on_launch(kernel, config, context, values) : 0;
}

// NVRTC asks the driver that it finds for private functions, and does without.
Result cuGetExportTable(const void** table, const void* id) { return *table = 0, 500; }

static Result unsupported(void) { return 801; }

Result cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags,
                           int* status) {
  static void* self;
  if (!self) {
    Dl_info here;
    dladdr((void*)cuInit, &here);
    self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }
  *function = dlsym(self, name);
  if (!*function) *function = (void*)unsupported;
  if (status) *status = 0;
  return 0;
}
Result cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}

/* A driver library with one Hopper GPU in it that runs nothing.
 *
 * benchmarks/attention_ptxas.py builds it as libcuda.so.1, so that the compiler of Mosaic kernels,
 * which asks the driver what it compiles for, works where there is no driver. Numbers of attributes
 * are those of CUdevice_attribute in cuda.h.
 */
#include <stddef.h>

enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SHARED_MEMORY = 97 };

#define SUCCEEDS(name) \
    int name(void) { return 0; }

SUCCEEDS(cuInit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncGetAttribute)
SUCCEEDS(cuCtxGetCurrent)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuOccupancyMaxActiveClusters)

int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case MULTIPROCESSORS: *value = 132; break;
    case CAPABILITY_MAJOR: *value = 9; break;
    case CAPABILITY_MINOR: *value = 0; break;
    case SHARED_MEMORY: *value = 232448; break;
    default: *value = 1;
    }
    return 0;
}

int cuModuleLoadData(void **module, const void *image) {
    (void)image;
    return *module = (void *)1, 0;
}

int cuModuleLoadDataEx(void **module, const void *image) { return cuModuleLoadData(module, image); }

int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module, (void)name;
    return *function = (void *)1, 0;
}

int cuModuleGetGlobal_v2(unsigned long long *address, size_t *bytes, void *module, const char *name) {
    (void)module, (void)name;
    return *address = 0, *bytes = 0, 0;
}

int cuGetErrorString(int error, const char **text) {
    (void)error;
    return *text = "no driver", 0;
}

int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }

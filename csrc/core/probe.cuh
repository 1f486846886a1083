// Finds out by a kernel that does nothing, once by device, whether a GPU runs this library: its
// driver, and code for its architecture.
#pragma once

#include <atomic>
#include <cuda_runtime.h>
#include <thread>

namespace uegr {

static __global__ void nothing_kernel() {}

// In a thread of its own: there the current device is nobody's (putting another one back would take
// memory on that one too), code may be loaded while the caller captures a graph, and an error is
// not blamed on the next call.
static cudaError_t ask_device(int device) {
    cudaError_t error = cudaSuccess;
    std::thread([&] {
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        error = cudaThreadExchangeStreamCaptureMode(&mode);
        if (error == cudaSuccess) error = cudaSetDevice(device);
        cudaFuncAttributes attributes;
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing_kernel);
    }).join();
    return error;
}

// cudaSuccess where the kernels run on a device, else why not.
cudaError_t probe_device(int device) {
    // one more than the error's number; two threads may both
    // ask, and hear the same
    static std::atomic<int> answers[64];
    // a host's, in tests
    if (device < 0) device = 0;
    if (device >= 64) return ask_device(device);
    if (answers[device] == 0) { answers[device] = static_cast<int>(ask_device(device)) + 1; }
    return static_cast<cudaError_t>(answers[device] - 1);
}

} // namespace uegr

// For core/native.py, which reads them without an operator.
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define TEXT(x) TEXT_OF(x)
#define TEXT_OF(x) #x

// The name of the runtime's error, "cudaSuccess" where the kernels run.
EXPORTED const char* uegr_kernels_probe(int device) {
    return cudaGetErrorName(uegr::probe_device(device));
}
// As 1000 * major + 10 * minor: the CUDA that the driver is for, 0 where there is none, and the
// library's own.
EXPORTED void uegr_kernels_versions(int* driver, int* library) {
    *driver = *library = 0;
    cudaDriverGetVersion(driver), cudaRuntimeGetVersion(library);
}
// Returns the architectures that build_cuda.py compiled for: "8.0/9.0a/10.0+PTX".
EXPORTED const char* uegr_kernels_architectures() { return TEXT(ARCHITECTURES); }

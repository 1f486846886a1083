// The CUDA operators as the CPU's, their threads taking turns: so the CPU's tests run on them.
#include "core/probe.cuh"
#include "core/tensor.h"
#include "operators.h"

namespace uegr {
OPERATORS(DECLARE)
}
STABLE_TORCH_LIBRARY_IMPL(uegr_kernels, CPU, m) { OPERATORS(IMPLEMENT) }

// A CPU tensor has no device to make current and no stream.
extern "C" {
__attribute__((visibility("default"))) int64_t launches_on_host() { return on_host::launches; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
    return *guard = nullptr, 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    return *stream = nullptr, 0;
}
}

// The compiled operators on the CPU.
#include "core/tensor.h"
#include "operators.h"

namespace uegr {
OPERATORS(DECLARE)
}

STABLE_TORCH_LIBRARY_IMPL(uegr_kernels, CPU, m) { OPERATORS(IMPLEMENT) }

// The compiled operators on CUDA, in a library of their own.
#include "core/probe.cuh"
#include "core/tensor.h"
#include "operators.h"

namespace uegr {
OPERATORS(DECLARE)
}

STABLE_TORCH_LIBRARY_IMPL(UEGR_NAMESPACE, CUDA, m) { OPERATORS(IMPLEMENT) }

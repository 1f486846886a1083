// The compiled operators on the CPU.
#include "core/tensor.h"
#include "operators.h"

namespace uegr {
OPERATORS(DECLARE)
}

STABLE_TORCH_LIBRARY_IMPL(UEGR_NAMESPACE, CPU, m) { OPERATORS(IMPLEMENT) }

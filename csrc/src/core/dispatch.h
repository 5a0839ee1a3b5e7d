// Choice of an instruction set.
#pragma once

#include <string>

#include "simd/kernels.h"

namespace paretofuse {

// The kernels that a call given `isa` uses; see chosen_isa.
const Kernels& choose_kernels(const std::string& isa);

}  // namespace paretofuse

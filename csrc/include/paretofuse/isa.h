// Instruction sets: which ones this build and this machine have, and which one a call uses.
#pragma once

#include <string>
#include <vector>

#include "paretofuse/export.h"

namespace paretofuse {

struct InstructionSet {
  const char* name;  // "avx512", "avx2", "neon" or "scalar"
  bool usable;       // compiled in, and supported by this processor and operating system
};

// Every instruction set this library has code for, in order of preference.
PARETOFUSE_API std::vector<InstructionSet> instruction_sets();

// The name of the instruction set that a call given `isa` uses. An empty `isa` leaves the choice to the
// environment variable PARETOFUSE_ISA, read at every call, and, where that is unset or empty, to the order of
// preference. Throws std::invalid_argument for a name that is unknown or not usable here.
PARETOFUSE_API const char* chosen_isa(const std::string& isa = {});

}  // namespace paretofuse

#include "core/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <array>
#include <cstdlib>
#include <stdexcept>

#include "paretofuse/isa.h"

namespace paretofuse {
namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;  // null: not compiled in
  bool supported;          // by the processor and the operating system
};

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows this feature by name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::array<Choice, 4> find_choices() {
#if defined(__x86_64__)
  // These checks include the operating system's saving of the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  const bool avx2 = false;
  const bool avx512 = false;
#endif
  return {{{"avx512", avx512_kernels(), avx512},
           {"avx2", avx2_kernels(), avx2},
           {"neon", neon_kernels(), true},
           {"scalar", scalar_kernels(), true}}};
}

// Found once: a virtual machine takes microseconds for the processor's answers.
const std::array<Choice, 4>& choices() {
  static const std::array<Choice, 4> found = find_choices();
  return found;
}

bool usable(const Choice& choice) { return choice.kernels != nullptr && choice.supported; }

}  // namespace

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
  for (const Choice& choice : choices()) sets.push_back({choice.name, usable(choice)});
  return sets;
}

const Kernels& choose_kernels(const std::string& isa) {
  const char* variable = std::getenv("PARETOFUSE_ISA");
  const std::string wanted = !isa.empty() ? isa : variable != nullptr ? variable : "";
  std::string names;
  for (const Choice& choice : choices()) {
    if (!usable(choice)) continue;
    if (wanted.empty() || wanted == choice.name) return *choice.kernels;
    names += names.empty() ? choice.name : std::string(", ") + choice.name;
  }
  throw std::invalid_argument((isa.empty() ? "environment variable PARETOFUSE_ISA" : "isa") +
                              std::string(": got \"") + wanted +
                              "\", expected an instruction set that this machine has: " + names);
}

const char* chosen_isa(const std::string& isa) { return choose_kernels(isa).name; }

}  // namespace paretofuse

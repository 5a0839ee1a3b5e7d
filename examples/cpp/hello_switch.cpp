// Opens a store, switches, and shows what came out.
//
//     hello_switch STORE [SHARE...]      one share for each objective; equal ones by default
#include <paretofuse/engine.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

int main(int count, char** arguments) {
  if (count < 2) return std::fprintf(stderr, "usage: hello_switch STORE [SHARE...]\n"), 2;
  try {
    const auto start = std::chrono::steady_clock::now();
    paretofuse::Engine engine = paretofuse::Engine::open(arguments[1]);
    paretofuse::Preference preference;
    for (int i = 2; i < count; ++i) preference.push_back(std::atof(arguments[i]));
    const double objectives = static_cast<double>(engine.objectives().size());
    if (preference.empty()) preference.assign(engine.objectives().size(), 1 / objectives);
    engine.switch_to(preference);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;

    for (std::size_t e = 0; e < preference.size(); ++e) {
      std::printf("%s: %g\n", engine.objectives()[e].c_str(), preference[e]);
    }
    for (const std::string& name : engine.tensor_names()) {
      const paretofuse::TensorView& view = engine.tensor(name);
      std::printf("%s %s [", name.c_str(), view.dtype.c_str());
      for (std::size_t d = 0; d < view.shape.size(); ++d) {
        std::printf("%s%lld", d > 0 ? ", " : "", static_cast<long long>(view.shape[d]));
      }
      std::printf("]");
      if (view.dtype == "F32" && view.nbytes > 0) {
        std::printf(" %.9g ...", static_cast<double>(*static_cast<const float*>(view.data)));
      }
      std::printf("\n");
    }
    std::printf("opened and switched in %.3f ms\n", took.count());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

// Fails each call of the driver in turn while weights are opened, merged, read and closed: every failure must
// be one clean error, and give back all that was taken from the driver. Sanitizers watch the host's memory.
//
//     cuda_faults STORE KERNELS FAKE_DRIVER
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "paretofuse/cuda.h"
#include "paretofuse/engine.h"

namespace pf = paretofuse;

namespace {

struct Fake {
  explicit Fake(const char* path) : library(dlopen(path, RTLD_NOW)) {
    if (library == nullptr) throw std::runtime_error("no fake driver");
    get(reset, "fake_reset");
    get(live, "fake_live");
    get(misuses, "fake_misuses");
    get(failed, "fake_failed");
  }
  template <class F>
  void get(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
  }

  void* library;
  void (*reset)(int);
  int (*live)();
  int (*misuses)();
  const char* (*failed)();
};

void require(bool holds, int call, const Fake& fake, const char* what) {
  if (holds) return;
  throw std::runtime_error("call " + std::to_string(call) + " (" + fake.failed() + "): " + what);
}

// Returns false once the failing call lies beyond the last one.
bool fail_at(int call, const Fake& fake, const pf::Engine& engine, const pf::CudaOptions& options) {
  fake.reset(call);
  const pf::Preference preference(engine.objectives().size(),
                                  1.0 / static_cast<double>(engine.objectives().size()));
  const auto failed = [&] { return std::strlen(fake.failed()) > 0; };
  std::vector<char> bytes;  // outlives what is queued
  std::optional<pf::CudaWeights> weights;
  std::string message;
  try {
    weights.emplace(engine.to_cuda(options));
    weights->switch_to(preference, &message);  // any address does for a stream
    const pf::TensorView& view = weights->tensor(engine.tensor_names().front());
    bytes.resize(static_cast<std::size_t>(view.nbytes));
    weights->read(engine.tensor_names().front(), bytes.data(), view.nbytes, &message);
  } catch (const pf::CudaError& error) {
    message = error.what();
  }
  const bool before = failed();
  // Giving up the current context is the one call whose failure changes nothing.
  const bool silent = std::string(fake.failed()) == "cuCtxPopCurrent";
  require(before == !message.empty() || (before && silent), call, fake, "an error was lost or made up");
  if (!message.empty()) {
    require(message.find(std::string(fake.failed())) == 0, call, fake, message.c_str());
    require(message.find("CUDA_ERROR_OUT_OF_MEMORY (2), out of memory") != std::string::npos, call, fake,
            message.c_str());
  }
  weights.reset();
  // Without a context nothing can be given back.
  const bool excused = !before && std::string(fake.failed()) == "cuCtxPushCurrent";
  require(excused || fake.live() == 0, call, fake, "something was not given back");
  require(fake.misuses() == 0, call, fake, "the driver was misused");
  return failed();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return std::fprintf(stderr, "usage: STORE KERNELS FAKE_DRIVER\n"), 2;
  try {
    const Fake fake(arguments[3]);
    const pf::Engine engine = pf::Engine::open(arguments[1]);
    pf::CudaOptions options;
    options.kernels = arguments[2];
    options.driver = arguments[3];
    int call = 1;
    while (fail_at(call, fake, engine, options)) ++call;
    std::printf("%d calls failed in turn\n", call - 1);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

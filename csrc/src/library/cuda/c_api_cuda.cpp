#include <vector>

#include "library/c_guard.h"
#include "paretofuse/cuda.h"

namespace pf = paretofuse;
using pf::c::guarded;
using pf::c::numbers;
using pf::c::required;
using pf::c::view_of;

struct paretofuse_cuda {
  pf::CudaWeights weights;
};

paretofuse_status paretofuse_cuda_open(const paretofuse_engine* engine,
                                       const paretofuse_cuda_options* options, paretofuse_cuda** cuda) {
  return guarded([&] {
    paretofuse_cuda*& result = required(cuda, "cuda");
    pf::CudaOptions chosen;
    chosen.kernels = &required(required(options, "options").kernels, "kernels");
    chosen.device = options->device;
    if (options->driver != nullptr) chosen.driver = options->driver;
    result = new paretofuse_cuda{required(engine, "engine").engine.to_cuda(chosen)};
  });
}

void paretofuse_cuda_close(paretofuse_cuda* cuda) { delete cuda; }

paretofuse_status paretofuse_cuda_switch(paretofuse_cuda* cuda, const double* preference,
                                         std::uint64_t length, void* stream) {
  return guarded([&] {
    required(cuda, "cuda")
        .weights.switch_to(pf::Preference(numbers(preference, length, "preference")), stream);
  });
}

paretofuse_status paretofuse_cuda_switch_weights(paretofuse_cuda* cuda, const float* weights,
                                                 std::uint64_t count, void* stream) {
  return guarded([&] {
    required(cuda, "cuda").weights.switch_to(pf::Weights{numbers(weights, count, "weights")}, stream);
  });
}

paretofuse_status paretofuse_cuda_tensor(const paretofuse_cuda* cuda, const char* name,
                                         paretofuse_view* view) {
  return guarded([&] {
    required(view, "view") = view_of(required(cuda, "cuda").weights.tensor(&required(name, "name")));
  });
}

paretofuse_status paretofuse_cuda_read(const paretofuse_cuda* cuda, const char* name, void* data,
                                       std::uint64_t nbytes, void* stream) {
  return guarded([&] {
    required(cuda, "cuda")
        .weights.read(&required(name, "name"), data, static_cast<std::int64_t>(nbytes), stream);
  });
}

// Runs a package of `paretofuse export` and switches its weights in place. Needs libtorch.
//
//     aoti STORE MODEL.pt2 INPUT ROWS COLUMNS
//
// INPUT: ROWS x COLUMNS numbers as they lie in memory, float32 or, for models that read tokens, int64; its
// size tells.
//
// The package's constants are pointed at the engine's memory once; from then on a switch of the engine is all
// it takes. Prints the model's first output at three preferences.
#include <ATen/ATen.h>
#include <paretofuse/engine.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

at::ScalarType scalar_type(const std::string& dtype) {
  if (dtype == "F32") return at::kFloat;
  if (dtype == "BF16") return at::kBFloat16;
  if (dtype == "F16") return at::kHalf;
  if (dtype == "I64") return at::kLong;
  if (dtype == "BOOL") return at::kBool;
  throw std::invalid_argument("dtype " + dtype + ": add it here");
}

// The engine's tensors that are constants of the package, as tensors over the same memory. What the package
// has besides (buffers that are not part of the state dict) keeps the values it was exported with.
std::unordered_map<std::string, at::Tensor> constants(const paretofuse::Engine& engine,
                                                      torch::inductor::AOTIModelPackageLoader& model) {
  std::unordered_map<std::string, at::Tensor> found;
  for (const std::string& name : model.get_constant_fqns()) {
    try {
      const paretofuse::TensorView& view = engine.tensor(name);
      found.emplace(name, at::from_blob(const_cast<void*>(view.data), view.shape, scalar_type(view.dtype)));
    } catch (const std::invalid_argument&) {  // none of the engine's
    }
  }
  return found;
}

void run(char** arguments) {
  paretofuse::Engine engine = paretofuse::Engine::open(arguments[1]);
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  auto shared = constants(engine, model);
  model.load_constants(shared, /*use_inactive=*/false, /*check_full_update=*/false, /*user_managed=*/true);

  std::ifstream file(arguments[3], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const std::vector<std::int64_t> shape{std::atoll(arguments[4]), std::atoll(arguments[5])};
  const auto size = static_cast<std::int64_t>(bytes.size()), count = shape[0] * shape[1];
  if (size != count * 4 && size != count * 8) throw std::invalid_argument("the input has another size");
  const at::Tensor input = at::from_blob(bytes.data(), shape, size == count * 4 ? at::kFloat : at::kLong);
  for (const double share : {1.0, 0.25, 0.0}) {
    engine.switch_to({share, 1 - share});
    const at::Tensor output = model.run({input}).at(0).to(at::kFloat).contiguous();
    std::printf("%g", share);
    for (std::int64_t i = 0; i < output.numel(); ++i) std::printf(" %.9g", output.data_ptr<float>()[i]);
    std::printf("\n");
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return std::fprintf(stderr, "usage: aoti STORE MODEL.pt2 INPUT ROWS COLUMNS\n"), 2;
  try {
    run(arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

// The engine: a store, opened, that turns any preference into dense weights. No Python and no torch.
//
//     const auto engine = paretofuse::Engine::open("store");
//     engine.switch_to({0.3, 0.7});
//     const paretofuse::TensorView& weight = engine.tensor("lm_head.weight");
//
// All results are bit for bit those of the Python engine's native backend at the same routing weights.
//
// Errors are exceptions: std::invalid_argument for what the caller gave, StoreError for what the files hold,
// std::system_error for the operating system's refusals, TimeoutError from acquire. A call that throws has
// changed no weights.
//
// Threads: const members may run at the same time; switch_to may not run beside anything that reads the
// engine's own weights (tensor, write). For one preference in each request use acquire.
//
// Files: a store is mapped, not copied. Replacing a store by `paretofuse stack`, pf.Engine.save or a rename
// is safe while it is open: the engine keeps the old files. Every merge first checks that no mapped file was
// rewritten in place or truncated, and throws StoreError if one was: open the store again. It looks at sizes
// and times of modification, and at the content (SHA-256) where only the time is another, so that a file may
// be touched. Bits that flip under an unchanged time are found by Options::verify alone. A file that is
// truncated in the very moment of a merge kills the process (SIGBUS), as it does with every mapped file:
// write stores by renaming, or open a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "paretofuse/export.h"

namespace paretofuse {

// A store cannot be read: missing, truncated, altered, too new, or not a store.
class PARETOFUSE_API StoreError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// No replica became free in time.
class PARETOFUSE_API TimeoutError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// How much each objective matters, in the order of Engine::objectives: numbers >= 0 that sum to 1.
using Preference = std::vector<double>;

// Routing weights [groups, planes], row by row. Where rows have coefficients of their own, these follow:
// [rows of all routed tensors in the manifest's order, planes]; and where columns have some too, [columns of
// all routed matrices in that order, planes].
struct Weights {
  std::vector<float> values;
};

// A tensor's memory, dense and row-major. The address is aligned to the element size.
struct TensorView {
  const void* data;
  std::int64_t nbytes;
  std::string dtype;  // as safetensors names it: "F32", "BF16", "F16", "I64" ...
  std::vector<std::int64_t> shape;
};

// Where merge_into shall put one tensor.
struct Target {
  std::string name;
  void* data;
  std::int64_t nbytes;  // must be the tensor's own size
};

struct Options {
  int threads = 0;      // of one merge; 0: as many as the model is worth and the machine has
  int replicas = 2;     // how many sets of merged weights `acquire` may keep
  std::string isa;      // forces an instruction set, see isa.h
  bool verify = false;  // read every file first and compare its checksum with the manifest
};

class Replica;
class CudaWeights;
struct CudaOptions;

class PARETOFUSE_API Engine {
 public:
  // Maps a store. Reads its manifest, headers and routers, nothing else.
  static Engine open(const std::string& path, const Options& options = {});

  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  const std::vector<std::string>& objectives() const;
  // What is mixed, in the order of routing weights: the experts' names. One for each objective, of its name,
  // unless the store was stacked with others.
  const std::vector<std::string>& planes() const;
  const std::vector<std::string>& groups() const;
  // Every stored tensor, in the order of the manifest.
  const std::vector<std::string>& tensor_names() const;
  // Objectives that have tensors of their own.
  std::vector<std::string> heads() const;

  // A preference by objective name; objectives left out have weight 0.
  Preference preference(const std::map<std::string, double>& by_name) const;

  // Runs the routers: float64 throughout, rounded once.
  Weights routing_weights(const Preference& preference) const;

  // Rewrites the engine's own weights in place. Views stay valid: no address changes.
  void switch_to(const Preference& preference);
  void switch_to(const Weights& weights);

  // The engine's own weights, by name or by a tied name; valid as long as the engine, also after it was
  // moved. Before the first switch merged tensors hold zeros. Throws std::invalid_argument for an unknown
  // name.
  const TensorView& tensor(std::string_view name) const;

  // Merges into the caller's memory, the given tensors only. Targets may overlap nothing.
  void merge_into(const Preference& preference, const std::vector<Target>& targets) const;
  void merge_into(const Weights& weights, const std::vector<Target>& targets) const;

  // Writes the engine's own weights, after a switch, as a complete model: one file if the path ends in
  // .safetensors (an older one is replaced), else a new directory that from_pretrained loads. It appears
  // whole or not at all. head: the objective whose own tensors and files it gets; empty: those of the base.
  void write(const std::string& path, const std::string& head = {}) const;

  // A set of weights, merged for this preference, that stays as it is until released; see replicas.h. Safe
  // from any number of threads. timeout: seconds to wait for a replica. Throws TimeoutError.
  Replica acquire(const Preference& preference,
                  double timeout = std::numeric_limits<double>::infinity()) const;

  // Copies base and deltas to a CUDA device, to be merged there; see cuda.h. Throws CudaError.
  CudaWeights to_cuda(const CudaOptions& options) const;

 private:
  struct State;
  explicit Engine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace paretofuse

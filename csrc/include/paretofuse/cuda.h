// Merged weights in the memory of a CUDA device. Needs the NVIDIA driver at run time, and nothing of CUDA to
// build: the driver's library is loaded when it is asked for.
//
// NOT YET RUN ON A GPU. The tests drive this code against a driver library of their own, which checks every
// call, carries out the copies and merges on the host, and fails each call in turn.
//
//     paretofuse::CudaOptions options;
//     options.kernels = "kernels";  // written by: python -m paretofuse.kernels.aot --arch sm_90 -o kernels
//     paretofuse::CudaWeights weights = engine.to_cuda(options);
//     weights.switch_to({0.3, 0.7}, stream);
//     run_model(weights.tensor("lm_head.weight").data, stream);
//
// Stores of every kind merge: planes lie on the device as in the store, low-rank factors as float32. Only
// tensors whose planes are of several formats (but dense ones beside low-rank ones), of low rank in rows of
// no multiple of 16 elements, or quantized in groups that pf.stack does not give, are decoded there. Base,
// merged weights and planes take device memory; row coefficients one float32 for each row and plane, which
// each switch copies. Stores whose columns have coefficients are refused with std::invalid_argument. Results
// may differ from the CPU's in the last bits: the kernels may fuse products and sums, decoded planes are
// rounded to the deltas' dtype, and a tensor core multiplies low-rank factors as three products of TF32, to
// about float32's rounding.
//
// Threads: one at a time may use a CudaWeights. It works in the device's primary context, the one that the
// CUDA runtime and PyTorch use, and leaves the calling thread's current context as it was.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "paretofuse/engine.h"
#include "paretofuse/export.h"

namespace paretofuse {

// The driver cannot be loaded, refused a call, or the kernels do not fit the device.
class PARETOFUSE_API CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct CudaOptions {
  std::string kernels;                  // folder of kernels made ahead of time, for the device's architecture
  int device = 0;                       // as the driver counts them
  std::string driver = "libcuda.so.1";  // what dlopen is given
};

class PARETOFUSE_API CudaWeights {
 public:
  CudaWeights(CudaWeights&&) noexcept;
  CudaWeights& operator=(CudaWeights&&) noexcept;
  ~CudaWeights();  // waits for the device

  // Queues a merge on a stream (a CUstream or cudaStream_t; null: the default stream) and returns; no address
  // changes. Work on another stream has to wait for it by the caller's means, and the next merge for that
  // work. A call that throws std::invalid_argument has changed nothing; a stream that is being captured into
  // a graph is refused so.
  void switch_to(const Preference& preference, void* stream = nullptr);
  void switch_to(const Weights& weights, void* stream = nullptr);

  // As Engine::tensor, but `data` is an address on the device, a multiple of 256.
  const TensorView& tensor(std::string_view name) const;

  // Copies a tensor to the host after the work queued on a stream, and waits for it. nbytes must be the
  // tensor's own size. After a CudaError the copy may still be under way until this object is destroyed.
  void read(std::string_view name, void* data, std::int64_t nbytes, void* stream = nullptr) const;

 private:
  friend class Engine;
  struct State;
  explicit CudaWeights(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace paretofuse

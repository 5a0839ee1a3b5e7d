// A store made ready to merge: which tensor goes where, and the plans that write them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "core/buffer.h"
#include "paretofuse/engine.h"
#include "paretofuse/merge.h"
#include "store/store.h"
#include "store/weight_rows.h"

namespace paretofuse {

// Shared by an engine and its replicas. Routed tensors are merged into buffers of the caller, one for each
// set of weights; static tensors are the same for every preference and merged once; constants stay where they
// are. All members may run at the same time.
class Model {
 public:
  Model(Store store, const Options& options);

  const Store& store() const { return store_; }
  const std::vector<std::string>& names() const { return names_; }
  const std::vector<std::string>& planes() const { return planes_; }
  int threads() const { return threads_; }
  const std::string& isa() const { return isa_; }

  // Position of a tensor in the manifest, by its name or a tied one. Throws std::invalid_argument.
  std::size_t index(std::string_view name) const;

  // Bytes of a buffer for the routed tensors.
  std::size_t routed_bytes() const { return routed_bytes_; }
  // Views of all tensors, in the manifest's order, with the routed ones in the given buffer.
  std::vector<TensorView> views(std::byte* routed) const;

  // The routing weights of a preference. Throws std::invalid_argument.
  Weights weights(const Preference& preference) const;
  const WeightRows& rows() const { return rows_; }

  // Rewrites a buffer of the routed tensors. Nothing is written if it throws.
  void merge(const Weights& weights, std::byte* routed) const;
  void merge_into(const Weights& weights, const std::vector<Target>& targets) const;

 private:
  // Where a tensor lives: at an offset into the routed or the static buffer, or at an address.
  struct Place {
    Role role;
    std::size_t offset = 0;
    const std::byte* address = nullptr;
    std::int64_t nbytes;
  };

  void merge_statics() const;
  // The plan that merges some tensors.
  MergePlan plan(const std::vector<std::size_t>& tensors) const;
  void run(const MergePlan& plan, const std::vector<std::size_t>& tensors, const Weights& weights,
           const std::vector<void*>& out) const;

  Store store_;
  int threads_;
  std::string isa_;
  std::vector<std::string> names_;
  std::vector<std::string> planes_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
  WeightRows rows_;
  std::vector<Place> places_;
  std::vector<std::size_t> routed_;  // tensors by role
  std::vector<std::size_t> static_;
  std::size_t routed_bytes_ = 0;
  std::vector<Buffer> copies_;  // of constants that their file does not align
  std::unique_ptr<const Buffer> statics_;
  mutable std::once_flag statics_merged_;
  std::unique_ptr<const MergePlan> routed_plan_;
};

}  // namespace paretofuse

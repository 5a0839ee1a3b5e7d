#include "library/model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "paretofuse/isa.h"

namespace paretofuse {
namespace {

constexpr std::size_t kLine = 64;

constexpr std::int64_t kBytesPerThread = 4 << 20;  // less is merged before a second thread has started

// moved: bytes that a merge reads and writes.
int thread_count(int wanted, std::int64_t moved) {
  if (wanted < 0 || wanted > 1024) {
    throw std::invalid_argument("threads: got " + std::to_string(wanted) + ", expected 0 to 1024");
  }
  if (wanted > 0) return wanted;
  const std::int64_t useful = std::clamp<std::int64_t>(moved / kBytesPerThread, 1, 1024);
  return static_cast<int>(std::clamp<std::int64_t>(std::thread::hardware_concurrency(), 1, useful));
}

// Bytes of the tensors of one role, each on a cache line.
std::size_t reserve(std::size_t* end, std::int64_t nbytes) {
  const std::size_t offset = *end;
  *end += (static_cast<std::size_t>(nbytes) + kLine - 1) / kLine * kLine;
  return offset;
}

}  // namespace

Model::Model(Store store, const Options& options)
    : store_(std::move(store)), threads_(options.threads), isa_(options.isa), rows_(store_.manifest) {
  chosen_isa(isa_);  // refuses one that this machine lacks
  for (const Member& member : store_.manifest.members) planes_.push_back(member.plane);
  std::size_t static_bytes = 0;
  for (const TensorSpec& spec : store_.manifest.tensors) {
    const std::size_t number = names_.size();
    names_.push_back(spec.name);
    by_name_.emplace(spec.name, number);
    for (const std::string& alias : spec.aliases) by_name_.emplace(alias, number);
    const Entry& entry = *store_.base.find(spec.name);
    Place place{spec.role, 0, nullptr, entry.nbytes};
    if (spec.role == Role::routed) {
      place.offset = reserve(&routed_bytes_, entry.nbytes);
      routed_.push_back(number);
    } else if (spec.role == Role::fixed) {
      place.offset = reserve(&static_bytes, entry.nbytes);
      static_.push_back(number);
    } else {
      place.address = store_.base.data(entry);
      if (entry.nbytes > 0 && entry.offset % dtype_size(entry.dtype) != 0) {
        copies_.emplace_back(static_cast<std::size_t>(entry.nbytes));
        std::memcpy(copies_.back().data(), place.address, static_cast<std::size_t>(entry.nbytes));
        place.address = copies_.back().data();
      }
    }
    places_.push_back(place);
  }
  const auto moved = static_cast<std::int64_t>(routed_bytes_ * (store_.manifest.members.size() + 2));
  threads_ = thread_count(options.threads, moved);
  statics_ = std::make_unique<const Buffer>(static_bytes);
  routed_plan_ = std::make_unique<MergePlan>(plan(routed_));
}

std::size_t Model::index(std::string_view name) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) {
    throw std::invalid_argument("got tensor \"" + std::string(name) + "\", which the store does not have");
  }
  return found->second;
}

std::vector<TensorView> Model::views(std::byte* routed) const {
  std::vector<TensorView> views;
  for (std::size_t number = 0; number < places_.size(); ++number) {
    const Place& place = places_[number];
    const TensorSpec& spec = store_.manifest.tensors[number];
    const std::byte* data = place.role == Role::routed  ? routed + place.offset
                            : place.role == Role::fixed ? statics_->data() + place.offset
                                                        : place.address;
    views.push_back({data, place.nbytes, spec.dtype, spec.shape});
  }
  return views;
}

Weights Model::weights(const Preference& preference) const {
  check_preference(preference, store_.manifest.objectives);
  return store_.routers.evaluate(preference);
}

MergePlan Model::plan(const std::vector<std::size_t>& tensors) const {
  std::vector<Segment> segments;
  std::vector<Plane> planes;
  for (const std::size_t number : tensors) {
    const TensorSpec& spec = store_.manifest.tensors[number];
    const Entry& entry = *store_.base.find(spec.name);
    const DType dtype = merged_dtype(spec.dtype);
    const std::int64_t length = entry.nbytes / item_size(dtype);
    segments.push_back(
        {store_.base.data(entry), length, rows_.of(spec), columns_of(spec.shape), dtype, dtype});
    for (std::size_t e = 0; e < store_.experts.size(); ++e) planes.push_back(store_.plane(e, spec));
  }
  return MergePlan(std::move(segments), std::move(planes),
                   static_cast<std::int64_t>(store_.manifest.members.size()), rows_.count());
}

void Model::run(const MergePlan& plan, const std::vector<std::size_t>& tensors, const Weights& weights,
                const std::vector<void*>& out) const {
  if (out.empty()) return;
  std::vector<std::vector<float>> own;
  std::vector<const float*> row_weights, column_weights;
  const auto add = [&own](std::vector<const float*>* addresses, std::vector<float> values) {
    own.push_back(std::move(values));
    addresses->push_back(own.back().empty() ? nullptr : own.back().data());
  };
  for (const std::size_t number : tensors) {
    const TensorSpec& spec = store_.manifest.tensors[number];
    const std::int64_t count = places_[number].nbytes > 0 ? rows_of(spec.shape) : 0;
    add(&row_weights, rows_.of_rows(weights, spec, 0, count));
    add(&column_weights, count > 0 ? rows_.of_columns(weights, spec) : std::vector<float>());
  }
  plan.run(rows_.at(weights).data(), 1, out.data(), threads_, isa_,
           rows_.by_row(weights) ? row_weights.data() : nullptr,
           rows_.by_column(weights) ? column_weights.data() : nullptr);
}

void Model::merge_statics() const {
  std::call_once(statics_merged_, [this] {
    std::vector<void*> out;
    if (static_.empty()) return;
    for (const std::size_t number : static_) out.push_back(statics_->data() + places_[number].offset);
    plan(static_).run(rows_.of_statics().data(), 1, out.data(), threads_, isa_);
  });
}

void Model::merge(const Weights& weights, std::byte* routed) const {
  rows_.at(weights);  // checks them before anything is written
  store_.check_unchanged();
  merge_statics();
  std::vector<void*> out;
  for (const std::size_t number : routed_) out.push_back(routed + places_[number].offset);
  run(*routed_plan_, routed_, weights, out);
}

void Model::merge_into(const Weights& weights, const std::vector<Target>& targets) const {
  rows_.at(weights);  // checks them before anything is written
  std::vector<std::size_t> merged;
  std::vector<void*> out;
  for (const Target& target : targets) {
    const std::size_t number = index(target.name);
    const Place& place = places_[number];
    if (target.nbytes != place.nbytes || (target.data == nullptr && place.nbytes > 0)) {
      throw std::invalid_argument("target \"" + target.name + "\": got " + std::to_string(target.nbytes) +
                                  " bytes at " + (target.data == nullptr ? "null" : "an address") +
                                  ", expected " + std::to_string(place.nbytes));
    }
    if (place.role == Role::constant) continue;
    merged.push_back(number);
    out.push_back(target.data);
  }
  store_.check_unchanged();
  run(plan(merged), merged, weights, out);
  for (const Target& target : targets) {
    const Place& place = places_[index(target.name)];
    if (place.role != Role::constant || place.nbytes == 0) continue;
    std::memcpy(target.data, place.address, static_cast<std::size_t>(place.nbytes));
  }
}

}  // namespace paretofuse

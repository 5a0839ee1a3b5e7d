#include "paretofuse/replicas.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "library/replica_pool.h"

namespace paretofuse {

ReplicaPool::ReplicaPool(std::shared_ptr<const Model> model, int count)
    : model_(std::move(model)), slots_(count, model_->store().manifest.objectives.size()) {
  for (int replica = 0; replica < count; ++replica) {
    buffers_.emplace_back(model_->routed_bytes());
    views_.push_back(model_->views(buffers_.back().data()));
  }
}

Replica ReplicaPool::acquire(const Preference& preference) {
  // A preference that some replica has was checked when that one was merged.
  if (preference.size() != model_->store().manifest.objectives.size()) model_->weights(preference);
  const int replica = slots_.acquire(preference.data(), [&](int slot) {
    model_->merge(model_->weights(preference), buffers_[static_cast<std::size_t>(slot)].data());
  });
  return Replica(shared_from_this(), replica);
}

const TensorView& ReplicaPool::tensor(int replica, std::string_view name) const {
  return views_[static_cast<std::size_t>(replica)][model_->index(name)];
}

Replica::Replica(Replica&& other) noexcept : pool_(std::move(other.pool_)), index_(other.index_) {}

Replica& Replica::operator=(Replica&& other) noexcept {
  if (this == &other) return *this;
  release();
  pool_ = std::move(other.pool_);
  index_ = other.index_;
  return *this;
}

Replica::~Replica() { release(); }

void Replica::release() noexcept {
  if (pool_ != nullptr) pool_->release(index_);
  pool_.reset();
}

const TensorView& Replica::tensor(std::string_view name) const { return pool_->tensor(index_, name); }

}  // namespace paretofuse

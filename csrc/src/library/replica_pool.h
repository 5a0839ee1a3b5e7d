// The replicas of an engine: buffers, and who holds which.
#pragma once

#include <memory>
#include <vector>

#include "core/buffer.h"
#include "library/model.h"
#include "library/slots.h"
#include "paretofuse/replicas.h"

namespace paretofuse {

class ReplicaPool : public std::enable_shared_from_this<ReplicaPool> {
 public:
  ReplicaPool(std::shared_ptr<const Model> model, int count);

  Replica acquire(const Preference& preference, double timeout);
  const TensorView& tensor(int replica, std::string_view name) const;
  void release(int replica) noexcept { slots_.release(replica); }

 private:
  std::shared_ptr<const Model> model_;
  Slots slots_;
  std::vector<Buffer> buffers_;
  std::vector<std::vector<TensorView>> views_;
};

}  // namespace paretofuse

// Replicas: several sets of merged weights over one set of deltas, so that every request has its own
// preference.
//
//     const paretofuse::Replica replica = engine.acquire({0.3, 0.7});
//     run(replica.tensor("lm_head.weight").data);
//
// A replica is pinned while any handle to it lives, and never rewritten then. Acquiring a preference that is
// merged already takes no lock. Otherwise the least recently used replica that nobody holds is merged anew,
// while holders of the others go on; callers that want the same preference wait for that one merge. Where all
// replicas are held or being merged, acquire waits until one is free, for `timeout` seconds at most: open the
// engine with as many replicas as there are different preferences in flight.
//
// Those who wait are served in the order in which they came. For the first of them the least recently used
// replica is drained: who asks for its preference from then on waits too, unless that thread holds a replica
// already. A thread that holds one and asks for another preference needs two of them.
//
// After fork(), engines go on working in the child, but for replicas: those that other threads held are never
// released there, and a fork while another thread acquires or releases leaves a lock taken. Fork before
// serving.
#pragma once

#include <atomic>
#include <memory>
#include <string_view>

#include "paretofuse/engine.h"
#include "paretofuse/export.h"

namespace paretofuse {

class ReplicaPool;

// A pinned replica, released when it goes out of scope. It may be moved to another thread, and outlives the
// engine.
class PARETOFUSE_API Replica {
 public:
  Replica(Replica&& other) noexcept;
  Replica& operator=(Replica&& other) noexcept;
  ~Replica();

  // As Engine::tensor; valid as long as this replica.
  const TensorView& tensor(std::string_view name) const;

  // Which of the engine's replicas this is, from 0.
  int index() const { return index_; }

 private:
  friend class ReplicaPool;
  Replica(std::shared_ptr<ReplicaPool> pool, int index, std::shared_ptr<std::atomic<int>> held);
  void release() noexcept;

  std::shared_ptr<ReplicaPool> pool_;
  int index_;
  std::shared_ptr<std::atomic<int>> held_;  // of the thread that acquired it
};

}  // namespace paretofuse

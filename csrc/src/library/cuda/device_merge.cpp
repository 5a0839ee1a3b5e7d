#include "library/cuda/device_merge.h"

#include <utility>

namespace paretofuse {

DeviceMerge::DeviceMerge(const Source& source, Bucket bucket)
    : bucket_(std::move(bucket)),
      base_(source.context, bytes(bucket_.length(), bucket_.dtype)),
      out_(source.context, base_.size()),
      planes_(static_cast<std::int32_t>(source.model.planes().size())),
      rows_(static_cast<std::int32_t>(source.model.rows().count())) {
  base_.zero();  // tensors end within a tile
  out_.zero();
  const Store& store = source.model.store();
  for (std::size_t i = 0; i < bucket_.tensors.size(); ++i) {
    const Entry& entry = *store.base.find(store.manifest.tensors[bucket_.tensors[i]].name);
    base_.write(bytes(bucket_.offsets[i], bucket_.dtype), store.base.data(entry),
                static_cast<std::size_t>(entry.nbytes));
  }
}

}  // namespace paretofuse

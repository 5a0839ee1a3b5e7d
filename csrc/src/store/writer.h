// Writing a merged model, from disk to disk: memory stays at two output buffers and the mapped pages of one
// batch, whatever the size of the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "paretofuse/engine.h"
#include "store/shards.h"
#include "store/store.h"

namespace paretofuse {

struct WriteOptions {
  std::string head;  // the objective whose head to use; empty for the base's
  std::map<std::string, std::string>
      files;  // what stands beside the weights of a directory: contents by name
  int threads = 1;
  std::string isa;
  std::function<void(std::int64_t, std::int64_t)> progress;  // bytes written and in all; may throw
  std::int64_t batch_bytes = 8 << 20;                        // of output, merged at once
  std::int64_t shard_bytes = kShardBytes;                    // of one of several files
};

// What was written.
struct Merged {
  std::string path;
  std::size_t tensors;
  std::int64_t nbytes;
  std::string isa;  // that merged; empty if nothing but constants was there
};

// Merges a store into a complete model directory, or into one file if the path ends in .safetensors. Weights
// of more than `options.shard_bytes` become several files of a directory, with an index (shards.h), but for
// open_clip, which reads one. The result appears whole or not at all. Tied tensors are written once, under
// the name they are stored by. An earlier merge there is replaced, and nothing else is.
//
// Throws std::invalid_argument for bad weights, a bad head, instruction set or path, and where the path holds
// other files; StoreError where a mapped file has changed; FileError.
Merged write_model(const Store& store, const Weights& weights, const std::string& path,
                   const WriteOptions& options);

}  // namespace paretofuse

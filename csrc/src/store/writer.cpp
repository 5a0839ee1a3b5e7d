#include "store/writer.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/planes.h"
#include "paretofuse/isa.h"
#include "paretofuse/merge.h"
#include "store/atomic.h"
#include "store/safetensors_writer.h"
#include "store/shown.h"
#include "store/weight_rows.h"

namespace paretofuse {
namespace {

namespace fs = std::filesystem;

using Files = std::map<std::string, std::string>;

constexpr const char* kOpenClip = "open_clip_model";

// What the library that a model's files belong to calls its weights, without the suffix.
const char* weights_stem(const Files& files) {
  if (files.count("open_clip_config.json") != 0) return kOpenClip;
  const auto config = files.find("config.json");
  // Only diffusers writes the class under this name.
  const bool diffusers = config != files.end() && config->second.find("\"_class_name\"") != std::string::npos;
  return diffusers ? "diffusion_pytorch_model" : "model";
}

// In the header of every merge: the first for transformers, the second so that only merges are replaced by
// merges.
const Files kMetadataOfMerges = {{"format", "pt"}, {"written_by", "paretofuse merge"}};

// One tensor of the output: merged if it has a spec, else copied.
struct Output {
  const TensorFile* file;
  const Entry* entry;
  const TensorSpec* spec;
};

// Elements begin to end of one tensor, and the byte of the batch's buffer where they go.
struct Piece {
  const Output* output;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t position;
};

// Bytes per element.
std::int64_t item(const Output& output) { return dtype_size(output.entry->dtype); }

std::int64_t nbytes(const Piece& piece) { return (piece.end - piece.begin) * item(*piece.output); }

// The tensors of the output in file order: larger elements first, so that every tensor is aligned.
std::vector<Output> outputs_of(const Store& store, const std::string& head) {
  const auto found = store.heads.find(head);
  if (!head.empty() && found == store.heads.end()) {
    std::string known;
    for (const auto& [objective, file] : store.heads) known += (known.empty() ? "" : ", ") + shown(objective);
    throw std::invalid_argument("got head " + shown(head) +
                                ", expected one that the store has: " + (known.empty() ? "none" : known));
  }
  const TensorFile* own = head.empty() ? nullptr : &found->second;
  std::vector<Output> outputs;
  for (const TensorSpec& spec : store.manifest.tensors) {
    if (own != nullptr && own->find(spec.name) != nullptr) continue;
    outputs.push_back(
        {&store.base, store.base.find(spec.name), spec.role == Role::constant ? nullptr : &spec});
  }
  if (own != nullptr) {
    for (const Entry& entry : own->entries) outputs.push_back({own, &entry, nullptr});
  }
  std::stable_sort(outputs.begin(), outputs.end(),
                   [](const Output& a, const Output& b) { return item(a) > item(b); });
  return outputs;
}

// Elements of a tensor that pieces of it are a multiple of: its planes' groups and rows stay whole.
std::int64_t unit_of(const Store& store, const TensorSpec* spec, bool by_row) {
  std::int64_t unit = 1;
  if (by_row && spec != nullptr && spec->role == Role::routed) {
    unit = std::max<std::int64_t>(1, columns_of(spec->shape));
  }
  for (std::size_t e = 0; spec != nullptr && e < store.experts.size(); ++e) {
    const Plane plane = store.plane(e, *spec);
    if (plane.values == nullptr || plane.format == Format::Dense) continue;
    unit = std::lcm(unit, plane.format == Format::LowRank ? columns_of(spec->shape) : plane.size);
  }
  return unit;
}

// Cuts the output into batches, the pieces of each one after the other.
std::vector<std::vector<Piece>> batches_of(const Store& store, const std::vector<Output>& outputs,
                                           bool by_row, std::int64_t batch_bytes) {
  std::vector<std::vector<Piece>> batches(1);
  std::int64_t position = 0;
  for (const Output& output : outputs) {
    const std::int64_t count = output.entry->nbytes / item(output);
    const std::int64_t unit = unit_of(store, output.spec, by_row);
    std::int64_t begin = 0;
    do {
      std::int64_t room = (batch_bytes - position) / item(output);
      if (room < count - begin) room = room / unit * unit;
      if (room == 0 && position > 0) {
        batches.emplace_back();
        position = 0;
        continue;
      }
      // A unit may be larger than a batch.
      const std::int64_t end = std::min(count, begin + std::max(room, unit));
      batches.back().push_back({&output, begin, end, position});
      position += (end - begin) * item(output);
      begin = end;
    } while (begin < count);
  }
  return batches;
}

// Merges and copies batches of one store at given weights.
class Merge {
 public:
  Merge(const Store& store, const Weights& weights, const WriteOptions& options)
      : store_(store),
        options_(options),
        rows_(store.manifest),
        weights_(weights),
        table_(rows_.at(weights)) {}

  void fill(const std::vector<Piece>& batch, std::byte* buffer) {
    std::vector<Segment> segments;
    std::vector<Plane> planes;
    std::vector<void*> out;
    std::vector<std::vector<float>> own;
    std::vector<const float*> row_weights, column_weights;
    const auto add = [&own](std::vector<const float*>* addresses, std::vector<float> weights) {
      own.push_back(std::move(weights));
      addresses->push_back(own.back().empty() ? nullptr : own.back().data());
    };
    for (const Piece& piece : batch) {
      const Output& output = *piece.output;
      if (output.spec == nullptr) {
        if (piece.end > piece.begin) {
          std::memcpy(buffer + piece.position, address(*output.file, *output.entry, piece),
                      static_cast<std::size_t>(nbytes(piece)));
        }
        continue;
      }
      const TensorSpec& spec = *output.spec;
      const std::int64_t columns = columns_of(spec.shape);
      segments.push_back({address(*output.file, *output.entry, piece), piece.end - piece.begin,
                          rows_.of(spec), columns, merged_dtype(spec.dtype), merged_dtype(spec.dtype)});
      for (std::size_t e = 0; e < store_.experts.size(); ++e) {
        planes.push_back(plane_from(store_.plane(e, spec), piece.begin, columns));
      }
      out.push_back(buffer + piece.position);
      const std::int64_t length = piece.end - piece.begin;
      add(&row_weights, length == 0 ? std::vector<float>()
                                    : rows_.of_rows(weights_, spec, piece.begin / columns, length / columns));
      add(&column_weights, length == 0 ? std::vector<float>() : rows_.of_columns(weights_, spec));
    }
    if (!segments.empty()) {
      const auto experts = static_cast<std::int64_t>(store_.experts.size());
      const MergePlan plan(std::move(segments), std::move(planes), experts, rows_.count());
      isa_ = plan.run(table_.data(), 1, out.data(), options_.threads, options_.isa,
                      rows_.by_row(weights_) ? row_weights.data() : nullptr,
                      rows_.by_column(weights_) ? column_weights.data() : nullptr);
    }
    for (const Piece& piece : batch) release(piece);
  }

  const std::string& isa() const { return isa_; }

 private:
  static const std::byte* address(const TensorFile& file, const Entry& entry, const Piece& piece) {
    return file.data(entry) + piece.begin * dtype_size(entry.dtype);
  }

  static void release(const TensorFile& file, const Entry& entry, const Piece& piece) {
    const std::int64_t size = dtype_size(entry.dtype);
    file.file.release(entry.offset + piece.begin * size, entry.offset + piece.end * size);
  }

  void release(const Piece& piece) const {
    const Output& output = *piece.output;
    release(*output.file, *output.entry, piece);
    if (output.spec == nullptr) return;
    for (std::size_t e = 0; e < store_.experts.size(); ++e) {
      const std::vector<const Entry*> entries = store_.plane_entries(e, *output.spec);
      if (entries.empty()) continue;
      // Of a plane that is not dense all pages go: the next piece reads what it needs of them again.
      for (const Entry* entry : entries) {
        const Piece whole{&output, 0, entry->nbytes / dtype_size(entry->dtype), 0};
        release(store_.experts[e], *entry, entries.size() == 1 ? piece : whole);
      }
    }
  }

  const Store& store_;
  const WriteOptions& options_;
  const WeightRows rows_;
  const Weights& weights_;
  const std::vector<float> table_;
  std::string isa_;
};

void write_batch(SafetensorsWriter& writer, const std::vector<Piece>& batch, const std::byte* buffer) {
  for (const Piece& piece : batch) {
    const Entry& entry = *piece.output->entry;
    if (piece.begin == 0) writer.begin(entry.name, entry.dtype, entry.shape);
    writer.write(buffer + piece.position, static_cast<std::size_t>(nbytes(piece)));
    if (piece.end * item(*piece.output) == entry.nbytes) writer.end();
  }
}

// While a batch is merged, one thread writes the one before, and another pushes what is written to the disk,
// so that little is left for the sync at the end. advance: told the bytes of each batch. Returns the
// instruction set that merged.
std::string write_weights(const Store& store, const Weights& weights, const std::vector<Output>& outputs,
                          const std::string& path, const WriteOptions& options,
                          const std::function<void(std::int64_t)>& advance) {
  const std::vector<std::vector<Piece>> batches =
      batches_of(store, outputs, WeightRows(store.manifest).by_row(weights), options.batch_bytes);
  std::int64_t room = 0;
  for (const std::vector<Piece>& batch : batches) {
    if (!batch.empty()) room = std::max(room, batch.back().position + nbytes(batch.back()));
  }
  const Buffer buffers[] = {Buffer(static_cast<std::size_t>(room)), Buffer(static_cast<std::size_t>(room))};
  SafetensorsWriter writer(path, kMetadataOfMerges, 1024 + 256 * outputs.size());
  Merge merge(store, weights, options);
  std::future<void> syncing, writing;  // which wait for their threads where an exception leaves this function
  for (std::size_t number = 0; number < batches.size(); ++number) {
    const std::vector<Piece>& batch = batches[number];
    std::byte* buffer = buffers[number % 2].data();
    merge.fill(batch, buffer);
    if (writing.valid()) writing.get();
    writing =
        std::async(std::launch::async, [&writer, &batch, buffer] { write_batch(writer, batch, buffer); });
    if (!syncing.valid() || syncing.wait_for(std::chrono::seconds(0)) == std::future_status::ready) {
      if (syncing.valid()) syncing.get();  // an error of the disk is told only once
      syncing = std::async(std::launch::async, [&writer] { writer.sync(); });
    }
    std::int64_t bytes = 0;
    for (const Piece& piece : batch) bytes += nbytes(piece);
    advance(bytes);
  }
  if (writing.valid()) writing.get();
  if (syncing.valid()) syncing.get();
  writer.finish();
  return merge.isa();
}

void write_file(const std::string& path, const std::string& content) {
  const Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.number() < 0) throw FileError(path);
  write_all(file.number(), path, content.data(), content.size());
}

// std::invalid_argument where a weights file stands that no merge has written: it may be somebody's original.
void check_ours(const fs::path& weights) {
  try {
    if (TensorFile(MappedFile(weights.string())).metadata == kMetadataOfMerges) return;
  } catch (const StoreError&) {  // nothing that a merge has written
  }
  throw std::invalid_argument(
      "got " + weights.string() +
      ", which exists and was not written by a merge; choose another place or remove it");
}

[[noreturn]] void refuse_directory(const fs::path& target, const std::string& name) {
  throw std::invalid_argument("got " + target.string() + ", which holds another file (" + name +
                              "); choose another place or remove it");
}

// The same for a directory: it may hold an earlier merge, in however many files, and nothing else.
void check_directory(const fs::path& target, const Files& files, const std::string& stem) {
  if (!fs::exists(fs::symlink_status(target))) return;
  if (!fs::is_directory(target)) {
    throw std::invalid_argument("got " + target.string() +
                                ", which is a file, expected a directory or a name ending in .safetensors");
  }
  bool merged = false, index = false;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(target)) {
    const std::string name = entry.path().lexically_relative(target).generic_string();
    if (entry.is_directory() || files.count(name) != 0) continue;
    if (is_shard_name(stem, name)) {
      check_ours(entry.path());
      merged = true;
    } else if (name == index_name(stem)) {
      index = true;
    } else {
      refuse_directory(target, name);
    }
  }
  if (index && !merged) refuse_directory(target, index_name(stem));
}

// Writes the weights of a model, into one file or several, and their index. Returns the instruction set that
// merged.
std::string write_files(const Store& store, const Weights& weights, const std::vector<Output>& outputs,
                        const std::string& directory, const std::string& stem, const WriteOptions& options,
                        const std::function<void(std::int64_t)>& advance) {
  std::vector<std::int64_t> sizes;
  std::int64_t parameters = 0, bytes = 0;
  for (const Output& output : outputs) {
    sizes.push_back(output.entry->nbytes);
    bytes += output.entry->nbytes;
    parameters += output.entry->nbytes / item(output);
  }
  const bool whole = stem == kOpenClip;
  const std::vector<std::size_t> ends =
      whole ? std::vector<std::size_t>{sizes.size()} : shard_ends(sizes, options.shard_bytes);
  std::map<std::string, std::string> weight_map;
  std::string isa;
  std::size_t begin = 0;
  for (std::size_t number = 0; number < ends.size(); ++number) {
    const std::string name = shard_name(stem, number, ends.size());
    const std::vector<Output> own(outputs.begin() + static_cast<std::ptrdiff_t>(begin),
                                  outputs.begin() + static_cast<std::ptrdiff_t>(ends[number]));
    for (const Output& output : own) weight_map[output.entry->name] = name;
    const std::string by = write_weights(store, weights, own, directory + "/" + name, options, advance);
    if (isa.empty()) isa = by;
    begin = ends[number];
  }
  if (ends.size() > 1) {
    write_file(directory + "/" + index_name(stem), index_text(parameters, bytes, weight_map));
  }
  return isa;
}

}  // namespace

Merged write_model(const Store& store, const Weights& weights, const std::string& path,
                   const WriteOptions& options) {
  const std::vector<Output> outputs = outputs_of(store, options.head);
  check_threads(options.threads);
  chosen_isa(options.isa);  // refuses before anything is written
  if (path.empty()) throw std::invalid_argument("got path '', expected the name of a file or directory");
  const bool is_file = fs::path(path).extension() == ".safetensors";
  const Files& files = options.files;
  for (const auto& [own, content] : files) {
    if (!is_model_file(own))
      throw std::invalid_argument("got file " + shown(own) +
                                  ", expected no path out of the model and no weights");
  }
  const std::string stem = weights_stem(files);
  if (!is_file) {
    check_directory(path, files, stem);
  } else if (fs::is_directory(path)) {
    throw std::invalid_argument("got " + path +
                                ", which is a directory, expected a file; choose another name");
  } else if (fs::exists(path)) {
    check_ours(path);
  }
  store.check_unchanged();
  Fresh fresh(path, is_file ? Fresh::Kind::file : Fresh::Kind::directory);
  Merged merged{fresh.target(), outputs.size(), 0, {}};
  for (const Output& output : outputs) merged.nbytes += output.entry->nbytes;
  std::int64_t done = 0;
  const auto advance = [&](std::int64_t bytes) {
    done += bytes;
    if (options.progress) options.progress(done, merged.nbytes);
  };
  merged.isa = is_file ? write_weights(store, weights, outputs, fresh.path(), options, advance)
                       : write_files(store, weights, outputs, fresh.path(), stem, options, advance);
  for (const auto& [own, content] : is_file ? Files() : files) {
    const fs::path place = fs::path(fresh.path()) / own;
    fs::create_directories(place.parent_path());
    write_file(place.string(), content);
  }
  fresh.place();
  return merged;
}

}  // namespace paretofuse

#include "library/writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace paretofuse {
namespace {

namespace fs = std::filesystem;

// The weights' name, as from_pretrained expects it, but for models with open_clip's configuration.
constexpr const char* kWeightsFile = "model.safetensors";
constexpr const char* kOpenClipConfig = "open_clip_config.json";
constexpr const char* kOpenClipWeightsFile = "open_clip_model.safetensors";

[[noreturn]] void fail(const fs::path& path) {
  throw std::system_error(errno, std::generic_category(), path.string());
}

// A fresh hidden name in the directory of `target`, on the same file system.
fs::path beside(const fs::path& target) {
  std::random_device random;
  return target.parent_path() / ("." + target.filename().string() + "." + std::to_string(random()) +
                                 std::to_string(random()) + ".partial");
}

void sync(const fs::path& path) {
  const Descriptor opened(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (opened.number() < 0 || ::fsync(opened.number()) != 0) fail(path);
}

void put(int file, const fs::path& path, const void* data, std::size_t size) {
  const auto* from = static_cast<const std::byte*>(data);
  while (size > 0) {
    const ssize_t put = ::write(file, from, size);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail(path);
    from += put;
    size -= static_cast<std::size_t>(put);
  }
}

Descriptor create(const fs::path& path) {
  Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.number() < 0) fail(path);
  return file;
}

void finish(const Descriptor& file, const fs::path& path) {
  if (::fsync(file.number()) != 0) fail(path);
}

struct Source {
  Entry entry;  // its offset is set at the end
  const void* data;
};

// The tensors of the model: larger elements first, so that every tensor of the file is aligned.
std::vector<Source> sources(const Store& store, const std::vector<TensorView>& views,
                            const std::string& head) {
  const TensorFile* own = head.empty() ? nullptr : &store.heads.at(head);
  std::vector<Source> sources;
  for (std::size_t number = 0; number < views.size(); ++number) {
    const TensorView& view = views[number];
    const std::string& name = store.manifest.tensors[number].name;
    if (own != nullptr && own->find(name) != nullptr) continue;
    sources.push_back({{name, view.dtype, view.shape, 0, view.nbytes}, view.data});
  }
  if (own != nullptr) {
    for (const Entry& entry : own->entries) sources.push_back({entry, own->data(entry)});
  }
  std::stable_sort(sources.begin(), sources.end(), [](const Source& a, const Source& b) {
    return dtype_size(a.entry.dtype) > dtype_size(b.entry.dtype);
  });
  std::int64_t end = 0;
  for (Source& source : sources) {
    source.entry.offset = end;
    end += source.entry.nbytes;
  }
  return sources;
}

void write_weights(const std::vector<Source>& sources, const fs::path& path) {
  std::vector<Entry> entries;
  for (const Source& source : sources) entries.push_back(source.entry);
  const std::string header = format_header(entries);
  const Descriptor file = create(path);
  put(file.number(), path, header.data(), header.size());
  for (const Source& source : sources) {
    put(file.number(), path, source.data, static_cast<std::size_t>(source.entry.nbytes));
  }
  finish(file, path);
}

void write_directory(const Store& store, const std::vector<Source>& sources, const std::string& head,
                     const fs::path& path) {
  std::map<std::string, std::string> files = store.manifest.model_files;
  const auto own = store.manifest.head_files.find(head);
  if (own != store.manifest.head_files.end()) {
    for (const auto& [name, from] : own->second) files[name] = from;
  }
  fs::create_directory(path);
  write_weights(sources, path / (files.count(kOpenClipConfig) != 0 ? kOpenClipWeightsFile : kWeightsFile));
  for (const auto& [name, from] : files) {
    const std::string content = store.directory->read(from);
    const fs::path to = path / name;
    fs::create_directories(to.parent_path());
    const Descriptor file = create(to);
    put(file.number(), to, content.data(), content.size());
    finish(file, to);
  }
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path)) {
    if (entry.is_directory()) sync(entry.path());
  }
  sync(path);
}

}  // namespace

void write_model(const Store& store, const std::vector<TensorView>& views, const std::string& path,
                 const std::string& head) {
  if (!head.empty() && store.heads.count(head) == 0) {
    throw std::invalid_argument("got head \"" + head + "\", which the store does not have");
  }
  const fs::path target = fs::absolute(path).lexically_normal();
  const bool is_file = target.extension() == ".safetensors";
  if (path.empty() || target.filename().empty()) {
    throw std::invalid_argument("got path \"" + path + "\", expected the name of a file or directory");
  }
  if (is_file ? fs::is_directory(target) : fs::exists(target) && !fs::is_empty(target)) {
    throw std::invalid_argument("got path \"" + path + "\", which exists; choose another or remove it");
  }
  fs::create_directories(target.parent_path());
  const fs::path fresh = beside(target);
  try {
    const std::vector<Source> tensors = sources(store, views, head);
    if (is_file) {
      write_weights(tensors, fresh);
    } else {
      write_directory(store, tensors, head, fresh);
    }
    fs::rename(fresh, target);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(fresh, ignored);
    throw;
  }
  sync(target.parent_path());
}

}  // namespace paretofuse

#include "store/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "store/atomic.h"
#include "store/shown.h"

namespace paretofuse {
namespace {

constexpr std::int64_t kDataAlignment = 64;

std::int64_t round_up(std::size_t offset) {
  return (static_cast<std::int64_t>(offset) + kDataAlignment - 1) / kDataAlignment * kDataAlignment;
}

std::string format_header(const std::map<std::string, std::string>& metadata,
                          const std::vector<Entry>& entries) {
  std::string text;
  for (const auto& [key, value] : metadata)
    text += (text.empty() ? "" : ",") + quoted(key) + ":" + quoted(value);
  text = "{" + (metadata.empty() ? "" : quoted(kMetadata) + ":{" + text + "}");
  for (const Entry& entry : entries) {
    if (text.size() > 1) text += ",";
    text +=
        quoted(entry.name) + ":{\"dtype\":\"" + entry.dtype + "\",\"shape\":" + shown(entry.shape) +
        ",\"data_offsets\":" + shown(std::vector<std::int64_t>{entry.offset, entry.offset + entry.nbytes}) +
        "}";
  }
  return text + "}";
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::string path, std::map<std::string, std::string> metadata,
                                     std::size_t reserve)
    : path_(std::move(path)),
      metadata_(std::move(metadata)),
      file_(::open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)),
      start_(round_up(8 + std::min<std::size_t>(reserve, kHeaderLimit))) {
  if (file_.number() < 0) throw FileError(path_);
  if (::lseek(file_.number(), start_, SEEK_SET) < 0) throw FileError(path_);
}

void SafetensorsWriter::begin(const std::string& name, const std::string& dtype,
                              std::vector<std::int64_t> shape) {
  if (open_) {
    throw std::invalid_argument("got tensor " + shown(name) + " before the end of " +
                                shown(entries_.back().name) + "; call end() first");
  }
  if (name == kMetadata || !names_.insert(name).second) {
    throw std::invalid_argument("got tensor " + shown(name) + " twice, expected each name once");
  }
  Entry entry{name, dtype, std::move(shape), end_, 0};
  const bool sizes =
      std::all_of(entry.shape.begin(), entry.shape.end(), [](std::int64_t size) { return size >= 0; });
  if (dtype_size(dtype) == 0 || !sizes || !tensor_bytes(dtype, entry.shape, &entry.nbytes)) {
    throw std::invalid_argument("got dtype " + shown(dtype) + " and shape " + shown(entry.shape) +
                                " for tensor " + shown(name) +
                                ", expected a dtype such as 'F32' or 'I64' and sizes >= 0");
  }
  entries_.push_back(std::move(entry));
  open_ = true;
}

void SafetensorsWriter::write(const void* data, std::size_t size) {
  if (!open_) throw std::invalid_argument("got data outside of a tensor; call begin() first");
  write_all(file_.number(), path_, data, size);
  end_ += static_cast<std::int64_t>(size);
}

void SafetensorsWriter::end() {
  if (!open_) throw std::invalid_argument("got the end of a tensor outside of one; call begin() first");
  const Entry& entry = entries_.back();
  if (end_ - entry.offset != entry.nbytes) {
    throw std::invalid_argument("got " + std::to_string(end_ - entry.offset) + " bytes for tensor " +
                                shown(entry.name) + ", expected " + std::to_string(entry.nbytes) + ": " +
                                entry.dtype + " of shape " + shown(entry.shape));
  }
  open_ = false;
}

void SafetensorsWriter::sync() const {
  if (::fsync(file_.number()) != 0) throw FileError(path_);
}

void SafetensorsWriter::finish() {
  if (open_) {
    throw std::invalid_argument("got the end of the file within tensor " + shown(entries_.back().name) +
                                "; call end() first");
  }
  std::string header = format_header(metadata_, entries_);
  if (8 + header.size() > static_cast<std::size_t>(start_)) make_room(round_up(8 + header.size()));
  header.resize(static_cast<std::size_t>(start_) - 8, ' ');
  std::string length(8, '\0');
  for (std::size_t byte = 0; byte < 8; ++byte) {
    length[byte] = static_cast<char>(header.size() >> (8 * byte) & 0xff);
  }
  if (::lseek(file_.number(), 0, SEEK_SET) < 0) throw FileError(path_);
  header = length + header;
  write_all(file_.number(), path_, header.data(), header.size());
  file_ = Descriptor();
}

// Moves the data to another start, from their end on, because the two places overlap.
void SafetensorsWriter::make_room(std::int64_t start) {
  std::vector<char> block(1 << 20);
  for (std::int64_t left = end_; left > 0;) {
    const auto size =
        static_cast<std::size_t>(std::min<std::int64_t>(left, static_cast<std::int64_t>(block.size())));
    left -= static_cast<std::int64_t>(size);
    if (::pread(file_.number(), block.data(), size, start_ + left) != static_cast<ssize_t>(size)) {
      throw FileError(path_);
    }
    if (::lseek(file_.number(), start + left, SEEK_SET) < 0) throw FileError(path_);
    write_all(file_.number(), path_, block.data(), size);
  }
  start_ = start;
}

}  // namespace paretofuse

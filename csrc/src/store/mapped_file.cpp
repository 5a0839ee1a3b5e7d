#include "store/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>

#include "paretofuse/engine.h"
#include "store/sha256.h"

namespace paretofuse {
namespace {

std::string reason(int code) { return std::system_category().message(code); }

struct stat status_of(int descriptor, const std::string& path) {
  struct stat status;
  if (fstat(descriptor, &status) != 0) throw StoreError(path + ": cannot be read (" + reason(errno) + ")");
  return status;
}

std::int64_t modified(const struct stat& status) {
#if defined(__APPLE__)
  const timespec time = status.st_mtimespec;
#else
  const timespec time = status.st_mtim;
#endif
  return static_cast<std::int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// The absolute path without links; empty, with errno, if there is no such file.
std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr), &std::free);
  return real ? real.get() : "";
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

// The blobs of the Hugging Face cache that a directory lies in; empty if it lies in none.
std::string blobs_of(const std::filesystem::path& root) {
  for (std::filesystem::path inner = root, outer = root.parent_path(); outer != outer.parent_path();
       inner = outer, outer = outer.parent_path()) {
    if (outer.filename() == "snapshots") return (outer.parent_path() / "blobs").string();
  }
  return "";
}

// Without O_NONBLOCK opening a named pipe would wait for its writer.
constexpr int kOpenFile = O_RDONLY | O_CLOEXEC | O_NONBLOCK;

constexpr const char* kAgain = "restore it or create the store again";

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(number_, other.number_);
  return *this;
}

Descriptor::~Descriptor() {
  if (number_ >= 0) ::close(number_);
}

Directory::Directory(std::string path)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (descriptor_.number() < 0) {
    const std::string why = errno == ENOENT ? "there is no such directory" : reason(errno);
    throw StoreError(path_ + " is not a store: " + why + "; create one with `paretofuse stack`");
  }
}

bool Directory::still_there() const {
  struct stat now;
  const struct stat opened = status_of(descriptor_.number(), path_);
  return ::stat(path_.c_str(), &now) == 0 && now.st_dev == opened.st_dev && now.st_ino == opened.st_ino;
}

bool Directory::has(const std::string& name) const {
  struct stat ignored;
  return ::fstatat(descriptor_.number(), name.c_str(), &ignored, AT_SYMLINK_NOFOLLOW) == 0;
}

Descriptor Directory::open(const std::string& name) const {
  const std::string full = path_ + "/" + name;
  Descriptor folder;
  int at = descriptor_.number();
  std::size_t begin = 0;
  for (std::size_t slash; (slash = name.find('/', begin)) != std::string::npos; begin = slash + 1) {
    const std::string part = name.substr(begin, slash - begin);
    folder = Descriptor(::openat(at, part.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    at = folder.number();
    if (at < 0) return follow(full, errno);
  }
  Descriptor file(::openat(at, name.substr(begin).c_str(), kOpenFile | O_NOFOLLOW));
  if (file.number() < 0) return follow(full, errno);
  if (!S_ISREG(status_of(file.number(), full).st_mode)) throw StoreError(full + ": not a file; " + kAgain);
  return file;
}

Descriptor Directory::follow(const std::string& full, int error) const {
  // What a link, or a link in place of a folder, is refused with.
  if (error != ELOOP && error != EMLINK && error != ENOTDIR) {
    throw StoreError(full + ": cannot be read (" + reason(error) + "); " + kAgain);
  }
  const std::string real = real_path(full), root = real_path(path_), blobs = blobs_of(root);
  if (real.empty() || root.empty()) {
    throw StoreError(full + ": cannot be read (" + reason(errno) + "); " + kAgain);
  }
  const bool is_blob = !blobs.empty() && std::filesystem::path(real).parent_path() == blobs;
  if (!starts_with(real, root + "/") && !is_blob) {
    throw StoreError(full + ": is a link that points outside of the store; put the file itself there");
  }
  Descriptor file(::open(real.c_str(), kOpenFile | O_NOFOLLOW));
  if (file.number() < 0) throw StoreError(full + ": cannot be read (" + reason(errno) + "); " + kAgain);
  if (!S_ISREG(status_of(file.number(), full).st_mode)) throw StoreError(full + ": not a file; " + kAgain);
  return file;
}

std::string Directory::read(const std::string& name) const {
  const Descriptor file = open(name);
  const std::string full = path_ + "/" + name;
  std::string text;
  char block[1 << 16];
  for (;;) {
    const ssize_t got = ::read(file.number(), block, sizeof block);
    if (got == 0) return text;
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw StoreError(full + ": cannot be read (" + reason(errno) + ")");
    text.append(block, static_cast<std::size_t>(got));
  }
}

MappedFile::MappedFile(const Directory& directory, const std::string& name)
    : MappedFile(directory.path() + "/" + name, directory.open(name)) {}

MappedFile::MappedFile(const std::string& path)
    : MappedFile(path, Descriptor(::open(path.c_str(), kOpenFile))) {}

MappedFile::MappedFile(std::string path, Descriptor descriptor)
    : path_(std::move(path)), descriptor_(std::move(descriptor)) {
  if (descriptor_.number() < 0) {
    throw StoreError(path_ + ": cannot be read (" + reason(errno) + "); check the path");
  }
  const struct stat status = status_of(descriptor_.number(), path_);
  if (!S_ISREG(status.st_mode)) throw StoreError(path_ + ": cannot be read (not a file); check the path");
  modified_ = modified(status);
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;  // nothing to map
  int flags = MAP_PRIVATE;
#if defined(MAP_NORESERVE)
  flags |= MAP_NORESERVE;  // the memory may become writable, and files may be larger than the machine's
#endif
  void* address = ::mmap(nullptr, size_, PROT_READ, flags, descriptor_.number(), 0);
  if (address == MAP_FAILED) throw StoreError(path_ + ": cannot be mapped (" + reason(errno) + ")");
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::move(other.descriptor_)),
      modified_(other.modified_.load()),
      data_(std::exchange(other.data_, nullptr)),
      size_(other.size_) {}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::make_writable() {
  if (data_ == nullptr) return;
  if (::mprotect(const_cast<std::byte*>(data_), size_, PROT_READ | PROT_WRITE) != 0) {
    throw StoreError(path_ + ": cannot be mapped for writing (" + reason(errno) + ")");
  }
}

void MappedFile::release(std::int64_t begin, std::int64_t end) const {
  const auto page = static_cast<std::int64_t>(::sysconf(_SC_PAGESIZE));
  const std::int64_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last) {
    ::madvise(const_cast<std::byte*>(data_ + first), static_cast<std::size_t>(last - first), MADV_DONTNEED);
  }
}

void MappedFile::check_unchanged(const std::string& sha256) const {
  const struct stat now = status_of(descriptor_.number(), path_);
  bool same = static_cast<std::size_t>(now.st_size) == size_;
  if (same && modified(now) != modified_) {
    const std::string found = sha256_of(descriptor_.number());
    // Whoever still writes to it now has changed the time once more.
    same = found == sha256 && modified(status_of(descriptor_.number(), path_)) == modified(now);
    if (same) modified_ = modified(now);
  }
  if (!same) throw StoreError(path_ + ": was changed after it was opened; open the store again");
}

}  // namespace paretofuse

#include "library/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "paretofuse/engine.h"

namespace paretofuse {
namespace {

std::string reason(int code) { return std::system_category().message(code); }

struct stat status_of(int descriptor, const std::string& path) {
  struct stat status;
  if (fstat(descriptor, &status) != 0) throw StoreError(path + ": cannot be read (" + reason(errno) + ")");
  return status;
}

#if defined(__APPLE__)
timespec modified(const struct stat& status) { return status.st_mtimespec; }
#else
timespec modified(const struct stat& status) { return status.st_mtim; }
#endif

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
    throw StoreError(path_ + " is not a store (" + reason(errno) + "); create one with `paretofuse stack`");
  }
}

bool Directory::still_there() const {
  struct stat now;
  const struct stat opened = status_of(descriptor_.number(), path_);
  return ::stat(path_.c_str(), &now) == 0 && now.st_dev == opened.st_dev && now.st_ino == opened.st_ino;
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
    if (at < 0) throw StoreError(full + ": cannot be read (" + reason(errno) + "); restore it");
  }
  // Without O_NONBLOCK opening a named pipe would wait for its writer.
  Descriptor file(::openat(at, name.substr(begin).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (file.number() < 0) {
    const std::string why = errno == ELOOP ? "it is a link; put the file itself there" : reason(errno);
    throw StoreError(full + ": cannot be read (" + why + ")");
  }
  if (!S_ISREG(status_of(file.number(), full).st_mode)) throw StoreError(full + ": not a file");
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
    : path_(directory.path() + "/" + name),
      descriptor_(directory.open(name)),
      status_(status_of(descriptor_.number(), path_)),
      size_(static_cast<std::size_t>(status_.st_size)) {
  if (size_ == 0) return;  // nothing to map
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor_.number(), 0);
  if (address == MAP_FAILED) throw StoreError(path_ + ": cannot be mapped (" + reason(errno) + ")");
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::move(other.descriptor_)),
      status_(other.status_),
      data_(std::exchange(other.data_, nullptr)),
      size_(other.size_) {}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::check_unchanged() const {
  const struct stat now = status_of(descriptor_.number(), path_);
  const timespec before = modified(status_), after = modified(now);
  if (now.st_size != status_.st_size || before.tv_sec != after.tv_sec || before.tv_nsec != after.tv_nsec) {
    throw StoreError(path_ + ": was changed after it was opened; open the store again");
  }
}

}  // namespace paretofuse

#include "store/atomic.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <random>
#include <stdexcept>
#include <utility>

namespace paretofuse {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kRandomDigits = 12;
constexpr const char* kSuffix = ".partial";

std::string random_digits() {
  std::random_device random;
  std::string digits;
  while (digits.size() < kRandomDigits) digits += "0123456789abcdef"[random() % 16];
  return digits;
}

// Whether `name` is what a Fresh for `target` was called.
bool is_partial_of(const std::string& name, const std::string& target) {
  const std::string start = "." + target + ".";
  if (name.size() != start.size() + kRandomDigits + std::string(kSuffix).size()) return false;
  if (name.compare(0, start.size(), start) != 0) return false;
  if (name.compare(start.size() + kRandomDigits, std::string::npos, kSuffix) != 0) return false;
  return name.find_first_not_of("0123456789abcdef", start.size()) == start.size() + kRandomDigits;
}

// An open file or directory that no other living process has locked; none if there is one or it cannot be
// known.
Descriptor locked(const fs::path& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (file.number() >= 0 && ::flock(file.number(), LOCK_EX | LOCK_NB) == 0) return file;
  return Descriptor();
}

bool is_at(const Descriptor& file, const fs::path& path) {
  struct stat own, now;
  return ::fstat(file.number(), &own) == 0 && ::lstat(path.c_str(), &now) == 0 && own.st_dev == now.st_dev &&
         own.st_ino == now.st_ino;
}

// Removes what killed processes left of earlier attempts.
void sweep(const fs::path& target) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(target.parent_path(), error)) {
    if (!is_partial_of(entry.path().filename().string(), target.filename().string())) continue;
    const Descriptor lock = locked(entry.path());
    if (lock.number() >= 0 && is_at(lock, entry.path())) fs::remove_all(entry.path(), error);
  }
}

void make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (!error) return;
  errno = error.value();
  throw FileError(path.string());
}

void sync(const fs::path& path) {
  const Descriptor opened(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (opened.number() < 0 || ::fsync(opened.number()) != 0) throw FileError(path.string());
}

void sync_tree(const fs::path& root) {
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(root)) sync(entry.path());
  sync(root);
}

void rename(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) throw FileError(to);
}

// Swaps two directories in one step; false where that is not supported.
bool exchanged(const std::string& first, const std::string& second) {
#if defined(__linux__) && defined(SYS_renameat2)
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE
  if (::syscall(SYS_renameat2, AT_FDCWD, first.c_str(), AT_FDCWD, second.c_str(), kExchange) == 0)
    return true;
  if (errno != ENOSYS && errno != EINVAL && errno != ENOTSUP) throw FileError(second);
#else
  (void)first;
  (void)second;
#endif
  return false;
}

// A mount point, or the current directory, cannot be replaced as a whole.
void check_replaceable(const fs::path& directory) {
  struct stat own, parent;
  const bool mount = ::stat(directory.c_str(), &own) == 0 &&
                     ::stat((directory / "..").c_str(), &parent) == 0 &&
                     (own.st_dev != parent.st_dev || own.st_ino == parent.st_ino);
  std::error_code error;
  if (!mount && !fs::equivalent(directory, fs::current_path(error), error)) return;
  throw std::invalid_argument("got " + directory.string() + ", which is " +
                              (mount ? "a mount point" : "the current directory") +
                              " and cannot be replaced as a whole; name a new directory in it");
}

}  // namespace

FileError::FileError(const std::string& path)
    : std::system_error(errno, std::generic_category(), path), path(path) {}

void write_all(int file, const std::string& path, const void* data, std::size_t size) {
  const auto* from = static_cast<const std::byte*>(data);
  while (size > 0) {
    const ssize_t put = ::write(file, from, size);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw FileError(path);
    from += put;
    size -= static_cast<std::size_t>(put);
  }
}

Fresh::Fresh(const std::string& place, Kind kind) : kind_(kind) {
  fs::path target = fs::absolute(place).lexically_normal();
  if (target.filename().empty() && target.has_relative_path()) target = target.parent_path();  // "name/"
  std::error_code error;
  if (kind == Kind::directory && fs::is_directory(target, error)) {
    target = fs::canonical(target, error);
    check_replaceable(target);
  }
  place_ = target.string();
  make_directories(target.parent_path());
  sweep(target);
  while (lock_.number() < 0) {
    path_ = (target.parent_path() / ("." + target.filename().string() + "." + random_digits() + kSuffix))
                .string();
    const int made = kind == Kind::directory
                         ? ::mkdir(path_.c_str(), 0777)
                         : ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (made < 0 && errno == EEXIST) continue;
    if (made < 0) throw FileError(place_);
    if (kind == Kind::file) ::close(made);
    // Somebody may sweep it away before it is locked. Where nothing can be locked nothing is swept either.
    lock_ = Descriptor(::open(path_.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
    const bool swept =
        lock_.number() < 0 || (::flock(lock_.number(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK);
    if (swept || !is_at(lock_, path_)) lock_ = Descriptor();
  }
}

void Fresh::discard() noexcept {
  std::error_code ignored;
  if (!path_.empty()) fs::remove_all(path_, ignored);
  path_.clear();
  lock_ = Descriptor();
}

void Fresh::place(bool exchange) {
  const std::string folder = fs::path(place_).parent_path().string();
  if (kind_ == Kind::file) {
    sync(path_);
    rename(path_, place_);
    path_.clear();
  } else {
    std::error_code ignored;
    sync_tree(path_);
    if (!fs::is_directory(place_, ignored)) {
      rename(path_, place_);
      path_.clear();
    } else if (exchange && exchanged(path_, place_)) {
      sync(folder);
      fs::remove_all(std::exchange(path_, ""), ignored);
    } else {
      const std::string old = path_ + ".old";
      rename(place_, old);
      try {
        rename(path_, place_);
      } catch (const FileError&) {
        rename(old, place_);
        throw;
      }
      path_.clear();
      sync(folder);
      fs::remove_all(old, ignored);
    }
  }
  sync(folder);
  discard();
}

}  // namespace paretofuse

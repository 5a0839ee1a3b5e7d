// Files and directories that appear whole or not at all: written beside their place, synced, then renamed.
#pragma once

#include <cstddef>
#include <string>
#include <system_error>

#include "store/mapped_file.h"

namespace paretofuse {

// The system refuses to do something with a file: errno and its path.
class FileError : public std::system_error {
 public:
  explicit FileError(const std::string& path);  // with errno as it is

  const std::string path;
};

// Writes all of it. Throws FileError.
void write_all(int file, const std::string& path, const void* data, std::size_t size);

// A file or a directory on its way to its place.
//
// It is made as `.<name>.<random>.partial` in the directory of its place (missing parents are made), and
// removed again unless `place` is called. A killed process cannot remove it, so each one is locked while its
// process lives, and whoever writes to the same place next sweeps away those that nobody locks.
class Fresh {
 public:
  enum class Kind { file, directory };

  // Throws FileError, and std::invalid_argument where the place is a directory that cannot be exchanged for
  // another: a mount point, or the current one.
  Fresh(const std::string& place, Kind kind);
  Fresh(const Fresh&) = delete;
  Fresh& operator=(const Fresh&) = delete;
  ~Fresh() { discard(); }

  // Where to write.
  const std::string& path() const { return path_; }
  // Where it will be: as given, but with links to a directory followed, so that a link stays and what it
  // points to is replaced.
  const std::string& target() const { return place_; }
  // Syncs it and puts it at its place, over what is there. Of directories on Linux the two are exchanged in
  // one step, so that whoever opens the place finds the old or the new one, even after a crash. Where the
  // system or file system cannot (or shall not) exchange, the old one is moved aside first: a crash between
  // the two renames leaves the place empty and both directories whole beside it. Throws FileError.
  void place(bool exchange = true);
  // Removes it, unless it is placed.
  void discard() noexcept;

 private:
  std::string place_;
  Kind kind_;
  std::string path_;
  Descriptor lock_;
};

}  // namespace paretofuse

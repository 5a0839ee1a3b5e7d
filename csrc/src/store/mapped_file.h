// Files below a directory, mapped for reading.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace paretofuse {

// An open file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();

  int number() const { return number_; }

 private:
  int number_;
};

// A store's directory. Files are found below the directory that was opened, even if another one takes its
// name in the meantime.
class Directory {
 public:
  explicit Directory(std::string path);  // throws StoreError

  const std::string& path() const { return path_; }
  // Whether the path, now, leads to this very directory.
  bool still_there() const;
  // Whether anything has this name.
  bool has(const std::string& name) const;
  // Opens a regular file by its relative path. Links are followed where they lead to a file of the directory
  // itself or, in a Hugging Face cache (<repository>/snapshots/<revision> beside <repository>/blobs, to whose
  // files all others are links), to one of its blobs: whoever made the store could have put these there
  // themselves. They may lead nowhere else. Throws StoreError.
  Descriptor open(const std::string& name) const;
  // A small file's content. Throws StoreError.
  std::string read(const std::string& name) const;

 private:
  Descriptor follow(const std::string& full, int error) const;

  std::string path_;
  Descriptor descriptor_;
};

// A whole file in memory, read-only. All members throw StoreError.
class MappedFile {
 public:
  MappedFile(const Directory& directory, const std::string& name);
  explicit MappedFile(const std::string& path);  // wherever it leads
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  const std::string& path() const { return path_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Lets the memory be written to, which the file never sees.
  void make_writable();
  // Lets the system drop the pages between two bytes, which are read again when touched; what was written to
  // them is lost.
  void release(std::int64_t begin, std::int64_t end) const;
  // Checks that the file is as it was mapped: its size, and its time of modification or, where that is
  // another (somebody has touched or rewritten it), its SHA-256.
  void check_unchanged(const std::string& sha256) const;

 private:
  MappedFile(std::string path, Descriptor descriptor);

  std::string path_;
  Descriptor descriptor_;
  mutable std::atomic<std::int64_t> modified_;  // in nanoseconds
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace paretofuse

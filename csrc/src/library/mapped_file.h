// Files below a directory, mapped for reading.
#pragma once

#include <sys/stat.h>

#include <cstddef>
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
  // Opens a regular file by its relative path. Links are refused, because they may lead anywhere. Throws
  // StoreError.
  Descriptor open(const std::string& name) const;
  // A small file's content. Throws StoreError.
  std::string read(const std::string& name) const;

 private:
  std::string path_;
  Descriptor descriptor_;
};

// A whole file in memory, read-only.
class MappedFile {
 public:
  MappedFile(const Directory& directory, const std::string& name);  // throws StoreError
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  const std::string& path() const { return path_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Throws StoreError if the file's size or time of modification is not what it was when it was mapped.
  void check_unchanged() const;

 private:
  std::string path_;
  Descriptor descriptor_;
  struct stat status_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace paretofuse

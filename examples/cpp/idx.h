// The idx files of MNIST and its relatives: two zero bytes, a type code (8: bytes), the number of axes, each
// axis as a big-endian 32-bit number, then the elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

struct Idx {
  std::vector<std::size_t> shape;
  std::vector<unsigned char> bytes;
};

inline Idx read_idx(const std::string& path, std::size_t axes) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<unsigned char> content{std::istreambuf_iterator<char>(file), {}};
  const std::size_t start = 4 + 4 * axes;
  if (content.size() < start || content[0] != 0 || content[1] != 0 || content[2] != 8 || content[3] != axes) {
    throw std::runtime_error(path + ": no idx file of bytes with " + std::to_string(axes) + " axes");
  }
  Idx idx;
  std::size_t elements = 1;
  for (std::size_t at = 4; at < start; at += 4) {
    std::uint32_t size = 0;
    for (std::size_t i = 0; i < 4; ++i) size = size << 8 | content[at + i];
    idx.shape.push_back(size);
    elements *= size;  // wraps at worst, and then fails the comparison below
  }
  if (content.size() - start != elements) throw std::runtime_error(path + ": another size than its header");
  idx.bytes.assign(content.begin() + static_cast<std::ptrdiff_t>(start), content.end());
  return idx;
}

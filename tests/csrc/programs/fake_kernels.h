// What the fake driver's kernels do: merges, carried out on the host from the bytes of their arguments, in
// the order of the CPU's sums. What the machine code was compiled for is in the name of its file.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "simd/convert.h"

namespace fake {

using paretofuse::DType;
using Address = std::uint64_t;

// The host address of a range that lies in one allocation; null, and a misuse, for any other.
std::byte* host(Address address, std::size_t size, const char* what);
int misuse(const std::string& what, int code);

inline float load(DType dtype, const std::byte* from) {
  return dtype == DType::F32    ? paretofuse::load_one<DType::F32>(from)
         : dtype == DType::BF16 ? paretofuse::load_one<DType::BF16>(from)
                                : paretofuse::load_one<DType::F16>(from);
}

inline void store(DType dtype, std::byte* to, float value) {
  if (dtype == DType::F32) paretofuse::store_one<DType::F32>(to, value);
  if (dtype == DType::BF16) paretofuse::store_one<DType::BF16>(to, value);
  if (dtype == DType::F16) paretofuse::store_one<DType::F16>(to, value);
}

inline std::vector<std::string> words_of(const std::string& file) {
  std::istringstream parts(file.substr(file.rfind('/') + 1, file.rfind('.') - file.rfind('/') - 1));
  std::vector<std::string> words;
  for (std::string word; std::getline(parts, word, '_');) words.push_back(word);
  return words;
}

inline DType dtype_of(const std::string& word) {
  return word == "fp32" ? DType::F32 : word == "bf16" ? DType::BF16 : DType::F16;
}

inline std::size_t size_of(DType dtype) { return static_cast<std::size_t>(paretofuse::item_size(dtype)); }

template <class T>
T number(const std::byte* from, std::size_t i) {
  T value;
  std::memcpy(&value, from + i * sizeof(T), sizeof(T));
  return value;
}

// Takes arguments in the order of their list, and keeps their bytes.
class Arguments {
 public:
  explicit Arguments(void** given) : given_(given) {}

  template <class T>
  void take(T& field) {
    std::memcpy(&field, given_[next_++], sizeof field);
    char two[3];
    for (std::size_t i = 0; i < sizeof field; ++i) {
      std::snprintf(two, sizeof two, "%02x", reinterpret_cast<const unsigned char*>(&field)[i]);
      bytes_ += two;
    }
    bytes_ += " ";
  }

  // In hexadecimal, argument by argument.
  std::string bytes() const { return bytes_.substr(0, bytes_.size() - 1); }

 private:
  void** given_;
  std::size_t next_ = 0;
  std::string bytes_;
};

// kernels/routed_merge.py
struct Merge {
  Address base, deltas, tile_group, weights, scales, places, out;
  std::int64_t n;
  std::int32_t experts, groups, preferences;
  std::int64_t delta_stride, out_stride;
  Address global_scratch, profile_scratch;

  explicit Merge(Arguments& arguments) {
    for (Address* field : {&base, &deltas, &tile_group, &weights, &scales, &places, &out}) {
      arguments.take(*field);
    }
    arguments.take(n);
    for (std::int32_t* field : {&experts, &groups, &preferences}) arguments.take(*field);
    for (std::int64_t* field : {&delta_stride, &out_stride}) arguments.take(*field);
    for (Address* field : {&global_scratch, &profile_scratch}) arguments.take(*field);
  }

  void carry_out(const std::string& file, unsigned grid) const {
    const std::vector<std::string> words = words_of(file);
    const std::string kind = words[words.size() - 2].substr(0, words[words.size() - 2].find('x'));
    const bool shared = words[1] == "rows", by_row = shared || (words[1] == "any" && words[2] == "row");
    const bool quantized = kind == "i8" || kind == "u8";
    const DType from_type = dtype_of(words[words.size() - 3]), to_type = dtype_of(words.back());
    const auto length = static_cast<std::size_t>(n), tiles = length / 1024;
    const auto all = static_cast<std::size_t>(experts), stride = static_cast<std::size_t>(delta_stride);
    const std::size_t group_size = words[words.size() - 2] == "i8" ? 1024 : 32,
                      groups_of_scales = length / group_size;
    if (length == 0 || grid == 0 || length % grid != 0 || 1024 % (length / grid) != 0 || preferences != 1) {
      return void(misuse("a launch that does not cover the buffer by blocks", 0));
    }
    for (const Address address : {base, deltas, tile_group, weights, scales, places, out}) {
      if (address % 16 != 0) misuse("an argument that is no multiple of 16", 0);
    }
    const std::size_t item = quantized ? 1 : size_of(dtype_of(kind)),
                      own = kind == "u8" ? length / 2 : length;
    const std::byte* from = host(base, length * size_of(from_type), "base");
    const std::byte* delta = host(deltas, ((all - 1) * stride + own) * item, "deltas");
    const std::byte* group = host(tile_group, tiles * 4, "tile_group");
    const std::byte* scale = host(scales, quantized ? all * groups_of_scales * 4 : 4, "scales");
    const std::byte* place = host(places, by_row ? tiles * 20 : 4, "places");
    std::byte* to = host(out, length * size_of(to_type), "out");
    if (!from || !delta || !group || !scale || !place || !to) return;
    for (std::size_t t = 0; t < length; ++t) {
      const auto tile = t / 1024;
      std::int64_t own_row = -1;
      if (by_row) {
        std::int32_t f[5];
        std::memcpy(f, place + tile * 20, 20);
        if (f[0] != static_cast<std::int32_t>(tile) || f[2] <= 0 || (shared && f[2] % 128 != 0)) {
          return void(misuse("a place that this kernel cannot take", 0));
        }
        own_row =
            std::min<std::int64_t>(f[3] + (f[1] * 1024 + static_cast<std::int64_t>(t % 1024)) / f[2], f[4]);
        if (f[3] < groups || own_row < f[3]) return void(misuse("a row among the groups", 0));
      }
      const auto row = number<std::int32_t>(group, tile);
      if (row < 0 || row >= groups) return void(misuse("a tile of no group", 0));
      float merged = load(from_type, from + t * size_of(from_type));
      for (std::size_t e = 0; e < all; ++e) {
        float weight = weight_at(row, e);
        if (own_row >= 0) weight += weight_at(own_row, e);
        if (quantized) weight *= number<float>(scale, e * groups_of_scales + t / group_size);
        const std::size_t at = e * stride + (kind == "u8" ? t / 2 : t);
        const auto byte = static_cast<unsigned>(kind == "u8" ? number<std::uint8_t>(delta, at) : 0);
        const float value = kind == "u8"   ? static_cast<float>(t % 2 == 0 ? byte & 15 : byte >> 4) - 8
                            : kind == "i8" ? static_cast<float>(number<std::int8_t>(delta, at))
                                           : load(dtype_of(kind), delta + at * item);
        const float product = weight * value;
        merged += product;
      }
      store(to_type, to + t * size_of(to_type), merged);
    }
  }

 private:
  float weight_at(std::int64_t row, std::size_t e) const {
    const auto at = static_cast<Address>(row) * static_cast<Address>(experts) + e;
    const std::byte* found = host(weights + at * 4, 4, "weights");
    return found == nullptr ? 0 : number<float>(found, 0);
  }
};

// kernels/lowrank_merge.py
struct LowRankMerge {
  static constexpr int kFields = 12;  // of a matrix
  Address factors, base, dense, plane_of, weights, matrices, tiles, dense_planes, out;
  std::int32_t preferences, width, planes;
  std::int64_t out_stride;
  Address global_scratch, profile_scratch;

  explicit LowRankMerge(Arguments& arguments) {
    for (Address* field :
         {&factors, &base, &dense, &plane_of, &weights, &matrices, &tiles, &dense_planes, &out}) {
      arguments.take(*field);
    }
    for (std::int32_t* field : {&preferences, &width, &planes}) arguments.take(*field);
    arguments.take(out_stride);
    for (Address* field : {&global_scratch, &profile_scratch}) arguments.take(*field);
  }

  void carry_out(const std::string& file, unsigned grid) const {
    const std::vector<std::string> words = words_of(file);
    const bool by_row = words[2] == "rows", beside = words[by_row ? 3 : 2] == "beside";
    const DType dtype = dtype_of(words[words.size() - 4]), deltas = dtype_of(words[words.size() - 3]);
    if (words[words.size() - 2] != "fp32" || preferences != 1) misuse("factors of another type", 0);
    for (const Address address :
         {factors, base, dense, plane_of, weights, matrices, tiles, dense_planes, out}) {
      if (address % 16 != 0) misuse("an argument that is no multiple of 16", 0);
    }
    const std::byte* tile = host(tiles, std::size_t{grid} * 12, "tiles");
    if (tile == nullptr) return;
    for (unsigned t = 0; t < grid; ++t) {
      std::int32_t where[3];
      std::memcpy(where, tile + std::size_t{t} * 12, 12);
      std::int64_t f[kFields];
      const std::byte* matrix =
          host(matrices + static_cast<Address>(where[0]) * sizeof f, sizeof f, "matrices");
      if (matrix == nullptr) return;
      std::memcpy(f, matrix, sizeof f);
      if (f[11] != 0 && !beside) return void(misuse("dense planes, which this kernel does not read", 0));
      for (const int i : {0, 1, 2, 3, 6, 7}) {
        if (f[i] % 16 != 0) return void(misuse("a matrix that is not aligned", 0));
      }
      for (std::int64_t o = where[1]; o < std::min<std::int64_t>(where[1] + 64, f[5]); ++o) {
        for (std::int64_t i = where[2]; i < std::min<std::int64_t>(where[2] + 64, f[6]); ++i) {
          merge_one(dtype, deltas, by_row, f, o, i);
        }
      }
    }
  }

 private:
  void merge_one(DType dtype, DType deltas, bool by_row, const std::int64_t (&f)[kFields], std::int64_t o,
                 std::int64_t i) const {
    const auto at = static_cast<Address>(o * f[6] + i);
    const std::byte* from =
        host(base + (static_cast<Address>(f[0]) + at) * size_of(dtype), size_of(dtype), "base");
    std::byte* to = host(out + (static_cast<Address>(f[1]) + at) * size_of(dtype), size_of(dtype), "out");
    if (from == nullptr || to == nullptr) return;
    float merged = load(dtype, from);
    for (std::int64_t d = f[10]; d < f[10] + f[11]; ++d) {  // dense ones first, as the CPU does
      const std::byte* entry = host(dense_planes + static_cast<Address>(d) * 16, 16, "dense_planes");
      if (entry == nullptr) return;
      const std::int64_t plane = number<std::int64_t>(entry, 0), place = number<std::int64_t>(entry, 1);
      if (place % 16 != 0) misuse("a dense plane that is not aligned", 0);
      const std::byte* delta =
          host(dense + (static_cast<Address>(place) + at) * size_of(deltas), size_of(deltas), "D");
      if (delta == nullptr) return;
      float weight = real(weights, f[8] * planes + plane, "weights");
      if (by_row) weight += real(weights, (f[9] + o) * planes + plane, "weights");
      const float product = weight * load(deltas, delta);
      merged += product;
    }
    for (std::int64_t r = 0; r < f[7]; ++r) {
      const std::byte* owner = host(plane_of + static_cast<Address>(f[4] + r) * 4, 4, "plane_of");
      if (owner == nullptr) return;
      const auto plane = number<std::int32_t>(owner, 0);
      float weight = real(weights, f[8] * planes + plane, "weights");
      if (by_row) weight += real(weights, (f[9] + o) * planes + plane, "weights");
      const float left = weight * real(factors, f[2] + o * f[7] + r, "B");
      const float product = left * real(factors, f[3] + r * f[6] + i, "A");
      merged += product;
    }
    store(dtype, to, merged);
  }

  static float real(Address address, std::int64_t i, const char* what) {
    const std::byte* found = host(address + static_cast<Address>(i) * 4, 4, what);
    return found == nullptr ? 0 : number<float>(found, 0);
  }
};

}  // namespace fake

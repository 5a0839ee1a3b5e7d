// The core without Python: every instruction set and dtype mix against float64, with guard zones and thread
// counts. Meant to run under the sanitizers: tests/merging/test_native.py builds it with them. Exits 1 at the
// first failure.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "paretofuse/isa.h"
#include "paretofuse/merge.h"

namespace {

using paretofuse::DType;
using paretofuse::item_size;

const DType kAll[] = {DType::F32, DType::BF16, DType::F16};

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Decodes an element from its definition (sign, exponent, fraction), independently of the library.
double decode(DType dtype, const unsigned char* from) {
  if (dtype == DType::F32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, from, 2);
  const int fraction_bits = dtype == DType::BF16 ? 7 : 10;
  const int bias = dtype == DType::BF16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double magnitude = exponent == 0
                               ? std::ldexp(fraction, 1 - bias - fraction_bits)
                               : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// A buffer of n elements at an odd element offset, between two guard zones.
class Buffer {
 public:
  Buffer(DType dtype, std::int64_t n)
      : dtype_(dtype), n_(n), bytes_(static_cast<std::size_t>(size() + 2 * kGuard)) {
    std::memset(bytes_.data(), 0xff, bytes_.size());  // NaN in every dtype
  }

  void randomize(std::mt19937& random) {
    for (std::int64_t i = 0; i < n_; ++i) {
      unsigned char* at = data() + i * item_size(dtype_);
      if (dtype_ == DType::F32) {
        const float value = std::uniform_real_distribution<float>(-2.0f, 2.0f)(random);
        std::memcpy(at, &value, 4);
      } else {  // exponents around 1, random sign and fraction
        const std::uint32_t base = dtype_ == DType::BF16 ? 0x3f00 : 0x3800;
        const std::uint32_t span = dtype_ == DType::BF16 ? 0x100 : 0x800;
        const auto half =
            static_cast<std::uint16_t>((base + random() % span) | (random() % 2 != 0 ? 0x8000 : 0));
        std::memcpy(at, &half, 2);
      }
    }
  }

  unsigned char* data() { return bytes_.data() + kGuard; }
  double operator[](std::int64_t i) { return decode(dtype_, data() + i * item_size(dtype_)); }
  std::int64_t size() const { return n_ * item_size(dtype_); }
  bool same(Buffer& other) {
    return size() == 0 || std::memcmp(data(), other.data(), static_cast<std::size_t>(size())) == 0;
  }

  bool guards_intact() const {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (bytes_[i] != 0xff || bytes_[bytes_.size() - 1 - i] != 0xff) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 132;  // off every vector boundary, on an element boundary
  DType dtype_;
  std::int64_t n_;
  std::vector<unsigned char> bytes_;
};

paretofuse::Plane dense(const void* values, DType dtype) {
  return {values, nullptr, 0, paretofuse::Format::Dense, dtype};
}

double tolerance(DType out) { return out == DType::F32 ? 0x1p-19 : out == DType::BF16 ? 0x1p-4 : 0x1p-7; }

void test_merge(const std::string& isa, DType base_type, DType delta_type, DType out_type) {
  const std::int64_t experts = 3;
  const std::int64_t preferences = 2;
  const std::vector<std::int64_t> lengths = {0, 1, 31, 32, 63, 768, 5003, 70001};
  std::mt19937 random(12345);
  std::vector<Buffer> base;
  std::vector<Buffer> delta;
  std::vector<paretofuse::Segment> segments;
  std::vector<paretofuse::Plane> planes;
  for (const std::int64_t n : lengths) {
    base.emplace_back(base_type, n).randomize(random);
    for (std::int64_t e = 0; e < experts; ++e) delta.emplace_back(delta_type, n).randomize(random);
  }
  for (std::size_t s = 0; s < lengths.size(); ++s) {
    segments.push_back(
        {base[s].data(), lengths[s], static_cast<std::int64_t>(s % 2), lengths[s], base_type, out_type});
    for (std::size_t e = 0; e < 3; ++e) {
      planes.push_back(dense(s == 5 && e == 1 ? nullptr : delta[s * 3 + e].data(), delta_type));
    }
  }
  const paretofuse::MergePlan plan(segments, planes, experts, 2);
  // [preferences, rows, experts]; zeros are skipped
  const std::vector<float> weights = {0.5f, 0.25f, 0.25f, -0.75f, 0.0f, 1.5f,
                                      0.0f, 1.0f,  0.0f,  0.3f,   0.3f, 0.4f};
  std::vector<Buffer> first;
  for (const int threads : {1, 2, 5}) {
    std::vector<Buffer> out;
    for (std::int64_t k = 0; k < preferences; ++k) {
      for (const std::int64_t n : lengths) out.emplace_back(out_type, n);
    }
    std::vector<void*> targets;
    for (Buffer& buffer : out) targets.push_back(buffer.data());
    require(plan.run(weights.data(), preferences, targets.data(), threads, isa) == isa, "ran " + isa);
    for (std::size_t t = 0; t < out.size(); ++t) {
      require(out[t].guards_intact(), "guard zones untouched, " + isa);
      if (!first.empty()) require(out[t].same(first[t]), "same bits for all thread counts, " + isa);
      const std::size_t s = t % lengths.size();
      const std::size_t k = t / lengths.size();
      for (std::int64_t i = 0; i < lengths[s] && first.empty(); ++i) {
        double expected = base[s][i];
        for (std::size_t e = 0; e < 3; ++e) {
          if (planes[s * 3 + e].values != nullptr) {
            expected += static_cast<double>(weights[(k * 2 + s % 2) * 3 + e]) * delta[s * 3 + e][i];
          }
        }
        require(std::abs(out[t][i] - expected) <= tolerance(out_type), "merge against float64, " + isa);
      }
    }
    if (first.empty()) first = std::move(out);
  }
}

std::vector<unsigned char> converted(const std::string& isa, DType from, DType to,
                                     std::vector<unsigned char>& values) {
  const std::int64_t n = static_cast<std::int64_t>(values.size()) / item_size(from);
  std::vector<unsigned char> result(static_cast<std::size_t>(n * item_size(to)));
  const paretofuse::MergePlan plan({{values.data(), n, 0, n, from, to}}, {dense(nullptr, from)}, 1, 1);
  const float weight = 1.0f;
  void* out = result.data();
  plan.run(&weight, 1, &out, 1, isa);
  return result;
}

// The scalar conversions are checked against PyTorch in tests/merging/test_native.py; here all others against
// the scalar ones: every 16-bit pattern, and random float32 patterns, NaN and subnormals included.
void test_conversions(const std::string& isa) {
  std::vector<unsigned char> halves;
  for (int pattern = 0; pattern < 65536; ++pattern) {
    halves.push_back(static_cast<unsigned char>(pattern & 0xff));
    halves.push_back(static_cast<unsigned char>(pattern >> 8));
  }
  std::mt19937 random(99);
  std::vector<unsigned char> floats;
  for (int i = 0; i < 4 * 300000; ++i) floats.push_back(static_cast<unsigned char>(random() >> 24));
  // Exponents where float16 is subnormal, rounds, and overflows.
  for (std::uint32_t bits = 0x33000000u; bits < 0x48000000u; bits += 0x3ffu) {
    for (int byte = 0; byte < 4; ++byte) floats.push_back(static_cast<unsigned char>(bits >> (8 * byte)));
  }
  for (const DType from : kAll) {
    std::vector<unsigned char>& values = from == DType::F32 ? floats : halves;
    for (const DType to : kAll) {
      require(converted(isa, from, to, values) == converted("scalar", from, to, values),
              "conversions, " + isa);
    }
  }
}

void test_inner(const std::string& isa, DType grad_type, DType delta_type) {
  std::mt19937 random(54321);
  for (const std::int64_t n : {0, 1, 33, 4096, 200003}) {
    Buffer grad(grad_type, n);
    Buffer delta(delta_type, n);
    grad.randomize(random);
    delta.randomize(random);
    const paretofuse::Plane planes[2] = {dense(delta.data(), delta_type), dense(nullptr, delta_type)};
    double expected = 0.0;
    double scale = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
      expected += grad[i] * delta[i];
      scale += std::abs(grad[i] * delta[i]);
    }
    double first = 0.0;
    for (const int threads : {1, 2, 5}) {
      double result[2] = {NAN, NAN};
      paretofuse::inner(grad.data(), grad_type, planes, 2, n, n, result, threads, isa);
      require(std::abs(result[0] - expected) <= scale * 1e-6, "inner against float64, " + isa);
      require(result[1] == 0.0, "null delta gives 0, " + isa);
      if (threads == 1) first = result[0];
      require(result[0] == first, "inner does not depend on threads, " + isa);
    }
  }
}

// Coefficients of rows and columns, and sums by column, of matrices whose rows are off the steps.
void test_columns(const std::string& isa, DType type) {
  std::mt19937 random(31);
  std::normal_distribution<float> normal;
  for (const auto& [rows, columns] : {std::pair{1, 1}, {1, 70001}, {5003, 1}, {37, 50}, {130, 600}}) {
    const std::int64_t n = std::int64_t{rows} * columns;
    Buffer base(type, n), delta(type, n), left(type, rows * 3), right(type, columns * 3), out(type, n);
    for (Buffer* buffer : {&base, &delta, &left, &right}) buffer->randomize(random);
    const paretofuse::Plane planes[3] = {dense(delta.data(), type),
                                         dense(nullptr, type),
                                         {right.data(), left.data(), 3, paretofuse::Format::LowRank, type}};
    std::vector<float> weights(3), own_rows(3 * static_cast<std::size_t>(rows)),
        own_columns(3 * static_cast<std::size_t>(columns));
    for (auto* list : {&weights, &own_rows, &own_columns}) {
      for (float& value : *list) value = 0.25f * normal(random);
    }
    const auto low_rank = [&](std::int64_t i, std::int64_t j) {
      double sum = 0.0;
      for (std::int64_t r = 0; r < 3; ++r) sum += left[i * 3 + r] * right[r * columns + j];
      return sum;
    };
    const paretofuse::MergePlan plan({{base.data(), n, 0, columns, type, type}},
                                     {planes[0], planes[1], planes[2]}, 3, 1);
    void* target = out.data();
    const float* row_weights = own_rows.data();
    const float* column_weights = own_columns.data();
    std::vector<double> sums(3 * static_cast<std::size_t>(columns), NAN), expected(sums.size());
    for (const int threads : {1, 3}) {
      plan.run(weights.data(), 1, &target, threads, isa, &row_weights, &column_weights);
      paretofuse::inner_columns(base.data(), type, planes, 3, n, columns, sums.data(), threads, isa);
      std::fill(expected.begin(), expected.end(), 0.0);
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t row = i / columns, column = i % columns;
        const double added[3] = {delta[i], 0.0, low_rank(row, column)};
        double sum = base[i];
        for (std::int64_t p = 0; p < 3; ++p) {
          const double weight =
              static_cast<double>(weights[static_cast<std::size_t>(p)]) +
              static_cast<double>(own_rows[static_cast<std::size_t>(p * rows + row)]) +
              static_cast<double>(own_columns[static_cast<std::size_t>(p * columns + column)]);
          sum += weight * added[p];
          expected[static_cast<std::size_t>(p * columns + column)] += base[i] * added[p];
        }
        require(std::abs(out[i] - sum) <= 4 * tolerance(type),
                "columns' coefficients against float64, " + isa);
      }
      for (std::size_t i = 0; i < sums.size(); ++i)
        require(std::abs(sums[i] - expected[i]) <= 1e-6 * (8.0 * rows + 8.0), "sums by column, " + isa);
      require(out.guards_intact(), "guard zones untouched by columns, " + isa);
    }
  }
}

void test_copy(const std::string& isa) {
  std::mt19937 random(777);
  for (const std::int64_t n : {0, 1, 15, 100, 200003}) {
    Buffer from(DType::F32, n);
    Buffer to(DType::F32, n);
    from.randomize(random);
    paretofuse::copy(to.data(), from.data(), from.size(), 2, isa);
    require(to.same(from) && to.guards_intact(), "copy, " + isa);
  }
}

template <class Call>
void require_error(const Call& call, const std::string& word) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    require(std::string(error.what()).find(word) != std::string::npos, "error text names " + word);
    return;
  }
  require(false, "an error about " + word);
}

void test_errors() {
  using paretofuse::MergePlan;
  float values[4] = {1, 2, 3, 4};
  float target[4];
  const paretofuse::Segment good = {values, 4, 0, 4, DType::F32, DType::F32};
  const paretofuse::Plane plane = dense(values, DType::F32);
  const auto with = [&](auto change) {
    paretofuse::Segment segment = good;
    change(segment);
    return MergePlan({segment}, {plane}, 1, 1);
  };
  require_error([&] { MergePlan({good}, {}, 1, 1); }, "planes");
  require_error([&] { MergePlan({good}, {plane}, 0, 1); }, "plane_count");
  require_error([&] { MergePlan({good}, {plane}, 1, 0); }, "row_count");
  require_error([&] { with([](auto& s) { s.row = 1; }); }, "row");
  require_error([&] { with([](auto& s) { s.row = -1; }); }, "row");
  require_error([&] { with([](auto& s) { s.length = -1; }); }, "length");
  require_error([&] { with([](auto& s) { s.base = nullptr; }); }, "base");
  const MergePlan plan({good}, {dense(nullptr, DType::F32)}, 1, 1);
  const float weight = 1.0f;
  void* out[1] = {target};
  require_error([&] { plan.run(&weight, 0, out, 1); }, "preferences");
  require_error([&] { plan.run(&weight, 1, out, 0); }, "threads");
  require_error([&] { plan.run(&weight, 1, out, 1, "mmx"); }, "mmx");
  const paretofuse::Segment crooked = {values, 4, 0, 3, DType::F32, DType::F32};
  const float* own[1] = {values};
  require_error([&] { MergePlan({crooked}, {plane}, 1, 1).run(&weight, 1, out, 1, {}, nullptr, own); },
                "columns");
  double sum;
  require_error([&] { paretofuse::inner_columns(values, DType::F32, &plane, 1, 4, 3, &sum, 1); }, "columns");
  out[0] = nullptr;
  require_error([&] { plan.run(&weight, 1, out, 1); }, "null");
  out[0] = values + 3;
  require_error([&] { plan.run(&weight, 1, out, 1); }, "overlaps");
}

}  // namespace

int main() {
  for (const paretofuse::InstructionSet& set : paretofuse::instruction_sets()) {
    if (!set.usable) continue;
    const std::string isa = set.name;
    for (const DType base : kAll) {
      for (const DType delta : kAll) {
        for (const DType out : kAll) test_merge(isa, base, delta, out);
        test_inner(isa, base, delta);
      }
    }
    for (const DType type : kAll) test_columns(isa, type);
    test_conversions(isa);
    test_copy(isa);
    std::printf("%s: ok\n", set.name);
  }
  test_errors();
  return 0;
}

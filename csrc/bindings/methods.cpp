// Python's view of the merge methods: addresses and dtype codes in, masks in NumPy's own memory.
#include "core/methods.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace paretofuse {
namespace {

using Mask = py::array_t<std::uint8_t, py::array::c_style>;
// Address and dtype code of one tensor.
using Address = std::pair<std::uint64_t, std::uint8_t>;

Numbers numbers(const Address& address) {
  return {reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address.first)),
          static_cast<DType>(address.second)};
}

std::uint8_t* bytes_of(Mask& mask, std::int64_t length) {
  if (mask.ndim() != 1 || mask.size() != (length + 7) / 8) {
    throw std::invalid_argument("mask: got " + std::to_string(mask.size()) + " bytes, expected " +
                                std::to_string((length + 7) / 8));
  }
  return mask.mutable_data();
}

// Calls a keep_* function without the interpreter's lock; returns the two sums.
template <class Function>
std::pair<double, double> keep(Mask& mask, const Address& model, const Address& base, std::int64_t length,
                               const Function& function) {
  const Difference difference{numbers(model), numbers(base), length};
  std::uint8_t* bytes = bytes_of(mask, length);
  const py::gil_scoped_release unlocked;
  const Kept kept = function(difference, bytes);
  return {kept.before, kept.after};
}

// Address and dtype of the model, mask or None, scale and weight.
using ShareOf = std::tuple<std::uint64_t, std::uint8_t, py::object, float, float>;

void merge(const Address& base, const std::vector<ShareOf>& given, std::int64_t length, const Address& out,
           bool elects, bool normalizes, float lambda, int threads, const std::string& isa) {
  std::vector<Share> shares;
  for (const auto& [address, dtype, mask, scale, weight] : given) {
    const std::uint8_t* bytes = nullptr;
    if (!mask.is_none()) {
      auto held = mask.cast<Mask>();
      bytes = bytes_of(held, length);
    }
    shares.push_back({numbers({address, dtype}), bytes, scale, weight});
  }
  auto* to = reinterpret_cast<void*>(static_cast<std::uintptr_t>(out.first));
  const py::gil_scoped_release unlocked;
  merge_differences(numbers(base), shares, {elects, normalizes, lambda}, length, to,
                    static_cast<DType>(out.second), {threads, isa});
}

py::array_t<double> products_of(const Address& base, const std::vector<Address>& models, std::int64_t length,
                                std::int64_t columns, int threads, const std::string& isa) {
  if (columns < 1)
    throw std::invalid_argument("columns: got " + std::to_string(columns) + ", expected 1 or more");
  const auto count = static_cast<py::ssize_t>(models.size());
  py::array_t<double> result({static_cast<py::ssize_t>(length / columns), count, count});
  std::vector<Numbers> list;
  for (const Address& model : models) list.push_back(numbers(model));
  double* cells = result.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    products(numbers(base), list, length, columns, cells, {threads, isa});
  }
  return result;
}

}  // namespace

void bind_methods(py::module_& m) {
  m.def(
      "keep_largest",
      [](const Address& model, const Address& base, std::int64_t length, Mask mask, std::int64_t first,
         std::int64_t count, int threads, const std::string& isa) {
        return keep(mask, model, base, length, [&](const Difference& difference, std::uint8_t* bytes) {
          return keep_largest(difference, first, count, bytes, {threads, isa});
        });
      },
      py::arg("model"), py::arg("base"), py::arg("length"), py::arg("mask").noconvert(), py::kw_only(),
      py::arg("first"), py::arg("count"), py::arg("threads"), py::arg("isa"));
  m.def(
      "keep_drawn",
      [](const Address& model, const Address& base, std::int64_t length, Mask mask,
         std::pair<std::uint32_t, std::uint32_t> key, std::uint32_t threshold, int threads,
         const std::string& isa) {
        return keep(mask, model, base, length, [&](const Difference& difference, std::uint8_t* bytes) {
          return keep_drawn(difference, {key.first, key.second}, threshold, bytes, {threads, isa});
        });
      },
      py::arg("model"), py::arg("base"), py::arg("length"), py::arg("mask").noconvert(), py::kw_only(),
      py::arg("key"), py::arg("threshold"), py::arg("threads"), py::arg("isa"));
  m.def(
      "keep_ranked",
      [](const Address& model, const Address& base, std::int64_t length, Mask mask, std::int64_t columns,
         std::pair<std::uint32_t, std::uint32_t> key, float low, float rise, int threads,
         const std::string& isa) {
        return keep(mask, model, base, length, [&](const Difference& difference, std::uint8_t* bytes) {
          return keep_ranked(difference, columns, {key.first, key.second}, low, rise, bytes, {threads, isa});
        });
      },
      py::arg("model"), py::arg("base"), py::arg("length"), py::arg("mask").noconvert(), py::kw_only(),
      py::arg("columns"), py::arg("key"), py::arg("low"), py::arg("rise"), py::arg("threads"),
      py::arg("isa"));
  m.def("merge_differences", &merge, py::arg("base"), py::arg("shares"), py::arg("length"), py::arg("out"),
        py::kw_only(), py::arg("elects"), py::arg("normalizes"), py::arg("scale"), py::arg("threads"),
        py::arg("isa"));
  m.def("products", &products_of, py::arg("base"), py::arg("models"), py::arg("length"), py::kw_only(),
        py::arg("columns"), py::arg("threads"), py::arg("isa"));
}

}  // namespace paretofuse

// Python's view of the core: addresses and sizes in, no tensor library.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "paretofuse/isa.h"
#include "paretofuse/merge.h"

namespace py = pybind11;
namespace pf = paretofuse;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void* pointer(std::uint64_t address) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)); }

template <class T>
void check_shape(const char* name, const Array<T>& array, const std::vector<std::int64_t>& shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t d = 0; same && d < shape.size(); ++d) {
    same = array.shape(static_cast<py::ssize_t>(d)) == static_cast<py::ssize_t>(shape[d]);
  }
  if (same) return;
  std::string text = std::string(name) + ": got shape [";
  for (py::ssize_t d = 0; d < array.ndim(); ++d) text += (d ? ", " : "") + std::to_string(array.shape(d));
  text += "], expected [";
  for (std::size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  throw std::invalid_argument(text + "]");
}

pf::DType dtype(std::uint8_t code) {
  if (code >= pf::kDTypes)
    throw std::invalid_argument("dtype code: got " + std::to_string(code) + ", expected 0 to 2");
  return static_cast<pf::DType>(code);
}

pf::MergePlan make_plan(const Array<std::uint64_t>& base, const Array<std::uint64_t>& deltas,
                        const Array<std::int64_t>& lengths, const Array<std::int64_t>& rows,
                        const Array<std::uint8_t>& dtypes, std::int64_t experts, std::int64_t row_count) {
  const auto count = static_cast<std::int64_t>(base.size());
  check_shape("base", base, {count});
  check_shape("deltas", deltas, {count, experts});
  check_shape("lengths", lengths, {count});
  check_shape("rows", rows, {count});
  check_shape("dtypes", dtypes, {count, 3});
  std::vector<pf::Segment> segments;
  for (py::ssize_t s = 0; s < count; ++s) {
    segments.push_back({pointer(base.at(s)), lengths.at(s), rows.at(s), dtype(dtypes.at(s, 0)),
                        dtype(dtypes.at(s, 1)), dtype(dtypes.at(s, 2))});
  }
  std::vector<const void*> addresses;
  for (py::ssize_t s = 0; s < count; ++s) {
    for (py::ssize_t e = 0; e < experts; ++e) addresses.push_back(pointer(deltas.at(s, e)));
  }
  return pf::MergePlan(std::move(segments), std::move(addresses), experts, row_count);
}

const char* run_plan(const pf::MergePlan& plan, const Array<float>& weights, const Array<std::uint64_t>& out,
                     int threads, const std::string& isa) {
  const std::int64_t preferences = weights.ndim() > 0 ? weights.shape(0) : 0;
  check_shape("weights", weights, {preferences, plan.row_count(), plan.experts()});
  check_shape("out", out, {preferences, plan.segment_count()});
  std::vector<void*> targets;
  for (py::ssize_t k = 0; k < preferences; ++k) {
    for (py::ssize_t s = 0; s < plan.segment_count(); ++s) targets.push_back(pointer(out.at(k, s)));
  }
  const py::gil_scoped_release unlocked;
  return plan.run(weights.data(), preferences, targets.data(), threads, isa);
}

Array<double> inner(std::uint64_t grad, const Array<std::uint64_t>& deltas, std::int64_t length,
                    std::uint8_t grad_dtype, std::uint8_t delta_dtype, int threads, const std::string& isa) {
  check_shape("deltas", deltas, {static_cast<std::int64_t>(deltas.size())});
  std::vector<const void*> addresses;
  for (py::ssize_t e = 0; e < deltas.size(); ++e) addresses.push_back(pointer(deltas.at(e)));
  Array<double> result(deltas.size());
  const pf::DType grad_type = dtype(grad_dtype);
  const pf::DType delta_type = dtype(delta_dtype);
  double* sums = result.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    pf::inner(pointer(grad), grad_type, addresses.data(), delta_type,
              static_cast<std::int64_t>(addresses.size()), length, sums, threads, isa);
  }
  return result;
}

void copy(std::uint64_t dst, std::uint64_t src, std::int64_t nbytes, int threads, const std::string& isa) {
  const py::gil_scoped_release unlocked;
  pf::copy(pointer(dst), pointer(src), nbytes, threads, isa);
}

std::vector<std::pair<std::string, bool>> instruction_sets() {
  std::vector<std::pair<std::string, bool>> sets;
  for (const pf::InstructionSet& set : pf::instruction_sets()) sets.emplace_back(set.name, set.usable);
  return sets;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "ParetoFuse's C++ core. Call it through paretofuse.engine.native.";
  py::class_<pf::MergePlan>(m, "MergePlan")
      .def(py::init(&make_plan), py::kw_only(), py::arg("base").noconvert(), py::arg("deltas").noconvert(),
           py::arg("lengths").noconvert(), py::arg("rows").noconvert(), py::arg("dtypes").noconvert(),
           py::arg("experts"), py::arg("row_count"))
      .def("run", &run_plan, py::arg("weights").noconvert(), py::arg("out").noconvert(), py::kw_only(),
           py::arg("threads"), py::arg("isa"));
  m.def("inner", &inner, py::arg("grad"), py::arg("deltas").noconvert(), py::arg("length"), py::kw_only(),
        py::arg("grad_dtype"), py::arg("delta_dtype"), py::arg("threads"), py::arg("isa"));
  m.def("copy", &copy, py::arg("dst"), py::arg("src"), py::arg("nbytes"), py::kw_only(), py::arg("threads"),
        py::arg("isa"));
  m.def("instruction_sets", &instruction_sets);
  m.def("chosen_isa", &pf::chosen_isa, py::arg("isa"));
}

// Python's view of the core: addresses and sizes in, no tensor library.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
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

// Planes [.., count] in five arrays of one shape.
struct Planes {
  Array<std::uint64_t> values;
  Array<std::uint64_t> factors;
  Array<std::int64_t> sizes;
  Array<std::uint8_t> formats;
  Array<std::uint8_t> dtypes;

  std::vector<pf::Plane> list(const std::vector<std::int64_t>& shape) const {
    check_shape("values", values, shape);
    check_shape("factors", factors, shape);
    check_shape("sizes", sizes, shape);
    check_shape("formats", formats, shape);
    check_shape("plane dtypes", dtypes, shape);
    std::vector<pf::Plane> planes;
    for (py::ssize_t i = 0; i < values.size(); ++i) {
      planes.push_back({pointer(values.data()[i]), pointer(factors.data()[i]), sizes.data()[i],
                        static_cast<pf::Format>(formats.data()[i]), dtype(dtypes.data()[i])});
    }
    return planes;
  }
};

pf::MergePlan make_plan(const Array<std::uint64_t>& base, const Array<std::int64_t>& lengths,
                        const Array<std::int64_t>& rows, const Array<std::int64_t>& columns,
                        const Array<std::uint8_t>& dtypes, const Planes& planes, std::int64_t plane_count,
                        std::int64_t row_count) {
  const auto count = static_cast<std::int64_t>(base.size());
  check_shape("base", base, {count});
  check_shape("lengths", lengths, {count});
  check_shape("rows", rows, {count});
  check_shape("columns", columns, {count});
  check_shape("dtypes", dtypes, {count, 2});
  std::vector<pf::Segment> segments;
  for (py::ssize_t s = 0; s < count; ++s) {
    segments.push_back({pointer(base.at(s)), lengths.at(s), rows.at(s), columns.at(s), dtype(dtypes.at(s, 0)),
                        dtype(dtypes.at(s, 1))});
  }
  return pf::MergePlan(std::move(segments), planes.list({count, plane_count}), plane_count, row_count);
}

const char* run_plan(const pf::MergePlan& plan, const Array<float>& weights, const Array<std::uint64_t>& out,
                     const std::optional<Array<std::uint64_t>>& row_weights,
                     const std::optional<Array<std::uint64_t>>& column_weights, int threads,
                     const std::string& isa) {
  const std::int64_t preferences = weights.ndim() > 0 ? weights.shape(0) : 0;
  check_shape("weights", weights, {preferences, plan.row_count(), plan.plane_count()});
  check_shape("out", out, {preferences, plan.segment_count()});
  if (row_weights) check_shape("row_weights", *row_weights, {preferences, plan.segment_count()});
  if (column_weights) check_shape("column_weights", *column_weights, {preferences, plan.segment_count()});
  std::vector<void*> targets;
  std::vector<const float*> rows, columns;
  for (py::ssize_t i = 0; i < out.size(); ++i) {
    targets.push_back(pointer(out.data()[i]));
    if (row_weights) rows.push_back(static_cast<const float*>(pointer(row_weights->data()[i])));
    if (column_weights) columns.push_back(static_cast<const float*>(pointer(column_weights->data()[i])));
  }
  const py::gil_scoped_release unlocked;
  return plan.run(weights.data(), preferences, targets.data(), threads, isa,
                  row_weights ? rows.data() : nullptr, column_weights ? columns.data() : nullptr);
}

Array<double> inner(std::uint64_t grad, const Planes& planes, std::int64_t length, std::int64_t columns,
                    const std::string& by, std::uint8_t grad_dtype, int threads, const std::string& isa) {
  const std::vector<pf::Plane> list = planes.list({static_cast<std::int64_t>(planes.values.size())});
  const auto count = static_cast<std::int64_t>(list.size());
  std::vector<py::ssize_t> shape{count};
  if (by != "whole" && by != "row" && by != "column")
    throw std::invalid_argument("by: got '" + by + "', expected whole, row or column");
  if (by != "whole") {
    if (columns < 1)
      throw std::invalid_argument("columns: got " + std::to_string(columns) + ", expected 1 or more");
    shape.push_back(by == "row" ? length / columns : columns);
  }
  Array<double> result(shape);
  const pf::DType grad_type = dtype(grad_dtype);
  double* sums = result.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    const auto reduce = by == "whole" ? pf::inner : by == "row" ? pf::inner_rows : pf::inner_columns;
    reduce(pointer(grad), grad_type, list.data(), count, length, columns, sums, threads, isa);
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
  m.doc() = "ParetoFuse's C++ core. Call it through the rooms' files of the name native.py.";
  pf::bind_methods(m);
  pf::bind_places(m);
  pf::bind_routing(m);
  pf::bind_store(m);
  py::class_<Planes>(m, "Planes")
      .def(py::init([](Array<std::uint64_t> values, Array<std::uint64_t> factors, Array<std::int64_t> sizes,
                       Array<std::uint8_t> formats, Array<std::uint8_t> dtypes) {
             return Planes{std::move(values), std::move(factors), std::move(sizes), std::move(formats),
                           std::move(dtypes)};
           }),
           py::kw_only(), py::arg("values").noconvert(), py::arg("factors").noconvert(),
           py::arg("sizes").noconvert(), py::arg("formats").noconvert(), py::arg("dtypes").noconvert());
  py::class_<pf::MergePlan>(m, "MergePlan")
      .def(py::init(&make_plan), py::kw_only(), py::arg("base").noconvert(), py::arg("lengths").noconvert(),
           py::arg("rows").noconvert(), py::arg("columns").noconvert(), py::arg("dtypes").noconvert(),
           py::arg("planes"), py::arg("plane_count"), py::arg("row_count"))
      .def("run", &run_plan, py::arg("weights").noconvert(), py::arg("out").noconvert(), py::kw_only(),
           py::arg("row_weights").noconvert(), py::arg("column_weights").noconvert() = py::none(),
           py::arg("threads"), py::arg("isa"));
  m.def("inner", &inner, py::arg("grad"), py::arg("planes"), py::arg("length"), py::kw_only(),
        py::arg("columns"), py::arg("by"), py::arg("grad_dtype"), py::arg("threads"), py::arg("isa"));
  m.def("copy", &copy, py::arg("dst"), py::arg("src"), py::arg("nbytes"), py::kw_only(), py::arg("threads"),
        py::arg("isa"));
  m.def("instruction_sets", &instruction_sets);
  m.def("chosen_isa", &pf::chosen_isa, py::arg("isa"));
}

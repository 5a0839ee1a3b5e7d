// Python's view of the groups' routers, for an engine that holds them in memory: its merges have the bits of
// a store's, because their routing weights come from the same code.
#include "store/routing.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace paretofuse {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

RouterParameter parameter_of(const Array<float>& array) {
  return {{array.shape(), array.shape() + array.ndim()}, {array.data(), array.data() + array.size()}};
}

std::unique_ptr<Routers> make_routers(const std::string& init,
                                      const std::vector<std::tuple<std::int64_t, double>>& members,
                                      const std::map<std::string, Array<float>>& arrays) {
  std::map<std::string, RouterParameter> parameters;
  for (const auto& [name, array] : arrays) parameters[name] = parameter_of(array);
  const auto hidden = arrays.find("hidden.weight");
  if (hidden == arrays.end() || hidden->second.ndim() != 3) {
    throw std::invalid_argument("the router parameters lack 'hidden.weight' [G, H, M]");
  }
  std::vector<Member> own;
  for (const auto& [objective, share] : members) own.push_back({"", objective, share});
  return std::make_unique<Routers>(init, hidden->second.shape(0), hidden->second.shape(2), std::move(own), 0,
                                   0, std::move(parameters));
}

// Routing weights [G, P] of a checked preference [M], or [K, G, P] of several [K, M].
Array<float> weights_of(const Routers& routers, const Array<double>& preferences) {
  const auto& bias = routers.parameters().at("output.bias").shape;  // [G, P]
  const auto& hidden = routers.parameters().at("hidden.weight").shape;
  const py::ssize_t axes = preferences.ndim();
  if (axes < 1 || axes > 2 || preferences.shape(axes - 1) != hidden[2]) {
    throw std::invalid_argument("expected preferences [M = " + std::to_string(hidden[2]) + "] or [K, M]");
  }
  const py::ssize_t count = axes == 1 ? 1 : preferences.shape(0), size = bias[0] * bias[1];
  std::vector<py::ssize_t> shape{bias[0], bias[1]};
  if (axes == 2) shape.insert(shape.begin(), count);
  Array<float> weights(shape);
  float* out = weights.mutable_data();
  const double* given = preferences.data();
  const py::gil_scoped_release unlocked;
  for (py::ssize_t k = 0; k < count; ++k) {
    const Weights one = routers.evaluate(Preference(given + k * hidden[2], given + (k + 1) * hidden[2]));
    std::copy(one.values.begin(), one.values.end(), out + k * size);
  }
  return weights;
}

}  // namespace

void bind_routing(py::module_& m) {
  py::class_<Routers>(m, "Routers")
      .def(py::init(&make_routers), py::arg("init"), py::arg("members"), py::arg("parameters"))
      .def("weights", &weights_of, py::arg("preferences"));
}

}  // namespace paretofuse

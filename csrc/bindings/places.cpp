// Where a module's tensors lie, compared with where they lay: every switch asks, so it costs tens of
// nanoseconds for each tensor. torch tells by DLPack's exchange functions (DLPack 1.2,
// `Tensor.__dlpack_c_exchange_api__`), which need no object of Python for an answer and no header of torch
// here; of that interface only what is used stands below.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace paretofuse {
namespace {

struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  void* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows all that it points to
  void* current_stream;
};

constexpr const char* kCapsule = "dlpack_exchange_api";

// The addresses, devices, dtypes, shapes and strides of tensors. It holds none of them: Python's collector
// could not look through it, and tensors know, by their hooks, who watches them.
class Places {
 public:
  Places(const py::list& tensors, const py::capsule& exchange) {
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), kCapsule));
    if (api == nullptr) throw py::error_already_set();
    if (api->major != 1 || api->tensor_from_object == nullptr) {
      throw std::invalid_argument(
          "expected the exchange functions of DLPack 1 with that for borrowed tensors");
    }
    tell_ = api->tensor_from_object;
    for (const py::handle tensor : tensors) {
      DLTensor found{};
      if (tell_(tensor.ptr(), &found) != 0) throw py::error_already_set();
      first_.push_back(sizes_.size());
      sizes_.insert(sizes_.end(), found.shape, found.shape + found.ndim);
      sizes_.insert(sizes_.end(), found.strides, found.strides + found.ndim);
      found.shape = found.strides = nullptr;
      tensors_.push_back(found);
    }
  }

  // Whether the same tensors still lie there; false as well where torch cannot tell.
  bool hold(const py::list& tensors) const {
    if (tensors.size() != tensors_.size()) return false;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      DLTensor now{};
      if (tell_(PyList_GET_ITEM(tensors.ptr(), static_cast<py::ssize_t>(i)), &now) != 0) {
        PyErr_Clear();
        return false;
      }
      if (!same(tensors_[i], sizes_.data() + first_[i], now)) return false;
    }
    return true;
  }

 private:
  static bool same(const DLTensor& was, const std::int64_t* sizes, const DLTensor& now) {
    if (was.data != now.data || was.byte_offset != now.byte_offset || was.device_type != now.device_type ||
        was.device_id != now.device_id || was.code != now.code || was.bits != now.bits ||
        was.ndim != now.ndim) {
      return false;
    }
    for (std::int32_t d = 0; d < now.ndim; ++d) {
      if (sizes[d] != now.shape[d] || sizes[now.ndim + d] != now.strides[d]) return false;
    }
    return true;
  }

  int (*tell_)(void*, DLTensor*);
  std::vector<DLTensor> tensors_;    // without shapes and strides,
  std::vector<std::size_t> first_;   // which begin here
  std::vector<std::int64_t> sizes_;  // in this
};

// Of tables (dict, entries), whether each dict still has those very keys and values (k, v, k, v, ..), in that
// order.
bool tables_hold(const py::list& tables) {
  for (const py::handle table : tables) {
    PyObject* const pair = table.ptr();
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 || !PyDict_Check(PyTuple_GET_ITEM(pair, 0)) ||
        !PyTuple_Check(PyTuple_GET_ITEM(pair, 1))) {
      throw py::type_error("expected tables (dict, entries)");
    }
    PyObject *const dict = PyTuple_GET_ITEM(pair, 0), *const entries = PyTuple_GET_ITEM(pair, 1);
    if (2 * PyDict_Size(dict) != PyTuple_GET_SIZE(entries)) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t place = 0, at = 0;
    while (PyDict_Next(dict, &place, &key, &value) != 0) {
      if (key != PyTuple_GET_ITEM(entries, at) || value != PyTuple_GET_ITEM(entries, at + 1)) return false;
      at += 2;
    }
  }
  return true;
}

}  // namespace

void bind_places(py::module_& m) {
  py::class_<Places>(m, "Places")
      .def(py::init<py::list, py::capsule>(), py::arg("tensors"), py::arg("exchange"))
      .def("hold", &Places::hold, py::arg("tensors"));
  m.def("tables_hold", &tables_hold, py::arg("tables"));
}

}  // namespace paretofuse

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

// Of links (table, key, value), whether each table still holds that very value at its key.
bool links_hold(const py::list& links) {
  for (const py::handle link : links) {
    PyObject* const parts = link.ptr();
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != 3 || !PyDict_Check(PyTuple_GET_ITEM(parts, 0))) {
      throw py::type_error("expected links (dict, key, value)");
    }
    PyObject* const held = PyDict_GetItemWithError(PyTuple_GET_ITEM(parts, 0), PyTuple_GET_ITEM(parts, 1));
    if (held != PyTuple_GET_ITEM(parts, 2)) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return false;
    }
  }
  return true;
}

}  // namespace

void bind_places(py::module_& m) {
  py::class_<Places>(m, "Places")
      .def(py::init<py::list, py::capsule>(), py::arg("tensors"), py::arg("exchange"))
      .def("hold", &Places::hold, py::arg("tensors"));
  m.def("links_hold", &links_hold, py::arg("links"));
}

}  // namespace paretofuse

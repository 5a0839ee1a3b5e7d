// Python's view of the store: files and manifests are read, and models and files written, by the library's
// own code.
#include "store/store.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "paretofuse/engine.h"
#include "store/atomic.h"
#include "store/safetensors_writer.h"
#include "store/shards.h"
#include "store/writer.h"

namespace py = pybind11;

namespace paretofuse {
namespace {

using File = std::shared_ptr<TensorFile>;
using Path = std::filesystem::path;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// One tensor of a mapped file, which stays mapped as long as any of these lives.
struct View {
  File file;
  const Entry* entry;
  std::vector<std::byte> copy;  // where the file does not align its elements

  std::byte* data() {
    auto* mapped = const_cast<std::byte*>(file->data(*entry));  // the file was made writable
    if (entry->nbytes == 0 || entry->offset % dtype_size(entry->dtype) == 0) return mapped;
    if (copy.empty()) copy.assign(mapped, mapped + entry->nbytes);
    return copy.data();
  }
};

File writable(File file) {
  file->file.make_writable();
  return file;
}

// A tensor file of a store, kept alive together with it.
File part(const std::shared_ptr<Store>& store, TensorFile& file) { return writable(File(store, &file)); }

py::dict views_of(const File& file) {
  py::dict views;
  for (const Entry& entry : file->entries) views[py::str(entry.name)] = View{file, &entry, {}};
  return views;
}

py::str text(const std::string& bytes) {
  PyObject* decoded =
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "surrogateescape");
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

void raise_os_error(int code, const std::string& path) {
  const py::object error =
      py::module_::import("builtins").attr("OSError")(code, std::strerror(code), text(path));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const StoreError& error) {
    const py::object type = py::module_::import("paretofuse.engine.errors").attr("StoreError");
    PyErr_SetObject(type.ptr(), text(error.what()).ptr());
  } catch (const FileError& error) {
    raise_os_error(error.code().value(), error.path);
  } catch (const std::filesystem::filesystem_error& error) {
    raise_os_error(error.code().value(), error.path1().string());
  }
}

void write_chunk(SafetensorsWriter& writer, const py::object& chunk) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(chunk.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> released(&buffer, PyBuffer_Release);
  const py::gil_scoped_release unlocked;
  writer.write(buffer.buf, static_cast<std::size_t>(buffer.len));
}

// (name, shape, dtype, role, group, delta_dtype, aliases) of every tensor.
py::list specs_of(const Store& store) {
  py::list specs;
  for (const TensorSpec& spec : store.manifest.tensors) {
    const char* roles[] = {"routed", "static", "constant"};
    specs.append(py::make_tuple(spec.name, py::tuple(py::cast(spec.shape)), spec.dtype,
                                roles[static_cast<int>(spec.role)],
                                spec.group.empty() ? py::object(py::none()) : py::str(spec.group),
                                spec.delta_dtype, py::tuple(py::cast(spec.aliases))));
  }
  return specs;
}

// (plane, objective or None, share) of every plane.
py::list members_of(const Store& store) {
  py::list members;
  for (const Member& own : store.manifest.members) {
    py::object objective = py::none();
    if (own.objective >= 0) {
      objective = py::str(store.manifest.objectives[static_cast<std::size_t>(own.objective)]);
    }
    members.append(py::make_tuple(own.plane, objective, own.share));
  }
  return members;
}

// For each expert by tensor (format, size, error or None, values' name, factors' name) of the planes that are
// not dense.
py::list planes_of(const Store& store) {
  py::list experts;
  for (const Member& member : store.manifest.members) {
    py::dict own;
    const auto found = store.manifest.planes.find(member.plane);
    for (const TensorSpec& spec : store.manifest.tensors) {
      if (found == store.manifest.planes.end() || found->second.count(spec.name) == 0) continue;
      const PlaneSpec& plane = found->second.at(spec.name);
      const auto parts = plane_parts(spec.name, spec.shape, plane);
      own[py::str(spec.name)] = py::make_tuple(
          plane_format_name(plane.format), plane.size,
          plane.error < 0 ? py::object(py::none()) : py::float_(plane.error), parts[0].name, parts[1].name);
    }
    experts.append(own);
  }
  return experts;
}

py::list plane_parts_of(const std::string& name, const std::vector<std::int64_t>& shape,
                        const std::string& format, std::int64_t size) {
  py::list parts;
  for (const PlanePart& part : plane_parts(name, shape, {plane_format(format), size, -1.0})) {
    parts.append(py::make_tuple(part.name, part.dtype, py::tuple(py::cast(part.shape))));
  }
  return parts;
}

py::dict routers_of(const Store& store) {
  py::dict arrays;
  for (const auto& [name, parameter] : store.routers.parameters()) {
    const std::vector<py::ssize_t> shape(parameter.shape.begin(), parameter.shape.end());
    arrays[py::str(name)] = Array<float>(shape, parameter.values.data());
  }
  return arrays;
}

py::dict model_files_of(const Store& store, const std::string& head) {
  py::dict files;
  for (const auto& [name, content] : store.model_files(head)) files[py::str(name)] = py::bytes(content);
  return files;
}

Array<float> routing_weights_of(const Store& store, const Preference& preference) {
  check_preference(preference, store.manifest.objectives);
  const Weights weights = store.routers.evaluate(preference);
  const std::size_t planes = store.manifest.members.size();
  return Array<float>(std::vector<std::size_t>{weights.values.size() / planes, planes},
                      weights.values.data());
}

Merged merge(const Store& store, const Array<float>& weights, const Path& path, const std::string& head,
             std::map<std::string, std::string> files, int threads, const std::string& isa,
             const std::optional<py::function>& progress, std::int64_t batch_bytes,
             std::int64_t shard_bytes) {
  const Weights routing{{weights.data(), weights.data() + weights.size()}};
  const auto report = [&progress](std::int64_t done, std::int64_t total) {
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) (*progress)(done, total);
  };
  const py::gil_scoped_release unlocked;
  return write_model(store, routing, path.string(),
                     {head, std::move(files), threads, isa, report, batch_bytes, shard_bytes});
}

}  // namespace

// A constructor lets go of the interpreter's lock around its own work alone: pybind11 enters the new object
// into a table that only this lock guards, so a call_guard for the whole call would let two threads break the
// table.
void bind_store(py::module_& m) {
  py::register_exception_translator(&translate);
  m.def("file_stems", &file_stems, py::arg("names"));
  m.def("plane_parts", &plane_parts_of, py::arg("name"), py::arg("shape"), py::arg("format"),
        py::arg("size"));
  m.def("is_model_file", &is_model_file, py::arg("name"));
  m.def("is_safe_path", &is_safe_path, py::arg("path"));
  m.def("shard_ends", &shard_ends, py::arg("nbytes"), py::arg("shard_bytes"));
  m.def("shard_name", &shard_name, py::arg("stem"), py::arg("number"), py::arg("count"));
  m.def("index_name", &index_name, py::arg("stem"));
  m.def("index_text", &index_text, py::arg("total_parameters"), py::arg("total_size"), py::arg("weight_map"));

  py::class_<View>(m, "TensorView")
      .def_property_readonly("name", [](const View& view) { return view.entry->name; })
      .def_property_readonly("dtype", [](const View& view) { return view.entry->dtype; })
      .def_property_readonly("shape", [](const View& view) { return py::tuple(py::cast(view.entry->shape)); })
      .def_property_readonly("offset", [](const View& view) { return view.entry->offset; })
      .def_property_readonly("nbytes", [](const View& view) { return view.entry->nbytes; })
      .def_property_readonly("address",
                             [](View& view) { return reinterpret_cast<std::uintptr_t>(view.data()); })
      .def_property_readonly("data", [](const py::object& self) {
        auto& view = self.cast<View&>();
        return Array<std::uint8_t>({view.entry->nbytes}, {1}, reinterpret_cast<std::uint8_t*>(view.data()),
                                   self);
      });

  py::class_<TensorFile, File>(m, "SafetensorsFile")
      .def(py::init([](const Path& path) {
             return writable(std::make_shared<TensorFile>(MappedFile(path.string())));
           }),
           py::arg("path"))
      .def_property_readonly("path", [](const TensorFile& file) { return Path(file.file.path()); })
      .def_readonly("metadata", &TensorFile::metadata)
      .def_property_readonly("tensors", &views_of)
      .def_property_readonly("data",
                             [](const py::object& self) {
                               const auto& file = self.cast<const TensorFile&>().file;
                               auto* data =
                                   reinterpret_cast<std::uint8_t*>(const_cast<std::byte*>(file.data()));
                               return Array<std::uint8_t>({file.size()}, {1}, data, self);
                             })
      .def(
          "release",
          [](const TensorFile& file, std::int64_t start, std::int64_t stop) {
            file.file.release(start, stop);
          },
          py::arg("start"), py::arg("stop"));

  py::class_<SafetensorsWriter>(m, "SafetensorsWriter")
      .def(py::init([](const Path& path, std::map<std::string, std::string> metadata, std::size_t reserve) {
             return std::make_unique<SafetensorsWriter>(path.string(), std::move(metadata), reserve);
           }),
           py::arg("path"), py::kw_only(), py::arg("metadata"), py::arg("reserve"))
      .def("begin", &SafetensorsWriter::begin, py::arg("name"), py::arg("dtype"), py::arg("shape"))
      .def("write", &write_chunk, py::arg("chunk"))
      .def("end", &SafetensorsWriter::end)
      .def("finish", &SafetensorsWriter::finish, py::call_guard<py::gil_scoped_release>());

  py::class_<Fresh, std::shared_ptr<Fresh>>(m, "Fresh")
      .def(py::init([](const Path& place, bool directory) {
             const py::gil_scoped_release unlocked;
             return std::make_shared<Fresh>(place.string(),
                                            directory ? Fresh::Kind::directory : Fresh::Kind::file);
           }),
           py::arg("place"), py::kw_only(), py::arg("directory"))
      .def_property_readonly("path", [](const Fresh& fresh) { return Path(fresh.path()); })
      .def_property_readonly("target", [](const Fresh& fresh) { return Path(fresh.target()); })
      .def("place", &Fresh::place, py::arg("exchange") = true, py::call_guard<py::gil_scoped_release>())
      .def("discard", &Fresh::discard, py::call_guard<py::gil_scoped_release>());

  py::class_<Merged>(m, "Merged")
      .def_property_readonly("path", [](const Merged& merged) { return Path(merged.path); })
      .def_readonly("tensors", &Merged::tensors)
      .def_readonly("nbytes", &Merged::nbytes)
      .def_property_readonly("isa", [](const Merged& merged) {
        return merged.isa.empty() ? std::nullopt : std::optional<std::string>(merged.isa);
      });

  py::class_<Store, std::shared_ptr<Store>>(m, "Store")
      .def(py::init([](const Path& path) {
             const py::gil_scoped_release unlocked;
             return std::make_shared<Store>(Store::open(path.string()));
           }),
           py::arg("path"))
      .def_property_readonly("objectives", [](const Store& store) { return store.manifest.objectives; })
      .def_property_readonly("members", &members_of)
      .def_property_readonly("static_weight", [](const Store& store) { return store.manifest.static_weight; })
      .def_property_readonly("specs", &specs_of)
      .def_property_readonly("planes", &planes_of)
      .def_property_readonly("init", [](const Store& store) { return store.manifest.init; })
      .def_property_readonly("family", [](const Store& store) { return store.manifest.family; })
      .def_property_readonly("model_class", [](const Store& store) { return store.manifest.model_class; })
      .def_property_readonly("created_by", [](const Store& store) { return store.manifest.created_by; })
      .def_property_readonly("training", [](const Store& store) { return store.manifest.training; })
      .def_property_readonly("files",
                             [](const Store& store) {
                               std::map<std::string, std::pair<std::int64_t, std::string>> files;
                               for (const auto& [path, record] : store.manifest.files) {
                                 files[path] = {record.bytes, record.sha256};
                               }
                               return files;
                             })
      .def_property_readonly("base",
                             [](const std::shared_ptr<Store>& store) { return part(store, store->base); })
      .def_property_readonly("experts",
                             [](const std::shared_ptr<Store>& store) {
                               std::vector<File> files;
                               for (TensorFile& file : store->experts) files.push_back(part(store, file));
                               return files;
                             })
      .def_property_readonly("heads",
                             [](const std::shared_ptr<Store>& store) {
                               std::map<std::string, File> files;
                               for (auto& [objective, file] : store->heads)
                                 files[objective] = part(store, file);
                               return files;
                             })
      .def_property_readonly("routers", &routers_of)
      .def("model_files", &model_files_of, py::arg("head"))
      .def("routing_weights", &routing_weights_of, py::arg("preference"))
      .def("check_unchanged", &Store::check_unchanged, py::call_guard<py::gil_scoped_release>())
      .def("merge", &merge, py::arg("weights").noconvert(), py::arg("path"), py::kw_only(), py::arg("head"),
           py::arg("files"), py::arg("threads"), py::arg("isa"), py::arg("progress"), py::arg("batch_bytes"),
           py::arg("shard_bytes"));
}

}  // namespace paretofuse

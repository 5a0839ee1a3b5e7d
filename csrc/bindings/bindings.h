// What each file of the binding adds to the extension.
#pragma once

#include <pybind11/pybind11.h>

namespace paretofuse {

void bind_methods(pybind11::module_& m);
void bind_places(pybind11::module_& m);
void bind_routing(pybind11::module_& m);
void bind_store(pybind11::module_& m);

}  // namespace paretofuse

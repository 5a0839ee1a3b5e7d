// Writing a merged model.
#pragma once

#include <string>
#include <vector>

#include "library/store.h"
#include "paretofuse/engine.h"

namespace paretofuse {

// See Engine::write. views: every tensor's memory, in the manifest's order.
void write_model(const Store& store, const std::vector<TensorView>& views, const std::string& path,
                 const std::string& head);

}  // namespace paretofuse

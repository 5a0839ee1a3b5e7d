// JSON, read strictly: no key twice, no deep nesting, nothing after the end.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "store/shown.h"

namespace paretofuse {

using Json = nlohmann::json;

// Throws std::invalid_argument, saying what is wrong with the text.
Json parse_json(std::string_view text);

// A value for error messages: short, and ASCII.
std::string shown(const Json& value);

// A member of an object, null if it is absent.
const Json& member(const Json& object, const std::string& key);

// An integer from 0 to 2^63 - 1; returns false for everything else.
bool as_size(const Json& value, std::int64_t* size);

}  // namespace paretofuse

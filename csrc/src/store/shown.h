// Values in error messages and in JSON, for the files that have no need of a whole JSON library.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace paretofuse {

// For error messages: short, ASCII, between single quotes.
std::string shown(const std::string& text);
std::string shown(const std::vector<std::int64_t>& sizes);

// As a JSON string.
std::string quoted(const std::string& text);

}  // namespace paretofuse

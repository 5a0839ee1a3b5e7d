#include "store/json.h"

#include <limits>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

namespace paretofuse {
namespace {

// Manifests are four levels deep, headers three.
constexpr std::size_t kDepth = 16;

// Builds the value while the parser reads, and stops at the first thing that is not allowed.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Json take() { return std::move(root_); }
  const std::string& error() const { return error_; }

  bool null() override { return add(nullptr) != nullptr; }
  bool boolean(bool value) override { return add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override { return add(value) != nullptr; }
  bool string(string_t& value) override { return add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return false; }

  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    Json& object = *open_.back();
    if (object.contains(name)) return refuse("key " + shown(name) + " appears twice");
    next_ = &object[name];
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return refuse("not JSON at byte " + std::to_string(position));
  }

 private:
  Json* add(Json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    if (open_.back()->is_array()) {
      open_.back()->push_back(std::move(value));
      return &open_.back()->back();
    }
    return &(*next_ = std::move(value));
  }

  bool open(Json value) {
    if (open_.size() == kDepth) return refuse("nested deeper than " + std::to_string(kDepth) + " levels");
    open_.push_back(add(std::move(value)));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  bool refuse(std::string error) {
    error_ = std::move(error);
    return false;
  }

  Json root_;
  std::vector<Json*> open_;  // a parent grows only after its open child was closed, so these stay valid
  Json* next_ = nullptr;     // the value of the key read last
  std::string error_;
};

}  // namespace

Json parse_json(std::string_view text) {
  // The parser takes these for the end of the text and for a mark that it skips.
  if (text.find('\0') != std::string_view::npos) throw std::invalid_argument("not JSON: it holds a NUL");
  if (text.substr(0, 1) == "\xef") throw std::invalid_argument("not JSON: it begins with a byte order mark");
  Builder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) throw std::invalid_argument(builder.error());
  return builder.take();
}

std::string shown(const Json& value) {
  constexpr std::size_t limit = 80;
  if (value.is_structured()) return value.is_array() ? "a list" : "an object";
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > limit) text = text.substr(0, limit) + "...";
  if (!value.is_string()) return text;
  const std::size_t end = text.back() == '"' ? text.size() - 1 : text.size();
  return "'" + text.substr(1, end - 1) + "'";
}

std::string shown(const std::string& text) { return shown(Json(text)); }

std::string quoted(const std::string& text) { return Json(text).dump(); }

std::string shown(const std::vector<std::int64_t>& sizes) {
  std::string text = "[";
  for (std::size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

const Json& member(const Json& object, const std::string& key) {
  static const Json null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

bool as_size(const Json& value, std::int64_t* size) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return false;
    *size = static_cast<std::int64_t>(number);
    return true;
  }
  return value.is_number_integer() && value.get<std::int64_t>() == 0 && (*size = 0, true);
}

}  // namespace paretofuse

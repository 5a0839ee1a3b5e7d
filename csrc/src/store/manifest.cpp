#include "store/manifest.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <set>
#include <stdexcept>
#include <utility>

#include "paretofuse/engine.h"
#include "store/json.h"
#include "store/safetensors.h"

namespace paretofuse {
namespace {

constexpr std::int64_t kMaxRows = std::int64_t{1} << 48;  // more than any file can hold; of columns too

constexpr std::int64_t kVersion = 3;  // 1: all planes are dense; 2: one for each objective

// Becomes a StoreError with the manifest's path.
[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

const Json& typed(const Json& object, const std::string& key, Json::value_t type, const char* expected) {
  const Json& value = member(object, key);
  if (value.type() != type) fail("got " + shown(value) + " for '" + key + "', expected " + expected);
  return value;
}

const Json& object_at(const Json& object, const std::string& key) {
  return typed(object, key, Json::value_t::object, "an object");
}

const Json& list_at(const Json& object, const std::string& key) {
  return typed(object, key, Json::value_t::array, "a list");
}

std::string text_at(const Json& object, const std::string& key) {
  return typed(object, key, Json::value_t::string, "a string").get<std::string>();
}

std::vector<std::string> texts_at(const Json& object, const std::string& key) {
  std::vector<std::string> texts;
  for (const Json& item : list_at(object, key)) {
    if (!item.is_string()) fail("got " + shown(item) + " in '" + key + "', expected strings");
    texts.push_back(item.get<std::string>());
  }
  return texts;
}

std::map<std::string, std::string> text_map_at(const Json& object, const std::string& key) {
  std::map<std::string, std::string> texts;
  for (const auto& [name, item] : object_at(object, key).items()) {
    if (!item.is_string()) fail("got " + shown(item) + " in '" + key + "', expected strings by name");
    texts[name] = item.get<std::string>();
  }
  return texts;
}

bool can_be_merged(const std::string& dtype) { return dtype == "F32" || dtype == "BF16" || dtype == "F16"; }

TensorSpec parse_spec(const Json& json) {
  if (!json.is_object()) fail("got " + shown(json) + " in the tensor table, expected an object");
  TensorSpec spec;
  spec.name = text_at(json, "name");
  const std::string tensor = "tensor " + shown(spec.name);
  for (const Json& size : list_at(json, "shape")) {
    if (!as_size(size, &spec.shape.emplace_back())) {
      fail(tensor + " has " + shown(size) + " in its shape, expected integers >= 0");
    }
  }
  const std::string role = text_at(json, "role");
  if (role != "routed" && role != "static" && role != "constant") {
    fail(tensor + " has role " + shown(role) + ", expected routed, static or constant");
  }
  spec.role = role == "routed" ? Role::routed : role == "static" ? Role::fixed : Role::constant;
  const Json& group = member(json, "group");
  const bool grouped = group.is_string() && !group.get_ref<const std::string&>().empty();
  if (spec.role == Role::routed ? !grouped : !group.is_null()) {
    fail(tensor + " has role '" + role + "' and group " + shown(group) +
         "; only routed tensors have a group");
  }
  if (grouped) spec.group = group.get<std::string>();
  spec.dtype = text_at(json, "dtype");
  spec.delta_dtype = text_at(json, "delta_dtype");
  for (const std::string& dtype : {spec.dtype, spec.delta_dtype}) {
    if (spec.role == Role::constant ? dtype_size(dtype) == 0 : !can_be_merged(dtype)) {
      fail(tensor + " has dtypes " + spec.dtype + " and " + spec.delta_dtype + ", which a " + role +
           " tensor cannot have");
    }
  }
  spec.aliases = texts_at(json, "aliases");
  return spec;
}

FileRecord parse_record(const std::string& path, const Json& json) {
  FileRecord record;
  if (!json.is_object() || !as_size(member(json, "bytes"), &record.bytes)) {
    fail("file " + shown(path) + " has no size in bytes");
  }
  record.sha256 = text_at(json, "sha256");
  const bool hexadecimal = record.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (record.sha256.size() != 64 || !hexadecimal) fail("file " + shown(path) + " has no SHA-256");
  return record;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// Whether a name can be a file name's stem: [A-Za-z0-9_][A-Za-z0-9._-]{0,99}, and not like a safetensors
// file.
bool is_safe_stem(const std::string& name) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  const bool safe =
      !name.empty() && name.size() <= 100 && plain(name[0]) &&
      std::all_of(name.begin(), name.end(), [&](char c) { return plain(c) || c == '.' || c == '-'; });
  return safe && name.back() != '.' && !ends_with(name, ".safetensors");
}

void parse_tensors(const Json& document, Manifest* manifest) {
  std::set<std::string> names, groups;
  for (const Json& json : list_at(document, "tensors")) {
    TensorSpec spec = parse_spec(json);
    std::vector<std::string> own = spec.aliases;
    own.push_back(spec.name);
    for (const std::string& name : own) {
      if (!names.insert(name).second) fail("tensor " + shown(name) + " appears twice in the tensor table");
    }
    if (spec.role == Role::routed) {
      if (groups.insert(spec.group).second) manifest->groups.push_back(spec.group);
      const std::int64_t rows = rows_of(spec.shape);
      if (rows > kMaxRows - manifest->rows) fail("tensor " + shown(spec.name) + " has too many rows");
      spec.first_row = manifest->rows;
      manifest->rows += rows;
      const std::int64_t columns = own_columns_of(spec.shape);
      if (columns > kMaxRows - manifest->columns)
        fail("tensor " + shown(spec.name) + " has too many columns");
      spec.first_column = manifest->columns;
      manifest->columns += columns;
    }
    manifest->tensors.push_back(std::move(spec));
  }
}

// Of stores of version 3: the planes and their objectives; of older ones a plane for each objective, of its
// name.
void parse_members(const Json& document, std::int64_t version, Manifest* manifest) {
  if (version < 3) {
    for (std::size_t m = 0; m < manifest->objectives.size(); ++m) {
      manifest->members.push_back({manifest->objectives[m], static_cast<std::int64_t>(m), 1.0});
    }
    return;
  }
  std::set<std::string> names;
  for (const Json& json : list_at(document, "members")) {
    if (!json.is_object()) fail("got " + shown(json) + " in 'members', expected objects");
    Member own{text_at(json, "plane"), -1, 0.0};
    const std::string plane = "plane " + shown(own.plane);
    if (!names.insert(own.plane).second) fail(plane + " appears twice in 'members'");
    const Json& objective = member(json, "objective");
    if (!objective.is_null()) {
      const auto begin = manifest->objectives.begin(), end = manifest->objectives.end();
      const auto found = objective.is_string() ? std::find(begin, end, objective.get<std::string>()) : end;
      if (found == end) fail(plane + " belongs to " + shown(objective) + ", expected an objective or null");
      own.objective = found - begin;
    }
    const Json& share = member(json, "share");
    if (!share.is_number() || !std::isfinite(share.get<double>())) {
      fail(plane + " has share " + shown(share) + ", expected a finite number");
    }
    own.share = share.get<double>();
    if (own.objective < 0 && own.share != 0.0) {
      fail(plane + " has share " + shown(share) + " of no objective, expected 0");
    }
    manifest->members.push_back(std::move(own));
  }
  if (names.empty()) fail("got no planes in 'members', expected at least one");
}

// From stores of version 2 on: {plane: {tensor: {"format", "group" or "rank", "error"}}}.
void parse_planes(const Json& document, Manifest* manifest) {
  std::map<std::string, const TensorSpec*> specs;
  for (const TensorSpec& spec : manifest->tensors) specs[spec.name] = &spec;
  const Json& experts = object_at(document, "planes");
  for (const auto& [expert, planes] : experts.items()) {
    if (manifest->experts.count(expert) == 0) {
      fail("got planes for " + shown(expert) + ", expected only experts");
    }
    for (const auto& [name, plane] : object_at(experts, expert).items()) {
      const auto found = specs.find(name);
      if (found == specs.end() || found->second->role == Role::constant) {
        fail("got a plane of tensor " + shown(name) + ", which has none");
      }
      if (!plane.is_object()) fail("got " + shown(plane) + " for a plane, expected an object");
      PlaneSpec spec{plane_format(text_at(plane, "format")), 0, -1.0};
      const char* size = spec.format == Format::LowRank ? "rank" : "group";
      if (!as_size(member(plane, size), &spec.size)) {
        fail("the plane of tensor " + shown(name) + " has no " + size);
      }
      const Json& error = member(plane, "error");
      if (error.is_number()) spec.error = error.get<double>();
      plane_parts(name, found->second->shape, spec);  // throws where it does not fit
      manifest->planes[expert][name] = spec;
    }
  }
}

void parse_model(const Json& model, Manifest* manifest) {
  const Json& model_class = member(model, "class");
  if (!model_class.is_null() && !model_class.is_string()) {
    fail("got model class " + shown(model_class) + ", expected a name or null");
  }
  if (model_class.is_string()) manifest->model_class = model_class.get<std::string>();
  const std::map<std::string, std::string> stems = file_stems(manifest->objectives);
  for (const std::string& name : texts_at(model, "files")) manifest->model_files[name] = "model/" + name;
  const Json& heads = object_at(model, "heads");
  for (const auto& [objective, names] : heads.items()) {
    const auto stem = stems.find(objective);
    if (stem == stems.end()) fail("got heads for " + shown(objective) + ", expected only objectives");
    for (const std::string& name : texts_at(heads, objective)) {
      manifest->head_files[objective][name] = "heads/" + stem->second + "/" + name;
    }
  }
}

// Every path that the manifest names stays in the store and has a record.
void check_paths(const Manifest& manifest) {
  std::vector<std::string> named = {manifest.base, manifest.routers};
  for (const auto& [plane, path] : manifest.experts) named.push_back(path);
  for (const auto& [objective, path] : manifest.heads) named.push_back(path);
  std::vector<std::map<std::string, std::string>> models = {manifest.model_files};
  for (const auto& [objective, files] : manifest.head_files) models.push_back(files);
  for (const auto& files : models) {
    for (const auto& [name, path] : files) {
      if (!is_model_file(name))
        fail("model file " + shown(name) + " would escape the store or pass for weights");
      named.push_back(path);
    }
  }
  for (const auto& [path, record] : manifest.files) named.push_back(path);
  for (const std::string& path : named) {
    if (!is_safe_path(path)) fail("file name " + shown(path) + " would escape the store");
    if (manifest.files.count(path) == 0) fail("no size and checksum for file " + shown(path));
  }
}

Manifest parse(const Json& document, std::int64_t version) {
  Manifest manifest;
  manifest.objectives = texts_at(document, "objectives");
  const std::set<std::string> objectives(manifest.objectives.begin(), manifest.objectives.end());
  if (objectives.empty() || objectives.size() != manifest.objectives.size()) {
    fail("got " + std::to_string(manifest.objectives.size()) +
         " objectives, expected at least one, each once");
  }
  const Json& static_weight = member(document, "static_weight");
  if (!static_weight.is_number() || !std::isfinite(static_weight.get<double>())) {
    fail("got static_weight " + shown(static_weight) + ", expected a finite number");
  }
  manifest.static_weight = static_weight.get<double>();
  parse_members(document, version, &manifest);
  parse_tensors(document, &manifest);
  const Json& routers = object_at(document, "routers");
  manifest.init = text_at(routers, "init");
  if (routers.contains("family")) manifest.family = text_at(routers, "family");
  if (manifest.family != "" &&
      std::find(std::begin(kFamilies), std::end(kFamilies), manifest.family) == std::end(kFamilies)) {
    fail("got routers of family " + shown(manifest.family) + ", expected scalar, rows or rows+columns");
  }
  manifest.routers = text_at(routers, "file");
  manifest.base = text_at(document, "base");
  manifest.experts = text_map_at(document, "experts");
  manifest.heads = text_map_at(document, "heads");
  const auto known = [&](const auto& entry) { return objectives.count(entry.first) != 0; };
  const auto stored = [&](const Member& own) { return manifest.experts.count(own.plane) != 0; };
  if (manifest.experts.size() != manifest.members.size() ||
      !std::all_of(manifest.members.begin(), manifest.members.end(), stored)) {
    fail(version < 3 ? "got experts of others than the objectives, expected one for each"
                     : "got experts of other names than the members', expected one for each");
  }
  if (!std::all_of(manifest.heads.begin(), manifest.heads.end(), known)) {
    fail("got heads of others than the objectives");
  }
  if (version > 1) parse_planes(document, &manifest);
  parse_model(object_at(document, "model"), &manifest);
  const Json& created_by = member(document, "created_by");
  if (created_by.is_string()) manifest.created_by = created_by.get<std::string>();
  if (!member(document, "training").is_null()) manifest.training = object_at(document, "training").dump();
  for (const auto& [path, record] : object_at(document, "files").items()) {
    manifest.files[path] = parse_record(path, record);
  }
  check_paths(manifest);
  return manifest;
}

}  // namespace

std::map<std::string, std::string> file_stems(const std::vector<std::string>& names) {
  std::set<std::string> folded;
  bool safe = true;
  for (const std::string& name : names) {
    safe = safe && is_safe_stem(name);
    std::string lower = name;
    for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    folded.insert(lower);
  }
  std::map<std::string, std::string> stems;
  for (std::size_t e = 0; e < names.size(); ++e) {
    char number[24];
    std::snprintf(number, sizeof number, "%03zu", e);
    stems[names[e]] = safe && folded.size() == names.size() ? names[e] : number;
  }
  return stems;
}

bool is_model_file(const std::string& name) {
  for (const char* end : {".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth",
                          ".ckpt", ".pkl"}) {
    if (ends_with(name, end)) return false;
  }
  return is_safe_path(name);
}

bool is_safe_path(std::string_view path) {
  if (path.empty() || path.find_first_of(std::string_view("\\:\0", 3)) != std::string_view::npos)
    return false;
  for (std::size_t begin = 0; begin <= path.size();) {
    const std::size_t end = std::min(path.find('/', begin), path.size());
    const std::string_view part = path.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") return false;
    begin = end + 1;
  }
  return true;
}

Manifest parse_manifest(const std::string& path, std::string_view text) {
  try {
    const Json document = parse_json(text);
    if (!document.is_object() || member(document, "format") != "paretofuse") {
      fail("its format is not 'paretofuse', so this is not a store");
    }
    std::int64_t version = 0;
    if (!as_size(member(document, "version"), &version) || version < 1) {
      fail("got version " + shown(member(document, "version")) + ", expected an integer from 1 to " +
           std::to_string(kVersion));
    }
    if (version > kVersion) {
      throw StoreError(path + ": made by a newer paretofuse (" + shown(member(document, "created_by")) +
                       ", store version " + std::to_string(version) + ", this one reads up to " +
                       std::to_string(kVersion) + "); upgrade with `pip install -U paretofuse`");
    }
    return parse(document, version);
  } catch (const std::invalid_argument& error) {
    throw StoreError(path + ": " + error.what() + "; create the store again");
  }
}

DType merged_dtype(const std::string& dtype) {
  return dtype == "F32" ? DType::F32 : dtype == "BF16" ? DType::BF16 : DType::F16;
}

}  // namespace paretofuse

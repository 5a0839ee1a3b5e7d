#include "store/routing.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <utility>

namespace paretofuse {
namespace {

constexpr double kSumTolerance = 1e-5;  // as in engine/routing/preference.py

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

std::string shown(const Preference& preference) {
  std::string text = "[";
  for (std::size_t e = 0; e < preference.size(); ++e) text += (e ? ", " : "") + number(preference[e]);
  return text + "]";
}

// Of matrices [G, rows, columns], their transposes.
std::vector<float> transposed(const std::vector<float>& matrices, std::size_t rows, std::size_t columns) {
  std::vector<float> out(matrices.size());
  const std::size_t size = rows * columns;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const std::size_t at = i % size;
    out[i - at + at % columns * rows + at / columns] = matrices[i];
  }
  return out;
}

// Of out = bias + matrix x, from the matrix's columns, `kOutputs` numbers from the first one on; each sum in
// the order of x. So many sums stay in registers, which is what a switch's microseconds are spent on.
template <std::size_t kOutputs>
std::size_t affine(std::size_t first, std::size_t count, const float* columns, const double* x,
                   std::size_t inputs, const float* bias, double* out) {
  for (; first + kOutputs <= count; first += kOutputs) {
    double sums[kOutputs] = {};
    for (std::size_t i = 0; i < inputs; ++i) {
      for (std::size_t o = 0; o < kOutputs; ++o)
        sums[o] += static_cast<double>(columns[i * count + first + o]) * x[i];
    }
    for (std::size_t o = 0; o < kOutputs; ++o)
      out[first + o] = sums[o] + static_cast<double>(bias[first + o]);
  }
  return first;
}

void affine(const float* columns, const double* x, std::size_t inputs, const float* bias,
            std::vector<double>* out) {
  const std::size_t count = out->size();
  std::size_t first = affine<8>(0, count, columns, x, inputs, bias, out->data());
  first = affine<2>(first, count, columns, x, inputs, bias, out->data());
  affine<1>(first, count, columns, x, inputs, bias, out->data());
}

}  // namespace

Routers::Routers(const std::string& init, std::size_t groups, std::size_t objectives,
                 std::vector<Member> members, std::int64_t rows, std::int64_t columns,
                 std::map<std::string, RouterParameter> parameters)
    : groups_(groups),
      objectives_(objectives),
      members_(std::move(members)),
      parameters_(std::move(parameters)) {
  if (init != "identity" && init != "sqrt" && init != "constant") {
    throw std::invalid_argument("got routers with init '" + init + "', expected identity, sqrt or constant");
  }
  init_ = init == "identity" ? Init::identity : init == "sqrt" ? Init::sqrt : Init::constant;
  const auto g = static_cast<std::int64_t>(groups), m = static_cast<std::int64_t>(objectives);
  const auto p = static_cast<std::int64_t>(members_.size());
  const auto bias = parameters_.find("hidden.bias");
  const std::int64_t h =
      bias != parameters_.end() && bias->second.shape.size() == 2 ? bias->second.shape[1] : 0;
  hidden_ = static_cast<std::size_t>(h);
  std::map<std::string, std::vector<std::int64_t>> expected = {{"hidden.weight", {g, h, m}},
                                                               {"hidden.bias", {g, h}},
                                                               {"output.weight", {g, p, h}},
                                                               {"output.bias", {g, p}}};
  if (by_row() || by_column()) expected["rows.weight"] = {m, p, rows};
  if (by_column()) expected["columns.weight"] = {m, p, columns};
  for (const auto& [name, shape] : expected) {
    const auto found = parameters_.find(name);
    if (found == parameters_.end() || found->second.shape != shape) {
      throw std::invalid_argument("the router parameters lack '" + name + "' of a shape that fits " +
                                  std::to_string(groups) + " groups, " + std::to_string(objectives) +
                                  " objectives, " + std::to_string(members_.size()) + " experts, " +
                                  std::to_string(rows) + " rows and " + std::to_string(columns) + " columns");
    }
    const std::vector<float>& values = found->second.values;
    if (!std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
      throw std::invalid_argument("the router parameter '" + name +
                                  "' holds NaN or infinity, as after a training that diverged");
    }
  }
  if (parameters_.size() != expected.size()) throw std::invalid_argument("unknown router parameters");
  columns1_ = transposed(parameters_.at("hidden.weight").values, hidden_, objectives_);
  columns2_ = transposed(parameters_.at("output.weight").values, members_.size(), hidden_);
}

Weights Routers::evaluate(const Preference& preference) const {
  const float* b1 = parameters_.at("hidden.bias").values.data();
  const float* b2 = parameters_.at("output.bias").values.data();
  Weights weights;
  if (groups_ == 0) return weights;
  const std::size_t planes = members_.size();
  weights.values.resize(groups_ * planes);
  float* next = weights.values.data();
  std::vector<double> start(planes, 0.0);
  for (std::size_t j = 0; j < planes; ++j) {
    const Member& member = members_[j];
    const double own = member.objective < 0 ? 0.0 : preference[static_cast<std::size_t>(member.objective)];
    if (init_ == Init::identity) start[j] = own * member.share;
    if (init_ == Init::sqrt) start[j] = std::sqrt(own) * member.share;
  }
  std::vector<double> hidden(hidden_), mixed(planes);
  for (std::size_t g = 0; g < groups_; ++g) {
    affine(columns1_.data() + g * objectives_ * hidden_, preference.data(), objectives_, b1 + g * hidden_,
           &hidden);
    for (double& sum : hidden) sum = sum > 0.0 || std::isnan(sum) ? sum : 0.0;
    affine(columns2_.data() + g * hidden_ * planes, hidden.data(), hidden_, b2 + g * planes, &mixed);
    for (std::size_t j = 0; j < planes; ++j) {
      const double sum = init_ == Init::constant ? mixed[j] : mixed[j] + start[j];
      *next++ = static_cast<float>(sum);
    }
  }
  add_own(preference, "rows.weight", &weights.values);
  add_own(preference, "columns.weight", &weights.values);
  return weights;
}

void Routers::add_own(const Preference& preference, const char* name, std::vector<float>* weights) const {
  const auto found = parameters_.find(name);
  if (found == parameters_.end()) return;
  const auto rows = static_cast<std::size_t>(found->second.shape[2]);  // or columns
  const float* s = found->second.values.data();                        // [M, P, R]
  const std::size_t planes = members_.size();
  const std::size_t first = weights->size();
  weights->resize(first + rows * planes);
  float* next = weights->data() + first;
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t j = 0; j < planes; ++j) {
      double sum = preference[0] * static_cast<double>(s[j * rows + row]);
      for (std::size_t m = 1; m < objectives_; ++m) {
        sum += preference[m] * static_cast<double>(s[(m * planes + j) * rows + row]);
      }
      *next++ = static_cast<float>(sum);
    }
  }
}

void check_preference(const Preference& preference, const std::vector<std::string>& objectives) {
  if (preference.size() != objectives.size()) {
    throw std::invalid_argument("got a preference of " + std::to_string(preference.size()) +
                                " numbers, expected " + std::to_string(objectives.size()) +
                                ": one for each objective");
  }
  double total = 0.0;
  for (std::size_t e = 0; e < preference.size(); ++e) {
    if (!(preference[e] >= 0.0) || !std::isfinite(preference[e])) {
      throw std::invalid_argument("got " + number(preference[e]) + " for objective \"" + objectives[e] +
                                  "\" in preference " + shown(preference) +
                                  ", expected finite numbers >= 0 that sum to 1");
    }
    total += preference[e];
  }
  if (std::abs(total - 1.0) > kSumTolerance) {
    throw std::invalid_argument("got preference " + shown(preference) + " with sum " + number(total) +
                                ", expected a sum of 1" + (total > 0.0 ? "; divide by the sum" : ""));
  }
}

}  // namespace paretofuse

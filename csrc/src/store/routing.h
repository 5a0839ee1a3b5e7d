// The routers: from a preference to routing weights, in the precision of engine/routing/routers.py, which
// trains them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "paretofuse/engine.h"

namespace paretofuse {

struct RouterParameter {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// One tiny MLP for each of G groups: L = init(r) + W2 relu(W1 r + b1) + b2. Where rows have coefficients,
// those of all R rows follow: C[row, e] = sum over m of r_m S[m, e, row].
class Routers {
 public:
  // parameters: hidden.weight [G, H, E], hidden.bias [G, H], output.weight [G, E, H], output.bias [G, E]; and
  // rows.weight [E, E, R], which scalar routers do not have. Throws std::invalid_argument for anything else.
  Routers(const std::string& init, std::size_t groups, std::size_t experts, std::int64_t rows,
          std::map<std::string, RouterParameter> parameters);

  // Whether rows have coefficients of their own.
  bool by_row() const { return parameters_.count("rows.weight") != 0; }

  // The routing weights [G, E] or [G + R, E] of a valid preference [E].
  Weights evaluate(const Preference& preference) const;

  const std::map<std::string, RouterParameter>& parameters() const { return parameters_; }

 private:
  enum class Init { identity, sqrt, constant };

  void add_rows(const Preference& preference, Weights* weights) const;

  Init init_;
  std::size_t groups_;
  std::size_t experts_;
  std::size_t hidden_ = 0;
  std::map<std::string, RouterParameter> parameters_;
};

// Throws std::invalid_argument unless the preference has a finite number >= 0 for each objective and sums
// to 1.
void check_preference(const Preference& preference, const std::vector<std::string>& objectives);

}  // namespace paretofuse

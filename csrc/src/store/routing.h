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

// A plane's place in the mixture.
struct Member {
  std::string plane;       // its name: the expert's
  std::int64_t objective;  // that it belongs to, by position; -1: none
  double
      share;  // of its objective's preference at the start, and of the static weight; 0 without an objective
};

struct RouterParameter {
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// One tiny MLP for each of G groups: L = init(r) + W2 relu(W1 r + b1) + b2, from M objectives to P planes;
// init(r)[j] is what the plane's objective has, times its share. Where rows have coefficients, those of all R
// rows follow: sum over m of r_m S[m, j, row]; and where columns have some too, those of all C columns
// likewise.
class Routers {
 public:
  // parameters: hidden.weight [G, H, M], hidden.bias [G, H], output.weight [G, P, H], output.bias [G, P];
  // rows.weight [M, P, R], which scalar routers do not have; and beside it columns.weight [M, P, C], which
  // only those of the family "rows+columns" have. Throws std::invalid_argument for anything else.
  Routers(const std::string& init, std::size_t groups, std::size_t objectives, std::vector<Member> members,
          std::int64_t rows, std::int64_t columns, std::map<std::string, RouterParameter> parameters);

  // Whether rows, and columns, have coefficients of their own.
  bool by_row() const { return parameters_.count("rows.weight") != 0; }
  bool by_column() const { return parameters_.count("columns.weight") != 0; }

  // The routing weights [G, P], [G + R, P] or [G + R + C, P] of a valid preference [M].
  Weights evaluate(const Preference& preference) const;

  const std::map<std::string, RouterParameter>& parameters() const { return parameters_; }

 private:
  enum class Init { identity, sqrt, constant };

  // Adds the weights of rows or columns by their parameter, if there is one.
  void add_own(const Preference& preference, const char* name, std::vector<float>* weights) const;

  Init init_;
  std::size_t groups_;
  std::size_t objectives_;
  std::vector<Member> members_;
  std::size_t hidden_ = 0;
  std::map<std::string, RouterParameter> parameters_;
  // W1 and W2 of each group, transposed, so that all sums of a layer grow side by side: [G, M, H] and [G, H,
  // P].
  std::vector<float> columns1_;
  std::vector<float> columns2_;
};

// Throws std::invalid_argument unless the preference has a finite number >= 0 for each objective and sums
// to 1.
void check_preference(const Preference& preference, const std::vector<std::string>& objectives);

}  // namespace paretofuse

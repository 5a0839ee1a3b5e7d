"""Multi-objective solvers on the small Jacobian of losses with respect to routing weights, a file each."""

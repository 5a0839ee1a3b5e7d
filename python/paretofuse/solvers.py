"""Multi-objective solvers, and what one of your own derives from: see docs/solvers.md."""

from paretofuse.engine.solvers import (
    COSMOS,
    EPO,
    MGDA,
    SOLVERS,
    HypervolumeMaximization,
    JointSolver,
    LinearScalarization,
    SmoothTchebycheff,
    Solver,
    Tchebycheff,
    TorchJD,
    WeightedSolver,
    get_solver,
)

__all__ = [
    "COSMOS",
    "EPO",
    "MGDA",
    "SOLVERS",
    "HypervolumeMaximization",
    "JointSolver",
    "LinearScalarization",
    "SmoothTchebycheff",
    "Solver",
    "Tchebycheff",
    "TorchJD",
    "WeightedSolver",
    "get_solver",
]

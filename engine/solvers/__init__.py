"""Multi-objective solvers on the small Jacobian of losses with respect to routing weights, a file each.

A solver is any callable

    solver(losses [M], jacobian [M, G, P], preference [M]) -> direction [G, P]

that an optimizer can take for the gradient of the routing weights. One that mixes the gradients is shorter to write
as a WeightedSolver, from the losses and the gradients' inner products alone:

    class Worst(WeightedSolver):
        def weights(self, losses, gram, preference):
            return (losses == losses.max()) / (losses == losses.max()).sum()

    pf.fit(engine, objectives, method=Worst())

One that needs several preferences at a time has a method `directions` as well (JointSolver).
"""

from paretofuse.engine.solvers.common import JointSolver, Solver, WeightedSolver, solve_each
from paretofuse.engine.solvers.cosmos import COSMOS
from paretofuse.engine.solvers.epo import EPO
from paretofuse.engine.solvers.hypervolume import HypervolumeMaximization
from paretofuse.engine.solvers.linear import LinearScalarization
from paretofuse.engine.solvers.mgda import MGDA
from paretofuse.engine.solvers.registry import SOLVERS, get_solver
from paretofuse.engine.solvers.tchebycheff import SmoothTchebycheff, Tchebycheff
from paretofuse.engine.solvers.torchjd import TorchJD

__all__ = [
    "COSMOS", "EPO", "MGDA", "SOLVERS", "HypervolumeMaximization", "JointSolver", "LinearScalarization",
    "SmoothTchebycheff", "Solver", "Tchebycheff", "TorchJD", "WeightedSolver", "get_solver", "solve_each",
]  # fmt: skip

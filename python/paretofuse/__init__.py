"""ParetoFuse: the whole Pareto set of a base model and its fine-tuned experts, as ready-to-run dense models.

Names load on first use, so that `import paretofuse` stays fast and the store works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretofuse.adapters.trainer import TrainerCallbacks
    from paretofuse.api import load, stack
    from paretofuse.engine.engine import Engine
    from paretofuse.engine.errors import CheckpointError, StoreError
    from paretofuse.engine.evaluation.evaluate import evaluate
    from paretofuse.engine.evaluation.objective import Objective
    from paretofuse.engine.routing.preference import simplex_grid
    from paretofuse.engine.routing.sampling import layered_grid, sample_preferences
    from paretofuse.engine.training.consensus import add_consensus
    from paretofuse.engine.training.fit import fit
    from paretofuse.engine.training.losses import entropy_loss
    from paretofuse.engine.training.planes import add_planes
    from paretofuse.engine.training.validation import Validation
    from paretofuse.exporting import export
    from paretofuse.fronts.coefficients import CoefficientFront
    from paretofuse.fronts.front import Front
    from paretofuse.fronts.harness import lm_eval_metrics
    from paretofuse.fronts.search import search, search_coefficients
    from paretofuse.fronts.sweep import sweep
    from paretofuse.recipes.run import run_recipe

__version__ = "0.1.0"

_HOMES = {
    "TrainerCallbacks": "paretofuse.adapters.trainer",
    "load": "paretofuse.api",
    "stack": "paretofuse.api",
    "Engine": "paretofuse.engine.engine",
    "CheckpointError": "paretofuse.engine.errors",
    "StoreError": "paretofuse.engine.errors",
    "Objective": "paretofuse.engine.evaluation.objective",
    "Validation": "paretofuse.engine.training.validation",
    "entropy_loss": "paretofuse.engine.training.losses",
    "evaluate": "paretofuse.engine.evaluation.evaluate",
    "with_head": "paretofuse.engine.modules.heads",
    "export": "paretofuse.exporting",
    "add_consensus": "paretofuse.engine.training.consensus",
    "add_planes": "paretofuse.engine.training.planes",
    "fit": "paretofuse.engine.training.fit",
    "simplex_grid": "paretofuse.engine.routing.preference",
    "layered_grid": "paretofuse.engine.routing.sampling",
    "sample_preferences": "paretofuse.engine.routing.sampling",
    "CoefficientFront": "paretofuse.fronts.coefficients",
    "Front": "paretofuse.fronts.front",
    "lm_eval_metrics": "paretofuse.fronts.harness",
    "search": "paretofuse.fronts.search",
    "search_coefficients": "paretofuse.fronts.search",
    "sweep": "paretofuse.fronts.sweep",
    "run_recipe": "paretofuse.recipes.run",
}

__all__ = [
    "CheckpointError", "CoefficientFront", "Engine", "Front", "Objective", "StoreError", "TrainerCallbacks",
    "Validation", "__version__", "add_consensus", "add_planes", "entropy_loss", "evaluate", "export", "fit",
    "layered_grid", "lm_eval_metrics", "load", "run_recipe", "sample_preferences", "search", "search_coefficients",
    "simplex_grid", "stack", "sweep", "with_head",
]  # fmt: skip


_MODULES = ("methods", "solvers")
"""Modules that `pf.solvers` and the like import when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"paretofuse.{name}")
    raise AttributeError(f"module 'paretofuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_MODULES))

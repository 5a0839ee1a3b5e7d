"""ParetoFuse: the whole Pareto set of a base model and its fine-tuned experts, as ready-to-run dense models.

Names load on first use, so that `import paretofuse` stays fast and the store works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretofuse.api import load, stack
    from paretofuse.engine.data import Objective
    from paretofuse.engine.engine import Engine
    from paretofuse.engine.errors import CheckpointError, StoreError
    from paretofuse.engine.evaluation import evaluate
    from paretofuse.engine.fit import fit
    from paretofuse.engine.preference import simplex_grid
    from paretofuse.engine.sampling import layered_grid, sample_preferences
    from paretofuse.engine.validation import Validation
    from paretofuse.exporting import export
    from paretofuse.front import Front, sweep

__version__ = "0.1.0"

_HOMES = {
    "load": "paretofuse.api",
    "stack": "paretofuse.api",
    "Engine": "paretofuse.engine.engine",
    "CheckpointError": "paretofuse.engine.errors",
    "StoreError": "paretofuse.engine.errors",
    "Objective": "paretofuse.engine.data",
    "Validation": "paretofuse.engine.validation",
    "evaluate": "paretofuse.engine.evaluation",
    "export": "paretofuse.exporting",
    "fit": "paretofuse.engine.fit",
    "simplex_grid": "paretofuse.engine.preference",
    "layered_grid": "paretofuse.engine.sampling",
    "sample_preferences": "paretofuse.engine.sampling",
    "Front": "paretofuse.front",
    "sweep": "paretofuse.front",
}

__all__ = [
    "CheckpointError", "Engine", "Front", "Objective", "StoreError", "Validation", "__version__", "evaluate", "export",
    "fit", "layered_grid", "load", "sample_preferences", "simplex_grid", "stack", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'paretofuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

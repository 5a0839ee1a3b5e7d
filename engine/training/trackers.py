"""Experiment trackers by name, each imported when it is asked for: a scalar for each column and step of a record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

_PROJECT = "paretofuse"


class Tracker:
    """Writes records to a tracker's run; where the caller has begun one, to that, which then stays open."""

    def __init__(
        self, log: Callable[[dict[str, float], int], object], end: Callable[[], object] | None
    ) -> None:
        self._log = log
        self._end = end

    def write(self, record: Mapping[str, float]) -> None:
        """Write one step's record."""
        self._log({name: value for name, value in record.items() if name != "step"}, int(record["step"]))

    def close(self) -> None:
        """End the run, if it is not the caller's."""
        if self._end is not None:
            with redirect_stdout(sys.stderr):
                self._end()


def _wandb(wandb: Any) -> Tracker:
    begun = wandb.run
    run = begun or wandb.init(project=_PROJECT)
    return Tracker(lambda values, step: run.log(values, step=step), None if begun else run.finish)


def _mlflow(mlflow: Any) -> Tracker:
    own = mlflow.active_run() is None and bool(mlflow.start_run())
    return Tracker(
        lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run if own else None
    )


def _aim(aim: Any) -> Tracker:
    run = aim.Run(experiment=_PROJECT)
    return Tracker(lambda values, step: run.track(values, step=step), run.close)


def _trackio(trackio: Any) -> Tracker:
    begun = trackio.context_vars.current_run.get()
    run = begun or trackio.init(project=_PROJECT)
    return Tracker(lambda values, step: run.log(values, step=step), None if begun else trackio.finish)


TRACKERS = {"wandb": _wandb, "mlflow": _mlflow, "aim": _aim, "trackio": _trackio}


def open_tracker(name: str) -> Tracker:
    """A run of one of TRACKERS.

    Raises:
        ImportError: it is not installed.
    """
    try:
        module = import_module(name)
    except ImportError as error:
        raise ImportError(
            f"log={name!r} needs {name}, which is not installed: `pip install {name}`; or give a .csv file or a "
            f"TensorBoard directory ({f'./{name}'!r} if that is its name)"
        ) from error
    with redirect_stdout(sys.stderr):  # where some tell of themselves; stdout is the program's
        return TRACKERS[name](module)

"""transformers' TrainerCallbacks on a router training: trackers, stoppers and your own, as Trainer has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretofuse.engine.engine import Engine


class TrainerCallbacks:
    """Tells TrainerCallbacks of a `pf.fit(engine, ..., log=this)`: its beginning, each step with its record, its end.

    They get the live module as `model`, a TrainingArguments, and a TrainerState with the step and the log history. A
    callback that sets `control.should_training_stop` ends the training. There are no epochs, evaluations or saves.

    Args:
        engine: the engine that is trained.
        callbacks: of transformers, or classes of them.
        args: a TrainingArguments, such as one with a run_name; one that reports to nobody unless told.

    Raises:
        ImportError: transformers is missing, or accelerate, which TrainingArguments needs.
        TypeError: a callback is none.
    """

    def __init__(self, engine: Engine, callbacks: Sequence[Any], args: Any = None) -> None:
        from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

        self._engine = engine
        self._callbacks = [own() if isinstance(own, type) else own for own in callbacks]
        for own in self._callbacks:
            if not isinstance(own, TrainerCallback):
                raise TypeError(f"got a callback of type {type(own).__name__}, expected a TrainerCallback")
        self._args = TrainingArguments(report_to=[], use_cpu=True) if args is None else args
        self._state, self._control = TrainerState(), TrainerControl()
        self._begun = False

    def write(self, record: Mapping[str, float]) -> bool:
        """A step; returns whether a callback wants the training to end."""
        if not self._begun:
            self._call("on_train_begin")
            self._begun = True
        self._call("on_step_begin")
        logs = {name: value for name, value in record.items() if name != "step"}
        self._state.global_step = int(record["step"])
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._call("on_step_end")
        self._call("on_log", logs=logs)
        return bool(self._control.should_training_stop)

    def close(self) -> None:
        """The end, if there was a beginning."""
        if self._begun:
            self._call("on_train_end")

    def _call(self, event: str, **more: Any) -> None:
        for own in self._callbacks:
            done = getattr(own, event)(
                self._args, self._state, self._control, model=self._engine.module, **more
            )
            self._control = self._control if done is None else done

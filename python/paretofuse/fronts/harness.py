"""lm-evaluation-harness on a live module: no directory is written in between."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn


class LMEvalMetrics:
    """An evaluation for `pf.sweep` and `pf.search` that runs tasks of lm-evaluation-harness (extra `lm-eval`).

    Called with a module of transformers', it returns each metric of each task: by the task's name where the task has
    one, else as "task/metric". The tasks and their data are read once in each process, when they are first needed.

    Args:
        tasks: names of tasks or groups.
        tokenizer: a tokenizer, or the directory or Hub id of one.
        include_path: a directory with task files of your own; the harness's own tasks are known too.
        num_fewshot: examples before each question; as the task says if None.
        limit: documents of each task, all if None.
        batch_size: requests at a time.
        results: a directory for the harness's own results of each evaluation, as 1.json, 2.json, ... in the order in
            which they are finished; numbers that are there are not used again.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no tasks, or a limit or batch size below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        tokenizer: Any,
        include_path: str | os.PathLike[str] | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        results: str | os.PathLike[str] | None = None,
    ) -> None:
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise ImportError("lm-eval is not installed; pip install 'paretofuse[lm-eval]'") from error
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"got tasks={tasks!r}, expected a list of task names such as ['lambada_openai']")
        for name, number in (("limit", limit), ("batch_size", batch_size)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"got {name}={number!r}, expected a whole number of at least 1")
        self.tasks = tuple(tasks)
        self.tokenizer = tokenizer
        self._include = None if include_path is None else os.fspath(include_path)
        self._fewshot = num_fewshot
        self._limit = limit
        self._batch = batch_size
        self._results = None if results is None else Path(results)
        self._loaded: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which read the tasks themselves."""
        return {**self.__dict__, "_loaded": None}

    @property
    def maximize(self) -> dict[str, bool]:
        """For each metric whether larger is better, as the tasks say: for `maximize=` of sweeps and searches.

        Raises:
            ValueError: a task is not known.
        """
        found = {}
        for name, task in self._tasks().items():
            ways = task.higher_is_better()
            found.update({_metric(name, metric, len(ways)): bool(way) for metric, way in ways.items()})
        return found

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """Run all tasks.

        Raises:
            ValueError: a task is not known.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        if isinstance(self.tokenizer, str | os.PathLike):
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        model = HFLM(pretrained=module, tokenizer=self.tokenizer, batch_size=self._batch)
        tasks = self._tasks()
        found = evaluate(model, tasks, limit=self._limit, bootstrap_iters=0, log_samples=False)
        if self._results is not None:
            _write_next(self._results, found)
        numbers: dict[str, float] = {}
        for name, task in tasks.items():
            ways = task.higher_is_better()
            for key, value in found["results"][name].items():
                metric = key.split(",")[0]  # "acc,none" is accuracy without a filter
                if metric in ways and isinstance(value, int | float):
                    numbers.setdefault(_metric(name, metric, len(ways)), float(value))
        return numbers

    def _tasks(self) -> dict[str, Any]:
        """The tasks by name, with groups taken apart."""
        if self._loaded is None:
            from lm_eval.tasks import TaskManager

            # Its own tasks are thousands of files to look through: only where they are wanted.
            manager = TaskManager(include_path=self._include, include_defaults=self._include is None)
            if not set(self.tasks) <= set(manager.all_tasks):
                manager = TaskManager(include_path=self._include)
            unknown = [name for name in self.tasks if name not in manager.all_tasks]
            if unknown:
                raise ValueError(
                    f"got tasks {unknown}, which the harness does not know; `lm-eval ls tasks` lists its own, and "
                    "include_path= names a directory with yours"
                )
            self._loaded = dict(manager.load(list(self.tasks))["tasks"])
            if self._fewshot is not None:
                for task in self._loaded.values():
                    task.set_config(key="num_fewshot", value=self._fewshot)
        return self._loaded


lm_eval_metrics = LMEvalMetrics
"""The name that it is made by, as `pf.lm_eval_metrics(["lambada_openai"], tokenizer="gpt2")`."""


def _metric(task: str, metric: str, count: int) -> str:
    return task if count == 1 else f"{task}/{metric}"


def _write_next(folder: Path, found: Any) -> None:
    """Write the harness's results as JSON under the next free number, whole or not at all."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(found, indent=1, default=handle_non_serializable)
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"{number}.json"
        try:
            with path.open("x", encoding="utf-8") as file:  # taken by nobody else
                file.write(text)
            return
        except FileExistsError:
            number += 1

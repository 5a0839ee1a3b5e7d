"""A search as an Optuna study: in memory, or in a storage that several processes share."""

from __future__ import annotations

import hashlib
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError

from paretofuse.engine.engine import Engine
from paretofuse.engine.evaluation.arguments import (
    Maximize,
    Point,
    directions,
    finite_bounds,
    reference_point,
)
from paretofuse.engine.evaluation.kept_rows import KeptRows, model_digest
from paretofuse.engine.evaluation.progress import progress_bar
from paretofuse.engine.evaluation.sweep import Evaluate, evaluate_at, metric_names, shown
from paretofuse.fronts import samplers
from paretofuse.fronts.spaces import Space

_HEARTBEAT = 60
"""Seconds between signs of life; a trial without one for twice as long is another process's to do again."""

_ATTEMPTS = 5
"""To open a database: processes that make its tables at the same time get in each other's way."""

_LOCKED = 60
"""Seconds that a process waits for another's transaction on an SQLite file, or for what another begins a study with."""

_IN_MEMORY = ("sqlite://", "sqlite:///:memory:")
"""URLs of databases that no process shares, nor a thread of heartbeats."""


class SearchedStudy:
    """The study of a search, made or found.

    What metrics there are is known only once something was evaluated: a new study begins with the first of its starts.

    Args: as `pf.search`'s; `space`: where the points lie; `kept`: where rows are kept; `opened`: the storage.

    Attributes:
        metrics: the M metrics' names.

    Raises:
        ValueError: an argument does not fit the metrics, or the study is another's.
    """

    def __init__(
        self,
        engine: Engine,
        evaluate: Evaluate,
        space: Space,
        kept: KeptRows | None,
        maximize: Maximize,
        at_most: Mapping[str, float],
        at_least: Mapping[str, float],
        ref: Point | None,
        sampler: str | optuna.samplers.BaseSampler,
        seed: int,
        opened: optuna.storages.RDBStorage | None,
        name: str,
    ) -> None:
        self._engine = engine
        self._evaluate = evaluate
        self._kept = kept
        self._space = space
        self._measured: dict[tuple[float, ...], dict[str, float]] = {}
        samplers.check_choice(sampler)
        identity = self._identity()
        found = opened is not None and name in optuna.get_all_study_names(opened)
        if found:
            self._study = _begun_study(name, opened)
            self.metrics: tuple[str, ...] = tuple(self._study.user_attrs["metrics"])
        else:
            self.metrics = metric_names(self._measure(space.starts[0]), engine.objectives)
        larger = directions(maximize, self.metrics)
        self._bounds = bounds_of(at_most, at_least, self.metrics, larger)  # [M]
        self._signs = np.where(larger, 1.0, -1.0)
        point = None if ref is None else reference_point(ref, self.metrics)
        ways: list[Literal["maximize", "minimize"]] = ["maximize" if up else "minimize" for up in larger]
        if not found:
            try:
                self._study = optuna.create_study(study_name=name, storage=opened, directions=ways)
                self._study.set_user_attr("engine", identity)
                for start in space.starts:
                    self._study.enqueue_trial(samplers.parameters(start, space))
                self._study.set_user_attr("metrics", list(self.metrics))  # tells the others that all is there
            except optuna.exceptions.DuplicatedStudyError:  # another process was faster
                self._study = _begun_study(name, opened)
        theirs = [way.name.lower() for way in self._study.directions]
        if self._study.user_attrs.get("engine", identity) != identity or theirs != ways:
            raise ValueError(
                f"got storage={getattr(opened, 'url', None)!r}, whose study {name!r} is of another engine, another "
                f"evaluation or other directions ({theirs}), or of other coefficients; give another name=, or another "
                "storage"
            )
        self._study.sampler = samplers.make_sampler(sampler, space, larger, self._bounds, point, seed)

    def run(self, budget: int, progress: bool) -> None:
        """Evaluate until the study has so many trials, those that other processes are at included."""
        with progress_bar(progress, total=budget, initial=self._count(), desc="search", unit="model") as bar:
            while self._count() < budget:
                self._study.optimize(self._trial, n_trials=1)
                bar.update()

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Points [P, D] and values [P, M] of all that was evaluated, in the order of trials."""
        done = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        points = [samplers.point_of(trial.params, self._space) for trial in done]
        return np.array(points), np.array([trial.values for trial in done], dtype=np.float64)

    def _count(self) -> int:
        counted = (TrialState.COMPLETE, TrialState.RUNNING)
        return len(self._study.get_trials(deepcopy=False, states=counted))

    def _trial(self, trial: optuna.Trial) -> tuple[float, ...]:
        for name, distribution in samplers.distributions(self._space).items():
            trial.suggest_float(name, distribution.low, distribution.high)
        numbers = self._measure(samplers.point_of(trial.params, self._space))
        if set(numbers) != set(self.metrics):
            raise ValueError(
                f"got metrics {sorted(numbers)} from evaluate, expected {sorted(self.metrics)} as before"
            )
        values = np.array([numbers[name] for name in self.metrics])
        missed = (self._bounds - values) * self._signs
        for name, miss in zip(self.metrics, missed.tolist(), strict=True):
            if np.isfinite(miss):
                trial.set_constraint(name, miss)  # kept to where it is at most 0
        return tuple(values.tolist())

    def _measure(self, point: np.ndarray) -> dict[str, float]:
        """The metrics at a point, evaluated only if they were not before."""
        chosen = tuple(float(number) for number in point)
        if chosen in self._measured:
            return self._measured[chosen]
        self._space.switch(self._engine, chosen)
        known = None if self._kept is None else self._kept.at(chosen)
        at = f"{self._space.kind} {shown(self._space.names, chosen)}"
        numbers, digest = evaluate_at(self._engine.module, self._evaluate, self._engine.objectives, at, known)
        if self._kept is not None and known is not None and digest not in known:
            self._kept.add(chosen, list(numbers.values()), digest, tuple(numbers))
        self._measured[chosen] = numbers
        return numbers

    def _identity(self) -> str:
        """Tells this engine, evaluation and space from others in a storage."""
        self._space.switch(self._engine, self._space.starts[-1].tolist())
        digest = hashlib.sha256(model_digest(self._engine.module, self._evaluate).encode())
        digest.update("\n".join(self._engine.objectives).encode())
        digest.update(self._space.identity.encode())
        return digest.hexdigest()[:16]


def bounds_of(
    at_most: Mapping[str, float],
    at_least: Mapping[str, float],
    metrics: Sequence[str],
    larger: Sequence[bool],
) -> np.ndarray:
    """[M]: what each metric must reach, infinitely bad where it need not.

    Raises:
        ValueError: a name is no metric, a bound is not finite, or it bounds a metric from its good side.
    """
    bounds = np.where(larger, -np.inf, np.inf)
    for option, wanted, given in (("at_most", False, at_most), ("at_least", True, at_least)):
        for name, bound in finite_bounds(option, given).items():
            if name not in metrics:
                raise ValueError(f"got {option} for {name!r}, expected some of the metrics {list(metrics)}")
            index = metrics.index(name)
            if larger[index] != wanted:
                way, other = ("larger", "at_least") if larger[index] else ("smaller", "at_most")
                raise ValueError(
                    f"got {option} for {name!r}, of which {way} numbers are better; expected {other}, or the other way "
                    "in maximize="
                )
            bounds[index] = bound
    return bounds


def _begun_study(name: str, storage: Any) -> optuna.Study:
    """A study of another call's, once its first trials are there.

    Raises:
        ValueError: it is no search's, or the process that began it died while it did.
    """
    study = optuna.load_study(study_name=name, storage=storage)
    end = time.monotonic() + _LOCKED
    while "metrics" not in study.user_attrs:
        if time.monotonic() > end or ("engine" not in study.user_attrs and study.get_trials(deepcopy=False)):
            raise ValueError(
                f"got name={name!r}, a study in this storage that no search began, or whose first process died before "
                "its first trial; give another name=, or remove it with Optuna (`optuna.delete_study`)"
            )
        time.sleep(0.1)
    return study


@contextmanager
def storage_at(url: str | None) -> Iterator[optuna.storages.RDBStorage | None]:
    """A storage by URL while it lasts, its connections closed then; None for none.

    Raises:
        ValueError: that is no URL of a database that SQLAlchemy can open here.
    """
    opened = None if url is None else _storage(url)
    try:
        yield opened
    finally:
        if opened is not None:
            opened.remove_session()
            opened.engine.dispose()


def _storage(url: str) -> optuna.storages.RDBStorage:
    """A storage by URL, in which trials of processes that died are found out.

    Raises:
        ValueError: that is no URL of a database that SQLAlchemy can open here.
    """
    if not isinstance(url, str):
        raise TypeError(f"got storage={url!r}, expected a URL such as sqlite:///search.db")
    alone = url in _IN_MEMORY
    file = url.startswith("sqlite") and not alone
    attempt = 1
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of heartbeats
                storage = optuna.storages.RDBStorage(
                    url,
                    heartbeat_interval=None if alone else _HEARTBEAT,
                    heartbeat_stale_trial_callback=lambda study, trial: study.enqueue_trial(trial.params),
                    engine_kwargs={"connect_args": {"timeout": _LOCKED}} if file else None,
                )
            if file:
                _take_turns(storage.engine)
            return storage
        except Exception as error:  # of SQLAlchemy and of each database's driver, as many kinds as there are
            if not isinstance(error, DBAPIError) or attempt == _ATTEMPTS:
                raise ValueError(
                    f"got storage={url!r}, which cannot be opened ({error}); expected a URL such as "
                    "sqlite:///search.db or postgresql://user@host/database"
                ) from error
            attempt += 1
            time.sleep(0.2)


def _take_turns(engine: sqlalchemy.Engine) -> None:
    """Have each transaction lock the SQLite database from its first read on.

    Optuna reads that a trial waits and then writes that it runs, and counts on the row being locked in between; SQLite
    locks no rows, and its driver begins a transaction only at the first write: two processes took the same trial.
    """

    def no_transactions_of_the_driver(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None

    sqlalchemy.event.listen(engine, "connect", no_transactions_of_the_driver)
    sqlalchemy.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    engine.dispose()  # connections from before this

"""A sweep's points on the workers of an executor: each opens the store, and is sent one point or a few at a time.

Of a few it merges the next while it evaluates one.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paretofuse import api
from paretofuse.engine.distributed import rank_and_size
from paretofuse.engine.engine import Engine
from paretofuse.engine.errors import StoreError
from paretofuse.engine.evaluation.progress import progress_bar
from paretofuse.engine.evaluation.sweep import Evaluate, Known, Rows, evaluate_at, shown
from paretofuse.engine.stacking.skeleton import make_skeleton
from paretofuse.engine.store.reader import Store

_BREAKS = 3
"""So many pools may break, one after the other and without a row in between, until the evaluation is to blame."""

_EXPECTED = (
    "expected an executor with submit(), such as concurrent.futures.ProcessPoolExecutor, a dask.distributed.Client or "
    "paretofuse.fronts.ray_pool.RayPool, or a function that makes one"
)

_POLL = 0.05
"""Seconds between two looks at futures that nobody can wait for."""

_AT_ONCE = 2
"""Models that a worker merges in one pass where it is sent a few points: fewer bytes are moved for each than one by
one, and the first two are soon there."""


class Pool(Protocol):
    """What an executor has to have; its futures have `done()`, `result()` and `cancel()`."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Call a function on a worker."""


Executor = Pool | Callable[[], Pool]
"""An executor, or a function that makes one."""


@dataclass(frozen=True)
class OpenedStore:
    """What a worker needs to know to open the same engine: small, and sent with each point.

    Attributes:
        path: the store's directory, the same on each worker.
        routers: the checksum of its routers.
        device, backend: of the engine.
        module: the model's structure as a pickle, where the store does not tell it.
    """

    path: str
    routers: str
    device: str
    backend: str
    module: bytes | None

    def engine(self) -> Engine:
        """The engine, opened once in each thread of a worker.

        Raises:
            StoreError: there is no such store, or its routers are others by now.
        """
        if getattr(_HERE, "opened", None) != self:
            module = None if self.module is None else pickle.loads(self.module)
            engine = api.load(self.path, self.device, module, backend=self.backend)
            if engine.origin != self.routers:
                raise StoreError(
                    f"{self.path}: a worker found other routers there than the sweep began with; it was trained or "
                    "replaced meanwhile. Start the sweep again"
                )
            _HERE.opened, _HERE.engine, _HERE.ahead = self, engine, engine.ahead(_AT_ONCE)
        return _HERE.engine  # type: ignore[no-any-return]


_HERE = threading.local()
"""The engine of this thread of a worker, its modules that are merged ahead, and what it was opened by."""


def store_of(engine: Any) -> OpenedStore:
    """The store that an engine is of, for workers to open.

    Raises:
        ValueError: it is of none, or was trained since it was loaded or saved.
        StoreError: the store is gone or damaged.
    """
    path = getattr(engine, "path", None)
    if not isinstance(engine, Engine) or path is None:
        raise ValueError(
            "got an engine of no store with executor=, expected one that pf.load opened or that was saved: each worker "
            "opens the store; call engine.save(path) first"
        )
    store = Store.open(path)
    now, then = engine.routers.stored(), store.routers
    if now.keys() != then.keys() or any(not np.array_equal(now[name], then[name]) for name in now):
        raise ValueError(
            f"got an engine whose routers differ from those in {path}, which the workers open; call engine.save(path) "
            "first, which keeps what was trained"
        )
    stored = api.stored_blueprint(store).skeleton
    own = engine.blueprint.make()
    known = stored is not None and type(stored()) is type(own)
    module = None if known else pickle.dumps(make_skeleton(own))
    return OpenedStore(path, store.routers_checksum, str(engine.device), engine.backend, module)


def evaluate_points(
    opened: OpenedStore, evaluate: Evaluate, points: Sequence[tuple[Sequence[float], Known | None]]
) -> list[tuple[dict[str, float], str]]:
    """On a worker: at each preference the metrics by name, and the model's digest; see `evaluate_at`."""
    objectives = opened.engine().objectives
    rows = []
    preferences = np.array([preference for preference, _ in points], dtype=np.float64)
    with closing(_HERE.ahead.modules(preferences)) as modules:
        for (preference, known), module in zip(points, modules, strict=True):
            at = f"preference {shown(objectives, preference)}"
            rows.append(evaluate_at(module, evaluate, objectives, at, known))
    return rows


def evaluate_on_workers(
    executor: Executor,
    ahead: int,
    chunksize: int,
    engine: Any,
    evaluate: Evaluate,
    rows: Rows,
    progress: bool,
) -> None:
    """Evaluate all of a sweep's points on an executor's workers; each row is taken as it comes.

    Args:
        executor: an executor that somebody else shuts down, or a function that makes one, which is called again where
            a dead worker has broken it (concurrent.futures' process pools); what it makes is shut down here.
        ahead: how many points the executor is given at a time, or one chunk.
        chunksize: how many a worker is sent at a time; their rows come together.
        engine: of a store.
        evaluate: sent with each chunk.
        rows: takes the rows, and has the preferences.
        progress: show a bar.

    Raises:
        ValueError, StoreError: as `store_of`; or torchrun's processes call this too.
        TypeError: that is no executor, or its processes cannot be sent `evaluate`.
        RuntimeError: a worker died and the executor cannot go on, or workers die again and again.
        Exception: what `evaluate` raised, of the first point where it did; all rows that are there have been taken.
    """
    if rank_and_size()[1] > 1:
        raise ValueError("got executor= under torchrun, whose processes share out the preferences already")
    opened = store_of(engine)
    makes = isinstance(executor, type) or not hasattr(executor, "submit")
    pool: Any = _made(executor, evaluate) if makes else _checked(executor, evaluate)
    points = range(len(rows.preferences))
    waiting = deque(points[start : start + chunksize] for start in points[::chunksize])
    running = dict[Any, range]()
    breaks = reached = 0
    try:
        with progress_bar(progress, total=len(points), desc="sweep", unit="model") as bar:

            def take(futures: Sequence[Any]) -> None:
                """Take the rows of those that succeeded; raise what the first of the others did."""
                failed: Exception | None = None
                for future in futures:
                    try:
                        found = future.result()
                    except Exception as error:
                        failed = failed or error
                        if not isinstance(error, BrokenExecutor):  # after which it is done again
                            del running[future]
                        continue
                    chunk = running.pop(future)
                    for index, row in zip(chunk, found, strict=True):
                        rows.add(index, *row)
                    bar.update(len(chunk))
                if failed is not None:
                    raise failed

            while waiting or running:
                try:
                    while waiting and (not running or (len(running) + 1) * chunksize <= ahead):
                        chunk = [(rows.preferences[index], rows.known(index)) for index in waiting[0]]
                        future = pool.submit(evaluate_points, opened, evaluate, chunk)
                        running[future] = waiting.popleft()
                    take(_some_done(running))
                except BrokenExecutor as error:
                    with suppress(BrokenExecutor):
                        take([future for future in running if future.done()])
                    breaks = 1 if len(rows.values) > reached else breaks + 1
                    reached = len(rows.values)
                    # To the end of the queue: a point that always kills its worker shall not take others with it.
                    waiting.extend(running.values())
                    running.clear()
                    if not makes or breaks == _BREAKS:
                        left = [index for chunk in waiting for index in chunk]
                        raise _died(rows, left, makes) from error
                    pool.shutdown()
                    pool = _made(executor, evaluate)
    except BaseException:
        for future in running:
            future.cancel()
        raise
    finally:
        if makes:
            pool.shutdown(cancel_futures=True)


def _made(executor: Any, evaluate: Evaluate) -> Any:
    if not callable(executor):
        raise TypeError(f"got executor={executor!r}, {_EXPECTED}")
    return _checked(executor(), evaluate)


def _checked(pool: Any, evaluate: Evaluate) -> Any:
    """An executor that takes this evaluation; of a Dask client, its executor.

    Raises:
        TypeError: it is none, or its processes cannot be sent `evaluate`.
    """
    if hasattr(pool, "get_executor"):
        pool = pool.get_executor()
    if not hasattr(pool, "submit"):
        raise TypeError(f"got executor={pool!r}, {_EXPECTED}")
    if isinstance(pool, ProcessPoolExecutor):  # others bring picklers of their own
        try:
            pickle.dumps(evaluate)
        except Exception as error:  # whatever an object's own __reduce__ raises
            raise TypeError(
                f"got evaluate={evaluate!r}, which no other process can be sent ({error}); expected a function that a "
                "module defines, or a functools.partial of one"
            ) from error
    return pool


def _some_done(running: Mapping[Any, range]) -> list[Any]:
    """Wait until a future is done: all that are."""
    while True:
        if all(isinstance(future, Future) for future in running):
            wait(running, return_when=FIRST_COMPLETED)
        done = [future for future in running if future.done()]
        if done:
            return done
        time.sleep(_POLL)  # futures of their own, such as submitit's jobs


def _died(rows: Rows, waiting: Sequence[int], makes: bool) -> RuntimeError:
    points = "; ".join(shown(rows.objectives, rows.preferences[index]) for index in list(waiting)[-3:])
    if makes:
        return RuntimeError(
            f"workers died {_BREAKS} times in a row without finishing a point (at one of these, or others of "
            f"{len(waiting)}: {points}); is there memory enough for each of them? Its own message is on stderr"
        )
    return RuntimeError(
        f"a worker died, which breaks this executor, with {len(waiting)} points still to do; pass a function that "
        "makes one, such as executor=lambda: ProcessPoolExecutor(2), so that another takes its place"
    )

"""Sweeps on executors: the same front, rows as they come, and no point lost with a worker that dies."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.engine import Engine
from paretofuse.engine.errors import StoreError
from paretofuse.fronts import workers
from tests.support.evaluations import deadly, sums
from tests.support.process import ROOT

GRID = pf.simplex_grid(2, 7)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that does not say how its module is built."""
    torch.manual_seed(0)
    base, *experts = (nn.Linear(5, 3) for _ in range(3))
    path = tmp_path_factory.mktemp("workers") / "s"
    pf.stack(base, dict(zip("xy", experts, strict=True)), route="tensor").save(path)
    return path


@pytest.fixture
def engine(store: Path) -> Engine:
    return pf.load(store, module=nn.Linear(5, 3))


@pytest.fixture(scope="module")
def truth(store: Path) -> pf.Front:
    return pf.sweep(pf.load(store, module=nn.Linear(5, 3)), sums, GRID, progress=False)


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize("chunksize", [1, 3])
def test_processes_give_the_same_front_though_one_dies(
    chunksize: int, engine: Engine, truth: pf.Front, tmp_path: Path
) -> None:
    mark, out = tmp_path / "died", tmp_path / "f.csv"
    front = pf.sweep(
        engine, deadly(mark), GRID, executor=process, chunksize=chunksize, out=out, progress=False
    )
    assert mark.exists()
    assert front == truth == pf.Front.from_csv(out)
    assert not engine._in_place.built  # nothing was merged here


def test_threads_do_too_each_with_an_engine_of_its_own(
    engine: Engine, truth: pf.Front, threads: Executor
) -> None:
    seen: set[int] = set()

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert not module.training
        assert not torch.is_grad_enabled()
        seen.add(id(module))
        return sums(module)

    assert pf.sweep(engine, evaluate, GRID, executor=threads, progress=False) == truth
    assert id(engine.module) not in seen
    assert threads.submit(int, "3").result() == 3  # who made it shuts it down


@pytest.mark.slow
def test_a_dask_cluster_redoes_what_its_dead_worker_had(
    engine: Engine, truth: pf.Front, tmp_path: Path
) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        mark = tmp_path / "died"
        assert pf.sweep(engine, deadly(mark), GRID, executor=client, progress=False) == truth
        assert mark.exists()


@pytest.mark.slow
def test_ray_redoes_what_its_dead_worker_had(engine: Engine, truth: pf.Front, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from paretofuse.fronts.ray_pool import RayPool

    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        mark = tmp_path / "died"
        assert pf.sweep(engine, deadly(mark), GRID, executor=RayPool(num_cpus=1), progress=False) == truth
        assert mark.exists()
    finally:
        ray.shutdown()


class Inline(Executor):
    """Calls at once, in this thread; breaks as a process pool does, before the calls whose numbers are given."""

    def __init__(self, *breaking: int) -> None:
        self.calls, self.breaking, self.broken, self.down = 0, breaking, False, False

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        if self.broken:
            raise BrokenExecutor("it is broken")
        future: Future[Any] = Future()
        self.broken = self.calls in self.breaking
        self.calls += 1
        try:
            if self.broken:
                raise BrokenExecutor("a worker died")
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.down = True


def test_a_broken_pool_is_made_anew_and_each_of_them_is_shut_down(engine: Engine, truth: pf.Front) -> None:
    pools: list[Inline] = []

    def make() -> Inline:
        pools.append(Inline(*([3] if len(pools) < 2 else [])))
        return pools[-1]

    assert pf.sweep(engine, sums, GRID, executor=make, progress=False) == truth
    assert [pool.down for pool in pools] == [True, True, True]
    assert sum(pool.calls for pool in pools) == len(GRID) + 2  # rows that had come are not evaluated again


def test_workers_that_always_die_end_the_sweep(engine: Engine, tmp_path: Path) -> None:
    made: list[Inline] = []

    def make() -> Inline:
        made.append(Inline(2 if not made else 0))
        return made[-1]

    with pytest.raises(
        RuntimeError, match=r"died 3 times in a row .*5: x=0.666667.*; x=0.333333, y=0.666667.*memory"
    ) as told:
        pf.sweep(engine, sums, GRID, executor=make, out=tmp_path / "f.csv", progress=False)
    assert "f.partial.csv" in "".join(getattr(told.value, "__notes__", ["f.partial.csv"]))
    assert len(made) == 3
    assert all(pool.down for pool in made)


def test_a_pool_that_somebody_else_made_cannot_be_made_anew_but_the_rows_stay(
    engine: Engine, truth: pf.Front, tmp_path: Path
) -> None:
    out = tmp_path / "f.csv"
    pool = Inline(3)
    with pytest.raises(RuntimeError, match=r"4 points still to do; pass a function that makes one"):
        pf.sweep(engine, sums, GRID, executor=pool, out=out, progress=False)
    assert not pool.down
    calls: list[int] = []

    def counted(module: nn.Module) -> dict[str, float]:
        calls.append(1)
        return sums(module)

    counted.__qualname__ = sums.__qualname__  # of the same evaluation
    assert pf.sweep(engine, counted, GRID, executor=Inline(), out=out, progress=False) == truth
    assert len(calls) == 4


def test_what_evaluate_raises_ends_the_sweep_and_keeps_the_rows(
    engine: Engine, threads: Executor, tmp_path: Path
) -> None:
    def evaluate(module: nn.Module) -> dict[str, float]:
        if len(calls) == 5:
            raise KeyError("labels")
        calls.append(1)
        return sums(module)

    calls: list[int] = []
    with pytest.raises(KeyError, match="labels"):
        pf.sweep(engine, evaluate, GRID, executor=Inline(), ahead=1, out=tmp_path / "f.csv", progress=False)
    rows = list(csv.reader((tmp_path / "f.partial.csv").read_text().splitlines()))
    assert len(rows) == 1 + 5


def test_an_executor_has_no_more_points_at_a_time_than_it_may(engine: Engine, truth: pf.Front) -> None:
    class Counting(Inline):
        most = 0
        held = 0

        def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
            Counting.held += 1
            Counting.most = max(Counting.most, Counting.held)
            inner = super().submit(*arguments, **named)
            taken = inner.result

            def result(timeout: float | None = None) -> Any:
                Counting.held -= 1
                return taken(timeout)

            inner.result = result  # type: ignore[method-assign]
            return inner

    assert pf.sweep(engine, sums, GRID, executor=Counting(), ahead=2, progress=False) == truth
    assert Counting.most == 2
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            pf.sweep(engine, sums, GRID, executor=Inline(), ahead=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("chunksize", "ahead"), [(2, None), (3, 2), (3, 6), (5, None), (100, None)])
def test_chunks_give_the_same_front(
    chunksize: int, ahead: int | None, engine: Engine, truth: pf.Front
) -> None:
    """A worker's thread merges what comes next; the modules of one chunk are those of the next."""
    pool, seen = Inline(), set[int]()

    def evaluate(module: nn.Module) -> dict[str, float]:
        seen.add(id(module))
        return sums(module)

    front = pf.sweep(engine, evaluate, GRID, executor=pool, chunksize=chunksize, ahead=ahead, progress=False)
    assert front == truth
    assert pool.calls == -(-len(GRID) // chunksize)
    assert len(seen) == min(4, chunksize)


def test_of_a_chunk_that_fails_all_is_done_again(engine: Engine, truth: pf.Front, tmp_path: Path) -> None:
    calls: list[int] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 6:
            raise KeyError("labels")
        return sums(module)

    evaluate.__qualname__ = sums.__qualname__  # of the same evaluation

    def swept() -> pf.Front:
        return pf.sweep(
            engine, evaluate, GRID, executor=Inline(), chunksize=2, ahead=2, out=tmp_path / "f.csv", progress=False
        )  # fmt: skip

    with pytest.raises(KeyError, match="labels"):
        swept()
    rows = list(csv.reader((tmp_path / "f.partial.csv").read_text().splitlines()))
    assert len(rows) == 1 + 4
    assert swept() == truth
    assert len(calls) == 6 + len(GRID) - 4


def test_chunks_are_for_executors(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"got chunksize=2 without executor="):
        pf.sweep(engine, sums, GRID, chunksize=2, progress=False)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"got chunksize=.*, expected a whole number of at least 1"):
            pf.sweep(engine, sums, GRID, executor=Inline(), chunksize=wrong)  # type: ignore[arg-type]


class Job:
    """A future as submitit's: nobody is called back, and one that is done cannot be cancelled."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.asked = call, 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def result(self) -> Any:
        return self.call()

    def cancel(self) -> None:
        assert self.asked <= 2


class Jobs:
    """An executor of such; the call of a number `dies_at` finds that its worker has died."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls, self.dies_at = 0, dies_at

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Job:
        self.calls += 1
        if self.calls == self.dies_at:
            return Job(self.died)
        return Job(lambda: function(*arguments))

    def died(self) -> Any:
        raise RuntimeError("has not produced any output")


def test_jobs_with_futures_of_their_own(
    engine: Engine, truth: pf.Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_POLL", 0.0)
    assert pf.sweep(engine, sums, GRID, executor=Jobs(), progress=False) == truth
    with pytest.raises(RuntimeError, match="has not produced any output"):
        pf.sweep(engine, sums, GRID, executor=Jobs(dies_at=2), out=tmp_path / "f.csv", progress=False)
    rows = list(csv.reader((tmp_path / "f.partial.csv").read_text().splitlines()))
    assert len(rows) == 1 + len(GRID) - 1  # those that were done with it stay, whatever their order


def test_the_engine_is_of_a_store(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base, *experts = (nn.Linear(5, 3) for _ in range(3))
    own = pf.stack(base, {"x": experts[0], "y": experts[1]}, route="tensor")
    with pytest.raises(ValueError, match=r"of no store.*call engine\.save"):
        pf.sweep(own, sums, GRID, executor=Inline(), progress=False)
    own.save(tmp_path / "own")
    front = pf.sweep(own, sums, GRID, executor=Inline(), progress=False)
    assert front == pf.sweep(own, sums, GRID, progress=False)
    with torch.no_grad():
        own.routers.output.bias.add_(0.1)
    with pytest.raises(ValueError, match=r"routers differ from those in .*own"):
        pf.sweep(own, sums, GRID, executor=Inline(), progress=False)
    opened = workers.store_of(engine)
    own.save(opened.path)
    with pytest.raises(StoreError, match="other routers"):
        workers.OpenedStore(opened.path, "0" * 64, "cpu", "native", opened.module).engine()


def test_wrong_executors(engine: Engine) -> None:
    for wrong in (3, "ray", object()):
        with pytest.raises(TypeError, match=r"got executor=.*expected an executor with submit"):
            pf.sweep(engine, sums, GRID, executor=wrong, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an executor with submit"):
        pf.sweep(engine, sums, GRID, executor=lambda: 3, progress=False)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"no other process can be sent.*functools\.partial"):
        pf.sweep(engine, lambda module: sums(module), GRID, executor=process, progress=False)

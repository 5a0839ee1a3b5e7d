"""`engine.replica`: every request its own preference, from many threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import paretofuse as pf
from paretofuse.engine.modules.replicas import Fence
from paretofuse.engine.modules.slots import Slot, Slots
from tests.support.models import net_and_experts, same, tiny_gpt2

FIRST, SECOND, THIRD = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_is_the_merged_model(backend: str, dtype: torch.dtype) -> None:
    base, experts = net_and_experts()
    route = lambda name: None if name.startswith("norm") else name  # noqa: E731
    engine = pf.stack(base, experts, route=route, dtype=dtype, backend=backend, replicas=2)
    engine.switch(FIRST)
    for preference in (FIRST, SECOND, THIRD, FIRST):
        with engine.replica(preference) as module:
            assert same(module, engine.merge(preference))
            assert module is not engine.module
            assert not any(parameter.requires_grad for parameter in module.parameters())
    assert same(engine.module, engine.merge(FIRST))  # the live module stays as it was


def test_the_least_recently_used_replica_that_nobody_holds_goes_first() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=2)
    with engine.replica(FIRST) as first:
        with engine.replica(SECOND) as second:
            assert first is not second
            with engine.replica({"b": 1.0}) as again:
                assert again is second
        with engine.replica(THIRD) as third:  # the first is held
            assert third is second
        assert same(first, engine.merge(FIRST))
    with engine.replica(THIRD), engine.replica(SECOND) as second:
        assert second is first


def test_of_several_that_nobody_holds_the_least_recently_used_goes_first() -> None:
    """Once the most recently used went first and no test noticed: there was never more than one that was free."""
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=3)
    used = {}
    for name in "abca":  # b is now the least recently used, then c
        with engine.replica({name: 0.6, "abc"["bca".index(name)]: 0.4}) as used[name]:
            pass
    assert len({id(module) for module in used.values()}) == 3  # empty ones go before all
    for preference, expected in ((FIRST, used["b"]), (SECOND, used["c"]), (THIRD, used["a"])):
        with engine.replica(preference) as replaced:
            assert replaced is expected


def test_every_held_preference_needs_a_replica() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1)
    with engine.replica(FIRST), engine.replica(FIRST, timeout=0.01):
        start = time.monotonic()
        late = engine.replica(SECOND, timeout=0.05)
        with pytest.raises(TimeoutError, match=r"within 0\.05 s, 1 in all; open the engine with more"):
            late.__enter__()
        assert time.monotonic() - start >= 0.05
    with engine.replica(SECOND, timeout=0) as module:
        assert same(module, engine.merge(SECOND))


def test_what_a_block_raises_releases_the_replica() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1)
    with pytest.raises(KeyError), engine.replica(FIRST):
        raise KeyError
    with engine.replica(SECOND, timeout=0):
        pass


def test_a_failed_merge_leaves_no_replica_behind() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base.state_dict(), {n: e.state_dict() for n, e in experts.items()}, replicas=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no module class"), engine.replica(FIRST, timeout=0):
            pass


def test_wrong_arguments(tmp_path: Path) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts)
    for preference in ([0.5, 0.5], [0.5, 0.5, 0.5], {"z": 1.0}):
        with pytest.raises(ValueError, match="got"):
            engine.replica(preference)
    engine.save(tmp_path / "store")
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="replicas="):
            pf.stack(base, experts, replicas=count)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="replicas="):
            pf.load(tmp_path / "store", replicas=count)  # type: ignore[arg-type]


def test_further_training_and_other_routers_are_noticed() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1)
    with engine.replica(THIRD):
        pass
    optimizer = torch.optim.SGD(engine.routers.parameters(), lr=1.0)
    engine.train_at(THIRD)
    engine.module(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    with engine.replica(THIRD) as module:
        assert same(module, engine.merge(THIRD))
    other = pf.stack(base, experts, init="sqrt").routers
    with torch.no_grad():
        for own in other.parameters():
            own.add_(0.1)
    engine.routers.load_state_dict(other.state_dict())
    with engine.replica(THIRD) as module:
        assert same(module, engine.merge(THIRD))


def test_unload_frees_the_replicas() -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1)
    with engine.replica(FIRST) as module:
        dense = engine.unload(SECOND)
        assert same(module, engine.merge(FIRST))  # still held
    with engine.replica(FIRST) as fresh:
        assert fresh is not module
    assert same(dense, engine.merge(SECOND))


@pytest.mark.parametrize(
    ("backend", "replicas"), [("native", 1), ("native", 3), ("native", 6), ("reference", 3)]
)
def test_eight_threads_each_see_their_own_preference(backend: str, replicas: int) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, route="tensor", backend=backend, replicas=replicas)
    generator = torch.Generator().manual_seed(0)
    preferences = list(torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(1))
    x = torch.randn(5, 8, generator=generator)
    with torch.no_grad():
        truths = [engine.merge(preference)(x) for preference in preferences]
    wrong: list[int] = []
    done: list[int] = []

    def work(seed: int) -> None:
        order = torch.Generator().manual_seed(seed)
        for which in torch.randint(0, 6, (60,), generator=order).tolist():
            with engine.replica(preferences[which]) as module, torch.no_grad():
                first = module(x)
                time.sleep(0)
                if not (torch.equal(first, truths[which]) and torch.equal(module(x), truths[which])):
                    wrong.append(which)
            done.append(which)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(done) == 8 * 60


def test_a_merge_holds_up_nobody_but_those_who_want_it() -> None:
    slots = Slots(2)
    ready, go = threading.Event(), threading.Event()
    merges: list[str] = []

    def slow(slot: Slot) -> None:
        merges.append(f"slow {slot.number}")
        ready.set()
        assert go.wait(20)

    def quick(slot: Slot) -> None:
        merges.append(f"quick {slot.number}")

    waiters = [threading.Thread(target=slots.acquire, args=("a", slow)) for _ in range(3)]
    for thread in waiters:
        thread.start()
    assert ready.wait(20)
    other = slots.acquire("b", quick, timeout=0)  # merges beside the slow one
    again = slots.acquire("b", quick, timeout=0)  # and is hit beside it
    assert again.given.result() is other.given.result()
    with pytest.raises(TimeoutError):
        slots.acquire("c", quick, timeout=0)
    go.set()
    for thread in waiters:
        thread.join(20)
    assert sorted(merges) == ["quick 1", "slow 0"]  # three callers, one merge


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_replica_that_was_moved_is_refused_once_and_made_anew(backend: str) -> None:
    base, experts = net_and_experts()
    engine = pf.stack(base, experts, replicas=1, backend=backend)
    for preference in (FIRST, SECOND):  # found as it is, and to be merged anew
        with engine.replica(FIRST) as module:
            module.half()
        with (
            pytest.raises(ValueError, match="live module whose tensor"),
            engine.replica(preference, timeout=0),
        ):
            pass
        with engine.replica(preference, timeout=0) as fresh:
            assert same(fresh, engine.merge(preference))


FORKED = """
import os, signal, sys, threading
import torch
import paretofuse as pf
from torch import nn
from tests.support.models import perturbed

torch.set_num_threads(4)
base = nn.Linear(512, 700)  # several chunks of work, so that more than one thread has some
engine = pf.stack(base, {name: perturbed(base, seed) for seed, name in enumerate("abc")}, replicas=2)
truth = engine.merge([0.5, 0.3, 0.2]).weight.detach().numpy()
engine.switch([0.2, 0.3, 0.5])  # starts libgomp's threads
stop, held = threading.Event(), threading.Event()
def hold():
    with engine.replica([1.0, 0.0, 0.0]), engine.replica([0.0, 1.0, 0.0]):
        held.set()
        stop.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(100)  # a child that hangs is killed
    torch.set_num_threads(4)
    engine.switch([0.5, 0.3, 0.2])
    good = (engine.module.weight.detach().numpy() == truth).all()
    with engine.replica([0.5, 0.3, 0.2], timeout=50) as module:  # the one who held them is not here
        good = good and (module.weight.detach().numpy() == truth).all()
    os._exit(0 if good else 3)
status = os.waitpid(child, 0)[1]
stop.set()
thread.join()
engine.switch([0.1, 0.1, 0.8])  # the parent goes on
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def test_a_forked_process_switches_and_has_replicas() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        cwd=Path(__file__).parents[2], timeout=250, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"


def test_generation_by_replicas_of_a_hugging_face_model() -> None:
    base = tiny_gpt2()
    engine = pf.stack(base, {"cola": tiny_gpt2(1), "sst2": tiny_gpt2(2)}, replicas=2)
    prompt = torch.arange(1, 6).unsqueeze(0)
    texts: dict[float, Tensor] = {}

    def serve(share: float) -> None:
        with engine.replica({"cola": share, "sst2": 1 - share}) as module:
            texts[share] = module.generate(prompt, max_new_tokens=5, do_sample=False)

    threads = [threading.Thread(target=serve, args=(share,)) for share in (0.0, 0.5, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for share, text in texts.items():
        truth = engine.merge([share, 1 - share]).generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(text, truth)
    assert len(texts) == 3


class FakeStream:
    """Of a GPU that is not there: writes down what waits for what."""

    def __init__(self, number: int, log: list[str]) -> None:
        self.cuda_stream = number
        self.log = log

    def record_event(self) -> str:
        event = f"{self.cuda_stream}.{len(self.log)}"
        self.log.append(f"record {event}")
        return event

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.cuda_stream} waits for {event}")


def test_streams_of_a_gpu_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    current = [FakeStream(1, log)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    fence = Fence(torch.device("cuda", 0))
    with fence.writing():
        log.append("merge")
    current[0] = FakeStream(2, log)
    for _ in range(2):
        with fence.reading():
            log.append("use")
    current[0] = FakeStream(1, log)
    with fence.writing():
        log.append("merge")
    assert log == [
        "merge", "record 1.1", "2 waits for 1.1", "use", "record 2.4", "2 waits for 1.1", "use", "record 2.7",
        "1 waits for 2.7", "merge", "record 1.10",
    ]  # fmt: skip

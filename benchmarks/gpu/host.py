"""What a switch costs the host, measured where no GPU is: Triton's driver is a stub whose launches return at once.

    python -m benchmarks.gpu.host

Everything else is the product's: checks, routing weights, Triton's own path to the launch. A captured switch's replay
returns at once, too. Tensors lie on the CPU, so the calls that pin the routing weights and ask for their copy are left
out, and a copy on the CPU stands for the latter. Gradients are of zeros: only the hooks' own work is measured.
Narrow layers stand for wide ones: the host's work depends on how many tensors there are, not on their sizes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

import paretofuse as pf
from paretofuse.engine.merging import flat
from paretofuse.engine.modules import in_place
from paretofuse.engine.training import captured, fit
from paretofuse.kernels import routed_grad, routed_merge

NARROW_SMALL = 1 << 10
"""Parts small tensors from large ones where layers are 16 times narrower, as 2 ** 16 does in the true models."""


class StubUtils:
    """What loads a kernel's binary: it is kept, and never run."""

    def __init__(self) -> None:
        self.binaries: set[bytes] = set()

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, None, int, int, int]:
        """Module, function, which there is none of, registers, spills and the most threads of a program."""
        self.binaries.add(binary)
        return object(), None, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """An H100's."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class StubDriver:
    """As much of Triton's CUDA driver as compiling for sm_90 and launching takes; `launches` counts."""

    def __init__(self) -> None:
        self.utils = StubUtils()
        self.launches = 0

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """An H100."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """A launcher that counts."""

        def launch(*_: object) -> None:
            self.launches += 1

        return launch


def always(kernel: object, tensor: torch.Tensor) -> bool:
    """That the kernel does it; a function, as calling a mock takes longer than what is measured."""
    return True


@contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Have Triton's kernels compiled for sm_90 and launched into nothing, also on tensors of the CPU."""
    from triton.runtime import driver

    stub = StubDriver()
    kernels = routed_merge.merge_kernel, routed_grad.partials_kernel, routed_grad.segment_sums_kernel
    _forget(kernels)
    try:
        with (
            mock.patch.object(driver, "_active", stub),
            mock.patch.object(routed_merge, "require"),
            mock.patch.object(routed_grad, "by_triton", always),
        ):
            yield stub
    finally:
        _forget(kernels)


def _forget(kernels: Iterable[Any]) -> None:
    """What was compiled for the first device, which the stub's is as well; and no driver shall unload it."""
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():
            for one in compiled.values():
                one.module = None
        kernel.device_caches.clear()


class StubGraph:
    """A CUDA graph: its capture runs everything once, its replay nothing; `replays` counts."""

    def __init__(self) -> None:
        self.replays = 0

    def capturing(self) -> AbstractContextManager[None]:
        """In the place of `torch.cuda.graph`."""
        return nullcontext()

    def replay(self) -> None:
        """Nothing."""
        self.replays += 1


class StubEvent:
    """An event that nobody has to wait for; or the stream of a device, which nobody looks at."""

    def __init__(self, device: object = None) -> None:
        """Nothing."""

    def record(self, stream: object) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""


def first_device(backends: Mapping[torch.device, str], remedy: str = "") -> torch.device:
    """In the place of `one_gpu`: the only device that there is."""
    return next(iter(backends))


@contextmanager
def stub_graphs(graph: Callable[[], Any] = StubGraph, event: Callable[[], Any] = StubEvent) -> Iterator[None]:
    """Have switches and router steps captured on tensors of the CPU."""
    with (
        mock.patch.object(in_place, "one_gpu", first_device),
        mock.patch.object(fit, "one_gpu", first_device),
        mock.patch.object(captured, "one_gpu", first_device),
        mock.patch.object(torch.cuda, "CUDAGraph", graph),
        mock.patch.object(torch.cuda, "graph", lambda made, **_: made.capturing()),
        mock.patch.object(torch.cuda, "Event", event),
        mock.patch.object(torch.cuda, "current_stream", StubEvent),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
    ):
        yield


def gpt2() -> nn.Module:
    """GPT-2 small's 148 tensors, 16 times narrower."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=48, vocab_size=211, n_positions=32, bos_token_id=0, eos_token_id=0)
    )


def vit() -> nn.Module:
    """The 200 tensors of a ViT-B/32, 16 times narrower."""
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(hidden_size=48, intermediate_size=192, num_attention_heads=12, image_size=64, patch_size=32)
    )


def engine_of(make: Callable[[], nn.Module], experts: int) -> pf.Engine:
    """An engine on the Triton backend, of fresh experts."""
    base = make().bfloat16()
    return pf.stack(base, {f"e{i}": make().bfloat16() for i in range(experts)}, backend="triton")


def microseconds(act: Callable[[], object], times: int = 500) -> tuple[float, float]:
    """The least and the median time of a call; on a loaded machine the least is what the host needs."""
    spent = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        spent.append(1e6 * (time.perf_counter() - begin))
    return min(spent), statistics.median(spent)


def reduction(engine: pf.Engine) -> Callable[[], None]:
    """What the hooks of a backward pass and its end do with gradients of the live module's parameters."""
    kernels = engine._in_place.live().collector._kernels
    gradients = {name: torch.zeros_like(engine.module.get_parameter(name)) for name in kernels}

    def reduce() -> None:
        for name, sums in kernels.items():
            sums.add(name, gradients[name])
        for sums in dict.fromkeys(kernels.values()):
            sums.take()

    return reduce


def report(name: str, engine: pf.Engine, stub: StubDriver) -> None:
    """Print a line for each thing that the host does."""
    preference = [1 / 8] * 8
    engine.warmup()
    captured, live = engine.capture(), engine._in_place.live()
    for what, act in (
        ("a switch", lambda: engine.switch(preference)),
        ("a captured switch", lambda: captured.switch(preference)),
        ("of which the check", live.check),
        ("the gradients of a backward pass", reduction(engine)),
    ):
        act()
        before = stub.launches
        act()
        launches = stub.launches - before
        least, median = microseconds(act)
        print(
            f"{name}, {len(engine.layout.tensors)} tensors, E = 8: {what} {launches} launches, {least:.0f} us "
            f"(median {median:.0f})"
        )


def main() -> None:
    """Report on two models."""
    torch.set_num_threads(1)
    for name, make in (("GPT-2", gpt2), ("ViT-B/32", vit)):
        with mock.patch.object(flat, "SMALL", NARROW_SMALL), stub_driver() as stub, stub_graphs():
            report(name, engine_of(make, 8), stub)


if __name__ == "__main__":
    main()

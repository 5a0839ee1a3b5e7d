"""How fast are the kernels on a real GPU? Measured, against PyTorch, PWEMoE and others; `gpu.static` has predictions.

    python -m benchmarks.gpu.bench                  all parts; appends to data/gpu_bench.csv
    python -m benchmarks.gpu.bench merge            one of: merge, products, models
    python -m benchmarks.gpu.bench --quick          tiny sizes, to see that all works; the numbers mean nothing
    python -m benchmarks.gpu.bench --interpreter    the same on a CPU, with TRITON_INTERPRET=1 set

`benchmarks/gpu_day.sh` runs each part by itself, beside the tests. Every contender's result is compared with a float64
reference before it is timed; one that is wrong, or raises, leaves a row that says so, and the run goes on and exits
with 1. Times are triton.testing.do_bench's medians and quartiles, the L2 cache flushed before each call; in the part
`models` they are by the clock, from the call until the device is idle. GB/s counts the bytes that have to move, each
once, whatever a contender really moves. PWEMoE's module is fetched from PyPI (kept in benchmarks/cache); without it the
run goes on and says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.cases import Call, Case, Tools, grad_case, merge_case
from benchmarks.gpu.peers import lora_case, package_case
from benchmarks.gpu.products import linear_case, rows_case
from benchmarks.gpu.record import Line, Times, append, context
from benchmarks.gpu.whole import step_case, switch_case
from benchmarks.harness import record

MINUTES = 7.0
"""No further case of a part is begun after this long."""
PARTS = ("merge", "products", "models")

Timer = Callable[[Call], Times]
"""A call -> how long it took."""


def measure(case: Case, timer: Timer, copy_bytes_per_s: float) -> list[Line]:
    """Check each contender of a case, then time those that are right."""
    errors: dict[str, str] = {}
    times: dict[str, Times] = {}
    for label, contender in case.contenders.items():
        # Whatever another project raises on a device that it does not know must not cost the hour that is left.
        try:
            case.verify(label)
            times[label] = timer(contender.call)
        except Exception as error:
            errors[label] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    ours = next((times[k][0] for k, work in case.contenders.items() if work.ours and k in times), None)
    return [
        Line(
            case.name, label, times.get(label), errors.get(label, ""), work.moved, case.flops, copy_bytes_per_s,
            times[label][0] / ours if ours and label in times and not work.ours else None,
        )
        for label, work in case.contenders.items()
    ]  # fmt: skip


def copy_speed(timer: Timer, device: torch.device, nbytes: int) -> float:
    """Bytes a second of a copy, bytes read and bytes written both counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timer(lambda: target.copy_(source))[0] / 1e3
    record.check(torch.equal(source, target), "the copy did not copy")
    return 2 * nbytes / seconds


def models(quick: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """(name, maker, experts) of each whole model to merge."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    tiny_clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    tiny_gpt2 = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=51, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    large = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )

    def make(kind: Any, config: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
        def maker() -> nn.Module:
            torch.manual_seed(0)
            with device:
                model: nn.Module = kind(config)
            return model.to(dtype).eval()

        return maker

    half, full = torch.bfloat16, torch.float32
    vision, text = CLIPVisionModel, GPT2LMHeadModel
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    )
    if quick:
        yield "tiny CLIP", make(vision, tiny_clip, half), 2
        yield "tiny GPT-2", make(text, tiny_gpt2, full), 3
        return
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), half), 8
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), half), 2
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), half), 16
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), full), 8
    yield "GPT-2", make(text, GPT2Config(), half), 8
    yield "CLIP ViT-L/14", make(vision, large, half), 8
    yield "a layer of Llama 3 8B", make(lambda config: LlamaDecoderLayer(config, 0), llama, half), 8


def whole(
    quick: bool, device: torch.device
) -> tuple[str, Callable[[], nn.Module], tuple[torch.Tensor, ...], int]:
    """(name, maker, example, experts) of the vision model in float32 that is compiled as a package."""
    name, maker, experts = next(found for found in models(quick, device) if "CLIP" in found[0])
    size = 16 if quick else 224
    return name, lambda: maker().float(), (torch.ones(2, 3, size, size, device=device),), experts


Maker = Callable[[], Iterable[Case]]


def cases(part: str, quick: bool, tools: Tools) -> Iterator[Maker]:
    """What makes the cases of a part, one maker after the other: each case should be let go of before the next."""
    half, full = torch.bfloat16, torch.float32

    def one(kind: Callable[..., Case], *arguments: Any, **options: Any) -> Maker:
        return lambda: [kind(*arguments, tools, **options)]

    if part == "merge":
        for name, maker, experts in models(quick, tools.device):
            yield partial(merge_case, name, maker, experts, tools)
        if quick:
            yield one(grad_case, "tiny", 8 * 1024, 3, 3, half)
            return
        yield one(grad_case, "CLIP ViT-B/32", 85_406 * 1024, 8, 150, half)
        yield one(grad_case, "GPT-2", 121_524 * 1024, 8, 150, full)
    elif part == "products":
        if quick:
            yield one(linear_case, 5, 48, 40, 2, half)
            yield one(linear_case, 5, 48, 40, 2, half, backward=True)
            yield one(rows_case, 3, 2, 48, 40, 2, full)
            return
        for rows in (1, 16, 512, 4096):
            yield one(linear_case, rows, 3072, 768, 4, half)
        yield one(linear_case, 1, 4096, 4096, 8, half)
        yield one(linear_case, 512, 768, 768, 4, full)
        for rows in (512, 4096):
            yield one(linear_case, rows, 3072, 768, 4, half, backward=True)
        for batch, per in ((8, 1), (64, 1), (8, 128), (64, 50)):
            yield one(rows_case, batch, per, 3072, 768, 4, half)
        yield one(rows_case, 16, 1, 4096, 4096, 8, half)
    else:
        for name, maker, experts in models(quick, tools.device):
            yield one(switch_case, name, maker, experts)
            if "CLIP" in name and experts <= 8:
                yield one(step_case, name, maker, experts, 2 if quick else 32)
            if "GPT-2" in name:
                yield one(lora_case, name, maker, ("c_attn", "c_proj", "c_fc"), experts, 2 if quick else 16)
        yield one(package_case, *whole(quick, tools.device))


def gpu_tools(device: torch.device) -> Tools:
    """What a GPU offers."""
    from benchmarks.models.clip import pwemoe_class

    return Tools(device, lambda function: torch.compile(function, dynamic=False), graphed, pwemoe_class)


def graphed(call: Call) -> Call:
    """A call that is captured in a CUDA graph when first made and replayed from then on; gives the captured result."""
    graphs: list[tuple[torch.cuda.CUDAGraph, Any]] = []

    def replay() -> Any:
        if not graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            graphs.append((graph, result))
        graph, result = graphs[0]
        graph.replay()
        return result

    return replay


def gpu_timer(quick: bool) -> Timer:
    """triton.testing.do_bench, which flushes the L2 cache before each call."""
    from triton.testing import do_bench

    def timer(call: Call) -> Times:
        lengths = {"warmup": 5, "rep": 10} if quick else {"warmup": 25, "rep": 100}
        median, lower, upper = do_bench(call, quantiles=[0.5, 0.25, 0.75], **lengths)
        return median, lower, upper

    return timer


def wall_timer(quick: bool, device: torch.device) -> Timer:
    """By the clock: from the call until the device has done what was asked of it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timer(call: Call) -> Times:
        found = []
        for _ in range(1 if quick else 50):
            wait()
            start = time.perf_counter()
            call()
            wait()
            found.append(1e3 * (time.perf_counter() - start))
        lower, median, upper = statistics.quantiles(found * 2, n=4, method="inclusive")  # of one value, too
        return median, lower, upper

    return timer


def run(
    work: Iterable[Maker], timer: Timer, copy_bytes_per_s: float, path: Path, about: dict[str, object], minutes: float
) -> tuple[int, int]:  # fmt: skip
    """Measure case after case, each appended at once, until all are done or the time is up.

    Returns:
        How many cases were done, and how many contenders (or whole cases, that could not even be made) failed.
    """
    start, done, failed = time.monotonic(), 0, 0
    for make in work:
        try:
            for case in make():
                print(case.name, flush=True)
                lines = measure(case, timer, copy_bytes_per_s)
                for line in lines:
                    print(line.shown(), flush=True)
                append(lines, about, path)
                done, failed = done + 1, failed + sum(bool(line.error) for line in lines)
        except Exception as error:
            print(f"FAILED before any contender ran: {type(error).__name__}: {error}", flush=True)
            failed += 1
        gc.collect()
        if time.monotonic() - start > 60 * minutes:
            print(f"{minutes:g} minutes are over; the cases after this one were left out")
            break
    return done, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; by default all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that all works")
    parser.add_argument(
        "--interpreter", action="store_true", help="--quick on a CPU, in Triton's interpreter"
    )
    parser.add_argument("--out", type=Path, help="folder of the CSV file (with --quick: a cache)")
    options = parser.parse_args(arguments)
    quick = options.quick or options.interpreter
    if options.interpreter and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            "--interpreter needs TRITON_INTERPRET=1 in the environment, which Triton reads when imported"
        )
    if not options.interpreter and not torch.cuda.is_available():
        print(
            "no CUDA or ROCm GPU here, so nothing was measured; run this where torch.cuda.is_available(), or see "
            "python -m benchmarks.gpu.static for what is known without one",
            file=sys.stderr,
        )
        return 2
    folder = options.out or (record.CACHE / "quick" if quick else record.DATA)
    if options.interpreter:
        device = torch.device("cpu")
        kernels, tools = wall_timer(True, device), Tools(device, lambda function: function, None, missing)
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        kernels, tools = gpu_timer(quick), gpu_tools(device)
    about = context(device, quick)
    print(f"== {about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    speed = copy_speed(kernels, device, 1 << (20 if quick else 30))
    print(f"a copy: {speed / 1e9:.1f} GB/s")
    failures = 0
    for part in options.parts or PARTS:
        timer = wall_timer(quick, device) if part == "models" else kernels
        done, failed = run(cases(part, quick, tools), timer, speed, folder / "gpu_bench.csv", about, MINUTES)
        failures += failed
        print(f"{part}: appended {done} cases to {folder / 'gpu_bench.csv'}; {failed} contenders failed")
    return 1 if failures else 0


def missing() -> Any:
    """Stands for PWEMoE's module where it is not asked for.

    Raises:
        MissingContender: always.
    """
    raise record.MissingContender("not for a dry run")


if __name__ == "__main__":
    sys.exit(main())

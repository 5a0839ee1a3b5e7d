"""How fast are the kernels on a real GPU? Measured, against PyTorch and PWEMoE; the prediction is `gpu_static`'s.

    python -m benchmarks.gpu.bench            all cases, under 8 minutes on one GPU; appends to data/gpu_bench.csv
    python -m benchmarks.gpu.bench --quick    tiny sizes, to see that all works; the numbers mean nothing

Every contender's result is compared with a float64 reference before anything is timed; a wrong one ends the run. Times
are triton.testing.do_bench's medians and quartiles, the L2 cache flushed before each call. GB/s counts the bytes that
have to move, each once, whatever a contender really moves; the share is that of a measured copy's bandwidth. PWEMoE's
module is fetched from PyPI (kept in benchmarks/cache); without it the run goes on and says so.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Call, Case, Tools, grad_case, merge_case
from benchmarks.gpu.products import linear_case, rows_case
from benchmarks.harness import record

MINUTES = 7.0
"""No further case is begun after this long."""
COLUMNS = (
    "case", "contender", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "gb_per_s", "share_of_copy",
    "time_by_ours", "date", "quick", "device", "capability", "driver", "torch", "triton", "python", "paretofuse",
    "commit",
)  # fmt: skip

Timer = Callable[[Call], tuple[float, float, float]]
"""A call -> milliseconds: median, lower and upper quartile."""


@dataclass(frozen=True)
class Timed:
    """One contender's line."""

    case: str
    contender: str
    milliseconds: tuple[float, float, float]
    gb_per_s: float
    share_of_copy: float
    time_by_ours: float | None


def measure(case: Case, timer: Timer, copy_gb_per_s: float) -> list[Timed]:
    """Check all contenders of a case, then time them.

    Raises:
        BenchmarkError: a result is wrong.
    """
    for label in case.contenders:
        case.verify(label)
    times = {label: timer(contender.call) for label, contender in case.contenders.items()}
    ours = next(times[label] for label, contender in case.contenders.items() if contender.ours)
    return [
        Timed(
            case.name, label, times[label], speed := contender.moved / times[label][0] / 1e6,
            speed / copy_gb_per_s, None if contender.ours else times[label][0] / ours[0],
        )
        for label, contender in case.contenders.items()
    ]  # fmt: skip


def copy_speed(timer: Timer, device: torch.device, nbytes: int) -> float:
    """GB/s of a copy, bytes read and bytes written both counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timer(lambda: target.copy_(source))[0] / 1e3
    record.check(torch.equal(source, target), "the copy did not copy")
    return 2 * nbytes / seconds / 1e9


def models(
    quick: bool, device: torch.device
) -> Iterator[tuple[str, Callable[[], nn.Module], torch.dtype, int]]:
    """(name, maker, dtype, experts) of each whole model to merge."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

    tiny_clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
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
    if quick:
        yield "tiny CLIP", make(vision, tiny_clip, half), half, 2
        yield "tiny GPT-2", make(text, tiny_gpt2, full), full, 3
        return
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), half), half, 8
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), half), half, 2
    yield "CLIP ViT-B/32", make(vision, CLIPVisionConfig(), full), full, 8
    yield "GPT-2", make(text, GPT2Config(), half), half, 8
    yield "CLIP ViT-L/14", make(vision, large, half), half, 8


def cases(quick: bool, tools: Tools) -> Iterator[Case]:
    """Every case in turn; each is built only when asked for, and should be let go of before the next."""
    for name, maker, _, experts in models(quick, tools.device):
        yield from merge_case(name, maker(), experts, tools)
    half, full = torch.bfloat16, torch.float32
    if quick:
        yield grad_case("tiny", 8 * 1024, 3, 3, half, tools)
        yield linear_case(5, 48, 40, 2, half, tools)
        yield linear_case(5, 48, 40, 2, half, tools, backward=True)
        yield rows_case(3, 2, 48, 40, 2, full, tools)
        return
    for name, n, dtype in (("CLIP ViT-B/32", 85_406 * 1024, half), ("GPT-2", 121_524 * 1024, full)):
        yield grad_case(name, n, 8, 150, dtype, tools)
    for rows in (1, 16, 512, 4096):
        yield linear_case(rows, 3072, 768, 4, half, tools)
    yield linear_case(1, 4096, 4096, 8, half, tools)
    yield linear_case(512, 768, 768, 4, full, tools)
    for rows in (512, 4096):
        yield linear_case(rows, 3072, 768, 4, half, tools, backward=True)
    for batch, per in ((8, 1), (64, 1), (8, 128), (64, 50)):
        yield rows_case(batch, per, 3072, 768, 4, half, tools)
    yield rows_case(16, 1, 4096, 4096, 8, half, tools)


def gpu_tools(device: torch.device) -> Tools:
    """What a GPU offers."""
    from benchmarks.models.clip import pwemoe_class

    return Tools(device, lambda function: torch.compile(function, dynamic=False), graphed, pwemoe_class)


def graphed(call: Call) -> Call:
    """Capture a call in a CUDA graph; the result replays it and gives the captured result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        found: Tensor = result
        return found

    return replay


def gpu_timer(quick: bool) -> Timer:
    """triton.testing.do_bench, which flushes the L2 cache before each call."""
    from triton.testing import do_bench

    def timer(call: Call) -> tuple[float, float, float]:
        lengths = {"warmup": 5, "rep": 10} if quick else {"warmup": 25, "rep": 100}
        median, lower, upper = do_bench(call, quantiles=[0.5, 0.25, 0.75], **lengths)
        return median, lower, upper

    return timer


def context(quick: bool) -> dict[str, object]:
    """When, where and with what; the same in all rows of a run."""
    about = record.context(record.Options(quick=quick))
    major, minor = torch.cuda.get_device_capability()
    return {
        "date": about.date, "quick": quick, "device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}",
        "driver": torch.version.hip or torch.version.cuda, "torch": torch.__version__, "triton": version("triton"),
        "python": platform.python_version(), "paretofuse": about.paretofuse, "commit": about.commit,
    }  # fmt: skip


def append(rows: Sequence[Timed], about: dict[str, object], path: Path) -> None:
    """Append rows to the CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            median, lower, upper = (f"{value:.6g}" for value in row.milliseconds)
            by_ours = "" if row.time_by_ours is None else f"{row.time_by_ours:.4g}"
            writer.writerow(
                {
                    "case": row.case,
                    "contender": row.contender,
                    "median_ms": median,
                    "lower_quartile_ms": lower,
                    "upper_quartile_ms": upper,
                    "gb_per_s": f"{row.gb_per_s:.5g}",
                    "share_of_copy": f"{row.share_of_copy:.4g}",
                    "time_by_ours": by_ours,
                    **about,
                }
            )


def show(row: Timed) -> None:
    """Print one line."""
    ratio = "" if row.time_by_ours is None else f"{row.time_by_ours:8.3g} x ours"
    median, lower, upper = row.milliseconds
    print(
        f"  {row.contender:32} {median:10.4f} ms ({lower:.4f} to {upper:.4f}) {row.gb_per_s:8.1f} GB/s "
        f"{row.share_of_copy:6.0%} {ratio}",
        flush=True,
    )


def run(
    work: Iterator[Case],
    timer: Timer,
    copy_gb_per_s: float,
    path: Path,
    about: dict[str, object],
    minutes: float,
) -> int:
    """Measure case after case, each appended at once, until all are done or the time is up; returns their number."""
    start, done = time.monotonic(), 0
    for case in work:
        print(case.name, flush=True)
        rows = measure(case, timer, copy_gb_per_s)
        for row in rows:
            show(row)
        append(rows, about, path)
        done += 1
        del case, rows
        gc.collect()
        if time.monotonic() - start > 60 * minutes:
            print(f"{minutes:g} minutes are over; the cases after this one were left out")
            break
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that all works")
    parser.add_argument("--out", type=Path, help="folder of the CSV file (with --quick: a cache)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "no CUDA or ROCm GPU here, so nothing was measured; run this where torch.cuda.is_available(), or see "
            "python -m benchmarks.gpu.static for what is known without one",
            file=sys.stderr,
        )
        return 2
    folder = options.out or (record.CACHE / "quick" if options.quick else record.DATA)
    device = torch.device("cuda", torch.cuda.current_device())
    timer, about = gpu_timer(options.quick), context(options.quick)
    print(f"== {about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}")
    try:
        speed = copy_speed(timer, device, 1 << (20 if options.quick else 30))
        print(f"a copy: {speed:.1f} GB/s")
        work = cases(options.quick, gpu_tools(device))
        done = run(work, timer, speed, folder / "gpu_bench.csv", about, MINUTES)
    except record.BenchmarkError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(f"appended {done} cases to {folder / 'gpu_bench.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

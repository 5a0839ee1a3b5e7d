"""The demo: two experts that fight over one head, and every trade-off between them, from real images in minutes.

    python -m benchmarks.demo            what `make demo` runs
    python -m benchmarks.demo --quick    a smoke run on a fraction of everything; its numbers mean nothing

Pretrains a small vision transformer on MNIST and Fashion-MNIST together, fine-tunes an expert for each, stacks them,
learns the routers, sweeps preferences, saves the store and merges one preference into a dense model; and does the
same by PWEMoE's procedure and by simple averaging, for comparison. Everything is written to demo/out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import paretofuse as pf
from benchmarks.data_sets.images import DataError, Part, Task, Tasks, digits_tasks, load_tasks
from benchmarks.models import pwemoe
from benchmarks.models.tiny_vit import TinyViT

SHORT_STEPS = 50
"""Steps of the short run of ours."""

MERGED_AT = (0.5, 0.5)
"""The preference that is merged into a dense model; one of the sweep's."""


@dataclass(frozen=True)
class Plan:
    """How long everything takes. Steps are optimizer steps; sizes are images of one task.

    PWEMoE's are fewer than its own 4000, which would double the demo's minutes; the table says so, and the experiments
    run them all.
    """

    base_steps: int
    expert_steps: int
    expert_batch: int
    learning_batch: int
    short_steps: int
    steps: int
    pwemoe_steps: int
    points: int
    train_images: int
    test_images: int


FULL = Plan(150, 800, 128, 32, SHORT_STEPS, 400, 1500, 11, 60_000, 5_000)
QUICK = Plan(20, 30, 64, 16, 5, 10, 15, 3, 2_000, 200)


@dataclass(frozen=True)
class Row:
    """One line of the table: a single model, or a front by its two corners and its hypervolume.

    Attributes:
        name: what it is.
        first, second: test accuracies, 0 to 1; of a front, each at the preference for that task alone.
        hypervolume: of the accuracies, reference point (0, 0); of a single model their product.
        steps: router steps; None where nothing is learned.
        seconds: (wall, CPU) seconds of learning; None where nothing is learned.
    """

    name: str
    first: float
    second: float
    hypervolume: float
    steps: int | None = None
    seconds: tuple[float, float] | None = None


class Shuffled:
    """A task's training images as batches, in a new order (torch's random state) each time it is iterated."""

    def __init__(self, part: Part, size: int) -> None:
        self._part = part
        self._size = size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self._part.labels)).split(self._size):
            yield self._part.images[rows], self._part.labels[rows]

    def tenth(self, held: bool) -> Shuffled:
        """Every tenth image, or all the others."""
        rows = (torch.arange(len(self._part.labels)) % 10 == 9) == held
        return Shuffled(Part(self._part.images[rows], self._part.labels[rows]), self._size)

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch after epoch."""
        while True:
            yield from self


class Stopwatch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """(wall, CPU) seconds so far."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch (images, labels)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(model: nn.Module, tasks: Sequence[Task], steps: int, batch: int, seed: int, name: str) -> None:
    """Ordinary training on one task or on several mixed evenly, `batch` images in all at each step."""
    torch.manual_seed(seed)
    streams = [Shuffled(task.train, batch // len(tasks)).forever() for task in tasks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), desc=f"train {name}", unit="step", disable=None):
        batches = [next(stream) for stream in streams]
        images, labels = (torch.cat(halves) for halves in zip(*batches, strict=True))
        optimizer.zero_grad()
        cross_entropy(model, (images, labels)).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracies(model: nn.Module, tasks: Tasks) -> dict[str, float]:
    """Test accuracy on each task, 0 to 1."""
    found = {}
    for task in (tasks.first, tasks.second):
        images, labels = task.test.images.split(500), task.test.labels.split(500)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images, labels, strict=True))
        found[task.name] = right / len(task.test.labels)
    return found


class Demo:
    """The steps of the demo, in order; results gather in `rows`, `points` and `fronts`."""

    def __init__(self, tasks: Tasks, plan: Plan, seed: int) -> None:
        self.tasks = tasks
        self.plan = plan
        self.seed = seed
        self.rows: list[Row] = []
        self.points: dict[str, tuple[float, float]] = {}
        self.fronts: dict[str, pf.Front] = {}
        self.objectives = [
            pf.Objective(task.name, Shuffled(task.train, plan.learning_batch), cross_entropy)
            for task in (tasks.first, tasks.second)
        ]

    def train_models(self) -> tuple[TinyViT, dict[str, nn.Module]]:
        """The base, a little trained on both tasks, and an expert for each."""
        plan, pair = self.plan, (self.tasks.first, self.tasks.second)
        torch.manual_seed(self.seed)
        base = TinyViT()
        train(base, pair, plan.base_steps, plan.expert_batch, self.seed, "base")
        experts: dict[str, nn.Module] = {}
        for number, task in enumerate(pair):
            expert = copy.deepcopy(base)
            train(
                expert,
                [task],
                plan.expert_steps,
                plan.expert_batch,
                self.seed + 1 + number,
                f"expert {task.name}",
            )
            experts[task.name] = expert
        return base, experts

    def add_model(self, name: str, model: nn.Module, mark: str | None = None) -> Row:
        """Measure one model; `mark` puts it on the plot under that label."""
        first, second = accuracies(model, self.tasks).values()
        row = Row(name, first, second, first * second)
        self.rows.append(row)
        if mark:
            self.points[mark] = first, second
        return row

    def add_task_arithmetic(self, engine: pf.Engine) -> None:
        """Base + c * (sum of deltas) for ten c; the best is chosen on the test images, in its own favour."""
        tried = []
        for tenths in tqdm(range(1, 11), desc="task arithmetic", unit="model", disable=None):
            weights = torch.full((len(engine.groups), len(engine.objectives)), tenths / 10)
            first, second = accuracies(engine.merge(weights=weights), self.tasks).values()
            tried.append((first * second, first, second, tenths / 10))
        volume, first, second, coefficient = max(tried)
        self.rows.append(Row(f"task arithmetic, best of 10 ({coefficient:g})", first, second, volume))
        self.points["task arithmetic, best of 10 coefficients"] = first, second

    def add_front(
        self,
        name: str,
        engine: pf.Engine,
        steps: int | None = None,
        seconds: tuple[float, float] | None = None,
    ) -> pf.Front:
        """Sweep the preferences and measure the front."""
        preferences = pf.simplex_grid(2, self.plan.points)
        front = pf.sweep(engine, lambda model: accuracies(model, self.tasks), preferences)
        # The grid runs from all weight on the first objective to all on the second.
        first, second = float(front.values[0, 0]), float(front.values[-1, 1])
        self.rows.append(Row(name, first, second, front.hypervolume(0.0), steps, seconds))
        self.fronts[name] = front
        return front

    def learn(self, base: nn.Module, experts: dict[str, nn.Module], steps: int) -> tuple[pf.Engine, pf.Front]:
        """Ours: a router for each tensor, starting at the identity."""
        engine = pf.stack(base, experts, route="tensor")
        watch = Stopwatch()
        pf.fit(engine, self.objectives, steps=steps, seed=self.seed)
        return engine, self.add_front(f"ours, {steps} steps", engine, steps, watch.read())

    def learn_pwemoe(self, base: nn.Module, experts: dict[str, nn.Module], grouping: str) -> pf.Front:
        """PWEMoE's setting, by its own grouping or by one that routes everything."""
        watch, steps = Stopwatch(), self.plan.pwemoe_steps
        engine = pwemoe.learn(base, experts, self.objectives, grouping, steps=steps, seed=self.seed)
        kind = {"blocks": "PWEMoE", "modules": "PWEMoE routing everything"}[grouping]
        return self.add_front(f"{kind}, {steps} of its {pwemoe.STEPS} steps", engine, steps, watch.read())


def save_and_check(engine: pf.Engine, front: pf.Front, tasks: Tasks, out: Path) -> str:
    """Save the store, merge one preference from it into a dense model on disk, and measure what was written.

    Returns:
        A sentence about it.

    Raises:
        RuntimeError: the model on disk is not as accurate as it was in the sweep.
    """
    engine.save(out / "store", force=True)
    dense = pf.load(out / "store", module=TinyViT()).merge(MERGED_AT)
    save_file(dense.state_dict(), out / "merged.safetensors")
    fresh = TinyViT()
    fresh.load_state_dict(load_file(out / "merged.safetensors"))
    again = accuracies(fresh.eval(), tasks)
    swept = {
        name: float(value)
        for preference, values in zip(front.preferences, front.values, strict=True)
        if tuple(preference) == MERGED_AT
        for name, value in zip(front.metrics, values, strict=True)
    }
    if again != swept:
        raise RuntimeError(f"the merged model scores {again} after loading, but scored {swept} in the sweep")
    scores = ", ".join(f"{name} {value:.4f}" for name, value in again.items())
    return f"merged at {MERGED_AT}, an ordinary dense model: {scores}, the same as in the sweep"


def table(rows: Sequence[Row], tasks: Tasks) -> list[list[str]]:
    """The table as text cells, heading first."""
    cells = [["model", tasks.first.name, tasks.second.name, "hypervolume", "steps", "learning s (CPU s)"]]
    for row in rows:
        seconds = f"{row.seconds[0]:.1f} ({row.seconds[1]:.1f})" if row.seconds else ""
        numbers = [f"{number:.4f}" for number in (row.first, row.second, row.hypervolume)]
        cells.append([row.name, *numbers, "" if row.steps is None else str(row.steps), seconds])
    return cells


def as_text(cells: Sequence[Sequence[str]]) -> str:
    """Aligned Markdown, which reads well in a terminal too."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--steps", type=int, help=f"router steps of the long run (default: {FULL.steps})")
    parser.add_argument(
        "--out", type=Path, default=Path("demo/out"), help="where results go (default: demo/out)"
    )
    parser.add_argument("--data", type=Path, default=Path("demo/data"), help="where fetched images are kept")
    parser.add_argument(
        "--mnist", type=Path, metavar="DIR", help="a folder with MNIST's idx files of your own"
    )
    parser.add_argument("--fashion", type=Path, metavar="DIR", help="the same for Fashion-MNIST")
    parser.add_argument(
        "--digits", action="store_true", help="use the stand-in (scikit-learn's digits) at once"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean nothing")
    chosen = parser.parse_args(arguments)
    if chosen.steps is not None and chosen.steps < 1:
        parser.error(f"got --steps {chosen.steps}, expected at least 1")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status."""
    chosen = parse(arguments)
    watch = Stopwatch()
    plan = QUICK if chosen.quick else FULL
    if chosen.steps is not None:
        plan = replace(plan, steps=chosen.steps)
    try:
        tasks = digits_tasks() if chosen.digits else load_tasks(chosen.data, chosen.mnist, chosen.fashion)
    except DataError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    tasks = tasks.limited(plan.train_images, plan.test_images)
    label = f"{'QUICK RUN, numbers mean nothing: ' if chosen.quick else ''}{tasks.source}, seed {chosen.seed}"
    print(label)

    demo = Demo(tasks, plan, chosen.seed)
    base, experts = demo.train_models()
    demo.add_model("base", base, "base")
    for name, expert in experts.items():
        demo.add_model(f"expert {name}", expert, f"expert {name}")
    start = pf.stack(base, experts, route="tensor")
    half = torch.full((len(start.groups), 2), 0.5)
    demo.add_model("plain average of the experts", start.merge(weights=half), "plain average of the experts")
    demo.add_task_arithmetic(start)
    demo.add_front("straight line between the experts", start)
    if plan.short_steps != plan.steps:
        demo.learn(base, experts, plan.short_steps)
    engine, front = demo.learn(base, experts, plan.steps)
    chosen.out.mkdir(parents=True, exist_ok=True)
    merged = save_and_check(engine, front, tasks, chosen.out)
    for grouping in pwemoe.GROUPINGS:
        demo.learn_pwemoe(base, experts, grouping)

    write(demo, front, label, chosen.out)
    wall, cpu = watch.read()
    print(f"\n{merged}")
    print(f"{wall:.0f} s in all ({cpu:.0f} s of CPU time); everything is in {chosen.out}")
    print("to explore the front and ask the model in a browser (needs pip install '.[serve]'):")
    print(f"\n    {serving(chosen.out)}")
    return 0


def serving(out: Path) -> str:
    """The command that serves what was learned."""
    vit = "benchmarks.models.tiny_vit"
    return (
        f"{Path(sys.executable).parent / 'paretofuse'} serve {out / 'store'} --front {out / 'front.csv'} "
        f"--module {vit}:TinyViT --predict {vit}:classify"
    )


def write(demo: Demo, front: pf.Front, label: str, out: Path) -> None:
    """Print the table; write it as Markdown and CSV, the fronts as CSV and the picture."""
    ours, theirs = ([row for row in demo.rows if row.name.startswith(name)] for name in ("ours", "PWEMoE"))
    notes = [
        "Test accuracies; hypervolume from (0, 0). A front's accuracies are those at its two ends.",
        "PWEMoE routes 8 blocks and merges the rest, the shared head too, at 0.3; routing everything is kinder than "
        f"its own. Its scripts run {pwemoe.STEPS} steps.",
        *(
            f"{own.name}: hypervolume {own.hypervolume - other.hypervolume:+.4f} against {other.name}."
            for own in ours
            for other in theirs
        ),
    ]
    text = "\n".join([f"{label}\n", as_text(table(demo.rows, demo.tasks)), "", *notes])
    print(f"\n{text}")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "model", "first", "second", "hypervolume", "steps", "wall_s", "cpu_s"])
        for row in demo.rows:
            seconds = row.seconds or ("", "")
            writer.writerow([label, row.name, row.first, row.second, row.hypervolume, row.steps, *seconds])
    front.to_csv(out / "front.csv")
    for name, other in demo.fronts.items():
        other.to_csv(out / "fronts" / f"{name.replace(' ', '-').replace(',', '')}.csv")
    shown = {name: other for name, other in demo.fronts.items() if not name.startswith("ours")}
    ours = f"ParetoFuse, {demo.plan.steps} steps"
    front.plot(out / "front.png", points=demo.points, others=shown, label=ours, title=label)


if __name__ == "__main__":
    sys.exit(main())

"""What does a solver cost in a step? pf.fit's own step with each solver, on a real model, against linear scalarization.

    MLP         12 layers of 256, 2 experts, a batch of 128 for each of 2 objectives: all solvers
    ViT-S/32    CLIP's vision tower, 21 million parameters, 4 experts, 2 images for each of 4 objectives

Every solver takes the same steps side by side: draw a preference, merge, a forward and a backward for each objective,
the solver, the routers' backward, Adam. "one backward" is linear scalarization as one would write it without a solver:
the same merge, and a single backward of the weighted sum of all losses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import paretofuse as pf
from benchmarks.harness.record import Options, Row, check, interleave, milliseconds, paired_ratio
from benchmarks.models import clip
from paretofuse.engine.solvers import get_solver
from paretofuse.engine.training.run import Run, Settings

SOLVERS = ("ls", "epo", "tchebycheff", "stch", "cosmos", "mgda", "hypervolume")
ONE = "ls, one backward"
TARGET = "<= 1.30"

Problem = Callable[[bool], tuple[pf.Engine, list[pf.Objective]]]
"""Whether to be quick -> an engine and its objectives."""


def run(options: Options) -> list[Row]:
    """Measure all solvers on both models."""
    torch.set_num_threads(options.threads)
    rows = []
    problems: tuple[tuple[str, Problem, tuple[str, ...], int], ...] = (
        ("MLP, 2 objectives", mlp, SOLVERS, 60),
        ("ViT-S/32, 4 objectives", tower, ("ls", "epo"), 7),
    )
    for name, problem, solvers, rounds in problems:
        engine, objectives = problem(options.quick)
        steps: dict[str, Callable[[], object]] = {
            solver: solver_step(engine, objectives, solver) for solver in solvers
        }
        steps[ONE] = one_backward(engine, objectives)
        _check_same_gradient(engine, objectives)
        seconds = interleave(steps, options.repeat(rounds))
        for contender, values in seconds.items():
            ratio = None if contender == "ls" else paired_ratio(values, seconds["ls"])
            rows.append(
                Row(
                    case=f"fit step, {name}",
                    contender=contender,
                    quantity="time",
                    unit="ms",
                    values=milliseconds(values),
                    comparison="" if ratio is None else "this / ls",
                    ratio=ratio,
                    target=TARGET if contender == "epo" else "",
                )
            )
        plain = paired_ratio(seconds["epo"], seconds[ONE])
        rows.append(
            Row(
                case=f"fit step, {name}: against one backward",
                contender="epo",
                quantity="time",
                unit="ms",
                values=milliseconds(seconds["epo"]),
                comparison=f"this / {ONE}",
                ratio=plain,
                target=TARGET,
            )
        )
    return rows


def settings(method: str) -> Settings:
    """pf.fit's defaults; the step's number only sets the learning rate."""
    return Settings(method, 1000, 1e-3, 1.0, "dirichlet", 1.0, 0, 1, 1, 0)


def solver_step(engine: pf.Engine, objectives: list[pf.Objective], method: str) -> Callable[[], object]:
    """A step of pf.fit with routers that all solvers share."""
    fit = Run(engine, objectives, get_solver(method, None), settings(method))
    return lambda: fit.step(0)


def one_backward(engine: pf.Engine, objectives: list[pf.Objective]) -> Callable[[], object]:
    """Linear scalarization by one backward pass of the weighted sum."""
    fit = Run(engine, objectives, get_solver("ls", None), settings("ls"))

    def step() -> None:
        (ray,) = torch.from_numpy(fit.sampler.draw(1))
        engine.train_at(ray)
        total = sum(
            share * objective.loss(engine.module, stream.take())
            for share, objective, stream in zip(ray, objectives, fit.streams, strict=True)
        )
        fit.optimizer.zero_grad()
        assert isinstance(total, Tensor)
        total.backward()
        fit.optimizer.step()

    return step


def _check_same_gradient(engine: pf.Engine, objectives: list[pf.Objective]) -> None:
    """The direction of "ls" is the gradient of the weighted sum."""
    ray = [1 / len(objectives)] * len(objectives)
    batches = [next(iter(objective.data)) for objective in objectives]
    engine.train_at(ray)
    jacobian = torch.stack(
        [
            engine.jacobian([objective.loss(engine.module, batch)])[0]
            for objective, batch in zip(objectives, batches, strict=True)
        ]
    )
    engine.train_at(ray)
    losses = [o.loss(engine.module, batch) for o, batch in zip(objectives, batches, strict=True)]
    whole = engine.jacobian([torch.stack(losses).mean()])[0]
    error, scale = (jacobian.mean(0) - whole).abs().max().item(), whole.abs().max().item()
    check(scale > 0 and error <= 1e-4 * scale, f"the two gradients differ by {error:.3g} of {scale:.3g}")


def tower(quick: bool) -> tuple[pf.Engine, list[pf.Objective]]:
    """A small vision tower with 4 experts."""
    torch.manual_seed(0)
    width = 32 if quick else 384
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=width // 16
    )
    base = CLIPVisionModel(config).eval()
    with tempfile.TemporaryDirectory(prefix="paretofuse-") as folder:
        engine = pf.stack(base, clip.write_experts(base, Path(folder), 4))
    batches = clip.batches(base, 2, len(engine.objectives))
    return engine, [
        pf.Objective(name, [batch], clip.classify)
        for name, batch in zip(engine.objectives, batches, strict=True)
    ]


def mlp(quick: bool) -> tuple[pf.Engine, list[pf.Objective]]:
    """A small network, where a solver's own time shows most."""
    torch.manual_seed(0)
    width = 16 if quick else 256
    layers = [part for _ in range(12) for part in (nn.Linear(width, width), nn.Tanh())]
    base = nn.Sequential(*layers)
    experts = {}
    for name in ("a", "b"):
        expert = nn.Sequential(*[part for _ in range(12) for part in (nn.Linear(width, width), nn.Tanh())])
        expert.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in base.state_dict().items()})
        experts[name] = expert

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(module(x), y)

    batch = torch.randn(2, 2, 128, width)
    return pf.stack(base, experts), [
        pf.Objective(name, [tuple(pair)], loss) for name, pair in zip(experts, batch, strict=True)
    ]

"""PWEMoE's procedure, run on this engine, for comparison.

Tang et al., arXiv 2406.09770, as their scripts run it (tanganke/pareto_set_learning, clip_pareto_moe.sh): routers
E -> 2E -> E with ReLU, all weights drawn with standard deviation 0.01 and the last bias at a constant, 0.3 or 0.6,
whatever the preference; everything that is not routed merged at the same constant for each expert; linear scalarization
or EPO at preferences from Dirichlet(1); 4000 steps of Adam at learning rate 1e-2, on a cosine down to a tenth of it.
(fusion-bench's later configurations take 2000 and 8000 steps.) The arithmetic is the engine's, the training procedure
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

import paretofuse as pf

STEPS = 4000
LEARNING_RATE = 1e-2
LEARNING_RATE_END = 0.1
"""The learning rate's share that is left at the end."""
DIRICHLET = 1.0
STARTS = (0.3, 0.6)
"""Every routing weight at the start, and the weight of each expert in tensors that are not routed: both constants that
their scripts try."""


def route_blocks(name: str) -> str | None:
    """PWEMoE's own grouping: a router for each attention block and each MLP block, nothing else routed."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[0] == "blocks" and parts[2] in ("attn", "mlp") else None


GROUPINGS: dict[str, str | Callable[[str], str | None]] = {
    "blocks": route_blocks,
    # Kinder than their own: every module has a router, the head and the embeddings too.
    "modules": "module",
}


def learn(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    objectives: Sequence[pf.Objective],
    grouping: str,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> pf.Engine:
    """Stack with PWEMoE's start and train its routers by PWEMoE's procedure.

    Args:
        base: a TinyViT.
        experts: by objective.
        objectives: data and loss of each.
        grouping: "blocks" (their partial mode's) or "modules" (everything routed).
        steps: optimizer steps.
        seed: of the routers, the preferences and the data's order.
    """
    return learn_routed(base, experts, objectives, GROUPINGS[grouping], steps=steps, seed=seed)


def learn_routed(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    objectives: Sequence[pf.Objective],
    route: str | Callable[[str], str | None],
    *,
    method: str = "ls",
    start: float = STARTS[0],
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> pf.Engine:
    """The same for any model, by a route of its own, either of PWEMoE's solvers ("ls", "epo") and either start."""
    engine = pf.stack(base, experts, route=route, family="scalar", init="constant", static_weight=start)
    engine.routers.reset(seed)
    pf.fit(
        engine,
        objectives,
        method=method,
        steps=steps,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE_END,
        sampler="dirichlet",
        alpha=DIRICHLET,
        corner_every=0,
        preferences_per_step=1,
        seed=seed,
        progress=progress,
    )
    return engine

"""`pf.add_planes`: an engine gets planes that `pf.fit` trains."""

from __future__ import annotations

from dataclasses import replace

from paretofuse.engine.engine import Engine
from paretofuse.engine.layout import Member
from paretofuse.engine.planes.trained import TrainedPlanes
from paretofuse.engine.stacking.stack import lasting
from paretofuse.engine.training.settings import LAST_SEED, check_number


@lasting()
def add_planes(engine: Engine, rank: int = 4, *, seed: int = 0) -> None:
    """Give an engine one trained low-rank plane for each objective, over every routed matrix.

    They change nothing before `pf.fit` trains them, together with the routers, whose coefficients they take like any
    other plane (with `family="rows"` of each row too). `engine.save` stores them as ordinary planes of low rank, so
    that every reader merges them; an engine that is loaded from there does not train them further, but may get others.

    All modules of the engine's own (`module`, `fused_module`, replicas) are made anew.

    Args:
        engine: the engine; its planes become "<objective>.trained", of the same objective.
        rank: of each plane; a matrix with fewer rows or columns takes as many.
        seed: of the planes' random halves.

    Raises:
        ValueError: a rank below 1, or an engine that has trained planes already or is sharded.
        TypeError: not an engine, or a rank that is no whole number.
    """
    if not isinstance(engine, Engine):
        raise TypeError(
            f"got {type(engine).__name__} to add planes to, expected an engine that pf.stack or pf.load made"
        )
    check_number("rank", rank, 1)
    check_number("seed", seed, 0, LAST_SEED)
    if engine.routers.planes is not None:
        raise ValueError(
            "got an engine that has trained planes already, expected one without; save and load it first, which makes "
            "them planes like any other"
        )
    bound, layout = engine._bound, engine.layout
    bound.check_whole("trained planes")
    members = [Member(layout.free_name(f"{name}.trained"), name, 1.0) for name in layout.objectives]
    trained = TrainedPlanes(len(members), layout.with_role("routed"), bound.places, rank, seed)
    stack = replace(
        bound.stack,
        layout=replace(layout, members=(*layout.members, *members)),
        planes=(*bound.stack.planes, *trained.planes),
    )
    engine.routers.append(members)
    engine.routers.planes = trained
    engine._rebind(stack)

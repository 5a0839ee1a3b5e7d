"""Which expert belongs to which objective: one each unless told, or several to one, or to none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paretofuse.engine.layout import Member, one_for_each


def members_of(
    experts: Sequence[str], objectives: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[str, ...], tuple[Member, ...]]:
    """The objectives' names, and each expert's place in the mixture, in the experts' order.

    Args:
        experts: the experts' names, each once.
        objectives: each objective's experts by name; an expert that none has belongs to none. None: an objective for
            each expert, of its name.

    Raises:
        ValueError: no objective, one without an expert, an expert that is not there, or one that two have.
        TypeError: not a dict of lists of names.
    """
    if objectives is None:
        return tuple(experts), one_for_each(experts)
    if not isinstance(objectives, Mapping):
        raise TypeError(
            f"got objectives of type {type(objectives).__name__}, expected a dict {{objective: [its experts]}}"
        )
    owners: dict[str, str] = {}
    for objective, own in objectives.items():
        if not isinstance(own, Sequence) or isinstance(own, str) or not all(isinstance(n, str) for n in own):
            raise TypeError(f"got {own!r} for objective {objective!r}, expected a list of experts' names")
        if not own:
            raise ValueError(
                f"got no experts for objective {objective!r}, expected at least one of {list(experts)}"
            )
        for name in own:
            if name not in experts:
                raise ValueError(
                    f"got expert {name!r} for objective {objective!r}, expected some of {list(experts)}; correct the "
                    "name, or give its model too"
                )
            if name in owners:
                raise ValueError(
                    f"got expert {name!r} for objective {owners[name]!r} and for {objective!r}, expected it once: an "
                    "expert belongs to one objective, or to none"
                )
            owners[name] = str(objective)
    names = tuple(str(name) for name in objectives)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"got objectives {list(objectives)}, expected at least one, with names that differ")
    counts = {name: len(own) for name, own in zip(names, objectives.values(), strict=True)}
    return names, tuple(
        Member(name, owners.get(name), 1 / counts[owners[name]] if name in owners else 0.0)
        for name in experts
    )

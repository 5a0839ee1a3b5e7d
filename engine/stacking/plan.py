"""What will be stacked: check that base and experts fit, from names, shapes and dtypes alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paretofuse.engine.errors import CheckpointError, some
from paretofuse.engine.layout import MERGED_DTYPES, Layout, Role, TensorSpec, is_text
from paretofuse.engine.methods.transform import Transform
from paretofuse.engine.planes.choose import Wanted
from paretofuse.engine.routing.groups import Route, assign_groups
from paretofuse.engine.stacking.members import members_of
from paretofuse.engine.stacking.misfit import Norms
from paretofuse.engine.stacking.sharding import check_alike
from paretofuse.engine.stacking.sources import Source, TensorInfo, dtype_name


@dataclass(frozen=True)
class Plan:
    """What will be stacked.

    Attributes:
        layout: the tensor table.
        base: the base's source.
        experts: each expert's source, by its name.
        heads: for each objective, the names of its own tensors: those of its first expert.
        dtype: safetensors dtype that everything is converted to, or None.
        planes: the format that was asked for.
        notes: what a user should know (mixed dtypes and the like), a sentence each.
        norms: filled while the tensors are read; says then which experts may not belong to the base.
        transform: what is done to every expert's differences; None for nothing.
    """

    layout: Layout
    base: Source
    experts: Mapping[str, Source]
    heads: Mapping[str, tuple[str, ...]]
    dtype: str | None
    planes: Wanted
    notes: tuple[str, ...]
    norms: Norms = field(default_factory=Norms)
    transform: Transform | None = None

    def head_expert(self, objective: str) -> Source:
        """The expert whose head an objective has."""
        return self.experts[self.layout.first_expert(objective)]


def make_plan(
    base: Source,
    experts: Mapping[str, Source],
    *,
    route: str | Route,
    static_weight: float,
    dtype: str | None,
    delta_dtype: str | None,
    heads: Sequence[str],
    planes: Wanted,
    objectives: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """Check that base and experts fit together and lay out their tensors.

    Args:
        base: the base model.
        experts: the experts by name; at least one.
        route: "mlp", "module", "tensor" or a callable name -> group or None.
        static_weight: weight of every expert in tensors that are not routed.
        dtype: safetensors dtype for base and deltas; None keeps each base tensor's.
        delta_dtype: safetensors dtype for the deltas; None takes the base's.
        heads: names, dotted prefixes or globs of tensors that belong to one objective each.
        planes: the planes' format.
        objectives: which experts belong to which objective, see `members_of`.

    Raises:
        CheckpointError: names, shapes or dtypes do not fit; the message names the tensor and both sides.
        ValueError: no expert, an unusable route, a non-finite static weight, or objectives that do not fit the experts.
    """
    if not experts:
        raise ValueError("got no experts, expected at least one, as {name: model}")
    if isinstance(heads, str) or not all(isinstance(pattern, str) for pattern in heads or ()):
        raise TypeError(f"got heads={heads!r}, expected a list of names such as ['classifier']")
    heads = tuple(heads or ())
    names, members = members_of(tuple(experts), objectives)
    for kind, given in (("expert", tuple(experts)), ("objective", names)):
        if not all(name and not set(name) & set("\n\r\0") and is_text(name) for name in given):
            raise ValueError(f"got {kind} names {list(given)}, expected non-empty single lines of Unicode")
    if not isinstance(static_weight, (int, float)) or not abs(static_weight) < float("inf"):
        raise ValueError(f"got static_weight={static_weight!r}, expected a finite number such as 0.3")

    _check_heads(base, experts, heads)
    own = {name: _check_names(base, expert, heads) for name, expert in experts.items()}
    is_head = {name for name in base.infos if _matches(name, heads)}
    merged: list[tuple[str, str]] = []
    for name, info in base.infos.items():
        stored = dtype_name(info, base.label, name)
        if _is_constant(info) or name in base.constants or name in is_head:
            continue
        if info.dtype.is_complex:
            raise CheckpointError(
                f"{base.label}: tensor {name!r} is {info.dtype}, and complex numbers are not merged; store it as "
                "torch.view_as_real(...) in the base and in every expert"
            )
        if dtype is None and stored not in MERGED_DTYPES:
            raise CheckpointError(
                f"{base.label}: tensor {name!r} is {info.dtype}, which cannot be merged; pass dtype=torch.float32 "
                "(or bfloat16, float16) to convert"
            )
        merged.append((name, dtype or stored))
    groups = assign_groups([name for name, _ in merged], route)
    merged_dtype = dict(merged)
    aliases: dict[str, list[str]] = {}
    for alias, name in base.aliases.items():
        aliases.setdefault(name, []).append(alias)

    specs = []
    for name, info in base.infos.items():
        role: Role = (
            "constant" if name not in merged_dtype else "static" if groups[name] is None else "routed"
        )
        stored = merged_dtype.get(name) or _constant_dtype(info, base.label, name, dtype)
        specs.append(
            TensorSpec(
                name=name,
                shape=info.shape,
                dtype=stored,
                role=role,
                group=groups.get(name),
                delta_dtype=(delta_dtype or stored) if role != "constant" else stored,
                aliases=tuple(aliases.get(name, ())),
            )
        )
    layout = Layout(names, tuple(specs), float(static_weight), members)
    kept = {objective: own[layout.first_expert(objective)] for objective in names}
    return Plan(layout, base, dict(experts), kept, dtype, planes, _notes(layout, base, experts, own))


def _constant_dtype(info: TensorInfo, label: str, name: str, dtype: str | None) -> str:
    """The dtype of a tensor that is not merged: converted with the rest of the model if it is a float."""
    return dtype if dtype is not None and info.dtype.is_floating_point else dtype_name(info, label, name)


def _is_constant(info: TensorInfo) -> bool:
    """Integers and booleans are never merged."""
    return not (info.dtype.is_floating_point or info.dtype.is_complex)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is, lies under, or globs to one of the patterns."""
    return any(
        name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def _check_heads(base: Source, experts: Mapping[str, Source], heads: Sequence[str]) -> None:
    """ValueError where a pattern names no stored tensor: what was meant would be merged like any other."""
    sources = (base, *experts.values())
    names = {name for source in sources for name in source.infos}
    ties = {alias: name for source in sources for alias, name in source.aliases.items()}
    for pattern in heads:
        if any(_matches(name, [pattern]) for name in names):
            continue
        tied = next(
            (
                f"; {alias!r} is tied to {name!r}"
                for alias, name in ties.items()
                if _matches(alias, [pattern])
            ),
            "",
        )
        raise ValueError(
            f"got heads={list(heads)}, but {pattern!r} matches no tensor{tied}; correct the name, or name what it "
            "is tied to"
        )


def _check_names(base: Source, expert: Source, heads: Sequence[str]) -> tuple[str, ...]:
    """Compare names and shapes; returns the expert's own tensors (its head).

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape, and not declared a head.
    """
    own = {name: expert.aliases.get(name, name) for name in base.infos}
    shared = {name: theirs for name, theirs in own.items() if theirs in expert.infos}
    check_alike(base.blueprint.shardings, expert.blueprint.shardings, shared, (expert.label, base.label))
    theirs = {**expert.infos, **{a: expert.infos[n] for a, n in expert.aliases.items()}}
    ours = {**base.infos, **{a: base.infos[n] for a, n in base.aliases.items()}}
    head = tuple(name for name in expert.infos if _matches(name, heads))
    known = {*ours, *head}
    extra = [
        name
        for name in theirs
        if name not in known and expert.aliases.get(name) not in known and name not in expert.constants
    ]
    missing = (
        []
        if expert.is_delta
        else [
            name
            for name, info in base.infos.items()
            if name not in theirs
            and not _is_constant(info)
            and name not in base.constants
            and not _matches(name, heads)
        ]
    )
    if extra or missing:
        raise CheckpointError(
            f"{expert.label} and {base.label} do not fit. "
            + _name_advice(extra, missing, list(ours), list(theirs))
        )
    for name, info in theirs.items():
        if name in head or name not in ours or _is_constant(ours[name]) or name in base.constants:
            continue
        if info.shape != ours[name].shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(info.shape)} in {expert.label} and {list(ours[name].shape)} in "
                f"{base.label}; shapes must be equal, or declare it a head: heads=[{name.rpartition('.')[0] or name!r}]"
            )
    for alias, name in base.aliases.items():
        # A tie that an expert has broken cannot be stored once.
        both = alias in expert.infos and name in expert.infos and not expert.is_delta
        if both and not expert.equal(alias, name):
            raise CheckpointError(
                f"{base.label} ties {alias!r} to {name!r}, but {expert.label} has different values for them; "
                "untie the base first"
            )
    return head


def _name_advice(extra: list[str], missing: list[str], ours: list[str], theirs: list[str]) -> str:
    """Which names differ, and what to do."""
    parts = []
    if missing:
        parts.append(f"Missing in the expert: {some(missing)}.")
    if extra:
        parts.append(f"Only in the expert: {some(extra)}.")
    first = ours[0] if ours else ""
    prefixes = {name[: -len(first)] for name in theirs if first and name.endswith(f".{first}")}
    prefix = next((p for p in prefixes if all(p + name in theirs for name in ours)), None)
    if prefix:
        parts.append(
            f"The expert's names carry the prefix {prefix!r}: stack its submodule {prefix[:-1]!r} instead."
        )
    else:
        parts.append('Tensors that belong to one objective only are declared by heads=["prefix", ...].')
    return " ".join(parts)


def _notes(
    layout: Layout, base: Source, experts: Mapping[str, Source], own: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """What was converted, and whose head was left out, a sentence each."""
    notes = [note for source in (base, *experts.values()) for note in source.notes]
    firsts = {objective: layout.first_expert(objective) for objective in layout.objectives}
    for member in layout.members:
        first = firsts.get(member.objective or "")
        if own[member.plane] and member.plane != first:
            notes.append(
                f"{member.plane}: its head is left out, as "
                + (
                    "it belongs to no objective"
                    if first is None
                    else f"{member.objective} has that of {first}"
                )
            )
    for name, expert in experts.items():
        pairs: dict[tuple[str, str, str], int] = {}
        for spec in layout.with_role("routed", "static"):
            theirs = expert.aliases.get(spec.name, spec.name)
            if theirs not in expert.infos:
                continue
            found = dtype_name(expert.infos[theirs], expert.label, theirs)
            original = dtype_name(base.infos[spec.name], base.label, spec.name)
            if not found == original == spec.dtype == spec.delta_dtype:
                key = (found, original, f"base {spec.dtype}, deltas {spec.delta_dtype}")
                pairs[key] = pairs.get(key, 0) + 1
        notes += [
            f"{name}: {count} tensors are {found} in the expert and {ours} in the base; stored as {stored}"
            for (found, ours, stored), count in pairs.items()
        ]
    return tuple(notes)

"""`paretofuse info`: what a store holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from paretofuse.cli.options import add_store, add_threads, add_verify
from paretofuse.cli.running import Result, bytes_bar, size
from paretofuse.engine.layout import Layout, one_for_each

if TYPE_CHECKING:
    from paretofuse.engine.store.reader import Store

SUMMARY = "say what a store holds"
EXAMPLE = "paretofuse info gpt2.store --verify"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    add_store(parser)
    parser.add_argument(
        "--planes",
        action="store_true",
        help="list every plane: its format, bytes and error of the merged update",
    )
    add_verify(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> Result:
    """Describe a store and, where asked for, check every byte of it."""
    text, document = describe(options.store)
    if options.planes:
        document["plane_table"] = table = plane_table(options.store)
        text = "\n".join([text, *map(_table_line, table)])
    if options.verify:
        from paretofuse.engine.store import reader

        with bytes_bar(options, "verify") as progress:
            reader.Store.open(options.store).verify(progress, options.threads)
        text = f"{text}\nchecksums     all files are as they were written"
        document["verified"] = True
    return text, document, 0


def describe(path: str) -> tuple[str, dict[str, Any]]:
    """A store in lines for people and as a document for --json."""
    from paretofuse.engine.store import reader

    store = reader.Store.open(path)
    layout = store.layout
    parameters = {
        role: sum(spec.numel for spec in layout.with_role(role)) for role in ("routed", "static", "constant")
    }
    document: dict[str, Any] = {
        "path": path,
        "objectives": list(layout.objectives),
        "experts": {member.plane: member.objective for member in layout.members},
        "groups": len(layout.groups),
        "tensors": len(layout.tensors),
        "parameters": parameters,
        "dtypes": sorted({spec.dtype for spec in layout.tensors if spec.role != "constant"}),
        "delta_dtypes": sorted({spec.delta_dtype for spec in layout.tensors if spec.role != "constant"}),
        "static_weight": layout.static_weight,
        "init": store.init,
        "family": store.family,
        "router_parameters": sum(array.size for array in store.routers.values()),
        "router_bytes": sum(array.nbytes for array in store.routers.values()),
        "heads": {objective: sorted(own) for objective, own in store.heads.items()},
        "model_class": store.model_class,
        "trained": store.trained,
        "training": store.training,
        "model_files": sorted(store.model_files()),
        "bytes": sum(size for size, _ in store.checksums.values()),
        "created_by": store.created_by,
    }
    document["planes"] = _by_format(_table_of(store))
    counts = ", ".join(f"{count:,} {role}" for role, count in parameters.items() if count)
    heads = ", ".join(f"{objective} ({len(own)} tensors)" for objective, own in store.heads.items())
    rows = {
        "store": f"{path} ({size(document['bytes'])}, {document['created_by']})",
        "objectives": ", ".join(layout.objectives),
        "experts": _experts_line(layout),
        "model": store.model_class or "not recorded",
        "parameters": counts,
        "dtypes": f"base {'/'.join(document['dtypes'])}, deltas {'/'.join(document['delta_dtypes'])}",
        "planes": "; ".join(_plane_line(kind, own) for kind, own in document["planes"].items()) or "none",
        "routing": f"{len(layout.groups)} groups, family {store.family}, {document['router_parameters']:,} router "
        f"parameters ({size(document['router_bytes'])}), {store.init}",
        "training": reader.describe_training(store.training) if store.trained else "none",
        "static weight": f"{layout.static_weight:g}",
        "heads": heads or "none",
        "model files": ", ".join(document["model_files"]) or "none",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items()), document


def plane_table(path: str) -> list[dict[str, Any]]:
    """Every plane of a store: expert and its objective, tensor, format, bytes and error (None: not measured)."""
    from paretofuse.engine.store.reader import Store

    return _table_of(Store.open(path))


def _table_of(store: Store) -> list[dict[str, Any]]:
    rows = []
    for member, deltas, planes in zip(store.layout.members, store.deltas, store.planes, strict=True):
        found = {name: ("dense", view.nbytes, None) for name, view in deltas.items()} | {
            name: (plane.format, plane.values.nbytes + plane.factors.nbytes, plane.error)
            for name, plane in planes.items()
        }
        for spec in store.layout.tensors:
            if spec.name in found:
                own = dict(zip(("format", "bytes", "error"), found[spec.name], strict=True))
                names = {"expert": member.plane, "objective": member.objective, "tensor": spec.name}
                rows.append({**names, **own})
    return rows


def _experts_line(layout: Layout) -> str:
    """Which experts belong to which objective."""
    if layout.members == one_for_each(layout.objectives):
        return "one for each objective"
    owners = (*layout.objectives, None)
    found = {o: [m.plane for m in layout.members if m.objective == o] for o in owners}
    return "; ".join(f"{', '.join(own)} of {o or 'no objective'}" for o, own in found.items() if own)


def _table_line(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f", error {row['error']:.3g}"
    return f"{row['expert']}: {row['tensor']}: {row['format']}, {size(row['bytes'])}{error}"


def _by_format(table: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By format: how many planes a store holds, their bytes, and the largest error of a merged update."""
    found: dict[str, dict[str, Any]] = {}
    for row in table:
        own = found.setdefault(row["format"], {"count": 0, "bytes": 0, "largest_error": None})
        own["count"] += 1
        own["bytes"] += row["bytes"]
        if row["error"] is not None:
            own["largest_error"] = max(row["error"], own["largest_error"] or 0.0)
    return found


def _plane_line(kind: str, own: dict[str, Any]) -> str:
    error = "" if own["largest_error"] is None else f", error up to {own['largest_error']:.3g}"
    return f"{own['count']} {kind} ({size(own['bytes'])}{error})"

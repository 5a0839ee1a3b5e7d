"""The command line: stack, info, merge, sweep, export, doctor. Only stack, sweep and export import torch.

Exit codes: 0 done, 1 the work failed (one message on stderr), 2 wrong usage, 130 interrupted, 141 nobody reads what it
prints any more (as in `paretofuse info STORE | head -1`; the work itself is done).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import paretofuse
from paretofuse.cli.options import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: the words after the program's name; those of the process unless given.
    """
    try:
        try:
            return _run(arguments)
        finally:  # also after --help, which leaves by SystemExit
            if sys.stdout is not None:  # a process may be started without one
                sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        return 141
    except OSError as error:  # of stdout itself (a full disk): the commands report their own
        print(f"paretofuse: error: stdout: {error.strerror}", file=sys.stderr)
        _silence()
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        text, document, code = _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("paretofuse: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # one line for the user; --traceback for whoever needs to look inside
        if options.traceback:
            traceback.print_exc()
        print(f"paretofuse: error: {_message(error)}", file=sys.stderr)
        return 1
    print(json.dumps(document, indent=1) if options.json else text)
    return code


def _silence() -> None:
    """Send to nowhere what stdout or stderr cannot get rid of; Python would try once more as it exits, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


_Result = tuple[str, dict[str, Any], int]
"""What a command returns: a text for people, a document for --json, the exit code."""


def _message(error: Exception) -> str:
    if isinstance(error, ValueError | ImportError) and str(error):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _stack(options: argparse.Namespace) -> _Result:
    import torch

    from paretofuse.api import stack_to_store

    started = time.perf_counter()
    with _bar(options, "stack", "param", None) as update:
        notes = stack_to_store(
            options.base,
            dict(options.expert),
            options.output,
            route=options.route,
            init=options.init,
            static_weight=options.static_weight,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            delta_dtype=getattr(torch, options.delta_dtype) if options.delta_dtype else None,
            heads=options.head,
            progress=update,
        )
    seconds = time.perf_counter() - started
    text, document = _describe(options.output)
    lines = [*(f"note: {note}" for note in notes), text, f"stacked in {seconds:.1f} s"]
    return "\n".join(lines), {**document, "notes": list(notes), "seconds": seconds}, 0


def _info(options: argparse.Namespace) -> _Result:
    text, document = _describe(options.store)
    if options.verify:
        from paretofuse.engine.store.reader import Store

        with _bytes_bar(options, "verify") as progress:
            Store.open(options.store).verify(progress)
        text, document = (
            f"{text}\nchecksums     all files are as they were written",
            {**document, "verified": True},
        )
    return text, document, 0


def _merge(options: argparse.Namespace) -> _Result:
    from paretofuse.engine.merging.disk import merge_store

    started = time.perf_counter()
    with _bytes_bar(options, "merge") as progress:
        merged = merge_store(
            options.store,
            options.preference,
            options.output,
            head=options.head,
            threads=options.threads,
            isa=options.isa,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    document = {
        "path": str(merged.path),
        "preference": options.preference,
        "head": options.head,
        "tensors": merged.tensors,
        "bytes": merged.nbytes,
        "isa": merged.isa,
        "seconds": seconds,
    }
    text = f"{merged.path}: {merged.tensors} tensors, {_size(merged.nbytes)}, {seconds:.2f} s ({merged.isa})"
    return text, document, 0


def _sweep(options: argparse.Namespace) -> _Result:
    from paretofuse.engine.evaluation.arguments import plain_point, reference_point
    from paretofuse.outputs import prepare_file

    # All that can go wrong at the end is tried here, before the long work.
    if options.plot and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'paretofuse[plot]'")
    if options.reference is not None:
        plain_point(options.reference)
    evaluate = _entry_point("--evaluate", options.evaluate)
    module = _entry_point("--module", options.module)() if options.module else None
    if options.plot:
        plots = import_module("paretofuse.fronts.plots")
        plots.check_path(options.plot)
        prepare_file(options.plot)
    prepare_file(options.output)
    engine = paretofuse.load(options.store, device=options.device, module=module)

    def check(metrics: tuple[str, ...]) -> None:
        if options.reference is not None:
            reference_point(options.reference, metrics)
        if options.plot:
            plots.check_shape(len(engine.objectives), len(metrics))

    grid = paretofuse.simplex_grid(len(engine.objectives), options.points)
    front = paretofuse.sweep(
        engine,
        evaluate,
        grid,
        maximize=not options.minimize,
        progress=_shows_progress(options),
        on_metrics=check,
    )
    front.to_csv(options.output)
    if options.plot:
        front.plot(options.plot)
    document: dict[str, Any] = {
        "objectives": list(front.objectives),
        "metrics": list(front.metrics),
        "preferences": front.preferences.tolist(),
        "values": front.values.tolist(),
        "non_dominated": front.non_dominated().tolist(),
        "csv": options.output,
        "plot": options.plot,
    }
    lines = [f"{options.output}: {len(front)} preferences, {int(front.non_dominated().sum())} not dominated"]
    if options.reference is not None:
        document["hypervolume"] = front.hypervolume(options.reference)
        lines.append(f"hypervolume {document['hypervolume']:.6g}")
    lines += [options.plot] if options.plot else []
    return "\n".join(lines), document, 0


def _export(options: argparse.Namespace) -> _Result:
    inputs = _entry_point("--inputs", options.inputs)() if options.inputs else None
    module = _entry_point("--module", options.module)() if options.module else None
    engine = paretofuse.load(options.store, device=options.device, module=module)
    started = time.perf_counter()
    path = paretofuse.export(
        engine,
        options.output,
        inputs,
        dynamic=options.dynamic,
        preference=options.preference,
        head=options.head,
    )
    seconds, nbytes = time.perf_counter() - started, path.stat().st_size
    document = {"path": str(path), "bytes": nbytes, "preference": options.preference, "seconds": seconds}
    return f"{path}: {_size(nbytes)}, {seconds:.1f} s", document, 0


def _doctor(options: argparse.Namespace) -> _Result:
    from paretofuse.cli.doctor import examine

    report = examine(options.full)
    return report.to_text(), report.to_dict(), 1 if report.problems else 0


def _describe(path: str) -> tuple[str, dict[str, Any]]:
    from paretofuse.engine.store.reader import Store

    store = Store.open(path)
    layout = store.layout
    parameters = {
        role: sum(spec.numel for spec in layout.with_role(role)) for role in ("routed", "static", "constant")
    }
    document: dict[str, Any] = {
        "path": path,
        "objectives": list(layout.objectives),
        "groups": len(layout.groups),
        "tensors": len(layout.tensors),
        "parameters": parameters,
        "dtypes": sorted({spec.dtype for spec in layout.tensors if spec.role != "constant"}),
        "delta_dtypes": sorted({spec.delta_dtype for spec in layout.tensors if spec.role != "constant"}),
        "static_weight": layout.static_weight,
        "init": store.init,
        "router_parameters": sum(array.size for array in store.routers.values()),
        "heads": {objective: sorted(own) for objective, own in store.heads.items()},
        "model_class": store.model_class,
        "model_files": list(store.manifest.model_files),
        "bytes": sum(record.bytes for record in store.manifest.files.values()),
        "created_by": store.manifest.created_by,
    }
    counts = ", ".join(f"{count:,} {role}" for role, count in parameters.items() if count)
    heads = ", ".join(f"{objective} ({len(own)} tensors)" for objective, own in store.heads.items())
    rows = {
        "store": f"{path} ({_size(document['bytes'])}, {document['created_by']})",
        "objectives": ", ".join(layout.objectives),
        "model": store.model_class or "not recorded",
        "parameters": counts,
        "dtypes": f"base {'/'.join(document['dtypes'])}, deltas {'/'.join(document['delta_dtypes'])}",
        "routing": f"{len(layout.groups)} groups, {document['router_parameters']} router parameters, {store.init}",
        "static weight": f"{layout.static_weight:g}",
        "heads": heads or "none",
        "model files": ", ".join(store.manifest.model_files) or "none",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items()), document


def _entry_point(option: str, text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    function: Any = import_module(module)
    for part in name.split("."):
        if not hasattr(function, part):
            raise ValueError(f"got {option} {text}, but {module} has no {name!r}; check the spelling")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"got {option} {text}, which is a {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]


def _shows_progress(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


@contextmanager
def _bar(
    options: argparse.Namespace, name: str, unit: str, total: int | None
) -> Iterator[Callable[[int], None] | None]:
    """A progress bar's update function, or None where there is nobody to see one."""
    if not _shows_progress(options):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, unit_scale=True, total=total, file=sys.stderr) as bar:
        yield lambda done: bar.update(done) and None


@contextmanager
def _bytes_bar(options: argparse.Namespace, name: str) -> Iterator[Callable[[int, int], None] | None]:
    """The same for work that reports the bytes done so far and the bytes in all."""
    if not _shows_progress(options):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


_COMMANDS: dict[str, Callable[[argparse.Namespace], _Result]] = {
    "stack": _stack,
    "info": _info,
    "merge": _merge,
    "sweep": _sweep,
    "export": _export,
    "doctor": _doctor,
}

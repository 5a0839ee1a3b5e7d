"""What `sweep` and `search` make of a front: a table, a picture, a page, a hypervolume."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from paretofuse.cli.options import add_output, named_numbers
from paretofuse.cli.running import Result, in_options

if TYPE_CHECKING:
    from paretofuse.fronts.front import Front


def add_front(parser: argparse.ArgumentParser, reference: str) -> None:
    """Where the front goes, and which way is better; `reference`: what the reference point is for."""
    add_output(parser, "CSV", "table to write")
    parser.add_argument("--plot", metavar="PNG", help="picture to write")
    parser.add_argument("--html", metavar="HTML", help="page to write, to explore the front in a browser")
    parser.add_argument("--minimize", action="store_true", help="smaller numbers are better, as with losses")
    parser.add_argument("--reference", type=named_numbers, metavar="NAME=VALUE,...", help=reference)


def prepare_front_files(options: argparse.Namespace) -> None:
    """Try before the long work what would fail at its end.

    Raises:
        ImportError: what draws a picture or a page is missing.
        ValueError: the picture's or the page's name has no known ending, two of the files are one, or the reference
            point is not finite.
        OSError: nothing can be written there.
    """
    from paretofuse.engine.evaluation.arguments import plain_point
    from paretofuse.outputs import prepare_file

    if options.plot and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib; pip install 'paretofuse[plot]'")
    if options.html and find_spec("plotly") is None:
        raise ImportError("--html needs plotly; pip install 'paretofuse[serve]'")
    if options.reference is not None:
        plain_point(options.reference)
    if options.plot:
        from paretofuse.fronts.plots import check_path

        check_path(options.plot)
        prepare_file(options.plot)
    if options.html:
        if not options.html.lower().endswith((".html", ".htm")):
            raise ValueError(f"got page {options.html!r}, expected a name that ends in .html")
        prepare_file(options.html)
    files = [path for path in (options.output, options.plot, options.html) if path]
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise ValueError(
            f"got {', '.join(map(repr, files))} for the table and what shows it, expected other names"
        )


def check_front(options: argparse.Namespace, objectives: int, metrics: tuple[str, ...]) -> None:
    """Whether the reference point and the picture fit the metrics, known from the first evaluation on.

    Raises:
        ValueError: they do not.
    """
    from paretofuse.engine.evaluation.arguments import reference_point

    if options.reference is not None:
        reference_point(options.reference, metrics)
    if options.plot:
        from paretofuse.fronts.plots import check_shape

        check_shape(objectives, len(metrics))


def write_front(options: argparse.Namespace, front: Front) -> Result:
    """Draw the front, whose table is there already, and tell of it."""
    if options.plot:
        front.plot(options.plot)
    if options.html:
        front.to_html(options.html)
    notes = [in_options(note, vars(options)) for note in front.notes]
    document: dict[str, Any] = {
        "objectives": list(front.objectives),
        "metrics": list(front.metrics),
        "preferences": front.preferences.tolist(),
        "values": front.values.tolist(),
        "non_dominated": front.non_dominated().tolist(),
        "notes": notes,
        "csv": options.output,
        "plot": options.plot,
        "html": options.html,
    }
    lines = [f"note: {note}" for note in notes]
    lines.append(
        f"{options.output}: {len(front)} preferences, {int(front.non_dominated().sum())} not dominated"
    )
    if options.reference is not None:
        document["hypervolume"] = front.hypervolume(options.reference)
        lines.append(f"hypervolume {document['hypervolume']:.6g}")
    lines += [path for path in (options.plot, options.html) if path]
    return "\n".join(lines), document, 0

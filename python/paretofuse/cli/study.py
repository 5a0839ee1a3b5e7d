"""`paretofuse study`: everything that a file names, from checkpoints to a report, as far as it is not done yet."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paretofuse.cli.options import add_force, add_output
from paretofuse.cli.running import Result, entry_point

SUMMARY = "do a whole study from one file: stack, fit, sweep, models and a report"
EXAMPLE = "paretofuse study paretofuse.toml"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    parser.add_argument(
        "file", metavar="FILE", help="the study: TOML or YAML; relative paths in it count from its own folder"
    )
    add_output(parser, "DIR", "folder of all results (default: the file's out)", required=False)
    parser.add_argument("--dry-run", action="store_true", help="only say which steps would be done, and why")
    parser.add_argument("--serve", action="store_true", help="then serve the store and its front, by [serve]")
    add_force(parser)


def run(options: argparse.Namespace) -> Result:
    """Do every step that is not done yet or whose inputs changed, write the report, and serve where that is wanted."""
    from paretofuse.cli.program import COMMANDS
    from paretofuse.cli.studies.file import read_study
    from paretofuse.cli.studies.record import Record, inputs_of
    from paretofuse.cli.studies.report import versions, write_report

    file = Path(options.file)
    out = Path(os.path.abspath(options.output)) if options.output else None
    study = read_study(file, out, COMMANDS)
    if find_spec("plotly") is None:
        raise ImportError('a study\'s report needs plotly; pip install "paretofuse[study]"')
    lines, done = [], {}
    with _within(file.resolve().parent):
        record = Record(study.out)
        for step in (
            *study.steps,
            *([study.server] if options.serve else []),
        ):  # what is misspelt at the end is found before the long work
            if not record.is_done(step) or record.changes(step, inputs_of(step)):
                for option, text in step.entries.items():
                    entry_point(f"[{step.name}] {option}", text)
        restacked = False  # in a dry run: whether what follows would have a new store
        for step in study.steps:
            inputs = inputs_of(step)
            changes = record.changes(step, inputs)
            if record.is_done(step) and not changes and not restacked:
                lines.append(f"{step.name}: done before")
                continue
            reason = f", as {', '.join(changes)} changed" if changes else ""
            if options.dry_run:
                lines.append(f"{step.name}: would be done{reason}")
                restacked |= step.command in ("stack", "fit")
                continue
            if changes and step.command == "fit" and step.folder.exists() and not options.force:
                raise ValueError(
                    f"{file.name}: [fit] was begun already, and {', '.join(changes)} changed since; its training would "
                    "be lost: pass --force to train anew, or give another out"
                )
            if changes or changes is None:
                shutil.rmtree(step.folder, ignore_errors=True)
            record.begin(step, inputs)
            if not options.quiet and not options.json:
                print(f"{step.name} ...", file=sys.stderr, flush=True)
            text, document, seconds = _do(COMMANDS[step.command], step, options)
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record.finish(
                step,
                {
                    "text": text,
                    "document": document,
                    "seconds": seconds,
                    "when": when,
                    "versions": versions(),
                },
            )
            done[step.name] = document
            lines.append(f"{step.name}: done in {seconds:.1f} s\n{text}")
        report: Any = None if options.dry_run else str(write_report(study, record))
        if report is not None:
            lines.append(f"{report}: the report")
        if options.serve and not options.dry_run:
            lines.append(_do(COMMANDS["serve"], study.server, options)[0])
    return "\n".join(lines), {"out": str(study.out), "report": report, "steps": done}, 0


def _do(module: Any, step: Any, options: argparse.Namespace) -> tuple[str, dict[str, Any], float]:
    """Run a step's command as the program would; returns its text, its document and the seconds."""
    for name in ("quiet", "json", "traceback"):
        setattr(step.options, name, getattr(options, name))
    step.folder.parent.mkdir(parents=True, exist_ok=True)
    if step.output != step.folder:
        step.folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    try:
        text, document, _ = module.run(step.options)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"in the step {step.name}")
        raise
    return text, document, time.perf_counter() - started


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Work in the study's folder, so that its paths and its modules are found from there."""
    before = os.getcwd()
    os.chdir(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)

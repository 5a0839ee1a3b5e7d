"""A study's report: the page of its front, and below it settings, commands and versions."""

from __future__ import annotations

import html
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paretofuse.cli.studies.file import Study
from paretofuse.cli.studies.record import Record
from paretofuse.fronts.front import Front
from paretofuse.fronts.html import write_html

REPORT = "report.html"
_PACKAGES = ("paretofuse", "torch", "numpy", "transformers", "peft", "optuna", "lm_eval", "open_clip_torch")


def versions() -> dict[str, str]:
    """Of what computes here, as far as it is installed."""
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_report(study: Study, record: Record) -> Path:
    """Write report.html into the study's folder: one file, which opens without a server.

    Raises:
        ImportError: plotly is missing.
    """
    (_, first), *more = ((name, Front.from_csv(path)) for name, path in study.fronts.items())
    others = {name: front for name, front in more if front.metrics == first.metrics}
    path = study.out / REPORT
    write_html(
        first,
        path,
        others=others,
        title=study.title,
        store=str(study.store),
        report=_sections(study, record),
    )
    return path


def _sections(study: Study, record: Record) -> str:
    rows = []
    for step in study.steps:
        done: Mapping[str, Any] = record.steps[step.name]["done"]
        command = shlex.join(["paretofuse", step.command, *step.words])
        rows.append(
            f"<tr><th scope='row'>{_safe(step.name)}</th><td>{_pre(command)}{_pre(done['text'])}</td>"
            f"<td>{_safe(done['when'])}</td><td>{done['seconds']:.1f} s</td></tr>"
        )
    serve = shlex.join(["paretofuse", "serve", *study.server.words])
    made = {
        name: v for step in study.steps for name, v in record.steps[step.name]["done"]["versions"].items()
    }
    table = "".join(f"<tr><th scope='row'>{_safe(k)}</th><td>{_safe(v)}</td></tr>" for k, v in made.items())
    return f"""<section aria-labelledby="steps-heading">
    <h2 id="steps-heading">How this was made</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Steps"><table id="steps">
    <tr><th>step</th><th>command and result</th><th>when</th><th>took</th></tr>{"".join(rows)}</table></div>
    <p>To serve it:</p>{_pre(serve)}
  </section>
  <section aria-labelledby="settings-heading">
    <h2 id="settings-heading">The study's file</h2>
    {_pre(study.text)}
  </section>
  <section aria-labelledby="versions-heading">
    <h2 id="versions-heading">Versions</h2>
    <table id="versions">{table}</table>
  </section>"""


def _pre(text: str) -> str:
    return f'<pre tabindex="0"><code>{_safe(text)}</code></pre>'


def _safe(text: str) -> str:
    """Text as HTML; the page's own comments name places to fill, so none may come from here."""
    return html.escape(text)

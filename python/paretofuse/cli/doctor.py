"""What `paretofuse doctor` finds out about this machine and installation, without importing torch unless asked."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import paretofuse
from paretofuse.cli.running import Result

REQUIRED = ("moocore", "numpy", "safetensors", "torch", "tqdm")
OPTIONAL = {
    "triton": "GPU kernels",
    "transformers": "Hugging Face models: pip install 'paretofuse[hf]'",
    "peft": "LoRA experts need none of it, only the directory",
    "open_clip_torch": "open_clip models: pip install 'paretofuse[openclip]'",
    "matplotlib": "plots: pip install 'paretofuse[plot]'",
}


@dataclass
class Report:
    """The findings.

    Attributes:
        versions: paretofuse, Python and the required packages; None where one is missing.
        optional: the optional packages, likewise.
        system: operating system and machine.
        threads: threads that a merge would use.
        instruction_sets: those that the native extension has code for, and whether this machine can use them.
        chosen: the instruction set that would run now, or None if none can.
        forced: what PARETOFUSE_ISA says, if it is set.
        accelerators: what tells of a GPU without importing torch.
        torch: what torch itself says; empty unless asked for.
        problems: what keeps ParetoFuse from working, with the remedy.
    """

    versions: dict[str, str | None]
    optional: dict[str, str | None]
    system: str
    threads: int
    instruction_sets: dict[str, bool] = field(default_factory=dict)
    chosen: str | None = None
    forced: str | None = None
    accelerators: dict[str, str] = field(default_factory=dict)
    torch: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def to_text(self) -> str:
        """For people."""
        lines = [f"{name:<18}{found or 'missing'}" for name, found in self.versions.items()]
        lines += [f"{'system':<18}{self.system}", f"{'threads':<18}{self.threads}"]
        for name, usable in self.instruction_sets.items():
            state = "chosen" if name == self.chosen else "usable" if usable else "not on this machine"
            lines.append(f"{name:<18}{state}")
        if self.forced:
            lines.append(f"{'PARETOFUSE_ISA':<18}{self.forced}")
        lines += [f"{name:<18}{found}" for name, found in self.accelerators.items()]
        lines += [f"{name:<18}{found}" for name, found in self.torch.items()]
        lines += [
            f"{name:<18}{found or 'missing (optional; ' + OPTIONAL[name] + ')'}"
            for name, found in self.optional.items()
        ]
        lines += [f"problem: {problem}" for problem in self.problems] or ["all well"]
        return "\n".join(lines)


def examine(full: bool = False) -> Report:
    """Look at this machine and installation.

    Args:
        full: import torch and ask it about GPUs too.
    """
    versions = {"paretofuse": paretofuse.__version__, "python": platform.python_version()}
    report = Report(
        versions={**versions, **{name: _version(name) for name in REQUIRED}},
        optional={name: _version(name) for name in OPTIONAL},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        forced=os.environ.get("PARETOFUSE_ISA"),
        accelerators=_accelerators(),
    )
    report.problems += [
        f"{name} is missing; pip install {name}" for name in REQUIRED if report.versions[name] is None
    ]
    report.problems += _too_old({**report.versions, **report.optional})
    try:
        from paretofuse.engine.merging import native

        report.instruction_sets = native.instruction_sets()
        report.chosen = native.chosen_isa()
    except (ImportError, ValueError) as error:
        report.problems.append(str(error))
    if full:
        report.torch = _ask_torch()
    return report


def _too_old(found: dict[str, str | None]) -> list[str]:
    """A sentence for each installed package that is older than what this installation's own metadata asks for."""
    problems = []
    for line in requires("paretofuse") or ():
        name, oldest = re.match(r"([\w-]+)[^>;]*(?:>=([\d.]+))?", line).groups()  # type: ignore[union-attr]
        installed = found.get(name)
        if installed and oldest and _numbers(installed) < _numbers(oldest):
            problem = f"{name} {installed} is older than {oldest}; pip install -U '{name}>={oldest}'"
            problems += [problem] if problem not in problems else []
    return problems


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers that a version begins with, the last zeros left out: 5.0.0.dev1 -> (5,)."""
    numbers = [int(part) for part in re.match(r"[\d.]*", release).group().split(".") if part]  # type: ignore[union-attr]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _accelerators() -> dict[str, str]:
    found = {}
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found["NVIDIA driver"] = driver.read_text(errors="replace").splitlines()[0].partition(":")[2].strip()
    if Path("/dev/kfd").exists():
        found["AMD driver"] = "present"
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found["Apple GPU"] = "present"
    return found or {"GPU driver": "none found"}


def _ask_torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"import torch": f"failed ({error})"}
    answer: dict[str, Any] = {
        "torch CUDA": torch.version.cuda or "not built in",
        "torch ROCm": getattr(torch.version, "hip", None) or "not built in",
        "torch threads": torch.get_num_threads(),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        answer[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return answer


SUMMARY = "say what this installation can use"
EXAMPLE = "paretofuse doctor --full"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words of this command."""
    parser.add_argument("--full", action="store_true", help="import torch too and ask it about GPUs")


def run(options: argparse.Namespace) -> Result:
    """Examine; a problem makes the exit code 1."""
    report = examine(options.full)
    return report.to_text(), report.to_dict(), 1 if report.problems else 0

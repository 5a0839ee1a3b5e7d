"""A line for each contender of `benchmarks.gpu.bench`: what was timed, on what, and how much of the device it used."""

from __future__ import annotations

import csv
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.harness import record

COLUMNS = (
    "case", "contender", "error", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "bytes", "gb_per_s",
    "share_of_copy", "share_of_data_sheet", "tflop_per_s", "time_by_ours", "date", "quick", "device", "capability",
    "driver", "torch", "triton", "python", "paretofuse", "commit",
)  # fmt: skip

DATA_SHEET = {"H200": 4.8e12, "H100 PCIe": 2.04e12, "H100 NVL": 3.94e12, "H100": 3.35e12, "A100": 2.039e12,
              "MI300X": 5.3e12}  # fmt: skip
"""Bytes a second by the makers' data sheets, for a part of the device's name; the first that fits counts."""


Times = tuple[float, float, float]
"""Milliseconds: median, lower and upper quartile."""


@dataclass(frozen=True)
class Line:
    """One contender in one case.

    Attributes:
        milliseconds: None where it failed.
        error: why it failed, else empty.
        moved, flops: what has to be moved and computed, once.
        copy: a copy's bytes a second on the same device, by the same timer.
        time_by_ours: its median by that of ours; None for ours, or where either failed.
    """

    case: str
    contender: str
    milliseconds: Times | None
    error: str
    moved: float
    flops: float
    copy: float
    time_by_ours: float | None

    @property
    def seconds(self) -> float:
        """The median; not for a line that failed."""
        if self.milliseconds is None:
            raise ValueError(f"{self.case}, {self.contender} has no time: {self.error}")
        return self.milliseconds[0] / 1e3

    def shown(self) -> str:
        """As one printed line."""
        if self.milliseconds is None:
            return f"  {self.contender:32} FAILED: {self.error}"
        median, lower, upper = self.milliseconds
        speed = self.moved / self.seconds
        ratio = "" if self.time_by_ours is None else f"{self.time_by_ours:8.3g} x ours"
        return (
            f"  {self.contender:32} {median:10.4f} ms ({lower:.4f} to {upper:.4f}) {speed / 1e9:8.1f} GB/s "
            f"{speed / self.copy:6.0%} {self.flops / self.seconds / 1e12:7.1f} TFLOP/s {ratio}"
        )

    def cells(self, about: dict[str, object]) -> dict[str, object]:
        """As a row of the CSV file."""
        cells: dict[str, object] = {
            "case": self.case,
            "contender": self.contender,
            "error": self.error,
            **about,
        }
        if self.milliseconds is None:
            return cells
        median, lower, upper = (f"{value:.6g}" for value in self.milliseconds)
        speed, sheet = self.moved / self.seconds, data_sheet(str(about["device"]))
        return cells | {
            "median_ms": median,
            "lower_quartile_ms": lower,
            "upper_quartile_ms": upper,
            "bytes": round(self.moved),
            "gb_per_s": f"{speed / 1e9:.5g}",
            "share_of_copy": f"{speed / self.copy:.4g}",
            "share_of_data_sheet": "" if sheet is None else f"{speed / sheet:.4g}",
            "tflop_per_s": f"{self.flops / self.seconds / 1e12:.4g}",
            "time_by_ours": "" if self.time_by_ours is None else f"{self.time_by_ours:.4g}",
        }


def data_sheet(device: str) -> float | None:
    """Bytes a second that a device's maker promises; None for a device that is not listed."""
    return next((speed for name, speed in DATA_SHEET.items() if name in device), None)


def append(lines: Sequence[Line], about: dict[str, object], path: Path) -> None:
    """Append to the CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(line.cells(about) for line in lines)


def context(device: torch.device, quick: bool) -> dict[str, object]:
    """When, where and with what; the same in all rows of a run."""
    about = record.context(record.Options(quick=quick))
    name, capability = "CPU, Triton's interpreter", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {
        "date": about.date, "quick": quick, "device": name, "capability": capability, "driver": driver(),
        "torch": torch.__version__, "triton": version("triton"), "python": platform.python_version(),
        "paretofuse": about.paretofuse, "commit": about.commit,
    }  # fmt: skip


def driver() -> str:
    """The GPU driver's version as its own tool tells it; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return f"HIP {torch.version.hip}" if torch.version.hip else ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]

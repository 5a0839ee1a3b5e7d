"""The fake CUDA driver, and a folder of kernels for it."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paretofuse.kernels.aot import build

STREAM = 0x1230


class Driver:
    """The fake driver library, which `dlopen` finds once for the test and for the library under test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.fake_log.restype = ctypes.c_char_p

    def reset(self, fail_at: int = 0) -> None:
        self.c.fake_reset(ctypes.c_int(fail_at))

    def log(self) -> list[str]:
        return self.c.fake_log().decode().splitlines()  # type: ignore[no-any-return]

    def launched(self) -> list[str]:
        """The kernels' files, launch by launch."""
        return [
            call.split(" file ")[1].split()[0] for call in self.log() if call.startswith("cuLaunchKernel")
        ]

    def check(self) -> None:
        """Nothing was misused, and everything was given back."""
        assert (self.c.fake_misuses(), self.c.fake_live()) == (0, 0), self.log()


def write_kernels(path: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
    """Every merge kernel's entry as `aot` writes it, with empty files: the fake driver goes by their names."""
    path.mkdir(exist_ok=True)
    entries = []
    for variant in build.variants("sm_90", build.FLOATS, build.FLOATS):
        metadata = SimpleNamespace(
            target=SimpleNamespace(warp_size=32),
            name=variant.kernel.fn.__name__,
            num_warps=variant.warps,
            shared=0,
        )
        entries.append(build.describe(variant, "sm_90", SimpleNamespace(metadata=metadata), b""))
        (path / entries[-1]["file"]).write_bytes(b"")
    manifest = {"format": 4, "architecture": "sm_90", "triton": "3", "kernels": entries}
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path

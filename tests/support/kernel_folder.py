"""A folder of kernels as `python -m paretofuse.kernels.aot` writes it, for the fake CUDA driver."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paretofuse.kernels.aot import build


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

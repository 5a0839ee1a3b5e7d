"""The wheel and the source distribution, built once for all tests."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
from pathlib import Path

from tests.support.process import ROOT, listed_files, run


def copy_checkout(target: Path) -> Path:
    """Copy what git knows, or would, so that nothing is used that was built in the checkout; returns the copy."""
    for name in listed_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def distributions() -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it; made anew when any file of the checkout has changed."""
    digest = hashlib.sha256()
    for name in listed_files():
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    folder = ROOT / "build" / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = folder / digest.hexdigest()[:16]
        if not built.exists():
            for old in folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else None
            copy = copy_checkout(folder / "checkout")
            run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "unfinished", copy)
            (folder / "unfinished").rename(built)
            shutil.rmtree(copy)
        (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    return sdist, wheel

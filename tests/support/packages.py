"""The wheel and the source distribution, built once for all tests."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
from pathlib import Path

from tests.support.process import ROOT, listed_files, run


def copy_checkout(target: Path) -> Path:
    """Copy what git knows, or would, with its times, so that nothing that was built is there; returns the copy."""
    for name in listed_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def lend_objects(copy: Path) -> None:
    """Put the checkout's compiled objects into a copy: setup.py compiles what is newer, and minutes are saved."""
    for objects in (ROOT / "build").glob("objects-*"):
        shutil.copytree(objects, copy / "build" / objects.name, copy_function=shutil.copy2)


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
            copy, unfinished = copy_checkout(folder / "checkout"), folder / "unfinished"
            build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", unfinished)
            run(*build, "--sdist", copy)
            (sdist,) = unfinished.glob("*.tar.gz")
            shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
            (unpacked,) = (folder / "unpacked").iterdir()
            lend_objects(unpacked)
            run(*build, "--wheel", unpacked)
            unfinished.rename(built)
            shutil.rmtree(copy)
            shutil.rmtree(folder / "unpacked")
        (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    return sdist, wheel

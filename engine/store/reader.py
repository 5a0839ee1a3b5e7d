"""The store: a directory of safetensors files, a manifest and the model's own files. No torch.

manifest.json                   format, version, objectives, tensor table, sizes and checksums
base.safetensors                every tensor of the base, tied ones once
experts/<objective>.safetensors the deltas; a tensor that is not there is unchanged by that expert
routers.safetensors             the routers' parameters, float32
heads/<objective>.safetensors   tensors that only this objective uses
heads/<objective>/...           files that replace the model's own under that head (config.json)
model/...                       config, generation config and tokenizer files, as they were
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import Layout
from paretofuse.engine.routing.evaluate import check_routers, was_trained
from paretofuse.engine.store.manifest import FileRecord, Manifest, read_manifest
from paretofuse.engine.store.safetensors_file import SafetensorsFile, TensorView

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_BLOCK = 1 << 20
_ATTEMPTS = 5  # a store may be replaced while it is opened; parts of two must not mix


class Store:
    """A store, opened: headers read and checked, data mapped and paged in when touched.

    Attributes:
        path: its directory.
        manifest: what manifest.json says.
        layout: objectives, static weight and tensor table.
        init: what the routers add to: "identity", "sqrt" or "constant".
        model_class: qualified name of the base model's class, if it had one.
        training: how the routers were trained (steps, method, data, versions); None if that is not recorded.
        files: the mapped files: the base first, then one for each expert in the objectives' order.
        base: every stored tensor of the base by name.
        deltas: for each objective, its deltas by tensor name; a missing one is zero.
        heads: by objective, the tensors that only this objective uses.
        routers: the routers' parameters, float32, as copies.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Use `Store.open`."""
        self.path = root
        self.manifest = manifest
        self.layout: Layout = manifest.layout
        self.init = manifest.init
        self.model_class = manifest.model_class
        self.training = manifest.training
        for path, record in manifest.files.items():
            _check_file(root, path, record)
        names = (manifest.base, *manifest.experts.values())
        self.files = tuple(SafetensorsFile(root / name) for name in names)
        self.base: Mapping[str, TensorView] = self.files[0].tensors
        self.deltas: list[Mapping[str, TensorView]] = [file.tensors for file in self.files[1:]]
        self.heads: dict[str, Mapping[str, TensorView]] = {
            objective: SafetensorsFile(root / name).tensors for objective, name in manifest.heads.items()
        }
        self._check_tables()
        self.routers = self._read_routers()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store; nothing but headers and routers is read.

        Raises:
            StoreError: not a store, of a newer version, or its files are missing, truncated or contradict the
                manifest; says which file and what to do.
        """
        root = Path(path)
        for _ in range(_ATTEMPTS):
            directory = _identity(root)
            try:
                store = cls(root, read_manifest(root))
            except StoreError:
                if _identity(root) == directory:
                    raise
            else:
                if _identity(root) == directory:
                    return store
        raise StoreError(f"{root}: is being replaced again and again; try once more when that is over")

    @property
    def trained(self) -> bool:
        """Whether the routers are another than those that `pf.stack` starts with, or a training is recorded."""
        return self.training is not None or was_trained(self.init, self.routers)

    def model_files(self, head: str | None = None) -> dict[str, bytes]:
        """The model's own files (config.json and the like) by name, with those of a head in their place."""
        names = {name: self.manifest.model_path(name) for name in self.manifest.model_files}
        if head is not None:
            names |= {
                name: self.manifest.model_path(name, head) for name in self.manifest.head_files.get(head, ())
            }
        return {name: (self.path / path).read_bytes() for name, path in names.items()}

    def release(self, names: Iterable[str]) -> None:
        """Let the system drop the pages of these tensors in base and deltas; touching them reads them again."""
        for name in names:
            for file in self.files:
                view = file.tensors.get(name)
                if view is not None:
                    file.release(view.offset, view.offset + view.nbytes)

    def verify(self, progress: Progress | None = None) -> None:
        """Read every file and compare its size and checksum with the manifest.

        Args:
            progress: called with the bytes checked and the bytes in all, from several threads in turn.

        Raises:
            StoreError: a file was altered, truncated or is missing; names it.
        """
        total = sum(record.bytes for record in self.manifest.files.values())
        done, lock = 0, threading.Lock()

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                if progress is not None:
                    progress(done, total)

        def check(item: tuple[str, FileRecord]) -> None:
            path, record = item
            _check_file(self.path, path, record)
            if sha256_of(self.path / path, count) != record.sha256:
                raise StoreError(
                    f"{self.path / path}: its checksum is not the manifest's, so it was altered after it "
                    "was written; restore it or create the store again"
                )

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for _ in pool.map(check, self.manifest.files.items()):
                pass

    def _check_tables(self) -> None:
        by_name = {spec.name: spec for spec in self.layout.tensors}
        for file, views in zip(self.files, (self.base, *self.deltas), strict=True):
            is_base = views is self.base
            for name, view in views.items():
                spec = by_name.get(name)
                if spec is None or (spec.role == "constant" and not is_base):
                    raise StoreError(
                        f"{file.path}: tensor {name!r} is not in the manifest's table of them; {_AGAIN}"
                    )
                dtype = spec.dtype if is_base else spec.delta_dtype
                if (view.dtype, view.shape) != (dtype, spec.shape):
                    raise StoreError(
                        f"{file.path}: tensor {name!r} is {view.dtype} {list(view.shape)}, the manifest says "
                        f"{dtype} {list(spec.shape)}; {_AGAIN}"
                    )
        missing = [name for name in by_name if name not in self.base]
        if missing:
            raise StoreError(
                f"{self.files[0].path}: tensor {missing[0]!r} of the manifest is missing; {_AGAIN}"
            )

    def _read_routers(self) -> dict[str, np.ndarray]:
        path = self.path / self.manifest.routers
        views = SafetensorsFile(path).tensors
        shapes = {name: view.shape for name, view in views.items()}
        try:
            check_routers(shapes, self.init, len(self.layout.groups), len(self.layout.objectives))
        except ValueError as error:
            raise StoreError(f"{path}: {error}; {_AGAIN}") from error
        if any(view.dtype != "F32" for view in views.values()):
            raise StoreError(f"{path}: router parameters should be F32; {_AGAIN}")
        return {name: view.data.view(np.float32).reshape(view.shape).copy() for name, view in views.items()}


def describe_training(training: Mapping[str, Any] | None) -> str:
    """One line about a training record, such as "method ls, steps 100"; what is long or nested is left out."""
    if training is None:
        return "not recorded"
    plain = {
        name: value
        for name, value in training.items()
        if isinstance(value, str | int | float) and len(str(value)) <= 40
    }
    return ", ".join(f"{name} {value}" for name, value in plain.items()) or "recorded"


_AGAIN = "create the store again"


def _identity(root: Path) -> tuple[int, int] | None:
    try:
        found = root.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _check_file(root: Path, path: str, record: FileRecord) -> None:
    full = root / path
    try:
        size = full.stat().st_size
    except OSError as error:
        raise StoreError(f"{full}: cannot be read ({error.strerror}); restore it or {_AGAIN}") from error
    if not full.resolve().is_relative_to(root.resolve()):
        raise StoreError(f"{full}: points outside of the store; put the file itself there")
    if not full.is_file():
        raise StoreError(f"{full}: not a file; {_AGAIN}")
    if size != record.bytes:
        state = "truncated" if size < record.bytes else "altered"
        raise StoreError(
            f"{full}: has {size} bytes, the manifest says {record.bytes}: it was {state}; {_AGAIN}"
        )


def sha256_of(path: Path, count: Callable[[int], None] | None = None) -> str:
    """A file's checksum; `count` is called with the bytes of each block read."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            if count is not None:
                count(size)
    return digest.hexdigest()

"""The store: a directory of safetensors files, a manifest and the model's own files. No torch.

manifest.json                   format, version, objectives, tensor table, sizes and checksums
base.safetensors                every tensor of the base, tied ones once
experts/<expert>.safetensors    the planes; a tensor that is not there is unchanged by that expert. Dense ones under the
                                tensor's name; others (version 2) in two tensors each, as csrc/src/store/planes.h says.
                                An expert for each objective, of its name, unless the manifest has others (version 3)
routers.safetensors             the routers' parameters, float32
heads/<objective>.safetensors   tensors that only this objective uses
heads/<objective>/...           files that replace the model's own under that head (config.json)
model/...                       config, generation config and tokenizer files, as they were
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paretofuse.engine.errors import StoreError
from paretofuse.engine.extension import _C
from paretofuse.engine.layout import Layout, Member, TensorSpec
from paretofuse.engine.routing.families import FAMILIES
from paretofuse.engine.store.paths import as_path
from paretofuse.engine.store.safetensors_file import SafetensorsFile, TensorView

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

MANIFEST = "manifest.json"
BASE = "base.safetensors"
ROUTERS = "routers.safetensors"

_BLOCK = 1 << 20
ROWS, COLUMNS = "rows.weight", "columns.weight"
"""The routers' parameters that the families "rows" and "rows+columns" have besides those of the family "scalar"."""
_ZERO_AT_START = {"constant": ("hidden.bias",)}
"""Router parameters that `Routers.reset` sets to zero, by init; these for all others."""


class StoredPlane(NamedTuple):
    """A plane that is not dense, in a mapped file.

    Attributes:
        format: "int8", "int4" or "lowrank".
        size: elements of a group, or the rank.
        error: of the merged update; None where it was not measured.
        values: the quantized numbers, or A.
        factors: the scales, or B.
    """

    format: str
    size: int
    error: float | None
    values: TensorView
    factors: TensorView


class Store:
    """A store, opened: headers read and checked, data mapped and paged in when touched.

    Attributes:
        path: its directory.
        core: the store in C++, which reads everything.
        layout: objectives, experts, static weight and tensor table.
        init: what the routers add to: "identity", "sqrt" or "constant".
        family_asked: the family of routers that was asked for, which `pf.fit` keeps; None if none was.
        model_class: qualified name of the base model's class, if it had one.
        training: how the routers were trained (steps, method, data, versions); None if that is not recorded.
        created_by: the program and version that wrote it, for people.
        checksums: size in bytes and SHA-256 (hexadecimal) of every file but the manifest, by path in the store.
        files: the mapped files: the base first, then one for each expert in their order.
        base: every stored tensor of the base by name.
        deltas: for each expert, its dense planes by tensor name.
        planes: for each expert, its other planes; a tensor that is in neither is unchanged.
        heads: by objective, the tensors that only this objective uses.
        routers: the routers' parameters, float32, as copies.
    """

    def __init__(self, path: Path, core: _C.Store) -> None:
        """Use `Store.open`."""
        self.path = path
        self.core = core
        specs = tuple(TensorSpec(*entry) for entry in core.specs)
        members = tuple(Member(*member) for member in core.members)
        self.layout = Layout(tuple(core.objectives), specs, core.static_weight, members)
        self.init = core.init
        self.family_asked: str | None = core.family or None
        self.model_class = core.model_class or None
        self.training: dict[str, Any] | None = json.loads(core.training) if core.training else None
        self.created_by = core.created_by
        self.checksums = core.files
        self.files: tuple[SafetensorsFile, ...] = (core.base, *core.experts)
        self.base = core.base.tensors
        self.deltas: list[dict[str, TensorView]] = []
        self.planes: list[dict[str, StoredPlane]] = []
        for file, own in zip(self.files[1:], core.planes, strict=True):
            views = file.tensors
            self.planes.append(
                {
                    name: StoredPlane(format, size, error, views.pop(values), views.pop(factors))
                    for name, (format, size, error, values, factors) in own.items()
                }
            )
            self.deltas.append(views)
        self.heads: dict[str, Mapping[str, TensorView]] = {
            objective: file.tensors for objective, file in core.heads.items()
        }
        self.routers = core.routers

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store; nothing but manifest, headers and routers is read.

        Raises:
            StoreError: not a store, of a newer version, or its files are missing, truncated or contradict the
                manifest; says which file and what to do.
        """
        place = as_path(path)
        return cls(place, _C.Store(place))

    @property
    def family(self) -> str:
        """What has coefficients of its own, one of FAMILIES."""
        return FAMILIES[(ROWS in self.routers) + (COLUMNS in self.routers)]

    @property
    def trained(self) -> bool:
        """Whether the routers are another than those that `pf.stack` starts with, or a training is recorded."""
        return self.training is not None or was_trained(self.init, self.routers)

    @property
    def routers_checksum(self) -> str:
        """SHA-256 of the routers' file: which training this is."""
        return self.checksums[ROUTERS][1]

    def routing_weights(self, preference: np.ndarray) -> np.ndarray:
        """The routers at a preference [M], as from `as_preference`: routing weights, float32 [G, P] or more.

        Computed in float64 and rounded once, as the routers in torch are. Raises ValueError for no preference.
        """
        return self.core.routing_weights([float(share) for share in preference])

    def model_files(self, head: str | None = None) -> dict[str, bytes]:
        """The model's own files (config.json and the like) by name, with those of a head in their place."""
        return self.core.model_files(head or "")

    def release(self, names: Iterable[str]) -> None:
        """Let the system drop the pages of these tensors in base and deltas; touching them reads them again."""
        for name in names:
            self._release(self.files[0], self.base.get(name))
            for file, deltas, planes in zip(self.files[1:], self.deltas, self.planes, strict=True):
                self._release(file, deltas.get(name))
                if name in planes:
                    self._release(file, planes[name].values, planes[name].factors)

    @staticmethod
    def _release(file: SafetensorsFile, *views: TensorView | None) -> None:
        for view in views:
            if view is not None:
                file.release(view.offset, view.offset + view.nbytes)

    def check_unchanged(self) -> None:
        """Check that the mapped files of base and experts are what they were when they were opened.

        Their sizes and times of modification are looked at, and their content only where a time is another: a file
        that was merely touched is fine. Flipped bits under an unchanged time are found by `verify` alone.

        Raises:
            StoreError: a file was rewritten in place or truncated; reading it on would give other numbers, or end
                the process (SIGBUS).
        """
        self.core.check_unchanged()

    def verify(self, progress: Progress | None = None, threads: int | None = None) -> None:
        """Read every file and compare its size and checksum with the manifest.

        Args:
            progress: called with the bytes checked and the bytes in all, from several threads in turn.
            threads: how many read; up to four unless told.

        Raises:
            StoreError: a file was altered, truncated or is missing; names it.
        """
        total = sum(size for size, _ in self.checksums.values())
        done, lock = 0, threading.Lock()

        def count(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                if progress is not None:
                    progress(done, total)

        def check(path: str) -> None:
            size, digest = self.checksums[path]
            file = self.path / path
            try:
                same = file.stat().st_size == size and sha256_of(file, count) == digest
            except OSError as error:
                raise StoreError(
                    f"{file}: cannot be read ({error.strerror}); restore it or create the store again"
                ) from error
            if not same:
                raise StoreError(
                    f"{file}: its checksum is not the manifest's, so it was altered after it was written; restore it "
                    "or create the store again"
                )

        with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
            for _ in pool.map(check, self.checksums):
                pass


def was_trained(init: str, routers: Mapping[str, np.ndarray]) -> bool:
    """Whether router parameters that start at zero are zero no more."""
    zero = (*_ZERO_AT_START.get(init, ("output.weight", "output.bias")), ROWS, COLUMNS)
    return any(routers[name].any() for name in zero if name in routers)


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


def sha256_of(path: Path, count: Callable[[int], None] | None = None) -> str:
    """A file's checksum; `count` is called with the bytes of each block read."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            if count is not None:
                count(size)
    return digest.hexdigest()

"""Writing a store: beside its place, checksummed and synced, then exchanged with an older one in one step. No torch."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from paretofuse.engine.errors import StoreError
from paretofuse.engine.extension import _C
from paretofuse.engine.layout import Layout, one_for_each
from paretofuse.engine.store.atomic import Fresh, name_the_file
from paretofuse.engine.store.paths import as_path
from paretofuse.engine.store.reader import (
    BASE,
    MANIFEST,
    ROUTERS,
    ROWS,
    Store,
    describe_training,
    sha256_of,
    was_trained,
)
from paretofuse.engine.store.safetensors_file import HEADER_RESERVE, SafetensorsWriter, TensorData
from paretofuse.engine.termination import termination_raises

is_model_file = _C.is_model_file
"""Whether a file of this name may stand beside a merged model's weights: a safe path, and no weights itself."""

_METADATA = {"format": "pt"}

plane_parts = _C.plane_parts
"""(name, shape, format, group or rank) -> (name, dtype, shape) of the two tensors that hold a plane which is not dense:
its values (of low-rank planes A), and its factors (B), whose dtype is "" where it is free."""


def is_store(path: Path) -> bool:
    """Whether a directory holds a store, perhaps of another version."""
    try:
        return b'"paretofuse"' in (path / MANIFEST).read_bytes()[:4096]
    except OSError:
        return False


def _foreign_file(path: Path) -> str | None:
    """A file in a store's directory that is not the store's, if there is one."""
    try:
        own = {MANIFEST, *Store.open(path).checksums}
    except StoreError:  # damaged or of another version: which files are its own, only their places tell
        own = None
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_dir():
            continue
        if own is not None and name.as_posix() not in own:
            return name.as_posix()
        if own is None and name.parts[0] not in (MANIFEST, BASE, ROUTERS, "experts", "heads", "model"):
            return name.as_posix()
    return None


class StoreWriter:
    """Writes a store beside its place and puts it there whole when it is finished.

    A context manager: leaving it before `finish`, by an exception or not, removes what was written and leaves
    an older store at `path` as it was. A killed process leaves the directory `.<name>.<random>.partial`, which the next
    writer of that store sweeps away.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        objectives: Sequence[str],
        experts: Sequence[str] | None = None,
        force: bool = False,
        origin: str | None = None,
    ) -> None:
        """Start a store.

        Args:
            path: its directory; missing parents are made.
            objectives: the objectives' names.
            experts: the experts' names; those of the objectives unless told.
            force: replace a trained store, whose training is lost.
            origin: the checksum of the routers that these go on from; a trained store that holds them may be replaced.

        Raises:
            ValueError: something stands there that is no store.
        """
        self.path = as_path(path)
        self.objectives = tuple(objectives)
        if len(set(self.objectives)) != len(self.objectives) or not self.objectives:
            raise ValueError(f"got objectives {list(self.objectives)}, expected at least one, each once")
        self.experts = self.objectives if experts is None else tuple(experts)
        self._force = force
        self._origin = origin
        self._check_target()
        self._head_stems = _C.file_stems(self.objectives)
        self._expert_stems = _C.file_stems(self.experts)
        self._experts: dict[str, str] = {}
        self._planes: dict[str, dict[str, dict[str, Any]]] = {}
        self._heads: dict[str, str] = {}
        self._model_files: list[str] = []
        self._head_files: dict[str, list[str]] = {}
        self._init: str | None = None
        self._family: dict[str, str] = {}
        self._by_row = False
        self._training: dict[str, Any] | None = None
        self._records: dict[str, Future[dict[str, Any]]] = {}
        # One thread checksums and syncs a finished file while the next one is written.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="paretofuse-store")
        self._fresh = Fresh(self.path, directory=True)
        self.path = self._fresh.target
        self._root: Path | None = self._fresh.path
        self._signals = ExitStack()

    def write_base(self, tensors: Iterable[TensorData]) -> None:
        """Write the base: (name, dtype, shape, bytes in pieces) each; larger elements should come first."""
        self._write_tensors(BASE, tensors)

    def write_expert(
        self,
        expert: str,
        tensors: Iterable[TensorData],
        planes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write an expert's planes.

        Args:
            expert: its name.
            tensors: dense planes under the tensor's name, others in their two parts; those that add nothing are left
                out, or have None for their bytes.
            planes: of each tensor whose plane is not dense: "format", "group" or "rank", and "error". Read when all
                tensors are written.
        """
        path = f"experts/{_stem(self._expert_stems, expert, 'expert')}.safetensors"
        self._write_tensors(path, tensors)
        self._experts[expert] = path
        if planes:
            self._planes[expert] = {name: dict(plane) for name, plane in planes.items()}

    def write_head(self, objective: str, tensors: Iterable[TensorData]) -> None:
        """Write the tensors that only one objective uses."""
        path = f"heads/{_stem(self._head_stems, objective, 'objective')}.safetensors"
        self._write_tensors(path, tensors)
        self._heads[objective] = path

    def write_routers(
        self,
        init: str,
        parameters: Mapping[str, np.ndarray],
        training: Mapping[str, Any] | None = None,
        family: str | None = None,
    ) -> None:
        """Write the routers; best before all that takes longer.

        Args:
            init: what the routers add to.
            parameters: their float32 parameters by name.
            training: how they were trained, JSON only; see `Store.training`.
            family: the family that was asked for; None if none was.

        Raises:
            ValueError: a trained store would be lost (see `check_training`); or the training is not JSON.
        """
        for name, array in parameters.items():
            if array.dtype != np.float32:
                raise TypeError(f"got router parameter {name!r} as {array.dtype}, expected float32")
        self._init, self._training = init, _plain(training)
        self._family = {} if family is None else {"family": family}
        self._by_row = ROWS in parameters
        entries = [
            (name, "F32", array.shape, [np.ascontiguousarray(array)]) for name, array in parameters.items()
        ]
        self._write_tensors(ROUTERS, entries)
        self.check_training(training is not None or was_trained(init, parameters))

    @property
    def routers_checksum(self) -> str:
        """SHA-256 of the routers' file, once it is written: the origin of what goes on from them."""
        checksum: str = self._records[ROUTERS].result()["sha256"]
        return checksum

    def check_training(self, trained: bool) -> None:
        """Check that no training is lost: the one rule for whoever writes a store.

        A trained store is replaced by what goes on from its own routers (`origin`), by the same routers, or by force.

        Args:
            trained: whether the new routers are, or will be.

        Raises:
            ValueError: a trained store stands there whose training would be lost.
        """
        if self._force:
            return
        try:
            old = Store.open(self.path)
        except StoreError:
            return  # damaged, of another version, or not there: nothing that this program could have used
        own = self.routers_checksum if ROUTERS in self._records else None
        if old.trained and not (trained and old.routers_checksum in (own, self._origin)):
            raise ValueError(
                f"got {self.path}, which is a trained store ({describe_training(old.training)}) and would be replaced "
                f"by {'another training' if trained else 'an untrained one'}; choose another place, or pass "
                "force=True"
            )

    def add_model_file(self, name: str, content: bytes) -> None:
        """Keep a file that a merged model directory needs (config.json, tokenizer files)."""
        self._write_bytes(name, f"model/{name}", content)
        self._model_files.append(name)

    def add_head_file(self, objective: str, name: str, content: bytes) -> None:
        """Keep a file that replaces the model's own one under an objective's head."""
        stem = _stem(self._head_stems, objective, "objective")
        self._write_bytes(name, f"heads/{stem}/{name}", content)
        self._head_files.setdefault(objective, []).append(name)

    def finish(self, layout: Layout, model_class: str | None = None) -> None:
        """Write the manifest, check the store, sync it and put it at its place.

        Args:
            layout: the tensor table; its objectives and planes are those of the writer.
            model_class: qualified name of the base model's class, if it had one.

        Raises:
            ValueError: a part was not written, or the parts do not fit the layout (as StoreError).
        """
        root = self._directory()
        if (layout.objectives, layout.planes) != (self.objectives, self.experts):
            raise ValueError(
                f"got a layout for {layout.objectives} of {layout.planes}, expected {self.objectives} of {self.experts}"
            )
        absent = [name for name in self.experts if name not in self._experts]
        if absent or self._init is None or BASE not in self._records:
            parts = [*(f"expert {name!r}" for name in absent)]
            parts += ["routers"] if self._init is None else []
            parts += ["base"] if BASE not in self._records else []
            raise ValueError(f"got the end of the store without {', '.join(parts)}; write them first")
        plain = layout.members == one_for_each(layout.objectives)
        # Older programs read the stores that they can.
        version = 3 if not plain else 2 if self._planes or self._by_row else 1
        document = {
            "format": "paretofuse",
            "version": version,
            "created_by": f"paretofuse {own_version()}",
            "objectives": self.objectives,
            "static_weight": layout.static_weight,
            "routers": {"init": self._init, "file": ROUTERS, **self._family},
            "base": BASE,
            "experts": self._experts,
            "heads": self._heads,
            "model": {"class": model_class, "files": self._model_files, "heads": self._head_files},
            "files": {path: record.result() for path, record in self._records.items()},
        }
        if version >= 2:
            document["planes"] = self._planes
        if version >= 3:
            document["members"] = [vars(member) for member in layout.members]
        if self._training is not None:
            document["training"] = self._training
        # A tensor a line: easy to read, and written in a tenth of the time that indenting each of 10^5 takes.
        head = json.dumps(document, indent=1, ensure_ascii=False).removesuffix("\n}")
        table = ",\n  ".join(json.dumps(vars(spec), ensure_ascii=False) for spec in layout.tensors)
        text = f'{head},\n "tensors": [\n  {table}\n ]\n}}\n'
        (root / MANIFEST).write_text(text, encoding="utf-8")
        opened = Store.open(root)  # what could not be opened again must not replace an older store
        self._check_target()
        self.check_training(opened.trained)
        self._fresh.place()
        self._root = None
        self._pool.shutdown()

    def _check_target(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir() or (any(self.path.iterdir()) and not is_store(self.path)):
            raise ValueError(
                f"got {self.path}, which exists and is not a store; choose another place or remove it"
            )
        if other := _foreign_file(self.path):
            raise ValueError(
                f"got {self.path}, which holds a file that is not its own ({other}) and would be lost; move it, or "
                "choose another place"
            )

    def _directory(self) -> Path:
        if self._root is None:
            raise ValueError("got a call after the store was finished; start another StoreWriter")
        return self._root

    def _new_file(self, path: str) -> Path:
        if path in self._records:
            raise ValueError(f"got {path} twice, expected it once")
        full = self._directory() / path
        full.parent.mkdir(parents=True, exist_ok=True)
        return full

    def _write_tensors(self, path: str, tensors: Iterable[TensorData]) -> None:
        full = self._new_file(path)
        reserve = max(1024, 256 * operator.length_hint(tensors, HEADER_RESERVE // 256))
        with SafetensorsWriter(full, metadata=_METADATA, reserve=reserve) as writer:
            for name, dtype, shape, chunks in tensors:
                writer.add(name, dtype, shape, chunks)
        self._records[path] = self._pool.submit(_seal, full)

    def _write_bytes(self, name: str, path: str, content: bytes) -> None:
        if not is_model_file(name):
            raise ValueError(
                f"got model file {name!r}, expected a relative path below the model that is no weights"
            )
        full = self._new_file(path)
        full.write_bytes(content)
        self._records[path] = self._pool.submit(_seal, full)

    def __enter__(self) -> StoreWriter:
        self._signals.enter_context(termination_raises())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._fresh.discard()
        name_the_file(error, self.path)
        self._root = None
        self._signals.__exit__(kind, error, trace)


def _stem(stems: Mapping[str, str], name: str, kind: str) -> str:
    """The file name's stem of an expert or an objective."""
    if name not in stems:
        raise ValueError(f"got {kind} {name!r}, expected one of {', '.join(map(repr, stems))}")
    return stems[name]


def _plain(training: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The record of a training as a manifest gives it back."""
    if training is None:
        return None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(training), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got a training record that is not JSON ({error}), expected strings, numbers and lists by name"
        ) from error
    return plain


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def own_version() -> str:
    """This installation's version; "unknown" where it was never installed."""
    try:
        return version("paretofuse")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"

"""Merge from disk to disk: a mapped store goes through the native kernel into a model directory. No torch.

Memory stays at two output buffers and the mapped pages of one batch, whatever the size of the model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import ITEM_SIZE, TensorSpec
from paretofuse.engine.merging import native
from paretofuse.engine.merging.card import with_card
from paretofuse.engine.planes.memory import Memory
from paretofuse.engine.routing.evaluate import routing_weights
from paretofuse.engine.routing.preference import Preference, as_preference
from paretofuse.engine.store.atomic import (
    beside,
    place_directory,
    place_file,
    replaceable,
    sync,
    sync_tree,
)
from paretofuse.engine.store.reader import Progress, Store
from paretofuse.engine.store.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorView

WEIGHTS_FILES = {"open_clip_config.json": "open_clip_model.safetensors"}
"""Names of the weights in a merged model directory, by the configuration file of the library that expects them."""

HUGGING_FACE_WEIGHTS = "model.safetensors"
"""Their name in all other directories, as Hugging Face's from_pretrained expects it."""

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Their name in the directories of diffusers' models."""

METADATA = {"format": "pt", "written_by": "paretofuse merge"}
"""In the header of every merge: the first for transformers, the second so that only merges are replaced by merges."""

BATCH_BYTES = 8 << 20
"""Output bytes merged at once."""


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        path: the model directory or the file.
        tensors: how many tensors.
        nbytes: bytes of their data.
        isa: the instruction set that merged them; None if the store merges nothing but constants.
    """

    path: Path
    tensors: int
    nbytes: int
    isa: str | None


@dataclass(frozen=True)
class _Source:
    """One tensor of the output: merged if it has a row of the weights, else copied from its view."""

    view: TensorView
    row: int | None = None
    deltas: tuple[TensorView | None, ...] = ()


@dataclass(frozen=True)
class _Piece:
    """Elements start to stop of one tensor, and the byte of the batch's buffer where they go."""

    source: _Source
    start: int
    stop: int
    position: int


def merge_store(
    store: Store | str | os.PathLike[str],
    preference: Preference | None,
    out: str | os.PathLike[str],
    *,
    weights: np.ndarray | None = None,
    head: str | None = None,
    threads: int | None = None,
    isa: str | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge a store for one preference into a complete model directory, or into one safetensors file.

    The result is written beside its place, synced and renamed: it is there whole or not at all. Tied tensors
    are written once, under the name they are stored by.

    Args:
        store: the store, or its directory.
        preference: the preference, if no weights are given.
        out: a directory (the weights, the model's own files and a model card, README.md), or a path that ends in
            .safetensors. An earlier merge there is replaced, and nothing else is.
        weights: routing weights [G, E] instead of a preference.
        head: the objective whose head to use; none keeps the base's.
        threads: threads of the native kernel; unless told, as many as this process may use.
        isa: forces an instruction set, see `paretofuse doctor`.
        progress: called with the bytes written and the bytes in all.

    Raises:
        ValueError: a bad preference, weights, head or instruction set, or an `out` that holds other files.
        StoreError: the store cannot be read.
    """
    # A mapping of its own, since its pages are dropped on the way.
    store = Store.open(store.path if isinstance(store, Store) else store)
    table = _weight_rows(store, preference, weights)
    sources = _sources(store, head)
    native.chosen_isa(isa)  # refuses before anything is written
    target = replaceable(Path(os.path.abspath(out)))
    is_file = target.suffix == ".safetensors"
    files = store.model_files(head)
    if not is_file:
        shares = None
        if preference is not None:
            numbers = as_preference(preference, store.layout.objectives).tolist()
            shares = dict(zip(store.layout.objectives, numbers, strict=True))
        files = with_card(files, store, shares, table[0, :-1], head)
    weights_file = _weights_name(files)
    if not is_file:
        _check_directory(target, {weights_file, *files})
    elif target.is_dir():
        raise ValueError(f"got {target}, which is a directory, expected a file; choose another name")
    _check_ours(target if is_file else target / weights_file)
    new = beside(target)
    try:
        if is_file:
            ran = _write_weights(store, sources, table, new, threads, isa, progress)
            sync(new)
            place_file(new, target)
        else:
            new.mkdir()
            ran = _write_weights(store, sources, table, new / weights_file, threads, isa, progress)
            for name, content in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(content)
            sync_tree(new)
            place_directory(new, target)
    finally:
        if new.is_dir():
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.unlink(missing_ok=True)
    return Merged(target, len(sources), sum(source.view.nbytes for source in sources), ran)


def _weights_name(files: Mapping[str, bytes]) -> str:
    """What the library that a model's files belong to calls its weights."""
    for name, weights in WEIGHTS_FILES.items():
        if name in files:
            return weights
    # Only diffusers writes the class under this name.
    return DIFFUSERS_WEIGHTS if b'"_class_name"' in files.get("config.json", b"") else HUGGING_FACE_WEIGHTS


def _weight_rows(store: Store, preference: Preference | None, weights: np.ndarray | None) -> np.ndarray:
    """The weights of the kernel, float32 [1, G + 1, E]: the last row is that of the static tensors."""
    shape = (len(store.layout.groups), len(store.layout.objectives))
    if (preference is None) == (weights is None):
        raise ValueError("got both or neither of a preference and weights, expected one of them")
    if preference is not None:
        weights = routing_weights(
            store.routers, store.init, as_preference(preference, store.layout.objectives)
        )
    weights = np.asarray(weights, dtype=np.float32)
    if weights.shape != shape or not np.isfinite(weights).all():
        raise ValueError(
            f"got routing weights of shape {weights.shape}, expected finite numbers of shape {shape}"
        )
    static = np.full((1, shape[1]), store.layout.static_weight, dtype=np.float32)
    return np.concatenate([weights, static])[None]


def _sources(store: Store, head: str | None) -> list[_Source]:
    """The tensors of the output in file order: larger elements first, so that every tensor is aligned."""
    if head is not None and head not in store.heads:
        heads = ", ".join(map(repr, store.heads)) or "none"
        raise ValueError(f"got head {head!r}, expected one that the store has: {heads}")
    own = store.heads[head] if head is not None else {}
    rows = store.layout.group_index

    def source(spec: TensorSpec) -> _Source:
        view = store.base[spec.name]
        if spec.role == "constant":
            return _Source(view)
        deltas = tuple(expert.get(spec.name) for expert in store.deltas)
        return _Source(view, rows[spec.name], deltas)

    sources = [source(spec) for spec in store.layout.tensors if spec.name not in own]
    sources += [_Source(view) for view in own.values()]
    return sorted(sources, key=lambda source: -ITEM_SIZE[source.view.dtype])


def _check_directory(target: Path, names: set[str]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ValueError(
            f"got {target}, which is a file, expected a directory or a name ending in .safetensors"
        )
    for directory, _, files in os.walk(target):
        for file in files:
            name = Path(directory, file).relative_to(target).as_posix()
            if name not in names:
                raise ValueError(
                    f"got {target}, which holds another file ({name}); choose another place or remove it"
                )


def _check_ours(weights: Path) -> None:
    """ValueError where a weights file stands that no merge has written: it may be somebody's original."""
    if not weights.exists():
        return
    try:
        ours = SafetensorsFile(weights).metadata == METADATA
    except StoreError:
        ours = False
    if not ours:
        raise ValueError(
            f"got {weights}, which exists and was not written by a merge; choose another place or remove it"
        )


def _write_weights(
    store: Store,
    sources: Sequence[_Source],
    table: np.ndarray,
    path: Path,
    threads: int | None,
    isa: str | None,
    progress: Progress | None,
) -> str | None:
    """Write all tensors and return the instruction set that merged them, if any were merged.

    While a batch is merged, one thread writes the one before, and another pushes what is written to the disk, so
    that little is left for the sync at the end.
    """
    total, done = sum(source.view.nbytes for source in sources), 0
    buffers = [_aligned(BATCH_BYTES), _aligned(BATCH_BYTES)]
    writing: Future[None] | None = None
    syncing: Future[None] | None = None
    ran: str | None = None
    with (
        SafetensorsWriter(path, metadata=METADATA, reserve=1024 + 256 * len(sources)) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="paretofuse-sync") as syncer,
        ThreadPoolExecutor(1, thread_name_prefix="paretofuse-write") as pen,
    ):
        for number, batch in enumerate(_batches(sources)):
            buffer = buffers[number % 2]
            ran = _merge_batch(batch, table, buffer, threads, isa) or ran
            _release(store, batch)
            if writing is not None:
                writing.result()
            writing = pen.submit(_write_batch, writer, batch, buffer)
            if syncing is None or syncing.done():
                if syncing is not None:
                    syncing.result()  # an error of the disk is told only once
                syncing = syncer.submit(writer.sync)
            done += sum(_nbytes(piece) for piece in batch)
            if progress is not None:
                progress(done, total)
        for last in (writing, syncing):
            if last is not None:
                last.result()
    return ran


def _batches(sources: Sequence[_Source]) -> Iterator[list[_Piece]]:
    """Cut the output into batches of at most BATCH_BYTES, the pieces of each one after the other."""
    batch: list[_Piece] = []
    position = 0
    for source in sources:
        item, numel = ITEM_SIZE[source.view.dtype], source.view.nbytes // ITEM_SIZE[source.view.dtype]
        start = 0
        while True:
            room = (BATCH_BYTES - position) // item
            if room == 0:
                yield batch
                batch, position = [], 0
                continue
            stop = min(numel, start + room)
            batch.append(_Piece(source, start, stop, position))
            position += (stop - start) * item
            start = stop
            if start == numel:
                break
    yield batch


def _merge_batch(
    batch: Sequence[_Piece], table: np.ndarray, buffer: np.ndarray, threads: int | None, isa: str | None
) -> str | None:
    """Fill the buffer; returns the instruction set that merged, if anything was merged."""
    ran: str | None = None
    copies: list[np.ndarray] = []  # keeps what `_address` had to copy
    merged = [piece for piece in batch if piece.source.row is not None and piece.stop > piece.start]
    start = int(buffer.__array_interface__["data"][0])
    if merged:
        plan = native.MergePlan(
            base=[_address(piece.source.view, piece, copies) for piece in merged],
            planes=[
                [
                    None if delta is None else Memory("dense", delta.dtype, _address(delta, piece, copies))
                    for delta in piece.source.deltas
                ]
                for piece in merged
            ],
            lengths=[piece.stop - piece.start for piece in merged],
            rows=[piece.source.row for piece in merged if piece.source.row is not None],
            base_dtypes=[piece.source.view.dtype for piece in merged],
            out_dtypes=[piece.source.view.dtype for piece in merged],
            plane_count=table.shape[2],
            row_count=table.shape[1],
        )
        ran = plan.run(table, [[start + piece.position for piece in merged]], threads=threads, isa=isa)
    for piece in batch:
        if piece.source.row is None:
            buffer[piece.position : piece.position + _nbytes(piece)] = _bytes(piece.source.view, piece)
    return ran


def _write_batch(writer: SafetensorsWriter, batch: Sequence[_Piece], buffer: np.ndarray) -> None:
    for piece in batch:
        view = piece.source.view
        if piece.start == 0:
            writer.begin(view.name, view.dtype, view.shape)
        writer.write(buffer[piece.position : piece.position + _nbytes(piece)])
        if piece.stop * ITEM_SIZE[view.dtype] == view.nbytes:
            writer.end()


def _release(store: Store, batch: Sequence[_Piece]) -> None:
    for piece in batch:
        for file, view in zip(store.files, (piece.source.view, *piece.source.deltas), strict=False):
            if view is not None and view.mapped is file.data:
                item = ITEM_SIZE[view.dtype]
                file.release(view.offset + piece.start * item, view.offset + piece.stop * item)


def _nbytes(piece: _Piece) -> int:
    return (piece.stop - piece.start) * ITEM_SIZE[piece.source.view.dtype]


def _bytes(view: TensorView, piece: _Piece) -> np.ndarray:
    """The piece's bytes in a base, delta or head tensor."""
    item = ITEM_SIZE[view.dtype]
    return view.mapped[view.offset + piece.start * item : view.offset + piece.stop * item]


def _address(view: TensorView, piece: _Piece, copies: list[np.ndarray]) -> int:
    """Address of the piece in a mapped file; elements that a file does not align are copied first."""
    data = _bytes(view, piece)
    if view.offset % ITEM_SIZE[view.dtype]:
        data = data.copy()
        copies.append(data)
    return int(data.__array_interface__["data"][0])


def _aligned(nbytes: int) -> np.ndarray:
    """A buffer, uint8 [nbytes], that starts on a cache line."""
    room = np.empty(nbytes + 64, dtype=np.uint8)
    skip = -int(room.__array_interface__["data"][0]) % 64
    return room[skip : skip + nbytes]

"""Safetensors files: a strict reader that maps them and gives addresses, a writer that streams. No torch.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little
endian; the header, a JSON object from tensor name to dtype, shape and data offsets, padded with spaces; the
data without holes.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from paretofuse.engine.errors import StoreError
from paretofuse.engine.layout import ITEM_SIZE

Chunk = bytes | bytearray | memoryview | np.ndarray
"""Anything contiguous with the buffer protocol."""

TensorData = tuple[str, str, Sequence[int], Iterable[Chunk] | None]
"""A tensor to be written: name, dtype, shape, and its bytes in pieces, or None to leave it out."""

HEADER_LIMIT = 100_000_000
"""Longest header that the format allows, in bytes."""

HEADER_RESERVE = 1 << 17
"""Header bytes that the writer reserves unless told: room for about a thousand tensors."""

_DATA_ALIGNMENT = 64
_OTHER_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorView:
    """One tensor of a mapped file.

    Attributes:
        name: its name.
        dtype: its safetensors dtype.
        shape: its shape, in elements.
        offset: where its data start in the file, in bytes.
        nbytes: how many bytes they are.
        mapped: the whole file, uint8 [size]; it stays mapped as long as any of its views lives.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    mapped: np.ndarray = field(repr=False, compare=False)

    @cached_property
    def data(self) -> np.ndarray:
        """The bytes, uint8 [nbytes]: a view of the mapped file, writable, private.

        The address is a multiple of the element size. Tensors of files that start them elsewhere are copied.
        """
        data = self.mapped[self.offset : self.offset + self.nbytes]
        return data if self.offset % ITEM_SIZE[self.dtype] == 0 else data.copy()

    @property
    def address(self) -> int:
        """Address of the first byte, valid as long as this view or its `data` lives."""
        return int(self.data.__array_interface__["data"][0])


class SafetensorsFile:
    """A safetensors file, mapped: its header is read and checked, its data are paged in when touched.

    Attributes:
        path: where it is.
        data: the whole file, uint8 [size].
        tensors: every tensor by name, in the order of the data.
        metadata: the header's own strings.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map a file.

        Raises:
            StoreError: the file is missing or is not a well-formed safetensors file; says which and why.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise _malformed(
                        self.path, f"{size} bytes are too few; it is truncated or another kind of file"
                    )
                # Copy-on-write pages: torch and numpy get writable memory, the file stays as it is.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error.strerror}); check the path") from error
        self.data: np.ndarray = np.frombuffer(self._map, dtype=np.uint8)
        (length,) = struct.unpack("<Q", self._map[:8])
        if length > HEADER_LIMIT or 8 + length > size:
            raise _malformed(
                self.path,
                f"its header should take {length} bytes of {size}; it is truncated or another kind of file",
            )
        self.metadata, entries = _parse_header(self.path, self._map[8 : 8 + length])
        self.tensors = self._check(entries, 8 + length)

    def release(self, start: int, stop: int) -> None:
        """Let the system drop the pages between two byte offsets; touching them reads them again.

        Whatever was written to these pages through the mapping is lost.
        """
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, stop // page * page
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _check(self, entries: Mapping[str, Any], data_start: int) -> dict[str, TensorView]:
        views = [self._view(name, entry, data_start) for name, entry in entries.items()]
        views.sort(key=lambda view: (view.offset, view.nbytes))
        end = data_start
        for view in views:
            if view.offset != end:
                wrong = "overlaps the tensor before it" if view.offset < end else "leaves a hole before it"
                raise _malformed(self.path, f"tensor {view.name!r} {wrong}")
            end += view.nbytes
        if end != len(self.data):
            missing = end - len(self.data)
            raise _malformed(
                self.path,
                f"it is truncated: {missing} bytes are missing"
                if missing > 0
                else f"{-missing} bytes too many",
            )
        return {view.name: view for view in views}

    def _view(self, name: str, entry: Any, data_start: int) -> TensorView:
        if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
            raise _malformed(self.path, f"tensor {name!r} should have {sorted(_ENTRY_KEYS)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype in _OTHER_DTYPES:
            raise StoreError(
                f"{self.path}: tensor {name!r} is {dtype}, a dtype of the safetensors format that is not read here; "
                "convert it to a wider one first, such as bfloat16"
            )
        if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
            raise _malformed(
                self.path, f"tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(ITEM_SIZE)}"
            )
        if not _is_sizes(shape):
            raise _malformed(self.path, f"tensor {name!r} has shape {shape!r}, expected integers >= 0")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise _malformed(
                self.path, f"tensor {name!r} has data offsets {offsets!r}, expected two integers >= 0"
            )
        begin, end = offsets
        expected = math.prod(shape) * ITEM_SIZE[dtype]
        if end - begin != expected:
            raise _malformed(
                self.path,
                f"tensor {name!r} has bytes {begin} to {end}, but {dtype} of shape {shape} takes {expected}",
            )
        return TensorView(name, dtype, tuple(shape), data_start + begin, expected, self.data)


def _malformed(path: Path, reason: str) -> StoreError:
    return StoreError(f"{path}: not a valid safetensors file: {reason}; copy or create it again")


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"key {twice!r} appears twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if not header.startswith(b"{"):
        raise _malformed(path, "its header does not begin with '{'")
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is damaged ({error})") from error
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(path, "its metadata should map names to strings")
    return metadata, parsed


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor; the header is filled in at the end.

    Use it as a context manager: leaving it finishes the file, leaving it by an exception only closes it.
    Tensors start on a multiple of their element size if larger element sizes come first.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, str] | None = None,
        reserve: int = HEADER_RESERVE,
    ) -> None:
        """Create the file.

        Args:
            path: where; an existing file is overwritten.
            metadata: the header's own strings.
            reserve: bytes to keep for the header. A longer one costs a second copy of the data, nothing else.
        """
        self.path = Path(path)
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._start = _round_up(8 + reserve)
        self._end = 0  # bytes of data written, relative to the start of the data
        self._open_tensor: tuple[str, int, int] | None = None  # name, first byte, bytes expected
        self._file: IO[bytes] = open(self.path, "wb")  # noqa: SIM115 - closed by close() or __exit__
        self._file.seek(self._start)

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Start a tensor; then call `write` for its bytes, and `end`."""
        if self._open_tensor is not None:
            raise ValueError(
                f"got tensor {name!r} before the end of {self._open_tensor[0]!r}; call end() first"
            )
        if name in self._header or name == "__metadata__":
            raise ValueError(f"got tensor {name!r} twice, expected each name once")
        if dtype not in ITEM_SIZE:
            raise ValueError(
                f"got dtype {dtype!r} for tensor {name!r}, expected one of {', '.join(ITEM_SIZE)}"
            )
        expected = math.prod(shape) * ITEM_SIZE[dtype]
        self._header[name] = {
            "dtype": dtype,
            "shape": [int(size) for size in shape],
            "data_offsets": [self._end, self._end + expected],
        }
        self._open_tensor = (name, self._end, expected)

    def write(self, chunk: Chunk) -> None:
        """Append bytes to the current tensor."""
        self._current()
        self._end += self._file.write(cast("bytes", chunk))

    def end(self) -> None:
        """Finish the current tensor."""
        name, first, expected = self._current()
        if self._end - first != expected:
            entry = self._header[name]
            raise ValueError(
                f"got {self._end - first} bytes for tensor {name!r}, expected {expected}: "
                f"{entry['dtype']} of shape {entry['shape']}"
            )
        self._open_tensor = None

    def add(self, name: str, dtype: str, shape: Sequence[int], chunks: Iterable[Chunk] | None) -> None:
        """Write a whole tensor from its pieces; None leaves it out."""
        if chunks is None:
            return
        self.begin(name, dtype, shape)
        for chunk in chunks:
            self.write(chunk)
        self.end()

    def sync(self) -> None:
        """Wait until what was written so far is on the disk, but for the last few kilobytes; for a thread beside."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the header and close the file."""
        if self._open_tensor is not None:
            raise ValueError(
                f"got the end of the file within tensor {self._open_tensor[0]!r}; call end() first"
            )
        header = json.dumps(self._header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() < self._start:  # no data at all: the file still ends where the data would begin
            self._file.truncate(self._start)
        if 8 + len(header) > self._start:
            self._make_room(_round_up(8 + len(header)))
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._start - 8) + header.ljust(self._start - 8))
        self._file.close()

    def _make_room(self, start: int) -> None:
        self._file.close()
        longer = self.path.with_name(self.path.name + ".longer")
        with open(self.path, "rb") as source, open(longer, "wb") as target:
            source.seek(self._start)
            target.seek(start)
            shutil.copyfileobj(source, target, 1 << 20)
            target.truncate(start + self._end)
        os.replace(longer, self.path)
        self._start = start
        self._file = open(self.path, "r+b")  # noqa: SIM115

    def _current(self) -> tuple[str, int, int]:
        if self._open_tensor is None:
            raise ValueError("got data outside of a tensor; call begin() first")
        return self._open_tensor

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._file.closed:
                self.close()
        finally:
            self._file.close()


def _round_up(offset: int) -> int:
    return -(-offset // _DATA_ALIGNMENT) * _DATA_ALIGNMENT

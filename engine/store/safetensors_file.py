"""Safetensors files: a strict reader that maps them, and a writer that streams, both in C++. No torch.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little
endian; the header, a JSON object from tensor name to dtype, shape and data offsets, padded with spaces; the
data without holes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np

from paretofuse.engine.extension import _C

SafetensorsFile = _C.SafetensorsFile
"""A file, mapped: `SafetensorsFile(path)` reads and checks its header, `tensors` has a TensorView for each name in the
order of the data, `metadata` the header's own strings. Raises StoreError, saying which file and why."""

TensorView = _C.TensorView
"""A tensor of a mapped file: `name`, `dtype`, `shape`,
`offset` and `nbytes` in the file, and `data`, its bytes as a uint8 array [nbytes]: a view of the mapped file, writable,
private, aligned to the element size (which takes a copy where the file does not align it). The file stays mapped as
long as any of these lives."""

Chunk = bytes | bytearray | memoryview | np.ndarray
"""Anything contiguous with the buffer protocol."""

TensorData = tuple[str, str, Sequence[int], Iterable[Chunk] | None]
"""A tensor to be written: name, dtype, shape, and its bytes in pieces, or None to leave it out."""

HEADER_RESERVE = 1 << 17
"""Header bytes that the writer reserves unless told: room for about a thousand tensors."""


class SafetensorsWriter(_C.SafetensorsWriter):
    """Writes a safetensors file tensor by tensor; the header is filled in at the end.

    Use it as a context manager: leaving it finishes the file, leaving it by an exception leaves no valid one.
    Tensors start on a multiple of their element size if larger element sizes come first.

    Args:
        path: where; an existing file is overwritten.
        metadata: the header's own strings.
        reserve: bytes to keep for the header. A longer one costs a second pass over the data, nothing else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, str] | None = None,
        reserve: int = HEADER_RESERVE,
    ) -> None:
        super().__init__(path, metadata=dict(metadata or {}), reserve=reserve)

    def add(self, name: str, dtype: str, shape: Sequence[int], chunks: Iterable[Chunk] | None) -> None:
        """Write a whole tensor from its pieces; None leaves it out.

        Raises:
            ValueError: a name that was there before, an unknown dtype, or pieces of another size in all.
        """
        if chunks is None:
            return
        self.begin(name, dtype, list(shape))
        for chunk in chunks:
            self.write(chunk)
        self.end()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

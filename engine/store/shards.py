"""The files that a model's weights are cut into, and their index, as transformers writes them; in C++. No torch."""

from __future__ import annotations

from paretofuse.engine.extension import _C

shard_ends = _C.shard_ends
"""(bytes of each tensor, bytes of one file at most) -> where each file ends: the tensor's number behind its last."""

shard_name = _C.shard_name
"""(stem, number from 0 on, count of files) -> a file's name."""

index_name = _C.index_name
"""(stem) -> the index's name."""

index_text = _C.index_text
"""(parameters in all, bytes in all, the file of each tensor) -> the index's content."""

"""Merge from disk to disk, in C++: a mapped store goes through the native kernel into a model directory. No torch.

Memory stays at two output buffers and the mapped pages of one batch, whatever the size of the model.
"""

from __future__ import annotations

import os

import numpy as np

from paretofuse.engine.extension import _C, thread_count
from paretofuse.engine.merging.card import with_card
from paretofuse.engine.routing.families import FAMILIES
from paretofuse.engine.routing.preference import Preference, as_preference, by_name
from paretofuse.engine.store.paths import as_path
from paretofuse.engine.store.reader import Progress, Store
from paretofuse.engine.termination import termination_raises

Merged = _C.Merged
"""What a merge wrote: `path`, the number of `tensors`, their `nbytes`, and `isa`, the instruction set that merged them
(None if the store holds nothing but constants)."""

BATCH_BYTES = 8 << 20
"""Output bytes merged at once."""

SHARD_BYTES = 5_000_000_000
"""Bytes of one of a directory's weight files, at most, as transformers cuts them."""


def merge_store(
    store: Store | str | os.PathLike[str],
    preference: Preference | None,
    out: str | os.PathLike[str],
    *,
    weights: np.ndarray | None = None,
    head: str | None = None,
    threads: int | None = None,
    isa: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge a store for one preference into a complete model directory, or into one safetensors file.

    The result is written beside its place, synced and renamed: it is there whole or not at all. Tied tensors
    are written once, under the name they are stored by.

    Args:
        store: the store, or its directory.
        preference: the preference, if no weights are given.
        out: a directory (the weights, the model's own files and a model card, README.md), or a path that ends in
            .safetensors. An earlier merge there is replaced, and nothing else is. A directory's weights of more than
            5 GB are cut into several files with an index, as transformers cuts them.
        weights: routing weights instead of a preference, [G, P], with those of rows [G + R, P], of columns too
            [G + R + C, P].
        head: the objective whose head to use; none keeps the base's.
        threads: threads of the native kernel; unless told, as many as this process may use.
        isa: forces an instruction set, see `paretofuse doctor`.
        verify: read every file of the store first and compare its checksum with the manifest.
        progress: called with the bytes written and the bytes in all.

    Raises:
        ValueError: a bad preference, weights, head or instruction set, or an `out` that holds other files.
        StoreError: the store cannot be read, or was changed meanwhile.
        OSError: writing failed; what was there before is untouched.
    """
    # A mapping of its own, since its pages are dropped on the way.
    store = Store.open(store.path if isinstance(store, Store) else store)
    routing = _routing_weights(store, preference, weights)
    shares = None if preference is None else by_name(preference, store.layout.objectives)
    if verify:
        store.verify(threads=threads)
    with termination_raises():
        return store.core.merge(
            routing,
            as_path(out),
            head=head or "",
            files=with_card(store.model_files(head), store, shares, routing, head),
            threads=thread_count(threads),
            isa=isa or "",
            progress=progress,
            batch_bytes=BATCH_BYTES,
            shard_bytes=SHARD_BYTES,
        )


def _routing_weights(store: Store, preference: Preference | None, weights: np.ndarray | None) -> np.ndarray:
    """The routing weights of a preference, or the given ones, float32 [G, P], [G + R, P] or [G + R + C, P]."""
    planes = len(store.layout.members)
    shapes = [(width, planes) for width in store.layout.widths[: 1 + FAMILIES.index(store.family)]]
    if (preference is None) == (weights is None):
        raise ValueError("got both or neither of a preference and weights, expected one of them")
    if preference is not None:
        weights = store.routing_weights(as_preference(preference, store.layout.objectives))
    weights = np.asarray(weights, dtype=np.float32)
    if weights.shape not in shapes or not np.isfinite(weights).all():
        raise ValueError(
            f"got routing weights of shape {weights.shape}, expected finite numbers of shape "
            f"{' or '.join(map(str, shapes))}"
        )
    return np.ascontiguousarray(weights)

"""Random numbers by counting: the number of an element depends on seed, tensor, model and position alone.

So a merge is the same whatever the threads, the order of the tensors or the machine, and no mask is ever stored. The
mixing function is a finalizer of two rounds, each of two multiplications by odd constants and three xor-shifts; see
csrc/src/simd/draws.h, which computes the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = ((0x7FEB352D, 0x846CA68B), (0x21F0AAAD, 0xD35A2D97))
_STRIDE = 0x9E3779B9
_HIGH = 0x85EBCA6B

Key = tuple[int, int]
"""Two 32-bit numbers that stand for (seed, tensor, model)."""


def key_of(seed: int, tensor: str, model: int) -> Key:
    """The key of one model's tensor."""
    digest = hashlib.sha256(f"{seed}\n{model}\n{tensor}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def draws(key: Key, count: int) -> npt.NDArray[np.uint32]:
    """The numbers of elements 0 to count - 1: uniform among 0 .. 2^24 - 1."""
    index = np.arange(count, dtype=np.uint64)
    high = (index >> np.uint64(32)).astype(np.uint32) * np.uint32(_HIGH)
    x = index.astype(np.uint32) * np.uint32(_STRIDE) + np.uint32(key[0]) + high
    for number, (first, second) in enumerate(_ROUNDS):
        x = x ^ np.uint32(key[1]) if number else x
        x = (x ^ (x >> np.uint32(16))) * np.uint32(first)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(second)
        x = x ^ (x >> np.uint32(16))
    found: npt.NDArray[np.uint32] = x >> np.uint32(8)
    return found


def threshold(probability: npt.NDArray[np.float32] | float) -> npt.NDArray[np.uint32]:
    """Numbers below this are as frequent as the probability, in steps of 2^-24."""
    scaled = np.asarray(probability, np.float32) * np.float32(1 << 24)
    below: npt.NDArray[np.uint32] = np.rint(scaled).astype(np.uint32)
    return below

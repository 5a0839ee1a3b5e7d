"""The fake CUDA driver that the tests of libparetofuse build."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

STREAM = 0x1230

MARK = 1 << 62
"""What tells the fake's device addresses from the host's."""


class Driver:
    """The fake driver library, which `dlopen` finds once for the test and for the library under test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.fake_log.restype = ctypes.c_char_p
        self.c.fake_size.restype = ctypes.c_int64

    def reset(self, fail_at: int = 0) -> None:
        self.c.fake_reset(ctypes.c_int(fail_at))

    def log(self) -> list[str]:
        return self.c.fake_log().decode().splitlines()  # type: ignore[no-any-return]

    def launched(self) -> list[str]:
        """The kernels' files, launch by launch."""
        return [
            call.split(" file ")[1].split()[0] for call in self.log() if call.startswith("cuLaunchKernel")
        ]

    def memory(self, address: int, dtype: torch.dtype) -> Tensor:
        """The device's memory from an address to the end of its allocation, as it is now."""
        size = self.c.fake_size(ctypes.c_uint64(address))
        assert size > 0, hex(address)
        start = ctypes.c_char * size
        return torch.frombuffer(start.from_address(address ^ MARK), dtype=dtype)

    def check(self) -> None:
        """Nothing was misused, and everything was given back."""
        assert (self.c.fake_misuses(), self.c.fake_live()) == (0, 0), self.log()

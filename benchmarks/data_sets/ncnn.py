"""Reads the weights of ncnn's files: NAME.param, the graph as text, and NAME.bin, the weights in the graph's order.

Each line of the graph, after two with a magic number and counts, is one layer: kind, name, how many inputs and outputs,
their names, and parameters "number=value". Of each layer with weights the .bin holds the kernel, then the float32 bias.
A kernel begins with a 4-byte tag: 0 for float32, 0x01306B47 for float16 padded to 4 bytes. Source: ncnn's wiki,
"param and model file structure".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = "7767517"
FLOAT32, FLOAT16 = 0, 0x01306B47
KERNEL_SIZES = {"Convolution": "6", "Deconvolution": "6", "InnerProduct": "2"}
"""The kinds with weights, and the parameter with the number of a kernel's elements; parameter 0 has the outputs."""

Floats = npt.NDArray[np.float32]


class NcnnError(ValueError):
    """A file is not what ncnn writes, or holds what this reader does not read."""


@dataclass(frozen=True)
class Weights:
    """Of one layer.

    Attributes:
        kind: one of KERNEL_SIZES.
        name: the layer's.
        kernel: float32 [outputs, inputs * height * width], of a Deconvolution too.
        bias: float32 [outputs].
    """

    kind: str
    name: str
    kernel: Floats
    bias: Floats


def read(graph: Path, content: Path) -> list[Weights]:
    """All layers with weights, in the graph's order.

    Args:
        graph: the .param file.
        content: the .bin file.

    Raises:
        NcnnError: a file is not as the head of this module says, too short or too long.
        OSError: a file cannot be read.
    """
    lines = graph.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].strip() != MAGIC:
        raise NcnnError(f"{graph} starts with {lines[:1]}, expected ncnn's magic number {MAGIC}")
    data, at, found = content.read_bytes(), 0, []

    def take(kind: str, count: int) -> npt.NDArray[np.float32]:
        nonlocal at
        end = at + count * np.dtype(kind).itemsize
        if end > len(data):
            raise NcnnError(f"{content} ends at {len(data)} bytes, expected {end} or more")
        values = np.frombuffer(data, kind, count, at).astype(np.float32)
        at = (end + 3) // 4 * 4
        return values

    for line in lines[2:]:
        words = line.split()
        if not words or words[0] not in KERNEL_SIZES:
            continue
        try:
            numbers = dict(word.split("=", 1) for word in words[4 + int(words[2]) + int(words[3]) :])
            outputs, size = int(numbers["0"]), int(numbers[KERNEL_SIZES[words[0]]])
            with_bias = numbers.get("5" if KERNEL_SIZES[words[0]] == "6" else "1") == "1"
        except (IndexError, KeyError, ValueError) as error:
            raise NcnnError(f"{graph}: cannot read the layer {line.strip()!r} ({error!r})") from error
        if outputs < 1 or size < 1 or size % outputs or not with_bias:
            raise NcnnError(f"{graph}: {size} elements for {outputs} outputs with a bias in {line.strip()!r}")
        tag = int.from_bytes(data[at : at + 4], "little")
        if tag not in (FLOAT32, FLOAT16):
            raise NcnnError(f"{content}: tag {tag:#010x} at byte {at}, expected float32 or float16 kernels")
        at += 4
        kernel = take("<f4" if tag == FLOAT32 else "<f2", size).reshape(outputs, size // outputs)
        bias = take("<f4", outputs)
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise NcnnError(f"{content}: {words[1]} has numbers that are not finite")
        found.append(Weights(words[0], words[1], kernel, bias))
    if at != len(data):
        raise NcnnError(f"{content} has {len(data)} bytes, expected {at}")
    return found


def shaped(weights: Weights, shape: tuple[int, ...]) -> Floats:
    """A kernel in PyTorch's layout, whose Deconvolution has inputs before outputs.

    Args:
        weights: of a layer.
        shape: PyTorch's of that layer's weight.

    Raises:
        NcnnError: the kernel has another number of elements or outputs.
    """
    turned = weights.kind == "Deconvolution"
    own = (shape[1], shape[0], *shape[2:]) if turned else shape
    if weights.kernel.size != math.prod(own) or len(weights.kernel) != own[0]:
        raise NcnnError(
            f"{weights.name} has a kernel of shape {list(weights.kernel.shape)}, expected {list(shape)}"
        )
    kernel = weights.kernel.reshape(own)
    return np.ascontiguousarray(kernel.swapaxes(0, 1) if turned else kernel)

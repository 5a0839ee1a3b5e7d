"""Writes a model's weights as ncnn's tools do, for tests of the reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn


def write_ncnn(model: nn.Module, folder: Path, half: bool) -> None:
    """m.param and m.bin in a folder: the layers with weights in order, an activation's layer between them."""
    lines, content = [], b""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    for number, layer in enumerate(layers):
        kernel, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        if isinstance(layer, nn.Linear):
            about = f"InnerProduct l{number} 1 1 in out 0={len(bias)} 1=1 2={kernel.size} 9=1"
        elif isinstance(layer, nn.ConvTranspose2d):
            kernel = kernel.swapaxes(0, 1)
            about = f"Deconvolution l{number} 1 1 in out 0={len(bias)} 1=4 3=2 5=1 6={kernel.size}"
        else:
            about = (
                f"Convolution l{number} 1 1 in out 0={len(bias)} 1=3 5=1 6={kernel.size} 9=2 -23310=1,1.0e-01"
            )
        lines += [about, f"BinaryOp b{number} 2 1 in out sum 0=2"]
        stored = kernel.astype("<f2" if half else "<f4").tobytes()
        content += (0x01306B47 if half else 0).to_bytes(4, "little") + stored + b"\0" * (-len(stored) % 4)
        content += bias.astype(np.float32).tobytes()
    text = "\n".join(["7767517", f"{len(lines)} {len(lines) + 1}", *lines])
    (folder / "m.param").write_text(text + "\n", encoding="utf-8")
    (folder / "m.bin").write_bytes(content)

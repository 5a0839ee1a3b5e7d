"""A dtype has many names, and every face of the library reads all of them alike."""

from __future__ import annotations

import argparse

import pytest
import torch

import paretofuse as pf
from paretofuse.cli.program import make_parser
from paretofuse.engine.planes.choose import parse
from paretofuse.kernels.aot import build, variants
from tests.support.models import net_and_experts

NAMES = [
    (dtype, name)
    for dtype, names in {
        torch.float32: [torch.float32, "float32", "torch.float32", "fp32", "F32", "float"],
        torch.bfloat16: [torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16", "BF16"],
        torch.float16: [torch.float16, "float16", "torch.float16", "fp16", "F16", "half"],
    }.items()
    for name in names
]


@pytest.mark.parametrize(("dtype", "name"), NAMES)
def test_every_face_reads_it(dtype: torch.dtype, name: torch.dtype | str) -> None:
    base, experts = net_and_experts(count=2)
    engine = pf.stack(base, experts, dtype=name, delta_dtype=name)
    assert {t.dtype for t in engine.merge([0.5, 0.5]).parameters()} == {dtype}
    assert {spec.delta_dtype for spec in engine.layout.with_role("routed", "static")} == {parse(name).dtype}
    element = torch.empty(0, dtype=dtype).element_size()
    wide = pf.stack(base, experts, planes=name).planes["b"]
    assert {
        plane.nbytes // spec.numel for spec in engine.layout.tensors if (plane := wide.get(spec.name))
    } == {element}
    words = ["stack", "x", "--expert", "a=y", "-o", "z", "--dtype", str(name), "--delta-dtype", str(name)]
    options = make_parser().parse_args(words)
    assert (
        pf.stack(base, experts, dtype=options.dtype).merge([1, 0]).state_dict().keys()
        == base.state_dict().keys()
    )
    assert variants.DTYPES[build.float_name(str(name))] == dtype


@pytest.mark.parametrize("name", ["int8", "f64", "", "torch.", "bfloat", torch.float64, 16, None])
def test_what_is_no_such_dtype_is_refused_alike(name: object) -> None:
    base, experts = net_and_experts(count=2)
    if name is not None:  # which keeps the base's own
        for argument in ("dtype", "delta_dtype"):
            with pytest.raises(ValueError, match=rf"got {argument}={name}, expected torch\.float32"):
                pf.stack(base, experts, **{argument: name})  # type: ignore[arg-type]
    if isinstance(name, str):
        with pytest.raises(argparse.ArgumentTypeError, match="expected float32, bfloat16 or float16"):
            build.float_name(name)
    if name != "int8":
        with pytest.raises(ValueError, match=f"got planes={name!r}"):
            pf.stack(base, experts, planes=name)  # type: ignore[arg-type]

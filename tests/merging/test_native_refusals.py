"""What the native merge refuses, before anything is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paretofuse.engine.merging import native
from tests.support.native import USABLE, Model, isas, poisoned, random_weights
from tests.support.process import python


@isas
def test_the_environment_forces_an_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model([100])
    weights = random_weights(1, 2, 3)
    out = poisoned(100, "F32")
    monkeypatch.setenv("PARETOFUSE_ISA", isa)
    assert native.chosen_isa() == isa
    assert model.plan.run(weights, [[out.data_ptr()]]) == isa
    for other in USABLE:  # the argument wins
        assert model.plan.run(weights, [[out.data_ptr()]], isa=other) == other
    monkeypatch.setenv("PARETOFUSE_ISA", "")
    assert native.chosen_isa() == USABLE[0]


def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = next((name for name, usable in native.instruction_sets().items() if not usable), "mmx")
    for name in (missing, "fastest"):
        with pytest.raises(ValueError, match=rf'isa: got "{name}".*{", ".join(USABLE)}'):
            native.chosen_isa(name)
        with pytest.raises(ValueError, match=name):
            Model([4]).run(random_weights(1, 2, 3), isa=name)
        with pytest.raises(ValueError, match=name):
            native.copy(0, 0, 0, isa=name)
    monkeypatch.setenv("PARETOFUSE_ISA", missing)
    with pytest.raises(ValueError, match=rf'PARETOFUSE_ISA: got "{missing}"'):
        native.chosen_isa()
    assert native.chosen_isa("scalar") == "scalar"


def make_plan(**changes: object) -> native.MergePlan:
    memory = np.zeros(16, np.float32)
    arguments: dict[str, object] = {
        "base": [memory.ctypes.data],
        "planes": [[None, None]],
        "lengths": [16],
        "rows": [0],
        "base_dtypes": ["F32"],
        "out_dtypes": ["F32"],
        "plane_count": 2,
        "row_count": 3,
    }
    return native.MergePlan(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [16, 16]}, "lengths: got 2 entries, expected 1"),
        ({"planes": []}, "planes: got 0 entries, expected 1"),
        ({"planes": [[None]]}, "planes: got 1 for tensor 0, expected 2"),
        ({"rows": [3]}, "row of segment 0: got 3, expected 0 to 2"),
        ({"rows": [-1]}, "row of segment 0: got -1, expected 0 to 2"),
        ({"lengths": [-1]}, "length of segment 0: got -1"),
        ({"lengths": [2**62]}, "length of segment 0"),
        ({"base": [0]}, "base of segment 0: got a null address"),
        ({"out_dtypes": ["F64"]}, "dtype: got 'F64', expected one of F32, BF16, F16"),
        ({"planes": [[]], "plane_count": 0}, "plane_count: got 0"),
        ({"row_count": 0}, "row_count: got 0"),
    ],
)
def test_plans_refuse_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**changes)


def test_runs_refuse_what_does_not_fit_and_write_nothing() -> None:
    model = Model([100, 7])
    good = random_weights(1, 2, 3)
    out = [poisoned(100, "F32"), poisoned(7, "F32")]
    table = [[t.data_ptr() for t in out]]
    with pytest.raises(TypeError, match="weights: got float64, expected a float32"):
        model.plan.run(good.astype(np.float64), table)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights: got list"):
        model.plan.run([[0.0]], table)  # type: ignore[arg-type]
    for weights in (
        random_weights(1, 3, 3),
        random_weights(1, 2, 2),
        good[0],
        random_weights(1, 3, 2).swapaxes(1, 2),
    ):
        with pytest.raises(ValueError, match="weights: got shape"):
            model.plan.run(weights, table)
    with pytest.raises(ValueError, match="0 preferences"):
        model.plan.run(good[:0], np.zeros((0, 2), np.uint64))
    with pytest.raises(ValueError, match="out: got shape"):
        model.plan.run(random_weights(2, 2, 3), table)
    with pytest.raises(ValueError, match="out of segment 1, preference 0: got a null address"):
        model.plan.run(good, [[out[0].data_ptr(), 0]])
    with pytest.raises(ValueError, match="overlaps the base or a plane"):
        model.plan.run(good, [[out[0].data_ptr(), model.base[1].data_ptr() + 4]])
    delta = model.deltas[1][2]
    assert delta is not None
    with pytest.raises(ValueError, match="overlaps the base or a plane"):
        model.plan.run(good, [[out[0].data_ptr(), delta.data_ptr()]])
    for threads in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads: got {threads}"):
            model.plan.run(good, table, threads=threads)
    assert all(t.isnan().all() for t in out)


def test_inner_and_copy_refuse_what_does_not_fit() -> None:
    grad = torch.zeros(4)
    with pytest.raises(ValueError, match="grad: got a null address"):
        native.inner(0, [None], 4, grad_dtype="F32")
    with pytest.raises(ValueError, match="planes: got 0"):
        native.inner(grad.data_ptr(), [], 4, grad_dtype="F32")
    with pytest.raises(ValueError, match="length: got -1"):
        native.inner(grad.data_ptr(), [None], -1, grad_dtype="F32")
    with pytest.raises(ValueError, match="dtype: got 'I8'"):
        native.inner(grad.data_ptr(), [None], 4, grad_dtype="I8")
    with pytest.raises(ValueError, match="nbytes: got -1"):
        native.copy(0, 0, -1)
    with pytest.raises(ValueError, match="null"):
        native.copy(0, grad.data_ptr(), 4)


def test_importing_needs_no_torch_and_a_missing_extension_tells_the_remedy() -> None:
    python("import sys; from paretofuse.engine.merging import native; sys.exit('torch' in sys.modules)")
    missing = "import sys; sys.modules['paretofuse._C'] = None; from paretofuse.engine.merging import native"
    told = python(missing, code=1)
    assert "ImportError: ParetoFuse's native extension could not be loaded" in told
    assert "pip install" in told

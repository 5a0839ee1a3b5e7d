"""Descriptions of what a run depends on: equal for equal values, JSON, finite for cycles and large objects."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from paretofuse.engine.solvers import EPO, LinearScalarization
from paretofuse.engine.training.identity import differences, plain


class Holder:
    """An object that holds something."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None), (True, True), (3, 3), (np.int64(3), 3), (0.1, 0.1), (np.float64(0.1), 0.1), ("ls", "ls"),
        ((1, 2.5), [1, 2.5]), ({"a": (1,)}, {"a": [1]}), ({3: 1}, {"3": 1}), ({2, 1}, [1, 2]),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]), (torch.tensor(2.5), 2.5), (np.eye(2), [[1.0, 0.0], [0.0, 1.0]]),
        (LinearScalarization(), "LinearScalarization"), (EPO(0.5), {"kind": "EPO", "tolerance": 0.5}),
        (EPO, "EPO"), (len, "len"), (Holder({"a": 1}), {"kind": "Holder", "held": {"a": 1}}), (object(), "object"),
        (partial(max, 1, key=len), {"kind": "partial", "function": "max", "arguments": [1], "options": {"key": "len"}}),
        (np.bool_(True), True),
    ],
)  # fmt: skip
def test_descriptions(value: Any, expected: Any) -> None:
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)
    assert json.loads(json.dumps(found)) == found


def test_large_arrays_are_digests_of_all_their_numbers_and_shape() -> None:
    many = torch.arange(257)
    other = many.clone()
    other[-1] = 0
    digests = [plain(x) for x in (many, many.clone(), other, many[None])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(isinstance(digest, str) and len(digest) == 16 for digest in digests)
    assert plain(torch.arange(256)) == list(range(256))


def test_cycles_end() -> None:
    one, other = Holder(None), Holder(3)
    one.held = [other, one]
    assert plain(one) == {"kind": "Holder", "held": [{"kind": "Holder", "held": 3}, "Holder"]}


def test_differences_are_named_by_their_innermost_place() -> None:
    theirs = {"method": {"kind": "EPO", "tolerance": 0.1, "old": 1}, "seed": 0, "gone": 1, "same": [1, 2]}
    ours = {"method": {"kind": "EPO", "tolerance": 0.2, "new": 2}, "seed": 0, "lr": 3, "same": [1, 2]}
    assert list(differences(theirs, ours)) == [
        "method.tolerance=0.1 (now 0.2)", "method.new=None (now 2)", "method.old=1 (now None)", "lr=None (now 3)",
    ]  # fmt: skip
    assert list(differences({"a": 1}, {"a": {"b": 1}})) == ["a=1 (now {'b': 1})"]
    assert list(differences(ours, ours)) == []

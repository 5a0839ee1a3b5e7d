"""Solvers by name, their options, and the guide that lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretofuse.engine.solvers import (
    EPO,
    SOLVERS,
    LinearScalarization,
    get_solver,
)


def test_names_and_options() -> None:
    assert get_solver("epo", {"tolerance": 1e-2}) == EPO(1e-2)
    assert get_solver("ls") == LinearScalarization()
    own = LinearScalarization()
    assert get_solver(own) is own
    with pytest.raises(ValueError, match="got method 'eppo', expected one of"):
        get_solver("eppo")
    with pytest.raises(ValueError, match=r"unknown options \['tol'\].*\['tolerance'\]"):
        get_solver("epo", {"tol": 1})
    with pytest.raises(ValueError, match=r"no \['aggregator'\]"):
        get_solver("torchjd")
    with pytest.raises(ValueError, match="beside a solver"):
        get_solver(own, {"tolerance": 1})
    with pytest.raises(TypeError, match="got method of type int"):
        get_solver(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got method EPO, a class, expected a solver: EPO\(\.\.\.\)"):
        get_solver(EPO)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("epo", {"tolerance": -1}),
        ("stch", {"smoothing": 0}),
        ("mgda", {"normalize": "l2"}),
        ("cosmos", {"strength": float("nan")}),
        ("cosmos", {"align": "ray"}),
        ("hypervolume", {"strength": -1}),
    ],
)
def test_bad_option_values(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"got {next(iter(options))}="):
        get_solver(name, options)


def test_the_guide_names_every_solver_and_its_example_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text(encoding="utf-8")
    headings = [line[3:].split(":")[0] for line in text.splitlines() if line.startswith("## ")]
    assert sorted(headings) == sorted([*SOLVERS, "Your own"])
    example = text.split("```python\n")[1].split("```")[0]
    exec(compile(example, "docs/solvers.md", "exec"), {"__name__": "guide"})

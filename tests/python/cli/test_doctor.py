"""doctor checks the versions that the code needs."""

from __future__ import annotations

import pytest

from paretofuse.cli import doctor


@pytest.mark.parametrize(
    ("name", "installed", "problem"),
    [
        (
            "transformers",
            "4.57.3",
            "transformers 4.57.3 is older than 5.20; pip install -U 'transformers>=5.20'",
        ),
        ("torch", "2.5.1+cu124", "torch 2.5.1+cu124 is older than 2.6"),
        ("peft", "0.9.0", "peft 0.9.0 is older than"),
        ("matplotlib", "3.7", "matplotlib 3.7 is older than"),
        ("numpy", "1.26.0", None),
        ("transformers", "5.20.0rc1", None),
        ("transformers", "10.1", None),
    ],
)
def test_versions_that_are_too_old(
    monkeypatch: pytest.MonkeyPatch, name: str, installed: str, problem: str | None
) -> None:
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: installed if package == name else real(package))
    problems = doctor.examine().problems
    assert [text for text in problems if text.startswith(name)] == [
        text for text in problems if "older" in text
    ]
    assert any(text.startswith(problem) for text in problems) if problem else problems == []

"""A front as text, as HTML and as a pandas table."""

from __future__ import annotations

import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas
import pytest

from paretofuse.fronts.front import Front


def front_of(points: int = 3, maximize: bool = True, names: tuple[str, str] = ("news", "poems")) -> Front:
    shares = np.linspace(0, 1, points)
    values = np.column_stack([shares**2, 1 - shares])
    return Front(np.column_stack([shares, 1 - shares]), values, names, names, maximize)


def test_repr_is_a_table() -> None:
    front = Front(
        np.array([[1, 0], [0.5, 0.5], [0, 1]]), np.array([[10.0, 30.25], [2.0, 31.0], [9.0, 20.0]]),
        ("news", "poems"), ("accuracy", "perplexity"), (True, False),
    )  # fmt: skip
    assert repr(front).splitlines() == [
        "Front of 3 preferences over news, poems: 2 not dominated",
        "share of news  share of poems  accuracy (higher is better)  perplexity (lower is better)",
        "            1               0                           10                         30.25",
        "          0.5             0.5                            2                            31  dominated",
        "            0               1                            9                            20",
    ]


def test_long_fronts_are_shortened() -> None:
    text = repr(front_of(101))
    assert len(text.splitlines()) < 30
    assert "..." in text
    assert text.startswith("Front of 101 preferences")
    assert len(repr(front_of(24)).splitlines()) == 26


def test_a_front_against_its_preferences_says_so() -> None:
    assert "note: " not in repr(front_of(5))
    wrong = front_of(5, maximize=False)
    assert len(wrong.notes) == 1
    assert f"note: {wrong.notes[0]}" in repr(wrong)
    assert escape(wrong.notes[0]) in wrong._repr_html_()


class Reader(HTMLParser):
    """Cells by row; every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_html_for_notebooks() -> None:
    front = front_of(names=("<b>news</b>", "poems & prose"))
    reader = Reader()
    reader.feed(front._repr_html_())
    assert reader.open == []
    assert reader.rows[0] == [
        "share of <b>news</b>", "share of poems & prose", "<b>news</b> (higher is better)",
        "poems & prose (higher is better)",
    ]  # fmt: skip
    assert reader.rows[2] == ["0.5", "0.5", "0.25", "0.5"]


def test_pandas_has_the_columns_and_numbers_of_the_csv(tmp_path: Path) -> None:
    front = front_of(7)
    front.to_csv(tmp_path / "front.csv")
    read = pandas.read_csv(tmp_path / "front.csv")
    pandas.testing.assert_frame_equal(front.to_pandas(), read, rtol=1e-15)


def test_without_pandas_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        front_of().to_pandas()

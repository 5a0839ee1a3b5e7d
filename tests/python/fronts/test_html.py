"""The page of a front, in a real browser: what it computes is what Python computes, and every control does its work."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect
from scipy.interpolate import LinearNDInterpolator

from paretofuse.engine.routing.preference import as_preference, simplex_grid
from paretofuse.fronts import html, style
from paretofuse.fronts.front import Front
from tests.support.browser import chromium, opened, place
from tests.support.waiting import until

NAMES = ("news", "poems", "code", "law", "medicine")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def grid_front(objectives: int, points: int, maximize: bool = False) -> Front:
    """Losses or gains that each follow their own objective."""
    grid = simplex_grid(objectives, points)
    values = np.sqrt(0.9 * grid + 0.02 * np.arange(1, objectives + 1))
    names = NAMES[:objectives]
    return Front(grid, 1 + values if maximize else 60 - 30 * values, names, names, maximize)


def random_front(seed: int, objectives: int, points: int = 14) -> Front:
    """Any preferences; values with ties, metrics of both directions."""
    rng = np.random.default_rng(seed)
    shares = np.vstack([np.eye(objectives), rng.dirichlet(np.ones(objectives), points - objectives)])
    directions = tuple(bool(flag) for flag in rng.integers(0, 2, objectives))
    values = rng.integers(-6, 7, (points, objectives)) / 2
    return Front(shares, values, NAMES[:objectives], NAMES[:objectives], directions)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two.html, three.html and four.html: a page for each kind of figure; dominated.html."""
    folder = tmp_path_factory.mktemp("pages")
    two, three, four = grid_front(2, 11), grid_front(3, 5, maximize=True), grid_front(4, 4)
    soups = Front(two.preferences, two.values + 3, two.objectives, two.metrics, False)
    two.to_html(folder / "two.html", points={"base": [55, 52.5]}, others={"soups": soups}, title="Two")
    worse = Front(three.preferences, three.values - 0.1, three.objectives, three.metrics, True)
    three.to_html(folder / "three.html", points={"base": [1.2, 1.3, 1.1]}, others={"soups": worse})
    four.to_html(folder / "four.html")
    values = three.values.copy()
    values[4] -= 1  # dominated, which takes the longest words of all keys
    Front(three.preferences, values, three.objectives, three.metrics, True).to_html(folder / "dominated.html")
    return folder


@pytest.fixture(scope="module")
def calculator(browser: Browser, files: Path) -> Iterator[Page]:
    """A page whose functions tests call."""
    with opened(browser, (files / "two.html").as_uri(), viewport={"width": 1280, "height": 1000}) as page:
        yield page


@pytest.fixture
def two(calculator: Page) -> Page:
    """The same page, at half and half in A and all news in B."""
    for slot, percent in (("B", "100"), ("A", "50")):
        calculator.get_by_role("radio", name=slot).check()
        calculator.get_by_role("spinbutton", name="news in percent").fill(percent)
    return calculator


def shares_shown(page: Page) -> list[float]:
    numbers = page.locator("#sliders input[type=number]")
    return [float(numbers.nth(at).input_value()) / 100 for at in range(numbers.count())]


def values_shown(page: Page, slot: int) -> list[float]:
    cells = page.locator(f"#metrics tbody tr td:nth-of-type({slot + 1})")
    return [float(text) for text in cells.all_inner_texts()]


def values_at(page: Page, front: Front, shares: np.ndarray) -> Any:
    preference = dict(zip(front.objectives, shares.tolist(), strict=True))
    return page.evaluate("([front, at]) => valuesAt(front, at)", [html.as_data(front), preference])


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_between_points_values_are_those_of_the_delaunay_triangulation(
    calculator: Page, objectives: int
) -> None:
    front = random_front(objectives, objectives)
    rng = np.random.default_rng(9)
    # Coordinates of the simplex's own plane in which distances stay as they are.
    basis = np.linalg.svd(np.ones((1, objectives)))[2][1:].T
    wanted = rng.dirichlet(np.ones(objectives), 25)
    if objectives == 2:
        order = front.preferences[:, 0].argsort()
        columns = [
            np.interp(wanted[:, 0], front.preferences[order, 0], front.values[order, m]) for m in range(2)
        ]
        truth = np.stack(columns, axis=1)
    else:
        truth = LinearNDInterpolator(front.preferences @ basis, front.values)(wanted @ basis)
    for shares, expected in zip(wanted, truth, strict=True):
        found = values_at(calculator, front, shares)
        assert found["kind"] == "between"
        assert [found["values"][name] for name in front.metrics] == pytest.approx(expected.tolist(), abs=1e-9)
    for row in range(len(front)):
        found = values_at(calculator, front, front.preferences[row])
        assert (found["kind"], found["neighbours"]) == ("measured", [[row, 1]])


def test_outside_of_what_was_measured_it_is_the_nearest_point(calculator: Page) -> None:
    whole = grid_front(3, 7)
    inner = whole.preferences.min(axis=1) > 0
    front = Front(whole.preferences[inner], whole.values[inner], whole.objectives, whole.metrics, False)
    found = values_at(calculator, front, np.array([0.98, 0.01, 0.01]))
    nearest = int(front.preferences[:, 0].argmax())
    assert (found["kind"], found["neighbours"]) == ("nearest", [[nearest, 1]])


@pytest.mark.parametrize("seed", range(8))
def test_choice_and_dominance_are_those_of_python(calculator: Page, seed: int) -> None:
    front = random_front(seed, 2 + seed % 2)
    data = html.as_data(front)
    assert calculator.evaluate("nonDominated", data) == front.non_dominated().tolist()
    rng = np.random.default_rng(seed)
    choose = (
        "([front, bounds, best]) => { try { return choose(front, bounds, best); } catch { return null; } }"
    )
    answers = set()
    for best in (None, *front.metrics):
        for bound in [*rng.choice(front.values[:, 0], 3).tolist(), -99.0]:
            bounds = [{"metric": "news", "sense": "at_most", "value": bound}]
            found = calculator.evaluate(choose, [data, bounds, best])
            try:
                expected = front.choose(at_most={"news": bound}, best=best)
            except ValueError:
                assert found is None
                answers.add(None)
                continue
            assert dict(zip(front.metrics, front.values[found].tolist(), strict=True)) == expected.values
            assert (
                dict(zip(front.objectives, front.preferences[found].tolist(), strict=True))
                == expected.preference
            )
            answers.add(found)
    assert len(answers) > 1


def test_what_is_written_down_is_a_preference(calculator: Page) -> None:
    for seed in range(20):
        shares = np.random.default_rng(seed).dirichlet(np.ones(5) / 2)
        front = {"objectives": list(NAMES)}
        preference = dict(zip(NAMES, shares.tolist(), strict=True))
        written = calculator.evaluate("([front, at]) => written(front, at)", [front, preference])
        read = {name: float(share) for name, share in (part.split("=") for part in written.split(","))}
        assert as_preference(read, NAMES) == pytest.approx(shares, abs=1e-4)


def test_a_drag_along_the_curve_sets_the_preference(two: Page) -> None:
    front = grid_front(2, 11)
    panel = two.locator(".figure")
    expect(panel.locator(".nsewdrag")).to_have_count(1)
    two.mouse.move(*place(panel, *front.values[3]))
    two.mouse.down()
    assert shares_shown(two) == pytest.approx([0.7, 0.3], abs=0.005)
    middle = front.values[[7, 8]].mean(axis=0)
    two.mouse.move(*place(panel, *middle), steps=12)
    two.mouse.up()
    assert shares_shown(two) == pytest.approx([0.25, 0.75], abs=0.005)
    assert values_shown(two, 0) == pytest.approx(middle.tolist(), rel=2e-3)
    assert "linear between measured points" in two.locator("#reached").inner_text()
    two.mouse.move(*place(panel, *front.values[0]))  # let go: no drag any more
    assert shares_shown(two) == pytest.approx([0.25, 0.75], abs=0.005)
    marks = panel.evaluate("box => box.data.slice(-2).map((trace) => [trace.x[0], trace.y[0]])")
    assert marks[0] == pytest.approx(front.values[0].tolist())  # B
    assert marks[1] == pytest.approx(middle.tolist(), rel=2e-3)  # A


def test_a_click_in_the_triangle_sets_the_preference(browser: Browser, files: Path) -> None:
    with opened(browser, (files / "three.html").as_uri(), viewport={"width": 1280, "height": 900}) as page:
        assert page.locator(".figure").count() == 6
        for panel, shares in ((0, [0.2, 0.3, 0.5]), (2, [0.5, 0.25, 0.25])):
            across, up = shares[1] + shares[2] / 2, shares[2] * np.sqrt(0.75)
            page.mouse.click(*place(page.locator(".figure").nth(panel), across, up))
            assert shares_shown(page) == pytest.approx(shares, abs=0.02)
        page.mouse.click(*place(page.locator(".figure").nth(1), -0.03, 0.0))  # beyond a corner: the corner
        assert shares_shown(page) == pytest.approx([1, 0, 0], abs=0.02)


def test_a_click_on_a_line_takes_its_point(browser: Browser, files: Path) -> None:
    front = grid_front(4, 4)
    with opened(browser, (files / "four.html").as_uri(), viewport={"width": 1280, "height": 900}) as page:
        page.mouse.click(*place(page.locator(".figure"), 2, 1.0))  # the best in the third metric
        assert shares_shown(page) == pytest.approx([0, 0, 1, 0])
        assert values_shown(page, 0) == pytest.approx(list(front.best("code").values.values()), rel=1e-3)


def test_the_keyboard_alone_is_enough(two: Page) -> None:
    two.reload()
    status = two.get_by_role("status").first
    two.keyboard.press("Tab")
    expect(two.get_by_role("link", name="Skip to the preference")).to_be_focused()
    two.keyboard.press("Enter")
    two.keyboard.press("Tab")
    expect(two.get_by_role("radio", name="A")).to_be_focused()
    two.keyboard.press("ArrowRight")
    expect(two.get_by_role("radio", name="B")).to_be_checked()
    two.keyboard.press("Tab")
    news = two.get_by_role("slider", name="news")
    expect(news).to_be_focused()
    assert news.evaluate("slider => getComputedStyle(slider).outlineStyle") == "solid"
    for _ in range(10):
        two.keyboard.press("ArrowLeft")
    expect(news).to_have_attribute("aria-valuetext", "news 90 % in B")
    expect(status).to_contain_text("B: news 90 %, poems 10 %")
    expect(status).to_contain_text("(measured)")
    assert values_shown(two, 1) == pytest.approx(grid_front(2, 11).values[1].tolist(), rel=1e-3)
    two.keyboard.press("Tab")
    two.keyboard.press("Control+A")
    two.keyboard.type("12.5")
    assert shares_shown(two) == [0.125, 0.875]
    expect(status).to_contain_text("news 12.5 %, poems 87.5 %")


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("150", ["100", "0"]), ("-20", ["0", "100"]), ("1e1", ["10", "90"]), ("", ["50", "50"])],
)
def test_a_number_is_shown_as_it_was_taken(two: Page, typed: str, shown: list[str]) -> None:
    number = two.get_by_role("spinbutton", name="news in percent")
    number.fill(typed)
    number.blur()
    numbers = two.locator("#sliders input[type=number]")
    assert [numbers.nth(at).input_value() for at in range(2)] == shown


def test_the_table_of_points_says_all_and_takes(two: Page) -> None:
    two.get_by_text("Measured points as a table").click()
    rows = two.locator("#points tbody tr")
    assert rows.count() == 11
    cells = rows.nth(3).locator("td").all_inner_texts()[:4]
    front = grid_front(2, 11)
    assert [float(cell) for cell in cells] == pytest.approx(
        [*front.preferences[3], *front.values[3]], rel=1e-3
    )
    two.get_by_role("button", name="Take news 30 %, poems 70 %").click()
    assert shares_shown(two) == pytest.approx([0.3, 0.7])


def test_choose_by_constraint(two: Page) -> None:
    front = grid_front(2, 11)
    bound = float(front.values[4, 0]) + 0.01
    two.get_by_role("spinbutton", name="bound of news").fill(str(bound))
    two.get_by_label("best in").select_option("poems")
    two.get_by_role("button", name="Choose").click()
    assert front.choose(at_most={"news": bound}, best="poems").preference == pytest.approx(
        dict(zip(front.objectives, shares_shown(two), strict=True))
    )
    expect(two.locator("#chosen")).to_have_text("A is now news 60 %, poems 40 %.")
    two.get_by_role("spinbutton", name="bound of news").fill("1")
    two.get_by_role("spinbutton", name="bound of news").press("Enter")
    expect(two.locator("#chosen")).to_contain_text("No measured point has news at most 1: its lowest is")
    assert shares_shown(two) == pytest.approx([0.6, 0.4])


def test_commands_follow_the_preference_and_are_copied(two: Page) -> None:
    two.get_by_role("spinbutton", name="news in percent").fill("70")
    command = "paretofuse merge STORE --preference news=0.7,poems=0.3 -o OUT"
    expect(two.locator("#commands")).to_contain_text(command)
    expect(two.locator("#commands")).to_contain_text('engine.switch({"news": 0.7, "poems": 0.3})')
    two.get_by_role("button", name="Copy Command line").click()
    expect(two.locator("#copied")).to_have_text("Copied Command line.")
    two.evaluate("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
    two.locator("#paste").focus()
    two.keyboard.press("Control+V")
    expect(two.locator("#paste")).to_have_value(command)
    two.evaluate("document.getElementById('paste').remove()")


@pytest.mark.parametrize("name", ["two", "three", "four", "dominated"])
def test_nothing_overflows_on_a_phone_and_dark_is_dark(browser: Browser, files: Path, name: str) -> None:
    with opened(browser, (files / f"{name}.html").as_uri(), viewport={"width": 390, "height": 800}) as page:
        _check_layout(page)
        page.set_viewport_size({"width": 320, "height": 800})
        _check_layout(page)
        page.set_viewport_size({"width": 1280, "height": 800})
        _check_layout(page)
        axis = page.locator(".figure .infolayer text").first
        for scheme, is_light in (("dark", False), ("light", True)):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", ground)[0]) > 128) == is_light
            expect(axis).to_have_css(
                "fill", re.compile(r"rgb\(34," if is_light else r"rgb\(232,")
            )  # drawn anew


def _check_layout(page: Page) -> None:
    """Nothing is wider than the window, and no section lies on another."""
    expect(page.locator(".nsewdrag").first).to_be_attached()
    root = "document.documentElement"  # asked again and again from here: pages forbid what wait_for_function does
    until(lambda: page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"))
    boxes = page.locator("section").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map((at) => [at.left, at.top, at.right, at.bottom])"
    )
    for a, b in combinations(boxes, 2):
        assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_every_control_has_a_name(two: Page) -> None:
    nameless = two.locator("input, select, button, textarea").evaluate_all(
        "all => all.filter(one => !(one.ariaLabel || one.labels?.length || one.textContent.trim()))"
        ".map(one => one.outerHTML)"
    )
    assert nameless == []


def test_names_are_text_whatever_they_hold(browser: Browser, tmp_path: Path) -> None:
    front = grid_front(2, 3)
    named = Front(front.preferences, front.values, (HOSTILE, "b"), (f"{HOSTILE} loss", 'it\'s "b"'), False)
    named.to_html(tmp_path / "page.html", points={HOSTILE: [40, 40]}, title=HOSTILE)
    with opened(browser, (tmp_path / "page.html").as_uri()) as page:
        expect(page.locator("h1")).to_have_text(HOSTILE)
        expect(page.locator("#metrics")).to_contain_text(f"{HOSTILE} loss")
        expect(page.locator(".nsewdrag")).to_be_attached()
        assert page.locator("img").count() == 0
        assert page.title() == f"{HOSTILE}, ParetoFuse"


def test_the_file_loads_nothing_from_anywhere(browser: Browser, files: Path) -> None:
    asked: list[str] = []
    with opened(browser, "about:blank") as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto((files / "three.html").as_uri())
        expect(page.locator(".nsewdrag").first).to_be_attached()
        assert [url for url in asked if not url.startswith("data:")] == [(files / "three.html").as_uri()]
    assert "default-src 'none'" in (files / "three.html").read_text(encoding="utf-8").partition("<script>")[0]


def test_colours_are_those_of_the_pictures_and_can_be_read() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", html.asset("page.css"), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", light))
    palette = [colours[f"category-{number}"] for number in range(1, 9)]
    assert palette == list(style.OKABE_ITO)
    assert (colours["ink"], colours["pale"]) == (style.INK, style.PALE)
    for scheme in (colours, colours | dict(re.findall(r"--([\w-]+): (#\w+)", dark))):
        for name in ("ink", "grey", "accent", "A", "B", "wrong"):
            assert _contrast(scheme[name], scheme["panel"]) >= 4.5, name


def _contrast(one: str, other: str) -> float:
    """WCAG's ratio."""

    def luminance(colour: str) -> float:
        linear = []
        for at in (1, 3, 5):
            part = int(colour[at : at + 2], 16) / 255
            linear.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = grid_front(2, 3)
    with pytest.raises(ValueError, match=r"for point 'base', expected 2 finite numbers"):
        front.to_html(tmp_path / "page.html", points={"base": [1.0]})
    with pytest.raises(ValueError, match=r"got front 'soups' with metrics"):
        front.to_html(tmp_path / "page.html", others={"soups": grid_front(3, 3)})
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'paretofuse\[serve\]'"):
        front.to_html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []

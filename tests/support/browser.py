"""Debian's Chromium, headless, for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for a module's tests; they are skipped, saying so, where there is none."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium on this machine; Debian's package of that name has it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **context: object) -> Iterator[Page]:
    """A page in a context of its own; an error in its scripts, or on its console, fails the test.

    That a request was refused is written on the console by the browser, and is no fault of the page.
    """
    own = browser.new_context(**context)  # type: ignore[arg-type]
    page = own.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if _is_fault(message) else None)
    page.goto(url)
    yield page
    own.close()
    assert errors == []


def _is_fault(message: ConsoleMessage) -> bool:
    return message.type == "error" and "responded with a status of 4" not in message.text


def place(box: Locator, across: float, up: float) -> tuple[float, float]:
    """Where a place of a plotly panel, in its axes' units, lies on the page."""
    box.scroll_into_view_if_needed()
    left, top, width, height = box.locator(".nsewdrag").first.evaluate(
        "area => { const at = area.getBoundingClientRect(); return [at.left, at.top, at.width, at.height]; }"
    )
    (low, high), (bottom, upper) = box.evaluate("box => [box.layout.xaxis.range, box.layout.yaxis.range]")
    return left + width * (across - low) / (high - low), top + height * (1 - (up - bottom) / (upper - bottom))

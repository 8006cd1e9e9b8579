"""Chromium for the tests of the playground: its pages, and what a user does on them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
needs_browser = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs a browser: {CHROMIUM}")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # a busy machine
Page = Any
OpenPage = Callable[..., Page]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def pages(browser: Any) -> Iterator[OpenPage]:
    """Opens the page of a server. At the end, nothing may have failed in it."""
    contexts, problems = [], []

    def open_it(url: str, viewport: dict[str, int] = DESKTOP, **settings: Any) -> Page:
        context = browser.new_context(viewport=viewport, **settings)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda message: problems.append(message.text) if "Content Security" in message.text else None
        )
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def generate(page: Page, prompt: str, **options: object) -> None:
    page.fill("#prompt", prompt)
    page.locator("#options").evaluate("options => { options.open = true }")
    for name, value in options.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")


def column(page: Page, number: int) -> Any:
    return page.locator("#columns .column").nth(number)


def fact(page: Page, name: str) -> Any:
    return page.locator(f'[data-fact="{name}"]')


def wait_until(page: Page, done: Callable[[], bool]) -> None:
    for _ in range(200):
        if done():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not happen")

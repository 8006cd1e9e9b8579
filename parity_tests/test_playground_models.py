"""The playground's page on the real server: two models of random weights in a browser, in a process that is killed."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parity_tests.browser import Page, chromium, column, expect, fact, generate, needs_browser, pages, wait_until
from parity_tests.server import CONFIG, Server, make_run, serving
from parity_tests.test_serve import PROMPT

LONG = {"max_tokens": 8000, "temperature": 0}
"""A text that takes much longer than what is done meanwhile."""
pytestmark = [pytest.mark.extended, needs_browser]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Server]:
    run = make_run(tmp_path_factory.mktemp("playground"), corpus, replace(CONFIG, context_length=8192))
    with serving(run, "--backend", "both", "--max-batch", "2") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(server: Server, browser: Any) -> Iterator[Page]:
    with pages(browser) as open_page:
        opened = open_page(server.url)
        expect(opened.locator("#generate")).to_be_enabled()
        yield opened


def expect_tokens(page: Page) -> None:
    """Both columns have three tokens or more. (JAX compiles first.)"""
    for side in (0, 1):
        expect(column(page, side).locator(".token").nth(2)).to_be_visible()


def test_both_models_write_the_same_text(page: Page) -> None:
    """Token by token in both columns. The largest difference of the logits is shown, and it is that of float32."""
    generate(page, PROMPT, max_tokens=40, seed=5)
    status = page.locator("#generate-status")
    expect(status).to_have_text(re.compile(r"^JAX: (\d+) tokens, PyTorch: \1 tokens\. Texts: equal: \1 tokens\.$"))
    texts = [column(page, i).locator(".text").inner_text() for i in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(PROMPT)
    n_tokens = column(page, 0).locator(".token").count()
    assert len(texts[0]) > n_tokens > 1
    ((difference, n_compared),) = re.findall(r"^([\d.e-]+?)\s*over (\d+) tokens$", fact(page, "logits").inner_text())
    assert 0 < float(difference) <= 5e-5
    assert int(n_compared) >= n_tokens


def test_stop_frees_the_models(page: Page, server: Server) -> None:
    generate(page, PROMPT, **LONG)
    expect_tokens(page)
    assert server.metric("minillm_running") == 2
    stopped = time.monotonic()
    page.click("#stop-button")
    expect(page.locator("#generate-status")).to_have_text(re.compile(r"^Stopped\. JAX: "))
    wait_until(page, lambda: server.metric("minillm_running") == 0)
    assert time.monotonic() - stopped < 5


@pytest.mark.parametrize(("fault", "side"), [("rope-theta", "torch"), ("activation", "jax")])
def test_break_it_names_the_fault(fault: str, side: str, page: Page) -> None:
    """A fault of the configuration, planted into the framework itself, and one of code, in its stand-in."""
    page.click("#tab-break")
    page.select_option("#fault", fault)
    page.check(f'#sides input[value="{side}"]')
    page.click("#break")
    expect(page.locator("#break-status")).to_have_text(f"The doctor found it: {fault}.")
    expect(page.locator(".verdict")).to_contain_text("NOT EQUAL")


def test_a_server_that_is_killed(page: Page, server: Server) -> None:
    """The last test of this file: the page keeps what it has, and says what happened; then that nobody answers."""
    generate(page, PROMPT, **LONG)
    expect_tokens(page)
    server.process.kill()
    alert = page.locator("#generate-alert")
    expect(alert).to_contain_text("The connection to the server broke off.")
    expect_tokens(page)
    page.click("#generate")
    expect(alert).to_contain_text("The server does not answer")

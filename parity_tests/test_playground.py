"""The playground's page in a browser: streaming, details of tokens, "break it", keyboard, phone, accessibility."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from minillm_core.serving.page import FOLDER
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.browser import (
    DESKTOP,
    PHONE,
    OpenPage,
    Page,
    chromium,
    column,
    expect,
    fact,
    generate,
    needs_browser,
    pages,
    wait_until,
)
from parity_tests.playground_server import scripted_app
from parity_tests.test_break_it import CONFIG, breaker_of

pytestmark = [pytest.mark.extended, needs_browser]
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")


@dataclass
class Served:
    """A running server."""

    url: str
    app: FastAPI
    server: uvicorn.Server


def serve(app: FastAPI) -> Iterator[Served]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", app, server)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    """Two models, and a small model to break."""
    yield from serve(scripted_app(["jax", "torch"], breaker_of(CONFIG, tokenizer)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    with pages(browser) as open_it:
        yield open_it


@pytest.fixture
def page(served: Served, open_page: OpenPage) -> Page:
    opened = open_page(served.url)
    expect(opened.locator("#generate")).to_be_enabled()
    return opened


def test_both_columns_stream_the_same_text(page: Page, served: Served) -> None:
    """Every option is sent as typed; speed, difference of logits and equality are shown."""
    page.fill("#stop_texts", "END\n\\n\\n")
    generate(page, "We", max_tokens=30, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=4)
    expect(page.locator("#generate-status")).to_have_text(
        "JAX: 30 tokens, PyTorch: 30 tokens. Texts: equal: 30 tokens."
    )
    texts = [column(page, i).locator(".text").inner_text() for i in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("We we hold these truths to be self-evident,\n\nthat all")
    expect(fact(page, "logits")).to_have_text("3.1e-6over 30 tokens")
    expect(fact(page, "quickstart-jax")).to_have_text("58.1")
    sent = served.app.state.requests[-1]
    assert sent.pop("stop") == ["END", "\n\n"]
    assert sent.pop("prompt") == "We"
    assert list(sent.values()) == [30, 7, 4, 0.5, 0.9, 0.1, 1.2]


def test_first_different_token_is_marked(page: Page) -> None:
    generate(page, "they differ", max_tokens=15)
    expect(fact(page, "equal")).to_have_text("differ from token 11")
    marked = page.locator(".token.differs")
    expect(marked).to_have_count(2)
    assert [marked.nth(i).get_attribute("data-index") for i in (0, 1)] == ["10", "10"]
    expect(fact(page, "logits")).to_contain_text("over 10 tokens")


def test_stop_and_generate_again(page: Page, served: Served) -> None:
    """Stop ends the request on the server too; a new request replaces a running one."""
    generate(page, "slow", max_tokens=1000)
    expect(fact(page, "equal")).to_contain_text("equal so far: 3 tokens")
    page.click("#stop-button")
    expect(page.locator("#generate-status")).to_contain_text("Stopped. JAX:")
    expect(column(page, 0).locator(".end")).to_have_text("Stopped.")
    generate(page, "slow again", max_tokens=1000)
    expect(column(page, 0).locator(".token").nth(2)).to_be_visible()
    generate(page, "fast", max_tokens=5)
    expect(page.locator("#generate-status")).to_contain_text("Texts: equal: 5 tokens")
    expect(column(page, 1).locator(".prompt")).to_have_text("fast")
    wait_until(page, lambda: served.app.state.open == 0)


def test_details_of_a_token(page: Page) -> None:
    """By pointer, by keyboard and by touch: probability, id, alternatives, and the same token on the other side."""
    generate(page, "We", max_tokens=12)
    expect(fact(page, "equal")).to_have_text("equal: 12 tokens")
    details = page.locator("#token-details")
    token = column(page, 0).locator(".token").nth(2)
    token.hover()
    expect(details).to_be_visible()
    expect(details).to_contain_text("␣these in JAX")
    for words in ("probability66.4 %", "in PyTorch66.4 %", "token id102", "position3 of 12"):
        assert words in details.inner_text().replace("\n", "").replace("\t", "")
    expect(details.locator(".bar")).to_have_count(10)
    expect(details.locator(".bar.chosen .label")).to_have_text("␣these")
    expect(page.locator(".token.current")).to_have_count(2)
    page.mouse.move(5, 5)
    expect(details).to_be_hidden()
    page.focus("#tint")
    page.keyboard.press("Tab")
    expect(details).to_contain_text("␣we in JAX")
    page.keyboard.press("ArrowRight")
    expect(details).to_contain_text("␣hold in JAX")
    page.keyboard.press("End")
    expect(details).to_contain_text("12 of 12")
    expect(page.locator(":focus")).to_have_attribute("aria-describedby", "token-details")
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()
    page.keyboard.press("Tab")
    expect(details).to_contain_text("in PyTorch")


def test_text_of_a_model_is_never_html(page: Page) -> None:
    """Also: parts of characters and white space have a name and can be reached."""
    generate(page, "strange", max_tokens=7)
    expect(fact(page, "equal")).to_have_text("equal: 7 tokens")
    expect(page.locator("#columns img")).to_have_count(0)
    text = column(page, 0).locator(".text")
    expect(text).to_contain_text("<img src=x onerror=alert(1)>é")
    expect(text.locator(".token").nth(1)).to_have_attribute("aria-label", "part of a character")
    expect(text.locator(".token").nth(5)).to_have_attribute("aria-label", "white space ↵")


def test_wrong_option_is_shown_beside_its_field(page: Page) -> None:
    """What the server refuses, and what is no number."""
    generate(page, "We", temperature=-1)
    field = page.locator("#temperature")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_be_focused()
    expect(page.locator("#temperature-error")).to_contain_text("temperature is out of range")
    expect(page.locator("#temperature-error")).to_have_attribute("role", "alert")
    generate(page, "We", temperature=1, seed="", top_k="1.5")
    expect(page.locator(".error")).to_have_text(["needs a whole number"] * 2)
    generate(page, "We", seed=1, top_k=0, max_tokens=3)
    expect(fact(page, "equal")).to_have_text("equal: 3 tokens")
    expect(page.locator(".error")).to_have_count(0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("fails", "out of memory"), ("breaks off", "The server stopped before the text of JAX was complete.")],
)
def test_error_in_the_middle_of_a_text(prompt: str, message: str, page: Page) -> None:
    generate(page, prompt)
    expect(page.locator("#generate-alert")).to_contain_text(message)
    expect(column(page, 0).locator(".token")).to_have_count(5)
    expect(page.locator("#stop-button")).to_have_attribute("aria-disabled", "true")


def test_loading_and_a_server_that_is_gone(tokenizer: Tokenizer, open_page: OpenPage) -> None:
    """One model: one column. While it is loading, the page asks again. When the server is gone, it says so."""
    for one in serve(scripted_app(["torch"], breaker_of(CONFIG, tokenizer), loading=1)):
        page = open_page(one.url)
        expect(page.locator("#about")).to_have_text("The model is still loading. Trying again.")
        expect(page.locator("#about")).to_contain_text("runs/quickstart in PyTorch")
        generate(page, "We", max_tokens=3)
        expect(page.locator("#generate-status")).to_have_text("PyTorch: 3 tokens.")
        expect(page.locator("#columns .column")).to_have_count(1)
        expect(page.locator(".fact")).to_have_count(1)
    page.click("#generate")
    expect(page.locator("#generate-alert")).to_contain_text("The server does not answer")
    expect(page.locator("#generate-alert button")).to_have_text("Try again")


def test_break_it(page: Page) -> None:
    """The heat map has a number in every cell, the first difference is marked, and the doctor names the fault."""
    page.click("#tab-break")
    page.select_option("#fault", "activation")
    page.select_option("#form", label="the MLP's activation is relu, not silu")
    page.check('#sides input[value="jax"]')
    page.fill("#break-text", "We the people of the United States")
    page.click("#break")
    expect(page.locator(".named")).to_have_text("✓ The doctor names the planted fault: activation.")
    expect(page.locator(".verdict")).to_contain_text("NOT EQUAL")
    expect(page.locator(".findings li")).to_contain_text("code of JAX: the MLP's activation is relu, not silu")
    expect(page.locator("#break-result")).to_contain_text("computed by the numpy reference in place of jax")
    cells = page.locator(".heat td")
    expect(cells).to_have_count(3 + 8 * CONFIG.n_layers)
    assert all(re.fullmatch(r"▸?\s*(0|\de[+-]\d+)", text) for text in cells.all_inner_texts())
    first = page.locator(".heat .is-first")
    expect(first).to_have_count(1)
    first.hover()
    expect(page.locator(".readout")).to_contain_text("layer 0, MLP: error ")
    expect(page.locator(".readout")).to_contain_text("the first stage that differs (model.layers.0.mlp)")
    expect(page.locator("#break-result blockquote")).to_have_count(3)
    page.click(".report summary")
    expect(page.locator(".report pre")).to_contain_text("first divergence: model.layers.0.mlp")
    page.fill("#break-text", "")
    page.select_option("#fault", "rope-theta")
    page.click("#break")
    expect(page.locator("#break-status")).to_have_text("The doctor found it: rope-theta.")


def test_keyboard_alone(page: Page) -> None:
    """Tabs by arrow keys, Ctrl+Enter, Escape, and the cells of the heat map."""
    page.focus("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("slow")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#generate-status")).to_have_text("Generating")
    expect(column(page, 0).locator(".token").nth(1)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_contain_text("Stopped.")
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#tab-generate")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-break")).to_be_focused()
    expect(page.locator("#panel-break")).to_be_visible()
    expect(page.locator("#panel-generate")).to_be_hidden()
    expect(page.locator("#fault")).to_be_enabled()
    page.keyboard.press("Tab")
    expect(page.locator("#fault")).to_be_focused()
    page.keyboard.type("swap")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#break-status")).to_have_text("The doctor found it: swapped.")
    page.locator("#break").focus()
    page.keyboard.press("Tab")
    expect(page.locator(".readout")).to_contain_text("embed_tokens: error ")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator(".readout")).to_contain_text("layer 1, k: error ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_accessibility(scheme: str, viewport: dict[str, int], served: Served, open_page: OpenPage) -> None:
    """No violation of the rules of axe, in both tabs, with results and with errors; no horizontal scrolling."""
    page = open_page(served.url, viewport, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True)
    expect(page.locator("#generate")).to_be_enabled()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"
    assert dark == (scheme == "dark")
    generate(page, "they differ", max_tokens=15)
    expect(page.locator(".token.differs")).to_have_count(2)
    expect(page.locator(".writing")).to_have_count(0)
    column(page, 0).locator(".token").nth(3).focus()
    expect(page.locator("#token-details")).to_be_visible()
    check(page)
    page.keyboard.press("Escape")
    generate(page, "We", temperature=-1)
    expect(page.locator("#temperature-error")).to_be_visible()
    check(page)
    page.click("#tab-break")
    page.select_option("#fault", "norm-weights")
    page.click("#break")
    expect(page.locator(".verdict")).to_be_visible()
    page.click(".report summary")
    check(page)


def check(page: Page) -> None:
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_files_of_the_page(served: Served, page: Page) -> None:
    """Served with a strict policy; short; nothing from other servers, nothing that could run a model's text."""
    answer = page.request.get(served.url)
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400, file
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file
        assert {*re.findall(r"https?://[^\"' >]+", text)} <= {"http://www.w3.org/2000/svg"}, file
        name = "" if file.name == "index.html" else f"playground/{file.name}"
        assert page.request.get(served.url + name).text() == text
    assert page.request.get(f"{served.url}playground/../break_it.py").status == 404

"""The chat page in a browser: what is asked, what is seen, and what may never run."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from lora_jax.serve import Engine, ServerSettings, asgi_app
from lora_jax.serve._page import page_routes
from tests.serve.answers import assert_idle
from tests.serve.over_http import KEY, chat, running, until
from tests.serve.scripted import DONE, Say, Script, chunk, failure, refuses, says, usage

MOST_MS = 20_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs Chromium on the PATH")
    with driver.sync_playwright() as started:
        made = started.chromium.launch(executable_path=found)
        yield made
        made.close()


@pytest.fixture
def page(browser) -> Iterator[Any]:
    """A page of its own; it may neither break a rule of its policy nor raise an error."""
    context = browser.new_context()
    context.set_default_timeout(MOST_MS)
    made = context.new_page()
    broken: list[str] = []
    made.on("pageerror", lambda error: broken.append(str(error)))
    made.on("console", lambda line: broken.append(line.text) if "Policy" in line.text else None)
    yield made
    context.close()
    assert not broken


def talk(page: Any, address: str, left: str, right: str) -> None:
    page.goto(address)
    for column, name in enumerate((left, right)):
        page.locator("select.model").nth(column).select_option(name)


def both_stopped(page: Any) -> None:
    page.wait_for_selector("#send:visible")
    figures = page.locator(".figures").all_text_contents()
    assert [text.endswith("stopped") for text in figures] == [True, True]


def models_are_listed(page: Any) -> None:
    page.locator("select.model option").last.wait_for(state="attached")


def ask(page: Any, text: str) -> list[str]:
    """Say something and wait for both answers; what both columns then show of it."""
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    return page.locator(".turn").last.locator(".answer .text").all_text_contents()


def answers(page: Any, models: dict[str, Say], *texts: str) -> tuple[list[list[str]], Script]:
    """What both columns show of each text, said to the two models."""
    script = Script({"base": says("base"), **models})
    with running(script.app()) as address:
        talk(page, address, *models)
        return [ask(page, text) for text in texts], script


@pytest.fixture
def alone() -> Iterator[tuple[str, Script]]:
    """A server with a base that says yes, and no adapter."""
    script = Script({"base": says("yes")})
    with running(script.app()) as address:
        yield address, script


@pytest.mark.parametrize("route", page_routes(), ids=lambda route: route.path)
def test_files_allow_no_inline_code(route):
    with running(Starlette(routes=[route])) as address:
        answer = httpx2.get(address + route.path)
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"\son\w+=|\sstyle=|https?://", answer.text)


@pytest.fixture(scope="module")
def server(shared_engine, pretrained, adapters) -> Iterator[str]:
    """The real one, with a base that knows nothing."""
    folders = {"left": adapters.folder / "a", "right": adapters.folder / "b"}
    with running(asgi_app(shared_engine, pretrained, folders)) as address:
        yield address
    assert_idle(shared_engine)


@pytest.mark.slow
class TestServer:
    """The page with the server it belongs to."""

    def test_two_adapters_answer_at_once(self, page, server):
        talk(page, server, "left", "right")
        page.click("#options-button")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("8")
        seen = ask(page, "one two")
        with httpx2.Client(base_url=server, timeout=60) as client:
            alone = [chat(client, "one two", model=name).json() for name in ("left", "right")]
        assert seen == [body["choices"][0]["message"]["content"] for body in alone]
        assert seen[0] != seen[1]
        assert ask(page, "three") != seen
        assert not page.locator(".error:visible").count()

    def test_stop_frees_the_rows(self, page, server, shared_engine, monkeypatch):
        def asked() -> int:
            return shared_engine.stats.running + shared_engine.stats.waiting

        hold, write = threading.Event(), Engine._write_tokens
        # Tokens are held up, so that no machine is too fast for this.
        monkeypatch.setattr(
            shared_engine, "_write_tokens", lambda: hold.wait() and write(shared_engine)
        )
        try:
            talk(page, server, "left", "right")
            page.fill("#text", "one two")
            page.keyboard.press("Enter")
            until(lambda: asked() == 2)
            page.click("#stop")
            until(lambda: asked() == 0)
        finally:
            hold.set()
        both_stopped(page)

    def test_the_browsers_own_dialog_opens_page_and_routes(
        self, browser, shared_engine, pretrained
    ):
        app = asgi_app(shared_engine, pretrained, {}, ServerSettings(api_keys=(KEY,)))
        login = dict(username="anybody", password=KEY)
        with running(app) as address, browser.new_context(http_credentials=login) as context:
            page = context.new_page()
            talk(page, address, "base", "base")
            assert page.locator("#key-form").is_hidden()


@pytest.mark.slow
class TestPage:
    """The page with models that say what is wanted."""

    def test_base_comes_first_and_adapters_are_chosen(self, page):
        script = Script({name: says(name) for name in ("base", "a", "b")})
        with running(script.app()) as address:
            page.goto(address)
            chosen = page.locator("select.model")
            models_are_listed(page)
            options = chosen.first.locator("option").all_text_contents()
            assert options == ["base (base)", "a", "b"]
            assert [chosen.nth(n).input_value() for n in range(2)] == ["a", "b"]

    def test_each_column_sends_its_own_history(self, page):
        models = {"a": says("I am a"), "b": says("Ich bin b")}
        seen, script = answers(page, models, "Who?", "Again,\nplease")
        assert seen == [["I am a", "Ich bin b"]] * 2
        assert script.last("b") == [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Ich bin b"},
            {"role": "user", "content": "Again,\nplease"},
        ]
        figures = page.locator(".figures").first.text_content()
        assert re.fullmatch(r"3.tokens · [\d.]+.tokens/s · first.after.\d+.ms", figures)

    def test_new_conversation_forgets(self, page, alone):
        address, script = alone
        talk(page, address, "base", "base")
        ask(page, "one")
        page.click("#new")
        assert page.locator(".turn").count() == 0
        ask(page, "two")
        assert script.asked[-1]["messages"] == [{"role": "user", "content": "two"}]

    def test_options_are_sent_when_they_are_given(self, page, alone):
        address, script = alone
        talk(page, address, "base", "base")
        ask(page, "plain")
        assert script.asked[-1] == {
            "model": "base",
            "messages": [{"role": "user", "content": "plain"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        page.click("#options-button")
        options = {"temperature": 0.35, "max_tokens": 7, "seed": 0}
        for name, value in options.items():
            page.get_by_label(name.replace("_", " ")).fill(str(value))
        page.get_by_label("System message").fill("Be brief.")
        ask(page, "with options")
        assert script.asked[-1].items() >= options.items()
        assert script.asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        page.get_by_label("Temperature").fill("3")
        page.fill("#text", "too hot")
        page.keyboard.press("Enter")
        assert len(script.asked) == 4

    def test_what_a_model_writes_stays_text(self, page):
        evil = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
        fenced = f"Look:\n\n```html\n{evil}\n```\n{evil}"
        seen, _ = answers(page, {"a": says(evil), "b": says(fenced)}, f"Say {evil}")
        assert seen == [[evil, fenced]]
        assert page.locator(".text pre").all_text_contents() == [f"```html\n{evil}\n```\n"]
        assert page.locator("main img, main script").count() == 0
        assert page.title() == "lora_jax"

    def test_an_event_may_arrive_in_any_pieces(self, page):
        text = "适配器 🙂\nline two"
        whole = chunk(text) + b": still here\n\n" + usage(9) + DONE
        single = [whole[i : i + 1] for i in range(len(whole))]
        two_lines = whole.replace(b'{"choices": ', b'{"choices":\ndata: ', 1)
        in_crlf = two_lines.replace(b"\n", b"\r\n").partition(b"\r")
        models: dict[str, Say] = {"a": lambda _: single, "b": lambda _: in_crlf}
        seen, _ = answers(page, models, "Say it")
        assert seen == [[text, text]]

    @pytest.mark.parametrize(
        "say, seen",
        [
            (refuses(429, "Too many."), "429: Too many."),
            (refuses(503, "Full.", **{"Retry-After": "5"}), "503: Full. Try again in 5 s."),
            (lambda _: [chunk("so "), failure("Lost it."), DONE], "Lost it."),
            (lambda _: [chunk("so ")], "The connection ended before the answer did."),
            (lambda _: [b"data: {\n\n"], "The server sent what is not JSON."),
        ],
    )
    def test_an_error_is_told_and_what_failed_is_not_sent_again(self, page, say, seen):
        failing = iter([say])

        def once(asked: dict[str, Any]) -> Any:
            return next(failing, says("fine"))(asked)

        _, script = answers(page, {"a": once, "b": says("good")}, "first", "second")
        assert page.locator(".error:visible").all_text_contents() == [seen]
        asked = {name: script.last(name) for name in "ab"}
        assert asked["a"] == [{"role": "user", "content": "second"}]
        assert [message["content"] for message in asked["b"]] == ["first", "good", "second"]

    def test_what_nobody_heard_can_be_said_again(self, page):
        answers(page, {"a": refuses(429, "No."), "b": refuses(429, "No.")}, "hello")
        assert page.input_value("#text") == "hello"

    @pytest.mark.parametrize("how", ["button", "Escape", "new"])
    def test_stop_hangs_up(self, page, how):
        def long(_: dict[str, Any]) -> list[bytes]:
            return [chunk("on ")] * MOST_MS  # Many times longer than anything here waits.

        script = Script({"base": says("yes"), "a": long, "b": long})
        with running(script.app()) as address:
            talk(page, address, "a", "b")
            page.fill("#text", "Count")
            page.keyboard.press("Enter")
            for answer in page.locator(".answer .text").all():
                answer.get_by_text("on").wait_for()
            assert script.writing == 2
            if how == "Escape":
                page.keyboard.press("Escape")
            else:
                page.click("#stop" if how == "button" else "#new")
            until(lambda: script.writing == 0)
            if how == "new":
                return
            both_stopped(page)
            script.models["a"] = script.models["b"] = says("fine")
            ask(page, "And?")
            said = [message["content"] for message in script.last("a")]
            assert said[0] == "Count" and said[1].startswith("on ") and said[2] == "And?"

    def test_a_key_is_asked_for_and_kept_for_the_session(self, page, alone):
        address, script = alone
        script.key = "secret"
        page.goto(address)
        field = page.get_by_label("API key")
        for key in ("wrong", "secret"):
            field.fill(key)
            page.keyboard.press("Enter")
        field.wait_for(state="hidden")
        assert not page.locator(".error:visible").count()
        page.reload()
        models_are_listed(page)
        assert ask(page, "hello") == ["yes", "yes"]
        assert "secret" not in json.dumps(page.evaluate("[document.cookie, {...localStorage}]"))
        script.key = "another"
        ask(page, "and now?")
        assert page.locator(".answer .error").all_text_contents() == ["401: No such key."] * 2
        assert field.is_visible()

    def test_theme_and_width_are_the_readers(self, page, alone):
        address, _ = alone
        talk(page, address, "base", "base")
        ask(page, "hello")
        papers = []
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert papers == ["rgb(252, 252, 251)", "rgb(23, 25, 28)"]
        left, right = (page.locator(".answer").nth(n) for n in range(2))
        assert left.bounding_box()["y"] == right.bounding_box()["y"]
        page.set_viewport_size({"width": 390, "height": 700})
        assert left.bounding_box()["x"] == right.bounding_box()["x"]
        assert page.evaluate("document.documentElement.scrollWidth") == 390

    def test_enter_of_an_input_method_sends_nothing(self, page, alone):
        address, script = alone
        talk(page, address, "base", "base")
        page.fill("#text", "ni")
        page.locator("#text").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        page.keyboard.press("Shift+Enter")
        assert not script.asked and page.input_value("#text") == "ni\n"

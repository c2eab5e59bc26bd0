"""The chat page in a browser: conversations, what a learner sees, and that a model's text stays text."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.page_browser import a_browser
from tests.page_server import PAGE, PageServer, Reply, model

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

Page = sync_api.Page
expect = sync_api.expect
PATIENCE_MS = 30_000
"""Long, as machines that run tests may be busy; it is spent only on failures."""
HOSTILE = (
    '<img src=x onerror="window.__xss=1"> <script>window.__xss=2</script> <svg onload=window.__xss=3>\n\n'
    "[click](javascript:window.__xss=4) [data](data:text/html,<script>window.__xss=5</script>) "
    "![pic](http://x.invalid/p.png)\n\n"
    "<a href='javascript:window.__xss=6'>a</a> **<b onclick=window.__xss=7>bold</b>** `<i>` &lt;u&gt;\n\n"
    "```html\n</code></pre><img src=x onerror=window.__xss=8>\n```\n\n"
    "| <img src=y> | b |\n|---|---|\n| <b>c</b> | d |\n"
)


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with a_browser() as browser:
        expect.set_options(timeout=PATIENCE_MS)
        yield browser


@pytest.fixture(scope="module")
def real_server() -> Iterator[str]:
    """Address of serve.py's own server, with a model of random weights."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
    pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
    from model import Decoder, ModelConfig
    from model.config import padded_vocab_size
    from serving.admission import EngineOptions
    from serving.api import new_app
    from serving.catalog import Catalog
    from serving.engine import Engine
    from serving.limits import Hosts, Keys, Limits
    from serving.loading import Served, Speech
    from serving.offers import offers_of
    from serving.running import listening_socket
    from serving.service import Generation, Service
    from tests.unit.test_tokenizer import training_texts
    from tokenizer.hf_bbpe import train_hf_bbpe

    tokenizer = train_hf_bbpe(training_texts(), 300, show_progress=False)
    config = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    decoder = Decoder(config.resolve(padded_vocab_size(tokenizer.vocab_size), 256))
    decoder.initialize(0)
    served = Served(decoder, Speech(tokenizer, frozenset({tokenizer.eod_id}), {}))
    engine = Engine(served, EngineOptions(cache_tokens=2048))
    service = Service(Generation(engine, Catalog(offers_of(served, Path("random"), "random"))), 64)
    bound = listening_socket("127.0.0.1", 0)
    app = new_app(service, Hosts("127.0.0.1"), Keys([]), Limits())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))

    async def serve() -> None:
        service.start()
        try:
            await server.serve(sockets=[bound])
        finally:
            service.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: "sync_api.Browser", server: PageServer) -> Iterator[OpenPage]:
    """Opens the page in a browser that has never seen it. Whatever the page complains of fails the test."""
    server.reset()
    problems, contexts = [], []

    def open_page(address: str = server.address, width: int = 1280, height: int = 800, **options) -> Page:
        size = {"width": width, "height": height}
        context = browser.new_context(**{"viewport": size, "locale": "en-GB", "reduced_motion": "reduce", **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(address)
        expect(page.locator("#about")).not_to_be_empty()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser logs each answer that is an error; that the page told the user is what tests look at.
    assert not [one for one in problems if "Failed to load resource" not in one and "net::ERR" not in one]


def say(page: Page, text: str, reply: Reply | None = None, server: PageServer | None = None) -> None:
    if reply:
        assert server
        server.replies.append(reply)
    page.fill("#message", text)
    page.press("#message", "Enter")


def answers(page: Page) -> "sync_api.Locator":
    return page.locator(".message.is-assistant .body")


def until_done(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()


def button(page: Page, name: str) -> "sync_api.Locator":
    return page.get_by_role("button", name=name, exact=True)


def test_an_answer_streams_into_the_page(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "Hi", Reply("One **two** three", hold_after=4), server)
    # Before the rest is sent, the beginning is there, and Markdown that has not ended is text.
    expect(answers(page)).to_have_text("One **")
    expect(button(page, "Stop")).to_be_visible()
    server.gate.set()
    expect(answers(page).locator("strong")).to_have_text("two")
    expect(page.locator(".facts")).to_have_text(re.compile(r"\d tokens.*31\.4 tokens/s.*first token after 0\.05 s"))
    expect(page.locator("#list .title")).to_have_text("Hi")
    [body] = server.seen
    assert body["messages"] == [{"role": "user", "content": "Hi"}] and body["stream"] is True
    assert (body["logprobs"], body["top_logprobs"], body["model"]) == (True, 5, "tiny")
    # Nothing that the user has not set: the server's and the folder's own values count.
    assert not {"temperature", "top_p", "max_tokens", "seed", "stop"} & set(body)


def test_stop_keeps_what_came_and_frees_the_server(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "Hi", Reply("One two three", hold_after=2), server)
    expect(answers(page)).to_have_text("One two")
    button(page, "Stop").click()
    until_done(page)
    expect(page.locator(".finish")).to_have_text("Stopped.")
    expect(answers(page)).to_have_text("One two")
    for _ in range(PATIENCE_MS // 20):
        if server.gone:
            break
        page.wait_for_timeout(20)
    assert server.gone == 1


def test_regenerate_and_edit_go_on_from_there(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "first", Reply("A"), server)
    until_done(page)
    say(page, "second", Reply("B"), server)
    until_done(page)
    server.replies.append(Reply("C"))
    button(page, "Generate again").click()
    expect(answers(page)).to_have_text(["A", "C"])
    until_done(page)
    said = [("user", "first"), ("assistant", "A"), ("user", "second")]
    for body in server.seen[1:]:
        assert [(message["role"], message["content"]) for message in body["messages"]] == said
    page.locator(".message.is-user").first.hover()
    button(page, "Edit").first.click()
    field = page.get_by_role("textbox", name="Edit the message")
    expect(field).to_be_focused()
    # Escape changes nothing.
    field.press("Escape")
    expect(page.locator(".message")).to_have_count(4)
    button(page, "Edit").first.click()
    field.fill("changed")
    server.replies.append(Reply("D"))
    field.press("Enter")
    expect(page.locator(".message .body")).to_have_text(["changed", "D"])
    assert server.seen[3]["messages"] == [{"role": "user", "content": "changed"}]


def test_conversations_outlive_the_page(open_page: OpenPage, server: PageServer, tmp_path: Path):
    page = open_page()
    for name in ("one", "two"):
        button(page, "New conversation").click()
        say(page, name, Reply(f"**{name}**"), server)
        until_done(page)
    page.reload()
    expect(page.locator("#list .title")).to_have_text(["two", "one"])
    expect(answers(page).locator("strong")).to_have_text("two")
    page.get_by_role("button", name="one", exact=True).click()
    expect(answers(page)).to_have_text("one")
    # An answer of which half has come when the page goes is kept as far as it came.
    say(page, "more", Reply("half gone", hold_after=1), server)
    expect(answers(page).last).to_have_text("half")
    page.reload()
    expect(answers(page).last).to_have_text("half")

    button(page, "Actions for “one”").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_role("textbox", name="Name of the conversation").fill("uno")
    page.keyboard.press("Enter")
    expect(page.locator("#list .title").first).to_have_text("uno")

    def exported(item: str) -> str:
        button(page, "Actions for “uno”").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=item).click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        return path.read_text()

    text = exported("Export as Markdown")
    assert text.startswith("# uno\n\n*tiny*\n\n## You\n\none\n\n## Assistant\n\n**one**\n")
    data = json.loads(exported("Export as JSON"))
    [conversation] = data["conversations"]
    assert [message["content"] for message in conversation["messages"]] == ["one", "**one**", "more", "half"]
    button(page, "Actions for “uno”").click()
    page.get_by_role("menuitem", name="Delete").click()
    button(page, "Delete").click()
    expect(page.locator("#list .title")).to_have_text(["two"])
    # What was exported comes back; another file is refused by name, and hostile values do not enter.
    data["conversations"][0]["messages"].append({"role": "system", "content": 1})
    data["conversations"][0]["sampling"] = {"temperature": {"a": 1}, "top_k": 7}
    (tmp_path / "mine.json").write_text(json.dumps(data))
    (tmp_path / "other.json").write_text("[1, 2")
    page.set_input_files("#file", [tmp_path / "mine.json", tmp_path / "other.json"])
    expect(page.locator("#notices p")).to_have_text(["other.json is not an export of this page.", "Imported: 1"])
    expect(page.locator(".message .body")).to_have_text(["one", "one", "more", "half"])
    say(page, "and?")
    until_done(page)
    assert server.seen[-1]["top_k"] == 7 and "temperature" not in server.seen[-1]


def test_a_full_storage_is_told(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "one")
    until_done(page)
    fill = """(name) => {
        for (let size = 1 << 22; size >= 1; size >>= 1) {
            try { localStorage.setItem(`${name}.${size}`, "x".repeat(size)); } catch { /* half of it is tried next */ }
        }
    }"""
    page.evaluate(fill, "a")
    button(page, "New conversation").click()
    say(page, "two")
    expect(page.locator("#notices p").first).to_contain_text("probabilities of answers were let go")
    until_done(page)
    page.evaluate(fill, "b")
    say(page, "three" * 1000)
    expect(page.locator("#notices p").last).to_contain_text("The browser's storage is full")
    # It can still be talked to.
    expect(answers(page).last).to_contain_text("You said: three")


def test_hostile_text_becomes_no_html(open_page: OpenPage, server: PageServer):
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    server.models = [model("tiny", notes=[HOSTILE])]
    say(page, HOSTILE, Reply(HOSTILE), server)
    until_done(page)
    button(page, "Tokens").click()
    page.locator(".token").first.hover()
    button(page, "Tokens").click()
    page.get_by_role("button", name="Show the prompt as the model sees it").click()
    expect(page.locator(".prompt pre")).to_contain_text("<script>window.__xss=2</script>")
    page.reload()
    expect(answers(page).locator("pre")).to_have_text("</code></pre><img src=x onerror=window.__xss=8>")
    expect(page.locator(".message.is-user .body")).to_have_text(HOSTILE.strip(), use_inner_text=True)
    expect(answers(page)).to_contain_text('<img src=x onerror="window.__xss=1"> <script>window.__xss=2</script>')
    assert page.evaluate("window.__xss") is None
    found = page.evaluate("[...document.querySelectorAll('.message *')].map((element) => element.localName)")
    assert not {"img", "script", "iframe", "b", "i", "u"} & set(found)
    # A picture is a link, and nothing is loaded.
    links = page.evaluate("[...document.querySelectorAll('.body a')].map((link) => [link.href, link.rel])")
    assert links == [["http://x.invalid/p.png", "noopener noreferrer nofollow"]]
    assert all(url.startswith(server.address) for url in asked)


def test_tokens_show_probabilities_and_alternatives(open_page: OpenPage, server: PageServer):
    page = open_page()
    likely = lambda token, number: [("x", 0.5), (token, 0.25), ("y", 0.125), ("z", 0.06), ("\n", 0.05)]  # noqa: E731
    say(page, "Hi", Reply(["a", " b", "\n", "c"], probability=lambda number: 0.25, others=likely), server)
    until_done(page)
    toggle = button(page, "Tokens")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    tokens = page.locator(".token")
    expect(tokens).to_have_count(4)
    assert tokens.nth(1).evaluate("(one) => one.style.getPropertyValue('--surprise')") == "0.750"
    tokens.nth(1).hover()
    card = page.get_by_role("tooltip")
    expect(card.locator("li code")).to_have_text(["x", "·b", "y", "z", "↵"])
    expect(card.locator("li.is-chosen")).to_contain_text("25.0 %")
    page.mouse.move(0, 0)
    expect(card).to_have_count(0)
    # By keyboard: one stop for all, arrows between them.
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(card.locator(".token-card-head code")).to_have_text("↵")
    expect(tokens.nth(2)).to_have_attribute("aria-label", "↵, 25.0 %")
    page.keyboard.press("Escape")
    expect(card).to_have_count(0)
    # They are kept with the conversation, and so is the choice.
    page.reload()
    expect(tokens).to_have_count(4)
    page.get_by_role("button", name="Show the prompt as the model sees it").click()
    expect(page.locator(".prompt .is-control")).to_have_text(["<|im_start|>", "<|im_end|>", "<|im_start|>"])


def test_settings_reach_the_request(open_page: OpenPage, server: PageServer):
    tiny = model("tiny", recommended={"temperature": 0.6, "top_k": 20})
    server.models = [tiny, model("sql", parent="tiny", step=1200)]
    page = open_page()
    button(page, "Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.6")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Most tokens").fill("1.5")
    expect(page.get_by_role("alert").filter(has_text="Most tokens")).to_contain_text("write a whole number from 1 to")
    # What was typed of it is not taken for the number.
    page.get_by_label("Top k").press_sequentially("7.5")
    page.get_by_label("Most tokens").fill("50")
    page.get_by_label("Stop at").fill("\\n\\n\nEND")
    page.get_by_label("Model").select_option("sql")
    say(page, "Hi")
    until_done(page)
    body = server.seen[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in ("model", "top_p", "seed", "max_tokens", "stop")} == {
        "model": "sql", "top_p": 0.9, "seed": 7, "max_tokens": 50, "stop": ["\n\n", "END"],
    }  # fmt: skip
    assert "temperature" not in body  # recommended for tiny, not for sql
    assert "top_k" not in body
    expect(page.get_by_label("Model").locator("option")).to_have_text(["tiny", "↳ sql · step 1,200"])
    button(page, "Reset").click()
    say(page, "Again")
    until_done(page)
    assert "top_p" not in server.seen[1] and "stop" not in server.seen[1]


def test_errors_stand_where_the_answer_would(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "Hi", Reply(status=429, error="the queue is full", headers={"Retry-After": "3"}), server)
    alert = page.locator(".message.is-assistant").get_by_role("alert")
    expect(alert).to_contain_text("The queue is full. Try again in 3 s.")
    server.replies.append(Reply("One two three", cut_after=2))
    button(page, "Try again").click()
    expect(alert).to_contain_text("The connection was lost. What had arrived is kept.")
    expect(answers(page)).to_have_text("One two")
    server.replies.append(Reply("One", error="the server is <b>ending</b>"))
    button(page, "Try again").click()
    expect(alert).to_contain_text("The server is <b>ending</b>.")
    button(page, "Try again").click()
    expect(answers(page)).to_have_text("You said: Hi")
    expect(alert).to_have_count(0)


def test_a_conversation_beyond_the_context_goes_on_without_its_oldest_turns(open_page: OpenPage, server: PageServer):
    page = open_page()
    too_long = {"status": 400, "error": "messages has 1025 tokens", "code": "context_length_exceeded"}
    say(page, "long " * 600, Reply(**too_long), server)
    until_done(page)
    expect(page.get_by_role("alert").filter(has_text="longer than the model's context")).to_be_visible()
    server.replies.extend([Reply(**too_long), Reply("short")])
    say(page, "next")
    until_done(page)
    assert server.seen[-1]["messages"] == [{"role": "user", "content": "next"}]
    expect(page.locator(".finish")).to_have_text("The context is full: the model no longer sees the first 2 messages.")
    # The next turn begins there at once.
    say(page, "more")
    until_done(page)
    assert [one["content"] for one in server.seen[3]["messages"]] == ["next", "short", "more"]
    assert len(server.seen) == 4


def test_turns_alone_can_be_answered_or_not_lost(open_page: OpenPage, server: PageServer, tmp_path: Path):
    page = open_page()
    turns = {"asked": {"role": "user", "content": "asked"}, "said": {"role": "assistant", "content": "said"}}
    conversations = [{"title": name, "messages": [turn]} for name, turn in turns.items()]
    file = tmp_path / "alone.json"
    file.write_text(json.dumps({"format": "zero2all conversations", "conversations": conversations}))
    page.set_input_files("#file", file)
    expect(page.locator("#notices")).to_contain_text("Imported: 2")
    button(page, "said").click()
    expect(answers(page)).to_have_text("said")
    expect(button(page, "Generate again")).to_have_count(0)
    button(page, "asked").click()
    page.locator(".message.is-user").hover()
    button(page, "Generate an answer").click()
    expect(answers(page)).to_have_text("You said: asked")


def test_two_tabs_lose_nothing(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "one")
    until_done(page)
    other = page.context.new_page()
    other.goto(server.address)
    expect(answers(other)).to_have_text("You said: one")
    say(page, "slow", Reply("a b", hold_after=1), server)
    # The other tab does not know how far the answer is.
    expect(other.locator(".finish")).to_have_text("Not finished.")
    say(other, "fast")
    expect(answers(other).last).to_have_text("You said: fast")
    server.gate.set()
    expect(page.locator("#notices")).to_contain_text("Another tab has changed this conversation")
    expect(answers(page)).to_have_text(["You said: one", "a b"])
    expect(page.locator("#list .title")).to_have_text(["one", "one"])
    expect(answers(other).last).to_have_text("You said: fast")


def test_the_prompt_opens_in_sight(open_page: OpenPage, server: PageServer):
    page = open_page()
    say(page, "Hi", Reply(["long\n\n"] * 60), server)
    until_done(page)
    toggle, prompt = page.get_by_role("button", name="Show the prompt as the model sees it"), page.locator(".prompt")
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        toggle.press("Enter")
        expect(prompt.locator("pre")).to_be_focused()
        box, composer = prompt.bounding_box(), page.locator("#composer").bounding_box()
        assert box and composer and box["y"] >= 0 and box["y"] + box["height"] <= composer["y"]
        toggle.press("Enter")
        expect(toggle).to_be_focused()


def test_an_api_key_is_asked_for_once(open_page: OpenPage, server: PageServer):
    page = open_page()
    server.key = "secret"
    say(page, "Hi")
    key = page.get_by_role("textbox", name="API key")
    key.fill("wrong")
    key.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("The server refused this key.")
    key.fill("secret")
    key.press("Enter")
    expect(answers(page)).to_have_text("You said: Hi")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    say(page, "Again")
    expect(answers(page).last).to_have_text("You said: Again")


def test_a_model_without_conversations_continues_texts(open_page: OpenPage, server: PageServer):
    server.models = [model("base", chat=False, notes=["it has no chat template"])]
    page = open_page()
    expect(page.get_by_role("heading", name="Begin a text")).to_be_visible()
    expect(page.locator("#notes")).to_contain_text("It has no chat template.")
    say(page, " Once **upon**", Reply([" a", " time"]), server)
    until_done(page)
    expect(answers(page)).to_have_text(" a time", use_inner_text=True)
    expect(answers(page).locator("strong")).to_have_count(0)
    assert server.seen[0]["prompt"] == " Once **upon**" and server.seen[0]["max_tokens"] == 256
    # With nothing to add, it goes on.
    say(page, "", Reply([" there"]), server)
    until_done(page)
    assert server.seen[1]["prompt"] == " Once **upon** a time"
    expect(page.locator(".message")).to_have_count(3)


def test_chinese_dark_and_phone(open_page: OpenPage, server: PageServer):
    page = open_page(width=390, height=844, locale="zh-CN", color_scheme="dark", has_touch=True, is_mobile=True)
    expect(page.get_by_role("heading", name="想聊点什么？")).to_be_visible()
    field = page.get_by_role("textbox", name="消息")
    field.focus()
    # An input method composes: Enter takes a word. Safari ends the composition before the key, which is then 229.
    field.evaluate("(field) => { field.value = '你好'; }")
    for event in ({"isComposing": True, "keyCode": 13}, {"isComposing": False, "keyCode": 229}):
        field.dispatch_event("keydown", {"key": "Enter", "bubbles": True, **event})
    field.press("Shift+Enter")
    assert field.input_value() == "你好\n" and not server.seen
    field.press("Enter")
    expect(answers(page)).to_have_text("You said: 你好")
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    light = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(light)
    # Nothing is wider than the screen; the list is out of the way until it is asked for.
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    expect(page.locator("#side")).to_be_hidden()
    button(page, "显示对话列表").click()
    expect(page.locator("#list .title")).to_have_text("你好")
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    button(page, "设置").click()
    page.get_by_label("主题").select_option("light")
    page.get_by_label("语言").select_option("en")
    expect(page.get_by_label("Theme")).to_have_value("light")
    assert page.evaluate(light) != dark
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    assert page.evaluate(light) != dark


def test_against_the_real_server(open_page: OpenPage, real_server: str):
    page = open_page(real_server)
    button(page, "Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("24")
    say(page, "<|im_end|> Hi")
    until_done(page)
    asked = {"messages": [{"role": "user", "content": "<|im_end|> Hi"}], "temperature": 0, "max_tokens": 24}
    [choice] = page.request.post(f"{real_server}/v1/chat/completions", data=asked).json()["choices"]
    kept = "Object.entries(localStorage).find(([key]) => key.includes('conversation'))[1]"
    message = json.loads(page.evaluate(kept))["messages"][1]
    assert message["content"] == choice["message"]["content"] and message["finish"] == choice["finish_reason"]
    assert len(message["tokens"]) == message["count"] > 1
    button(page, "Tokens").click()
    expect(page.locator(".token")).to_have_count(message["count"])
    page.locator(".token").first.focus()
    # Greedy: the likeliest of the five is the chosen one.
    expect(page.locator(".token-card li")).to_have_count(5)
    expect(page.locator(".token-card li.is-chosen")).to_have_count(1)
    page.get_by_role("button", name="Show the prompt as the model sees it").click()
    # What the user writes is no control token.
    controls = page.locator(".prompt .is-control").all_inner_texts()
    assert controls and page.locator(".prompt pre").inner_text().count("<|im_end|>") == 1 + controls.count("<|im_end|>")

    button(page, "New conversation").click()
    button(page, "Continue a text").click()
    say(page, "Once")
    until_done(page)
    expect(page.locator(".message.is-assistant .token")).not_to_have_count(0)
    expect(page.get_by_role("alert").filter(has_text=re.compile("."))).to_have_count(0)


def test_both_languages_have_all_texts(open_page: OpenPage):
    page = open_page()
    strings = page.evaluate("import('/page/strings.js').then((module) => module.STRINGS)")
    english, chinese = strings["en"], strings["zh"]
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", chinese[key])), key
    sources = "".join(path.read_text() for path in PAGE.iterdir() if path.name != "strings.js")
    used = set(re.findall(r'(?:\bt\(|\bdata-(?:text|hint|label|title)=)"(\w+)"', sources))
    assert used <= set(english), used - set(english)
    # Texts that nothing shows are gone. Some keys are put together, or chosen between.
    words = set(re.findall(r"\w+", sources))
    assert {key for key in english if key.removesuffix("Hint") in words} == set(english)


def test_texts_contrast_with_what_they_stand_on():
    """At least 4.5 to 1, and 3 to 1 for the frames of fields, as WCAG 2.2 measures it (criteria 1.4.3 and 1.4.11)."""
    found = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", (PAGE / "app.css").read_text())

    def channels(colour: str) -> list[float]:
        return [int(colour[place : place + 2], 16) / 255 for place in range(1, len(colour), 2)]

    def mixed(upper: list[float], share: float, lower: list[float]) -> list[float]:
        return [one * share + other * (1 - share) for one, other in zip(upper, lower)]

    def luminance(colour: list[float]) -> float:
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (1, 2):
        colours = {row[0]: channels(row[theme]) for row in found}
        grounds = {name: colours[name] for name in ("page", "side", "raised", "bubble")}
        for name in ("hover", "pressed"):
            grounds[f"side, {name}"] = mixed(colours[name][:3], colours[name][3], colours["side"])
        pairs = {(text, ground): 4.5 for text in ("text", "quiet") for ground in grounds}
        pairs |= {(text, ground): 4.5 for text in ("accent", "danger") for ground in ("page", "side", "raised")}
        grounds |= {name: colours[name] for name in ("accent", "danger-page")}
        grounds["chip"] = mixed(colours["accent"], 0.16, colours["page"])
        grounds["surprise"] = mixed(colours["heat"], 0.62, colours["page"])
        pairs |= {("on-accent", "accent"): 4.5, ("danger", "danger-page"): 4.5, ("accent", "chip"): 4.5}
        pairs |= {("text", "surprise"): 4.5, ("strong-line", "raised"): 3.0, ("strong-line", "side"): 3.0}
        for (text, ground), least in pairs.items():
            dark, bright = sorted((luminance(colours[text]), luminance(grounds[ground])))
            assert (bright + 0.05) / (dark + 0.05) >= least, (theme, text, ground)


def test_the_page_obeys_its_policy():
    """No script, style or handler in the HTML, no address of another machine, no parsing of HTML."""
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=\"/page/)|https?://", html)
    for path in PAGE.iterdir():
        source = path.read_text()
        parses = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextual|\beval\b|Function\("
        assert not re.search(parses, source), path
        assert path.suffix in {".html", ".js", ".css", ".svg"} and len(source.splitlines()) < 400
        assert max(map(len, source.splitlines())) <= 120, path

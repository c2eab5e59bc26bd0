"""The server's APIs in front of an engine that repeats its prompt: each field, each refusal, and who is let in."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

from serving import openai_fields as fields
from serving import tgi_api
from serving.answers import Choice
from serving.api import new_app
from serving.catalog import Catalog, Offer
from serving.limits import Hosts, Keys, Limits, read_keys
from serving.requests import Piece
from serving.service import Generation, Service
from serving.text import Lead, without_lead
from tests.asgi import Client, Reply
from tests.fake_engine import FakeEngine
from tests.unit.test_chat import tokenizer
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of

__all__ = ["tokenizer"]

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
CONTINUED = {"prompt": "ab c", "max_tokens": 3}
BASE = {CHAT: ASKED, COMPLETIONS: CONTINUED}


class Place:
    """A server with its client."""

    def __init__(self, tokenizer: Tokenizer, page: Path, keys: Keys | None = None, most_open: int = 64,
                 host: str = "127.0.0.1", **limits: Any):  # fmt: skip
        self.tokenizer, self.template = tokenizer, template_of(tokenizer)
        self.engine, self.log = FakeEngine(tokenizer), []
        ends = frozenset([tokenizer.eod_id])

        def offer(name: str, adapter: str | None, template: Any) -> Offer:
            return Offer(name, adapter, adapter and "tiny", tokenizer, ends, 128, template, "it has none", 7, 1,
                         {"temperature": 0.7})  # fmt: skip

        self.generation = Generation(self.engine, Catalog([offer("tiny", None, self.template),
                                                           offer("sql", "sql", self.template),
                                                           offer("mute", "mute", None)]), "step-7")  # fmt: skip

        def build() -> Any:
            self.service = Service(self.generation, most_open)
            self.service.start()
            return new_app(self.service, Hosts(host, ["proxy.example"]), keys or Keys([]), Limits(**limits), page,
                           self.log.append)  # fmt: skip

        self.client = Client(build)
        self.post, self.get, self.begin = self.client.post, self.client.get, self.client.begin

    def close(self) -> None:
        self.engine.gate.set()
        self.service.close()
        self.client.close()

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for name in ("index.html", "app.js", "app.css", "secret.txt"):
        (folder / name).write_text(f"this is {name}")
    (folder.parent / "outside.js").write_text("not for you")
    return folder


@pytest.fixture(scope="module")
def new_place(tokenizer: Tokenizer, page: Path) -> Iterator[Callable[..., Place]]:
    places: list[Place] = []

    def new(**options: Any) -> Place:
        places.append(Place(tokenizer, page, **options))
        return places[-1]

    yield new
    for place in places:
        place.close()


@pytest.fixture(scope="module")
def place(new_place: Callable[..., Place]) -> Place:
    return new_place()


def refused(reply: Reply, status: int, sentence: str = "", param: str | None = None) -> None:
    """Whether the answer is an error in OpenAI's form."""
    assert reply.status == status and reply.is_complete, reply.body
    assert set(reply.json) == {"error"} and set(reply.error) == {"message", "type", "param", "code"}
    assert sentence in reply.error["message"] and "Traceback" not in reply.error["message"]
    assert param is None or reply.error["param"] == param, reply.error


# What each field does: body besides the base, and a check of what the engine got.
def has(**wanted: Any) -> Callable[[Any], bool]:
    return lambda request: all(getattr(request.sampling, name) == value for name, value in wanted.items())


SHARED = [
    ({"temperature": 0.5}, has(temperature=0.5)), ({"temperature": 0}, has(temperature=0.0)),
    ({}, has(temperature=1.0)),
    ({"top_p": 0.3}, has(top_p=0.3)), ({"top_k": 4}, has(top_k=4)), ({"top_k": -1}, has(top_k=0)),
    ({"min_p": 0.1}, has(min_p=0.1)), ({"seed": -5}, has(seed=-5)), ({}, has(seed=None)),
    ({"seed": (1 << 63) - 1}, has(seed=(1 << 63) - 1)), ({"presence_penalty": -1.5}, has(presence_penalty=-1.5)),
    ({"frequency_penalty": 2}, has(frequency_penalty=2.0)), ({"repetition_penalty": 1.2}, has(repetition_penalty=1.2)),
    ({"logit_bias": {"7": -100, "8": 3}}, has(logit_bias={7: -100.0, 8: 3.0})), ({"stop": "x"}, has(stop=("x",))),
    ({"stop": ["x", "yz", "x"]}, has(stop=("x", "yz"))), ({"stop": None}, has(stop=())),
    ({"stop_token_ids": [5, 6]}, lambda request: {5, 6} <= request.sampling.stop_ids),
    ({"ignore_eos": True}, has(ignores_eos=True, stop_ids=frozenset())), ({"min_tokens": 2}, has(min_new_tokens=2)),
    ({"include_stop_str_in_output": True}, has(includes_stop=True)), ({"n": 2}, lambda request: request.n == 2),
    ({"prompt_logprobs": 3}, has(prompt_logprobs=3)), ({"max_tokens": 5}, has(max_new_tokens=5)),
    ({"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never", "n": 2},
     has(num_beams=3, length_penalty=0.5, early_stopping="never")),
    ({"num_beams": 2, "early_stopping": "true"}, has(early_stopping=True)), ({"user": "somebody"}, has()),
    ({"model": "sql"}, lambda request: request.adapter == "sql"), ({}, lambda request: request.adapter is None),
    ({"return_timings": True, "return_token_ids": True}, has()),
]  # fmt: skip
FIELDS = [(path, *case) for path in BASE for case in SHARED] + [
    (CHAT, {"max_tokens": None, "max_completion_tokens": 4}, has(max_new_tokens=4)),
    (CHAT, {"max_completion_tokens": 3}, has(max_new_tokens=3)),
    (CHAT, {"logprobs": True}, has(logprobs=0)), (CHAT, {"logprobs": True, "top_logprobs": 5}, has(logprobs=5)),
    (CHAT, {"logprobs": False}, has(logprobs=None)),
    (COMPLETIONS, {"logprobs": 2}, has(logprobs=2, prompt_logprobs=None)),
    (COMPLETIONS, {"logprobs": 2, "echo": True}, has(logprobs=2, prompt_logprobs=2)),
    (COMPLETIONS, {"max_tokens": 0, "echo": True, "logprobs": 1}, has(max_new_tokens=0)),
    (COMPLETIONS, {"max_tokens": None}, has(max_new_tokens=16)), (COMPLETIONS, {"best_of": 2, "n": 2}, has()),
    (COMPLETIONS, {"add_special_tokens": False}, has()),
]  # fmt: skip


@pytest.mark.parametrize(("path", "more", "check"), FIELDS)
def test_fields_reach_the_engine(place: Place, path: str, more: dict, check: Callable[[Any], bool]):
    reply = place.post(path, BASE[path] | more)
    assert reply.status == 200, reply.body
    assert check(place.engine.seen[-1]), place.engine.seen[-1]


def test_every_field_of_the_tables_is_tried():
    """A field that somebody adds to a table needs a case above."""
    alone = {"messages", "prompt", "stream", "stream_options", "show_prompt"}
    for path, table in ((CHAT, fields.CHAT_FIELDS), (COMPLETIONS, fields.COMPLETION_FIELDS)):
        tried = {name for each, more, _ in FIELDS if each == path for name in more}
        assert not table.keys() - tried - alone
    documented = {
        "audio", "function_call", "functions", "metadata", "modalities", "moderation", "parallel_tool_calls",
        "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort",
        "response_format", "safety_identifier", "service_tier", "store", "tool_choice", "tools", "verbosity",
        "web_search_options",
    }  # fmt: skip
    assert documented <= fields.CHAT_OFF.keys() and "suffix" in fields.COMPLETION_OFF


def test_openai_documents_no_field_that_is_unknown_here():
    """By the types of its own client."""
    types = pytest.importorskip("openai.types.chat.completion_create_params")
    from openai.types import completion_create_params

    for params, table, off in (
        (types.CompletionCreateParamsBase, fields.CHAT_FIELDS, fields.CHAT_OFF),
        (completion_create_params.CompletionCreateParamsBase, fields.COMPLETION_FIELDS, fields.COMPLETION_OFF),
    ):
        assert not set(params.__annotations__) - table.keys() - off.keys()


OFF = [(path, name, values) for path, off in ((CHAT, fields.CHAT_OFF), (COMPLETIONS, fields.COMPLETION_OFF))
       for name, values in off.items()]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "values"), OFF)
def test_a_field_that_is_not_offered_is_refused_unless_it_means_nothing(
    place: Place, path: str, name: str, values: tuple
):
    for value in (None, *values):
        assert place.post(path, BASE[path] | {name: value}).status == 200
    for value in ("something", {"type": "json_object"}, [{"type": "function"}], 5,
                  1 if any(one is True for one in values) else {"x": 1}):  # fmt: skip
        refused(place.post(path, BASE[path] | {name: value}), 400, f"{name} is not supported by this server", name)


WRONG_VALUES = [
    ({"temperature": -0.1}, "temperature must be a number from 0 to 100, got -0.1"),
    ({"temperature": "1"}, "temperature must be a number"), ({"temperature": True}, "temperature must be a number"),
    ({"temperature": 10**400}, "temperature must be a number"), ({"top_p": 0}, "top_p must be a number above 0"),
    ({"top_p": 1.1}, "top_p must be"), ({"top_k": 1.5}, "top_k must be a whole number"), ({"top_k": -2}, "top_k must"),
    ({"min_p": 2}, "min_p must be"), ({"n": 0}, "n must be a whole number"), ({"n": 2.0}, "n must be"),
    ({"n": 129}, "a request may ask for 128 texts at most, got 129"), ({"seed": 1 << 63}, "seed must be"),
    ({"seed": 0.5}, "seed must be"), ({"presence_penalty": 2.1}, "presence_penalty must be"),
    ({"frequency_penalty": [1]}, "frequency_penalty must be a number from -2 to 2, got a list"),
    ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01"),
    ({"logit_bias": {"x": 1}}, "logit_bias must be an object whose keys are token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias must be an object whose values are numbers from -100 to 100"),
    ({"logit_bias": [1]}, "logit_bias must be an object"),
    ({"logit_bias": {"400": 1}}, "logit_bias holds 400, and the model's tokens have the ids 0 to 399"),
    ({"stop": ["a"] * 17}, "stop must be a text or a list of at most 16"), ({"stop": ""}, "stop must be"),
    ({"stop": [1]}, "stop must be"), ({"stop_token_ids": [400]}, "stop_token_ids holds 400"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be a list of at most 1024 token ids"),
    ({"ignore_eos": "yes"}, "ignore_eos must be true or false, got 'yes'"), ({"min_tokens": -1}, "min_tokens must be"),
    ({"prompt_logprobs": 21}, "prompt_logprobs must be"), ({"num_beams": 0}, "num_beams must be"),
    ({"num_beams": 17}, "num_beams is 17, and this server takes 16 at most (--max_beams): ask for fewer"),
    ({"n": 3, "num_beams": 2}, "n must not be more than num_beams"),
    ({"length_penalty": 2}, "length_penalty has no effect without num_beams"),
    ({"early_stopping": "soon", "num_beams": 2}, "early_stopping must be true or false or never"),
    ({"user": 5}, "user must be a text"), ({"stream": 1}, "stream must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options has no effect without stream"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage is not a field"),
    ({"stream": True, "stream_options": []}, "stream_options must be an object"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs cannot be streamed"),
    ({"max_tokens": -1}, "max_tokens must be"), ({"max_tokens": "3"}, "max_tokens must be"),
    ({"max_tokens": 128}, "tokens, which leave room for"),
    ({"tempreature": 1}, "tempreature is not a field of this request: did you mean temperature?"),
    ({"\u202e\x00" * 99: 1}, "is not a field of this request"), ({"": 1}, " is not a field of this request"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported by this server: leave it out"),
]  # fmt: skip
WRONG = [(path, more, sentence) for path in BASE for more, sentence in WRONG_VALUES] + [
    (CHAT, {"top_logprobs": 2}, "top_logprobs needs logprobs: true"), (CHAT, {"logprobs": 5}, "logprobs must be true"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs must be"),
    (CHAT, {"max_tokens": 0}, "max_tokens must"),
    (CHAT, {"max_completion_tokens": 5}, "max_tokens and max_completion_tokens mean the same"),
    (CHAT, {"messages": None}, "messages is missing"), (CHAT, {"messages": []}, "a list of at least one message"),
    (CHAT, {"messages": "hi"}, "messages must be a list"),
    (CHAT, {"messages": ["hi"]}, "messages[0] must be an object"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role must be one of developer, system, user"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role must be one of"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is tool, and tools are not supported"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
     "messages[0].tool_calls is not supported"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "contnet": "y"}]}, "did you mean content?"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "pictures and sounds are not supported"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'each with its "text"'),
    (CHAT, {"messages": [{"role": "user", "content": "\ufdd2"}]}, "messages cannot be laid out"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": "<|im_end|>"}]}, "spells the control token"),
    (CHAT, {"messages": [{"role": "user", "content": "漢" * 200}]}, "tokens, and the model has room for 128"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]}, "100,000 characters, and the model has room"),
    (CHAT, {"model": "mute"}, "the model mute cannot chat, but continue texts (/v1/completions): it has none"),
    (COMPLETIONS, {"prompt": None}, "prompt is missing"), (COMPLETIONS, {"prompt": ""}, "prompt is empty"),
    (COMPLETIONS, {"prompt": []}, "prompt must be a text, a list of texts"),
    (COMPLETIONS, {"prompt": 5}, "prompt must"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt must be"), (COMPLETIONS, {"prompt": [[1], ["a"]]}, "prompt must be"),
    (COMPLETIONS, {"prompt": [True]}, "prompt must be"), (COMPLETIONS, {"prompt": [1, -1]}, "prompt holds -1"),
    (COMPLETIONS, {"prompt": [1, 400]}, "prompt holds 400, and the model's tokens have the ids 0 to 399"),
    (COMPLETIONS, {"prompt": [[1], [400]]}, "prompt[1] holds 400"),
    (COMPLETIONS, {"prompt": [[1], []]}, "prompt[1] is"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "a request may have 128 prompts at most, got 129"),
    (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "a request may ask for 128 texts at most, got 130"),
    (COMPLETIONS, {"prompt": [1] * 128}, "prompt has 128 tokens, and the model has room for 128"),
    (COMPLETIONS, {"best_of": 3}, "best_of is not supported"), (COMPLETIONS, {"logprobs": True}, "logprobs must be"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs must be"), (COMPLETIONS, {"echo": 1}, "echo must be true or false"),
    (COMPLETIONS, {"suffix": "end"}, "suffix is not supported by this server"),
    (COMPLETIONS, {"top_logprobs": 1}, "top_logprobs is not a field of this request: did you mean"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "more", "sentence"), WRONG)
def test_wrong_values_are_a_sentence(place: Place, path: str, more: dict, sentence: str):
    refused(place.post(path, BASE[path] | more), 400, sentence)


def test_a_model_that_is_not_there(place: Place):
    for path, body in BASE.items():
        refused(place.post(path, body | {"model": "gpt-5"}), 404, "there is no model of this name: choose one of tiny, "
                "sql, mute", "model")  # fmt: skip
        refused(place.post(path, body | {"model": 5}), 400, "model must be a text", "model")


@pytest.mark.parametrize(
    ("body", "sentence"), [
        (b"", "the body is not JSON"), (b"{", "the body is not JSON"), (b"[]", "the body must be a JSON object"),
        (b'"x"', "must be a JSON object"), (b"\xff\xfe{}", "the body is not UTF-8"), (b"\xef\xbb\xbf{}", "is not JSON"),
        ("{}".encode("utf-16"), "not"), (b'{"temperature": NaN}', "JSON has no NaN"),
        (b'{"n": Infinity}', "has no Inf"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a number in the body is too long"), (b'{"n": 1e999}', "n must be a whole"),
        (b'{"temperature": 1e999}', "temperature must be"), (b'{"user": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"), (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"), (b"{}x", "the body is not JSON"), (b"null", "must be a JSON object"),
        (b'{"user": "\x00"}', "the body is not JSON"), (b"{'n': 1}", "the body is not JSON"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(place: Place, body: bytes, sentence: str):
    for path in (CHAT, COMPLETIONS, GENERATE, "/generate_stream", "/tokenize", "/detokenize"):
        reply = place.post(path, body)
        refused(reply, 400)
        if path == CHAT:
            assert sentence in reply.error["message"]


def test_a_chat(place: Place):
    """The prompt is the template's; the answer, with this engine, the prompt's own first tokens."""
    prompt = place.template.prompt([Message("system", "be <|im_end|> brief"), Message("user", "hi")])
    messages = [{"role": "developer", "content": "be <|im_end|> brief"},
                {"role": "user", "content": [{"type": "text", "text": one} for one in "hi"]}]  # fmt: skip
    reply = place.post(CHAT, {"messages": messages, "max_tokens": 3, "n": 2, "return_token_ids": True}).json
    assert place.engine.seen[-1].prompt_ids == tuple(prompt)
    assert place.template.stop_ids <= place.engine.seen[-1].sampling.stop_ids
    said = place.tokenizer.decode(prompt[:3])
    assert reply["choices"] == [
        {"index": n, "message": {"role": "assistant", "content": said, "refusal": None}, "logprobs": None,
         "finish_reason": "length", "token_ids": prompt[:3]} for n in range(2)
    ]  # fmt: skip
    assert reply["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 6, "total_tokens": len(prompt) + 6,
                              "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
    assert (reply["object"], reply["model"], reply["system_fingerprint"]) == ("chat.completion", "tiny", "step-7")
    assert reply["prompt_token_ids"] == prompt and "prompt" not in reply
    # Without a limit, the answer takes the whole context.
    whole = place.post(CHAT, {"messages": messages}).json["usage"]
    assert whole["total_tokens"] == 128


def test_a_stream_tells_what_the_whole_answer_does(place: Place):
    body = ASKED | {"logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 5}
    whole = place.post(CHAT, body).json
    reply = place.post(CHAT, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8" and reply.events[-1] == "[DONE]"
    *chunks, last = reply.events[:-1]
    assert last["choices"] == [] and last["usage"] == whole["usage"] and all(one["usage"] is None for one in chunks)
    assert len({one["id"] for one in chunks}) == 1 and {one["object"] for one in chunks} == {"chat.completion.chunk"}
    assert [one["choices"][0]["delta"] for one in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    for choice in whole["choices"]:
        own = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert [token for one in own if one["logprobs"] for token in one["logprobs"]["content"]] == (
            choice["logprobs"]["content"]
        )
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == ["length"]
    plain = place.post(CHAT, ASKED | {"stream": True}).events
    assert all("usage" not in one for one in plain[:-1])


def test_probabilities_of_a_chat(place: Place):
    body = ASKED | {"logprobs": True, "top_logprobs": 1, "max_tokens": 30, "return_token_ids": True}
    body["messages"] = [{"role": "user", "content": "漢"}]
    reply = place.post(CHAT, body | {"prompt_logprobs": 1}).json
    prompt = reply["prompt_token_ids"]
    told = reply["choices"][0]["logprobs"]["content"]
    assert [one["id"] for one in told] == [prompt[n % len(prompt)] for n in range(30)]
    parts = [one for one in told if "\ufffd" in one["token"]]
    assert len(parts) >= 3 and all(one["bytes"] is None for one in parts)
    assert told[0] == {"token": "<|im_start|>", "logprob": math.log(0.5), "bytes": list(b"<|im_start|>"),
                       "id": prompt[0],
                       "top_logprobs": [{"token": "!", "logprob": -1.0, "bytes": [33], "id": 0}]}  # fmt: skip
    first, second = reply["prompt_logprobs"][:2]
    assert first is None
    assert second == {"0": {"logprob": -1.0, "rank": 1, "decoded_token": "!"},
                      str(prompt[1]): {"logprob": math.log(0.5), "rank": None, "decoded_token": "u"}}  # fmt: skip


def test_the_prompt_as_the_model_sees_it(place: Place):
    """What people wrote is text, even where it spells a control token."""
    body = {"messages": [{"role": "user", "content": "a 漢 <|im_end|>"}]}
    first = place.post(CHAT, body | {"stream": True, "show_prompt": True, "return_token_ids": True}).events[0]
    told = place.post("/tokenize", body | {"show_prompt": True, "return_token_strs": True}).json
    assert first["prompt"] == told["prompt"] and first["prompt_token_ids"] == told["tokens"]
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) and told["max_model_len"] == 128
    assert "".join(one["text"] for one in told["prompt"]) == place.tokenizer.decode(told["tokens"])
    control = [one["text"] for one in told["prompt"] if one["is_control"]]
    assert control == ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"]
    character = [one["text"] for one in told["prompt"] if one["text"] in ("", "漢")]
    assert character == ["", "", "漢"]
    text = place.post("/detokenize", {"tokens": told["tokens"]}).json["prompt"]
    assert text == place.tokenizer.decode(told["tokens"])


def test_timings(place: Place):
    body = ASKED | {"return_timings": True}
    last = place.post(CHAT, body | {"stream": True}).events[-2]
    assert last["choices"] == []
    for timings in (last["timings"], place.post(CHAT, body).json["timings"]):
        assert 0 <= timings["first_token_s"] <= timings["total_s"] < 20 and timings["tokens_per_second"] > 0
    timings = place.post(COMPLETIONS, CONTINUED | {"max_tokens": 1, "return_timings": True}).json["timings"]
    assert timings["tokens_per_second"] is None


@pytest.mark.parametrize("form", ["texts", "ids"])
def test_completions_of_several_prompts(place: Place, form: str):
    texts = ["ab c", "d漢"]
    prompt = texts if form == "texts" else [place.tokenizer.encode(one) for one in texts]
    reply = place.post(COMPLETIONS, {"prompt": prompt, "n": 2, "max_tokens": 4, "return_token_ids": True}).json
    ids = [place.tokenizer.encode(one) for one in texts]
    assert [one["index"] for one in reply["choices"]] == [0, 1, 2, 3]
    for number, choice in enumerate(reply["choices"]):
        own = ids[number // 2]
        said = [own[n % len(own)] for n in range(4)]
        assert choice["token_ids"] == said and choice["prompt_token_ids"] == own
    assert reply["choices"][0]["text"] == "ab c"
    assert reply["usage"]["prompt_tokens"] == len(ids[0]) + len(ids[1])
    one = place.post(COMPLETIONS, {"prompt": prompt[0], "max_tokens": 4}).json
    assert one["choices"][0]["text"] == "ab c" and one["object"] == "text_completion"


@pytest.mark.parametrize("is_stream", [False, True])
def test_log_probabilities_of_completions(place: Place, is_stream: bool):
    """With `echo` they begin with the prompt's, as evaluation programs want them."""
    prompt = "a漢 b"
    body = {"prompt": prompt, "max_tokens": 2, "echo": True, "logprobs": 1, "stream": is_stream}
    reply = place.post(COMPLETIONS, body)
    parts = [one["choices"][0] for one in reply.events[:-1]] if is_stream else reply.json["choices"]
    told = {name: [value for one in parts for value in one["logprobs"][name]] for name in parts[0]["logprobs"]}
    ids = place.tokenizer.encode(prompt)
    text = "".join(one["text"] for one in parts)
    assert text.startswith(prompt) and len(told["tokens"]) == len(ids) + 2
    assert told["token_logprobs"] == [None] + [math.log(0.5)] * (len(ids) + 1)
    assert told["top_logprobs"][0] is None
    assert told["top_logprobs"][1] == {"!": -1.0, told["tokens"][1]: math.log(0.5)}
    for name, offset in zip(told["tokens"], told["text_offset"]):
        assert name.startswith("token_id:") or text[offset:].startswith(name)
    assert [name for name in told["tokens"] if name.startswith("token_id:")] == [
        f"token_id:{one}" for one in (*ids[1:4], ids[1])]  # fmt: skip
    assert parts[-1]["finish_reason"] == "length"


def test_a_prompt_can_be_scored_alone(place: Place):
    reply = place.post(COMPLETIONS, {"prompt": "ab c", "max_tokens": 0, "echo": True, "logprobs": 0}).json
    assert reply["choices"][0]["text"] == "ab c" and len(reply["choices"][0]["logprobs"]["tokens"]) == 4
    assert reply["usage"]["completion_tokens"] == 0
    # The context may be full then.
    assert place.post(COMPLETIONS, {"prompt": [1] * 128, "max_tokens": 0, "echo": True, "logprobs": 0}).status == 200


def test_what_a_model_says_before_every_answer_is_left_out():
    """The template writes it itself once the answer is part of the history."""
    for lead, texts, told in (
        ("\n", ["\n", "a", "\nb"], ["", "a", "\nb"]), ("\n\n", ["\n", "", "\na", "b"], ["", "", "a", "b"]),
        ("\n\n", ["\n", "a"], ["", "\na"]), ("", ["a", "b"], ["a", "b"]), ("\n\n", ["\n"], ["\n"]),
    ):  # fmt: skip
        choice = Choice(0, 0, Lead(lead))
        pieces = [Piece("x", 0, text, finish="stop" if n == len(texts) else None) for n, text in enumerate(texts, 1)]
        assert [choice.add(piece) for piece in pieces] == told and choice.text == "".join(told)
        # The same in the terminal.
        assert "".join(without_lead(iter(texts), lead)) == choice.text


def test_no_logarithm_is_beyond_json(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math, "log", lambda value: -math.inf)
    reply = place.post(CHAT, ASKED | {"logprobs": True})
    assert {one["logprob"] for one in reply.json["choices"][0]["logprobs"]["content"]} == {-9999.0}


def test_tgi(place: Place):
    parameters = {
        "max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "stop": ["x"], "seed": 5, "details": True, "decoder_input_details": True,
        "top_n_tokens": 1, "return_full_text": True, "adapter_id": "sql", "best_of": None, "watermark": False,
    }  # fmt: skip
    assert parameters.keys() >= tgi_api.PARAMETERS.keys()
    reply = place.post(GENERATE, {"inputs": "ab c", "parameters": parameters}).json
    request = place.engine.seen[-1]
    assert has(temperature=0.5, top_k=7, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.2, stop=("x",), seed=5,
               includes_stop=True, logprobs=1, prompt_logprobs=0, max_new_tokens=3)(request)  # fmt: skip
    assert request.adapter == "sql"
    ids = place.tokenizer.encode("ab c")
    token = {"id": ids[0], "text": "a", "logprob": math.log(0.5), "special": False}
    assert reply["generated_text"] == "ab cab "
    assert reply["details"]["tokens"][0] == token and len(reply["details"]["tokens"]) == 3
    assert reply["details"]["prefill"][0] == {"id": ids[0], "text": "a", "logprob": None}
    assert reply["details"]["top_tokens"][0] == [{"id": 0, "text": "!", "logprob": -1.0, "special": False}]
    assert {name: reply["details"][name] for name in ("finish_reason", "generated_tokens", "seed")} == {
        "finish_reason": "length", "generated_tokens": 3, "seed": 5}  # fmt: skip
    plain = place.post(GENERATE, {"inputs": "ab c"}).json
    assert plain == {"generated_text": ("ab c" * 25)}
    assert has(temperature=0.0, max_new_tokens=100)(place.engine.seen[-1])
    place.post(GENERATE, {"inputs": "ab c", "parameters": {"do_sample": True, "max_new_tokens": 1}})
    assert place.engine.seen[-1].sampling.temperature == 1.0 and place.engine.seen[-1].sampling.seed is not None


def test_tgi_streams(place: Place):
    body = {"inputs": "ab c", "parameters": {"max_new_tokens": 4, "top_n_tokens": 1}}
    replies = [place.post("/generate_stream", body), place.post(GENERATE, body | {"stream": True})]
    for reply in replies:
        assert reply.body.startswith(b'data:{"index":1,') and b"[DONE]" not in reply.body
        assert "".join(one["token"]["text"] for one in reply.events) == "ab c"
        assert [one["generated_text"] for one in reply.events] == [None, None, None, "ab c"]
        assert reply.events[-1]["details"] == {"finish_reason": "length", "generated_tokens": 4, "seed": None,
                                               "input_length": 4}  # fmt: skip
        assert reply.events[0]["top_tokens"] == [{"id": 0, "text": "!", "logprob": -1.0, "special": False}]


@pytest.mark.parametrize(
    ("body", "sentence"), [
        ({}, "inputs is missing"), ({"inputs": 5}, "inputs must be a text"), ({"inputs": ""}, "inputs is empty"),
        ({"inputs": "x", "prompt": "y"}, "prompt is not a field"), ({"inputs": "x", "parameters": []}, "an object"),
        *[({"inputs": "x", "parameters": {name: value}}, f"parameters.{name} is not supported by this server")
          for name, value in (("best_of", 2), ("typical_p", 0.5), ("truncate", 5), ("watermark", True),
                              ("grammar", {"type": "json"}))],
        *[({"inputs": "x", "parameters": {name: value}}, f"parameters.{name} must be")
          for name, value in (("max_new_tokens", 0), ("temperature", 0), ("top_k", 0), ("top_p", 0), ("seed", -1),
                              ("repetition_penalty", 0), ("stop", [""]), ("details", 1), ("top_n_tokens", 21))],
        ({"inputs": "x", "parameters": {"max_new_token": 3}}, "did you mean max_new_tokens?"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 128}}, "leave room for 127 of the 128 of max_new_tokens"),
        ({"inputs": "x", "stream": True, "parameters": {"decoder_input_details": True}}, "cannot be streamed"),
    ],
)  # fmt: skip
def test_tgi_refusals(place: Place, body: dict, sentence: str):
    refused(place.post(GENERATE, body), 400, sentence)
    refused(place.post("/generate_stream", body), 400, sentence)


@pytest.mark.parametrize(
    ("path", "body", "sentence"), [
        ("/tokenize", {}, "give either prompt or messages"), ("/tokenize", {"prompt": 5}, "prompt must be a text"),
        ("/tokenize", {"prompt": "x", "messages": []}, "messages must be"), ("/tokenize", {"text": "x"}, "not a field"),
        ("/detokenize", {}, "tokens is missing"), ("/detokenize", {"tokens": [400]}, "tokens holds 400"),
        ("/detokenize", {"tokens": [10**4000]}, "tokens holds 1000"),
        ("/detokenize", {"tokens": "x"}, "tokens must be a list"),
        ("/v1/embeddings", {"input": "x"}, "this server continues texts, and makes no embeddings"),
        ("/v1/responses", {"input": "x"}, "use /v1/chat/completions"),
    ],
)  # fmt: skip
def test_refusals_of_the_small_endpoints(place: Place, path: str, body: dict, sentence: str):
    refused(place.post(path, body), 400, sentence)


def test_models(place: Place):
    listed = place.get("/v1/models").json
    assert [one["id"] for one in listed["data"]] == ["tiny", "sql", "mute"] and listed["object"] == "list"
    tiny, sql, mute = listed["data"]
    assert tiny["max_model_len"] == 128 and tiny["step"] == 7 and tiny["recommended"] == {"temperature": 0.7}
    assert sql["parent"] == "tiny" and tiny["parent"] is None and (tiny["chat"], mute["chat"]) == (True, False)
    assert "may never have seen a conversation" in tiny["notes"][-1] and mute["notes"] == ["it has none"]
    assert place.get("/v1/models/sql").json == sql
    refused(place.get("/v1/models/other"), 404, "there is no model of this name")


def test_paths_and_methods(place: Place):
    refused(place.get("/v1/nothing"), 404, "there is no /v1/nothing")
    for method, path in (("GET", CHAT), ("DELETE", "/v1/models"), ("PUT", CHAT), ("OPTIONS", CHAT), ("POST", "/")):
        reply = place.begin(method, path, {} if method == "POST" else None).wait()
        refused(reply, 405, f"{method} is not a method of {path}")
        assert reply.headers["allow"]
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_the_page(place: Place):
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/app.css", "text/css")):
        reply = place.get(path)
        name = path.rpartition("/")[2] or "index.html"
        assert (reply.status, reply.body) == (200, f"this is {name}".encode())
        assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["cache-control"] == "no-cache"
        again = place.get(path, {"if-none-match": reply.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
    for name in ("secret.txt", "../outside.js", "..%2foutside.js", "/etc/passwd", ".js", "no.js", "a\x00.js",
                 "app.js/"):  # fmt: skip
        refused(place.get(f"/page/{name}"), 404)


def test_hosts_and_origins(place: Place, new_place: Callable[..., Place]):
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "proxy.example", "localhost.:80"):
        assert place.get("/health", {"host": host}).status == 200, host
    for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example", "8.8.8.8", "localhost:80:80",
                 "localhost:x", "[::1", "::1", "localhost@evil.example", "[127.0.0.1].evil.example"):  # fmt: skip
        refused(place.get("/health", {"host": host}), 403, "the Host header does not name this server")
    for origin, status in (("http://localhost:8000", 200), ("https://localhost:8000", 200), ("null", 403),
                           ("http://localhost:9000", 403), ("http://evil.example", 403), ("localhost:8000", 403),
                           ("file://localhost:8000", 403), ("http://localhost:8000.evil.example", 403)):  # fmt: skip
        assert place.begin("POST", "/tokenize", {"prompt": "x"}, {"origin": origin}).wait().status == status, origin
    # On all addresses, those in digits are right: no name can be pointed at them.
    everywhere = new_place(host="0.0.0.0")
    for host, status in (("192.168.1.5:8000", 200), ("[fe80::1]:8000", 200), ("evil.example", 403), ("0.0.0.0", 200)):
        assert everywhere.get("/health", {"host": host}).status == status, host


def test_content_types(place: Place):
    for kind, status in (("application/json", 200), ("Application/JSON; charset=UTF-8", 200), ("text/plain", 415),
                         ("", 415), ("application/x-www-form-urlencoded", 415), ("multipart/form-data", 415),
                         ("application/json; charset=utf-16", 415)):  # fmt: skip
        reply = place.begin("POST", "/tokenize", {"prompt": "x"}, {"content-type": kind}).wait()
        assert reply.status == status, kind
    refused(reply, 415, "with the header Content-Type: application/json")
    refused(place.begin("POST", "/tokenize", b"x", {"content-encoding": "gzip"}).wait(), 415, "uncompressed")


def test_keys(new_place: Callable[..., Place], tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# mine\nsecret-key-number-one\n\nsecret-key-number-two\n")
    file.chmod(0o600)
    place = new_place(keys=read_keys(file))
    for key in ("secret-key-number-one", "secret-key-number-two"):
        for scheme in ("Bearer", "bearer"):
            assert place.get("/v1/models", {"authorization": f"{scheme} {key}"}).status == 200
    wrong = ("", "Bearer", "Bearer ", "Basic secret-key-number-one", "secret-key-number-one",
             "Bearer secret-key-number-", "Bearer # mine", "Bearer \xff", "Bearer secret-key-number-one x")  # fmt: skip
    for path in ("/v1/models", "/metrics", "/nothing"):
        for header in wrong:
            reply = place.get(path, {"authorization": header})
            refused(reply, 401)
            assert reply.headers["www-authenticate"] == "Bearer"
    for path in (CHAT, COMPLETIONS, GENERATE, "/tokenize"):
        refused(place.post(path, {}), 401, "an API key is needed")
    assert [place.get(path).status for path in ("/", "/page/app.js", "/health")] == [200] * 3
    assert not [line for line in place.log if "secret" in line]


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "holds no key"), (b"# only\n", "holds no key"), (b"short\n", "line 1: a key has at least 16 characters"),
    (b"a key with blanks in it\n", "no blanks"), ("schl\u00fcsselschl\u00fcssel".encode(), "keys are ASCII"),
    (b"x" * (2 << 20), "larger than"), (None, "No such file"),
])  # fmt: skip
def test_files_that_hold_no_keys(tmp_path: Path, content: bytes | None, sentence: str):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_keys(tmp_path / "keys")
    assert "schl" not in str(error.value) and "blanks in" not in str(error.value)


def test_large_and_slow_bodies(new_place: Callable[..., Place]):
    place = new_place(max_body=1000, body_timeout_s=0.1)
    refused(place.post(CHAT, b" " * 1001), 413, "larger than 1,000 bytes")
    refused(place.begin("POST", CHAT, b"{}", {"content-length": "1001"}).wait(), 413)
    refused(place.begin("POST", CHAT, b"{}", {"content-length": "9" * 400}).wait(), 413)
    refused(place.begin("POST", CHAT, parts=[b" " * 600, b" " * 600]).wait(), 413)
    slow = place.begin("POST", CHAT, parts=[])
    refused(slow.wait(), 408, "did not come within 0.1 s")
    leaving = place.begin("POST", CHAT, parts=[])
    leaving.leave()
    leaving.wait()


def test_a_client_that_leaves_is_forgotten(new_place: Callable[..., Place]):
    place = new_place()
    for stream in (False, True):
        place.engine.gate.clear()
        exchange = place.begin("POST", CHAT, ASKED | {"stream": stream, "n": 3})
        place.wait_for(lambda: place.engine.open)
        exchange.leave()
        exchange.wait()
        place.engine.gate.set()
        place.wait_for(lambda: not place.engine.open)
        assert len(place.engine.cancelled) == 1 + stream and place.service.open == 0
        assert place.generation.leases == 0


def test_a_reader_that_takes_nothing_does_not_hold_up_others(new_place: Callable[..., Place]):
    place = new_place(stall_timeout_s=0.3)
    place.engine.gate.clear()
    slow = place.begin("POST", COMPLETIONS, CONTINUED | {"stream": True, "max_tokens": 100})
    place.wait_for(lambda: place.engine.open)
    slow.read(False)
    place.engine.gate.set()
    assert place.post(COMPLETIONS, CONTINUED).json["choices"][0]["text"] == "ab "
    reply = slow.wait()
    assert reply.status == 200 and not reply.is_complete and place.service.open == 0


def test_a_full_queue(new_place: Callable[..., Place]):
    place = new_place(most_open=4)
    place.engine.gate.clear()
    waiting = [place.begin("POST", CHAT, ASKED | {"n": 2}) for _ in range(2)]
    place.wait_for(lambda: place.service.open == 4)
    reply = place.post(COMPLETIONS, CONTINUED)
    refused(reply, 429, "too many requests wait already")
    assert int(reply.headers["retry-after"]) > 0
    refused(place.post(CHAT, ASKED | {"n": 5}), 400, "more than the 4 that this server takes")
    place.engine.gate.set()
    assert [one.wait().status for one in waiting] == [200, 200]
    assert place.post(COMPLETIONS, CONTINUED).status == 200 and place.service.open == 0
    # Those that were refused have no time, or the quantiles of the times would say that the server is fast.
    told = place.get("/metrics").body
    assert b"zero2all_request_duration_seconds_count 3.0" in told and b'finish="cancelled"' not in told


def test_the_time_of_an_answer(new_place: Callable[..., Place]):
    place = new_place(request_timeout_s=0.2)
    place.engine.gate.clear()
    events = place.post(CHAT, ASKED | {"stream": True}).events
    assert "took more than 0.2 s" in events[-2]["error"]["message"] and events[-1] == "[DONE]"
    # The engine is busy, and has not even taken the second one.
    for body in (ASKED, ASKED | {"stream": True}):
        reply = place.post(CHAT, body)
        refused(reply, 503, "the answer took more than 0.2 s")
        assert reply.headers["x-should-retry"] == "false"
    place.engine.gate.set()
    place.wait_for(lambda: place.engine.cancelled and not place.engine.open)
    assert len(place.engine.cancelled) == len(place.engine.seen) == 1
    assert place.post(CHAT, ASKED).status == 200


def test_a_fault_of_the_engine(new_place: Callable[..., Place]):
    """Those who wait hear of it, others are served after it; an engine that always fails ends the service."""
    place = new_place()
    place.engine.fails = RuntimeError("secret details")
    reply = place.post(CHAT, ASKED)
    refused(reply, 500, "the engine failed (RuntimeError)")
    assert b"secret" not in reply.body and not place.engine.open
    place.engine.fails = None
    assert place.post(CHAT, ASKED).status == 200 and place.get("/health").json == {"status": "ok"}
    place.engine.fails = RuntimeError("again")
    events = place.post(CHAT, ASKED | {"stream": True}).events
    assert "the engine failed" in events[-2]["error"]["message"]
    for _ in range(2):
        refused(place.post(COMPLETIONS, CONTINUED), 500)
    refused(place.post(COMPLETIONS, CONTINUED), 503, "must be started again")
    assert b'zero2all_choices_total{finish="error"} 4.0' in place.get("/metrics").body
    assert place.get("/health").status == 503


def test_a_device_that_fails_for_good_ends_the_service(new_place: Callable[..., Place]):
    place = new_place()
    place.generation.loss = lambda: "the device" if place.engine.fails else ""
    assert place.post(CHAT, ASKED).status == 200 and not place.service.lost.is_set()
    place.engine.fails = RuntimeError("CUDA error: device-side assert triggered")
    refused(place.post(CHAT, ASKED), 500)
    place.wait_for(lambda: place.get("/health").status == 503)
    place.wait_for(place.service.lost.is_set)
    refused(place.post(CHAT, ASKED), 503, "the device cannot go on; the server must be started again")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_died_is_told(new_place: Callable[..., Place]):
    place = new_place()
    place.engine.fails = SystemExit()
    running = place.begin("POST", CHAT, ASKED)
    place.wait_for(lambda: place.get("/health").status == 503)
    assert place.get("/health").json["reason"] == "the engine's thread has ended; the server must be started again"
    refused(place.post(CHAT, ASKED), 503, "the engine's thread has ended")
    running.leave()


def test_a_step_that_hangs_is_told(new_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch):
    """Until it ends."""
    place, ends = new_place(), threading.Event()
    step = place.engine.step
    monkeypatch.setattr(place.engine, "step", lambda: ends.wait(20) and step())
    monkeypatch.setattr(place.service, "_step_timeout_s", 0.2)
    running = place.begin("POST", CHAT, ASKED)
    place.wait_for(lambda: place.engine.open)
    assert place.get("/health").status == 200
    place.wait_for(lambda: place.get("/health").status == 503)
    assert "a step of the engine has been running for 0 s: it may hang" in place.get("/health").json["reason"]
    ends.set()
    assert running.wait().status == 200 and place.get("/health").status == 200


def test_what_the_engine_refuses_is_a_sentence(place: Place, monkeypatch: pytest.MonkeyPatch):
    def refuse(request: Any) -> None:
        raise ValueError("the cache has no room for it")

    monkeypatch.setattr(place.engine, "submit", refuse)
    refused(place.post(CHAT, ASKED), 400, "the cache has no room for it")
    refused(place.post(CHAT, ASKED | {"stream": True}), 400, "the cache has no room for it")

    def fail(request: Any) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(place.engine, "submit", fail)
    refused(place.post(CHAT, ASKED), 500, "the server failed: its log says more")
    monkeypatch.undo()
    assert place.post(CHAT, ASKED).status == 200


def test_the_end(new_place: Callable[..., Place]):
    """What runs is finished, what is new refused."""
    place = new_place()
    place.engine.gate.clear()
    running = place.begin("POST", CHAT, ASKED)
    place.wait_for(lambda: place.engine.open)
    place.client.loop.call_soon_threadsafe(place.service.end)
    place.wait_for(lambda: place.get("/health").status == 503)
    refused(place.post(CHAT, ASKED), 503, "the server is ending")
    refused(place.post("/tokenize", {"prompt": "x"}), 503, "the server is ending")
    assert not place.service._ended.is_set()
    place.engine.gate.set()
    assert running.wait().json["choices"][0]["finish_reason"] == "length"
    place.client.run(place.service.ended())


def test_another_model_takes_over(new_place: Callable[..., Place], tokenizer: Tokenizer):
    """Requests under way keep theirs, which leaves with the last of them."""
    place = new_place()
    place.engine.gate.clear()
    old = place.begin("POST", CHAT, ASKED)
    place.wait_for(lambda: place.engine.open)
    newer = Generation(FakeEngine(tokenizer), place.generation.catalog, "step-8")
    place.service.replace(newer)
    place.wait_for(lambda: place.service.current is newer)
    young = place.begin("POST", CHAT, ASKED)
    assert place.service.has_old
    place.engine.gate.set()
    assert old.wait().json["system_fingerprint"] == "step-7"
    assert young.wait().json["system_fingerprint"] == "step-8"
    place.wait_for(lambda: not place.service.has_old)
    # Counts go on.
    assert place.service.stats().new_tokens == 6 and newer.engine.new_tokens == 3


def test_metrics(new_place: Callable[..., Place]):
    parser = pytest.importorskip("prometheus_client.parser")
    place = new_place()
    place.post(CHAT, ASKED | {"n": 2})
    place.post(CHAT, ASKED | {"tools": [1]})
    place.get("/some/name/that/nobody/should/count")
    place.get("/page/app.js")
    reply = place.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {(sample.name, *sample.labels.values()): sample.value
             for family in parser.text_string_to_metric_families(reply.body.decode())
             for sample in family.samples}  # fmt: skip
    for key, value in {
        ("zero2all_new_tokens_total",): 6, ("zero2all_open_choices",): 0, ("zero2all_blocks",): 8,
        ("zero2all_http_requests_total", CHAT, "200"): 1, ("zero2all_http_requests_total", CHAT, "400"): 1,
        ("zero2all_http_requests_total", "other", "404"): 1, ("zero2all_http_requests_total", "/page", "200"): 1,
        ("zero2all_choices_total", "length"): 2, ("zero2all_time_to_first_token_seconds_count",): 1,
        ("zero2all_request_duration_seconds_count",): 1, ("zero2all_answer_tokens_sum",): 6,
    }.items():  # fmt: skip
        assert found[key] == value, key


def test_lines_of_the_log(place: Place):
    del place.log[:]
    place.get("/v1/models/tiny?key=secret", {"authorization": "Bearer secret"})
    place.post(CHAT, ASKED | {"user": "secret"})
    place.wait_for(lambda: len(place.log) == 2)
    assert "secret" not in json.dumps(place.log) and place.log[1].startswith(f"POST {CHAT} 200 ")

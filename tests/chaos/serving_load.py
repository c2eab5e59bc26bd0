"""Many clients at once, of every kind, against a real server with a cache that is too small for them.

    python -m tests.chaos.serving_load --requests 1000 --clients 64

A third leaves at a random moment, some read a byte at a time, some send what is no request. At the end, every request
has an answer or an error, nothing is running, waiting or in use, and answers with a seed are those of the same request
asked alone.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.serving_bodies import CHAT, COMPLETIONS, GENERATE, STREAM, bodies, problem
from tests.served import BLOCK_GB, Answer, Left, Server, exchange, tiny_tokenizer, write_model

_WORDS = ("once upon a time the model said that 漢字 naïve 🙂 def return import self == [1, 2] \n\n  x = 3 "
          "# end").split(" ")
_OPENINGS = ("", "the quick brown fox jumps over the lazy dog and " * 2, "def answer(question):\n    return " * 2)
"""Beginnings that prompts share, so that blocks are shared, too."""
_PATIENCE_S = 240.0
_SHARE_LEAVING, _SHARE_SLOW, _SHARE_BAD = 1 / 3, 0.05, 0.08
_SLOW_BYTES = 40
_MOST_RETRIES = 200
_PARTS = 5


@dataclass
class Asked:
    """A request of the load, and what became of it."""

    number: int
    path: str
    content: Any
    headers: dict[str, str] = field(default_factory=dict)
    is_bad: bool = False
    """Whether it is no proper request."""
    leave_after: float | None = None
    slow_bytes: int = 0
    answer: Answer = field(default_factory=Answer)
    outcome: str = ""
    """Empty: it was lost."""
    retries: int = 0

    @property
    def is_stream(self) -> bool:
        return not self.is_bad and (self.path == STREAM or bool(self.content.get("stream")))


def requests_of(seed: int, count: int, sentence: str = "") -> list[Asked]:
    """Requests of a load; the same ones for the same seed."""
    rng = random.Random(seed)
    malformed = iter(bodies(seed, count))
    found = []
    for number in range(count):
        if rng.random() < _SHARE_BAD:
            bad = next(malformed)
            # What contradicts itself on the wire is another test's: tests/unit/test_serving_wire.py.
            while {"content-length", "expect", "host"} & bad.headers.keys() or "\xff" in "".join(bad.headers.values()):
                bad = next(malformed)
            found.append(Asked(number, bad.path, bad.content, dict(bad.headers), is_bad=True))
            continue
        path = rng.choice((CHAT, CHAT, COMPLETIONS, COMPLETIONS, GENERATE, STREAM))
        asked = Asked(number, path, _content(rng, path))
        kind = rng.random()
        if kind < _SHARE_LEAVING:
            # From before the answer begins to after its end.
            asked.leave_after = rng.choice((0.0, 0.01, 0.1, 0.5, 2.0)) * rng.random()
        elif kind < _SHARE_LEAVING + _SHARE_SLOW:
            asked.slow_bytes = _SLOW_BYTES
        found.append(asked)
    return found


def _text(rng: random.Random) -> str:
    return rng.choice(_OPENINGS) + "so " + " ".join(rng.choices(_WORDS, k=rng.choice((1, 3, 10, 20))))


def _content(rng: random.Random, path: str) -> dict:
    most = rng.choice((1, 4, 16, 48))
    drawn: dict[str, Any] = {"seed": rng.randrange(1 << 31)}
    for name, values in (("temperature", (0, 0.3, 1.0, 1.7)), ("top_p", (0.5, 0.95)), ("top_k", (1, 20)),
                         ("frequency_penalty", (0.5,)), ("repetition_penalty", (1.3,))):  # fmt: skip
        if rng.random() < 0.4:
            drawn[name] = rng.choice(values)
    if rng.random() < 0.3:
        drawn["stop"] = rng.sample(("e", "\n", " the", "on"), 2)
    if path in (GENERATE, STREAM):
        drawn = {name: value for name, value in drawn.items() if value != 0}
        return {"inputs": _text(rng), "parameters": drawn | {"max_new_tokens": most, "details": True}}
    for name, values in (("presence_penalty", (0.4,)), ("min_p", (0.05,)), ("logit_bias", ({"40": 5, "41": -100},)),
                         ("ignore_eos", (True,)), ("min_tokens", (1,)), ("n", (2, 3))):  # fmt: skip
        if rng.random() < 0.25:
            drawn[name] = rng.choice(values)
    if rng.random() < 0.1:
        # Each beam needs blocks of its own, and what is told of single tokens cannot be told of beams.
        drawn, most = {name: value for name, value in drawn.items() if name != "stop"} | {"num_beams": 4}, min(most, 16)
    has_logprobs = "num_beams" not in drawn and rng.random() < 0.3
    drawn |= {"max_tokens": most, "return_token_ids": True, "stream": rng.random() < 0.5}
    if path == CHAT:
        said = [{"role": "user" if turn % 2 == 0 else "assistant", "content": _text(rng)[:60]}
                for turn in range(rng.choice((1, 1, 3)))]  # fmt: skip
        return drawn | {"messages": said} | ({"logprobs": True, "top_logprobs": 3} if has_logprobs else {})
    prompt = rng.choice((_text(rng), [_text(rng)[:80], _text(rng)[:80]], [rng.randrange(256) for _ in range(30)]))
    return drawn | {"prompt": prompt} | ({"logprobs": 2} if has_logprobs else {})


class Text(NamedTuple):
    """One text of an answer."""

    text: str
    ids: tuple[int, ...]
    finish: str


def texts_of(asked: Asked, answer: Answer) -> dict[int, Text]:
    """Texts of an answer by their numbers, whichever way it was told.

    Raises:
        AssertionError: the answer is not as it should be.
    """
    if asked.path in (GENERATE, STREAM):
        return {0: _of_tgi(asked, answer)}
    if not asked.is_stream:
        key = (lambda one: one["message"]["content"]) if asked.path == CHAT else (lambda one: one["text"])
        return {one["index"]: Text(key(one), tuple(one["token_ids"]), one["finish_reason"])
                for one in answer.json["choices"]}  # fmt: skip
    assert answer.events[-1] == "[DONE]", "the stream has no end"
    found: dict[int, Text] = {}
    for event in answer.events[:-1]:
        assert "error" not in event, event
        for one in event["choices"]:
            before = found.get(one["index"], Text("", (), ""))
            assert not before.finish, "something follows the end of a text"
            new = one["delta"].get("content", "") if asked.path == CHAT else one["text"]
            found[one["index"]] = Text(
                before.text + new, before.ids + tuple(one.get("token_ids") or ()), one["finish_reason"] or ""
            )
    return found


def _of_tgi(asked: Asked, answer: Answer) -> Text:
    if asked.path == GENERATE:
        told = answer.json
        ids = tuple(one["id"] for one in told["details"]["tokens"])
        assert len(ids) == told["details"]["generated_tokens"]
        return Text(told["generated_text"], ids, told["details"]["finish_reason"])
    assert all("error" not in one for one in answer.events), answer.events[-1]
    end = answer.events[-1]
    joined = "".join(one["token"]["text"] for one in answer.events)
    assert joined == end["generated_text"], "the tokens' texts are not the whole"
    ids = tuple(one["token"]["id"] for one in answer.events)[: end["details"]["generated_tokens"]]
    return Text(joined, ids, end["details"]["finish_reason"])


def check_answer(asked: Asked, answer: Answer) -> None:
    """
    Raises:
        AssertionError: the answer is not one of this request.
    """
    if asked.is_bad or answer.status >= 400:
        assert not (wrong := problem(answer.status, answer.body)), wrong
        assert asked.is_bad, f"a proper request was refused: {answer.body!r}"
        return
    texts = texts_of(asked, answer)
    content = asked.content
    if asked.path in (GENERATE, STREAM):
        count, most, reasons = 1, content["parameters"]["max_new_tokens"], {"length", "eos_token", "stop_sequence"}
    else:
        prompts = content["prompt"] if asked.path == COMPLETIONS else ""
        several = len(prompts) if isinstance(prompts, list) and isinstance(prompts[0], str) else 1
        count, most, reasons = several * content.get("n", 1), content["max_tokens"], {"length", "stop"}
    assert sorted(texts) == list(range(count)), f"texts {sorted(texts)} instead of {count}"
    for text in texts.values():
        assert text.finish in reasons and len(text.ids) <= most, text
        assert text.finish != "length" or len(text.ids) == most, text


async def ask(port: int, asked: Asked) -> None:
    """Ask until there is an answer, an error or nobody who waits."""
    while True:
        asked.answer = Answer()
        try:
            await exchange(port, asked.path, asked.content, asked.headers, leave_after=asked.leave_after,
                           slow_bytes=asked.slow_bytes, answer=asked.answer, patience=_PATIENCE_S)  # fmt: skip
        except Left:
            asked.outcome = "left"
            return
        if asked.answer.status != 429 or asked.retries == _MOST_RETRIES:
            break
        asked.retries += 1
        await asyncio.sleep(0.05 + 0.1 * random.random())
    check_answer(asked, asked.answer)
    asked.outcome = "refused" if asked.answer.status >= 400 else "answered"


async def load(port: int, requests: Sequence[Asked], clients: int) -> list[str]:
    """Ask all, with so many clients at once; returns what went wrong."""
    waiting = list(reversed(requests))
    faults: list[str] = []

    async def client() -> None:
        while waiting:
            asked = waiting.pop()
            try:
                await ask(port, asked)
            except Exception as error:
                # Each is told with its request, and the others go on.
                faults.append(f"request {asked.number} to {asked.path}: {type(error).__name__}: {error}\n"
                              f"    {str(asked.content)[:400]}")  # fmt: skip

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return faults


async def asked_alone(port: int, requests: Sequence[Asked]) -> list[str]:
    """Ask requests again, one after another and not as streams; returns where the answers differ."""
    faults = []
    for asked in requests:
        content = asked.content if asked.path in (GENERATE, STREAM) else asked.content | {"stream": False}
        again = Asked(asked.number, GENERATE if asked.path == STREAM else asked.path, content)
        await ask(port, again)
        before, now = texts_of(asked, asked.answer), texts_of(again, again.answer)
        if before != now:
            faults.append(f"request {asked.number} to {asked.path} has another answer alone: {before} and {now}\n"
                          f"    {str(asked.content)[:400]}")  # fmt: skip
    return faults


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def table(requests: Sequence[Asked]) -> str:
    """Times in Markdown."""
    rows = ["| requests | count | p50 | p99 |", "|---|---|---|---|"]

    def row(name: str, values: list[float]) -> None:
        if values:
            rows.append(f"| {name} | {len(values)} | {quantile(values, 0.5):.3f} s | {quantile(values, 0.99):.3f} s |")

    done = [one for one in requests if one.outcome == "answered" and not one.is_bad and not one.slow_bytes]
    streams = [one for one in done if one.is_stream]
    row("streams, to the first token", [one.answer.first_at - one.answer.began for one in streams])
    row("streams, to the end", [one.answer.ended_at - one.answer.began for one in streams])
    row("whole answers", [one.answer.ended_at - one.answer.began for one in done if not one.is_stream])
    row("refused", [one.answer.ended_at - one.answer.began for one in requests if one.outcome == "refused"])
    return "\n".join(rows)


class Report(NamedTuple):
    """What a load has shown."""

    faults: list[str]
    outcomes: Counter
    figures: dict[str, float]
    sizes_mb: list[float]
    """Memory of the process after each part, 10^6 bytes."""
    table: str
    seconds: float


async def run(server: Server, count: int, clients: int, seed: int, num_alone: int = 100) -> Report:
    """A load in parts, with a look at what is left after each."""
    requests = requests_of(seed, count)
    began, faults, sizes = time.monotonic(), [], []
    for part in range(_PARTS):
        faults += await load(server.port, requests[part * count // _PARTS : (part + 1) * count // _PARTS], clients)
        await server.idle()
        sizes.append(server.resident_mb)
    seconds = time.monotonic() - began
    comparable = [one for one in requests if one.outcome == "answered" and not one.is_bad]
    faults += await asked_alone(server.port, comparable[:: max(1, len(comparable) // num_alone)])
    lost = [one.number for one in requests if not one.outcome]
    if lost and not faults:
        faults.append(f"requests {lost} were lost")
    figures = await server.idle()
    outcomes = Counter(one.outcome or "lost" for one in requests)
    outcomes["tried again after 429"] = sum(one.retries for one in requests)
    return Report(faults, outcomes, figures, sizes, table(requests), seconds)


def flags(blocks: int, max_running: int, max_queue: int) -> list[str]:
    """Flags of a server whose cache has so many blocks of 16 tokens."""
    return [f"--cache_gb={(blocks + 0.5) * BLOCK_GB:.9f}", f"--max_running={max_running}", f"--max_queue={max_queue}",
            "--batch_invariant", "--served_model_name=tiny"]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=48, help="of the cache, 16 tokens each")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as home:
        folder = write_model(Path(home) / "tiny", tiny_tokenizer())
        with Server(folder, Path(home) / "log", flags(args.blocks, 32, 64)) as server:
            report = asyncio.run(run(server, args.requests, args.clients, args.seed))
    print(report.table, end="\n\n")
    print(json.dumps({"seconds": round(report.seconds, 1), "outcomes": report.outcomes, "server": report.figures,
                      "sizes_mb": [round(one) for one in report.sizes_mb]}, indent=1))  # fmt: skip
    for fault in report.faults:
        print(fault)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())

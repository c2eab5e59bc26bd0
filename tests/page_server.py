"""A server without a model, for the chat page: it says what a test tells it to, token by token, when the test lets it.

It speaks as serving/api.py does, as far as the page asks; `tests/unit/test_page.py` also runs the page against that.
"""

import json
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "serving" / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Reply:
    """One answer.

    Attributes:
        text: what is said, or its tokens.
        hold_after: tokens after which it waits for the server's `gate`; None: none.
        cut_after: tokens after which the connection breaks; None: never.
        status: an HTTP status other than 200 refuses the request with `error` and `code`; with 200, `error` ends the
            stream.
        probability: of each token, by its number; the alternatives share the rest.
        others: alternatives of each token; None: made up.
    """

    text: str | list[str] = "Hello!"
    hold_after: int | None = None
    cut_after: int | None = None
    status: int = 200
    error: str = ""
    code: str | None = None
    finish: str = "stop"
    probability: Callable[[int], float] = lambda number: (0.97, 0.4, 0.8, 0.08)[number % 4]
    others: Callable[[str, int], list[tuple[str, float]]] | None = None
    seconds: float = 0.0
    """Between two tokens."""
    rate: float = 31.4
    headers: dict[str, str] = field(default_factory=dict)

    def tokens(self) -> list[str]:
        return tokens_of(self.text) if isinstance(self.text, str) else self.text

    def score(self, token: str, number: int) -> dict:
        own = self.probability(number)
        if self.others:
            likely = self.others(token, number)
        else:
            rest = [(f" other{n}", (1 - own) / 2 ** (n + 1)) for n in range(5)]
            likely = sorted([(token, own), *rest], key=lambda one: -one[1])[:5]
        entry = lambda text, p: {"token": text, "logprob": math.log(p), "bytes": None, "id": token_id(text)}  # noqa: E731
        return entry(token, own) | {"top_logprobs": [entry(*one) for one in likely]}


def tokens_of(text: str) -> list[str]:
    return re.findall(r" ?[A-Za-z]{1,6}|\d|\n+|.", text)


def token_id(text: str) -> int:
    return sum(ord(character) * (place + 1) for place, character in enumerate(text)) % 50000


def prompt_tokens(body: dict[str, Any]) -> list[dict]:
    if "prompt" in body:
        return [{"id": token_id(one), "text": one, "is_control": False} for one in tokens_of(body["prompt"])]
    found = []

    def add(text: str, is_control: bool = False) -> None:
        found.append({"id": token_id(text), "text": text, "is_control": is_control})

    for message in [*body["messages"], None]:
        add("<|im_start|>", True)
        for one in tokens_of(f"{message['role']}\n{message['content']}" if message else "assistant\n"):
            add(one)
        if message:
            add("<|im_end|>", True)
            add("\n")
    return found


def problem(sentence: str, code: str | None = None) -> dict:
    return {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": code}}


def model(name: str, chat: bool = True, **more: Any) -> dict:
    return {
        "id": name, "object": "model", "created": 1, "owned_by": "zero2all", "max_model_len": 1024, "parent": None,
        "step": None, "chat": chat, "notes": [], "recommended": {}, **more,
    }  # fmt: skip


class PageServer:
    """Serves on a port of the system's choice until `close`.

    Attributes:
        replies: what is said next; with none left, "You said: " and the last message.
        seen: bodies of the requests for an answer.
        gone: number of answers whose client left.
        key: API key that is asked for; None: none.
    """

    def __init__(self, models: Iterable[dict] = ()):
        self.models = list(models) or [model("tiny")]
        self.replies: deque[Reply] = deque()
        self.seen: list[dict] = []
        self.gone, self.key = 0, None
        self.gate = threading.Event()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()

    def reset(self) -> None:
        """As new, on the same port."""
        self.gate.set()
        self.gate = threading.Event()
        self.replies.clear()
        self.seen.clear()
        self.gone, self.key, self.models = 0, None, [model("tiny")]


class _Handler(BaseHTTPRequestHandler):
    server_state: PageServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self._lets_in():
                self._json({"object": "list", "data": self.server_state.models})
            return
        file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        if file.parent != PAGE or not file.is_file():
            self._json(problem(f"there is no {path}"), 404)
            return
        self._send(file.read_bytes(), KINDS[file.suffix],
                   {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})  # fmt: skip

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._lets_in():
            return
        if self.path == "/tokenize":
            tokens = prompt_tokens(body)
            ids = [one["id"] for one in tokens]
            self._json({"count": len(tokens), "max_model_len": 1024, "tokens": ids, "prompt": tokens})
            return
        state = self.server_state
        state.seen.append(body)
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        reply = state.replies.popleft() if state.replies else Reply(f"You said: {said}")
        if reply.status != 200:
            self._json(problem(reply.error, reply.code), reply.status, reply.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(body, reply)
        except OSError:
            state.gone += 1
        self.close_connection = True

    def _stream(self, body: dict, reply: Reply) -> None:
        is_chat, gate = "messages" in body, self.server_state.gate
        if is_chat:
            first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            self._event({"choices": [first], "prompt": prompt_tokens(body)})
        tokens = reply.tokens()
        for number, token in enumerate(tokens):
            if number == reply.hold_after:
                # Comments keep the connection alive, and tell whether the client is still there.
                while not gate.wait(0.02):
                    self._write(": waiting\n\n")
            if number == reply.cut_after:
                self.wfile.flush()
                self.connection.close()
                return
            gate.wait(reply.seconds) if reply.seconds else None
            self._event({"choices": [self._choice(is_chat, token, reply.score(token, number))]})
        if reply.error:
            self._event(problem(reply.error))
        else:
            last = {"delta": {}} if is_chat else {"text": ""}
            self._event({"choices": [{"index": 0, **last, "logprobs": None, "finish_reason": reply.finish}]})
            before, new = len(prompt_tokens(body)), len(tokens)
            self._event({
                "choices": [],
                "usage": {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new},
                "timings": {"first_token_s": 0.05, "total_s": 1.0, "tokens_per_second": reply.rate},
            })  # fmt: skip
        self._write("data: [DONE]\n\n")

    def _choice(self, is_chat: bool, token: str, score: dict) -> dict:
        head = {"index": 0, "finish_reason": None, "token_ids": [score["id"]]}
        if is_chat:
            return head | {"delta": {"content": token}, "logprobs": {"content": [score], "refusal": None}}
        top = {one["token"]: one["logprob"] for one in score["top_logprobs"]} | {token: score["logprob"]}
        logprobs = {"tokens": [token], "token_logprobs": [score["logprob"]], "top_logprobs": [top], "text_offset": [0]}
        return head | {"text": token, "logprobs": logprobs}

    def _lets_in(self) -> bool:
        key = self.server_state.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._json(problem("give an API key"), 401)
        return False

    def _event(self, event: dict) -> None:
        self._write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), "application/json", headers or {}, status)

    def _send(self, content: bytes, kind: str, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

"""An ASGI application in this process, as its clients see it."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

_PATIENCE_S = 60


@dataclass
class Reply:
    """An answer, as far as it has come."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """JSON of the lines `data:`; the last one may be a word."""
        found = [line.removeprefix("data:").strip() for line in self.body.decode().split("\n") if line[:5] == "data:"]
        return [one if one == "[DONE]" else json.loads(one) for one in found]


class Exchange:
    """A request under way. `leave` is what the server sees when the client closes the connection."""

    def __init__(self, client: "Client", scope: dict, body: list[bytes]):
        self.reply, self._client, self._body = Reply(), client, body
        self._gone, self.may_read = asyncio.Event(), asyncio.Event()
        self.may_read.set()
        self._task = asyncio.ensure_future(client.app(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if self._body:
            part = self._body.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._body)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        await self.may_read.wait()
        if message["type"] == "http.response.start":
            self.reply.status = message["status"]
            self.reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.reply.body += message.get("body", b"")
            self.reply.is_complete = not message.get("more_body", False)

    def leave(self) -> None:
        self._client.loop.call_soon_threadsafe(self._gone.set)

    def read(self, goes_on: bool) -> None:
        """Take what comes, or nothing from now on."""
        self._client.loop.call_soon_threadsafe(self.may_read.set if goes_on else self.may_read.clear)

    def wait(self) -> Reply:
        """Wait for the end."""
        async def end() -> None:
            await asyncio.wait_for(asyncio.shield(self._task), _PATIENCE_S)

        self._client.run(end())
        return self.reply


class Client:
    """Sends requests to an application, which lives in an event loop of its own thread.

    Args:
        build: makes the application, in that loop.
    """

    def __init__(self, build: Callable[[], Any]):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

        async def make() -> Any:
            return build()

        self.app = self.run(make())

    def run(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(_PATIENCE_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_PATIENCE_S)
        self.loop.close()

    def begin(
        self, method: str, path: str, content: Any = None, headers: dict[str, str] | None = None,
        parts: list[bytes] | None = None,
    ) -> Exchange:  # fmt: skip
        """Send a request.

        Args:
            content: bytes, or a value to send as JSON.
            headers: besides or instead of the usual ones.
            parts: the body in pieces.
        """
        body = content if isinstance(content, bytes) else json.dumps(content).encode() if content is not None else b""
        all_headers = {"host": "localhost:8000"} | ({"content-type": "application/json"} if method == "POST" else {})
        all_headers |= {name.lower(): value for name, value in (headers or {}).items()}
        lines = [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items() if value]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "headers": lines, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip

        async def start() -> Exchange:
            return Exchange(self, scope, parts if parts is not None else [body])

        return self.run(start())

    def post(self, path: str, content: Any, headers: dict[str, str] | None = None) -> Reply:
        return self.begin("POST", path, content, headers).wait()

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return self.begin("GET", path, None, headers).wait()

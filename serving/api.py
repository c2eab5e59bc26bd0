"""The server as an ASGI application: which path answers what, and how an answer leaves.

    bytes -> limits.py -> openai_api.py, tgi_api.py: Job -> service.py -> Job -> bytes
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serving import openai_api, tgi_api
from serving.answers import Job
from serving.catalog import Catalog
from serving.fields import Mistake, parse_body
from serving.limits import Gate, Hosts, Keys, Limits, Receive, Scope, Send
from serving.metrics import CONTENT_TYPE, Metrics
from serving.requests import Piece
from serving.service import Answer, Service

logger = logging.getLogger(__name__)

PAGE = Path(__file__).resolve().parent / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
    ".json": "application/json", ".webmanifest": "application/manifest+json",
}  # fmt: skip
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked again each time: a new version of the server has a new page.
    "Cache-Control": "no-cache",
}
_JSON_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_SIGN_OF_LIFE_S = 15.0
"""So often a stream that has nothing to tell says so, for the sake of proxies."""

Read = Callable[[Mapping[str, Any], Catalog, "str | None", Limits], Job]
"""Body, models, fingerprint, limits -> what to do."""


def told(mistake: Mistake) -> JSONResponse:
    """A mistake as an answer."""
    # Another try of the same request would end the same way, whatever a client thinks of its status.
    retry = {} if mistake.status in (429, 503) and mistake.code != "timeout" else {"X-Should-Retry": "false"}
    return JSONResponse(mistake.as_json(), mistake.status, _JSON_HEADERS | retry | mistake.headers)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


class Generating(Response):
    """An answer that the engine makes while it is sent. Its maker's work ends with the client's connection.

    Args:
        read: turns the request's body into the work.
        parse: runs a function in a thread for long computations.
    """

    def __init__(self, service: Service, limits: Limits, metrics: Metrics, read: Read, parse: ThreadPoolExecutor):
        self._service, self._limits, self._metrics, self._read, self._parse = service, limits, metrics, read, parse
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(scope["body"], send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except _Stalled:
            logger.warning("a client took nothing for %g s: its request has ended", self._limits.stall_timeout_s)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, body: bytes, send: Send) -> None:
        began, loop = time.monotonic(), asyncio.get_running_loop()
        deadline = loop.time() + self._limits.request_timeout_s
        with self._service.lease() as generation:
            job = await loop.run_in_executor(
                self._parse, lambda: self._read(parse_body(body), generation.catalog, generation.fingerprint,
                                                self._limits)
            )  # fmt: skip
            job.began = job.last_token_at = began
            async with AsyncExitStack() as stack:
                with self._in_time():
                    async with asyncio.timeout_at(deadline):
                        answer = await stack.enter_async_context(self._service.answer(generation, job.requests))
                # From here on: a request that is refused has no times and no texts to count.
                stack.callback(self._count, job)
                await (self._stream if job.is_stream else self._whole)(job, answer, deadline, send)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """
        Raises:
            Mistake: what is done in the context has run into the deadline.
        """
        try:
            yield
        except TimeoutError:
            raise Mistake(f"the answer took more than {self._limits.request_timeout_s:g} s, the limit of this server: "
                          f"ask for fewer tokens", code="timeout", status=503) from None  # fmt: skip

    def _count(self, job: Job) -> None:
        if job.first_token_at is not None:
            self._metrics.saw_first_token(job.first_token_at - job.began)
        self._metrics.saw_end(time.monotonic() - job.began)
        for choice in job.choices.values():
            self._metrics.saw_choice(choice.finish or "cancelled", len(choice.tokens))

    async def _whole(self, job: Job, answer: Answer, deadline: float, send: Send) -> None:
        """
        Raises:
            Mistake: it takes too long, or the engine fails.
        """
        while pieces := await self._take(answer, deadline):
            for piece in pieces:
                job.add(piece)
                _require_sound(piece)
        # With many log-probabilities, this takes long.
        content = await asyncio.get_running_loop().run_in_executor(self._parse, lambda: _line(job.whole()))
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | _JSON_HEADERS
        await self._send(send, _start(200, headers))
        await self._send(send, {"type": "http.response.body", "body": content})

    async def _stream(self, job: Job, answer: Answer, deadline: float, send: Send) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"} | _JSON_HEADERS
        await self._send(send, _start(200, headers))
        try:
            await self._tell(send, job, job.first())
            while True:
                pieces = await self._take(answer, deadline, is_patient=False)
                if pieces is None:
                    await self._send(send, {"type": "http.response.body", "body": b": \n\n", "more_body": True})
                    continue
                if not pieces:
                    break
                told = [(job.add(piece), piece.finish) for piece in pieces]
                await self._tell(send, job, [one for events, finish in told if finish != "error" for one in events])
                for piece in pieces:
                    _require_sound(piece)
            await self._tell(send, job, job.last())
        except Mistake as mistake:
            await self._tell(send, job, [mistake.as_json()])
        await self._send(send, {"type": "http.response.body", "body": job.event_end})

    async def _take(self, answer: Answer, deadline: float, is_patient: bool = True) -> list[Piece] | None:
        """The next pieces; None if there are none for a while, and one is not patient.

        Raises:
            Mistake: the time is over.
        """
        until = deadline if is_patient else min(deadline, asyncio.get_running_loop().time() + _SIGN_OF_LIFE_S)
        with self._in_time():
            try:
                async with asyncio.timeout_at(until):
                    return await answer.take()
            except TimeoutError:
                if until < deadline:
                    return None
                raise

    async def _tell(self, send: Send, job: Job, events: list[dict]) -> None:
        if events:
            body = b"".join(job.event_prefix + _line(event) + b"\n\n" for event in events)
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _send(self, send: Send, message: dict) -> None:
        """
        Raises:
            ConnectionError: the reader has taken nothing for a long time.
        """
        try:
            async with asyncio.timeout(self._limits.stall_timeout_s):
                await send(message)
        except TimeoutError:
            raise _Stalled from None


class _Stalled(ConnectionError):
    """A reader that takes nothing."""


def _require_sound(piece: Piece) -> None:
    if piece.finish == "error":
        raise Mistake(piece.error or "the engine failed", code="engine_failed", status=500)


def _start(status: int, headers: Mapping[str, str]) -> dict:
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": lines}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def new_app(
    service: Service, hosts: Hosts, keys: Keys, limits: Limits, page: Path = PAGE,
    log: Callable[[str], None] | None = None,
) -> Gate:  # fmt: skip
    """The application.

    Args:
        page: folder of the chat page.
        log: told a line about each request, without its body, query and headers.
    """
    metrics = Metrics(service.stats, lambda: service.open)
    # One thread: tokenizers remember texts, and long prompts shall not hold up the event loop.
    parse = ThreadPoolExecutor(1, "tokenize")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    def generating(path: str, read: Read) -> None:
        async def endpoint(request: Request) -> Response:
            return Generating(service, limits, metrics, read, parse)

        app.add_route(path, endpoint, methods=["POST"])

    generating("/v1/chat/completions", openai_api.Chat.read)
    generating("/v1/completions", openai_api.Completion.read)
    generating("/generate", tgi_api.Generate.read)
    generating("/generate_stream", lambda *arguments: tgi_api.Generate.read(*arguments, is_stream=True))

    def computing(path: str, compute: Callable[[Mapping[str, Any], Catalog], dict]) -> None:
        async def endpoint(request: Request) -> Response:
            with service.lease() as generation:
                body, catalog = request.scope["body"], generation.catalog
                loop = asyncio.get_running_loop()
                answer = await loop.run_in_executor(parse, lambda: compute(parse_body(body), catalog))
            return Response(_line(answer), headers=_JSON_HEADERS, media_type="application/json")

        app.add_route(path, endpoint, methods=["POST"])

    computing("/tokenize", openai_api.tokenize)
    computing("/detokenize", openai_api.detokenize)

    def refusing(path: str, sentence: str) -> None:
        async def endpoint(request: Request) -> Response:
            raise Mistake(sentence, code="unsupported_endpoint")

        app.add_route(path, endpoint, methods=["POST"])

    refusing("/v1/embeddings", "this server continues texts, and makes no embeddings")
    refusing("/v1/responses", "the Responses API is not supported by this server: use /v1/chat/completions")

    @app.get("/v1/models")
    async def list_models() -> Response:
        return JSONResponse(openai_api.models(service.current.catalog), headers=_JSON_HEADERS)

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        return JSONResponse(openai_api.model(service.current.catalog.find(name)), headers=_JSON_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        problem = service.problem
        status = {"status": "ok"} if not problem else {"status": "unavailable", "reason": problem}
        return JSONResponse(status, 503 if problem else 200, _JSON_HEADERS)

    @app.get("/metrics")
    async def tell_metrics() -> Response:
        return Response(metrics.text(), headers=_JSON_HEADERS | {"Content-Type": CONTENT_TYPE})

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return page_file(request, page, "index.html")

    @app.api_route("/page/{name:path}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        return page_file(request, page, name)

    @app.exception_handler(Mistake)
    async def tell_mistake(request: Request, mistake: Mistake) -> Response:
        return told(mistake)

    @app.exception_handler(HTTPException)
    async def tell_http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        sentence = f"{request.method} is not a method of {path}" if error.status_code == 405 else f"there is no {path}"
        codes = {404: "not_found", 405: "method_not_allowed"}
        headers = error.headers or {}
        return told(Mistake(sentence, code=codes.get(error.status_code), status=error.status_code, headers=headers))

    @app.exception_handler(Exception)
    async def tell_fault(request: Request, error: Exception) -> Response:
        return told(Mistake("the server failed: its log says more", code="internal_error", status=500))

    paths = {getattr(route, "path", "") for route in app.routes}

    def observe(method: str, path: str, status: int, seconds: float) -> None:
        known = path if path in paths else "/page" if path.startswith("/page/") else "other"
        metrics.saw_http(known, status)
        if log is not None and (method == "POST" or status >= 400):
            log(f"{method} {known} {status or 'left'} {seconds:.3f} s")

    is_open = lambda path: path in ("/", "/health") or path.startswith("/page/")  # noqa: E731
    return Gate(app, hosts, keys, limits, told, is_open, observe)


def page_file(request: Request, folder: Path, name: str) -> Response:
    """A file of the chat page.

    Raises:
        Mistake: there is none of this name.
    """
    kind = _KINDS.get(Path(name).suffix)
    # A name, and nothing that leads anywhere else.
    if kind is None or not name.isascii() or not name.replace(".", "").replace("-", "").replace("_", "").isalnum():
        raise Mistake("the page has no such file", code="not_found", status=404)
    try:
        content = (folder / name).read_bytes()
    except OSError:
        raise Mistake("the page has no such file", code="not_found", status=404) from None
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _PAGE_HEADERS | {"ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers | {"Content-Type": kind})

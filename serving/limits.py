"""What a server lets in: from whom, how much, and for how long.

    Host and Origin -> key -> body's type and size -> the endpoint

A browser sends whatever page it shows to any address, this machine's own included. So the Host header must name this
server (or a page of attackers whose name was pointed here could read answers: DNS rebinding), a POST must come from a
page of this server or from none, and no header invites other pages (CORS).
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.fields import Mistake
from utils.small_files import read_small

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LOCAL = ("localhost", "127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")
_LARGEST_KEY_FILE = 1 << 20
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for."""

    max_body: int = 4 << 20
    """Bytes of a body."""
    max_choices: int = 128
    """Texts, over all prompts of a request."""
    max_prompts: int = 128
    max_beams: int = 16
    """Beams of one search. Those that are drawn are drawn one by one, while all others wait."""
    request_timeout_s: float = 600.0
    """From a request's arrival to the last token of its answer."""
    body_timeout_s: float = 30.0
    """From a request's arrival to the end of its body."""
    stall_timeout_s: float = 30.0
    """A reader that takes nothing for so long is gone."""


class Keys:
    """Keys that open the server. Only their digests are kept."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def has(self, key: str) -> bool:
        """Whether it is one of them, in a time that does not depend on how much of it is right."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return sum([hmac.compare_digest(digest, one) for one in self._digests]) > 0


def read_keys(path: Path) -> Keys:
    """Keys of a file: one a line; empty lines and those that begin with # do not count.

    Raises:
        ValueError: the file has none, or something that cannot be one.
    """
    try:
        lines = read_small(path, _LARGEST_KEY_FILE).decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--api_keys {path}: keys are ASCII letters, digits and signs") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--api_keys {path} cannot be used: {getattr(error, 'strerror', None) or error}") from None
    keys = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    for number, key in keys:
        if len(key) < _SHORTEST_KEY or not key.isprintable() or " " in key:
            raise ValueError(f"--api_keys {path}, line {number}: a key has at least {_SHORTEST_KEY} characters and no "
                             f"blanks; `openssl rand -hex 24` makes a good one")  # fmt: skip
    if not keys:
        raise ValueError(f"--api_keys {path} holds no key: write one on a line")
    if path.stat().st_mode & 0o077:
        logger.warning("%s can be read by other users of this machine: chmod 600 it", path)
    return Keys(key for _, key in keys)


class Hosts:
    """Names under which a server may be addressed.

    Args:
        bound: the address that it listens on. On all addresses of the machine, any address written in digits is right:
            nobody can point a name at a server and have the browser send digits.
        more: further names, such as that of a proxy before it.
    """

    def __init__(self, bound: str, more: Collection[str] = ()):
        self._names = {name.lower().strip("[]") for name in (bound, *more, *_LOCAL) if name not in _ANY}
        self._any_digits = bound in _ANY

    def has(self, header: str) -> bool:
        """Whether a Host header names this server; its port may be that of a tunnel."""
        name = _name_of(header)
        return name in self._names or (self._any_digits and _is_digits(name))


def _name_of(header: str) -> str:
    """The name in `name:port`, `[v6]:port` or `name`; empty if it is none of these."""
    name, bracket, rest = header.rpartition("]")
    if bracket:
        name = name.removeprefix("[")
        port = rest.removeprefix(":") if rest else "0"
    else:
        name, colon, port = header.partition(":")
        port = port if colon else "0"
    return name.lower().removesuffix(".") if port.isascii() and port.isdigit() else ""


def _is_digits(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same_origin(origin: str, host: str) -> bool:
    scheme, sign, name = origin.partition("://")
    ports = {"http": ":80", "https": ":443"}
    if not sign or scheme not in ports:
        return False
    return name.lower().removesuffix(ports[scheme]) == host.lower().removesuffix(ports[scheme])


class Gate:
    """An ASGI application in front of another, which lets requests in or answers why not.

    Args:
        refuse: turns a mistake into an ASGI application that tells it.
        is_open: whether a path needs no key.
        observe: told method, path, status and seconds of each request.
    """

    def __init__(
        self, app: Any, hosts: Hosts, keys: Keys, limits: Limits, refuse: Callable[[Mistake], Any],
        is_open: Callable[[str], bool], observe: Callable[[str, str, int, float], None],
    ):  # fmt: skip
        self._app, self._hosts, self._keys, self._limits = app, hosts, keys, limits
        self._refuse, self._is_open, self._observe = refuse, is_open, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
                scope["body"] = await self._body(scope, receive)
            except Mistake as mistake:
                await self._refuse(mistake)(scope, receive, watched)
                return
            try:
                await self._app(scope, receive, watched)
            except Exception:
                # It has been answered as a fault of ours, or its answer breaks off.
                logger.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            self._observe(scope["method"], scope["path"], status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """
        Raises:
            Mistake: the request comes from somewhere else, without a key, or with a body that is none.
        """
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)

        def one(name: bytes) -> str | None:
            values = headers.get(name, [])
            if len(values) > 1:
                raise Mistake(f"the header {name.decode()} comes twice", code="invalid_header")
            return values[0].decode("latin-1").strip() if values else None

        host, origin = one(b"host") or "", one(b"origin")
        if not self._hosts.has(host):
            raise Mistake("the Host header does not name this server: address it as localhost, or start it with "
                          "--allowed_host NAME", code="foreign_host", status=403)  # fmt: skip
        if scope["method"] not in ("GET", "HEAD") and origin is not None and not _is_same_origin(origin, host):
            raise Mistake("a page of another server may not use this one", code="foreign_origin", status=403)
        if self._keys and not self._is_open(scope["path"]):
            scheme, _, key = (one(b"authorization") or "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.has(key.strip()):
                what = "the API key is wrong" if key else "an API key is needed"
                raise Mistake(f"{what}: send the header Authorization: Bearer KEY", code="invalid_api_key", status=401,
                              headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if scope["method"] == "POST":
            kind, _, options = (one(b"content-type") or "").lower().partition(";")
            if kind.strip() != "application/json" or "charset" in options and "utf-8" not in options:
                raise Mistake("send JSON in UTF-8, with the header Content-Type: application/json",
                              code="unsupported_content_type", status=415)  # fmt: skip
            if (one(b"content-encoding") or "identity").lower() != "identity":
                raise Mistake("send the body uncompressed", code="unsupported_content_type", status=415)
            length = one(b"content-length") or "0"
            if length.isascii() and length.isdigit() and int(length[:20]) > self._limits.max_body:
                raise self._too_large()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """
        Raises:
            Mistake: the body is too large, or comes too slowly.
        """
        if scope["method"] != "POST":
            return b""
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Mistake("the client left", code="client_left")
                    body += message.get("body", b"")
                    if len(body) > self._limits.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Mistake(f"the body did not come within {self._limits.body_timeout_s:g} s", code="timeout",
                          status=408, headers={"Connection": "close"}) from None  # fmt: skip

    def _too_large(self) -> Mistake:
        return Mistake(f"the body is larger than {self._limits.max_body:,} bytes", code="body_too_large", status=413,
                       headers={"Connection": "close"})  # fmt: skip

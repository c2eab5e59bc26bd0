"""The server's life: listening, signals, the end.

The first SIGTERM or SIGINT refuses what is new (503) and lets finish what runs; then the process ends with 0. A second
one ends it at once. If the device fails for good, or ranks share the model and a step fails, nothing can go on: those
who wait get an error, and the process ends with another code, so that a supervisor starts it again.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.service import Service
from utils.terminal import INTERRUPTED

logger = logging.getLogger(__name__)

_LAST_BYTES_S = 5
"""How long readers of finished answers may take their last bytes."""
_REQUEST_WITHIN_S = 30
"""A connection may be idle for so long, or up to twice of it."""
_TERMINATED = 128 + signal.SIGTERM
_WAITING_CONNECTIONS = 1024


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address. It does not listen yet, so that clients are refused until the model is loaded.

    Args:
        port: 0 for one that is free.
    Raises:
        ValueError: the address is none of this machine's, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be used: {getattr(error, 'strerror', None) or error}; "
                         f"choose another one, or --port 0 for any") from None  # fmt: skip
    return bound


class _Protocol(H11Protocol):
    """uvicorn's connections, each of which must bring a request within a while. (uvicorn waits for the first one, and
    for the rest of any other, for ever.)"""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._before: object = None
        self._watch = self.loop.call_later(_REQUEST_WITHIN_S, self._require_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _require_request(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is self._before:
            self.transport.close()
            return
        self._before = self.cycle
        self._watch = self.loop.call_later(_REQUEST_WITHIN_S, self._require_request)


class _Server(uvicorn.Server):
    """uvicorn's server with the end described above. uvicorn itself drops what is new at once, and ends by the signal.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service, self._is_ending = service, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_ending:
            # Not even what should be tidied up may hold it up.
            sys.stderr.flush()
            os._exit(INTERRUPTED if sig == signal.SIGINT else _TERMINATED)
        self._is_ending = True
        logger.info("ends when what runs has finished; a second signal ends it at once")
        asyncio.get_running_loop().call_soon_threadsafe(self.let_finish)

    def let_finish(self) -> None:
        """Refuse what is new, and end when all else is done."""
        self._service.end()
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._service.ended()
        self.should_exit = True

    async def end_when_lost(self) -> None:
        """End soon after the service cannot go on."""
        await self._service.lost.wait()
        logger.error("ends, since it cannot go on: start it again")
        self._service.end()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._service.ended(), _LAST_BYTES_S)
        self.should_exit = True


def run(app: Any, service: Service, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal, or until `service.lost` is set.

    Args:
        ready: called as soon as clients can connect.
    """
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, backlog=_WAITING_CONNECTIONS, timeout_keep_alive=_REQUEST_WITHIN_S,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )  # fmt: skip
    server = _Server(config, service)

    async def serve() -> None:
        service.start()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            if server.started:
                ready()
            else:
                loop.call_later(0.05, tell)

        tell()
        watching = asyncio.ensure_future(server.end_when_lost())
        try:
            await server.serve(sockets=[bound])
        finally:
            watching.cancel()
            service.close()

    asyncio.run(serve())

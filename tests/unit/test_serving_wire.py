"""Requests that are odd as HTTP, against a real server: slow, half, lying, several at once."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

from tests.chaos.serving_bodies import BASES, COMPLETIONS, problem
from tests.served import Answer, Server, connect, exchange, post_bytes, read_answer, tiny_tokenizer, write_model

BODY = b'{"prompt": "hi", "max_tokens": 2, "ignore_eos": true}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("wire")
    with Server(write_model(home / "tiny", tiny_tokenizer()), home / "log") as server:
        yield server


async def raw(port: int, *parts: bytes, pause: float = 0.0, count: int = 1, patience: float = 30) -> list[Answer]:
    """Send bytes, and read so many answers; fewer if the server closes the connection or says nothing more."""
    reader, writer = await connect(port)
    answers = []
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        async with asyncio.timeout(patience):
            for _ in range(count):
                answers.append(await read_answer(reader, Answer()))
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
    return answers


def answered(port: int, *parts: bytes, pause: float = 0.0) -> Answer:
    [answer] = asyncio.run(raw(port, *parts, pause=pause))
    return answer


ODD = {
    "no HTTP": b"hello\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no version": b"GET /health\r\n\r\n",
    "another version": b"GET /health HTTP/3.0\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "two lengths": post_bytes(COMPLETIONS, BODY).replace(b"Connection:", b"Content-Length: 3\r\nConnection:"),
    "a length that is none": post_bytes(COMPLETIONS, BODY, {"Content-Length": "abc"}),
    "a length in other digits": post_bytes(COMPLETIONS, BODY, {"Content-Length": "\xb2"}),
    "a negative length": post_bytes(COMPLETIONS, BODY, {"Content-Length": "-1"}),
    "a length too large": post_bytes(COMPLETIONS, BODY, {"Content-Length": "99999999999"}),
    "a length too small": post_bytes(COMPLETIONS, BODY, {"Content-Length": "9"}),
    "no length": post_bytes(COMPLETIONS, b"", {"Content-Length": ""}),
    "length and chunks": post_bytes(COMPLETIONS, BODY + b"\r\n", {"Transfer-Encoding": "chunked"}),
    "chunks that are none": post_bytes(COMPLETIONS, BODY + b"\r\n",
                                       {"Content-Length": "", "Transfer-Encoding": "chunked"}),
    "another coding": post_bytes(COMPLETIONS, BODY, {"Content-Length": "", "Transfer-Encoding": "gzip"}),
    "large headers": post_bytes(COMPLETIONS, BODY, {"X": "a" * 100_000}),
    "many headers": post_bytes(COMPLETIONS, BODY, {f"X{number}": "a" for number in range(20_000)}),
    "a folded header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    "a header without colon": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX\r\n\r\n",
    "a null in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "a null in the path": b"GET /hea\x00lth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path out of the folder": b"GET /page/../../serve.py HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "the same in other letters": b"GET /page/%2e%2e%2f%2e%2e%2fserve.py HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "broken letters": b"GET /page/%ff%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path as of a proxy": b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "another method": b"BREW /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "upgrade to a WebSocket": b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "GET with a body": post_bytes(COMPLETIONS, BODY, method="GET"),
}  # fmt: skip
HARMLESS = {"another version", "a folded header", "large headers"}
"""These may be served."""
UNANSWERED = {"another protocol", "many headers"}
"""These may be answered by closing the connection: no HTTP ever comes, or it is closed while more comes."""


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_refused(server: Server, name: str):
    answers = asyncio.run(raw(server.port, ODD[name], patience=2 if name in UNANSWERED else 10))
    assert len(answers) == 1 or name in UNANSWERED
    for answer in answers:
        assert 400 <= answer.status < 500 or name in HARMLESS, (answer.status, answer.body)
        assert b"Traceback" not in answer.body and len(answer.body) < 1000
        if answer.headers["content-type"].startswith("application/json"):
            assert not problem(answer.status, answer.body)
    assert "Traceback" not in server.said


def test_sound_but_unusual(server: Server):
    sound = answered(server.port, post_bytes(COMPLETIONS, BODY))
    assert sound.status == 200
    whole = post_bytes(COMPLETIONS, BODY)
    # Byte by byte; with chunks; in HTTP/1.0.
    byte_by_byte = answered(server.port, *[whole[at : at + 1] for at in range(len(whole))], pause=0.001)
    chunks = post_bytes(COMPLETIONS, b"".join(b"%x\r\n%c\r\n" % (1, one) for one in BODY) + b"0\r\n\r\n",
                        {"Content-Length": "", "Transfer-Encoding": "chunked"})  # fmt: skip
    for answer in (byte_by_byte, answered(server.port, chunks),
                   answered(server.port, whole.replace(b"HTTP/1.1", b"HTTP/1.0"))):  # fmt: skip
        assert answer.status == 200
        assert answer.json["usage"]["completion_tokens"] == sound.json["usage"]["completion_tokens"]


def test_requests_in_one_breath(server: Server):
    """Pipelining: the answers come in the order of the requests."""
    kept = {"Connection": "keep-alive"}
    bodies = [b'{"prompt": "hi", "max_tokens": %d, "ignore_eos": true}' % count for count in (3, 1, 2)]
    requests = [post_bytes(COMPLETIONS, body, kept) for body in bodies]
    requests.insert(1, post_bytes(COMPLETIONS, b"{", kept))
    answers = asyncio.run(raw(server.port, b"".join(requests), count=4))
    assert [answer.status for answer in answers] == [200, 400, 200, 200]
    assert [one.json["usage"]["completion_tokens"] for one in answers if one.status == 200] == [3, 1, 2]


def test_a_client_that_asks_before_it_sends(server: Server):
    """Expect: 100-continue, as curl does with large bodies."""

    async def send(length: int) -> list[int]:
        reader, writer = await connect(server.port)
        head = post_bytes(COMPLETIONS, b"", {"Content-Length": str(length), "Expect": "100-continue"})
        writer.write(head)
        statuses = []
        async with asyncio.timeout(30):
            first = await reader.readuntil(b"\r\n\r\n")
            statuses.append(int(first.split()[1]))
            if statuses == [100]:
                writer.write(BODY)
                statuses.append((await read_answer(reader, Answer())).status)
        writer.transport.abort()
        return statuses

    assert asyncio.run(send(len(BODY))) == [100, 200]
    assert asyncio.run(send(1 << 30)) == [413]


def test_those_who_send_nothing_or_leave_hold_nothing(server: Server):
    """Half a head, half a body, a body and no reader, and a reset: the server goes on, and keeps none of them."""

    async def play() -> None:
        open_before = len(os.listdir(f"/proc/{server.process.pid}/fd")) if os.path.isdir("/proc/self/fd") else 0
        whole = post_bytes("/v1/completions", BODY)
        streaming = post_bytes("/v1/completions", b'{"prompt": "a", "max_tokens": 99, "stream": true}')
        left = []
        for part in (b"", whole[:20], whole[:-5], whole, streaming) * 12:
            _, writer = await connect(server.port)
            writer.write(part)
            left.append(writer)
        await asyncio.sleep(0.2)
        # Others are served meanwhile.
        assert (await exchange(server.port, COMPLETIONS, BASES[COMPLETIONS])).status == 200
        for number, writer in enumerate(left):
            if number % 2:
                # Without it the close is polite; with it, a reset.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            writer.transport.abort()
        await server.idle()
        for _ in range(100):
            if len(os.listdir(f"/proc/{server.process.pid}/fd")) <= open_before + 2:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("connections stay open")

    asyncio.run(play())
    assert "Traceback" not in server.said


def test_zz_it_ends_when_nothing_runs(server: Server):
    server.signal(signal.SIGTERM)
    assert server.ends() == 0, server.said
    assert "Traceback" not in server.said

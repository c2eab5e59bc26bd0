"""A real `serve.py` with a tiny random model, and a client that shows each byte of what it says."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from safetensors.torch import save_file

from checkpoint.folder import MANIFEST, sealed, step_dir
from model import Decoder, ModelConfig, hf
from model.config import padded_vocab_size
from runs.layout import RunPaths
from tests.unit.test_tokenizer import training_texts
from tokenizer import Tokenizer
from tokenizer.chat_template import ChatTemplate
from tokenizer.hf_bbpe import train_hf_bbpe
from utils.files import atomic_write_json, sha256_of_file

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 150.0
"""Seconds within which everything awaited must happen, even on a loaded machine."""
BLOCK_GB = 16 * 2 * 32 * 4 / 1e9
"""Memory of one block of the models below, in float32."""


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of 400 entries."""
    return train_hf_bbpe(training_texts(), 400, show_progress=False)


def write_model(directory: Path, tokenizer: Tokenizer, seed: int = 0, context: int = 256) -> Path:
    """A folder with a random model that says something else for each seed."""
    directory.mkdir(parents=True)
    config = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True,
                         initializer_range=0.3)  # fmt: skip
    model = Decoder(config.resolve(padded_vocab_size(tokenizer.vocab_size), context))
    model.initialize(seed)
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    ends = [ChatTemplate(tokenizer).end_id, tokenizer.eod_id]
    atomic_write_json(directory / "config.json", hf.to_hf_config(model.config, model.norm.weight.dtype, ends))
    tokenizer.save_pretrained(directory)
    return directory


def write_checkpoint(run: Path, step: int, tokenizer: Tokenizer, seed: int | None = None) -> Path:
    """A checkpoint of a run, which appears whole."""
    directory = RunPaths(run).ckpt_dir
    path = write_model(directory / f".tmp-{step_dir(step)}", tokenizer, step if seed is None else seed)
    files = {one.name: {"size": one.stat().st_size, "sha256": sha256_of_file(one)} for one in sorted(path.iterdir())}
    atomic_write_json(path / MANIFEST, sealed({
        "step": step, "valid_loss": None, "save_id": f"save-{step}", "world_size": 1, "ranks": [0], "covers": [0],
        "saved_at": float(step), "files": files,
    }))  # fmt: skip
    os.rename(path, directory / step_dir(step))
    return directory / step_dir(step)


class Server:
    """A process of serve.py.

    Args:
        flags: besides --model and --port.
        log: file for what it says.
    """

    def __init__(self, model: Path, log: Path, flags: Sequence[str] = (), port: int = 0):
        self.log, self.port = log, port
        self._command = [sys.executable, str(ROOT / "serve.py"), f"--model={model}", f"--port={port}", "--device=cpu",
                         "--dtype=float32", *flags]  # fmt: skip

    def __enter__(self) -> "Server":
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        try:
            found = None
            deadline = time.monotonic() + PATIENCE_S
            while found is None:
                assert self.process.poll() is None, self.said
                assert time.monotonic() < deadline, self.said
                time.sleep(0.05)
                found = re.search(r"ready: http://127\.0\.0\.1:(\d+)/", self.said[begin:])
            self.port = int(found[1])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    @property
    def resident_mb(self) -> float:
        """Memory of the process, 10^6 bytes."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(PATIENCE_S)

    async def metrics(self) -> dict[str, float]:
        """The engine's figures of /metrics, by their names without labels and prefix."""
        answer = await exchange(self.port, "/metrics", method="GET")
        assert answer.status == 200
        return {name: float(value) for name, value in
                re.findall(r"^zero2all_(\w+) (\S+)$", answer.body.decode(), re.MULTILINE)}  # fmt: skip

    async def idle(self) -> dict[str, float]:
        """Wait until nothing is open, running or waiting, and no block is in use; returns the figures.

        Raises:
            AssertionError: that does not happen.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            figures = await self.metrics()
            left = {name: figures[name] for name in ("open_choices", "running", "waiting", "used_blocks")}
            if not any(left.values()):
                return figures
            assert time.monotonic() < deadline, f"still in use: {left}\n{self.said[-2000:]}"
            await asyncio.sleep(0.1)


@dataclass
class Answer:
    """What a server answered, as far as it came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False
    """Whether it ended as its headers say."""
    began: float = 0.0
    first_at: float = 0.0
    """When the first byte of the body came; 0: none has."""
    ended_at: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """JSON of the lines `data:`; the last one may be a word."""
        found = [line.removeprefix(b"data:").strip() for line in self.body.split(b"\n") if line.startswith(b"data:")]
        return [one.decode() if one == b"[DONE]" else json.loads(one) for one in found]


class Left(Exception):
    """This client closed the connection, as it was to."""


def post_bytes(path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body)),
             "Connection": "close"} | (headers or {})  # fmt: skip
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return head.encode("latin-1") + b"\r\n" + body


async def connect(port: int, is_slow: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a server.

    Args:
        is_slow: neither the kernel nor asyncio takes much that nobody has read yet.
    """
    own = socket.socket()
    own.setblocking(False)
    if is_slow:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=own, limit=1024 if is_slow else 1 << 24)


async def exchange(
    port: int, path: str, content: Any = None, headers: dict[str, str] | None = None, method: str = "POST",
    leave_after: float | None = None, slow_bytes: int = 0, slow_pause: float = 0.1, answer: Answer | None = None,
    patience: float = PATIENCE_S,
) -> Answer:  # fmt: skip
    """Ask a server, over a connection of its own.

    Args:
        content: bytes, or a value to send as JSON.
        leave_after: close the connection after so many seconds.
        slow_bytes: of the answer are read one by one, with pauses between.
        answer: is filled, so that a caller sees how far it came.
    Raises:
        Left: the time of `leave_after` is over.
        ConnectionError: the server refused the connection, or broke it before the answer's end.
        TimeoutError: no answer within `patience` seconds.
    """
    answer = Answer() if answer is None else answer
    answer.began = time.monotonic()
    body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
    reader, writer = await connect(port, is_slow=slow_bytes > 0)
    leaves = leave_after is not None and leave_after < patience
    try:
        async with asyncio.timeout(leave_after if leaves else patience):
            writer.write(post_bytes(path, body, headers, method))
            await writer.drain()
            await read_answer(reader, answer, slow_bytes, slow_pause)
    except TimeoutError:
        if leaves:
            raise Left from None
        raise
    except asyncio.IncompleteReadError as error:
        raise ConnectionError(f"the connection broke after {len(answer.body)} bytes of the answer") from error
    finally:
        # At once, also if the other side sends what nobody reads.
        writer.transport.abort()
    return answer


async def read_answer(
    reader: asyncio.StreamReader, answer: Answer, slow_bytes: int = 0, slow_pause: float = 0.1
) -> Answer:
    """Read one answer. See `exchange`."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    answer.status = int(head[0].split(" ")[1])
    answer.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}

    async def read(size: int) -> None:
        nonlocal slow_bytes
        while size:
            count = 1 if slow_bytes else size
            answer.body += await reader.readexactly(count)
            answer.first_at = answer.first_at or time.monotonic()
            if slow_bytes:
                slow_bytes -= 1
                await asyncio.sleep(slow_pause)
            size -= count

    if answer.headers.get("transfer-encoding") == "chunked":
        size = -1
        while size:
            size = int((await reader.readuntil(b"\r\n")), 16)
            await read(size)
            assert await reader.readexactly(2) == b"\r\n"
    elif "content-length" in answer.headers:
        await read(int(answer.headers["content-length"]))
    else:
        answer.body = await reader.read()
    answer.is_whole, answer.ended_at = True, time.monotonic()
    return answer

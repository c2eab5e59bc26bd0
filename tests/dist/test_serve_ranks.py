"""serve.py on ranks that share a model: its answers, and how all of them end."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

import serve
from parallel.listen import LOOPBACK, bind, serve_store
from serving.generation import generate, load_model
from tests.unit.test_chat import folder, tokenizer
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of

__all__ = ["folder", "tokenizer"]

ROOT = Path(__file__).resolve().parent.parent.parent
QUESTION = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
# As long as the context allows, so that it is not at its end when something happens.
LONG = {"prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True, "n": 4}


class Ranks:
    """A server of two processes, started as a launcher does."""

    def __init__(self, folder: Path, logs: Path):
        self._store = serve_store(bind(LOOPBACK, 0), 120.0)
        flags = [f"--model={folder}", "--port=0", "--dtype=float32", "--device=cpu", "--tensor_model_parallel_size=2"]
        self.logs = [logs / f"rank{rank}" for rank in range(2)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(self._store.port), "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            with open(log, "wb") as file:
                command = [sys.executable, "serve.py", *flags]
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file))

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def port(self) -> int:
        """Where they answer, once they do."""
        deadline = time.monotonic() + 120
        while not (found := re.search(r"ready: http://127.0.0.1:([0-9]+)/", self.said())):
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.05)
        return int(found[1])

    def ends(self) -> list[int]:
        """Exit code of each."""
        return [process.wait(60) for process in self.processes]


@contextmanager
def started(folder: Path, logs: Path) -> Iterator[Ranks]:
    ranks = Ranks(folder, logs)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.wait()


def ask(port: int, path: str, body: dict) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def test_ranks_answer_like_one_process_and_end_together(folder: Path, tmp_path: Path, tokenizer: Tokenizer):
    model, _, stop_ids = load_model(folder, torch.device("cpu"), torch.float32)
    template = template_of(tokenizer)
    ids = generate(model, template.prompt([Message("user", "hello")]), 20, stop_ids | template.stop_ids, 0.0,
                   vocab_size=tokenizer.vocab_size)  # fmt: skip
    with started(folder, tmp_path) as ranks:
        port = ranks.port()
        answer = json.load(ask(port, "/v1/chat/completions", QUESTION | {"max_tokens": 20}))
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(list(ids))
        # Nobody asks: they wait without working.
        processes = [psutil.Process(process.pid) for process in ranks.processes]
        before = [sum(process.cpu_times()[:2]) for process in processes]
        time.sleep(1.0)
        used = [sum(process.cpu_times()[:2]) - old for process, old in zip(processes, before, strict=True)]
        assert max(used) < 0.2
        running = ask(port, "/v1/completions", LONG)
        running.readline()
        # As launchers do; the one that only follows gets it first, and has to hold out.
        for process in reversed(ranks.processes):
            process.send_signal(signal.SIGTERM)
        assert running.read().endswith(b"data: [DONE]\n\n")
        assert ranks.ends() == [0, 0], ranks.said()
        assert ranks.said().count("ready:") == 1 and not ranks.logs[1].read_text()


def test_a_step_that_fails_ends_the_server(folder: Path, tmp_path: Path):
    with started(folder, tmp_path) as ranks:
        port = ranks.port()
        running = ask(port, "/v1/completions", LONG)
        running.readline()
        ranks.processes[1].kill()
        said = running.read()
        assert b"a step of the engine failed" in said
        # A supervisor must see that it is no orderly end.
        assert ranks.ends() == [1, -signal.SIGKILL], ranks.said()
        assert "the ranks that share the model cannot go on" in ranks.said()


def test_ranks_follow_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert serve.main([f"--model={folder}", "--follow", "--tensor_model_parallel_size=2"]) == 2
        assert capsys.readouterr().err.count("--follow is for one process: leave it out") == told

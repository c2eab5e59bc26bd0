"""Ends of a real server, wanted and not, and models that come, vanish and are damaged while it serves."""

import asyncio
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

from checkpoint.folder import MANIFEST
from tests.served import Answer, Server, exchange, tiny_tokenizer, write_checkpoint, write_model
from tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "go on", "max_tokens": 240, "ignore_eos": True, "stream": True, "temperature": 0}
SHORT = {"prompt": "tell", "max_tokens": 8, "ignore_eos": True, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("kills") / "tiny", tokenizer)


async def begun(port: int, content: dict, count: int) -> tuple[list[asyncio.Task], list[Answer]]:
    """Streams of which each has said something."""
    answers = [Answer() for _ in range(count)]
    tasks = [asyncio.create_task(exchange(port, COMPLETIONS, content, answer=one)) for one in answers]
    while not all(one.body for one in answers):
        for task in tasks:
            assert not task.done() or task.result()
        await asyncio.sleep(0.005)
    return tasks, answers


def is_free(port: int) -> bool:
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_the_end_waits_for_what_runs(folder: Path, tmp_path: Path):
    with Server(folder, tmp_path / "log", ["--max_running=4"]) as server:

        async def play() -> None:
            # Four run and two wait: those count as begun, too.
            tasks = [asyncio.create_task(exchange(server.port, COMPLETIONS, LONG)) for _ in range(6)]
            while (await server.metrics())["open_choices"] < 6:
                await asyncio.sleep(0.01)
            server.signal()
            statuses = set()
            while 503 not in statuses:
                answer = await exchange(server.port, COMPLETIONS, SHORT)
                statuses.add(answer.status)
            assert answer.json["error"]["code"] == "ending" and statuses <= {200, 503}
            assert (await exchange(server.port, "/health", method="GET")).status == 503
            for answer in await asyncio.gather(*tasks):
                assert answer.status == 200 and answer.events[-1] == "[DONE]"
                assert answer.events[-2]["choices"][0]["finish_reason"] == "length"

        asyncio.run(play())
        assert server.ends() == 0
        assert is_free(server.port) and "Traceback" not in server.said


def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path):
    with Server(folder, tmp_path / "log") as server:

        async def play() -> None:
            tasks, answers = await begun(server.port, LONG, 4)
            server.signal()
            while "ends when what runs has finished" not in server.said:
                await asyncio.sleep(0.01)
            server.signal()
            assert await asyncio.to_thread(server.ends) == 128 + signal.SIGTERM
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert any(isinstance(one, ConnectionError) for one in results)
            # A client can tell a text that broke off from one that ended.
            for result, answer in zip(results, answers):
                assert isinstance(result, ConnectionError) != answer.is_whole

        asyncio.run(play())
        assert is_free(server.port)


def test_a_kill_under_load_and_a_new_start(folder: Path, tmp_path: Path):
    with Server(folder, tmp_path / "log") as server:

        async def play() -> None:
            tasks, _ = await begun(server.port, LONG, 8)
            waiting = [asyncio.create_task(exchange(server.port, COMPLETIONS, LONG | {"stream": False}))
                       for _ in range(8)]  # fmt: skip
            await asyncio.sleep(0.05)
            server.signal(signal.SIGKILL)
            results = await asyncio.gather(*tasks, *waiting, return_exceptions=True)
            assert any(isinstance(one, ConnectionError) for one in results)
            assert all(isinstance(one, ConnectionError) or one.is_whole for one in results), results
            with pytest.raises(ConnectionError):
                await exchange(server.port, COMPLETIONS, SHORT)

        asyncio.run(play())
        assert server.ends() == -signal.SIGKILL
    with Server(folder, tmp_path / "log", port=server.port) as again:
        assert asyncio.run(exchange(again.port, COMPLETIONS, SHORT)).status == 200


# -- following a run


async def until_step(server: Server, step: int) -> dict:
    """Wait for an answer of this step or a later one."""
    deadline = time.monotonic() + 60
    while True:
        told = (await exchange(server.port, COMPLETIONS, SHORT)).json
        if int(told["system_fingerprint"].removeprefix("step-")) >= step:
            return told
        assert time.monotonic() < deadline, server.said
        await asyncio.sleep(0.05)


def said_by(told: dict) -> tuple[str, tuple[int, ...]]:
    return told["system_fingerprint"], tuple(told["choices"][0]["token_ids"])


@pytest.mark.slow
def test_checkpoints_that_vanish_or_are_damaged(tokenizer: Tokenizer, tmp_path: Path):
    run = tmp_path / "run"
    first = write_checkpoint(run, 1, tokenizer)
    with Server(run, tmp_path / "log", ["--follow"]) as server:

        async def play() -> None:
            before = said_by((await exchange(server.port, COMPLETIONS, SHORT)).json)
            assert before[0] == "step-1"
            # The folder that is served vanishes: the model is in memory.
            shutil.rmtree(first)
            # A later one is damaged, one has no manifest, one no weights, one is a file, one has another's tokenizer.
            with (write_checkpoint(tmp_path / "aside", 2, tokenizer) / "model.safetensors").open("r+b") as file:
                file.seek(-40, 2)
                file.write(b"damaged!")
            damaged = tmp_path / "aside" / "ckpt" / "step-2"
            shutil.move(damaged, run / "ckpt" / "step-2")
            unfinished = write_checkpoint(tmp_path / "aside", 3, tokenizer)
            (unfinished / MANIFEST).unlink()
            shutil.move(unfinished, run / "ckpt" / "step-3")
            empty = write_checkpoint(tmp_path / "aside", 4, tokenizer)
            (empty / "model.safetensors").unlink()
            shutil.move(empty, run / "ckpt" / "step-4")
            (run / "ckpt" / "step-5").write_text("a file")
            while "step-2 is skipped" not in server.said or "step-4 is skipped" not in server.said:
                assert said_by((await exchange(server.port, COMPLETIONS, SHORT)).json) == before
                await asyncio.sleep(0.05)
            # All of them vanish, then the run's folder, then it comes back with a good one.
            shutil.rmtree(run / "ckpt")
            await asyncio.sleep(0.5)
            assert said_by((await exchange(server.port, COMPLETIONS, SHORT)).json) == before
            shutil.rmtree(run)
            await asyncio.sleep(2.5)
            assert said_by((await exchange(server.port, COMPLETIONS, SHORT)).json) == before
            write_checkpoint(run, 6, tokenizer)
            after = said_by(await until_step(server, 6))
            assert after[0] == "step-6" and after[1] != before[1]
            await server.idle()

        asyncio.run(play())
        server.signal()
        assert server.ends() == 0
        assert server.said.count("step-2 is skipped") == 1
        assert "Traceback" not in server.said


@pytest.mark.slow
def test_new_checkpoints_while_requests_run(tokenizer: Tokenizer, tmp_path: Path):
    follow(tokenizer, tmp_path, steps=4, clients=4)


@pytest.mark.soak
def test_many_checkpoints_while_requests_run(tokenizer: Tokenizer, tmp_path: Path):
    follow(tokenizer, tmp_path, steps=40, clients=16)


def follow(tokenizer: Tokenizer, home: Path, steps: int, clients: int) -> None:
    """Save a checkpoint every second while clients ask. Each answer names a step, and is that step's; for each client,
    steps only rise; the memory of old models comes back."""
    run = home / "run"
    write_checkpoint(run, 1, tokenizer)
    told: dict[str, set[tuple[int, ...]]] = {}
    with Server(run, home / "log", ["--follow", "--max_running=8"]) as server:

        async def client(number: int, done: asyncio.Event) -> None:
            last = 0
            while not done.is_set():
                content = SHORT | {"stream": bool(number % 2), "max_tokens": 60 if number % 3 else 8}
                answer = await exchange(server.port, COMPLETIONS, content)
                assert answer.status == 200, answer.body
                events = [one for one in answer.events if one != "[DONE]"] if content["stream"] else [answer.json]
                [fingerprint] = {one["system_fingerprint"] for one in events}
                ids = tuple(one for event in events for one in event["choices"][0]["token_ids"])
                assert len(ids) == content["max_tokens"]
                # Later tokens depend on the first ones, so a text of two models would show here.
                told.setdefault(fingerprint, set()).add(ids)
                step = int(fingerprint.removeprefix("step-"))
                assert step >= last
                last = step

        async def save(done: asyncio.Event) -> None:
            try:
                for step in range(2, steps + 2):
                    await asyncio.to_thread(write_checkpoint, run, step, tokenizer)
                    if step > 3:
                        shutil.rmtree(run / "ckpt" / f"step-{step - 3}", ignore_errors=True)
                    await asyncio.sleep(1)
                await until_step(server, steps + 1)
            finally:
                done.set()

        async def play() -> None:
            done = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(save(done))
                for number in range(clients):
                    group.create_task(client(number, done))
            await server.idle()

        asyncio.run(play())
        assert "Traceback" not in server.said and "is skipped" not in server.said
    assert len(told) >= 2, told.keys()
    for fingerprint, texts in told.items():
        longest = max(texts, key=len)
        assert all(longest[: len(ids)] == ids for ids in texts), fingerprint
        assert longest[: SHORT["max_tokens"]] == alone(tokenizer, home, int(fingerprint.removeprefix("step-")))
    assert len({max(texts, key=len)[:8] for texts in told.values()}) == len(told)


def alone(tokenizer: Tokenizer, home: Path, step: int) -> tuple[int, ...]:
    """What the model of a step says to SHORT, by the model itself."""
    import torch

    from serving.loading import load

    folder = write_model(home / f"alone-{step}", tokenizer, step)
    served = load(folder, {}, torch.device("cpu"), torch.float32)
    ids = [*tokenizer.begin_ids, *tokenizer.encode(SHORT["prompt"])]
    new: list[int] = []
    with torch.inference_mode():
        for _ in range(SHORT["max_tokens"]):
            hidden_1TC = served.model(torch.tensor([ids + new]))
            new.append(int(served.model.logits(hidden_1TC)[0, -1, : tokenizer.vocab_size].argmax()))
    return tuple(new)

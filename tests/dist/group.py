"""Run one function on several gloo ranks of this machine: a group is spawned once and works through many cases."""

import json
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, work: Callable, arguments: tuple, out: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        answer = {"result": work(*arguments)}
    except Exception:
        answer = {"error": traceback.format_exc()}
    (Path(out) / f"{rank}.json").write_text(json.dumps(answer))
    if "error" in answer:
        raise SystemExit(1)


def run_ranks(world_size: int, work: Callable, *arguments: object) -> list:
    """Call `work(*arguments)` on `world_size` new processes; returns each rank's (JSON-like) result.

    Raises:
        AssertionError: a rank raised; its traceback is the message.
    """
    with tempfile.TemporaryDirectory() as out:
        context = torch.multiprocessing.get_context("spawn")
        port = _free_port()
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, port, work, arguments, out))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        for process in processes:
            if process.is_alive():
                process.kill()
        answers = []
        for rank in range(world_size):
            path = Path(out) / f"{rank}.json"
            answers.append(json.loads(path.read_text()) if path.exists() else {"error": f"rank {rank} left no result"})
        errors = [answer["error"] for answer in answers if "error" in answer]
        assert not errors, "\n".join(errors)
        return [answer["result"] for answer in answers]

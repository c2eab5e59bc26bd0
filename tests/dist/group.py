"""Run functions on several gloo ranks of this machine: a group is spawned once and works through many cases."""

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing

from parallel.listen import LOOPBACK, bind, serve_store

MAX_JOBS = 16
"""How often the ranks of a group may meet again."""


def use_new_port() -> None:
    """Switch to a new port before another `init_context` in the same processes: the last store still holds its keys."""
    ports = os.environ["SPARE_PORTS"].split(",")
    os.environ["MASTER_PORT"], os.environ["SPARE_PORTS"] = ports[0], ",".join(ports[1:])
    forget_meshes()


def forget_meshes() -> None:
    """Clear what torch remembers of tensors that are cut, between runs of one process: a later mesh of the same ranks
    would be taken for an earlier one, whose groups are gone."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def _rank_main(rank: int, world_size: int, ports: list[int], work: Callable, arguments: tuple, out: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": LOOPBACK, "SPARE_PORTS": ",".join(map(str, ports)), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    use_new_port()
    torch.set_num_threads(1)
    try:
        answer = {"result": work(*arguments)}
    except Exception:
        answer = {"error": traceback.format_exc()}
    (Path(out) / f"{rank}.json").write_text(json.dumps(answer))
    if "error" in answer:
        raise SystemExit(1)


def run_ranks(world_size: int, work: Callable, *arguments: object, may_die: bool = False) -> list:
    """Call `work(*arguments)` on `world_size` new processes; returns each rank's (JSON-like) result.

    Args:
        may_die: a rank that raises or is killed is part of the test: its result is None. At least one must be killed.
    Raises:
        AssertionError: a rank raised, or none was killed; their tracebacks are the message.
    """
    with tempfile.TemporaryDirectory() as out:
        context = torch.multiprocessing.get_context("forkserver")
        # Importing takes longer than most tests, so it is done once, in the process that the ranks are forked from.
        context.set_forkserver_preload(["torch", "torch._dynamo", "train_my_ddp", "tests.dist.group"])
        # As under torchrun, the stores are there before the ranks: a rank that asks too early has to wait half a
        # second.
        stores = [serve_store(bind(LOOPBACK, 0), 600.0) for _ in range(MAX_JOBS)]
        ports = [store.port for store in stores]
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, ports, work, arguments, out))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=600)
        was_killed = any(process.exitcode == -signal.SIGKILL for process in processes)
        for process in processes:
            if process.is_alive():
                process.kill()
        answers = []
        for rank in range(world_size):
            path = Path(out) / f"{rank}.json"
            answers.append(json.loads(path.read_text()) if path.exists() else {"error": f"rank {rank} left no result"})
        errors = [answer["error"] for answer in answers if "error" in answer]
        assert was_killed if may_die else not errors, "\n".join(errors)
        return [answer.get("result") for answer in answers]

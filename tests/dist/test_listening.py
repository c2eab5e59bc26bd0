"""Ports that a job listens on while it trains: real processes, started as usual."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.listen import LOOPBACK, bind

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, pathlib, sys
import psutil, torch
from parallel.context import destroy_context, init_context

def main() -> None:
    context = init_context("cpu")
    assert context.all_sum(torch.tensor([1.0])).item() == context.world_size
    launcher = [psutil.Process(os.getppid())] if "TORCHELASTIC_RUN_ID" in os.environ else []
    here = [c.laddr.ip for process in [psutil.Process(), *launcher] for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN]
    everywhere = context.gather(here)
    if context.is_main:
        pathlib.Path(sys.argv[1]).write_text(json.dumps(everywhere))
    destroy_context(context)

# A group that lives on into the interpreter's end can abort it.
main()
"""


@pytest.mark.parametrize("how, listeners", [("launcher", [3, 3]), ("environment", [3, 2]), ("alone", [0])])
def test_a_job_on_one_machine_listens_only_on_loopback(tmp_path: Path, how: str, listeners: list[int]):
    """Each rank listens once for each of its two groups; there is one further store: the launcher's or, without a
    launcher, rank 0's."""
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    env = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name} | {"PYTHONPATH": str(ROOT)}
    command, envs = [sys.executable, str(script), str(out)], [env]
    if how == "launcher":
        command[1:1] = ["-m", "parallel.launch", "--standalone", "--nproc_per_node=2"]
    if how == "environment":
        with bind(LOOPBACK, 0) as free:
            port = str(free.getsockname()[1])
        meet = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        envs = [env | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    ranks = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in envs]
    assert [rank.communicate(timeout=100)[1] for rank in ranks if rank.wait(100)] == []
    found = json.loads(out.read_text())
    assert [len(addresses) for addresses in found] == listeners
    assert {address for addresses in found for address in addresses} <= {LOOPBACK}

"""docs/launch/launch.sh used as documented, on two hosts: namespaces with separate networks and disks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from checkpoint.folder import list_checkpoints
from dataset import audit
from runs.reslog import read_reslog
from tests.conftest import SEQ_LEN
from tests.dist.test_monitor_hosts import can_make_namespaces, two_namespaces

SCRIPT = Path(audit.__file__).parents[1] / "docs" / "launch" / "launch.sh"
STEPS = 80
CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True,
    "max_seq_len": SEQ_LEN, "train_batch_size": 2, "gradient_accumulation_steps": 2, "dtype": "float32",
    "device": "cpu", "num_threads": 1, "valid_iters": 2, "save_interval": 20, "learning_rate": 1e-2,
    "max_iters": STEPS,
}  # fmt: skip


class TwoHosts:
    """Two namespaces in which each host has its own folder as the run directory."""

    def __init__(self, namespaces: list[str], directory: Path, data_dir: Path):
        self.namespaces, self.run_dir = namespaces, directory / "run"
        self.disks = [directory / f"disk-{number}" for number in range(2)]
        self.logs = [directory / f"host-{number}.log" for number in range(2)]
        for path in (self.run_dir, *self.disks):
            path.mkdir()
        (directory / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
        # The script would keep variables that are already set.
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "NCCL_", "PORT"))
        }
        self.env = inherited | {
            "HOSTS": "10.79.0.1 10.79.0.2", "DATA_DIR": str(data_dir), "OUT_DIR": str(self.run_dir),
            "CONFIG": str(directory / "tiny.yaml"), "NPROC_PER_NODE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def start(self) -> list[subprocess.Popen]:
        """Run the same command on both."""
        started = []
        for namespace, disk, log in zip(self.namespaces, self.disks, self.logs):
            own_disk = f'mount --make-rprivate / && mount --bind {disk} {self.run_dir} && exec "$@"'
            command = ["ip", "netns", "exec", namespace, "sh", "-c", own_disk, "sh", SCRIPT]
            with open(log, "ab") as output:
                started.append(subprocess.Popen(command, env=self.env, stdout=output, stderr=output))
        return started

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def records(self, name: str) -> list[dict]:
        return [r for r in read_reslog(self.disks[0] / "reslog.jsonl") if r["name"] == name]

    def has_step(self, step: int) -> bool:
        return (self.disks[0] / "reslog.jsonl").exists() and any(r["step"] >= step for r in self.records("train"))

    def sent_bytes(self, number: int) -> int:
        """Run a command on a host, over the link between the two."""
        command = ["ip", "netns", "exec", self.namespaces[number], "cat", "/sys/class/net/data/statistics/tx_bytes"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def listening(self) -> set[tuple[int, str]]:
        """(host, address) of every TCP listener."""
        found = set()
        for number, namespace in enumerate(self.namespaces):
            command = ["ip", "netns", "exec", namespace, "ss", "--no-header", "--tcp", "--listening", "--numeric"]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            found |= {(number, line.split()[3].rpartition(":")[0]) for line in lines}
        return found

    def kill_processes(self, number: int) -> None:
        command = ["ip", "netns", "pids", self.namespaces[number]]
        for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_one_command_on_two_hosts(data_dir: Path, tmp_path: Path):
    """They find each other and train over the link that HOSTS names. One host's processes are killed, and the other
    follows; the same command goes on from the checkpoint to the end."""
    if not can_make_namespaces():
        pytest.skip("needs root and network namespaces")
    with two_namespaces() as namespaces, contextlib.ExitStack() as stack:
        hosts = TwoHosts(namespaces, tmp_path, data_dir)
        for number in range(2):
            stack.callback(hosts.kill_processes, number)
        first, second = hosts.start()
        deadline = time.monotonic() + 120
        while not hosts.has_step(30):
            assert first.poll() is second.poll() is None and time.monotonic() < deadline, hosts.output()
            time.sleep(0.05)
        assert hosts.listening() == {(0, "10.79.0.1"), (1, "10.79.0.2")}, "on the link that HOSTS names alone"
        hosts.kill_processes(1)
        assert first.wait(120) == 1 and second.wait(120) != 0, hosts.output()
        said = hosts.logs[0].read_text()
        assert "[10.79.0.2]" in said and "by peer" in said, "gloo names the address that has gone"
        assert min(hosts.sent_bytes(0), hosts.sent_bytes(1)) > 30 * 500_000, "the gradients of 30 steps"
        first, second = hosts.start()
        assert [first.wait(120), second.wait(120)] == [0, 0], hosts.output()
    starts = hosts.records("start")
    assert [start["world_size"] for start in starts] == [2, 2]
    assert starts[0]["step"] == 0 and starts[1]["step"] >= 20 and starts[1]["step"] % 20 == 0
    assert {record["step"] for record in hosts.records("train")} == set(range(1, STEPS + 1))
    steps = [[checkpoint.step for checkpoint in list_checkpoints(disk / "ckpt")] for disk in hosts.disks]
    assert steps[0] == steps[1] and steps[0][-1] == STEPS
    assert (hosts.disks[1] / "exit" / "rank-1.json").exists() and not (hosts.disks[1] / "exit" / "rank-0.json").exists()
    assert audit.main([str(hosts.disks[0])]) == 0

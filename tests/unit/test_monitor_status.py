"""The status file and what `--status` says of it."""

import json
import os
import time
from pathlib import Path

import pytest

from monitor.status import Status, describe, last_loss, planned_steps

NOW = 1_700_000_000.0


def status(**values: object) -> Status:
    """Of a monitor that is alive and wrote just now."""
    return Status(**{"monitor_pid": os.getpid(), "hosts": ["this machine"], "updated": NOW} | values)


def test_what_is_written_is_read(tmp_path: Path):
    run = tmp_path / "my run"
    (run / "monitor").mkdir(parents=True)
    before = time.time()
    written = Status("running", 7, ["a", "b"], 3, 1, "step", 2, 5, 10, 0.25, 4, "why: ü", 0.0)
    written.write(run)
    assert before <= written.updated <= time.time()
    assert Status.read(run) == written
    assert os.listdir(run / "monitor") == ["status.json"]


def test_there_is_none(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^no monitor has looked after .*: .*status.json does not exist$"):
        Status.read(tmp_path)


DAMAGED = ["", "{", "[]", "null", "3", '{"what": 1}', "\xff"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file(tmp_path: Path, content: str):
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / "status.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"status.json cannot be read: ") as caught:
        Status.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"monitor_pid": "x"}, {"step": "five"}, {"hosts": None}, {"attempt": None}])
def test_a_value_of_another_type_is_damage_too(tmp_path: Path, values: dict):
    """Read by the next monitor, which counts its launches on from there."""
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / "status.json").write_text(json.dumps(status().__dict__ | values))
    with pytest.raises(ValueError, match=r"status.json cannot be read: "):
        Status.read(tmp_path)


def test_running():
    running = status(
        state="running", attempt=2, restarts=1, phase="step", ranks=2, step=40, max_iters=100, seconds_per_step=2.0,
        checkpoint=30, last_ending="rank 1: OSError: gone",
    )  # fmt: skip
    assert describe(running, 1.23456, NOW + 1) == [
        "running",
        "step 40 of 100, loss 1.2346",
        "2.000 s a step",
        f"expected to end {time.strftime('%Y-%m-%d %H:%M', time.localtime(NOW + 120))} (2:00 left)",
        "newest checkpoint: step 30",
        "2 ranks in phase step on this machine; 2 launches, 1 restart by this monitor",
        "last launch ended: rank 1: OSError: gone",
    ]


def test_starting():
    assert describe(status(attempt=1), None, NOW) == [
        "starting", "no checkpoint yet", "0 ranks on this machine; 1 launch, 0 restarts by this monitor",
    ]  # fmt: skip


@pytest.mark.parametrize("state", ["waiting", "refused", "failed", "stopped"])
def test_states_with_a_reason(state: str):
    lines = describe(status(state=state, last_ending="because"), None, NOW)
    assert lines[0] == f"{state}: because"
    # Once is enough.
    assert not any("because" in line for line in lines[1:])


def test_finished_says_so_once():
    assert describe(status(state="finished", last_ending="finished", step=9, max_iters=9), 1.0, NOW)[0] == "finished"


@pytest.mark.parametrize("state", ["finished", "refused", "failed", "stopped"])
def test_an_end_stays_an_end(state: str):
    """Days later, with the monitor long gone."""
    ended = status(state=state, monitor_pid=0, step=5, max_iters=9, seconds_per_step=1.0, last_ending="x")
    lines = describe(ended, None, NOW + 1e6)
    assert lines[0].startswith(state)
    assert not any("left" in line for line in lines)


@pytest.mark.parametrize("state", ["starting", "running", "waiting", "stopping"])
def test_a_monitor_that_is_gone(state: str):
    """Killed, or on another machine that does not write any more."""
    expected = f"no monitor is at work: the last one wrote 0:05 ago, when it was {state}"
    assert describe(status(state=state, monitor_pid=0), None, NOW + 5)[0] == expected
    expected = f"no monitor is at work: the last one wrote 1:30 ago, when it was {state}"
    assert describe(status(state=state), None, NOW + 90)[0] == expected
    # A look that takes long is none.
    assert describe(status(state=state), None, NOW + 20)[0].startswith(state)


def test_the_last_loss(tmp_path: Path):
    path = tmp_path / "reslog.jsonl"
    assert last_loss(tmp_path) is None
    path.write_text("")
    assert last_loss(tmp_path) is None
    lines = [{"name": "start"}, {"name": "train", "loss": 3.0}, {"name": "train", "loss": 2.5}]
    lines.append({"name": "valid", "loss": 1.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "train", "loss": 1.')
    assert last_loss(tmp_path) == 2.5


def test_the_last_loss_of_a_long_log(tmp_path: Path):
    """Read from its end; a line that is cut off at the beginning of what is read is none."""
    with open(tmp_path / "reslog.jsonl", "w") as file:
        for step in range(5000):
            file.write(json.dumps({"name": "train", "step": step, "loss": float(step)}) + "\n")
    assert last_loss(tmp_path) == 4999.0


def test_planned_steps(tmp_path: Path):
    assert planned_steps(tmp_path) is None
    for text in ("", "[", "derived: 3", "derived: {max_iters: x}", "- a"):
        (tmp_path / "config.yaml").write_text(text)
        assert planned_steps(tmp_path) is None
    (tmp_path / "config.yaml").write_text("max_iters: 0\nderived: {max_iters: 12}\n")
    assert planned_steps(tmp_path) == 12

"""The status file, and the answer of `--status` to it."""

import errno
import json
import math
import os
import time
from pathlib import Path

import pytest

from monitor import status as status_module
from monitor.status import Status, describe, last_loss, planned_steps

NOW = 1_700_000_000.0


def status(**values: object) -> Status:
    """Status of a monitor that is alive and wrote just now."""
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


DAMAGED = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b'{"what": 1}', b"\xff", b"\0" * 99, b"NaN", b"[" * 100_000,
    b'{"a":' * 100_000, b"9" * 5000, b" " * (2 << 20), json.dumps(status().__dict__).encode()[:-9],
    json.dumps(status().__dict__ | {"what\x1b[2J": 1}).encode(), b'{"\\ud800": 1}',
]  # fmt: skip


def write(run: Path, content: bytes) -> Path:
    path = run / "monitor" / "status.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def refused(run: Path) -> str:
    """One sentence about an invalid status file."""
    with pytest.raises(ValueError) as caught:
        Status.read(run)
    said = str(caught.value)
    assert said.startswith(f"{run / 'monitor' / 'status.json'} cannot be read: ") and said.isprintable()
    assert len(said) < 500
    return said


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:20]))
def test_a_damaged_file(tmp_path: Path, content: bytes):
    write(tmp_path, content)
    refused(tmp_path)


def test_something_else_in_its_place(tmp_path: Path):
    path = tmp_path / "monitor" / "status.json"
    path.mkdir(parents=True)
    assert "it is not a file" in refused(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    assert "it is not a file" in refused(tmp_path)
    path.unlink()
    path.symlink_to(path)
    refused(tmp_path)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("")
    with pytest.raises(ValueError, match="no monitor has looked after"):
        Status.read(tmp_path)


def test_a_disk_that_does_not_answer_is_no_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(status_module, "read_small", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Status.read(tmp_path)
    # An answer that is missed once: the supervisor asks again.
    assert planned_steps(tmp_path) is None


ODD = [None, True, -1, 10**400, 10**30, 1 << 63, math.nan, math.inf, -math.inf, 1e300, 1.5, "x", [], [[1]], {}]


@pytest.mark.parametrize("name", list(status().__dict__))
def test_odd_values_are_said_or_refused(tmp_path: Path, name: str):
    """Never a traceback, and nothing that a terminal would obey."""
    for value in [*ODD, "\x1b[2J\n", ["\x1b[2J\n"]]:
        running = status(state="running", step=3, max_iters=9, seconds_per_step=1.0).__dict__
        write(tmp_path, json.dumps(running | {name: value}).encode())
        try:
            read = Status.read(tmp_path)
        except ValueError:
            assert name in refused(tmp_path)
        else:
            assert all(line.isprintable() for line in describe(read, None, NOW))
    del running[name]
    write(tmp_path, json.dumps(running).encode())
    assert f"{name} is missing" in refused(tmp_path)


def test_the_greatest_values_can_be_shown():
    far = status(state="running", step=0, max_iters=1 << 53, seconds_per_step=1e9, updated=1e11)
    assert any("in thousands of years" in line for line in describe(far, 1e300, 0.0))
    assert "step 9 of 3" in describe(status(state="running", step=9, max_iters=3, seconds_per_step=1e9), 1.0, 0.0)[1]


@pytest.mark.parametrize("values", [{"monitor_pid": "x"}, {"step": "five"}, {"hosts": None}, {"attempt": None}])
def test_a_value_of_another_type_is_damage_too(tmp_path: Path, values: dict):
    """The next monitor reads it and continues its count of launches."""
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
    """The monitor was killed, or is on another machine that does not write any more."""
    expected = f"no monitor is at work: the last one wrote 0:05 ago, when it was {state}"
    assert describe(status(state=state, monitor_pid=0), None, NOW + 5)[0] == expected
    expected = f"no monitor is at work: the last one wrote 1:30 ago, when it was {state}"
    assert describe(status(state=state), None, NOW + 90)[0] == expected
    # A slow look does not count.
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
    """The file is read from its end, and a line cut off at its beginning is ignored."""
    with open(tmp_path / "reslog.jsonl", "w") as file:
        for step in range(5000):
            file.write(json.dumps({"name": "train", "step": step, "loss": float(step)}) + "\n")
    assert last_loss(tmp_path) == 4999.0


@pytest.mark.parametrize("value", ["1" + "0" * 400, "[1]", "{}", "null", "true", '"x"', "1" + "0" * 5000, "-"])
def test_a_loss_that_is_no_number_is_passed_over(tmp_path: Path, value: str):
    log = f'{{"name": "train", "loss": 2.5}}\n{{"name": "train", "loss": {value}}}\n'
    log += "[" * 60_000 + '\n3\nnull\n"x"\n{"name": ["train"], "loss": 1}\n\0\n'
    (tmp_path / "reslog.jsonl").write_text(log)
    assert last_loss(tmp_path) == 2.5


def test_planned_steps(tmp_path: Path):
    assert planned_steps(tmp_path) is None
    texts = ["", "[", "derived: 3", "- a", "[" * 600, "!!timestamp x", "!!int ''", "a: 1" + ":1" * 200_000, "\0"]
    values = ["x", ".inf", ".nan", "-1", "9" * 400, "9" * 5000, "true", "[1]", "1.5", "", "{a: 1}", "!!timestamp x"]
    for text in [*texts, *(f"derived: {{max_iters: {value}}}" for value in values)]:
        (tmp_path / "config.yaml").write_text(text)
        assert planned_steps(tmp_path) is None
    (tmp_path / "config.yaml").write_text("max_iters: 0\nderived: {max_iters: 12}\n")
    assert planned_steps(tmp_path) == 12

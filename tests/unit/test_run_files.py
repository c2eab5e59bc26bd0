"""The run directory's small files: results, heartbeats, exit records."""

import json
import subprocess
import sys
from pathlib import Path

import utils.logging
from configurator import Derived, parse_config
from training.describe import _batch
from utils.exits import (
    CRASH,
    OK,
    STOPPED,
    WRONG_INPUT,
    clear_exit_record,
    clear_gone_ranks,
    read_exit_records,
    verdict,
    write_exit_record,
)
from utils.heartbeat import Heartbeat
from utils.reslog import ResLog, count_launches, read_reslog


def test_a_torn_last_line_gets_its_newline(tmp_path: Path):
    path = tmp_path / "reslog.jsonl"
    first = ResLog(path)
    first.write("train", step=1, loss=2.0)
    first.close()
    with open(path, "ab") as file:
        file.write(b'{"name": "train", "step": 2, "lo')
    again = ResLog(path)
    again.write("train", step=2, loss=float("nan"))
    again.close()
    assert len(path.read_bytes().splitlines()) == 3
    assert [(r["step"], r["loss"]) for r in read_reslog(path)] == [(1, 2.0), (2, "nan")]


def test_a_record_is_on_disk_at_once(tmp_path: Path):
    log = ResLog(tmp_path / "reslog.jsonl")
    log.write("train", step=1)
    assert json.loads((tmp_path / "reslog.jsonl").read_text())["step"] == 1


def test_a_later_launch_supersedes_lost_steps(tmp_path: Path):
    log = ResLog(tmp_path / "reslog.jsonl")
    log.write("start", step=0)
    for step in (1, 2, 3):
        log.write("train", step=step, loss=step)
    log.write("start", step=2)
    log.write("train", step=3, loss=30)
    records = read_reslog(tmp_path / "reslog.jsonl")
    assert [(r["step"], r["loss"]) for r in records if r["name"] == "train"] == [(1, 1), (2, 2), (3, 30)]
    assert count_launches(tmp_path / "reslog.jsonl") == 2


def test_readers_skip_what_is_no_record(tmp_path: Path):
    path = tmp_path / "reslog.jsonl"
    path.write_bytes(
        b'[1]\n"x"\n\xff\xfe\n{"no": "name"}\n{"name": "train", "step": 1}\n{"name": "train", "time": 1, "step": "1"}\n'
        b'{"name": "start", "time": 1}\n{"name": "train", "time": 2.5, "step": 1}\n' + b"[" * 100_000 + b"\n"
    )
    assert read_reslog(path) == [{"name": "train", "time": 2.5, "step": 1}]


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, caplog):
    log = ResLog(Path("/dev/full")) if Path("/dev/full").exists() else None
    assert log is not None, "this test needs /dev/full"
    for step in range(3):
        log.write("train", step=step)
    (tmp_path / "rank-0.json").symlink_to("/dev/full")
    heart = Heartbeat(tmp_path, 0)
    for step in range(3):
        heart.beat("step", step)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "results cannot be written" in messages[0] and "heartbeats" in messages[1]


def test_a_full_disk_under_the_log_and_the_console_does_not_stop_the_run(tmp_path: Path):
    """The console is a file, too, where the monitor started the run: seen in the chaos campaign."""
    program = """
import logging, sys
from pathlib import Path
from utils.logging import add_log_file, setup_console
setup_console(0)
add_log_file(Path(sys.argv[1]), 0)
for step in range(2000):
    logging.getLogger("train").info("step %d of a run whose disk is full", step)
Path(sys.argv[2]).write_text("lives")
"""
    (tmp_path / "train.log").symlink_to("/dev/full")
    command = [sys.executable, "-c", program, str(tmp_path / "train.log"), str(tmp_path / "end")]
    root = Path(utils.logging.__file__).parent.parent
    with open("/dev/full", "w") as full:
        subprocess.run(command, stdout=full, stderr=full, cwd=root, timeout=60)
    assert (tmp_path / "end").read_text() == "lives"


def test_heartbeat(tmp_path: Path):
    heart = Heartbeat(tmp_path / "heartbeat", 3)
    heart.beat("step", 7)
    record = json.loads((tmp_path / "heartbeat" / "rank-3.json").read_text())
    assert (record["rank"], record["phase"], record["step"]) == (3, "step", 7)


def test_verdict():
    assert verdict([OK, OK], 2) == OK
    assert verdict([STOPPED, STOPPED], 2) == STOPPED
    assert verdict([CRASH, WRONG_INPUT, STOPPED], 3) == WRONG_INPUT
    assert verdict([STOPPED, OK], 2) == CRASH
    assert verdict([STOPPED, -9], 2) == CRASH
    # A rank that left no record died.
    assert verdict([OK], 2) == verdict([STOPPED], 2) == verdict([], 1) == CRASH


def test_exit_records(tmp_path: Path):
    for rank in range(4):
        write_exit_record(tmp_path, rank, STOPPED, "x", 5)
    for rank in range(2):
        clear_exit_record(tmp_path, rank)
    assert read_exit_records(tmp_path, world_size=2) == []
    assert [r["rank"] for r in read_exit_records(tmp_path)] == [2, 3]
    write_exit_record(tmp_path, 1, OK, "finished", None)
    clear_gone_ranks(tmp_path, 2)
    (record,) = read_exit_records(tmp_path)
    assert record.pop("time") > 0 and record == {"rank": 1, "code": 0, "reason": "finished", "step": None}


def test_a_step_that_takes_more_samples_than_there_are_is_said():
    config, _ = parse_config(["--data_dir=d", "--task_type=sft"])
    assert _batch(config, Derived(64, 1), 13) == (
        "batch: 64 rows a step, 1 step, 4.92 epochs; a step takes more rows than there are (13): lower "
        "--train_batch_size or --gradient_accumulation_steps"
    )
    assert _batch(config, Derived(13, 2), 13) == "batch: 13 rows a step, 2 steps, 2.00 epochs"
    config, _ = parse_config(["--data_dir=d", "--task_type=sft", "--no-packing"])
    assert _batch(config, Derived(13, 2), 13) == "batch: 13 samples a step, 2 steps, 2.00 epochs"

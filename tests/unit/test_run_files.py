"""The run directory's small files: results, heartbeats, exit records."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import utils.logging
from configurator import parse_config
from runs import reslog as reslog_module
from runs.exits import (
    CRASH,
    OK,
    STOPPED,
    WRONG_INPUT,
    clear_exit_record,
    clear_gone_ranks,
    is_told_by_lower_rank,
    read_exit_records,
    verdict,
    write_exit_record,
)
from runs.heartbeat import Heartbeat, read_heartbeats
from runs.reslog import LONGEST_LINE, ResLog, count_launches, read_reslog
from training.config import Derived
from training.describe import _batch
from training.summary import _validation


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


def test_readers_skip_lines_that_are_not_records(tmp_path: Path):
    path = tmp_path / "reslog.jsonl"
    path.write_bytes(
        b'[1]\n"x"\n\xff\xfe\n{"no": "name"}\n{"name": "train", "step": 1}\n{"name": "train", "time": 1, "step": "1"}\n'
        b'{"name": "start", "time": 1}\n{"name": "train", "time": 2.5, "step": 1}\n' + b"[" * 100_000 + b"\n"
    )
    assert read_reslog(path) == [{"name": "train", "time": 2.5, "step": 1}]


def random_log(random_: random.Random, count: int, starts: float) -> list[dict]:
    """Steps that rise and sometimes fall, and launches that go back, or begin far ahead."""
    records, step = [], 0
    for number in range(count):
        step = max(step + random_.choice((-3, 0, 1, 1, 1, 2)), 0)
        name = "start" if random_.random() < starts else random_.choice(("train", "valid", "note"))
        record = {"name": name, "time": float(number), "step": step}
        if name == "start":
            record["step"] = step = max(step - random_.randrange(12), 0)
        elif name == "note" and random_.random() < 0.5:
            del record["step"]
        records.append(record)
    return records


def that_stand(records: list[dict]) -> list[dict]:
    """As in the description of the format, launch by launch."""
    kept: list[dict] = []
    for record in records:
        if record["name"] == "start":
            kept = [r for r in kept if r["name"] == "start" or r.get("step", 0) <= record["step"]]
        kept.append(record)
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_records_that_stand(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reslog_module, "_READ_BETWEEN_PASSES", (1, 7, 10_000)[seed % 3], raising=False)
    records = random_log(random.Random(seed), 300, (0.02, 0.5)[seed % 2])
    path = tmp_path / "reslog.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = that_stand(records)
    assert read_reslog(path) == expected
    for names in (("valid",), ("start", "note"), ()):
        assert read_reslog(path, names) == [record for record in expected if record["name"] in names]


class Counting(dict):
    """A record that counts how often its values are read."""

    looks = 0

    def get(self, *args: object) -> object:
        Counting.looks += 1
        return super().get(*args)

    def __getitem__(self, key: str) -> object:
        Counting.looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("names", [None, ("valid",)])
def test_the_work_is_in_proportion_to_the_log(names: tuple | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of thousands of launches must not search all earlier records."""
    parse, path = reslog_module.parse_record, tmp_path / "reslog.jsonl"
    monkeypatch.setattr(reslog_module, "parse_record", lambda line: Counting(parse(line)))
    monkeypatch.setattr(reslog_module, "_READ_BETWEEN_PASSES", 10, raising=False)
    for count in (300, 1200):
        lines = [f'{{"name": "{name}", "time": 1, "step": {n}}}\n' for n in range(count) for name in ("start", "valid")]
        path.write_text("".join(lines))
        Counting.looks = 0
        assert len(read_reslog(path, names)) == count * (1 if names else 2)
        assert Counting.looks <= 12 * len(lines)


def test_a_line_that_never_ends_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    longest, parse = [], reslog_module.parse_record
    monkeypatch.setattr(reslog_module, "parse_record", lambda line: longest.append(len(line)) or parse(line))
    path = tmp_path / "reslog.jsonl"
    fits, good = b'{"name": "a", "time": 1, "x": "%s"}', b'{"name": "b", "time": 1}'
    fits %= b"x" * (LONGEST_LINE - len(fits) + 2)
    too_long, far_too_long = b"y" * (LONGEST_LINE + 1), b"z" * (3 * LONGEST_LINE)
    for end in (b"", b"\n"):
        path.write_bytes(b"\n".join([good, fits, good, too_long, good, far_too_long + end]))
        assert [record["name"] for record in read_reslog(path)] == ["b", "a", "b", "b"]
    assert max(longest) <= LONGEST_LINE + 2


def test_odd_validations_do_not_stop_the_summary(tmp_path: Path):
    path = tmp_path / "reslog.jsonl"
    odd = [("2.5", 1), ("null", 2), ("true", 3), ("[1]", 4), ("1" + "0" * 400, 5), ('"nan"', 6), ("2.0", "null"),
           ("3", 9)]  # fmt: skip
    path.write_text("".join(f'{{"name": "valid", "time": 1, "loss": {loss}, "step": {step}}}\n' for loss, step in odd))
    assert _validation(path) == ["3.0000 in validation at step 9 (lowest 2.5000 at step 1)"]
    path.write_text('{"name": "valid", "time": 1, "loss": 1e300, "step": 1}\n{"name": "valid", "time": 1}\n')
    assert _validation(path) == ["1e+300 in validation at step 1"]


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
    """The console is a file, too, if the monitor started the run: seen in the chaos campaign."""
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


ODD_FILES = [
    b"", b"{", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff", b"\0" * 99, b"NaN", b"[" * 100_000, b'{"a":' * 100_000,
    b"9" * 5000, b" " * (2 << 20),
]  # fmt: skip
ODD = [None, True, -1, 10**400, 1 << 63, math.nan, math.inf, 1e300, 1.5, "x", [], {}]
READERS = {
    "exit": (read_exit_records, {"rank": 0, "code": 75, "reason": "r", "step": 3, "time": 1.0}),
    "heartbeat": (read_heartbeats, {"rank": 0, "world_size": 2, "pid": 9, "launch": "t", "phase": "step", "step": 3,
                                    "time": 1.0, "monotonic": 2.0}),
}  # fmt: skip


def use(record: dict) -> None:
    """Used as monitors do: they count, compare, show and look for the process."""
    for name, value in record.items():
        if name in ("reason", "launch", "phase"):
            assert value + "" == value
        elif value is not None or name != "step":
            assert math.isfinite(value + 1.0)
    assert 0 < record.get("pid", 1) < 1 << 31 and record["rank"] == 0


@pytest.mark.parametrize("reader", READERS)
def test_odd_records_count_as_not_there(reader: str, tmp_path: Path):
    read, good = READERS[reader]
    path = tmp_path / "rank-0.json"
    for content in ODD_FILES:
        path.write_bytes(content)
        assert read(tmp_path) == []
    for name in good:
        for value in ODD:
            path.write_text(json.dumps(good | {name: value}))
            for record in read(tmp_path):
                use(record)
    path.write_text(json.dumps(good))
    # Beside a good record, whatever else is there.
    (tmp_path / "rank-1.json").write_text(json.dumps(good))
    (tmp_path / "rank-2.json").mkdir()
    (tmp_path / "rank-3.json").symlink_to(tmp_path / "rank-3.json")
    os.mkfifo(tmp_path / "rank-4.json")
    for name in ("rank-x.json", "rank-\u00b2.json", "rank-.json"):
        (tmp_path / name).write_text(json.dumps(good))
    assert read(tmp_path) == [good]
    clear_gone_ranks(tmp_path / "nowhere", 1)


def test_a_strange_name_among_the_exit_records_does_not_stop_a_launch(tmp_path: Path):
    names = ["rank-0.json", "rank-x.json", "rank-.json", "rank-\u00b2.json", "rank--1.json"]
    for name in [*names, "rank-7.json"]:
        (tmp_path / name).write_text("{}")
    clear_gone_ranks(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


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
    assert _batch(config.run, config.data, Derived(64, 1), 13) == (
        "batch: 64 rows a step, 1 step, 4.92 epochs; a step takes more rows than there are (13): lower "
        "--train_batch_size or --gradient_accumulation_steps"
    )
    assert _batch(config.run, config.data, Derived(13, 20), 13) == "batch: 13 rows a step, 20 steps, 20.00 epochs"
    config, _ = parse_config(["--data_dir=d", "--task_type=sft", "--no-packing", "--max_iters=19"])
    few = "; so few steps teach little: lower --train_batch_size or --gradient_accumulation_steps, or raise --max_iters"
    expected = f"batch: 13 samples a step, 19 steps, 19.00 epochs{few}"
    assert _batch(config.run, config.data, Derived(13, 19), 13) == expected
    config, _ = parse_config(["--data_dir=d"])
    assert _batch(config.run, config.data, Derived(13, 2), 13).endswith("2 steps, 2.00 epochs")


def test_a_mistake_that_all_ranks_find_is_told_once(tmp_path: Path):
    write_exit_record(tmp_path, 0, WRONG_INPUT, "wrong", None, launch="now")
    assert is_told_by_lower_rank(tmp_path, 2, "wrong", "now", patience_s=0)
    assert not is_told_by_lower_rank(tmp_path, 0, "wrong", "now", patience_s=0)
    assert not is_told_by_lower_rank(tmp_path, 2, "something else", "now", patience_s=0)
    assert not is_told_by_lower_rank(tmp_path, 2, "wrong", "later", patience_s=0)

"""A run that is killed, hung, stopped and damaged ends the same, to the bit, as one that was left alone."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.faults import KINDS
from tests.chaos.read_errors import ERRORS, ReadErrors, build_library
from tests.chaos.references import LeftOut, Skipped, check_announced, deviations
from tests.chaos.report import Report
from tests.chaos.run import SETUPS, Broken, Run

SHORT = ("kill_monitor", "save_before_rename_0", "stop_rank", "ckpt_flip")


def check(report: Report, effects: int) -> None:
    assert not report.failures, "\n".join(report.failures)
    assert sum(counts["had effect"] for counts in report.faults.values()) >= effects, report.figures()


READING = """
import os, sys
def attempt(call):
    try:
        return bool(call())
    except OSError as error:
        return error.errno
file, folder = sys.argv[1] + "/ckpt/step-5/manifest.json", sys.argv[1] + "/ckpt"
print([attempt(lambda: open(file).read()), attempt(lambda: os.stat(file)), attempt(lambda: os.listdir(folder)),
       attempt(lambda: open(file, "ab"))])
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_reads_fail_while_they_are_armed_and_only_those(tmp_path: Path):
    """[reads a file, stats it, lists its folder, opens it to write], as a rank and as another process."""
    checkpoint = tmp_path / "ckpt" / "step-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    errors = ReadErrors(build_library(tmp_path), tmp_path)

    def read(**env: str) -> list:
        command = [sys.executable, "-c", READING, str(tmp_path)]
        return json.loads(subprocess.run(
            command, env=os.environ | errors.environment | env, capture_output=True, text=True, check=True
        ).stdout.replace("True", "true"))  # fmt: skip

    with errors.armed("EIO", "*/ckpt/step-*/manifest.json", who="ranks", what="read"):
        assert read(RANK="1") == [ERRORS["EIO"], True, True, True]
        assert errors.hits() == 1
        assert read() == [True] * 4
    with errors.armed("ESTALE", "*/manifest.json", "*/ckpt"):
        assert read() == [ERRORS["ESTALE"]] * 3 + [True]
        assert errors.hits() == 3
    assert read() == [True] * 4


def test_what_sets_a_run_apart_shows_in_its_records(tmp_path: Path):
    """A deviation also needs a fault that gives a reason for it."""

    def train(step: int, first: int, norm: object = 1.0) -> dict:
        return {"name": "train", "time": 1.0, "step": step, "samples": [first, first + 7], "grad_norm": norm}

    start = {"name": "start", "time": 1.0, "step": 2}
    records = [train(1, 0), train(2, 8), train(3, 16, "inf"), start, train(3, 40), train(4, 48, "inf"),
               train(5, 56, "nan"), train(6, 64)]  # fmt: skip
    (tmp_path / "no-data").mkdir()
    run = Run(tmp_path / "home", SETUPS["ddp1"], tmp_path / "no-data", 6, tmp_path)
    (tmp_path / "reslog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = deviations(tmp_path)
    assert found == (LeftOut(2, 40), Skipped(4, 5))
    run.may_leave_out, run.may_skip = {40}, {4, 5}
    check_announced(run, found)
    for left_out, skip in (({40}, {5}), ({32}, {4, 5})):
        run.may_leave_out, run.may_skip = left_out, skip
        with pytest.raises(Broken, match="no fault gave a reason"):
            check_announced(run, found)


@pytest.mark.slow
def test_one_run_survives_four_kinds_of_faults(tmp_path: Path):
    """Each fault once, in an order that the seed gives."""
    campaign = Campaign(1, tmp_path, [replace(KINDS[name], weight=1) for name in SHORT])
    campaign.throw(len(SHORT), order=("ddp2",))
    check(campaign.report, len(SHORT))


@pytest.mark.soak
def test_every_kind_of_fault_in_every_setup(tmp_path: Path):
    campaign = Campaign(2, tmp_path, [replace(kind, weight=1) for kind in KINDS.values()])
    # Kinds that need hosts must find all of them dealt.
    campaign.throw(84, order=("ddp2", "zero1", "ddp1", "powersgd", "ddp2", "ssh1", "ddp2"))
    # A fault in a run's last steps may be too late to show.
    check(campaign.report, 78)
    assert set(campaign.report.faults) | set(campaign.report.skipped) == set(KINDS)

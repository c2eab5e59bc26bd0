"""A run that is killed, hung, stopped and damaged is in the end the same, to the bit, as one that was left alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.faults import KINDS
from tests.chaos.report import Report

SHORT = ("kill_monitor", "save_before_rename_0", "stop_rank", "ckpt_flip")


def check(report: Report, effects: int) -> None:
    assert not report.failures, "\n".join(report.failures)
    assert sum(counts["had effect"] for counts in report.faults.values()) >= effects, report.figures()


@pytest.mark.slow
def test_one_run_survives_four_kinds_of_faults(tmp_path: Path):
    """Each once, in an order that the seed gives."""
    campaign = Campaign(1, tmp_path, [replace(KINDS[name], weight=1) for name in SHORT])
    campaign.throw(len(SHORT), order=("ddp2",))
    check(campaign.report, len(SHORT))


@pytest.mark.soak
def test_every_kind_of_fault_in_every_setup(tmp_path: Path):
    campaign = Campaign(2, tmp_path, list(KINDS.values()))
    campaign.throw(60)
    # One that comes in a run's last steps may be too late to show.
    check(campaign.report, 55)

"""Many clients at once against a real server: see tests/chaos/serving_load.py."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

from tests.chaos.serving_load import Report, flags, run
from tests.served import Server, tiny_tokenizer, write_model

MOST_GROWN_MB = 60
"""By how much the process may grow over the last two fifths of a long load."""


def loaded(home: Path, requests: int, clients: int, blocks: int, max_running: int, alone: int) -> Report:
    folder = write_model(home / "tiny", tiny_tokenizer())
    with Server(folder, home / "log", flags(blocks, max_running, 2 * max_running)) as server:
        report = asyncio.run(run(server, requests, clients, 1, alone))
        said = server.said
    assert not report.faults, "\n".join(report.faults)
    assert "Traceback" not in said
    assert report.outcomes["lost"] == 0 and report.outcomes["answered"] > requests / 2
    assert report.outcomes["left"] and report.outcomes["refused"]
    return report


def test_no_request_is_lost(tmp_path: Path):
    loaded(tmp_path, requests=45, clients=20, blocks=40, max_running=8, alone=5)


@pytest.mark.soak
def test_no_request_is_lost_of_a_thousand(tmp_path: Path):
    report = loaded(tmp_path, requests=1000, clients=64, blocks=40, max_running=32, alone=100)
    assert report.figures["preemptions_total"]
    print(report.table)
    assert report.sizes_mb[-1] - report.sizes_mb[-3] < MOST_GROWN_MB, report.sizes_mb

"""What an evaluation leaves: figures with their intervals, and files that are whole or not there."""

import json
import math
from pathlib import Path

import pytest

from evaluation.results import (
    RESULTS_NAME,
    Figure,
    Results,
    TaskResult,
    mean_figure,
    read_results,
    samples_path,
    write_results,
    write_samples,
)


def within(share: float, found: float, count: int) -> bool:
    """Whether a share that was found lies within 95% of what a true share gives: Wilson's interval holds these."""
    return abs(found - share) <= 1.959964 * math.sqrt(share * (1 - share) / count) + 1e-12


@pytest.mark.parametrize("good, count", [(0, 16), (16, 16), (3, 16), (50, 400), (1, 2)])
def test_the_interval_of_a_share(good: int, count: int) -> None:
    figure = mean_figure([1.0] * good + [0.0] * (count - good))
    low, high = figure.interval  # type: ignore[misc]
    assert 0 <= low <= figure.value <= high <= 1 and low < high
    for share in (n / 10_000 for n in range(1, 10_000)):
        if abs(share - low) > 1e-4 and abs(share - high) > 1e-4:
            assert within(share, good / count, count) == (low < share < high)


def test_other_figures_have_the_normal_interval() -> None:
    figure = mean_figure([2.0, 3.0, 4.0, 7.0])
    assert figure.value == 4.0 and figure.error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert figure.interval == pytest.approx((4 - 1.959964 * figure.error, 4 + 1.959964 * figure.error))
    # Between 0 and 1, but no share.
    parts = mean_figure([0.5, 0.5, 0.75])
    assert parts.interval == pytest.approx((parts.value - 1.959964 * parts.error, parts.value + 1.959964 * parts.error))  # type: ignore[operator]
    assert Figure(0.5, None, 10).interval is None and mean_figure([1.0]).interval is None


def test_files(tmp_path: Path) -> None:
    result = TaskResult("a/b", {"acc": Figure(0.5, 0.1, 20), "bits": Figure(1.5, None, 3, False)}, "1", {"limit": 3})
    results = Results({"path": "x", "step": 3}, {"a/b": result}, {"torch": "2"}, ("evaluate ...",))
    write_results(tmp_path, results)
    assert read_results(tmp_path) == results
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_NAME]
    write_samples(tmp_path, "a/b", [{"id": 1, "text": "\ud800 é"}])
    assert samples_path(tmp_path, "a/b") != samples_path(tmp_path, "a_b")
    assert json.loads(samples_path(tmp_path, "a/b").read_text("utf-8", "surrogatepass"))["text"] == "\ud800 é"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "tasks": {"a": 3}}'])
def test_a_damaged_file_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS_NAME).write_text(text)
    with pytest.raises(ValueError, match="move it away, and evaluate again"):
        read_results(tmp_path)

"""Results of a campaign, as text and as JSON."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator

from tests.chaos.run import Seen


class Report:
    def __init__(self, seed: int):
        self.seed, self._started = seed, time.monotonic()
        self.faults: dict[str, Counter[str]] = {}
        """Kind -> how often it was injected, had its effect, failed."""
        self.skipped: dict[str, str] = {}
        self.passed: Counter[str] = Counter()
        """Check -> number of rounds that passed it."""
        self.failures: list[str] = []
        self.remarks: list[str] = []
        self.rounds = self.launches = self.hangs = 0
        self.seconds: list[float] = []
        self.first_steps: list[float] = []
        self.delays: list[float] = []

    @property
    def thrown(self) -> int:
        return sum(counts["thrown"] for counts in self.faults.values())

    def count(self, kind: str, what: str) -> None:
        self.faults.setdefault(kind, Counter())[what] += 1

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def add_run(self, seen: Seen, seconds: float) -> None:
        self.rounds += 1
        self.launches += seen.launches
        self.hangs += seen.hangs
        self.first_steps += seen.first_steps
        self.delays += seen.delays
        self.seconds.append(seconds)

    def figures(self) -> dict:
        return {
            "seed": self.seed, "seconds": round(time.monotonic() - self._started, 1), "rounds": self.rounds,
            "faults": {name: dict(counts) for name, counts in sorted(self.faults.items())},
            "skipped": self.skipped, "launches": self.launches, "hangs_noticed": self.hangs,
            "hang_delay_beyond_limit_s": _spread(self.delays), "launch_to_first_step_s": _spread(self.first_steps),
            "round_s": _spread(self.seconds), "checks_passed": dict(self.passed), "remarks": self.remarks,
            "failures": self.failures,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        effects = sum(counts["had effect"] for counts in self.faults.values())
        yield f"\nseed {self.seed}: {self.thrown} faults in {self.rounds} runs, {effects} of them had their effect"
        yield f"{self.launches} launches, {self.hangs} hangs noticed, {time.monotonic() - self._started:.0f} s"
        for name, counts in sorted(self.faults.items()):
            failed = f", {counts['failed']} FAILED" if counts["failed"] else ""
            yield f"  {name:<26} thrown {counts['thrown']:>3}, had its effect {counts['had effect']:>3}{failed}"
        for name, why in sorted(self.skipped.items()):
            yield f"  {name:<26} left out: {why}"
        for text, values in (("from the limit to the monitor's word of a hang", self.delays),
                             ("from a launch to its first step", self.first_steps)):  # fmt: skip
            if values:
                spread = _spread(values)
                yield f"{text}: median {spread['median']} s, {spread['least']} to {spread['most']} s ({len(values)})"
        for name, passed in self.passed.items():
            yield f"{name}: {passed} of {self.rounds} runs"
        yield from (f"remark: {text}" for text in self.remarks)
        yield from (f"NOT KEPT {text}" for text in self.failures)


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "count": len(values), "least": round(min(values), 2), "median": round(statistics.median(values), 2),
        "most": round(max(values), 2),
    }  # fmt: skip

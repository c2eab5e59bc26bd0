"""Judges how a launch ended, and decides what to do next. Plain data in, plain data out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from monitor.passing import is_of_a_disk
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT, verdict


@dataclass(frozen=True)
class LaunchEnd:
    """How a launch ended, on all nodes together."""

    code: int
    """0, 2, 75 or 1, as in runs/exits.py."""
    reason: str
    """A sentence."""
    traceback: str = ""
    """Traceback of the rank that failed first."""
    non_finite_until: int | None = None
    """If the loss was not finite: position in the data stream after the samples that caused it."""


_SAID = {OK: "finished", STOPPED: "stopped on request"}


def classify(
    exits: list[dict],
    world_size: int | None,
    returncodes: list[int | None],
    cause: str | None,
    ended_by_us: frozenset[int] = frozenset(),
    leaving: Mapping[int, int] | None = None,
) -> LaunchEnd:
    """How a launch ended, according to the records that its ranks left.

    Args:
        exits: exit records of all ranks of the launch.
        world_size: number of ranks; None if no rank ever said it.
        returncodes: exit codes of the launchers; torchrun's says little.
        cause: why the monitor ended the launch, if it did.
        ended_by_us: ranks that the monitor ended because others had ended.
        leaving: rank -> exit code with which the rank was about to end after it had saved everything.
    """
    ranks = world_size or max(len(exits), 1)
    code = verdict([record["code"] for record in exits], ranks)
    if code == WRONG_INPUT:
        record = next(record for record in exits if record["code"] == WRONG_INPUT)
        # Whatever the training concludes, a full or unreachable disk is not a mistake in the command.
        return LaunchEnd(CRASH if is_of_a_disk(record["reason"]) else WRONG_INPUT, record["reason"])
    if code in _SAID:
        return LaunchEnd(code, _SAID[code])
    settled = dict(leaving or {}) | {record["rank"]: record["code"] for record in exits if record["code"] in _SAID}
    if (code := verdict(settled.values(), ranks)) in _SAID:
        # Another launch could only end in the same place.
        late = [f"rank {record['rank']}: {record['reason']}" for record in exits if record["code"] not in _SAID]
        return LaunchEnd(code, "; ".join([_SAID[code], *(["all was saved before " + ", ".join(late)] if late else [])]))
    if cause is not None:
        return LaunchEnd(CRASH, cause)
    if not exits and world_size is None and WRONG_INPUT in returncodes:
        return LaunchEnd(WRONG_INPUT, "the command was refused before training began: see what it printed")
    failed = sorted((record for record in exits if record["code"] == CRASH), key=lambda record: record["time"])
    silent = sorted(set(range(world_size or 0)) - {record["rank"] for record in exits} - ended_by_us)
    non_finite = next((r["non_finite_until"] for r in failed if "non_finite_until" in r), None)
    parts = []
    if silent:
        ranks = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        parts.append(f"{ranks} ended without a word (killed, or out of memory)")
    if failed:
        parts.append(f"rank {failed[0]['rank']}: {failed[0]['reason']}")
    if not parts:
        codes_said = ", ".join(str(code) for code in returncodes if code is not None)
        parts.append(f"the launcher ended with exit code {codes_said}" if codes_said else "it left no exit record")
    # The other ranks only know of a killed rank that it is gone.
    traceback = failed[0].get("traceback", "") if failed and not silent else ""
    return LaunchEnd(CRASH, "; ".join(parts), traceback, non_finite)


_OF_THE_CODE = (
    "ArithmeticError", "AssertionError", "AttributeError", "ImportError", "IndexError", "KeyError",
    "ModuleNotFoundError", "NameError", "NotImplementedError", "RecursionError", "SyntaxError", "TypeError",
    "UnboundLocalError", "ZeroDivisionError",
)  # fmt: skip
"""Exceptions that come from the code itself, not from its surroundings at the moment."""


def fixed_cause(ending: LaunchEnd) -> str | None:
    """The cause of a crash that would be the same the next time: its exception and the line that raised it. None if the
    crash may pass."""
    lines = [line.strip() for line in ending.traceback.splitlines() if line.strip()]
    places = [line for line in lines if line.startswith('File "')]
    if not places or lines[-1].partition(":")[0] not in _OF_THE_CODE:
        return None
    return f"{places[-1]}: {lines[-1]}"


@dataclass(frozen=True)
class Rules:
    """When to launch again, and when to give up."""

    max_restarts: int = 1000
    """Most restarts in all."""
    max_without_progress: int = 3
    """The monitor gives up after so many launches in a row without a new step, if also ..."""
    give_up_after: float = 86400.0
    """... so many seconds have passed without one. It does not wait for that if an exception of the code itself, at the
    same line, ends each launch."""
    backoff: float = 1.0
    """Seconds before the first restart; doubled each time without progress."""
    max_backoff: float = 300.0
    on_nonfinite: str = "go_back"
    """"go_back": resume from the last checkpoint and leave out the samples up to the failure; "stop": end."""
    max_go_back: int = 3


@dataclass(frozen=True)
class Decision:
    """What to do after a launch has ended."""

    exit_code: int | None
    """Code to end with; None: launch again."""
    reason: str
    delay: float = 0.0
    """Seconds to wait before the next launch."""
    flags: list[str] = field(default_factory=list)
    """Flags that are added to the training's."""


class Policy:
    """Decides what to do after each launch, and remembers the launches before."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self.restarts = self.without_progress = self.went_back = 0
        self._greatest_step = -1
        self._progress_at: float | None = None
        self._flags: list[str] = []
        self._cause: str | None = None
        self._same_cause = 0

    def decide(self, ending: LaunchEnd, greatest_step: int | None, stop_requested: bool, now: float) -> Decision:
        """What to do next.

        Args:
            greatest_step: greatest step that a rank of the launch began; None if none began one.
            stop_requested: whether the monitor itself was asked to end.
            now: seconds, by a clock that stands still while the monitor waits for a host or a disk.
        """
        if ending.code != CRASH:
            return Decision(ending.code, ending.reason)
        if stop_requested:
            if greatest_step is None:
                return Decision(STOPPED, "stopped on request before the first step")
            return Decision(CRASH, f"did not end cleanly when asked to stop: {ending.reason}")
        rules = self._rules
        progressed = greatest_step is not None and greatest_step > self._greatest_step
        if ending.non_finite_until is not None:
            if rules.on_nonfinite == "stop":
                return Decision(CRASH, ending.reason)
            if self.went_back >= rules.max_go_back:
                return Decision(CRASH, f"gave up after going back {self.went_back} times: {ending.reason}")
            self.went_back += 1
            self._flags = [f"--resume_at_sample={ending.non_finite_until}"]
        elif progressed:
            # Before this, no checkpoint may have recorded yet which samples were left out.
            self._flags = []
        self._count(ending, greatest_step if progressed else None, now)
        if reason := self._given_up(now):
            return Decision(CRASH, f"gave up after {reason}: {ending.reason}")
        self.restarts += 1
        # (2.0 to the power of some thousands would overflow.)
        delay = min(rules.backoff * 2.0 ** min(self.without_progress, 60), rules.max_backoff)
        return Decision(None, ending.reason, delay, self._flags)

    def _count(self, ending: LaunchEnd, new_step: int | None, now: float) -> None:
        if new_step is not None:
            self._greatest_step, self.without_progress, self._progress_at = new_step, 0, now
            self._cause, self._same_cause = None, 0
            return
        self.without_progress += 1
        self._progress_at = now if self._progress_at is None else self._progress_at
        cause = fixed_cause(ending)
        self._same_cause = self._same_cause + 1 if cause is not None and cause == self._cause else 1
        self._cause = cause

    def _given_up(self, now: float) -> str:
        """Why to give up; empty if there is no reason to."""
        rules = self._rules
        if self.restarts >= rules.max_restarts:
            return f"{self.restarts} restarts"
        if self.without_progress < rules.max_without_progress:
            return ""
        launches = f"{self.without_progress} launches in a row without a new step"
        if self._cause is not None and self._same_cause >= max(rules.max_without_progress, 2):
            return f"{launches}, each ended by the same line of code"
        seconds = now - self._progress_at
        if seconds < rules.give_up_after:
            return ""
        return f"{launches}, in {seconds / 3600:.1f} h" if seconds >= 3600 else launches

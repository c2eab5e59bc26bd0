"""What the ending of a launch means, and what to do next. Plain data in, plain data out."""

from dataclasses import dataclass, field

from utils.exits import CRASH, OK, STOPPED, WRONG_INPUT, verdict


@dataclass(frozen=True)
class Ending:
    """How a launch ended, on all nodes together."""

    code: int
    """0, 2, 75 or 1, as in utils/exits.py."""
    reason: str
    """A sentence."""
    traceback: str = ""
    """Of the rank that failed first."""
    non_finite_until: int | None = None
    """If the loss was not finite: position of the stream behind the samples that made it so."""


def classify(
    exits: list[dict],
    world_size: int | None,
    returncodes: list[int | None],
    cause: str | None,
    ended_by_us: frozenset[int] = frozenset(),
) -> Ending:
    """What happened, from the records that the ranks left.

    Args:
        exits: exit records of all ranks of the launch.
        world_size: how many ranks there were; None if no rank ever said so.
        returncodes: of the launchers; torchrun's says little.
        cause: why the monitor ended the launch, if it did.
        ended_by_us: ranks that the monitor ended because others had.
    """
    codes = [record["code"] for record in exits]
    code = verdict(codes, world_size or max(len(codes), 1))
    if code == WRONG_INPUT:
        record = next(record for record in exits if record["code"] == WRONG_INPUT)
        return Ending(WRONG_INPUT, record["reason"])
    if code == STOPPED:
        return Ending(STOPPED, "stopped on request")
    if code == OK:
        return Ending(OK, "finished")
    if cause is not None:
        return Ending(CRASH, cause)
    if not exits and world_size is None and WRONG_INPUT in returncodes:
        return Ending(WRONG_INPUT, "the command was refused before training began: see what it printed")
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
    # What others say of a rank that was killed is only that it is gone.
    traceback = failed[0].get("traceback", "") if failed and not silent else ""
    return Ending(CRASH, "; ".join(parts), traceback, non_finite)


@dataclass(frozen=True)
class Rules:
    max_restarts: int = 100
    """In all."""
    max_without_progress: int = 3
    """Restarts in a row without a step that was not done before."""
    backoff: float = 1.0
    """Seconds before the first restart; doubled each time without progress."""
    max_backoff: float = 300.0
    on_nonfinite: str = "go_back"
    """"go_back": resume from the last checkpoint, leaving out the samples up to the failure; "stop": end."""
    max_go_back: int = 3


@dataclass(frozen=True)
class Decision:
    """What to do after an ending."""

    exit_code: int | None
    """End with this; None: launch again."""
    reason: str
    delay: float = 0.0
    """Seconds to wait before the next launch."""
    flags: list[str] = field(default_factory=list)
    """Added to the training's."""


class Policy:
    """Decides after each ending; remembers what came before."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self.restarts = self.without_progress = self.went_back = 0
        self._greatest_step = -1
        self._flags: list[str] = []

    def decide(self, ending: Ending, greatest_step: int | None, stop_requested: bool) -> Decision:
        """
        Args:
            greatest_step: highest step that a rank of the launch began; None if none did.
            stop_requested: the monitor itself was asked to end.
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
            # Until then, what was left out may be in no checkpoint yet.
            self._flags = []
        if progressed:
            self._greatest_step, self.without_progress = greatest_step, 0
        else:
            self.without_progress += 1
        if self.without_progress >= rules.max_without_progress:
            return Decision(
                CRASH, f"gave up after {self.without_progress} launches in a row without a new step: {ending.reason}"
            )
        if self.restarts >= rules.max_restarts:
            return Decision(CRASH, f"gave up after {self.restarts} restarts: {ending.reason}")
        self.restarts += 1
        delay = min(rules.backoff * 2.0**self.without_progress, rules.max_backoff)
        return Decision(None, ending.reason, delay, self._flags)

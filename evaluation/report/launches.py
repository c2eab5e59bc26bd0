"""The launches of a run, and what their time went into, by all of its records: the superseded ones, too."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from runs.reslog import LARGEST_STEP, number


@dataclass
class Launch:
    """A launch, from its start record to its last one. Seconds are those of the first rank."""

    start: dict
    last_time: float
    last_step: int
    """The last step that a record shows."""
    reason: str = ""
    """Why it ended; empty if it left no end record."""
    validation: float = 0.0
    evaluation: float = 0.0
    saves: float = 0.0
    """For which training was held up."""
    texts: float = 0.0
    """In which the model wrote samples, one after the other behind a validation: from record to record."""
    energy: float | None = None
    """Joules that counters of its machine showed; None: there were none."""
    steps: array = field(default_factory=lambda: array("q"))
    """For each train record: the last of the steps that it covers, how many these are, and their seconds (in all,
    waiting for data, waiting for communication)."""
    counts: array = field(default_factory=lambda: array("q"))
    seconds: array = field(default_factory=lambda: array("d"))
    data_waits: array = field(default_factory=lambda: array("d"))
    comm_waits: array = field(default_factory=lambda: array("d"))

    @property
    def first_step(self) -> int:
        return self.start["step"]

    @property
    def started(self) -> float:
        return self.start["time"]


def launches_of(records: Iterable[dict]) -> list[Launch]:
    """Launches from records in the order of the file. Records before the first start belong to none."""
    found: list[Launch] = []
    for record in records:
        name = record["name"]
        if name == "start":
            found.append(Launch(record, record["time"], record["step"]))
        elif found:
            _take(found[-1], record)
    return found


def _take(launch: Launch, record: dict) -> None:
    name, step = record["name"], record.get("step")
    before, launch.last_time = launch.last_time, max(launch.last_time, record["time"])
    if name == "train" and step is not None:
        # The means of a record are of all steps since the one before it.
        count = max(step - (launch.steps[-1] if launch.steps else launch.first_step), 0)
        launch.steps.append(step)
        launch.counts.append(count)
        for kept, key in ((launch.seconds, "dt"), (launch.data_waits, "data_wait"), (launch.comm_waits, "comm_wait")):
            kept.append(_positive(record.get(key)) * count)
        launch.last_step = max(launch.last_step, step)
    elif name == "valid":
        launch.validation += _positive(record.get("dt"))
    elif name == "eval":
        launch.evaluation += _positive(record.get("seconds"))
    elif name == "sample":
        launch.texts += launch.last_time - before
    elif name == "save":
        launch.saves += _positive(record.get("held_up"))
    elif name == "end":
        reason = record.get("reason")
        launch.reason = reason if isinstance(reason, str) and reason else "ended"
    if (joules := number(record.get("energy_j"))) is not None and joules >= 0:
        launch.energy = (launch.energy or 0.0) + joules


def _positive(value: object) -> float:
    found = number(value)
    return found if found is not None and 0 <= found < 1e12 else 0.0


@dataclass
class Spent:
    """Seconds of a run, from its first record to its last. They add up to `wall`."""

    computing: float = 0.0
    """Steps that stand, without their waits."""
    data_wait: float = 0.0
    comm_wait: float = 0.0
    validation: float = 0.0
    evaluation: float = 0.0
    saves: float = 0.0
    texts: float = 0.0
    repeated: float = 0.0
    """Steps that a later launch did again."""
    other: float = 0.0
    """Within launches: the first validation of compiled code, what was not logged before a kill, and the like."""
    between: float = 0.0
    """Between launches, their start-up included."""

    @property
    def wall(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def spent_by(launches: list[Launch]) -> Spent:
    """What the time of all launches went into."""
    spent = Spent()
    for launch, stands_until in zip(launches, standing_until(launches)):
        inside = 0.0
        for step, count, seconds, data, comm in zip(
            launch.steps, launch.counts, launch.seconds, launch.data_waits, launch.comm_waits
        ):
            standing = min(max(stands_until - (step - count), 0), count) / count if count else 1.0
            spent.repeated += (1 - standing) * seconds
            spent.data_wait += standing * data
            spent.comm_wait += standing * comm
            spent.computing += standing * (seconds - data - comm)
            inside += seconds
        for name in ("validation", "evaluation", "saves", "texts"):
            setattr(spent, name, getattr(spent, name) + getattr(launch, name))
            inside += getattr(launch, name)
        # Clocks that were set back must not give negative time.
        spent.other += max(launch.last_time - launch.started - inside, 0.0)
    for before, after in zip(launches, launches[1:]):
        spent.between += max(after.started - before.last_time, 0.0)
    return spent


def standing_until(launches: list[Launch]) -> list[int]:
    """For each launch the step after which a later one superseded it."""
    lowest, found = LARGEST_STEP, []
    for launch in reversed(launches):
        found.append(lowest)
        lowest = min(lowest, launch.first_step)
    return found[::-1]


def repeated_steps(launches: list[Launch]) -> list[int]:
    """For each launch how many of its steps a later one did again, as far as records show them."""
    return [
        max(launch.last_step - max(until, launch.first_step), 0)
        for launch, until in zip(launches, standing_until(launches))
    ]

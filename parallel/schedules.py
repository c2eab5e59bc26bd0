"""The orders in which the ranks of a pipeline work, and how long a step takes in each: plain data, no tensors, no
collectives. torch runs these orders (torch.distributed.pipelining); the tests compare them with its own.

    F   forward pass of a micro-batch through a stage
    B   its backward pass: the gradients of the stage's input and of its weights
    I   the gradient of the input alone, for which the stage before waits
    W   the gradient of the weights alone, for which nobody waits

    gpipe         all F, then all B                                        Huang et al., 2019
    1f1b          F and B in turns, so few activations are kept            Narayanan et al. (PipeDream-2BW), 2021
    interleaved   the same with several stages a rank                      Narayanan et al. (Megatron-LM), 2021
    zero_bubble   interleaved with I and W apart; W fills the waits        Qi et al. (ZB-H1), 2024
    zbv           two stages a rank in the v order, and I and W apart      Qi et al. (ZB-V), 2024

The share of a step in which a rank waits, if p ranks have v stages each, a step has m micro-batches, all stages take
equally long, and F, I and W, too (B twice as long):

    gpipe, 1f1b   (p - 1) / (m + p - 1)
    interleaved   (p - 1) / (v m + p - 1)
    zero_bubble   (p - 1) / (3 v m + p - 1)
    zbv           (p - 1) / (6 m + p - 1), from m = 2 p - 1 on
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from parallel.stages import Stages

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """What a rank does at one time."""

    kind: Kind
    stage: int
    micro_batch: int


def orders(schedule: str, stages: Stages, micro_batches: int) -> list[list[Action]]:
    """What each pipe rank does in a step, in order.

    Args:
        schedule: value of --pipeline_schedule.
        micro_batches: those of a step; `check_micro_batches` says which numbers are possible.
    """
    return [_ORDERS[schedule](stages, micro_batches, rank) for rank in range(stages.pipe_size)]


def _gpipe(stages: Stages, micro_batches: int, rank: int) -> list[Action]:
    return [Action(kind, rank, m) for kind in ("F", "B") for m in range(micro_batches)]


def _one_f_one_b(stages: Stages, micro_batches: int, rank: int) -> list[Action]:
    return _looped(stages, micro_batches, rank, min(stages.pipe_size - 1 - rank, micro_batches), "B")


def _interleaved(stages: Stages, micro_batches: int, rank: int) -> list[Action]:
    ahead = _first_laps(stages, micro_batches) + 2 * (stages.pipe_size - 1 - rank)
    return _looped(stages, micro_batches, rank, min(ahead, stages.per_rank * micro_batches), "B")


def _zero_bubble(stages: Stages, micro_batches: int, rank: int) -> list[Action]:
    ahead = _first_laps(stages, micro_batches) + stages.pipe_size - 1 - rank
    return _looped(stages, micro_batches, rank, min(ahead, stages.per_rank * micro_batches), "I")


def _round_length(stages: Stages, micro_batches: int) -> int:
    """Micro-batches that pass a stage before its rank turns to its next stage."""
    return micro_batches // max(1, micro_batches // stages.pipe_size)


def _first_laps(stages: Stages, micro_batches: int) -> int:
    """Forward passes of a rank before the first one in its last stage."""
    return (stages.per_rank - 1) * _round_length(stages, micro_batches)


def _looped(stages: Stages, micro_batches: int, rank: int, ahead: int, backward: Literal["B", "I"]) -> list[Action]:
    """F and B (or I) in turns, round by round through the rank's stages; W comes `rank` backward passes after its I.

    Args:
        ahead: forward passes before the first backward pass (one more follows right before it).
    """
    own, length = stages.stages_of(rank), _round_length(stages, micro_batches)

    def passes(order: Sequence[int]) -> list[tuple[int, int]]:
        """(stage, micro-batch) of all passes of one direction."""
        return [
            (stage, m)
            for first in range(0, micro_batches, length)
            for stage in order
            for m in range(first, first + length)
        ]

    forward, back = passes(own), passes(own[::-1])
    actions = [Action("F", *its) for its in forward[:ahead]]
    for number, its in enumerate(back):
        if ahead + number < len(forward):
            actions.append(Action("F", *forward[ahead + number]))
        actions.append(Action(backward, *its))
        if backward == "I" and number >= rank:
            actions.append(Action("W", *back[number - rank]))
    if backward == "I":
        actions += [Action("W", *its) for its in back[max(0, len(back) - rank) :]]
    return actions


def _zbv(stages: Stages, micro_batches: int, rank: int) -> list[Action]:
    """
    fill     F of the first stage, until its first micro-batch is back in the second one
    steady   F I W of one stage, F I W of the other
    drain    I of both as soon as possible, W where there is time
    """
    first, second = stages.stages_of(rank)
    behind, count = stages.pipe_size - rank, max(micro_batches, 2 * stages.pipe_size - 1)
    actions: list[Action] = []
    done = {(kind, stage): 0 for kind in ("F", "I", "W") for stage in (first, second)}

    def do(kinds: str, stage: int) -> None:
        for kind in kinds:
            actions.append(Action(cast(Kind, kind), stage, done[kind, stage]))
            done[kind, stage] += 1

    do("F" * (2 * behind - 1), first)
    for _ in range(rank):
        do("F", second)
        do("F", first)
    for _ in range(behind):
        do("FIW", second)
    while done["F", second] < count:
        if done["F", first] < count:
            do("F", first)
        do("IW", first)
        do("FIW", second)
    for _ in range(rank):
        do("I", first)
        do("I", second)
    for _ in range(behind):
        do("IW", first)
    for stage in (second, first):
        do("W" * (count - done["W", stage]), stage)
    # The order is that of a full pipeline; of fewer micro-batches, the others are left out.
    return [action for action in actions if action.micro_batch < micro_batches]


_ORDERS: dict[str, Callable[[Stages, int, int], list[Action]]] = {
    "gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _interleaved, "zero_bubble": _zero_bubble, "zbv": _zbv
}  # fmt: skip


def is_possible(schedule: str, pipe_size: int, micro_batches: int) -> bool:
    """Whether a schedule can have so many micro-batches a step."""
    if schedule == "1f1b":
        return micro_batches >= pipe_size
    rounds = max(1, micro_batches // pipe_size)
    return schedule in ("gpipe", "zbv") or micro_batches % rounds == 0


def check_micro_batches(schedule: str, pipe_size: int, micro_batches: int, rows: int) -> None:
    """
    Args:
        rows: those of a step on each data rank.
    Raises:
        ValueError: the rows cannot be cut into so many equal micro-batches, or the schedule cannot have as many.
    """
    possible = possible_counts(schedule, pipe_size, rows)
    if micro_batches in possible:
        return
    rule = f"--pipeline_schedule={schedule} on {pipe_size} ranks cannot have {micro_batches} micro-batches a step"
    if rows % micro_batches:
        rule = f"the {rows} rows of a step on each data rank cannot be cut into {micro_batches} equal micro-batches"
    if not possible:
        raise ValueError(f"{rule}: give --gradient_accumulation_steps={pipe_size} or more for each data rank")
    nearest = min(possible, key=lambda count: (abs(count - micro_batches), count))
    raise ValueError(f"{rule}: --pipeline_micro_batches={nearest} is the nearest possible")


def possible_counts(schedule: str, pipe_size: int, rows: int) -> list[int]:
    """Numbers of equal micro-batches into which a step's rows can be cut."""
    return [n for n in range(1, rows + 1) if rows % n == 0 and is_possible(schedule, pipe_size, n)]


@dataclass(frozen=True)
class StageTimes:
    """Time that a stage takes for a micro-batch, in any unit."""

    forward: float
    input: float
    """For the gradient of its input."""
    weight: float
    """For the gradients of its weights."""

    def of(self, kind: Kind) -> float:
        return {"F": self.forward, "I": self.input, "W": self.weight, "B": self.input + self.weight}[kind]

    @staticmethod
    def split(cost: float) -> "StageTimes":
        """Times of a stage by the FLOPs of its matmuls, a third each.

        Args:
            cost: of the forward and backward pass together.
        """
        return StageTimes(cost / 3, cost / 3, cost / 3)


class Span(NamedTuple):
    """An action with its time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Prediction:
    """A step as it should go."""

    ranks: tuple[tuple[Span, ...], ...]
    """What each pipe rank does when."""

    @property
    def step(self) -> float:
        """Time from the first action's start to the last one's end."""
        return max(spans[-1].end for spans in self.ranks)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Share of the step in which each rank waits."""
        return tuple(1 - sum(span.end - span.start for span in spans) / self.step for spans in self.ranks)


def predict(
    schedule: str, stages: Stages, micro_batches: int, times: Sequence[StageTimes], transfer: float = 0.0
) -> Prediction:
    """A step, if every rank does its next action as soon as what it needs is there.

    Args:
        times: each stage's.
        transfer: time between the end of an action and the start of one on another rank that waits for it.
    """
    todo = orders(schedule, stages, micro_batches)
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in todo]

    def start_of(action: Action, rank: int) -> float | None:
        """The earliest time at which an action can start; None: something that it needs has not been done yet."""
        start = spans[rank][-1].end if spans[rank] else 0.0
        for need in _needs(action, stages.num_stages):
            its_rank = stages.rank_of(need.stage)
            # The stage behind may have done B, or I alone.
            end = ended.get(need, ended.get(need._replace(kind="I")) if need.kind == "B" else None)
            if end is None:
                return None
            start = max(start, end + (transfer if its_rank != rank else 0.0))
        return start

    while sum(map(len, spans)) < sum(map(len, todo)):
        before = len(ended)
        for rank, actions in enumerate(todo):
            while len(spans[rank]) < len(actions):
                action = actions[len(spans[rank])]
                start = start_of(action, rank)
                if start is None:
                    break
                ended[action] = start + times[action.stage].of(action.kind)
                spans[rank].append(Span(action, start, ended[action]))
        assert len(ended) > before, f"{schedule} of {micro_batches} micro-batches on {stages} does not go on"
    return Prediction(tuple(map(tuple, spans)))


def timeline(schedule: str, stages: Stages, micro_batches: int) -> list[str]:
    """A line for each rank: its actions and waits, if F, I and W of all stages take equally long, a column each. A
    rank's later stages have small letters."""
    predicted = predict(schedule, stages, micro_batches, [StageTimes(1, 1, 1)] * stages.num_stages)
    lines = []
    for rank, spans in enumerate(predicted.ranks):
        cells = [".."] * round(predicted.step)
        for action, start, end in spans:
            word = f"{action.kind}{action.micro_batch}"
            is_first = action.stage == stages.stages_of(rank)[0]
            for column in range(round(start), round(end)):
                cells[column] = word if is_first else word.lower()
        lines.append(" ".join(cells))
    return lines


def _needs(action: Action, num_stages: int) -> list[Action]:
    """Actions that must be done before another one."""
    kind, stage, micro_batch = action
    if kind == "F":
        return [Action("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [Action("I", stage, micro_batch)]
    behind = [Action("B", stage + 1, micro_batch)] if stage + 1 < num_stages else []
    return [Action("F", stage, micro_batch), *behind]


def formula(schedule: str, pipe_size: int, per_rank: int, micro_batches: int) -> float:
    """Share of a step in which a rank waits, by the formulas above.

    Args:
        per_rank: stages of each rank.
    """
    rounds = {"gpipe": 1, "1f1b": 1, "interleaved": per_rank, "zero_bubble": 3 * per_rank, "zbv": 6}[schedule]
    return (pipe_size - 1) / (rounds * micro_batches + pipe_size - 1)


def choose_micro_batches(
    schedule: str, stages: Stages, rows: int, most_rows: int, times_of: Callable[[int], Sequence[StageTimes]]
) -> tuple[int, Prediction]:
    """The number of equal micro-batches whose step is predicted to be the shortest, and that step; of equal ones, the
    fewest.

    Args:
        rows: those of a step on each data rank.
        most_rows: largest number of rows in a micro-batch, for the sake of memory.
        times_of: rows of a micro-batch -> each stage's times.
    Raises:
        ValueError: the schedule cannot have any such number.
    """
    counts = [n for n in possible_counts(schedule, stages.pipe_size, rows) if rows // n <= most_rows]
    if not counts:
        raise ValueError(
            f"--pipeline_micro_batches=auto: the {rows} rows of a step on each data rank cannot be cut for "
            f"--pipeline_schedule={schedule} on {stages.pipe_size} ranks: give --gradient_accumulation_steps="
            f"{stages.pipe_size} or more for each data rank"
        )
    predicted = {n: predict(schedule, stages, n, times_of(rows // n)) for n in counts}
    best = min(counts, key=lambda n: (predicted[n].step, n))
    return best, predicted[best]

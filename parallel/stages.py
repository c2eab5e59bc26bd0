"""The stages of a pipeline: which part of a model each has, which rank has which stages, in which order micro-batches
pass through them, and how long that takes: plain data, no tensors, no collectives.

A model is a row of units: the embedding (0), its blocks (1 ... L), the last norm with the head (L + 1). A stage is some
neighbouring units. Of p ranks, each has one or more stages, in one of two orders (here p = 2, two stages a rank):

    stage          0  1  2  3
    loop, rank     0  1  0  1       gpipe, 1f1b, interleaved, zero_bubble
    v, rank        0  1  1  0       zbv

Activations pass from a stage to the next one, gradients back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from parallel.config import ParallelConfig
from utils.balance import balance

Order = Literal["loop", "v"]
_MANY = 1 << 30
_STAGES_A_RANK = {
    "gpipe": (1, 1), "1f1b": (1, 1), "interleaved": (2, _MANY), "zero_bubble": (1, _MANY), "zbv": (2, 2)
}  # fmt: skip
"""Schedule -> fewest and most stages that a rank can have. It has the fewest if no flag says how many."""


@dataclass(frozen=True)
class Stages:
    """Which units of a model each stage has, and which stages each rank has."""

    parts: tuple[int, ...]
    """Number of units of each stage, none of which is empty."""
    pipe_size: int
    order: Order = "loop"

    @property
    def num_stages(self) -> int:
        return len(self.parts)

    @property
    def num_units(self) -> int:
        return sum(self.parts)

    @property
    def per_rank(self) -> int:
        """Stages of each rank."""
        return self.num_stages // self.pipe_size

    def units(self, stage: int) -> range:
        """Units of a stage: 0 is the embedding, the last one the last norm with the head."""
        first = sum(self.parts[:stage])
        return range(first, first + self.parts[stage])

    def stage_of(self, unit: int) -> int:
        """The stage that has a unit."""
        return next(stage for stage, end in enumerate(accumulate(self.parts)) if unit < end)

    def rank_of(self, stage: int) -> int:
        """Pipe rank that has a stage."""
        lap, place = divmod(stage, self.pipe_size)
        return self.pipe_size - 1 - place if self.order == "v" and lap % 2 else place

    def stages_of(self, pipe_rank: int) -> tuple[int, ...]:
        """Stages of a rank, in the order of the forward pass."""
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == pipe_rank)

    def rank_of_unit(self, unit: int) -> int:
        """Pipe rank that has a unit."""
        return self.rank_of(self.stage_of(unit))

    def __str__(self) -> str:
        """The parts as --pipeline_parts has them: "5,4,4,5"."""
        return ",".join(map(str, self.parts))


def plan_stages(config: ParallelConfig, costs: Sequence[float]) -> Stages:
    """The stages that the flags ask for.

    Args:
        costs: time that each unit of the model takes, in any unit of time.
    Raises:
        ValueError: the flags do not fit the model, or each other.
    """
    schedule, ranks, layers = config.pipeline_schedule, config.pipeline_model_parallel_size, len(costs) - 2
    parts = _read_parts(config.pipeline_parts) if config.pipeline_parts not in ("", "measured") else None
    a_rank = _stages_a_rank(config, layers, parts)
    count = ranks * a_rank
    if count > len(costs):
        raise ValueError(
            f"a model of {layers} blocks has {len(costs)} units with its embedding and its head, too few for {count} "
            f"stages ({ranks} ranks x {a_rank}): give a lower --pipeline_model_parallel_size"
        )
    if parts is None:
        parts = balance(costs, count)
    elif len(parts) != count or sum(parts) != len(costs) or min(parts) < 1:
        example = ",".join(map(str, balance(costs, count)))
        raise ValueError(
            f"--pipeline_parts={config.pipeline_parts} must be {count} positive numbers ({schedule} on {ranks} ranks) "
            f"that sum to {len(costs)} ({layers} blocks, the embedding and the head): give --pipeline_parts={example}"
        )
    return Stages(parts, ranks, "v" if schedule == "zbv" else "loop")


def _read_parts(text: str) -> tuple[int, ...]:
    """
    Raises:
        ValueError: the text is no list of whole numbers.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(
            f"--pipeline_parts={text}: give the units of each stage as whole numbers separated by commas, such as "
            f"5,4,4,5, or measured, or leave it out"
        )
    return tuple(map(int, words))


def _stages_a_rank(config: ParallelConfig, layers: int, parts: tuple[int, ...] | None) -> int:
    """
    Raises:
        ValueError: the flags contradict each other, or blocks cannot be shared in this way.
    """
    schedule, ranks = config.pipeline_schedule, config.pipeline_model_parallel_size
    blocks, (fewest, most) = config.num_layers_per_virtual_pipeline_stage, _STAGES_A_RANK[schedule]
    if not blocks:
        told = len(parts) // ranks if parts is not None else fewest
        # A wrong number of parts is refused with the right one.
        return min(max(told, fewest), most)
    flag = f"--num_layers_per_virtual_pipeline_stage={blocks}"
    if parts is not None:
        raise ValueError(f"{flag} and --pipeline_parts both say which stages there are: leave one of them out")
    if layers % (ranks * blocks):
        raise ValueError(
            f"{flag} gives {ranks} ranks no equal number of stages, as there are {layers} blocks: give a divisor of "
            f"{layers // ranks}, or --pipeline_parts"
            if layers % ranks == 0 else
            f"{flag}: {layers} blocks cannot be shared equally by {ranks} ranks: give --pipeline_parts instead"
        )  # fmt: skip
    count = layers // (ranks * blocks)
    if not fewest <= count <= most:
        other = f"--pipeline_schedule={'interleaved' if count > 1 else '1f1b'} for these"
        raise ValueError(
            f"{flag} makes {count} stage{'s' if count > 1 else ''} a rank of {layers} blocks on {ranks} ranks, and "
            f"--pipeline_schedule={schedule} has {fewest}{' or more' if most > fewest else ''}: leave it out, or give "
            f"{other}"
        )
    return count

"""Choice of what each block keeps for its backward pass, under a limit on the memory of activations.

Keeping more saves time and costs memory. `activations.py` measures both; this file has the arithmetic alone.
(Selective recomputation: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2023.
Choosing by what was measured, under a given memory: AscendSpeed's automatic selective recomputing. Recomputation as a
problem with an exact solution: Jain et al., "Checkmate", 2020.)

    forward     embedding | block 0 | block 1 | ... | last norm and loss        what is kept adds up
    backward    last norm and loss | ... | block 1 | block 0 | embedding        and is given up again

At any moment memory holds what earlier parts have kept, and what the part that runs now needs: its inputs, everything
that its backward pass wants, kept or computed again, and what it frees while it runs. The latter two, P_i, are the same
whatever the block keeps. So with K_i the bytes that block i keeps, K_e those of the embedding, F what all blocks share,
such as rotary tables and masks, and G the gradient of a tied embedding, which waits from the loss for the embedding's
own,

    peak = F + max(G + P_e,   G + K_e + sum_j<i K_j + P_i for each block i,   K_e + sum_j K_j + P_loss)

Blocks that keep much cost least memory at the end, since K_i counts only while later parts run. `choose` finds the
least extra time whose peak stays below the limit, exactly: it extends the choices of the first blocks block by block,
and drops a choice if another one needs neither more memory nor more time.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import cast

from model.decoder import Keeps

KEEPS: tuple[Keeps, ...] = ("nothing", "matmuls", "all")
"""What a block may keep, least first."""
_MOST_CHOICES = 1000
"""Choices of the first blocks that are followed up. Equal blocks have fewer; of more, the least useful ones are left
out."""


@dataclass(frozen=True)
class BlockCosts:
    """Costs of one block in a micro-batch, measured."""

    kept: Mapping[Keeps, int]
    """Bytes that the block keeps until its backward pass."""
    peak: int
    """Most bytes that it needs at a time, its inputs and what it keeps among them."""
    microseconds: Mapping[Keeps, int]
    """Time of its forward and backward pass, with what is computed again."""


@dataclass(frozen=True)
class Costs:
    """Costs of a micro-batch."""

    kinds: Sequence[BlockCosts]
    kind_of: Sequence[int]
    """Each block's place in `kinds`."""
    shared: int
    """Bytes that exist during the whole micro-batch."""
    embedding_kept: int
    embedding_peak: int
    loss_peak: int
    """Most bytes that the last norm and the loss need at a time."""
    tied_gradient: int = 0
    """Bytes that the loss leaves for the embedding."""
    loss_microseconds: int = 0

    @property
    def blocks(self) -> list[BlockCosts]:
        return [self.kinds[kind] for kind in self.kind_of]


@dataclass(frozen=True)
class Choice:
    """What the blocks keep, and what that is expected to cost."""

    keeps: tuple[Keeps, ...]
    peak: int
    """Bytes."""
    extra: float
    """Extra time of forward and backward passes, as a share of that without recomputation."""

    def __str__(self) -> str:
        counts = {kept: self.keeps.count(kept) for kept in KEEPS}
        words = {"nothing": "keep their input", "matmuls": "keep matmuls and attention", "all": "keep everything"}
        return ", ".join(f"{count} {words[kept]}" for kept, count in counts.items() if count)


def expected_peak(costs: Costs, keeps: Sequence[Keeps]) -> int:
    """Most bytes of activations at a time."""
    blocks = costs.blocks
    before = list(accumulate((block.kept[kept] for block, kept in zip(blocks, keeps, strict=True)),
                             initial=costs.embedding_kept))  # fmt: skip
    tied, loss = costs.tied_gradient, before[-1] + costs.loss_peak
    return costs.shared + max(
        loss, tied + costs.embedding_peak, *(tied + held + block.peak for held, block in zip(before, blocks))
    )


def extra_microseconds(costs: Costs, keeps: Sequence[Keeps]) -> int:
    return sum(_extra(block, kept) for block, kept in zip(costs.blocks, keeps, strict=True))


def _extra(block: BlockCosts, kept: Keeps) -> int:
    """Extra time of a block. Whatever noise the measurement had: recomputing something is slower than nothing."""
    return 0 if kept == "all" else max(1, block.microseconds[kept] - block.microseconds["all"])


def least_peak(costs: Costs) -> int:
    """The peak if every block keeps as little as it can: no choice has a lower one."""
    return expected_peak(costs, [min(block.kept, key=block.kept.__getitem__) for block in costs.blocks])


@dataclass(order=True, frozen=True)
class _Partial:
    """A choice of the first blocks."""

    held: int
    """Bytes kept."""
    extra: int
    kept: Keeps = field(compare=False, default="nothing")
    """What the last of these blocks keeps."""
    before: "_Partial | None" = field(compare=False, default=None)


def choose(costs: Costs, budget: int) -> Choice:
    """The choice of least extra time whose expected peak is at most `budget` bytes.

    Raises:
        ValueError: there is none.
    """
    least = least_peak(costs)
    if least > budget:
        raise ValueError(
            f"--activation_budget_gb={budget / 1e9:g} is too little: with everything recomputed, a micro-batch's "
            f"activations need {in_gb(least)} GB; give at least that, or lower --train_batch_size"
        )
    room = budget - costs.shared
    # Kept bytes beyond this leave too little for later parts, which hold at least the least of their own.
    limits = _limits(costs, room)
    choices = [_Partial(costs.embedding_kept, 0)]
    for block, limit in zip(costs.blocks, limits):
        extended = [
            _Partial(before.held + block.kept[kept], before.extra + _extra(block, kept), kept, before)
            for before in choices for kept in KEEPS if before.held + block.kept[kept] <= limit
        ]  # fmt: skip
        choices = _thinned(_best(extended))
    best = min(choices, key=lambda choice: (choice.extra, choice.held))
    keeps = _keeps_of(best)
    compute = costs.loss_microseconds + sum(block.microseconds["all"] for block in costs.blocks)
    return Choice(keeps, expected_peak(costs, keeps), best.extra / max(1, compute))


def _limits(costs: Costs, room: int) -> list[int]:
    """For each block, the most bytes that it and the blocks before may keep, so that all later parts find room."""
    limits, limit = [], room - costs.loss_peak
    for block in reversed(costs.blocks):
        limits.append(limit)
        limit = min(limit - min(block.kept.values()), room - costs.tied_gradient - block.peak)
    return limits[::-1]


def _best(choices: list[_Partial]) -> list[_Partial]:
    """Those of which no other one needs neither more memory nor more time, by memory."""
    best: list[_Partial] = []
    for choice in sorted(choices):
        if not best or choice.extra < best[-1].extra:
            best.append(choice)
    return best


def _thinned(choices: list[_Partial]) -> list[_Partial]:
    """At most _MOST_CHOICES of the choices, spread evenly over the memory that they need; the least is among them."""
    if len(choices) <= _MOST_CHOICES:
        return choices
    held = [choice.held for choice in choices]
    span = held[-1] - held[0]
    # The one that needs most without exceeding its place: it takes the least time.
    places = {bisect.bisect_right(held, held[0] + span * place // (_MOST_CHOICES - 1)) - 1
              for place in range(_MOST_CHOICES)}  # fmt: skip
    return [choices[place] for place in sorted(places)]


def _keeps_of(choice: _Partial) -> tuple[Keeps, ...]:
    keeps = []
    while choice.before is not None:
        keeps.append(choice.kept)
        choice = choice.before
    return tuple(keeps[::-1])


def highest(everyone: Sequence[Costs]) -> Costs:
    """The highest of each cost over several ranks, which have the same blocks."""
    first = everyone[0]
    kinds = [
        BlockCosts(
            {kept: max(block.kept[kept] for block in blocks) for kept in KEEPS},
            max(block.peak for block in blocks),
            {kept: max(block.microseconds[kept] for block in blocks) for kept in KEEPS},
        )
        for blocks in zip(*(costs.kinds for costs in everyone), strict=True)
    ]
    names = ("shared", "embedding_kept", "embedding_peak", "loss_peak", "tied_gradient", "loss_microseconds")
    return Costs(kinds, first.kind_of, *(max(getattr(costs, name) for costs in everyone) for name in names))


def costs_from(values: Mapping) -> Costs:
    """Costs from the dictionary that dataclasses.asdict made of them, read from JSON.

    Raises:
        KeyError, TypeError: it is none.
    """
    kinds = [cast(BlockCosts, BlockCosts(**kind)) for kind in values["kinds"]]
    return Costs(**{**values, "kinds": kinds})


def in_gb(size: int) -> str:
    """Bytes in GB, rounded up to three digits, so that the figure suffices as a budget."""
    unit = 10 ** max(0, len(str(size)) - 3)
    return f"{-(-size // unit) * unit / 1e9:g}"

"""Plans computed so that a text's scores have the same bits whoever else is served, however its prompt is cut, and
whether its keys were found in the cache or computed again.

A product of matrices may add up in another order for another number of rows, so 1 row and 17 rows differ in the last
bits. Here every pass has 16 rows:

    plan    a: 1 token | b: 30 tokens
    rows    a b b b b b b b b b b b b b b b | b b b b b b b b b b b b b b b -        "-": a row that nobody wants

Products, norms and activations then always have one shape, in which a row's bits do not depend on its place or on its
neighbours: `check` runs the model to see that this holds on this machine. What depends on more than a row is computed
so that it does not:

    attention    each token alone, over a copy of exactly the keys that it sees: one shape for each position
    experts      each on all 16 rows; a token takes what its own have computed, in the order of their numbers

A single text costs as much as 16 do, and prompts come 16 tokens at a time. (He and others, "Defeating Nondeterminism in
LLM Inference", 2025, keep the order of additions inside kernels instead.)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.paged import PagedCache, PagedStep, Segment
from model.tiles import compute_experts_on_all_rows
from serving.loading import Served
from serving.plan import Part
from serving.runner import Runner

ROWS = 16


class Row(NamedTuple):
    """A token of a pass."""

    token: int
    segment: Segment
    is_wanted: bool
    """Whether its scores are."""


def rows_of(parts: Sequence[Part]) -> Iterator[Row]:
    """The tokens of a plan, in order."""
    for part in parts:
        for number, token in enumerate(part.tokens):
            segment = Segment(1, part.start + number + 1, part.blocks, part.prompt_length)
            yield Row(token, segment, number >= len(part.tokens) - part.num_scores)


class InvariantRunner(Runner):
    """A runner whose scores have the same bits for any plans that compute the same texts.

    Raises:
        ValueError: this machine's arithmetic does not allow it, or the model's experts are on several ranks.
    """

    def __init__(
        self, served: Served, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # One more, for rows that nobody wants.
        super().__init__(served, num_blocks + 1, block_size, dtype, device)
        self._spare = Row(0, Segment(1, 1, [num_blocks]), False)
        compute_experts_on_all_rows(served.modules())
        check(self)

    def _scores(self, parts: Sequence[Part]) -> Tensor:
        rows = list(rows_of(parts))
        rows += -len(rows) % ROWS * [self._spare]
        passes = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
        return torch.cat([self.scores_of(its_rows, self.cache) for its_rows in passes])

    def scores_of(self, rows: Sequence[Row], cache: PagedCache) -> Tensor:
        """Scores of those rows of a pass that are wanted, (R, V)."""
        assert len(rows) == ROWS
        step = PagedStep(cache, [row.segment for row in rows], one_by_one=True)
        ids_1N = torch.tensor([[row.token for row in rows]], device=self.device)
        hidden_1NC = self.served.model(ids_1N, cache=step)
        wanted = [place for place, row in enumerate(rows) if row.is_wanted]
        if not wanted:
            return self.served.model.logits(hidden_1NC[0, :0])
        # All of them: the head's product has one shape, too.
        return self.served.model.logits(hidden_1NC[0])[torch.tensor(wanted, device=self.device)]


@torch.inference_mode()
def check(runner: InvariantRunner) -> None:
    """See that a row's bits depend neither on its place nor on its neighbours, by a few passes of the model over the
    same 16 tokens in other places.

    Raises:
        ValueError: they do.
    """
    config = runner.served.model.config
    lengths = [min(1 + 3 * number, config.max_position_embeddings) for number in range(ROWS)]
    longest = max(lengths)
    rows = []
    for number, length in enumerate(lengths):
        blocks = range(number * longest, number * longest + length)
        rows.append(Row(7919 * number % config.vocab_size, Segment(1, length, blocks), True))
    cache = runner.new_cache(ROWS * longest, 1)
    expected = runner.scores_of(rows, cache)
    for shift in (1, 6, 11):
        found = runner.scores_of(rows[shift:] + rows[:shift], cache)
        if not torch.equal(found, expected.roll(-shift, 0)):
            name = str(cache.dtype).removeprefix("torch.")
            raise ValueError(
                f"--batch_invariant cannot be kept: on this machine, a row of a product in {name} has other bits in "
                f"another place; leave it out, or give another --dtype"
            )

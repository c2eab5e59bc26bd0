"""What a plan says, computed: tokens of several sequences through the model, and the scores that are wanted.

    plan        parts: a (1 token, 1 score) | b (64 of its prompt, 0) | c (30, the prompt's last ones, 1)
    model       one row of 95 tokens, whose keys and values go to the blocks of a, b and c
    head        2 rows: the last token of a and of c
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.paged import PagedCache, PagedStep, Segment
from serving.loading import Served
from serving.plan import Part, StepPlan


class Runner:
    """Runs plans on a model. If several ranks share the model, each has a Runner, and all run the same plans.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens of one.
        dtype, device: those that the model computes in and on.
    """

    def __init__(
        self, served: Served, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        served.pack()
        self.served, self.device = served, device
        self._dtype = dtype
        self.cache = self.new_cache(num_blocks, block_size)

    def new_cache(self, num_blocks: int, block_size: int) -> PagedCache:
        """A cache for the layers that this rank has."""
        layers = [layer for layer, _ in self.served.model.layers.numbered()]
        return PagedCache(self.served.model.config, num_blocks, block_size, self._dtype, self.device, layers)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor:
        """Scores of the wanted tokens, part after part, float32 (R, V): V is the model's vocabulary, which may be
        larger than the tokenizer's. On every rank."""
        if self.served.active != plan.adapter:
            self.served.use(plan.adapter)
        self.cache.copy(plan.copies)
        return self._scores(plan.parts).float()

    def _scores(self, parts: Sequence[Part]) -> Tensor:
        """Scores of the wanted tokens, (R, V of the model), in the model's dtype."""
        step = PagedStep(self.cache, [_segment(part) for part in parts])
        ids = torch.tensor([[token for part in parts for token in part.tokens]], device=self.device)
        hidden_1NC = self.served.model(ids, cache=step)
        rows = torch.tensor(_wanted(parts), dtype=torch.int64, device=self.device)
        return self.served.model.logits(hidden_1NC[0, rows])


def _segment(part: Part) -> Segment:
    return Segment(len(part.tokens), part.start + len(part.tokens), part.blocks, part.prompt_length)


def _wanted(parts: Sequence[Part]) -> list[int]:
    """Places of the tokens whose scores are wanted, in the row of all tokens."""
    rows: list[int] = []
    end = 0
    for part in parts:
        end += len(part.tokens)
        rows += range(end - part.num_scores, end)
    return rows

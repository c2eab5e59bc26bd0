"""A runner without a cache of keys and values: it keeps tokens in their place, and computes whole sequences again."""

import torch
from torch import Tensor

from serving.loading import Served
from serving.plan import StepPlan


class PlainRunner:
    """What any Runner must be equal to."""

    def __init__(self, served: Served, num_blocks: int, block_size: int):
        self.served, self.size = served, block_size
        self.tokens = torch.full((num_blocks, block_size), -1)
        self.num_computed = 0
        self.plans: list[StepPlan] = []

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor:
        """Scores of the wanted tokens; see serving/runner.py."""
        if self.served.active != plan.adapter:
            self.served.use(plan.adapter)
        self.plans.append(plan)
        if plan.copies:
            sources, targets = zip(*plan.copies)
            self.tokens[list(targets)] = self.tokens[list(sources)]
        scores = []
        for part in plan.parts:
            end = part.start + len(part.tokens)
            assert len(part.blocks) == -(-end // self.size)
            for number, token in enumerate(part.tokens, part.start):
                self.tokens[part.blocks[number // self.size], number % self.size] = token
            self.num_computed += len(part.tokens)
        for part in plan.parts:
            end = part.start + len(part.tokens)
            if part.num_scores:
                ids = self.tokens[part.blocks].flatten()[:end]
                hidden_TC = self.served.model(ids[None])[0, end - part.num_scores :]
                scores.append(self.served.model.logits(hidden_TC).float())
        return torch.cat(scores) if scores else torch.empty(0, self.served.model.config.vocab_size)

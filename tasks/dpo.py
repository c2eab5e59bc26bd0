"""Direct preference optimization: a pair's loss from the log-probabilities of its two answers.

Names: B pairs; pi and ref are the sums of an answer's token log-probabilities under the model and the reference model;
c the chosen answer, r the rejected one.

    a = pi_c - ref_c,   b = pi_r - ref_r,   h = a - b,   beta the strength,   e the label smoothing

    sigmoid     -(1 - e) log s(beta h) - e log s(-beta h)                            Rafailov et al., 2023; e: cDPO
    robust      (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)              Chowdhury et al., 2024
    hinge       max(0, 1 - beta h)                                                   Zhao et al. (SLiC), 2023
    ipo         (h - 1 / (2 beta))^2, of means a token instead of sums               Azar et al., 2023
    kto_pair    1 - s(beta (a - KL_r)),  1 - s(beta (KL_c - b))                      Ethayarajh et al., 2024
    sppo_hard   (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2                          Wu et al., 2024
    nca_pair    -log s(beta a) - (log s(-beta a) + log s(-beta b)) / 2               Chen et al., 2024

s is the logistic function. KL_c = max(0, mean of a) and KL_r = max(0, mean of b) over the global batch, without
gradient; kto_pair has two terms a pair, so its count is 2 B.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama
from tasks.language_model import LanguageModelTask, select_supervised

DPOLossType = Literal["sigmoid", "robust", "hinge", "ipo", "kto_pair", "sppo_hard", "nca_pair"]


@dataclass(frozen=True)
class DPOLoss:
    kind: DPOLossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Share of the pairs whose answers are taken to be swapped; sigmoid and robust only."""

    def __call__(self, policy: Tensor, reference: Tensor, kl: Tensor | None = None) -> Tensor:
        """Losses of the pairs.

        Args:
            policy, reference: log-probabilities (B, 2) of the chosen and the rejected answer; for ipo a token's mean.
            kl: kto_pair: (2,) means of `policy - reference` over the global batch.
        Returns:
            (B,), kto_pair (B, 2).
        """
        beta, smoothing = self.beta, self.label_smoothing
        ratios = policy - reference
        chosen, rejected = ratios.unbind(-1)
        h = chosen - rejected
        if self.kind == "sigmoid":
            return -F.logsigmoid(beta * h) * (1 - smoothing) - F.logsigmoid(-beta * h) * smoothing
        if self.kind == "robust":
            return (-F.logsigmoid(beta * h) * (1 - smoothing) + F.logsigmoid(-beta * h) * smoothing) / (
                1 - 2 * smoothing
            )
        if self.kind == "hinge":
            return torch.relu(1 - beta * h)
        if self.kind == "ipo":
            return (h - 1 / (2 * beta)).square()
        if self.kind == "kto_pair":
            kl_chosen, kl_rejected = kl.clamp(min=0).to(h.dtype)
            return 1 - torch.stack([beta * (chosen - kl_rejected), beta * (kl_chosen - rejected)], dim=-1).sigmoid()
        if self.kind == "sppo_hard":
            return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
        return -F.logsigmoid(beta * chosen) - 0.5 * (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected))


class DPOTask(LanguageModelTask):
    """A batch's preference loss under the model, summed over the pairs; both answers in one forward pass.

    Args:
        reference_free: as if the reference model found all answers equally likely.
    """

    count_name = "pairs"
    metric_names = (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __init__(self, model: Llama, dropout_seed: int, loss: DPOLoss, reference_free: bool = False):
        super().__init__(model, dropout_seed, torch.empty(0))
        self.loss, self.reference_free = loss, reference_free
        self.uses_prepass = loss.kind == "kto_pair"
        self._kl: Tensor | None = None

    def count(self, batch: dict[str, Tensor]) -> int:
        """Terms of the loss: pairs, for kto_pair twice as many."""
        return len(batch["sample_ids"]) * (2 if self.loss.kind == "kto_pair" else 1)

    def log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probability of each answer, the sum over its tokens, float32 (B, 2)."""
        rows, width = batch["input_ids"].shape
        sides = torch.arange(2, device=batch["row_ids"].device)
        # Each row has its own dropout, whichever micro-batch it is in.
        row_ids = (2 * batch["row_ids"][:, None] + sides).flatten()
        labels, hidden = select_supervised(batch, self.hidden(batch, row_ids))
        token_log_probs = self.model.token_logprobs(hidden, labels)
        # Not scatter-add, whose order of additions varies on a GPU.
        by_row = token_log_probs.new_zeros(rows * width).index_copy(0, batch["supervised"], token_log_probs)
        return by_row.view(-1, 2, width).sum(-1)

    def _policy_and_reference(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        policy = self.log_probs(batch)
        return policy, torch.zeros_like(policy) if self.reference_free else batch["reference"]

    def prepass(self, batch: dict[str, Tensor]) -> Tensor:
        """What the loss needs to know of the global batch before any gradient: float64 (3,), to be summed over all
        micro-batches and ranks, then given to `take_prepass`."""
        with torch.no_grad():
            policy, reference = self._policy_and_reference(batch)
            sums = (policy - reference).double().sum(0)
            return torch.cat([sums, sums.new_tensor([len(policy)])])

    def take_prepass(self, sums: Tensor) -> None:
        self._kl = sums[:2] / sums[2]

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        """(sum of the losses, their count, sums of metric_names over the pairs).

        Validation has no global batch: there, kto_pair takes the means of the batch.
        """
        policy, reference = self._policy_and_reference(batch)
        ratios = (policy - reference).detach()
        if self.loss.kind == "ipo":
            lengths = (batch["labels"].view(-1, 2, batch["labels"].shape[1]) >= 0).sum(-1)
            losses = self.loss(policy / lengths, reference / lengths)
        else:
            losses = self.loss(policy, reference, self._kl if self.model.training else ratios.double().mean(0))
        rewards = self.loss.beta * ratios
        chosen, rejected = rewards.unbind(-1)
        sums = [
            chosen.sum(), rejected.sum(), (chosen - rejected).sum(), (chosen > rejected).sum(),
            policy[:, 0].detach().sum(), policy[:, 1].detach().sum(),
        ]  # fmt: skip
        return losses.sum(), self.count(batch), dict(zip(self.metric_names, sums))

    def units(self, count: float) -> int:
        return int(count) // (2 if self.loss.kind == "kto_pair" else 1)

    def figures(self, loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": loss_sum / count} | {name: value / self.units(count) for name, value in sums.items()}

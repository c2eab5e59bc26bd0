"""Direct preference optimization: a pair's loss from the log-probabilities of its two answers.

Names: B pairs; pi and ref are the sums of an answer's token log-probabilities under the model and the reference model;
c the chosen answer, r the rejected one.

    a = pi_c - ref_c,   b = pi_r - ref_r,   h = a - b,   beta the strength,   e the label smoothing

    sigmoid     -(1 - e) log s(beta h) - e log s(-beta h)                            Rafailov et al., 2023; e: cDPO
    robust      (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)              Chowdhury et al., 2024
    hinge       max(0, 1 - beta h)                                                   Zhao et al. (SLiC), 2023
    ipo         (h - 1 / (2 beta))^2, of means over tokens, not sums                 Azar et al., 2023
    kto_pair    1 - s(beta (a - KL_r)),  1 - s(beta (KL_c - b))                      Ethayarajh et al., 2024
    sppo_hard   (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2                          Wu et al., 2024
    nca_pair    -log s(beta a) - (log s(-beta a) + log s(-beta b)) / 2               Chen et al., 2024

s is the logistic function. KL_c = max(0, mean of a) and KL_r = max(0, mean of b) over the global batch, without
gradient; kto_pair has two terms a pair, so its count is 2 B.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder
from tasks.config import DPOConfig
from tasks.task import Batch, Loss, Task, select_supervised


def dpo_losses(options: DPOConfig, policy: Tensor, reference: Tensor, kl: Tensor | None = None) -> Tensor:
    """Losses of the pairs, by the formula that `options` name.

    Args:
        policy, reference: log-probabilities (B, 2) of the chosen and the rejected answer; for ipo means over tokens.
        kl: kto_pair: (2,) means of `policy - reference` over the global batch.
    Returns:
        (B,), kto_pair (B, 2).
    """
    kind, beta, smoothing = options.dpo_loss_type, options.dpo_beta, options.dpo_label_smoothing
    ratios = policy - reference
    chosen, rejected = ratios.unbind(-1)
    h = chosen - rejected
    if kind == "sigmoid":
        return -F.logsigmoid(beta * h) * (1 - smoothing) - F.logsigmoid(-beta * h) * smoothing
    if kind == "robust":
        return (-F.logsigmoid(beta * h) * (1 - smoothing) + F.logsigmoid(-beta * h) * smoothing) / (1 - 2 * smoothing)
    if kind == "hinge":
        return torch.relu(1 - beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    if kind == "kto_pair":
        assert kl is not None
        kl_chosen, kl_rejected = kl.clamp(min=0).to(h.dtype)
        return 1 - torch.stack([beta * (chosen - kl_rejected), beta * (kl_chosen - rejected)], dim=-1).sigmoid()
    if kind == "sppo_hard":
        return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    return -F.logsigmoid(beta * chosen) - 0.5 * (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected))


class DPOTask(Task):
    """A batch's preference loss under the model, summed over the pairs; both answers in one forward pass."""

    count_name = "pairs"
    metric_names = (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __init__(self, model: Decoder, dropout_seed: int, options: DPOConfig):
        super().__init__(model, dropout_seed)
        self.options = options
        self.uses_prepass = options.dpo_loss_type == "kto_pair"
        self.uses_reference = not options.reference_free
        self._terms_a_pair = 2 if options.dpo_loss_type == "kto_pair" else 1
        self._kl: Tensor | None = None

    @classmethod
    def build(cls, model: Decoder, dropout_seed: int, byte_lengths: Tensor, options: DPOConfig) -> Self:
        return cls(model, dropout_seed, options)

    def count(self, batch: Batch) -> int:
        """Terms of the loss: pairs, for kto_pair twice as many."""
        return len(batch["sample_ids"]) * self._terms_a_pair

    def row_weights(self, batch: Batch) -> Tensor:
        """A pair's terms, shared by its two rows."""
        rows = batch["input_ids"]
        return torch.full((len(rows),), 0.5 * self._terms_a_pair, dtype=torch.float32, device=rows.device)

    def row_ids(self, batch: Batch) -> Tensor:
        """Each answer has its own dropout, whichever micro-batch it is in."""
        sides = torch.arange(2, device=batch["row_ids"].device)
        return (2 * batch["row_ids"][:, None] + sides).flatten()

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probability of each answer, the sum over its tokens, float32 (B, 2)."""
        return self.log_probs_from(self.hidden(batch), batch)

    def log_probs_from(self, hidden_BTC: Tensor, batch: Batch) -> Tensor:
        """`log_probs`, where the forward pass is done."""
        rows, width = batch["input_ids"].shape
        labels, hidden = select_supervised(batch, hidden_BTC)
        token_log_probs = self.model.token_logprobs(hidden, labels)
        # Not scatter-add, whose order of additions varies on a GPU.
        by_row = token_log_probs.new_zeros(rows * width).index_copy(0, batch["supervised"], token_log_probs)
        return self.of_rows(by_row.view(-1, 2, width).sum(-1))[0]

    def _reference(self, batch: Batch, policy: Tensor) -> Tensor:
        return batch["reference"] if self.uses_reference else torch.zeros_like(policy)

    def prepass(self, batch: Batch) -> Tensor:
        """float64 (3,): sums of both log-ratios over the pairs, and the number of pairs."""
        with torch.no_grad():
            policy = self.log_probs(batch)
            sums = (policy - self._reference(batch, policy)).double().sum(0)
            return torch.cat([sums, sums.new_tensor([len(policy)])])

    def take_prepass(self, sums: Tensor) -> None:
        self._kl = sums[:2] / sums[2]

    def loss(self, hidden_BTC: Tensor, batch: Batch) -> Loss:
        """Sum of the losses, their count, and sums of metric_names over the pairs.

        Validation has no global batch: there, kto_pair takes the means of the batch.
        """
        policy = self.log_probs_from(hidden_BTC, batch)
        reference = self._reference(batch, policy)
        ratios = (policy - reference).detach()
        if self.options.dpo_loss_type == "ipo":
            (lengths,) = self.of_rows((batch["labels"].view(-1, 2, batch["labels"].shape[1]) >= 0).sum(-1))
            losses = dpo_losses(self.options, policy / lengths, reference / lengths)
        else:
            kl = self._kl if self.model.training else ratios.double().mean(0)
            losses = dpo_losses(self.options, policy, reference, kl)
        rewards = self.options.dpo_beta * ratios
        chosen, rejected = rewards.unbind(-1)
        sums = [
            chosen.sum(), rejected.sum(), (chosen - rejected).sum(), (chosen > rejected).sum(),
            policy[:, 0].detach().sum(), policy[:, 1].detach().sum(),
        ]  # fmt: skip
        return losses.sum(), self.count(batch), dict(zip(self.metric_names, sums))

    def units(self, count: float) -> int:
        return int(count) // self._terms_a_pair

    def figures(self, loss_sum: float, count: float, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": loss_sum / count} | {name: value / self.units(count) for name, value in sums.items()}

"""DPO's losses, log-probabilities and metrics against formulas written out number by number."""

import errno
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.dpo import DPODataset
from dataset.sft import padded
from model import Decoder
from model.config import ModelConfig
from model.loss import IGNORE_INDEX
from runs.exits import StopRequested
from tasks.config import DPOConfig, DPOLossType
from tasks.dpo import DPOTask, dpo_losses
from tasks.reference import ReferenceCache, compute_reference
from tests.unit.test_sequences import write_sequences

KINDS = get_args(DPOLossType)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected_losses(
    kind: str, beta: float, e: float, pairs: list[list[float]], kl_chosen: float = 0.0, kl_rejected: float = 0.0
) -> list[float]:
    """Losses of pairs, given as [pi_c, pi_r, ref_c, ref_r]; kto_pair's two terms of a pair follow each other."""
    losses = []
    for pi_c, pi_r, ref_c, ref_r in pairs:
        a, b = pi_c - ref_c, pi_r - ref_r
        h = (pi_c - pi_r) - (ref_c - ref_r)
        if kind == "sigmoid":
            losses.append(-(1 - e) * math.log(sigma(beta * h)) - e * math.log(sigma(-beta * h)))
        elif kind == "robust":
            right, wrong = -math.log(sigma(beta * h)), -math.log(sigma(-beta * h))
            losses.append(((1 - e) * right - e * wrong) / (1 - 2 * e))
        elif kind == "hinge":
            losses.append(max(0.0, 1 - beta * h))
        elif kind == "ipo":
            losses.append((h - 1 / (2 * beta)) ** 2)
        elif kind == "kto_pair":
            losses.append(1 - sigma(beta * (a - max(0.0, kl_rejected))))
            losses.append(1 - sigma(beta * (max(0.0, kl_chosen) - b)))
        elif kind == "sppo_hard":
            losses.append((a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2)
        elif kind == "nca_pair":
            losses.append(-math.log(sigma(beta * a)) - math.log(sigma(-beta * a)) / 2 - math.log(sigma(-beta * b)) / 2)
    return losses


def differences(function: Callable[[list[list[float]]], float], pairs: list[list[float]]) -> list[list[float]]:
    """Central differences of a function of the pairs, with respect to the policy's log-probabilities."""
    step = 1e-5

    def moved(row: int, column: int, by: float) -> float:
        changed = [list(pair) for pair in pairs]
        changed[row][column] += by
        return function(changed)

    return [
        [(moved(row, column, step) - moved(row, column, -step)) / (2 * step) for column in (0, 1)]
        for row in range(len(pairs))
    ]


def make_pairs(count: int = 6, seed: int = 0, size: float = 3.0) -> Tensor:
    """(count, 4) float64: pi_c, pi_r, ref_c, ref_r."""
    generator = torch.Generator().manual_seed(seed)
    return -20 + size * torch.randn(count, 4, generator=generator, dtype=torch.float64)


CASES = [
    *((kind, beta, 0.0) for kind in KINDS for beta in (0.1, 0.6)),
    ("sigmoid", 0.3, 0.25), ("sigmoid", 0.6, 0.49), ("robust", 0.3, 0.25), ("robust", 0.6, 0.45),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "beta", "smoothing"), CASES)
def test_a_loss_is_its_formula(kind: str, beta: float, smoothing: float):
    pairs, loss = make_pairs(), partial(dpo_losses, DPOConfig(kind, beta, smoothing))
    policy, reference = pairs[:, :2].clone().requires_grad_(), pairs[:, 2:]
    # With these means, one is clamped and the other is not.
    kl = torch.tensor([0.8, -0.4], dtype=torch.float64)

    def total(numbers: list[list[float]]) -> float:
        return math.fsum(expected_losses(kind, beta, smoothing, numbers, 0.8, -0.4))

    losses = loss(policy, reference, kl)
    assert losses.shape == ((6, 2) if kind == "kto_pair" else (6,))
    expected = expected_losses(kind, beta, smoothing, pairs.tolist(), 0.8, -0.4)
    assert losses.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    losses.sum().backward()
    for ours, theirs in zip(policy.grad.tolist(), differences(total, pairs.tolist())):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)
    assert policy.grad.abs().sum() > 1e-3
    assert torch.autograd.gradcheck(lambda x: loss(x, reference, kl), (policy.detach().requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_ratios_stay_finite(kind: str):
    """A naive log(sigmoid(x)) is -inf below x = -104 in float32."""
    policy = torch.tensor([[-3000.0, -10.0], [-10.0, -3000.0]], requires_grad=True)
    losses = dpo_losses(DPOConfig(kind, 0.5), policy, torch.full((2, 2), -1500.0), torch.zeros(2))
    losses.sum().backward()
    assert losses.isfinite().all() and policy.grad.isfinite().all()


def test_label_smoothing_swaps_a_share_of_the_pairs():
    """Meaning of smoothing: a share e of the pairs is swapped."""
    pairs = make_pairs()
    swapped = pairs[:, [1, 0, 3, 2]]
    plain = partial(dpo_losses, DPOConfig("sigmoid", 0.3))
    smooth = dpo_losses(DPOConfig("sigmoid", 0.3, 0.2), pairs[:, :2], pairs[:, 2:])
    mixed = 0.8 * plain(pairs[:, :2], pairs[:, 2:]) + 0.2 * plain(swapped[:, :2], swapped[:, 2:])
    torch.testing.assert_close(smooth, mixed, rtol=1e-12, atol=0)
    # robust undoes the noise: its mean over noisy labels is the clean loss.
    robust = partial(dpo_losses, DPOConfig("robust", 0.3, 0.2))
    noisy = 0.8 * robust(pairs[:, :2], pairs[:, 2:]) + 0.2 * robust(swapped[:, :2], swapped[:, 2:])
    torch.testing.assert_close(noisy, plain(pairs[:, :2], pairs[:, 2:]), rtol=1e-12, atol=1e-12)


# Tests of the task with given log-probabilities.


CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, initializer_range=0.2,
).resolve()  # fmt: skip


def make_task(kind: str = "sigmoid", beta: float = 0.1, smoothing: float = 0.0) -> DPOTask:
    model = Decoder(CONFIG)
    model.initialize(0)
    return DPOTask(model, 0, DPOConfig(kind, beta, smoothing))


class GivenTask(DPOTask):
    """Log-probabilities by sample id, in place of a model's."""

    def __init__(self, values: Tensor, options: DPOConfig):
        super().__init__(Decoder(CONFIG), 0, options)
        self.values = values

    def hidden(self, batch: dict[str, Tensor], losses: object = None) -> Tensor:
        return self.values[batch["sample_ids"]]

    def log_probs_from(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return hidden


LENGTHS = [(3, 5), (1, 4), (7, 2), (6, 6), (2, 9), (5, 1)]
"""Tokens of the chosen and the rejected answers."""


def given_batch(ids: list[int], reference: Tensor | None) -> dict[str, Tensor]:
    labels = torch.full((2 * len(ids), 12), IGNORE_INDEX)
    for row, length in enumerate(length for number in ids for length in LENGTHS[number]):
        labels[row, 2 : 2 + length] = 7
    batch = {"sample_ids": torch.tensor(ids), "labels": labels}
    return batch if reference is None else batch | {"reference": reference[ids]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[4], [0, 5, 2], [1, 3]]])
def test_micro_batches_make_the_global_batch(kind: str, split: list[list[int]]):
    """Sums, counts, metrics and gradients of the parts; kto_pair's mean is that of the whole batch, without
    gradient."""
    beta, pairs = 0.3, make_pairs(seed=10)
    values = pairs[:, :2].clone().requires_grad_()
    task = GivenTask(values, DPOConfig(kind, beta))
    batches = [given_batch(part, pairs[:, 2:]) for part in split]
    assert task.uses_prepass == (kind == "kto_pair")
    if task.uses_prepass:
        prepass = sum(task.prepass(batch) for batch in batches)
        assert prepass.dtype == torch.float64 and not prepass.requires_grad
        a, b = ((pairs[:, side] - pairs[:, 2 + side]).tolist() for side in (0, 1))
        assert prepass.tolist() == pytest.approx([math.fsum(a), math.fsum(b), 6], rel=1e-12)
        task.take_prepass(prepass)
    total, count, sums = 0.0, 0, dict.fromkeys(task.metric_names, 0.0)
    for batch in batches:
        loss_sum, terms, metrics = task(batch)
        loss_sum.backward()
        assert terms == task.count(batch) and list(metrics) == list(task.metric_names)
        assert not any(value.requires_grad for value in metrics.values())
        total, count = total + loss_sum.item(), count + terms
        sums = {name: sums[name] + metrics[name].item() for name in sums}

    numbers = pairs.tolist()
    if kind == "ipo":
        numbers = [[pc / n, pr / m, rc / n, rr / m] for (pc, pr, rc, rr), (n, m) in zip(numbers, LENGTHS)]
    kl = [math.fsum(pair[side] - pair[2 + side] for pair in numbers) / 6 for side in (0, 1)]
    assert kind == "ipo" or min(kl) > 0.5, "clamped, so that the means would not matter"
    expected = expected_losses(kind, beta, 0.0, numbers, *kl)
    assert total == pytest.approx(math.fsum(expected), rel=1e-12)
    assert count == len(expected)
    # The means stay fixed while the policy moves: no gradient goes through them.
    gradient = differences(lambda moved: math.fsum(expected_losses(kind, beta, 0.0, moved, *kl)), numbers)
    lengths = LENGTHS if kind == "ipo" else [(1, 1)] * 6
    for ours, theirs, (n, m) in zip(values.grad.tolist(), gradient, lengths):
        assert ours == pytest.approx([theirs[0] / n, theirs[1] / m], rel=1e-6, abs=1e-7)

    figures = task.figures(total, count, sums)
    rewards = [(beta * (pc - rc), beta * (pr - rr)) for pc, pr, rc, rr in pairs.tolist()]
    assert figures == pytest.approx(
        {
            "loss": math.fsum(expected) / len(expected),
            "rewards/chosen": sum(c for c, _ in rewards) / 6,
            "rewards/rejected": sum(r for _, r in rewards) / 6,
            "rewards/margins": sum(c - r for c, r in rewards) / 6,
            "rewards/accuracies": sum(c > r for c, r in rewards) / 6,
            "logps/chosen": sum(pair[0] for pair in pairs.tolist()) / 6,
            "logps/rejected": sum(pair[1] for pair in pairs.tolist()) / 6,
        },
        rel=1e-12,
    )
    assert 0 < figures["rewards/accuracies"] < 1


def test_the_mean_of_kto_pair_is_not_that_of_a_micro_batch():
    """Otherwise the split into micro-batches would change the run, here by a lot."""
    pairs = make_pairs(seed=10)
    batches = [given_batch(part, pairs[:, 2:]) for part in ([0, 1, 2], [3, 4, 5])]
    task = GivenTask(pairs[:, :2], DPOConfig("kto_pair", 0.3))
    sums = [task.prepass(batch) for batch in batches]
    totals = []
    for prepass in (sums, [sum(sums)] * 2):
        total = 0.0
        for batch, one in zip(batches, prepass):
            task.take_prepass(one)
            total += task(batch)[0].item()
        totals.append(total)
    assert abs(totals[0] - totals[1]) > 0.01


def test_validation_of_kto_pair_takes_the_mean_of_its_batch():
    pairs = make_pairs(seed=4)
    task = GivenTask(pairs[:, :2], DPOConfig("kto_pair", 0.3))
    # Left over from training and not used here.
    task.take_prepass(torch.tensor([600.0, 600.0, 6.0], dtype=torch.float64))
    task.model.eval()
    loss_sum, count, _ = task(given_batch([1, 3, 4], pairs[:, 2:]))
    numbers = pairs[[1, 3, 4]].tolist()
    kl = [math.fsum(pair[side] - pair[2 + side] for pair in numbers) / 3 for side in (0, 1)]
    assert max(kl) > 0 and count == 6
    assert loss_sum.item() == pytest.approx(math.fsum(expected_losses("kto_pair", 0.3, 0.0, numbers, *kl)), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_free_is_a_reference_of_zeros(kind: str):
    """An existing reference must not be read, and none need exist."""
    pairs = make_pairs(seed=1, size=0.5)
    zeros = torch.zeros(6, 2, dtype=torch.float64)
    results = []
    for reference, free in ((zeros, False), (None, True), (pairs[:, 2:], True)):
        task = GivenTask(pairs[:, :2], DPOConfig(kind, 0.05, reference_free=free))
        batch = given_batch([0, 1, 2, 3, 4, 5], reference)
        if task.uses_prepass:
            task.take_prepass(task.prepass(batch))
        loss_sum, _, metrics = task(batch)
        results.append((loss_sum.item(), {name: value.item() for name, value in metrics.items()}))
    assert results[0] == results[1] == results[2]
    with_reference = GivenTask(pairs[:, :2], DPOConfig(kind, 0.05))
    with_reference.take_prepass(torch.tensor([0.0, 0.0, 6.0]))
    assert with_reference(given_batch([0, 1, 2, 3, 4, 5], pairs[:, 2:]))[0].item() != results[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_are_not_a_success(kind: str):
    values = torch.full((6, 2), -3.0)
    task = GivenTask(values, DPOConfig(kind))
    task.take_prepass(torch.tensor([0.0, 0.0, 6.0], dtype=torch.float64))
    assert task(given_batch([0, 1, 2], values))[2]["rewards/accuracies"].item() == 0


# Log-probabilities of a real model.


def random_sequences(seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of several pairs, of ragged lengths."""
    generator = np.random.default_rng(seed)
    lengths = [(4, 3, 7), (1, 9, 1), (11, 2, 5), (2, 1, 13)]
    return [tuple(generator.integers(0, 64, length).tolist() for length in three) for three in lengths]


def make_batch(pairs: list[tuple[list[int], list[int], list[int]]], pad_id: int = 0) -> dict[str, Tensor]:
    rows = []
    for prompt, *answers in pairs:
        for answer in answers:
            supervised = np.array([0] * len(prompt) + [1] * len(answer), np.uint8)
            # As on disk: unsigned.
            rows.append([(np.array(prompt + answer, np.uint16), supervised)])
    batch, ids = padded(rows, CONFIG.max_position_embeddings, pad_id), torch.arange(len(pairs))
    del batch["document_ids"]
    return batch | {"sample_ids": ids, "row_ids": ids}


@torch.no_grad()
def naive_log_prob(model: Decoder, prompt: list[int], answer: list[int]) -> float:
    """Token by token, each from a forward pass over the tokens before it."""
    total = 0.0
    for index, token in enumerate(answer):
        before = torch.tensor([prompt + answer[:index]])
        scores = model.logits(model(before))[0, -1].double().tolist()
        highest = max(scores)
        total += scores[token] - highest - math.log(math.fsum(math.exp(score - highest) for score in scores))
    return total


@pytest.mark.parametrize("double", [False, True])
def test_log_probs_are_those_of_the_answers_alone(double: bool, monkeypatch: pytest.MonkeyPatch):
    """Padding and the other rows do not matter. In float64 only a different formula could make a difference."""
    task, pairs = make_task(), random_sequences()
    if double:
        task.model.double()
        # Norms, rotations and the cross entropy go through float32, whatever the weights' dtype.
        monkeypatch.setattr(Tensor, "float", Tensor.double)
    expected = [[naive_log_prob(task.model, prompt, answer) for answer in answers] for prompt, *answers in pairs]
    tolerance = 1e-12 if double else 1e-6
    for pad_id in (0, 9):
        values = task.log_probs(make_batch(pairs, pad_id))
        assert values.shape == (4, 2) and values.dtype == (torch.float64 if double else torch.float32)
        for ours, naive in zip(values.tolist(), expected):
            assert ours == pytest.approx(naive, rel=tolerance)


def test_no_gradient_comes_from_prompt_or_padding(monkeypatch: pytest.MonkeyPatch):
    """Only the positions before an answer's tokens give logits; a prompt's own labels and the padding never count."""
    task, pairs = make_task(), random_sequences()
    batch, seen = make_batch(pairs), []
    original = task.model.token_logprobs

    def token_logprobs(hidden: Tensor, labels: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, labels)

    monkeypatch.setattr(task.model, "token_logprobs", token_logprobs)
    hidden = task.hidden(batch).detach().requires_grad_()
    monkeypatch.setattr(task, "hidden", lambda *_: hidden)
    task.log_probs(batch).sum().backward()
    answers = [answer for _, *both in pairs for answer in both]
    assert seen == [sum(map(len, answers))]
    expected = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for row, (begin, answer) in enumerate((len(prompt) - 1, a) for prompt, *both in pairs for a in both):
        expected[row, begin : begin + len(answer)] = True
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, expected)


def test_ipo_takes_the_mean_of_a_token():
    """Lengths in a real batch are the answers' own, without prompt and padding."""
    task, pairs = make_task("ipo", 0.4), random_sequences()
    batch = make_batch(pairs)
    batch["reference"] = torch.from_numpy(np.random.default_rng(1).normal(-20, 3, (4, 2))).float()
    policy, reference = task.log_probs(batch).tolist(), batch["reference"].tolist()
    expected = 0.0
    for (_, chosen, rejected), pi, ref in zip(pairs, policy, reference):
        h = (pi[0] - ref[0]) / len(chosen) - (pi[1] - ref[1]) / len(rejected)
        expected += (h - 1 / 0.8) ** 2
    assert task(batch)[0].item() == pytest.approx(expected, rel=1e-6)


def test_dropout_belongs_to_the_row_not_the_micro_batch():
    """The two answers of a pair have separate masks, the same in any micro-batch."""
    config = ModelConfig(**CONFIG.__dict__ | {"hidden_dropout": 0.3})
    model = Decoder(config)
    model.initialize(0)
    task, pairs = DPOTask(model, 5, DPOConfig()), random_sequences()
    prompt, answer, _ = pairs[0]
    pairs[0] = (prompt, answer, answer)
    whole = task.log_probs(make_batch(pairs))
    assert whole[0, 0] != whole[0, 1], "the same answer under the same mask"
    for number in range(4):
        alone = make_batch(pairs[number : number + 1]) | {"row_ids": torch.tensor([number])}
        assert task.log_probs(alone)[0].tolist() == pytest.approx(whole[number].tolist(), rel=1e-5)
    later = task.log_probs(make_batch(pairs) | {"row_ids": torch.arange(4) + 4})
    assert (later != whole).all()
    model.eval()
    assert torch.equal(task.log_probs(make_batch(pairs))[0, :1], task.log_probs(make_batch(pairs))[0, 1:])


def write_pairs_dataset(directory: Path) -> DPODataset:
    """Thirty pairs of random tokens that the tiny model knows."""
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, CONFIG.vocab_size, 6).tolist(), [0, 0, 0, 1, 1, 1]) for _ in range(60)]
    write_sequences(directory, [sequences], "dpo", 8, CONFIG.vocab_size)
    return DPODataset(directory, "train", 8)


def test_a_reference_on_rank_0_alone_reaches_all(tmp_path: Path):
    """Nodes need not share a file system: rank 0's values are summed with the others' zeros."""
    dataset = write_pairs_dataset(tmp_path)
    cache = ReferenceCache(dataset, "train", "weights", tmp_path / "run")
    values = np.linspace(-500, -1, 2 * len(dataset), dtype=np.float32).reshape(-1, 2)
    elsewhere = ReferenceCache(dataset, "train", "other weights", tmp_path / "run")
    cache.write(values)
    tensors: list[list[torch.Tensor]] = [[], []]

    def record(rank: int):
        def all_sum(tensor: torch.Tensor) -> torch.Tensor:
            tensors[rank].append(tensor.clone())
            # Rank 1 gets rank 0's flag and values, as the sum would give them.
            if rank == 1:
                tensor += tensors[0][len(tensors[1]) - 1]
            return tensor

        return all_sum

    assert (cache.read_on_main(True, record(0)) == values).all()
    assert (elsewhere.read_on_main(False, record(1)) == values).all()
    assert all((tensor == 0).all() for tensor in tensors[1])


def test_a_reference_that_cannot_be_read_now_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A resumed run would otherwise ask for the model that it began with."""
    cache = ReferenceCache(write_pairs_dataset(tmp_path), "train", "weights", tmp_path / "run")

    def refuse(self: Path, **_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    assert cache.read() is None
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(OSError, match="Input/output"):
        cache.read()


def test_a_stop_while_the_reference_is_computed_keeps_what_is_done(tmp_path: Path):
    dataset = write_pairs_dataset(tmp_path)
    cache = ReferenceCache(dataset, "train", "weights", tmp_path / "run")
    task = make_task()
    arguments = (task, cache, 1, 0, 1, lambda tensor: tensor, lambda batch: batch)
    with pytest.raises(StopRequested):
        compute_reference(*arguments, stop_requested=lambda: True)
    assert 0 < len(cache.read_unfinished(1)) < len(dataset) and cache.read() is None
    resumed = compute_reference(*arguments)
    (tmp_path / "run").rename(tmp_path / "gone")
    fresh = ReferenceCache(dataset, "train", "again", tmp_path / "run")
    assert (compute_reference(task, fresh, *arguments[2:]) == resumed).all() and (resumed < 0).all()
    # Another rank with the same rows adds nothing, and writes nothing.
    other = ReferenceCache(dataset, "train", "other", tmp_path / "run")
    assert (compute_reference(task, other, *arguments[2:], counts=False) == 0).all() and other.read() is None

"""Losses of layers: against autograd of the plain total, formulas in loops, and transformers."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from model import Decoder, ModelConfig
from model.layer_losses import (
    BALANCE,
    ENTROPY,
    LOAD,
    TOKENS,
    LayerLosses,
    Z,
    add_loss,
    balance_of_batch,
    load_of,
    router_figures,
    router_sums,
)
from model.loss import IGNORE_INDEX
from tasks.config import DPOConfig
from tasks.dpo import DPOTask
from tasks.language_model import LanguageModelTask
from tests.unit.test_dpo_losses import make_batch, random_sequences

EXPERTS, CHOSEN = 6, 2
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=32, num_local_experts=4, dense_layers="1", router_aux_loss_coef=0.5, router_z_loss_coef=0.1,
    residual_in_fp32=False,
).resolve()  # fmt: skip


def scores_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()


def sums_of(scores_BTE: Tensor, losses: LayerLosses, by_row: bool = True) -> Tensor:
    probs_BTE = scores_BTE.softmax(-1)
    return router_sums(scores_BTE, probs_BTE, probs_BTE.topk(CHOSEN).indices, losses, by_row)


def losses_for(weights: list[float], lengths: list[int] | None = None, tokens: int = 0) -> LayerLosses:
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None] if lengths else None
    return LayerLosses(torch.tensor(weights), torch.tensor(0.25), mask)


def plain_losses(scores_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Balance loss, z-loss, mean entropy) of one row, token by token."""
    balance, n = scores_TE.new_zeros(()), len(scores_TE)
    chosen = [set(row.topk(CHOSEN).indices.tolist()) for row in scores_TE]
    for expert in range(EXPERTS):
        share = sum(expert in its for its in chosen) * EXPERTS / (CHOSEN * n)
        balance = balance + share * sum(row.softmax(0)[expert] for row in scores_TE) / n
    z = sum(row.exp().sum().log() ** 2 for row in scores_TE) / n
    entropy = sum(-(p * p.log()).sum() for p in scores_TE.softmax(-1)) / n
    return balance, z, entropy


def test_an_added_loss_is_as_autograd_of_the_sum():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.3)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), (x**3).sum()

    y, loss = parts(x)
    added = add_loss(y, loss, scale)
    assert torch.equal(added, y)
    (gradient,) = torch.autograd.grad((added * torch.arange(5)).sum(), x)
    y, loss = parts(x)
    (expected,) = torch.autograd.grad((y * torch.arange(5)).sum() + scale.double() * loss, x)
    assert torch.allclose(gradient, expected, rtol=1e-14)


def test_the_sums_are_those_of_the_formulas():
    scores, weights, lengths = scores_of(3, 7), [2.0, 0.0, 5.0], [7, 4, 1]
    sums = sums_of(scores, losses_for(weights, lengths, 7))
    rows = [plain_losses(row[:length]) for row, length in zip(scores, lengths)]
    expected = sum(weight * (balance + 0.5 * z) for weight, (balance, z, _) in zip(weights, rows))
    assert (sums[BALANCE] + 0.5 * sums[Z]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums[ENTROPY].item() == pytest.approx(sum(n * e.item() for n, (_, _, e) in zip(lengths, rows)), rel=1e-6)
    assert sums[TOKENS].item() == 12
    load = torch.zeros(EXPERTS, dtype=torch.float64)
    for row, length in zip(scores, lengths):
        load += torch.bincount(row[:length].topk(CHOSEN).indices.flatten(), minlength=EXPERTS)
    assert torch.equal(load_of(sums[None])[0], load)
    (gradient,) = torch.autograd.grad(sums[BALANCE] + 0.5 * sums[Z], scores)
    (theirs,) = torch.autograd.grad(expected, scores)
    assert torch.allclose(gradient, theirs, rtol=1e-6, atol=1e-9)
    assert not gradient[1].any() and not gradient[2, 1:].any()


def test_an_even_load_costs_one():
    """And the entropy of an undecided router is that of the uniform distribution."""
    scores = torch.zeros(1, EXPERTS // CHOSEN, EXPERTS, dtype=torch.float64)
    chosen = torch.arange(EXPERTS).view(1, -1, CHOSEN)
    sums = router_sums(scores, scores.softmax(-1), chosen, losses_for([1.0]), by_row=True)
    figures = router_figures(sums[None], 1, dataclasses.replace(CONFIG, num_local_experts=EXPERTS))
    assert figures["balance_loss"] == pytest.approx(1.0) and figures["entropy"] == pytest.approx(1.791759, rel=1e-6)
    assert figures["load_highest"] == figures["load_lowest"] == pytest.approx(1.0)
    assert figures["z_loss"] == pytest.approx(1.791759**2, rel=1e-6)
    assert figures["load_by_layer"] == [[0.1667] * EXPERTS] and figures["entropy_by_layer"] == [1.792]


def test_padding_and_the_split_of_the_rows_change_nothing():
    scores, weights, lengths = scores_of(4, 9), [3.0, 1.0, 2.0, 9.0], [9, 5, 6, 2]
    whole = sums_of(scores, losses_for(weights, lengths, 9))
    parts = sum(sums_of(scores[i : i + 1, : lengths[i]], losses_for(weights[i : i + 1])) for i in range(4))
    assert torch.allclose(whole, parts, rtol=1e-6)
    other = torch.where((torch.arange(9) < torch.tensor(lengths)[:, None])[..., None], scores, 7.0)
    assert torch.equal(sums_of(other, losses_for(weights, lengths, 9)), whole)
    # A row of padding alone, such as one that a pipeline adds.
    empty = sums_of(scores, losses_for(weights, [9, 5, 6, 0], 9))
    assert empty.isfinite().all() and empty[TOKENS] == 20


@pytest.mark.parametrize("lengths", [None, [7, 4, 5]])
def test_the_batch_form_is_that_of_transformers(lengths: list[int] | None):
    layers = [scores_of(3, 7, seed) for seed in range(2)]
    sums = [sums_of(scores, losses_for([1.0] * 3, lengths, 7), by_row=False) for scores in layers]
    ours = balance_of_batch(sums)
    mask = losses_for([1.0] * 3, lengths, 7).mask_BT
    theirs = load_balancing_loss_func(
        tuple(scores.flatten(0, 1) for scores in layers), EXPERTS, CHOSEN, None if mask is None else mask.double()
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for ours_, theirs_ in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers)):
        assert torch.allclose(ours_, theirs_, rtol=1e-5, atol=1e-9)


def model_of(config: ModelConfig, **more: object) -> Decoder:
    model, generator = Decoder(config, **more).double().train(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("selection_bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    return model


def batch_of(rows: int = 2, tokens: int = 8, lengths: list[int] | None = None) -> dict[str, Tensor]:
    drawn = torch.randint(0, 64, (rows, tokens + 1), generator=torch.Generator().manual_seed(rows))
    labels = drawn[:, 1:].clone()
    labels[:, 2] = IGNORE_INDEX
    batch = {"input_ids": drawn[:, :-1], "labels": labels, "row_ids": torch.arange(rows),
             "positions": torch.arange(tokens).expand(rows, -1)}  # fmt: skip
    return batch | ({"lengths": torch.tensor(lengths)} if lengths else {})


def gradients_with(task: LanguageModelTask, batch: dict[str, Tensor], scale: float) -> tuple[dict, Tensor]:
    """Gradients as the engine makes them, and the layers' sums."""
    losses = task.layer_losses(batch, scale)
    (task(batch, losses)[0] * scale).backward()
    gradients = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    return gradients, losses.sums


@pytest.mark.parametrize("form", ["row", "batch"])
def test_the_gradient_is_that_of_the_written_total(form: str):
    """total = (cross entropies + weights x (c1 L + c2 Z)) / count; the batch's balance loss is not divided."""
    config = dataclasses.replace(CONFIG, router_aux_loss=form)
    model, batch = model_of(config), batch_of()
    task = LanguageModelTask(model, 0, torch.ones(64))
    count = task.count(batch)
    gradients, sums = gradients_with(task, batch, 1 / count)
    assert sums.shape == (2, 4 + 2 * config.num_local_experts) and not sums.requires_grad
    # The routers' scores of a plain forward pass, through hooks.
    scores: list[Tensor] = []
    for layer in (0, 2):
        router = model.layers[layer].mlp.router
        router.register_forward_hook(lambda _m, _i, out: scores.append(out[0].unflatten(0, (2, 8))))
    loss_sum, _, _ = task(batch)
    assert task.layer_losses(batch, 1.0) is not None and len(scores) == 2
    weights = (batch["labels"] != IGNORE_INDEX).sum(1)
    total = loss_sum / count
    for scores_BTE in scores:
        probs = scores_BTE.softmax(-1)
        sent = torch.nn.functional.one_hot(probs.topk(2).indices, 4).sum(2).double()
        balance = 4 / 2 * (sent.mean(1) * probs.mean(1)).sum(-1)
        z = scores_BTE.logsumexp(-1).square().mean(1)
        total = total + (weights * (0.5 * balance * (form == "row") + 0.1 * z)).sum() / count
    if form == "batch":
        total = total + 0.5 * load_balancing_loss_func(tuple(s.flatten(0, 1) for s in scores), 4, 2)
    total.backward()
    for name, parameter in model.named_parameters():
        # Scale, weights and cross entropies are float32.
        assert (gradients[name] - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name


@pytest.mark.parametrize("form", ["row", "batch"])
@pytest.mark.parametrize("keeps", ["nothing", "matmuls"])
def test_recomputation_counts_once(keeps: str, form: str):
    config = dataclasses.replace(CONFIG, router_aux_loss=form)
    found = []
    for more in ({}, {"gradient_checkpointing": True, "checkpoint_keeps": keeps}):
        task = LanguageModelTask(model_of(config, **more), 0, torch.ones(64))
        found.append(gradients_with(task, batch_of(), 0.1))
    (plain, sums), (again, sums_again) = found
    assert torch.equal(sums, sums_again)
    for name in plain:
        assert torch.allclose(plain[name], again[name], rtol=1e-12, atol=1e-15), name


def test_without_experts_and_in_validation_nothing_is_added():
    dense = dataclasses.replace(CONFIG, num_local_experts=0, dense_layers="")
    assert LanguageModelTask(model_of(dense), 0, torch.ones(64)).layer_losses(batch_of(), 1.0) is None
    all_dense = dataclasses.replace(CONFIG, dense_layers="0,1,2")
    assert LanguageModelTask(model_of(all_dense), 0, torch.ones(64)).layer_losses(batch_of(), 1.0) is None
    ends = []
    for coefficient in (0.0, 3.0):
        task = LanguageModelTask(model_of(dataclasses.replace(CONFIG, router_aux_loss_coef=coefficient)), 0,
                                 torch.ones(64, dtype=torch.int64))  # fmt: skip
        batch = batch_of()
        trained = task(batch, task.layer_losses(batch, 1.0))[0]
        task.model.eval()
        ends.append((trained.item(), task(batch)[0].item()))
    assert ends[0] == ends[1] and ends[0][0] == ends[0][1]


def test_weights_of_rows_add_up_to_the_divisor():
    model = Decoder(CONFIG)
    batch = make_batch(random_sequences())
    for kind in ("sigmoid", "kto_pair"):
        task = DPOTask(model, 0, DPOConfig(dpo_loss_type=kind))
        weights = task.row_weights(batch)
        assert len(weights) == len(batch["input_ids"]) and weights.sum().item() == task.count(batch)
    task, batch = LanguageModelTask(model, 0, torch.ones(64)), batch_of(3, 8, [8, 5, 3])
    assert task.row_weights(batch).tolist() == [7.0] * 3 and task.count(batch) == 21
    mask = task.layer_losses(batch, 1.0).mask_BT
    assert mask.sum(1).tolist() == [8, 5, 3] and mask[1].tolist() == [True] * 5 + [False] * 3


def test_the_bias_goes_up_where_fewer_tokens_went_than_the_mean():
    config = dataclasses.replace(CONFIG, router_bias=True, router_bias_update_rate=0.25)
    model = model_of(config)
    sums = torch.zeros(2, 12, dtype=torch.float64)
    sums[:, LOAD : LOAD + 4] = torch.tensor([[5.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    model.rebalance(sums)
    biases = [model.layers[layer].mlp.router.selection_bias for layer in (0, 2)]
    assert [bias.tolist() for bias in biases] == [[-0.25, 0.25, 0.0, 0.0], [0.25, 0.25, 0.25, -0.25]]
    model.bfloat16()
    assert all(block.mlp.router.selection_bias.dtype == torch.float32 for block in model.layers if block.has_experts)
    assert not any(name.endswith("selection_bias") for name, p in model.named_parameters() if p.requires_grad)

"""Parts of a model: those that run one after the other compute what the whole does, to the bit."""

from functools import reduce

import pytest
import torch
from torch import Tensor

from model import Decoder, KVCache, ModelConfig
from model.dropout import DropoutKey
from model.layer_losses import LayerLosses

_PARTS = (range(1), range(1, 3), range(3, 5))
_KINDS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "dropout": {"hidden_dropout": 0.2},
    "wide residual": {"residual_in_fp32": True, "hidden_dropout": 0.1},
    "experts": {
        "num_local_experts": 4, "moe_intermediate_size": 8, "num_shared_experts": 1, "dense_layers": "0",
        "router_bias_update_rate": 0.01, "router_aux_loss_coef": 0.01, "rope_interleaved": True,
    },
}  # fmt: skip


def _new(options: dict, units: range | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    config = ModelConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **options).resolve(64, 16)
    model = Decoder(config)
    if units is not None:
        model.keep(units)
    model.initialize(1)
    return model.to(dtype)


def _losses(options: dict) -> LayerLosses | None:
    return LayerLosses(torch.ones(2), torch.tensor(1.0)) if "num_local_experts" in options else None


@pytest.mark.parametrize("kind", _KINDS)
def test_parts_compute_what_the_whole_does(kind):
    options, dtype = _KINDS[kind], torch.bfloat16 if kind == "wide residual" else torch.float32
    whole, parts = _new(options, dtype=dtype), [_new(options, units, dtype) for units in _PARTS]
    ids, positions = torch.randint(64, (2, 16)), torch.arange(16).expand(2, -1)
    key = DropoutKey(7, torch.arange(2)) if whole.drops else None
    losses, own = _losses(options), [_losses(options) for _ in parts]
    expected = whole(ids, positions, dropout_key=key, losses=losses)
    expected.float().square().sum().backward()

    h: Tensor | None = None
    for model, units, its in zip(parts, _PARTS, own):
        h = model(ids, positions, dropout_key=key, losses=its, units=units, entering=h)
        if units != _PARTS[-1] and whole.config.residual_in_fp32:
            assert h.dtype == torch.float32
    assert h is not None
    h.float().square().sum().backward()

    assert torch.equal(h, expected)
    gradients = dict(whole.named_parameters())
    names = [name for model in parts for name, _ in model.named_parameters()]
    assert set(names) == set(gradients)
    tied = {"embed_tokens.weight"} if whole.config.tie_word_embeddings else set()
    assert {name for name in names if names.count(name) > 1} == tied
    for model in parts:
        for name, parameter in model.named_parameters():
            if name not in tied:
                assert parameter.grad is None or torch.equal(parameter.grad, gradients[name].grad), name
    if losses is not None:
        assert losses.sums is not None and all(its is not None and its.sums is not None for its in own)
        assert torch.equal(reduce(torch.add, [its.sums for its in own]), losses.sums)
        whole.rebalance(losses.sums)
        for model in parts:
            model.rebalance(losses.sums)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, gradients[name])


def test_a_part_generates_compiles_and_recomputes():
    whole, parts = _new({}), [_new({}, units) for units in _PARTS]
    for model in (whole, *parts):
        model.train()
        model.set_recompute(["nothing", "all", "matmuls"])
    ids = torch.randint(64, (1, 4))
    caches = [KVCache(whole.config, 1, 8, torch.float32, torch.device("cpu")) for _ in range(4)]
    expected = whole(ids, cache=caches[0])
    h = None
    for model, units, cache in zip(parts, _PARTS, caches[1:]):
        h = model(ids, cache=cache, units=units, entering=h)
        assert cache._kept.keys() == {unit - 1 for unit in units} & {0, 1, 2}  # No room for layers of others.
    assert torch.equal(h, expected)


def test_a_part_is_named_as_in_the_whole():
    part = _new({"tie_word_embeddings": True}, range(2, 5))
    assert [index for index, _ in part.layers.numbered()] == [1, 2] and part.layers[2] is list(part.layers)[1]
    names = {name for name, _ in part.named_parameters()}
    assert {"layers.1.mlp.up_proj.weight", "norm.weight", "embed_tokens.weight"} <= names
    assert not {name for name in names if name.startswith(("layers.0", "lm_head"))}
    assert part.lm_head.weight is part.embed_tokens.weight
    assert set(part.roles()) == names

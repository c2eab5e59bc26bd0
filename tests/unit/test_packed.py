"""Packed layers compute what plain ones do, for every family and with adapters, and keep no matrix twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import Decoder, KVCache, ModelConfig, hf
from model.adapters.switch import Adapters
from model.linear import Linear, one_by_one, side_by_side
from model.packed import (
    BlockedProduct,
    PackedHead,
    PackedLinear,
    PlainProduct,
    _groups,
    _pack_together,
    can_block,
    pack,
)
from tests.adapter_folders import IDS, make_adapter, make_base

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_block(CPU, dtype)]
TINY = ModelConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=92,
    vocab_size=101, max_position_embeddings=64,
)  # fmt: skip
blocked = pytest.mark.skipif(not DTYPES, reason="oneDNN does not multiply here")


def new_model(config: ModelConfig) -> Decoder:
    model = Decoder(config.resolve()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.1, generator=generator)
    return model


@torch.no_grad()
def scores(model: Decoder, ids: Tensor = IDS) -> Tensor:
    """Of a text that comes in two pieces."""
    cache = KVCache(model.config, len(ids), ids.shape[1], model.embed_tokens.weight.dtype, CPU)
    return torch.cat([model.logits(model(piece, cache=cache)) for piece in ids.split([5, ids.shape[1] - 5], dim=1)], 1)


@blocked
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 40])
@pytest.mark.parametrize("shape", [(7, 5), (92, 48), (144, 64)])
def test_a_blocked_product_against_float64(shape: tuple[int, int], rows: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x, matrix, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((rows, shape[1]), shape, shape[:1]))
    exact = x.double() @ matrix.double().t() + bias.double()
    product = BlockedProduct(matrix, bias)
    error, plain = ((made(x).double() - exact).abs() for made in (product, PlainProduct(matrix, bias)))
    # As close as the plain product, or one unit in the last place.
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=1)
    assert (error <= 2 * plain.max() + unit).all() if rows else error.shape == exact.shape
    assert torch.equal(product.matrix(), matrix)
    assert product(x[:, None]).shape == (rows, 1, shape[0])


@blocked
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"qkv_bias": True}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True},
        {"mlp": "gelu", "norm": "layernorm", "position_embedding": "alibi"}, {"normalized_head": True},
        {"local_filter": True}, {"num_local_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_packed_model_is_the_plain_one(changes: dict):
    model = new_model(replace(TINY, **changes))
    plain, sizes = scores(model), {name: parameter.numel() for name, parameter in model.named_parameters()}
    pack(model)
    torch.testing.assert_close(scores(model), plain, rtol=1e-5, atol=1e-5)
    kinds = {type(module) for module in model.modules()}
    assert {PackedLinear, PackedHead} <= kinds and Linear not in kinds
    left = {name for name, _ in model.named_parameters()}
    # No matrix stayed beside its packed form.
    assert not any(name.endswith("proj.weight") and ".experts." not in name for name in left), left
    assert "lm_head.weight" not in left and sizes.keys() >= left
    pack(model)
    torch.testing.assert_close(scores(model), plain, rtol=1e-5, atol=1e-5)


def layers_of(bias: bool) -> tuple[list[Linear], list[Linear]]:
    """Three layers of one input, twice."""
    generator = torch.Generator().manual_seed(1)
    made = [Linear(24, outputs, bias).requires_grad_(False) for outputs in (10, 4, 6)]
    for layer in made:
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    copies = [Linear(24, layer.out_features, bias).requires_grad_(False) for layer in made]
    for layer, copy in zip(made, copies):
        copy.load_state_dict(layer.state_dict())
    return made, copies


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [PlainProduct, pytest.param(BlockedProduct, marks=blocked)])
def test_layers_of_one_input_are_one_product(kind: type, bias: bool):
    plain, packed = layers_of(bias)
    _pack_together(packed, kind)
    assert all(layer.of_all is packed[0].of_all for layer in packed)
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    for wanted, found in zip(one_by_one(x, *plain), one_by_one(x, *packed), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(side_by_side(x, *packed), side_by_side(x, *plain))
    for wanted, found in zip(plain, packed):
        torch.testing.assert_close(found(x), wanted(x))
        torch.testing.assert_close(found.product(x), wanted.product(x))
        assert torch.equal(found.matrix(), wanted.matrix())
    # Some of them, or all in another order, have no common product; each is right all the same.
    for chosen in ([1, 2], [1, 0, 2], [0, 1]):
        some, others = ([layers[number] for number in chosen] for layers in (plain, packed))
        for wanted, found in zip(one_by_one(x, *some), one_by_one(x, *others), strict=True):
            torch.testing.assert_close(found, wanted)
    if kind is PlainProduct:
        # Parameters keep their names, and lie in one piece of memory.
        pointers = {layer.weight.untyped_storage().data_ptr() for layer in packed}
        assert len(pointers) == 1 and all("weight" in layer.state_dict() for layer in packed)


def test_layers_below_adapters_are_not_put_together(tmp_path: Path):
    pytest.importorskip("peft")
    base = make_base(tmp_path / "base")
    model = Decoder(hf.read_config(base)).eval()
    adapters = Adapters(model)
    adapters.add("a", make_adapter(tmp_path / "a", base, 0, target_modules=["q_proj"]))
    grouped = {layer for layers in _groups([*model.modules(), *adapters.modules()]) for layer in layers}
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in grouped}
    assert names == {"gate_proj", "up_proj"}


@blocked
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_a_packed_model(tmp_path: Path, tied: bool):
    pytest.importorskip("peft")
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    made = {
        "plain": {},
        "dora": {"use_dora": True, "target_modules": "all-linear"},
        "whole": {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head"]},
    }
    if tied:
        made.pop("whole")
    model = Decoder(hf.read_config(base)).eval()
    hf.load_weights(model, base)
    adapters, wanted = Adapters(model), {None: scores(model)}
    for number, (name, options) in enumerate(made.items()):
        adapters.add(name, make_adapter(tmp_path / name, base, number, **options))
        adapters.use(name)
        wanted[name] = scores(model)
    for used in (next(iter(made)), list(made)[-1]):
        # Whichever is in use while they are packed.
        adapters.use(used)
        pack(model, adapters.modules())
        assert not any(type(m) is Linear for root in (model, *adapters.modules()) for m in root.modules())
        for name in (*made, None, *reversed(made)):
            adapters.use(name)
            torch.testing.assert_close(scores(model), wanted[name], rtol=1e-5, atol=1e-5)


def test_nothing_changes_where_nothing_would_be_faster():
    model = new_model(TINY).to(torch.float64)
    kinds = [type(module) for module in model.modules()]
    pack(model)
    assert kinds == [type(module) for module in model.modules()]


def test_other_kinds_of_layers_stay():
    class Other(Linear):
        pass

    root = nn.Sequential(Other(8, 8), Linear(8, 8)).requires_grad_(False)
    pack(root)
    assert type(root[0]) is Other

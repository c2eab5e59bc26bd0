"""LoRA's layers: which are adapted, how they begin, what they compute."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig
from model.adapters.lora import LoraLinear, LoraSpec, adapter_parameters, attach, base_name, is_adapters, merged_matrix
from model.dropout import SITES_PER_LAYER, DropoutKey, _where, dropout_mask
from model.ops import REFERENCE, Ops

VOCAB = 40
BLOOM = {
    "model_type": "bloom", "norm": "layernorm", "embedding_norm": True, "mlp": "gelu", "mlp_bias": True,
    "attention_bias": True, "position_embedding": "alibi", "num_key_value_heads": 4, "intermediate_size": 96,
    "tie_word_embeddings": True,
}  # fmt: skip
SPEC = LoraSpec(r=4, alpha=8.0, targets=("q_proj", "v_proj"))


def tiny(ops: Ops = REFERENCE, options: dict | None = None, **fields) -> Decoder:
    """
    Args:
        options: more arguments of Decoder.
        fields: of the configuration.
    """
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(**shape | {"num_key_value_heads": 2} | fields).resolve(VOCAB, 32)
    model = Decoder(config, ops=ops, **options or {})
    model.initialize(1)
    return model


def adapted(spec: LoraSpec, noise: bool = True, **fields) -> Decoder:
    """A model whose additions do something, unless `noise` is false."""
    model = tiny(**fields)
    attach(model, spec, seed=7)
    if noise:
        with torch.no_grad():
            for name, parameter in adapter_parameters(model).items():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def tokens(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def names_of_layers(model: Decoder) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "up_proj"), ["0.self_attn.q_proj", "0.mlp.up_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]),
        (("layers.1.mlp.up_proj", "0.self_attn.o_proj"), ["0.self_attn.o_proj", "1.mlp.up_proj"]),
        (("mlp.down_proj",), ["0.mlp.down_proj", "1.mlp.down_proj"]),
    ],
)
def test_layers_are_chosen_by_whole_names_or_their_ends(targets: tuple[str, ...], expected: list[str]):
    model = adapted(dataclasses.replace(SPEC, targets=targets))
    assert names_of_layers(model) == [f"layers.{name}" for name in expected]


def test_all_linear_takes_shared_experts_but_not_the_head():
    experts = {"num_local_experts": 4, "moe_intermediate_size": 8, "num_shared_experts": 1}
    experts |= {"model_type": "ernie4_5_moe", "rope_interleaved": True}
    model = adapted(dataclasses.replace(SPEC, targets=("all-linear",)), **experts)
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    shared = [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    assert names_of_layers(model) == [f"layers.{layer}.{name}" for layer in (0, 1) for name in attention + shared]
    assert not model.layers[0].mlp.experts.gate_up_proj.requires_grad


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"targets": ("q_proj", "qproj", "query")}, "fits no layer of the model with qproj, query: it has down_proj"),
        ({"targets": ("_proj",)}, "with _proj: it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ({"targets": ("lm_head",)}, "train it whole by --lora_modules_to_save=lm_head"),
        ({"targets": ("embed_tokens", "q_proj")}, "train it whole by --lora_modules_to_save=embed_tokens"),
        ({"modules_to_save": ("lm_head", "wte")}, "cannot have wte: what can be trained whole is embed_tokens"),
        ({"modules_to_save": ("q_proj",)}, "cannot have q_proj"),
    ],
)
def test_a_name_that_fits_nothing_is_refused(spec: dict, sentence: str):
    model = tiny()
    with pytest.raises(ValueError, match=sentence):
        attach(model, dataclasses.replace(SPEC, **spec), seed=1)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not names_of_layers(model)


def test_only_what_the_adapter_consists_of_is_trained():
    spec = dataclasses.replace(SPEC, modules_to_save=("embed_tokens", "input_layernorm"), use_dora=True)
    model = adapted(spec, tie_word_embeddings=True)
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
    expected = {f"{layer}.{end}" for layer in names_of_layers(model) for end in ends}
    assert {name for name in adapter_parameters(model) if is_adapters(name)} == expected
    wholes = {name for name in adapter_parameters(model) if not is_adapters(name)}
    assert wholes == {"embed_tokens.weight", "layers.0.input_layernorm.weight", "layers.1.input_layernorm.weight"}
    assert model.lm_head.weight is model.embed_tokens.weight and model.lm_head.weight.requires_grad
    names = {base_name(name) for name, _ in model.named_parameters() if not is_adapters(name)}
    assert names == {name for name, _ in tiny(tie_word_embeddings=True).named_parameters()}


def test_first_values_depend_on_seed_and_name_alone():
    few, many = adapted(SPEC, noise=False), tiny(num_hidden_layers=3)
    attach(many, dataclasses.replace(SPEC, targets=("all-linear",)), seed=7)
    values = dict(many.named_parameters())
    assert all(torch.equal(parameter, values[name]) for name, parameter in adapter_parameters(few).items())
    other = tiny()
    attach(other, SPEC, seed=8)
    name = "layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(adapter_parameters(other)[name], values[name])
    a = torch.cat([value.detach().flatten() for name, value in values.items() if name.endswith("q_proj.lora_A.weight")])
    bound = 24**-0.5
    assert 0.9 * bound < a.abs().max() <= bound and float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_adapter_changes_nothing(use_dora: bool, dtype: torch.dtype):
    model = tiny(qkv_bias=True).to(dtype)
    before = model.logits(model(tokens()))
    attach(model, LoraSpec(r=32, alpha=8.0, targets=("all-linear",), use_dora=use_dora), seed=1)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.logits(model(tokens())), before)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True}, BLOOM])
def test_the_merged_matrix_computes_the_same(fields: dict, use_rslora: bool, use_dora: bool):
    spec = LoraSpec(r=4, alpha=8.0, targets=("all-linear",), use_rslora=use_rslora, use_dora=use_dora)
    model, merged = adapted(spec, **fields), tiny(**fields)
    assert model.get_submodule("layers.0.self_attn.q_proj").scale == (4.0 if use_rslora else 2.0)
    with torch.no_grad():
        for name in names_of_layers(model):
            merged.get_submodule(name).weight.copy_(merged_matrix(model.get_submodule(name)))
    expected, plain = merged.logits(merged(tokens())), tiny(**fields)
    assert (plain.logits(plain(tokens())) - expected).abs().max() > 1e-3
    torch.testing.assert_close(model.logits(model(tokens())), expected, atol=1e-5, rtol=0)


def test_no_two_dropouts_have_one_mask():
    model = adapted(dataclasses.replace(SPEC, targets=("all-linear",), dropout=0.5))
    assert model.drops and not adapted(SPEC).drops
    key = DropoutKey(seed=3, row_ids=torch.arange(2))
    sites = [*range(SITES_PER_LAYER), *(model.get_submodule(name).site for name in names_of_layers(model)[:7])]
    layers = torch.arange(2047)
    words = torch.cat([_where(dataclasses.replace(key, layer=layers), site) for site in sites])
    assert len(words.unique()) == len(words) == len(sites) * len(layers)
    assert 0 <= words.min() and words.max() < 1 << 16
    masks = [dropout_mask(torch.Size((2, 64)), 0.5, key.for_layer(layer), s) for layer in (0, 1) for s in sites]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_acts_on_what_is_added_alone(use_dora: bool):
    spec = LoraSpec(r=4, alpha=8.0, dropout=0.5, targets=("all-linear",), use_dora=use_dora)
    layer = adapted(spec, attention_bias=True).get_submodule("layers.0.self_attn.q_proj")
    key = DropoutKey(seed=3, row_ids=torch.arange(2)).for_layer(1)
    x = torch.randn(2, 5, 24)
    dropped = x * dropout_mask(x.shape, 0.5, key, layer.site) * 2.0
    plain = x @ layer.base_layer.weight.T + layer.base_layer.bias
    expected = plain + dropped @ (merged_matrix(layer) - layer.base_layer.weight).T
    torch.testing.assert_close(layer(x, key), expected, atol=1e-5, rtol=1e-5)

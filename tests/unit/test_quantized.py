"""Layers in 4 bits, beside those of bitsandbytes and the definition."""

import copy
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import Decoder, ModelConfig, hf, quantized
from model.adapters import lora
from model.adapters.config import ALL_LINEAR
from model.linear import Linear
from model.quantized import Linear4bit
from model.roles import generator_of
from tests.peers import peer

bitsandbytes = peer("bitsandbytes")

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float64)  # fmt: skip
"""The values of Dettmers et al. (2023), appendix E."""
SHAPES = ((8, 64), (192, 128), (16, 96), (7, 40), (3, 33))


def layer_of(rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> tuple[Linear4bit, torch.Tensor]:
    """A layer, and the matrix that it was made from."""
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    layer = Linear4bit(columns, rows, bias).to(dtype)
    layer.set_matrix(matrix)
    if bias:
        layer.bias.data.normal_(generator=generator)
    return layer, matrix


def by_definition(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and largest value of each block, in float64."""
    flat = matrix.double().flatten()
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scales = blocks.abs().amax(1)
    return (blocks / scales[:, None]).unsqueeze(-1).sub(NF4).abs().argmin(-1), scales


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_quantized_as_defined(shape: tuple[int, int]):
    layer, matrix = layer_of(*shape, torch.float32)
    codes, scales = by_definition(matrix)
    packed = layer.weight.long()
    assert torch.equal(torch.stack((packed >> 4, packed & 15), 1).view(-1, 64), codes)
    nested = layer.nested_absmax.repeat_interleave(256)[: len(scales)].double()
    stored = layer.nested_quant_map.double()[layer.absmax.long()] * nested + layer.nested_offset.double()
    assert (stored - scales).abs().max() < 0.01 * scales.max()
    expected = (NF4[codes] * stored[:, None]).flatten()[: matrix.numel()].view(shape)
    # The scales are sums in float32.
    unit = torch.finfo(torch.float32).eps
    torch.testing.assert_close(layer.matrix().double(), expected, rtol=2 * unit, atol=unit * scales.max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_bitsandbytes_to_the_bit(dtype: torch.dtype):
    layer, matrix = layer_of(192, 128, dtype)
    theirs = bitsandbytes.nn.Linear4bit(128, 192, quant_type="nf4", compute_dtype=dtype)
    theirs.load_state_dict({"weight": matrix, "bias": layer.bias})
    theirs.to("cpu")
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for module in (layer, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.float().square().sum().backward()
        results.append((y, leaf.grad))
    assert torch.equal(layer.weight, theirs.weight.data.view(-1))
    for ours, its in zip(*results):
        torch.testing.assert_close(ours, its, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(quantized._fused(x, layer.bias, 192, 128, *layer._stored()), results[0][0])


def test_gradient_of_the_input_and_of_a_trained_bias():
    layer, _ = layer_of(7, 40, torch.float32)
    layer.bias.requires_grad_(True)
    x = torch.randn(4, 40, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.bias), dy)
    theirs = torch.autograd.grad(F.linear(x, layer.matrix(), layer.bias), (x, layer.bias), dy)
    torch.testing.assert_close(ours, theirs)


def test_large_matrices_are_quantized_in_pieces(monkeypatch):
    whole, matrix = layer_of(192, 128, torch.float32)
    monkeypatch.setattr(quantized, "_PIECE", 1024)
    pieces, _ = layer_of(192, 128, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), pieces.buffers()))


def test_moving_changes_the_dtype_of_computing_alone():
    layer, _ = layer_of(16, 96, torch.float32)
    copied = copy.deepcopy(layer).to(torch.bfloat16)
    assert copied.bias.dtype == copied.matrix().dtype == torch.bfloat16
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(layer.buffers(), copied.buffers()))
    assert torch.equal(copied.matrix(), layer.matrix().bfloat16())
    assert not any(p.requires_grad for p in layer.parameters())


def test_only_the_codes_are_kept_for_the_backward_pass():
    layer, _ = layer_of(192, 128, torch.float32)
    own = {buffer.data_ptr() for buffer in layer.buffers()}
    kept = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, product = layer(x), layer.product(x)
    torch.testing.assert_close(product, y - layer.bias)
    assert kept and {tensor.data_ptr() for tensor in kept} <= own


CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True, max_position_embeddings=32,
).resolve()  # fmt: skip
CPU = torch.device("cpu")


def folder_of(config: ModelConfig, directory: Path) -> tuple[Decoder, Path]:
    """A model, and the folder that it is saved in."""
    model = Decoder(config)
    model.initialize(0)
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
    return model, directory


def plain_values(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights of a quantized model under the names of a plain one."""
    layers = quantized.quantized_layers(model)
    return dict(model.named_parameters()) | {name: layer.matrix() for name, layer in layers.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_quantized_while_it_is_read(tmp_path, dtype: torch.dtype):
    model, folder = folder_of(CONFIG, tmp_path)
    ours = hf.outline_in_4bit(CONFIG, CPU, dtype)
    hf.load_weights(ours, folder)
    for layer in model.modules():
        if type(layer) is Linear:
            alone = Linear4bit(layer.in_features, layer.out_features, bias=False)
            alone.set_matrix(layer.weight)
            layer.weight.data = alone.matrix()
    model.to(dtype)
    expected = dict(model.named_parameters())
    assert plain_values(ours).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in plain_values(ours).items())
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert quantized.count_parameters(ours) == sum(p.numel() for p in model.parameters())
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids), rtol=0, atol=0)


def test_one_matrix_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Of those that are quantized; fused ones are read together."""
    _, folder = folder_of(CONFIG, tmp_path)
    read: list[weakref.ref] = []
    quantize = Linear4bit.set_matrix

    def watched(layer: Linear4bit, matrix: torch.Tensor) -> None:
        assert not any(earlier() is not None for earlier in read)
        read.append(weakref.ref(matrix))
        quantize(layer, matrix)

    monkeypatch.setattr(Linear4bit, "set_matrix", watched)
    hf.load_weights(hf.outline_in_4bit(CONFIG, CPU, torch.bfloat16), folder)
    assert len(read) == 7 * CONFIG.num_hidden_layers


def test_what_cannot_be_quantized_is_refused(monkeypatch):
    sparse = ModelConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_local_experts=4)
    with pytest.raises(ValueError, match="experts are not quantized"):
        hf.outline_in_4bit(sparse.resolve(max_seq_len=32), CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantized._bitsandbytes.cache_clear()
    with pytest.raises(ValueError, match="pip install -r requirements-qlora.txt"):
        hf.outline_in_4bit(CONFIG, CPU, torch.float32)


def adapted(config: ModelConfig, dtype: torch.dtype = torch.float32, *options) -> Decoder:
    """A model in 4 bits with an adapter that is no longer as it began."""
    model = hf.outline_in_4bit(config, CPU, dtype, *options)
    layers = quantized.quantized_layers(model)
    with torch.no_grad():
        for name, parameter in Decoder(config).named_parameters():
            values = torch.randn(parameter.shape, generator=generator_of(0, name)) * 0.2
            layers[name].set_matrix(values) if name in layers else model.get_parameter(name).copy_(values)
        lora.attach(model, lora.LoraSpec(r=4, alpha=8, targets=(ALL_LINEAR,)), seed=0)
        for name, parameter in lora.adapter_parameters(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator_of(1, name)) * 0.1)
    return model.to(dtype)


def gradient_and_kept(model: Decoder) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The adapter's gradient, and what was kept for the backward pass, but for what the model holds anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(torch.arange(48).view(2, 24))
    hidden.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), list(kept.values())


def has_matrices(tensors: list[torch.Tensor], model: Decoder) -> bool:
    shapes = {(layer.out_features, layer.in_features) for layer in quantized.quantized_layers(model).values()}
    return any(tuple(tensor.shape) in shapes | {shape[::-1] for shape in shapes} for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_computes_the_matrices_again(dtype: torch.dtype):
    expected, _ = gradient_and_kept(adapted(CONFIG, dtype))
    for keeps in ("nothing", "matmuls"):
        gradient, kept = gradient_and_kept(model := adapted(CONFIG, dtype, True, keeps))
        assert torch.equal(gradient, expected) and not has_matrices(kept, model)


def test_compiled_blocks_are_one_graph_and_keep_no_matrix():
    config = replace(CONFIG, num_hidden_layers=1)
    expected, kept = gradient_and_kept(model := adapted(config))
    assert not has_matrices(kept, model)
    model = adapted(config)
    # Graphs of other tests' shapes would make sizes symbols here.
    torch._dynamo.reset()
    # What decides here is the division into two graphs; code need not be generated from them.
    model.compile_blocks(fullgraph=True, backend="aot_eager_decomp_partition")
    gradient, kept = gradient_and_kept(model)
    torch.testing.assert_close(gradient, expected)
    assert not has_matrices(kept, model)

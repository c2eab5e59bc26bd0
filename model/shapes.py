"""Names and shapes of a model's parameters, by formula: nothing is built, and torch is not loaded.

Shapes: C hidden size, V vocabulary, I width of the feed-forward layer, E experts, r rank of an adapter.
"""

import math
from collections.abc import Iterator

from model.adapters.config import ALL_LINEAR, AdapterConfig, names_of
from model.config import ModelConfig

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""Name of a parameter -> its shape."""


def parameters_of(config: ModelConfig) -> Shapes:
    """Every parameter of a model; a tied head is not listed.

    Args:
        config: resolved.
    """
    table: Shape = (config.vocab_size, config.hidden_size)
    found: Shapes = {"embed_tokens.weight": table}
    if config.embedding_norm:
        found.update(_norm("embed_norm", config))
    for layer in range(config.num_hidden_layers):
        found.update((f"layers.{layer}.{name}", shape) for name, shape in block_of(config, layer).items())
    found.update(_norm("norm", config))
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = table
    return found


def block_of(config: ModelConfig, layer: int) -> Shapes:
    """The parameters of a block, without its number."""
    found = Shapes(_norm("input_layernorm", config))
    found.update((f"self_attn.{name}", shape) for name, shape in _attention(config))
    found.update(_norm("post_attention_layernorm", config))
    if config.has_experts(layer):
        found.update((f"mlp.{name}", shape) for name, shape in _experts(config))
    else:
        found.update((f"mlp.{name}", shape) for name, shape in _mlp(config, config.intermediate_size))
    return found


def _norm(name: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (config.hidden_size,)
    if config.norm == "layernorm":
        yield f"{name}.bias", (config.hidden_size,)


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, dim = config.hidden_size, config.head_dim
    query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    if config.local_filter:
        for name, inputs, outputs in (("conv1", hidden, hidden // 2), ("conv2", hidden // 2, hidden)):
            yield f"local_filter.{name}.weight", (outputs, inputs, 2, 1)
            yield f"local_filter.{name}.bias", (outputs,)
        yield "local_filter.norm.weight", (hidden,)
    for name, outputs in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        yield from _linear(name, hidden, outputs, config.attention_bias or config.qkv_bias)
    if config.qk_norm:
        yield "q_norm.weight", (dim,)
        yield "k_norm.weight", (dim,)
    yield from _linear("o_proj", query, hidden, config.attention_bias)


def _mlp(config: ModelConfig, width: int) -> Iterator[tuple[str, Shape]]:
    for name in ("gate_proj", "up_proj") if config.mlp == "swiglu" else ("up_proj",):
        yield from _linear(name, config.hidden_size, width, config.mlp_bias)
    yield from _linear("down_proj", width, config.hidden_size, config.mlp_bias)


def _experts(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    num, width, hidden = config.num_local_experts, config.moe_intermediate_size, config.hidden_size
    yield "router.weight", (num, hidden)
    if config.router_bias:
        yield "router.selection_bias", (num,)
    yield "experts.gate_up_proj", (num, 2 * width, hidden)
    yield "experts.down_proj", (num, hidden, width)
    if config.num_shared_experts:
        shared = _mlp(config, config.num_shared_experts * width)
        yield from ((f"shared_expert.{name}", shape) for name, shape in shared)


def linear_of_blocks(shapes: Shapes) -> Shapes:
    """Those of linear layers in blocks, which can be kept in 4 bits."""
    return {
        name: shape
        for name, shape in shapes.items()
        if name.startswith("layers.") and name.endswith("_proj.weight") and len(shape) == 2
    }


def adapted_of(shapes: Shapes, adapter: AdapterConfig) -> Shapes:
    """The matrices that an adapter adds to; see AdapterConfig.lora_target_modules."""
    if not adapter.is_used:
        return {}
    linear, targets = linear_of_blocks(shapes), names_of(adapter.lora_target_modules)
    return linear if targets == [ALL_LINEAR] else {name: linear[name] for name in linear if _fits(name, targets)}


def _fits(name: str, modules: list[str]) -> bool:
    """Whether a parameter belongs to one of these modules, of which the ends of the names are given."""
    module = name.rpartition(".")[0]
    return any(f".{module}".endswith(f".{end}") for end in modules)


def added_by(adapter: AdapterConfig, config: ModelConfig) -> Shapes:
    """The parameters of an adapter.

    Raises:
        ValueError: it adapts no layer of this model.
    """
    found, rank = Shapes(), adapter.lora_r
    if rank is None:
        return found
    for name, (outputs, inputs) in adapted_of(parameters_of(config), adapter).items():
        layer = name.removesuffix(".weight")
        found[f"{layer}.lora_A.weight"] = (rank, inputs)
        found[f"{layer}.lora_B.weight"] = (outputs, rank)
        if adapter.use_dora:
            found[f"{layer}.lora_magnitude_vector.weight"] = (outputs,)
    if not found:
        raise ValueError(f"lora_target_modules={adapter.lora_target_modules} fits no layer of this model")
    return found


def trained_of(config: ModelConfig, adapter: AdapterConfig) -> Shapes:
    """The parameters that train."""
    shapes = parameters_of(config)
    if not adapter.is_used:
        return {name: shape for name, shape in shapes.items() if not name.endswith("selection_bias")}
    whole = names_of(adapter.lora_modules_to_save)
    saved = {name: shape for name, shape in shapes.items() if _fits(name, whole)}
    return added_by(adapter, config) | saved


def count(shapes: Shapes) -> int:
    """Number of elements."""
    return sum(map(math.prod, shapes.values()))

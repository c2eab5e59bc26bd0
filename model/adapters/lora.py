"""LoRA (Hu et al., 2021): a layer that adds a product of two thin matrices to a frozen one.

    y = W x + b + s B A x                   A (r, C), B (O, r); s = alpha / r, or alpha / sqrt(r) with rsLoRA

rsLoRA is Kalajdzievski's (2023). DoRA (Liu et al., 2024) also trains the length m (O,) of each row of the sum:

    V = W + s B A,   y = m / |V| (V x) + b  |V| (O,): lengths of the rows of V; they count as constants in gradients

A begins at random, B at 0, m as the lengths of the rows of W, so the model begins as it was. What is added can see an
x with dropout; with DoRA, y = W x + b + (m / |V| V - W) dropout(x). Names and mathematics are those of PEFT: lora_A,
lora_B, lora_magnitude_vector.

Shapes: C inputs, O outputs, r rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapters.config import ALL_LINEAR, AdapterConfig, names_of
from model.adapters.tokens import train_rows
from model.decoder import Decoder
from model.dropout import MAX_ADAPTED_LAYERS, DropoutKey, adapter_site, dropout
from model.kernels.low_rank import low_rank_linears
from model.linear import Head, Linear, SharesInput
from model.norm import LayerNorm, RMSNorm
from model.roles import generator_of

_LAYERS_OF_A_BLOCK = tuple(
    f"{parent}.{child}"
    for parent, children in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mlp.shared_expert", ("gate_proj", "up_proj", "down_proj")),
    )
    for child in children
)
"""Layers that can be adapted. A layer's place here numbers its dropout, so new ones come last."""


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, as its adapter_config.json says it."""

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Ends of the names of adapted layers, or whole names; ("all-linear",) for all linear layers but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole."""
    use_rslora: bool = False
    use_dora: bool = False
    token_ids: tuple[int, ...] = ()
    """Tokens whose rows of embedding and head are trained, see tokens.py."""

    @staticmethod
    def of(config: AdapterConfig, new_rows: range = range(0)) -> "LoraSpec":
        """The adapter that the flags describe.

        Args:
            new_rows: tokens that the weights do not know.
        """
        assert config.lora_r is not None
        whole, token_ids = names_of(config.lora_modules_to_save), tuple(new_rows)
        if new_rows and config.train_added_tokens == "all":
            whole, token_ids = list(dict.fromkeys([*whole, "embed_tokens", "lm_head"])), ()
        return LoraSpec(
            config.lora_r, config.lora_alpha, config.lora_dropout, tuple(names_of(config.lora_target_modules)),
            tuple(whole), config.use_rslora, config.use_dora, token_ids,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Lengths(nn.Module):
    """DoRA's lengths of rows, under PEFT's name.

    Args:
        lengths: (O,).
    """

    def __init__(self, lengths: Tensor):
        super().__init__()
        self.weight = nn.Parameter(lengths)


class LoraLinear(SharesInput):
    """A linear layer with its addition.

    Args:
        base_layer: frozen; its matrix may be stored in another form, see Linear.matrix.
        spec: of the adapter.
        site: of its dropout, see model.dropout.adapter_site.
        like: a tensor that has the device and dtype of the new parameters.
    """

    def __init__(self, base_layer: Linear, spec: LoraSpec, site: int, like: Tensor):
        super().__init__()
        self.scale, self.dropout, self.site = spec.scale, spec.dropout, site
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, spec.r, bias=False, device=like.device, dtype=like.dtype)
        self.lora_B = nn.Linear(spec.r, base_layer.out_features, bias=False, device=like.device, dtype=like.dtype)
        self.lora_magnitude_vector = None
        if spec.use_dora:
            self.lora_magnitude_vector = Lengths(like.new_empty(base_layer.out_features))
        self._kept_lengths: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, x: Tensor, key: DropoutKey | None = None) -> Tensor:
        """(..., C) -> (..., O)."""
        together = self.together(x, [self], key)
        return self._alone(x, key) if together is None else together[0]

    def together(
        self, x: Tensor, layers: Sequence[nn.Module], key: DropoutKey | None, packed: bool = False
    ) -> list[Tensor] | None:
        """Several adapted layers of one input, see SharesInput; None if they cannot be computed together."""
        adapted = cast("list[LoraLinear]", layers)
        is_dora = self.lora_magnitude_vector is not None
        if any(type(layer.base_layer) is not Linear for layer in adapted) or (self.dropout and key is not None):
            return None
        if packed and is_dora:
            return None
        bases = [layer.base_layer for layer in adapted]
        sums = low_rank_linears(
            x, [base.weight for base in bases], [None if is_dora else base.bias for base in bases],
            [layer.lora_A.weight for layer in adapted], [layer.lora_B.weight for layer in adapted], self.scale, packed,
        )  # fmt: skip
        return [layer._with_lengths(y) for layer, y in zip(adapted, sums)] if is_dora else list(sums)

    def _with_lengths(self, y: Tensor) -> Tensor:
        """m / |V| (V x) + b, given V x."""
        assert self.lora_magnitude_vector is not None
        factor, bias = self.lora_magnitude_vector.weight / self.row_lengths(), self.base_layer.bias
        return y * factor if bias is None else torch.addcmul(bias, y, factor)

    def _alone(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        """The formulas with dropout, and for a base layer of any kind."""
        dropped = dropout(x, self.dropout, key, self.site)
        y = cast(Tensor, self.base_layer(x, key))
        thin = F.linear(dropped, self.lora_A.weight)
        if self.lora_magnitude_vector is None:
            return _plus(y, thin, self.lora_B.weight, self.scale)
        factor = self.lora_magnitude_vector.weight / self.row_lengths()
        if dropped is not x:
            from_base = self.base_layer.product(dropped)
        else:
            from_base = y if self.base_layer.bias is None else y - self.base_layer.bias
        return y + (factor * _plus(from_base, thin, self.lora_B.weight, self.scale) - from_base)

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """|V| (O,), in the dtype of the lengths that DoRA trains, so that m / |V| begins as 1."""
        assert self.lora_magnitude_vector is not None
        if self._kept_lengths is not None:
            return self._kept_lengths
        matrix = torch.addmm(self.base_layer.matrix(), self.lora_B.weight, self.lora_A.weight, alpha=self.scale)
        return _lengths(matrix).to(self.lora_magnitude_vector.weight.dtype)

    def freeze(self) -> None:
        """Expect no more changes of the weights. DoRA's lengths of V, a product of whole matrices, are then computed
        once instead of for each token that is generated."""
        self.requires_grad_(False)
        if self.lora_magnitude_vector is not None:
            self._kept_lengths = self.row_lengths()


def _plus(y: Tensor, thin: Tensor, b_Or: Tensor, scale: float) -> Tensor:
    """y (..., O) + scale thin (..., r) B^T."""
    return torch.addmm(y.flatten(0, -2), thin.flatten(0, -2), b_Or.t(), alpha=scale).view(y.shape)


def _lengths(matrix: Tensor) -> Tensor:
    """Lengths of the rows of a matrix (O, C): (O,), float32."""
    return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))


@torch.no_grad()
def delta(layer: LoraLinear) -> Tensor:
    """s B A (O, C), float32."""
    return layer.scale * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())


@torch.no_grad()
def merged_matrix(layer: LoraLinear) -> Tensor:
    """The matrix (O, C), in float32, of the plain layer that computes the same."""
    matrix = layer.base_layer.matrix().float() + delta(layer)
    if layer.lora_magnitude_vector is None:
        return matrix
    return (layer.lora_magnitude_vector.weight.float() / _lengths(matrix))[:, None] * matrix


def attach(model: Decoder, spec: LoraSpec, seed: int) -> None:
    """Freeze a model and put the addition into the chosen layers, with its first values; without, if the model is an
    outline: see `begin`.

    Args:
        seed: key of the first values.
    Raises:
        ValueError: a name fits nothing that it could mean.
    """
    assert not any(isinstance(module, LoraLinear) for module in model.modules()), "it has an adapter"
    chosen, whole = _chosen_layers(model, spec.targets), _chosen_wholes(model, spec.modules_to_save)
    if spec.dropout and len(model.layers) > MAX_ADAPTED_LAYERS:
        raise ValueError(f"lora_dropout can be had in models of up to {MAX_ADAPTED_LAYERS} blocks: give 0")
    model.requires_grad_(False)
    for module in whole:
        module.requires_grad_(True)
    for name, layer in chosen.items():
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(layer, spec, _site_of(name), like=model.embed_tokens.weight)
        setattr(model.get_submodule(parent), child, adapted)
    if not model.embed_tokens.weight.is_meta:
        begin(model, seed)
    if spec.token_ids:
        train_rows(model, spec.token_ids)
    model.drops = model.drops or spec.dropout > 0.0


def _chosen_layers(model: Decoder, targets: tuple[str, ...]) -> dict[str, Linear]:
    """Name -> layer of those that are to be adapted.

    Raises:
        ValueError: a name fits no layer.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and not isinstance(layer, Head)
    }
    if targets == (ALL_LINEAR,):
        return layers
    for name in targets:
        if _fits("lm_head", name) or _fits("embed_tokens", name):
            raise ValueError(f"lora_target_modules cannot have {name}: train it whole by --lora_modules_to_save={name}")
    if unknown := [name for name in targets if not any(_fits(layer, name) for layer in layers)]:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(
            f"lora_target_modules fits no layer of the model with {', '.join(unknown)}: it has {', '.join(kinds)}; "
            f"{ALL_LINEAR} means all of them"
        )
    return {name: layer for name, layer in layers.items() if any(_fits(name, target) for target in targets)}


def _chosen_wholes(model: Decoder, names: tuple[str, ...]) -> list[nn.Module]:
    """Modules that are to be trained whole.

    Raises:
        ValueError: a name fits none.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | Head | RMSNorm | LayerNorm)
    }
    if unknown := [name for name in names if not any(_fits(module, name) for module in modules)]:
        kinds = sorted({name.rpartition(".")[2] for name in modules})
        raise ValueError(
            f"lora_modules_to_save cannot have {', '.join(unknown)}: what can be trained whole is {', '.join(kinds)}"
        )
    return [module for name, module in modules.items() if any(_fits(name, wanted) for wanted in names)]


def _fits(module: str, name: str) -> bool:
    """Whether a name given by the user means a module: its whole name, or the end of it after a dot."""
    return module == name or module.endswith(f".{name}")


def _site_of(name: str) -> int:
    """Site of the dropout of layers.N.REST."""
    return adapter_site(_LAYERS_OF_A_BLOCK.index(name.split(".", 2)[2]))


@torch.no_grad()
def begin(model: Decoder, seed: int) -> None:
    """Give an adapter its first values, all but trained rows of the vocabulary (tokens.py). The model has its own
    values already.

    Args:
        seed: key of the values, which depend on it and on the parameter's name alone.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_A.weight"):
            # Kaiming's uniform distribution with a = sqrt(5), as nn.Linear and PEFT have it.
            shape = model.filling.held(parameter).shape
            bound = shape[1] ** -0.5
            drawn = torch.rand(shape, generator=generator_of(seed, name)) * (2.0 * bound) - bound
            model.filling.put(parameter, drawn)
        elif name.endswith(".lora_B.weight"):
            model.filling.fill(parameter, 0.0)
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and layer.lora_magnitude_vector is not None:
            matrix, first = layer.base_layer.matrix(), 0
            if isinstance(matrix, nn.Parameter):
                parts = model.filling.held(matrix).parts
                if not parts:
                    continue
                # The rows that are held here.
                ((matrix, (rows, _)),) = parts
                first = rows.start
            model.filling.put(layer.lora_magnitude_vector.weight, _lengths(matrix), first)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that an adapter consists of: what is trained, also modules that are trained whole."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_adapters(name: str) -> bool:
    """Whether a parameter belongs to an adapter rather than to the model below it."""
    return ".lora_" in name or ".token_adapter." in name


def base_name(name: str) -> str:
    """Name of a parameter in the model without an adapter."""
    return name.replace(".base_layer.", ".")

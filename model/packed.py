"""Linear layers of a model that only serves, whose matrices lie in memory as products read them.

    layers of one input    y = x [W_1; W_2; ...]^T is one product; their matrices lie below one another
    a CPU with oneDNN      each matrix lies in blocks, in the order in which oneDNN multiplies
    CUDA                   the parameters of layers of one input are views of one matrix

All products of a 125M llama, one after the other, in ms, by one thread of an AMD EPYC (Zen 5):

                       1 row    16 rows    256 rows
    float32   plain      23        60         538
              blocks     11        24         230
    bfloat16  plain      15        20         119
              blocks    6.5        13         118

The core takes 11 ms to read these matrices in float32. The arithmetic is the same, in another order of additions.

A matrix in blocks is not a parameter: `matrix()` computes it anew. No matrix is kept twice, except a head's that is
also the embedding.

Shapes: C inputs, O outputs, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention
from model.dropout import DropoutKey
from model.linear import Head, Linear, NormalizedHead, SharesInput
from model.mlp import SwiGLU


class Product(Protocol):
    """x W^T + b, for a W that is kept in some form."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., O)."""

    def matrix(self) -> Tensor:
        """W (O, C)."""


class PlainProduct:
    """The definition, and what a GPU uses."""

    def __init__(self, matrix_OC: Tensor, bias_O: Tensor | None):
        self._matrix, self._bias = matrix_OC, bias_O

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._matrix, self._bias)

    def matrix(self) -> Tensor:
        return self._matrix


_ROWS = 16
"""oneDNN asks for how many rows an order of the matrix shall be good. The one for a single row makes all others slower;
the one for 16 rows was as good as any for 1 to 256."""


class BlockedProduct:
    """A product by oneDNN, which chose the order of W. It has no gradients."""

    def __init__(self, matrix_OC: Tensor, bias_O: Tensor | None):
        self._bias = bias_O
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(matrix_OC.contiguous(), _ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._blocks, self._bias, "none", [], "")

    def matrix(self) -> Tensor:
        return self._blocks.to_dense()


def can_block(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies here in this dtype, by the operators of torch.compile's frozen models. They have no
    public names."""
    operators = torch.ops.mkldnn
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported())


class PackedLinear(Linear, SharesInput):
    """A linear layer whose product is computed together with those of others of its input, if it has some. `pack` makes
    one of a Linear."""

    of_all: Product
    """Gives the outputs of all these layers, side by side."""
    first: int
    """Place of this layer's outputs among them."""
    width: int
    """Number of all outputs."""

    def matrix(self) -> Tensor:
        return self.of_all.matrix()[self.first : self.first + self.out_features]

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def forward(self, x: Tensor, key: DropoutKey | None = None) -> Tensor:
        """(..., C) -> (..., O)."""
        y = self.of_all(x)
        return y if self.width == self.out_features else y[..., self.first : self.first + self.out_features]

    def together(
        self, x: Tensor, layers: Sequence[nn.Module], key: DropoutKey | None, packed: bool = False
    ) -> list[Tensor] | None:
        """Parts of the common product; None if these are not all of its layers, in its order."""
        found = cast("list[PackedLinear]", layers)
        widths = [layer.out_features for layer in found]
        is_whole = sum(widths) == self.width and self.first == 0
        if not is_whole or len(found) == 1 or any(layer.of_all is not self.of_all for layer in found):
            return None
        y = self.of_all(x)
        return [y] if packed else list(y.split_with_sizes(widths, dim=-1))


class PackedHead(Head):
    """A head whose rows, as hidden states are multiplied with them, are kept in another form. `pack` makes one of a
    Head."""

    of_rows: Product
    kind: type[Head]
    """What it was."""

    def rows(self) -> Tensor:
        return self.of_rows.matrix()

    def scaled(self, rows: Tensor) -> Tensor:
        return self.kind.scaled(self, rows)

    def forward(self, hidden: Tensor, key: DropoutKey | None = None) -> Tensor:
        return self.of_rows(hidden)


@torch.no_grad()
def pack(model: nn.Module, beside: Iterable[nn.Module] = ()) -> None:
    """Pack the linear layers of a model and of its adapters, in place: each stays the object that it was and gets
    another class, as torch.nn.utils.parametrize does it. Layers of other classes stay as they are: those in 4 bits,
    shares of tensor parallelism. Where nothing would be faster, nothing changes.

    A layer below an adapter is multiplied alone. No adapter that brings new tokens can be added later.

    Args:
        beside: modules that the adapters which are not in use at present keep, see Adapters.modules.
    """
    weight = next(model.parameters())
    is_blocked = can_block(weight.device, weight.dtype)
    if not is_blocked and weight.device.type != "cuda":
        return
    modules = list(dict.fromkeys(module for root in (model, *beside) for module in root.modules()))
    groups = list(_groups(modules))
    if is_blocked:
        grouped = {layer for layers in groups for layer in layers}
        groups += [[layer] for layer in modules if type(layer) is Linear and layer not in grouped]
    for layers in groups:
        _pack_together(layers, BlockedProduct if is_blocked else PlainProduct)
    for head in modules if is_blocked else ():
        if type(head) in (Head, NormalizedHead):
            _pack_head(cast(Head, head))


def _groups(modules: Sequence[nn.Module]) -> Iterator[list[Linear]]:
    """Plain layers that always have the same input, several each."""
    adapted = {layer for module in modules if isinstance(layer := getattr(module, "base_layer", None), nn.Module)}
    for module in modules:
        names: Sequence[str] = ()
        if isinstance(module, Attention):
            # The local filter is before queries and keys alone.
            names = ("q_proj", "k_proj", "v_proj") if module.local_filter is None else ("q_proj", "k_proj")
        elif isinstance(module, SwiGLU):
            names = ("gate_proj", "up_proj")
        layers = [cast(Linear, module.get_submodule(name)) for name in names]
        if layers and all(type(layer) is Linear and layer not in adapted for layer in layers):
            yield layers


def _pack_together(layers: Sequence[Linear], new_product: type[BlockedProduct] | type[PlainProduct]) -> None:
    matrices = [layer.weight.detach() for layer in layers]
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    matrix_OC = torch.cat(matrices) if len(layers) > 1 else matrices[0]
    product = new_product(matrix_OC, torch.cat(biases) if biases else None)
    first = 0
    for layer in layers:
        if isinstance(product, PlainProduct):
            layer.weight.data = matrix_OC[first : first + layer.out_features]
        else:
            del layer.weight
        layer.__class__ = PackedLinear
        packed = cast(PackedLinear, layer)
        packed.of_all, packed.first, packed.width = product, first, len(matrix_OC)
        first += layer.out_features


def _pack_head(head: Head) -> None:
    product, kind = BlockedProduct(head.rows(), None), type(head)
    # A tied embedding still has it.
    del head.weight
    head.__class__ = PackedHead
    packed = cast(PackedHead, head)
    packed.of_rows, packed.kind = product, kind

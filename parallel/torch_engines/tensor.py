"""Tensor parallelism (Megatron-LM: Shoeybi et al., 2019): ranks share each matrix, and exchange what lies between.

Of attention, a rank computes some heads; of a feed-forward layer some of the middle; of the vocabulary some rows. Each
of two matrices, the first cut by outputs and the second by inputs, takes one sum forward and one backward:

                       x                    whole on each rank
    enter              |                    backward: gradients are added
    q, k, v  gate, up  |                    own rows: own heads, own part of the middle
    o        down      |                    own columns: a part of a sum
    leave              y                    forward: the parts are added

    positions of a row between the layers    bytes that a rank sends for a layer of x (N, C), t ranks
    plain: all on each rank                  2 (t - 1) / t N C e forward (a sum), and as many backward
    sequence parallel: a t-th on each        the same: gather at enter, scattered sum at leave; backward the reverse

Sequence parallelism (Korthikanti et al., 2023) so saves memory: what norms and additions keep is a t-th. Their weights
are whole on each rank, and have a part of the gradient there (`Outline.is_partial`). It is for passes with gradients; a
row that does not split evenly is padded.

The whole layer with experts works on whole rows, so that each rank's router sees all tokens, and gets the whole
gradient. Tokens and their weights enter the experts inside, which are cut like any feed-forward layer.

Embedding: a token of another rank's rows is zero, and the results are added. Head: its input is entered behind the last
norm; losses come from parts of the scores (model/kernels/linear_cross_entropy.py), and `logits` gathers them.

All these are changes of a DTensor's placement, in hooks around modules, which know nothing of it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any, NoReturn, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from parallel.config import ParallelConfig
from parallel.context import DistContext
from parallel.division import Division
from parallel.groups import Groups
from parallel.mesh import Mesh

PART, WHOLE = Partial(), Replicate()
"""Placements of a rank's part of a sum, and of what all ranks hold alike."""
_FLAG = "--tensor_model_parallel_size"
_LEAST_WIDTH = 8
"""torch's grouped multiplication takes rows of multiples of so many elements."""


class Exchange(Protocol):
    """See model/kernels/linear_cross_entropy.py."""

    def add_(self, tensor: Tensor) -> None: ...

    def highest_(self, tensor: Tensor) -> None: ...


class Head(Protocol):
    weight: nn.Parameter
    out_features: int

    def share_vocabulary(self, first: int, exchange: Exchange) -> None: ...

    def register_forward_hook(self, hook: Callable) -> object: ...


class Block(Protocol):
    self_attn: nn.Module
    mlp: nn.Module


class Cuttable(Protocol):
    """The part of the model that is cut."""

    config: Any
    ops: Any
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: Head

    def named_modules(self) -> Any: ...

    def named_parameters(self) -> Any: ...

    def tie_weights(self) -> None: ...


def change(x: Tensor, mesh: DeviceMesh, before: Placement, after: Placement, gradient: Placement) -> Tensor:
    """Pass a tensor on in another placement.

    Args:
        before: placement of this rank's x over the mesh.
        after: placement of the result.
        gradient: placement in which the result's gradient arrives; it leaves in that which x has (of a sum, whole).
    """
    return DTensor.from_local(x, mesh, [before]).redistribute(mesh, [after]).to_local(grad_placements=[gradient])


def check(model: nn.Module, mesh: Mesh, sequence_parallel: bool) -> None:
    """
    Raises:
        ValueError: the model cannot be cut over so many ranks, or has layers that are not cut.
    """
    config, ranks = cast(Cuttable, model).config, mesh.tensor_size

    def refuse(what: str, advice: str) -> NoReturn:
        raise ValueError(f"{_FLAG}={ranks} does not go with {what}: {advice}")

    leave_out = f"leave out {_FLAG}"
    if config.position_embedding == "alibi":
        refuse("ALiBi (position_embedding=alibi), whose slopes number all heads", leave_out)
    if config.local_filter:
        refuse("a local filter (local_filter), which mixes all heads' inputs", leave_out)
    if config.attention_dropout:
        refuse("attention_dropout, whose masks number all heads", "give --attention_dropout=0")
    if sequence_parallel and config.hidden_dropout:
        raise ValueError(
            "--sequence_parallel does not go with hidden_dropout, whose masks number the positions of a whole row: "
            "give --hidden_dropout=0 or leave out --sequence_parallel"
        )
    for module in model.modules():
        if getattr(module, "dropout", 0.0) and hasattr(module, "lora_A"):
            refuse("lora_dropout, whose masks number all inputs", "give --lora_dropout=0")
        if getattr(module, "lora_magnitude_vector", None) is not None:
            refuse("DoRA, which needs the lengths of whole rows", "leave out --use_dora")
        if hasattr(module, "token_adapter"):
            refuse("rows of new tokens that are trained alone", "give --train_added_tokens=all")
    _require_sizes(config, ranks, cast(Cuttable, model).ops.names.get("experts") == "grouped")


def _require_sizes(config: Any, ranks: int, is_grouped: bool) -> None:
    """See that everything that is cut can be divided; raises ValueError."""
    sizes = {
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if any(not config.has_experts(layer) for layer in range(config.num_hidden_layers)):
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_local_experts:
        sizes["moe_intermediate_size"] = config.moe_intermediate_size // (_LEAST_WIDTH if is_grouped else 1)
    for name, size in sizes.items():
        if size % ranks:
            common = gcd(*sizes.values())
            nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - ranks), n))
            whole, parts = f"{name}={getattr(config, name)}", ""
            if is_grouped and name == "moe_intermediate_size":
                parts = f" into multiples of {_LEAST_WIDTH}, as --experts_kernel=grouped needs them"
            raise ValueError(f"{_FLAG}={ranks} cannot cut {whole}{parts}: {_FLAG}={nearest} is the nearest possible")


def cut(
    model: nn.Module, config: ParallelConfig, context: DistContext, mesh: Mesh, groups: Groups, division: Division
) -> None:  # fmt: skip
    """Let this rank keep its part of each matrix, and exchange what lies between. Collective.

    Args:
        model: without values; of a pipeline, this rank's stages.
    """
    group = cast(dist.ProcessGroup, groups.of("tensor"))
    _keep_parts(model, division)
    device_mesh = DeviceMesh.from_group(group, context.device.type, mesh_dim_names=("tensor",))
    transfers = Transfers(device_mesh, group, mesh.tensor_size, config.sequence_parallel)
    _exchange(cast(Cuttable, model), mesh, transfers)


def _keep_parts(model: nn.Module, division: Division) -> None:
    """Replace each parameter by the part that this rank holds; those that it lacks by None."""
    # A tied matrix is listed once, and tied again below.
    for name, parameter in list(model.named_parameters()):
        held, owner = division.held(name), model.get_submodule(name.rpartition(".")[0])
        part = None
        if held is not None:
            part = parameter
            if held.shape != tuple(parameter.shape):
                part = nn.Parameter(parameter.new_empty(held.shape), parameter.requires_grad)
        setattr(owner, name.rpartition(".")[2], part)
    cast(Cuttable, model).tie_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


class Transfers:
    """The transfers, and what a forward pass tells them.

    Args:
        size: number of ranks.
        sequence_parallel: whether the ranks share the positions between the layers.
    """

    def __init__(self, device_mesh: DeviceMesh, group: dist.ProcessGroup, size: int, sequence_parallel: bool):
        self.device_mesh, self.group, self.size, self.sequence_parallel = device_mesh, group, size, sequence_parallel
        self.length = 0
        """Tokens of a whole row in this forward pass; 0: unknown, but it splits evenly."""

    @property
    def between(self) -> Placement:
        """Placement of the tensors (B, T, C) between the layers."""
        return Shard(1) if self.sequence_parallel and torch.is_grad_enabled() else WHOLE

    def enter(self, x_BTC: Tensor, gradient: Placement = PART) -> Tensor:
        """x for a layer that works on whole rows. By default, each rank's gradient is a part of a sum."""
        whole = change(x_BTC, self.device_mesh, self.between, WHOLE, gradient)
        return whole[:, : self.length] if 0 < self.length < whole.shape[1] else whole

    def leave(self, y_BTC: Tensor, before: Placement = PART) -> Tensor:
        """Results of such a layer. By default, each rank's is a part of a sum."""
        between = self.between
        if between.is_shard() and (missing := -y_BTC.shape[1] % self.size):
            y_BTC = F.pad(y_BTC, (0, 0, 0, missing))
        return change(y_BTC, self.device_mesh, before, between, between)

    def enter_whole(self, x: Tensor) -> Tensor:
        """Something that is whole on each rank, for a layer that uses it in part."""
        return change(x, self.device_mesh, WHOLE, WHOLE, PART)

    def leave_whole(self, y: Tensor) -> Tensor:
        """The sum of all ranks' parts, on each."""
        return change(y, self.device_mesh, PART, WHOLE, WHOLE)

    def gather_last(self, y: Tensor) -> Tensor:
        """The parts of the last dimension side by side."""
        return change(y, self.device_mesh, Shard(y.dim() - 1), WHOLE, WHOLE)

    def add_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)

    def highest_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)


class VocabularyRows(nn.Embedding):
    """An embedding of which this rank has some rows.

    Args:
        weight: these rows.
        first: token of the first one.
    """

    def __init__(self, weight: nn.Parameter, first: int, transfers: Transfers):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.first, self.transfers = weight, first, transfers

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, C), or this rank's positions of it."""
        self.transfers.length = input_ids_BT.shape[1]
        rows_BT = input_ids_BT - self.first
        is_here_BT = (rows_BT >= 0) & (rows_BT < self.num_embeddings)
        x_BTC = F.embedding(rows_BT.where(is_here_BT, 0), self.weight)
        return self.transfers.leave(x_BTC * is_here_BT[..., None])

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, first={self.first}"


def _exchange(model: Cuttable, mesh: Mesh, transfers: Transfers) -> None:
    """Put the transfers around the layers."""
    if model.embed_tokens is not None:
        rows = model.embed_tokens.weight
        model.embed_tokens = VocabularyRows(cast(nn.Parameter, rows), mesh.tensor_rank * len(rows), transfers)
    for block in cast("list[Block]", model.layers):
        _around(block.self_attn, partial(_enter_attention, transfers), transfers.leave)
        if hasattr(block.mlp, "experts"):
            _around_experts(block.mlp, transfers)
        else:
            _around(block.mlp, lambda x_BTC, *others: (transfers.enter(x_BTC), *others), transfers.leave)
    if model.lm_head is not None:
        # The last norm returns the sum, too.
        model.norm.register_forward_hook(lambda norm, inputs, both: (both[0], transfers.enter(both[1])))
        model.lm_head.register_forward_hook(lambda head, inputs, scores: transfers.gather_last(scores))
        model.lm_head.share_vocabulary(mesh.tensor_rank * len(model.lm_head.weight), transfers)
    # For those who tell what computes.
    model.ops = replace(model.ops, names={**model.ops.names, "cross_entropy": "chunked"})


def _around(module: nn.Module, enter: Callable[..., tuple], leave: Callable[[Any], Any]) -> None:
    """Let a module's inputs pass through `enter`, and its result through `leave`."""
    module.register_forward_pre_hook(lambda _, inputs: enter(*inputs))
    module.register_forward_hook(lambda _, inputs, result: leave(result))


def _enter_attention(transfers: Transfers, x_BTC: Tensor, attend: Any, *others: Any) -> tuple:
    # Told here, too: recomputation begins with a block.
    transfers.length = attend.positions.shape[1]
    return transfers.enter(x_BTC), attend, *others


def _around_experts(mlp: nn.Module, transfers: Transfers) -> None:
    """A feed-forward layer with experts."""

    def enter(x_BTC: Tensor, *others: Any) -> tuple:
        return transfers.enter(x_BTC, WHOLE), *others

    def leave(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return transfers.leave(result[0], WHOLE), result[1]

    def enter_experts(x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> tuple:
        return transfers.enter_whole(x_NC), chosen_NK, transfers.enter_whole(weights_NK)

    if transfers.sequence_parallel:
        _around(mlp, enter, leave)
    _around(cast(nn.Module, mlp.experts), enter_experts, transfers.leave_whole)
    if isinstance(mlp.shared_expert, nn.Module):
        _around(
            mlp.shared_expert,
            lambda x_BTC, *others: (transfers.enter_whole(x_BTC), *others), transfers.leave_whole,
        )  # fmt: skip

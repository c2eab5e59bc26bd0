"""The transformer of all families: a decoder whose layers come in a few kinds (model/config.py).

    h = embed(tokens)                                 embedding_norm: normed
    for each block:
        h = h + attention(norm(h))                    attention.py; positions and masks are in attend.py
        h = h + feed_forward(norm(h))                 mlp.py; with experts: moe.py
    logits = head(norm(h))

Every addition to h is followed by a norm, sometimes in the next block. So a block returns h and a second tensor that is
still to be added, and a kernel can do both in one pass over memory. `ops` holds the functions that do the work
(model/ops.py).

A process may hold a part of the model alone. Its units are numbered: the embedding is unit 0, the blocks are units 1 to
L, the last norm with the head is unit L + 1. `Decoder.keep` drops the others, `forward(units=...)` runs some of them.

Shapes: B batch, T tokens, C hidden size, V vocabulary, L blocks. Modules are defined in the order of their use, by
which `parallel` plans its buckets. Their names are those of Hugging Face's llama without the leading "model.".
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.attend import Attend, KVCache, RowShare, attend_to
from model.attention import Attention
from model.config import ModelConfig
from model.dropout import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, DropoutKey, dropout
from model.families import family_of
from model.filling import Filling
from model.layer_losses import LayerLosses, load_of, sums_length
from model.linear import new_head
from model.mlp import new_mlp
from model.moe import SparseMLP
from model.norm import new_norm
from model.ops import REFERENCE, Ops
from model.paged import PagedStep
from model.roles import Role, generator_of


class Block(nn.Module):
    """One transformer block.

    Args:
        layer: number of the block, from 0.
    """

    def __init__(self, config: ModelConfig, ops: Ops, layer: int):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = new_norm(config, ops)
        self.self_attn = Attention(config, ops, layer)
        self.post_attention_layernorm = new_norm(config, ops)
        self.has_experts = config.has_experts(layer)
        self.mlp = SparseMLP(config, ops) if self.has_experts else new_mlp(config, ops)
        self.checkpoint_options: dict[str, Any] | None = None
        """If given, the block checkpoints itself while it trains; see `Decoder.set_recompute`."""

    def forward(
        self,
        h_BTC: Tensor,
        to_add_BTC: Tensor | None,
        attend: Attend,
        key: DropoutKey | None = None,
        losses: LayerLosses | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the block; return h, the tensor still to be added to it, and what its experts have counted. h keeps its
        own dtype (float32 with residual_in_fp32), the matmuls run in the weights' dtype.

        Args:
            to_add_BTC: the previous block's output before dropout; None if h contains it already.
            key: names the block's dropout masks.
            losses: the experts' own losses; None: there are none.
        """
        if self.checkpoint_options is not None and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, h_BTC, to_add_BTC, attend, key, losses, **self.checkpoint_options)
        return self._forward(h_BTC, to_add_BTC, attend, key, losses)

    def _forward(
        self,
        h_BTC: Tensor,
        to_add_BTC: Tensor | None,
        attend: Attend,
        key: DropoutKey | None,
        losses: LayerLosses | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        key_before = key.for_layer_before() if key is not None and to_add_BTC is not None else None
        h_BTC, x_BTC = self.input_layernorm(h_BTC, to_add_BTC, self.dropout, key_before, FEED_FORWARD_OUTPUT)
        attended_BTC = self.self_attn(x_BTC, attend, key)
        h_BTC, x_BTC = self.post_attention_layernorm(h_BTC, attended_BTC, self.dropout, key, ATTENTION_OUTPUT)
        if self.has_experts:
            return h_BTC, *self.mlp(x_BTC, losses, key)
        return h_BTC, self.mlp(x_BTC, key), None


_KEPT = frozenset({
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_scaled_mm_v2",
    "aten::_grouped_mm", "aten::_scaled_grouped_mm",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward", "aten::_efficient_attention_forward", "aten::_cudnn_attention_forward",
    "torch_attn::_varlen_attn", "zero2all::blocked_attention", "zero2all::sorted_experts", "zero2all::low_rank_linears",
    "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward",
    "xformers_flash::flash_fwd", "xformers_flash3::flash_fwd", "xformers::efficient_attention_forward_cutlass",
})  # fmt: skip
"""Operators that multiply matrices or attend. By name, as some belong to packages that may not be installed."""


def _keep_matmuls(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    name, _, overload = operator.name().partition(".")
    # A result that is written into a caller's memory would only be there the first time.
    kept = name in _KEPT and not overload.endswith("out")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


Keeps = Literal["all", "matmuls", "nothing"]
"""What a block keeps of its forward pass for the backward pass: all that the latter needs, the outputs of matmuls and
attention, or nothing but the block's input. The rest is computed again."""


@cache
def _checkpoint_options(keeps: str) -> dict[str, Any]:
    """Arguments of torch.utils.checkpoint, by which outputs are kept."""
    # There is no generator state to preserve: dropout is a function of its key.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keeps == "matmuls":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matmuls)
    return options


Run = Callable[..., tuple[Tensor | None, ...]]
Watch = Callable[[int, Run, tuple[Tensor | None, ...]], None]
"""Gets the number of a part of the model, a function that computes that part again, and the function's arguments. Parts
are the blocks from 0, before them the embedding (-1), and after them the last norm."""


class Blocks(nn.ModuleList):
    """The blocks, found by their numbers, which are those of the whole model also where some are missing."""

    def keep(self, numbers: Collection[int]) -> None:
        """Drop the others."""
        self._modules = {name: block for name, block in self._modules.items() if int(name) in numbers}

    def numbered(self) -> Iterator[tuple[int, Block]]:
        return ((int(name), cast(Block, block)) for name, block in self._modules.items())

    def __getitem__(self, index: Any) -> Any:
        is_number = isinstance(index, int) and index >= 0
        return self._modules[str(index)] if is_number else super().__getitem__(index)


class Relay(Protocol):
    """Passes hidden states through the parts of a model that several processes hold."""

    def through(self, run: Callable[[range, Tensor | None], Tensor], like: Callable[[], Tensor]) -> Tensor:
        """Final hidden states of the whole model, where its last part is; elsewhere zeros. Collective.

        Args:
            run: runs units that this process holds, on what the unit before has returned.
            like: makes a tensor of the result's shape and dtype.
        """

    def from_last(self, compute: Callable[[], Tensor] | None, like: Callable[[], Tensor]) -> Tensor:
        """What the process with the last part computes. Collective.

        Args:
            compute: on that process; None elsewhere.
        """


class Decoder(nn.Module):
    """The whole model, or a part of it. Its weights are float32 until they are moved; `initialize` sets them."""

    def __init__(
        self,
        config: ModelConfig,
        gradient_checkpointing: bool = False,
        checkpoint_keeps: str = "nothing",
        ops: Ops = REFERENCE,
    ):
        """
        Args:
            config: resolved (no zeros left), see ModelConfig.resolve.
            gradient_checkpointing: keep only each block's inputs, and compute the rest again in the backward pass.
            checkpoint_keeps: "matmuls" also keeps the outputs of matrix multiplications and attention, and recomputes
                only cheap operations (selective recomputation: Korthikanti et al., MLSys 2023).

        Raises:
            ValueError: the configuration is not resolved, or checkpoint_keeps has nothing to act on.
        """
        super().__init__()
        if not config.vocab_size or not config.max_position_embeddings:
            raise ValueError("the model needs vocab_size and max_position_embeddings: call ModelConfig.resolve first")
        if checkpoint_keeps != "nothing" and not gradient_checkpointing:
            raise ValueError(
                f"--checkpoint_keeps={checkpoint_keeps} says what --gradient_checkpointing keeps: add that, or give "
                f"--checkpoint_keeps=nothing"
            )
        self.config, self.ops = config, ops
        self.filling = Filling()
        """How its parameters get values; another one if this process holds a part of the model."""
        # Attention dropout needs the full weight matrix.
        self.attends_by_document = not (config.attention_dropout or ops.step_by_step)
        self.drops = config.hidden_dropout > 0.0 or config.attention_dropout > 0.0
        """Whether it drops something while it trains, and needs a dropout key for that."""
        self.wants_document_starts = ops.packed is not None and not config.attention_dropout
        """Whether rows of several documents should come with `document_starts`."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = new_norm(config, ops) if config.embedding_norm else None
        self.layers = Blocks(Block(config, ops, layer) for layer in range(config.num_hidden_layers))
        self.norm = new_norm(config, ops)
        self.lm_head = new_head(config, ops)
        self.tie_weights()
        self._windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
        self._sparse_layers = [layer for layer in range(config.num_hidden_layers) if config.has_experts(layer)]
        self.relay: Relay | None = None
        """How forward passes go through the parts that other processes hold."""
        self._compiled_parameters: list[nn.Parameter] = []
        self._watch: Watch | None = None
        self.row_share: RowShare | None = None
        """The part of each row's positions that this process computes; None: all. With a cache, it computes all."""
        self.keeps: tuple[Keeps, ...] = ()
        """What each block keeps, see `set_recompute`."""
        keeps = cast(Keeps, checkpoint_keeps if gradient_checkpointing else "all")
        self.set_recompute([keeps] * config.num_hidden_layers)

    def tie_weights(self) -> None:
        """Let the head have the embedding's matrix, if the model has one for both. Memory that was given anew has
        undone this."""
        if self.config.tie_word_embeddings and self.lm_head is not None:
            # An adapter may have put layers around them.
            embedding, head = (getattr(layer, "base_layer", layer) for layer in (self.embed_tokens, self.lm_head))
            head.weight = embedding.weight

    def set_recompute(self, keeps: Sequence[Keeps]) -> None:
        """Choose what each block keeps of its forward pass while the model trains. The results are the same."""
        self.keeps = tuple(keeps)
        assert len(keeps) == self.config.num_hidden_layers
        for index, block in self.layers.numbered():
            kept = keeps[index]
            # Inside the compiled graph: from outside, a compiled block is one operation whose matmuls write into memory
            # of its own, so there would be nothing to keep.
            is_inside = self._compiled_parameters and kept == "matmuls"
            block.checkpoint_options = _checkpoint_options(kept) if is_inside else None

    def keep(self, units: Collection[int]) -> None:
        """Drop the modules of all units but these. What is left keeps its names, and blocks their numbers; a matrix
        that embedding and head share stays under its one name."""
        last = self.config.num_hidden_layers + 1
        self.layers.keep([unit - 1 for unit in units])
        has_first, has_last = 0 in units, last in units
        if not (has_first or (has_last and self.config.tie_word_embeddings)):
            self.embed_tokens = None  # type: ignore[assignment]
        if not has_first:
            self.embed_norm = None
        if not has_last:
            self.norm = self.lm_head = None  # type: ignore[assignment]

    def share_rows(
        self, number: int, count: int, gather: Callable[[Tensor], Tensor], add: Callable[[Tensor], Tensor],
        ring: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Compute with a part of the positions of each row, see attend.RowShare.

        Raises:
            ValueError: the model does something that needs whole rows.
        """
        if self.config.local_filter:
            raise ValueError(
                "--context_parallel_size cuts rows, and the local filter of this model reads across a cut: leave it out"
            )
        if self.drops:
            raise ValueError(
                "--context_parallel_size cuts rows, and dropout is drawn for whole ones: give --hidden_dropout=0 "
                "--attention_dropout=0 --lora_dropout=0, or leave it out"
            )
        if ring is not None and (self.config.position_embedding == "alibi" or any(self._windows)):
            raise ValueError(
                "--context_parallel_method=ring knows neither windows nor ALiBi, and this model has one of them: give "
                "--context_parallel_method=gather"
            )
        if ring is not None and self.config.head_dim % 8:
            raise ValueError(
                f"--context_parallel_method=ring needs heads whose width is a multiple of 8, not "
                f"{self.config.head_dim}: give --context_parallel_method=gather"
            )
        self.row_share = RowShare(number, count, gather, add, ring)
        self.wants_document_starts &= self.ops.tails is not None

    def compile_blocks(self, **options) -> None:
        """Compile each block with these options of torch.compile; one graph serves all blocks."""
        # Graphs of single documents would be built anew for each division of the rows.
        self.attends_by_document = False
        for block in self.layers:
            block.compile(**options)
        self._compiled_parameters = list(self.layers.parameters())
        self.set_recompute(self.keeps)

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Context in which `watch` is called before each part of a forward pass (model/activations.py)."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    @contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Hide the compiled blocks' gradients during the forward pass. torch.compile would leave uncompiled whatever
        touches a parameter whose gradient has another dtype, such as float32 beside bfloat16."""
        gradients = [parameter.grad for parameter in self._compiled_parameters]
        for parameter in self._compiled_parameters:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in zip(self._compiled_parameters, gradients):
                parameter.grad = gradient

    def forward(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | PagedStep | None = None,
        dropout_key: DropoutKey | None = None,
        document_starts: Tensor | None = None,
        losses: LayerLosses | None = None,
        units: range | None = None,
        entering: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, normed, (B, T, C) in the weights' dtype; `logits` turns them into scores.

        If this process holds a part of the model alone, all processes run the pass together, each its own part, and get
        the final hidden states where the head is; zeros elsewhere.

        Args:
            input_ids_BT: token ids, int64. With a `row_share`, and without a cache, those of its positions, while
                positions_BT and document_ids_BT are of whole rows; the result is of its positions.
            positions_BT: int64; by default 0..T-1, or the positions after the cache. 0 where a row is padded.
            document_ids_BT: int64; tokens attend only within equal ids, which lie side by side. Not together with a
                cache.
            cache: read and extended in place. With a PagedStep, the one row has the new tokens of all its segments.
            dropout_key: names the dropout masks; without it nothing is dropped.
            document_starts: offsets of the documents of document_ids, see attend.document_starts, with a `row_share`
                attend.document_tails; used if `wants_document_starts`.
            losses: the experts' own losses, which enter the backward pass of the result; None: they do not.
            units: run these units alone. The result is then what enters the next unit (B, T, C), in float32 with
                residual_in_fp32; final hidden states after the last one.
            entering: what the unit before them has returned.
        """
        if units is None and self.relay is not None:
            run = partial(
                self.forward, input_ids_BT, positions_BT, document_ids_BT, cache, dropout_key, document_starts, losses
            )
            shape = *input_ids_BT.shape, self.config.hidden_size
            hidden_BTC = self.relay.through(
                run, lambda: torch.empty(shape, dtype=self._dtype(), device=input_ids_BT.device)
            )
            if cache is not None:
                cache.advance(input_ids_BT.shape[1])
            return hidden_BTC
        num_new, device = input_ids_BT.shape[1], input_ids_BT.device
        last = self.config.num_hidden_layers + 1
        units = range(last + 1) if units is None else units
        windows = [window for index, window in enumerate(self._windows) if index + 1 in units]
        if cache is not None:
            cache.require_room(num_new)
        if isinstance(cache, PagedStep):
            attends = cache.attends(self.config, windows, self._dtype())
        else:
            attends = self._attends(
                windows, num_new, positions_BT, document_ids_BT, cache, document_starts, len(input_ids_BT), device
            )
        h_BTC = entering
        if h_BTC is None:
            (h_BTC,) = self._run(-1, partial(self._embed, input_ids_BT))
        with self._gradients_aside():
            h_BTC, to_add_BTC, layer_key, counted = self._blocks(units, h_BTC, attends, dropout_key, losses)
        if last in units:
            if cache is not None and self.relay is None:
                cache.advance(num_new)
            (h_BTC,) = self._run(last - 1, partial(self._last_norm, layer_key), h_BTC, to_add_BTC)
        elif to_add_BTC is not None:
            h_BTC = h_BTC + dropout(to_add_BTC, self.config.hidden_dropout, layer_key, FEED_FORWARD_OUTPUT)
        return losses.close(h_BTC, self._placed(counted)) if losses is not None else h_BTC

    def _attends(
        self, windows: list[int], num_new: int, positions_BT: Tensor | None, document_ids_BT: Tensor | None,
        cache: KVCache | None, document_starts: Tensor | None, batch: int, device: torch.device,
    ) -> dict[int, Attend]:  # fmt: skip
        """The Attend of each window, for whole rows or this process' share of them."""
        share = self.row_share if cache is None else None
        if positions_BT is None:
            past = torch.tensor(cache.lengths if cache is not None else [0], device=device)
            width = num_new * (share.count if share is not None else 1)
            positions_BT = (past[:, None] + torch.arange(width, device=device)).expand(batch, -1)
        starts = document_starts if self.wants_document_starts else None
        if starts is not None and self._compiled_parameters:
            # Otherwise there would be one graph for the first number of documents and another one for all others.
            torch._dynamo.maybe_mark_dynamic(starts, 0)
        return attend_to(
            self.config, windows, num_new, device, positions_BT, document_ids_BT, starts, cache,
            self.attends_by_document, self.ops.by_mask or self.config.attention_dropout > 0.0,
            self._dtype(), share, self.ops.tails is not None,
        )  # fmt: skip

    def _dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return (next(self.parameters()) if self.embed_tokens is None else self.embed_tokens.weight).dtype

    def _blocks(
        self, units: range, h_BTC: Tensor, attends: dict[int, Attend], dropout_key: DropoutKey | None,
        losses: LayerLosses | None,
    ) -> tuple[Tensor, Tensor | None, DropoutKey | None, dict[int, Tensor]]:  # fmt: skip
        """Run the blocks among the units; return h, the tensor still to be added to it, that tensor's dropout key, and
        what the layers with experts have counted."""
        counted: dict[int, Tensor] = {}
        to_add_BTC: Tensor | None = None
        key: DropoutKey | None = None
        for index, window in enumerate(self._windows):
            if index + 1 not in units:
                continue
            key_before, key = key, dropout_key.for_layer(index) if dropout_key is not None else None
            run = partial(self._run_block, index, attends[window], key_before, key, losses)
            h_BTC, to_add_BTC, sums = self._run(index, run, h_BTC, to_add_BTC)
            if sums is not None:
                counted[index] = sums
        return h_BTC, to_add_BTC, key, counted

    def _placed(self, counted: Mapping[int, Tensor]) -> list[Tensor]:
        """What each layer with experts of the whole model has counted: zeros for those that have not run."""
        if len(counted) == len(self._sparse_layers):
            return list(counted.values())
        nothing = torch.zeros(sums_length(self.config), dtype=torch.float64, device=next(self.parameters()).device)
        return [counted.get(index, nothing) for index in self._sparse_layers]

    def _run(self, part: int, run: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Run a part of the model, before the eyes of the watch, if there is one."""
        if self._watch is not None:
            self._watch(part, run, inputs)
        return run(*inputs)

    def _embed(self, input_ids_BT: Tensor) -> tuple[Tensor]:
        h_BTC = self.embed_tokens(input_ids_BT)
        if self.embed_norm is not None:
            h_BTC = self.embed_norm(h_BTC, None, 0.0, None, 0)[1]
        return (h_BTC.float() if self.config.residual_in_fp32 else h_BTC,)

    def _run_block(
        self,
        index: int,
        attend: Attend,
        key_before: DropoutKey | None,
        key: DropoutKey | None,
        losses: LayerLosses | None,
        h_BTC: Tensor,
        to_add_BTC: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run a block, which keeps what it shall.

        Args:
            key_before: dropout key of the previous block, whose output `to_add` is.
        """
        block, keeps = cast(Block, self.layers[index]), self.keeps[index]
        if keeps == "all" or not (self.training and torch.is_grad_enabled()):
            return block(h_BTC, to_add_BTC, attend, key, losses)
        if to_add_BTC is not None:
            # So that one tensor is kept instead of two.
            h_BTC = h_BTC + dropout(to_add_BTC, self.config.hidden_dropout, key_before, FEED_FORWARD_OUTPUT)
        if block.checkpoint_options is not None:
            return block(h_BTC, None, attend, key, losses)
        return checkpoint(block, h_BTC, None, attend, key, losses, **_checkpoint_options(keeps))

    def _last_norm(self, key: DropoutKey | None, h_BTC: Tensor, to_add_BTC: Tensor | None) -> tuple[Tensor]:
        return (self.norm(h_BTC, to_add_BTC, self.config.hidden_dropout, key, FEED_FORWARD_OUTPUT)[1],)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary in the weights' dtype: normed hidden states (..., C) -> (..., V)."""
        if self.relay is not None:
            shape = *hidden.shape[:-1], self.config.vocab_size
            return self._from_last(lambda: self.lm_head(hidden), lambda: hidden.new_empty(shape))
        return self.lm_head(hidden)

    def loss_sum(
        self, hidden: Tensor, labels: Tensor, grad_scale: float = 1.0, told: Tensor | None = None
    ) -> Tensor:
        """Sum of the supervised tokens' cross entropies; see Head.loss_sum."""
        if self.relay is not None:
            loss_sum = self._from_last(
                lambda: self.lm_head.loss_sum(hidden, labels, grad_scale, told),
                lambda: hidden.new_empty((), dtype=torch.float32),
            )
            if told is not None:
                told.copy_(self._from_last(told.clone, lambda: torch.empty_like(told)))
            return loss_sum
        return self.lm_head.loss_sum(hidden, labels, grad_scale, told)

    def token_logprobs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probability of each label; see Head.token_logprobs."""
        if self.relay is not None:
            return self._from_last(
                lambda: self.lm_head.token_logprobs(hidden, labels),
                lambda: hidden.new_empty(labels.shape, dtype=torch.float32),
            )
        return self.lm_head.token_logprobs(hidden, labels)

    def _from_last(self, compute: Callable[[], Tensor], like: Callable[[], Tensor]) -> Tensor:
        """What the process with the head computes."""
        assert self.relay is not None
        return self.relay.from_last(compute if self.lm_head is not None else None, like)

    def rebalance(self, sums: Tensor) -> None:
        """Move the biases by which the routers choose, after a step (router_bias_update_rate).

        Args:
            sums: what the layers with experts have counted in the global batch, see model/layer_losses.py.
        """
        load_LE, blocks = load_of(sums), dict(self.layers.numbered())
        for index, load_E in zip(self._sparse_layers, load_LE, strict=True):
            if index in blocks:
                router = cast("SparseMLP", blocks[index].mlp).router
                router.rebalance(load_E, self.config.router_bias_update_rate)

    def roles(self) -> dict[str, Role]:
        """Name of each parameter -> its role: how it begins, and how optimizers and parallelism treat it."""
        family = family_of(self.config)
        # A layer keeps its role below an adapter.
        return {name: family.role_of(name.replace(".base_layer.", ".")) for name, _ in self.named_parameters()}

    @torch.no_grad()
    def initialize(self, seed: int, names: Collection[str] | None = None) -> None:
        """Set the initial weights by their roles; model/roles.py has the table. A weight depends on the seed and its
        own name alone, not on the order, the device or the rows that are held here: all rows are drawn, one parameter
        at a time.

        Args:
            names: set only these; None: all.
        """
        std = self.config.initializer_range
        stds = {"normal": std, "residual": std / math.sqrt(2 * self.config.num_hidden_layers)}
        roles = self.roles()
        for name, parameter in self.named_parameters():
            if names is not None and name not in names:
                continue
            begins = roles[name].begins
            if begins == "zero" or begins == "one":
                self.filling.fill(parameter, float(begins == "one"))
            else:
                # (Without a name, or the next one would be drawn beside it.)
                normal = partial(torch.randn, generator=generator_of(seed, name))
                self.filling.put(parameter, normal(self.filling.held(parameter).shape).mul_(stds[begins]))

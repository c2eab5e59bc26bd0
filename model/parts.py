"""What a rank of a mesh holds of a model, for the formula of model/memory.py: plain data, without torch.

    tensor T     heads, widths of feed-forward layers and rows of the vocabulary are divided by T
    pipe P       a rank has some units: the embedding, blocks, the last norm with the head
    expert E     stacks of experts are divided by E

Context parallelism divides the tokens alone.

Of the micro-batches of a step, a rank of a pipeline keeps the activations of several at once. Before its first backward
pass, rank r of P with v stages has done so many forward passes, counted in stages of one micro-batch (of m):

    gpipe          m v
    1f1b           P - r                                Narayanan et al., "PipeDream-Flush", 2021
    interleaved    (v - 1) P + 2 (P - r - 1) + 1        Narayanan et al., "Efficient Large-Scale Language Model
                                                        Training on GPU Clusters Using Megatron-LM", 2021
    zero_bubble    v P: inputs of the matrices wait     Qi et al., "Zero Bubble Pipeline Parallelism", 2024
    zbv            v P                                  the same
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from model.config import ModelConfig
from model.shapes import Shape, Shapes
from utils.balance import balance

STAGES_A_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}
"""Schedule -> stages of each rank, if nothing says how many."""


@dataclass(frozen=True)
class Part:
    """What a rank holds, before FSDP cuts it."""

    config: ModelConfig
    """The model's, with the heads, widths and rows of the vocabulary that a tensor rank has."""
    layers: tuple[int, ...]
    has_embedding: bool = True
    has_head: bool = True
    in_flight: float = 1.0
    """Micro-batches whose activations it keeps at once."""
    stages: int = 1
    """Stages of the pipeline that it holds, each of which runs by itself."""
    expert_size: int = 1
    """Ranks that share the experts."""

    def own(self, shapes: Shapes) -> Shapes:
        """The parameters that it holds.

        Args:
            shapes: those of a model of its `config`.
        """
        return {name: self._cut(name, shape) for name, shape in shapes.items() if self._holds(name)}

    def _holds(self, name: str) -> bool:
        first, *rest = name.split(".")
        if first == "layers":
            return int(rest[0]) in self.layers
        if first == "embed_tokens":
            return self.has_embedding or (self.config.tie_word_embeddings and self.has_head)
        return self.has_embedding if first == "embed_norm" else self.has_head

    def _cut(self, name: str, shape: Shape) -> Shape:
        return (shape[0] // self.expert_size, *shape[1:]) if is_stack(name) else shape


def is_stack(name: str) -> bool:
    """Whether a parameter is a stack of experts."""
    return ".experts." in name


def whole(config: ModelConfig) -> Part:
    """All of a model."""
    return Part(config, tuple(range(config.num_hidden_layers)))


def tensor_part(config: ModelConfig, size: int) -> ModelConfig:
    """What a tensor rank has of a model.

    Raises:
        ValueError: something cannot be divided.
    """
    cut = ["num_attention_heads", "num_key_value_heads", "vocab_size"]
    cut += ["intermediate_size"] if not all(map(config.has_experts, range(config.num_hidden_layers))) else []
    cut += ["moe_intermediate_size"] if config.num_local_experts else []
    for name in cut:
        if getattr(config, name) % size:
            raise ValueError(
                f"--tensor_model_parallel_size={size} does not divide {name} {getattr(config, name)}: give a divisor"
            )
    return replace(config, **{name: getattr(config, name) // size for name in cut})


def stages_of(
    costs: Sequence[float], ranks: int, schedule: str, parts: Sequence[int], blocks: int
) -> list[list[range]]:
    """Units of each stage of each rank of a pipeline: 0 is the embedding, the last one the head.

    Args:
        costs: each unit's, see flops.unit_flops.
        parts: units of each stage; empty: as many blocks as `blocks` says, or stages that cost about the same, as
            training has them.
        blocks: of each stage, in which embedding and head come on top; 0: not said.
    Raises:
        ValueError: they do not fit the model.
    """
    units = len(costs)
    num_layers = units - 2
    if not parts and blocks:
        parts = [blocks] * (num_layers // blocks)
        parts[0], parts[-1] = parts[0] + 1, parts[-1] + 1
    elif not parts:
        parts = balance(costs, min(ranks * STAGES_A_RANK[schedule], units))
    if sum(parts) != units or len(parts) % ranks or min(parts) < 1:
        raise ValueError(
            f"{','.join(map(str, parts))} are not the units of stages for {ranks} ranks: their number must be a "
            f"multiple of {ranks}, and their sum {units} ({num_layers} blocks, the embedding and the head)"
        )
    stages = [range(end - size, end) for size, end in zip(parts, accumulate(parts))]
    if schedule == "zbv":
        return [[stages[rank], stages[-1 - rank]] for rank in range(ranks)]
    return [stages[rank::ranks] for rank in range(ranks)]


def in_flight(schedule: str, rank: int, ranks: int, stages: int, micro_batches: int) -> float:
    """Micro-batches whose activations a rank of a pipeline keeps at once.

    Args:
        stages: of each rank.
    """
    most = micro_batches * stages
    started = {
        "gpipe": most,
        "1f1b": ranks - rank,
        "interleaved": (stages - 1) * ranks + 2 * (ranks - rank - 1) + 1,
        "zero_bubble": stages * ranks,
        "zbv": stages * ranks,
    }[schedule]
    return min(most, started) / stages


def pipe_part(part: Part, stages: Sequence[range], micro_batches: float) -> Part:
    """The part of a rank of a pipeline.

    Args:
        stages: their units, see stages_of.
        micro_batches: see Part.in_flight.
    """
    own, head = {unit for stage in stages for unit in stage}, part.config.num_hidden_layers + 1
    layers = tuple(layer for layer in part.layers if layer + 1 in own)
    return replace(
        part, layers=layers, has_embedding=0 in own, has_head=head in own, in_flight=micro_batches, stages=len(stages)
    )

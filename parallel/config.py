"""Options of parallelism. Plain data: importing this does not load torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from utils.options import OnlyWith, Refused, refuse, require_not_negative, require_positive

_SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"
)  # fmt: skip
_SIZES_OF_STAGES = tuple(name for name in _SIZES if name != "pipeline_model_parallel_size")
"""Sizes of the dimensions whose ranks share a stage."""


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel."""

    ddp_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Library for gradient collectives; auto: nccl on CUDA, otherwise gloo."""
    ddp_impl: Literal["bucketed", "naive"] = "bucketed"
    """naive: all-reduce each gradient after the backward pass, for comparison."""
    data_parallel: Literal["auto", "fsdp", "hsdp"] = "auto"
    """auto: the model is whole on every rank. fsdp: each rank keeps its shard of the model (torch's FSDP2); hsdp: the
    ranks of a machine share a copy of it."""
    reshard_after_forward: bool = True
    """fsdp: give up a block's gathered weights after its forward pass and gather them again in the backward pass
    (ZeRO-3). Off: keep them (ZeRO-2)."""
    fsdp_cpu_offload: bool = False
    """fsdp: keep parameters, gradients and optimizer state in host memory, and step there."""
    ranks_per_machine: int = 0
    """Neighbouring ranks between which the network is fast; 0: those that one torchrun has started."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""
    sequence_parallel: bool = False
    """Tensor parallelism: also share the positions between the matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages of the model, each on ranks of its own."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = "1f1b"
    """Pipeline: the order of the micro-batches' forward and backward passes. gpipe and 1f1b have one stage a rank, zbv
    two, interleaved two or more, zero_bubble any number."""
    num_layers_per_virtual_pipeline_stage: int = 0
    """Pipeline: blocks of a stage, of which each rank then has several; 0: as few stages as the schedule can have."""
    pipeline_parts: str = ""
    """Pipeline: units of each stage, such as 5,4,4,5; the embedding and the head count one each. Empty: balanced by
    the number of operations; measured: balanced by time measured at the start."""
    pipeline_micro_batches: str = ""
    """Pipeline: number of equal micro-batches into which a step's rows are cut; auto: that of the shortest predicted
    step. Empty: as --gradient_accumulation_steps says."""
    context_parallel_size: int = 1
    """Ranks that share the positions of each row."""
    context_parallel_method: Literal["gather", "ring"] = "gather"
    """Context parallelism: gather keys and values of the whole row, or pass them on round a ring (rows of one
    document)."""
    expert_model_parallel_size: int = 1
    """Data ranks that share the experts of each layer."""
    bucket_size: int = 6_553_600
    """Elements at which a bucket is full (default: 25 MiB of float32 gradients)."""
    disable_bucketing: bool = False
    """Use one bucket for everything, without overlap."""
    overlap_grad_reduce: bool = True
    """Reduce each bucket while the backward pass goes on."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32, whatever the dtype of the weights."""
    use_bf16_compress_hook: bool = False
    """Send gradients (with PowerSGD, its factors) as bfloat16."""
    use_fp16_compress_hook: bool = False
    """Send gradients (with PowerSGD, its factors) as float16, scaled by a power of two on which the ranks agree."""
    use_powerSGD_hook: bool = False
    """Send gradients as low-rank factors (parallel/powersgd.py)."""
    use_distributed_optimizer: bool = False
    """ZeRO-1: each rank keeps and steps its share of the optimizer state (parallel/zero1.py)."""
    overlap_param_gather: bool = False
    """ZeRO-1: gather the parameters during the next forward pass."""
    overlap_optim_step: bool = False
    """Step each bucket as soon as it is reduced. Needs --grad_clip=0; not with float16."""
    overlap_zero_grad_buffer: bool = False
    """Zero a bucket's gradients right after that step."""
    check_for_nan_in_grad: bool = False
    """Check every bucket; at a non-finite gradient, stop and name the parameters. (In float16 the loss scaler acts.)"""
    replica_check_interval: int = 100
    """Steps between comparisons of the weights of all ranks, which also precede each save; 0: none."""
    dist_timeout: float = 600.0
    """Seconds after which a collective that hangs is an error."""

    @property
    def uses_fsdp(self) -> bool:
        """Whether data ranks hold shards of the model rather than all of it."""
        return self.data_parallel != "auto"

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of the model rather than all of it."""
        return self.uses_fsdp or any(
            size > 1
            for size in (
                self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.expert_model_parallel_size
            )
        )

    @property
    def has_other_dimensions(self) -> bool:
        """Whether the mesh has more dimensions than data."""
        return any(getattr(self, name) > 1 for name in _SIZES)

    @property
    def cut_by(self) -> str:
        """The flag that cuts the model or its rows, as given; empty: every rank works through whole rows with the whole
        model."""
        if self.uses_fsdp:
            return f"--data_parallel={self.data_parallel}"
        return next((f"--{name}={getattr(self, name)}" for name in _SIZES if getattr(self, name) > 1), "")

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no run can have, or options that exclude each other.
        """
        require_positive(self, "dist_timeout", *_SIZES)
        require_not_negative(
            self, "replica_check_interval", "bucket_size", "ranks_per_machine", "num_layers_per_virtual_pipeline_stage"
        )
        refuse(vars(self), vars(ParallelConfig()), REFUSED)
        # What the stages have to do with the model is judged in stages.py.
        if not re.fullmatch(r"|auto|[1-9][0-9]*", self.pipeline_micro_batches):
            raise ValueError(
                f'pipeline_micro_batches must be a positive number or "auto", got {self.pipeline_micro_batches!r}'
            )


@dataclass(frozen=True)
class PowerSGDConfig:
    """PowerSGD."""

    matrix_approximation_rank: int = 16
    """Columns of a factor: the rank of the approximation."""
    warm_start: bool = True
    """Start from the last step's Q. Off: draw a new random one at each step."""
    use_error_feedback: bool = True
    """Add the error of a step's compression to the next step's gradient."""
    start_powerSGD_iter: int = 0
    """First step that is compressed."""
    min_compression_rate: float = 2.0
    """Leave matrices uncompressed that would shrink by less than this factor."""
    orthogonalization_epsilon: float = 0.0
    """Damping of linearly dependent columns."""
    orthogonalize_in_float32: bool = True
    """Keep the factors of 16-bit gradients in float32. Off: Gram-Schmidt in 16 bits."""
    use_fixed_Q: bool = False
    """Use a random Q, not a learnt one: half the collectives, but needs a higher rank. Best with --no-warm_start."""
    grad_buffer_is_powerSGD_error: bool = False
    """Keep the residual in the gradient buffer, which saves 4 bytes a parameter; not with float16."""
    powerSGD_exclude: str = ""
    """Words separated by commas: parameters whose names contain one are not compressed."""
    powerSGD_log_interval: int = 100
    """Steps between records of the relative error of each matrix; 0: none."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that nothing can be compressed with.
        """
        require_not_negative(
            self, "start_powerSGD_iter", "orthogonalization_epsilon", "min_compression_rate", "powerSGD_log_interval"
        )
        if self.matrix_approximation_rank < 1:
            raise ValueError(f"matrix_approximation_rank must be at least 1, got {self.matrix_approximation_rank}")


def _uses_fsdp(f: Mapping[str, Any]) -> bool:
    return f["data_parallel"] != "auto"


def _is_naive(f: Mapping[str, Any]) -> bool:
    return f["ddp_impl"] == "naive"


def _is_split(f: Mapping[str, Any]) -> bool:
    return f["pipeline_schedule"] in ("zero_bubble", "zbv")


def _has_pipeline(f: Mapping[str, Any]) -> bool:
    return f["pipeline_model_parallel_size"] > 1


def _not_with_fsdp(name: str, reason: str) -> Refused:
    # Either may come from the saved configuration of a resumed run, so both ways out are named.
    narrow = "; --no-grad_reduce_in_fp32 sends gradients in --dtype" if name.endswith("_hook") else ""
    return Refused(
        (name,), _uses_fsdp,
        f"does not go with --data_parallel={{data_parallel}}, {reason}: give --no-{name} or --data_parallel=auto"
        f"{narrow}",
    )  # fmt: skip


REFUSED = (
    _not_with_fsdp("use_distributed_optimizer", "which shares the optimizer's state anyway"),
    _not_with_fsdp("use_powerSGD_hook", "which sums gradients a block at a time, by no hook"),
    _not_with_fsdp("use_bf16_compress_hook", "which sums gradients a block at a time, by no hook"),
    _not_with_fsdp("use_fp16_compress_hook", "which sums gradients a block at a time, by no hook"),
    _not_with_fsdp("overlap_param_gather", "which gathers weights under the forward pass anyway"),
    _not_with_fsdp("overlap_optim_step", "which sums gradients in every micro-batch and steps after the last"),
    _not_with_fsdp("overlap_zero_grad_buffer", "which has no buffer of gradients"),
    Refused(
        ("ddp_impl",), _uses_fsdp,
        "needs the whole model on every rank: leave out --data_parallel={data_parallel}",
    ),
    Refused(
        ("data_parallel",), _has_pipeline,
        "gathers a block's weights for each micro-batch, of which a pipeline has many: with "
        "--pipeline_model_parallel_size={pipeline_model_parallel_size}, share the optimizer's state by "
        "--use_distributed_optimizer, or the matrices by --tensor_model_parallel_size",
    ),
    Refused(
        ("pipeline_schedule",),
        lambda f: _has_pipeline(f) and _is_split(f) and any(f[name] > 1 for name in _SIZES_OF_STAGES),
        "takes the gradients of weights apart from those of inputs, in an order that ranks which share matrices, "
        "experts or rows would not agree on: give --pipeline_schedule=interleaved",
    ),
    Refused(
        ("ddp_impl",), _has_pipeline,
        "sums gradients one after the other after the backward pass, and a pipeline sums buckets: leave it out",
    ),
    Refused(
        ("expert_model_parallel_size",), _uses_fsdp,
        "keeps each expert whole, and --data_parallel={data_parallel} cuts every parameter: leave one of them out; "
        "with --data_parallel=auto, --use_distributed_optimizer shares the optimizer's state",
    ),
    Refused(
        ("ddp_impl",), lambda f: f["expert_model_parallel_size"] > 1 or f["tensor_model_parallel_size"] > 1,
        "adds up every gradient over all ranks, and some of these hold different parts of the model: leave it out",
    ),
    Refused(
        ("use_distributed_optimizer", "use_powerSGD_hook", "use_bf16_compress_hook", "overlap_optim_step",
         "use_fp16_compress_hook"), _is_naive,
        "needs buckets: leave out --ddp_impl=naive",
    ),
    Refused(
        ("use_bf16_compress_hook",), lambda f: f["use_fp16_compress_hook"],
        "sends gradients as bfloat16, and --use_fp16_compress_hook as float16: give only one of the two compress hooks",
    ),
    Refused(
        ("overlap_param_gather",), lambda f: not f["use_distributed_optimizer"],
        "needs --use_distributed_optimizer: otherwise nothing is gathered",
    ),
    Refused(
        ("overlap_zero_grad_buffer",), lambda f: not f["overlap_optim_step"],
        "needs --overlap_optim_step: before the step gradients are in use",
    ),
)  # fmt: skip
"""The first that is broken is told. Options of other groups are judged in training/config.py."""


ONLY_WITH = (
    OnlyWith(
        ("sequence_parallel",), lambda f: f["tensor_model_parallel_size"] > 1,
        "without --tensor_model_parallel_size",
    ),
    OnlyWith(
        ("pipeline_schedule", "num_layers_per_virtual_pipeline_stage", "pipeline_parts", "pipeline_micro_batches"),
        _has_pipeline, "without --pipeline_model_parallel_size",
    ),
    OnlyWith(
        ("context_parallel_method",), lambda f: f["context_parallel_size"] > 1, "without --context_parallel_size"
    ),
    # (grad_buffer_is_powerSGD_error is refused without the hook.)
    OnlyWith(
        tuple(item.name for item in fields(PowerSGDConfig) if item.name != "grad_buffer_is_powerSGD_error"),
        lambda f: f["use_powerSGD_hook"], "without --use_powerSGD_hook",
    ),
    OnlyWith(
        ("bucket_size", "disable_bucketing", "overlap_grad_reduce"), lambda f: f["ddp_impl"] == "bucketed",
        "with --ddp_impl=naive",
    ),
    OnlyWith(("bucket_size",), lambda f: not f["disable_bucketing"], "with --disable_bucketing"),
    OnlyWith(
        ("bucket_size", "disable_bucketing", "overlap_grad_reduce"), lambda f: f["data_parallel"] == "auto",
        "with --data_parallel=fsdp or hsdp, which send a block at a time",
    ),
    OnlyWith(
        ("reshard_after_forward", "fsdp_cpu_offload"), lambda f: f["data_parallel"] != "auto",
        "without --data_parallel=fsdp or hsdp",
    ),
)  # fmt: skip

"""What sums gradients over the ranks, and what shares the optimizer's work between them."""

from dataclasses import dataclass
from functools import partial

import torch

from configurator import Config
from model import Llama
from optimizer.mixed_precision import LossScaler
from parallel import (
    DistContext,
    DistributedDataParallel,
    NaiveDDP,
    PowerSGD,
    PowerSGDConfig,
    Zero1,
    sum_hook,
)


@dataclass(frozen=True)
class Parallel:
    ddp: NaiveDDP | DistributedDataParallel
    powersgd: PowerSGD | None
    """The hook of `ddp`, if it is this one."""
    zero1: Zero1 | None


def build_parallel(
    config: Config, context: DistContext, model: Llama, scaler: LossScaler, dtype: torch.dtype
) -> Parallel:
    """Move the model's parameters and gradients into flat buffers, and say how gradients get over the wire."""
    parallel = config.parallel
    grad_dtype = torch.float32 if parallel.grad_reduce_in_fp32 else dtype
    if parallel.ddp_impl == "naive":
        return Parallel(NaiveDDP(model, context, grad_dtype), None, None)
    ddp = DistributedDataParallel(
        model,
        context,
        bucket_size=0 if parallel.disable_bucketing else parallel.bucket_size,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        grad_dtype=grad_dtype,
        check_for_nan=parallel.check_for_nan_in_grad,
    )
    wire_dtype, powersgd = None, None
    if parallel.use_bf16_compress_hook or parallel.use_fp16_compress_hook:
        wire_dtype = torch.bfloat16 if parallel.use_bf16_compress_hook else torch.float16
    if parallel.use_powerSGD_hook:
        loss_scale = partial(getattr, scaler, "scale")
        powersgd = PowerSGD(
            ddp.buckets, ddp.collectives, _powersgd_config(config, wire_dtype), lazy=True, loss_scale=loss_scale
        )
    ddp.use_hook(powersgd or sum_hook(ddp.collectives, wire_dtype, parallel.use_distributed_optimizer))
    zero1 = Zero1(ddp, parallel.overlap_param_gather) if parallel.use_distributed_optimizer else None
    return Parallel(ddp, powersgd, zero1)


def _powersgd_config(config: Config, wire_dtype: torch.dtype | None) -> PowerSGDConfig:
    p = config.powersgd
    return PowerSGDConfig(
        rank=p.matrix_approximation_rank,
        warm_start=p.warm_start,
        use_error_feedback=p.use_error_feedback,
        start_iter=p.start_powerSGD_iter,
        min_compression_rate=p.min_compression_rate,
        orthogonalization_epsilon=p.orthogonalization_epsilon,
        orthogonalize_in_float32=p.orthogonalize_in_float32,
        use_fixed_Q=p.use_fixed_Q,
        grad_buffer_is_error=p.grad_buffer_is_powerSGD_error,
        exclude=tuple(word.strip() for word in p.powerSGD_exclude.split(",") if word.strip()),
        wire_dtype=wire_dtype,
        seed=config.run.seed,
    )

"""The optimizer, on the slices of the flat buffers that this rank owns."""

import logging
from collections.abc import Sequence

from configurator import Config
from optimizer.adamw import AdamWConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer, choose_kernel
from optimizer.muon import MuonConfig
from optimizer.param_groups import is_hidden_matrix
from optimizer.schedule import learning_rate_at
from parallel import DistContext
from parallel.buffer import Bucket
from parallel.spans import span
from training.build_parallel import Parallel

logger = logging.getLogger(__name__)

_LARGE = 1_000_000_000
"""Parameters."""
_RATES_OF_LARGE = {"sft": (1e-4, 2e-5), "dpo": (1e-5, 5e-7)}
"""Task -> (the learning rate from which on it undoes what a large model knows, a usual one)."""


def build_optimizer(
    config: Config, context: DistContext, parallel: Parallel, scaler: LossScaler
) -> MixedPrecisionOptimizer:
    """
    Raises:
        ValueError: its kernel was asked for and cannot be had.
    """
    o, adamw, muon = config.optimizer, config.adamw, config.muon
    constants_of_muon = MuonConfig(muon.muon_momentum, muon.muon_lr_ratio, muon.muon_iterations)
    overlap_step = config.parallel.overlap_optim_step
    ddp, powersgd, zero1 = parallel.ddp, parallel.powersgd, parallel.zero1

    def gather_updates(bucket: int) -> None:
        """Between the two halves of Muon's step under ZeRO-1."""
        if buckets_with_matrices([ddp.buckets[bucket]]):
            zero1.gather_in_gradients(bucket)

    kernel = choose_kernel(config.system.kernels, config.system.adamw_kernel, context.device)
    holds_all = zero1 is None and powersgd is None
    optimizer = MixedPrecisionOptimizer(
        (zero1 or ddp).slices(),
        AdamWConfig(adamw.beta1, adamw.beta2, adamw.adam_eps, adamw.weight_decay),
        o.grad_clip,
        scaler,
        sum_over_ranks=context.all_sum if zero1 else None,
        source=powersgd,
        kernel=kernel,
        muon=constants_of_muon if o.optimizer == "muon" else None,
        gather_updates=gather_updates if zero1 else None,
        zero_grad=kernel == "triton" and holds_all and not overlap_step,
    )

    def step_reduced_bucket(bucket: Bucket) -> None:
        """What follows a bucket's reduction, while the backward pass goes on."""
        with span(f"step bucket {bucket.index}"):
            optimizer.step_bucket(bucket.index)
        if config.parallel.overlap_zero_grad_buffer:
            ddp.hook.zero_grad(bucket)

    if overlap_step:
        ddp.register_after_reduction(step_reduced_bucket)
    return optimizer


def warn_of_rate(config: Config, num_parameters: int) -> None:
    """The default, and what suits a small model of one's own, would ruin a large one within some steps."""
    task, rate = config.run.task_type, config.optimizer.learning_rate
    most, usual = _RATES_OF_LARGE.get(task, (float("inf"), 0.0))
    if num_parameters >= _LARGE and rate >= most:
        logger.warning(
            "learning_rate %g is more than the weights are likely to survive: %s of a model of %.1f B parameters "
            "mostly takes about %g (--learning_rate=%g)", rate, task.upper(), num_parameters / 1e9, usual, usual,
        )  # fmt: skip


def buckets_with_matrices(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Those that hold something of what Muon steps."""
    return [bucket for bucket in buckets if any(is_hidden_matrix(slot.parameter) for slot in bucket.slots)]


def learning_rate(config: Config, step: int, max_iters: int) -> float:
    """Of the step that follows `step` completed ones."""
    o = config.optimizer
    schedule = o.lr_schedule if o.decay_lr else "constant"
    return learning_rate_at(
        step, max_iters, o.learning_rate, schedule, o.warmup_ratio, o.min_lr_ratio, o.wsd_decay_ratio
    )

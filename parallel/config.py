"""Options of data parallelism. Plain data: importing this loads no torch."""

from dataclasses import dataclass
from typing import Literal

from utils.ranges import require_not_negative, require_positive


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel."""

    ddp_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Library for gradient collectives: nccl on CUDA, else gloo."""
    ddp_impl: Literal["bucketed", "naive"] = "bucketed"
    """naive: all-reduce every gradient after the backward pass, for comparison."""
    bucket_size: int = 6_553_600
    """Elements after which a bucket is closed (25 MiB of float32 gradients)."""
    disable_bucketing: bool = False
    """One bucket for everything: no overlap."""
    overlap_grad_reduce: bool = True
    """Reduce a bucket while the backward pass goes on."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32 whatever the weights' dtype."""
    use_bf16_compress_hook: bool = False
    """Gradients travel as bfloat16; with PowerSGD, its factors do."""
    use_fp16_compress_hook: bool = False
    """Gradients (with PowerSGD, its factors) travel as float16, scaled by a power of two on which the ranks agree."""
    use_powerSGD_hook: bool = False
    """Gradients travel as low-rank factors (parallel/powersgd.py)."""
    use_distributed_optimizer: bool = False
    """ZeRO-1: each rank keeps and steps its share of the optimizer state (parallel/zero1.py)."""
    overlap_param_gather: bool = False
    """ZeRO-1: gather the parameters under the next forward pass."""
    overlap_optim_step: bool = False
    """Step a bucket as soon as it is reduced; needs --grad_clip=0 and no float16."""
    overlap_zero_grad_buffer: bool = False
    """Zero a bucket's gradients right after that step."""
    check_for_nan_in_grad: bool = False
    """Look into every bucket, and stop with the parameters' names at a non-finite gradient (fp16: the scaler's job)."""
    replica_check_interval: int = 100
    """Steps between comparisons of the weights of all ranks, also made before each save; 0: none."""
    dist_timeout: float = 600.0
    """Seconds after which a collective that hangs is an error."""

    def check(self) -> None:
        """
        Raises:
            ValueError: options of hooks and overlaps that exclude each other.
        """
        require_positive(self, "dist_timeout")
        require_not_negative(self, "replica_check_interval", "bucket_size")
        if self.ddp_impl == "naive":
            for name in ("use_distributed_optimizer", "use_powerSGD_hook", "use_bf16_compress_hook",
                         "overlap_optim_step", "use_fp16_compress_hook"):  # fmt: skip
                if getattr(self, name):
                    raise ValueError(f"--{name} needs buckets: leave out --ddp_impl=naive")
        if self.use_bf16_compress_hook and self.use_fp16_compress_hook:
            raise ValueError(
                "gradients travel either as bfloat16 or as float16: give only one of the two compress hooks"
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError("--overlap_param_gather needs --use_distributed_optimizer: otherwise nothing is gathered")
        if self.overlap_zero_grad_buffer and not self.overlap_optim_step:
            raise ValueError(
                "--overlap_zero_grad_buffer needs --overlap_optim_step: before the step gradients are in use"
            )


@dataclass(frozen=True)
class PowerSGDConfig:
    """PowerSGD."""

    matrix_approximation_rank: int = 16
    """Columns of a factor."""
    warm_start: bool = True
    """Start from the last step's Q; off: a new random one at each step."""
    use_error_feedback: bool = True
    """Add what a step left out to the next step's gradient."""
    start_powerSGD_iter: int = 0
    """Steps before this one are not compressed."""
    min_compression_rate: float = 2.0
    """Matrices that would shrink by less are not compressed."""
    orthogonalization_epsilon: float = 0.0
    """Damping of dependent columns."""
    orthogonalize_in_float32: bool = True
    """Keep the factors of 16-bit gradients in float32; off: Gram-Schmidt in 16 bits."""
    use_fixed_Q: bool = False
    """Q is random, not learnt: half the collectives, a higher rank needed. Best with --no-warm_start."""
    grad_buffer_is_powerSGD_error: bool = False
    """The residual lives in the gradient buffer: 4 bytes a parameter less (not with float16)."""
    powerSGD_exclude: str = ""
    """Parameters whose names contain one of these words, separated by commas, are not compressed."""
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

"""Options of the optimizers and of the learning rate. Plain data: importing this loads no torch."""

from dataclasses import dataclass
from typing import Literal

from utils.ranges import require_between, require_not_negative, require_positive, require_share_below_1

SMALLEST_EPS = 2.0**-126
"""float32's smallest normal number."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the blocks (optimizer/muon.py); the rest stays with AdamW."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warmup."""
    decay_lr: bool = True
    """Off: the learning rate stays at its peak once it has risen."""
    warmup_ratio: float = 0.01
    """Share of the steps over which the learning rate rises."""
    min_lr_ratio: float = 0.1
    """Lowest learning rate, as a share of the peak."""
    wsd_decay_ratio: float = 0.2
    """Share of the steps over which wsd falls."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    max_skipped_steps: int = 100
    """Steps in a row with non-finite gradients, each skipped, after which the run ends."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no optimizer can step with.
        """
        require_not_negative(self, "learning_rate", "grad_clip")
        require_between(self, 0, 1, "warmup_ratio", "min_lr_ratio", "wsd_decay_ratio")
        require_positive(self, "max_skipped_steps")


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW."""

    weight_decay: float = 0.1
    """Decay of the matrices, as a share of the learning rate."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.95
    """Adam's decay of the mean square."""
    adam_eps: float = 1e-8
    """Added to the root of the mean square."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that AdamW cannot step with.
        """
        require_not_negative(self, "weight_decay", "adam_eps")
        require_share_below_1(self, "beta1", "beta2")
        if self.adam_eps < SMALLEST_EPS:
            raise ValueError(
                f"adam_eps must be at least 1.2e-38, float32's smallest normal number, got {self.adam_eps}: the step "
                "of a weight that has had no gradient yet would be 0 / 0"
            )


@dataclass(frozen=True)
class MuonConfig:
    """Muon."""

    muon_momentum: float = 0.95
    """Decay of the mean gradient."""
    muon_lr_ratio: float = 1.0
    """Its learning rate, as a multiple of learning_rate."""
    muon_iterations: int = 5
    """1 to 6 of the orthogonalization; on a CPU with small batches 3 are quicker, and nearly as good."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that Muon cannot step with.
        """
        require_not_negative(self, "muon_lr_ratio")
        require_share_below_1(self, "muon_momentum")
        require_between(self, 1, 6, "muon_iterations")

"""Options of the optimizers and of the learning rate. Plain data: importing this does not load torch."""

from dataclasses import dataclass
from typing import Literal

from utils.options import OnlyWith, require_between, require_not_negative, require_positive, require_share_below_1

SMALLEST_EPS = 2.0**-126
"""float32's smallest normal number."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: Literal["adamw", "muon", "adamw8bit", "lion", "lion8bit"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest. 8bit: state in 8 bits (docs/optimizers.md)."""
    learning_rate: float = 3e-4
    """Peak learning rate. lion and lion8bit take 3 to 10 times less than AdamW."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warmup."""
    decay_lr: bool = True
    """Off: the learning rate stays at its peak after the warmup."""
    warmup_ratio: float = 0.01
    """Share of the steps over which the learning rate rises."""
    min_lr_ratio: float = 0.1
    """Lowest learning rate, as a share of the peak."""
    wsd_decay_ratio: float = 0.2
    """Share of the steps over which the learning rate of wsd falls."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: do not clip."""
    offload_optimizer: bool = False
    """Keep main parameters and moments in host memory, and step there; the GPU holds weights and gradients alone."""
    max_skipped_steps: int = 100
    """The run ends after so many steps in a row were skipped for non-finite gradients."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no optimizer can step with.
        """
        require_not_negative(self, "learning_rate", "grad_clip")
        require_between(self, 0, 1, "warmup_ratio", "min_lr_ratio", "wsd_decay_ratio")
        require_positive(self, "max_skipped_steps")
        if self.offload_optimizer and self.optimizer == "muon":
            raise ValueError(
                "--offload_optimizer steps on the CPU, where Muon's matrix multiplications would take longest: give "
                "--optimizer=adamw, or leave it out"
            )


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW."""

    weight_decay: float = 0.1
    """Decay of the matrices in a step, as a share of the learning rate. lion takes 3 to 10 times more than AdamW."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.95
    """Decay of the mean squared gradient."""
    adam_eps: float = 1e-8
    """Number added to the root of the mean square."""

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
    """Learning rate of Muon, as a multiple of learning_rate."""
    muon_iterations: int = 5
    """Iterations of the orthogonalization, 1 to 6. On a CPU with small batches 3 are faster and nearly as good."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that Muon cannot step with.
        """
        require_not_negative(self, "muon_lr_ratio")
        require_share_below_1(self, "muon_momentum")
        require_between(self, 1, 6, "muon_iterations")


@dataclass(frozen=True)
class LionConfig:
    """Lion."""

    lion_beta1: float = 0.9
    """Share of the mean gradient in the direction of a step."""
    lion_beta2: float = 0.99
    """Decay of the mean gradient."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that Lion cannot step with.
        """
        require_share_below_1(self, "lion_beta1", "lion_beta2")


LIONS = ("lion", "lion8bit")
"""Optimizers with Lion's step, and its rates."""

ONLY_WITH = (
    OnlyWith(("lr_schedule", "min_lr_ratio", "wsd_decay_ratio"), lambda f: f["decay_lr"], "with --no-decay_lr"),
    OnlyWith(("wsd_decay_ratio",), lambda f: f["lr_schedule"] == "wsd", "without --lr_schedule=wsd"),
    OnlyWith(("min_lr_ratio",), lambda f: f["lr_schedule"] != "constant", "with --lr_schedule=constant"),
    OnlyWith(
        ("muon_momentum", "muon_lr_ratio", "muon_iterations"), lambda f: f["optimizer"] == "muon",
        "without --optimizer=muon",
    ),
    OnlyWith(("lion_beta1", "lion_beta2"), lambda f: f["optimizer"] in LIONS, "without --optimizer=lion or lion8bit"),
    OnlyWith(("beta1", "beta2", "adam_eps"), lambda f: f["optimizer"] not in LIONS, "with Lion, which has lion_beta1"),
)  # fmt: skip

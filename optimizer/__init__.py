"""AdamW and Muon on flat slices, float32 main parameters, loss scaling, clipping and schedules."""

from optimizer.mixed_precision import (
    LossScaler,
    MixedPrecisionOptimizer,
    StepResult,
    choose_kernel,
    resolve_dtype,
)
from optimizer.muon import MuonConfig
from optimizer.schedule import learning_rate_at

__all__ = ["LossScaler", "MixedPrecisionOptimizer", "MuonConfig", "StepResult", "choose_kernel", "learning_rate_at",
           "resolve_dtype"]  # fmt: skip

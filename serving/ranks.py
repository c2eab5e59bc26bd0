"""The ranks that share one model for generation: each holds some rows and columns of its matrices, or some blocks."""

from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.choosing import resolve_checkpoint_dir
from model.config import ModelConfig
from model.flops import unit_flops
from parallel.config import ParallelConfig
from parallel.context import DistContext, init_context
from parallel.engines import ModelCutter, model_cutter
from parallel.launched import launched_world_size
from parallel.mesh import Mesh, plan_mesh
from parallel.stages import plan_stages

_PATIENCE_S = 30 * 86400.0
"""Longest wait of a rank for the first one, which waits for a user."""


@dataclass(frozen=True)
class Ranks:
    """This rank's place among them."""

    config: ParallelConfig
    context: DistContext
    mesh: Mesh

    def of_first(self, value: object) -> object:
        """Rank 0's value, which must fit JSON, on every rank. Collective."""
        return self.context.gather(value if self.context.is_main else None)[0]

    def resolve(self, path: Path) -> Path:
        """`resolve_checkpoint_dir`, as rank 0 sees it: a run that goes on may save a checkpoint between the looks of
        two ranks, and delete another. Collective.

        Raises:
            ValueError: the path leads to no weights.
        """
        return Path(str(self.context.decide_on_main(lambda: str(resolve_checkpoint_dir(path)))))

    def cutter(self, shape: ModelConfig, dtype: torch.dtype) -> ModelCutter:
        """What lets each rank keep its part of a model. Collective.

        Args:
            dtype: dtype to compute in.
        Raises:
            ValueError: the model has too few blocks for so many stages.
        """
        has_pipeline = self.mesh.pipe_size > 1
        # A token that is generated passes the head, like one that is trained on.
        stages = plan_stages(self.config, unit_flops(shape, seq_len=1.0)) if has_pipeline else None
        cutter = model_cutter(self.config, self.context, self.mesh, dtype, stages)
        assert cutter is not None
        return cutter


def require_ranks(tensor: int, pipe: int) -> bool:
    """Whether several ranks are to share the model.

    Args:
        tensor: ranks that share each matrix.
        pipe: stages of blocks.
    Raises:
        ValueError: the launcher has started another number of processes.
    """
    ranks = launched_world_size()
    for name, size in (("tensor", tensor), ("pipeline", pipe)):
        if size < 1:
            raise ValueError(f"--{name}_model_parallel_size must be positive, got {size}")
    if tensor * pipe != ranks:
        flags = f"--tensor_model_parallel_size={tensor} x --pipeline_model_parallel_size={pipe}"
        way = (
            f"start {tensor * pipe} with torchrun --nproc_per_node={tensor * pipe}" if tensor * pipe > 1 else
            f"give --tensor_model_parallel_size={ranks}, or start one"
        )  # fmt: skip
        raise ValueError(
            f"{ranks} process{'es' if ranks > 1 else ''} cannot share one model as {flags}: {way}"
        )
    return ranks > 1


def open_ranks(tensor: int, pipe: int, device: str) -> Ranks:
    """Meet the other ranks, as many as `require_ranks` demands. Collective.

    Args:
        device: "auto" (CUDA if available), "cpu" or "cuda".
    Raises:
        ValueError: see init_context.
    """
    config = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipe,
                            dist_timeout=_PATIENCE_S)  # fmt: skip
    context = init_context(device, timeout_s=_PATIENCE_S)
    return Ranks(config, context, plan_mesh(config, context))

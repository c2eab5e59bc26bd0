"""The pipeline's plan: which part of the model each stage has."""

import logging

from dataset.opening import TaskDataset
from model import ModelConfig
from model.flops import unit_flops
from parallel.stages import Stages, plan_stages
from training.config import Config

logger = logging.getLogger(__name__)


def plan_pipeline(config: Config, shape: ModelConfig, dataset: TaskDataset) -> Stages | None:
    """The stages of the pipeline, told at the start; None: there is none.

    Raises:
        ValueError: the flags do not fit the model; on all ranks.
    """
    flags = config.parallel
    if flags.pipeline_model_parallel_size == 1:
        return None
    length, head_share = dataset.context_and_supervised_share()
    stages = plan_stages(flags, unit_flops(shape, length, head_share))
    logger.info(
        "pipeline: %d stages on %d ranks, as --pipeline_parts=%s has them", stages.num_stages, stages.pipe_size, stages
    )
    return stages

"""Everything that a run needs before its first step, built in order."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.folder import read_trainer_state
from configurator import flatten, without_effect
from dataset.loader import TrainLoader
from dataset.mixture import MixtureDataset
from dataset.sft import widened
from evaluation.checks import check_tasks
from model import Decoder, ModelConfig
from model.adapters import folder
from model.adapters.folder import Weights
from model.quantized import require_bitsandbytes
from optimizer.adamw_triton import sum_of_squares
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer, choose_kernel, resolve_dtype
from optimizer.offload import OffloadedOptimizer
from optimizer.rules import new_rules
from parallel.context import DistContext, enable_determinism
from parallel.contract import GradientSource
from parallel.division import Division
from parallel.engine import Engine, EngineParts
from parallel.engines import ModelCutter, model_cutter, open_engine
from parallel.gradients import square
from parallel.layout import ALIGNMENT
from parallel.mesh import Mesh, plan_mesh
from parallel.stages import Stages
from runs.sinks import check_sinks
from tasks.language_model import LanguageModelTask
from tasks.task import Task
from training.adapter import Adapter
from training.batch import choose_batch
from training.beginning import Beginning, find_beginning, with_adapter
from training.build_model import (
    build_model,
    new_model,
    rows_for_others,
    to_device,
    warn_of_length,
    whole_sizes,
    without_values,
)
from training.build_task import build_task
from training.config import Config, Derived, resolve
from training.data import Data, open_data
from training.dpo_reference import prepare_reference
from training.export import Export, plan_export
from training.pipeline import plan_pipeline
from training.progress import Progress
from training.rates import warn_of_default_rate, warn_of_rate
from training.recompute import limit_activations
from training.resume import load_checkpoint
from training.run_dir import RunDir, open_run_dir
from utils.machine import keep_freed_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """The parts of a run."""

    config: Config
    context: DistContext
    mesh: Mesh
    run_dir: RunDir
    data: Data
    derived: Derived
    weights_from: Weights | None
    """The folders that the model was built from."""
    adapter: Adapter | None
    """What is trained instead of the model's own weights."""
    export: Export
    """Information for other programs in its checkpoints."""
    dtype: torch.dtype
    """dtype of the model's weights."""
    model: Decoder
    task: Task
    reference: str | None
    """Fingerprint of DPO's reference model."""
    adamw_kernel: str
    scaler: LossScaler
    engine: Engine
    division: Division | None
    """What each rank holds of a model that is cut; None: all of it."""
    stages: Stages | None
    """Parts of the model in a pipeline."""
    progress: Progress
    """The run's position, which the training loop updates."""
    left_out: list[int] | None
    """First and last position of the samples that a resumed run leaves out on request."""
    loader: TrainLoader


def build(
    config: Config,
    given: frozenset[str],
    context: DistContext,
    data_dirs: dict[str, Path],
    stop_requested: Callable[[], bool],
    resources: ExitStack,
) -> Built:
    """Build the parts of a run, in order.

    Args:
        given: names of the flags that were given.
        data_dirs: set -> its pretokenized directory.
        stop_requested: whether a stop of this rank was requested.
        resources: receives everything that must be released at the end.
    Raises:
        ValueError: the command or the data is wrong.
        StopRequested: a stop of any rank was requested.
    """
    if config.system.num_threads:
        torch.set_num_threads(config.system.num_threads)
    if context.device.type == "cpu":
        keep_freed_memory()
    if config.system.deterministic:
        enable_determinism()
    check_sinks(config.run.tensorboard, config.run.wandb_project)
    if config.adapter.load_in_4bit:
        require_bitsandbytes()
    mesh = plan_mesh(config.parallel, context)
    run_dir = open_run_dir(config.run, context, resources)
    is_resumed = run_dir.resumed_from is not None
    if not is_resumed and not config.run.init_from:
        config = replace(config, model=new_model(config.model, given))
    data = open_data(config.run, config.data, data_dirs, context, run_dir.place)
    batch = choose_batch(config.run, config.data, given, len(data.train), mesh.data_size)
    config = replace(config, data=batch)
    derived = resolve(config, mesh.data_size, len(data.train))

    begins = find_beginning(config, given, context, run_dir.resumed_from, data.tokenizer)
    config = with_adapter(config, begins.adapter, is_resumed)
    weights, shape, adapter = begins.base, begins.shape, begins.adapter
    dtype = resolve_dtype(config.system.dtype, context.device)
    # Read it now: the checkpoint that a resumed run begins with may be deleted before the next save.
    vocab_size = rows_for_others(config, shape, data.tokenizer.vocab_size)
    export = plan_export(config.run.task.teaches_chat, data.tokenizer, weights, vocab_size, begins.adapter_dir)
    if context.is_main:
        _warn(config, given, begins, export)
    _require_same_settings(config, context, dtype, shape)
    if config.evaluation.names and not config.run.valid_only:
        # Rank 0 alone runs the tasks.
        chat = config.run.task.teaches_chat
        context.decide_on_main(lambda: check_tasks(config.evaluation, chat, config.parallel.cut_by))
    pipeline = plan_pipeline(
        config, shape, data.train, mesh.data_size, context, dtype, run_dir.paths.pipeline,
        lambda shape: without_values(shape, config.system, context.device, dtype),
    )  # fmt: skip
    micro_batches = config.data.gradient_accumulation_steps // mesh.data_size
    if pipeline is not None:
        micro_batches = pipeline.micro_batches
    _check_balance(shape, micro_batches * mesh.data_size)
    stages = pipeline.stages if pipeline is not None else None
    cutter = model_cutter(config.parallel, context, mesh, dtype, stages)
    model = build_model(
        shape, config.system, config.run.seed, context.device, dtype, weights, adapter, config.adapter.load_in_4bit,
        begins.new_rows, cutter,
    )  # fmt: skip
    kernel = choose_kernel(config.system.kernels, config.system.adamw_kernel, context.device)
    _require_same_choices(context, {"dtype": str(dtype).removeprefix("torch."), **model.ops.names, "adamw": kernel})
    if weights is not None and not is_resumed and adapter is None and context.is_main:
        division = None if cutter is None else cutter.division
        warn_of_rate(config.run, config.optimizer.learning_rate, sum(whole_sizes(model, division).values()))
    task, reference = build_task(config, model, data.tokenizer, context.device), None
    if task.uses_reference:
        reference = prepare_reference(
            config.run, config.adapter, config.data.valid_batch_size, context, mesh, run_dir, data, task,
            begins.source, dtype, stop_requested, forward_is_collective=cutter is not None,
        )  # fmt: skip
    limit_activations(config, context, run_dir, data.train, model, task)

    scaler = LossScaler(enabled=dtype == torch.float16)
    engine = _open_engine(config, context, mesh, model, dtype, scaler, kernel, cutter, stages, micro_batches)
    progress, left_out = Progress(), None
    if is_resumed:
        division = cutter.division if cutter is not None else None
        progress, left_out = load_checkpoint(config, context, run_dir, data, engine, division)
        derived = resolve(config, mesh.data_size, len(data.train), progress.step, progress.samples_consumed)
    if isinstance(data.train, MixtureDataset):
        assert isinstance(task, LanguageModelTask)
        task.sources = tuple(data.train.names)
        before = None
        if is_resumed and progress.samples_consumed:
            before = read_trainer_state(run_dir.resumed_from)["stream"]
        data.train.arrange(derived.max_iters * derived.global_batch_size, progress.samples_consumed, before)
    loader = TrainLoader(
        data.train, config.run.seed, config.data.train_batch_size, config.data.gradient_accumulation_steps,
        mesh.data_rank, mesh.data_size, progress.samples_consumed, config.data.num_workers,
        pin_memory=context.device.type == "cuda",
    )  # fmt: skip
    return Built(
        config, context, mesh, run_dir, data, derived, begins.source, adapter, export, dtype, model, task, reference,
        kernel, scaler, engine, None if cutter is None else cutter.division, stages, progress, left_out, loader,
    )  # fmt: skip


def _warn(config: Config, given: frozenset[str], begins: Beginning, export: Export) -> None:
    """Tell the user what will probably disappoint."""
    # Only now is it known what the weights bring along.
    sentences = without_effect(replace(config, model=begins.shape), given)
    if begins.adapter is None:
        sentences.append(export.warning(begins.shape))
    elif begins.adapter_dir is not None:
        sentences.append(folder.told_precision(begins.adapter_dir, config.adapter.load_in_4bit))
    for sentence in filter(None, sentences):
        logger.warning(sentence)
    if begins.base is not None and config.run.init_from:
        warn_of_length(begins.base, config.data.max_seq_len)
    if not config.run.resume:
        # A resumed run was begun with its rate.
        warn_of_default_rate(config.optimizer, given)


def _open_engine(
    config: Config, context: DistContext, mesh: Mesh, model: Decoder, dtype: torch.dtype, scaler: LossScaler,
    kernel: str, cutter: ModelCutter | None, stages: Stages | None, micro_batches: int,
) -> Engine:  # fmt: skip
    flags = config.optimizer
    its_kernel = "torch" if flags.offload_optimizer or config.parallel.fsdp_cpu_offload else kernel
    rules = new_rules(flags.optimizer, config.adamw, config.muon, config.lion, its_kernel, model.roles())

    def new_optimizer(gradients: GradientSource) -> MixedPrecisionOptimizer:
        if flags.offload_optimizer:
            return OffloadedOptimizer(gradients, rules, flags.grad_clip, scaler, context.device)
        return MixedPrecisionOptimizer(gradients, rules, flags.grad_clip, scaler)

    return open_engine(
        EngineParts(
            config.parallel,
            config.powersgd,
            context,
            mesh,
            model,
            to_device=lambda batch: to_device(batch, model, context.device),
            new_optimizer=new_optimizer,
            square=sum_of_squares if kernel == "triton" and not config.parallel.fsdp_cpu_offload else square,
            loss_scale=lambda: scaler.scale,
            is_fp16=scaler.enabled,
            seed=config.run.seed,
            division=cutter.division if cutter is not None else None,
            groups=cutter.groups if cutter is not None else None,
            stages=stages,
            widen=lambda batch: widened(batch, config.data.max_seq_len),
            compute_dtype=dtype,
            alignment=max(ALIGNMENT, *(rule.alignment for rule in rules)),
            alignment_of=lambda parameter: next(rule for rule in rules if rule.takes(parameter)).alignment,
            micro_batches=micro_batches,
            rebalance=model.rebalance if model.config.router_bias_update_rate else None,
        )
    )


def _require_same_settings(config: Config, context: DistContext, dtype: torch.dtype, shape: ModelConfig) -> None:
    """Refuse to run with settings that differ between ranks.

    Raises:
        ValueError: the settings, or the choices from them, differ; on all ranks.
    """
    decisive = {name: value for name, value in flatten(config).items() if not name.endswith(("_dir", "_file"))}
    context.require_same(
        [decisive, str(dtype), shape.__dict__],
        "the ranks have different settings or choose different dtypes: start all with the same flags",
    )


def _check_balance(shape: ModelConfig, micro_batches: int) -> None:
    """
    Args:
        micro_batches: those of a step over all data ranks.
    Raises:
        ValueError: the load is to be balanced within whole batches, and no micro-batch holds one.
    """
    if shape.num_local_experts and shape.router_aux_loss == "batch" and micro_batches > 1:
        raise ValueError(
            f"--router_aux_loss=batch balances the load within a micro-batch, and a step has {micro_batches} of them "
            f"over all processes: train with one process and --gradient_accumulation_steps=1, or give "
            f"--router_aux_loss=row"
        )


def _require_same_choices(context: DistContext, chosen: dict[str, str]) -> None:
    """Refuse to run if `auto` has chosen differently on different hosts: ranks that compute differently drift apart.

    Args:
        chosen: option -> this rank's choice.
    Raises:
        ValueError: the choices differ; on all ranks.
    """
    everyone = context.gather(chosen)
    for name in chosen:
        by_rank = [choices[name] for choices in everyone]
        other = next((rank for rank, choice in enumerate(by_rank) if choice != by_rank[0]), None)
        if other is not None:
            flag = name if name == "dtype" else f"{name}_kernel"
            raise ValueError(
                f"the ranks would not compute alike: {name} is {by_rank[0]} on rank 0 and {by_rank[other]} on rank "
                f"{other}; say which with --{flag}, or install the same on all hosts"
            )

"""Lines at the start of a run: what runs, and how fast it could be."""

import logging
import math
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from data_preprocess.pretokenize_sft_data import summary
from dataset.config import DataConfig
from dataset.opening import TaskDataset
from dataset.sequences import read_manifest
from model import Decoder, flops
from model.adapters import lora
from model.adapters.folder import Weights
from model.families.family import EMBEDDING, HEAD
from model.memory import TrainingPlan, estimate
from model.quantized import count_parameters
from parallel.division import Division
from parallel.engine import Engine
from parallel.mesh import places
from tasks.config import TaskType
from tokenizer.chat_template import template_of
from training.adapter import Adapter
from training.batch import LEAST_ROWS
from training.build import Built
from training.build_model import whole_sizes
from training.config import Derived, RunConfig
from training.data import Data
from training.progress import Progress

logger = logging.getLogger(__name__)

_USUAL_MFU = 0.4
"""Share of the peak that a run may reach: on CPUs 0.38 to 0.66 were measured."""
_LONG_STEP_S = 60.0
_FEW_STEPS = 20
"""After fewer steps of SFT or DPO, a model has hardly changed."""


@dataclass(frozen=True)
class Flops:
    """Figures that MFU is computed from."""

    peak: float
    """FLOP/s of all ranks together; NaN if it is unknown."""
    strict: float
    """FLOPs a token, by the strict formula."""
    seed: float
    """FLOPs a token, by the original's formula."""

    def record(self) -> dict[str, float | None]:
        """For the log, so that a reader can tell what a run cost; None: unknown."""
        return {"flops_per_token": self.strict, "peak_flops": self.peak if math.isfinite(self.peak) else None}


def count_flops(built: Built) -> Flops:
    """Peak and FLOPs a token of this run. Collective; on a CPU, the peak is measured."""
    context, model, whole = built.context, built.model, whole_of(built)
    peak = flops.device_peak_flops(context.device, built.dtype)
    return Flops(
        context.all_sum(torch.tensor(peak or math.nan, dtype=torch.float64)).item(),
        flops.flops_per_token_strict(
            model.config, *built.data.train.context_and_supervised_share(), whole.frozen if built.adapter else None
        ),
        flops.flops_per_token_seed(model.config, built.config.data.max_seq_len, whole.parameters),
    )


def describe(built: Built, counted: Flops) -> list[str]:
    """Lines about model, machine, data and start of the run. Collective, as the network's speed is measured."""
    config, device, whole = built.config, built.context.device, whole_of(built)
    tokens_per_step = built.derived.global_batch_size * config.data.max_seq_len
    return [
        _model(built.model, whole, built.export.family(built.model.config).model_type, built.dtype, device)
        + (", the blocks' matrices in 4 bits" if config.adapter.load_in_4bit else ""),
        *([_adapter(whole, built.adapter)] if built.adapter is not None else []),
        f"parallel: {built.engine.describe()}",
        *_mesh(built),
        *([] if config.run.valid_only else _network(built.engine, tokens_per_step, counted, built.context.is_main)),
        _peak(counted, device),
        _ops(built.model, config.optimizer.optimizer, built.adamw_kernel, config.system.compile),
        *([_offloaded(built.engine)] if config.optimizer.offload_optimizer else []),
        *_data(built.data, config.run.task),
        _batch(config.run, config.data, built.derived, len(built.data.train)),
        *_time(built, counted),
        _start(built.progress, built.weights_from),
    ]


@dataclass(frozen=True)
class _Whole:
    """Figures of the whole model, of which a rank may hold a part."""

    parameters: int
    trained: Mapping[str, int]
    """Name -> size of each parameter that trains."""
    frozen: flops.Frozen
    """What trains below an adapter."""


def whole_of(built: Built) -> _Whole:
    """Figures of the whole model. Collective."""
    model, sizes = built.model, whole_sizes(built.model, built.division)
    # What is in 4 bits is no parameter.
    total = count_parameters(model) if built.division is None else sum(sizes.values())
    # A rank of a pipeline knows only its own.
    names = sorted(set().union(*built.context.gather(list(lora.adapter_parameters(model)))))
    factors = (".lora_A.weight", ".lora_B.weight")
    head = EMBEDDING if model.config.tie_word_embeddings else HEAD
    added = sum(size for name, size in sizes.items() if name.endswith(factors))
    return _Whole(total, {name: sizes[name] for name in names}, flops.Frozen(added, head in names))


def _adapter(whole: _Whole, adapter: Adapter) -> str:
    """What trains, of how much, and whether it is known to stand on its own base."""
    spec, total = adapter.spec, whole.parameters
    layers = [name.removesuffix(".lora_A.weight") for name in whole.trained if name.endswith(".lora_A.weight")]
    kind = ("rsLoRA" if spec.use_rslora else "LoRA") + (" with DoRA's lengths" if spec.use_dora else "")
    trained = sum(whole.trained.values())
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    saved = f", {', '.join(spec.modules_to_save)} whole" if spec.modules_to_save else ""
    text = (
        f"adapter: {kind} of rank {spec.r}, alpha {spec.alpha:g}, on {len(layers)} layers ({ends}){saved}: "
        f"{trained:,} of {total:,} parameters train ({trained / total:.2%})"
    )
    if adapter.loaded_from is not None and not adapter.is_known_base:
        text += "; another program saved it, and only its shapes tell that it belongs to these weights"
    return text


def _model(model: Decoder, whole: _Whole, family: str, dtype: torch.dtype, device: torch.device) -> str:
    config = model.config
    active = f" ({flops.active_parameters(config) / 1e6:.1f} M multiply a token)" if config.num_local_experts else ""
    experts = f"{config.num_local_experts} experts of which a token sees {config.num_experts_per_tok}, "
    return (
        f"model: {family}, {whole.parameters / 1e6:.1f} M parameters{active}, {config.num_hidden_layers} "
        f"layers, {config.hidden_size} wide, {experts if config.num_local_experts else ''}{dtype} on {device.type}"
    )


def _mesh(built: Built) -> list[str]:
    """The ranks' places, and what lies on each, by formula. Collective; nothing for one process."""
    context, mesh, config = built.context, built.mesh, built.config
    if context.world_size == 1:
        return []
    hosts, flags = context.gather(socket.gethostname()), config.parallel
    shared = mesh.data_size * mesh.context_size if flags.use_distributed_optimizer else mesh.shard_size
    plan = TrainingPlan(
        dtype=str(built.dtype).removeprefix("torch."), optimizer=config.optimizer.optimizer, adapter=config.adapter,
        grad_reduce_in_fp32=flags.grad_reduce_in_fp32, offload_optimizer=config.optimizer.offload_optimizer,
        data_parallel=flags.data_parallel, ranks=shared, tensor_model_parallel_size=mesh.tensor_size,
        pipeline_model_parallel_size=mesh.pipe_size, pipeline_schedule=flags.pipeline_schedule,
        pipeline_parts=str(built.stages or ""), expert_model_parallel_size=mesh.expert_size,
        task_type=config.run.task_type, train_batch_size=config.data.train_batch_size,
        max_seq_len=config.data.max_seq_len, context_parallel_size=mesh.context_size,
        sequence_parallel=flags.sequence_parallel,
        pipeline_micro_batches=config.data.gradient_accumulation_steps // mesh.data_size,
    )  # fmt: skip
    lasting = estimate(built.model.config, plan).lasting
    held = ", ".join(f"{size / 1e6:,.1f} MB of {what}" for what, size in lasting.items() if size)
    has_parts = built.division is not None and not mesh.is_data_alone
    parts = [f"parts: {parts_of(built.division)}"] if has_parts else []
    whose = "each rank" if mesh.pipe_size == 1 else "the fullest rank"
    where = " in host memory" if flags.fsdp_cpu_offload and context.device.type == "cuda" else ""
    return [
        f"mesh: {places(mesh, hosts)}", *parts,
        f"memory: {whose} holds {held}{where}, by formula (docs/memory.md)",
    ]  # fmt: skip


def parts_of(division: Division) -> str:
    """What a rank of each part of the pipeline holds of a model, before FSDP cuts it: "pipe rank 0:
    embedding, blocks 0-3, 12.3 M of 24.9 M parameters; ..."."""
    mesh, total = division.mesh, sum(math.prod(outline.shape) for outline in division.outlines.values())
    told = []
    for rank in mesh.at(0).ranks_of("pipe"):
        held = {name: found.shape for name in division.outlines if (found := division.held(name, rank)) is not None}
        own = f"{sum(map(math.prod, held.values())) / 1e6:,.1f} M of {total / 1e6:,.1f} M parameters"
        its = f"pipe rank {mesh.at(rank).pipe_rank}: {_units(held)}, " if mesh.pipe_size > 1 else "each rank holds "
        told.append(its + own)
    return "; ".join(told)


def _units(names: Iterable[str]) -> str:
    """The units of a model to which parameters belong: "embedding, blocks 0-3"."""
    names = set(names)
    blocks = sorted({int(name.split(".")[1]) for name in names if name.startswith("layers.")})
    runs = [list(run) for _, run in groupby(enumerate(blocks), key=lambda its: its[1] - its[0])]
    numbers = [f"{run[0][1]}" + (f"-{run[-1][1]}" if len(run) > 1 else "") for run in runs]
    units = [f"block{'s' if len(blocks) > 1 else ''} {' and '.join(numbers)}"] if blocks else []
    around = {name.split(".")[0] for name in names if not name.startswith("layers.")}
    has_head = any(name.startswith("norm") for name in around) or HEAD.split(".")[0] in around
    return ", ".join([*(["embedding"] if EMBEDDING.split(".")[0] in around else []), *units, *(["head"] * has_head)])


def _network(engine: Engine, tokens_per_step: int, counted: Flops, is_main: bool) -> list[str]:
    """Bytes of a step, and their time at the speed measured now; warns if no overlap can hide it. Collective."""
    traffic = engine.traffic()
    if traffic is None:
        return []
    rate = traffic.bytes_per_s
    sends = _listed(f"{sent / 1e6:,.1f} MB of {what} ({sent / rate:.2f} s)" for what, sent in traffic.sent.items())
    advice = engine.advice(traffic, tokens_per_step * counted.strict / (0.5 * counted.peak))
    if advice is not None and is_main:
        logger.warning(advice)
    text = f"network: {rate / 1e6:,.0f} MB/s each way, measured now; a step sends {sends} from each rank"
    if traffic.sent_by_machine:
        leaving = _listed(f"{sent / 1e6:,.1f} MB of {what}" for what, sent in traffic.sent_by_machine.items())
        text += f", and {leaving} from each machine to the others"
    return [text + (f"; {traffic.remark}" if traffic.remark else "")]


def _listed(words: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    *front, last = words
    return f"{', '.join(front)} and {last}" if front else last


def _peak(counted: Flops, device: torch.device) -> str:
    source = "a matmul timed now" if device.type == "cpu" else "by the data sheet"
    return f"peak: {counted.peak / 1e9:,.0f} GFLOP/s in all, {source}; MFU is a share of it"


def _ops(model: Decoder, optimizer: str, kernel: str, is_compiled: bool) -> str:
    """Implementation that each op resolved to."""
    has_muon = optimizer == "muon"
    return (
        f"ops: {model.ops} {'adamw' if has_muon else optimizer}={kernel}"
        + (", Muon for the matrices of the blocks" if has_muon else "")
        + (", plain attention for its dropout" if model.config.attention_dropout else "")
        + (" (blocks compiled)" if is_compiled else "")
    )


def _offloaded(engine: Engine) -> str:
    """Where the optimizer's state lies, and its size."""
    size = sum(tensor.nbytes for _, tensors in engine.named_state() for tensor in tensors.values())
    return f"optimizer: {size / 1e9:.2f} GB of main parameters and moments in host memory, stepped by the CPU"


def _data(data: Data, task: TaskType) -> list[str]:
    """The data. For SFT and DPO also how many records were taken, shortened, dropped and skipped when it was tokenized,
    and notes on the layout of their conversations."""
    directories = dict.fromkeys(data.dirs.values()) if task.reads_records else ()
    records = [f"records of {directory}: {summary(read_manifest(directory))}" for directory in directories]
    notes = template_of(data.tokenizer).notes if task.teaches_chat else []
    return [*records, f"data: {data.train.description()}", *(f"note: {note}" for note in notes)]


def _batch(run: RunConfig, data: DataConfig, derived: Derived, samples_per_epoch: int) -> str:
    samples, unit = derived.global_batch_size, run.task.unit(data.packing)
    # Samples made from records have any length.
    tokens = "" if run.task.reads_records else f" ({samples * data.max_seq_len:,} tokens)"
    epochs, steps = derived.max_iters * samples / samples_per_epoch, derived.max_iters
    text = f"batch: {samples} {unit}{tokens} a step, {steps} step{'' if steps == 1 else 's'}, {epochs:.2f} epochs"
    if samples > samples_per_epoch:
        text += (
            f"; a step takes more {unit} than there are ({samples_per_epoch}): lower --train_batch_size or "
            f"--gradient_accumulation_steps"
        )
    elif run.task.reads_records and steps < _FEW_STEPS:
        # With very few rows a step, smaller steps teach less.
        smaller = "lower --train_batch_size or --gradient_accumulation_steps, or " if samples > LEAST_ROWS else ""
        text += f"; so few steps teach little: {smaller}raise --{'max_iters' if run.max_iters else 'epoch'}"
    return text


def _time(built: Built, counted: Flops) -> list[str]:
    """A guess of the run's duration before the first step; nothing if the peak is unknown. The lines of the first steps
    give better figures."""
    config, derived, data = built.config, built.derived, built.data
    if not math.isfinite(counted.peak) or config.run.valid_only:
        return []
    token_s = counted.strict / (_USUAL_MFU * counted.peak)
    step_s = derived.global_batch_size * positions_per_sample(data.train) * token_s
    left = max(0, derived.max_iters - built.progress.step)
    run_s, text = left * step_s, f"time: the first step in about {about(step_s)}"
    if data.valid is not None:
        flags = config.data
        rows = min(len(data.valid), flags.valid_iters * flags.valid_batch_size or len(data.valid))
        # Forward passes alone; below an adapter, these are half of the work.
        valid_s = rows * positions_per_sample(data.valid) * token_s / (2 if built.adapter else 3)
        times = 1 + (left - 1) // flags.valid_interval if flags.valid_interval and left else 1
        run_s += times * valid_s
        text += f", a validation in about {about(valid_s)}"
    text += f", the run in about {about(run_s)}, if {_USUAL_MFU:.0%} of the peak are reached"
    if step_s > _LONG_STEP_S:
        text += "; with a smaller --gradient_accumulation_steps, or a smaller --size, a step is shorter"
    return [text]


def positions_per_sample(dataset: TaskDataset) -> float:
    """Positions that a sample takes, without padding: the mean over some samples."""
    some = np.unique(np.linspace(0, len(dataset) - 1, 64).astype(np.int64))
    return sum(len(row) for row in dataset.input_rows(some)) / len(some)


def about(seconds: float) -> str:
    """A guess of a duration in words: 8 s, 12 min, 3.5 hours, 12 days."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def _start(progress: Progress, weights_from: Weights | None) -> str:
    weights = f", weights from {weights_from.told}" if weights_from else ""
    return f"starts at step {progress.step}, sample {progress.samples_consumed}{weights}"

"""Options of the run and of the machine, and the whole configuration. Plain data: importing this does not load torch.

Each part's options stand beside the part, in its config.py, with a `check` of what concerns that part alone.
`check_together` judges what crosses parts.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dataset.config import DataConfig
from evaluation.config import EvalConfig
from model.adapters.config import AdapterConfig
from model.config import ModelConfig
from optimizer.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig
from parallel.config import ParallelConfig, PowerSGDConfig
from runs.layout import CONFIG_NAME
from tasks.config import TASK_TYPES, DPOConfig, TaskName, TaskType
from utils.options import (
    OnlyWith,
    Refused,
    parse_size,
    refuse,
    require_at_most,
    require_not_negative,
    require_positive,
)

MOST_PROFILED_STEPS = 20
"""Most steps in one trace. Each takes megabytes a rank, in memory until the trace is written."""


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    size: Literal["", "tiny", "laptop", "gpu", "1b"] = ""
    """Defaults for model, batch, learning rate and context, in one word (configs/README.md)."""
    task_type: TaskName = "pretrain"
    """What to learn: the next tokens of a corpus, the answers of conversations, or preferences between answers."""
    out_dir: str = "out/run"
    """Run directory, for configuration, checkpoints and logs."""
    exp_config_file: str = ""
    """YAML file with flat keys. It may also be the first argument, without a flag."""
    resume: bool = False
    """Continue from a checkpoint in out_dir. If there is none, a command that names its data starts fresh."""
    resume_from: Literal["last", "best"] = "last"
    """Checkpoint for --resume: the newest, or the one with the lowest validation loss."""
    init_from: str = ""
    """Start from the weights of a Hugging Face folder, a run or a checkpoint."""
    seed: int = 1337
    """Key of the initial weights, the data order and dropout."""
    max_iters: int = 0
    """Optimizer steps; 0: --epoch decides."""
    epoch: float = 1.0
    """Passes over the training samples, if max_iters is 0."""
    log_interval: int = 1
    """Steps between log lines."""
    save_interval: int = 0
    """Steps between checkpoints; 0: save only at validations, on request and at the end."""
    save_interval_minutes: float = 0.0
    """Minutes between checkpoints, in addition to those of save_interval; 0: none."""
    async_save: bool = True
    """Write checkpoints in the background. Off: training waits, and needs no memory for copies of its state."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 2
    """Number of checkpoints with the lowest validation loss to keep."""
    keep_every: int = 0
    """Keep checkpoints of steps that are a multiple of this for good; 0: none."""
    max_shard_size: str = "5GB"
    """Largest file of weights in a checkpoint, in bytes or as 500MB, 5GB: a larger model is saved in several parts."""
    valid_only: bool = False
    """Validate the weights of --resume or --init_from, then stop."""
    sync_for_true_time: bool = False
    """Wait for the GPU before reading the clock, so that each step is charged its own time."""
    log_ranks: str = "0"
    """Ranks whose messages go to their node's log file: "all", or numbers such as "0,8". Warnings always do."""
    profile_steps: str = ""
    """Steps to trace, FIRST:LAST. out_dir/profile/ gets one trace a rank and a picture of where the time goes."""
    tensorboard: bool = False
    """Also write results for TensorBoard, to out_dir/tensorboard."""
    wandb_project: str = ""
    """Also send results to this project of Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: keep them in out_dir/wandb, for `wandb sync`."""

    @property
    def task(self) -> TaskType:
        return TASK_TYPES[self.task_type]

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no run can have.
        """
        require_positive(self, "log_interval", "keep_last")
        require_not_negative(
            self, "max_iters", "save_interval", "save_interval_minutes", "keep_best", "keep_every", "seed"
        )
        if not self.max_iters and self.epoch <= 0:
            raise ValueError(f"epoch must be positive where max_iters is 0, got {self.epoch}")
        parse_size(self.max_shard_size)
        parse_log_ranks(self.log_ranks)
        parse_profile_steps(self.profile_steps)


@dataclass(frozen=True)
class SystemConfig:
    """System."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto: CUDA if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the weights; auto: bfloat16 on GPUs and on CPUs with bfloat16 instructions, otherwise float32."""
    compile: bool = False
    """torch.compile each transformer block."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Implementation of everything but matmuls: our Triton kernels, plain PyTorch, or the fastest on the device."""
    rms_norm_kernel: Literal["", "reference", "triton", "liger", "apex"] = ""
    """Implementation of RMSNorm; "": as --kernels."""
    rope_kernel: Literal["", "reference", "triton", "liger"] = ""
    """Implementation of the rotary embedding."""
    swiglu_kernel: Literal["", "reference", "triton", "liger"] = ""
    """Implementation of SwiGLU."""
    experts_kernel: Literal["", "reference", "sorted", "grouped"] = ""
    """Implementation of experts: one after the other, the same with their tokens side by side, or torch's for GPUs."""
    cross_entropy_kernel: Literal["", "reference", "chunked", "triton", "liger"] = ""
    """Implementation of the loss. chunked and triton never hold all logits."""
    attention_kernel: Literal["", "sdpa", "plain", "blocked", "varlen", "flash_attn", "xformers"] = ""
    """Implementation of attention. varlen is torch's, for packed rows on GPUs; blocked is ours, for CPUs."""
    adamw_kernel: Literal["", "torch", "triton"] = ""
    """Implementation of the optimizer's step."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    checkpoint_keeps: Literal["nothing", "matmuls"] = "nothing"
    """With gradient_checkpointing; matmuls: keep the outputs of matmuls and attention, recompute the rest."""
    activation_budget_gb: float = 0.0
    """Most memory that a micro-batch's activations may take, in GB of 10^9 bytes, without weights, their gradients and
    the optimizer: blocks recompute as little as that allows. 0: no limit."""
    deterministic: bool = False
    """The same bits from run to run, on CUDA too. (On a CPU they always are.)"""
    num_threads: int = 0
    """CPU threads of each process; 0: as the launcher chose."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a number that no machine has.
        """
        require_not_negative(self, "num_threads", "activation_budget_gb")
        require_at_most(self, 1_000_000, "activation_budget_gb")
        require_at_most(self, 4096, "num_threads")


@dataclass(frozen=True)
class Config:
    """Train a language model."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    lion: LionConfig = field(default_factory=LionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    powersgd: PowerSGDConfig = field(default_factory=PowerSGDConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


def check_together(config: Config) -> None:
    """Refuse options of different parts that do not go together, as far as they tell without the data.

    Raises:
        ValueError: the first such combination.
    """
    run, data = config.run, config.data
    if not data.data_dir and not (data.train_data_dir and data.valid_data_dir):
        if data.train_data_dir or data.valid_data_dir:
            given, missing = ("train", "valid") if data.train_data_dir else ("valid", "train")
            raise ValueError(f"--{missing}_data_dir is missing: --{given}_data_dir is for the {given} set alone")
        kind = "the data" if run.task.reads_records else "the pretokenized data"
        raise ValueError(f"--data_dir is missing: give the directory of {kind}")
    if data.resume_at_sample and not run.resume:
        raise ValueError("--resume_at_sample goes with --resume: a new run has nothing to leave out")
    if run.valid_only and not (run.resume or run.init_from):
        holds_run = (Path(run.out_dir) / CONFIG_NAME).exists()
        to_do = "add --resume for those of the run in --out_dir" if holds_run else "give --init_from"
        raise ValueError(f"--valid_only needs weights: {to_do}")
    if not data.document_mask and not run.task.mixes_documents:
        raise ValueError("--no-document_mask is for pretraining: sequences of SFT never see each other")
    if config.system.activation_budget_gb and (
        config.system.gradient_checkpointing or config.system.checkpoint_keeps != "nothing"
    ):
        raise ValueError(
            "--activation_budget_gb decides what each block recomputes: leave out --gradient_checkpointing and "
            "--checkpoint_keeps"
        )
    if run.task.options:
        getattr(config, run.task.options).check()
    if run.task.needs_weights and not (run.init_from or run.resume):
        raise ValueError(
            f"--task_type={run.task_type} needs a model to begin with: give --init_from, best a run of --task_type=sft"
        )
    _check_adapter(config)
    _check_gradients(config)
    _check_context(config)
    _check_cut(config)


def _check_adapter(config: Config) -> None:
    """Refuse what an adapter does not go with."""
    run, adapter = config.run, config.adapter
    if not adapter.is_used:
        return
    if not (run.init_from or run.resume):
        name = "--adapter" if adapter.adapter else "--lora_r"
        raise ValueError(f"{name}: an adapter needs weights to stand on: give them with --init_from")
    if config.optimizer.optimizer == "muon":
        raise ValueError(
            "--optimizer=muon is for whole matrices of the blocks, not for an adapter's two thin factors: give "
            "--optimizer=adamw"
        )
    if config.model.router_bias_update_rate:
        raise ValueError(
            "--router_bias_update_rate moves biases of the base, which stays as it is below an adapter: leave it out"
        )


def _check_gradients(config: Config) -> None:
    """Refuse hooks and overlaps that do not go with the optimizer or the dtype."""
    parallel, is_float16 = config.parallel, config.system.dtype == "float16"
    if config.optimizer.offload_optimizer and parallel.overlap_optim_step:
        raise ValueError(
            "--offload_optimizer steps on the CPU, which --overlap_optim_step needs for the backward pass: give only "
            "one of them"
        )
    if config.optimizer.offload_optimizer and config.system.adamw_kernel == "triton":
        raise ValueError("--offload_optimizer steps on the CPU: leave out --adamw_kernel=triton")
    if config.powersgd.grad_buffer_is_powerSGD_error:
        if not (parallel.use_powerSGD_hook and config.powersgd.use_error_feedback):
            raise ValueError("--grad_buffer_is_powerSGD_error needs --use_powerSGD_hook with --use_error_feedback")
        if is_float16:
            raise ValueError(
                "--grad_buffer_is_powerSGD_error does not go with --dtype=float16: an overflow, which the loss scaler "
                "expects now and then, would destroy the residual"
            )
    if parallel.overlap_optim_step:
        if config.optimizer.optimizer == "muon" and parallel.use_distributed_optimizer:
            raise ValueError(
                "--optimizer=muon needs whole matrices, and --use_distributed_optimizer gathers them after the backward"
                " pass: leave out --overlap_optim_step"
            )
        if config.optimizer.grad_clip > 0:
            raise ValueError(
                "--overlap_optim_step steps a bucket before the global gradient norm is known, so it cannot clip: add "
                "--grad_clip=0, or leave it out"
            )
        if is_float16:
            raise ValueError(
                "--overlap_optim_step cannot skip a step, which float16's loss scaler needs: use --dtype=bfloat16, or "
                "leave it out"
            )


def _check_context(config: Config) -> None:
    """Refuse what does not go with rows whose positions are shared."""
    size, length = config.parallel.context_parallel_size, config.data.max_seq_len
    if size == 1:
        return
    if length % (2 * size):
        nearest = max(round(length / (2 * size)), 1) * 2 * size
        raise ValueError(
            f"--context_parallel_size={size} cuts each row into {2 * size} equal parts, and --max_seq_len={length} is "
            f"no multiple of that: --max_seq_len={nearest} is the nearest possible"
        )
    if config.parallel.context_parallel_method == "ring":
        run, data = config.run, config.data
        if data.document_mask and run.task.mixes_documents:
            raise ValueError(
                "--context_parallel_method=ring is for rows of one document: give --no-document_mask, or "
                "--context_parallel_method=gather"
            )
        if data.packing and "packing" in run.task.flags:
            raise ValueError(
                "--context_parallel_method=ring is for rows of one conversation: give --no-packing, or "
                "--context_parallel_method=gather"
            )
        if config.system.attention_kernel:
            raise ValueError(
                f"--context_parallel_method=ring has attention of its own: leave out "
                f"--attention_kernel={config.system.attention_kernel}"
            )
    if config.system.compile:
        raise ValueError(
            "--compile does not go with --context_parallel_size, whose ranks exchange keys and values inside a block: "
            "leave out one of them"
        )


def _check_cut(config: Config) -> None:
    """Refuse what does not go with a model or rows that are cut over the ranks."""
    refuse(_flat(config) | {"cut_by": config.parallel.cut_by}, _flat(Config()), _REFUSED)


def _flat(config: Config) -> dict[str, Any]:
    """All options by name."""
    return {name: value for group in vars(config).values() for name, value in vars(group).items()}


_REFUSED = (
    # Braces: cut_by is the flag that cuts.
    Refused(
        ("load_in_4bit",), lambda f: f["cut_by"],
        "does not go with {cut_by}, since matrices in 4 bits are whole on every rank: leave out one of them",
    ),
    Refused(
        ("activation_budget_gb",), lambda f: f["cut_by"],
        "measures a model that is whole on every rank: with {cut_by}, give --gradient_checkpointing, if need be with "
        "--checkpoint_keeps=matmuls",
    ),
    Refused(
        ("optimizer",), lambda f: f["optimizer"] == "muon" and f["tensor_model_parallel_size"] > 1,
        "makes whole matrices orthogonal, and --tensor_model_parallel_size={tensor_model_parallel_size} cuts them: "
        "give --optimizer=adamw",
    ),
    Refused(
        ("optimizer",), lambda f: f["optimizer"].endswith("8bit") and f["tensor_model_parallel_size"] > 1,
        "has scales for values in a row, between which --tensor_model_parallel_size={tensor_model_parallel_size} cuts "
        "matrices: give the optimizer without 8bit",
    ),
    Refused(
        ("cross_entropy_kernel",),
        lambda f: f["cross_entropy_kernel"] not in ("", "chunked") and f["tensor_model_parallel_size"] > 1,
        "computes with all scores of a token, and --tensor_model_parallel_size={tensor_model_parallel_size} cuts the "
        "vocabulary: give --cross_entropy_kernel=chunked, or leave it out",
    ),
    Refused(
        ("gradient_checkpointing",),
        lambda f: f["pipeline_model_parallel_size"] > 1 and f["pipeline_schedule"] in ("zero_bubble", "zbv"),
        "computes a block anew in each part of its backward pass, and --pipeline_schedule={pipeline_schedule} has one "
        "for each matrix: give --pipeline_schedule=interleaved, or leave it out",
    ),
    Refused(
        ("compile",),
        lambda f: f["pipeline_model_parallel_size"] > 1 and f["pipeline_schedule"] in ("zero_bubble", "zbv"),
        "makes one graph of a block's backward pass, which --pipeline_schedule={pipeline_schedule} splits: give "
        "--pipeline_schedule=interleaved, or leave it out",
    ),
    Refused(
        ("fsdp_cpu_offload",), lambda f: f["offload_optimizer"] and f["data_parallel"] != "auto",
        "keeps the optimizer's state in host memory, too: leave out --offload_optimizer",
    ),
    Refused(
        ("fsdp_cpu_offload",), lambda f: f["optimizer"] == "muon" and f["data_parallel"] != "auto",
        "steps on the CPU, where Muon's matrix multiplications would take longest: give --optimizer=adamw, or leave "
        "it out",
    ),
    Refused(
        ("fsdp_cpu_offload",), lambda f: f["adamw_kernel"] == "triton" and f["data_parallel"] != "auto",
        "steps on the CPU: leave out --adamw_kernel=triton",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """Figures that follow from the configuration, the data and the number of ranks."""

    global_batch_size: int
    """Samples in a step."""
    max_iters: int
    """Steps of the run."""


def resolve(
    config: Config, data_size: int, num_train_samples: int, step: int = 0, samples_consumed: int = 0
) -> Derived:
    """Figures that follow from the configuration, the data and the number of ranks.

    Args:
        data_size: ranks that read different rows.
        num_train_samples: samples in an epoch.
        step, samples_consumed: position of a resumed run. --epoch counts samples, even if the global batch changed.
    Raises:
        ValueError: the global batch cannot be split over the ranks.
    """
    steps = config.data.gradient_accumulation_steps
    if steps % data_size:
        raise ValueError(
            f"gradient_accumulation_steps={steps} counts the micro-batches over all ranks and must be a multiple of "
            f"their number, {data_size}: use {-(-steps // data_size) * data_size}"
        )
    global_batch = config.data.train_batch_size * steps
    epoch_iters = max(1, step + round((config.run.epoch * num_train_samples - samples_consumed) / global_batch))
    return Derived(global_batch, config.run.max_iters or epoch_iters)


def parse_log_ranks(text: str) -> frozenset[int] | None:
    """The ranks that --log_ranks names; None: all of them.

    Raises:
        ValueError: the text is neither "all" nor a list of ranks.
    """
    if text == "all":
        return None
    if not re.fullmatch(r"[0-9]+( *, *[0-9]+)*", text):
        raise ValueError(f'log_ranks must be "all" or ranks separated by commas, such as 0,8; got {text!r}')
    return frozenset(map(int, text.split(",")))


def parse_profile_steps(text: str) -> tuple[int, int] | None:
    """First and last of the steps that --profile_steps names; None: none.

    Raises:
        ValueError: the text is not a range of steps, or has so many that no viewer could open the trace.
    """
    if not text:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(
            f'profile_steps must be FIRST:LAST, such as 6:8 (in a YAML file in quotes: "6:8"); got {text!r}'
        )
    first, last = int(match[1]), int(match[2])
    if last - first >= MOST_PROFILED_STEPS:
        raise ValueError(
            f"profile_steps={text} asks for {last - first + 1} steps: a trace holds at most {MOST_PROFILED_STEPS}"
        )
    return first, last


ONLY_WITH = (
    OnlyWith(("resume_from", "restart_data"), lambda f: f["resume"], "without --resume"),
    OnlyWith(("wandb_mode",), lambda f: f["wandb_project"], "without --wandb_project"),
)

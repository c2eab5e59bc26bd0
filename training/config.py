"""Options of the run and of the machine that it runs on. Plain data: importing this loads no torch."""

import re
from dataclasses import dataclass
from typing import Literal

from tasks.config import TaskName
from utils.ranges import require_at_most, require_not_negative, require_positive

MOST_PROFILED_STEPS = 20
"""Each takes megabytes of trace a rank, in memory until it is written."""


@dataclass(frozen=True)
class RunConfig:
    """Run."""

    size: Literal["", "tiny", "laptop", "gpu", "1b"] = ""
    """One word for model, batch, learning rate and context, all below what else is given (configs/README.md)."""
    task_type: TaskName = "pretrain"
    """Next tokens of a corpus, the answers of conversations, or preferences between answers."""
    out_dir: str = "out/run"
    """Run directory: configuration, checkpoints, logs."""
    exp_config_file: str = ""
    """YAML file with flat keys; may also be the first argument, without a flag."""
    resume: bool = False
    """Go on from a checkpoint in out_dir; where there is none, a command that names its data starts fresh."""
    resume_from: Literal["last", "best"] = "last"
    """Which checkpoint --resume takes: the newest, or the one with the lowest validation loss."""
    init_from: str = ""
    """Start from the weights of a Hugging Face folder, a run or a checkpoint."""
    seed: int = 1337
    """Key of the initial weights, the data order and dropout."""
    max_iters: int = 0
    """Optimizer steps; 0 takes --epoch."""
    epoch: float = 1.0
    """Passes over the training samples, where max_iters is 0."""
    log_interval: int = 1
    """Steps between log lines."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves at validations, on request and at the end only."""
    save_interval_minutes: float = 0.0
    """Minutes between checkpoints, beside those that save_interval asks for; 0: none."""
    async_save: bool = True
    """Write checkpoints in the background; off: the training waits, and needs no memory for copies of its state."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_best: int = 2
    """Checkpoints with the lowest validation loss that stay."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this stay for good; 0: none."""
    valid_only: bool = False
    """Validate the weights of --resume or --init_from, then stop."""
    sync_for_true_time: bool = False
    """Wait for the GPU before reading the clock, so that a step's time is its own."""
    log_ranks: str = "0"
    """Ranks whose messages go to their node's log file: "all", or numbers such as "0,8"; warnings of all always do."""
    profile_steps: str = ""
    """Steps to trace, FIRST:LAST: out_dir/profile/ gets a trace a rank, and a picture of where a step's time goes."""
    tensorboard: bool = False
    """Write results for TensorBoard, too: out_dir/tensorboard."""
    wandb_project: str = ""
    """Send results to this project of Weights & Biases, too."""
    wandb_mode: Literal["online", "offline"] = "online"
    """Offline keeps them in out_dir/wandb, for `wandb sync`."""

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
        parse_log_ranks(self.log_ranks)
        parse_profile_steps(self.profile_steps)


@dataclass(frozen=True)
class SystemConfig:
    """System."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' dtype; auto: bfloat16 on GPUs and on CPUs with bfloat16 instructions, else float32."""
    compile: bool = False
    """torch.compile each transformer block."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Who computes what is not a matmul: our Triton kernels, plain PyTorch, or what is fastest on the device."""
    rms_norm_kernel: Literal["", "reference", "triton", "liger", "apex"] = ""
    """For RMSNorm alone; "" takes --kernels."""
    rope_kernel: Literal["", "reference", "triton", "liger"] = ""
    """For the rotary embedding alone."""
    swiglu_kernel: Literal["", "reference", "triton", "liger"] = ""
    """For SwiGLU alone."""
    cross_entropy_kernel: Literal["", "reference", "chunked", "triton", "liger"] = ""
    """For the loss alone; chunked and triton never hold all logits."""
    attention_kernel: Literal["", "sdpa", "plain", "blocked", "varlen", "flash_attn", "xformers"] = ""
    """For attention alone; varlen is torch's own for packed rows on GPUs, blocked ours for CPUs."""
    adamw_kernel: Literal["", "torch", "triton"] = ""
    """For the optimizer's step alone."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    checkpoint_keeps: Literal["nothing", "matmuls"] = "nothing"
    """With gradient_checkpointing: matmuls keeps their and attention's outputs, and recomputes what is cheap."""
    deterministic: bool = False
    """Same bits from run to run on CUDA too (a CPU has them always)."""
    num_threads: int = 0
    """CPU threads a process; 0 leaves the launcher's choice."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a number of threads that no machine has.
        """
        require_not_negative(self, "num_threads")
        require_at_most(self, 4096, "num_threads")


def parse_log_ranks(text: str) -> frozenset[int] | None:
    """The ranks that --log_ranks names; None: all of them.

    Raises:
        ValueError: it is something else.
    """
    if text == "all":
        return None
    if not re.fullmatch(r"[0-9]+( *, *[0-9]+)*", text):
        raise ValueError(f'log_ranks must be "all" or ranks separated by commas, such as 0,8; got {text!r}')
    return frozenset(map(int, text.split(",")))


def parse_profile_steps(text: str) -> tuple[int, int] | None:
    """(first, last) of the steps that --profile_steps names; None: it is empty.

    Raises:
        ValueError: it is something else, or so many steps that no viewer could open the trace.
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

"""The files of a run directory (`--out_dir`), each name once.

    .zero2all-run         empty: this is a run; ranks that see it see the same directory
    .lock                 locked by the process that trains, or changes checkpoints
    .seen-R-ID            left for a moment, by which ranks find out who shares a file system
    config.yaml           the resolved configuration                        (training/records.py)
    reslog.jsonl          the results                                       (runs/reslog.py)
    train.log             the log of the first node; others write train-node-N.log
    ckpt/                 the checkpoints                                   (checkpoint/folder.py)
    heartbeat/rank-N.json and rank-N.stacks: signs of life                  (runs/heartbeat.py)
    exit/rank-N.json      how each rank ended                               (runs/exits.py)
    profile/              traces, with --profile_steps
    tensorboard/, wandb/  results once more, on request; wandb names its folder itself
    activations.json      what each block recomputes, with --activation_budget_gb (training/recompute.py)
    eval/step-N/          what evaluations found, and the model's answers   (evaluation/results.py)
    report.md, report.html  the report card                                 (evaluation/report/)
    pipeline.json         what follows from measured times of a pipeline's units  (training/pipeline.py)
    monitor/              what belongs to the monitor                       (monitor/node.py)
    stop                  made by a user: the run saves and stops

Readers on another machine (viewer/sources/run.py) join the names themselves; all others use `RunPaths`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

RUN_MARK = ".zero2all-run"
LOCK = ".lock"
SEEN_MARK = ".seen-"
"""Begins the name."""
CONFIG_NAME = "config.yaml"
RESLOG_NAME = "reslog.jsonl"
LOG_NAME = "train.log"
CKPT_DIR = "ckpt"
HEARTBEAT_DIR = "heartbeat"
EXIT_DIR = "exit"
PROFILE_DIR = "profile"
TENSORBOARD_DIR = "tensorboard"
MONITOR_DIR = "monitor"
STOP_FILE = "stop"
ACTIVATIONS_NAME = "activations.json"
PIPELINE_NAME = "pipeline.json"
EVAL_DIR = "eval"

RANK_FILES = "rank-*.json"
"""Pattern of the ranks' files in `heartbeat` and `exit`."""


@dataclass(frozen=True)
class RunPaths:
    """Paths in a run directory, whether they are there or not."""

    root: Path

    @property
    def mark(self) -> Path:
        return self.root / RUN_MARK

    @property
    def lock(self) -> Path:
        return self.root / LOCK

    @property
    def config(self) -> Path:
        return self.root / CONFIG_NAME

    @property
    def reslog(self) -> Path:
        return self.root / RESLOG_NAME

    @property
    def log(self) -> Path:
        return self.root / LOG_NAME

    def log_of_node(self, node: int, first_node: int) -> Path:
        """The file that a node logs to. Nodes that share a file system have a file each, as appending to one from
        several machines loses lines on a network file system.

        Args:
            first_node: the first of those that see this directory.
        """
        return self.log if node == first_node else self.root / f"train-node-{node}.log"

    @property
    def ckpt_dir(self) -> Path:
        return self.root / CKPT_DIR

    @property
    def heartbeat_dir(self) -> Path:
        return self.root / HEARTBEAT_DIR

    @property
    def exit_dir(self) -> Path:
        return self.root / EXIT_DIR

    @property
    def profile_dir(self) -> Path:
        return self.root / PROFILE_DIR

    @property
    def tensorboard_dir(self) -> Path:
        return self.root / TENSORBOARD_DIR

    @property
    def monitor_dir(self) -> Path:
        return self.root / MONITOR_DIR

    @property
    def activations(self) -> Path:
        return self.root / ACTIVATIONS_NAME

    @property
    def pipeline(self) -> Path:
        return self.root / PIPELINE_NAME

    def eval_dir(self, step: int) -> Path:
        """Where the evaluation of a step's checkpoint leaves what it found."""
        return self.root / EVAL_DIR / f"step-{step}"

    @property
    def stop_file(self) -> Path:
        return self.root / STOP_FILE


def rank_file(rank: int) -> str:
    """Name of a rank's file in `heartbeat` or `exit`."""
    return f"rank-{rank}.json"


def stacks_file(rank: int) -> str:
    """Name of the file in `heartbeat` that a rank writes its stacks to when it is asked for them."""
    return f"rank-{rank}.stacks"


def rank_of(path: Path) -> int | None:
    """The rank whose file `rank-N.json` is; None if it has another name."""
    match = re.fullmatch(r"rank-([0-9]{1,9})\.json", path.name)
    return int(match[1]) if match else None

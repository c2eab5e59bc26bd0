"""Run directories that are made up, record by record."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runs.reslog import VERSION

BEGUN = 1_700_000_000.0


class MadeRun:
    """A run directory whose clock the test moves."""

    def __init__(self, path: Path, **config: Any):
        self.path, self.now, self._lines = path, BEGUN, []
        path.mkdir(parents=True)
        (path / ".zero2all-run").touch()
        self.config = {"task_type": "pretrain", "learning_rate": 0.001, "optimizer": "adamw", "init_from": "", **config}

    def write(self, name: str, after: float = 0.0, **values: Any) -> None:
        """A record, `after` seconds after the one before it."""
        self.now += after
        self._lines.append(json.dumps({"name": name, "time": self.now, **values}))

    def start(self, step: int = 0, after: float = 0.0, **values: Any) -> None:
        usual = {
            "version": VERSION, "attempt": 1, "max_iters": 100, "samples_consumed": step * 8, "world_size": 2,
            "global_batch_size": 8, "seed": 1, "data": "0" * 64, "max_seq_len": 16, "task": "pretrain", "packing": True,
        }  # fmt: skip
        self.write("start", after, step=step, **usual | values)

    def train(self, steps: Iterable[int], dt: float = 2.0, **values: Any) -> None:
        """A record a step, each `dt` seconds after the one before it."""
        for step in steps:
            usual = {
                "loss": 9.0 - 0.01 * step, "lr": 1e-3, "tokens": step * 128, "tokens_per_sec": 64.0, "mfu": 0.5,
                "data_wait": 0.25, "comm_wait": 0.5, "samples": [8 * step - 8, 8 * step - 1], "digest": "0",
            }  # fmt: skip
            self.write("train", dt, step=step, dt=dt, **usual | values)

    def finish(self, derived: dict[str, Any] | None = None, torn: bytes = b"") -> Path:
        """Write the files."""
        config = json.dumps(self.config | {"derived": derived or {}})
        # JSON is YAML.
        (self.path / "config.yaml").write_text(config)
        (self.path / "reslog.jsonl").write_bytes("".join(f"{line}\n" for line in self._lines).encode() + torn)
        return self.path


SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}  # fmt: skip
"""A model's shape, as config.yaml has it."""

"""The folder of one evaluation, RUN/eval/step-N, which rank 0 keeps.

    state.json      how often it was begun, and whether it has ended
    and those of evaluation/results.py
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoint.folder import step_dir
from evaluation.config import EvalConfig
from evaluation.folder import EvaluationFolder, digest_of_weights
from evaluation.task import Outcome
from model.adapters.folder import weights_of
from training.build import Built
from utils.files import atomic_write_json
from utils.paths import for_command
from utils.small_files import parse_json, read_small

_MOST_STARTS = 2
_STATE_NAME = "state.json"
_LONGEST_STATE = 1 << 16


@dataclass(frozen=True)
class _State:
    key: str
    """Digest of the weights and of everything that is asked of them."""
    starts: int = 0
    """How often the evaluation was begun and then neither ended nor stopped in order."""
    has_ended: bool = False
    told: Sequence[str] = ()
    """Tasks whose results have been logged."""


class EvalFolder:
    """The folder, for the weights and tasks of now: what was there for others does not count.

    Raises:
        OSError, ValueError: it cannot be read or written, or the step has no checkpoint.
    """

    def __init__(self, built: Built):
        step, config = built.progress.step, built.config.evaluation
        self.path, checkpoint = built.run_dir.paths.eval_dir(step), built.run_dir.paths.ckpt_dir / step_dir(step)
        device = built.context.device.type
        weights = digest_of_weights(checkpoint)
        self.fingerprint = _digest([weights, str(built.dtype), device])
        """Of the model as it computes."""
        self._state = _State(_digest([self.fingerprint, asdict(replace(config, eval_interval=0))]))
        base, adapter = weights_of(checkpoint)
        model = {
            "path": str(base.absolute()), "step": step, "adapter": None if adapter is None else str(adapter.absolute()),
            "dtype": str(built.dtype).removeprefix("torch."), "device": device, "weights": weights,
            "fingerprint": self.fingerprint,
        }  # fmt: skip
        command = command_for(config, checkpoint, built.config.run.task.teaches_chat)
        # A run that was resumed from an earlier step may come to this one with other weights.
        self._figures = EvaluationFolder(self.path, model, command, replaces=True)
        self._read()

    @property
    def has_ended(self) -> bool:
        return self._state.has_ended

    @property
    def deaths(self) -> int:
        """How often the run has died in this evaluation; 0 if it may be begun once more."""
        return self._state.starts if self._state.starts >= _MOST_STARTS else 0

    def begin(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(replace(self._state, starts=self._state.starts + 1))

    def end(self) -> None:
        """The evaluation is over, whatever it was good for."""
        self._write(replace(self._state, has_ended=True))

    def stop(self) -> None:
        """The evaluation goes on with the next launch."""
        self._write(replace(self._state, starts=self._state.starts - 1))

    def take(self, outcome: Outcome) -> bool:
        """Write a task's results; returns whether they are new.

        Raises:
            OSError: they cannot be written.
        """
        self._figures.take(outcome)
        name = outcome.result.name
        if name in self._state.told:
            return False
        self._write(replace(self._state, told=[*self._state.told, name]))
        return True

    def _read(self) -> None:
        with suppress(FileNotFoundError):
            path = self.path / _STATE_NAME
            try:
                state = _State(**parse_json(read_small(path, _LONGEST_STATE)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it") from None
            if state.key == self._state.key:
                self._state = state

    def _write(self, state: _State) -> None:
        self._state = state
        atomic_write_json(self.path / _STATE_NAME, asdict(state))


def command_for(config: EvalConfig, checkpoint: Path, chat: bool) -> str:
    """A command that evaluates a checkpoint in the same way."""
    words = [f"python evaluate_model.py --model {for_command(checkpoint)} --tasks {','.join(config.names)}"]
    for name in ("limit", "num_fewshot", "data_dir", "task_dir"):
        value = getattr(config, f"eval_{name}")
        if value not in (None, ""):
            words.append(f"--{name} {for_command(value)}")
    words += ["--chat"] * chat + ["--allow_code_execution"] * config.eval_allow_code_execution
    return " ".join(words)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

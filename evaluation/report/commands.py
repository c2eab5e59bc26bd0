"""The commands that make the run again, as far as the run recorded what they were."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configurator import flatten
from dataset.mixture_spec import directories_of
from dataset.sequences import read_manifest
from evaluation.report.card import Block, Facts, Heading, Section, Text, Verbatim
from evaluation.report.run import Run
from evaluation.report.scores import Scored
from evaluation.report.trained import data_dir
from evaluation.report.words import NOT_RECORDED, counted, listed, short, without_home
from training.config import Config
from utils.paths import for_command

_PATHS = ("out_dir", "init_from", "adapter", "data_dir", "train_data_dir", "valid_data_dir", "tokenizer_dir",
          "eval_data_dir", "eval_task_dir")  # fmt: skip
_SECRET = ("password", "secret", "api_key")


def commands(runs: Sequence[Run], scored: Sequence[Scored]) -> Section:
    """The section."""
    blocks: list[Block] = []
    for run in reversed(runs):
        blocks.append(Heading(f"{run.name}: data and training"))
        blocks += _data(run)
        blocks += _training(run)
        blocks.append(Facts(list(_versions(run))))
    for one in scored:
        if one.results.commands:
            told = "\n".join(without_home(str(command)) for command in one.results.commands)
            blocks += [Heading(f"{one.name}: evaluation"), Verbatim(told)]
            if one.results.versions:
                blocks.append(Facts([("versions", _named(one.results.versions))]))
    return Section("The commands that reproduce it", blocks)


def _data(run: Run) -> Iterator[Block]:
    """Commands that made the data: whoever makes data records them in the manifest, as `commands`."""
    directory, found = data_dir(run), None
    if directory is not None:
        try:
            lists = [read_manifest(folder).get("commands") for folder in directories_of(directory)]
            found = [command for one in lists if isinstance(one, list) for command in one]
        except (ValueError, OSError):
            found = None
    if found:
        yield Verbatim("\n".join(without_home(str(command)) for command in found), "data")
    else:
        yield Text(f"The commands that made its data: {NOT_RECORDED}.")


def _training(run: Run) -> Iterator[Block]:
    if not run.config:
        yield Text(f"The training command: {NOT_RECORDED}.")
        return
    yield Verbatim(training_command(run), "training")
    usual = flatten(Config())
    if unknown := [name for name in run.config if name not in usual]:
        yield Text(f"This version does not know {listed(unknown)}, which the run's configuration names.", "note")
    if len(run.launches) > 1:
        resumed = counted(len(run.launches) - 1, "time")
        yield Text(f"The run was begun anew {resumed}, with --resume added.")


def training_command(run: Run) -> str:
    """The command that begins this run: the flags that differ from their defaults."""
    usual, words = flatten(Config()), ["python train_my_ddp.py"]
    world_size = run.derived.get("world_size")
    if isinstance(world_size, int) and world_size > 1:
        words.append(f"--nproc {world_size}")
    for name, value in run.config.items():
        if name in usual and value != usual[name] and not any(part in name for part in _SECRET):
            words.append(_flag(name, value))
    return " \\\n    ".join(words)


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if name in _PATHS:
        return f"--{name}={_path(str(value))}"
    return f"--{name}={shlex.quote(str(value))}"


def _path(given: str) -> str:
    """A path as a word of the command, without the home directory's name: the command expands `~` itself."""
    if not Path(given).is_absolute():
        return for_command(given)
    text = short(given)
    return shlex.quote(text.replace("$", "$$")) if text.startswith("~") else for_command(text)


def _versions(run: Run) -> Iterator[tuple[str, str]]:
    versions, commit = run.start.get("versions"), run.start.get("commit")
    yield "versions", _named(versions) if isinstance(versions, dict) and versions else NOT_RECORDED
    yield "commit", str(commit) if commit else NOT_RECORDED


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())

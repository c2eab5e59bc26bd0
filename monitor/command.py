"""The training command after `--`: its run directory, and the flags that the monitor adds.

A torchrun command is run by parallel/launch.py with the same flags: torchrun's rendezvous lets anybody who reaches its
port run code.
"""

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.files import is_passing
from utils.paths import expand
from utils.small_files import parse_yaml, read_small

_LONGEST_CONFIG = 1 << 20
"""Bytes."""
_DEFAULT_OUT_DIR = "out/run"
_TORCHRUN, _OURS = ("-m", "torch.distributed.run"), ("-m", "parallel.launch")
_LAUNCH = Path(__file__).resolve().parents[1] / "parallel" / "launch.py"


@dataclass(frozen=True)
class TrainCommand:
    """The parts of `launcher... script.py flags...`; words stay as given and are never split at spaces."""

    launcher: tuple[str, ...]
    """Everything before the script: an interpreter, or torchrun or parallel/launch.py with their flags."""
    script: str
    flags: tuple[str, ...]

    @staticmethod
    def parse(words: list[str]) -> "TrainCommand":
        """The parts of a command.

        Raises:
            ValueError: the command names no training script, or has a flag that the monitor must set itself.
        """
        scripts = (index for index, word in enumerate(words) if word.endswith(".py") and not _is_launch(word))
        script = next(scripts, None)
        if not script:
            lacks = "begins with its script" if script == 0 else "names no script" if words else "is missing"
            raise ValueError(
                f"the training command {lacks}: write it after --, with what runs it, as in `-- python -m "
                f"parallel.launch --nproc_per_node=2 train_my_ddp.py FLAGS`"
            )
        command = _launched(TrainCommand(tuple(words[:script]), words[script], tuple(words[script + 1 :])))
        if command.is_torchrun and command._torchrun_flag("max_restarts") not in (None, "0"):
            raise ValueError("leave --max_restarts out of the launcher's flags: restarting is the monitor's work")
        return command

    @property
    def is_torchrun(self) -> bool:
        return self._elastic_words() > 0

    def _elastic_words(self) -> int:
        """Number of words up to the name of torchrun or of our launcher; 0 if the command has neither."""
        if Path(self.launcher[0]).name == "torchrun":
            return 1
        pairs = list(zip(self.launcher[1:], self.launcher[2:]))
        for pair in (_TORCHRUN, _OURS):
            if pair in pairs:
                return pairs.index(pair) + 3
        return next((index + 1 for index, word in enumerate(self.launcher) if _is_launch(word)), 0)

    def _torchrun_flag(self, name: str) -> str | None:
        return _flag_value(self.launcher[self._elastic_words() :], name)

    @property
    def is_standalone(self) -> bool:
        return "--standalone" in self.launcher

    def flag(self, name: str) -> str | None:
        """Value of one of the training's flags; None if the command line does not give it."""
        return _flag_value(self.flags, name)

    @property
    def out_dir(self) -> str:
        """The run directory as it was given, found as the training does: from the flag, the YAML file or the default.
        Each machine expands `~` in it to its own home directory.

        Raises:
            ValueError: the YAML file cannot be read.
            OSError: the YAML file cannot be read now.
        """
        value = self.flag("out_dir")
        if value is not None:
            return value
        file = self.flag("exp_config_file")
        if file is None and self.flags and not self.flags[0].startswith("-"):
            file = self.flags[0]
        if file is None:
            return _DEFAULT_OUT_DIR
        try:
            values = parse_yaml(read_small(Path(expand(file)), _LONGEST_CONFIG)) or {}
            if not isinstance(values, dict):
                raise ValueError("it holds no settings")
            return str(values.get("out_dir", _DEFAULT_OUT_DIR))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise
            raise ValueError(
                f"--out_dir is not among the flags, and {file} cannot be read: give it ({error})"
            ) from None

    def words(self, python: str | None, launcher_flags: list[str], flags: list[str]) -> list[str]:
        """The command to run.

        Args:
            python: interpreter on another machine, where the launcher is a module of the working directory. None:
                this machine, where the working directory may be another project's.
            launcher_flags: added to the launcher's flags.
            flags: added to the training's flags.
        """
        words = self._elastic_words()
        launcher, rest = list(self.launcher[:words]), list(self.launcher[words:])
        if python is not None:
            launcher, rest = ([python, *_OURS], rest) if words else ([python], list(self.launcher[1:]))
        elif Path(self.launcher[0]).name == "torchrun" and shutil.which(launcher[0]) is not None:
            launcher = [interpreter_of(launcher[0]), str(_LAUNCH)]
        elif tuple(launcher[-2:]) == _TORCHRUN:
            launcher[-2:] = [str(_LAUNCH)]
        added = launcher_flags if words else []
        return [*launcher, *added, *rest, self.script, *self.flags, *flags]


def _launched(command: TrainCommand) -> TrainCommand:
    """`python train_my_ddp.py --nproc=N` written as a command of the launcher: to restart a job, the monitor must
    control its ranks through the launcher."""
    nproc = command.flag("nproc")
    if nproc is None or command.is_torchrun:
        return command
    flags, words = [], iter(command.flags)
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            flags.append(word)
    launcher = (*command.launcher, *_OURS, "--standalone", f"--nproc_per_node={nproc}")
    return TrainCommand(launcher, command.script, tuple(flags))


def _is_launch(word: str) -> bool:
    return Path(word).parts[-2:] == _LAUNCH.parts[-2:]


def interpreter_of(torchrun: str) -> str:
    """The Python of a torchrun command: the one in its first line, or the one beside it, or this one."""
    found = Path(shutil.which(torchrun) or torchrun)
    try:
        with open(found, "rb") as file:
            line = file.readline(1000).decode(errors="replace").rstrip("\n")
    except OSError:
        line = ""
    named = shutil.which(line.removeprefix("#!").removeprefix("/usr/bin/env ").strip()) if line[:2] == "#!" else None
    if named is not None and Path(named).name.startswith("python"):
        return named
    beside = (str(found.parent / name) for name in ("python", "python3"))
    return next((path for path in beside if shutil.which(path)), sys.executable)


def _flag_value(words: tuple[str, ...], name: str) -> str | None:
    """The last value of `--name=value` or `--name value`, with - or _ in the name."""
    value = None
    for index, word in enumerate(words):
        head, equals, tail = word.partition("=")
        if not head.startswith("--") or head[2:].replace("-", "_") != name:
            continue
        if equals:
            value = tail
        elif index + 1 < len(words):
            value = words[index + 1]
    return value


def shutdown_flags(launcher: str, seconds: int) -> list[str]:
    """torchrun's flag for the time in which its ranks must end, if the torchrun that `launcher` starts has it.

    torch 2.13 has the flag; before that, the time was 30 seconds. The monitor therefore asks the ranks themselves to
    stop, and this time applies only to a SIGTERM that comes from elsewhere.
    """
    found = shutil.which(launcher)
    spec = importlib.util.find_spec("torch")
    if found is None or spec is None or Path(found).parent != Path(sys.executable).parent:
        return []
    source = Path(spec.origin).parent / "distributed" / "run.py"
    known = source.exists() and "--shutdown-timeout" in source.read_text(encoding="utf-8")
    return [f"--shutdown-timeout={seconds}"] if known else []

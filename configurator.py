"""The configuration from the command line and YAML files, and into config.yaml: parse, merge, save.

The options themselves, frozen dataclasses, and their checks stand beside the parts that they configure: */config.py.

Precedence: command line > YAML file given now > saved configuration (on --resume) > --size (of a new run) > defaults.
Flags bear their fields' names; the groups only order the help. What is left to the data, training/data.py and
training/batch.py fill in.
"""

import dataclasses
import errno
import math
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

import dataset.config
import evaluation.config
import model.adapters.config
import model.config
import optimizer.config
import parallel.config
import tasks.config
import training.config
from configs import sizes
from configs.flag_names import check_name
from optimizer.config import OptimizerConfig
from runs.layout import CONFIG_NAME
from tasks.config import TASK_TYPES
from training.config import Config, RunConfig, check_together
from utils.paths import absent, expand, near_to
from utils.small_files import parse_yaml, shown

_GROUPS = get_type_hints(Config)
_FIELDS = {name: (group, hint) for group, kind in _GROUPS.items() for name, hint in get_type_hints(kind).items()}

_PER_LAUNCH = ("exp_config_file", "resume", "resume_from", "valid_only", "restart_data", "resume_at_sample",
               "profile_steps")  # fmt: skip
"""Options of a launch, not of the run. They are not saved."""

_PATHS = ("exp_config_file", "out_dir", "init_from", "adapter", "add_tokens", "data_dir", "train_data_dir",
          "valid_data_dir", "tokenizer_dir", "eval_data_dir", "eval_task_dir")  # fmt: skip
_LONGEST_FILE = 1 << 20
"""Bytes."""

_ONLY_WITH = (
    *training.config.ONLY_WITH, *dataset.config.ONLY_WITH, *model.config.ONLY_WITH, *model.adapters.config.ONLY_WITH,
    *parallel.config.ONLY_WITH, *tasks.config.ONLY_WITH, *optimizer.config.ONLY_WITH, *evaluation.config.ONLY_WITH,
)  # fmt: skip


def flatten(config: Config) -> dict[str, Any]:
    """Values of all fields by name, over all groups."""
    return {name: getattr(getattr(config, group), name) for name, (group, _) in _FIELDS.items()}


def replace(config: Config, values: dict[str, Any]) -> Config:
    """The configuration with some fields replaced, by name."""
    changes = {
        group: dataclasses.replace(
            getattr(config, group), **{n: v for n, v in values.items() if _FIELDS[n][0] == group}
        )
        for group in _GROUPS
    }
    return Config(**changes)


def parse_config(argv: list[str]) -> tuple[Config, frozenset[str]]:
    """Read the command line, the YAML file it names, and on --resume the saved configuration.

    Returns:
        the configuration, and the names that the command line or the YAML file set.
    Raises:
        ValueError: an unknown name, a wrong type or an impossible combination, in one sentence.
        SystemExit: after --help.
    """
    config_file, argv = _take_config_file(argv)
    tokens = _normalize(argv)
    if "--help" in tokens:
        tyro.cli(Config, args=["--help"], config=(tyro.conf.OmitArgPrefixes,), use_underscores=True,
                 prog="train_my_ddp.py")  # fmt: skip
    command = {token[2:].partition("=")[0]: token.partition("=")[2] for token in tokens}
    if config_file and "exp_config_file" in command:
        raise ValueError(f"{config_file} and --exp_config_file both name a configuration file: give only one")
    if config_file:
        command["exp_config_file"] = config_file
    command |= {name: _expand(f"--{name}", command[name]) for name in _PATHS if name in command}
    config_file = command.pop("exp_config_file", "")
    if config_file and Path(config_file).resolve().parent == sizes.FOLDER:
        raise ValueError(f"{config_file} is a size, not a configuration: write --size={Path(config_file).stem}")
    from_file = _read_given(Path(config_file)) if config_file else {}
    merged = from_file | command
    saved: dict[str, Any] = {}
    if _coerce("resume", merged.get("resume", False)):
        saved_path = Path(merged.get("out_dir", RunConfig.out_dir)) / CONFIG_NAME
        # The paths in it were expanded when it was written.
        saved = _read_yaml(saved_path) if saved_path.exists() else {}
    if saved and "adapter" in merged:
        _require_adapter_of(saved, str(merged["adapter"]))
    if saved and "size" in merged:
        _require_size_of(saved, merged)
        for source in (from_file, command):
            source.pop("size", None)
    _settle_length(saved, from_file)
    _settle_length(saved | from_file, command, drop=(saved, from_file))
    defaults = replace(Config(), saved | from_file if saved else _values_of_size(merged) | from_file)
    for name, value in command.items():
        _coerce(name, value)
    config = tyro.cli(
        Config,
        default=defaults,
        args=[_to_tyro(name, value) for name, value in command.items()],
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
    if config_file:
        config = replace(config, {"exp_config_file": config_file})
    if config.run.resume and not saved and not (config.data.data_dir or config.data.train_data_dir):
        where, to_do = config.run.out_dir, "check it" if "out_dir" in merged else "give the run's"
        near = near_to(Path(where))
        to_do = f"did you mean {near[0]}?" if near and "out_dir" in merged else to_do
        raise ValueError(f"--out_dir is {where}, where there is no run to resume: {to_do}")
    _check(config)
    return config, frozenset(merged)


def without_effect(config: Config, given: frozenset[str]) -> list[str]:
    """Sentences about given options that change nothing, one for each reason. They are not refused: a configuration
    file may hold the details of a feature that its user switches on and off."""
    flat, usual, sentences = flatten(config), flatten(Config()), []
    told: set[str] = set()
    for rule in _ONLY_WITH:
        idle = [n for n in rule.names if n in given - told and flat[n] != usual[n]] if not rule.counts(flat) else []
        told |= set(idle)
        if idle:
            flags = ", ".join(f"--no-{name}" if flat[name] is False else f"--{name}" for name in idle)
            sentences.append(f"{flags} {'have' if len(idle) > 1 else 'has'} no effect {rule.otherwise}")
    if "size" in given and config.run.resume and not config.run.size:
        sentences.append("--size has no effect on this run, which was begun without one: its values are those saved")
    elif config.run.size and not config.run.resume and given >= set(_values_of_size({n: flat[n] for n in given})):
        sentences.append("--size has no effect beside what else was given")
    return sentences


def is_open(run: RunConfig, given: frozenset[str], *names: str) -> bool:
    """Whether none of these fields was set by the command line, a YAML file or the saved configuration of a resumed
    run. Such fields may be chosen; the values of a size, if there is one, are only a proposal.

    Args:
        given: as `parse_config` returns it.
    """
    is_saved = run.resume and (Path(run.out_dir) / CONFIG_NAME).exists()
    return not is_saved and given.isdisjoint(names)


def _values_of_size(told: dict[str, Any]) -> dict[str, Any]:
    """Values of --size for a new run, by name; `told`: what else is given for the run.

    Raises:
        ValueError: there is no such size.
    """
    has_length = "epoch" in told
    told = {name: _coerce(name, told[name]) for name in ("size", "task_type", "optimizer", "init_from") if name in told}
    if not told.get("size"):
        return {}
    task_type = told.get("task_type", RunConfig.task_type)
    values = sizes.values_of(told["size"], task_type, has_weights=bool(told.get("init_from")))
    values = {name: _coerce(name, value) for name, value in values.items()}
    meant_for = values.get("optimizer", OptimizerConfig.optimizer)
    if told.get("optimizer", meant_for) != meant_for:
        # The rates of one optimizer would ruin a run with another.
        optimizers = ("optimizer", "adamw", "muon", "lion")
        values = {name: value for name, value in values.items() if _FIELDS[name][0] not in optimizers}
    if has_length:
        values.pop("max_iters", None)
    return values


def _require_adapter_of(saved: dict[str, Any], asked: str) -> None:
    """Refuse an adapter other than the one that a resumed run began with, since it goes on with its own checkpoint's.

    Args:
        saved: the configuration of the run that is resumed.
    Raises:
        ValueError: the run began with another adapter, and has no reference that may have to be computed from it again.
    """
    if asked != saved.get("adapter", "") and saved.get("task_type") != "dpo":
        raise ValueError(f"--adapter={asked}: a resumed run goes on with its own: leave it out, or begin a new run")


def _require_size_of(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a size other than the one that a resumed run began with.

    Args:
        saved: the configuration of the run that is resumed.
        now: names and values that were given.
    Raises:
        ValueError: the run has another size.
    """
    asked, begun = _coerce("size", now["size"]), saved.get("size", "")
    if begun and asked != begun:
        raise ValueError(
            f"the run in {now.get('out_dir', RunConfig.out_dir)} was begun with --size={begun}, and goes on with the "
            f"values saved then: leave --size out, or begin a new run in another --out_dir"
        )


def _settle_length(older: dict, newer: dict, drop: tuple[dict, ...] | None = None) -> None:
    """Drop an older max_iters if --epoch is given now, which would otherwise have no effect."""
    if newer.get("max_iters") not in (None, 0, "0") and "epoch" in newer:
        raise ValueError("max_iters and epoch both say how long to train: give only one")
    if "epoch" in newer and "max_iters" in older:
        for source in drop or (older,):
            source.pop("max_iters", None)


def _take_config_file(argv: list[str]) -> tuple[str, list[str]]:
    if argv and not argv[0]:
        raise ValueError("the first argument is empty: name a configuration file, or leave it out")
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    return "", argv


def _expand(name: str, path: str) -> str:
    """The path, with `~` and variables expanded.

    Args:
        name: flag or key that the path was given for.
    Raises:
        ValueError: it is empty, as after an unset variable of the shell, or holds an unknown variable or user.
    """
    if not path:
        raise ValueError(f"{name} is empty: give a path, or leave it out")
    try:
        return expand(path)
    except ValueError as error:
        raise ValueError(f"{name}={error}") from None


def _normalize(argv: list[str]) -> list[str]:
    """`--x v`, `--x=v`, `--flag`, `--no-flag` -> `--x=v`, one token a flag; names checked."""
    tokens, index = [], 0
    while index < len(argv):
        token = argv[index]
        index += 1
        if token in ("-h", "--help"):
            return ["--help"]
        if not token.startswith("--"):
            raise ValueError(f"{token!r} is not a flag: flags start with --, values follow as --name=value")
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and name.startswith("no_") and _is_bool(name[3:]):
            name, value = name[3:], "False"
        elif not equals and _is_bool(name):
            value = "True"
            if index < len(argv) and argv[index].lower() in ("true", "false"):
                value, index = argv[index], index + 1
        elif not equals:
            check_name(name, "--", _FIELDS)
            if index == len(argv) or argv[index].startswith("--"):
                # A flag is not a value: without this, it would be lost after an empty variable of the shell.
                raise ValueError(f"--{name} needs a value: write --{name}=VALUE")
            value, index = argv[index], index + 1
        check_name(name, "--", _FIELDS)
        tokens.append(f"--{name}={value}")
    return tokens


def _is_bool(name: str) -> bool:
    return name in _FIELDS and _FIELDS[name][1] is bool


def _read_given(path: Path) -> dict[str, Any]:
    """Keys of a YAML file that a person wrote, see `_read_yaml`, with its paths expanded."""
    values = _read_yaml(path)
    try:
        if "exp_config_file" in values:
            raise ValueError("exp_config_file has no use in a configuration file, which names no other one")
        return values | {name: _expand(name, values[name]) for name in _PATHS if values.get(name)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    """Flat keys of a YAML file, each value with its field's type, without `derived`, which is there for the reader."""
    try:
        # Not utils.small_files.read_small, which refuses pipes: here the shell's <(...) is a file like any other.
        with path.open("rb") as file:
            text = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN):
            # A disk or a network file system that may answer later: the command is not wrong.
            raise
        if isinstance(error, IsADirectoryError):
            raise ValueError(f"{path} is a directory, not a configuration file: data goes behind --data_dir") from None
        is_gone = isinstance(error, FileNotFoundError)
        problem = absent(path) if is_gone else f"{path} cannot be read: {error.strerror}"
        raise ValueError(f"the configuration file {problem}") from None
    try:
        if len(text) > _LONGEST_FILE:
            raise ValueError("it is larger than 1 MiB")
        values = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"the configuration file {path} cannot be read: {error}") from None
    if not isinstance(values, dict) or not values:
        found = shown(values) if values else "nothing"
        raise ValueError(f"{path} must hold flat `name: value` lines, and holds {found}")
    try:
        typed = {}
        for name, value in values.items():
            if name != "derived":
                check_name(name if isinstance(name, str) else shown(name), "", _FIELDS)
                typed[name] = _coerce(name, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return typed


def _coerce(name: str, value: Any) -> Any:
    """A value from YAML or the command line, as the field's type.

    Raises:
        ValueError: the value has another type.
    """
    hint = _FIELDS[name][1]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and (value is None or value == "None"):
        return None
    if value is None:
        # YAML also reads `~` as no value.
        raise ValueError(f"{name} has no value: write one (text in quotes), or leave the line out")
    kind = next(k for k in kinds if k is not type(None))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            named = ", ".join(choice or '""' for choice in choices)
            raise ValueError(f"{name} must be one of {named}, got {shown(value)}")
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is str:
        if type(value) in (str, int):
            return str(value)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            raise ValueError(f"{name} must be one text, got a list: join its parts as in {','.join(value)}")
        if not isinstance(value, (list, dict)):
            # `no`, 1.10 or a date would become a text that nobody wrote.
            raise ValueError(f"{name} is a text: put it in quotes, as YAML reads it as {shown(value)}")
    elif kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = kind(value)
            # Neither a file nor a tensor holds a larger number.
            fits = math.isfinite(number) and (kind is float or -(1 << 63) <= number < 1 << 63)
            if fits and (isinstance(value, str) or number == value):
                return number
        except (ValueError, OverflowError):
            pass
    wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
    raise ValueError(f"{name} must be {wanted}, got {shown(value)}")


def _to_tyro(name: str, value: str) -> str:
    if _is_bool(name):
        return f"--{name}" if _coerce(name, value) else f"--no_{name}"
    return f"--{name}={value}"


def _check(config: Config) -> None:
    """Refuse values and combinations that cannot work, as far as they tell without the data."""
    groups = {group: getattr(config, group) for group in _GROUPS}
    for group, part in groups.items():
        # A task's own options count for that task alone.
        if group not in {task.options for task in TASK_TYPES.values()}:
            part.check()
    check_together(config)


def changes_since(config: Config, saved_path: Path) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from a saved configuration: name -> (saved value, present value)."""
    saved = _read_yaml(saved_path) if saved_path.exists() else {}
    now = flatten(config)
    return {n: (old, now[n]) for n, old in saved.items() if n not in (*_PER_LAUNCH, "out_dir") and now[n] != old}


def to_yaml(config: Config, derived: dict[str, Any]) -> str:
    """The configuration as YAML, with keys whose value is None.

    Values stay as they were given, so that a resumed run can derive others from them (dtype on another machine, steps
    from epochs). `derived` is added for the reader: the values that came out this time.
    """
    values = {name: value for name, value in flatten(config).items() if name not in _PER_LAUNCH}
    # Only the one that counts, as both together would be refused.
    values.pop("epoch" if config.run.max_iters else "max_iters")
    given, came_to = (yaml.safe_dump(v, sort_keys=False, allow_unicode=True) for v in (values, {"derived": derived}))
    return f"{given}# What that came to, for the reader: changes here have no effect.\n{came_to}"

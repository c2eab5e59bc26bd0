"""Configuration: frozen dataclasses -> flat, typed command line and YAML.

Precedence: command line > YAML file given now > saved configuration (on --resume) > --size (of a new run) > defaults
below. Flags bear their fields' names; the groups only order the help. Values that follow from others are computed once,
in `resolve`; what is left to the data, training/data.py and training/batch.py fill in.
"""

import dataclasses
import difflib
import errno
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from configs import sizes
from dataset.config import DataConfig
from model.config import LlamaConfig, padded_vocab_size
from optimizer.config import AdamWConfig, MuonConfig, OptimizerConfig
from parallel.config import ParallelConfig, PowerSGDConfig
from runs import layout
from tasks.config import DPOConfig
from training.config import RunConfig, SystemConfig
from utils.paths import absent, expand, near_to
from utils.small_files import parse_yaml, shown

SHAPE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "qkv_bias")  # fmt: skip
"""Model fields that weights depend on: another value needs another model."""


@dataclass(frozen=True)
class Config:
    """Train a llama-style model."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    model: LlamaConfig = field(default_factory=LlamaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    powersgd: PowerSGDConfig = field(default_factory=PowerSGDConfig)
    system: SystemConfig = field(default_factory=SystemConfig)


@dataclass(frozen=True)
class Derived:
    """What follows from the configuration, the data and the number of ranks."""

    global_batch_size: int
    """Samples in a step."""
    max_iters: int
    """Steps of the run."""


_GROUPS = get_type_hints(Config)
_FIELDS = {name: (group, hint) for group, kind in _GROUPS.items() for name, hint in get_type_hints(kind).items()}

_PER_LAUNCH = ("exp_config_file", "resume", "resume_from", "valid_only", "restart_data", "resume_at_sample",
               "profile_steps")  # fmt: skip
"""Say what this launch does, not what the run is: not saved."""

_PATHS = ("exp_config_file", "out_dir", "init_from", "data_dir", "train_data_dir", "valid_data_dir", "tokenizer_dir")
_LONGEST_FILE = 1 << 20
"""Bytes."""

_OTHER_NAMES = {
    "batch_size": "train_batch_size", "lr": "learning_rate", "epochs": "epoch", "num_epochs": "epoch",
    "max_steps": "max_iters", "steps": "max_iters", "grad_accum": "gradient_accumulation_steps",
    "block_size": "max_seq_len", "context_length": "max_seq_len", "fp16": "dtype=float16", "bf16": "dtype=bfloat16",
    "gpus": "nproc", "num_gpus": "nproc", "devices": "nproc", "nproc_per_node": "nproc", "num_processes": "nproc",
    "model": "init_from", "model_name_or_path": "init_from", "config": "exp_config_file",
}  # fmt: skip
"""What other programs call them -> our flag, where spelling alone would suggest another."""

_ONLY_WITH = (
    (("resume_from", "restart_data"), lambda f: f["resume"], "without --resume"),
    (("data_dir",), lambda f: not (f["train_data_dir"] and f["valid_data_dir"]),
     "beside --train_data_dir and --valid_data_dir"),
    (("rope_scaling",), lambda f: f["rope_scaling_factor"] != 1.0 or f["init_from"] or f["resume"],
     "with --rope_scaling_factor=1"),
    (("rope_scaling_factor",), lambda f: f["rope_scaling"] != "none" or f["init_from"] or f["resume"],
     "without --rope_scaling"),
    (("rope_low_freq_factor", "rope_high_freq_factor", "original_max_position_embeddings"),
     lambda f: f["rope_scaling"] == "llama3" or f["init_from"] or f["resume"], "without --rope_scaling=llama3"),
    (("matrix_approximation_rank", "warm_start", "use_error_feedback", "start_powerSGD_iter", "min_compression_rate",
      "orthogonalization_epsilon", "orthogonalize_in_float32", "use_fixed_Q", "powerSGD_exclude",
      "powerSGD_log_interval"), lambda f: f["use_powerSGD_hook"], "without --use_powerSGD_hook"),
    (("bucket_size", "disable_bucketing", "overlap_grad_reduce"), lambda f: f["ddp_impl"] == "bucketed",
     "with --ddp_impl=naive"),
    (("bucket_size",), lambda f: not f["disable_bucketing"], "with --disable_bucketing"),
    (("dpo_loss_type", "dpo_beta", "dpo_label_smoothing", "reference_free", "max_prompt_len",
      "prompt_truncation_mode"), lambda f: f["task_type"] == "dpo", "without --task_type=dpo"),
    (("packing", "sft_loss"), lambda f: f["task_type"] == "sft", "without --task_type=sft"),
    (("user_name", "assistant_name"), lambda f: f["task_type"] != "pretrain", "with --task_type=pretrain"),
    (("document_mask",), lambda f: f["task_type"] != "dpo", "with --task_type=dpo"),
    (("lr_schedule", "min_lr_ratio", "wsd_decay_ratio"), lambda f: f["decay_lr"], "with --no-decay_lr"),
    (("wsd_decay_ratio",), lambda f: f["lr_schedule"] == "wsd", "without --lr_schedule=wsd"),
    (("min_lr_ratio",), lambda f: f["lr_schedule"] != "constant", "with --lr_schedule=constant"),
    (("muon_momentum", "muon_lr_ratio", "muon_iterations"), lambda f: f["optimizer"] == "muon",
     "without --optimizer=muon"),
    (("sample_tokens", "sample_prompt"), lambda f: f["sample_texts"], "with --sample_texts=0"),
    (("wandb_mode",), lambda f: f["wandb_project"], "without --wandb_project"),
)  # fmt: skip
"""Fields, when they change anything (of the flat configuration), and what is said otherwise."""

_RENAMED = {
    "hidden_dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "dropout1": "hidden_dropout",
    "dropout2": "hidden_dropout",
}
_REMOVED = {
    "grad_div_total_tokens": "leave it out: the loss is always divided by the global batch's supervised tokens",
    "grad_scaling_before_comm": "leave it out: the loss is always scaled before the backward pass",
    "reslog_dir": "leave it out: results are always in out_dir/reslog.jsonl",
    "reslog_run_name": "leave it out: a run's name is its out_dir",
    "reslog_save_interval": "leave it out: every record is written at once; --log_interval sets how often",
    "num_cpus": "write --num_threads",
    "sft_type": "leave it out: each record's format is told from its fields",
    "ignore_index": "leave it out: what is not supervised never counts",
    "use_peft": "leave it out: all weights are trained",
}


def flatten(config: Config) -> dict[str, Any]:
    """Field name -> value, over all groups."""
    return {name: getattr(getattr(config, group), name) for name, (group, _) in _FIELDS.items()}


def replace(config: Config, values: dict[str, Any]) -> Config:
    """`config` with some fields replaced, by flat names."""
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
        ValueError: an unknown name, a wrong type, an impossible combination; one sentence.
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
        raise ValueError(f"{config_file} is no configuration but a size: write --size={Path(config_file).stem}")
    from_file = _read_given(Path(config_file)) if config_file else {}
    merged = from_file | command
    saved: dict[str, Any] = {}
    if _coerce("resume", merged.get("resume", False)):
        saved_path = Path(merged.get("out_dir", RunConfig.out_dir)) / layout.CONFIG_NAME
        # Its paths were expanded when it was written.
        saved = _read_yaml(saved_path) if saved_path.exists() else {}
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
    """A sentence for each reason for which something that was given changes nothing. No reason to refuse it: a
    configuration file may hold the details of what its user switches on and off."""
    flat, usual, told, sentences = flatten(config), flatten(Config()), set(), []
    for names, counts, why in _ONLY_WITH:
        idle = [n for n in names if n in given - told and flat[n] != usual[n]] if not counts(flat) else []
        told |= set(idle)
        if idle:
            flags = ", ".join(f"--{name}" for name in idle)
            sentences.append(f"{flags} {'have' if len(idle) > 1 else 'has'} no effect {why}")
    if "size" in given and config.run.resume and not config.run.size:
        sentences.append("--size has no effect on this run, which was begun without one: its values are those saved")
    elif config.run.size and not config.run.resume and given >= set(_values_of_size({n: flat[n] for n in given})):
        sentences.append("--size has no effect beside what else was given")
    return sentences


def is_open(config: Config, given: frozenset[str], *names: str) -> bool:
    """Whether nobody has said anything of these fields: not the command line, a YAML file, or the saved configuration
    of a resumed run. So they may be chosen; a size, if there is one, makes a proposal.

    Args:
        given: as `parse_config` returns it.
    """
    is_saved = config.run.resume and (Path(config.run.out_dir) / layout.CONFIG_NAME).exists()
    return not is_saved and given.isdisjoint(names)


def _values_of_size(told: dict[str, Any]) -> dict[str, Any]:
    """What --size says, by flat names, for a new run of which `told` is given.

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
        # Rates of one optimizer would ruin a run with another.
        optimizers = ("optimizer", "adamw", "muon")
        values = {name: value for name, value in values.items() if _FIELDS[name][0] not in optimizers}
    if has_length:
        values.pop("max_iters", None)
    return values


def _require_size_of(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Args:
        saved: the configuration of the run that is resumed.
        now: names and values that were given.
    Raises:
        ValueError: the run is of another size.
    """
    asked, begun = _coerce("size", now["size"]), saved.get("size", "")
    if begun and asked != begun:
        raise ValueError(
            f"the run in {now.get('out_dir', RunConfig.out_dir)} was begun with --size={begun}, and goes on with the "
            f"values saved then: leave --size out, or begin a new run in another --out_dir"
        )


def _settle_length(older: dict, newer: dict, drop: tuple[dict, ...] | None = None) -> None:
    """A newly given --epoch beats an older max_iters: otherwise it would have no effect."""
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
    """
    Args:
        name: of what the path was given for.
    Raises:
        ValueError: it is none, such as where the shell knew no variable of that name.
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
            _check_name(name, "--")
            if index == len(argv) or argv[index].startswith("--"):
                # A flag is no value, as where a variable of the shell was empty: it would be lost.
                raise ValueError(f"--{name} needs a value: write --{name}=VALUE")
            value, index = argv[index], index + 1
        _check_name(name, "--")
        tokens.append(f"--{name}={value}")
    return tokens


def _is_bool(name: str) -> bool:
    return name in _FIELDS and _FIELDS[name][1] is bool


def _check_name(name: str, prefix: str) -> None:
    if name in _FIELDS:
        return
    if name in _RENAMED:
        raise ValueError(f"{prefix}{name} is now called {prefix}{_RENAMED[name]}")
    if name in _REMOVED:
        raise ValueError(f"{prefix}{name} has no use here: {_REMOVED[name]}")
    as_usual = {known.lower(): known for known in _FIELDS}
    close = difflib.get_close_matches(name.lower(), as_usual, n=1)
    close = [_OTHER_NAMES.get(name) or as_usual[close[0]]] if close or name in _OTHER_NAMES else []
    hint = f"did you mean {prefix}{close[0]}?" if close else "--help lists all flags"
    raise ValueError(f"{prefix}{name} is unknown: {hint}")


def _read_given(path: Path) -> dict[str, Any]:
    """`_read_yaml` of a file that somebody wrote: with paths as people write them."""
    values = _read_yaml(path)
    try:
        if "exp_config_file" in values:
            raise ValueError("exp_config_file has no use in a configuration file, which names no other one")
        return values | {name: _expand(name, values[name]) for name in _PATHS if values.get(name)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    """Flat keys of a YAML file, each of its field's type; without `derived`, which `to_yaml` adds for the reader."""
    try:
        # Not utils.small_files.read_small: a pipe, as the shell's <(...), is a file like others here.
        with path.open("rb") as file:
            text = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN):
            # A disk or a network file system that may answer later: nothing is wrong with the command.
            raise
        if isinstance(error, IsADirectoryError):
            raise ValueError(f"{path} is a directory and no configuration file: data goes behind --data_dir") from None
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
                _check_name(name if isinstance(name, str) else shown(name), "")
                typed[name] = _coerce(name, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return typed


def _coerce(name: str, value: Any) -> Any:
    """`value`, from YAML or the command line, as the field's type.

    Raises:
        ValueError: it is of another type.
    """
    hint = _FIELDS[name][1]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and (value is None or value == "None"):
        return None
    if value is None:
        # In YAML `~` is nothing, too.
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
        if not isinstance(value, (list, dict)):
            # `no`, 1.10 or a date would come out as a text that nobody wrote.
            raise ValueError(f"{name} is a text: put it in quotes, as YAML reads it as {shown(value)}")
    elif kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = kind(value)
            # Beyond, neither a file nor a tensor holds it.
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
    """Refuse what needs no data to be seen as impossible: each part's values, then what does not go together."""
    for group in _GROUPS:
        if group not in ("dpo", "model"):
            getattr(config, group).check()
    data = config.data
    if not data.data_dir and not (data.train_data_dir and data.valid_data_dir):
        kind = "the data" if config.run.task_type != "pretrain" else "the pretokenized data"
        if data.train_data_dir or data.valid_data_dir:
            given, missing = ("train", "valid") if data.train_data_dir else ("valid", "train")
            raise ValueError(f"--{missing}_data_dir is missing: --{given}_data_dir is for the {given} set alone")
        raise ValueError(f"--data_dir is missing: give the directory of {kind}")
    if config.data.resume_at_sample and not config.run.resume:
        raise ValueError("--resume_at_sample goes with --resume: a new run has nothing to leave out")
    if config.run.valid_only and not (config.run.resume or config.run.init_from):
        holds_run = (Path(config.run.out_dir) / layout.CONFIG_NAME).exists()
        to_do = "add --resume for those of the run in --out_dir" if holds_run else "give --init_from"
        raise ValueError(f"--valid_only needs weights: {to_do}")
    _check_task(config)
    _check_gradients(config)
    config.model.resolve()


def _check_task(config: Config) -> None:
    run = config.run
    if run.task_type == "sft" and not config.data.document_mask:
        raise ValueError("--no-document_mask is for pretraining: sequences of SFT never see each other")
    if run.task_type != "dpo":
        return
    config.dpo.check()
    if not (run.init_from or run.resume):
        raise ValueError("--task_type=dpo needs a model to begin with: give --init_from, best a run of --task_type=sft")


def _check_gradients(config: Config) -> None:
    """Refuse hooks and overlaps that do not go with the optimizer or the dtype, with the reason."""
    parallel, is_float16 = config.parallel, config.system.dtype == "float16"
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


def resolve(
    config: Config, world_size: int, num_train_samples: int, step: int = 0, samples_consumed: int = 0
) -> Derived:
    """What follows from the configuration together with the data and the ranks.

    Args:
        num_train_samples: samples in an epoch.
        step, samples_consumed: where a resumed run stands: --epoch counts samples, also if the global batch changed.
    Raises:
        ValueError: the global batch cannot be split over the ranks.
    """
    steps = config.data.gradient_accumulation_steps
    if steps % world_size:
        raise ValueError(
            f"gradient_accumulation_steps={steps} counts the micro-batches over all ranks and must be a multiple of "
            f"their number, {world_size}: use {-(-steps // world_size) * world_size}"
        )
    global_batch = config.data.train_batch_size * steps
    epoch_iters = max(1, step + round((config.run.epoch * num_train_samples - samples_consumed) / global_batch))
    return Derived(global_batch, config.run.max_iters or epoch_iters)


def resolve_model(
    wanted: LlamaConfig, given: frozenset[str], stored: LlamaConfig | None, tokenizer_vocab_size: int, max_seq_len: int,
    is_own: bool = False,
) -> LlamaConfig:  # fmt: skip
    """The model's final shape: from the weights where there are some.

    Args:
        wanted: the configuration's.
        given: names that the command line or the YAML file set.
        stored: the shape of the weights to start from; the options that no Hugging Face config holds
            (hidden_dropout, residual_in_fp32) are taken from `wanted`, so are given ones that are no SHAPE_FIELDS.
        is_own: the weights are a checkpoint of this run, which began with no others: what `wanted` says besides the
            given fields is what they were made by, unless somebody has changed the run's configuration since.
    Raises:
        ValueError: a field contradicts the weights, or the vocabulary is too small for the tokenizer.
    """
    if stored is not None:
        told = _told_fields(wanted, given, is_own)
        for name in SHAPE_FIELDS:
            asked, has = getattr(wanted, name), getattr(stored, name)
            if name in told and asked != has:
                raise ValueError(
                    f"--{name}={asked} does not fit the weights to start from, which have {has}: leave it out"
                    if name in given else
                    f"{name} is {asked} in the run's {layout.CONFIG_NAME}, and {has} in its weights: restore that "
                    f"line, or begin a new run"
                )  # fmt: skip
        own = {"hidden_dropout", "residual_in_fp32"} | (told - set(SHAPE_FIELDS))
        kept = {name: value for name, value in stored.__dict__.items() if name not in own}
        wanted = dataclasses.replace(wanted, **kept)
        if wanted.rope_scaling == "none" and "max_position_embeddings" not in given:
            # Trained on longer samples, the model is meant for them.
            longest = max(wanted.max_position_embeddings, max_seq_len)
            wanted = dataclasses.replace(wanted, max_position_embeddings=longest)
    resolved = wanted.resolve(padded_vocab_size(tokenizer_vocab_size), max_seq_len)
    if resolved.vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"the model's vocab_size {resolved.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}: "
            f"leave --vocab_size out, and start only from weights that know this tokenizer"
        )
    return resolved


def _told_fields(wanted: LlamaConfig, given: frozenset[str], is_own: bool) -> set[str]:
    """Names of the fields that were given, now or in the run's saved configuration, and do not ask for what the weights
    or the tokenizer say."""
    told = set()
    for item in dataclasses.fields(LlamaConfig):
        asked = getattr(wanted, item.name)
        # In a run that began with others' weights, fields that nobody gave stand at their defaults.
        if item.name in given or is_own or asked != item.default:
            is_left_open = asked == 0 and item.default == 0 and not isinstance(asked, bool)
            told |= {item.name} - ({item.name} if is_left_open else set())
    return told


def changes_since(config: Config, saved_path: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> (saved value, present value) of the settings that differ from a saved configuration."""
    saved = _read_yaml(saved_path) if saved_path.exists() else {}
    now = flatten(config)
    return {n: (old, now[n]) for n, old in saved.items() if n not in (*_PER_LAUNCH, "out_dir") and now[n] != old}


def to_yaml(config: Config, derived: dict[str, Any]) -> str:
    """The configuration as YAML, None-valued keys included.

    What was given stays as it was given, so that a resumed run derives it anew where it must (dtype on another machine,
    steps from epochs); `derived` adds, for the reader, what it came to.
    """
    values = {name: value for name, value in flatten(config).items() if name not in _PER_LAUNCH}
    # Only the one that counts: together they would be refused.
    values.pop("epoch" if config.run.max_iters else "max_iters")
    given, came_to = (yaml.safe_dump(v, sort_keys=False, allow_unicode=True) for v in (values, {"derived": derived}))
    return f"{given}# What that came to, for the reader: changes here have no effect.\n{came_to}"

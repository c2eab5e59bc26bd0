"""What was trained on what: the model, its data, and how."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.folder import list_checkpoints
from dataset.format import read_bin_header, read_document_table
from dataset.mixture import MixtureDataset, given_before
from dataset.mixture_spec import directories_of
from dataset.opening import TaskDataset, open_dataset
from dataset.pretrain import PretrainDataset
from dataset.sequences import read_manifest
from evaluation.report.card import Block, Facts, Heading, Section, Text
from evaluation.report.run import Run
from evaluation.report.words import NOT_RECORDED, counted, listed, share, short
from model.adapters.config import AdapterConfig
from model.config import ModelConfig
from model.shapes import count, parameters_of, trained_of
from utils.small_files import parse_json, read_small

_MOST_SOURCES = 12
_TASKS = {"pretrain": "pretraining", "sft": "SFT on conversations", "dpo": "DPO on preferences"}
_PARALLEL_FLAGS = (
    ("data_parallel", "data parallel"), ("tensor_model_parallel_size", "tensor parallel"),
    ("pipeline_model_parallel_size", "pipeline stages"), ("context_parallel_size", "context parallel"),
    ("expert_model_parallel_size", "expert parallel"),
)  # fmt: skip


def trained_on(runs: Sequence[Run], where_it_began: str) -> Section:
    """The section.

    Args:
        runs: the run, then those whose weights it began with, the latest first.
        where_it_began: sentence on the weights of the last of them.
    """
    blocks: list[Block] = []
    if len(runs) > 1:
        order = " -> ".join(f"{run.name} ({_task(run)})" for run in reversed(runs))
        blocks.append(Text(f"In the order of training: {order}."))
    if where_it_began:
        blocks.append(Text(f"{where_it_began}."))
    for run in runs:
        blocks += [Heading(f"{run.name}: {_task(run)}"), Facts(list(_facts(run)))]
    return Section("What was trained on what", blocks)


def _task(run: Run) -> str:
    return _TASKS.get(run.task, run.task or "unknown task")


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    config, derived, start = run.config, run.derived, run.start
    yield "run", short(run.path)
    yield from _model(run)
    yield from _adapter(run)
    yield from data_facts(run)
    yield "sequence length", _value(start.get("max_seq_len", config.get("max_seq_len")), "tokens")
    batch = start.get("global_batch_size", derived.get("global_batch_size"))
    parts = f"{_value(config.get('gradient_accumulation_steps'))} micro-batches of {config.get('train_batch_size')}"
    yield "global batch", f"{_value(batch, 'samples')}: {parts}" if config else _value(batch, "samples")
    yield "epochs", _epochs(run)
    yield from _optimizer(config)
    yield "dtype", _value(derived.get("dtype", start.get("dtype")))
    yield "processes", _processes(run)
    yield "seed", _value(config.get("seed", start.get("seed")))


def _value(value: object, unit: str = "") -> str:
    if value is None or value == "":
        return NOT_RECORDED
    text = f"{value:,}" if type(value) is int and unit else str(value)
    return f"{text} {unit}" if unit else text


def model_config(run: Run) -> ModelConfig | None:
    """The model's shape, by the configuration; None if it does not tell."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    values: dict[str, Any] = {name: value for name, value in run.derived.items() if name in names}
    try:
        # What an earlier version did not know yet has its default.
        return ModelConfig(**values).resolve() if "hidden_size" in values else None
    except (ValueError, TypeError, ArithmeticError):
        return None


def adapter_config(run: Run) -> AdapterConfig:
    names = {field.name for field in dataclasses.fields(AdapterConfig)}
    return AdapterConfig(**{name: value for name, value in run.config.items() if name in names})


def _model(run: Run) -> Iterator[tuple[str, str]]:
    config = model_config(run)
    if config is None:
        yield "model", NOT_RECORDED
        return
    try:
        total = count(parameters_of(config))
    except (ValueError, TypeError, LookupError, AttributeError):
        yield "model", "its configuration makes no model that this version knows"
        return
    experts = (
        f", {config.num_local_experts} experts of which a token sees {config.num_experts_per_tok}"
        if config.num_local_experts else ""
    )  # fmt: skip
    shape = f"{counted(config.num_hidden_layers, 'layer')}, {config.hidden_size} wide"
    heads = counted(config.num_attention_heads, "head")
    yield (
        "model",
        f"{config.model_type or _saved_family(run)}: {total:,} parameters, {shape}, {heads}, vocabulary of "
        f"{config.vocab_size:,}{experts}",
    )


def _saved_family(run: Run) -> str:
    """The family as which the newest checkpoint was saved, for a run that names none."""
    try:
        newest = list_checkpoints(run.paths.ckpt_dir)[-1].path
        found = parse_json(read_small(newest / "config.json", 1 << 20))
        return str(found["model_type"]) if isinstance(found, dict) else "of no family that is known"
    except (OSError, ValueError, LookupError):
        return "of no family that is known"


def _adapter(run: Run) -> Iterator[tuple[str, str]]:
    adapter, config = adapter_config(run), model_config(run)
    if not adapter.is_used:
        return
    base = run.config.get("init_from") or NOT_RECORDED
    text = f"rank {adapter.lora_r}, alpha {adapter.lora_alpha}, on {adapter.lora_target_modules}"
    try:
        trained = f"; {count(trained_of(config, adapter)):,} parameters train" if config is not None else ""
    except (ValueError, TypeError):
        trained = ""
    how = "DoRA" if adapter.use_dora else "LoRA"
    yield "adapter", f"{how}, {text}{trained}; its base: {short(str(base))}"


def _optimizer(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names = ["learning_rate", "lr_schedule", "warmup_ratio", "min_lr_ratio", "weight_decay", "grad_clip"]
    names += ["muon_lr_ratio"] if config.get("optimizer") == "muon" else []
    told = [f"{name} {config[name]}" for name in names if config.get(name) is not None]
    yield "optimizer", ", ".join([str(config.get("optimizer", NOT_RECORDED)), *told])


def _processes(run: Run) -> str:
    sizes = list(dict.fromkeys(str(launch.start.get("world_size", "?")) for launch in run.launches))
    text = listed(sizes) or _value(run.derived.get("world_size"))
    usual = (None, 1, "", "auto")
    used = [f"{word} {run.config[name]}" for name, word in _PARALLEL_FLAGS if run.config.get(name) not in usual]
    if run.config.get("pipeline_model_parallel_size", 1) not in usual:
        used.append(f"schedule {run.config.get('pipeline_schedule')}")
    flags = ("use_distributed_optimizer", "use_powerSGD_hook", "overlap_optim_step")
    used += [name for name in flags if run.config.get(name)]
    return ", ".join([text, *used])


def samples_seen(run: Run) -> int | None:
    """Samples of the stream that the run has taken; None: it does not say."""
    step, start = run.last("train", "step"), run.start
    consumed, batch = start.get("samples_consumed"), start.get("global_batch_size")
    if step is None or type(batch) is not int or type(consumed) is not int:
        return None
    return consumed + (int(step) - start["step"]) * batch


def _epochs(run: Run) -> str:
    seen = samples_seen(run)
    if seen is None:
        return NOT_RECORDED
    dataset = opened(run)
    if isinstance(dataset, str):
        return f"{seen:,} samples; of how many is not known"
    return f"{seen / len(dataset):.3f} ({seen:,} of {len(dataset):,} samples)"


def data_dir(run: Run, split: str = "train") -> Path | None:
    """Where a set lies; None if the run does not say."""
    given = run.derived.get(f"{split}_data")
    return run.found(given) if isinstance(given, str) and given else None


def opened(run: Run) -> TaskDataset | str:
    """The training set; or the sentence on why it cannot be opened."""
    directory = data_dir(run)
    if directory is None:
        return "the run does not say where its data lies"
    length, packing = run.config.get("max_seq_len"), run.config.get("packing", True)
    kind = run.task if run.task in ("sft", "dpo") else "pretrain"
    try:
        return open_dataset(kind, directory, "train", int(length), packing=bool(packing))  # type: ignore[arg-type]
    except (ValueError, OSError, TypeError) as error:
        return str(error)


def data_facts(run: Run) -> Iterator[tuple[str, str]]:
    """What the run learnt from."""
    directory = data_dir(run)
    if directory is None:
        yield "data", NOT_RECORDED
        return
    yield "data", short(directory)
    dataset = opened(run)
    if isinstance(dataset, str):
        yield "its content", f"not known: {dataset}"
    else:
        yield "its content", _content(dataset)
        yield "samples", dataset.description()
        yield "came from", _sources(directory, dataset)
        yield "tokenizer", f"{_tokenizer(run, directory)}, fingerprint {_fingerprints(dataset)[:12]}"
        same = "" if dataset.fingerprint == run.start.get("data") else "; ANOTHER than the run recorded"
        yield "fingerprint of the data", f"{dataset.fingerprint[:16]}{same}"
    yield "mixture", _mixture(run, directory)
    yield "decontamination", recorded(directory, "decontamination") or NOT_RECORDED
    held_out = data_dir(run, "valid")
    if held_out is not None and held_out != directory:
        yield "validation data", short(held_out)


def _content(dataset: TaskDataset) -> str:
    if isinstance(dataset, PretrainDataset | MixtureDataset):
        parts = dataset.parts if isinstance(dataset, MixtureDataset) else [dataset]
        headers = [header for part in parts for header in part.headers]
        documents = sum(header.num_documents for header in headers)
        tokens = sum(header.num_tokens for header in headers)
        text_bytes = sum(header.text_bytes for header in headers)
        return f"{counted(documents, 'document')}, {tokens:,} tokens, {text_bytes:,} bytes of text"
    sequences = dataset.sequences
    return (
        f"{counted(len(sequences), 'sequence')}, {int(sequences.lengths.sum()):,} tokens, of which "
        f"{sequences.supervised_tokens:,} are learnt"
    )


def _fingerprints(dataset: TaskDataset) -> str:
    if isinstance(dataset, PretrainDataset | MixtureDataset):
        return dataset.header.tokenizer_fingerprint
    return dataset.sequences.header.tokenizer_fingerprint


def _tokenizer(run: Run, directory: Path) -> str:
    return short(str(run.config.get("tokenizer_dir") or directories_of(directory)[0] / "tokenizer"))


def _sources(directory: Path, dataset: TaskDataset) -> str:
    """The files, by the folder that they lay in, with the number of their documents."""
    found: Counter[str] = Counter()
    try:
        if isinstance(dataset, PretrainDataset | MixtureDataset):
            shards = [folder / name for folder in directories_of(directory)
                      for name in read_manifest(folder)["shards"]["train"]]  # fmt: skip
            for shard in shards:
                if read_bin_header(shard).num_documents:
                    table = read_document_table(shard)
                    for index, (path, _) in enumerate(table.sources):
                        found[_folder(path)] += int((table.files == index).sum())
        else:
            for shard in dataset.sequences.shards:
                for index, (path, _) in enumerate(shard.header.sources):
                    found[_folder(path)] += int((shard.files == index).sum())
    except (ValueError, OSError, LookupError, TypeError):
        return NOT_RECORDED
    shown = [f"{name} ({documents:,})" for name, documents in found.most_common(_MOST_SOURCES)]
    more = len(found) - len(shown)
    return ", ".join([*shown, *([f"and {more:,} more"] if more > 0 else [])]) or NOT_RECORDED


def _folder(path: str) -> str:
    """The first folder of a path below the corpus; files that lie in none are put together by their endings."""
    parts = Path(path).parts
    return f"{parts[0]}/" if len(parts) > 1 else f"*{Path(path).suffix}" if Path(path).suffix else path


def _mixture(run: Run, directory: Path) -> str:
    """What each source of a mixture has given; or how the data was mixed when it was made, if its maker recorded it."""
    try:
        given, seen = given_before(run.start, samples_seen(run) or 0), samples_seen(run)
        sources = run.start["mixture"]["sources"]
        told = [(str(source["name"]), given[source["fingerprint"]], source["samples"]) for source in sources]
        return ", ".join(
            f"{name} {count:,} samples ({share(count, seen or 0)} of the stream, {count / max(size, 1):.3g} epochs)"
            for name, count, size in told
        )
    except (ValueError, LookupError, TypeError):
        return recorded(directory, "mixture") or "one directory"


def recorded(directory: Path, key: str) -> str:
    """What the makers of the data recorded in their manifests under a key, as a text or as values by name; empty if
    nothing."""
    found = {}
    try:
        for folder in directories_of(directory):
            found[folder.name] = _told(read_manifest(folder).get(key))
    except (ValueError, OSError):
        return ""
    named = {name: value for name, value in found.items() if value != NOT_RECORDED}
    return "; ".join(named.values() if len(found) == 1 else (f"{name}: {value}" for name, value in named.items()))


def _told(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_told(inner)}" for name, inner in value.items()) or NOT_RECORDED
    if isinstance(value, list):
        return ", ".join(map(_told, value)) or NOT_RECORDED
    return NOT_RECORDED if value in (None, "") else str(value)

"""The training set, the validation set and their tokenizer."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint.choosing import newest_with
from checkpoint.stores import StorePlace
from configurator import is_open
from data_preprocess.raw_records import check_options, tokenize_online
from data_preprocess.record_compiler import CompilerOptions
from dataset.config import DataConfig
from dataset.dpo import DPODataset
from dataset.format import MANIFEST_NAME
from dataset.mixture import MixtureDataset
from dataset.mixture_spec import directories_of, is_mixture
from dataset.opening import TaskDataset, open_dataset
from dataset.sequences import read_manifest
from dataset.sft import SFTDataset
from model import hf
from model.adapters.config import AdapterConfig
from model.adapters.folder import Weights
from parallel import DistContext
from runs.layout import RunPaths
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.add_tokens import grow, read_tokens
from tokenizer.chat_template import template_of
from tokenizer.loading import has_tokenizer
from training.adapter import first_weights
from training.config import RunConfig

logger = logging.getLogger(__name__)

_MOST_PADDING = 20
"""At most one embedding row in so many, or 64 in all, has no entry in the model's tokenizer."""


@dataclass(frozen=True)
class Data:
    dirs: dict[str, Path]
    """Set -> its pretokenized directory."""
    tokenizer: Tokenizer
    train: TaskDataset
    valid: TaskDataset | None


def fit_context(run: RunConfig, data: DataConfig, given: frozenset[str]) -> DataConfig:
    """The data's options with `max_seq_len` chosen, if nobody has given it: the length that the data was prepared for.
    Raw records can be prepared for any length; for them, at most the length that the weights were trained with.

    Args:
        given: names of the flags that were given.
    Raises:
        ValueError: the data was prepared for several lengths, none of them the expected one.
    """
    if not is_open(run, given, "max_seq_len"):
        return data
    wished, directory = data.max_seq_len, Path(data.train_data_dir or data.data_dir)
    if not run.task.reads_records:
        found, why = _indexed_length(directories_of(directory), wished), f"as the index in {directory} is for that"
    elif (directory / MANIFEST_NAME).exists():
        made_with = read_manifest(directory).get("options", {}).get("max_seq_len", wished)
        found, why = made_with, f"as {directory} was pretokenized for that"
    elif weights_from := first_weights(run):
        weights = weights_from.base
        known = hf.read_config(weights).max_position_embeddings
        found, why = min(wished, known), f"as the weights in {weights} were trained with no more"
        if run.size and wished < known:
            logger.info("max_seq_len is %d, as --size=%s wishes; the weights know %d", wished, run.size, known)
    else:
        return data
    if found == wished:
        return data
    logger.info("max_seq_len is %d, %s", found, why)
    return replace(data, max_seq_len=found)


def _indexed_length(directories: Sequence[Path], wished: int) -> int:
    """Tokens of a sample that pretraining data has an index for; the wished number, if it is among several.

    Args:
        directories: all of them must have it.
    """
    found = []
    for directory in directories:
        names = [re.fullmatch(r"train-([1-9][0-9]*)\.ibin", path.name) for path in directory.glob("train-*.ibin")]
        found.append({int(match[1]) for match in names if match})
    lengths = sorted(set.intersection(*found))
    if not lengths or wished in lengths:
        return wished
    if len(lengths) > 1:
        raise ValueError(
            f"{' and '.join(map(str, directories))} have an index for samples of "
            f"{', '.join(map(str, lengths[:-1]))} and of {lengths[-1]} tokens: say which with --max_seq_len"
            if len(directories) > 1
            else f"{directories[0]} has an index for samples of {', '.join(map(str, lengths[:-1]))} and of "
            f"{lengths[-1]} tokens: say which with --max_seq_len"
        )
    return lengths[0]


def prepare_data(
    run: RunConfig, data: DataConfig, given: frozenset[str], adapter: AdapterConfig | None = None
) -> dict[str, Path]:
    """Directory of the tokens of each set. Raw records of SFT and DPO are tokenized here, before any process group
    exists, so that no rank waits in a collective meanwhile.

    Args:
        given: names of the flags that were given.
        adapter: says which weights the run begins with, too, and which tokens it adds.
    Raises:
        ValueError: there is nothing to tokenize, or flags contradict the tokens that are there.
    """
    dirs = {"train": Path(data.train_data_dir or data.data_dir), "valid": Path(data.valid_data_dir or data.data_dir)}
    if not run.task.reads_records:
        return dirs
    options = CompilerOptions(
        run.task.dataset, data.max_seq_len, data.sft_loss, data.max_prompt_len, data.prompt_truncation_mode,
        data.user_name, data.assistant_name,
    )  # fmt: skip
    chosen = {}
    for split, directory in dirs.items():
        if is_mixture(directory):
            raise ValueError(
                f"{directory} is a mixture, which pretraining takes alone: put the records into one directory"
            )
        if (directory / MANIFEST_NAME).exists():
            chosen[split] = directory
        elif split == "valid" and not data.valid_data_dir:
            chosen[split] = chosen["train"]
        else:
            # A directory for validation alone is taken whole.
            ratio = 1.0 if split == "valid" else data.valid_ratio or 0.0
            tokenizer_dir, added = _tokenizer_of(run, data.tokenizer_dir, adapter or AdapterConfig())
            chosen[split] = tokenize_online(directory, tokenizer_dir, options, ratio, added)
        check_options(chosen[split], options, given)
    return chosen


def _tokenizer_of(run: RunConfig, given: str, adapter: AdapterConfig) -> tuple[Path, Sequence[str]]:
    """Folder of the tokenizer for the model that is trained, and the tokens that it must grow by.

    Args:
        given: --tokenizer_dir, whose tokenizer has grown already.
        adapter: see prepare_data.
    """
    weights, added = None, ()
    if run.resume:
        # Any checkpoint will do; the one to resume from is found later.
        newest = newest_with(RunPaths(Path(run.out_dir)).ckpt_dir, "tokenizer.json")
        weights = Weights(newest) if newest is not None else None
    if weights is None:
        weights = first_weights(run, adapter.adapter)
        added = read_tokens(adapter.add_tokens) if adapter.add_tokens else ()
    if given:
        if weights is not None:
            require_tokenizer_of(weights, load_tokenizer(given), added)
        return Path(given), ()
    if weights is None:
        raise ValueError(
            "--init_from is missing: raw records are tokenized for the model that is fine-tuned (for a new one, "
            "--tokenizer_dir says how)"
        )
    return _holding_tokenizer(weights) or weights.base, added


def _holding_tokenizer(weights: Weights) -> Path | None:
    """The folder with the tokenizer of a model."""
    return next(filter(has_tokenizer, weights.folders), None)


def require_tokenizer_of(
    weights: Weights, tokenizer: Tokenizer, added: Sequence[str] = ()
) -> Tokenizer | None:
    """The tokenizer of a model, if a folder holds it, which must be the data's.

    Args:
        weights: of a model.
        tokenizer: the data's.
        added: tokens that the data's has besides.
    Raises:
        ValueError: the folder holds another tokenizer, or none and the model's vocabulary has another size.
    """
    if folder := _holding_tokenizer(weights):
        own = grow(load_tokenizer(folder), added) if added else load_tokenizer(folder)
        if added and own.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"the data was not tokenized with the tokenizer of {folder} and the tokens of --add_tokens: make that "
                f"with `python -m tokenizer.add_tokens`, and pretokenize the data again with it"
            )
        if own.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"the data was not tokenized with the tokenizer that the weights in {folder} know: pretokenize it "
                f"again with --tokenizer_dir {folder} (raw records of SFT and DPO: leave --tokenizer_dir out)"
            )
        return own
    base = weights.base
    rows = hf.read_config(base).vocab_size
    if not 0 <= rows - (tokenizer.vocab_size - len(added)) <= max(64, rows // _MOST_PADDING):
        raise ValueError(
            f"{base} holds weights but no tokenizer, and its vocab_size is {rows} where the data's tokenizer has "
            f"{tokenizer.vocab_size} entries: tokenize the data with the model's own, and copy that into {base}"
        )
    logger.warning(
        "%s holds weights but no tokenizer, so nobody can tell whether they know the data's: copy the files of the "
        "model's tokenizer into it to have that checked",
        base,
    )
    return None


def warn_of_another_template(weights: Weights, own: Tokenizer | None, tokenizer: Tokenizer) -> None:
    """Warn if the data was laid out by another chat template than the model's.

    Args:
        weights: of the model that is fine-tuned.
        own: the tokenizer that it holds.
        tokenizer: the data's.
    """
    if own and own.chat_template is not None and template_of(own).key != template_of(tokenizer).key:
        logger.warning(
            "the conversations were laid out by another chat template than that of %s: checkpoints carry the one that "
            "laid them out",
            weights.told,
        )


def open_data(
    run: RunConfig, data: DataConfig, dirs: dict[str, Path], context: DistContext, place: StorePlace
) -> Data:
    """Open both sets and the tokenizer, and check that they belong together, on all ranks.

    Args:
        dirs: see prepare_data.
    Raises:
        ValueError: they do not belong together, are damaged, or differ from rank to rank.
    """
    task = run.task
    how = (data.max_seq_len, data.document_mask, data.packing)
    train, valid = open_dataset(task.dataset, dirs["train"], "train", *how), None
    tokenizer = load_tokenizer(data.tokenizer_dir or directories_of(dirs["train"])[0] / "tokenizer")
    train.check(tokenizer.fingerprint, data.valid_ratio)
    if train.valid_ratio > 0 or data.valid_data_dir:
        valid = open_dataset(task.dataset, dirs["valid"], "valid", *how)
        valid.check(tokenizer.fingerprint)
    elif run.valid_only:
        raise ValueError(f"{dirs['train']} has no validation set: it was pretokenized with --valid_ratio 0")
    datasets = [dataset for dataset in (train, valid) if dataset is not None]
    if task.reads_records:
        _require_one_template([dirs[split] for split, one in (("train", train), ("valid", valid)) if one], tokenizer)
    for dataset in datasets:
        if isinstance(dataset, SFTDataset | DPODataset):
            # Small enough to be read once before training. For pretraining data there is `dataset.inspect --verify`.
            _once_a_store(dataset.sequences.check_content, context, place)
        elif data.verify_data:
            _once_a_store(dataset.check_content, context, place)
    context.require_same(
        [*(dataset.fingerprint for dataset in datasets), tokenizer.fingerprint],
        "the ranks see different data or tokenizers: copy the same to all nodes",
    )
    return Data(dirs, tokenizer, train, valid)


def _require_one_template(directories: list[Path], tokenizer: Tokenizer) -> None:
    """Refuse data whose conversations another chat template laid out: checkpoints carry the tokenizer's.

    Raises:
        ValueError: a directory's tokenizer has another chat template.
    """
    for directory in directories:
        if template_of(load_tokenizer(directory / "tokenizer")).key != template_of(tokenizer).key:
            raise ValueError(
                f"the conversations in {directory} were laid out by another chat template than the tokenizer's that "
                f"the run takes: pretokenize them again with that tokenizer"
            )


def _once_a_store(check: Callable[[], object], context: DistContext, place: StorePlace) -> None:
    context.gather_from(lambda: check() if place.is_first_of_store else None)


def order_of_samples(seed: int, data: Data) -> dict:
    """Values that decide the order of the samples in each source."""
    return {"seed": seed, "data": data.train.fingerprint, "max_seq_len": data.train.max_seq_len}


def stream_of(seed: int, data: Data) -> dict:
    """Values that decide the stream of samples, for records and checkpoints."""
    more = {"mixture": data.train.state()} if isinstance(data.train, MixtureDataset) else {}
    return order_of_samples(seed, data) | more

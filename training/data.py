"""Both sets and the tokenizer."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import folder as ckpt
from checkpoint.stores import Place
from configurator import Config, is_open
from data_preprocess.pretokenize_sft_data import Options, check_options, tokenize_online
from dataset.format import MANIFEST_NAME
from dataset.opening import TaskDataset, open_dataset
from dataset.sequences import read_manifest
from model import hf
from parallel import DistContext
from runs.layout import RunPaths
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.chat_template import template_of
from tokenizer.loading import has_tokenizer

logger = logging.getLogger(__name__)

_MOST_PADDING = 20
"""A model has at most one row in so many, or 64, that its tokenizer has no entry for."""


@dataclass(frozen=True)
class Data:
    dirs: dict[str, Path]
    """Set -> its pretokenized directory."""
    tokenizer: Tokenizer
    train: TaskDataset
    valid: TaskDataset | None


def fit_context(config: Config, given: frozenset[str]) -> Config:
    """Where nobody has said `max_seq_len`: as long as the data was prepared for; of raw records, which can be prepared
    for any, no longer than the weights were trained with.

    Args:
        given: names of the flags that were given.
    Raises:
        ValueError: the data was prepared for several lengths, and none of them is the one to expect.
    """
    if not is_open(config, given, "max_seq_len"):
        return config
    wished, directory = config.data.max_seq_len, Path(config.data.train_data_dir or config.data.data_dir)
    if config.run.task_type == "pretrain":
        found, why = _indexed_length(directory, wished), f"as the index in {directory} is for that"
    elif (directory / MANIFEST_NAME).exists():
        made_with = read_manifest(directory).get("options", {}).get("max_seq_len", wished)
        found, why = made_with, f"as {directory} was pretokenized for that"
    elif config.run.init_from:
        weights = ckpt.resolve_checkpoint_dir(Path(config.run.init_from))
        known = hf.read_config(weights).max_position_embeddings
        found, why = min(wished, known), f"as the weights in {weights} were trained with no more"
        if config.run.size and wished < known:
            logger.info("max_seq_len is %d, as --size=%s wishes; the weights know %d", wished, config.run.size, known)
    else:
        return config
    if found == wished:
        return config
    logger.info("max_seq_len is %d, %s", found, why)
    return replace(config, data=replace(config.data, max_seq_len=found))


def _indexed_length(directory: Path, wished: int) -> int:
    """Tokens of a sample that pretraining data has an index for, rather those that are wished for."""
    names = [re.fullmatch(r"train-([1-9][0-9]*)\.ibin", path.name) for path in directory.glob("train-*.ibin")]
    lengths = sorted(int(match[1]) for match in names if match)
    if not lengths or wished in lengths:
        return wished
    if len(lengths) > 1:
        raise ValueError(
            f"{directory} has an index for samples of {', '.join(map(str, lengths[:-1]))} and of {lengths[-1]} tokens: "
            f"say which with --max_seq_len"
        )
    return lengths[0]


def prepare_data(config: Config, given: frozenset[str]) -> dict[str, Path]:
    """Set -> directory of its tokens. Raw records of SFT and DPO are tokenized first: before any process group exists,
    so that no rank waits in a collective meanwhile.

    Args:
        given: names of the flags that were given.
    Raises:
        ValueError: nothing to tokenize, or flags that contradict what was tokenized before.
    """
    data, run = config.data, config.run
    dirs = {"train": Path(data.train_data_dir or data.data_dir), "valid": Path(data.valid_data_dir or data.data_dir)}
    if run.task_type == "pretrain":
        return dirs
    options = Options(
        run.task_type, data.max_seq_len, data.sft_loss, data.max_prompt_len, data.prompt_truncation_mode,
        data.user_name, data.assistant_name,
    )  # fmt: skip
    chosen = {}
    for split, directory in dirs.items():
        if (directory / MANIFEST_NAME).exists():
            chosen[split] = directory
        elif split == "valid" and not data.valid_data_dir:
            chosen[split] = chosen["train"]
        else:
            # A directory for validation alone is taken whole.
            ratio = 1.0 if split == "valid" else data.valid_ratio or 0.0
            chosen[split] = tokenize_online(directory, _tokenizer_dir(config), options, ratio)
        check_options(chosen[split], options, given)
    return chosen


def _tokenizer_dir(config: Config) -> Path:
    """The tokenizer of the model that is trained."""
    run, given, weights = config.run, config.data.tokenizer_dir, None
    if run.resume:
        # Any will do: which checkpoint the run goes on from is found out later.
        weights = ckpt.newest_with(RunPaths(Path(run.out_dir)).ckpt_dir, "tokenizer.json")
    if weights is None and run.init_from:
        weights = ckpt.resolve_checkpoint_dir(Path(run.init_from))
    if not given and weights is None:
        raise ValueError(
            "--init_from is missing: raw records are tokenized for the model that is fine-tuned (for a new one, "
            "--tokenizer_dir says how)"
        )
    if given and weights is not None:
        require_tokenizer_of(weights, load_tokenizer(given))
    return Path(given) if given else weights


def require_tokenizer_of(weights: Path, tokenizer: Tokenizer) -> Tokenizer | None:
    """
    Args:
        weights: folder of a model.
        tokenizer: the data's.
    Returns:
        the one that the folder holds, if it does.
    Raises:
        ValueError: the data's is not the model's; where the folder holds none: the model is of another size.
    """
    if has_tokenizer(weights):
        own = load_tokenizer(weights)
        if own.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"the data was not tokenized with the tokenizer that the weights in {weights} know: pretokenize it "
                f"again with --tokenizer_dir {weights} (raw records of SFT and DPO: leave --tokenizer_dir out)"
            )
        return own
    rows = hf.read_config(weights).vocab_size
    if not 0 <= rows - tokenizer.vocab_size <= max(64, rows // _MOST_PADDING):
        raise ValueError(
            f"{weights} holds weights but no tokenizer, and its vocab_size is {rows} where the data's tokenizer has "
            f"{tokenizer.vocab_size} entries: tokenize the data with the model's own, and copy that into {weights}"
        )
    logger.warning(
        "%s holds weights but no tokenizer, so nobody can tell whether they know the data's: copy the files of the "
        "model's tokenizer into it to have that checked",
        weights,
    )
    return None


def warn_of_another_template(weights: Path, own: Tokenizer | None, tokenizer: Tokenizer) -> None:
    """
    Args:
        weights: folder of a model that is fine-tuned.
        own: the tokenizer that it holds.
        tokenizer: the data's.
    """
    if own and own.chat_template is not None and template_of(own).key != template_of(tokenizer).key:
        logger.warning(
            "the conversations were laid out by another chat template than that of %s: checkpoints carry the one that "
            "laid them out",
            weights,
        )


def open_data(config: Config, dirs: dict[str, Path], context: DistContext, place: Place) -> Data:
    """Open both sets and the tokenizer, and check that they belong together, on all ranks.

    Args:
        dirs: see prepare_data.
    Raises:
        ValueError: they do not belong together, are damaged, or differ from rank to rank.
    """
    data, task = config.data, config.run.task_type
    how = (data.max_seq_len, data.document_mask, data.packing)
    train, valid = open_dataset(task, dirs["train"], "train", *how), None
    tokenizer = load_tokenizer(data.tokenizer_dir or dirs["train"] / "tokenizer")
    train.check(tokenizer.fingerprint, data.valid_ratio)
    if train.valid_ratio > 0 or data.valid_data_dir:
        valid = open_dataset(task, dirs["valid"], "valid", *how)
        valid.check(tokenizer.fingerprint)
    elif config.run.valid_only:
        raise ValueError(f"{dirs['train']} has no validation set: it was pretokenized with --valid_ratio 0")
    datasets = [dataset for dataset in (train, valid) if dataset is not None]
    if task != "pretrain":
        _require_one_template([dirs[split] for split, one in (("train", train), ("valid", valid)) if one], tokenizer)
    for dataset in datasets:
        if task != "pretrain":
            # Small enough to be read once before it is trained on; pretraining data has `dataset.inspect --verify`.
            _once_a_store(dataset.sequences.check_content, context, place)
        elif data.verify_data:
            _once_a_store(dataset.check_content, context, place)
    context.require_same(
        [*(dataset.fingerprint for dataset in datasets), tokenizer.fingerprint],
        "the ranks see different data or tokenizers: copy the same to all nodes",
    )
    return Data(dirs, tokenizer, train, valid)


def _require_one_template(directories: list[Path], tokenizer: Tokenizer) -> None:
    """Checkpoints carry the tokenizer's chat template: it must be the one that laid out what is learnt.

    Raises:
        ValueError: it is not.
    """
    for directory in directories:
        if template_of(load_tokenizer(directory / "tokenizer")).key != template_of(tokenizer).key:
            raise ValueError(
                f"the conversations in {directory} were laid out by another chat template than the tokenizer's that "
                f"the run takes: pretokenize them again with that tokenizer"
            )


def _once_a_store(check: Callable[[], object], context: DistContext, place: Place) -> None:
    context.gather_from(lambda: check() if place.is_first_of_store else None)


def order_of_samples(config: Config, data: Data) -> dict:
    """What the order of the samples depends on."""
    return {"seed": config.run.seed, "data": data.train.fingerprint, "max_seq_len": config.data.max_seq_len}

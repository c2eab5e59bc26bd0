"""Raw records that a training is given: they are tokenized when it starts, once, into a folder beside them that is
named after the tokenizer and the options."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from data_preprocess.jobs import process_corpus
from data_preprocess.readers import find_units
from data_preprocess.record_compiler import OF_OTHER_TASK, RULES_VERSION, CompilerOptions
from data_preprocess.sequence_job import SequenceJob, record_corpus
from data_preprocess.shards import NOTHING_READ, print_skipped, waiting_writer
from dataset.format import MANIFEST_NAME
from dataset.sequences import PRETOKENIZE_SFT_COMMAND, read_manifest
from tokenizer import load_tokenizer
from tokenizer.add_tokens import grow
from tokenizer.chat_template import template_of

CACHE_DIR = ".tokenized"
_SMALL_BYTES = 4_000_000
"""Size of records that are tokenized faster than another process would start."""


def check_options(output: Path, options: CompilerOptions, given: Collection[str]) -> None:
    """Compare the flags that a user gave with those that a directory was pretokenized with.

    Raises:
        ValueError: they contradict each other.
    """
    manifest = read_manifest(output)
    if manifest.get("task") != options.task:
        return
    for name, value in options.deciding().items():
        made_with = manifest.get("options", {}).get(name)
        if name in given and made_with != value:
            raise ValueError(
                f"--{name}={value} contradicts the data in {output}, which was pretokenized with {made_with}: leave "
                f"it out, or pretokenize again"
            )


def tokenize_online(
    data_dir: Path, tokenizer_dir: Path, options: CompilerOptions, valid_ratio: float, added: Sequence[str] = ()
) -> Path:
    """Folder with the tokens of raw records, which are made if they are not there yet. Several processes may call this
    at once, before they know of each other: one does the work and the others wait for it.

    Args:
        valid_ratio: share of the records held out; with 1, all are the validation set.
        added: tokens that the tokenizer of the folder grows by.
    Raises:
        ValueError: see `process_corpus`; or the folder cannot be written.
    """
    options.check()
    tokenizer = load_tokenizer(tokenizer_dir)
    if added:
        tokenizer = grow(tokenizer, added)
    corpus = record_corpus(str(data_dir))
    units, _ = find_units(corpus, SequenceJob.shard_bytes)
    key = [
        RULES_VERSION, tokenizer.fingerprint, template_of(tokenizer).key, options.deciding(), valid_ratio,
        [unit.fingerprint(corpus) for unit in units],
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    output = data_dir / CACHE_DIR / f"{options.task}-{options.max_seq_len}-{name}"
    if (output / MANIFEST_NAME).exists():
        return output
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".turn").touch()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            # A disk that fails or is full may recover before the next try.
            raise
        raise ValueError(
            f"the tokens of {data_dir} cannot be kept beside it ({error.strerror}): run "
            f"{_growing(tokenizer_dir, added)}`python -m data_preprocess.pretokenize_sft_data --task {options.task} "
            f"--data_dir {data_dir} "
            f"--tokenizer_dir {'T' if added else tokenizer_dir} --output_dir O --max_seq_len {options.max_seq_len}`, "
            f"and give O"
        ) from None
    if added:
        tokenizer_dir = output.with_name(f"tokenizer-{tokenizer.fingerprint[:16]}")
        tokenizer.save_pretrained(tokenizer_dir)
    with waiting_writer(output):
        if not (output / MANIFEST_NAME).exists():
            size = sum(unit.num_bytes for unit in units)
            print(f"tokenizing {data_dir} ({size / 1e6:,.1f} MB) once, into {output}", file=sys.stderr, flush=True)
            job = SequenceJob(corpus, str(output), str(tokenizer_dir), valid_ratio, compiling=options)
            workers = 0 if size <= _SMALL_BYTES else os.cpu_count() or 1
            try:
                print_skipped(process_corpus(job, workers))
            except ValueError as error:
                raise ValueError(_for_training(str(error), data_dir, options.task)) from None
    return output


def _growing(tokenizer_dir: Path, added: Sequence[str]) -> str:
    """The command that grows a tokenizer, as a part of a sentence."""
    command = f"python -m tokenizer.add_tokens --tokenizer_dir {tokenizer_dir} --tokens FILE --output_dir T"
    return f"`{command}` and " if added else ""


def _for_training(problem: str, data_dir: Path, task: str) -> str:
    """The command's sentence in the words of a training, which has other flags."""
    if OF_OTHER_TASK[task] in problem:
        found, wanted, other = ("preferences", "conversations", "dpo") if task == "sft" else (
            "conversations", 'preferences, records with "chosen" and "rejected"', "sft")  # fmt: skip
        why = problem.removeprefix(f"{data_dir} {NOTHING_READ}: ")
        return f"{data_dir} holds {found}: train on them with --task_type={other}, or give {wanted} ({why})"
    if "--max_bad_records" in problem:
        return f"{problem} (for other limits, tokenize {data_dir} beforehand with `{PRETOKENIZE_SFT_COMMAND}`)"
    return problem

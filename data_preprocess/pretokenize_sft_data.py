"""Tokenize conversations for SFT, or preferences for DPO -> shards of sequences (format: dataset/sequences.py).

    python -m data_preprocess.pretokenize_sft_data --data_dir D --tokenizer_dir T --output_dir O --max_seq_len 1024
    python -m data_preprocess.pretokenize_sft_data --task dpo ...

Formats of the records: conversations.py. What is learnt of a conversation, and what becomes of what is too long:
mask_compiler.py. Records go to the train or the valid set by the hash of what comes before the first answer to a
question, so that the same question never lands in both. A run that was killed goes on where it stopped (jobs.py).

Training on raw records (`train_my_ddp.py --task_type=sft --data_dir=D`) calls `tokenize_online`: the same work, into a
folder of D that is named after the tokenizer and the options, so that it is done once.
"""

import sys

if __name__ == "__main__":
    # Also when it is run by its path, or by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from data_preprocess.conversations import FIELDS, PlainText, Preference, ReadRecord, Sample, read_record, roles_with
from data_preprocess.jobs import Job, process_corpus, run_command
from data_preprocess.mask_compiler import (
    SFTLoss,
    TrainingSample,
    Truncation,
    compile_conversation,
    compile_preference,
    compile_text,
)
from data_preprocess.readers import (
    BadRecord,
    BadRecords,
    Corpus,
    Record,
    Unit,
    add_file_arguments,
    chosen_files,
    find_units,
    place,
    read_unit,
    well_known_endings,
)
from data_preprocess.shards import MOST_UNREAD_FIELDS, NOTHING_READ, PartRecord, print_skipped, set_of, waiting_writer
from dataset.format import MANIFEST_NAME
from dataset.sequences import PRETOKENIZE_SFT_COMMAND, SequenceHeader, SequenceShard, SequenceWriter, read_manifest
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.chat_template import Message, template_of
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import run_main

RULES_VERSION = 3
"""Raised when the same record would become other tokens: what was made before is made again."""
CACHE_DIR = ".tokenized"
_OF_OTHER_TASK = {
    "sft": "it is a preference, for --task dpo",
    "dpo": 'it has no "chosen" and "rejected": conversations are for --task sft',
}
"""Why a record is none of this task."""
_BYTES_A_TOKEN = 4
"""About; for how large a shard becomes."""
_SMALL_BYTES = 4_000_000
"""So much is tokenized before another process would have started."""


@dataclass(frozen=True)
class Options:
    """What decides which samples a record becomes. Field names are those of the flags."""

    task: Literal["sft", "dpo"] = "sft"
    max_seq_len: int = 1024
    sft_loss: SFTLoss = "all"
    max_prompt_len: int = 0
    prompt_truncation_mode: Truncation = "keep_end"
    user_name: str = ""
    assistant_name: str = ""

    def check(self) -> None:
        """Raise ValueError for what makes no sense."""
        if self.user_name and self.user_name == self.assistant_name:
            raise ValueError(f"--user_name and --assistant_name are both {self.user_name}")
        if self.max_seq_len < 2:
            raise ValueError(f"--max_seq_len must be at least 2, got {self.max_seq_len}")
        if not 0 <= self.max_prompt_len < self.max_seq_len:
            raise ValueError(
                f"--max_prompt_len must leave room for an answer: at least 0 and below --max_seq_len "
                f"{self.max_seq_len}, got {self.max_prompt_len}"
            )

    def deciding(self) -> dict:
        """Those that the task looks at."""
        names = ["task", "max_seq_len", "user_name", "assistant_name"]
        names += ["sft_loss"] if self.task == "sft" else ["max_prompt_len", "prompt_truncation_mode"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class CompiledRecord:
    """What became of a record."""

    split: str
    samples: list[list[TrainingSample]]
    """Of SFT lists of one sequence, of DPO of two."""
    dropped: int
    text_bytes: int
    """UTF-8 bytes of the messages."""
    format: str = ""
    unread: tuple[str, ...] = ()
    """As in ReadRecord."""


class Compiler:
    """Records -> training samples."""

    def __init__(self, tokenizer: Tokenizer, options: Options, valid_ratio: float = 0.0):
        options.check()
        self.tokenizer, self.template = tokenizer, template_of(tokenizer)
        self._options, self._valid_ratio = options, valid_ratio
        self._roles = roles_with(options.user_name, options.assistant_name)

    def parse(self, value: object) -> Sample:
        """The sample of a record, see `read`."""
        return self.read(value).sample

    def read(self, value: object) -> ReadRecord:
        """What a record holds.

        Raises:
            ValueError: no sample for this task; the sentence says what is wrong.
        """
        record = read_record(value, self._roles)
        sample = record.sample
        if isinstance(sample, Preference) != (self._options.task == "dpo"):
            raise ValueError(_OF_OTHER_TASK[self._options.task])
        return record

    def compile(self, sample: Sample) -> CompiledRecord:
        """Its tokens.

        Raises:
            ValueError: the chat template has no place for something in it.
        """
        options, max_tokens = self._options, self._options.max_seq_len + 1
        if isinstance(sample, Preference):
            pair = compile_preference(
                sample, self.template, max_tokens, options.max_prompt_len, options.prompt_truncation_mode
            )
            question = _question(sample.prompt)
            texts = [message.text for message in (*sample.prompt, sample.chosen, sample.rejected)]
            samples, dropped = [pair] if pair else [], int(pair is None)
        elif isinstance(sample, PlainText):
            question = texts = [sample.text]
            result = compile_text(sample, self.tokenizer, max_tokens)
            samples, dropped = [[one] for one in result.samples], result.dropped
        else:
            question = _question(sample.messages)
            texts = [message.text for message in sample.messages]
            result = compile_conversation(sample, self.template, options.sft_loss, max_tokens)
            samples, dropped = [[one] for one in result.samples], result.dropped
        split = set_of(json.dumps(question).encode(), self._valid_ratio)
        return CompiledRecord(split, samples, dropped, sum(len(text.encode("utf-8")) for text in texts))


def _question(messages: Sequence[Message]) -> list[str]:
    """What comes before the first answer; a greeting before any question is none."""
    texts: list[str] = []
    asked = False
    for message in messages:
        if message.role == "assistant" and asked:
            return texts
        asked = asked or message.role == "user"
        texts.append(message.text)
    return texts


Item = tuple[Record | BadRecord, CompiledRecord | None]


@dataclass(frozen=True)
class SequenceJob(Job):
    """Records -> shards of sequences."""

    shard_bytes: int = 64_000_000
    compiling: Options = Options()

    def options(self) -> object:
        return [RULES_VERSION, self.compiling.deciding(), self.valid_ratio, self.shard_bytes]

    def key(self, tokenizer: Tokenizer) -> list:
        return [*super().key(tokenizer), template_of(tokenizer).key]

    def begin(self, tokenizer: Tokenizer) -> None:
        for note in template_of(tokenizer).notes:
            print(f"note: {note}", file=sys.stderr, flush=True)

    def items(
        self, unit: Unit, tokenizer: Tokenizer, done: int, num_threads: int, on_bytes: Callable[[int], None]
    ) -> Iterator[Item]:
        compiler = Compiler(tokenizer, self.compiling, self.valid_ratio)
        for item in islice(read_unit(self.corpus, unit, on_bytes), done, None):
            if isinstance(item, BadRecord):
                yield item, None
                continue
            where = place(item.path, item.counts, item.record)
            try:
                record = compiler.read(item.value)
                compiled = compiler.compile(record.sample)
            except ValueError as error:
                yield BadRecord(where, str(error)), None
                continue
            except Exception as error:
                # The libraries of tokenizers raise what they like; which record was it?
                raise ValueError(f"the tokenizer fails on {where} ({type(error).__name__}: {error})") from error
            yield item, replace(compiled, format=record.format, unread=record.unread)

    def write_part(self, name: str, tokenizer: Tokenizer, items: Iterator[Item], bad_before: int) -> PartRecord:
        """One shard of each set that gets a sample."""
        bad, dropped_examples, writers = BadRecords(), [], {}
        formats, unread = Counter(), Counter()
        num_items = documents = text_bytes = dropped = shortened = 0
        is_last = True
        for item, compiled in items:
            num_items += 1
            if isinstance(item, BadRecord):
                bad.add(item)
                self.check_bad_records(bad_before + bad.count, bad.examples)
                continue
            documents += 1
            formats[compiled.format] += 1
            unread.update(compiled.unread)
            dropped += compiled.dropped
            if compiled.dropped and len(dropped_examples) < 20:
                where = place(item.path, item.counts, item.record)
                dropped_examples.append(f"{where}: too long, {self._why_dropped(compiled.dropped)}")
            for sequences in compiled.samples:
                if compiled.split not in writers:
                    writers[compiled.split] = SequenceWriter(self._header(tokenizer, compiled.split))
                shortened += any(sequence.left_out for sequence in sequences)
                for sequence in sequences:
                    writers[compiled.split].add(
                        sequence.ids, sequence.supervised, (item.path, item.counts), item.record
                    )
            text_bytes += compiled.text_bytes
            # --sft_loss=split says the same many times.
            written = sum(writer.num_tokens for writer in writers.values())
            if max(text_bytes, _BYTES_A_TOKEN * written) >= self.shard_bytes:
                is_last = False
                break
        shards = {split: f"{split}-{name}.safetensors" for split in writers}
        totals = {"samples": 0, "tokens": 0, "supervised_tokens": 0}
        for split, writer in writers.items():
            writer.close(Path(self.output_dir) / shards[split])
            totals = {key: value + writer.totals()[key] for key, value in totals.items()}
        totals |= {"documents": documents, "text_bytes": text_bytes, "dropped": dropped, "shortened": shortened}
        return PartRecord(
            shards, num_items, is_last, totals, bad.count, bad.examples, dropped_examples,
            formats=dict(formats), unread_fields=dict(unread.most_common(MOST_UNREAD_FIELDS)),
        )  # fmt: skip

    def _why_dropped(self, count: int) -> str:
        if self.compiling.task == "dpo":
            return "nothing is left of its answers that tells them apart"
        return f"{count} samples of it have no answer left"

    def _header(self, tokenizer: Tokenizer, split: str) -> SequenceHeader:
        return SequenceHeader(
            task=self.compiling.task, split=split, max_seq_len=self.compiling.max_seq_len,
            vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, tokenizer_fingerprint=tokenizer.fingerprint,
            options=self.compiling.deciding(),
        )  # fmt: skip

    def check_shard(self, path: Path) -> None:
        SequenceShard(path).check_content()

    def manifest(self) -> dict:
        return {"task": self.compiling.task, "options": self.compiling.deciding()}


def check_options(output: Path, options: Options, given: Collection[str]) -> None:
    """Compare the flags that a user gave with what a directory was pretokenized with.

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


def record_corpus(root: str, **chosen: tuple[str, ...]) -> Corpus:
    """A directory with records of conversations or preferences. `chosen`: see `chosen_files`."""
    return Corpus(root, None, columns=FIELDS, **chosen)


def tokenize_online(data_dir: Path, tokenizer_dir: Path, options: Options, valid_ratio: float) -> Path:
    """The folder with the tokens of raw records, which are made if they are not there yet. Several processes may call
    this at once, before they know of each other: one does the work and the others wait for it.

    Args:
        valid_ratio: share of the records held out; 1 makes a validation set of all.
    Raises:
        ValueError: as `process_corpus`, or no place to write to.
    """
    options.check()
    tokenizer = load_tokenizer(tokenizer_dir)
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
            # A disk that fails or is full may be better at the next try.
            raise
        raise ValueError(
            f"the tokens of {data_dir} cannot be kept beside it ({error.strerror}): run "
            f"`python -m data_preprocess.pretokenize_sft_data --task {options.task} --data_dir {data_dir} "
            f"--tokenizer_dir {tokenizer_dir} --output_dir O --max_seq_len {options.max_seq_len}`, and give O"
        ) from None
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


def _for_training(problem: str, data_dir: Path, task: str) -> str:
    """A sentence of the command as training says it, which has other flags."""
    if _OF_OTHER_TASK[task] in problem:
        found, wanted, other = ("preferences", "conversations", "dpo") if task == "sft" else (
            "conversations", 'preferences, records with "chosen" and "rejected"', "sft")  # fmt: skip
        why = problem.removeprefix(f"{data_dir} {NOTHING_READ}: ")
        return f"{data_dir} holds {found}: train on them with --task_type={other}, or give {wanted} ({why})"
    if "--max_bad_records" in problem:
        return f"{problem} (for other limits, tokenize {data_dir} beforehand with `{PRETOKENIZE_SFT_COMMAND}`)"
    return problem


def summary(manifest: dict) -> str:
    """What became of the records, in a line."""
    shards = manifest["shards"]
    return (
        f"{manifest['documents']:,} records -> {manifest['samples']:,} samples, {manifest['tokens']:,} tokens, "
        f"{manifest['supervised_tokens'] / max(manifest['tokens'], 1):.0%} of them supervised, in "
        f"{len(shards['train'])} train and {len(shards['valid'])} valid shards; {manifest['shortened']} samples "
        f"shortened, {manifest['dropped']} dropped for want of an answer, {manifest['bad_records']} records skipped"
    )


def print_summary(manifest: dict, seconds: float) -> None:
    print_skipped(manifest)
    print(f"{summary(manifest)}; {seconds:.1f} s")


def add_compiling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of Options; `options_from` takes them."""
    parser.add_argument("--task", choices=["sft", "dpo"], default="sft", help="default: sft")
    parser.add_argument("--max_seq_len", type=int, default=1024, help="positions of a sample (default: 1024)")
    parser.add_argument(
        "--sft_loss", choices=["all", "last", "split"], default="all",
        help="learn all answers, the last one, or each in a sample of its own (default: all)",
    )  # fmt: skip
    parser.add_argument("--user_name", default="", help="what the records call the user, beside the usual names")
    parser.add_argument("--assistant_name", default="", help="what they call the assistant")
    parser.add_argument(
        "--max_prompt_len", type=int, default=0,
        help="DPO: longest prompt in tokens (default: what the longer answer leaves, at least half of max_seq_len)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt_truncation_mode", choices=["keep_end", "keep_start"], default="keep_end",
        help="DPO: which part of a prompt that is too long stays (default: keep_end)",
    )  # fmt: skip


def options_from(args: argparse.Namespace) -> Options:
    return Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data_preprocess.pretokenize_sft_data", description="Tokenize conversations or preferences."
    )
    endings = ", ".join(well_known_endings(of_records=True))
    parser.add_argument("--data_dir", type=a_path, required=True, help=f"directory with records: {endings}")
    parser.add_argument("--tokenizer_dir", type=a_path, required=True, help="directory of the tokenizer")
    parser.add_argument("--output_dir", type=a_path, required=True, help="where the shards go")
    add_compiling_arguments(parser)
    add_file_arguments(parser)
    parser.add_argument("--valid_ratio", type=float, default=0.0, help="share of records held out (default: 0; 1: all)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--shard_mb", type=float, default=64.0, help="MB of text in a shard (default: 64)")
    parser.add_argument("--max_bad_records", type=int, default=100, help="stop beyond so many (default: 100)")
    args = parser.parse_args(argv)

    def work() -> dict:
        options = options_from(args)
        options.check()
        if args.num_workers < 1:
            raise ValueError(f"--num_workers must be positive, got {args.num_workers}")
        if not 0 < args.shard_mb * 1e6 < 2**31:
            raise ValueError(f"--shard_mb must be positive and below 2147, got {args.shard_mb}")
        job = SequenceJob(
            record_corpus(args.data_dir, **chosen_files(args)), args.output_dir, args.tokenizer_dir, args.valid_ratio,
            int(args.shard_mb * 1e6), args.max_bad_records, options,
        )  # fmt: skip
        return process_corpus(job, args.num_workers)

    return run_command("pretokenize_sft_data", work, print_summary)


if __name__ == "__main__":
    run_main(main, goes_on=True)

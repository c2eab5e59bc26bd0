"""The way of a record to its training samples: its layout is read (conversations/), its conversation becomes tokens
(mask_compiler.py), its set is chosen. And the options of that, with their flags."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_preprocess.conversations import PlainText, Preference, ReadRecord, Sample, read_record, roles_with
from data_preprocess.mask_compiler import (
    SFTLoss,
    TrainingSample,
    Truncation,
    compile_conversation,
    compile_preference,
    compile_text,
)
from data_preprocess.shards import set_of
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of

RULES_VERSION = 3
"""Number to raise when the same record becomes other tokens, so that older work is done again."""
OF_OTHER_TASK = {
    "sft": "it is a preference, for --task dpo",
    "dpo": 'it has no "chosen" and "rejected": conversations are for --task sft',
}
"""Task -> why a record does not belong to it."""


@dataclass(frozen=True)
class CompilerOptions:
    """Options that decide which samples a record becomes. The fields are named like the flags."""

    task: Literal["sft", "dpo"] = "sft"
    max_seq_len: int = 1024
    sft_loss: SFTLoss = "all"
    max_prompt_len: int = 0
    prompt_truncation_mode: Truncation = "keep_end"
    user_name: str = ""
    assistant_name: str = ""

    def check(self) -> None:
        """Raise ValueError for options that contradict each other."""
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
        """The options that matter for the task."""
        names = ["task", "max_seq_len", "user_name", "assistant_name"]
        names += ["sft_loss"] if self.task == "sft" else ["max_prompt_len", "prompt_truncation_mode"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class CompiledRecord:
    """A record's samples, and the figures for the report."""

    split: str
    samples: list[list[TrainingSample]]
    """Sequences of each sample: one for SFT, two for DPO."""
    dropped: int
    text_bytes: int
    """UTF-8 bytes of the messages."""
    format: str = ""
    unread: tuple[str, ...] = ()
    """Fields that are not read, as in ReadRecord."""


class Compiler:
    """Makes training samples of records."""

    def __init__(self, tokenizer: Tokenizer, options: CompilerOptions, valid_ratio: float = 0.0):
        options.check()
        self.tokenizer, self.template = tokenizer, template_of(tokenizer)
        self._options, self._valid_ratio = options, valid_ratio
        self._roles = roles_with(options.user_name, options.assistant_name)

    def parse(self, value: object) -> Sample:
        """Sample of a record, see `read`."""
        return self.read(value).sample

    def read(self, value: object) -> ReadRecord:
        """Sample of a record, and how its layout was told.

        Raises:
            ValueError: the record holds no sample for this task; the sentence says what is wrong.
        """
        record = read_record(value, self._roles)
        sample = record.sample
        if isinstance(sample, Preference) != (self._options.task == "dpo"):
            raise ValueError(OF_OTHER_TASK[self._options.task])
        return record

    def compile(self, sample: Sample) -> CompiledRecord:
        """Tokens of a sample.

        Raises:
            ValueError: the chat template has no place for something in the sample.
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
    """Texts before the first answer. A greeting that precedes every question does not count as an answer."""
    texts: list[str] = []
    asked = False
    for message in messages:
        if message.role == "assistant" and asked:
            return texts
        asked = asked or message.role == "user"
        texts.append(message.text)
    return texts


def add_compiling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of CompilerOptions; `compiler_options_from` takes them."""
    parser.add_argument("--task", choices=["sft", "dpo"], default="sft", help="default: sft")
    parser.add_argument("--max_seq_len", type=int, default=1024, help="positions of a sample (default: 1024)")
    parser.add_argument(
        "--sft_loss", choices=["all", "last", "split"], default="all",
        help="learn all answers, the last one, or each in a sample of its own (default: all)",
    )  # fmt: skip
    parser.add_argument("--user_name", default="", help="name of the user in the records, besides the usual names")
    parser.add_argument("--assistant_name", default="", help="name of the assistant in the records")
    parser.add_argument(
        "--max_prompt_len", type=int, default=0,
        help="DPO: longest prompt in tokens (default: the room that the longer answer leaves, at least half)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt_truncation_mode", choices=["keep_end", "keep_start"], default="keep_end",
        help="DPO: which part of a prompt that is too long is kept (default: keep_end)",
    )  # fmt: skip


def compiler_options_from(args: argparse.Namespace) -> CompilerOptions:
    return CompilerOptions(**{name: getattr(args, name) for name in CompilerOptions.__dataclass_fields__})

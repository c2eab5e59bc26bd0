"""Job of tokenizing records: units of them become shards of sequences (format: dataset/sequences.py)."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data_preprocess.conversations import FIELDS
from data_preprocess.jobs import Job
from data_preprocess.readers import BadRecord, BadRecords, Corpus, Record, Unit, place, read_unit
from data_preprocess.record_compiler import RULES_VERSION, CompiledRecord, Compiler, CompilerOptions
from data_preprocess.shards import MOST_UNREAD_FIELDS, PartRecord
from dataset.sequences import SequenceHeader, SequenceShard, SequenceWriter
from tokenizer import Tokenizer
from tokenizer.chat_template import template_of

_BYTES_A_TOKEN = 4
"""Approximate size of a token, for the size of a shard."""


def record_corpus(root: str, **chosen: tuple[str, ...]) -> Corpus:
    """Corpus of conversations or preferences.

    Args:
        chosen: see `chosen_files`.
    """
    return Corpus(root, None, columns=FIELDS, **chosen)


Item = tuple[Record | BadRecord, CompiledRecord | None]


@dataclass(frozen=True)
class SequenceJob(Job):
    """Work of tokenizing records into shards of sequences."""

    shard_bytes: int = 64_000_000
    compiling: CompilerOptions = CompilerOptions()

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
                # The libraries raise any exception, without saying which record it was.
                raise ValueError(f"the tokenizer fails on {where} ({type(error).__name__}: {error})") from error
            yield item, replace(compiled, format=record.format, unread=record.unread)

    def write_part(self, name: str, tokenizer: Tokenizer, items: Iterator[Item], bad_before: int) -> PartRecord:
        """Write one shard for each set that gets a sample."""
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
            # With --sft_loss=split, the same text is written many times.
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

"""Train a tokenizer on a sample of a corpus, or of several in a mixture.

    python -m tokenizer.train_tokenizer --data_dir D --output_dir T --vocab_size 8192 --kind hf_bbpe
    python -m tokenizer.train_tokenizer --source zh=D/zh@4 --source en=D/en@4 --source code=D/code@2 --output_dir T

--sample_mb bounds memory and time, whatever the size of the corpus.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data_preprocess.readers import BadRecords, add_corpus_arguments, corpus_from, print_left_out, well_known_endings
from data_preprocess.sampling import Source, budgets, mixed_texts, sample_texts
from runs.layout import CKPT_DIR
from tokenizer.base import CHAT_TEMPLATE_NAME, LARGEST_VOCAB_SIZE, Tokenizer
from tokenizer.conversion import BYTE_LEVEL, SENTENCE_PIECE
from tokenizer.hf_bbpe import train_hf_bbpe
from tokenizer.long_words import LongWords
from tokenizer.sp_bbpe import train_sp_bbpe
from utils.arguments import Parser
from utils.files import atomic_write_json
from utils.paths import a_path, expand
from utils.terminal import run_main

_REPORT_BYTES = 20_000_000
_REPORT_NAME = "report.json"
_OWN_FILES = frozenset(["tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE_NAME])
_OF_MODELS = (
    *_OWN_FILES, SENTENCE_PIECE, *BYTE_LEVEL, "special_tokens_map.json", "added_tokens.json", "config.json",
    "*.safetensors", "pytorch_model*.bin", "*.gguf", CKPT_DIR,
)  # fmt: skip
"""Patterns of the files in the folder of a tokenizer or a model."""
_SAMPLE_SEED, _REPORT_SEED = 0, 1


def parse_source(text: str, args: argparse.Namespace) -> Source:
    """Source of a flag's value, NAME=DIR or NAME=DIR@WEIGHT.

    Raises:
        ValueError: it is neither.
    """
    name, _, rest = text.partition("=")
    directory, at, weight = rest.rpartition("@")
    if not at:
        directory, weight = rest, "1"
    try:
        value = float(weight)
    except ValueError:
        directory, value = rest, 1.0
    if not name or not directory or not 0.0 < value < float("inf"):
        raise ValueError(f"--source {text}: write NAME=DIR or NAME=DIR@WEIGHT, such as zh=corpus/zh@4")
    return Source(name, corpus_from(args, expand(directory)), value)


def sources_from(args: argparse.Namespace) -> list[Source]:
    """Sources of the text.

    Raises:
        ValueError: neither --data_dir nor --source is given, or both are, or a name occurs twice.
    """
    if args.data_dir and args.source:
        raise ValueError("--data_dir and --source both say where the text is: give only one")
    if not args.data_dir and not args.source:
        raise ValueError("--data_dir is missing: give the directory with the text")
    if args.data_dir:
        return [Source("all", corpus_from(args, args.data_dir), 1.0)]
    sources = [parse_source(text, args) for text in args.source]
    if len({source.name for source in sources}) < len(sources):
        raise ValueError("every --source needs a name of its own")
    return sources


def check_output_dir(directory: Path, kind: str) -> None:
    """Check that nothing of value would be overwritten.

    Raises:
        ValueError: the directory holds a tokenizer that this command did not train, or a model.
    """
    found = sorted({path.name for pattern in _OF_MODELS for path in directory.glob(pattern)})
    written = _OWN_FILES if kind == "hf_bbpe" else _OWN_FILES | {SENTENCE_PIECE}
    # A report shows that this command wrote the rest.
    own = written if (directory / _REPORT_NAME).exists() else frozenset()
    foreign = [name for name in found if name not in own]
    if foreign:
        raise ValueError(
            f"--output_dir {directory} holds {foreign[0]}, of a model or of another tokenizer: give a folder of its own"
        )


class Sample:
    """Texts to train on. They are counted, and progress is shown, as they go by."""

    def __init__(self, sources: list[Source], sample_bytes: int, bad: BadRecords):
        self._sources, self._sample_bytes, self._bad = sources, sample_bytes, bad
        self.text_bytes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        with tqdm(total=self._sample_bytes, unit="B", unit_scale=True, desc="sampling", disable=None) as bar:
            for name, text in mixed_texts(self._sources, self._sample_bytes, self._bad):
                size = len(text.encode("utf-8"))
                self.text_bytes[name] += size
                bar.update(size)
                yield text
        if not self.text_bytes.total() and not self._bad.count:
            raise ValueError("no text was read: every record is empty")


def report_on(tokenizer: Tokenizer, sources: list[Source], sample_bytes: int) -> dict:
    """Report on a tokenizer, from another sample of each source: bytes per token, unused entries, longest entries."""
    used: Counter[int] = Counter()
    of_sources = {}
    for source, budget in zip(sources, budgets(sources, sample_bytes)):
        num_bytes = num_tokens = 0
        for text in sample_texts(source.corpus, budget, BadRecords(), seed=_REPORT_SEED):
            ids = tokenizer.encode(text)
            used.update(ids)
            num_bytes += len(text.encode("utf-8"))
            num_tokens += len(ids)
        of_sources[source.name] = {
            "bytes": num_bytes, "tokens": num_tokens, "bytes_a_token": round(num_bytes / max(num_tokens, 1), 4)
        }  # fmt: skip
    lengths = tokenizer.token_byte_lengths()
    learnt = [token_id for token_id, length in enumerate(lengths) if length > 1]
    longest = sorted(learnt, key=lambda token_id: -lengths[token_id])[:20]
    unused = [token_id for token_id in learnt if token_id not in used]
    return {
        "sources": of_sources,
        "entries": tokenizer.vocab_size,
        "unused_entries": len(unused),
        "unused_examples": [tokenizer.decode([token_id]) for token_id in unused[:20]],
        "longest_tokens": [tokenizer.decode([token_id]) for token_id in longest],
        "fingerprint": tokenizer.fingerprint,
    }


def print_report(report: dict, seconds: float, bad: BadRecords) -> None:
    print_left_out(bad.left_out)
    for example in bad.examples[:10]:
        print(f"skipped {example}", file=sys.stderr)
    if bad.count > 10:
        print(f"skipped {bad.count - 10} more", file=sys.stderr)
    print("source          MB  bytes a token")
    for name, counts in report["sources"].items():
        print(f"{name:10s} {counts['bytes'] / 1e6:7.1f}  {counts['bytes_a_token']:13.3f}")
    print("longest tokens: " + "  ".join(repr(token) for token in report["longest_tokens"][:8]))
    print(
        f"{report['entries']:,} entries, of which {report['unused_entries']:,} were not used; {bad.count} records "
        f"skipped; {seconds:.1f} s; fingerprint {report['fingerprint'][:12]}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tokenizer.train_tokenizer", description="Train a tokenizer.")
    parser.add_argument(
        "--data_dir",
        type=a_path,
        help=f"directory with the text: {', '.join(well_known_endings(of_records=False))}, source code",
    )
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=DIR[@WEIGHT]",
        help="instead of --data_dir, once for each: a directory and its part in the mixture (default: 1)",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=a_path, required=True, help="where the tokenizer goes")
    parser.add_argument("--vocab_size", type=int, default=64320, help="entries with special tokens (default: 64320)")
    parser.add_argument(
        "--kind", choices=["hf_bbpe", "sp_bbpe"], default="hf_bbpe", help="library: tokenizers or sentencepiece"
    )
    parser.add_argument("--sample_mb", type=float, default=300.0, help="MB of text to train on, at most (default: 300)")
    parser.add_argument(
        "--max_digits", type=int, choices=[1, 2, 3], help="digits in a token (default: 3; sp_bbpe: always 1)"
    )
    parser.add_argument(
        "--max_han", type=int, default=0,
        help="Chinese characters merged together at most (default: any; hf_bbpe only). 4 halves memory and time, and "
        "costs about a tenth of the compression of Chinese",
    )  # fmt: skip
    add_corpus_arguments(parser)
    args = parser.parse_args(argv)
    started = time.monotonic()
    bad, sample, long_words = BadRecords(), None, LongWords()
    try:
        if args.kind == "sp_bbpe" and args.max_digits not in (None, 1):
            raise ValueError("--max_digits: sp_bbpe makes every digit a token of its own")
        if args.max_han < 0:
            raise ValueError(f"--max_han must not be negative, got {args.max_han}")
        if args.max_han and args.kind == "sp_bbpe":
            raise ValueError("--max_han is for --kind=hf_bbpe: leave it out")
        if not 1 <= args.sample_mb * 1e6 < 2**63:
            raise ValueError("--sample_mb must be positive")
        if args.vocab_size > LARGEST_VOCAB_SIZE:
            raise ValueError(f"--vocab_size must be at most {LARGEST_VOCAB_SIZE}")
        check_output_dir(Path(args.output_dir), args.kind)
        sources = sources_from(args)
        sample = Sample(sources, int(args.sample_mb * 1e6), bad)
        shows = sys.stderr.isatty()
        if args.kind == "hf_bbpe":
            tokenizer = train_hf_bbpe(sample, args.vocab_size, shows, args.max_digits or 3, args.max_han, long_words)
        else:
            tokenizer = train_sp_bbpe(sample, args.vocab_size, shows)
        report = report_on(tokenizer, sources, min(_REPORT_BYTES, int(args.sample_mb * 1e6)))
        report["trained_on_bytes"] = dict(sample.text_bytes)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        # Written first, so that the files of a killed command count as its own.
        atomic_write_json(Path(args.output_dir) / _REPORT_NAME, report)
        tokenizer.save_pretrained(args.output_dir)
    except (ValueError, OSError) as error:
        complaint = str(error)
        print_left_out(bad.left_out)
        if bad.count:
            records = "1 record" if bad.count == 1 else f"{bad.count} records"
            unread = f"{records} could not be read, for example {bad.examples[0]}"
            has_text = sample.text_bytes.total() > 0
            complaint = f"{complaint} ({unread})" if has_text else f"no text was read: {unread}"
        print(f"train_tokenizer: {complaint}", file=sys.stderr)
        return 2
    if long_words.count:
        print(f"train_tokenizer: {long_words}", file=sys.stderr)
    print_report(report, time.monotonic() - started, bad)
    return 0


if __name__ == "__main__":
    # The libraries' training ignores Python's signals. So Ctrl-C ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run_main(main, goes_on=True)

"""Train a tokenizer on a corpus.

python -m tokenizer.train_tokenizer --data_dir D --output_dir T --vocab_size 8192 --kind hf_bbpe
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_preprocess.readers import BadRecords, Unit, find_units, read_documents
from tokenizer.hf_bbpe import train_hf_bbpe

_SAMPLE_BYTES = 1 << 20
"""Text kept to measure the bytes a token."""


def corpus_texts(root: Path, units: list[Unit], text_key: str, bad: BadRecords) -> Iterator[str]:
    for unit in units:
        for piece in unit.pieces:
            yield from read_documents(root, piece, text_key, bad)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenizer.train_tokenizer", description="Train a tokenizer.")
    parser.add_argument("--data_dir", required=True, help="directory with .txt, .jsonl or source files")
    parser.add_argument("--output_dir", required=True, help="where the tokenizer goes")
    parser.add_argument("--vocab_size", type=int, default=64320, help="entries with special tokens (default: 64320)")
    parser.add_argument("--kind", choices=["hf_bbpe"], default="hf_bbpe", help="byte-level BPE of `tokenizers`")
    parser.add_argument("--text_key", default="text", help="key of the text in a JSON record (default: text)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    bad = BadRecords()
    root = Path(args.data_dir)
    try:
        units, _ = find_units(root, 1 << 26)
        if args.vocab_size % 64:
            raise ValueError(f"--vocab_size must be a multiple of 64 (matrix kernels need it), got {args.vocab_size}")
        tokenizer = train_hf_bbpe(corpus_texts(root, units, args.text_key, bad), args.vocab_size, sys.stderr.isatty())
        tokenizer.save_pretrained(args.output_dir)
    except (ValueError, OSError) as error:
        hint = f" ({bad.count} records could not be read, for example {bad.examples[0]})" if bad.count else ""
        print(f"train_tokenizer: {error}{hint}", file=sys.stderr)
        return 2
    sample_bytes = sample_tokens = 0
    for text in corpus_texts(root, units, args.text_key, BadRecords()):
        sample_bytes += len(text.encode("utf-8"))
        sample_tokens += len(tokenizer.encode(text))
        if sample_bytes > _SAMPLE_BYTES:
            break
    for example in bad.examples:
        print(f"skipped {example}", file=sys.stderr)
    print(
        f"{tokenizer.vocab_size} entries, {sample_bytes / max(sample_tokens, 1):.2f} bytes a token; "
        f"{bad.count} records skipped, {time.monotonic() - started:.1f} s; fingerprint {tokenizer.fingerprint[:12]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

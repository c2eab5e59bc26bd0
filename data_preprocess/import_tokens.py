"""Take over tokens that another program has made, as `.bin` shards (format: dataset/format.py).

    python -m data_preprocess.import_tokens --format nanogpt --input train.bin --valid_input val.bin \\
        --tokenizer_dir T --output_dir O

    format     its files                                               documents
    nanogpt    .bin of uint16 without a header                         end with the tokenizer's end of document
    llama2c    .bin of uint16 without a header                         begin with the token BOS
    megatron   .bin and .idx (version 1), named with or without .bin   as the .idx says

The tokenizer must be the one that made the tokens: a folder from Hugging Face, or one that was trained here. The token
that ends a document in the file, or the BOS that begins it, is not taken over, as our own format adds its own. Without
--valid_input, documents go to the validation set by the hash of their tokens.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import hashlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_preprocess.shards import PartRecord, PartWriter, print_summary, set_of, sole_writer, write_manifest
from tokenizer import Tokenizer, load_tokenizer
from utils.arguments import Parser
from utils.files import sha256_of_file
from utils.paths import a_path, absent
from utils.terminal import run_main

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class TokenFile:
    """Tokens of a foreign file, and the bounds of its documents."""

    path: Path
    tokens: np.ndarray
    bounds: np.ndarray
    """(documents + 1,) int64: document i is tokens[bounds[i] : bounds[i + 1]]."""


def open_nanogpt(path: Path, eod_id: int) -> TokenFile:
    """File of raw uint16, in which a document ends with `eod_id`."""
    tokens = _raw_uint16(path)
    ends = _positions(tokens, eod_id) + 1
    if not len(ends):
        raise ValueError(f"{path} holds no end-of-document token {eod_id}: is --tokenizer_dir the one that made it?")
    return TokenFile(path, tokens, np.unique(np.concatenate([[0], ends, [len(tokens)]])))


def open_llama2c(path: Path, bos_id: int) -> TokenFile:
    """File of raw uint16, in which a document begins with `bos_id`."""
    tokens = _raw_uint16(path)
    begins = _positions(tokens, bos_id)
    if not len(begins):
        raise ValueError(f"{path} holds no token {bos_id} to begin a document with: choose it with --bos_id")
    return TokenFile(path, tokens, np.unique(np.concatenate([[0], begins, [len(tokens)]])))


def open_megatron(path: Path) -> TokenFile:
    """Megatron-LM's indexed dataset. The .idx holds the tokens' type, the length and the first byte of each sequence,
    and the sequence at which each document begins.

    Raises:
        ValueError: one of the two files is missing or damaged.
    """
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    bin_path, idx_path = stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx")
    _require_file(idx_path)
    _require_file(bin_path)
    raw = idx_path.read_bytes()
    if raw[:9] != _MEGATRON_MAGIC or len(raw) < 34 or int.from_bytes(raw[9:17], "little") != 1:
        raise ValueError(f"{idx_path} is not a Megatron index of version 1")
    sequences, boundaries = (int.from_bytes(raw[start : start + 8], "little") for start in (18, 26))
    dtype = _MEGATRON_DTYPES.get(raw[17])
    size_of_index = 34 + 12 * sequences + 8 * boundaries
    if dtype is None or len(raw) < size_of_index or boundaries < 1:
        raise ValueError(f"{idx_path} is damaged")
    lengths = np.frombuffer(raw, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    first_sequences = np.frombuffer(raw, "<i8", boundaries, 34 + 12 * sequences)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    item = np.dtype(dtype).itemsize
    if (lengths < 0).any():
        raise ValueError(f"{idx_path} is damaged: it has sequences of negative length")
    if bin_path.stat().st_size != starts[-1] * item or not np.array_equal(pointers, starts[:-1] * item):
        raise ValueError(f"{bin_path} does not hold what {idx_path.name} says: sequences one after another")
    if first_sequences[0] != 0 or first_sequences[-1] != sequences or (np.diff(first_sequences) < 0).any():
        raise ValueError(f"{idx_path} is damaged: its documents are out of order")
    tokens = np.memmap(bin_path, dtype=dtype, mode="r") if starts[-1] else np.empty(0, dtype)
    return TokenFile(bin_path, tokens, np.unique(starts[first_sequences]))


def _require_file(path: Path) -> None:
    if not path.exists():
        raise ValueError(absent(path))


def _raw_uint16(path: Path) -> np.ndarray:
    _require_file(path)
    size = path.stat().st_size
    if not size or size % 2:
        raise ValueError(f"{path} holds {size} bytes, which are not uint16 tokens")
    return np.memmap(path, dtype="<u2", mode="r")


def _positions(tokens: np.ndarray, token_id: int) -> np.ndarray:
    """Positions of a token, int64. A large file is searched in parts."""
    parts = [
        np.flatnonzero(tokens[start : start + _SCAN_TOKENS] == token_id) + start
        for start in range(0, len(tokens), _SCAN_TOKENS)
    ]
    return np.concatenate(parts).astype(np.int64)


def documents_of(file: TokenFile, eod_id: int, bos_id: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Documents that are not empty, as (position of the first token, ids), without the tokens that mark their ends."""
    for begin, end in itertools.pairwise(file.bounds.tolist()):
        ids = np.asarray(file.tokens[begin:end], np.int64)
        if len(ids) and bos_id is not None and ids[0] == bos_id:
            ids = ids[1:]
        if len(ids) and ids[-1] == eod_id:
            ids = ids[:-1]
        if len(ids):
            yield begin, ids


def import_tokens(
    inputs: dict[str, list[TokenFile]], tokenizer: Tokenizer, output: Path, valid_ratio: float, shard_tokens: int,
    bos_id: int | None,
) -> dict:  # fmt: skip
    """Write shards and their manifest into a directory that nobody else writes to, see sole_writer.

    Args:
        inputs: set -> files. "train" and "valid", or "train" alone to hold out a share of its documents.
        shard_tokens: number of tokens after which a shard ends.
    Raises:
        ValueError: tokens outside the vocabulary, special ones inside a document, or a set without documents.
    """
    parts: list[PartRecord] = []
    for split, files in inputs.items():
        for file in files:
            documents = _checked(documents_of(file, tokenizer.eod_id, bos_id), file, tokenizer)
            options = f"{sha256_of_file(file.path)} {tokenizer.fingerprint} {split} {valid_ratio} {shard_tokens}"
            name = hashlib.sha256(options.encode()).hexdigest()[:16]
            for number, part in enumerate(_parts(documents, shard_tokens)):
                with PartWriter(output, f"{name}-{number}", tokenizer, valid_ratio) as shards:
                    for begin, ids, text_bytes in part:
                        chosen = split if inputs.get("valid") else set_of(ids.astype("<u4").tobytes(), valid_ratio)
                        shards.add_document(chosen, ids, text_bytes, (file.path.name, "token"), begin)
                parts.append(PartRecord(shards.names, items=0, is_last=False, totals=shards.totals()))
    return write_manifest(output, tokenizer, valid_ratio, parts, inputs["train"][0].path)


CheckedDocument = tuple[int, np.ndarray, int]


def _checked(
    documents: Iterator[tuple[int, np.ndarray]], file: TokenFile, tokenizer: Tokenizer
) -> Iterator[CheckedDocument]:
    """Documents as (position, ids, bytes of text), each checked to hold only ids that stand for text."""
    lengths = np.array(tokenizer.token_byte_lengths())
    special = np.zeros(tokenizer.vocab_size, bool)
    special[list(tokenizer.special_ids.values())] = True
    for begin, ids in documents:
        if ids.min() < 0 or ids.max() >= tokenizer.vocab_size or special[ids].any():
            raise ValueError(
                f"{file.path}, document at token {begin}: holds ids that are special or outside the tokenizer's "
                f"{tokenizer.vocab_size} entries: is --tokenizer_dir the one that made it?"
            )
        yield begin, ids, int(lengths[ids].sum())


def _parts(documents: Iterator[CheckedDocument], shard_tokens: int) -> Iterator[Iterator[CheckedDocument]]:
    """Documents in parts that end once they hold `shard_tokens`. Each part must be used up before the next."""

    def part(first: CheckedDocument) -> Iterator[CheckedDocument]:
        tokens = 0
        for document in itertools.chain([first], documents):
            yield document
            tokens += len(document[1]) + 1
            if tokens >= shard_tokens:
                return

    while (first := next(documents, None)) is not None:
        yield part(first)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data_preprocess.import_tokens", description="Take over token files of other programs."
    )
    parser.add_argument("--format", choices=["nanogpt", "llama2c", "megatron"], required=True)
    parser.add_argument("--input", type=a_path, nargs="+", required=True, help="token files")
    parser.add_argument("--valid_input", type=a_path, nargs="+", default=[], help="token files of the validation set")
    parser.add_argument("--tokenizer_dir", type=a_path, required=True, help="the tokenizer that made them")
    parser.add_argument("--output_dir", type=a_path, required=True, help="where the .bin files go")
    parser.add_argument("--valid_ratio", type=float, help="share of documents held out, without --valid_input (0.01)")
    parser.add_argument("--bos_id", type=int, help="token that begins a document (llama2c: 1)")
    parser.add_argument("--shard_tokens", type=int, default=50_000_000, help="tokens in a shard (default: 50000000)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        if args.valid_input and args.valid_ratio is not None:
            raise ValueError("give --valid_input or --valid_ratio, not both")
        ratio = 0.01 if args.valid_ratio is None else args.valid_ratio
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"--valid_ratio must be at least 0 and below 1, got {ratio}")
        if args.shard_tokens < 1:
            raise ValueError(f"--shard_tokens must be positive, got {args.shard_tokens}")
        tokenizer = load_tokenizer(args.tokenizer_dir)
        bos_id = 1 if args.bos_id is None and args.format == "llama2c" else args.bos_id
        openers = {
            "nanogpt": lambda path: open_nanogpt(path, tokenizer.eod_id),
            "llama2c": lambda path: open_llama2c(path, bos_id),
            "megatron": open_megatron,
        }
        inputs = {
            split: [openers[args.format](Path(name)) for name in names]
            for split, names in (("train", args.input), ("valid", args.valid_input))
        }
        if args.valid_input:
            sizes = {split: sum(len(file.tokens) for file in files) for split, files in inputs.items()}
            ratio = sizes["valid"] / max(sum(sizes.values()), 1)
        with sole_writer(Path(args.output_dir)):
            manifest = import_tokens(inputs, tokenizer, Path(args.output_dir), ratio, args.shard_tokens, bos_id)
    except (ValueError, OSError) as error:
        print(f"import_tokens: {error}", file=sys.stderr)
        return 2
    print_summary(manifest, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)

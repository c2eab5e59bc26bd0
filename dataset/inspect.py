"""Look at pretokenized data: statistics, and the real content of a sample.

python -m dataset.inspect RUN_OR_DIR                  statistics
python -m dataset.inspect RUN_OR_DIR --sample N       also sample N, decoded, with its documents and their files
python -m dataset.inspect RUN --position P            also the sample that the run takes at position P of its stream
python -m dataset.inspect RUN_OR_DIR --verify         read all tokens, and compare them with the shards' checksums

A mixture (mixture_spec.py) is shown source by source, a position of it in the source that it comes from.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.format import (
    BUILD_INDEX_COMMAND,
    MANIFEST_NAME,
    SPLITS,
    DocumentTable,
    index_path,
    read_document_table,
    read_index,
    require_pretokenized,
)
from dataset.mixture_spec import is_mixture, read_mixture
from dataset.opening import kind_of, mixture_of_record
from dataset.order import sample_at
from dataset.pretrain import IGNORE_INDEX, PretrainDataset
from dataset.sequences import read_manifest
from dataset.trained_on import is_run, read_trained_on
from runs.layout import RunPaths
from runs.reslog import read_reslog
from tokenizer import Tokenizer, load_tokenizer
from utils.arguments import Parser
from utils.paths import a_path, absent
from utils.terminal import run_main

_BAR_WIDTH = 40


@dataclass(frozen=True)
class DocumentPart:
    """Part of a document that lies in a sample."""

    source: str
    """Origin of the document, as text."""
    begin: int
    end: int
    """Tokens [begin, end) of the sample's row."""
    skipped: int
    """Number of the document's tokens before the sample."""


def place_of(table: DocumentTable, document: int) -> str:
    """Origin of a document: "a.jsonl, byte 17", "a.parquet, row 3", or just the path."""
    path, counts = table.sources[table.files[document]]
    return f"{path}, {counts} {table.records[document]}" if counts else path or "unknown"


class Inspection:
    """One set of a data directory, opened to be looked at.

    Raises:
        ValueError: files are missing, damaged, or of another tokenizer.
    """

    def __init__(self, data_dir: Path, split: str, max_seq_len: int, tokenizer: Tokenizer):
        self._data_dir, self.split, self.tokenizer = data_dir, split, tokenizer
        self.dataset = PretrainDataset(data_dir, split, max_seq_len)
        self.dataset.check(tokenizer.fingerprint)
        self.index = read_index(data_dir, split, max_seq_len)
        self.tables = [read_document_table(data_dir / name) for name in self.index.file_names]
        for name, table, header in zip(self.index.file_names, self.tables, self.dataset.headers):
            table.check_content(data_dir / name, header.num_tokens)
        self.bounds = np.cumsum([0, *(header.num_tokens for header in self.dataset.headers)], dtype=np.int64)

    def verify(self) -> Iterator[str]:
        """Read and check every shard of the set.

        Raises:
            ValueError: the tokens are not those that were written.
        """
        self.dataset.check_content()
        yield f"{self.split}: the tokens of all {len(self.dataset.headers)} shards are those that were written"

    def statistics(self) -> Iterator[str]:
        """Lines about the whole set."""
        headers, tables = self.dataset.headers, self.tables
        documents = sum(header.num_documents for header in headers)
        tokens, text_bytes = int(self.bounds[-1]), sum(header.text_bytes for header in headers)
        files = len({source for table in tables for source in table.sources})
        lengths = np.concatenate(
            [np.diff(table.starts, append=header.num_tokens) for table, header in zip(tables, headers)]
        )
        yield (
            f"{self.split}: {documents:,} documents of {files:,} files, {text_bytes / 1e6:,.1f} MB, {tokens:,} tokens "
            f"({text_bytes / tokens:.2f} bytes a token) in {len(headers)} shards"
        )
        yield (
            f"{len(self.dataset):,} samples of {self.index.max_seq_len} tokens; tokens of a document: median "
            f"{np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, longest {lengths.max():,}"
        )
        yield from _histogram(lengths)

    def parts(self, sample: int) -> list[DocumentPart]:
        """Parts of documents that make up a sample's max_seq_len + 1 tokens."""
        file, offset = self.index.rows[sample].tolist()
        position, left = int(self.bounds[file]) + offset, self.index.max_seq_len + 1
        parts: list[DocumentPart] = []
        begin = 0
        while left:
            file = int(np.searchsorted(self.bounds, position, side="right")) - 1
            table, inside = self.tables[file], position - int(self.bounds[file])
            document = int(np.searchsorted(table.starts, inside, side="right")) - 1
            ends = [*table.starts[document + 1 : document + 2].tolist(), self.dataset.headers[file].num_tokens]
            length = min(ends[0] - inside, left)
            skipped = inside - int(table.starts[document])
            parts.append(DocumentPart(place_of(table, document), begin, begin + length, skipped))
            begin, position, left = begin + length, position + length, left - length
        return parts

    def sample(self, number: int) -> Iterator[str]:
        """Lines about one sample.

        Raises:
            ValueError: there is no such sample.
        """
        if not 0 <= number < len(self.dataset):
            raise ValueError(f"there is no sample {number}: the {self.split} set has 0 to {len(self.dataset) - 1}")
        row = self.dataset.read_rows(np.array([number]))[0]
        labels = self.dataset.collate(np.array([number]))["labels"][0]
        file, offset = self.index.rows[number].tolist()
        yield (
            f"sample {number}: {self.index.file_names[file]} from token {offset}; "
            f"{int((labels != IGNORE_INDEX).sum())} of {self.index.max_seq_len} positions are supervised"
        )
        for part in self.parts(number):
            begins = f", from its token {part.skipped} on" if part.skipped else ""
            yield f"--- {part.source}{begins}: {part.end - part.begin} tokens"
            yield self.tokenizer.decode(row[part.begin : part.end].tolist())


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """Histogram of the documents' lengths, in powers of two, with the share of all tokens in each class."""
    exponents = np.floor(np.log2(lengths)).astype(np.int64)
    counts, tokens = np.bincount(exponents), np.bincount(exponents, weights=lengths)
    yield f"{'tokens':>22s} {'documents':>12s}  share of all tokens"
    for exponent in range(int(exponents.min()), len(counts)):
        share = tokens[exponent] / lengths.sum()
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        bar = "#" * round(_BAR_WIDTH * share)
        yield f"{f'{low:,} to {high:,}':>22s} {counts[exponent]:12,d}  {share:6.1%} {bar}".rstrip()


def _only_length(data_dir: Path) -> int:
    """The max_seq_len of the only index in a directory.

    Raises:
        ValueError: there is no index, or more than one.
    """
    require_pretokenized(data_dir)
    pattern = index_path(data_dir, "train", 0).name.replace("0", "*")
    lengths = sorted(int(path.stem.rpartition("-")[2]) for path in data_dir.glob(pattern))
    if not lengths:
        raise ValueError(
            f"{data_dir} has no index: run `{BUILD_INDEX_COMMAND} --data_dir {data_dir} --max_seq_len 1024`"
        )
    if len(lengths) > 1:
        raise ValueError(
            f"{data_dir} has indexes for several lengths: choose --max_seq_len {lengths[0]} or {lengths[1]}"
        )
    return lengths[0]


def _require_pretraining(data_dir: Path) -> None:
    """Raise ValueError for tokens of another task."""
    if (data_dir / MANIFEST_NAME).exists() and read_manifest(data_dir).get("task", "pretrain") != "pretrain":
        raise ValueError(f"{data_dir} holds conversations: look at it with `python -m dataset.show_mask {data_dir}`")


def open_inspection(
    path: Path, split: str, max_seq_len: int, tokenizer_dir: str | None
) -> tuple[Inspection, int | None]:
    """Set of a run or of a data directory, and the run's seed.

    Raises:
        ValueError: see Inspection.
    """
    if is_run(path):
        run = read_trained_on(path)
        if kind_of(run.dirs[split]) != "pretrain":
            raise ValueError(
                f"{path} is a run of {run.task}: look at its data with `python -m dataset.show_mask {path}`"
            )
        tokenizer = load_tokenizer(tokenizer_dir or run.tokenizer_dir)
        return Inspection(run.dirs[split], split, max_seq_len or run.max_seq_len, tokenizer), run.seed
    if not path.exists():
        raise ValueError(absent(path))
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give a run, or a directory with .bin files")
    _require_pretraining(path)
    length = max_seq_len or _only_length(path)
    return Inspection(path, split, length, load_tokenizer(tokenizer_dir or path / "tokenizer")), None


def mixture_of(path: Path, split: str) -> Path | None:
    """The mixture that a run was trained on, or that a path stands for; None: it is a directory."""
    found = read_trained_on(path).dirs[split] if is_run(path) else path
    return found if is_mixture(found) else None


def place_in_mixture(run_dir: Path, position: int) -> tuple[str, Path, int]:
    """Name and directory of the source that stands at a position of a run's stream, and the number of its sample.

    Raises:
        ValueError: the stream has no such position.
    """
    run = read_trained_on(run_dir)
    records = read_reslog(RunPaths(run_dir).reslog)
    # A later launch may have begun again at an earlier position.
    starts = [r for r in records if r["name"] == "start" and "mixture" in r and r["samples_consumed"] <= position]
    if not starts or position < 0:
        raise ValueError(f"position {position} of {run_dir} lies before its mixture: give the directory and --seed")
    mixture = mixture_of_record(starts[-1], run.dirs["train"])
    mixture.take(starts[-1]["mixture"])
    ids = mixture.ids_at(run.seed, np.array([position]))
    if ids[0] < 0:
        raise ValueError(f"the mixture of {run_dir} ends before position {position}")
    number = int(mixture.sources_of(ids)[0])
    source, before = mixture.spec.sources[number], sum(len(part) for part in mixture.parts[:number])
    return source.name, source.path, int(ids[0]) - before


def look_at_mixture(
    path: Path, mixture: Path, split: str, max_seq_len: int, tokenizer_dir: str | None, verify: bool,
    position: int | None,
) -> Iterator[str]:  # fmt: skip
    """Lines about a mixture: all of its sources, or the sample at a position.

    Raises:
        ValueError: see Inspection.
    """
    length = max_seq_len or (read_trained_on(path).max_seq_len if is_run(path) else 0)
    if position is None:
        for source in read_mixture(mixture).sources:
            yield f"source {source.name}, {source.path}"
            inspection, _ = open_inspection(source.path, split, length, tokenizer_dir)
            yield from inspection.verify() if verify else inspection.statistics()
        return
    if not is_run(path):
        raise ValueError(f"--position of a mixture needs a run, which knows its shares: {path} is none")
    name, directory, sample = place_in_mixture(path, position)
    yield f"position {position} is sample {sample} of {name}, {directory}"
    yield from open_inspection(directory, split, length, tokenizer_dir)[0].sample(sample)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m dataset.inspect", description="Look at pretokenized data.")
    parser.add_argument("path", type=a_path, help="run directory, or directory with .bin and .ibin files")
    parser.add_argument("--sample", type=int, help="show this sample of the set")
    parser.add_argument("--position", type=int, help="show the sample at this position of the run's stream")
    parser.add_argument("--verify", action="store_true", help="compare all tokens with the shards' checksums")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--max_seq_len", type=int, default=0, help="length of the index (default: the run's, or that of the only one)"
    )
    parser.add_argument("--tokenizer_dir", type=a_path, help="default: the run's, or the one beside the data")
    parser.add_argument("--seed", type=int, help="key of the order, for --position in a data directory")
    args = parser.parse_args(argv)
    try:
        if mixture := mixture_of(Path(args.path), args.split):
            if args.sample is not None:
                raise ValueError(f"{mixture} is a mixture: give the directory of the source whose sample you mean")
            if args.position is not None and args.split != "train":
                raise ValueError("--position is of the train set's stream: leave out --split")
            shown = look_at_mixture(
                Path(args.path), mixture, args.split, args.max_seq_len, args.tokenizer_dir, args.verify, args.position
            )
            print("\n".join(list(shown)))
            return 0
        inspection, seed = open_inspection(Path(args.path), args.split, args.max_seq_len, args.tokenizer_dir)
        chosen = args.sample
        if args.position is not None:
            seed = args.seed if args.seed is not None else seed
            if chosen is not None:
                raise ValueError("--position and --sample both choose a sample: give only one")
            if args.split != "train":
                raise ValueError("--position is of the train set's stream: leave out --split, or give --sample")
            if seed is None:
                raise ValueError(f"--position needs --seed, as {args.path} is not a run, which would know its own")
            chosen = int(sample_at(seed, args.position, len(inspection.dataset)))
        if args.verify:
            lines = list(inspection.verify())
        else:
            lines = list(inspection.statistics() if chosen is None else inspection.sample(chosen))
    except (ValueError, OSError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)

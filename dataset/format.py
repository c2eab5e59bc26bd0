"""Token files on disk.

`.bin`   a 256-byte header, then raw little-endian tokens (uint16 while the vocabulary fits, else uint32). Every
         document ends with one end-of-document token, which ordinary text can never produce.
`.docs`  beside each `.bin`: for each document the position of its first token, int64, and its origin: its number in
         its file, uint64, and the file, uint32, as an entry of the table of [path, what is counted] at the end.
`.ibin`  the sample index of one set (train or valid) and one max_seq_len: the `.bin` files that it maps, then one row
         (file, offset) for each sample. Sample i starts at token i * max_seq_len of the concatenated files and reads
         max_seq_len + 1 tokens, so that its last input has a label. It may cross into the next file.

A file's fingerprint is the sha256 of its header, which holds the sha256 of its tokens: computed once, when written.
"""

import dataclasses
import hashlib
import json
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import atomic_write, fsync_dir, sha256_of_file
from utils.paths import absent

BIN_MAGIC, DOCS_MAGIC, INDEX_MAGIC = b"Z2ALLBIN", b"Z2ALLDOC", b"Z2ALLIDX"
VERSION, DOCS_VERSION = 1, 2
SPLITS = ("train", "valid")
MANIFEST_NAME = "pretokenize.json"
TOKEN_FILE_SUFFIXES = (".bin", ".docs", ".ibin", ".safetensors")

_BIN_STRUCT = struct.Struct("<8sII QQQQ d Q 8s 32s 32s")
BIN_HEADER_BYTES = 256
_DOCS_STRUCT = struct.Struct("<8sIIQ32s")
_DOCUMENT_BYTES = 8 + 8 + 4
_INDEX_STRUCT = struct.Struct("<8sII32s")
INDEX_ROW = np.dtype([("file", "<u4"), ("offset", "<u8")])

PRETOKENIZE_COMMAND = "python -m data_preprocess.pretokenize_pretrain_data"
BUILD_INDEX_COMMAND = "python -m data_preprocess.build_pretrain_sample_index_map"


def read_manifest_of(data_dir: Path, command: str) -> dict:
    """Manifest of a pretokenized directory. It has at least `shards`, the file names of each set, and `valid_ratio`;
    for SFT and DPO also `task` and `options`.

    Args:
        command: command that makes the directory again.
    Raises:
        ValueError: it is missing or damaged.
    """
    path = data_dir / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if _is_manifest(manifest):
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{data_dir} is not pretokenized: run `{command}`") from None
    except (ValueError, RecursionError, IsADirectoryError):
        pass
    raise ValueError(f"{path} is damaged: run `{command}` again")


def _is_manifest(value: object) -> bool:
    """Whether a value has the entries that are used later, with the right types."""
    if not isinstance(value, dict) or not isinstance(value.get("shards"), dict):
        return False
    sets = [value["shards"].get(split) for split in SPLITS]
    ratio, options = value.get("valid_ratio"), value.get("options", {})
    return (
        all(isinstance(names, list) and all(map(_is_file_name, names)) for names in sets)
        and isinstance(ratio, int | float)
        and 0 <= ratio <= 1
        and isinstance(value.get("task", ""), str)
        and isinstance(options, dict)
        and isinstance(options.get("max_seq_len", 0), int)
    )


def _is_file_name(value: object) -> bool:
    """Whether a value names a file inside a directory."""
    return isinstance(value, str) and value != ".." and Path(value).name == value and "\0" not in value


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class BinHeader:
    """Header of a `.bin` file."""

    vocab_size: int
    eod_id: int
    """Id of the end-of-document token."""
    tokenizer_fingerprint: str
    """Hex sha256."""
    split: str
    """"train" or "valid"."""
    valid_ratio: float
    """Share of the documents that went to the validation set."""
    num_tokens: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the text that was tokenized."""
    content_sha256: str = "00" * 32
    """Hex sha256 of the tokens' bytes."""

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def pack(self) -> bytes:
        return _BIN_STRUCT.pack(
            BIN_MAGIC, VERSION, self.dtype.itemsize, self.num_tokens, self.vocab_size, self.num_documents,
            self.eod_id, self.valid_ratio, self.text_bytes, self.split.encode(),
            bytes.fromhex(self.tokenizer_fingerprint), bytes.fromhex(self.content_sha256),
        ).ljust(BIN_HEADER_BYTES, b"\0")  # fmt: skip

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.pack()).hexdigest()


def require_made_with(
    what: object, command: str, tokenizers: tuple[str, str], valid_ratio: float, expected_ratio: float | None
) -> None:
    """Check that a pretokenized set was made with a tokenizer and a share of documents held out.

    Args:
        what: name of the set in messages.
        command: command that makes it again.
        tokenizers: fingerprints of the tokenizer that made it, and of the one that it is used with.
        expected_ratio: share of the documents held out that the user expects; None expects nothing.
    Raises:
        ValueError: the set was made with another tokenizer, or with another share held out.
    """
    if tokenizers[0] != tokenizers[1]:
        raise ValueError(
            f"{what} was tokenized with another tokenizer: give its --tokenizer_dir, or run `{command}` again"
        )
    if expected_ratio is not None and abs(expected_ratio - valid_ratio) > 1e-9:
        raise ValueError(
            f"--valid_ratio={expected_ratio} contradicts the data, which was pretokenized with {valid_ratio}: leave it "
            f"out, or pretokenize again"
        )


def read_bin_header(path: Path) -> BinHeader:
    """Header of a `.bin` file, checked against the file's size.

    Raises:
        ValueError: not a `.bin` of ours, another version, or truncated; the sentence says what to run.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            raw = file.read(BIN_HEADER_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `{PRETOKENIZE_COMMAND}` again") from None
    except IsADirectoryError:
        raw = b""
    if len(raw) < BIN_HEADER_BYTES or raw[:8] != BIN_MAGIC:
        raise ValueError(f"{path} is not a zero2all .bin file: make one with `{PRETOKENIZE_COMMAND}`")
    (_, version, token_bytes, num_tokens, vocab_size, num_documents, eod_id, valid_ratio, text_bytes, split,
     tokenizer, content) = _BIN_STRUCT.unpack(raw[: _BIN_STRUCT.size])  # fmt: skip
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version}, this program reads {VERSION}: run `{PRETOKENIZE_COMMAND}`"
        )
    expected = BIN_HEADER_BYTES + num_tokens * token_bytes
    if size != expected:
        raise ValueError(
            f"{path} holds {size} bytes where its header promises {expected}: "
            f"it is damaged, delete it and run `{PRETOKENIZE_COMMAND}` again"
        )
    # The header holds the tokens' size, too, so that a damaged vocabulary size cannot change how they are read.
    if split.rstrip(b"\0") not in map(str.encode, SPLITS) or token_bytes != token_dtype(vocab_size).itemsize:
        raise ValueError(f"{path} has a damaged header: delete it and run `{PRETOKENIZE_COMMAND}` again")
    return BinHeader(
        vocab_size=vocab_size, eod_id=eod_id, tokenizer_fingerprint=tokenizer.hex(),
        split=split.rstrip(b"\0").decode(), valid_ratio=valid_ratio, num_tokens=num_tokens,
        num_documents=num_documents, text_bytes=text_bytes, content_sha256=content.hex(),
    )  # fmt: skip


def map_tokens(path: Path, header: BinHeader) -> np.ndarray:
    """Read-only memory map of the tokens, shape (num_tokens,)."""
    if header.num_tokens == 0:
        return np.empty(0, header.dtype)
    return np.memmap(path, dtype=header.dtype, mode="r", offset=BIN_HEADER_BYTES, shape=(header.num_tokens,))


class BinWriter:
    """Writer of one `.bin` and its `.docs`. The files appear under their names when `close()` returns, or never.

    As a context manager it closes on success and removes its temporary file on an exception.
    """

    def __init__(self, path: Path, header: BinHeader):
        self.path, self.header = path, header
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._file = open(self._temporary, "wb")
        self._file.write(b"\0" * BIN_HEADER_BYTES)
        self._hash = hashlib.sha256()
        self._starts, self._records, self._files = array("q"), array("Q"), array("I")
        self._sources: dict[tuple[str, str], int] = {}
        self._num_tokens = self._text_bytes = 0
        self._inside_document = False

    def add_document(
        self,
        ids: list[int] | np.ndarray,
        text_bytes: int,
        source: tuple[str, str] = ("", ""),
        record: int = 0,
        continued: bool = False,
    ) -> None:
        """Append a document's tokens. Its end-of-document token is added here.

        Args:
            source: the file of its origin, and what `record` counts in it, such as "byte" or "row".
            record: number of the document in that file.
            continued: whether the next call brings more of the same document.
        Raises:
            ValueError: a token is outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.header.vocab_size:
            raise ValueError(f"a document holds token ids outside the vocabulary of {self.header.vocab_size} entries")
        tokens = np.empty(len(ids) + (not continued), self.header.dtype)
        tokens[: len(ids)] = ids
        tokens[len(ids) :] = self.header.eod_id
        raw = tokens.tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        if not self._inside_document:
            self._starts.append(self._num_tokens)
            self._records.append(record)
            self._files.append(self._sources.setdefault(source, len(self._sources)))
        self._inside_document = continued
        self._num_tokens += len(tokens)
        self._text_bytes += text_bytes

    def close(self) -> BinHeader:
        header = dataclasses.replace(
            self.header,
            num_tokens=self._num_tokens,
            num_documents=len(self._starts),
            text_bytes=self._text_bytes,
            content_sha256=self._hash.hexdigest(),
        )
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        table = json.dumps(list(self._sources), ensure_ascii=False).encode("utf-8", "surrogateescape")
        columns = [np.asarray(self._starts, "<i8"), np.asarray(self._records, "<u8"), np.asarray(self._files, "<u4")]
        lead = _docs_lead(header, len(table))
        atomic_write(docs_path(self.path), b"".join([lead, *(column.tobytes() for column in columns), table]))
        os.replace(self._temporary, self.path)
        fsync_dir(self.path.parent)
        self.header = header
        return header

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "BinWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()


def docs_path(bin_path: Path) -> Path:
    return bin_path.with_suffix(".docs")


def _docs_lead(header: BinHeader, table_bytes: int) -> bytes:
    fingerprint = bytes.fromhex(header.fingerprint)
    return _DOCS_STRUCT.pack(DOCS_MAGIC, DOCS_VERSION, table_bytes, header.num_documents, fingerprint)


@dataclass(frozen=True)
class DocumentTable:
    """Places and origins of the documents of a `.bin`. All arrays have the shape (num_documents,)."""

    starts: np.ndarray
    """Position of the first token, int64."""
    records: np.ndarray
    """Number of the document in its file, uint64."""
    files: np.ndarray
    """Index of the document's file in `sources`, uint32."""
    sources: tuple[tuple[str, str], ...]
    """(path below the corpus, what a record number counts in the file, "" if the file is the document)."""

    def check_content(self, bin_path: Path, num_tokens: int) -> None:
        """Read and check the whole table.

        Raises:
            ValueError: the documents do not fill a `.bin` of so many tokens, or come from files that are not named.
        """
        begins = np.concatenate([self.starts, [num_tokens]])
        in_order = begins[0] == 0 and (np.diff(begins) > 0).all() if len(self.starts) else not num_tokens
        if not in_order or (len(self.files) and self.files.max() >= len(self.sources)):
            raise ValueError(_damaged_docs(bin_path))


def _damaged_docs(bin_path: Path) -> str:
    return (
        f"{docs_path(bin_path)} is missing, damaged, or does not belong to {bin_path.name}: "
        f"delete both and run `{PRETOKENIZE_COMMAND}` again"
    )


def read_document_table(bin_path: Path) -> DocumentTable:
    """Table of the documents of a `.bin`, as memory maps of its `.docs`.

    Raises:
        ValueError: the `.docs` is missing, damaged, or of another `.bin`; the sentence says what to run.
    """
    header, path = read_bin_header(bin_path), docs_path(bin_path)
    count = header.num_documents
    columns_end = _DOCS_STRUCT.size + _DOCUMENT_BYTES * count
    lead = table = b""
    if path.is_file() and columns_end <= path.stat().st_size:
        with open(path, "rb") as file:
            lead = file.read(_DOCS_STRUCT.size)
            file.seek(columns_end)
            table = file.read()
    if lead != _docs_lead(header, len(table)):
        raise ValueError(_damaged_docs(bin_path))
    if not count:
        return DocumentTable(np.empty(0, "<i8"), np.empty(0, "<u8"), np.empty(0, "<u4"), ())

    def column(dtype: str, start: int) -> np.ndarray:
        return np.memmap(path, dtype=dtype, mode="r", offset=_DOCS_STRUCT.size + start * count, shape=(count,))

    try:
        sources = tuple(
            (str(name), str(counts)) for name, counts in json.loads(table.decode("utf-8", "surrogateescape"))
        )
    except (ValueError, TypeError, RecursionError):
        raise ValueError(_damaged_docs(bin_path)) from None
    return DocumentTable(column("<i8", 0), column("<u8", 8), column("<u4", 16), sources)


def index_path(data_dir: Path, split: str, max_seq_len: int) -> Path:
    return Path(data_dir) / f"{split}-{max_seq_len}.ibin"


@dataclass(frozen=True)
class SampleIndex:
    """An open sample index. `rows` is a read-only memory map with one INDEX_ROW for each sample."""

    max_seq_len: int
    split: str
    file_names: tuple[str, ...]
    file_fingerprints: tuple[str, ...]
    rows: np.ndarray
    fingerprint: str
    """Hex sha256 of the header, which identifies the data and their cut into samples."""


def write_index(data_dir: Path, split: str, max_seq_len: int, names: list[str]) -> Path:
    """Build the `.ibin` of one set from its `.bin` files, in the given order.

    Raises:
        ValueError: a file is damaged, the files disagree, or together hold fewer than max_seq_len + 1 tokens.
    """
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len must be at least 1, got {max_seq_len}")
    headers = [read_bin_header(Path(data_dir) / name) for name in names]
    for name, header in zip(names, headers):
        if (header.tokenizer_fingerprint, header.split) != (headers[0].tokenizer_fingerprint, split):
            raise ValueError(
                f"{name} was made with another tokenizer or for another set than {names[0]}: "
                f"run `{PRETOKENIZE_COMMAND}` again"
            )
    # int64 bounds: bounds[k] is the position of file k's first token in the concatenation of all
    bounds = np.concatenate([[0], np.cumsum([header.num_tokens for header in headers], dtype=np.int64)])
    num_samples = int(bounds[-1] - 1) // max_seq_len if names else 0
    if num_samples < 1:
        raise ValueError(
            f"the {split} set of {data_dir} holds {int(bounds[-1])} tokens, fewer than one sample of "
            f"max_seq_len + 1 = {max_seq_len + 1}: use more data or a smaller --max_seq_len"
            + (", or another --valid_ratio" if split == "valid" else "")
        )
    starts = np.arange(num_samples, dtype=np.int64) * max_seq_len
    rows = np.empty(num_samples, INDEX_ROW)
    rows["file"] = np.searchsorted(bounds, starts, side="right") - 1
    rows["offset"] = starts - bounds[rows["file"]]
    raw_rows = rows.tobytes()
    meta = json.dumps(
        {
            "max_seq_len": max_seq_len,
            "split": split,
            "num_samples": num_samples,
            "files": [{"name": name, "fingerprint": h.fingerprint} for name, h in zip(names, headers)],
            "rows_sha256": hashlib.sha256(raw_rows).hexdigest(),
        }
    ).encode()
    path = index_path(data_dir, split, max_seq_len)
    lead = _INDEX_STRUCT.pack(INDEX_MAGIC, VERSION, len(meta), hashlib.sha256(meta).digest())
    atomic_write(path, lead + meta + raw_rows)
    return path


def require_pretokenized(data_dir: Path, max_seq_len: int = 1024) -> None:
    """Check that a directory was pretokenized.

    Args:
        max_seq_len: length in the advised command that builds an index.
    Raises:
        ValueError: tokens are missing; the sentence gives the commands that make them.
    """
    if not Path(data_dir).is_dir():
        is_there = Path(data_dir).exists()
        raise ValueError(f"{data_dir} is not a directory" if is_there else f"the data directory {absent(data_dir)}")
    names = [path.name for path in data_dir.iterdir()]
    if MANIFEST_NAME in names or any(name.endswith(".ibin") for name in names):
        return
    if any(name.endswith(".bin") for name in names):
        raise ValueError(f"{data_dir / MANIFEST_NAME} is missing: run `{PRETOKENIZE_COMMAND}` again, it did not finish")
    raise ValueError(
        f"{data_dir} is not pretokenized: run `{PRETOKENIZE_COMMAND} --data_dir {data_dir} --tokenizer_dir T "
        f"--output_dir O` with a tokenizer T, then `{BUILD_INDEX_COMMAND} --data_dir O --max_seq_len {max_seq_len}`, "
        f"and give O"
    )


def read_index(data_dir: Path, split: str, max_seq_len: int) -> SampleIndex:
    """Open the `.ibin` of one set.

    Raises:
        ValueError: it is missing, damaged or foreign; the sentence gives the command that makes it.
    """
    require_pretokenized(data_dir, max_seq_len)
    path = index_path(data_dir, split, max_seq_len)
    rebuild = f"`{BUILD_INDEX_COMMAND} --data_dir {data_dir} --max_seq_len {max_seq_len}`"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run {rebuild}")
    with open(path, "rb") as file:
        raw = file.read(_INDEX_STRUCT.size)
        if len(raw) < _INDEX_STRUCT.size or raw[:8] != INDEX_MAGIC:
            raise ValueError(f"{path} is not a zero2all .ibin file: run {rebuild}")
        _, version, meta_bytes, meta_hash = _INDEX_STRUCT.unpack(raw)
        raw_meta = file.read(meta_bytes)
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, this program reads {VERSION}: run {rebuild}")
    start = _INDEX_STRUCT.size + meta_bytes
    if hashlib.sha256(raw_meta).digest() != meta_hash:
        raise ValueError(f"{path} is damaged: run {rebuild}")
    try:
        return _opened_index(path, start, json.loads(raw_meta), raw_meta, (split, max_seq_len), rebuild)
    except (LookupError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged: run {rebuild}") from None


def _opened_index(
    path: Path, start: int, meta: dict, raw_meta: bytes, wanted: tuple[str, int], rebuild: str
) -> SampleIndex:
    """Sample index of a file whose header was read.

    Args:
        start: byte at which the rows begin.
        wanted: the expected split and max_seq_len.
    """
    if (meta["split"], meta["max_seq_len"]) != wanted:
        raise ValueError(f"{path} was built for another set or length: run {rebuild}")
    expected = start + meta["num_samples"] * INDEX_ROW.itemsize
    if os.path.getsize(path) != expected:
        raise ValueError(f"{path} holds {os.path.getsize(path)} bytes instead of {expected}: run {rebuild}")
    names = tuple(entry["name"] for entry in meta["files"])
    if not names or not all(map(_is_file_name, names)) or sha256_of_file(path, start) != meta["rows_sha256"]:
        raise ValueError(f"{path} is damaged: run {rebuild}")
    return SampleIndex(
        max_seq_len=meta["max_seq_len"],
        split=meta["split"],
        file_names=names,
        file_fingerprints=tuple(entry["fingerprint"] for entry in meta["files"]),
        rows=np.memmap(path, dtype=INDEX_ROW, mode="r", offset=start, shape=(meta["num_samples"],)),
        fingerprint=hashlib.sha256(raw_meta).hexdigest(),
    )

"""Token sequences with supervised stretches on disk, for SFT and DPO.

A shard, `SET-NAME.safetensors`, holds flat arrays in the safetensors format, and is read through memory maps:

    tokens       uint16 or uint32 (num_tokens,)    all sequences, one after another
    supervised   uint8 (num_tokens,)               1 where the model learns to say the token
    starts       int64 (num_sequences + 1,)        first token of each sequence, and the end
    records      uint64 (num_sequences,)           number of the record in its file
    files        uint32 (num_sequences,)           file of the record, as an index of the header's sources

A sample of SFT is one sequence. A sample of DPO is two: the prompt with the chosen answer, then with the rejected one.
The fingerprint of a shard is the sha256 of its header, which holds the sha256 of the arrays.
"""

import hashlib
import json
import struct
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dataset.format import read_manifest_of, require_made_with, token_dtype
from utils.files import atomic_write

VERSION = 1
SEQUENCES_PER_SAMPLE = {"sft": 1, "dpo": 2}
PRETOKENIZE_SFT_COMMAND = "python -m data_preprocess.pretokenize_sft_data"
_HEADER_KEY = "zero2all"
_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8"}


@dataclass(frozen=True)
class SequenceHeader:
    """Header of a shard."""

    task: str
    """One of SEQUENCES_PER_SAMPLE."""
    split: str
    """"train" or "valid"."""
    max_seq_len: int
    """Positions of a sample: a sequence holds at most one token more."""
    vocab_size: int
    pad_id: int
    tokenizer_fingerprint: str
    """Hex sha256."""
    options: dict
    """Further options that decided the content."""
    sources: list[list[str]] = field(default_factory=list)
    """[path below the data directory, what a record number counts in this file]."""
    content_sha256: str = ""
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class SequenceWriter:
    """Writer of a shard. It collects the sequences in memory; `close` writes the file, whole or not at all."""

    def __init__(self, header: SequenceHeader):
        self.header = header
        self._tokens, self._supervised = array("I"), bytearray()
        self._starts, self._records, self._files = array("q", [0]), array("Q"), array("I")
        self._sources: dict[tuple[str, str], int] = {}

    def add(self, ids: list[int], supervised: list[bool], source: tuple[str, str], record: int) -> None:
        """Append a sequence.

        Args:
            source: the file of its origin, and what `record` counts in it.
        Raises:
            ValueError: a token is outside the vocabulary, or the sequence has the wrong length.
        """
        if not 2 <= len(ids) <= self.header.max_seq_len + 1 or len(ids) != len(supervised):
            raise ValueError(f"a sequence of {len(ids)} tokens does not fit {self.header.max_seq_len} positions")
        if not 0 <= min(ids) <= max(ids) < self.header.vocab_size:
            raise ValueError(f"a sequence holds token ids outside the vocabulary of {self.header.vocab_size} entries")
        self._tokens.extend(ids)
        self._supervised.extend(map(int, supervised))
        self._starts.append(len(self._tokens))
        self._records.append(record)
        self._files.append(self._sources.setdefault(source, len(self._sources)))

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def totals(self) -> dict[str, int]:
        return {
            "samples": len(self._records) // SEQUENCES_PER_SAMPLE[self.header.task],
            "tokens": len(self._tokens),
            "supervised_tokens": sum(self._supervised),
        }

    def close(self, path: Path) -> None:
        arrays = {
            "tokens": np.array(self._tokens, token_dtype(self.header.vocab_size)),
            "supervised": np.frombuffer(bytes(self._supervised), np.uint8),
            "starts": np.array(self._starts, "<i8"),
            "records": np.array(self._records, "<u8"),
            "files": np.array(self._files, "<u4"),
        }
        # A file's name may be invalid Unicode, which JSON can spell and safetensors' own strings cannot.
        sources = [list(source) for source in self._sources]
        header = replace(self.header, sources=sources, content_sha256=_sha256_of_arrays(arrays.values()))
        atomic_write(path, save(arrays, {_HEADER_KEY: json.dumps(asdict(header))}))


class SequenceShard:
    """An open shard.

    Raises:
        ValueError: it is missing, damaged or foreign; the sentence says what to run.
    """

    def __init__(self, path: Path):
        self.path = path
        again = f"run `{PRETOKENIZE_SFT_COMMAND}` again"
        if not path.exists():
            raise ValueError(f"{path} is missing: {again}")
        try:
            # Checks that the file is as long as its header says, and that the arrays fill it.
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and {again}") from None
        if _HEADER_KEY not in metadata:
            raise ValueError(f"{path} holds no sequences for training: {again}")
        try:
            values = json.loads(metadata[_HEADER_KEY])
            version = values["version"]
            if version == VERSION:
                self.header = SequenceHeader(**values)
                arrays = _map_arrays(path)
                self.tokens, self.supervised = arrays["tokens"], arrays["supervised"]
                self.starts, self.records, self.files = arrays["starts"], arrays["records"], arrays["files"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} has a damaged header ({error!r}): delete it and {again}") from None
        if version != VERSION:
            raise ValueError(f"{path} has format version {version}, this program reads {VERSION}: {again}")

    def __len__(self) -> int:
        return len(self.records)

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, uint8 supervised) of a sequence, as views of the memory maps."""
        begin, end = self.starts[number], self.starts[number + 1]
        return self.tokens[begin:end], self.supervised[begin:end]

    def origin(self, number: int) -> tuple[str, str, int]:
        """Origin of a sequence, as (file, what is counted in it, record)."""
        path, counts = self.header.sources[self.files[number]]
        return path, counts, int(self.records[number])

    def check_content(self) -> None:
        """Read and check the whole shard.

        Raises:
            ValueError: the arrays do not match their checksum.
        """
        if not self.content_is_whole():
            raise ValueError(
                f"{self.path} does not match its checksum: delete it and run `{PRETOKENIZE_SFT_COMMAND}` again"
            )

    def content_is_whole(self) -> bool:
        """Whether the arrays match their checksum."""
        arrays = (self.tokens, self.supervised, self.starts, self.records, self.files)
        return _sha256_of_arrays(arrays) == self.header.content_sha256


def _sha256_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(values.data)
    return digest.hexdigest()


def _map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Views of a memory map of a safetensors file, which its own library reads into memory."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(header_bytes))
    # One mapping for all arrays, as each mapping keeps a file open.
    content = np.memmap(path, np.uint8, "r")
    return {
        name: _view(content, entry, 8 + header_bytes) for name, entry in entries.items() if name != "__metadata__"
    }


def _view(content: np.memmap, entry: dict, start: int) -> np.ndarray:
    """Array of a safetensors file, as a view of its memory map.

    Args:
        entry: the array's entry in the file's header.
        start: byte of the file at which the arrays begin.
    """
    (length,) = entry["shape"]
    return np.frombuffer(content, np.dtype(_DTYPES[entry["dtype"]]), length, start + entry["data_offsets"][0])


def read_manifest(data_dir: Path) -> dict:
    """Manifest of a pretokenized directory, see dataset/format.py."""
    return read_manifest_of(data_dir, PRETOKENIZE_SFT_COMMAND)


class SequenceSet:
    """All sequences of one set (train or valid) of a pretokenized directory.

    Args:
        task: "sft" or "dpo".
    Raises:
        ValueError: the directory was not pretokenized for this task and length, files are missing or damaged, or the
        set
            is empty.
    """

    def __init__(self, data_dir: str | Path, split: str, task: str, max_seq_len: int):
        self.data_dir = Path(data_dir)
        manifest = read_manifest(self.data_dir)
        command = f"`{PRETOKENIZE_SFT_COMMAND} --task {task} --data_dir D --tokenizer_dir T --output_dir O`"
        made_for = manifest.get("task", "pretrain")
        if made_for != task:
            raise ValueError(f"{data_dir} was pretokenized for --task_type={made_for}, not {task}: run {command}")
        self.shards = [SequenceShard(self.data_dir / name) for name in manifest["shards"][split]]
        if not self.shards:
            raise ValueError(f"{data_dir} has no {split} set: give --valid_ratio to `{PRETOKENIZE_SFT_COMMAND}`")
        self.valid_ratio: float = manifest["valid_ratio"]
        if self.header.max_seq_len != max_seq_len:
            raise ValueError(
                f"{data_dir} was pretokenized for --max_seq_len={self.header.max_seq_len}, not {max_seq_len}: give "
                f"that, or pretokenize again"
            )
        self._bounds = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def header(self) -> SequenceHeader:
        """Header of the first shard; the others differ only in what concerns their content."""
        return self.shards[0].header

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sequence, int64."""
        return np.concatenate([np.diff(shard.starts) for shard in self.shards])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(shard.header.fingerprint for shard in self.shards).encode()).hexdigest()

    def check_content(self) -> None:
        """Compare all tokens with the shards' checksums; see SequenceShard.check_content."""
        for shard in self.shards:
            shard.check_content()

    def context_and_supervised_share(self) -> tuple[float, float]:
        """Figures for FLOPs: the average, over positions, of the length of their sequence, and the share of supervised
        positions."""
        positions = (self.lengths - 1).astype(np.float64)
        return float((positions**2).sum() / positions.sum()), self.supervised_tokens / float(positions.sum())

    @cached_property
    def supervised_tokens(self) -> int:
        return sum(int(shard.supervised.sum()) for shard in self.shards)

    def locate(self, number: int) -> tuple[SequenceShard, int]:
        """The shard of a sequence, and its number there."""
        index = int(np.searchsorted(self._bounds, number, side="right")) - 1
        return self.shards[index], number - int(self._bounds[index])

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard, inside = self.locate(number)
        return shard.sequence(inside)

    def inputs(self, numbers: Iterable[int]) -> np.ndarray:
        """Input tokens of some sequences, one after another: all tokens but the last of each."""
        return np.concatenate([self.sequence(number)[0][:-1] for number in numbers])

    def check(self, tokenizer_fingerprint: str, valid_ratio: float | None = None) -> None:
        """Check that the set was made with this tokenizer and ratio, see require_made_with."""
        tokenizers = (self.header.tokenizer_fingerprint, tokenizer_fingerprint)
        require_made_with(self.data_dir, PRETOKENIZE_SFT_COMMAND, tokenizers, self.valid_ratio, valid_ratio)

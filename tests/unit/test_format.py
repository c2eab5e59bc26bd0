"""Token files: reading gives what was written, and damaged or foreign files are refused with a way out."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_preprocess.build_pretrain_sample_index_map import build
from dataset.format import (
    BIN_MAGIC,
    BUILD_INDEX_COMMAND,
    DOCS_MAGIC,
    INDEX_MAGIC,
    MANIFEST_NAME,
    PRETOKENIZE_COMMAND,
    BinHeader,
    BinWriter,
    docs_path,
    index_path,
    map_tokens,
    read_bin_header,
    read_document_table,
    read_index,
    token_dtype,
    write_index,
)
from dataset.pretrain import PretrainDataset
from dataset.sequences import read_manifest

HEADER_BYTES = 256
EOD = 3
COMMAND = "python -m data_preprocess."


def header(split: str = "train", vocab_size: int = 512, tokenizer: str = "ab" * 32) -> BinHeader:
    return BinHeader(vocab_size, EOD, tokenizer, split, valid_ratio=0.25)


def write_bin(path: Path, documents: list[list[int]], bin_header: BinHeader | None = None) -> BinHeader:
    writer = BinWriter(path, bin_header or header())
    for document in documents:
        writer.add_document(document, text_bytes=2 * len(document))
    return writer.close()


def write_shards(directory: Path, lengths: list[int], split: str = "train", seed: int = 0) -> list[str]:
    """Shards of one document each; `lengths` count the end-of-document token."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{split}-{number}.bin" for number in range(len(lengths))]
    for name, length in zip(names, lengths):
        write_bin(directory / name, [rng.integers(10, 500, length - 1).tolist()], header(split))
    (directory / MANIFEST_NAME).touch()
    return names


def flip(path: Path, position: int, mask: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= mask
    path.write_bytes(raw)


def complaint_about(error: BaseException, name: str) -> str | None:
    """None if the error is a sentence for the user: a ValueError that names the file and a command to run."""
    message = str(error)
    if isinstance(error, ValueError) and name in message and COMMAND in message:
        return None
    return f"{type(error).__name__}: {message}"


@pytest.mark.parametrize("vocab_size", [512, 1 << 16, (1 << 16) + 1, 200_000])
def test_round_trip(tmp_path: Path, vocab_size: int):
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(10, vocab_size, length) for length in (5, 1, 300, 0, 17)]
    documents[0][0] = vocab_size - 1
    path = tmp_path / "train-x.bin"
    written = write_bin(path, [documents[0].tolist(), *documents[1:]], header(vocab_size=vocab_size))

    assert written.dtype == token_dtype(vocab_size) == np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    expected = np.concatenate([[*document, EOD] for document in documents]).astype(np.int64)
    tokens = map_tokens(path, read_bin_header(path))
    assert np.array_equal(tokens, expected)
    assert not tokens.flags.writeable
    # Readable without our code: raw little-endian tokens after a header of fixed size.
    assert np.array_equal(np.fromfile(path, written.dtype, offset=HEADER_BYTES), expected)
    assert path.read_bytes()[:8] == BIN_MAGIC and path.stat().st_size == HEADER_BYTES + tokens.nbytes

    lengths = [len(document) + 1 for document in documents]
    assert read_document_table(path).starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()


def test_documents_know_where_they_came_from(tmp_path: Path):
    """Includes files whose names are not Unicode, and record numbers beyond 32 bits."""
    path = tmp_path / "train-x.bin"
    sources = [("a.jsonl", "byte"), ("漢/b.txt", ""), (os.fsdecode(b"caf\xe9.csv"), "row")]
    documents = [(sources[0], 0), (sources[1], 0), (sources[0], 2**40), (sources[2], 2**64 - 1), (sources[2], 7)]
    with BinWriter(path, header()) as writer:
        for number, (source, record) in enumerate(documents):
            writer.add_document([10] * number, number, source, record)
    table = read_document_table(path)
    assert table.sources == tuple(sources)
    assert [(table.sources[file], record) for file, record in zip(table.files, table.records.tolist())] == documents
    assert table.starts.tolist() == [0, 1, 3, 6, 10]
    assert not any(column.flags.writeable for column in (table.starts, table.records, table.files))


def test_document_in_parts(tmp_path: Path):
    """The document has one start and one end-of-document token, and the origin of its first part."""
    path = tmp_path / "train-x.bin"
    with BinWriter(path, header()) as writer:
        for ids, record, continued in [([10, 11], 5, True), ([], 0, True), ([12], 0, False), ([13], 6, False)]:
            writer.add_document(ids, 2 * len(ids), ("a.txt", "row"), record, continued)
    written = read_bin_header(path)
    assert map_tokens(path, written).tolist() == [10, 11, 12, EOD, 13, EOD]
    assert (written.num_documents, written.num_tokens, written.text_bytes) == (2, 6, 8)
    table = read_document_table(path)
    assert (table.starts.tolist(), table.records.tolist(), table.files.tolist()) == ([0, 4], [5, 6], [0, 0])


def test_flipped_docs_header_is_refused(tmp_path: Path):
    """The header has magic, version, sizes, and the fingerprint of the .bin that it belongs to."""
    path = tmp_path / "train-0.bin"
    write_bin(path, [[10], [11, 12]])
    whole = docs_path(path).read_bytes()
    lead = len(whole) - 2 * (8 + 8 + 4) - len('[["", ""]]')
    assert lead == 8 + 4 + 4 + 8 + 32
    for position in range(lead):
        flip(docs_path(path), position, 0x80)
        with pytest.raises(ValueError) as caught:
            read_document_table(path)
        assert complaint_about(caught.value, str(docs_path(path))) is None, position
        docs_path(path).write_bytes(whole)
    assert read_document_table(path).starts.tolist() == [0, 2]


def test_header_fields(tmp_path: Path):
    path = tmp_path / "valid-x.bin"
    written = write_bin(path, [[10, 11], [12]], header("valid", 512, "cd" * 32))
    read = read_bin_header(path)
    assert read == written and read.fingerprint == written.fingerprint
    assert (read.vocab_size, read.eod_id, read.tokenizer_fingerprint) == (512, EOD, "cd" * 32)
    assert (read.split, read.valid_ratio) == ("valid", 0.25)
    assert (read.num_tokens, read.num_documents, read.text_bytes) == (5, 2, 6)


def test_fingerprint_tells_contents_apart(tmp_path: Path):
    first = write_bin(tmp_path / "a.bin", [[10, 11]])
    again = write_bin(tmp_path / "b.bin", [[10, 11]])
    other_token = write_bin(tmp_path / "c.bin", [[10, 12]])
    other_tokenizer = write_bin(tmp_path / "d.bin", [[10, 11]], header(tokenizer="cd" * 32))
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other_token.fingerprint, other_tokenizer.fingerprint}) == 3


def test_empty_file_can_be_read(tmp_path: Path):
    written = write_bin(tmp_path / "train-x.bin", [])
    assert len(map_tokens(tmp_path / "train-x.bin", written)) == 0
    assert len(read_document_table(tmp_path / "train-x.bin").starts) == 0


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("token", [-1, 512, 70_000])
def test_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: int, as_array: bool):
    """uint16 would wrap the token around, and the damage would show up in training, if at all."""
    writer = BinWriter(tmp_path / "train-x.bin", header(vocab_size=512))
    with pytest.raises((ValueError, OverflowError, AssertionError)):
        writer.add_document(np.asarray([10, token]) if as_array else [10, token], 2)
    writer.discard()


def test_file_appears_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "train-x.bin"
    with BinWriter(path, header()) as writer:
        writer.add_document([10, 11], 2)
        assert not path.exists() and not docs_path(path).exists()
    assert {p.name for p in tmp_path.iterdir()} == {"train-x.bin", "train-x.docs"}


def test_exception_leaves_no_file(tmp_path: Path):
    with pytest.raises(RuntimeError, match="torn"), BinWriter(tmp_path / "train-x.bin", header()) as writer:
        writer.add_document(list(range(10, 500)) * 50, 2)
        raise RuntimeError("torn")
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_the_earlier_file(tmp_path: Path):
    path = tmp_path / "train-x.bin"
    write_bin(path, [[10, 11]])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="torn"), BinWriter(path, header()) as writer:
        writer.add_document([12], 2)
        raise RuntimeError("torn")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files left behind after each try would fill the disk further."""

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"), BinWriter(tmp_path / "train-x.bin", header()) as writer:
        writer.add_document([10, 11], 2)
        monkeypatch.setattr(os, "fsync", no_space)
    assert list(tmp_path.iterdir()) == []


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "foreign": b"PAR1" + raw[4:],
                "other version": raw[:8] + (2).to_bytes(4, "little") + raw[12:],
                "half a header": raw[:100],
                "header only": raw[:HEADER_BYTES],
                "one byte short": raw[:-1],
                "half of it": raw[: len(raw) // 2],
                "one byte more": raw + b"\0",
                "twice the tokens": raw + raw[HEADER_BYTES:],
            }[how]
        )


DAMAGES = [
    "missing", "empty", "foreign", "other version", "half a header", "header only", "one byte short", "half of it",
    "one byte more", "twice the tokens",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_bin_is_refused(tmp_path: Path, how: str):
    path = tmp_path / "train-0.bin"
    write_shards(tmp_path, [400])
    write_index(tmp_path, "train", 16, ["train-0.bin"])
    damage(path, how)
    for read in (
        lambda: read_bin_header(path),
        lambda: read_document_table(path).starts,
        lambda: write_index(tmp_path, "train", 16, ["train-0.bin"]),
        lambda: PretrainDataset(tmp_path, "train", 16),
    ):
        with pytest.raises(ValueError) as caught:
            read()
        assert complaint_about(caught.value, str(path)) is None


# End of the header's fields; the rest is padding.
_FIELD_BYTES = 8 + 4 + 4 + 4 * 8 + 8 + 8 + 8 + 32 + 32


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_flipped_bin_header_is_refused(tmp_path: Path, mask: int):
    """Whichever byte is hit, neither the documents (when the index is built) nor the data set (in training) open."""
    path = tmp_path / "train-0.bin"
    write_shards(tmp_path, [400])
    write_index(tmp_path, "train", 16, ["train-0.bin"])
    whole = path.read_bytes()
    accepted, complaints = [], {}
    for position in range(_FIELD_BYTES):
        flip(path, position, mask)
        for read in (lambda: read_document_table(path).starts, lambda: PretrainDataset(tmp_path, "train", 16)):
            try:
                read()
            except Exception as error:
                if complaint := complaint_about(error, "train-0.bin"):
                    complaints[position] = complaint
            else:
                accepted.append(position)
        path.write_bytes(whole)
    assert accepted == []
    assert complaints == {}


def test_header_that_contradicts_itself_is_refused(tmp_path: Path):
    """The size was checked for 2 bytes per token; with a vocabulary that needs 4, reading would go past the end of the
    file."""
    path = tmp_path / "train-0.bin"
    write_bin(path, [[10, 11, 12]], header(vocab_size=512))
    raw = path.read_bytes()
    vocab_size, other = (512).to_bytes(8, "little"), (100_000).to_bytes(8, "little")
    assert raw[:HEADER_BYTES].count(vocab_size) == 1
    path.write_bytes(raw.replace(vocab_size, other, 1))
    with pytest.raises(ValueError) as caught:
        read_bin_header(path)
    assert complaint_about(caught.value, str(path)) is None


def test_damaged_docs_are_refused(tmp_path: Path):
    path, other = tmp_path / "train-0.bin", tmp_path / "train-1.bin"
    write_bin(path, [[10], [11, 12]])
    write_bin(other, [[10, 13], [11]])
    whole = docs_path(path).read_bytes()
    damaged = {
        "another file's": docs_path(other).read_bytes(),
        "foreign": b"PAR1" + whole[4:],
        "truncated": whole[:-8],
        "one byte short": whole[:-1],
        "grown": whole + bytes(8),
        "header only": whole[:20],
        "empty": b"",
        "earlier version": whole[:8] + (1).to_bytes(4, "little") + whole[12:],
        "later version": whole[:8] + (3).to_bytes(4, "little") + whole[12:],
    }
    assert whole[:8] == DOCS_MAGIC
    accepted = []
    for how, raw in damaged.items():
        docs_path(path).write_bytes(raw)
        try:
            read_document_table(path)
        except ValueError as error:
            assert complaint_about(error, str(docs_path(path))) is None, how
        else:
            accepted.append(how)
    docs_path(path).unlink()
    with pytest.raises(ValueError) as caught:
        read_document_table(path)
    assert complaint_about(caught.value, str(docs_path(path))) is None
    assert accepted == []


def naive_rows(lengths: list[int], max_seq_len: int) -> list[tuple[int, int]]:
    """(file, offset) of each token, then every max_seq_len-th of them while a whole sample and a label follow."""
    places = [(file, offset) for file, length in enumerate(lengths) for offset in range(length)]
    return [places[start] for start in range(0, len(places) - max_seq_len, max_seq_len)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_seq_len", [1, 2, 7, 16, 64])
def test_rows_equal_a_naive_loop(tmp_path: Path, seed: int, max_seq_len: int):
    """Shards from one token, far shorter than a sample, to several samples."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [4, 30, 200][seed % 3], 12).tolist()
    lengths.append(max_seq_len + 1)
    names = write_shards(tmp_path, lengths, seed=seed)
    path = write_index(tmp_path, "train", max_seq_len, names)
    index = read_index(tmp_path, "train", max_seq_len)
    assert index.rows.tolist() == naive_rows(lengths, max_seq_len)
    assert len(index.rows) == (sum(lengths) - 1) // max_seq_len
    assert (index.max_seq_len, index.split, index.file_names) == (max_seq_len, "train", tuple(names))
    assert index.file_fingerprints == tuple(read_bin_header(tmp_path / name).fingerprint for name in names)
    assert path == index_path(tmp_path, "train", max_seq_len) and path.read_bytes()[:8] == INDEX_MAGIC


def test_shard_without_tokens(tmp_path: Path):
    names = write_shards(tmp_path, [9, 9])
    write_bin(tmp_path / "train-empty.bin", [])
    write_index(tmp_path, "train", 3, [names[0], "train-empty.bin", names[1]])
    # The sample at the border begins in the third file, which has its first token.
    expected = [(file and 2, offset) for file, offset in naive_rows([9, 9], 3)]
    assert read_index(tmp_path, "train", 3).rows.tolist() == expected


def test_index_fingerprint(tmp_path: Path):
    """The fingerprint names the data and its cut: training goes on only if it is the same."""
    names = write_shards(tmp_path, [50, 60])

    def fingerprint(max_seq_len: int, order: list[str]) -> str:
        write_index(tmp_path, "train", max_seq_len, order)
        return read_index(tmp_path, "train", max_seq_len).fingerprint

    first = fingerprint(16, names)
    assert fingerprint(16, names) == first
    others = [fingerprint(8, names), fingerprint(16, names[::-1]), fingerprint(16, names[:1])]
    write_bin(tmp_path / names[0], [[11] * 49])
    others.append(fingerprint(16, names))
    assert len({first, *others}) == 5


def test_too_little_data(tmp_path: Path):
    names = write_shards(tmp_path, [10, 6])
    with pytest.raises(ValueError, match="holds 16 tokens.* 17.*smaller --max_seq_len"):
        write_index(tmp_path, "train", 16, names)
    assert not index_path(tmp_path, "train", 16).exists()
    write_index(tmp_path, "train", 15, names)
    assert len(read_index(tmp_path, "train", 15).rows) == 1
    with pytest.raises(ValueError, match="holds 0 tokens.*--valid_ratio"):
        write_index(tmp_path, "valid", 16, [])
    with pytest.raises(ValueError, match="max_seq_len must be at least 1"):
        write_index(tmp_path, "train", 0, names)


def test_files_that_do_not_belong_together(tmp_path: Path):
    write_shards(tmp_path, [50])
    write_bin(tmp_path / "train-other.bin", [[11] * 50], header(tokenizer="cd" * 32))
    write_bin(tmp_path / "valid-other.bin", [[11] * 50], header("valid"))
    for other in ("train-other.bin", "valid-other.bin"):
        with pytest.raises(ValueError) as caught:
            write_index(tmp_path, "train", 16, ["train-0.bin", other])
        assert complaint_about(caught.value, other) is None


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_index_is_refused(tmp_path: Path, how: str):
    path = write_index(tmp_path, "train", 16, write_shards(tmp_path, [300, 300]))
    damage(path, how)
    with pytest.raises(ValueError) as caught:
        read_index(tmp_path, "train", 16)
    assert complaint_about(caught.value, str(path)) is None
    assert f"--data_dir {tmp_path} --max_seq_len 16" in str(caught.value)


@pytest.mark.parametrize("part", ["header", "rows"])
def test_flipped_byte_of_the_index_is_refused(tmp_path: Path, part: str):
    """A wrong row would be a wrong sample, or an IndexError in the middle of the night."""
    path = write_index(tmp_path, "train", 16, write_shards(tmp_path, [100, 100]))
    whole = path.read_bytes()
    first_row = len(whole) - read_index(tmp_path, "train", 16).rows.nbytes
    accepted, complaints = [], {}
    for position in range(first_row) if part == "header" else range(first_row, len(whole)):
        flip(path, position, 0x01)
        try:
            PretrainDataset(tmp_path, "train", 16)
        except Exception as error:
            if complaint := complaint_about(error, str(tmp_path)):
                complaints[position] = complaint
        else:
            accepted.append(position)
        path.write_bytes(whole)
    assert complaints == {}
    assert accepted == []


@pytest.mark.parametrize(
    ("source", "target"), [("train-16", "train-8"), ("train-8", "train-16"), ("valid-8", "train-8")]
)
def test_index_under_another_name_is_refused(tmp_path: Path, source: str, target: str):
    for split in ("train", "valid"):
        names = write_shards(tmp_path, [100, 100], split)
        for max_seq_len in (8, 16):
            write_index(tmp_path, split, max_seq_len, names)
    shutil.copy(tmp_path / f"{source}.ibin", tmp_path / f"{target}.ibin")
    with pytest.raises(ValueError) as caught:
        PretrainDataset(tmp_path, "train", int(target.removeprefix("train-")))
    assert complaint_about(caught.value, f"{target}.ibin") is None


@pytest.mark.parametrize("lengths", [[100, 100], [100, 90]])
def test_bin_replaced_after_the_index_was_built_is_refused(tmp_path: Path, lengths: list[int]):
    """Even by one of the same size, because the index holds its fingerprint."""
    write_index(tmp_path, "train", 16, write_shards(tmp_path, [100, 100], seed=0))
    assert len(PretrainDataset(tmp_path, "train", 16)) == 12
    write_shards(tmp_path, lengths, seed=1)
    with pytest.raises(ValueError) as caught:
        PretrainDataset(tmp_path, "train", 16)
    assert complaint_about(caught.value, str(tmp_path / "train-0.bin")) is None
    assert "--max_seq_len 16" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt"], "D is not pretokenized: run `{tokenize} --data_dir D --tokenizer_dir T --output_dir O` with a "
                    "tokenizer T, then `{index} --data_dir O --max_seq_len 16`, and give O"),
        (["train-0.bin"], "D/pretokenize.json is missing: run `{tokenize}` again"),
        (["train-0.bin", "pretokenize.json"], "D/train-16.ibin is missing: run `{index} --data_dir D --max"),
    ],
)  # fmt: skip
def test_a_directory_that_is_not_ready_says_what_to_run(tmp_path: Path, names: list[str], message: str):
    for name in names:
        (tmp_path / name).touch()
    commands = {"tokenize": PRETOKENIZE_COMMAND, "index": BUILD_INDEX_COMMAND}
    with pytest.raises(ValueError) as refused:
        read_index(tmp_path, "train", 16)
    assert str(refused.value).replace(str(tmp_path), "D").startswith(message.format(**commands))


def test_bin_removed_after_the_index_was_built_is_refused(tmp_path: Path):
    write_index(tmp_path, "train", 16, write_shards(tmp_path, [100, 100]))
    (tmp_path / "train-1.bin").unlink()
    with pytest.raises(ValueError) as caught:
        PretrainDataset(tmp_path, "train", 16)
    assert complaint_about(caught.value, str(tmp_path / "train-1.bin")) is None


MANIFEST = {"shards": {"train": ["train-0.bin"], "valid": []}, "valid_ratio": 0.0}
SHARDS = MANIFEST["shards"]
BAD_MANIFESTS = [
    "", "[]", "null", "5", "[" * 100_000, "{}", "\udcff", {**MANIFEST, "valid_ratio": None},
    {**MANIFEST, "valid_ratio": float("nan")}, {**MANIFEST, "valid_ratio": 2}, {**MANIFEST, "task": 5},
    {**MANIFEST, "options": []}, {**MANIFEST, "options": {"max_seq_len": "8"}},
    *({**MANIFEST, "shards": shards} for shards in (None, [], 5, "x", {}, {"train": []})),
    *({**MANIFEST, "shards": {**SHARDS, "train": names}} for names in (None, 5, [None], [5], [[]], ["../a.bin"])),
    *({**MANIFEST, "shards": {**SHARDS, "valid": names}} for names in (None, "abc", [{}], ["a\0b"], ["/etc/passwd"])),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD_MANIFESTS)))
def test_manifest_of_any_other_kind_is_refused(tmp_path: Path, number: int):
    write_shards(tmp_path, [100])
    bad, path = BAD_MANIFESTS[number], tmp_path / MANIFEST_NAME
    path.write_text(bad if isinstance(bad, str) else json.dumps(bad), "utf-8", errors="surrogateescape")
    for read in (lambda: build(tmp_path, 16), lambda: read_manifest(tmp_path)):
        with pytest.raises(ValueError) as caught:
            read()
        assert complaint_about(caught.value, str(path)) is None and "is damaged" in str(caught.value)
    path.write_text(json.dumps(MANIFEST))
    assert len(build(tmp_path, 16)) == 2


@pytest.mark.parametrize("change", ["order", "first", "beyond", "file", "no JSON", "no pairs"])
def test_document_table_that_cannot_be(tmp_path: Path, change: str):
    """The table has no checksum of its own, so its contents are checked before use."""
    path = tmp_path / "train-0.bin"
    write_bin(path, [[11] * 9, [12] * 9])
    table = read_document_table(path)
    table.check_content(path, 20)
    raw = bytearray(docs_path(path).read_bytes())
    end = len(raw) - len(b'[["", ""]]')
    columns = {"order": (-40, 10), "first": (-40, 1), "beyond": (-32, 20), "file": (-8, 1)}
    if change in columns:
        begin, value = columns[change]
        raw[end + begin : end + begin + 4] = value.to_bytes(4, "little")
    else:
        raw[end:] = b'[["", "", ]' if change == "no JSON" else b"[12345678]"
    docs_path(path).write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        read_document_table(path).check_content(path, 20)
    assert complaint_about(caught.value, str(docs_path(path))) is None


@pytest.mark.parametrize(
    "change",
    [{"files": None}, {"files": []}, {"files": [{}]}, {"files": [{"name": 5, "fingerprint": "a"}]}, {"files": [5]},
     {"files": [{"name": "../a", "fingerprint": "a"}]}, {"num_samples": "x"}, {"num_samples": None}],
)  # fmt: skip
def test_index_of_any_other_kind_is_refused(tmp_path: Path, change: dict):
    """Even if its checksum is right."""
    path = write_index(tmp_path, "train", 16, write_shards(tmp_path, [100]))
    raw = path.read_bytes()
    size = int.from_bytes(raw[12:16], "little")
    meta = json.dumps({**json.loads(raw[48 : 48 + size]), **change}).encode()
    lead = raw[:12] + len(meta).to_bytes(4, "little") + hashlib.sha256(meta).digest()
    path.write_bytes(lead + meta + raw[48 + size :])
    with pytest.raises(ValueError) as caught:
        PretrainDataset(tmp_path, "train", 16)
    assert complaint_about(caught.value, str(path)) is None


def test_token_outside_the_vocabulary(tmp_path: Path):
    """A flipped bit would be an index error in the embedding, which on a GPU says nothing about the data."""
    write_index(tmp_path, "train", 16, write_shards(tmp_path, [100]))
    flip(tmp_path / "train-0.bin", HEADER_BYTES + 41, 0x80)
    dataset = PretrainDataset(tmp_path, "train", 16)
    assert dataset.read_rows(np.array([0])).shape == (1, 17)
    with pytest.raises(ValueError, match="tokens outside its vocabulary.*--verify"):
        dataset.collate(np.array([0, 1]))


@pytest.mark.parametrize("name", ["train-0.bin", "train-0.docs", "train-16.ibin"])
def test_folder_in_the_place_of_a_file(tmp_path: Path, name: str):
    write_index(tmp_path, "train", 16, write_shards(tmp_path, [100]))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError) as caught:
        read_document_table(tmp_path / "train-0.bin")
        PretrainDataset(tmp_path, "train", 16)
    assert complaint_about(caught.value, str(tmp_path / name)) is None

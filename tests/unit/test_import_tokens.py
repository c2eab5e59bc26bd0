"""Tokens of other programs: the same documents, each once, with one end-of-document token."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.import_tokens import main as import_tokens
from dataset.format import MANIFEST_NAME, map_tokens, read_bin_header, read_document_table
from dataset.pretrain import PretrainDataset
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.hf_bbpe import HFBBPETokenizer


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Tokenizer:
    return load_tokenizer(data_dir / "tokenizer")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choice(["def ", "x", "列", "\n", " = 1"]) for _ in range(rng.randint(1, 40))) for _ in range(60)
    ]


def imported(output: Path) -> dict[str, list[list[int]]]:
    """Set -> ids of its documents with the end-of-document token, in the shards' order."""
    documents: dict[str, list[list[int]]] = {}
    for split, names in json.loads((output / MANIFEST_NAME).read_text())["shards"].items():
        documents[split] = []
        for name in names:
            tokens = map_tokens(output / name, read_bin_header(output / name))
            parts = np.split(tokens, read_document_table(output / name).starts[1:])
            documents[split] += [part.tolist() for part in parts]
    return documents


def run(home: Path, data_dir: Path, *arguments: str) -> int:
    return import_tokens(
        [*arguments, "--tokenizer_dir", str(data_dir / "tokenizer"), "--output_dir", str(home / "out")]
    )


def write_megatron(stem: Path, documents: list[list[list[int]]], code: int, dtype: str) -> None:
    """Documents of several sequences each, in the layout of Megatron-LM's writer."""
    sequences = [sequence for document in documents for sequence in document]
    item = np.dtype(dtype).itemsize
    stem.with_suffix(".bin").write_bytes(b"".join(np.asarray(s, dtype).tobytes() for s in sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [item * sum(lengths[:index]) for index in range(len(lengths))]
    boundaries = np.cumsum([0, *map(len, documents)])
    stem.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
        + np.asarray(lengths, "<i4").tobytes() + np.asarray(pointers, "<i8").tobytes()
        + boundaries.astype("<i8").tobytes()
    )  # fmt: skip


def test_nanogpt(tmp_path: Path, data_dir: Path, tokenizer: Tokenizer, texts: list[str]):
    """There is a file for each set, and the last document has no end."""
    ids = [tokenizer.encode(text) for text in texts]
    for name, part in (("train.bin", ids[:50]), ("val.bin", ids[50:])):
        flat = [token for document in part for token in [*document, tokenizer.eod_id]][:-1]
        np.asarray(flat, "<u2").tofile(tmp_path / name)
    arguments = ["--format", "nanogpt", "--input", str(tmp_path / "train.bin"), "--shard_tokens", "200"]
    assert run(tmp_path, data_dir, *arguments, "--valid_input", str(tmp_path / "val.bin")) == 0
    documents = imported(tmp_path / "out")
    assert documents["train"] == [[*document, tokenizer.eod_id] for document in ids[:50]]
    assert documents["valid"] == [[*document, tokenizer.eod_id] for document in ids[50:]]
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert len(manifest["shards"]["train"]) > 2
    assert (manifest["documents"], manifest["text_bytes"]) == (60, sum(len(text.encode()) for text in texts))
    build(tmp_path / "out", 16)
    PretrainDataset(tmp_path / "out", "train", 16).check(tokenizer.fingerprint)
    table = read_document_table(tmp_path / "out" / manifest["shards"]["train"][0])
    assert table.sources == (("train.bin", "token"),)
    assert table.records.tolist()[:2] == [0, len(ids[0]) + 1]


def test_held_out_by_hash(tmp_path: Path, data_dir: Path, tokenizer: Tokenizer, texts: list[str]):
    ids = [tokenizer.encode(text) for text in texts]
    np.asarray([t for d in ids for t in [*d, tokenizer.eod_id]], "<u2").tofile(tmp_path / "all.bin")
    arguments = ["--format", "nanogpt", "--input", str(tmp_path / "all.bin"), "--valid_ratio", "0.3"]
    assert run(tmp_path, data_dir, *arguments) == 0
    documents = imported(tmp_path / "out")
    everything = sorted(document[:-1] for part in documents.values() for document in part)
    assert everything == sorted(ids) and 5 < len(documents["valid"]) < 35


def test_llama2c(tmp_path: Path, data_dir: Path, tokenizer: Tokenizer, texts: list[str]):
    """Every document begins with a BOS, here a special token that no text holds."""
    ids = [tokenizer.encode(text) for text in texts]
    bos = tokenizer.special_ids["<|im_start|>"]
    np.asarray([token for document in ids for token in [bos, *document]], "<u2").tofile(tmp_path / "a.bin")
    arguments = ["--format", "llama2c", "--input", str(tmp_path / "a.bin"), "--valid_ratio", "0", "--bos_id", str(bos)]
    assert run(tmp_path, data_dir, *arguments) == 0
    assert imported(tmp_path / "out")["train"] == [[*document, tokenizer.eod_id] for document in ids]


@pytest.mark.parametrize("code, dtype", [(8, "<u2"), (4, "<i4")])
@pytest.mark.parametrize("given", ["corpus.bin", "corpus.idx", "corpus"])
def test_megatron(
    tmp_path: Path, data_dir: Path, tokenizer: Tokenizer, texts: list[str], code: int, dtype: str, given: str
):
    """Documents of one to three sequences, some of which end with the end-of-document token; one is empty."""
    ids = [tokenizer.encode(text) for text in texts]
    documents = [ids[i : i + 1 + i % 3] for i in range(0, 40, 3)]
    for number, document in enumerate(documents):
        if number % 2:
            document[-1] = [*document[-1], tokenizer.eod_id]
    documents.insert(3, [[]])
    write_megatron(tmp_path / "corpus", documents, code, dtype)
    arguments = ["--format", "megatron", "--input", str(tmp_path / given), "--valid_ratio", "0"]
    assert run(tmp_path, data_dir, *arguments) == 0
    expected = [[token for sequence in document for token in sequence] for document in documents]
    expected = [
        [*(t for t in document if t != tokenizer.eod_id), tokenizer.eod_id] for document in expected if document
    ]
    assert imported(tmp_path / "out")["train"] == expected


def test_again_gives_the_same(tmp_path: Path, data_dir: Path, tokenizer: Tokenizer, texts: list[str]):
    ids = [tokenizer.encode(text) for text in texts]
    np.asarray([t for d in ids for t in [*d, tokenizer.eod_id]], "<u2").tofile(tmp_path / "all.bin")
    arguments = ["--format", "nanogpt", "--input", str(tmp_path / "all.bin"), "--valid_ratio", "0.3"]
    contents = []
    for _ in range(2):
        assert run(tmp_path, data_dir, *arguments) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*") if path.is_file()})
    assert contents[0] == contents[1]


def flat_file(home: Path, tokens: list[int], name: str = "a.bin") -> str:
    np.asarray(tokens, "<u2").tofile(home / name)
    return str(home / name)


def test_errors(tmp_path: Path, data_dir: Path, tokenizer: HFBBPETokenizer, capsys):
    eod, pad = tokenizer.eod_id, tokenizer.pad_id
    good = flat_file(tmp_path, [5, 6, eod, 7, eod], "good.bin")
    (tmp_path / "odd.bin").write_bytes(b"\1\2\3")
    (tmp_path / "empty.bin").write_bytes(b"")
    write_megatron(tmp_path / "m", [[[1, 2]], [[3]]], 8, "<u2")
    index = (tmp_path / "m.idx").read_bytes()
    for name, raw in (("cut", index[:-1]), ("magic", b"X" + index[1:]), ("type", index[:17] + b"\x06" + index[18:])):
        (tmp_path / f"{name}.bin").write_bytes((tmp_path / "m.bin").read_bytes())
        (tmp_path / f"{name}.idx").write_bytes(raw)
    negative = struct.pack("<QBQQ3i3q2q", 1, 8, 3, 2, 2, -1, 2, 0, 4, 2, 0, 3)
    (tmp_path / "negative.idx").write_bytes(b"MMIDIDX\x00\x00" + negative)
    (tmp_path / "negative.bin").write_bytes((tmp_path / "m.bin").read_bytes())
    (tmp_path / "short.bin").write_bytes(b"\1\0")
    (tmp_path / "short.idx").write_bytes(index)
    cases = [
        (["--format", "nanogpt", "--input", flat_file(tmp_path, [1, 2, 3])], "holds no end-of-document token"),
        (["--format", "nanogpt", "--input", flat_file(tmp_path, [1, 60000, eod], "b.bin")], "outside the tokenizer's"),
        (["--format", "nanogpt", "--input", flat_file(tmp_path, [1, pad, 2, eod], "c.bin")], "document at token 0"),
        (["--format", "nanogpt", "--input", str(tmp_path / "odd.bin")], "not uint16 tokens"),
        (["--format", "nanogpt", "--input", str(tmp_path / "empty.bin")], "not uint16 tokens"),
        (["--format", "nanogpt", "--input", str(tmp_path / "none.bin")], "none.bin does not exist"),
        (["--format", "nanogpt", "--input", good, "--valid_ratio", "1"], "--valid_ratio must be"),
        (["--format", "nanogpt", "--input", good, "--valid_input", good, "--valid_ratio", "0.1"], "not both"),
        (["--format", "nanogpt", "--input", good, "--shard_tokens", "0"], "--shard_tokens must be positive"),
        (["--format", "nanogpt", "--input", f"{good}x"], f"{good}x does not exist: did you mean {good}?"),
        (["--format", "nanogpt", "--input", good, "--valid_ratio", "0.000001"], "fell into the validation set"),
        (["--format", "llama2c", "--input", good, "--bos_id", "9"], "choose it with --bos_id"),
        (["--format", "megatron", "--input", str(tmp_path / "cut")], "damaged"),
        (["--format", "megatron", "--input", str(tmp_path / "magic")], "not a Megatron index"),
        (["--format", "megatron", "--input", str(tmp_path / "type")], "damaged"),
        (["--format", "megatron", "--input", str(tmp_path / "negative")], "sequences of negative length"),
        (["--format", "megatron", "--input", str(tmp_path / "short")], "does not hold what"),
        (["--format", "megatron", "--input", str(tmp_path / "nothing")], "nothing.idx does not exist"),
    ]
    for arguments, complaint in cases:
        assert run(tmp_path, data_dir, *arguments) == 2, arguments
        printed = capsys.readouterr().err
        assert complaint in printed and printed.count("\n") == 1, (arguments, printed)
        assert not list((tmp_path / "out").glob("*.tmp-*")), arguments

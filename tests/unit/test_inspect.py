"""Descriptions of data and samples by `dataset.inspect`, against a plain reading of the corpus."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import train_my_ddp
from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import Corpus
from dataset.format import map_tokens, read_bin_header, read_document_table, read_index
from dataset.inspect import Inspection
from dataset.inspect import main as inspect
from dataset.order import sample_at
from dataset.pretrain import PretrainDataset
from tests.conftest import SEQ_LEN
from tests.runs import out_dir
from tokenizer import Tokenizer, load_tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Tokenizer:
    return load_tokenizer(data_dir / "tokenizer")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """JSON lines and text files, and the text at each place of them."""
    home, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    texts: dict[str, str] = {}
    lines = b""
    for number in range(50):
        text = f"document {number}: " + " ".join(
            rng.choice(["a", "def", "列表", "x = 1"]) for _ in range(rng.randint(0, 30))
        )
        texts[f"lines.jsonl, byte {len(lines)}"] = text
        lines += json.dumps({"text": text}).encode() + b"\n"
    (home / "lines.jsonl").write_bytes(lines)
    for name in ("a.py", "sub/b.txt"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(f"# {name}\n" * 40)
        texts[name] = f"# {name}\n" * 40
    return home, texts


@pytest.fixture(scope="module")
def inspected(corpus: tuple[Path, dict[str, str]], data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokens")
    process_corpus(
        PretrainJob(Corpus(str(corpus[0])), str(output), str(data_dir / "tokenizer"), valid_ratio=0.2, shard_bytes=700)
    )
    build(output, LENGTH)
    return output


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_sample_is_traced_to_its_text(
    inspected: Path, corpus: tuple[Path, dict[str, str]], tokenizer: Tokenizer, split: str
):
    """The spans of each sample cover its row, and each holds the tokens of the text at its place."""
    inspection = Inspection(inspected, split, LENGTH, tokenizer)
    dataset = PretrainDataset(inspected, split, LENGTH)
    assert len(inspection.tables) > 2
    seen = set()
    for number in range(len(dataset)):
        row = dataset.read_rows(np.array([number]))[0].tolist()
        spans = inspection.parts(number)
        assert spans[0].begin == 0 and spans[-1].end == LENGTH + 1
        assert all(left.end == right.begin for left, right in zip(spans, spans[1:]))
        for span in spans:
            ids = [*tokenizer.encode(corpus[1][span.source]), tokenizer.eod_id]
            assert row[span.begin : span.end] == ids[span.skipped :][: span.end - span.begin]
            seen.add(span.source)
    assert len(seen) > 5


def test_every_document_says_where_it_came_from(
    inspected: Path, corpus: tuple[Path, dict[str, str]], tokenizer: Tokenizer
):
    places = []
    for split in ("train", "valid"):
        for name in read_index(inspected, split, LENGTH).file_names:
            table, tokens = (
                read_document_table(inspected / name),
                map_tokens(inspected / name, read_bin_header(inspected / name)),
            )
            ends = [*table.starts[1:].tolist(), len(tokens)]
            for start, end, record, file in zip(table.starts, ends, table.records, table.files):
                path, counts = table.sources[file]
                places.append(f"{path}, {counts} {record}" if counts else path)
                assert tokenizer.decode(tokens[start : end - 1].tolist()) == corpus[1][places[-1]]
    assert sorted(places) == sorted(corpus[1])


def test_statistics(inspected: Path, tokenizer: Tokenizer, capsys):
    assert inspect([str(inspected)]) == 0
    printed = capsys.readouterr().out
    lengths = []
    for name in read_index(inspected, "train", LENGTH).file_names:
        header = read_bin_header(inspected / name)
        lengths += np.diff([*read_document_table(inspected / name).starts.tolist(), header.num_tokens]).tolist()
    assert f"train: {len(lengths):,} documents of" in printed and f" {sum(lengths):,} tokens" in printed
    assert f"longest {max(lengths):,}" in printed
    rows = [line.split() for line in printed.splitlines() if " to " in line]
    for low, _, high, count, share, *_ in rows:
        inside = [n for n in lengths if int(low.replace(",", "")) <= n <= int(high.replace(",", ""))]
        assert int(count.replace(",", "")) == len(inside)
        assert float(share.rstrip("%")) == pytest.approx(100 * sum(inside) / sum(lengths), abs=0.06)
    assert sum(int(row[3].replace(",", "")) for row in rows) == len(lengths)


def test_a_sample_is_shown(inspected: Path, tokenizer: Tokenizer, capsys):
    assert inspect([str(inspected), "--sample", "3"]) == 0
    printed = capsys.readouterr().out
    row = PretrainDataset(inspected, "train", LENGTH).read_rows(np.array([3]))[0].tolist()
    shown = "\n".join(line for line in printed.splitlines()[1:] if not line.startswith("--- "))
    assert shown.replace("\n", "") == tokenizer.decode(row).replace("\n", "")
    assert f"of {LENGTH} positions are supervised" in printed.splitlines()[0]


def test_damaged_tokens_are_found(inspected: Path, capsys):
    """A flipped bit changes no size: only reading everything finds it."""
    assert inspect([str(inspected), "--verify"]) == 0
    assert "the tokens of all" in capsys.readouterr().out
    path = inspected / read_index(inspected, "train", LENGTH).file_names[1]
    raw = path.read_bytes()
    path.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    try:
        assert inspect([str(inspected)]) == 0
        assert inspect([str(inspected), "--verify"]) == 2
        assert f"{path} is damaged" in capsys.readouterr().err
    finally:
        path.write_bytes(raw)


def test_a_position_of_a_run(tiny_run: list[str], data_dir: Path, capsys):
    assert train_my_ddp.main(tiny_run) == 0
    size = len(PretrainDataset(data_dir, "train", SEQ_LEN))
    capsys.readouterr()
    assert inspect([str(out_dir(tiny_run)), "--position", "5"]) == 0
    by_position = capsys.readouterr().out
    number = int(sample_at(1337, 5, size))
    assert inspect([str(data_dir), "--sample", str(number), "--max_seq_len", str(SEQ_LEN)]) == 0
    assert capsys.readouterr().out == by_position
    assert inspect([str(data_dir), "--position", "5", "--seed", "1337"]) == 0
    assert capsys.readouterr().out == by_position
    assert inspect([str(out_dir(tiny_run)), "--split", "valid", "--sample", "0"]) == 0
    assert capsys.readouterr().out.startswith("sample 0: valid-")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "is not pretokenized: run"),
        (["DATA", "--sample", "100000"], "there is no sample 100000"),
        (["DATA", "--sample", "-1"], "there is no sample -1"),
        (["DATA", "--position", "1"], "--position needs --seed, as"),
        (["DATA", "--position", "1", "--sample", "1"], "both choose a sample"),
        (["DATA", "--position", "1", "--split", "valid"], "leave out --split"),
        (["DATA", "--max_seq_len", "7"], "is missing: run"),
        (["DATA", "--tokenizer_dir", "."], "holds no tokenizer.json"),
    ],
)
def test_errors(arguments: list[str], complaint: str, inspected: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert inspect([str(inspected) if word == "DATA" else word for word in arguments]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_several_indexes(inspected: Path, tmp_path: Path, capsys):
    build(inspected, 2 * LENGTH)
    assert inspect([str(inspected)]) == 2
    assert f"choose --max_seq_len {LENGTH} or {2 * LENGTH}" in capsys.readouterr().err
    for path in inspected.glob(f"*-{2 * LENGTH}.ibin"):
        path.unlink()

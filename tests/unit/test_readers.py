"""Readers against naive ones that hold the whole file: the same documents, once each, in order, with their origins."""

import argparse
import bz2
import codecs
import csv
import errno
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_preprocess import readers
from data_preprocess.readers import (
    BadRecord,
    Corpus,
    Document,
    TextFields,
    add_corpus_arguments,
    corpus_from,
    find_units,
    limits,
    list_inputs,
    place,
    plan_units,
    read_unit,
)
from data_preprocess.readers.registry import READERS

ROOT = Path(__file__).resolve().parents[2]
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
WHOLE = 1 << 30
KINDS = (".txt", ".jsonl", ".json lines", ".json array", ".csv", ".tsv", ".parquet")

Origin = tuple[str, str, str, int]
"""(text, path, unit of the number, number)."""


def random_text(rng: random.Random, length: int) -> str:
    """Characters that separate fields, lines and records somewhere, and characters of all planes."""
    usual = "abc d,;\"'\\\t\n\r{}[]:<>|\0\x85\u2028\ufeffé漢🧪"
    others = (range(0x20, 0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000))
    return "".join(
        rng.choice(usual) if rng.random() < 0.8 else chr(rng.choice(rng.choice(others))) for _ in range(length)
    )


def random_texts(seed: int, count: int, longest: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, rng.randint(1, longest)) for _ in range(count)]


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".xz":
        return lzma.compress(content)
    if suffix == ".bz2":
        return bz2.compress(content)
    if suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def json_lines(texts: list[str], line_end: str = "\n", last_line_end: bool = True) -> bytes:
    """Some lines have characters as UTF-8, some as escapes."""
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    return (line_end.join(lines) + line_end * last_line_end).encode()


def json_array(texts: list[str], indent: int | None = None, ensure_ascii: bool = False) -> bytes:
    records = [{"id": i, "meta": {"tags": [i, None, 0.5]}, "text": text} for i, text in enumerate(texts)]
    return json.dumps(records, indent=indent, ensure_ascii=ensure_ascii).encode()


def table(texts: list[str], separator: str = ",", line_end: str = "\r\n") -> bytes:
    target = io.StringIO(newline="")
    writer = csv.writer(target, delimiter=separator, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([("id", "text"), *enumerate(texts)])
    return target.getvalue().encode()


def parquet(columns: dict[str, list], rows_a_group: int = 7, **options) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=rows_a_group, **options)
    return sink.getvalue().to_pybytes()


def content_of(kind: str, texts: list[str]) -> bytes:
    if kind == ".txt":
        return "".join(texts).encode()
    if kind in (".jsonl", ".json lines"):
        return json_lines(texts)
    if kind == ".json array":
        return json_array(texts)
    if kind == ".parquet":
        return parquet({"id": list(range(len(texts))), "text": texts})
    return table(texts, "," if kind == ".csv" else "\t")


def naive_documents(name: str, content: bytes, key: str = "text") -> list[Origin]:
    """Documents of a file from its uncompressed content, all at once, without records that have no text."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in COMPRESSIONS]
    records: Iterable[tuple[str, int, dict]]
    if suffixes[-1] == ".parquet":
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        records = [("row", i, row) for i, row in enumerate(rows)]
    elif suffixes[-1] in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize)
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
        rows = csv.DictReader(lines, delimiter="," if suffixes[-1] == ".csv" else "\t")
        records = [("row", i, row) for i, row in enumerate(rows)]
    elif suffixes[-1] in (".jsonl", ".ndjson", ".json"):
        without_mark = content.removeprefix(codecs.BOM_UTF8)
        if without_mark.lstrip().startswith(b"["):
            records = [("record", i, record) for i, record in enumerate(json.loads(without_mark))]
        else:
            records, offset = [], 0
            for number, line in enumerate(content.split(b"\n")):
                counted = ("line", number) if number_lines(name) else ("byte", offset)
                offset += len(line) + 1
                if line.strip():
                    records.append((*counted, json.loads(line.removeprefix(codecs.BOM_UTF8))))
    else:
        records = [("", 0, {key: content.decode("utf-8-sig")})]
    return [(record[key], name, counts, number) for counts, number, record in records if record.get(key)]


def number_lines(name: str) -> bool:
    """Whether lines are counted, as in compressed files, where a byte's position helps nobody."""
    return Path(name).suffix in COMPRESSIONS


def write(directory: Path, name: str, content: bytes) -> list[Origin]:
    """Write a file, compressed as its name says; returns its documents as the naive reader sees them."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(content, path.suffix))
    return naive_documents(name, content)


def file_name(kind: str, compression: str = "") -> str:
    suffix, _, what = kind.partition(" ")
    return f"{what or suffix[1:]}{suffix}{compression}"


def write_mixed_corpus(directory: Path, seed: int = 0, count: int = 12, longest: int = 60) -> list[Origin]:
    """Files of every kind in every compression; returns the documents in the order of their files."""
    documents: dict[str, list[Origin]] = {}
    for number, (kind, compression) in enumerate(itertools.product(KINDS, COMPRESSIONS)):
        if kind == ".parquet" and compression:
            continue
        name = ["", "folder/", "フォルダ/"][number % 3] + file_name(kind, compression)
        documents[name] = write(directory, name, content_of(kind, random_texts(seed + number, count, longest)))
    return [document for name in sorted(documents) for document in documents[name]]


def read(corpus: Corpus, unit_bytes: int = WHOLE) -> list[Document | BadRecord]:
    return [item for unit in find_units(corpus, unit_bytes)[0] for item in read_unit(corpus, unit)]


def read_file(directory: Path, name: str, content: bytes, unit_bytes: int = WHOLE) -> list[Document | BadRecord]:
    """Read everything in a file with just this content."""
    path = directory / name
    path.write_bytes(content)
    corpus = Corpus(str(directory))
    return [item for unit in plan_units(str(directory), [name], unit_bytes) for item in read_unit(corpus, unit)]


def joined(items: Iterable[Document | BadRecord]) -> list[Origin]:
    """Documents with their parts put together, without bad records."""
    documents: list[Origin] = []
    inside = False
    for item in items:
        if isinstance(item, BadRecord):
            assert not inside, "a bad record in the middle of a document"
            continue
        origin = (item.path, item.counts, item.record)
        if inside:
            assert documents[-1][1:] == origin, "the next part is of another document"
            documents[-1] = (documents[-1][0] + item.text, *origin)
        else:
            documents.append((item.text, *origin))
        inside = item.continued
    assert not inside, "the last part is missing"
    return documents


def texts_of(items: Iterable[Document | BadRecord]) -> list[str]:
    return [text for text, *_ in joined(items)]


def bad_of(items: Iterable[Document | BadRecord]) -> list[str]:
    return [str(item) for item in items if isinstance(item, BadRecord)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n \r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_json_lines(tmp_path: Path, suffix: str, compression: str, line_end: str, mark: bytes):
    """Also with blank lines, without a last line end, and after a byte order mark."""
    for seed in range(3):
        content = mark + json_lines(random_texts(seed, 20, 40), line_end, last_line_end=seed == 1)
        expected = write(tmp_path, f"a{suffix}{compression}", content)
        items = read(Corpus(str(tmp_path)))
        assert len(expected) == 20 and bad_of(items) == []
        assert joined(items) == expected


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_json_array(tmp_path: Path, compression: str, indent: int | None, ensure_ascii: bool):
    """However it is spread over lines, it is never taken for JSON lines, nor cut."""
    for seed in range(3):
        content = b" \n" * seed + json_array(random_texts(seed, 20, 40), indent, ensure_ascii)
        expected = write(tmp_path, f"a.json{compression}", content)
        for unit_bytes in (1, WHOLE):
            items = read(Corpus(str(tmp_path)), unit_bytes)
            assert len(expected) == 20 and bad_of(items) == []
            assert joined(items) == expected


def test_json_array_after_a_byte_order_mark(tmp_path: Path):
    expected = write(tmp_path, "a.json", codecs.BOM_UTF8 + json_array(random_texts(0, 5, 20)))
    items = read(Corpus(str(tmp_path)))
    assert bad_of(items) == []
    assert joined(items) == expected


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "1e999", "1e-999", "0.1"])
def test_numbers_in_a_json_array(tmp_path: Path, number: str):
    """Python reads integers of any size; a large one must not cost the rest of the file."""
    content = f'[{{"text": "a"}}, {{"id": {number}, "text": "b"}}, {{"text": "c"}}]'.encode()
    items = read_file(tmp_path, "a.json", content)
    assert bad_of(items) == []
    assert texts_of(items) == [record["text"] for record in json.loads(content)]


@pytest.mark.parametrize("text", ["\\ud83d", "x\\udc00y", "\\ud83d x"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair(tmp_path: Path, name: str, text: str):
    """One bad record, in any file: the text is not changed, and the run does not end."""
    records = ['{"text": "before"}', f'{{"text": "{text}"}}', '{"text": "after"}']
    content = "\n".join(records) if name == "a.jsonl" else f"[{', '.join(records)}]"
    items = read_file(tmp_path, name, content.encode())
    assert texts_of(items) == ["before", "after"]
    assert len(bad_of(items)) == 1 and bad_of(items)[0].startswith("a.json")


def test_first_line_that_is_a_list(tmp_path: Path):
    """A bad line costs only itself, even the first: .jsonl holds lines, even if the first of them looks like an
    array."""
    items = read_file(tmp_path, "a.jsonl", b'["text"]\n{"text": "b"}\n{"text": "c"}\n')
    assert joined(items) == [("b", "a.jsonl", "byte", 9), ("c", "a.jsonl", "byte", 23)]
    assert len(bad_of(items)) == 1 and bad_of(items)[0].startswith("a.jsonl at byte 0: ")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".parquet"])
def test_several_compressed_members(tmp_path: Path, kind: str, compression: str):
    """As from `cat a.gz b.gz > c.gz` and parallel compressors; members end anywhere, one is empty."""
    content, rng = content_of(kind, random_texts(0, 40, 60)), random.Random(0)
    cuts = [0, *sorted(rng.choices(range(len(content)), k=6)), len(content)]
    members = [content[start:end] for start, end in itertools.pairwise(cuts)]
    members.insert(3, b"")
    name = file_name(kind, compression)
    expected = naive_documents(name, content)
    items = read_file(tmp_path, name, b"".join(compress(member, compression) for member in members))
    assert bad_of(items) == []
    assert joined(items) == expected and len(expected) in (1, 40)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".parquet"])
def test_compressed_file_of_several_buffers(tmp_path: Path, kind: str, compression: str):
    """Large enough that lines, characters and compressed blocks cross the borders of a single read."""
    texts = random_texts(1, 60, 200) * 30 + random_texts(2, 3, 200_000)
    name = file_name(kind, compression)
    expected = write(tmp_path, name, content_of(kind, texts))
    items = read(Corpus(str(tmp_path)))
    assert bad_of(items) == []
    assert joined(items) == expected


@pytest.mark.parametrize("rows_a_group", [1, 7, 1000])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet(tmp_path: Path, rows_a_group: int, compression: str):
    """Cut into units of row groups; rows without text are empty or bad, but counted."""
    texts: list[str | None] = list(random_texts(0, 600, 30))
    texts[3], texts[17], texts[300] = None, "", None
    content = parquet({"id": list(range(600)), "text": texts}, rows_a_group, compression=compression)
    expected = write(tmp_path, "a.parquet", content)
    groups = pyarrow.parquet.read_metadata(tmp_path / "a.parquet").num_row_groups
    assert len(expected) == 597 and groups == -(-600 // rows_a_group)
    for unit_bytes in (1, 700, 5000, WHOLE):
        units = plan_units(str(tmp_path), ["a.parquet"], unit_bytes)
        pieces = [piece for unit in units for piece in unit.pieces]
        assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
        assert pieces[-1].end == groups and (len(units) == groups if unit_bytes == 1 else True)
        items = read(Corpus(str(tmp_path)), unit_bytes)
        assert joined(items) == expected
        assert [bad.partition(":")[0] for bad in bad_of(items)] == ["a.parquet row 3", "a.parquet row 300"]


def test_parquet_types_of_text(tmp_path: Path):
    texts = random_texts(0, 50, 20)
    columns = {
        "plain": pyarrow.array(texts),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "view": pyarrow.array(texts, pyarrow.string_view()),
        "json": pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts)),
        "words": pyarrow.array(texts).dictionary_encode(),
        "a.b": pyarrow.array(texts),
    }
    (tmp_path / "a.parquet").write_bytes(parquet(columns))
    for key in columns:
        assert texts_of(read(Corpus(str(tmp_path), TextFields((key,))))) == texts


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_tables(tmp_path: Path, separator: str, compression: str, line_end: str):
    """Quoted line ends and separators, fields longer than the csv module's default limit, a byte order mark."""
    texts = [*random_texts(0, 200, 40), random_text(random.Random(1), 300_000), "last"]
    texts[5] = ""
    for mark in (b"", codecs.BOM_UTF8):
        name = f"a{'.csv' if separator == ',' else '.tsv'}{compression}"
        expected = write(tmp_path, name, mark + table(texts, separator, line_end))
        items = read(Corpus(str(tmp_path)), unit_bytes=1)
        assert bad_of(items) == []
        assert joined(items) == expected
        assert [text for text, *_ in expected] == [text for text in texts if text]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".PY", ".cu", ".html"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_text_files(tmp_path: Path, suffix: str, compression: str, mark: bytes):
    """The file is the document, with its line ends."""
    content = mark + "".join(random_texts(0, 5, 60)).encode() + b"\r\nend\r\n\n"
    expected = write(tmp_path, f"a{suffix}{compression}", content)
    assert expected[0][0] == content.removeprefix(mark).decode() and expected[0][2:] == ("", 0)
    assert read(Corpus(str(tmp_path)), unit_bytes=1) == [Document(*expected[0])]


@pytest.mark.parametrize("unit_bytes", [1, 2, 17, 100, 1000, 5000, WHOLE])
def test_any_unit_size_gives_the_same_documents(tmp_path: Path, unit_bytes: int):
    expected = write_mixed_corpus(tmp_path)
    items = read(Corpus(str(tmp_path)), unit_bytes)
    assert bad_of(items) == []
    assert joined(items) == expected


def test_random_line_lengths_and_unit_sizes(tmp_path: Path):
    """Lines of JSON far longer and shorter than a unit, and units that begin right at, before and after a line."""
    for seed in range(40):
        rng = random.Random(seed)
        texts = [random_text(rng, rng.choice([0, 1, 3, 30, 300])) for _ in range(rng.randint(1, 12))]
        line_end = rng.choice(["\n", "\r\n", "\n\n"])
        expected = write(tmp_path, "a.jsonl", json_lines(texts, line_end, rng.random() < 0.5))
        items = read(Corpus(str(tmp_path)), rng.randint(1, 400)) if expected else []
        assert bad_of(items) == [], seed
        assert joined(items) == expected, seed


def test_place_leads_to_the_record(tmp_path: Path):
    """Meaning of a byte number, checked without the naive reader: the line at this position is the record."""
    texts = random_texts(0, 50, 100)
    write(tmp_path, "a.jsonl", codecs.BOM_UTF8 + json_lines(texts, "\n\n"))
    content = (tmp_path / "a.jsonl").read_bytes()
    documents = joined(read(Corpus(str(tmp_path)), 300))
    assert [text for text, *_ in documents] == texts
    for text, path, counts, record in documents:
        line = content[record:].removeprefix(codecs.BOM_UTF8).partition(b"\n")[0]
        assert counts == "byte" and json.loads(line)["text"] == text
        assert place(path, counts, record) == f"a.jsonl at byte {record}"
    assert place("b.parquet", "row", 3) == "b.parquet row 3" and place("c.txt", "", 0) == "c.txt"


def test_progress_adds_up_to_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise the bar stops early, or waits at its end for an hour."""
    write_mixed_corpus(tmp_path, count=300)
    monkeypatch.setattr(limits, "BUFFER_BYTES", 1000)
    corpus = Corpus(str(tmp_path))
    for unit in plan_units(corpus.root, list_inputs(corpus)[0], WHOLE):
        reported: list[int] = []
        assert list(read_unit(corpus, unit, reported.append))
        assert len(reported) > len(unit.pieces)
        assert min(reported) >= 0 and sum(reported) == unit.num_bytes


FIELD_RECORDS = [
    ({"a": "1", "b": "2", "c": "3"}, "1|2|3"),
    ({"c": "3", "b": "2", "a": "1"}, "1|2|3"),
    ({"a": "1", "c": "3"}, "1|3"),
    ({"a": None, "b": "2", "c": None}, "2"),
    ({"a": "", "b": "2", "c": ""}, "2"),
    ({"a": "1", "b": "", "c": "3"}, "1|3"),
    ({"b": "漢\n字"}, "漢\n字"),
    ({"a": "|", "b": " "}, "|| "),
    ({"a": "", "b": None}, ""),
    ({"a": "1", "b": 2}, None),
    ({"a": "1", "b": ["2"]}, None),
    ({"a": None}, None),
    ({"d": "4"}, None),
    ({}, None),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.json"])
def test_several_text_keys(tmp_path: Path, name: str):
    """In the given order; null, empty or missing fields leave no separator."""
    records = [record for record, _ in FIELD_RECORDS]
    content = json.dumps(records) if name == "a.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_bytes(compress(content.encode(), Path(name).suffix))
    items = read(Corpus(str(tmp_path), TextFields(("a", "b", "c"), "|")))
    assert texts_of(items) == [text for _, text in FIELD_RECORDS if text]
    assert len(bad_of(items)) == sum(text is None for _, text in FIELD_RECORDS)
    assert all("--text_key" in bad and '"a" or "b" or "c"' in bad for bad in bad_of(items))


def test_several_text_keys_of_columns(tmp_path: Path):
    """Columns that a file lacks are left out, as long as it has one; their order in the file does not matter."""
    rows = [("3", "1"), ("", "1"), ("3", ""), ("", ""), ("x\ny", "z")]
    target = io.StringIO(newline="")
    csv.writer(target).writerows([("c", "a"), *rows])
    (tmp_path / "a.csv").write_text(target.getvalue(), "utf-8")
    columns = {"c": [c for c, _ in rows], "other": [0] * len(rows), "a": [a for _, a in rows]}
    (tmp_path / "b.parquet").write_bytes(parquet(columns))
    items = read(Corpus(str(tmp_path), TextFields(("a", "b", "c"), " + ")))
    expected = ["1 + 3", "1", "3", "z + x\ny"]
    assert bad_of(items) == []
    assert texts_of(items) == expected * 2
    assert [item.record for item in items] == [0, 1, 2, 4] * 2


def test_flags(tmp_path: Path):
    def corpus(*flags: str) -> Corpus:
        parser = argparse.ArgumentParser()
        add_corpus_arguments(parser)
        return corpus_from(parser.parse_args(flags), str(tmp_path))

    assert corpus() == Corpus(str(tmp_path))
    assert corpus("--text_key", "a, b,c").fields == TextFields(("a", "b", "c"), "\n")
    assert corpus("--text_separator", "\\n\\n").fields.separator == "\n\n"
    assert corpus("--text_separator", "\\t").fields.separator == "\t"
    assert corpus("--text_separator", "").fields.separator == ""
    chosen = corpus("--include", "*.jsonl,zh/*", "--exclude", "test/*")
    assert (chosen.include, chosen.exclude) == (("*.jsonl", "zh/*"), ("test/*",))
    with pytest.raises(ValueError, match="--text_key names no field"):
        corpus("--text_key", " ,")


def test_include_and_exclude(tmp_path: Path):
    names = ["a.jsonl", "b.txt", "zh/a.jsonl", "zh/deep/c.txt", "test/d.jsonl", "test/e.png", "f[1].txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')

    def inputs(include: str, exclude: str = "") -> tuple[list[str], list[str]]:
        patterns = (tuple(filter(None, words.split(","))) for words in (include, exclude))
        found, left_out = list_inputs(Corpus(str(tmp_path), TextFields(), *patterns))
        return found, list(left_out)

    readable = [name for name in names if name != "test/e.png"]
    assert inputs("*") == (sorted(readable), ["test/e.png"])
    assert inputs("*.jsonl") == (["a.jsonl", "test/d.jsonl", "zh/a.jsonl"], [])
    assert inputs("*.jsonl,zh/*", "test/*") == (["a.jsonl", "zh/a.jsonl", "zh/deep/c.txt"], [])
    assert inputs("*", "*.jsonl,*.txt") == ([], ["test/e.png"])
    assert inputs("f[[]1].txt") == (["f[1].txt"], [])
    with pytest.raises(ValueError, match="holds no text.*--include"):
        find_units(Corpus(str(tmp_path), include=("*.nothing",)), WHOLE)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_units(Corpus(str(tmp_path / "nowhere")), WHOLE)
    with pytest.raises(ValueError, match="a.jsonl is a file: give the directory that it lies in"):
        find_units(Corpus(str(tmp_path / "a.jsonl")), WHOLE)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "pretokenize.json").write_text("{}")
    with pytest.raises(ValueError, match="tokens is pretokenized and holds tokens: give the directory with the raw"):
        find_units(Corpus(str(tmp_path / "tokens")), WHOLE)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json array", ".csv"])
def test_truncated_compressed_file(tmp_path: Path, kind: str, compression: str):
    """As after a broken download: the part before the damage is read, and the loss is counted."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop", k=500)) for _ in range(1000)]
    name = file_name(kind, compression)
    content = compress(content_of(kind, texts), compression)
    for share in (0.3, 0.6, 0.9):
        items = read_file(tmp_path, name, content[: int(share * len(content))])
        documents = texts_of(items)
        assert documents == texts[: len(documents)]
        # A decompressor holds back a block, at most a quarter of this file.
        assert (share - 0.27) * len(texts) < len(documents) < (share + 0.01) * len(texts)
        assert isinstance(items[-1], BadRecord) and len(bad_of(items)) == 1
        assert items[-1].where.startswith(f"{name} after ") and "what follows is lost" in items[-1].why


@pytest.mark.parametrize("kind", [".jsonl", ".json array", ".csv"])
def test_truncated_small_file(tmp_path: Path, kind: str):
    """The damage is met while the first bytes are inspected for the file's kind."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnop", k=100)) for _ in range(100)]
    content = gzip.compress(content_of(kind, texts))
    items = read_file(tmp_path, file_name(kind, ".gz"), content[: len(content) // 2])
    documents = texts_of(items)
    assert documents == texts[: len(documents)] and 30 < len(documents) < 60
    assert len(bad_of(items)) == 1 and isinstance(items[-1], BadRecord)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".parquet"])
def test_compressed_file_of_something_else(tmp_path: Path, kind: str, compression: str):
    """Even if nothing in it can be read, it is one bad record, not the end of the run."""
    name = file_name(kind, compression)
    for content in (b"hello " * 20, compress(b"", compression)[:3], b"x"):
        items = read_file(tmp_path, name, content)
        assert len(items) == 1 and isinstance(items[0], BadRecord)
        assert items[0].where == name and "damaged" in items[0].why


@pytest.mark.parametrize("compression", [".gz", ".xz"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_flipped_bytes_in_a_compressed_file(tmp_path: Path, kind: str, compression: str):
    """Its checksum shows the damage, at the latest at its end: whatever was read before, the damage is counted."""
    name, rng = file_name(kind, compression), random.Random(0)
    plain, decompress = content_of(kind, random_texts(0, 100, 50)), {".gz": gzip, ".xz": lzma}[compression].decompress
    content, harmful = compress(plain, compression), 0
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content) // 4, len(content) - 40)] ^= 1 << rng.randrange(8)
        with suppress(EOFError, OSError, zlib.error, lzma.LZMAError):
            # Some bits of a code are never read.
            if decompress(bytes(damaged)) == plain:
                continue
        harmful += 1
        assert bad_of(read_file(tmp_path, name, bytes(damaged)))
    assert harmful > 10


BROKEN_FIRST_LINES = [b'{"text": "cut', b"no JSON", b'"text"', b"5", b'{"text": "\xff"}', b'{"body": "x"}', b"{"]


@pytest.mark.parametrize("line", BROKEN_FIRST_LINES)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_broken_first_line(tmp_path: Path, name: str, line: bytes, line_end: bytes):
    """The lines after it are read: such a file is not an object spread over lines."""
    content = line_end.join([line, b'{"text": "b"}', b'{"text": "c"}', b'{"text": "d"}'])
    items = read_file(tmp_path, name, compress(content, Path(name).suffix))
    assert texts_of(items) == ["b", "c", "d"]
    assert len(bad_of(items)) == 1


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_object_spread_over_lines(tmp_path: Path, compression: str):
    """Some program's settings: one bad record for the file, not one per line; or one document if it has the text."""
    settings = {"name": "x", "values": list(range(200)), "nested": {"text": "no text of ours"}}
    name = f"a.json{compression}"
    for unit_bytes in (10, WHOLE):
        content = compress(json.dumps(settings, indent=2).encode(), compression)
        items = read_file(tmp_path, name, content, unit_bytes)
        assert len(items) == 1 and bad_of(items)[0].startswith(f"{name}: no text under the key")
        content = compress(json.dumps({**settings, "text": "all"}, indent=2).encode(), compression)
        assert read_file(tmp_path, name, content, unit_bytes) == [Document("all", name, "", 0)]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_array_that_is_named_lines(tmp_path: Path, suffix: str, indent: int | None):
    """Read as its real kind, and never cut."""
    texts = random_texts(1, 20, 40)
    for unit_bytes in (1, WHOLE):
        items = read_file(tmp_path, f"a{suffix}", compress(json_array(texts, indent), suffix[6:]), unit_bytes)
        assert texts_of(items) == texts and bad_of(items) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.xz", "a.json"])
@pytest.mark.parametrize("indent, between", [(0, "\n"), (2, "\n"), (2, "\n\n"), (1, "")])
def test_objects_spread_over_lines(tmp_path: Path, name: str, indent: int, between: str):
    records = [{"id": {"n": number}, "text": text} for number, text in enumerate(random_texts(2, 20, 40))]
    content = between.join(json.dumps(record, indent=indent) for record in records).encode()
    for unit_bytes in (1, WHOLE):
        items = read_file(tmp_path, name, compress(content, Path(name).suffix), unit_bytes)
        assert texts_of(items) == [record["text"] for record in records] and bad_of(items) == []
        assert [item.record for item in items] == list(range(20))
    damaged = content + b'{\n "text": "cut'
    items = read_file(tmp_path, name, compress(damaged, Path(name).suffix))
    assert len(texts_of(items)) == 20 and "after record 19: damaged" in bad_of(items)[0]


def test_numbers_in_an_array_stay_what_they_are(tmp_path: Path):
    """A record that is wanted whole holds arguments of calls, in which 3 differs from 3.0; long numbers cost
    nothing."""
    (tmp_path / "a.json").write_text(f'[{{"n": 3, "x": 0.5}}, {{"n": {"9" * 5000}}}, {{"n": -1}}]')
    values = [item.value for item in read(Corpus(str(tmp_path), None))]
    assert json.dumps(values[0]) == '{"n": 3, "x": 0.5}' and json.dumps(values[2]) == '{"n": -1}'


@pytest.mark.parametrize("name", ["a.txt", "a.py.gz", "a.jsonl", "a.json", "a.csv", "a.tsv.xz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_named(tmp_path: Path, name: str, encoding: str):
    """Once per file, however it would be cut; without a mark, UTF-16 of western text is valid UTF-8 full of zeros."""
    content = '[{"text": "one"}]' if ".json" in name else 'text,more\none,"two"\n' * 20
    items = read_file(tmp_path, name, compress(content.encode(encoding), Path(name).suffix), 16)
    assert len(items) == 1 and bad_of(items)[0].startswith(f"{name}: UTF-{encoding[4:6]}")
    assert "iconv -f UTF-" in bad_of(items)[0]


def test_parquet_gives_no_object_names_that_it_lacked(tmp_path: Path):
    """Arrow gives each object the names of all: a call would have arguments that nobody gave."""
    records = [{"m": [{"a": {"city": "Paris"}}, {"a": {"day": 2}}]}, {"m": [None, {"a": {}}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert [item.value for item in read(Corpus(str(tmp_path), None))] == records


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".py"])
def test_text_that_is_not_utf8(tmp_path: Path, suffix: str):
    content = "naïve".encode("latin-1")
    items = read_file(tmp_path, f"a{suffix}", compress(content, Path(f"a{suffix}").suffix))
    assert len(items) == 1 and bad_of(items)[0].startswith(f"a{suffix}: not UTF-8")
    cut_off = "漢".encode()[:2]
    items = read_file(tmp_path, f"a{suffix}", compress(cut_off, Path(f"a{suffix}").suffix))
    assert len(items) == 1 and "not UTF-8" in bad_of(items)[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv.xz", "a.parquet"])
def test_record_that_is_not_utf8(tmp_path: Path, name: str):
    """Only that record is refused, by its number."""
    texts = [b"first", b"caf\xe9", b"last"]
    if name == "a.parquet":
        content = parquet({"text": pyarrow.array(texts).view(pyarrow.string())})
    elif ".jsonl" in name:
        content = b"\n".join(b'{"text": "' + text + b'"}' for text in texts)
    else:
        content = b"text\r\n" + b"\r\n".join(texts)
    items = read_file(tmp_path, name, compress(content, Path(name).suffix))
    assert texts_of(items) == ["first", "last"]
    where = {"a.jsonl": "a.jsonl at byte 18", "a.jsonl.gz": "a.jsonl.gz line 1"}.get(name, f"{name} row 1")
    assert [bad.partition(":")[0] for bad in bad_of(items)] == [where]


@pytest.mark.parametrize("where", ["at byte", "line", "record", "row"])
def test_record_without_the_key(tmp_path: Path, where: str):
    """The sentence names the record, and the flag to change."""
    name = {"at byte": "a.jsonl", "line": "a.ndjson.gz", "record": "a.json", "row": "a.parquet"}[where]
    records = [{"text": "a"}, {"text": None, "body": "b"}, {"text": "c"}]
    if where == "row":
        content = parquet({"text": ["a", None, "c"]})
    else:
        content = json.dumps(records).encode() if where == "record" else "\n".join(map(json.dumps, records)).encode()
    items = read_file(tmp_path, name, compress(content, Path(name).suffix))
    assert texts_of(items) == ["a", "c"]
    number = 14 if where == "at byte" else 1
    assert bad_of(items) == [f'{name} {where} {number}: no text under the key "text" (choose it with --text_key)']


@pytest.mark.parametrize("content", [b'5, "x"', b'["text"]', b"null", b'{"text": 5}', b'{"body": "x"}', b"{}"])
def test_array_element_without_text(tmp_path: Path, content: bytes):
    items = read_file(tmp_path, "a.json", b'[{"text": "a"}, ' + content + b', {"text": "b"}]')
    assert texts_of(items) == ["a", "b"]
    assert len(bad_of(items)) == (2 if content == b'5, "x"' else 1)
    assert bad_of(items)[0].startswith("a.json record 1: ")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("damage", [b'{"text": "x" "y"}', b"]", b"}", b'{"text": "\n"}', b""])
def test_array_broken_in_the_middle(tmp_path: Path, damage: bytes, compression: str):
    """The part before it is read; the rest cannot be told from damage."""
    texts = [f"text {i} " + "x" * 50 for i in range(50)]
    elements = [json.dumps({"text": text}).encode() for text in texts]
    # Nothing at all: the file ends there.
    tail = [damage, *elements[30:]] if damage else []
    content = b"[" + b", ".join([*elements[:30], *tail]) + b"]" * bool(damage)
    name = f"a.json{compression}"
    items = read_file(tmp_path, name, compress(content, compression))
    assert texts_of(items) == texts[:30]
    assert len(bad_of(items)) == 1 and isinstance(items[-1], BadRecord)
    assert items[-1].where == f"{name} after record 29" and "damaged, what follows is lost" in items[-1].why


@pytest.mark.parametrize("tail", [b", ", b" x", b" [1]", b'{"text": "x"}'])
def test_more_after_an_array(tmp_path: Path, tail: bytes):
    """Two arrays in one file, for example: text after the first is not lost silently."""
    items = read_file(tmp_path, "a.json", b'[{"text": "a"}]' + tail + b"\n")
    assert texts_of(items) == ["a"]
    assert bad_of(items) == ["a.json after record 0: damaged, what follows is lost (there is more after the array)"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_element_that_is_not_utf8(tmp_path: Path, compression: str):
    """Only that element is refused."""
    content = b'[{"text": "a"}, {"text": "\xff"}, {"text": "b", "other": "\xff"}]'
    items = read_file(tmp_path, f"a.json{compression}", compress(content, compression))
    assert texts_of(items) == ["a", "b"]
    assert bad_of(items) == [f"a.json{compression} record 1: not valid Unicode"]


@pytest.mark.parametrize("size", [2, 7, 100])
def test_array_elements_longer_than_what_is_read_at_once(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch):
    """Wherever a read ends: in an escape, a number, a string, between elements."""
    monkeypatch.setattr(limits, "BUFFER_BYTES", size)
    records = [{"n": -1.5e-3, "text": 'é\\"\n\u1234 ' * i, "more": [True, None, {"x": [i]}]} for i in range(1, 9)]
    content = json.dumps(records, indent=1).encode()
    assert texts_of(read_file(tmp_path, "a.json", content)) == [record["text"] for record in records]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".parquet"])
def test_empty_files(tmp_path: Path, kind: str, compression: str):
    """Neither documents nor errors: no bytes, no text, or only the frame."""
    name = file_name(kind, compression)
    frames = {".json array": [b"[]", b" [\n]\n"], ".csv": [b"text\n", b"id,text"], ".tsv": [b"id\ttext\r\n"]}
    frames[".jsonl"] = frames[".json lines"] = [b"\n", b" \n\r\n"]
    for content in (b"", codecs.BOM_UTF8, *frames.get(kind, [])):
        assert read_file(tmp_path, name, compress(content, compression)) == []
    assert read_file(tmp_path, name, b"") == []


def test_empty_parquet(tmp_path: Path):
    nothing = pyarrow.array([], pyarrow.string())
    assert read_file(tmp_path, "a.parquet", b"") == []
    assert read_file(tmp_path, "a.parquet", parquet({"text": nothing})) == []
    assert read_file(tmp_path, "a.parquet", parquet({"text": [""] * 20})) == []


@pytest.mark.parametrize("damage", ["garbage", "one byte", "cut at the end", "cut in half", "footer"])
def test_parquet_that_is_none(tmp_path: Path, damage: str):
    """Its table of contents is at the end: without it nothing can be planned, and the sentence names the file."""
    whole = parquet({"text": random_texts(0, 100, 50)})
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    content = {
        "garbage": b"garbage " * 20,
        "one byte": b"x",
        "cut at the end": whole[:-10],
        "cut in half": whole[: len(whole) // 2],
        "footer": whole[:-footer] + b"\xff" * (footer - 8) + whole[-8:],
    }[damage]
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file.*mend or remove it"):
        find_units(Corpus(str(tmp_path)), WHOLE)


def test_parquet_with_damaged_pages(tmp_path: Path):
    """The row groups before it are read, the loss is counted, and the next unit is not affected."""
    texts = [text.replace("\0", " ") for text in random_texts(0, 1000, 50)]
    whole = parquet({"text": texts}, rows_a_group=100, compression="zstd")
    (tmp_path / "a.parquet").write_bytes(whole)
    chunk = pyarrow.parquet.read_metadata(tmp_path / "a.parquet").row_group(4).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged = whole[:start] + bytes(200) + whole[start + 200 :]
    items = read_file(tmp_path, "a.parquet", damaged, unit_bytes=1)
    assert texts_of(items) == texts[:400] + texts[500:]
    assert len(bad_of(items)) == 1 and "damaged, what follows is lost" in bad_of(items)[0]
    items = read_file(tmp_path, "a.parquet", damaged)
    assert texts_of(items) == texts[: len(texts_of(items))] and 0 < len(texts_of(items)) <= 400
    assert len(bad_of(items)) == 1 and bad_of(items)[0].startswith("a.parquet after row ")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.parquet"])
def test_table_without_the_column(tmp_path: Path, name: str):
    """One sentence with the columns that are there, not a bad record per row."""
    if name == "a.parquet":
        content = parquet({"id": [1], "body": ["x"]})
    else:
        content = f"id{'	' if '.tsv' in name else ','}body\n1\n".encode()
    with pytest.raises(ValueError, match=rf'{name} has no column "text" but id, body: .*--text_key.*--exclude'):
        read_file(tmp_path, name, compress(content, Path(name).suffix))


def test_rows_of_the_wrong_length(tmp_path: Path):
    """Text after an unquoted comma is not lost silently; empty cells are not a loss."""
    items = read_file(tmp_path, "a.csv", b"id,text\n1,one\n2\n3,three,more\n\n\n4,four,,\n")
    assert joined(items) == [("one", "a.csv", "row", 0), ("four", "a.csv", "row", 3)]
    short, long = bad_of(items)
    assert short.startswith("a.csv row 1: no text")
    assert long == "a.csv row 2: 3 cells for 2 columns: a text with the separator in it needs quotes"


@pytest.mark.parametrize("longest", [1, 2, 3, 7, 64])
def test_long_documents_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int):
    """The parts join to the text; characters of several bytes cross all borders of single reads."""
    expected = write_mixed_corpus(tmp_path, seed=5, longest=100)
    monkeypatch.setattr(limits, "LONGEST_PART", longest)
    for unit_bytes in (500, WHOLE):
        items = read(Corpus(str(tmp_path)), unit_bytes)
        assert bad_of(items) == []
        assert all(isinstance(item, Document) and 0 < len(item.text) <= longest for item in items)
        assert joined(items) == expected
        assert sum(item.continued for item in items) == len(items) - len(expected) > 0


def test_parts_end_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where no token crosses: after a line end that no blank follows, if there is one in the second half."""
    lines = ["word " * 5, "    indented", "", "x", "\ty", "z" * 30, "end of it"] * 40
    text = "\n".join(lines)
    monkeypatch.setattr(limits, "LONGEST_PART", 120)
    for name, content in (("a.txt", text.encode()), ("a.jsonl", json.dumps({"text": text}).encode())):
        items = read_file(tmp_path, name, content)
        assert texts_of(items) == [text] and len(items) > 10
        for part, following in itertools.pairwise(items):
            assert 60 <= len(part.text) <= 120
            assert part.text.endswith("\n") and not following.text[0].isspace()


def test_text_that_turns_out_not_to_be_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After its first parts are gone: the document ends there, and the loss is counted."""
    monkeypatch.setattr(limits, "LONGEST_PART", 50)
    text = "漢字 and text\n" * 40
    for damage in (b"\xff", "漢".encode()[:2]):
        items = read_file(tmp_path, "a.txt", text.encode() + damage)
        (document,) = joined(items)
        assert text.startswith(document[0]) and len(text) - len(document[0]) <= 50
        assert [type(item) for item in items[-2:]] == [Document, BadRecord]
        assert bad_of(items)[0].startswith("a.txt: not UTF-8") and "what follows is lost" in bad_of(items)[0]


def test_compressed_text_that_turns_out_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "LONGEST_PART", 1000)
    text = "".join(random.Random(0).choices("abcdefgh \n", k=300_000))
    content = gzip.compress(text.encode())
    items = read_file(tmp_path, "a.txt.gz", content[: len(content) // 2])
    (document,) = joined(items)
    assert text.startswith(document[0]) and 0.2 * len(text) < len(document[0]) < 0.6 * len(text)
    assert len(bad_of(items)) == 1 and "damaged" in bad_of(items)[0] and "what follows is lost" in bad_of(items)[0]


READ_AND_MEASURE = """
import sys
from data_preprocess.readers import Corpus, Document, find_units, read_unit

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

corpus = Corpus(sys.argv[1])
before = peak()
units, _ = find_units(corpus, 1_000_000)
units[0].fingerprint(corpus)
documents = characters = 0
for item in read_unit(corpus, units[0]):
    assert isinstance(item, Document), item
    documents += 1
    characters += len(item.text)
print(len(units), documents, characters, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory in /proc")
@pytest.mark.parametrize("compression", ["", ".zst"])
def test_large_array_is_read_in_bounded_memory(tmp_path: Path, compression: str):
    """300 MB on a single line. In its own process, by VmHWM, because ru_maxrss begins with that of the parent."""
    element = json.dumps({"id": 1, "text": "some text of a document " * 100}).encode()
    count = 300_000_000 // len(element)
    path = tmp_path / f"a.json{compression}"
    with open(path, "wb") as file:
        for number in range(0, count, 1000):
            batch = b"," * bool(number) + b",".join([element] * min(1000, count - number))
            batch = b"[" * (not number) + batch + b"]" * (number + 1000 >= count)
            # One frame after another.
            file.write(compress(batch, compression))
    command = [sys.executable, "-c", READ_AND_MEASURE, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    units, documents, characters, grown_kib = map(int, result.stdout.split())
    assert (units, documents, characters) == (1, count, count * 2400)
    assert grown_kib < 100 * 1024


# ---- records that are too large, and the files that are found


LONG = 1000
"""Replaces LONGEST_RECORD."""


@pytest.mark.parametrize("compression", [*COMPRESSIONS, ".bz2"])
@pytest.mark.parametrize("kind", [".jsonl", ".json array", ".csv", ".json object"])
def test_record_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compression: str):
    """It is named and counted, however it is spelt; records after it are read if they can be found."""
    monkeypatch.setattr(limits, "LONGEST_RECORD", LONG)
    monkeypatch.setattr(limits, "BUFFER_BYTES", 64)
    nested = '{"a": [1, {"b": "]\\\\\\"}"}], "text": "' + 'x\\"' * 5000 + '"}'
    if kind == ".jsonl":
        content, after = f'{{"text": "a"}}\n{nested}\n{{"text": "b"}}\n', ["a", "b"]
    elif kind == ".json array":
        content, after = f'[{{"text": "a"}}, {nested}, {{"text": "b"}}]', ["a", "b"]
    elif kind == ".csv":
        content, after = 'text\na\n"' + "x\n" * 5000 + '"\nb\n', ["a"]
    else:
        content, after = '{\n"text":\n"' + "x" * 5000 + '"\n}', []
    name = file_name(kind, compression)
    for unit_bytes in (100, WHOLE):
        items = read_file(tmp_path, name, compress(content.encode(), compression), unit_bytes)
        assert texts_of(items) == after
        assert len(bad_of(items)) == 1 and "longer than" in bad_of(items)[0] and bad_of(items)[0].startswith(name)


@pytest.mark.parametrize("size", [LONG, LONG + 1])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_longest_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int):
    """Exact to the byte, whatever the size of a read."""
    monkeypatch.setattr(limits, "LONGEST_RECORD", LONG)
    line = '{"text": "' + "x" * (size - 13) + '"}' + "\n" * (name == "a.jsonl")
    line = line if name == "a.jsonl" else line.replace('"}', 'x"}')
    assert len(line) == size
    for buffer in (7, 64, 1 << 20):
        monkeypatch.setattr(limits, "BUFFER_BYTES", buffer)
        items = read_file(tmp_path, name, (line if name == "a.jsonl" else f"[{line}]").encode())
        assert len(bad_of(items)) == (size > LONG and name == "a.json") and len(items) == 1


@pytest.mark.parametrize("depth", [10_000, 300_000])
def test_array_element_that_is_too_deeply_nested(tmp_path: Path, depth: int):
    content = '[{"text": "a"}, ' + "[" * depth + "]" * depth + ', {"text": "b"}]'
    items = read_file(tmp_path, "a.json", content.encode())
    assert texts_of(items) == ["a", "b"] and bad_of(items) == ["a.json record 1: too deeply nested"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst", ".bz2"])
def test_truncated_object(tmp_path: Path, compression: str):
    """An object spread over lines is read as a whole; its damage does not give a traceback."""
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghijklmnop", k=300_000))
    content = compress(json.dumps({"name": 1, "text": text}, indent=1).encode(), compression)
    items = read_file(tmp_path, f"a.json{compression}", content[: len(content) // 2])
    assert len(items) == 1 and bad_of(items)[0].startswith(f"a.json{compression}: damaged, what follows is lost")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2"])
def test_second_member_that_is_none(tmp_path: Path, compression: str):
    """Python's own readers of .xz and .bz2 take it for the end of the file."""
    first, second = (compress(f'{{"text": "{text}"}}\n'.encode(), compression) for text in "ab")
    items = read_file(tmp_path, f"a.jsonl{compression}", first + b"?" + second[1:])
    assert texts_of(items) == ["a"] and len(bad_of(items)) == 1
    items = read_file(tmp_path, f"a.jsonl{compression}", first + bytes(4 * (compression != ".bz2")) + second)
    assert bad_of(items) == [] and texts_of(items) == ["a", "b"]


ODD_COLUMNS = {
    "nanoseconds": pyarrow.array([1000, 1_700_000_000_123_456_789, 3000], pyarrow.timestamp("ns")),
    "duration in nanoseconds": pyarrow.array([1000, 1001, 3000], pyarrow.duration("ns")),
    "no time zone": pyarrow.array([1, 2, 3], pyarrow.timestamp("us", "Mars/Phobos")),
    "long duration": pyarrow.array([1, 2**62, 3], pyarrow.duration("ms")),
    "before year 1": pyarrow.array([1, -(10**6), 3], pyarrow.int32()).view(pyarrow.date32()),
    "not UTF-8": pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string()),
    "words not UTF-8": pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1, 0], pyarrow.int32()), pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    ),
    "list not UTF-8": pyarrow.ListArray.from_arrays(
        [0, 1, 2, 3], pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_COLUMNS)
def test_parquet_value_that_python_cannot_hold(tmp_path: Path, kind: str):
    """In a column that nobody needs, it is not read; in a wanted column, it costs its own row."""
    texts = ["one", "two", "three"]
    (tmp_path / "a.parquet").write_bytes(parquet({"text": texts, "odd": ODD_COLUMNS[kind]}))
    items = read(Corpus(str(tmp_path)))
    assert texts_of(items) == texts and bad_of(items) == []
    items = read(Corpus(str(tmp_path), None, columns=frozenset(["text"])))
    assert [item.value for item in items] == [{"text": text, "odd": None} for text in texts]
    items = read(Corpus(str(tmp_path), None))
    lost = [0, 1, 2] if kind == "no time zone" else [1]
    assert [getattr(item, "where", "") for item in items] == [f"a.parquet row {i}" * (i in lost) for i in range(3)]
    assert all(items[i].why.startswith('the column "odd": ') for i in lost)
    assert all(items[i].value["text"] == texts[i] for i in range(3) if i not in lost)


def test_parquet_without_a_column_of_any_format(tmp_path: Path):
    """Its rows are there, with the names that explain their refusal."""
    (tmp_path / "a.parquet").write_bytes(parquet({"question": ["a"] * 600, "answer": ["b"] * 600}))
    items = read(Corpus(str(tmp_path), None, columns=frozenset(["messages"])))
    assert [item.value for item in items] == [{"question": None, "answer": None}] * 600


def test_parquet_with_a_name_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(parquet({"other": ["a"], "text": ["b"]}).replace(b"other", b"\xd8\xffher"))
    with pytest.raises(ValueError, match="^a.parquet is not a Parquet file .*mend or remove it"):
        read(Corpus(str(tmp_path)))


FLIP_THE_FOOTER = """
import sys
from pathlib import Path
from data_preprocess.readers import Corpus, find_units, read_unit

path = Path(sys.argv[1], "a.parquet")
whole, refused = path.read_bytes(), 0
start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
for position in range(start, len(whole) - 4):
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
    try:
        corpus = Corpus(sys.argv[1])
        for unit in find_units(corpus, 1 << 30)[0]:
            unit.fingerprint(corpus)
            list(read_unit(corpus, unit))
    except ValueError as error:
        refused += "a.parquet" in str(error) or "no text" in str(error)
        assert "a.parquet" in str(error) or "no text" in str(error), error
print(refused)
"""


def test_flipped_bits_in_the_footer_of_a_parquet_file(tmp_path: Path):
    """Arrow ends the whole process when some of the damaged parts are read, so this runs in another process."""
    table = pyarrow.table({"text": ["a", "b"], "more": [[1], [2, 3]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    command = [sys.executable, "-c", FLIP_THE_FOOTER, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 100


def test_parquet_row_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "LONGEST_RECORD", LONG)
    texts = [text * 40 for text in "abc"] + ["x" * 2000, "after"]
    for column in (pyarrow.array(texts), pyarrow.array(texts).dictionary_encode()):
        items = read_file(tmp_path, "a.parquet", parquet({"text": column}))
        assert texts_of(items) == [*texts[:3], "after"]
        assert len(bad_of(items)) == 1 and bad_of(items)[0].startswith("a.parquet row 3: longer than")


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_two_columns_of_one_name(tmp_path: Path, name: str):
    """Several of them could be the text."""
    table = pyarrow.table([["x"], ["y"]], names=["text", "text"])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    content = sink.getvalue().to_pybytes() if name == "a.parquet" else b"text,text\nx,y\n"
    with pytest.raises(ValueError, match=f'{name} has two columns "text"'):
        read_file(tmp_path, name, content)


def test_linked_folders(tmp_path: Path):
    """They are followed, also over several links, but none for ever, and no file is read twice."""
    root, other, third = tmp_path / "root", tmp_path / "other", tmp_path / "third"
    for name, text in {"other/wiki/a": "a", "other/wiki/deep/b": "b", "third/c": "c", "root/own/d": "d"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(text)
    links = {root / "wiki": other / "wiki", root / "again": root / "own", root / "own/loop": root,
             third / "up": tmp_path, other / "wiki/third": third, other / "wiki/self": other / "wiki",
             root / "e.txt": other / "wiki/a.txt", root / "gone": tmp_path / "nowhere",
             root / "up": tmp_path}  # fmt: skip
    for link, target in links.items():
        link.symlink_to(target)
    inputs, left_out = list_inputs(Corpus(str(root)))
    assert inputs == ["e.txt", "own/d.txt", "wiki/deep/b.txt", "wiki/third/c.txt"]
    assert left_out == {
        "again/d.txt": "other names of a file that is read", "wiki/a.txt": "other names of a file that is read",
        "gone": "links that lead nowhere", "up": "links to a folder that they stand in",
        "wiki/third/up": "links to a folder that they stand in",
    }  # fmt: skip
    # An excluded name does not hide the file's other names.
    assert list_inputs(Corpus(str(root), exclude=("own/*", "e.txt")))[0][0] == "again/d.txt"
    assert sorted(texts_of(read(Corpus(str(root))))) == ["a", "b", "c", "d"]


def test_folders_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ["a.txt", "model/tokenizer.json", "model/README.md", "tokenizer/tokenizer.json", "b.tmp-old.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "gone").symlink_to("nowhere")
    inputs, left_out = list_inputs(Corpus(str(tmp_path)))
    assert inputs == ["a.txt", "b.tmp-old.txt"]
    readers.print_left_out(left_out)
    assert capsys.readouterr().err.splitlines() == [
        "left out 1 folders of a tokenizer (model)", "left out 1 links that lead nowhere (gone)"
    ]  # fmt: skip


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_what_cannot_be_looked_at_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
):
    """The disk's error keeps its type, so that a run is tried again. A folder may be excluded."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("text")
    real, name = getattr(os, call), "closed" if call == "scandir" else "b.txt"

    def refuse(path: str, **how) -> object:
        if not isinstance(path, int) and Path(path).name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **how)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError) as caught:
        find_units(Corpus(str(tmp_path)), WHOLE)
    assert caught.value.errno == number and Path(caught.value.filename).name == name
    if call == "scandir":
        assert ("--exclude 'closed/*'" in str(caught.value)) == (number == errno.EACCES)
        assert list_inputs(Corpus(str(tmp_path), exclude=("closed/*",))) == (["a.txt"], {})


@pytest.mark.parametrize(
    ("include", "chosen"),
    [
        ("*.pm", ["a.pm"]), ("*.p[lm]", ["a.pm"]), ("*", []), ("a*", []), ("*.pm.gz", ["b.pm.gz"]), ("*.*", []),
        ("c/Makefile", ["c/Makefile"]), ("c/*", []), ("*.bin", ["d.bin"]), ("*.parquet.gz", []),
    ],
)  # fmt: skip
def test_kind_that_include_names(tmp_path: Path, include: str, chosen: list[str]):
    """It is read as text. Asking for a folder does not mean asking for its pictures."""
    for name in ["a.pm", "b.pm.gz", "c/Makefile", "d.bin", "e.parquet.gz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(compress(b"text of " + name.encode(), Path(name).suffix))
    corpus = Corpus(str(tmp_path), include=(include,))
    inputs, left_out = list_inputs(corpus)
    assert inputs == chosen
    assert not set(left_out) & set(chosen)
    if chosen:
        assert texts_of(read(corpus)) == [f"text of {name}" for name in chosen]
    # Records are wanted, and a text is not one.
    assert list_inputs(replace(corpus, fields=None))[0] == []


def test_every_ending_has_one_reader():
    endings = [ending for reader in READERS for ending in reader.endings]
    assert len(set(endings)) == len(endings)
    assert all(ending == ending.lower() and ending.startswith(".") for ending in endings)
    assert all(set(reader.well_known) <= set(reader.endings) for reader in READERS)

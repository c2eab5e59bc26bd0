"""From raw text to token files: nothing lost, nothing twice, the same bytes whatever happens on the way."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from data_preprocess import build_pretrain_sample_index_map, jobs, pretokenize_pretrain_data
from data_preprocess.jobs import process_corpus, process_unit
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import (
    BadRecord,
    Corpus,
    Document,
    Piece,
    TextFields,
    find_units,
    limits,
    list_inputs,
    plan_units,
    read_piece,
    read_unit,
)
from data_preprocess.shards import PartRecord, set_of
from dataset.format import map_tokens, read_bin_header, read_document_table, read_index
from tests.unit.test_readers import Origin, compress, json_lines, random_texts, write, write_mixed_corpus
from tokenizer import HFBBPETokenizer, load_tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe

ROOT = Path(__file__).resolve().parents[2]
VALID_RATIO = 0.25


def random_text(rng: random.Random, words: int) -> str:
    vocabulary = "the of def return self: x = 1234 naïve 漢字 🧪 <|im_end|> <|endoftext|>".split(" ")
    return "".join(rng.choice(vocabulary) + rng.choice([" ", " ", "\n", "\r\n", "\t"]) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t"
    rng = random.Random(0)
    train_hf_bbpe((random_text(rng, 50) for _ in range(50)), 288, show_progress=False).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> HFBBPETokenizer:
    return load_tokenizer(tokenizer_dir)


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> None:
    """Some lines have characters as UTF-8, some as escapes; no line end after the last."""
    lines = [json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes("\n".join(lines).encode())


def write_corpus(directory: Path) -> list[str]:
    """A source tree and JSON lines, with empty files, equal documents and files that are not text.

    Returns the documents in the order of their files' sorted paths.
    """
    rng = random.Random(1)
    texts: dict[str, list[str]] = {}
    for name in ("a.py", "b/c.txt", "b/d/e.md", "b/d/f.rs", "z.txt"):
        texts[name] = [random_text(rng, rng.randint(1, 60))]
    texts["copy of z.txt"] = texts["z.txt"]
    texts["empty.txt"] = []
    texts["lines.jsonl"] = [random_text(rng, rng.randint(1, 40)) for _ in range(60)]
    texts["more.jsonl"] = [random_text(rng, 10) for _ in range(5)] + texts["lines.jsonl"][:10]
    for name, documents in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            write_jsonl(path, documents)
        else:
            path.write_bytes("".join(documents).encode())
    (directory / ".git").mkdir()
    (directory / ".git" / "hidden.txt").write_text("no document")
    (directory / "picture.png").write_bytes(b"\x89PNG")
    return [text for name in sorted(texts) for text in texts[name]]


def run(
    corpus: Path, output: Path, tokenizer_dir: Path, shard_mb: float = 0.002, num_workers: int = 0, **kwargs
) -> dict:
    """In this process, unless workers are part of the test: starting one takes longer than most tests."""
    return process_corpus(make_job(corpus, output, tokenizer_dir, shard_mb, **kwargs), num_workers)


def make_job(corpus: Path, output: Path, tokenizer_dir: Path, shard_mb: float = 0.002, **options) -> PretrainJob:
    options = {"valid_ratio": VALID_RATIO, "max_bad_records": 0, **options}
    return PretrainJob(Corpus(str(corpus)), str(output), str(tokenizer_dir), shard_bytes=int(shard_mb * 1e6), **options)


def read_set(output: Path, split: str) -> list[list[int]]:
    """Tokens of each document of one set, without the end-of-document token."""
    documents = []
    for name in json.loads((output / "pretokenize.json").read_text())["shards"][split]:
        header = read_bin_header(output / name)
        tokens, starts = map_tokens(output / name, header).tolist(), read_document_table(output / name).starts.tolist()
        assert header.split == split and starts[0] == 0
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            assert tokens[end - 1] == header.eod_id and header.eod_id not in tokens[start : end - 1]
            documents.append(tokens[start : end - 1])
    return documents


def read_origins(output: Path, names: list[str], tokenizer: HFBBPETokenizer) -> list[Origin]:
    """Text of each document of some shards, and its origin from the .docs."""
    documents = []
    for name in names:
        tokens = map_tokens(output / name, read_bin_header(output / name)).tolist()
        table = read_document_table(output / name)
        assert len(table.starts) == len(table.records) == len(table.files) > 0
        ends = [*table.starts[1:].tolist(), len(tokens)]
        for start, end, record, file in zip(table.starts.tolist(), ends, table.records.tolist(), table.files.tolist()):
            assert tokens[end - 1] == tokenizer.eod_id and tokenizer.eod_id not in tokens[start : end - 1]
            documents.append((tokenizer.decode(tokens[start : end - 1]), *table.sources[file], record))
    return documents


def process_all(job: PretrainJob) -> list[PartRecord]:
    """Process all units in this process, where they can be watched; returns the records of their parts."""
    (Path(job.output_dir) / ".pretokenize").mkdir(parents=True, exist_ok=True)
    return [part for unit in find_units(job.corpus, job.shard_bytes)[0] for part in process_unit(job, unit)]


def split_of(text: str) -> str:
    return set_of(text.encode(), VALID_RATIO)


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files of an output except temporary ones of a killed process."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".tmp-" not in path.name
    }


def identities(directory: Path) -> dict[str, tuple[int, int]]:
    """Distinguishes a file that was left alone from one rewritten with the same content."""
    stats = {path.name: path.stat() for path in directory.glob("*-*.*") if path.suffix in (".bin", ".docs")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def last_line(error_output: str) -> str:
    """Final message, below the progress bar."""
    assert "Traceback" not in error_output
    return error_output.splitlines()[-1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("corpus")
    return directory, write_corpus(directory)


@pytest.fixture(scope="module")
def output(corpus: tuple[Path, list[str]], tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("output") / "new"
    run(corpus[0], directory, tokenizer_dir)
    return directory


def test_documents_come_back(corpus: tuple[Path, list[str]], output: Path, tokenizer: HFBBPETokenizer):
    """Each document once, in its set, in the order of the inputs."""
    texts = corpus[1]
    for split in ("train", "valid"):
        expected = [text for text in texts if set_of(text.encode(), VALID_RATIO) == split]
        documents = read_set(output, split)
        assert [tokenizer.decode(ids) for ids in documents] == expected
        assert documents == tokenizer.encode_batch(expected)
    manifest = json.loads((output / "pretokenize.json").read_text())
    assert len(manifest["shards"]["train"]) > 3
    assert manifest["documents"] == len(texts) and manifest["bad_records"] == 0
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert manifest["valid_ratio"] == VALID_RATIO and manifest["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_no_document_in_both_sets(output: Path):
    """Not even one that several files contain."""
    train, valid = ({tuple(ids) for ids in read_set(output, split)} for split in ("train", "valid"))
    assert train and valid
    assert train.isdisjoint(valid)


def test_shards_say_what_they_are(output: Path, tokenizer: HFBBPETokenizer):
    assert load_tokenizer(output / "tokenizer").fingerprint == tokenizer.fingerprint
    shards = json.loads((output / "pretokenize.json").read_text())["shards"]
    assert sorted(path.name for path in output.glob("*.bin")) == sorted(shards["train"] + shards["valid"])
    for split, names in shards.items():
        for name in names:
            header = read_bin_header(output / name)
            assert (header.split, header.valid_ratio) == (split, VALID_RATIO)
            assert (header.vocab_size, header.eod_id) == (tokenizer.vocab_size, tokenizer.eod_id)
            assert header.tokenizer_fingerprint == tokenizer.fingerprint


def test_number_of_processes_changes_nothing(
    corpus: tuple[Path, list[str]], output: Path, tokenizer_dir: Path, tmp_path: Path
):
    run(corpus[0], tmp_path / "two", tokenizer_dir, num_workers=2)
    assert snapshot(tmp_path / "two") == snapshot(output)


def test_size_of_shards_changes_no_document(
    corpus: tuple[Path, list[str]], output: Path, tokenizer_dir: Path, tmp_path: Path
):
    manifest = run(corpus[0], tmp_path / "large", tokenizer_dir, shard_mb=100)
    assert {split: len(names) for split, names in manifest["shards"].items()} == {"train": 1, "valid": 1}
    for split in ("train", "valid"):
        assert read_set(tmp_path / "large", split) == read_set(output, split)


@pytest.fixture(scope="module")
def mixed(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Origin], Path]:
    """Files of every kind in every compression, their documents, and the output without workers."""
    directory = tmp_path_factory.mktemp("mixed")
    documents = write_mixed_corpus(directory / "corpus", seed=20)
    run(directory / "corpus", directory / "out", tokenizer_dir)
    return directory / "corpus", documents, directory / "out"


def test_documents_know_where_they_came_from(mixed: tuple[Path, list[Origin], Path], tokenizer: HFBBPETokenizer):
    """For every kind of file, against a naive reader."""
    _, documents, output = mixed
    assert {counts for _, _, counts, _ in documents} == {"", "byte", "line", "record", "row"}
    for split, names in json.loads((output / "pretokenize.json").read_text())["shards"].items():
        assert len(names) > 3
        assert read_origins(output, names, tokenizer) == [doc for doc in documents if split_of(doc[0]) == split]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_number_of_processes_changes_nothing_of_a_mixed_corpus(
    mixed: tuple[Path, list[Origin], Path], tokenizer_dir: Path, tmp_path: Path, num_workers: int
):
    corpus, _, output = mixed
    run(corpus, tmp_path, tokenizer_dir, num_workers=num_workers)
    assert snapshot(tmp_path) == snapshot(output)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv.zst"])
def test_unit_longer_than_a_shard_makes_several_parts(
    tokenizer_dir: Path, tokenizer: HFBBPETokenizer, tmp_path: Path, name: str
):
    """A file that cannot be cut: its parts end after the first document that reaches the size."""
    texts = random_texts(0, 300, 100)
    content = json_lines(texts)
    if name == "a.json":
        content = b"[" + b",".join(content.splitlines()) + b"]"
    elif name == "a.csv.zst":
        content = b"text\r\n" + b"".join(b'"' + text.replace('"', '""').encode() + b'"\r\n' for text in texts)
    documents = write(tmp_path / "corpus", name, content)
    job = make_job(tmp_path / "corpus", tmp_path / "out", tokenizer_dir)
    parts = process_all(job)
    assert len(parts) > 5 and [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(part.totals["documents"] for part in parts) == len(documents) == 300
    at = 0
    for part in parts:
        lengths = [len(text.encode()) for text, *_ in documents[at : at + part.items]]
        assert part.totals["text_bytes"] == sum(lengths)
        assert part.is_last or sum(lengths[:-1]) < job.shard_bytes <= sum(lengths)
        for split, shard in part.shards.items():
            expected = [doc for doc in documents[at : at + part.items] if split_of(doc[0]) == split]
            assert read_origins(tmp_path / "out", [shard], tokenizer) == expected
        at += part.items
    assert at == 300


def test_unit_goes_on_after_any_of_its_parts(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Even if documents come in parts and records are bad: both count when the first ones are skipped."""
    monkeypatch.setattr(limits, "LONGEST_PART", 80)
    lines = json_lines(random_texts(0, 150, 200)).splitlines()
    for number in range(0, 150, 7):
        lines[number] = BAD_LINES["cut off"]
    write_lines(tmp_path / "corpus" / "a.jsonl.gz", lines)
    jobs = [make_job(tmp_path / "corpus", tmp_path / n, tokenizer_dir, max_bad_records=150) for n in ("whole", "again")]
    parts = process_all(jobs[0])
    process_all(jobs[1])
    whole = snapshot(tmp_path / "whole")
    assert len(parts) > 6 and sum(part.bad_records for part in parts) == 22
    records = sorted((tmp_path / "again" / ".pretokenize").iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    for first_missing in range(len(parts)):
        for path in records[first_missing:]:
            path.unlink()
        for name in parts[first_missing].shards.values():
            (tmp_path / "again" / name).write_bytes(b"torn")
        assert process_all(jobs[1]) == parts
        assert snapshot(tmp_path / "again") == whole


def write_lines(path: Path, lines: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(b"\n".join(lines), path.suffix))


@pytest.mark.parametrize("longest", [3, 40, 1000])
def test_document_in_parts_is_one_document(
    tokenizer_dir: Path, tokenizer: HFBBPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int
):
    """One start, one end-of-document token and one set, even if the parts alone would go to both."""
    documents = write_mixed_corpus(tmp_path / "corpus", seed=40, longest=200)
    monkeypatch.setattr(limits, "LONGEST_PART", longest)
    parts = process_all(make_job(tmp_path / "corpus", tmp_path / "out", tokenizer_dir))
    found = [
        (document, split)
        for part in parts
        for split, name in part.shards.items()
        for document in read_origins(tmp_path / "out", [name], tokenizer)
    ]
    assert sorted(document for document, _ in found) == sorted(documents)
    assert sum(part.totals["documents"] for part in parts) == len(documents)
    read = Corpus(str(tmp_path / "corpus"))
    items = [item for unit in find_units(read, 10**9)[0] for item in read_unit(read, unit)]
    assert sum(part.items for part in parts) == len(items) > len(documents)
    # The first part decides; for a short document, that is the whole.
    starts = [(item, before) for before, item in zip([None, *items], items) if not (before and before.continued)]
    splits = {(item.path, item.record): split_of(item.text) for item, _ in starts}
    assert {(path, record): split for (_, path, _, record), split in found} == splits


def test_parts_of_a_document_have_its_tokens(
    tokenizer: HFBBPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The parts, cut at lines, have the tokens of the whole text."""
    text = random_text(random.Random(5), 2000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    size = len(text.encode())
    monkeypatch.setattr(limits, "LONGEST_PART", 300)
    parts = [item.text for item in read_piece(Corpus(str(tmp_path)), Piece("a.txt", 0, size, size))]
    assert len(parts) > 20 and "".join(parts) == text
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(text)


def test_split_by_hash():
    texts = [f"document {i}" for i in range(4000)]

    def valid(ratio: float) -> set[str]:
        return {text for text in texts if set_of(text.encode(), ratio) == "valid"}

    for text in texts[:100]:
        fraction = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        assert set_of(text.encode(), 0.3) == ("valid" if fraction < 0.3 else "train")
    assert valid(0.0) == set()
    # Five standard deviations of the share around the requested one.
    assert abs(len(valid(0.1)) / len(texts) - 0.1) < 5 * (0.1 * 0.9 / len(texts)) ** 0.5
    assert valid(0.01) < valid(0.1) < valid(0.3)


def test_empty_validation_set(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    write_corpus(tmp_path / "corpus")
    manifest = run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1, valid_ratio=0.0)
    assert manifest["shards"]["valid"] == [] and list((tmp_path / "out").glob("valid*")) == []
    assert build_pretrain_sample_index_map.main(["--data_dir", str(tmp_path / "out"), "--max_seq_len", "16"]) == 0
    assert "valid: none" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob("*.ibin")] == ["train-16.ibin"]


def test_output_beside_the_input(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    """--output_dir defaults to --data_dir: our own files are not input for the second run, which writes nothing."""
    corpus = tmp_path / "corpus"
    texts = write_corpus(corpus)
    command = ["--data_dir", str(corpus), "--tokenizer_dir", str(tokenizer_dir), "--shard_mb", "0.005"]
    command += ["--num_workers", "1", "--valid_ratio", str(VALID_RATIO)]
    assert pretokenize_pretrain_data.main(command) == 0
    assert f"{len(texts)} documents" in capsys.readouterr().out
    before, files = snapshot(corpus), identities(corpus)
    assert build_pretrain_sample_index_map.main(["--data_dir", str(corpus), "--max_seq_len", "16"]) == 0
    assert pretokenize_pretrain_data.main(command) == 0
    after = snapshot(corpus)
    assert {name: after[name] for name in before} == before and identities(corpus) == files
    assert {Path(name).suffix for name in after.keys() - before.keys()} == {".ibin"}


@pytest.fixture(scope="module")
def many_units(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A corpus that is cut into many units, so that a run takes a while; also returns their number."""
    directory, rng = tmp_path_factory.mktemp("many"), random.Random(2)
    for number in range(600):
        (directory / f"{number:03}.txt").write_bytes(random_text(rng, 150).encode())
    units = plan_units(str(directory), list_inputs(Corpus(str(directory)))[0], 1000)
    assert len(units) == 600
    return directory, len(units)


def living_processes(group: int) -> list[int]:
    """Processes of a group that are more than an entry in the table."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            living.append(int(path.parent.name))
    return living


@contextmanager
def started_command(
    corpus: Path, output: Path, tokenizer_dir: Path, num_workers: int = 2, stderr: int | BinaryIO = subprocess.DEVNULL
) -> Iterator[subprocess.Popen]:
    """The command in its own process group, of which nothing is left afterwards."""
    command = [sys.executable, "-m", "data_preprocess.pretokenize_pretrain_data", "--num_workers", str(num_workers)]
    command += ["--data_dir", str(corpus), "--output_dir", str(output), "--tokenizer_dir", str(tokenizer_dir)]
    command += ["--shard_mb", "0.001", "--valid_ratio", str(VALID_RATIO)]
    # A shell lets its background jobs, such as these tests, ignore Ctrl-C, and their children inherit that.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with ended(process):
        yield process


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Afterwards the process and its whole session are gone."""
    try:
        yield
    finally:
        for pid in living_processes(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def finished_units(output: Path) -> int:
    """Units with at least one written part."""
    return len(list((output / ".pretokenize").glob("*-0.json")))


def wait_for_units(process: subprocess.Popen, output: Path, count: int) -> None:
    while finished_units(output) < count:
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.002)


def test_killed_run_goes_on_where_it_stopped(many_units: tuple[Path, int], tokenizer_dir: Path, tmp_path: Path):
    """Killed twice with all its processes, as when the machine dies: the same bytes as an undisturbed run."""
    corpus, num_units = many_units
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(corpus, undisturbed, tokenizer_dir, shard_mb=0.001)
    done: dict[str, tuple[int, int]] = {}
    for at_least in (10, 80):
        with started_command(corpus, killed, tokenizer_dir) as process:
            wait_for_units(process, killed, at_least)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert at_least <= finished_units(killed) < num_units
        assert not (killed / "pretokenize.json").exists()
        records = [json.loads(path.read_text()) for path in (killed / ".pretokenize").glob("*.json")]
        names = [name for record in records for name in record["shards"].values()]
        now = identities(killed)
        assert done.items() <= now.items()
        done = {file: now[file] for name in names for file in (name, name.replace(".bin", ".docs"))}
    run(corpus, killed, tokenizer_dir, shard_mb=0.001, num_workers=2)
    assert snapshot(killed) == snapshot(undisturbed)
    # No finished shard has been written again.
    assert done.items() <= identities(killed).items()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "Ctrl-C"])
def test_stopped_run_leaves_no_process(many_units: tuple[Path, int], tokenizer_dir: Path, tmp_path: Path, how: str):
    """The out-of-memory killer, a scheduler, and a person at the keyboard: the work ends, and so do its workers."""
    corpus, num_units = many_units
    with started_command(corpus, tmp_path / "out", tokenizer_dir) as process:
        wait_for_units(process, tmp_path / "out", 10)
        finished = finished_units(tmp_path / "out")
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.Signals[how])
        process.wait()
        deadline = time.monotonic() + 6
        while living_processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert living_processes(process.pid) == []
        # Units in the workers' hands and queues may be done, but not the bulk of the rest.
        assert finished_units(tmp_path / "out") - finished < (num_units - finished) / 2


def workers_of(group: int) -> list[int]:
    """Processes of the pool, recognised by how `multiprocessing` starts them."""
    found = []
    for pid in living_processes(group):
        with suppress(OSError):
            if b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_worker(many_units: tuple[Path, int], tokenizer_dir: Path, tmp_path: Path):
    """As by the out-of-memory killer: a sentence, no process left, and the same command goes on."""
    corpus, num_units = many_units
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    with (
        open(tmp_path / "stderr", "wb") as stderr,
        started_command(corpus, output, tokenizer_dir, stderr=stderr) as process,
    ):
        wait_for_units(process, output, 10)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        assert process.wait() == 1
        deadline = time.monotonic() + 6
        while living_processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert living_processes(process.pid) == []
    assert last_line((tmp_path / "stderr").read_text()).startswith("pretokenize: a worker process was killed")
    assert 10 <= finished_units(output) < num_units and not (output / "pretokenize.json").exists()
    before = {path.name for path in (output / ".pretokenize").glob("*.json")}
    with started_command(corpus, output, tokenizer_dir) as process:
        assert process.wait() == 0
    run(corpus, undisturbed, tokenizer_dir, shard_mb=0.001)
    assert before and snapshot(output) == snapshot(undisturbed)
    assert temporary_files(output) == []


def temporary_files(output: Path) -> list[str]:
    return sorted(path.name for path in output.rglob("*") if ".tmp-" in path.name)


@pytest.fixture(scope="module")
def long_corpus(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], int]:
    """Every kind of file, and long ones that make many parts of one unit; the undisturbed output; number of parts."""
    directory = tmp_path_factory.mktemp("long")
    corpus, output, rng = directory / "corpus", directory / "out", random.Random(7)
    write_mixed_corpus(corpus, seed=60)
    for number in range(300):
        (corpus / f"{number:03}.txt").write_bytes(random_text(rng, 150).encode())
    write(corpus, "long.jsonl.gz", json_lines([random_text(rng, 15) for _ in range(1500)]))
    write(corpus, "long.jsonl", json_lines([random_text(rng, 15) for _ in range(1500)]))
    run(corpus, output, tokenizer_dir, shard_mb=0.001)
    return corpus, snapshot(output), parts_on_disk(output)


def parts_on_disk(output: Path) -> int:
    return len(list((output / ".pretokenize").glob("*.json")))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("num_workers", "kills"),
    [
        pytest.param(4, 3, marks=pytest.mark.soak),
        *(pytest.param(num_workers, 20, marks=pytest.mark.soak) for num_workers in (1, 2, 4)),
    ],
)
def test_run_that_is_killed_many_times(
    long_corpus: tuple[Path, dict[str, bytes], int], tokenizer_dir: Path, tmp_path: Path, num_workers: int, kills: int
):
    """At random moments, sometimes before it has begun, all processes or only the first are killed: the same bytes in
    the end."""
    corpus, undisturbed, num_parts = long_corpus
    output, rng = tmp_path / "out", random.Random(num_workers)
    progress = []
    for attempt in range(kills):
        before = parts_on_disk(output)
        with started_command(corpus, output, tokenizer_dir, num_workers) as process:
            if attempt % 5 == 4:
                time.sleep(rng.uniform(0, 1.5))
            else:
                goal = before + rng.randint(1, 2 * num_parts // (5 * kills))
                while parts_on_disk(output) < goal:
                    assert process.poll() is None, "the command ended before it could be killed"
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.01))
            assert process.poll() is None, "the command ended before it could be killed"
            if attempt % 3 == 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            deadline = time.monotonic() + 6
            while living_processes(process.pid) and time.monotonic() < deadline:
                time.sleep(0.005)
            assert living_processes(process.pid) == []
        progress.append(parts_on_disk(output) - before)
    assert not (output / "pretokenize.json").exists()
    assert sum(parts > 0 for parts in progress) >= kills - kills // 5 and sum(progress) < num_parts
    with started_command(corpus, output, tokenizer_dir, num_workers) as process:
        assert process.wait() == 0
    assert snapshot(output) == undisturbed
    assert temporary_files(output) == []


@pytest.mark.parametrize("reaped", [True, False])
def test_temporary_files_of_a_killed_run_are_removed(
    corpus: tuple[Path, list[str]], tokenizer_dir: Path, tmp_path: Path, reaped: bool
):
    """Each is as large as a shard, and nobody else would ever remove it.

    A dead process stays in the table until its parent reaps it, which in many containers never happens.
    """
    output = tmp_path / "out"
    manifest = run(corpus[0], output, tokenizer_dir, shard_mb=1)
    gone = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    # The end of its output is the end of the process, even if it is not waited for.
    assert gone.stdout.read() == b""
    if reaped:
        gone.wait()
    left = [output / f"{name}.tmp-{gone.pid}" for name in manifest["shards"]["train"]]
    for path in left:
        path.write_bytes(b"\0" * 1000)
    (output / "pretokenize.json").unlink()
    run(corpus[0], output, tokenizer_dir, shard_mb=1)
    gone.wait()
    assert left and not any(path.exists() for path in left)


def test_damaged_shards_are_written_again(
    corpus: tuple[Path, list[str]], output: Path, tokenizer_dir: Path, tmp_path: Path
):
    again = tmp_path / "again"
    shards = run(corpus[0], again, tokenizer_dir)["shards"]["train"]
    before = identities(again)
    (again / shards[0]).write_bytes((again / shards[0]).read_bytes()[:-1])
    (again / shards[1]).unlink()
    (again / shards[2]).with_suffix(".docs").unlink()
    run(corpus[0], again, tokenizer_dir)
    assert snapshot(again) == snapshot(output)
    after = identities(again)
    # The valid shard of a part is written together with its train shard, and so are the unit's later parts.
    units = {name.split("-")[1] for name in shards[:3]}
    untouched = {name for name in before if name.split("-")[1] not in units}
    assert untouched and all(before[name] == after[name] for name in untouched)
    assert not any(before[name] == after[name] for name in shards[:3])


@pytest.mark.parametrize(
    "change", ["content", "text key", "second text key", "separator", "valid ratio", "tokenizer", "new file"]
)
def test_changed_input_is_tokenized_again(tokenizer_dir: Path, tmp_path: Path, change: str):
    """Everything that the shards depend on: the earlier run's output must not be reused for this one."""
    corpus, output, rng = tmp_path / "corpus", tmp_path / "out", random.Random(3)
    corpus.mkdir()
    records = [{"text": random_text(rng, 20), "body": random_text(rng, 20)} for _ in range(20)]
    (corpus / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"tokenizer_dir": str(tokenizer_dir), "valid_ratio": 0.5}
    fields = TextFields()

    def read(directory: Path) -> dict[str, list[list[int]]]:
        job = PretrainJob(
            Corpus(str(corpus), fields), str(directory), shard_bytes=1_000_000, max_bad_records=0, **options
        )
        process_corpus(job, num_workers=0)
        return {split: read_set(directory, split) for split in ("train", "valid")}

    first = read(output)
    if change == "content":
        text = (corpus / "a.jsonl").read_text()
        (corpus / "a.jsonl").write_text(text.replace("return", "RETURN"))
    elif change == "text key":
        fields = TextFields(("body",))
    elif change == "second text key":
        fields = TextFields(("text", "body"))
    elif change == "separator":
        # It counts as another, though one field has nothing to separate: the record may not know that.
        fields = TextFields(("text", "body"), " ")
        first = read(output)
        fields = TextFields(("text", "body"), "\t")
    elif change == "valid ratio":
        options["valid_ratio"] = 0.1
    elif change == "tokenizer":
        texts = (random_text(rng, 30) for _ in range(50))
        train_hf_bbpe(texts, 272, show_progress=False).save_pretrained(tmp_path / "other")
        options["tokenizer_dir"] = str(tmp_path / "other")
    else:
        (corpus / "0.txt").write_text("a new document")
    second = read(output)
    assert second != first
    assert second == read(tmp_path / "fresh")


def test_change_in_the_tail_of_a_line_that_crosses_units(
    tokenizer_dir: Path, tokenizer: HFBBPETokenizer, tmp_path: Path
):
    """A unit reads its last line to the end, beyond its own range: that part, too, decides whether it is done."""
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "a.jsonl"
    texts = ["x" * 1500, "y" * 1500]
    for last in ("1", "2"):
        texts[0] = texts[0][:-1] + last
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=0.001, valid_ratio=0.0)
        assert [tokenizer.decode(ids) for ids in read_set(tmp_path / "out", "train")] == texts


def read_pieces(directory: Path, pieces: list[Piece]) -> tuple[list[str], list[BadRecord]]:
    items = [item for piece in pieces for item in read_piece(Corpus(str(directory)), piece)]
    assert not any(isinstance(item, Document) and item.continued for item in items)
    texts = [item.text for item in items if isinstance(item, Document)]
    return texts, [item for item in items if isinstance(item, BadRecord)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("ends_with_line_end", [True, False])
def test_byte_ranges_lose_and_repeat_no_line(tmp_path: Path, line_end: str, ends_with_line_end: bool):
    """Cuts at every place: in a line, in a character, in a line end, at a border; ranges shorter than a line."""
    texts = ["a", "漢字" * 20, "with \n escaped line end", "🧪", "b" * 200, "c"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_bytes((line_end.join(lines) + line_end * ends_with_line_end).encode())
    size = path.stat().st_size
    for unit_bytes in [*range(1, 150), 200, size - 1, size, size + 1]:
        units = plan_units(str(tmp_path), ["a.jsonl"], unit_bytes)
        pieces = [piece for unit in units for piece in unit.pieces]
        assert [piece.start for piece in pieces] == list(range(0, size, unit_bytes))
        assert sum(unit.num_bytes for unit in units) == size
        read, bad = read_pieces(tmp_path, pieces)
        assert read == texts and bad == []


def test_units_are_bounded_and_complete(tmp_path: Path):
    sizes = {"a.txt": 10, "b.txt": 5000, "c.jsonl": 2500, "d.txt": 400, "e.txt": 500, "f.txt": 0, "g.txt": 300}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    units = plan_units(str(tmp_path), sorted(sizes), 1000)
    covered = {name: 0 for name in sizes}
    for unit in units:
        for piece in unit.pieces:
            assert piece.start == covered[piece.path]
            covered[piece.path] = piece.end
        # A text file is one document and cannot be cut.
        assert unit.num_bytes <= 1000 or len(unit.pieces) == 1
    assert covered == sizes
    together = [" ".join(piece.path[0] for piece in unit.pieces) for unit in units]
    assert together == ["a", "b", "c", "c", "c d", "e g"]
    assert plan_units(str(tmp_path), [], 1000) == []


def test_list_of_inputs(tmp_path: Path):
    files = ["b.txt", "a/x.py", "a/X.TXT", "a.jsonl", "z.json", "pic.png", "Makefile", "train-1.bin", "train-1.docs"]
    files += ["c.CSV.gz", "d.parquet", "d.parquet.gz", "e.gz", "train-1.bin.tmp-7"]
    files += [".git/a.txt", "__pycache__/a.py", "tokenizer/tokenizer.json", "tokenizer/merges.txt", "pretokenize.json"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inputs, left_out = list_inputs(Corpus(str(tmp_path)))
    assert inputs == ["a.jsonl", "a/X.TXT", "a/x.py", "b.txt", "c.CSV.gz", "d.parquet", "z.json"]
    assert list(left_out) == ["Makefile", "d.parquet.gz", "e.gz", "pic.png"]


def test_other_shards_make_the_old_index_go(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    """Otherwise training would silently go on with the old data."""
    write_corpus(tmp_path / "corpus")
    run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1, valid_ratio=0.0)
    command = ["--data_dir", str(tmp_path / "out"), "--max_seq_len", "16"]
    assert build_pretrain_sample_index_map.main(command) == 0
    run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1, valid_ratio=0.0)
    assert list((tmp_path / "out").glob("*.ibin"))
    run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1, valid_ratio=0.2)
    assert not list((tmp_path / "out").glob("*.ibin"))
    printed = capsys.readouterr().err
    assert "removed train-16.ibin" in printed and "shards of earlier runs" in printed


def test_read_error_of_a_worker(tmp_path: Path, tokenizer_dir: Path):
    """The message names it, and it stays a system error: a training that waits for it is tried again."""
    write_corpus(tmp_path / "corpus")
    job = make_job(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1)
    found, _ = find_units(job.corpus, job.shard_bytes)
    path = tmp_path / "corpus" / found[0].pieces[0].path
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=rf"Is a directory \((in|between) .*{found[0].pieces[0].path}"):
        jobs._process_units(job, found, 1, lambda: None)


def test_damaged_manifest_of_an_earlier_run(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    """It does not stop the run that would mend it, and is kept. An index may then have any shards."""
    write_corpus(tmp_path / "corpus")
    manifest = run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1, valid_ratio=0.0)
    assert build_pretrain_sample_index_map.main(["--data_dir", str(tmp_path / "out"), "--max_seq_len", "16"]) == 0
    (tmp_path / "out" / "pretokenize.json").write_text('{"shards": {"train": ["tr')
    assert run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=1, valid_ratio=0.0) == manifest
    assert (tmp_path / "out" / "pretokenize.json.damaged").read_text() == '{"shards": {"train": ["tr'
    assert not list((tmp_path / "out").glob("*.ibin"))
    printed = capsys.readouterr().err
    assert "is kept as pretokenize.json.damaged" in printed and "removed train-16.ibin" in printed


@pytest.mark.parametrize(("ratio", "suggested"), [("0.001", "0.1"), ("0.1", "0.2"), ("0.6", "0.8")])
def test_no_document_for_the_validation_set(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], ratio: str, suggested: str
):
    """Refused before the index is built, not after, with a larger share as the advice."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "one.txt").write_text("document 8")
    arguments = ["--data_dir", str(corpus), "--tokenizer_dir", str(tokenizer_dir), "--num_workers", "1"]
    assert pretokenize_pretrain_data.main([*arguments, "--valid_ratio", ratio]) == 2
    assert "holds one document, which cannot be in both sets: give more, or --valid_ratio 0" in capsys.readouterr().err
    of_train = (text for text in map("document {}".format, range(9, 99)) if set_of(text.encode(), 0.6) == "train")
    (corpus / "two.txt").write_text(next(of_train))
    assert pretokenize_pretrain_data.main([*arguments, "--valid_ratio", ratio]) == 2
    assert f"use a larger --valid_ratio than {ratio}, such as {suggested}, or 0" in capsys.readouterr().err
    assert pretokenize_pretrain_data.main([*arguments, "--valid_ratio", "0"]) == 0


BAD_LINES = {
    "cut off": b'{"text": "cut',
    "no JSON": b"text",
    "a list": b'["text"]',
    "a string": b'"text"',
    "no key": b'{"body": "x"}',
    "null": b'{"text": null}',
    "a number": b'{"text": 5}',
    "not UTF-8": b'{"text": "\xff"}',
    "UTF-8 of a surrogate": b'{"text": "\xed\xa0\xbd"}',
    "half a surrogate pair": b'{"text": "\\ud83d"}',
    "nested too deep": b"[" * 200_000,
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_counted(tmp_path: Path, kind: str):
    """One bad line among billions must not end the run, and every yielded text can be encoded."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + BAD_LINES[kind] + b'\n{"text": "last"}\n')
    size = path.stat().st_size
    texts, bad = read_pieces(tmp_path, [Piece("a.jsonl", 0, size, size)])
    assert texts == ["first", "last"]
    assert len(bad) == 1 and str(bad[0]).startswith("a.jsonl at byte 18: ")


def test_empty_texts_are_neither_documents_nor_errors(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n  \n{"text": " "}')
    (tmp_path / "b.txt").write_text("")
    size = (tmp_path / "a.jsonl").stat().st_size
    assert read_pieces(tmp_path, [Piece("a.jsonl", 0, size, size)]) == ([" "], [])
    assert read_pieces(tmp_path, [Piece("b.txt", 0, 0, 0)]) == ([], [])


@pytest.fixture
def partly_bad(tmp_path: Path) -> Path:
    """Two good documents and four unreadable records."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "good.txt").write_text("some text")
    (corpus / "latin-1.txt").write_bytes(b"caf\xe9")
    lines = [b'{"text": "a line"}', *(BAD_LINES[kind] for kind in ("cut off", "no key", "not UTF-8"))]
    (corpus / "lines.jsonl").write_bytes(b"\n".join(lines))
    return corpus


def command_line(corpus: Path, output: Path, tokenizer_dir: Path, *flags: str) -> list[str]:
    folders = ["--data_dir", str(corpus), "--output_dir", str(output), "--tokenizer_dir", str(tokenizer_dir)]
    return [*folders, "--num_workers", "1", "--valid_ratio", "0", *flags]


def test_bad_records_are_counted(
    partly_bad: Path, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """Within the limit, one sentence each; beyond it the run stops, and goes on when the user allows more."""
    base = command_line(partly_bad, tmp_path / "out", tokenizer_dir)
    assert pretokenize_pretrain_data.main([*base, "--max_bad_records", "3"]) == 2
    message = last_line(capsys.readouterr().err)
    assert message.startswith("pretokenize: ") and "4 records could not be read" in message
    assert "--max_bad_records 3" in message
    assert "latin-1.txt" in message
    assert not (tmp_path / "out" / "pretokenize.json").exists()

    assert pretokenize_pretrain_data.main([*base, "--max_bad_records", "4"]) == 0
    output = capsys.readouterr()
    assert "2 documents" in output.out and "4 records skipped" in output.out
    assert "skipped latin-1.txt: not UTF-8" in output.err and "skipped lines.jsonl at byte" in output.err
    manifest = json.loads((tmp_path / "out" / "pretokenize.json").read_text())
    assert (manifest["documents"], manifest["bad_records"], len(manifest["bad_examples"])) == (2, 4, 4)


@pytest.fixture
def seldom_bad(tokenizer_dir: Path, tmp_path: Path) -> tuple[Path, int]:
    """One unit of many parts with a few bad records each, 40 in all; also returns the number of parts."""
    lines = json_lines(random_texts(0, 400, 100)).splitlines()
    lines[::10] = [BAD_LINES["no key"]] * 40
    write_lines(tmp_path / "corpus" / "a.jsonl.gz", lines)
    parts = process_all(make_job(tmp_path / "corpus", tmp_path / "all", tokenizer_dir, max_bad_records=40))
    assert sum(part.bad_records for part in parts) == 40 and max(part.bad_records for part in parts) <= 6 < len(parts)
    return tmp_path / "corpus", len(parts)


def test_limit_of_bad_records_holds_for_all_parts(seldom_bad: tuple[Path, int], tokenizer_dir: Path, tmp_path: Path):
    """Each part is within the limit, the file is not. After raising the limit, the finished work is found."""
    corpus, num_parts = seldom_bad
    with pytest.raises(ValueError, match=r"40 records .* more than --max_bad_records 39;.*gz line \d+:"):
        run(corpus, tmp_path / "out", tokenizer_dir, num_workers=1, max_bad_records=39)
    assert not (tmp_path / "out" / "pretokenize.json").exists()
    before = identities(tmp_path / "out")
    assert run(corpus, tmp_path / "out", tokenizer_dir, num_workers=1, max_bad_records=40)["bad_records"] == 40
    assert before.items() <= identities(tmp_path / "out").items()
    assert parts_on_disk(tmp_path / "out") == num_parts


def test_limit_of_bad_records_stops_a_long_unit(seldom_bad: tuple[Path, int], tokenizer_dir: Path, tmp_path: Path):
    """Not only hours later, when the whole of a file that cannot be cut is tokenized."""
    corpus, num_parts = seldom_bad
    job = make_job(corpus, tmp_path / "out", tokenizer_dir, max_bad_records=6)
    with pytest.raises(ValueError, match=r"records could not be read, more than --max_bad_records 6;.*gz line \d+:"):
        process_all(job)
    assert parts_on_disk(tmp_path / "out") < num_parts / 2


def test_limit_of_bad_records_is_noticed_at_once(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A terabyte under another key: neither read to its end nor gathered in memory."""
    write_lines(tmp_path / "corpus" / "a.jsonl", [BAD_LINES["no key"]] * 100_000)
    taken = []

    def counting(*arguments) -> Iterator[Document | BadRecord]:
        for item in read_unit(*arguments):
            taken.append(isinstance(item, BadRecord))
            yield item

    monkeypatch.setattr(pretokenize_pretrain_data, "read_unit", counting)
    job = make_job(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=100, max_bad_records=10)
    with pytest.raises(ValueError, match="11 records could not be read, more than --max_bad_records 10.* at byte 0"):
        process_all(job)
    assert len(taken) < 20_000 and all(taken)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt"])
def test_tokenizer_that_fails_names_the_record(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """A library's error does not mention the file, and there may be thousands of files."""
    texts = ["good", "good too", "poison", "good again"]
    content = json_lines(texts)
    if name == "a.json":
        content = b"[" + b",".join(content.splitlines()) + b"]"
    elif name == "a.csv":
        content = "\n".join(["text", *texts]).encode()
    documents = write(tmp_path / "corpus", name, content)
    write(tmp_path / "corpus", "b.txt", b"good")

    class Failing:
        def __init__(self, inner: HFBBPETokenizer):
            self._inner = inner

        def __getattr__(self, attribute: str) -> object:
            return getattr(self._inner, attribute)

        def encode(self, text: str) -> list[int]:
            if "poison" in text:
                raise OverflowError("too sour")
            return self._inner.encode(text)

        def encode_batch(self, texts: list[str], num_threads: int = 0) -> list[list[int]]:
            return [self.encode(text) for text in texts]

    monkeypatch.setattr(jobs, "_tokenizer", lambda directory: Failing(load_tokenizer(directory)))
    path, counts, record = next(origin for text, *origin in documents if "poison" in text)
    with pytest.raises(ValueError) as caught:
        process_all(make_job(tmp_path / "corpus", tmp_path / "out", tokenizer_dir))
    where = {"": path, "byte": f"{path} at byte {record}"}.get(counts, f"{path} {counts} {record}")
    assert f"the tokenizer fails on {where} (OverflowError: too sour)" in str(caught.value)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_error_of_a_worker_names_the_file(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    """The file at fault, not its neighbour in the unit; one sentence, nothing half done."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a good one.txt").write_text("some text")
    (corpus / "table.csv").write_text("id,body\n1,x\n")
    assert pretokenize_pretrain_data.main(command_line(corpus, tmp_path / "out", tokenizer_dir)) == 2
    said = last_line(capsys.readouterr().err)
    assert said.startswith("pretokenize: ") and 'table.csv has no column "text" but id, body' in said
    assert not (tmp_path / "out" / "pretokenize.json").exists() and temporary_files(tmp_path / "out") == []
    assert "a good one.txt" not in said


def test_half_a_surrogate_pair_does_not_end_the_run(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "corpus").mkdir()
    lines = [b'{"text": "before"}', BAD_LINES["half a surrogate pair"], b'{"text": "after"}']
    (tmp_path / "corpus" / "a.jsonl").write_bytes(b"\n".join(lines))
    assert pretokenize_pretrain_data.main(command_line(tmp_path / "corpus", tmp_path / "out", tokenizer_dir)) == 0
    printed = capsys.readouterr().out
    assert "2 documents" in printed and "1 records skipped" in printed


@pytest.mark.parametrize("kind", ["nothing in it", "empty files", "other kinds", "hidden"])
def test_empty_corpus(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], kind: str):
    corpus = tmp_path / "corpus"
    (corpus / ".hidden").mkdir(parents=True)
    if kind == "empty files":
        (corpus / "a.txt").touch()
        (corpus / "b.jsonl").touch()
    elif kind == "other kinds":
        (corpus / "a.png").write_bytes(b"x")
    elif kind == "hidden":
        (corpus / ".hidden" / "a.txt").write_text("text")
    assert pretokenize_pretrain_data.main(command_line(corpus, tmp_path / "out", tokenizer_dir)) == 2
    message = last_line(capsys.readouterr().err)
    assert message.startswith("pretokenize: ") and str(corpus) in message and "put .txt, .jsonl" in message
    assert not (tmp_path / "out").exists()


def test_corpus_without_a_readable_document(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(b"\xff")
    (tmp_path / "corpus" / "b.jsonl").write_bytes(b"\n \n")
    assert pretokenize_pretrain_data.main(command_line(tmp_path / "corpus", tmp_path / "out", tokenizer_dir)) == 2
    message = last_line(capsys.readouterr().err)
    assert "holds no text that could be read: 1 record could not be read, for example a.txt: not UTF-8" in message
    assert not (tmp_path / "out" / "pretokenize.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer_dir", "nowhere"], "nowhere does not exist: train a tokenizer with `python -m tokenizer."),
        (["--data_dir", "nowhere"], "nowhere does not exist"),
        (["--valid_ratio", "1"], "--valid_ratio must be"),
        (["--valid_ratio", "-0.1"], "--valid_ratio must be"),
        (["--valid_ratio", "nan"], "--valid_ratio must be"),
        (["--num_workers", "0"], "--num_workers must be positive"),
        (["--shard_mb", "0"], "--shard_mb"),
        (["--shard_mb", "1e-9"], "--shard_mb"),
        (["--shard_mb", "inf"], "--shard_mb"),
    ],
)
def test_wrong_flags(
    corpus: tuple[Path, list[str]],
    tmp_path: Path,
    tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
):
    assert pretokenize_pretrain_data.main(command_line(corpus[0], tmp_path / "out", tokenizer_dir, *flags)) == 2
    said = last_line(capsys.readouterr().err)
    assert said.startswith("pretokenize: ") and message in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tokens(output: Path, tmp_path: Path) -> Path:
    """A copy of the token files that may be damaged."""
    for name, content in snapshot(output).items():
        (tmp_path / "tokens" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tokens" / name).write_bytes(content)
    return tmp_path / "tokens"


def build(tokens: Path, max_seq_len: int = 16) -> int:
    return build_pretrain_sample_index_map.main(["--data_dir", str(tokens), "--max_seq_len", str(max_seq_len)])


def test_build_index(tokens: Path, capsys: pytest.CaptureFixture[str]):
    assert build(tokens) == 0
    printed = capsys.readouterr().out
    for split in ("train", "valid"):
        documents = read_set(tokens, split)
        num_tokens = sum(len(ids) + 1 for ids in documents)
        index = read_index(tokens, split, 16)
        assert len(index.rows) == (num_tokens - 1) // 16
        assert list(index.file_names) == json.loads((tokens / "pretokenize.json").read_text())["shards"][split]
        samples = len(index.rows)
        assert f"{split}: {samples:,} samples of 16 tokens from {len(documents)} documents" in printed
    before = {path.name: path.read_bytes() for path in tokens.glob("*.ibin")}
    assert build(tokens) == 0 and build(tokens, 8) == 0
    assert before.items() < {path.name: path.read_bytes() for path in tokens.glob("*.ibin")}.items()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("not pretokenized", ["pretokenize_pretrain_data"]),
        ("no directory", ["nowhere does not exist"]),
        ("shard missing", ["SHARD", "pretokenize_pretrain_data"]),
        ("shard truncated", ["SHARD", "pretokenize_pretrain_data"]),
        ("shard replaced", ["SHARD", "pretokenize_pretrain_data"]),
        ("docs missing", ["SHARD", "pretokenize_pretrain_data"]),
        ("sample too long", ["--max_seq_len"]),
        ("no length", ["max_seq_len"]),
        ("valid set empty", ["valid", "--valid_ratio"]),
        ("manifest torn", ["pretokenize.json", "pretokenize_pretrain_data"]),
        ("manifest of something else", ["pretokenize.json", "pretokenize_pretrain_data"]),
    ],
)
def test_build_index_on_bad_input(tokens: Path, capsys: pytest.CaptureFixture[str], kind: str, names: list[str]):
    manifest_path = tokens / "pretokenize.json"
    manifest = json.loads(manifest_path.read_text())
    first, second = (tokens / name for name in manifest["shards"]["train"][:2])
    max_seq_len = {"sample too long": 10**7, "no length": 0}.get(kind, 16)
    if kind == "not pretokenized":
        manifest_path.unlink()
    elif kind == "no directory":
        tokens = tokens / "nowhere"
    elif kind == "shard missing":
        first.unlink()
    elif kind == "shard truncated":
        first.write_bytes(first.read_bytes()[:-1])
    elif kind == "shard replaced":
        first.write_bytes(second.read_bytes())
    elif kind == "docs missing":
        first.with_suffix(".docs").unlink()
    elif kind == "valid set empty":
        manifest_path.write_text(json.dumps({**manifest, "shards": {**manifest["shards"], "valid": []}}))
    elif kind == "manifest torn":
        manifest_path.write_text(manifest_path.read_text()[:-20])
    elif kind == "manifest of something else":
        manifest_path.write_text("{}")
    assert build(tokens, max_seq_len) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("build index: ")
    for name in names:
        assert name.replace("SHARD", first.stem) in lines[0]

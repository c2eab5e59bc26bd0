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
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_preprocess import build_pretrain_sample_index_map, pretokenize_pretrain_data
from data_preprocess.pretokenize_pretrain_data import Job, is_valid_document, pretokenize
from data_preprocess.readers import BadRecords, Piece, list_inputs, plan_units, read_documents
from dataset.format import map_tokens, read_bin_header, read_document_table, read_index
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
    """Some lines with characters spelled out as UTF-8, some as escapes; no line end after the last."""
    lines = [json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes("\n".join(lines).encode())


def write_corpus(directory: Path) -> list[str]:
    """A source tree and JSON lines, with empty files, equal documents and things that are no text.

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
    corpus: Path, output: Path, tokenizer_dir: Path, shard_mb: float = 0.002, num_workers: int = 1, **kwargs
) -> dict:
    job = Job(str(corpus), str(output), str(tokenizer_dir), "text", kwargs.pop("valid_ratio", VALID_RATIO))
    return pretokenize(job, num_workers, shard_mb, kwargs.pop("max_bad_records", 0))


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


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files of an output but the temporary ones of a process that was killed."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and ".tmp-" not in path.name
    }


def identities(directory: Path) -> dict[str, tuple[int, int]]:
    """Tells a file that was left alone from one that was written again with the same content."""
    stats = {path.name: path.stat() for path in directory.glob("*-*.*") if path.suffix in (".bin", ".docs")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def last_line(error_output: str) -> str:
    """What is said in the end, below the progress bar."""
    assert "Traceback" not in error_output
    return error_output.splitlines()[-1]


# ---- the whole job


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
        expected = [text for text in texts if is_valid_document(text, VALID_RATIO) == (split == "valid")]
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
    """Also not one that stands in several files."""
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


def test_split_by_hash():
    texts = [f"document {i}" for i in range(4000)]

    def valid(ratio: float) -> set[str]:
        return {text for text in texts if is_valid_document(text, ratio)}

    for text in texts[:100]:
        fraction = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        assert is_valid_document(text, 0.3) == (fraction < 0.3)
    assert valid(0.0) == set()
    # Five standard deviations of the share around what was asked for.
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
    """--output_dir defaults to --data_dir: our own files are no input of the second run, which writes nothing."""
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


# ---- killed, damaged, changed


@pytest.fixture(scope="module")
def many_units(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A corpus that is cut into many units, so that a run takes a while; returns also how many."""
    directory, rng = tmp_path_factory.mktemp("many"), random.Random(2)
    for number in range(200):
        (directory / f"{number:03}.txt").write_bytes(random_text(rng, 150).encode())
    units = plan_units(directory, list_inputs(directory)[0], 1000)
    assert len(units) == 200
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
def started_command(corpus: Path, output: Path, tokenizer_dir: Path) -> Iterator[subprocess.Popen]:
    """The command as a process group of its own, of which nothing is left afterwards."""
    command = [sys.executable, "-m", "data_preprocess.pretokenize_pretrain_data", "--num_workers", "2"]
    command += ["--data_dir", str(corpus), "--output_dir", str(output), "--tokenizer_dir", str(tokenizer_dir)]
    command += ["--shard_mb", "0.001", "--valid_ratio", str(VALID_RATIO)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        for pid in living_processes(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def finished_units(output: Path) -> int:
    return len(list((output / ".pretokenize").glob("*.json")))


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
    # No shard that was finished has been written again.
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
        # The units in the workers' hands and queues may be done, not the bulk of the rest.
        assert finished_units(tmp_path / "out") - finished < (num_units - finished) / 2


def test_temporary_files_of_a_killed_run_are_removed(
    corpus: tuple[Path, list[str]], tokenizer_dir: Path, tmp_path: Path
):
    """Each is as large as a shard, and nobody else would ever remove it."""
    output = tmp_path / "out"
    manifest = run(corpus[0], output, tokenizer_dir, shard_mb=1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [output / f"{name}.tmp-{gone.pid}" for name in manifest["shards"]["train"]]
    for path in left:
        path.write_bytes(b"\0" * 1000)
    (output / "pretokenize.json").unlink()
    run(corpus[0], output, tokenizer_dir, shard_mb=1)
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
    # The valid shard of a unit is written together with its train shard.
    units = {name.removeprefix("train-").removesuffix(".bin") for name in shards[:3]}
    untouched = {name for name in before if name.partition("-")[2].partition(".")[0] not in units}
    assert untouched and all(before[name] == after[name] for name in untouched)
    assert not any(before[name] == after[name] for name in shards[:3])


@pytest.mark.parametrize("change", ["content", "text key", "valid ratio", "tokenizer", "new file"])
def test_changed_input_is_tokenized_anew(tokenizer_dir: Path, tmp_path: Path, change: str):
    """Whatever the shards depend on: the earlier run's output must not be taken for this one's."""
    corpus, output, rng = tmp_path / "corpus", tmp_path / "out", random.Random(3)
    corpus.mkdir()
    records = [{"text": random_text(rng, 20), "body": random_text(rng, 20)} for _ in range(20)]
    (corpus / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"tokenizer_dir": str(tokenizer_dir), "text_key": "text", "valid_ratio": 0.5}

    def read(directory: Path) -> dict[str, list[list[int]]]:
        job = Job(data_dir=str(corpus), output_dir=str(directory), **options)
        pretokenize(job, num_workers=1, shard_mb=1, max_bad_records=0)
        return {split: read_set(directory, split) for split in ("train", "valid")}

    first = read(output)
    if change == "content":
        text = (corpus / "a.jsonl").read_text()
        (corpus / "a.jsonl").write_text(text.replace("return", "RETURN"))
    elif change == "text key":
        options["text_key"] = "body"
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
    """A unit reads its last line to the end, beyond its own range: that part too decides whether it is done."""
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / "a.jsonl"
    texts = ["x" * 1500, "y" * 1500]
    for last in ("1", "2"):
        texts[0] = texts[0][:-1] + last
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        run(tmp_path / "corpus", tmp_path / "out", tokenizer_dir, shard_mb=0.001, valid_ratio=0.0)
        assert [tokenizer.decode(ids) for ids in read_set(tmp_path / "out", "train")] == texts


# ---- readers


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
        units, bad = plan_units(tmp_path, ["a.jsonl"], unit_bytes), BadRecords()
        pieces = [piece for unit in units for piece in unit.pieces]
        assert [piece.start for piece in pieces] == list(range(0, size, unit_bytes))
        assert sum(unit.num_bytes for unit in units) == size
        read = [text for piece in pieces for text in read_documents(tmp_path, piece, "text", bad)]
        assert read == texts and bad.count == 0


def test_units_are_bounded_and_complete(tmp_path: Path):
    sizes = {"a.txt": 10, "b.txt": 5000, "c.jsonl": 2500, "d.txt": 400, "e.txt": 500, "f.txt": 0, "g.txt": 300}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    units = plan_units(tmp_path, sorted(sizes), 1000)
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
    assert plan_units(tmp_path, [], 1000) == []


def test_list_of_inputs(tmp_path: Path):
    files = ["b.txt", "a/x.py", "a/X.TXT", "a.jsonl", "z.json", "pic.png", "Makefile", "train-1.bin", "train-1.docs"]
    files += [".git/a.txt", "__pycache__/a.py", "tokenizer/tokenizer.json", "tokenizer/merges.txt", "pretokenize.json"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inputs, others = list_inputs(tmp_path)
    assert inputs == ["a.jsonl", "a/X.TXT", "a/x.py", "b.txt"]
    assert others == ["Makefile", "pic.png", "z.json"]


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


def test_no_document_for_the_validation_set(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    """Said before the index is built, not after."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "one.txt").write_text("a single document")
    arguments = ["--data_dir", str(corpus), "--tokenizer_dir", str(tokenizer_dir), "--num_workers", "1"]
    assert pretokenize_pretrain_data.main([*arguments, "--valid_ratio", "0.001"]) == 2
    assert "use a larger --valid_ratio" in capsys.readouterr().err
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
    """One bad line among billions must not end the run, and what is yielded can be encoded."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + BAD_LINES[kind] + b'\n{"text": "last"}\n')
    bad = BadRecords()
    assert list(read_documents(tmp_path, Piece("a.jsonl", 0, path.stat().st_size), "text", bad)) == ["first", "last"]
    assert bad.count == 1 and bad.examples[0].startswith("a.jsonl at byte 18: ")


def test_empty_texts_are_no_documents_and_no_errors(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n  \n{"text": " "}')
    (tmp_path / "b.txt").write_text("")
    bad = BadRecords()
    size = (tmp_path / "a.jsonl").stat().st_size
    assert list(read_documents(tmp_path, Piece("a.jsonl", 0, size), "text", bad)) == [" "]
    assert list(read_documents(tmp_path, Piece("b.txt", 0, 0), "text", bad)) == []
    assert bad.count == 0


# ---- the command on bad input


@pytest.fixture
def partly_bad(tmp_path: Path) -> Path:
    """Two good documents and four records that cannot be read."""
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
    """Within the limit a sentence each; beyond it the run stops, and goes on when the user allows more."""
    base = command_line(partly_bad, tmp_path / "out", tokenizer_dir)
    assert pretokenize_pretrain_data.main([*base, "--max_bad_records", "3"]) == 2
    message = last_line(capsys.readouterr().err)
    assert message.startswith("pretokenize: 4 records could not be read") and "--max_bad_records 3" in message
    assert "latin-1.txt" in message
    assert not (tmp_path / "out" / "pretokenize.json").exists()

    assert pretokenize_pretrain_data.main([*base, "--max_bad_records", "4"]) == 0
    output = capsys.readouterr()
    assert "2 documents" in output.out and "4 records skipped" in output.out
    assert "skipped latin-1.txt: not UTF-8" in output.err and "skipped lines.jsonl at byte" in output.err
    manifest = json.loads((tmp_path / "out" / "pretokenize.json").read_text())
    assert (manifest["documents"], manifest["bad_records"], len(manifest["bad_examples"])) == (2, 4, 4)


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
    assert "holds no text that could be read" in last_line(capsys.readouterr().err)
    assert not (tmp_path / "out" / "pretokenize.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer_dir", "nowhere"], "nowhere holds no tokenizer.json: train one with `python -m tokenizer."),
        (["--data_dir", "nowhere"], "--data_dir nowhere is not a directory"),
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


# ---- the index


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
        ("no directory", ["pretokenize_pretrain_data"]),
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

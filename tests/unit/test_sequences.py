"""Sequences on disk: reading gives what was written, and incomplete files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dataset.format import BinHeader, BinWriter
from dataset.sequences import SequenceHeader, SequenceSet, SequenceShard, SequenceWriter

PAD = 1
Sequence = tuple[list[int], list[bool]]
Source = tuple[str, str]


def make_header(task: str = "sft", max_seq_len: int = 8, vocab_size: int = 512, split: str = "train") -> SequenceHeader:
    return SequenceHeader(
        task=task, split=split, max_seq_len=max_seq_len, vocab_size=vocab_size, pad_id=PAD,
        tokenizer_fingerprint="ab" * 32, options={"task": task, "max_seq_len": max_seq_len},
    )  # fmt: skip


def write_sequences(
    directory: Path,
    shards: list[list[Sequence]],
    task: str = "sft",
    max_seq_len: int = 8,
    vocab_size: int = 512,
    split: str = "train",
) -> list[Sequence]:
    """Fill a directory as pretokenizing does; returns all sequences."""
    names = []
    for number, sequences in enumerate(shards):
        names.append(f"{split}-{number}.safetensors")
        writer = SequenceWriter(make_header(task, max_seq_len, vocab_size, split))
        for record, (ids, supervised) in enumerate(sequences):
            writer.add(ids, supervised, (f"{number}.jsonl", "byte"), record)
        writer.close(directory / names[-1])
    manifest = {"task": task, "shards": {"train": [], "valid": [], split: names}, "valid_ratio": 0.25}
    (directory / "pretokenize.json").write_text(json.dumps(manifest))
    return [sequence for sequences in shards for sequence in sequences]


def random_sequence(rng: np.random.Generator, max_seq_len: int, vocab_size: int) -> Sequence:
    """A random sequence; the smallest and largest tokens and lengths are frequent."""
    length = int(rng.choice([2, max_seq_len + 1, rng.integers(2, max_seq_len + 2)]))
    ids = rng.integers(0, vocab_size, length)
    ids[rng.integers(length)] = vocab_size - 1
    supervised = rng.random(length) < rng.choice([0.1, 0.5, 1.0])
    # The first token is never learnt, and at least one other is.
    supervised[0] = False
    supervised[rng.integers(1, length)] = True
    return ids.tolist(), supervised.tolist()


def random_sequences(seed: int, count: int, max_seq_len: int = 8, vocab_size: int = 512) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [random_sequence(rng, max_seq_len, vocab_size) for _ in range(count)]


def read_back(sequences: SequenceShard | SequenceSet) -> list[Sequence]:
    found = [sequences.sequence(number) for number in range(len(sequences))]
    return [(ids.tolist(), supervised.astype(bool).tolist()) for ids, supervised in found]


@pytest.mark.parametrize(
    "vocab_size, token_bytes",
    [(2, 2), (512, 2), (65436, 2), (65437, 2), (65536, 2), (65537, 4), (200_000, 4), (1 << 24, 4)],
)
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, token_bytes: int):
    """Includes tokens around 65436, the value of a label of -100 in unsigned 16 bits."""
    sequences = random_sequences(0, 40, vocab_size=vocab_size)
    if vocab_size > 65436:
        edges = [id for id in (65435, 65436, 65437, 65535, 65536) if id < vocab_size]
        sequences += [([0, *edges], [False] + [True] * len(edges)), ([*edges, 0], [False] * len(edges) + [True])]
    writer = SequenceWriter(make_header(vocab_size=vocab_size))
    for number, (ids, supervised) in enumerate(sequences):
        writer.add(ids, supervised, (("a.jsonl", "byte"), ("b/c.csv", "row"))[number % 2], number * 10**17)
    writer.close(tmp_path / "a.safetensors")

    shard = SequenceShard(tmp_path / "a.safetensors")
    assert len(shard) == len(sequences) and read_back(shard) == sequences
    assert shard.tokens.dtype.itemsize == token_bytes and shard.supervised.dtype == np.uint8
    for number in range(len(sequences)):
        source = (("a.jsonl", "byte"), ("b/c.csv", "row"))[number % 2]
        assert shard.origin(number) == (*source, number * 10**17)
    assert shard.content_is_whole()
    assert (shard.header.vocab_size, shard.header.pad_id, shard.header.split) == (vocab_size, PAD, "train")
    tokens = sum(len(ids) for ids, _ in sequences)
    assert writer.totals() == {
        "samples": len(sequences), "tokens": tokens, "supervised_tokens": sum(sum(s) for _, s in sequences),
    }  # fmt: skip
    assert shard.starts.tolist() == np.cumsum([0, *(len(ids) for ids, _ in sequences)]).tolist()


def test_other_programs_can_read_it(tmp_path: Path):
    """The safetensors library reads the same as our memory maps."""
    sequences = write_sequences(tmp_path, [random_sequences(1, 30)])
    arrays = load_file(tmp_path / "train-0.safetensors")
    shard = SequenceShard(tmp_path / "train-0.safetensors")
    assert arrays.keys() == {"tokens", "supervised", "starts", "records", "files"}
    for name, values in arrays.items():
        assert np.array_equal(values, getattr(shard, name)) and values.dtype == getattr(shard, name).dtype
    assert arrays["tokens"].tolist() == [id for ids, _ in sequences for id in ids]


def test_a_pair_is_one_sample(tmp_path: Path):
    writer = SequenceWriter(make_header("dpo"))
    for ids, supervised in random_sequences(2, 6):
        writer.add(ids, supervised, ("a", ""), 0)
    assert writer.totals()["samples"] == 3


@pytest.mark.parametrize(
    "ids, supervised, complaint",
    [
        ([5], [False], "a sequence of 1 tokens does not fit 8 positions"),
        ([], [], "a sequence of 0 tokens does not fit 8 positions"),
        ([5] * 10, [False] * 10, "a sequence of 10 tokens does not fit 8 positions"),
        ([5, 6], [False], "a sequence of 2 tokens does not fit 8 positions"),
        ([5, 512], [False, True], "outside the vocabulary of 512 entries"),
        ([5, -100], [False, True], "outside the vocabulary of 512 entries"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, ids: list[int], supervised: list[bool], complaint: str):
    """It does not wrap around, as -100 in 16 bits would, and earlier sequences stay whole."""
    writer = SequenceWriter(make_header())
    writer.add([5, 6, 7], [False, True, True], ("a", ""), 0)
    with pytest.raises(ValueError, match=complaint):
        writer.add(ids, supervised, ("a", ""), 1)
    writer.close(tmp_path / "a.safetensors")
    assert read_back(SequenceShard(tmp_path / "a.safetensors")) == [([5, 6, 7], [False, True, True])]


def test_same_sequences_are_the_same_bytes(tmp_path: Path):
    sequences = random_sequences(3, 20)
    for name in "ab":
        (tmp_path / name).mkdir()
        write_sequences(tmp_path / name, [sequences])
    assert (tmp_path / "a/train-0.safetensors").read_bytes() == (tmp_path / "b/train-0.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "a").glob("*.tmp-*")] == []


def test_source_with_a_name_that_is_not_unicode(tmp_path: Path):
    """The system gives names in other encodings like this: with half surrogate pairs."""
    writer = SequenceWriter(make_header())
    writer.add([5, 6], [False, True], ("caf\udce9.jsonl", "byte"), 7)
    writer.close(tmp_path / "a.safetensors")
    assert SequenceShard(tmp_path / "a.safetensors").origin(0) == ("caf\udce9.jsonl", "byte", 7)


def assert_refused(path: Path) -> str:
    """Expect one sentence that names the file and says what to run; returns it."""
    with pytest.raises(ValueError) as caught:
        SequenceShard(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "run `python -m data_preprocess.pretokenize_sft_data` again" in sentence
    assert "\n" not in sentence
    return sentence


def test_missing(tmp_path: Path):
    assert "is missing" in assert_refused(tmp_path / "a.safetensors")


@pytest.fixture
def shard_path(tmp_path: Path) -> Path:
    write_sequences(tmp_path, [random_sequences(4, 5)])
    return tmp_path / "train-0.safetensors"


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_truncated_or_longer(shard_path: Path):
    """At every length, as after a full disk or an interrupted copy."""
    content = shard_path.read_bytes()
    for length in range(len(content)):
        shard_path.write_bytes(content[:length])
        assert "is damaged" in assert_refused(shard_path)
    shard_path.write_bytes(content + b"\0")
    assert "is damaged" in assert_refused(shard_path)


def test_flipped_bit_in_the_header(shard_path: Path):
    """Each flip is refused with a sentence, or changes only the header's statements about the shard."""
    content, end = shard_path.read_bytes(), header_end(shard_path)
    sequences, fingerprint = read_back(SequenceShard(shard_path)), SequenceShard(shard_path).header.fingerprint
    failures = []
    for place in range(end):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        shard_path.write_bytes(flipped)
        try:
            shard = SequenceShard(shard_path)
            same = read_back(shard) == sequences and shard.content_is_whole()
            # Blanks after the header, and equivalent spellings in JSON, do not matter.
            noticed = not same or shard.header.fingerprint != fingerprint
            if not noticed and content[place : place + 1] not in b" \\":
                failures.append((place, "not noticed"))
        except ValueError as error:
            if str(shard_path) not in str(error):
                failures.append((place, f"ValueError without the file: {error}"))
        except Exception as error:
            failures.append((place, f"{type(error).__name__}: {error}"))
    assert failures == []


def test_flipped_bit_in_the_arrays(shard_path: Path):
    """The checksum covers all arrays."""
    content, end = shard_path.read_bytes(), header_end(shard_path)
    assert SequenceShard(shard_path).content_is_whole()
    for place in range(end, len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        shard_path.write_bytes(flipped)
        assert not SequenceShard(shard_path).content_is_whole()


@pytest.mark.parametrize("kind", ["text", "empty", "model", "bin"])
def test_foreign_files(tmp_path: Path, kind: str):
    path = tmp_path / "a.safetensors"
    if kind == "model":
        save_file({"weight": np.zeros((2, 3), np.float32)}, path, {"format": "pt"})
    elif kind == "bin":
        with BinWriter(path.with_suffix(".bin"), BinHeader(512, 3, "ab" * 32, "train", 0.0)) as writer:
            writer.add_document([5], 1)
        path.with_suffix(".bin").rename(path)
    else:
        path.write_bytes(b"" if kind == "empty" else b"this is no shard at all, but a text" * 10)
    assert ("holds no sequences" if kind == "model" else "is damaged") in assert_refused(path)


def test_other_version(shard_path: Path):
    content, end = shard_path.read_bytes(), header_end(shard_path)
    shard_path.write_bytes(content[:end].replace(b'\\"version\\": 1', b'\\"version\\": 7') + content[end:])
    assert "has format version 7, this program reads 1" in assert_refused(shard_path)


# Sets of several shards


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [3, 7, 2], [10, 1]])
def test_set_of_several_shards(tmp_path: Path, sizes: list[int]):
    """Each sequence comes from its shard, at the borders, too."""
    shards = [random_sequences(number, size) for number, size in enumerate(sizes)]
    sequences = write_sequences(tmp_path, shards)
    opened = SequenceSet(tmp_path, "train", "sft", 8)
    assert len(opened) == len(sequences) and read_back(opened) == sequences
    assert opened.lengths.tolist() == [len(ids) for ids, _ in sequences] and opened.lengths.dtype == np.int64
    assert opened.supervised_tokens == sum(sum(supervised) for _, supervised in sequences)
    places = [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    for number, (in_shard, inside) in enumerate(places):
        shard, found = opened.locate(number)
        assert (shard.path.name, found) == (f"train-{in_shard}.safetensors", inside)
        assert shard.origin(found) == (f"{in_shard}.jsonl", "byte", inside)


def test_records_of_several_files_in_one_shard(tmp_path: Path):
    """By turns: each sequence knows its own file and its place there."""
    sources = [("a.jsonl", "byte"), ("b.csv", "row"), ("a.jsonl", "byte"), ("c.json", "record"), ("b.csv", "row")]
    writer = SequenceWriter(make_header())
    for record, source in enumerate(sources):
        writer.add([5, 6], [False, True], source, record)
    writer.close(tmp_path / "a.safetensors")
    shard = SequenceShard(tmp_path / "a.safetensors")
    assert [shard.origin(number) for number in range(5)] == [(*source, n) for n, source in enumerate(sources)]
    assert shard.header.sources == [["a.jsonl", "byte"], ["b.csv", "row"], ["c.json", "record"]]


def test_fingerprint_of_a_set_is_that_of_its_content(tmp_path: Path):
    """A checkpoint keeps the fingerprint: it must change with any token, any mask and the order, and with nothing
    else."""
    shards = [random_sequences(0, 4), random_sequences(1, 4)]

    def fingerprint(name: str, shards: list[list[Sequence]]) -> str:
        (tmp_path / name).mkdir()
        write_sequences(tmp_path / name, shards)
        return SequenceSet(tmp_path / name, "train", "sft", 8).fingerprint

    first = fingerprint("first", shards)
    assert fingerprint("again", shards) == first
    (ids, supervised), *rest = shards[0]
    other_token = [[([ids[0] ^ 1, *ids[1:]], supervised), *rest], shards[1]]
    other_mask = [[(ids, [*supervised[:-1], not supervised[-1]]), *rest], shards[1]]
    changed = [fingerprint("token", other_token), fingerprint("mask", other_mask), fingerprint("order", shards[::-1])]
    assert len({first, *changed}) == 4


@pytest.mark.parametrize(
    "task, split, max_seq_len, complaint",
    [
        ("dpo", "train", 8, "was pretokenized for --task_type=sft, not dpo: run .* --task dpo"),
        ("sft", "train", 16, "was pretokenized for --max_seq_len=8, not 16: give that, or pretokenize again"),
        ("sft", "valid", 8, "has no valid set: give --valid_ratio"),
    ],
)
def test_set_made_for_something_else(tmp_path: Path, task: str, split: str, max_seq_len: int, complaint: str):
    write_sequences(tmp_path, [random_sequences(0, 4)])
    with pytest.raises(ValueError, match=complaint):
        SequenceSet(tmp_path, split, task, max_seq_len)


def test_set_without_or_with_a_damaged_manifest(tmp_path: Path):
    with pytest.raises(ValueError, match="is not pretokenized: run `python -m data_preprocess.pretokenize_sft_data"):
        SequenceSet(tmp_path, "train", "sft", 8)
    for content in ("", "{", "[]", "5", "{}", '{"shards": {}}'):
        (tmp_path / "pretokenize.json").write_text(content)
        with pytest.raises(ValueError, match="pretokenize.json is damaged: run `"):
            SequenceSet(tmp_path, "train", "sft", 8)


def test_set_that_lacks_a_shard(tmp_path: Path):
    write_sequences(tmp_path, [random_sequences(0, 4), random_sequences(1, 4)])
    (tmp_path / "train-1.safetensors").unlink()
    with pytest.raises(ValueError, match="train-1.safetensors is missing"):
        SequenceSet(tmp_path, "train", "sft", 8)


def test_directory_of_token_files_is_not_a_set(tmp_path: Path):
    """As from pretokenize_pretrain_data: its manifest names no task."""
    manifest = {"shards": {"train": ["train-0.bin"], "valid": []}, "valid_ratio": 0.0}
    (tmp_path / "pretokenize.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was pretokenized for --task_type=pretrain, not sft"):
        SequenceSet(tmp_path, "train", "sft", 8)


def test_check(tmp_path: Path):
    """Another tokenizer would give the ids another meaning; another held-out share would be another validation."""
    write_sequences(tmp_path, [random_sequences(0, 4)])
    opened = SequenceSet(tmp_path, "train", "sft", 8)
    opened.check("ab" * 32)
    opened.check("ab" * 32, 0.25)
    with pytest.raises(ValueError, match="was tokenized with another tokenizer"):
        opened.check("cd" * 32)
    with pytest.raises(ValueError, match="--valid_ratio=0.1 contradicts the data, which was pretokenized with 0.25"):
        opened.check("ab" * 32, 0.1)

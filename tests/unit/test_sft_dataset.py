"""SFT and DPO batches against a plain Python loop, one token at a time, and the digests that prove which rows were
read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.audit import recomputed_digest
from dataset.dpo import DPODataset
from dataset.loader import TrainLoader, batch_digest, num_tokens, validation_batches
from dataset.opening import open_dataset
from dataset.order import sample_at
from dataset.pretrain import IGNORE_INDEX
from dataset.sft import SFTDataset
from tests.unit.test_packing import naive_pack
from tests.unit.test_sequences import PAD, Sequence, random_sequences, write_sequences

NO_DOCUMENT = -1


def write_random(
    directory: Path, seed: int, max_seq_len: int, task: str = "sft", vocab_size: int = 512
) -> list[Sequence]:
    """Three shards; for DPO each has an even number of sequences."""
    sizes = [8, 2, 14]
    shards = [random_sequences(10 * seed + number, size, max_seq_len, vocab_size) for number, size in enumerate(sizes)]
    return write_sequences(directory, shards, task, max_seq_len, vocab_size)


def naive_batch(rows: list[list[Sequence]], max_seq_len: int) -> dict[str, list]:
    """Expected result of collate for rows of sequences, except for document_ids and sample_ids, which have their own
    rules."""
    widest = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    while widest % 8 and widest < max_seq_len:
        widest += 1
    batch: dict[str, list] = {
        name: [] for name in ("input_ids", "labels", "positions", "document_ids", "supervised", "lengths")
    }
    for number, row in enumerate(rows):
        inputs, labels, positions, documents = [], [], [], []
        for document, (ids, supervised) in enumerate(row):
            for position in range(len(ids) - 1):
                inputs.append(ids[position])
                labels.append(ids[position + 1] if supervised[position + 1] else IGNORE_INDEX)
                positions.append(position)
                documents.append(document)
        batch["lengths"].append(len(inputs))
        while len(inputs) < widest:
            inputs.append(PAD)
            labels.append(IGNORE_INDEX)
            positions.append(0)
            documents.append(NO_DOCUMENT)
        for position, label in enumerate(labels):
            if label != IGNORE_INDEX:
                batch["supervised"].append(number * widest + position)
        batch["input_ids"].append(inputs)
        batch["labels"].append(labels)
        batch["positions"].append(positions)
        batch["document_ids"].append(documents)
    return batch


def assert_equal(batch: dict[str, torch.Tensor], expected: dict[str, list]) -> None:
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64 and batch[name].is_contiguous(), name
        assert batch[name].tolist() == values, name


@pytest.mark.parametrize("max_seq_len", [1, 7, 8, 40])
@pytest.mark.parametrize("seed", range(4))
def test_packed_batches_equal_a_naive_loop(tmp_path: Path, seed: int, max_seq_len: int):
    sequences = write_random(tmp_path, seed, max_seq_len)
    rows = naive_pack([len(ids) - 1 for ids, _ in sequences], max_seq_len)
    dataset = SFTDataset(tmp_path, "train", max_seq_len)
    assert len(dataset) == len(rows)
    # Shuffled: the first rows must not be those with the longest sequences.
    rows = [rows[index] for index in sample_at(0, np.arange(len(rows)), len(rows))]
    assert [dataset.members(number).tolist() for number in range(len(dataset))] == rows
    # Some come twice: a batch may hold the end of one epoch and the beginning of the next.
    order = np.random.default_rng(seed).permutation(len(dataset))
    ids = np.concatenate([order, order[:2]])
    for size in (1, 3, len(ids)):
        for begin in range(0, len(ids), size):
            chosen = ids[begin : begin + size]
            expected = naive_batch(
                [[sequences[number] for number in rows[row]] for row in chosen.tolist()], max_seq_len
            )
            assert_equal(dataset.collate(chosen), {**expected, "sample_ids": chosen.tolist()})


@pytest.mark.parametrize("max_seq_len", [1, 7, 8, 40])
@pytest.mark.parametrize("seed", range(4))
def test_unpacked_batches_equal_a_naive_loop(tmp_path: Path, seed: int, max_seq_len: int):
    sequences = write_random(tmp_path, seed, max_seq_len)
    dataset = SFTDataset(tmp_path, "train", max_seq_len, packing=False)
    assert len(dataset) == len(sequences)
    order = np.random.default_rng(seed).permutation(len(dataset))
    for size in (1, 5, len(order)):
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            expected = naive_batch([[sequences[number]] for number in chosen.tolist()], max_seq_len)
            del expected["document_ids"]
            assert_equal(dataset.collate(chosen), {**expected, "sample_ids": chosen.tolist()})


@pytest.mark.parametrize("max_seq_len", [7, 40])
@pytest.mark.parametrize("seed", range(4))
def test_dpo_batches_equal_a_naive_loop(tmp_path: Path, seed: int, max_seq_len: int):
    """Chosen and rejected alternate, also with a reference, in which each pair has its own row."""
    sequences = write_random(tmp_path, seed, max_seq_len, "dpo")
    dataset = DPODataset(tmp_path, "train", max_seq_len)
    assert len(dataset) == len(sequences) // 2 == 12
    order = np.random.default_rng(seed).permutation(len(dataset))
    for size in (1, 5, len(order)):
        for begin in range(0, len(order), size):
            chosen = order[begin : begin + size]
            rows = [[sequences[2 * pair + side]] for pair in chosen.tolist() for side in (0, 1)]
            expected = naive_batch(rows, max_seq_len)
            del expected["document_ids"]
            assert_equal(dataset.collate(chosen), {**expected, "sample_ids": chosen.tolist()})
    dataset.reference = np.arange(24, dtype=np.float32).reshape(12, 2)
    reference = dataset.collate(np.array([3, 0]))["reference"]
    assert reference.dtype == torch.float32 and reference.tolist() == [[6, 7], [0, 1]]


def test_by_hand(tmp_path: Path):
    """Two sequences in one row: no label reaches from one into the other, and padding belongs to neither."""
    question, answer = ([10, 11, 12, 13], [False, False, True, True]), ([20, 21], [False, True])
    write_sequences(tmp_path, [[question, answer]])
    assert_equal(
        SFTDataset(tmp_path, "train", 8).collate(np.array([0])),
        {
            "input_ids": [[10, 11, 12, 20, PAD, PAD, PAD, PAD]],
            "labels": [[-100, 12, 13, 21, -100, -100, -100, -100]],
            "positions": [[0, 1, 2, 0, 0, 0, 0, 0]],
            "document_ids": [[0, 0, 0, 1, -1, -1, -1, -1]],
            "supervised": [1, 2, 3],
            "lengths": [4],
            "sample_ids": [0],
        },
    )


def test_padding_is_what_the_batch_needs(tmp_path: Path):
    """The longest sample of the set and max_seq_len do not matter."""
    lengths = [3, 9, 10, 17, 41]
    write_sequences(
        tmp_path, [[([5] * length, [False] + [True] * (length - 1)) for length in lengths]], max_seq_len=100
    )
    dataset = SFTDataset(tmp_path, "train", 100, packing=False)
    widths = {tuple(ids): dataset.collate(np.array(ids))["input_ids"].shape[1] for ids in ([0], [1], [2], [0, 3], [4])}
    assert widths == {(0,): 8, (1,): 8, (2,): 16, (0, 3): 16, (4,): 40}
    assert num_tokens(dataset.collate(np.array([0, 3]))) == 2 + 16


@pytest.mark.parametrize("vocab_size", [65436, 65437, 65536, 65537, 200_000])
def test_ignored_labels_of_large_vocabularies(tmp_path: Path, vocab_size: int):
    """-100 in unsigned 16 bits is token 65436, and is learnt: the failure of this project's forerunner."""
    ids = [vocab_size - 1, 3, min(65436, vocab_size - 1), vocab_size - 1, 5]
    write_sequences(tmp_path, [[(ids, [False, False, False, True, False])] * 2], vocab_size=vocab_size)
    for dataset in (SFTDataset(tmp_path, "train", 8), SFTDataset(tmp_path, "train", 8, packing=False)):
        batch = dataset.collate(np.array([0]))
        assert batch["input_ids"][0, :4].tolist() == ids[:4]
        assert batch["labels"][0, :4].tolist() == [-100, -100, vocab_size - 1, -100]
        assert batch["labels"].min() == -100 and (batch["labels"] == 65436).sum() == (
            batch["supervised"].numel() if vocab_size == 65437 else 0
        )


def test_every_supervised_token_is_learnt_once_an_epoch(tmp_path: Path):
    sequences = write_random(tmp_path, 7, 40)
    due = sorted(id for ids, supervised in sequences for id, learnt in zip(ids, supervised) if learnt)
    for packing in (True, False):
        dataset = SFTDataset(tmp_path, "train", 40, packing)
        labels = dataset.collate(np.arange(len(dataset)))["labels"]
        assert sorted(labels[labels != IGNORE_INDEX].tolist()) == due


def test_supervised_is_the_flat_position_of_every_label(tmp_path: Path):
    write_random(tmp_path, 3, 40)
    batch = SFTDataset(tmp_path, "train", 40).collate(np.array([0, 2, 1]))
    labels = batch["labels"].reshape(-1)
    assert batch["supervised"].tolist() == torch.nonzero(labels != IGNORE_INDEX).flatten().tolist()
    assert (labels[batch["supervised"]] >= 0).all()


def test_batches_own_their_memory(tmp_path: Path):
    """Changing a batch in place must change neither the next one nor the caller's ids."""
    write_random(tmp_path, 0, 8)
    dataset, ids = SFTDataset(tmp_path, "train", 8), np.arange(3)
    first, again = dataset.collate(ids), dataset.collate(ids)
    for tensor in first.values():
        tensor.fill_(0)
    assert ids.tolist() == [0, 1, 2]
    assert all(torch.equal(tensor, again[name]) for name, tensor in dataset.collate(ids).items())


def test_fingerprint_tells_packed_from_unpacked(tmp_path: Path):
    """Their samples differ: a run must not go on with the other."""
    write_random(tmp_path, 0, 8)
    packed, unpacked = (SFTDataset(tmp_path, "train", 8, packing).fingerprint for packing in (True, False))
    assert packed != unpacked
    assert packed == SFTDataset(tmp_path, "train", 8).fingerprint


def test_description(tmp_path: Path):
    """100 sequences of 5 tokens, 4 positions each, in rows of 8."""
    write_sequences(tmp_path, [[([5, 6, 7, 8, 9], [False, False, False, True, True])] * 100])
    assert SFTDataset(tmp_path, "train", 8).description() == (
        "100 sequences packed into 50 rows of 8 positions that are 100.0% full, 40% of the tokens supervised"
    )
    assert SFTDataset(tmp_path, "train", 8, packing=False).description() == (
        "100 sequences of 5 tokens on average, each by itself, 40% of the tokens supervised"
    )


# Digests


KINDS = {"packed": ("sft", True), "unpacked": ("sft", False), "dpo": ("dpo", False)}


@pytest.fixture(params=KINDS)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> SFTDataset | DPODataset:
    task, packing = KINDS[request.param]
    write_random(tmp_path, 5, 24, task)
    return open_dataset(task, tmp_path, "train", 24, packing=packing)


def test_open_dataset(dataset: SFTDataset | DPODataset, tmp_path: Path):
    if isinstance(dataset, SFTDataset):
        assert dataset.packing == (len(dataset) < len(dataset.sequences))
    else:
        assert isinstance(dataset, DPODataset)
    other = "dpo" if isinstance(dataset, SFTDataset) else "sft"
    with pytest.raises(ValueError, match="was pretokenized for --task_type"):
        open_dataset(other, tmp_path, "train", 24)


def test_digest_is_that_of_the_audit_however_the_step_is_spread(dataset: SFTDataset | DPODataset):
    """Micro-batches of 1 to 12, on one to three ranks: each pads in its own way, and all hold the same samples."""
    seed, size = 11, 12
    for step in range(2):
        first = step * size
        due = recomputed_digest(dataset, seed, first, first + size - 1)
        for micro_batch_size, ranks in [(1, 1), (1, 3), (2, 1), (3, 2), (4, 3), (12, 1)]:
            total = 0
            for rank in range(ranks):
                loader = TrainLoader(
                    dataset, seed, micro_batch_size, size // micro_batch_size, rank, ranks, first, num_workers=0
                )
                read = next(loader)
                assert (read.first, read.last) == (first, first + size - 1)
                total += sum(map(batch_digest, read.micro_batches))
            assert total % (1 << 64) == due


def test_digest_leaves_padding_out(dataset: SFTDataset | DPODataset):
    batch = dataset.collate(np.array([0, 1]))
    due = batch_digest(batch)
    wider = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 16), value=77)}
    assert batch_digest(wider) == due
    positions = torch.arange(batch["input_ids"].shape[1])
    refilled = torch.where(positions < batch["lengths"][:, None], batch["input_ids"], 99)
    assert batch_digest({**batch, "input_ids": refilled}) == due


def test_digest_sees_every_token_and_sample(dataset: SFTDataset | DPODataset):
    batch = dataset.collate(np.array([0, 1]))
    due = batch_digest(batch)
    for row, length in enumerate(batch["lengths"].tolist()):
        for position in range(length):
            other = batch["input_ids"].clone()
            other[row, position] ^= 1
            assert batch_digest({**batch, "input_ids": other}) != due
    assert batch_digest({**batch, "sample_ids": batch["sample_ids"].flip(0)}) != due
    each = len(batch["lengths"]) // 2
    assert batch_digest(dataset.collate(np.array([1, 0]))) == due
    shorter = {**batch, "lengths": batch["lengths"].clone()}
    shorter["lengths"][each] -= 1
    assert batch_digest(shorter) != due


def test_digest_of_another_stream_differs(dataset: SFTDataset | DPODataset):
    size = min(6, len(dataset))
    digests = [recomputed_digest(dataset, seed, first, first + size - 1) for seed in (0, 1) for first in (0, 1, 30)]
    # The sets of samples differ, and not by chance: the order is a permutation, and these windows hold different ones.
    windows = [
        sorted(sample_at(seed, np.arange(first, first + size), len(dataset)).tolist())
        for seed in (0, 1)
        for first in (0, 1, 30)
    ]
    for one in range(len(digests)):
        for other in range(one):
            assert (digests[one] == digests[other]) == (windows[one] == windows[other])


def test_num_tokens_counts_no_padding(dataset: SFTDataset | DPODataset):
    ids = np.arange(len(dataset))
    due = sum(len(row) for row in dataset.input_rows(ids))
    batch = dataset.collate(ids)
    assert num_tokens(batch) == due == int(batch["lengths"].sum())
    assert due < batch["input_ids"].numel()


def test_input_rows_are_the_inputs_of_the_batch(dataset: SFTDataset | DPODataset):
    ids = np.array([2, 0])
    batch = dataset.collate(ids)
    each = len(batch["lengths"]) // len(ids)
    rows = [row[:length].tolist() for row, length in zip(batch["input_ids"], batch["lengths"].tolist())]
    found = [row.tolist() for row in dataset.input_rows(ids)]
    assert found == [sum(rows[number * each : (number + 1) * each], []) for number in range(len(ids))]


def test_validation_reads_every_sample_once(dataset: SFTDataset | DPODataset):
    """In its own order, for any number of processes; the last batch may be smaller."""
    for ranks in (1, 2, 3):
        seen: dict[int, list[int]] = {}
        for rank in range(ranks):
            count, batches = validation_batches(dataset, 5, 0, rank, ranks)
            seen |= {number: batch["sample_ids"].tolist() for number, batch in batches}
        assert sum((seen[number] for number in range(count)), []) == list(range(len(dataset)))

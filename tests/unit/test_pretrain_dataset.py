"""Pretraining batches against a plain Python loop over the concatenated tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.format import BinHeader, BinWriter, write_index
from dataset.pretrain import IGNORE_INDEX, PretrainDataset

EOD = 3


def write_set(directory: Path, shards: list[list[list[int]]], max_seq_len: int, vocab_size: int = 512) -> list[int]:
    """Write shards of documents and their index; returns the whole token stream."""
    stream, names = [], []
    for number, documents in enumerate(shards):
        names.append(f"train-{number}.bin")
        with BinWriter(directory / names[-1], BinHeader(vocab_size, EOD, "ab" * 32, "train", 0.0)) as writer:
            for document in documents:
                writer.add_document(document, len(document))
                stream += [*document, EOD]
    write_index(directory, "train", max_seq_len, names)
    return stream


def random_shards(seed: int, vocab_size: int = 512) -> list[list[list[int]]]:
    """Documents from empty to longer than a sample; shards from a single token to several samples."""
    rng = np.random.default_rng(seed)

    def document() -> list[int]:
        return rng.integers(10, vocab_size, rng.choice([0, 1, 2, 5, 40])).tolist()

    shards = [[document() for _ in range(rng.integers(1, 9))] for _ in range(12)]
    return [*shards, [[]], [[20] * 100]]


def naive_batch(stream: list[int], ids: list[int], T: int, document_mask: bool) -> dict[str, list]:
    """Expected result of collate, one token at a time."""
    batch: dict[str, list] = {"input_ids": [], "labels": [], "positions": [], "document_ids": [], "sample_ids": ids}
    for sample_id in ids:
        row: dict[str, list] = {"input_ids": [], "labels": [], "positions": [], "document_ids": []}
        document = position = 0
        for place in range(sample_id * T, sample_id * T + T):
            token, following = stream[place], stream[place + 1]
            row["input_ids"].append(token)
            row["labels"].append(IGNORE_INDEX if document_mask and token == EOD else following)
            row["positions"].append(position)
            row["document_ids"].append(document)
            position += 1
            if document_mask and token == EOD:
                document, position = document + 1, 0
        for name, values in row.items():
            batch[name].append(values)
    if not document_mask:
        del batch["document_ids"]
    return batch


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("max_seq_len", [1, 2, 8, 33])
@pytest.mark.parametrize("seed", range(4))
def test_batches_equal_a_naive_loop(tmp_path: Path, seed: int, max_seq_len: int, document_mask: bool):
    stream = write_set(tmp_path, random_shards(seed), max_seq_len)
    dataset = PretrainDataset(tmp_path, "train", max_seq_len, document_mask)
    assert len(dataset) == (len(stream) - 1) // max_seq_len
    ids = np.random.default_rng(seed).permutation(len(dataset))
    ids = np.concatenate([ids, ids[:3]])

    tokens = dataset.read_rows(ids)
    starts = [i * max_seq_len for i in ids.tolist()]
    assert tokens.tolist() == [stream[start : start + max_seq_len + 1] for start in starts]

    batch = dataset.collate(ids)
    expected = naive_batch(stream, ids.tolist(), max_seq_len, document_mask)
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64 and batch[name].is_contiguous()
        assert batch[name].tolist() == values, name


def test_the_set_reads_every_token_as_input_once(tmp_path: Path):
    stream = write_set(tmp_path, random_shards(1), 8)
    dataset = PretrainDataset(tmp_path, "train", 8)
    inputs = dataset.collate(np.arange(len(dataset)))["input_ids"].flatten().tolist()
    # The rest is shorter than a sample and its label.
    assert inputs == stream[: len(inputs)] and len(stream) - len(inputs) <= 8


def test_sample_over_many_shards(tmp_path: Path):
    """Eleven shards of one or two tokens inside one sample."""
    stream = write_set(tmp_path, [[[10]], *[[[]]] * 5, *[[[11]]] * 5, [[12] * 30]], 16)
    dataset = PretrainDataset(tmp_path, "train", 16)
    assert dataset.read_rows(np.asarray([0, 1])).tolist() == [stream[:17], stream[16:33]]
    assert dataset.rows["file"].tolist()[0] == 0 and dataset.rows["file"].tolist()[1] == 10


def test_no_label_after_end_of_document(tmp_path: Path):
    """The next document's first token cannot be predicted from this one."""
    write_set(tmp_path, [[[10, 11], [12, 13, 14], [15]]], 8)
    dataset = PretrainDataset(tmp_path, "train", 8)
    batch = dataset.collate(np.asarray([0]))
    assert batch["input_ids"].tolist() == [[10, 11, EOD, 12, 13, 14, EOD, 15]]
    assert batch["labels"].tolist() == [[11, EOD, -100, 13, 14, EOD, -100, EOD]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 2]]

    plain = PretrainDataset(tmp_path, "train", 8, document_mask=False).collate(np.asarray([0]))
    assert plain["labels"].tolist() == [[11, EOD, 12, 13, 14, EOD, 15, EOD]]
    assert plain["positions"].tolist() == [list(range(8))]
    assert "document_ids" not in plain


def test_row_of_nothing_but_ends(tmp_path: Path):
    write_set(tmp_path, [[[]] * 9], 8)
    batch = PretrainDataset(tmp_path, "train", 8).collate(np.asarray([0]))
    assert batch["labels"].tolist() == [[-100] * 8]
    assert batch["positions"].tolist() == [[0] * 8]
    assert batch["document_ids"].tolist() == [list(range(8))]


def test_large_vocabulary(tmp_path: Path):
    """Tokens above 2**16 survive: uint32 on disk, int64 in the batch."""
    stream = write_set(tmp_path, random_shards(5, 200_000), 8, vocab_size=200_000)
    dataset = PretrainDataset(tmp_path, "train", 8)
    assert max(stream) > 1 << 16
    rows = dataset.read_rows(np.arange(len(dataset)))
    assert rows[:, :8].flatten().tolist() == stream[: 8 * len(dataset)]
    assert dataset.header.vocab_size == 200_000 and dataset.header.eod_id == EOD


def test_batches_own_their_memory(tmp_path: Path):
    """Changing a batch in place must change neither the next one nor its own other tensors."""
    write_set(tmp_path, random_shards(2), 8)
    dataset, ids = PretrainDataset(tmp_path, "train", 8), np.arange(4)
    first, again = dataset.collate(ids), dataset.collate(ids)
    labels = first["labels"].clone()
    first["input_ids"].fill_(0)
    first["sample_ids"].fill_(0)
    assert torch.equal(first["labels"], labels)
    assert ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(dataset.collate(ids)["input_ids"], again["input_ids"])


def test_missing_index_says_what_to_run(tmp_path: Path):
    write_set(tmp_path, random_shards(0), 8)
    with pytest.raises(ValueError, match="build_pretrain_sample_index_map --data_dir .* --max_seq_len 16"):
        PretrainDataset(tmp_path, "train", 16)
    with pytest.raises(ValueError, match="build_pretrain_sample_index_map"):
        PretrainDataset(tmp_path, "valid", 8)

"""The loader's global stream is the same for any split over ranks, micro-batches and threads."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from dataset.format import BinHeader, BinWriter, write_index
from dataset.loader import Batch, Step, TrainLoader, batch_digest, validation_batches
from dataset.order import sample_at
from dataset.pretrain import PretrainDataset

NUM_SAMPLES, SEQ_LEN = 96, 4


class CountingDataset:
    """Sample i is the row [i, i + 1, i + 2]."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.calls = 0

    def __len__(self) -> int:
        return self.num_samples

    def ids_at(self, seed: int, positions: np.ndarray) -> np.ndarray:
        return sample_at(seed, positions, self.num_samples)

    def collate(self, sample_ids: np.ndarray) -> Batch:
        self.calls += 1
        return {
            "sample_ids": torch.from_numpy(sample_ids.copy()),
            "input_ids": torch.from_numpy(sample_ids[:, None] + np.arange(3)),
        }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PretrainDataset:
    """A real data set in which no token occurs twice, so equal rows are the same sample."""
    directory = tmp_path_factory.mktemp("tokens")
    with BinWriter(directory / "train-0.bin", BinHeader(1024, 0, "ab" * 32, "train", 0.0)) as writer:
        writer.add_document(list(range(10, 10 + NUM_SAMPLES * SEQ_LEN)), 1)
    write_index(directory, "train", SEQ_LEN, ["train-0.bin"])
    return PretrainDataset(directory, "train", SEQ_LEN)


def take(loader: TrainLoader, count: int) -> list[Step]:
    steps = list(itertools.islice(loader, count))
    loader.close()
    return steps


def all_ranks(dataset, world_size: int, steps: int, B: int, M: int, **kwargs) -> list[list[Step]]:
    """Steps of each rank: B rows per micro-batch, M micro-batches per step over all ranks."""
    return [take(TrainLoader(dataset, 5, B, M, rank, world_size, **kwargs), steps) for rank in range(world_size)]


def stream_of(ranks: list[list[Step]], step: int) -> list[tuple[int, int]]:
    """(position, sample) of one step in the order of the micro-batches: number m is on rank m % world_size."""
    micro_batches = itertools.chain.from_iterable(zip(*(rank[step].micro_batches for rank in ranks), strict=True))
    return [pair for b in micro_batches for pair in zip(b["row_ids"].tolist(), b["sample_ids"].tolist(), strict=True)]


def labels_at_positions(ranks: list[list[Step]]) -> dict[int, list[int]]:
    batches = [batch for rank in ranks for step in rank for batch in step.micro_batches]
    return {position: row for b in batches for position, row in zip(b["row_ids"].tolist(), b["labels"].tolist())}


def same(a: Step, b: Step) -> bool:
    return (a.first, a.last, len(a.micro_batches)) == (b.first, b.last, len(b.micro_batches)) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a.micro_batches, b.micro_batches)
    )


@pytest.mark.parametrize("num_samples", [7, 53, 96])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_read_one_stream(world_size: int, num_samples: int):
    """Includes epochs that end inside a step, and sets smaller than a step."""
    B, M = 2, 12
    ranks = all_ranks(CountingDataset(num_samples), world_size, steps=6, B=B, M=M)
    for step in range(6):
        positions = np.arange(step * B * M, (step + 1) * B * M)
        expected = sample_at(5, positions, num_samples)
        assert stream_of(ranks, step) == list(zip(positions.tolist(), expected.tolist()))
        for rank in ranks:
            assert (rank[step].first, rank[step].last) == (positions[0], positions[-1])
            assert len(rank[step].micro_batches) == M // world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_an_epoch(dataset: PretrainDataset, world_size: int):
    ranks = all_ranks(dataset, world_size, steps=8, B=2, M=12)
    epochs = []
    for first in (0, 4):
        samples = [sample for step in range(first, first + 4) for _, sample in stream_of(ranks, step)]
        assert Counter(samples) == Counter(range(NUM_SAMPLES))
        epochs.append(samples)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_regression_every_rank_reads_identical_data(dataset: PretrainDataset, world_size: int):
    """In the original every rank reads identical data: world_size times the work for one rank's gradient."""
    ranks = all_ranks(dataset, world_size, steps=4, B=2, M=12)
    rows = [
        [tuple(row) for step in rank for batch in step.micro_batches for row in batch["input_ids"].tolist()]
        for rank in ranks
    ]
    for mine, theirs in itertools.combinations(rows, 2):
        assert len(mine) == len(theirs) == NUM_SAMPLES // world_size
        assert set(mine).isdisjoint(theirs)
    assert len(set().union(*rows)) == NUM_SAMPLES


@pytest.mark.parametrize("world_size", [1, 2])
def test_split_into_micro_batches_does_not_change_the_rows(dataset: PretrainDataset, world_size: int):
    """1 x 8, 2 x 4, 4 x 2: a step has the same rows in the same order, with the same positions in the run."""
    splits = [all_ranks(dataset, world_size, steps=15, B=B, M=8 // B) for B in (1, 2, 4)]
    for step in range(15):
        streams = [stream_of(ranks, step) for ranks in splits]
        assert streams[0] == streams[1] == streams[2]
        assert len(streams[0]) == 8
    # The content of the rows, not only the ids.
    labels = [labels_at_positions(ranks) for ranks in splits]
    assert len(labels[0]) == 15 * 8
    assert labels[0] == labels[1] == labels[2]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_starting_later_equals_skipping(dataset: PretrainDataset, num_workers: int):
    """A resumed run starts later, even in another epoch, and on another number of ranks than before."""
    whole = take(TrainLoader(dataset, 5, 2, 4, 1, 2, num_workers=num_workers), 30)
    for skipped in (1, 11, 12, 13, 29):
        loader = TrainLoader(dataset, 5, 2, 4, 1, 2, first_position=8 * skipped, num_workers=num_workers)
        rest = take(loader, 30 - skipped)
        assert all(same(a, b) for a, b in zip(rest, whole[skipped:], strict=True))
    before = all_ranks(dataset, 2, steps=3, B=2, M=4)
    after = all_ranks(dataset, 4, steps=3, B=2, M=4, first_position=24)
    unbroken = all_ranks(dataset, 1, steps=6, B=2, M=4)
    joined = [stream_of(before, step) for step in range(3)] + [stream_of(after, step) for step in range(3)]
    assert joined == [stream_of(unbroken, step) for step in range(6)]


def test_start_far_away(dataset: PretrainDataset):
    """Starting at position 10**12 is as quick as at position 0."""
    step = take(TrainLoader(dataset, 5, 2, 4, 0, 1, first_position=10**12), 1)[0]
    assert (step.first, step.last) == (10**12, 10**12 + 7)
    assert step.micro_batches[1]["row_ids"].tolist() == [10**12 + 2, 10**12 + 3]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_threads_change_nothing(dataset: PretrainDataset, num_workers: int):
    plain = take(TrainLoader(dataset, 5, 2, 4, 1, 2, num_workers=0), 40)
    threaded = take(TrainLoader(dataset, 5, 2, 4, 1, 2, num_workers=num_workers), 40)
    assert all(same(a, b) for a, b in zip(plain, threaded, strict=True))


def test_slow_step_keeps_its_place():
    """The first step is ready only after the second one, but still comes out first."""
    second_was_read = threading.Event()

    class Slow(CountingDataset):
        def collate(self, sample_ids: np.ndarray) -> Batch:
            if sample_ids.tolist() == first_ids:
                assert second_was_read.wait(timeout=60)
            elif sample_ids.tolist() == second_ids:
                second_was_read.set()
            return super().collate(sample_ids)

    first_ids, second_ids = sample_at(5, np.arange(4).reshape(2, 2), 100).tolist()
    steps = take(TrainLoader(Slow(100), 5, 2, 1, 0, 1, num_workers=2), 3)
    assert [step.first for step in steps] == [0, 2, 4]
    assert steps[0].micro_batches[0]["sample_ids"].tolist() == first_ids


def test_reading_ahead_is_bounded():
    """Otherwise the whole data set would pile up in memory while the first steps compute."""
    dataset = CountingDataset(1000)
    loader = TrainLoader(dataset, 5, 1, 1, 0, 1, num_workers=3)
    for consumed in range(1, 20):
        next(loader)
        assert consumed <= dataset.calls < consumed + 10
    loader.close()
    assert dataset.calls < 30


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    loader = TrainLoader(CountingDataset(100), 5, 2, 1, 0, 1, num_workers=3)
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    loader.close()
    assert not any(thread.is_alive() for thread in started)
    TrainLoader(CountingDataset(100), 5, 2, 1, 0, 1, num_workers=0).close()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_exception_in_the_dataset_surfaces(num_workers: int):
    """The exception comes at its own step, with its own type: a read error must not look like the end of the data."""
    bad = int(sample_at(5, 13, 100))

    class Broken(CountingDataset):
        def collate(self, sample_ids: np.ndarray) -> Batch:
            if bad in sample_ids:
                raise OSError("Input/output error")
            return super().collate(sample_ids)

    loader = TrainLoader(Broken(100), 5, 2, 2, 0, 1, num_workers=num_workers)
    assert [next(loader).first for _ in range(3)] == [0, 4, 8]
    with pytest.raises(OSError, match="Input/output error"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(("accumulation_steps", "world_size"), [(3, 2), (4, 3), (1, 2)])
def test_uneven_split_is_refused(accumulation_steps: int, world_size: int):
    with pytest.raises(ValueError, match=f"{accumulation_steps} micro-batches .* {world_size} ranks"):
        TrainLoader(CountingDataset(10), 5, 2, accumulation_steps, 0, world_size)


# ---- digest


def digest(batches: list[Batch]) -> int:
    return sum(map(batch_digest, batches)) % (1 << 64)


def batches_of(dataset, world_size: int, B: int, M: int, steps: int = 3) -> list[list[Batch]]:
    return [[b for s in rank for b in s.micro_batches] for rank in all_ranks(dataset, world_size, steps, B, M)]


def test_digest_does_not_depend_on_the_split(dataset: PretrainDataset):
    splits = [(1, 1, 12), (1, 2, 6), (1, 12, 1), (2, 2, 6), (2, 1, 12), (3, 2, 6), (4, 1, 12), (4, 3, 4), (3, 4, 3)]
    digests = {digest(sum(batches_of(dataset, *split), [])) for split in splits}
    assert len(digests) == 1
    assert 0 <= digests.pop() < 1 << 64


def test_digest_shows_what_was_really_read(dataset: PretrainDataset):
    ranks = batches_of(dataset, 2, 2, 4)
    first, second = ranks[0][:2], ranks[1][:2]
    right = digest(first + second)
    wrong = {
        "both ranks read rank 0's data": digest(first + first),
        "both ranks read rank 1's data": digest(second + second),
        "a micro-batch left out": digest(first),
        "a micro-batch used twice": digest(first + second + first[:1]),
        "another step": digest(ranks[0][2:4] + ranks[1][2:4]),
    }
    rows_twice = {name: tensor[[0, 0]] for name, tensor in second[1].items()}
    wrong["a row used twice"] = digest([*first, second[0], rows_twice])
    changed = dict(second[1], input_ids=second[1]["input_ids"].clone())
    changed["input_ids"][1, -1] += 1
    wrong["another token under the same sample id"] = digest([*first, second[0], changed])
    swapped = dict(second[1], sample_ids=second[1]["sample_ids"].flip(0))
    wrong["the tokens of two samples exchanged"] = digest([*first, second[0], swapped])
    assert right not in wrong.values()
    assert len(set(wrong.values())) == len(wrong)


def test_digest_ignores_the_order_of_rows(dataset: PretrainDataset):
    (batches,) = batches_of(dataset, 1, 4, 1)
    backwards = [{name: tensor.flip(0) for name, tensor in batch.items()} for batch in batches[::-1]]
    assert digest(backwards) == digest(batches)
    assert digest([]) == 0


# ---- validation


@pytest.mark.parametrize("batch_size", [1, 5, 24, 96, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_validation_covers_each_sample_once(dataset: PretrainDataset, world_size: int, batch_size: int):
    collected: dict[int, Batch] = {}
    for rank in range(world_size):
        count, batches = validation_batches(dataset, batch_size, 0, rank, world_size)
        assert count == -(-NUM_SAMPLES // batch_size)
        for number, batch in batches:
            assert number % world_size == rank and number not in collected
            collected[number] = batch
    assert sorted(collected) == list(range(count))
    ids = torch.cat([collected[number]["sample_ids"] for number in range(count)])
    assert ids.tolist() == list(range(NUM_SAMPLES))
    # The same batches as on one rank, so that the loss is the same sum.
    for number, batch in validation_batches(dataset, batch_size, 0, 0, 1)[1]:
        assert batch.keys() == collected[number].keys()
        assert all(torch.equal(batch[name], collected[number][name]) for name in batch)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_of_a_part(dataset: PretrainDataset, world_size: int):
    numbers, samples = [], []
    for rank in range(world_size):
        count, batches = validation_batches(dataset, 10, 4, rank, world_size)
        assert count == 4
        for number, batch in batches:
            numbers.append(number)
            samples += batch["sample_ids"].tolist()
    assert sorted(numbers) == [0, 1, 2, 3] and sorted(samples) == list(range(40))
    # If more batches are requested than exist: the whole set, with a short last batch.
    count, batches = validation_batches(dataset, 10, 99, 0, 1)
    assert count == 10 and [len(batch["sample_ids"]) for _, batch in batches] == [10] * 9 + [6]


@pytest.mark.parametrize("batch_size", [5, 24, 1000])
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_every_rank_gets_as_many_validation_batches_if_that_matters(
    dataset: PretrainDataset, world_size: int, batch_size: int
):
    """Spare batches have numbers beyond the set's."""
    numbers = []
    for rank in range(world_size):
        count, batches = validation_batches(dataset, batch_size, 0, rank, world_size, equally_many=True)
        own = [number for number, batch in batches if len(batch["sample_ids"])]
        assert len(own) == -(-count // world_size)
        numbers += own
    assert sorted(numbers) == list(range(len(numbers))) and len(numbers) >= count


def test_validation_row_ids_are_the_samples(dataset: PretrainDataset):
    for _, batch in validation_batches(dataset, 10, 0, 1, 2)[1]:
        assert torch.equal(batch["row_ids"], batch["sample_ids"])

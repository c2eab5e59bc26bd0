"""Saves in the background: what is copied and when, the effect of one rank's failure on the others, and a full disk."""

import concurrent.futures
import contextlib
import io
import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train_my_ddp
import training.trainer as trainer_module
from checkpoint import saving
from checkpoint.folder import Checkpoint, find_problem, list_checkpoints
from checkpoint.host_copies import HostCopies
from checkpoint.named import Piece, load_named_state
from checkpoint.retention import Retention, doomed_by
from checkpoint.saving import CheckpointSaver
from checkpoint.stores import Part, StorePlace, enough_of, missing_ranks
from checkpoint.writing import CheckpointWriter
from dataset import audit
from tests.dist.group import run_ranks
from tests.dist.test_stores import enter_own_mounts, mount_small_disk, skip_unless_mounting_is_allowed
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits

CPU = torch.device("cpu")
PATIENCE = 60
"""Seconds after which a test that hangs has failed."""


def on_ranks(count: int, work: Callable[[int, Callable[[object], list]], object]) -> list:
    """Call `work(rank, gather)` on a thread for each rank; returns all results, or raises the first rank's
    exception."""
    meeting, values = threading.Barrier(count), [None] * count

    def gather_as(rank: int) -> Callable[[object], list]:
        def gather(value: object) -> list:
            values[rank] = json.dumps(value)
            meeting.wait(PATIENCE)
            gathered = [json.loads(other) for other in values]
            meeting.wait(PATIENCE)
            return gathered

        return gather

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank, gather_as(rank)) for rank in range(count)]
        return [future.result(PATIENCE) for future in futures]


def alone(value: object) -> list:
    return [value]


def new_saver(
    ckpt_dir: Path, rank: int = 0, count: int = 1, gather: Callable[[object], list] = alone, background: bool = True,
    store: tuple[int, ...] | None = None, keep_last: int = 9,
) -> CheckpointSaver:  # fmt: skip
    place = StorePlace(rank, count, store or tuple(range(count)))
    return CheckpointSaver(ckpt_dir, place, "launch", CPU, Retention(keep_last, 0), background, gather)


def begin_and_start(saver: CheckpointSaver, step: int, value: float = 0.0) -> None:
    """Begin a save of two elements per rank, all with the same value."""
    writer = saver.begin(step)
    piece = Piece.flat("w", (2 * writer.place.world_size,), 2 * writer.place.rank, 2)
    writer.add_named_state([(piece, {"main": torch.full((2,), value)})], holders=[writer.place.rank])
    saver.start(writer, None)


def value_at(ckpt_dir: Path, step: int, rank: int = 0) -> list[float]:
    return load_file(ckpt_dir / f"step-{step}" / f"optim-{rank}.safetensors")[f"w@{2 * rank}/main"].tolist()


def steps_of(ckpt_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(ckpt_dir)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Save threads write nothing until this is set."""
    event, write_files = threading.Event(), CheckpointWriter.write_files

    def gated(self: CheckpointWriter) -> None:
        assert event.wait(PATIENCE)
        write_files(self)

    monkeypatch.setattr(CheckpointWriter, "write_files", gated)
    return event


def fail_on(monkeypatch: pytest.MonkeyPatch, phase: str, rank: int, step: int, error: Exception) -> None:
    original = getattr(CheckpointWriter, phase)

    def failing(self: CheckpointWriter, *arguments: object) -> object:
        if self.place.rank == rank and self.step == step:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, phase, failing)


def test_one_save_at_a_time(tmp_path: Path, gate: threading.Event):
    """`begin` refuses while a save is in flight; its outcome is known when it is done, and not before."""
    saver = new_saver(tmp_path)
    assert not saver.in_flight and saver.settle() is None and saver.signs() == (False, False)
    begin_and_start(saver, 1, 1.0)
    assert saver.in_flight and saver.signs() == (False, False) and steps_of(tmp_path) == []
    with pytest.raises(AssertionError):
        saver.begin(2)
    gate.set()
    outcome = saver.settle()
    assert (outcome.step, outcome.name, outcome.problem) == (1, "step-1", None)
    assert 0 < outcome.held_up and 0 < outcome.seconds
    assert not saver.in_flight and saver.signs() == (False, False)
    begin_and_start(saver, 2, 2.0)
    assert saver.settle().problem is None
    saver.close()
    assert steps_of(tmp_path) == [1, 2] and value_at(tmp_path, 1) == [1.0, 1.0]
    assert os.stat(tmp_path / "step-1" / "optim-0.safetensors").st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


@pytest.mark.parametrize("phase", ["make_directory", "write_files", "write_tensors", "finish"])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_on_one_rank_ends_the_save_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, failing: int
):
    """The store's first rank gives up waiting for a record that does not come; the previous checkpoint stays whole, and
    the next one is written."""
    fail_on(monkeypatch, phase, failing, 2, OSError(28, "No space left on device"))

    def work(rank: int, gather: Callable[[object], list]) -> list[str | None]:
        saver, problems = new_saver(tmp_path, rank, 3, gather), []
        for step in (1, 2, 3):
            begin_and_start(saver, step, float(step))
            problems.append(saver.settle().problem)
            if step == 2:
                gather(None)
                assert os.listdir(tmp_path) == ["step-1"] and find_problem(tmp_path / "step-1") is None
                gather(None)
        saver.close()
        return problems

    expected = [None, f"rank {failing}: [Errno 28] No space left on device", None]
    assert on_ranks(3, work) == [expected] * 3
    assert steps_of(tmp_path) == [1, 3] and find_problem(tmp_path / "step-3") is None
    assert [value_at(tmp_path, 3, rank) for rank in range(3)] == [[3.0, 3.0]] * 3


def test_every_rank_hears_of_every_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_on(monkeypatch, "finish", 0, 1, OSError("first"))
    fail_on(monkeypatch, "finish", 1, 1, OSError("second"))

    def work(rank: int, gather: Callable[[object], list]) -> str | None:
        saver = new_saver(tmp_path, rank, 2, gather)
        begin_and_start(saver, 1)
        # A rank is not done before its own thread is, even if another one failed.
        gather(concurrent.futures.wait([saver._save.ended], PATIENCE).done and None)
        outcome = saver.conclude()
        saver.close()
        return outcome.problem

    assert on_ranks(2, work) == ["rank 0: first; rank 1: second"] * 2


def test_a_bug_in_the_save_thread_is_raised_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other ranks hear of it as of a full disk, and nobody waits for it."""
    fail_on(monkeypatch, "write_tensors", 1, 1, TypeError("a bug"))

    def work(rank: int, gather: Callable[[object], list]) -> str | None:
        saver = new_saver(tmp_path, rank, 2, gather)
        begin_and_start(saver, 1)
        try:
            return saver.settle().problem
        except TypeError as error:
            return f"raised {error}"
        finally:
            saver.close()

    assert on_ranks(2, work) == ["rank 1: a bug", "raised a bug"]
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path):
    """A file is in its way; when that is gone, the next save succeeds."""
    (tmp_path / "ckpt").touch()
    saver = new_saver(tmp_path / "ckpt")
    begin_and_start(saver, 1)
    assert "rank 0: [Errno " in saver.settle().problem
    (tmp_path / "ckpt").unlink()
    begin_and_start(saver, 2)
    assert saver.settle().problem is None
    saver.close()
    assert steps_of(tmp_path / "ckpt") == [2]


def test_a_save_that_failed_on_one_node_leaves_nothing_on_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other node may have committed its part already. Kept as one of its newest, it would push out a whole
    checkpoint."""
    for step in (2, 3):
        fail_on(monkeypatch, "finish", 1, step, OSError(28, "No space left on device"))

    def work(rank: int, gather: Callable[[object], list]) -> list[bool]:
        saver, failed = new_saver(tmp_path / f"node-{rank}", rank, 2, gather, store=(rank,), keep_last=2), []
        for step in (1, 2, 3, 4):
            begin_and_start(saver, step)
            # Both are done before the ranks look, so that the first one has committed.
            gather(concurrent.futures.wait([saver._save.ended], PATIENCE).done and None)
            failed.append(saver.conclude().problem is not None)
        saver.close()
        return failed

    assert on_ranks(2, work) == [[False, True, True, False]] * 2
    assert [steps_of(tmp_path / f"node-{rank}") for rank in range(2)] == [[1, 4], [1, 4]]


def test_what_is_saved_does_not_move_with_the_training(tmp_path: Path, gate: threading.Event):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4).short()}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    saver = new_saver(tmp_path)
    writer = saver.begin(1)
    writer.add_tensors("model.safetensors", tensors)
    saver.start(writer, None)
    saver.before_update()
    for tensor in tensors.values():
        tensor.zero_()
    gate.set()
    assert saver.settle().problem is None
    saver.close()
    assert same_bits(load_file(tmp_path / "step-1" / "model.safetensors"), before)


def test_without_the_background_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tensors are written from where they are, so that a save takes no memory."""
    written = []
    original = CheckpointWriter.write_tensors

    def watched(self: CheckpointWriter, name: str, tensors: dict[str, Tensor], *rest: object) -> None:
        written.extend(tensor.data_ptr() for tensor in tensors.values())
        original(self, name, tensors, *rest)

    monkeypatch.setattr(CheckpointWriter, "write_tensors", watched)
    tensor, saver = torch.arange(5.0), new_saver(tmp_path, background=False)
    saver.reserve(lambda writer: pytest.fail("there is nothing to reserve"))
    writer = saver.begin(1)
    writer.add_tensors("x.safetensors", {"x": tensor})
    saver.start(writer, None)
    assert saver.settle().problem is None
    saver.close()
    assert written == [tensor.data_ptr()]
    assert torch.equal(load_file(tmp_path / "step-1" / "x.safetensors")["x"], tensor)


def test_shared_memory_is_copied_once():
    """float32 weights are their own main parameters. A part of them, or other memory of the same size, is not."""
    copies, weight = HostCopies(CPU), torch.arange(6.0).view(2, 3)
    for _ in range(2):
        copies.begin()
        flat, shaped = copies.copy("main", weight.view(-1)), copies.copy("weight", weight)
        part, bits = copies.copy("part", weight[0]), copies.copy("bits", weight.view(torch.int32))
        other = copies.copy("other", weight + 1)
        copies.end()
        copies.before_update()
        assert flat.data_ptr() == shaped.data_ptr() and (flat.shape, shaped.shape) == ((6,), (2, 3))
        assert len({tensor.data_ptr() for tensor in (weight, flat, part, bits, other)}) == 5
        assert torch.equal(shaped, weight) and torch.equal(part, weight[0]) and torch.equal(other, weight + 1)
        assert torch.equal(bits, weight.view(torch.int32))
        weight += 10


@pytest.mark.parametrize("background", [False, True])
def test_a_tensor_that_is_given_up_is_copied_at_once(tmp_path: Path, background: bool):
    """Weights that were gathered for a save: the copy stands for them in several files, and their memory is free."""
    saver = new_saver(tmp_path, background=background)
    for step in (1, 2):
        gathered = torch.full((4, 2), float(step))
        writer = saver.begin(step)
        whole = writer.copy_now("whole w", gathered)
        if background:
            gathered.fill_(-1.0)
        writer.add_tensors("a.safetensors", {"w": whole}, are_copies=True)
        writer.add_tensors("b.safetensors", {"w": whole[:1]}, are_copies=True)
        saver.start(writer, None)
        assert saver.settle().problem is None
    saver.close()
    for step in (1, 2):
        path = tmp_path / f"step-{step}"
        assert load_file(path / "a.safetensors")["w"].tolist() == [[step, step]] * 4
        assert load_file(path / "b.safetensors")["w"].tolist() == [[step, step]]


def test_tensors_that_are_not_contiguous(tmp_path: Path):
    """Transposed and strided tensors, in one file and in several: a contiguous copy is gone when the next comes, and
    the next may get its memory."""
    saver, base = new_saver(tmp_path), torch.arange(4096.0).view(64, 64)
    tensors = {f"t{i}": (base + i).t() for i in range(4)} | {f"s{i}": (base + i)[::2, ::2] for i in range(4)}
    writer = saver.begin(1)
    writer.add_tensors("all.safetensors", tensors)
    for name, tensor in tensors.items():
        writer.add_tensors(f"{name}.safetensors", {name: tensor})
    saver.start(writer, None)
    assert saver.settle().problem is None
    saver.close()
    path = tmp_path / "step-1"
    assert same_bits(load_file(path / "all.safetensors"), tensors)
    assert same_bits({name: load_file(path / f"{name}.safetensors")[name] for name in tensors}, tensors)


def test_the_first_save_takes_no_memory_once_it_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors, saver = {"a": torch.arange(6.0), "b": torch.arange(3)}, new_saver(tmp_path)

    def add_share(writer: CheckpointWriter) -> None:
        writer.add_tensors("model.safetensors", tensors)

    saver.reserve(add_share)
    assert os.listdir(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory is taken"))
        for step in (1, 2):
            tensors["a"] += step
            writer = saver.begin(step)
            add_share(writer)
            saver.start(writer, None)
            assert saver.settle().problem is None
    saver.close()
    assert load_file(tmp_path / "step-2" / "model.safetensors")["a"].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize(
    "mode",
    [
        [],
        ["--use_distributed_optimizer", "--overlap_param_gather"],
        ["--use_powerSGD_hook", "--min_compression_rate=0"],
        ["--use_powerSGD_hook", "--min_compression_rate=0", "--grad_buffer_is_powerSGD_error"],
        ["--ddp_impl=naive", "--dtype=bfloat16"],
        ["--data_parallel=fsdp", "--dtype=bfloat16"],
    ],
)
def test_a_run_reserves_all_that_its_saves_need(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, mode: list[str]
):
    """Includes memory that PowerSGD needs only after its first step."""
    seen, end = [], HostCopies.end

    def watched(self: HostCopies) -> None:
        seen.append({key: (buffer.data_ptr(), buffer.nbytes) for key, buffer in self._buffers.items()})
        end(self)

    monkeypatch.setattr(HostCopies, "end", watched)
    assert train_my_ddp.main([*tiny_run, "--max_iters=3", "--save_interval=1", *mode]) == 0
    assert len(seen) == 4 and seen[1:] == seen[:1] * 3


def random_pieces(generator: random.Random, count: int) -> list[tuple[Piece, dict[str, Tensor]]]:
    """Consecutive pieces of parameters that hold their own numbers."""
    pieces, first = [], 0
    for index in range(count):
        size = generator.choice([1, 2, 3, 50, 1000])
        values = torch.arange(first, first + size, dtype=torch.float32)
        piece = Piece.flat(f"p{index // 2}", (2000,), 1000 * (index % 2), size)
        pieces.append((piece, {"main": values, "exp_avg": -values}))
        first += size
    return pieces


@pytest.mark.parametrize("seed", range(8))
def test_the_split_covers_everything_once(tmp_path: Path, seed: int):
    """For any numbers of ranks, shards and pieces: each store has what its ranks hold, once, and says whose state that
    is; the parts that are enough together make up the whole."""
    generator = random.Random(seed)
    for case in range(6):
        world_size = generator.choice([1, 2, 3, 5, 8])
        # All hold the same, each holds its own, or several hold the same.
        shards = (1, world_size, generator.randint(1, world_size))[case % 3]
        pieces = random_pieces(generator, generator.choice([1, 2, 5, 11]))
        cut = generator.randint(0, world_size - 1)
        stores = [tuple(ranks) for ranks in (range(cut), range(cut, world_size)) if ranks]
        parts, paths = {}, {}
        for number, store in enumerate(stores):
            directory = tmp_path / f"{case}-{number}"
            for rank in store:
                writer = CheckpointWriter(directory, 1, StorePlace(rank, world_size, store), "x")
                # Dealt out like cards: as unlike an even split as possible.
                writer.add_named_state(pieces[rank % shards :: shards], range(rank % shards, world_size, shards))
                writer.make_directory()
                writer.write_files()
                writer.finish()
            CheckpointWriter(directory, 1, StorePlace(store[0], world_size, store), "x").commit(None, lambda: False)
            (found,) = list_checkpoints(directory)
            parts[store[0]], paths[store[0]] = found.part, found.path
            assert set(found.part.covers) == {r for r in range(world_size) if r % shards in {s % shards for s in store}}
            here = [piece for shard in range(shards) if shard in found.part.covers for piece in pieces[shard::shards]]
            keys = [key for file in found.path.glob("optim-*") for key in load_file(file)]
            assert sorted(keys) == sorted(f"{p.name}@{p.boxes[0].start[0]}/{key}" for p, t in here for key in t)
        assert not missing_ranks(parts.values())
        for together in ([paths[rank] for rank in enough_of(parts)], list(paths.values())):
            wanted = [(piece, {key: torch.zeros_like(v) for key, v in t.items()}) for piece, t in pieces]
            load_named_state(together, wanted)
            for (_, found), (_, expected) in zip(wanted, pieces):
                assert same_bits(found, expected)


def test_which_parts_of_a_save_are_needed():
    """HSDP with four ranks on each of two nodes, one copy of the model a node: either is enough. With a node less, a
    copy over two nodes needs both."""
    copies = {first: Part(1, None, "x", 8, tuple(range(first, first + 4)), tuple(range(8))) for first in (0, 4)}
    assert enough_of(copies) == (0,) and enough_of({4: copies[4]}) == (4,) and not missing_ranks([copies[4]])
    halves = {r: Part(1, None, "x", 8, (r, r + 1), (r, r + 1, (r + 4) % 8, (r + 5) % 8)) for r in (0, 2, 4, 6)}
    assert enough_of(halves) == (0, 2) and enough_of({r: halves[r] for r in (2, 4, 6)}) == (2, 4)
    assert missing_ranks([halves[2], halves[6]]) == [0, 1, 4, 5] and missing_ranks([]) == [0]


def test_the_first_rank_may_move_the_directory_once_a_ranks_record_is_there(tmp_path: Path, monkeypatch):
    """A rank that flushed the directory after its record sometimes found it gone, and failed the save."""
    place = StorePlace(0, 1, (0,))
    writer, replace = CheckpointWriter(tmp_path, 1, place, "x"), os.replace
    writer.add_json("a.json", 1)
    writer.make_directory()
    writer.write_files()

    def replace_and_commit(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "rank-0.done.json":
            monkeypatch.undo()
            CheckpointWriter(tmp_path, 1, place, "x").commit(None, lambda: False)

    monkeypatch.setattr(os, "replace", replace_and_commit)
    writer.finish()
    assert steps_of(tmp_path) == [1] and find_problem(tmp_path / "step-1") is None


def needed(retention: Retention, steps: list[int], scores: list[float | None]) -> set[int]:
    """Steps to keep, by definition: each has few enough others before it."""
    scored = [(score, -step) for step, score in zip(steps, scores) if score is not None and abs(score) < float("inf")]
    kept = set()
    for step, score in zip(steps, scores):
        if sum(other > step for other in steps) < retention.keep_last:
            kept.add(step)
        if (score, -step) in scored and sum(other < (score, -step) for other in scored) < retention.keep_best:
            kept.add(step)
        if retention.keep_every and step % retention.keep_every == 0:
            kept.add(step)
    return kept


def test_what_stays_by_a_plain_definition():
    """Of equal scores the later one is better; NaN and infinity do not count."""
    generator = random.Random(0)
    values = [None, float("nan"), float("inf"), 1.0, 1.0, 2.0, 2.5, 3.0]
    for _ in range(2000):
        steps = sorted(generator.sample(range(20), generator.randint(0, 8)))
        scores = [generator.choice(values) for _ in steps]
        retention = Retention(generator.randint(1, 4), generator.randint(0, 4), generator.choice([0, 0, 1, 3, 5]))
        checkpoints = [
            Checkpoint(Path(f"step-{step}"), Part(step, score, str(step), 1, (0,), (0,)))
            for step, score in zip(steps, scores)
        ]
        doomed = {checkpoint.step for checkpoint in doomed_by(retention, checkpoints)}
        assert set(steps) - doomed == needed(retention, steps, scores), (steps, scores, retention)


def test_retention_is_applied_after_each_save(tmp_path: Path):
    """The save thread does it before it writes the next one."""
    saver = new_saver(tmp_path, keep_last=2)
    for step in range(1, 6):
        begin_and_start(saver, step)
        assert saver.settle().problem is None
    saver.wait_for_prune()
    assert sorted(os.listdir(tmp_path)) == ["step-4", "step-5"]
    saver.close()


def test_closing_lets_a_save_finish(tmp_path: Path, gate: threading.Event):
    saver = new_saver(tmp_path)
    begin_and_start(saver, 1, 5.0)
    closing = threading.Thread(target=saver.close)
    closing.start()
    assert steps_of(tmp_path) == []
    gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive() and value_at(tmp_path, 1) == [5.0, 5.0] and find_problem(tmp_path / "step-1") is None


def test_closing_does_not_wait_for_a_rank_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor does a rank that wrote its part and is not the first."""
    monkeypatch.setattr(saving, "_CLOSING_SECONDS", 0.1)
    first, second = (new_saver(tmp_path, rank, 3) for rank in range(2))
    for saver in (first, second):
        begin_and_start(saver, 1)
        closing = threading.Thread(target=saver.close)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()
    assert steps_of(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == [".tmp-step-1-launch-1"]


DISK, ROOM = 48 << 20, 200 << 10
"""Bytes of the disk that gets full, and of its remainder the second time: more than the small files of a checkpoint,
less than its tensors."""


def fill(disk: Path, leave: int) -> None:
    """Fill a disk except for some bytes, with a separate file."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with open(filler, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        file.truncate(file.tell() - leave)


def train_on_a_disk_that_gets_full(flags: list[str], disk: str, copy: str) -> dict:
    """Program of a rank: a run of 36 steps that saves at each sixth. From step 7 on there is no room for tensors, from
    step 13 on for nothing, from step 31 on for everything again."""
    enter_own_mounts()
    mount_small_disk(Path(disk), DISK)
    finish_step = trainer_module.Trainer._finish_step

    def full_meanwhile(self: trainer_module.Trainer, *arguments: object) -> object:
        step = self.progress.step + 1
        if step in (7, 13, 31):
            self.saves.settle()
            if step < 31:
                fill(Path(disk), ROOM if step == 7 else 0)
            else:
                (Path(disk) / "filler").unlink()
        return finish_step(self, *arguments)

    trainer_module.Trainer._finish_step = full_meanwhile
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        code = train_my_ddp.main(flags)
        audited = audit.main([str(out_dir(flags))])
    logging.getLogger().handlers.clear()
    shutil.copytree(out_dir(flags), copy)
    return {"code": code, "audit": audited, "console": console.getvalue()}


@pytest.mark.parametrize("how", ["--async_save", "--no-async_save"])
def test_a_run_survives_a_disk_that_is_full_for_a_while(tiny_run: list[str], tmp_path: Path, how: str):
    """Each failed save gives one warning, and so does the log; its records come later, in order, and prove the run. In
    the end everything is as if nothing had happened."""
    skip_unless_mounting_is_allowed()
    flags = [*tiny_run, "--save_interval=6", "--max_iters=36", "--keep_every=6", how]
    assert train_my_ddp.main(elsewhere(flags, tmp_path / "undisturbed")) == 0
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    (answer,) = run_ranks(1, train_on_a_disk_that_gets_full, elsewhere(flags, disk / "run"), str(disk), str(copy))
    assert answer["code"] == 0 and answer["audit"] == 0, answer["console"]

    run, whole = elsewhere(flags, copy), elsewhere(flags, tmp_path / "undisturbed")
    lines = answer["console"].splitlines()
    failed = [line for line in lines if "could not be written, the run goes on" in line]
    assert [line.split(" could")[0] for line in failed] == [f"the checkpoint of step {n}" for n in (12, 18, 24, 30)]
    assert all("No space left on device" in line for line in failed)
    assert len([line for line in lines if "results cannot be written, and are kept" in line]) == 1
    assert [r["step"] for r in records(run, "save_failed")] == [12, 18, 24, 30]
    assert [r["step"] for r in records(run, "save")] == [6, 36]
    assert [r["step"] for r in records(run, "train")] == list(range(1, 37))
    assert losses(run) == losses(whole)
    assert [r["digest"] for r in records(run, "train")] == [r["digest"] for r in records(whole, "train")]
    assert sorted(os.listdir(copy / "ckpt")) == ["step-36", "step-6"]
    for step in (6, 36):
        assert find_problem(copy / "ckpt" / f"step-{step}") is None
        assert same_bits(final_state(run, step), final_state(whole, step))


def test_a_save_with_no_step_left_to_do_is_waited_for(tiny_run: list[str]):
    """Samples are left out of a run that is at its last step: that is saved, and reported, before the run ends."""
    assert train_my_ddp.main(tiny_run) == 0
    assert train_my_ddp.main([*tiny_run, "--resume", "--resume_at_sample=24", "--lr_schedule=constant"]) == 0
    assert [r["step"] for r in records(tiny_run, "save")] == [4, 4]

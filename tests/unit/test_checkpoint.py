"""Checkpoints are whole or absent; broken ones are named and skipped, unreadable ones kept."""

import builtins
import errno
import io
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from checkpoint import choosing, opening, retention
from checkpoint import folder as ckpt
from checkpoint.choosing import choose_checkpoint
from checkpoint.folder import find_problem, list_checkpoints
from checkpoint.named import Piece, load_named_state
from checkpoint.retention import Retention
from checkpoint.stores import StorePlace, find_place
from checkpoint.writing import CheckpointWriter
from runs.layout import RunPaths
from runs.reslog import ResLog

PLACES = [StorePlace(rank, 2, (0, 1)) for rank in range(2)]


def save(ckpt_dir: Path, step: int, valid_loss: float | None = None) -> Path:
    """A checkpoint as two ranks write it: elements 0..9 of "w" in two pieces."""
    writers = [CheckpointWriter(ckpt_dir, step, place, f"{step}-{valid_loss}") for place in PLACES]
    for rank, writer in enumerate(writers):
        piece = torch.arange(10, dtype=torch.float32).split(5)[rank]
        writer.add_named_state([(Piece.flat("w", (10,), 5 * rank, 5), {"main": piece + step})], holders=[rank])
        if rank == 0:
            writer.add_json(ckpt.TRAINER_STATE, {"step": step})
        writer.make_directory()
        writer.write_files()
        writer.finish()
    return writers[0].commit(valid_loss, lambda: False)


def alone(value: object) -> list:
    return [value]


Refuse = Callable[..., None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """refuse(part of a path, errno, times=None): from now on the system refuses to open, list or stat such paths, so
    many times. Without arguments, it stops refusing."""
    monkeypatch.setattr(ckpt, "_PAUSES", (0.0, 0.0))
    refused: dict[str, list] = {}

    def guarded(call: Callable) -> Callable:
        def refusing(path: object, *arguments: object, **options: object) -> object:
            for part, left in refused.items():
                if part in str(path) and left[1] > 0:
                    left[1] -= 1
                    raise OSError(left[0], os.strerror(left[0]), str(path))
            return call(path, *arguments, **options)

        return refusing

    for module, name in ((builtins, "open"), (io, "open"), (os, "listdir"), (os, "stat"), (os, "scandir")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))

    def start(part: str = "", code: int = 0, times: float = float("inf")) -> None:
        refused.clear()
        if part:
            refused[part] = [code, times]

    return start


READ_ERRORS = pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])


def open_run(out_dir: Path, resume: bool, which: str) -> tuple[choosing.Chosen | None, list[str]]:
    return opening.open_run(out_dir, resume, which, StorePlace(0, 1, (0,)), alone)


def test_a_checkpoint_is_invisible_until_committed(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, 3, StorePlace(0, 1, (0,)), "x")
    writer.add_named_state([(Piece.flat("w", (2,), 0, 2), {"main": torch.ones(2)})], holders=[0])
    writer.make_directory()
    writer.write_files()
    assert list_checkpoints(tmp_path) == []
    writer.finish()
    assert list_checkpoints(tmp_path) == []
    writer.commit(1.5, lambda: False)
    assert [(c.step, c.valid_loss) for c in list_checkpoints(tmp_path)] == [(3, 1.5)]
    assert find_problem(tmp_path / "step-3") is None


def test_commit_waits_for_every_rank(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, 3, PLACES[0], "x")
    writer.make_directory()
    writer.finish()
    asked = []
    assert writer.commit(None, lambda: asked.append(1) or len(asked) == 3) is None
    assert len(asked) == 3 and list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", ["optim-1.safetensors", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str):
    save(tmp_path, 2)
    victim = save(tmp_path, 4) / name
    raw = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[len(raw) // 2] ^= 0x80
        victim.write_bytes(raw)
    else:
        victim.unlink()
    chosen, complaints = choose_checkpoint(tmp_path)
    assert chosen is not None and chosen.step == 2
    assert len(complaints) == 1 and "step-4" in complaints[0]
    assert name in complaints[0] or "manifest" in complaints[0]


def test_a_folder_written_by_one_rank_holds_no_other_ranks_files(tmp_path: Path):
    """Another rank's done-record, caught by the listing, once made whole checkpoints look broken."""
    first, second = (CheckpointWriter(tmp_path, 1, place, "x") for place in PLACES)

    def write_while_the_other_rank_works(directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")
        second.add_json("other.json", {})
        second.make_directory()
        second.write_files()
        second.finish()

    first.add_folder(write_while_the_other_rank_works)
    first.make_directory()
    first.write_files()
    first.finish()
    path = first.commit(None, lambda: False)
    assert find_problem(path) is None
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {"tokenizer.json", "other.json"}


def test_last_and_best(tmp_path: Path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        save(tmp_path, step, loss)
    assert choose_checkpoint(tmp_path, "last")[0].step == 4
    assert choose_checkpoint(tmp_path, "best")[0].step == 2
    assert choose_checkpoint(tmp_path / "none")[0] is None


def test_best_without_a_validation_loss_is_refused_not_restarted(tmp_path: Path):
    """Starting fresh would set the whole run aside."""
    opening.prepare_run(tmp_path)
    save(tmp_path / "ckpt", 2)
    save(tmp_path / "ckpt", 4, float("nan"))
    with pytest.raises(ValueError, match="resume_from=last"):
        open_run(tmp_path, True, "best")
    assert open_run(tmp_path, True, "last")[0].step == 4


def test_a_nan_validation_loss_is_never_the_best(tmp_path: Path):
    for step, loss in enumerate([float("nan"), 1.0, float("nan"), 3.0, 2.0, float("nan"), float("nan")], 1):
        save(tmp_path, step, loss)
    assert choose_checkpoint(tmp_path, "best")[0].step == 2
    retention.prune(tmp_path, Retention())
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 5, 6, 7]


@pytest.mark.parametrize("content", ['{"files": {"x": {}}}', '{"files": []}', "[]", '{"files": {"x": 1}}', ""])
def test_a_manifest_with_holes_is_damaged(tmp_path: Path, content: str):
    save(tmp_path, 2)
    (save(tmp_path, 4) / "manifest.json").write_text(content)
    chosen, complaints = choose_checkpoint(tmp_path)
    assert chosen.step == 2 and "manifest is damaged" in complaints[0]


@pytest.mark.parametrize(("sharded", "covers"), [(True, (0, 1)), (False, (0, 1, 2, 3)), (None, (0, 1, 2, 3))])
def test_manifests_of_earlier_versions_say_whose_state_a_part_holds(
    tmp_path: Path, sharded: bool | None, covers: tuple[int, ...]
):
    path = save(tmp_path, 2) / "manifest.json"
    old = json.loads(path.read_text()) | {"world_size": 4, "sharded": sharded}
    for name in ("sha256", "covers", *(["sharded"] if sharded is None else [])):
        del old[name]
    path.write_text(json.dumps(ckpt.sealed(old)))
    (found,) = ckpt.list_checkpoints(tmp_path)
    assert (found.part.ranks, found.part.covers) == ((0, 1), covers)


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path):
    path = save(tmp_path, 2, 1.25) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        # Only white space between the values may differ.
        if find_problem(path.parent) is None:
            assert json.loads(damaged) == json.loads(content)
    path.write_bytes(content)
    assert find_problem(path.parent) is None


def test_a_run_directory_belongs_to_one_process(tmp_path: Path):
    lock = opening.lock_run(tmp_path)
    with pytest.raises(ValueError, match="another process trains in"):
        opening.lock_run(tmp_path, patience_s=0.2)
    lock.close()
    opening.lock_run(tmp_path).close()


def test_retention_keeps_two_of_each(tmp_path: Path):
    for step, loss in ((1, 1.0), (2, 5.0), (3, 2.0), (4, 3.0), (5, 4.0), (6, None)):
        save(tmp_path, step, loss)
    (tmp_path / ".tmp-step-9-x").mkdir()
    retention.prune(tmp_path, Retention())
    # A save in flight is not touched while the run goes on.
    assert (tmp_path / ".tmp-step-9-x").exists()
    retention.delete_leftovers(tmp_path)
    assert [c.step for c in list_checkpoints(tmp_path)] == [1, 3, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3", "step-5", "step-6"]


def test_resuming_sets_later_checkpoints_aside(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    renamed = retention.abandon_later(tmp_path, 1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    assert len(renamed) == 2 and all(p.name.startswith("abandoned-step-") and p.is_dir() for p in renamed)


def test_a_step_can_be_saved_again(tmp_path: Path):
    save(tmp_path, 2, 1.0)
    save(tmp_path, 2, 0.5)
    assert [(c.step, c.valid_loss) for c in list_checkpoints(tmp_path)] == [(2, 0.5)]


@pytest.mark.parametrize("cuts", [[10], [3, 7], [1, 1, 8], [5, 5]])
def test_state_is_read_however_it_was_cut(tmp_path: Path, cuts: list[int]):
    """Keyed by name and offset: another world size reads the same files."""
    path = save(tmp_path, 2)
    wanted, offset = [], 0
    for cut in cuts:
        wanted.append((Piece.flat("w", (10,), offset, cut), {"main": torch.full((cut,), -1.0)}))
        offset += cut
    load_named_state([path], wanted)
    read = torch.cat([states["main"] for _, states in wanted])
    assert torch.equal(read, torch.arange(10, dtype=torch.float32) + 2)


def test_missing_state_is_named(tmp_path: Path):
    path = save(tmp_path, 2)
    with pytest.raises(ValueError, match="10 of 12 elements of w"):
        load_named_state([path], [(Piece.flat("w", (12,), 0, 12), {"main": torch.zeros(12)})])
    with pytest.raises(ValueError, match="0 of 3 elements of v"):
        load_named_state([path], [(Piece.flat("v", (3,), 0, 3), {"main": torch.zeros(3)})])


def test_resolve_checkpoint_dir(tmp_path: Path):
    with pytest.raises(ValueError, match="neither a run"):
        choosing.resolve_checkpoint_dir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        choosing.resolve_checkpoint_dir(tmp_path / "nothing")
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(ValueError, match="no checkpoint"):
        choosing.resolve_checkpoint_dir(tmp_path)
    path = save(tmp_path / "ckpt", 5)
    assert choosing.resolve_checkpoint_dir(tmp_path) == path
    (path / "config.json").write_text("{}")
    assert choosing.resolve_checkpoint_dir(path) == path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["trainer_state.json"]["sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(ckpt.sealed(manifest)))
    with pytest.raises(ValueError, match="checksum"):
        choosing.resolve_checkpoint_dir(path)


@READ_ERRORS
def test_what_cannot_be_read_is_neither_deleted_nor_taken_for_nothing(tmp_path: Path, refuse: Refuse, code: int):
    opening.prepare_run(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path / "ckpt", step, valid_loss=float(step))
    there = sorted(os.listdir(tmp_path / "ckpt"))
    for part in ("manifest.json", "optim-1.safetensors", "/ckpt"):
        refuse(part, code)
        # It need not be looked at, only be there.
        opening.prepare_run(tmp_path)
        for which in ("last", "best"):
            with pytest.raises(ckpt.Unreadable, match=os.strerror(code)):
                open_run(tmp_path, True, which)
        with pytest.raises((ckpt.Unreadable, ValueError), match=f"{os.strerror(code)}|add --resume"):
            open_run(tmp_path, False, "last")
        refuse("manifest.json", code)
        retention.prune_or_warn(tmp_path / "ckpt", Retention(1, 1), just_saved=3)
        refuse()
        assert sorted(os.listdir(tmp_path / "ckpt")) == there
    assert open_run(tmp_path, True, "last")[0].step == 3


@READ_ERRORS
def test_a_read_error_of_a_moment_costs_nothing(tmp_path: Path, refuse: Refuse, code: int):
    opening.prepare_run(tmp_path)
    for step in (1, 2):
        save(tmp_path / "ckpt", step)
    # Three tries of each, and another look before steps would be repeated.
    for part, times in (("step-2/optim-0", 2), ("step-2/optim-0", 3), ("step-2/manifest.json", 5), ("/ckpt", 2),
                        *(("manifest.json", times) for times in range(1, 16))):  # fmt: skip
        refuse(part, code, times)
        chosen, remarks = open_run(tmp_path, True, "last")
        assert (chosen.step, remarks) == (2, []), part


def test_one_unreadable_checkpoint_is_passed_over_and_two_are_not(tmp_path: Path, refuse: Refuse):
    """Going back further and further does not help with a missing mount."""
    opening.prepare_run(tmp_path)
    home = tmp_path / "ckpt"
    for step in (1, 2, 3):
        save(home, step)
    refuse("step-3/optim-0.safetensors", errno.EIO)
    chosen, (remark,) = open_run(tmp_path, True, "last")
    assert chosen.step == 2 and "step-3 is unreadable and skipped" in remark
    # Another of its files may well be the needed one.
    assert choosing.newest_with(home, "trainer_state.json") == home / "step-3"
    assert choosing.newest_with(home, "optim-0.safetensors") == home / "step-2"
    retention.abandon_later(home, 2)
    refuse("abandoned-step-3", errno.EIO)
    for step in (4, 5, 6):
        save(home, step)
        retention.abandon_later(home, 3)
    retention.prune(home, Retention(2, 0))
    aside = {path.name.rpartition("-")[0] for path in home.glob("abandoned-*")}
    assert aside == {"abandoned-step-3", "abandoned-step-5", "abandoned-step-6"}
    for step in (3, 4):
        save(home, step)
    refuse("safetensors", errno.EIO)
    with pytest.raises(ckpt.Unreadable, match="step-4.*step-3.*move what stays unreadable out of"):
        open_run(tmp_path, True, "last")


def test_a_read_error_on_one_store_stops_all_ranks(tmp_path: Path, refuse: Refuse):
    for node in ("a", "b"):
        opening.prepare_run(tmp_path / node)
    refuse("/b/ckpt", errno.EIO)
    meeting, values = threading.Barrier(2), [None, None]

    def work(rank: int) -> str:
        def gather(value: object) -> list:
            values[rank] = value
            meeting.wait(20)
            gathered = list(values)
            meeting.wait(20)
            return gathered

        try:
            opening.open_run(tmp_path / "ab"[rank], True, "last", StorePlace(rank, 2, (rank,)), gather)
        except ckpt.Unreadable as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        assert [os.strerror(errno.EIO) in answer for answer in pool.map(work, (0, 1))] == [True, True]


@pytest.mark.parametrize("resume", [True, False])
def test_no_fresh_start_where_a_saved_checkpoint_is_missing(tmp_path: Path, resume: bool):
    opening.prepare_run(tmp_path)
    log = ResLog(tmp_path / "reslog.jsonl")
    log.write("start", step=0)
    log.write("train", step=1)
    # Killed before its first save: nothing is missing.
    assert open_run(tmp_path, resume, "last")[0] is None
    log.write("save", step=2, path="step-2")
    with pytest.raises(ValueError, match="holds no checkpoint, but .*reslog.jsonl says that step-2 was saved: bring"):
        open_run(tmp_path, resume, "last")
    log.close()


def test_a_broken_checkpoint_goes_only_when_newer_ones_are_whole(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (1, 3):
        (tmp_path / f"step-{step}" / "manifest.json").write_text("garbage")
    retention.prune(tmp_path, Retention(2, 0))
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 3, 4]


def test_the_one_just_saved_stays(tmp_path: Path):
    """Even if checkpoints with greater numbers are there."""
    for step in (4, 8, 9):
        save(tmp_path, step)
    retention.prune(tmp_path, Retention(2, 0), just_saved=4)
    assert [c.step for c in list_checkpoints(tmp_path)] == [4, 8, 9]
    retention.prune(tmp_path, Retention(2, 0))
    assert [c.step for c in list_checkpoints(tmp_path)] == [8, 9]


def test_what_is_kept_for_good_is_not_deleted_when_it_is_set_aside(tmp_path: Path):
    for step in range(1, 13):
        save(tmp_path, step)
    retention.abandon_later(tmp_path, 3)
    retention.prune(tmp_path, Retention(2, 2, keep_every=5))
    aside = {path.name.rpartition("-")[0] for path in tmp_path.glob("abandoned-*")}
    assert {"abandoned-step-5", "abandoned-step-10"} < aside and len(aside) == 4


def test_between_a_commits_two_renames_the_checkpoint_is_there(tmp_path: Path):
    """A monitor that looks at this moment, or after a death in it, must not take the run for a new one."""
    path = save(tmp_path, 2)
    path.rename(tmp_path / ".replaced-step-2-x")
    assert [(c.step, c.path.name) for c in list_checkpoints(tmp_path)] == [(2, ".replaced-step-2-x")]
    assert choose_checkpoint(tmp_path)[0].step == 2
    save(tmp_path, 2)
    assert [c.path.name for c in list_checkpoints(tmp_path)] == ["step-2"]
    (tmp_path / "step-2" / "manifest.json").write_text("garbage")
    retention.delete_leftovers(tmp_path)
    assert find_problem(tmp_path / "step-2") is None, "the whole one of the two is what stays"
    assert [path.name.rpartition("-")[0] for path in tmp_path.glob("*step-2-*")] == ["abandoned-step-2"]


def test_a_lock_that_is_let_go_of_in_time_is_taken(tmp_path: Path):
    """A prune, or a dying rank."""
    lock = opening.lock_run(tmp_path)
    threading.Timer(0.2, lock.close).start()
    opening.lock_run(tmp_path, patience_s=20).close()


@pytest.mark.parametrize("before", [["lost+found"], ["ckpt"], ["exit", "stop"], [".snapshot", "monitor", ".nfs0001"]])
def test_a_directory_that_holds_nothing_of_others_is_taken(tmp_path: Path, before: list[str]):
    for name in before:
        (tmp_path / name).mkdir()
    opening.prepare_run(tmp_path)
    assert RunPaths(tmp_path).mark.exists()


def test_the_mark_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after any of its steps, the next start finds its own directory again."""
    made: list[str] = []
    mkdir = Path.mkdir

    def note(self: Path, *arguments: object, **options: object) -> None:
        made.append(self.name)
        assert self.name != "ckpt" or RunPaths(tmp_path / "run").mark.exists()
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", note)
    opening.prepare_run(tmp_path / "run")
    assert made[-1] == "ckpt"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other things than a run"):
        opening.prepare_run(tmp_path / "other")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_a_directory_that_cannot_be_written_now_is_not_a_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def refuse_to_make(self: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse_to_make)
    monkeypatch.setattr(Path, "touch", refuse_to_make)
    with pytest.raises(OSError, match=os.strerror(code)):
        opening.prepare_run(tmp_path / "run")
    with pytest.raises(OSError, match=os.strerror(code)):
        find_place(tmp_path / "run", 0, 1, alone)


@pytest.mark.parametrize(
    "asked, remark",
    [("out/mien", "; if out/mine was meant, stop this run and give --out_dir=out/mine"),
     ("uot/mine", "; if out/mine was meant, stop this run and give --out_dir=out/mine"),
     ("out/another", "; runs beside it that can be resumed: out/base, out/mine"), ("elsewhere/run", ""),
     ("mien", "")],
)  # fmt: skip
def test_resume_in_a_mistyped_directory_names_the_run_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, remark: str
):
    """It still starts fresh, because launchers always give --resume."""
    for run in ("out/mine", "out/base"):
        (tmp_path / run / "ckpt" / "step-6").mkdir(parents=True)
    (tmp_path / "out" / "mise" / "ckpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    opening.prepare_run(Path(asked))
    assert open_run(Path(asked), True, "last") == (None, [f"no checkpoint in {asked}: starting fresh{remark}"])


@pytest.mark.parametrize("given", ["out", "out/mine/ckpt"])
def test_a_folder_around_a_run_or_in_it_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str):
    (tmp_path / "out" / "empty").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "ckpt" / "step-6").mkdir(parents=True)
    RunPaths(tmp_path / "out" / "mine").mark.touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"nor a Hugging Face folder: did you mean out/mine\?$"):
        choosing.resolve_checkpoint_dir(Path(given))

"""`python -m checkpoint`: its report on a run's checkpoints, and its deletions."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch

from checkpoint import choosing, opening
from checkpoint import folder as ckpt
from checkpoint.command import main
from checkpoint.named import Piece
from checkpoint.stores import StorePlace
from checkpoint.writing import CheckpointWriter

ALONE = StorePlace(0, 1, (0,))


def save(run: Path, step: int, valid_loss: float | None = None, place: StorePlace = ALONE) -> Path:
    writer = CheckpointWriter(run / "ckpt", step, place, f"id-{step}")
    writer.add_named_state(
        [(Piece.flat("w", (25_000,), 0, 25_000), {"main": torch.zeros(25_000)})],
        holders=place.store,
    )
    writer.add_json("config.json", {})
    writer.make_directory()
    writer.write_files()
    writer.finish()
    return writer.commit(valid_loss, lambda: False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2 to 8, the second of them the best."""
    home = tmp_path / "run"
    opening.prepare_run(home)
    for step, loss in ((2, 3.0), (4, 1.25), (6, None), (8, 2.0)):
        save(home, step, loss)
    return home


def names(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines()]


def steps_of(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in ckpt.list_checkpoints(run / "ckpt")]


def edit_manifest(path: Path, **values: object) -> None:
    manifest = json.loads((path / ckpt.MANIFEST).read_text()) | values
    manifest.pop("sha256", None)
    (path / ckpt.MANIFEST).write_text(json.dumps(ckpt.sealed(manifest)))


def test_ls(run: Path, capsys: pytest.CaptureFixture):
    """One line each, by rising step: name, size, loss, age, ranks."""
    for path, seconds in zip(sorted((run / "ckpt").iterdir()), (2 * 86400, 3 * 3600, 180, 5)):
        edit_manifest(path, saved_at=time.time() - seconds)
    assert main(["ls", str(run)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split() for line in lines] == [
        ["step-2", "0.1", "MB", "valid", "loss", "3.0000", "2.0", "days", "ago", "1", "rank"],
        ["step-4", "0.1", "MB", "valid", "loss", "1.2500", "3.0", "h", "ago", "1", "rank"],
        ["step-6", "0.1", "MB", "valid", "loss", "-", "3", "min", "ago", "1", "rank"],
        ["step-8", "0.1", "MB", "valid", "loss", "2.0000", "5", "s", "ago", "1", "rank"],
    ]
    assert len({line.index("valid") for line in lines}) == 1 and captured.err == ""


def test_ls_says_which_ranks_a_node_holds(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "ckpt").mkdir()
    save(tmp_path, 1, place=StorePlace(2, 4, (2,)))
    save(tmp_path, 2)
    assert main(["ls", str(tmp_path)]) == 0
    assert [line.rsplit("  ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["1 of 4 ranks", "1 rank"]


def test_ls_leaves_out_what_is_no_checkpoint(run: Path, capsys: pytest.CaptureFixture):
    for name in (".tmp-step-9-x", ".old-step-1", ".fetched-step-3", "abandoned-step-5-170", "step-x"):
        (run / "ckpt" / name).mkdir()
    (run / "ckpt" / "step-7").touch()
    assert main(["ls", str(run)]) == 0
    assert names(capsys.readouterr().out) == ["step-2", "step-4", "step-6", "step-8"]


def test_manifests_of_earlier_versions(run: Path, capsys: pytest.CaptureFixture):
    """They do not say who wrote them and when; files and losses count as usual."""
    for path in (run / "ckpt").iterdir():
        manifest = json.loads((path / ckpt.MANIFEST).read_text())
        old = {key: manifest[key] for key in ("step", "valid_loss", "files")}
        (path / ckpt.MANIFEST).write_text(json.dumps(old))
    assert main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step-4 +0\.1 MB  valid loss +1\.2500 +-  .*", lines[1]), lines
    assert main(["verify", str(run)]) == 0
    assert all(line.endswith("  ok") for line in capsys.readouterr().out.splitlines())
    assert main(["prune", str(run), "--keep_last=1", "--keep_best=1"]) == 0
    assert steps_of(run) == [4, 8]


def test_verify(run: Path, capsys: pytest.CaptureFixture):
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.endswith("  ok") for line in lines)


DAMAGES = {
    "flip": "optim-0.safetensors does not match its checksum",
    "truncate": "optim-0.safetensors holds 50000 bytes instead of ",
    "remove": "optim-0.safetensors is missing",
    "manifest removed": "it has no manifest",
    "manifest torn": "its manifest is damaged",
    "manifest empty": "its manifest is damaged",
    "manifest null": "its manifest is damaged",
}


def damage(path: Path, how: str) -> None:
    victim = path / (ckpt.MANIFEST if how.startswith("manifest") else "optim-0.safetensors")
    content = bytearray(victim.read_bytes())
    if how.endswith(("remove", "removed")):
        victim.unlink()
    elif how == "manifest null":
        victim.write_text("null")
    elif how == "flip":
        content[60_000] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: {"truncate": 50_000, "manifest torn": 30, "manifest empty": 0}[how]])


@pytest.mark.parametrize("how", DAMAGES)
def test_verify_names_what_is_broken(run: Path, capsys: pytest.CaptureFixture, how: str):
    damage(run / "ckpt" / "step-6", how)
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("  ok") for line in lines] == [True, True, False, True]
    assert f"  BROKEN: {DAMAGES[how]}" in lines[2] and lines[2].startswith("step-6 ")
    # A broken checkpoint is not a failure of `ls`.
    assert main(["ls", str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_prune(run: Path, capsys: pytest.CaptureFixture):
    """Two of each by default; leftovers go, too, and checkpoints that were set aside stay."""
    save(run, 10, 2.5)
    (run / "ckpt" / ".tmp-step-11-x").mkdir()
    (run / "ckpt" / "abandoned-step-5-170").mkdir()
    assert main(["prune", str(run)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["deleting", "step-2"], ["deleting", "step-6"]]
    assert lines[-1] == "3 of 5 checkpoints stay" and captured.err == ""
    assert sorted(os.listdir(run / "ckpt")) == ["abandoned-step-5-170", "step-10", "step-4", "step-8"]
    assert main(["verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["prune", str(run)]) == 0
    assert capsys.readouterr().out == "3 of 3 checkpoints stay\n"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--keep_last=1", "--keep_best=0"], [8]),
        (["--keep_last=1", "--keep_best=1"], [4, 8]),
        (["--keep_last=1", "--keep_best=9"], [2, 4, 8]),
        (["--keep_last=1", "--keep_best=0", "--keep_every=3"], [6, 8]),
        (["--keep_last=3", "--keep_best=0"], [4, 6, 8]),
        (["--keep_last=4", "--keep_best=0"], [2, 4, 6, 8]),
        (["--keep_last=5", "--keep_best=0"], [2, 4, 6, 8]),
        (["--keep_last=100", "--keep_best=0"], [2, 4, 6, 8]),
    ],
)
def test_what_prune_keeps(run: Path, capsys: pytest.CaptureFixture, flags: list[str], kept: list[int]):
    """--dry_run names the same ones and deletes nothing, not even leftovers."""
    (run / "ckpt" / ".tmp-step-11-x").mkdir()
    before = sorted(os.listdir(run / "ckpt"))
    assert main(["prune", str(run), "--dry_run", *flags]) == 0
    foretold = capsys.readouterr().out
    assert sorted(os.listdir(run / "ckpt")) == before and not (run / ".lock").exists()
    assert main(["prune", str(run), *flags]) == 0
    assert steps_of(run) == kept and not (run / "ckpt" / ".tmp-step-11-x").exists()
    done = capsys.readouterr().out
    assert foretold.replace("would delete", "deleting") == done
    assert done.endswith(f"{len(kept)} of 4 checkpoints stay\n") and done.count("deleting") == 4 - len(kept)


def test_prune_does_not_keep_a_broken_one_for_a_whole_one(run: Path):
    """The newest has lost its manifest: if it were the last one to keep, it would be all that is left."""
    damage(run / "ckpt" / "step-8", "manifest removed")
    assert main(["prune", str(run), "--keep_last=1", "--keep_best=0"]) == 0
    chosen, _ = choosing.choose_checkpoint(run / "ckpt")
    assert chosen is not None and chosen.step == 6


def test_a_run_that_trains_is_not_pruned(run: Path, capsys: pytest.CaptureFixture):
    """Nor does the command claim a deletion; looking is allowed."""
    lock = opening.lock_run(run)
    assert main(["prune", str(run), "--keep_last=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("checkpoint: another process trains in ") and len(captured.err.splitlines()) == 1
    assert steps_of(run) == [2, 4, 6, 8]
    assert "deleting" not in captured.out
    for command in (["ls"], ["verify"], ["prune", "--dry_run", "--keep_last=1"]):
        assert main([command[0], str(run), *command[1:]]) == 0
    lock.close()
    assert main(["prune", str(run), "--keep_last=1", "--keep_best=0"]) == 0
    assert steps_of(run) == [8]


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, command: str):
    reasons = {"nothing": "does not exist", "": "is not a run directory: it has no ckpt folder"}
    for name, why in reasons.items():
        assert main([command, str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert captured.err == f"checkpoint: {tmp_path / name} {why}\n" and not captured.out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("command", "code"), [("ls", 2), ("verify", 2), ("prune", 0)])
def test_a_run_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture, command: str, code: int):
    opening.prepare_run(tmp_path)
    assert main([command, str(tmp_path)]) == code
    captured = capsys.readouterr()
    expected = ("", f"checkpoint: {tmp_path} holds no checkpoint yet\n") if code else ("0 of 0 checkpoints stay\n", "")
    assert (captured.out, captured.err) == expected


@pytest.mark.parametrize("flag", ["--keep_last=0", "--keep_last=-1", "--keep_best=-1", "--keep_every=-2"])
def test_flags_that_would_delete_everything_are_refused(run: Path, capsys: pytest.CaptureFixture, flag: str):
    assert main(["prune", str(run), flag]) == 2
    name, _, value = flag.partition("=")
    assert f"{name} must be at least {int(name == '--keep_last')}, got {value}" in capsys.readouterr().err
    assert steps_of(run) == [2, 4, 6, 8]

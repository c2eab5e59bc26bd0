"""The audit accepts a run only if it read each of its samples once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import train_my_ddp
from data_preprocess.build_pretrain_sample_index_map import build
from dataset.audit import main as audit
from dataset.order import sample_at
from dataset.pretrain import PretrainDataset
from tests.conftest import SEQ_LEN
from tests.runs import out_dir, records


@pytest.fixture
def finished(tiny_run: list[str]) -> list[str]:
    assert train_my_ddp.main([*tiny_run, "--save_interval=2"]) == 0
    return tiny_run


def edit_log(flags: list[str], change: Callable[[list[dict]], object]) -> None:
    """Rewrite the log with the records changed by `change`."""
    path = out_dir(flags) / "reslog.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def steps_of(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["name"] == "train"]


def test_a_finished_run_is_proven(finished: list[str], capsys):
    assert audit([str(out_dir(finished))]) == 0
    printed = capsys.readouterr().out
    assert "4 steps, 16 samples, 1 launches (processes: 1)" in printed
    assert "every position was taken once, in order, and the digests of all 4 records agree" in printed


def test_steps_between_two_records_are_counted(tiny_run: list[str], capsys):
    assert train_my_ddp.main([*tiny_run, "--log_interval=3"]) == 0
    assert [record["step"] for record in records(tiny_run, "train")] == [3, 4]
    assert audit([str(out_dir(tiny_run))]) == 0
    assert "4 steps, 16 samples" in capsys.readouterr().out


def test_a_crash_and_a_resume(finished: list[str], capsys):
    """Steps 3 and 4 are lost with their checkpoint, and repeated by the next launch."""
    shutil.rmtree(out_dir(finished) / "ckpt" / "step-4")
    assert train_my_ddp.main([*finished, "--resume", "--max_iters=6"]) == 0
    assert [start["step"] for start in records(finished, "start")] == [0, 2]
    assert audit([str(out_dir(finished))]) == 0
    printed = capsys.readouterr().out
    assert "6 steps, 24 samples, 2 launches (processes: 1, 1)" in printed


def test_another_stream_begins_a_segment(finished: list[str], data_dir: Path, tmp_path: Path, capsys):
    """--restart_data makes two segments, each of which is checked against its own data."""
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    build(copy, SEQ_LEN // 2)
    more = ["--resume", "--restart_data", "--max_iters=6", f"--data_dir={copy}", f"--max_seq_len={SEQ_LEN // 2}"]
    assert train_my_ddp.main([*finished, *more]) == 0
    run = str(out_dir(finished))
    capsys.readouterr()
    assert audit([run, "--data_dir", str(data_dir)]) == 0
    assert "from step 4: seed 1337" in capsys.readouterr().out
    # The copy has both lengths.
    assert audit([run]) == 0
    (copy / f"train-{SEQ_LEN}.ibin").unlink()
    capsys.readouterr()
    assert audit([run]) == 2
    complaint = capsys.readouterr().err
    assert "name its directory with --data_dir" in complaint and complaint.count("\n") == 1


def one_sample_twice(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    ids = sample_at(seed, positions, num_samples)
    ids[1] = ids[0]
    return ids


def the_next_epoch(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    return sample_at(seed, positions + num_samples, num_samples)


@pytest.mark.parametrize("order", [one_sample_twice, the_next_epoch])
def test_a_loader_that_reads_other_samples(tiny_run: list[str], order: Callable, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(PretrainDataset, "ids_at", lambda self, seed, positions: order(seed, positions, len(self)))
        assert train_my_ddp.main(tiny_run) == 0
    assert audit([str(out_dir(tiny_run))]) == 1
    assert "WRONG step 1: the digest" in capsys.readouterr().out


def test_a_loader_that_reads_other_tokens(tiny_run: list[str], monkeypatch, capsys):
    """The samples are right, but one token of one row is not."""
    read_rows = PretrainDataset.read_rows

    def damaged(self: PretrainDataset, sample_ids: np.ndarray) -> np.ndarray:
        rows = read_rows(self, sample_ids)
        rows[-1, 5] ^= 1
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(PretrainDataset, "read_rows", damaged)
        assert train_my_ddp.main(tiny_run) == 0
    assert audit([str(out_dir(tiny_run))]) == 1
    assert capsys.readouterr().out.count("WRONG") == 4


def drop_a_step(lines: list[dict]) -> None:
    lines.remove(steps_of(lines)[1])


def take_a_step_twice(lines: list[dict]) -> None:
    steps = steps_of(lines)
    steps[2]["samples"], steps[2]["digest"] = steps[1]["samples"], steps[1]["digest"]


def take_too_few(lines: list[dict]) -> None:
    for number, step in enumerate(steps_of(lines)):
        step["samples"] = [3 * number, 3 * number + 2]


def start_elsewhere(lines: list[dict]) -> None:
    lines[0]["samples_consumed"] = 4


@pytest.mark.parametrize(
    "change, finding",
    [
        (drop_a_step, "step 3: begins at position 8 of the stream where 4 was due: 4 positions skipped"),
        (take_a_step_twice, "step 3: begins at position 4 of the stream where 8 was due: 4 positions repeated"),
        (take_too_few, "step 1: took 3 positions since step 0, where 4 were due"),
        (start_elsewhere, "launch 1 begins at position 4 of the stream, where 0 was due"),
    ],
)
def test_a_log_that_does_not_add_up(finished: list[str], change: Callable, finding: str, capsys):
    edit_log(finished, change)
    assert audit([str(out_dir(finished))]) == 1
    assert f"WRONG {finding}" in capsys.readouterr().out


def test_a_resume_that_skips(finished: list[str], capsys):
    """As if the second launch had not started at its checkpoint."""
    assert train_my_ddp.main([*finished, "--resume", "--max_iters=6"]) == 0

    def change(lines: list[dict]) -> None:
        launch = [line for line in lines if line["name"] == "start"][1]
        launch["samples_consumed"] += 4
        for line in steps_of(lines)[4:]:
            line["samples"] = [position + 4 for position in line["samples"]]

    edit_log(finished, change)
    assert audit([str(out_dir(finished))]) == 1
    assert "launch 2 begins at position 20 of the stream, where 16 was due" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", '{"name": "start", "step": 0}\n', '{"name": "train", "step": 1}\n'])
def test_what_cannot_be_checked(finished: list[str], content: str | None, capsys):
    path = out_dir(finished) / "reslog.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert audit([str(out_dir(finished))]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("audit: ") and complaint.count("\n") == 1

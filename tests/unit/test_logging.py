"""Output of the console and the log files, and a run's summary."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import train_my_ddp
import training.trainer as trainer_module
from checkpoint.retention import Retention
from configurator import parse_config
from model import flops
from runs.layout import RunPaths
from tests.runs import elsewhere, out_dir, records
from training.meter import StepMeter
from training.report import shown
from training.summary import RunEnd, summary_lines
from utils.logging import add_log_file, log_repeated_warnings, setup_console

logger = logging.getLogger("test")


@pytest.fixture(autouse=True)
def _own_warnings() -> Iterator[None]:
    """Give `warnings` back to pytest, so that the next test does not find them captured."""
    yield
    logging.captureWarnings(False)


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


def repeats() -> list[str]:
    lines: list[str] = []
    log_repeated_warnings(lines.append)
    return lines


def test_a_warning_is_shown_once_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    setup_console(0)
    add_log_file(tmp_path / "train.log", 0)
    for number in (1, 2, 1, 1, 1):
        logger.warning("disk %d is slow", number)
    logger.info("a line")
    logger.info("a line")
    assert capsys.readouterr().out.splitlines() == ["disk 1 is slow", "disk 2 is slow", "a line", "a line"]
    written = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition(" rank 0 ")[2] for line in written] == [
        "WARNING disk 1 is slow", "WARNING disk 2 is slow", "INFO a line", "INFO a line",
    ]  # fmt: skip
    assert repeats() == ["3 more warnings like: disk 1 is slow"]
    assert repeats() == []
    # Repeats stay suppressed.
    logger.warning("disk 2 is slow")
    assert capsys.readouterr().out == ""


def test_errors_are_never_held_back(capsys: pytest.CaptureFixture):
    setup_console(0)
    logger.error("it broke")
    logger.error("it broke")
    assert capsys.readouterr().out == "it broke\nit broke\n"


def test_what_libraries_warn_of_is_a_warning_like_others(capsys: pytest.CaptureFixture):
    setup_console(2)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # As in a separate process; pytest replaces the module's function here.
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        for _ in range(2):
            warnings.warn("old name", UserWarning, stacklevel=1)
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith("rank 2: ") and line.endswith("UserWarning: old name") and err == ""
    assert repeats()[0].startswith("1 more warning like: ")


def test_torch_has_warnings_for_users_and_nothing_else(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """At its end a stopped run used to mention caches of torch's compiler."""
    setup_console(0)
    # Torch's own logging, once set up, takes everything.
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    inner = logging.getLogger("torch.inner")
    monkeypatch.setattr(inner, "level", logging.NOTSET)
    monkeypatch.setattr(logging.getLogger("torch"), "level", logging.NOTSET)
    inner.info("FakeTensor cache stats:")
    inner.warning("something is wrong")
    assert capsys.readouterr().out == "something is wrong\n"


def test_the_memory_for_repeats_is_bounded_and_nothing_is_swallowed(capsys: pytest.CaptureFixture):
    setup_console(0)
    for number in range(1500):
        logger.warning("number %d", number)
    long = "x" * 5000
    for _ in range(2):
        logger.warning(long)
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"number {number}" for number in range(1500)] + [long, long]
    for number in range(6):
        logger.warning("number %d", number)
    logger.warning("number 5")
    lines = repeats()
    assert lines[0] == "2 more warnings like: number 5" and len(lines) == 4
    assert lines[-1] == "3 more repeats of other warnings"


@pytest.mark.parametrize(("info", "lines"), [(True, ["INFO here", "WARNING there"]), (False, ["WARNING there"])])
def test_other_ranks_say_who_they_are(tmp_path: Path, capsys: pytest.CaptureFixture, info: bool, lines: list[str]):
    setup_console(3)
    add_log_file(tmp_path / "train.log", 3, info)
    logger.info("here")
    logger.warning("there")
    assert capsys.readouterr().out == "rank 3: there\n"
    written = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition(" rank 3 ")[2] for line in written] == lines


def test_nodes_that_share_a_directory_have_a_file_each(tmp_path: Path):
    assert RunPaths(tmp_path).log_of_node(0, 0) == tmp_path / "train.log"
    assert RunPaths(tmp_path).log_of_node(2, 0) == tmp_path / "train-node-2.log"
    # With a separate file system, a node is the first one there.
    assert RunPaths(tmp_path).log_of_node(2, 2) == tmp_path / "train.log"


@pytest.mark.parametrize("value", ["", "some", "0,", "-1", "0:3", "1.5", "0,a"])
def test_wrong_log_ranks_are_refused(value: str):
    with pytest.raises(ValueError, match='log_ranks must be "all" or ranks separated by commas'):
        parse_config(["--data_dir=d", f"--log_ranks={value}"])


def step_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("step ")]


def test_the_progress_line_is_short_and_says_when_data_is_late(
    tiny_run: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, quick_start: None
):
    original = StepMeter.read

    def read(self) -> dict:
        reading = original(self)
        return reading | {"data_wait": reading["dt"] * (0.5 if reading["samples"][0] else 0.01)}

    monkeypatch.setattr(StepMeter, "read", read)
    assert train_my_ddp.main([*tiny_run, "--max_iters=2"]) == 0
    first, second = step_lines(capsys.readouterr().out)
    for line in (first, second):
        assert len(line) <= 110 and line.endswith(" left") and "seed formula" not in line
        assert [word for word in ("loss ", "norm ", "lr ", "tokens/s", "MFU ") if word not in line] == []
    assert "data wait" not in first and "data wait 50%" in second
    assert all("mfu_seed" in record for record in records(tiny_run, "train"))


def test_a_preference_line_fits_too():
    figures = {"loss": 0.6931, "rewards/margins": -12.25, "rewards/accuracies": 0.5, "rewards/chosen": 1.0}
    assert shown(figures) == "loss 0.6931 | margin -12.250 | accuracy 0.50"


def test_a_run_ends_with_where_everything_is(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, quick_start: None
):
    assert train_my_ddp.main([*tiny_run, "--valid_interval=2", "--learning_rate=0.5", "--lr_schedule=constant"]) == 0
    home, printed = out_dir(tiny_run), capsys.readouterr().out.splitlines()
    ending = printed[next(i for i, line in enumerate(printed) if line.startswith("finished at step 4 of 4: ")) :]
    assert "4 steps in 0:" in ending[0] and f"{records(tiny_run, 'train')[-1]['tokens']:,} tokens" in ending[0]
    valid = {record["step"]: record["loss"] for record in records(tiny_run, "valid")}
    train_loss = records(tiny_run, "train")[-1]["loss"]
    best = min(valid, key=valid.get)
    lowest = f" (lowest {valid[best]:.4f} at step {best})" if best != 4 else ""
    assert ending[1] == f"loss: {train_loss:.4f} in the last step, {valid[4]:.4f} in validation at step 4{lowest}"
    newest = f"{home}/ckpt/step-4 (newest)" if lowest else f"{home}/ckpt/step-4 (newest and best)"
    assert ending[2] == f"checkpoints: {newest}" + (f", {home}/ckpt/step-{best} (best)" if lowest else "")
    assert ending[3:] == [
        f"results: {home}/reslog.jsonl, log: {home}/train.log",
        f'complete a text: python generate.py --model {home} --prompt "..."',
        f"see its curves: python -m utils.resplot {home}",
    ]
    log = [line.partition(" rank 0 INFO ")[2] for line in (home / "train.log").read_text().splitlines()]
    assert log[-len(ending) :] == ending
    start = records(tiny_run, "start")[0]
    assert (start["version"], start["max_iters"]) == (1, 4)

    stopped = elsewhere(tiny_run, tmp_path / "stopped")
    step = trainer_module.Trainer._step

    def ask_to_stop(self) -> bool:
        self.stopping.request.requested = self.progress.step == 2
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_step", ask_to_stop)
        assert train_my_ddp.main(stopped) == 75
    ending = capsys.readouterr().out.splitlines()[-7:]
    assert ending[0].startswith("stopped on request at step 2 of 4: 2 steps in ")
    assert ending[-3] == f"go on: python train_my_ddp.py --resume --out_dir={tmp_path / 'stopped'}"
    assert train_my_ddp.main(ending[-3].split()[4:]) == 0


def test_the_summary_of_a_run_without_validation(tmp_path: Path):
    (tmp_path / "reslog.jsonl").write_text('{"name": "valid", "time": 1, "step": 3, "loss": "nan"}\n')
    ending = RunEnd(
        tmp_path, True, 5, 5, 1, 3725.0, 1234567, None, True, True, "-", Retention()
    )  # fmt: skip
    lines = list(summary_lines(ending))
    assert lines[0] == "finished at step 5 of 5: 1 step in 1:02:05, 1,234,567 tokens in the whole run"
    assert lines[1] == "loss: nan in validation at step 3"
    assert f"talk to it: python generate.py --model {tmp_path} --chat --load_in_4bit" in lines
    assert not any(line.startswith(("checkpoints", "go on")) for line in lines)

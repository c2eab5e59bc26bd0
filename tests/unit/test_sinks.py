"""Results in TensorBoard and Weights & Biases, whose failures must not harm the run."""

import json
import sys
import threading
import types
from pathlib import Path

import pytest

from runs.reslog import ResLog, read_reslog
from runs.sinks import Sinks, TensorBoard, WeightsAndBiases, check_sinks, open_sinks, scalars


class Kept:
    def __init__(self):
        self.records, self.closed = [], False

    def write(self, record: dict) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_a_sink_gets_every_record_that_the_log_gets(tmp_path: Path):
    kept = Kept()
    log = ResLog(tmp_path / "reslog.jsonl", Sinks({"kept": lambda: kept}))
    log.write("start", step=0)
    log.write("train", step=1, loss=float("nan"))
    log.close()
    assert kept.records == read_reslog(tmp_path / "reslog.jsonl") and kept.closed
    assert kept.records[1]["loss"] == "nan"


def test_scalars_are_the_numbers_of_a_record():
    record = {"name": "train", "time": 1.0, "step": 3, "loss": 2.5, "lr": "inf", "samples": [1, 2], "digest": "ab",
              "fine": True, "tokens": 7}  # fmt: skip
    assert scalars(record) == {"loss": 2.5, "lr": float("inf"), "tokens": 7.0}
    assert scalars({"name": "start", "time": 1.0, "step": 3, "world_size": 2}) == {}
    assert scalars({"name": "other", "time": 1.0, "x": 1.0}) == {}


@pytest.mark.parametrize("where", ["make", "write", "close"])
def test_a_failing_sink_warns_once_and_the_others_go_on(where: str, tmp_path: Path, caplog):
    class Failing(Kept):
        def __init__(self):
            super().__init__()
            self.fail("make")

        def fail(self, at: str) -> None:
            if at == where:
                raise KeyError("no such thing")

        def write(self, record: dict) -> None:
            self.fail("write")

        def close(self) -> None:
            self.fail("close")

    kept = Kept()
    log = ResLog(tmp_path / "reslog.jsonl", Sinks({"first": Failing, "kept": lambda: kept}))
    for step in range(3):
        log.write("train", step=step, loss=1.0)
    log.close()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "results go to first no more" in warnings[0] and "KeyError" in warnings[0]
    assert len(kept.records) == 3 and kept.closed
    assert len(read_reslog(tmp_path / "reslog.jsonl")) == 3


def test_a_sink_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr("runs.sinks._MOST_QUEUED", 5)
    monkeypatch.setattr("runs.sinks._PATIENCE_S", 0.05)
    release = threading.Event()

    class Hanging(Kept):
        def write(self, record: dict) -> None:
            release.wait()

    log = ResLog(tmp_path / "reslog.jsonl", Sinks({"slow": Hanging}))
    for step in range(20):
        log.write("train", step=step, loss=1.0)
    log.close()
    release.set()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and "cannot keep up" in warnings[0] and "did not finish in time" in warnings[1]
    assert len(read_reslog(tmp_path / "reslog.jsonl")) == 20


def test_tensorboard_shows_a_resumed_run_without_the_steps_that_were_lost(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install -r requirements-loggers.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "reslog.jsonl"
    for begins, steps, loss in ((0, (1, 2, 3), 5.0), (2, (3, 4), 4.0)):
        log = ResLog(path, Sinks({"TensorBoard": lambda begins=begins: TensorBoard(tmp_path, begins)}))
        log.write("start", step=begins)
        for step in steps:
            log.write("train", step=step, loss=loss)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0)]


def test_each_launch_sends_weights_and_biases_what_stands(tmp_path: Path, monkeypatch):
    """Uses a stand-in: the real service needs a network, or seconds to start."""
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished, self.metrics = options, [], False, []
            runs.append(self)

        def define_metric(self, *names: str, **options: str) -> None:
            self.metrics.append((names, options))

        def log(self, values: dict) -> None:
            self.logged.append(json.loads(json.dumps(values)))

        def finish(self) -> None:
            self.finished = True

    fake = types.SimpleNamespace(init=lambda **options: Run(**options), Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    standing = [{"name": "start", "time": 1.0, "step": 0}, {"name": "train", "time": 2.0, "step": 1, "loss": 3.0}]
    sink = WeightsAndBiases(tmp_path / "mine", "project", "offline", 2, {"seed": 1}, standing)
    sink.write({"name": "train", "time": 3.0, "step": 2, "loss": 2.0, "samples": [0, 1]})
    sink.close()
    (run,) = runs
    assert run.options["project"] == "project" and run.options["group"] == "mine" and run.options["mode"] == "offline"
    assert run.options["name"] == "mine, launch 2" and run.options["config"] == {"seed": 1}
    assert run.logged == [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}] and run.finished
    assert (("*",), {"step_metric": "step"}) in run.metrics


def test_a_launch_hands_on_what_stands_of_those_before_it(tmp_path: Path, monkeypatch):
    log = ResLog(tmp_path / "reslog.jsonl")
    log.write("start", step=0)
    for step in (1, 2, 3):
        log.write("train", step=step, loss=float(step))
    log.close()
    made = []
    monkeypatch.setattr("runs.sinks.WeightsAndBiases", lambda *values: made.append(values) or Kept())
    open_sinks(tmp_path, 2, False, "mine", "offline", {"seed": 1}).close()
    ((run_dir, project, mode, attempt, settings, standing),) = made
    assert (run_dir, project, mode, attempt, settings) == (tmp_path, "mine", "offline", 2, {"seed": 1})
    assert [r["step"] for r in standing if r["name"] == "train"] == [1, 2]
    assert open_sinks(tmp_path, 2, False, "", "online", {}) is None


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_sinks(False, "")
    with pytest.raises(ValueError, match=r"--tensorboard needs the package tensorboard: pip install"):
        check_sinks(True, "")
    with pytest.raises(ValueError, match=r"--wandb_project needs the package wandb"):
        check_sinks(False, "mine")

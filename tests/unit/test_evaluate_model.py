"""The command evaluate_model.py: what it refuses, what it leaves, and that a killed evaluation goes on."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import evaluate_model
from evaluation import answering, arguments
from evaluation.asking import Score, Scoring
from evaluation.folder import EvaluationFolder, place_of
from evaluation.progress import Progress, duration
from evaluation.results import Figure, TaskResult, read_results
from evaluation.table import figures_of, table_of
from evaluation.task import Outcome
from runs.layout import RUN_MARK, RunPaths
from tests.plain_answerer import Guesser
from tests.served import tiny_tokenizer, write_checkpoint, write_model
from utils.terminal import INTERRUPTED

TASKS = ("--tasks", "zero_copying,zero_arithmetic", "--limit", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer(), context=128)


def call(model: Path, *flags: str) -> int:
    return evaluate_model.main(["--model", str(model), "--device", "cpu", *flags])


def test_figures_samples_and_answers_are_kept_and_asked_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert call(folder, *TASKS, "--output_dir", str(tmp_path)) == 0
    table = capsys.readouterr().out
    results = read_results(tmp_path)
    assert [*results.tasks] == ["zero_copying", "zero_arithmetic"] and all(name in table for name in results.tasks)
    assert results.model["path"] == str(folder) and results.model["dtype"] == "float32"
    assert results.commands == (
        f"python evaluate_model.py --model {folder} --device cpu --tasks zero_copying,zero_arithmetic --limit 6 "
        f"--output_dir {tmp_path}",
    )
    records = (tmp_path / "samples-zero_copying.jsonl").read_text().splitlines()
    assert records and all(isinstance(json.loads(line), dict) for line in records)

    def fails(*asked: Any) -> Iterator[Any]:
        raise AssertionError("asked again")

    for method in ("score", "write"):
        monkeypatch.setattr(answering.EngineAnswerer, method, lambda self, asked: fails() if asked else iter(()))
    assert call(folder, "--tasks", "zero_arithmetic", "--limit", "6", "--output_dir", str(tmp_path)) == 0
    assert "answers were known from before, 0 are new" in capsys.readouterr().err
    again = read_results(tmp_path)
    # What was not asked for stays.
    assert [*again.tasks] == ["zero_copying", "zero_arithmetic"] and len(again.commands) == 2
    assert again.tasks["zero_arithmetic"].figures == results.tasks["zero_arithmetic"].figures


def test_an_interrupted_evaluation_repeats_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    score, asked_at_all = answering.EngineAnswerer.score, list[int]()

    def interrupted(self: Any, asked: Sequence[Scoring]) -> Iterator[tuple[int, Score]]:
        for number, answer in enumerate(score(self, asked)):
            if not asked_at_all and number == 5:
                asked_at_all.append(number)
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(answering.EngineAnswerer, "score", interrupted)
    flags = ("--tasks", "zero_copying", "--limit", "6", "--output_dir")
    assert call(folder, *flags, str(tmp_path / "one")) == INTERRUPTED
    assert "the same command goes on from there" in capsys.readouterr().err
    [journal] = (tmp_path / "one").glob("answers-*")
    assert len(journal.read_text().splitlines()) == 5
    assert call(folder, *flags, str(tmp_path / "one")) == 0
    assert call(folder, *flags, str(tmp_path / "two")) == 0
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    [whole] = (tmp_path / "two").glob("answers-*")
    assert len(set(keys)) == len(keys) == len(whole.read_text().splitlines())
    one, two = (read_results(tmp_path / name).tasks["zero_copying"] for name in ("one", "two"))
    assert one.figures == two.figures


def test_a_runs_figures_lie_in_the_run(tmp_path: Path):
    write_checkpoint(tmp_path / "run", 7, tiny_tokenizer())
    (tmp_path / "run" / RUN_MARK).touch()
    assert call(tmp_path / "run", *TASKS) == 0
    directory = RunPaths(tmp_path / "run").eval_dir(7)
    assert read_results(directory).model["step"] == 7
    checkpoint = RunPaths(tmp_path / "run").ckpt_dir / "step-7"
    # Training keeps figures there as well, by a digest of its own.
    values = json.loads((directory / "results.json").read_text())
    values["model"]["fingerprint"] = "of training"
    (directory / "results.json").write_text(json.dumps(values))
    assert call(checkpoint, "--tasks", "zero_arithmetic", "--limit", "2") == 0
    assert [*read_results(directory).tasks] == ["zero_copying", "zero_arithmetic"]
    # Another branch of the run had other weights at this step.
    values["model"]["weights"] = "others"
    (directory / "results.json").write_text(json.dumps(values))
    assert call(checkpoint, "--tasks", "zero_arithmetic", "--limit", "2") == 2
    assert place_of(tmp_path / "base", 7, checkpoint) == directory
    assert place_of(tmp_path / "base", None, None) == Path("out/eval/base")


def test_commands_at_the_same_time_keep_each_others_figures(tmp_path: Path):
    one, two = (EvaluationFolder(tmp_path, {"path": "model"}, name) for name in ("one", "two"))
    for folder, task in ((one, "a"), (two, "b"), (one, "c")):
        folder.take(Outcome(TaskResult(task, {}), [{"id": 0}] if task != "c" else []))
    found = read_results(tmp_path)
    assert [*found.tasks] == ["a", "b", "c"] and found.commands == ("two", "one")
    # Samples of an earlier evaluation do not stay beside figures that are not theirs.
    one.take(Outcome(TaskResult("a", {}), []))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "samples-b.jsonl"}


def test_what_json_does_not_know_is_written_as_text(tmp_path: Path):
    settings = {"generation": {"until": [date(2026, 12, 1)]}}
    EvaluationFolder(tmp_path, {}, "one").take(Outcome(TaskResult("a", {}, settings=settings), [{"id": "\ud800"}]))
    assert read_results(tmp_path).tasks["a"].settings == {"generation": {"until": ["2026-12-01"]}}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "samples-a.jsonl"}


def test_figures_of_another_model_are_not_mixed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    flags = ("--tasks", "zero_arithmetic", "--limit", "2", "--output_dir", str(tmp_path / "found"))
    assert call(model, *flags) == 0
    assert call(model, *flags, "--dtype", "bfloat16") == 2
    assert "holds figures of another model (its dtype is another): give --output_dir" in capsys.readouterr().err
    shutil.rmtree(model)
    write_model(model, tiny_tokenizer(), seed=1, context=128)
    assert call(model, *flags) == 2
    assert "(its weights are others)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tasks", "zero", "--limit", "0"), "--limit must be positive"),
        (("--tasks", "zero", "--num_fewshot", "-1"), "--num_fewshot must not be negative"),
        (("--tasks", "zero_needle", "--num_fewshot", "2"), "--num_fewshot is for tasks of lm-eval, and for zero_"),
        (("--tasks", "zero_needle", "--texts", "mine=."), "--texts is for the task zero_bits_per_byte"),
        (("--tasks", "zero", "--seed", "-1"), "--seed must lie between"),
        (("--tasks", "zero", "--system", "Be brief."), "--system needs --chat"),
        (("--tasks", "zero", "--data_dir", "nowhere"), "--data_dir: nowhere does not exist"),
        (("--tasks", ","), "no task is named"),
        (("--tasks", "zero_nothing"), "there is no task zero_nothing"),
        (("--tasks", "zero", "--adapter", "a", "--adapter", "b"), "give one --adapter"),
        (("--tasks", "zero,gsm8k"), "gsm8k: tasks of lm-eval, which is not installed: run `pip install -r "),
    ],
)
def test_what_is_wrong_with_the_flags_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...],
    words: str,
):  # fmt: skip
    monkeypatch.setattr(arguments, "has_lm_eval", lambda: False)
    assert call(folder, *flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_list_of_tasks_needs_no_model(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        evaluate_model.main(["--list"])
    assert not left.value.code
    assert "zero_copying" in capsys.readouterr().out


def test_the_table_shows_values_with_their_intervals():
    results = [
        TaskResult("mmlu", {"acc": Figure(0.25, 0.01, 14042)}, settings={"num_fewshot": 5}),
        TaskResult("all_right", {"acc": Figure(1.0, 0.0, 8)}, settings={"left_out": 3}),
        TaskResult("wikitext", {"word_perplexity": Figure(12345.6, None, 62, False), "b": Figure(1.5, None, 62)}),
        TaskResult("zero_formats", {}, settings={"reason": "its context is too short"}),
    ]
    assert table_of(results).splitlines() == [
        "task          examples  metric                              value  95%               questions",
        "mmlu                 5  acc                                0.2500  0.2304 to 0.2696     14,042",
        "all_right               acc                                1.0000  0.6756 to 1.0000          8",
        "wikitext                word_perplexity                 1.235e+04                           62",
        "                        b                                  1.5000                           62",
        "zero_formats            none: its context is too short",
        "all_right: questions left out, as they are longer than the model's context: 3",
    ]


def test_the_line_of_a_task_leaves_its_parts_to_the_table():
    figures = {"acc": Figure(1.0, 0.0, 8), "acc/4": Figure(1.0, 0.0, 4), "bits": Figure(2.5, None, 8, False)}
    assert figures_of(TaskResult("zero_copying", figures)) == "acc 1.0000 (95%: 0.6756 to 1.0000), bits 2.5000"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("to, lines", [(Terminal(), 3), (io.StringIO(), 1)])
def test_progress_is_shown_without_flooding_a_log(monkeypatch: pytest.MonkeyPatch, to: io.StringIO, lines: int):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr("evaluation.progress.time.monotonic", lambda: next(clock))
    progress = Progress(Guesser(tiny_tokenizer()), to)
    asked = [Scoring((1,), (number,)) for number in range(3)]
    assert len([*progress.score(asked)]) == 3
    shown = to.getvalue().replace("\r\x1b[K", "\n").strip("\n").splitlines()
    assert len(shown) == lines and shown[-1] == "3 of 3 answers scored, 0 s left"
    assert duration(100) == "2 min" and duration(7500) == "2 h 5 min"

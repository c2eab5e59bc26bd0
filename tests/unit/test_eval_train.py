"""Evaluations during training, in one process: scores, results, failures, stops. tests/dist has those on several."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate_model
import train_my_ddp
from checkpoint.writing import CheckpointWriter
from evaluation import forward, live_writing
from evaluation.asking import Scoring
from evaluation.forward import collate, cut
from evaluation.in_thread import EvaluationThread
from evaluation.own import TASKS
from evaluation.results import read_results
from evaluation.task import Options
from model import flops
from tests.conftest import SEQ_LEN
from tests.eval_tasks import Programs, Scores, Texts, plain_scores, registered, requests
from tests.folder_answerer import FolderAnswerer
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits
from tests.unit.test_sft_train import Home, dpo_flags, sft_flags
from training import eval_folder, eval_rounds, evaluation

__all__ = ["dpo_flags", "sft_flags"]

TASK = "--eval_tasks=zero_scores"
SHAPE = ("--hidden_size", "--num_", "--tie")


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


def train(flags: list[str], *more: str, task: object | None = None) -> int:
    with registered(Scores(), Texts(), Programs("zero_programs"), *([task] if task else [])):
        return train_my_ddp.main([*flags, "--hidden_dropout=0.1", "--valid_interval=2", *more])


def log_of(flags: list[str]) -> str:
    return (out_dir(flags) / "train.log").read_text()


def samples_of(flags: list[str], step: int, task: str = "zero_scores") -> list[dict]:
    path = out_dir(flags) / "eval" / f"step-{step}" / f"samples-{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batches_have_fixed_shapes_and_hold_each_request_once():
    asked = [Scoring((1,) * (n % 7 + 1), (2,) * (n + 1)) for n in range(200)]
    batches = cut(asked, 206, "cpu")
    assert sorted(place for batch in batches for place in batch.places) == list(range(200))
    assert all(len(batch.places) <= batch.rows for batch in batches)
    shapes = {batch.width: batch.rows for batch in batches}
    assert len(shapes) == len({(batch.width, batch.rows) for batch in batches}) <= 20
    assert max(shapes) == 206 and all(width % 16 == 0 for width in shapes if width < 206)
    for batch in batches:
        longest = max(len(asked[place].context) + len(asked[place].continuation) - 1 for place in batch.places)
        assert longest <= batch.width <= max(1.15 * longest, longest + 15)
        found = collate([asked[place] for place in batch.places], batch.rows, batch.width)
        assert len(found["supervised"]) == sum(len(asked[place].continuation) for place in batch.places)
        assert (found["labels"].flatten()[found["supervised"]] == 2).all()


@pytest.mark.parametrize("asked", [Scoring((), (1,)), Scoring((1,), ()), Scoring((1, 2), (3, 4, 5, 6))])
def test_what_cannot_be_scored_is_refused(asked: Scoring):
    with pytest.raises(ValueError, match="to be scored"):
        cut([asked], 4, "cpu")


def test_an_evaluation_leaves_results_and_changes_nothing(tiny_run: list[str], tmp_path: Path):
    without = elsewhere(tiny_run, tmp_path / "without")
    assert train(without) == 0
    assert train(tiny_run, TASK + ",zero_texts", "--eval_interval=2", "--eval_limit=24") == 0
    assert losses(tiny_run) == losses(without)
    assert same_bits(final_state(tiny_run, 4), final_state(without, 4))
    found = records(tiny_run, "eval")
    assert [(one["step"], one["task"]) for one in found] == [
        (step, task) for step in (2, 4) for task in ("zero_scores", "zero_texts")
    ]
    assert "eval at step 4 | zero_scores | logprob" in log_of(tiny_run)

    home = out_dir(tiny_run)
    results = read_results(home / "eval" / "step-4")
    figure = results.tasks["zero_scores"].figures["logprob"]
    assert found[-2]["figures"]["logprob"] == list(figure)[:3] and found[-2]["zero_scores/logprob"] == figure.value
    assert results.model["step"] == 4 and results.model["dtype"] == "float32"
    assert results.commands == (
        f"python evaluate_model.py --model {home / 'ckpt' / 'step-4'} --tasks zero_scores,zero_texts --limit 24",
    )
    expected = plain_scores(home / "ckpt" / "step-4", SEQ_LEN)
    samples = samples_of(tiny_run, 4)
    assert [one["logprob"] for one in samples] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [one["is_greedy"] for one in samples] == [is_greedy for _, is_greedy in expected]
    assert sum(one["is_greedy"] for one in samples) == 1
    texts = samples_of(tiny_run, 4, "zero_texts")
    assert [one["has_ended"] for one in texts] == [False] * 3 + [True] * (len(texts) - 3) and len(texts) > 3
    assert all(len(one["text"]) <= 1 for one in texts[3:])

    # A launch that finds all done evaluates nothing again.
    assert train(tiny_run, "--resume") == 0
    assert len(records(tiny_run, "eval")) == 4
    # Of other tasks, nothing is known.
    assert train(tiny_run, "--resume", TASK, "--eval_limit=3") == 0
    assert len(records(tiny_run, "eval")) == 5 and len(samples_of(tiny_run, 4)) == 3
    assert len(records(tiny_run, "start")) == 3


@pytest.mark.parametrize("has_adapter", [False, True])
def test_the_command_and_training_share_a_folder(has_adapter: bool, tiny_run: list[str], tmp_path: Path):
    more = []
    if has_adapter:
        base = elsewhere(tiny_run, tmp_path / "base")
        assert train(base) == 0
        more = [f"--init_from={out_dir(base)}", "--lora_r=2", "--lora_target_modules=all-linear"]
        tiny_run = [flag for flag in tiny_run if not flag.startswith(SHAPE)]
    assert train(tiny_run, TASK, "--eval_limit=3", *more) == 0
    folder = out_dir(tiny_run) / "eval" / "step-4"
    before = read_results(folder)
    flags = ["--device", "cpu", "--tasks", "zero_arithmetic", "--limit", "1"]
    assert evaluate_model.main(["--model", str(out_dir(tiny_run)), *flags]) == 0
    found = read_results(folder)
    assert [*found.tasks] == ["zero_scores", "zero_arithmetic"] and len(found.commands) == 2
    assert found.model | before.model == found.model | {"fingerprint": before.model["fingerprint"]}
    assert train(tiny_run, "--resume", TASK + ",zero_texts", "--eval_limit=3", *more) == 0
    assert [*read_results(folder).tasks] == ["zero_scores", "zero_arithmetic", "zero_texts"]
    # Figures of other weights, which the run had at this step before it went another way, make way.
    path = folder / "results.json"
    path.write_text(path.read_text().replace(found.model["weights"], "others"))
    assert train(tiny_run, "--resume", TASK, "--eval_limit=2", *more) == 0
    assert [*read_results(folder).tasks] == ["zero_scores"]


@pytest.mark.parametrize(
    "error", [ValueError("no such data"), MemoryError(), RuntimeError("a fault"), SystemExit(3), OSError("disk")]
)
def test_an_error_in_a_task_is_a_warning(error: BaseException, tiny_run: list[str], tmp_path: Path):
    without = elsewhere(tiny_run, tmp_path / "without")
    assert train(without) == 0
    assert train(tiny_run, TASK, "--eval_interval=2", task=Scores(error=error)) == 0
    told = [one["problem"] for one in records(tiny_run, "eval_failed")]
    assert len(told) == 2 and all((str(error) or type(error).__name__) in one for one in told)
    assert "step 2 was not evaluated to the end, the run goes on" in log_of(tiny_run)
    assert losses(tiny_run) == losses(without)
    assert same_bits(final_state(tiny_run, 4), final_state(without, 4))
    # It is not tried again.
    assert train(tiny_run, "--resume") == 0
    assert len(records(tiny_run, "eval_failed")) == 2 and not records(tiny_run, "eval")


def test_a_lack_of_memory_in_a_forward_pass_is_a_warning(tiny_run: list[str], tmp_path: Path, monkeypatch):
    without = elsewhere(tiny_run, tmp_path / "without")
    assert train(without) == 0
    rounds = 0

    def scores(self, hidden, labels):
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(self, hidden, labels)

    usual = forward.ScoringTask._scores
    monkeypatch.setattr(forward.ScoringTask, "_scores", scores)
    assert train(tiny_run, TASK, "--eval_interval=2") == 0
    (failed,) = records(tiny_run, "eval_failed")
    assert failed["step"] == 2 and failed["problem"] == "OutOfMemoryError: CUDA out of memory"
    assert [one["step"] for one in records(tiny_run, "eval")] == [4]
    assert losses(tiny_run) == losses(without)
    assert same_bits(final_state(tiny_run, 4), final_state(without, 4))


def test_a_disk_that_fills_up_is_a_warning(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    write, count = eval_folder.atomic_write_json, 0

    def fill_up(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError("No space left on device")
        write(*arguments)

    monkeypatch.setattr(eval_folder, "atomic_write_json", fill_up)
    assert train(tiny_run, TASK, "--eval_limit=2") == 0
    assert "No space left on device" in log_of(tiny_run)


def test_generators_are_left_as_they_were():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with evaluation._same_random_numbers(torch.device("cpu")):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_a_stopped_evaluation_goes_on_where_it_was(tiny_run: list[str], monkeypatch):
    """Also if it is that of the last step, after which nothing is left to train."""
    computed: list[int] = []

    def score_batch(self, batch, into):
        computed.append(len(batch["rows"]))
        if len(computed) == stop_at:
            (out_dir(tiny_run) / "stop").touch()
        return usual(self, batch, into)

    usual, stop_at = eval_rounds.EvalRounds._score_batch, 2
    monkeypatch.setattr(eval_rounds.EvalRounds, "_score_batch", score_batch)
    asked = requests(512, SEQ_LEN)
    assert train(tiny_run, TASK, "--eval_interval=2") == 75
    assert records(tiny_run, "end")[-1]["step"] == 2 and not records(tiny_run, "eval") and len(computed) == 2
    stop_at = len(cut(asked, SEQ_LEN, "cpu")) + 3
    assert train(tiny_run, "--resume") == 75
    assert records(tiny_run, "end")[-1]["step"] == 4 and len(records(tiny_run, "eval")) == 1
    assert train(tiny_run, "--resume") == 0
    assert [one["step"] for one in records(tiny_run, "eval")] == [2, 4]
    assert sum(computed) == 2 * len(asked)
    assert [one["reason"] for one in records(tiny_run, "end")] == ["stopped on request"] * 2 + ["finished"]


def test_texts_are_broken_off_by_a_request_to_stop(tiny_run: list[str], tmp_path: Path, monkeypatch):
    """And written again as they would have been, also with a cache that holds one of them."""
    undisturbed = elsewhere(tiny_run, tmp_path / "undisturbed")
    assert train(undisturbed, "--eval_tasks=zero_texts") == 0
    looks = 0

    def look(self, is_writing, has_failed):
        nonlocal looks
        looks += is_writing
        if looks == 3:
            (out_dir(tiny_run) / "stop").touch()
        usual(self, is_writing, has_failed)

    usual = eval_rounds._Looks._look
    with monkeypatch.context() as patch:
        patch.setattr(eval_rounds, "_BEAT_S", 0.0)
        patch.setattr(eval_rounds._Looks, "_look", look)
        assert train(tiny_run, "--eval_tasks=zero_texts") == 75
    assert looks == 3 and not records(tiny_run, "eval")
    monkeypatch.setitem(live_writing._CACHE_BYTES, "cpu", 1)
    assert train(tiny_run, "--resume") == 0
    assert samples_of(tiny_run, 4, "zero_texts") == samples_of(undisturbed, 4, "zero_texts")


@pytest.mark.parametrize("kind, more", [("sft", []), ("sft", ["--lora_r=2"]), ("dpo", ["--lora_r=2"])])
def test_runs_that_learn_to_answer_are_evaluated_by_their_template(
    kind: str, more: list[str], sft_flags: list[str], dpo_flags: list[str], tmp_path: Path
):
    flags = sft_flags if kind == "sft" else dpo_flags
    without, with_tasks = elsewhere(flags, tmp_path / "without"), elsewhere(flags, tmp_path / "with")
    assert train(without, *more) == 0
    tasks = f"{TASK},zero_texts,zero_stopping"
    assert train(with_tasks, *more, tasks, "--eval_interval=2", "--eval_limit=2") == 0
    assert not records(with_tasks, "eval_failed")
    assert {one["task"] for one in records(with_tasks, "eval")} == {"zero_scores", "zero_texts", "zero_stopping"}
    assert losses(with_tasks) == losses(without)
    step = records(with_tasks, "train")[-1]["step"]
    assert same_bits(final_state(with_tasks, step), final_state(without, step))
    found = read_results(out_dir(with_tasks) / "eval" / f"step-{step}")
    assert "--chat" in found.commands[-1] and found.tasks["zero_stopping"].settings["chat"]


def test_after_two_deaths_an_evaluation_is_left_out(tiny_run: list[str], monkeypatch):
    def die(self, batch, into):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_rounds.EvalRounds, "_score_batch", die)
    for more in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run, TASK, "--eval_interval=2", *more)
        assert losses(tiny_run)[-1] == losses(tiny_run)[1]
    monkeypatch.undo()
    assert train(tiny_run, "--resume") == 0
    (failed,) = records(tiny_run, "eval_failed")
    assert failed["step"] == 2 and "died 2 times" in failed["problem"]
    assert [one["step"] for one in records(tiny_run, "eval")] == [4]


def test_a_save_that_fails_is_not_evaluated(tiny_run: list[str], monkeypatch):
    usual = CheckpointWriter.write_tensors

    def write_tensors(self, *arguments: object) -> None:
        if self.step == 2:
            raise OSError(28, "No space left on device")
        usual(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, "write_tensors", write_tensors)
    assert train(tiny_run, TASK, "--eval_interval=2") == 0
    (failed,) = records(tiny_run, "eval_failed")
    assert failed["step"] == 2 and failed["problem"] == "it is not saved"
    assert [one["step"] for one in records(tiny_run, "eval")] == [4]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--eval_interval=2"], "--eval_tasks=zero"),
        (["--eval_interval=-1", TASK], "eval_interval must not be negative"),
        (["--eval_limit=0", TASK], "eval_limit must be positive"),
        (["--eval_tasks=zero_nonsense"], "there is no task zero_nonsense"),
        (["--eval_tasks=zero_programs"], "--eval_allow_code_execution"),
        (["--eval_tasks=zero_texts", "--data_parallel=fsdp"], "with --data_parallel=fsdp while it trains"),
        (["--eval_tasks=zero", "--data_parallel=fsdp"], "give --eval_tasks=zero_bits_per_byte,"),
        ([TASK, "--eval_data_dir=/nowhere/at/all"], "is not a directory"),
        (["--eval_tasks=hellaswag"], "requirements-eval.txt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_the_start(
    flags: list[str], words: str, tiny_run: list[str], monkeypatch, capsys
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert train(tiny_run, *flags) == 2
    assert words in capsys.readouterr().out and not (out_dir(tiny_run) / "reslog.jsonl").exists()


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """Tasks of lm-eval's form: choices, and texts."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = [" a", " None", " len(a)"]
    rows = [{"question": f"def f{n}(a):\n    return", "choices": choices, "gold": n} for n in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
    files += "test_split: test\n"
    (folder / "choice.yaml").write_text(f"""task: own_choice
{files}output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
""")
    (folder / "writing.yaml").write_text(f"""task: own_writing
{files}output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["="], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    return folder


def test_tasks_of_lm_eval_stand_beside_ours(task_dir: Path, tiny_run: list[str], tmp_path: Path):
    """With the answers of the checkpoint by itself."""
    pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")
    from evaluation import harness

    without = elsewhere(tiny_run, tmp_path / "without")
    assert train(without) == 0
    tasks = ["own_choice", "own_writing"]
    assert train(tiny_run, f"{TASK},{','.join(tasks)}", f"--eval_task_dir={task_dir}", "--eval_interval=2") == 0
    assert not records(tiny_run, "eval_failed")
    assert [one["task"] for one in records(tiny_run, "eval")] == ["zero_scores", *tasks] * 2
    assert same_bits(final_state(tiny_run, 4), final_state(without, 4))
    answerer = FolderAnswerer(out_dir(tiny_run) / "ckpt" / "step-4")
    for expected in harness.prepare(tasks, answerer, Options(task_dir=task_dir)).run():
        samples = samples_of(tiny_run, 4, expected.result.name)
        assert len(samples) == len(expected.samples) == 3
        for ours, theirs in zip(samples, expected.samples):
            if expected.result.name == "own_writing":
                assert ours["answers"] == theirs["answers"]
            else:
                found, wanted = (np.array([answer for (answer,) in one["answers"]]) for one in (ours, theirs))
                assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--eval_tasks=own_choise"], "did you mean own_choice"),
        (["--eval_tasks=own_choice,own_writing", "--data_parallel=fsdp"], "own_writing lets the model write"),
        (["--eval_tasks=own_choice,hellaswag", "--eval_data_dir=."], "the data of Rowan/hellaswag are not in"),
        (["--eval_tasks=humaneval"], "allow it by --eval_allow_code_execution"),
    ],
)
def test_tasks_of_lm_eval_that_cannot_be_run_are_refused_at_the_start(
    flags: list[str], words: str, task_dir: Path, tiny_run: list[str], capsys
):
    pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")
    assert train(tiny_run, *flags, f"--eval_task_dir={task_dir}") == 2
    assert words in capsys.readouterr().out and not (out_dir(tiny_run) / "reslog.jsonl").exists()


def test_a_thread_that_hangs_is_left():
    started = []

    def work(answerer):
        started.append(next(iter(answerer.score([Scoring((1,), (2,))]))))
        yield

    thread = EvaluationThread(work, None, 8, True)
    thread.start()
    assert thread.next_event(5).kind == "score"
    thread.leave(5)
    assert not thread.is_alive and not started
    assert isinstance(thread.next_event(1).error, InterruptedError)


def test_tasks_of_tests_are_no_tasks_of_ours():
    assert not {"zero_scores", "zero_texts"} & TASKS.keys()

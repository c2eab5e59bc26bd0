"""Evaluations during training on several ranks: the same scores everywhere, and faults that cost nothing.

One process trains a model. Copies of that run are resumed on other ranks, by other engines, where nothing but the
evaluation of its last step is left to do.
"""

import json
import os
import signal
from pathlib import Path

import pytest

import train_my_ddp
from evaluation.forward import ScoringTask
from runs.exits import CRASH
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks, use_new_port
from tests.dist.test_experts_runs import MIXTRAL
from tests.dist.test_parallel_runs import Plan
from tests.eval_tasks import Scores, plain_scores, registered, requests
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits
from training.eval_rounds import EvalRounds

TENSOR, CONTEXT, PIPE, EXPERT, FSDP, ZERO1 = (
    "--tensor_model_parallel_size=2", "--context_parallel_size=2", "--pipeline_model_parallel_size=2",
    "--expert_model_parallel_size=2", "--data_parallel=fsdp", "--use_distributed_optimizer",
)  # fmt: skip
CUTS = (TENSOR, CONTEXT, "--pipeline", EXPERT, FSDP)
RING = ["--context_parallel_method=ring", "--no-document_mask"]
SMALL = ["--train_batch_size=2", "--gradient_accumulation_steps=4"]
EXACT = {
    "alone": (1, []), "ddp 2": (2, []), "naive 2": (2, ["--ddp_impl=naive"]), "zero1 2": (2, [ZERO1]),
    "fsdp 2": (2, [FSDP]), "pp 2": (2, [PIPE]), "ddp 4": (4, []),
}  # fmt: skip
"""Ranks and flags that leave each sum as it is."""
CUT = {"tp 2": (2, [TENSOR]), "cp 2": (2, [CONTEXT]), "fsdp 2 tp 2": (4, [FSDP, TENSOR])}
"""Those that cut sums."""
MORE = {
    "tp 2 sp": (2, [TENSOR, "--sequence_parallel"]), "ring 2": (2, [CONTEXT, *RING]), "fsdp 4": (4, [FSDP]),
    "dp 2 pp 2": (4, [PIPE, ZERO1]), "tp 2 pp 2": (4, [TENSOR, PIPE]), "dp 2 cp 2": (4, [CONTEXT]),
    "tp 2 cp 2": (4, [TENSOR, CONTEXT]), "pp 4": (4, ["--pipeline_model_parallel_size=4"]),
}  # fmt: skip
SPARSE = {"sparse ep 2": (2, [EXPERT]), "sparse fsdp 2": (2, [FSDP]), "sparse ep 2 tp 2": (4, [EXPERT, TENSOR])}
SCORES, TEXTS = "--eval_tasks=zero_scores", "--eval_tasks=zero_scores,zero_texts"


@pytest.fixture(scope="module")
def flags(data_dir: Path) -> list[str]:
    return [
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
        "--valid_iters=2", "--max_iters=2", "--learning_rate=1e-2", "--num_threads=1", "--sample_texts=0",
        "--dist_timeout=60", *TINY_MODEL,
    ]  # fmt: skip


def evaluate(plan: Plan, source: list[str], ways: dict[str, tuple[int, list[str]]]) -> None:
    """Add evaluations of a run's last step."""
    for name, (ranks, more) in ways.items():
        tasks = SCORES if any(flag.startswith(CUTS) for flag in more) else TEXTS
        plan.resume(name, source, ranks, [*SMALL, tasks, *more], keep=2, patch="tasks")


@pytest.fixture(scope="module")
def runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = Plan(flags, tmp_path_factory.mktemp("runs"))
    evaluate(plan, plan.add("source", 1, []), EXACT | CUT)
    plan.run()
    return plan


@pytest.fixture(scope="module")
def more_runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = Plan(flags, tmp_path_factory.mktemp("runs"))
    evaluate(plan, plan.add("source", 1, []), MORE)
    evaluate(plan, plan.add("sparse", 1, MIXTRAL), {name: (n, [*MIXTRAL, *its]) for name, (n, its) in SPARSE.items()})
    plan.run()
    return plan


def samples(case: list[str], task: str = "zero_scores", step: int = 2) -> list[dict]:
    assert not records(case, "eval_failed")
    path = out_dir(case) / "eval" / f"step-{step}" / f"samples-{task}.jsonl"
    return list(map(json.loads, path.read_text().splitlines()))


def assert_close(found: list[dict], source: list[str]) -> None:
    """To a loop over the texts, one by one, on the checkpoint."""
    expected = plain_scores(out_dir(source) / "ckpt" / "step-2", SEQ_LEN)
    assert [one["logprob"] for one in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [one["is_greedy"] for one in found] == [is_greedy for _, is_greedy in expected]


@pytest.mark.parametrize("name", EXACT)
def test_scores_do_not_depend_on_the_number_of_ranks(runs: Plan, name: str):
    found = samples(runs[name])
    assert_close(found, runs["source"])
    assert sum(one["is_greedy"] for one in found) == 1
    assert found == samples(runs["alone"])


@pytest.mark.parametrize("name", ["zero1 2", "ddp 4"])
def test_texts_do_not_depend_on_the_number_of_ranks(runs: Plan, name: str):
    found = samples(runs["alone"], "zero_texts")
    assert len(found) > 3 and found == samples(runs[name], "zero_texts")


@pytest.mark.parametrize("name", CUT)
def test_models_that_are_cut_are_scored(runs: Plan, name: str):
    assert_close(samples(runs[name]), runs["source"])


@pytest.mark.soak
@pytest.mark.parametrize("name", [*MORE, *SPARSE])
def test_models_that_are_cut_in_other_ways_are_scored(more_runs: Plan, name: str):
    assert_close(samples(more_runs[name]), more_runs["sparse" if name in SPARSE else "source"])


def do_runs(runs: list[tuple[list[str], str]]) -> list[tuple[int, int]]:
    """Program of a rank: runs in whose first evaluation rank 1 may have a fault in its second batch. Returns each one's
    exit code and the number of scores that this rank has computed."""
    answers = []
    for flags, fault in runs:
        use_new_port()
        answers.append(_do_run(flags, fault))
    return answers


def _do_run(flags: list[str], fault: str) -> tuple[int, int]:
    computed: list[int] = []

    def score_batch(self, batch, into):
        computed.append(len(batch["rows"]))
        return usual_batch(self, batch, into)

    def scores(self, hidden, labels):
        if os.environ["RANK"] == "1" and len(computed) == 2:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "fails":
                raise MemoryError("no more of it")
        return usual_scores(self, hidden, labels)

    usual_batch, usual_scores = EvalRounds._score_batch, ScoringTask._scores
    EvalRounds._score_batch, ScoringTask._scores = score_batch, scores
    try:
        with registered(Scores()):
            return train_my_ddp.main(flags), sum(computed)
    except RuntimeError:
        return CRASH, sum(computed)
    finally:
        EvalRounds._score_batch, ScoringTask._scores = usual_batch, usual_scores


@pytest.mark.slow
def test_a_fault_on_one_rank_costs_nothing(flags: list[str], tmp_path: Path):
    undisturbed, failing, killed = (
        [*elsewhere(flags, tmp_path / name), *SMALL, "--max_iters=4"] for name in ("undisturbed", "failing", "killed")
    )
    evaluating = [SCORES, "--eval_interval=2"]
    answers = run_ranks(2, do_runs, [[undisturbed, "none"], [[*failing, *evaluating], "fails"]])
    assert [[code for code, _ in its] for its in answers] == [[0, 0]] * 2
    (failed,) = records(failing, "eval_failed")
    assert failed["step"] == 2 and failed["problem"] == "MemoryError: no more of it (on rank 1)"

    (code, computed), = run_ranks(2, do_runs, [[[*killed, *evaluating], "killed"]], may_die=True)[0]
    assert code == CRASH and computed > 0 and not records(killed, "eval")
    again = run_ranks(2, do_runs, [[[*killed, "--resume"], "none"]])
    assert [code for (code, _), in again] == [0, 0]
    # What the last, broken round had computed was lost, and all else was computed once.
    known = sum(count for (_, count), in again) - len(requests(512, SEQ_LEN))
    assert 0 < len(requests(512, SEQ_LEN)) - known < len(requests(512, SEQ_LEN))
    for run in (failing, killed):
        assert [one["step"] for one in records(run, "eval")] == ([4] if run is failing else [2, 4])
        assert losses(run) == losses(undisturbed)
        assert same_bits(final_state(run, 4), final_state(undisturbed, 4))

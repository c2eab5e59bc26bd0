"""Evaluations during training on several ranks: the same scores everywhere, and faults that cost nothing.

One process trains a model. Copies of that run are resumed on other ranks, by other engines, where nothing but the
evaluation of its last step is left to do.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import train_my_ddp
from evaluation.forward import ScoringTask
from runs.exits import CRASH
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks, use_new_port
from tests.dist.test_experts_runs import MIXTRAL
from tests.eval_tasks import Scores, Texts, plain_scores, registered, requests
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits
from training.eval_rounds import EvalRounds

TENSOR, CONTEXT, PIPE, EXPERT, FSDP, ZERO1 = (
    "--tensor_model_parallel_size=2", "--context_parallel_size=2", "--pipeline_model_parallel_size=2",
    "--expert_model_parallel_size=2", "--data_parallel=fsdp", "--use_distributed_optimizer",
)  # fmt: skip
RING = ["--context_parallel_method=ring", "--no-document_mask"]
EXACT = {
    1: {"alone": []},
    2: {"ddp 2": [], "naive 2": ["--ddp_impl=naive"], "zero1 2": [ZERO1], "fsdp 2": [FSDP], "pp 2": [PIPE]},
    4: {"ddp 4": []},
}
"""Ranks -> ways of sharing the work that leave each sum as it is."""
CLOSE = {2: {"tp 2": [TENSOR], "cp 2": [CONTEXT]}, 4: {"fsdp 2 tp 2": [FSDP, TENSOR]}}
"""Ways that cut sums."""
MORE = {
    2: {"tp 2 sp": [TENSOR, "--sequence_parallel"], "ring 2": [CONTEXT, *RING]},
    4: {
        "fsdp 4": [FSDP], "dp 2 pp 2": [PIPE, ZERO1], "tp 2 pp 2": [TENSOR, PIPE], "dp 2 cp 2": [CONTEXT],
        "tp 2 cp 2": [TENSOR, CONTEXT], "pp 4": ["--pipeline_model_parallel_size=4"],
    },
}  # fmt: skip
SCORES, BOTH = "--eval_tasks=zero_scores", "--eval_tasks=zero_scores,zero_texts"


def run_cases(cases: list[list[str]]) -> list[int]:
    """Program of a rank: several runs, one after the other."""
    codes = []
    with registered(Scores(), Texts()):
        for case in cases:
            use_new_port()
            codes.append(train_my_ddp.main(case))
    return codes


@pytest.fixture(scope="module")
def flags(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path_factory.mktemp('runs') / 'source'}",
        f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu", "--train_batch_size=2",
        "--gradient_accumulation_steps=4", "--valid_iters=2", "--max_iters=2", "--learning_rate=1e-2",
        "--num_threads=1", "--sample_texts=0", "--dist_timeout=60", *TINY_MODEL,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def source(flags: list[str]) -> Path:
    assert run_ranks(1, run_cases, [flags]) == [[0]]
    return out_dir(flags)


def evaluated(source: Path, flags: list[str], home: Path, ways: dict[int, dict[str, list[str]]], tasks: str) -> dict:
    """Way -> samples of each task, from copies of a run."""
    found = {}
    for ranks, its in ways.items():
        cases = []
        for name, more in its.items():
            shutil.copytree(source, home / name)
            cases.append([*elsewhere(flags, home / name), "--resume", tasks, *more])
        assert run_ranks(ranks, run_cases, cases) == [[0] * len(cases)] * ranks, its
        found |= {name: samples(case) for name, case in zip(its, cases)}
        assert not any(records(case, "eval_failed") for case in cases)
    return found


def samples(case: list[str], step: int = 2) -> dict[str, list[dict]]:
    paths = sorted((out_dir(case) / "eval" / f"step-{step}").glob("samples-*.jsonl"))
    return {path.stem.removeprefix("samples-"): list(map(json.loads, path.read_text().splitlines())) for path in paths}


def assert_close(found: list[dict], expected: list[tuple[float, bool]], abs_: float = 1e-4) -> None:
    assert [one["logprob"] for one in found] == pytest.approx([logprob for logprob, _ in expected], abs=abs_)
    assert [one["is_greedy"] for one in found] == [is_greedy for _, is_greedy in expected]


def test_scores_do_not_depend_on_the_number_of_ranks(source: Path, flags: list[str], tmp_path: Path):
    found = evaluated(source, flags, tmp_path, EXACT, SCORES)
    assert_close(found["alone"]["zero_scores"], plain_scores(source / "ckpt" / "step-2", SEQ_LEN))
    assert sum(one["is_greedy"] for one in found["alone"]["zero_scores"]) == 1
    for name, its in found.items():
        assert its == found["alone"], name


def test_texts_do_not_depend_on_the_number_of_ranks(source: Path, flags: list[str], tmp_path: Path):
    ways = {1: {"alone": []}, 2: {"zero1 2": [ZERO1]}, 4: {"ddp 4": []}}
    found = evaluated(source, flags, tmp_path, ways, "--eval_tasks=zero_texts")
    assert len(found["alone"]["zero_texts"]) > 3
    assert found["alone"] == found["zero1 2"] == found["ddp 4"]


def test_models_that_are_cut_are_scored(source: Path, flags: list[str], tmp_path: Path):
    expected = plain_scores(source / "ckpt" / "step-2", SEQ_LEN)
    for its in evaluated(source, flags, tmp_path, CLOSE, SCORES).values():
        assert_close(its["zero_scores"], expected)


@pytest.mark.soak
def test_models_that_are_cut_in_any_way_are_scored(source: Path, flags: list[str], tmp_path: Path):
    expected = plain_scores(source / "ckpt" / "step-2", SEQ_LEN)
    for its in evaluated(source, flags, tmp_path, MORE, SCORES).values():
        assert_close(its["zero_scores"], expected)


@pytest.mark.soak
def test_models_with_experts_are_scored(flags: list[str], tmp_path: Path):
    flags = [*elsewhere(flags, tmp_path / "source"), *MIXTRAL]
    assert run_ranks(1, run_cases, [flags]) == [[0]]
    expected = plain_scores(tmp_path / "source" / "ckpt" / "step-2", SEQ_LEN)
    ways = {1: {"alone": []}, 2: {"ep 2": [EXPERT], "fsdp 2": [FSDP]}, 4: {"ep 2 tp 2": [EXPERT, TENSOR]}}
    for its in evaluated(tmp_path / "source", flags, tmp_path, ways, SCORES).values():
        assert_close(its["zero_scores"], expected)


def fault_on_rank_1(flags: list[str], fault: str) -> list[int]:
    """Program of a rank: a run in whose first evaluation rank 1 has a fault in its second batch."""
    rank, computed = int(os.environ["RANK"]), []
    usual_batch, usual_scores = EvalRounds._score_batch, ScoringTask._scores

    def score_batch(self, batch, into):
        computed.append(len(batch["rows"]))
        return usual_batch(self, batch, into)

    def scores(self, hidden, labels):
        if rank == 1 and len(computed) == 2:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no more of it")
        return usual_scores(self, hidden, labels)

    EvalRounds._score_batch, ScoringTask._scores = score_batch, scores
    with registered(Scores()):
        try:
            return [train_my_ddp.main(flags), sum(computed)]
        except RuntimeError:
            return [CRASH, sum(computed)]
        finally:
            EvalRounds._score_batch, ScoringTask._scores = usual_batch, usual_scores


def test_a_fault_on_one_rank_costs_nothing(flags: list[str], tmp_path: Path):
    undisturbed, failing, killed = (
        [*elsewhere(flags, tmp_path / name), "--max_iters=4"] for name in ("undisturbed", "failing", "killed")
    )
    assert run_ranks(2, run_cases, [undisturbed]) == [[0], [0]]
    evaluating = [SCORES, "--eval_interval=2"]
    assert [code for code, _ in run_ranks(2, fault_on_rank_1, [*failing, *evaluating], "fails")] == [0, 0]
    (failed,) = records(failing, "eval_failed")
    assert failed["step"] == 2 and failed["problem"] == "MemoryError: no more of it (on rank 1)"

    code, computed = run_ranks(2, fault_on_rank_1, [*killed, *evaluating], "killed", may_die=True)[0]
    assert code == CRASH and computed > 0 and not records(killed, "eval")
    answers = run_ranks(2, fault_on_rank_1, [*killed, "--resume"], "none")
    assert [code for code, _ in answers] == [0, 0]
    # Only the first round's answers were written down; those of step 4 were all computed anew.
    kept = len((tmp_path / "killed" / "eval" / "step-2").glob("answers-*").__next__().read_bytes().splitlines())
    assert kept == len(requests(512, SEQ_LEN))
    for run in (failing, killed):
        assert [one["step"] for one in records(run, "eval")] == ([4] if run is failing else [2, 4])
        assert losses(run) == losses(undisturbed)
        assert same_bits(final_state(run, 4), final_state(undisturbed, 4))

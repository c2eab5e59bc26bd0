"""SFT and DPO on several gloo ranks: one trajectory with ragged samples, one reference, the same bits after a death."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import train_my_ddp
import training.trainer as trainer_module
from checkpoint import folder as ckpt
from data_preprocess import raw_records
from tests.dist.group import run_ranks
from tests.dist.test_parallel_runs import Plan
from tests.dist.test_runs import run_cases
from tests.runs import elsewhere, final_state, losses, out_dir, records, relative_difference, same_bits
from tests.unit.test_sft_train import (
    SEQ_LEN,
    conversations,
    pretokenize,
    train_tokenizer,
    with_data,
    write_dpo,
    write_model,
    write_sft,
)

STEPS = 4
DROPOUT = "--hidden_dropout=0.2"
CASES = {
    "sft packed": ("sft", []),
    "sft unpacked": ("sft", ["--no-packing"]),
    "dpo sigmoid": ("dpo", []),
    # With dropout, policy and reference differ from the first step on, so that the means of kto_pair count.
    "dpo kto_pair": ("dpo", ["--dpo_loss_type=kto_pair", "--dpo_beta=0.5", DROPOUT]),
}
LIMITED = ["sft packed", "dpo kto_pair"]
SPLITS = [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 4, 2), (2, 2, 4), (4, 2, 4), (4, 1, 8)]
"""(ranks, samples per micro-batch, micro-batches per step)."""


class Data:
    """Pretokenized directories and weights."""

    def __init__(self, home: Path):
        self.home, tokenizer = home, train_tokenizer()
        tokenizer.save_pretrained(home / "tokenizer")
        self.model = write_model(home / "model", tokenizer)
        self.raw, self.tokens = {}, {}
        for task, write in (("sft", write_sft), ("dpo", write_dpo)):
            self.raw[task] = write(home / f"raw-{task}", conversations(60))
            self.tokens[task] = pretokenize(
                self.raw[task], home / "tokenizer", home / task, task, "--valid_ratio", "0.3"
            )

    def flags(self, task: str) -> list[str]:
        """A run with a global batch of 8 samples, and a last validation batch that is not full."""
        return [
            f"--task_type={task}", f"--data_dir={self.tokens[task]}", "--out_dir=-", f"--init_from={self.model}",
            f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu", "--train_batch_size=4",
            "--gradient_accumulation_steps=2", "--valid_batch_size=3", f"--max_iters={STEPS}", "--learning_rate=1e-3",
            "--num_threads=1", "--sample_tokens=4", "--bucket_size=20000", "--dist_timeout=60",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs by "case ranks x batch x steps". DPO runs on other numbers of ranks have their own data, so also their own
    reference."""
    home = tmp_path_factory.mktemp("runs")
    plan = Plan([], home)
    for name, (task, more) in CASES.items():
        for ranks, batch, steps in SPLITS:
            directory = data.home / f"{task}-{ranks}"
            if not directory.exists():
                shutil.copytree(data.tokens[task], directory)
            plan.flags = with_data(data.flags(task), directory)
            split = [f"--train_batch_size={batch}", f"--gradient_accumulation_steps={steps}"]
            plan.add(f"{name} {ranks}x{batch}x{steps}", ranks, [*split, *more])
            if name in LIMITED and (ranks, batch) == (2, 4):
                plan.add(f"{name} limited", ranks, [*split, *more, "--activation_budget_gb=0.0045"])
        # The reference is computed by the pipeline, too.
        shutil.copytree(data.tokens[task], data.home / f"{task}-pp2", dirs_exist_ok=True)
        plan.flags = with_data(data.flags(task), data.home / f"{task}-pp2")
        plan.add(f"{name} pipeline", 2, ["--train_batch_size=2", "--gradient_accumulation_steps=4", *more,
                                         "--pipeline_model_parallel_size=2", "--pipeline_schedule=gpipe"])  # fmt: skip
        for ranks in (1, 2, 4):
            # The weights of the first run, validated by others.
            weights = f"--init_from={home / f'{name} 1x8x1'}"
            free = ["--reference_free"] if task == "dpo" else []
            plan.add(f"{name} valid {ranks}", ranks, ["--gradient_accumulation_steps=4", *more, weights, "--valid_only",
                                                     *free])  # fmt: skip
    plan.run()
    return plan


@pytest.mark.parametrize("name", CASES)
def test_one_trajectory(runs: Plan, name: str):
    """Ranks, micro-batches and accumulation do not change the samples read or, beyond float32's rounding, the results;
    the padding differs each time."""
    alone = runs[f"{name} 1x8x1"]
    expected = records(alone, "train")
    others = {f"{ranks}x{batch}x{steps}" for ranks, batch, steps in SPLITS[1:]} | {"pipeline"}
    assert len({record["digest"] for record in expected}) == STEPS
    for other in sorted(others):
        case = runs[f"{name} {other}"]
        trained = records(case, "train")
        for figure in ("digest", "samples", "tokens"):
            assert [r[figure] for r in trained] == [r[figure] for r in expected], (other, figure)
        assert trained[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-6), other
        assert losses(case) == pytest.approx(losses(alone), rel=1e-5), other
        assert relative_difference(final_state(case, STEPS), final_state(alone, STEPS)) < 1e-3, other
        if "dpo" in name:
            for figure in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
                ours, theirs = [r[figure] for r in trained], [r[figure] for r in expected]
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), (other, figure)


@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_on_activations_changes_no_bit(runs: Plan, name: str):
    limited = runs[f"{name} limited"]
    assert len(set(json.loads((out_dir(limited) / "activations.json").read_text())["keeps"])) > 1
    assert same_bits(final_state(limited, STEPS), final_state(runs[f"{name} 2x4x2"], STEPS))


@pytest.mark.parametrize("name", CASES)
def test_validation_is_the_same_on_any_number_of_ranks(runs: Plan, name: str):
    """Equal to the bit, even if the last batch is not full."""
    seen = []
    for ranks in (1, 2, 4):
        record = records(runs[f"{name} valid {ranks}"], "valid")[0]
        seen.append({key: value for key, value in record.items() if key not in ("time", "dt")})
    assert seen[0] == seen[1] == seen[2] and seen[0]["loss"] > 0
    if "sft" in name:
        # The same weights as in the run's own last validation.
        assert seen[0]["loss"] == records(runs[f"{name} 1x8x1"], "valid")[-1]["loss"]


def test_the_reference_is_the_same_on_any_number_of_ranks(data: Data, runs: Plan):
    """Each number of ranks computed one reference, which all its runs read: the files are equal to the bit."""
    assert losses(runs["dpo sigmoid 4x2x4"])
    for split in ("train", "valid"):
        contents = []
        for ranks in (1, 2, 4):
            (path,) = (data.home / f"dpo-{ranks}" / "reference").glob(f"{split}-*")
            contents.append(path.read_bytes())
        assert contents[0] == contents[1] == contents[2] and len(contents[0]) > 100


def die_in_step(case: list[str], step: int) -> None:
    """All ranks are killed after `step` steps."""
    original = trainer_module.Trainer._step

    def dying(self) -> bool:
        if self.progress.step == step:
            # The save before must be whole: on a slow disk it could still be in flight.
            self.saves.settle(must=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    trainer_module.Trainer._step = dying
    train_my_ddp.main(case)


@pytest.fixture(scope="module")
def survivors(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """Case -> flags of an undisturbed run, and of one that was killed after step 3 and went on; with dropout."""
    home = tmp_path_factory.mktemp("survivors")
    runs, cases = {}, []
    for name in ("sft packed", "dpo kto_pair"):
        task, more = CASES[name]
        flags = [*data.flags(task), *more, DROPOUT, "--save_interval=2", "--max_iters=5"]
        whole, killed = (elsewhere(flags, home / f"{name} {kind}") for kind in ("whole", "killed"))
        run_ranks(2, die_in_step, killed, 3, may_die=True)
        assert [c.step for c in ckpt.list_checkpoints(out_dir(killed) / "ckpt")] == [2]
        cases += [whole, [*killed, "--resume"]]
        runs[name] = (whole, killed)
    assert run_ranks(2, run_cases, cases) == [[0] * len(cases)] * 2
    return runs


@pytest.mark.parametrize("name", ["sft packed", "dpo kto_pair"])
def test_killed_runs_go_on_with_the_same_bits(survivors: dict[str, tuple[list[str], list[str]]], name: str):
    whole, killed = survivors[name]
    assert records(killed, "start")[-1]["parent_ckpt"] == "step-2"
    for figure in ("loss", "grad_norm", "digest", "samples"):
        assert [r[figure] for r in records(killed, "train")] == [r[figure] for r in records(whole, "train")]
    assert len(losses(whole)) == 5 and records(killed, "valid")[-1]["loss"] == records(whole, "valid")[-1]["loss"]
    assert same_bits(final_state(killed, 5), final_state(whole, 5))


def tokenize_slowly(case: list[str]) -> list:
    """Program of a rank: a run on raw records, whose tokenizing takes long enough for all ranks to come to it. Returns
    [exit code, how often this rank tokenized, whether a group existed by then]."""
    original, calls, groups = raw_records.process_corpus, [], []

    def slow(*arguments):
        calls.append(1)
        groups.append(dist.is_initialized())
        time.sleep(1.0)
        return original(*arguments)

    raw_records.process_corpus = slow
    return [train_my_ddp.main(case), len(calls), any(groups)]


def test_two_ranks_tokenize_raw_records_once(data: Data, tmp_path: Path):
    raw = shutil.copytree(data.raw["dpo"], tmp_path / "raw")
    flags = [*with_data(elsewhere(data.flags("dpo"), tmp_path / "run"), raw), "--valid_ratio=0.3"]
    answers = run_ranks(2, tokenize_slowly, flags)
    assert [code for code, _, _ in answers] == [0, 0]
    assert sum(calls for _, calls, _ in answers) == 1 and not any(group for _, _, group in answers)
    (made,) = (raw / ".tokenized").iterdir()
    assert (made / "pretokenize.json").exists() and not list(made.glob("*.tmp*"))
    # The same as on tokens made beforehand.
    before = elsewhere(data.flags("dpo"), tmp_path / "before")
    assert run_ranks(2, run_cases, [before]) == [[0]] * 2
    assert losses(before) == losses(flags)

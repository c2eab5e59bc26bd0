"""Mixtures of experts on several gloo ranks: one trajectory, however the batch is split, shared and stopped."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint.folder import list_checkpoints
from model import Decoder, ModelConfig, hf
from tests.conftest import SEQ_LEN
from tests.dist.test_parallel_runs import (
    EVERYTHING,
    FREE,
    GATHER,
    MUON,
    POWERSGD,
    ZERO1,
    Plan,
    checkpoint,
    optimizer_state,
    weights_of,
)
from tests.runs import losses, records, relative_difference, same_bits
from tests.unit.test_sft_train import SEQ_LEN as CHAT_LEN
from tests.unit.test_sft_train import conversations, pretokenize, train_tokenizer, write_dpo, write_sft

STEPS = 4
SHAPE = [
    "--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=2", "--intermediate_size=48",
    "--num_local_experts=4", "--router_aux_loss_coef=0.1", "--router_z_loss_coef=0.01", "--initializer_range=0.05",
]  # fmt: skip
MIXTRAL = ["--model_type=mixtral", *SHAPE]
BIASED = ["--model_type=ernie4_5_moe", "--num_shared_experts=1", "--router_bias_update_rate=0.001", *SHAPE]
CHECKPOINTING = "--gradient_checkpointing"
SPLITS = [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 4, 2), (2, 2, 4), (4, 2, 4), (4, 1, 8)]
"""(ranks, samples per micro-batch, micro-batches per step)."""
SOME_SPLITS = [(1, 8, 1), (1, 1, 8), (2, 2, 4), (4, 2, 4)]
CASES = {
    "mixtral": ("pretrain", MIXTRAL),
    "biased": ("pretrain", BIASED),
    "sft packed": ("sft", ["--router_bias_update_rate=0.01"]),
    "sft padded": ("sft", ["--router_bias_update_rate=0.01", "--no-packing", CHECKPOINTING]),
    "dpo": ("dpo", ["--router_bias_update_rate=0.01"]),
}


def splits_of(name: str) -> list[tuple[int, int, int]]:
    return SPLITS if name == "biased" else SOME_SPLITS


LAYOUTS: dict[str, tuple[list[str], str | None]] = {
    "plain": ([], None),
    "naive": (["--ddp_impl=naive"], "plain"),
    "one bucket": (["--disable_bucketing", "--no-overlap_grad_reduce"], "plain"),
    "zero1": ([ZERO1], "plain"),
    "zero1 gather": ([ZERO1, GATHER], "plain"),
    "checkpointing": ([CHECKPOINTING], "plain"),
    "checkpointing matmuls": ([CHECKPOINTING, "--checkpoint_keeps=matmuls", ZERO1], "plain"),
    "free": ([FREE], None),
    "everything": (EVERYTHING, "free"),
    "muon": ([MUON], None),
    "muon zero1": ([MUON, ZERO1, GATHER], "muon"),
    "powersgd": (POWERSGD, None),
    "powersgd zero1": ([*POWERSGD, ZERO1], "powersgd"),
    "bf16": (["--dtype=bfloat16"], None),
    "bf16 zero1": (["--dtype=bfloat16", ZERO1, GATHER], "bf16"),
}
"""Name -> flags, and the layout whose bits it must have on 2 ranks, if any; with the bias."""


class Data:
    """Pretokenized directories, and weights of a model with experts for SFT and DPO."""

    def __init__(self, home: Path, pretrain: Path):
        tokenizer = train_tokenizer()
        tokenizer.save_pretrained(home / "tokenizer")
        self.dirs, self.weights = {"pretrain": pretrain}, home / "weights"
        for task, write in (("sft", write_sft), ("dpo", write_dpo)):
            raw = write(home / f"raw-{task}", conversations(60))
            self.dirs[task] = pretokenize(raw, home / "tokenizer", home / task, task, "--valid_ratio", "0.3")
        config = ModelConfig(
            model_type="ernie4_5_moe", vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=CHAT_LEN, num_local_experts=4, num_shared_experts=1,
            router_bias=True, rope_interleaved=True, initializer_range=0.1,
        ).resolve()  # fmt: skip
        model = Decoder(config)
        model.initialize(7)
        self.weights.mkdir()
        save_file(hf.named_weights(model), self.weights / "model.safetensors", {"format": "pt"})
        (self.weights / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
        tokenizer.save_pretrained(self.weights)

    def flags(self, task: str) -> list[str]:
        """A run with a global batch of 8 samples, saved at every step."""
        more = [f"--max_seq_len={SEQ_LEN}"]
        if task != "pretrain":
            more = [f"--max_seq_len={CHAT_LEN}", f"--init_from={self.weights}", f"--task_type={task}"]
        return [
            f"--data_dir={self.dirs[task]}", "--out_dir=-", "--dtype=float32", "--device=cpu", "--valid_iters=2",
            f"--max_iters={STEPS}", "--learning_rate=1e-3", "--num_threads=1", "--sample_texts=0", "--save_interval=1",
            "--keep_last=9", "--bucket_size=10000", "--dist_timeout=60", *more,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs by "case ranks x batch x steps", and by layout."""
    home = tmp_path_factory.mktemp("runs")
    data, plan = Data(tmp_path_factory.mktemp("data"), data_dir), Plan([], home)
    for name, (task, more) in CASES.items():
        plan.flags = data.flags(task)
        for ranks, batch, steps in splits_of(name):
            split = [f"--train_batch_size={batch}", f"--gradient_accumulation_steps={steps}"]
            plan.add(f"{name} {ranks}x{batch}x{steps}", ranks, [*split, *more])
    plan.flags = [*data.flags("pretrain"), *BIASED]
    for name, (more, _) in LAYOUTS.items():
        flags = plan.add(name, 2, more)
        if name in ("plain", "zero1 gather", "muon zero1", "powersgd", "bf16 zero1"):
            plan.resume(f"resumed {name}", flags, 2, more, keep=2)
    plan.resume("plain resumed by zero1", plan.jobs["plain"]["flags"], 2, [ZERO1], keep=2)
    plan.add("nan", 2, [], "nan 3")
    plan.run()
    return plan


def biases_of(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights_of(flags, step).items() if "e_score_correction_bias" in name}


def first_gradient(flags: list[str]) -> torch.Tensor:
    """Gradient of the first step, up to a factor: Adam's mean after it."""
    state = optimizer_state(flags, 1)
    return torch.cat([state[name].double() for name in sorted(state) if name.endswith("/exp_avg")])


@pytest.mark.parametrize("name", CASES)
def test_one_trajectory(runs: Plan, name: str):
    """Ranks, micro-batches and accumulation change nothing beyond float32's rounding: neither the routers' losses in
    the gradient, nor the load, nor the biases that follow it."""
    alone = runs[f"{name} 1x8x1"]
    expected, experts, gradient = records(alone, "train"), records(alone, "experts"), first_gradient(alone)
    assert len(expected) == len(experts) == STEPS
    for ranks, batch, steps in splits_of(name)[1:]:
        case, where = runs[f"{name} {ranks}x{batch}x{steps}"], (ranks, batch, steps)
        trained = records(case, "train")
        assert [r["digest"] for r in trained] == [r["digest"] for r in expected], where
        assert (first_gradient(case) - gradient).norm() <= 1e-6 * gradient.norm(), where
        assert losses(case) == pytest.approx(losses(alone), rel=1e-5), where
        assert relative_difference(weights_of(case, STEPS), weights_of(alone, STEPS)) < 1e-3, where
        for ours, theirs in zip(records(case, "experts"), experts):
            for figure in ("balance_loss", "z_loss", "entropy"):
                assert ours[figure] == pytest.approx(theirs[figure], rel=1e-5), (where, figure)
            assert ours["load_by_layer"] == theirs["load_by_layer"], where
        assert same_bits(biases_of(case, STEPS), biases_of(alone, STEPS)), where


def test_the_cases_are_what_they_claim(runs: Plan):
    """The routers' losses and biases take part, and experts differ in load."""
    for name in CASES:
        for figures in records(runs[f"{name} 1x8x1"], "experts"):
            assert figures["balance_loss"] > 1.0 and figures["load_highest"] > 1.1 and figures["z_loss"] > 0
            assert all(sum(shares) == pytest.approx(1.0, abs=1e-3) for shares in figures["load_by_layer"])
    for name in CASES.keys() - {"mixtral"}:
        biases = torch.cat(list(biases_of(runs[f"{name} 1x8x1"], STEPS).values()))
        assert biases.any() and biases.abs().max() <= 0.01 * STEPS + 1e-6
    assert not biases_of(runs["mixtral 1x8x1"], STEPS)


@pytest.mark.parametrize("name", [name for name, (_, base) in LAYOUTS.items() if base])
def test_layouts_have_the_same_bits(runs: Plan, name: str):
    run, base = runs[name], runs[LAYOUTS[name][1]]
    assert losses(run) == losses(base) and len(losses(run)) == STEPS
    assert [r["loss"] for r in records(run, "valid")] == [r["loss"] for r in records(base, "valid")]
    loads = [[r["load_by_layer"] for r in records(each, "experts")] for each in (run, base)]
    assert loads[0] == loads[1]
    assert same_bits(weights_of(run, STEPS), weights_of(base, STEPS))
    assert same_bits(optimizer_state(run, STEPS), optimizer_state(base, STEPS))


@pytest.mark.parametrize(("name", "whole"), [
    ("resumed plain", "plain"), ("resumed zero1 gather", "zero1 gather"), ("resumed muon zero1", "muon zero1"),
    ("resumed powersgd", "powersgd"), ("resumed bf16 zero1", "bf16 zero1"), ("plain resumed by zero1", "plain"),
])  # fmt: skip
def test_a_killed_run_goes_on_with_the_same_bits(runs: Plan, name: str, whole: str):
    """Also the biases, which no optimizer keeps: they come from the model's file, in float32 whatever the dtype."""
    assert [r["step"] for r in records(runs[name], "start")] == [0, 2]
    assert losses(runs[name]) == losses(runs[whole])
    assert same_bits(weights_of(runs[name], STEPS), weights_of(runs[whole], STEPS))
    with safe_open(checkpoint(runs[name], 2) / "model.safetensors", "pt") as file:
        biases = [file.get_tensor(key) for key in file.keys() if "e_score_correction_bias" in key]  # noqa: SIM118
    assert len(biases) == 2 and all(bias.dtype == torch.float32 and bias.any() for bias in biases)


def test_a_skipped_step_leaves_the_biases(runs: Plan):
    """The third step was skipped, and not saved. So there is one step of the biases between the saves around it."""
    before, after = (torch.cat(list(biases_of(runs["nan"], step).values())) for step in (2, 4))
    assert [c.step for c in list_checkpoints(checkpoint(runs["nan"], 2).parent)] == [1, 2, 4]
    assert 0 < (after - before).abs().max() < 0.0011

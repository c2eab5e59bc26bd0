"""Adapters on several gloo ranks: one trajectory, however the batch is split, shared and stopped."""


import pytest
import torch
from safetensors.torch import load_file

from model.adapters.folder import TENSORS
from tests.dist.test_parallel_runs import GATHER, POWERSGD, ZERO1, Plan, checkpoint, hook_state, optimizer_state
from tests.runs import losses, records, relative_difference, same_bits
from tests.unit.test_sft_train import SEQ_LEN, Home

STEPS = 4
LORA = ["--lora_r=4", "--lora_target_modules=all-linear", "--lora_dropout=0.1"]
DORA = [*LORA, "--use_dora", "--lora_modules_to_save=embed_tokens"]
SPLITS = [(1, 8, 1), (1, 2, 4), (2, 4, 2), (4, 2, 4)]
"""(ranks, samples per micro-batch, micro-batches per step); a step has 8 rows."""
CASES = {"sft packed": ("sft", DORA), "dpo": ("dpo", LORA)}
LAYOUTS: dict[str, tuple[list[str], str | None]] = {
    "plain": ([], None),
    "zero1": ([ZERO1, GATHER], "plain"),
    "checkpointing": (["--gradient_checkpointing"], "plain"),
    "powersgd": ([*POWERSGD, "--min_compression_rate=0"], None),
    "powersgd zero1": ([*POWERSGD, "--min_compression_rate=0", ZERO1], "powersgd"),
    "bf16": (["--dtype=bfloat16"], None),
    "bf16 zero1": (["--dtype=bfloat16", ZERO1], "bf16"),
}
"""Name -> flags, and the layout whose bits it must have on 2 ranks, if any."""
KILLED = ("zero1", "powersgd", "bf16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs by "case ranks x rows", and by layout."""
    home, plan = Home(tmp_path_factory.mktemp("data")), Plan([], tmp_path_factory.mktemp("runs"))
    for name, (task, more) in CASES.items():
        plan.flags = [
            f"--task_type={task}", f"--data_dir={home.sft if task == 'sft' else home.dpo}", "--out_dir=-",
            f"--init_from={home.model}", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
            f"--max_iters={STEPS}", "--learning_rate=1e-3", "--num_threads=1", "--save_interval=1", "--keep_last=9",
            "--bucket_size=4000", "--dist_timeout=60", *more,
        ]  # fmt: skip
        for ranks, batch, steps in SPLITS:
            split = [f"--train_batch_size={batch}", f"--gradient_accumulation_steps={steps}"]
            plan.add(f"{name} {ranks}x{batch}", ranks, split)
        if task == "sft":
            for layout, (flags, _) in LAYOUTS.items():
                begun = plan.add(layout, 2, flags)
                if layout in KILLED:
                    plan.resume(f"resumed {layout}", begun, 2, flags, keep=2)
            plan.resume("zero1 resumed on 4", plan.jobs["zero1"]["flags"], 4, [ZERO1], keep=2)
            plan.resume("powersgd resumed on 1", plan.jobs["powersgd"]["flags"], 1, LAYOUTS["powersgd"][0], keep=2)
        else:
            plan.resume("resumed dpo", plan.jobs["dpo 2x4"]["flags"], 2, [], keep=2)
    plan.run()
    return plan


def adapter_of(flags: list[str], step: int = STEPS) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint(flags, step) / TENSORS)
    return {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_one_trajectory(runs: Plan, name: str):
    """Ranks, micro-batches and accumulation change nothing beyond float32's rounding, also in what dropout leaves."""
    alone = runs[f"{name} 1x8"]
    for ranks, batch, _ in SPLITS[1:]:
        case = runs[f"{name} {ranks}x{batch}"]
        assert [r["digest"] for r in records(case, "train")] == [r["digest"] for r in records(alone, "train")]
        assert losses(case) == pytest.approx(losses(alone), rel=1e-5), ranks
        assert relative_difference(adapter_of(case), adapter_of(alone)) < 1e-3, ranks


@pytest.mark.parametrize("name", [name for name, (_, base) in LAYOUTS.items() if base])
def test_layouts_have_the_same_bits(runs: Plan, name: str):
    run, base = runs[name], runs[LAYOUTS[name][1]]
    assert losses(run) == losses(base) and len(losses(run)) == STEPS
    assert same_bits(adapter_of(run), adapter_of(base))
    assert same_bits(optimizer_state(run, STEPS), optimizer_state(base, STEPS))


@pytest.mark.parametrize("layout", [*KILLED, "dpo"])
def test_a_killed_run_goes_on_with_the_same_bits(runs: Plan, layout: str):
    whole, resumed = runs["dpo 2x4" if layout == "dpo" else layout], runs[f"resumed {layout}"]
    assert [r["step"] for r in records(resumed, "start")] == [0, 2] and losses(resumed) == losses(whole)
    assert same_bits(adapter_of(resumed), adapter_of(whole))
    assert same_bits(optimizer_state(resumed, STEPS), optimizer_state(whole, STEPS))
    memory = hook_state(whole, STEPS)
    assert same_bits(hook_state(resumed, STEPS), memory) and bool(memory) == (layout == "powersgd")


def test_it_goes_on_with_another_number_of_ranks(runs: Plan):
    assert losses(runs["zero1 resumed on 4"]) == pytest.approx(losses(runs["zero1"]), rel=1e-5)
    assert losses(runs["powersgd resumed on 1"])[:3] == pytest.approx(losses(runs["powersgd"])[:3], rel=1e-4)


def test_nothing_of_the_base_is_trained_or_saved(runs: Plan):
    for step in (1, STEPS):
        names = {name.partition("/")[0] for name in optimizer_state(runs["zero1"], step)}
        assert names and all(".lora_" in name or name == "embed_tokens.weight" for name in names)
        assert not list(checkpoint(runs["zero1"], step).glob("model*.safetensors"))

"""Whole runs on meshes: what lies around the steps is that of one process. Validation, samples of text, the reference
of DPO, counts of tokens and parameters."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.test_fsdp_runs import Home
from tests.dist.test_parallel_runs import Plan
from tests.runs import losses, out_dir, records

pytestmark = pytest.mark.slow

STEPS = 3
TENSOR, PIPE = "--tensor_model_parallel_size=2", "--pipeline_model_parallel_size=2"
WAYS = {
    "tensor x pipe": (4, [TENSOR, "--sequence_parallel", PIPE]),
    "data x pipe": (4, [PIPE, "--use_distributed_optimizer"]),
    "data x context": (4, ["--context_parallel_size=2"]),
}
LORA = ["--lora_r=4", "--lora_target_modules=all-linear"]


@pytest.fixture(scope="module")
def home(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("data"), data_dir)


@pytest.fixture(scope="module")
def runs(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs "kind" of one process, and "kind | way"."""
    plan = Plan([], tmp_path_factory.mktemp("runs"))
    for way, (ranks, flags) in {"": (1, []), **WAYS}.items():
        name = f" | {way}" if way else ""
        plan.flags = [*home.flags("plain"), f"--max_iters={STEPS}"]
        plan.add(f"plain{name}", ranks, flags)
        plan.add(f"valid{name}", ranks, [f"--init_from={plan.home / 'plain'}", "--valid_only", *flags])
        # Each has its own data, so also its own reference.
        data = shutil.copytree(home.data.tokens["dpo"], home.data.home / f"dpo {way}")
        rest = [flag for flag in home.flags("dpo sigmoid") if not flag.startswith("--data_dir=")]
        plan.flags = [*rest, f"--data_dir={data}", f"--max_iters={STEPS}", *LORA]
        plan.add(f"dpo{name}", ranks, flags)
    plan.run()
    return plan


@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_a_mesh_tells_what_one_process_tells(runs: Plan, way: str):
    for kind in ("plain", "dpo"):
        run, alone = runs[f"{kind} | {way}"], runs[kind]
        ours, theirs = records(run, "train"), records(alone, "train")
        for figure in ("digest", "samples", "tokens", "lr"):
            assert [r[figure] for r in ours] == [r[figure] for r in theirs], figure
        assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
        for figure in ("mfu", "mfu_seed"):
            # The peak of all ranks, and FLOPs of the whole model.
            ratio = [r[figure] / r["tokens_per_sec"] for r in (ours[0], theirs[0])]
            assert ratio[0] * len(runs.jobs[f"{kind} | {way}"]["codes"]) == pytest.approx(ratio[1], rel=1e-6)
        last, its = records(run, "valid")[-1], records(alone, "valid")[-1]
        assert last.keys() == its.keys() and last["loss"] == pytest.approx(its["loss"], rel=1e-5)
        lines = [(out_dir(flags) / "train.log").read_text() for flags in (run, alone)]
        for begin in ("model: ", "adapter: ") if kind == "dpo" else ("model: ",):
            told = [re.search(f"{begin}.*", text)[0] for text in lines]
            assert told[0] == told[1]


@pytest.mark.parametrize("way", WAYS)
def test_validation_and_samples(runs: Plan, way: str):
    """Of the same weights: the same loss but for rounding, of as many tokens, and the same texts."""
    run, alone = runs[f"valid | {way}"], runs["valid"]
    (ours,), (theirs,) = records(run, "valid"), records(alone, "valid")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6) and ours["tokens"] == theirs["tokens"]
    texts = [[(r["prompt"], r["text"]) for r in records(flags, "sample")] for flags in (run, alone)]
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.parametrize("way", WAYS)
def test_the_reference_is_the_same(runs: Plan, home: Home, way: str):
    found = []
    for name in (way, ""):
        files = sorted((home.data.home / f"dpo {name}" / "reference").glob("*.safetensors"))
        assert [file.name.partition("-")[0] for file in files] == ["train", "valid"]
        found.append([load_file(file)["log_probs"] for file in files])
    for ours, theirs in zip(*found):
        assert (theirs < 0).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

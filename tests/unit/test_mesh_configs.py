"""configs/meshes: each file's mesh divides its model, and what a rank holds fits its GPU by the formula."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import train_my_ddp
from configurator import parse_config
from model.memory import GB, RESERVE, Estimate, TrainingPlan, estimate
from parallel.mesh import Mesh, plan
from tests.conftest import SEQ_LEN
from tests.dist.group import run_ranks, use_new_port
from tests.runs import losses
from training.config import Config, resolve

ROOT = Path(__file__).resolve().parent.parent.parent
ROOM = ROOT / "configs" / "meshes"
NAMES = sorted(path.stem for path in ROOM.glob("*.yaml"))
INIT = ["--init_from=BASE"]


def config_of(name: str, *flags: str) -> Config:
    text = (ROOM / f"{name}.yaml").read_text(encoding="utf-8")
    return parse_config([str(ROOM / f"{name}.yaml"), "--data_dir=O", *(INIT if "lora_r" in text else []), *flags])[0]


def machines_of(name: str) -> tuple[int, int]:
    """GPUs, and GB of each."""
    ranks, room = re.fullmatch(r".*-(\d+)x(\d+)gb", name).groups()
    return int(ranks), int(room)


def mesh_of(name: str, config: Config) -> Mesh:
    places = [(rank % 8, 8) for rank in range(machines_of(name)[0])]
    return plan(config.parallel, 0, places)


def estimate_of(name: str, config: Config) -> Estimate:
    flags, mesh = config.parallel, mesh_of(name, config)
    return estimate(config.model, TrainingPlan(
        dtype=config.system.dtype, optimizer=config.optimizer.optimizer, adapter=config.adapter,
        train_batch_size=config.data.train_batch_size, max_seq_len=config.data.max_seq_len,
        gradient_checkpointing=config.system.gradient_checkpointing, checkpoint_keeps=config.system.checkpoint_keeps,
        grad_reduce_in_fp32=flags.grad_reduce_in_fp32, offload_optimizer=config.optimizer.offload_optimizer,
        ranks=mesh.data_size if flags.use_distributed_optimizer else 1,
        tensor_model_parallel_size=mesh.tensor_size, sequence_parallel=flags.sequence_parallel,
        pipeline_model_parallel_size=mesh.pipe_size, pipeline_schedule=flags.pipeline_schedule,
        pipeline_micro_batches=config.data.gradient_accumulation_steps // mesh.data_size,
        expert_model_parallel_size=mesh.expert_size,
    ))  # fmt: skip


def test_there_is_one_for_each_model_and_machine():
    models, machines = ("13b", "70b", "7b", "8x7b"), ("16x80gb", "8x24gb", "8x80gb")
    assert NAMES == sorted(f"{model}-{machine}" for model in models for machine in machines)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_fits_its_gpu(name: str):
    """README has the figures."""
    config = config_of(name)
    resolve(config, mesh_of(name, config).data_size, num_train_samples=1_000_000)
    found, (_, room) = estimate_of(name, config), machines_of(name)
    assert found.fits(room), found.peak / GB
    row = next(line for line in (ROOT / "configs/README.md").read_text().splitlines() if f"`{name}`" in line)
    assert f"| {found.peak / GB:.1f} |" in row, f"{found.peak / GB:.1f}, {room - RESERVE:.1f}, {row}"


@pytest.mark.parametrize(("name", "changes", "why"), [
    ("13b-8x24gb", {"offload_optimizer": False}, "state"), ("70b-8x24gb", {"lora_r": None}, "all weights"),
    ("70b-8x80gb", {"offload_optimizer": False}, "state"), ("8x7b-8x24gb", {"lora_r": None}, "all weights"),
    ("8x7b-8x80gb", {"optimizer": "adamw"}, "moments"),
])  # fmt: skip
def test_what_the_files_say_does_not_fit_does_not(name: str, changes: dict, why: str):
    config = config_of(name)
    groups = {group: replace(its, **{n: v for n, v in changes.items() if hasattr(its, n)})
              for group, its in vars(config).items() if group in ("optimizer", "adapter")}  # fmt: skip
    assert not estimate_of(name, replace(config, **groups)).fits(machines_of(name)[1]), why


def test_the_launcher_names_what_is_missing(tmp_path: Path):
    """And builds the command; here `python` only prints it."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/bash\necho python \"$@\"\n")
    fake.chmod(0o755)
    script = tmp_path / "configs" / "meshes" / "train.sh"
    script.parent.mkdir(parents=True)
    script.write_text((ROOM / "train.sh").read_text())
    script.chmod(0o755)
    for name in NAMES:
        (script.parent / f"{name}.yaml").touch()
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*argv: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(script), *argv], env=env, capture_output=True, text=True)

    assert run("7b").returncode == 2 and "give one of 13b-16x80gb 13b-8x24gb" in run("7b").stderr
    missing = run("70b-16x80gb", "--data_dir=O", "--out_dir=R")
    assert missing.returncode == 2 and "HOSTS is missing" in missing.stderr
    assert run("13b-8x24gb", "--data_dir=O", "--out_dir=R").stdout.split() == [
        "python", "monitor_process.py", "--", "python", "-m", "parallel.launch", "--nproc_per_node=8",
        "train_my_ddp.py", "configs/meshes/13b-8x24gb.yaml", "--data_dir=O", "--out_dir=R",
    ]  # fmt: skip


REDUCED = (
    "--hidden_size=64", "--intermediate_size=128", "--num_hidden_layers=6", "--num_attention_heads=8",
    "--num_key_value_heads=8", "--vocab_size=512", "--dtype=float32", "--device=cpu", "--num_threads=1",
    "--max_iters=2", "--valid_iters=8", "--sample_texts=0", "--gradient_accumulation_steps=8",
)  # fmt: skip


def run_in_turn(commands: list[list[str]]) -> list[int]:
    codes = []
    for argv in commands:
        use_new_port()
        codes.append(train_my_ddp.main(argv))
    return codes


@pytest.mark.soak
def test_each_mesh_trains_a_small_model_on_eight_processes(data_dir: Path, tmp_path: Path):
    """Of the meshes of 16, the largest dimension is halved. Adapters stand on what the others have trained; all losses
    of a shape are the same."""
    commands, begun = [], {}
    for name in sorted(NAMES, key=lambda name: "lora_r" in (ROOM / f"{name}.yaml").read_text()):
        kind, flags = "experts" if name.startswith("8x7b") else "dense", []
        is_lora = "lora_r" in (ROOM / f"{name}.yaml").read_text()
        config = config_of(name)
        if machines_of(name)[0] == 16:
            flags = [f"--{dim}_model_parallel_size={size // 2}" for dim in ("tensor", "expert")
                     if (size := getattr(config.parallel, f"{dim}_model_parallel_size")) == 8]  # fmt: skip
        if is_lora:
            flags.append(f"--init_from={begun[kind]}")
        elif name != "8x7b-8x80gb":
            begun[kind] = tmp_path / name
        commands.append([str(ROOM / f"{name}.yaml"), f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}",
                         f"--max_seq_len={SEQ_LEN}", *REDUCED, *flags])  # fmt: skip
    for codes in run_ranks(8, run_in_turn, commands):
        assert codes == [0] * len(commands)
    first = {name: losses([f"--out_dir={tmp_path / name}"])[0] for name in NAMES}
    for kind in ("dense", "experts"):
        same = [loss for name, loss in first.items() if name.startswith("8x7b") == (kind == "experts")
                and "lora_r" not in (ROOM / f"{name}.yaml").read_text()]  # fmt: skip
        assert max(same) - min(same) < 1e-5, first

"""Whole runs with every hook, ZeRO-1 and overlap: one trajectory, also after a resume, in another mode, on other ranks.

Four processes are spawned once per fixture and work through many runs, each on the first 1, 2 or 4 of them.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train_my_ddp
import training.trainer as trainer_module
from checkpoint import folder as ckpt
from evaluation.own import TASKS
from model import flops
from model.families.llama import LLAMA
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from parallel import Zero1, data_parallel
from parallel.listen import LOOPBACK, bind, serve_store
from runs.exits import CRASH, read_exit_records
from runs.traces import StepPart, Trace, figures_of, read_trace
from tasks.language_model import LanguageModelTask
from tasks.reference import ReferenceCache
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import forget_meshes, run_ranks
from tests.eval_tasks import Scores, Texts
from tests.runs import elsewhere, losses, out_dir, records, relative_difference, same_bits
from training import build_model, samples
from training.meter import StepMeter

STEPS = 6
ZERO1, GATHER = "--use_distributed_optimizer", "--overlap_param_gather"
STEP, STEP_ZERO, FREE = "--overlap_optim_step", "--overlap_zero_grad_buffer", "--grad_clip=0"
POWERSGD = ["--use_powerSGD_hook", "--matrix_approximation_rank=4", "--powerSGD_log_interval=2"]
FULL_RANK = [*POWERSGD, "--matrix_approximation_rank=64", "--min_compression_rate=0"]
IN_BUFFER = "--grad_buffer_is_powerSGD_error"
BF16, FP16 = "--use_bf16_compress_hook", "--use_fp16_compress_hook"
BF16_WEIGHTS, NARROW = "--dtype=bfloat16", "--no-grad_reduce_in_fp32"
MUON, OFFLOAD = "--optimizer=muon", "--offload_optimizer"
ADAMW_8BIT, LION_8BIT = "--optimizer=adamw8bit", "--optimizer=lion8bit"
EVERYTHING = [ZERO1, GATHER, STEP, STEP_ZERO, FREE]
ACCUMULATED = ["--train_batch_size=2", "--gradient_accumulation_steps=4"]

SPLITS = {1: (8, 1), 2: (4, 2), 3: (2, 3), 4: (2, 4), 8: (1, 8)}
"""Ranks -> (rows per micro-batch, micro-batches per step) of each rank. (3 ranks only load and save.)"""

MODES: dict[str, tuple[list[str], str | None]] = {
    "plain": ([], None),
    "zero1": ([ZERO1], "plain"),
    "zero1 gather": ([ZERO1, GATHER], "plain"),
    "zero1 one bucket": ([ZERO1, "--disable_bucketing", "--no-overlap_grad_reduce"], "plain"),
    "zero1 offloaded": ([ZERO1, GATHER, OFFLOAD], "plain"),
    "powersgd of nothing": ([*POWERSGD, "--min_compression_rate=1000"], "plain"),
    "free": ([FREE], None),
    "step": ([STEP, FREE], "free"),
    "step zero": ([STEP, STEP_ZERO, FREE], "free"),
    "everything": (EVERYTHING, "free"),
    "bf16": ([BF16], None),
    "bf16 zero1": ([BF16, ZERO1, GATHER], "bf16"),
    "fp16": ([FP16], None),
    "fp16 zero1": ([FP16, ZERO1], "fp16"),
    "powersgd": (POWERSGD, None),
    "powersgd zero1": ([*POWERSGD, ZERO1, GATHER], "powersgd"),
    "powersgd in buffer": ([*POWERSGD, IN_BUFFER], "powersgd"),
    "powersgd in buffer zero1": ([*POWERSGD, IN_BUFFER, ZERO1], "powersgd"),
    "powersgd in buffer zero1 offloaded": ([*POWERSGD, IN_BUFFER, ZERO1, OFFLOAD], "powersgd"),
    "powersgd free": ([*POWERSGD, FREE], None),
    "powersgd in buffer everything": ([*POWERSGD, IN_BUFFER, *EVERYTHING], "powersgd free"),
    "accumulated": (ACCUMULATED, None),
    "accumulated everything": ([*ACCUMULATED, *EVERYTHING], None),
    "accumulated powersgd in buffer": ([*ACCUMULATED, *POWERSGD, IN_BUFFER, ZERO1, GATHER], None),
    "powersgd bf16": ([*POWERSGD, BF16], None),
    "powersgd bf16 zero1": ([*POWERSGD, BF16, ZERO1, IN_BUFFER], "powersgd bf16"),
    "powersgd fp16": ([*POWERSGD, FP16], None),
    "powersgd from 3": ([*POWERSGD, "--start_powerSGD_iter=3"], None),
    "powersgd from 5": ([*POWERSGD, "--start_powerSGD_iter=5", BF16], None),
    "powersgd from 5 zero1": ([*POWERSGD, "--start_powerSGD_iter=5", BF16, IN_BUFFER, ZERO1], "powersgd from 5"),
    "powersgd fixed Q": ([*POWERSGD, "--use_fixed_Q"], None),
    "powersgd fresh fixed Q": ([*POWERSGD, "--use_fixed_Q", "--no-warm_start"], None),
    "powersgd fresh Q": ([*POWERSGD, "--no-warm_start"], None),
    "powersgd forgetful": ([*POWERSGD, "--no-use_error_feedback"], None),
    "powersgd without embedding": ([*POWERSGD, "--powerSGD_exclude=embed_tokens,down_proj"], None),
    "full rank": (FULL_RANK, None),
    "bf16 weights": ([BF16_WEIGHTS], None),
    "bf16 weights zero1": ([BF16_WEIGHTS, ZERO1, GATHER], "bf16 weights"),
    "narrow": ([BF16_WEIGHTS, NARROW], None),
    "narrow zero1": ([BF16_WEIGHTS, NARROW, ZERO1], "narrow"),
    "narrow zero1 offloaded": ([BF16_WEIGHTS, NARROW, ZERO1, OFFLOAD], "narrow"),
    "narrow powersgd": ([BF16_WEIGHTS, NARROW, *POWERSGD], None),
    "narrow powersgd 16": ([BF16_WEIGHTS, NARROW, *POWERSGD, "--no-orthogonalize_in_float32", ZERO1], None),
    "fp16 weights powersgd": (["--dtype=float16", *POWERSGD], None),
    "fp16 weights powersgd zero1": (["--dtype=float16", *POWERSGD, ZERO1, GATHER], "fp16 weights powersgd"),
    "fp16 weights narrow muon": (["--dtype=float16", NARROW, MUON], None),
    "fp16 weights narrow muon zero1": (["--dtype=float16", NARROW, MUON, ZERO1], "fp16 weights narrow muon"),
    "muon": ([MUON], None),
    "muon naive": ([MUON, "--ddp_impl=naive"], "muon"),
    "muon zero1": ([MUON, ZERO1, GATHER], "muon"),
    "muon zero1 one bucket": ([MUON, ZERO1, "--disable_bucketing"], "muon"),
    "muon free": ([MUON, FREE], None),
    "muon step": ([MUON, STEP, STEP_ZERO, FREE], "muon free"),
    "muon powersgd": ([MUON, *POWERSGD], None),
    "muon powersgd in buffer zero1": ([MUON, *POWERSGD, IN_BUFFER, ZERO1], "muon powersgd"),
    "muon narrow": ([MUON, BF16_WEIGHTS, NARROW], None),
    "muon narrow zero1": ([MUON, BF16_WEIGHTS, NARROW, ZERO1], "muon narrow"),
    "8bit": ([ADAMW_8BIT], None),
    "8bit naive": ([ADAMW_8BIT, "--ddp_impl=naive"], "8bit"),
    "8bit zero1": ([ADAMW_8BIT, ZERO1, GATHER], "8bit"),
    "lion8bit narrow": ([LION_8BIT, BF16_WEIGHTS, NARROW, FREE], None),
    "lion8bit narrow everything": ([LION_8BIT, BF16_WEIGHTS, NARROW, *EVERYTHING], "lion8bit narrow"),
}
"""Name -> flags, and the mode whose bits it must have on 2 ranks, if any."""


@contextlib.contextmanager
def patched(what: str | None, weights: list[int]) -> Iterator[None]:
    """Patches of the special runs, on one rank; also collects a checksum of the weights at a run's end.

    slow          gathers and overlapped bucket steps take their time: code that does not wait reads old weights
    save          trains nothing, but saves what was loaded
    overflow N    the loss of step N is infinite on the last rank
    nan N         the loss of step N is NaN on the last rank, in training
    scale N       fp16's loss scale starts at 2**N
    network N     the network carries 10**N bytes a second
    nodes         each rank is on its own node, and gives the same warning at each step
    drift N       a bit of a weight flips on the last rank after step N
    choice        the last rank would take another implementation of attention
    first         also saves after the first step
    forgotten     the log-probabilities of DPO's reference are gone
    patience N    the first rank gives its samples N seconds, the others give theirs hours
    """
    kind, _, number = (what or "").partition(" ")
    trainer, task, rank = trainer_module.Trainer, LanguageModelTask, int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        # These take time and matter to no test here.
        patch.setattr(flops, "device_peak_flops", lambda *_: 1e11)
        patch.setattr(os, "fsync", lambda _: None)
        original_close = trainer.close

        def close(self) -> None:
            if self.engine.forward_is_collective:
                # Each rank has its own part of a model that is cut.
                weights.append(0)
                return original_close(self)
            flat = torch.cat([p.detach().flatten().view(torch.uint8) for p in self.model.parameters()])
            weights.append(zlib.crc32(flat.numpy().tobytes()))
            original_close(self)

        patch.setattr(trainer, "close", close)
        if kind == "slow":
            original_gather = Zero1.gather
            original_bucket = MixedPrecisionOptimizer.step_bucket

            def gather(self, bucket: int) -> None:
                self.ddp.comm_stream.submit(lambda: time.sleep(0.01))
                original_gather(self, bucket)

            def step_bucket(self, bucket: int, release: bool = False) -> None:
                time.sleep(0.01)
                original_bucket(self, bucket, release)

            patch.setattr(Zero1, "gather", gather)
            patch.setattr(MixedPrecisionOptimizer, "step_bucket", step_bucket)
        elif kind == "save":

            def save(self) -> int:
                self.meter = StepMeter(self.progress.samples_consumed)
                self._save(None, must=True)
                return 0

            patch.setattr(trainer, "train", save)
        elif kind in ("overflow", "nan") and rank == int(os.environ["WORLD_SIZE"]) - 1:
            original_call, original_step, at = task.__call__, trainer._step, [0]

            def step(self) -> bool:
                at[0] = self.progress.step + 1
                return original_step(self)

            def call(self, batch, *losses):
                loss_sum, count, metrics = original_call(self, batch, *losses)
                bad = at[0] == int(number) and self.model.training
                factor = float("nan" if kind == "nan" else "inf") if bad else 1.0
                return loss_sum * factor, count, metrics

            patch.setattr(trainer, "_step", step)
            patch.setattr(task, "__call__", call)
        elif kind == "drift" and rank == int(os.environ["WORLD_SIZE"]) - 1:
            original_finish = trainer._finish_step

            def finish_and_flip(self, *arguments: object) -> object:
                result = original_finish(self, *arguments)
                if self.progress.step + 1 == int(number):
                    self.engine.settle()
                    self.engine.ddp.flat_buffers.param_data.view(torch.int32)[99] ^= 1
                return result

            patch.setattr(trainer, "_finish_step", finish_and_flip)
        elif kind == "choice" and rank == int(os.environ["WORLD_SIZE"]) - 1:
            original_choice = build_model.choose_ops
            patch.setattr(build_model, "choose_ops", lambda *a: original_choice(*a) | {"attention": "plain"})
        elif kind == "scale":
            scaler, initial = LossScaler, 2.0 ** int(number)
            original_init = scaler.__init__
            patch.setattr(scaler, "__init__", lambda self, enabled: original_init(self, enabled, initial))
        elif kind == "nodes":
            quiet_step = trainer._step

            def warn_then_step(self) -> bool:
                logging.getLogger("test").warning("a strange noise")
                return quiet_step(self)

            patch.setattr(trainer, "_step", warn_then_step)
            patch.setenv("GROUP_RANK", str(rank))
        elif kind == "first":
            plain_step = trainer._step

            def save_the_first(self) -> bool:
                is_done = plain_step(self)
                if self.progress.step == 1:
                    self._save(None, must=True)
                return is_done

            patch.setattr(trainer, "_step", save_the_first)
        elif kind == "forgotten":
            patch.setattr(ReferenceCache, "read", lambda self: None)
        elif kind == "patience":
            patch.setattr(samples, "_PATIENCE_S", 9999.0 if rank else float(number))
        elif kind == "tasks":
            for task in (Scores(), Texts()):
                patch.setitem(TASKS, task.name, task)
        elif kind == "network":
            patch.setattr(data_parallel, "measure_bandwidth", lambda *_: 10.0 ** int(number))
        yield


stores: list[dist.TCPStore] = []
"""Stores of the runs in which the first rank took part; they stay open, because other ranks may leave a run later."""


def meet(port_file: Path, rank: int) -> None:
    """The first rank opens the store of the next run, and the others wait for it."""
    if rank == 0:
        stores.append(serve_store(bind(LOOPBACK, 0), 300.0))
        part = port_file.with_suffix(".part")
        part.write_text(str(stores[-1].port))
        os.replace(part, port_file)
    while not port_file.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = port_file.read_text()


def run_jobs(jobs: list[dict], meeting: str) -> list[dict | None]:
    """Program of a rank: its part of each run. Returns {"code", "weights" (a checksum)} for each, and None for a run
    that it has no part in."""
    rank, answers = int(os.environ["RANK"]), []
    for index, job in enumerate(jobs):
        if rank >= job["ranks"]:
            answers.append(None)
            continue
        if rank == 0 and "copy" in job and Path(job["copy"]).exists():
            copy_run(Path(job["copy"]), out_dir(job["flags"]), job["keep"])
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(job["ranks"])
        meet(Path(meeting) / str(index), rank)
        weights: list[int] = []
        with patched(job.get("patch"), weights):
            try:
                code = train_my_ddp.main(job["flags"])
            except Exception as error:
                code = f"{type(error).__name__}: {error}"
            if dist.is_initialized():
                dist.destroy_process_group()
        forget_meshes()
        answers.append({"code": code, "weights": weights})
    return answers


def copy_run(source: Path, target: Path, keep: int) -> None:
    """A copy of a run, as if it had been killed after the save of step `keep`."""
    shutil.copytree(source, target)
    for checkpoint in ckpt.list_checkpoints(target / "ckpt"):
        if checkpoint.step > keep:
            shutil.rmtree(checkpoint.path)


class Plan:
    """Runs to be made, then their results: plan[name] has the flags of a run that succeeded.

    Args:
        ranks: processes that are spawned.
    """

    def __init__(self, flags: list[str], home: Path, ranks: int = 4):
        self.flags, self.home, self.ranks = flags, home, ranks
        self.jobs: dict[str, dict] = {}

    def add(self, name: str, ranks: int, mode: list[str], patch: str | None = None) -> list[str]:
        batch, steps = SPLITS[ranks]
        flags = [*elsewhere(self.flags, self.home / name), f"--train_batch_size={batch}",
                 f"--gradient_accumulation_steps={steps}", *mode]  # fmt: skip
        self.jobs[name] = {"ranks": ranks, "flags": flags, "patch": patch}
        return flags

    def resume(
        self, name: str, source: list[str], ranks: int, mode: list[str], before: list[str] = (), keep: int = 4,
        patch: str | None = None,
    ) -> list[str]:  # fmt: skip
        """Go on from step `keep` of a copy of another run, whose mode was `before` and now is `mode`."""
        kept = {flag.partition("=")[0] for flag in mode}
        off = [flag.replace("--", "--no-", 1) for flag in before if "=" not in flag and flag not in kept]
        flags = self.add(name, ranks, [*mode, *off, "--resume"], patch)
        self.jobs[name] |= {"copy": str(out_dir(source)), "keep": keep}
        return flags

    def run(self) -> None:
        (self.home / "meeting").mkdir(parents=True)
        answers = run_ranks(self.ranks, run_jobs, list(self.jobs.values()), str(self.home / "meeting"))
        for index, job in enumerate(self.jobs.values()):
            job["codes"] = [answer[index]["code"] for answer in answers[: job["ranks"]]]
            job["weights"] = [answer[index]["weights"] for answer in answers[: job["ranks"]]]

    def __getitem__(self, name: str) -> list[str]:
        job = self.jobs[name]
        assert job["codes"] == [0] * job["ranks"], name
        weights = job["weights"]
        assert len(weights[0]) == 1 and all(w == weights[0] for w in weights), f"{name}: the ranks' weights differ"
        return job["flags"]


def checkpoint(flags: list[str], step: int) -> Path:
    return out_dir(flags) / "ckpt" / f"step-{step}"


def every_file(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name."""
    files = checkpoint(flags, step).glob("*.safetensors")
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}


def optimizer_state(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    """"parameter/state" -> the whole flat tensor, put together from all files; each element is there exactly once."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in checkpoint(flags, step).glob("optim-*.safetensors"):
        for key, tensor in load_file(file).items():
            name, offset, state = re.fullmatch(r"(.+)@(\d+)/(\w+)", key).groups()
            pieces.setdefault(f"{name}/{state}", []).append((int(offset), tensor))
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        ends = [0, *(offset + len(tensor) for offset, tensor in parts)]
        assert [offset for offset, _ in parts] == ends[:-1], f"{name} has gaps or overlaps: {ends}"
        whole[name] = torch.cat([tensor for _, tensor in parts])
    return whole


def weights_of(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(flags, step) / "model.safetensors")


def hook_state_files(path: Path) -> list[Path]:
    """Hook states of a checkpoint, by rank."""
    return sorted(path.glob("comm_hook-*.safetensors"), key=lambda file: int(file.stem.rpartition("-")[2]))


def hook_state(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in every_file(flags, step).items() if key.startswith("comm_hook-")}


def whole_state(flags: list[str], step: int) -> dict[str, torch.Tensor]:
    """Contents of a checkpoint, however its files are cut."""
    return weights_of(flags, step) | optimizer_state(flags, step) | hook_state(flags, step)


def compression(flags: list[str]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "time"} for record in records(flags, "compression")]


@pytest.fixture(scope="module")
def base_flags(data_dir: Path) -> list[str]:
    """A run with a global batch of 8 rows, saved at steps 4 and 6."""
    return [
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
        "--valid_iters=2", f"--max_iters={STEPS}", "--save_interval=4", "--learning_rate=1e-2", "--num_threads=1",
        "--sample_tokens=4",
        "--bucket_size=20000", "--dist_timeout=60", *TINY_MODEL,
    ]  # fmt: skip


REMEMBERING = ("powersgd",)
"""Words in the names of modes whose hooks remember something."""
SLOW = ("zero1 gather", "everything", "powersgd in buffer everything")
"""Modes that run with the patch "slow"."""
ELSEWHERE = {
    1: ("zero1 gather", "everything", "powersgd", "powersgd in buffer everything", "muon zero1"),
    4: ("plain", "zero1 gather", "everything", "powersgd", "powersgd zero1", "powersgd in buffer everything",
        "full rank", "bf16 zero1", "muon zero1"),
}  # fmt: skip
"""Ranks other than 2 -> the modes that run there too."""
ON_TWO_MACHINES = ("4 full rank", "4 bf16 zero1", "4 muon zero1")
"""Of those, runs with two ranks on each machine."""
SKIPS = {
    "zero1 gather": [ZERO1, GATHER],
    "bf16": [BF16],
    "fp16": [FP16, ZERO1],
    "powersgd": POWERSGD,
    "powersgd fp16": [*POWERSGD, FP16, ZERO1, GATHER],
    "fp16 weights powersgd": ["--dtype=float16", *POWERSGD],
}
"""Runs whose last step overflows on one rank."""
CRASHES = {
    "step": [STEP, FREE],
    "everything": [*POWERSGD, IN_BUFFER, *EVERYTHING],
    "checked": [*POWERSGD, ZERO1, GATHER, "--check_for_nan_in_grad"],
}
"""Runs whose third step gets NaN on one rank, and which must end there."""


PROFILED = {"overlapped": [ZERO1, GATHER], "after": ["--no-overlap_grad_reduce"]}
"""Runs whose last steps are traced."""


@pytest.fixture(scope="module")
def runs(base_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs by "ranks mode", including those with failures."""
    plan = Plan(base_flags, tmp_path_factory.mktemp("runs"))
    for name, (mode, _) in MODES.items():
        plan.add(f"2 {name}", 2, mode, "slow" if name in SLOW else None)
    for ranks, names in ELSEWHERE.items():
        for name in names:
            machines = ["--ranks_per_machine=2"] if f"{ranks} {name}" in ON_TWO_MACHINES else []
            plan.add(f"{ranks} {name}", ranks, [*MODES[name][0], *machines])
    for name, mode in SKIPS.items():
        plan.add(f"skip {name}", 2, [*mode, "--save_interval=1"], "overflow 6")
    plan.add("skip in buffer", 2, [*POWERSGD, IN_BUFFER], "overflow 3")
    for name, mode in CRASHES.items():
        plan.add(f"nan {name}", 2, [*mode, "--save_interval=2"], "nan 3")
    fp16 = ["--dtype=float16", *POWERSGD, ZERO1]
    plan.add("overflows", 2, [*fp16, "--max_iters=30", "--save_interval=0"], "scale 32")
    plan.add("only overflows", 2, [*fp16, "--max_iters=2", "--save_interval=1"], "scale 60")
    one_step = ["--max_iters=1", "--powerSGD_log_interval=0"]
    plan.add("slow network zero1", 2, [ZERO1, *one_step], "network 3")
    plan.add("slow network powersgd", 2, [*POWERSGD, *one_step], "network 3")
    plan.add("fast network zero1", 2, [ZERO1, *one_step], "network 12")
    for name, mode in PROFILED.items():
        plan.add(name, 2, ["--profile_steps=3:6", *mode])
    for name, mode in {"plain": [], "zero1": [ZERO1, GATHER], "powersgd": [*POWERSGD, BF16_WEIGHTS]}.items():
        plan.add(f"drift {name}", 2, [*mode, "--save_interval=2", "--replica_check_interval=3"], "drift 3")
    plan.add("drift at a save", 2, ["--save_interval=2", "--replica_check_interval=99"], "drift 3")
    plan.add("choice", 2, [], "choice")
    plan.add("two nodes", 2, ["--log_ranks=all", "--max_iters=2"], "nodes")
    plan.run()
    return plan


def check_close(run: list[str], expected: list[str], loss: float = 1e-5, weights: float = 1e-3) -> None:
    assert [r["digest"] for r in records(run, "train")] == [r["digest"] for r in records(expected, "train")]
    assert losses(run) == pytest.approx(losses(expected), rel=loss)
    assert relative_difference(weights_of(run, STEPS), weights_of(expected, STEPS)) < weights


def check_same(run: list[str], expected: list[str]) -> None:
    """Equal bits in everything that a run leaves, except for how the optimizer's files are cut."""
    assert losses(run) == losses(expected) and len(losses(run)) == STEPS
    assert [r["loss"] for r in records(run, "valid")] == [r["loss"] for r in records(expected, "valid")]
    assert [r["digest"] for r in records(run, "train")] == [r["digest"] for r in records(expected, "train")]
    assert compression(run) == compression(expected)
    assert same_bits(whole_state(run, STEPS), whole_state(expected, STEPS))


@pytest.mark.parametrize("name", [name for name, (_, base) in MODES.items() if base])
def test_the_same_bits_on_two_ranks(runs: Plan, name: str):
    """ZeRO-1, overlaps and the place of the residual change no bit, with any hook."""
    check_same(runs[f"2 {name}"], runs[f"2 {MODES[name][1]}"])


def test_clipping_took_part(runs: Plan):
    """The original's ZeRO clipped by the local shard's norm. Here a step was clipped, and that made a difference."""
    assert any(record["grad_norm"] > 1.0 for record in records(runs["2 plain"], "train"))
    assert losses(runs["2 free"])[-1] != losses(runs["2 plain"])[-1]


def test_every_mode_reads_the_same_data_and_learns(runs: Plan):
    digests = [r["digest"] for r in records(runs["2 plain"], "train")]
    assert len(set(digests)) == STEPS
    for name in [f"2 {mode}" for mode in MODES] + [f"{n} {mode}" for n, modes in ELSEWHERE.items() for mode in modes]:
        assert [r["digest"] for r in records(runs[name], "train")] == digests, name
        # 6.24 at the start; the worst mode, a fixed Q of rank 4, reaches 5.93.
        assert losses(runs[name])[-1] < losses(runs[name])[0] - 0.25, name


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in ELSEWHERE.items() for name in names])
def test_other_ranks_take_the_same_trajectory(runs: Plan, ranks: int, name: str):
    """Even with low-rank factors, the weights' update depends only on the sum over the ranks."""
    tolerance = (1e-3, 5e-2) if "bf16" in name else (1e-5, 1e-3)
    check_close(runs[f"{ranks} {name}"], runs[f"2 {name}"], *tolerance)


@pytest.mark.parametrize(
    ("name", "base", "loss", "weights"),
    [
        ("full rank", "plain", 1e-5, 1e-3),
        ("accumulated", "plain", 1e-5, 1e-3),
        ("accumulated everything", "free", 1e-5, 1e-3),
        ("accumulated powersgd in buffer", "powersgd", 1e-5, 1e-3),
        ("bf16", "plain", 1e-3, 5e-2),
        ("fp16", "plain", 3e-4, 2e-2),
        ("bf16 weights", "plain", 2e-3, 1e-1),
        ("narrow", "bf16 weights", 2e-3, 1e-1),
        ("powersgd bf16", "powersgd", 2e-3, 1e-1),
        ("powersgd fp16", "powersgd", 1e-3, 5e-2),
        ("narrow powersgd", "powersgd", 2e-3, 2e-1),
        ("narrow powersgd 16", "narrow powersgd", 5e-3, 3e-1),
        ("fp16 weights powersgd", "powersgd", 1e-3, 1e-1), ("fp16 weights narrow muon", "muon", 1e-3, 1e-1),
        ("powersgd from 3", "plain", 1e-3, 5e-2),
    ],
)
def test_close_but_not_the_same(runs: Plan, name: str, base: str, loss: float, weights: float):
    """Each option has its effect (so bits differ), and stays close."""
    check_close(runs[f"2 {name}"], runs[f"2 {base}"], loss, weights)
    assert not same_bits(weights_of(runs[f"2 {name}"], STEPS), weights_of(runs[f"2 {base}"], STEPS))


def test_the_options_of_powersgd_are_not_overlooked(runs: Plan):
    """No two of them give the same weights, except that another split into micro-batches is not an option of PowerSGD.
    (Losses may agree by chance: at full rank only rounding tells PowerSGD from plain.)"""
    names = [name for name, (_, base) in MODES.items() if "powersgd" in name and base is None]
    names = [name for name in names if not name.startswith("accumulated")] + ["plain", "full rank"]
    weights = {name: weights_of(runs[f"2 {name}"], STEPS) for name in names}
    for one, other in combinations(names, 2):
        assert not same_bits(weights[one], weights[other]), (one, other)


def test_powersgd_starts_when_told(runs: Plan):
    """Steps before start_powerSGD_iter are not compressed: their losses, and the next one, are plain's."""
    plain, late = losses(runs["2 plain"]), losses(runs["2 powersgd from 3"])
    assert late[:4] == plain[:4] and late[4:] != plain[4:]
    assert [r["step"] for r in compression(runs["2 powersgd from 3"])] == [4, 6]
    bf16, later = losses(runs["2 bf16"]), losses(runs["2 powersgd from 5"])
    # Before compression starts, the wire's dtype already counts.
    assert later == bf16 and later != plain
    assert not same_bits(weights_of(runs["2 powersgd from 5"], STEPS), weights_of(runs["2 bf16"], STEPS))


def moments(name: str, weight: torch.Tensor, flags: list[str]) -> int:
    """Tensors of a parameter's moments: AdamW has two, Lion one, and Muon one for a matrix of a block. In 8 bits each
    is codes and scales, unless the parameter is small."""
    by_muon = MUON in flags and weight.dim() == 2 and ".layers." in name
    count = 1 if by_muon or LION_8BIT in flags else 2
    return 2 * count if {ADAMW_8BIT, LION_8BIT} & set(flags) and weight.numel() >= 4096 else count


def test_checkpoints_hold_whole_and_current_weights(runs: Plan):
    """Even if the parameters were still being gathered when the save began (at step 4, without a validation)."""
    for name in [name for name in runs.jobs if name[0].isdigit()]:
        flags = runs.jobs[name]["flags"]
        for step in (4, 6):
            weights, state = weights_of(runs[name], step), optimizer_state(runs[name], step)
            mains = {
                LLAMA.their_name(key.removesuffix("/main")): t for key, t in state.items() if key.endswith("/main")
            }
            assert mains.keys() == weights.keys()
            assert len(state) == sum(1 + moments(key, w, flags) for key, w in weights.items()), name
            for key, weight in weights.items():
                assert torch.equal(weight.flatten(), mains[key].to(weight.dtype)), (name, step, key)


@pytest.mark.parametrize("name", ["1 zero1 gather", "2 plain", "2 zero1", "2 everything", "2 bf16 weights zero1",
                                  "4 everything", "4 powersgd zero1"])  # fmt: skip
def test_every_rank_writes_its_share(runs: Plan, name: str):
    """optimizer_state() asserts that each element is there once; here, that the shares are even."""
    files = sorted(checkpoint(runs[name], STEPS).glob("optim-*.safetensors"))
    assert len(files) == int(name[0])
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    elements = 3 * sum(weight.numel() for weight in weights_of(runs[name], STEPS).values())
    assert sum(sizes) == elements == sum(tensor.numel() for tensor in optimizer_state(runs[name], STEPS).values())
    if "plain" not in name:
        # Buckets are padded to a multiple of 64 elements per rank: only in the last shard of each of five buckets.
        assert max(sizes) <= elements / len(files) + 3 * 5 * 64 * len(files)


def test_each_rank_saves_its_own_residuals_and_the_common_q(runs: Plan):
    for name, ranks in (("2 powersgd", 2), ("4 powersgd", 4), ("1 powersgd", 1), ("2 powersgd in buffer zero1", 2)):
        files = hook_state_files(checkpoint(runs[name], STEPS))
        assert [file.name for file in files] == [f"comm_hook-{rank}.safetensors" for rank in range(ranks)]
        states = [load_file(file) for file in files]
        for key in states[0]:
            assert states[0].keys() == states[-1].keys()
            differ = any(not torch.equal(state[key], states[0][key]) for state in states[1:])
            assert differ == (key.endswith("/residual") and ranks > 1), key
            assert states[0][key].any(), key
    assert all(key.endswith("/q") for key in hook_state(runs["2 powersgd forgetful"], STEPS))
    assert not hook_state(runs["2 zero1"], STEPS)


def test_compression_is_recorded(runs: Plan):
    run = runs["2 powersgd"]
    found = compression(run)
    assert [record["step"] for record in found] == [2, 4, 6]
    compressed = {key.split()[1].removesuffix("/q") for key in hook_state(run, STEPS) if key.endswith("/q")}
    assert "embed_tokens.weight" in compressed and len(compressed) == 1 + 2 * 7
    for record in found:
        errors = record["relative_error"]
        assert errors.keys() == compressed
        assert all(0.0 < error < 1.5 for error in errors.values())
        assert record["mean_relative_error"] == pytest.approx(sum(errors.values()) / len(errors))
    # By hand: elements of the padded buckets over those of P, Q and the norms' weights.
    shapes = [tuple(weight.shape) for weight in weights_of(run, STEPS).values()]
    sent = sum(4 * sum(shape) if len(shape) == 2 else shape[0] for shape in shapes)
    elements = sum(math.prod(shape) for shape in shapes)
    assert found[0]["ratio"] == pytest.approx(elements / sent, rel=0.02)

    excluded = compression(runs["2 powersgd without embedding"])[0]["relative_error"].keys()
    assert excluded == {name for name in compressed if "down_proj" not in name and "embed_tokens" not in name}
    # At full rank nothing is left over if the factor has as many columns as the matrix has rows. (In a taller matrix,
    # the ranks' residuals add up to zero, see below.)
    full = compression(runs["2 full rank"])
    for record in full:
        assert max(record["relative_error"][f"layers.0.self_attn.{kind}_proj.weight"] for kind in "qkvo") < 1e-2
    for name in ("2 plain", "2 zero1", "2 powersgd of nothing", "slow network powersgd"):
        assert compression(runs[name]) == [], name


def start_lines(run: list[str], word: str) -> list[str]:
    return [line for line in (out_dir(run) / "train.log").read_text().splitlines() if word in line]


def test_the_start_says_what_runs(runs: Plan):
    words = {"PowerSGD 1:10.9", "ZeRO-1", "gathered under the forward pass", "buckets stepped as they arrive"}
    expected = {
        "2 plain": set(),
        "2 zero1": {"ZeRO-1"},
        "2 zero1 gather": {"ZeRO-1", "gathered under the forward pass"},
        "2 step": {"buckets stepped as they arrive"},
        "2 powersgd": {"PowerSGD 1:10.9"},
        "2 powersgd in buffer everything": words,
    }
    for name, said in expected.items():
        (line,) = start_lines(runs[name], "INFO parallel: ")
        assert "2 processes, 5 gradient buckets reduced overlapped" in line
        assert {word for word in words if word in line} == said, name
    (line,) = start_lines(runs["2 zero1 one bucket"], "INFO parallel: ")
    assert "1 gradient bucket reduced after the backward pass" in line


def test_the_start_says_what_is_sent(runs: Plan):
    """Megabytes that a rank sends per step, by the formulas of comm_hooks.py, powersgd.py and zero1.py."""
    plain = 4e-6 * sum(weight.numel() for weight in weights_of(runs["2 plain"], STEPS).values())
    factors = plain / compression(runs["2 powersgd"])[0]["ratio"]
    expected = {
        "2 plain": (plain, None),
        "2 zero1": (plain / 2, plain / 2),
        "2 bf16": (plain / 2, None),
        "2 bf16 zero1": (plain / 4, plain / 2),
        "2 bf16 weights": (plain, None),
        "2 narrow zero1": (plain / 4, plain / 4),
        "2 powersgd": (factors, None),
        "2 powersgd zero1": (factors, plain / 2),
        "2 powersgd bf16": (factors / 2, None),
        "4 plain": (1.5 * plain, None),
        "4 zero1 gather": (0.75 * plain, 0.75 * plain),
        # The last two: what a machine sends to the other.
        "4 bf16 zero1": (0.375 * plain, 0.75 * plain, 0.25 * plain, 0.5 * plain),
    }
    for name, amounts in expected.items():
        (line,) = start_lines(runs[name], "INFO network: ")
        found = [float(number) for number in re.findall(r"([\d.]+) MB of", line)]
        assert "MB of gradients" in line and ("MB of parameters" in line) == (amounts[1] is not None), name
        assert found == pytest.approx([amount for amount in amounts if amount is not None], abs=0.06), name
    assert start_lines(runs["1 zero1 gather"], "INFO network: ") == []
    (line,) = start_lines(runs["4 muon zero1"], "INFO parallel: ")
    assert "summed first on each of 2 machines" in line


def test_a_gather_that_no_overlap_can_hide_is_warned_of(runs: Plan):
    line, = start_lines(runs["slow network zero1"], "ZeRO-1 gathers parameters for")
    seconds = 4 * sum(weight.numel() for weight in weights_of(runs["2 plain"], STEPS).values()) / 2 / 1e3
    assert float(re.search(r"for ([\d.]+) s a step", line)[1]) == pytest.approx(seconds, rel=0.02)
    assert "WARNING" in line and "leave out --use_distributed_optimizer" in line
    for name in ("slow network powersgd", "fast network zero1"):
        assert start_lines(runs[name], "ZeRO-1 gathers parameters for") == [], name


@pytest.mark.parametrize("name", SKIPS)
def test_a_step_that_overflows_on_one_rank_is_skipped_by_all_and_leaves_no_trace(runs: Plan, name: str):
    """Weights, moments, residuals and Q are the same after step 6 as after step 5."""
    run = runs[f"skip {name}"]
    norms = [float(record["grad_norm"]) for record in records(run, "train")]
    assert [math.isfinite(norm) for norm in norms] == 5 * [True] + [False]
    assert same_bits(every_file(run, 6), every_file(run, 5))
    assert bool(hook_state(run, 6)) == any(word in name for word in REMEMBERING)
    before, after = (ckpt.read_trainer_state(checkpoint(run, step))["optimizer"] for step in (5, 6))
    assert before["num_steps"] == after["num_steps"] == 5
    fp16 = name.startswith("fp16 weights")
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / (2 if fp16 else 1)
    assert ("loss scale lowered" in start_lines(run, "step 6 skipped")[0]) == fp16
    assert len(start_lines(run, "step 6 skipped")) == 2, "each rank says so"


def test_a_residual_in_the_gradient_buffer_does_not_survive_an_overflow_but_the_run_does(runs: Plan):
    run = runs["skip in buffer"]
    norms = [float(record["grad_norm"]) for record in records(run, "train")]
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True, True]
    assert all(torch.isfinite(tensor).all() for tensor in every_file(run, STEPS).values())
    assert losses(run)[-1] < losses(run)[0] - 0.25


def test_fp16_with_powersgd_recovers_from_overflows(runs: Plan):
    run = runs["overflows"]
    norms = [float(record["grad_norm"]) for record in records(run, "train")]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 2 < skipped < 20 and not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    state = ckpt.read_trainer_state(checkpoint(run, 30))
    assert state["optimizer"]["num_steps"] == 30 - skipped
    assert state["optimizer"]["scaler"]["scale"] == 2.0 ** (32 - skipped)
    assert losses(run)[-1] < losses(run)[0] - 0.5
    # While all steps are skipped, nothing is left over for later, not even in the residuals.
    only = runs["only overflows"]
    assert same_bits(every_file(only, 1), every_file(only, 2))
    moments = {key: tensor for key, tensor in optimizer_state(only, 2).items() if not key.endswith("/main")}
    assert moments and not any(moment.any() for moment in moments.values())
    residuals = [tensor for key, tensor in hook_state(only, 2).items() if key.endswith("/residual")]
    assert residuals and not any(residual.any() for residual in residuals)


def test_a_nan_that_was_already_stepped_with_ends_the_run_and_saves_nothing(runs: Plan):
    sentence = "non-finite gradients, and --overlap_optim_step had already stepped with them"
    for name in ("nan step", "nan everything"):
        job = runs.jobs[name]
        assert all(str(code).startswith(f"FloatingPointError: {sentence}") for code in job["codes"]), job["codes"]
        found = read_exit_records(out_dir(job["flags"]) / "exit")
        assert [(r["rank"], r["code"], r["step"]) for r in found] == [(0, CRASH, 2), (1, CRASH, 2)]
        assert all(sentence in r["reason"] for r in found)
        assert [c.step for c in ckpt.list_checkpoints(out_dir(job["flags"]) / "ckpt")] == [2]


def test_a_nan_is_named_by_the_rank_that_made_it(runs: Plan):
    job = runs.jobs["nan checked"]
    first, second = job["codes"]
    assert first == "FloatingPointError: non-finite gradients at step 3 in: none on this rank"
    assert second.startswith("FloatingPointError: non-finite gradients at step 3 in: ")
    assert "layers.1.mlp.down_proj.weight" in second
    assert [c.step for c in ckpt.list_checkpoints(out_dir(job["flags"]) / "ckpt")] == [2]


@pytest.mark.parametrize(("name", "step"), [("plain", 3), ("zero1", 3), ("powersgd", 3), ("at a save", 4)])
def test_replicas_that_drift_apart_are_noticed_and_never_saved(runs: Plan, name: str, step: int):
    job = runs.jobs[f"drift {name}"]
    sentence = f"ReplicaDrift: the ranks' weights are not the same as the others' after step {step}: go on from"
    assert all(str(code).startswith(sentence) for code in job["codes"]), job["codes"]
    assert [c.step for c in ckpt.list_checkpoints(out_dir(job["flags"]) / "ckpt")] == [2]


def test_ranks_that_chose_different_implementations_are_refused(runs: Plan):
    assert runs.jobs["choice"]["codes"] == [2, 2]
    (reason,) = {record["reason"] for record in read_exit_records(out_dir(runs.jobs["choice"]["flags"]) / "exit")}
    assert "attention is sdpa on rank 0 and plain on rank 1; say which with --attention_kernel" in reason


RESUMED = (
    "plain", "zero1 gather", "everything", "bf16 zero1", "powersgd", "powersgd zero1", "powersgd in buffer zero1",
    "powersgd in buffer everything", "accumulated powersgd in buffer", "powersgd bf16 zero1", "powersgd from 5 zero1",
    "powersgd fixed Q", "powersgd fresh Q", "bf16 weights zero1", "narrow powersgd 16", "fp16 weights powersgd zero1",
    "muon zero1", "muon powersgd in buffer zero1", "muon narrow zero1", "8bit zero1",
)  # fmt: skip
"""Modes of two ranks that together save all kinds of state; the others take a minute more."""
RESUMED_ON_FOUR = ("everything", "powersgd zero1", "powersgd in buffer everything")
RESAVED = {
    (4, 2): POWERSGD,
    (4, 3): POWERSGD,
    (4, 1): [*POWERSGD, IN_BUFFER],
    (2, 4): [*POWERSGD, ZERO1],
    (2, 1): POWERSGD,
    (1, 4): [*POWERSGD, IN_BUFFER, ZERO1],
}
"""(ranks before, ranks after) -> mode in which the checkpoint of a PowerSGD run is loaded and saved at once."""


@pytest.fixture(scope="module")
def resumed(base_flags: list[str], runs: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Runs that went on from step 4 (or 5) of a copy of another one."""
    made = {name: job["flags"] for name, job in runs.jobs.items()}
    plan = Plan(base_flags, tmp_path_factory.mktemp("resumed"))
    for name in RESUMED:
        plan.resume(f"2 {name}", made[f"2 {name}"], 2, MODES[name][0])
    for name in RESUMED_ON_FOUR:
        plan.resume(f"4 {name}", made[f"4 {name}"], 4, MODES[name][0])
    often = "--save_interval=1"
    zero1 = [ZERO1, GATHER]
    middle = plan.resume("plain -> zero1", made["2 plain"], 2, [*zero1, often])
    plan.resume("plain -> zero1 -> plain", middle, 2, [], zero1, keep=5)
    middle = plan.resume("zero1 2 -> 4", made["2 zero1 gather"], 4, [*zero1, often])
    plan.resume("zero1 2 -> 4 -> 1", middle, 1, zero1, keep=5)
    plan.resume("muon 2 -> zero1 4", made["2 muon"], 4, [MUON, *zero1])
    plan.resume("8bit 2 -> zero1 4", made["2 8bit"], 4, [ADAMW_8BIT, ZERO1], keep=6, patch="save")
    plan.resume("bf16 weights -> zero1", made["2 bf16 weights"], 2, [BF16_WEIGHTS, ZERO1])
    in_buffer = [*POWERSGD, IN_BUFFER, ZERO1]
    middle = plan.resume("powersgd -> in buffer", made["2 powersgd"], 2, [*in_buffer, often])
    plan.resume("powersgd -> in buffer -> powersgd", middle, 2, POWERSGD, in_buffer, keep=5)
    plan.resume("powersgd -> plain", made["2 powersgd"], 2, [], POWERSGD)
    plan.resume("plain -> powersgd", made["2 plain"], 2, POWERSGD)
    plan.resume("powersgd 4 -> 2", made["4 powersgd"], 2, POWERSGD)
    plan.resume("powersgd 2 -> 4", made["2 powersgd zero1"], 4, [*POWERSGD, ZERO1, GATHER])
    plan.resume("powersgd 4 -> 1 in buffer", made["4 powersgd"], 1, [*POWERSGD, IN_BUFFER])
    plan.resume("step nan goes on", made["nan step"], 2, [STEP, FREE], keep=2)
    for (before, after), mode in RESAVED.items():
        plan.resume(f"resaved {before} -> {after}", made[f"{before} powersgd"], after, mode, keep=6, patch="save")
    for rank in (2, 8):
        mode = [*POWERSGD, f"--matrix_approximation_rank={rank}"]
        plan.resume(f"resaved with rank {rank}", made["2 powersgd"], 2, mode, keep=6, patch="save")
    exclude = [*POWERSGD, "--powerSGD_exclude=down_proj"]
    plan.resume("resaved without down_proj", made["2 powersgd"], 2, exclude, keep=6, patch="save")
    plan.run()
    return plan


def check_resumed(run: list[str], whole: list[str]) -> None:
    """Losses, weights, moments, residuals and Q, in the same files."""
    assert [r["step"] for r in records(run, "start")] == [0, 4]
    check_same(run, whole)
    assert same_bits(every_file(run, STEPS), every_file(whole, STEPS))


@pytest.mark.parametrize("name", [*(f"2 {name}" for name in RESUMED), *(f"4 {name}" for name in RESUMED_ON_FOUR)])
def test_a_resumed_run_is_the_same_bits(runs: Plan, resumed: Plan, name: str):
    check_resumed(resumed[name], runs[name])


@pytest.mark.soak
def test_a_run_is_resumed_in_every_other_mode(base_flags: list[str], runs: Plan, tmp_path: Path):
    names = [name for name in MODES if name not in RESUMED]
    plan = Plan(base_flags, tmp_path)
    for name in names:
        plan.resume(f"2 {name}", runs[f"2 {name}"], 2, MODES[name][0])
    plan.run()
    for name in names:
        check_resumed(plan[f"2 {name}"], runs[f"2 {name}"])


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("plain -> zero1", "2 plain"),
        ("plain -> zero1 -> plain", "2 plain"),
        ("bf16 weights -> zero1", "2 bf16 weights"),
        ("powersgd -> in buffer", "2 powersgd"),
        ("powersgd -> in buffer -> powersgd", "2 powersgd"),
        ("step nan goes on", "2 free"),
    ],
)
def test_another_mode_takes_over_with_the_same_bits(
    runs: Plan, resumed: Plan, name: str, whole: str
):
    check_same(resumed[name], runs[whole])


@pytest.mark.parametrize(
    ("name", "whole", "ranks"),
    [
        ("zero1 2 -> 4", "2 plain", [2, 4]),
        ("zero1 2 -> 4 -> 1", "2 plain", [2, 4, 1]),
        ("muon 2 -> zero1 4", "2 muon", [2, 4]),
        ("powersgd 4 -> 2", "4 powersgd", [4, 2]),
        ("powersgd 2 -> 4", "2 powersgd", [2, 4]),
        ("powersgd 4 -> 1 in buffer", "4 powersgd", [4, 1]),
    ],
)
def test_other_ranks_take_over(
    runs: Plan, resumed: Plan, name: str, whole: str, ranks: list[int]
):
    """Also with PowerSGD, because the sum of the residuals is kept."""
    assert [r["world_size"] for r in records(resumed[name], "start")] == ranks
    check_close(resumed[name], runs[whole])
    optimizer_state(resumed[name], STEPS)


def test_powersgd_can_be_switched_off_and_on(runs: Plan, resumed: Plan):
    off, on = resumed["powersgd -> plain"], resumed["plain -> powersgd"]
    warning = "the memory of the comm hook in step-4 (q, residual) is dropped"
    assert len(start_lines(off, warning)) == 2 and start_lines(on, warning) == []
    assert start_lines(resumed["2 powersgd"], "dropped") == []
    for run, before in ((off, runs["2 powersgd"]), (on, runs["2 plain"])):
        # The fifth loss comes from the saved weights; the sixth from a step of the other kind.
        assert losses(run)[:5] == losses(before)[:5] and losses(run)[5] != losses(before)[5]
        assert losses(run)[5] == pytest.approx(losses(before)[5], rel=2e-2)
    assert [r["step"] for r in compression(off)] == [2, 4] and [r["step"] for r in compression(on)] == [6]
    assert not hook_state(off, STEPS) and hook_state(on, STEPS)


def summed(run: list[str], step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameter -> the sum of its residuals over the ranks, and parameter -> Q, which is the same on all ranks."""
    residuals: dict[str, torch.Tensor] = {}
    qs: dict[str, torch.Tensor] = {}
    for file in hook_state_files(checkpoint(run, step)):
        for key, tensor in load_file(file).items():
            name, kind = key.rsplit("/", 1)
            if kind == "residual":
                residuals[name] = residuals.get(name, 0.0) + tensor.double()
            else:
                assert torch.equal(qs.setdefault(name, tensor), tensor), f"{file} has another Q of {name}"
    return residuals, qs


def test_at_full_rank_the_residuals_cancel(runs: Plan):
    """Each rank keeps the part outside the common factor, but over the ranks these parts add up to nothing."""
    full, low = summed(runs["2 full rank"], STEPS)[0], summed(runs["2 powersgd"], STEPS)[0]
    for name in low:
        assert full[name].norm() < 1e-4 * low[name].norm(), name


def test_state_in_8_bits_is_cut_anew_for_other_ranks(runs: Plan, resumed: Plan):
    """Codes and the scales of blocks."""
    before, after = (optimizer_state(run, STEPS) for run in (runs["2 8bit"], resumed["8bit 2 -> zero1 4"]))
    assert same_bits(before, after) and any(name.endswith("/exp_avg_sq_scales") for name in after)
    assert len(list(checkpoint(resumed["8bit 2 -> zero1 4"], STEPS).glob("optim-*.safetensors"))) == 4


@pytest.mark.parametrize(("before", "after"), RESAVED)
def test_the_sum_of_the_residuals_survives_another_number_of_ranks(
    runs: Plan, resumed: Plan, before: int, after: int
):
    run = resumed[f"resaved {before} -> {after}"]
    state = checkpoint(run, STEPS)
    assert len(hook_state_files(state)) == after == ckpt.read_trainer_state(state)["world_size"]
    residuals, qs = summed(run, STEPS)
    expected, expected_qs = summed(runs[f"{before} powersgd"], STEPS)
    assert residuals.keys() == expected.keys() and len(residuals) == 15 and same_bits(qs, expected_qs)
    for name, residual in residuals.items():
        # The ranks' residuals largely cancel: the rounding is that of single residuals, not of their sum.
        assert expected[name].norm() > 0
        assert (residual - expected[name]).norm() < 1e-6 * expected[name].norm(), name
    assert same_bits(weights_of(run, STEPS), weights_of(runs[f"{before} powersgd"], STEPS))
    assert same_bits(optimizer_state(run, STEPS), optimizer_state(runs[f"{before} powersgd"], STEPS))


@pytest.mark.parametrize("rank", [2, 8])
def test_another_rank_of_powersgd_goes_on_with_the_common_columns(
    runs: Plan, resumed: Plan, rank: int
):
    residuals, qs = summed(resumed[f"resaved with rank {rank}"], STEPS)
    expected, expected_qs = summed(runs["2 powersgd"], STEPS)
    assert same_bits(residuals, {name: expected[name] for name in residuals})
    for name, q in qs.items():
        assert q.shape[1] == rank and torch.allclose(q.norm(dim=0), torch.ones(rank))
        columns = min(rank, 4)
        assert torch.equal(q[:, :columns], expected_qs[name][:, :columns])
    # At rank 8 every matrix still shrinks to less than half.
    assert residuals.keys() == expected.keys()


def test_residuals_that_have_no_place_any_more_are_named(resumed: Plan):
    run = resumed["resaved without down_proj"]
    lines = start_lines(run, "residuals are dropped, as these parameters are no longer compressed")
    assert len(lines) == 2
    assert all(line.endswith("layers.0.mlp.down_proj.weight, layers.1.mlp.down_proj.weight") for line in lines)
    assert not any("down_proj" in name for name in summed(run, STEPS)[0])


def traces(run: list[str]) -> list[Trace]:
    """Traces of both ranks."""
    return [read_trace(out_dir(run) / "profile" / f"steps-3-6-rank-{rank}.json.gz") for rank in (0, 1)]


def within(trace: Trace, step: int, kind: str) -> list[StepPart]:
    start, end = trace.steps[step]
    return [span for span in trace.parts if span.kind == kind and start <= span.start <= end]


def test_a_trace_shows_whether_communication_is_hidden(runs: Plan):
    """The first bucket is on the wire before the backward pass ends, or after it."""
    for name in ("overlapped", "after"):
        for trace in traces(runs[name]):
            assert list(trace.steps) == [3, 4, 5, 6]
            early = []
            for step in trace.steps:
                (backward,), buckets = within(trace, step, "backward"), within(trace, step, "bucket")
                assert [bucket.number for bucket in buckets] == [0, 1, 2, 3, 4]
                assert all(bucket.size for bucket in buckets) and len(within(trace, step, "wait for buckets")) == 1
                early.append(buckets[0].start < backward.end)
                figures = figures_of(trace, step)
                assert figures["wire"] == pytest.approx(figures["hidden"] + figures["exposed"]) and figures["wire"] > 0
            # The operating system may let a thread wait, but not each time.
            assert any(early) if name == "overlapped" else not any(early), name


def test_a_trace_shows_gathers(runs: Plan):
    for trace in traces(runs["overlapped"]):
        gathers = [span for span in trace.parts if span.kind == "gather bucket"]
        # Gathers of three steps, and those under way when the trace begins and ends.
        assert 3 * 5 <= len(gathers) <= 5 * 5 and {span.number for span in gathers} == set(range(5))
        assert all(span.size.endswith(" MB") for span in gathers)
        # It waits for gathers of the step before; the save after step 4 had waited itself.
        assert within(trace, 4, "wait for gathers") and not within(trace, 5, "wait for gathers")


def test_tracing_changes_no_bit(runs: Plan):
    check_same(runs["overlapped"], runs["2 zero1 gather"])
    check_same(runs["after"], runs["2 plain"])


def test_what_was_waited_for_is_recorded(runs: Plan):
    for name in ("2 plain", "2 zero1", "2 everything", "2 powersgd", "after"):
        for record in records(runs[name], "train"):
            assert 0.0 < record["comm_wait"] < record["dt"], name
    assert [record["comm_wait"] for record in records(runs["1 zero1 gather"], "train")] == [0.0] * STEPS


def test_each_node_has_a_log_file_with_the_chosen_ranks_in_it(runs: Plan):
    for rank, (name, level) in enumerate([("train.log", "INFO"), ("train-node-1.log", "WARNING")]):
        log = (out_dir(runs["two nodes"]) / name).read_text()
        assert f" rank {rank} INFO model: " in log and f" rank {1 - rank} " not in log
        assert log.count(" WARNING a strange noise\n") == 1
        assert f" rank {rank} {level} 1 more warning like: a strange noise\n" in log
    # By default, only the first rank's messages, and all warnings.
    assert " rank 1 INFO " not in (out_dir(runs["2 plain"]) / "train.log").read_text()
    assert not (out_dir(runs["2 plain"]) / "train-node-1.log").exists()

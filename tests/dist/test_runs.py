"""Whole training runs on several gloo ranks: the same trajectory everywhere, and after every kind of death."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_my_ddp
import training.trainer as trainer_module
from checkpoint import folder as ckpt
from checkpoint.writing import CheckpointWriter
from runs.exits import CRASH, STOPPED, read_exit_records, verdict
from tasks.language_model import LanguageModelTask
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks, use_new_port
from tests.runs import elsewhere, final_state, losses, out_dir, records, relative_difference, same_bits

ROOT = Path(train_my_ddp.__file__).parent


@pytest.fixture(scope="module")
def flags(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run with a global batch of 8 rows, small enough for 4 ranks on 2 cores."""
    return [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path_factory.mktemp('runs') / 'default'}",
        f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu", "--train_batch_size=4",
        "--gradient_accumulation_steps=2", "--valid_iters=6", "--max_iters=6", "--learning_rate=1e-2",
        "--num_threads=1", "--sample_texts=0", "--bucket_size=20000", *TINY_MODEL,
    ]  # fmt: skip


def run_cases(cases: list[list[str]]) -> list[int]:
    """Program of a rank: several runs, one after the other."""
    codes = []
    for case in cases:
        use_new_port()
        codes.append(train_my_ddp.main(case))
    return codes


SPLITS = {1: (8, 1), 2: (4, 2), 4: (2, 4)}
LAYOUTS = {
    "naive": ["--ddp_impl=naive"],
    "small buckets": ["--bucket_size=1"],
    "small buckets, no overlap": ["--bucket_size=1", "--no-overlap_grad_reduce"],
    "medium buckets": ["--bucket_size=20000"],
    "one bucket": ["--disable_bucketing"],
    "one bucket, no overlap": ["--disable_bucketing", "--no-overlap_grad_reduce"],
}


@pytest.fixture(scope="module")
def matrix(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[str]]:
    """(ranks, layout) -> the flags of a finished run."""
    home = tmp_path_factory.mktemp("matrix")
    runs = {}
    for ranks, (batch, steps) in SPLITS.items():
        layouts = LAYOUTS if ranks > 1 else {"medium buckets": LAYOUTS["medium buckets"]}
        cases = []
        for layout, more in layouts.items():
            directory = home / f"{ranks} {layout}"
            case = [*elsewhere(flags, directory), f"--train_batch_size={batch}",
                    f"--gradient_accumulation_steps={steps}", "--valid_interval=3", *more]  # fmt: skip
            cases.append(case)
            runs[ranks, layout] = case
        for codes in run_ranks(ranks, run_cases, cases):
            assert codes == [0] * len(cases)
    return runs


def test_one_trajectory(matrix: dict[tuple[int, str], list[str]]):
    """Ranks, buckets and overlap do not change the run: equal bits on 2 ranks, float32's rounding elsewhere."""
    alone = matrix[1, "medium buckets"]
    naive = matrix[2, "naive"]
    for (ranks, layout), run in matrix.items():
        assert [r["digest"] for r in records(run, "train")] == [r["digest"] for r in records(alone, "train")]
        assert [r["samples"] for r in records(run, "train")] == [r["samples"] for r in records(alone, "train")]
        first, expected = records(run, "train")[0], records(alone, "train")[0]
        assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6), (ranks, layout)
        assert losses(run) == pytest.approx(losses(alone), rel=1e-5), (ranks, layout)
        assert relative_difference(final_state(run, 6), final_state(alone, 6)) < 1e-3, (ranks, layout)
        if ranks == 2:
            assert losses(run) == losses(naive), layout
            assert same_bits(final_state(run, 6), final_state(naive, 6)), layout


def test_every_rank_reads_its_own_data(matrix: dict[tuple[int, str], list[str]]):
    """In the original, all ranks read the same samples. The digest sums those that the ranks really read."""
    digests = [r["digest"] for r in records(matrix[1, "medium buckets"], "train")]
    assert len(set(digests)) == len(digests)
    for ranks in (2, 4):
        assert [r["digest"] for r in records(matrix[ranks, "naive"], "train")] == digests


def test_validation_is_the_same_on_any_number_of_ranks(
    flags: list[str], matrix: dict[tuple[int, str], list[str]], tmp_path: Path
):
    """The original validated on the first rank alone, with batches that depended on the ranks."""
    weights = out_dir(matrix[1, "medium buckets"])
    seen = set()
    for ranks in (1, 2, 4):
        case = [*elsewhere(flags, tmp_path / str(ranks)), f"--init_from={weights}", "--valid_only",
                "--gradient_accumulation_steps=4"]  # fmt: skip
        assert run_ranks(ranks, run_cases, [case]) == [[0]] * ranks
        record = records(case, "valid")[0]
        seen.add((record["loss"], record["bits_per_byte"], record["tokens"]))
    assert len(seen) == 1


def test_a_global_batch_that_does_not_divide_is_refused(flags: list[str], tmp_path: Path):
    case = [*elsewhere(flags, tmp_path / "run"), "--gradient_accumulation_steps=3"]
    assert run_ranks(2, run_cases, [case]) == [[2], [2]]
    assert verdict([r["code"] for r in read_exit_records(tmp_path / "run" / "exit")], 2) == 2
    assert "multiple of their number, 2" in read_exit_records(tmp_path / "run" / "exit")[1]["reason"]


def die_in_save(case: list[str], phase: str, step: int) -> None:
    """Train until the save of `step`, and kill the first rank in the given phase of it."""
    original = getattr(CheckpointWriter, phase)

    def dying(self, *arguments):
        if self.place.rank == 0 and self.step == step:
            if phase == "write_tensors":
                (self.directory / arguments[0]).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    setattr(CheckpointWriter, phase, dying)
    train_my_ddp.main(case)


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """World size -> the flags of an undisturbed run that saves at every second step."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = [*elsewhere(flags, tmp_path_factory.mktemp(f"undisturbed-{ranks}") / "run"), "--save_interval=2"]
        assert run_ranks(ranks, run_cases, [runs[ranks]]) == [[0]] * ranks
    return runs


def check_equal(case: list[str], undisturbed: list[str]) -> None:
    assert losses(case) == losses(undisturbed)
    assert [r["digest"] for r in records(case, "train")] == [r["digest"] for r in records(undisturbed, "train")]
    assert same_bits(final_state(case, 6), final_state(undisturbed, 6))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", ["make_directory", "write_tensors", "finish", "commit"])
def test_killed_in_a_save(flags: list[str], undisturbed: dict[int, list[str]], tmp_path: Path, ranks: int, phase: str):
    case = [*elsewhere(flags, tmp_path / "run"), "--save_interval=2", "--dist_timeout=30"]
    run_ranks(ranks, die_in_save, case, phase, 4, may_die=True)
    assert [c.step for c in ckpt.list_checkpoints(tmp_path / "run" / "ckpt")] == [2]
    assert run_ranks(ranks, run_cases, [[*case, "--resume"]]) == [[0]] * ranks
    assert records(case, "start")[-1]["parent_ckpt"] == "step-2"
    check_equal(case, undisturbed[ranks])


def launch(ranks: int, case: list[str]) -> subprocess.Popen:
    """The real command, in its own process group."""
    command = [sys.executable, "-m", "parallel.launch", f"--nproc_per_node={ranks}"]
    command = command if ranks > 1 else [sys.executable]
    return subprocess.Popen(
        [*command, "train_my_ddp.py", *case], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen, case: list[str], step: int) -> None:
    path = out_dir(case) / "reslog.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(r["step"] >= step for r in records(case, "train")):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached: {process.stdout.read() if process.poll() is not None else ''}")


def test_the_training_starts_its_processes_itself(flags: list[str], tmp_path: Path):
    """A stop and a mistake end with their exit codes, and only with the ranks' sentences."""
    case = elsewhere(flags, tmp_path / "run")
    batch, steps = SPLITS[2]
    sizes = [f"--train_batch_size={batch}", f"--gradient_accumulation_steps={steps}", "--max_iters=100000"]
    command = [sys.executable, "train_my_ddp.py", "--nproc", "2", *case, *sizes]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(process, case, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output and "python train_my_ddp.py --nproc 2 --resume" in output.splitlines()[-3]
    assert {r["code"] for r in read_exit_records(tmp_path / "run" / "exit")} == {75}
    again = subprocess.run([*command, "--resume", "--seed=8"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and not again.stderr, again.stderr
    lines = again.stdout.splitlines()
    assert len(set(lines)) == 1 and "seed" in lines[0], lines


LONG_STEPS = {
    "plain": [],
    "stepped as they arrive": ["--overlap_optim_step", "--grad_clip=0", "--use_distributed_optimizer"],
    "powersgd": ["--use_powerSGD_hook", "--matrix_approximation_rank=2"],
    "fsdp": ["--data_parallel=fsdp"],
    "residuals in the buffer": ["--use_powerSGD_hook", "--grad_buffer_is_powerSGD_error"],
}


def stop_in_long_steps(cases: list[list[list[str]]]) -> list[list[int]]:
    """Program of a rank. For each (whole run, interrupted run) it returns the exit codes, the second's before and after
    it is resumed, and the micro-batches computed here before it stopped. Only rank 1 gets the request, in its sixth."""
    original, calls, found = LanguageModelTask.__call__, [0], []
    asked = 6 if int(os.environ["RANK"]) == 1 else -1

    def compute(self: LanguageModelTask, batch: dict, *losses: object) -> tuple:
        calls[0] += self.model.training
        if calls[0] == asked and self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, *losses)

    for whole, parts in cases:
        codes = run_cases([whole])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModelTask, "__call__", compute)
            patch.setattr(trainer_module, "LONG_S", 0.0)
            calls[0] = 0
            codes += run_cases([parts])
        found.append([*codes, *run_cases([[*parts, "--resume"]]), calls[0]])
    return found


def test_a_stop_is_seen_between_micro_batches(flags: list[str], tmp_path: Path):
    """All ranks see it at once, before anything of the step has left them, for every kind of reduction."""
    sizes = ["--train_batch_size=1", "--gradient_accumulation_steps=8", "--max_iters=3", "--valid_iters=1"]
    cases = []
    for name, more in LONG_STEPS.items():
        cases.append([[*elsewhere(flags, tmp_path / name / part), *sizes, *more] for part in ("whole", "parts")])
    for found in run_ranks(2, stop_in_long_steps, cases):
        # The residuals in the buffer belong to the step that has begun, so it is completed.
        assert found == [[0, STOPPED, 0, 8 if name == "residuals in the buffer" else 6] for name in LONG_STEPS]
    for whole, parts in cases:
        assert losses(parts) == losses(whole)
        assert same_bits(final_state(parts, 3), final_state(whole, 3))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_sigkill_at_a_random_step(flags: list[str], undisturbed: dict[int, list[str]], tmp_path: Path, ranks: int):
    case = [*elsewhere(flags, tmp_path / "run"), "--save_interval=2"]
    process = launch(ranks, case)
    wait_for_step(process, case, random.randint(1, 5))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # The launcher's ranks have their own sessions.
    for path in (tmp_path / "run" / "heartbeat").glob("*.json"):
        try:
            os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
        except ProcessLookupError:
            pass
    process = launch(ranks, [*case, "--resume"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    check_equal(case, undisturbed[ranks])


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_a_dead_rank_is_not_a_request(flags: list[str], tmp_path: Path):
    case = [*elsewhere(flags, tmp_path / "run"), "--save_interval=2", "--max_iters=2000"]
    process = launch(2, case)
    wait_for_step(process, case, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped = read_exit_records(tmp_path / "run" / "exit")
    assert verdict([r["code"] for r in stopped], 2) == STOPPED, stopped
    last = ckpt.list_checkpoints(tmp_path / "run" / "ckpt")[-1].step
    assert last == stopped[0]["step"] == stopped[1]["step"]

    process = launch(2, [*case, "--resume"])
    wait_for_step(process, case, last + 2)
    os.kill(json.loads((tmp_path / "run" / "heartbeat" / "rank-1.json").read_text())["pid"], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    # The launcher answers a rank's death with SIGTERM to the others: they must not report a stop on request.
    assert verdict([r["code"] for r in read_exit_records(tmp_path / "run" / "exit")], 2) == CRASH


@pytest.mark.slow
def test_two_ranks_one_rank_two_ranks(flags: list[str], undisturbed: dict[int, list[str]], tmp_path: Path):
    """The number of ranks changes under way: the same samples, losses within float32's rounding."""
    case = [*elsewhere(flags, tmp_path / "run"), "--save_interval=2", "--lr_schedule=constant", "--warmup_ratio=0"]
    reference = [*elsewhere(flags, tmp_path / "reference"), "--lr_schedule=constant", "--warmup_ratio=0"]
    assert run_ranks(2, run_cases, [reference]) == [[0]] * 2
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        assert run_ranks(ranks, run_cases, [[*case, "--resume", f"--max_iters={steps}"]]) == [[0]] * ranks
    assert [r["world_size"] for r in records(case, "start")] == [2, 1, 2]
    assert [r["digest"] for r in records(case, "train")] == [r["digest"] for r in records(reference, "train")]
    assert losses(case) == pytest.approx(losses(reference), rel=1e-5)
    assert relative_difference(final_state(case, 6), final_state(reference, 6)) < 1e-3


@pytest.mark.slow
def test_ranks_that_see_different_data_stop(flags: list[str], data_dir: Path, tmp_path: Path):
    assert run_ranks(2, other_data_on_rank_1, flags, str(data_dir), str(tmp_path)) == [2, 2]
    assert "different data or tokenizers" in read_exit_records(tmp_path / "run" / "exit")[0]["reason"]


def other_data_on_rank_1(flags: list[str], data_dir: str, tmp_path: str) -> int:
    directory = Path(data_dir)
    if os.environ["RANK"] == "1":
        directory = Path(tmp_path) / "copy"
        directory.mkdir()
        for path in Path(data_dir).iterdir():
            if path.is_file():
                (directory / path.name).write_bytes(path.read_bytes())
        victim = sorted(directory.glob("train-*.bin"))[0]
        from data_preprocess.build_pretrain_sample_index_map import build
        from dataset.format import docs_path

        manifest = json.loads((directory / "pretokenize.json").read_text())
        manifest["shards"]["train"].remove(victim.name)
        (directory / "pretokenize.json").write_text(json.dumps(manifest))
        docs_path(victim).unlink()
        build(directory, SEQ_LEN)
    case = [*elsewhere(flags, Path(tmp_path) / "run"), f"--data_dir={directory}",
            f"--tokenizer_dir={data_dir}/tokenizer"]  # fmt: skip
    return train_my_ddp.main(case)

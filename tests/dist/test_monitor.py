"""monitor_process.py over real trainings: it ends when it should, goes on if it can, and says why."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

import train_my_ddp
from checkpoint import folder as ckpt
from dataset.audit import main as audit
from monitor.node import LocalNode
from monitor.status import Status
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits

pytestmark = pytest.mark.slow

ROOT = Path(train_my_ddp.__file__).parent
SCRIPT = str(ROOT / "train_my_ddp.py")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
TWO_RANKS = [TORCHRUN, "--standalone", "--nproc_per_node=2"]
STEPS = 60


def until(condition: Callable[[], object], what: str) -> object:
    """The condition's first true value."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"did not come true: {what}")


class Monitor:
    """monitor_process.py over a training, with the output of both in a file."""

    def __init__(self, launcher: list[str], script: str, flags: list[str], *options: str):
        self.run_dir = out_dir(flags)
        self._output = self.run_dir.with_name(f"{self.run_dir.name}-{time.monotonic_ns()}.out")
        options = ("--interval=0.2", *options, "--", *launcher, script, *flags)
        with open(self._output, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "monitor_process.py", *options], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def said(self) -> list[str]:
        """The monitor's own lines of the output."""
        lines = self.output.splitlines()
        return [line.removeprefix("monitor: ") for line in lines if line.startswith("monitor: ")]

    def wait(self) -> int:
        """The exit code. The last line must be the monitor's."""
        try:
            code = self.process.wait(150)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the monitor does not end:\n{self.output}") from None
        assert self.output.splitlines()[-1] == f"monitor: {self.said[-1]}", self.output
        return code

    def ask(self) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def status(self) -> Status:
        return Status.read(self.run_dir)

    def at_step(self, step: int) -> list[dict]:
        """Wait until the current launch has begun a step; returns the heartbeats of all its ranks."""
        node = LocalNode(self.run_dir)

        def beats() -> list[dict] | None:
            assert self.process.poll() is None, self.output
            found = node.poll(0).heartbeats if node.adopt() else []
            there = found and all(b["alive"] and b["phase"] != "start" and b["step"] >= step for b in found)
            return found if there else None

        return until(beats, f"step {step}")

    def job(self) -> list[psutil.Process]:
        node = LocalNode(self.run_dir)
        return node._processes() if node.adopt() else []


@pytest.fixture
def monitor() -> Iterator[Callable[..., Monitor]]:
    """Starts monitors; processes that they leave running are ended after the test."""
    started: list[Monitor] = []

    def start(*arguments: object) -> Monitor:
        started.append(Monitor(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        node = LocalNode(each.run_dir)
        node.adopt()
        node.kill()


@pytest.fixture(scope="module")
def flags(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of a few seconds with a checkpoint at every tenth step."""
    return [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path_factory.mktemp('monitored') / 'default'}",
        f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu", "--train_batch_size=2",
        "--gradient_accumulation_steps=2", "--valid_iters=2", f"--max_iters={STEPS}", "--save_interval=10",
        "--learning_rate=1e-3", "--num_threads=1", "--sample_tokens=4", *TINY_MODEL,
    ]  # fmt: skip


def show(run_dir: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "monitor_process.py", "--status", run_dir], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == OK, done.stdout + done.stderr
    return done.stdout.splitlines()


def logged(run_dir: Path) -> list[tuple[float, str]]:
    """(seconds, text) of the lines of the monitor's log that begin with a time."""
    found = []
    for line in (run_dir / "monitor" / "monitor.log").read_text().splitlines():
        if match := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) [A-Z]+ (.*)", line):
            found.append((datetime.fromisoformat(match[1]).timestamp() + int(match[2]) / 1000, match[3]))
    return found


def written_script(path: Path, patch: str) -> str:
    """A training script that is train_my_ddp.py with a mistake in it."""
    path.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train_my_ddp\nfrom training.trainer import Trainer\n"
        f"{patch}\n"
        "try:\n    code = train_my_ddp.main(sys.argv[1:])\nexcept Exception:\n    code = 1\n"
        "sys.stdout.flush()\nos._exit(code)\n"
    )
    return str(path)


def require_noticed(
    monitor: Callable[..., Monitor], flags: list[str], plain: list[str], tmp_path: Path, stopped: int
) -> None:
    """Require that a stopped rank is noticed, named and ended with the other, that both stacks are in the log, and that
    the run ends with the bits of an undisturbed one.

    Args:
        plain: flags of the undisturbed run, which has ended.
    """
    tmp_path.mkdir(exist_ok=True)
    case = elsewhere(flags, tmp_path / "hung")
    hung = monitor(TWO_RANKS, SCRIPT, case, "--hang_after=6", "--first_step_timeout=6", "--backoff=0.1")
    ranks = {beat["rank"]: beat["pid"] for beat in hung.at_step(12)}
    os.kill(ranks[stopped], signal.SIGSTOP)
    assert hung.wait() == OK, hung.output
    hangs = [text for _, text in logged(hung.run_dir) if text.startswith("hang: ")]
    assert len(hangs) == 1, hangs
    seconds, limit = map(float, re.search(r"for ([\d.]+) s in .*; ([\d.]+) s are the limit", hangs[0]).groups())
    assert limit == 6.0 and limit <= seconds < limit + 5.0
    assert hangs[0].endswith(f"stopped by a signal: rank {stopped}")
    log = (hung.run_dir / "monitor" / "monitor.log").read_text()
    for rank, pid in ranks.items():
        mark = ", stopped by a signal" if rank == stopped else ""
        assert f"rank {rank} (pid {pid}{mark}), step" in log
    assert log.count(", line ") > 10 and log.count("in train") >= 2
    assert "did not answer" not in log
    assert [text for text in hung.said if text.startswith("launch")][-1] == "launch 2 with --resume"
    # At least: it was stopped after step 12, and steps are short.
    assert records(case, "start")[-1]["step"] >= 10
    assert losses(case) == losses(plain)
    assert same_bits(final_state(case, STEPS), final_state(plain, STEPS))
    assert not any(psutil.pid_exists(pid) for pid in ranks.values())
    assert (hung.status.attempt, hung.status.restarts) == (2, 1)


def test_success_and_a_hang_on_the_way_to_the_same(monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path):
    """A finished run is not restarted. A stopped rank is noticed, named and ended with the others, their stacks are in
    the log, and the run ends with the bits of an undisturbed one."""
    plain = elsewhere(flags, tmp_path / "plain")
    undisturbed = monitor(TWO_RANKS, SCRIPT, plain)
    assert undisturbed.wait() == OK, undisturbed.output
    assert undisturbed.said == ["launch 1", "finished"]
    assert f"step {STEPS}/{STEPS} | loss" in undisturbed.output
    assert show(tmp_path / "plain")[:2] == ["finished", f"step {STEPS} of {STEPS}, loss {losses(plain)[-1]:.4f}"]
    assert f"newest checkpoint: step {STEPS}" in show(tmp_path / "plain")
    assert undisturbed.job() == []

    require_noticed(monitor, flags, plain, tmp_path, stopped=1)


@pytest.mark.soak
def test_a_stopped_stage_of_a_pipeline(monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path):
    """The other stage waits for it in the middle of a schedule."""
    flags = [*flags, "--pipeline_model_parallel_size=2"]
    plain = elsewhere(flags, tmp_path / "plain")
    assert monitor(TWO_RANKS, SCRIPT, plain).wait() == OK
    for stopped in (0, 1):
        require_noticed(monitor, flags, plain, tmp_path / str(stopped), stopped)


def test_what_is_wrong_with_the_command_is_not_tried_again(
    monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path
):
    wrong = monitor([sys.executable], SCRIPT, [*elsewhere(flags, tmp_path / "wrong"), "--valid_iters=-1"])
    refused = monitor([TORCHRUN, "--no_such_flag"], SCRIPT, elsewhere(flags, tmp_path / "refused"))
    assert wrong.wait() == WRONG_INPUT
    assert wrong.said[0] == "launch 1" and len(wrong.said) == 2
    assert "valid_iters" in wrong.said[1] and wrong.said[1].startswith("refused: ")
    assert show(tmp_path / "wrong")[0] == wrong.said[1]

    assert refused.wait() == WRONG_INPUT
    assert refused.said == ["launch 1", "refused: the command was refused before training began: see what it printed"]
    assert "unrecognized arguments: --no_such_flag" in refused.output


def test_a_crash_loop_has_an_end(monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path):
    """A training that crashes at its third step each time."""
    script = written_script(
        tmp_path / "crashing.py",
        """
step = Trainer._step
def crashes_at_step_3(self):
    if self.progress.step == 2:
        raise RuntimeError("a bug at step 3")
    return step(self)
Trainer._step = crashes_at_step_3
""",
    )
    case = elsewhere(flags, tmp_path / "run")
    options = ("--max_without_progress=1", "--give_up_after=0", "--backoff=2")
    loop = monitor([sys.executable], script, case, *options)
    assert loop.wait() == CRASH, loop.output
    reason = "rank 0: RuntimeError: a bug at step 3"
    assert loop.said[-1] == f"failed: gave up after 1 launches in a row without a new step: {reason}"
    assert [text for text in loop.said if re.fullmatch(r"launch \d", text)] == ["launch 1", "launch 2"]
    times = {text.partition(";")[0]: seconds for seconds, text in logged(loop.run_dir)}
    assert times["launch 2"] - times[f"launch 1 ended: {reason}"] >= 2.0
    assert sum("in crashes_at_step_3" in text for text in loop.said) == 2
    assert show(loop.run_dir)[0] == loop.said[-1]


def test_killed_taken_over_and_stopped(monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path):
    """The training outlives its monitor, and the same command takes it over. A second monitor is refused. On a request
    to stop, the ranks save."""
    case = [*elsewhere(flags, tmp_path / "my run"), "--max_iters=100000", "--save_interval=1000"]
    first = monitor(TWO_RANKS, SCRIPT, case)
    ranks = {beat["pid"] for beat in first.at_step(3)}
    until(lambda: first.status.state == "running" and first.status.step, "the monitor saw a step")
    lines = show(first.run_dir)
    assert lines[0] == "running" and re.match(r"step \d+ of 100000", lines[1])
    assert any(line.startswith("2 ranks in phase step on this machine; 1 launch, 0 restarts") for line in lines), lines

    second = monitor(TWO_RANKS, SCRIPT, case)
    assert second.wait() == WRONG_INPUT
    (sentence,) = second.said
    assert sentence.startswith(f"another monitor looks after {first.run_dir}: see monitor_process.py --status ")
    assert first.process.poll() is None

    first.kill()
    assert show(first.run_dir)[0].startswith("no monitor is at work: the last one wrote ")
    third = monitor(TWO_RANKS, SCRIPT, case)
    until(lambda: third.said, "the monitor spoke")
    assert third.said == ["took over launch 1, which an earlier monitor left running"]
    assert {beat["pid"] for beat in third.at_step(3)} == ranks
    assert third.ask() == STOPPED, third.output
    assert third.said[-1] == "stopped: stopped on request"
    (end,) = records(case, "end")
    assert [c.step for c in ckpt.list_checkpoints(third.run_dir / "ckpt")] == [end["step"]]
    assert (third.status.state, third.status.attempt, third.status.checkpoint) == ("stopped", 1, end["step"])
    assert third.job() == []


@pytest.mark.soak
def test_a_job_that_lost_a_rank_while_nobody_watched(
    monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path
):
    """The next monitor ends it and starts it again. (In `make test`, the chaos campaign kills a monitor.)"""
    case = [*elsewhere(flags, tmp_path / "run"), "--max_iters=100000", "--save_interval=20"]
    first = monitor(TWO_RANKS, SCRIPT, case)
    beats = first.at_step(30)
    first.kill()
    os.kill(beats[1]["pid"], signal.SIGKILL)
    second = monitor(TWO_RANKS, SCRIPT, case, "--backoff=0.1")
    until(lambda: not psutil.pid_exists(beats[0]["pid"]), "the rank that was left is gone")
    second.at_step(41)
    until(lambda: second.status.attempt == 2, "the status file tells of the second launch")
    assert second.ask() == STOPPED, second.output
    assert records(case, "start")[-1]["step"] >= 20


BAD_SAMPLE = 22


def test_a_loss_that_is_not_finite(monitor: Callable[..., Monitor], flags: list[str], tmp_path: Path):
    """A sample makes the loss NaN. --on_nonfinite=stop ends the run; otherwise the sample is left out with those since
    the last checkpoint, and the audit proves that all others were read once."""
    script = written_script(
        tmp_path / "poisoned.py",
        f"""
from tasks.language_model import LanguageModelTask
step, call, trainers = Trainer._step, LanguageModelTask.__call__, []
def _step(self):
    trainers[:] = [self]
    return step(self)
def __call__(self, batch, *losses):
    loss_sum, terms, sums = call(self, batch, *losses)
    poisoned = trainers and trainers[0].progress.samples_consumed <= {BAD_SAMPLE} < trainers[0].next_sample
    return loss_sum * (float("nan") if poisoned else 1.0), terms, sums
Trainer._step, LanguageModelTask.__call__ = _step, __call__
""",
    )
    case = [*elsewhere(flags, tmp_path / "run"), "--max_iters=8", "--save_interval=2", "--check_for_nan_in_grad"]
    stopping = monitor([sys.executable], script, case, "--on_nonfinite=stop")
    assert stopping.wait() == CRASH, stopping.output
    assert stopping.said[0] == "launch 1"
    assert stopping.said[-1].startswith("failed: rank 0: FloatingPointError: non-finite gradients at step 6 in: ")

    going_back = monitor([sys.executable], script, case, "--backoff=0.1")
    assert going_back.wait() == OK, going_back.output
    launches = [text for text in going_back.said if re.match(r"launch \d+ with", text)]
    assert launches == ["launch 2 with --resume", "launch 3 with --resume --resume_at_sample=24"]
    start = records(case, "start")[-1]
    assert start["left_out"] == [4 * start["step"], 23] and start["parent_ckpt"] == "step-4"
    assert [record["step"] for record in records(case, "train")] == list(range(1, 9))
    assert audit([str(out_dir(case))]) == 0

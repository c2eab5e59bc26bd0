"""generate.py on ranks that share a model says what one process says."""

import contextlib
import io
import json
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import generate
from model import Decoder, ModelConfig, hf
from model.config import padded_vocab_size
from serving.lockstep import Lockstep
from serving.plan import Part, StepPlan
from serving.ranks import Ranks
from tests.adapter_folders import make_adapter
from tests.dist.group import run_ranks, use_new_port
from tests.peers import peer
from tests.unit.test_tokenizer import training_texts
from tokenizer.chat_template import ChatTemplate
from tokenizer.hf_bbpe import train_hf_bbpe
from utils.files import atomic_write_json

peer("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent.parent
GREEDY = ["--temperature=0", "--max_new_tokens=8"]
MESHES = {"tensor": ["--tensor_model_parallel_size=2"], "pipe": ["--pipeline_model_parallel_size=2"]}
TALK = "hello\nand you?\n/reset\nhello\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, which says something."""
    from safetensors.torch import save_file

    tokenizer = train_hf_bbpe(training_texts(), 400, show_progress=False)
    directory = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3
    ).resolve(padded_vocab_size(tokenizer.vocab_size), 128)
    model = Decoder(config)
    model.initialize(0)
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    ends = [ChatTemplate(tokenizer).end_id, tokenizer.eod_id]
    atomic_write_json(directory / "config.json", hf.to_hf_config(config, model.norm.weight.dtype, ends))
    tokenizer.save_pretrained(directory)
    return directory


def said(argv: list[str], entered: str = "") -> list:
    """Exit code and text of a command."""
    before, sys.stdin = sys.stdin, io.StringIO(entered)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as told:
            code = generate.main(argv)
    finally:
        sys.stdin = before
    return [code, out.getvalue(), told.getvalue()]


def in_turn(commands: list[tuple[list[str], str]]) -> list[list]:
    found = []
    for argv, entered in commands:
        use_new_port()
        found.append(said(argv, entered))
    return found


def test_ranks_say_what_one_process_says(folder: Path, tmp_path: Path):
    adapter = str(make_adapter(tmp_path / "adapter", folder, target_modules="all-linear", r=4, lora_alpha=64))
    model = [f"--ckpt={folder}", "--device=cpu", "--dtype=float32"]
    asked = [
        ([*model, "--prompt=hello", *GREEDY], ""),
        ([*model, "--prompt=hello", *GREEDY, f"--adapter={adapter}"], ""),
        ([*model, "--prompt=hello", "--temperature=1", "--top_k=5", "--seed=3", "--max_new_tokens=8"], ""),
        ([*model, "--chat", *GREEDY], TALK),
    ]
    commands = [([*argv, *mesh], entered) for mesh in MESHES.values() for argv, entered in asked]
    refused = [
        ([*model, "--prompt=hello"], "2 processes cannot share one model as"),
        ([*model, "--prompt=hello", "--load_in_4bit", *MESHES["tensor"]], "--load_in_4bit keeps matrices whole"),
        ([*model, "--chat", *(f"--adapter={name}={adapter}" for name in "ab"), *MESHES["pipe"]], "one adapter at "),
    ]
    first, other = run_ranks(2, in_turn, commands + [(argv, "") for argv, _ in refused])
    alone = [said(argv, entered) for argv, entered in asked]
    assert len({text for _, text, _ in alone}) == 4
    for number, (code, text, told) in enumerate(first[: len(commands)]):
        assert [code, text] == alone[number % len(asked)][:2], (commands[number], told)
    assert all(code == 0 and not text for code, text, _ in other[: len(commands)])
    for (_, sentence), its, others in zip(refused, first[len(commands) :], other[len(commands) :], strict=True):
        assert its[0] == others[0] == 2 and sentence in its[2] and its[2].count("\n") == 1 and not others[2]


def test_several_processes_are_refused_where_there_is_one(folder: Path):
    code, _, told = said([f"--ckpt={folder}", "--prompt=hello", *MESHES["tensor"]])
    assert code == 2 and "1 process cannot share" in told and "torchrun --nproc_per_node=2" in told


def test_ranks_take_what_the_first_one_found():
    """Between their looks, a run that goes on may save a checkpoint and delete another."""
    class Other:
        def decide_on_main(self, decide: Callable) -> str:
            return "run/ckpt/step-7"

    assert Ranks(None, Other(), None).resolve(Path("run")) == Path("run/ckpt/step-7")


class Recorder:
    """Replaces a runner: remembers what it runs."""

    def __init__(self, fails_at: int = -1):
        self.plans: list[StepPlan] = []
        self._fails_at = fails_at

    def run(self, plan: StepPlan) -> torch.Tensor:
        self.plans.append(plan)
        if len(self.plans) == self._fails_at:
            raise MemoryError
        return torch.zeros(1)


def test_the_others_run_the_first_ones_plans():
    """The ranks take turns here: what the first one passes on, as JSON, the other one takes."""
    passed: list[str] = []
    plans = [StepPlan([Part([1, 2], 0, [4], 0), Part([3], 7, [5, 6], 1)], [(4, 9)]), StepPlan([], [], "sql")]
    first, other = Recorder(), Recorder()
    ours = Lockstep(first, lambda value: passed.append(json.dumps(value)) or value)
    for plan in plans:
        ours.run(plan)
    ours.end()
    Lockstep(other, lambda value: json.loads(passed.pop(0))).follow()
    assert first.plans == other.plans == plans and not passed
    assert all(type(part) is Part for plan in other.plans for part in plan.parts)


def test_the_others_end_when_the_first_one_has_gone(caplog: pytest.LogCaptureFixture):
    def gone(value: object) -> object:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")

    with pytest.raises(ConnectionError, match="another rank has ended without a word"):
        Lockstep(Recorder(), gone).follow()
    assert "another rank has ended" in caplog.text


def test_a_step_that_failed_is_the_last_one():
    """The others are in the middle of it. They must neither be sent another plan nor be told to end: whatever comes,
    they would take it for a part of a sum."""
    passed: list = []
    ours = Lockstep(Recorder(fails_at=2), lambda value: passed.append(value))
    ours.run(StepPlan([], []))
    with pytest.raises(MemoryError):
        ours.run(StepPlan([], []))
    with pytest.raises(RuntimeError, match="start them anew"):
        ours.run(StepPlan([], []))
    ours.end()
    assert len(passed) == 2


def kill_the_other(talk: subprocess.Popen, ranks: list[psutil.Process]) -> None:
    """It is killed between two questions: the first rank finds out when it asks for the next pass."""
    ranks[1].kill()
    talk.stdin.write(b"and you?\n")


def leave_the_pipe(talk: subprocess.Popen, ranks: list[psutil.Process]) -> None:
    talk.stdout.close()
    talk.stdin.write(b"hello\n" * 9)


def interrupt_twice(talk: subprocess.Popen, ranks: list[psutil.Process]) -> None:
    """All ranks, as a terminal does, in the course of an answer. Two that come together can count as one, which ends
    the answer; the talk then ends with its input."""
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
    talk.stdin.close()


def interrupt_the_first(talk: subprocess.Popen, ranks: list[psutil.Process]) -> None:
    """As at a prompt, where it ends the talk; before, it would end the answer alone."""
    while select.select([talk.stdout], [], [], 3.0)[0]:
        assert talk.stdout.read(1000)
    ranks[0].send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "fault", [kill_the_other, *(pytest.param(fault, marks=pytest.mark.soak)
                                for fault in (leave_the_pipe, interrupt_the_first, interrupt_twice))],
)  # fmt: skip
def test_all_ranks_end_when_one_does(folder: Path, fault: Callable):
    command = [sys.executable, "-m", "parallel.launch", "--nproc_per_node=2", "generate.py", f"--model={folder}",
               "--device=cpu", "--dtype=float32", "--chat", *GREEDY, *MESHES["tensor"]]  # fmt: skip
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(command, cwd=ROOT, bufsize=0, **pipes) as talk:
        try:
            talk.stdin.write(b"hello\n")
            assert talk.stdout.read(1)
            ranks = [one for one in psutil.Process(talk.pid).children(recursive=True) if "generate.py" in one.cmdline()]
            ranks.sort(key=lambda one: int(one.environ()["RANK"]))
            assert len(ranks) == 2
            with contextlib.suppress(BrokenPipeError):
                fault(talk, ranks)
            code = talk.wait(60)
            # The answer may have ended between the two.
            assert (code == 0) == (fault is interrupt_the_first) or fault is interrupt_twice
            assert fault is not interrupt_twice or b"Traceback" not in talk.stderr.read()
            assert not psutil.wait_procs(ranks, 10)[1]
        finally:
            talk.kill()

"""generate.py with several prompts or texts, and what it prints about them."""

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import generate
from serving import local
from serving.engine import Engine
from serving.generation import generate as plain_tokens
from serving.loading import load
from serving.plan import StepPlan
from serving.requests import Piece, Request
from serving.runner import Runner
from tests.unit.test_chat import complete, folder, talk, tokenizer
from tokenizer.chat_template import ChatTemplate, Message

__all__ = ["folder", "tokenizer"]
TEXTS = ["hello", "def f(", "漢字 " * 10]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """The plain loop's greedy texts."""
    served = load(folder, {}, torch.device("cpu"), torch.float32)
    asked = {text: served.tokenizer.encode(text) for text in TEXTS}
    asked["hello?"] = ChatTemplate(served.tokenizer).prompt([Message("system", "s"), Message("user", "hello")])
    return {
        text: served.tokenizer.decode(list(plain_tokens(
            served.model, ids, 20, served.stop_ids, 0.0, vocab_size=served.tokenizer.vocab_size)))
        for text, ids in asked.items()
    }  # fmt: skip


def test_many_prompts_are_those_of_the_plain_loop(
    folder: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    records = [{"prompt": text, "id": number} for number, text in enumerate(TEXTS)]
    records.append({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]})
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, err = complete(folder, capsys, f"--prompts={path}", "--json", "--n=2")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and not err and [{**answer, "choices": 0} for answer in answers] == [
        {**record, "choices": 0} for record in records
    ]  # fmt: skip
    texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    assert texts == [[expected[text]] * 2 for text in [*TEXTS, "hello?"]]
    assert {choice["finish_reason"] for answer in answers for choice in answer["choices"]} <= {"length", "stop"}
    # The same for people, from standard input.
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    code, out, err = complete(folder, capsys, "--prompts=-")
    titled = "".join(f"--- {n} of 3\n{text}{expected[text]}\n" for n, text in enumerate(TEXTS, 1))
    assert (code, out, err) == (0, titled, "")


def test_a_seed_and_a_number_of_texts(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The first text is the one that is drawn alone."""
    flags = ["--prompt=hello", "--temperature=1", "--seed=3"]
    alone = complete(folder, capsys, *flags)[1]
    three = complete(folder, capsys, *flags, "--n=3")[1]
    texts = three.split("--- text ")[1:]
    assert texts[0] == f"1 of 3\n{alone}" and len({text[7:] for text in texts}) == 3
    beams = [json.loads(complete(folder, capsys, "--prompt=hello", "--num_beams=3", "--n=2", "--json")[1])
             for _ in range(2)]  # fmt: skip
    assert beams[0] == beams[1] and len({choice["text"] for choice in beams[0]["choices"]}) == 2


def test_the_table_of_probabilities(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Greedy: each token is the likeliest one itself."""
    code, out, _ = complete(folder, capsys, "--prompt=hello", "--logprobs=2")
    rows = out[out.index("\ntoken") :].splitlines()[2:]
    assert code == 0 and len(rows) == 20
    assert all(row.count('"') >= 6 and " -" in row for row in rows)
    record = json.loads(complete(folder, capsys, "--prompt=hello", "--logprobs=2", "--json")[1])
    for token in record["choices"][0]["logprobs"]:
        first, second = token["top"]
        assert token["id"] == first["id"] and token["logprob"] == first["logprob"] >= second["logprob"]


def test_a_stop_text_ends_a_text(folder: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]):
    stop = expected["hello"][5:7]
    before = expected["hello"].partition(stop)[0]
    assert complete(folder, capsys, "--prompt=hello", f"--stop={stop}")[:2] == (0, f"hello{before}\n")


def test_a_record_that_leaves_no_room_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "p.txt"
    path.write_text("hello\n" + "漢" * 43 + "\n")
    code, out, err = complete(folder, capsys, f"--prompts={path}")
    assert (code, out) == (2, "") and f"{path}, line 2: the prompt has 129 tokens" in err


def test_a_turn_computes_only_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The blocks of a talk's earlier turns are found again. (The context has 128 tokens, a block 16.)"""
    found, step = [], Engine.step

    def watched(engine: Engine) -> list[Piece]:
        pieces = step(engine)
        found.extend(piece.cached_tokens for piece in pieces if piece.finish)
        return pieces

    monkeypatch.setattr(Engine, "step", watched)
    assert talk(folder, monkeypatch, "hello hello hello hello\nand\n/regenerate\n/reset\nand\n") == 0
    assert found[0] == 0 and found[1] >= 16 and found[2] >= found[1] and found[3] == 0


class Busy:
    """Replaces an engine that has work for ever. At its third step, the user presses Ctrl-C so many times."""

    def __init__(self, times: int = 1):
        self.steps, self.open, self.times = 0, set(), times

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def submit(self, request) -> None:
        self.open.add(request.id)

    def cancel(self, request_id: str) -> None:
        self.open.discard(request_id)

    def step(self) -> list[Piece]:
        self.steps += 1
        if self.steps == 3:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
            # The handler was called, and the step is not broken off.
            self.steps = 100
        return [Piece("a", 0, "x")]


def test_ctrl_c_waits_for_the_end_of_a_step():
    engine, pieces = Busy(), []
    with pytest.raises(KeyboardInterrupt):
        for piece in local.pieces_of(engine, [Request("a", (1,))]):
            pieces.append(piece)
    assert engine.steps == 100 and len(pieces) == 3 and not engine.open


def test_a_second_ctrl_c_within_a_step_ends_the_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The engine could neither be asked again nor cancel the request, which it may hold in parts."""
    before, engine = signal.getsignal(signal.SIGINT), Busy(times=2)
    with pytest.raises(local.BrokenOff):
        list(local.pieces_of(engine, [Request("a", (1,))]))
    assert engine.steps == 3 and engine.open and signal.getsignal(signal.SIGINT) is before
    run = Runner.run

    def interrupted(runner: Runner, plan: StepPlan) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        if plan.parts[0].start:
            signal.raise_signal(signal.SIGINT)
        return run(runner, plan)

    monkeypatch.setattr(Runner, "run", interrupted)
    assert talk(folder, monkeypatch, "hello\nnever asked\n") == 130
    said = capsys.readouterr()
    assert "the model cannot go on: start it again" in said.err and said.err.count("\n") == 1


def test_a_folder_recommends_how_to_draw(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 0.5}))
    flags = ["--prompt=hello", "--device=cpu", "--dtype=float32", "--max_new_tokens=9"]
    assert generate.main([f"--model={tmp_path / 'm'}", *flags]) == 0
    greedy = capsys.readouterr().out
    assert greedy == complete(folder, capsys, "--prompt=hello", "--max_new_tokens=9")[1]
    assert generate.main([f"--model={tmp_path / 'm'}", *flags, "--top_k=0", "--temperature=3", "--seed=1"]) == 0
    assert capsys.readouterr().out != greedy

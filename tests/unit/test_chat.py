"""generate.py --chat: history, forgetting, stopping, and the terminal."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import generate
from data_preprocess.conversations import parse_record
from model import Decoder, ModelConfig, hf
from model.config import padded_vocab_size
from serving.chat import Chat
from serving.engine import Engine
from serving.requests import Piece, Request, Sampling, TokenScore
from serving.terminal import questions
from tests.unit.test_tokenizer import training_texts
from tokenizer import Tokenizer
from tokenizer.chat_template import ChatTemplate, Message
from tokenizer.hf_bbpe import train_hf_bbpe
from utils.files import atomic_write_json


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_hf_bbpe(training_texts(), 400, show_progress=False)


class Parrot:
    """Replaces an engine: gives prepared answers, and remembers the questions."""

    def __init__(self, tokenizer: Tokenizer, *answers: str):
        self.tokenizer, self.answers, self.prompts, self.seeds = tokenizer, list(answers), [], []

    def __call__(self, request: Request) -> Iterator[Piece]:
        self.prompts.append(self.tokenizer.decode(list(request.prompt_ids)))
        self.seeds.append(request.sampling.seed)
        assert request.sampling.stop_ids == {self.tokenizer.special_ids["<|im_end|>"], self.tokenizer.eod_id}
        ids = self.tokenizer.encode(self.answers.pop(0))
        most = request.sampling.max_new_tokens
        for number, token_id in enumerate(ids[:most]):
            is_last = number + 1 == min(most, len(ids))
            finish = ("length" if len(ids) >= most else "stop") if is_last else None
            yield Piece(request.id, 0, self.tokenizer.decode([token_id]), (TokenScore(token_id),), finish)


def chat_with(parrot: Parrot, most: int, room: int, system: str = "", seed: int | None = None) -> Chat:
    return Chat(parrot.tokenizer, parrot, Sampling(max_new_tokens=most, seed=seed), room, system)


def test_history(tokenizer: Tokenizer):
    parrot = Parrot(tokenizer, "one", "two or", "three")
    chat = chat_with(parrot, 50, 1000, "be brief")
    assert "".join(chat.answer("1?")) == "one" and "".join(chat.answer("2?")) == "two or"
    said = [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two or")]
    assert [(message.role, message.text) for message in chat.messages] == said
    whole = ChatTemplate(tokenizer).prompt([Message("system", "be brief"), *[Message(*turn) for turn in said[:3]]])
    assert parrot.prompts[1] == tokenizer.decode(whole)
    chat.reset()
    assert "".join(chat.answer("3?")) == "three"
    assert "1?" not in parrot.prompts[2] and "be brief" in parrot.prompts[2]


def test_another_answer_takes_the_place_of_the_last_one(tokenizer: Tokenizer):
    """The same prompt, and another seed; the next question finds the new answer."""
    parrot = Parrot(tokenizer, "a", "b", "c", "d", "e")
    chat = chat_with(parrot, 50, 1000, seed=7)
    with pytest.raises(ValueError, match="nothing was asked yet"):
        chat.again()
    said = ["".join(answer) for answer in (chat.answer("1?"), chat.answer("2?"))]
    said += ["".join(chat.again()), "".join(chat.again()), "".join(chat.answer("3?"))]
    assert said == list("abcde")
    assert parrot.prompts[1] == parrot.prompts[2] == parrot.prompts[3] and parrot.seeds == [7, 7, 8, 9, 7]
    assert [message.text for message in chat.messages] == ["1?", "a", "2?", "d", "3?", "e"]


def test_an_answer_that_was_cut_is_known(tokenizer: Tokenizer):
    most = len(tokenizer.encode("one two three four"))
    chat = chat_with(Parrot(tokenizer, "one two three four five six", "one", "one two three"), most, 1000)
    cut = []
    for question in "abc":
        "".join(chat.answer(question))
        cut.append(chat.was_cut)
    assert cut == [True, False, False]


def test_oldest_exchanges_are_forgotten(tokenizer: Tokenizer):
    """Whole exchanges are left out, and never the system text; a question that is too long by itself is refused and
    leaves no trace. What was said can still be saved."""
    parrot = Parrot(tokenizer, *["answer"] * 6)
    room = len(ChatTemplate(tokenizer).prompt([Message("system", "s"), *[Message("user", "question 0")] * 3])) + 40
    chat, forgotten = chat_with(parrot, 10, room, "s"), []
    for number in range(6):
        "".join(chat.answer(f"question {number}"))
        forgotten.append(chat.forgotten)
        prompt = parrot.prompts[-1]
        assert prompt.startswith("<|im_start|>system<|im_sep|>s<|im_end|><|im_start|>user<|im_sep|>question ")
        assert f"question {number}<|im_end|><|im_start|>assistant<|im_sep|>" in prompt
        assert len(tokenizer.encode(prompt)) > 0 and prompt.count("question ") == number + 1 - chat.forgotten // 2
        seen = [Message("system", "s"), *chat.messages[chat.forgotten : -1]]
        assert len(ChatTemplate(tokenizer).prompt(seen)) + 10 <= room
    assert forgotten[0] == 0 < forgotten[-1] and forgotten == sorted(forgotten)
    before = list(chat.messages)
    with pytest.raises(ValueError, match="the question with the system text has .* tokens"):
        next(chat.answer("x" * 2 * room))
    assert chat.messages == before and len(before) == 12


def test_an_answer_that_is_broken_off_stays_as_far_as_it_went(tokenizer: Tokenizer):
    chat = chat_with(Parrot(tokenizer, "a b c d"), 50, 1000)
    answer = chat.answer("q")
    first = next(answer)
    answer.close()
    assert chat.messages[-1] == Message("assistant", first) and first in "a b c d"


def test_a_saved_conversation_is_what_sft_reads(tokenizer: Tokenizer, tmp_path: Path):
    chat = chat_with(Parrot(tokenizer, "one\n", "two", " ", "three"), 50, 1000, "be brief")
    path = tmp_path / "talk.jsonl"
    with pytest.raises(ValueError, match="nothing was said yet"):
        chat.save(path)
    for question in ("1?\n2?", "漢字", "3?"):
        "".join(chat.answer(question))
        count = chat.save(path)
    record = parse_record(json.loads(path.read_text("utf-8")))
    assert [len(line) > 9 for line in path.read_text("utf-8").splitlines()] == [True]
    said = [("system", "be brief"), ("user", "1?\n2?"), ("assistant", "one\n"), ("user", "漢字"), ("assistant", "two")]
    assert [(message.role, message.text) for message in record.messages] == said and count == 5
    chat.reset()
    "".join(chat.answer("3?"))
    with pytest.raises(ValueError, match="exists: give another name"):
        chat.save(path)
    with pytest.raises(ValueError, match=f"cannot be written: there is no folder {tmp_path}/none; make it"):
        chat.save(tmp_path / "none" / "talk.jsonl")


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, which says something."""
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.3
    ).resolve(padded_vocab_size(tokenizer.vocab_size), 128)
    model = Decoder(config)
    model.initialize(0)
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    ends = [ChatTemplate(tokenizer).end_id, tokenizer.eod_id]
    atomic_write_json(directory / "config.json", hf.to_hf_config(config, model.norm.weight.dtype, ends))
    tokenizer.save_pretrained(directory)
    return directory


def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, *more: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    flags = ["--temperature=0", "--max_new_tokens=5", "--device=cpu", "--dtype=float32"]
    return generate.main(["--ckpt", str(folder), "--chat", *flags, *more])


def test_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each line is a question; /reset makes the second answer equal to the first; blank lines are skipped."""
    assert talk(folder, monkeypatch, "hello\n\n/reset\nhello\n/exit\nnever asked\n") == 0
    out = capsys.readouterr().out
    answers = out[: len(out) // 2], out[len(out) // 2 :]
    assert answers[0] == answers[1] and answers[0].strip()
    assert talk(folder, monkeypatch, "", "--prompt", "hello") == 0
    assert capsys.readouterr().out == answers[0]


def test_who_was_never_taught_to_answer(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """It is said once; for a model whose folder names the end of a message, nothing is said."""
    assert talk(folder, monkeypatch, "quit\n") == 0
    assert not capsys.readouterr().err
    untaught = shutil.copytree(folder, tmp_path / "untaught")
    config = json.loads((untaught / "config.json").read_text())
    (untaught / "config.json").write_text(json.dumps(config | {"eos_token_id": config["eos_token_id"][1]}))
    assert talk(untaught, monkeypatch, "/help\n/forget\nexit\nnever asked\n") == 0
    said = capsys.readouterr()
    assert said.err.count("may never have seen a conversation") == 1 and not said.out
    assert "/forget is not a command: /help lists them" in said.err and said.err.count("/regenerate") == 1


def test_a_question_that_is_too_long_does_not_end_the_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert talk(folder, monkeypatch, "漢" * 500 + "\na\udcff\nhello\n") == 0
    said = capsys.readouterr()
    assert "the question has" in said.err and "the question is not UTF-8" in said.err
    assert said.err.count("\n") == 2 and said.out.strip()


@pytest.mark.parametrize(
    ("arguments", "sentence"), [
        ([], "--prompt is missing"), (["--prompt=x", "--system=y"], "--system needs --chat"),
        (["--prompt=a\udcff"], "--prompt is not UTF-8"), (["--chat", "--system=a\udcff"], "--system is not UTF-8"),
        (["--prompt=x", "--top_k=-1"], "--top_k must not be negative, got -1"),
        (["--prompt=x", f"--seed={1 << 63}"], "--seed must lie between -2^63 and 2^63 - 1, got 9223372036854775808"),
        (["--prompt=x", "--temperature=nan"], "--temperature must not be negative, got nan"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str):
    assert generate.main(["--ckpt", str(folder), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def complete(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    flags = ["--temperature=0", "--device=cpu", "--dtype=float32", "--max_new_tokens=20"]
    code = generate.main(["--ckpt", str(folder), *flags, *more])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_prompt_and_the_context(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The context has 128 tokens. If the request does not fit, one message says so, and how much fits."""
    assert complete(folder, capsys, "--prompt=" + "漢" * 30)[::2] == (0, "")
    code, out, err = complete(folder, capsys, "--prompt=" + "漢" * 40)
    assert (code, err.count("\n")) == (0, 1) and "120 tokens of prompt leave room for 8 of --max_new_tokens 20" in err
    assert len(out) > 40
    code, out, err = complete(folder, capsys, "--prompt=" + "漢" * 43)
    assert (code, out, err.count("\n")) == (2, "", 1) and "the prompt has 129 tokens" in err
    code, _, err = complete(folder, capsys, "--chat", "--prompt=hello", "--max_new_tokens=125")
    assert (code, err.count("\n")) == (0, 1) and "tokens of prompt leave room for" in err


def test_half_of_the_context_is_for_what_was_said(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    assert talk(folder, monkeypatch, "quit\n", "--max_new_tokens=65") == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "an answer has room for 64 of --max_new_tokens 65" in err


def generated_tokens(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each text that is generated from now on."""
    said, step, submit = [], Engine.step, Engine.submit

    def submitted(engine: Engine, request: Request) -> None:
        said.append([])
        submit(engine, request)

    def watched(engine: Engine) -> list[Piece]:
        pieces = step(engine)
        for piece in pieces:
            said[-1] += [token.id for token in piece.tokens]
        return pieces

    monkeypatch.setattr(Engine, "submit", submitted)
    monkeypatch.setattr(Engine, "step", watched)
    return said


@pytest.mark.parametrize("how", [[], ["--chat"]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_all_that_the_folder_names_ends_a_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str],
    name: str,
):  # fmt: skip
    """An answer, too, beyond the ends that the chat template names."""
    said = generated_tokens(monkeypatch)
    shutil.copytree(folder, tmp_path / "m")
    assert complete(tmp_path / "m", capsys, "--prompt=hello", *how)[0] == 0
    stop = next(token_id for token_id in said[0][2:] if token_id not in said[0][:2])
    values = json.loads((folder / name).read_text()) if name == "config.json" else {}
    atomic_write_json(tmp_path / "m" / name, values | {"eos_token_id": [1, stop]})
    assert complete(tmp_path / "m", capsys, "--prompt=hello", *how)[0] == 0
    assert said[1] == said[0][: said[0].index(stop)]
    (tmp_path / "m" / name).write_text("[]")
    code, out, err = complete(tmp_path / "m", capsys, "--prompt=hello", *how)
    assert (code, out, err.count("\n")) == (2, "", 1) and name in err


@pytest.mark.parametrize("puts_one_in_front", [False, True])
def test_a_text_begins_as_the_tokenizer_says(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puts_one_in_front: bool
):
    """As transformers' tokenizer of the folder does it; a conversation begins as its template says."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import processors
    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path / "m")
    library = LibraryTokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    begin = "<|im_sep|>"
    if puts_one_in_front:
        library.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, tokenizer.special_ids[begin])]
        )
        library.save(str(tmp_path / "m" / "tokenizer.json"))
    asked, submit = [], Engine.submit

    def watched(engine: Engine, request: Request) -> None:
        asked.append(list(request.prompt_ids))
        submit(engine, request)

    monkeypatch.setattr(Engine, "submit", watched)
    for how in ([], ["--chat"]):
        assert generate.main(["--ckpt", str(tmp_path / "m"), "--prompt=hello", "--max_new_tokens=2", *how]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    talk = theirs.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert asked == [theirs("hello")["input_ids"], talk["input_ids"]]
    assert (asked[0][0] == tokenizer.special_ids[begin]) == puts_one_in_front


def read_all(monkeypatch: pytest.MonkeyPatch, entered: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(entered))
    return list(questions(False))


def test_questions_of_several_lines(monkeypatch: pytest.MonkeyPatch):
    assert read_all(monkeypatch, "a\\\n b \\\nc\n\n/reset\n") == ["a\n b \nc", "/reset"]
    assert read_all(monkeypatch, 'x\n"""\na\n\n  b\\\n"""\ny "" z\n') == ["x", "a\n\n  b\\", 'y "" z']
    # The input ends in the middle of one.
    assert read_all(monkeypatch, '"""\na\nb') == ["a\nb"] and read_all(monkeypatch, "a\\\n") == ["a"]


def test_commands_of_a_talk(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Another answer takes the last one's place, which at temperature 0 is the same; the talk is saved once."""
    monkeypatch.chdir(tmp_path)
    entered = "/regenerate\n/save a\n/system\n/system Be\\\nbrief.\nhello\n/regenerate\n/save a\n/save\n/etc\n"
    assert talk(folder, monkeypatch, f"{entered}/reset\n/save a\n/system none\nhello\n/save a\n") == 0
    said = capsys.readouterr()
    told = [line.removeprefix("generate: ") for line in said.err.splitlines()]
    assert told == [
        "nothing was asked yet", "nothing was said yet", "the model is told first: (nothing)",
        "the model is told first: Be", "brief.",
        "3 messages, the system text among them, are in a.jsonl, for --task_type=sft",
        "/save needs the name of a file", "/etc is not a command: /help lists them", "nothing was said yet",
        "the model is told first: (nothing)", "a.jsonl exists: give another name",
    ]  # fmt: skip
    record = parse_record(json.loads((tmp_path / "a.jsonl").read_text("utf-8")))
    assert [message.role for message in record.messages] == ["system", "user", "assistant"]
    first = record.messages[-1].text
    assert said.out.startswith(f"{first}\n{first}\n") and (first + "\n") * 3 != said.out


def test_a_talk_that_outgrows_the_context_says_so(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    assert talk(folder, monkeypatch, "hello hello hello\n" * 12) == 0
    err = capsys.readouterr().err
    assert "it no longer sees the first 2 messages" in err and "the first 4 messages" in err

"""SFT and DPO with the training script on one process: learnt tokens, kept files, refusals."""

import gc
import hashlib
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_weights
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import train_my_ddp
import training.trainer as trainer_module
from checkpoint.folder import find_problem
from data_preprocess import pretokenize_sft_data
from dataset import audit, inspect, show_mask
from dataset.sequences import SequenceSet
from dataset.sft import SFTDataset
from model import Decoder, flops, hf
from model.config import ModelConfig
from serving.generation import generate as new_tokens
from serving.generation import load_model
from tasks.dpo import DPOTask
from tasks.language_model import LanguageModelTask
from tasks.reference import ReferenceCache
from tests.conftest import TINY_MODEL
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits
from tests.unit.test_train import train_until
from tokenizer import load_tokenizer
from tokenizer.chat_template import ChatTemplate, Message
from tokenizer.hf_bbpe import HFBBPETokenizer, train_hf_bbpe

SEQ_LEN = 96
PAIRS = 50
WORDS = (
    "the a red blue old new house river stone bird sings falls under over quick slow light dark moon sun rain cold "
    "warm small big hill road"
).split()


def conversations(count: int = PAIRS, seed: int = 0) -> list[tuple[str, str]]:
    """Questions and their answers, of ragged lengths; every question is different."""
    generator = random.Random(seed)

    def some(most: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, most)))

    return [(f"{some(2)} {number}?", f"{some(6)}.") for number in range(count)]


def damaged(answer: str) -> str:
    """The answer with its words in another order and one more word."""
    words = answer.rstrip(".").split()
    return " ".join([*reversed(words), WORDS[(WORDS.index(words[0]) + 7) % len(WORDS)]]) + "."


def write_sft(directory: Path, talks: list[tuple[str, str]]) -> Path:
    """Raw records of conversations."""
    directory.mkdir(parents=True)
    with open(directory / "talks.jsonl", "w") as file:
        for question, answer in talks:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return directory


def write_dpo(directory: Path, talks: list[tuple[str, str]]) -> Path:
    """Raw records of preferences for the right answers."""
    directory.mkdir(parents=True)
    with open(directory / "preferences.jsonl", "w") as file:
        for question, answer in talks:
            file.write(json.dumps({"prompt": question, "chosen": answer, "rejected": damaged(answer)}) + "\n")
    return directory


def pretokenize(raw: Path, tokenizer: Path, output: Path, task: str, *more: str) -> Path:
    command = ["--data_dir", str(raw), "--tokenizer_dir", str(tokenizer), "--output_dir", str(output), "--task", task,
               "--max_seq_len", str(SEQ_LEN), "--num_workers", "1", *more]  # fmt: skip
    assert pretokenize_sft_data.main(command) == 0
    return output


def write_model(directory: Path, tokenizer: HFBBPETokenizer, seed: int = 7) -> Path:
    """A Hugging Face folder with random weights, large enough that answers differ in probability."""
    config = ModelConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True,
        max_position_embeddings=SEQ_LEN, initializer_range=0.1,
    ).resolve()  # fmt: skip
    model = Decoder(config)
    model.initialize(seed)
    directory.mkdir(parents=True)
    save_weights(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32)))
    tokenizer.save_pretrained(directory)
    return directory


def train_tokenizer() -> HFBBPETokenizer:
    return train_hf_bbpe([" ".join(WORDS) * 5] * 3, 320, show_progress=False)


class Home:
    """Data and weights that the tests of this file share, and must not change."""

    def __init__(self, path: Path):
        tokenizer = train_tokenizer()
        tokenizer.save_pretrained(path / "tokenizer")
        self.path, self.tokenizer = path, path / "tokenizer"
        talks = conversations()
        self.raw_sft, self.raw_dpo = write_sft(path / "raw-sft", talks), write_dpo(path / "raw-dpo", talks)
        self.sft = pretokenize(self.raw_sft, self.tokenizer, path / "sft", "sft")
        self.dpo = pretokenize(self.raw_dpo, self.tokenizer, path / "dpo", "dpo")
        self.sft_held_out = pretokenize(self.raw_sft, self.tokenizer, path / "sft-v", "sft", "--valid_ratio", "0.3")
        self.dpo_held_out = pretokenize(self.raw_dpo, self.tokenizer, path / "dpo-v", "dpo", "--valid_ratio", "0.3")
        self.model = write_model(path / "model", tokenizer)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    """Measuring the machine's peak takes a while, and matters to no test here."""
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


def base_flags(directory: Path) -> list[str]:
    return [
        f"--out_dir={directory / 'run'}", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
        "--train_batch_size=2", "--gradient_accumulation_steps=2", "--valid_batch_size=4", "--max_iters=4",
        "--learning_rate=3e-3", "--num_threads=1", "--sample_tokens=4",
    ]  # fmt: skip


@pytest.fixture
def sft_flags(home: Home, tmp_path: Path) -> list[str]:
    return [*base_flags(tmp_path), "--task_type=sft", f"--data_dir={home.sft}", f"--init_from={home.model}"]


@pytest.fixture
def dpo_flags(home: Home, tmp_path: Path) -> list[str]:
    """On a copy of the data, because the reference is kept beside it."""
    shutil.copytree(home.dpo, tmp_path / "data")
    return [*base_flags(tmp_path), "--task_type=dpo", f"--data_dir={tmp_path / 'data'}", f"--init_from={home.model}"]


@pytest.fixture(params=["sft", "sft unpacked", "dpo"])
def any_flags(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "dpo":
        return request.getfixturevalue("dpo_flags")
    return [*request.getfixturevalue("sft_flags"), *(["--no-packing"] if "unpacked" in request.param else [])]


def train(flags: list[str], *more: str) -> int:
    return train_my_ddp.main([*flags, *more])


def with_data(flags: list[str], directory: Path) -> list[str]:
    return [*(flag for flag in flags if not flag.startswith("--data_dir=")), f"--data_dir={directory}"]


def without(flags: list[str], *names: str) -> list[str]:
    return [flag for flag in flags if flag.partition("=")[0] not in names]


def refusal(capsys: pytest.CaptureFixture, flags: list[str], *more: str) -> str:
    """The one sentence that refuses a command."""
    capsys.readouterr()
    assert train(flags, *more) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("train_my_ddp: "), lines
    return lines[0]


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash(*_: object) -> None:
    raise OSError("the machine died")


# One set of sequences, packed and unpacked.


@pytest.mark.parametrize("double", [False, True])
def test_packing_changes_neither_loss_nor_gradient(home: Home, double: bool, monkeypatch: pytest.MonkeyPatch):
    """The same sequences, four in a batch, alone and in shared rows. In float64 only a leak between neighbours could
    make a difference."""
    model = Decoder(hf.read_config(home.model))
    hf.load_weights(model, home.model)
    if double:
        model.double()
        # Norms, rotations and the cross entropy go through float32, whatever the weights' dtype.
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    task = LanguageModelTask(model, 0, torch.empty(0))
    results = []
    for packing in (True, False):
        data = SFTDataset(home.sft, "train", SEQ_LEN, packing)
        model.zero_grad()
        total = count = 0
        for start in range(0, len(data), 4):
            batch = data.collate(np.arange(start, min(start + 4, len(data))))
            loss_sum, terms, _ = task(batch | {"row_ids": batch["sample_ids"]})
            loss_sum.backward()
            total, count = total + loss_sum.item(), count + terms
        results.append((total, count, {name: p.grad.double() for name, p in model.named_parameters()}, len(data)))
    (packed, packed_count, packed_gradients, rows), (alone, count, gradients, sequences) = results
    assert rows < sequences == PAIRS and packed_count == count == data.sequences.supervised_tokens
    tolerance = 1e-12 if double else 1e-5
    assert packed == pytest.approx(alone, rel=tolerance)
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_neighbours_in_a_row_do_not_see_each_other(home: Home):
    """Each sequence's hidden states in a packed row are those of the sequence alone, also at its border."""
    model = Decoder(hf.read_config(home.model)).eval()
    hf.load_weights(model, home.model)
    task, data = LanguageModelTask(model, 0, torch.empty(0)), SFTDataset(home.sft, "train", SEQ_LEN)
    crowded = max(range(len(data)), key=lambda row: len(data.members(row)))
    assert len(data.members(crowded)) >= 3
    with torch.no_grad():
        hidden = task.hidden(data.collate(np.array([crowded])) | {"row_ids": torch.zeros(1)})[0]
        begin = 0
        for number in data.members(crowded):
            ids = torch.from_numpy(data.sequences.sequence(number)[0][:-1].astype(np.int64))
            assert torch.allclose(hidden[begin : begin + len(ids)], model(ids[None])[0], atol=1e-5)
            begin += len(ids)


def one_epoch(flags: list[str], rows: int) -> list[str]:
    """One step on the whole set."""
    return [*flags, f"--train_batch_size={rows}", "--gradient_accumulation_steps=1", "--max_iters=1"]


def test_a_step_on_the_whole_set_is_the_same_packed_and_unpacked(home: Home, sft_flags: list[str], tmp_path: Path):
    packed = one_epoch(sft_flags, len(SFTDataset(home.sft, "train", SEQ_LEN)))
    alone = [*one_epoch(elsewhere(sft_flags, tmp_path / "alone"), PAIRS), "--no-packing"]
    assert train(packed) == train(alone) == 0
    (ours,), (theirs,) = records(packed, "train"), records(alone, "train")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    # Padding is not read.
    assert ours["tokens"] == theirs["tokens"] == int((SequenceSet(home.sft, "train", "sft", SEQ_LEN).lengths - 1).sum())
    assert ours["digest"] != theirs["digest"]


def test_validation_is_the_same_packed_and_unpacked(home: Home, sft_flags: list[str], tmp_path: Path):
    flags = [*with_data(sft_flags, home.sft_held_out), "--valid_only"]
    seen = []
    for packing, batch in ((True, 3), (False, 5), (False, 1)):
        case = [
            *elsewhere(flags, tmp_path / f"{packing}-{batch}"),
            f"--packing={packing}",
            f"--valid_batch_size={batch}",
        ]
        assert train(case) == 0
        seen.append(records(case, "valid")[0])
    assert seen[0]["tokens"] == seen[1]["tokens"] == seen[2]["tokens"] > 0
    for name in ("loss", "bits_per_byte"):
        assert [r[name] for r in seen] == pytest.approx([seen[0][name]] * 3, rel=1e-6)


# Raw records.


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_samples_answer_held_out_questions(
    home: Home, sft_flags: list[str], dpo_flags: list[str], task: str, capsys: pytest.CaptureFixture
):
    flags = with_data(
        sft_flags if task == "sft" else dpo_flags, home.sft_held_out if task == "sft" else home.dpo_held_out
    )
    assert train(flags, "--max_iters=1") == 0
    questions = SequenceSet(home.sft_held_out if task == "sft" else home.dpo_held_out, "valid", task, SEQ_LEN)
    asked = {r["prompt"] for r in records(flags, "sample")}
    tokenizer = load_tokenizer(home.tokenizer)
    prompts = set()
    for number in range(len(questions)):
        ids, supervised = questions.sequence(number)
        prompts.add(tokenizer.decode(ids[: supervised.tolist().index(1)].tolist()))
    assert len(asked) == 2 and asked <= prompts and all("assistant" in prompt[-20:] for prompt in asked)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_raw_records_are_tokenized_once(home: Home, tmp_path: Path, task: str, capsys: pytest.CaptureFixture):
    """The run itself tokenizes them, into the same tokens as the command; a resumed run finds them again."""
    raw = (write_sft if task == "sft" else write_dpo)(tmp_path / "raw", conversations())
    flags = [*base_flags(tmp_path), f"--task_type={task}", f"--data_dir={raw}", f"--init_from={home.model}",
             "--valid_ratio=0.3"]  # fmt: skip
    assert train(flags) == 0
    assert "tokenizing" in capsys.readouterr().err
    (made,) = (raw / ".tokenized").iterdir()
    expected = home.sft_held_out if task == "sft" else home.dpo_held_out
    for split in ("train", "valid"):
        ours, theirs = (SequenceSet(directory, split, task, SEQ_LEN) for directory in (made, expected))
        assert len(ours) == len(theirs) > 0
        for number in range(len(ours)):
            for one, other in zip(ours.sequence(number), theirs.sequence(number)):
                assert one.tolist() == other.tolist()
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    # Neither another run nor a resumed one, which knows its own tokenizer, tokenizes again.
    assert train(elsewhere(flags, tmp_path / "again")) == 0
    assert train([f"--out_dir={out_dir(flags)}", "--resume", "--max_iters=5"]) == 0
    assert "tokenizing" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list((raw / ".tokenized").iterdir())) == 1
    assert losses(elsewhere(flags, tmp_path / "again")) == losses(flags)[:4]
    assert [r["step"] for r in records(flags, "train")] == [1, 2, 3, 4, 5]


def test_other_options_make_other_tokens(home: Home, sft_flags: list[str], tmp_path: Path):
    raw = write_sft(tmp_path / "raw", conversations(20))
    flags = with_data(sft_flags, raw)
    for number, more in enumerate(([], ["--sft_loss=last"], ["--max_seq_len=40"])):
        assert train(elsewhere(flags, tmp_path / str(number)), "--max_iters=1", *more) == 0
    assert len(list((raw / ".tokenized").iterdir())) == 3


def test_a_directory_for_validation_is_taken_whole(home: Home, sft_flags: list[str], tmp_path: Path):
    raw, valid = (
        write_sft(tmp_path / "raw", conversations(20)),
        write_sft(tmp_path / "valid", conversations(10, seed=9)),
    )
    flags = [*with_data(sft_flags, raw), f"--valid_data_dir={valid}", "--no-packing"]
    assert train(flags) == 0
    record = records(flags, "valid")[-1]
    (made,) = (valid / ".tokenized").iterdir()
    whole = SequenceSet(made, "valid", "sft", SEQ_LEN)
    assert len(whole) == 10 and record["tokens"] == whole.supervised_tokens


def test_a_run_killed_before_its_first_checkpoint_starts_again_on_raw_records(
    home: Home, sft_flags: list[str], tmp_path: Path
):
    """--resume without a checkpoint starts fresh; the tokenizer is then that of --init_from."""
    flags = with_data(sft_flags, write_sft(tmp_path / "raw", conversations(20)))
    with pytest.raises(OSError, match="the machine died"):
        train_until(2, crash, flags)
    gc.collect()
    assert train(flags, "--resume") == 0
    assert [r["step"] for r in records(flags, "train")] == [1, 2, 3, 4]


# Refusals.


def test_raw_records_need_a_tokenizer(sft_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = [*without(sft_flags, "--init_from"), *TINY_MODEL]
    flags = with_data(flags, write_sft(tmp_path / "raw", conversations(5)))
    assert "--init_from is missing: raw records are tokenized for the model" in refusal(capsys, flags)


def test_dpo_needs_a_model_to_begin_with(dpo_flags: list[str], capsys: pytest.CaptureFixture):
    flags = [*without(dpo_flags, "--init_from"), *TINY_MODEL]
    assert "give --init_from" in refusal(capsys, flags)
    # With nothing to resume, a fresh start from random weights is not an alternative.
    capsys.readouterr()
    assert train(flags, "--resume") == 2
    assert "--init_from" in capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "more", "sentence"),
    [
        ("sft", ["--sft_loss=last"], "--sft_loss=last contradicts the data"),
        ("sft", ["--max_seq_len=64"], "--max_seq_len=64 contradicts the data"),
        ("sft", ["--user_name=Bob"], "--user_name=Bob contradicts the data"),
        ("sft", ["--valid_ratio=0.2"], "--valid_ratio=0.2 contradicts the data"),
        ("dpo", ["--max_prompt_len=20"], "--max_prompt_len=20 contradicts the data"),
        ("dpo", ["--prompt_truncation_mode=keep_start"], "--prompt_truncation_mode=keep_start contradicts the data"),
        ("dpo", ["--max_seq_len=32"], "--max_seq_len=32 contradicts the data"),
        ("dpo", ["--dpo_beta=0"], "dpo_beta must be positive"),
        ("dpo", ["--dpo_beta=-1"], "dpo_beta must be positive"),
        ("dpo", ["--dpo_label_smoothing=0.5"], "at least 0 and below 0.5"),
        ("dpo", ["--dpo_label_smoothing=-0.1"], "at least 0 and below 0.5"),
        ("dpo", ["--dpo_loss_type=ipo", "--dpo_label_smoothing=0.1"], "no meaning for --dpo_loss_type=ipo"),
        ("dpo", ["--dpo_loss_type=kto"], "must be one of sigmoid"),
        ("sft", ["--valid_only"], "has no validation set"),
    ],
)
def test_what_contradicts_is_refused(
    task: str, more: list[str], sentence: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
):
    flags = request.getfixturevalue(f"{task}_flags")
    assert sentence in refusal(capsys, flags, *more)


def test_a_length_that_was_not_given_is_the_datas(sft_flags: list[str]):
    assert train(without(sft_flags, "--max_seq_len"), "--max_iters=1") == 0
    assert yaml.safe_load((out_dir(sft_flags) / "config.yaml").read_text())["max_seq_len"] == SEQ_LEN


def test_options_of_the_other_task_do_not_matter(sft_flags: list[str], dpo_flags: list[str]):
    """Options that this task never reads cannot contradict its data."""
    assert train(sft_flags, "--max_prompt_len=20", "--dpo_beta=0", "--max_iters=1") == 0
    assert train(elsewhere(dpo_flags, out_dir(dpo_flags).parent / "dpo"), "--sft_loss=last", "--max_iters=1") == 0


def test_data_of_another_task_is_refused(
    home: Home, sft_flags: list[str], dpo_flags: list[str], data_dir: Path, capsys: pytest.CaptureFixture
):
    assert "pretokenized for --task_type=dpo, not sft" in refusal(capsys, with_data(sft_flags, home.dpo))
    assert "pretokenized for --task_type=sft, not dpo" in refusal(capsys, with_data(dpo_flags, home.sft))
    pretrain = with_data(sft_flags, data_dir)
    assert "pretokenized for --task_type=pretrain, not sft" in refusal(
        capsys, pretrain, f"--tokenizer_dir={home.tokenizer}"
    )
    assert "sft" in refusal(capsys, without(sft_flags, "--task_type"))


def test_raw_records_of_another_task_are_refused(home: Home, sft_flags: list[str], tmp_path: Path, capsys):
    flags = with_data(sft_flags, write_dpo(tmp_path / "raw", conversations(5)))
    capsys.readouterr()
    assert train(flags) == 2
    printed = capsys.readouterr()
    assert len(printed.out.strip().splitlines()) == 1 and "Traceback" not in printed.err


def test_another_tokenizer_is_refused(home: Home, sft_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    other = train_hf_bbpe(["other words, of another tokenizer " * 5] * 3, 270, show_progress=False)
    other.save_pretrained(tmp_path / "other")
    sentence = refusal(capsys, sft_flags, f"--tokenizer_dir={tmp_path / 'other'}")
    assert "was tokenized with another tokenizer" in sentence
    # Before raw records are tokenized with it.
    raw = write_sft(tmp_path / "raw", conversations(5))
    sentence = refusal(capsys, with_data(sft_flags, raw), f"--tokenizer_dir={tmp_path / 'other'}")
    assert "not tokenized with the tokenizer that the weights" in sentence and "leave --tokenizer_dir out" in sentence
    assert not (raw / ".tokenized").exists()


def test_another_template_is_refused_or_said(
    home: Home, sft_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A checkpoint carries the template that laid the conversations out."""
    other = shutil.copytree(home.tokenizer, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'] | trim"))
    sentence = refusal(capsys, sft_flags, f"--tokenizer_dir={other}")
    assert "were laid out by another chat template than the tokenizer's" in sentence
    pretokenize(write_sft(tmp_path / "raw", conversations(5)), other, tmp_path / "tokens", "sft")
    assert train(with_data(sft_flags, tmp_path / "tokens"), "--max_iters=1", f"--out_dir={tmp_path / 'run'}") == 0
    assert "were laid out by another chat template than that of" in capsys.readouterr().out
    saved = next((tmp_path / "run" / "ckpt").iterdir()) / "chat_template.jinja"
    assert saved.read_text() == template.read_text()


def test_raw_records_in_a_directory_that_cannot_be_written(home: Home, sft_flags: list[str], tmp_path: Path, capsys):
    raw = write_sft(tmp_path / "raw", conversations(5))
    # A file in place of the folder: in the way of any user, even root.
    (raw / ".tokenized").write_text("")
    assert "cannot be kept beside it" in refusal(
        capsys, with_data(sft_flags, raw), "--tokenizer_dir", str(home.tokenizer)
    )


# Information that a checkpoint gives to other programs.


def test_what_the_first_model_said_comes_with_every_checkpoint(
    home: Home, sft_flags: list[str], dpo_flags: list[str], tmp_path: Path
):
    """Its sampling settings, BOS and further end tokens, as transformers reads them, even after that model's folder is
    gone."""
    source = shutil.copytree(home.model, tmp_path / "source")
    values = json.loads((source / "config.json").read_text()) | {"bos_token_id": 5, "eos_token_id": 9}
    (source / "config.json").write_text(json.dumps(values))
    said = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": [3, 9]}
    (source / "generation_config.json").write_text(json.dumps(said))
    sft = [*without(sft_flags, "--init_from", "--out_dir"), f"--out_dir={tmp_path / 'sft'}"]
    dpo = [*without(dpo_flags, "--init_from", "--max_iters"), f"--init_from={tmp_path / 'sft'}", "--max_iters=1"]
    assert train(sft, f"--init_from={source}", "--max_iters=1", "--lr_schedule=constant") == 0
    shutil.rmtree(source)
    assert train(sft, "--resume", "--max_iters=2", "--lr_schedule=constant") == 0
    assert train(dpo) == 0
    known = load_tokenizer(home.tokenizer)
    ends = [known.special_ids["<|im_end|>"], known.eod_id, 3, 9]
    for run, step in ((tmp_path / "sft", 1), (tmp_path / "sft", 2), (out_dir(dpo), 1)):
        path = run / "ckpt" / f"step-{step}"
        assert find_problem(path) is None and find_problem(path, only="generation_config.json") is None
        theirs = GenerationConfig.from_pretrained(path)
        assert (theirs.eos_token_id, theirs.temperature, theirs.repetition_penalty) == (ends, 0.6, 1.1)
        config = AutoConfig.from_pretrained(path)
        assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (ends, 5, None)
        assert AutoTokenizer.from_pretrained(path).eos_token == "<|im_end|>"
        assert load_tokenizer(path).fingerprint == known.fingerprint


def test_a_first_model_that_says_nonsense_is_refused(home: Home, sft_flags: list[str], tmp_path: Path, capsys):
    shutil.copytree(home.model, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    flags = [*without(sft_flags, "--init_from"), f"--init_from={tmp_path / 'source'}"]
    assert "generation_config.json: eos_token_id must be the id of a token" in refusal(capsys, flags)


# Learnt answers.


@pytest.fixture(scope="module")
def memorised(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on the conversations until it knows them."""
    flags = [
        *base_flags(tmp_path_factory.mktemp("memorised")), "--task_type=sft", f"--data_dir={home.raw_sft}",
        f"--tokenizer_dir={home.tokenizer}", *TINY_MODEL, "--train_batch_size=4", "--gradient_accumulation_steps=1",
        "--max_iters=200", "--learning_rate=6e-3", "--weight_decay=0",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "device_peak_flops", lambda *_: 1e11)
        assert train(flags) == 0
    return out_dir(flags)


def answers_of(run: Path) -> Iterator[tuple[str, str, bool]]:
    """(expected answer, greedy answer, whether it ended by itself) for each conversation."""
    model, tokenizer, _ = load_model(run, torch.device("cpu"), torch.float32)
    template = ChatTemplate(tokenizer)
    for question, answer in conversations():
        prompt = template.prompt([Message("user", question)])
        most = 30
        ids = list(new_tokens(model, prompt, most, template.stop_ids, temperature=0, vocab_size=tokenizer.vocab_size))
        yield answer, tokenizer.decode(ids), len(ids) < most


@pytest.mark.slow
def test_what_was_learnt_is_said_and_ended(memorised: Path):
    """All 50 answers, word by word, and the token that ends them."""
    results = list(answers_of(memorised))
    assert len(results) == PAIRS
    assert [said for _, said, _ in results] == [expected for expected, _, _ in results]
    assert all(ended for _, _, ended in results)


@pytest.mark.slow
def test_dpo_learns_the_preference(home: Home, memorised: Path, dpo_flags: list[str]):
    """It begins at log 2, where the policy equals the reference, and ends with every pair told apart."""
    # Every step on all pairs: the loss can only fall.
    flags = [*one_epoch(without(dpo_flags, "--init_from"), PAIRS), f"--init_from={memorised}", "--max_iters=30",
             "--learning_rate=3e-4"]  # fmt: skip
    assert train(flags) == 0
    trained = records(flags, "train")
    assert trained[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(trained[0]["rewards/margins"]) < 1e-5
    assert all(later["loss"] < earlier["loss"] for earlier, later in zip(trained, trained[1:]))
    assert all(later["rewards/margins"] > earlier["rewards/margins"] for earlier, later in zip(trained, trained[1:]))
    assert trained[-1]["rewards/margins"] > 1 and trained[-1]["rewards/accuracies"] >= 0.98
    assert trained[-1]["logps/rejected"] < trained[0]["logps/rejected"]


def test_the_first_loss_of_every_kind(dpo_flags: list[str], tmp_path: Path):
    """For equal policy and reference models: the formulas at zero."""
    expected = {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0, "kto_pair": 0.5,
                "sppo_hard": 50.0, "nca_pair": 2 * math.log(2)}  # fmt: skip
    for kind, value in expected.items():
        flags = elsewhere(dpo_flags, tmp_path / kind)
        assert train(flags, f"--dpo_loss_type={kind}", "--max_iters=1") == 0
        assert losses(flags) == pytest.approx([value], rel=1e-5), kind
        assert records(flags, "train")[0]["grad_norm"] > 0


# Checkpoints, validation, audit.


def test_a_stopped_run_goes_on_with_the_same_bits(any_flags: list[str], tmp_path: Path):
    """With dropout; the resumed command repeats only the directory."""
    flags = [*any_flags, "--hidden_dropout=0.1", "--max_iters=6"]
    assert train(flags) == 0
    parts = elsewhere(flags, tmp_path / "parts")
    assert train_until(3, sigterm, parts) == 75
    assert train([f"--out_dir={tmp_path / 'parts'}", "--resume"]) == 0
    ours, theirs = records(parts, "train"), records(flags, "train")
    for name in ("loss", "digest", "samples", "grad_norm"):
        assert [r[name] for r in ours] == [r[name] for r in theirs]
    assert same_bits(final_state(parts, 6), final_state(flags, 6))


def test_the_split_into_micro_batches_does_not_matter(any_flags: list[str], tmp_path: Path):
    """Ragged lengths pad differently in each, and dropout is keyed by rows."""
    runs = []
    for batch, steps in ((8, 1), (4, 2), (1, 8)):
        flags = [*elsewhere(any_flags, tmp_path / f"{batch}x{steps}"), f"--train_batch_size={batch}",
                 f"--gradient_accumulation_steps={steps}", "--hidden_dropout=0.1"]  # fmt: skip
        assert train(flags) == 0
        runs.append((losses(flags), records(flags, "train")))
    for other_losses, trained in runs[1:]:
        assert other_losses == pytest.approx(runs[0][0], rel=1e-5)
        assert [r["digest"] for r in trained] == [r["digest"] for r in runs[0][1]]
        assert [r["tokens"] for r in trained] == [r["tokens"] for r in runs[0][1]]
        assert trained[0]["grad_norm"] == pytest.approx(runs[0][1][0]["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_valid_only(home: Home, task: str, request: pytest.FixtureRequest, tmp_path: Path):
    data = shutil.copytree(home.sft_held_out if task == "sft" else home.dpo_held_out, tmp_path / "held-out")
    flags = with_data(request.getfixturevalue(f"{task}_flags"), data)
    assert train(flags, "--learning_rate=1e-2") == 0
    measured = records(flags, "valid")[-1]
    before = sorted(path.name for path in (out_dir(flags) / "ckpt").iterdir())
    assert train(flags, "--resume", "--valid_only") == 0
    again = records(flags, "valid")[-1]
    assert again["time"] > measured["time"]
    for name in set(measured) - {"time", "dt"}:
        assert again[name] == measured[name], name
    assert sorted(path.name for path in (out_dir(flags) / "ckpt").iterdir()) == before
    other = elsewhere(flags, tmp_path / "other")
    assert train(other, f"--init_from={out_dir(flags)}", "--valid_only") == 0
    alone = records(other, "valid")[-1]
    if task == "sft":
        assert alone["loss"] == measured["loss"]
    else:
        # The initial model is its own reference.
        assert alone["loss"] == pytest.approx(math.log(2), rel=1e-6) and measured["loss"] != alone["loss"]
        assert alone["logps/chosen"] == pytest.approx(measured["logps/chosen"], rel=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "kto_pair"])
def test_validation_of_dpo_is_the_formula(home: Home, dpo_flags: list[str], tmp_path: Path, kind: str):
    """On the held-out pairs, from the log-probabilities of the model and the reference in the record."""
    data = shutil.copytree(home.dpo_held_out, tmp_path / "held-out")
    flags = [*with_data(dpo_flags, data), f"--dpo_loss_type={kind}", "--dpo_beta=0.3", "--learning_rate=1e-2"]
    assert train(flags) == 0
    record = records(flags, "valid")[-1]
    pairs = len(SequenceSet(data, "valid", "dpo", SEQ_LEN)) // 2
    assert record["pairs"] == pairs
    reference = next((data / "reference").glob("valid-*.safetensors"))
    log_probs = load_file(reference)["log_probs"].astype(np.float64)
    assert log_probs.shape == (pairs, 2) and (log_probs < 0).all()
    for side, name in enumerate(("chosen", "rejected")):
        expected = 0.3 * (record[f"logps/{name}"] - log_probs[:, side].mean())
        assert record[f"rewards/{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    margin = record["rewards/chosen"] - record["rewards/rejected"]
    assert record["rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)


def test_the_audit_proves_a_run(any_flags: list[str], capsys: pytest.CaptureFixture):
    """Even for a run that was stopped and resumed, over more than one epoch; and it finds errors."""
    flags = [*without(any_flags, "--max_iters"), "--epoch=1.2", "--save_interval=5"]
    assert train_until(3, sigterm, flags) == 75
    assert train(flags, "--resume") == 0
    capsys.readouterr()
    assert audit.main([str(out_dir(flags))]) == 0
    printed = capsys.readouterr().out
    assert "2 launches" in printed and "every position was taken once" in printed
    log = out_dir(flags) / "reslog.jsonl"
    digest = records(flags, "train")[1]["digest"]
    log.write_text(log.read_text().replace(digest, "0" * 16))
    assert audit.main([str(out_dir(flags))]) == 1
    assert "WRONG step 2" in capsys.readouterr().out


def test_show_mask_shows_what_a_run_took(any_flags: list[str], capsys: pytest.CaptureFixture):
    """All positions of an epoch together show every sequence once."""
    assert train(any_flags) == 0
    data = next(flag.partition("=")[2] for flag in any_flags if flag.startswith("--data_dir="))
    assert yaml.safe_load((out_dir(any_flags) / "config.yaml").read_text())["derived"]["train_data"] == data
    capsys.readouterr()

    def shown(*arguments: str) -> list[str]:
        assert show_mask.main([*arguments, "--num=1000"]) == 0
        return [line for line in capsys.readouterr().out.split("\n--- ") if line]

    everything, taken, position = shown(data), [], 0
    while len(taken) < len(everything):
        taken += shown(str(out_dir(any_flags)), f"--position={position}")
        position += 1
    clean = [sorted(part.removeprefix("--- ").strip() for part in parts) for parts in (taken, everything)]
    assert clean[0] == clean[1]
    assert inspect.main([str(out_dir(any_flags))]) == 2
    assert "dataset.show_mask" in capsys.readouterr().err


def test_the_audit_finds_the_tokens_of_raw_records(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture):
    raw = write_dpo(tmp_path / "raw", conversations(20))
    flags = [*base_flags(tmp_path), "--task_type=dpo", f"--data_dir={raw}", f"--init_from={home.model}"]
    assert train(flags) == 0
    assert audit.main([str(out_dir(flags))]) == 0
    assert "every position was taken once" in capsys.readouterr().out


# The reference model's log-probabilities.


def cache_file(flags: list[str], split: str = "train") -> Path:
    data = Path(next(flag.partition("=")[2] for flag in flags if flag.startswith("--data_dir=")))
    (path,) = (data / "reference").glob(f"{split}-*.safetensors")
    return path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of pairs for which the reference was computed, per batch."""
    batches: list[int] = []
    original = DPOTask.log_probs

    def log_probs(self, batch):
        # Training has the values already; no test that uses this validates.
        if not self.model.training:
            batches.append(len(batch["sample_ids"]))
        return original(self, batch)

    monkeypatch.setattr(DPOTask, "log_probs", log_probs)
    return batches


def test_the_reference_is_computed_once(dpo_flags: list[str], tmp_path: Path, computed: list[int]):
    assert train(dpo_flags) == 0
    assert sum(computed) == PAIRS
    path = cache_file(dpo_flags)
    before = path.stat().st_mtime_ns
    computed.clear()
    again = elsewhere(dpo_flags, tmp_path / "again")
    assert train(again) == 0
    # It depends on nothing in the loss or the steps.
    assert train(elsewhere(dpo_flags, tmp_path / "other"), "--dpo_beta=0.5", "--train_batch_size=4") == 0
    assert not computed and path.stat().st_mtime_ns == before
    assert losses(again) == losses(dpo_flags)
    assert not list(out_dir(dpo_flags).glob("reference/*"))


def test_the_time_at_the_end_is_without_the_reference(dpo_flags: list[str], monkeypatch: pytest.MonkeyPatch):
    moments, build, report_end = [], trainer_module.build, trainer_module.report.report_end

    def build_then_note(*args):
        built = build(*args)
        moments.append(time.perf_counter())
        return built

    def note_then_report(reslog, built, finished, steps_now, seconds, train_loss) -> None:
        moments.extend((seconds, time.perf_counter()))
        report_end(reslog, built, finished, steps_now, seconds, train_loss)

    monkeypatch.setattr(trainer_module, "build", build_then_note)
    monkeypatch.setattr(trainer_module.report, "report_end", note_then_report)
    assert train(dpo_flags) == 0
    was_built, seconds, ended = moments
    assert 0 < seconds <= ended - was_built


def test_the_reference_is_what_the_model_says(home: Home, dpo_flags: list[str]):
    assert train(dpo_flags) == 0
    values = load_file(cache_file(dpo_flags))["log_probs"]
    model = Decoder(hf.read_config(home.model)).eval()
    hf.load_weights(model, home.model)
    data = SequenceSet(home.dpo, "train", "dpo", SEQ_LEN)
    for number in range(2 * PAIRS):
        ids, supervised = (torch.from_numpy(part.astype(np.int64)) for part in data.sequence(number))
        with torch.no_grad():
            scores = model.logits(model(ids[None, :-1]))[0].double().log_softmax(-1)
        expected = scores[torch.arange(len(ids) - 1), ids[1:]][supervised[1:] == 1].sum().item()
        assert values[number // 2, number % 2] == pytest.approx(expected, rel=1e-6)


def test_another_model_has_its_own_reference(
    home: Home, dpo_flags: list[str], tmp_path: Path, computed: list[int]
):
    assert train(dpo_flags) == 0
    other = write_model(tmp_path / "other-model", train_tokenizer(), seed=8)
    for number, more in enumerate(([f"--init_from={other}"], ["--dtype=bfloat16"])):
        computed.clear()
        flags = elsewhere(dpo_flags, tmp_path / str(number))
        assert train(flags, *more) == 0
        assert sum(computed) == PAIRS
    assert len(list(cache_file_dir(dpo_flags).iterdir())) == 3


def cache_file_dir(flags: list[str]) -> Path:
    return Path(next(flag.partition("=")[2] for flag in flags if flag.startswith("--data_dir="))) / "reference"


def test_another_model_from_the_same_weights_has_its_own_reference(dpo_flags: list[str], tmp_path: Path):
    """--rope_theta and similar options may differ from the folder; the first loss tells whose reference it is."""
    assert train(dpo_flags) == 0
    flags = elsewhere(dpo_flags, tmp_path / "stretched")
    assert train(flags, "--rope_theta=50") == 0
    assert losses(flags)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_a_loss_without_a_reference_computes_none(dpo_flags: list[str], computed: list[int]):
    assert train(dpo_flags, "--reference_free") == 0
    assert not computed and not cache_file_dir(dpo_flags).exists()
    first = records(dpo_flags, "train")[0]
    assert first["rewards/chosen"] == pytest.approx(0.1 * first["logps/chosen"], rel=1e-6)


def test_a_reference_that_is_wanted_later_is_that_of_the_first_model(dpo_flags: list[str], computed: list[int]):
    """A run without a reference can be resumed with one: --init_from names it."""
    assert train(dpo_flags, "--reference_free") == 0
    assert train(dpo_flags, "--resume", "--no-reference_free", "--max_iters=5") == 0
    assert sum(computed) == PAIRS and [r["step"] for r in records(dpo_flags, "train")] == [1, 2, 3, 4, 5]


def foreign_shape(path: Path) -> None:
    """A whole file of another number of pairs."""
    values = load_file(path)["log_probs"][:-1].copy()
    save_file({"log_probs": values}, path, {"sha256": hashlib.sha256(values.tobytes()).hexdigest()})


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"no tensors at all, but text of some length"),
    "another shape": foreign_shape,
    "no checksum": lambda path: save_file(load_file(path), path),
    "another name": lambda path: save_file({"other": load_file(path)["log_probs"]}, path, {"sha256": "0"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_reference_is_computed_again(dpo_flags: list[str], tmp_path: Path, computed: list[int], damage: str):
    assert train(dpo_flags) == 0
    path = cache_file(dpo_flags)
    whole = path.read_bytes()
    DAMAGES[damage](path)
    assert path.read_bytes() != whole
    computed.clear()
    again = elsewhere(dpo_flags, tmp_path / "again")
    assert train(again) == 0
    assert sum(computed) == PAIRS and path.read_bytes() == whole
    assert losses(again) == losses(dpo_flags)


@pytest.mark.parametrize("torn", [0, 3, 130])
def test_a_killed_computation_goes_on_with_the_same_bits(
    dpo_flags: list[str], tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, torn: int
):
    """Blocks of 16 pairs; blocks written whole are not computed again."""
    flags = [*dpo_flags, "--valid_batch_size=1"]
    assert train(flags) == 0
    expected = cache_file(flags).read_bytes()
    shutil.rmtree(cache_file_dir(flags))
    computed.clear()
    parts = elsewhere(flags, tmp_path / "parts")
    original, blocks = ReferenceCache.append, []

    def append(self, values: np.ndarray) -> None:
        original(self, values)
        blocks.append(len(values))
        if len(blocks) == 2:
            crash()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the machine died"):
        patch.setattr(ReferenceCache, "append", append)
        train(parts)
    gc.collect()
    assert blocks == [16, 16] and computed == [1] * 32
    (part,) = (tmp_path / "parts" / "reference").iterdir()
    part.write_bytes(part.read_bytes()[: 32 * 8 - torn])
    computed.clear()
    assert train(parts, "--resume") == 0
    left = {0: 18, 3: 34, 130: 50}[torn]
    assert computed == [1] * left
    assert cache_file(parts).read_bytes() == expected and not part.exists()
    assert losses(parts) == losses(flags)


def test_a_reference_that_was_deleted_is_computed_from_the_first_model(
    dpo_flags: list[str], tmp_path: Path, computed: list[int]
):
    """A resumed run has other weights, which must not become its reference."""
    flags = [*dpo_flags, "--max_iters=6", "--hidden_dropout=0.1"]
    assert train(flags) == 0
    parts = elsewhere(flags, tmp_path / "parts")
    assert train_until(3, sigterm, parts) == 75
    expected = cache_file(flags).read_bytes()
    shutil.rmtree(cache_file_dir(flags))
    computed.clear()
    assert train(parts, "--resume") == 0
    assert sum(computed) == PAIRS and cache_file(flags).read_bytes() == expected
    assert losses(parts) == losses(flags)
    assert same_bits(final_state(parts, 6), final_state(flags, 6))


def test_a_reference_that_cannot_be_computed_again_is_named(
    home: Home, dpo_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The reference was deleted, and the model that the run began with has changed since; with that model from
    elsewhere, it goes on."""
    model = shutil.copytree(home.model, tmp_path / "first-model")
    flags = [*without(dpo_flags, "--init_from"), f"--init_from={model}"]
    assert train_until(2, sigterm, flags) == 75
    shutil.rmtree(cache_file_dir(flags))
    shutil.rmtree(model)
    write_model(model, train_tokenizer(), seed=8)
    capsys.readouterr()
    assert train(flags, "--resume") == 2
    sentence = capsys.readouterr().out.strip().splitlines()[-1]
    assert "the log-probabilities of the reference model are gone" in sentence and "--init_from" in sentence
    assert train(flags, "--resume", f"--init_from={home.model}") == 0
    assert [r["step"] for r in records(flags, "train")] == [1, 2, 3, 4]


def test_where_the_data_cannot_be_written_the_run_keeps_the_reference(
    dpo_flags: list[str], tmp_path: Path, computed: list[int]
):
    # A file in place of the folder: in the way of any user, even root.
    cache_file_dir(dpo_flags).write_text("")
    assert train_until(2, sigterm, dpo_flags) == 75
    assert sum(computed) == PAIRS
    (path,) = (out_dir(dpo_flags) / "reference").iterdir()
    assert path.suffix == ".safetensors"
    computed.clear()
    assert train(dpo_flags, "--resume") == 0
    assert not computed
    # The same as if it could be written.
    cache_file_dir(dpo_flags).unlink()
    normal = elsewhere(dpo_flags, tmp_path / "normal")
    assert train(normal) == 0
    assert losses(normal) == losses(dpo_flags) and cache_file(normal).read_bytes() == path.read_bytes()


def test_what_will_teach_little_is_said(home: Home, sft_flags: list[str], tmp_path: Path, capsys):
    """Few steps, and more positions than the weights were trained with; the run finishes all the same."""
    longer = 2 * SEQ_LEN
    tokens = pretokenize(home.raw_sft, home.tokenizer, tmp_path / "long", "sft", "--max_seq_len", str(longer))
    flags = without(with_data(sft_flags, tokens), "--max_seq_len", "--max_iters")
    assert train(flags, f"--max_seq_len={longer}", "--max_iters=1", "--gradient_accumulation_steps=4") == 0
    said = capsys.readouterr().out
    assert "so few steps teach little: lower --train_batch_size" in said and "or raise --max_iters" in said
    assert f"max_seq_len {longer} is more than the {SEQ_LEN} positions" in said

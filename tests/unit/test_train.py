"""The training script with one process: its files, its refusals, and how it goes on."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
import train_my_ddp
import training.trainer as trainer_module
from checkpoint.folder import list_checkpoints
from checkpoint.writing import CheckpointWriter
from data_preprocess.build_pretrain_sample_index_map import build as build_index
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import Corpus
from dataset import audit
from dataset.format import BinHeader
from dataset.loader import batch_digest
from dataset.order import sample_at
from dataset.pretrain import PretrainDataset
from model import Decoder, ModelConfig, flops, hf
from model.families import FAMILIES, family_of
from model.families.family import CHOICES
from optimizer.mixed_precision import LossScaler
from runs.exits import read_exit_records
from runs.heartbeat import Heartbeat
from serving.generation import generate as new_tokens
from serving.generation import load_model
from tasks.language_model import LanguageModelTask
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.runs import elsewhere, final_state, losses, out_dir, records, relative_difference, same_bits
from tokenizer import load_tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe
from training import build, describe, samples, stopping

MUON = ["--optimizer=muon", "--muon_iterations=3"]


@pytest.fixture(autouse=True)
def _quick_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Measuring the machine's peak takes a while, and matters to one test here."""
    if request.function is not test_a_run_leaves_what_it_promises:
        monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


def train(flags: list[str], *more: str) -> int:
    return train_my_ddp.main([*flags, *more])


def test_a_run_leaves_what_it_promises(tiny_run: list[str], data_dir: Path):
    assert train(tiny_run, "--valid_interval=2") == 0
    home = out_dir(tiny_run)
    assert [(r["code"], r["reason"], r["step"]) for r in read_exit_records(home / "exit")] == [(0, "finished", 4)]
    assert json.loads((home / "heartbeat" / "rank-0.json").read_text())["phase"] == "end"
    assert (home / "config.yaml").exists() and "valid at step 4" in (home / "train.log").read_text()
    start = records(tiny_run, "start")
    assert [(r["attempt"], r["step"], r["samples_consumed"], r["parent_ckpt"]) for r in start] == [(1, 0, 0, None)]

    data = PretrainDataset(data_dir, "train", SEQ_LEN)
    for number, record in enumerate(records(tiny_run, "train"), 1):
        assert record["step"] == number and record["samples"] == [4 * (number - 1), 4 * number - 1]
        assert record["tokens"] == number * 4 * SEQ_LEN
        # The digest is recomputed from order and data alone.
        ids = sample_at(1337, range(4 * (number - 1), 4 * number), len(data))
        assert record["digest"] == f"{batch_digest(data.collate(ids)):016x}"
        assert {"loss", "lr", "grad_norm", "dt", "tokens_per_sec", "mfu", "mfu_seed", "data_wait"} <= record.keys()
        assert 0 < record["mfu"] < record["mfu_seed"]
    assert [r["step"] for r in records(tiny_run, "valid")] == [2, 4]
    assert losses(tiny_run)[-1] < losses(tiny_run)[0]

    path = home / "ckpt" / "step-4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer("def f(x):\n    return x").input_ids])
    ours, our_tokenizer, _ = load_model(home, torch.device("cpu"), torch.float32)
    assert our_tokenizer.encode("def f(x):\n    return x") == ids[0].tolist()
    assert torch.allclose(ours.logits(ours(ids)), model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_of_each_family_begins_with_nothing(model_type: str, tiny_run: list[str], capsys):
    assert train(tiny_run, f"--model_type={model_type}", "--max_iters=1") == 0
    told = FAMILIES[model_type].new(ModelConfig(), frozenset())
    path = list_checkpoints(out_dir(tiny_run) / "ckpt")[-1].path
    has = hf.read_config(path)
    assert [getattr(has, name) for name in CHOICES] == [getattr(told, name) for name in CHOICES]
    # The tokenizer is nobody's, so a family that names a tokenizer is not the one that is written.
    expected = family_of(told, generic_tokenizer=True).model_type
    said = capsys.readouterr().out
    assert f"model: {expected}, " in said and has.model_type == expected
    assert ("8 experts of which a token sees 2" in said) == bool(told.num_local_experts)
    assert train(tiny_run, "--max_iters=2", "--resume") == 0
    assert train(tiny_run, f"--model_type={model_type}", "--max_iters=3", "--resume") == 0


def test_what_has_no_effect_on_the_models_own_shape_is_said(tiny_run: list[str], tmp_path: Path, capsys):
    """By the shape as it is with weights from elsewhere, of which the command line knows nothing."""
    stretched = ["--rope_scaling=linear", "--rope_scaling_factor=2", "--max_position_embeddings=64"]
    for number, (flags, sentence) in enumerate([([], "has no effect without --rope_scaling"), (stretched, None)]):
        first = elsewhere(tiny_run, tmp_path / f"first-{number}")
        assert train(first, "--max_iters=1", *flags) == 0
        capsys.readouterr()
        more = [f"--init_from={out_dir(first)}", "--rope_scaling_factor=4", "--max_iters=1"]
        assert train(elsewhere(tiny_run, tmp_path / f"second-{number}"), *more) == 0
        out = capsys.readouterr().out
        assert ("has no effect" in out) == (sentence is not None) and (sentence or "") in out


def test_biases_of_three_do_not_change_how_texts_are_split(tiny_run: list[str]):
    """With a qwen2, transformers would replace our splitting with Qwen's."""
    assert train(tiny_run, "--qkv_bias", "--max_iters=1") == 0
    path = list_checkpoints(out_dir(tiny_run) / "ckpt")[-1].path
    theirs, ours = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    text = "def f(x_1):\n\treturn 'é 漢字 1234'  # Ⅷ\u0301\n"
    assert theirs(text)["input_ids"] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    config = hf.read_config(path)
    assert config.qkv_bias and not config.attention_bias
    assert type(AutoModelForCausalLM.from_pretrained(path)).__name__ == "LlamaForCausalLM"
    assert train(tiny_run, "--max_iters=2", "--resume") == 0


def test_the_start_says_how_long_it_will_take(tiny_run: list[str], monkeypatch, capsys: pytest.CaptureFixture):
    """In proportion to the work: a step has three times as many rows as the whole validation."""
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e6)
    flags = [*tiny_run, "--valid_batch_size=2", "--valid_iters=2", "--max_iters=100", "--valid_interval=50"]
    with pytest.raises(OSError, match="the machine died"):
        train_until(1, crash, flags)
    pattern = r"step in about (.+?), a validation in about (.+?), the run in about (.+?), if 40%"
    line = re.search(pattern, capsys.readouterr().out)
    step, valid, run = (float(t.split()[0]) * {"s": 1, "min": 60, "hours": 3600}[t.split()[1]] for t in line.groups())
    # From words like 9 min.
    assert step == pytest.approx(3 * valid, rel=0.05) and run == pytest.approx(100 * step + 2 * valid, rel=0.1)


DURATIONS = [(0.01, "1 s"), (99, "99 s"), (150, "2 min"), (7000, "1.9 hours"), (90000, "25 hours"), (1e6, "12 days")]


@pytest.mark.parametrize(("seconds", "said"), DURATIONS)
def test_a_duration_in_words(seconds: float, said: str):
    assert describe.about(seconds) == said


def test_a_long_validation_says_how_far_it_is(tiny_run: list[str], monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(stopping, "_TELL_EVERY_S", 0.0)
    assert train(tiny_run, "--max_iters=1", "--valid_batch_size=1") == 0
    told = re.findall(r"validating: (\d+)% after \d+ s", capsys.readouterr().out)
    assert told and sorted(told, key=int) == told and int(told[-1]) < 100


def test_validation_does_not_disturb_training(tiny_run: list[str], tmp_path: Path):
    """The original's training iterator ended an epoch early after one validation."""
    assert train(tiny_run) == 0
    often = [f for f in tiny_run if "out_dir" not in f] + [f"--out_dir={tmp_path / 'often'}"]
    assert train(often, "--valid_interval=1") == 0
    assert losses(often) == losses(tiny_run)
    assert [r["samples"] for r in records(often, "train")] == [r["samples"] for r in records(tiny_run, "train")]


@pytest.mark.parametrize("prompt", ["", "def read("])
def test_samples_are_what_the_checkpoint_writes_and_disturb_nothing(tiny_run: list[str], tmp_path: Path, prompt: str):
    assert train(tiny_run) == 0
    more = ["--sample_texts=3", "--sample_tokens=9", "--valid_interval=2", f"--sample_prompt={prompt}"]
    shown = [flag for flag in elsewhere(tiny_run, tmp_path / "shown") if "sample_texts" not in flag]
    assert train(shown, *more) == 0
    assert same_bits(final_state(shown, 4), final_state(tiny_run, 4))
    samples = records(shown, "sample")
    assert [r["step"] for r in samples] == [2, 2, 2, 4, 4, 4]
    assert [r["prompt"] for r in samples[:3]] == [r["prompt"] for r in samples[3:]]
    model, tokenizer, stop_ids = load_model(out_dir(shown), torch.device("cpu"), torch.float32)
    held_out = PretrainDataset(Path(next(f for f in shown if "data_dir" in f).partition("=")[2]), "valid", SEQ_LEN)
    texts = [tokenizer.decode(row) for row in held_out.input_rows(np.arange(len(held_out))).tolist()]
    for number, sample in enumerate(samples[3:]):
        assert sample["prompt"] == prompt if prompt else any(sample["prompt"] in text for text in texts)
        ids = tokenizer.encode(sample["prompt"])
        new = list(new_tokens(model, ids, 9, stop_ids, seed=1337 + number, vocab_size=tokenizer.vocab_size))
        assert sample["text"] == tokenizer.decode(new)
    said = (out_dir(shown) / "train.log").read_text()
    assert said.count("sample at step 4, after: ") == 3 and (f"after: {prompt}" in said or not prompt)


@pytest.mark.parametrize("row", [[0, 0, 5, 6, 7, 8], [5, 0, 0, 0, 6, 7], [0] * 6, [5, 6, 7, 8, 9, 0], [5]])
def test_a_sample_has_something_to_begin_with(row: list[int]):
    """Even among empty documents, which token files of other programs may hold: 0 ends one."""
    assert samples._document_of(np.array(row), 0)


def train_until(step: int, event, flags: list[str], *more: str) -> int:
    """Train, and call `event()` when `step` steps are logged."""
    original = trainer_module.Trainer._log_step

    def log_then_maybe_interrupt(self, *args) -> None:
        original(self, *args)
        if self.progress.step == step:
            event()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_log_step", log_then_maybe_interrupt)
        return train(flags, *more)


def crash() -> None:
    raise OSError("the machine died")


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def asked_at(call: int, training: bool) -> Iterator[list[int]]:
    """This process gets a SIGTERM in the model's `call`-th batch; yields the numbers of all batches that it
    computes."""
    original, calls = LanguageModelTask.__call__, []

    def compute(self: LanguageModelTask, batch: dict, *losses: object) -> tuple:
        if self.model.training == training:
            calls.append(len(calls) + 1)
            if calls[-1] == call:
                sigterm()
        return original(self, batch, *losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelTask, "__call__", compute)
        patch.setattr(trainer_module, "LONG_S", 0.0)
        patch.setattr(stopping, "LONG_S", 0.0)
        yield calls


@pytest.mark.parametrize(
    ("call", "in_training", "more"),
    [(2, True, []), (10, True, []), (6, True, [*MUON, "--hidden_dropout=0.1"]), (3, False, []), (7, False, [])],
    ids=["first step", "last step", "with more state", "validation", "last validation"],
)
def test_a_stop_in_the_middle_of_something_long_loses_nothing(
    tiny_run: list[str], tmp_path: Path, call: int, in_training: bool, more: list[str]
):
    """The begun step is dropped, and the state before it saved; a validation is repeated, for the same checkpoint."""
    sizes = ["--max_iters=3", "--gradient_accumulation_steps=4", "--valid_interval=2", "--valid_iters=5"]
    flags = [*tiny_run, *sizes, *more]
    assert train(flags) == 0
    parts = elsewhere(flags, tmp_path / "parts")
    with asked_at(call, in_training) as calls:
        assert train(parts) == 75
    assert calls[-1] == call
    done = (call - 1) // 4 if in_training else {3: 2, 7: 3}[call]
    assert read_exit_records(tmp_path / "parts" / "exit")[0]["step"] == done
    assert [c.step for c in list_checkpoints(tmp_path / "parts" / "ckpt")][-1] == done
    assert train(parts, "--resume") == 0
    assert same_bits(final_state(parts, 3), final_state(flags, 3))
    for name in ("train", "valid"):
        kept = [{k: r[k] for k in ("step", "loss")} for r in records(parts, name)]
        assert kept == [{k: r[k] for k in ("step", "loss")} for r in records(flags, name)]
    saved = [[(c.step, c.valid_loss) for c in list_checkpoints(out_dir(f) / "ckpt")] for f in (parts, flags)]
    assert saved[0][-2:] == saved[1][-2:]
    assert train(parts, "--resume") == 0 and len(records(parts, "valid")) == 2


def test_frozen_weights_come_back_with_a_resumed_run(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    """No optimizer state holds them."""
    original, frozen = build.build_model, "layers.0.mlp.down_proj.weight"

    def freeze(*arguments: object, **options: object) -> Decoder:
        model = original(*arguments, **options)
        model.get_parameter(frozen).requires_grad_(False)
        return model

    monkeypatch.setattr(build, "build_model", freeze)
    assert train(tiny_run, "--max_iters=2") == 0
    assert train(tiny_run, "--resume") == 0
    before, after = (final_state(tiny_run, step)[f"model.{frozen}"] for step in (2, 4))
    assert torch.equal(before, after) and before.std() < 0.02
    assert not any(frozen in name for name in final_state(tiny_run, 4) if name != f"model.{frozen}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_crashed_run_goes_on_with_the_same_bits(tiny_run: list[str], tmp_path: Path, dtype: str):
    """Also with dropout, and with fp16's loss scale: on one process, where the original's fp16 was broken."""
    flags = [*tiny_run, f"--dtype={dtype}", "--hidden_dropout=0.1", "--max_iters=6", "--save_interval=2"]
    assert train(flags) == 0
    parts = elsewhere(flags, tmp_path / "parts")
    with pytest.raises(OSError, match="the machine died"):
        train_until(3, crash, parts)
    record = read_exit_records(tmp_path / "parts" / "exit")[0]
    assert (record["code"], record["reason"], record["step"]) == (1, "OSError: the machine died", 3)
    last_words = (tmp_path / "parts" / "train.log").read_text().splitlines()[-1]
    assert last_words.endswith(
        f"go on from step 2: python train_my_ddp.py --resume --out_dir={shlex.quote(str(tmp_path / 'parts'))}"
    )
    assert train(parts, "--resume") == 0
    assert losses(parts) == losses(flags)
    assert [r["digest"] for r in records(parts, "train")] == [r["digest"] for r in records(flags, "train")]
    assert same_bits(final_state(parts, 6), final_state(flags, 6))


def test_a_crash_says_whether_another_process_ended_first(tiny_run: list[str], capsys: pytest.CaptureFixture):
    def lose_peer() -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:24514")

    with pytest.raises(RuntimeError, match="by peer"):
        train_until(1, lose_peer, tiny_run)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "another process ended first, or the network failed: the cause is in what it printed" in first
    assert f"in its record in {out_dir(tiny_run) / 'exit'}" in first
    assert "nothing was saved yet: start again with the same command" in second


def test_a_crash_names_the_save_that_was_in_flight(tiny_run: list[str], monkeypatch, capsys: pytest.CaptureFixture):
    original = CheckpointWriter.write_files

    def write_slowly(self) -> None:
        time.sleep(0.5)
        original(self)

    monkeypatch.setattr(CheckpointWriter, "write_files", write_slowly)
    with pytest.raises(OSError, match="the machine died"):
        train_until(3, crash, tiny_run, "--valid_interval=0", "--save_interval=2")
    assert "go on from step 2: python train_my_ddp.py --resume " in capsys.readouterr().out.splitlines()[-1]


def test_a_crash_before_the_first_step_says_how_to_go_on(tiny_run: list[str], monkeypatch, capsys):
    monkeypatch.setattr(trainer_module, "build", lambda *_: crash())
    for flags, words in (([], "nothing was saved yet"), (["--valid_only", "--init_from=D"], "the machine died")):
        with pytest.raises(OSError, match="the machine died"):
            train(tiny_run, *flags)
        assert words in capsys.readouterr().out.rstrip().splitlines()[-1]


def test_a_monitored_crash_leaves_going_on_to_the_monitor(
    tiny_run: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("ZERO2ALL_EXIT_DIR", str(tmp_path / "exit"))
    with pytest.raises(OSError, match="the machine died"):
        train_until(1, crash, tiny_run)
    printed = capsys.readouterr().out
    assert "the machine died" in printed and "saved yet" not in printed


def test_stop_on_request_and_resume(tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(tiny_run) == 0
    parts = elsewhere(tiny_run, tmp_path / "parts")
    assert train_until(2, sigterm, parts) == 75
    assert [r["code"] for r in read_exit_records(tmp_path / "parts" / "exit")] == [75]
    assert train(parts, "--resume") == 0
    assert losses(parts) == losses(tiny_run)
    assert same_bits(final_state(parts, 4), final_state(tiny_run, 4))
    starts = [(r["attempt"], r["step"], r["parent_ckpt"]) for r in records(parts, "start")]
    assert starts == [(1, 0, None), (2, 2, "step-2")]
    # A complete run has nothing left to do.
    capsys.readouterr()
    assert train(parts, "--resume") == 0
    assert len(records(parts, "train")) == 4
    assert "step 4 of 4; to go on, raise --max_iters" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tiny_run: list[str], damage: str, capsys: pytest.CaptureFixture
):
    assert train(tiny_run, "--save_interval=1") == 0
    before = losses(tiny_run)
    victim = out_dir(tiny_run) / "ckpt" / "step-4" / "optim-0.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-9] ^= 1
    victim.write_bytes(raw[:-100] if damage == "truncate" else raw)
    capsys.readouterr()
    assert train(tiny_run, "--resume") == 0
    printed = capsys.readouterr().out
    assert "step-4 is broken and skipped: optim-0.safetensors" in printed and "starts at step 3" in printed
    assert losses(tiny_run) == before
    assert any(p.name.startswith("abandoned-step-4") for p in (out_dir(tiny_run) / "ckpt").iterdir())


def test_when_every_checkpoint_is_broken_nothing_is_overwritten(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run) == 0
    (out_dir(tiny_run) / "ckpt" / "step-4" / "trainer_state.json").unlink()
    assert train(tiny_run, "--resume") == 2
    assert "trainer_state.json is missing" in capsys.readouterr().out
    assert (out_dir(tiny_run) / "ckpt" / "step-4").is_dir()


def test_resume_from_best(tiny_run: list[str]):
    assert train(tiny_run, "--valid_interval=1", "--learning_rate=0.5", "--lr_schedule=constant") == 0
    valid = {r["step"]: r["loss"] for r in records(tiny_run, "valid")}
    best = min(valid, key=valid.get)
    assert train(tiny_run, "--resume", "--resume_from=best", "--max_iters=5") == 0
    assert records(tiny_run, "start")[-1]["parent_ckpt"] == f"step-{best}"


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run, "--resume") == 0
    assert "starting fresh" in capsys.readouterr().out


def test_the_split_into_micro_batches_does_not_matter(tiny_run: list[str], tmp_path: Path):
    """1x8, 2x4 and 4x2 rows, with dropout: the same run within float32's rounding."""
    runs = []
    for batch, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        flags = [*elsewhere(tiny_run, tmp_path / f"{batch}x{steps}"), f"--train_batch_size={batch}",
                 f"--gradient_accumulation_steps={steps}", "--hidden_dropout=0.1"]  # fmt: skip
        assert train(flags) == 0
        runs.append((losses(flags), final_state(flags, 4), records(flags, "train")))
    for other_losses, state, trained in runs[1:]:
        assert other_losses == pytest.approx(runs[0][0], rel=1e-5)
        assert [r["digest"] for r in trained] == [r["digest"] for r in runs[0][2]]
        assert trained[0]["grad_norm"] == pytest.approx(runs[0][2][0]["grad_norm"], rel=1e-6)
        assert relative_difference(state, runs[0][1]) < 1e-3


def test_clipping_works_on_one_process(tiny_run: list[str], tmp_path: Path):
    """The original did not clip on a single GPU."""
    free, clipped = (elsewhere(tiny_run, tmp_path / name) for name in ("free", "clipped"))
    assert train(free, "--grad_clip=0") == 0
    assert train(clipped, "--grad_clip=1e-9") == 0
    # AdamW divides out the size of gradients, except where they fall below its epsilon.
    assert losses(free)[-1] < losses(clipped)[-1] - 0.1


def test_init_from_takes_weights_only(tiny_run: list[str], tmp_path: Path):
    assert train(tiny_run) == 0
    tuned = [f for f in elsewhere(tiny_run, tmp_path / "tuned") if f not in TINY_MODEL]
    assert train(tuned, f"--init_from={out_dir(tiny_run)}") == 0
    assert losses(tuned)[0] < losses(tiny_run)[0] - 0.3
    assert records(tuned, "start")[0]["step"] == 0
    # A restart with --resume goes on with the run's own state.
    assert train(tuned, "--resume", "--max_iters=5") == 0
    assert [r["step"] for r in records(tuned, "train")] == [1, 2, 3, 4, 5]


def test_valid_only(tiny_run: list[str], tmp_path: Path):
    assert train(tiny_run) == 0
    measured = records(tiny_run, "valid")[-1]["loss"]
    before = [p.name for p in (out_dir(tiny_run) / "ckpt").iterdir()]
    assert train(tiny_run, "--resume", "--valid_only") == 0
    assert records(tiny_run, "valid")[-1]["loss"] == measured
    assert [p.name for p in (out_dir(tiny_run) / "ckpt").iterdir()] == before
    other = elsewhere(tiny_run, tmp_path / "other")
    assert train(other, f"--init_from={out_dir(tiny_run)}", "--valid_only") == 0
    assert records(other, "valid")[-1]["loss"] == measured


def test_restart_data(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run) == 0
    assert train(tiny_run, "--resume", "--max_iters=6", "--seed=5") == 2
    assert "--restart_data" in capsys.readouterr().out
    assert train(tiny_run, "--resume", "--max_iters=6", "--seed=5", "--restart_data") == 0
    start = records(tiny_run, "start")[-1]
    assert (start["step"], start["samples_consumed"], start["seed"]) == (4, 0, 5)
    assert records(tiny_run, "train")[-1]["samples"] == [4, 7]


def test_log_interval_covers_all_samples(tiny_run: list[str]):
    assert train(tiny_run, "--log_interval=2") == 0
    assert [(r["step"], r["samples"]) for r in records(tiny_run, "train")] == [(2, [0, 7]), (4, [8, 15])]


def test_the_records_of_a_crashed_run_cover_every_sample(tiny_run: list[str]):
    """A save between two log lines: samples that its checkpoint has consumed must not be missing from the log."""
    flags = [*tiny_run, "--log_interval=5", "--save_interval=2", "--max_iters=7"]
    original = trainer_module.Trainer._step

    def die_at_step_3(self) -> bool:
        if self.progress.step == 3:
            crash()
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="the machine died"):
        patch.setattr(trainer_module.Trainer, "_step", die_at_step_3)
        train(flags)
    assert train(flags, "--resume") == 0
    spans = [r["samples"] for r in records(flags, "train")]
    assert [position for first, last in spans for position in range(first, last + 1)] == list(range(7 * 4))


def test_a_directory_that_is_no_run_is_left_alone(tiny_run: list[str], capsys: pytest.CaptureFixture):
    out_dir(tiny_run).mkdir()
    (out_dir(tiny_run) / "thesis.txt").write_text("mine")
    for more in ([], ["--resume"]):
        assert train(tiny_run, *more) == 2
        assert "holds other things than a run" in capsys.readouterr().out
    assert sorted(p.name for p in out_dir(tiny_run).iterdir()) == ["thesis.txt"]


def test_what_changes_on_resume_is_said_and_recorded(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run) == 0
    capsys.readouterr()
    assert train(tiny_run, "--resume", "--max_iters=5", "--learning_rate=2e-3") == 0
    assert "learning_rate 0.01 -> 0.002" in capsys.readouterr().out
    assert records(tiny_run, "start")[-1]["changed"] == {"max_iters": [4, 5], "learning_rate": [0.01, 0.002]}


def test_other_data_must_be_tokenized_alike(tiny_run: list[str], data_dir: Path, tmp_path: Path, capsys):
    assert train(tiny_run) == 0
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"text {number} " * 50)
    tokenizer = train_hf_bbpe([p.read_text() for p in corpus.iterdir()], 270, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process_corpus(
        PretrainJob(Corpus(str(corpus)), str(tmp_path / "other"), str(tmp_path / "tokenizer"), valid_ratio=0.3)
    )
    build_index(tmp_path / "other", SEQ_LEN)
    capsys.readouterr()
    more = ["--resume", "--restart_data", "--max_iters=5", f"--data_dir={tmp_path / 'other'}"]
    assert train(tiny_run, *more) == 2
    assert "not tokenized with the tokenizer that the weights" in capsys.readouterr().out


def test_epochs(tiny_run: list[str], data_dir: Path):
    samples = len(PretrainDataset(data_dir, "train", SEQ_LEN))
    flags = [f for f in tiny_run if "max_iters" not in f and "train_batch_size" not in f]
    assert train(flags, "--epoch=0.02", "--train_batch_size=8") == 0
    assert len(records(flags, "train")) == round(0.02 * samples / 16)


def test_non_finite_gradients_end_the_run_with_names(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    original = LanguageModelTask.__call__

    def poisoned(self, batch, *losses):
        loss_sum, count, metrics = original(self, batch, *losses)
        return (loss_sum * float("nan") if self.model.training else loss_sum), count, metrics

    monkeypatch.setattr(LanguageModelTask, "__call__", poisoned)
    with pytest.raises(FloatingPointError, match="layers.1.mlp.down_proj.weight"):
        train(tiny_run, "--check_for_nan_in_grad")
    assert read_exit_records(out_dir(tiny_run) / "exit")[0]["code"] == 1


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    original = LossScaler.__init__
    monkeypatch.setattr(LossScaler, "__init__", lambda self, enabled: original(self, enabled, 2.0**28))
    told, factors, loss_sum = [], [], Decoder.loss_sum

    def observed(self, hidden, labels, grad_scale, *more):
        loss = loss_sum(self, hidden, labels, grad_scale, *more)
        if loss.requires_grad:
            told.append(grad_scale)
            loss.register_hook(lambda upstream: factors.append(upstream.item()))
        return loss

    monkeypatch.setattr(Decoder, "loss_sum", observed)
    assert train(tiny_run, "--dtype=float16", "--max_iters=26", "--valid_iters=1") == 0
    norms = [float(r["grad_norm"]) for r in records(tiny_run, "train")]
    skipped = [norm for norm in norms if not math.isfinite(norm)]
    assert 0 < len(skipped) < 26 and math.isfinite(norms[-1])
    state = json.loads((out_dir(tiny_run) / "ckpt" / "step-26" / "trainer_state.json").read_text())
    assert state["optimizer"]["num_steps"] == 26 - len(skipped)
    assert losses(tiny_run)[-1] < losses(tiny_run)[0] - 0.5
    # The loss, which rounds its gradient, was told the factor that would multiply it.
    assert factors == pytest.approx(told, rel=1e-7) and len(set(told)) > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gradient_accumulation_steps=0"], "must be positive"),
        (["--vocab_size=128"], "smaller than the tokenizer's 512"),
        (["--valid_ratio=0.5"], "contradicts the data"),
        (["--max_seq_len=128"], "build_pretrain_sample_index_map"),
        (["--data_dir=nowhere"], "nowhere does not exist"),
        (["--data_dir=docs"], "docs is not pretokenized: run `python -m data_preprocess.pretokenize"),
        (["--tokenizer_dir=nowhere"], "nowhere does not exist: train a tokenizer"),
        (["--out_dir=/proc/nowhere"], "cannot be written: No such file"),
        (["--device=cuda"], "has no CUDA"),
        (["--ddp_backend=nccl"], "needs --device=cuda"),
        (["--unknown_flag=1"], "is unknown"),
        (["--init_from=nowhere"], "nowhere does not exist: give a folder of this machine, as nothing is downloaded"),
        (["nowhere.yaml"], "is not a flag"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    tiny_run: list[str], capsys: pytest.CaptureFixture, more: list[str], message: str
):
    if more == ["--device=cuda"] and torch.cuda.is_available():
        more, message = ["--device=cuda", "--ddp_backend=gloo", "--vocab_size=128"], "smaller than the tokenizer's 512"
    assert train(tiny_run, *more) == 2
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (out_dir(tiny_run) / "ckpt").exists() or not list((out_dir(tiny_run) / "ckpt").iterdir())


def test_a_foreign_or_truncated_bin_is_refused(tiny_run: list[str], data_dir: Path, tmp_path: Path, capsys):
    for damage in ("truncate", "foreign", "other"):
        copy = tmp_path / damage
        copy.mkdir()
        for path in data_dir.iterdir():
            if path.is_file():
                (copy / path.name).write_bytes(path.read_bytes())
        victim = sorted(copy.glob("train-*.bin"))[0]
        raw = victim.read_bytes()
        if damage == "truncate":
            victim.write_bytes(raw[:-2])
        elif damage == "foreign":
            victim.write_bytes(b"\0" * len(raw))
        else:
            header = BinHeader(512, 1, "11" * 32, "train", 0.1, (len(raw) - 256) // 2)
            victim.write_bytes(header.pack() + raw[256:])
        assert train(tiny_run, f"--data_dir={copy}", f"--tokenizer_dir={data_dir / 'tokenizer'}") == 2
        lines = capsys.readouterr().out.strip().splitlines()
        assert len(lines) == 1 and victim.name in lines[0] and "`python -m data_preprocess." in lines[0]


def test_an_out_dir_that_holds_a_run_is_refused(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run) == 0
    before = final_state(tiny_run, 4)
    capsys.readouterr()
    assert train(tiny_run) == 2
    assert "add --resume" in capsys.readouterr().out
    assert same_bits(before, final_state(tiny_run, 4))


def test_a_changed_shape_is_refused_by_name(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run) == 0
    capsys.readouterr()
    assert train(tiny_run, "--resume", "--hidden_size=128") == 2
    assert "--hidden_size=128 does not fit the weights" in capsys.readouterr().out


def test_generate_command(tiny_run: list[str], capsys: pytest.CaptureFixture, tmp_path: Path):
    assert train(tiny_run) == 0
    command = ["--ckpt", str(out_dir(tiny_run)), "--prompt", "def f(", "--max_new_tokens", "8", "--seed", "3"]
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert generate.main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("def f(") and len(texts[0]) > 10
    assert generate.main(["--ckpt", str(tmp_path / "nothing"), "--prompt", "x"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert generate.main([*command, "--top_p", "0"]) == 2
    assert generate.main([*command, "--prompt", ""]) == 2


def test_valid_only_needs_a_checkpoint(tiny_run: list[str], capsys: pytest.CaptureFixture):
    """Random weights must not be validated as if they were the run's."""
    assert train(tiny_run, "--resume", "--valid_only") == 2
    assert "holds no checkpoint to validate" in capsys.readouterr().out


def disk_full(self, name: str, *_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_is_warned_of_and_the_run_goes_on(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A full disk: the previous checkpoint stays whole, and the next one is written when there is room again."""
    assert train(tiny_run, "--save_interval=2", "--max_iters=8", f"--out_dir={tmp_path / 'undisturbed'}") == 0
    original = CheckpointWriter.write_tensors

    def full_at_step_4(self, name: str, *arguments: object) -> None:
        (disk_full if self.step == 4 else original)(self, name, *arguments)

    monkeypatch.setattr(CheckpointWriter, "write_tensors", full_at_step_4)
    assert train(tiny_run, "--save_interval=2", "--max_iters=8", "--keep_last=9") == 0
    ckpt_dir = out_dir(tiny_run) / "ckpt"
    assert sorted(path.name for path in ckpt_dir.iterdir()) == ["step-2", "step-6", "step-8"]
    (warning,) = [line for line in (out_dir(tiny_run) / "train.log").read_text().splitlines() if "WARNING" in line]
    assert warning.endswith(
        "the checkpoint of step 4 could not be written, the run goes on: rank 0: [Errno 28] No space left on device"
    )
    assert [r["step"] for r in records(tiny_run, "save_failed")] == [4]
    undisturbed = elsewhere(tiny_run, tmp_path / "undisturbed")
    assert losses(tiny_run) == losses(undisturbed)
    assert same_bits(final_state(tiny_run, 8), final_state(undisturbed, 8))


@pytest.mark.parametrize("how", ["--async_save", "--no-async_save"])
def test_the_last_save_must_succeed(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, how: str):
    assert train(tiny_run, "--save_interval=2", how) == 0
    before = final_state(tiny_run, 4)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_tensors", disk_full)
        with pytest.raises(OSError, match="rank 0: .*No space left"):
            train(tiny_run, "--resume", "--max_iters=6")
    assert read_exit_records(out_dir(tiny_run) / "exit")[0]["code"] == 1
    assert same_bits(final_state(tiny_run, 4), before)
    assert train(tiny_run, "--resume", "--max_iters=6") == 0


def test_an_error_of_the_save_thread_that_is_no_disk_ends_the_run(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    def broken(self, *_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(CheckpointWriter, "write_tensors", broken)
    with pytest.raises(TypeError, match="a bug"):
        train(tiny_run, "--save_interval=1", "--max_iters=50")
    assert read_exit_records(out_dir(tiny_run) / "exit")[0]["step"] < 50


def test_saved_in_the_background_is_what_was_there_at_that_step(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training goes on while the file is written, and the written values must not change with it."""
    now = elsewhere(tiny_run, tmp_path / "now")
    assert train(now, "--max_iters=4", "--save_interval=1", "--keep_last=9", "--no-async_save") == 0
    original, steps = CheckpointWriter.write_files, []

    def late(self) -> None:
        # One step later, or at the end, where training waits.
        deadline = time.monotonic() + 1.0
        while self.step < 3 and not any(r["step"] >= self.step + 1 for r in records(tiny_run, "train")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        steps.append(self.step)
        original(self)

    monkeypatch.setattr(CheckpointWriter, "write_files", late)
    assert train(tiny_run, "--max_iters=4", "--save_interval=1", "--keep_last=9") == 0
    assert steps == [1, 2, 3, 4]
    for step in steps:
        assert same_bits(final_state(tiny_run, step), final_state(now, step)), step


def test_a_stop_file_is_not_for_a_validation(tiny_run: list[str], capsys: pytest.CaptureFixture):
    """It speaks to the run; --valid_only is another launch."""
    assert train(tiny_run) == 0
    (out_dir(tiny_run) / "stop").touch()
    capsys.readouterr()
    assert train(tiny_run, "--resume", "--valid_only") == 0
    assert "valid at step" in capsys.readouterr().out
    assert (out_dir(tiny_run) / "stop").exists()


def test_a_stop_file_saves_and_stops(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    step = trainer_module.Trainer._finish_step

    def stop_after_step_3(self, *arguments: object):
        if self.progress.step == 2:
            (self.run_dir.path / "stop").touch()
        return step(self, *arguments)

    monkeypatch.setattr(trainer_module.Trainer, "_finish_step", stop_after_step_3)
    assert train(tiny_run, "--max_iters=9") == 75
    assert [path.name for path in (out_dir(tiny_run) / "ckpt").iterdir()] == ["step-3"]
    assert not (out_dir(tiny_run) / "stop").exists()
    # Requested while nothing runs: the next launch is the one that can obey it.
    (out_dir(tiny_run) / "stop").touch()
    assert train(tiny_run, "--max_iters=9", "--resume") == 75
    assert records(tiny_run, "end")[-1]["step"] == 3 and not (out_dir(tiny_run) / "stop").exists()
    # A request that came too late does not count for a later launch.
    (out_dir(tiny_run) / "stop").touch()
    assert train(tiny_run, "--max_iters=3", "--resume") == 0
    assert train(tiny_run, "--max_iters=4", "--resume") == 0


def not_finite_in(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps is NaN."""
    original_call, original_step, at = LanguageModelTask.__call__, trainer_module.Trainer._step, [0]

    def step(self) -> bool:
        at[0] = self.progress.step + 1
        return original_step(self)

    def call(self, batch, *losses):
        loss_sum, count, metrics = original_call(self, batch, *losses)
        return loss_sum * (float("nan") if at[0] in steps and self.model.training else 1.0), count, metrics

    monkeypatch.setattr(trainer_module.Trainer, "_step", step)
    monkeypatch.setattr(LanguageModelTask, "__call__", call)


def steps_saved(flags: list[str]) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out_dir(flags) / "ckpt").iterdir())


def test_a_save_waits_for_the_first_good_step(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    """Weights that make every gradient NaN once pushed the good checkpoints out."""
    not_finite_in(monkeypatch, {3, 4, 5, 6})
    assert train(tiny_run, "--max_iters=8", "--save_interval=2", "--keep_last=9", "--valid_interval=4") == 0
    assert steps_saved(tiny_run) == [2, 7, 8]
    assert [r["step"] for r in records(tiny_run, "valid")] == [4, 8]


def test_a_run_that_ends_in_a_streak_pushes_nothing_out(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    not_finite_in(monkeypatch, {3, 4, 5})
    assert train(tiny_run, "--max_iters=5", "--save_interval=2", "--keep_last=1", "--keep_best=0") == 0
    assert steps_saved(tiny_run) == [2, 5]


def test_a_stop_request_outlives_a_death_before_the_end_is_told(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch):
    """Otherwise the next launch would train on."""
    (out_dir(tiny_run)).mkdir(parents=True, exist_ok=True)
    (out_dir(tiny_run) / "stop").touch()
    monkeypatch.setattr(Heartbeat, "end", lambda *_: crash())
    with pytest.raises(OSError, match="the machine died"):
        train(tiny_run)
    assert (out_dir(tiny_run) / "stop").exists()


def test_a_stop_in_a_streak_keeps_the_last_good_checkpoint(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    not_finite_in(monkeypatch, set(range(3, 99)))
    assert train_until(5, sigterm, tiny_run, "--max_iters=99", "--save_interval=2") == 75
    assert steps_saved(tiny_run) == [2]
    said = "step 5 is not saved: gradients were not finite in the last steps (3 skipped); step-2 stays the newest"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("background", "value", "where"),
    [("--async_save", math.nan, "model"), ("--async_save", -math.inf, "main"), ("--no-async_save", math.inf, "model")],
)
def test_weights_that_are_not_finite_are_never_saved(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, background: str, value: float, where: str
):
    """Even if no gradient shows it, because the save checks."""
    step = trainer_module.Trainer._finish_step

    def poison(self, *arguments: object):
        result = step(self, *arguments)
        if self.progress.step == 3:
            _, states = next(iter(self.engine.named_state()))
            (next(self.model.parameters()) if where == "model" else states["main"]).data.view(-1)[7] = value
        return result

    monkeypatch.setattr(trainer_module.Trainer, "_finish_step", poison)
    flags = [*tiny_run, "--max_iters=8", "--save_interval=2", "--keep_last=1", background]
    with pytest.raises(FloatingPointError, match="the weights of step 4 are of no use: rank 0: .* is not finite"):
        train(flags)
    assert steps_saved(tiny_run) == [2]
    # Place to go on: after the samples of the steps that were done until the save had checked.
    until = read_exit_records(out_dir(tiny_run) / "exit")[0]["non_finite_until"]
    assert 16 <= until <= 32
    monkeypatch.undo()
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)
    assert train(flags, "--max_iters=4", "--resume", f"--resume_at_sample={until}") == 0


def test_a_stop_finds_weights_that_are_not_finite(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    step = trainer_module.Trainer._finish_step

    def poison(self, *arguments: object):
        result = step(self, *arguments)
        if self.progress.step == 2:
            next(self.model.parameters()).data.view(-1)[7] = math.nan
            self.stopping.request.requested = True
        return result

    monkeypatch.setattr(trainer_module.Trainer, "_finish_step", poison)
    assert train(tiny_run, "--max_iters=8", "--save_interval=2") == 75
    assert steps_saved(tiny_run) == [2]
    assert "is not finite; step-2 stays the newest checkpoint" in capsys.readouterr().out


def test_saves_by_the_clock_and_retention(tiny_run: list[str]):
    """A hundredth of a millisecond between saves: one after every step."""
    assert train(tiny_run, "--max_iters=7", "--save_interval_minutes=1e-7", "--keep_last=1", "--keep_every=3") == 0
    assert [r["step"] for r in records(tiny_run, "save")] == [1, 2, 3, 4, 5, 6, 7]
    kept = sorted(path.name for path in (out_dir(tiny_run) / "ckpt").iterdir())
    assert kept == ["step-3", "step-6", "step-7"]


def test_samples_that_made_the_loss_non_finite_can_be_left_out(tiny_run: list[str], capsys: pytest.CaptureFixture):
    assert train(tiny_run, "--max_iters=4", "--lr_schedule=constant") == 0
    assert train(tiny_run, "--max_iters=6", "--resume", "--resume_at_sample=24") == 0
    assert [r["samples"] for r in records(tiny_run, "train")][3:] == [[12, 15], [24, 27], [28, 31]]
    assert records(tiny_run, "start")[-1]["left_out"] == [16, 23]
    assert audit.main([str(out_dir(tiny_run))]) == 0
    assert "left out on request: positions 16 to 23" in capsys.readouterr().out
    # The checkpoint holds it from the beginning: a later launch need not be told again.
    assert train(tiny_run, "--max_iters=7", "--resume") == 0
    assert [r["samples"] for r in records(tiny_run, "train")][6:] == [[32, 35]]
    assert train(tiny_run, "--resume_at_sample=5") == 2


def test_damaged_tokens_are_found_before_training(tiny_run: list[str], data_dir: Path, tmp_path: Path):
    shutil.copytree(data_dir, tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("train-*.bin"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    assert train(tiny_run, f"--data_dir={tmp_path / 'data'}", "--verify_data") == 2
    assert f"{shard} is damaged" in read_exit_records(out_dir(tiny_run) / "exit")[0]["reason"]
    assert train(tiny_run, "--verify_data") == 0


def test_the_traceback_of_wrong_input_is_in_the_log_file(tiny_run: list[str]):
    assert train(tiny_run, "--vocab_size=128") == 2
    assert "Traceback" in (out_dir(tiny_run) / "train.log").read_text()


def test_the_last_step_is_logged_whatever_the_interval(tiny_run: list[str]):
    assert train(tiny_run, "--log_interval=3") == 0
    assert [(r["step"], r["samples"]) for r in records(tiny_run, "train")] == [(3, [0, 11]), (4, [12, 15])]

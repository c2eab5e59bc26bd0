"""A run that starts from a published folder: its data, its checkpoint, and a talk with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import generate
import train_my_ddp
from dataset.sequences import SequenceSet
from model import Decoder, flops, hf
from model.config import ModelConfig
from tests.unit import published_tokenizers as published
from tests.unit.test_known_tokenizers import FOLDERS, TALK, texts
from tests.unit.test_tokenizer import auto_tokenizer
from tokenizer import load_tokenizer
from tokenizer.chat_template import ChatTemplate, Message
from training.export import plan_export

SEQ_LEN = 128
NAMES = ["chatglm3", "chatglm2", "baichuan2", "internlm", "yuan2"]


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


def with_weights(folder: Path) -> Path:
    """The folder with a small llama's weights: how a model computes does not matter here."""
    config = ModelConfig(
        vocab_size=640, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=SEQ_LEN,
        initializer_range=0.1,
    ).resolve()  # fmt: skip
    model = Decoder(config)
    model.initialize(3)
    save_file(hf.named_weights(model), folder / "model.safetensors", {"format": "pt"})
    return published.write(folder, config_json=hf.to_hf_config(config, torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_a_published_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = with_weights(FOLDERS[name](tmp_path / "source"))
    before = load_tokenizer(source)
    raw = tmp_path / "raw"
    raw.mkdir()
    messages = [{"role": message.role, "content": message.text} for message in TALK]
    (raw / "talk.jsonl").write_text("\n".join([json.dumps({"messages": messages})] * 8))
    run = tmp_path / "run"
    flags = [f"--init_from={source}", f"--data_dir={raw}", f"--out_dir={run}", "--max_iters=2", "--dtype=float32"]
    flags += ["--train_batch_size=2", "--gradient_accumulation_steps=1", f"--max_seq_len={SEQ_LEN}", "--device=cpu"]
    assert train_my_ddp.main([*flags, "--task_type=sft", "--num_threads=1", "--sample_texts=0"]) == 0
    assert "laid out as" in capsys.readouterr().out

    # The data: what the layout says.
    (made,) = (raw / ".tokenized").iterdir()
    ids, supervised = SequenceSet(made, "train", "sft", SEQ_LEN).sequence(0)
    rendered = ChatTemplate(before).render(TALK)
    # What follows the last end is left out.
    assert ids.tolist() == rendered.ids[: len(ids)] and not any(rendered.supervised[len(ids) :])
    assert supervised.astype(bool).tolist() == rendered.supervised[: len(ids)]
    assert load_tokenizer(made / "tokenizer").fingerprint == before.fingerprint

    # The checkpoint: the same tokenizer, in transformers too, and all that the source had.
    checkpoint = run / "ckpt" / "step-2"
    after, theirs = load_tokenizer(checkpoint), auto_tokenizer(checkpoint)
    assert (after.fingerprint, after.chat_template, after.begin_ids, after.eod_id) == (
        before.fingerprint, before.chat_template, before.begin_ids, before.eod_id
    )  # fmt: skip
    assert theirs(texts(), add_special_tokens=False)["input_ids"] == before.encode_batch(texts())
    asked = theirs.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert asked == ChatTemplate(before).prompt(TALK[:3])
    assert (checkpoint / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    ends = generation["eos_token_id"]
    assert set(ends if isinstance(ends, list) else [ends]) >= ChatTemplate(before).stop_ids
    if name == "baichuan2":
        assert (generation["user_token_id"], generation["assistant_token_id"], generation["top_k"]) == (195, 196, 5)

    # And a talk.
    flags = ["--chat", "--prompt=hello 你好", "--max_new_tokens=3", "--temperature=0", "--device=cpu"]
    assert generate.main(["--ckpt", str(checkpoint), *flags, "--dtype=float32"]) == 0
    assert "may never have seen" not in capsys.readouterr().err


def test_a_checkpoint_of_such_a_model(tmp_path: Path):
    """Its config.json names a model that transformers does not know: the tokenizer loads there all the same."""
    for name in NAMES:
        source = FOLDERS[name](tmp_path / name / "source")
        tokenizer = load_tokenizer(source)
        model_type = json.loads((source / "config.json").read_text())["model_type"]
        for number, task in enumerate(("sft", "pretrain", "dpo")):
            export = plan_export(task != "pretrain", tokenizer, source, 640)
            source = tmp_path / name / str(number)
            export.save_tokenizer(source)
            published.write(source, config_json={"model_type": model_type} | export.generation.token_ids)
            again, theirs = load_tokenizer(source), auto_tokenizer(source)
            assert (again.fingerprint, again.chat_template) == (tokenizer.fingerprint, tokenizer.chat_template)
            assert again.eod_id == tokenizer.eod_id and again.begin_ids == tokenizer.begin_ids
            assert theirs("hello 你好")["input_ids"] == tokenizer.begin_ids + tokenizer.encode("hello 你好")
            assert theirs.eos_token_id == again.eod_id
            tokenizer = again


def test_a_call_ends_with_what_begins_its_result(tmp_path: Path):
    """In a template that ends no answer, as GLM-4's."""
    template = (
        "[gMASK]sop{% for m in messages %}"
        "{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\\n' + m.content }}"
        "{% for call in m.tool_calls %}{{ call.function.name + ':' + (call.function.arguments | tojson) }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = load_tokenizer(published.chatglm(tmp_path, 3, chat_template=template))
    call = {"type": "function", "function": {"name": "look", "arguments": {"what": "sky"}}}
    talk = [Message("user", "a"), Message("assistant", "", tool_calls=(call,)), Message("tool", "blue")]
    rendered = ChatTemplate(tokenizer).render([*talk, Message("assistant", "c")])
    learnt = [token_id for token_id, is_learnt in zip(rendered.ids, rendered.supervised) if is_learnt]
    assert tokenizer.decode(learnt).replace(" ", "") == '\nlook:{"what":"sky"}<|observation|>\nc</s>'
    rendered = ChatTemplate(tokenizer).render(talk[:2])
    assert rendered.supervised[-1] and rendered.ids[-1] == tokenizer.eod_id

"""Tokens that are added to a tokenizer, and the rows that a model grows by for them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import Decoder, hf
from model.adapters import folder, lora, merge
from model.adapters import tokens as rows
from model.config import ModelConfig
from model.ops import build_ops, choose_ops, needs_of
from serving.loading import load
from tests.peers import peer
from tests.runs import elsewhere, final_state, out_dir, same_bits
from tests.unit.test_sft_train import (
    WORDS,
    base_flags,
    conversations,
    pretokenize,
    refusal,
    train,
    with_data,
    without,
    write_model,
    write_sft,
)
from tests.unit.test_train import sigterm, train_until
from tokenizer import Tokenizer, add_tokens, load_tokenizer
from tokenizer.hf_bbpe import train_hf_bbpe
from tokenizer.sp_bbpe import train_sp_bbpe

ADDED = ["<tool>", "river bank", "äü", "<|mine|>", "<|mi"]
TEXT = "a<tool>red river bank äüä <|mine|><|mi the"
IDS = torch.tensor([[3, 20, 7, 21, 22, 20, 5, 22]])


def tokenizer_of(kind: str) -> Tokenizer:
    text = [" ".join(WORDS) * 5] * 3
    return train_hf_bbpe(text, 320, show_progress=False) if kind == "hf" else train_sp_bbpe(text, 310, False)


def command_in(home: Path) -> list[str]:
    paths = {"tokenizer_dir": home / "base", "tokens": home / "tokens", "output_dir": home / "grown"}
    return [f"--{name}={path}" for name, path in paths.items()]


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_a_grown_tokenizer_is_a_real_one(kind: str, tmp_path: Path):
    tokenizer_of(kind).save_pretrained(tmp_path / "base")
    (tmp_path / "tokens").write_text("\n".join([*ADDED[:2], "", *ADDED[2:]]) + "\n")
    assert add_tokens.main(command_in(tmp_path)) == 0
    base, grown = load_tokenizer(tmp_path / "base"), load_tokenizer(tmp_path / "grown")
    assert [grown.encode(token)[-1] for token in ADDED] == list(range(base.vocab_size, base.vocab_size + len(ADDED)))
    assert (grown.vocab_size, grown.eod_id) == (base.vocab_size + len(ADDED), base.eod_id)
    # (As a tokenizer.json, a SentencePiece model has its unknown piece among the special tokens.)
    assert grown.special_ids == base.special_ids | ({"<unk>": 0} if kind == "sp" else {})
    assert grown.chat_template == base.chat_template
    assert grown.decode(grown.encode(TEXT)) == TEXT and grown.encode("the red") == base.encode("the red")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert theirs.encode(TEXT) == grown.encode(TEXT) and len(theirs) == grown.vocab_size
    again = add_tokens.grow(base, ADDED).fingerprint
    assert grown.fingerprint == again != base.fingerprint
    add_tokens.require_grown(grown, ADDED)
    with pytest.raises(ValueError, match="does not end with the tokens of --add_tokens, of which 'äü'"):
        add_tokens.require_grown(grown, ["äü", *ADDED[2:]])


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"\n \n", "holds no token"),
        (b"x\ny\nx\n", "holds the token 'x' 2 times"),
        (b" x\n", "the token ' x' begins or ends with a blank"),
        (b"\xff\n", "is not UTF-8"),
        (b"xx\n" * (add_tokens.MOST_TOKENS + 1), "holds 65537 tokens, and 65536 can be added"),
        (b"tool\nx", "has the token 'x' already"),
        (b"<|im_end|>", "has the token '<|im_end|>' already"),
    ],
)
def test_a_faulty_list_is_told(content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    tokenizer_of("hf").save_pretrained(tmp_path / "base")
    (tmp_path / "tokens").write_bytes(content)
    assert add_tokens.main(command_in(tmp_path)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "grown").exists()


def model_of(tied: bool, normalized: bool = False) -> Decoder:
    config = ModelConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied,
        normalized_head=normalized, max_position_embeddings=16, initializer_range=0.3,
    ).resolve()  # fmt: skip
    chosen = choose_ops("auto", {}, torch.device("cpu"), torch.float32, needs_of(config))
    model = Decoder(config, ops=build_ops(chosen))
    model.initialize(3)
    return model


def loss_of(model: Decoder) -> Tensor:
    return model.loss_sum(model(IDS)[:, :-1], IDS[:, 1:])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_begin_as_the_mean(tied: bool):
    model = model_of(tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    known = IDS.clamp(max=19)
    old_loss = model.loss_sum(model(known)[:, :-1], known[:, 1:])
    rows.grow(model, 20, 3)
    assert model.config.vocab_size == 23 and (model.lm_head.weight is model.embed_tokens.weight) == tied
    for name in ("embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        weight = model.get_parameter(name)
        assert torch.equal(weight[:20], before[name]) and weight.requires_grad
        assert torch.equal(weight[20:], torch.stack([(before[name].double().sum(0) / 20).float()] * 3))
    grows_by = model.loss_sum(model(known)[:, :-1], known[:, 1:]) - old_loss
    assert 0 < grows_by < known[:, 1:].numel() * torch.tensor(1 + 3 / 20).log()


def test_rows_that_are_there_already_are_used():
    matrix = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    grown = rows.grown_rows(matrix, 5, 2)
    assert torch.equal(grown[[0, 1, 2, 3, 4, 7]], matrix[[0, 1, 2, 3, 4, 7]]) and torch.equal(grown[5], grown[6])
    assert torch.allclose(grown[5], matrix[:5].mean(0))
    assert torch.equal(rows.with_rows(matrix, [8, 2], grown[5:7])[[8, 2, 1]], grown[[5, 6, 1]])


@pytest.mark.parametrize("tied, normalized", [(True, False), (False, False), (False, True)])
def test_trained_rows_have_the_gradient_of_the_whole_matrix(tied: bool, normalized: bool):
    """Compared with the plain model, whose whole matrices train."""
    plain, model = model_of(tied, normalized), model_of(tied, normalized)
    for one in (plain, model):
        rows.grow(one, 20, 3)
    model.requires_grad_(False)
    rows.train_rows(model, range(20, 23))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ends = ["embed_tokens", *([] if tied else ["lm_head"])]
    assert list(trained) == [f"{end}.token_adapter.trainable_tokens_delta" for end in ends]
    assert {model.roles()[name].decays for name in trained} == {True}
    with torch.no_grad():
        for end in ends:
            new = torch.randn(3, 32, generator=torch.Generator().manual_seed(len(end)))
            trained[f"{end}.token_adapter.trainable_tokens_delta"].copy_(new)
            plain.get_parameter(f"{end}.weight")[20:] = new
    frozen = model.embed_tokens.weight.clone()
    assert torch.equal(model(IDS), plain(IDS))
    assert torch.allclose(model.logits(model(IDS)), plain.logits(plain(IDS)), rtol=1e-5, atol=1e-5)
    for one in (plain, model):
        loss_of(one).backward()
    for end in ends:
        found = trained[f"{end}.token_adapter.trainable_tokens_delta"].grad
        assert torch.allclose(found, plain.get_parameter(f"{end}.weight").grad[20:], rtol=1e-5, atol=1e-7)
    hidden = plain(IDS)
    assert torch.equal(model.token_logprobs(hidden, IDS), plain.token_logprobs(hidden, IDS))
    assert torch.equal(model.embed_tokens.weight, frozen)
    with pytest.raises(ValueError, match="give --train_added_tokens=all"):
        plain.requires_grad_(True)
        rows.train_rows(plain, [22])


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A short SFT on raw records, some of whose words are new tokens."""
    talks = [(f"river bank {question}", f"{answer} äü") for question, answer in conversations(16)]
    write_model(tmp_path / "model", tokenizer_of("hf"))
    (tmp_path / "tokens").write_text("\n".join(ADDED))
    data = write_sft(tmp_path / "data", talks)
    return [
        *base_flags(tmp_path), "--task_type=sft", f"--init_from={tmp_path / 'model'}", f"--data_dir={data}",
        f"--add_tokens={tmp_path / 'tokens'}", "--valid_ratio=0",
    ]  # fmt: skip


def test_all_weights_train_with_new_tokens(flags: list[str], tmp_path: Path):
    assert train(flags) == 0
    saved = out_dir(flags) / "ckpt" / "step-4"
    grown, base = load_tokenizer(saved), load_tokenizer(tmp_path / "model")
    assert grown.fingerprint == add_tokens.grow(base, ADDED).fingerprint
    embedding = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
    assert len(embedding) == 320 + len(ADDED) and len(embedding[320:].unique(dim=0)) > 1
    assert hf.read_config(saved).vocab_size == len(AutoTokenizer.from_pretrained(saved)) == len(embedding)
    # Stopped and resumed, and with data that was tokenized beforehand, it is the same run.
    assert add_tokens.main([f"--tokenizer_dir={tmp_path / 'model'}", f"--tokens={tmp_path / 'tokens'}",
                            f"--output_dir={tmp_path / 'grown'}"]) == 0  # fmt: skip
    ready = pretokenize(tmp_path / "data", tmp_path / "grown", tmp_path / "ready", "sft")
    again = with_data(elsewhere(flags, tmp_path / "again"), ready)
    assert train_until(2, sigterm, again) == 75
    assert train(again, "--resume") == 0
    assert same_bits(final_state(flags, 4), final_state(again, 4))


def test_runs_with_other_tokens_are_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    without_tokens = pretokenize(tmp_path / "data", tmp_path / "model", tmp_path / "other", "sft")
    assert "does not end with the tokens of --add_tokens" in refusal(capsys, with_data(flags, without_tokens))
    (tmp_path / "more").write_text("\n".join(["newest", *ADDED]))
    assert add_tokens.main([f"--tokenizer_dir={tmp_path / 'model'}", f"--tokens={tmp_path / 'more'}",
                            f"--output_dir={tmp_path / 'grown'}"]) == 0  # fmt: skip
    more = pretokenize(tmp_path / "data", tmp_path / "grown", tmp_path / "ready", "sft")
    assert "python -m tokenizer.add_tokens" in refusal(capsys, with_data(flags, more))
    assert "give these with --init_from" in refusal(capsys, with_data(without(flags, "--init_from"), more))
    (tmp_path / "tokens").unlink()
    assert "does not exist" in refusal(capsys, flags)


LORA = ["--lora_r=2", "--lora_target_modules=all-linear"]


@pytest.mark.parametrize("rows_that_train, tied", [("new", False), ("new", True), ("all", True)])
def test_an_adapter_with_new_tokens(
    rows_that_train: str, tied: bool, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Saved for PEFT, which computes the same after it has resized the base; stopped and resumed."""
    peft = peer("peft")
    if not tied:
        untie(tmp_path / "model")
    flags = [*flags, *LORA, f"--train_added_tokens={rows_that_train}"]
    assert train(flags) == 0
    saved = out_dir(flags) / "ckpt" / "step-4"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, saved)
    weights = folder.Weights(tmp_path / "model", saved)
    shape = folder.grown(hf.read_config(weights.base), saved)
    assert shape.vocab_size == len(tokenizer) == 320 + len(ADDED)
    ours = Decoder(hf.read_config(weights.base))
    hf.load_weights(ours, weights.base)
    rows.grow(ours, 320, len(ADDED))
    lora.attach(ours, folder.check(shape, saved), seed=0)
    folder.load(ours, saved)
    # As PEFT writes it, with copies of what is frozen.
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([tokenizer.encode("the river bank äü red <tool>")])
    for directory in (saved, tmp_path / "theirs"):
        folder.load(ours, directory)
        with torch.no_grad():
            assert torch.allclose(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    merge.merge(folder.Weights(tmp_path / "model", saved), tmp_path / "merged", None, 1 << 30)
    served = load(saved, {}, torch.device("cpu"), torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(served.model.logits(served.model(ids)), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        served.use(None)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        known = served.model.logits(served.model(ids.clamp(max=319)))[..., :320]
        assert torch.allclose(known, base(ids.clamp(max=319)).logits, rtol=1e-4, atol=1e-5)
    whole = {name for name in load_file(saved / "adapter_model.safetensors") if ".lora_" not in name}
    kind = "token_adapter.trainable_tokens_delta" if rows_that_train == "new" else "weight"
    ends = ["lm_head"] if rows_that_train == "all" or not tied else []
    assert whole == {f"base_model.model.{name}.{kind}" for name in ("model.embed_tokens", *ends)}
    again = elsewhere(flags, tmp_path / "again")
    assert train_until(2, sigterm, again) == 75
    other = "all" if rows_that_train == "new" else "new"
    assert train(again, "--resume", f"--train_added_tokens={other}") == 2
    assert f"--train_added_tokens={other} does not fit the adapter in" in capsys.readouterr().out
    assert train(again, "--resume") == 0
    assert same_bits(final_state(flags, 4), final_state(again, 4))


def untie(directory: Path) -> None:
    """Give a folder's model a head of its own."""
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    weights = load_file(directory / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].flip(0).contiguous()}
    save_file(weights | head, directory / "model.safetensors", {"format": "pt"})

"""Folders of several files, and the padding of the vocabulary."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoint.folder import find_problem, list_checkpoints
from checkpoint.saving import CheckpointSaver
from model import Decoder, hf
from model.families import FAMILIES
from model.families.family import Family
from model.hf_files import INDEX, PADDING, SINGLE, split_into_files
from model.hf_saved import deal_out, saved_files
from serving.generation import load_model
from tasks.reference import weights_fingerprint
from tests.runs import elsewhere, final_state, losses, out_dir, same_bits
from tests.unit.test_families import CHANGES, CONFIG, PackedFamily, packed
from tests.unit.test_saving import new_saver
from tests.unit.test_train import crash, train, train_until
from tokenizer import load_tokenizer
from training.build_model import build_model
from utils.options import parse_size

__all__ = ["packed"]
WHOLE = 1 << 40


def _parameters(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def new(model_type: str, **changes: object) -> Decoder:
    changes = CHANGES.get(model_type, {}) | changes
    model = Decoder(FAMILIES[model_type].new(dataclasses.replace(CONFIG, **changes), changes.keys()).resolve())
    model.initialize(1)
    return model


def save(directory: Path, model: Decoder, family: Family, max_bytes: int, vocab_size: int | None = None) -> list[str]:
    """Write a folder; returns the names of its files of tensors."""
    vocab_size = vocab_size or model.config.vocab_size
    files, index = saved_files(model.config, _parameters(model), family, vocab_size, max_bytes)
    for file in files:
        tensors = {name: tensor.contiguous() for name, tensor in file.convert(file.parameters).items()}
        save_file(tensors, directory / file.name, {"format": "pt"})
    if index is not None:
        (directory / INDEX).write_text(json.dumps(index))
    config = dataclasses.replace(model.config, vocab_size=vocab_size)
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(config, torch.float32, family=family)))
    return [file.name for file in files]


def same(a: Decoder, b: Decoder) -> bool:
    return same_bits(dict(a.named_parameters()), dict(b.named_parameters()))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 20, 1000])
def test_files_hold_what_fits_as_transformers_splits(size: int):
    sizes = {"a": 4, "b": 4, "c": 20, "d": 1, "e": 4, "f": 4}
    files = split_into_files(sizes, size)
    assert [name for names in files.values() for name in names] == list(sizes)
    for names in files.values():
        assert len(names) == 1 or sum(sizes[name] for name in names) <= size
    theirs = split_torch_state_dict_into_shards({name: torch.zeros(n, dtype=torch.int8) for name, n in sizes.items()},
                                                max_shard_size=size)  # fmt: skip
    # Theirs goes on filling a file after a weight that needs one of its own.
    assert abs(len(files) - len(theirs.filename_to_tensors)) <= 1
    assert set(files) == set(theirs.filename_to_tensors) or len(files) > len(theirs.filename_to_tensors)


@pytest.mark.parametrize("text", ["5GB", "5 gb", "5000MB", "5000000000", "5000000K"])
def test_sizes_in_words(text: str):
    assert parse_size(text) == 5_000_000_000


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "5XB", "1.5GB", "GB"])
def test_a_size_that_is_none(text: str):
    with pytest.raises(ValueError, match="max_shard_size must be a size such as"):
        parse_size(text)


@pytest.mark.parametrize("max_bytes", [1, 1500, 10_000, WHOLE])
@pytest.mark.parametrize("model_type", [*FAMILIES, "packed"])
def test_each_family_comes_back_from_files_of_any_size(packed: PackedFamily, model_type: str, max_bytes: int, tmp_path):
    """Also with a file for each tensor, so that fused ones and those of one layer's experts lie in many."""
    model, family = new(model_type), FAMILIES[model_type]
    names = save(tmp_path, model, family, max_bytes)
    named = hf.named_weights(model, family)
    assert same_bits({k: v for name in names for k, v in load_file(tmp_path / name).items()}, named)
    assert (names == [SINGLE]) == (max_bytes == WHOLE) == (not (tmp_path / INDEX).exists())
    assert len(names) == len(named) or max_bytes > 1
    again = Decoder(hf.read_config(tmp_path))
    hf.load_weights(again, tmp_path)
    assert same(model, again)
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = torch.arange(24).view(2, 12)
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, model.logits(model(ids)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", [*FAMILIES, "packed"])
def test_padding_is_not_among_the_weights(packed: PackedFamily, model_type: str, tied: bool, tmp_path: Path):
    model, family = new(model_type, tie_word_embeddings=tied), FAMILIES[model_type]
    assert PADDING in save(tmp_path, model, family, 3000, vocab_size=50)
    assert hf.count_padding(tmp_path) == 14
    # For everybody else the vocabulary has 50 entries.
    config = hf.read_config(tmp_path)
    assert config.vocab_size == 50
    outside = Decoder(config)
    hf.check_weights(config, tmp_path)
    hf.load_weights(outside, tmp_path)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(outside.logits(outside(ids)), model.logits(model(ids))[..., :50], atol=1e-6)
    # The run has all rows again.
    inside = Decoder(dataclasses.replace(config, vocab_size=64))
    hf.check_weights(inside.config, tmp_path)
    hf.load_weights(inside, tmp_path)
    assert same(inside, model)


def test_padding_of_another_model_is_refused(tmp_path: Path):
    save(tmp_path, new("llama"), FAMILIES["llama"], WHOLE, vocab_size=50)
    head = {"lm_head.weight": torch.zeros(14, 8)}
    for more, message in [({}, "vocabulary_padding.safetensors lacks lm_head"), (head, r"lm_head.weight is \(14, 8")]:
        save_file({"embed_tokens.weight": torch.zeros(14, 16)} | more, tmp_path / PADDING)
        with pytest.raises(ValueError, match=message):
            hf.check_weights(CONFIG, tmp_path)
    save_file({"embed_tokens.weight": torch.zeros(3, 16)}, tmp_path / PADDING)
    with pytest.raises(ValueError, match=r"is \(50, 16\) in .*, \(64, 16\) in the model"):
        hf.check_weights(CONFIG, tmp_path)
    (tmp_path / PADDING).write_bytes(b"")
    with pytest.raises(ValueError, match="vocabulary_padding.safetensors cannot be read"):
        hf.check_weights(CONFIG, tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_fused_tensors_take_memory_only_while_their_file_is_written(packed, background: bool, tmp_path, monkeypatch):
    """A save begins with the parameters themselves; what is joined from them comes file by file."""
    model, joined = new("packed"), []
    monkeypatch.setattr(torch, "cat", lambda tensors, cat=torch.cat: joined.append(1) or cat(tensors))
    files, _ = saved_files(model.config, _parameters(model), packed, 64, 3000)
    joined.clear()
    saver: CheckpointSaver = new_saver(tmp_path, background=background)
    writer = saver.begin(1)
    for file in files:
        writer.add_tensors(file.name, file.parameters, None, file.convert, are_weights=True)
    assert not joined
    saver.start(writer, None)
    saver.before_update()
    expected = {name: tensor.clone() for name, tensor in hf.named_weights(model, packed).items()}
    if background:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
    assert saver.settle().problem is None
    saver.close()
    found = {k: v for file in files for k, v in load_file(tmp_path / "step-1" / file.name).items()}
    assert same_bits(found, expected)


@pytest.fixture
def padded_run(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run whose tokenizer has 512 entries, and whose model has 552 rows; 2 files or more."""
    monkeypatch.setattr("training.build_model.padded_vocab_size", lambda vocab_size: vocab_size + 40)
    return [*tiny_run, "--no-tie_word_embeddings", "--max_shard_size=200K"]


def freeze_head(*args: object, **options: object) -> Decoder:
    model = build_model(*args, **options)
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(("dtype", "frozen"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_run_with_padding_goes_on_to_the_bit(padded_run: list[str], dtype: str, frozen: bool, monkeypatch, tmp_path):
    """A frozen matrix is nowhere else: its rows come from the folder and from the padding's file."""
    if frozen:
        monkeypatch.setattr("training.build.build_model", freeze_head)
    flags = [*padded_run, f"--dtype={dtype}", "--save_interval=2"]
    assert train(flags) == 0
    parts = elsewhere(flags, tmp_path / "parts")
    with pytest.raises(OSError, match="the machine died"):
        train_until(3, crash, parts)
    path = tmp_path / "parts" / "ckpt" / "step-2"
    assert find_problem(path) is None and (path / INDEX).exists() and hf.count_padding(path) == 40
    assert train(parts, "--resume") == 0
    assert losses(parts) == losses(flags) and same_bits(final_state(parts, 4), final_state(flags, 4))


def test_others_see_the_tokenizers_rows_alone(padded_run: list[str], tmp_path: Path):
    assert train(padded_run, "--max_iters=1") == 0
    path = list_checkpoints(out_dir(padded_run) / "ckpt")[-1].path
    assert hf.read_config(path).vocab_size == load_tokenizer(path).vocab_size == 512
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert theirs.config.vocab_size == 512 == len(theirs.lm_head.weight)
    loaded, ids = load_model(path, torch.device("cpu"), torch.float32), torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.logits(loaded.model(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    # Another run begins with these rows.
    flags = [*elsewhere(padded_run, tmp_path / "other"), f"--init_from={path}", "--max_iters=1"]
    assert train(flags) == 0
    other = list_checkpoints(tmp_path / "other" / "ckpt")[-1].path
    assert hf.read_config(other).vocab_size == 512 and not (other / PADDING).exists()


def test_rows_that_were_asked_for_are_saved(tiny_run: list[str]):
    assert train(tiny_run, "--vocab_size=600", "--max_iters=1") == 0
    path = list_checkpoints(out_dir(tiny_run) / "ckpt")[-1].path
    assert hf.read_config(path).vocab_size == 600 and not (path / PADDING).exists()


def test_a_checkpoint_that_was_saved_with_its_padding_goes_on(padded_run: list[str], monkeypatch):
    """As checkpoints of earlier versions are; from then on the padding is apart."""
    with monkeypatch.context() as patch:
        patch.setattr("training.build.rows_for_others", lambda config, shape, vocab_size: shape.vocab_size)
        assert train(padded_run, "--max_iters=2") == 0
    checkpoints = out_dir(padded_run) / "ckpt"
    assert hf.read_config(checkpoints / "step-2").vocab_size == 552
    assert train(padded_run, "--resume") == 0
    assert hf.read_config(checkpoints / "step-4").vocab_size == 512 and hf.count_padding(checkpoints / "step-4") == 40


def test_the_routers_bias_stays_in_float32(tmp_path: Path):
    """One tensor of a folder has another dtype than the rest, in the file and in the model, whatever is asked for."""
    model, name = new("ernie4_5_moe", router_bias=True), "layers.1.mlp.router.selection_bias"
    bias = dict(model.named_parameters())[name].detach()
    # Not a number of bfloat16.
    bias.copy_(torch.arange(1, 1 + bias.numel()) * 0.1001)
    model.to(torch.bfloat16)
    names = save(tmp_path, model, FAMILIES["ernie4_5_moe"], 3000)
    written = {k: v for file in names for k, v in load_file(tmp_path / file).items()}
    wide = [name for name, tensor in written.items() if tensor.dtype == torch.float32]
    assert len(wide) == 2 and all("moe_statics.e_score_correction_bias" in name for name in wide)
    again = Decoder(hf.read_config(tmp_path)).to(torch.bfloat16)
    hf.load_weights(again, tmp_path)
    assert same(model, again) and torch.equal(dict(again.named_parameters())[name], bias)


def test_a_fingerprint_of_weights_knows_all_parts(tmp_path: Path):
    model = new("llama")
    names = save(tmp_path, model, FAMILIES["llama"], 3000)
    before = weights_fingerprint(tmp_path, model.config, torch.float32)
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert weights_fingerprint(tmp_path, model.config, torch.float32) != before
        (tmp_path / name).write_bytes(content)
    assert weights_fingerprint(tmp_path, model.config, torch.float32) == before


@pytest.mark.parametrize("hands", [1, 2, 3, 5, 8, 40])
def test_files_are_dealt_out_evenly(hands: int):
    """Each file goes to one writer. The fullest hand has at most an even part and one file more (Graham)."""
    model = new("llama", num_hidden_layers=6)
    total = sum(p.nbytes for p in model.parameters())
    files, _ = saved_files(model.config, _parameters(model), FAMILIES["llama"], 64, -(-total // hands))
    dealt = deal_out(files, hands)
    assert len(dealt) == hands and sorted(f.name for hand in dealt for f in hand) == sorted(f.name for f in files)
    sizes = [[sum(p.nbytes for p in file.parameters.values()) for file in hand] for hand in dealt]
    largest = max(size for hand in sizes for size in hand)
    assert max(map(sum, sizes)) <= total / hands + largest
    assert all(hand for hand in dealt) or hands > len(files)

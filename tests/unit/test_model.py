"""The model against Hugging Face's, against itself in other modes, and against known answers."""

import dataclasses
import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from dataset.sft import padded
from model import Decoder, KVCache, ModelConfig, flops, hf
from model.attend import alibi_slopes, attend_to, attention_mask, document_lengths, document_starts
from model.dropout import DropoutKey, attention_dropout_mask, dropout_mask, philox_uint32
from model.families.llama import LLAMA
from model.kernels.attention import attention_by_document, plain_attention
from model.kernels.rope import rope_reference
from model.loss import IGNORE_INDEX, cross_entropy_sum
from model.ops import build_ops, choose_ops
from model.roles import role_of
from model.rope import rotary_tables

SMALL = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
VARIANTS = {
    "plain": {"num_key_value_heads": 4},
    "gqa": {},
    "one_kv_head_wide_heads": {"num_key_value_heads": 1, "head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "qkv_bias": {"qkv_bias": True},
    "linear": {"rope_scaling": "linear", "rope_scaling_factor": 3.0},
    "dynamic": {"rope_scaling": "dynamic", "rope_scaling_factor": 2.0, "max_position_embeddings": 16},
    "llama3": {
        "rope_scaling": "llama3",
        "rope_scaling_factor": 8.0,
        "rope_theta": 500.0,
        "original_max_position_embeddings": 16,
    },  # fmt: skip
    "yarn": {
        "rope_scaling": "yarn", "rope_scaling_factor": 2.0, "rope_theta": 500.0, "rope_beta_fast": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn with its own scale": {
        "rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_attention_factor": 0.7, "rope_beta_slow": 0.1,
        "rope_truncate": False,
    },
    # One number for each of the 8 pairs; the text is longer than the original context.
    "longrope": {
        "rope_scaling": "longrope", "rope_scaling_factor": 2.0, "original_max_position_embeddings": 16,
        "rope_short_factor": "1.0,1.0,1.05,1.1,1.2,1.2,1.4,2.0", "rope_long_factor": "1.0,1.3,1.7,2.4,3.1,4.7,9.9,20.5",
    },
    "proportional": {"rope_scaling": "proportional", "rope_scaling_factor": 2.0, "partial_rotary_factor": 0.4},
}  # fmt: skip


def build(seed: int = 0, **changes) -> Decoder:
    config = dataclasses.replace(SMALL, **changes)
    model = Decoder(config.resolve())
    # Without the check that a family holds such a model.
    model.roles = lambda: {name: role_of(name) for name, _ in model.named_parameters()}
    model.initialize(seed)
    with torch.no_grad():
        # Larger weights, and biases and norms off their start, so that every term matters.
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def export(model: Decoder, directory: Path) -> None:
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_hugging_face(variant: str, tmp_path: Path):
    model = build(**VARIANTS[variant])
    export(model, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    # Longer than the dynamic variant's context, so that its scaling acts.
    ids = tokens(length=24)
    labels = tokens(length=24, seed=2)
    logits = model.logits(model(ids))
    expected = reference(ids).logits
    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)

    cross_entropy_sum(logits, labels).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours = {LLAMA.their_name(name): p.grad for name, p in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("second", [10, 19])
def test_rope_is_hugging_faces_of_each_document_alone(kind: str, second: int, tmp_path: Path):
    """Padded rows of one batch, documents of one row, and a prompt with its continuation, token by token. The original
    context, 16, is less than the first document, and lies within the continuation."""
    model = build(**VARIANTS[kind]).eval()
    export(model, tmp_path)

    def theirs() -> torch.nn.Module:
        # A new model each time, because it remembers the longest sequence.
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")

    long, short = tokens(1, 28), tokens(1, second, seed=5)
    expected = [theirs()(ids).logits for ids in (long, short)]
    ids, positions = torch.zeros(2, 28, dtype=torch.int64), torch.zeros(2, 28, dtype=torch.int64)
    for row, document in enumerate((long, short)):
        length = document.shape[1]
        ids[row, :length], positions[row, :length] = document, torch.arange(length)
    rows = model.logits(model(ids, positions))
    packed = torch.cat([long, short], dim=1)
    documents = torch.tensor([[0] * 28 + [1] * second])
    together = model.logits(model(packed, torch.cat([torch.arange(28), torch.arange(second)])[None], documents))
    for ours, theirs_alone in zip((rows[:1], rows[1:, :second], together[:, :28], together[:, 28:]), expected * 2):
        assert torch.allclose(ours, theirs_alone, atol=1e-5, rtol=1e-5)

    cache, reference, kept = KVCache(model.config, 1, 28, torch.float32, torch.device("cpu")), theirs(), None
    for piece in long.split([14, *[1] * 14], dim=1):
        out = reference(piece, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        assert torch.allclose(model.logits(model(piece, cache=cache)), out.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_and_import_round_trip(variant: str, tmp_path: Path):
    model = build(**VARIANTS[variant])
    export(model, tmp_path)
    again = Decoder(hf.read_config(tmp_path))
    hf.load_weights(again, tmp_path)
    kind = AutoConfig.from_pretrained(tmp_path).model_type
    assert kind == ("qwen2" if variant == "qkv_bias" else "llama")
    assert again.config == replace(model.config, model_type=kind)
    assert torch.equal(model(tokens()), again(tokens()))


def test_biases_of_three_as_a_llama(tmp_path: Path):
    """transformers computes the same; a model that it saves comes back unchanged, unless its fourth bias was
    trained."""
    model = build(**VARIANTS["qkv_bias"])
    weights = hf.named_weights(model, LLAMA)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32, family=LLAMA)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == "llama"
    assert torch.allclose(model.logits(model(tokens())), theirs(tokens()).logits, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        again = Decoder(hf.read_config(folder))
        hf.load_weights(again, folder)
        assert again.config == replace(model.config, model_type="llama")
        assert torch.equal(model(tokens()), again(tokens()))
    with torch.no_grad():
        theirs.model.layers[1].self_attn.o_proj.bias[3] = 0.1
    theirs.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="layers.1.self_attn.o_proj.bias that is not zero"):
        hf.load_weights(Decoder(hf.read_config(tmp_path / "trained")), tmp_path / "trained")


def test_import_of_a_model_that_transformers_saved(tmp_path: Path):
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    ours = Decoder(hf.read_config(tmp_path))
    hf.load_weights(ours, tmp_path)
    assert torch.allclose(ours.logits(ours(tokens())), theirs(tokens()).logits, atol=1e-5)


def test_import_names_what_does_not_fit(tmp_path: Path):
    model = build()
    export(model, tmp_path)
    with pytest.raises(ValueError, match="mlp"):
        hf.load_weights(build(intermediate_size=64), tmp_path)
    with pytest.raises(ValueError, match="layers.2"):
        hf.load_weights(build(num_hidden_layers=2), tmp_path)
    with pytest.raises(ValueError, match="lacks"):
        hf.load_weights(build(num_hidden_layers=4), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2"):
        hf.read_config(tmp_path)


def test_a_slow_start_is_not_the_peak(monkeypatch: pytest.MonkeyPatch):
    """The first matmul of a process took a second on a busy machine, and the estimate of the run was weeks."""
    original, calls = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(len(a))
        if len(calls) == 1:
            time.sleep(0.6)
        return original(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    peak = flops.device_peak_flops(torch.device("cpu"), torch.float32)
    assert peak > 100 * 2 * 128**3 / 0.6 and max(calls) >= 512


REACH = {
    "window": {"sliding_window": 4},
    "window by layer": {"sliding_window": 3, "full_attention_layers": "1"},
    "alibi": {"position_embedding": "alibi"},
    "alibi in a window": {"position_embedding": "alibi", "sliding_window": 6},
    "qk_norm": {"qk_norm": True, "head_dim": 24},
}


@pytest.mark.parametrize("variant", ["gqa", "linear", "llama3", *REACH])
@pytest.mark.parametrize("pieces", [[10, 1, 1, 1, 1], [1] * 14, [3, 8, 3]])
def test_kv_cache_gives_the_same_as_the_whole_sequence(variant: str, pieces: list[int]):
    """The original cropped its cache along the heads axis."""
    model = build(**(VARIANTS | REACH)[variant]).eval()
    ids = tokens(length=sum(pieces))
    cache = KVCache(model.config, 2, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), model(ids), atol=1e-5)
    assert cache.lengths == [ids.shape[1]] * 2
    with pytest.raises(ValueError, match="KV cache holds 16"):
        model(tokens(length=5), cache=cache)


@pytest.mark.parametrize("attention", ["sdpa", "plain", "blocked"])
@pytest.mark.parametrize("lengths", [[3, 7, 1], [5, 5, 2], [4, 4, 4]])
@pytest.mark.parametrize("reach", ["all", "window", "alibi", "alibi in a window"])
def test_rows_of_a_cache_need_not_be_equally_long(lengths: list[int], attention: str, reach: str):
    """Prompts padded at the end in one batch, then tokens for all of them: each row as if it were alone."""
    model = build(**REACH.get(reach, VARIANTS["gqa"]))
    model.ops = build_ops(dict(model.ops.names) | {"attention": attention})
    for block in model.layers:
        block.self_attn.ops = model.ops
    model.eval()
    prompts, more = tokens(3, max(lengths)), tokens(3, 4, seed=9)
    cache = KVCache(model.config, 3, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        first = model(prompts, cache=cache)
        cache.lengths = list(lengths)
        rest = [model(piece, cache=cache) for piece in more.split([1, 2, 1], dim=1)]
        for row, length in enumerate(lengths):
            alone = model(torch.cat([prompts[row : row + 1, :length], more[row : row + 1]], dim=1))[0]
            assert torch.allclose(first[row, :length], alone[:length], atol=1e-5)
            assert torch.allclose(torch.cat(rest, dim=1)[row], alone[length:], atol=1e-5)
    assert cache.lengths == [length + 4 for length in lengths]


def test_a_cache_gives_the_states_of_the_two_tokens_before():
    """Rows of different lengths, one of them cut back and written over."""
    config = dataclasses.replace(SMALL, local_filter=True, hidden_size=4, head_dim=4).resolve()
    cache = KVCache(config, 2, 8, torch.float32, torch.device("cpu"))
    texts = torch.arange(1, 65, dtype=torch.float32).view(2, 8, 4)
    assert (cache.append_states(1, texts[:, :3]) == 0).all()
    cache.lengths = [3, 1]
    assert torch.equal(cache.append_states(1, texts[:, 3:5])[0], texts[0, 1:3])
    cache.lengths = [5, 3]
    expected = torch.stack([texts[0, 3:5], texts[1, 3:5]])
    assert torch.equal(cache.append_states(1, texts[:, 5:6]), expected)
    cache.keep([1])
    cache.lengths = [1]
    assert torch.equal(cache.append_states(1, texts[:1, :1])[0], torch.stack([torch.zeros(4), texts[1, 0]]))
    assert (cache.append_states(0, texts[:1, :1]) == 0).all()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_windows_and_norms_of_heads_equal_transformers(kind: str):
    """Texts three times as long as the window; qwen2 and qwen3 have it in their later layers only. Also token by token,
    with a cache."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
    extra = {
        "mistral": {},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    }
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind, vocab_size=96, hidden_size=64, intermediate_size=128, sliding_window=7, initializer_range=0.3,
        attn_implementation="eager", tie_word_embeddings=False, rms_norm_eps=1e-5, **shape, **extra[kind],
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config).eval()
    ours = build(
        **shape, sliding_window=7, full_attention_layers="" if kind == "mistral" else "0", qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2", max_position_embeddings=config.max_position_embeddings,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict({name.removeprefix("model."): value for name, value in theirs.state_dict().items()})
    ids = tokens(2, 21)
    expected, logits = theirs(ids).logits, ours.logits(ours(ids))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    for model_logits in (expected, logits):
        cross_entropy_sum(model_logits, tokens(2, 21, seed=2)).backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        found = gradients[name.removeprefix("model.")].grad
        assert (found - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    cache = KVCache(ours.config, 2, 21, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        parts = [ours.logits(ours(piece, cache=cache)) for piece in ids.split([10, *[1] * 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 40, 64, 112])
def test_alibi_equals_blooms(heads: int):
    """Theirs grows with the key's position, ours falls with the distance: the same under a softmax. Baichuan-13B has 40
    heads, and its slopes are these."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 30), heads, torch.float32)
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32 and torch.allclose(slopes, theirs[:, 0, 1], rtol=1e-6, atol=0.0)
    causal = torch.full((30, 30), -torch.inf).triu(1)
    ours = attention_mask(30, 30, None, slopes.device, slopes_H=slopes)
    torch.testing.assert_close(ours[0].softmax(-1), (theirs + causal).softmax(-1), rtol=1e-5, atol=1e-7)


def test_alibi_is_exact_beside_the_query_of_a_long_text():
    """In bfloat16, positions beyond 256 would become one; distances stay apart."""
    mask = attention_mask(1, 5001, None, torch.device("cpu"), slopes_H=torch.tensor([0.25]))
    assert mask.dtype == torch.float32 and mask[0, 0, 0, -4:].tolist() == [-0.75, -0.5, -0.25, 0.0]


def test_rotary_tables_are_shared_and_a_cache_is_read_from_the_window_on():
    config = dataclasses.replace(SMALL, sliding_window=4, full_attention_layers="0").resolve()
    cpu = torch.device("cpu")
    cache = KVCache(config, 1, 16, torch.float32, cpu)
    cache.lengths = [9]
    attends = attend_to(config, [0, 4, 4], 1, cpu, torch.tensor([[9]]), cache=cache)
    assert attends.keys() == {0, 4} and attends[0].rope is attends[4].rope
    assert (attends[0].first_key, attends[4].first_key) == (0, 6) and attends[4].mask is None
    keys, _ = cache.append(0, torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), attends[4].first_key)
    assert keys.shape[2] == 4
    # A window that no text exceeds hides nothing.
    assert attend_to(config, [40], 16, cpu, torch.arange(16)[None])[40].is_plainly_causal


def test_document_mask_equals_documents_alone():
    model = build()
    first, second = tokens(1, 9), tokens(1, 13, seed=5)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    documents = torch.tensor([[0] * 9 + [1] * 13])
    together = model(packed, positions, documents)
    assert torch.allclose(together[:, :9], model(first), atol=1e-5)
    assert torch.allclose(together[:, 9:], model(second), atol=1e-5)


def test_no_gradient_crosses_a_document_border():
    model = build()
    documents = torch.tensor([[0] * 6 + [1] * 6])
    embedded = model.embed_tokens(tokens(1, 12)).detach().requires_grad_()
    model.embed_tokens.forward = lambda _: embedded
    model(tokens(1, 12), None, documents)[:, 6:].sum().backward()
    assert torch.count_nonzero(embedded.grad[:, :6]) == 0
    assert torch.count_nonzero(embedded.grad[:, 6:]) > 0


def test_gradient_checkpointing_changes_nothing():
    key = DropoutKey(3, torch.tensor([7, 8]))
    grads = []
    for keeps in ("all", "nothing"):
        model = build(hidden_dropout=0.2)
        model.set_recompute([keeps] * len(model.layers))
        model.train()
        cross_entropy_sum(model.logits(model(tokens(), dropout_key=key)), tokens(seed=3)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_philox_known_answers():
    """Vectors published with the Random123 library (kat_vectors, philox4x32-10)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        words = philox_uint32(key, tuple(torch.tensor(word) for word in counter))
        assert tuple(int(word) for word in words) == expected


def test_dropout_does_not_depend_on_the_split_of_the_batch():
    rows = torch.tensor([5, 1 << 40, 6, 7])
    whole = dropout_mask(torch.Size([4, 3, 5]), 0.3, DropoutKey(9, rows), 1)
    parts = [dropout_mask(torch.Size([1, 3, 5]), 0.3, DropoutKey(9, row[None]), 1) for row in rows]
    assert torch.equal(whole, torch.cat(parts))
    others = [
        dropout_mask(torch.Size([4, 3, 5]), 0.3, key, site)
        for key, site in [(DropoutKey(9, rows), 2), (DropoutKey(8, rows), 1), (DropoutKey(9, rows, 1), 1),
                          (DropoutKey(9, rows).for_layer(1), 1), (DropoutKey(9, rows + 1), 1)]
    ]  # fmt: skip
    assert all(not torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_rate(probability: float):
    mask = dropout_mask(torch.Size([64, 1000]), probability, DropoutKey(1, torch.arange(64)), 0)
    # Standard error of the mean of 64,000 draws is below 0.002.
    assert abs(mask.double().mean().item() - (1 - probability)) < 0.01


def test_attention_dropout_does_not_depend_on_the_width_of_the_row():
    """A padded row's weights are the upper left part of its wider matrix; new queries after a cache are its last
    rows."""

    def mask(*shape: int, key: DropoutKey) -> torch.Tensor:
        return attention_dropout_mask(torch.Size(shape), 0.3, key)

    key = DropoutKey(9, torch.tensor([5, 1 << 40]))
    wide = mask(2, 3, 61, 61, key=key)
    assert torch.equal(wide[..., :9, :9], mask(2, 3, 9, 9, key=key))
    assert torch.equal(wide[..., 58:, :], mask(2, 3, 3, 61, key=key))
    assert torch.equal(wide[1:], mask(1, 3, 61, 61, key=DropoutKey(9, key.row_ids[1:])))
    others = [replace(key, seed=8), replace(key, seed=9 + (1 << 40)), replace(key, forward_id=1), key.for_layer(1)]
    rows = torch.cat([wide, wide.mT, *(mask(2, 3, 61, 61, key=other) for other in others)]).flatten(0, 2)
    # No two rows of weights have the same mask, whatever part of the key differs.
    assert len(rows.unique(dim=0)) == len(rows)
    many = attention_dropout_mask(torch.Size([8, 4, 64, 64]), 0.3, DropoutKey(1, torch.arange(8)))
    # Standard error of the mean of 131,072 draws is 0.0013.
    assert abs(many.double().mean().item() - 0.7) < 0.006


BY_WIDTH = {
    "hidden dropout": {"hidden_dropout": 0.3},
    "attention dropout": {"attention_dropout": 0.3},
    "dynamic": VARIANTS["dynamic"] | {"max_position_embeddings": 6},
    "longrope": VARIANTS["longrope"] | {"original_max_position_embeddings": 10},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", BY_WIDTH)
def test_a_step_does_not_depend_on_how_far_its_rows_are_padded(kind: str, packed: bool):
    """Rows padded as in SFT and DPO, in one micro-batch or each in its own."""
    generator = torch.Generator().manual_seed(0)

    def sequence(length: int) -> tuple[np.ndarray, np.ndarray]:
        return torch.randint(0, SMALL.vocab_size, (length + 1,), generator=generator).numpy(), np.ones(length + 1)

    rows = [[sequence(7)], [sequence(8), sequence(15)], [sequence(16)]]
    if not packed:
        rows = [row[-1:] for row in rows]
    gradients = []
    for micro_batches in ([[0, 1, 2]], [[0], [1], [2]]):
        model = build(**BY_WIDTH[kind]).train()
        for numbers in micro_batches:
            batch = padded([rows[number] for number in numbers], 32, 0)
            documents = batch["document_ids"] if packed else None
            key = DropoutKey(3, torch.tensor(numbers)) if "dropout" in kind else None
            hidden = model(batch["input_ids"], batch["positions"], documents, dropout_key=key)
            model.loss_sum(hidden, batch["labels"]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_dropout_in_the_model(kind: str):
    model = build(**{kind: 0.5})
    rows = torch.tensor([0, 1])
    plain = model(tokens())
    dropped = model(tokens(), dropout_key=DropoutKey(1, rows))
    assert not torch.allclose(plain, dropped, atol=1e-2)
    assert torch.equal(dropped, model(tokens(), dropout_key=DropoutKey(1, rows)))
    assert torch.allclose(dropped[1:], model(tokens()[1:], dropout_key=DropoutKey(1, rows[1:])), atol=1e-5)
    assert torch.equal(plain, build()(tokens())) or kind == "attention_dropout"


def test_plain_attention_equals_sdpa():
    """attention_dropout > 0 takes the plain path; with a vanishing probability both must agree."""
    model, plain = build(), build(attention_dropout=1e-9)
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2)
    for ids in (None, documents):
        a = model(tokens(), None, ids)
        b = plain(tokens(), None, ids, dropout_key=DropoutKey(1, torch.tensor([0, 1])))
        assert torch.allclose(a, b, atol=1e-5)


def test_rope_stays_in_float32_under_bf16():
    """The original cast the tables to bf16: at position 4,000 neighbouring positions became one."""
    model = build(max_position_embeddings=8192).to(torch.bfloat16)
    cos, _ = rotary_tables(model.config, torch.tensor([[4000, 4001]]))
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[:, :, 0], cos[:, :, 1])
    assert model(tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["glm", "ernie4_5_moe"])
def test_interleaved_rope_is_that_of_their_models(kind: str):
    """Glm rotates half of each head, Ernie all of it."""
    theirs = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").apply_rotary_pos_emb
    config = dataclasses.replace(SMALL, partial_rotary_factor={"glm": 0.5}.get(kind, 1.0)).resolve()
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 24, 16, generator=generator) for heads in (4, 2))
    cos, sin = rotary_tables(config, torch.arange(24)[None].expand(2, -1))
    ours = rope_reference(q, k, cos, sin, interleaved=True)
    twice = (torch.cat((table, table), dim=-1)[:, 0] for table in (cos, sin))
    for found, expected in zip(ours, theirs(q, k, *twice)):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_rotated_part_in_pairs_side_by_side_is_another_order_of_channels():
    """Of 16 channels, (2 i, 2 i + 1) with i < 4 turn by theta ** (-2 i / 8); as proportional positions, (i, i + 8) do
    so by (theta ** 2) ** (-2 i / 16)."""
    other = build(qkv_bias=True, rope_theta=900.0, rope_scaling="proportional", partial_rotary_factor=0.5)
    changes = {"qkv_bias": True, "rope_theta": 30.0, "rope_interleaved": True}
    part, whole = (Decoder(dataclasses.replace(SMALL, **changes, partial_rotary_factor=share).resolve())
                   for share in (0.5, 1.0))  # fmt: skip
    order, state = [0, 8, 1, 9, 2, 10, 3, 11, *range(4, 8), *range(12, 16)], dict(other.state_dict())
    for name, value in state.items():
        if "q_proj" in name or "k_proj" in name:
            state[name] = value.unflatten(0, (-1, 16))[:, order].flatten(0, 1)
    for model in (part, whole):
        model.load_state_dict(state)
    assert torch.allclose(part(tokens()), other(tokens()), atol=1e-5)
    assert not torch.allclose(part(tokens()), whole(tokens()), atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.2}, "leaves 3 channels of 16 to rotate: choose one that leaves an even number"),
        ({"rope_scaling": "longrope"}, "rope_short_factor must be positive numbers with commas, such as 1.0,1.5; got"),
        (VARIANTS["longrope"] | {"rope_long_factor": "1.0,2.0"}, "must have a number for each of the 8 pairs"),
        (VARIANTS["longrope"] | {"rope_long_factor": "1,2,3,4,5,6,7,-1"}, "rope_long_factor must be positive numbers"),
        (VARIANTS["longrope"] | {"rope_short_factor": "1,2,nan"}, "rope_short_factor must be positive numbers"),
        (VARIANTS["longrope"] | {"original_max_position_embeddings": 1}, "needs an original_max_position_embeddings"),
        (VARIANTS["yarn"] | {"rope_beta_slow": 5.0}, "rope_beta_fast must be at least rope_beta_slow 5.0, got 4.0"),
        (VARIANTS["yarn"] | {"rope_beta_slow": 0.0}, "rope_beta_slow must be positive, got 0.0"),
        (VARIANTS["yarn"] | {"rope_theta": 1.0}, "rope_scaling=yarn needs a rope_theta above 1"),
        (VARIANTS["yarn"] | {"rope_attention_factor": -1.0}, "rope_attention_factor must lie between 0.0 and"),
        (VARIANTS["proportional"] | {"partial_rotary_factor": 0.1}, "leaves none of 8 pairs of channels to rotate"),
    ],
)  # fmt: skip
def test_rope_that_cannot_be_built_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes).resolve()


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_residual_dtype(residual_in_fp32: bool):
    model = build(residual_in_fp32=residual_in_fp32).to(torch.bfloat16)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model(tokens())
    assert seen == [torch.float32 if residual_in_fp32 else torch.bfloat16]


def test_initial_weights_depend_only_on_seed_and_name():
    first, second, other = (Decoder(SMALL.resolve()) for _ in range(3))
    first.initialize(1)
    second.initialize(1)
    other.initialize(2)
    for (name, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (first, second, other))):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == name.endswith("norm.weight")
    std = first.layers[0].mlp.down_proj.weight.std().item()
    assert std == pytest.approx(SMALL.initializer_range / (2 * SMALL.num_hidden_layers) ** 0.5, rel=0.05)


def test_loss_is_a_sum_over_supervised_tokens():
    logits, labels = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    labels[0, 1] = labels[1, 4] = IGNORE_INDEX
    naive = -sum(
        logits[b, t].log_softmax(-1)[labels[b, t]] for b in range(2) for t in range(5) if labels[b, t] != IGNORE_INDEX
    )
    assert cross_entropy_sum(logits, labels).item() == pytest.approx(naive.item(), rel=1e-6)


@pytest.mark.parametrize("changes", [
    {}, {"mlp": "gelu"}, {"local_filter": True}, {"num_local_experts": 8, "moe_intermediate_size": 24},
    {"num_local_experts": 4, "num_experts_per_tok": 3, "num_shared_experts": 2, "dense_layers": "1"},
])  # fmt: skip
def test_flops_formula_equals_torchs_count(changes: dict):
    """FlopCounterMode counts full attention; the strict formula counts half of it."""
    model = Decoder(dataclasses.replace(SMALL, attention_dropout=1e-9, **changes).resolve()).train()
    ids, length = tokens(2, 32), 32
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, dropout_key=DropoutKey(0, torch.tensor([0, 1])))
        cross_entropy_sum(model.logits(hidden), ids).backward()
    config = model.config
    full_attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    # The first half of the filter also passes over the token before the first one, which is not counted.
    before = 6 * config.num_hidden_layers * config.hidden_size**2 / length if config.local_filter else 0
    counted = counter.get_total_flops() / ids.numel()
    assert counted == flops.flops_per_token_strict(config, length) + full_attention / 2 + before


def test_flops_of_windows_count_the_keys_that_are_seen():
    changes = {"sliding_window": 5, "full_attention_layers": "1"}
    windows = dataclasses.replace(SMALL, num_hidden_layers=3, **changes).resolve()
    without = dataclasses.replace(windows, sliding_window=0, full_attention_layers="").resolve()
    distances = torch.arange(400)[:, None] - torch.arange(400)
    keys = ((distances >= 0) & (distances < 5)).sum(1).double().mean().item()
    saved = 2 * 12 * windows.num_attention_heads * windows.head_dim * (200 - keys)
    found = flops.flops_per_token_strict(without, 400) - flops.flops_per_token_strict(windows, 400)
    # By the formula a query sees half a key less: of 400 tokens 200, not 200.5.
    assert found == pytest.approx(saved, rel=5e-3)
    longer = dataclasses.replace(windows, sliding_window=400)
    assert flops.flops_per_token_strict(longer, 300) == flops.flops_per_token_strict(without, 300)
    assert sum(flops.unit_flops(windows, 400, 0.3)) == pytest.approx(flops.flops_per_token_strict(windows, 400, 0.3))


def test_flops_of_the_originals_1b():
    """8.64 G against 7.30 G per token, as the design says for the original's shape."""
    config = ModelConfig(
        vocab_size=64320, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=2048,
    ).resolve()  # fmt: skip
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(config).parameters())
    assert flops.flops_per_token_strict(config, 2048) == pytest.approx(7.30e9, rel=2e-3)
    assert flops.flops_per_token_seed(config, 2048, parameters) == pytest.approx(8.64e9, rel=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_are_whole_graphs_beside_float32_gradients(checkpointing: bool):
    """Weights in bfloat16 accumulate gradients in float32, as in training, where torch.compile alone would break its
    graphs. Any number of documents has the same graphs."""
    config = ModelConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    model = Decoder(
        config.resolve(max_seq_len=32), checkpointing,
        ops=build_ops(choose_ops("auto", {}, torch.device("cpu"), torch.bfloat16)),
    )  # fmt: skip
    model.initialize(0)
    model.bfloat16()
    ids = tokens(2, 32)
    results = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model.compile_blocks(backend="aot_eager")
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        for number in (3, 5):
            documents = (torch.arange(32) * number // 32).expand(2, -1)
            hidden = model(ids, None, documents, document_starts=document_starts(documents))
            cross_entropy_sum(model.logits(hidden), ids).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, expected in zip(*results):
        assert (ours - expected).norm() <= 1e-2 * expected.norm()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if checkpointing else 2)


@pytest.mark.soak
def test_compiled_blocks_give_the_same_with_dropout():
    plain, compiled = build(hidden_dropout=0.1), build(hidden_dropout=0.1)
    compiled.compile_blocks()
    key = DropoutKey(1, torch.tensor([0, 1]))
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2)
    torch._dynamo.utils.counters.clear()
    results = []
    for model in (plain, compiled):
        hidden = model(tokens(), None, documents, dropout_key=key)
        cross_entropy_sum(model.logits(hidden), tokens(seed=3)).backward()
        results.append((hidden, model.layers[0].self_attn.q_proj.weight.grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)
    # One graph serves all layers except the first, which has nothing to add: nothing in a block depends on its number.
    assert len(compiled.layers) > 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("cuts", [[[3, 1, 28], [32]], [[1] * 32, [31, 1]], [[8] * 4, [16] * 2]])
def test_attention_by_document_equals_the_mask(kv_heads: int, cuts: list[list[int]]):
    """Outputs and gradients in float64; the documents' lengths are recovered from their ids."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 32, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = random(4), random(kv_heads), random(kv_heads)
    document_ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in cuts])
    mask = attention_mask(32, 32, document_ids, q.device)
    results = []
    for out in (
        attention_by_document(q, k, v, cuts),
        plain_attention(q, k, v, mask, 0.0, None),
    ):
        gradients = torch.autograd.grad((out * torch.arange(8)).sum(), (q, k, v))
        results.append((out, *gradients))
    for ours, expected in zip(*results):
        # plain_attention computes its softmax in float32.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_attention_by_document_is_chosen_where_it_is_less_work():
    assert document_lengths(torch.arange(1024).div(100, rounding_mode="floor")[None]) == [[100] * 10 + [24]]
    assert document_lengths(torch.arange(64)[None]) is None
    # Rows with equally many documents that are not the same: padding counts as one, too.
    ids = torch.cat([torch.zeros(500), torch.ones(500), torch.full((24,), -1)]).long()
    assert document_lengths(torch.stack([ids, ids * 0])) == [[500, 500, 24], [1024]]


def test_model_with_documents_equals_the_model_with_the_mask():
    """The whole forward and backward pass, on packed rows of 512."""
    config = ModelConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ).resolve(max_seq_len=512)
    ids = torch.randint(0, 50, (2, 512), generator=torch.Generator().manual_seed(0))
    documents = torch.stack([torch.arange(512) // 60, torch.arange(512) // 130])
    assert document_lengths(documents) is not None
    figures = []
    for by_document in (True, False):
        model = Decoder(config)
        model.initialize(0)
        model.double()
        model.attends_by_document = by_document
        hidden = model(ids, document_ids_BT=documents)
        cross_entropy_sum(model.logits(hidden), ids).backward()
        figures.append((hidden.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(figures[0], figures[1])

"""Families that transformers has under the same names: scores, gradients and folders, in both directions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model import Decoder, KVCache, ModelConfig, hf
from model.families import FAMILIES, family_of
from tokenizer.hf_bbpe import train_hf_bbpe
from training.export import plan_export

SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
    "pad_token_id": None, "head_dim": 4,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FEW_ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 0}
VARIANTS: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5, "rope_parameters": SCALED},
    "mistral without a window": {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2": WINDOW | {"max_window_layers": 2},
    "qwen2 in turns": WINDOW | {"layer_types": [SLIDING, FULL, SLIDING]},
    "qwen3": WINDOW | {"layer_types": [FULL, SLIDING, FULL], "head_dim": 8, "rope_parameters": SCALED},
    "qwen3 with biases": {"attention_bias": True, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "sliding_window": 5},
    "mixtral of many": {"num_local_experts": 16, "num_experts_per_tok": 3, "rope_parameters": SCALED},
    "qwen3_moe": FEW | {"norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 8, "sliding_window": None},
    "qwen3_moe as it is": FEW | WINDOW | {"norm_topk_prob": False, "attention_bias": True, "decoder_sparse_step": 2},
    "ernie4_5_moe": FEW_ERNIE | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
    "ernie4_5_moe alone": FEW_ERNIE | {"moe_num_shared_experts": 0, "moe_layer_interval": 3, "rms_norm_eps": 1e-3},
}  # fmt: skip
TEXTS = [torch.arange(length) * step % 31 + 1 for length, step in ((24, 7), (9, 5), (17, 3))]
"""Beyond the context and the window, and within."""


@dataclasses.dataclass
class Pair:
    ours: Decoder
    theirs: torch.nn.Module
    folder: Path
    """Saved by transformers."""


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param.partition(" ")[0]
    config = CONFIG_MAPPING[name](**SHAPE | VARIANTS[request.param])
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Norms and biases off their start, so that every term matters.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder)
    ours = Decoder(hf.read_config(folder))
    hf.load_weights(ours, folder)
    assert family_of(ours.config).model_type == name
    return Pair(ours.eval(), theirs, folder)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(scores_TV: Tensor, text: Tensor) -> Tensor:
    return F.cross_entropy(scores_TV[:-1], text[1:], reduction="sum")


def test_scores_and_every_gradient_equal_transformers(pair: Pair):
    ours, theirs = (torch.tensor(0.0), torch.tensor(0.0))
    for text in TEXTS:
        scores, expected = pair.ours.logits(pair.ours(text[None]))[0], pair.theirs(text[None]).logits[0]
        close(scores, expected)
        ours, theirs = ours + loss_of(scores, text), theirs + loss_of(expected, text)
    ours.backward()
    theirs.backward()
    found, family = gradients_of(pair.ours), family_of(pair.ours.config)
    joined: dict[str, Tensor] = {}
    for rule in family.rules(pair.ours.config, list(found)):
        joined |= zip(rule.theirs, rule.join([found[name] for name in rule.ours]))
    expected = revert_weight_conversion(pair.theirs, gradients_of(pair.theirs))
    assert joined.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (joined[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@torch.no_grad()
def test_token_by_token_padded_and_packed_equal_transformers_alone(pair: Pair):
    model, expected = pair.ours, [pair.theirs(text[None]).logits[0] for text in TEXTS]
    cache = KVCache(model.config, 1, 24, torch.float32, torch.device("cpu"))
    pieces = TEXTS[0][None].split([7, 2, *[1] * 15], dim=1)
    close(torch.cat([model.logits(model(piece, cache=cache))[0] for piece in pieces]), expected[0])

    ids, positions = torch.zeros(3, 24, dtype=torch.int64), torch.zeros(3, 24, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        ids[row, : len(text)], positions[row, : len(text)] = text, torch.arange(len(text))
    padded = model.logits(model(ids, positions))
    for row, scores in enumerate(expected):
        close(padded[row, : len(scores)], scores)

    documents = torch.cat([torch.full_like(text, number) for number, text in enumerate(TEXTS)])[None]
    positions = torch.cat([torch.arange(len(text)) for text in TEXTS])[None]
    close(model.logits(model(torch.cat(TEXTS)[None], positions, documents))[0], torch.cat(expected))


def export(model: Decoder, folder: Path) -> tuple[bytes, bytes]:
    folder.mkdir()
    save_file(hf.named_weights(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


@torch.no_grad()
def test_what_we_write_is_read_by_transformers_and_written_again_the_same(pair: Pair, tmp_path: Path):
    written = export(pair.ours, tmp_path / "one")
    again = Decoder(hf.read_config(tmp_path / "one"))
    hf.load_weights(again, tmp_path / "one")
    assert again.config == pair.ours.config and export(again, tmp_path / "two") == written
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "one", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    for text in TEXTS:
        close(pair.ours.logits(pair.ours(text[None])), theirs(text[None]).logits)
        assert torch.equal(theirs(text[None]).logits, pair.theirs(text[None]).logits)


def test_a_model_as_transformers_has_it_in_memory_is_read(pair: Pair, tmp_path: Path):
    pair.theirs.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("mlp.experts.down_proj") for name in names) == (pair.ours.config.num_local_experts > 0)
    again = Decoder(hf.read_config(tmp_path))
    hf.load_weights(again, tmp_path)
    assert all(map(torch.equal, again.parameters(), pair.ours.parameters()))


@torch.no_grad()
def test_experts_whose_probability_vanishes_are_chosen_as_in_transformers(tmp_path: Path):
    """The bias may choose experts whose probabilities are 0 in float32."""
    config = CONFIG_MAPPING["ernie4_5_moe"](**SHAPE | FEW_ERNIE)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    gate = theirs.model.layers[1].mlp.gate
    gate.weight.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)) * 90)
    gate.moe_statics.e_score_correction_bias.copy_(torch.tensor([[0.0, 5.0, 5.0, 0.0]]))
    theirs.save_pretrained(tmp_path)
    ours = Decoder(hf.read_config(tmp_path))
    hf.load_weights(ours, tmp_path)
    scores = ours.logits(ours(TEXTS[0][None]))
    assert scores.isfinite().all()
    close(scores, theirs(TEXTS[0][None]).logits)


@torch.no_grad()
def test_a_bias_of_the_choice_that_is_zero_may_be_left_out(tmp_path: Path):
    """transformers always adds Ernie's bias. A model without one comes back without it; another bias is refused."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, num_local_experts=4, num_shared_experts=1, dense_layers="0", rope_interleaved=True,
    ).resolve()  # fmt: skip
    model = Decoder(config)
    model.initialize(1)
    export(model, tmp_path / "one")
    again = Decoder(hf.read_config(tmp_path / "one"))
    hf.load_weights(again, tmp_path / "one")
    assert again.config == dataclasses.replace(config, model_type="ernie4_5_moe")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    for text in TEXTS:
        close(again.logits(again(text[None])), theirs(text[None]).logits)
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    weights = load_file(tmp_path / "one" / "model.safetensors")
    assert weights[name].tolist() == [[0.0] * 4]
    save_file(weights | {name: weights[name] + 0.01}, tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match=f"holds a {name} that is not zero, while .* moe_use_aux_free = false: set"):
        hf.load_weights(again, tmp_path / "one")


ODD_TEXTS = ["12345 67 8901", "e\u0301 \u00e9 \u212b", "  a   b\n\n  c\t\td", "I'LL they've DON'T", "x=1;y==2!!!"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_that_brings_its_own_tokenizer_says_so(model_type: str, tmp_path: Path):
    """transformers splits texts by the folder's own rules, or by the family's."""
    ours = train_hf_bbpe([" ".join(ODD_TEXTS)] * 3, 290, show_progress=False)
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found = []
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(tmp_path)
        ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in ODD_TEXTS]
        found.append(ids == [list(ours.encode(text)) for text in ODD_TEXTS])
    assert found == [not FAMILIES[model_type].names_tokenizer, True]


def test_a_run_says_that_only_a_family_with_its_own_tokenizer_holds_its_model():
    tokenizer = train_hf_bbpe([" ".join(ODD_TEXTS)] * 3, 290, show_progress=False)
    export = plan_export(False, tokenizer, None, 290)
    biased = ModelConfig(qkv_bias=True, vocab_size=290, max_position_embeddings=16).resolve()
    assert export.family(biased).model_type == "llama" and not export.warning(biased)
    windowed = dataclasses.replace(biased, sliding_window=8)
    assert "are written as qwen2, the only family that holds such a model" in export.warning(windowed)


def test_the_families_of_transformers_names_are_all_here():
    alike = {name.partition(" ")[0] for name in VARIANTS}
    assert alike == {name for name in FAMILIES if name in CONFIG_MAPPING} - {"bloom"}

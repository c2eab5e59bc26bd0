"""Scores and gradients of families that have their own names: against transformers' class that computes the same, or
figures of an independent program (tests/golden/make_families.py). Each folder is made without our rules."""

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model import Decoder, KVCache, hf
from model.families import family_of
from tests.family_folders import (
    Config,
    Tensors,
    aquila_as_llama,
    baichuan_tensors,
    chatglm_as_glm,
    chatglm_tensors,
    internlm_as_llama,
)
from tests.golden.make_families import CONFIGS, OUTPUT, TEXTS, weights

SIZES = {
    "vocab_size": 16, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "float16",
}  # fmt: skip
FOLDERS: dict[str, Config] = {
    "bloom": {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 16, "n_embed": 24, "n_layer": 2,
        "num_attention_heads": 3, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "n_inner": None,
        "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "offset_alibi": 100,
        "bias_dropout_fusion": True, "masked_softmax_fusion": True, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "pretraining_tp": 2, "seq_length": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0, "unk_token_id": 0,
    },
    "aquila": SIZES | {
        "model_type": "aquila", "architectures": ["AquilaForCausalLM"], "num_key_value_heads": 1,
        "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}, "initializer_range": 0.0165,
        "auto_map": {"AutoConfig": "configuration_aquila.AquilaConfig",
                     "AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM"},
    },
    "internlm": SIZES | {
        "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True,
        "rotary": {"base": 10000, "type": "dynamic"}, "auto_map": {"AutoModel": "modeling_internlm.InternLMModel"},
    },
    "internlm without biases": SIZES | {
        "model_type": "internlm", "bias": False, "rotary": {"base": 500, "type": "origin"}, "num_key_value_heads": 3,
    },
    "baichuan 1": SIZES | {
        "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], "normalized_head": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM"},
    },
    "chatglm": {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 20,
        "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 24, "kv_channels": 8,
        "layernorm_epsilon": 1e-05, "multi_query_attention": True, "multi_query_group_num": 2, "original_rope": True,
        "num_attention_heads": 4, "num_layers": 2, "padded_vocab_size": 16, "post_layer_norm": True, "rmsnorm": True,
        "seq_length": 8, "quantization_bit": 0, "rope_ratio": 50, "tie_word_embeddings": False, "eos_token_id": 2,
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    },
}  # fmt: skip
"""As published, but for the sizes."""
ORACLES = {
    "bloom": (lambda config: config, lambda tensors: tensors),
    "aquila": (aquila_as_llama, lambda tensors: tensors),
    "internlm": (internlm_as_llama, lambda tensors: tensors),
    "internlm without biases": (internlm_as_llama, lambda tensors: tensors),
    "baichuan 1": (lambda config: aquila_as_llama(config) | {"normalized_head": None}, baichuan_tensors),
    "chatglm": (chatglm_as_glm, chatglm_tensors),
}
"""Folder -> (the configuration of transformers' class, its tensors in the folder's names)."""
GOLDENS = ("baichuan", "yuan")
FAMILIES = [*FOLDERS, *GOLDENS]
BUFFERS = {"internlm": "model.layers.1.self_attn.rotary_emb.inv_freq", "chatglm": "transformer.rotary_pos_emb.inv_freq",
           "baichuan": "model.future_mask", "yuan": "model.layers.0.self_attn.rotary_emb.inv_freq",
           "bloom": "transformer.h.0.self_attention.scale_mask_softmax.causal_mask"}  # fmt: skip
"""Constants that folders of other versions hold."""


@dataclass(frozen=True)
class Expected:
    config: Config
    tensors: Tensors
    """The folder's, as all other names here."""
    scores: Tensors
    """Text -> (T, V)."""
    gradients: Tensors
    """Of the sum of both texts' cross entropies."""


def loss_of(scores_TV: Tensor, ids: list[int]) -> Tensor:
    return F.cross_entropy(scores_TV[:-1], torch.tensor(ids[1:]), reduction="sum")


def of_transformers(name: str) -> Expected:
    as_theirs, as_folder = ORACLES[name]
    # transformers writes into the dictionaries that it is given.
    values = {key: value for key, value in deepcopy(as_theirs(FOLDERS[name])).items() if value is not None}
    config = CONFIG_MAPPING[str(values.pop("model_type"))](**values)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    scores = {text: theirs(torch.tensor([ids])).logits[0] for text, ids in TEXTS.items()}
    sum(loss_of(scores[text], ids) for text, ids in TEXTS.items()).backward()
    named = dict(theirs.named_parameters())
    tensors = as_folder({key: parameter.detach() for key, parameter in named.items()})
    gradients = as_folder({key: parameter.grad for key, parameter in named.items()})
    return Expected(FOLDERS[name], tensors, {text: part.detach() for text, part in scores.items()}, gradients)


def of_golden(kind: str) -> Expected:
    golden = json.loads(OUTPUT.read_text())[kind]
    tensors = {name: weight.float() for name, weight in weights(kind).items()}
    gradients = {name: torch.tensor(values).view_as(tensors[name]) for name, values in golden["gradients"].items()}
    scores = {text: torch.tensor(values) for text, values in golden["scores"].items()}
    code = {"auto_map": {"AutoModelForCausalLM": f"modeling_{kind}.Model"}}
    return Expected(CONFIGS[kind] | code, tensors, scores, gradients)


@cache
def expected_of(name: str) -> Expected:
    return of_golden(name) if name in GOLDENS else of_transformers(name)


@pytest.fixture(params=FAMILIES)
def expected(request: pytest.FixtureRequest) -> Expected:
    return expected_of(request.param)


@pytest.fixture
def model(expected: Expected, tmp_path: Path) -> Decoder:
    return loaded(write(expected, tmp_path))


def write(expected: Expected, directory: Path) -> Path:
    buffer = BUFFERS.get(str(expected.config["model_type"]))
    tensors = expected.tensors | ({buffer: torch.ones(4)} if buffer else {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(expected.config))
    return directory


def loaded(directory: Path) -> Decoder:
    model = Decoder(hf.read_config(directory))
    hf.load_weights(model, directory)
    return model.eval()


def gradients_of(model: Decoder) -> Tensors:
    """In the folder's names."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    found: Tensors = {}
    for rule in family_of(model.config).rules(model.config, ours):
        found |= zip(rule.theirs, rule.join([ours[name] for name in rule.ours]))
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    """Within 1e-5 of the largest value: gradients of sums go into the tens."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=0.0)


def check_gradients(model: Decoder, expected: Expected) -> None:
    found = gradients_of(model)
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        close(found[name], gradient)


def test_scores_and_every_gradient(expected: Expected, model: Decoder):
    """Also beyond the context, which is 8."""
    losses = []
    for text, ids in TEXTS.items():
        scores = model.logits(model(torch.tensor([ids])))[0]
        close(scores, expected.scores[text])
        losses.append(loss_of(scores, ids))
    sum(losses).backward()
    check_gradients(model, expected)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_texts_in_one_batch(layout: str, expected: Expected, model: Decoder):
    long, short = TEXTS["long"], TEXTS["short"]
    if layout == "packed":
        ids, positions = [long + short], [[*range(len(long)), *range(len(short))]]
        documents = torch.tensor([[0] * len(long) + [1] * len(short)])
        places = {"long": (0, slice(0, len(long))), "short": (0, slice(len(long), None))}
    else:
        padding = [0] * (len(long) - len(short))
        ids, positions = [long, short + padding], [[*range(len(long))], [*range(len(short)), *padding]]
        documents = torch.tensor([[0] * len(long), [1] * len(short) + [-1] * len(padding)])
        places = {"long": (0, slice(None)), "short": (1, slice(0, len(short)))}
    scores = model.logits(model(torch.tensor(ids), torch.tensor(positions), documents))
    for text, place in places.items():
        close(scores[place], expected.scores[text])
    sum(loss_of(scores[place], TEXTS[text]) for text, place in places.items()).backward()
    check_gradients(model, expected)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [2, 10]])
def test_with_a_cache(pieces: list[int], expected: Expected, model: Decoder):
    text = "long"
    if model.config.rope_scaling == "dynamic":
        # Beyond the context, keys of earlier tokens were turned with another base.
        text, pieces = "short", [min(pieces[0], 7 - 2), 1, 1]
    ids = torch.tensor([TEXTS[text][: sum(pieces)]])
    cache = KVCache(model.config, 1, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        parts = [model.logits(model(piece, cache=cache))[0] for piece in ids.split(pieces, dim=1)]
    close(torch.cat(parts), expected.scores[text][: sum(pieces)])


def test_rows_of_a_cache_need_not_be_equally_long(expected: Expected, model: Decoder):
    """Beginnings of both texts, of which one is padded; then two more tokens of each, one by one."""
    starts, texts = {"long": 5, "short": 3}, list(TEXTS.values())
    prompts = torch.tensor([texts[0][:5], texts[1][:3] + [0, 0]])
    cache = KVCache(model.config, 2, 16, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        first = model.logits(model(prompts, cache=cache))
        cache.lengths = list(starts.values())
        more = [torch.tensor([[ids[start + step]] for ids, start in zip(texts, starts.values())]) for step in (0, 1)]
        rest = torch.cat([model.logits(model(ids, cache=cache)) for ids in more], dim=1)
    for row, (text, start) in enumerate(starts.items()):
        if model.config.rope_scaling == "dynamic" and text == "long":
            continue  # These are the scores of a text beyond the context, whose beginning is turned otherwise.
        close(first[row, :start], expected.scores[text][:start])
        close(rest[row], expected.scores[text][start : start + 2])


def export(model: Decoder, directory: Path) -> Path:
    directory.mkdir()
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))
    return directory


def test_what_we_write_is_what_was_read(expected: Expected, model: Decoder, tmp_path: Path):
    first = export(model, tmp_path / "first")
    written = load_file(first / "model.safetensors")
    assert written.keys() == expected.tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.tensors.items())
    config = json.loads((first / "config.json").read_text())
    assert "auto_map" not in config and config["model_type"] == expected.config["model_type"]
    second = export(loaded(first), tmp_path / "second")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    # Each key that we write means what the published one does.
    for key in config.keys() & expected.config.keys() - {"torch_dtype", "eos_token_id"}:
        published, ours = expected.config[key], config[key]
        if isinstance(published, dict):
            ours = {name: value for name, value in ours.items() if name in published}
        assert ours == published, key

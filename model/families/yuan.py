"""yuan: Yuan 2.0 (Wu et al., 2023). Queries and keys are computed from a filter over each token and the two before it;
see model/local_filter.py.

Two things are not as their names say. The feed-forward layer is down(silu(up x) * gate x). And the rows of q_proj and
k_proj, one below the other, belong to the queries of the first head, its keys, the queries of the second head, and so
on: with two heads, q_proj holds all of the first, k_proj all of the second one.

transformers has no such class. It needs the Python files of a published Yuan 2.0 beside ours, and their auto_map in
config.json.
"""

from collections.abc import Sequence
from typing import Any

import torch

from model.config import ModelConfig
from model.families.family import Family, Rule, Tensors
from model.families.keys import HARMLESS, HARMLESS_AT
from model.families.plain import SILU, SIZES, even_heads, interleaved_rows, read_sizes, size_keys
from model.families.values import read_value
from model.hf_files import shown

_THETA, _EPS = 10000.0, 1e-6
"""Constants of the published code. The second one is that of the filter's norm, whatever rms_norm_eps says."""
_RENAMED = (
    (r"\.local_filter\.norm\.", ".lf_gate.output_layernorm."), (r"\.local_filter\.", ".lf_gate."),
    (r"\.gate_proj\.", ".their_up_proj."), (r"\.up_proj\.", ".gate_proj."), (r"\.their_up_proj\.", ".up_proj."),
)  # fmt: skip


class YuanFamily(Family):
    model_type = "yuan"
    architectures = ("YuanForCausalLM",)
    brings_code = True
    renamed = _RENAMED
    fixed = {"local_filter": True}
    usual = {"tie_word_embeddings": True, "rms_norm_eps": _EPS}
    understood = frozenset(SIZES) | {"max_position_embeddings", "model_max_length", "num_key_value_heads"}
    # Of the data and the loss: how rows of several texts are masked, which here follows from the data, and which tokens
    # count. The published code ignores dropout.
    harmless = HARMLESS | {
        "reset_attention_mask", "reset_position_ids", "eod_token", "eod_token_id", "sep_token", "use_loss_mask",
        "use_flash_attention", "dropout",
    }  # fmt: skip
    harmless_at = HARMLESS_AT | SILU | {
        "causal_mask": (True,), "use_shareqk": (False,), "use_moe": (False,), "rope_theta": (_THETA,)
    }  # fmt: skip

    def fields(self, values: dict) -> dict[str, Any]:
        fields = read_sizes(values, tie_word_embeddings=(bool, True))
        if fields["rms_norm_eps"] != _EPS:
            raise ValueError(f"rms_norm_eps = {shown(fields['rms_norm_eps'])} is not supported: only {_EPS} is")
        heads = read_value(values, "num_key_value_heads", int, fields["num_attention_heads"])
        if heads != fields["num_attention_heads"]:
            raise ValueError(f"num_key_value_heads = {heads} is not supported: only num_attention_heads is")
        context = read_value(values, "model_max_length", int, 8192)
        return fields | {
            "max_position_embeddings": read_value(values, "max_position_embeddings", int, context)
        }

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return size_keys(config) | {
            "hidden_act": "silu", "max_position_embeddings": config.max_position_embeddings,
            "model_max_length": config.max_position_embeddings, "causal_mask": True, "use_shareqk": False,
            "use_flash_attention": False,
            # The published code asks for these. Each row is one text to it, as rows are here unless the data says more.
            "reset_attention_mask": False, "reset_position_ids": False, "use_loss_mask": False, "eod_token": -1,
            "sep_token": -1,
        }  # fmt: skip

    def mismatches(self, config: ModelConfig) -> list[str]:
        found = super().mismatches(config) + even_heads(config)
        for name, value in (("rope_theta", _THETA), ("rms_norm_eps", _EPS)):
            if getattr(config, name) != value:
                found.append(f"{name} is {value:g} in every yuan, not {getattr(config, name):g}")
        if config.hidden_size % 2:
            found.append(f"hidden_size is even in every yuan, not {config.hidden_size}")
        return found

    def fused_rules(self, config: ModelConfig, names: Sequence[str]) -> list[Rule]:
        rules = []
        for layer in (f"layers.{number}.self_attn" for number in range(config.num_hidden_layers)):
            rules.append(_query_key_rule(self.prefix, f"{layer}.q_proj.weight", f"{layer}.k_proj.weight",
                                         config.num_attention_heads))  # fmt: skip
        return rules


def _query_key_rule(prefix: str, query: str, key: str, heads: int) -> Rule:
    """Rule for the rows of q_proj and k_proj, which are those of both, head by head."""
    one = interleaved_rows("", (query, key), heads)

    def join(tensors: Tensors) -> Tensors:
        return one.join(tensors)[0].chunk(2)

    def split(tensors: Tensors) -> Tensors:
        return one.split([torch.cat(list(tensors))])

    return Rule((f"{prefix}{query}", f"{prefix}{key}"), (query, key), join, split)


YUAN = YuanFamily()

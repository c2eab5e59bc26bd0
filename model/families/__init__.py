"""The families of models that can be loaded and saved, by Hugging Face's `model_type`."""

from dataclasses import replace
from typing import Any

from model.config import ModelConfig
from model.families.aquila import AQUILA
from model.families.baichuan import BAICHUAN
from model.families.bloom import BLOOM
from model.families.chatglm import CHATGLM
from model.families.ernie4_5_moe import ERNIE4_5_MOE
from model.families.family import Family
from model.families.internlm import INTERNLM
from model.families.llama import LLAMA
from model.families.mistral import MISTRAL
from model.families.mixtral import MIXTRAL
from model.families.qwen2 import QWEN2
from model.families.qwen3 import QWEN3
from model.families.qwen3_moe import QWEN3_MOE
from model.families.yuan import YUAN
from model.hf_files import shown

FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    QWEN2, LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, ERNIE4_5_MOE, BLOOM, BAICHUAN, CHATGLM, INTERNLM, AQUILA, YUAN,
)}  # fmt: skip
"""In the order in which a model without a family of its own looks for one."""

_DEFAULT = ModelConfig()


def family_named(model_type: object) -> Family:
    """The family of a configuration's `model_type`.

    Raises:
        ValueError: it cannot be loaded here.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        *first, last = FAMILIES
        raise ValueError(f"model_type {shown(model_type)} cannot be loaded: only {', '.join(first)} and {last} can")
    return FAMILIES[model_type]


def family_of(config: ModelConfig, generic_tokenizer: bool = False) -> Family:
    """The family as which a model is saved: its own, or else the first that can hold it.

    Args:
        generic_tokenizer: whether other programs do not associate the model's tokenizer with a family.
    Raises:
        ValueError: no family can hold such a model.
    """
    own = [family_named(config.model_type)] if config.model_type else []
    holding = [family for family in own or FAMILIES.values() if not family.mismatches(config)]
    if not holding:
        raise ValueError(_told_mismatch(config, own))
    if generic_tokenizer and holding[0].names_tokenizer:
        others = (family for family in FAMILIES.values() if not family.names_tokenizer)
        return next((family for family in others if not family.mismatches(config)), holding[0])
    return holding[0]


def _told_mismatch(config: ModelConfig, own: list[Family]) -> str:
    """Sentence that refuses a model which no family can hold, by the families that come nearest.

    Args:
        own: the only family that it may have, if it names one.
    """
    if own:
        why = own[0].told_mismatch(config)
        return f"no checkpoint can hold the model as a {own[0].model_type}: {why}; change that, or the model_type"
    counts = {family: len(family.mismatches(config)) for family in FAMILIES.values()}
    nearest = [family.told_mismatch(config) for family, count in counts.items() if count == min(counts.values())]
    # Families that differ in the same field need not all be named.
    reasons = {reason.partition(" ")[0]: reason for reason in reversed(nearest)}
    told = f"no checkpoint can hold this model, since no family of models has all of it: {'; '.join(reasons.values())}"
    able = [name for name, family in FAMILIES.items() if _holds_once_named(family, config)]
    return f"{told}; to begin such a model, give --model_type={able[0]}" if able else told


def _holds_once_named(family: Family, config: ModelConfig) -> bool:
    """Whether a model only lacks what `--model_type` adds: values of the family where nobody has chosen others."""
    fixed: dict[str, Any] = dict(family.fixed)
    own = {name: value for name, value in fixed.items() if getattr(config, name) == getattr(_DEFAULT, name)}
    return not family.mismatches(replace(config, **own))

"""The families of models that can be loaded and saved, by Hugging Face's `model_type`."""

from model.config import ModelConfig
from model.families.ernie4_5_moe import ERNIE4_5_MOE
from model.families.family import Family
from model.families.llama import LLAMA
from model.families.mistral import MISTRAL
from model.families.mixtral import MIXTRAL
from model.families.qwen2 import QWEN2
from model.families.qwen3 import QWEN3
from model.families.qwen3_moe import QWEN3_MOE
from model.hf_files import shown

FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    QWEN2, LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE, ERNIE4_5_MOE,
)}  # fmt: skip
"""In the order in which a model without a family of its own looks for one."""


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
        nearest = min(own or FAMILIES.values(), key=lambda family: len(family.mismatches(config)))
        raise ValueError(
            f"the model cannot be a {nearest.model_type}, as which it would be saved: {nearest.mismatches(config)[0]}"
            if own else
            f"no family of models can hold this one; {nearest.model_type} comes nearest, but "
            f"{nearest.mismatches(config)[0]}"
        )  # fmt: skip
    if generic_tokenizer and holding[0].names_tokenizer:
        others = (family for family in FAMILIES.values() if not family.names_tokenizer)
        return next((family for family in others if not family.mismatches(config)), holding[0])
    return holding[0]

"""The families of models that can be loaded and saved, by Hugging Face's `model_type`."""

from model.config import ModelConfig
from model.families.family import Family
from model.families.llama import LLAMA
from model.families.qwen2 import QWEN2
from model.hf_files import shown

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN2)}


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
    """The family as which a model is saved.

    Args:
        generic_tokenizer: whether other programs do not associate the model's tokenizer with a family.
    """
    # A llama takes whatever no other family claims.
    others = (family for family in FAMILIES.values() if family is not LLAMA)
    return next((family for family in others if family.writes(config, generic_tokenizer)), LLAMA)

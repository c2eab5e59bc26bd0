"""The base of families. A family says how Hugging Face writes down the models of one `model_type`, in terms of ours:
the meaning of its configuration, the names of its tensors and how they are fused, and the role of each parameter.

A family is data and short functions. It builds no layer, and reads no file: model/hf.py does.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.families.keys import HARMLESS, HARMLESS_AT, check_architectures, check_keys
from model.roles import Role, role_of

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""Our names."""

CHOICES = (
    "norm", "embedding_norm", "mlp", "mlp_bias", "normalized_head", "attention_bias", "qkv_bias", "qk_norm",
    "local_filter", "sliding_window", "full_attention_layers", "position_embedding", "rope_interleaved",
    "partial_rotary_factor", "rope_scaling", "num_local_experts", "num_shared_experts", "dense_layers", "router_bias",
    "norm_topk_prob",
)  # fmt: skip
"""Fields in which families differ. A family's models have the default of a field that it does not mention."""
_DEFAULTS: dict[str, object] = {field.name: field.default for field in fields(ModelConfig)}

Tensors = Sequence[Tensor]


def _shown(value: object) -> object:
    return "empty" if value == "" else value


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Tensors of a folder and the parameters that they hold: usually one and one, several if either side is fused."""

    theirs: tuple[str, ...]
    """Names in the folder."""
    ours: tuple[str, ...]
    """Names of parameters."""
    join: Callable[[Tensors], Tensors] = _as_they_are
    """Parameters -> tensors of the folder. It must also work on tensors without memory, to find the shapes."""
    split: Callable[[Tensors], Tensors] = _as_they_are
    """Tensors of the folder -> parameters; the inverse."""
    theirs_a_row: int = 0
    """If above 0, so many tensors of the folder are one row of the only parameter: the first ones its first row."""

    @property
    def is_plain(self) -> bool:
        """Whether a parameter is a tensor of the folder as it is."""
        return self.split is _as_they_are and len(self.ours) == 1


def fused_rows(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Rule for a tensor that holds several matrices below one another, such as the projections of Q, K and V.

    Args:
        sizes: number of rows of each matrix.
    """
    return Rule((theirs,), tuple(ours), lambda tensors: [torch.cat(list(tensors))], partial(_rows, list(sizes)))


def _rows(sizes: list[int], tensors: Tensors) -> Tensors:
    return tensors[0].split(sizes)


@dataclass(frozen=True)
class Beside:
    """A tensor that a folder may hold although the model has no parameter for it. Its values must follow from those of
    another parameter."""

    theirs: str
    """Its name in the folder."""
    like: str
    """The parameter from which its values follow."""
    expected: Callable[[Tensor], Tensor]
    """That parameter -> the values that the tensor must have."""
    otherwise: str
    """End of the sentence that refuses other values: "that is not ..., while config.json has ...: do this"."""
    is_written: bool = False
    """Whether our folders hold it."""


class Family:
    """The base of all families; each overrides what differs."""

    model_type: str
    """Hugging Face's name of the family."""
    architectures: tuple[str, ...]
    """Classes of transformers that a folder of this family may name; our folders name the first."""
    fixed: Mapping[str, object] = {}
    """Choice -> the value that all models of the family have."""
    free: Set[str] = frozenset()
    """Choices of which a folder of this family can hold any value."""
    usual: Mapping[str, object] = {}
    """Field -> value in a new model whose user does not say another."""
    names_tokenizer = False
    """Whether other programs replace the tokenizer of such a folder by the family's own."""
    renamed: Sequence[tuple[str, str]] = ()
    """(Pattern in our name of a parameter, what stands there in theirs), one after the other."""
    prefix = "model."
    """Prefix of all tensors but the head's. A folder of the part below the head leaves it out."""
    passed_over: re.Pattern[str] = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
    """Tensors that follow from the configuration. transformers kept these beside the weights until 2023."""
    understood: frozenset[str] = frozenset()
    """Keys of a configuration that `check` and `fields` read."""
    harmless: frozenset[str] = HARMLESS
    """Keys that cannot change the model's scores, whatever their value."""
    harmless_at: dict[str, tuple[object, ...]] = HARMLESS_AT
    """Key -> values, besides null, that cannot change the scores either."""
    brings_code = False
    """Whether folders of the family come with Python code for their model, which ours replaces."""

    def read(self, values: dict) -> ModelConfig:
        """The configuration that the content of a config.json describes.

        Raises:
            ValueError: a key may change the model, or a value is missing or wrong; the key is named.
        """
        check_architectures(values, self.architectures)
        check_keys(values, self.understood | self.harmless, self.harmless_at, self.brings_code)
        self.check(values)
        return ModelConfig(**{**self.fixed, **self.fields(values), "model_type": self.model_type}).resolve()

    def check(self, values: dict) -> None:
        """See that keys which depend on each other describe a model that can be built here.

        Raises:
            ValueError: they do not; the key is named.
        """

    def fields(self, values: dict) -> dict[str, Any]:
        """The fields of our configuration, from a folder's keys; `fixed` ones may be left out.

        Raises:
            ValueError: a value is missing or is of the wrong kind.
        """
        raise NotImplementedError

    def keys(self, config: ModelConfig) -> dict[str, object]:
        """The family's keys, from our configuration. model/hf.py adds tokens and dtype."""
        raise NotImplementedError

    def mismatches(self, config: ModelConfig) -> list[str]:
        """Reasons why a folder of this family cannot hold a model, each the end of a sentence, such as "qk_norm is True
        in every qwen3, not False"; none if it can."""
        found = []
        for name in CHOICES:
            value, has = getattr(config, name), self.fixed.get(name, _DEFAULTS[name])
            is_open = name in self.free or (name == "norm_topk_prob" and not config.num_local_experts)
            # There it is a number of the method.
            is_open = is_open or (name == "partial_rotary_factor" and config.rope_scaling == "proportional")
            if not is_open and value != has:
                found.append(f"{name} is {_shown(has)} in every {self.model_type}, not {_shown(value)}")
        return found

    def new(self, wanted: ModelConfig, given: Set[str]) -> ModelConfig:
        """Configuration of a new model of the family.

        Args:
            given: names of the fields that somebody has chosen.
        Raises:
            ValueError: one of them contradicts the family.
        """
        own: dict[str, Any] = {name: value for name, value in {**self.usual, **self.fixed}.items() if name not in given}
        config = replace(wanted, **own | {"model_type": self.model_type})
        if self.mismatches(config):
            raise ValueError(
                f"--model_type={self.model_type} cannot be such a model: {self.told_mismatch(config)}; change that, or "
                "the model_type"
            )
        return config

    def told_mismatch(self, config: ModelConfig) -> str:
        """The first of a model's mismatches, and the number of others."""
        first, *others = self.mismatches(config)
        return f"{first}, and {len(others)} more" if others else first

    def their_name(self, name: str) -> str:
        """Name in a folder of a parameter that is not fused."""
        for ours, theirs in self.renamed:
            name = re.sub(ours, theirs, name)
        return name if name == HEAD else f"{self.prefix}{name}"

    def rules(self, config: ModelConfig, names: Iterable[str]) -> list[Rule]:
        """Rules that together hold each parameter once.

        Args:
            names: names of all the model's parameters.
        """
        names = list(names)
        fused = self.fused_rules(config, names)
        held = {name for rule in fused for name in rule.ours}
        return fused + [Rule((self.their_name(name),), (name,)) for name in names if name not in held]

    def fused_rules(self, config: ModelConfig, names: Sequence[str]) -> list[Rule]:
        """Rules of tensors that are fused in a folder; every other parameter is a tensor there.

        Args:
            names: names of all the model's parameters.
        """
        return []

    def other_rules(self, config: ModelConfig, names: Iterable[str]) -> list[list[Rule]]:
        """Rules of folders that have other names for the same tensors; we read these folders, and write none."""
        return []

    def besides(self, config: ModelConfig) -> list[Beside]:
        """Tensors that a folder may hold besides those of the rules."""
        if not config.tie_word_embeddings:
            return []
        otherwise = (
            "that is not the embedding, while config.json has tie_word_embeddings: set that to false, or take the "
            "weight out"
        )
        return [Beside(self.their_name(HEAD), EMBEDDING, lambda embedding: embedding, otherwise)]

    def role_of(self, name: str) -> Role:
        """Role of a parameter."""
        return role_of(name)

"""A family: how models of one `model_type` of Hugging Face are written down, in terms of ours.

It says what its configuration means, what its tensors are called and how they are fused, and which role each parameter
has. It is data and short functions: it builds no layer and reads no file (model/hf.py does).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.config import LlamaConfig
from model.families.keys import HARMLESS, HARMLESS_AT, check_architectures, check_keys
from model.roles import Role, role_of

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
"""Our names."""

Tensors = Sequence[Tensor]


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Tensors of a folder and the parameters that they hold: mostly one and one; several, where either side fuses."""

    theirs: tuple[str, ...]
    """Names in the folder."""
    ours: tuple[str, ...]
    """Names of parameters."""
    join: Callable[[Tensors], Tensors] = _as_they_are
    """Parameters -> tensors of the folder. Works on tensors without memory, too, which tell the shapes."""
    split: Callable[[Tensors], Tensors] = _as_they_are
    """Tensors of the folder -> parameters; the inverse."""


def fused_rows(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """A tensor that holds several of ours below one another, such as the projections of queries, keys and values.

    Args:
        sizes: rows of each.
    """
    return Rule((theirs,), tuple(ours), lambda tensors: [torch.cat(list(tensors))], partial(_rows, list(sizes)))


def _rows(sizes: list[int], tensors: Tensors) -> Tensors:
    return tensors[0].split(sizes)


@dataclass(frozen=True)
class Beside:
    """A tensor that a folder may hold without a parameter of ours for it: it must say nothing new."""

    theirs: str
    """Its name in the folder."""
    like: str
    """The parameter that has its shape."""
    expected: Callable[[Tensor], Tensor]
    """That parameter -> what the tensor must equal."""
    otherwise: str
    """What is said of another value: "that is not ..., while config.json has ...: do this"."""
    is_written: bool = False
    """Whether our folders hold it."""


class Family:
    """The base of all families; a family overrides what it does otherwise."""

    model_type: str
    """Hugging Face's word for it."""
    architectures: tuple[str, ...]
    """Classes of transformers under whose name a folder is this family's; ours are written with the first."""
    prefix = "model."
    """Where transformers keeps all but the head. Folders of the part below the head leave it out."""
    passed_over: re.Pattern[str] = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
    """Tensors that follow from the configuration: transformers kept these beside the weights until 2023."""
    understood: frozenset[str] = frozenset()
    """Keys of a configuration that `check` and `fields` see to."""
    harmless: frozenset[str] = HARMLESS
    """Keys that cannot change the model's scores, whatever their value."""
    harmless_at: dict[str, tuple[object, ...]] = HARMLESS_AT
    """Key -> values, besides null, with which it is this model."""

    def read(self, values: dict) -> LlamaConfig:
        """The configuration that the content of a config.json describes.

        Raises:
            ValueError: a key may make it another model, or a value is missing or wrong; the key is named.
        """
        check_architectures(values, self.architectures)
        check_keys(values, self.understood | self.harmless, self.harmless_at)
        self.check(values)
        return LlamaConfig(**self.fields(values)).resolve()

    def check(self, values: dict) -> None:
        """See that keys which depend on each other describe a model that can be built here.

        Raises:
            ValueError: they do not; the key is named.
        """

    def fields(self, values: dict) -> dict[str, Any]:
        """A configuration's keys as fields of ours.

        Raises:
            ValueError: a value is missing or is of the wrong kind.
        """
        raise NotImplementedError

    def keys(self, config: LlamaConfig) -> dict[str, object]:
        """A configuration of ours in the family's keys. Tokens and dtype are added in hf.py."""
        raise NotImplementedError

    def writes(self, config: LlamaConfig, generic_tokenizer: bool) -> bool:
        """Whether models of a configuration are saved as this family.

        Args:
            generic_tokenizer: the model's tokenizer is none that other programs know by a family.
        """
        return False

    def their_name(self, name: str) -> str:
        """The folder's name of a parameter that is not fused."""
        return name if name == HEAD else f"{self.prefix}{name}"

    def rules(self, config: LlamaConfig, names: Iterable[str]) -> list[Rule]:
        """How each parameter is written down.

        Args:
            names: of all the model's parameters.
        """
        return [Rule((self.their_name(name),), (name,)) for name in names]

    def besides(self, config: LlamaConfig) -> list[Beside]:
        """Tensors that a folder may hold besides those of the rules."""
        if not config.tie_word_embeddings:
            return []
        otherwise = (
            "that is not the embedding, while config.json has tie_word_embeddings: set that to false, or take the "
            "weight out"
        )
        return [Beside(self.their_name(HEAD), EMBEDDING, lambda embedding: embedding, otherwise)]

    def role_of(self, name: str) -> Role:
        """What a parameter is for."""
        return role_of(name)

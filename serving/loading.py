"""Loading what generates text: a model with its tokenizer, and adapters for it.

    served = load([CKPT], {"sql": DIR, "poems": DIR}, device, dtype)
    served.use("sql")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.choosing import resolve_checkpoint_dir
from model import Decoder, hf
from model.adapters import folder
from model.adapters.switch import Adapters
from model.generation_config import read_generation_config
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.loading import has_tokenizer
from utils.paths import expand

NONE = "none"
"""The name by which users mean the model without an adapter."""


class Speech(NamedTuple):
    """How texts become a model's tokens, and which of these end a text."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """The end of a document, and the tokens that the folder's configuration names."""


class Served:
    """A model that is ready to generate, and adapters of which it uses one or none.

    Args:
        model: on its device, in its dtype.
        speech: the model's without an adapter.
    """

    def __init__(self, model: Decoder, speech: Speech):
        self.model = model.eval()
        self._adapters = Adapters(model)
        self._speeches: dict[str | None, Speech] = {None: speech}

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; None: none."""
        return self._adapters.active

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return self._adapters.names

    @property
    def tokenizer(self) -> Tokenizer:
        return self._speeches[self.active].tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._speeches[self.active].stop_ids

    def add(self, name: str, directory: Path) -> None:
        """Load an adapter, without using it.

        Raises:
            ValueError: the name is taken, or the folder holds no adapter of this model.
        """
        if name == NONE:
            raise ValueError(f"no adapter can be called {NONE}, which means the model without one: give NAME=DIR")
        self._adapters.add(name, directory)
        ...

    def use(self, name: str | None) -> None:
        """Make an adapter the active one; None: none.

        Raises:
            ValueError: there is no adapter of this name.
        """
        self._adapters.use(None if name == NONE else name)

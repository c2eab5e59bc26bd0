"""Several adapters of one model, of which one is active, or none.

An adapter takes the place of modules of the model: of the layers that it adapts, and of modules that it has trained
whole. To use another one exchanges these modules. No weight is copied or computed, and without an adapter the model
computes the same bits as before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn

from model.adapters.lora import LoraLinear
from model.adapters.outline import AROUND, brought, read_adapter
from model.adapters.tokens import WITH_ROWS, grow_modules
from model.decoder import Decoder


class Adapters:
    """Adapters of a model, by name.

    Args:
        model: without an adapter. Its weights are frozen from now on.
    """

    def __init__(self, model: Decoder):
        self._model = model.requires_grad_(False)
        self._config = model.config
        self._modules: dict[str, dict[str, nn.Module]] = {}
        """Name of an adapter -> path -> module that is there while it is active."""
        self._plain: dict[str, nn.Module] = {}
        """Path -> the model's own module, for all of these paths."""
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        return list(self._modules)

    def modules(self) -> Iterator[nn.Module]:
        """Modules that an adapter puts into the model, and those whose place they take, in use or not."""
        yield from self._plain.values()
        for modules in self._modules.values():
            yield from modules.values()

    def add(self, name: str, directory: Path) -> None:
        """Load an adapter, without using it.

        Args:
            directory: its folder.
        Raises:
            ValueError: the name is taken, or the folder holds no adapter of such a model.
            OSError: a disk or a network fails, and may be back later.
        """
        if name in self._modules:
            raise ValueError(f"two adapters are called {name}: give one another name, as in --adapter OTHER=DIR")
        weight = self._model.embed_tokens.weight
        outline = read_adapter(directory, self._config, weight.device, weight.dtype)
        modules = brought(outline)
        if any(isinstance(module, WITH_ROWS) for module in modules.values()):
            self._make_room(outline.config.vocab_size)
        for path, module in modules.items():
            plain = self._plain.setdefault(path, self._model.get_submodule(path))
            if isinstance(module, AROUND):
                module.base_layer = cast(Any, plain)
            if isinstance(module, WITH_ROWS):
                module.token_adapter.to(weight.device)
            module.requires_grad_(False).train(self._model.training)
            if isinstance(module, LoraLinear):
                module.freeze()
        self._modules[name] = modules

    def _make_room(self, vocab_size: int) -> None:
        """Give the model's own embedding and head rows for tokens that an adapter adds. Their values do not matter: a
        tokenizer without these tokens never asks for them."""
        embedding, head = (self._plain.get(n, self._model.get_submodule(n)) for n in ("embed_tokens", "lm_head"))
        rows = len(cast(nn.Embedding, embedding).weight)
        if rows < vocab_size:
            grow_modules(embedding, head, rows, vocab_size - rows)

    def use(self, name: str | None) -> None:
        """Make an adapter the active one; None: none.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if name is not None and name not in self._modules:
            known = ", ".join(self._modules) or "no adapter"
            raise ValueError(f"there is no adapter {name}: loaded are {known}")
        modules = self._modules[name] if name is not None else {}
        for path, plain in self._plain.items():
            parent, _, child = path.rpartition(".")
            setattr(self._model.get_submodule(parent), child, modules.get(path, plain))
        self.active = name

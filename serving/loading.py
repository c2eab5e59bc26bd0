"""Loading what generates text: a model with its tokenizer, and adapters for it.

    served = load(ckpt, {"sql": folder, "poems": other_folder}, device, dtype)
    served.use("poems")
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from checkpoint.choosing import resolve_checkpoint_dir
from model import Decoder, hf
from model.adapters import folder
from model.adapters.switch import Adapters
from model.config import ModelConfig
from model.divided import Cutter, outline_of_part
from model.generation_config import read_adapters_generation_config
from model.kernels.few_calls import compute_in_few_calls
from model.ops import build_ops, choose_ops, needs_of
from model.packed import pack
from serving.arguments import name_of, require_new
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.loading import has_tokenizer

logger = logging.getLogger(__name__)


class Speech(NamedTuple):
    """How texts become a model's tokens, and which of these end a text."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """The end of a document, and the tokens that the folder's configuration names."""
    settings: Mapping[str, object]
    """What the folder's generation_config.json recommends: temperature, top_p ..."""


class Served:
    """A model that is ready to generate, and adapters of which it uses one or none.

    Args:
        model: on its device, in its dtype.
        speech: the model's without an adapter, or that of an adapter which stays in it for good.
        may_pack: whether its matrices may be brought into another form; not if it is trained on.
    """

    def __init__(self, model: Decoder, speech: Speech, may_pack: bool = True):
        self.model = model.eval()
        self._may_pack = may_pack
        self._adapters = Adapters(model)
        self._speeches: dict[str | None, Speech] = {None: speech}
        self._packing = threading.Lock()

    @property
    def active(self) -> str | None:
        """Name of the adapter in use; None: none, or the one that stays."""
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

    def speech_of(self, name: str | None) -> Speech:
        """How an adapter speaks, in use or not; None: the model without one, or with the one that stays.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if name not in self._speeches:
            raise ValueError(f"there is no adapter {name}: loaded are {', '.join(self.names) or 'none'}")
        return self._speeches[name]

    def add(self, name: str, directory: Path, speech: Speech) -> None:
        """Load an adapter, without using it.

        Args:
            directory: its folder.
        Raises:
            ValueError: the name is taken, or the folder holds no adapter of such a model.
        """
        self._adapters.add(name, directory)
        self._speeches[name] = speech

    def use(self, name: str | None) -> None:
        """Make an adapter the active one; None: none.

        Raises:
            ValueError: there is no adapter of this name.
        """
        self._adapters.use(name)

    def pack(self) -> None:
        """Bring matrices into the form that is multiplied fastest, once all adapters are there, see model/packed.py;
        compute what is between them in few calls, see model/kernels/few_calls.py.

        The model cannot be saved or given other weights after it. Several threads may call this.
        """
        with self._packing:
            if self._may_pack:
                pack(self.model, self._adapters.modules())
                compute_in_few_calls(self.modules())

    def modules(self) -> Iterator[nn.Module]:
        """All modules of the model and of its adapters, in use or not."""
        for root in (self.model, *self._adapters.modules()):
            yield from root.modules()


def load(
    ckpt: Path, adapters: Mapping[str, Path], device: torch.device, dtype: torch.dtype, in_4bit: bool = False,
    new_cutter: Callable[[ModelConfig], Cutter] | None = None, resolve: Callable[[Path], Path] = resolve_checkpoint_dir,
) -> Served:  # fmt: skip
    """A model with its adapters, of which the first is active.

    Args:
        ckpt: a run (its last checkpoint is meant), a checkpoint or a folder: of a model, or of an adapter, which names
            its base and comes first.
        adapters: name -> run, checkpoint or folder of adapters for the model.
        in_4bit: keep the blocks' matrices in 4 bits.
        new_cutter: of a model of this shape, of which several processes hold parts; it has one adapter at most, for
            good. Collective.
        resolve: finds the folder with the weights that a path means.
    Raises:
        ValueError: one of them cannot be used, or they do not belong together.
        OSError: a disk or a network fails, and may be back later.
    """
    base, own = folder.weights_of(resolve(ckpt))
    found = {} if own is None else {name_of(ckpt): own}
    for name, path in adapters.items():
        require_new(name, found)
        found[name] = folder.weights_of(base, resolve(path)).adapter
    # All that can be wrong is looked at before the weights are read, which takes longest.
    config = hf.read_config(base)
    hf.check_weights(config, base)
    speech = _speech_of(base, base)
    _require_room(base, speech.tokenizer, config.vocab_size)
    speeches = {name: _speech_of(adapter, base) for name, adapter in found.items()}
    fingerprint = folder.fingerprint(base) if found else ""
    for name, adapter in found.items():
        folder.require_base(folder.Weights(base, adapter), fingerprint)
        folder.check(config, adapter)
        if sentence := folder.told_precision(adapter, in_4bit):
            logger.warning(sentence)
        _require_room(adapter, speeches[name].tokenizer, folder.grown(config, adapter).vocab_size)
    if new_cutter is not None:
        return _load_part(new_cutter, config, base, found, speech, speeches, device, dtype)
    model = (hf.outline_in_4bit if in_4bit else hf.outline_in)(config, device, dtype, *_options(config, device, dtype))
    hf.load_weights(model, base)
    served = Served(model, speech)
    for name, adapter in found.items():
        served.add(name, adapter, speeches[name])
    served.use(next(iter(found), None))
    return served


def _load_part(
    new_cutter: Callable[[ModelConfig], Cutter], config: ModelConfig, base: Path, adapters: Mapping[str, Path],
    speech: Speech, speeches: Mapping[str, Speech], device: torch.device, dtype: torch.dtype,
) -> Served:  # fmt: skip
    """This process' part of a model with at most one adapter; see `load`."""
    if len(adapters) > 1:
        raise ValueError(
            f"a model that several processes share has one adapter at most, and {len(adapters)} are given: leave out "
            f"the others"
        )
    spec, cutter = None, new_cutter(config)
    for name, adapter in adapters.items():
        spec, speech = folder.check(config, adapter), speeches[name]
        if folder.grown(config, adapter).vocab_size > config.vocab_size:
            raise ValueError(
                f"the adapter in {adapter} adds tokens, for which a model that several processes share has no rows: "
                f"merge it first (python -m model.adapters.merge)"
            )
    model = outline_of_part(config, _options(config, device, dtype), device, dtype, spec, cutter)

    def fill() -> None:
        hf.load_weights(model, base)
        if spec is not None:
            for adapter in adapters.values():
                folder.load(model, adapter, folder.outlined(config, spec))

    # Each reads its own part, and may be the only one whose files are damaged.
    cutter.together(fill)
    return Served(model, speech)


def _options(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of Decoder beside its shape: nothing is recomputed, and a GPU has the operations that are fastest in
    training. On a CPU these save nothing for a few rows at a time."""
    kernels = "auto" if device.type == "cuda" else "reference"
    return False, "nothing", build_ops(choose_ops(kernels, {}, device, dtype, needs_of(config)))


def _speech_of(directory: Path, base: Path) -> Speech:
    """Tokenizer and ends of a folder.

    Args:
        directory: of a model, or of an adapter, which need not bring a tokenizer.
        base: of the model.
    """
    tokenizer = load_tokenizer(directory if has_tokenizer(directory) else base)
    generation = read_adapters_generation_config(base, directory)
    return Speech(tokenizer, frozenset([tokenizer.eod_id, *generation.eos_ids]), generation.settings)


def _require_room(directory: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """
    Raises:
        ValueError: the tokenizer has more entries than the model.
    """
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} entries, the model an embedding for "
            f"{vocab_size}: it is not the model's"
        )

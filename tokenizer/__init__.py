"""Byte-complete tokenizers, trained here or elsewhere, whose special tokens ordinary text can never produce."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizer.base import Tokenizer
    from tokenizer.hf_bbpe import HFBBPETokenizer
    from tokenizer.loading import load_tokenizer
    from tokenizer.sp_bbpe import SPBBPETokenizer

_ROOM_OF = {
    "HFBBPETokenizer": "hf_bbpe",
    "SPBBPETokenizer": "sp_bbpe",
    "Tokenizer": "base",
    "load_tokenizer": "loading",
}
__all__ = ["HFBBPETokenizer", "SPBBPETokenizer", "Tokenizer", "load_tokenizer"]


def __getattr__(name: str) -> object:
    """Name of the package, imported from its file when somebody asks for it, so that a command of this package starts
    without the others."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenizer.{_ROOM_OF[name]}"), name)

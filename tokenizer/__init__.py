"""Byte-complete tokenizers, trained here or elsewhere, whose special tokens ordinary text can never produce."""

from importlib import import_module

_ROOM_OF = {
    "HFBBPETokenizer": "hf_bbpe",
    "SPBBPETokenizer": "sp_bbpe",
    "Tokenizer": "base",
    "load_tokenizer": "loading",
}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> object:
    """From its room, when somebody asks for it: a command of this package begins without any other package."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenizer.{_ROOM_OF[name]}"), name)

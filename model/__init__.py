"""The model. It knows nothing of data files or of other processes."""

from typing import TYPE_CHECKING

from model.config import ModelConfig

if TYPE_CHECKING:
    from model.decoder import Decoder, KVCache

__all__ = ["Decoder", "KVCache", "ModelConfig"]


def __getattr__(name: str) -> object:
    """What needs torch, when somebody asks for it: a configuration is checked without, in a tenth of the time."""
    if name in ("KVCache", "Decoder"):
        from model import decoder

        return getattr(decoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

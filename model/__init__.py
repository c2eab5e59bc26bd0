"""The llama-style model. It knows nothing of data files or of other processes."""

from model.config import LlamaConfig
from model.llama import KVCache, Llama

__all__ = ["KVCache", "Llama", "LlamaConfig"]

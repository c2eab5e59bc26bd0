"""Tokens that a run adds to those that its weights know: --add_tokens."""

from model import ModelConfig, hf
from model.adapters import folder
from model.adapters.config import AdapterConfig
from model.adapters.folder import Weights
from tokenizer import Tokenizer
from tokenizer.add_tokens import read_tokens, require_grown
from training.config import RunConfig


def added_tokens(run: RunConfig, adapter: AdapterConfig, tokenizer: Tokenizer) -> list[str]:
    """The tokens that the run adds, the last entries of its tokenizer.

    Args:
        tokenizer: the data's.
    Raises:
        ValueError: there are no weights that know the others, or the data's tokenizer does not have these.
    """
    if not adapter.add_tokens:
        return []
    if not run.init_from:
        raise ValueError(
            "--add_tokens adds to the tokens that weights know: give these with --init_from, or for a new model a "
            "tokenizer that has all tokens"
        )
    tokens = read_tokens(adapter.add_tokens)
    require_grown(tokenizer, tokens)
    return tokens


def rows_of(weights: Weights | None) -> int:
    """Rows of the vocabulary in weights whose adapter may bring some; 0: no weights.

    Raises:
        ValueError, OSError: a file cannot be read.
    """
    if weights is None:
        return 0
    config = hf.read_config(weights.base)
    return (folder.grown(config, weights.adapter) if weights.adapter is not None else config).vocab_size


def rows_to_add(weights: Weights | None, shape: ModelConfig, vocab_size: int, num_added: int) -> range:
    """Tokens whose rows the weights lack, or have but never trained.

    Args:
        weights: what the run begins with.
        shape: the model's.
        vocab_size: the tokenizer's.
        num_added: its last entries, which the run adds now.
    """
    if num_added:
        return range(vocab_size - num_added, vocab_size)
    if weights is None or weights.adapter is None:
        return range(0)
    # Those of an adapter, which brings their values.
    return range(hf.read_config(weights.base).vocab_size, shape.vocab_size)

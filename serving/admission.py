"""What an engine can serve: its sizes, and how long a request's texts may become."""

from collections.abc import Callable
from dataclasses import dataclass

from serving.requests import Request


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine, and what it may do."""

    max_running: int = 64
    """Texts that are written at the same time; others wait."""
    tokens_a_step: int = 512
    """Tokens that one forward pass computes at most; one for each running text in any case. More makes long prompts
    faster, and others wait longer for their next token."""
    scores_a_step: int = 128
    """Those among them whose scores are kept for a prompt's log-probabilities: each has as many as the vocabulary."""
    block_size: int = 16
    """Tokens of a block of the cache."""
    cache_tokens: int = 0
    """Tokens whose keys and values the cache holds; 0: see `cache_gb`."""
    cache_gb: float = 0.0
    """Memory of the cache in GB, if `cache_tokens` is 0; 0: as much as is useful, and as free memory allows."""
    leaves_room: bool = False
    """Whether so much memory stays free that an engine with another model can take over from this one."""
    prefix_sharing: bool = True
    """Whether texts that begin with the same tokens share these tokens' keys and values, also after they have ended."""
    batch_invariant: bool = False
    """Whether a text's scores have the same bits whoever else is served, and however its prompt is cut."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a size is impossible.
        """
        for name in ("max_running", "tokens_a_step", "scores_a_step", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("cache_tokens", "cache_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def width_of(request: Request) -> int:
    """Number of texts that a request has at the same time."""
    return max(request.n, request.sampling.num_beams)


def limit_of(
    request: Request, vocab_size: int, context: int, options: EngineOptions, num_blocks: int,
    fits: Callable[[int, int, int], bool],
) -> int:  # fmt: skip
    """Tokens that a text of a request may have, prompt included.

    Args:
        vocab_size: the tokenizer's.
        context: positions that the model knows.
        num_blocks: blocks of the cache.
        fits: Scheduler.fits.
    Raises:
        ValueError: it can never be served.
    """
    num_prompt, most, width = len(request.prompt_ids), request.sampling.max_new_tokens, width_of(request)
    if not request.prompt_ids:
        raise ValueError("the prompt is empty")
    if not all(0 <= token_id < vocab_size for token_id in request.prompt_ids):
        raise ValueError(f"the prompt has tokens that the tokenizer does not know: it has 0 to {vocab_size - 1}")
    needed = num_prompt + (1 if most is None else most)
    if needed > context:
        wish = f" and {most} are to follow" if most else ""
        raise ValueError(
            f"the prompt has {num_prompt} tokens{wish}, and the model knows {context} positions "
            f"(max_position_embeddings): shorten it{', or ask for fewer' if most else ''}"
        )
    if width > options.max_running:
        raise ValueError(
            f"the request is for {width} texts at once, and the engine writes {options.max_running} (max_running): ask "
            f"for fewer"
        )
    # Choices can wait for each other, beams cannot.
    together = request.sampling.num_beams
    limit = context if most is None else needed
    while most is None and limit > needed and not fits(num_prompt, limit, together):
        limit = max(needed, limit - options.block_size)
    if not fits(num_prompt, limit, together):
        each = f" in each of {together} beams" if together > 1 else ""
        raise ValueError(
            f"the prompt has {num_prompt} tokens and {limit - num_prompt} are to follow{each}, and the cache holds "
            f"{num_blocks * options.block_size} tokens (cache_tokens): shorten it, ask for fewer, or give the engine a "
            f"larger cache"
        )
    return limit

"""Continue a text with a trained model.

python generate.py --ckpt RUN --prompt "def main("
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import KVCache, Llama, hf
from optimizer import resolve_dtype
from tokenizer import Tokenizer, load_tokenizer
from utils.checkpoint import resolve_checkpoint_dir


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer of a run (its last checkpoint), a checkpoint or a Hugging Face folder, ready to generate."""
    directory = resolve_checkpoint_dir(path)
    model = Llama(hf.read_config(directory))
    hf.load_weights(model, directory)
    return model.to(device=device, dtype=dtype).eval(), load_tokenizer(directory)


def sample_token(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> int:
    """Draw a token id from scores of shape (V,).

    Args:
        temperature: scores are divided by it; 0 takes the highest score.
        top_k: keep only so many of the highest scores; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches it (Holtzman et al., 2020); 1 keeps all.
    """
    logits_V = logits_V.float().cpu()
    if temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))
    probabilities, order = logits_V.softmax(dim=-1).sort(descending=True)
    if top_p < 1.0:
        # The token that crosses the border stays.
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(
    model: Llama,
    prompt_ids: list[int],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield new token ids one by one, until a stop id (not yielded) or max_new_tokens.

    Args:
        vocab_size: the tokenizer's; the model's scores beyond it are padding.
    Raises:
        ValueError: an empty prompt.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    cache = KVCache(model.config, 1, len(prompt_ids) + max_new_tokens, parameter.dtype, parameter.device)
    inputs = torch.tensor([prompt_ids], device=parameter.device)
    for _ in range(max_new_tokens):
        logits_V = model.logits(model(inputs, cache=cache)[0, -1])[:vocab_size]
        token_id = sample_token(logits_V, temperature, top_k, top_p, generator)
        if token_id in stop_ids:
            return
        yield token_id
        inputs = torch.tensor([[token_id]], device=parameter.device)


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as the ids arrive; a character whose bytes are not complete yet waits for the rest."""
    seen, shown = [], ""
    for token_id in ids:
        seen.append(token_id)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(seen)[len(shown) :]
    if rest:
        yield rest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="generate.py", description="Continue a text with a trained model.")
    parser.add_argument("--ckpt", required=True, help="run directory, checkpoint or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="stop after so many (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest; 0: from all (default: 50)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from this share of probability (default: 1)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    args = parser.parse_args(argv)
    try:
        if not args.prompt:
            raise ValueError("--prompt is empty: give the model some text to continue")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but there is no CUDA here: use --device cpu")
        if args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
            raise ValueError(
                "--temperature and --top_k must not be negative, --top_p must lie in (0, 1], "
                "--max_new_tokens must be positive"
            )
        name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        model, tokenizer = load_model(Path(args.ckpt), device, resolve_dtype(args.dtype, device))
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    prompt_ids = tokenizer.encode(args.prompt)
    print(args.prompt, end="", flush=True)
    new_ids = generate(
        model, prompt_ids, args.max_new_tokens, frozenset([tokenizer.eod_id]), args.temperature, args.top_k,
        args.top_p, args.seed, tokenizer.vocab_size,
    )  # fmt: skip
    try:
        for piece in stream_text(tokenizer, new_ids):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        return 130
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())

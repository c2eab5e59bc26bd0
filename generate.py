"""Continue a text with a trained model, or talk to one that was fine-tuned on conversations.

python generate.py --ckpt RUN --prompt "def main("
python generate.py --ckpt RUN --chat [--system "Be brief."] [--prompt "one question"]
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import KVCache, Llama, hf
from model.generation_config import read_generation_config
from optimizer import resolve_dtype
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.chat_template import Message, template_of
from utils.checkpoint import resolve_checkpoint_dir
from utils.paths import a_path
from utils.terminal import INTERRUPTED, run_main


class Loaded(NamedTuple):
    model: Llama
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """Tokens that end a text: of a document, and those that the folder's configuration names."""


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Model and tokenizer of a run (its last checkpoint), a checkpoint or a Hugging Face folder, ready to generate.

    Raises:
        ValueError: one of the two cannot be used, or they do not go together.
    """
    directory = resolve_checkpoint_dir(path)
    config, tokenizer = hf.read_config(directory), load_tokenizer(directory)
    stop_ids = frozenset([tokenizer.eod_id, *read_generation_config(directory).eos_ids])
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} entries, the model an embedding for "
            f"{config.vocab_size}: it is not the model's"
        )
    hf.check_weights(config, directory)
    model = Llama(config)
    hf.load_weights(model, directory)
    return Loaded(model.to(device=device, dtype=dtype).eval(), tokenizer, stop_ids)


def room_for_text(model: Llama, prompt_ids: list[int]) -> int:
    """How many tokens may follow a prompt: the model knows `max_position_embeddings` positions, however its rotary
    positions are scaled.

    Raises:
        ValueError: none, or the prompt is empty.
    """
    context = model.config.max_position_embeddings
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    if len(prompt_ids) >= context:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens, and the model knows {context} positions "
            f"(max_position_embeddings): shorten it"
        )
    return context - len(prompt_ids)


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
    """Yield new token ids one by one, until a stop id (not yielded), max_new_tokens or the end of the model's context.

    Args:
        vocab_size: the tokenizer's; the model's scores beyond it are padding.
    Raises:
        ValueError: an empty prompt, or one that fills the context.
    """
    max_new_tokens = min(max_new_tokens, room_for_text(model, prompt_ids))
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


def require_utf8(what: str, text: str) -> None:
    """
    Raises:
        ValueError: it came from a terminal or a file in another encoding, and has no text to tokenize.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is no UTF-8: write it in that encoding") from None


@dataclass
class Chat:
    """A conversation with a model: what was said, and how the next answer is drawn.

    Args:
        sample: `generate` with all but the prompt, max_new_tokens and stop_ids settled.
        room: longest prompt and answer together, in tokens.
    """

    tokenizer: Tokenizer
    sample: Callable[[list[int], int, frozenset[int]], Iterator[int]]
    max_new_tokens: int
    room: int
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = template_of(self.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages[:] = [Message("system", self.system)] if self.system else []

    def answer(self, question: str) -> Iterator[str]:
        """Say something; yields pieces of the answer. It joins the history, as far as the caller has taken it.

        The oldest exchanges are forgotten where the history has become too long.

        Raises:
            ValueError: the question alone is too long.
        """
        prompt_ids = self._ask(question)
        said = ""
        try:
            for piece in stream_text(
                self.tokenizer, self.sample(prompt_ids, self.max_new_tokens, self._template.stop_ids)
            ):
                said += piece
                yield piece
        finally:
            self.messages.append(Message("assistant", said))

    def _ask(self, question: str) -> list[int]:
        """Take a question into the history; returns the prompt."""
        require_utf8("the question", question)
        first, room = (1 if self.system else 0), self.room - self.max_new_tokens
        asked = Message("user", question)
        alone = len(self._template.prompt([*self.messages[:first], asked]))
        if alone > room:
            raise ValueError(
                f"the question{' with the system text' if self.system else ''} has {alone} tokens, and with "
                f"--max_new_tokens {self.max_new_tokens} there is room for {room}"
            )
        self.messages.append(asked)
        while len(ids := self._template.prompt(self.messages)) > room:
            # A question and its answer.
            del self.messages[first : first + 2]
        return ids


_HELP = "/reset forgets what was said, /help says this, /exit or Ctrl-D ends, Ctrl-C ends an answer"


def talk(chat: Chat) -> None:
    """A conversation in the terminal, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP, file=sys.stderr)
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        # Who wants to leave should not have to read how.
        if question.lower() in ("/exit", "/quit", "exit", "quit"):
            return
        if question == "/reset":
            chat.reset()
        elif question.startswith("/") and question[1:].isalpha():
            print(_HELP if question == "/help" else f"{question} is no command. {_HELP}", file=sys.stderr)
        elif question:
            say(chat, question)


def say(chat: Chat, question: str) -> bool:
    """Print an answer; False if there was no room for one."""
    said = True
    try:
        for piece in chat.answer(question):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        print(f"generate: {error}", file=sys.stderr)
        said = False
    print(flush=True)
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="generate.py", description="Continue a text with a trained model.")
    parser.add_argument("--ckpt", type=a_path, required=True, help="run directory, checkpoint or Hugging Face folder")
    parser.add_argument("--prompt", default="", help="text to continue; with --chat, one question")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--system", default="", help="with --chat: what the model is told first")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="stop after so many (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest; 0: from all (default: 50)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from this share of probability (default: 1)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    args = parser.parse_args(argv)
    try:
        if not args.prompt and not args.chat:
            raise ValueError("--prompt is empty: give the model some text to continue, or talk to it with --chat")
        if args.system and not args.chat:
            raise ValueError("--system needs --chat")
        for name in ("prompt", "system"):
            require_utf8(f"--{name}", getattr(args, name))
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but there is no CUDA here: use --device cpu")
        for name in ("temperature", "top_k"):
            if not getattr(args, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(args, name)}")
        if not 0 < args.top_p <= 1:
            raise ValueError(f"--top_p must lie in (0, 1], got {args.top_p}")
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens must be positive, got {args.max_new_tokens}")
        if args.seed is not None and not -(1 << 63) <= args.seed < 1 << 63:
            raise ValueError(f"--seed must lie between -2^63 and 2^63 - 1, got {args.seed}")
        name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        model, tokenizer, folder_stops = load_model(Path(args.ckpt), device, resolve_dtype(args.dtype, device))

        def sample(ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> Iterator[int]:
            return generate(
                model, ids, max_new_tokens, stop_ids | folder_stops, args.temperature, args.top_k, args.top_p,
                args.seed, tokenizer.vocab_size,
            )  # fmt: skip

        context = model.config.max_position_embeddings
        if args.chat:
            prompt, room = [], context // 2
            chat = Chat(tokenizer, sample, min(args.max_new_tokens, room), context, args.system)
            template = template_of(tokenizer)
            notes = list(template.notes)
            if template.end_id not in folder_stops:
                notes.append(
                    "nothing in the folder says that the model was taught to end an answer: it may never have seen a "
                    "conversation, for which --task_type=sft is there"
                )
            for note in notes:
                print(f"generate: {note}", file=sys.stderr)
        else:
            # As transformers' tokenizer of the same folder does. A chat template writes its own.
            prompt = [*tokenizer.begin_ids, *tokenizer.encode(args.prompt)]
            room = room_for_text(model, prompt)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    if args.max_new_tokens > room:
        what = "an answer has" if args.chat else f"{len(prompt)} tokens of prompt leave"
        print(
            f"generate: {what} room for {room} of --max_new_tokens {args.max_new_tokens}: the model knows {context} "
            f"positions",
            file=sys.stderr,
        )
    if args.chat:
        if args.prompt:
            return 0 if say(chat, args.prompt) else 2
        talk(chat)
        return 0
    print(args.prompt, end="", flush=True)
    new_ids = sample(prompt, args.max_new_tokens, frozenset())
    try:
        for piece in stream_text(tokenizer, new_ids):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    print()
    return 0


if __name__ == "__main__":
    run_main(main)

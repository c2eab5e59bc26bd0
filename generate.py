"""Continue a text with a trained model, or talk to one that was fine-tuned on conversations.

python generate.py --ckpt RUN --prompt "def main("
python generate.py --ckpt RUN --chat [--system "Be brief."] [--prompt "one question"]
python generate.py --ckpt RUN --adapter DIR [--adapter NAME=DIR] --chat
torchrun --nproc_per_node=2 generate.py --ckpt RUN --tensor_model_parallel_size=2 --prompt "def main("
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.choosing import resolve_checkpoint_dir
from parallel.launched import launched_rank
from serving.arguments import NO_ADAPTER, parse_adapters, require_utf8
from serving.chat import Chat, stream_text
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import INTERRUPTED, run_main

if TYPE_CHECKING:
    from serving.loading import Served
    from serving.ranks import Ranks

Sampler = Callable[[list[int], int, frozenset[int]], Iterator[int]]
"""Prompt, most new tokens, tokens that end the text -> new tokens."""
_HELP = "/reset forgets what was said, /help says this, /exit or Ctrl-D ends, Ctrl-C ends an answer"
_ADAPTER = "/adapter"


def talk(chat: Chat, served: "Served") -> None:
    """Hold a conversation in the terminal until the input ends."""
    interactive, help_text = sys.stdin.isatty(), _HELP
    if served.names:
        help_text += f", {_ADAPTER} NAME goes on with another one: {', '.join([*served.names, NO_ADAPTER])}"
    if interactive:
        print(help_text, file=sys.stderr)
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        # To leave, nobody should have to look up the command.
        if question.lower() in ("/exit", "/quit", "exit", "quit"):
            return
        if question == "/reset":
            chat.reset()
        elif served.names and question.split()[:1] == [_ADAPTER]:
            switch(chat, served, question.removeprefix(_ADAPTER).strip())
        elif question.startswith("/") and question[1:].isalpha():
            print(help_text if question == "/help" else f"{question} is not a command. {help_text}", file=sys.stderr)
        elif question and say(chat, question) and chat.was_cut and interactive:
            tell(f"the answer was cut at --max_new_tokens={chat.max_new_tokens}")


def switch(chat: Chat, served: "Served", name: str) -> None:
    """Go on with another adapter, or say why not. What was said stays."""
    if not served.names:
        tell("no adapter is loaded: give some with --adapter at the start")
        return
    if not name:
        tell(f"in use is {served.active or 'no adapter'}, of {', '.join([*served.names, NO_ADAPTER])}: {_ADAPTER} NAME")
        return
    try:
        served.use(None if name == NO_ADAPTER else name)
    except ValueError as error:
        tell(str(error))
        return
    chat.speak_by(served.tokenizer)
    tell(f"goes on with {f'the adapter {served.active}' if served.active else 'no adapter'}")
    for note in chat.notes(served.stop_ids):
        tell(note)


def say(chat: Chat, question: str) -> bool:
    """Print an answer; False if there was no room for one."""
    said = True
    try:
        for piece in chat.answer(question):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        tell(str(error))
        said = False
    print(flush=True)
    return said


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        SystemExit: an unknown argument, or --help.
    """
    parser = Parser(prog="generate.py", description="Continue a text with a trained model.")
    parser.add_argument("--ckpt", type=a_path, required=True, help="run directory, checkpoint or Hugging Face folder")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR",
        help="adapter for it: run, checkpoint or folder; several can be given, the first is used",
    )  # fmt: skip
    parser.add_argument("--prompt", default="", help="text to continue; with --chat, one question")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--system", default="", help="with --chat: what the model is told first")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="stop after this many (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest; 0: from all (default: 50)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from this share of probability (default: 1)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--load_in_4bit", action="store_true", help="keep the blocks' matrices in 4 bits, as for QLoRA")
    parser.add_argument(
        "--tensor_model_parallel_size", type=int, default=1, metavar="N", help="processes that share each matrix"
    )
    parser.add_argument(
        "--pipeline_model_parallel_size", type=int, default=1, metavar="N", help="processes that share the blocks"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Check what can be checked without a model.

    Raises:
        ValueError: a value is impossible.
    """
    if not args.prompt and not args.chat:
        raise ValueError("--prompt is missing: give the model some text to continue, or talk to it with --chat")
    if args.system and not args.chat:
        raise ValueError("--system needs --chat")
    for name in ("prompt", "system"):
        require_utf8(f"--{name}", getattr(args, name))
    for name in ("temperature", "top_k"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(args, name)}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p must lie in (0, 1], got {args.top_p}")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be positive, got {args.max_new_tokens}")
    if args.seed is not None and not -(1 << 63) <= args.seed < 1 << 63:
        raise ValueError(f"--seed must lie between -2^63 and 2^63 - 1, got {args.seed}")


def tell(text: str) -> None:
    """Write to standard error: standard output is for the model's text alone."""
    print(f"generate: {text}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        check(args)
        adapters = parse_adapters(args.adapter)
        # From here on torch is imported, which takes seconds: mistakes in the command are reported before.
        for path in (Path(args.ckpt), *adapters.values()):
            resolve_checkpoint_dir(path)
        from serving.ranks import open_ranks, require_ranks

        sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        ranks = None
        if require_ranks(*sizes):
            if args.load_in_4bit:
                raise ValueError("--load_in_4bit keeps matrices whole on every process: leave it out")
            ranks = open_ranks(*sizes, args.device)
    except (ValueError, OSError) as error:
        return _wrong(error, launched_rank() == 0)
    if ranks is None:
        return serve(args, adapters, None)
    from parallel.context import destroy_context

    try:
        return serve(args, adapters, ranks)
    finally:
        destroy_context(ranks.context)


def _wrong(error: Exception, is_first: bool) -> int:
    """Tell what is wrong, once; returns the exit code."""
    if is_first:
        tell(str(error))
    return 2


def serve(args: argparse.Namespace, adapters: dict[str, Path], ranks: "Ranks | None") -> int:
    """Load the model, and generate what was asked for; with `ranks`, the first one speaks, and the others help it."""
    is_first = ranks is None or ranks.context.is_main
    try:
        import torch

        from optimizer.mixed_precision import resolve_dtype
        from serving import generation
        from serving.loading import load
        from serving.lockstep import Lockstep, Request

        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but there is no CUDA here: use --device cpu")
        name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name) if ranks is None else ranks.context.device
        dtype = resolve_dtype(args.dtype, device)
        new_cutter = None if ranks is None else lambda shape: ranks.cutter(shape, dtype)
        served = load(Path(args.ckpt), adapters, device, dtype, args.load_in_4bit, new_cutter)

        def generate(request: Request, agree: Callable[[int], int] = int) -> Iterator[int]:
            return generation.generate(
                served.model, request.ids, request.max_new_tokens, frozenset(request.stop_ids), args.temperature,
                args.top_k, args.top_p, args.seed, served.tokenizer.vocab_size, dtype, device, agree,
            )  # fmt: skip

        lockstep = None if ranks is None else Lockstep(generate, ranks.of_first)
        if lockstep is not None and not is_first:
            lockstep.follow()
            return 0

        def sample(ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> Iterator[int]:
            request = Request(ids, max_new_tokens, sorted(stop_ids | served.stop_ids))
            return generate(request) if lockstep is None else lockstep.ask(request)

        try:
            return speak(args, served, sample)
        finally:
            if lockstep is not None:
                lockstep.end()
    except (ValueError, OSError) as error:
        return _wrong(error, is_first)


def speak(args: argparse.Namespace, served: "Served", sample: Sampler) -> int:
    """Continue the prompt, or talk.

    Raises:
        ValueError: the prompt leaves no room.
    """
    from serving import generation

    tokenizer, context = served.tokenizer, served.model.config.max_position_embeddings
    if args.chat:
        prompt, room = [], context // 2
        chat = Chat(tokenizer, sample, min(args.max_new_tokens, room), context, args.system)
        for note in chat.notes(served.stop_ids):
            tell(note)
    else:
        # Begins as with transformers' tokenizer of the same folder. A chat template writes its own beginning.
        prompt = [*tokenizer.begin_ids, *tokenizer.encode(args.prompt)]
        room = generation.room_for_text(served.model, prompt)
    if args.max_new_tokens > room:
        what = "an answer has" if args.chat else f"{len(prompt)} tokens of prompt leave"
        tell(f"{what} room for {room} of --max_new_tokens {args.max_new_tokens}: the model knows {context} positions")
    if args.chat:
        if args.prompt:
            return 0 if say(chat, args.prompt) else 2
        talk(chat, served)
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

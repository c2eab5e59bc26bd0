"""Continue texts with a trained model, or talk to one that was fine-tuned on conversations.

python generate.py --model RUN --prompt "def main("
python generate.py --model RUN --prompts FILE [--json] [--n 4]
python generate.py --model RUN --chat [--system "Be brief."] [--prompt "one question"]
python generate.py --model RUN --adapter DIR [--adapter NAME=DIR] --chat
torchrun --nproc_per_node=2 generate.py --model RUN --tensor_model_parallel_size=2 --prompt "def main("

serve.py answers the same requests over HTTP.
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.choosing import resolve_checkpoint_dir
from parallel.launched import launched_rank
from serving.arguments import (
    add_model_flags,
    add_sampling_flags,
    check_sampling,
    parse_adapters,
    require_utf8,
    sampling_of,
)
from serving.chat import Chat, notes_on
from serving.completing import asking, complete
from serving.local import BrokenOff, pieces_of
from serving.prompts import Prompt, prompts_of
from serving.terminal import Talk, tell
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import INTERRUPTED, run_main

if TYPE_CHECKING:
    from serving.opening import Opened


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        SystemExit: an unknown argument, or --help.
    """
    parser = Parser(prog="generate.py", description="Continue texts with a trained model, or talk to it.")
    add_model_flags(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; with --chat, a question; several can be given"
    )
    parser.add_argument(
        "--prompts", type=a_path, metavar="FILE", help="more of them: a .jsonl file with a record a line, or any other "
        "file with a prompt a line; - is standard input",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON record for each prompt")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--system", default="", help="with --chat: what the model is told first")
    add_sampling_flags(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> list[Prompt]:
    """Check what can be checked without a model, and read the prompts; there are none for a talk.

    Raises:
        ValueError: a value is impossible.
        OSError: the prompts cannot be read.
    """
    if args.system and not args.chat and not args.prompts:
        raise ValueError("--system needs --chat")
    require_utf8("--system", args.system)
    check_sampling(args)
    is_talk = args.chat and not any(args.prompt) and args.prompts is None
    if is_talk:
        for name, is_given in (("json", args.json), ("n", args.n > 1), ("logprobs", args.logprobs is not None)):
            if is_given:
                raise ValueError(f"--{name} needs --prompt or --prompts: a talk is shown as it goes")
        return []
    return prompts_of(args.prompt, args.prompts, args.chat, args.system)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        prompts, adapters = check(args), parse_adapters(args.adapter)
        # From here on torch is imported, which takes seconds: mistakes in the command are reported before.
        for path in (Path(args.model), *adapters.values()):
            resolve_checkpoint_dir(path)
        from serving.engine import EngineOptions
        from serving.opening import opened

        width = max(64, args.n, args.num_beams)
        with opened(args, adapters, EngineOptions(max_running=width, tokens_a_step=max(512, width))) as own:
            # The other ranks have done their part when they come here.
            return 0 if own is None else speak(args, own, prompts)
    except (ValueError, OSError) as error:
        if launched_rank() == 0:
            tell(str(error))
        return 2
    except BrokenOff as broken:
        tell(str(broken))
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED


def speak(args: argparse.Namespace, own: "Opened", prompts: list[Prompt]) -> int:
    """Continue the prompts, or talk.

    Raises:
        ValueError: a prompt leaves no room.
    """
    adapter, context = own.served.active, own.served.model.config.max_position_embeddings
    speech = own.served.speech_of(adapter)
    sampling = sampling_of(args, speech.settings)
    if args.chat or any(prompt.messages for prompt in prompts):
        for note in notes_on(speech.tokenizer, speech.stop_ids):
            tell(note)
    if prompts:
        asked = asking(prompts, speech.tokenizer, context, sampling, args.n, adapter)
        return complete(own.engine, asked, speech.tokenizer, args.json)
    if args.max_new_tokens > (room := context // 2):
        tell(f"an answer has room for {room} of --max_new_tokens {args.max_new_tokens}: the model knows {context} "
             f"positions")  # fmt: skip
        sampling = replace(sampling, max_new_tokens=room)
    engine = own.engine
    chat = Chat(
        speech.tokenizer, lambda request: pieces_of(engine, [request]), sampling, context, args.system, adapter
    )
    Talk(chat, own.served).hold()
    return 0


if __name__ == "__main__":
    run_main(main)

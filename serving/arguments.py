"""Flags that several commands share: the model, and how its text is drawn. Needs no torch."""

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from serving.requests import Sampling
from utils.paths import a_path, expand

NO_ADAPTER = "none"
"""Name by which users mean the model without an adapter."""
_USUAL = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""How a token is drawn if neither a flag nor the model's folder says otherwise."""
_PENALTIES = ("presence_penalty", "frequency_penalty")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what is loaded, and on which device and processes."""
    parser.add_argument(
        "--model", "--ckpt", type=a_path, required=True, metavar="RUN",
        help="run directory, checkpoint or Hugging Face folder, of a model or an adapter",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR",
        help="adapter for it: run, checkpoint or folder; several can be given, the first is used",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--load_in_4bit", action="store_true", help="keep the blocks' matrices in 4 bits, as for QLoRA")
    parser.add_argument(
        "--tensor_model_parallel_size", type=int, default=1, metavar="N", help="processes that share each matrix"
    )
    parser.add_argument(
        "--pipeline_model_parallel_size", type=int, default=1, metavar="N", help="processes that share the blocks"
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a text is drawn, and where it ends. None: not given."""
    drawing = parser.add_argument_group(
        "drawing", "Without these flags, what the model's folder recommends (generation_config.json) counts."
    )
    drawing.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: 0.8)")
    drawing.add_argument("--top_k", type=int, help="draw from the k likeliest; 0: from all (default: 50)")
    drawing.add_argument("--top_p", type=float, help="draw from this share of probability (default: 1)")
    drawing.add_argument("--min_p", type=float, help="draw from tokens so many times as likely as the likeliest one")
    drawing.add_argument(
        "--repetition_penalty", type=float, metavar="X", help="above 1: tokens of prompt and text become less likely"
    )
    drawing.add_argument(
        "--presence_penalty", type=float, default=0.0, metavar="X", help="above 0: the text repeats tokens less"
    )
    drawing.add_argument(
        "--frequency_penalty", type=float, default=0.0, metavar="X", help="the same, once for each time they occur"
    )
    drawing.add_argument("--seed", type=int, help="same seed, same text (default: another each time)")
    drawing.add_argument("--n", type=int, default=1, help="number of texts for each prompt (default: 1)")
    ending = parser.add_argument_group("ending")
    ending.add_argument("--max_new_tokens", type=int, default=200, help="stop after this many (default: 200)")
    ending.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; several can be given"
    )
    beams = parser.add_argument_group("beam search")
    beams.add_argument(
        "--num_beams", type=int, default=1, metavar="N",
        help="follow the N likeliest texts; with --temperature, their tokens are drawn",
    )  # fmt: skip
    beams.add_argument(
        "--length_penalty", type=float, metavar="X", help="above 1: longer texts win; below: shorter ones (default: 1)"
    )
    beams.add_argument(
        "--early_stopping", choices=["false", "true", "never"],
        help="end as soon as N texts have ended (true), or when no better one is likely (false) or possible (never)",
    )  # fmt: skip
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="show each token's probability, and the N likeliest in its place"
    )


def check_sampling(args: argparse.Namespace) -> None:
    """Check the flags of `add_sampling_flags`.

    Raises:
        ValueError: a value is impossible.
    """
    for name in ("temperature", "top_k"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name} must not be negative, got {value}")
    for name, is_possible, range_ in (
        ("top_p", lambda value: 0 < value <= 1, "lie in (0, 1]"),
        ("min_p", lambda value: 0 <= value <= 1, "lie between 0 and 1"),
        ("repetition_penalty", lambda value: 0 < value < math.inf, "be positive"),
        ("presence_penalty", math.isfinite, "be a finite number"),
        ("frequency_penalty", math.isfinite, "be a finite number"),
        ("length_penalty", math.isfinite, "be a finite number"),
        ("logprobs", lambda value: value >= 0, "not be negative"),
        ("max_new_tokens", lambda value: value >= 1, "be positive"),
        ("n", lambda value: value >= 1, "be positive"),
        ("num_beams", lambda value: value >= 1, "be positive"),
    ):
        if (value := getattr(args, name)) is not None and not is_possible(value):
            raise ValueError(f"--{name} must {range_}, got {value}")
    if args.seed is not None and not -(1 << 63) <= args.seed < 1 << 63:
        raise ValueError(f"--seed must lie between -2^63 and 2^63 - 1, got {args.seed}")
    if not all(args.stop):
        raise ValueError("--stop is empty: give the text that ends an answer")
    for text in args.stop:
        require_utf8("--stop", text)
    if args.num_beams == 1:
        for name in ("length_penalty", "early_stopping"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} needs --num_beams")
    elif args.n > args.num_beams:
        raise ValueError(f"--n {args.n} texts need as many beams: give --num_beams {args.n}")


def sampling_of(args: argparse.Namespace, recommended: Mapping[str, object]) -> Sampling:
    """What the flags ask for, checked by `check_sampling`.

    Args:
        recommended: settings of the model's folder, of which those count that no flag has set.
    Raises:
        ValueError: one of these settings is impossible.
    """
    drawing: dict[str, float] = {}
    for name, usual in _USUAL.items():
        value = getattr(args, name)
        drawing[name] = _recommended(name, recommended, usual) if value is None else value
    if args.num_beams > 1 and args.temperature is None:
        # As everywhere, beam search takes the likeliest texts unless one asks for drawing.
        drawing["temperature"] = 0.0
    early: dict[str | None, bool | Literal["never"]] = {None: False, "false": False, "true": True, "never": "never"}
    return Sampling(
        max_new_tokens=args.max_new_tokens, temperature=drawing["temperature"], top_k=int(drawing["top_k"]),
        top_p=drawing["top_p"], min_p=drawing["min_p"], repetition_penalty=drawing["repetition_penalty"],
        presence_penalty=args.presence_penalty, frequency_penalty=args.frequency_penalty, seed=args.seed,
        logprobs=args.logprobs, stop=tuple(args.stop), num_beams=args.num_beams,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        early_stopping=early[args.early_stopping],
    )  # fmt: skip


def _recommended(name: str, settings: Mapping[str, object], usual: float) -> float:
    value = settings.get(name)
    if value is None:
        return usual
    least, most = (0.0, 1.0) if name in ("top_p", "min_p") else (0.0, math.inf)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf or value > most or value == 0 and name in (
        "top_p", "repetition_penalty"
    ):  # fmt: skip
        raise ValueError(f"the model's generation_config.json has an impossible {name}: {value!r}; give --{name}")
    return value


def require_utf8(what: str, text: str) -> None:
    """
    Raises:
        ValueError: the text comes from a terminal or a file in another encoding, and cannot be tokenized.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8: write it in that encoding") from None


def parse_adapters(texts: Iterable[str]) -> dict[str, Path]:
    """Name -> path of the adapters that flags name as NAME=PATH or as PATH, whose last part is its name then.

    Raises:
        ValueError: a name is impossible, or given twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:
            # A folder, which may have the sign in its own name.
            name, rest = "", text
        elif name.split() != [name]:
            raise ValueError(f"--adapter {text}: a name has no blanks: write NAME=DIR, or DIR")
        if not rest:
            raise ValueError(f"--adapter {text}: a folder is missing: write NAME=DIR, or DIR")
        path = Path(expand(rest))
        name = name or name_of(path)
        require_new(name, found)
        found[name] = path
    return found


def name_of(path: Path) -> str:
    """Name of an adapter that nobody has named: the last part of its path."""
    return path.absolute().name


def require_new(name: str, names: Iterable[str]) -> None:
    """
    Raises:
        ValueError: an adapter's name is among these, or means no adapter.
    """
    if name == NO_ADAPTER:
        raise ValueError(f"no adapter can be called {name}, which means the model without one: give it as NAME=DIR")
    if name in names:
        raise ValueError(f"two adapters are called {name}: give one as NAME=DIR, with another name")

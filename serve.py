"""Offer a trained model to programs (OpenAI's API, TGI's) and to people (a chat page).

python serve.py --model RUN
python serve.py --model RUN --adapter NAME=DIR --port 8080 --api_keys keys.txt
python serve.py --model RUN --follow
"""

from utils import environment

if __name__ == "__main__":
    environment.check("requirements-serve.txt")

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.choosing import resolve_checkpoint_dir
from parallel.launched import launched_world_size
from runs.layout import RunPaths
from serving.arguments import name_of, parse_adapters, require_utf8
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import run_main

if TYPE_CHECKING:
    from socket import socket

    from serving.limits import Hosts, Keys

_LOCAL = ("127.0.0.1", "localhost", "::1")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        SystemExit: an unknown argument, or --help.
    """
    parser = Parser(prog="serve.py", description="Offer a trained model over HTTP: OpenAI's API, TGI's, a chat page.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", "--ckpt", type=a_path, required=True, metavar="RUN",
        help="run directory, checkpoint or Hugging Face folder, of a model or an adapter",
    )  # fmt: skip
    model.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR",
        help="adapter for it: run, checkpoint or folder; requests choose one by its name",
    )  # fmt: skip
    model.add_argument("--served_model_name", metavar="NAME", help="the model's name for clients (default: its folder)")
    model.add_argument(
        "--follow", action="store_true",
        help="load each new checkpoint of the run; until the old model's requests have ended, both are in memory",
    )  # fmt: skip
    model.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    model.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    model.add_argument("--load_in_4bit", action="store_true", help="keep the blocks' matrices in 4 bits, as for QLoRA")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    network.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: 8000)")
    network.add_argument("--api_keys", type=a_path, metavar="FILE", help="keys that clients need, one a line")
    network.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME",
        help="further name under which clients may address the server; several can be given",
    )  # fmt: skip
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max_running", type=int, default=64, metavar="N", help="texts at a time (default: 64)")
    engine.add_argument("--max_queue", type=int, default=256, metavar="N", help="texts that may wait (default: 256)")
    engine.add_argument("--cache_gb", type=float, metavar="GB", help="memory for keys and values (default: what fits)")
    engine.add_argument(
        "--request_timeout", type=float, default=600.0, metavar="S", help="seconds for one answer (default: 600)"
    )
    engine.add_argument(
        "--batch_invariant", action="store_true", help="the same bits for a request, whoever else is served"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Check what can be checked without a model.

    Raises:
        ValueError: a value is impossible.
    """
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port must lie between 0 and 65535, got {args.port}")
    for name, least in (("max_running", 1), ("max_queue", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    for name in ("cache_gb", "request_timeout"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive, got {value}")
    if args.served_model_name is not None:
        require_utf8("--served_model_name", args.served_model_name)
        if args.served_model_name.split() != [args.served_model_name]:
            raise ValueError("--served_model_name has no blanks, and is not empty")
    if launched_world_size() > 1:
        raise ValueError("the server is one process: start it without torchrun")
    if args.follow and not RunPaths(Path(args.model)).ckpt_dir.is_dir():
        raise ValueError(f"--follow needs a run directory, and {args.model} is none")
    if args.follow and args.adapter:
        raise ValueError("--follow takes no --adapter: adapters belong to weights that do not change")


def tell(text: str) -> None:
    print(f"serve: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        check(args)
        adapters = parse_adapters(args.adapter)
        name = args.served_model_name or name_of(Path(args.model))
        if name in adapters:
            raise ValueError(f"model and adapter are both called {name}: give --served_model_name")
        found = resolve_checkpoint_dir(Path(args.model))
        for path in adapters.values():
            resolve_checkpoint_dir(path)
        from serving.limits import Hosts, Keys, read_keys
        from serving.running import listening_socket

        keys = Keys([]) if args.api_keys is None else read_keys(Path(args.api_keys))
        hosts = Hosts(args.host, args.allowed_host)
        bound = listening_socket(args.host, args.port)
        # From here on torch is imported, which takes seconds: mistakes in the command are reported before.
        return serve(args, found, adapters, name, keys, hosts, bound)
    except (ValueError, OSError) as error:
        tell(str(error))
        return 2


def serve(
    args: argparse.Namespace, found: Path, adapters: dict[str, Path], name: str, keys: "Keys", hosts: "Hosts",
    bound: "socket",
) -> int:  # fmt: skip
    """Load the model and answer until a signal.

    Args:
        found: folder of the model.
        name: of the model, for clients.
        bound: where to listen.
    Raises:
        ValueError: the model cannot be used.
    """
    import torch

    from optimizer.mixed_precision import resolve_dtype
    from serving import running
    from serving.api import new_app
    from serving.catalog import Catalog
    from serving.engine import Engine, EngineOptions
    from serving.follow import Follower
    from serving.limits import Limits
    from serving.loading import load
    from serving.offers import offers_of
    from serving.service import Generation, Service

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="serve: %(message)s")
    for room in ("serving", "serve"):
        logging.getLogger(room).setLevel(logging.INFO)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but there is no CUDA here: use --device cpu")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(args.dtype, device)

    options = EngineOptions(
        max_running=args.max_running, cache_gb=args.cache_gb or 0.0, leaves_room=args.follow,
        batch_invariant=args.batch_invariant,
    )  # fmt: skip

    def generation_of(path: Path) -> Generation:
        served = load(path, adapters, device, dtype, args.load_in_4bit)
        offers = offers_of(served, path, name)
        step = offers[0].step
        return Generation(Engine(served, options), Catalog(offers), None if step is None else f"step-{step}")

    first = generation_of(found)
    service = Service(first, args.max_running + args.max_queue)
    limits = Limits(request_timeout_s=args.request_timeout)
    follower = None

    def ready() -> None:
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        tell(f"ready: http://{shown}:{port}/ is the chat page, http://{shown}:{port}/v1 the API")
        if host not in _LOCAL and not keys:
            tell("anybody who reaches this address can use the model: --api_keys FILE asks for a key")
        if follower is not None:
            follower.start()

    if args.follow:
        directory, step = RunPaths(Path(args.model)).ckpt_dir, first.catalog.offers[0].step or 0
        follower = Follower(directory, step, service, generation_of)
    running.run(new_app(service, hosts, keys, limits, log=logging.getLogger("serve").info), service, bound, ready)
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)

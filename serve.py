"""Offer a trained model to programs (OpenAI's API, TGI's) and to people (a chat page).

python serve.py --model RUN
python serve.py --model RUN --adapter NAME=DIR --port 8080 --api_keys keys.txt
python serve.py --model RUN --follow
torchrun --nproc_per_node=2 serve.py --model RUN --tensor_model_parallel_size=2
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
from parallel.launched import launched_rank, launched_world_size
from runs.layout import RunPaths
from serving.arguments import add_model_flags, name_of, parse_adapters, require_utf8
from serving.limits import Hosts, Keys, Limits, read_keys
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import run_main

if TYPE_CHECKING:
    from socket import socket

    from serving.engine import EngineOptions

_CRASH = 1
_LOCAL = ("127.0.0.1", "localhost", "::1")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
        SystemExit: an unknown argument, or --help.
    """
    parser = Parser(prog="serve.py", description="Offer a trained model over HTTP: OpenAI's API, TGI's, a chat page.")
    add_model_flags(parser)
    model = parser.add_argument_group("offer")
    model.add_argument("--served_model_name", metavar="NAME", help="the model's name for clients (default: its folder)")
    model.add_argument(
        "--follow", action="store_true",
        help="load each new checkpoint of the run; until the old model's requests have ended, both are in memory",
    )  # fmt: skip
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
    engine.add_argument(
        "--max_beams", type=int, default=Limits.max_beams, metavar="N",
        help=f"beams that a request may ask for (default: {Limits.max_beams})",
    )  # fmt: skip
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
    for name, least in (("max_running", 1), ("max_queue", 0), ("max_beams", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    for name in ("cache_gb", "request_timeout"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive, got {value}")
    if args.served_model_name is not None:
        require_utf8("--served_model_name", args.served_model_name)
        if args.served_model_name.split() != [args.served_model_name]:
            raise ValueError("--served_model_name has no blanks, and is not empty")
    if args.follow and launched_world_size() > 1:
        raise ValueError("--follow is for one process: leave it out, or start the server without torchrun")
    if args.follow and not RunPaths(Path(args.model)).ckpt_dir.is_dir():
        raise ValueError(f"--follow needs a run directory, and {args.model} is none")
    if args.follow and args.adapter:
        raise ValueError("--follow takes no --adapter: adapters belong to weights that do not change")


def tell(text: str) -> None:
    if launched_rank() == 0:
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
        from serving.running import listening_socket

        if launched_rank() > 0:
            return follow(args, found, adapters)
        keys = Keys([]) if args.api_keys is None else read_keys(Path(args.api_keys))
        hosts = Hosts(args.host, args.allowed_host)
        bound = listening_socket(args.host, args.port)
        # From here on torch is imported, which takes seconds: mistakes in the command are reported before.
        return serve(args, found, adapters, name, keys, hosts, bound)
    except (ValueError, OSError) as error:
        tell(str(error))
        return 2


def options_of(args: argparse.Namespace) -> "EngineOptions":
    from serving.engine import EngineOptions

    return EngineOptions(
        max_running=args.max_running, cache_gb=args.cache_gb or 0.0, leaves_room=args.follow,
        batch_invariant=args.batch_invariant,
    )  # fmt: skip


def model_flags(args: argparse.Namespace, path: Path) -> argparse.Namespace:
    """The flags, with a checkpoint instead of its run."""
    return argparse.Namespace(**vars(args) | {"model": str(path)})


def follow(args: argparse.Namespace, found: Path, adapters: dict[str, Path]) -> int:
    """Do this rank's part of the first one's work, which alone knows clients.

    Raises:
        ValueError: the model cannot be used.
    """
    from serving.opening import opened

    with opened(model_flags(args, found), adapters, options_of(args), first_ends=True):
        return 0


def serve(
    args: argparse.Namespace, found: Path, adapters: dict[str, Path], name: str, keys: Keys, hosts: Hosts,
    bound: "socket",
) -> int:  # fmt: skip
    """Load the model and answer until a signal.

    Args:
        found: folder of the model.
        name: of the model, for clients.
        bound: where to listen.
    Returns:
        exit code.
    Raises:
        ValueError: the model cannot be used.
    """
    from serving import running
    from serving.api import new_app
    from serving.catalog import Catalog
    from serving.follow import Follower
    from serving.offers import offers_of
    from serving.opening import Opened, open_alone, opened
    from serving.service import Generation, Service

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="serve: %(message)s")
    for room in ("serving", "serve"):
        logging.getLogger(room).setLevel(logging.INFO)
    options = options_of(args)

    def generation_of(own: Opened, path: Path) -> Generation:
        offers = offers_of(own.served, path, name)
        step = offers[0].step
        generation = Generation(own.engine, Catalog(offers), None if step is None else f"step-{step}")
        engine, lockstep = own.engine, own.lockstep

        def loss() -> str:
            if lockstep is not None and lockstep.has_failed:
                return "the ranks that share the model"
            return "the device" if engine.has_lost_device else ""

        generation.loss = loss
        return generation

    def load_next(path: Path) -> Generation:
        return generation_of(open_alone(model_flags(args, path), adapters, options), path)

    with opened(model_flags(args, found), adapters, options, first_ends=True) as own:
        assert own is not None, "the first rank gets the model"
        first = generation_of(own, found)
        service = Service(first, args.max_running + args.max_queue)
        limits = Limits(request_timeout_s=args.request_timeout, max_beams=args.max_beams)
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
            follower = Follower(directory, step, service, load_next)
        app = new_app(service, hosts, keys, limits, log=logging.getLogger("serve").info)
        # The first model goes when a later one has replaced it.
        del own, first
        running.run(app, service, bound, ready)
        return _CRASH if service.lost.is_set() else 0


if __name__ == "__main__":
    run_main(main, goes_on=True)

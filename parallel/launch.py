"""Start this machine's ranks: torchrun's flags and its agent, with a rendezvous that is safe on a network.

    python -m parallel.launch --standalone --nproc_per_node=2 train_my_ddp.py FLAGS
    python -m parallel.launch --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=10.0.0.1:29400 train_my_ddp.py FLAGS

torchrun keeps the state of its rendezvous as a pickle in a store that listens on every interface: anyone who reaches
the port while it waits can run code here. This rendezvous listens on one address (parallel/listen.py), and its messages
are JSON. gloo and NCCL use the same interface unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is set.

A single node has its store on loopback, at a free port. Of several nodes, the one that has the endpoint's address (or
--node_rank=0) is the leader; it has rank 0, and the store:

    leader                                          another node
      listens at the endpoint                         connects, again and again until the leader is there
                                                      takes a ticket; writes [node_rank or null, beat] under it, and
      looks which tickets have a beat that goes on     again every 0.1 s with the next beat
      all here: writes which ticket has which rank -> finds its ticket: that is its rank

So a node that dies while it waits loses its place, and may join again. Without --node_rank, ranks follow the order of
arrival. A later attempt (--max_restarts) meets again in the same store; its ranks get their own store.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import json
import logging
import socket
import time
import uuid
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import config_from_args, elastic_launch, get_args_parser

from parallel.context import asked_interface, prefer_interface
from parallel.listen import LOOPBACK, bind, interface_of, is_own, own_address, own_addresses, serve_store
from utils.terminal import run_main

_BACKEND = "zero2all"
_POLL_S, _STALE_S, _REPORT_AFTER_S, _CONNECT_S, _PART_S = 0.1, 5.0, 5.0, 5.0, 5.0


@dataclass
class MeetingPoint:
    """The place where a node meets the others."""

    nnodes: int
    node_rank: int | None
    """Requested rank; None: by order of arrival."""
    host: str
    port: int
    """Port of the leader's store."""
    timeout_s: float
    """Longest wait for the others."""
    interface: str | None = None
    """Interface for gloo and NCCL, from --local_addr; None: the one through which the leader is reached."""
    listening: socket.socket | None = None
    """The leader's socket, which its store takes over."""
    rendezvous: "_Rendezvous | None" = None
    """The rendezvous that was made for this meeting point."""

    @property
    def where(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parser_of_flags() -> ArgumentParser:
    """torchrun's flags, and --quiet. The default of --node_rank is None."""
    parser = get_args_parser()
    # Else the script's own --n or --no-x would be taken for a beginning of one of torchrun's flags.
    parser.allow_abbrev = False
    parser.prog = "python -m parallel.launch"
    parser.add_argument(
        "--quiet", action="store_true", help="let the ranks report why they ended, unless they were killed"
    )
    # If torchrun's environment variable is set, that is the default.
    if parser.get_default("node_rank") == 0:
        parser.set_defaults(node_rank=None)
    return parser


def find_meeting_point(args: Namespace) -> MeetingPoint:
    """Choose the meeting point from the flags, and listen there if this node leads.

    Raises:
        ValueError: the flags contradict each other, or the address to listen on is not this machine's.
        OSError: the port is in use.
    """
    nnodes = _number_of_nodes(args.nnodes)
    conf = _rendezvous_conf(args.rdzv_conf)
    if args.rdzv_backend not in ("static", "c10d", _BACKEND):
        raise ValueError(f"--rdzv_backend={args.rdzv_backend}: leave it out, this launcher has a rendezvous of its own")
    if args.standalone and nnodes > 1:
        raise ValueError(f"--standalone is for one machine: leave it out, or --nnodes={args.nnodes}")
    if args.node_rank is not None and not 0 <= args.node_rank < nnodes:
        raise ValueError(f"--node_rank={args.node_rank}: with --nnodes={nnodes} it counts from 0 to {nnodes - 1}")
    if None not in (conf["is_host"], args.node_rank) and conf["is_host"] != (args.node_rank == 0):
        raise ValueError(f"--node_rank={args.node_rank} contradicts is_host in --rdzv_conf: the host has rank 0")
    host, port = _endpoint(args)
    place = MeetingPoint(nnodes, args.node_rank, host, port, conf["timeout"])
    if nnodes == 1:
        place.host, place.listening = LOOPBACK, bind(LOOPBACK, 0 if args.standalone else port)
        return place
    if port == 0:
        raise ValueError(f"--rdzv_endpoint={args.rdzv_endpoint}: several nodes must agree on a port, as in HOST:29400")
    if args.local_addr:
        place.interface = next(map(interface_of, own_addresses(args.local_addr)), None)
        if place.interface is None:
            _say(f"--local_addr={args.local_addr} is not on this machine: using the address that reaches {place.where}")
    leads = conf["is_host"] if args.node_rank is None else args.node_rank == 0
    if leads or (leads is None and is_own(host)):
        address = own_address(host, args.local_addr, asked_interface())
        # Unless the flags name the leader, another launcher on this machine may lead.
        with suppress(OSError) if leads is None else nullcontext():
            place.listening, place.host = bind(address, port), address
    return place


def _number_of_nodes(text: str) -> int:
    try:
        fewest, _, most = text.partition(":")
        numbers = {int(fewest), int(most or fewest)}
    except ValueError:
        numbers = set()
    if len(numbers) != 1 or min(numbers) < 1:
        raise ValueError(f"--nnodes={text}: give one number; ranges are not supported here")
    return numbers.pop()


def _rendezvous_conf(text: str) -> dict:
    """Parse --rdzv_conf: {"is_host": True, False or None, "timeout": seconds}."""
    given = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    truth = {"1": True, "true": True, "0": False, "false": False}
    conf = {"is_host": None, "timeout": 600.0}
    for name, value in given.items():
        if name == "is_host" and value.lower() in truth:
            conf["is_host"] = truth[value.lower()]
        elif name in ("timeout", "join_timeout") and value.isdecimal() and int(value) > 0:
            conf["timeout"] = float(value)
        else:
            raise ValueError(f"--rdzv_conf: {name}={value} has no meaning here: give is_host=0 or 1, timeout=SECONDS")
    return conf


def _endpoint(args: Namespace) -> tuple[str, int]:
    """Host and port; port 0 if there is only one node and no port is given."""
    alone = _number_of_nodes(args.nnodes) == 1
    if args.rdzv_endpoint:
        return parse_rendezvous_endpoint(args.rdzv_endpoint, 0 if alone else 29400)
    if args.rdzv_backend == "static":
        port = args.master_port if args.master_port is not None else 0 if alone else 29500
        return args.master_addr.strip("[]"), port
    return LOOPBACK, 0 if alone else 29400


def seats(wishes: dict[int, int | None], nnodes: int) -> list[int | None]:
    """Assign ranks to nodes.

    Args:
        wishes: ticket -> requested rank or None, of all present nodes except the leader.
    Returns:
        ticket of each rank, 0 being the leader's; None: nobody has the rank yet. If two nodes request the same rank,
        the later one gets it: it is the first one, started again.
    """
    seated: dict[int, int] = {0: 0}
    for ticket, rank in sorted(wishes.items()):
        if rank is not None and 0 < rank < nnodes:
            seated[rank] = ticket
    free = [rank for rank in range(nnodes) if rank not in seated]
    seated |= zip(free, (ticket for ticket, rank in sorted(wishes.items()) if rank is None))
    return [seated.get(rank) for rank in range(nnodes)]


class _Patience:
    """A wait for other nodes, with a limit, that reports its reason once."""

    def __init__(self, seconds: float):
        self.seconds, self._began, self._has_reported = seconds, time.monotonic(), False

    def pause(self, what: str) -> None:
        """Sleep until the next look. `what` is the reason, for people.

        Raises:
            RendezvousTimeoutError: it took too long.
        """
        waited = time.monotonic() - self._began
        if waited > self.seconds:
            raise RendezvousTimeoutError(f"gave up after {self.seconds:.0f} s: {what}")
        if waited > _REPORT_AFTER_S and not self._has_reported:
            _say(f"waiting, {what}")
            self._has_reported = True
        time.sleep(_POLL_S)


class _Rendezvous(RendezvousHandler):
    """A rendezvous for torchrun's agent, which calls it once per attempt for this node's rank and a store."""

    def __init__(self, place: MeetingPoint, run_id: str):
        self.place, self.run_id = place, run_id
        self._attempt = 0
        self._store: dist.TCPStore

    def next_rendezvous(self) -> RendezvousInfo:
        self._attempt += 1
        rank, port = self._meet(_Patience(self.place.timeout_s))
        agents = dist.PrefixStore("agents", self._talk(self._store))
        return RendezvousInfo(agents, rank, self.place.nnodes, RendezvousStoreInfo(self.place.host, port))

    def _meet(self, patience: _Patience) -> tuple[int, int]:
        """Meet the other nodes. Returns (this node's rank, port of the store for the ranks)."""
        raise NotImplementedError

    def _talk(self, store: dist.Store) -> dist.Store:
        """The part of the store for the nodes' messages in this attempt."""
        return dist.PrefixStore(f"nodes/{self.run_id}/{self._attempt}", store)

    def get_backend(self) -> str:
        return _BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks use the leader's store: they do, and none of them opens one."""
        return True

    def get_run_id(self) -> str:
        return self.run_id

    def num_nodes_waiting(self) -> int:
        """Always 0: the number of nodes is fixed, and nobody joins a running job."""
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: `is_closed` is constant."""

    def shutdown(self) -> bool:
        """Do nothing: the store ends with this process."""
        return True

    def part(self) -> None:
        """Leave after this node has finished. The leader, and with it the store, leaves last."""


class Leader(_Rendezvous):
    """The node with rank 0 and the store."""

    def __init__(self, place: MeetingPoint, run_id: str):
        super().__init__(place, run_id)
        prefer_interface(place.interface or interface_of(place.host))
        assert place.listening is not None
        self._store = self._of_ranks = serve_store(place.listening, place.timeout_s)
        self._store.set("run_id", run_id)

    def _meet(self, patience: _Patience) -> tuple[int, int]:
        if self._attempt > 1:
            # Keys of the last attempt would mislead the ranks of this one.
            self._of_ranks = serve_store(bind(self.place.host, 0), self.place.timeout_s)
        talk, beats, nnodes = self._talk(self._store), _Beats(), self.place.nnodes
        plan: list[int | None] = [0]
        planned = 0.0
        while True:
            seated = seats(beats.look(talk), nnodes)
            if seated != plan:
                plan, planned = seated, time.monotonic()
            elif None not in plan and beats.all_since(planned, [ticket for ticket in plan[1:] if ticket is not None]):
                # Each has beaten since all arrived. Before, one of two nodes might have been the other, started again.
                break
            missing = [str(rank) for rank, ticket in enumerate(plan) if ticket is None]
            here = f"{nnodes - len(missing)} of {nnodes} nodes are at {self.place.where}"
            patience.pause(f"{here}, without rank {', '.join(missing)}" if missing else here)
        talk.set("start", json.dumps({"tickets": plan, "port": self._of_ranks.port}))
        return 0, self._of_ranks.port

    def part(self) -> None:
        deadline = time.monotonic() + _PART_S
        while self._store.add("parted", 0) < self.place.nnodes - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_S)


class _Beats:
    """The present nodes: those whose beats go on."""

    def __init__(self):
        self._seen: dict[int, tuple[object, float]] = {}

    def look(self, talk: dist.Store) -> dict[int, int | None]:
        """Present nodes: ticket -> requested rank."""
        now, wishes = time.monotonic(), {}
        for ticket in range(1, talk.add("tickets", 0) + 1):
            if not talk.check([f"node/{ticket}"]):
                continue
            try:
                rank, beat = json.loads(talk.get(f"node/{ticket}"))
            except (ValueError, TypeError):
                # A launcher did not write this.
                continue
            if self._seen.get(ticket, (None, 0.0))[0] != beat:
                self._seen[ticket] = (beat, now)
            if now - self._seen[ticket][1] < _STALE_S and (rank is None or isinstance(rank, int)):
                wishes[ticket] = rank
        return wishes

    def all_since(self, moment: float, tickets: list[int]) -> bool:
        return all(self._seen[ticket][1] > moment for ticket in tickets)


class Follower(_Rendezvous):
    """A node that is not the leader."""

    def _meet(self, patience: _Patience) -> tuple[int, int]:
        while True:
            try:
                self._store = self._connect(patience)
                met = self._join(self._talk(self._store), patience)
            except dist.DistError:
                # The leader is gone; another may come.
                met = None
            if met is not None:
                return met
            patience.pause(
                f"the job at {self.place.where} is another one, or has begun: are --rdzv_id and --nnodes the same "
                f"everywhere, and --node_rank different?"
            )

    def _connect(self, patience: _Patience) -> dist.TCPStore:
        """Wait until the leader listens, with a plain socket, as TCPStore prints a page for each try."""
        host, port = self.place.host, self.place.port
        while True:
            try:
                with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
                    address = connection.getsockname()[0]
                break
            except OSError as error:
                patience.pause(f"nothing answers at {self.place.where} ({error.strerror or error})")
        prefer_interface(self.place.interface or interface_of(address))
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self.place.timeout_s))

    def _join(self, talk: dist.Store, patience: _Patience) -> tuple[int, int] | None:
        """Join this leader's job. Returns None if that is not possible, or not now."""
        self._store.wait(["run_id"], timedelta(seconds=_CONNECT_S))
        if self._store.get("run_id").decode(errors="replace") != self.run_id or talk.check(["start"]):
            return None
        ticket, beat = talk.add("tickets", 1), 0
        while not talk.check(["start"]):
            beat += 1
            talk.set(f"node/{ticket}", json.dumps([self.place.node_rank, beat]))
            patience.pause(f"not all nodes are at {self.place.where}")
        start = json.loads(talk.get("start"))
        return (start["tickets"].index(ticket), start["port"]) if ticket in start["tickets"] else None

    def part(self) -> None:
        with suppress(dist.DistError):
            self._store.add("parted", 1)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    place = parameters.config["place"]
    place.rendezvous = (Leader if place.listening is not None else Follower)(place, parameters.run_id)
    return place.rendezvous


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _say_failure(error: ChildFailedError, is_quiet: bool) -> None:
    """Print which rank failed first, and how. A rank that ended by itself has reported why."""
    rank, failure = error.get_first_failure()
    if not is_quiet:
        _say(str(error).strip())
    elif failure.exitcode < 0:
        _say(f"rank {rank} was killed by {failure.signal_name()}")


def launch(argv: list[str]) -> int:
    """Run a torchrun command line.

    Returns:
        exit code: 0 for success; 2 if the command is wrong; 1 for anything else, as torchrun does (the ranks' own
        codes are in their exit records).
    Raises:
        SystemExit: the flags are wrong, or --help is given.
    """
    args = parser_of_flags().parse_args(argv)
    if args.quiet:
        # torch's agent reports each rank's end, then repeats it all in a table, and reports that ranks have one thread.
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        place = find_meeting_point(args)
        args.rdzv_backend, args.rdzv_conf, args.rdzv_endpoint, args.node_rank = _BACKEND, "", place.where, 0
        if place.nnodes == 1:
            args.rdzv_id = str(uuid.uuid4())
        config, command, arguments = config_from_args(args)
    except (ValueError, AssertionError) as error:
        _say(str(error))
        return 2
    except OSError as error:
        _say(f"{error.strerror}: is another job using it?")
        return 1
    config.rdzv_configs |= {"place": place, "timeout": place.timeout_s}
    rendezvous_handler_registry.register(_BACKEND, _create)

    # This writes the environment's error file, if the scheduler wants one.
    @record
    def run() -> None:
        elastic_launch(config, command)(*arguments)
        assert place.rendezvous is not None
        place.rendezvous.part()

    try:
        run()
    except ChildFailedError as error:
        _say_failure(error, args.quiet)
    except RendezvousError as error:
        _say(str(error).strip())
    except SignalException as error:
        _say(f"ended by {error.sigval.name}")
    except KeyboardInterrupt:
        # It was waiting for other nodes; later, this is a signal.
        _say("interrupted")
    else:
        return 0
    return 1


def main(argv: list[str] | None = None) -> int:
    return launch(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    # Output that nobody reads is no reason to stop: the ranks go on.
    run_main(main, goes_on=True)

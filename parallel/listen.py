"""The address to listen on: one of this machine's, never all of them.

torch's TCPStore listens on every interface of a machine unless it is given a socket, and it authenticates nobody. Here
it gets a socket: on loopback if all ranks are on this machine, otherwise on the address that other hosts reach. gloo
and NCCL listen on a named interface; `interface_of` finds the one that has the address.
"""

import ipaddress
import socket
from datetime import timedelta

import psutil
import torch.distributed as dist

LOOPBACK = "127.0.0.1"


def addresses_of(host: str) -> list[str]:
    """IP addresses of a name, as this machine resolves it; an empty list if the name is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def interface_of(address: str) -> str | None:
    """Name of this machine's interface that has the address, or None. All of 127.0.0.0/8 is on loopback."""
    wanted = LOOPBACK if is_loopback(address) else address
    for name, entries in psutil.net_if_addrs().items():
        # After %: the interface of a link-local IPv6 address.
        if any(entry.address.partition("%")[0] == wanted.partition("%")[0] for entry in entries):
            return name
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_own(host: str) -> bool:
    """Whether a name or address belongs to this machine."""
    return any(interface_of(address) is not None for address in addresses_of(host))


def own_addresses(host: str) -> list[str]:
    """Addresses of this machine that `host` resolves to, here and on other hosts.

    A name that resolves to loopback (Debian maps a machine's own name to 127.0.1.1) means another machine elsewhere, so
    it does not count. An explicit "localhost" or loopback address does: all nodes are then on this machine.
    """
    return [
        address for address in addresses_of(host)
        if interface_of(address) is not None and (not is_loopback(address) or host in (address, "localhost"))
    ]  # fmt: skip


def own_address(host: str, local_addr: str | None = None, interface: str | None = None) -> str:
    """The address of this machine to listen on if others connect to `host`: an address of `host` itself, otherwise of
    `local_addr`, otherwise the first IPv4 address of `interface`.

    Raises:
        ValueError: none of them is an address of this machine that others can reach.
    """
    entries = psutil.net_if_addrs().get(interface or "", [])
    of_interface = [entry.address for entry in entries if entry.family == socket.AF_INET]
    for addresses in (own_addresses(host), own_addresses(local_addr) if local_addr else [], of_interface):
        if addresses:
            return addresses[0]
    meant = ", ".join(addresses_of(host)) or "unknown here"
    raise ValueError(
        f"{host} ({meant}) is not an address of this machine that other hosts can reach: choose one with --local_addr, "
        f"or an interface with GLOO_SOCKET_IFNAME ({', '.join(_reachable()) or 'this machine has none'})"
    )


def _reachable() -> list[str]:
    """This machine's addresses except loopback and link-local ones."""
    found = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                address = ipaddress.ip_address(entry.address.partition("%")[0])
                if not (address.is_loopback or address.is_link_local):
                    found.append(str(address))
    return found


def own_address_towards(host: str) -> str | None:
    """The address of this machine that traffic to `host` comes from; None without a route. Sends nothing."""
    for address in addresses_of(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))
                return probe.getsockname()[0]
        except OSError:
            continue
    return None


def bind(address: str, port: int) -> socket.socket:
    """A TCP socket that listens on one address of this machine; port 0: on any free port.

    Raises:
        OSError: the port is in use; the message is a sentence.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        # Reuse a port whose last connections are still being closed.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        # Listen at once: two sockets may be bound to a port, but only one may listen on it.
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen at {address}, port {port}: {error.strerror}") from None
    return listening


def serve_store(listening: socket.socket, timeout_s: float) -> dist.TCPStore:
    """A store that serves the socket and takes ownership of it."""
    address, port = listening.getsockname()[:2]
    return dist.TCPStore(
        address, port, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip

"""The network interface through which processes that work together reach each other."""

import os
import socket
from datetime import timedelta

import psutil

from cream.errors import UserError

FOREVER = timedelta(days=30)  # time-out of a collective: a lost process is told from a slow one by other means


def choose_interface() -> None:
    """Gloo and NCCL each take an interface from the environment; without one gloo would guess by the host's name, which
    is often the loopback. It gets the one that leads to the first process. Raises UserError on an unknown interface."""
    here = psutil.net_if_addrs()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = os.environ.get(name, "")
        wanted = given.removeprefix("=").split(",") if given and not given.startswith("^") else []
        if wanted and not any(i == w or (name.startswith("NCCL") and i.startswith(w)) for i in here for w in wanted):
            raise UserError(f"{name}={given}: this host has {', '.join(sorted(here))}")
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((os.environ["MASTER_ADDR"], 1))  # a datagram socket: nothing is sent
                address = probe.getsockname()[0]
        except OSError:
            return  # IPv6 alone, say; an unknown name is reported when connecting to the store
        names = [name for name, addresses in here.items() if any(a.address == address for a in addresses)]
        if address.startswith("127.") and os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
            # /etc/hosts may give the first host's own name as 127.0.1.1, where no other host finds it
            names = [name for name, addresses in here.items() if any(_outside(a) for a in addresses)]
            if len(names) != 1:
                raise UserError(
                    f"{os.environ['MASTER_ADDR']} is {address} on {socket.gethostname()}: set GLOO_SOCKET_IFNAME to "
                    f"the interface that leads to the other hosts, one of {', '.join(names) or 'none'}"
                )
        if names:
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def _outside(address) -> bool:
    return address.family == socket.AF_INET and not address.address.startswith("127.")

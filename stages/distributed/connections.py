"""Connections between ranks, by which a rank notices that another one has ended or cannot be reached.

Every rank has one TCP connection to rank 0. Nothing is sent on it but a byte at the end of the command. A process that
ends closes it, also when it is killed, and the other side notices at once. A host that is cut off or has no power
acknowledges nothing: the kernel asks it at intervals, and the connection fails once no answer has come for the limit.

The kernel answers for a process, so a rank that computes for hours is not taken for lost. Heartbeats of a thread would
stop in a long call that holds Python's interpreter lock.
"""

import os
import secrets
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from softcache.base.errors import UsageError

LIMIT_VARIABLE = "SOFTCACHE_RANK_TIMEOUT"
_LEAST, _DEFAULT, _MOST = 10, 180, 86_400  # seconds without an answer until a host counts as lost
_GREETING_TIMEOUT = 2.0  # seconds that a stranger who connects and says nothing may take
_DONE = b"."


def read_limit(environment: Mapping[str, str]) -> int:
    """Read the number of seconds without an answer after which a host counts as lost.

    Raises:
        UsageError: The variable is no whole number of seconds, or not in its range.
    """
    text = environment.get(LIMIT_VARIABLE, "").strip() or str(_DEFAULT)
    if not (text.isascii() and text.isdigit() and _LEAST <= int(text) <= _MOST):
        raise UsageError(
            f"{LIMIT_VARIABLE} is '{text}': a whole number of seconds from {_LEAST} to {_MOST:,} is meant"
        )
    return int(text)


class Listener:
    """Accepts the connections of the other ranks. Rank 0 has one.

    Attributes:
        connections: {rank: its connection}.
    """

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        self._socket = socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
        self._socket.setblocking(False)
        self._token = secrets.token_hex(16)
        self.connections: dict[int, socket.socket] = {}

    @property
    def place(self) -> list[str]:
        """What `connect` needs besides the host's address: the port, and a word that strangers do not know."""
        return [str(self._socket.getsockname()[1]), self._token]

    def accept(self) -> int:
        """Accept the connections that have arrived. Returns the number of all so far."""
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._socket.accept()
                connection.settimeout(_GREETING_TIMEOUT)
                with suppress(OSError):
                    greeting = connection.recv(len(self._token) + 8, socket.MSG_WAITALL).decode("ascii", "replace")
                    if secrets.compare_digest(greeting[:-8].encode(), self._token.encode()):
                        self.connections[int(greeting[-8:])] = connection
                        continue
                connection.close()
        return len(self.connections)

    def close(self) -> None:
        """Accept no more."""
        self._socket.close()


def connect(host: str, place: list[str], rank: int, seconds: float) -> socket.socket:
    """Connect to rank 0.

    Args:
        host: the address of rank 0's host.
        place: of its listener.
        rank: number of this process.
        seconds: that it may take.

    Raises:
        OSError: It cannot be reached.
    """
    port, token = place
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    connection.sendall(f"{token}{rank:08d}".encode())
    return connection


class Watch:
    """A thread that calls a function when a rank has ended or cannot be reached, whatever the main thread does.

    Args:
        connections: {rank: the connection to it}.
        limit: seconds without an answer after which a host counts as lost.
        report: is called once, with what happened.
    """

    def __init__(self, connections: dict[int, socket.socket], limit: int, report: Callable[[str], None]):
        self._connections, self._limit, self._report = connections, limit, report
        self._is_done = False
        pause = max(1, limit // 18)
        for connection in connections.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * limit)
        threading.Thread(target=self._watch, name="softcache-watch", daemon=True).start()

    def finish(self) -> None:
        """Tell the other ranks that this one ends because the command is done; what they do no longer matters."""
        self._is_done = True
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(_DONE)

    def _watch(self) -> None:
        poll = select.poll()
        ranks = {connection.fileno(): rank for rank, connection in self._connections.items()}
        for number in ranks:
            poll.register(number, select.POLLRDHUP)  # errors are reported as well
        while ranks:
            for number, _ in poll.poll():
                poll.unregister(number)
                event = self._describe_end(rank := ranks.pop(number))
                if event and not self._is_done:
                    return self._report(f"rank {rank} {event}")

    def _describe_end(self, rank: int) -> str:
        """Return what the end of a connection means; nothing where the rank was done."""
        try:
            return "" if self._connections[rank].recv(1, socket.MSG_DONTWAIT) == _DONE else "has ended"
        except (ConnectionResetError, BrokenPipeError):
            return "has ended"
        except OSError as error:
            why = os.strerror(error.errno or 0).lower()
            return f"cannot be reached: its host has not answered for {self._limit} s ({why})"

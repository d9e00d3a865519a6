"""The connections between ranks: who may connect, what their end means; wrong addresses. test_hosts.py cuts them."""

import queue
import socket
import time

import pytest

from softcache.base.errors import LostRankError, UsageError
from softcache.stages.cli.run_command import run_command
from softcache.stages.distributed.addresses import check_address_of_first, check_address_of_host
from softcache.stages.distributed.connections import LIMIT_VARIABLE, Listener, Watch, connect, read_limit


def make_pair() -> tuple[Listener, socket.socket]:
    """Rank 0's listener, to which rank 1 has connected."""
    listener = Listener()
    connection = connect("127.0.0.1", listener.place, 1, 5)
    end = time.monotonic() + 10
    while listener.accept() == 0:
        assert time.monotonic() < end
    listener.close()
    return listener, connection


def close(listener: Listener, connection: socket.socket) -> None:
    """Close both ends."""
    for end in (connection, *listener.connections.values()):
        end.close()


def test_the_limit_is_180_seconds_or_what_the_variable_says() -> None:
    assert read_limit({}) == 180
    assert read_limit({LIMIT_VARIABLE: "60"}) == 60


@pytest.mark.parametrize("text", ["9", "86401", "-60", "1.5", "soon", "٣٠"])
def test_another_limit_raises_an_error_with_the_range(text: str) -> None:
    with pytest.raises(
        UsageError, match=rf"{LIMIT_VARIABLE} is '{text}': a whole number of seconds from 10 to 86,400"
    ):
        read_limit({LIMIT_VARIABLE: text})


def test_a_stranger_who_connects_is_no_rank() -> None:
    listener = Listener()
    port, token = listener.place
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * (len(token) + 8), b"\xff" * (len(token) + 8)):
        with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            time.sleep(0.05)
            assert listener.accept() == 0
    connection = connect("127.0.0.1", listener.place, 1, 5)
    time.sleep(0.05)
    assert listener.accept() == 1
    assert list(listener.connections) == [1]
    listener.close()
    close(listener, connection)


def test_a_connection_that_closes_is_reported_at_once() -> None:
    listener, connection = make_pair()
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    Watch(listener.connections, 60, reports.put)
    connection.close()
    assert reports.get(timeout=5) == "rank 1 has ended"
    close(listener, connection)


def test_a_rank_that_is_done_may_close_its_connection() -> None:
    listener, connection = make_pair()
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    Watch(listener.connections, 60, reports.put)
    Watch({0: connection}, 60, reports.put).finish()
    connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(queue.Empty):
        reports.get(timeout=0.5)
    close(listener, connection)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.0.1.1"])
def test_an_address_that_every_host_has_is_an_error(address: str) -> None:
    with pytest.raises(UsageError, match=f"'{address}' .*--local-addr"):
        check_address_of_first(address)
    check_address_of_first("10.0.0.1")
    check_address_of_first("node-1")


def test_a_name_that_means_this_host_alone_is_an_error_without_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(socket, "gethostbyname", {"box": "127.0.1.1"}.__getitem__)
    with pytest.raises(UsageError, match=r"'box', means 127\.0\.1\.1, .*GLOO_SOCKET_IFNAME"):
        check_address_of_host({})
    check_address_of_host({"GLOO_SOCKET_IFNAME": "eth0"})
    monkeypatch.setattr(socket, "gethostbyname", {"box": "10.0.0.1"}.__getitem__)
    check_address_of_host({})


def test_a_rank_that_gets_a_signal_because_another_is_lost_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    def end_as_process_group_does() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise LostRankError("rank 1 has ended") from None

    with pytest.raises(SystemExit) as stop:
        run_command(end_as_process_group_does)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "Error: rank 1 has ended\n"

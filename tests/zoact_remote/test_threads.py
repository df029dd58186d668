"""Calls side by side."""

import logging
import socket
import threading
import time
from concurrent.futures import CancelledError, Future
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from zoact_remote.threads import AT_ONCE, pause, pool, side_by_side
from zoact_remote.transport import ID_HEADER, Transport


def test_answers_come_in_order() -> None:
    assert list(side_by_side(lambda i: i * i, range(100))) == [i * i for i in range(100)]


def test_calls_are_under_way_together() -> None:
    together = threading.Barrier(AT_ONCE)
    assert len(list(side_by_side(lambda i: together.wait(60), range(AT_ONCE)))) == AT_ONCE


def test_the_first_failure_ends_it() -> None:
    begun = []

    def fail_first(i: int) -> None:
        begun.append(i)
        if i == 0:
            raise ZeroDivisionError
        time.sleep(0.02)

    with pytest.raises(ZeroDivisionError):
        list(side_by_side(fail_first, range(100 * AT_ONCE)))
    assert len(begun) < 100 * AT_ONCE


def test_who_leaves_waits_for_no_server_that_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    transport = Transport(url, retries=8)  # of two minutes

    def call(i: int) -> None:
        if i:
            transport.call("GET", "/info", lambda answer: answer, repeatable=True)

    started = time.monotonic()
    with closing(transport), closing(side_by_side(call, range(4))) as answers:
        next(answers)
    assert time.monotonic() - started < 30
    assert list(side_by_side(pause, [0.01] * 3)) == [None] * 3, "what comes after is not cut short"


def test_who_leaves_a_pool_leaves_those_opened_from_it() -> None:
    paused: Future[None]
    with pool(1) as outer:
        paused = outer.submit(lambda: next(side_by_side(pause, [60])))
    assert isinstance(paused.exception(), CancelledError)


class Answerer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    together = threading.Barrier(AT_ONCE)
    connections: set[tuple[str, int]] = set()  # noqa: RUF012  (of all connections)

    def do_GET(self) -> None:
        self.connections.add(self.client_address)
        self.together.wait(60)
        self.send_response(200)
        self.send_header(ID_HEADER, self.headers[ID_HEADER])
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


class Listener(ThreadingHTTPServer):
    request_queue_size = AT_ONCE


def test_connections_are_kept_for_the_next_calls(caplog: pytest.LogCaptureFixture) -> None:
    with Listener(("127.0.0.1", 0), Answerer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        transport = Transport(f"http://127.0.0.1:{server.server_address[1]}")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                list(
                    side_by_side(
                        lambda i: transport.call("GET", "/info", lambda answer: answer, repeatable=True), range(AT_ONCE)
                    )
                )
        transport.close()
        server.shutdown()
    assert len(Answerer.connections) == AT_ONCE
    assert not caplog.records

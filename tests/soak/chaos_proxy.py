"""A bad network: a proxy on loopback that drops, delays, doubles and cuts off what passes through it.

It speaks just enough HTTP/1.1 to tell one exchange from the next. What it does to an exchange is drawn from a seed, in
the order in which exchanges come.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

FAULTS = (
    "request lost",
    "answer lost",
    "connection reset",
    "answer cut off",
    "delay",
    "request doubled",
    "answer doubled",
    "answer doubled late",
)
UPSTREAM_TIMEOUT_S = 120.0
LONGEST_DELAY_S = 0.2
HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})


class Request(NamedTuple):
    """One request, as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class ChaosProxy:
    """A bad network in front of a server.

    Args:
        target: the server's URL.
        seed: of what happens when.
        rate: share of exchanges to which something happens.

    Attributes:
        target: where answers come from; it may be changed, as when a server comes back elsewhere.
        url: where the proxy listens.
        happened: how often each of ``FAULTS`` did.

    """

    def __init__(self, target: str, *, seed: int, rate: float = 0.5) -> None:
        self.target = target
        self._random = random.Random(seed)
        self._rate = rate
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.happened: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Connections that are open stay until their client closes them."""
        # Only a shutdown wakes a thread that waits in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as incoming:
            late = b""
            while (request := read_request(incoming)) is not None:
                fault, place, seconds = self._draw()
                if fault == "request lost":
                    return
                if fault == "delay":
                    time.sleep(seconds)
                if fault == "request doubled":
                    self._forward(request)
                answer = self._forward(request)
                if fault == "connection reset":
                    # Closing without lingering sends RST in place of FIN.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if fault in ("answer lost", "connection reset"):
                    return
                if fault == "answer cut off":
                    connection.sendall(late + answer[: int(place * len(answer))])
                    return
                connection.sendall(late + answer + (answer if fault == "answer doubled" else b""))
                late = answer if fault == "answer doubled late" else b""

    def _draw(self) -> tuple[str | None, float, float]:
        """What happens to an exchange, at which share of its answer, and after how many seconds."""
        with self._lock:
            fault = self._random.choice(FAULTS) if self._random.random() < self._rate else None
            if fault is not None:
                self.happened[fault] += 1
            return fault, self._random.random(), self._random.uniform(0.0, LONGEST_DELAY_S)

    def _forward(self, request: Request) -> bytes:
        """The server's answer, as it goes over the wire."""
        upstream = HTTPConnection(urlsplit(self.target).netloc, timeout=UPSTREAM_TIMEOUT_S)
        try:
            upstream.request(request.method, request.path, request.body, request.headers)
            answer = upstream.getresponse()
            body = answer.read()
        except (OSError, HTTPException):
            return b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
        finally:
            upstream.close()
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        lines += [f"{name}: {value}" for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP]
        if answer.status != 204:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_request(incoming: BinaryIO) -> Request | None:
    """The next request on a connection; None once the client has closed it."""
    lines = iter(lambda: incoming.readline().decode("latin-1").rstrip("\r\n"), "")
    first = next(lines, None)
    if first is None:
        return None
    method, path, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = incoming.read(int(headers.get("content-length", 0)))
    return Request(method, path, {name: value for name, value in headers.items() if name not in HOP_BY_HOP}, body)


@contextmanager
def bad_network(target: str, *, seed: int, rate: float = 0.5) -> Iterator[ChaosProxy]:
    """A proxy that is closed when the context ends."""
    proxy = ChaosProxy(target, seed=seed, rate=rate)
    try:
        yield proxy
    finally:
        proxy.close()

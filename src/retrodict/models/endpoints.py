"""JSON over HTTP to one or many servers of the same model: requests spread over them, repeated when one is away.

A request carries everything it needs (ids, seed), so that asking another server, or the same one after a restart,
gives the same answer and nothing is drawn twice. Standard library only; no proxy is used.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from retrodict.errors import InputError, RetrodictError

log = logging.getLogger("retrodict")

CONNECT = 10.0
"""Seconds a server has to accept a connection."""

PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds before the first round of repeats, and the most between two rounds (doubled in between)."""

AWAY = (OSError, http.client.HTTPException, json.JSONDecodeError, UnicodeDecodeError)
"""What a server that dies, restarts or answers half a message looks like from here."""

Body = Mapping[str, Any]
Mend = Callable[[str, str], bool]
"""Called as (url, the server's message) on a 404; True where the cause was removed and the request may be repeated."""


class ServerDown(RetrodictError):
    """No server answered within the patience given."""


class Failed(ConnectionError):
    """A server answered 5xx (or 408, 429: later). Retried, as a lost connection is."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Refused(InputError):
    """A server understood the request and said no (4xx)."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} refused the request ({status}): {message}")
        self.url, self.status, self.message = url, status, message


class Endpoints:
    """Servers that stand for each other.

    Args:
        urls: ``http://host:port`` of each; a trailing ``/v1`` is understood.
        key: sent as a bearer token, where the servers want one.
        timeout: seconds an answer may take.
        patience: seconds for which connection errors and 5xx answers are retried, on every server in turn, before
            :class:`ServerDown`: the time to restart a server in.
        parallel: requests under way at once.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        key: str | None = None,
        timeout: float = 600.0,
        patience: float = 300.0,
        parallel: int = 32,
    ) -> None:
        given = [urls] if isinstance(urls, str) else list(urls)
        self.urls = tuple(dict.fromkeys(_clean(u) for u in given))
        if not self.urls:
            raise InputError("no server given; write urls='http://127.0.0.1:8000' or a list of such")
        self.key, self.timeout, self.patience, self.parallel = key, timeout, patience, parallel
        self.retries = 0
        """Requests that had to be sent again so far."""
        self._turn = 0
        self._lock = threading.Lock()

    def get(self, path: str) -> dict[str, Any]:
        """A GET, answered by any server."""
        return self._insist("GET", path, None, 0, None)

    def post(self, path: str, body: Body, mend: Mend | None = None) -> dict[str, Any]:
        """A POST, answered by any server."""
        return self.map(path, [body], mend)[0]

    def map(
        self, path: str, bodies: Sequence[Body], mend: Mend | None = None, parallel: int | None = None
    ) -> list[dict[str, Any]]:
        """POSTs spread over the servers, at most ``parallel`` at once; answers in the order asked."""
        if not bodies:
            return []
        with self._lock:
            first = self._turn
            self._turn += len(bodies)
        with ThreadPoolExecutor(
            min(parallel or self.parallel, len(bodies)), thread_name_prefix="retrodict-server"
        ) as pool:
            jobs = [pool.submit(self._insist, "POST", path, b, first + i, mend) for i, b in enumerate(bodies)]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise

    def once(self, url: str, method: str, path: str, body: Body | None) -> dict[str, Any]:
        """One request to one server. Raises :class:`Refused` for 4xx, and what :data:`AWAY` names otherwise."""
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        link = kind(parts.hostname or "", parts.port, timeout=CONNECT)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            link.connect()
            link.sock.settimeout(self.timeout)
            link.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            answer = link.getresponse()
            text = answer.read()
        finally:
            link.close()
        if answer.status in (408, 429) or answer.status >= 500:
            raise Failed(answer.status, _message(text))
        if answer.status >= 400:
            raise Refused(url, answer.status, _message(text))
        return _object(text)

    def _insist(self, method: str, path: str, body: Body | None, first: int, mend: Mend | None) -> dict[str, Any]:
        """Ask each server in turn, then wait and ask again, until one answers or patience is over."""
        began, pause = time.monotonic(), PAUSE
        while True:
            trouble = ""
            for k in range(len(self.urls)):
                url = self.urls[(first + k) % len(self.urls)]
                try:
                    return self._mended(url, method, path, body, mend)
                except AWAY as error:
                    trouble = f"{url}: {error or type(error).__name__}"
                    self._note(trouble)
            if time.monotonic() - began + pause > self.patience:
                raise ServerDown(
                    f"no answer within {self.patience:g} s from {', '.join(self.urls)} (last: {trouble}); start the "
                    "server, or give another url, then resume"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _mended(self, url: str, method: str, path: str, body: Body | None, mend: Mend | None) -> dict[str, Any]:
        try:
            return self.once(url, method, path, body)
        except Refused as error:
            if mend is None or error.status != 404 or not mend(url, error.message):
                raise
        return self.once(url, method, path, body)

    def _note(self, trouble: str) -> None:
        with self._lock:
            self.retries += 1
            first = self.retries == 1
        level = logging.WARNING if first else logging.INFO
        log.log(level, "%s; trying again for up to %g s", trouble, self.patience)


def _clean(url: str) -> str:
    parts = urlsplit(url if isinstance(url, str) else "")
    try:
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        fits = False
    if not fits or parts.query or parts.fragment:
        raise InputError(f"{url!r} is no server address; write it as 'http://127.0.0.1:8000'")
    return url.rstrip("/").removesuffix("/v1")


def _object(text: bytes) -> dict[str, Any]:
    """The answer's JSON object; plain text (what loading an adapter answers) under ``"text"``."""
    said = text.decode()
    return json.loads(said) if said.lstrip().startswith("{") else {"text": said}


def _message(text: bytes) -> str:
    """What a server says went wrong, on one line, whatever form it chose."""
    said = text.decode(errors="replace").strip()
    try:
        found: Any = json.loads(said)
    except json.JSONDecodeError:
        found = said
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return " ".join(str(found).split())[:500] or "no message"

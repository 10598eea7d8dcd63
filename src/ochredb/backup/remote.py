"""A server as the source of a backup: the same questions over HTTP (rest-contract section 12).

Bytes come in answers of a few MiB each, so neither side ever holds an object. Questions whose
repetition is harmless are repeated for a while if the server does not answer or is busy: a backup
outlives a restart of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

import orjson

from ochredb.api.transport import API_PREFIX, HttpTransport, Response
from ochredb.backup.source import Started
from ochredb.clock import Clock
from ochredb.errors import (
    Conflict,
    Exhausted,
    Forbidden,
    InvalidArgument,
    NotFound,
    OchreError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

_PATH = f"{API_PREFIX}/backups"
_RETRY_STATUSES = (429, 502, 503, 504)
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
_ERRORS: dict[int, type[OchreError]] = {
    400: InvalidArgument,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    412: Conflict,
    429: Exhausted,
    501: Unimplemented,
}


class Questions:
    """Asks a server, more than once where that does no harm. One caller at a time.

    offers: what a server that does not know the path lacks, for the message.
    """

    def __init__(self, url: str, headers: Mapping[str, str], clock: Clock, *, offers: str) -> None:
        try:
            self._transport = HttpTransport(url, headers=headers)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        self._url, self._clock, self._offers = url, clock, offers

    def ask(self, method: str, path: str, *, repeat: bool, **query: str | int) -> bytes:
        """The body of the answer; a refusal is the error that it names."""
        return self._send(method, path, repeat=repeat, **query).body

    def close(self) -> None:
        self._transport.close()

    def _send(self, method: str, path: str, *, repeat: bool, **query: str | int) -> Response:
        pauses_s = list(_PAUSES_S if repeat else ())
        while True:
            try:
                answer = self._transport.send(method, path, query=urlencode(query))
            except ConnectionError as error:
                if not pauses_s:
                    raise Unavailable(str(error)) from error
            else:
                if answer.status < 300:
                    return answer
                if answer.status not in _RETRY_STATUSES or not pauses_s:
                    self._refuse(answer)
            self._clock.sleep(pauses_s.pop(0))

    def _refuse(self, answer: Response) -> NoReturn:
        if answer.status in (404, 405) and not answer.body:
            raise Unimplemented(
                f"{self._url} offers no {self._offers}: it is no OchreDB, or an older one"
            )
        try:
            document = orjson.loads(answer.body)
            message = f"{self._url}: {document['message']}"
        except (KeyError, TypeError, ValueError):
            raise Unavailable(f"{self._url} answered {answer.status}") from None
        raise _ERRORS.get(answer.status, Unavailable)(message)


class RemoteSource:
    """A Source behind a URL. One caller at a time."""

    def __init__(self, url: str, headers: Mapping[str, str], clock: Clock) -> None:
        self._url = url
        self._questions = Questions(url, headers, clock, offers="backups")

    def begin(self, owner: str) -> Started:
        answer = self._questions.ask("POST", _PATH, repeat=False, owner=owner)
        try:
            document: dict[str, Any] = orjson.loads(answer)
            return Started(
                str(document["id"]),
                str(document["store_id"]),
                int(document["created_us"]),
                float(document["ttl_s"]),
                int(document["catalog_bytes"]),
                int(document["catalog_checksum"], 16),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"{self._url} does not answer like OchreDB: {error}") from error

    def read_catalog(self, backup_id: str, start: int, stop: int) -> bytes:
        path = f"{_PATH}/{quote(backup_id)}/catalog"
        return self._questions.ask("GET", path, repeat=True, start=start, stop=stop)

    def read_object(self, backup_id: str, key: str, start: int, stop: int) -> bytes:
        path = f"{_PATH}/{quote(backup_id)}/object"
        return self._questions.ask("GET", path, repeat=True, key=key, start=start, stop=stop)

    def renew(self, backup_id: str) -> None:
        self._questions.ask("POST", f"{_PATH}/{quote(backup_id)}", repeat=True)

    def end(self, backup_id: str) -> None:
        self._questions.ask("DELETE", f"{_PATH}/{quote(backup_id)}", repeat=False)

    def close(self) -> None:
        self._questions.close()

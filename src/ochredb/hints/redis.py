"""Hints between processes: Redis' publish and subscribe.

One message is one hint, a JSON array, on one channel of the store (docs/formats/redis.md):

    ["<owner>", "appended", "<collection id>", 17]

Subscribers of the same process are told at once and without Redis.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import orjson

from ochredb.hints.base import Hint, HintKind, InProcessHints, Listener
from ochredb.hints.link import RedisLink

log = logging.getLogger("ochredb.hints")

_CHANNEL = "hints"
_MESSAGE_BYTES_MAX = 1_000
_LOOK_S = 1.0  # How long a wait for a message keeps `close` waiting.
_NUMBER_MAX = 1 << 62


class RedisHints:
    """`ochredb.hints.base.Hints` over a link, which its owner starts and closes.

    owner: unique to this process. received: hints of other processes since the start.
    """

    def __init__(self, link: RedisLink, owner: str) -> None:
        self._link, self._owner = link, owner
        self._here = InProcessHints()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.received = 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self._listen, name="ochredb-hints", daemon=True)
        self._thread.start()

    def subscribe(self, kind: HintKind, listener: Listener) -> None:
        self._here.subscribe(kind, listener)

    def publish(self, hint: Hint) -> None:
        self._here.publish(hint)
        message = encode(self._owner, hint)
        channel = self._link.prefix + _CHANNEL
        self._link.later(
            f"{hint.kind.value}:{hint.collection_id}",
            len(message),
            lambda pipeline: pipeline.publish(channel, message),
        )

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _LOOK_S + self._link.config.patience_s)
            self._thread = None

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                with self._link.listening() as subscriber:
                    subscriber.subscribe(self._link.prefix + _CHANNEL)
                    while not self._stop.is_set():
                        message = subscriber.get_message(timeout=_LOOK_S)
                        if message is not None and message.get("type") == "message":
                            self._hear(message.get("data"))
            except Exception as error:  # Nonsense may make the client fail in any way.
                log.debug("listening to hints: %s: %s", type(error).__name__, error)
                self._stop.wait(self._link.pause_s())

    def _hear(self, data: Any) -> None:
        heard = decode(data)
        if heard is not None and heard[0] != self._owner:
            self.received += 1
            self._here.publish(heard[1])


def encode(owner: str, hint: Hint) -> bytes:
    """A message."""
    return orjson.dumps([owner, hint.kind.value, hint.collection_id, hint.number])


def decode(data: Any) -> tuple[str, Hint] | None:
    """Owner and hint of a message; None for anything else."""
    if not isinstance(data, bytes) or len(data) > _MESSAGE_BYTES_MAX:
        return None
    try:
        owner, kind, collection_id, number = orjson.loads(data)
        hint = Hint(HintKind(kind), collection_id, number)
    except (ValueError, TypeError):
        return None
    if not isinstance(owner, str) or not isinstance(collection_id, str):
        return None
    if type(number) is not int or not 0 <= number <= _NUMBER_MAX:
        return None
    return owner, hint

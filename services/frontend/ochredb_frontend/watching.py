"""Waiting for the work of a request whose client may go away and whose time may run out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ochredb.cancel import Cancel
from ochredb.errors import DeadlineExceeded
from ochredb_frontend.asgi import Message, Receive, disconnect
from ochredb_frontend.messages import Response

if TYPE_CHECKING:
    from ochredb_frontend.protocol import Exchange

_DEADLINE_GRACE_S = 0.25  # Work that checks its deadline gets this long to say so itself.
_LOST_CHECK_S = 0.1  # A request that takes long looks this often whether its client is there.


class DisconnectedError(Exception):
    """The client went away before its request was complete."""


async def watch(future: asyncio.Future[Response], cancel: Cancel, receive: Receive) -> None:
    """Cancel the work when the client goes away; answer for it when its time is up."""
    disconnected = asyncio.ensure_future(disconnect(receive))
    try:
        remaining_s = cancel.remaining_s()
        timeout_s = None if remaining_s is None else remaining_s + _DEADLINE_GRACE_S
        waited: set[asyncio.Future[Any]] = {future, disconnected}
        await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return
        cancel.cancel()
        if disconnected.done():
            future.set_exception(DisconnectedError())
        else:
            future.set_exception(
                DeadlineExceeded(
                    "the request ran out of time; if it was a write, it may have been applied"
                )
            )
    finally:
        disconnected.cancel()


def resolve(future: asyncio.Future[Response], result: Response | BaseException) -> None:
    if future.done():  # Answered already: out of time, or the client is gone.
        return
    if isinstance(result, Response):
        future.set_result(result)
    else:
        future.set_exception(result)


async def lost(exchange: Exchange) -> Message:
    """ASGI's last message, once the client is gone."""
    while not exchange.is_lost:
        await asyncio.sleep(_LOST_CHECK_S)
    return {"type": "http.disconnect"}

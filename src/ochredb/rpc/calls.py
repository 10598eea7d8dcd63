"""One channel's calls: deadlines, cancellation, request ids and errors, alike for all clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any

import grpc

from ochredb.cancel import Cancel
from ochredb.errors import OchreError, Unauthenticated, Unavailable
from ochredb.rpc import failures
from ochredb.rpc.config import RpcConfig

log = logging.getLogger("ochredb.rpc")

REQUEST_ID_KEY = "x-request-id"
TOKEN_KEY = "authorization"
_STEP_S = 0.1


def bearer(token: str) -> str:
    return f"Bearer {token}"


def _begin(invoke: Any, request: Any, **terms: Any) -> Any:
    try:
        return invoke(request, **terms)
    except ValueError as error:  # Of a channel that was closed: its member has left.
        raise Unavailable(f"the connection was closed: {error}", unreachable=True) from error


class Calls:
    """Thread-safe. A call ends when its `cancel` says so, whoever waits for it."""

    def __init__(self, channel: grpc.Channel, config: RpcConfig) -> None:
        self.channel, self.config = channel, config
        self._metadata: tuple[tuple[str, str], ...] = ()
        if config.token is not None:
            self._metadata = ((TOKEN_KEY, bearer(config.token)),)

    def unary(self, method: Any, request: Any, cancel: Cancel, *, writes: bool = False) -> Any:
        """One message for one message. Raises what the other side raised, or see `failures`."""
        cancel.check()
        call = _begin(method.future, request, **self._terms(cancel))
        take_back = cancel.when_cancelled(call.cancel)
        try:
            return call.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            raise self._failure(call, cancel, writes) from None
        finally:
            take_back()

    def work(self, method: Any, request: Any, step: Callable[[], None] | None) -> Any:
        """A call without a deadline; `step` is called while it runs, and may raise to end it."""
        call = _begin(method.future, request, metadata=self._metadata)
        try:
            while True:
                try:
                    return call.result(timeout=_STEP_S)
                except grpc.FutureTimeoutError:
                    if step is not None:
                        step()
                except (grpc.RpcError, grpc.FutureCancelledError):
                    raise self._failure(call, Cancel(), False) from None
        finally:
            call.cancel()  # No effect on what has ended.

    def submit(
        self,
        method: Any,
        request: Any,
        cancel: Cancel,
        deliver: Callable[[Any], None],
        *,
        writes: bool,
    ) -> None:
        """The same without waiting: `deliver` is given the answer or the error, in a thread of
        grpc's."""
        cancel.check()
        call = _begin(method.future, request, **self._terms(cancel))
        take_back = cancel.when_cancelled(call.cancel)

        def done(_call: object) -> None:
            take_back()
            if call.code() is grpc.StatusCode.OK:
                deliver(call.result())
            else:
                deliver(self._failure(call, cancel, writes))

        call.add_done_callback(done)

    def stream(
        self,
        method: Any,
        request: Any,
        cancel: Cancel,
        *,
        writes: Callable[[], bool] = lambda: False,
    ) -> Generator[Any, None, None]:
        """Several messages for one, or for several.

        writes: asked when it has failed, whether something may have been written.
        """
        yield from self.begin_stream(method, request, cancel, writes=writes)

    def begin_stream(
        self,
        method: Any,
        request: Any,
        cancel: Cancel,
        *,
        writes: Callable[[], bool] = lambda: False,
    ) -> Generator[Any, None, None]:
        """The same, of which the request is on its way before the first message is asked for."""
        cancel.check()
        call = _begin(method, request, **self._terms(cancel))
        return self._messages(call, cancel, cancel.when_cancelled(call.cancel), writes)

    def _messages(
        self, call: Any, cancel: Cancel, take_back: Callable[[], None], writes: Callable[[], bool]
    ) -> Generator[Any, None, None]:
        try:
            yield from call
        except grpc.RpcError:
            raise self._failure(call, cancel, writes()) from None
        finally:
            take_back()
            call.cancel()  # Whoever does not want the rest; no effect at the end.

    def _terms(self, cancel: Cancel) -> dict[str, Any]:
        remaining_s = cancel.remaining_s()
        metadata = self._metadata
        if cancel.request_id is not None:
            metadata = (*metadata, (REQUEST_ID_KEY, cancel.request_id))
        timeout_s = self.config.call_timeout_s if remaining_s is None else remaining_s
        return {"timeout": timeout_s, "metadata": metadata}

    def _failure(self, call: Any, cancel: Cancel, writes: bool) -> OchreError:
        failure = failures.of_call(call, cancel, writes=writes)
        if isinstance(failure, Unauthenticated):  # This process is unwelcome, not its client.
            text = f"a process of the cluster refuses this one: {failure}"
            failure = Unavailable(text, **{failures.UNREACHABLE: True})
        if failure.detail.get(failures.UNREACHABLE):
            log.warning("call failed: request_id=%s error=%s", cancel.request_id, failure)
        return failure

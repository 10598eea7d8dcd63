"""`ochredb.peers.Log` over log nodes: any of them takes any collection's writes.

Each collection has a first node, so that its writes meet in one group commit; that is all the
order is for. A write that got no answer is sent to the next node under the same name (the client's
key, or a `request_id` made here before the first attempt), and is applied once whatever became of
the earlier attempts (I8). If no node answers, the caller is told OutcomeUnknown if any attempt may
have been applied, else Unavailable: nothing was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ochredb.cancel import Cancel, Cancelled
from ochredb.clock import Clock
from ochredb.cluster.attempts import Attempts, RoutingConfig
from ochredb.cluster.budget import RetryBudget
from ochredb.cluster.hedge import ANSWERS
from ochredb.cluster.nodes import Node, Nodes
from ochredb.cluster.timer import Timer
from ochredb.errors import Conflict, OchreError, OutcomeUnknown, StorageFull, Unavailable
from ochredb.ids import IdSource
from ochredb.peers import Log
from ochredb.types import Appended, Operations

R = TypeVar("R")
Delivery = Callable[[Appended | BaseException], None]

_DECIDED = (*ANSWERS, Conflict)
"""Refused under the log's lock, where the name is looked up first: no attempt was applied, and none
that is still under way will be, as nothing that decides this can change back."""


class _Doubt:
    """Of one write: whether an attempt may have been applied without anybody knowing."""

    def __init__(self) -> None:
        self._unknown: OutcomeUnknown | None = None

    def may_repeat(self, error: OchreError) -> bool:
        """Whether the next attempt may end better than with this error."""
        if isinstance(error, OutcomeUnknown):
            self._unknown = error
        return isinstance(error, Unavailable) and not isinstance(error, StorageFull)

    def told(self, error: OchreError) -> OchreError:
        """What the caller is to be told if the last attempt ended in this error."""
        if self._unknown is None or isinstance(error, _DECIDED):
            return error
        return self._unknown


class _Patience:
    """Ends an attempt that nobody answers, once the budget pays for another. Until then it waits:
    where all nodes are slow for one reason, going from one to the next would not help.
    """

    def __init__(self, cancel: Cancel, timer: Timer, budget: RetryBudget, after_s: float) -> None:
        """cancel: the request's; the attempt's own is a child of it."""
        self.cancel = cancel.child()
        self.has_ended = False  # And the token is taken.
        self._timer, self._budget, self._after_s = timer, budget, after_s
        self._is_over = False
        self._look_later()

    def over(self) -> None:
        """The attempt has ended by itself."""
        self._is_over = True

    def blame(self, error: OchreError) -> OchreError:
        """What the node is to be told that the attempt failed with."""
        if not self.has_ended:
            return error
        return Unavailable(f"no answer to a write in {self._after_s:g} s", unreachable=True)

    def meant(self, error: OchreError) -> OchreError:
        """What it means to the request. Cancelled was the attempt, before anything was written:
        the client is still there, and the next node may do it."""
        return self.blame(error) if isinstance(error, Cancelled) else error

    def _look_later(self) -> None:
        self._timer.call_later(self._after_s, self._due, lambda: self._is_over)

    def _due(self) -> None:
        if self._budget.take():
            self.has_ended = True
            self.cancel.cancel()
        else:
            self._look_later()


class RoutedLog:
    """Thread-safe. Adds about 10 microseconds to a call."""

    def __init__(
        self,
        nodes: Nodes[Log],
        *,
        budget: RetryBudget,
        ids: IdSource,
        clock: Clock,
        config: RoutingConfig | None = None,
    ) -> None:
        self._nodes, self._budget, self._ids, self._clock = nodes, budget, ids, clock
        self._config = config or RoutingConfig()
        self._timer = Timer(clock)

    def close(self) -> None:
        """After the last call; the nodes are the caller's to close."""
        self._timer.close()

    # -- peers.Log

    def append(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        expect_last_offset: int | None = None,
        cancel: Cancel,
    ) -> Appended:
        name = self._name(idempotency_key, request_id)
        return self._write(
            collection_id,
            cancel,
            lambda log, own: log.append(
                collection_id,
                operations,
                idempotency_key=idempotency_key,
                request_hash=request_hash,
                request_id=name,
                expect_last_offset=expect_last_offset,
                cancel=own,
            ),
        )

    def submit(
        self,
        collection_id: str,
        operations: Operations,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
        cancel: Cancel,
        deliver: Delivery,
    ) -> None:
        name = self._name(idempotency_key, request_id)

        def submit(log: Log, own: Cancel, told: Delivery) -> None:
            log.submit(
                collection_id,
                operations,
                idempotency_key=idempotency_key,
                request_id=name,
                cancel=own,
                deliver=told,
            )

        attempts = Attempts(self._nodes, collection_id, cancel, self._budget, self._config)
        _Submission(attempts, self._timer, lambda: self._patience(cancel), submit, deliver).begin()

    def append_evaluated(
        self,
        collection_id: str,
        evaluate: Callable[[], Operations],
        *,
        idempotency_key: str | None = None,
        request_hash: bytes | None = None,
        request_id: str | None = None,
        cancel: Cancel,
    ) -> Appended:
        name = self._name(idempotency_key, request_id)
        failures: list[BaseException] = []

        def evaluated() -> Operations:
            try:
                return evaluate()
            except BaseException as error:
                failures.append(error)
                raise

        def attempt(log: Log, own: Cancel) -> Appended:
            try:
                return log.append_evaluated(
                    collection_id,
                    evaluated,
                    idempotency_key=idempotency_key,
                    request_hash=request_hash,
                    request_id=name,
                    cancel=own,
                )
            except BaseException:
                if failures:  # Nothing was appended, and another log would not help.
                    raise _EvaluationFailed(failures[-1]) from None
                raise

        try:
            return self._write(collection_id, cancel, attempt)
        except _EvaluationFailed as failed:
            raise failed.error from None

    def record_nothing(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended:
        return self._write(
            collection_id,
            cancel,
            lambda log, own: log.record_nothing(collection_id, key, request_hash, cancel=own),
        )

    def repeated(
        self, collection_id: str, key: str, request_hash: bytes, *, cancel: Cancel
    ) -> Appended | None:
        return self._write(
            collection_id,
            cancel,
            lambda log, own: log.repeated(collection_id, key, request_hash, cancel=own),
        )

    # -- routing

    def _name(self, idempotency_key: str | None, request_id: str | None) -> str | None:
        """A client's key is name enough."""
        return request_id if idempotency_key is not None else request_id or self._ids.uuid7()

    def _patience(self, cancel: Cancel) -> _Patience:
        return _Patience(cancel, self._timer, self._budget, self._config.write_patience_s)

    def _write(self, collection_id: str, cancel: Cancel, call: Callable[[Log, Cancel], R]) -> R:
        attempts = Attempts(self._nodes, collection_id, cancel, self._budget, self._config)
        doubt = _Doubt()
        node = attempts.first()
        while True:
            patience = self._patience(cancel)
            node.trying()
            try:
                answer = call(node.client, patience.cancel)
            except OchreError as raised:
                node.failed(patience.blame(raised))
                error = patience.meant(raised)
                if not doubt.may_repeat(error):
                    raise doubt.told(error) from error.__cause__
                patience.over()
                try:
                    node = attempts.next_node(error, self._clock, is_paid=patience.has_ended)
                except OchreError as last:
                    raise doubt.told(last) from last.__cause__
            except BaseException as error:
                node.failed(error)
                raise
            else:
                node.succeeded()
                return answer
            finally:
                patience.over()


class _EvaluationFailed(Exception):
    """`evaluate` raised `error`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Submission:
    """A submitted write, from node to node; no thread waits for it."""

    def __init__(
        self,
        attempts: Attempts[Log],
        timer: Timer,
        patience: Callable[[], _Patience],
        submit: Callable[[Log, Cancel, Delivery], None],
        deliver: Delivery,
    ) -> None:
        """patience: begins that with an attempt."""
        self._attempts, self._timer, self._patience = attempts, timer, patience
        self._submit, self._deliver = submit, deliver
        self._doubt = _Doubt()

    def begin(self) -> None:
        """The first attempt. Raises what can be refused at once."""
        attempt = _Attempt(self, self._attempts.first(), self._patience())
        try:
            attempt.begin(self._submit)
        except Unavailable as error:
            attempt.told(error)
        except BaseException as error:
            attempt.end(error)
            raise

    def again(self, node: Node[Log]) -> None:
        attempt = _Attempt(self, node, self._patience())
        try:
            attempt.begin(self._submit)
        except BaseException as error:
            attempt.told(error)

    def succeeded(self, appended: Appended) -> None:
        self._deliver(appended)

    def failed(self, error: BaseException, *, is_paid: bool) -> None:
        if not isinstance(error, OchreError):
            self._deliver(error)
            return
        if not self._doubt.may_repeat(error):
            self._deliver(self._doubt.told(error))
            return
        self._next(error, is_paid)

    def _next(self, error: OchreError, is_paid: bool = False) -> None:
        try:
            node, delay_s = self._attempts.after(error, is_paid=is_paid)
        except OchreError as last:
            self._deliver(self._doubt.told(last))
            return
        # Not here: this may be the caller's thread, or one that carries the answers of others.
        if node is None:
            self._timer.call_later(delay_s, lambda: self._next(error))
        else:
            self._timer.call_later(0.0, partial(self.again, node))


class _Attempt:
    """Of a submission, at one node."""

    def __init__(self, submission: _Submission, node: Node[Log], patience: _Patience) -> None:
        self._submission, self._node, self._patience = submission, node, patience

    def begin(self, submit: Callable[[Log, Cancel, Delivery], None]) -> None:
        self._node.trying()
        submit(self._node.client, self._patience.cancel, self.told)

    def told(self, outcome: Appended | BaseException) -> None:
        """Told once."""
        if isinstance(outcome, BaseException):
            self.end(outcome)
            if isinstance(outcome, OchreError):
                outcome = self._patience.meant(outcome)
            self._submission.failed(outcome, is_paid=self._patience.has_ended)
        else:
            self._patience.over()
            self._node.succeeded()
            self._submission.succeeded(outcome)

    def end(self, error: BaseException) -> None:
        self._patience.over()
        self._node.failed(self._patience.blame(error) if isinstance(error, OchreError) else error)

"""`ochredb.peers.Log` over log nodes: any of them takes any collection's writes.

Each collection has a first node, so that its writes meet in one group commit; that is all the
order is for. A write that got no answer is sent to the next node under the same name (the client's
key, or a `request_id` made here before the first attempt), and is applied once whatever became of
the earlier attempts (I8). If no node answers, the caller is told OutcomeUnknown if any attempt may
have been applied, else Unavailable: nothing was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ochredb.cancel import Cancel
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


class RoutedLog:
    """Thread-safe."""

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
            lambda log: log.append(
                collection_id,
                operations,
                idempotency_key=idempotency_key,
                request_hash=request_hash,
                request_id=name,
                expect_last_offset=expect_last_offset,
                cancel=cancel,
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
        deliver: Callable[[Appended | BaseException], None],
    ) -> None:
        name = self._name(idempotency_key, request_id)

        def submit(log: Log, deliver: Callable[[Appended | BaseException], None]) -> None:
            log.submit(
                collection_id,
                operations,
                idempotency_key=idempotency_key,
                request_id=name,
                cancel=cancel,
                deliver=deliver,
            )

        attempts = Attempts(self._nodes, collection_id, cancel, self._budget, self._config)
        _Submission(attempts, self._timer, submit, deliver).begin()

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

        def attempt(log: Log) -> Appended:
            try:
                return log.append_evaluated(
                    collection_id,
                    evaluated,
                    idempotency_key=idempotency_key,
                    request_hash=request_hash,
                    request_id=name,
                    cancel=cancel,
                )
            except BaseException:
                if failures:  # Nothing was appended, and another log would not help.
                    raise _EvaluationFailed(failures[-1]) from None
                raise

        try:
            return self._write(collection_id, cancel, attempt)
        except _EvaluationFailed as failed:
            raise failed.error from None

    def record_nothing(self, collection_id: str, key: str, request_hash: bytes) -> Appended:
        return self._write(
            collection_id,
            Cancel(clock=self._clock),
            lambda log: log.record_nothing(collection_id, key, request_hash),
        )

    def repeated(self, collection_id: str, key: str, request_hash: bytes) -> Appended | None:
        return self._write(
            collection_id,
            Cancel(clock=self._clock),
            lambda log: log.repeated(collection_id, key, request_hash),
        )

    # -- routing

    def _name(self, idempotency_key: str | None, request_id: str | None) -> str | None:
        """A client's key is name enough."""
        return request_id if idempotency_key is not None else request_id or self._ids.uuid7()

    def _write(self, collection_id: str, cancel: Cancel, call: Callable[[Log], R]) -> R:
        attempts = Attempts(self._nodes, collection_id, cancel, self._budget, self._config)
        doubt = _Doubt()
        node = attempts.first()
        while True:
            node.trying()
            try:
                answer = call(node.client)
            except OchreError as error:
                node.failed(error)
                if not doubt.may_repeat(error):
                    raise doubt.told(error) from error.__cause__
                try:
                    node, delay_s = attempts.after(error)
                except OchreError as last:
                    raise doubt.told(last) from last.__cause__
            except BaseException as error:
                node.failed(error)
                raise
            else:
                node.succeeded()
                return answer
            if delay_s:
                self._clock.sleep(delay_s)


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
        submit: Callable[[Log, Callable[[Appended | BaseException], None]], None],
        deliver: Callable[[Appended | BaseException], None],
    ) -> None:
        self._attempts, self._timer = attempts, timer
        self._submit, self._deliver = submit, deliver
        self._doubt = _Doubt()

    def begin(self) -> None:
        """The first attempt. Raises what can be refused at once."""
        node = self._attempts.first()
        node.trying()
        try:
            self._submit(node.client, self._told_by(node))
        except Unavailable as error:
            self._failed(node, error)
        except BaseException as error:
            node.failed(error)
            raise

    def _again(self, node: Node[Log]) -> None:
        node.trying()
        try:
            self._submit(node.client, self._told_by(node))
        except BaseException as error:
            self._failed(node, error)

    def _told_by(self, node: Node[Log]) -> Callable[[Appended | BaseException], None]:
        def told(outcome: Appended | BaseException) -> None:
            if isinstance(outcome, BaseException):
                self._failed(node, outcome)
            else:
                node.succeeded()
                self._deliver(outcome)

        return told

    def _failed(self, node: Node[Log], error: BaseException) -> None:
        node.failed(error)
        if not isinstance(error, OchreError):
            self._deliver(error)
            return
        if not self._doubt.may_repeat(error):
            self._deliver(self._doubt.told(error))
            return
        try:
            other, delay_s = self._attempts.after(error)
        except OchreError as last:
            self._deliver(self._doubt.told(last))
            return
        # Not here: this may be the caller's thread, or one that carries the answers of others.
        self._timer.call_later(delay_s, lambda: self._again(other))

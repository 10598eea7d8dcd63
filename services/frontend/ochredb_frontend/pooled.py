"""Reads for the pool; searches that wait for a thread and ask for the same are run as one.

They differ in their query vectors alone, so one evaluation of their filter and one pass over the
vectors answers all of them. Nobody waits for company: a thread that takes a search takes along what
has queued up behind it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from ochredb.cancel import Cancel
from ochredb.errors import Exhausted, Unavailable
from ochredb.peers import QueryRequest
from ochredb_frontend.messages import Response, error_response
from ochredb_frontend.service import Frontend
from ochredb_frontend.wire import Read

_VECTORS_MAX, _RESULTS_MAX = 4, 200  # A larger search is a batch already.


@dataclass(frozen=True, slots=True)
class PooledRead:
    """A parsed read and whether to go on with it."""

    frontend: Frontend
    read: Read
    cancel: Cancel

    def __call__(self) -> Response:
        return Response(200, self.frontend.read(self.read, self.cancel))

    @property
    def group(self) -> Hashable | None:
        """Equal for reads that may run as one; None: only alone."""
        request = self.read.request
        if not isinstance(request, QueryRequest) or request.ids is not None or request.explain:
            return None
        queries, dimension = request.embeddings.shape
        if not 0 < queries <= _VECTORS_MAX or request.n_results > _RESULTS_MAX:
            return None
        # By its text, a filter on 1 is another one than a filter on 1.0 or True, which are equal.
        return (
            self.read.collection_id, dimension, request.n_results, request.exact,
            request.target_recall, request.fields, repr(request.where),
        )  # fmt: skip


class _Everyone(Cancel):
    """Of a batch: it goes on as long as one of them would."""

    __slots__ = ("_left", "_members")

    def __init__(self, members: Sequence[Cancel]) -> None:
        remaining_s = [member.remaining_s() for member in members]
        ends_s = [seconds for seconds in remaining_s if seconds is not None]
        super().__init__(max(ends_s) if len(ends_s) == len(members) else None)
        self.request_id = members[0].request_id
        self._members = members
        self._left = set(range(len(members)))
        for number, member in enumerate(members):
            member.when_cancelled(partial(self._member_left, number))

    def _member_left(self, number: int) -> None:
        self._left.discard(number)
        if not self._left:
            self.cancel()

    def check(self) -> None:
        for number, member in enumerate(self._members):
            try:
                return member.check()
            except Exception:
                if number == len(self._members) - 1:
                    raise


def answer_together(reads: Sequence[PooledRead]) -> list[Response]:
    """Their responses, whatever they are. Reads of one group."""
    responses: dict[int, Response] = {}
    for number, read in enumerate(reads):
        try:
            read.cancel.check()  # It may have waited in the queue for too long.
        except Exception as error:
            responses[number] = error_response(error)
    going = [number for number in range(len(reads)) if number not in responses]
    if len(going) > 1:
        some = [reads[number] for number in going]
        everyone = _Everyone([read.cancel for read in some])
        try:
            answers = some[0].frontend.read_together([read.read for read in some], everyone)
        except (Exhausted, Unavailable) as error:  # Nobody's fault: asking singly would add to it.
            answers = []
            responses |= {number: error_response(error) for number in going}
        except Exception:  # One that is bad fails alone (I9).
            answers = []
        for number, answer in zip(going, answers, strict=False):
            responses[number] = Response(200, answer)
    for number, read in enumerate(reads):
        if number not in responses:
            try:
                responses[number] = read()
            except Exception as error:
                responses[number] = error_response(error)
    return [responses[number] for number in range(len(reads))]

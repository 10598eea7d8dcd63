"""What every membership must do. Subclass, give the `place` fixture, inherit the tests:

class TestMyMembership(ChangingMembershipSuite):
    @pytest.fixture
    def place(self) -> Place:
        return MyPlace(...)

`MembershipSuite` is for those that never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import pytest

from ochredb.clock import SystemClock
from ochredb.cluster.membership import Membership

_PATIENCE_S = 15.0


class Place(Protocol):
    """Where the members are known, as the test sees it."""

    def open(self) -> Membership: ...

    def publish(self, addresses: Mapping[str, str]) -> None:
        """These are the members now; none is possible."""
        ...

    def expected(self, addresses: Mapping[str, str]) -> Mapping[str, str]:
        """How the membership names them."""
        ...

    def fail(self) -> None:
        """Nobody can be asked."""
        ...

    def heal(self) -> None: ...


ONE = {"a": "10.0.0.1:8100"}
TWO = {"a": "10.0.0.1:8100", "b": "10.0.0.2:8100"}
MOVED = {"a": "10.0.0.3:8100", "b": "10.0.0.2:8100"}


def until(is_so: Callable[[], bool], ask: Callable[[], None] = lambda: None) -> None:
    """Wait for it, asking again and again."""
    clock = SystemClock()
    give_up_s = clock.monotonic_s() + _PATIENCE_S
    while not is_so():
        assert clock.monotonic_s() < give_up_s, "it does not happen"
        ask()
        clock.sleep(0.02)


class MembershipSuite:
    """The behaviour of `Membership` where `TWO` are published."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError("a subclass gives the place")

    def test_the_members_are_there_when_it_is_open(self, place: Place) -> None:
        place.publish(TWO)
        membership = place.open()
        try:
            assert membership.members.addresses == place.expected(TWO)
            assert membership.members.version > 0
        finally:
            membership.close()

    def test_looking_again_changes_nothing_where_nothing_changed(self, place: Place) -> None:
        place.publish(TWO)
        membership = place.open()
        try:
            before = membership.members
            for _ in range(1_000):
                membership.refresh()
            assert membership.members.version == before.version
        finally:
            membership.close()

    def test_a_view_is_not_changed_from_outside(self, place: Place) -> None:
        place.publish(TWO)
        membership = place.open()
        try:
            with pytest.raises(TypeError):
                membership.members.addresses["c"] = "c:1"  # type: ignore[index]
        finally:
            membership.close()

    def test_after_closing_the_last_view_is_still_there(self, place: Place) -> None:
        place.publish(TWO)
        membership = place.open()
        membership.close()
        membership.close()
        membership.refresh()
        assert membership.members.addresses == place.expected(TWO)


class ChangingMembershipSuite(MembershipSuite):
    """Also where members come, go and move, and where nobody can be asked for a while."""

    @pytest.mark.parametrize("after", [ONE, MOVED])
    def test_a_change_is_seen(self, place: Place, after: Mapping[str, str]) -> None:
        place.publish(TWO)
        membership = place.open()
        try:
            version = membership.members.version
            place.publish(after)
            expected = place.expected(after)
            until(lambda: membership.members.addresses == expected, membership.refresh)
            assert membership.members.version > version
        finally:
            membership.close()

    def test_many_changes_end_in_the_last(self, place: Place) -> None:
        place.publish(ONE)
        membership = place.open()
        try:
            for _ in range(10):
                place.publish(TWO)
                place.publish(ONE)
            place.publish(MOVED)
            expected = place.expected(MOVED)
            until(lambda: membership.members.addresses == expected, membership.refresh)
        finally:
            membership.close()

    def test_nobody_at_all_is_not_believed(self, place: Place) -> None:
        """The last that were known may still be there; if not, asking them costs a moment."""
        place.publish(TWO)
        membership = place.open()
        try:
            place.publish({})
            membership.refresh()
            SystemClock().sleep(0.7)
            assert membership.members.addresses == place.expected(TWO)
            place.publish(ONE)
            expected = place.expected(ONE)
            until(lambda: membership.members.addresses == expected, membership.refresh)
        finally:
            membership.close()

    def test_while_nobody_can_be_asked_the_last_view_stays(self, place: Place) -> None:
        place.publish(TWO)
        membership = place.open()
        try:
            place.fail()
            for _ in range(10):
                membership.refresh()
                SystemClock().sleep(0.05)
            assert membership.members.addresses == place.expected(TWO)
            place.heal()
            place.publish(MOVED)
            expected = place.expected(MOVED)
            until(lambda: membership.members.addresses == expected, membership.refresh)
        finally:
            membership.close()

    def test_it_opens_while_nobody_can_be_asked(self, place: Place) -> None:
        place.publish(TWO)
        place.fail()
        membership = place.open()
        try:
            assert membership.members.addresses == {}
            place.heal()
            expected = place.expected(TWO)
            until(lambda: membership.members.addresses == expected, membership.refresh)
        finally:
            membership.close()

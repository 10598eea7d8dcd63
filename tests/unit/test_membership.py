"""Memberships: one suite for all, and what each is told in."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest

from ochredb.clock import SystemClock
from ochredb.cluster.dns import DnsMembership, resolve
from ochredb.cluster.endpoint_slices import addresses_in
from ochredb.cluster.membership import (
    Members,
    Membership,
    StaticMembership,
    address_of,
    open_membership,
    split_address,
)
from ochredb.errors import InvalidArgument
from ochredb.testing.membership_suite import (
    MOVED,
    ONE,
    TWO,
    ChangingMembershipSuite,
    MembershipSuite,
    until,
)

from .fake_kubernetes import FakeKubernetes
from .kubernetes_place import KubernetesPlace, KubernetesSuite, client, endpoint, slice_of


def _open(setting: str) -> Membership:
    return open_membership(setting, clock=SystemClock(), rng=random.Random(1))


class TestSettings:
    def test_a_list(self) -> None:
        membership = _open("static:a=10.0.0.1:8100, b=query.example:1,c=[::1]:65535")
        assert membership.members.addresses == {
            "a": "10.0.0.1:8100", "b": "query.example:1", "c": "[::1]:65535",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("setting", "named"),
        [
            ("a=b:1", "must begin with static:, dns: or kubernetes:"),
            ("", "must begin with"),
            ("static:", "'' is not NAME=HOST:PORT"),
            ("static:a", "'a' is not NAME=HOST:PORT"),
            ("static:a=b:1,", "'' is not NAME=HOST:PORT"),
            ("static:=b:1", "'=b:1' is not NAME=HOST:PORT"),
            ("static:a=b:1,a=c:1", "'a' is there twice"),
            ("static:a=b", "'b' is not HOST:PORT"),
            ("static:a=:1", "':1' is not HOST:PORT"),
            ("static:a=::1:80", "'::1:80' is not HOST:PORT"),
            ("static:a=b:0", "the port '0'"),
            ("static:a=b:65536", "the port '65536'"),
            ("static:a=b:x", "the port 'x'"),
            ("dns:b", "'b' is not HOST:PORT"),
            ("kubernetes:service", r"'service' is not \[NAMESPACE/\]SERVICE:PORT"),
            ("kubernetes:space/:rpc", "is not"),
            ("kubernetes:service:", "is not"),
        ],
    )
    def test_what_is_wrong_is_named(self, setting: str, named: str) -> None:
        with pytest.raises(InvalidArgument, match=named):
            _open(setting)

    def test_addresses_are_split_and_joined(self) -> None:
        for text in ("a:1", "[::1]:2", "1.2.3.4:5"):
            assert address_of(*split_address("", text)) == text


def test_views_have_versions() -> None:
    none = Members()
    one = none.then(ONE)
    assert (none.version, one.version) == (0, 1)
    assert one.then(ONE) is one
    assert one.then({}) is one
    assert one.then(TWO).version == 2


class StaticPlace:
    def __init__(self) -> None:
        self._addresses: Mapping[str, str] = {}

    def open(self) -> Membership:
        return StaticMembership(self._addresses)

    def publish(self, addresses: Mapping[str, str]) -> None:
        self._addresses = addresses

    def expected(self, addresses: Mapping[str, str]) -> Mapping[str, str]:
        return addresses

    def fail(self) -> None:
        raise AssertionError("nobody is asked")

    heal = fail


class TestStatic(MembershipSuite):
    @pytest.fixture
    def place(self) -> StaticPlace:
        return StaticPlace()


class DnsPlace:
    """A resolver that a test sets."""

    def __init__(self) -> None:
        self._addresses: set[str] = set()
        self._fails = False
        self.asked = 0

    def open(self) -> Membership:
        return DnsMembership(
            "query.example", 8100, clock=SystemClock(), rng=random.Random(1), resolve=self._resolve
        )

    def _resolve(self, host: str, port: int) -> set[str]:
        assert (host, port) == ("query.example", 8100)
        self.asked += 1
        if self._fails:
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution")
        return self._addresses

    def publish(self, addresses: Mapping[str, str]) -> None:
        self._addresses = set(addresses.values())

    def expected(self, addresses: Mapping[str, str]) -> Mapping[str, str]:
        return {address: address for address in addresses.values()}

    def fail(self) -> None:
        self._fails = True

    def heal(self) -> None:
        self._fails = False


class TestDns(ChangingMembershipSuite):
    @pytest.fixture
    def place(self) -> DnsPlace:
        return DnsPlace()

    def test_many_failed_requests_are_not_as_many_look_ups(self, place: DnsPlace) -> None:
        place.publish(TWO)
        membership = place.open()
        try:
            for _ in range(100_000):
                membership.refresh()
            assert place.asked <= 3
        finally:
            membership.close()

    def test_the_system_is_asked(self) -> None:
        assert resolve("127.0.0.1", 8100) == {"127.0.0.1:8100"}
        with pytest.raises(OSError, match=r"."):
            resolve("no such host, surely", 8100)


@pytest.fixture
def api() -> Iterator[FakeKubernetes]:
    fake = FakeKubernetes()
    yield fake
    fake.close()


class TestKubernetes(KubernetesSuite):
    """Against a stand-in that speaks list and watch alone."""

    @pytest.fixture(params=["v1", "v1beta1"])
    def api(self, request: pytest.FixtureRequest) -> Iterator[FakeKubernetes]:
        fake = FakeKubernetes(request.param)
        yield fake
        fake.close()

    @pytest.fixture
    def place(self, api: FakeKubernetes) -> Iterator[KubernetesPlace]:
        place = KubernetesPlace(
            lambda: client(api.url),
            version=api.version,
            fail=lambda fails: self._fail(api, fails),
        )
        yield place
        place.close()

    @pytest.fixture
    def forget(self, api: FakeKubernetes) -> Callable[[], None]:
        return api.forget_history

    def _fail(self, api: FakeKubernetes, fails: bool) -> None:
        api.fails = fails
        api.cut_watches()


class TestWatch:
    @pytest.fixture
    def place(self, api: FakeKubernetes) -> Iterator[KubernetesPlace]:
        place = KubernetesPlace(lambda: client(api.url))
        yield place
        place.close()

    def test_one_list_is_enough(self, api: FakeKubernetes, place: KubernetesPlace) -> None:
        place.publish(ONE)
        membership = place.open()
        place.publish(TWO)
        until(lambda: membership.members.addresses == TWO)
        place.publish(ONE)
        until(lambda: membership.members.addresses == ONE)
        membership.close()
        assert api.lists == 1

    @pytest.mark.parametrize("quietly", [False, True])
    def test_a_forgotten_version_is_listed_again(
        self, api: FakeKubernetes, place: KubernetesPlace, quietly: bool
    ) -> None:
        """410, at the beginning of a watch or in its midst."""
        place.publish(ONE)
        membership = place.open()
        until(lambda: api.watches == 1)
        place.publish(TWO)
        api.forget_history(quietly=quietly)
        until(lambda: api.lists >= 2)
        until(lambda: membership.members.addresses == TWO)
        membership.close()

    def test_a_watch_that_is_cut_goes_on(self, api: FakeKubernetes, place: KubernetesPlace) -> None:
        place.publish(ONE)
        membership = place.open()
        until(lambda: api.watches == 1)
        api.cut_watches()
        place.publish(TWO)
        until(lambda: membership.members.addresses == TWO)
        membership.close()

    def test_a_watch_that_is_dead_without_a_word_is_found_out(
        self, api: FakeKubernetes, place: KubernetesPlace
    ) -> None:
        """By a request that fails; without one, after minutes."""
        place.publish(ONE)
        membership = place.open()
        until(lambda: api.watches == 1)
        api.silence_watches()
        place.publish(TWO)
        until(lambda: membership.members.addresses == TWO, membership.refresh)
        place.publish(MOVED)
        until(lambda: membership.members.addresses == MOVED)  # By the watch, which began anew.
        membership.close()
        assert api.watches == 2

    def test_a_watch_that_is_dead_again_and_again_is_done_without(
        self, api: FakeKubernetes, place: KubernetesPlace
    ) -> None:
        place.publish(ONE)
        membership = place.open()

        def shows(addresses: Mapping[str, str]) -> bool:
            return membership.members.addresses == addresses

        def began(watches: int) -> bool:
            return api.watches > watches

        until(partial(began, 0))
        for published in (TWO, MOVED, ONE):
            watches = api.watches
            api.silence_watches()
            place.publish(published)
            until(partial(shows, published), membership.refresh)
            until(partial(began, watches))
        membership.close()

    def test_many_failed_requests_are_not_as_many_lists(
        self, api: FakeKubernetes, place: KubernetesPlace
    ) -> None:
        """And a watch that lives is left alone."""
        place.publish(ONE)
        membership = place.open()
        until(lambda: api.watches == 1)
        until(lambda: api.lists == 2, membership.refresh)
        for _ in range(10_000):
            membership.refresh()
        assert api.lists <= 3
        place.publish(TWO)
        until(lambda: membership.members.addresses == TWO)
        membership.close()
        assert api.watches == 1

    def test_a_list_that_hangs_keeps_nobody(
        self, api: FakeKubernetes, place: KubernetesPlace
    ) -> None:
        """Who asks for it does not wait, and the watch goes on."""
        place.publish(ONE)
        membership = place.open()
        until(lambda: api.watches == 1)
        with api.lists_held():
            until(lambda: api.lists == 2, membership.refresh)
            for _ in range(1_000):
                membership.refresh()
            place.publish(TWO)
            until(lambda: membership.members.addresses == TWO)
            assert api.lists == 2, "one at a time"
        membership.close()
        assert membership.members.addresses == TWO, "what the watch told is newer"

    def test_closing_ends_a_watch_at_once(
        self, api: FakeKubernetes, place: KubernetesPlace
    ) -> None:
        place.publish(ONE)
        membership = place.open()
        until(lambda: api.watches == 1)
        membership.close()
        assert not membership._lookout._thread.is_alive()


class TestEndpoints:
    def test_only_the_ready_and_those_of_whom_nothing_is_said(self) -> None:
        item = slice_of(
            "s",
            [
                endpoint("a", "10.0.0.1"),
                endpoint("b", "10.0.0.2", ready=False),
                endpoint("c", "10.0.0.3", ready=None),
            ],
        )
        assert addresses_in([item], "rpc") == {"a": "10.0.0.1:8100", "c": "10.0.0.3:8100"}

    def test_names_are_pods_or_host_names_or_addresses(self) -> None:
        pod = endpoint("pod-0", "10.0.0.1")
        host = {"addresses": ["10.0.0.2"], "hostname": "h"}
        bare = {"addresses": ["fd00::3"], "targetRef": {"kind": "Node", "name": "n"}}
        assert addresses_in([slice_of("s", [pod, host, bare])], "1234") == {
            "pod-0": "10.0.0.1:1234",
            "h": "10.0.0.2:1234",
            "[fd00::3]:1234": "[fd00::3]:1234",
        }

    def test_several_slices_are_one_service(self) -> None:
        one = slice_of("s", [endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2")])
        two = slice_of("t", [endpoint("b", "10.0.0.2"), endpoint("c", "10.0.0.3")], port=9)
        assert sorted(addresses_in([one, two], "rpc")) == ["a", "b", "c"]

    def test_a_slice_without_the_port_or_without_endpoints_has_no_members(self) -> None:
        assert addresses_in([slice_of("s", [endpoint("a", "10.0.0.1")])], "nope") == {}
        empty = slice_of("s", [])
        empty["endpoints"] = None
        assert addresses_in([empty], "rpc") == {}

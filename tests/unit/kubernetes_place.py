"""EndpointSlices as a test publishes them, through the API that the membership reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration, CustomObjectsApi

from ochredb.clock import SystemClock
from ochredb.cluster.endpoint_slices import (
    ApiSlices,
    Expired,
    KubernetesMembership,
    addresses_in,
)
from ochredb.cluster.membership import split_address
from ochredb.testing.membership_suite import ONE, TWO, ChangingMembershipSuite, until

NAMESPACE, SERVICE, PORT_NAME = "default", "ochredb-query", "rpc"


def client(url: str, token: str | None = None) -> Any:
    """A client of the `kubernetes` package for an API server, whose certificate is not checked."""
    configuration = Configuration()
    configuration.host, configuration.verify_ssl = url, False
    if token is not None:
        configuration.api_key = {"authorization": f"Bearer {token}"}
    return ApiClient(configuration)


def endpoint(pod: str, host: str, *, ready: bool | None = True) -> dict[str, Any]:
    target = {"kind": "Pod", "name": pod, "namespace": NAMESPACE}
    conditions = {} if ready is None else {"ready": ready}
    return {"addresses": [host], "conditions": conditions, "targetRef": target}


def slice_of(
    name: str,
    endpoints: list[dict[str, Any]],
    *,
    port: int = 8100,
    service: str = SERVICE,
    version: str = "v1",
) -> dict[str, Any]:
    return {
        "apiVersion": f"discovery.k8s.io/{version}",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [
            {"name": "other", "port": 1, "protocol": "TCP"},
            {"name": PORT_NAME, "port": port, "protocol": "TCP"},
        ],
        "endpoints": endpoints,
    }


class KubernetesPlace:
    """`ochredb.testing.membership_suite.Place` behind an API server.

    All members are in one slice, so that a change of several is one change.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        version: str = "v1",
        fail: Callable[[bool], None] = lambda _fails: None,
        port: str = PORT_NAME,
    ) -> None:
        self._connect, self.version, self._fail, self._port = connect, version, fail, port
        self._api = CustomObjectsApi(connect())
        self._published: dict[str, str] = {}
        self._where = ("discovery.k8s.io", version, NAMESPACE, "endpointslices")

    def slices(self) -> ApiSlices:
        return ApiSlices(self._connect(), NAMESPACE, SERVICE)

    def open(self) -> KubernetesMembership:
        clock, rng = SystemClock(), random.Random(1)
        return KubernetesMembership(self.slices(), self._port, clock=clock, rng=rng)

    def put(self, item: dict[str, Any], *, known: bool) -> None:
        name = item["metadata"]["name"]
        if not known:
            self._api.create_namespaced_custom_object(*self._where, item)
            return
        self._api.replace_namespaced_custom_object(*self._where, name, item)

    def delete(self, name: str) -> None:
        self._api.delete_namespaced_custom_object(*self._where, name)

    def publish(self, addresses: Mapping[str, str]) -> None:
        if addresses == self._published:
            return
        if not addresses:
            self.delete("slice")
        else:
            places = {name: split_address("", address) for name, address in addresses.items()}
            endpoints = [endpoint(name, host) for name, (host, _) in places.items()]
            ports = {port for _, port in places.values()}
            item = slice_of("slice", endpoints, port=ports.pop(), version=self.version)
            self.put(item, known=bool(self._published))
        self._published = dict(addresses)

    def expected(self, addresses: Mapping[str, str]) -> Mapping[str, str]:
        return addresses

    def clear(self) -> None:
        """For the next test."""
        listed: Any = self._api.list_namespaced_custom_object(*self._where)
        for item in listed["items"]:
            self.delete(item["metadata"]["name"])

    def close(self) -> None:
        self._api.api_client.rest_client.pool_manager.clear()

    def fail(self) -> None:
        self._fail(True)

    def heal(self) -> None:
        self._fail(False)


def _watch_all(slices: ApiSlices, version: str) -> None:
    """Raises Expired, whichever way the server says so."""
    for event in slices.watch(version):
        assert event["type"] != "MODIFIED", "it remembers"
        if event["type"] == "ERROR" and event["object"]["code"] == 410:
            raise Expired


class KubernetesSuite(ChangingMembershipSuite):
    """What the stand-in and a real API server must do alike. Give `place` and `forget` too."""

    @pytest.fixture
    def forget(self) -> Callable[[], None]:
        """Makes the server forget its history up to now."""
        raise NotImplementedError("a subclass gives it")

    def test_an_old_version_is_expired(
        self, place: KubernetesPlace, forget: Callable[[], None]
    ) -> None:
        place.publish(ONE)
        slices = place.slices()
        _, version = slices.list()
        place.publish(TWO)
        forget()
        with pytest.raises(Expired):
            _watch_all(slices, version)
        slices.close()

    def test_a_watch_begins_after_the_version(self, place: KubernetesPlace) -> None:
        place.publish(ONE)
        slices = place.slices()
        _, version = slices.list()
        place.publish(TWO)
        place.publish({})
        watched = (event for event in slices.watch(version) if event["type"] != "BOOKMARK")
        first, second = next(watched), next(watched)
        watched.close()
        slices.close()
        assert [first["type"], second["type"]] == ["MODIFIED", "DELETED"]
        assert addresses_in([first["object"]], PORT_NAME) == TWO
        assert int(first["object"]["metadata"]["resourceVersion"]) > int(version)

    def test_another_service_is_not_seen(self, place: KubernetesPlace) -> None:
        place.publish(ONE)
        membership = place.open()
        other = slice_of("other", [endpoint("x", "10.0.0.9")], service="x", version=place.version)
        place.put(other, known=False)
        place.publish(TWO)
        until(lambda: membership.members.addresses == TWO)
        membership.close()

    def test_who_is_not_ready_is_no_member(self, place: KubernetesPlace) -> None:
        endpoints = [
            endpoint("a", "10.0.0.1"),
            endpoint("b", "10.0.0.2", ready=False),
            endpoint("c", "10.0.0.3", ready=None),
        ]
        place.put(slice_of("slice", endpoints, version=place.version), known=False)
        membership = place.open()
        assert membership.members.addresses == {"a": "10.0.0.1:8100", "c": "10.0.0.3:8100"}
        membership.close()

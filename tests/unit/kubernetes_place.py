"""EndpointSlices as a test publishes them, through the API that the membership reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from kubernetes.client import ApiClient, Configuration, CustomObjectsApi

from ochredb.clock import SystemClock
from ochredb.cluster.endpoint_slices import ApiSlices, KubernetesMembership
from ochredb.cluster.membership import split_address

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
        self._connect, self._version, self._fail, self._port = connect, version, fail, port
        self._api = CustomObjectsApi(connect())
        self._published: dict[str, str] = {}

    def open(self) -> KubernetesMembership:
        slices = ApiSlices(self._connect(), NAMESPACE, SERVICE)
        clock = SystemClock()
        return KubernetesMembership(slices, self._port, clock=clock, rng=random.Random(1))

    def put(self, item: dict[str, Any], *, known: bool) -> None:
        where = ("discovery.k8s.io", self._version, NAMESPACE, "endpointslices")
        name = item["metadata"]["name"]
        if not known:
            self._api.create_namespaced_custom_object(*where, item)
            return
        self._api.replace_namespaced_custom_object(*where, name, item)

    def delete(self, name: str) -> None:
        where = ("discovery.k8s.io", self._version, NAMESPACE, "endpointslices")
        self._api.delete_namespaced_custom_object(*where, name)

    def publish(self, addresses: Mapping[str, str]) -> None:
        if addresses == self._published:
            return
        if not addresses:
            self.delete("slice")
        else:
            places = {name: split_address("", address) for name, address in addresses.items()}
            endpoints = [endpoint(name, host) for name, (host, _) in places.items()]
            ports = {port for _, port in places.values()}
            item = slice_of("slice", endpoints, port=ports.pop(), version=self._version)
            self.put(item, known=bool(self._published))
        self._published = dict(addresses)

    def expected(self, addresses: Mapping[str, str]) -> Mapping[str, str]:
        return addresses

    def fail(self) -> None:
        self._fail(True)

    def heal(self) -> None:
        self._fail(False)

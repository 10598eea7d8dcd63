"""Members from Kubernetes: the ready endpoints of a service, named by their pods.

A list gives the EndpointSlices of the service and a resource version; a watch from that version on
gives each change as it happens. When the server has forgotten the version (410 Gone) the list is
taken again; when the connection fails, the same after a pause that grows, with jitter, so that a
returning API server does not meet everybody at once.

A watch may be dead without a word, as its server's host is gone: it is given up after minutes of
silence. So when a request fails, the list is taken beside the watch, too; if it has what the watch
did not say, it counts, and the watch begins anew behind it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import random
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import orjson

from ochredb.clock import Clock
from ochredb.cluster.membership import Lookout, Members, address_of
from ochredb.errors import InvalidArgument, Unavailable

log = logging.getLogger("ochredb.cluster")

Slice = dict[str, Any]
"""An EndpointSlice as JSON."""

_GROUP, _PLURAL = "discovery.k8s.io", "endpointslices"
_VERSIONS = ("v1", "v1beta1")  # The second: before Kubernetes 1.21.
_NAMESPACE_PATH = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
_CONNECT_S, _WATCH_S, _SILENCE_S = 3.0, 300, 330.0
_PAUSE_S, _PAUSE_S_MAX = 0.5, 30.0
_FIRST_WAIT_S = 2.0
_BESIDE_PERIOD_S = 2.0  # Between two lists beside a watch, however many requests fail.


class Expired(Exception):
    """410 Gone: the resource version is too old, list again."""


class Slices(Protocol):
    """The EndpointSlices of one service."""

    def list(self) -> tuple[list[Slice], str]:
        """All of them, and the resource version of that state. Raises Unavailable."""
        ...

    def watch(self, resource_version: str) -> Iterator[dict[str, Any]]:
        """Changes after that version: {"type": ..., "object": ...}; ends after some minutes.

        Raises Expired, Unavailable.
        """
        ...

    def hang_up(self) -> None:
        """End the watch of another thread, if one is open: it ends or raises Unavailable."""
        ...

    def interrupt(self) -> None:
        """The same for good."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class ApiSlices:
    """`Slices` by the API server, with the `kubernetes` client."""

    def __init__(self, api_client: Any, namespace: str, service: str) -> None:
        from kubernetes.client import CustomObjectsApi

        api_client.configuration.retries = False  # Repeats are made in one place, here.
        self._api = CustomObjectsApi(api_client)
        self._namespace, self._service = namespace, service
        self._version = 0  # In _VERSIONS.
        self._watched: Any = None
        self._is_closed = False

    def list(self) -> tuple[list[Slice], str]:
        with self._request(timeout_s=10.0) as response:
            answer = orjson.loads(response.data)
        return answer.get("items") or [], answer["metadata"]["resourceVersion"]

    def watch(self, resource_version: str) -> Iterator[dict[str, Any]]:
        more = {
            "watch": True,
            "resource_version": resource_version,
            "allow_watch_bookmarks": True,
            "timeout_seconds": _WATCH_S,
        }
        with self._request(timeout_s=_SILENCE_S, **more) as response:
            self._watched = response
            try:
                if not self._is_closed:
                    yield from (orjson.loads(line) for line in _lines(response))
            finally:
                self._watched = None

    def interrupt(self) -> None:
        self._is_closed = True
        self.hang_up()

    def hang_up(self) -> None:
        watched = self._watched
        if watched is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # It has just ended.
                watched.shutdown()

    def close(self) -> None:
        self._api.api_client.rest_client.pool_manager.clear()

    @contextlib.contextmanager
    def _request(self, *, timeout_s: float, **more: Any) -> Iterator[Any]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            response = self._open(timeout_s, more)
            try:
                yield response
            finally:
                response.close()
        except ApiException as error:
            if error.status == 410:
                raise Expired from error
            raise Unavailable(
                f"the Kubernetes API refused to list {_PLURAL}: {error.status} {error.reason}"
            ) from error
        except (HTTPError, OSError) as error:
            raise Unavailable(f"the Kubernetes API cannot be reached: {error}") from error
        except orjson.JSONDecodeError as error:
            raise Unavailable(f"the Kubernetes API did not answer in JSON: {error}") from error

    def _open(self, timeout_s: float, more: Mapping[str, Any]) -> Any:
        from kubernetes.client.exceptions import ApiException

        for version in range(self._version, len(_VERSIONS)):
            try:
                response = self._api.list_namespaced_custom_object(
                    _GROUP,
                    _VERSIONS[version],
                    self._namespace,
                    _PLURAL,
                    label_selector=f"kubernetes.io/service-name={self._service}",
                    _preload_content=False,
                    _request_timeout=(_CONNECT_S, timeout_s),
                    **more,
                )
            except ApiException as error:
                if error.status != 404 or version + 1 == len(_VERSIONS):
                    raise
            else:
                self._version = version
                return response
        raise AssertionError("the last version answers or raises")


def _lines(response: Any) -> Iterator[bytes]:
    """The lines of a stream, each as soon as it is there."""
    buffer = b""
    for chunk in response.stream(amt=None):
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())


class KubernetesMembership:
    """`Membership` by list and watch, in a thread; a second one lists beside the watch."""

    def __init__(self, slices: Slices, port: str, *, clock: Clock, rng: random.Random) -> None:
        """port: a number, or the name of a port of the service. Waits for the first list, 2 s."""
        self._slices, self._port, self._rng = slices, port, rng
        self.members = Members()
        self._lock = threading.Lock()  # Of what follows, up to the empty line.
        self._known: dict[str, Slice] = {}
        self._resource_version: str | None = None
        self._lists = 0  # A watch belongs to the list that it began behind, and ends with it.
        self._changes = 0  # That watches have told.

        self._failures = 0
        self._is_watching = self._is_asked = self._failed_beside = False
        self._looked = threading.Event()
        self._lookout = Lookout("ochredb-kubernetes", self._look, clock)
        self._beside = Lookout(
            "ochredb-kubernetes-list", self._look_beside, clock, _BESIDE_PERIOD_S
        )
        self._lookout.start()
        self._beside.start()
        self._looked.wait(_FIRST_WAIT_S)

    def refresh(self) -> None:
        self._is_asked = True
        self._lookout.hurry()
        self._beside.hurry()

    def close(self) -> None:
        self._lookout.close(self._slices.interrupt)
        self._beside.close()
        self._slices.close()

    def _look(self) -> float:
        """List if need be, then watch until that ends."""
        listed = self._lists
        try:
            if self._resource_version is None:
                self._take(*self._slices.list())
            with self._lock:
                listed, version = self._lists, self._resource_version
            assert version is not None
            self._is_watching = True
            self._watch(version, listed)
        except Expired:
            self._forget(listed)
            return 0.0
        except Unavailable as error:
            if not self._forget(listed):
                return 0.0
            if self._failures == 0 and not self._lookout.is_closed:
                log.warning("going on with the members that were known: %s", error)
            self._failures += 1
            longest_s = min(_PAUSE_S_MAX, _PAUSE_S * 2.0 ** min(self._failures - 1, 10))
            return longest_s * self._rng.uniform(0.5, 1.0)
        finally:
            self._is_watching = False
            self._looked.set()
        return 0.0

    def _look_beside(self) -> None:
        """List while the other thread watches, if a request has failed since the last time."""
        if not (self._is_asked and self._is_watching):
            return
        self._is_asked = False
        before = self._lists, self._changes
        try:
            slices, version = self._slices.list()
        except (Expired, Unavailable) as error:
            if not self._failed_beside and not self._beside.is_closed:
                log.warning("a request failed, and where its nodes are cannot be seen: %s", error)
            self._failed_beside = True
            return
        self._failed_beside = False
        if self._take(slices, version, unless_since=before):
            log.info("the watch has not told what a list shows: it begins anew")
            self._slices.hang_up()

    def _take(
        self,
        slices: list[Slice],
        resource_version: str,
        *,
        unless_since: tuple[int, int] | None = None,
    ) -> bool:
        """The state is this now; returns whether it is.

        unless_since: so many lists and changes. What was told since then may be newer than this,
        and a watch that tells something lives; then, and if this is nothing new, all stays.
        """
        known = {item["metadata"]["name"]: item for item in slices}
        with self._lock:
            if unless_since is not None and (
                (self._lists, self._changes) != unless_since
                or _versions(known) == _versions(self._known)
            ):
                return False
            self._known, self._resource_version = known, resource_version
            self._lists += 1
            self._show()
        self._failures = 0
        self._looked.set()
        return True

    def _forget(self, listed: int) -> bool:
        """List before the next watch; False if that was done meanwhile, beside this one."""
        with self._lock:
            if self._lists != listed:
                return False
            self._resource_version = None
            return True

    def _watch(self, resource_version: str, listed: int) -> None:
        for event in self._slices.watch(resource_version):
            changed = event["object"]
            if event["type"] == "ERROR":
                if changed.get("code") == 410:
                    raise Expired
                raise Unavailable(f"the watch ended: {changed.get('message')}")
            with self._lock:
                if self._lists != listed:
                    return
                self._resource_version = changed["metadata"]["resourceVersion"]
                self._failures = 0
                if event["type"] == "BOOKMARK":
                    continue
                self._changes += 1
                name = changed["metadata"]["name"]
                if event["type"] == "DELETED":
                    self._known.pop(name, None)
                else:
                    self._known[name] = changed
                self._show()

    def _show(self) -> None:
        self.members = self.members.then(addresses_in(self._known.values(), self._port))


def _versions(known: Mapping[str, Slice]) -> dict[str, str]:
    return {name: item["metadata"]["resourceVersion"] for name, item in known.items()}


def addresses_in(slices: Iterable[Slice], port: str) -> dict[str, str]:
    """Stable name -> address of the ready endpoints. A pod may be in two slices for a moment."""
    addresses: dict[str, str] = {}
    for item in slices:
        number = _port_in(item, port)
        if number is None:
            continue
        for endpoint in item.get("endpoints") or []:
            # Not said means ready, the API says.
            if (endpoint.get("conditions") or {}).get("ready") is False:
                continue
            host = endpoint["addresses"][0]
            target = endpoint.get("targetRef") or {}
            pod = target.get("name") if target.get("kind") == "Pod" else None
            address = address_of(host, number)
            addresses[pod or endpoint.get("hostname") or address] = address
    return addresses


def _port_in(item: Slice, port: str) -> int | None:
    if port.isdigit():
        return int(port)
    numbers = (one.get("port") for one in item.get("ports") or [] if one.get("name") == port)
    return next(numbers, None)


def open_kubernetes(
    setting: str, text: str, *, clock: Clock, rng: random.Random
) -> KubernetesMembership:
    """For `[NAMESPACE/]SERVICE:PORT`. Inside of a cluster its service account is used, outside the
    user's configuration. Raises InvalidArgument.
    """
    place, colon, port = text.rpartition(":")
    namespace, _, service = place.rpartition("/")
    if not colon or not service or not port:
        raise InvalidArgument(f"members {setting!r}: {text!r} is not [NAMESPACE/]SERVICE:PORT")
    try:
        from kubernetes.client import ApiClient, Configuration

        config: Any = importlib.import_module("kubernetes.config")
    except ImportError as error:
        raise InvalidArgument(
            f"members {setting!r}: the kubernetes package is missing: install ochredb[cluster]"
        ) from error
    configuration = Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise InvalidArgument(f"members {setting!r}: {error}") from error
    slices = ApiSlices(ApiClient(configuration), namespace or _own_namespace(), service)
    return KubernetesMembership(slices, port, clock=clock, rng=rng)


def _own_namespace() -> str:
    try:
        with open(_NAMESPACE_PATH, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return "default"

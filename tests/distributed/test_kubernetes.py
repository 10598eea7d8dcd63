"""The membership's list and watch against a real API server, if KUBE_APISERVER names one."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from tests.components.kube_apiserver import KubeApiserver
from tests.unit.kubernetes_place import KubernetesPlace, KubernetesSuite, client

_VERSION = "v1beta1"  # Of Kubernetes 1.20, which can be built from Debian's sources.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiserver]:
    server = KubeApiserver.start(tmp_path_factory.mktemp("kubernetes"))
    yield server
    server.stop()
    # urllib3 leaves a connection that was cut in its handshake to the collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
class TestKubernetes(KubernetesSuite):
    @pytest.fixture
    def place(self, server: KubeApiserver) -> Iterator[KubernetesPlace]:
        def fail(fails: bool) -> None:
            if fails:
                server.kill()
            else:
                server.restart()

        place = KubernetesPlace(
            lambda: client(server.url, server.token), version=_VERSION, fail=fail
        )
        place.clear()
        yield place
        place.clear()
        place.close()

    @pytest.fixture
    def forget(self) -> Callable[[], None]:
        return lambda: time.sleep(5.0)  # Two rounds of compaction, and a little.

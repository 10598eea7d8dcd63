"""A real kube-apiserver with its etcd, where somebody has built one: KUBE_APISERVER=path.

There is no kubelet and no controller: the test makes the objects that those would make.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from ochredb.testing.server_process import free_port

_START_WAIT_S = 120.0
_TOKEN = "test"


class KubeApiserver:
    """`url` and `token` to connect; its certificate is its own. etcd runs until `stop`."""

    token = _TOKEN

    def __init__(self, binary: str, root: Path) -> None:
        self._binary, self._root = binary, root
        self._port, self._etcd_port = free_port(), free_port()
        self._etcd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, root: Path) -> KubeApiserver:
        """Skips the test where there is no binary: building one takes ten minutes or more."""
        binary = os.environ.get("KUBE_APISERVER")
        if not binary:
            pytest.skip("KUBE_APISERVER does not name a kube-apiserver")
        if shutil.which("etcd") is None:
            pytest.skip("etcd is not installed (apt-get install etcd-server)")
        root.mkdir(parents=True, exist_ok=True)
        server = cls(binary, root)
        server._start_etcd()
        server.restart()
        return server

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def _start_etcd(self) -> None:
        url, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{free_port()}"
        command = [
            "etcd", "--name", "one", "--data-dir", str(self._root / "etcd"),
            "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"one={peer}",
        ]  # fmt: skip
        log = (self._root / "etcd.log").open("ab")
        with log:
            self._etcd = subprocess.Popen(command, stdout=log, stderr=log)

    def restart(self) -> None:
        """Again on the same port and the same etcd."""
        self.kill()
        key, tokens = self._root / "sa.key", self._root / "tokens.csv"
        if not key.exists():
            subprocess.run(
                ["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True
            )
            tokens.write_text(f'{_TOKEN},admin,1,"system:masters"\n')
        command = [
            self._binary, f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}", "--insecure-port=0",
            f"--cert-dir={self._root / 'certs'}", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--disable-admission-plugins=ServiceAccount",
            # Versions are forgotten after a second or two, and a watch asks etcd for them.
            "--etcd-compaction-interval=1s", "--watch-cache=false",
        ]  # fmt: skip
        log = (self._root / "apiserver.log").open("ab")
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_WAIT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._root / "apiserver.log").read_text()[-4000:])
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        request = urllib.request.Request(
            f"{self.url}/readyz", headers={"Authorization": f"Bearer {_TOKEN}"}
        )
        context = ssl._create_unverified_context()
        try:
            with urllib.request.urlopen(request, timeout=2, context=context) as answer:
                return bool(answer.status == 200)
        except OSError:  # Not listening yet, or not ready: 500.
            return False

    def kill(self) -> None:
        """The API server; what it knows is in etcd."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        self.kill()
        if self._etcd is not None:
            self._etcd.terminate()
            self._etcd.wait()
            self._etcd = None

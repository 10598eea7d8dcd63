"""A real object store: Ceph's RGW over one monitor and one OSD, on loopback, durable.

    ceph = CephServer.start(root)
    ceph.create_bucket("one")          # one per test; a cluster takes 15 s to start
    ceph.kill(), ceph.restart()        # kill -9 of everything; the same ports and data
    ceph.tls_url, ceph.authority.ca    # the same by TLS; buckets are there names of hosts, too

Needs the Debian packages of `PACKAGES`. Everything ends with the process that started it.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from ochredb.testing.server_process import HOST, free_port
from tests.components.certificates import Authority

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-common")
PROGRAMS = (
    "ceph-mon",
    "ceph-osd",
    "radosgw",
    "ceph",
    "ceph-authtool",
    "monmaptool",
    "setpriv",
    "openssl",
)
ACCESS_KEY, SECRET_KEY = "test-access", "test-secret"
START_S_MAX = 90.0

# cephx stays: without it radosgw finds no user of its own.
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor_port}
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind port min = 20000
ms bind port max = 24000
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
run dir = {root}/run
admin socket = {root}/run/$cluster-$name.asok
pid file = {root}/run/$name.pid
log file = {root}/run/$name.log
mon cluster log file = {root}/run/cluster.log
crash dir = {root}/run
keyring = {root}/keyring
osd objectstore = bluestore
bluestore block size = 8589934592
osd class load list = *
osd class default list = *
[mon.a]
mon data = {root}/monitor
[osd.0]
osd data = {root}/osd
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1 ssl_endpoint=127.0.0.1:{tls_port} \
 ssl_certificate={certificate} ssl_private_key={key}
rgw dns name = {domain}
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = {kms_key}={kms_secret}
rgw thread pool size = 64
"""


class CephServer:
    """One cluster. url: of the S3 endpoint, which wants path-style addressing.

    tls_url: the same with a certificate of `authority`, for 127.0.0.1, `domain`, and its buckets.
    kms_key: what objects may be encrypted with, by TLS.
    """

    access_key, secret_key = ACCESS_KEY, SECRET_KEY
    domain, kms_key = "s3.test", "key-1"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.tls_port = free_port()
        self.tls_url = f"https://{HOST}:{self.tls_port}"
        self.authority = Authority(root / "authority")
        self._monitor_port = free_port()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def start(cls, root: Path) -> CephServer:
        """Make and start a cluster in `root`, which is created. Skips where Ceph cannot be had."""
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            pytest.skip(f"NOT TESTED: {', '.join(missing)} missing; install {' '.join(PACKAGES)}")
        server = cls(root)
        try:
            server._make()
        except BaseException:
            server.kill()
            raise
        return server

    def client(self, *, tls: bool = False) -> Any:
        """boto3's, with the right credentials."""
        return boto3.client(
            "s3",
            endpoint_url=self.tls_url if tls else self.url,
            verify=self.authority.ca if tls else None,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}),
        )

    def create_bucket(self, name: str) -> str:
        """Returns the name."""
        client = self.client()
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def stop(self) -> None:
        """End it in an orderly way; `restart` brings it back."""
        for name in reversed(list(self._daemons)):
            self._daemons[name].terminate()
            try:
                self._daemons.pop(name).wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self, *names: str) -> None:
        """kill -9 of these daemons (`monitor`, `osd`, `rgw`), of all without names."""
        for name in names or list(self._daemons):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()

    def restart(self) -> None:
        """Start what does not run; returns when the endpoint answers."""
        if "monitor" not in self._daemons:
            self._launch("monitor", "ceph-mon", "-f", "-i", "a")
        if "osd" not in self._daemons:
            self._launch("osd", "ceph-osd", "-f", "-i", "0")
        if "rgw" not in self._daemons:
            self._launch("rgw", "radosgw", "-f", "-n", "client.rgw.a")
        self._wait()

    # -- making

    def _make(self) -> None:
        for folder in ("monitor", "osd", "run"):
            (self.root / folder).mkdir(parents=True)
        self.authority = Authority.make(self.root / "authority")
        names = f"IP:{HOST},DNS:{self.domain},DNS:*.{self.domain}"
        certificate, key = self.authority.certificate("rgw", names)
        fsid = str(uuid.uuid4())
        (self.root / "ceph.conf").write_text(
            _CONFIGURATION.format(
                fsid=fsid,
                root=self.root,
                port=self.port,
                monitor_port=self._monitor_port,
                tls_port=self.tls_port,
                certificate=certificate,
                key=key,
                domain=self.domain,
                kms_key=self.kms_key,
                kms_secret=base64.b64encode(bytes(range(32))).decode(),
            )
        )
        keyring, monitors = str(self.root / "keyring"), str(self.root / "monmap")
        for user, capabilities in {
            "mon.": ("mon", "allow *"),
            "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
            "client.rgw.a": ("mon", "allow rwx", "osd", "allow rwx"),
            "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
        }.items():
            pairs = zip(capabilities[::2], capabilities[1::2], strict=True)
            flags = [flag for pair in pairs for flag in ("--cap", *pair)]
            create = () if os.path.exists(keyring) else ("--create-keyring",)
            self._run("ceph-authtool", *create, keyring, "--gen-key", "-n", user, *flags)
        address = f"[v2:{HOST}:{self._monitor_port}]"
        self._run(
            *("monmaptool", "--create", "--clobber", "--addv", "a", address),
            *("--fsid", fsid, monitors),
        )
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keyring)
        self._launch("monitor", "ceph-mon", "-f", "-i", "a")
        self._run("ceph", "--connect-timeout", "30", "auth", "import", "-i", keyring)
        osd = str(uuid.uuid4())
        self._run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._launch("osd", "ceph-osd", "-f", "-i", "0")
        place = ("osd", "crush", "add", "osd.0", "1.0", "host=h", "root=default")
        self._run("ceph", "--connect-timeout", "30", *place)
        self._launch("rgw", "radosgw", "-f", "-n", "client.rgw.a")
        self._run(
            *("radosgw-admin", "user", "create", "--uid=test", "--display-name=test"),
            *(f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"),
        )
        self._wait()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.root / "ceph.conf")}

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=False,
            timeout=START_S_MAX,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    def _launch(self, name: str, *command: str) -> None:
        with open(self.root / "run" / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                # A test process that is killed takes its daemons with it.
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _wait(self) -> None:
        until_s = time.monotonic() + START_S_MAX
        problem: object = None
        while time.monotonic() < until_s:
            for name, daemon in self._daemons.items():
                code = daemon.poll()
                if code is not None:
                    tail = (self.root / "run" / f"{name}.out").read_text(errors="replace")[-2000:]
                    raise AssertionError(f"{name} ended with {code}: {tail}")
            try:
                with urllib.request.urlopen(self.url, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError) as error:
                problem = error
            time.sleep(0.1)
        raise AssertionError(f"no answer from {self.url} after {START_S_MAX} s: {problem}")

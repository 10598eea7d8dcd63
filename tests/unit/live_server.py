"""A frontend behind a real socket, in a thread, with the roles behind it in memory."""

from __future__ import annotations

import threading
import time

import httpx

from ochredb_frontend.app import App
from ochredb_frontend.config import FrontendConfig
from ochredb_frontend.server import Companion, Server, listen, url_of
from ochredb_frontend.service import Frontend

from .fake_roles import make_frontend

DATABASE = "/api/v2/tenants/default_tenant/databases/default_database"
ONE = {"ids": ["a"], "embeddings": [[1.0, 2.0]]}


class Live:
    """A server in a thread, and a client of it."""

    def __init__(
        self,
        config: FrontendConfig | Frontend | None = None,
        *,
        companion: Companion | None = None,
    ) -> None:
        """config: of a frontend with roles in memory; or another frontend."""
        if isinstance(config, Frontend):
            frontend = config
        else:
            frontend, self.world = make_frontend(config)
        self.app = App(frontend)
        sock = listen("127.0.0.1", 0)
        self.address = sock.getsockname()
        ready = threading.Event()
        self.server = Server(
            self.app,
            sock,
            on_ready=lambda _url: ready.set(),
            drain_timeout_s=5,
            companion=companion,
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert ready.wait(10)
        self.http = httpx.Client(base_url=url_of(sock), trust_env=False)

    def collection(self) -> str:
        answer = self.http.post(f"{DATABASE}/collections", json={"name": f"c-{time.time_ns()}"})
        path = f"{DATABASE}/collections/{answer.json()['id']}"
        assert self.http.post(f"{path}/add", json=ONE).status_code == 201
        return path

    def close(self) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.http.close()


class Starter:
    """Starts servers that end with the test."""

    def __init__(self) -> None:
        self.started: list[Live] = []

    def __call__(self, config: FrontendConfig | None = None) -> Live:
        self.started.append(Live(config))
        return self.started[-1]

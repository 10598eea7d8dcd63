"""When a server starts reader processes, what it moves to them, and when it lets them go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from ochredb.metrics import Metrics
from ochredb_frontend import channel
from ochredb_frontend.channel import Channel
from ochredb_frontend.protocol import READS_IN_A_ROW
from ochredb_frontend.sharing import TURN_S, Sharing, to_move

from .kernel import ManualClock


@dataclass(eq=False)
class FakeProtocol:
    requests: int = 0
    reads_in_a_row: int = READS_IN_A_ROW
    left_by: list[Channel] = field(default_factory=list)

    def leave(self, there: Channel) -> None:
        self.left_by.append(there)
        self.requests = self.reads_in_a_row = 0


class Process:
    """The other end of a channel."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock.dup()
        self.sock.setblocking(False)
        self.says: dict[str, float] | None = None

    def report(
        self, share: float, active: int, connections: int | None = None, *, ready: bool = True
    ) -> None:
        """From now on, each turn."""
        connections = active if connections is None else connections
        self.says = {"share": share, "active": active, "connections": connections, "ready": ready}

    def go_on(self) -> None:
        if self.says is not None:
            metrics = Metrics()
            metrics.observe("collection_get", 200, 0.002)
            report = {**self.says, "metrics": metrics.take()}
            with contextlib.suppress(BrokenPipeError):  # It was let go.
                self.sock.send(channel.REPORT + json.dumps(report).encode())

    def told(self) -> list[bytes]:
        """What it was told since the last call; b"" is the end."""
        found = []
        while True:
            try:
                found.append(self.sock.recv(1 << 16))
            except BlockingIOError:
                return found
            if not found[-1]:
                return found


class World:
    """A server's companion, whose processor and processes are the test's."""

    def __init__(self, readers_max: int = 1) -> None:
        self.clock, self.used_s = ManualClock(), 0.0
        self.connections: list[FakeProtocol] = []
        self.processes: list[Process] = []
        self.failure: OSError | None = None
        self.damaged: list[str] = []
        self.metrics = Metrics()
        self.sharing = Sharing(
            self._start,
            readers_max=readers_max,
            metrics=self.metrics,
            clock=self.clock,
            on_damaged=self.damaged.append,
            read_lately=lambda: ["c-1", "c-2"],
            processor_s=lambda: self.used_s,
        )
        self.sharing.begin(self)  # type: ignore[arg-type]

    def _start(self, sock: socket.socket) -> None:
        if self.failure is not None:
            raise self.failure
        self.processes.append(Process(sock))

    def adopt(self, sock: socket.socket, read: bytes) -> None:
        raise AssertionError("nothing comes back")

    def stop(self) -> None:
        raise AssertionError("a server outlives its readers")

    async def turns(self, count: int, share: float, requests: int = 20) -> None:
        """So many turns, of a processor used to this share, `requests` over each connection."""
        for _ in range(count):
            for protocol in self.connections:
                protocol.requests = 0 if protocol.left_by else requests
            for process in self.processes:
                process.go_on()
            await self._arrive()
            self.clock.advance(TURN_S)
            self.used_s += share * TURN_S
            self.sharing.turn()
            while any(thread.name == "start-reader" for thread in threading.enumerate()):
                await asyncio.sleep(0.001)
            await self._arrive()

    async def _arrive(self) -> None:
        """What was sent does."""
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def moved(self) -> int:
        return sum(bool(protocol.left_by) for protocol in self.connections)

    def clients(self, count: int, reads_in_a_row: int = READS_IN_A_ROW) -> list[FakeProtocol]:
        made = [FakeProtocol(reads_in_a_row=reads_in_a_row) for _ in range(count)]
        self.connections += made
        return made

    async def process_of_crowd(self) -> Process:
        """Of eight clients that only read; it has not said yet that it is ready."""
        self.clients(8)
        await self.turns(3, 0.95)
        (process,) = self.processes
        return process

    async def reader_of_crowd(self) -> Process:
        """The same when it is ready and connections have moved there."""
        process = await self.process_of_crowd()
        process.report(0.0, 0)
        await self.turns(2, 0.95)
        return process


def play(scene: Callable[[World], Awaitable[None]], readers_max: int = 1) -> None:
    async def run() -> None:
        world = World(readers_max)
        try:
            await scene(world)
        finally:
            world.sharing.end()
            for process in world.processes:
                process.sock.close()

    asyncio.run(run())


def test_as_many_move_as_make_both_equally_busy() -> None:
    assert to_move(8, 1.0, 0.0) == 4
    assert to_move(1, 1.2, 0.1) == 1, "a single reader goes away from writers"
    assert to_move(8, 0.95, 0.9) == 0
    assert to_move(8, 0.5, 0.0) == 0
    assert to_move(0, 1.0, 0.0) == 0
    assert to_move(8, 0.9, 2.0) == 0


def test_a_crowd_gets_a_process_and_half_of_it_moves() -> None:
    async def scene(world: World) -> None:
        world.clients(8)
        await world.turns(1, 0.95)
        assert world.processes == []
        await world.turns(1, 0.95)
        (process,) = world.processes
        await world.turns(3, 0.95)
        assert world.moved == 0, "it has not said anything"
        assert process.told() == [channel.OPEN + b'["c-1","c-2"]']
        process.report(0.5, 0, ready=False)
        await world.turns(3, 0.95)
        assert world.moved == 0, "it opens these"
        process.report(0.0, 0)
        await world.turns(1, 0.95)
        await world.turns(1, 0.95)
        assert world.moved == 4
        process.report(0.9, 4)
        before = world.metrics.requests("collection_get", 200)
        await world.turns(20, 0.95)
        assert world.moved == 4
        assert len(world.processes) == 1, "no more than may be"
        assert b"ochredb_reader_connections 4" in world.metrics.text()
        assert world.metrics.requests("collection_get", 200) == before + 20
        assert not world.processes[0].told()

    play(scene)


@pytest.mark.parametrize(
    ("clients", "share", "requests", "reads_in_a_row"),
    [
        (1, 1.0, 300, READS_IN_A_ROW),  # It waits for each answer: nobody else wants a processor.
        (8, 0.5, 20, READS_IN_A_ROW),
        (8, 1.0, 1, READS_IN_A_ROW),
        (8, 1.0, 20, 0),  # They write.
    ],
)
def test_no_process_is_started_for(
    clients: int, share: float, requests: int, reads_in_a_row: int
) -> None:
    async def scene(world: World) -> None:
        world.clients(clients, reads_in_a_row=reads_in_a_row)
        await world.turns(20, share, requests)
        assert world.processes == []

    play(scene)


def test_one_that_was_long_and_busy_opening_gets_connections() -> None:
    async def scene(world: World) -> None:
        world.clients(8)
        await world.turns(2, 0.95)
        (process,) = world.processes
        process.report(0.9, 0, ready=False)
        await world.turns(65, 0.95)
        process.told()
        process.report(0.9, 0)  # Of the half second in which it still opened.
        await world.turns(1, 0.95)
        assert world.moved == 4
        assert len(world.processes) == 1
        assert process.told() == [], "it is not told to give back"
        world.sharing.appended("c-1", 17)
        assert process.told() == [channel.APPENDED + b"c-1 17"]

    play(scene, readers_max=3)


def test_crowds_far_apart_are_none() -> None:
    async def scene(world: World) -> None:
        world.clients(8)
        for _ in range(5):
            await world.turns(1, 0.95)
            await world.turns(25, 0.1)
        assert world.processes == []

    play(scene)


def test_a_reader_goes_away_from_writers() -> None:
    async def scene(world: World) -> None:
        world.clients(4, reads_in_a_row=0)
        (reads,) = world.clients(1)
        await world.turns(3, 1.3, 80)
        world.processes[0].report(0.0, 0)
        await world.turns(2, 1.3, 80)
        assert reads.left_by and world.moved == 1
        world.processes[0].report(0.8, 1)
        await world.turns(1, 0.5, 80)
        assert world.sharing.reads
        world.processes[0].told()
        world.sharing.appended("c-1", 17)
        assert world.processes[0].told() == [channel.APPENDED + b"c-1 17"]

    play(scene)


def test_new_connections_go_where_fewer_are() -> None:
    async def scene(world: World) -> None:
        world.clients(2)
        await world.turns(3, 0.95, 60)
        world.processes[0].report(0.0, 0)
        await world.turns(2, 0.95, 60)
        assert world.moved == 1
        world.processes[0].report(0.9, 0)  # Its client has gone, and so have the others.
        world.connections.clear()
        await world.turns(1, 0.1)
        fresh = world.clients(8)
        for protocol in fresh:
            world.sharing.consider(protocol)  # type: ignore[arg-type]
        assert world.moved == 4

    play(scene)


def test_what_is_not_needed_any_more_gives_back_and_ends() -> None:
    async def scene(world: World) -> None:
        process = await world.reader_of_crowd()
        process.told()
        process.report(0.1, 4)
        await world.turns(70, 0.1)
        assert process.told() == [channel.GIVE_BACK]
        process.report(0.0, 0, connections=1)
        await world.turns(10, 0.1)
        assert process.told() == [], "a connection is still there"
        process.report(0.0, 0, connections=0)
        await world.turns(2, 0.1)
        assert process.told() == [b""]
        assert b"ochredb_reader_processes 0" in world.metrics.text()
        for protocol in world.connections:
            protocol.left_by.clear()
            protocol.reads_in_a_row = READS_IN_A_ROW
        await world.turns(4, 0.95)
        assert len(world.processes) == 2, "another crowd, another process"

    play(scene)


def test_several_processes_on_a_larger_machine() -> None:
    async def scene(world: World) -> None:
        world.clients(12)
        await world.turns(3, 1.0)
        world.processes[0].report(0.0, 0)
        await world.turns(2, 1.0)
        assert (len(world.processes), world.moved) == (1, 6)
        world.processes[0].report(0.95, 6)
        await world.turns(4, 1.0)
        assert len(world.processes) == 2
        await world.turns(10, 1.0)
        assert len(world.processes) == 2, "one after the other"
        world.processes[1].report(0.0, 0)
        await world.turns(2, 1.0)
        assert world.moved == 9

    play(scene, readers_max=3)


def test_one_that_dies_or_cannot_start_is_not_started_again_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene(world: World) -> None:
        world.failure = OSError("no memory")
        world.clients(8)
        await world.turns(20, 0.95)
        assert caplog.text.count("cannot be started: no memory") == 1
        world.failure = None
        await world.turns(60, 0.95)
        (process,) = world.processes
        process.report(0.0, 0)
        await world.turns(2, 0.95)
        process.says = None
        process.sock.close()
        await world.turns(10, 0.95)
        assert caplog.text.count("a reader process with") == 1
        assert len(world.processes) == 1
        await world.turns(60, 0.95)
        assert len(world.processes) == 2

    play(scene)


def test_an_idle_server_takes_connections_back_from_a_busy_reader() -> None:
    async def scene(world: World) -> None:
        process = await world.reader_of_crowd()
        process.report(0.95, 4)
        world.connections = [one for one in world.connections if one.left_by]
        process.told()
        await world.turns(6, 0.02)
        assert process.told()[:1] == [channel.GIVE_BACK + b"2"]
        process.report(0.95, 1)
        await world.turns(10, 0.02)
        process.told()
        await world.turns(10, 0.02)
        assert process.told() == [], "a single one is left where it is"

    play(scene)


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_process_that_says_nothing_is_given_up(was_ready: bool) -> None:
    async def scene(world: World) -> None:
        process = await world.process_of_crowd()
        if was_ready:
            process.report(0.5, 0)
            await world.turns(2, 0.1)
            process.says = None
        world.connections.clear()
        world.clients(8)
        await world.turns(8, 0.95)
        moved = world.moved
        await world.turns(20, 0.95)
        assert world.moved == moved <= 4, "nothing goes to a process that is silent"
        await world.turns(50, 0.95)
        assert process.told()[-1:] == [b""]
        await world.turns(60, 0.95)
        assert len(world.processes) == 2

    play(scene)


def test_one_that_cannot_give_everything_back_ends_nevertheless() -> None:
    """A client that never reads its answer keeps its connection there."""

    async def scene(world: World) -> None:
        process = await world.reader_of_crowd()
        process.report(0.0, 0, connections=1)
        await world.turns(70, 0.1)
        assert channel.GIVE_BACK in process.told()
        for protocol in world.connections:
            protocol.left_by.clear()
            protocol.reads_in_a_row = READS_IN_A_ROW
        await world.turns(6, 0.95)
        assert len(world.processes) == 2, "it does not keep others from being started"
        world.processes[1].report(0.5, 0)
        await world.turns(125, 0.1)
        assert process.told()[-1:] == [b""]

    play(scene)


def test_damage_that_a_reader_finds_is_told() -> None:
    async def scene(world: World) -> None:
        world.clients(8)
        await world.turns(3, 0.95)
        world.processes[0].sock.send(channel.DAMAGED + b"part-1")
        await world.turns(1, 0.95)
        assert world.damaged == ["part-1"]

    play(scene)

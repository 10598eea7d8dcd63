"""Hosts in network namespaces, and partitions between them by nftables.

Each host is a namespace of its own, joined by a veth pair to this process's, the hub, through which
all packets between hosts go: rules are needed only here. This process must be in a namespace of its
own too (`make test-distributed` sees to that with `unshare`), so that nothing of the machine's is
touched and nothing is left.

    network = Network.build(["log-0", "log-1"])
    network.cut(HUB, "log-0", port=5432)              both directions
    network.drop("log-0", HUB, port=5432)             what log-0 sends to it, and nothing else
    assert network.heal() > 0                         packets that were dropped
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

HUB = "hub"
_TABLE = "ochredb"
_CHAINS = ("input", "output", "forward")


def own_namespace() -> bool:
    """Whether this process runs where hosts may be made: see in_namespace.sh."""
    return os.environ.get("OCHREDB_TEST_OWN_NETWORK") == "1"


@dataclass
class Network:
    hosts: Sequence[str]
    subnet = "10.77.0.0/16"  # Of all hosts, and of the hub as they see it.

    @classmethod
    def build(cls, hosts: Sequence[str]) -> Self:
        assert own_namespace(), "would change the machine's own network"
        _run("ip", "link", "set", "lo", "up")
        for number, host in enumerate(hosts):
            inside, outside = f"in{number}", f"out{number}"
            _run("ip", "netns", "add", host)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", inside, "netns", host)
            _run("ip", "address", "add", f"10.77.{number}.1/30", "dev", outside)
            _run("ip", "link", "set", outside, "up")
            there = ("ip", "-n", host)
            _run(*there, "address", "add", f"10.77.{number}.2/30", "dev", inside)
            _run(*there, "link", "set", inside, "up")
            _run(*there, "link", "set", "lo", "up")
            _run(*there, "route", "add", "default", "via", f"10.77.{number}.1")
        with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
            file.write("1")
        network = cls(list(hosts))
        network.heal()
        return network

    def address(self, host: str) -> str:
        return f"10.77.{self.hosts.index(host)}.2"

    def hub_address(self, host: str) -> str:
        """The hub's, as this host reaches it."""
        return f"10.77.{self.hosts.index(host)}.1"

    def namespace(self, host: str) -> str:
        return f"/run/netns/{host}"

    def cut(self, one: str, other: str, *, port: int | None = None) -> None:
        """Drop everything between two hosts; with a port only what goes to it at `other`."""
        self.drop(one, other, port=port)
        self.drop(other, one, from_port=port)

    def drop(
        self, source: str, target: str, *, port: int | None = None, from_port: int | None = None
    ) -> None:
        """Drop what goes in one direction. A port of the target, or one of the source."""
        chain, matches = "forward", []
        if source == HUB:
            chain = "output"
        else:
            matches.append(f"ip saddr {self.address(source)}")
        if target == HUB:
            chain = "input"
        else:
            matches.append(f"ip daddr {self.address(target)}")
        if port is not None:
            matches.append(f"tcp dport {port}")
        if from_port is not None:
            matches.append(f"tcp sport {from_port}")
        _nft(f"add rule inet {_TABLE} {chain} {' '.join(matches)} counter drop")

    def isolate(self, host: str) -> None:
        """Drop everything from and to a host, but what it says to itself."""
        address = self.address(host)
        for chain in _CHAINS:
            for match in (f"ip saddr {address}", f"ip daddr {address}"):
                _nft(f"add rule inet {_TABLE} {chain} {match} counter drop")

    def heal(self) -> int:
        """Drop nothing any more; returns how many packets were dropped since the last time."""
        dropped = 0
        listed = json.loads(_run("nft", "-j", "list", "ruleset"))["nftables"]
        for item in listed:
            for step in item.get("rule", {}).get("expr", ()):
                dropped += step.get("counter", {}).get("packets", 0) if "counter" in step else 0
        lines = [f"add table inet {_TABLE}", f"delete table inet {_TABLE}"]
        lines.append(f"add table inet {_TABLE}")
        for chain in _CHAINS:
            hook = f"{{ type filter hook {chain} priority 0 ; }}"
            lines.append(f"add chain inet {_TABLE} {chain} {hook}")
        _nft("\n".join(lines))
        return dropped


def _nft(commands: str) -> None:
    _run("nft", "-f", "-", text=commands + "\n")


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{text}"
    return done.stdout

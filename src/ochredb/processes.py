"""Names for processes that tell, later and to others, whether the process is gone.

A name is `place/pid/start/random`. The place is one boot of one machine and one namespace of
process numbers: only in the same place does a number mean anything. The start tells a process from
a later one with its number. Containers, even of one host name, and hosts that share a directory
are different places, whose processes nobody here can judge.
"""

from __future__ import annotations

import functools
import os
import socket

from ochredb.ids import IdSource

_BOOT_FILE = "/proc/sys/kernel/random/boot_id"
_NAMESPACE_LINK = "/proc/self/ns/pid"
_ENDED_STATES = ("Z", "X")  # A zombie holds nothing any more; its parent has not looked yet.


def process_name(ids: IdSource) -> str:
    """This process's name; another one each time, of one process too."""
    pid = os.getpid()
    state = _state(pid)
    return f"{_place()}/{pid}/{state[1] if state else ''}/{ids.uuid7()}"


def is_gone(name: str) -> bool:
    """Whether the process of this name certainly does not run any more."""
    place, _, rest = name.partition("/")
    number, _, rest = rest.partition("/")
    if place != _place() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # Somebody else's process, but it is there.
    state = _state(int(number))
    return state is not None and (state[0] in _ENDED_STATES or state[1] != rest.partition("/")[0])


def _state(pid: int) -> tuple[str, str] | None:
    """State and time of start (in ticks since the boot) of a process, where the system tells."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the program's name in brackets, which may hold anything.
            fields = file.read().rpartition(") ")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


@functools.cache
def _place() -> str:
    """A fork is in its parent's place, unless it has a namespace of its own."""
    try:
        with open(_BOOT_FILE, encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}:{os.readlink(_NAMESPACE_LINK)}"
    except OSError:  # Not Linux: numbers are of the whole machine there.
        return socket.gethostname()


os.register_at_fork(after_in_child=_place.cache_clear)

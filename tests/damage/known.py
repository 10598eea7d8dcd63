"""The answers of a whole store, before and after compaction, by graph and by scan.

python -m tests.damage.known STORE COPY FILE
"""

from __future__ import annotations

import sys

import orjson

from .mutilate import copy_store
from .stores import answers, configure, open_node
from .worker import compact


def main() -> None:
    store, copy, file = sys.argv[1:]
    configure()
    copy_store(store, copy)
    node = open_node(copy)
    known: dict[str, list[tuple[int, str]]] = {}
    for turn in range(2):
        if turn:
            compact(node)
        for exact in (False, True):
            for name, answer in answers(node, exact=exact).items():
                assert answer[0] == 200, (name, answer)
                some = known.setdefault(name, [])
                if answer not in some:
                    some.append(answer)
    node.close()
    assert all(len(some) == 1 for name, some in known.items() if "query" not in name)
    with open(file, "wb") as target:
        target.write(orjson.dumps(known))


if __name__ == "__main__":
    main()

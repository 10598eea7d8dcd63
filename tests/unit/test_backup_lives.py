"""Random lives of a store, backed up at a random moment: what is restored is what was there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.backup import backup, restore
from ochredb.parts import deleted
from ochredb.types import Op

from .kernel import (
    Model,
    all_rows,
    append,
    make_collection,
    operations,
    running_node,
)

_REQUESTS = st.tuples(
    st.sampled_from(list(Op)[:4]),
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.booleans(),
)
_STEPS = st.lists(st.one_of(_REQUESTS, st.sampled_from(["fold", "compact"])), max_size=14)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "objects"])
@settings(deadline=None, max_examples=5)
@given(before=_STEPS, after=_STEPS)
def test_a_restored_store_is_the_model_of_the_requests_before(
    inline: bool,
    before: list[tuple[Op, list[int], bool] | str],
    after: list[tuple[Op, list[int], bool] | str],
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(deleted, "INLINE_BYTES_MAX", (32 << 10) if inline else 0)
        store, saved, restored = (str(Path(folder, name)) for name in ("s", "b", "r"))
        model = Model()
        with running_node(store, inline_bytes_max=(1 << 18) if inline else 0) as node:
            collection = make_collection(node)
            for number, step in enumerate([*before, "backup", *after]):
                if step == "backup":
                    manifest = backup(store, saved)
                    continue
                if isinstance(step, str):
                    fold = node.compactor.fold_now if step == "fold" else node.compactor.compact_now
                    fold(collection)
                    continue
                op, numbers, documents = step
                request = operations(
                    op,
                    [f"id-{n}" for n in numbers],
                    None if op is Op.DELETE else [[float(n), float(number)] for n in numbers],
                    documents=[f"{number}"] * len(numbers) if documents else None,
                )
                append(node, collection, request)
                if number < len(before):
                    model.apply(request)
        (state,) = manifest.collections
        assert state.records == len(model.records)
        assert state.last_offset == model.next_offset - 1
        restore(saved, restored)
        with running_node(restored) as node:
            expected = [
                {name: value for name, value in row.items() if name != "seq"}
                for row in model.rows()
            ]
            assert all_rows(node, collection) == expected

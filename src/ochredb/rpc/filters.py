"""Filters on the wire: the syntax tree as a list of nodes, each before its children.

What is read back equals what was written, to the type and the last bit of each number: a filter of
two that were combined may be deeper and larger than what one may write in JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from ochredb.errors import InvalidArgument
from ochredb.proto.v1 import query_pb2 as pb
from ochredb.rpc.columns import names_from_bytes, strings_to_bytes
from ochredb.where import (
    And,
    Compare,
    ComparisonOp,
    DocumentContains,
    DocumentMatches,
    IdIn,
    ListContains,
    OneOf,
    Or,
    Scalar,
    Where,
)

_OPERATORS: dict[str, ComparisonOp] = {
    "$eq": "$eq", "$ne": "$ne", "$gt": "$gt", "$gte": "$gte", "$lt": "$lt", "$lte": "$lte"
}  # fmt: skip


def encode(where: Where | None) -> pb.Filter | None:
    """Cost: 2 µs per node."""
    if where is None:
        return None
    found = pb.Filter()
    waiting = [where]
    while waiting:
        node = waiting.pop()
        found.nodes.append(_encode_node(node))
        if isinstance(node, And | Or):
            waiting.extend(reversed(node.children))
    return found


def decode(found: pb.Filter) -> Where:
    """Raises InvalidArgument for what `encode` does not write."""
    # From the last node to the first: a node's children are ready before it, the first on top.
    ready: list[Where] = []
    for node in reversed(found.nodes):
        kind = node.WhichOneof("node")
        if kind in ("all_of", "any_of"):
            count = node.all_of if kind == "all_of" else node.any_of
            if count > len(ready):
                raise InvalidArgument("a filter with children missing")
            children = tuple(ready.pop() for _ in range(count))
            ready.append(And(children) if kind == "all_of" else Or(children))
        else:
            ready.append(_decode_leaf(node, kind))
    if len(ready) != 1:
        raise InvalidArgument("a filter that is no tree")
    return ready[0]


def _encode_node(node: Where) -> pb.FilterNode:
    match node:
        case And(children):
            return pb.FilterNode(all_of=len(children))
        case Or(children):
            return pb.FilterNode(any_of=len(children))
        case Compare(key, op, value):
            return pb.FilterNode(compare=pb.Compare(key=key, op=op, value=_encode_scalar(value)))
        case ListContains(key, value, negated):
            return pb.FilterNode(
                list_contains=pb.ListContains(key=key, value=_encode_scalar(value), negated=negated)
            )
        case OneOf():
            return pb.FilterNode(one_of=_encode_one_of(node))
        case DocumentContains(needle, negated):
            return pb.FilterNode(document_contains=pb.Pattern(text=needle, negated=negated))
        case DocumentMatches(pattern, negated):
            return pb.FilterNode(document_matches=pb.Pattern(text=pattern, negated=negated))
        case IdIn(ids, negated):
            lengths, joined = strings_to_bytes(ids)
            return pb.FilterNode(id_in=pb.IdIn(id_lengths=lengths, ids=joined, negated=negated))


def _encode_scalar(value: Scalar) -> pb.Scalar:
    if isinstance(value, str):
        return pb.Scalar(text=value)
    if isinstance(value, bool):
        return pb.Scalar(flag=value)
    return pb.Scalar(integer=value) if isinstance(value, int) else pb.Scalar(number=value)


def _encode_one_of(node: OneOf) -> pb.OneOf:
    found = pb.OneOf(key=node.key, negated=node.negated)
    kinds = set(map(type, node.values))
    assert len(kinds) == 1, "the values of one node are of one type"
    kind = kinds.pop()
    if kind is str:
        found.text_lengths, found.texts = strings_to_bytes(cast("tuple[str, ...]", node.values))
    elif kind is bool:
        found.flags.extend(cast("tuple[bool, ...]", node.values))
    elif kind is int:
        found.integers.extend(cast("tuple[int, ...]", node.values))
    else:
        found.numbers.extend(cast("tuple[float, ...]", node.values))
    return found


def _decode_leaf(node: pb.FilterNode, kind: str | None) -> Where:
    match kind:
        case "compare":
            op = _OPERATORS.get(node.compare.op)
            if op is None:
                raise InvalidArgument(f"a filter with an unknown operator: {node.compare.op!r}")
            return Compare(node.compare.key, op, _decode_scalar(node.compare.value))
        case "one_of":
            values = tuple(_decode_values(node.one_of))
            return OneOf(node.one_of.key, values, node.one_of.negated)
        case "list_contains":
            found = node.list_contains
            return ListContains(found.key, _decode_scalar(found.value), found.negated)
        case "document_contains":
            return DocumentContains(node.document_contains.text, node.document_contains.negated)
        case "document_matches":
            return DocumentMatches(node.document_matches.text, node.document_matches.negated)
        case "id_in":
            ids = names_from_bytes(node.id_in.id_lengths, node.id_in.ids)
            return IdIn(tuple(ids), node.id_in.negated)
    raise InvalidArgument("a filter with an unknown kind of condition: the peer is newer")


def _decode_scalar(value: pb.Scalar) -> Scalar:
    match value.WhichOneof("value"):
        case "text":
            return value.text
        case "integer":
            return value.integer
        case "number":
            return value.number
        case "flag":
            return value.flag
    raise InvalidArgument("a filter with a value of unknown type: the peer is newer")


def _decode_values(found: pb.OneOf) -> Iterator[Scalar]:
    yield from names_from_bytes(found.text_lengths, found.texts)
    yield from found.integers
    yield from found.numbers
    yield from found.flags

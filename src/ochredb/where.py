"""The filter language: its syntax tree. Parsing is in `where_parse`, evaluation in `plan.filter`.

A filter is a tree of frozen nodes. Semantics are rest-contract section 8: negated comparisons also
match records that lack the key or hold another type; int and float compare numerically, exactly;
bool is never a number; `Contains` on a list is type-strict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scalar = str | int | float | bool
ComparisonOp = Literal["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"]


@dataclass(frozen=True, slots=True)
class Compare:
    """A metadata key against one scalar; the ordering operators take numbers only."""

    key: str
    op: ComparisonOp
    value: Scalar


@dataclass(frozen=True, slots=True)
class OneOf:
    """`$in` (or `$nin` if negated): a metadata key against several scalars of one type."""

    key: str
    values: tuple[Scalar, ...]
    negated: bool


@dataclass(frozen=True, slots=True)
class ListContains:
    """`$contains` (or `$not_contains`) on a list-valued metadata key; types must be equal."""

    key: str
    value: Scalar
    negated: bool


@dataclass(frozen=True, slots=True)
class DocumentContains:
    """The document contains `needle` (case-sensitive). Negated: it does not, or there is none."""

    needle: str
    negated: bool


@dataclass(frozen=True, slots=True)
class DocumentMatches:
    """The document matches an RE2 pattern, unanchored. Negated: it does not, or there is none."""

    pattern: str
    negated: bool


@dataclass(frozen=True, slots=True)
class IdIn:
    """The record's id is (or, negated, is not) one of these: `#id` in where."""

    ids: tuple[str, ...]
    negated: bool


@dataclass(frozen=True, slots=True)
class And:
    """All children match; no children: everything matches."""

    children: tuple[Where, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Some child matches; no children: nothing matches."""

    children: tuple[Where, ...]


Where = Compare | OneOf | ListContains | DocumentContains | DocumentMatches | IdIn | And | Or

"""Names of tenants, databases and collections; messages as Chroma 1.5.9 words them."""

from __future__ import annotations

import pytest

from ochredb.errors import InvalidArgument
from ochredb.names import (
    validate_collection_name,
    validate_database_name,
    validate_tenant_name,
)

CHARACTERS = (
    "Expected a name containing 3-512 characters from [a-zA-Z0-9._-], starting and ending with a "
    "character in [a-zA-Z0-9]. Got: "
)
TWO_PERIODS = "Expected a name that does not contains two consecutive periods (..). Got "
IP_ADDRESS = "Expected a name that is not a valid ip address. Got "
TWO_TOPOLOGIES = "Expected a name to contain at most one topology:  Got two `+` characters."


@pytest.mark.parametrize(
    "name",
    [
        "abc", "a.b", "a_b-c", "9x9", "a" * 512, "topo+name", "a" * 300 + "+" + "b" * 211,
        "1.2.3", "1.2.3.4.5", "999.1.1.1", "01.2.3.4", "0x7f.0.0.1", "127.1",
    ],
)  # fmt: skip
def test_accepted(name: str) -> None:
    validate_collection_name(name)
    validate_database_name(name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", CHARACTERS),
        ("a", CHARACTERS + "a"),
        ("ab", CHARACTERS + "ab"),
        ("a" * 513, CHARACTERS + "a" * 513),
        ("a_", CHARACTERS + "a_"),
        ("-abc", CHARACTERS + "-abc"),
        ("a b", CHARACTERS + "a b"),
        ("a/b", CHARACTERS + "a/b"),
        ("é bc", CHARACTERS + "é bc"),
        ("abc\n", CHARACTERS + "abc\n"),
        ("::1", CHARACTERS + "::1"),
        ("a..b", TWO_PERIODS + "a..b"),
        ("a..b..", CHARACTERS + "a..b.."),
        ("192.168.0.1", IP_ADDRESS + "192.168.0.1"),
        ("+abc", CHARACTERS),
        ("abc+", CHARACTERS),
        ("ab+abc", CHARACTERS + "ab"),
        ("abc+ab", CHARACTERS + "ab"),
        ("abc+d..f", TWO_PERIODS + "d..f"),
        ("abc+1.2.3.4", IP_ADDRESS + "1.2.3.4"),
        ("a+b+c", TWO_TOPOLOGIES),
        ("++", TWO_TOPOLOGIES),
        ("a" * 300 + "+" + "b" * 212, "Expected a name containing 3-512 characters. Got: 513"),
        ("é" * 300 + "+abc", "Expected a name containing 3-512 characters. Got: 604"),
    ],
)
def test_refused(name: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        validate_collection_name(name)
    assert str(refusal.value) == f"Validation error: name: {problem}"
    with pytest.raises(InvalidArgument) as refusal:
        validate_collection_name(name, "new_name")
    assert str(refusal.value) == f"Validation error: new_name: {problem}"
    with pytest.raises(InvalidArgument) as refusal:
        validate_database_name(name)
    assert str(refusal.value) == problem


@pytest.mark.parametrize("name", ["abc", "a..", "1.2.3.4", "a b c", "日本語", "   ", "a" * 2000])
def test_tenant_names_are_free_but_for_their_length(name: str) -> None:
    validate_tenant_name(name)


@pytest.mark.parametrize("name", ["", "a", "ab", "éé", "日本"])
def test_short_tenant_names(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^Validation error: name: "):
        validate_tenant_name(name)

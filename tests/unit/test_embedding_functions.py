"""The built-in embedding function, and the registry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ochredb.api.types import Documents, Embeddings
from ochredb.embedding_functions import (
    EmbeddingFunction,
    LexicalEmbeddingFunction,
    config_to_embedding_function,
    known_embedding_functions,
    register_embedding_function,
)
from ochredb.embedding_functions.base import describe

embed = LexicalEmbeddingFunction()
TEXTS = [
    "Create and return a temporary file.",
    "Recursively copy a directory tree and return the destination directory.",
    "Wait until the thread terminates.",
    "parse_iso_date: Construct a date from a string in ISO 8601 format",
    "NamedTemporaryFile(delete=True)",
    "東京都庁の電話番号",
    "Größe der Datei",
    "",
]


def cosine(left: str, right: str) -> float:
    a, b = embed([left, right])
    return float(a @ b)


def test_shape_type_and_length() -> None:
    vectors = np.stack(embed(TEXTS))
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(lengths[:-1], 1.0, atol=1e-6)
    assert lengths[-1] == 0.0, "a text without words is the zero vector"
    assert embed([]) == []


def test_the_numbers_never_change() -> None:
    """Stored vectors outlive releases: a change of the function needs a new version."""
    digest = xxhash.xxh3_64_hexdigest(np.round(np.stack(embed(TEXTS)), 5).tobytes())
    assert (embed.get_config(), digest) == ({"version": 1}, "85422e373089e236")


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_a_text_has_the_same_vector_in_every_batch(texts: list[str]) -> None:
    alone = [embed([text])[0] for text in texts]
    assert all(np.array_equal(a, b) for a, b in zip(alone, embed(texts), strict=True))
    assert all(np.isfinite(vector).all() for vector in alone)


@pytest.mark.parametrize(
    ("query", "near", "far"),
    [
        ("open a temporary file", TEXTS[0], TEXTS[1]),
        ("copying directories", TEXTS[1], TEXTS[2]),
        ("threads waiting", TEXTS[2], TEXTS[0]),
        ("iso dates", TEXTS[3], TEXTS[2]),
        ("named temporary file", TEXTS[4], TEXTS[3]),
        ("電話番号", TEXTS[5], TEXTS[6]),
        ("GRÖSSE", TEXTS[6], TEXTS[5]),
    ],
)
def test_shared_words_are_near(query: str, near: str, far: str) -> None:
    assert cosine(query, near) > cosine(query, far) + 0.2


def test_it_is_lexical_not_semantic() -> None:
    """What the documentation says: a synonym without common letters is as far as anything."""
    assert abs(cosine("erase", "delete")) < 0.2
    assert cosine("deletes", "delete") > 0.7


def test_common_words_count_little() -> None:
    assert cosine("the of and to a file", "the file") > 0.8
    assert cosine("what is the dog", "what is the cat") < 0.5


def test_lone_surrogates_do_not_break_it() -> None:
    assert np.isfinite(embed(["\ud800abc \udfff"])[0]).all()


def test_it_is_rebuilt_from_its_configuration() -> None:
    config = describe(embed)
    assert config == {"type": "known", "name": "ochredb-lexical", "config": {"version": 1}}
    assert isinstance(config_to_embedding_function(config), LexicalEmbeddingFunction)
    with pytest.raises(ValueError, match="version 2 is not known"):
        config_to_embedding_function({**config, "config": {"version": 2}})
    assert embed.default_space() == "cosine"


def test_only_registered_names_are_built() -> None:
    with pytest.raises(ValueError, match=r"'os\.system' of this collection is not known here"):
        config_to_embedding_function({"type": "known", "name": "os.system", "config": {}})


def test_a_built_in_name_cannot_be_taken() -> None:
    class Impostor(LexicalEmbeddingFunction):
        pass

    with pytest.raises(ValueError, match="belongs to a built-in"):
        register_embedding_function(Impostor)


def test_registering_again_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ochredb.embedding_functions.base.known_embedding_functions",
        registry := dict(known_embedding_functions),
    )

    def make() -> type[EmbeddingFunction[Documents]]:
        @register_embedding_function
        class Mine(EmbeddingFunction[Documents]):
            def __call__(self, input: Documents) -> Embeddings:  # noqa: A002
                return [np.zeros(1) for _ in input]

            @staticmethod
            def name() -> str:
                return "test-mine"

            def get_config(self) -> dict[str, Any]:
                return {}

            @staticmethod
            def build_from_config(config: dict[str, Any]) -> Mine:
                return Mine()

        return Mine

    first, second = make(), make()
    assert first is not second
    assert registry["test-mine"] is second
    built = config_to_embedding_function({"name": "test-mine"})
    assert isinstance(built, second)
    assert built.default_space() == "l2"
    assert built.embed_query(["x"])[0].tolist() == [0.0]

"""Arguments of the client's methods, completed and checked before anything is sent.

What Chroma's client refuses is refused here, with ValueError, TypeError or DuplicateIDError.
Filters are left to the server: it parses them anyway, and there is one grammar.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochredb.api.exceptions import ChromaError, DuplicateIDError
from ochredb.api.types import (
    INCLUDABLE,
    AnyEmbeddings,
    Documents,
    Embeddings,
    IDs,
    Images,
    Include,
    OneOrMany,
    T,
    URIs,
)

# A key that Chroma's engine once used for the document itself.
RESERVED_KEY = "chroma:document"
_SCALARS = (str, int, float, bool)
_EXAMPLES_MAX = 10


@contextlib.contextmanager
def blaming(method: str) -> Iterator[None]:
    """Add the method's name to whatever a check raises."""
    try:
        yield
    except (ValueError, TypeError, ChromaError) as error:
        error.args = (f"{error} in {method}.", *error.args[1:])
        raise


@dataclass(slots=True)
class Columns:
    """Records to write or to look for, by column; a column that was not given is None."""

    embeddings: Embeddings | None
    documents: Documents | None
    images: Images | None
    uris: URIs | None
    ids: IDs | None = None
    metadatas: list[Mapping[str, Any] | None] | None = None

    def given(self) -> dict[str, Sequence[Any]]:
        columns: dict[str, Sequence[Any] | None] = {
            "ids": self.ids,
            "embeddings": self.embeddings,
            "metadatas": self.metadatas,
            "documents": self.documents,
            "images": self.images,
            "uris": self.uris,
        }
        return {name: values for name, values in columns.items() if values is not None}


def as_list(value: OneOrMany[T] | None) -> list[T] | None:
    """A list as it is, None as it is, anything else as the only item of a list."""
    if value is None or isinstance(value, list):
        return value
    return [value]


def write_columns(
    ids: Any, embeddings: Any, metadatas: Any, documents: Any, images: Any, uris: Any
) -> Columns:
    """Check the arguments of add, update and upsert."""
    columns = query_columns(embeddings, documents, images, uris, required=False)
    columns.ids = as_list(ids)
    columns.metadatas = as_list(metadatas)
    check_ids(columns.ids)
    _check_lengths(columns)
    if columns.metadatas is not None:
        for metadata in columns.metadatas:
            check_metadata(metadata)
    return columns


def query_columns(
    embeddings: Any, documents: Any, images: Any, uris: Any, *, required: bool = True
) -> Columns:
    """Check what is searched for, or the part of a write that can be embedded."""
    columns = Columns(
        embeddings=as_embeddings(embeddings),
        documents=as_list(documents),
        images=as_list(images),
        uris=as_list(uris),
    )
    if required and not columns.given():
        raise ValueError("one of embeddings, texts, images or uris must be given")
    _check_lengths(columns)
    if columns.documents is not None:
        gaps_allowed = columns.embeddings is not None
        for document in columns.documents:
            if not isinstance(document, str) and not (document is None and gaps_allowed):
                raise ValueError(f"a document must be a str, not {_show(document)}")
    for image in columns.images or ():
        if not isinstance(image, np.ndarray) or image.ndim < 2:
            raise ValueError("an image must be a numpy array of two or more dimensions")
    return columns


def _check_lengths(columns: Columns) -> None:
    lengths = {name: len(values) for name, values in columns.given().items()}
    empty = [name for name, length in lengths.items() if length == 0]
    if empty:
        raise ValueError(f"expected non-empty lists: {', '.join(empty)}")
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise ValueError(f"all lists must have the same length, got {shown}")


def as_embeddings(target: AnyEmbeddings | None) -> Embeddings | None:
    """One or several vectors in any accepted form, as a list of arrays of one dimension.

    Plain numbers become float32; arrays keep their type, which must be float16, float32, float64,
    int32 or int64.
    """
    if target is None:
        return None
    if not isinstance(target, (list, tuple, np.ndarray)):
        raise ValueError(f"embeddings must be lists of numbers or arrays, not {_show(target)}")
    if len(target) == 0:
        raise ValueError("expected non-empty embeddings")
    rows: Embeddings
    if isinstance(target, np.ndarray):
        rows = [target] if target.ndim == 1 else list(target)
    elif isinstance(target[0], np.ndarray):
        rows = [np.asarray(row) for row in target]
    elif _is_number(target[0]):
        rows = [_float32(target)]
    else:
        rows = _rows(target)
    for position, row in enumerate(rows):
        _check_embedding(row, position)
    return rows


def _rows(target: Sequence[Any]) -> Embeddings:
    for position, row in enumerate(target):
        if not isinstance(row, (list, tuple)) or not row or not _is_number(row[0]):
            raise ValueError(
                f"each embedding must be a non-empty list of numbers, not {_show(row)} "
                f"at position {position}"
            )
    if len({len(row) for row in target}) == 1:
        return list(_float32(target))  # One conversion for all: the usual case.
    return [_float32(row) for row in target]


def _float32(values: Sequence[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # Becomes infinite, which the server refuses by name.
        try:
            return np.asarray(values, dtype=np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"an embedding may hold numbers only: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


_EMBEDDING_TYPES = frozenset(np.dtype(name) for name in ("f2", "f4", "f8", "i4", "i8"))


def _check_embedding(row: object, position: int) -> None:
    if not isinstance(row, np.ndarray) or row.ndim != 1:
        raise ValueError(f"the embedding at position {position} is no array of one dimension")
    if row.size == 0:
        raise ValueError(f"the embedding at position {position} is empty")
    if row.dtype not in _EMBEDDING_TYPES:
        raise ValueError(f"an embedding may hold numbers only, not {row.dtype}")


def check_ids(ids: Any) -> None:
    """Ids must be a list of distinct strings, at least one. Raises DuplicateIDError."""
    if not isinstance(ids, list):
        raise ValueError(f"expected IDs to be a list, not {type(ids).__name__}")
    if not ids:
        raise ValueError("expected IDs to be a non-empty list")
    for record_id in ids:
        if not isinstance(record_id, str):
            raise ValueError(f"expected ID to be a str, not {_show(record_id)}")
    if len(set(ids)) == len(ids):
        return
    twice = [record_id for record_id, times in Counter(ids).items() if times > 1]
    examples = ", ".join(twice[:_EXAMPLES_MAX]) + (", ..." if len(twice) > _EXAMPLES_MAX else "")
    raise DuplicateIDError(f"expected IDs to be unique, found {len(twice)} duplicated: {examples}")


def check_metadata(metadata: Any) -> None:
    """Metadata is None, or a non-empty dict of strings to scalars, lists of one type, or None."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be a dict or None, not {_show(metadata)}")
    if not metadata:
        raise ValueError("expected metadata to be a non-empty dict; pass None for no metadata")
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a metadata key must be a str, not {_show(key)}")
        if key == RESERVED_KEY:
            raise ValueError(f"the metadata key {RESERVED_KEY} is reserved")
        if isinstance(value, list):
            _check_metadata_list(key, value)
        elif value is not None and not isinstance(value, _SCALARS):
            raise ValueError(
                f"the metadata value of {key!r} must be a str, int, float, bool, list or None, "
                f"not {_show(value)}"
            )
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the metadata value of {key!r} must be finite, not {value}")


def _check_metadata_list(key: str, values: list[Any]) -> None:
    if not values:
        raise ValueError(f"the metadata list of {key!r} must be non-empty")
    kind = type(values[0])
    if kind not in _SCALARS or any(type(value) is not kind for value in values):
        raise ValueError(
            f"the metadata list of {key!r} must hold values of one type: str, int, float or bool"
        )


def check_include(include: Any, *, distances: bool) -> None:
    """`include` is a list of column names; get has no distances."""
    if not isinstance(include, list):
        raise ValueError(f"include must be a list, not {_show(include)}")
    allowed = [name for name in INCLUDABLE if distances or name != "distances"]
    for name in include:
        if name not in allowed:
            raise ValueError(f"include may name {', '.join(allowed)}, not {_show(name)}")


def sent_include(include: Include) -> list[str]:
    """What to ask the server for: data is loaded here, from the URIs."""
    names = [str(name) for name in include if name != "data"]
    if "data" in include and "uris" not in names:
        names.append("uris")
    return names


def check_filter(where: Any, where_document: Any) -> None:
    """Filters must be dicts; the server checks the rest."""
    for name, value in (("where", where), ("where_document", where_document)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} must be a dict, not {_show(value)}")


def check_n_results(n_results: Any) -> None:
    """A positive int. Raises TypeError for zero and less, as Chroma's client does."""
    if not isinstance(n_results, int) or isinstance(n_results, bool):
        raise ValueError(f"n_results must be an int, not {_show(n_results)}")
    if n_results <= 0:
        raise TypeError(f"n_results must be positive, not {n_results}")


def check_target_recall(target_recall: Any) -> None:
    """None, or a number of 0 or more and below 1."""
    if target_recall is None:
        return
    if not _is_number(target_recall) or not 0 <= target_recall < 1:
        raise ValueError(
            f"target_recall must be a number of at least 0 and below 1, not {_show(target_recall)}"
        )


def check_limit(limit: Any) -> None:
    """None, or an int of zero or more."""
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit must be a non-negative integer, not {_show(limit)}")
    if limit < 0:
        raise ValueError(f"limit must be a non-negative integer, not {limit}")


def _show(value: object) -> str:
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"

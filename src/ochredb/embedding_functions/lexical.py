"""The built-in embedding function: small, deterministic, nothing to download, and lexical.

It compares *words*, not meanings: "delete" is near "deletes" and "deleted", not near "erase". It
serves to try things out, to test, and to search texts by the words in them; for meaning, use a
model.

How a text becomes 384 numbers:

1. Words: runs of letters and digits in lower case, `CamelCase` and `snake_case` also taken apart;
   scripts without spaces (Chinese, Japanese, ...) in overlapping pairs of characters.
2. Features: each word without its ending (-s, -es, -ed, -ing, -e), its 4-character pieces, and each
   pair of neighbouring words.
3. Weights: 1 + ln(occurrences); less, the later in the text a word first occurs (texts say first
   what they are about); times the word's inverse document frequency. That is not learnt from the
   corpus, for then old vectors would go stale: it comes from the word's rank in a built-in list of
   common English words by Zipf's law, and is the same for all words that are not in the list.
4. Hashing: each feature adds to a few of the 384 dimensions, chosen by its hash, with hashed signs,
   so that chance overlaps cancel out on average; the cosine of unrelated texts is about 0 +- 0.05,
   unless they share common words.
5. The vector is scaled to length 1; a text without any word gives zeros.

The same text gives the same bits, alone or in a batch: sums are in float64 and in the text's order.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ochredb.api.types import Documents, Embeddings, Space
from ochredb.embedding_functions.base import EmbeddingFunction, register_built_in

DIMENSIONS = 384
VERSION = 1  # Part of the stored configuration: vectors of different versions do not go together.

_WORD_BUCKETS = 4  # Dimensions for each word; more make chance overlaps smaller but more frequent.
_PIECE_BUCKETS = 2
_PAIR_BUCKETS = 2
_PIECE_LENGTH = 4
_PIECE_WEIGHT = 0.7  # Of all pieces of a word together, relative to the word.
_PAIR_WEIGHT = 0.35
_HALF_WEIGHT_POSITION = 20  # A word that occurs first at this position counts half.

# Most frequent first.
_COMMON_WORDS = """
the of and to a in is it you that he was for on are with as i his they be at one have this from or
had by not but what some we can out other were all there when up use your how said an each she
which do their time if will way about many then them write would like so these her long make thing
see him two has look more day could go come did my sound no most number who over know water than
call first people may down side been now find any new work part take get place made live where
after back little only round man year came show every good me give our under name very through just
form sentence great think say help low line differ turn cause much mean before move right boy old
too same tell does set three want air well also play small end put home read hand port large spell
add even land here must big high such follow act why ask men change went light kind off need house
picture try us again animal point mother world near build self earth father
"""
_TYPICAL_LENGTH = 60  # Words of a text, for turning word frequency into document frequency.
_RARE_IDF = 6.0  # Of words that are not in the list.


class _Word(NamedTuple):
    """Everything about a word that does not depend on where it stands."""

    dimensions: NDArray[np.int64]
    values: NDArray[np.float64]
    stem_hash: int
    idf: float
    common: bool


@register_built_in
class LexicalEmbeddingFunction(EmbeddingFunction[Documents]):
    """Hashed words, word pieces and word pairs in 384 dimensions. Lexical, not semantic."""

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002 - Chroma's name.
        """float32[384] of length 1 for each text. Cost: about 0.3 ms for 200 characters."""
        return list(_normalized(np.stack([_sums(text) for text in input]))) if input else []

    @staticmethod
    def name() -> str:
        return "ochredb-lexical"

    def get_config(self) -> dict[str, Any]:
        return {"version": VERSION}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> LexicalEmbeddingFunction:
        version = config.get("version", VERSION)
        if version != VERSION:
            raise ValueError(f"ochredb-lexical version {version} is not known, only {VERSION}")
        return LexicalEmbeddingFunction()

    def default_space(self) -> Space:
        return "cosine"


def _sums(text: str) -> NDArray[np.float64]:
    """The unscaled vector of a text, float64[384]."""
    texts = list(_words(text))
    if not texts:
        return np.zeros(DIMENSIONS)
    words = [_word(word) for word in texts]
    first: dict[str, list[int]] = {}  # Position of a word's first occurrence, and occurrences.
    for position, word_text in enumerate(texts):
        first.setdefault(word_text, [position, 0])[1] += 1
    decay = _HALF_WEIGHT_POSITION / (_HALF_WEIGHT_POSITION + np.arange(len(words)))
    dimensions, values = [], []
    for position, occurrences in first.values():
        word = words[position]
        dimensions.append(word.dimensions)
        values.append(word.values * ((1.0 + math.log(occurrences)) * decay[position]))
    pair_dimensions, pair_values = _pairs(words, decay)
    dimensions.append(pair_dimensions)
    values.append(pair_values)
    sums = np.bincount(np.concatenate(dimensions), np.concatenate(values), minlength=DIMENSIONS)
    return sums.astype(np.float64, copy=False)


def _normalized(sums: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of length 1, or 0. Each row is summed by itself: no batch changes the bits."""
    lengths = np.array([math.sqrt(math.fsum(row * row)) for row in sums])[:, None]
    return np.asarray(sums / np.where(lengths == 0.0, 1.0, lengths), dtype=np.float32)


def _pairs(
    words: list[_Word], decay: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Dimensions and values for neighbouring words, of which at least one is not common."""
    hashes = np.fromiter((word.stem_hash for word in words), np.uint64, len(words))
    idf = np.fromiter((word.idf for word in words), np.float64, len(words))
    common = np.fromiter((word.common for word in words), np.bool_, len(words))
    keep = ~(common[:-1] & common[1:])
    bits = _mixed(hashes[:-1][keep], hashes[1:][keep])
    weights = (_PAIR_WEIGHT * np.minimum(idf[:-1], idf[1:]) * decay[:-1])[keep]
    sixteen = np.stack([bits >> np.uint64(16 * index) for index in range(_PAIR_BUCKETS)])
    dimensions, signs = _buckets((sixteen & np.uint64(0xFFFF)).astype(np.int64))
    return dimensions.ravel(), (signs * weights).ravel()


def _mixed(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of each ordered pair of hashes (multiply and fold, as in splitmix64)."""
    bits = left * np.uint64(0x9E3779B97F4A7C15) + right  # Wraps around, which is what is wanted.
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _buckets(bits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """From 16 hash bits each: a dimension, and a sign."""
    return (bits & 0x7FFF) % DIMENSIONS, np.where(bits & 0x8000, -1.0, 1.0)


@functools.lru_cache(maxsize=1 << 16)
def _word(word: str) -> _Word:
    from xxhash import xxh3_64_intdigest, xxh3_128_digest

    def hashed(feature: str, buckets: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        digest = xxh3_128_digest(feature.encode(errors="replace"))
        return _buckets(np.frombuffer(digest, "<u2")[:buckets].astype(np.int64))

    stem = _stem(word)
    idf = _idf(word)
    dimensions, signs = hashed(f"word {stem}", _WORD_BUCKETS)
    all_dimensions, all_values = [dimensions], [signs * (idf / math.sqrt(_WORD_BUCKETS))]
    pieces = sorted(_pieces(word))
    for piece in pieces:
        dimensions, signs = hashed(f"piece {piece}", _PIECE_BUCKETS)
        all_dimensions.append(dimensions)
        all_values.append(signs * (idf * _PIECE_WEIGHT / math.sqrt(_PIECE_BUCKETS * len(pieces))))
    return _Word(
        np.concatenate(all_dimensions),
        np.concatenate(all_values),
        xxh3_64_intdigest(stem.encode(errors="replace")),
        idf,
        word in _common_ranks(),
    )


_RUN = re.compile(r"[^\W_]+")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]")


def _words(text: str) -> Iterator[str]:
    for run in _RUN.findall(text):
        if run.isascii():
            parts = [run] if run.islower() or run.isupper() else _HUMP.split(run)
            yield from (part.lower() for part in parts)
            if len(parts) > 1:
                yield run.lower()
        elif _UNSPACED.search(run):
            yield from (run[at : at + 2] for at in range(max(1, len(run) - 1)))
        else:
            yield run.casefold()


def _stem(word: str) -> str:
    """The word without a common English ending; crude, and the same for text and query."""
    for ending, length_min in (("ing", 6), ("ed", 5), ("es", 5), ("s", 4)):
        if len(word) >= length_min and word.endswith(ending) and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def _pieces(word: str) -> set[str]:
    padded = f"^{word}$"
    if len(word) < _PIECE_LENGTH - 1:
        return set()
    return {padded[at : at + _PIECE_LENGTH] for at in range(len(padded) - _PIECE_LENGTH + 1)}


@functools.cache
def _common_ranks() -> dict[str, int]:
    return {word: rank for rank, word in enumerate(_COMMON_WORDS.split(), start=1)}


def _idf(word: str) -> float:
    """ln(1 / share of texts with the word), if the r-th word's share of all words is 0.1 / r."""
    rank = _common_ranks().get(word)
    if rank is None:
        return _RARE_IDF
    return -math.log(1.0 - (1.0 - 0.1 / rank) ** _TYPICAL_LENGTH)


# What collections use of which nothing else is said.
DefaultEmbeddingFunction = LexicalEmbeddingFunction
DEFAULT_EMBEDDING_FUNCTION = LexicalEmbeddingFunction()

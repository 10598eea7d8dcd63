"""Embedding functions: what turns texts into vectors. One is built in; others register by name."""

from ochredb.embedding_functions.base import (
    EmbeddingFunction,
    config_to_embedding_function,
    known_embedding_functions,
    register_embedding_function,
)
from ochredb.embedding_functions.lexical import (
    DefaultEmbeddingFunction,
    LexicalEmbeddingFunction,
)

__all__ = [
    "DefaultEmbeddingFunction",
    "EmbeddingFunction",
    "LexicalEmbeddingFunction",
    "config_to_embedding_function",
    "known_embedding_functions",
    "register_embedding_function",
]

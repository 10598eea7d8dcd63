"""What an embedding function is, and how a collection remembers which one it uses."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from ochredb.api.types import Embeddable, Embeddings, Space

D = TypeVar("D", bound=Embeddable, contravariant=True)


@runtime_checkable
class EmbeddingFunction(Protocol[D]):
    """Turns documents (or images) into vectors.

    `__call__` is enough to use one. With `name`, `get_config` and `build_from_config` a collection
    stores which function it uses and rebuilds it when it is opened again:

        @register_embedding_function
        class LengthEmbeddingFunction(EmbeddingFunction[Documents]):
            def __call__(self, input: Documents) -> Embeddings:
                return [np.array([len(text)], dtype=np.float32) for text in input]

            @staticmethod
            def name() -> str:
                return "length"

            def get_config(self) -> dict[str, Any]:
                return {}

            @staticmethod
            def build_from_config(config: dict[str, Any]) -> "LengthEmbeddingFunction":
                return LengthEmbeddingFunction()
    """

    def __call__(self, input: D) -> Embeddings:  # noqa: A002 - Chroma's name.
        """One vector for each input, in order."""
        ...

    def embed_query(self, input: D) -> Embeddings:  # noqa: A002 - Chroma's name.
        """Vectors for what is searched for; differs from `__call__` for some models."""
        return self(input)

    @staticmethod
    def name() -> str:
        """The name it is registered under."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """JSON from which `build_from_config` makes an equal function."""
        raise NotImplementedError

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> EmbeddingFunction[Any]:
        raise NotImplementedError

    def default_space(self) -> Space:
        """The distance that suits its vectors, for collections that do not say."""
        return "l2"

    def supported_spaces(self) -> list[Space]:
        return ["cosine", "l2", "ip"]

    def validate_config_update(
        self,
        old_config: dict[str, Any],  # noqa: ARG002
        new_config: dict[str, Any],  # noqa: ARG002
    ) -> None:
        """Raise ValueError if vectors made under the two do not go together."""
        return


# Classes by name. A server names a function; only what is in here is ever built.
known_embedding_functions: dict[str, type[Any]] = {}
_built_in: set[str] = set()

C = TypeVar("C", bound=type[Any])


def register_embedding_function(ef_class: C) -> C:
    """Make a class known by its `name()`, so that collections can be opened with it. A decorator.

    A later class of the same name takes the earlier one's place (a notebook cell runs twice), but
    no class takes the place of a built-in one: that is a ValueError.
    """
    name = ef_class.name()
    if not isinstance(name, str) or not name:
        raise ValueError(f"{ef_class.__name__}.name() must return a non-empty str")
    if name in _built_in and known_embedding_functions[name] is not ef_class:
        raise ValueError(f"the name {name} belongs to a built-in embedding function")
    known_embedding_functions[name] = ef_class
    return ef_class


def register_built_in(ef_class: C) -> C:
    """As `register_embedding_function`, for good."""
    register_embedding_function(ef_class)
    _built_in.add(ef_class.name())
    return ef_class


def describe(function: EmbeddingFunction[Any]) -> dict[str, Any]:
    """What a collection stores about its function.

    {"type": "known", "name", "config"}, or {"type": "legacy"} for a function that does not describe
    itself: a collection opened later must then be given the function again.
    """
    try:
        name, config = function.name(), function.get_config()
    except (AttributeError, NotImplementedError):
        return {"type": "legacy"}
    # Functions written for Chroma inherit methods that return NotImplemented.
    if name is NotImplemented or config is NotImplemented:
        return {"type": "legacy"}
    return {"type": "known", "name": name, "config": config}


def to_config(function: EmbeddingFunction[Any]) -> dict[str, Any]:
    """`describe`, and register the class, so that this process can open the collection again."""
    config = describe(function)
    if config["type"] == "known":
        register_embedding_function(type(function))
    return config


def config_to_embedding_function(config: Mapping[str, Any]) -> EmbeddingFunction[Any]:
    """Rebuild the function that a collection names.

    Raises ValueError if its name is not registered here, or its class refuses the configuration.
    """
    name = config.get("name")
    ef_class = known_embedding_functions.get(str(name))
    if ef_class is None:
        raise ValueError(
            f"the embedding function {name!r} of this collection is not known here: register its "
            "class with @register_embedding_function, pass embedding_function=..., or pass "
            "embeddings instead of texts"
        )
    function: EmbeddingFunction[Any] = ef_class.build_from_config(config.get("config") or {})
    return function


def stored_name(persisted: Mapping[str, Any] | None) -> str | None:
    """The name in a collection's stored embedding function; None if it stores no known one."""
    if persisted is None or persisted.get("type", "known") != "known":
        return None
    name = persisted.get("name")
    return None if name is None else str(name)


def name_of(function: EmbeddingFunction[Any]) -> str | None:
    """The function's name; None if it does not describe itself."""
    name = describe(function).get("name")
    return None if name is None else str(name)


def check_embedding_function(function: object) -> None:
    """Raise ValueError unless it is called with one argument, named `input`, as Chroma calls it."""
    parameters = list(inspect.signature(type(function).__call__).parameters)
    if parameters != ["self", "input"]:
        raise ValueError(
            f"{type(function).__name__}.__call__ must take (self, input), not "
            f"({', '.join(parameters)})"
        )


def check_space(function: EmbeddingFunction[Any], space: str) -> None:
    """Warn if the function's vectors are not meant for this distance."""
    supported = getattr(function, "supported_spaces", None)
    if supported is not None and space not in supported():
        warnings.warn(
            f"{name_of(function)} does not support the space {space}, only "
            f"{', '.join(supported())}",
            UserWarning,
            stacklevel=3,
        )

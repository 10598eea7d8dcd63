"""A collection, as users hold it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import numpy as np

from ochredb.api import configuration as configurations
from ochredb.api import validate
from ochredb.api.configuration import CollectionConfiguration, UpdateCollectionConfiguration
from ochredb.api.rest import Rest
from ochredb.api.types import (
    ID,
    URI,
    AnyEmbeddings,
    AnyMetadatas,
    CollectionMetadata,
    CollectionModel,
    DataLoader,
    DeleteResult,
    Document,
    Embeddings,
    GetResult,
    IDs,
    Image,
    Include,
    IncludeMetadataDocuments,
    IncludeMetadataDocumentsDistances,
    IncludeMetadataDocumentsEmbeddings,
    IndexingStatus,
    OneOrMany,
    QueryResult,
    ReadLevel,
    Where,
    WhereDocument,
)
from ochredb.embedding_functions.base import (
    EmbeddingFunction,
    config_to_embedding_function,
    stored_name,
)
from ochredb.embedding_functions.lexical import DEFAULT_EMBEDDING_FUNCTION
from ochredb.explain import PlanStep


class Collection:
    """Records (id, embedding, document, uri, metadata) and the ways to write and to find them.

    Made by a client's create_collection, get_collection and so on; usable from any thread. Every
    method raises NotFoundError if the collection was deleted, and ValueError for arguments that
    cannot be right.
    """

    def __init__(
        self,
        client: Rest,
        model: CollectionModel,
        embedding_function: EmbeddingFunction[Any] | None = DEFAULT_EMBEDDING_FUNCTION,
        data_loader: DataLoader | None = None,
    ) -> None:
        self._client = client
        self._model = model
        self._embedding_function = embedding_function
        self._data_loader = data_loader
        self._rebuilt: EmbeddingFunction[Any] | None = None
        self._database_path = ("tenants", model.tenant, "databases", model.database, "collections")
        self._path = (*self._database_path, str(model.id))

    @property
    def id(self) -> UUID:
        return self._model.id

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def metadata(self) -> CollectionMetadata | None:
        return self._model.metadata

    @property
    def tenant(self) -> str:
        return self._model.tenant

    @property
    def database(self) -> str:
        return self._model.database

    @property
    def configuration(self) -> CollectionConfiguration:
        """Index parameters and the embedding function; ValueError if that one is not registered."""
        return configurations.from_json(self._model.configuration_json)

    @property
    def configuration_json(self) -> dict[str, Any]:
        return self._model.configuration_json

    @property
    def schema(self) -> dict[str, Any] | None:
        """The indexes by key and type, as JSON, when this object was made."""
        return self._model.schema

    def __repr__(self) -> str:
        return f"Collection(name={self.name})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Collection):
            return NotImplemented
        mine, theirs = self._model, other._model
        return (mine.id, mine.name, mine.metadata, mine.configuration_json) == (
            theirs.id,
            theirs.name,
            theirs.metadata,
            theirs.configuration_json,
        )

    def __hash__(self) -> int:
        return hash(self._model.id)

    def count(self, read_level: ReadLevel = ReadLevel.INDEX_AND_WAL) -> int:
        """How many records there are."""
        level = {"read_level": ReadLevel(read_level).value}
        return int(self._client.call("GET", *self._path, "count", query=level))

    def get_indexing_status(self) -> IndexingStatus:
        """How much of the log is indexed; reads see all of it anyway."""
        return IndexingStatus(**self._client.call("GET", *self._path, "indexing_status"))

    def add(
        self,
        ids: OneOrMany[ID],
        embeddings: AnyEmbeddings | None = None,
        metadatas: AnyMetadatas | None = None,
        documents: OneOrMany[Document] | None = None,
        images: OneOrMany[Image] | None = None,
        uris: OneOrMany[URI] | None = None,
    ) -> None:
        """Add records; an id that exists already is left as it is.

        Lists go together by position. Without embeddings, the collection's embedding function makes
        them from exactly one of documents, images and uris. All of it is added, or nothing.
        """
        with validate.blaming("add"):
            columns = validate.write_columns(ids, embeddings, metadatas, documents, images, uris)
            vectors = columns.embeddings or self._embed(columns, ("documents", "images", "uris"))
        self._write("add", columns, vectors)

    def upsert(
        self,
        ids: OneOrMany[ID],
        embeddings: AnyEmbeddings | None = None,
        metadatas: AnyMetadatas | None = None,
        documents: OneOrMany[Document] | None = None,
        images: OneOrMany[Image] | None = None,
        uris: OneOrMany[URI] | None = None,
    ) -> None:
        """Add records that are new, update those that exist. Arguments as in `add`."""
        with validate.blaming("upsert"):
            columns = validate.write_columns(ids, embeddings, metadatas, documents, images, uris)
            vectors = columns.embeddings or self._embed(columns, ("documents", "images"))
        self._write("upsert", columns, vectors)

    def update(
        self,
        ids: OneOrMany[ID],
        embeddings: AnyEmbeddings | None = None,
        metadatas: AnyMetadatas | None = None,
        documents: OneOrMany[Document] | None = None,
        images: OneOrMany[Image] | None = None,
        uris: OneOrMany[URI] | None = None,
    ) -> None:
        """Change records that exist; unknown ids are ignored.

        What is not given stays. Metadata merges key by key, and a value of None removes its key.
        New documents or images without embeddings are embedded anew.
        """
        with validate.blaming("update"):
            columns = validate.write_columns(ids, embeddings, metadatas, documents, images, uris)
            vectors = columns.embeddings
            if vectors is None and (columns.documents or columns.images):
                vectors = self._embed(columns, ("documents", "images"))
        self._write("update", columns, vectors)

    def delete(
        self,
        ids: IDs | None = None,
        where: Where | None = None,
        where_document: WhereDocument | None = None,
        limit: int | None = None,
    ) -> DeleteResult:
        """Delete the records that match everything given; at least one thing must be.

        limit: at most so many, in order of insertion; only together with a filter.
        """
        with validate.blaming("delete"):
            if ids is None and where is None and where_document is None:
                raise ValueError("one of ids, where or where_document must be given")
            validate.check_limit(limit)
            if limit is not None and where is None and where_document is None:
                raise ValueError("limit needs a where or where_document")
            id_list: IDs | None = [ids] if isinstance(ids, str) else ids
            if id_list is not None:
                validate.check_ids(id_list)
            validate.check_filter(where, where_document)
        body = {"ids": id_list, "where": where, "where_document": where_document, "limit": limit}
        answer = self._client.call("POST", *self._path, "delete", body=body)
        return DeleteResult(deleted=int(answer["deleted"]))

    def get(
        self,
        ids: OneOrMany[ID] | None = None,
        where: Where | None = None,
        limit: int | None = None,
        offset: int | None = None,
        where_document: WhereDocument | None = None,
        include: Include = IncludeMetadataDocuments,
        *,
        explain: bool = False,
    ) -> GetResult:
        """The records that match everything given, in order of first insertion.

        where: by metadata, such as {"kind": "class"} or {"$and": [{"lines": {"$gt": 10}}, ...]}.
        where_document: by text, {"$contains": ...}, {"$regex": ...} and their opposites.
        explain: return the executed plan too, under "plan". An extension: Chroma's server ignores
            it.
        """
        with validate.blaming("get"):
            id_list = validate.as_list(ids)
            if id_list is not None:
                validate.check_ids(id_list)
            validate.check_filter(where, where_document)
            validate.check_include(include, distances=False)
            self._check_loadable(include)
        body: dict[str, Any] = {
            "ids": id_list,
            "where": where,
            "where_document": where_document,
            "limit": limit,
            "offset": offset,
            "include": validate.sent_include(include),
        }
        if explain:
            body["explain"] = True
        answer = self._client.call("POST", *self._path, "get", body=body)
        vectors, uris = answer.get("embeddings"), answer.get("uris")
        result = GetResult(
            ids=answer["ids"],
            embeddings=None if vectors is None else np.array(vectors),
            documents=answer.get("documents"),
            uris=uris if "uris" in include else None,
            data=self._load(uris) if "data" in include else None,
            metadatas=answer.get("metadatas"),
            included=include,
        )
        if explain and "plan" in answer:
            result["plan"] = PlanStep.from_json(answer["plan"])
        return result

    def peek(self, limit: int = 10) -> GetResult:
        """The first records, with everything but URIs."""
        return self.get(limit=limit, include=IncludeMetadataDocumentsEmbeddings)

    def query(
        self,
        query_embeddings: AnyEmbeddings | None = None,
        query_texts: OneOrMany[Document] | None = None,
        query_images: OneOrMany[Image] | None = None,
        query_uris: OneOrMany[URI] | None = None,
        ids: OneOrMany[ID] | None = None,
        n_results: int = 10,
        where: Where | None = None,
        where_document: WhereDocument | None = None,
        include: Include = IncludeMetadataDocumentsDistances,
        *,
        exact: bool = False,
        explain: bool = False,
        target_recall: float | None = None,
    ) -> QueryResult:
        """The `n_results` nearest of the records that match, for each query.

        Queries are embeddings, or exactly one of texts, images and uris, which are embedded by the
        collection's function. Distances ascend: l2 is squared, cosine and ip are 1 - similarity.

        Extensions, which Chroma's server ignores:
        exact: compare with every record that matches, never with an approximate index.
        target_recall: share of the true nearest that an approximate index shall find, in [0, 1);
            0 for what the collection's `ef_search` gives, None for the server's setting.
        explain: return the executed plan too, under "plan".
        """
        with validate.blaming("query"):
            columns = validate.query_columns(
                query_embeddings, query_texts, query_images, query_uris
            )
            validate.check_filter(where, where_document)
            validate.check_include(include, distances=True)
            validate.check_n_results(n_results)
            validate.check_target_recall(target_recall)
            self._check_loadable(include)
            vectors = columns.embeddings or self._embed(
                columns, ("documents", "images", "uris"), is_query=True
            )
        body: dict[str, Any] = {
            "ids": validate.as_list(ids),
            "query_embeddings": [np.ascontiguousarray(row, dtype=np.float32) for row in vectors],
            "n_results": n_results,
            "where": where,
            "where_document": where_document,
            "include": validate.sent_include(include),
        }
        # Sent only if they say something: other servers get the request that they know.
        if exact:
            body["exact"] = True
        if target_recall is not None:
            body["target_recall"] = float(target_recall)
        if explain:
            body["explain"] = True
        answer = self._client.call("POST", *self._path, "query", body=body)
        batches, uris = answer.get("embeddings"), answer.get("uris")
        result = QueryResult(
            ids=answer["ids"],
            embeddings=None if batches is None else [np.array(batch) for batch in batches],
            documents=answer.get("documents"),
            uris=uris if "uris" in include else None,
            data=[self._load(batch) for batch in uris] if "data" in include else None,
            metadatas=answer.get("metadatas"),
            distances=answer.get("distances"),
            included=include,
        )
        if explain and "plan" in answer:
            result["plan"] = PlanStep.from_json(answer["plan"])
        return result

    def modify(
        self,
        name: str | None = None,
        metadata: CollectionMetadata | None = None,
        configuration: UpdateCollectionConfiguration | None = None,
    ) -> None:
        """Rename, replace the metadata, change index parameters; what is None stays."""
        with validate.blaming("modify"):
            validate.check_metadata(metadata)
            if metadata is not None and "hnsw:space" in metadata:
                raise ValueError("the distance of a collection cannot change once it is created")
            update = None
            if configuration:
                update = configurations.update_to_json(
                    configuration, self._model.configuration_json
                )
        body = {"new_name": name, "new_metadata": metadata, "new_configuration": update}
        self._client.call("PUT", *self._path, body=body)
        if name is not None:
            self._model.name = name
        if metadata is not None:
            self._model.metadata = metadata
        if update:
            self._model.configuration_json = configurations.merged(
                self._model.configuration_json, update
            )
            self._rebuilt = None
            refreshed = self._client.call("GET", *self._database_path, self._model.name)
            self._model.schema = refreshed.get("schema")

    def _write(self, verb: str, columns: validate.Columns, vectors: Embeddings | None) -> None:
        ids = columns.ids or []
        batch_size_max = self._client.batch_size_max
        if 0 <= batch_size_max < len(ids):
            raise ValueError(f"Batch size {len(ids)} exceeds maximum batch size {batch_size_max}")
        body: dict[str, Any] = {
            "ids": ids,
            "embeddings": None if vectors is None else self._client.encode_embeddings(vectors),
            "metadatas": columns.metadatas,
            "documents": columns.documents,
            "uris": columns.uris,
        }
        self._client.call("POST", *self._path, verb, body=body)

    def _embed(
        self, columns: validate.Columns, fields: tuple[str, ...], *, is_query: bool = False
    ) -> Embeddings:
        """Vectors for the one field of `fields` that is given."""
        given = [name for name in fields if name in columns.given()]
        if len(given) != 1:
            raise ValueError(f"without embeddings, exactly one of {', '.join(fields)} is needed")
        values: Any = columns.given()[given[0]]
        count = len(values)
        if given == ["uris"]:
            values = self._load(values)
        function = self._function()
        embed_query = getattr(function, "embed_query", None) if is_query else None
        made = embed_query(input=values) if embed_query is not None else function(input=values)
        vectors = validate.as_embeddings(made)
        if vectors is None or len(vectors) != count:
            raise ValueError(
                f"the embedding function returned {len(vectors or [])} vectors for {count} inputs"
            )
        return vectors

    def _function(self) -> EmbeddingFunction[Any]:
        """The function that was passed, else the stored one, else the default."""
        passed = self._embedding_function
        if passed is not None and not configurations.is_default(passed):
            return passed
        persisted = self._model.configuration_json.get("embedding_function")
        if stored_name(persisted) is not None:
            if self._rebuilt is None:
                self._rebuilt = config_to_embedding_function(persisted or {})
            return self._rebuilt
        if passed is None:
            raise ValueError(
                "this collection has no embedding function: pass embeddings, or open it with one"
            )
        return passed

    def _check_loadable(self, include: Include) -> None:
        if "data" in include and self._data_loader is None:
            raise ValueError("data can be included only if the collection has a data loader")

    def _load(self, uris: list[URI | None]) -> list[Image | None]:
        if self._data_loader is None:
            raise ValueError("URIs can be loaded only if the collection has a data loader")
        return self._data_loader(uris=uris)

"""chromadb.AsyncHttpClient: the same wire, many requests at once."""

from __future__ import annotations

import asyncio
from typing import Any

import chromadb
import pytest
from chromadb.errors import NotFoundError


def test_async_client(host: str, port: int, name: str) -> None:
    async def scenario() -> None:
        client: Any = await chromadb.AsyncHttpClient(host=host, port=port)
        assert await client.heartbeat() > 0
        collection = await client.create_collection(name, embedding_function=None)
        await asyncio.gather(
            *(
                collection.add(
                    ids=[f"{batch}-{row}" for row in range(20)],
                    embeddings=[[float(batch), float(row)] for row in range(20)],
                    metadatas=[{"batch": batch, "row": row} for row in range(20)],
                )
                for batch in range(8)
            )
        )
        assert await collection.count() == 160
        answers = await asyncio.gather(
            *(collection.query(query_embeddings=[[b, 7.0]], n_results=1) for b in range(8))
        )
        assert [answer["ids"] for answer in answers] == [[[f"{b}-7"]] for b in range(8)]
        await collection.update(ids=["0-0"], metadatas=[{"row": -1}])
        got = await collection.get(ids=["0-0"])
        assert got["metadatas"] == [{"batch": 0, "row": -1}]
        await collection.delete(where={"batch": 3})
        assert await collection.count() == 140
        await client.delete_collection(name)
        with pytest.raises(NotFoundError):
            await client.get_collection(name)

    asyncio.run(scenario())

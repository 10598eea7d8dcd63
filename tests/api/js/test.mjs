// The official JavaScript client (the npm package chromadb) against a running server, whose address
// comes in OCHREDB_HOST and OCHREDB_PORT. test_official_clients.py starts the server and this file.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, before, beforeEach, describe, test } from "node:test";

import { AdminClient, ChromaClient } from "chromadb";

const host = process.env.OCHREDB_HOST;
const port = Number(process.env.OCHREDB_PORT);
assert.ok(host && port, "OCHREDB_HOST and OCHREDB_PORT name the server");

const ids = ["apple", "plum", "granite", "unknown"];
const embeddings = [[1, 0, 0], [0.75, 0.25, 0], [0, 0, 1], [0, 1, 0]];
const documents = ["a red apple", "a small plum", "a heavy granite block", "nothing is known"];
const metadatas = [
  { kind: "fruit", weight: 120, ripe: true },
  { kind: "fruit", weight: 15.5, ripe: false },
  { kind: "stone", weight: 900 },
  { kind: "none" },
];

const newName = () => `js-${randomUUID()}`;
const address = { host, port, ssl: false };

describe("the server", () => {
  const client = new ChromaClient(address);

  test("answers", async () => {
    assert.ok((await client.heartbeat()) > 0);
    assert.equal(await client.version(), "1.0.0");
  });
});

describe("collections", () => {
  const client = new ChromaClient(address);

  test("are created, listed, counted, found and dropped", async () => {
    const name = newName();
    const before = await client.countCollections();
    const created = await client.createCollection({
      name, metadata: { topic: "fruit" }, embeddingFunction: null,
    });
    assert.equal(created.name, name);
    assert.equal(created.metadata.topic, "fruit");
    assert.equal(await client.countCollections(), before + 1);
    const listed = await client.listCollections();
    assert.ok(listed.some((collection) => collection.name === name));
    const found = await client.getCollection({ name, embeddingFunction: null });
    assert.equal(found.id, created.id);
    const again = await client.getOrCreateCollection({ name, embeddingFunction: null });
    assert.equal(again.id, created.id);
    await client.deleteCollection({ name });
    await assert.rejects(client.getCollection({ name }), { name: "ChromaNotFoundError" });
  });

  test("are modified", async () => {
    const name = newName();
    const collection = await client.createCollection({ name, embeddingFunction: null });
    await collection.modify({ name: `${name}-b`, metadata: { owner: "me" } });
    const found = await client.getCollection({ name: `${name}-b`, embeddingFunction: null });
    assert.equal(found.id, collection.id);
    assert.deepEqual({ ...found.metadata }, { owner: "me" });
    await client.deleteCollection({ name: `${name}-b` });
  });

  for (const [space, expected] of [["l2", 5], ["cosine", 1], ["ip", 1]]) {
    test(`measure in ${space}`, async () => {
      const name = newName();
      const collection = await client.createCollection({
        name, configuration: { hnsw: { space } }, embeddingFunction: null,
      });
      await collection.add({ ids: ["x"], embeddings: [[2, 0]] });
      const answer = await collection.query({ queryEmbeddings: [[0, 1]], nResults: 1 });
      assert.ok(Math.abs(answer.distances[0][0] - expected) < 1e-6);
      await client.deleteCollection({ name });
    });
  }
});

describe("records", () => {
  const client = new ChromaClient(address);
  let collection;

  beforeEach(async () => {
    if (collection) await client.deleteCollection({ name: collection.name });
    collection = await client.createCollection({ name: newName(), embeddingFunction: null });
    await collection.add({ ids, embeddings, documents, metadatas });
  });
  after(async () => client.deleteCollection({ name: collection.name }));

  test("are added, counted, and read in order", async () => {
    assert.equal(await collection.count(), 4);
    const got = await collection.get({ include: ["documents", "metadatas", "embeddings"] });
    assert.deepEqual(got.ids, ids);
    assert.deepEqual(got.documents, documents);
    assert.deepEqual(got.embeddings, embeddings);
    assert.deepEqual(got.metadatas.map((one) => ({ ...one })), metadatas);
    const page = await collection.get({ limit: 2, offset: 1 });
    assert.deepEqual(page.ids, ["plum", "granite"]);
    assert.deepEqual((await collection.peek({ limit: 1 })).ids, ["apple"]);
  });

  test("an id that exists is left alone by add", async () => {
    await collection.add({ ids: ["apple"], embeddings: [[9, 9, 9]], documents: ["another"] });
    const got = await collection.get({ ids: ["apple"] });
    assert.deepEqual(got.documents, ["a red apple"]);
  });

  test("are found by nearness", async () => {
    const answer = await collection.query({
      queryEmbeddings: [[1, 0, 0], [0, 0, 2]], nResults: 2,
    });
    assert.deepEqual(answer.ids[0], ["apple", "plum"]);
    assert.equal(answer.ids[1][0], "granite");
    assert.deepEqual(answer.distances[0], [0, 0.125]);
    assert.equal(answer.distances[1][0], 1);
    assert.deepEqual(answer.documents[0], ["a red apple", "a small plum"]);
  });

  for (const [where, expected] of [
    [{ kind: "fruit" }, ["apple", "plum"]],
    [{ kind: { $ne: "fruit" } }, ["granite", "unknown"]],
    [{ weight: { $gt: 100 } }, ["apple", "granite"]],
    [{ ripe: true }, ["apple"]],
    [{ kind: { $in: ["stone", "metal"] } }, ["granite"]],
    [{ $and: [{ kind: "fruit" }, { weight: { $lte: 15.5 } }] }, ["plum"]],
    [{ $or: [{ kind: "stone" }, { ripe: false }] }, ["plum", "granite"]],
  ]) {
    test(`are filtered by ${JSON.stringify(where)}`, async () => {
      assert.deepEqual((await collection.get({ where })).ids, expected);
      const ranked = await collection.query({ queryEmbeddings: [[1, 0, 0]], nResults: 9, where });
      assert.deepEqual([...ranked.ids[0]].sort(), [...expected].sort());
    });
  }

  test("are filtered by their documents", async () => {
    const contains = await collection.get({ whereDocument: { $contains: "granite" } });
    assert.deepEqual(contains.ids, ["granite"]);
    const regex = await collection.get({ whereDocument: { $regex: "^a (red|small)" } });
    assert.deepEqual(regex.ids, ["apple", "plum"]);
  });

  test("are updated: metadata merges, the rest stays", async () => {
    await collection.update({ ids: ["plum"], metadatas: [{ weight: 16 }] });
    const got = await collection.get({ ids: ["plum"] });
    assert.deepEqual({ ...got.metadatas[0] }, { kind: "fruit", weight: 16, ripe: false });
    assert.deepEqual(got.documents, ["a small plum"]);
  });

  test("are upserted", async () => {
    await collection.upsert({
      ids: ["plum", "pear"], embeddings: [[0.5, 0.5, 0], [0.25, 0.75, 0]],
    });
    assert.equal(await collection.count(), 5);
    const answer = await collection.query({ queryEmbeddings: [[0.25, 0.75, 0]], nResults: 2 });
    assert.deepEqual(answer.ids[0], ["pear", "plum"]);
  });

  test("are deleted by id and by filter", async () => {
    await collection.delete({ ids: ["apple"] });
    await collection.delete({ where: { kind: "stone" } });
    assert.deepEqual((await collection.get()).ids, ["plum", "unknown"]);
    assert.equal(await collection.count(), 2);
  });

  test("of a wrong dimension are refused, and nothing is written", async () => {
    await assert.rejects(
      collection.add({ ids: ["short"], embeddings: [[1, 2]] }), /dimension of 3, got 2/,
    );
    await assert.rejects(
      collection.query({ queryEmbeddings: [[1, 2, 3, 4]] }), /dimension of 3, got 4/,
    );
    assert.equal(await collection.count(), 4);
  });

  test("cannot be written to a collection that is gone", async () => {
    const gone = await client.createCollection({ name: newName(), embeddingFunction: null });
    await client.deleteCollection({ name: gone.name });
    await assert.rejects(
      gone.add({ ids: ["a"], embeddings: [[1]] }), { name: "ChromaNotFoundError" },
    );
  });
});

describe("errors", () => {
  const client = new ChromaClient(address);
  let name;

  before(async () => {
    name = newName();
    await client.createCollection({ name, embeddingFunction: null });
  });
  after(async () => client.deleteCollection({ name }));

  test("a name that is taken", async () => {
    await assert.rejects(client.createCollection({ name, embeddingFunction: null }));
    await client.heartbeat();
  });

  test("a name that breaks the rule", async () => {
    await assert.rejects(
      client.createCollection({ name: "ab", embeddingFunction: null }), /3-512 characters/,
    );
  });

  test("a filter with an unknown operator", async () => {
    const collection = await client.getCollection({ name, embeddingFunction: null });
    await assert.rejects(collection.get({ where: { kind: { $like: "f%" } } }));
  });
});

describe("tenants and databases", () => {
  test("are created, and keep collections apart", async () => {
    const admin = new AdminClient(address);
    const [tenant, database] = [newName(), newName()];
    await admin.createTenant({ name: tenant });
    await admin.createDatabase({ name: database, tenant });
    assert.equal((await admin.getDatabase({ name: database, tenant })).name, database);
    const inside = new ChromaClient({ ...address, tenant, database });
    const name = newName();
    await inside.createCollection({ name, embeddingFunction: null });
    assert.deepEqual((await inside.listCollections()).map((one) => one.name), [name]);
    const outside = new ChromaClient(address);
    await assert.rejects(outside.getCollection({ name }), { name: "ChromaNotFoundError" });
    await admin.deleteDatabase({ name: database, tenant });
    await assert.rejects(admin.getDatabase({ name: database, tenant }));
  });
});

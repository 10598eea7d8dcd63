"""Load generator for servers that speak Chroma's REST API v2: one server, or two in one run.

    python -m peer_bench --a http://127.0.0.1:9000 --b http://127.0.0.1:8200 --quick --out r.json

With two servers every phase is cut into short slices that alternate A B, B A, ..., so that the
ratio survives noise from other users of the machine. A ratio above 1 always means that A is better.

The client is a hand-written keep-alive HTTP/1.1 client over blocking sockets, one thread per
connection, and sends bodies that were encoded before the clock starts, so that it costs a small
fraction of what it measures. The tables give the CPU cores it and the servers used.

Bodies are those of the official Python client: query vectors and JSON batches are float32 values
written as doubles; write batches carry base64 embeddings where the server says it takes them.

A server that acknowledges first and indexes later is waited for after every ingest and mix slice,
so that its background work never falls into the other's slice; the CPU time is counted as its own.
The phase `indexed` puts that wait on the clock.

Modules: http_client, data, servers, slices (one timed piece of a phase), bench (what the phases
share), phases_query, phases_ingest, phases_life, report.
"""

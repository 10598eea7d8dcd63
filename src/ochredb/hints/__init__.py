"""What processes tell one another to be quicker, and share to be fair. All of it optional (I11).

`base` holds the interface and the forms within one process; `link` the connections to Redis, and
on them `redis` hints by publish and subscribe, `hot` bytes of fragments, `limits` per tenant. The
truth is in the catalog: what is told here may be late, lost, repeated or wrong.
"""

"""Deterministic simulation: many processes in one, on one seeded scheduler and one clock.

Nothing here knows OchreDB's roles. A test composes them into a cluster and hands each process its
own view of one simulated catalog and one simulated object store, both of which fail as a seed
decides. All blocking code runs unchanged: it is switched where it would wait, at SQL statements,
commits, calls of the store, locks and sleeps.
"""

"""Alembic migrations of the catalog; one file a step, applied in order under the store's lock."""

"""The suites of the catalog, as they are, on PostgreSQL; and what only PostgreSQL can do."""

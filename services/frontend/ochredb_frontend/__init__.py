"""The REST role: HTTP in, calls to the catalog, the log and the query role out."""

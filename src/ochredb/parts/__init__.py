"""Parts: immutable indexed sets of rows. Each format has its builder beside its reader.

`manifest` says which sections a part has and where; `writer` and `reader` handle whole parts; the
other modules are one section family each. Formats are described page by page in docs/formats.
"""

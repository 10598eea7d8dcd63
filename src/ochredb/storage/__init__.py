"""Object stores: flat keys to immutable bytes, each object created once and never changed.

`base` holds the interface, `memory` and `directory` the implementations, `open_directory` the
checks made before a directory is used. `ochredb.testing.store_suite` is the suite that every store
passes.
"""

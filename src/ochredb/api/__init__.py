"""The client side: Chroma's client API over one seam, `Transport`, a single method.

    Client, Collection      what users hold: arguments checked and completed, answers shaped
        └── Rest            JSON, batch limits, errors by name
            └── Transport   bytes: HTTP to a server, or a node inside this process

Nothing here knows the engine; an embedded client differs from a remote one by its transport only.
"""

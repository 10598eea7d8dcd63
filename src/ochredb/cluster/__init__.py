"""From one role to the nodes of another: who they are, which to ask, what to do if one fails.

nodes = Nodes(open_membership("static:a=host1:8100,b=host2:8100", ...), connect, ...)
query = RoutedQuery(nodes, ...)  # An `ochredb.peers.Query`, as any other.

Everything here is a hint: with a wrong or stale view of the cluster requests take longer, and are
answered all the same (I11). What is repeated, when and how often is decided here and nowhere else.
"""

"""The roles' calls between processes: gRPC, as docs/formats/rpc.md says.

Clients implement the interfaces of `ochredb.peers` for one address; servicers, in the packages of
their roles, offer whatever implements them. Where all roles share a process nothing here is
imported.
"""

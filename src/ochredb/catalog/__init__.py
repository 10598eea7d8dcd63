"""Every mutable fact of a store, in SQL.

`schema` names the tables once, in SQLAlchemy Core; `database` runs compiled statements on the
driver's own connection; each other module holds one aggregate: `namespace` (tenants, databases,
collections), `logs` (appends, snapshots, fragments), `versions` (parts, commits), `objects`
(references, collection of garbage), `jobs` (leases).
"""

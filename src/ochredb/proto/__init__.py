"""Generated from `protos/`: the path of a module is the path of its definition."""

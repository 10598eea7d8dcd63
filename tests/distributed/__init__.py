"""The separate roles on real components."""

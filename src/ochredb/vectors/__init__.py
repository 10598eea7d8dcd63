"""Distances and exact search over vectors."""

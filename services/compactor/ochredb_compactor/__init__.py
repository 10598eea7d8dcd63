"""The compactor role: compaction, merges, garbage collection."""

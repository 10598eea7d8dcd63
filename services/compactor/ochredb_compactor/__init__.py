"""The compactor role: compaction, merges, garbage collection (DESIGN section 8)."""

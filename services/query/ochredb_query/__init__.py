"""The query role: strong reads over parts and tail (DESIGN section 9)."""

"""The query role: strong reads over parts and tail."""

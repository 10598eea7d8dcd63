"""The log role: group commit of requests into fragments (DESIGN section 6)."""

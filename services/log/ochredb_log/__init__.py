"""The log role: group commit of requests into fragments."""

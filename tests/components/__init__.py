"""Real components for tests, each a class that starts one on a free loopback port and stops it."""

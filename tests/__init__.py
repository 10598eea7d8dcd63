"""Tests by kind; one kind imports another's helpers as `tests.crash.actor`."""

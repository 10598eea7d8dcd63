"""Test kits that ship with the package, so that any implementation can prove itself."""

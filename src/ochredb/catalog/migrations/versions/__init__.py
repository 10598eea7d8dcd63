"""The steps. `0001_initial` creates the tables of format version 1."""

"""Rows: where they lie, which worker reads which, in what order."""

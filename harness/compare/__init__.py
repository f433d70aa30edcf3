"""From finished runs to a table: `python -m harness.compare <folder> [--out <folder>]`."""

"""Makes a table of finished runs: `python -m harness.compare <folder> [--out <folder>]`."""

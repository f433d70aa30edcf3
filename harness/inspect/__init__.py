"""The content of a trained adapter: `python -m harness.inspect <run> [<run> ...]`."""

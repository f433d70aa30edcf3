"""What training wrote into an adapter: `python -m harness.inspect <run> [<run> ...]`."""

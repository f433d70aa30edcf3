"""The settings of a run: what was asked for."""

"""The controls: everything that two runs under comparison must share."""

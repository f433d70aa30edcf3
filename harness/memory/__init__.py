"""The memory that a run will need: traced without values, printed next to the memory it took."""

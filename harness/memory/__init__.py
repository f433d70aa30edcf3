"""What a run will need, before it needs it: traced without values, printed beside what it took."""

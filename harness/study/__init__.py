"""Many runs: which to start, what was found, which to choose."""

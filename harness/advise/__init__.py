"""A place to start, and the word of the studies here on the rules that circulate."""

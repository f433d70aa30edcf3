"""Where to start, and what the studies here say of the rules that circulate."""

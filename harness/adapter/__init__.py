"""Trained adapters: the native format, PEFT's, merged models, answers."""

"""Trained adapters on disk: the native format, PEFT's, and merged models."""

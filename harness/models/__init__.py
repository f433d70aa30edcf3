"""Base models: a pretrained backbone, a seeded head and a tokenizer, one loader a file."""

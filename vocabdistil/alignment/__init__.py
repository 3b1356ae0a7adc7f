"""Tokenizers and how their tokens correspond."""

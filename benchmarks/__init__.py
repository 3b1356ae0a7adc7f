"""Benchmarks: ``python -m benchmarks NAME...``, each operation against its reference and its rivals."""

"""Triton kernels, one file per operation; installed as ``vocabdistil.triton_kernels``. Importing this package does not
need triton, importing an operation does."""

"""Run in a process of their own by tests/test_triton.py: the interpreter must be on before kernels are defined."""

"""The compiled module. Private: its functions take addresses, sizes and codes, as csrc/ops.h describes them, and are
called through ``_native.py``, ``remap.py``, ``align.py`` and ``_surfaces.py``, which check everything before."""

from typing import Any

cxx_compiler: str
isas: str
cuda_compiler: str | None
cuda_architectures: str

def active_isa() -> str: ...
def __getattr__(name: str) -> Any: ...

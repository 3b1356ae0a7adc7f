"""What this installation and machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import dispatch, native


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def backends() -> dict[str, Any]:
    """What is built, with which compilers and architectures, and what can run here.

    Returns:
        A dictionary that ``json.dumps`` takes: ``machine``, ``versions``, ``build`` (of the compiled module) and
        ``backends``: for each of ``cpu``, ``cuda``, ``triton`` and ``reference`` whether it is ``available``, the
        ``reason`` if it is not, and the ``operations`` it has.
    """
    build: dict[str, Any] = {"loaded": native.load_error() is None, "error": native.load_error()}
    if build["loaded"]:
        module = native.module()
        build |= {
            "cxx_compiler": module.cxx_compiler,
            "isas": module.isas.split(","),
            "active_isa": module.active_isa(),
            "cuda_compiler": module.cuda_compiler,
            "cuda_architectures": [a for a in module.cuda_architectures.split(",") if a],
        }
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    operations: dict[str, list[str]] = {name: [] for name in dispatch.BACKENDS}
    for op, devices in dispatch.TABLE.items():
        for name in {choice for choices in devices.values() for choice in choices}:
            operations[name].append(op)
        operations["reference"].append(op)
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "versions": {
            "python": platform.python_version(),
            **{p: _version(p) for p in ("vocabdistil", "torch", "transformers", "tokenizers", "triton")},
            "torch_cuda": torch.version.cuda,
        },
        "build": build,
        "backends": {
            name: {
                "available": (why := dispatch.unavailable(name)) is None,
                "reason": why,
                "operations": sorted(operations[name]),
            }
            for name in dispatch.BACKENDS
        },
    }

"""Builds ``vocabdistil._C`` with CMake and Ninja. Never imports torch: the module takes plain addresses."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("VOCABDISTIL_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            sys.exit(f"VOCABDISTIL_CUDA: expected AUTO, ON or OFF, got {cuda!r}")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVOCABDISTIL_CUDA={cuda}",
        ]  # fmt: skip
        if archs := os.environ.get("VOCABDISTIL_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        try:  # the ninja package's own binary, if the system has none
            import ninja

            configure.append(f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}")
        except ImportError:
            pass
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("vocabdistil._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

"""Code for an instruction set is run only where it was chosen: what all share must be code for any CPU."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from vocabdistil.core import native


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_what_is_shared_needs_no_instruction_set():
    """Of inline functions that several objects hold the linker keeps one."""
    module = native.module()
    if "avx2" not in module.isas.split(","):
        pytest.skip("one instruction set only")
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module.__file__], capture_output=True, text=True)
    wrong, name, seen = set(), "", 0
    for line in code.stdout.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:", line):
            name, seen = found[1], seen + 1
        elif ("%ymm" in line or "%zmm" in line) and not re.search("4avx2|6avx512", name):
            wrong.add(name)
    assert seen > 100, "a stripped module tells nothing"
    assert not wrong

"""A forked child of a process whose threads have worked: it has none of them, and waits for none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Work for several threads, before the fork and in the child; the child takes what the parent found.
PROGRAM = """
import os, sys
import torch
import vocabdistil as vd
from tests.losses import LOSSES, WIDTH
from tests.spans import make_pairs
from tests.vocabularies import randn

torch.set_num_threads(2)
pairs, n_s, n_t = make_pairs(30_000, seed=0)
teacher = randn(n_t, WIDTH, seed=1)
table = vd.RemapTable(torch.arange(1001), torch.arange(1000), student_vocab_size=1000, unk_id=0, pad_id=0)
ids = torch.arange(400_000).view(400, 1000) % 1000
names = [name for name in LOSSES if name not in ("contrastive", "relation_loss", "attention_loss", "pooled_loss")]

def work():
    found = []
    for name in names:
        student = randn(n_s, WIDTH).requires_grad_()
        loss = LOSSES[name](student, teacher, pairs)
        loss.backward()
        found += [loss.detach(), student.grad]
    out = table.remap(ids)
    matched = vd.MatchedVocab(torch.arange(1000), torch.arange(1000))
    aligned = vd.match_pairs(ids, ids, matched)
    (ids.double().sqrt() + 1).sum()  # torch's own threads
    return [*found, out.input_ids, out.pairs.student_end, aligned.student_start]

want = work()
child = os.fork()
if child == 0:
    good = all(torch.equal(a, b) for a, b in zip(want, work(), strict=True))
    os._exit(0 if good else 3)
_, status = os.waitpid(child, 0)
assert all(torch.equal(a, b) for a, b in zip(want, work(), strict=True))
sys.exit(os.waitstatus_to_exitcode(status))
"""

# Where somebody asked for parallel tokenizers, as the command line does.
TOKENIZERS = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "true"
import vocabdistil as vd
from tests.models.tiny_teachers import texts, tiny_teacher

def work():
    return vd.align(texts() * 20, tiny_teacher("bert"), tiny_teacher("roberta")).pairs

want = work()
child = os.fork()
if child == 0:
    os._exit(0 if len(work()) == len(want) else 3)
_, status = os.waitpid(child, 0)
assert len(work()) == len(want) and os.environ["TOKENIZERS_PARALLELISM"] == "true"
sys.exit(os.waitstatus_to_exitcode(status))
"""

NATIVE_ALONE = """
import os, sys
import torch
import vocabdistil as vd
from vocabdistil.core import native

torch.set_num_threads(2)
rows, at = torch.randn(60_000, 64), torch.arange(60_001, dtype=torch.int32)
out = torch.empty(60_000, 64)
work = lambda: native.span_mean_fwd([rows], at[:-1], at[1:], None, True, out)
work()
if os.fork() == 0:
    torch.set_num_threads(2)  # threads of the child's own, whatever else does not work with them
    work()
    os._exit(0 if (out.numpy() == rows.numpy()).all() else 3)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("program", [PROGRAM, NATIVE_ALONE, TOKENIZERS], ids=["all", "native", "tokenizers"])
def test_a_forked_child_computes_the_same(program: str) -> None:
    # Files and no pipes: a child that hangs would hold those open.
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=told, start_new_session=True)
        try:
            code = process.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        told.seek(0)
        assert code == 0, told.read().decode()

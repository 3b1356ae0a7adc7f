"""The CUDA kernels and their bindings, compiled for the host (tests/cuda_on_host) and run there: what they compute is
proven without a GPU, how fast is not."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tests import cuda_on_host
from tests.cuda_on_host.fixtures import *  # noqa: F403
from tests.matched_kl_backend import *  # noqa: F403
from tests.remap_backend import *  # noqa: F403
from tests.span_loss_backend import *  # noqa: F403
from tests.span_mean_backend import *  # noqa: F403
from vocabdistil.core import native

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def on_host(module, monkeypatch):
    """CPU tensors go to the CUDA path, and its launches to the host."""
    cuda_on_host.serve_the_host(monkeypatch, module)


@pytest.mark.parametrize("pairs", [0, 2])
@pytest.mark.parametrize("where", ["another stream", "the default stream", "no device"])
def test_a_launch_elsewhere_is_noticed(where, pairs, module, monkeypatch):
    """Every test here would fail of one: each launch is looked at."""

    @contextlib.contextmanager
    def stream(device):
        if where == "no device":
            with cuda_on_host.current_stream(module) as handle:
                pass
            yield handle
        else:
            with cuda_on_host.current_stream(module) as handle:
                yield handle + 1 if where == "another stream" else 0

    tables = native._new_tables(torch.zeros(1), 8, 8, False)
    tables[0].fill_(-1)
    monkeypatch.setattr(native, "_cuda_stream", stream)
    start = torch.arange(pairs, dtype=torch.int32)
    x, out, loss = torch.ones(4, 8), torch.empty(pairs, 8), torch.empty(pairs)
    options = (0, True, 1.0, 0.5, loss, torch.zeros(()), [torch.empty(4, 8)], None, None)
    ids = torch.arange(4)
    spans = [start, start + 1] * 2
    logits = (torch.ones(4, 8), torch.ones(4, 8), spans, ids, ids, torch.ones(pairs), 0, True, 1.0, True)
    calls = {
        "matched_tables": lambda: native.matched_tables(ids, ids, 8, 8, False, False),
        "matched_kl": lambda: native.cuda_matched_kl(*logits, loss, torch.zeros(()), torch.empty(4, 8)),
        "span_loss": lambda: native.cuda_span_loss([x], [x], spans, None, 1.0, None, None, *options),
        "remap": lambda: native.cuda_remap(x.long(), None, start, start, 0, 0, 3),
        "span_mean_bwd": lambda: native.cuda_span_mean_bwd(out, start, start + 1, None, True, [torch.empty(4, 8)]),
    }
    if pairs:
        calls["span_mean_fwd"] = lambda: native.cuda_span_mean_fwd([x], start, start + 1, None, True, out)
    for name, call in calls.items():
        if name == "matched_kl":
            monkeypatch.setattr(native, "matched_tables", lambda *arguments: tables)
        with pytest.raises(RuntimeError, match="not launched on the stream of the tensors' device"):
            call()


def test_launches_go_to_the_current_stream_of_the_device_of_their_tensors(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=f"stream of {current[-1]}"))
    with native._cuda_stream(1) as stream:
        assert stream == "stream of 1" and current == [0, 1]
    assert current == [0]

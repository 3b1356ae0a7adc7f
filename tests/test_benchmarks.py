"""The benchmark harness: its gate, its rows, its file, and what it prints from them."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest
import torch

import vocabdistil as vd
from benchmarks import (
    _losses,
    align,
    collate,
    harness,
    launches,
    linear_matched_kl,
    linear_remapped_kl,
    linear_span_likelihood,
    matched_kl,
    relation_loss,
    remap,
    remapped_kl,
    report,
    span_likelihood,
    span_loss,
    span_mean,
)
from benchmarks.__main__ import main
from benchmarks.harness import Case, Problem, Provider
from tests._families import SCRIPTS, family
from vocabdistil.core import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.COPY_BYTES, "cpu", 1 << 20)


def square(providers: dict[str, object], modes: tuple[str, ...] = ("fwd", "fwd+bwd")) -> Case:
    """sum x^2, whose gradient is 2 x; ``providers``: name -> function of x."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def build(device: torch.device) -> Problem:
        made = {name: Provider(lambda call=call: call(x)) for name, call in providers.items()}
        wide = x.detach().double()
        return Problem(
            made,
            lambda: [wide.square().sum(), 2 * wide],
            nbytes={"fwd": 200, "fwd+bwd": 400},
            leaves=[x],
            missing={"rival": "absent"},
        )

    return Case("square", build, modes=modes)


def right(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


def test_rows_are_well_formed():
    rows = harness.run_case("toy", square({"reference": right, "ours": right}), CPU, quick=True)
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (name, mode) for mode in ("fwd", "fwd+bwd") for name in ("reference", "ours", "rival")
    ]
    for row in rows:
        assert tuple(row) == report.COLUMNS
        if row["provider"] == "rival":
            assert row["error"] == "unavailable: absent" and row["p50_ms"] == "" and not report.failed(row)
            continue
        p20, p50, p80 = (float(row[f"p{p}_ms"]) for p in (20, 50, 80))
        assert 0 < p20 <= p50 <= p80
        assert float(row["gb_s"]) == pytest.approx(row["bytes"] / p50 / 1e6, rel=1e-2)
        assert row["error"] == "" and row["dtype"] == "float32" and row["threads"] == torch.get_num_threads()
    by_key = {(row["provider"], row["mode"]): row for row in rows}
    ratio = float(by_key["reference", "fwd"]["p50_ms"]) / float(by_key["ours", "fwd"]["p50_ms"])
    assert float(by_key["ours", "fwd"]["speedup_vs_reference"]) == pytest.approx(ratio, rel=2e-2)
    assert by_key["ours", "fwd"]["bytes"] == 200 and by_key["ours", "fwd+bwd"]["bytes"] == 400


def raising(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


def without_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum().detach() + 0 * torch.ones((), requires_grad=True)


def wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    half = x.detach() * x
    return half.sum()


@pytest.mark.parametrize(
    ("wrong", "mode", "message"),
    [
        (lambda x: right(x) * (1 + 1e-3), "fwd", "tensor 0 has relative error 1.0e-03"),
        (lambda x: right(x) * float("nan"), "fwd", "tensor 0 has relative error nan"),
        (lambda x: x.square(), "fwd", "tensor 0 has relative error inf"),
        (lambda x: (right(x), right(x)), "fwd", "2 tensors, expected 1"),
        (wrong_gradient, "fwd+bwd", "tensor 1 has relative error 5.0e-01"),
        (without_gradient, "fwd+bwd", "no gradient in tensor 1"),
        (raising, "fwd", "RuntimeError: no such kernel"),
    ],
)
def test_gate_catches_wrong_providers(wrong, mode, message):
    rows = harness.run_case("toy", square({"reference": right, "ours": wrong}, (mode,)), CPU, quick=True)
    by_name = {row["provider"]: row for row in rows}
    assert message in by_name["ours"]["error"] and report.failed(by_name["ours"])
    assert by_name["ours"]["p50_ms"] == "" and by_name["ours"]["speedup_vs_reference"] == ""
    assert by_name["reference"]["error"] == "" and by_name["reference"]["p50_ms"]


def test_a_wrong_rival_does_not_fail_the_run():
    rows = harness.run_case("toy", square({"official": raising, "ours": right}), CPU, quick=True)
    assert any(row["error"] for row in rows) and not any(map(report.failed, rows))


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_exit_status(broken, status, tmp_path, monkeypatch):
    monkeypatch.setattr(span_loss, "cases", lambda device: [square({"ours": raising if broken else right})])
    out = tmp_path / "rows.csv"
    assert main(["span_kl", "--quick", "--out", str(out)]) == status
    assert [row["operation"] for row in report.read_rows(out)] == ["span_loss"] * 4


def test_append_keeps_old_rows(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    rows = [dict.fromkeys(report.COLUMNS, "") | {"case": case, "error": 'a "quoted", text'} for case in "abc"]
    report.append_rows(path, rows[:1])
    report.append_rows(path, rows[1:])
    assert report.read_rows(path) == rows
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_append_refuses_other_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("provider,case\nours,a\n")
    with pytest.raises(ValueError, match="expected the columns operation"):
        report.append_rows(path, [])
    assert path.read_text() == "provider,case\nours,a\n"


def test_random_pairs():
    pairs, (batch, width) = harness.random_pairs(4, 64, CPU)
    sizes = pairs.student_end - pairs.student_start
    assert len(pairs) == 256 and set(sizes.tolist()) == {1, 2, 3} and 1.15 < float(sizes.float().mean()) < 1.5
    assert (pairs.student_start // width == torch.arange(256) // 64).all()
    assert ((pairs.student_end - 1) // width == torch.arange(256) // 64).all()
    assert int(sizes.view(4, 64).sum(1).max()) == width and batch == 4


@pytest.mark.parametrize("d_s", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_span_loss_providers_agree(dtype, d_s):
    case = Case("tiny", lambda device: span_loss.build(device, (2, 9), 16, d_s, dtype, 2, 3), dtype)
    rows = harness.run_case("span_loss", case, CPU, ["reference", "official", "ours"], quick=True)
    assert len(rows) == 6 and not any(row["error"] for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_span_mean_providers_agree(dtype):
    case = Case("tiny", lambda device: span_mean.build(device, 2, 9, 16, dtype), dtype)
    rows = harness.run_case("span_mean", case, CPU, ["reference", "embedding_bag", "ours"], quick=True)
    assert len(rows) == 6 and not any(row["error"] for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_matched_kl_providers_agree(unmatched, dtype, monkeypatch):
    monkeypatch.setattr(_losses, "TRUTH_ROWS", 4)
    case = Case("tiny", lambda device: matched_kl.build(device, 9, 60, 20, 15, unmatched, dtype), dtype, ("fwd+bwd",))
    rows = harness.run_case("matched_kl", case, CPU, ["reference", "ours"], quick=True)
    assert len(rows) == 2 and not any(row["error"] for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_matched_kl_providers_agree(dtype, monkeypatch):
    monkeypatch.setattr(_losses, "TRUTH_ROWS", 4)
    make = functools.partial(linear_matched_kl.build, rows=9, v_t=60, v_s=20, v_m=15, d_t=8, d_s=6, dtype=dtype)
    case = Case("tiny", make, dtype, ("fwd+bwd",))
    names = ["reference", "full-logits", "ours", "orda", "liger", "fla"]
    rows = harness.run_case("linear_matched_kl", case, CPU, names, quick=True)
    errors = {row["provider"]: row["error"] for row in rows}
    assert not any(errors[name] for name in names[:3])
    absent = {name: error for name, error in errors.items() if error}
    assert set(absent) - {"orda"} == {"liger-jsd", "liger-kl", "fla"}
    assert all(error.startswith(report.UNAVAILABLE) for error in absent.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_span_likelihood_providers_agree(dtype):
    shape = {"batch": 2, "length": 9, "v_s": 20, "v_t": 60, "dtype": dtype}
    linear = functools.partial(linear_span_likelihood.build, **shape, d_s=6, d_t=8)
    for operation, make in (("span_likelihood", functools.partial(span_likelihood.build, **shape)),
                            ("linear_span_likelihood", linear)):  # fmt: skip
        case = Case("tiny", make, dtype, ("fwd+bwd",))
        rows = harness.run_case(operation, case, CPU, ["reference", "full-logits", "ours"], quick=True)
        assert len(rows) == 3 and not any(row["error"] for row in rows)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
@pytest.mark.parametrize(("dtype", "uneven"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_remapped_kl_providers_agree(dtype, uneven, combine, monkeypatch):
    monkeypatch.setattr(_losses, "TRUTH_ROWS", 4)
    case = Case(
        "tiny", lambda device: remapped_kl.build(device, 9, 60, 20, combine, dtype, uneven), dtype, ("fwd+bwd",)
    )
    rows = harness.run_case("remapped_kl", case, CPU, ["reference", "ours"], quick=True)
    assert len(rows) == 2 and not any(row["error"] for row in rows)


@pytest.mark.parametrize("top_k", [None, 5])
def test_linear_remapped_kl_providers_agree(top_k, monkeypatch):
    monkeypatch.setattr(_losses, "TRUTH_ROWS", 4)
    make = functools.partial(
        linear_remapped_kl.build, rows=9, v_t=60, v_s=20, d_t=8, d_s=6, top_k=top_k, dtype=torch.float32
    )
    case = Case("tiny", make, torch.float32, ("fwd+bwd",))
    rows = harness.run_case("linear_remapped_kl", case, CPU, ["reference", "full-logits", "ours"], quick=True)
    assert len(rows) == 3 and not any(row["error"] for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relation_loss_providers_agree(dtype):
    make = functools.partial(relation_loss.build, shape=(2, 9), d_t=12, d_s=8, heads=4, dtype=dtype)
    case = Case("tiny", make, dtype, ("fwd+bwd",))
    rows = harness.run_case("relation_loss", case, CPU, ["reference", "ours"], quick=True)
    assert len(rows) == 2 and not any(row["error"] for row in rows)


def test_bytes_of_matched_kl_are_whole_sectors():
    assert matched_kl.sectors(torch.tensor([0, 15, 16, 47, 33]), 2) == 3
    problem = matched_kl.build(CPU, 7, 64, 32, 32, "rest", torch.bfloat16)
    assert problem.nbytes["fwd+bwd"] == 7 * 2 * (64 + 2 * 32)


def test_half_precision_is_no_excuse_for_ours():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = Provider(lambda: x.sum().float() * (1 + 1e-3))
    problem = Problem({"official": rounded, "ours": rounded}, lambda: [x.double().sum()], {"fwd": 128})
    case = Case("half", lambda device: problem, torch.bfloat16, ("fwd",))
    rival, own = harness.run_case("toy", case, CPU, quick=True)
    assert rival["error"] == "" and "wrong: tensor 0" in own["error"]


def test_segment_means_are_span_means():
    pairs, (batch, width) = harness.random_pairs(3, 7, CPU)
    x = torch.randn(batch * width, 5, generator=torch.Generator().manual_seed(1))
    start, end = pairs.student_start, pairs.student_end
    assert int((end - start).sum()) < batch * width, "no padding, no gaps to leave out"
    got = span_loss.segment_means(start, end, batch * width)(x)
    torch.testing.assert_close(got, vd.reference.span_mean(x, start, end))


def test_remap_and_match_agree_with_python():
    teacher, student = remap.wordpiece(900), remap.wordpiece(90)
    table = vd.RemapTable.from_tokenizers(teacher, student)
    ids = remap.zipf_ids(5, 20, len(table))
    rows = [[piece for t in row for piece in table.rows(t)] for row in ids.tolist()]
    problems = {
        "remap": remap.remap_problem(table, ids),
        "align": align.match_problem(teacher, student, ids.tolist(), rows),
        "boundary": align.boundary_problem(align.random_offsets(3, 20, 8, 0), align.random_offsets(3, 26, 6, 1)),
    }
    for name, problem in problems.items():
        case = Case("tiny", lambda device, problem=problem: problem, torch.int64, ("run",))
        measured = harness.run_case(name, case, CPU, ["python", "ours"], quick=True)
        assert [row["provider"] for row in measured] == ["python", "ours"]
        assert not any(row["error"] for row in measured)
        assert all(float(row["tokens_per_s"]) > 0 for row in measured)


@pytest.mark.parametrize("method", ["boundary", "word", "match"])
def test_align_of_texts_is_timed_against_two_calls_of_the_tokenizer(method):
    problem = align.align_problem(family("llama"), family("wordpiece"), SCRIPTS, method)
    case = Case("tiny", lambda device: problem, torch.int64, ("run",))
    rows = harness.run_case("align", case, CPU, ["reference", "ours"], quick=True)
    assert not any(row["error"] for row in rows) and float(rows[1]["speedup_vs_reference"]) > 0


@pytest.mark.parametrize("whole", [False, True])
def test_making_batches_is_timed_against_reading_them(whole, teacher_folder, demo_lines):
    from transformers import AutoTokenizer

    teacher = AutoTokenizer.from_pretrained(teacher_folder)
    problem = collate.problem(teacher, teacher, demo_lines[:5], whole)
    rows = harness.run_case(
        "collate", Case("tiny", lambda device: problem, torch.int64, ("run",)), CPU, ["reference", "ours"], quick=True
    )
    assert not any(row["error"] for row in rows) and all(float(row["tokens_per_s"]) > 0 for row in rows)


def test_remap_of_a_fixed_width_is_that_of_the_cpu(monkeypatch):
    monkeypatch.setitem(dispatch.TABLE["remap"], "cpu", ("cpu", "torch"))
    table = vd.RemapTable.from_tokenizers(remap.wordpiece(900), remap.wordpiece(90))
    problem = remap.fixed_problem(table, remap.zipf_ids(5, 20, len(table)), CPU)
    plain = problem.providers["reference"]
    assert not harness.judge(plain.outputs(plain.call()), problem.truth())


def test_share_of_others():
    assert report.share_of_others((10.0, 5.0, 100.0), (16.0, 7.0, 108.0)) == "0.50"
    assert report.share_of_others((10.0, 5.0, 100.0), (12.0, 7.1, 108.0)) == "0.00"
    assert report.share_of_others(None, (1.0, 1.0, 1.0)) == ""


def test_retries_look_at_the_machine_and_not_at_the_times(monkeypatch):
    shares = iter(["0.60", "0.30", "0.05", "0.90"])
    monkeypatch.setattr(harness, "share_of_others", lambda before, after: next(shares))
    rows = harness.run_case("toy", square({"ours": right}, ("fwd",)), CPU, ["ours"], quick=True, retries=5)
    assert [row["others"] for row in rows] == ["0.05"] and next(shares) == "0.90"


def made_row(**values: object) -> dict[str, object]:
    row = dict.fromkeys(report.COLUMNS, "") | {"operation": "span_loss", "case": "b8-l256-d768"}
    return row | {"mode": "fwd+bwd", "threads": 2, "copy_fraction": 0.5, "gb_s": 10} | values


@pytest.mark.parametrize(
    ("shares", "shown"),
    [
        ((0.0, 0.1), "| 12.0 | - | 3.0 | 4 | - | 0.5 | - |"),
        ((0.0, 0.4), "| 28.0 | - | 7.0 | 4 | - | 0.5 | - |"),
        ((0.3, 0.4), "| * | * | * | * | * | * | * |"),
    ],
)
def test_figures_take_the_last_undisturbed_run(shares, shown, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for date, ms, others in zip(("2020-01-01", "2020-01-02"), (7.0, 3.0), shares, strict=True):
        run = {"date": date, "others": others}
        rows = [made_row(provider="reference", p50_ms=4 * ms, **run)]
        rows.append(made_row(provider="ours", p50_ms=ms, speedup_vs_reference=4, **run))
        report.append_rows(path, rows)
    assert main(["figures", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"| span_loss | b8-l256-d768 | fwd+bwd | 2 {shown}" in printed
    assert ("left out" in printed) == ("*" in shown)


def test_figures_of_the_committed_results(capsys):
    assert main(["figures"]) == 0
    printed = capsys.readouterr().out
    for operation, case in (("span_loss", "b8-l256-d768"), ("remap", "build-120000")):
        assert f"| {operation} | {case}" in printed
    with (report.RESULTS / "cpu.csv").open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == report.COLUMNS


def test_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path, out = tmp_path / "rows.csv", tmp_path / "sweep.png"
    report.append_rows(path, [made_row(provider="ours", p50_ms=1.0)])
    with pytest.raises(ValueError, match="expected rows of sweep-P-D"):
        report.picture(path, out)
    sweep = [(10, 768), (1000, 768), (1000, 8)]
    report.append_rows(
        path, [made_row(case=f"sweep-{p}-{d}", provider="ours", p50_ms=p * d / 1e5) for p, d in sweep]
    )
    assert main(["picture", str(path), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "invalid choice"),
        (["span_mean", "--threads", "0"], "--threads: expected at least 1"),
        (["span_mean", "--case", "no such case"], "no case and provider of that name"),
    ],
)
def test_bad_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("operation", dispatch.TABLE)
def test_a_sanitizer_has_launches_of_every_operation_to_look_at(operation):
    assert launches.small(torch.device("cpu"), operation) > 0

"""The table of ops: every provider computes what the reference computes, and what does not is not timed."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from ijepa_fast import ops
from ijepa_fast.bench import table as ops_table
from ijepa_fast.bench.cases import attention as attention_cases
from ijepa_fast.bench.cases import floors
from ijepa_fast.bench.cases.floors import MODELS, TINY, Workload, cost
from ijepa_fast.bench.cases.rows import Batch, Provider
from ijepa_fast.ragged import Ragged

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FLOOR_RATES = 4.3e12, 790e12  # bytes and operations per second of a large copy and a large bf16 product on an H200


@cache
def cases(dtype=torch.float32):
    batch = replace(Batch.draw(TINY["tiny"], 2, CPU), dtype=dtype)
    return {case.key: case for case in ops_table.cases(batch)}


KEYS = list(cases())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("key", KEYS)
def test_every_provider_agrees_with_the_definition(key, dtype):
    """bf16 is the dtype of GPUs, whose rounding the allowances are made for."""
    case = cases(dtype)[key]
    for name, provider in case.providers.items():
        if name != "compile" and provider.unavailable is None:
            for mode in case.costs:
                found, allowed = ops_table.check(case, name, mode, CPU)
                assert 0 <= found <= allowed


@pytest.mark.slow
def test_compiled_providers_agree_with_the_reference():
    """One forward only, one with several results, one with a scalar: each takes the compiler many seconds."""
    with ops_table.settings():
        for key in ("gather_add, context", "layer_norm, context, with residual", "target_loss, targets"):
            for mode in ("forward", "backward", "both"):
                ops_table.check(cases()[key], "compile", mode, CPU)
            torch.compiler.reset()


@pytest.mark.parametrize("lengths", [[5], [100, 37, 250, 1, 64, 128, 90], [128, 128], [1] * 300])
def test_flex_attention_sees_the_keys_of_each_set(lengths, monkeypatch):
    """Forward and not compiled, which is what torch runs on a CPU."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = Ragged(torch.zeros(sum(lengths), dtype=torch.int32), bounds, max(lengths))
    mask = attention_cases.block_mask(tokens)
    sets = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    whole = create_block_mask(lambda b, h, q, k: sets[q] == sets[k], 1, 1, len(sets), len(sets), device="cpu")
    assert torch.equal(mask.to_dense(), whole.to_dense())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = torch.randn(3, sum(lengths), 2, 16, generator=torch.Generator().manual_seed(0))
    found = attention_cases.PEERS["compile"][0](tokens, max(lengths))(q, k, v)
    exact, _ = ops.varlen_attention.definition(q, k, v, bounds, bounds, max(lengths), max(lengths))
    torch.testing.assert_close(found, exact)


def test_every_op_has_a_case():
    """Those of ops/, but for backward passes, which their forward passes bring, and the packed form of attention."""
    names = {name for name, op in vars(ops).items() if isinstance(op, torch.library.CustomOpDef)}
    wanted = {name for name in names if not name.endswith("_backward")} - {"varlen_self_attention"}
    assert len(wanted) >= 10 and {case.op for case in cases().values()} == wanted


ADD = cases()["gather_add, context"]
OURS = ADD.providers["ours"].function


@pytest.fixture(scope="module")
def row_of():
    """The row of a case, or of ``ADD`` with another function in place of ours."""
    measured = ops_table.Floors(CPU)

    def row_of(function, mode="forward", case=ADD, timed=True):
        case = replace(case, providers={**case.providers, "ours": Provider(function)})
        return ops_table.row("tiny", case, "ours", mode, measured if timed else None, CPU)

    return row_of


def test_a_right_provider_is_timed(row_of):
    row = row_of(OURS, "both")
    assert row["error"] <= row["allowed_error"] and row["times"]["cpu"]["p50"] > 0
    assert row["of_floor"] == pytest.approx(row["floor_us"] / row["times"]["cpu"]["p50"], rel=1e-2)
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["times"]["cpu"]["p50"] / 1e3, abs=0.01)
    checked = row_of(OURS, timed=False)
    assert "times" not in checked and "right, off by" in ops_table.line(checked)


def raising(message):
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("mode", "function", "message"),
    [
        ("forward", lambda x, table: OURS(x, table) * 1.0001, "is off by"),
        ("forward", lambda x, table: torch.cat([OURS(x, table)[:-1], x[-1:] * float("nan")]), "off by nan units"),
        ("forward", lambda x, table: OURS(x, table)[:-1], "has shape"),
        ("both", lambda x, table: OURS(x.detach() + 0 * x, table), "is off by"),  # a wrong gradient alone
        ("both", lambda x, table: raising("out of something\nand more"), "RuntimeError: out of something"),
    ],
)
def test_a_wrong_provider_is_not_timed_and_does_not_end_the_table(row_of, mode, function, message):
    row = row_of(function, mode)
    assert "times" not in row and message in row["failed"] and "\n" not in row["failed"]


def test_in_place_ops_are_checked_on_what_they_changed(row_of):
    def nothing(*lists):
        return [tensor for tensors in [lists[0], *lists[2:]] for tensor in tensors]

    assert row_of(nothing, case=cases()["adamw_ema_, all parameters"])["failed"].startswith("WrongResult")


def test_a_peer_that_fails_or_is_wrong_allows_nothing_more():
    for function, allowed in ((lambda x, table: raising("no memory"), 2.0), (lambda x, table: x * 0, 16.0)):
        spoiled = replace(ADD, providers={**ADD.providers, "eager": Provider(function)})
        assert ops_table.check(spoiled, "ours", "forward", CPU)[1] == allowed


@pytest.mark.parametrize("captured", [True, False])
def test_a_gpu_is_timed_by_events_and_by_a_graph_of_calls_on_data_of_their_own(monkeypatch, captured):
    """With stand-ins for CUDA: the data is on the CPU, and only what is called when is looked at."""
    seeds, real = [], ops_table.prepare

    def prepare(case, provider, mode, seed, device):
        assert device == torch.device("cuda")
        seeds.append(seed)
        return real(case, provider, mode, seed, CPU)

    def graph_times(calls):
        return (len(calls), calls[-1]()[0].shape) if captured else raising("not permitted\nmore")

    monkeypatch.setattr(ops_table, "prepare", prepare)
    monkeypatch.setattr(ops_table, "cold_sets", lambda size: 3)
    monkeypatch.setattr(ops_table, "event_times", lambda call: len(call()))
    monkeypatch.setattr(ops_table, "graph_times", graph_times)
    times, problem = ops_table.time_provider(ADD, "ours", "both", torch.device("cuda"))
    assert seeds == [2, 3, 4] and times["events"] == 1
    assert times.get("graph") == ((3, ADD.draw(torch.Generator())[0].shape) if captured else None)
    assert problem == (None if captured else "RuntimeError: not permitted")


def test_units_of_error():
    """What rounding to 16 bits explains is below one unit, and so is a sum of a thousand terms in fp32."""
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 0.1 < ops_table.error([x.bfloat16()], [x]) < 1
    assert 0 < ops_table.error([x.float().cumsum(1)[:, -1]], [x.sum(1)]) < 1
    assert ops_table.error([1.02 * x.bfloat16()], [x]) > 2
    assert ops_table.error([x.float() * 1.00001], [x]) > 2
    both = [x.float() * 1.00001, x.bfloat16()], [x, x]
    assert ops_table.error(*both) < 1 and ops_table.error(*both, independent=True) > 2


def test_what_there_is_no_time_for_is_named():
    table = list(ops_table.rows(TINY, CPU, images=1, groups=["rows"], modes=["forward"], seconds=0))
    assert {row["op"] for row in table} == {"gather_patches", "gather_add", "predictor_tokens", "target_loss",
                                            "layer_norm", "quantize_fp8"}  # fmt: skip
    assert all(row["left_out"] == "no time after 0 s" for row in table)
    assert ops_table.remarks(table)[0].startswith("left out: no time after 0 s (gather_patches, gather_add")


def test_the_table_as_measured():
    only = {"groups": ["rows"], "modes": ["both"], "providers": lambda name: name != "compile"}
    table = ops_table.with_ratios(list(ops_table.rows(TINY, CPU, images=1, **only)))
    assert {(row["op"], row["provider"]) for row in table} == {
        (op, name) for op in ("gather_add", "predictor_tokens", "target_loss", "layer_norm")
        for name in ("ours", "eager")
    }  # fmt: skip
    for row in table:
        assert ("faster_than" in row) == (row["provider"] == "ours") and "%" in ops_table.line(row)


def test_disturbed_times_are_remarked_on():
    def row(p20, p80, share, method="cpu"):
        return {"times": {method: {"p20": p20, "p50": p20, "p80": p80}}, "of_floor": share}

    steady = [row(1.0, 1.9, 1.2), row(1.0, 1.0, 0.1, "events")]
    assert ops_table.remarks(steady) == []
    (said,) = ops_table.remarks([*steady, row(1.0, 2.1, 0.5), row(1.0, 1.0, 162.5), {"failed": "x"}])
    assert said.startswith("2 of 4 times vary more than twofold")


def test_ratios_compare_like_with_like():
    def row(provider, **times):
        place = {"model": "m", "op": "o", "case": "c", "mode": "forward"}
        return place | {"provider": provider, "times": {method: {"p50": value} for method, value in times.items()}}

    table = [row("ours", graph=2.0, events=8.0), row("a", graph=3.0, events=80.0), row("b", events=16.0)]
    (ours, *_) = ops_table.with_ratios(table)
    assert ours["faster_than"] == {"a": 1.5, "b": 2.0}


# Costs


def test_both_passes_cost_their_sum():
    workload = Workload.of(TINY["tiny"], Batch.draw(TINY["tiny"], 2, CPU).masks)
    for op in floors.BACKWARD:
        passes = [cost(op, mode, workload, "context") for mode in ("forward", "backward", "both")]
        assert passes[2].bytes == passes[0].bytes + passes[1].bytes
        assert passes[2].flops == passes[0].flops + passes[1].flops


def test_rows_and_pairs_are_those_of_the_masks():
    batch = Batch.draw(TINY["tiny"], 3, CPU)
    lengths = batch.masks.context.lengths.tolist()
    targets = batch.masks.targets.lengths.view(3, 4).tolist()
    workload = batch.workload
    assert workload.context_rows == sum(lengths) and workload.context_pairs == sum(n * n for n in lengths)
    joined = [context + target for context, of_image in zip(lengths, targets, strict=True) for target in of_image]
    assert workload.predictor_rows == sum(joined) == len(batch.layout.tokens.indices)
    assert workload.predictor_pairs == sum(n * n for n in joined)


# op, case and mode; megabytes, GFLOP and microseconds worked out apart from the formulas. ViT-H/14, batch 128, 16 bits.
FLOORS = [
    ("gather_patches", "context", "forward", 26.8, 0, 6.2),
    ("gather_patches", "target encoder", "forward", 58.2, 0, 13.5),
    ("gather_add", "context", "forward", 78.6, 0, 18.3), ("gather_add", "target encoder", "forward", 169.2, 0, 39.4),
    ("gather_add", "context", "backward", 77.3, 0, 18), ("predictor_tokens", "predictor", "forward", 76.4, 0, 17.8),
    ("predictor_tokens", "predictor", "backward", 76.2, 0, 17.7), ("target_loss", "targets", "forward", 116, 0, 27),
    ("target_loss", "targets", "backward", 173.9, 0, 40.4), ("layer_norm", "context", "forward", 77.3, 0, 18),
    ("layer_norm", "context, with residual", "forward", 154.5, 0, 35.9),
    ("layer_norm", "context", "backward", 115.9, 0, 27),
    ("layer_norm", "context, with residual", "backward", 154.5, 0, 35.9),
    ("quantize_fp8", "target encoder", "forward", 503.4, 0, 117.1),
    ("linear_gelu", "target encoder", "forward", 432.5, 429.5, 543.7),
    ("linear_gelu", "context, with pre", "forward", 360.8, 197.8, 250.4),
    ("linear_gelu", "predictor, with pre", "forward", 574.8, 97.9, 133.7),
    ("hidden_gradient", "context", "forward", 360.8, 197.8, 250.4),
    ("hidden_gradient", "predictor", "forward", 574.8, 97.9, 133.7),
    ("weight_gradient", "context", "forward", 80.5, 49.5, 62.6),
    ("weight_gradient", "predictor", "forward", 127.8, 24.5, 31),
    ("varlen_attention", "context", "forward", 154.5, 9.4, 35.9),
    ("varlen_attention", "context", "backward", 309.1, 23.6, 71.9),
    ("varlen_attention", "target encoder", "forward", 335.5, 42.9, 78),
    ("varlen_attention", "predictor", "forward", 255, 21.1, 59.3),
    ("varlen_attention", "predictor", "backward", 509.9, 52.7, 118.6),
    ("grad_norm", "all parameters", "forward", 1305, 0, 304),
    ("adamw_ema_", "all parameters", "forward", 24580, 0, 5716), ("ema_", "all parameters", "forward", 7565, 0, 1759),
]  # fmt: skip


def test_floors_of_the_largest_workload():
    """Mean rows and mean squared lengths are those of 100 batches of the default masks."""
    counts = floors.parameter_counts(MODELS["ViT-H/14"])
    workload = Workload(MODELS["ViT-H/14"], 128, 15091, 22630, 1.841e6, 13.74e6, 4, *counts)
    for op, case, mode, megabytes, gigaflop, microseconds in FLOORS:
        part, _, special = case.partition(", ")
        found = cost(f"{op} {special}".strip(), mode, workload, part)
        assert found.bytes / 1e6 == pytest.approx(megabytes, rel=2e-3), (op, case, mode)
        assert found.flops / 1e9 == pytest.approx(gigaflop, rel=1e-2), (op, case, mode)
        floor = max(found.bytes / FLOOR_RATES[0], found.flops / FLOOR_RATES[1]) * 1e6
        assert floor == pytest.approx(microseconds, rel=2e-3, abs=0.06), (op, case, mode)
        assert f"{op}, {case}" in KEYS and mode in cases()[f"{op}, {case}"].costs, (op, case, mode)

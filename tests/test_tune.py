"""benchmarks/tune.py as far as it needs no GPU: candidates, compile rules, workloads, choice and what it prints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import TUNABLES, Scale, Slot
from ijepa_fast.bench import table
from ijepa_fast.bench.cases.floors import MODELS
from ijepa_fast.bench.measure import CPU
from ijepa_fast.kernels.row_tiles import RowTile
from ijepa_fast.kernels.specs import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
SMALL = replace(MODELS["ViT-H/14"], depth=1, predictor_depth=1, embed_dim=192, num_heads=4, predictor_embed_dim=96)
ADD = TUNABLES["gather_add"]
WIDE = Slot(("sm_90", 2), 256)


def tables_of_kernels() -> set[str]:
    """Every table of rows there is: names that end in CONFIGS, where they are defined."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        names = [line.split(" =")[0] for line in path.read_text().splitlines() if "CONFIGS = " in line.split("#")[0]]
        found.update(f"{path.stem}.{name}" for name in names if name.isidentifier() and name.isupper())
    return found


def test_every_table_can_be_tuned():
    assert {tunable.table for tunable in TUNABLES.values()} == tables_of_kernels()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tunable", TUNABLES.values(), ids=TUNABLES)
def test_candidates_are_rows_of_the_same_kind_and_the_current_one_comes_first(tunable, arch):
    slots = list(tunable.slots(arch))
    assert slots and len(set(slots)) == len(slots)
    for slot in slots:
        row = tune.row_at(tunable.rows, slot)
        rows = tune.candidates(row, tunable.options)
        assert rows[0] == row and 1 < len(rows) == len(set(rows)) < 50
        assert {type(other) for other in rows} == {type(row)}


def test_candidates_differ_in_two_fields_at_most():
    assert tune.candidates(4, ((2, 4, 8),)) == [4, 2, 8]
    assert tune.candidates((1, 1), ((2,), None)) == [(1, 1), (2, 1)]
    rows = tune.candidates(RowTile(8, 64, 4), ((16,), (128,), (8,)))
    assert len(rows) == 7 and RowTile(16, 128, 8) not in rows and RowTile(8, 128, 8) in rows
    with pytest.raises(ValueError, match=r"\(1, 1\) has 2 fields, 1 options"):
        tune.candidates((1, 1), ((2,),))


@pytest.mark.parametrize(
    ("name", "slot", "row"),
    [
        ("gather_add", WIDE, RowTile(4, 256, 8)),
        ("target_loss", Slot(("sm_90", 2), 1536), 2),
        ("ema_", Slot("sm_90"), TUNABLES["ema_"].rows["sm_90"]._replace(block=512)),
        ("varlen_attention", Slot(("sm_90", torch.bfloat16, 80, "short"), part="dq"), "any"),
    ],
)
def test_a_row_is_in_place_only_as_long_as_it_is_tried(name, slot, row):
    table = TUNABLES[name].rows
    before = dict(table)
    with pytest.raises(KeyError), tune.row_in_place(table, slot, row):
        assert tune.row_at(table, slot) == row
        assert {key for key in table if table[key] != before[key]} == {slot.key}
        raise KeyError
    assert table == before


def one_slot_each() -> list[tuple[str, Slot]]:
    """The smallest slot of every kind of workload, of every table."""
    found = {}
    for name, tunable in TUNABLES.items():
        for slot in tunable.slots("sm_90"):
            found.setdefault((name, slot.part, slot.bound is not None and slot.key[1] == 1), (name, slot))
    return list(found.values())


@pytest.mark.parametrize(("name", "slot"), one_slot_each(), ids=lambda value: str(value)[:40])
def test_workloads_are_right(name, slot):
    work = TUNABLES[name].workload(Scale(CPU, images=1, model=SMALL), slot)
    assert work and {mode for _, mode in work} <= {"forward", "backward"}
    for case, mode in work:
        table.check(case, "ours", mode, CPU)


def test_rows_that_break_a_rule_are_not_timed(monkeypatch):
    current = tune.row_at(ADD.rows, WIDE)
    bad, best = current._replace(num_warps=16), current._replace(rows=8)
    monkeypatch.setattr(tune, "broken_rules", lambda tunable, slot, row, arch: ["it spills"] * (row == bad))
    timed = []

    def time(row):
        timed.append(row)
        return 5.0 if row == best else 10.0

    proposal = tune.tune(ADD, WIDE, "sm_90", time)
    assert proposal["proposed"] == repr(best) and proposal["left_out"] == {repr(bad): ["it spills"]}
    assert bad not in timed and timed[0] == current and len(timed) == len(tune.candidates(current, ADD.options)) - 1
    assert json.loads(json.dumps(proposal)) == proposal
    assert tune.line(proposal) == (
        "gather_add.CONFIGS['sm_90', 2], up to 256: RowTile(rows=8, columns=256, num_warps=4)  # 5.0 us, "
        f"{current!r} took 10.0"
    )
    stays = tune.tune(ADD, WIDE, "sm_90", lambda row: 10.0)
    assert tune.line(stays) == f"gather_add.CONFIGS['sm_90', 2], up to 256: {current!r} stays, 10.0 us"


def test_a_small_gain_is_noise():
    assert tune.fastest({1: 100.0, 2: 98.0, 4: 120.0}, 1) == 1
    assert tune.fastest({1: 100.0, 2: 96.0, 4: 120.0}, 1) == 2
    assert tune.place_of("ema.CONFIGS", Slot("sm_90")) == "ema.CONFIGS['sm_90']"


@pytest.mark.slow
def test_compile_rules_judge_the_kernels_that_a_row_changes():
    """Without the interpreter, hence in a process of its own."""
    code = """
import json, torch
from benchmarks import tune
attention, add = tune.TUNABLES["varlen_attention"], tune.TUNABLES["gather_add"]
slot = tune.Slot(("sm_90", torch.bfloat16, 128, "short"), part="dkdv")
row = tune.row_at(attention.rows, slot)
wide = tune.Slot(("sm_90", 2), 256)
print(json.dumps([
    tune.broken_rules(attention, slot, row, "sm_90"),
    tune.broken_rules(attention, slot, row._replace(block_q=128, block_k=128, max_registers=128), "sm_90"),
    tune.broken_rules(add, wide, tune.row_at(add.rows, wide)._replace(rows=8), "sm_90"),
]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unchanged, spilling, smaller = json.loads(done.stdout)
    assert unchanged == smaller == []
    assert any("spill instructions in a loop" in failure for failure in spilling)

"""The README says what the committed results say, and points at files that are there."""

import json
import re
from pathlib import Path

from benchmarks.demo_controls import markdown_table, shortfalls

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_demo_table_is_that_of_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert markdown_table(results) in README
    assert results["shortfalls"] == shortfalls(results["seeds"])
    assert [r["seed"] for r in results["seeds"]] == [0, 1, 2]


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link

"""The demo is as good as README says, whose table ``benchmarks.report`` writes, and its links lead to files."""

import json
import re
from pathlib import Path

import ijepa_fast
from benchmarks.ablations import variants
from ijepa_fast.config import flatten, from_dict, present, read_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_demo_learns_more_than_its_controls():
    """A probe of 60 % at least, and 10 points above each control, with every seed."""
    assert variants("demo")["demo"] == from_dict(read_recipe("demo"))
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    demo, control = (entry["runs"] for entry in results["recipes"])
    assert [run["seed"] for run in demo] == [0, 1, 2]
    for ours, others, before in zip(demo, control, results["untrained"], strict=True):
        assert ours["probe"] >= 0.6
        for other in (others, before, before["pixels"], before["colours"]):
            assert ours["probe"] - other["probe"] >= 0.1


def test_the_table_of_photographs_is_what_was_measured():
    """And the recipe has the settings that were measured, but for where it runs and how often it saves."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["runs"]
    by_name = {run["variant"]: run for run in runs if run["group"] == "photographs_colors_longer"}
    run, before = by_name["both"], by_name["untrained"]["figures"]
    table = README.split("[what limits it]")[1].split("##")[0]
    rows = [[float(x) for x in row] for row in re.findall(r"^\| .*? \| (.+)% \| (.+)% \|$", table, re.MULTILINE)]
    figures = (before["pixels"], before["colours"], before, run["figures"])
    assert rows == [[round(100 * of["knn"], 1), round(100 * of["probe"], 1)] for of in figures]
    assert f"after {run['processor_seconds'] / 60:.0f} minutes" in README
    shorter = [run for run in runs if run["group"] == "photographs_colors"]
    words = [f"{100 * of['figures']['knn']:.1f} / {100 * of['figures']['probe']:.1f}" for of in shorter]
    assert f"{words[0]} % after {shorter[0]['steps']:,} steps, {words[1]} % without it" in " ".join(README.split())
    recipe = flatten(from_dict(read_recipe("imagenette_cpu")))
    others = ("loader.workers", "train.device", "train.save_every", "optim.warmup_epochs", "train.steps")
    for name, value in present(run["settings"], strict=False).items():
        if name.startswith(("model.", "masks.", "objective.", "loader.", "optim.", "train.")) and name not in others:
            assert recipe[name] == value, name
    assert recipe["train.steps"] == run["steps"]


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_one_screen_first_and_no_more_than_120_lines():
    assert len(README.splitlines()) <= 120
    screen = README.split("| what you use today |")[0]
    assert len(screen.splitlines()) <= 65 and "docs/images/" in screen
    for words in ("not ", "n't", "only", "no kernel"):  # what the package does not do stands further down
        assert words not in re.sub(r"```.*?```", "", screen, flags=re.DOTALL).lower(), words


def test_the_python_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert list(names["features"].shape) == [16, 64, 192]


def test_the_citation_is_of_this_version():
    assert f"version: {ijepa_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()

"""The Python of the pages on integrations runs as it stands there, and the pages name what there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ijepa_fast.jepa_model.config import JEPAConfig

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        pytest.param("jepa_model", 6, marks=pytest.mark.slow),  # compiles
        ("huggingface", 3),
        ("lightning", 2),
        ("pieces", 1),
    ],
)
def test_the_python_of_a_page_runs(name, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = re.findall(r"^```python\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    assert len(found) == blocks
    exec(compile("\n".join(found), f"docs/{name}.md", "exec"), {"__name__": name})


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text())
    assert links
    for link in links:
        assert (path.parent / link).exists(), link


def test_the_index_names_every_page():
    named = set(re.findall(r"\]\((\w+\.md)\)", page("README")))
    assert named | {"README.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_table_of_keys_is_complete():
    table = page("jepa_model").split("## Keys")[1].split("##")[0]
    named = {key for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", cell)}
    assert named == {field.name for field in fields(JEPAConfig)}

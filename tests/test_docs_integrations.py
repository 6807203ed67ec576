"""The Python of the pages on integrations runs as it stands there, and the pages name what there is."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ijepa_fast.config import from_dict, read_recipe, recipes
from ijepa_fast.jepa_model.config import JEPAConfig

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        pytest.param("jepa_model", 6, marks=pytest.mark.slow),  # compiles
        pytest.param("callbacks", 1, marks=pytest.mark.slow),  # trains, evaluates and draws
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
    assert links or path.stem in ("api", "callbacks", "scaling")
    for link in links:
        assert (path.parent / link).exists(), link


def test_index_and_site_name_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"\]\((\w+\.md)\)", page("README"))) | {"README.md"} == pages
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert sorted(re.findall(r"\w+\.md", nav)) == sorted(pages)


def test_the_page_of_recipes_names_them_and_its_own_one_loads(tmp_path):
    named = set(re.findall(r"`(?:--config )?(\w+)`", page("recipes")))
    assert {name for name in recipes() if "/" not in name and not name.endswith("_exact")} - named == {"own_images"}
    (mine,) = re.findall(r"^```yaml\n(.*?)^```$", page("recipes"), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(mine)
    config = from_dict(read_recipe(str(tmp_path / "mine.yaml")))
    assert config.model.patch_size == 16 and config.model.img_size == 96


def test_the_reference_names_what_is_there():
    for name in re.findall(r"^::: ([\w.]+)$", page("api"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_the_table_of_keys_is_complete():
    table = page("jepa_model").split("## Keys")[1].split("##")[0]
    named = {key for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", cell)}
    assert named == {field.name for field in fields(JEPAConfig)}

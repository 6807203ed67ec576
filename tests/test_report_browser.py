"""The page of a run in a real browser, where Chromium (or Chrome) is installed; tests/test_report.py reads it anywhere.

Where there is no browser the tests are skipped, and a warning at the end of the run says so.
"""

import json
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from PIL import Image

from ijepa_fast.config import EvaluationConfig
from ijepa_fast.report import write_report
from ijepa_fast.train import pretrain
from tests.image_files import write_folder
from tests.tiny import tiny_run

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"
# The page runs no script, so that of a frame around it asks what the browser made of it.
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe id="frame" src="page.html"
style="border:0;width:{width}px;height:900px"></iframe><pre id="found"></pre><script>
document.getElementById("frame").onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter((element) =>
    element.getBoundingClientRect().right > root.clientWidth + 1 && !element.closest(".wide"));
  document.getElementById("found").textContent = JSON.stringify({{
    mode: page.compatMode,
    width: root.clientWidth,
    scroll: root.scrollWidth,
    outside: wide.map((element) => element.outerHTML.slice(0, 80)),
    images: [...page.images].map((image) => image.complete && image.naturalWidth > 0 && image.clientWidth >= 200),
    charts: [...page.querySelectorAll("svg[role] .line1")].map((line) => line.getTotalLength()),
    styled: getComputedStyle(page.querySelector(".line1")).stroke,
    loaded: page.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 60)),
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """browser(arguments) -> what it printed; its settings are in a folder of their own."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        warnings.warn(f"no browser ({', '.join(NAMES)}): the page of a run was not rendered", stacklevel=1)
        pytest.skip("no Chromium or Chrome on the PATH")
    profile = tmp_path_factory.mktemp("profile")

    def run(*arguments: str) -> str:
        command = [path, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--hide-scrollbars"]
        # Chromium's own sandbox does not start under root, as in most containers.
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory):
    """With page.html of a finished run."""
    root = tmp_path_factory.mktemp("run")
    for split, count in (("train", 20), ("test", 10)):
        write_folder(root / "data" / split, count)
    config = tiny_run(root / "data", root / ("a_name_without_any_gap_" * 5))
    pretrain(replace(config, evaluation=EvaluationConfig(bank=16)))
    write_report(config.output, root / "page.html", images=3, candidates=10)
    return root


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_a_phone_and_a_desk(browser, folder, width):
    (folder / "frame.html").write_text(FRAME.format(width=width))
    address = (folder / "frame.html").as_uri()
    printed = browser("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", address)
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL)[1]))
    assert found["mode"] == "CSS1Compat" and found["width"] == width
    assert found["scroll"] == width and found["outside"] == []
    assert found["images"] == [True] * 4
    assert len(found["charts"]) == 9 and min(found["charts"]) > 100
    assert found["styled"].startswith("rgb") and all(name.startswith("data:") for name in found["loaded"])


def test_it_follows_the_colour_scheme(browser, folder):
    grounds = []
    for scheme in (LIGHT, DARK):
        picture = folder / "seen.png"
        browser(scheme, "--window-size=1000,1400", f"--screenshot={picture}", (folder / "page.html").as_uri())
        with Image.open(picture) as seen:
            grey = np.asarray(seen.convert("L")).astype(float)
        # The ground is the most frequent shade; what stands on it is far from it.
        ground = np.bincount(grey.astype(int).ravel()).argmax()
        assert 0.02 < (np.abs(grey - ground) > 100).mean() < 0.5
        grounds.append(ground)
    assert grounds[0] > 230 and grounds[1] < 40


def test_what_is_folded_away_is_printed(browser, folder):
    def sheets(html: str) -> int:
        (folder / "print.html").write_text(html)
        browser("--no-pdf-header-footer", f"--print-to-pdf={folder / 'print.pdf'}", (folder / "print.html").as_uri())
        return len(re.findall(rb"/Type\s*/Page\b", (folder / "print.pdf").read_bytes()))

    page = (folder / "page.html").read_text()
    without = re.sub("<details>.*?</details>", "", page, flags=re.DOTALL)
    assert sheets(without) < sheets(page) == sheets(page.replace("<details>", "<details open>"))

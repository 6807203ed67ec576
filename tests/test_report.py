"""The page of a run: it stands alone, says what the run folder says, and gets by with whatever is left of a run."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from ijepa_fast import cli
from ijepa_fast.config import EvaluationConfig, as_dict, flatten
from ijepa_fast.config import RunConfig as Defaults
from ijepa_fast.report import parse_patch, write_report
from ijepa_fast.report.charts import HEIGHT, WIDTH, chart, compact, thinned
from ijepa_fast.report.findings import findings
from ijepa_fast.report.pictures import default_patches
from ijepa_fast.report.record import RunRecord, read_record
from ijepa_fast.run.environment import describe
from ijepa_fast.train import pretrain
from tests.html_page import Page
from tests.image_files import write_folder
from tests.tiny import tiny_run

HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>&amp;{$x^2$}"
PICTURES = ["PCA maps of patch features", "Similarity to chosen patches", "Nearest neighbours", "Masks"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with labelled images that nothing disturbs."""
    root = tmp_path_factory.mktemp("finished")
    for split, count in (("train", 20), ("test", 10)):
        write_folder(root / "data" / split, count)
    config = tiny_run(root / "data", root / "run")
    pretrain(replace(config, evaluation=EvaluationConfig(bank=16)))
    return root


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged; its images stay where they are."""
    return shutil.copytree(finished / "run", tmp_path / "run")


def unfinished(run):
    """As a run is left by a process that was killed."""
    for name in ("summary.json", "masks.png", "pca.png", "curves.png"):
        (run / name).unlink()


def page_of(run, **options) -> Page:
    page = Page.read(write_report(run, images=3, candidates=6, **options))
    page.assert_self_contained()
    page.assert_accessible()
    return page


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> Page:
    return page_of(finished / "run", out=tmp_path_factory.mktemp("page") / "new" / "page.html")


class TestFinishedRun:
    def test_figures_are_those_of_the_summary(self, finished, page):
        summary = json.loads((finished / "run" / "summary.json").read_text())
        for name, whose in (("raw pixels", "pixels"), ("untrained encoder", "before"), ("trained encoder", "after")):
            knn, probe = (f"{summary[whose][key]:.1%}" for key in ("knn", "probe"))
            assert f"{name} {knn} {probe}" in page.text
        assert f"Linear probe {summary['after']['probe']:.1%}untrained {summary['before']['probe']:.1%}" in page.text
        assert "Finished: 12 of 12 steps" in page.text
        assert "Chance among 2 classes is 50.0%" in page.text

    def test_tasks_of_evaluate_are_shown_and_a_damaged_file_is_named(self, run):
        (run / "evaluation").mkdir()
        entry = {"data": "photos", "trained": {"figures": {"mIoU": 0.4567}, "chance": {"mIoU": 0.1}}}
        (run / "evaluation" / "evaluation.json").write_text(json.dumps({"tasks": {"segmentation": entry}}))
        assert "segmentation mIoU 45.7 % 10.0 % photos" in " ".join(page_of(run).text.split())
        (run / "evaluation" / "evaluation.json").write_text('{"tasks": {"segmentation": {"trained": 1}}}')
        assert read_record(run).problems == ["evaluation.json is not what ijepa-fast evaluate writes"]

    def test_every_kind_of_curve_is_there_and_its_figures_in_a_table(self, finished, page):
        labels = " ".join(attributes.get("aria-label", "") for attributes in page.all("svg"))
        last = json.loads((finished / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        for title, key, unit in (("Loss", "loss", 1), ("Feature rank", "rank", 1), ("Online k-NN", "knn", 100)):
            assert re.search(rf"{title}[^;]* {re.escape(compact(last[key] * unit))} at step 12", labels), title
        assert f"12 {compact(last['loss'])} {compact(last['rank'])}" in page.text

    def test_all_pictures_are_drawn(self, page):
        assert len(page.pictures()) == len(PICTURES)
        assert [title in page.text for title in PICTURES] == [True] * 4
        assert "Left out" not in page.text
        assert re.search(r"beside it the most similar of 5 others", page.text)
        assert re.search(r"\d+ of the 15 neighbours shown have the class", page.text)
        # A white ground and something on it.
        assert all(np.asarray(image.convert("L")).std() > 10 for image in page.pictures())

    def test_changed_settings_are_listed_with_their_defaults(self, finished, page):
        settings = yaml.safe_load((finished / "run" / "config.yaml").read_text())
        assert "model.embed_dim 16 768" in page.text and "train.steps 12 null" in page.text
        defaults, values = flatten(Defaults()), flatten(tiny_run(finished / "data", finished / "run"))
        values |= {"evaluation.results": "all", "evaluation.bank": 16}
        changed = [name for name in values if values[name] != defaults[name]]
        assert settings["evaluation"]["bank"] == 16
        assert f"{len(changed)} of {len(values)} settings differ" in page.text
        assert len(page.all("mark")) == len(changed)
        # The changed ones stand in both tables.
        assert [page.text.count(f" {name} ") for name in ("model.depth", "optim.betas")] == [2, 1]

    def test_model_and_versions_are_named(self, page):
        assert "ViT, width 16, depth 2, 2 heads" in page.text and "24 px in 6 x 6 patches of 4 px" in page.text
        for name, version in describe().items():
            # Work may go on in the checkout, so not with which commit.
            assert f"{name} {'' if name == 'commit' else version}" in page.text
        assert f"Trained (last start) with ijepa_fast {describe()['ijepa_fast']}" in page.text

    def test_the_same_run_and_versions_give_the_same_file(self, finished, tmp_path, monkeypatch):
        monkeypatch.setattr("ijepa_fast.report.describe", lambda: {"ijepa_fast": "1"})
        first, second = (
            write_report(finished / "run", tmp_path / name, images=2, candidates=5).read_bytes() for name in "ab"
        )
        assert first == second

    def test_no_encoding_can_be_wrong(self, run):
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"bad_files": {"müll\udcff.jpg": "日本"}}))
        assert "müll" in page_of(run).text


class TestUnfinishedRun:
    def test_killed(self, run):
        unfinished(run)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 16, "lo')
        page = page_of(run)
        assert "Unfinished: 12 of 12 steps" in page.text and "newest checkpoint at step 12" in page.text
        assert "1 of 4 lines of metrics.jsonl cannot be read" in page.text
        assert len(page.pictures()) == 4
        # Figures from before the first step are known, those from after the last are not.
        assert "raw pixels" in page.text and "trained encoder" not in page.text.replace("untrained encoder", "")

    def test_broken_off_before_anything_was_recorded(self, run):
        unfinished(run)
        shutil.rmtree(run / "checkpoints")
        for name in ("metrics.jsonl", "before.json"):
            (run / name).unlink()
        page = page_of(run)
        assert "Unfinished: 0 of 12 steps" in page.text and "no checkpoint yet" in page.text
        assert page.text.count("Left out: no checkpoint at") == 3
        assert len(page.pictures()) == 1 and not [s for s in page.all("svg") if "role" in s]
        assert "Nothing has been recorded yet" in page.text and "No k-NN or linear probe" in page.text

    def test_images_that_are_gone(self, run, finished, tmp_path):
        # The checkpoint, too, says where the images were, so they are moved for a moment.
        (finished / "data").rename(tmp_path / "elsewhere")
        try:
            page = page_of(run)
            kept = [image.size for image in page.pictures()]
            unfinished(run)
            left = page_of(run)
        finally:
            (tmp_path / "elsewhere").rename(finished / "data")
        assert page.text.count("Drawn when the run ended; it cannot be drawn anew: ") == 2 == len(kept)
        assert page.text.count("Left out: ") == 2 and str(finished / "data") in page.text
        assert left.text.count("Left out: ") == 4 and not left.pictures()

    @pytest.mark.slow
    def test_other_images_than_those_of_the_run(self, run, finished):
        extra = finished / "data" / "train" / "ant" / "extra.png"
        shutil.copy(next((finished / "data" / "train" / "ant").iterdir()), extra)
        try:
            page = page_of(run)
        finally:
            extra.unlink()
        assert "The images are no longer those that the run was trained on" in page.text
        assert "no longer those" not in page_of(run).text

    @pytest.mark.slow
    def test_images_without_labels(self, tmp_path):
        write_folder(tmp_path / "data", 9, classes=())
        pretrain(tiny_run(tmp_path / "data", tmp_path / "run", steps=2))
        page = page_of(tmp_path / "run")
        assert len(page.pictures()) == 4 and "No k-NN or linear probe" in page.text
        assert "have the class of their query" not in page.text and "Chance" not in page.text

    @pytest.mark.slow
    def test_a_single_image_has_no_neighbours(self, tmp_path):
        write_folder(tmp_path / "data", 1, classes=())
        (tmp_path / "run").mkdir()
        config = tiny_run(tmp_path / "data", tmp_path / "run", steps=1, batch_size=1)
        pretrain(config)
        page = page_of(tmp_path / "run")
        assert "Left out: there is only one image" in page.text and len(page.pictures()) == 3

    @pytest.mark.parametrize(
        "half",
        ["checkpoint", *(pytest.param(name, marks=pytest.mark.slow) for name in ("picture", "config", "summary"))],
    )
    def test_half_written_files_are_named(self, run, half):
        newest = max((run / "checkpoints").iterdir())
        path = {"checkpoint": newest, "picture": run / "pca.png"}.get(half) or next(run.glob(f"{half}.*"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        page = page_of(run)
        if half == "checkpoint":
            assert f"{newest} is damaged" in page.text
            assert len(page.pictures()) == 2 and page.text.count("Left out") == 2
        elif half == "picture":
            assert len(page.pictures()) == 4
        else:
            assert f"{path.name} cannot be read" in page.text
            # The checkpoint has the settings too.
            assert len(page.pictures()) == 4
            assert half == "summary" or "The settings are not known" in page.text

    def test_settings_of_another_version(self, run):
        shutil.rmtree(run / "checkpoints")
        for settings, reason in (
            ({"model": {"img_sizes": 3}}, "unknown setting model.img_sizes; did you mean img_size?"),
            ({"model": 5}, "config.yaml does not fit this version"),
            ({"model": {"patch_size": 0}}, "config.yaml does not fit this version"),
        ):
            (run / "config.yaml").write_text(yaml.safe_dump({"data": "rendered"} | settings))
            assert reason in page_of(run).text
        (run / "config.yaml").write_text("just a sentence")
        assert "config.yaml holds no settings or figures, but 'just a sentence'" in page_of(run).text


class TestEscaping:
    def test_hostile_strings_stay_text(self, run):
        shutil.rmtree(run / "checkpoints")
        config = as_dict(tiny_run(HOSTILE, HOSTILE))
        config["optim"][HOSTILE] = [HOSTILE, {"a": HOSTILE}]
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "summary.json").write_text(
            json.dumps({"steps": 12, "seconds": HOSTILE, "bad_files": {HOSTILE: HOSTILE}, "after": {"knn": HOSTILE}})
        )
        (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": HOSTILE, HOSTILE: float("inf")}) + "\n")
        hostile = run.rename(run.parent / HOSTILE.replace("/", "_"))
        page = page_of(hostile)
        assert not page.all("script") and all("onerror" not in attributes for attributes in page.all("img"))
        # Folder, output, data, and the strange setting's name and values; and the files that could not be read.
        assert page.text.count(HOSTILE) >= 8

    @pytest.mark.slow
    def test_hostile_class_names(self, tmp_path):
        names = ("$\\frac", "<b>&")
        for split in ("train", "test"):
            write_folder(tmp_path / "data" / split, 8, classes=names)
        pretrain(tiny_run(tmp_path / "data", tmp_path / "run", steps=1))
        assert len(page_of(tmp_path / "run").pictures()) == 4


class TestChart:
    def points(self, html: str, line: int) -> np.ndarray:
        path = re.search(rf'class="line line{line}" d="M([\d.L -]+)"/>', html)[1]
        return np.array([[float(number) for number in point.split()] for point in path.split("L")])

    def test_lines_are_where_their_values_are(self):
        html = chart("T", {"up": [(0, 0.0), (50, 5.0), (200, 20.0)], "flat": [(0, 10.0), (200, 10.0)]})
        up, flat = self.points(html, 1), self.points(html, 2)
        # The drawn height goes from 0 to 20, both of which are round.
        left, bottom = up[0]
        right, top = up[-1]
        assert 0 < left < right < WIDTH and 0 < top < bottom < HEIGHT
        np.testing.assert_allclose(up[1], [left + 0.25 * (right - left), bottom + 0.25 * (top - bottom)], atol=0.06)
        np.testing.assert_allclose(flat[:, 1], (top + bottom) / 2, atol=0.06)
        for value in ("0", "5", "10", "15", "20", "50", "100", "150", "200"):
            assert f">{value}</text>" in html

    @pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 7e12], [1.0, 1.0 + 1e-15]])
    def test_any_finite_values_are_drawn_inside(self, values):
        html = chart("T", {"line": [(step, value) for step, value in enumerate(values)]})
        numbers = [float(n) for n in re.findall(r'(?:c?[xy])="(-?[\d.]+)"', html)]
        assert all(0 <= n <= WIDTH for n in numbers) and "nan" not in html
        if len(values) > 1:
            points = self.points(html, 1)
            assert points.min() >= 0 and points[:, 1].max() <= HEIGHT and points[:, 0].max() <= WIDTH

    def test_long_runs_keep_their_ends_and_spikes(self):
        line = [(step, 1.0) for step in range(20_000)]
        line[7777], line[12_345] = (7777, 99.0), (12_345, -99.0)
        short = thinned(line)
        assert len(short) < 500 and short == sorted(short)
        assert {line[0], line[-1], line[7777], line[12_345]} <= set(short)
        assert thinned(line[:100]) == line[:100]

    def test_numbers_are_short(self):
        shown = [compact(v) for v in (0, 0.30881, 12, 1234.5, 9999, 12_000, 300_000, 2_500_000, 1e-6, 2.75e-4, -0.5)]
        assert shown == ["0", "0.3088", "12", "1234", "9999", "12k", "300k", "2.5M", "1e-6", "2.75e-4", "-0.5"]


class TestFindings:
    def record(self, *metrics, **known) -> RunRecord:
        known = {"summary": {"steps": 9}} | known
        return RunRecord("run", metrics=[{"step": 3 * i + 3} | m for i, m in enumerate(metrics)], **known)

    def test_a_healthy_run_has_none(self):
        healthy = {"after": {"knn": 0.5, "probe": 0.6}, "before": {"knn": 0.2, "probe": 0.2}}
        record = self.record({"rank": 5.0, "data_wait_share": 0.9}, {"rank": 9.0, "data_wait_share": 0.01})
        assert findings(replace(record, summary=healthy | {"pixels": {"knn": 0.4, "probe": 0.5}})) == []

    @pytest.mark.parametrize(
        ("metrics", "words"),
        [
            ([{"rank": 9.0}, {"rank": 1.2}], "collapsed: their rank is 1.20 at step 6"),
            (
                [{"rank": 3.0}, {"rank": 20.0}, {"rank": 9.0}],
                "losing dimensions: their rank is 9.0 at step 9, after 20",
            ),
            (
                [{"loss": float("inf"), "grad_norm": float("nan")}],
                "Infinite or NaN values were recorded: grad_norm, loss",
            ),
            ([{"skipped": 0}, {"skipped": 3}], "3 updates were skipped"),
            ([{"bad_files": 2}], "2 images could not be decoded"),
            ([{"data_wait_share": 0.1}, {"data_wait_share": 0.4}], "waited for images 40% of the time"),
        ],
    )
    def test_what_the_metrics_show(self, metrics, words):
        (found,) = findings(self.record(*metrics))
        assert words in found

    def test_features_that_are_no_better_than_baselines(self):
        summary = {
            "after": {"knn": 0.5, "probe": 0.6},
            "before": {"knn": 0.5, "probe": 0.2},
            "pixels": {"knn": 0.7, "probe": 0.1},
        }
        first, second = findings(self.record(summary=summary))
        assert (
            first == "A k-NN vote on the features is no better than one on the untrained encoder: 50.0% against 50.0%."
        )
        assert "raw pixels: 50.0% against 70.0%" in second

    def test_a_run_by_epochs_knows_its_length(self):
        config = {"train": {"steps": None, "epochs": 3.0}}
        record = self.record({"epoch": 0.5}, {"epoch": 1.0}, config=config, summary=None)
        assert record.total_steps == 18
        assert "6 of 18 steps are recorded, no checkpoint yet" in findings(record)[0]


def test_settings_written_as_json_are_numbers(tmp_path):
    # YAML reads 1e-06 as a string; runs started from Python write JSON.
    (tmp_path / "config.yaml").write_text(json.dumps(as_dict(Defaults()), indent=2))
    assert read_record(tmp_path).config["optim"]["lr_ends"] == [2e-4, 1e-6]
    assert "0 of 79 settings differ" in re.sub(r"of \d+", "of 79", page_of(tmp_path).text)


def test_default_patches_are_on_any_grid():
    assert default_patches((16, 16)) == [(4, 4), (8, 8), (12, 12)]
    assert default_patches((1, 1)) == [(0, 0)]


class TestCommand:
    def test_prints_the_path(self, run, capsys):
        assert cli.main(["report", str(run), "--images", "2", "--patch", "1,2", "--patch", "0,0"]) == 0
        assert capsys.readouterr().out == f"{run / 'report.html'}\n"
        assert "2 outlined patches" in (run / "report.html").read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["/nowhere"], "/nowhere is not the folder of a run: it does not exist"),
            (["{run}/checkpoints"], "holds no run: it has neither config.yaml nor metrics.jsonl"),
            (["{run}", "--images", "0"], "images must be at least 1, got 0"),
            (["{run}", "--candidates", "-1"], "candidates must be at least 1, got -1"),
            (["{run}", "--patch", "6,0"], "patch 6,0 is outside the 6 x 6 grid"),
            (["{run}", "--patch", "6"], "a patch is ROW,COLUMN, counted from 0 at the top left, got '6'"),
            (["{run}", "--imagess", "3"], "did you mean images?"),
        ],
    )
    def test_mistakes_end_with_a_clear_message(self, run, arguments, message, capsys):
        status = 2 if "--imagess" in arguments else 1  # of wrong usage, of other errors
        assert cli.main(["report", *(argument.format(run=run) for argument in arguments)]) == status
        assert message in capsys.readouterr().err
        assert not (run / "report.html").exists()


@pytest.mark.parametrize("text", ["", "1", "1,", ",1", "1,2,3", "-1,2", "a,b", "1.5,2"])
def test_a_patch_is_two_numbers(text):
    assert parse_patch(" 3, 14") == (3, 14)
    with pytest.raises(ValueError, match="ROW,COLUMN"):
        parse_patch(text)

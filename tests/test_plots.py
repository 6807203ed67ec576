"""Pictures: that they are PNGs of the expected panels, and that what they show is what was asked for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.masks.sampler import MaskConfig, Masks, MaskSampler
from ijepa_fast.plots import (
    cosine_maps,
    nearest_neighbours,
    pca_maps,
    plot_curves,
    plot_masks,
    plot_neighbours,
    plot_pca,
    plot_similarity,
)
from ijepa_fast.plots.sheet import viridis
from ijepa_fast.ragged import Ragged

ROOT = Path(__file__).resolve().parents[1]


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def panels(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].images]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def assert_png(path: Path, figure) -> None:
    """A PNG of the figure's size, not blank."""
    with Image.open(path) as png:
        assert png.format == "PNG"
        expected = figure.get_size_inches() * figure.dpi
        assert np.abs(np.array(png.size) - expected).max() <= 1
        assert np.asarray(png.convert("L")).std() > 5


def assert_apart_and_inside(figure) -> None:
    """No panel or text overlaps another or leaves the figure."""
    axes = figure.axes[0]
    boxes = [artist.get_window_extent(figure.canvas.get_renderer()) for artist in [*axes.images, *axes.texts]]
    width, height = figure.get_size_inches() * figure.dpi
    for i, box in enumerate(boxes):
        assert box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
        assert not any(
            box.x0 < other.x1 - 1 and other.x0 < box.x1 - 1 and box.y0 < other.y1 - 1 and other.y0 < box.y1 - 1
            for other in boxes[:i]
        )


METRICS = [
    {"step": step, "loss": 1 / step, "loss_prediction": 0.5 / step, "rank": step, "rank_centered": step + 2}
    | ({"knn": 0.4} if step > 10 else {})
    for step in range(10, 60, 10)
]


class TestCurves:
    def test_one_panel_for_each_kind_of_curve(self, tmp_path):
        figure = plot_curves(METRICS, tmp_path / "new" / "curves.png")
        assert_png(tmp_path / "new" / "curves.png", figure)
        loss, rank, knn = figure.axes
        assert [len(axes.lines) for axes in figure.axes] == [2, 2, 1]
        assert [axes.get_legend() is not None for axes in figure.axes] == [True, True, False]
        np.testing.assert_allclose(loss.lines[0].get_ydata(), [m["loss"] for m in METRICS])
        np.testing.assert_allclose(rank.lines[1].get_ydata(), [m["rank_centered"] for m in METRICS])
        assert knn.lines[0].get_xydata().tolist() == [[20, 40], [30, 40], [40, 40], [50, 40]]

    def test_what_was_not_recorded_has_no_panel(self):
        figure = plot_curves([{"step": 1, "loss": 2.0, "knn": None}])
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss"]

    def test_a_prediction_loss_that_is_all_of_the_loss_is_drawn_once(self):
        figure = plot_curves([{"step": s, "loss": 1.0 / s, "loss_prediction": 1.0 / s} for s in (1, 2)])
        assert len(figure.axes[0].lines) == 1

    def test_a_file_of_an_interrupted_run_can_be_read(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(m) + "\n" for m in METRICS) + '{"step": 6')
        assert len(plot_curves(path).axes[0].lines[0].get_xdata()) == 5
        path.write_text('{"step": 1, "loss": 1}\nnonsense\n{"step": 2, "loss": 1}\n')
        with pytest.raises(ValueError, match="line 2 is not JSON: 'nonsense'"):
            plot_curves(path)

    def test_nothing_to_plot_is_an_error(self):
        with pytest.raises(ValueError, match="1 records"):
            plot_curves([{"step": 1, "speed": 3}])


class TestMasks:
    @pytest.mark.parametrize(
        ("count", "grid", "config"),
        [
            (1, (8, 8), MaskConfig(min_keep=1)),
            (3, (6, 12), MaskConfig(num_contexts=2, num_targets=7, min_keep=1)),
            (2, (12, 6), MaskConfig(strategy="rasterized")),
        ],
    )
    def test_every_image_has_a_row_of_panels(self, tmp_path, count, grid, config):
        images = random_images(count, grid[0] * 4, grid[1] * 4)
        masks = MaskSampler(config, grid).sample(count, seed=0, step=0)
        figure = plot_masks(images, masks, grid, tmp_path / "masks.png")
        assert_png(tmp_path / "masks.png", figure)
        assert_apart_and_inside(figure)
        columns = 1 + masks.num_contexts + masks.num_targets
        assert len(panels(figure)) == count * columns
        lengths = [*masks.context.lengths.tolist(), *masks.targets.lengths.tolist()]
        shown = [int(text.split()[0]) for text in texts(figure) if text.endswith(" patches")]
        assert sorted(shown) == sorted(lengths)

    def test_panels_show_their_patches_and_fade_the_others(self):
        images = random_images(2, 4, 6)
        context = Ragged.from_lists([[0, 5], [6 + 1, 6 + 2, 6 + 4]])
        targets = Ragged.from_lists([[1], [2, 3], [6], [6 + 5]]).padded(16)
        figure = plot_masks(images, Masks(context, targets), (2, 3))
        assert texts(figure)[:4] == ["image", "context", "target 1", "target 2"]
        pictures = (images.permute(0, 2, 3, 1).float() / 255).numpy()
        visible = [[range(6), [0, 5], [1], [2, 3]], [range(6), [1, 2, 4], [0], [5]]]
        for panel, (image, patches) in zip(
            panels(figure), [(i, patches) for i in range(2) for patches in visible[i]], strict=True
        ):
            for patch in range(6):
                row, column = divmod(patch, 3)
                cut = np.s_[row * 2 : row * 2 + 2, column * 2 : column * 2 + 2]
                same = np.allclose(panel[cut], pictures[image][cut], atol=1e-6)
                assert same == (patch in patches)
                assert same or panel[cut].min() > 0.8

    def test_outlines_follow_the_border(self):
        masks = Masks(Ragged.from_lists([[0, 1, 3]]), Ragged.from_lists([[2]]))
        context, target = plot_masks(random_images(1, 4, 4), masks, (2, 2)).axes[0].collections[:2]
        # An L of three cells has a border of 8 cell sides, one cell has 4.
        assert [len(context.get_segments()), len(target.get_segments())] == [8, 4]
        corners = np.concatenate(target.get_segments())
        left = 2 * 1.06
        assert sorted({tuple(np.round(corner - [left, 0], 6)) for corner in corners}) == [
            (0, 0.5),
            (0, 1),
            (0.5, 0.5),
            (0.5, 1),
        ]

    def test_a_large_batch_is_cut(self):
        masks = MaskSampler(MaskConfig(min_keep=1), (8, 8)).sample(20, seed=0, step=0)
        images = random_images(20, 16, 16)
        assert len(panels(plot_masks(images, masks, (8, 8)))) == 8 * 6
        assert len(panels(plot_masks(images, masks, (8, 8), max_images=2))) == 2 * 6

    def test_errors_name_the_value(self):
        masks = MaskSampler(MaskConfig(min_keep=1), (8, 8)).sample(2, seed=0, step=0)
        with pytest.raises(ValueError, match="masks of 2 images, but 3 images"):
            plot_masks(random_images(3, 16, 16), masks, (8, 8))
        with pytest.raises(ValueError, match=r"\(17, 16\) px cannot be cut into \(8, 8\)"):
            plot_masks(random_images(2, 17, 16), masks, (8, 8))
        with pytest.raises(ValueError, match="from -1 to 1"):
            plot_masks(torch.linspace(-1, 1, 1536).view(2, 3, 16, 16), masks, (8, 8))


class TestPCA:
    def test_components_of_known_features(self):
        # Three directions of different strength, hidden in 10 dimensions.
        generator = torch.Generator().manual_seed(0)
        axes, _ = torch.linalg.qr(torch.randn(10, 3, generator=generator))
        strength = torch.rand(4, 6, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
        maps = pca_maps(strength @ axes.T + 5, (2, 3))
        assert maps.shape == (4, 2, 3, 3) and maps.dtype == torch.float32
        assert maps.min() == 0 and maps.max() == 1
        for channel in range(3):
            pair = torch.stack([maps[..., channel].flatten(), strength[..., channel].flatten()])
            assert abs(torch.corrcoef(pair)[0, 1]) > 0.9

    def test_orientation_and_colours_do_not_depend_on_batching_of_patches(self):
        features = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
        maps = pca_maps(features, (2, 3))
        torch.testing.assert_close(pca_maps(features.flip(0), (2, 3)).flip(0), maps)
        torch.testing.assert_close(pca_maps(7 * features + 3, (2, 3)), maps, atol=1e-5, rtol=0)
        torch.testing.assert_close(pca_maps(features[:, [3, 4, 5, 0, 1, 2]], (2, 3)).flip(1), maps)

    def test_positions_can_be_removed(self):
        generator = torch.Generator().manual_seed(0)
        content = torch.randn(5, 6, 8, generator=generator)
        content -= content.mean(0)
        positions = 100 * torch.randn(1, 6, 8, generator=generator)
        torch.testing.assert_close(
            pca_maps(content + positions, (2, 3), remove_positions=True), pca_maps(content, (2, 3)), atol=1e-4, rtol=0
        )
        plot_pca(random_images(5, 4, 6), content, (2, 3), before=content, remove_positions=True)
        with pytest.raises(ValueError, match="at least two images"):
            pca_maps(content[:1], (2, 3), remove_positions=True)

    def test_missing_components_are_grey(self):
        ramp = torch.arange(6.0).view(1, 6, 1)
        for features in (ramp, ramp * torch.ones(5)):
            maps = pca_maps(features, (2, 3))
            assert (maps[..., 1:] == 0.5).all() and maps[..., 0].unique().numel() == 6
        assert (pca_maps(torch.ones(2, 6, 4), (2, 3)) == 0.5).all()

    @pytest.mark.parametrize(("count", "grid"), [(1, (4, 4)), (5, (2, 6)), (7, (6, 2))])
    @pytest.mark.parametrize("with_before", [False, True])
    def test_a_sheet_of_any_number_of_images(self, tmp_path, count, grid, with_before):
        images = random_images(count, grid[0] * 8, grid[1] * 8)
        features = torch.randn(count, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
        figure = plot_pca(
            images, features, grid, tmp_path / "pca.png", before=-2 * features**2 if with_before else None, columns=3
        )
        assert_png(tmp_path / "pca.png", figure)
        assert_apart_and_inside(figure)
        kinds = 3 if with_before else 2
        shown = panels(figure)
        assert len(shown) == kinds * count
        assert len(texts(figure)) == kinds * -(-count // 3)
        np.testing.assert_allclose(shown[kinds - 1], pca_maps(features, grid)[0].numpy(), atol=1e-6)
        assert shown[0].shape[:2] == (grid[0] * 8, grid[1] * 8) and shown[1].shape[:2] == grid

    def test_errors_name_the_value(self):
        with pytest.raises(ValueError, match=r"\[B, 6, D\] on a 2 x 3 grid, got \[1, 5, 4\]"):
            pca_maps(torch.zeros(1, 5, 4), (2, 3))
        with pytest.raises(ValueError, match="finite"):
            pca_maps(torch.full((1, 6, 4), torch.nan), (2, 3))
        with pytest.raises(ValueError, match="2 images, but features of 3"):
            plot_pca(random_images(2, 4, 6), torch.randn(3, 6, 4), (2, 3))


class TestSimilarity:
    def test_maps_are_cosines_with_the_chosen_patch(self):
        features = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
        maps = cosine_maps(features, (2, 3), [(0, 2), (1, 1)])
        assert maps.shape == (2, 2, 2, 3) and maps.dtype == torch.float32
        x = features.double().numpy()
        for image in range(2):
            for number, chosen in enumerate([2, 4]):
                for patch in range(6):
                    a, b = x[image, chosen], x[image, patch]
                    expected = a @ b / np.sqrt((a @ a) * (b @ b))
                    np.testing.assert_allclose(maps[image, number].flatten()[patch], expected, atol=1e-6)
        torch.testing.assert_close(cosine_maps(7 * features, (2, 3), [(0, 2), (1, 1)]), maps)

    @pytest.mark.parametrize(("count", "grid"), [(1, (4, 4)), (3, (2, 6)), (2, (6, 2))])
    @pytest.mark.parametrize("with_before", [False, True])
    def test_a_row_for_each_image_and_a_map_for_each_patch(self, tmp_path, count, grid, with_before):
        images = random_images(count, grid[0] * 8, grid[1] * 8)
        features = torch.randn(count, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
        before = 2 + features.sin() if with_before else None
        patches = [(0, 1), (1, 0), (grid[0] - 1, grid[1] - 1)]
        figure = plot_similarity(images, features, grid, patches, tmp_path / "similarity.png", before=before)
        assert_png(tmp_path / "similarity.png", figure)
        assert_apart_and_inside(figure)
        kinds = [before, features] if with_before else [features]
        *shown, scale = panels(figure)
        assert len(shown) == count * (1 + 3 * len(kinds)) and scale.shape == (1, 64, 3)
        assert shown[0].shape[:2] == (grid[0] * 8, grid[1] * 8)
        maps = [cosine_maps(kind, grid, patches).numpy() for kind in kinds]
        low = float(texts(figure)[-2])
        assert 0 <= min(m.min() for m in maps) - low <= 0.05
        # Row by row: the image, then for each patch its map of every kind.
        expected = [m[image, number] for image in range(count) for number in range(3) for m in maps]
        drawn = [panel for place, panel in enumerate(shown) if place % (1 + 3 * len(kinds))]
        for panel, cosines in zip(drawn, expected, strict=True):
            np.testing.assert_allclose(panel, viridis((cosines - low) / (1 - low)), atol=1e-6)

    def test_features_that_are_all_alike_look_alike(self):
        *shown, _ = panels(plot_similarity(random_images(1, 4, 6), torch.ones(1, 6, 4), (2, 3), [(0, 0)]))
        assert np.ptp(shown[1].reshape(-1, 3), axis=0).max() == 0

    def test_errors_name_the_value(self):
        features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match="patch 2,0 is outside the 2 x 3 grid"):
            cosine_maps(features, (2, 3), [(0, 0), (2, 0)])
        with pytest.raises(ValueError, match="patch 0,-1 is outside"):
            cosine_maps(features, (2, 3), [(0, -1)])
        with pytest.raises(ValueError, match="no patch"):
            cosine_maps(features, (2, 3), [])
        with pytest.raises(ValueError, match=r"\[B, 8, D\] on a 2 x 4 grid, got \[2, 6, 4\]"):
            cosine_maps(features, (2, 4), [(0, 0)])
        with pytest.raises(ValueError, match="finite"):
            cosine_maps(features / 0, (2, 3), [(0, 0)])
        with pytest.raises(ValueError, match="3 images, but features of 2"):
            plot_similarity(random_images(3, 4, 6), features, (2, 3), [(0, 0)])


class TestNeighbours:
    def test_the_most_similar_first_and_never_the_query(self):
        angles = torch.tensor([0.0, 10, 25, 180, -5, 90]).deg2rad()
        lengths = torch.tensor([1.0, 50, 2, 3, 0.1, 9])
        features = torch.stack([angles.cos(), angles.sin()], dim=1) * lengths[:, None]
        rows, similarities = nearest_neighbours(features, [0, 3], 3)
        assert rows.tolist() == [[4, 1, 2], [5, 2, 1]]
        expected = torch.tensor([[5.0, 10, 25], [90, 155, 170]]).deg2rad().cos()
        torch.testing.assert_close(similarities, expected)

    def test_equals_come_in_the_order_of_their_rows(self):
        rows, similarities = nearest_neighbours(torch.ones(40, 3), [5, 0], 39)
        assert rows.tolist() == [[i for i in range(40) if i != 5], list(range(1, 40))]
        torch.testing.assert_close(similarities, torch.ones(2, 39))

    @pytest.mark.parametrize("named", [False, True])
    def test_a_row_for_each_query(self, tmp_path, named):
        images = random_images(8, 12, 16)
        rows = torch.tensor([[1, 2, 3], [5, 6, 7]])
        names = {}
        if named:
            names = {"query_names": ["ant", "$x$ " * 9], "neighbour_names": [["ant", "bee", "ant"], ["$x$ " * 9] * 3]}
        similarities = torch.tensor([[0.9, 0.8, -0.25], [1.0, 1.0, 1.0]])
        figure = plot_neighbours(images[[0, 4]], images[rows], similarities, tmp_path / "neighbours.png", **names)
        assert_png(tmp_path / "neighbours.png", figure)
        assert_apart_and_inside(figure)
        expected = (images.permute(0, 2, 3, 1).float() / 255).numpy()
        for panel, image in zip(panels(figure), expected, strict=True):
            np.testing.assert_allclose(panel, image, atol=1e-6)
        captions = texts(figure)[4:]
        if named:
            long = "$x$ $x$ $x$ $x…"
            assert captions[:4] == ["ant", "✓ ant\n0.90", "✗ bee\n0.80", "✓ ant\n-0.25"]
            assert captions[4:] == [long, *[f"✓ {long}\n1.00"] * 3]
        else:
            assert captions == ["0.90", "0.80", "-0.25", "1.00", "1.00", "1.00"]

    def test_errors_name_the_value(self):
        with pytest.raises(ValueError, match="between 1 and 3, .*, got 4"):
            nearest_neighbours(torch.ones(4, 2), [0], 4)
        with pytest.raises(ValueError, match=r"rows of the 4 features, got \[-1\]"):
            nearest_neighbours(torch.ones(4, 2), [-1], 1)
        with pytest.raises(ValueError, match="finite"):
            nearest_neighbours(torch.full((4, 2), torch.inf), [0], 1)
        images = random_images(4, 8, 8)
        with pytest.raises(ValueError, match=r"2 queries need neighbours \[2, k, 3, h, w\]"):
            plot_neighbours(images[:2], images, torch.ones(2, 2))
        with pytest.raises(ValueError, match="together"):
            plot_neighbours(images[:1], images[None, 1:], torch.ones(1, 3), query_names=["ant"])
        with pytest.raises(ValueError, match="1 queries with 3 neighbours"):
            plot_neighbours(
                images[:1], images[None, 1:], torch.ones(1, 3), query_names=["ant"], neighbour_names=[["ant"]]
            )


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path):
    code = f"""
import sys
from ijepa_fast.plots import plot_curves
print("matplotlib" in sys.modules)
plot_curves([{{"step": 1, "loss": 1.0}}], {str(tmp_path / "curves.png")!r})
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\nTrue False\n", done.stderr


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install -e"):
        plot_curves([{"step": 1, "loss": 1.0}])

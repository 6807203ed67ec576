"""Pictures of a run: training curves, sampled masks, and maps and neighbours of its features.

Every ``plot_`` function returns a matplotlib ``Figure`` and, given a path, writes it (the suffix says how). Figures are
made without pyplot, so nothing global changes and no display is needed; matplotlib is imported when the first one is
drawn. Colours are Okabe and Ito's and viridis, which colour-blind people can tell apart.
"""

from ijepa_fast.plots.curves import plot_curves
from ijepa_fast.plots.masks import plot_masks
from ijepa_fast.plots.neighbours import nearest_neighbours, plot_neighbours
from ijepa_fast.plots.pca import pca_maps, plot_pca
from ijepa_fast.plots.similarity import cosine_maps, plot_similarity

__all__ = [
    "cosine_maps",
    "nearest_neighbours",
    "pca_maps",
    "plot_curves",
    "plot_masks",
    "plot_neighbours",
    "plot_pca",
    "plot_similarity",
]

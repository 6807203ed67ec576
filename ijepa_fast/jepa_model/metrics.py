"""Parts of ``JEPAModel``: encoders that take a mask, and the metrics of a call.

Legend: B images, N patches per image, D width, T packed rows.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.evaluate import rank_me
from ijepa_fast.masks.geometry import pack_mask
from ijepa_fast.model.jepa import Prediction
from ijepa_fast.model.vit import VisionTransformer
from ijepa_fast.ragged import Ragged

log = logging.getLogger(__name__)


class Encoder(VisionTransformer):
    """``VisionTransformer`` that also takes a mask of patches.

    Attributes:
        model: a weak reference to the ``JEPAModel`` that it is in, which is told before weights are loaded.
    """

    model: weakref.ref | None = None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        if self.model is not None and (model := self.model()) is not None:
            model._before_loading()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name != "model"}

    def forward(
        self,
        images: Tensor,
        mask: Tensor | Sequence[Tensor] | Ragged | None = None,
        queries: Ragged | None = None,
        colors: Tensor | None = None,
    ) -> Tensor:
        """Features of patches.

        Args:
            images: [B, C, h, w]; uint8 is normalised here, float is taken as normalised.
            mask: the patches that the encoder sees; the others take no part. None: all. Bool [B, N]:
                those that are True. int64 [B, K], or a list of such: these patches (the official layout). A ``Ragged``
                of token indices: packed sets.
            queries, colors: as in ``VisionTransformer``.

        Returns:
            None: [B, N, D]. Bool: [B, N, D] with zeros at the patches that were not seen. int64: [B, K, D], or
            [len(mask) * B, K, D]. Ragged: [T, D].
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return super().forward(images, mask, queries, colors)
        rows, columns = self._grid_of_images(images)
        if mask.shape != (len(images), rows * columns):
            raise ValueError(f"a bool mask must be [{len(images)}, {rows * columns}], got {list(mask.shape)}")
        tokens = pack_mask(mask[:, None], mask.sum(1, dtype=torch.int32)[:, None], mask.shape[1], None)
        seen = super().forward(images, tokens, queries)
        dense = seen.new_zeros(mask.numel(), seen.shape[1]).index_copy(0, tokens.indices.long(), seen)
        return dense.unflatten(0, mask.shape)


class Metrics(Mapping[str, Tensor]):
    """Metrics of a call of ``JEPAModel``: scalars on the device, without gradients. The host waits for the device only
    when a value is read; ``rank`` is computed only then.

    Keys:
        loss: the loss that is minimised.
        prediction_loss, variance_loss, covariance_loss: its terms, where there is more than the first.
        feature_std: standard deviation of the target encoder's average-pooled features over the batch, averaged over
            features.
        rank: RankMe of these features (arXiv 2210.02885), between 1 (collapsed) and min(B, D).
        cosine_similarity: between prediction and layer-normalised target, mean over target patches.
        tokens: patches of all contexts and targets in the batch.
        momentum: of the target encoder's next update.
    """

    def __init__(self, values: dict[str, Tensor], pooled: Tensor):
        self._values, self._pooled = values, pooled

    def __getitem__(self, name: str) -> Tensor:
        if name == "rank" and name not in self._values:
            self._values[name] = torch.tensor(rank_me(self._pooled), device=self._pooled.device)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._values, "rank"]))

    def __len__(self) -> int:
        return len({*self._values, "rank"})

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name}: {float(value):.4g}' for name, value in self.items())}}}"


@torch.no_grad()
def cosine_similarity(predicted: Prediction, eps: float) -> Tensor:
    """Mean cosine similarity of predictions and layer-normalised targets over packed rows, without padding."""
    used = predicted.rows >= 0
    targets = predicted.targets[predicted.rows.clamp(min=0)].float()
    targets = F.layer_norm(targets, targets.shape[-1:], eps=eps)
    similarity = F.cosine_similarity(predicted.values.float(), targets, dim=-1)
    return (similarity * used).sum() / used.sum().clamp(min=1)


@torch.compiler.disable
def warn_of_range(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Say in the log that float images do not look normalised. This waits for the device: once per model."""
    if not images.is_floating_point() or not images.numel():
        return
    low, high = (float(value) for value in images.detach().aminmax())
    plain = not any(mean) and set(std) == {1}
    if high > 30 or (low >= 0 and high <= 1 and not plain):
        log.warning(
            "float images are taken as normalised, but these lie between %.4g and %.4g: give uint8 images, which are "
            "normalised here, or (images - mean) / std",
            low,
            high,
        )

"""Distances between generated and real images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from keygrip.evaluation.attribute_classifier import TrainedClassifier, feature_distance
from keygrip.models.patch_dit.encoders import Encoders

log = logging.getLogger(__name__)

LPIPS_NET: Literal["alex"] = "alex"
LPIPS_FILE = "alexnet-owt-7be5be79.pth"  # file name of torchvision's weights, in torch's hub folder


class Distances:
    """Distances between generated and real images [B, 3, H, W] in 0..1, one value for each pair.

    Args:
        encoders: their DINO gives `dino_distance` (of the colour image, whatever view the model receives). classifier:
            gives `classifier_distance`; None: none is computed. lpips: see :class:`ImageSuite`.
    """

    def __init__(self, encoders: Encoders, classifier: TrainedClassifier | None, lpips: str) -> None:
        self.encoders, self.classifier = encoders, classifier
        self.note = ""
        self.names = ("psnr_db", "ssim", "dino_distance", "classifier_distance", "lpips")
        self._lpips: Any = None
        file = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_FILE
        if lpips == "none":
            self.note = "LPIPS was switched off."
        elif not file.is_file():
            names = "dino_distance" if classifier is None else "classifier_distance and dino_distance"
            self.note = f"LPIPS was not computed: its weights are not at {file}. In its place: {names}."
        else:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._lpips = LearnedPerceptualImagePatchSimilarity(LPIPS_NET, normalize=True).eval()
        if self.note:
            log.info("%s", self.note)

    @torch.no_grad()
    def __call__(self, drawn: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Return the distances by name, [B] each."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        error = (drawn - real).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10)
        ssim = structural_similarity_index_measure(drawn, real, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        distances = {"psnr_db": -10 * error.log10(), "ssim": ssim, "dino_distance": self._dino_distance(drawn, real)}
        if self.classifier is not None:
            classifier = self.classifier.network.to(drawn.device)
            distances["classifier_distance"] = feature_distance(classifier(drawn).features, classifier(real).features)
        if self._lpips is not None:
            network = self._lpips.to(drawn.device)
            distances["lpips"] = torch.stack([network(d[None], r[None]) for d, r in zip(drawn, real, strict=True)])
        return distances

    def _dino_distance(self, drawn: Tensor, real: Tensor) -> Tensor:
        width, height = self.encoders.view_size(drawn.shape[3], drawn.shape[2])
        both = functional.interpolate(torch.cat([drawn, real]), (height, width), mode="bilinear", antialias=True)
        _, patches = self.encoders.view.encode(both.clamp(0, 1))
        left, right = patches.transpose(1, 2).chunk(2)
        return feature_distance(left, right)

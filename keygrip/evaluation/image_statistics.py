"""Distances between sets of images in the features of a frozen encoder, grain of single images, and means over sets.

Sets are compared with a reference set of real images. All of these distances depend on the number of images in a set.
So a figure is meaningful only next to that of equally many real images, compared with the same reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 3  # k of precision and recall
BANDWIDTH = 10.0  # bandwidth of the CMMD kernel
ROWS = 1024  # number of images whose distances to all others are held at once: all of 50 000 against 50 000 take 20 GB


def frechet_distance(left: Tensor, right: Tensor) -> float:
    """Frechet distance between normal distributions fitted to features ``[N, F]`` and ``[M, F]`` (Heusel et al., 2017;
    in the features of Inception it is the FID).

    Raises:
        ValueError: There are fewer than two rows.
    """
    if min(len(left), len(right)) < 2:
        raise ValueError("A Frechet distance needs at least two images on each side.")
    a, b = left.double(), right.double()
    centred = [(values - values.mean(dim=0)) / (len(values) - 1) ** 0.5 for values in (a, b)]
    # The trace of the root of the product of two covariances A'A and B'B is the sum of the singular values of A B'.
    # These equal those of the triangular factors of A and B, which are at most F x F.
    triangles = [torch.linalg.qr(values, mode="r").R for values in centred]
    cross = torch.linalg.svdvals(triangles[0] @ triangles[1].T).sum()
    spread = sum((values**2).sum() for values in centred)
    return float(((a.mean(dim=0) - b.mean(dim=0)) ** 2).sum() + spread - 2 * cross)


def cmmd(left: Tensor, right: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy under a Gaussian kernel of bandwidth 10, of features ``[N, F]``
    and ``[M, F]`` normalised to length 1 (Jayasumana et al., "Rethinking FID", 2024; with ``features.kind=clip`` the
    features are theirs too). This is the paper's unbiased estimate, which may be slightly below 0. The authors' code
    has the biased estimate, which is higher by at most 20 (1 / N + 1 / M).

    Raises:
        ValueError: There are fewer than two rows.
    """
    if min(len(left), len(right)) < 2:
        raise ValueError("CMMD needs at least two images on each side.")
    a, b = (functional.normalize(values.double(), dim=-1) for values in (left, right))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        """Return the sum over all pairs."""
        return torch.stack([(-(2 - 2 * rows @ y.T) / (2 * BANDWIDTH**2)).exp().sum() for rows in x.split(ROWS)]).sum()

    def within(x: Tensor) -> Tensor:
        return (kernel(x, x) - len(x)) / (len(x) * (len(x) - 1))

    return float(1000 * (within(a) + within(b) - 2 * kernel(a, b) / (len(a) * len(b))))


def precision_recall(drawn: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return the fraction of generated images among the real ones, and of real images among the generated (Kynkäänniemi
    et al., "Improved Precision and Recall Metric", 2019). An image is among a set if its distance to some image of the
    set is at most that image's distance to its k-th neighbour in the set. Features ``[N, F]`` and ``[M, F]``.

    Raises:
        ValueError: There are not more rows than neighbours.
    """
    if min(len(drawn), len(real)) <= neighbours:
        raise ValueError(f"Precision and recall need more than {neighbours} images on each side.")

    def share(points: Tensor, others: Tensor) -> float:
        distances = (torch.cdist(rows, others) for rows in others.split(ROWS))
        # the nearest is the image itself
        radius = torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in distances])
        inside = [(torch.cdist(rows, others) <= radius).any(dim=1) for rows in points.split(ROWS)]
        return float(torch.cat(inside).double().mean())

    a, b = drawn.double(), real.double()
    return share(a, b), share(b, a)


def grain(images: Tensor) -> Tensor:
    """Return ``[B]`` for images ``[B, 3, H, W]`` in 0..1: the mean distance of pixels from the median of their 3 x 3
    neighbourhood, in 1/255. A median preserves edges and smooth shading, but not grain and torn tiles."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    return (images - windows.median(dim=-1).values).abs().mean(dim=(1, 2, 3)) * 255


def set_figures(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Return Frechet distance, CMMD, precision and recall between features of some images and those of real ones.
    Figures that need more images than there are are left out."""
    figures: dict[str, float] = {}
    if min(len(features), len(reference)) >= 2:
        figures |= {"frechet": frechet_distance(features, reference), "cmmd": cmmd(features, reference)}
    if min(len(features), len(reference)) > NEIGHBOURS:
        figures["precision"], figures["recall"] = precision_recall(features, reference)
    return {name: round(value, 5) for name, value in figures.items()}


def real_figures(features: Tensor, grains: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the figures of real images instead of as many generated ones: features ``[N, F]`` and grain ``[N]``."""
    mean = round(float(grains.mean()), 5)
    return {"images": len(features), "grain": mean, **set_figures(features, reference)}


def summarise(found: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Return means over all images (of distances in pixels the median too), and the number of images."""
    figures: dict[str, float] = {}
    for name, parts in found.items():
        values = torch.cat(list(parts))
        figures["images"] = max(figures.get("images", 0), len(values))
        if not len(values):
            continue
        figures[name] = round(float(values.mean()), 5)
        if name.endswith("_px"):
            figures[f"{name}_median"] = round(float(values.median()), 4)
    return figures

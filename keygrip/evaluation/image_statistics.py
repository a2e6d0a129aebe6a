"""Distances between sets of images, in the features of a frozen encoder, the grain of single ones, and means over sets.

Sets are compared with a reference set of real images. All of these distances depend on how many images a set holds, so
that a figure says something only beside those of real images, of as many, against the same reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 3  # k of precision and recall
BANDWIDTH = 10.0  # bandwidth of the CMMD kernel
ROWS = 1024  # images whose distances to all others are held at once: all of 50 000 against 50 000 take 20 GB


def frechet_distance(left: Tensor, right: Tensor) -> float:
    """Between normal distributions fitted to features ``[N, F]`` and ``[M, F]`` (Heusel et al., 2017: in the features
    of Inception it is the FID).

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(left), len(right)) < 2:
        raise ValueError("A Frechet distance needs at least two images on each side.")
    a, b = left.double(), right.double()
    centred = [(values - values.mean(dim=0)) / (len(values) - 1) ** 0.5 for values in (a, b)]
    # The trace of the root of the product of two covariances A'A and B'B is the sum of the singular values of A B', and
    # those are the ones of the triangles of A and B, which are no larger than F x F.
    triangles = [torch.linalg.qr(values, mode="r").R for values in centred]
    cross = torch.linalg.svdvals(triangles[0] @ triangles[1].T).sum()
    spread = sum((values**2).sum() for values in centred)
    return float(((a.mean(dim=0) - b.mean(dim=0)) ** 2).sum() + spread - 2 * cross)


def cmmd(left: Tensor, right: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy under a Gaussian kernel of bandwidth 10, of features ``[N, F]``
    and ``[M, F]`` at length 1 (Jayasumana et al., "Rethinking FID", 2024; with ``features.kind=clip`` the features are
    theirs too). The unbiased estimate of the paper, which may be a little below 0; the authors' code has the biased
    one, which is higher by at most 20 (1 / N + 1 / M).

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(left), len(right)) < 2:
        raise ValueError("CMMD needs at least two images on each side.")
    a, b = (functional.normalize(values.double(), dim=-1) for values in (left, right))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        """The sum over all pairs."""
        return torch.stack([(-(2 - 2 * rows @ y.T) / (2 * BANDWIDTH**2)).exp().sum() for rows in x.split(ROWS)]).sum()

    def within(x: Tensor) -> Tensor:
        return (kernel(x, x) - len(x)) / (len(x) * (len(x) - 1))

    return float(1000 * (within(a) + within(b) - 2 * kernel(a, b) / (len(a) * len(b))))


def precision_recall(drawn: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of drawn images that lie among the real ones, and of real ones among the drawn (Kynkäänniemi et al.,
    "Improved Precision and Recall Metric", 2019): within the distance of some image of the other set to its k-th
    neighbour there. Features ``[N, F]`` and ``[M, F]``.

    Raises:
        ValueError: no more rows than neighbours.
    """
    if min(len(drawn), len(real)) <= neighbours:
        raise ValueError(f"Precision and recall need more than {neighbours} images on each side.")

    def share(points: Tensor, others: Tensor) -> float:
        apart = (torch.cdist(rows, others) for rows in others.split(ROWS))
        radius = torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in apart])  # the nearest is the image itself
        inside = [(torch.cdist(rows, others) <= radius).any(dim=1) for rows in points.split(ROWS)]
        return float(torch.cat(inside).double().mean())

    a, b = drawn.double(), real.double()
    return share(a, b), share(b, a)


def grain(images: Tensor) -> Tensor:
    """How far pixels lie from the median of their 3 x 3 neighbourhood, in 1/255, the mean over an image: ``[B]`` of
    images ``[B, 3, H, W]`` in 0..1. Edges and smooth shading survive a median; grain and torn tiles do not."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    return (images - windows.median(dim=-1).values).abs().mean(dim=(1, 2, 3)) * 255


def set_figures(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Frechet distance, CMMD, precision and recall of some images' features against those of real ones; nothing of what
    needs more images than there are."""
    found: dict[str, float] = {}
    if min(len(features), len(reference)) >= 2:
        found |= {"frechet": frechet_distance(features, reference), "cmmd": cmmd(features, reference)}
    if min(len(features), len(reference)) > NEIGHBOURS:
        found["precision"], found["recall"] = precision_recall(features, reference)
    return {name: round(value, 5) for name, value in found.items()}


def real_figures(features: Tensor, grains: Tensor, reference: Tensor) -> dict[str, float]:
    """Of real images in the place of as many drawn ones: their features ``[N, F]`` and grain ``[N]``."""
    mean = round(float(grains.mean()), 5)
    return {"images": len(features), "grain": mean, **set_figures(features, reference)}


def summarise(found: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Means over all images (of distances in pixels the median too), and their number."""
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

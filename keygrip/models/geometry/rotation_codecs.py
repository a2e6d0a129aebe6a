"""Discrete codes for rotations: bins along the first principal component, or K-means prototypes.

A codec is fitted on the training split's rotations. It converts rotations to class indices and class indices to
rotations. It is an ``nn.Module`` with its fitted state in buffers, which are stored in checkpoints and move with the
model; an unfitted codec raises an error. Quaternions are (w, x, y, z).

Shape legend: N rotations, R classes, ``...`` any batch shape.
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from keygrip.artifacts import atomic_write
from keygrip.models.geometry.rotations import (
    geodesic_angle,
    mean_rotation,
    normalise,
    off_path,
    quaternion_conjugate,
    quaternion_multiply,
    rotation_exp,
    rotation_log,
)
from keygrip.training.host_copy import HostCopy
from keygrip.training.integrity import ChangedFileError, load_tensors
from keygrip.training.parts import model_part
from keygrip.training.torch_files import TorchFileError

log = logging.getLogger(__name__)

COVERED_RAD = math.radians(15.0)  # rotations farther from every prototype, or from PC1's axis, are not covered
# A warning is logged if more than this share of rotations has a decode error above FAR_DEG, which no grip tolerates.
# Sound demonstrations have up to 2 % (the gripper tips on its way), such as the demo's, from which its policy learns.
FAR_DEG, FAR_SHARE = 45.0, 0.05
# A warning is logged if bins are WIDENED times wider than 98 % of the rotations need, and wider than NARROW_BIN_DEG.
WIDENED, NARROW_BIN_DEG = 2.0, 2.0
# Values at an end, at most 1 in APART_ONE_IN, are apart if they are beyond a gap. In sound demonstrations of three
# simulated tasks, as soon as they had LEAST_ROTATIONS, no value was apart. In others, commands that jump, fast turns
# and demonstrations that begin elsewhere have such gaps too: their frames follow one another, and more than LASTING
# successive ones are no outliers.
APART_ONE_IN, SCORE_GAP_DEG, ERROR_GAP_DEG, LEAST_ROTATIONS, LASTING = 100, 10.0, 15.0, 500, 2
# A gap along the axis must also be GAP_STEPS times as wide as the difference that FAST_SHARE of successive rotations
# have, or, if rotations do not follow one another in time, GAP_SPREADS times as wide as the spread next to it. It must
# be GAP_STEPS times as wide as every nearer gap that rotations cross to stay.
GAP_SPREADS, GAP_STEPS, FAST_SHARE = 4.0, 1.5, 0.95
# A single rotation with an error above this is warned about too. The largest of sound demonstrations was 69 degrees.
LARGE_DEG = 90.0


class RotationCodec(nn.Module):
    """Convert between rotations and class indices; the subclasses are the modes of the Hydra group ``rotation``."""

    classes: int
    fitted: Tensor  # bool [], a buffer: checkpoints record whether their basis has been fitted

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(
                f"A rotation codec needs at least 2 classes, got {classes}: set rotation.classes to 32, say."
            )
        self.classes = classes
        self._fitted = HostCopy()
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, quaternions: Tensor) -> dict[str, float]:
        """Fit on the training split's rotations ``[N, 4]``; return the report: decode errors in degrees, and more.

        Args:
            quaternions: the demonstrations one after another, with all frames of each in temporal order. What is an
                outlier or a wrong reading depends on this order.

        Raises:
            ValueError: there are no rotations, or they contain NaN.
        """
        if quaternions.ndim != 2 or quaternions.shape[-1] != 4 or len(quaternions) == 0:
            raise ValueError(
                f"A rotation basis is fitted on [N, 4] quaternions with N > 0, got {tuple(quaternions.shape)}."
            )
        if not bool(torch.isfinite(quaternions).all()):
            raise ValueError("The rotations to fit contain NaN or infinity: run the geometry doctor on the dataset.")
        unit = normalise(quaternions.double())
        self._fit(unit)
        self.fitted.fill_(True)
        return self.report(unit)

    def report(self, quaternions: Tensor) -> dict[str, float]:
        """Report of a fit on unit quaternions ``[N, 4]``: its errors, and values that the subclass adds."""
        return self.quantisation(quaternions) | {"rotations_off_path": float(off_path(quaternions).sum())}

    @abstractmethod
    def advice(self, report: dict[str, float]) -> str:
        """What to do about the rotations that are far from their codes, in sentences."""

    def settings(self) -> dict[str, float | None]:
        """Constructor settings on which the basis depends."""
        return {"classes": self.classes}

    def quantisation(self, quaternions: Tensor) -> dict[str, float]:
        """Quantisation floor of rotation errors: angles in degrees between rotations ``[N, 4]`` and their decoded
        codes, how many angles are above `FAR_DEG`, and how many of the largest are apart from the others."""
        decoded = self.decode(self.encode(quaternions)).to(quaternions.dtype)
        degrees = torch.rad2deg(geodesic_angle(normalise(quaternions), decoded))
        errors = {"decode_error_deg": float(degrees.mean()), "decode_error_max_deg": float(degrees.max())}
        over = float((degrees > FAR_DEG).sum())
        apart = float(_count_apart(degrees.cpu().numpy(), ERROR_GAP_DEG))
        return errors | {"rotations": float(len(degrees)), "rotations_over_45_deg": over, "rotations_apart": apart}

    def _require_fit(self) -> None:
        if not self._fitted(self.fitted):
            raise ValueError(
                "The rotation codec has no basis yet: training fits it on first use; for inference load it from "
                "a checkpoint."
            )

    @abstractmethod
    def _fit(self, quaternions: Tensor) -> None: ...

    @abstractmethod
    def encode(self, quaternions: Tensor) -> Tensor:
        """Class indices ``[...]`` (int64) of rotations ``[..., 4]``."""

    def covers(self, quaternions: Tensor, like: Tensor | None = None) -> Tensor:
        """Whether rotations ``[..., 4]`` are covered by the training data, that is, near their code: bool ``[...]``.

        ``like``: rotations ``[..., 4]`` that the training data cover. For a codec with an axis, they may lie off this
        axis: the allowed distance from the axis is then larger by that of ``like``.
        """
        del like
        decoded = self.decode(self.encode(quaternions)).to(quaternions.dtype)
        return geodesic_angle(normalise(quaternions), decoded) <= COVERED_RAD

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Rotations ``[..., 4]`` of class indices ``[...]``."""

    def expectation(self, logits: Tensor, window: int = 2) -> Tensor:
        """Rotations ``[..., 4]`` from logits ``[..., R]``: the best class by default, refined if classes are
        ordered."""
        del window
        return self.decode(logits.argmax(dim=-1))


@model_part
class PCARotation(RotationCodec):
    """Bins along the first principal component of the rotations' tangent vectors around their mean.

    In many manipulation data sets the gripper rotates mostly about one axis; then one value describes nearly all of the
    rotation. The share of variance that PC1 explains is reported; below ``min_explained`` a warning names the other
    mode, ``rotation=kmeans``.

    Args:
        classes: number of bins; 32 bins over a half turn are 5.6 degrees wide each.
        min_explained: share of variance below which the first component loses too much of the rotation.
        outlier_share: share of the training rotations, half of it at each end, that may lie outside of the bins and
            are then put in the outermost bins: a single wrong reading must not make all bins wide. 0: the bins span
            all rotations. None: they span all but outliers, at most 1 % at each end, beyond a gap of more than 10
            degrees along the axis of the bins, and at most two of them successive: a rotation that lasts for three
            frames is none. Of fewer than 500 rotations, and in bins of at most 2 degrees, they span outliers too.
    """

    mean: Tensor
    offset: Tensor
    axis: Tensor
    score_range: Tensor
    explained: Tensor

    def __init__(self, classes: int = 32, min_explained: float = 0.8, outlier_share: float | None = None) -> None:
        super().__init__(classes)
        if outlier_share is not None and not 0 <= outlier_share < 0.5:
            raise ValueError(
                f"rotation.outlier_share={outlier_share} is a share of the rotations, 0 to 0.5, or null: only outliers."
            )
        self.min_explained, self.outlier_share = min_explained, outlier_share
        self._ends = HostCopy()
        self.register_buffer("mean", torch.tensor([1.0, 0.0, 0.0, 0.0]))  # [4] rotation around which the logs are taken
        self.register_buffer("offset", torch.zeros(3))  # [3] mean tangent vector, rad
        self.register_buffer("axis", torch.tensor([0.0, 0.0, 1.0]))  # [3] unit direction of PC1
        self.register_buffer("score_range", torch.tensor([-1.0, 1.0]))  # [2] rad, lowest and highest PC1 score
        self.register_buffer("explained", torch.tensor(0.0))  # [] share of variance explained by PC1

    def _fit(self, quaternions: Tensor) -> None:
        mean = mean_rotation(quaternions)
        tangents = rotation_log(quaternion_multiply(quaternion_conjugate(mean), quaternions))  # [N, 3]
        if float(tangents.std(dim=0, correction=0).max()) < 1e-6:
            # Every rotation is the same (the gripper never rotates): any axis works, one bin is enough.
            axis, offset, explained = tangents.new_tensor([0.0, 0.0, 1.0]), tangents.mean(dim=0), 1.0
        else:
            pca = PCA(n_components=min(3, *tangents.shape)).fit(tangents.numpy())
            axis = torch.from_numpy(pca.components_[0]).to(tangents)
            offset = torch.from_numpy(pca.mean_).to(tangents)
            explained = float(pca.explained_variance_ratio_[0])
        low, high = self._ends_of_bins(((tangents - offset) @ axis).numpy())
        if high - low < 1e-3:  # the bins need a width even if nothing varies
            low, high = low - 5e-4, high + 5e-4
        self.mean.copy_(mean)
        self.offset.copy_(offset)
        self.axis.copy_(axis)
        self.score_range.copy_(torch.tensor([low, high]))
        self.explained.fill_(explained)

    def _ends_of_bins(self, scores: np.ndarray) -> tuple[float, float]:
        """Lowest and highest of the PC1 scores ``[N]``, radians, without those that are outside of the bins."""
        if self.outlier_share:
            low, high = np.quantile(scores, [self.outlier_share / 2, 1 - self.outlier_share / 2])
            return float(low), float(high)
        ordered = np.sort(scores)
        first, last = 0, len(ordered) - 1
        if self.outlier_share is None and np.rad2deg(ordered[last] - ordered[first]) > NARROW_BIN_DEG * self.classes:
            degrees = np.rad2deg(scores)
            step = float(np.quantile(np.abs(np.diff(degrees)), FAST_SHARE))
            first = _count_outliers(-degrees, SCORE_GAP_DEG, step)
            last -= _count_outliers(degrees, SCORE_GAP_DEG, step)
        return float(ordered[first]), float(ordered[last])

    def report(self, quaternions: Tensor) -> dict[str, float]:
        """Add PC1's share of the variance, the range of the bins and that of 98 % of the rotations in degrees, and how
        many rotations are beyond the outermost bins."""
        inner = np.quantile(self.scores(quaternions).numpy(), [0.01, 0.99])
        ranges = np.rad2deg([float(self.score_range.diff()), float(np.diff(inner)[0])]).tolist()
        found = {"pc1_explained": float(self.explained), "range_deg": ranges[0], "inner_range_deg": ranges[1]}
        # The ends are stored in float32: a hundredth of a bin is far more than their rounding.
        position = self._unclamped_position(quaternions)
        beyond = float(((position < -0.01) | (position > self.classes + 0.01)).sum())
        return found | super().report(quaternions) | {"rotations_beyond_bins": beyond}

    def advice(self, report: dict[str, float]) -> str:
        beyond, over = int(report["rotations_beyond_bins"]), int(report["rotations_over_45_deg"])
        sentences = [f"{beyond} are beyond the outermost bins: rotation.outlier_share=0 widens all bins to hold them"]
        aside = "Turns about several axes: rotation=kmeans holds them"
        return ". ".join(_wrong_readings(report) + sentences * (beyond > 0) + [aside] * (over > beyond))

    def settings(self) -> dict[str, float | None]:
        # Bases that were fitted when 0 was the only other setting have no share in their file's name.
        return super().settings() | ({} if self.outlier_share == 0 else {"outlier_share": self.outlier_share})

    def scores(self, quaternions: Tensor) -> Tensor:
        """PC1 scores ``[...]`` in radians of rotations ``[..., 4]``."""
        self._require_fit()
        mean = self.mean.to(quaternions.dtype)
        tangents = rotation_log(quaternion_multiply(quaternion_conjugate(mean), quaternions))
        # Products and sums keep their precision under autocast; a matrix product would not.
        return ((tangents - self.offset.to(tangents.dtype)) * self.axis.to(tangents.dtype)).sum(dim=-1)

    def bin_position(self, quaternions: Tensor) -> Tensor:
        """Position ``[...]`` on the bins' scale: bin i spans [i, i + 1], values outside the fitted range are
        clamped."""
        return self._unclamped_position(quaternions).clamp(0, self.classes)

    def _unclamped_position(self, quaternions: Tensor) -> Tensor:
        low, high = self._ends(self.score_range)
        return (self.scores(quaternions) - low) / (high - low) * self.classes

    def covers(self, quaternions: Tensor, like: Tensor | None = None) -> Tensor:
        scores = self.scores(quaternions)
        within = (scores >= self.score_range[0]) & (scores <= self.score_range[1])
        # a turn about another axis does not change the score: the rotation is then far from its place on the axis
        allowed = COVERED_RAD if like is None else COVERED_RAD + self._off_axis(like)
        return within & (self._off_axis(quaternions) <= allowed)

    def _off_axis(self, quaternions: Tensor) -> Tensor:
        """Radians ``[...]`` from rotations ``[..., 4]`` to their places on PC1's axis, also beyond the bins."""
        on_axis = self._rotation_at(self._unclamped_position(quaternions).to(self.mean.dtype)).to(quaternions.dtype)
        return geodesic_angle(normalise(quaternions), on_axis)

    def encode(self, quaternions: Tensor) -> Tensor:
        return self.bin_position(quaternions).long().clamp_max(self.classes - 1)

    def decode(self, indices: Tensor) -> Tensor:
        return self._rotation_at(indices.to(self.mean.dtype) + 0.5)

    def expectation(self, logits: Tensor, window: int = 2) -> Tensor:
        """Rotations ``[..., 4]`` at the mean bin position around the best bin of logits ``[..., R]``: finer than a
        bin."""
        bins = torch.arange(self.classes, device=logits.device)
        best = logits.argmax(dim=-1, keepdim=True)
        near = (bins - best).abs() <= window
        weights = logits.float().masked_fill(~near, -torch.inf).softmax(dim=-1)
        return self._rotation_at((weights * (bins + 0.5)).sum(dim=-1))

    def _rotation_at(self, position: Tensor) -> Tensor:
        self._require_fit()
        low, high = self.score_range[0], self.score_range[1]
        score = low + (high - low) * position / self.classes
        tangent = self.offset + score[..., None] * self.axis
        return normalise(quaternion_multiply(self.mean, rotation_exp(tangent)))


@model_part
class KMeansRotation(RotationCodec):
    """K prototype rotations; a rotation's code is the geodesically nearest prototype.

    K-means (scikit-learn) runs in the space of 4 x 4 quaternion outer products: q and -q have the same product, and the
    squared distance there, 2 (1 - cos^2(angle / 2)), grows with the geodesic angle, so the nearest centre is the
    nearest rotation. A centre is converted to a rotation by its principal eigenvector.

    Args:
        classes: K, the number of prototypes; at most as many as there are different rotations are used.
        seed: of the K-means initialisation.
    """

    prototypes: Tensor

    def __init__(self, classes: int = 32, seed: int = 0) -> None:
        super().__init__(classes)
        self.seed = seed
        self.register_buffer("prototypes", torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(classes, 1))  # [R, 4]

    def _fit(self, quaternions: Tensor) -> None:
        embedded = (quaternions[:, :, None] * quaternions[:, None, :]).flatten(1)  # [N, 16]
        distinct = len(torch.unique(embedded.mul(1e6).round(), dim=0))
        clusters = min(self.classes, distinct)
        kmeans = KMeans(clusters, n_init=4, random_state=self.seed).fit(embedded.numpy())
        centres = torch.from_numpy(kmeans.cluster_centers_).view(clusters, 4, 4)
        prototypes = torch.linalg.eigh((centres + centres.transpose(1, 2)) / 2).eigenvectors[..., -1]
        # With fewer different rotations than classes the last prototype repeats; argmax picks the first of equals.
        padded = torch.cat([prototypes, prototypes[-1:].expand(self.classes - clusters, 4)])
        self.prototypes.copy_(normalise(padded))

    def report(self, quaternions: Tensor) -> dict[str, float]:
        """Add the number of different prototypes."""
        return {"prototypes_used": float(len(torch.unique(self.prototypes, dim=0)))} | super().report(quaternions)

    def advice(self, report: dict[str, float]) -> str:
        return ". ".join([*_wrong_readings(report), "More prototypes hold them: raise rotation.classes"])

    def settings(self) -> dict[str, float | None]:
        return super().settings() | {"seed": self.seed}

    def encode(self, quaternions: Tensor) -> Tensor:
        self._require_fit()
        # |cos(angle / 2)| is largest for the geodesically nearest prototype. No matrix product, because of autocast.
        cosines = (quaternions[..., None, :] * self.prototypes.to(quaternions.dtype)).sum(dim=-1)
        return cosines.abs().argmax(dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        self._require_fit()
        return self.prototypes[indices]


def fit_or_load(codec: RotationCodec, quaternions: Tensor, cache_dir: Path, fingerprint: str) -> dict[str, float]:
    """Fit a codec, or load its basis from a file next to the dataset that was fitted on exactly the same rotations.

    The file's name contains a hash of the codec's settings, of ``fingerprint`` (which identifies the dataset's state
    when its statistics were computed) and of the rotations themselves, so a stale basis is never read.

    Args:
        quaternions: ``[N, 4]`` of the training split, in the order of `RotationCodec.fit`. cache_dir: folder next to
            the dataset, created if missing.

    Returns:
        The fit's report, see :meth:`RotationCodec.fit`.
    """
    contents = np.ascontiguousarray(quaternions.double().numpy()).tobytes()
    settings = f"{type(codec).__name__} {codec.settings()} {fingerprint}".encode()
    digest = hashlib.sha256(settings + contents).hexdigest()[:16]
    path = cache_dir / f"rotation-{type(codec).__name__}-{digest}.pt"
    stored = _load_cached_basis(path)
    if stored is not None:
        codec.load_state_dict(stored)
        report = codec.report(normalise(quaternions.double()))
        _warn_of_poor_fit(codec, report, quaternions)
        return report
    report = codec.fit(quaternions)
    _warn_of_poor_fit(codec, report, quaternions)
    with atomic_write(path) as file:
        torch.save(codec.state_dict(), file)
    return report


def _gaps(ordered: np.ndarray, gap: float, step: float = 0.0) -> list[tuple[int, float]]:
    """Return the gaps wider than ``gap`` between the highest of sorted values, at most 1 in `APART_ONE_IN`: how many
    values lie beyond each, most first, and its width.

    ``step``: usual difference of successive values. A gap must also be wide for it, or for the spread of the values
    just inside the last ones: fast turns have gaps, as does the end of any broad distribution.
    """
    most = len(ordered) // APART_ONE_IN
    if len(ordered) < LEAST_ROTATIONS:
        return []
    inside = len(ordered) - 1 - most
    spread = float(ordered[inside] - ordered[max(0, inside - most)])
    widths = np.diff(ordered[inside:])
    places = np.flatnonzero(widths > max(gap, min(GAP_SPREADS * spread, GAP_STEPS * step)))
    return [(most - int(place), float(widths[place])) for place in places]


def _count_apart(values: np.ndarray, gap: float) -> int:
    """Return how many of the highest values lie beyond the first gap, in any order of the values."""
    gaps = _gaps(np.sort(values), gap)
    return gaps[0][0] if gaps else 0


def _count_outliers(values: np.ndarray, gap: float, step: float) -> int:
    """Return how many of the highest values lie beyond a gap and are isolated in time: no more than `LASTING` of them
    are successive.

    Args:
        values: ``[N]`` in the order of `RotationCodec.fit`. Across the boundary of two demonstrations, the last frames
            of one and the first of the next count as successive: then fewer values are outliers. In any other order,
            as after shuffling, a rotation that lasts is scattered, and is taken for outliers.
    """
    order, crossed = np.argsort(values, kind="stable"), 0.0
    for count, width in _gaps(values[order], gap, step):
        rows = np.sort(order[-count:])
        lasting = bool((rows[LASTING:] - rows[:-LASTING] == LASTING).any())
        if not lasting and width > GAP_STEPS * crossed:
            return count
        if lasting:
            crossed = max(crossed, width)
    return 0


def _wrong_readings(report: dict[str, float]) -> list[str]:
    """Return the sentence about wrong readings, where the geometry doctor finds some."""
    found = int(report["rotations_off_path"])
    return [f"{found} leave the path of the frames before and after (wrong readings): step=doctor names them"] * (
        found > 0
    )


def _load_cached_basis(path: Path) -> dict[str, Tensor] | None:
    """Load a cached basis; None if there is none, or if it is damaged and must be fitted again."""
    try:
        basis: dict[str, Tensor] | None = load_tensors(path) if path.is_file() else None
        return basis
    except (ChangedFileError, TorchFileError) as error:
        log.warning("%s; it is fitted again", error)
        return None


def _explained_on_path(quaternions: Tensor) -> float:
    """Return the first component's share of the variance without the rotations off the path of their neighbours."""
    unit = normalise(quaternions.double())
    codec = PCARotation()
    codec._fit(unit[~off_path(unit)])
    return float(codec.explained)


def _warn_of_poor_fit(codec: RotationCodec, report: dict[str, float], quaternions: Tensor) -> None:
    if isinstance(codec, PCARotation) and report["pc1_explained"] < codec.min_explained:
        advice = ["rotation=pca_1d loses the rest; rotation=kmeans holds turns about several axes"]
        if wrong := _wrong_readings(report):
            without = _explained_on_path(quaternions)
            advice = [f"{wrong[0]}; without them it explains {100 * without:.0f} %"] + advice * (
                without < codec.min_explained
            )
        log.warning(
            "the first principal component explains %.0f %% of the training rotations (rotation.min_explained=%g): %s",
            100 * report["pc1_explained"],
            codec.min_explained,
            ". ".join(advice),
        )
    full, inner = report.get("range_deg", 0.0), report.get("inner_range_deg", 0.0)
    if full > WIDENED * inner and full > NARROW_BIN_DEG * codec.classes:
        log.warning(
            "the rotation bins span %.0f degrees, and 98 %% of the training rotations lie within %.0f: a bin is %.1f "
            "degrees wide in place of %.1f. %s",
            full,
            inner,
            full / codec.classes,
            inner / codec.classes,
            ". ".join([*_wrong_readings(report), "rotation.outlier_share=0.02 leaves the others outside of the bins"]),
        )
    largest, over = report["decode_error_max_deg"], report["rotations_over_45_deg"]
    left_out = isinstance(codec, PCARotation) and codec.outlier_share is None and report["rotations_beyond_bins"] > 0
    few = largest > LARGE_DEG or (largest > FAR_DEG and report["rotations_apart"] > 0) or left_out
    if few or over > FAR_SHARE * report["rotations"]:
        log.warning(
            "the largest decode error of the training rotations is %.0f degrees (%.1f on average), and %d of %d have "
            "more than %g: a policy that learns these codes turns the gripper wrongly there. %s",
            largest,
            report["decode_error_deg"],
            over,
            report["rotations"],
            FAR_DEG,
            codec.advice(report),
        )

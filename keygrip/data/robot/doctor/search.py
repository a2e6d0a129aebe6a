"""Initial values of a fit for a camera that is far off: silhouettes are tried at all places, sizes and rotations.

Shape legend: F frames, P points, h and w of the small images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from keygrip.data.robot.doctor.registration import FOCAL, LAG, NUMBERS, Fit, fit
from keygrip.data.robot.doctor.silhouettes import average_blocks, project_points, splat
from keygrip.data.robot.doctor.views import Placement, View

SCALES = (0.85, 0.92, 1.0, 1.08, 1.17)
ROLLS_DEG = (-8.0, -4.0, 0.0, 4.0, 8.0)
LAGS = (0, -3, 3, -6, 6)
SHRINK = 4  # pixels of the view per pixel of the search
EVERY = 12  # every n-th surface point is used
LONG_PRIOR = np.array([0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.2, 6.0])


def _every_other_frame(view: View) -> View:
    """Return a view with every other frame."""
    return replace(view, index=view.index[::2], images=view.images[::2], foreground=view.foreground[::2])


def starts(pairs: Sequence[tuple[View, Placement]], best: int) -> list[tuple[float, np.ndarray]]:
    """Return the best (score, change [8]) of a search over pan, tilt, roll, focal length and lag, best first. If the
    views differ in size, only those of the most frequent size are used, because their correlations are summed."""
    candidates: list[tuple[float, np.ndarray]] = []
    usual_size = Counter(view.size for view, _ in pairs).most_common(1)[0][0]
    pairs = [(_every_other_frame(view), robot) for view, robot in pairs if view.size == usual_size]
    foregrounds = [average_blocks(view.foreground, SHRINK) for view, _ in pairs]
    height, width = foregrounds[0].shape[1:]
    top, left = height // 2, width // 2  # margin: points outside the image may move into it
    canvas = (height + 2 * top, width + 2 * left)
    spectra, power = [], 0.0
    for boxes in foregrounds:
        centred = boxes - boxes.mean(axis=0)
        power += float((centred**2).sum())
        padded = np.zeros((len(boxes), *canvas), dtype=np.float32)
        padded[:, top : top + height, left : left + width] = centred
        spectra.append(np.fft.rfft2(padded))
    window = np.zeros(canvas)
    window[top : top + height, left : left + width] = 1
    spectrum = np.fft.rfft2(window)
    shifts = [(np.fft.fftfreq(size, 1 / size)).astype(int) for size in canvas]
    allowed = (np.abs(shifts[0]) <= top)[:, None] & (np.abs(shifts[1]) <= left)[None]
    for lag in LAGS:
        projected = [
            project_points(robot.at(view.index + lag, EVERY), view.intrinsics, view.world_to_camera)[0]
            for view, robot in pairs
        ]
        for roll in ROLLS_DEG:
            cosine, sine = np.cos(np.radians(roll)), np.sin(np.radians(roll))
            for scale in SCALES:
                rotation = scale * np.array([[cosine, -sine], [sine, cosine]], dtype=np.float32)
                correlation, energy = np.zeros(spectrum.shape, complex), np.zeros(canvas)
                for (view, _), pixels, image_spectrum in zip(pairs, projected, spectra, strict=True):
                    centre = view.intrinsics[:2, 2].astype(np.float32)
                    coords = ((pixels - centre) @ rotation.T + centre) / SHRINK + np.array(
                        [left, top], dtype=np.float32
                    )
                    mask, _ = splat(coords, *canvas)
                    share = mask.mean(axis=0)
                    variation = (mask ^ (share > 0.5)).astype(np.float32)
                    variation -= variation.mean(axis=0)
                    correlation += (np.conj(np.fft.rfft2(variation)) * image_spectrum).sum(axis=0)
                    energy += (variation**2).sum(axis=0)
                if not energy.any():
                    continue  # the robot is in none of the images
                energies = np.fft.irfft2(np.conj(np.fft.rfft2(energy)) * spectrum, s=canvas)
                score = np.fft.irfft2(correlation, s=canvas) / np.sqrt(
                    np.maximum(energies, 1e-3 * energy.sum()) * power
                )
                score = np.where(allowed, score, -1)
                row, column = np.unravel_index(int(score.argmax()), score.shape)
                shift_y, shift_x = shifts[0][row] * SHRINK, shifts[1][column] * SHRINK
                change = np.zeros(NUMBERS)
                intrinsics = pairs[0][0].intrinsics
                change[0] = -np.arctan(shift_y / (scale * intrinsics[1, 1]))
                change[1] = np.arctan(shift_x / (scale * intrinsics[0, 0]))
                change[2] = np.radians(roll)
                change[FOCAL], change[LAG] = np.log(scale), lag
                candidates.append((float(score[row, column]), change))
    candidates.sort(key=lambda entry: -entry[0])
    return candidates[:best]


def wide_fit(pairs: Sequence[tuple[View, Placement]]) -> Fit:
    """Return the best of a fit that begins without a change and fits that begin at results of a search over the image.
    The first one is returned unless another one is clearly better."""
    local_fit = fit(pairs)
    fits = [local_fit]
    for _, change in starts(pairs, best=2):
        fits.append(fit(pairs, start=change, prior=LONG_PRIOR))
    best = max(fits, key=lambda found: found.after)
    return best if best.after > local_fit.after + 0.01 else local_fit

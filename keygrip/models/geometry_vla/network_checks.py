"""Checks that reject network settings without effect or with missing parts; errors name the setting to change."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from keygrip.models.geometry_vla.geometry import GeometryEncoder

if TYPE_CHECKING:
    from keygrip.data.robot.statistics import CameraDistance

log = logging.getLogger(__name__)

# Angle between two cameras' rays to the middle of the workspace. A point's distance is less exact than its position
# across the view by a factor of one over the sine: 29 times at 2 degrees, 6 times at 10.
SAME_VIEW_DEG = 2.0
NARROW_DEG = 10.0


def check_geometry(
    geometry: GeometryEncoder | None,
    *,
    to_head: bool,
    to_vlm: bool,
    tokens: int,
    kind: str,
    pointed: bool,
    places: bool,
    blank: bool,
    standardised: bool,
) -> None:
    """Raise ValueError if geometry is requested but nothing would read it, or if there is no encoder for it."""
    if geometry is None and (to_head or to_vlm):
        name = "geom_inject_to_dit" if to_head else "geom_inject_to_vlm"
        raise ValueError(
            f"model.network.{name}=true needs a geometry encoder: choose geometry=dino_multiview or "
            "geometry=mapanything, or set it to false."
        )
    if tokens < 0 or (to_vlm and tokens < 1):
        raise ValueError(
            f"model.network.geom_dit_tokens={tokens}: at least 0, and at least 1 with geom_inject_to_vlm=true."
        )
    if to_head and not tokens and not pointed:
        raise ValueError(
            "model.network.geom_dit_tokens=0 leaves geometry at the pointed places alone: set pointed_tokens=true, or "
            "geom_inject_to_dit=false."
        )
    if to_vlm and kind == "per_layer":
        raise ValueError(
            "model.network.geom_compression_type=per_layer gives each block of the head its own tokens, and the "
            "language model's prompt has one set: use pool or qformer with geom_inject_to_vlm=true."
        )
    if places and not (to_vlm or (to_head and tokens)):
        raise ValueError("model.network.geom_places=true is of compressed geometry tokens, and there are none.")
    if blank and not (to_vlm or to_head):
        raise ValueError(
            "model.network.geom_blank=true has no effect: neither the language model nor the head receives geometry."
        )
    if standardised and not (to_head and tokens):
        raise ValueError(
            "model.network.geom_standardised=true is of compressed geometry tokens in the head, and there are none."
        )
    if geometry is not None and (to_head or to_vlm) and geometry.gives_scale and not (to_head and tokens):
        raise ValueError(
            "geometry.scale_token=true: its token stands beside compressed tokens in the head, and there are none "
            "(geom_inject_to_dit=false or geom_dit_tokens=0): set geometry.scale_token=false."
        )


def check_pointing(
    *, cells: int, patch_cells: int, keyframe: bool, tokens: bool, triangulated: bool, actions: bool
) -> None:
    """Raise ValueError if a setting reads maps or pointed tokens that are not enabled."""
    read_from_maps = {"pointed_tokens": tokens, "pointing_keyframe": keyframe, "pointed_actions": actions}
    for name, enabled in read_from_maps.items():
        if enabled and not cells:
            raise ValueError(f"model.network.{name}=true needs maps to point with: set pointing_cells above 0.")
    if triangulated and not tokens:
        raise ValueError("model.network.pointed_triangulated=true is of pointed tokens: set pointed_tokens=true.")
    if patch_cells and (patch_cells < 0 or not cells):
        raise ValueError(
            f"model.network.pointing_patch_cells={patch_cells} is a number of cells, of maps (pointing_cells above 0) "
            "that are also read from a geometry encoder's tokens: set it to 0."
        )


def check_views_apart(setting: str, cameras: Sequence[str], apart: Mapping[tuple[str, str], CameraDistance]) -> None:
    """Reject cameras whose rays have no meeting point, and warn if the meeting points would be inexact.

    Args:
        setting: name of the setting that needs meeting points, for messages. cameras: names of the views. apart: how
            far apart each pair of calibrated cameras is; empty: not known.

    Raises:
        ValueError: there is one camera, or all cameras see the workspace from the same direction.
    """
    if len(cameras) < 2:
        raise ValueError(
            f"model.network.{setting}=true: rays of one camera ({cameras[0]}) meet nowhere. "
            "Give data.cameras two or more, or set it to false."
        )
    if not apart:
        return
    (first, second), widest = max(apart.items(), key=lambda item: item[1].angle_deg)
    gap = f"{widest.distance_m * 100:.3g} cm apart, {widest.angle_deg:.2g} degrees from the middle of the workspace"
    pair = f"{first} and {second}" if len(apart) == 1 else f"even {first} and {second}, of all two the widest,"
    if widest.angle_deg < SAME_VIEW_DEG:
        raise ValueError(
            f"model.network.{setting}=true: {pair} stand {gap}, so their rays say nothing of how far away a point "
            f"is (less than {SAME_VIEW_DEG:g} degrees). Give data.cameras another pair, or set it to false."
        )
    if widest.angle_deg < NARROW_DEG:
        log.warning(
            "model.network.%s=true: %s stand %s: how far away a point is comes out %.0f times less exact than where it "
            "is across the view",
            *(setting, pair, gap, 1 / math.sin(math.radians(widest.angle_deg))),
        )

"""Images of a coloured cube and a blue block on the table, with captions that name colour and layout.

An image is a function of (options, seed). The cubes' colours differ only in hue: all have the same luminance, so that a
grey view of the image shows the cube's position but not its colour. The block is long and flat, so that it can be
distinguished from the cube without colour. Left and right are those of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from keygrip.envs.rendering import CameraRenderer, Lens
from keygrip.envs.yam import tasks
from keygrip.envs.yam.colours import EQUAL_LUMINANCE
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import Appearance, EpisodeLayout, TaskOptions, stream

CUBE_COLOURS = {"red": "red", "gold": "yellow", "teal": "cyan", "purple": "purple"}  # caption name: name in the palette
BLOCK_COLOUR = "blue"
CUBE, BLOCK = "distractor0", "object"  # bodies of the scene
SIDE_MARGIN = 0.05  # fraction of the image's width; if the objects are closer, left and right are ambiguous
SEEN_SHARE = 0.25  # fraction of a cube's pixels in an unobstructed front view; with less, something is in front of it
ATTEMPTS = 50
TABLE_TINT, FLOOR_TINT = (1.0, 0.93, 0.82), (0.9, 0.95, 1.0)


@dataclass(frozen=True)
class StillOptions:
    """What varies between images.

    Args:
        sizes: (width, height) in pixels and relative frequency of each: [[208, 192, 6], [320, 200, 1], ...].
        object_size_m: edge of the cube; the block is 2.5 x 1.25 x 0.75 of it.
        fovy_deg: field of view over the shorter side.
        randomise_table: brightness of table and floor (their hue stays, because a grey view should show everything
            except the cube's colour). textures: also wood, checks and speckle.
        randomise_light: direction and strength. shadows: 3 times slower to render.

    Raises:
        ValueError: A value is out of range.
    """

    sizes: Sequence[Sequence[int]] = field(default=((208, 192, 6), (320, 200, 1), (200, 320, 1)))
    object_size_m: float = 0.05
    fovy_deg: float = 22.0
    randomise_table: bool = True
    textures: bool = False
    randomise_light: bool = True
    shadows: bool = False

    def __post_init__(self) -> None:
        for size in self.sizes:
            if len(size) != 3 or not all(32 <= edge <= 1280 for edge in size[:2]) or size[2] < 1:
                raise ValueError(f"sizes are [width, height, how often] with edges of 32 to 1280 pixels, not {size}")
        if not self.sizes:
            raise ValueError("sizes is empty: give at least one [width, height, how often]")
        if not 10 <= self.fovy_deg <= 60:
            raise ValueError(f"fovy_deg={self.fovy_deg} is outside [10, 60]")
        if self.textures and not self.randomise_table:
            raise ValueError("textures=true has no effect without randomise_table=true")

    @property
    def task(self) -> TaskOptions:
        """The scene: a bar to pick and one more object."""
        return TaskOptions(
            name="pick",
            object="bar",
            object_size_m=self.object_size_m,
            distractors=1,
            equal_luminance=True,
            random_start=False,
            shadows=self.shadows,
            randomise_table=self.randomise_table,
            randomise_light=self.randomise_light,
        )

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {**asdict(self), "sizes": [list(size) for size in self.sizes]}

    def size_of(self, seed: int) -> tuple[int, int]:
        """Return (width, height) of a seed's image."""
        shares = np.array([size[2] for size in self.sizes], float)
        chosen = self.sizes[int(stream(seed, "picture size").choice(len(shares), p=shares / shares.sum()))]
        return int(chosen[0]), int(chosen[1])


@dataclass(frozen=True)
class Still:
    """An image and its ground truth.

    Args:
        pixels: uint8 [H, W, 3]. caption: text.
        colour: of the cube. cube, block: centre (x, y) in pixels, corner convention.
    """

    pixels: np.ndarray
    caption: str
    colour: str
    cube: tuple[float, float]
    block: tuple[float, float]
    seed: int


class StillCell(YamCell):
    """The cell that renders the images; built once, used for many seeds."""

    def __init__(self, options: StillOptions) -> None:
        super().__init__(options.task, image_size=64, render_images=False)
        self.options = options
        self._renderers: dict[tuple[int, int], CameraRenderer] = {}

    def lens_of_size(self, width: int, height: int) -> Lens:
        """Return the lens of an image: the field of view spans its shorter side."""
        square = Lens.from_field_of_view(min(width, height), min(width, height), self.options.fovy_deg)
        intrinsics = square.intrinsics.copy()
        intrinsics[:2, 2] = width / 2, height * 0.46  # the work area is slightly below the axis
        return Lens(width, height, intrinsics)

    def layout_of(self, seed: int, attempt: int) -> EpisodeLayout:
        """Return the scene of a seed; further attempts change only the objects."""
        layout = tasks.sample_layout(self.task, seed)
        if attempt:
            resampled = tasks.sample_layout(self.task, int(stream(seed, f"again {attempt}").integers(2**31)))
            layout = replace(layout, object=resampled.object, distractors=resampled.distractors)
        colour = list(CUBE_COLOURS.values())[int(stream(seed, "cube colour").integers(len(CUBE_COLOURS)))]
        cube = replace(layout.distractors[0], shape="cube", colour=colour)
        return replace(
            layout,
            object=replace(layout.object, colour=BLOCK_COLOUR),
            distractors=(cube,),
            appearance=self._adjust_appearance(layout.appearance, seed),
        )

    def _adjust_appearance(self, look: Appearance, seed: int) -> Appearance:
        """Return an appearance with one hue each for table and floor, and with a light that overexposes no face,
        because a clipped colour would have another luminance than the others."""
        rng = stream(seed, "picture look")
        if not self.options.textures:
            look = replace(look, table=0)
        if self.options.randomise_table:
            table, floor = rng.uniform(0.68, 0.95), rng.uniform(0.15, 0.5)  # objects are darker than the table
            look = replace(look, table_rgb=_scale_tint(TABLE_TINT, table), floor_rgb=_scale_tint(FLOOR_TINT, floor))
        if self.options.randomise_light:
            look = replace(look, ambient=float(rng.uniform(0.25, 0.4)), diffuse=float(rng.uniform(0.15, 0.3)))
        return look

    def still(self, seed: int) -> Still:
        """Return the image of a seed: cube and block are inside it and mostly visible.

        Raises:
            ValueError: No such arrangement was found.
        """
        size = self.options.size_of(seed)
        lens = self.lens_of_size(*size)
        for attempt in range(ATTEMPTS):
            self.seed, self.layout = int(seed), self.layout_of(seed, attempt)
            self._arrange(self.layout)
            centres = {name: self._project_body(lens, name) for name in (CUBE, BLOCK)}
            if all(0.06 < x / size[0] < 0.94 and 0.06 < y / size[1] < 0.94 for x, y in centres.values()):
                pixels, visible_share = self._take(lens)
                if visible_share >= SEEN_SHARE:
                    colour = _colour_name(self.layout.distractors[0].colour)
                    caption = describe(colour, centres[CUBE][0] / size[0], centres[BLOCK][0] / size[0], seed)
                    return Still(pixels, caption, colour, centres[CUBE], centres[BLOCK], self.seed)
        raise ValueError(
            f"seed {seed}: no arrangement shows both objects; is fovy_deg={self.options.fovy_deg} too small?"
        )

    def _project_body(self, lens: Lens, body: str) -> tuple[float, float]:
        transform = self.world_to_camera("over")
        u, v, depth = lens.intrinsics @ (transform[:3, :3] @ self.body_position(body) + transform[:3, 3])
        return float(u / depth), float(v / depth)

    def _take(self, lens: Lens) -> tuple[np.ndarray, float]:
        """Return the image, and the visible fraction of the cube, counted in an image of half the size."""
        small = Lens(lens.width // 2, lens.height // 2, np.diag([0.5, 0.5, 1.0]) @ lens.intrinsics)
        labels = self._renderer_of(small).segmentation(self.data, "over", small)
        bodies = np.where(labels >= 0, self.model.geom_bodyid[np.maximum(labels, 0)], -1)
        # edge of the cube in pixels, at a distance of one metre, where the cube is
        edge = self.options.object_size_m * small.intrinsics[0, 0]
        visible_share = float((bodies == self.model.body(CUBE).id).sum() / edge**2)
        return self._renderer_of(lens).image(self.data, "over", lens), visible_share

    def _renderer_of(self, lens: Lens) -> CameraRenderer:
        size = (lens.width, lens.height)
        if size not in self._renderers:
            self._renderers[size] = CameraRenderer(self.model, *size, self.options.shadows)
        return self._renderers[size]

    def close(self) -> None:
        """Free the GL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        super().close()


def _scale_tint(tint: tuple[float, float, float], brightness: float) -> tuple[float, float, float]:
    red, green, blue = (float(brightness * part) for part in tint)
    return red, green, blue


def _colour_name(palette: str) -> str:
    return next(name for name, key in CUBE_COLOURS.items() if key == palette)


def palette() -> dict[str, tuple[float, float, float]]:
    """Return the cubes' colours by the names that captions use."""
    return {name: EQUAL_LUMINANCE[key] for name, key in CUBE_COLOURS.items()}


def describe(colour: str, cube_x: float, block_x: float, seed: int) -> str:
    """Return a caption in one of several wordings; `cube_x` and `block_x` in fractions of the width."""
    cube, block = f"a {colour} cube", f"the {BLOCK_COLOUR} block"
    if abs(cube_x - block_x) < SIDE_MARGIN:
        return (f"{cube} near {block}", f"{cube} and {block} on the table")[int(stream(seed, "words").integers(2))]
    side, opposite = ("left", "right") if cube_x < block_x else ("right", "left")
    wordings = (
        f"{cube} {side} of {block}",
        f"{cube} {side} of {block} on the table",
        f"{block} {opposite} of {cube}",
        f"{cube} to the {side} of {block}",
    )
    return wordings[int(stream(seed, "words").choice(4, p=[0.55, 0.15, 0.15, 0.15]))]

"""The report of a validation suite: Markdown with images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from keygrip.artifacts import write_bytes, write_text
from keygrip.models.patch_dit.figures import image_grid

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

REPORT, SAMPLES, SCALES, SCALE_MAP = "report.md", "samples.png", "scales.png", "scale_map.png"
EXPLAINED = {
    "reconstruction": "own text, own DINO features",
    "dino_swap": "own text, features of another image; compared with that one",
    "text_only": "own text, no features",
    "changed_words": "a word of the caption changed, own features",
    "shuffled_patches": "own text, own patches in random order",
    "another_picture": "a real image, another one than asked for",
    "real": "the real image itself: what the classifier says of it is its own error",
}


def write_report(
    output: Path,
    figures: Mapping[str, Any],
    rows: Sequence[tuple[str, Tensor]],
    scale_rows: Sequence[tuple[str, Tensor]],
) -> list[Path]:
    """Writes `report.md` and its images; returns the images.

    Args:
        figures: see `keygrip.evaluation.image_text.run_suite`. rows, scale_rows: titles and images
            [N, 3, H, W] in 0..1.
    """
    output.mkdir(parents=True, exist_ok=True)
    images = []
    for name, shown in ((SAMPLES, rows), (SCALES, scale_rows)):
        if shown:
            write_bytes(output / name, png(image_grid(shown)))
            images.append(output / name)
    if figures["scales"] and "colour_as_asked" in figures["scales"][0]:
        write_bytes(output / SCALE_MAP, scale_map(figures["scales"]))
        images.append(output / SCALE_MAP)
    write_text(output / REPORT, markdown(figures, [path.name for path in images]))
    return images


def markdown(figures: Mapping[str, Any], images: Sequence[str]) -> str:
    """The report's text."""
    sampling = ", ".join(f"{name} {value}" for name, value in figures["sampling"].items())
    lines = [f"# Images of the {figures['split']} split", "", f"Sampling: {sampling}.", ""]
    classifier = figures["classifier"]
    if classifier is not None:
        lines += [
            f"Places and colours come from a small network trained on real images. On {classifier['images']} "
            f"held-out real ones (validation split) its mean error is {classifier['cube_px']:.2f} px for the cube and "
            f"{classifier['block_px']:.2f} px for the block; {classifier['near']:.1%} of the cubes are within 4 px and "
            f"{classifier['colour']:.1%} of the colours are named correctly. Its error on the images of this report is "
            "in the row `real`. Pixels are those of an image whose shorter side has 64.",
            "",
        ]
    if figures["lpips_note"]:
        lines += [figures["lpips_note"], ""]
    if SAMPLES in images:
        lines += ["## Samples", "", f"![samples]({SAMPLES})", ""]
    lines += ["## Figures", "", *table(figures["cases"]), ""]
    lines += [f"- `{case}`: {EXPLAINED[case]}" for case in figures["cases"]]
    if figures["scales"]:
        lines += ["", "## Words against features", "", "`changed_words` over the two guidance scales.", ""]
        lines += [f"![{name}]({name})" for name in (SCALE_MAP, SCALES) if name in images]
        named = {f"text {row['text_scale']:g}, DINO {row['dino_scale']:g}": row for row in figures["scales"]}
        rows = {
            name: {k: v for k, v in row.items() if k not in ("text_scale", "dino_scale")} for name, row in named.items()
        }
        lines += ["", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A Markdown table: a line a row, a column for each figure that any row has."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for title, row in rows.items():
        cells = (f"{row[name]:.4g}" if name in row else "" for name in names)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def png(image: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as a PNG file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def scale_map(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Two maps over (text_scale, dino_scale): the colour asked for is drawn, and the cube is where it shall be."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = sorted({row["text_scale"] for row in rows})
    dinos = sorted({row["dino_scale"] for row in rows})
    figure = Figure(figsize=(2.2 + 1.6 * len(dinos), 1.2 + 0.5 * len(texts)), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"colour_as_asked": "colour as asked in words", "cube_within_4px": "cube within 4 px"}
    for axis, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        values = np.full((len(texts), len(dinos)), np.nan)
        for row in rows:
            values[texts.index(row["text_scale"]), dinos.index(row["dino_scale"])] = row[name]
        axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(values):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
        axis.set_xticks(range(len(dinos)), [f"{scale:g}" for scale in dinos])
        axis.set_yticks(range(len(texts)), [f"{scale:g}" for scale in texts])
        axis.set(title=title, xlabel="DINO scale", ylabel="text scale")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

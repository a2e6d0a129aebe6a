"""The report of a validation suite: Markdown with images."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from keygrip.artifacts import write_bytes, write_text
from keygrip.models.patch_dit.figures import image_grid

log = logging.getLogger(__name__)

REPORT, SAMPLES, SCALES, SCALE_MAP = "report.md", "samples.png", "scales.png", "scale_map.png"
CURVES = "curves.png"
EXPLAINED = {
    "reconstruction": "own text, own DINO features",
    "dino_swap": "own text, features of another image; compared with that one",
    "text_only": "own text, no features",
    "changed_words": "a word of the caption changed, own features",
    "shuffled_patches": "own text, own patches in random order",
    "autoencoder": "the real images as the autoencoder decodes them: no generated image can be better",
    "unrelated_image": "a real image, not the requested one",
    "real": "the real images themselves: the classifier's own error, and the distance of real sets from each other",
}
FIGURES = {
    "psnr_db": "peak signal-to-noise ratio against the image asked for, dB",
    "ssim": "structural similarity to the image asked for; 1: equal",
    "dino_distance": "distance from the image asked for in DINO features",
    "classifier_distance": "the same in the features of the attribute classifier",
    "lpips": "the same in those of LPIPS",
    "clip_similarity": "cosine of CLIP's embeddings of image and caption",
    "grain": "mean distance of pixels from the median of their 3 x 3 neighbourhood, 1/255",
    "cube_px": "how far the cube is from where it was asked for, mean; `block_px` likewise",
    "cube_within_4px": "share of images with the cube that near; `block_within_4px` likewise",
    "colour_of_reference": "share of cubes in the colour of the reference image",
    "objects_as_named": "share of images with exactly the named objects",
    "colour_as_asked": "share of cubes in the colour that the words ask for",
    "side_as_asked": "share of cubes on the side of the block that the words ask for",
    "side_of_reference": "the same of the reference image, where the words are of another one or replaced",
    "frechet": "Frechet distance of the set from real training images",
    "cmmd": "maximum mean discrepancy of the same sets; 0: none",
    "precision": "share of the images that lie among real ones",
    "recall": "share of real images that lie among these",
    "grain_off": "how far grain is off that of real images",
}
# Figures that are traded off over the scales; a minus: lower is better. The first pair that was measured is used. If
# several pairs of scales have the same best fractions, they are compared by `QUALITY`.
SHARES_PARETO = ("colour_as_asked", "cube_within_4px")
SCALES_PARETO = (SHARES_PARETO, ("clip_similarity", "-dino_distance"), ("-frechet", "-dino_distance"))
QUALITY = ("-frechet", "-grain_off")
WORDS_PARETO = (("objects_as_named", "-frechet"), ("clip_similarity", "-frechet"), QUALITY)
STEPS_PARETO = ("-frechet", "-evaluations")
AXES = {"colour_as_asked": "colour as asked in words", "cube_within_4px": "cube within 4 px"}
AXES |= {"frechet": "Frechet distance", "dino_distance": "distance in DINO features"}
AXES |= {"grain_off": "grain off that of real images, 1/255", "clip_similarity": "similarity to the words (CLIP)"}
AXES |= {"objects_as_named": "exactly the named objects"}
# Figures compared with an anchor, real images against other real images: the lowest and the highest acceptable ratio of
# a case's figure to the anchor's. Too little grain is blur.
LIMITS = (
    ("reconstruction", "frechet", "real", 0.0, 1.5, "Frechet distance of reconstructions", "of real images"),
    ("text_only", "frechet", "real", 0.0, 3.0, "Frechet distance of images from words alone", "of real images"),
    ("reconstruction", "grain", "real", 0.8, 1.2, "grain of reconstructions", "of real images"),
    ("text_only", "grain", "real", 0.8, 1.2, "grain of images from words alone", "of real images"),
)
SHARES = (
    ("reconstruction", "ssim", 0.80, "SSIM of reconstructions"),
    ("text_only", "objects_as_named", 0.95, "share of images from words alone with exactly the named objects"),
    ("reconstruction", "cube_within_4px", 0.95, "share of reconstructions with the cube within 4 px"),
    ("reconstruction", "colour_as_asked", 0.98, "share of reconstructions with the right colour"),
    ("changed_words", "colour_as_asked", 0.95, "share of changed words whose colour is drawn"),
    ("changed_words", "cube_within_4px", 0.90, "share of images of changed words with the cube in place"),
)


def describe_column(case: str) -> str:
    """Describe a column of the table."""
    of = case.removeprefix("real_of_")
    if of == case:
        return EXPLAINED[case]
    return f"the real images of `{of}` alone, which applies to some only: distances depend on a set's number of images"


def shortcomings(cases: Mapping[str, Mapping[str, float]], split: str = "test") -> list[str]:
    """Return measured shortcomings of the images, one sentence each; empty if there are none.

    For the split `train`, the real images are among those that sets are compared with: their own distance is no anchor.
    """
    sentences = []
    for case, name, anchor, least, most, quantity, source in LIMITS:
        value, base = cases.get(case, {}).get(name), cases.get(anchor, {}).get(name)
        if name == "frechet" and split == "train":
            continue
        if value is not None and base is not None and not least * base <= value <= most * base:
            sentences.append(
                f"The {quantity} is {value:.3g}, {value / max(base, 1e-9):.3g} times that {source} ({base:.3g})."
            )
    for case, name, least, quantity in SHARES:
        value, other = cases.get(case, {}).get(name), cases.get("unrelated_image", {}).get(name)
        if value is not None and value < least:
            note = f"; that of an unrelated real image is {other:.2f}" if other is not None and name == "ssim" else ""
            sentences.append(f"The {quantity} is {value:.2f}, below {least:.2f}{note}.")
    return sentences


def pareto(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[int]:
    """Return the indices of the rows that no other row surpasses in all of the named figures: higher is better, or
    lower if the name begins with a minus."""
    points = [[-row[name[1:]] if name.startswith("-") else row[name] for name in names] for row in rows]

    def beaten(own: Sequence[float]) -> bool:
        return any(
            all(a >= b for a, b in zip(other, own, strict=True)) and list(other) != list(own) for other in points
        )

    return [index for index, point in enumerate(points) if not beaten(point)]


def best_pair(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], list[int]] | None:
    """Return the first of the pairs for which all rows have figures, and the indices of the rows on its front; None if
    there is none.

    Fractions cannot exceed 1: rows that reach the same best fractions are compared among themselves by `QUALITY`.
    """
    pair = next((pair for pair in pairs if has_figures(rows, pair)), None)
    if pair is None:
        return None
    front = pareto(rows, pair)
    best = [rows[index] for index in front]
    saturated = len(best) > 1 and len({tuple(row[name.lstrip("-")] for name in pair) for row in best}) == 1
    if pair == SHARES_PARETO and saturated and has_figures(best, QUALITY):
        return QUALITY, [front[index] for index in pareto(best, QUALITY)]
    return pair, front


def has_figures(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bool:
    """Return whether there are rows and all have the named figures."""
    return bool(rows) and all(name.lstrip("-") in row for row in rows for name in names)


def write_report(
    output: Path,
    figures: Mapping[str, Any],
    rows: Sequence[tuple[str, Tensor]],
    scale_rows: Sequence[tuple[str, Tensor]],
) -> list[Path]:
    """Write `report.md` and its images; return the images.

    Args:
        figures: see `keygrip.evaluation.image_text.run_suite`. rows, scale_rows: titles and images
            [N, 3, H, W] in 0..1.
    """
    output.mkdir(parents=True, exist_ok=True)
    images = []
    for name, image_rows in ((SAMPLES, rows), (SCALES, scale_rows)):
        if image_rows:
            write_bytes(output / name, png(image_grid(image_rows)))
            images.append(output / name)
    if figures["scales"] and "colour_as_asked" in figures["scales"][0]:
        write_bytes(output / SCALE_MAP, scale_map(figures["scales"]))
        images.append(output / SCALE_MAP)
    if any(figures[name] for name in ("scales", "word_scales", "steps")):
        write_bytes(output / CURVES, curves(figures))
        images.append(output / CURVES)
    write_text(output / REPORT, markdown(figures, [path.name for path in images]))
    return images


def markdown(figures: Mapping[str, Any], images: Sequence[str]) -> str:
    """Return the report's text."""
    sampling = ", ".join(f"{name} {value}" for name, value in figures["sampling"].items())
    lines = [f"# Images of the {figures['split']} split", ""]
    wrong = shortcomings(figures["cases"], figures["split"])
    lines += ["What is wrong, first:" if wrong else "No figure is outside of its limit.", ""]
    lines += [*(f"- {line}" for line in wrong), *([""] if wrong else [])]
    lines += [f"Sampling: {sampling}; drawn in {figures['drawn_in']}.", ""]
    if "features" in figures:
        anchor = (
            "These training images may be among the real ones that sets are compared with: the column `real` is no "
            "anchor of the distances, which tell only how these sets of images differ from each other."
            if figures["split"] == "train"
            else "The column `real` says how far real held-out images are from the same real training images."
        )
        lines += [
            f"Sets are compared in the features of: {figures['features']['name']} (SHA-256 "
            f"{figures['features']['sha256'][:16]}). {anchor}",
            "",
        ]
    if figures.get("words_note"):
        lines += [f"{figures['words_note']}.", ""]
    if figures.get("real_note"):
        lines += [figures["real_note"], ""]
    classifier = figures["classifier"]
    if classifier is not None:
        lines += [
            f"Places and colours come from a small network trained on real images. On {classifier['images']} "
            f"held-out real ones (validation split) its mean error is {classifier['cube_px']:.2f} px for the cube and "
            f"{classifier['block_px']:.2f} px for the block; {classifier['near']:.1%} of the cubes are within 4 px and "
            f"{classifier['colour']:.1%} of the colours are named correctly. Its error on the images of this report is "
            "in the column `real`. Pixels are those of an image whose shorter side has 64.",
            "",
        ]
    if figures["lpips_note"]:
        lines += [figures["lpips_note"], ""]
    if SAMPLES in images:
        lines += ["## Samples", "", f"![samples]({SAMPLES})", ""]
    lines += ["## Figures", "", *table(figures["cases"]), ""]
    lines += [f"- `{case}`: {describe_column(case)}" for case in figures["cases"]]
    measured = {name for row in (*figures["cases"].values(), *figures["scales"]) for name in row}
    lines += ["", "In the tables:", "", *(f"- `{name}`: {why}" for name, why in FIGURES.items() if name in measured)]
    if figures["scales"]:
        lines += ["", "## Words against features", "", "The same images over the two guidance scales.", ""]
        lines += [f"![{name}]({name})" for name in (SCALE_MAP, SCALES) if name in images]
        named = {f"text {row['text_scale']:g}, DINO {row['dino_scale']:g}": row for row in figures["scales"]}
        rows = {
            name: {k: v for k, v in row.items() if k not in ("text_scale", "dino_scale")} for name, row in named.items()
        }
        lines += ["", *table({"real images": figures["real_scales"], **rows})]
        pareto_front = best_pair(figures["scales"], SCALES_PARETO)
        if pareto_front is not None:
            pair, front = pareto_front
            names = " and ".join(name.lstrip("-") for name in pair)
            of_best = f" of those with the best {' and '.join(SHARES_PARETO)}" if pair == QUALITY else ""
            best = "; ".join(list(named)[index] for index in front)
            lines += ["", f"No pair of scales{of_best} is better in both {names} than: {best}."]
    if figures["word_scales"]:
        lines += ["", "## Words alone over the text scale", ""]
        named = {f"text {row['text_scale']:g}": row for row in figures["word_scales"]}
        rows = {name: {k: v for k, v in row.items() if k != "text_scale"} for name, row in named.items()}
        lines += table({"real images": figures["real_grid"], **rows})
        pareto_front = best_pair(figures["word_scales"], WORDS_PARETO)
        if pareto_front is not None:
            names = " and ".join(name.lstrip("-") for name in pareto_front[0])
            best = "; ".join(list(named)[index] for index in pareto_front[1])
            lines += ["", f"No text scale is better in both {names} than: {best}."]
    if figures["steps"]:
        lines += ["", "## Quality against steps", "", "Evaluations of the network and seconds are per image.", ""]
        rows = {
            f"{row['case']}, {row['steps']} step{'s' * (row['steps'] > 1)}": {
                k: v for k, v in row.items() if k not in ("case", "steps")
            }
            for row in figures["steps"]
        }
        lines += table({"real images": figures["real_grid"], **rows})
    if CURVES in images:
        lines += ["", f"![{CURVES}]({CURVES})"]
    return "\n".join(lines) + "\n"


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a Markdown table: one column per row of figures, one line per figure that any row has, to fit a page."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(rows) + " |", "| --- |" + " --- |" * len(rows)]
    for name in names:
        cells = (f"{row[name]:.4g}" if name in row else "" for row in rows.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def png(image: np.ndarray) -> bytes:
    """Encode [H, W, 3] uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def scale_map(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Plot two maps over (text_scale, dino_scale): colours as requested, and cubes at the requested position."""
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


def curves(figures: Mapping[str, Any]) -> bytes:
    """Return three plots: the traded-off figures over the guidance scales, with their Pareto front; the same for images
    from text only; and the Frechet distance against the network evaluations per image, by case, together with that of
    real images."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    steps, real = figures["steps"], figures["real_grid"]
    for axes, rows, pairs, scales, title in (
        (left, figures["scales"], SCALES_PARETO, ("text_scale", "dino_scale"), "guidance scales (text, DINO)"),
        (middle, figures["word_scales"], WORDS_PARETO, ("text_scale",), "words alone, text scales"),
    ):
        pareto_front = best_pair(rows, pairs)
        if pareto_front is None:
            axes.set_axis_off()
            continue
        x, y = (name.lstrip("-") for name in pareto_front[0])
        axes.scatter([row[x] for row in rows], [row[y] for row in rows], s=18, color="tab:grey")
        front = sorted((rows[index] for index in pareto_front[1]), key=lambda row: float(row[x]))
        axes.plot([row[x] for row in front], [row[y] for row in front], "o-", color="tab:blue", label="Pareto front")
        for row in rows:
            axes.annotate(", ".join(f"{row[scale]:g}" for scale in scales), (row[x], row[y]), fontsize=7)
        axes.set(xlabel=AXES[x], ylabel=AXES[y], title=title)
        axes.legend()
    step_rows = [row for row in steps if "frechet" in row]
    for case in dict.fromkeys(row["case"] for row in step_rows):
        rows = sorted((row for row in step_rows if row["case"] == case), key=lambda row: float(row["evaluations"]))
        (line,) = right.plot([r["evaluations"] for r in rows], [r["frechet"] for r in rows], "o--", alpha=0.5)
        front = [rows[index] for index in pareto(rows, STEPS_PARETO)]
        label = case.replace("_", " ")
        right.plot(
            [r["evaluations"] for r in front], [r["frechet"] for r in front], "o-", color=line.get_color(), label=label
        )
        for row in rows:
            right.annotate(f"{row['steps']}", (row["evaluations"], row["frechet"]), fontsize=7)
    if step_rows:
        if "frechet" in real:
            right.axhline(real["frechet"], color="black", linestyle=":", label="real images")
        right.set(xlabel="evaluations per image", ylabel=AXES["frechet"], xscale="log", yscale="log", title="steps")
        right.legend()
    else:
        right.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

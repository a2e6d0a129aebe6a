"""The validation suite of the patch-conditioned DiT: how well text and reference images are each followed.

Cases, each on the same held-out images and seeds:

- `reconstruction`: an image's own text and DINO features.
- `dino_swap`: an image's text with another one's features: the layout should follow the features.
- `text_only`: no features.
- `changed_words`: its own features, and a caption in which a word was changed (the cube's colour).
- `shuffled_patches`: as `reconstruction`, with the patches in random order.
- `scales`: `changed_words` over a grid of guidance scales, which shows the trade-off between text and features; if no
  words can be changed, `reconstruction`. Also `text_only` over the text scales.
- `steps`: `reconstruction` and `text_only` over numbers of steps, with the evaluations and seconds per image.

Each figure is reported with two anchors: `real`, the held-out images themselves compared with other real ones, and
`unrelated_image`, an unrelated real image in place of the requested one. A case that applies to some images only
(`changed_words` if few captions hold a word) has its own anchor, `real_of_changed_words`: the real images of these
only. Sets of images are compared in the features of a frozen encoder that no model was trained with (`features`).

If a CLIP is given (`clip`, or `features.kind=clip`), the images of every case are compared with the text that they
were generated from. `real` then compares a real image with its own caption, `unrelated_image` with the caption of
another image.

Single images are compared with the real images in the shards. If the shards store none, they are compared with the
decoded latents, and the report states this. LPIPS needs weights that are not part of any package. If they are not
available, the report states this, and two other distances are reported instead, under their own names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from keygrip.evaluation.attribute_classifier import classifier_for, has_truth
from keygrip.evaluation.image_captions import ClipSimilarity, change_note
from keygrip.evaluation.image_cases import (
    DECODED,
    REAL,
    UNRELATED,
    ImageSuite,
    Suite,
    refuse_empty,
    refuse_impossible,
)
from keygrip.evaluation.image_curves import Curves
from keygrip.evaluation.image_features import FeatureOptions
from keygrip.evaluation.image_report import write_report
from keygrip.evaluation.kinds import KINDS, Evaluated, changed, plain
from keygrip.evaluation.known_features import known_encoder

if TYPE_CHECKING:
    from keygrip.data.image_text.datamodule import ImageShards
    from keygrip.models.patch_dit.module import PatchDiTModule

log = logging.getLogger(__name__)

DECODED_NOTE = (
    "The shards keep no images: `real` stands for what the autoencoder makes of them, and its own blur and grain are "
    "in no figure (`keygrip prepare step=images keep_images=true` keeps them)."
)


def check_suite(module: PatchDiTModule, data: ImageShards, options: ImageSuite) -> None:
    """Refuse a suite that cannot be run on a model, also before the model is trained. Nothing is generated or trained.

    Args:
        module: with or without trained weights. data: set up.

    Raises:
        ValueError: A case or a setting does not fit the model or the data, or weights belong to another network.
        FileNotFoundError: `clip` or the weights of the features do not exist.
    """
    # a guide is taken during training: until then it is not known whether guide_scale has an effect
    sampling_with = module.sampling_with if module.guide is None else module.sampling.changed
    refuse_impossible(module, options, sampling_with(options.sampling), has_truth(data, options.split, options.counts))
    # loaded, and released at once
    if options.features.kind != "trained":
        known_encoder(options.features.kind, Path(str(options.features.weights)), options.features.variant)
    if (folder := options.clip or (options.features.weights if options.features.kind == "clip" else None)) is not None:
        ClipSimilarity(folder)


def run_suite(
    module: PatchDiTModule, data: ImageShards, options: ImageSuite, output: Path
) -> tuple[dict[str, Any], list[Path]]:
    """Run the suite and write `report.md` and its images into a folder.

    Args:
        module: with trained weights, on its device. data: its shards, created if they are missing.

    Returns:
        the figures: `cases`, `scales`, `word_scales`, `steps`, `real_scales` (the anchor of `scales`), `real_grid`
            (the anchor of the other two, of all `grid_images`), `words_note` (in how many captions a word could be
            changed), `classifier` (its own error), `clip`, `lpips_note`, `sampling`, `drawn_in` (the precision of
            sampling, named as in `strategy.precision`); and the image files.

    Raises:
        FileNotFoundError: There are no shards. ValueError: The split has no image, or a case cannot be evaluated.
    """
    data.prepare_data()
    data.setup()
    refuse_empty(data, options.split)
    if data.fingerprint != module.statistics.fingerprint:
        log.warning(
            "%s holds other training images than those that the model was trained on (%s, %s)",
            data.place,
            data.fingerprint,
            module.statistics.fingerprint,
        )
    module.eval()
    classifier = classifier_for(data, module.ready_encoders(), options.classifier, options.split, options.counts)
    suite = Suite(module, data, classifier, options)
    case_names = suite.cases()
    cases = suite.evaluate()
    curves = Curves(suite)
    table, scale_rows = curves.scales() if "scales" in case_names else ([], [])
    if "scales" in case_names and not table:
        suite.without_images("scales")
    word_scales = curves.word_scales() if "scales" in case_names else []
    steps = curves.steps() if "steps" in case_names else []
    real_grid = curves.real("text_only") if word_scales or steps else {}
    counts = [("changed_words", cases["changed_words"], cases[REAL])] if "changed_words" in cases else []
    counts += [("scales", table[0], real_grid)] if table and suite.scaled_case == "changed_words" else []
    notes = [
        change_note(case, case_figures["images"], all_figures["images"], options.words)
        for case, case_figures, all_figures in counts
    ]
    words_note = "; ".join(note for note in notes if note)
    if words_note:
        log.info("%s", words_note)
    figures: dict[str, Any] = {
        "split": options.split,
        "cases": cases,
        "scales": table,
        "word_scales": word_scales,
        "steps": steps,
        "real_scales": curves.real(suite.scaled_case) if table else {},
        "real_grid": real_grid,
        "words_note": words_note,
        "classifier": None if classifier is None else vars(classifier.error) | {"fingerprint": classifier.fingerprint},
        "features": {"name": suite.features.name, "sha256": suite.features.sha256},
        "lpips_note": suite.distances.note,
        "real_note": "" if suite.encoders.exact or DECODED in cases else DECODED_NOTE,
        "sampling": asdict(suite.sampling) | {"interval": list(suite.sampling.interval)},
        "drawn_in": suite.precision,
        "clip": None if suite.clip is None else {"name": suite.clip.name, "sha256": suite.clip.sha256},
    }
    return figures, write_report(output, figures, suite.samples.rows, scale_rows)


def headline(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics used to compare models, each under one name."""
    metric_names = {
        "reconstruction": (
            *("psnr_db", "ssim", "lpips", "classifier_distance", "dino_distance", "cube_within_4px"),
            *("frechet", "cmmd", "precision", "recall", "grain", "colour_as_asked", "objects_as_named"),
            "clip_similarity",
        ),
        REAL: ("frechet", "cmmd", "precision", "recall", "grain", "objects_as_named", "clip_similarity"),
        UNRELATED: ("ssim", "psnr_db", "clip_similarity"),
        "shuffled_patches": ("psnr_db", "cube_within_4px"),
        "dino_swap": ("cube_within_4px",),
        "changed_words": ("colour_as_asked", "cube_within_4px", "clip_similarity"),
        "text_only": (
            *("objects_as_named", "colour_as_asked", "side_as_asked", "frechet", "cmmd", "precision", "recall"),
            *("grain", "ssim", "clip_similarity"),
        ),
    }
    metrics = {
        f"{case}/{name}": figures["cases"][case][name]
        for case, names in metric_names.items()
        for name in names
        if name in figures["cases"].get(case, {})
    }
    if figures["classifier"] is not None:
        metrics["classifier/cube_px"] = figures["cases"][REAL]["cube_px"]
    return metrics


def evaluate_images(evaluated: Evaluated, cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a patch-conditioned DiT for `python -m keygrip.evaluate`."""
    settings = {name: plain(cfg[name]) for name in KINDS["image_text"].settings()}
    changes = settings.pop("data")
    features = changed(FeatureOptions(), settings.pop("features"), "features")
    # the words directly, since the suite explains how a number is written as a word
    options = changed(ImageSuite(features=features, replace_words=settings.pop("replace_words")), settings, "")
    options.refuse_idle_grid()
    data = evaluated.stored_data(changes)
    evaluated.module.to("cuda" if torch.cuda.is_available() else "cpu")
    figures, _ = run_suite(evaluated.module, data, options, evaluated.output)  # type: ignore[arg-type]
    return figures

"""The cases of the image suite: conditions, generated images, and how well the images match the conditions."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keygrip.data.batches import ImageTextBatch
from keygrip.evaluation.attribute_classifier import (
    NEAR_PX,
    ClassifierOptions,
    TrainedClassifier,
    Verdict,
    distance_px,
    objects_as_named,
)
from keygrip.evaluation.image_captions import ClipSimilarity, change_caption, word_changes
from keygrip.evaluation.image_distances import Distances
from keygrip.evaluation.image_features import FeatureEncoder, FeatureOptions, feature_encoder, training_batches
from keygrip.evaluation.image_samples import SampleRow, Samples
from keygrip.evaluation.image_statistics import grain, real_figures, set_figures, summarise
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.idle_guidance import NOT_OF_WORDS, GivenConditions, changes_nothing, refuse_idle_guidance
from keygrip.models.patch_dit.sampler import NOT_FINITE, Sampling
from keygrip.progress import Progress
from keygrip.training.strategies import SHORT, named_precision

if TYPE_CHECKING:
    from keygrip.data.image_text.datamodule import ImageShards
    from keygrip.models.patch_dit.module import PatchDiTModule

log = logging.getLogger(__name__)

CURVES = ("scales", "steps")  # evaluated on fewer images, for each of several settings
CASES = ("reconstruction", "dino_swap", "text_only", "changed_words", "shuffled_patches", *CURVES)
PAIRED = 8  # minimum batch size, because images of a batch are paired, also for runs trained on single images
SIDE_MARGIN = 0.05  # fraction of the width; if objects are closer, left and right are not evaluated
CHANGED_NONE = "no caption holds a word to change (replace_words, or the colour in the image's evidence)"
# Why a case may not apply to any image.
UNASKED = {
    "dino_swap": "no batch holds two of one bucket: raise images or batch_size",
    "changed_words": CHANGED_NONE,
    "scales": CHANGED_NONE,
}
# Settings that only some cases use.
NEEDS = {
    "text_scales": ("scales",),
    "dino_scales": ("scales",),
    "step_counts": ("steps",),
    "replace_words": ("changed_words", "scales"),
}
# Parts of `sampling` that a case does not use, because it varies them itself or generates from text only.
UNREAD = {"scales": ("text_scale", "dino_scale"), "steps": ("steps",), "text_only": NOT_OF_WORDS}
UNRELATED, REAL, DECODED = "unrelated_image", "real", "autoencoder"


def real_of(case: str) -> str:
    """Return the name of the anchor of a case that applies to some images only: the real images among these."""
    return f"{REAL}_of_{case}"


@dataclass(frozen=True)
class ImageSuite:
    """What is evaluated.

    Args:
        cases: of `CASES`; None: all that the model and the data allow.
        split: of the run's data. images: number of its images, spread evenly over its buckets.
        batch_size: images generated at once, of one bucket; `dino_swap` and the anchor `unrelated_image` pair the
            images of a batch. None: that of the run's training, but at least 8.
        text_scales, dino_scales: of the case `scales`. step_counts: of the case `steps`. grid_images: images for each
            pair of scales and each number of steps.
        sampling: changes to the model's own sampling, by name: {"steps": 50}; None keeps the model's own value.
        precision: of sampling: "32-true", "bf16-mixed"; "auto": that of `keygrip sample` on this machine.
        lpips: "auto": if its weights are available; "none".
        replace_words: for `changed_words` on captions of any kind: {word: other word}, or pairs [[word, other word]],
            in which a word may be a number. Without it the cube's colour is changed, if the data contain it.
        shown: images in each row of the report.
        classifier: how a classifier is trained if there is none yet.
        features: features in which sets of images are compared with real ones.
        clip: a folder of CLIP, which compares images with their captions; None: that of `features`, if its kind is
            clip, and otherwise no comparison.

    Raises:
        ValueError: A case is unknown, a number is below 1, a word to replace is invalid, or none of `cases` uses a
            setting.
    """

    cases: Sequence[str] | None = None
    split: str = "test"
    images: int = 128
    batch_size: int | None = None
    text_scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    dino_scales: Sequence[float] = (0.0, 1.0, 2.0, 4.0)
    step_counts: Sequence[int] = (4, 8, 16, 32)
    grid_images: int = 32
    sampling: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    lpips: str = "auto"
    replace_words: Mapping[str, str] | Sequence[Sequence[str]] | None = None
    shown: int = 8
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    clip: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cases, str):
            raise ValueError(f"cases={self.cases}: give a list, cases=[{self.cases}]")
        unknown = [case for case in self.cases or () if case not in CASES]
        if unknown:
            raise ValueError(f"cases={unknown}: choose of {', '.join(CASES)}")
        if self.cases is not None and not self.cases:
            raise ValueError(f"cases=[]: choose of {', '.join(CASES)}; null: all")
        if not self.text_scales or not self.dino_scales or not self.step_counts:
            raise ValueError("text_scales, dino_scales and step_counts must not be empty: leave the case out in cases")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: at least 2, since images of a batch are paired")
        if min(self.images, self.grid_images, self.shown, *self.step_counts) < 1:
            raise ValueError("images, grid_images, shown and step_counts must be at least 1")
        if self.lpips not in ("auto", "none"):
            raise ValueError(f"lpips={self.lpips!r}: choose auto or none")
        if SHORT.get(str(self.precision), self.precision) not in ("auto", "32-true", "bf16-mixed"):
            raise ValueError(f"precision={self.precision!r}: choose auto or 32-true or bf16-mixed")
        if self.split not in ("train", "val", "test"):
            raise ValueError(f"split={self.split!r}: choose val or test (or train, to see what was memorised)")
        word_changes(self.replace_words)
        self._refuse_idle()

    @property
    def words(self) -> dict[str, str]:
        """`replace_words` by word; empty: colours are changed."""
        return word_changes(self.replace_words)

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of images that the cases read; the curves choose their own."""
        curves = self.cases is None or not set(CURVES).isdisjoint(self.cases)
        return (self.images, self.grid_images) if curves else (self.images,)

    def refuse_idle_grid(self) -> None:
        """Raise ValueError if `grid_images` is given and no case reads it. Not a part of `__post_init__`: recipes set
        it, and their cases may be changed."""
        if self.grid_images != ImageSuite.grid_images and len(self.counts) == 1:
            raise ValueError(f"grid_images has no effect without the case {' or '.join(CURVES)} in cases: leave it out")

    def _refuse_idle(self) -> None:
        """Raise ValueError if a setting has no effect because its case is left out."""
        for name, needed in NEEDS.items():
            default: Any = ImageSuite.__dataclass_fields__[name].default
            setting = list(getattr(self, name) or ())
            if self.cases is None or set(needed) & set(self.cases) or setting == list(default or ()):
                continue
            raise ValueError(f"{name} has no effect without the case {' or '.join(needed)} in cases: leave it out")
        for name in [name for name, value in self.sampling.items() if not changes_nothing(name, value)]:
            if self.cases and all(name in UNREAD.get(case, ()) for case in self.cases):
                raise ValueError(f"sampling.{name} has no effect with cases={list(self.cases)} alone: leave it out")


@dataclass(frozen=True)
class AskedConditions:
    """Conditions that some images were generated from.

    Args:
        conditions: normalised. target: [B, 3, H, W] the real images to compare with.
        records: whose layout is requested, B of them. colours: of the cube, in the text.
        describes_sides: whether the text also contains the cube's side.
        seeds: B seeds of the sampled images; an image of the data has the same seed in every case.
        rows: B positions of the images in their batch.
    """

    conditions: Conditions
    target: Tensor
    records: list[dict[str, Any]]
    seeds: list[int]
    rows: list[int]
    colours: list[str] | None
    captions: list[str]
    describes_sides: bool = True


def possible_cases(module: PatchDiTModule, options: ImageSuite, sampling: Sampling, classified: bool) -> list[str]:
    """Return the cases that can be evaluated; see `refuse_impossible`.

    Raises:
        ValueError: A case was requested that cannot be evaluated.
    """
    cannot = {}
    if not module.network.use_dino_patches:
        cannot["shuffled_patches"] = "the network has no patches"
    if not options.replace_words and not classified:
        cannot["changed_words"] = "the captions' words to change are not known: give replace_words={word: other word}"
    if sampling.guidance == "none":
        cannot["scales"] = "the model is drawn without guidance (sampling.guidance=none), and scales have no effect"
    if module.few_steps is not None:
        cannot["steps"] = f"the model is a student that is drawn in {sampling.steps} steps alone"
    if options.cases is None:
        return [case for case in CASES if case not in cannot]
    for case in options.cases:
        if case in cannot:
            raise ValueError(f"the case {case} cannot be evaluated: {cannot[case]}")
    return list(options.cases)


def refuse_impossible(module: PatchDiTModule, options: ImageSuite, sampling: Sampling, classified: bool) -> None:
    """Raise ValueError, before anything is generated, if a case or a way of sampling is impossible or without effect.

    Args:
        module: the model; its weights have no influence. options: what is evaluated. sampling: the model's, with the
            changes of `options`. classified: the data hold ground truth, so that there is a classifier.
    """
    for text in options.text_scales:
        for dino in options.dino_scales:
            sampling.replaced(text_scale=float(text), dino_scale=float(dino))
    for steps in options.step_counts:
        replace(sampling, steps=int(steps))
    cases = possible_cases(module, options, sampling, classified)
    sampling_names = {name for name, value in options.sampling.items() if value is not None}
    if "steps" in cases and max(options.step_counts) > 1:
        sampling_names.discard("solver")  # the curve of steps uses it, even if the other cases take one step
    if not sampling_names:
        return
    images = cases != ["text_only"]
    try:
        refuse_idle_guidance(module, sampling_names, sampling, GivenConditions(True, images, both=images))
    except ValueError as error:
        raise ValueError(f"sampling, with cases={cases}: {error}") from error


class Suite:
    """Evaluate one model on one set of shards.

    Args:
        module: a trained model. data: set up. classifier: of the data; None: the data hold no ground truth.
    """

    def __init__(
        self, module: PatchDiTModule, data: ImageShards, classifier: TrainedClassifier | None, options: ImageSuite
    ) -> None:
        self.module, self.data, self.classifier, self.options = module, data, classifier, options
        self.encoders = module.ready_encoders()
        self.sampling = module.sampling_with(options.sampling)
        self.precision = named_precision(module.device.type, options.precision)
        self.distances = Distances(self.encoders, classifier, options.lpips)
        folder = options.clip or (options.features.weights if options.features.kind == "clip" else None)
        self.clip = None if folder is None else ClipSimilarity(folder)
        self.colours = [] if classifier is None else classifier.network.colours
        refuse_impossible(module, options, self.sampling, classifier is not None)
        self.samples = Samples(options.shown)  # of one batch, by case

    @cached_property
    def features(self) -> FeatureEncoder:
        """The encoder in whose features sets of images are compared; trained at first access if it is missing."""
        return feature_encoder(self.data, self.encoders, self.options.features)

    def cases(self) -> list[str]:
        """Return the cases that can be evaluated here.

        Raises:
            ValueError: A case was requested that cannot be evaluated.
        """
        return possible_cases(self.module, self.options, self.sampling, self.classifier is not None)

    def batches(self, limit: int) -> Iterator[tuple[ImageTextBatch, Tensor, list[int]]]:
        """Yield held-out batches on the model's device, their real images, and the numbers of their images, which
        seeds and changed colours depend on: an image has the same ones whatever the limit and the batches' size."""
        empty, size = True, self.options.batch_size or max(self.data.batch_size, PAIRED)
        for batch in self.data.held_out(self.options.split, limit, with_images=True, batch_size=size):
            batch = batch.to(self.module.device)
            real = self.encoders.decode_latents(batch.latents) if batch.images is None else batch.images / 255
            yield batch, real, batch.numbers
            empty = False
        if empty:
            refuse_empty(self.data, self.options.split)

    # ------------------------------------------------------------------------------------------------------------ cases

    def ask(self, case: str, batch: ImageTextBatch, real: Tensor, numbers: Sequence[int]) -> AskedConditions | None:
        """Return the conditions of a case for a batch; None if it applies to none of its images."""
        conditions = self.module.statistics.conditions(batch)
        colours = [r["evidence"]["colour"] for r in batch.records] if self.classifier is not None else None
        seeds, rows = list(numbers), list(range(len(batch)))
        asked = AskedConditions(conditions, real, batch.records, seeds, rows, colours, list(batch.captions))
        if case == "reconstruction":
            return asked
        if case == "text_only":
            return replace(asked, conditions=conditions.without_dino())
        if case == "dino_swap":
            if len(batch) < 2:
                return None
            partners = torch.arange(len(batch)).roll(-1)
            records = [batch.records[i] for i in partners.tolist()]
            target = real[partners.to(real.device)]
            return replace(
                asked,
                conditions=conditions.with_dino_of(partners),
                target=target,
                records=records,
                describes_sides=False,
            )
        if case == "shuffled_patches":
            assert conditions.patches is not None
            patches, count = conditions.patches, conditions.patches.shape[1]
            orders = [torch.randperm(count, generator=torch.Generator().manual_seed(number)) for number in numbers]
            index = torch.stack(orders).to(patches.device)[..., None].expand_as(patches)
            return replace(asked, conditions=replace(conditions, patches=patches.gather(1, index)))
        return self._change_captions(asked)

    def _change_captions(self, asked: AskedConditions) -> AskedConditions | None:
        words = self.options.words
        all_changes = [
            change_caption(caption, record, number, self.colours, words)
            for caption, record, number in zip(asked.captions, asked.records, asked.seeds, strict=True)
        ]
        changed_rows = [i for i, change in enumerate(all_changes) if change is not None]
        if not changed_rows:
            return None
        changes = [change for change in all_changes if change is not None]
        captions = [caption for caption, _ in changes]
        states, mask = self.encoders.encode_text(captions)
        index = torch.tensor(changed_rows, device=asked.target.device)
        original = asked.conditions
        assert original.cls is not None
        patches = None if original.patches is None else original.patches[index]
        conditions = Conditions(
            states.to(original.cls), mask.to(original.cls.device), original.cls[index], patches, original.patch_grid
        )
        colours = [str(colour) for _, colour in changes] if not words and self.classifier is not None else None
        records, seeds = [asked.records[i] for i in changed_rows], [asked.seeds[i] for i in changed_rows]
        return AskedConditions(
            conditions, asked.target[index], records, seeds, changed_rows, colours, captions, describes_sides=not words
        )

    def draw(self, asked: AskedConditions, size: tuple[int, int], sampling: Sampling | None = None) -> Tensor:
        """Generate images [B, 3, H, W] in 0..1, in the suite's precision."""
        with torch.autocast(self.module.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            drawn = self.module.draw(asked.conditions, size, asked.seeds, sampling or self.sampling)
        if not bool(torch.isfinite(drawn).all()):
            raise ValueError(NOT_FINITE)
        return drawn

    # ---------------------------------------------------------------------------------------------------------- figures

    @torch.no_grad()
    def measure(self, drawn: Tensor, asked: AskedConditions) -> dict[str, Tensor]:
        """Return the figures of each image, by name, [B] each (fewer if a figure does not apply to all images)."""
        figures = self.distances(drawn, asked.target) | {"grain": grain(drawn)}
        if self.clip is not None:
            figures["clip_similarity"] = self.clip(drawn, asked.captions)
        if self.classifier is not None:
            figures |= self._measure_objects(self.classifier.network.to(drawn.device)(drawn), asked, drawn)
        return {name: values.float().cpu() for name, values in figures.items()}

    def _measure_objects(self, verdict: Verdict, asked: AskedConditions, drawn: Tensor) -> dict[str, Tensor]:
        evidence = [record["evidence"] for record in asked.records]
        truth = torch.tensor([[e["cube"], e["block"]] for e in evidence], device=drawn.device)
        distance = distance_px(verdict.places, truth, (drawn.shape[2], drawn.shape[3]))
        colours = verdict.colours.argmax(dim=1).cpu()
        figures = {
            "cube_px": distance[:, 0],
            "block_px": distance[:, 1],
            "cube_within_4px": distance[:, 0] < NEAR_PX,
            "block_within_4px": distance[:, 1] < NEAR_PX,
            "colour_of_reference": colours == torch.tensor([self.colours.index(e["colour"]) for e in evidence]),
        }
        if asked.colours is not None:
            asked_for = torch.tensor([self.colours.index(colour) for colour in asked.colours])
            figures["objects_as_named"] = objects_as_named(verdict.objects, asked_for)
            figures["colour_as_asked"] = colours == asked_for
        true_side = (truth[:, 0, 0] - truth[:, 1, 0]).cpu()
        clear = true_side.abs() > SIDE_MARGIN
        side = (verdict.places[:, 0, 0] - verdict.places[:, 1, 0]).cpu()
        figures["side_as_asked" if asked.describes_sides else "side_of_reference"] = (side.sign() == true_side.sign())[
            clear
        ]
        return figures

    def evaluate(self) -> dict[str, Any]:
        """Return the figures by case, and for a case that applies to some images only also those of its real images.
        Fills `samples` with images."""
        cases = self.cases()
        values: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        sets: dict[str, list[Tensor]] = defaultdict(list)
        drawn_of: dict[str, list[int]] = defaultdict(list)  # by case, positions of its images among the real ones
        done = 0
        total = min(self.options.images, len(self.data.samples(self.options.split)))
        with Progress(total=total, desc="evaluate", unit="image") as bar:
            for batch, real, numbers in self.batches(self.options.images):
                size = (batch.latents.shape[2], batch.latents.shape[3])
                rows = [SampleRow("real", range(len(batch)), real)]
                for name, asked, drawn in self._references(batch, real, numbers):
                    found = self.measure(drawn, asked)
                    if name == REAL:  # an image's distance to itself is not informative
                        found = {figure: value for figure, value in found.items() if figure not in self.distances.names}
                    self._add(values[name], found)
                    if name in (REAL, DECODED):
                        sets[name].append(self.features.features(drawn).float().cpu())
                for case in cases:
                    if case in CURVES:
                        continue
                    asked_of = self.ask(case, batch, real, numbers)
                    if asked_of is None:
                        continue
                    drawn = self.draw(asked_of, size)
                    self._add(values[case], self.measure(drawn, asked_of))
                    sets[case].append(self.features.features(drawn).float().cpu())
                    drawn_of[case] += [done + row for row in asked_of.rows]
                    rows.append(self._row(case, asked_of, drawn))
                done += len(batch)
                self.samples.offer(len(batch), rows)
                bar.update(len(batch))
        for case in cases:
            if case not in values and case not in CURVES:
                self.without_images(case)
        features, grains = torch.cat(sets[REAL]), torch.cat(values[REAL]["grain"])
        figures: dict[str, Any] = {}
        for case, measured in values.items():
            of_set = set_figures(torch.cat(sets[case]), self.reference) if case in sets else {}
            figures[case] = summarise(measured) | of_set
            if 0 < len(drawn_of[case]) < len(features):  # figures of sets depend on the number of images
                indices = torch.tensor(drawn_of[case])
                figures[real_of(case)] = real_figures(features[indices], grains[indices], self.reference)
        return figures

    def without_images(self, case: str) -> None:
        """Log that a case applies to none of the images. Raises ValueError if it was requested by name."""
        reason = f"the case {case} applies to none of the images: {UNASKED.get(case, 'they lack what it asks for')}"
        if self.options.cases is not None:
            raise ValueError(reason)
        log.warning(reason)

    @cached_property
    @torch.no_grad()
    def reference(self) -> Tensor:
        """Features [N, F] of real training images, with which all sets are compared, real held-out images too."""
        features, device = self.features.features, self.module.device
        batches = training_batches(self.data, self.encoders, self.options.features.reference_images)
        parts = (part for batch in batches for part in batch.split(64))
        return torch.cat([features(part.to(device).float() / 255).float().cpu() for part in parts])

    def _references(
        self, batch: ImageTextBatch, real: Tensor, numbers: Sequence[int]
    ) -> Iterator[tuple[str, AskedConditions, Tensor]]:
        """Yield real images in place of generated ones: another one of the set; each as reconstructed by the
        autoencoder, which no generated image can surpass; and each itself, which gives the classifier's own error and
        the distance between sets of real images."""
        asked = self.ask("reconstruction", batch, real, numbers)
        assert asked is not None
        if len(batch) > 1:
            yield UNRELATED, asked, real.roll(-1, dims=0)
        if batch.images is not None and not self.encoders.exact:
            yield DECODED, asked, self.encoders.decode_latents(batch.latents)
        yield REAL, asked, real

    @staticmethod
    def _add(values: dict[str, list[Tensor]], measured: dict[str, Tensor]) -> None:
        for name, numbers in measured.items():
            values[name].append(numbers)

    @staticmethod
    def _row(case: str, asked: AskedConditions, drawn: Tensor) -> SampleRow:
        title = case.replace("_", " ")
        if case == "dino_swap":
            title = f"{title}: own text, layout of the next image"
        return SampleRow(title, asked.rows, drawn, asked.colours if case == "changed_words" else None)

    @property
    def scaled_case(self) -> str:
        """The case that is generated for each pair of scales: reconstructions if no word can be changed."""
        return "changed_words" if self.options.words or self.classifier is not None else "reconstruction"


def refuse_empty(data: ImageShards, split: str) -> None:
    """Raise ValueError if a split of opened data holds no image; the message lists the splits that do."""
    if len(data.samples(split)):
        return
    counts = {name: len(data.samples(name)) for name in ("val", "test", "train")}
    alternatives = [f"split={name} ({count} images)" for name, count in counts.items() if count]
    raise ValueError(f"{data.place} has no {split} images: give {' or '.join(alternatives)}")

"""The validation suite: what each case asks for, what is measured, the report, the command and the callback."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dit_parts import SMALL, stir, write_flux
from image_sets import COLOURS, SQUARE, WIDE, small_encoders, write_images, write_tiny_clip
from omegaconf import OmegaConf
from PIL import Image

from keygrip.config import check_overrides, compose
from keygrip.data.image_text.datamodule import ImageShards
from keygrip.data.shards.sampling import SampleKey
from keygrip.evaluation import image_callback, image_features
from keygrip.evaluation import image_text as validation
from keygrip.evaluation.attribute_classifier import (
    ClassifierError,
    ClassifierOptions,
    TrainedClassifier,
    Verdict,
    classifier_for,
    real_images,
)
from keygrip.evaluation.image_callback import EvaluateImages
from keygrip.evaluation.image_captions import change_caption
from keygrip.evaluation.image_cases import CASES, AskedConditions, ImageSuite, Suite
from keygrip.evaluation.image_curves import Curves
from keygrip.evaluation.image_distances import LPIPS_FILE, Distances
from keygrip.evaluation.image_features import FeatureOptions, feature_encoder
from keygrip.evaluation.image_report import SCALES_PARETO, best_pair, scale_map, table
from keygrip.evaluation.image_samples import SampleRow, Samples
from keygrip.evaluation.image_statistics import grain, set_figures, summarise
from keygrip.evaluation.image_text import headline, run_suite
from keygrip.evaluation.kinds import Evaluated
from keygrip.inference.steered_images import SteeredImages
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.few_steps import FewSteps
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Sampling
from keygrip.models.patch_dit.text_encoders import T5Text
from keygrip.training import strategies
from keygrip.training.checkpoints import build_module

QUICK = ClassifierOptions(width=8, steps=2, batch_size=4)
FAST = FeatureOptions(width=8, steps=2, batch_size=4)
SETTINGS: dict[str, Any] = {"images": 6, "grid_images": 2, "shown": 4, "classifier": QUICK, "features": FAST}
SETTINGS |= {"batch_size": 4}
OF_CASES: dict[str, dict[str, Any]] = {
    "scales": {"text_scales": (1.0, 3.0), "dino_scales": (0.0, 2.0)},
    "steps": {"step_counts": (1, 2)},
}
# the encoders of image_sets, as overrides
ENCODERS = ["encoders.text.length=8", "encoders.text.width=8"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("validated"), {SQUARE: 8, WIDE: 4}, small_encoders())


def shards(root: Path) -> ImageShards:
    data = ImageShards(batch_size=4, root=root, num_workers=0)
    data.setup()
    return data


@cache
def config_with(*overrides: str) -> Any:
    return OmegaConf.to_container(compose("train", [*SMALL, *ENCODERS, *overrides]), resolve=True)


def module_for(data: ImageShards, *overrides: str) -> PatchDiTModule:
    module = build_module(config_with(*overrides))
    assert isinstance(module, PatchDiTModule)
    module.set_statistics(data.statistics)
    stir(module.network)
    return module.eval()


class Seer(torch.nn.Module):
    """Classifies by the colours of the generated images themselves: no training, almost no error."""

    colours = sorted(COLOURS)

    def forward(self, pictures: torch.Tensor) -> Verdict:
        tones = {"block": (40, 60, 220), **COLOURS}
        maps = {
            name: (pictures - torch.tensor(rgb).view(3, 1, 1) / 255).abs().sum(1).lt(0.25).float() + 1e-9
            for name, rgb in tones.items()
        }
        cube = sum(maps[name] for name in self.colours)
        assert isinstance(cube, torch.Tensor)

        def centre(weight: torch.Tensor) -> torch.Tensor:
            total = weight.sum(dim=(1, 2))
            rows, columns = ((torch.arange(n) + 0.5) / n for n in weight.shape[1:])
            return torch.stack([(weight.sum(1) * columns).sum(-1) / total, (weight.sum(2) * rows).sum(-1) / total], -1)

        places = torch.stack([centre(cube), centre(maps["block"])], dim=1)
        colours = torch.stack([maps[name].sum(dim=(1, 2)) for name in self.colours], dim=1)
        centres = [maps[name] for name in (*self.colours, "block")]
        return Verdict(places, colours, pictures, pictures[:, :2], torch.stack([_centre(m) for m in centres], dim=1))


def _centre(weight: torch.Tensor) -> torch.Tensor:
    """Return logits that peak at the centre of mass of a map, if the map shows more than a few pixels."""
    y, x = (torch.arange(n).float() for n in weight.shape[1:])
    total = weight.sum(dim=(1, 2), keepdim=True)
    row, column = ((weight * a).sum(dim=(1, 2), keepdim=True) / total for a in (y[:, None], x))
    slope = 1e-3 * (x + 2 * y[:, None])  # without it, a centre half-way between pixels would have several maxima
    return torch.where(total > 4, 5.0, -5.0) - ((y[:, None] - row) ** 2 + (x - column) ** 2) + slope


SEEN = TrainedClassifier(Seer(), ClassifierError(4, 0.1, 0.1, 1.0, 1.0, 1.0), "seer")  # type: ignore[arg-type]


def quick(**options: Any) -> ImageSuite:
    """Return a suite of few images and, for the requested cases, few settings."""
    asked = [settings for case, settings in OF_CASES.items() if case in (options.get("cases") or CASES)]
    return ImageSuite(**{name: v for part in (SETTINGS, *asked, options) for name, v in part.items()})


def suite_of(root: Path, classifier: TrainedClassifier | None = SEEN, **options: Any) -> Suite:
    data = shards(root)
    return Suite(module_for(data), data, classifier, quick(**options))


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_words_are_changed_to_another_colour_or_as_told() -> None:
    record = {"evidence": {"colour": "red"}}
    asked = [change_caption("a red cube", record, number, ["gold", "red", "teal"], {}) for number in range(2)]
    assert asked == [("a gold cube", "gold"), ("a teal cube", "teal")]
    assert change_caption("a cube", record, 0, ["gold", "red"], {}) is None
    assert change_caption("a red cube", {}, 0, ["gold", "red"], {}) is None
    assert change_caption("a dog runs", {}, 0, [], {"dog": "cat"}) == ("a cat runs", None)
    assert change_caption("a cow runs", {}, 0, [], {"dog": "cat"}) is None
    told = "A DOG,  the dog's hot-dog; Dog."
    assert change_caption(told, {}, 0, [], {"Dog": "cat"}) == ("A CAT,  the cat's hot-dog; Cat.", None)
    assert change_caption("Red: a cube", record, 0, ["gold", "red"], {}) == ("Gold: a cube", "gold")


def asked_of(suite: Suite, case: str) -> tuple[AskedConditions, Any, torch.Tensor]:
    batch, real, numbers = next(found for found in suite.batches(12) if len(found[0]) == 4)
    asked = suite.ask(case, batch, real, numbers)
    assert asked is not None
    return asked, batch, real


def test_each_case_asks_for_what_it_says(root: Path) -> None:
    suite = suite_of(root)
    own, batch, real = asked_of(suite, "reconstruction")
    assert torch.equal(own.target, real)
    assert torch.equal(own.conditions.text, batch.text_states)  # type: ignore[arg-type]
    alone, _, _ = asked_of(suite, "text_only")
    assert not alone.conditions.has_dino
    assert alone.conditions.has_text
    swapped, _, _ = asked_of(suite, "dino_swap")
    assert torch.equal(swapped.conditions.text, own.conditions.text)  # type: ignore[arg-type]
    assert torch.equal(swapped.conditions.patches[0], own.conditions.patches[1])  # type: ignore[index]
    assert torch.equal(swapped.target[0], real[1])
    assert swapped.records[0] == batch.records[1]
    assert swapped.colours == own.colours  # the caption keeps the colour
    changed, _, _ = asked_of(suite, "changed_words")
    assert torch.equal(changed.conditions.patches, own.conditions.patches)  # type: ignore[arg-type]
    assert not torch.equal(changed.conditions.text, own.conditions.text)  # type: ignore[arg-type]
    assert changed.colours is not None
    assert own.colours is not None
    assert all(a != b for a, b in zip(changed.colours, own.colours, strict=True))
    assert all(colour in caption for colour, caption in zip(changed.colours, changed.captions, strict=True))
    shuffled, _, _ = asked_of(suite, "shuffled_patches")
    left, right = own.conditions.patches, shuffled.conditions.patches
    assert left is not None
    assert right is not None
    assert not torch.equal(left, right)
    torch.testing.assert_close(left.sum(1), right.sum(1))  # the same patches
    assert torch.equal(shuffled.conditions.cls, own.conditions.cls)  # type: ignore[arg-type]


def test_an_image_has_the_same_seed_in_every_case_also_where_others_are_left_out(root: Path) -> None:
    batch, real, numbers = max(suite_of(root).batches(8), key=lambda each: len(each[0]))
    colour = batch.records[-1]["evidence"]["colour"]
    suite = suite_of(root, None, replace_words={colour: "teal"})
    own, changed = (suite.ask(case, batch, real, numbers) for case in ("reconstruction", "changed_words"))
    assert own is not None
    assert changed is not None
    assert own.seeds == numbers
    named = [i for i, caption in enumerate(batch.captions) if colour in caption.lower().split()]
    assert 0 < len(named) < len(own.seeds)
    assert changed.seeds == [own.seeds[i] for i in named]
    assert changed.rows == named


def test_an_image_is_asked_for_equally_in_batches_of_any_size(root: Path) -> None:
    """Its seed, its changed caption and the order of its patches are those of its number in the data."""

    def asked_by_key(size: int) -> dict[str, tuple[int, str, torch.Tensor]]:
        suite, found = suite_of(root, batch_size=size), {}
        for batch, real, numbers in suite.batches(12):
            changed, shuffled = (suite.ask(c, batch, real, numbers) for c in ("changed_words", "shuffled_patches"))
            assert changed is not None
            assert shuffled is not None
            assert changed.seeds == shuffled.seeds == batch.numbers
            assert changed.rows == list(range(len(batch)))
            assert shuffled.conditions.patches is not None
            parts = zip(changed.seeds, changed.captions, shuffled.conditions.patches, strict=True)
            found |= dict(zip(batch.keys, parts, strict=True))
        return found

    two, four = asked_by_key(2), asked_by_key(4)
    assert len(two) == 12
    samples = shards(root).samples("test", 12)
    numbers = {samples[SampleKey(number, 0)].key: number for number in range(12)}
    assert {key: seed for key, (seed, *_) in two.items()} == numbers
    for key, (seed, caption, patches) in four.items():
        assert (seed, caption) == two[key][:2]
        assert torch.equal(patches, two[key][2])


def test_an_image_is_asked_for_equally_among_any_number_of_images(root: Path) -> None:
    """Also in the curves, which read fewer images than the cases."""

    def seeds_by_key(limit: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for batch, real, numbers in suite.batches(limit):
            asked = suite.ask("reconstruction", batch, real, numbers)
            assert asked is not None
            found |= dict(zip(batch.keys, asked.seeds, strict=True))
        return found

    suite = suite_of(root)
    every, six = seeds_by_key(12), seeds_by_key(6)
    assert sorted(every.values()) == list(range(12))  # 8 square images, then 4 wide ones
    assert sorted(six.values()) == [0, 2, 5, 7, 8, 11]
    assert six == {key: every[key] for key in six}
    assert list(shards(root).samples("test", 1).numbers) == [0]  # a bucket without an image
    curves = Curves(suite_of(root, grid_images=6))._list_conditions("reconstruction")
    assert sorted(seed for asked, _ in curves for seed in asked.seeds) == sorted(six.values())


def test_the_number_of_an_image_is_the_same_in_each_of_several_processes(root: Path) -> None:
    def numbers(rank: int, ranks: int) -> dict[str, int]:
        data = shards(root)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks)  # type: ignore[assignment]
        return {key: n for batch in data.held_out("test") for key, n in zip(batch.keys, batch.numbers, strict=True)}

    alone, first, second = numbers(0, 1), numbers(0, 2), numbers(1, 2)
    assert sorted(alone.values()) == list(range(12))
    assert set(first).isdisjoint(second)
    assert first | second == alone


def test_figures_of_drawn_images_do_not_depend_on_the_size_of_batches(root: Path) -> None:
    data = shards(root)
    module, cases = module_for(data), ["changed_words", "shuffled_patches"]
    options = quick(cases=cases, precision="32-true", sampling={"steps": 2})
    two, four = (Suite(module, data, SEEN, replace(options, batch_size=size)).evaluate() for size in (2, 4))
    for case in (*cases, "real"):
        assert two[case] == pytest.approx(four[case], rel=1e-3, abs=1e-4), case


def test_what_is_drawn_is_compared_with_what_was_asked_for(root: Path) -> None:
    """Real images in place of generated ones: full scores for the right ones, and none for others."""
    suite = suite_of(root)
    own, _, real = asked_of(suite, "reconstruction")
    right = {name: float(values.mean()) for name, values in suite.measure(real, own).items()}
    assert right["psnr_db"] == pytest.approx(100)
    assert right["ssim"] > 0.999
    assert right["classifier_distance"] == pytest.approx(0, abs=1e-6)
    assert right["dino_distance"] == pytest.approx(0, abs=1e-5)
    assert right["cube_px"] < 0.5
    assert (right["cube_within_4px"], right["block_within_4px"], right["colour_as_asked"]) == (1, 1, 1)
    assert right["side_as_asked"] == 1
    assert right["objects_as_named"] == 1
    without = real.clone()
    without[:] = real[..., :1, :1]  # only the table
    assert suite.measure(without, own)["objects_as_named"].tolist() == [0, 0, 0, 0]
    other = {name: float(values.mean()) for name, values in suite.measure(real.roll(-1, 0), own).items()}
    assert other["psnr_db"] < 30
    assert other["dino_distance"] > 0.001
    assert other["cube_px"] > 4
    swapped, _, _ = asked_of(suite, "dino_swap")
    followed = {name: float(values.mean()) for name, values in suite.measure(real.roll(-1, 0), swapped).items()}
    assert followed["cube_within_4px"] == 1
    assert followed["side_of_reference"] == 1
    assert "side_as_asked" not in followed  # the caption is of the original image
    changed, _, _ = asked_of(suite, "changed_words")
    kept = {name: float(values.mean()) for name, values in suite.measure(real, changed).items()}
    assert (kept["colour_as_asked"], kept["colour_of_reference"], kept["objects_as_named"]) == (0, 1, 0)


def test_the_case_of_scales_follows_the_scales(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(root)
    seen = []

    def draw(self: Any, conditions: Any, size: Any, seeds: Any, sampling: Any = None, on_step: Any = None) -> Any:
        seen.append((sampling.text_scale, sampling.dino_scale, tuple(seeds)))
        return torch.rand(len(seeds), 3, size[0] * 4, size[1] * 4)

    monkeypatch.setattr(PatchDiTModule, "draw", draw)
    rows, pictures = Curves(suite).scales()
    assert [(row["text_scale"], row["dino_scale"]) for row in rows] == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert sorted({pair[:2] for pair in seen}) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert len({pair[2] for pair in seen if pair[2][0] == 0}) == 1  # the same seeds for each pair
    assert all(row["images"] == 2 for row in rows)
    assert [shown.shape[0] for _, shown in pictures] == [2, 2]  # one for each DINO scale


def test_training_on_shards_of_other_encoders_is_refused_before_it_starts(root: Path) -> None:
    with pytest.raises(ValueError, match=r"encoders\.dino_view is \"grey\" there and \"colour\" here"):
        module_for(shards(root), "encoders.dino_view=colour")


def test_sampling_can_be_changed(root: Path) -> None:
    own = suite_of(root).sampling
    assert suite_of(root, sampling={"steps": 7, "text_scale": None}).sampling == replace(own, steps=7)
    with pytest.raises(ValueError, match="sampling has no step; it has"):
        suite_of(root, sampling={"step": 7})


# ---- what can be asked -----------------------------------------------------------------------------------------------


def test_cases_that_a_model_or_its_data_cannot_answer(root: Path, tmp_path: Path) -> None:
    data = shards(root)
    without = module_for(data, "model.network.use_dino_patches=false")
    assert "shuffled_patches" not in Suite(without, data, SEEN, quick()).cases()
    with pytest.raises(ValueError, match="the network has no patches"):
        Suite(without, data, SEEN, quick(cases=["shuffled_patches"])).cases()
    blind = suite_of(root, None)
    assert blind.cases() == ["reconstruction", "dino_swap", "text_only", "shuffled_patches", "scales", "steps"]
    assert (blind.scaled_case, suite_of(root).scaled_case) == ("reconstruction", "changed_words")
    assert "scales" not in suite_of(root, sampling={"guidance": "none"}).cases()
    with pytest.raises(ValueError, match="drawn without guidance"):
        suite_of(root, cases=["scales"], sampling={"guidance": "none"}).cases()
    with pytest.raises(ValueError, match=r"text_scale=6: no effect with guidance=none"):
        suite_of(root, sampling={"guidance": "none", "text_scale": 6})
    drawn = module_for(data, "model.sampling.guidance=none", "model.sampling.timestep_shift=1")
    drawn.few_steps = FewSteps(drawn.sampling.steps, 1, Sampling(guidance="none"))
    assert not {"steps", "scales"} & set(Suite(drawn, data, SEEN, quick()).cases())
    with pytest.raises(ValueError, match="steps cannot be evaluated: the model is a student"):
        Suite(drawn, data, SEEN, quick(cases=["steps"])).cases()
    with pytest.raises(ValueError, match="a student of 2 windows is drawn with"):
        Suite(drawn, data, SEEN, quick(sampling={"steps": 4}))
    with pytest.raises(ValueError, match="give replace_words"):
        suite_of(root, None, cases=["changed_words"]).cases()
    told = suite_of(root, None, replace_words={"cube": "ball"})
    assert told.cases() == list(CASES)
    asked, _, _ = asked_of(told, "changed_words")
    assert all("ball" in caption for caption in asked.captions)


@pytest.mark.usefixtures("two_without_locks")
def test_one_of_several_processes_evaluates_on_a_disk_without_locks(tmp_path: Path) -> None:
    """As at the end of training; the evaluation writes only single files."""
    data = shards(write_images(tmp_path / "set", {SQUARE: 8}, small_encoders()))
    module = module_for(data)
    assert classifier_for(data, module.ready_encoders(), QUICK) is not None
    assert feature_encoder(data, module.ready_encoders(), FAST).name.startswith("trained")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cases": ["reconstructoin"]}, "choose of reconstruction"),
        ({"images": 0}, "at least 1"),
        ({"step_counts": [4, 0]}, "at least 1"),
        ({"lpips": "vgg"}, "choose auto or none"),
        ({"precision": "16-mixed"}, "precision='16-mixed': choose auto or 32-true or bf16-mixed"),
        ({"split": "tset"}, "choose val or test"),
        ({"replace_words": {"hot dog": "cat"}}, "'hot dog' is not a single word"),
        ({"replace_words": {"red": 3}}, "red would become 3, which is no text"),
        ({"replace_words": {3: "red"}}, r"""3 is not a single word .*'replace_words=\[\["3",cat\]\]'"""),
        ({"replace_words": [["dog", "cat", "cow"]]}, r"holds \['dog', 'cat', 'cow'\]: give pairs"),
        ({"replace_words": ["dog"]}, "holds 'dog': give pairs"),
        ({"replace_words": [["dog", "cat"], ["Dog", "cow"]]}, "names 'Dog' twice"),
        ({"cases": ["text_only"], "replace_words": [["3", "cat"]]}, "replace_words has no effect without the case"),
        ({"cases": ["text_only"], "replace_words": {"dog": "cat"}}, "replace_words has no effect without the case"),
        ({"cases": ["steps"], "sampling": {"steps": 8}}, r"sampling.steps has no effect with cases=\['steps'\] alone"),
        ({"cases": ["text_only", "scales"], "sampling": {"dino_scale": 5}}, "sampling.dino_scale has no effect with"),
        ({"cases": ["text_only"], "sampling": {"cls_scale": 2.0}}, "sampling.cls_scale has no effect with"),
        ({"cases": ["steps"], "text_scales": [1.0]}, "text_scales has no effect without the case scales"),
        ({"cases": ["scales"], "step_counts": [4]}, "step_counts has no effect without the case steps"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageSuite(**options)


def test_what_is_drawn_and_not_finite_ends_the_evaluation(root: Path) -> None:
    """Precision and recall would count a NaN like any other image."""
    suite = suite_of(root, cases=["text_only"])
    with torch.no_grad():
        for parameter in suite.module.network.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="what was drawn is not finite"):
        suite.evaluate()


def test_ways_of_sampling_that_cannot_be_are_said_before_anything_is_drawn(root: Path) -> None:
    for options, said in (
        ({"text_scales": (1.0, -1.0)}, "text_scale"),
        ({"dino_scales": (float("nan"),)}, "dino_scale"),
        ({"step_counts": (1, 20_000)}, "steps"),
        ({"sampling": {"steps": 2, "interval": (0.01, 0.02)}}, "none of the 2 steps has a noise level in it"),
    ):
        with pytest.raises(ValueError, match=said):
            suite_of(root, **options)


def test_guidance_that_no_case_reads_is_refused_before_anything_is_drawn(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the sample command: otherwise the figures would be those of the model's own scales."""
    for given in ({"dino_scale": 5.0}, {"cls_scale": 2.0}, {"guidance": "independent", "full_scale": 1.0}):
        suite_of(root, sampling=given, cases=["text_only", "reconstruction"])
        with pytest.raises(ValueError, match=r"has no effect with cases=\['text_only'\]|is for prompt and"):
            suite_of(root, sampling=given, cases=["text_only"])
    suite_of(root, sampling={"text_scale": 5.0, "dino_scale": None}, cases=["text_only"])
    data = shards(root)
    without = module_for(data, "model.network.use_dino_patches=false")
    with pytest.raises(ValueError, match="cls_scale has no effect: this model was trained without patches"):
        Suite(without, data, SEEN, quick(cases=["reconstruction"], sampling={"cls_scale": 2.0}))
    Suite(without, data, SEEN, quick(cases=["reconstruction"], sampling={"steps": 3}))
    assert "trained without patches" not in caplog.text  # that warning is for callers that give an image
    given = SteeredImages(without, image=Image.new("RGB", (16, 16)))
    given.refuse_idle({"steps"}, without.sampling)
    assert "trained without patches: of the image only its overall look counts" in caplog.text


def test_what_a_case_varies_itself_is_refused_where_no_other_case_reads_it() -> None:
    """It is refused before training, when the callback is built. Otherwise the report would list it among the sampling
    settings."""
    for case, name in (("scales", "text_scale"), ("scales", "dino_scale"), ("steps", "steps")):
        with pytest.raises(ValueError, match=rf"sampling.{name} has no effect with cases=\['{case}'\] alone"):
            quick(sampling={name: 3}, cases=[case])
        quick(sampling={name: 3}, cases=["scales", "steps"])
        quick(sampling={name: 3}, cases=[case, "reconstruction"])
    quick(sampling={"steps": 3}, cases=["scales"])
    quick(sampling={"text_scale": 3}, cases=["steps"])
    for name, value in (
        ("full_scale", 2.0),
        ("full_rescale", 0.7),
        ("guidance", "text_then_dino"),
        ("dino_scale", 2.0),
    ):
        with pytest.raises(ValueError, match=rf"sampling.{name} has no effect with cases=\['text_only'\] alone"):
            quick(sampling={name: value}, cases=["text_only"])
        quick(sampling={name: value}, cases=["text_only", "reconstruction"])
    quick(sampling={"guidance": "independent", "full_scale": 0.0}, cases=["text_only"])


def test_a_run_trained_on_one_image_at_a_time_is_evaluated_on_pairs(root: Path, tmp_path: Path) -> None:
    data = ImageShards(batch_size=1, root=root, num_workers=0)
    data.setup()
    options = {"batch_size": None, "cases": ["dino_swap"]}
    cases = run_suite(module_for(data), data, quick(**options), tmp_path)[0]["cases"]
    assert cases["dino_swap"]["images"] == cases["unrelated_image"]["images"] == 6
    with pytest.raises(ValueError, match="batch_size=1: at least 2"):
        ImageSuite(batch_size=1)
    for empty in ({"cases": []}, {"text_scales": []}, {"dino_scales": []}, {"step_counts": []}):
        with pytest.raises(ValueError, match=r"cases=\[\]: choose of|must not be empty"):
            ImageSuite(**empty)


def test_a_case_that_was_asked_for_and_has_no_image_is_an_error(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone: dict[str, Any] = {"images": 1, "grid_images": 1}
    with pytest.raises(ValueError, match="dino_swap applies to none of the images: no batch holds two of one bucket"):
        suite_of(root, **alone, cases=["dino_swap"]).evaluate()
    words: dict[str, Any] = {**alone, "replace_words": {"zebra": "horse"}}
    with pytest.raises(ValueError, match="changed_words applies to none of the images: no caption holds a word"):
        suite_of(root, **words, cases=["changed_words"]).evaluate()
    data = shards(root)
    with pytest.raises(ValueError, match="scales applies to none"):
        run_suite(module_for(data), data, quick(**words, cases=["scales"]), tmp_path)
    with caplog.at_level("WARNING"):
        suite_of(root, **alone).evaluate()
    assert "dino_swap applies to none of the images" in caplog.text


def test_a_split_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised before a classifier is trained, and names the existing splits."""
    monkeypatch.setattr(validation, "classifier_for", lambda *_: pytest.fail("trained too early"))
    write_images(tmp_path, {SQUARE: 6}, small_encoders(), {"train": 0, "val": 50})
    data = shards(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no test images: give split=val \(6 images\) or split=train \(6 images\)"
    ):
        run_suite(module_for(data), data, quick(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no test images: give split=val"):
        Suite(module_for(data), data, SEEN, quick()).evaluate()


def test_words_that_are_numbers_are_given_in_pairs_on_the_command_line() -> None:
    for given, words in (
        ('replace_words=[["3",cat]]', {"3": "cat"}),
        ("replace_words={dog: cat}", {"dog": "cat"}),
        ("replace_words=[[dog,cat],[cow,horse]]", {"dog": "cat", "cow": "horse"}),
    ):
        cfg = compose("evaluate", ["evaluate=image_text", "checkpoint=RUN", given])
        options = ImageSuite(replace_words=OmegaConf.to_container(cfg.replace_words))  # type: ignore[arg-type]
        assert options.words == words
    assert change_caption("kind 3, on the left", {}, 0, [], ImageSuite(replace_words=[["3", "cat"]]).words) == (
        "kind cat, on the left",
        None,
    )


# ---- distances -------------------------------------------------------------------------------------------------------


def test_without_the_weights_of_lpips_it_says_what_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    distances = Distances(small_encoders(), SEEN, "auto")
    assert str(tmp_path) in distances.note
    assert "classifier_distance and dino_distance" in distances.note
    pictures = torch.rand(2, 3, 32, 32)
    assert "lpips" not in distances(pictures, pictures)
    assert Distances(small_encoders(), None, "none").note == "LPIPS was switched off."


@pytest.mark.slow
def test_with_the_weights_at_hand_lpips_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random weights in place of the file: this tests the code path, not the value."""
    from torchvision.models import alexnet

    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / LPIPS_FILE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: _stored(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: _stored(tmp_path))
    distances = Distances(small_encoders(), SEEN, "auto")
    assert distances.note == ""
    real = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = distances(torch.cat([real[:2], 1 - real[2:]]), real)["lpips"]
    assert found.shape == (3,)
    assert found[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert float(found[2]) > 1e-4


def _stored(folder: Path) -> Any:
    return torch.load(folder / "checkpoints" / LPIPS_FILE, weights_only=True)


def test_means_are_over_images_and_not_over_batches() -> None:
    figures = summarise({"cube_px": [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])], "none": [torch.zeros(0)]})
    assert figures == {"images": 4, "cube_px": 4.0, "cube_px_median": 2.0}


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_the_suite_writes_a_report_with_figures(root: Path, tmp_path: Path) -> None:
    data = shards(root)
    figures, pictures = run_suite(module_for(data), data, quick(), tmp_path / "out")
    assert set(figures["cases"]) == {*CASES, "unrelated_image", "real"} - {"scales", "steps"}
    curve = [(row["case"], row["steps"], row["evaluations"]) for row in figures["steps"]]  # three and two branches
    assert curve == [("reconstruction", 1, 3), ("reconstruction", 2, 6), ("text_only", 1, 2), ("text_only", 2, 4)]
    assert all({"frechet", "ssim", "s_per_image"} <= set(row) for row in [*figures["steps"], *figures["scales"]])
    assert set(figures["real_grid"]) == {"images", "grain", "frechet", "cmmd"}  # two images have no neighbours
    assert figures["real_grid"]["images"] == quick().grid_images
    assert [row["text_scale"] for row in figures["word_scales"]] == [1.0, 3.0]  # text only: images differ by scale
    assert figures["word_scales"][0]["ssim"] != figures["word_scales"][1]["ssim"]
    for row in [*figures["word_scales"], *figures["scales"]]:
        assert row["grain_off"] == pytest.approx(abs(row["grain"] - figures["real_grid"]["grain"]), abs=2e-5)
    assert set(figures["sampling"]) == {part.name for part in fields(Sampling)}
    assert figures["sampling"]["guidance"] == "dino_then_text"
    assert figures["clip"] is None
    assert figures["cases"]["reconstruction"]["images"] == 6
    assert figures["classifier"]["images"] == 12  # of the validation split
    assert "psnr_db" not in figures["cases"]["real"]
    for case in ("reconstruction", "text_only", "real"):
        assert {"frechet", "cmmd", "precision", "recall", "grain"} <= set(figures["cases"][case])
    assert figures["features"]["name"].startswith("trained")
    assert figures["cases"]["real"]["cube_px"] == headline(figures)["classifier/cube_px"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert [path.name for path in pictures] == ["samples.png", "scales.png", "scale_map.png", "curves.png"]
    assert re.search(
        "No pair of scales (of those with .*)?is better in both [a-z0-9_]* and [a-z0-9_]* than: text", text
    )
    assert "No text scale is better in both objects_as_named and frechet than: text" in text
    assert "| reconstruction, 1 step |" in text
    assert "| reconstruction, 2 steps |" in text
    assert all(f"({path.name})" in text and Image.open(path).size[0] > 100 for path in pictures)
    named = set(re.findall(r"(?m)^\| ([a-z]\w*) \|", text)) - {"images", "evaluations", "s_per_image"}
    told = " ".join(re.findall(r"(?m)^- .*", text))
    assert {name for name in named if f"`{name}`" not in told} == {"cube_px_median", "block_px_median"}
    assert "its mean error is" in text
    assert ("LPIPS was not computed" in text) == ("lpips" not in figures["cases"]["reconstruction"])
    assert json.loads(json.dumps(figures)) == figures
    names = headline(figures)
    assert names["shuffled_patches/psnr_db"] == figures["cases"]["shuffled_patches"]["psnr_db"]
    assert "side_of_reference" in figures["cases"]["dino_swap"]
    assert {"changed_words/colour_as_asked", "reconstruction/cube_within_4px", "text_only/side_as_asked"} <= set(names)


def test_images_of_every_case_are_compared_with_their_words(root: Path, tmp_path: Path) -> None:
    """The anchors are a real image with its own caption and with the caption of another image. No classifier is
    used."""
    pytest.importorskip("transformers")
    write_tiny_clip(tmp_path)
    cases = ["reconstruction", "text_only", "changed_words", "scales"]
    told = {"cases": cases, "clip": str(tmp_path), "replace_words": {"cube": "ball"}, "text_scales": (2.0,)}
    suite = Suite(module_for(shards(root)), shards(root), None, quick(**told))
    found = suite.evaluate()
    assert {"clip_similarity"} <= set.intersection(*(set(figures) for figures in found.values()))
    assert found["real"]["clip_similarity"] != found["unrelated_image"]["clip_similarity"]
    own = [suite.clip(real, list(batch.captions)) for batch, real, _ in suite.batches(6)]  # type: ignore[misc]
    assert found["real"]["clip_similarity"] == pytest.approx(float(torch.cat(own).mean()), abs=1e-4)
    assert found["changed_words"]["clip_similarity"] != found["reconstruction"]["clip_similarity"]
    table, _ = Curves(suite).scales()
    assert best_pair(table, SCALES_PARETO)[0] == ("clip_similarity", "-dino_distance")  # type: ignore[index]
    features = FeatureOptions(kind="clip", weights=str(tmp_path))
    assert Suite(suite.module, suite.data, None, ImageSuite(features=features)).clip is not None


def test_images_to_compare_with_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their features are stored: 50 000 images of 512 px are 39 GB."""
    suite, alive = suite_of(root), 0
    opened: list[weakref.ref[torch.Tensor]] = []
    _ = suite.features

    def watched(*given: Any) -> torch.Tensor:
        nonlocal alive
        images = real_images(*given)
        opened.append(weakref.ref(images))
        alive = max(alive, sum(each() is not None for each in opened))
        return images

    monkeypatch.setattr(image_features, "real_images", watched)
    assert len(suite.reference) == len(suite.data.samples("train"))
    assert len(opened) > 2
    assert alive <= 2  # a batch is freed when the next one is loaded


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_images_are_drawn_in_the_precision_of_the_sample_command(
    precision: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured images are those that users get: on a GPU both use bfloat16, unless another precision is
    requested."""
    data = shards(root)
    drawn: list[bool] = []

    def draw(self: Any, conditions: Any, size: Any, seeds: Any, sampling: Any = None) -> Any:
        drawn.append(torch.is_autocast_enabled("cpu"))
        return torch.rand(len(seeds), 3, size[0] * 4, size[1] * 4)

    monkeypatch.setattr(strategies, "automatic_precision", lambda on_gpu: precision)
    monkeypatch.setattr(PatchDiTModule, "draw", draw)
    for given in ("auto", "32-true", "bf16-mixed"):
        drawn.clear()
        expected = precision if given == "auto" else given
        figures, _ = run_suite(module_for(data), data, quick(cases=["text_only"], precision=given), tmp_path)
        assert set(drawn) == {expected == "bf16-mixed"}
        assert figures["drawn_in"] == expected
        assert f"; drawn in {expected}." in (tmp_path / "report.md").read_text()


def test_a_precision_may_be_given_in_short_as_that_of_a_training(root: Path) -> None:
    assert [suite_of(root, precision=each).precision for each in (32, "bf16")] == ["32-true", "bf16-mixed"]


def test_the_same_model_gives_the_same_figures(root: Path, tmp_path: Path) -> None:
    data = shards(root)
    module = module_for(data)
    options = quick(cases=["reconstruction", "shuffled_patches"])
    first, second = (run_suite(module, data, options, tmp_path / name)[0] for name in "ab")
    assert first == second


def test_shuffled_patches_change_what_is_drawn_only_where_they_have_places(root: Path) -> None:
    data = shards(root)
    drawn = {}
    for places in (True, False):
        module = module_for(data, f"model.network.patch_positions={str(places).lower()}")
        suite = Suite(module, data, SEEN, quick(precision="32-true"))  # rounding depends on the order of patches
        batch, real, numbers = next(iter(suite.batches(4)))
        size = (batch.latents.shape[2], batch.latents.shape[3])
        cases = [suite.ask(case, batch, real, numbers) for case in ("reconstruction", "shuffled_patches")]
        left, right = (suite.draw(asked, size) for asked in cases if asked is not None)
        drawn[places] = float((left - right).abs().max())
    assert drawn[False] < 1e-4 < 1e-3 < drawn[True]


def test_the_former_name_of_the_callback_is_refused_with_the_present_one() -> None:
    for setting in ("callbacks.pictures", "callbacks.pictures.suite.split"):
        new = setting.replace("pictures", "images")
        with pytest.raises(ValueError, match=f"the setting '{setting}' is now '{new}'"):
            compose("train", ["experiment=dit_robot_images", f"{setting}=val"])
    with pytest.raises(ValueError, match=r"is now 'cases\.precompute\.images'"):
        check_overrides("bench", ["cases.precompute.pictures=8"])


def test_the_command_and_the_callback_evaluate_a_run(root: Path, tmp_path: Path) -> None:
    from keygrip import evaluate, train

    suite = "callbacks.images.suite"
    changes = [f"{suite}.images=4", f"{suite}.shown=2", f"{suite}.cases=[reconstruction,shuffled_patches]"]
    options = "keygrip.evaluation.attribute_classifier.ClassifierOptions"
    quick = f"+{suite}.classifier={{_target_: {options}, width: 8, steps: 2, batch_size: 4}}"
    features = "keygrip.evaluation.image_features.FeatureOptions"
    fast = f"+{suite}.features={{_target_: {features}, width: 8, steps: 2, batch_size: 4}}"
    small = [o for o in SMALL if not o.startswith(("model=", "data=", "encoders=", "optimizer="))]
    run = tmp_path / "run"
    given = [f"data.root={root}", f"run_dir={run}", "max_steps=2", "val_every_n_steps=2", "callbacks.ema=null"]
    metrics = train.run(
        compose("train", ["experiment=dit_robot_images", *small, *ENCODERS, *given, *changes, quick, fast])
    )
    (tmp_path / "without").mkdir()
    for name in ("train", "val"):
        (tmp_path / "without" / name).symlink_to(root / name)
    info = json.loads((root / "images.json").read_text())
    del info["splits"]["test"]
    (tmp_path / "without" / "images.json").write_text(json.dumps(info))
    elsewhere = [f"data.root={tmp_path / 'without'}", f"run_dir={tmp_path / 'other'}", "max_steps=2"]
    with pytest.raises(
        ValueError,
        match=r"has no test images for the evaluation after training: give callbacks\.images\.suite\.split=val",
    ):
        train.run(
            compose("train", ["experiment=dit_robot_images", *small, *ENCODERS, *elsewhere, "callbacks.ema=null"])
        )
    assert not (tmp_path / "other" / "checkpoints").exists()
    del info["splits"]["val"]
    (tmp_path / "without" / "val").unlink()
    (tmp_path / "without" / "images.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"after training: give callbacks\.images=null"):  # nor a val split
        train.run(
            compose("train", ["experiment=dit_robot_images", *small, *ENCODERS, *elsewhere, "callbacks.ema=null"])
        )
    assert {"images/reconstruction/psnr_db", "images/shuffled_patches/cube_within_4px"} <= set(metrics)
    stored = json.loads((run / "images" / "result.json").read_text())
    assert stored["cases"]["reconstruction"]["psnr_db"] == pytest.approx(metrics["images/reconstruction/psnr_db"])
    overrides = [f"checkpoint={run}", "images=4", "cases=[reconstruction]", "sampling.steps=2"]
    overrides += ["features.width=8", "features.steps=2", "features.batch_size=4"]
    classifier = ImageSuite.__dataclass_fields__["classifier"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "ImageSuite", lambda **given: ImageSuite(**given, classifier=QUICK))
        result = evaluate.run(compose("evaluate", overrides))
    assert classifier.name == "classifier"
    assert result["model"] == "PatchDiTModule"
    assert result["cases"]["reconstruction"] == stored["cases"]["reconstruction"]
    assert (run / "evaluation" / "report.md").is_file()
    with pytest.raises(ValueError, match="PatchDiTModule, and 'episodes' is a setting of evaluate=policy"):
        evaluate.run(compose("evaluate", [f"checkpoint={run}", "episodes=3"]))


def test_after_training_in_several_processes_one_evaluates_all_images(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also trains the feature encoder on all images: the file stored next to the shards is that of the whole set."""
    data = shards(root)
    module = module_for(data)
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, world_size=2, loggers=[], global_step=2)
    trainer.strategy, trainer.callback_metrics = SimpleNamespace(root_device=torch.device("cpu")), {}
    data.trainer = trainer  # type: ignore[assignment]
    monkeypatch.setattr(image_callback, "load_module", lambda *_, **__: module)
    monkeypatch.setattr(image_callback, "run_config", lambda _: {"model": {}})
    trained_on: list[int] = []

    def train_encoder(images: list[torch.Tensor], options: FeatureOptions) -> image_features.SmallEncoder:
        trained_on.append(sum(map(len, images)))
        return image_features.SmallEncoder(options.width).eval()

    monkeypatch.setattr(image_features, "train_encoder", train_encoder)
    suite = quick(cases=["reconstruction"], images=12, features=replace(FAST, steps=1))
    EvaluateImages(suite, data, str(tmp_path)).on_fit_end(trainer, module)  # type: ignore[arg-type]
    result = json.loads((tmp_path / "images" / "result.json").read_text())
    alone = len(shards(root).samples("test", 12))
    assert result["cases"]["reconstruction"]["images"] == alone
    assert trained_on == [len(shards(root).samples("train"))]
    assert data.trainer is trainer


@pytest.mark.parametrize(
    ("options", "model", "error", "said"),
    [
        ({"clip": "typo"}, (), FileNotFoundError, "suite: typo: of clip a folder with config.json"),
        (
            {"features": FeatureOptions(kind="inception", weights="typo.pth")},
            (),
            FileNotFoundError,
            "suite: features.weights=typo.pth: there is no such file",
        ),
        (
            {"cases": ["shuffled_patches"]},
            ("model.network.use_dino_patches=false",),
            ValueError,
            "suite: the case shuffled_patches cannot be evaluated: the network has no patches",
        ),
        ({"sampling": {"step": 7}}, (), ValueError, "suite: sampling has no step; it has"),
        ({"sampling": {"guide_scale": 2.0}}, (), ValueError, "suite: guide_scale=2.0 has no effect: this model has no"),
    ],
)
def test_a_suite_that_the_model_cannot_do_is_refused_before_training(
    options: dict[str, Any], model: tuple[str, ...], error: type[Exception], said: str, root: Path, tmp_path: Path
) -> None:
    data = shards(root)
    module = module_for(data, *model)
    with pytest.raises(error, match=rf"callbacks\.images\.{said}"):
        EvaluateImages(quick(**options), data, str(tmp_path)).on_fit_start(None, module)  # type: ignore[arg-type]
    EvaluateImages(quick(), data, str(tmp_path)).on_fit_start(None, module)  # type: ignore[arg-type]


def test_a_split_without_ground_truth_is_evaluated_without_a_classifier(tmp_path: Path) -> None:
    """As where the held-out images are photographs of one's own and the training images are simulated."""
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0, "val": 1000})
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"test": 2000}, evidence=False)
    data = shards(tmp_path)
    module = module_for(data)
    options = quick(cases=["reconstruction"])
    EvaluateImages(options, data, str(tmp_path)).on_fit_start(None, module)  # type: ignore[arg-type]
    figures, _ = run_suite(module, data, options, tmp_path / "out")
    assert figures["classifier"] is None
    assert "ssim" in figures["cases"]["reconstruction"]
    assert "cube_px" not in figures["cases"]["reconstruction"]
    assert list(tmp_path.glob(".keygrip/attribute_classifier-*")) == []
    with pytest.raises(ValueError, match=r"callbacks\.images\.suite: the case changed_words cannot be evaluated"):
        EvaluateImages(quick(cases=["changed_words"]), data, str(tmp_path)).on_fit_start(None, module)  # type: ignore[arg-type]


def test_a_new_colour_among_the_images_to_evaluate_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"train": 0, "val": 1000})
    monkeypatch.setitem(COLOURS, "gold", (230, 180, 30))
    write_images(tmp_path, {SQUARE: 8}, small_encoders(), {"test": 2000})
    data = shards(tmp_path)
    module = module_for(data)
    said = r"the test images of .* show the colours \['gold'\], which no training image shows"
    with pytest.raises(ValueError, match=rf"callbacks\.images\.suite: {said}"):
        EvaluateImages(quick(), data, str(tmp_path)).on_fit_start(None, module)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        run_suite(module, data, quick(), tmp_path / "out")
    EvaluateImages(quick(split="val"), data, str(tmp_path)).on_fit_start(None, module)  # type: ignore[arg-type]


def test_images_of_the_curves_are_refused_in_the_command_where_there_is_no_curve(root: Path, tmp_path: Path) -> None:
    """Recipes set them, so that the cases of a recipe may be changed alone."""
    given = ["checkpoint=run", "evaluate=image_text", "cases=[reconstruction,text_only]", "grid_images=64"]
    evaluated = Evaluated(module_for(shards(root)), OmegaConf.create({"data": {}}), tmp_path / "last.ckpt", tmp_path)
    with pytest.raises(ValueError, match="grid_images has no effect without the case scales or steps in cases"):
        validation.evaluate_images(evaluated, compose("evaluate", given))
    assert quick(cases=["reconstruction"], grid_images=64).counts == (6,)
    for cases in (["steps"], ["text_only", "scales"], None):
        asked = quick(cases=cases, grid_images=64)
        asked.refuse_idle_grid()
        assert asked.counts == (6, 64)


def test_a_solver_without_effect_is_refused_where_no_case_takes_several_steps(root: Path) -> None:
    once = {"sampling": {"steps": 1, "solver": "heun"}}
    with pytest.raises(ValueError, match=r"solver=heun has no effect with a single step \(steps=1\): leave it out"):
        suite_of(root, **once, cases=["reconstruction"])
    with pytest.raises(ValueError, match="solver=heun has no effect with a single step"):
        suite_of(root, **once, cases=["reconstruction", "steps"], step_counts=(1,))
    assert suite_of(root, **once, cases=["reconstruction", "steps"], step_counts=(1, 2)).sampling.solver == "heun"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("step_counts=16", r"^step_counts=16: must be a list"),
        ("text_scales=[1,a]", r"^text_scales=\[1, 'a'\]: must be a list, each of it a finite number"),
        ("cases=5", r"^cases=5: must be a list or null"),
        ("features.steps=many", r"^features\.steps='many': must be a whole number"),
        ("+features.step=2", r"FeatureOptions has no setting 'step'; did you mean 'steps'"),
    ],
)
def test_a_setting_of_the_command_of_another_type_is_refused_by_name(
    override: str, said: str, root: Path, tmp_path: Path
) -> None:
    module = module_for(shards(root))
    cfg = compose("evaluate", ["checkpoint=run", "evaluate=image_text", override])
    evaluated = Evaluated(module, OmegaConf.create({"data": {}}), tmp_path / "last.ckpt", tmp_path)
    with pytest.raises(ValueError, match=said):
        validation.evaluate_images(evaluated, cfg)


@pytest.mark.slow
def test_the_callback_opens_the_run_with_the_files_that_the_run_itself_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints do not contain large encoders, and parts of packages other than keygrip are built only on request."""
    from keygrip import train

    (tmp_path / "my_lab.py").write_text(
        "from keygrip.models.nn.flow_matching import LogitNormalTimesteps\n"
        "from keygrip.training.parts import model_part\n\n\n"
        "@model_part\nclass Middle(LogitNormalTimesteps):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flux, tiny = write_flux(tmp_path / "flux"), small_encoders()
    text = T5Text(str(flux), 6, 24, "float32", "text_encoder_2", "tokenizer_2")
    root = write_images(tmp_path / "set", {SQUARE: 4}, Encoders(tiny.autoencoder, text, tiny.view))
    small = [o for o in SMALL if not o.startswith(("model=", "data=", "encoders=", "encoders.text", "optimizer="))]
    part = ["encoders.text._target_=keygrip.models.patch_dit.text_encoders.T5Text", f"+encoders.text.source={flux}"]
    part += ["+encoders.text.subfolder=text_encoder_2", "+encoders.text.tokenizer_subfolder=tokenizer_2"]
    part += ["encoders.text.width=24", "encoders.text.length=6", "+encoders.text.dtype=float32"]
    part += ["encoders.dino_view=colour"]
    evaluated: list[PatchDiTModule] = []

    def suite_of(module: PatchDiTModule, *_: Any) -> tuple[dict[str, Any], list[Path]]:
        evaluated.append(module)
        (tmp_path / "run" / "images").mkdir()
        return {"cases": {}, "classifier": None}, []

    monkeypatch.setattr(image_callback, "run_suite", suite_of)
    given = [f"data.root={root}", f"run_dir={tmp_path / 'run'}", "max_steps=1", "val_every_n_steps=1"]
    given += ["model.timesteps._target_=my_lab.Middle", "model.log_images_every_n_steps=0"]
    train.run(compose("train", ["experiment=dit_robot_images", *small, *part, *given, "callbacks.ema=null"]))
    assert [type(module.timesteps).__name__ for module in evaluated] == ["Middle"]
    assert isinstance(evaluated[0].encoders.text, T5Text)


# ---- cases of some of the images -------------------------------------------------------------------------------------


def test_what_is_drawn_of_some_images_stands_below_these_and_is_compared_with_these(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Distances depend on the number of images in a set, so the anchor is computed from the same real images."""

    def draw(self: Any, conditions: Any, size: Any, seeds: Any, sampling: Any = None) -> Any:
        tones = torch.tensor([number / 100 for number in seeds]).view(-1, 1, 1, 1)
        return tones.expand(-1, 3, size[0] * 4, size[1] * 4).clone()

    monkeypatch.setattr(PatchDiTModule, "draw", draw)
    data = shards(root)
    told = {"cases": ["reconstruction", "changed_words", "scales"], "replace_words": [["red", "gold"]]}
    options = quick(**told, images=12, grid_images=10)
    monkeypatch.setattr(validation, "classifier_for", lambda *_: None)
    with caplog.at_level("INFO"):
        figures, _ = run_suite(module_for(data), data, options, tmp_path)
    suite = Suite(module_for(data), data, None, options)
    real, red = [], []
    for batch, images, _ in suite.batches(12):
        real += list(images)
        red += ["red" in caption for caption in batch.captions]
    assert 4 < sum(red) < 12
    cases = figures["cases"]
    counts = {name: cases[name]["images"] for name in ("real", "reconstruction", "changed_words")}
    assert counts == {"real": 12, "reconstruction": 12, "changed_words": sum(red)}
    of_red = [image for image, named in zip(real, red, strict=True) if named]
    features = torch.cat([suite.features.features(image[None]) for image in of_red])
    expected = {"images": sum(red), "grain": float(torch.cat([grain(image[None]) for image in of_red]).mean())}
    expected |= set_figures(features, suite.reference)
    assert cases["real_of_changed_words"] == pytest.approx(expected, abs=1e-3)
    assert cases["real_of_changed_words"]["frechet"] > cases["real"]["frechet"]
    assert "real_of_reconstruction" not in cases
    some = figures["scales"][0]["images"]
    assert (figures["real_scales"]["images"], figures["real_grid"]["images"]) == (some, 10)
    assert 0 < some < 10
    for row in figures["scales"]:
        assert row["grain_off"] == pytest.approx(abs(row["grain"] - figures["real_scales"]["grain"]), abs=2e-5)
    note = f"changed_words: {sum(red)} of 12 captions hold a word of replace_words; scales: {some} of 10 captions hold"
    assert note in caplog.text
    report = (tmp_path / "report.md").read_text()
    assert note in report
    assert "| changed_words | real_of_changed_words |" in report
    assert "- `real_of_changed_words`: the real images of `changed_words` alone" in report
    suite.evaluate()
    (_, _), (_, own), (title, changed) = suite.samples.rows
    assert title == "changed words (empty: the case does not apply)"
    assert changed.shape == own.shape
    for column, named in enumerate(red[:4]):  # the first batch is full
        assert torch.equal(changed[column], own[column] if named else torch.ones_like(own[column]))


def test_samples_show_the_neighbours_with_most_images() -> None:
    def rows(size: int, places: list[int], labels: list[str] | None = None) -> list[SampleRow]:
        images = torch.arange(size).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 10
        return [SampleRow("real", range(size), images), SampleRow("some", places, images[places], labels)]

    samples = Samples(3)
    samples.offer(2, rows(2, [0, 1]))
    assert [len(images) for _, images in samples.rows] == [2, 2]
    samples.offer(6, rows(6, []))
    assert [(title, len(images)) for title, images in samples.rows] == [("real", 3)]
    samples.offer(6, rows(6, [0, 3, 5], ["red", "teal", "gold"]))
    (_, real), (title, some) = samples.rows
    assert real[:, 0, 0, 0].tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert some[:, 0, 0, 0].tolist() == pytest.approx([0.3, 1.0, 0.5])
    assert title == "some: teal, -, gold (empty: the case does not apply)"
    samples.offer(6, rows(6, [0, 2]))  # no more images than before
    samples.offer(2, rows(2, [0, 1]))
    assert samples.rows[1][0] == title
    samples.offer(3, rows(3, [0, 1, 2]))
    assert samples.rows[1][0] == "some"


# ---- report ----------------------------------------------------------------------------------------------------------


def test_tables_have_a_column_for_each_figure_of_any_row() -> None:
    assert table({"one": {"a": 1.0}, "two": {"a": 2.0, "b": 0.12345}}) == [
        "| | one | two |",
        "| --- | --- | --- |",
        "| a | 1 | 2 |",
        "| b |  | 0.1235 |",
    ]


def test_the_scale_map_is_a_figure() -> None:
    rows = [
        {"text_scale": t, "dino_scale": d, "colour_as_asked": 0.5, "cube_within_4px": 1.0}
        for t in (1, 4)
        for d in (0, 2)
    ]
    assert scale_map(rows).startswith(b"\x89PNG")

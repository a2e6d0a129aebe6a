"""The inputs of `keygrip sample` from the command line and from files of prompts, its masks, and the rows of its
grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import small_encoders
from PIL import Image

import keygrip.sample  # declares the schema  # noqa: F401
from keygrip.config import compose
from keygrip.data.image_text.crops import Bucket
from keygrip.inference import images
from keygrip.inference.image_files import files_of
from keygrip.inference.image_requests import SampleRequest, requested
from keygrip.inference.references import open_mask, open_reference
from keygrip.inference.steered_images import SteeredImages
from keygrip.models.patch_dit.sampler import Sampling


def asked(*overrides: str) -> list[SampleRequest]:
    return requested(compose("sample", ["checkpoint=run", *overrides]))


# ---- prompts, images and seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        (["prompt=true"], "prompt holds true"),
        (["prompt=[a red cube,false]"], "prompt holds false"),
        (["prompt={a: 1}"], 'prompt holds {"a": 1}'),
        (["prompt=[[a,b],c]"], r'prompt holds \["a", "b"\]'),
        (["prompt=thing", "image=[null]"], "image holds null"),
        (["prompt=thing", "image=true"], "image holds true"),
    ],
)
def test_what_is_no_text_is_refused(overrides: list[str], given: str) -> None:
    with pytest.raises(ValueError, match=f"{given}, which is no text: put words in quotes"):
        asked(*overrides)


@pytest.mark.parametrize("none", [0, [], False, {}])
def test_what_is_no_text_in_a_file_is_refused(none: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": none, "image": "a.png"}))
    with pytest.raises(ValueError, match=r"line 1: its prompt is not text"):
        asked(f"prompts={tmp_path / 'a.jsonl'}")


def test_numbers_are_text_and_null_is_no_prompt() -> None:
    assert [request.prompt for request in asked("prompt=[7,a red cube]")] == ["7", "a red cube"]
    found = asked("prompt=[null,a red cube]", "image=a.png")
    assert [(request.prompt, request.images) for request in found] == [(None, ("a.png",)), ("a red cube", ("a.png",))]
    with pytest.raises(ValueError, match="prompt 1 of the list is empty and there is no image: nothing to draw"):
        asked("prompt=[a red cube,null]")


def test_blank_words_beside_others_are_none_for_callers_that_hold_images() -> None:
    """The same as on the command line, where they are drawn in batches of their own."""
    module: Any = None  # nothing is drawn
    image = Image.new("RGB", (8, 8))
    for prompt in ("", " ", ["a red cube", "  "]):
        with pytest.raises(ValueError, match=r"prompt [01] is empty and no image steers"):
            SteeredImages(module, prompt)
    steered = SteeredImages(module, ["a red cube", ""], image)
    with pytest.raises(ValueError, match=r"prompt 1 is empty, and full_scale=1\.0 is for words and image together"):
        steered.refuse_idle([], Sampling(full_scale=1.0))


def test_blank_words_are_none(tmp_path: Path) -> None:
    for prompt in ("''", "'  '"):
        with pytest.raises(ValueError, match="nothing to draw"):
            asked(f"prompt={prompt}")
        assert asked(f"prompt={prompt}", "image=a.png")[0].prompt is None
    (tmp_path / "a.csv").write_text("prompt,image,seed\n  ,,1\n")
    with pytest.raises(ValueError, match="line 2: it has neither prompt nor image"):
        asked(f"prompts={tmp_path / 'a.csv'}")


def test_one_image_is_not_blended_with_prompts_of_a_file_either(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("thing")
    with pytest.raises(ValueError, match="blend=true puts several images together"):
        asked(f"prompts={tmp_path / 'a.txt'}", "image=[a.png]", "blend=true")


def test_an_empty_list_is_refused_by_its_name() -> None:
    """Otherwise it would be ignored silently, or be reported as one of several lists of different lengths."""
    for given in (["prompt=x", "image=[]"], ["prompt=[]"], ["prompt=[]", "image=a.png"]):
        empty = next(each for each in given if each.endswith("[]")).replace("[]", r"\[\]")
        with pytest.raises(ValueError, match=f"{empty} is an empty list: give at least one, or leave it out"):
            asked(*given)
    cfg = compose("sample", ["checkpoint=run", "image=a.png", "image_mask=[]"])
    with pytest.raises(ValueError, match=r"image_mask=\[\] is an empty list"):
        images.steering_of(cfg, requested(cfg))


def test_files_of_prompts_may_be_written_in_other_ways(tmp_path: Path) -> None:
    """Endings in capitals, spaces around column names and seeds; a key that occurs twice in a row is refused."""
    (tmp_path / "A.TXT").write_text("a red cube\n")
    assert [request.prompt for request in asked(f"prompts={tmp_path / 'A.TXT'}")] == ["a red cube"]
    (tmp_path / "a.Csv").write_text("prompt, image , seed\na red cube, a.png, 7 \nthing,, \n")
    found = asked(f"prompts={tmp_path / 'a.Csv'}", "seed=3")
    assert [(request.prompt, request.seed) for request in found] == [("a red cube", 7), ("thing", 3)]
    assert found[0].images == (str(tmp_path / "a.png"),)
    (tmp_path / "a.JSONL").write_text('{"prompt": "x", "seed": " 7"}\n')
    assert asked(f"prompts={tmp_path / 'a.JSONL'}")[0].seed == 7
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "a", "seed": 1, "prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: the key 'prompt' stands there twice"):
        asked(f"prompts={tmp_path / 'a.jsonl'}")


def test_a_mask_that_is_no_text_is_refused() -> None:
    cfg = compose("sample", ["checkpoint=run", "image=a.png", "image_mask=[null]"])
    with pytest.raises(ValueError, match="image_mask holds null"):
        images.steering_of(cfg, requested(cfg))


@pytest.mark.parametrize(
    "seed", ["123456789012345678901234567890", "-9223372036854775809", "9223372036854775808", "1" * 5000]
)
def test_a_seed_out_of_range_is_refused_where_it_is_read(seed: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,seed\nx,1\ny,{seed}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "y", "seed": seed}))
    for name, line in (("a.csv", 3), ("a.jsonl", 1)):
        with pytest.raises(ValueError, match=rf"{name}: line {line}: its seed -?\d+ is out of range"):
            asked(f"prompts={tmp_path / name}")


def test_seeds_up_to_the_range_can_be_drawn_from(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,seed\nx,9223372036854775807\ny,-9223372036854775808\n")
    for request in asked(f"prompts={tmp_path / 'a.csv'}", "samples=3"):
        torch.Generator().manual_seed(request.seed)
    with pytest.raises(ValueError, match="seed=9223372036854775808 is out of range"):
        asked("prompt=x", "seed=9223372036854775808")


# ---- masks -----------------------------------------------------------------------------------------------------------

SQUARE = Bucket(64, 64)


def halves(folder: Path) -> Path:
    """Write an image twice as wide as high, white on the left; its square crop is the middle."""
    pixels = np.zeros((96, 192, 3), np.uint8)
    pixels[:, :72] = 255
    Image.fromarray(pixels).save(folder / "image.png")
    return folder / "image.png"


def test_a_mask_covers_what_its_image_shows(tmp_path: Path) -> None:
    image = halves(tmp_path)
    shown = open_reference(str(image), SQUARE, small_encoders())
    for size in ((192, 96), (96, 48), (384, 192), (67, 33), (67, 34)):
        Image.open(image).resize(size).save(tmp_path / "mask.png")
        mask = open_mask(str(tmp_path / "mask.png"), shown, "redraw")
        assert mask.shape == (1, 64, 64)
        both = np.stack([mask[0].numpy() >= 0.5, shown.pixels[..., 0] >= 128])
        assert both.all(0).sum() / both.any(0).sum() > 0.9


@pytest.mark.parametrize("size", [(64, 64), (96, 192), (192, 90)])
def test_a_mask_of_another_shape_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    shown = open_reference(str(halves(tmp_path)), SQUARE, small_encoders())
    Image.new("L", size, 255).save(tmp_path / "mask.png")
    told = rf"redraw=.*mask\.png has {size[0]} x {size[1]} pixels and its image .*image\.png 192 x 96, another shape"
    with pytest.raises(ValueError, match=told):
        open_mask(str(tmp_path / "mask.png"), shown, "redraw")


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_references_of_one_name_have_rows_of_their_own() -> None:
    requests = [SampleRequest("x", (f"{folder}/ref.png",), seed) for folder in "ab" for seed in (0, 1)]
    files = files_of(requests, [SQUARE] * 4)
    assert files.rows == (("ref.png: x", (0, 1)), ("ref.png: x", (2, 3)))
    assert files.images == ("000_seed0.png", "001_seed1.png", "002_seed0.png", "003_seed1.png")

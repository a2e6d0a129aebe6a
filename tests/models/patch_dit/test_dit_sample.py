"""The sample command: with words, with images, with both; files, seeds and error messages."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_parts import SMALL, write_images
from PIL import Image

from keygrip import sample, train
from keygrip.artifacts import atomic_write
from keygrip.config import compose
from keygrip.models.patch_dit.module import PatchDiTModule


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    root = write_images(folder / "images")
    train.run(compose("train", [*SMALL, f"data.root={root}", f"run_dir={folder / 'run'}", "max_steps=4"]))
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def drawn(trained: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*overrides: str, name: str = "out") -> dict[str, Any]:
        return sample.run(
            compose("sample", [f"checkpoint={trained / 'run'}", f"run_dir={tmp_path / name}", *overrides])
        )

    return run


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_words_image_and_both(drawn: Callable[..., dict[str, Any]], trained: Path) -> None:
    image = f"image={trained / 'one.png'}"
    results = {
        "text": drawn("prompt=a red thing", name="text"),
        "dino": drawn(image, name="dino"),
        "both": drawn("prompt=a red thing", image, name="both"),
    }
    shown = {}
    for name, result in results.items():
        json.dumps(result)
        (path,) = result["images"]
        shown[name] = pixels(path)
        assert shown[name].shape == ((16, 16, 3) if name == "text" else (16, 24, 3))  # a reference keeps its shape
        assert Path(result["grid"]).is_file()
    assert not np.array_equal(shown["text"], shown["both"])
    assert not np.array_equal(shown["dino"], shown["both"])


def test_the_same_seed_draws_the_same_image_alone_and_among_others(drawn: Callable[..., dict[str, Any]]) -> None:
    many = drawn("prompt=[a red thing,a green thing]", "samples=3", "seed=5", "batch_size=4", name="many")
    assert many["seeds"] == [5, 6, 7, 5, 6, 7]
    alone = drawn("prompt=a green thing", "seed=6", name="alone")
    assert np.abs(pixels(many["images"][4]) - pixels(alone["images"][0])).max() <= 1  # rounding to bytes
    assert np.abs(pixels(many["images"][4]) - pixels(many["images"][5])).max() > 1


def test_options_reach_the_sampler(drawn: Callable[..., dict[str, Any]], trained: Path) -> None:
    both = ["prompt=a red thing", f"image={trained / 'two.png'}"]
    result = drawn(
        *both, "text_scale=4", "dino_scale=1.5", "steps=3", "solver=heun", "interval=[0.1,0.9]", "size=24x16"
    )
    sampling = result["sampling"]
    assert (sampling["text_scale"], sampling["dino_scale"], sampling["steps"]) == (4.0, 1.5, 3)
    assert (sampling["solver"], sampling["interval"]) == ("heun", (0.1, 0.9))
    assert pixels(result["images"][0]).shape == (16, 24, 3)
    plain = drawn(*both, "steps=3", "size=24x16", name="plain")
    assert not np.array_equal(pixels(result["images"][0]), pixels(plain["images"][0]))


def test_a_size_that_was_not_trained_on_is_said(
    drawn: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    assert pixels(drawn("prompt=thing", "size=20")["images"][0]).shape == (20, 20, 3)
    assert "has not seen 20x20 in training; it has seen 16x16, 24x16" in caplog.text


def test_a_reference_that_is_cut_to_a_trained_shape_is_said(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 16 x 16 and 24 x 16, the latter is most similar to 80 x 20: 30 x 20 pixels of it are used."""
    for name, size in (("long", (80, 20)), ("square", (40, 40))):
        Image.open(trained / "one.png").resize(size).save(tmp_path / f"{name}.png")
    said = "long.png: of its 80 x 20 pixels the middle 30 x 20 are used"
    drawn(f"image={trained / 'one.png'}", name="whole")  # 60 x 40, as trained
    assert "pixels the middle" not in caplog.text
    mixed = drawn(f"image=[{tmp_path / 'long.png'},{tmp_path / 'square.png'}]", name="mixed")
    assert f"image={tmp_path / said}" in caplog.text
    assert "give size=WIDTHxHEIGHT for another" in caplog.text
    assert mixed["sizes"] == [[24, 16], [16, 16]]
    caplog.clear()
    drawn("prompt=thing", f"start_image={tmp_path / 'long.png'}", name="begun")
    assert f"start_image={tmp_path / said}" in caplog.text
    caplog.clear()
    both = f"image=[{tmp_path / 'square.png'},{tmp_path / 'long.png'}]"  # in the shape of the first
    assert drawn(both, "blend=true", "samples=2", name="blended")["sizes"] == [[16, 16]] * 2
    assert caplog.text.count(f"image={tmp_path / 'long.png'}: of its 80 x 20 pixels the middle 20 x 20 are used") == 1
    assert caplog.text.count("pixels the middle") == 1
    caplog.clear()
    beside = drawn(f"image={tmp_path / 'long.png'}", f"start_image={tmp_path / 'square.png'}", name="beside")
    assert beside["sizes"] == [[16, 16]]
    assert caplog.text.count(f"image={tmp_path / 'long.png'}: of its 80 x 20 pixels the middle 20 x 20") == 1
    caplog.clear()
    drawn(f"image={tmp_path / 'long.png'}", "size=24x16", name="asked")
    assert "pixels the middle" not in caplog.text  # no warning if the size is given


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to draw"),
        (["prompt=thing", "size=17"], "multiples of 4"),
        (["prompt=thing", "size=large"], "give a number"),
        (["prompt=thing", "size=[16.7,16.2]"], "give a number"),
        (["prompt=thing", "size=1000000"], "at most 16777216 pixels"),
        (["prompt=thing", "samples=100000000"], "at most 100000 images"),
        (["prompt=[a,b,c]", "samples=50000"], "50000 samples of 3 requests each: at most 100000 images"),
        (["prompt=thing", "interval=0.5"], "give two noise levels"),
        (["prompt=thing", "dino_scale=2"], "no effect without image"),
        (["prompt=thing", "guidance=independent", "full_scale=2"], "prompt and image together"),
        (["prompt=[a,b]", "image=[a,b,c]"], "2 prompts and 3 images"),
        (["prompt=thing", "interval=[0.9,0.1]"], "lower one first"),
    ],
)
def test_errors(overrides: list[str], message: str, drawn: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(*overrides)


def test_missing_files(drawn: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^image=nowhere\.png: there is no such file"):
        drawn("image=nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"^start_image=nowhere\.png: there is no such file"):
        drawn("start_image=nowhere.png", "prompt=thing")
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        drawn(f"image={tmp_path / 'words.png'}")


# ---- files of prompts, several references, masks, images to start from -----------------------------------------------


def test_a_file_of_prompts(drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path) -> None:
    """Each row has its own settings; there is one grid; the images are the same as from each row alone."""
    (tmp_path / "one.png").write_bytes((trained / "one.png").read_bytes())
    rows = [{"prompt": "a red thing", "seed": 4}, {"prompt": "a thing", "image": "one.png"}, {"image": "one.png"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    many = drawn(f"prompts={tmp_path / 'prompts.jsonl'}", "seed=7", "batch_size=2", name="many")
    assert many["prompts"] == ["a red thing", "a thing", None]
    assert many["seeds"] == [4, 7, 7]
    assert many["sizes"] == [[16, 16], [24, 16], [24, 16]]  # rows with a reference of 60 x 40 keep its shape
    assert [pixels(path).shape for path in many["images"]] == [(16, 16, 3), (16, 24, 3), (16, 24, 3)]
    alone = drawn("prompt=a thing", f"image={tmp_path / 'one.png'}", "seed=7", name="alone")
    assert np.abs(pixels(many["images"][1]) - pixels(alone["images"][0])).max() <= 1
    (tmp_path / "prompts.txt").write_text("a red thing\n\na green thing\n")
    assert drawn(f"prompts={tmp_path / 'prompts.txt'}", name="text")["prompts"] == ["a red thing", "a green thing"]
    (tmp_path / "prompts.csv").write_text('prompt,seed\n"red, large",3\nthing,\n')
    table = drawn(f"prompts={tmp_path / 'prompts.csv'}", name="table")
    assert (table["prompts"], table["seeds"]) == (["red, large", "thing"], [3, 0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x", "colour": "red"}', "line 1: a row has prompt, image, seed"),
        ("a.jsonl", '{"prompt": 3}', "line 1: its prompt is not text"),
        ("a.jsonl", '\n{"seed": 3}', "line 2: it has neither prompt nor image"),
        ("a.csv", "prompt,seed\nx,many\n", "line 2: its seed 'many'"),
        ("a.csv", 'prompt,seed\na,1\n"a red cube,2\nb,3\n', "unexpected end of data"),
        ("a.csv", "prompt,seed,prompt\nx,1,y\n", "the column prompt stands there twice"),
        ("a.txt", "\n\n", "it holds no prompt"),
        ("a.xml", "x", "not .xml"),
    ],
)
def test_files_of_prompts_that_say_nothing(
    name: str, content: str, message: str, drawn: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        drawn(f"prompts={tmp_path / name}")


def test_many_rows_make_several_grids(drawn: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"thing {number}" for number in range(30)))
    result = drawn(f"prompts={tmp_path / 'prompts.txt'}", "steps=1", "size=16")
    assert [Path(path).name for path in result["grids"]] == ["grid.png", "grid_01.png"]


def test_an_image_that_stays_where_it_is_not_redrawn(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[:, :12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    whole = Image.open(trained / "one.png").resize((24, 16))
    whole.save(tmp_path / "start.png")
    start = [f"start_image={tmp_path / 'start.png'}", "prompt=thing", "timestep_shift=1"]
    found = pixels(drawn(*start, f"redraw={tmp_path / 'mask.png'}", name="part")["images"][0])
    assert np.array_equal(found[:, 12:], np.asarray(whole)[:, 12:])
    assert not np.array_equal(found[:, :12], np.asarray(whole)[:, :12])
    # also at the edge of a mask that is eight times as large
    Image.fromarray(mask.repeat(8, axis=0).repeat(8, axis=1)).save(tmp_path / "large.png")
    large = pixels(drawn(*start, f"redraw={tmp_path / 'large.png'}", name="large")["images"][0])
    assert np.array_equal(large, found)
    # A network that has hardly been trained predicts a velocity of nearly 0, which leaves its input unchanged.
    own = [
        "model.network.prediction=v",
        "model.network.timestep_floor=null",
        f"run_dir={tmp_path / 'velocity'}",
        "max_steps=1",
    ]
    train.run(compose("train", [*SMALL, f"data.root={trained / 'images'}", *own]))
    start.append(f"checkpoint={tmp_path / 'velocity'}")
    near, far = (
        np.abs(pixels(drawn(*start, f"strength={s}", "steps=10", name=str(s))["images"][0]) - np.asarray(whole)).mean()
        for s in (0.1, 0.9)
    )
    assert near < 0.6 * far


def test_an_interval_between_the_steps_is_refused(drawn: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"interval=\[0\.01, 0\.02\] has no effect: none of the 3 steps"):
        drawn("prompt=thing", "steps=3", "interval=[0.01,0.02]")
    assert drawn("prompt=thing", "steps=3", "interval=[0.01,1]")["sampling"]["interval"] == (0.01, 1.0)


def test_an_interval_is_that_of_the_steps_from_the_start_image(
    drawn: Callable[..., dict[str, Any]], trained: Path
) -> None:
    """Three steps at strength 0.5 become two, at 0.5 and 0.25; at strength 0.3 they become one, at 0.3."""
    start = [f"start_image={trained / 'one.png'}", "prompt=thing", "steps=3", "timestep_shift=1", "text_scale=4"]
    guided = drawn(*start, "strength=0.5", "interval=[0.4,0.6]", name="guided")
    everywhere = drawn(*start, "strength=0.5", "interval=[0.2,0.6]", name="everywhere")
    assert not np.array_equal(pixels(guided["images"][0]), pixels(everywhere["images"][0]))
    with pytest.raises(ValueError, match=r"interval=\[0\.5, 1\.0\] has no effect: none of the 1 steps"):
        drawn(*start, "strength=0.3", "interval=[0.5,1]")


@pytest.mark.parametrize("solver", ["heun", "adams_bashforth"])
def test_a_solver_that_takes_a_single_step_is_refused(
    solver: str, drawn: Callable[..., dict[str, Any]], trained: Path
) -> None:
    """Three steps at strength 0.3 become one."""
    with pytest.raises(
        ValueError, match=rf"solver={solver} has no effect with a single step \(steps=1\): leave it out"
    ):
        drawn("prompt=thing", "steps=1", f"solver={solver}")
    start = [f"start_image={trained / 'one.png'}", "prompt=thing", "steps=3", f"solver={solver}"]
    with pytest.raises(ValueError, match=r"has no effect with a single step \(steps=3, strength=0\.3\)"):
        drawn(*start, "strength=0.3")
    assert drawn(*start, "strength=0.5")["sampling"]["solver"] == solver
    assert drawn("prompt=thing", "steps=1", "solver=euler", name="once")["sampling"]["steps"] == 1


def test_a_start_image_of_which_nothing_is_left_is_refused(drawn: Callable[..., dict[str, Any]], trained: Path) -> None:
    with pytest.raises(ValueError, match="strength=1 without redraw leaves nothing of start_image"):
        drawn(f"start_image={trained / 'one.png'}", "prompt=thing", "strength=1")


def test_a_scale_of_both_needs_a_row_with_both(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "a red thing"}, {"image": str(trained / "one.png")}]
    (tmp_path / "apart.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["guidance=independent", "full_scale=3", "steps=1"]
    with pytest.raises(ValueError, match="full_scale is for prompt and image together"):
        drawn(f"prompts={tmp_path / 'apart.jsonl'}", *own)
    (tmp_path / "both.jsonl").write_text(json.dumps({**rows[0], **rows[1]}))
    assert drawn(f"prompts={tmp_path / 'both.jsonl'}", *own)["sampling"]["full_scale"] == 3


def test_a_folder_that_cannot_be_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in ("file", "file/below"):
        cfg = compose("sample", ["checkpoint=none", "prompt=thing", f"run_dir={tmp_path / where}"])
        with pytest.raises(ValueError, match=r"run_dir=.*file is a file: give a folder"):
            sample.run(cfg)


def test_masks_that_say_nothing_are_refused(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    mask = np.zeros((40, 60, 4), np.uint8)
    mask[..., :3] = 255
    mask[:, :30, 3] = 255
    Image.fromarray(mask).save(tmp_path / "alpha.png")
    Image.new("L", (60, 40)).save(tmp_path / "black.png")
    start = [f"start_image={trained / 'one.png'}", "prompt=thing"]
    with pytest.raises(ValueError, match=r"redraw=.*alpha\.png .*parts of it are transparent"):
        drawn(*start, f"redraw={tmp_path / 'alpha.png'}")
    with pytest.raises(ValueError, match=r"image_mask=.*alpha\.png .*parts of it are transparent"):
        drawn("prompt=thing", f"image={trained / 'one.png'}", f"image_mask={tmp_path / 'alpha.png'}")
    black, white = tmp_path / "black.png", tmp_path / "white.png"
    Image.new("L", (60, 40), 255).save(white)
    with pytest.raises(ValueError, match="redraw is nowhere at least half white"):
        drawn(*start, f"redraw={black}")
    one, two = trained / "one.png", trained / "two.png"
    for given, image in (
        ([f"image={one}", f"image_mask={black}"], "one"),
        ([f"image=[{one},{two}]", f"image_mask={black}"], "one"),
        ([f"image=[{one},{two}]", "blend=true", f"image_mask=[{black},{white}]"], "one"),
        ([f"image=[{one},{two}]", "blend=true", f"image_mask=[{white},{black}]"], "two"),
    ):
        with pytest.raises(
            ValueError, match=rf"image_mask=.*black\.png is nowhere white over half of a patch of .*{image}"
        ):
            drawn(*given)
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_all_be_written_leave_none(
    drawn: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keygrip.inference import image_files

    (tmp_path / "out" / "002_seed2.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"002_seed2\.png is a folder"):
        drawn("prompt=thing", "samples=3", "steps=1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["002_seed2.png"]

    def full(path: Path) -> Any:
        if path.name == "grid.png":
            raise OSError(28, "no space left")
        return atomic_write(path)

    monkeypatch.setattr(image_files, "atomic_write", full)
    with pytest.raises(OSError, match="no space left"):
        drawn("prompt=thing", "samples=3", "steps=1", name="full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_batch_is_kept(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of images fit into memory: during a batch, the images and references before the previous batch are
    freed."""
    from keygrip.inference import images
    from keygrip.models.patch_dit.module import PatchDiTModule

    alive: list[tuple[int, int]] = []
    kept: dict[str, list[weakref.ref[Any]]] = {"images": [], "references": []}
    draw, open_reference = PatchDiTModule.draw, images.open_reference

    def remembered(kind: str, value: Any) -> Any:
        kept[kind].append(weakref.ref(value))
        return value

    def count(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append((sum(r() is not None for r in kept["images"]), sum(r() is not None for r in kept["references"])))
        return remembered("images", draw(*args, **kwargs))

    monkeypatch.setattr(PatchDiTModule, "draw", count)
    monkeypatch.setattr(images, "open_reference", lambda *a: remembered("references", open_reference(*a)))
    rows = []
    for number in range(8):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    result = drawn(f"prompts={tmp_path / 'prompts.jsonl'}", "batch_size=2", "steps=1")
    assert len(result["images"]) == 8
    assert len(alive) == 4
    assert max(images for images, _ in alive) <= 1
    assert max(references for _, references in alive) <= 4


def test_a_broken_reference_is_said_before_anything_is_drawn(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keygrip.models.patch_dit.module import PatchDiTModule

    whole = (trained / "one.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its size can still be read
    monkeypatch.setattr(PatchDiTModule, "draw", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match=r"image=.*cut\.png cannot be read as an image"):
        drawn(f"image=[{trained / 'one.png'},{tmp_path / 'cut.png'}]", "batch_size=1")
    assert not (tmp_path / "out").exists()


def test_a_row_of_a_grid_has_an_end(
    drawn: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keygrip.inference import image_files

    titles: list[str] = []
    real = image_files.image_grid
    monkeypatch.setattr(image_files, "GRID_COLUMNS", 2)
    monkeypatch.setattr(image_files, "image_grid", lambda rows: titles.extend(t for t, _ in rows) or real(rows))
    result = drawn("prompt=thing", "samples=5", "steps=1", "size=16")
    assert titles == ["thing (the first 2 of 5)"]
    assert len(result["images"]) == 5
    scale = 6  # images below 96 pixels are enlarged
    first = pixels(result["images"][0]).repeat(scale, axis=0).repeat(scale, axis=1)
    grid = pixels(result["grid"])
    assert grid.shape[1] == 2 * (16 * scale + 2)
    np.testing.assert_array_equal(grid[-first.shape[0] - 1 : -1, 1 : 1 + first.shape[1]], first)


def test_several_references_and_their_regions(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    """If a mask is white everywhere, only the patches of its image count; without masks the order does not matter."""
    half = np.zeros((40, 60), np.uint8)
    half[:, :30] = 255
    for name, mask in (("white", np.full_like(half, 255)), ("left", half)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    one, two = str(trained / "one.png"), str(trained / "two.png")
    blend = ["blend=true", f"image=[{one},{two}]"]
    mean = drawn(*blend, name="mean")
    assert mean["references"] == [[one, two]]
    other = drawn("blend=true", f"image=[{two},{one}]", name="other")
    assert np.abs(pixels(mean["images"][0]) - pixels(other["images"][0])).max() <= 1
    white, left = str(tmp_path / "white.png"), str(tmp_path / "left.png")
    regions = drawn(*blend, f"image_mask=[{white},{left}]", name="regions")
    assert not np.array_equal(pixels(regions["images"][0]), pixels(mean["images"][0]))
    alone = drawn(f"image={one}", name="alone")
    hidden = drawn(f"image={one}", f"image_mask={left}", name="hidden")
    shown = drawn(f"image={one}", f"image_mask={white}", name="shown")
    assert np.array_equal(pixels(shown["images"][0]), pixels(alone["images"][0]))
    assert not np.array_equal(pixels(hidden["images"][0]), pixels(alone["images"][0]))
    # In a batch each mask applies to the image of its own request; a mask of another shape fits no image.
    Image.open(two).resize((91, 61)).save(tmp_path / "other.png")
    each = drawn(f"image=[{one},{tmp_path / 'other.png'}]", f"image_mask={white}", name="each")
    assert np.abs(pixels(each["images"][0]) - pixels(shown["images"][0])).max() <= 1
    Image.new("L", (24, 24), 255).save(tmp_path / "square.png")
    for override in (f"image_mask={tmp_path / 'square.png'}", f"redraw={tmp_path / 'square.png'}"):
        with pytest.raises(ValueError, match=r"24 x 24 pixels and its image .*one\.png 60 x 40, another shape"):
            drawn(f"image={one}", override, *([f"start_image={one}"] if "redraw" in override else []))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt=thing", "strength=0.5"], "are for start_image"),
        (["prompt=thing", "redraw=mask.png"], "are for start_image"),
        (["blend=true", "image=one.png"], "several images together"),
        (["image=one.png", "image_mask=[a.png,b.png]"], "2 masks .* for the 1 images"),
        (["prompt=thing", "image_mask=a.png"], "1 masks .* for the 0 images"),
        (["prompt=thing", "cls_scale=2"], "no effect without image"),
        (["prompt=", "image=one.png", "text_scale=2"], "no effect without prompt"),
        (["prompt=thing", "guidance=dino_then_text"], "prompt and image together"),
        (["prompt=thing", "prompts=a.txt"], "give one of them"),
    ],
)
def test_settings_without_effect(overrides: list[str], message: str, drawn: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(*overrides)


def test_scales_without_guidance_are_refused(drawn: Callable[..., dict[str, Any]]) -> None:
    assert drawn("prompt=thing", "guidance=none")["sampling"]["guidance"] == "none"
    for scale in ("text_scale=6", "interval=[0.1,0.9]"):
        with pytest.raises(ValueError, match=r"(text_scale=6(\.0)?|interval=.*0\.9.*): no effect with guidance=none"):
            drawn("prompt=thing", "guidance=none", scale)


def test_a_student_is_drawn_as_it_was_trained_and_in_no_other_way(trained: Path, tmp_path: Path) -> None:
    few = "{_target_: keygrip.models.patch_dit.few_steps.FewSteps, windows: 2, teacher_steps: 1,"
    few += " teacher: {_target_: keygrip.models.patch_dit.sampler.Sampling}, timestep_shift: 6}"  # as its teacher
    given = [f"model.few_steps={few}", f"model.init_from={trained / 'run'}", "model.sampling.guidance=none"]
    given += [f"data.root={trained / 'images'}", f"run_dir={tmp_path / 'student'}", "max_steps=1"]
    train.run(compose("train", [*SMALL, *given]))

    def run(*overrides: str) -> dict[str, Any]:
        own = [f"checkpoint={tmp_path / 'student'}", f"run_dir={tmp_path / 'out'}", "prompt=a red thing"]
        return sample.run(compose("sample", [*own, *overrides]))

    assert run()["sampling"]["steps"] == 2
    for override, said in (
        ("text_scale=6", r"text_scale=6(\.0)?: no effect with guidance=none"),
        ("steps=8", "a student of 2 windows is drawn with .* not with steps=8"),
        ("guidance=independent", "not with steps=2, guidance=independent"),
    ):
        with pytest.raises(ValueError, match=said):
            run(override)
    start = f"start_image={trained / 'one.png'}"
    with pytest.raises(ValueError, match=r"start_image at strength=0\.6: a student of few steps"):
        run(start)
    assert run(start, f"redraw={trained / 'two.png'}")["images"]  # starts from noise alone and keeps a part


def test_a_student_shows_as_many_samples_as_asked_and_no_gradient_of_dropped_patches(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    figures: list[str] = []
    monkeypatch.setattr(PatchDiTModule, "_show", lambda self, batch: shown.append(len(batch)))
    monkeypatch.setattr(PatchDiTModule, "_report", lambda self, values: figures.extend(values))
    few = "{_target_: keygrip.models.patch_dit.few_steps.FewSteps, windows: 2, teacher_steps: 1,"
    few += " teacher: {_target_: keygrip.models.patch_dit.sampler.Sampling}, timestep_shift: 6}"
    given = [f"model.few_steps={few}", f"model.init_from={trained / 'run'}", "model.sampling.guidance=none"]
    given += [f"data.root={trained / 'images'}", f"run_dir={tmp_path / 'student'}", "max_steps=2"]
    few_at_a_time = ["data.batch_size=1", "limit_val_batches=4", "val_every_n_steps=2", "model.shown=3"]
    train.run(compose("train", [*SMALL, *given, *few_at_a_time, "model.monitor_every_n_steps=1"]))
    assert shown[-1] == 3
    assert "grad_norm" in figures
    assert "patch_gradient" not in figures


def test_masks_and_scales_of_patches_are_refused_where_the_model_has_none(trained: Path, tmp_path: Path) -> None:
    run = ["model.network.use_dino_patches=false", f"data.root={trained / 'images'}", f"run_dir={tmp_path / 'cls'}"]
    train.run(compose("train", [*SMALL, *run, "max_steps=1"]))
    Image.new("L", (60, 40), 255).save(tmp_path / "mask.png")
    own = [f"checkpoint={tmp_path / 'cls'}", f"image={trained / 'one.png'}", f"run_dir={tmp_path / 'out'}"]
    for override in (f"image_mask={tmp_path / 'mask.png'}", "cls_scale=2"):
        with pytest.raises(ValueError, match=f"{override.split('=')[0]} has no effect: this model was trained without"):
            sample.run(compose("sample", [*own, override]))


def test_an_image_is_turned_as_its_camera_says(
    drawn: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    upright = Image.open(trained / "one.png").transpose(Image.Transpose.ROTATE_90)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # readers rotate it back to the right
    upright.save(tmp_path / "turned.png", exif=exif)
    straight, turned = (
        drawn(f"image={path}", name=path.stem) for path in (trained / "one.png", tmp_path / "turned.png")
    )
    assert turned["size"] == straight["size"] == [24, 16]
    assert np.array_equal(pixels(turned["images"][0]), pixels(straight["images"][0]))

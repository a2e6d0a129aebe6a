"""Distances between sets of images: known values, and sensitivity to grain and to missing variety."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from image_sets import SQUARE, WIDE, small_encoders, write_images, write_tiny_clip
from torch.utils._python_dispatch import TorchDispatchMode

from keygrip.data.image_text.datamodule import ImageShards
from keygrip.evaluation import image_features, image_statistics
from keygrip.evaluation.image_captions import ClipSimilarity
from keygrip.evaluation.image_features import FeatureOptions, train_encoder
from keygrip.evaluation.image_report import (
    QUALITY,
    SCALES_PARETO,
    SHARES_PARETO,
    best_pair,
    curves,
    markdown,
    pareto,
    shortcomings,
)
from keygrip.evaluation.image_statistics import cmmd, frechet_distance, grain, precision_recall, set_figures
from keygrip.evaluation.known_features import clip_pixels, fid_inception, known_encoder


def normal(count: int, seed: int, shift: float = 0.0, spread: float = 1.0, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread + shift


def test_frechet_distance_of_known_distributions() -> None:
    """Means differ by 2 in each of 4 axes: 16. Standard deviations of 1 and 3: 4 axes of (3 - 1)^2, 16 more."""
    left = normal(5000, 0)
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(left, normal(5000, 1)) == pytest.approx(0, abs=0.02)
    assert frechet_distance(left, normal(5000, 1, 2.0)) == pytest.approx(16, rel=0.05)
    assert frechet_distance(left, normal(5000, 1, 2.0, 3.0)) == pytest.approx(32, rel=0.05)


def test_frechet_distance_equals_the_formula_with_a_matrix_root() -> None:
    """This also holds with fewer images than features."""
    mix = normal(6, 7, width=6).double()
    left, right = normal(50, 0, width=6).double() @ mix, normal(40, 1, 0.5, width=6).double()
    covariances = [torch.cov(values.T) for values in (left, right)]
    product = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    means = (left.mean(0) - right.mean(0)).pow(2).sum()
    expected = float(means + covariances[0].trace() + covariances[1].trace() - 2 * product)
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(left[:4], right[:3]) > 0


def test_cmmd_is_zero_for_one_distribution_and_grows() -> None:
    left = normal(300, 0, 1.0)
    values = [cmmd(left, normal(300, 1, shift)) for shift in (1.0, 0.5, -1.0)]
    assert abs(values[0]) < 0.1
    assert values[0] < values[1] < values[2]
    assert cmmd(left, 7 * left) == pytest.approx(cmmd(left, left), abs=1e-9)  # directions count, lengths do not


def test_cmmd_is_the_sum_of_its_definition() -> None:
    """Embeddings of length 1, bandwidth 10, a factor of 1000, and no pairs of an image with itself."""
    left, right = normal(5, 0), normal(7, 1, 0.5)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a / a.norm() - b / b.norm()).double().pow(2).sum()) / (2 * 10**2))

    def mean(first: torch.Tensor, second: torch.Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if not (same and i == j)]
        return sum(kernel(first[i], second[j]) for i, j in pairs) / len(pairs)

    expected = 1000 * (mean(left, left, True) + mean(right, right, True) - 2 * mean(left, right, False))
    assert cmmd(left, right) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 0.5


def test_precision_and_recall_tell_quality_from_variety() -> None:
    real = normal(200, 0)
    assert min(precision_recall(normal(200, 1), real)) > 0.75
    few_kinds = normal(200, 2, 0.0, 0.1)
    precision, recall = precision_recall(few_kinds, real)
    assert precision > 0.95
    assert recall < 0.3
    assert precision_recall(real + 50, real) == (0.0, 0.0)


class Largest(TorchDispatchMode):
    """Number of values of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            self.numbers = max(self.numbers, value.numel() if isinstance(value, torch.Tensor) else 0)
        return found


def test_large_sets_are_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """All distances between 50 000 images, the usual number for the FID, would take 20 GB several times over."""
    left, right = normal(900, 0), normal(700, 1, 0.5)
    whole = set_figures(left, right)
    monkeypatch.setattr(image_statistics, "ROWS", 64)
    with Largest() as largest:
        assert set_figures(left, right) == pytest.approx(whole, abs=2e-5)
    assert largest.numbers <= 64 * 900


def test_grain_sees_noise_and_not_edges_or_shading() -> None:
    shaded = torch.linspace(0, 1, 32).expand(1, 3, 32, 32).clone()
    shaded[..., 8:20, 8:20] = 0.2
    noisy = (shaded + 0.03 * torch.randn(shaded.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert float(grain(shaded)) < 0.6
    assert 3 < float(grain(noisy)) < 10
    assert grain(torch.cat([shaded, noisy])).shape == (2,)


def test_too_few_images_leave_figures_out() -> None:
    real = normal(10, 0)
    assert set(set_figures(normal(10, 1), real)) == {"frechet", "cmmd", "precision", "recall"}
    assert set(set_figures(normal(3, 1), real)) == {"frechet", "cmmd"}
    assert not set_figures(normal(1, 1), real)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(real[:1], real)


def test_an_encoder_without_labels_is_always_trained_to_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((96, 3, 32, 32), 180, dtype=torch.uint8)
    for image in images:
        x, y = torch.randint(2, 22, (2,), generator=generator).tolist()
        image[:, y : y + 8, x : x + 8] = torch.randint(0, 160, (3, 1, 1), generator=generator, dtype=torch.uint8)
    options = FeatureOptions(width=8, steps=25, batch_size=16)
    network = train_encoder([images[:64]], options)
    again = train_encoder([images[:64]], options)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        features = network(images[64:].float() / 255)
    assert features.shape == (32, 12 * 8)
    assert torch.isfinite(features).all()
    assert features.std(dim=0).mean() > 1e-3  # features differ between images


def test_the_encoder_is_trained_on_so_many_images_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are chosen evenly from all buckets. The limit is part of the encoder's fingerprint if it leaves images
    out."""
    data = ImageShards(batch_size=3, root=write_images(tmp_path, {SQUARE: 8, WIDE: 4}, small_encoders()), num_workers=0)
    data.setup()
    seen: list[list[int]] = []
    train = image_features.train_encoder

    def noted(images: list[torch.Tensor], options: FeatureOptions) -> image_features.SmallEncoder:
        seen.append([len(part) for part in images])
        return train(images, options)

    monkeypatch.setattr(image_features, "train_encoder", noted)
    names = [
        image_features.feature_encoder(
            data, small_encoders(), FeatureOptions(width=8, steps=1, batch_size=4, training_images=most)
        ).name
        for most in (6, 12, 100, 6)
    ]
    assert seen == [[4, 2], [8, 4]]  # the third and the fourth encoder are cached
    assert names[0] == names[3] != names[1] == names[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training_images": 0}, "at least 1"),
        ({"kind": "vgg"}, "choose trained"),
        ({"kind": "inception"}, "name its file"),
        ({"weights": "a.pt"}, "leave weights out"),
        ({"steps": 0}, "at least 1"),
        ({"variant": "dinov3_vitb16"}, "variant is of dinov3 and has no effect with features.kind=trained"),
        ({"kind": "clip", "weights": "a", "steps": 9}, "steps is of an encoder trained here and has no effect"),
    ],
)
def test_feature_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureOptions(**options)  # type: ignore[arg-type]


def test_the_report_says_first_what_is_wrong() -> None:
    good = {"frechet": 1.2, "grain": 1.1, "ssim": 0.9, "cube_within_4px": 1.0, "colour_as_asked": 1.0}
    real = {"frechet": 1.0, "grain": 1.0}
    assert not shortcomings({"reconstruction": good, "real": real})
    found = shortcomings(
        {"reconstruction": good | {"grain": 4.0, "ssim": 0.45}, "real": real, "unrelated_image": {"ssim": 0.69}}
    )
    assert found == [
        "The grain of reconstructions is 4, 4 times that of real images (1).",
        "The SSIM of reconstructions is 0.45, below 0.80; that of an unrelated real image is 0.69.",
    ]


def test_training_images_are_no_anchor_of_their_own_distance() -> None:
    """They are among the images that sets are compared with. Their own distance is small, so any other set would seem
    far away."""
    cases = {"reconstruction": {"frechet": 9.0, "grain": 4.0}, "real": {"frechet": 0.01, "grain": 1.0}}
    assert len(shortcomings(cases)) == 2
    assert shortcomings(cases, "train") == ["The grain of reconstructions is 4, 4 times that of real images (1)."]
    figures: dict[str, Any] = {"cases": cases, "sampling": {}, "features": {"name": "own", "sha256": "0"}}
    figures |= {"classifier": None, "lpips_note": "", "scales": [], "word_scales": [], "steps": []}
    figures["drawn_in"] = "32-true"
    held_out, trained_on = (markdown(figures | {"split": split}, []) for split in ("test", "train"))
    assert "9, 900 times" in held_out
    assert "how far real held-out images are" in held_out
    assert "900 times" not in trained_on
    assert "`real` is no anchor" in trained_on


def test_too_little_grain_is_wrong_too() -> None:
    real = {"frechet": 1.0, "grain": 2.0}
    found = shortcomings({"reconstruction": {"frechet": 0.1, "grain": 1.5}, "real": real})
    assert found == ["The grain of reconstructions is 1.5, 0.75 times that of real images (2)."]


def test_pareto_rows() -> None:
    rows = [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"a": 0.4, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    assert pareto(rows, ("a", "b")) == [0, 1, 3]
    assert pareto([{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}, {"a": 2.0, "b": 4.0}], ("-a", "-b")) == [0, 1]


def test_curves_weigh_what_was_measured() -> None:
    """They show colour against position where a classifier measured both; otherwise similarity to the caption, or the
    distance of the sets, against likeness."""
    scales = [{"text_scale": t, "dino_scale": 1.0, "frechet": 2.0 + t, "dino_distance": 0.3 / t} for t in (1.0, 2.0)]
    assert best_pair(scales, SCALES_PARETO) == (("-frechet", "-dino_distance"), [0, 1])
    read = [{**row, "clip_similarity": 0.2} for row in scales]
    assert best_pair(read, SCALES_PARETO) == (("clip_similarity", "-dino_distance"), [1])
    judged = [{**row, "colour_as_asked": row["text_scale"] / 2, "cube_within_4px": 1.0} for row in scales]
    assert best_pair(judged, SCALES_PARETO) == (SHARES_PARETO, [1])
    assert best_pair([{"text_scale": 1.0}], SCALES_PARETO) is None
    assert best_pair([], SCALES_PARETO) is None
    steps = [{"case": "text_only", "steps": n, "evaluations": 2 * n, "frechet": 8 / n} for n in (4, 8)]
    words = [{"text_scale": t, "frechet": 2.0 - t / 4, "grain_off": t} for t in (1.0, 2.0)]
    for given in ((scales, [], steps), ([], words, steps), (judged, words, [])):
        figures = dict(zip(("scales", "word_scales", "steps"), given, strict=True)) | {"real_grid": {"frechet": 0.5}}
        assert curves(figures).startswith(b"\x89PNG")


def test_where_all_shares_are_one_quality_decides() -> None:
    """Three pairs of scales draw every colour in its place, one does not: of the three, those nearest to real images
    are chosen."""
    best = {"colour_as_asked": 1.0, "cube_within_4px": 1.0}
    rows = [
        {**best, "frechet": 2.0, "grain_off": 0.1},
        {**best, "frechet": 1.0, "grain_off": 0.5},
        {"colour_as_asked": 0.9, "cube_within_4px": 1.0, "frechet": 0.1, "grain_off": 0.0},
        {**best, "frechet": 3.0, "grain_off": 0.4},
    ]
    assert best_pair(rows, SCALES_PARETO) == (QUALITY, [0, 1])
    assert best_pair(rows[1:3], SCALES_PARETO) == (SHARES_PARETO, [0])
    assert best_pair([{name: row[name] for name in best} for row in rows], SCALES_PARETO) == (SHARES_PARETO, [0, 1, 3])


# ---- known encoders --------------------------------------------------------------------------------------------------


def test_inception_is_that_of_the_fid_where_its_weights_are() -> None:
    """Average pooling at a border leaves the padding out, and the last block uses max pooling: a constant image stays
    constant after each of these branches."""
    torch.manual_seed(0)
    network = fid_inception().eval()
    names = set(network.state_dict())
    assert "Mixed_7c.branch_pool.conv.weight" in names
    assert not any(name.startswith("AuxLogits") for name in names)
    assert network.fc.weight.shape == (1008, 2048)
    for name, channels in (("Mixed_5b", 192), ("Mixed_6b", 768), ("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        block = getattr(network, name)
        with torch.no_grad():
            found = block(torch.ones(1, channels, 5, 5))
            branch = block.branch_pool(torch.ones(1, channels, 5, 5))
            assert torch.allclose(found[:, -branch.shape[1] :], branch, atol=1e-6)
            edge = torch.zeros(1, channels, 5, 5)
            edge[..., 0, 0] = 1.0
            told = block.branch_pool(edge[..., :1, :1] * (1.0 if name == "Mixed_7c" else 0.25))
            assert torch.allclose(block(edge)[:, -branch.shape[1] :, :1, :1], told, atol=1e-5)


def test_clip_gives_its_projected_embedding(tmp_path: Path) -> None:
    """A small CLIP with random weights: images of any size are embedded whole, and the hash of the weights is
    returned."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=6,
    )
    whole = transformers.CLIPVisionModelWithProjection(config)
    whole.half().save_pretrained(tmp_path / "half")
    whole.float().save_pretrained(tmp_path)  # the same values
    features, name, sha256 = known_encoder("clip", tmp_path, "")
    images = torch.rand(2, 3, 20, 30)
    found = features(images)
    assert found.shape == (2, 6)
    assert torch.equal(known_encoder("clip", tmp_path / "half", "")[0](images), found)  # in float32 as well
    assert name == f"clip {tmp_path.name}"
    assert len(sha256) == 64
    with pytest.raises(FileNotFoundError, match=r"of clip a folder with config\.json"):
        known_encoder("clip", tmp_path / "none", "")
    with pytest.raises(ValueError, match="holds no CLIPModel"):
        ClipSimilarity(tmp_path)
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="neither the FID's"):
        known_encoder("inception", tmp_path / "x.pth", "")


def test_clip_is_read_from_pytorchs_own_file_too(tmp_path: Path) -> None:
    """The published CLIP on which CMMD is defined has no other weights. Only tensors are read, and nothing in the file
    is executed."""
    pytest.importorskip("transformers")
    clip, _ = write_tiny_clip(tmp_path)
    images, captions = torch.rand(2, 3, 20, 30), ["a red cube", "a blue one"]
    expected = known_encoder("clip", tmp_path, "")[0](images), ClipSimilarity(tmp_path)(images, captions)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights that cannot be read as safetensors .*: copy them again"):
        ClipSimilarity(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file, hashes = tmp_path / "pytorch_model.bin", set()
    for _ in range(2):
        torch.save(clip.state_dict(), file)
        features, _, sha256 = known_encoder("clip", tmp_path, "")
        similarity = ClipSimilarity(tmp_path)
        torch.testing.assert_close((features(images), similarity(images, captions)), expected)
        assert similarity.sha256 == sha256
        hashes.add(sha256)
        clip.visual_projection.weight.data *= 2  # the cosine does not depend on it
        expected = 2 * expected[0], expected[1]
    assert len(hashes) == 2
    torch.save({**clip.state_dict(), "more": _Touch(tmp_path / "executed")}, file)
    with pytest.raises(ValueError, match="more than tensors, which keygrip does not execute"):
        ClipSimilarity(tmp_path)
    assert not (tmp_path / "executed").exists()
    for content, reason in ((b"", "holds no CLIPModel of transformers: "), (b"<html>", "damaged, or holds more than")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            ClipSimilarity(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds no CLIPModel of .*model\.safetensors, or pytorch_model\.bin"):
        ClipSimilarity(tmp_path)


class _Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_images_are_compared_with_their_captions_as_clip_itself_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    clip, tokenizer = write_tiny_clip(tmp_path)
    images, captions = torch.rand(3, 3, 20, 30), ["a red cube", " ", "Blue, " + "a b " * 60]
    found = ClipSimilarity(tmp_path)(images, captions)
    assert found.shape == (2,)  # a blank caption is left out
    words = tokenizer([captions[0], captions[2]], padding=True, truncation=True, max_length=77, return_tensors="pt")
    logits = clip(**words, pixel_values=clip_pixels(images[[0, 2]], 28)).logits_per_image
    torch.testing.assert_close(found, (logits.diag() / clip.logit_scale.exp()).detach())
    assert known_encoder("clip", tmp_path, "")[0](images).shape == (3, 6)
    assert ClipSimilarity(tmp_path)(images, ["", "", ""]).shape == (0,)
    file = tmp_path / "tokenizer.json"
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 999}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": growing}))
    with pytest.raises(ValueError, match=r"holds no CLIPTokenizer of transformers: .*may make \d+ characters"):
        ClipSimilarity(tmp_path)


def test_precision_and_recall_by_hand() -> None:
    real, drawn = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [30.0], [31.0]])
    precision, recall = precision_recall(drawn, real, neighbours=1)  # radii of real: 1, 1, 9; of drawn: 28.5, 1, 1
    assert (precision, recall) == (pytest.approx(1 / 3), 1.0)

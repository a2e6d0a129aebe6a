"""Weights from every format, compared with transformers' own models; each known trap has a test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from keygrip.models.backbone import VARIANTS, DinoBackbone
from keygrip.models.backbone.architectures import resample_positions

SIZES = {"width": 64, "depth": 3, "heads": 4}
V3 = [("dinov3_vits16", False), ("dinov3_vits16plus", True)]
V2 = [("dinov2_vits14", False), ("dinov2_vits14_reg", True)]


def assert_same_features(backbone, model, picture, tolerance=2e-5):
    with torch.no_grad():
        ours, theirs = backbone(picture), model(pixel_values=picture).last_hidden_state
    prefix = backbone.num_prefix_tokens
    torch.testing.assert_close(ours.prefix, theirs[:, :prefix], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.patches, theirs[:, prefix:], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("variant", "gated"), V3)
@pytest.mark.parametrize("wrapping", ["release", "teacher", "nested teacher", "chunked teacher", "safetensors"])
def test_meta_dinov3_files_give_transformers_features(
    small, hf_v3, formats, images, saved, tmp_path, variant, gated, wrapping
):
    model = hf_v3(gated)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    if wrapping == "release":
        path = saved(state)
    elif wrapping == "safetensors":
        path = str(tmp_path / "weights.safetensors")
        save_file(state, path)
    else:
        if wrapping == "chunked teacher":
            state = {
                key.replace("blocks.0.", "blocks.0.0.")
                .replace("blocks.1.", "blocks.0.1.")
                .replace("blocks.2.", "blocks.1.2."): v
                for key, v in state.items()
            }
        teacher = {f"backbone.{key}": value for key, value in state.items()} | {
            "dino_head.mlp.0.weight": torch.ones(2, 2)
        }
        if wrapping == "nested teacher":
            path = saved({"teacher": teacher, "iteration": 7})
        else:
            path = saved({f"teacher.{key}": value for key, value in teacher.items()})
    backbone = small(variant, path)
    assert_same_features(backbone, model, images(96, 128))
    assert backbone.loaded_weights.startswith(path)


@pytest.mark.parametrize(("variant", "registers"), V2)
@pytest.mark.parametrize("wrapping", ["release", "teacher"])
def test_meta_dinov2_files_give_transformers_features(
    small, hf_v2, formats, images, saved, variant, registers, wrapping
):
    model = hf_v2(registers)
    state = formats["meta_v2"](model)
    if wrapping == "teacher":
        state = {"teacher": {f"backbone.{key}": value for key, value in state.items()}}
    backbone = small(variant, saved(state))
    assert_same_features(backbone, model, images(518, 518), tolerance=5e-5)


@pytest.mark.parametrize(("variant", "gated"), V3)
def test_hugging_face_dinov3(small, hf_v3, formats, images, tmp_path, variant, gated):
    model = hf_v3(gated)
    model.save_pretrained(tmp_path)
    backbone = small(variant, str(tmp_path))
    picture = images(96, 128)
    unrounded = model(pixel_values=picture).last_hidden_state
    # transformers does not round the rotary periods; with Meta's rounded periods its features equal ours.
    formats["round_rope"](model)
    assert_same_features(backbone, model, picture)
    assert (model(pixel_values=picture).last_hidden_state - unrounded).abs().max() > 5e-5


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [False, True])
def test_hugging_face_folders_whole_and_in_shards(small, hf_v3, images, tmp_path, kind, shards):
    model = hf_v3(False)
    model.save_pretrained(tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    folder, name = tmp_path / "folder", "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    save = save_file if kind == "safetensors" else torch.save
    if kind == "safetensors" and shards:
        model.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    elif shards:
        folder.mkdir()
        keys = list(state)
        files = {f"pytorch_model-0000{i + 1}-of-00002.bin": keys[i::2] for i in range(2)}
        for file, own in files.items():
            save({key: state[key] for key in own}, folder / file)
        index = {"weight_map": {key: file for file, own in files.items() for key in own}}
        (folder / f"{name}.index.json").write_text(json.dumps(index))
    else:
        folder.mkdir()
        save(state, folder / name)
    backbone, picture = small("dinov3_vits16", str(folder)), images(96, 128)
    whole = small("dinov3_vits16", str(tmp_path / "whole"))
    torch.testing.assert_close(backbone(picture).patches, whole(picture).patches, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (
            '{"weight_map": {"a": "../secret.bin"}}',
            ValueError,
            r"names '\.\./secret\.bin', which is no weights file of",
        ),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', ValueError, "which is no weights file of its own"),
        ('{"weight_map": {"a": "gone.safetensors"}}', FileNotFoundError, "gone.safetensors, which does not lie beside"),
        ('{"weight_map": {"a": 3, "b": "c"}}', ValueError, "is no index of weights"),
        ("[]", ValueError, "is no index of weights"),
        ('{"weight_map": {}}', ValueError, r"is no index of weights \(its weight_map is empty\); download it again"),
    ],
)
def test_an_index_names_files_of_its_own_folder(small, tmp_path, text, error, said):
    (tmp_path / "secret.bin").write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(error, match=said):
        small("dinov3_vits16", str(folder))


def test_a_folder_without_weights_names_each_place_once(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for checkpoints/last\.ckpt, last\.ckpt, model\.safetensors, "):
        small("dinov3_vits16", str(tmp_path))


@pytest.mark.parametrize(("variant", "registers"), V2)
def test_hugging_face_dinov2(small, hf_v2, images, tmp_path, variant, registers):
    model = hf_v2(registers)
    model.save_pretrained(tmp_path)
    backbone = small(variant, str(tmp_path))
    assert_same_features(backbone, model, images(518, 518), tolerance=5e-5)


def test_hugging_face_dinov2_with_both_spellings_of_the_projections(small, hf_v2, images, tmp_path):
    """The names of the query projection changed between transformers releases; both are read."""
    model = hf_v2(False)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    new = {
        key.replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj"): value
        for key, value in state.items()
    }
    old = {
        key.replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense"): value
        for key, value in state.items()
    }
    assert old.keys() != new.keys()
    for number, spelling in enumerate((old, new)):
        path = tmp_path / f"{number}.safetensors"
        save_file(spelling, path)
        assert_same_features(small("dinov2_vits14", str(path)), model, images(518, 518), tolerance=5e-5)


@pytest.mark.parametrize("variant", ["dinov3_vits16", "dinov3_vits16plus", "dinov2_vits14", "dinov2_vits14_reg"])
def test_timm_files(small, images, tmp_path, variant):
    source = small(variant)
    state = {key: value.clone() for key, value in source.net.state_dict().items() if key != "rope.periods"}
    path = str(tmp_path / "timm.safetensors")
    save_file(state, path)
    picture = images(source.image_size, source.image_size)
    torch.testing.assert_close(small(variant, path)(picture).patches, source(picture).patches, rtol=0, atol=0)


# ---------------------------------------------------------------------- traps


def test_trap_query_and_value_biases_count(small, hf_v3, formats, images, saved):
    model = hf_v3(False)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    picture = images(96, 96)
    with_biases = small("dinov3_vits16", saved(state, "a.pth"))(picture).patches
    for key in state:
        if key.endswith("qkv.bias"):
            state[key] = torch.zeros_like(state[key])
    without = small("dinov3_vits16", saved(state, "b.pth"))(picture).patches
    assert (with_biases - without).abs().max() > 0.1


def test_trap_key_biases_that_count_are_refused(small, hf_v3, formats, saved):
    model = hf_v3(False)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    del state["blocks.1.attn.qkv.bias_mask"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias has key biases"):
        small("dinov3_vits16", saved(state))


def test_trap_weights_of_satellite_images_are_refused(small, hf_v3, formats, saved, tmp_path):
    """They were trained with other pixel statistics than ImageNet's, and all images here are normalised with
    ImageNet's."""
    model = hf_v3(False)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    satellite = state | {f"local_cls_norm.{name}": torch.ones(64) for name in ("weight", "bias")}
    said = r"weights of satellite images \(SAT-493M\), for images of mean \(0\.430, 0\.411, 0\.296\)"
    with pytest.raises(ValueError, match=said):
        small("dinov3_vits16", saved(satellite))
    with pytest.raises(ValueError, match=said):
        small("dinov3_vits16", saved(state, "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"))
    model.save_pretrained(tmp_path / "dinov3-vitl16-pretrain-sat493m")
    with pytest.raises(ValueError, match=said):
        small("dinov3_vits16", str(tmp_path / "dinov3-vitl16-pretrain-sat493m"))
    cached = "models--timm--vit_large_patch16_dinov3.sat493m/snapshots/0123/model.pth"  # a path in the hub's cache
    with pytest.raises(ValueError, match=said):
        small("dinov3_vits16", saved(state, cached))
    with pytest.raises(ValueError, match=f"{said}.*, or rename what is called sat493m if these are others"):
        small("dinov3_vits16", saved(state, "weights/sat493m/vitl16/model.pth"))
    own = small("dinov3_vits16", saved({f"teacher.backbone.{name}": value for name, value in satellite.items()}))
    assert "training file" in own.loaded_weights  # trained on any images


def test_trap_rotary_periods_come_from_the_file_and_survive_casts(small, hf_v3, formats, images, saved):
    model = hf_v3(False)
    periods = formats["round_rope"](model)
    unusual = (periods.float() * 1.5).bfloat16()
    state = formats["meta_v3"](model, unusual)
    backbone = small("dinov3_vits16", saved(state))
    rope = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    rope.inv_freq = 1.0 / unusual.float()
    assert_same_features(backbone, model, images(96, 128))

    wanted = unusual.float()
    assert torch.equal(backbone.net.rope.periods, wanted)
    parent = torch.nn.Sequential(backbone)
    for cast in (parent.bfloat16, parent.half, parent.double, parent.float):
        cast()
        assert torch.equal(backbone.net.rope.periods, wanted)
        assert backbone.net.rope.periods.dtype == torch.float32

    # A wrapper that casts buffers itself loses nothing: angles are computed in float32 again.
    backbone.net.rope.periods = wanted.bfloat16()
    assert_same_features(small("dinov3_vits16", saved(state)), model, images(96, 128))
    backbone(images(96, 96))
    assert torch.equal(backbone.net.rope.periods, wanted)
    assert backbone.net.rope.periods.dtype == torch.float32


def test_trap_rotary_periods_travel_in_checkpoints(small, hf_v3, formats, images, saved):
    """A model that is rebuilt with random weights and loaded from its own state dict must have the file's periods."""
    model = hf_v3(False)
    unusual = (formats["round_rope"](model).float() * 1.5).bfloat16()
    loaded = small("dinov3_vits16", saved(formats["meta_v3"](model, unusual)))
    rebuilt = small("dinov3_vits16")
    rebuilt.load_state_dict(loaded.state_dict())
    picture = images(96, 96)
    assert torch.equal(rebuilt(picture).patches, loaded(picture).patches)


def test_periods_of_random_weights_are_metas():
    backbone = DinoBackbone("dinov3_vits16", 96, "random", depth=1)
    exact = 100.0 ** (torch.arange(16) / 16)
    assert torch.equal(backbone.net.rope.periods, exact.bfloat16().float())
    assert not torch.equal(backbone.net.rope.periods, exact)


@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (40, 9)])
def test_trap_position_table_is_resampled_as_meta_does(small, images, grid):
    """Compared with Meta's rule: an offset of 0.1 in the scale, bicubic, no antialiasing; timm's rule differs
    clearly."""
    backbone = small("dinov2_vits14")
    table = backbone.net.pos_embed[:, 1:]
    square = table.reshape(1, 37, 37, 64).permute(0, 3, 1, 2)
    scale = [(side + 0.1) / 37 for side in grid]
    wanted = functional.interpolate(square, scale_factor=scale, mode="bicubic", antialias=False)
    wanted = wanted.permute(0, 2, 3, 1).reshape(1, -1, 64)
    seen = []
    backbone.net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    picture = images(14 * grid[0], 14 * grid[1])
    backbone(picture)
    embedded = backbone.net.patch_embed(picture).flatten(1, 2)
    torch.testing.assert_close(seen[0][:, 1:] - embedded, wanted.expand(2, -1, -1), rtol=0, atol=1e-5)

    timms_way = resample_positions(table, grid, offset=0.0, antialias=True)
    assert (timms_way - wanted).abs().max() > 0.01


def test_register_models_resample_with_antialiasing_as_transformers_does(small, hf_v2, formats, images, saved):
    model = hf_v2(True)
    backbone = small("dinov2_vits14_reg", saved(formats["meta_v2"](model)))
    assert_same_features(backbone, model, images(14 * 12, 14 * 20))


def test_position_tables_of_other_trainings_are_taken_as_they_are(small, hf_v2, formats, images, saved):
    """A teacher trained at 224 has 16 x 16 positions, which loading does not resample and checkpoints keep."""
    for variant, registers in V2:
        state = formats["meta_v2"](hf_v2(registers))
        state["pos_embed"] = torch.randn(1, 257, 64)
        teacher = {f"teacher.backbone.{key}": value for key, value in state.items()}
        backbone = small(variant, saved(teacher))
        stored = backbone.net.pos_embed if registers else backbone.net.pos_embed[:, 1:]
        assert torch.equal(stored, state["pos_embed"][:, 1:])
        picture = images(224, 224)
        rebuilt = small(variant)
        rebuilt.load_state_dict(backbone.state_dict())
        assert torch.equal(rebuilt(picture).patches, backbone(picture).patches)


def test_loading_leaves_the_tensors_it_was_given(small, hf_v2, formats, saved):
    """timm's conversion removes entries from its argument: loading the same dictionary twice must work too."""
    from keygrip.models.backbone.weights import _to_timm

    state = formats["meta_v2"](hf_v2(True))
    before = set(state)
    network = small("dinov2_vits14_reg").net
    first = _to_timm(state, network, VARIANTS["dinov2_vits14_reg"], "x", "y")
    assert set(state) == before
    assert first.keys() == _to_timm(state, network, VARIANTS["dinov2_vits14_reg"], "x", "y").keys()


# ---------------------------------------------------------------------- keygrip checkpoints


@pytest.mark.parametrize("variant", ["tiny", "dinov3_vits16", "dinov2_vits14"])
def test_run_folders_and_checkpoints_are_sources(small, images, saved, tmp_path, variant):
    source = small(variant)
    state = {f"network.backbone.{key}": value for key, value in source.state_dict().items()}
    state["network.head.weight"] = torch.ones(3, 3)
    other = {key: value + 1 for key, value in state.items()}
    picture = images(source.image_size, source.image_size)
    path = saved({"state_dict": state, "epoch": 3}, "run/checkpoints/last.ckpt")
    saved({"state_dict": other}, "run/checkpoints/step-10.ckpt")
    for weights in (path, str(tmp_path / "run")):
        assert torch.equal(small(variant, weights)(picture).patches, source(picture).patches)
    assert not torch.equal(
        small(variant, str(tmp_path / "run/checkpoints/step-10.ckpt"))(picture).patches, source(picture).patches
    )
    ema = saved({"state_dict": other, "ema": {"updates": 2, "parameters": state}}, "ema.ckpt")  # preferred
    assert torch.equal(small(variant, ema)(picture).patches, source(picture).patches)
    with pytest.raises(ValueError, match=r"old\.ckpt has format 2 and this keygrip reads"):
        small(variant, saved({"keygrip": {"format": 2}, "state_dict": state}, "old.ckpt"))


def test_a_folder_of_several_runs_is_asked_which(small, images, saved, tmp_path):
    source = small("tiny")
    state = {f"network.backbone.{key}": value for key, value in source.state_dict().items()}
    only = saved({"state_dict": state}, "runs/a/checkpoints/step-10.ckpt")
    picture = images(96, 96)
    assert torch.equal(small("tiny", str(tmp_path / "runs"))(picture).cls, source(picture).cls)
    newest = saved({"state_dict": {key: value + 1 for key, value in state.items()}}, "runs/b/checkpoints/last.ckpt")
    os.utime(only, (1, 1))
    assert not torch.equal(small("tiny", newest)(picture).cls, source(picture).cls)
    with pytest.raises(ValueError, match=r"2 other checkpoints: name one of them \(a/[^,]*step-10\.ckpt, b/[^,]*\)"):
        small("tiny", str(tmp_path / "runs"))
    for name in "cde":
        saved({"state_dict": state}, f"runs/{name}/checkpoints/step-10.ckpt")
    with pytest.raises(ValueError, match=r"5 other checkpoints: .* d/checkpoints/step-10\.ckpt, \.\.\.\)"):
        small("tiny", str(tmp_path / "runs"))


def test_several_backbones_in_one_checkpoint_must_be_told_apart(small, images, saved):
    one, two = small("tiny"), small("tiny")
    with torch.no_grad():
        two.net.cls_token += 1
    state = {f"network.backbone.{key}": value for key, value in one.state_dict().items()}
    state |= {f"ema.backbone.{key}": value for key, value in two.state_dict().items()}
    path = saved({"state_dict": state})
    with pytest.raises(ValueError, match=r"several backbones that differ: ema\.backbone\., network\.backbone\."):
        small("tiny", path)
    picture = images(96, 96)
    assert torch.equal(small("tiny", path, weights_prefix="ema.backbone.")(picture).cls, two(picture).cls)
    with pytest.raises(ValueError, match=r"no backbone under backbone\.weights_prefix=x\."):
        small("tiny", path, weights_prefix="x.")


# ---------------------------------------------------------------------- sources and their errors


def test_pretrained_looks_where_it_says_in_that_order(small, hf_v3, formats, images, saved, tmp_path, monkeypatch):
    model = hf_v3(False)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    shifted = {key: value + 0.5 if key == "cls_token" else value for key, value in state.items()}
    first, second = saved(state, "first.pth"), saved(shifted, "second.pth")
    official = f"repo/weights/{VARIANTS['dinov3_vits16'].official_file}"
    third = saved({**state, "cls_token": state["cls_token"] - 0.5}, official)

    def cls(**options: str) -> torch.Tensor:
        return small("dinov3_vits16", "pretrained", **options).net.cls_token.detach()

    monkeypatch.setenv("DINO_REPO_DIR", str(tmp_path / "repo"))
    assert torch.equal(cls(), state["cls_token"] - 0.5)
    assert small("dinov3_vits16", "pretrained").loaded_weights.startswith(third)
    monkeypatch.setenv("DINO_WEIGHTS_PATH", second)
    assert torch.equal(cls(), state["cls_token"] + 0.5)
    assert torch.equal(cls(weights_path=first), state["cls_token"])
    assert small("dinov3_vits16", "random").loaded_weights == "random"


def test_pretrained_without_a_network_says_what_to_download_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.delenv("DINO_REPO_DIR", raising=False)

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nlong story")

    monkeypatch.setattr("keygrip.hub_network.unreachable", lambda: None)
    monkeypatch.setattr("keygrip.models.backbone.weights.load_state_dict_from_hf", no_network)
    with pytest.raises(FileNotFoundError) as caught:
        DinoBackbone("dinov3_vits16plus", 448, "pretrained")
    text = str(caught.value)
    for part in (
        "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        "https://ai.meta.com/",
        "DINO_WEIGHTS_PATH",
        "backbone.weights_path",
        "no route to host",
    ):
        assert part in text
    assert "\n" not in text

    monkeypatch.setenv("DINO_REPO_DIR", str(tmp_path))  # a checkout without the file: no random weights
    with pytest.raises(FileNotFoundError, match="cannot get the weights of dinov2_vits14 from the hub"):
        DinoBackbone("dinov2_vits14", 224, "pretrained")


def test_hub_weights_are_timms_and_loaded_strictly(small, monkeypatch):
    source = DinoBackbone("dinov2_vits14", 224, "random", depth=12)
    state = dict(source.net.state_dict())
    asked = []

    def hub(name: str, weights_only: bool) -> dict[str, torch.Tensor]:
        asked.append((name, weights_only))
        return dict(state)

    monkeypatch.delenv("DINO_REPO_DIR", raising=False)
    monkeypatch.setattr("keygrip.hub_network.unreachable", lambda: None)
    monkeypatch.setattr("keygrip.models.backbone.weights.load_state_dict_from_hf", hub)
    loaded = DinoBackbone("dinov2_vits14", 224, "pretrained")
    assert asked == [("timm/vit_small_patch14_dinov2.lvd142m", True)]
    assert torch.equal(loaded.net.blocks[11].attn.qkv.weight, source.net.blocks[11].attn.qkv.weight)
    del state["blocks.11.norm1.bias"]
    with pytest.raises(ValueError, match=r"missing blocks\.11\.norm1\.bias"):
        DinoBackbone("dinov2_vits14", 224, "pretrained")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("init_from", r"backbone\.init_from=.*nothing\.pth: no such file"),
        ("weights_path", r"backbone\.weights_path=.*nothing\.pth: no such file"),
        ("DINO_WEIGHTS_PATH", r"DINO_WEIGHTS_PATH=.*nothing\.pth: no such file"),
        ("DINO_REPO_DIR", r"DINO_REPO_DIR=.*nothing\.pth is not a folder"),
    ],
)
def test_a_named_source_that_is_missing_is_an_error(monkeypatch, tmp_path, setting, message):
    missing = str(tmp_path / "nothing.pth")
    options = {"weights": "random" if setting == "init_from" else "pretrained"}
    options |= {} if setting.isupper() else {setting: missing}
    if setting.isupper():
        monkeypatch.setenv(setting, missing)
    with pytest.raises(FileNotFoundError, match=message):
        DinoBackbone("dinov3_vits16", 96, **options)


def test_settings_without_effect_are_refused(small, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no effect with backbone\.weights=random"):
        small("dinov3_vits16", "random", weights_path="x.pth")
    with pytest.raises(ValueError, match=r"has no effect with random weights"):
        small("dinov3_vits16", "random", weights_prefix="network.backbone.")
    with pytest.raises(ValueError, match=r"backbone\.init_from=x\.pth and backbone\.weights=pretrained both"):
        DinoBackbone("dinov3_vits16", 96, "pretrained", init_from="x.pth")
    with pytest.raises(ValueError, match=r"weights of a file or a run are backbone\.init_from=x\.pth"):
        DinoBackbone("dinov3_vits16", 96, "x.pth")
    with pytest.raises(ValueError, match="no pretrained weights of backbone tiny"):
        DinoBackbone("tiny", 192, "pretrained")
    with pytest.raises(FileNotFoundError, match="the folder holds no weights"):
        small("dinov3_vits16", str(tmp_path / "empty"))


def test_reduced_models_have_no_hub_weights(monkeypatch):
    monkeypatch.delenv("DINO_REPO_DIR", raising=False)
    with pytest.raises(ValueError, match="another width, depth or number of heads has no pretrained weights"):
        DinoBackbone("dinov3_vits16", 96, "pretrained", depth=3)


def test_weights_of_another_model_name_the_variant_that_fits(saved):
    """Uses the real sizes, because only sizes distinguish variants; on the meta device, because values do not
    matter."""
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in DinoBackbone("dinov2_vits14", 224, "random").net.state_dict().items()
        }
    path = saved({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})

    def begun(variant):
        with torch.device("meta"):
            DinoBackbone(variant, 224, "random", init_from=path)

    with pytest.raises(ValueError, match=r"set backbone\.variant=dinov2_vits14 "):
        begun("dinov3_vits16")
    with pytest.raises(
        ValueError, match=r"width 384, 12 blocks, patch 14\) does not fit .*dinov2_vitb14; set .*dinov2_vits14"
    ):
        begun("dinov2_vitb14")
    with pytest.raises(ValueError, match=r"does not fit backbone\.variant=dinov2_vits14_reg; set .*=dinov2_vits14 "):
        begun("dinov2_vits14_reg")


def test_weights_with_a_patch_of_another_size_are_not_resampled(small, hf_v3, formats, saved):
    model = hf_v3(False)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][..., :8, :8].clone()
    with pytest.raises(ValueError, match="patch 8"):
        small("dinov3_vits16", saved(state))


def test_missing_and_surplus_tensors_are_refused(small, hf_v3, formats, saved):
    model = hf_v3(False)
    state = formats["meta_v3"](model, formats["round_rope"](model))
    surplus = {**state, "blocks.1.extra.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"surplus blocks\.1\.extra\.weight"):
        small("dinov3_vits16", saved(surplus))
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"missing norm\.bias"):
        small("dinov3_vits16", saved(state))


def test_plain_timm_files_name_those_with_biases(small, tmp_path):
    state = {k: v.clone() for k, v in small("dinov3_vits16").net.state_dict().items() if not k.endswith("_bias")}
    state.pop("rope.periods", None)
    save_file(state, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="lack the query and value biases: take those of vit_small_patch16_dinov3_qkv"):
        small("dinov3_vits16", str(tmp_path / "plain.safetensors"))


def test_unknown_files_list_their_first_tensors(small, saved, tmp_path):
    with pytest.raises(ValueError, match=r"no known DINO weights file; its first tensors are: conv1\.weight, fc\.bias"):
        small("dinov3_vits16", saved({"conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)}))
    with pytest.raises(ValueError, match="its first tensors are: none"):
        small("dinov3_vits16", saved({"epoch": 3}))
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        small("dinov3_vits16", saved([1, 2]))


def test_broken_and_dangerous_files_are_refused(small, hf_v3, formats, saved, tmp_path):
    model = hf_v3(False)
    whole = Path(saved(formats["meta_v3"](model, formats["round_rope"](model)))).read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth (cannot be read|is not a plain weights file)"):
        small("dinov3_vits16", str(cut))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        small("dinov3_vits16", str(bad))
    with pytest.raises(ValueError, match="not loaded for safety"):
        small("dinov3_vits16", saved({"call": Malicious(tmp_path / "ran")}))
    assert not (tmp_path / "ran").exists()


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


if os.environ.get("DINO_REPO_DIR"):  # a checkout of Meta's code with weights: compare with Meta's own model

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "variant",
        [
            row.name
            for row in VARIANTS.values()
            if row.official_file and (Path(os.environ["DINO_REPO_DIR"]) / "weights" / row.official_file).is_file()
        ],
    )
    def test_features_are_those_of_metas_code(variant, images):
        repository = Path(os.environ["DINO_REPO_DIR"])
        weights = repository / "weights" / str(VARIANTS[variant].official_file)
        model = torch.hub.load(str(repository), variant, source="local", weights=str(weights)).eval()
        backbone = DinoBackbone(variant, 224, "pretrained").eval()
        picture = images(224, 336)
        with torch.no_grad():
            theirs, ours = model.forward_features(picture), backbone(picture)
        torch.testing.assert_close(ours.cls, theirs["x_norm_clstoken"], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.patches, theirs["x_norm_patchtokens"], rtol=0, atol=1e-4)

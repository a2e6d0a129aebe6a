"""The real MapAnything package, with random weights and small sizes, compared with our use of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor

from keygrip.models.geometry.rotations import quaternion_to_matrix, rotation_exp
from keygrip.models.geometry_vla.feature_cache import FeatureCache
from keygrip.models.geometry_vla.mapanything import MapAnythingGeometry
from keygrip.training.memory import SMALL, count_forward

pytestmark = pytest.mark.mapanything

SIDE, PATCH, WIDTH = 42, 14, 48
VIEWS = ("over", "front", "wrist")
INFINITE = float("inf")
# As in its configs/model/mapanything.yaml (V1.1), with one layer of DINOv2-S and a multi-view transformer of four.
CONFIG: dict[str, Any] = {
    "name": "mapanything",
    "encoder_config": {
        "encoder_str": "dinov2",
        "name": "dinov2_small",
        "data_norm_type": "dinov2",
        "size": "small",
        "with_registers": False,
        "uses_torch_hub": True,
        "torch_hub_pretrained": False,
        "norm_returned_features": False,
        "keep_first_n_layers": 1,
    },
    "info_sharing_config": {
        "model_type": "alternating_attention",
        "model_return_type": "intermediate_features",
        "custom_positional_encoding": None,
        "module_args": {
            "name": "aat",
            "indices": [1, 2],
            "norm_intermediate": True,
            "depth": 4,
            "distinguish_ref_and_non_ref_views": True,
            "dim": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "qkv_bias": True,
            "qk_norm": False,
            "init_values": 0.5,
        },
    },
    "pred_head_config": {
        "type": "dpt+pose",
        "adaptor_type": "raydirs+depth+pose+confidence+mask",
        "feature_head": {"feature_dim": 16, "hooks": [0, 1, 2, 3], "checkpoint_gradient": False},
        "regressor_head": {"output_dim": 6, "checkpoint_gradient": False},
        "pose_head": {"num_resconv_block": 1, "rot_representation_dim": 4},
        "scale_head": {"output_dim": 1},
        "dpt_adaptor": {
            "name": "dense",
            "ray_directions_mode": "linear",
            "ray_directions_normalize_to_unit_sphere": True,
            "ray_directions_normalize_to_unit_image_plane": False,
            "ray_directions_vmin": -INFINITE,
            "ray_directions_vmax": INFINITE,
            "ray_directions_clamp_min_of_z_dir": False,
            "ray_directions_z_dir_min": -INFINITE,
            "depth_mode": "exp",
            "depth_vmin": 0,
            "depth_vmax": INFINITE,
            "confidence_type": "exp",
            "confidence_vmin": 1,
            "confidence_vmax": INFINITE,
        },
        "pose_adaptor": {
            "name": "pose",
            "cam_trans_mode": "linear",
            "cam_trans_vmin": -INFINITE,
            "cam_trans_vmax": INFINITE,
            "quaternions_mode": "linear",
            "quaternions_normalize": True,
            "quaternions_vmin": -INFINITE,
            "quaternions_vmax": INFINITE,
        },
        "scale_adaptor": {"name": "scale", "mode": "exp", "vmin": 1e-8, "vmax": INFINITE},
    },
    # configs/model/task/aug_training.yaml: its optional inputs are dropped at random
    "geometric_input_config": {
        "ray_dirs_encoder_config": {
            "name": "rays",
            "in_chans": 3,
            "encoder_str": "dense_rep_encoder",
            "apply_pe": False,
        },
        "depth_encoder_config": {"name": "depth", "in_chans": 1, "encoder_str": "dense_rep_encoder", "apply_pe": False},
        "cam_rot_encoder_config": {"name": "rotation", "in_chans": 4, "encoder_str": "global_rep_encoder"},
        "cam_trans_encoder_config": {"name": "translation", "in_chans": 3, "encoder_str": "global_rep_encoder"},
        "scale_encoder_config": {"name": "scale", "in_chans": 1, "encoder_str": "global_rep_encoder"},
        "overall_prob": 0.9,
        "dropout_prob": 0.05,
        "ray_dirs_prob": 0.5,
        "depth_prob": 0.5,
        "cam_prob": 0.5,
        "sparse_depth_prob": 0.5,
        "sparsification_removal_percent": 0.9,
        "depth_scale_norm_all_prob": 0.05,
        "pose_scale_norm_all_prob": 0.05,
    },
    "use_register_tokens_from_encoder": True,
    "info_sharing_mlp_layer_str": "swiglufused",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with config and weights as on the hub."""
    from mapanything.models import MapAnything

    folder = tmp_path_factory.mktemp("weights")
    text = json.dumps(CONFIG)
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    save_model(MapAnything(**json.loads(text)), str(folder / "model.safetensors"))  # it changes its argument
    return str(folder)


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Images and cameras; all cameras have different orientations and positions in the two samples."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, len(VIEWS), 3, SIDE, SIDE), generator=generator).to(torch.uint8)
    intrinsics = torch.tensor([[40.0, 0.0, 20.0], [0.0, 44.0, 22.0], [0.0, 0.0, 1.0]]).repeat(2, len(VIEWS), 1, 1)
    intrinsics[:, 1, 0, 0] = 55.0
    world_to_camera = torch.eye(4).repeat(2, len(VIEWS), 1, 1)
    turn = 2.0 * torch.randn(2, len(VIEWS), 3, generator=generator)
    world_to_camera[..., :3, :3] = quaternion_to_matrix(rotation_exp(turn))
    world_to_camera[..., :3, 3] = torch.randn(2, len(VIEWS), 3, generator=generator)
    return images, intrinsics, world_to_camera


def of_its_own_inference(model: Any, scene: tuple[Tensor, Tensor, Tensor], told: tuple[str, ...]) -> Tensor:
    """Return the tokens of the views and of the scale ``[B, G + 1, D]`` in the forward pass of `MapAnything.infer`,
    which is given the cameras of the views `told`."""
    images, intrinsics, world_to_camera = scene
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    centres_at_whole_numbers = intrinsics.clone()
    centres_at_whole_numbers[..., :2, 2] -= 0.5  # its pixel convention
    views: list[dict[str, Any]] = []
    for number, name in enumerate(VIEWS):
        views.append({"img": (images[:, number] / 255 - mean) / std, "data_norm_type": ["dinov2"]})
        if name in told:
            views[-1]["intrinsics"] = centres_at_whole_numbers[:, number]
            views[-1]["camera_poses"] = torch.linalg.inv(world_to_camera[:, number])
    found: list[Any] = []
    hook = model.info_sharing.register_forward_hook(lambda _, __, output: found.append(output[0]))
    out = model.infer(views, use_amp=False, memory_efficient_inference=False)
    hook.remove()
    assert out[0]["pts3d"].shape == (2, SIDE, SIDE, 3)  # the inference ran to its end
    tokens = [view.flatten(2).transpose(1, 2) for view in (*found[0].features, found[0].additional_token_features)]
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("calibration", [False, True, ("over",), ("over", "wrist")], ids=str)
def test_tokens_are_those_of_its_own_inference(
    weights: str, scene: tuple[Tensor, Tensor, Tensor], calibration: bool | tuple[str, ...]
) -> None:
    encoder = MapAnythingGeometry(weights, SIDE, calibration=calibration, scale_token=True, cameras=VIEWS)
    told = calibration if isinstance(calibration, tuple) else VIEWS if calibration else ()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    features = encoder(*scene)
    assert torch.equal(torch.get_rng_state(), before)
    assert features.scale is not None
    found = torch.cat([features.tokens, features.scale[:, None]], dim=1)
    assert found.shape == (2, len(VIEWS) * (SIDE // PATCH) ** 2 + 1, WIDTH) == (2, 28, encoder.dim)
    torch.testing.assert_close(found, of_its_own_inference(encoder._model[0], scene, told), atol=1e-5, rtol=1e-5)
    for _ in range(5):  # independent of its random numbers
        assert torch.equal(encoder(*scene).tokens, features.tokens)
    others = {False: ("over",), True: ("over", "wrist"), ("over",): VIEWS, ("over", "wrist"): ()}[calibration]
    assert (found - of_its_own_inference(encoder._model[0], scene, others)).abs().max() > 1e-3


def test_cameras_that_it_is_not_told_have_no_effect(
    weights: str, scene: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    images, intrinsics, world_to_camera = scene
    unknown = intrinsics.clone(), world_to_camera.clone()
    unknown[0][:, 1], unknown[1][:, 1] = torch.eye(3), torch.eye(4)
    some = MapAnythingGeometry(weights, SIDE, calibration=["over", "wrist"], cameras=VIEWS)
    assert torch.equal(some(images, *unknown).tokens, some(*scene).tokens)
    cached = MapAnythingGeometry(
        weights, SIDE, calibration=["over", "wrist"], cameras=VIEWS, cache=FeatureCache(tmp_path, 0.1)
    )
    for cameras in (unknown, (intrinsics, world_to_camera)):
        torch.testing.assert_close(cached(images, *cameras).tokens, some(*scene).tokens, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("calibration", [False, True, ("over",)], ids=str)
def test_its_memory_is_counted_without_computing(weights: str, tmp_path: Path, calibration: bool | tuple[str]) -> None:
    """At the real size of images, for which more than a million values are not computed."""
    samples, size = 4, 448
    images = torch.zeros(samples, len(VIEWS), 3, size, size, dtype=torch.uint8)
    assert images.numel() > SMALL
    intrinsics = torch.tensor([[400.0, 0.0, 224.0], [0.0, 400.0, 224.0], [0.0, 0.0, 1.0]]).repeat(samples, 3, 1, 1)
    cameras = intrinsics, torch.eye(4).repeat(samples, len(VIEWS), 1, 1)
    encoder = MapAnythingGeometry(
        weights, 224, calibration=calibration, cameras=VIEWS, scale_token=True, cache=FeatureCache(tmp_path, 0.1)
    )
    model = encoder.outside_modules()[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes: list[tuple[int, ...]] = []

    def forward(change: Any) -> Tensor:
        tokens = encoder(change(images), *cameras).tokens
        shapes.append(tuple(tokens.shape))
        return tokens

    counted = count_forward(encoder, forward)
    assert shapes == [(samples, len(VIEWS) * (224 // PATCH) ** 2, WIDTH)]
    once = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}  # some tensors have two names
    assert counted.undivided == sum(once.values())
    assert counted.step > 4 * images.numel()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_loading_it_leaves_products_in_full_precision(weights: str) -> None:
    """Importing MapAnything switches TF32 on."""
    torch.set_float32_matmul_precision("highest")
    MapAnythingGeometry(weights, SIDE)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_half_precision_is_taken_where_it_computes_in_it(weights: str, scene: tuple[Tensor, Tensor, Tensor]) -> None:
    """Under bfloat16, as on a GPU, rays and poses are still passed to it in float32."""
    encoder = MapAnythingGeometry(weights, SIDE, calibration=True, cameras=VIEWS)
    plain = encoder(*scene).tokens
    model = encoder._model[0]
    forward = model.forward

    def in_half(views: list[dict[str, Any]]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(views)

    model.forward = in_half
    half = encoder(*scene).tokens
    assert not torch.equal(half, plain)
    assert (half - plain).abs().mean() < 0.05 * plain.abs().mean()

"""MapAnything as geometry encoder: frozen, loaded from its own package and weights.

Shape legend: B samples, V views, S side of an image, P side of the image that MapAnything reads, N patches of a view,
G = V N tokens, D their width.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.hub
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.artifacts import sha256_of
from keygrip.data.batches import normalised
from keygrip.hub_network import cache_only_without_network
from keygrip.models.geometry.cameras import camera_centre
from keygrip.models.geometry.rotations import matrix_to_quaternion
from keygrip.models.geometry_vla.geometry import GeometryEncoder, GeometryFeatures
from keygrip.models.nn.precision import without_autocast
from keygrip.training.memory import is_counting
from keygrip.training.parts import model_part

if TYPE_CHECKING:
    from keygrip.models.geometry_vla.feature_cache import FeatureCache

log = logging.getLogger(__name__)

# The version that this file was compared with and that `make mapanything` tests: tag v1.1.1, 23 March 2026.
COMMIT = "f7ebafb4d8349776705aaa686cf928988d1bd7f4"
INSTALL = (
    f"pip install 'mapanything @ git+https://github.com/facebookresearch/map-anything.git@{COMMIT}' (its weights: "
    "facebook/map-anything-apache)"
)
FILES = ("config.json", "model.safetensors")  # of a folder of weights

# Probabilities of MapAnything's optional inputs, under its own names: in its training random, here all or none.
ALL_CAMERAS = {"overall_prob": 1.0, "dropout_prob": 0.0, "ray_dirs_prob": 1.0, "cam_prob": 1.0}
NO_CAMERAS = {"overall_prob": 0.0, "dropout_prob": 1.0, "ray_dirs_prob": 0.0, "cam_prob": 0.0}
NO_DEPTH = {
    "depth_prob": 0.0,
    "sparse_depth_prob": 0.0,
    "depth_scale_norm_all_prob": 0.0,
    "pose_scale_norm_all_prob": 0.0,  # poses are metric
}


@model_part(from_checkpoint={"cache": None}, external=["weights"])
class MapAnythingGeometry(GeometryEncoder):
    """MapAnything (Keetha et al., "MapAnything: Universal Feed-Forward Metric 3D Reconstruction", 2025), frozen. It
    gives the tokens of its multi-view transformer for the images and, optionally, the cameras. Compared with its source
    at `COMMIT`, with uniception 0.1.7: tokens equal those of its own `infer` (`make mapanything` tests it).

    Its weights are not part of this module or of a checkpoint: they are loaded from the place that the command names
    (`external`), and must be those of training. Its forward pass draws random numbers; the state of the run's
    generators is preserved.

    Args:
        weights: a local folder or a name on the Hugging Face hub.
        image_size: P; a multiple of its patch size.
        cache: stores features by image; useful if images occur again, that is without random augmentation.
        calibration: true: it reads the viewing rays of every pixel and the cameras' poses, in metres, as its optional
            inputs. Its tokens are then in the first camera's frame and at the true scale. Names of cameras, if only
            some views are calibrated: it reads the calibration of these cameras, which must include the first one.
            "auto": that of the cameras that `take_calibrated` names, or of none if the first one is not among them.
        scale_token: also output its token of the metric scale.
        cameras: names of the views in their order, to which `calibration` refers; None: not known.

    Raises:
        ModuleNotFoundError: the package is not installed. FileNotFoundError: the weights are missing.
        ValueError: its patch size does not divide `image_size`; `calibration` names an unknown camera or lacks the
            first one, or is "auto" without `cameras`.
    """

    _digest: Tensor

    def __init__(
        self,
        weights: str,
        image_size: int,
        cache: FeatureCache | None = None,
        calibration: bool | Literal["auto"] | Sequence[str] = False,
        scale_token: bool = False,
        cameras: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        chosen = _check_calibration(calibration, cameras)
        model = _load_mapanything(weights)
        model.eval().requires_grad_(False)
        self._model = [model]  # in a list, so it is not a submodule
        self.weights, self.image_size, self.cache = weights, image_size, cache
        self.decided_by_data, self.calibration = chosen is None, chosen  # None until `take_calibrated`
        self.scale_token, self.cameras = scale_token, tuple(cameras or ())
        self.dim = int(model.info_sharing.dim)
        self.patch_size = int(model.encoder.patch_size)
        self.norm_type = str(model.encoder.data_norm_type)
        self.mean, self.std = _normalisation(self.norm_type)
        if image_size % self.patch_size:
            raise ValueError(f"geometry.image_size={image_size} must be a multiple of MapAnything's {self.patch_size}.")
        self.fingerprint = _fingerprint(model)
        self.register_buffer("_digest", torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8))
        log.info("MapAnything of %s: tokens of width %d, patches of %d px", weights, self.dim, self.patch_size)

    @property
    def gives_scale(self) -> bool:
        return self.scale_token

    @property
    def reads_cameras(self) -> bool | tuple[str, ...]:
        return () if self.calibration is None else self.calibration  # undecided: none

    def take_calibrated(self, cameras: Sequence[str]) -> None:
        """With calibration="auto", set the cameras whose calibration it reads from now on.

        Raises:
            ValueError: other cameras were set before (by a run that is resumed on other demonstrations).
        """
        if not self.decided_by_data:
            return
        calibrated = tuple(name for name in self.cameras if name in cameras)
        chosen = calibrated if self.cameras[0] in calibrated else ()
        decided = bool(chosen) if len(chosen) in (0, len(self.cameras)) else chosen
        if self.calibration is None:
            if calibrated != chosen:
                log.warning(
                    "geometry.calibration=auto: camera %s, in whose frame MapAnything receives poses, is not "
                    "calibrated in all demonstrations, so the calibration of %s is not used either: put one of them "
                    "first in data.cameras",
                    self.cameras[0],
                    ", ".join(calibrated),
                )
            log.info(
                "geometry.calibration=auto: MapAnything receives the calibration of %s", _describe_calibration(decided)
            )
        elif self.calibration != decided:
            raise ValueError(
                "geometry.calibration=auto: the checkpoint was trained with the calibration of "
                f"{_describe_calibration(decided)}, and the demonstrations now give that of "
                f"{_describe_calibration(self.calibration)}: restore them, or start a new run"
            )
        self.calibration = decided

    def grid_side(self, image_size: int | None = None) -> int | None:
        return self.image_size // self.patch_size  # images of any size are resized to it

    def outside_modules(self) -> list[nn.Module]:
        return list(self._model)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}_digest")
        if stored is not None and not torch.equal(stored.cpu(), self._digest.cpu()):
            raise ValueError(
                f"geometry.weights={self.weights} are not the MapAnything weights that the checkpoint was trained "
                "with: their features mean something else"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def forward(self, images: Tensor, intrinsics: Tensor, world_to_camera: Tensor) -> GeometryFeatures:
        calibrated = self._calibrated_views(images.shape[1])
        cameras = (intrinsics[:, calibrated], world_to_camera[:, calibrated]) if calibrated else ()
        if self.cache is None or is_counting():  # counting uses images without content
            tokens = self.compute(images, *cameras)
        else:
            view_suffix = "".join(f"-{view}" for view in calibrated) if len(calibrated) < images.shape[1] else ""
            kind = f"{'+scale' if self.scale_token else ''}{f'+cameras{view_suffix}' if calibrated else ''}"
            maker = f"mapanything{kind}:{self.fingerprint}:{self.image_size}"
            tokens = self.cache.features(images, maker, self.compute, cameras)
        if not self.scale_token:
            return GeometryFeatures(tokens)
        return GeometryFeatures(tokens[:, :-1], scale=tokens[:, -1])

    def compute(self, images: Tensor, *cameras: Tensor) -> Tensor:
        """Tokens ``[B, G, D]`` float32 of uint8 ``[B, V, 3, S, S]`` images; with `scale_token` one more, the last.

        Args:
            cameras: empty, or intrinsics ``[B, C, 3, 3]`` and world_to_camera ``[B, C, 4, 4]`` of the C views
                whose calibration it reads.

        Raises:
            ValueError: `scale_token` with a MapAnything that has no scale token.
        """
        model = self._model[0]
        if next(model.parameters()).device != images.device:  # nothing can be moved while a step is counted
            model.to(images.device)
        inputs = normalised(images, self.mean, self.std)
        if inputs.shape[-1] != self.image_size:
            shape = (self.image_size, self.image_size)
            resized = F.interpolate(inputs.flatten(0, 1), shape, mode="bicubic", antialias=True, align_corners=False)
            inputs = resized.unflatten(0, images.shape[:2])
        views = [{"img": view, "data_norm_type": [self.norm_type]} for view in inputs.unbind(1)]
        if cameras:
            with without_autocast(images):  # half precision would move rays by pixels
                for index, view_index in enumerate(self._calibrated_views(len(views))):
                    intrinsics, world_to_camera = (part[:, index].float() for part in cameras)
                    views[view_index] |= self._camera_inputs(intrinsics, world_to_camera, images.shape[-1])
        captured: list[Any] = []
        hook = model.info_sharing.register_forward_hook(lambda _, __, output: _capture_and_stop(captured, output))
        devices = [images.device] if images.device.type == "cuda" else []
        # In its own precision, independent of the caller's: bf16 on a GPU, as its authors run it.
        with (
            torch.random.fork_rng(devices),
            _fixed_optional_inputs(model, ALL_CAMERAS if cameras else NO_CAMERAS),
            torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"),
        ):
            try:
                model(views)
            except _CapturedError:
                pass
            finally:
                hook.remove()
        final = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
        tokens = [view.flatten(2).transpose(1, 2) for view in final.features]  # of [B, D, h, w]
        if self.scale_token:
            scale = getattr(final, "additional_token_features", None)  # [B, D, 1]
            if scale is None:
                raise ValueError(f"geometry.weights={self.weights} has no scale token: set geometry.scale_token=false.")
            tokens.append(scale.transpose(1, 2)[:, :1])
        return torch.cat(tokens, dim=1).float()

    def _calibrated_views(self, views: int) -> list[int]:
        """Indices of the views whose calibration is read; MapAnything masks its optional inputs view by view."""
        if self.cameras and views != len(self.cameras):
            raise ValueError(f"geometry.cameras names {len(self.cameras)} views, and the batch has {views}.")
        if self.calibration is None:
            raise ValueError(
                "geometry.calibration=auto is decided by demonstrations: train, load a checkpoint, or name the cameras"
            )
        if isinstance(self.calibration, bool):
            return list(range(views)) if self.calibration else []
        return [index for index, name in enumerate(self.cameras) if name in self.calibration]

    def _camera_inputs(self, intrinsics: Tensor, world_to_camera: Tensor, size: int) -> dict[str, Tensor]:
        """A view's optional inputs under MapAnything's names: unit rays ``[B, P, P, 3]`` in the camera's frame through
        the pixels' centres, and the pose of the camera in the world (quaternion x y z w, metres)."""
        pixels = torch.arange(self.image_size, device=intrinsics.device) + 0.5
        rows, columns = torch.meshgrid(pixels, pixels, indexing="ij")
        places = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1) * intrinsics.new_tensor(
            [size / self.image_size, size / self.image_size, 1.0]
        )  # in the images' own pixels, to which the intrinsics belong
        rays = torch.einsum("bij,hwj->bhwi", torch.linalg.inv(intrinsics), places)
        quaternion = matrix_to_quaternion(world_to_camera[:, :3, :3].transpose(-1, -2))  # w x y z
        return {
            "ray_directions_cam": F.normalize(rays, dim=-1),
            "camera_pose_quats": quaternion.roll(-1, dims=-1),
            "camera_pose_trans": camera_centre(world_to_camera),
            "is_metric_scale": torch.ones(len(rays), dtype=torch.bool, device=rays.device),
        }


class _CapturedError(Exception):
    """Ends MapAnything's forward pass as soon as its tokens are computed: the heads after them are not needed."""


def _capture_and_stop(captured: list[Any], output: Any) -> None:
    captured.append(output)
    raise _CapturedError


@contextlib.contextmanager
def _fixed_optional_inputs(model: Any, probabilities: dict[str, float]) -> Iterator[None]:
    """Make MapAnything's optional inputs deterministic; its own settings are restored afterwards."""
    settings = model.geometric_input_config
    saved = dict(settings)
    settings.update(probabilities | NO_DEPTH)
    try:
        yield
    finally:
        settings.clear()
        settings.update(saved)


def _check_calibration(
    calibration: bool | Literal["auto"] | Sequence[str], cameras: Sequence[str] | None
) -> bool | tuple[str, ...] | None:
    """The cameras whose calibration is read; None: not decided yet. Raises ValueError if one is not a view, or if the
    first view is not among them."""
    if isinstance(calibration, bool):
        return calibration
    views = list(cameras or ())
    if calibration == "auto":
        if not views:
            raise ValueError("geometry.calibration=auto chooses among geometry.cameras, which names none.")
        return None
    named = tuple(calibration)
    unknown = [name for name in named if name not in views]
    if unknown:
        raise ValueError(
            f"geometry.calibration names {unknown[0]!r}, which is none of the views {', '.join(views) or '(no names)'}."
        )
    if not named:
        raise ValueError("geometry.calibration=[] names no camera: set it to false.")
    if views[0] not in named:
        raise ValueError(
            f"geometry.calibration=[{','.join(named)}] lacks the first view, {views[0]}, in whose frame MapAnything "
            "receives the poses of all others: put a calibrated camera first in data.cameras, or set it to false."
        )
    return named


def _describe_calibration(calibration: bool | tuple[str, ...]) -> str:
    if isinstance(calibration, tuple):
        return ", ".join(calibration)
    return "all cameras" if calibration else "no camera"


def _load_mapanything(weights: str) -> Any:
    precision = torch.get_float32_matmul_precision()
    try:
        from mapanything.models import MapAnything
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] not in ("mapanything", "uniception"):
            raise
        raise ModuleNotFoundError(f"geometry=mapanything needs the package mapanything: {INSTALL}") from error
    finally:
        torch.set_float32_matmul_precision(precision)  # importing it enables TF32 for the whole process
    folder = Path(weights)
    if weights.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"geometry.weights: there is no folder {weights}")
    absent = [name for name in FILES if folder.is_dir() and not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"geometry.weights: {weights} holds no {absent[0]}, only part of MapAnything's weights")
    try:
        return MapAnything.from_pretrained(weights, **cache_only_without_network(weights, {}))
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        if any(frame.filename == torch.hub.__file__ for frame in traceback.extract_tb(error.__traceback__)):
            raise FileNotFoundError(
                "MapAnything's image encoder comes from torch.hub, code and weights of facebookresearch/dinov2, which "
                f"failed ({reason}): load it once where there is a network and copy the folder {torch.hub.get_dir()} "
                "from there, or name its parent with TORCH_HOME"
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise FileNotFoundError(
            f"MapAnything's weights {weights} are neither a folder nor to be had from the hub "
            f"({reason}): download {' and '.join(FILES)} from "
            "https://huggingface.co/facebook/map-anything-apache into a folder and set geometry.weights to it"
        ) from error


def _normalisation(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of images that an encoder of the package expects."""
    from uniception.models.encoders.image_normalizations import IMAGE_NORMALIZATION_DICT

    entry = IMAGE_NORMALIZATION_DICT[name]
    return entry.mean.flatten().tolist(), entry.std.flatten().tolist()


def _fingerprint(model: nn.Module) -> str:
    """Fingerprint of names, shapes and a few values of every parameter: fast, and different for other weights."""

    def parts() -> Iterator[bytes]:
        for name, parameter in model.named_parameters():
            yield f"{name}:{tuple(parameter.shape)}".encode()
            values = parameter.detach().flatten()
            yield values[:: max(1, values.numel() // 16)][:16].float().cpu().numpy().tobytes()

    return sha256_of(parts())

"""The volume-query network: one image and the gripper's pixel in, T steps of pixel x height voxels, gripper and
rotation out.

    image -> DINO backbone -> patch map -> 1x1 conv, upsample, three 3x3 convs -> F
    (F at the start pixel, CLS[, state]) -> query, T times -> 5 AdaLN-Zero blocks under sin(t) -> (q_F, q_z, q_t)
    voxel logit(t, z, y, x) = q_F[t] . F[y, x] + q_z[t] . sin(z) + q_t[t] . sin(t)

Shape legend: B batch, A arms, T steps, S image side in pixels, P grid side in cells, C feature width (d_feat), Z height
bins, G gripper bins, R rotation classes, r rank of the coupling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.backbone import DinoBackbone
from keygrip.models.language.instructions import InstructionStates
from keygrip.models.nn.adaln import AdaLNZeroMLP
from keygrip.models.nn.image_sampling import sample_features
from keygrip.models.nn.sinusoids import sinusoidal_features
from keygrip.models.volume_query.arms import CoupledArms
from keygrip.models.volume_query.language import InstructionConditioning, InstructionEncoder
from keygrip.models.volume_query.second_look import SecondLook, SharpImage
from keygrip.models.volume_query.volume import BilinearCoupling, StepPlaces, VolumeLogits, VoxelScores, best_places
from keygrip.models.volume_query.world import FurtherViews, VoxelProjection, WorldScores
from keygrip.training.parts import ReadWhere, model_part

# Inputs of the arm's state and how many values each has: height in the bins' range, gripper opening, and two columns
# of the rotation matrix (a continuous representation of rotations: Zhou et al., "On the Continuity of Rotation
# Representations in Neural Networks", 2019).
STATE_PARTS = {"height": 1, "gripper": 1, "rotation": 6}

CHOICES = {
    "coupling": ("additive", "bilinear"),
    "logit_scale": ("none", "learned"),
    "height_head": ("sinusoidal", "sinusoidal_and_linear"),
    "look_backbone": ("shared", "own"),
}


@dataclass(frozen=True)
class VolumeQueryOutput:
    """Logits for every arm and step.

    Attributes:
        volume: leading shape ``[B, A, T]``, grid P x P, Z heights.
        gripper: ``[B, A, T, G]``. rotation: ``[B, A, T, R]``.
        places: decoded places at which gripper and rotation were read; None: they were not read at decoded places.
    """

    volume: VolumeLogits
    gripper: Tensor
    rotation: Tensor
    places: StepPlaces | None = None

    def detach(self) -> VolumeQueryOutput:
        """Without gradients, for images and metrics."""
        return VolumeQueryOutput(self.volume.detach(), self.gripper.detach(), self.rotation.detach(), self.places)


class FeatureRefiner(nn.Module):
    """Convert the backbone's patch map to the map F ``[B, C, P, P]`` that queries are matched against."""

    def __init__(self, embed_dim: int, d_feat: int, pred_size: int) -> None:
        super().__init__()
        self.pred_size = pred_size
        self.reduce = nn.Conv2d(embed_dim, d_feat, 1)
        self.refine = nn.Sequential(
            nn.Conv2d(d_feat, d_feat, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(d_feat, d_feat, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(d_feat, d_feat, 3, padding=1),
        )

    def forward(self, patch_map: Tensor, modulation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """F of a patch map ``[B, D, S / patch, S / patch]``; ``modulation`` acts on the reduced map."""
        reduced = self.reduce(patch_map)  # [B, C, S / patch, S / patch]
        if modulation is not None:
            reduced = modulation(reduced)
        upsampled = F.interpolate(reduced, size=(self.pred_size, self.pred_size), mode="bilinear", align_corners=False)
        return self.refine(upsampled)


class ArmStream(nn.Module):
    """One arm's query, trunk and heads. The backbone and F are shared between the arms; see VolumeQueryNetwork for
    arguments."""

    def __init__(
        self,
        *,
        embed_dim: int,
        d_feat: int,
        d_sin_z: int,
        d_sin_t: int,
        d_cond: int,
        blocks: int,
        trunk_width: int | None,
        gripper_bins: int,
        rotation_classes: int,
        height_bins: int,
        state_size: int,
        logit_scale: Literal["none", "learned"],
        height_head: Literal["sinusoidal", "sinusoidal_and_linear"],
        step_features: bool,
        coupling_rank: int,
    ) -> None:
        super().__init__()
        self.widths = (d_feat, d_sin_z, d_sin_t)
        d_model = sum(self.widths)
        trunk = trunk_width or d_model
        self.state = nn.Linear(state_size, d_feat) if state_size else None
        self.query = nn.Linear(d_feat + embed_dim + (d_feat if state_size else 0), trunk)
        self.lift_time = nn.Linear(d_sin_t, d_cond)
        self.blocks = nn.ModuleList(AdaLNZeroMLP(trunk, d_cond) for _ in range(blocks))
        self.to_query = (
            nn.Identity() if trunk == d_model else nn.Sequential(nn.LayerNorm(trunk), nn.Linear(trunk, d_model))
        )
        head_width = d_model + (d_feat if step_features else 0)
        self.gripper = _head(head_width, gripper_bins, deep=step_features)
        self.rotation = _head(head_width, rotation_classes, deep=step_features)
        self.direct_height = nn.Linear(d_model, height_bins) if height_head == "sinusoidal_and_linear" else None
        # Logarithms of the factors on pixel and height logits. The initial values give logits a spread of about 1 for
        # unit-variance queries and features; training can then change the spread separately.
        self.log_scales = nn.Parameter(torch.zeros(2)) if logit_scale == "learned" else None
        self.coupling = nn.Linear(d_model, coupling_rank * d_feat) if coupling_rank else None
        self.coupling_rank = coupling_rank

    def start(self, start_features: Tensor, cls: Tensor, state: Tensor | None, sin_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the trunk: the query ``[B, trunk]`` and the condition ``[1, T, d_cond]``.

        The arguments are ``[B, C]``, ``[B, D]``, ``[B, state_size]`` and ``[T, d_sin_t]``.
        """
        parts = [start_features, cls]
        if self.state is not None:
            assert state is not None
            parts.append(self.state(state))
        return self.query(torch.cat(parts, dim=-1)), self.lift_time(sin_t)[None]

    def forward(self, query: Tensor, condition: Tensor) -> Tensor:
        """Trunk output ``[B, T, d_model]`` for a query ``[B, trunk]`` and a condition ``[1 | B, T, d_cond]``."""
        steps = query[:, None].expand(-1, condition.shape[1], -1)
        for block in self.blocks:
            steps = block(steps, condition)
        return self.to_query(steps)

    def volume(
        self,
        trunk: Tensor,
        feature_map: Tensor,
        sin_z: Tensor,
        sin_t: Tensor,
        coupling_z: Tensor | None,
        further: tuple[Tensor, VoxelProjection] | None = None,
    ) -> VolumeLogits:
        """Volume logits with leading shape ``[B, T]`` from the trunk ``[B, T, d_model]`` and F ``[B, C, P, P]``.

        Args:
            sin_z: ``[Z, d_sin_z]``. sin_t: ``[T, d_sin_t]``. coupling_z: ``[r, d_sin_z]``, None without the coupling.
            further: F of further views, ``[B, V, C, P, P]``, and the voxels' projections into them; None: one camera.
        """
        q_feat, q_z, q_t = trunk.split(self.widths, dim=-1)
        pixel_scale: Tensor | float = 1.0
        pixel = torch.einsum("btc,bchw->bthw", q_feat, feature_map)
        height = q_z @ sin_z.T
        if self.log_scales is not None:
            pixel_scale = self.log_scales[0].exp() * 2 / math.sqrt(self.widths[0])
            pixel = pixel * pixel_scale
            height = height * (self.log_scales[1].exp() * 4 / math.sqrt(self.widths[1]))
        if self.direct_height is not None:
            height = height + self.direct_height(trunk)
        voxel: VoxelScores | None = None
        if further is not None:
            maps, projection = further
            voxel = WorldScores(torch.einsum("btc,bvchw->btvhw", q_feat, maps) * pixel_scale, projection)
        elif self.coupling is not None and coupling_z is not None:
            q_coupling = self.coupling(trunk).unflatten(-1, (self.coupling_rank, -1))  # [B, T, r, C]
            factor = torch.einsum("btrc,bchw->btrhw", q_coupling, feature_map) / math.sqrt(self.widths[0])
            voxel = BilinearCoupling(factor, coupling_z @ sin_z.T)
        return VolumeLogits(pixel, height, (q_t * sin_t).sum(-1), voxel)


def _head(width: int, classes: int, deep: bool) -> nn.Module:
    if not deep:
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, classes))


@model_part
class VolumeQueryNetwork(nn.Module):
    """The whole network.

    With every option at its default this is the source design. In it, ``q_t`` enters only a term that is constant over
    the volume, cancels in the softmax and gets no gradient from the volume loss; it stays because the layout of the
    query is fixed. (The gripper and rotation heads do read it.)

    Args:
        backbone: the shared DINO module.
        image_size: S, the side of the square input in pixels.
        rotation_classes: R, of the rotation codec.
        arms: which arms, in the order of the batch's arm axis.
        horizon: T, steps predicted.
        pred_size: P, cells along a side of the prediction grid.
        height_bins: Z. gripper_bins: G.
        d_feat, d_sin_z, d_sin_t: widths of the three parts of a step's query. d_cond: width of the time condition.
        blocks: AdaLN-Zero blocks in the trunk.
        trunk_width: width of the trunk; None is the query's own width (the source design).
        state: inputs of the query in addition to the gripper's pixel: any of height, gripper, rotation. A network that
            reads the rotation tends to repeat it instead of reading the image: in most frames just before a grip the
            arm is already aligned.
        logit_scale: "none" (the source design) or a learned temperature for pixel and for height logits.
        height_head: "sinusoidal" (the source design), or plus a linear term from the trunk.
        step_features: gripper and rotation heads also read F at the step's own pixel (the target pixel in training,
            the decoded pixel at inference), through one hidden layer.
        coupling: "additive" (factorises), or "bilinear": height depends on the pixel through ``coupling_rank`` factors.
        instruction: encoder of the instruction sentence (`keygrip.models.language.instructions`); None: the network
            reads no instruction.
        world_views: any number of further calibrated cameras also score the voxels, with the same weights. Off: only
            the first camera is used.
        couple_arms: every arm receives the other arms' states and planned steps (`keygrip.models.volume_query.arms`).
        second_look: side in pixels of a high-resolution version of the first camera's image. A window of it around each
            step's pixel (chosen as for `step_features`) corrects gripper and rotation
            (`keygrip.models.volume_query.second_look`). None: off.
        look_size: side of that window, in pixels of the high-resolution image.
        look_backbone: "shared": windows go through the image's backbone; "own": through a copy with its own weights,
            which starts from the image backbone's weights if `init_from` names a run without such a copy.
    """

    read_where: ClassVar = {"coupling_rank": ReadWhere("coupling", "bilinear")}
    read_where |= dict.fromkeys(("look_size", "look_backbone"), ReadWhere("second_look"))
    sin_z: Tensor
    sin_t: Tensor

    def __init__(
        self,
        backbone: DinoBackbone,
        image_size: int,
        rotation_classes: int,
        arms: Sequence[str] = ("right",),
        horizon: int = 8,
        pred_size: int = 56,
        height_bins: int = 32,
        gripper_bins: int = 32,
        d_feat: int = 48,
        d_sin_z: int = 24,
        d_sin_t: int = 24,
        d_cond: int = 96,
        blocks: int = 5,
        trunk_width: int | None = None,
        state: Sequence[str] = (),
        logit_scale: Literal["none", "learned"] = "none",
        height_head: Literal["sinusoidal", "sinusoidal_and_linear"] = "sinusoidal",
        step_features: bool = False,
        coupling: Literal["additive", "bilinear"] = "additive",
        coupling_rank: int = 4,
        instruction: nn.Module | None = None,
        world_views: bool = False,
        couple_arms: bool = False,
        second_look: int | None = None,
        look_size: int = 64,
        look_backbone: Literal["shared", "own"] = "shared",
    ) -> None:
        super().__init__()
        if couple_arms and len(arms) < 2:
            raise ValueError("model.network.couple_arms=true needs two arms: set data.arms=[left,right].")
        if world_views and coupling != "additive":
            raise ValueError("model.network.world_views=true needs model.network.coupling=additive.")
        chosen = {
            "coupling": coupling,
            "logit_scale": logit_scale,
            "height_head": height_head,
            "look_backbone": look_backbone,
        }
        for name, values in CHOICES.items():
            if chosen[name] not in values:
                raise ValueError(f"model.network.{name} is {' or '.join(values)}, not {chosen[name]!r}.")
        if not arms or len(set(arms)) != len(arms):
            raise ValueError(f"The arms must be at least one and different, got {list(arms)}.")
        self.backbone = backbone
        self.image_size, self.pred_size, self.horizon = image_size, pred_size, horizon
        self.height_bins, self.gripper_bins, self.rotation_classes = height_bins, gripper_bins, rotation_classes
        self.arms = tuple(arms)
        unknown = [part for part in state if part not in STATE_PARTS]
        if unknown or len(set(state)) != len(state):
            raise ValueError(
                f"model.network.state lists any of {', '.join(STATE_PARTS)}, each once, got {list(state)}."
            )
        self.state_parts, self.step_features, self.world_views = tuple(state), step_features, world_views
        self.refiner = FeatureRefiner(backbone.embed_dim, d_feat, pred_size)
        rank = coupling_rank if coupling == "bilinear" else 0
        self.streams = nn.ModuleDict(
            {
                arm: ArmStream(
                    embed_dim=backbone.embed_dim,
                    d_feat=d_feat,
                    d_sin_z=d_sin_z,
                    d_sin_t=d_sin_t,
                    d_cond=d_cond,
                    blocks=blocks,
                    trunk_width=trunk_width,
                    gripper_bins=gripper_bins,
                    rotation_classes=rotation_classes,
                    height_bins=height_bins,
                    state_size=sum(STATE_PARTS[part] for part in self.state_parts),
                    logit_scale=logit_scale,
                    height_head=height_head,
                    step_features=step_features,
                    coupling_rank=rank,
                )
                for arm in self.arms
            }
        )
        self.coupling_z = nn.Parameter(torch.randn(rank, d_sin_z) / math.sqrt(d_sin_z)) if rank else None
        # Built last: the modules above get the same initial weights with and without these.
        trunk = trunk_width or d_feat + d_sin_z + d_sin_t
        self.instruction = (
            None if instruction is None else InstructionConditioning(instruction, self.arms, d_feat, trunk, d_cond)
        )
        self.coupled_arms = CoupledArms(self.arms, trunk, d_feat + d_sin_z + d_sin_t) if couple_arms else None
        self.second_look = (
            None
            if second_look is None
            else SecondLook(
                self.arms,
                backbone,
                image_size=image_size,
                sharp_size=second_look,
                side=look_size,
                trunk=d_feat + d_sin_z + d_sin_t,
                gripper_bins=gripper_bins,
                rotation_classes=rotation_classes,
                own_backbone=look_backbone == "own",
            )
        )
        self.register_buffer("sin_z", sinusoidal_features(height_bins, d_sin_z), persistent=False)  # [Z, d_sin_z]
        self.register_buffer("sin_t", sinusoidal_features(horizon, d_sin_t), persistent=False)  # [T, d_sin_t]

    @property
    def reads_at_pixels(self) -> bool:
        """Whether gripper and rotation are read at the steps' pixels."""
        return self.step_features or self.second_look is not None

    @property
    def instruction_encoder(self) -> InstructionEncoder | None:
        """The encoder, which converts sentences to tokens; None if the network reads no instruction."""
        return None if self.instruction is None else self.instruction.encoder  # type: ignore[return-value]

    def forward(
        self,
        image: Tensor,
        start_pixel: Tensor,
        state: Tensor | None = None,
        step_pixels: Tensor | Callable[[VolumeLogits], StepPlaces] | None = None,
        instruction: Tensor | None = None,
        views: FurtherViews | None = None,
        sharp: SharpImage | None = None,
    ) -> VolumeQueryOutput:
        """Logits of the next T steps.

        Args:
            image: ``[B, 3, S, S]``, normalised by the loader with the backbone's mean and std.
            start_pixel: ``[B, A, 2]`` projection of the gripper, input pixels; outside the image the features at the
                border are used.
            state: ``[B, A, state_size]``, the parts in the order of ``state_parts``; required if there are any.
            step_pixels: ``[B, A, T, 2]`` at which ``step_features`` and the second look are read, or a function that
                decodes them from the volume (`Decoder.places`); None: around the most probable voxel.
            instruction: int64 ``[B, ...]``, the encoder's tokens; required if there is an encoder.
            views: views of further cameras (`world_views`); None: one camera.
            sharp: input of the second look; required if there is one.
        """
        self._check_inputs(image, state, instruction, views, sharp)
        states = None if self.instruction is None else self.instruction.encoder(instruction)
        feature_map, cls, further = self._image_features(image, views, states)
        trunks = self._run_trunks(feature_map, cls, start_pixel, state, states)
        # if the first image shows nothing, it makes no corrections
        usable = None if views is None else views.first.to(feature_map.dtype)[:, None, None]
        fixed = (feature_map, self.sin_z, self.sin_t, self.coupling_z, further)
        volume = VolumeLogits.stack([self._stream(arm).volume(trunks[arm], *fixed) for arm in self.arms])
        places, pixels = self._step_pixels(volume, step_pixels)
        outputs = []
        for index, arm in enumerate(self.arms):
            stream, trunk = self._stream(arm), trunks[arm]
            head_input = trunk
            if self.step_features:
                step_features = sample_features(feature_map, pixels[:, index], self.image_size)  # [B, T, C]
                head_input = torch.cat([trunk, step_features], dim=-1)
            gripper, rotation = stream.gripper(head_input), stream.rotation(head_input)
            if self.second_look is not None and sharp is not None:
                corrections = self.second_look(arm, self.backbone, sharp, pixels[:, index], trunk)
                more_gripper, more_rotation = (each if usable is None else each * usable for each in corrections)
                gripper, rotation = gripper + more_gripper, rotation + more_rotation
            outputs.append((gripper, rotation))
        grippers, rotations = (torch.stack(each, dim=1) for each in zip(*outputs, strict=True))
        return VolumeQueryOutput(volume, grippers, rotations, places)

    def _check_inputs(
        self,
        image: Tensor,
        state: Tensor | None,
        instruction: Tensor | None,
        views: FurtherViews | None,
        sharp: SharpImage | None,
    ) -> None:
        """Raise ValueError if the image has another size or an input is missing or unexpected; see `forward`."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The network was built for {self.image_size} x {self.image_size} images, got {image.shape[-1]} x "
                f"{image.shape[-2]}: set data.image_size={self.image_size}, or train with the other size."
            )
        if self.state_parts and state is None:
            raise ValueError(f"The network was built to read the arm's {', '.join(self.state_parts)}: give its state.")
        if (self.instruction is None) != (instruction is None):
            raise ValueError(
                "The network was built to read an instruction: give its tokens."
                if instruction is None
                else "The network reads no instruction: build it with one (model=volume_query_language)."
            )
        if views is not None and not self.world_views:
            raise ValueError("The network reads one camera: build it with model.network.world_views=true.")
        if (self.second_look is None) != (sharp is None):
            raise ValueError(
                "The network was built without a second look: build it with model.network.second_look."
                if self.second_look is None
                else "The network was built with a second look: give it the sharper image (data.detail_size)."
            )

    def _image_features(
        self, image: Tensor, views: FurtherViews | None, states: InstructionStates | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, VoxelProjection] | None]:
        """F ``[B, C, P, P]`` and CLS ``[B, D]`` of the image; for further views their F ``[B, V, C, P, P]`` and the
        voxels' projections into them."""
        modulation = None
        if self.instruction is not None:
            count = 1 if views is None else 1 + views.images.shape[1]
            modulation = partial(self.instruction.features, states=states, views=count)
        if views is None:
            features = self.backbone(image)
            return self.refiner(features.grid_map(), modulation), features.cls, None
        images = torch.cat([image[:, None], views.images.to(image.dtype)], dim=1)  # [B, 1 + V, 3, S, S]
        features = self.backbone(images.flatten(0, 1))
        maps = self.refiner(features.grid_map(), modulation).unflatten(0, images.shape[:2])  # [B, 1 + V, C, P, P]
        usable = views.first.to(maps.dtype)
        cls = features.cls.unflatten(0, images.shape[:2])[:, 0] * usable[:, None]
        return maps[:, 0] * usable[:, None, None, None], cls, (maps[:, 1:], views.where)

    def _run_trunks(
        self,
        feature_map: Tensor,
        cls: Tensor,
        start_pixel: Tensor,
        state: Tensor | None,
        states: InstructionStates | None,
    ) -> dict[str, Tensor]:
        """Every arm's trunk output ``[B, T, d_model]``; arguments as in `forward`, and the instruction's states."""
        start_features = sample_features(feature_map, start_pixel, self.image_size)  # [B, A, C]
        queries: dict[str, Tensor] = {}
        conditions: dict[str, Tensor] = {}
        for index, arm in enumerate(self.arms):
            own_state = None if state is None else state[:, index]
            query, condition = self._stream(arm).start(start_features[:, index], cls, own_state, self.sin_t)
            if self.instruction is not None:
                query, condition = self.instruction.queries[arm](query, condition, states)
            queries[arm], conditions[arm] = query, condition
        if self.coupled_arms is not None:
            queries = self.coupled_arms.queries(queries)
        trunks = {arm: self._stream(arm)(queries[arm], conditions[arm]) for arm in self.arms}
        return trunks if self.coupled_arms is None else self.coupled_arms.steps(trunks)

    def _stream(self, arm: str) -> ArmStream:
        stream = self.streams[arm]
        assert isinstance(stream, ArmStream)
        return stream

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are only called through their `forward`, which FSDP may shard one by one."""
        blocks = [block for stream in self.streams.values() for block in stream.blocks]  # type: ignore[union-attr]
        return [*self.backbone.sharded_parts(), *blocks]

    @torch.no_grad()
    def _step_pixels(
        self, volume: VolumeLogits, step_pixels: Tensor | Callable[[VolumeLogits], StepPlaces] | None
    ) -> tuple[StepPlaces | None, Tensor]:
        """Places, if they are decoded, and the pixels ``[B, A, T, 2]`` where heads read; empty if they do not."""
        if not self.reads_at_pixels:
            return None, volume.pixel.new_empty(0)
        if isinstance(step_pixels, Tensor):
            return None, step_pixels
        places = best_places(volume.float()) if step_pixels is None else step_pixels(volume)
        return (None if step_pixels is None else places), places.grid * (self.image_size / self.pred_size)

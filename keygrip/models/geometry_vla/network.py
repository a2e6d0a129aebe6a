"""The whole network: images and an instruction in, the velocity of an action chunk out.

    images, instruction -> vision-language model -> hidden states of its last N layers ---------+
    images -> geometry encoder -> G tokens -> compressor -> K tokens ---------------------------+-> N contexts
    state, noisy actions -> action head, block i reads context i -> velocity

The geometry tokens bypass the language model and go directly into the action head's cross-attention. For comparison
they can also go through the language model, as further tokens of its prompt.

Shape legend: B samples, V views, S side of an image, L tokens of a prompt, K geometry tokens, R noise samples, T steps,
Da values of an action step, H width of language model and head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.geometry_vla.action_head import ActionHead, BlockContext, HeadBlock
from keygrip.models.geometry_vla.action_spaces import COLUMNS
from keygrip.models.geometry_vla.actions import SIZE
from keygrip.models.geometry_vla.compression import GeometryCompressor, build_geom_compressor
from keygrip.models.geometry_vla.geometry import GeometryEncoder, GeometryFeatures
from keygrip.models.geometry_vla.network_checks import check_geometry, check_pointing
from keygrip.models.geometry_vla.places import MOST_VIEWS, PlaceEmbedding, grid_places
from keygrip.models.geometry_vla.pointing import (
    PatchPointing,
    PointedActions,
    PointedTokens,
    Pointing,
    meeting_points,
    refuse_other_grid,
)
from keygrip.models.language.qwen_vl import QwenVL, Semantics
from keygrip.models.nn.attention import AttentionRecord
from keygrip.models.nn.flow_matching import SOLVERS, Solver, integrate, noise_levels
from keygrip.models.nn.inpainting import guided_velocity
from keygrip.models.nn.precision import without_autocast
from keygrip.models.nn.standardise import RunningStandardisation
from keygrip.training.compilation import Backend
from keygrip.training.parts import ReadWhere, model_part

log = logging.getLogger(__name__)


@model_part
@dataclass(frozen=True)
class ActionSampling:
    """How action chunks are sampled.

    Args:
        steps, solver: see `keygrip.models.nn.flow_matching.integrate`.
        temperature: factor on the noise that a chunk starts from. 1: chunks follow the distribution that the model has
            learned from the demonstrations, its own uncertainty included. 0: one chunk, close to their mean: its error
            is smaller if there is one way to do a task, and it may lie between the ways if there are several.

    Raises:
        ValueError: no steps or too many, an unknown solver, or a temperature that is negative or not finite.
    """

    steps: int = 4
    solver: Solver = "euler"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"model.sampling.steps is at least 1, got {self.steps}.")
        if self.solver not in SOLVERS:
            raise ValueError(f"model.sampling.solver is one of {', '.join(SOLVERS)}, not {self.solver!r}.")
        noise_levels(self.steps)  # raises ValueError for too many
        if not 0 <= self.temperature < math.inf:  # NaN too
            raise ValueError(
                f"model.sampling.temperature must not be negative and must be finite, got {self.temperature}."
            )


@dataclass(frozen=True)
class Scene:
    """The encoders' output for a batch: computed once for all noise samples and all steps of a sampler.

    Attributes:
        contexts: of the head's blocks. groups: numbers of prompt, geometry and pointed tokens in each context.
        geometry: the geometry encoder's output, None without injection.
        pointing: logits of the gripper's future pixels in the images (see `Pointing`), None if not requested.
        met: where the views' rays through the peaks of these maps meet, ``[B, A, M, 3]`` in metres; None if nothing
            reads them. places: the same, normalised as the state's positions (`GeometryVLAModule.with_places`).
    """

    contexts: list[BlockContext]
    groups: tuple[int, int, int]
    geometry: GeometryFeatures | None
    pointing: Tensor | None = None
    met: Tensor | None = None
    places: Tensor | None = None


@model_part
class GeometryVLA(nn.Module):
    """Vision-language model, geometry encoder, compressor and action head.

    Args:
        vlm: outputs hidden states; its width is also the head's. geometry: outputs geometry tokens.
        arms: which arms, in the order of the batch's arm axis. horizon: T.
        blocks: N, of the head; the last N layers of the vision-language model are read.
        geom_inject_to_dit: false: the head reads no geometry; the policy depends on the vision-language model alone.
        geom_dit_tokens: K; 0: the head reads geometry only at the pointed places. geom_compression_type: pool,
            per_layer or qformer. geom_qformer_heads: of the qformer.
        future_tokens, head_size, expansion, self_attention_every: see `ActionHead`.
        context_norm: scale each context token to unit variance: layers of a pretrained language model differ by orders
            of magnitude, among each other and from geometry tokens.
        context_places: add an embedding of its place to each image token in the contexts. The hidden states of a large
            language model contain the place; those of a small one, which encodes positions only as rotations inside
            its attention, do not.
        pointing_cells: cells along a side of an image token, for which the vision-language model predicts where the
            gripper will be (see `Pointing`); 0 disables the maps and their loss.
        pointing_keyframe: one more map, of where the gripper closes or opens next: the model then learns its target
            during the whole approach.
        pointing_patch_cells: cells along a side of a geometry token's patch, for which the maps are also predicted from
            that token (see `PatchPointing`); their grid must be that of the maps. 0: only from the language model's
            states, as without an encoder.
        pointed_tokens: give the head the content of those maps, and the geometry encoder's output at the places that
            they show (see `PointedTokens`).
        pointed_triangulated: those tokens also contain where the views' rays through the places meet. This requires
            calibrated cameras, and is more exact the further apart they stand.
        pointed_actions: each action token of the head is given directly where the rays meet for its own step and for
            the keyframe (see `PointedActions`). Like `pointed_triangulated` it requires calibrated cameras.
        action_kind: `model.actions.kind`, which determines how many numbers an action has.
        geom_places: add to each geometry token, before compression, an embedding of its image and its place in it.
        geom_blank: the actions depend on nothing from the geometry encoder: its tokens, world points and scale token
            are replaced by zeros. A control for the effect of further tokens, parameters and a depth loss.
        geom_standardised: each number of each of the K tokens is standardised over the samples seen in training, in
            place of `context_norm`. Pooled tokens differ mostly by which of the K they are, and little by the scene.
        geom_inject_to_vlm: K compressed tokens are inserted in the language model's prompt, before the images, and
            reach the head through it.

    Raises:
        ValueError: sizes that do not fit, injection without a geometry encoder, or a token of the metric scale
            (`GeometryEncoder.gives_scale`) that nothing would read.
    """

    read_where: ClassVar = {
        # omitted: MapAnything would be loaded, and needs its package, for a policy that does not contain it
        "geometry": ReadWhere("geom_inject_to_dit geom_inject_to_vlm", omitted=True),
        "geom_dit_tokens": ReadWhere("geom_inject_to_dit geom_inject_to_vlm"),
        "pointing_patch_cells": ReadWhere("geom_inject_to_dit geom_inject_to_vlm"),
        "geom_compression_type": ReadWhere("geom_dit_tokens"),
        "geom_qformer_heads": ReadWhere("geom_compression_type", "qformer"),
    }

    def __init__(
        self,
        vlm: QwenVL,
        geometry: GeometryEncoder | None,
        arms: Sequence[str],
        horizon: int,
        blocks: int,
        geom_inject_to_dit: bool = True,
        geom_dit_tokens: int = 16,
        geom_compression_type: str = "pool",
        geom_qformer_heads: int = 8,
        future_tokens: int = 32,
        head_size: int = 64,
        expansion: int = 4,
        self_attention_every: int = 1,
        context_norm: bool = True,
        context_places: bool = False,
        pointing_cells: int = 0,
        pointing_keyframe: bool = False,
        pointing_patch_cells: int = 0,
        pointed_tokens: bool = False,
        pointed_triangulated: bool = False,
        pointed_actions: bool = False,
        action_kind: str = "absolute",
        geom_places: bool = False,
        geom_inject_to_vlm: bool = False,
        geom_blank: bool = False,
        geom_standardised: bool = False,
    ) -> None:
        super().__init__()
        check_geometry(
            geometry,
            to_head=geom_inject_to_dit,
            to_vlm=geom_inject_to_vlm,
            tokens=geom_dit_tokens,
            kind=geom_compression_type,
            pointed=pointed_tokens,
            places=geom_places,
            blank=geom_blank,
            standardised=geom_standardised,
        )
        check_pointing(
            cells=pointing_cells,
            patch_cells=pointing_patch_cells,
            keyframe=pointing_keyframe,
            tokens=pointed_tokens,
            triangulated=pointed_triangulated,
            actions=pointed_actions,
        )
        if blocks > vlm.layers:
            raise ValueError(
                f"model.network.blocks={blocks}, but the vision-language model has {vlm.layers} layers: each block "
                "reads one of them."
            )
        # The order of construction is fixed, because it determines the initial weights that a seed gives.
        self.vlm, self.compiled = vlm, False
        self.context_norm, self.blank = context_norm, geom_blank
        self.places = PlaceEmbedding(vlm.width) if context_places else None
        maps = horizon + pointing_keyframe
        self.pointing = Pointing(vlm.width, len(arms), maps, pointing_cells) if pointing_cells else None
        if not (geom_inject_to_dit or geom_inject_to_vlm):
            log.info("geom_inject_to_dit=false: no geometry encoder; the actions depend on the vision-language model")
            geometry = None
        self.geometry = geometry
        self.compressor: GeometryCompressor | None = None
        self.vlm_compressor: GeometryCompressor | None = None
        if geometry is not None:
            compressor = partial(build_geom_compressor, geom_compression_type, geometry.dim, vlm.width)
            if geom_inject_to_dit and geom_dit_tokens:
                self.compressor = compressor(blocks, geom_dit_tokens, geom_qformer_heads)
            if geom_inject_to_vlm:
                self.vlm_compressor = compressor(1, geom_dit_tokens, geom_qformer_heads)
        self.pointed: PointedTokens | None = None
        if pointed_tokens:
            source = geometry if geom_inject_to_dit else None
            geom_dim, points = (None, False) if source is None else (source.dim, source.predicts_points)
            self.pointed = PointedTokens(vlm.width, len(arms), maps, MOST_VIEWS, geom_dim, points, pointed_triangulated)
        self.pointed_actions: PointedActions | None = None
        if pointed_actions:
            self.pointed_actions = PointedActions(vlm.width, len(arms), horizon, pointing_keyframe)
        self.head = ActionHead(
            vlm.width,
            blocks,
            len(arms) * SIZE,
            len(arms) * COLUMNS.get(action_kind, SIZE),
            horizon,
            future_tokens,
            head_size,
            expansion,
            self_attention_every,
        )
        self.scale: nn.Linear | None = None
        self.geometry_places: PlaceEmbedding | None = None
        self.patch_pointing: PatchPointing | None = None
        if geometry is not None:
            if geometry.gives_scale:
                self.scale = nn.Linear(geometry.dim, vlm.width)
            if geom_places:
                self.geometry_places = PlaceEmbedding(geometry.dim)
            if pointing_patch_cells:
                self.patch_pointing = PatchPointing(vlm.width, geometry.dim, len(arms), maps, pointing_patch_cells)
        self.check_grids()
        shape = (blocks, geom_dit_tokens, vlm.width)
        self.standardised = RunningStandardisation(*shape) if geom_standardised else None
        self.vlm_gain = nn.LayerNorm(vlm.width) if self.vlm_compressor is not None else None

    def check_grids(self, image_size: int | None = None) -> None:
        """Refuse maps whose cells differ from those that the geometry encoder's patches give, if its patches are known.

        Args:
            image_size: side of the images, pixels; None: not known yet.

        Raises:
            ValueError: `pointing_patch_cells` does not fit.
        """
        side = None if self.geometry is None else self.geometry.grid_side(image_size)
        if side is not None and self.patch_pointing is not None and self.pointing is not None:
            tokens = round(self.vlm.tokens_per_view**0.5)
            refuse_other_grid(side, tokens, self.patch_pointing.cells, self.pointing.cells)

    @property
    def triangulates(self) -> bool:
        """Whether it reads the points where the views' rays through pointed places meet."""
        pointed = self.pointed is not None and self.pointed.meeting is not None
        return pointed or self.pointed_actions is not None

    def encode(
        self,
        images: Tensor,
        instructions: Sequence[str],
        intrinsics: Tensor,
        world_to_camera: Tensor,
        geometry: GeometryFeatures | None = None,
    ) -> Scene:
        """One pass of the encoders.

        Args:
            images: uint8 ``[B, V, 3, S, S]``. instructions: B sentences.
            intrinsics: ``[B, V, 3, 3]``. world_to_camera: ``[B, V, 4, 4]``.
            geometry: features in place of those of the geometry encoder.
        """
        blocks, views = len(self.head.blocks), images.shape[1]
        geometry_features = geometry  # read by the depth loss; `features` is read by the policy
        if self.geometry is not None and geometry_features is None:
            geometry_features = self.geometry(images, intrinsics, world_to_camera)
        features = geometry_features
        if geometry_features is not None and self.geometry is not None and not self.geometry.action_gradient:
            features = geometry_features.detach()
        if self.blank and features is not None:
            features = self._zero_features(features)
        semantics = self.vlm(images, instructions, blocks, self._prompt_prefix(features, views))
        pointing, met, pointed = None, None, None
        if self.pointing is not None:
            pointing = self._pointing_logits(semantics.layers[-1].float(), semantics.places, views, features)
        # From here on in float32: the head's inputs and the head itself.
        with without_autocast(images):
            geometry_tokens = self._geometry_tokens(features, views)
            if self.triangulates:
                assert pointing is not None
                shares = intrinsics / intrinsics.new_tensor([[images.shape[-1]], [images.shape[-1]], [1.0]])
                met = meeting_points(pointing, shares, world_to_camera)
            if self.pointed is not None and pointing is not None:
                pointed = self.pointed(pointing, features, met)
            contexts, groups = self._contexts(semantics, geometry_tokens, pointed)
        return Scene(contexts, groups, geometry_features, pointing, None if met is None else met[0])

    def _prompt_prefix(self, features: GeometryFeatures | None, views: int) -> Tensor | None:
        """Geometry tokens ``[B, K, H]`` for the language model's prompt; None if it gets none."""
        if self.vlm_compressor is None or self.vlm_gain is None:
            return None
        assert features is not None
        with without_autocast(features.tokens):
            (prefix,) = self.vlm_compressor(self._placed(features.tokens, views))
            return self.vlm_gain(prefix)

    def _geometry_tokens(self, features: GeometryFeatures | None, views: int) -> list[Tensor] | None:
        """Geometry tokens ``[B, K, H]`` for each of the head's blocks, K + 1 with the token of the metric scale; None
        if the head reads none."""
        if features is None or self.compressor is None:
            return None
        tokens = self.compressor(self._placed(features.tokens, views))
        if self.standardised is None:
            tokens = [self._normed(each) for each in tokens]
        else:
            tokens = list(self.standardised(torch.stack(tokens, dim=1)).unbind(dim=1))
        if self.scale is None:
            return tokens
        assert features.scale is not None
        scale = self._normed(self.scale(features.scale.float()))[:, None]
        return [torch.cat([each, scale], dim=1) for each in tokens]

    def _contexts(
        self, semantics: Semantics, geometry: list[Tensor] | None, pointed: Tensor | None
    ) -> tuple[list[BlockContext], tuple[int, int, int]]:
        """The context of each block of the head (hidden states of its layer, geometry and pointed tokens), and the
        number of tokens in each of the three groups."""
        groups = (
            semantics.places.shape[1],
            0 if geometry is None else geometry[0].shape[1],
            0 if pointed is None else pointed.shape[1],
        )
        mask, contexts = semantics.mask, []
        if mask is not None:
            mask = F.pad(mask, (0, groups[1] + groups[2]), value=True)
        place_features = 0.0 if self.places is None else self.places(semantics.places)
        for index, hidden in enumerate(semantics.layers):
            parts = [self._normed(hidden.float()) + place_features]
            if geometry is not None:
                parts.append(geometry[index])
            if pointed is not None:
                parts.append(pointed)
            contexts.append(BlockContext(torch.cat(parts, dim=1), mask))
        return contexts, groups

    def _pointing_logits(self, hidden: Tensor, places: Tensor, views: int, features: GeometryFeatures | None) -> Tensor:
        """Logits of where the gripper will be, summed over all sources of them."""
        assert self.pointing is not None
        logits = self.pointing(hidden, places, views)
        if self.patch_pointing is None:
            return logits
        assert features is not None
        finer = self.patch_pointing(hidden, places, views, features.tokens.float())
        of_patches, of_tokens = self.patch_pointing.cells, self.pointing.cells
        refuse_other_grid(finer.shape[-1] // of_patches, logits.shape[-1] // of_tokens, of_patches, of_tokens)
        return logits + finer

    def _placed(self, tokens: Tensor, views: int) -> Tensor:
        """Geometry tokens ``[B, G, D]`` float32 before compression: with `geom_places`, each with its place.

        Raises:
            ValueError: the tokens do not lie on a square grid in each view.
        """
        tokens = tokens.float()
        if self.geometry_places is None:
            return tokens
        side = round((tokens.shape[1] / views) ** 0.5)
        if views * side * side != tokens.shape[1]:
            raise ValueError(
                f"model.network.geom_places=true needs geometry tokens on a square grid, got {tokens.shape[1]} of "
                f"{views} views: set it to false with this geometry encoder."
            )
        return tokens + self.geometry_places(grid_places(views, side, tokens.device)[None])

    @staticmethod
    def _zero_features(features: GeometryFeatures) -> GeometryFeatures:
        """Features of zeros; the encoder's parameters stay in the graph, which DDP requires."""
        points, scale = (None if each is None else 0 * each for each in (features.points, features.scale))
        return replace(features, tokens=0 * features.tokens, points=points, scale=scale)

    def _normed(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.context_norm else tokens

    def velocity(
        self, scene: Scene, actions: Tensor, level: Tensor, state: Tensor, record: AttentionRecord | None = None
    ) -> Tensor:
        """The velocity ``[B R, T, Da]`` of noisy actions of that shape at noise levels ``[B R]``; state ``[B, Ds]``."""
        action_bias = None
        if self.pointed_actions is not None:
            assert scene.places is not None, "GeometryVLAModule.with_places adds them"
            with without_autocast(actions):
                present = state.float().unflatten(-1, (-1, SIZE))[..., :3]  # of each arm
                action_bias = self.pointed_actions(scene.places, present)
        return self.head(actions, level, state, scene.contexts, record, action_bias)

    @torch.no_grad()
    def sample(self, scene: Scene, noise: Tensor, state: Tensor, sampling: ActionSampling | None = None) -> Tensor:
        """Sample actions ``[B, T, Da]`` from standard normal noise of that shape; the scene's keys and values are
        computed in the first step and cached."""
        chosen = sampling or ActionSampling()
        call = partial(self._velocity_at, scene, state)
        return integrate(call, chosen.temperature * noise, noise_levels(chosen.steps), chosen.solver)

    @torch.no_grad()
    def sample_continuing(
        self,
        scene: Scene,
        noise: Tensor,
        state: Tensor,
        known: Tensor,
        weight: Tensor,
        sampling: ActionSampling | None = None,
    ) -> Tensor:
        """As `sample`, guided to `known` actions ``[B, T, Da]`` by ``weight`` ``[T]`` (see `nn.inpainting`)."""
        chosen = sampling or ActionSampling()
        # with few steps the paper's bound of 5 would correct an error more than once
        strongest = min(5.0, float(chosen.steps))
        with without_autocast(noise):  # as the head computes
            for block, context in zip(self.head.blocks, scene.contexts, strict=True):
                # cached here, because nothing is cached while guidance records gradients
                context.keys_values(cast(HeadBlock, block).attention)
        call = guided_velocity(partial(self._velocity_at, scene, state), known, weight, strongest)
        return integrate(call, chosen.temperature * noise, noise_levels(chosen.steps), chosen.solver)

    def _velocity_at(self, scene: Scene, state: Tensor, x: Tensor, level: float) -> Tensor:
        return self.velocity(scene, x, torch.full((len(x),), level, device=x.device), state)

    def compile_parts(self, backend: Backend = "inductor") -> None:
        """Let torch compile, in place and at their next call, the action head and a geometry encoder that is one graph.

        The caller sets `compiled` after calling them. A large language model's own kernels gain nothing from it.
        """
        self.head.compile(backend=backend)
        if self.geometry is not None and self.geometry.one_graph:
            self.geometry.compile(backend=backend)

    def sharded_parts(self) -> list[nn.Module]:
        """Blocks that are only called through their `forward`, which FSDP may shard one by one."""
        geometry = [] if self.geometry is None else self.geometry.sharded_parts()
        return [*self.vlm.sharded_parts(), *geometry, *self.head.blocks, *self.head.mixers]

"""The trained volume-query network as a policy: an observation in, a plan of metric poses out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from keygrip.data.batches import CLOSED, normalised
from keygrip.data.robot.augmentation import View
from keygrip.models.dark_images import image_shows_nothing
from keygrip.models.geometry.cameras import project
from keygrip.models.policy import (
    Needs,
    Observation,
    Plan,
    calibration_of,
    image_of,
    instruction_of,
    refuse_incomplete,
    view_names,
    views_of,
    views_or_none,
)
from keygrip.models.policy_tensors import plans_of, restored_on_error, stacked, stacked_poses, stacked_views
from keygrip.models.training_box import HeldBackWarning, Margin, check_margin, kept_in_box
from keygrip.models.volume_query.decoding import Decoder, DecoderName
from keygrip.models.volume_query.second_look import SharpImage
from keygrip.models.volume_query.symmetry import steady_turns
from keygrip.models.volume_query.targets import arm_state, views_of_images
from keygrip.models.volume_query.world import FurtherViews, KnownProjections

if TYPE_CHECKING:
    from keygrip.models.volume_query.module import VolumeQueryModule

log = logging.getLogger(__name__)

# Limits the height only, because the table may be below. Along x and y a limit of 1 cm put objects beyond the
# demonstrated region out of reach and changed nothing else (benchmarks/volume_query_margins.json).
USUAL_MARGIN: Margin = (None, None, 0.01)
SENTENCES_KEPT = 1000  # sentences remembered, since clients may send any number; forgotten ones cause a new warning


@dataclass
class VolumeQueryPolicy:
    """Plan with a trained module, whose checkpoint contains everything that the policy needs.

    Args:
        module: trained, with its statistics.
        decoder: converts distributions to trajectories. A name: this decoder, with the module's other decoder settings.
            None: the module's own decoder.
        margin_m: planned positions are kept within this distance of the bounding box of the training positions, along
            all axes or along x, y and z; None: no limit. By default only heights are limited, because the table may be
            below. `held_back` of a plan gives how far it was moved; a warning reports this once per episode.
        seed: of the "sample" decoder.
        steady_turns: for a module with `rotation_symmetry`: each step of a plan uses the equivalent grip nearest to the
            previous step (`keygrip.models.volume_query.symmetry`); False: each step uses its own most probable grip.
    """

    module: VolumeQueryModule
    decoder: Decoder | DecoderName | None = None
    margin_m: Margin = USUAL_MARGIN
    seed: int = 0
    steady_turns: bool = True

    def __post_init__(self) -> None:
        check_margin(self.margin_m)
        self.module.eval()
        self.chosen_decoder()  # raises ValueError for an unknown name
        self._geometry = self.module.statistics.geometry
        self._read: set[str] = set()  # sentences whose words were checked
        self._generator = torch.Generator(device=self.module.device).manual_seed(self.seed)
        self._projections = KnownProjections()
        self._warning = HeldBackWarning()

    @property
    def needs(self) -> Needs:
        """What the policy reads from an observation."""
        network, views = self.module.network, self.module.views
        return Needs(
            arms=tuple(network.arms),
            cameras=views if network.world_views else (),
            instruction=network.instruction_encoder is not None or self._symmetry_by_word,
            camera=views[0] if views and not network.world_views else None,
        )

    @property
    def _symmetry_by_word(self) -> bool:
        return self.steady_turns and self.module.symmetry.depends_on_instruction

    @property
    def masks_views(self) -> bool:
        """Whether cameras whose images show nothing are left out."""
        return self.module.network.world_views and len(self.module.views) > 1

    def chosen_decoder(self) -> Decoder:
        """The decoder used for plans."""
        if isinstance(self.decoder, str):
            return replace(self.module.decoder, name=self.decoder)
        return self.decoder or self.module.decoder

    def reset(self, seed: int) -> None:
        """Start an episode; from here on the samples of the "sample" decoder depend only on the seeds."""
        self._warning.begin()
        self._generator.manual_seed(self.seed + seed)

    def session(self) -> Self:
        """Another policy on the same network, with its own random generator."""
        session = replace(self)
        session._projections = self._projections  # sessions usually have the same cameras
        return session

    @property
    def workspace(self) -> np.ndarray:
        """``[2, 3]`` lowest and highest position seen in training, metres."""
        return self.module.statistics.position_range.double().cpu().numpy()

    def _tokens(self, observations: Sequence[Observation]) -> torch.Tensor | None:
        encoder = self.module.network.instruction_encoder
        if encoder is None:
            return None
        sentences = [instruction_of(observation) for observation in observations]
        for sentence in sentences:
            if sentence not in self._read:
                if len(self._read) == SENTENCES_KEPT:
                    self._read.clear()
                self._read.add(sentence)
                if words := encoder.unknown_words(sentence):
                    log.warning(
                        "the instruction %r has words that no demonstration held: %s", sentence, ", ".join(words)
                    )
        return self.module.instruction_tokens(sentences)

    def plan(self, observation: Observation) -> Plan:
        """Poses of the next T steps.

        Raises:
            ParallelRayError: the camera sees none of the height planes.
            ValueError: the instruction, a camera or an arm's pose is missing or invalid.
        """
        refuse_incomplete(observation, self.needs)
        return self._plans([observation], [self])[0]

    def plan_batch(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        """Plan for several sessions in one pass of the network, or one by one with the "sample" decoder; see `plan`.
        An error leaves the generators of all sessions unchanged."""
        if self.chosen_decoder().name == "sample":
            with restored_on_error([session._generator for session in sessions]):
                return [session.plan(observation) for session, observation in zip(sessions, observations, strict=True)]
        return self._plans(observations, sessions)

    def _views(self, observation: Observation) -> list[Mapping[str, Any] | None]:
        views = views_or_none(observation, self.module.views)
        if views[0] is None:
            raise ValueError(
                f"camera {self.module.views[0]!r} is None: the volume is that of the first camera, whose calibration "
                "is always needed (give it with a black image)"
            )
        return views

    def _view(self, view: Mapping[str, Any] | None, camera: str) -> View:
        """Convert one camera's view to the network's input; an image that shows nothing becomes black, which is masked.

        The criterion is applied to the whole image, as in the server, not to the crop: an image that shows nothing and
        that the server lets through is masked whatever its crop shows.
        """
        if view is None:
            return self._geometry.absent_view()
        image = image_of(view, camera)
        if image_shows_nothing(image):
            image = np.zeros_like(image)
        return self._geometry.view(image, *calibration_of(view, camera))

    def _first_and_further_views(
        self, observations: Sequence[Observation]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, FurtherViews]:
        """The first camera's image, intrinsics and pose, and the views of the other cameras."""
        module = self.module
        camera_views = [
            [self._view(view, name) for name, view in zip(module.views, self._views(observation), strict=True)]
            for observation in observations
        ]
        images, k, camera = stacked_views(camera_views, module.device)
        further = views_of_images(
            images,
            k,
            camera,
            network=module.network,
            statistics=module.statistics,
            project_voxels=self._projections,
        )
        mean, std = self._geometry.mean, self._geometry.std
        return normalised(images[:, 0], mean, std), k[:, 0], camera[:, 0], further

    def _first_view(self, observation: Observation) -> tuple[Mapping[str, Any], str]:
        """The first camera's view and its name for messages; for a network of one camera, the observation itself, which
        contains the image."""
        if not self.module.network.world_views:
            return observation, ""
        first = self.module.views[:1]
        return views_of(observation, first)[0], view_names(observation, first)[0]

    def _sharp_image(self, observations: Sequence[Observation]) -> SharpImage | None:
        second_look = self.module.network.second_look
        if second_look is None:
            return None
        images = [image_of(*self._first_view(observation)) for observation in observations]
        details = [self._geometry.detail(image, second_look.sharp_size) for image in images]
        return SharpImage(torch.stack(details).to(self.module.device), self._geometry.mean, self._geometry.std)

    def _turns(
        self, planned: torch.Tensor, start: torch.Tensor, gripper: torch.Tensor, observations: Sequence[Observation]
    ) -> torch.Tensor:
        """Rotations ``[B, A, T, 4]`` of plans after `steady_turns`.

        The plans begin at the rotations ``start`` ``[B, A, 4]`` with the openings ``gripper`` ``[B, A]``.
        """
        module = self.module
        if not module.symmetry.is_symmetric or not self.steady_turns:
            return planned
        sentences = [instruction_of(observation) for observation in observations] if self._symmetry_by_word else ()
        for order, free in module.symmetry.choices(sentences, gripper >= CLOSED):
            planned = torch.stack(
                [
                    steady_turns(planned[:, i], start[:, i], free[:, i], module.codec(arm), order)
                    for i, arm in enumerate(module.network.arms)
                ],
                dim=1,
            )
        return planned

    @torch.inference_mode()
    def _plans(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        module, network, statistics = self.module, self.module.network, self.module.statistics
        device = module.device
        if network.world_views and len(module.views) > 1:
            image, k, camera, further = self._first_and_further_views(observations)
        else:
            first_views = [self._first_view(observation) for observation in observations]
            calibrations = [calibration_of(*view) for view in first_views]
            cropped = [
                self._geometry.apply(image_of(*view), intrinsics)
                for view, (intrinsics, _) in zip(first_views, calibrations, strict=True)
            ]
            image = torch.stack([view.to(device) for view, _ in cropped])
            k = torch.stack([matrix for _, matrix in cropped]).to(device)
            camera, further = stacked([world_to_camera for _, world_to_camera in calibrations], device), None
        position, quaternion, gripper = stacked_poses(observations, len(network.arms), device)
        start_pixels, _ = project(position, k[:, None], camera[:, None])
        state = arm_state(network.state_parts, position, quaternion, gripper, statistics.height_range)
        decoder = self.chosen_decoder()
        settings: dict[str, Any] = {
            "intrinsics": k,
            "world_to_camera": camera,
            "height_range": statistics.height_range,
            "image_size": network.image_size,
            "generator": self._generator,
        }
        output = network(
            image,
            start_pixels,
            state,
            partial(decoder.places, **settings),
            self._tokens(observations),
            further,
            self._sharp_image(observations),
        )
        decoded = decoder.decode(output, [module.codec(arm) for arm in network.arms], **settings)
        turns = self._turns(decoded.quaternion, quaternion, gripper, observations)
        clamped, held_back = kept_in_box(decoded.position, statistics.position_range, self.margin_m)
        plans = plans_of(clamped, turns, decoded.gripper, statistics.step_seconds, decoded.entropy, held_back)
        for session, plan in zip(sessions, plans, strict=True):
            session._warning.check_plan(plan, network.arms, self.margin_m)
        return plans

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
    called,
    image_of,
    instruction_of,
    refuse_incomplete,
    views_of,
    views_there,
)
from keygrip.models.policy_tensors import plans_of, stacked, stacked_poses, stacked_views
from keygrip.models.training_box import HeldBackWarning, Margin, check_margin, kept_in_box
from keygrip.models.volume_query.decoding import Decoder, DecoderName
from keygrip.models.volume_query.second_look import SharpImage
from keygrip.models.volume_query.symmetry import steady_turns
from keygrip.models.volume_query.targets import arm_state, views_of_images
from keygrip.models.volume_query.world import FurtherViews, KnownProjections

if TYPE_CHECKING:
    from keygrip.models.volume_query.module import VolumeQueryModule

log = logging.getLogger(__name__)

# Height alone: below may be the table. Along x and y a limit of 1 cm took away objects that lie beyond the
# demonstrations and changed nothing else (benchmarks/volume_query_margins.json).
USUAL_MARGIN: Margin = (None, None, 0.01)
SENTENCES_KEPT = 1000  # sentences remembered, of any number that clients send; a forgotten one is warned about again


@dataclass
class VolumeQueryPolicy:
    """Plans with a trained module; everything that it needs lies in the module's checkpoint.

    Args:
        module: trained, with its statistics.
        decoder: how a distribution becomes a trajectory; a name: the module's own settings otherwise; None: its own.
        margin_m: planned positions are kept within this distance of the box of the positions seen in training, along
            all axes or along x, y and z; None: no limit. Usually heights alone are: what lies below may be the table.
            Plans say in `held_back` how far they were moved; a warning says it once an episode.
        seed: of the "sample" decoder.
        steady_turns: of a module with `rotation_symmetry`: each step of a plan takes the equivalent grip nearest to the
            step before it (`keygrip.models.volume_query.symmetry`); False: each the most probable by itself.
    """

    module: VolumeQueryModule
    decoder: Decoder | DecoderName | None = None
    margin_m: Margin = USUAL_MARGIN
    seed: int = 0
    steady_turns: bool = True

    def __post_init__(self) -> None:
        check_margin(self.margin_m)
        self.module.eval()
        self.chosen_decoder()  # refuses a name that does not exist
        self._geometry = self.module.statistics.geometry
        self._read: set[str] = set()  # sentences whose words were checked
        self._generator = torch.Generator(device=self.module.device).manual_seed(self.seed)
        self._projections = KnownProjections()
        self._warning = HeldBackWarning()

    @property
    def needs(self) -> Needs:
        """What it reads of an observation."""
        network, views = self.module.network, self.module.views
        return Needs(
            arms=tuple(network.arms),
            cameras=views if network.world_views else (),
            instruction=network.instruction_encoder is not None or self._turns_by_word,
            camera=views[0] if views and not network.world_views else None,
        )

    @property
    def _turns_by_word(self) -> bool:
        return self.steady_turns and self.module.symmetry.by_word

    @property
    def masks_views(self) -> bool:
        """Whether cameras whose images show nothing are left out."""
        return self.module.network.world_views and len(self.module.views) > 1

    def chosen_decoder(self) -> Decoder:
        """The decoder that plans are made with."""
        if isinstance(self.decoder, str):
            return replace(self.module.decoder, name=self.decoder)
        return self.decoder or self.module.decoder

    def reset(self, seed: int) -> None:
        """Starts an episode: what the "sample" decoder draws is from here on a function of the seeds."""
        self._warning.begin()
        self._generator.manual_seed(self.seed + seed)

    def session(self) -> Self:
        """Another policy on the same network, with a generator of its own."""
        session = replace(self)
        session._projections = self._projections  # sessions mostly see the same cameras
        return session

    @property
    def workspace(self) -> np.ndarray:
        """``[2, 3]`` lowest and highest position seen in training, metres."""
        return self.module.statistics.position_range.double().cpu().numpy()

    def _tokens(self, observations: Sequence[Observation]) -> torch.Tensor | None:
        encoder = self.module.network.instruction_encoder
        if encoder is None:
            return None
        sentences = [instruction_of(seen) for seen in observations]
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
            ParallelRayError: the camera sees none of the planes of the heights.
            ValueError: the instruction, a camera or an arm's pose is missing or cannot be right.
        """
        refuse_incomplete(observation, self.needs)
        return self._plans([observation], [self])[0]

    def plan_batch(self, observations: Sequence[Observation], sessions: Sequence[Self]) -> list[Plan]:
        """The plans of several sessions in one pass of the network; one by one where they draw by chance. As `plan`."""
        if self.chosen_decoder().name == "sample":
            return [session.plan(seen) for session, seen in zip(sessions, observations, strict=True)]
        return self._plans(observations, sessions)

    def _views(self, observation: Observation) -> list[Mapping[str, Any] | None]:
        views = views_there(observation, self.module.views)
        if views[0] is None:
            raise ValueError(
                f"camera {self.module.views[0]!r} is None: the volume is that of the first camera, whose calibration "
                "is always needed (give it with a black image)"
            )
        return views

    def _view(self, view: Mapping[str, Any] | None, camera: str) -> View:
        """One camera's image as the network takes it; black, which is masked, where it shows nothing.

        The whole image decides, as at the server: what it lets through is left out whatever the cut shows of it.
        """
        if view is None:
            return self._geometry.absent_view()
        image = image_of(view, camera)
        if image_shows_nothing(image):
            image = np.zeros_like(image)
        return self._geometry.view(image, *calibration_of(view, camera))

    def _all_views(
        self, observations: Sequence[Observation]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, FurtherViews]:
        """The first camera's image, intrinsics and pose, and what the others see."""
        module = self.module
        seen = [
            [self._view(view, name) for name, view in zip(module.views, self._views(observation), strict=True)]
            for observation in observations
        ]
        images, k, camera = stacked_views(seen, module.device)
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
        """What the first camera sees, and what messages call it: of a network of one camera, the observation's own
        image."""
        if not self.module.network.world_views:
            return observation, ""
        first = self.module.views[:1]
        return views_of(observation, first)[0], called(observation, first)[0]

    def _sharp_image(self, observations: Sequence[Observation]) -> SharpImage | None:
        look = self.module.network.second_look
        if look is None:
            return None
        images = [image_of(*self._first_view(seen)) for seen in observations]
        details = [self._geometry.detail(image, look.sharp_size) for image in images]
        return SharpImage(torch.stack(details).to(self.module.device), self._geometry.mean, self._geometry.std)

    def _turns(
        self, planned: torch.Tensor, start: torch.Tensor, gripper: torch.Tensor, observations: Sequence[Observation]
    ) -> torch.Tensor:
        """Rotations ``[B, A, T, 4]`` of plans that begin at ``[B, A, 4]`` with the opening ``[B, A]``."""
        module = self.module
        if not module.symmetry.several or not self.steady_turns:
            return planned
        sentences = [instruction_of(seen) for seen in observations] if self._turns_by_word else ()
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
            image, k, camera, further = self._all_views(observations)
        else:
            first = [self._first_view(seen) for seen in observations]
            calibrations = [calibration_of(*one) for one in first]
            cut = [
                self._geometry.apply(image_of(*one), intrinsics)
                for one, (intrinsics, _) in zip(first, calibrations, strict=True)
            ]
            image = torch.stack([one.to(device) for one, _ in cut])
            k = torch.stack([matrix for _, matrix in cut]).to(device)
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
        kept, moved = kept_in_box(decoded.position, statistics.position_range, self.margin_m)
        plans = plans_of(kept, turns, decoded.gripper, statistics.step_seconds, decoded.entropy, moved)
        for session, plan in zip(sessions, plans, strict=True):
            session._warning.look_at(plan, network.arms, self.margin_m)
        return plans

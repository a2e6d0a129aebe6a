"""A geometry-injected policy of some ten thousand parameters, and a batch of noise for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keygrip.data.batches import MultiViewPolicyBatch, PolicyTargets
from keygrip.data.robot.augmentation import ImageGeometry
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.data.robot.statistics import DemoStatistics
from keygrip.models.backbone import DinoBackbone
from keygrip.models.geometry.rotations import rotation_exp
from keygrip.models.geometry_vla.action_spaces import ActionKind
from keygrip.models.geometry_vla.actions import PoseActions
from keygrip.models.geometry_vla.geometry import DinoMultiView, GeometryEncoder
from keygrip.models.geometry_vla.module import GeometryVLAModule
from keygrip.models.geometry_vla.network import GeometryVLA
from keygrip.models.language.qwen_vl import QwenVL, Vision
from keygrip.models.language.tokenizers import TrainedTokenizer
from keygrip.models.nn.flow_matching import BetaTimesteps
from keygrip.training.optimizers import AdamW

S, T, V = 32, 4, 2
CAMERAS = ("over", "front")
INSTRUCTIONS = ("put the red cube into the bowl", "put the green one into the bowl, please")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_vlm(**changes: object) -> QwenVL:
    torch.manual_seed(0)
    options: dict[str, object] = {
        "layers": 3,
        "width": 32,
        "heads": 2,
        "kv_heads": 1,
        "mlp_width": 48,
        "vocabulary": 330,
        "vision": Vision(layers=1, width=16, heads=2, mlp_width=24, patch_size=8, window=S, full_attention=[0]),
        "image_token": 329,
        "vision_start": 328,
        "vision_end": 327,
        "image_size": S,
        "tokenizer": TrainedTokenizer(320),
        "rope_sections": [2, 3, 3],
        "rope_theta": 10000.0,
    }
    built = QwenVL(**(options | changes))  # type: ignore[arg-type]
    with torch.no_grad():  # as initialised, words and images have too little effect for a test
        built.model.language_model.embed_tokens.weight.mul_(25)
    return built


def small_geometry(**changes: object) -> DinoMultiView:
    torch.manual_seed(1)
    backbone = DinoBackbone("tiny", S, "random", width=16, depth=1, heads=2)
    options: dict[str, object] = {"views": V, "dim": 16, "layers": 2, "heads": 2}
    return DinoMultiView(backbone, **(options | changes))  # type: ignore[arg-type]


def small_module(
    geometry: GeometryEncoder | None = None,
    vlm: QwenVL | None = None,
    kind: ActionKind = "absolute",
    draws: int = 2,
    **changes: object,
) -> GeometryVLAModule:
    """Build a small module. Without `geometry` it has the small one; `geom_inject_to_dit=False` leaves it out."""
    vlm, geometry = vlm or small_vlm(), geometry or small_geometry()
    options: dict[str, object] = {"blocks": 2, "geom_dit_tokens": 4, "future_tokens": 3, "head_size": 16}
    torch.manual_seed(2)
    network = GeometryVLA(vlm, geometry, ("right",), T, **(options | changes))  # type: ignore[arg-type]
    for block in [*network.head.blocks, *network.head.mixers]:  # AdaLN is zero-initialised
        torch.nn.init.normal_(block.modulation.linear.weight, std=0.1)
    recipe = AdamW(lr=1e-3, schedule="constant")
    return GeometryVLAModule(network, PoseActions(("right",), kind), recipe, BetaTimesteps(), draws=draws)


def poses(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    low, high = torch.tensor([0.1, -0.3, 0.0]), torch.tensor([0.5, 0.3, 0.2])
    start = uniform(count, 1, 3) * (high - low) + low
    turn = 0.5 * torch.randn(count, 1, 3, generator=generator)
    return {
        "start_position": start,
        "start_quaternion": rotation_exp(turn),
        "start_gripper": uniform(count, 1),
        "position": start[:, :, None] + 0.05 * torch.randn(count, 1, T, 3, generator=generator),
        "quaternion": rotation_exp(turn[:, :, None] + 0.1 * torch.randn(count, 1, T, 3, generator=generator)),
        "gripper": uniform(count, 1, T),
        "action_is_pad": torch.zeros(count, 1, T, dtype=torch.bool),
        "keyframe": start + 0.05 * torch.randn(count, 1, 3, generator=generator),
        "demo_index": torch.arange(count),
        "frame_index": torch.zeros(count, dtype=torch.long),
    }


def small_batch(instructions: Sequence[str] = INSTRUCTIONS, seed: int = 3, depth: bool = True) -> MultiViewPolicyBatch:
    count = len(instructions)
    generator = torch.Generator().manual_seed(seed)
    camera = torch.tensor([[1.0, 0, 0, -0.3], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]])
    return MultiViewPolicyBatch(
        images=torch.randint(0, 256, (count, V, 3, S, S), generator=generator, dtype=torch.uint8),
        view_intrinsics=torch.tensor([[40.0, 0, 16], [0, 40.0, 16], [0, 0, 1]]).expand(count, V, 3, 3),
        view_world_to_camera=camera.expand(count, V, 4, 4),
        depth=0.8 + 0.4 * torch.rand(count, V, S, S, generator=generator) if depth else None,
        cameras=CAMERAS,
        mean=MEAN,
        std=STD,
        instruction=list(instructions),
        **poses(count, seed),
    )


def observation(seed: int = 0, instruction: str = INSTRUCTIONS[0]) -> dict[str, Any]:
    """Return an observation for a policy of such a module: images of noise from both cameras."""
    generator = np.random.default_rng(seed)
    batch = small_batch()
    views = {
        name: {
            "image": generator.integers(0, 256, (S, S, 3), dtype=np.uint8),
            "intrinsics": batch.view_intrinsics[0, 0].numpy(),
            "world_to_camera": batch.view_world_to_camera[0, 0].numpy(),
        }
        for name in CAMERAS
    }
    return {
        "cameras": views,
        "instruction": instruction,
        "position": np.array([0.3, 0.0, 0.1]),
        "quaternion": np.array([0.0, 1.0, 0.0, 0.0]),
        "gripper": 0.7,
    }


def small_statistics(folder: Path, instructions: Sequence[str] = INSTRUCTIONS) -> DemoStatistics:
    chunks = PolicyTargets(**poses(64, seed=4), instruction=[instructions[i % len(instructions)] for i in range(64)])
    return DemoStatistics(
        height_range=(0.0, 0.2),
        position_range=((0.1, -0.3, 0.0), (0.5, 0.3, 0.2)),
        quaternions={"right": chunks.start_quaternion[:, 0].numpy()},
        arms=("right",),
        targets="reached",
        horizon=T,
        step_seconds=0.3,
        geometry=ImageGeometry(S, MEAN, STD),
        demos=1,
        frames=64,
        fingerprint="test",
        cache_dir=folder,
        cameras=CAMERAS,
        chunks=chunks,
        instructions=tuple(sorted(set(instructions))),
    )


def ready_module(folder: Path, **changes: object) -> GeometryVLAModule:
    """Return `small_module` with statistics and tokenizer."""
    module = small_module(**changes)  # type: ignore[arg-type]
    module.set_statistics(small_statistics(folder))
    return module


def write_demos(
    root: Path,
    count: int = 3,
    frames: int = 6,
    size: int = 40,
    robot: str = "yam",
    begin: Sequence[float] = (0.2, 0.0, 0.1),
    step_m: float = 0.01,
) -> Path:
    """Write folders of two cameras with depth: the gripper moves along x and z from `begin`, by `step_m` per frame."""
    generator = np.random.default_rng(0)
    world_to_camera = np.diag([1.0, -1.0, -1.0, 1.0])
    world_to_camera[2, 3] = 1.0
    camera = CameraPose(np.array([[40.0, 0, size / 2], [0, 40.0, size / 2], [0, 0, 1]]), world_to_camera)
    for number in range(count):
        instruction = INSTRUCTIONS[number % len(INSTRUCTIONS)]
        with DemoWriter(root / f"demo_{number}", robot, "named_place", instruction, fps=10.0) as writer:
            for frame in range(frames):
                pose, following = (
                    ArmPose(
                        np.array(begin) + step_m * np.array([at, 5 * number, at]),
                        np.array([0.0, 1.0, 0, 0]),
                        1 - at / 9,
                    )
                    for at in (frame, frame + 1)
                )
                writer.add(
                    frame * 100_000_000,
                    {name: generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in CAMERAS},
                    dict.fromkeys(CAMERAS, camera),
                    {"right": pose},
                    {"right": following},
                    {name: generator.integers(800, 1200, (size, size)).astype(np.uint16) for name in CAMERAS},
                )
    return root

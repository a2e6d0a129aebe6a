"""What the contract suites require of every model: a training step, a plan, an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

# Options that change the inputs of a model.
OPTIONS = {
    "volume_query_of_two_views": (
        *("model=volume_query", "model.network.world_views=true", "data.cameras=[over,front]"),
        *("+data.record.cameras=[over,front]", "model.network.second_look=64", "model.network.look_size=32"),
    )
}
# Smaller sizes than those of `toy_overrides`, for the systems whose contract is among the quick tests.
SMALLER = {
    "foveated_vlm": (
        *("backbone.depth=1", "language.model.width=32", "language.model.layers=1", "language.model.mlp_width=48"),
        *("model.refinement=1", "data.max_frames=8", "data.sources.tours.make.options.train=2"),
        *("data.sources.tours.make.options.val=1", "data.sources.tours.make.options.test=1"),
    ),
    "geometry_vla": (
        *("backbone.width=32", "backbone.depth=1", "backbone.heads=2", "geometry.dim=32", "geometry.layers=1"),
        *("data.batch_size=2", "model.draws=1", "model.network.blocks=1", "model.network.future_tokens=2"),
    ),
    "patch_dit": (
        *("data.make.options.train=8", "data.make.options.val=4", "data.make.options.test=4"),
        *("model.network.width=32", "model.network.depth=1"),
    ),
    "volume_query": ("data.batch_size=2", "data.record.demos=3"),
}
QUICK = [
    *("strategy=cpu", "strategy.precision=32-true", "data.num_workers=0", "max_steps=1", "val_every_n_steps=1"),
    *("limit_val_batches=1", "log_every_n_steps=1", "logger=none", "callbacks.compute=null"),
]

EVALUATE = {
    "policy": ["simulate=false"],
    "video_text": ["limit_batches=1", "max_new_tokens=2", "split=val"],
    "image_text": [
        "cases=[reconstruction]",
        "images=2",
        "shown=1",
        "sampling.steps=1",
        "split=val",
        "features.steps=2",
    ],
}


def observation(policy: Any) -> dict[str, Any]:
    """Return the inputs that a policy requires, from a camera directed at the table."""
    generator, arms = np.random.default_rng(0), len(policy.needs.arms)
    view = {
        "image": generator.integers(0, 255, (96, 128, 3), dtype=np.uint8),
        "intrinsics": np.array([[120.0, 0, 64], [0, 120.0, 48], [0, 0, 1]]),
        "world_to_camera": np.array([[0, -1.0, 0, 0], [-0.6, 0, -0.8, 0.3], [0.8, 0, -0.6, 0.5], [0, 0, 0, 1]]),
    }
    pose = {
        "position": np.tile([0.3, 0.0, 0.1], (arms, 1)),
        "quaternion": np.tile([1.0, 0, 0, 0], (arms, 1)),
        "gripper": np.ones(arms),
    }
    return view | pose | {"instruction": "pick the red cube", "cameras": dict.fromkeys(policy.needs.cameras, view)}


def wrong_observations(seen: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield observations that are wrong in one entry, each with the expected message; `seen` is correct."""
    arms = len(seen["gripper"])
    for name, value, said in (
        ("position", np.full((arms, 3), np.nan), "'position' of the observation holds numbers that are not finite"),
        ("position", np.zeros((arms, 2)), f"'position' of the observation must be {arms} x 3, not {arms} x 2"),
        ("position", np.zeros(2), f"'position' of the observation must be {arms} x 3, not 2"),
        ("quaternion", np.zeros((arms, 4)), "'quaternion' of the observation is no unit quaternion"),
        ("gripper", [7.0] * arms, r"'gripper' of the observation must lie in 0 \(closed\) to 1 \(open\)"),
        ("gripper", ["shut"] * arms, f"'gripper' of the observation must be {arms} numbers: "),
    ):
        yield {**seen, name: value}, said
    for name in ("position", "quaternion", "gripper"):
        yield {key: value for key, value in seen.items() if key != name}, f"the observation lacks '{name}', which is"
    cameras, image = [*seen["cameras"]], seen["image"]
    # the only camera needs no name, and the message then gives none
    for names in [cameras, []] if len(cameras) == 1 else [cameras]:
        whose = f"camera '{names[0]}' of the observation" if names else "the observation"
        for wrong, said in (
            (image[..., 0], f"^'image' of {whose} must be H x W x 3 uint8, RGB, not 96 x 128 uint8"),
            (image[:0], f"^'image' of {whose} must be H x W x 3 uint8, RGB, not 0 x 128 x 3 uint8"),
            (image.astype(np.float32) / 255, f"^'image' of {whose} must be .*, not 96 x 128 x 3 float32"),
            (
                None,
                f"^{whose} lacks 'image'" if len(names) < 2 else f"^the observation lacks 'cameras/{names[0]}/image'",
            ),
        ):
            views = {name: {**seen["cameras"][name], "image": wrong} for name in names}
            yield {**seen, "image": wrong, "cameras": views}, said

"""Record Meta-World's scripted policies; run by `keygrip.recording.metaworld` in the Python environment of
`metaworld`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.envs.metaworld.environment import DOWN, MetaWorldEnvironment
from keygrip.envs.metaworld.expert import Expert
from keygrip.envs.metaworld.tasks import HZ, MetaWorldTask
from keygrip.envs.workers import serve_jobs
from keygrip.recording.metaworld import ARM, ROBOT
from keygrip.recording.recorded_folder import demo_name


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return the function that records one task's demonstrations, one report per episode."""
    root = Path(settings["root"])

    def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        task = MetaWorldTask(name=job["task"], camera=settings["cameras"][0], shadows=settings["shadows"])
        environment = MetaWorldEnvironment(task, settings["image_size"], cameras=tuple(settings["cameras"]))
        try:
            successes, seed, known_failures = 0, job["seed"], set(job["failed"])
            while successes < job["demos"]:
                folder = root / demo_name(task.name, seed)
                exists = (folder / "metadata.json").is_file()
                success = exists or (seed not in known_failures and record_episode(environment, settings, folder, seed))
                successes += success
                yield {"task": task.name, "seed": seed, "success": success, "recorded": success and not exists}
                seed += 1
        finally:
            environment.close()

    return work


def record_episode(environment: MetaWorldEnvironment, settings: dict[str, Any], folder: Path, seed: int) -> bool:
    """Record the episode of a seed; return whether the expert succeeded (a failure leaves no folder).

    Row i's command is the mocap body's target at row i + 1, so that replaying the commands replays the
    demonstration.
    """
    task, every = environment.task, settings["every"]
    environment.render_images = False  # images are rendered only for recorded rows
    environment.reset(seed=seed)
    expert = Expert(environment, seed, settings["recoveries"])
    expert.prepare()
    source = {
        "simulator": "metaworld",
        "task": task.as_dict(),
        "seed": seed,
        "success": True,
        "recovery": expert.recovery,
    }
    with DemoWriter(
        folder,
        robot=ROBOT,
        task=task.name,
        instruction=task.instruction,
        fps=HZ / every,
        source=source,
        video=settings["video"],
        jpeg_quality=settings["jpeg_quality"],
    ) as writer:

        def write(row: tuple[Any, ...]) -> None:
            stamp, views, reached, opening = row
            commanded = ArmPose(environment.commanded_position.copy(), DOWN, opening)
            images = {name: view["image"] for name, view in views.items()}
            cameras = {name: CameraPose(view["intrinsics"], view["world_to_camera"]) for name, view in views.items()}
            writer.add(stamp, images, cameras, {ARM: reached}, {ARM: commanded})

        pending: tuple[Any, ...] | None = None
        for step in expert:
            if step % every:
                continue
            if pending is not None:
                write((*pending, expert.opening))  # the command that was active until now
            views = {name: environment.view(name) for name in environment.cameras}
            reached = ArmPose(environment.position.copy(), DOWN, environment.opening)
            pending = (round(step * 1e9 / HZ), views, reached)
        if pending is not None and expert.succeeded:
            write((*pending, expert.opening))
        if not expert.succeeded:
            writer.discard()
    return expert.succeeded


if __name__ == "__main__":
    serve_jobs(start)

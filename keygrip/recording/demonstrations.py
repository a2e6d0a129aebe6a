"""Record the expert's demonstrations into native demo folders, in parallel and resumable.

A folder is named after its episode's seed and is a function of (task, seed, settings) only, so neither the number of
processes nor an interruption changes the result on disk.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.artifacts import locked
from keygrip.cores import usable_cores
from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.data.robot.signs import SignKeeper
from keygrip.envs.yam.camera_moves import refuse_unseen_moves
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.expert import expert_actions
from keygrip.envs.yam.handover import HandoverTask
from keygrip.envs.yam.tasks import Placed, TaskOptions
from keygrip.envs.yam.text import EpisodeTrace, describe
from keygrip.envs.yam.two_arms import HandoverCell
from keygrip.progress import Progress
from keygrip.recording.episodes import record_successes
from keygrip.recording.handover import record_handover
from keygrip.recording.recorded_folder import LOCK_FILE, demo_name, failed_seeds, store
from keygrip.worker_processes import prepare_worker

ROBOT = "yam"
ARM = "right"


@dataclass(frozen=True)
class RecordSettings:
    """The settings of a recording, without the number and choice of seeds."""

    task: TaskOptions | HandoverTask
    image_size: int = 224
    hz: float = 10.0
    cameras: tuple[str, ...] = ("over",)
    depth: bool = False
    video: bool = False
    jpeg_quality: int = 95

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values, as in recording.json."""
        plain = asdict(self)
        plain["cameras"] = list(self.cameras)
        return plain


@dataclass(frozen=True)
class RecordSummary:
    """The result of `record`."""

    root: Path
    demos: int  # complete in the folder for this request
    recorded: int  # of these, recorded by this call
    failed: int  # episodes in which the expert failed; their seeds were skipped
    seconds: float


def record(
    task: TaskOptions | HandoverTask,
    root: Path | str,
    demos: int,
    seed: int = 0,
    image_size: int = 224,
    hz: float = 10.0,
    processes: int = 1,
    cameras: tuple[str, ...] | None = None,
    depth: bool = False,
    video: bool = False,
    jpeg_quality: int = 95,
    progress: bool = True,
) -> RecordSummary:
    """Record the first `demos` episodes from `seed` on in which the expert succeeds. Existing ones are kept.

    Args:
        task: the task and its variations.
        root: folder of the demo folders; created if missing.
        demos: total number when finished, counted from `seed`.
        seed: first episode seed; the following ones are used in order.
        image_size: edge of the square images, pixels.
        hz: frames and commands per second.
        processes: worker processes (spawned); the result does not depend on it.
        cameras: names among "over", "front", "wrist"; the task's own camera by default.
        depth: also write 16-bit depth in millimetres.
        video: one H.264 file per camera instead of JPEG files.
        jpeg_quality: 92..100.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: A setting is out of range or has no effect, `root` holds a recording made with other settings or
            other data, or the expert fails in more than half of the episodes.
        RenderingUnavailableError: This machine cannot render off screen.
        ChildProcessError: A worker process died.
    """
    if demos < 1 or processes < 1:
        raise ValueError(f"demos and processes must be at least 1, got demos={demos}, processes={processes}")
    if not 92 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality={jpeg_quality} is outside [92, 100]; lower qualities show blocks in heatmaps")
    if depth and isinstance(task, HandoverTask):
        raise ValueError("depth=true: the two-arm handover is recorded without depth")
    settings = RecordSettings(task, image_size, float(hz), tuple(cameras or (task.camera,)), depth, video, jpeg_quality)
    if isinstance(task, TaskOptions):
        refuse_unseen_moves(task, settings.cameras)
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / LOCK_FILE):  # a second recorder of this folder waits and then finds the demos
        return _record_demos(settings, root, demos, seed, processes, progress)


def record_step(
    task: TaskOptions | HandoverTask,
    root: str | Path,
    demos: int,
    seed: int,
    image_size: int,
    hz: float,
    processes: int | None,
    cameras: Sequence[str] | None,
    depth: bool,
    video: bool,
) -> dict[str, Any]:
    """The step `record`: see `record`; processes: None, one per core. Returns counts and seconds."""
    summary = record(
        task,
        root,
        demos,
        seed=seed,
        image_size=image_size,
        hz=hz,
        processes=usable_cores() if processes is None else processes,
        cameras=None if cameras is None else tuple(cameras),
        depth=depth,
        video=video,
    )
    return {
        "root": str(summary.root),
        "demos": summary.demos,
        "recorded": summary.recorded,
        "failed_episodes": summary.failed,
        "wall_s": round(summary.seconds, 1),
    }


def _record_demos(
    settings: RecordSettings, root: Path, demos: int, seed: int, processes: int, progress: bool
) -> RecordSummary:
    task, stored = settings.task, settings.as_dict()
    failed = set(failed_seeds(root, stored, []))
    started = time.monotonic()
    with (
        Progress(total=demos, desc=f"record {task.name}", unit="demo", shown=progress) as bar,
        _Workers(settings, root, min(processes, demos)) as workers,
    ):
        counts = record_successes(
            root, task.name, demos, seed, failed, workers.run, lambda: store(root, stored, sorted(failed)), bar
        )
    return RecordSummary(root, counts.demos, counts.recorded, counts.failed, time.monotonic() - started)


def record_episode(cell: YamCell | HandoverCell, settings: RecordSettings, root: Path, seed: int) -> bool:
    """Record one episode; return whether the expert succeeded (a failed episode leaves no folder)."""
    task = settings.task
    if isinstance(cell, HandoverCell):
        folder, video = root / demo_name(task.name, seed), settings.video
        return record_handover(
            cell, folder, seed, ROBOT, settings.cameras, video=video, jpeg_quality=settings.jpeg_quality
        )
    assert isinstance(task, TaskOptions)
    cell.reset(seed=seed)
    assert cell.layout is not None
    actions = expert_actions(cell.layout, task, seed, settings.hz)
    folder = root / demo_name(task.name, seed)
    with DemoWriter(
        folder,
        robot=ROBOT,
        task=task.name,
        instruction=cell.layout.instruction,
        fps=settings.hz,
        video=settings.video,
        jpeg_quality=settings.jpeg_quality,
    ) as writer:
        trace = EpisodeTrace(task, cell.layout, seed, settings.hz, first=cell.sight(settings.cameras[0]))
        reached_sign, commanded_sign = SignKeeper(), SignKeeper()
        for i, action in enumerate(actions):
            if i == len(actions) - 1:
                trace.last = cell.sight(settings.cameras[0])
            trace.add(cell.object_position, cell.tool_pose[0], cell.progress.held)
            images = {c: cell.frame(c) for c in settings.cameras}
            views = {c: CameraPose(cell.lenses[c].intrinsics, cell.world_to_camera(c)) for c in settings.cameras}
            depth = {c: _to_millimetres(cell.depth(c), cell.far) for c in settings.cameras} if settings.depth else None
            position, quaternion = cell.tool_pose
            reached = _arm_pose(position, reached_sign(quaternion), cell.gripper_opening, cell.joints)
            cell.advance(action)
            position, quaternion = cell.commanded_pose
            commanded = _arm_pose(position, commanded_sign(quaternion), cell.commanded_gripper, None)
            stamp = round(i * 1e9 / settings.hz)
            writer.add(stamp, images, views, {ARM: reached}, {ARM: commanded}, depth)
        success = trace.success = cell.progress.success
        if not success:
            writer.discard()
        trace.final_positions = {p.name: cell.body_position(p.name) for p in cell.layout.placed}
        writer.text = {"camera": settings.cameras[0], **describe(trace)}
        writer.source = {
            "simulator": "keygrip.envs.yam",
            "task": task.as_dict(),
            "seed": seed,
            "success": success,
            "yaw_error_rad": cell.progress.yaw_error,
            "objects": [_object_record(p) for p in cell.layout.placed],
            "goal": {"colour": cell.layout.goal_colour, "position_m": [float(v) for v in cell.layout.goal]},
        }
    return success


def _object_record(thing: Placed) -> dict[str, Any]:
    return {
        "name": thing.name,
        "shape": thing.shape,
        "colour": thing.colour,
        "digit": thing.digit,
        "position_m": [float(v) for v in thing.position],
        "yaw_rad": thing.yaw,
        "pedestal_m": thing.pedestal,
    }


def _arm_pose(position: np.ndarray, quaternion: np.ndarray, gripper: float, joints: np.ndarray | None) -> ArmPose:
    return ArmPose(position, quaternion, float(np.clip(gripper, 0.0, 1.0)), joints)


def _to_millimetres(depth: np.ndarray, far: float) -> np.ndarray:
    """Convert to uint16 millimetres; 0 (no reading, as in depth cameras) at the far plane, which is the sky, and beyond
    the range of 16 bits."""
    return np.where(depth < min(0.99 * far, 65.0), np.round(depth * 1000), 0).astype(np.uint16)


# ---- processes -------------------------------------------------------------------------------------------------------


class _Workers:
    """Record seeds in this process or in spawned processes; cells are built when they are first needed."""

    def __init__(self, settings: RecordSettings, root: Path, processes: int) -> None:
        self.settings, self.root, self.processes = settings, root, processes
        self._cell: YamCell | HandoverCell | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._cell is not None:
            self._cell.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, seeds: list[int]) -> Iterator[tuple[int, bool]]:
        """Yield (seed, success) of each seed, in no particular order."""
        if not seeds:
            return
        if self.processes == 1:
            self._cell = self._cell or _build_cell(self.settings)
            for seed in seeds:
                yield seed, record_episode(self._cell, self.settings, self.root, seed)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a GL context does not survive a fork
            self._pool = ProcessPoolExecutor(
                self.processes, context, _start_worker, (self.settings, self.root, os.getpid())
            )
        try:
            for future in as_completed([self._pool.submit(_run_in_worker, seed) for seed in seeds]):
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a recording process died (out of memory, or a script without an `if __name__ == '__main__'` guard); "
                f"the demos in {self.root} are whole: run again to continue, perhaps with fewer processes"
            ) from error


# State of a worker process: settings and target folder, and its one cell, used for all its episodes.
_worker: tuple[RecordSettings, Path] | None = None
_cell: YamCell | HandoverCell | None = None


def _build_cell(settings: RecordSettings) -> YamCell | HandoverCell:
    if isinstance(settings.task, HandoverTask):
        return HandoverCell(settings.task, settings.image_size, settings.hz, cameras=settings.cameras)
    return YamCell(settings.task, settings.image_size, settings.hz, cameras=settings.cameras)


def _start_worker(settings: RecordSettings, root: Path, parent: int) -> None:
    global _worker
    prepare_worker(parent)
    _worker = (settings, root)


def _run_in_worker(seed: int) -> tuple[int, bool]:
    global _cell
    assert _worker is not None
    settings, root = _worker
    _cell = _cell or _build_cell(settings)  # not at process start, where an error would look like a dead process
    return seed, record_episode(_cell, settings, root, seed)

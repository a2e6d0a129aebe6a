"""Reader of LeRobot data sets, codebase version 3.

Layout: `meta/info.json` (fps, features, path templates), `meta/tasks.parquet`, `meta/episodes/chunk-*/file-*.parquet`
(one row per episode: where its rows and its part of each video are), `data/chunk-*/file-*.parquet` (many episodes per
file), `videos/<key>/chunk-*/file-*.mp4` (many episodes per file, found by `from_timestamp`); images may be in the
Parquet files instead.

The calibration file (`calibration.py`) adds what the format lacks: the cameras, named as the feature after
`observation.images.`, and which values are the poses of which arm:

```yaml
lerobot:
  arms:
    right:
      position: {feature: observation.state, index: [0, 1, 2]}                  # metres, in the arm's base
      rotation: {feature: observation.state, index: [3, 4, 5, 6], as: quaternion_xyzw}
      # instead of position and rotation, of a YAM or an arm with arms.right.model:
      # joints: {feature: observation.state, index: [0, 1, 2, 3, 4, 5], units: degrees, signs: [...], zeros: [...]}
      gripper: {feature: observation.state, index: 7, closed: 0.0, open: 1.0}
      commanded: {position: ..., rotation: ..., gripper: ...}                   # or joints; may be left out
      controller: {feature: controller.right, index: [0, 1, 2, 3, 4, 5, 6]}     # its own inputs; may be left out
```

`units` of joints are degrees or radians (may be left out for a YAM: radians; slides are in metres). A joint's angle is
sign x (value - zero), with the zero in these units; the order is that of `arms.right.joints`.

`as`: quaternion_wxyz, quaternion_xyzw, rotation_vector, matrix (9 numbers, row-major) or euler_xyz (extrinsic, rad). An
entry may name its values (`names: [x, y, z]`) instead of `index`.

If the data set itself holds the cameras frame by frame (as `keygrip.data.robot.lerobot_export` writes them),
`lerobot.cameras` names them, in the conventions of the file, and `cameras` needs no entry. `lerobot.time` names seconds
that are more exact than `timestamp`, `lerobot.intervention` a value that is not 0 where a person corrected a policy:

```yaml
lerobot:
  cameras:
    top:
      intrinsics: {feature: calibration.top.intrinsics, index: [0, 1, 2, 3, 4, 5, 6, 7, 8]}    # 3 x 3, row-major
      world_to_camera: {feature: calibration.top.world_to_camera, index: [0, ..., 15]}         # 4 x 4, row-major
  time: {feature: time_s, index: 0}
  intervention: {feature: intervention, index: 0}
```
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.parquet_tables import Allowance, column_types, is_too_large, read_table
from keygrip.data.robot.calibration import Calibration, find_calibration, read_calibration, refuse_unknown_keys
from keygrip.data.robot.formats.frames import ParquetFrames
from keygrip.data.robot.formats.lerobot_numbers import flat_names, numbers, stated_rate
from keygrip.data.robot.formats.lerobot_poses import arm_of, kinematics_of
from keygrip.data.robot.formats.poses import increasing
from keygrip.data.robot.frames import VideoFrames
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo, DemoError, FrameSource, words
from keygrip.data.untrusted_files import inside, read_json
from keygrip.data.video_index import file_identity

IMAGES = "observation.images."
PLACE = "keygrip/place"  # of an episode's files: values for the path templates of version 2
OVERLAPS = "keygrip/overlaps"  # of an episode: by video, another episode to which a part of its stretch is given
MOST_MISSING = 1_000_000  # limit for episodes that info.json counts and that are not listed
DEPTH_MARKS = ("video.is_depth_map", "is_depth_map")
LENGTH_OFF = 1.5  # frames by which a stretch of video may differ from the episode's length
ROUNDED = 0.01  # largest relative change of a rate by rounding


NEEDS = (
    "LeRobot data sets do not say which of their numbers are whose pose or joints (lerobot.arms) nor, for models that "
    "read it, where their cameras stand (cameras): docs/data.md, 'Other formats', shows both"
)
LAYOUT = "meta/info.json of version 3"  # files by which a folder of this format is recognised


def detect(root: Path) -> bool:
    """Return whether a folder holds LeRobot's `meta/info.json` of any version except 2 (reading an older one raises an
    error that names the version)."""
    return (root / "meta" / "info.json").is_file() and not stated_version(root).startswith("v2.")


def stated_version(root: Path) -> str:
    """Return the version that `meta/info.json` states; empty if there is none."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        return ""
    try:
        info = read_json(path)
    except BadSample:
        return ""
    return str(info.get("codebase_version")) if isinstance(info, dict) else ""


def find(root: Path, calibration: Path | None = None) -> list[DemoReference]:
    """Return references to the episodes of the data set.

    Raises:
        FileNotFoundError: a part of the data set or the calibration file is missing.
        ValueError: another version of LeRobot's format, or a calibration file that does not fit the features.
    """
    info = read_json(root / "meta" / "info.json")
    if not isinstance(info, dict):
        raise ValueError(f"{root}/meta/info.json holds no object")
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise ValueError(
            f"{root} is a LeRobot data set of version {version}; versions 2.0, 2.1 and 3 are read. Versions 1.x "
            "can be converted to 2.0 with the scripts of the LeRobot releases of that time"
        )
    episodes = _episodes(root)
    with contextlib.suppress(ValueError):  # reading an episode reports a wrong rate
        _note_overlaps(episodes, stated_rate(info, root))
    return references(root, info, episodes, calibration, "lerobot_v3")


def _note_overlaps(episodes: list[dict[str, Any]], rate: float) -> None:
    """Note, under `OVERLAPS`, episodes whose stretches of a video overlap: one of the two has the other's images."""
    stretches: dict[tuple[str, int, int], list[tuple[int, int, dict[str, Any]]]] = {}
    for row in episodes:
        for column in row:
            if not (column.startswith("videos/") and column.endswith("/from_timestamp")):
                continue
            video = column.removesuffix("/from_timestamp")
            try:  # what is no number, reading the episode reports
                file = (video, int(row[f"{video}/chunk_index"]), int(row[f"{video}/file_index"]))
                start, end = float(row[column]), float(row[f"{video}/to_timestamp"])
                first, length = round(start * rate), int(row["length"])
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
            if abs((end - start) * rate - length) <= LENGTH_OFF:
                stretches.setdefault(file, []).append((first, first + length, row))
    for (video, _, _), given in stretches.items():
        given.sort(key=lambda stretch: stretch[:2])
        reaching = None  # the stretch that ends last of those before
        for stretch in given:
            if reaching is not None and stretch[0] < reaching[1] - 1:  # one frame may be rounding
                for row, other in ((stretch[2], reaching[2]), (reaching[2], stretch[2])):
                    row.setdefault(OVERLAPS, {}).setdefault(video.removeprefix("videos/"), other["episode_index"])
            if reaching is None or stretch[1] > reaching[1]:
                reaching = stretch


def references(
    root: Path, info: dict[str, Any], episodes: list[dict[str, Any]], calibration: Path | None, format: str
) -> list[DemoReference]:
    """Return references to the demos of a data set's episodes. Episodes that `total_episodes` of info.json counts but
    that are not listed, and those that are listed twice, become broken demos, so that each of them is reported.

    Raises:
        FileNotFoundError, ValueError: the calibration file is missing, or does not describe the poses of any arm.
    """
    parsed_calibration = read_calibration(find_calibration(root, calibration, "LeRobot", NEEDS))
    refuse_unknown_keys(
        parsed_calibration.path, "lerobot", parsed_calibration.lerobot, {"arms", "cameras", "time", "intervention"}
    )
    if not parsed_calibration.lerobot.get("arms"):
        raise ValueError(f"{parsed_calibration.path} has no lerobot.arms: {NEEDS}")
    for arm in parsed_calibration.arms.values():
        if arm.model is not None:
            kinematics_of(arm)  # raise here, because an error in it affects every episode
    readers: dict[str, Callable[[], Demo]] = {}
    for row in episodes:
        name = f"episode_{int(row['episode_index']):06d}"
        if name in readers:
            readers[name] = partial(
                _raise_broken, name, "the episode is listed twice in meta: which one is meant is not known"
            )
        else:
            readers[name] = partial(read, root, info, row, parsed_calibration)
    reason = "info.json counts it and meta does not list it: the data set is incomplete, copy it again"
    readers |= {
        name: partial(_raise_broken, name, reason)
        for name in _name_unlisted_episodes(info.get("total_episodes"), readers, root)
    }
    return [
        DemoReference(name, root, format, readers[name]) for name in sorted(readers, key=lambda name: (len(name), name))
    ]


def _name_unlisted_episodes(total: Any, listed: Collection[str], root: Path) -> list[str]:
    """Return names for the episodes that info.json counts in addition to those found: the first free numbers.

    Raises:
        ValueError: there are more of them than any data set has.
    """
    missing = total - len(listed) if type(total) is int else 0
    if missing > MOST_MISSING:
        raise ValueError(f"{root}/meta/info.json counts {total} episodes, and {len(listed)} are listed")
    names = (f"episode_{number:06d}" for number in itertools.count())
    return list(itertools.islice((name for name in names if name not in listed), max(0, missing)))


def _raise_broken(name: str, reason: str) -> Demo:
    raise DemoError(name, reason)


def _episodes(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root} has no meta/episodes/chunk-*/file-*.parquet; the data set is incomplete")
    rows: list[dict[str, Any]] = []
    try:
        allowance = Allowance(files)
        for file in files:
            columns = [name for name in column_types(file) if not name.startswith("stats/")]
            with convert_errors(file):
                rows += read_table(file, columns, allowance).to_pylist()
    except BadSample as error:
        if is_too_large(error):
            raise
        raise ValueError(f"{error}: the list of episodes is damaged, copy the data set again") from error
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _tasks(root: Path) -> dict[int, str]:
    """Return the task sentences by number; pandas wrote them as the index of the table."""
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        return {}
    table = read_table(path).to_pydict()
    texts: list[Any] = next((values for key, values in table.items() if key != "task_index"), [])
    return {int(index): str(task) for index, task in zip(table["task_index"], texts, strict=True)}


def read(root: Path, info: dict[str, Any], episode: dict[str, Any], calibration: Calibration) -> Demo:
    """Read one episode.

    Raises:
        DemoError: rows or a part of a video are missing, or the data set lacks a feature that the calibration file
            names.
    """
    episode_index, rate = int(episode["episode_index"]), stated_rate(info, root)
    name = f"episode_{episode_index:06d}"
    location = episode.get(PLACE)  # version 2, where each episode has its own files
    if location is None:
        location = {"chunk_index": int(episode["data/chunk_index"]), "file_index": int(episode["data/file_index"])}
    file = _path(root, info, "data_path", location)
    table, rows = _read_rows(file, episode_index, name)
    frames = len(rows)
    if frames != int(episode["length"]):
        raise DemoError(name, f"{file.name} holds {frames} rows of the episode, meta/episodes says {episode['length']}")

    sidecar = calibration.lerobot["arms"]
    arms: dict[str, ArmTrajectory] = {}
    gripper_poses: dict[str, np.ndarray] = {}
    models: dict[str, list[str]] = {}  # of YAMs
    for arm, entry in sidecar.items():
        base = calibration.arm(arm, only=len(sidecar) == 1, yam=False)
        gripper_poses[arm], arms[arm] = arm_of(table, info, arm, entry, base, calibration.path)
        if base.model is None and (base.named or not {"position", "rotation"} <= entry.keys()):
            models[arm] = [base.arm, base.gripper]  # recorded poses may come from any robot
    recorded_cameras = calibration.lerobot.get("cameras") or {}
    cameras: dict[str, CameraTrack] = {}
    for key, feature in info["features"].items():
        camera = key.removeprefix(IMAGES)
        if feature["dtype"] not in ("video", "image") or camera in calibration.left_out or _is_depth(feature):
            continue
        if camera in cameras:
            raise DemoError(name, f"{IMAGES}{camera} and {camera} would both be camera {camera}: rename one")
        height, width = _image_size(feature)
        camera_calibration = calibration.cameras.get(camera) if camera not in recorded_cameras else None
        rotate = 0 if camera_calibration is None else camera_calibration.rotate
        is_listed = camera_calibration is not None or camera in recorded_cameras
        try:
            source = _frame_source(root, info, episode, key, feature, file, rows, rate, rotate, name)
        except (DemoError, LookupError):
            if is_listed:
                raise
            continue
        if not is_listed:
            reason = f"{calibration.path} has no entry for it"
            cameras[camera] = CameraTrack.without_calibration(width, height, source, frames, reason)
            continue
        if camera_calibration is None:
            intrinsics, poses = _recorded_camera(table, info, camera, recorded_cameras[camera], calibration)
        else:
            if rotate in (90, 270):
                height, width = width, height
            intrinsics = CameraTrack.broadcast(camera_calibration.intrinsics_for(width, height), frames)
            poses = camera_calibration.poses(gripper_poses, frames)
        cameras[camera] = CameraTrack(width, height, intrinsics, poses, source)
    task, instruction, notes = _task_of(episode, table, root)
    intervention = None
    if "intervention" in calibration.lerobot:
        intervention_entry = calibration.lerobot["intervention"]
        intervention = numbers(table, info, "lerobot.intervention", intervention_entry, calibration.path)[:, 0] != 0
    times = np.asarray(table["timestamp"], dtype=np.float64).reshape(-1)
    if "time" in calibration.lerobot:
        times = numbers(table, info, "lerobot.time", calibration.lerobot["time"], calibration.path)[:, 0]
    return Demo(
        name=name,
        path=root,
        robot=str(info.get("robot_type") or "unknown"),
        task=task,
        instruction=instruction,
        fps=_exact_rate(episode, rate),
        timestamps=increasing((times * 1e9).round().astype(np.int64), round(1e9 / rate)),
        arms=arms,
        cameras=cameras,
        source={
            "format": "lerobot_v3" if PLACE not in episode else "lerobot_v2",
            "episode": episode_index,
            "calibration": str(calibration.path),
            "models": models,
            **({"notes": notes} if notes else {}),
        },
        intervention=intervention if intervention is not None and intervention.any() else None,
    )


def _task_of(episode: dict[str, Any], table: dict[str, Any], root: Path) -> tuple[str, str, list[str]]:
    """Return the name of an episode's task, its instruction, and notes about what was left out."""
    tasks = episode.get("tasks") or [_tasks(root).get(int(table["task_index"][0]), "")]
    instruction = tasks if isinstance(tasks, str) else words(tasks[0])
    several = not isinstance(tasks, str) and len(set(tasks)) > 1
    task = episode.get("keygrip/task")
    named_task = task if task and isinstance(task, str) else instruction.replace(" ", "_").lower() or root.name
    if episode.get("keygrip/instruction") == "" and instruction == task:
        instruction = ""  # the demo had no instruction: LeRobot's sentence is the task's name
    return named_task, instruction, ["episodes with several tasks count as their first one"] * several


def _exact_rate(episode: dict[str, Any], rate: float) -> float:
    """Return the exact frame rate of the recording, which LeRobot rounds to a whole number."""
    exact = episode.get("keygrip/fps")
    return float(exact) if isinstance(exact, float) and abs(exact - rate) <= ROUNDED * exact else rate


def _is_depth(feature: dict[str, Any]) -> bool:
    """Return whether LeRobot marks a video as a depth map, which is not a camera image."""
    return any(described.get(key) is True for described in _descriptions(feature) for key in DEPTH_MARKS)


def _descriptions(feature: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what info.json says about a video (`video_info` in version 2.0)."""
    return [value for value in (feature.get("info"), feature.get("video_info")) if isinstance(value, dict)]


def _recorded_camera(
    table: dict[str, Any], info: dict[str, Any], camera: str, entry: Any, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Return intrinsics [N, 3, 3] in the corner convention and world_to_camera [N, 4, 4] from the data set itself."""
    location, matrices = f"lerobot.cameras.{camera}", []
    refuse_unknown_keys(calibration.path, location, entry, ("intrinsics", "world_to_camera"))
    for part, side in (("intrinsics", 3), ("world_to_camera", 4)):
        if part not in entry:
            raise ValueError(f"{calibration.path}: {location} needs intrinsics and world_to_camera")
        values = numbers(table, info, f"{location}.{part}", entry[part], calibration.path)
        if values.shape[1] != side * side:
            raise ValueError(
                f"{calibration.path}: {location}.{part} needs {side * side} numbers, it names {values.shape[1]}"
            )
        matrices.append(values.reshape(-1, side, side))
    matrices[0][:, :2, 2] += calibration.pixel_shift
    return matrices[0], matrices[1]


def _path(root: Path, info: dict[str, Any], template: str, values: dict[str, Any]) -> Path:
    """Return a file of the data set. In its path template, only `{name}` and `{name:03d}` are filled in."""
    if not isinstance(info.get(template), str):
        raise ValueError(
            f"{root}/meta/info.json: {template} is {info.get(template)}; the pattern by which "
            f"{template.removesuffix('_path')} files are found is needed: correct it, or copy the data set again"
        )

    def filled(field: re.Match[str]) -> str:
        value = values[field[1]]
        return f"{value:0{int(field[2])}d}" if field[2] else str(value)

    return inside(root, re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", filled, info[template]))


def _read_rows(file: Path, number: int, name: str) -> tuple[dict[str, Any], list[int]]:
    """Return the columns without images for the episode's rows, in the order of `frame_index`, and the numbers of these
    rows in the file."""
    import pyarrow.compute as compute

    if not file.is_file():
        raise DemoError(name, f"{file} is missing")
    table = _without_images(file, file_identity(file))
    row_indices = np.flatnonzero(compute.equal(table["episode_index"], number).to_numpy())
    episode_table = table.take(row_indices)
    order = np.argsort(episode_table["frame_index"].to_numpy(), kind="stable")
    frame = episode_table["frame_index"].to_numpy()[order]
    if not (frame == np.arange(len(frame))).all():
        raise DemoError(name, f"{file.name}: frame_index of the episode does not run from 0 to {len(frame) - 1}")
    episode_table = episode_table.take(order)
    return {key: episode_table[key].to_pylist() for key in episode_table.column_names}, [
        int(row) for row in row_indices[order]
    ]


@functools.lru_cache(maxsize=1)  # episodes are read in order, so those of one file follow each other
def _without_images(file: Path, identity: str) -> Any:
    """Return a Parquet file's table without image columns; `identity` is for the cache: it changes with the file."""
    columns = [name for name, kind in column_types(file).items() if not kind.startswith("struct")]
    return read_table(file, columns).combine_chunks()


def _image_size(feature: dict[str, Any]) -> tuple[int, int]:
    """Return (height, width) of an image feature, whose shape is height, width, channels or channels first."""
    shape = [int(side) for side in feature["shape"]]
    names = flat_names(feature.get("names"))
    channels_first = bool(names) and names[0].startswith("c")
    return (shape[1], shape[2]) if channels_first or (not names and shape[0] in (1, 3)) else (shape[0], shape[1])


def _frame_source(
    root: Path,
    info: dict[str, Any],
    episode: dict[str, Any],
    key: str,
    feature: dict[str, Any],
    file: Path,
    rows: list[int],
    rate: float,
    rotate: int,
    name: str,
) -> FrameSource:
    if feature["dtype"] == "image":
        if rotate:
            raise DemoError(name, f"{key} is stored as images; rotate is for videos only")
        return ParquetFrames(file, key, tuple(rows), root)
    video_rate = _video_rate(feature)
    if video_rate is not None and abs(video_rate - rate) >= 1:  # LeRobot writes it without decimals
        raise DemoError(
            name,
            f"{key}: info.json states {video_rate:g} frames per second of the video and {rate:g} of the data set, so "
            "that rows would get others' images: encode the videos at the data set's rate, or correct video.fps",
        )
    if PLACE in episode:
        path = _path(root, info, "video_path", {"video_key": key, **episode[PLACE]})
        return VideoFrames(path, len(rows), rotate=rotate, rate=rate, whole=True)
    prefix = f"videos/{key}/"
    location = {part: int(episode[f"{prefix}{part}"]) for part in ("chunk_index", "file_index")}
    path = _path(root, info, "video_path", {"video_key": key, **location})
    start, end = float(episode[f"{prefix}from_timestamp"]), float(episode[f"{prefix}to_timestamp"])
    if key in episode.get(OVERLAPS, {}):
        raise DemoError(
            name,
            f"{key}: a part of its stretch of video ({start:.3f} s to {end:.3f} s) is also given to episode "
            f"{episode[OVERLAPS][key]} in meta/episodes, so that rows of one would get the other's images: write the "
            "data set again with a current LeRobot, or leave both episodes out",
        )
    if abs((end - start) * rate - len(rows)) > LENGTH_OFF:
        raise DemoError(
            name,
            f"{key}: the stretch of video from {start:.3f} s to {end:.3f} s does not hold "
            f"{len(rows)} frames at {rate:g} fps",
        )
    return VideoFrames(path, len(rows), start=round(start * rate), rotate=rotate, rate=rate)


def _video_rate(feature: dict[str, Any]) -> float | None:
    """Return the frames per second that info.json states for a video, or None."""
    for described in _descriptions(feature):
        stated = described.get("video.fps")
        if isinstance(stated, int | float):
            return float(stated)
    return None

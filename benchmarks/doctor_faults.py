"""The faults that `benchmarks/doctor.py` plants: what each changes, and what a finding must say to name it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

DEMOS = 5  # demonstrations in the recording into which faults are planted
Arrays = dict[str, np.ndarray]
# Causes that several faults have.
MOVED = "camera moved by .* in this demo"
CROPPED = "cropped (images|or resized images) with old K .*"
OTHERS = "images and poses are of different demos.*"
REACHED_OFFSET = r"(recorded positions|positions|reached track) offset by [\d.]+ cm.*"


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Args:
        kind: what; several magnitudes share it. magnitude: with its unit.
        says: regular expression of the whole cause that is right.
        numbers: changes the arrays of trajectory.npz; cameras: of cameras.npz; metadata: of metadata.json.
        images: changes all images of a demo, [N, h, w, 3].
        one: in one demo (the third) alone. joints: whether joints stay in the recording.
        other: images are those of the following demo.
    """

    kind: str
    magnitude: str
    says: str
    numbers: Callable[[Arrays, int], None] | None = None
    cameras: Callable[[Arrays, int], None] | None = None
    metadata: Callable[[dict[str, Any]], None] | None = None
    images: Callable[[np.ndarray], np.ndarray] | None = None
    one: bool = False
    joints: bool = True
    other: bool = False

    @property
    def seen(self) -> bool:
        """Whether images and poses must be compared to find it; where only numbers are wrong, that is left out."""
        of_poses = self.kind.startswith(("reached pos", "reached quat"))
        return self.cameras is not None or self.images is not None or self.other or of_poses

    @property
    def name(self) -> str:
        words = [self.kind, self.magnitude, "one demo" if self.one else "all demos", "" if self.joints else "no joints"]
        return ", ".join(word for word in words if word)


ARM = "right/"


def on(*keys: str) -> Callable[[Callable[[np.ndarray], np.ndarray]], Callable[[Arrays, int], None]]:
    def made(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays, int], None]:
        def numbers(arrays: Arrays, number: int) -> None:
            for key in keys:
                arrays[ARM + key] = change(arrays[ARM + key])

        return numbers

    return made


def shifted(frames: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows late by `frames`: row i shows what row i - frames did."""
    return lambda rows: rows[np.clip(np.arange(len(rows)) - frames, 0, len(rows) - 1)]


def turned(degrees: float, centimetres: float, percent: float = 0.0, seed: int = 0) -> Callable[[Arrays, int], None]:
    """Cameras turned and shifted in a direction drawn from `seed`, focal length longer."""
    rng = np.random.default_rng(seed)
    axis, way = rng.normal(size=(2, 3))
    turn = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    shift = centimetres / 100 * way / np.linalg.norm(way)

    def change(arrays: Arrays, number: int) -> None:
        for key in list(arrays):
            if key.endswith("world_to_camera"):
                pose = np.array(arrays[key])
                pose[..., :3, :] = turn @ pose[..., :3, :]
                pose[..., :3, 3] += shift
                arrays[key] = pose
            if key.endswith("intrinsics"):
                matrix = np.array(arrays[key])
                matrix[..., 0, 0] *= 1 + percent / 100
                matrix[..., 1, 1] *= 1 + percent / 100
                arrays[key] = matrix

    return change


def cropped(
    share: float, corner: tuple[float, float] = (0.5, 0.5), resize: bool = True
) -> Callable[[np.ndarray], np.ndarray]:
    def change(images: np.ndarray) -> np.ndarray:
        height, width = images.shape[1:3]
        h, w = round(share * height), round(share * width)
        top, left = round((height - h) * corner[1]), round((width - w) * corner[0])
        cut = images[:, top : top + h, left : left + w]
        if not resize:
            return cut
        return np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in cut])

    return change


def resized(share: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda images: np.stack(
        [np.asarray(Image.fromarray(i).resize((round(share * i.shape[1]), round(share * i.shape[0])))) for i in images]
    )


def frozen(frames: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(images: np.ndarray) -> np.ndarray:
        images = images.copy()
        start = len(images) // 4
        images[start : start + frames] = images[start]
        return images

    return change


def stray_image(images: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[len(images) // 2] = images[0][::-1, ::-1] // 2
    return images


def stray_row(rows: np.ndarray) -> np.ndarray:
    rows = rows.copy()
    rows[len(rows) // 2] += [0.0, 0.06, 0.05]
    return rows


def inverted_poses(prefix: str) -> Callable[[Arrays, int], None]:
    def change(arrays: Arrays, number: int) -> None:
        place, turn = ARM + prefix + "position_m", ARM + prefix + "quaternion_wxyz"
        inverse = Rotation.from_quat(arrays[turn], scalar_first=True).inv()
        arrays[place], arrays[turn] = -inverse.apply(arrays[place]), inverse.as_quat(scalar_first=True)

    return change


def commanded_increments(arrays: Arrays, number: int) -> None:
    """Commands as the steps from each commanded pose to the next."""
    place, turn = ARM + "commanded_position_m", ARM + "commanded_quaternion_wxyz"
    arrays[place] = np.diff(arrays[place], axis=0, append=arrays[place][-1:])
    rotation = Rotation.from_quat(arrays[turn], scalar_first=True)
    steps = (rotation[1:] * rotation[:-1].inv()).as_quat(scalar_first=True)
    arrays[turn] = np.concatenate([steps, [[1.0, 0, 0, 0]]])


def gap(arrays: Arrays, number: int) -> None:
    times = arrays["timestamps_ns"].copy()
    times[len(times) // 2 :] += 900_000_000
    arrays["timestamps_ns"] = times


def track_in_time(prefix: str, frames: int) -> str:
    """The cause of a track that is late, or where `frames` is negative, early."""
    word = "late" if frames > 0 else "early"
    if prefix:
        return f"commanded track {word} by {abs(frames)} frames"
    return f"poses {abs(frames)} frames {word} against the joints"


def set_fps(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update(fps=value)


def faults() -> list[Fault]:
    found: list[Fault] = []
    add = found.append
    flips = {
        "mirrored left-right": ("mirrored left-right", lambda i: i[:, :, ::-1]),
        "mirrored up-down": ("mirrored up-down", lambda i: i[:, ::-1]),
        "180 degrees": ("turned by 180 degrees", lambda i: i[:, ::-1, ::-1]),
        "90 degrees": ("turned by 90 degrees anticlockwise", lambda i: np.rot90(i, 1, axes=(1, 2))),
        "transposed": ("transposed", lambda i: i.transpose(0, 2, 1, 3)),
    }
    for words, (cause, flip) in flips.items():
        for one in (False, True):
            for joints in (True, False):
                if not joints and (one or words != "mirrored left-right"):
                    continue
                add(Fault("flip", words, f"images {cause}", images=flip, one=one, joints=joints))
    for one in (False, True):
        add(Fault("BGR", "", "colour order BGR", images=lambda i: i[..., ::-1], one=one))
    for frames in (-5, -2, -1, 1, 3):
        word = "late" if frames > 0 else "early"
        says = f"images {abs(frames)} frames {word}"
        add(Fault("images in time", f"{frames:+d} frames", says, images=shifted(frames), joints=frames % 2 == 1))
        if abs(frames) < 4:
            add(Fault("images in time", f"{frames:+d} frames", says, images=shifted(frames), one=True))
    for degrees in (2, 3, 5, 8):
        add(
            Fault(
                "camera turned",
                f"{degrees} degrees",
                r"extrinsics off by [\d.]+ degrees.*",
                cameras=turned(degrees, 0, seed=degrees),
                joints=degrees % 2 == 0,
            )
        )
        add(
            Fault(
                "camera turned",
                f"{degrees} degrees",
                MOVED,
                cameras=turned(degrees, 0, seed=degrees + 1),
                one=True,
                joints=degrees % 2 == 1,
            )
        )
    for cm in (2, 3, 5):
        says = r"extrinsics (off by [\d.]+ degrees and|or the robot's base off by) [\d.]+ cm.*"
        add(Fault("camera shifted", f"{cm} cm", says, cameras=turned(0, cm, seed=cm), joints=cm % 2 == 0))
        add(Fault("camera shifted", f"{cm} cm", MOVED, cameras=turned(0, cm, seed=cm + 1), one=True))
    for percent in (-15, -5, 5, 10):
        says = rf"focal length off by {'-' if percent < 0 else ''}[\d.]+ percent"
        add(Fault("focal length", f"{percent:+d} %", says, cameras=turned(0, 0, percent), joints=percent % 2 == 0))
    for share in (0.9, 0.8):
        add(Fault("crop, old K", f"{share}, resized", rf"{CROPPED}|focal length off by -.*", images=cropped(share)))
        add(
            Fault(
                "crop, old K",
                f"{share} off centre, resized",
                CROPPED,
                images=cropped(share, (0.1, 0.3)),
                joints=False,
            )
        )
        add(
            Fault(
                "crop, old K",
                f"{share}, not resized",
                CROPPED,
                images=cropped(share, resize=False),
                metadata=size_of(share),
            )
        )
        add(
            Fault(
                "resized, old K",
                f"{share}",
                CROPPED,
                images=resized(share),
                metadata=size_of(share),
            )
        )
    for n in (4, 12):
        add(Fault("frozen span", f"{n} frames", r"frozen span of \d+ frames", images=frozen(n), one=True))
    add(Fault("outlier image", "1 frame", "outlier image", images=stray_image, one=True))
    add(Fault("wrong demo's images", "", OTHERS, one=True, other=True))
    add(Fault("wrong demo's images", "", OTHERS, one=True, other=True, joints=False))
    for prefix, kind in (("", "reached"), ("commanded_", "commanded")):
        of = "commanded " if prefix else ""  # causes of the reached track do not name it, but for units
        place, turn, grip = f"{prefix}position_m", f"{prefix}quaternion_wxyz", f"{prefix}gripper_opening"
        offset = r"commanded track offset by [\d.]+ cm" if prefix else REACHED_OFFSET
        metres = "commanded gripper in metres" if prefix else "gripper opening in metres"
        for joints in (True, False) if not prefix else (True,):
            for scale, word in (
                (1000, f"{kind} positions in millimetres"),
                (100, f"{kind} positions in centimetres"),
                (1.1, rf"{of}positions scaled by 1\.[01]\d*"),
                (0.9, rf"{of}positions scaled by 0\.(8|9)\d*"),
                (1.2, rf"{of}positions scaled by 1\.[12]\d*"),
            ):
                add(
                    Fault(
                        f"{kind} positions scaled",
                        f"x {scale}",
                        word,
                        numbers=on(place)(lambda p, s=scale: p * s),
                        joints=joints,
                    )
                )
            for cm in (2, 3, 5):
                add(
                    Fault(
                        f"{kind} positions offset",
                        f"{cm} cm",
                        offset if joints else rf"{offset}|extrinsics or the robot's base off by [\d.]+ cm",
                        numbers=on(place)(lambda p, c=cm: p + [0.008 * c, -0.006 * c, 0]),
                        joints=joints,
                    )
                )
            add(
                Fault(
                    f"{kind} quaternions xyzw",
                    "",
                    f"{of}quaternions stored x, y, z, w",
                    numbers=on(turn)(lambda q: np.roll(q, -1, axis=1)),
                    joints=joints,
                )
            )
            add(
                Fault(
                    f"{kind} quaternions conjugated",
                    "",
                    rf"{of}quaternions conjugated \(world to gripper\)",
                    numbers=on(turn)(lambda q: q * [1, -1, -1, -1]),
                    joints=joints,
                )
            )
            says = rf"{of}poses inverted \(.*"
            add(Fault(f"{kind} poses inverted", "", says, numbers=inverted_poses(prefix), joints=joints))
            add(
                Fault(
                    f"{kind} gripper inverted",
                    "",
                    "commanded gripper inverted" if prefix else r"gripper opening inverted \(.*",
                    numbers=on(grip)(lambda g: 1 - g),
                    joints=joints,
                )
            )
            for frames in (-3, -2, 2, 3):
                if prefix or joints:
                    add(
                        Fault(
                            f"{kind} track in time",
                            f"{frames:+d} frames",
                            track_in_time(prefix, frames),
                            numbers=on(place, turn, grip)(shifted(frames)),
                            joints=joints,
                        )
                    )
        add(Fault(f"{kind} gripper in metres", "", metres, numbers=on(grip)(lambda g: g * 0.095)))
        percentage = f"{kind} gripper opening in percent"
        add(Fault(f"{kind} gripper in percent", "", percentage, numbers=on(grip)(lambda g: g * 100)))
        add(Fault(f"{kind} outlier pose", "8 cm", f"outlier {kind} pose", numbers=on(place)(stray_row), one=True))
        add(Fault(f"{kind} positions offset", "3 cm", offset, numbers=on(place)(lambda p: p + [0.03, 0, 0]), one=True))
    in_one_demo(add)
    for one in (False, True):
        says = "commanded increments in place of positions"
        add(Fault("commanded increments", "", says, numbers=commanded_increments, one=one))
        exchange = on("commanded_position_m")(lambda p: p[:, [1, 0, 2]] * [-1, 1, 1])
        add(Fault("commanded axes", "a quarter turn about z", "commanded axes exchanged", numbers=exchange, one=one))
    add(Fault("joints in degrees", "", "joints in degrees", numbers=on("joint_positions_rad")(np.degrees)))
    add(Fault("fps", "30 for 10", "stated frame rate 30 in place of 10.*", metadata=set_fps(30.0)))
    add(Fault("time stamps", "gap of 0.9 s", "dropped frames", numbers=gap, one=True))
    add(
        Fault(
            "time stamps",
            "in microseconds",
            "time stamps in microseconds",
            numbers=lambda a, n: a.update(timestamps_ns=a["timestamps_ns"] // 1000),
        )
    )
    add(Fault("instruction", "empty", "empty instruction", metadata=lambda m: m.update(instruction=""), one=True))
    return found


def in_one_demo(add: Callable[[Fault], None]) -> None:
    """Add faults of the reached track's conventions, and of the intrinsics, in one demonstration among sound ones."""
    inverted = on("gripper_opening", "commanded_gripper_opening")(lambda g: 1 - g)
    says = r"gripper opening inverted \(.*"
    add(Fault("both grippers inverted", "", says, numbers=inverted, one=True))
    for joints in (True, False):
        changes = {
            "gripper inverted": (says, on("gripper_opening")(lambda g: 1 - g)),
            "quaternions xyzw": (
                "quaternions stored x, y, z, w",
                on("quaternion_wxyz")(lambda q: np.roll(q, -1, axis=1)),
            ),
            "quaternions conjugated": (
                r"quaternions conjugated \(world to gripper\)",
                on("quaternion_wxyz")(lambda q: q * [1, -1, -1, -1]),
            ),
            "poses inverted": (r"poses inverted \(.*", inverted_poses("")),
        }
        for kind, (cause, change) in changes.items():
            add(Fault(f"reached {kind}", "", cause, numbers=change, one=True, joints=joints))
    add(Fault("intrinsics", "x 2", "intrinsics of another resolution or crop", cameras=scaled_intrinsics(2), one=True))


def scaled_intrinsics(factor: float) -> Callable[[Arrays, int], None]:
    """Intrinsics of images that are `factor` times as large."""

    def change(arrays: Arrays, number: int) -> None:
        for key in list(arrays):
            if key.endswith("intrinsics"):
                arrays[key] = arrays[key] * np.array([[factor], [factor], [1.0]])

    return change


def size_of(share: float) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        for entry in metadata["cameras"].values():
            entry["width"], entry["height"] = round(share * entry["width"]), round(share * entry["height"])

    return change


def plant(clean: Path, folder: Path, fault: Fault, demos: int | None = DEMOS) -> list[str]:
    """A copy of a recording with a fault in it; `demos`: of so many of its demonstrations, None: of all. Returns the
    names of those that have the fault."""
    sources = sorted(path.parent for path in clean.glob("*/metadata.json"))[:demos]
    for number, demo in enumerate(sources):
        target = folder / demo.name
        shutil.copytree(demo, target)
        (target / "manifest.json").unlink(missing_ok=True)  # must be found by its content, not by a hash
        hit = not fault.one or number == 2
        trajectory = dict(np.load(target / "trajectory.npz"))
        if not fault.joints:
            trajectory = {key: value for key, value in trajectory.items() if "joint" not in key}
        if hit and fault.numbers is not None:
            fault.numbers(trajectory, number)
        np.savez(target / "trajectory.npz", **trajectory)
        if hit and fault.cameras is not None:
            cameras = dict(np.load(target / "cameras.npz"))
            fault.cameras(cameras, number)
            np.savez(target / "cameras.npz", **cameras)
        metadata = json.loads((target / "metadata.json").read_text())
        if hit and fault.metadata is not None:
            fault.metadata(metadata)
        (target / "metadata.json").write_text(json.dumps(metadata))
        if hit and (fault.images is not None or fault.other):
            source = sources[(number + 1) % len(sources)] if fault.other else demo
            for camera in metadata["cameras"]:
                files = sorted((source / "rgb" / camera).glob("*.jpg"))
                images = np.stack([np.asarray(Image.open(file)) for file in files])
                wanted = len(sorted((demo / "rgb" / camera).glob("*.jpg")))
                images = images[np.minimum(np.arange(wanted), len(images) - 1)]
                images = images if fault.images is None else fault.images(images)
                for index, image in enumerate(images):
                    Image.fromarray(np.ascontiguousarray(image)).save(
                        target / "rgb" / camera / f"{index:06d}.jpg", quality=95
                    )
    return [demo.name for number, demo in enumerate(sources) if not fault.one or number == 2]

"""Damage to every file of a folder of robot demonstrations, and its effect on their frames and poses."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import EXECUTING, Outcomes, flipped, hostile_images, hostile_json, hostile_npy

from keygrip.data.bad_samples import BadSample
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.samples import DemoSamples
from keygrip.data.robot.schema import Demo

ROUNDS = pytest.mark.parametrize(
    "rounds", [pytest.param(20, id="quick"), pytest.param(120, id="large", marks=pytest.mark.slow)]
)
HOSTILE_CONTENT = {
    ".json": lambda sentinel: hostile_json(b'"cameras"') + hostile_json(b'"frames"') + hostile_json(b'"fps"'),
    ".yaml": lambda sentinel: [*hostile_json(b'"cameras"'), b"a: &a [1]\nb: " + b"[*a, *a]" * 9, b"!!python/name:os"],
    ".npy": hostile_npy,
    ".npz": hostile_npy,
    ".pkl": hostile_npy,
    ".jpg": lambda sentinel: hostile_images(),
    ".mp4": lambda sentinel: [b"", b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n", b"ffconcat version 1.0\nfile /etc/passwd\n"],
    ".parquet": lambda sentinel: [b"", b"PAR1" * 9, b"PAR1" + b"\xff" * 64 + b"PAR1"],
    ".hdf5": lambda sentinel: [b"", b"\x89HDF\r\n\x1a\n" + b"\xff" * 96],
}


def contents(root: Path, reasons: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the poses and pixels (hashed) of every frame of every demonstration that can be read. Add to `reasons` why
    the others cannot be."""
    found: dict[str, Any] = {}
    reasons = {} if reasons is None else reasons
    for reference in find_demos(root):
        try:
            demo = reference.read()
        except BadSample as error:
            reasons[reference.name] = str(error)
            continue
        found[f"{demo.name} poses"] = digest(demo)
        for camera in demo.cameras:
            for frame in range(len(demo)):
                part = f"{demo.name} {camera} {frame}"
                try:
                    pixels = image(demo, camera, frame)
                except BadSample as error:
                    reasons[part] = str(error)
                    continue
                found[part] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return found


def image(demo: Demo, camera: str, frame: int) -> np.ndarray:
    """Read an image as training does, without the cache."""

    class Uncached:
        def read(self, demo_index: int, frame: int) -> np.ndarray:
            return demo.cameras[camera].frames.read(frame)

    samples = object.__new__(DemoSamples)
    samples.demos, samples.demo_indices, samples.frames = [demo], [0], {camera: Uncached()}  # type: ignore[dict-item]
    return samples._image(0, camera, frame)


def digest(demo: Demo) -> str:
    arrays = [demo.timestamps]
    for arm in demo.arms.values():
        for poses in (arm, arm.commanded):
            arrays += [] if poses is None else [poses.position, poses.quaternion, poses.gripper]
    for track in demo.cameras.values():
        arrays += [track.intrinsics, track.world_to_camera]
    text = f"{demo.instruction} {demo.fps} {[(t.width, t.height) for t in demo.cameras.values()]}"
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays) + text.encode()).hexdigest()


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)


def every_damage(root: Path, rounds: int, sentinel: Path) -> Iterator[tuple[Path, bytes, str]]:
    """Yield (file, damaged content, kind of damage). The caller writes the content and restores the file before the
    next."""
    rng = np.random.default_rng(0)
    held = files(root)
    for number in range(rounds):
        path = held[int(rng.integers(len(held)))]
        yield path, flipped(path.read_bytes(), rng), f"flip {number}"
    for suffix, make in HOSTILE_CONTENT.items():
        own = [path for path in held if path.suffix == suffix]
        for number, content in enumerate(make(sentinel)) if own else ():
            path = own[number % len(own)]
            executing = make is hostile_npy and number < EXECUTING
            if executing or rounds >= 100 or number % 3 == 0:
                yield path, content, f"hostile {number}"


def assert_damage_is_found(root: Path, rounds: int, unnoticed: tuple[str, ...]) -> Outcomes:
    """Damage files one by one. No reader may raise anything except a refusal, hang, or execute stored content.

    What the file does not belong to is read unchanged, and a demonstration that is left out is named with its reason. A
    file belongs to the demonstration whose folder it lies in; a file in no such folder may belong to all of them.

    Args:
        root: a valid folder of demonstrations; it is unchanged afterwards.
        unnoticed: suffixes of files without a checksum, where a change can give other valid content.
    """
    sentinel, outcomes = root.parent / "ran", Outcomes()
    whole, folders = contents(root), demo_folders(root)
    assert whole

    def damaged(path: Path, name: str) -> None:
        reasons: dict[str, str] = {}
        found = outcomes.run(name, lambda: contents(root, reasons), whole)
        if found is None:
            assert not any(path.is_relative_to(folder) for folder in folders), f"{name}: the whole folder is refused"
            return
        owner = next((demo for folder, demo in folders.items() if path.is_relative_to(folder)), None)
        if owner is not None:
            others = {part: value for part, value in whole.items() if not part.startswith(f"{owner} ")}
            assert {part: value for part, value in found.items() if not part.startswith(f"{owner} ")} == others, name
            assert reasons.keys() <= {owner, *(part for part in reasons if part.startswith(f"{owner} "))}, name
        before, now = ({part.removesuffix(" poses") for part in of if part.endswith(" poses")} for of in (whole, found))
        now |= reasons.keys() & before
        # changed bytes may be those of a name: a demonstration of a new name is then there instead
        renamed = now - before if path.suffix in unnoticed else set()
        assert len(before - now) <= len(renamed), f"{name}: {before - now} are left out without a word"
        for reason in reasons.values():
            assert reason.strip(), name
            assert "\n" not in reason, name

    for path, content, what in every_damage(root, rounds, sentinel):
        before, stat = path.read_bytes(), path.stat()
        path.write_bytes(content)
        name = f"{path.relative_to(root)} {what}"
        damaged(path, name)
        if name in outcomes.different:
            assert path.suffix in unnoticed, f"{name} gave other numbers or pixels without a word"
        path.write_bytes(before)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for path in {path.suffix: path for path in files(root)}.values():
        aside = root.parent / "aside"
        shutil.move(path, aside)
        os.mkfifo(path)
        damaged(path, f"{path.relative_to(root)} is a pipe")
        path.unlink()
        shutil.move(aside, path)
    assert contents(root) == whole
    outcomes.assert_clean(sentinel)
    return outcomes


def demo_folders(root: Path) -> dict[Path, str]:
    """Return the names of the demonstrations that are folders of their own."""
    named = {reference.path: reference.name for reference in find_demos(root)}
    return {path: name for path, name in named.items() if path.is_dir() and path != root}

"""Plants faults of every kind into simulated recordings and counts what the doctor finds, and what it calls it.

    python benchmarks/doctor.py --clean FOLDER --work FOLDER [--part PART] [--only NAME]

Parts: `faults`, planted into `pick`, on which the doctor was developed; `unseen`, the same faults planted into
`pick_place`, on which it was not; `clean`; `calibration`.

FOLDER of `--clean` holds the recordings of `RECORDINGS`, each made by the command that stands beside it. Writes
benchmarks/doctor.json, after each fault; a part that is run again replaces its own rows alone. Faults
(`doctor_faults.py`) are planted into copies: numbers into the arrays, images by encoding them again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from doctor_faults import DEMOS, Fault, faults, plant, shifted, turned
from scipy.spatial.transform import Rotation

from keygrip.artifacts import write_json
from keygrip.data.robot.discovery import find_demos
from keygrip.data.robot.doctor import Finding, doctor
from keygrip.data.robot.doctor.calibrate import calibrate

COMMAND = "python benchmarks/doctor.py --clean FOLDER --work FOLDER --part faults|unseen|clean|calibration"
RECORD = "python -m keygrip.prepare step=record processes=1 root=FOLDER/"
RECORDINGS = {
    "pick": "pick demos=6 image_size=160 task.name=pick",
    "pick_place": "pick_place demos=6 image_size=160 task.name=pick_place",
    "reach": "reach demos=6 image_size=160 task.name=reach",
    "stack": "stack demos=6 image_size=160 task.name=stack",
    "named_place": "named_place demos=6 image_size=160 task.name=named_place +task.distractors=2",
    "pick_front": "pick_front demos=6 image_size=200 task.name=pick +task.camera=front",
    "pick_moving": "pick_moving demos=6 image_size=160 task.name=pick +task.camera_jitter_deg=25 "
    "+task.randomise_light=true +task.randomise_table=true +task.randomise_colours=true",
    "pick_wrist": "pick_wrist demos=5 image_size=160 task.name=pick cameras=[over,wrist]",
    "bar_shadow": "bar_shadow demos=5 image_size=160 task.name=pick +task.object=bar +task.shadows=true",
    "place_20hz": "place_20hz demos=5 image_size=224 task.name=pick_place hz=20 video=true",
    "peg": "peg demos=6 image_size=160 task.name=peg",
    "handover": "handover env=yam_handover demos=5 image_size=160",
    "stills": "stills demos=8 image_size=160 hz=1 task.name=pick +task.camera_jitter_deg=15",
}

# Draws on `pick`, which `step=calibrate` was developed on, and on a recording that it was not.
CALIBRATIONS = {"pick": range(10), "stack": range(10, 15)}


def graded(findings: Sequence[Finding], says: str, planted: Collection[str]) -> tuple[bool, bool]:
    """Whether something was found in a demo with the fault, and whether the cause that one of the first three findings
    names is the fault, and of no demo without it.

    Args:
        says: regular expression of the whole cause. planted: names of the demos with the fault.
    """
    names = set(planted)
    found = any(names & set(finding.demos) for finding in findings)
    right = (re.fullmatch(says, finding.cause) and names >= set(finding.demos) for finding in findings[:3])
    return found, any(right)


def run_faults(clean: Path, work: Path, only: str | None) -> Iterator[dict[str, Any]]:
    for fault in faults():
        if only and not re.search(only, fault.name):
            continue
        shutil.rmtree(work, ignore_errors=True)
        planted = plant(clean, work / "data", fault)
        start = time.process_time()
        findings = doctor(work / "data", work / "out", compare_images=fault.seen, progress=False).findings
        seconds = time.process_time() - start
        found, right = graded(findings, fault.says, planted)
        row = {
            "fault": fault.name,
            "kind": fault.kind,
            "magnitude": fault.magnitude,
            "found": found,
            "right_cause": right,
            "cpu_seconds": round(seconds, 1),
            "said": [f"{finding.check}: {finding.cause}" for finding in findings][:4],
        }
        mark = "ok  " if right else "FOUND" if found else "MISS "
        print(f"{mark} {seconds:5.1f} s  {fault.name}  ->  {row['said']}", flush=True)  # noqa: T201
        yield row


def run_clean(folder: Path, work: Path, only: str | None) -> Iterator[dict[str, Any]]:
    for name in RECORDINGS:
        if only and not re.search(only, name):
            continue
        start = time.process_time()
        findings = doctor(folder / name, work / "out", progress=False).findings
        row = {
            "set": name,
            "findings": [str(finding) for finding in findings],
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        print(row, flush=True)  # noqa: T201
        yield row


def run_calibration(clean: Path, work: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """Cameras turned, shifted, zoomed and images late by drawn amounts, and what `step=calibrate` leaves."""
    draws = [(recording, seed) for recording, seeds in CALIBRATIONS.items() for seed in seeds]
    for recording, seed in draws:
        if only and not re.search(only, str(seed)):
            continue
        rng = np.random.default_rng(seed)
        degrees, cm = float(rng.uniform(2, 8)), float(rng.uniform(1, 5))
        percent, lag = float(rng.uniform(-15, 15)), int(rng.integers(-5, 6))
        if seed == 0:
            degrees, cm, percent, lag = 8.0, 5.0, 15.0, 5  # the largest of each, at once
        fault = Fault("", "", "", cameras=turned(degrees, cm, percent, seed), images=shifted(lag), joints=seed % 2 == 0)
        shutil.rmtree(work, ignore_errors=True)
        plant(clean / recording, work / "data", fault)
        report = calibrate(work / "data", work / "fixed.yaml", "auto", None, None, DEMOS, 20)
        true = find_demos(clean / recording)[0].read().cameras["over"]
        track = find_demos(work / "data", calibration=work / "fixed.yaml")[0].read().cameras["over"]
        was, now = true.world_to_camera[0], track.world_to_camera[0]
        turn = Rotation.from_matrix(now[:3, :3] @ was[:3, :3].T).magnitude()
        centre = np.linalg.inv(now)[:3, 3] - np.linalg.inv(was)[:3, 3]
        planted = {"degrees": degrees, "cm": cm, "focal_percent": percent}
        row = {
            "seed": seed,
            "recording": recording,
            "planted": {key: round(value, 2) for key, value in planted.items()} | {"late_frames": lag},
            "joints": fault.joints,
            "left_deg": round(float(np.degrees(turn)), 3),
            "left_mm": round(float(np.linalg.norm(centre)) * 1e3, 2),
            "left_focal_percent": round((track.intrinsics[0, 0, 0] / true.intrinsics[0, 0, 0] - 1) * 100, 3),
            "left_frames": round(report["cameras"]["over"]["late_frames"]) - lag,
        }
        print(row, flush=True)  # noqa: T201
        yield row


PARTS = {
    "faults": (run_faults, "fault"),
    "clean": (run_clean, "set"),
    "calibration": (run_calibration, "seed"),
    "unseen": (run_faults, "fault"),
}
PLANTED_INTO = {"faults": "pick", "unseen": "pick_place"}


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    found, right = (sum(row[key] for row in rows) for key in ("found", "right_cause"))
    return {"planted": len(rows), "found": found, "right_cause": right}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Counts over all rows of the record."""
    rows, sets, cameras, unseen = (record.get(part, []) for part in PARTS)
    return {
        **_counts(rows),
        "unseen": _counts(unseen),
        "clean_sets": len(sets),
        "false_alarms": sum(bool(row["findings"]) for row in sets),
        "calibrations": len(cameras),
        "largest_left": {
            key: max((abs(row[key]) for row in cameras), default=None)
            for key in ("left_deg", "left_mm", "left_focal_percent", "left_frames")
        },
    }


def commands(recorded: dict[str, str], made: str) -> dict[str, str]:
    """Commands that made the recordings: of `made`, of which a row is written now, the present one; of the others those
    that their rows were made with, where there are any."""
    present = {name: f"{RECORD}{command}" for name, command in RECORDINGS.items()}
    return present | recorded | {made: present[made]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only")
    parser.add_argument("--part", default="faults", choices=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/doctor.json"))
    arguments = parser.parse_args()
    run, key = PARTS[arguments.part]
    record = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    clean = arguments.clean / PLANTED_INTO.get(arguments.part, "")
    for row in run(clean, arguments.work, arguments.only):
        others = [known for known in record.get(arguments.part, []) if known[key] != row[key]]
        made = PLANTED_INTO.get(arguments.part) or row.get("recording") or row["set"]
        record = (
            {"command": COMMAND, "machine": "2 cores"}
            | record
            | {"recordings": commands(record.get("recordings", {}), made)}
        )
        record[arguments.part] = [*others, row]
        record["summary"] = summary(record)
        write_json(arguments.output, record)
    print(json.dumps(record["summary"]))  # noqa: T201


if __name__ == "__main__":
    main()

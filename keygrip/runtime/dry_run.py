"""A dry run: compute one plan from the robot's cameras, the resulting motion within limits, and the latency.

Writes a figure (.png, or any format of matplotlib) or a recording for the rerun viewer (.rrd, extra `rerun`).
"""

from __future__ import annotations

import copy
import json
import math
import textwrap
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from keygrip.artifacts import atomic_path, atomic_write, refuse_unwritable
from keygrip.models.policy import Plan, Policy
from keygrip.robots.joint_motion import ArmMotions, JointMotionError
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.limits import (
    LONGEST_PLAN_S,
    LimitedMotion,
    MotionLimits,
    UnsafePlanError,
    held_back,
    refuse_unsafe,
)
from keygrip.runtime.plan_terms import POSE, as_followed, observed_poses, waypoints_of
from keygrip.runtime.plausibility import PlausiblePolicy
from keygrip.runtime.robot import JointRobot, Robot
from keygrip.runtime.trajectory import ROUNDING_S, Trajectory, control_periods, gripped, initial_grip

LINES = ("-", "--", ":")  # line styles of the first arm, the second, ...
TABLE_MARGIN_M = 0.1  # how far the table is drawn beyond the paths in a rerun recording
TIMED_PLANS = 5  # the first plan is slower, because memory is allocated and kernels are selected


@dataclass(frozen=True)
class Rehearsal:
    """Result of a dry run.

    Attributes:
        observation: unchanged. plan: in the form in which it is followed. refused: why the plan, or a command in the
            part that is followed and blended out, would be refused; None: it would not. refused_later: why a command
            after that part would be refused; the next plan normally replaces that part.
        times: [K] seconds from the observation to the plan's end, or to 60 s.
        targets, commands: [K, A, 8] of the plan, and within the limits, from the observed pose. After it, openings are
            those that `execution` commands for the plan's. Joint limits apply up to a refused command only. The current
            pose if the plan is not a valid path.
        plan_ms: of each timed plan.
        arms: names of the A arms, as in the robot and its calibration.
    """

    observation: dict[str, Any]
    plan: Plan
    refused: str | None
    refused_later: str | None
    times: np.ndarray
    targets: np.ndarray
    commands: np.ndarray
    plan_ms: list[float]
    arms: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Return plain values for a line of JSON."""
        behind = np.linalg.norm(self.targets[..., :3] - self.commands[..., :3], axis=-1)
        return {
            "refused": self.refused,
            "refused_later": self.refused_later,
            "plan_ms_median": round(float(np.median(self.plan_ms)), 1),
            "plan_ms_max": round(max(self.plan_ms), 1),
            "plan_steps": int(self.plan.gripper.shape[1]),
            "plan_seconds": round(self.plan.step_seconds * self.plan.gripper.shape[1], 3),
            "fastest_m_s": round(float(_speeds(self.commands, self.times).max()), 3),
            "furthest_behind_cm": round(100 * float(behind.max()), 2),
            "lowest_cm": round(100 * float(self.commands[..., 2].min()), 2),
        }


def rehearse(policy: Policy, robot: Robot, limits: MotionLimits | None, execution: ChunkExecution) -> Rehearsal:
    """Plan from the robot's observation and send no command. `execution`: determines what of the plan is followed."""
    planner = policy.policy if isinstance(policy, PlausiblePolicy) else policy
    milliseconds, plan, observation = [], None, {}
    for _ in range(TIMED_PLANS):
        observation = robot.observe()
        started = time.perf_counter()
        plan = planner.plan(observation)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    assert plan is not None
    plan = replace(plan, time_s=0.0)
    arms = robot if isinstance(robot, JointRobot) else None
    refused = policy.refusal(observation, plan) if isinstance(policy, PlausiblePolicy) else None
    try:
        plan = as_followed(plan, execution.follow, arms)
    except UnsafePlanError as error:
        plan, refused = replace(plan, joints=None), refused or str(error)
    start = observed_poses(observation)
    motions = [] if limits is None else [LimitedMotion(limits, pose) for pose in start]
    if motions:
        try:
            refuse_unsafe(plan, motions, robot.control_hz)
        except UnsafePlanError as error:
            refused = refused or str(error)
    period, seconds, steps = 1.0 / robot.control_hz, plan.step_seconds, plan.gripper.shape[1]
    until = math.inf
    if _is_path(plan, len(start)):
        periods = max(1, control_periods(min(seconds * steps, LONGEST_PLAN_S), robot.control_hz))
        begin, opening = start.copy(), initial_grip(start[:, 7], execution.grip_below)
        begin[:, 7] = opening
        if plan.joints is not None:
            assert arms is not None
            begin = np.concatenate([begin, arms.commanded_joints], axis=1)
        waypoints = np.concatenate([begin[None], waypoints_of(plan).transpose(1, 0, 2)])
        path = Trajectory(seconds * np.arange(steps + 1), waypoints, arms)
        sampled_poses = np.stack([path.at(tick * period) for tick in range(periods + 1)])
        sampled_poses[0, :, 7] = start[:, 7]
        for pose in sampled_poses[1:]:
            pose[:, 7] = opening = gripped(pose[:, 7], opening, execution.grip_below, execution.release_above)
        until = seconds * execution.steps_followed(plan, start) + ROUNDING_S
        if execution.asynchronous:  # the next plan starts one period later, and this plan is blended out
            until += execution.blend_seconds + period
    else:
        refused = refused or "the plan is no path of finite poses"
        sampled_poses = np.stack([start, start])
    commands, wrong = _limited_commands(sampled_poses, motions, arms, period)
    later: str | None = None
    if wrong is not None:
        failed_s, reason = wrong
        message = f"its command after {failed_s:.2f} s: {reason}"
        refused, later = (refused or message, None) if failed_s <= until else (refused, message)
    targets, times = sampled_poses[..., :POSE], period * np.arange(len(sampled_poses))
    names = tuple(getattr(robot, "arms", ())) or tuple(f"arm {index}" for index in range(len(start)))
    return Rehearsal(observation, plan, refused, later, times, targets, commands, milliseconds, names)


def _limited_commands(
    path_poses: np.ndarray, motions: list[LimitedMotion], arms: JointRobot | None, period: float
) -> tuple[np.ndarray, tuple[float, str] | None]:
    """Return the commands [K, A, 8] along a path [K, A, W] within the limits, and when (seconds) and why the joints
    would refuse one. After that, the commands ignore the joints."""
    trial: ArmMotions | None = copy.deepcopy(getattr(arms, "joint_motion", None))
    commands: list[np.ndarray] = [path_poses[0, :, :POSE]]
    refused: tuple[float, str] | None = None
    for tick, target in enumerate(path_poses[1:], start=1):
        command, joints = target[:, :POSE], target[:, POSE:] if target.shape[1] > POSE else None
        if motions:
            command = np.stack([motion.step(pose, period) for motion, pose in zip(motions, command, strict=True)])
        if arms is not None and trial is not None:
            try:
                trial.step(command, period, joints)
            except JointMotionError as error:
                refused, trial = (tick * period, str(error)), None
            else:
                command = held_back(command, arms.poses_at(trial.joints), trial.held_back, motions, period)
        commands.append(command)
    return np.stack(commands), refused


def _is_path(plan: Plan, arms: int) -> bool:
    """Return whether a plan contains finite poses and times for that many arms, at any speed."""
    arrays = (plan.position, plan.quaternion, plan.gripper, np.asarray(plan.step_seconds))
    finite = len(plan.gripper) == arms and all(np.isfinite(part).all() for part in arrays)
    return finite and plan.step_seconds > 0 and bool((np.linalg.norm(plan.quaternion, axis=-1) > 0).all())


def refuse_dry_run_file(target: str) -> None:
    """Check the file of a dry run, before a policy is loaded and plans.

    Raises:
        ValueError: The file's ending is that of no figure or rerun recording, or it cannot be written.
        ModuleNotFoundError: It is a .rrd file and rerun is not installed.
    """
    path = Path(target)
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix not in ("", ".rrd") and path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"dry_run={target}: the ending {path.suffix} is that of no known format: give a figure "
            f"({', '.join(formats)}) or a rerun recording (rrd)"
        )
    if path.suffix == ".rrd" and find_spec("rerun") is None:
        raise ModuleNotFoundError("a .rrd file needs rerun: pip install 'keygrip[rerun]'")
    refuse_unwritable(path, "dry_run")


def dry_run(
    policy: Policy, robot: Robot, limits: MotionLimits | None, path: Path, execution: ChunkExecution
) -> dict[str, Any]:
    """Do a dry run, write the figure or the rerun recording, and return the results.

    `path` was checked by `refuse_dry_run_file`. `execution`: as in `rehearse`.
    """
    rehearsal = rehearse(policy, robot, limits, execution)
    if path.suffix == ".rrd":
        write_rerun(rehearsal, limits, path)
    else:
        figure = draw(rehearsal, limits)
        with atomic_write(path) as file, matplotlib.rc_context({"savefig.dpi": 110}):
            figure.savefig(file, format=path.suffix.lstrip(".") or "png")
    return rehearsal.summary() | {"dry_run": str(path)}


def draw(found: Rehearsal, limits: MotionLimits | None) -> Figure:
    """Plot the camera's image, positions, speed and gripper over time, and the planning times."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    image = found.observation.get("image")
    if image is not None:
        axes[0, 0].imshow(np.asarray(image))
    axes[0, 0].set(title="observation", xticks=[], yticks=[])
    speeds, planned_speeds = _speeds(found.commands, found.times), _speeds(found.targets, found.times)
    for arm, arm_name in enumerate(found.arms):
        line = LINES[arm % len(LINES)]
        for axis, name in enumerate("xyz"):
            label = f"{name}, {arm_name}"
            axes[0, 1].plot(found.times, found.targets[:, arm, axis], line, color=f"C{axis}", alpha=0.4)
            axes[0, 1].plot(found.times, found.commands[:, arm, axis], line, color=f"C{axis}", label=label)
        axes[1, 0].plot(found.times[1:], planned_speeds[:, arm], line, color="C0", alpha=0.4)
        axes[1, 0].plot(found.times[1:], speeds[:, arm], line, color="C0", label=arm_name)
        axes[1, 1].plot(found.times, found.commands[:, arm, 7], line, color="C0", label=arm_name)
    if limits is not None and limits.table_height_m is not None:
        axes[0, 1].axhline(limits.table_height_m, color="grey", linestyle=":", label="z of the table")
    if limits is not None:
        axes[1, 0].axhline(limits.speed_m_s, color="red", linestyle=":", label="limit")
    axes[0, 1].set(title="position, m (pale: the plan; full: within the limits)", xlabel="s")
    axes[1, 0].set(title="speed, m/s (pale: the plan; full: within the limits)", xlabel="s")
    axes[1, 1].set(title="gripper opening (0 closed, 1 open)", xlabel="s", ylim=(-0.05, 1.05))
    for panel in (axes[0, 1], axes[1, 0], axes[1, 1]):
        panel.legend(fontsize=7)
    plan_numbers = range(1, len(found.plan_ms) + 1)
    axes[0, 2].bar(plan_numbers, found.plan_ms)
    axes[0, 2].set(title="planning, ms", xlabel="plan", xticks=list(plan_numbers))
    axes[1, 2].axis("off")
    axes[1, 2].text(0, 1, "\n".join(describe_results(found, limits)), va="top", fontsize=9)
    return figure


def describe_results(found: Rehearsal, limits: MotionLimits | None) -> list[str]:
    """Describe the results as lines of text, together with the limits that apply to them."""
    figures = found.summary()

    def limit(value: float | None, text: str) -> str:
        return "" if value is None else f" ({text.format(value)})"

    speed = lag_cm = table_cm = None
    if limits is not None:
        speed, lag_cm = limits.speed_m_s, 100 * limits.lag_m
        table_cm = None if limits.table_height_m is None else 100 * limits.table_height_m
    lines = [
        f"arm{'s' if len(found.arms) > 1 else ''}: {', '.join(found.arms)}",
        f"planning: {figures['plan_ms_median']} ms (median), {figures['plan_ms_max']} ms (longest)",
        f"the plan: {figures['plan_steps']} steps, {figures['plan_seconds']} s",
        f"fastest: {figures['fastest_m_s']} m/s" + limit(speed, "limit {:g}"),
        f"furthest behind the plan: {figures['furthest_behind_cm']} cm" + limit(lag_cm, "limit {:g}"),
        f"lowest place of the tool: {figures['lowest_cm']} cm" + limit(table_cm, "table at {:g}"),
    ]
    if limits is None:
        lines.append("limits: none but the robot's own")
    elif limits.workspace_low is not None or limits.workspace_high is not None:
        sides = zip("xyz", *limits.box(), strict=True)
        lines += ["workspace, m:", *(f"    {axis} {low:g} to {high:g}" for axis, low, high in sides)]
    verdicts = (
        "the plan is refused: " + found.refused if found.refused else "the plan is not refused",
        f"refused unless the next plan comes first: {found.refused_later}" if found.refused_later else "",
    )
    return [*lines, "", *(line for verdict in verdicts for line in textwrap.wrap(verdict, 55))]


def write_rerun(found: Rehearsal, limits: MotionLimits | None, path: Path) -> None:
    """Write a recording for `rerun FILE`.

    Without time: the camera's image; planned and limited path of each arm; workspace and table; the results as text and
    as JSON. Over the plan's time (`plan`): tool point, gripper opening, speed, and distance behind the plan, the last
    two with their limits. By number of the plan (`plan_number`): `planning_ms`.
    """
    import rerun

    recording = rerun.RecordingStream("keygrip_dry_run")
    with atomic_path(path) as file:
        recording.save(file)
        if "image" in found.observation:
            recording.log("camera", rerun.Image(np.asarray(found.observation["image"])), static=True)
        for arm, arm_name in enumerate(found.arms):
            for name, path_A8 in (("plan", found.targets), ("limited", found.commands)):
                recording.log(f"{arm_name}/{name}", rerun.LineStrips3D([path_A8[:, arm, :3]]), static=True)
        if limits is not None:
            low, high = limits.box()
            if np.isfinite([low, high]).all():  # the text names the sides of a box that is open
                box = rerun.Boxes3D(centers=[(low + high) / 2], half_sizes=[(high - low) / 2])
                recording.log("limits/workspace", box, static=True)
            if limits.table_height_m is not None:
                outline = rerun.LineStrips3D([_table_outline(found, limits.table_height_m)])
                recording.log("limits/table", outline, static=True)
        recording.log("results", rerun.TextDocument("\n".join(describe_results(found, limits))), static=True)
        recording.log("summary", rerun.TextDocument(json.dumps(found.summary(), indent=1)), static=True)
        for number, milliseconds in enumerate(found.plan_ms, start=1):
            recording.set_time("plan_number", sequence=number)
            recording.log("planning_ms", rerun.Scalars(milliseconds))
        recording.reset_time()
        speeds = {"plan": _speeds(found.targets, found.times), "limited": _speeds(found.commands, found.times)}
        behind = np.linalg.norm(found.targets[..., :3] - found.commands[..., :3], axis=-1)
        for index, moment in enumerate(found.times):
            recording.set_time("plan", duration=float(moment))
            for arm, arm_name in enumerate(found.arms):
                recording.log(f"{arm_name}/tool", rerun.Points3D([found.commands[index, arm, :3]], radii=[0.005]))
                recording.log(f"{arm_name}/gripper", rerun.Scalars(float(found.commands[index, arm, 7])))
                recording.log(f"behind_m/{arm_name}", rerun.Scalars(float(behind[index, arm])))
                for name, values in speeds.items() if index else ():  # a speed is that of the period before
                    recording.log(f"speed_m_s/{name}/{arm_name}", rerun.Scalars(float(values[index - 1, arm])))
            if limits is not None:
                recording.log("speed_m_s/limit", rerun.Scalars(limits.speed_m_s))
                recording.log("behind_m/limit", rerun.Scalars(limits.lag_m))
        recording.flush()
        recording.disconnect()


def _table_outline(found: Rehearsal, height_m: float) -> np.ndarray:
    """Return a closed outline [5, 3] of the table below the paths, metres."""
    places = np.concatenate([found.targets[..., :2], found.commands[..., :2]]).reshape(-1, 2)
    (x0, y0), (x1, y1) = places.min(axis=0) - TABLE_MARGIN_M, places.max(axis=0) + TABLE_MARGIN_M
    return np.array([(x, y, height_m) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))])


def _speeds(poses: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the speeds [K - 1, A] of tools along poses [K, A, 8], m/s."""
    distances: np.ndarray = np.linalg.norm(np.diff(poses[:, :, :3], axis=0), axis=-1)
    return distances / np.diff(times)[:, None]

"""Drive a robot with a policy, local or on a server: connect policy, robot, limits and watchdog."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from keygrip.evaluation.kinds import plain
from keygrip.evaluation.trained_policy import default_device, load_policy
from keygrip.models.policy import Policy, can_continue
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.client import RemotePolicy, ServerError
from keygrip.runtime.control_loop import ControlLoop
from keygrip.runtime.dry_run import dry_run, refuse_dry_run_file
from keygrip.runtime.plan_terms import refuse_idle_follow
from keygrip.runtime.planners import Planner, SimulatedPlanner, ThreadPlanner
from keygrip.runtime.plausibility import Bounds, PlausiblePolicy
from keygrip.runtime.refusal import StoppedError
from keygrip.runtime.robot import JointRobot
from keygrip.runtime.takeover import CorrectionRecorder, Device, arm_index
from keygrip.runtime.watchdog import State, Watchdog
from keygrip.setting_types import refuse_ill_typed, refuse_left_out
from keygrip.training.checkpoints import external_files, find_checkpoint, trusted_packages
from keygrip.training.strategies import use_tf32

log = logging.getLogger(__name__)


def drive(cfg: DictConfig) -> dict[str, Any]:
    """Run the robot with the settings of ``cfg`` and return the report's figures.

    Raises:
        FileNotFoundError, ValueError: The checkpoint does not exist, the policy needs other arms or cameras than the
            robot has, or a setting is invalid. StoppedError: The watchdog stopped the arm. ConnectionError: The robot
            or the server does not respond.
    """
    refuse_left_out(cfg, "watchdog", "bounds")
    refuse_ill_typed(OmegaConf.to_container(cfg, resolve=True))
    _refuse_idle_blending(cfg.execution)
    if not cfg.seconds > 0:
        raise ValueError(f"seconds={cfg.seconds}: must be above 0")
    idle = [name for name in ("takeover", "record") if cfg[name] is not None]
    if cfg.dry_run is not None and idle:
        raise ValueError(f"{idle[0]}=... has no effect with dry_run={cfg.dry_run}, which drives no arm: leave it out")
    if cfg.dry_run is not None:
        refuse_dry_run_file(cfg.dry_run)
    if cfg.record is not None and cfg.takeover is None:
        raise ValueError(
            f"record={cfg.record} keeps corrections, which need a person: give takeover=..., or leave it out"
        )
    policy = _policy(cfg)
    needs: Any = getattr(policy, "needs", None)
    if cfg.takeover is not None and "arm" in cfg.takeover:
        arm_index(cfg.takeover.arm, needs.arms)  # connecting the robot moves its fingers
    robot = instantiate(_for_policy(cfg, policy).robot)
    planner: Planner | None = None
    try:
        _refuse_mismatch(policy, robot, arms_are_set="arms" in cfg.robot)
        if hasattr(policy, "reset"):
            try:
                policy.reset(cfg.seed)
            except ServerError as error:  # too many sessions, for example
                raise ConnectionError(f"server={cfg.server}: {error}") from error
        limits = instantiate(cfg.limits, _convert_="all")
        if limits is None:
            log.warning("limits=null: nothing but the robot's own limits bounds what the policy asks for")
        # a server applies bounds itself
        planning: Policy = policy if cfg.checkpoint is None else PlausiblePolicy(policy, instantiate(cfg.bounds))
        if getattr(robot, "real_time", True):
            planner = ThreadPlanner(planning, awaited=cfg.server is None)
        else:  # its clock does not advance while a plan is computed
            planner = SimulatedPlanner(planning, latency_s=lambda: 0.0)
        execution = instantiate(cfg.execution)(planner=planner, control_hz=robot.control_hz)
        _refuse_no_continuing(execution, policy)
        refuse_idle_follow(execution.follow, "execution.follow", needs, isinstance(robot, JointRobot))
        if cfg.dry_run is not None:
            try:
                return dry_run(planning, robot, limits, Path(cfg.dry_run), execution)
            except ServerError as error:  # busy, stuck, or its plan took too long
                raise ConnectionError(f"server={cfg.server}: {error}") from error
        with contextlib.ExitStack() as stack:
            recorder = None if cfg.record is None else stack.enter_context(_recorder(Path(cfg.record), robot))
            takeover = instantiate(cfg.takeover)  # from here on the takeover reads the keyboard
            if takeover is not None:
                stack.callback(takeover.close)
            if isinstance(takeover, Device):
                takeover.select_arm(needs.arms)
            loop = ControlLoop(robot, execution, limits, Watchdog(instantiate(cfg.watchdog)), takeover, recorder)
            report = loop.run(cfg.seconds, over=lambda: _task_over(robot))
            result = report.summary()
            if recorder is not None:
                result["recorded"] = cfg.record if recorder.corrected else None
        if hasattr(robot, "outcome"):
            result["success"] = robot.outcome()[0]
        if report.state is State.STOPPED:
            raise StoppedError(f"the arm was stopped: {report.reason}", result)
        return result
    finally:
        try:
            robot.stop()
            robot.close()
        finally:
            if planner is not None:
                planner.close()  # last: it may wait for a plan
            if hasattr(policy, "end_session"):  # that of a server
                policy.end_session()


def _policy(cfg: DictConfig) -> Policy:
    if (cfg.checkpoint is None) == (cfg.server is None):
        raise ValueError("give one of checkpoint=RUN and server=http://HOST:PORT")
    if cfg.server is not None:
        idle = [name for name in ("checkpoint_step", "device", "tf32", "policy", "trust", "external") if cfg[name]]
        idle += ["bounds"] if instantiate(cfg.bounds) != Bounds() else []
        if idle:
            raise ValueError(f"{idle[0]} has no effect with server=...: give it to keygrip serve")
        try:
            remote: Policy = RemotePolicy(cfg.server, token=cfg.token, ca=cfg.ca, renews=True)
        except ServerError as error:  # a wrong token, or a policy that is stuck: not an error of this program
            raise ConnectionError(f"server={cfg.server}: {error}") from error
        return remote
    for name in ("token", "ca"):
        if cfg[name] is not None:
            raise ValueError(f"{name} has no effect with checkpoint=...: it is for server=https://HOST:PORT")
    device = cfg.device or default_device()
    use_tf32(cfg.tf32, device.startswith("cuda"))
    file = find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    policy: Policy = load_policy(file, plain(cfg.policy) or {}, device, trusted_packages(cfg), external_files(cfg))
    return policy


def _for_policy(cfg: DictConfig, policy: Any) -> DictConfig:
    """Return the robot's settings in the order that the policy needs: its `arms` in the policy's order, if both have
    the same names, and the camera that a single-camera policy reads in first place.

    Observations and plans identify arms by position only, and an arm that is added on the command line comes after
    those of the file. The first camera's image is the observation's main image.
    """
    needs, fitted = policy.needs, copy.deepcopy(cfg)  # part of the root, which its settings may refer to
    robot, arms, cameras = fitted.robot, fitted.robot.get("arms"), fitted.robot.get("cameras")
    if isinstance(arms, DictConfig) and sorted(map(str, arms)) == sorted(needs.arms):
        robot.arms = _first(arms, needs.arms)
    trained = needs.cameras or (() if needs.camera is None else (needs.camera,))
    if cameras is None and trained and set(trained) <= set(getattr(get_object(robot._target_), "known_cameras", ())):
        robot.cameras = list(trained)
    elif isinstance(cameras, DictConfig | ListConfig) and needs.camera in list(cameras):
        robot.cameras = _first(cameras, (needs.camera,))
    return fitted


def _first(settings: DictConfig | ListConfig, names: Sequence[str]) -> Any:
    """Return the same entries, with the given names first."""
    entries: Any = OmegaConf.to_container(settings, resolve=False)
    order = [*names, *(name for name in entries if name not in names)]
    return {name: entries[name] for name in order} if isinstance(entries, dict) else order


def _refuse_mismatch(policy: Any, robot: Any, arms_are_set: bool = True) -> None:
    """Raise ValueError if the robot lacks what the policy needs.

    Args:
        arms_are_set: whether the robot has the setting `arms`; the simulated arm, for example, has none.
    """
    needs = policy.needs
    # with one arm the names may differ; with several the names decide which arm is which
    if len(needs.arms) != len(robot.arms) or (len(needs.arms) > 1 and set(needs.arms) != set(robot.arms)):
        remedy = (
            "give robot.arms the policy's names"
            if arms_are_set
            else "its arms cannot be changed. Name a robot with the policy's arms (robot=yam), or run the policy in a "
            "simulated environment with keygrip evaluate"
        )
        raise ValueError(f"the policy moves {', '.join(needs.arms)}, the robot has {', '.join(robot.arms)}: {remedy}")
    if len(needs.arms) > 1 and tuple(needs.arms) != tuple(robot.arms):
        raise ValueError(
            f"the policy's arms are {', '.join(needs.arms)} in this order, the robot gives {', '.join(robot.arms)}: "
            "plans would move the wrong arm; give the robot the policy's order"
        )
    # with one camera, the names may differ too
    missing = [name for name in needs.cameras if name not in robot.cameras]
    if missing and not (len(needs.cameras) == 1 and len(robot.cameras) == 1):
        raise ValueError(f"the policy reads camera {missing[0]!r}; the robot has {', '.join(robot.cameras)}")
    if not needs.cameras and len(robot.cameras) > 1:
        _refuse_other_camera(needs.camera, robot.cameras)
    if needs.instruction and not getattr(robot, "instruction", ""):
        raise ValueError("the policy reads an instruction: give robot.instruction='...'")


def _refuse_other_camera(trained: str | None, cameras: Sequence[str]) -> None:
    """Raise ValueError if the first of several cameras, whose image is used, is not the one trained on."""
    if trained is None:
        log.warning(
            "the policy does not say which camera it was trained on (an older checkpoint): it is given %s, the first "
            "of %s; name another one first in robot.cameras, or leave the others out",
            cameras[0],
            ", ".join(cameras),
        )
    elif trained not in cameras:
        raise ValueError(
            f"the policy was trained on camera {trained!r}; the robot has {', '.join(cameras)}: name the one in its "
            f"place {trained!r} in robot.cameras, or leave the others out"
        )
    elif trained != cameras[0]:
        raise ValueError(
            f"the policy was trained on camera {trained!r}, the robot gives the image of {cameras[0]!r}: it must name "
            f"{trained!r} first of its cameras ({', '.join(cameras)})"
        )


def _refuse_no_continuing(execution: ChunkExecution, policy: Any) -> None:
    if execution.continue_chunks and not can_continue(policy):
        policy_name = f"that of {policy.url}" if isinstance(policy, RemotePolicy) else type(policy).__name__
        raise ValueError(
            "execution.continue_chunks=true needs a policy that continues a plan (geometry_vla); "
            f"{policy_name} does not: leave it out"
        )


def _refuse_idle_blending(execution: DictConfig) -> None:
    blend_seconds = execution.get("blend_seconds", ChunkExecution.blend_seconds)
    if blend_seconds > 0 and not execution.get("asynchronous", ChunkExecution.asynchronous):
        raise ValueError(
            f"execution.blend_seconds={blend_seconds:g} has no effect with execution.asynchronous=false: a "
            "plan starts after the previous plan has ended; give execution.blend_seconds=0, or execution=blocking alone"
        )


def _recorder(folder: Path, robot: Any) -> CorrectionRecorder:
    return CorrectionRecorder(
        folder,
        robot.robot,
        "correction",
        robot.instruction or "correction",
        robot.arms,
        robot.cameras,
        robot.control_hz,
        getattr(robot, "models", None),
    )


def _task_over(robot: Any) -> bool:
    """Return whether a simulated robot's task is done or has failed. The run of a real robot ends by time."""
    if not hasattr(robot, "outcome"):
        return False
    success, failure = robot.outcome()
    return bool(success or failure)

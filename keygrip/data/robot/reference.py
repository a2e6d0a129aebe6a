"""A demonstration that was found but not read yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from keygrip.data.bad_samples import HOSTILE, is_of_the_machine, reason_of
from keygrip.data.robot.checks import check_demo, correct_deviations
from keygrip.data.robot.schema import Demo, DemoError, left_out_cameras


@dataclass(frozen=True)
class DemoReference:
    """A demo that was found but not read yet.

    Args:
        name: unique under the root, stable (the folder's path below the root): the train/validation split hashes it.
        path: its folder or file.
        format: one of `FORMATS`.
        reader: returns the Demo; picklable (a `functools.partial` of a module's function). It may raise any exception
            listed in `keygrip.data.bad_samples.HOSTILE`.
    """

    name: str
    path: Path
    format: str
    reader: Callable[[], Demo]

    def read(
        self,
        images: bool = True,
        cameras: Iterable[str] | None = None,
        uncalibrated: bool | Collection[str] = False,
    ) -> Demo:
        """Read the demo and check it (see `check_demo`). Its quaternions are then unit quaternions.

        Args:
            images, cameras: as for `check_demo`. uncalibrated: keep cameras whose pose is not known, all of them (True)
                or those with these names. The others are left out, with a note in the demo's `source`.

        Raises:
            DemoError: the demo cannot be used. Errors of the machine (no file descriptors left) pass unchanged.
        """
        try:
            demo = self.reader()
            if uncalibrated is not True:
                demo = _drop_uncalibrated(demo, uncalibrated or ())
            check_demo(demo, images=images, cameras=cameras)
        except DemoError as error:
            if error.name == self.name:
                raise
            raise DemoError(self.name, error.reason, error.cause, error.remedy) from error
        except KeyError as error:
            raise DemoError(self.name, f"{str(error)[:80]} is missing in {self.path}") from error
        except HOSTILE as error:
            if is_of_the_machine(error):
                raise
            raise DemoError(self.name, reason_of(error)) from error
        return replace(demo, arms={name: correct_deviations(arm) for name, arm in demo.arms.items()})


def _drop_uncalibrated(demo: Demo, exempt_cameras: Collection[str]) -> Demo:
    """Return the demo without cameras whose pose is not known, except `exempt_cameras`. Raise DemoError if
    none is left."""
    unknown = {name: track.uncalibrated for name, track in demo.cameras.items() if track.uncalibrated}
    without = {name: reason for name, reason in unknown.items() if name not in exempt_cameras}
    if not without:
        return demo
    if len(without) == len(demo.cameras):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in (left_out_cameras(demo) | without).items())
        raise DemoError(
            demo.name,
            f"no camera is calibrated ({reasons}), which only some models can do without (docs/data.md)",
        )
    notes = [f"camera {name} is left out: {reason}" for name, reason in without.items()]
    return replace(
        demo,
        cameras={name: track for name, track in demo.cameras.items() if name not in without},
        source=demo.source | {"notes": [*demo.source.get("notes", []), *notes], "uncalibrated": without},
    )

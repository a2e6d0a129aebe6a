"""The arm and gripper models that a recording names in `source.models`, with i2rt's names of YAM arms."""

from __future__ import annotations

from keygrip.data.robot.schema import Demo, DemoError
from keygrip.robots.kinematics import arm_chain


def named_models(demo: Demo, arm: str) -> tuple[str, str] | None:
    """Return i2rt's names of the arm and gripper of one of a recording's arms; None if `source.models` has none.

    Raises:
        DemoError: the names are invalid or unknown.
    """
    models = demo.source.get("models")
    found = models.get(arm) if isinstance(models, dict) else None
    if found is None:
        return None
    # identifiers, because file names contain them
    if not (
        isinstance(found, list)
        and len(found) == 2
        and all(isinstance(name, str) and name.isidentifier() for name in found)
    ):
        raise DemoError(
            demo.name, f"source.models.{arm} is {found!r}: the names of an arm and of its gripper are needed"
        )
    try:
        arm_chain(found[0], found[1])
    except ValueError as error:
        raise DemoError(demo.name, f"source.models.{arm}: {error}") from error
    return found[0], found[1]

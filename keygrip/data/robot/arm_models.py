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
    names = models.get(arm) if isinstance(models, dict) else None
    if names is None:
        return None
    # identifiers, because file names contain them
    if not (
        isinstance(names, list)
        and len(names) == 2
        and all(isinstance(name, str) and name.isidentifier() for name in names)
    ):
        raise DemoError(
            demo.name, f"source.models.{arm} is {names!r}: the names of an arm and of its gripper are needed"
        )
    try:
        arm_chain(names[0], names[1])
    except ValueError as error:
        raise DemoError(demo.name, f"source.models.{arm}: {error}") from error
    return names[0], names[1]

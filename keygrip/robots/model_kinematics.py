"""Forward kinematics of any serial arm from only its MJCF or URDF file: the tool's pose at given joints.

The file may come with an untrusted data set. Only its bodies, joints and sites are passed to MuJoCo; files that it
names are not opened, and visual shapes, collision shapes and actuators are left out. Frames: the base is the file's
world (MJCF) or root link (URDF). Metres, rad.

Shape legend: N poses, J joints.
"""

from __future__ import annotations

import difflib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import numpy as np

from keygrip.robots.mujoco_backend import mujoco
from keygrip.robots.xml_text import parse_xml

MOST_BODIES = 500
HINGE, SLIDE = int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)

_TURNS = ("quat", "axisangle", "xyaxes", "zaxis", "euler")
_KEPT = {
    "mujoco": {  # elements, and the attributes kept of each
        "mujoco": (),
        "compiler": ("angle", "autolimits", "eulerseq"),
        "default": ("class",),
        "worldbody": (),
        "body": ("name", "childclass", "pos", *_TURNS),
        "frame": ("name", "childclass", "pos", *_TURNS),
        "joint": ("name", "class", "type", "pos", "axis", "range", "limited", "ref"),
        "freejoint": ("name",),
        "site": ("name", "class", "pos", "type", "size", "fromto", *_TURNS),
    },
    "robot": {
        "robot": ("name",),
        "link": ("name",),
        "joint": ("name", "type"),
        "parent": ("link",),
        "child": ("link",),
        "origin": ("xyz", "rpy"),
        "axis": ("xyz",),
        "limit": ("lower", "upper", "effort", "velocity"),
    },
}
_NUMBERS = {"pos", "axis", "range", "ref", "size", "fromto", "xyz", "rpy", "lower", "upper", *_TURNS}
_ELSEWHERE = ("include", "attach", "replicate")  # of MJCF: elements whose content is in another place or file


class ToolKinematics:
    """The forward kinematics of one arm.

    Args:
        text: content of an MJCF or URDF file. name: of the file, for messages.
        tool: the body, link or MJCF site whose pose is computed.
        joints: J names, in the order of the values given later. Other joints of the file must not move the tool.

    Attributes:
        joints: as given. hinges: [J] bool, whether a joint rotates (else it slides).
        limits: [J, 2] lowest and highest value, infinite if the file has none.

    Raises:
        ValueError: It is not such a file, or names something that does not exist.
    """

    def __init__(self, text: bytes, name: str, tool: str, joints: Sequence[str]) -> None:
        self.name, self.tool, self.joints = name, tool, tuple(joints)
        self._model = model = _compile_model(text, name)
        names = [model.joint(index).name or f"joint {index}" for index in range(model.njnt)]
        for joint in self.joints:
            if joint not in names:
                raise ValueError(f"{name} has no joint {joint!r}" + _suggest_name(joint, names))
        if len(set(self.joints)) != len(self.joints) or not self.joints:
            raise ValueError(f"{name}: the joints {', '.join(self.joints) or '(none)'} must be named, each once")
        self._order = [names.index(joint) for joint in self.joints]  # with hinges and slides, joint i is qpos[i]
        bodies = {model.body(index).name: index for index in range(1, model.nbody)}
        sites = {model.site(index).name: index for index in range(model.nsite)}
        if tool not in {*bodies, *sites} - {""}:
            raise ValueError(f"{name} has no body, link or site {tool!r}" + _suggest_name(tool, [*bodies, *sites]))
        self._site = sites.get(tool)
        self._body = bodies[tool] if self._site is None else int(model.site_bodyid[self._site])
        self._refuse_unnamed(names)
        self.hinges = model.jnt_type[self._order] == HINGE
        limited = model.jnt_limited[self._order].astype(bool)[:, None]
        self.limits = np.where(limited, model.jnt_range[self._order], [-np.inf, np.inf])

    def poses(self, joints: np.ndarray) -> np.ndarray:
        """Return base_from_tool [N, 4, 4] of joints [N, J], rad (m for slides).

        Raises:
            ValueError: The number of joints differs, or values are not finite.
        """
        joints = np.asarray(joints, dtype=np.float64)
        if joints.ndim != 2 or joints.shape[1] != len(self.joints):
            raise ValueError(f"{self.name}: {len(self.joints)} joints are named, got numbers of {list(joints.shape)}")
        data = mujoco.MjData(self._model)
        poses = np.zeros((len(joints), 4, 4))
        poses[:, 3, 3] = 1.0
        for pose, values in zip(poses, joints, strict=True):
            data.qpos[self._order] = values
            mujoco.mj_kinematics(self._model, data)
            turn, position = (
                (data.xmat[self._body], data.xpos[self._body])
                if self._site is None
                else (data.site_xmat[self._site], data.site_xpos[self._site])
            )
            pose[:3, :3], pose[:3, 3] = turn.reshape(3, 3), position
        if not np.isfinite(poses).all():
            raise ValueError(f"{self.name}: the tool's pose is not finite at the given joints")
        return poses

    def _refuse_unnamed(self, names: Sequence[str]) -> None:
        """Raise ValueError if a joint moves the tool and is not among the named ones."""
        body = self._body
        while body > 0:
            first = int(self._model.body_jntadr[body])
            for index in range(first, first + int(self._model.body_jntnum[body])):
                if names[index] not in self.joints:
                    raise ValueError(
                        f"{self.name}: the joint {names[index]!r} moves the tool {self.tool!r} and is not named: name "
                        "it among the joints, or take as tool what it does not move"
                    )
            body = int(self._model.body_parentid[body])


def _suggest_name(name: str, known_names: Sequence[str]) -> str:
    listed = sorted(filter(None, known_names))
    near = difflib.get_close_matches(name, listed, n=1)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" It has {', '.join(listed) or 'none'}"


def _compile_model(text: bytes, name: str) -> mujoco.MjModel:
    """Compile the bodies, joints and sites of a file to a MuJoCo model."""
    try:
        root = parse_xml(text)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    if root.tag not in _KEPT:
        raise ValueError(f"{name} begins with <{root.tag}>: MJCF begins with <mujoco>, URDF with <robot>")
    if elsewhere := [tag for tag in _ELSEWHERE if root.tag == "mujoco" and root.find(f".//{tag}") is not None]:
        raise ValueError(
            f"{name} has an element <{elsewhere[0]}>, which is not followed: name the file in which the arm's bodies "
            "themselves are, or save the whole as one file with MuJoCo (mj_saveLastXML)"
        )
    if sum(1 for each in root.iter() if each.tag in ("body", "link")) > MOST_BODIES:
        raise ValueError(f"{name} has more than {MOST_BODIES} bodies")
    try:
        _strip(root, _KEPT[root.tag])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if root.tag == "robot":
        settings = ElementTree.SubElement(root, "mujoco")
        ElementTree.SubElement(settings, "compiler", fusestatic="false")
    try:
        spec = mujoco.MjSpec.from_string(ElementTree.tostring(root, encoding="unicode"))
        spec.compiler.fusestatic = False
        # masses were left out, because poses do not need them
        spec.compiler.boundmass, spec.compiler.boundinertia = 1e-3, 1e-6
        model = spec.compile()
    except ValueError as error:  # MuJoCo's own messages contain the element
        raise ValueError(f"{name} is not read by MuJoCo: {' '.join(str(error).split())}") from error
    if odd := [index for index, kind in enumerate(model.jnt_type.tolist()) if kind not in (HINGE, SLIDE)]:
        joint = model.joint(odd[0]).name or f"joint {odd[0]}"
        raise ValueError(f"{name}: joint {joint!r} is a ball or floats free: only hinges and slides are read")
    return model


def _strip(element: ElementTree.Element, kept_attributes: dict[str, tuple[str, ...]]) -> None:
    """Remove every element and attribute that is not in `kept_attributes`. Raises ValueError if a number is NaN."""
    for attribute in set(element.attrib) - set(kept_attributes[element.tag]):
        del element.attrib[attribute]
    for attribute in set(element.attrib) & _NUMBERS:
        if "nan" in element.attrib[attribute].lower().split():  # MuJoCo accepts it, and writes a file with a warning
            raise ValueError(f"{attribute} of an element <{element.tag}> holds NaN")
    for child in list(element):
        if child.tag in kept_attributes:
            _strip(child, kept_attributes)
        else:
            element.remove(child)

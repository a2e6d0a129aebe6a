"""Captions and questions with verifiable answers, generated from the simulator's state and not from the expert's plan.

`describe` returns the content of `text.json` of a demo:

- `camera`: the camera whose image is used in questions about the scene and frame captions; the recorder adds it.
- `captions`: {"text", "kind", "start_s", "end_s", "evidence"}; kind "video" describes the whole episode, "event" one
  event between two times, "frame" the content of one image (start = end).
- `questions`: {"question", "answer", "kind", "evidence"}; the answer follows from the evidence, which is ground truth.
  Its `demo_frame` counts frames of the demo; `frame`, in a tour's evidence, those of the video.

Left and right are those of the image. There are no questions about what the image hides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keygrip.envs.yam.tasks import IN_BOWL, EpisodeLayout, TaskOptions, stream

LIFTED = 0.03  # m
SIDE_MARGIN = 0.06  # fraction of the image's width; if objects are closer, left and right are ambiguous
NEAREST_MARGIN = 0.03  # m
MOMENT_MARGIN_S = 0.3
Ask = Callable[[str, str, str, dict[str, Any]], None]  # question, answer, kind, evidence
SMALLEST_SHARE = 2e-4  # fraction of the image's pixels: 10 at 224 x 224


@dataclass
class Sight:
    """The first camera's view at one moment: by name, the centre (x, y) in pixels and the number of visible pixels."""

    centres: dict[str, tuple[float, float]]
    visible: dict[str, int]
    width: int
    height: int

    def shows(self, name: str) -> bool:
        """Return whether enough of an object is visible for a question about it."""
        return self.visible.get(name, 0) >= max(4.0, SMALLEST_SHARE * self.width * self.height)


@dataclass
class EpisodeTrace:
    """The simulator's record of an episode of N frames; positions in metres."""

    task: TaskOptions
    layout: EpisodeLayout
    seed: int
    hz: float
    first: Sight | None = None
    last: Sight | None = None
    object_positions: list[np.ndarray] = field(default_factory=list)  # N of [3]
    tool_positions: list[np.ndarray] = field(default_factory=list)  # N of [3]
    held: list[bool] = field(default_factory=list)  # N: both fingers touch the object
    final_positions: dict[str, np.ndarray] = field(default_factory=dict)
    success: bool = False

    def add(self, object_position: np.ndarray, tool_position: np.ndarray, held: bool) -> None:
        """Add a frame."""
        self.object_positions.append(object_position)
        self.tool_positions.append(tool_position)
        self.held.append(bool(held))

    def moment(self, frame: int) -> float:
        """Return the time of a frame in seconds, to the hundredth."""
        return round(frame / self.hz, 2)


@dataclass(frozen=True)
class Events:
    """Frames at which events begin; None if an event does not happen."""

    grip: int | None
    lift: int | None
    release: int | None
    end: int


def events_of(trace: EpisodeTrace) -> Events:
    """Return when the object is grasped, lifted and released, from contact and height."""
    held = np.array(trace.held, bool)
    height = np.array([p[2] for p in trace.object_positions])
    raised = held & (height > height[0] + LIFTED)
    lift = int(np.argmax(raised)) if raised.any() else None
    grip = release = None
    if lift is not None:
        free_before = np.flatnonzero(~held[:lift])
        grip = int(free_before[-1]) + 1 if len(free_before) else 0
        free_after = np.flatnonzero(~held[lift:])
        release = lift + int(free_after[0]) if len(free_after) else None
    return Events(grip, lift, release, len(held) - 1)


def describe(trace: EpisodeTrace) -> dict[str, list[dict[str, Any]]]:
    """Return captions and questions of an episode: a pure function of the trace (wording is sampled from the seed)."""
    rng = stream(trace.seed, "text")
    return {"captions": _write_captions(trace, rng), "questions": _write_questions(trace, rng)}


# ---- words -----------------------------------------------------------------------------------------------------------


def _object_phrase(trace: EpisodeTrace) -> str:
    return f"the {trace.layout.object.colour} {trace.layout.object.shape}"


def _goal_noun(trace: EpisodeTrace) -> str | None:
    words = {"pick_place": "bowl", "named_place": "bowl", "stack": "block", "peg": "slot", "reach": "ball"}
    return words.get(trace.task.name)


def _goal_phrase(trace: EpisodeTrace) -> str:
    return f"the {trace.layout.goal_colour} {_goal_noun(trace)}"


def _add_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _join_phrases(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _choose(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _format_sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _relative_side(sight: Sight, name: str, reference: str) -> str | None:
    """Return whether `name` is left or right of `reference` in the image; None if too close or hidden."""
    if not (sight.shows(name) and sight.shows(reference)):
        return None
    gap = (sight.centres[name][0] - sight.centres[reference][0]) / sight.width
    if abs(gap) < SIDE_MARGIN:
        return None
    return "left" if gap < 0 else "right"


def _describe_end_place(trace: EpisodeTrace) -> str | None:
    """Describe where the moved object is in the last frame."""
    if trace.held[-1] and trace.object_positions[-1][2] > trace.object_positions[0][2] + LIFTED:
        return "in the gripper"
    if trace.success and trace.task.name in IN_BOWL:
        return f"in {_goal_phrase(trace)}"
    if trace.success and trace.task.name == "stack":
        return f"on {_goal_phrase(trace)}"
    if trace.success and trace.task.name == "peg":
        return f"in {_goal_phrase(trace)}"
    return "on the table" if trace.task.name == "reach" else None


# ---- captions --------------------------------------------------------------------------------------------------------


def _write_captions(trace: EpisodeTrace, rng: np.random.Generator) -> list[dict[str, Any]]:
    events, thing, name = events_of(trace), _object_phrase(trace), trace.task.name
    end = trace.moment(events.end)
    arm = _choose(rng, ["a robot arm", "the arm", "a gripper"])
    into_bowl = f"{arm} picks up {thing}, carries it to {_goal_phrase(trace)} and drops it in"
    story = {
        "reach": f"{arm} reaches out and touches {_goal_phrase(trace)}",
        "pick": f"{arm} grips {thing} and lifts it off the table",
        "pick_place": into_bowl,
        "named_place": into_bowl,
        "stack": f"{arm} picks up {thing} and sets it down on top of {_goal_phrase(trace)}",
        "peg": f"{arm} picks up {thing} and puts it into {_goal_phrase(trace)}",
    }[name]
    sentences = [_format_sentence(story)]
    idle = [_add_article(f"{d.colour} {d.shape}") for d in trace.layout.distractors]
    if idle:
        stays = "stays" if len(idle) == 1 else "stay"
        sentences.append(_format_sentence(f"{_join_phrases(idle)} {stays} on the table"))
    evidence = {"success": trace.success, "grip_frame": events.grip, "release_frame": events.release}
    captions: list[dict[str, Any]] = []

    def tell(text: str, kind: str, start: float, stop: float, why: dict[str, Any]) -> None:
        captions.append({"text": text, "kind": kind, "start_s": start, "end_s": stop, "evidence": why})

    if trace.success:
        tell(" ".join(sentences), "video", 0.0, end, evidence)
    if events.grip is not None and events.lift is not None:
        gripped, lifted = trace.moment(events.grip), trace.moment(events.lift)
        height = round(float(max(p[2] for p in trace.object_positions)), 3)
        approach_text = f"the gripper moves to {thing} and closes on it"
        tell(_format_sentence(approach_text), "event", 0.0, gripped, {"held_from_s": gripped})
        why = {"held_from_s": gripped, "raised_from_s": lifted, "highest_m": height}
        if events.release is None:
            tell(_format_sentence(f"the arm lifts {thing} and holds it"), "event", gripped, end, why)
        else:
            released = trace.moment(events.release)
            tell(
                _format_sentence(f"the arm lifts {thing} and carries it to {_goal_phrase(trace)}"),
                "event",
                gripped,
                released,
                why,
            )
            release_text = f"the gripper lets go of {thing} and moves away"
            tell(_format_sentence(release_text), "event", released, end, {"held_until_s": released})
    for sight, moment in ((trace.first, 0.0), (trace.last, end)):
        if sight is not None:
            tell(_describe_scene(trace, sight), "frame", moment, moment, {"visible_pixels": dict(sight.visible)})
    return captions


def _describe_scene(trace: EpisodeTrace, sight: Sight) -> str:
    """Describe one image: visible objects from left to right."""
    words = {p.name: f"{p.colour} {p.shape}" for p in trace.layout.placed}
    if _goal_noun(trace):
        words["goal"] = f"{trace.layout.goal_colour} {_goal_noun(trace)}"
    visible = sorted((n for n in words if sight.shows(n)), key=lambda n: sight.centres[n][0])
    if not visible:
        return "A robot arm over an empty table."
    text = f"A table with {_join_phrases([_add_article(words[n]) for n in visible])}, from left to right"
    if len(visible) == 1:
        text = f"A table with {_add_article(words[visible[0]])}"
    return f"{text}, and a robot arm."


# ---- questions -------------------------------------------------------------------------------------------------------


def _write_questions(trace: EpisodeTrace, rng: np.random.Generator) -> list[dict[str, Any]]:
    questions: list[dict[str, Any]] = []

    def ask(question: str, answer: str, kind: str, evidence: dict[str, Any]) -> None:
        questions.append({"question": question, "answer": answer, "kind": kind, "evidence": evidence})

    events = events_of(trace)
    _ask_about_scene(trace, ask)
    if trace.first is not None:
        _ask_about_sides(trace, trace.first, ask)
    if events.lift is not None and events.grip is not None:
        _ask_about_motion(trace, events, rng, ask)
    return questions


def _ask_about_scene(trace: EpisodeTrace, ask: Ask) -> None:
    layout = trace.layout
    sights = [s for s in (trace.first, trace.last) if s is not None]
    visible = {p.name for p in layout.placed if any(s.shows(p.name) for s in sights)}
    if len(visible) == len(layout.placed):
        by_shape = Counter(p.shape for p in layout.placed)
        if trace.task.name == "reach":
            by_shape["ball"] += 1  # the ball to reach counts too
        elif trace.task.name == "stack":
            del by_shape["cube"]  # the lower block is not in `placed`, but looks like a cube
        for shape, count in sorted(by_shape.items()):
            evidence = {"objects": [[p.colour, p.shape] for p in layout.placed]}
            ask(f"How many {shape}s are there?", str(count), "count", evidence)
    for p in layout.placed:
        if p.name not in visible:
            continue
        if trace.task.varied_shapes:
            ask(f"What shape is the {p.colour} object?", p.shape, "shape", {"object": p.name, "shape": p.shape})
        if p.digit is not None:
            question = f"Which digit is printed on the {p.colour} cube?"
            ask(question, str(p.digit), "digit", {"object": p.name, "digit": p.digit})
    if _goal_noun(trace) and any(s.shows("goal") for s in sights):
        question = f"What colour is the {_goal_noun(trace)}{' on the post' if trace.task.name == 'reach' else ''}?"
        ask(question, layout.goal_colour, "goal_colour", {"goal_colour": layout.goal_colour})


def _ask_about_sides(trace: EpisodeTrace, sight: Sight, ask: Ask) -> None:
    layout = trace.layout
    thing = _object_phrase(trace)
    if _goal_noun(trace) and (side := _relative_side(sight, "object", "goal")):
        question = f"At the start, is {thing} left or right of {_goal_phrase(trace)}?"
        pixels = {n: [round(v, 1) for v in sight.centres[n]] for n in ("object", "goal")}
        ask(question, side, "side_of_goal", {"pixels": pixels})
    for d in layout.distractors:
        if side := _relative_side(sight, d.name, "object"):
            question = f"At the start, is the {d.colour} {d.shape} left or right of {thing}?"
            pixels = {n: [round(v, 1) for v in sight.centres[n]] for n in (d.name, "object")}
            ask(question, side, "side_of_object", {"pixels": pixels})
    if _goal_noun(trace) in ("bowl", "block") and len(layout.placed) > 1:
        gaps = sorted((float(np.hypot(*(p.position[:2] - layout.goal[:2]))), p.colour) for p in layout.placed)
        if gaps[1][0] - gaps[0][0] > NEAREST_MARGIN and all(sight.shows(p.name) for p in layout.placed):
            question = f"At the start, what colour is the object nearest to {_goal_phrase(trace)}?"
            ask(question, gaps[0][1], "nearest", {"distance_m": {c: round(g, 3) for g, c in gaps}})


def _ask_about_motion(trace: EpisodeTrace, events: Events, rng: np.random.Generator, ask: Ask) -> None:
    layout, thing = trace.layout, _object_phrase(trace)
    assert events.grip is not None
    assert events.lift is not None
    travel = round(float(np.linalg.norm(trace.object_positions[-1] - trace.object_positions[0])), 3)
    travels = {
        d.colour: round(float(np.linalg.norm(trace.final_positions[d.name][:2] - d.position[:2])), 3)
        for d in layout.distractors
        if d.name in trace.final_positions
    }
    if all(distance < 0.01 for distance in travels.values()):  # pushed distractors would make the question ambiguous
        evidence = {"moved_m": {layout.object.colour: travel, **travels}}
        ask("What colour is the object that the arm moves?", layout.object.colour, "moved_colour", evidence)
        for d in layout.distractors[:1]:
            ask(f"Is the {d.colour} {d.shape} moved?", "no", "moved", evidence)
            ask(f"Is {thing} moved?", "yes", "moved", evidence)
    if place := _describe_end_place(trace):
        final = [round(float(v), 3) for v in trace.object_positions[-1]]
        ask(f"Where is {thing} at the end?", place, "final_place", {"position_m": final, "success": trace.success})
    last_held = events.release if events.release is not None else events.end + 1
    margin = round(MOMENT_MARGIN_S * trace.hz)
    held_frames = list(range(events.grip + margin, last_held - margin))
    free_frames = [*range(0, events.grip - margin), *range(last_held + margin, events.end)]
    for frames, answer in ((held_frames, "yes"), (free_frames, "no")):
        if frames:
            frame = frames[int(rng.integers(len(frames)))]
            question = f"Is {thing} in the gripper after {frame / trace.hz:.1f} seconds?"
            ask(question, answer, "held_at", {"held": trace.held[frame], "demo_frame": frame})
    middle = events.end / 2
    if abs(events.lift - middle) > 0.1 * events.end:
        half = "first" if events.lift < middle else "second"
        frames_of = {"lift_frame": events.lift, "frames": events.end + 1}
        ask(f"Is {thing} lifted in the first or the second half of the video?", half, "when_lifted", frames_of)
    if events.release is not None:
        held_s = (events.release - events.grip) / trace.hz
        if abs(held_s % 1 - 0.5) > 0.2:  # not close to the middle between two answers
            question = f"For about how many whole seconds is {thing} in the gripper?"
            ask(question, str(round(held_s)), "how_long", {"held_s": round(held_s, 2)})

"""Readers of local copies of Video-MME, MLVU and MVBench: multiple-choice questions about videos.

Each reads the folder as downloaded from the Hugging Face hub, with the videos unpacked anywhere below it.
"""

from __future__ import annotations

import filecmp
import logging
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import convert_errors
from keygrip.data.parquet_tables import column_types, read_table
from keygrip.data.source_files import everything_below, files_in, is_hidden
from keygrip.data.untrusted_files import read_json

log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")
# Folders of MVBench's videos, by question file, because the same name occurs in several of its sources.
MVBENCH_FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "object_interaction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "counterfactual_inference": "clevrer/video_validation",
    "object_shuffle": "perception/videos",
    "action_count": "perception/videos",
    "state_change": "perception/videos",
    "character_order": "perception/videos",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
}
VIDEO_MME_COLUMNS = ("videoID", "question", "options", "answer", "duration")
VIDEO_MME_GROUPS = ("domain", "sub_category", "task_type")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with options, one of which is correct.

    Attributes:
        video: file or folder of frames. question, options: without letters. answer: index of the correct option.
        task: the set's own category; figures are reported by task, and averaged over tasks.
        clip: seconds of the video that the question is about; None: the whole video.
        groups: further categories that the set's own script reports ("domain/Knowledge").
        middles: the set's own script samples the middles of equal parts also for whole videos that are longer.
    """

    video: Path
    question: str
    options: tuple[str, ...]
    answer: int
    task: str
    clip: tuple[float, float] | None = None
    groups: tuple[str, ...] = ()
    middles: bool = False

    @property
    def letters(self) -> list[str]:
        """One letter for each option, which the prompt asks for."""
        return [chr(ord("A") + number) for number in range(len(self.options))]

    @property
    def prompt(self) -> str:
        """The question with lettered options, as given to the model."""
        lettered = [f"{letter}. {option}" for letter, option in zip(self.letters, self.options, strict=True)]
        return "\n".join([self.question, *lettered, "Answer with the option's letter."])


@dataclass(frozen=True)
class Benchmark:
    """A local copy of a benchmark.

    Attributes:
        questions: those with a video. without_video: number of questions whose video is missing. unscored: number of
            further questions whose answer is missing or not one of their candidates. open_ended: number of entries
            without candidates, which need a free-form answer, such as MLVU's generation tasks.
    """

    questions: list[ChoiceQuestion]
    without_video: int
    unscored: int = 0
    open_ended: int = 0


@dataclass(frozen=True)
class Unscored:
    """An entry whose correct option is unknown, and the reason."""

    reason: str


@dataclass(frozen=True)
class OpenEnded:
    """An entry without candidates, and its location."""

    where: str


# The result of an entry: a question, the name of a missing video, or why it has no choice that can be scored.
Entry = ChoiceQuestion | str | Unscored | OpenEnded


def read_benchmark(name: str, root: str | Path) -> Benchmark:
    """Read the questions of a benchmark. Questions whose video is missing, whose answer is none of their candidates, or
    that have no candidates are counted and named in the log.

    Raises:
        FileNotFoundError: There are no question files, or none of the videos. ValueError: The benchmark is unknown,
            entries have another form, or most of them have no answer among their candidates.
    """
    if name not in READERS:
        raise ValueError(f"benchmark={name!r}: known are {', '.join(READERS)}")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give the local copy of {name}")
    entries = list(READERS[name](root))
    questions = [question for question in entries if isinstance(question, ChoiceQuestion)]
    missing_videos = [video for video in entries if isinstance(video, str)]
    unscored = [entry.reason for entry in entries if isinstance(entry, Unscored)]
    open_ended = [entry.where for entry in entries if isinstance(entry, OpenEnded)]
    if len(unscored) > len(questions):
        raise ValueError(
            f"{name}: {len(unscored)} of {len(unscored) + len(questions)} questions whose videos are there cannot be "
            f"scored; the first: {unscored[0]}"
        )
    if open_ended and not questions and not missing_videos:
        raise ValueError(
            f"{name}: all {len(open_ended)} questions are to be answered in words; choices alone are scored"
        )
    if not questions:
        raise FileNotFoundError(f"none of the videos of {name} lies below {root}: unpack them there")
    if missing_videos:
        log.warning(
            "%s: %d of %d questions are left out, whose videos are not below %s; the first: %s",
            name,
            len(missing_videos),
            len(entries),
            root,
            missing_videos[0],
        )
    if unscored:
        log.warning(
            "%s: %d questions are left out, which cannot be scored; the first: %s", name, len(unscored), unscored[0]
        )
    if open_ended:
        log.warning(
            "%s: %d questions are left out, which have no candidates; the first: %s",
            name,
            len(open_ended),
            open_ended[0],
        )
    return Benchmark(questions, len(missing_videos), len(unscored), len(open_ended))


def _read_video_mme(root: Path) -> Iterator[Entry]:
    """Read Parquet files with `videoID`, `question`, `options` (["A. ...", ...]), `answer` ("A"), `duration`, and
    perhaps `domain`, `sub_category`, `task_type`. Entries that another file also has are left out."""
    files = [file for file in files_in(root, ".parquet", below=True) if _holds_questions(file)]
    if not files:
        raise FileNotFoundError(f"{root} holds no parquet file with the questions of Video-MME")
    videos, first_files, repeated = Videos(root), dict[Any, Path](), Counter[Path]()
    for file in files:
        with convert_errors(file):
            entries = read_table(file).to_pylist()
        for entry in entries:
            with _name_entry(file, entry):
                options = _remove_letters(_parse_options(entry["options"]))
                video = videos.find(entry["videoID"], "data")
                if first_files.setdefault((entry["videoID"], entry["question"].strip(), options), file) != file:
                    repeated[file] += 1
                    continue
                if video is None:
                    yield str(entry["videoID"])
                    continue
                letter = re.match(r"\W*([A-Za-z])\b", str(entry["answer"] or ""))
                answer = ord(letter.group(1).upper()) - ord("A") if letter else None
                if answer is None or answer >= len(options) or len(options) < 2:
                    yield _describe_unscored(file, entry, options)
                    continue
                groups = tuple(f"{name}/{entry[name]}" for name in VIDEO_MME_GROUPS if entry.get(name))
                yield _build_question(video, entry["question"], options, answer, entry["duration"], groups=groups)
    _warn_of_repeated(repeated)


def _holds_questions(file: Path) -> bool:
    """Return whether a parquet file holds Video-MME questions. Raises ValueError if columns are missing."""
    columns = [*column_types(file)]
    missing_columns = [name for name in VIDEO_MME_COLUMNS if name not in columns]
    if "question" in missing_columns and "options" in missing_columns:
        log.warning("%s is left out: no questions of Video-MME, its columns are %.200s", file, ", ".join(columns))
        return False
    if missing_columns:
        raise ValueError(f"{file}: of the columns of Video-MME's questions it lacks {', '.join(missing_columns)}")
    return True


def _remove_letters(options: tuple[str, ...]) -> tuple[str, ...]:
    """Remove the letters from options if all have their own letter ("A. red", "B. blue")."""
    labels = [re.match(rf"\s*\(?{chr(ord('A') + index)}[.):]\s*", option) for index, option in enumerate(options)]
    lettered = None not in labels
    return tuple(
        (option[label.end() :] if lettered and label else option).strip()
        for option, label in zip(options, labels, strict=True)
    )


def _read_candidates(root: Path) -> Iterator[Entry]:
    """Read JSON lists, a task per file, of `video`, `question`, `candidates` and `answer` (the words of one candidate),
    and perhaps `start` and `end`. Entries that another file also has are left out: besides the folder with a list per
    task, which is read first, some copies have a list of all tasks, or a list without answers, which is read last."""
    files = sorted(files_in(root, ".json", below=True), key=lambda file: (-len(file.parts), file))
    if not files:
        raise FileNotFoundError(f"{root} holds no .json files with questions")
    entries: list[tuple[Path, dict[str, Any]]] = []
    videos, first_files, repeated = Videos(root), dict[Any, Path](), Counter[Path]()
    for file in files:
        content = read_json(file)
        listed = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
        entries += [(file, entry) for entry in listed if "candidates" in entry]
        for entry in listed:
            if "candidates" not in entry and "question" in entry:
                open_key = (Path(str(entry.get("video"))).name, str(entry["question"]).strip())
                if first_files.setdefault(open_key, file) != file:
                    repeated[file] += 1
                    continue
                yield OpenEnded(f"{file}: {str(entry['question'])[:60]!r}")
    entries.sort(key=lambda entry: "answer" not in entry[1])
    for file, entry in entries:
        with _name_entry(file, entry):
            options = _parse_options(entry["candidates"])
            name, clip = str(entry["video"]), _parse_clip(entry)
            question_key = (Path(name).name, clip, entry["question"].strip(), options)
            try:
                video = _find_candidates_video(videos, file, entry)
            except ValueError:
                earlier_file = first_files.get(question_key)
                if earlier_file is None or len(earlier_file.parts) <= len(file.parts):
                    raise
                repeated[file] += 1  # in the list of all tasks, two videos of the same name cannot be distinguished
                continue
            if video is not None and clip is not None and _holds_only_clip(video, clip):
                clip = None
            if first_files.setdefault((video or name, clip, entry["question"].strip(), options), file) != file:
                repeated[file] += 1
                continue
            first_files.setdefault(question_key, file)
            if video is None:
                yield name
                continue
            answer = _find_answer(entry.get("answer"), options)
            if answer is None or len(options) < 2:
                yield _describe_unscored(file, entry, options)
                continue
            task = str(entry.get("question_type") or file.stem)
            yield _build_question(video, entry["question"], options, answer, task, clip)
    _warn_of_repeated(repeated)


def _find_candidates_video(videos: Videos, file: Path, entry: Mapping[str, Any]) -> Path | None:
    """Return the video of an entry, or the file with only the clip that the entry is about, if only that exists."""
    name, folder = str(entry["video"]), MVBENCH_FOLDERS.get(file.stem, file.stem)
    video = videos.find(name, folder)
    if video is None and _parse_clip(entry) is not None:
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEOS else name
        video = videos.find(f"{stem}_{entry['start']}_{entry['end']}.mp4", folder)
    return video


def _describe_unscored(file: Path, entry: Mapping[str, Any], options: tuple[str, ...]) -> Unscored:
    text = repr(entry["answer"])[:60] if entry.get("answer") is not None else "not said"
    return Unscored(
        f"{file}: of the entry {str(entry['question'])[:60]!r} the answer is {text}, and not one of its {len(options)} "
        "candidates"
        if len(options) > 1
        else f"{file}: the entry {str(entry['question'])[:60]!r} has {len(options)} candidates to choose from"
    )


def _warn_of_repeated(repeated: Counter[Path]) -> None:
    for file, count in repeated.items():
        log.warning("%s: %d questions are left out, which another file has", file, count)


def _find_answer(answer: Any, options: tuple[str, ...]) -> int | None:
    """Return the option that equals an answer. Of equal options the last is used, as in MVBench's own script. If none
    is exactly equal, use the option that differs only in case, white space or full stops. None: none, or several."""
    if answer is None:
        return None

    def plain(text: str) -> str:
        return " ".join(text.split()).rstrip(". ").casefold()

    answer_text = str(answer)
    if answer_text in options:
        return len(options) - 1 - options[::-1].index(answer_text)
    equal = [index for index, option in enumerate(options) if plain(option) == plain(answer_text)]
    return equal[0] if len(equal) == 1 else None


def _parse_options(candidates: Any) -> tuple[str, ...]:
    """Convert candidates to texts. Raises ValueError if they are not a list of texts and numbers."""
    if not isinstance(candidates, list) or not all(isinstance(option, str | int | float) for option in candidates):
        raise ValueError(f"its candidates {str(candidates)[:80]} are no list of texts")
    return tuple(str(option) for option in candidates)


def _read_mvbench(root: Path) -> Iterator[Entry]:
    """As `_read_candidates`; MVBench's script samples the frames of whole videos like those of clips."""
    for entry in _read_candidates(root):
        yield replace(entry, middles=True) if isinstance(entry, ChoiceQuestion) else entry


READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    "video_mme": _read_video_mme,
    "mlvu": _read_candidates,
    "mvbench": _read_mvbench,
}


def _parse_clip(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return `start` and `end` of an entry, seconds. Some of MVBench's are reversed or a single moment; its script then
    shows the frames between them. Raises ValueError if one is missing or not a number."""
    start, end = entry.get("start"), entry.get("end")
    if start is None and end is None:
        return None
    if start is None or end is None or not (math.isfinite(float(start)) and math.isfinite(float(end))):
        raise ValueError(f"its clip from {start} to {end} is none")
    first, last = sorted((max(float(start), 0.0), max(float(end), 0.0)))
    return first, last


def _holds_only_clip(video: Path, clip: tuple[float, float]) -> bool:
    """Return whether a file holds only the clip: MVBench's copies for lmms-eval are named NAME_START_END.mp4."""
    try:
        start, end = (float(part) for part in video.stem.rsplit("_", 2)[-2:])
    except ValueError:
        return False
    return math.isclose(start, clip[0], abs_tol=1e-6) and math.isclose(end, clip[1], abs_tol=1e-6)


def _build_question(
    video: Path,
    question: str,
    options: tuple[str, ...],
    answer: int,
    task: str,
    clip: tuple[float, float] | None = None,
    groups: tuple[str, ...] = (),
) -> ChoiceQuestion:
    if not 0 <= answer < len(options) or len(options) < 2:
        raise ValueError(f"answer {answer} of {len(options)} options")
    if len(options) > len(string.ascii_uppercase):
        raise ValueError(f"{len(options)} options: there are letters for {len(string.ascii_uppercase)}")
    return ChoiceQuestion(video, question.strip(), options, answer, task, clip, groups)


class _name_entry:
    """Add the file and the question to the error of an entry that does not have the set's form."""

    def __init__(self, file: Path, entry: Mapping[str, Any]) -> None:
        self.file, self.entry = file, entry

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyError | ValueError | TypeError | AttributeError | IndexError):
            asked = str(self.entry.get("question", ""))[:60]
            raise ValueError(f"{self.file}: the entry {asked!r} is not of the known form ({error})") from error


def _is_same_file(one: Path, other: Path) -> bool:
    """Return whether two paths are one file, or files with the same content."""
    return one == other or (one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False))


class Videos:
    """Find video files and folders of frames below a folder by the name in a question. Copies of a file count as one
    (MVBench's archives hold some files twice)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[Path]] = {}
        folders: dict[Path, None] = {}
        for path in everything_below(root):
            if is_hidden(path):
                continue
            if path.suffix.lower() in VIDEOS:
                for name in (path.name, path.stem):
                    self._by_name.setdefault(name, []).append(path)
            elif path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                folders[path.parent] = None
        for folder in folders:
            self._by_name.setdefault(folder.name, []).append(folder)

    def find(self, name: str, folder: str) -> Path | None:
        """Return the video with a name; None if it does not exist.

        Args:
            name: a path, whose folders must be the last ones of the video's path, or a file name. Another video
                extension, or none, is the same video; an extension of another kind is part of the name.
            folder: part of a path that selects the video if the name occurs in several places. If it is one of
                MVBench's folders, a video in another of these folders is a different video.

        Raises:
            ValueError: The name occurs in several places and cannot be resolved.
        """
        relative = Path(name)
        stem = relative.with_suffix("") if relative.suffix.lower() in VIDEOS else relative
        for file_name in (relative.name, stem.name):
            matches = [
                path
                for path in self._by_name.get(file_name, [])
                if (self._ends(path, relative) or self._ends(path, stem))
                and not self._lies_in_another_folder(path, folder)
            ]
            for selected in ([path for path in matches if self._lies_in(path, folder)], matches):
                if selected and all(_is_same_file(selected[0], other) for other in selected[1:]):
                    return selected[0]
            if matches:
                raise ValueError(
                    f"{name!r} may be {matches[0]} or {matches[1]}: remove the one that does not belong to the set"
                )
        return None

    def _ends(self, path: Path, ending: Path) -> bool:
        """Return whether a path, with or without its extension, ends with another path."""
        stem = path.with_suffix("") if path.suffix.lower() in VIDEOS else path
        return any(f"/{each.as_posix()}".endswith(f"/{ending.as_posix()}") for each in (path, stem))

    def _lies_in(self, path: Path, folder: str) -> bool:
        return f"/{folder}/" in f"/{path.relative_to(self.root).as_posix()}"

    def _lies_in_another_folder(self, path: Path, folder: str) -> bool:
        """Return whether a video is in one of MVBench's folders, but not in the one of the question."""
        known = set(MVBENCH_FOLDERS.values())
        if folder not in known or self._lies_in(path, folder):
            return False
        return any(self._lies_in(path, other) for other in known)

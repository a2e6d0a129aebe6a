"""Readers of local copies of Video-MME, MLVU and MVBench: multiple-choice questions about videos.

Each takes the folder as downloaded from the Hugging Face hub, with the videos unpacked anywhere below it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with options, one of them right.

    Attributes:
        video: file or folder of frames. question, options: without letters. answer: index of the right option.
        task: the set's own category; figures are kept apart by it.
    """

    video: Path
    question: str
    options: tuple[str, ...]
    answer: int
    task: str

    @property
    def prompt(self) -> str:
        """The question with lettered options, as the model is asked."""
        lettered = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(self.options)]
        return "\n".join([self.question, *lettered, "Answer with the option's letter."])


def read_benchmark(name: str, root: str | Path) -> list[ChoiceQuestion]:
    """The questions of a benchmark whose video is there.

    Raises:
        FileNotFoundError: no question files, or none of the videos. ValueError: an unknown benchmark, or entries of
            another form.
    """
    if name not in READERS:
        raise ValueError(f"benchmark={name!r}: known are {', '.join(READERS)}")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give the local copy of {name}")
    questions = list(READERS[name](root))
    if not questions:
        raise FileNotFoundError(f"none of the videos of {name} lies below {root}: unpack them there")
    return questions


def _video_mme(root: Path) -> Iterator[ChoiceQuestion]:
    """Parquet with `videoID`, `question`, `options` (["A. ...", ...]), `answer` ("A"), `duration`, `task_type`."""
    import pyarrow.parquet

    files = sorted(root.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root} holds no parquet file with the questions of Video-MME")
    videos = _videos(root)
    for file in files:
        for entry in pyarrow.parquet.read_table(file).to_pylist():
            with _named(file, entry):
                options = tuple(re.sub(r"^\s*[A-Z][.)]\s*", "", option).strip() for option in entry["options"])
                video = videos.get(entry["videoID"])
                if video is not None:
                    answer = ord(entry["answer"].strip()[0].upper()) - ord("A")
                    yield _question(video, entry["question"], options, answer, entry["duration"])


def _candidates(root: Path) -> Iterator[ChoiceQuestion]:
    """JSON lists, a task a file, of `video`, `question`, `candidates` and `answer` (the words of one candidate)."""
    files = [file for file in sorted(root.rglob("*.json")) if not file.name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"{root} holds no .json files with questions")
    videos = _videos(root)
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            continue
        for entry in content:
            if not isinstance(entry, dict) or "candidates" not in entry:
                continue  # MLVU's open questions
            with _named(file, entry):
                options = tuple(str(option) for option in entry["candidates"])
                video = videos.get(Path(entry["video"]).stem) or videos.get(entry["video"])
                if video is not None:
                    task = str(entry.get("question_type") or file.stem)
                    yield _question(video, entry["question"], options, options.index(str(entry["answer"])), task)


READERS: dict[str, Callable[[Path], Iterator[ChoiceQuestion]]] = {
    "video_mme": _video_mme,
    "mlvu": _candidates,
    "mvbench": _candidates,
}


def _question(video: Path, question: str, options: tuple[str, ...], answer: int, task: str) -> ChoiceQuestion:
    if not 0 <= answer < len(options) or len(options) < 2:
        raise ValueError(f"answer {answer} of {len(options)} options")
    return ChoiceQuestion(video, question.strip(), options, answer, task)


class _named:
    """Names the file and the question of an entry that does not have the set's form."""

    def __init__(self, file: Path, entry: Mapping[str, Any]) -> None:
        self.file, self.entry = file, entry

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyError | ValueError | TypeError | AttributeError | IndexError):
            asked = str(self.entry.get("question", ""))[:60]
            raise ValueError(f"{self.file}: the entry {asked!r} is not of the known form ({error})") from error


def _videos(root: Path) -> dict[str, Path]:
    """Video files below a folder by their name without suffix, and folders of frames by their name."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in VIDEOS:
            found.setdefault(path.stem, path)
        elif path.suffix.lower() in (".jpg", ".png"):
            found.setdefault(path.parent.name, path.parent)
    return found

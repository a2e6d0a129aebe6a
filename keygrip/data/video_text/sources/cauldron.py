"""The Cauldron: instructions about images, fifty collections in one format. Reads the published parquet files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.shards.set_writer import Broken, MadeSample, write_shards
from keygrip.data.untrusted_files import open_image
from keygrip.data.video_text.conversations import (
    DECODING,
    MAX_FRAMES,
    describe_video_text,
    encode_jpeg,
    shard_frame_settings,
    shown_image,
    video_text_parts,
)
from keygrip.data.video_text.sample_types import Conversation, Turn
from keygrip.data.video_text.sources.tables import RowGroup, row_groups

# Collections with short answers in words, also yes and no, which the VQA rule can score. Collections whose answers are
# letters of options ("Answer: B") are not included: ai2d, iconqa, intergps, raven, scienceqa, tqa, visual7w.
VQA = frozenset(
    {"vqav2", "okvqa", "textvqa", "st_vqa", "docvqa", "infographic_vqa", "ocrvqa", "vqarad", "tallyqa", "cocoqa"}
    | {"clevr", "chartqa", "figureqa", "dvqa", "plotqa", "vsr", "nlvr2", "hateful_memes"}
)
SCORED = 2  # version of that list, a setting of a set: shards of other versions have different `answers`
# Collections whose questions continue from earlier answers.
SEQUENTIAL = frozenset({"robut_sqa"})


@dataclass(frozen=True)
class CauldronMaker:
    """Makes samples from the rows of a group: each image is a frame, each question-answer pair a conversation, so that
    the queries depend on one question and no answer precedes another question. In `SEQUENTIAL` collections all pairs of
    a row are one conversation."""

    image_size: int
    fit: str
    max_frames: int
    source: Path

    def __call__(self, group: RowGroup) -> Iterable[MadeSample | Broken]:
        for index, row in group.rows(["images", "texts"]):
            key = f"{group.name}-{index:08d}"
            try:
                with convert_errors(key):
                    sample = self._sample(key, _collection_name(group, self.source), row)
            except BadSample as error:
                yield Broken(str(error))
            else:
                yield sample

    def _sample(self, key: str, collection: str, row: dict[str, Any]) -> MadeSample:
        images = row["images"] or []
        if not images:
            raise ValueError("it has no images")
        if len(images) > self.max_frames:
            raise ValueError(f"{len(images)} images are more than max_frames={self.max_frames}")
        frames = [self._image(image["bytes"]) for image in images]
        pairs = [
            (Turn("user", text["user"].strip()), Turn("assistant", text["assistant"].strip())) for text in row["texts"]
        ]
        if not pairs:
            raise ValueError("it has no text")
        turn_groups: list[tuple[Turn, ...]] = [tuple(itertools.chain(*pairs))] if collection in SEQUENTIAL else [*pairs]
        conversations = [
            Conversation(turns, "image_instruction", _make_evidence(collection, turns)) for turns in turn_groups
        ]
        fps = None if len(frames) > 1 else 1.0  # several images have no common time
        return MadeSample(key, *video_text_parts(frames, conversations, "cauldron", fps))

    def _image(self, content: bytes | None) -> bytes:
        if not content:
            raise ValueError("an image is empty")
        with open_image(content) as image:
            return encode_jpeg(shown_image(image, self.image_size, self.fit))


def _make_evidence(collection: str, turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the evidence; in collections that the VQA rule can score, it includes the reference answer."""
    answers = {"answers": [turns[-1].text]} if collection in VQA else {}
    return {"collection": collection, **answers}


def _collection_name(group: RowGroup, source: Path) -> str:
    """Return the name of a collection: its folder below `source`, or `source` itself if the tables are there."""
    folders = group.path.relative_to(source).parent.parts
    return folders[0] if folders else source.absolute().name


def cauldron(
    source: Path | str,
    root: Path | str,
    collections: Sequence[str] | None = None,
    image_size: int = 224,
    fit: str = "pad",
    groups_per_shard: int = 10,
    processes: int | None = None,
    max_frames: int = MAX_FRAMES,
    max_failed_share: float = 0.5,
) -> dict[str, Any]:
    """Write the Cauldron as shards of 1-frame samples (one frame per image if there are several), each with the
    conversations about its image (`CauldronMaker`).

    Args:
        source: folder with one subfolder per collection, each with `train-*.parquet`; or the folder of one collection.
            root: of the set. collections: names of the subfolders; None: all.
        image_size, fit: of the images. max_frames: rows with more images are left out and named in the log.
        max_failed_share: a larger share of broken or left-out rows is an error.

    Raises:
        FileNotFoundError: there are no tables, or none of a named collection. ValueError: max_frames is out of range.
    """
    dataset = "the Cauldron (HuggingFaceM4/the_cauldron)"
    source = Path(source)
    groups = row_groups(source, "train-*.parquet", ["images", "texts"], dataset)
    if collections is not None:
        present = {_collection_name(group, source) for group in groups}
        for name in collections:
            if name not in present:
                raise FileNotFoundError(f"no collection {name!r} in {source}; there are {', '.join(sorted(present))}")
        groups = [group for group in groups if _collection_name(group, source) in collections]
    settings = {"data": "cauldron", "collections": collections, "conversations": "pairs", "decoding": DECODING}
    settings |= {"scored": SCORED}
    settings |= shard_frame_settings(image_size, fit, max_frames)
    maker = CauldronMaker(image_size, fit, max_frames, source)
    return write_shards(
        root,
        groups,
        maker,
        settings,
        groups_per_shard,
        "cauldron",
        processes,
        max_failed_share,
        describe=describe_video_text,
    ).report()

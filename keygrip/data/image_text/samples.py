"""The contents of shards of images with text, the training data of the patch-conditioned DiT.

Parts of a sample: "dinov3.npy" [D], "dinov3_patches.npy" [gh * gw, D], "vae.npy" [C, h, w], "t5h.npy" [L, Dt],
"t5m.npy" [L] and "json" with `caption`, `size` (width and height of the source image), `crop` (the box in the source
image that latent and DINO view both show), `patch_grid` [gh, gw] and optionally `evidence`. Half precision is enough
for all arrays. Text states may end with the last token (fewer than L rows); the missing rows are padding. An image with
several captions has all of them as `captions` in its json, and the states and masks of the second and further captions
as "t5h_1.npy", "t5m_1.npy", "t5h_2.npy" and so on. The optional "image.png" contains the image's pixels for evaluation:
an autoencoder does not reconstruct them exactly.

Columns: sizes of all parts, 0 for a missing part, so that missing parts are known without opening the shards.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from keygrip.data.bad_samples import BadSample, convert_errors
from keygrip.data.shards.index import Parts, Row, lower_case
from keygrip.data.shards.reader import ShardSet
from keygrip.data.untrusted_files import npy_header, open_image, parse_json, parse_npy

CLS, PATCHES, LATENT, TEXT, TEXT_MASK, RECORD = (
    "dinov3.npy",
    "dinov3_patches.npy",
    "vae.npy",
    "t5h.npy",
    "t5m.npy",
    "json",
)
NEEDED = (CLS, PATCHES, LATENT, TEXT, TEXT_MASK, RECORD)
IMAGE = "image.png"
MORE_TEXT = re.compile(r"^t5[hm]_[1-9]\d*\.npy$")


@dataclass(frozen=True)
class ImageTextSample:
    """One image with its text; see :class:`keygrip.data.batches.ImageTextBatch` for the shapes, here without B. `image`
    is uint8 [H, W, 3], if it was requested and the shard contains it. `number` is its place in its split, if any."""

    latent: np.ndarray
    text_states: np.ndarray
    text_mask: np.ndarray
    dino_cls: np.ndarray
    dino_patches: np.ndarray
    patch_grid: tuple[int, int]
    record: dict[str, Any]
    key: str
    image: np.ndarray | None = None
    number: int = 0


def text_names(number: int) -> tuple[str, str]:
    """Return the part names of the text states and the mask of a caption by its number, counted from 0."""
    return (TEXT, TEXT_MASK) if number == 0 else (f"t5h_{number}.npy", f"t5m_{number}.npy")


def is_image_text(names: Any) -> bool:
    """Whether parts with these names belong to an image with text."""
    return bool({CLS, PATCHES, LATENT, TEXT, TEXT_MASK} & set(names))


# ---- writing ---------------------------------------------------------------------------------------------------------


def image_text_parts(
    latent: np.ndarray,
    text_states: np.ndarray,
    text_mask: np.ndarray,
    dino_cls: np.ndarray,
    dino_patches: np.ndarray,
    record: Mapping[str, Any],
    trim_text: bool = False,
    more_text: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    image: np.ndarray | None = None,
) -> tuple[Parts, Row]:
    """Create the parts and columns of a sample.

    Args:
        record: content of "json"; requires `caption` and `patch_grid`, and `captions` if there are several.
        trim_text: leave out the text states of padding.
        more_text: states and masks of the second and further captions. image: uint8 [H, W, 3], stored too if given.

    Raises:
        ValueError: values are not finite in half precision, or shapes do not belong together.
    """
    arrays = {CLS: dino_cls, PATCHES: dino_patches, LATENT: latent}
    masks = {}
    for index, (states, mask) in enumerate(((text_states, text_mask), *more_text)):
        tokens = int(mask.sum())
        if not mask[:tokens].all():
            raise ValueError("padding stands between the tokens of the caption")
        states_name, mask_name = text_names(index)
        arrays[states_name], masks[mask_name] = states[:tokens] if trim_text else states, mask
    parts = {}
    for name, values in arrays.items():
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"{name} holds numbers that are not finite in half precision")
        parts[name] = npy_bytes(half)
    parts |= {name: npy_bytes(mask.astype(np.uint8)) for name, mask in masks.items()}
    parts[RECORD] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    if image is not None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        parts[IMAGE] = buffer.getvalue()
    return parts, describe_image_text(parts)


def npy_bytes(values: np.ndarray) -> bytes:
    """Return the content of an .npy file with this array."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def describe_image_text(parts: Parts) -> Row:
    """Return the columns of a sample: sizes of its parts, 0 for missing parts.

    Raises:
        ValueError: a part has the wrong number of dimensions.
    """
    dimensions = {LATENT: 3, CLS: 1, PATCHES: 2, TEXT: 2, TEXT_MASK: 1}
    shapes = {
        name: npy_header(parts[name], name)[0] if name in parts else (0,) * count for name, count in dimensions.items()
    }
    for name, count in dimensions.items():
        if len(shapes[name]) != count:
            raise ValueError(f"{name} has the shape {shapes[name]}, not {count} dimensions")
    record = read_record(parts) if RECORD in parts else {}
    rows, columns = grid_of(record, shapes[PATCHES][0]) if PATCHES in parts else (0, 0)
    mask = parse_npy(parts[TEXT_MASK], TEXT_MASK) if TEXT_MASK in parts else np.zeros(0)
    channels, height, width = shapes[LATENT]
    return {
        "latent_channels": channels,
        "latent_height": height,
        "latent_width": width,
        "dino": shapes[CLS][0],
        "patches": shapes[PATCHES][0],
        "grid_height": rows,
        "grid_width": columns,
        "text_dim": shapes[TEXT][1],
        "text_length": shapes[TEXT_MASK][0],
        "text_tokens": int(mask.astype(bool).sum()),
        "caption_length": len(str(record.get("caption", ""))),
    }


def read_record(parts: Parts) -> dict[str, Any]:
    """Parse the sample's json. Raise BadSample if it is not an object, or its captions are not text."""
    record = parse_json(parts[RECORD], RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("caption", ""), str):
        raise BadSample(RECORD, "it is not an object, or its caption is not text")
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample(RECORD, "its captions are not a list of texts")
    return record


def grid_of(record: Mapping[str, Any], patches: int) -> tuple[int, int]:
    """Return the patch grid (gh, gw) of a sample: from its record, or a square if the record has none.

    Raises:
        ValueError: the grid does not fit the number of patches.
    """
    if "patch_grid" in record:
        rows, columns = record["patch_grid"]
        if not (isinstance(rows, int) and isinstance(columns, int) and min(rows, columns) >= 0):
            raise ValueError(f"its patch_grid {rows!r}, {columns!r} is not two numbers of patches")
    else:
        rows = columns = math.isqrt(patches)
    if rows * columns != patches:
        raise ValueError(f"{patches} patches do not make a grid of {rows} x {columns}")
    return rows, columns


# ---- reading ---------------------------------------------------------------------------------------------------------


def missing_parts(row: Mapping[str, Any]) -> list[str]:
    """Return the needed parts that a sample lacks, from its columns."""
    sizes = {LATENT: "latent_channels", CLS: "dino", PATCHES: "patches", TEXT: "text_dim", TEXT_MASK: "text_length"}
    return [name for name, column in sizes.items() if not row[column]]


def captions_of(record: Mapping[str, Any]) -> list[str]:
    """Return all captions in a sample's record, at least one; an empty text if it has none."""
    return list(record.get("captions") or [record.get("caption", "")])


def read_stored_record(shards: ShardSet, sample: int) -> dict[str, Any]:
    """Read the record of a sample alone. Raise BadSample if it is missing or cannot be read."""
    location = shards.where(sample)
    with convert_errors(location):
        parts = lower_case(shards.read(sample, (RECORD,)))
    if RECORD not in parts:
        raise BadSample(f"{location}: it has no {RECORD}")
    with convert_errors(location):
        return read_record(parts)


def read_image_text(shards: ShardSet, sample: int, caption: int = 0, with_image: bool = False) -> ImageTextSample:
    """Read a sample, in float32.

    Args:
        caption: index of the caption, modulo the number of captions; this caption becomes `caption` in the record.
        with_image: also read the image's pixels, if the shard contains them.

    Raises:
        BadSample: a part is missing, cannot be read, contains values that are not finite or has a shape that does not
            fit the others.
    """
    location = shards.where(sample)
    with convert_errors(location):
        parts = lower_case(shards.read(sample, (*NEEDED, IMAGE) if with_image else NEEDED))
    missing = [name for name in NEEDED if name not in parts]
    if missing:
        raise BadSample(f"{location}: it has no {', '.join(missing)}")
    with convert_errors(location):
        record = read_record(parts)
        captions = captions_of(record)
        part_names = {name: name for name in NEEDED}  # parts of a further caption replace those of the first caption
        if caption % len(captions):
            names = text_names(caption % len(captions))
            caption_parts = lower_case(shards.read(sample, names))
            if set(names) - set(caption_parts):
                raise ValueError(f"it has no {', '.join(sorted(set(names) - set(caption_parts)))}")
            parts |= {TEXT: caption_parts[names[0]], TEXT_MASK: caption_parts[names[1]]}
            part_names |= {TEXT: names[0], TEXT_MASK: names[1]}
            record["caption"] = captions[caption % len(captions)]
        arrays = {name: parse_npy(parts[name], part_names[name]) for name in (CLS, PATCHES, LATENT, TEXT, TEXT_MASK)}
        for name, array in arrays.items():
            if array.dtype.kind not in ("biu" if name == TEXT_MASK else "fiu"):
                raise ValueError(f"{part_names[name]} holds {array.dtype}, not numbers")
        mask = arrays[TEXT_MASK].astype(bool)
        with np.errstate(over="ignore"):
            values = {name: arrays[name].astype(np.float32) for name in (CLS, PATCHES, LATENT, TEXT)}
        grid = grid_of(record, len(values[PATCHES]))
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{part_names[name]} holds numbers that are not finite")
        states, tokens = values[TEXT], int(mask.sum())
        if (
            values[CLS].ndim != 1
            or values[PATCHES].shape[1:] != values[CLS].shape
            or values[LATENT].ndim != 3
            or states.ndim != 2
        ):
            shapes = ", ".join(f"{part_names[name]} {list(array.shape)}" for name, array in values.items())
            raise ValueError(f"its parts do not belong together: {shapes}")
        if mask.ndim != 1 or not mask[:tokens].all() or not tokens <= len(states) <= len(mask):
            raise ValueError(
                f"{part_names[TEXT_MASK]} {list(mask.shape)} with {tokens} tokens does not fit {list(states.shape)}"
            )
    image = None
    if IMAGE in parts:
        with open_image(parts[IMAGE], location) as opened:
            image = np.asarray(opened.convert("RGB"))
    if not record.get("caption", "unknown").strip():  # a blank caption counts as none, despite the encoder's end token
        mask, tokens = np.zeros_like(mask), 0
    padded_states = np.zeros((len(mask), states.shape[1]), np.float32)
    padded_states[:tokens] = states[:tokens]  # zeros for padding, whatever values the encoder wrote there
    features = (values[LATENT], padded_states, mask, values[CLS], values[PATCHES])
    return ImageTextSample(*features, grid, record, shards.key(sample), image)

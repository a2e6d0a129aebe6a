"""Captions in the evaluation of images: change a word, and measure how well images match captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keygrip.evaluation.known_features import clip_part, clip_pixels, clip_sha256

WORD = re.compile(r"\w+(?:-\w+)*")


def word_changes(given: Mapping[str, str] | Sequence[Sequence[str]] | None) -> dict[str, str]:
    """Convert `replace_words` to {word: other word}. It is a mapping, or pairs, because a mapping on the command line
    cannot have a word that is a number. None: no words.

    Raises:
        ValueError: An entry is no pair of texts or no single word, or a word occurs twice.
    """
    if given is not None and (isinstance(given, str) or not isinstance(given, Mapping | Sequence)):
        raise ValueError(f"replace_words={given!r}: give pairs, [[WORD,OTHER],...], or a mapping")
    pairs: list[Sequence[str]] = list(given.items() if isinstance(given, Mapping) else given or ())
    replacements: dict[str, str] = {}
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"replace_words holds {pair!r}: give pairs, [[WORD,OTHER],...], or a mapping")
        word, replacement = pair
        if not isinstance(word, str) or not WORD.fullmatch(word):
            raise ValueError(
                f"replace_words: {word!r} is not a single word (a number is one in a pair and in quotes: "
                """'replace_words=[["3",cat]]')"""
            )
        if not isinstance(replacement, str):
            raise ValueError(f"replace_words: {word} would become {replacement!r}, which is no text: put it in quotes")
        if word.lower() in map(str.lower, replacements):
            raise ValueError(f"replace_words names {word!r} twice (upper and lower case are one word)")
        replacements[word] = replacement
    return replacements


def change_note(case: str, changed: int, total: int, words: Mapping[str, str]) -> str:
    """Describe how many of a case's captions were changed; empty if all were changed and no words were given."""
    if not words and changed == total:
        return ""
    what = "a word of replace_words" if words else "the colour that the image's evidence says"
    return f"{case}: {changed} of {total} captions hold {what}"


def change_caption(
    caption: str, record: Mapping[str, Any], number: int, colours: Sequence[str], words: Mapping[str, str]
) -> tuple[str, str | None] | None:
    """Return a caption with a word changed, and the new colour; None if it has no word to change.

    Args:
        number: of the image; selects one of the other colours. colours: all colours. words: word -> other word;
            empty: the colour in the record's evidence is changed.
    """
    if words:
        changed = with_other_words(caption, words)
        return (changed, None) if changed != caption else None
    true_colour = (record.get("evidence") or {}).get("colour")
    other_colours = [colour for colour in colours if colour != true_colour]
    if true_colour is None or not other_colours:
        return None
    new_colour = other_colours[number % len(other_colours)]
    changed = with_other_words(caption, {true_colour: new_colour})
    return (changed, new_colour) if changed != caption else None


def with_other_words(caption: str, words: Mapping[str, str]) -> str:
    """Replace whole words in any case; the new word takes the case of the old one, and punctuation is unchanged."""
    lower = {word.lower(): other for word, other in words.items()}

    def other(match: re.Match[str]) -> str:
        old = match[0]
        new = lower.get(old.lower(), old)
        if new == old or old == old.lower():
            return new
        return new.upper() if old == old.upper() and len(old) > 1 else new[:1].upper() + new[1:]

    return WORD.sub(other, caption)


class ClipSimilarity:
    """Cosine of CLIP's embeddings of images and of their captions (Hessel et al., "CLIPScore", 2021, without its
    factor).

    Args:
        folder: a transformers CLIP with both towers and its tokenizer, e.g. openai/clip-vit-large-patch14.

    Raises:
        FileNotFoundError: The folder does not exist. ValueError: It lacks the text tower or the tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        place = Path(folder)
        self.network, self.tokenizer = clip_part(CLIPModel, place), clip_part(CLIPTokenizer, place)
        self.name = place.name
        self.sha256 = clip_sha256(place)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return ``[N]`` float32 for images ``[B, 3, H, W]`` in 0..1 and their captions; N is the number of images
        whose caption is not blank. Captions are truncated to CLIP's 77 tokens."""
        captioned = [index for index, caption in enumerate(captions) if caption.strip()]
        if not captioned:
            return torch.zeros(0)
        words = self.tokenizer(
            [captions[index] for index in captioned],
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = clip_pixels(images[captioned], self.network.config.vision_config.image_size)
        output = self.network.to(images.device)(**words.to(images.device), pixel_values=pixels)
        return torch.cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).cpu()

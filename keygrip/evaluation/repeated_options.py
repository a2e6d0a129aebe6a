"""Remove a repetition of a question's options from an answer."""

from __future__ import annotations

import re

from keygrip.evaluation.option_texts import Options, literal_text


def remove_repeated_options(text: str, options: Options) -> str:
    """Remove a repetition of the question's options: two or more of them from A on, lettered and in order. The last one
    may be cut off at the end of the text."""
    lines = [line.strip() for line in re.sub(r"[^\w\n]+", " ", text).split("\n") if line.strip()]
    if len(lines) > 1 and "".join(lines) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(lines)] and options.literal[0] != "b":
        return ""
    begin = 0
    while first := re.compile(r"(?<!\w)\(?A[.):]", re.IGNORECASE).search(text, begin):
        end = _find_repetition_end(text, first.start(), options)
        if end is None:
            begin = first.end()
        else:
            text, begin = f"{text[: first.start()]} {text[end:]}", first.start()
    return text.strip()


def _find_repetition_end(text: str, start: int, options: Options) -> int | None:
    """Return the end of a repetition of options that begins at `start`; None if it has fewer than two."""
    end, complete = start, 0
    for index, option in enumerate(options.literal):
        letter = chr(ord("A") + index)
        label = re.compile(rf"\W*(?<!\w)\(?{letter}(?:[.):]\s*|\s*$)", re.IGNORECASE).match(text, end)
        if label is None:
            break
        option_words = r"\s+".join(re.escape(word) for word in option.split())
        words = re.compile(rf"{option_words}(?!\w)", re.IGNORECASE).match(text, label.end())
        if words is None:  # the last option is cut off, or another text follows
            cut = complete > 0 and option.startswith(literal_text(text[label.end() :]))
            return len(text) if cut else end if complete > 1 else None
        end, complete = words.end(), complete + 1
    return end if complete > 1 else None

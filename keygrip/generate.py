"""Answer questions about videos: ``python -m keygrip.generate checkpoint=RUN video=FILE question="..."``.

``conversations=FILE``, a JSON Lines file, is for conversations with images and videos in several turns. The last line
on standard output is JSON: the answers, and the path of the figure with the queries' attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig

from keygrip.command import entry_point, printable_json
from keygrip.config import EntrySchema, register


@dataclass
class GenerateSchema(EntrySchema):
    """Root of ``conf/generate.yaml``."""

    checkpoint: str = MISSING
    seed: int = 0
    checkpoint_step: int | None = None
    trust: Any = ()
    video: Any = MISSING
    question: Any = MISSING
    conversations: str | None = None
    batch_frames: int = 256
    mode: str | None = None
    max_frames: int | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    samples: int | None = None
    dtype: str = "auto"
    figure: str | None = None
    stream: bool = False


register("generate_schema", GenerateSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Answer with the settings of ``cfg``; return the printed result. See :func:`keygrip.inference.answers.answer`."""
    from keygrip.inference.answers import answer

    return answer(cfg)


def print_answers(cfg: DictConfig) -> None:
    """Answer and print the result as one line of JSON."""
    print(printable_json(run(cfg)))


def main() -> None:
    """Command line."""
    entry_point("generate", print_answers)


if __name__ == "__main__":
    main()

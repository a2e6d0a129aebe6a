"""Figures of frames with the answers about them, and each query's attention as a heatmap over its frame."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure

from keygrip.data.batches import VideoTextBatch
from keygrip.data.spacing import evenly
from keygrip.models.foveated_vlm.attention_maps import patch_maps
from keygrip.models.foveated_vlm.conversations import EncodedText
from keygrip.models.foveated_vlm.generation import check_room, generate
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.foveated_vlm.video_language import VLMOutput
from keygrip.training.figures import drawable, figure_to_image, printable

if TYPE_CHECKING:
    from keygrip.models.foveated_vlm.module import FoveatedVLMModule

MAX_SHOWN_FRAMES = 8
SHOWN_TOKENS = 48  # of an answer


def show_answers(module: FoveatedVLMModule, batch: VideoTextBatch, rows: int) -> tuple[np.ndarray | None, str]:
    """Answer some rows of different kinds; return an image [H, W, 3] uint8 (None without frames) and a table."""
    network, counts = module.network, batch.frame_mask.sum(1).tolist()
    candidates = [(row, _last_fitting_question(module, batch, row, counts)) for row in one_of_each(batch.kind, rows)]
    questions = [(row, question) for row, question in candidates if question is not None]
    if not questions:
        return None, "no conversation of the batch fits into the language model's context with an answer"
    chosen_rows = [row for row, _ in questions]
    qa_pairs, prompts = (
        [(words, answer) for _, (words, answer, _) in questions],
        [prompt for _, (*_, prompt) in questions],
    )
    videos = [int(batch.video_index[row]) for row in chosen_rows]
    frames = batch.normalised(network.backbone.mean, network.backbone.std)
    # only the videos of these rows
    shown_videos = sorted(set(videos))
    answers = generate(
        network,
        module.tokenizer,
        frames[shown_videos],
        [counts[video] for video in shown_videos],
        prompts,
        [shown_videos.index(video) for video in videos],
        module.answer_mode,
        max_new_tokens=SHOWN_TOKENS,
        seconds=[batch.seconds[video] for video in shown_videos] if batch.seconds else None,
    )
    table = ["| kind | question | answer | generated |", "| --- | --- | --- | --- |"]
    for row, (question, answer), words in zip(chosen_rows, qa_pairs, answers.texts, strict=True):
        cells = (batch.kind[row], question, answer, words)
        table.append("| " + " | ".join(printable(cell.replace("|", "/").replace("\n", " ")) for cell in cells) + " |")
    text = "\n".join(table)
    visual_prompts = [n for n, video in enumerate(videos) if counts[video]]
    if not visual_prompts or answers.passes is None or not isinstance(network, FoveatedVLM):
        return None, text
    hidden = torch.zeros(0, device=frames.device)
    output = VLMOutput(hidden, answers.rows.layout(), hidden, answers.passes)
    maps = patch_maps(network, output, answers.rows).float().cpu().numpy()
    streams = answers.rows.streams.of_row.tolist()
    strips = []
    for n in visual_prompts:
        images = batch.frames[videos[n], : counts[videos[n]]].permute(0, 2, 3, 1).cpu().numpy()
        title = f"{batch.kind[chosen_rows[n]]}: {qa_pairs[n][0]}   true: {qa_pairs[n][1]}   said: {answers.texts[n]}"
        strips.append((title, images, maps[streams[n], : len(images)]))
    return draw_attention(strips), text


def _last_fitting_question(
    module: FoveatedVLMModule, batch: VideoTextBatch, row: int, counts: Sequence[int]
) -> tuple[str, str, EncodedText] | None:
    """Return the last question of a row that fits into the context with an answer, its true answer and the prompt;
    None: no question fits (training truncates such rows)."""
    turns, frames = batch.texts[row].turns, int(counts[int(batch.video_index[row])])
    for last in [n for n, turn in enumerate(turns) if turn.role == "assistant"][::-1] or [len(turns)]:
        prompt = module.collator.prompt(turns[:last], batch.seconds_of(row))
        with contextlib.suppress(ValueError):
            check_room(module.network, len(prompt.ids), frames, SHOWN_TOKENS)
            return turns[last - 1].text if last else "", turns[last].text if last < len(turns) else "", prompt
    return None


def one_of_each(kinds: Sequence[str], count: int) -> list[int]:
    """Return up to `count` rows: one row of each kind first, then further rows."""
    first = {kind: row for row, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    chosen += [row for row in range(len(kinds)) if row not in chosen]
    return chosen[:count]


def draw_attention(strips: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Draw a row of images for each (title, frames [F, S, S, 3] uint8, attention [F, h, w]); [H, W, 3] uint8.

    Each heatmap has its own scale: the place of the attention matters, not its strength. For long videos, evenly spaced
    frames are shown.
    """
    columns = min(MAX_SHOWN_FRAMES, max(len(frames) for _, frames, _ in strips))
    figure = Figure(figsize=(1.8 * columns, 2.2 * len(strips)), layout="constrained")
    parts = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for part, (title, frames, maps) in zip(parts, strips, strict=True):
        title = drawable(title)
        part.suptitle(title if len(title) < 130 else title[:127] + "...", fontsize=8, parse_math=False)
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.axis("off")
        frame_indices = evenly(len(frames), columns)
        for axis, frame_index in zip(axes, frame_indices, strict=False):
            side = frames.shape[1]
            strength = maps[frame_index] / max(float(maps[frame_index].max()), 1e-12)
            axis.imshow(frames[frame_index], extent=(0, side, side, 0))
            overlay = {"extent": (0, side, side, 0), "interpolation": "bilinear", "cmap": "inferno"}
            axis.imshow(strength, alpha=0.15 + 0.6 * strength, **overlay)
            axis.set_title(f"frame {frame_index}", fontsize=6)
    return figure_to_image(figure)

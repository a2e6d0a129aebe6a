"""Checks before a training whether a video-language network and its collator fit the data."""

from __future__ import annotations

from collections.abc import Collection

from keygrip.data.batches import VideoTextStatistics
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.video_language import VideoLanguageNetwork


def check_data(
    network: VideoLanguageNetwork,
    collator: ConversationCollator,
    coarse_kinds: Collection[str],
    statistics: VideoTextStatistics,
) -> None:
    """Raise ValueError if the collator counts other tokens per frame than the network has, no question has one of the
    `coarse_kinds`, clips keep the video's seconds and the network has no clock of seconds, or a video has more
    frames than the network numbers."""
    if collator.tokens_per_frame != network.tokens_per_frame:
        raise ValueError(
            f"collator.tokens_per_frame={collator.tokens_per_frame}: the network has {network.tokens_per_frame}, which "
            "data.budget must count"
        )
    if statistics.kinds and (unknown := set(coarse_kinds) - statistics.kinds):
        raise ValueError(f"model.coarse_kinds={sorted(unknown)}: asked are {', '.join(sorted(statistics.kinds))}")
    if statistics.clips_keep_times and not network.counts_seconds:
        raise ValueError(
            "data.clips.rebased=false (or of a source's clips): questions about a clip name the video's seconds, and "
            "frames must say them: set model.network.frame_clock=seconds and frame_numbers=0, or rebased=true"
        )
    numbers = None if network.frame_tokens is None else len(network.frame_tokens)
    if numbers is not None and statistics.longest_video > numbers:
        raise ValueError(
            f"model.network.frame_numbers={numbers}: the data have videos of {statistics.longest_video} frames: raise "
            "it, take model.network.frame_clock, or lower data.max_frames"
        )

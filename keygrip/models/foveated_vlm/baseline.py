"""Baseline with the usual connector: each frame's patches are pooled to K tokens, to compare with one per frame.

Legend: M frames, N = h * w patches, K tokens per frame, D backbone width, C language width, B rows.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from keygrip.models.backbone import DinoBackbone
from keygrip.models.foveated_vlm.frame_cache import Encoded
from keygrip.models.foveated_vlm.rows import TextRows, real_frames
from keygrip.models.foveated_vlm.video_language import Passes, VideoLanguageNetwork
from keygrip.models.language.decoder import LanguageModel
from keygrip.training.parts import model_part


@model_part
class PooledVLM(VideoLanguageNetwork):
    """Average patch features on a k x k grid; each cell is a visual token, in row-major order.

    Args:
        backbone, language, visual_scale, frame_numbers, pack_rows, frame_clock: as in `FoveatedVLM`.
        tokens_per_frame: a square: 4, 16, 64, ...

    Raises:
        ValueError: not a square, or more tokens than the configured image has patches.
    """

    modes = ("many_tokens",)
    about = "pooled_vlm, the baseline of foveated_vlm: a video-language model with pooled visual tokens"

    def __init__(
        self,
        backbone: DinoBackbone,
        language: LanguageModel,
        tokens_per_frame: int,
        visual_scale: float | None = None,
        frame_numbers: int = 0,
        pack_rows: bool = False,
        frame_clock: bool | Literal["seconds"] = False,
    ) -> None:
        super().__init__(backbone, language, visual_scale, frame_numbers, pack_rows, frame_clock)
        self.side = round(tokens_per_frame**0.5)
        patches = backbone.image_size // backbone.patch_size
        if self.side < 1 or self.side**2 != tokens_per_frame or self.side > patches:
            raise ValueError(
                f"model.network.tokens_per_frame={tokens_per_frame} must be a square of at most {patches} x {patches}, "
                f"the patches of {backbone.image_size} pixels"
            )
        self.tokens_per_frame = tokens_per_frame

    def encode(self, frames: Tensor) -> Tensor:
        """Pooled patches [M, K, D] of frames [M, 3, H, W]."""
        grid = self.backbone(frames).grid_map()
        return F.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)

    def visual_tokens(
        self, frames: Tensor, rows: TextRows, mode: str, refinement: int = 0, kv: Encoded | None = None
    ) -> tuple[Tensor, Passes | None, Tensor]:
        """See `VideoLanguageNetwork.visual_tokens`; there is one mode, and nothing to refine."""
        if mode not in self.modes or refinement:
            raise ValueError(f"the pooled baseline has mode=many_tokens only, without refinement; got mode={mode!r}")
        if not any(rows.frame_counts):
            return self._without_frames(rows)
        pooled = self.encode(real_frames(frames, rows.frame_counts)) if kv is None else kv
        assert isinstance(pooled, Tensor)
        tokens = self.connector(pooled).flatten(0, 1)  # [M * K, C]
        longest = max(rows.frame_counts) * self.tokens_per_frame
        starts = [0]
        for count in rows.frame_counts:
            starts.append(starts[-1] + count * self.tokens_per_frame)
        # rows that share a video use the same tokens; those after a shorter video's end are not used
        first = torch.tensor([starts[video] for video in rows.videos])[:, None]
        index = (first + torch.arange(longest)[None]).clamp_max(len(tokens) - 1).to(tokens.device)
        return tokens[index], None, self.zero_of_unused()

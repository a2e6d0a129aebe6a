"""Make docs/images/metaworld_rollouts.gif from an evaluation with videos of every task.

First run ``python -m keygrip.evaluate checkpoint=RUN env=metaworld env.tasks=mt50 open_loop=false episodes=10
first_seed=500000 videos=1``, then ``python docs/make_metaworld_grid.py RUN/evaluation``. The grid shows the first
recorded episode of up to CELLS tasks: at most half of the cells show failed episodes, the others successful ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from keygrip.data.video import read_video
from keygrip.evaluation.closed_loop import ConditionResult
from keygrip.evaluation.rollout_grid import grid_of_rollouts
from keygrip.evaluation.rollouts import EpisodeResult

CELLS, WIDTH, EVERY, FPS = 12, 560, 5, 2.5


def main(evaluation: Path) -> None:
    episodes = json.loads((evaluation / "closed_loop.json").read_text(encoding="utf-8"))["episodes"]
    recorded = {
        name: [EpisodeResult(**each) for each in records if each["video"]] for name, records in episodes.items()
    }
    results = [ConditionResult(name, {}, records[:1]) for name, records in recorded.items() if records]
    failed = [result for result in results if not result.episodes[0].success][: CELLS // 2]
    won = [result for result in results if result.episodes[0].success]
    selected = failed + won[:: max(1, len(won) // (CELLS - len(failed)))][: CELLS - len(failed)]
    with tempfile.TemporaryDirectory() as folder:
        grid = grid_of_rollouts(selected, evaluation / "videos", Path(folder) / "grid.mp4")
        assert grid is not None
        frames = [Image.fromarray(frame) for frame in read_video(grid)[::EVERY]]
    height = round(frames[0].height * WIDTH / frames[0].width)
    small = [frame.resize((WIDTH, height)).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    target = Path(__file__).parent / "images" / "metaworld_rollouts.gif"
    small[0].save(target, save_all=True, append_images=small[1:], duration=round(1000 / FPS), loop=0, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

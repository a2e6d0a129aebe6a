"""The common loop of recorders of scripted experts: record episodes from a seed on until enough have succeeded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from keygrip.progress import Progress
from keygrip.recording.recorded_folder import demo_name

FAILURES = 10  # failures before the recording of an expert that fails more often than it succeeds is ended


@dataclass
class EpisodeCounts:
    """Number of episodes of a recording. demos: complete in the folder. recorded: of these, recorded by this call.
    failed: episodes in which the expert failed."""

    demos: int = 0
    recorded: int = 0
    failed: int = 0


def record_successes(
    root: Path,
    task: str,
    demos: int,
    seed: int,
    failed: set[int],
    run: Callable[[list[int]], Iterable[tuple[int, bool]]],
    store_failed: Callable[[], None],
    bar: Progress,
) -> EpisodeCounts:
    """Record the first `demos` episodes from `seed` on in which the expert succeeds. Existing ones are kept.

    Args:
        root: folder of the demo folders. task: its name, with which their names begin.
        failed: seeds in which the expert is known to fail; new ones are added.
        run: records the episodes of some seeds; yields (seed, whether the expert succeeded) in any order.
        store_failed: called whenever `failed` has grown. bar: counts demos.

    Raises:
        ValueError: The expert fails in more than half of the episodes.
    """
    counts, next_seed = EpisodeCounts(), seed
    while counts.demos < demos:
        # As many further seeds as demos are missing, so that the seeds do not depend on the number of processes.
        batch = range(next_seed, next_seed + demos - counts.demos)
        next_seed = batch.stop
        existing = {s for s in batch if (root / demo_name(task, s) / "metadata.json").is_file()}
        known_failures = failed.intersection(batch)
        counts.demos += len(existing)
        counts.failed += len(known_failures)
        bar.update(len(existing))
        for episode_seed, success in run([s for s in batch if s not in existing | known_failures]):
            if success:
                counts.demos, counts.recorded = counts.demos + 1, counts.recorded + 1
                bar.update(1)
                continue
            failed.add(episode_seed)
            counts.failed += 1
            bar.set_postfix(failed=counts.failed)
            store_failed()
        if counts.failed > FAILURES and counts.failed > (next_seed - seed) / 2:
            raise ValueError(
                f"the expert failed in {counts.failed} of {next_seed - seed} episodes of {task}: the task's options "
                "ask for more than it can do"
            )
    return counts

"""Embedded demonstrations, which are recorded in the simulator if they are missing."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_method, instantiate

from keygrip.artifacts import make_once
from keygrip.cores import usable_cores
from keygrip.training.parts import data_part

log = logging.getLogger(__name__)


@data_part(from_checkpoint={"make_missing": False}, makers=["recorder"])
@dataclass(frozen=True)
class Recording:
    """The embedded demonstrations: what to record, and where to store it.

    Nothing is imported until demonstrations are missing: neither the simulator nor its graphics library is needed to
    train on a folder.

    Args:
        recorder: dotted name of the function that records; called with `task` built and the other arguments by name.
        task: configuration of the task (with its `_target_`).
        folder: parent folder of recordings; each has its own folder below it, named after its task and a hash of all
            its options, so that recordings with different options never mix.
        demos: how many. seed: of the first episode. image_size: edge of the recorded images. hz: frames per second.
        processes: None: one for each core. depth, video: as for `DemoWriter`.
        cameras: names; None: the task's own camera.
        make_missing: False: missing recordings are an error (set when the configuration comes from a checkpoint, so
            that loading one never records).
    """

    recorder: str
    task: Mapping[str, Any]
    folder: str | Path = "data"
    demos: int = 100
    seed: int = 0
    image_size: int = 224
    hz: float = 10.0
    processes: int | None = None
    depth: bool = False
    video: bool = False
    cameras: Sequence[str] | None = None
    make_missing: bool = True

    @property
    def root(self) -> Path:
        """The recording's folder. Its name depends on what is recorded, not on the location of the code."""
        options = {key: value for key, value in self.task.items() if key != "_target_"}
        options |= {"seed": self.seed, "image_size": self.image_size, "hz": self.hz}
        options |= {"depth": self.depth, "video": self.video}
        if self.cameras is not None:
            options["cameras"] = list(self.cameras)
        # 10 and 10.0 are the same setting
        plain = {key: value + 0.0 if type(value) is int else value for key, value in options.items()}
        content = json.dumps(plain, sort_keys=True)
        return Path(self.folder) / f"{self.task['name']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def held(self) -> int:
        """Return the number of complete demos in the folder."""
        return sum(1 for _ in self.root.glob("[!.]*/metadata.json"))

    def complete(self) -> None:
        """Record the missing demos, in one process at a time, and log it."""
        if not self.make_missing and not self._is_complete(self.root):
            raise FileNotFoundError(
                f"{self.root} holds {self.held()} of {self.demos} demonstrations of the run: evaluate with "
                "data.record.make_missing=true, which records them, or with open_loop=false, or data.root=FOLDER where "
                "they lie now"
            )
        make_once(self.root, self._is_complete, self._record)

    def _is_complete(self, root: Path) -> bool:
        return self.held() >= self.demos

    def _record(self, root: Path) -> None:
        held = self.held()
        log.info("%s holds %d of %d demonstrations: recording the others in the simulator", root, held, self.demos)
        get_method(self.recorder)(
            task=instantiate(dict(self.task)),
            root=root,
            demos=self.demos,
            seed=self.seed,
            image_size=self.image_size,
            hz=self.hz,
            processes=usable_cores() if self.processes is None else self.processes,
            depth=self.depth,
            video=self.video,
            cameras=None if self.cameras is None else tuple(self.cameras),
        )

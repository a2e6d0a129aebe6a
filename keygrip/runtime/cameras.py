"""Cameras of a real robot: the newest image of a video device, a file or a stream, with its arrival time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from keygrip.data.video import live_frames
from keygrip.runtime.robot import RobotLostError

log = logging.getLogger(__name__)

REPEATS_WARNING_S = 0.5  # repeated images are reported after this time


class Camera(Protocol):
    """One camera."""

    def read(self) -> tuple[np.ndarray, float]:
        """Return the newest image [H, W, 3] uint8 RGB, and when it was taken, in seconds of the machine's monotonic
        clock.

        Raises:
            RobotLostError: There is no image.
        """
        ...

    def close(self) -> None: ...


class VideoCamera:
    """A video device, file or stream, read in a thread by PyAV; only the newest frame is stored. A file is played once,
    at its own rate.

    A frame that equals the previous frame byte for byte gets the time of the previous frame. Stream bridges, loopback
    devices and some drivers return their last image again and again when they stall, while sensor noise makes live
    images differ. So a repeated image becomes older, and the watchdog detects it.

    Args:
        source: e.g. /dev/video0. format: of the device, e.g. v4l2; None: detected. width, height, fps: requested from
            the device; None: its own. wait_seconds: maximum waiting time for the first image.
        repeats_are_new: equal frames have their own times. For sources whose live frames may be equal: a rendered
            video, or a strongly compressed stream of a static scene. If such a source stalls and repeats its last
            image, this is not detected.

    Raises:
        RobotLostError: The source cannot be opened, or gives no image. ValueError: Only one of width and height is
            given.
    """

    def __init__(
        self,
        source: str,
        format: str | None = "v4l2",
        width: int | None = None,
        height: int | None = None,
        fps: int | None = None,
        wait_seconds: float = 5.0,
        repeats_are_new: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (width is None) != (height is None):
            raise ValueError(
                f"the camera {source}: width={width} and height={height}: give both, or leave both out for the size "
                "that the camera has"
            )
        options = {} if width is None else {"video_size": f"{width}x{height}"}
        if fps is not None:
            options["framerate"] = str(fps)
        self.source, self._clock, self._repeats_are_new = source, clock, repeats_are_new
        self._is_file = Path(source).is_file()
        self._begin_s: float | None = None  # when a file's time was 0, on the clock
        self._newest: tuple[np.ndarray, float] | None = None
        self._error: str | None = None
        self._repeats_warned = False
        self._there, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._follow, args=(format, options), name=f"camera {source}", daemon=True
        )
        self._thread.start()
        if not self._there.wait(wait_seconds) or self._newest is None:
            self.close()
            raise RobotLostError(f"the camera {source} gave no image: {self._error or f'{wait_seconds:g} s passed'}")

    def read(self) -> tuple[np.ndarray, float]:
        if self._newest is None:
            raise RobotLostError(f"the camera {self.source} has no image")
        return self._newest

    def close(self) -> None:
        """Close the device."""
        self._closing.set()
        self._thread.join(2.0)

    def _follow(self, format: str | None, options: dict[str, str]) -> None:
        try:
            with live_frames(self.source, format, options) as frames:
                for image, time_s in frames:
                    self._wait_for(time_s)
                    if self._closing.is_set():
                        break
                    self._newest = (image, self._taken(image))
                    self._there.set()
        except (OSError, ValueError) as error:
            self._error = str(error)
        finally:
            self._there.set()  # the watchdog detects an image that is too old
            if self._newest is not None and not self._closing.is_set():
                log.error("the camera %s gives no more images: %s", self.source, self._error or "it has ended")

    def _wait_for(self, time_s: float | None) -> None:
        """Wait until a frame of a file is due; the frames of other sources arrive in time. `time_s`: in the file."""
        if time_s is None or not self._is_file:
            return
        if self._begin_s is None:
            self._begin_s = self._clock() - time_s
        self._closing.wait(max(0.0, self._begin_s + time_s - self._clock()))

    def _taken(self, image: np.ndarray) -> float:
        """Return when a newly arrived image was taken; an image equal to the last one keeps the earlier time."""
        now, newest = self._clock(), self._newest
        if self._repeats_are_new or newest is None or not np.array_equal(image, newest[0]):
            return now
        if now - newest[1] > REPEATS_WARNING_S and not self._repeats_warned:
            self._repeats_warned = True
            log.warning(
                "the camera %s has repeated its image for %.1f s, which counts as that old. Its setting "
                "repeats_are_new=true is for live images that may be equal: an animation, a strongly compressed stream",
                self.source,
                now - newest[1],
            )
        return newest[1]

"""Bad samples: the errors that broken or hostile frames, videos, images and texts raise, and how they are handled.

Readers of frames, videos, images and texts open files with :mod:`keygrip.data.untrusted_files`, which checks sizes
before it allocates or decodes. They run under :func:`convert_errors`, which converts every error that a broken file
raises into one :class:`BadSample` with the reason and the place. :class:`BadSamples` counts the samples that were left
out, stores their names, and stops a run that leaves out too many.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import logging
import lzma
import math
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence

import av
from PIL import Image, UnidentifiedImageError

log = logging.getLogger(__name__)

REASON_CHARACTERS = 300
NAMED_AT_MOST = 10  # bad samples in a message or by name in the log; all are counted

HOSTILE: tuple[type[BaseException], ...] = (
    ValueError,  # also UnicodeError and json.JSONDecodeError
    TypeError,
    AttributeError,
    LookupError,  # IndexError, KeyError, unknown encodings
    ArithmeticError,  # OverflowError, ZeroDivisionError
    OSError,
    EOFError,
    MemoryError,  # an absurdly large size that passed every check
    RuntimeError,  # RecursionError, NotImplementedError, encrypted zip members
    SyntaxError,  # headers of .npy files, broken PNG
    AssertionError,  # raised by Pillow for broken chunks
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    csv.Error,
    tokenize.TokenError,  # headers of .npy files
    Image.DecompressionBombError,
    av.FFmpegError,
)
"""The exceptions that broken or hostile data can raise in the readers of this project and in their packages."""

OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.ESTALE)


class BadSample(ValueError):
    """A sample that cannot be used.

    Args:
        where: name and place of the sample. what: what is wrong with it.
    """

    def __init__(self, where: object, what: str = "") -> None:
        super().__init__(str(where), what)
        self.where, self.what = str(where), what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.what else self.where


def reason_of(error: BaseException) -> str:
    """Return the reason, in one line, why a sample with this error cannot be used."""
    text = " ".join(str(error).split())[:REASON_CHARACTERS]
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"  # Pillow repeats the path
    if text and isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def join_first(reasons: Sequence[str], most: int = NAMED_AT_MOST, between: str = "; ") -> str:
    """Join the first ``most`` reasons and the number of the remaining ones into one message."""
    more = [f"and {len(reasons) - most} more"] if len(reasons) > most else []
    return between.join([*reasons[:most], *more])


def join_first_names(names: Sequence[str]) -> str:
    """Join the first twenty names of demos or frames, as `join_first` joins reasons."""
    return join_first(names, 20, ", ")


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the machine (full disk, too few file descriptors) caused an error, and not the sample."""
    return isinstance(error, OSError) and error.errno in OF_THE_MACHINE


def raise_connection_error(error: BaseException) -> None:
    """Raise the connection error that caused an error, if one did: the sample may be readable later."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError):
            raise cause
        cause = cause.__cause__


@contextlib.contextmanager
def convert_errors(where: object, error: Callable[[str, str], Exception] = BadSample) -> Iterator[None]:
    """Convert every exception that a broken sample raises inside the block into one error.

    Args:
        where: name and place of the sample, for the message. error: constructs the exception from (where, what).

    Raises:
        BadSample: or the exception that `error` constructs. Errors of the machine (no space, no file descriptors) pass
            unchanged.
    """
    location = str(where)
    try:
        yield
    except HOSTILE as hostile:
        if is_of_the_machine(hostile):
            raise
        reason = reason_of(hostile)
        raise error(location, reason.removeprefix(f"{location}: ")) from hostile


# ---- counting --------------------------------------------------------------------------------------------------------


class BadSamples:
    """Count the samples that were left out, and stop a run that leaves out too many.

    Args:
        max_share: the largest share of bad samples among those seen; a larger share is an error. inf: never an error.
        setting: name of the setting that holds `max_share`, for the message.
        checked_after: samples seen before the share is checked.
    """

    def __init__(self, max_share: float, setting: str = "data.max_skipped_share", checked_after: int = 200) -> None:
        if not (0 <= max_share <= 1 or max_share == math.inf):
            raise ValueError(f"{setting}={max_share}: it is a share, from 0 to 1")
        self.max_share, self.setting, self.checked_after = max_share, setting, checked_after
        self.seen = 0
        self.reasons: dict[str, int] = {}  # how often each reason occurred

    @property
    def count(self) -> int:
        """Number of samples left out so far."""
        return sum(self.reasons.values())

    def add(self, seen: int, reasons: Sequence[str] = ()) -> None:
        """Add `seen` samples to the count, and the reasons of bad samples that are among them or came before them.

        Raises:
            ValueError: too many samples are bad.
        """
        self.seen += seen
        for reason in reasons:
            if reason not in self.reasons and len(self.reasons) < NAMED_AT_MOST:
                log.warning("skipped: %s", reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self.seen >= self.checked_after:
            self.check()

    def check(self) -> None:
        """Raise ValueError if too many of the samples seen so far are bad."""
        if self.count > self.max_share * self.seen:
            raise ValueError(
                f"{self.count} of {self.seen} samples could not be read in full, more than "
                f"{self.setting}={self.max_share:g} allows; the first: {next(iter(self.reasons))}"
            )

    @property
    def summary(self) -> str:
        """Summary in one line; empty if no sample was left out."""
        if not self.count:
            return ""
        names = list(self.reasons)[:NAMED_AT_MOST]
        more = len(self.reasons) - len(names)
        return f"{self.count} of {self.seen} samples skipped: " + "; ".join(names) + (f"; {more} more" if more else "")

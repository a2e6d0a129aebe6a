"""The single error that is raised for broken data, and how many of these errors a run accepts."""

from __future__ import annotations

import pickle

import pytest

from keygrip.data.bad_samples import HOSTILE, BadSample, BadSamples, convert_errors


def test_every_hostile_exception_becomes_one_error_with_its_place() -> None:
    made = {UnicodeError: UnicodeError("x")}
    for kind in HOSTILE:
        error = made.get(kind) or (kind(1, "x") if kind.__module__.startswith("av") else kind("x"))
        with pytest.raises(BadSample, match=r"sample 3 of a\.tar: "), convert_errors("sample 3 of a.tar"):
            raise error
    with pytest.raises(OSError, match="No space left"), convert_errors("x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), convert_errors("x"):
        raise KeyboardInterrupt
    with pytest.raises(BadSample, match=r"^s1: 00\.jpg: broken$"), convert_errors("s1"):
        raise BadSample("00.jpg", "broken")
    copied = pickle.loads(pickle.dumps(BadSample("s1", "broken")))  # as loader processes send it
    assert (str(copied), copied.where, copied.what) == ("s1: broken", "s1", "broken")


def test_bad_samples_are_counted_and_judged() -> None:
    bad = BadSamples(0.1, checked_after=20)
    assert bad.summary == ""
    bad.add(10, ["a: broken", "a: broken", "b: broken"])
    assert (bad.count, bad.seen, bad.reasons) == (3, 10, {"a: broken": 2, "b: broken": 1})
    assert bad.summary == "3 of 10 samples skipped: a: broken; b: broken"
    said = r"3 of 20 samples could not be read in full, more than data\.max_skipped_share=0\.1"
    with pytest.raises(ValueError, match=said):
        bad.add(10)

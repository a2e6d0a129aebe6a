"""Readers of untrusted files: sizes are checked first, and all kinds of damage raise the same error."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from odd_images import png
from PIL import Image

from keygrip.data.bad_samples import BadSample
from keygrip.data.untrusted_files import (
    MAX_TEXT_BYTES,
    open_image,
    parse_fields,
    parse_json,
    parse_npy,
    read_bytes,
    read_npz,
    read_text,
)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npy_saying(header: str, numbers: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + numbers


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("pipe", "a named pipe"), ("link", "No such file"), ("folder", "a folder")):
        with pytest.raises(BadSample, match=rf"{name}\.jpg.*{reason}"):
            read_bytes(tmp_path / f"{name}.jpg")
        with pytest.raises(BadSample, match=rf"{name}\.jpg.*{reason}"), open_image(tmp_path / f"{name}.jpg"):
            pass
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa caption")
    assert read_text(tmp_path / "text") == "a caption"
    with pytest.raises(BadSample, match="more than the 4"):
        read_text(tmp_path / "text", max_bytes=4)


def test_a_large_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for name, size in (("bomb.png", (20000, 10000)), ("large.png", (9000, 9000))):
        Image.new("1", size).save(tmp_path / name)
        tracemalloc.start()
        with pytest.raises(BadSample, match=rf"{name}: it has .* pixels"), open_image(tmp_path / name) as image:
            image.load()
        assert tracemalloc.get_traced_memory()[1] < 1e7
        tracemalloc.stop()
    with open_image(tmp_path / "large.png", max_pixels=10**8) as image:
        assert image.size == (9000, 9000)


def header_of(width: int, height: int) -> bytes:
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")


def test_an_image_of_which_pillow_warns_is_refused_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, because pytest changes the filters of warnings."""
    (tmp_path / "bomb.png").write_bytes(header_of(10000, 9500))
    program = (
        "import sys\nfrom keygrip.data.untrusted_files import BadSample, open_image\n"
        "try:\n    with open_image(sys.argv[1]):\n        pass\nexcept BadSample as error:\n    print(error.what)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "bomb.png")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = "it has 10000 x 9500 pixels, more than the 67108864 that an image may have\n"
    assert (ended.stdout, ended.stderr, ended.returncode) == (refused, "", 0)


def test_an_image_is_refused_where_warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match="more than the 67108864 pixels"), open_image(header_of(10000, 9500)):
            pass


def test_formats_that_start_programs_are_not_opened() -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadSample, match=r"00\.jpg: "), open_image(content, "00.jpg"):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"1e400",
        b"-1e400",
        b"NaN",
        b"Infinity",
        b"1" * 30,
        b"1" * 5000,
        b"[" * 100 + b"]" * 100,
        b"[" * 100000 + b"]" * 100000,
        b'{"a":' * 100000,
        b'["\\ud800"]',
        b'{"\\ud800": 1}',
        b"\xff\xfe",
        b"",
        b"{",
    ],
)
def test_json_out_of_limits_is_a_bad_sample(content: bytes) -> None:
    with pytest.raises(BadSample, match=r"^s1: "):
        parse_json(content, "s1")


def test_fields_that_do_not_count_are_left_out_where_they_are_out_of_limits() -> None:
    beside = {"nan": math.nan, "long": 10**400, "half": "\ud83d", "deep": json.loads("[" * 100 + "]" * 100)}
    told = json.dumps({"caption": "c", "width": 3, **beside})
    assert parse_fields(told, "s1", ["caption"]) == {"caption": "c", "width": 3}
    for name in beside:
        with pytest.raises(BadSample, match=r"^s1: "):
            parse_fields(told, "s1", [name])
    for content in ("[NaN]", "{", b"\xff", '{"caption": "c", "deep": ' + "[" * 100000):
        with pytest.raises(BadSample, match=r"^s1: "):
            parse_fields(content, "s1", ["caption"])
    with pytest.raises(BadSample, match="more than the"):
        parse_fields(told + " " * MAX_TEXT_BYTES, "s1", ["caption"])


def test_json_within_limits_is_as_it_was() -> None:
    value = {"a": [1, -2.5e-3, None, True, "\u00e4 \U0001f600"], "b": {"c": [[] for _ in range(200)]}, "n": 2**63}
    assert parse_json(json.dumps(value).encode(), "s1") == value


@pytest.mark.parametrize(
    "content",
    [
        npy_saying("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
        npy_saying("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4), }", b"\0" * 16),
        npy_saying("{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }", b"\0" * 16),
        npy_saying("{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,), }"),
        npy_saying("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 16),
        npy_saying("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 10000000000000000000000), }"),
        npy_saying("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 30, b"\0" * 16),
        npy_saying("('"),
        npy_saying("L" * 60 + "{'"),
        npy(np.array([None])),
        npy(np.zeros(8))[:-1],
        b"\x93NUMPY\x03\x00\x04\x00{}  ",
        b"\x93NUMPY",
        b"",
    ],
)
def test_arrays_that_are_not_what_they_say_are_bad_samples(content: bytes) -> None:
    with pytest.raises(BadSample, match=r"^vae\.npy: "):
        parse_npy(content, "vae.npy")


def test_arrays_are_as_they_were_written() -> None:
    for values in (
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.float16(2),
        np.array(["ab", "c"]),
    ):
        found = parse_npy(npy(np.asarray(values)))
        assert np.array_equal(found, values)
        assert (found.dtype, found.shape) == (np.asarray(values).dtype, np.asarray(values).shape)


def test_archives_are_read_by_name_and_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, large=np.zeros(4_000_000), small=np.arange(3))
    tracemalloc.start()
    assert {k: v.tolist() for k, v in read_npz(path, ["small", "none"], max_bytes=1000).items()} == {"small": [0, 1, 2]}
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    with pytest.raises(BadSample, match=r"a\.npz: its arrays have 32\d+ bytes, more than the 1000"):
        read_npz(path, max_bytes=1000)
    np.savez(path, noise=np.random.default_rng(0).random(1000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with pytest.raises(BadSample, match=r"a\.npz: "):
        read_npz(bytes(content), where="a.npz")
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(2)))
        archive.writestr("a", npy(np.ones(2)))
    with pytest.raises(BadSample, match="two arrays of one name"):
        read_npz(twice.getvalue())

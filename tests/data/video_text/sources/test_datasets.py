"""Readers of published data sets, tested on small files in the same formats."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hydra.errors import InstantiationException
from macos import leave_notes
from PIL import Image
from shard_sets import picture, small_video

from keygrip.config import compose
from keygrip.data.shards.keys import file_keys, sample_key
from keygrip.data.shards.reader import ShardSet
from keygrip.data.validation import validate
from keygrip.data.video_text.conversations import read_sample
from keygrip.data.video_text.sources.cauldron import CauldronMaker, cauldron
from keygrip.data.video_text.sources.smoltalk import smoltalk
from keygrip.data.video_text.sources.video_sft import entries, video_sft
from keygrip.data.video_text.sources.webvid import REQUEST, tar_samples, webvid, webvid_rows
from keygrip.prepare import run

SIZE = 32


def write_video(path: Path, seconds: float, fps: int = 10, width: int = 64, height: int = 48) -> Path:
    """Write an H.264 file in which second s has the shade 20 + 30 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(seconds * fps)):
            shade = 20 + 30 * (number // fps)
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), shade, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def shades(frames: np.ndarray) -> list[int]:
    return [round((float(frame[SIZE // 2, SIZE // 2].mean()) - 20) / 30) for frame in frames]


def samples(root: Path) -> dict[str, Any]:
    shards = ShardSet(root)
    return {shards.key(n): read_sample(shards, n, SIZE) for n in range(len(shards))}


# ---- SmolTalk --------------------------------------------------------------------------------------------------------


def talk(number: int) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": f"Question {number}?"},
        {"role": "assistant", "content": f"Answer {number}."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "That is all."},
    ]
    return {"messages": messages[number % 2 :], "source": "test"}


def smoltalk_folder(root: Path) -> Path:
    rows = [talk(n) for n in range(60)]
    rows[7] = {"messages": [{"role": "user", "content": "nobody answers"}], "source": "test"}
    rows[8] = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 9000}],
        "source": "t",
    }
    (root / "data" / "all").mkdir(parents=True)
    parquet.write_table(
        arrow.Table.from_pylist(rows), root / "data" / "all" / "train-00000-of-00001.parquet", row_group_size=16
    )
    return root


def test_smoltalk_stages_share_nothing_and_miss_nothing(tmp_path: Path) -> None:
    source = smoltalk_folder(tmp_path / "download")
    stages = []
    failed = 0
    for stage in (1, 2, 3):
        root = tmp_path / f"stage{stage}"
        report = smoltalk(source, root, stage, groups_per_shard=2, processes=1)
        failed += report["failed"]
        stages.append(samples(root))
        assert validate(root)["errors"] == 0
    keys = [set(stage) for stage in stages]
    assert sum(len(stage) for stage in keys) == len(set.union(*keys)) == 58
    assert failed == 1
    assert all(len(stage) > 8 for stage in keys)
    sample = (stages[0] | stages[1] | stages[2])["data-all-train-00000-of-00001-00000020"]
    assert sample.frames.shape == (0, SIZE, SIZE, 3)
    turns = sample.conversations[0].turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[2].text == "Answer 20."
    assert sample.conversations[0].kind == "text"


def test_smoltalk_as_the_hub_has_it_gives_every_conversation_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Next to the folders of the subsets there is `all`, which repeats them."""
    source = smoltalk_folder(tmp_path / "download")
    for name, rows in (("magpie", range(9, 40)), ("smol", range(40, 60))):
        (source / "data" / name).mkdir()
        table = arrow.Table.from_pylist([talk(number) for number in rows])
        parquet.write_table(table, source / "data" / name / "train-00000-of-00001.parquet")
    said = []
    with caplog.at_level("INFO"):
        for stage in (1, 2, 3):
            smoltalk(source, tmp_path / f"stage{stage}", stage, processes=1)
            said += [sample.conversations[0].turns for sample in samples(tmp_path / f"stage{stage}").values()]
    assert len(said) == len(set(said)) == 58
    assert "the folder 'all' is read; 2 tables beside it, of subsets that it repeats, are not" in caplog.text


def test_smoltalk_of_subsets_alone_and_of_the_whole_folder_itself_is_read_whole(tmp_path: Path) -> None:
    source = smoltalk_folder(tmp_path / "download")
    whole = source / "data" / "all"
    assert sum(smoltalk(whole, tmp_path / f"w{n}", n, processes=1)["samples"] for n in (1, 2, 3)) == 58
    for name in ("a", "b"):
        (source / "data" / name).mkdir()
        rows = [talk(number) for number in (range(30) if name == "a" else range(30, 60))]
        parquet.write_table(arrow.Table.from_pylist(rows), source / "data" / name / "train-0.parquet")
    shutil.rmtree(whole)
    assert sum(smoltalk(source, tmp_path / f"s{n}", n, processes=1)["samples"] for n in (1, 2, 3)) == 60


def test_smoltalk_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train-\*\.parquet in .*download SmolTalk"):
        smoltalk(tmp_path, tmp_path / "out", 1)
    source = smoltalk_folder(tmp_path / "download")
    with pytest.raises(ValueError, match="stage=4: training has the stages 1 to 3"):
        smoltalk(source, tmp_path / "out", 4)
    for characters in (0, -1):
        with pytest.raises(ValueError, match=f"max_characters={characters} must be at least 1"):
            smoltalk(source, tmp_path / "out", 1, characters)
    with pytest.raises(ValueError, match=r"would hold 0 samples of stage 1 with at most max_characters=1 characters"):
        smoltalk(source, tmp_path / "short", 1, 1, processes=1)
    path = source / "data" / "all" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet cannot be read .*download it again"):
        smoltalk(source, tmp_path / "out", 1)
    parquet.write_table(arrow.Table.from_pylist([{"text": "x"}]), path)
    with pytest.raises(ValueError, match=r"has no column 'messages': is it a table of SmolTalk"):
        smoltalk(source, tmp_path / "out", 1)


@pytest.mark.parametrize("step", ["smoltalk", "cauldron"])
def test_the_share_of_broken_rows_is_a_setting_of_the_command(step: str, tmp_path: Path) -> None:
    texts = [{"user": "What?", "assistant": "That.", "source": "x"}]
    images = [picture(9, 4), b"\x89PNG", b"\x89PNG", b"\x89PNG"]
    rows: dict[str, list[dict[str, Any]]] = {
        "cauldron": [{"images": [{"bytes": each, "path": None}], "texts": texts} for each in images],
        "smoltalk": [talk(n) if n % 4 == 0 else {"messages": [talk(n)["messages"][-2]]} for n in range(24)],
    }
    (tmp_path / "ai2d").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows[step]), tmp_path / "ai2d" / "train-0.parquet")
    given = [f"step={step}", f"source={tmp_path / 'ai2d'}", f"root={tmp_path / 'set'}", "processes=1"]
    given += ["stage=1"] if step == "smoltalk" else [f"image_size={SIZE}"]
    with pytest.raises(InstantiationException, match=r"items are broken, more than max_failed_share=0\.5 allows"):
        run(compose("prepare", given))
    report = run(compose("prepare", [*given, "max_failed_share=0.95"]))
    assert report["samples"] >= 1
    assert report["failed"] > report["samples"]


# ---- The Cauldron ----------------------------------------------------------------------------------------------------


def test_cauldron_images_are_frames_and_pairs_are_conversations(tmp_path: Path) -> None:
    def row(shades_: list[int], broken: bool = False) -> dict[str, Any]:
        images = [{"bytes": b"\x89PNG" if broken else picture(shade, 40), "path": None} for shade in shades_]
        texts = [{"user": f"What {n}?\n", "assistant": f"That {n}.", "source": "x"} for n in range(2)]
        return {"images": images, "texts": texts}

    for name, rows in (
        ("ai2d", [row([50]), row([60, 70])]),
        ("vqav2", [row([80], broken=True), row([90]), row([])]),
        ("robut_sqa", [row([50])]),
    ):
        (tmp_path / "download" / name).mkdir(parents=True)
        parquet.write_table(
            arrow.Table.from_pylist(rows), tmp_path / "download" / name / "train-00000-of-00001-abc.parquet"
        )
    report = cauldron(tmp_path / "download", tmp_path / "all", image_size=SIZE, processes=1)
    assert (report["samples"], report["failed"]) == (4, 2)
    found = samples(tmp_path / "all")
    assert sorted(len(sample.frames) for sample in found.values()) == [1, 1, 1, 2]
    said = {key: [[turn.text for turn in c.turns] for c in sample.conversations] for key, sample in found.items()}
    two = found["ai2d-train-00000-of-00001-abc-00000001"]
    assert np.abs(two.frames.mean(axis=(1, 2, 3)) - [60, 70]).max() < 2
    assert two.seconds == ()  # images that have no common time
    assert found["ai2d-train-00000-of-00001-abc-00000000"].seconds == (0.0,)
    assert said[two.key] == [["What 0?", "That 0."], ["What 1?", "That 1."]]
    assert [each.evidence for each in two.conversations] == [{"collection": "ai2d"}] * 2
    short = found["vqav2-train-00000-of-00001-abc-00000001"]
    assert [each.evidence for each in short.conversations] == [
        {"collection": "vqav2", "answers": [f"That {number}."]} for number in range(2)
    ]  # the VQA rule scores these
    # a collection whose later questions continue from earlier answers
    assert said["robut_sqa-train-00000-of-00001-abc-00000000"] == [["What 0?", "That 0.", "What 1?", "That 1."]]
    assert validate(tmp_path / "all")["errors"] == 0
    assert cauldron(tmp_path / "download", tmp_path / "one", ["ai2d"], SIZE, processes=1)["samples"] == 2
    with pytest.raises(FileNotFoundError, match=r"no collection 'docvqa' in .*there are ai2d, robut_sqa, vqav2"):
        cauldron(tmp_path / "download", tmp_path / "none", ["docvqa"])


@pytest.mark.parametrize(
    ("collection", "said", "scored"),
    [
        ("visual7w", "Answer: B", False),  # the letter of an option
        ("aokvqa", "Answer: red.\nRationale: It is red.", False),
        *((name, "Yes.", True) for name in ("figureqa", "vsr", "nlvr2", "hateful_memes")),
        ("cocoqa", "Red.", True),
    ],
)
def test_answers_of_the_cauldron_are_scored_where_they_are_words(
    collection: str, said: str, scored: bool, tmp_path: Path
) -> None:
    row = {"images": [{"bytes": picture(9, 4), "path": None}], "texts": [{"user": "What?", "assistant": said}]}
    source = tmp_path / "download" / collection
    source.mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist([row]), source / "train-0.parquet")
    cauldron(tmp_path / "download", tmp_path / "set", None, SIZE, processes=1)
    (sample,) = samples(tmp_path / "set").values()
    evidence = {"collection": collection, **({"answers": [said]} if scored else {})}
    assert sample.conversations[0].evidence == evidence
    settings = tmp_path / "set" / "settings.json"
    told = json.loads(settings.read_text())
    del told["scored"]  # as in a set of an earlier version, with another list of scored collections
    settings.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"other settings \(scored: None there, 2 now\)"):
        cauldron(tmp_path / "download", tmp_path / "set", None, SIZE, processes=1)


def test_cauldron_of_one_collection_alone_has_its_name_and_answers(tmp_path: Path) -> None:
    texts = [{"user": "What?", "assistant": "That.", "source": "x"}]
    rows = [{"images": [{"bytes": picture(9, 4), "path": None}], "texts": texts}]
    source = tmp_path / "download" / "vqav2"
    source.mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), source / "train-00000-of-00001.parquet")
    for root, collections in ((tmp_path / "all", None), (tmp_path / "named", ["vqav2"])):
        cauldron(source, root, collections, SIZE, processes=1)
        (sample,) = samples(root).values()
        assert sample.conversations[0].evidence == {"collection": "vqav2", "answers": ["That."]}
    with pytest.raises(FileNotFoundError, match=r"no collection 'train' in .*there are vqav2"):
        cauldron(source, tmp_path / "none", ["train"], SIZE, processes=1)


def test_collections_of_the_cauldron_in_linked_folders_are_read(tmp_path: Path) -> None:
    """Keys are those of the folder without links; notes of macOS are not read."""
    texts = [{"user": "What?", "assistant": "That.", "source": "x"}]
    table = arrow.Table.from_pylist([{"images": [{"bytes": picture(9, 4), "path": None}], "texts": texts}])
    source = tmp_path / "download"
    for folder in (source / "ai2d", source / "__MACOSX", tmp_path / "disk" / "vqav2"):
        folder.mkdir(parents=True)
        parquet.write_table(table, folder / "train-0.parquet")
    (source / "vqav2").symlink_to(tmp_path / "disk" / "vqav2")
    report = cauldron(source, tmp_path / "all", image_size=SIZE, processes=1)
    assert report["samples"] == 2
    assert sorted(samples(tmp_path / "all")) == ["ai2d-train-0-00000000", "vqav2-train-0-00000000"]
    assert cauldron(source, tmp_path / "one", ["vqav2"], SIZE, processes=1)["samples"] == 1


def test_cauldron_rows_of_many_images(tmp_path: Path) -> None:
    texts = [{"user": "What?", "assistant": "That.", "source": "x"}]
    rows = [{"images": [{"bytes": picture(9, 4), "path": None}] * count, "texts": texts} for count in (3, 64, 65, 70)]
    (tmp_path / "download" / "ai2d").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "download" / "ai2d" / "train-0.parquet")
    for limit, frames in ((None, [3, 64]), (65, [3, 64, 65]), (4096, [3, 64, 65, 70])):
        root = tmp_path / str(limit)
        options = {} if limit is None else {"max_frames": limit}
        report = cauldron(tmp_path / "download", root, None, SIZE, processes=1, **options)
        assert ShardSet(root).columns["frames"].tolist() == frames
        reasons = json.loads((root / "cauldron-000000.failed.json").read_text())["failed"]
        assert (report["failed"], len(reasons)) == (4 - len(frames), 4 - len(frames))
        assert all(f"more than max_frames={limit or 64}" in reason for reason in reasons)
    with pytest.raises(ValueError, match="max_frames=0: a sample has 1 to 4096"):
        cauldron(tmp_path / "download", tmp_path / "none", max_frames=0)


# ---- WebVid ----------------------------------------------------------------------------------------------------------


def test_cauldron_images_are_as_viewers_show_them() -> None:
    maker = CauldronMaker(16, "stretch", 64, Path())
    hidden, upright = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(hidden, "PNG")
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x112] = 6  # to be rotated clockwise by 90 degrees
    Image.fromarray(half).save(upright, "JPEG", quality=95, exif=exif.tobytes())
    assert (np.asarray(Image.open(io.BytesIO(maker._image(hidden.getvalue())))) > 250).all()
    turned = np.asarray(Image.open(io.BytesIO(maker._image(upright.getvalue())))) > 128
    assert (turned == np.rot90(half, -1).astype(bool)).mean() > 0.95


def test_webvid_lists_with_videos(tmp_path: Path) -> None:
    source = tmp_path / "download"
    lines = [("11", "a", "A dog runs."), ("12", "a", "A cat sleeps."), ("13", "b", "Gone."), ("14", "b", " ")]
    lines += [("11", "a", "A dog runs again."), ("15", "b", "Cut off.")]
    write_video(tmp_path / "secret.mp4", 1)
    lines += [("../../../secret", "a", "x"), ("secret", "../..", "x"), (str(tmp_path / "secret"), "", "x")]
    lines += [("../a/11", "b", "x")]
    for name, folder, seconds in (("11", "a", 3), ("12", "a", 0.5), ("14", "b", 1), ("15", "b", 6)):
        path = write_video(source / "videos" / folder / f"{name}.mp4", seconds)
        if name == "15":
            path.write_bytes(path.read_bytes()[:600])
    with (source / "results_2M_val.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        writer.writerows([(key, "https://example.org", "PT00H00M03S", folder, name) for key, folder, name in lines])
    report = webvid(source, tmp_path / "set", SIZE, videos_per_shard=2, workers=2, max_failed_share=0.8)
    assert (report["samples"], report["failed"]) == (2, 7)
    found = samples(tmp_path / "set")
    reasons = "".join(path.read_text() for path in (tmp_path / "set").rglob("*.failed.json"))
    assert reasons.count("lies outside of") == 3
    assert "its videoid '../a/11' is a path" in reasons
    assert shades(found["11"].frames) == [0, 1, 2]
    assert len(found["12"].frames) == 1
    assert [turn.text for turn in found["11"].conversations[0].turns] == [REQUEST, "A dog runs."]
    assert found["11"].conversations[0].kind == "caption"
    assert validate(tmp_path / "set")["errors"] == 0


def test_a_webvid_list_with_zeros_over_line_ends_is_refused(tmp_path: Path) -> None:
    """Two rows would be read as one."""
    rows = ["videoid,page_dir,name", "11,a,A dog runs.", "12,a,A cat sleeps.", "13,a,Gone."]
    (tmp_path / "list.csv").write_text("\r\n".join(rows))
    assert [row.key for row in webvid_rows(tmp_path)] == ["11", "12", "13"]
    damaged = "\r\n".join(rows).replace("cat sleeps.\r\n13,a,", "\0" * 18)
    (tmp_path / "list.csv").write_text(damaged)
    with pytest.raises(ValueError, match=r"list\.csv: line 3 contains a NUL byte: the file is damaged or not UTF-8"):
        webvid_rows(tmp_path)


def test_frames_of_long_videos_keep_their_seconds(tmp_path: Path) -> None:
    """If a video has more seconds than the wanted number of frames, evenly spaced frames with their times are used."""
    source = tmp_path / "download"
    write_video(source / "videos" / "a" / "11.mp4", 7)
    (source / "list.csv").write_text("videoid,page_dir,name\n11,a,x\n")
    given = [
        {"video": name, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "This."}]}
        for name, asked in (("videos/a/11.mp4", "<video>What?"), (["videos/a/11.mp4"] * 2, "<video><video>What?"))
    ]
    (source / "list.json").write_text(json.dumps(given))
    webvid(source, tmp_path / "webvid", SIZE, workers=1, max_frames=3)
    (sample,) = samples(tmp_path / "webvid").values()
    assert (shades(sample.frames), sample.seconds) == ([0, 3, 6], (0.0, 3.0, 6.0))
    webvid(source, tmp_path / "whole", SIZE, workers=1)
    assert samples(tmp_path / "whole")["11"].seconds == tuple(float(n) for n in range(7))
    video_sft(source, tmp_path / "sft", SIZE, workers=1, max_frames=6, max_failed_share=0.9)
    found = samples(tmp_path / "sft")
    assert found["list-00000000"].seconds == pytest.approx([0, 1.2, 2.4, 3.6, 4.8, 6], abs=1e-6)
    assert "list-00000001" not in found  # it has 12 frames
    video_sft(source, tmp_path / "both", SIZE, workers=1, max_frames=20)
    assert samples(tmp_path / "both")["list-00000001"].seconds == ()  # it has frames of two videos
    with pytest.raises(ValueError, match="max_frames=0: a sample has 1 to 4096"):
        webvid(source, tmp_path / "none", SIZE, max_frames=0)
    for prepare in (webvid, video_sft):
        with pytest.raises(ValueError, match="fit='Crop': must be one of stretch, crop, pad"):
            prepare(source, tmp_path / "none", SIZE, fit="Crop")  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"0 processes cannot write .*: at least 1, or null"):
            prepare(source, tmp_path / "none", SIZE, workers=0)  # type: ignore[operator]
    assert not (tmp_path / "none").exists()


def test_webvid_tar_files_also_when_cut_off(tmp_path: Path) -> None:
    source = tmp_path / "download"
    video = write_video(tmp_path / "v.mp4", 2).read_bytes()
    cut = 2 * (512 + -(-len(video) // 512) * 512 + 1024) + 512 + 100  # in the third video
    for shard in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number in range(3):
                text = (
                    {"txt": b"Caption %d." % number}
                    if shard
                    else {"json": json.dumps({"caption": "In JSON."}).encode()}
                )
                for part, content in {"mp4": video, **text}.items():
                    member = tarfile.TarInfo(f"{shard}{number}.{part}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        source.mkdir(exist_ok=True)
        content = buffer.getvalue()
        (source / f"0000{shard}.tar").write_bytes(content if shard == 0 else content[:cut])
    report = webvid(source, tmp_path / "set", SIZE, workers=1)
    found = samples(tmp_path / "set")
    assert set(found) == {"00000-00", "00000-01", "00000-02", "00001-10", "00001-11"}
    assert report["failed"] == 1
    assert found["00001-11"].conversations[0].turns[1].text == "Caption 1."
    assert found["00000-00"].conversations[0].turns[1].text == "In JSON."
    assert shades(found["00001-11"].frames) == [0, 1]


def test_webvid_tar_files_of_other_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names in upper case, two tars joined into one, a sample without a video; next to the list used for the
    download."""
    source = tmp_path / "download"
    source.mkdir()
    (source / "results.csv").write_text("videoid,page_dir,name\n1,a,x\n")
    video = write_video(tmp_path / "v.mp4", 2).read_bytes()

    def packed(**members: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name.replace("_", "."))
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    (source / "0.tar").write_bytes(
        packed(a_MP4=video, a_TXT=b"Upper.", b_txt=b"Failed.") + packed(c_mp4=video, c_txt=b"C")
    )
    report = webvid(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.9)
    assert (report["samples"], report["failed"]) == (1, 2)
    assert set(samples(tmp_path / "set")) == {"0-a"}
    assert "it holds no video, only txt" in caplog.text
    assert "goes on after the end mark" in caplog.text
    assert "the lists (*.csv), beside which there is no videos/, are not read" in caplog.text


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def told(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", small_video()), (f"{key}.txt", f"caption {key}".encode())]


A, B = told("a"), told("b")
NOTE = b"\0\5\x16\7"  # the first bytes of AppleDouble files of macOS
# name: members of a tar file, keys of the samples, log messages about others
TARS: dict[str, tuple[list[tuple[str, bytes]], set[str], list[str]]] = {
    "one sample after the other": ([*A, *B], {"a", "b"}, []),
    "all videos, then all texts": ([A[0], B[0], A[1], B[1]], {"a", "b"}, []),
    "notes of macOS between parts": (
        [("._a.mp4", NOTE), A[0], ("._a.txt", NOTE), A[1], ("__MACOSX/._b.mp4", NOTE), *B],
        {"a", "b"},
        [],
    ),
    "notes of macOS before a sample": ([("._a.mp4", NOTE), ("._a.txt", NOTE), *A], {"a"}, []),
    "two videos": ([*A, ("a.webm", small_video()), *B], {"b"}, ["a of", "it holds mp4, webm: one video, or images"]),
    "a key twice": ([*A, *B, *A], {"b"}, ["a of", "the key stands for two samples"]),
    "no caption": ([A[0], *B], {"b"}, ["a of", "it has no caption: neither txt nor json"]),
    "a json without a caption": ([A[0], ("a.json", b'{"id": 3}'), *B], {"b"}, ["no `caption` in its json"]),
    "a json of a list": ([A[0], ("a.json", b'[{"caption": "c"}]'), *B], {"b"}, ["no `caption` in its json"]),
    "a caption of a number": ([A[0], ("a.json", b'{"caption": 3}'), *B], {"b"}, ["its caption is not text"]),
    "an image beside": ([*A, ("a.jpg", b"\xff\xd8"), *B], {"a", "b"}, []),  # a downloader's thumbnail
    "a json with NaN": ([A[0], ("a.json", b'{"caption": "caption a", "score": NaN}'), *B], {"a", "b"}, []),
    "a byte order mark": ([A[0], ("a.txt", b"\xef\xbb\xbfcaption a"), *B], {"a", "b"}, []),
    "keys with dots": ([("v.a.mp4", A[0][1]), ("v.a.txt", b"c"), *B], {"b"}, ["it holds no video, only a.mp4, a.txt"]),
}


@pytest.mark.parametrize("name", TARS)
def test_webvid_tar_members_become_samples_or_are_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members, keys, said = TARS[name]
    write_tar(tmp_path / "download" / "0.tar", members)
    report = webvid(tmp_path / "download", tmp_path / "set", SIZE, workers=1)
    found = samples(tmp_path / "set")
    assert set(found) == {f"0-{key}" for key in keys}
    assert all(found[f"0-{key}"].conversations[0].turns[1].text == f"caption {key}" for key in keys)
    assert report["failed"] == bool(said)
    assert all(what in caplog.text for what in said)


def test_webvid_tar_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "download"
    write_tar(source / "a.tar", A)
    write_tar(source / "B.TAR", B)
    write_tar(source / "c.tar.gz", told("c"), "w:gz")
    write_tar(source / "d.tar", told("d"), "w:gz")
    (source / "._a.tar").write_bytes(NOTE)
    (source / "._c.tar.gz").write_bytes(NOTE)
    (source / "._list.csv").write_bytes(NOTE + b"\xff")
    report = webvid(source, tmp_path / "set", SIZE, workers=1)
    assert set(samples(tmp_path / "set")) == {"a-a", "B-b"}
    assert report["failed"] == 2
    for name in ("c.tar.gz", "d.tar"):
        assert f"{name} is compressed, and samples are read at random: unpack it to a plain .tar first" in caplog.text
    assert "._" not in caplog.text
    with pytest.raises(
        ValueError, match=r"1 of 4 tar files in .* are compressed, more than max_failed_share=0.1 allows"
    ):
        webvid(source, tmp_path / "strict", SIZE, workers=1, max_failed_share=0.1)
    for name in ("a.tar", "B.TAR", "d.tar"):
        (source / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.tar\.gz is compressed"):
        webvid(source, tmp_path / "none", SIZE)


def test_webvid_keeps_what_lies_before_a_cut(tmp_path: Path) -> None:
    """The cut is within a member, between two members, or before the end mark."""
    whole = write_tar(tmp_path / "whole.tar", [*A, *B]).read_bytes()
    second = 512 * 3 + -(-len(A[0][1]) // 512) * 512  # where b.mp4 begins
    cuts = {"within": second + 600, "between": second, "end": len(whole.rstrip(b"\0")) // 512 * 512 + 512}
    for name, cut in cuts.items():
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        *found, last = tar_samples(tmp_path / "cut.tar")
        assert [sample[0] for sample in found] == (["a", "b"] if name == "end" else ["a"]), name
        assert "cut.tar is cut off" in last.reason, name
        assert last.reason.endswith("its videos up to there are kept"), name


def test_webvid_says_which_of_two_captions_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "LIST.CSV").write_text("videoid,page_dir,name\n1,p,one\n1,p,one\n2,p,two\n1,p,other\n")
    assert [row.text for row in webvid_rows(tmp_path)] == ["one", "two"]
    assert "1 rows give a video another caption; the first is kept (1, ...)" in caplog.text


def test_webvid_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no list \(\*\.csv beside videos/\) and no tar files in"):
        webvid(tmp_path, tmp_path / "out")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv: it has no column 'videoid': is it a list of WebVid"):
        webvid(tmp_path, tmp_path / "out")


def test_webvid_names_that_are_no_keys_become_keys_of_their_own(tmp_path: Path) -> None:
    source, long, foreign = tmp_path / "download", "x" * 95, "\u89c6\u9891" * 20
    names = [["a/b", "a-b", foreign, "plain", long], [long]]
    for number, told_names in enumerate(names):
        write_tar(source / f"{number}.tar", [part for name in told_names for part in told(name)])
    report = webvid(source, tmp_path / "set", SIZE, workers=1)
    assert (report["samples"], report["failed"]) == (6, 0)
    found = samples(tmp_path / "set")
    assert {sample.conversations[0].turns[1].text for sample in found.values()} == {
        f"caption {name}" for name in {*names[0], *names[1]}
    }
    assert len(found) == 6
    assert {"0-plain", "0-a-b"} < set(found)
    assert all(len(key.encode()) <= 90 for key in found)


def test_keys_of_names() -> None:
    assert sample_key("0-plain") == "0-plain"
    assert sample_key("x" * 90) == "x" * 90
    others = ["a/b", "a.b", "a-b", "x" * 91, "x" * 92, "\u89c6" * 31, "a\udcff", "a?"]
    keys = [sample_key(name) for name in others]
    assert len(set(keys)) == len(others)
    assert all(1 <= len(key.encode()) <= 90 and not set("./") & set(key) for key in keys)
    root = Path("/data")
    paths = [root / name for name in ("a.json", "list/b.json", "list-b.json", "c.json", "c.jsonl")]
    first = file_keys(root, paths)
    assert first[0] == "a"
    assert len(set(first)) == 5


# ---- video instructions ----------------------------------------------------------------------------------------------


def test_video_instructions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "download"
    write_video(source / "videos" / "a.mp4", 4)
    Image.fromarray(np.full((20, 30, 3), 110, np.uint8)).save(source / "videos" / "b.jpg")
    said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A test."}]
    plain = [{**said[0], "value": "What is this?"}, said[1]]
    entries = [
        {"id": 1, "video": "videos/a.mp4", "conversations": said + plain},
        {"id": 2, "image": ["videos/b.jpg", "videos/b.jpg"], "conversations": said * 2},
        {"id": 3, "conversations": [{**said[0], "value": "What?"}, said[1]], "answers": ["a test", "test"]},
        {"id": 4, "video": "videos/gone.mp4", "conversations": said},
        {"id": 5, "video": "videos/a.mp4", "conversations": [{"from": "bird", "value": "x"}]},
        {"id": 6, "conversations": said},
        {"id": 7, "video": "videos/a.mp4", "image": "videos/b.jpg", "conversations": said},
        {"id": 8, "video": "videos/a.mp4", "QA": [{"q": "x", "a": "y"}]},
        {
            "id": 9,
            "videos": ["videos/a.mp4"],
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        },
        {"id": 10, "video": "../secret.mp4", "conversations": said},
        {"id": 11, "image": "/etc/passwd", "conversations": said},
        {"id": 12, "videos": 7, "conversations": said},
        {"id": 13, "videos": ["videos/a.mp4", 7], "conversations": said},
        {"id": 14, "video": "videos/a.mp4", "conversations": "What?"},
        {"id": 15, "video": "videos/a.mp4", "conversations": ["What?"]},
        {"id": 16, "video": "videos/a.mp4", "conversations": said, "start": 1, "end": 2},
        {"id": 17, "video": "videos/moving.webp", "conversations": said},
    ]
    write_video(tmp_path / "secret.mp4", 4)
    still = [Image.fromarray(np.full((20, 30, 3), shade, np.uint8)) for shade in (40, 90)]
    still[0].save(source / "videos" / "moving.webp", save_all=True, append_images=still[1:], duration=1000)
    (source / "scenes.json").write_text(json.dumps([{"scene": 1}]))
    (source / "list.json").write_text(json.dumps(entries))
    (source / "more.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries[:1]))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.8)
    assert (report["samples"], report["failed"]) == (6, 12)
    reasons = "\n".join(json.loads((tmp_path / "set" / "sft-000000.failed.json").read_text())["failed"])
    for why in (
        "and none of video, videos, image, images names one",
        "it has video and image",
        "entry 7 of",
        "gone.mp4",
        "it names the file '../secret.mp4', which lies outside of",
        "it names the file '/etc/passwd', which lies outside of",
        "its `videos` is no list",
        "it names a file by '7', which is no text",
        "its `conversations` is no list",
        "a turn of its `conversations` is no object",
        "it has `start` or `end`",
    ):
        assert why in reasons
    assert "scenes.json is not read: none of its 1 entries has conversations or messages" in caplog.text
    found = samples(tmp_path / "set")
    assert shades(found["list-00000008"].frames) == [0, 1, 2, 3]
    assert shades(found["list-00000000"].frames) == [0, 1, 2, 3]
    assert [turn.text for turn in found["list-00000000"].conversations[0].turns] == ["What is this?", "A test."] * 2
    assert len(found["list-00000001"].frames) == 2
    moving = found["list-00000016"]
    assert moving.seconds == (0.0, 1.0)
    assert np.abs(moving.frames.mean((1, 2, 3)) - (40 * 2 / 3, 90 * 2 / 3)).max() < 4  # the mean includes black bars
    assert len(found["list-00000002"].frames) == 0
    assert found["list-00000002"].conversations[0].evidence == {"collection": "list", "answers": ["a test", "test"]}
    assert "more-00000000" in found
    (source / "list.json").write_text("{")
    with pytest.raises(ValueError, match=r"list\.json is not valid JSON"):
        video_sft(source, tmp_path / "other", SIZE)


def test_video_instructions_with_long_names_and_roles_in_capitals(tmp_path: Path) -> None:
    source = tmp_path / "download"
    source.mkdir()
    said = [{"from": "Human", "value": "What?"}, {"from": "GPT", "value": "That."}]
    lists = ("\u89c6\u9891\u6307\u4ee4\u6570\u636e\u96c6" * 5, "plain", "same")
    for name in lists:
        (source / f"{name}.json").write_text(json.dumps([{"conversations": said}] * 2))
    (source / "same.jsonl").write_text(json.dumps({"conversations": said}))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1)
    assert (report["samples"], report["failed"]) == (7, 0)
    found = samples(tmp_path / "set")
    assert len(found) == 7
    assert {"plain-00000000", "plain-00000001"} < set(found)
    assert [turn.role for turn in found["plain-00000000"].conversations[0].turns] == ["user", "assistant"]


def test_lists_in_capitals_are_read_and_notes_of_macos_are_not(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    entry = json.dumps({"conversations": said})
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "one.json").write_text(f"[{entry}]")
    (tmp_path / "download" / "TWO.JSON").write_text(f"[{entry}, {entry}]")
    (tmp_path / "download" / "THREE.JSONL").write_text(f"{entry}\n{entry[:-1]}\n{entry}\n")
    leave_notes(tmp_path / "download")
    report = video_sft(tmp_path / "download", tmp_path / "set", SIZE, workers=1)
    assert (report["samples"], report["failed"]) == (5, 1)
    assert {key.split("-")[0] for key in samples(tmp_path / "set")} == {"one", "TWO", "THREE"}


@pytest.mark.parametrize("lines", [False, True])
def test_what_an_entry_holds_beside_its_turns_refuses_neither_it_nor_the_list(lines: bool, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    listed = [
        {"conversations": turns, "score": float("nan"), "exif": "\ud83d"},
        {"conversations": [turns[0], {"from": "gpt", "value": "\ud83d"}]},
        {"conversations": turns},
    ]
    written = "\n".join(map(json.dumps, listed)) if lines else json.dumps(listed)
    (tmp_path / ("list.jsonl" if lines else "list.json")).write_text(written)
    found = entries(tmp_path)
    assert [bool(entry.problem) for entry in found] == [False, True, False]
    assert ("line 2" if lines else "entry 1 of") in found[1].problem


def test_answers_of_annotators_are_texts_or_objects_as_vqa_sets_have_them(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A test."}]
    objects = [
        {"answer": "a test", "answer_confidence": "yes", "answer_id": 1},
        {"raw_answer": "tests", "answer": "test", "answer_id": 2},
    ]
    refused = ["red", {"answer": "red"}, [1], [{"raw_answer": "red"}], [{"answer": 3}], 5, False, [["red"]]]
    given = [objects, ["a test", *objects], None, [], *refused]
    source = tmp_path / "source"
    source.mkdir()
    (source / "list.json").write_text(json.dumps([{"conversations": said, "answers": each} for each in given]))
    found = entries(source)
    both = ("a test", "test")
    assert [entry.answers for entry in found[:4]] == [both, ("a test", *both), (), ()]
    assert [entry.problem for entry in found[:4]] == [""] * 4
    for number, entry in enumerate(found[4:], 4):
        assert entry.problem.startswith(f"entry {number} of {source / 'list.json'}: its `answers` are no list")
    video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.9)
    kept = samples(tmp_path / "set")["list-00000000"].conversations[0]
    assert kept.evidence == {"collection": "list", "answers": ["a test", "test"]}


@pytest.mark.parametrize("below", [True, False])
def test_a_set_is_not_written_where_it_is_read(below: bool, tmp_path: Path) -> None:
    """When the set is continued, its own lists and tar files would be read as a part of its source."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "list.json").write_text("[]")
    (tmp_path / "link").symlink_to(source)
    for root in (source, tmp_path / "link", source / "set" if below else source):
        with pytest.raises(ValueError, match=r"root=.* is .*source=.*: name a folder outside of it"):
            (video_sft if below else webvid)(source, root, SIZE)
    assert [path.name for path in source.iterdir()] == ["list.json"]


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_videos_may_also_lie_whole_in_shards(tmp_path: Path) -> None:
    from shard_sets import conversations

    from keygrip.data.shards.writer import ShardWriter, write_manifest
    from keygrip.data.video_text.conversations import describe_video_text, video_text_parts

    parts, _ = video_text_parts([], conversations("v"), "x")
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add(
            "v",
            {**parts, "mp4": write_video(tmp_path / "v.mp4", 3).read_bytes()},
            describe_video_text({**parts, "mp4": (tmp_path / "v.mp4").read_bytes()}),
        )
    write_manifest(tmp_path, describe_video_text, progress=False)
    shards = ShardSet(tmp_path)
    assert shards.columns["frames"].tolist() == [3]
    assert shades(read_sample(shards, 0, SIZE).frames) == [0, 1, 2]


def test_fits() -> None:
    from keygrip.data.video_text.conversations import fit_image

    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    cropped, padded, stretched = (fit_image(Image.fromarray(wide), 20, fit) for fit in ("crop", "pad", "stretch"))
    assert cropped[:, 2:-2].min() > 190
    assert padded[:3].max() < 10
    assert padded[10, 10, 0] > 190
    assert padded[10, 2, 0] < 10
    assert stretched[0, 10, 0] > 190
    assert stretched[0, 1, 0] < 10


def test_system_turns_placeholders_with_brackets_and_media_under_other_keys(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "videos").mkdir(parents=True)
    write_video(source / "videos" / "a.mp4", 2)
    shown = "<|vision_start|><|image_pad|><|vision_end|> What?"
    said = [{"from": "human", "value": shown}, {"from": "gpt", "value": "This <image> that."}]
    plain = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This, in b.mp4"}]
    given = [
        {"video": "videos/a.mp4", "system": "Be brief.", "conversations": said},
        {"system": "Two.", "conversations": [{"from": "system", "value": "One."}, *plain]},
        {"id": "b.mp4", "conversations": plain},
        {"video_path": "videos/gone.mp4", "conversations": plain},
        {"what": ["videos/a.mp4"], "conversations": plain},
        {"conversations": [{"from": "human", "value": "What is <video> in HTML?"}, said[1]]},
    ]
    (source / "list.json").write_text(json.dumps(given))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.9)
    assert (report["samples"], report["failed"]) == (4, 2)
    reasons = "\n".join(json.loads((tmp_path / "set" / "sft-000000.failed.json").read_text())["failed"])
    assert "its `video_path` names an image or a video; known are video, videos, image, images" in reasons
    assert "its `what` names an image or a video" in reasons
    turns = {key: sample.conversations[0].turns for key, sample in samples(tmp_path / "set").items()}
    first = [(turn.role, turn.text) for turn in turns["list-00000000"]]
    assert first == [("system", "Be brief."), ("user", "What?"), ("assistant", "This <image> that.")]
    assert [turn.text for turn in turns["list-00000001"]] == ["One.", "What?", "This, in b.mp4"]
    assert len(turns["list-00000002"]) == 2
    assert [turn.text for turn in turns["list-00000005"]] == ["What is <video> in HTML?", "This <image> that."]


def test_placeholders_are_as_many_as_what_is_shown(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_video(source / "a.mp4", 3)
    Image.fromarray(np.full((20, 30, 3), 110, np.uint8)).save(source / "b.jpg")
    two = "Picture 1: <image>\nPicture 2: <image>\n?"
    given: list[tuple[dict[str, Any], str]] = [
        ({"image": ["b.jpg", "b.jpg"]}, two),
        ({"image": ["b.jpg", "b.jpg"]}, "Which?"),
        ({"image": ["b.jpg", "b.jpg"]}, "<image_1> <image_2> What is in <image_1>?"),
        ({"image": "b.jpg"}, "<image>\nWhich page uses the <video> tag?"),
        ({"image": "b.jpg"}, "<img>videos/b.jpg</img>\nWhich page uses the <video> tag?"),
        ({"video": "a.mp4"}, "<image>\n?"),
        ({"video": "a.mp4"}, "<image><image><image>\n?"),
        ({"image": "b.jpg"}, two),
        ({"image": ["b.jpg", "b.jpg"]}, "<image>\n?"),
        ({"video": "a.mp4"}, "<video><video>?"),
        ({"image": "b.jpg"}, "<image>\n"),
    ]
    entries = [
        media | {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "This."}]}
        for media, asked in given
    ]
    (source / "list.json").write_text(json.dumps(entries))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.9)
    assert (report["samples"], report["failed"]) == (7, 4)
    reasons = json.loads((tmp_path / "set" / "sft-000000.failed.json").read_text())["failed"]
    for reason, why in zip(
        reasons,
        (
            "2 placeholders, and its images or videos are 1:",
            "1 placeholders, and its images or videos are 2: give each its own, leave all out, or show several images "
            "as the frames of one <video>",
            "2 placeholders, and its images or videos are 1 or 3:",
            "an answer follows a user's turn without words",
        ),
        strict=True,
    ):
        assert why in reason
    found = samples(tmp_path / "set")
    asked = [found[f"list-{number:08d}"].conversations[0].turns[0].text for number in (0, 3, 4)]
    assert asked == ["Picture 1:\nPicture 2:\n?", *["Which page uses the <video> tag?"] * 2]


def test_several_images_may_be_the_frames_of_one_video(tmp_path: Path) -> None:
    """In this case one placeholder is enough, and the images have a common time."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        Image.fromarray(np.full((20, 30, 3), 110, np.uint8)).save(source / name)
    files = ["0.jpg", "1.jpg", "2.jpg"]
    given: list[tuple[str, str, bool]] = [
        ("video", "<video>\nWhat happens?", True),
        ("videos", "<video>\nWhat happens?", True),
        ("video", "<image>\nWhat happens?", True),
        ("videos", "What happens?", True),
        ("images", "<video>\nWhat happens?", True),
        ("images", "<image><image><image>\nWhat happens?", False),
        ("image", "<image>\nWhat happens?", False),
        ("video", "<video><video>\nWhat happens?", True),
    ]
    entries = [
        {key: files, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "This."}]}
        for key, asked, _ in given
    ]
    (source / "list.json").write_text(json.dumps(entries))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.9)
    assert (report["samples"], report["failed"]) == (6, 2)
    found = samples(tmp_path / "set")
    assert list(found) == [f"list-{number:08d}" for number in range(6)]
    for sample, (_, _, timed) in zip(found.values(), given, strict=False):
        assert len(sample.frames) == 3
        assert sample.seconds == ((0.0, 1.0, 2.0) if timed else ())


def test_content_may_be_a_list_of_items(tmp_path: Path) -> None:
    """The form is that of Hugging Face's chat templates; the files are given next to the turns, or in the items."""
    source = tmp_path / "source"
    source.mkdir()
    write_video(source / "a.mp4", 2)
    Image.fromarray(np.full((20, 30, 3), 110, np.uint8)).save(source / "b.jpg")

    def talk(*items: dict[str, str]) -> dict[str, Any]:
        asked = {"role": "user", "content": [*items, {"type": "text", "text": "What is <video> in HTML?"}]}
        return {"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": "A tag."}]}]}

    image, shown = {"type": "image"}, {"type": "image", "image": "b.jpg"}
    entries = [
        {"video": "a.mp4", **talk({"type": "video"})},
        talk({"type": "video", "path": "a.mp4"}),
        talk(shown, shown),
        talk(shown, image),
        {"image": "b.jpg", **talk(shown)},
        talk(image),
        {"image": "b.jpg", **talk({"type": "audio"})},
    ]
    (source / "list.json").write_text(json.dumps(entries))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.9)
    assert (report["samples"], report["failed"]) == (3, 4)
    found = samples(tmp_path / "set")
    assert [len(found[f"list-{number:08d}"].frames) for number in range(3)] == [2, 2, 2]
    for sample in found.values():
        said = [(turn.role, turn.text) for turn in sample.conversations[0].turns]
        assert said == [("user", "What is <video> in HTML?"), ("assistant", "A tag.")]
    reasons = json.loads((tmp_path / "set" / "sft-000000.failed.json").read_text())["failed"]
    whys = (
        "name 1 files, and others",
        "it has image and items that name files",
        "none of video,",
        "an item of a turn is",
    )
    for reason, why in zip(reasons, whys, strict=True):
        assert why in reason


def test_lists_in_a_folder_may_name_files_of_a_folder_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_video(source / "videos" / "a.mp4", 2)
    (source / "annotations").mkdir()
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    entries = [{"video": "../videos/a.mp4", "conversations": turns}, {"video": "v\0.mp4", "conversations": turns}]
    (source / "annotations" / "train.json").write_text(json.dumps(entries))
    report = video_sft(source, tmp_path / "set", SIZE, workers=1, max_failed_share=0.8)
    assert (report["samples"], report["failed"]) == (1, 1)
    (source / "annotations" / "train.json").write_text(json.dumps(entries[1:]))
    with pytest.raises(ValueError, match=r"that can be used; the first: .*no file can be called"):
        video_sft(source, tmp_path / "none", SIZE, workers=1)

"""Every setting that `--help` lists is documented: by the comment next to it in its YAML file, or next to its
parent."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from keygrip.config import compose, group_options
from keygrip.help import EXAMPLES, help_text
from keygrip.models.foveated_vlm.baseline import PooledVLM
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.serve import _refuse_openness

# a data set that fits each model
DATA = {
    **dict.fromkeys(("foveated_vlm", "pooled_vlm"), "robot_videos"),
    **dict.fromkeys(("vlm_encoder_self_supervised", "vlm_encoder_pretraining"), "robot_tours"),
    **dict.fromkeys(("patch_dit", "patch_dit_base", "patch_dit_source", "image_autoencoder"), "robot_images"),
    "depth_reader": "yam_stills",
    **dict.fromkeys(("geometry_vla", "geometry_vla_no_injection"), "yam_language"),
}
# a model that reads each data set
MODEL = {
    **dict.fromkeys(("yam", "yam_stills"), "volume_query"),
    **dict.fromkeys(("yam_language", "yam_depth"), "geometry_vla"),
    **dict.fromkeys(("robot_images", "image_shards"), "patch_dit"),
}
# options with settings of their own
OWN = [
    ["model=foveated_vlm", "data=robot_videos", "language=qwen2_5_0_5b"],
    ["model=geometry_vla", "data=yam_language", "vlm=qwen2_5_vl", "geometry=mapanything"],
    ["model=geometry_vla", "data=yam_language", "geometry=dino_multiview_pretrained"],
    ["model=patch_dit", "data=robot_images", "encoders=flux_t5_dinov3"],
    ["model=patch_dit", "data=robot_images", "encoders=own_autoencoder"],
    ["rotation=kmeans", "optimizer=muon", "logger=wandb", "compile=inductor", "closed_loop=yam"],
]
CASES = [(command, []) for command in EXAMPLES]
CASES += [("train", [f"model={name}", f"data={DATA.get(name, 'yam')}"]) for name in group_options("model")]
CASES += [
    ("train", [f"model={MODEL.get(name, 'foveated_vlm')}", f"data={name}"])
    for name in group_options("data")
    if name not in ("cauldron", "video_sft", "webvid")  # parts of a stage's sources, not data sets by themselves
]
CASES += [("train", overrides) for overrides in OWN]
CASES += [("prepare", [f"step={name}"]) for name in group_options("step")]


@pytest.mark.parametrize(
    ("command", "overrides"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_setting_has_its_reason(command: str, overrides: list[str]) -> None:
    importlib.import_module(f"keygrip.{command}")
    text = help_text(command, overrides)
    _, _, settings = text.partition("\nSettings:\n")
    listed = settings.partition("\n\n")[0].splitlines()
    if command != "prepare" or overrides:
        assert listed
    assert [line for line in listed if "  # " not in line] == []
    assert max(map(len, listed), default=0) <= 120


def test_the_mode_of_generate_is_explained_with_every_mode() -> None:
    importlib.import_module("keygrip.generate")  # registers the types of its settings
    (line,) = (line for line in help_text("generate", []).splitlines() if line.startswith("  mode="))
    for mode in (*FoveatedVLM.modes, *PooledVLM.modes):
        assert mode in line


def test_a_setting_that_passes_another_on_is_not_listed_under_its_sections_comment() -> None:
    assert "model.network.image_size=" not in help_text("train", [])  # ${backbone.image_size}, which is listed


def test_a_group_that_is_left_out_has_no_settings_in_the_help() -> None:
    with_it = help_text("train", ["experiment=demo"])
    assert "\n  callbacks.closed_loop." in with_it
    without = help_text("train", ["experiment=demo", "~closed_loop"])
    assert "closed_loop" not in without.partition("\nSettings:\n")[2].partition("\n\n")[0]
    assert without == help_text("train", ["experiment=demo", "closed_loop=null"])
    with pytest.raises(ConfigCompositionException, match="closed_lop"):
        help_text("train", ["experiment=demo", "~closed_lop"])


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_the_help_of_a_sweep_is_that_of_its_first_job(flag: str) -> None:
    job = help_text("train", ["model=coordinate_regression", "seed=3", "optimizer.lr=1e-4", "data.root='a,b'"])
    assert re.search(r"^  seed=3 .*\n(.*\n)*  optimizer\.lr=0\.0001 ", job, re.MULTILINE)
    sweep = ["model=glob(coord*)", "seed=range(3,6)", "optimizer.lr=1e-4,5e-5", "data.root='a,b'"]
    assert help_text("train", [flag, *sweep]) == job
    assert "\n  data.root=Übung " in help_text("train", [flag, "data.root=Übung,b"])
    with pytest.raises(ConfigCompositionException, match=r"Ambiguous value for argument 'optimizer\.lr=1e-4,5e-5'"):
        help_text("train", ["optimizer.lr=1e-4,5e-5"])


def test_examples_of_the_server_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYGRIP_TOKEN", "t" * 43)
    for example in EXAMPLES["serve"]:
        _refuse_openness(compose("serve", [part.strip("'") for part in example.split()]))


@pytest.mark.parametrize("command", ["prepare", "run", "train"])
def test_reasons_stand_whole_in_lines_of_a_terminal(command: str) -> None:
    importlib.import_module(f"keygrip.{command}")
    text = help_text(command, [])
    assert max(map(len, text.splitlines())) <= 120
    whole = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    if command == "run":
        assert "one of the steps that callbacks.checkpoint.keep has kept; null: the latest" in whole


def test_a_step_of_an_added_folder_is_listed_with_its_comment(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "weigh.yaml").write_text("# Weighs each demonstration.\ncall: {}\n")
    (tmp_path / "step" / "options.yaml").write_text("# Counts them.\nweigh_twice:\n  call: {}\n")
    text = help_text("prepare", ["--config-dir", str(tmp_path)])
    assert re.search(r"^  step=weigh +Weighs each demonstration\.$", text, re.MULTILINE)
    assert re.search(r"^  step=weigh_twice +Counts them\.$", text, re.MULTILINE)


def test_ablations_are_listed_with_the_model_whose_recipes_they_change() -> None:
    def listed(model: str) -> str:
        text = help_text("train", [f"model={model}", f"data={DATA.get(model, 'yam')}"])
        (ablation,) = re.findall(r"(?ms)^  ablation=null  \((.*?)\)$", text)
        return ablation

    found = [listed(name) for name in ("volume_query", "foveated_vlm", "geometry_vla", "patch_dit")]
    assert "vlm_claims/recipe" in found[1]
    assert "yam_depth/geometry_vla" in found[2]
    assert "yam_depth/volume_query" in found[0]
    assert "vlm_claims" not in found[0]
    shown = {name for text in found for name in re.split(r"[\s|]+", text)}
    assert {name.partition("/")[0] for name in group_options("ablation")} == {each.partition("/")[0] for each in shown}

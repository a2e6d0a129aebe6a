"""A user's mistake becomes one line with what, where and what to do: no traceback, and no half-written files."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException

from keygrip.command import _raise_on_signals, describe_error
from keygrip.config import compose
from keygrip.training import results, run_folder
from keygrip.training.signals import Interrupted, SweepInterrupted

TOY = ["--config-dir", str(Path(__file__).parent / "support" / "conf"), "model=toy", "data=toy", "strategy=cpu"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["model=volum_query"],
            2,
            r"no option 'volum_query' in group 'model': nearest is model=volume_query; options are",
        ),
        (["modle=volume_query"], 2, r"no setting 'modle' in train.yaml: the nearest is 'model'"),
        (["max_step=3"], 2, r"no setting 'max_step' in train.yaml: the nearest is 'max_steps'"),
        (["optimizer.weight_deacy=3"], 2, r"'optimizer.weight_deacy' .* nearest is 'optimizer.weight_decay'"),
        (["weight_deacy=3"], 2, r"no setting 'weight_deacy' .* nearest is 'optimizer.weight_decay'"),
        (["+max_stepz=3"], 2, r"no setting 'max_stepz' .* nearest is 'max_steps'"),
        (["qqqqqqqq=3"], 2, r"no setting 'qqqqqqqq' in train.yaml: see all with `--help`"),
        (
            ["callbacks.qqqqqqqq=3"],
            2,
            r"no setting 'callbacks.qqqqqqqq' in train.yaml: see all with `--cfg job`",
        ),
        # Groups of which nothing is chosen.
        (["expriment=demo"], 2, r"no setting 'expriment' in train.yaml: the nearest is 'experiment'$"),
        (["ablaton=volume_query/none"], 2, r"no setting 'ablaton' in train.yaml: the nearest is 'ablation'$"),
        (["closed_lop=yam"], 2, r"no setting 'closed_lop' in train.yaml: the nearest is 'closed_loop'$"),
        # Only groups that the chosen model has.
        (
            ["model=foveated_vlm", "data=robot_tours", "closed_lop=yam"],
            2,
            r"no setting 'closed_lop' in train.yaml: see all with `--help`$",
        ),
        (["optimizer=adam"], 2, r"no option 'adam' .* nearest is optimizer=adamw; options are adamw, muon"),
        (["optimizer.learning_rate=1"], 2, r"nearest is 'optimizer.lr'"),
        (["backbone=dinov3_smal"], 2, r"nearest is backbone=dinov3_small.*; options are dinov2_base, .*tiny"),
        (["ablation=volume_query/no_stat"], 2, r"nearest is ablation=volume_query/no_state; options are"),
        (["ablation=vq_no_state"], 2, r"ablation=vq_no_state is now ablation=volume_query/no_state"),
        (["ablation=foveated_vlm/frozen_encoder"], 2, r"is now ablation=foveated_vlm/shared_query_path"),
        (["optimizer=vla_from_scratch"], 2, r"optimizer=vla_from_scratch is now optimizer=muon"),
        (["model=foveated_vlm", "model.collator.max_tokens=9"], 2, r"'model.collator.max_tokens' is now 'collator.max"),
        (["model=geometry_vla", "model.log_images=false"], 2, r"is now 'model.log_images_every_n_steps'"),
        (["model=geometry_vla", "vlm.prompt_order=images_first"], 2, r"is now vlm.prompt_order=visual_first$"),
        (["model=patch_dit", "data.make.options.picture.fovy_deg=3"], 2, r"now 'data.make.options.image.fovy_deg'"),
        # Settings of other models.
        (["vlm.width=999"], 2, r"no setting 'vlm.width' .*: vlm is a group of model=geometry_vla.* the nearest is '"),
        (["language.model.layers=77"], 2, r"language is a group of model=foveated_vlm, model=pooled_vlm; "),
        (["geometry.dim=3"], 2, r"geometry is a group of model=depth_reader, .* the nearest is '[a-z]"),
        (
            ["model=patch_dit", "data=robot_images", "backbone.width=3"],
            2,
            r"backbone is a group of .*model=depth_reader, .*model=geometry_vla, .*model=volume_query, ",
        ),
        # Another option of a group that the model has.
        (
            ["model=geometry_vla", "data=yam_language", "geometry=mapanything", "backbone.width=3"],
            2,
            r"no setting 'backbone.width' .*: backbone is a group of geometry=dino_multiview, [^;]*_pretrained; ",
        ),
        (["encoders.text.length=1"], 2, r"encoders is a group of model=image_autoencoder, .* the nearest is '[a-z]"),
        (
            ["model=coordinate_regression", "rotation.classes=5"],
            2,
            r"rotation is a group of model=volume_query.* the nearest is 'model.rotation_weight'",
        ),
        # With another mistake, or in a sweep, the nearest setting is still of the chosen model.
        (["model=geometry_vla", "data=yam_language", "geometry.dimm=1", "sed=0"], 2, r"the nearest is 'geometry.dim'$"),
        (
            ["-m", "model=geometry_vla", "data=yam_language", "seed=0,1", "geometry.dimm=64"],
            2,
            r"no setting 'geometry\.dimm' in train\.yaml: the nearest is 'geometry\.dim'$",
        ),
        (
            ["-m", "seed=interval(0,9)"],
            2,
            r"seed=interval\(0,9\): a sweep runs listed values and does not search an int",
        ),
        (["-m", "seed=interval(0,9)", "--help"], 2, r"seed=interval\(0,9\): a sweep runs listed values and does not s"),
        (["model=coordinate_regression", "rotation=kmeans"], 2, r"rotation is a group of model=volume_query"),
        (["language=smollm2_135m"], 2, r"language is a group of model=foveated_vlm"),
        (["model=foveated_vlm", "data=robot_videos", "closed_loop=yam"], 2, r"closed_loop is a group of model=coord"),
        (["callbacks.closed_loop.closed_loop.episodes=5"], 2, r"no setting .*: add closed_loop=NAME, one of .*yam"),
        (
            ["closed_loop=yam", "callbacks.closed_loop.closed_loop.episods=5"],
            2,
            r"nearest is '.*closed_loop\.episodes'",
        ),
        (["logger=wandb", "logger.wandb.job_type=eval"], 2, r"argument .* added with \+logger\.wandb\.job_type=VALUE$"),
        (["seed=abc"], 2, r"seed.*abc.*Integer"),
        (["max_steps=["], 2, r"cannot read max_steps=\[: no viable alternative"),
        (["run_dir=lr=0.1"], 2, r"cannot read run_dir=lr=0.1: .*in quotes, inside .* \"run_dir='lr=0.1'\"$"),
        (["run_dir=läufe(1)"], 2, r"cannot read run_dir=läufe\(1\): .*in quotes, inside .* \"run_dir='läufe\(1\)'\"$"),
        (["run_dir=it's"], 2, r"inside the shell's own: \"run_dir='it\\'s'\"$"),
        (["data.root=a,b"], 2, r"holds a comma: as a list write 'data.root=\[a,b\]', as one text \"data.root='a,b'\""),
        (["run_dir=Läufe, 2"], 2, r"cannot read run_dir=Läufe, 2: a value .* \"run_dir='Läufe, 2'\"$"),
        (["run_dir=out, 1"], 2, r"run_dir=out, 1 holds a comma: .*, as one text \"run_dir='out, 1'\", for a sweep"),
        (["data.root=Übung{1}"], 2, r"cannot read data.root=Übung\{1\}: a value .* \"data.root='Übung\{1\}'\"$"),
        (
            ["data.root='my folder"],
            2,
            r"cannot read data.root='my folder: its quote ' is not closed; .* \"data.root='my",
        ),
        (["data.root=a&b"], 2, r"cannot read data.root=a&b: a value .* \"data.root='a&b'\"$"),
        (["data.root=~/demos"], 2, r"cannot read data.root=~/demos: .* write data.root=\$HOME/demos$"),
        (["data.root=~anna/demos"], 2, r"cannot read data.root=~anna/demos: .* write the full path$"),
        (["data.root=[~/a, ~/b]"], 2, r'cannot read .*: write "data.root=\[\$HOME/a, \$HOME/b\]"$'),
        (["data.root=[~/a,~anna/b]"], 2, r"cannot read .*: write the full path$"),
        (["data.root=[größe,b]"], 2, r"root=\[größe,b\]: each text with signs such as umlauts .* stands in quotes"),
        (["model="], 2, r"no option '' in group 'model': options are coordinate_regression, .*volume_query_tuned$"),
        (["model.lr=1"], 2, r"no setting 'model.lr' in train.yaml: the nearest is 'optimizer.lr'"),
        (["bananas"], 2, r"cannot read bananas: settings are given as name=value$"),
        (
            ["callbacks=null"],
            2,
            r"callbacks=null: a group is chosen, not emptied: .* options are default; .*callbacks\.NAME=null$",
        ),
        (["model=null"], 2, r"model=null: a group is chosen, not emptied: its options are .*, volume_query_tuned$"),
        (
            ["-m", "ablation=null, volume_query/no_state"],
            2,
            r"volume_query/no_state: a sweep takes no null: run ablation=null as a command of its own$",
        ),
        (["--max_steps=3"], 2, r"no option --max_steps: settings are given without dashes, max_steps=3"),
        (["resume=true"], 1, r"nothing to resume: no run with a checkpoint in runs/\S+; leave out resume=true"),
        (["resume=no/such/folder"], 1, r"nothing to resume: no/such/folder does not exist"),
        (["run_dir=here", "resume=true"], 1, r"here/checkpoints/last.ckpt does not exist; leave out resume=true"),
        (["--config-name=nothing"], 2, r"no nothing\.yaml in keygrip's configs, nor in a folder added"),
        (["--config-path=/"], 2, r"no train\.yaml in the folder .* added to these with --config-dir FOLDER"),
        (["~seed"], 2, r"~seed leaves out a setting that is always read: give it another value, seed=VALUE"),
        (["model=coordinate_regression", "~vlm"], 2, r"no setting 'vlm' .*: vlm is a group of model=geometry_vla"),
        (["~data", "data.root=here"], 2, r"~data leaves out data.root, which this run needs"),
        (
            ["run_dir=${oc.env:NO_SUCH_FOLDER}/run"],
            2,
            r"run_dir takes its value from the environment variable NO_SUCH_FOLDER, which is not set: export NO_",
        ),
        (["run_dir="], 1, r"run_dir is an empty text, often a shell's variable that is not set: give a path, or run"),
        (["hydra.run.dir="], 2, r"hydra\.run\.dir is empty, which would be the present folder: name the run folder by"),
        (["resume="], 1, r"resume is an empty text, often a shell's variable that is not set: give a path"),
        (["-m", "seed=0,1", "hydra.sweep.dir="], 1, r"hydra\.sweep\.dir is an empty text, often a shell's variable"),
    ],
)
def test_settings_that_do_not_exist(
    arguments: list[str], code: int, said: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (code, "")
    lines = outcome.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("keygrip: ")
    assert re.search(said, lines[0]), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_folder_that_is_added_are_listed(cli: Callable[..., Any], tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nmax_steps: 8  # a look is enough\n")
    added = ("--config-dir", "mine")
    shown = cli("--help", *added, "experiment=mine").out
    assert re.search(r"^  experiment=mine +\(demo [^)]*\| mine\s+\|", shown, re.MULTILINE)
    assert re.search(r"^  max_steps=8 +# a look is enough$", shown, re.MULTILINE)
    assert " | mine |" in cli("--help", "--config-dir=mine").out
    assert "nearest is experiment=mine; options are demo," in cli(*added, "experiment=mime").err
    assert "the nearest is 'optimizer.lr'" in cli(*added, "experiment=mine", "optimizer.lrr=1").err


@pytest.mark.parametrize("folder", ["Übung (1), a'b", "com~apple/c&d=e"])
def test_the_path_of_an_added_folder_may_hold_any_signs(
    folder: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tmp_path / folder / "conf" / "experiment"
    experiment.mkdir(parents=True)
    name = f"as_file_{len(folder)}"
    (experiment / f"{name}.yaml").write_text("# @package _global_\nmax_steps: 8\n")
    (experiment / "options.yaml").write_text(f"# @package _global_\n{name}_section:\n  max_steps: 9\n")
    monkeypatch.chdir(tmp_path / folder)
    added = ("--config-dir", "conf")
    assert re.search(r"^  max_steps=8\b", cli(*added, f"experiment={name}", "--help").out, re.MULTILINE)
    assert re.search(r"^  max_steps=9\b", cli(*added, f"experiment={name}_section", "--help").out, re.MULTILINE)
    step = tmp_path / folder / "conf" / "step" / "weigh.yaml"
    step.parent.mkdir()
    step.write_text("# @package _global_\ngrams: 5\n")
    error = cli(*added, "step=weigh", "gramms=3", "other=4", of="prepare").err
    assert error == "keygrip: there is no setting 'gramms' in prepare.yaml: the nearest is 'grams'\n"


def test_motion_limits_are_left_out_by_the_name_of_their_section(cli: Callable[..., Any]) -> None:
    outcome = cli("checkpoint=x", "robot=yam", "motion_limits=null", of="run")
    assert outcome.code == 2
    assert outcome.err.endswith(
        "its options are default, slow; all of it is left out with limits=null, a part with limits.NAME=null\n"
    )
    run = ["checkpoint=x", "robot=yam"]
    assert compose("run", [*run, "limits=null"]).limits is None
    assert compose("run", [*run, "limits.table_height_m=null"]).limits.table_height_m is None


def test_models_of_an_added_folder_are_named_as_those_that_have_a_group(cli: Callable[..., Any]) -> None:
    Path("mine/model").mkdir(parents=True)
    Path("mine/model/my_vla.yaml").write_text("# @package _global_\ndefaults:\n  - geometry_vla\n  - /vlm: tiny\n")
    outcome = cli("--config-dir", "mine", "vlm.width=999")
    assert (outcome.code, "model=geometry_vla_no_injection, model=my_vla; " in outcome.err) == (2, True), outcome.err


@pytest.mark.parametrize("added", [("--config-dir", "mine"), ("hydra.searchpath=[file://more, file://mine]",)])
def test_sections_of_a_folder_that_is_added_are_options(
    added: tuple[str, ...], cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    mine = tmp_path / "mine" / "experiment" / "options.yaml"
    mine.parent.mkdir(parents=True)
    name = "small_demo" if "--config-dir" in added else "little_demo"
    mine.write_text(f"# @package _global_\n{name}:\n  defaults: [demo]\n  max_steps: 8  # a look is enough\n")
    assert cli(*added, f"experiment={name}", "--cfg", "job", "--package", "max_steps").out.split() == ["8"]
    shown = cli("--help", *added, f"experiment={name}").out
    assert re.search(r"^  max_steps=8 +# a look is enough$", shown, re.MULTILINE)
    assert f"nearest is experiment={name}; " in cli(*added, f"experiment={name[:-1]}a").err


@pytest.mark.parametrize("file", ["optimizer/adamw.yaml", "optimizer/options.yaml"])
def test_options_of_an_added_folder_with_names_of_keygrips_own_are_refused(
    file: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    mine = tmp_path / "mine" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("adamw:\n  lr: 7\n")
    outcome = cli("--config-dir", "mine", "dry_run=true")
    assert outcome.code == 2
    assert "mine has an option optimizer/adamw, and so has keygrip: one of the two would not be read" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("options", "mine: [1\n", r"no valid YAML: .*mine/optimizer/options.yaml., line 2"),
        ("mine", "lr: {\n", r"no valid YAML: .*mine/optimizer/mine.yaml., line 2"),
        ("options", "mine: 3\n", r"optimizer/options.yaml: an option is a name with settings below it"),
        ("options", "- mine\n", r"optimizer/options.yaml: an option is a name with settings below it"),
        ("options", "mine/adam:\n  lr: 1\n", r"optimizer/options.yaml: mine/adam is no name of an option, since"),
    ],
)
def test_faulty_files_of_an_added_folder_are_named(
    file: str, text: str, said: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "mine" / "optimizer"
    folder.mkdir(parents=True)
    (folder / f"{file}.yaml").write_text(text)
    outcome = cli("--config-dir", "mine", "optimizer=mine")
    assert outcome.code == 2
    assert re.search(said, outcome.err)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["data.fail=the folder x is empty"], 1, "keygrip: the folder x is empty"),
        (["+model.depth=3"], 2, "no setting 'model.depth': the nearest is 'model.width'"),
        (
            ["model.width=${oc.env:NO_WIDTH,'8'}"],
            2,
            "model.width='8': must be a whole number; this is text: leave",
        ),
        (["model._target_=their_own.Model"], 1, "pip install their_own, or, if it is your own, export PYTHONPATH=<"),
        (["optimizer.lr=fast"], 2, "optimizer.lr='fast': must be a finite number"),
        (["model.width=[8]"], 2, "model.width=[8]: must be a whole number"),
        (["max_steps=-7"], 1, "max_steps=-7: must be at least 1, or -1 for no limit"),
        (["max_minutes=nan"], 1, "max_minutes=nan: must be finite and above 0"),
        (["accumulate_grad_batches=0"], 1, "accumulate_grad_batches=0: must be at least 1"),
        (["seed=-1"], 1, "seed=-1: must lie in 0 to 4294967295"),
        (["optimizer.lr=-1"], 1, "optimizer.lr=-1: must be above 0"),
        (["optimizer.schedule=linear"], 1, "optimizer.schedule='linear': must be cosine or constant"),
        (["strategy.kind=tpu"], 1, "strategy.kind='tpu': must be one of single, ddp, fsdp"),
        (["callbacks.ema.decay=2"], 1, "callbacks.ema.decay=2: must lie in [0, 1)"),
        (["max_steps=-1", "max_epochs=-1", "max_minutes=1"], 1, "optimizer.schedule=cosine needs an end"),
    ],
)
def test_settings_that_cannot_work(arguments: list[str], code: int, said: str, cli: Callable[..., Any]) -> None:
    outcome = cli(*TOY, "logger=none", "run_dir=run", *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    last = outcome.err.splitlines()[-1]
    assert last.startswith("keygrip: ")
    assert said in last
    assert "Traceback" not in outcome.err
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+vlm.width=999"], r"nothing in this run reads 'vlm.width'.*vlm is a group of model=geometry_vla"),
        (
            ["model=geometry_vla", "data=yam_language", "geometry=mapanything", "+backbone.width=3"],
            r"nothing in this run reads 'backbone.width'.*backbone is a group of geometry=dino_multiview, ",
        ),
        (["shift=views"], r"callbacks.closed_loop has settings and no _target_.*add closed_loop=yam"),
        (["callbacks.ema=false"], r"callbacks.ema=false: it is left out with callbacks.ema=null"),
        (["callbacks.ema=none"], r"callbacks.ema=none: it is left out with callbacks.ema=null"),
        (["logger=tensorboard", "logger.tensorboard=false"], r"logger.tensorboard=false: .* logger.tensorboard=null"),
        (["+logger.wandb.project=mine"], r"logger.wandb has settings and no _target_.*: choose logger=wandb"),
        (["model=foveated_vlm", "data=yam"], r"learns from .* choose data="),
        (["optimizer=muon"], r"matrices_of=.*: no trainable matrix belongs to these parts.* optimizer=adamw"),
        (["+optimizer.lr_multipliers.backbne=0.1"], r"lr_multipliers: no trainable parameter's name .*'backbne'"),
        (["max_steps=-1"], r"optimizer.schedule=cosine needs an end: give max_steps or max_epochs"),
        (["callbacks.ema.decay=2"], r"callbacks.ema.decay=2: must lie in \[0, 1\)"),
        (
            ["callbacks.checkpoint.folder=elsewhere/checkpoints"],
            r"checkpoint.folder=elsewhere/checkpoints: .* in its folder, .*run/checkpoints: .* run_dir=FOLDER",
        ),
        (["callbacks.checkpoint.keep=-1", "dry_run=true"], r"callbacks.checkpoint.keep=-1: must"),
        (["logger=wandb"], r"logger=wandb needs the package wandb"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_data_are_recorded(
    arguments: list[str], said: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = cli("model=coordinate_regression", "data=yam", "logger=none", *arguments, "run_dir=run")
    assert outcome.code in (1, 2)
    assert re.search(said, outcome.err.splitlines()[-1]), outcome.err
    assert not Path("data").exists()


def test_an_environment_variable_that_is_not_set_is_named_with_its_setting(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    said = "data.root takes its value from the environment variable NO_SUCH_FOLDER, which is not set"
    outcome = cli("data.root=${oc.env:NO_SUCH_FOLDER}", "run_dir=run")
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\ndata:\n  root: ${oc.env:NO_SUCH_FOLDER}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(recipe)
    outcome = cli("--config-dir", "conf", "experiment=mine", "run_dir=run")
    assert (outcome.code, said in outcome.err) == (2, True), outcome.err


def test_a_gpu_that_is_not_there(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for strategy in ("gpu", "ddp", "fsdp"):
        outcome = cli(*TOY, f"strategy={strategy}", "run_dir=run")
        assert outcome.code == 1
        assert "strategy asks for a GPU and this machine has none" in outcome.err
        assert "choose strategy=cpu (or auto) on the command line" in outcome.err
        assert "the recipe set it, as experiment=yam_dinov3 does" in outcome.err
        assert "dry_run" not in outcome.err
    for strategy in ("ddp", "fsdp"):
        outcome = cli(*TOY, f"strategy={strategy}", "dry_run=true", "run_dir=dry")
        assert outcome.code == 1
        assert outcome.err.splitlines()[-1].endswith("or let dry_run=true count for N GPUs, with strategy.devices=N")


def test_wandb_that_is_not_installed(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = cli(*TOY, "logger=wandb", "run_dir=run")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "keygrip: logger=wandb needs the package wandb: pip install 'keygrip[wandb]', or choose logger=tensorboard"
    )


def test_a_full_disk_says_what_to_do(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a logger's writer raises it, without a name

    monkeypatch.setattr("keygrip.training.fit.log_settings", full)
    outcome = cli(*TOY, "logger=none", "run_dir=run")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("keygrip: No space left on device: the disk of the run folder,")
    assert outcome.err.endswith("continue with resume=true\n")
    assert "Traceback" not in outcome.err
    line, code = describe_error(OSError(errno.ENOSPC, ""), "prepare", [])
    assert (line.rpartition("; ")[2], code) == ("free some, and run the command again", 1)


def test_a_run_folder_that_takes_no_log_file_is_named(cli: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "run" / "train.log"
    log.mkdir(parents=True)  # even root, who may write everywhere, cannot open it
    outcome = cli(*TOY, f"run_dir={log.parent}")
    assert (outcome.code, outcome.err.splitlines()[-1]) == (1, f"keygrip: Is a directory: {log}")


def test_the_end_of_another_process_is_named() -> None:
    said = "[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"
    expected = "another process of this run ended: see its output, and continue with resume=<run folder>"
    assert describe_error(RuntimeError(said), "train", []) == (expected, 1)


PEER_ENDED = RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("first", "second", "launched", "kept"),
    [
        ((0, "failed", FULL), (1, "failed", PEER_ENDED), True, "failed: 1"),
        ((0, "failed", FULL), (1, "interrupted", Interrupted("stopped by SIGTERM")), True, "failed: 1"),
        ((0, "failed", FULL), (1, "failed", ValueError("cut off")), True, "failed: 1"),
        ((1, "failed", FULL), (0, "failed", PEER_ENDED), True, "failed: 1"),
        ((1, "failed", FULL), (0, "interrupted", Interrupted("stopped by SIGTERM")), True, "failed: 1"),
        ((1, "interrupted", KeyboardInterrupt()), (0, "failed", PEER_ENDED), True, "interrupted: 1"),
        # Processes that Lightning started: it removes WORLD_SIZE before the error is recorded.
        ((0, "failed", FULL), (1, "failed", PEER_ENDED), False, "failed: 1"),
        ((1, "failed", FULL), (0, "failed", PEER_ENDED), False, "failed: 1"),
        # Not a consequence of what is recorded: it may be from an earlier start.
        ((0, "failed", FULL), (0, "failed", ValueError("no data")), True, "failed: 2"),
        ((0, "failed", FULL), (0, "interrupted", KeyboardInterrupt()), False, "interrupted: 2"),
        ((0, "running", FULL), (1, "failed", PEER_ENDED), True, "failed: 2"),  # the other process was killed
        ((1, "interrupted", KeyboardInterrupt()), (0, "failed", FULL), True, "failed: 2"),
    ],
)
def test_the_cause_stays_recorded_when_the_other_processes_end_after_it(
    first: tuple[int, str, BaseException],
    second: tuple[int, str, BaseException],
    launched: bool,
    kept: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2" if launched else "")
    for number, (rank, status, error) in enumerate((first, second), 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        results.record_failure(tmp_path, status, str(number), ["seed=1"], error)
    found = json.loads((tmp_path / "result.json").read_text())
    assert f"{found['status']}: {found['error']}" == kept
    trace = "".join(traceback.format_exception(first[2] if kept.endswith("1") else second[2]))
    assert (tmp_path / "error.txt").read_text() == trace


def test_a_job_of_a_cluster_that_died_is_named_with_its_log() -> None:
    from submitit.core.utils import UncompletedJobError

    said = (
        "Job 12_3 (task: 0) with path /a b/12_3_0_result.pkl\nhas not produced any output (state: OUT_OF_MEMORY)\n"
        "Error stream produced:\n----------------------------------------\nstep 1\nstep 2\n"
    )
    expected = "job 12_3 of the cluster ended without a result (state OUT_OF_MEMORY): see /a b/12_3_0_log.err"
    further = "; others may still run: when they have ended, the same command with resume=true makes the table"
    assert describe_error(UncompletedJobError(said), "train", []) == (expected + further, 1)
    others = further.partition(":")[0]  # without resume=true, which that command does not have
    assert describe_error(UncompletedJobError(said), "evaluate", []) == (expected + others, 1)


def raised(*errors: BaseException) -> BaseException:
    """Return the last of some errors, each raised while the one before it was handled."""
    try:
        if len(errors) > 1:
            try:
                raise raised(*errors[:-1])
            except BaseException:
                raise errors[-1]  # noqa: B904
        raise errors[0]
    except BaseException as error:
        return error


def test_a_signal_inside_hydra_or_omegaconf_is_not_hidden_by_their_errors() -> None:
    from hydra.errors import ConfigCompositionException

    from keygrip.command import _signal_behind

    stop, lost = Interrupted("stopped by SIGTERM"), AttributeError("no attribute '_invalidate_flags_cache'")
    assert _signal_behind(raised(stop, lost, ConfigCompositionException("missing key"))) is stop
    assert _signal_behind(raised(KeyboardInterrupt(), lost)).__class__ is KeyboardInterrupt
    full = OSError(28, "disk full while saving")  # the error that the user has to know
    assert _signal_behind(raised(stop, full)) is full
    alone = ConfigCompositionException("missing key")
    alone.__cause__ = alone
    assert _signal_behind(alone) is alone


def test_a_cluster_that_is_not_there_is_named() -> None:
    """The message is submitit's."""
    error = RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')
    assert describe_error(error, "train", []) == (
        "there is no srun here: hydra/launcher=processes runs a sweep on this machine",
        1,
    )


def test_a_sweep_that_was_stopped_says_how_to_go_on_where_it_can() -> None:
    stopped, further = SweepInterrupted("stopped by SIGTERM"), "; go on with the same command, resume=true and "
    assert describe_error(stopped, "train", []) == (f"stopped by SIGTERM{further}hydra.sweep.dir=<its folder>", 143)
    assert describe_error(stopped, "evaluate", []) == ("stopped by SIGTERM", 143)


def test_debug_shows_the_trace(cli: Callable[..., Any]) -> None:
    outcome = cli(*TOY, "logger=none", "run_dir=run", "data.fail=empty", "debug=true")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1] == "keygrip: empty"


def test_a_failed_run_leaves_what_became_of_it(cli: Callable[..., Any]) -> None:
    assert cli(*TOY, "logger=none", "run_dir=run", "data.fail=empty").code == 1
    result = json.loads(Path("run/result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "empty")
    assert "data.fail=empty" in result["overrides"]
    assert "Traceback" in Path("run/error.txt").read_text()


def test_a_refused_start_leaves_the_folder_of_an_earlier_run_as_it_is(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = [*TOY, "logger=none", "val_every_n_steps=null", "run_dir=run", "max_steps=4"]

    def content() -> dict[str, bytes]:
        files = (path for path in Path("run").rglob("*") if path.is_file() and path.name != "train.log")
        return {str(path): path.read_bytes() for path in files}

    with monkeypatch.context() as patch:
        patch.setenv("TOY_STOP_AT", "2")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        assert cli(*toy, "seed=3").code == 128 + signal.SIGTERM
    before = content()
    result = json.loads(before["run/result.json"])
    assert (result["status"], "seed=3" in result["overrides"]) == ("interrupted", True)
    refused = cli(*toy, "seed=77", "resume=true")
    assert (refused.code, "was made with other settings" in refused.err) == (1, True)
    assert content() == before
    assert cli(*toy, "seed=3", "resume=true").code == 0
    before = content()
    assert "already holds a run" in cli(*toy, "seed=77").err
    assert content() == before
    assert json.loads(before["run/result.json"])["status"] == "finished"
    assert not Path("run/.hydra").exists()


def test_only_processes_of_the_start_that_is_going_on_write_its_result(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a second start into the same folder, the first process is refused, and torchrun then ends the others."""
    toy = [*TOY, "logger=none", "run_dir=run"]
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29711"}.items():
        monkeypatch.setenv(name, value)
    going_on = {"status": "running", "started_at": 1.0, "overrides": ["seed=0"], **results.this_start()}
    results.write_result(Path("run"), going_on)
    monkeypatch.setenv("MASTER_PORT", "29712")
    cli(*toy, "seed=1")  # one process of a strategy for one: refused
    assert json.loads(Path("run/result.json").read_text()) == going_on
    assert not Path("run/error.txt").exists()
    monkeypatch.setenv("MASTER_PORT", "29711")
    cli(*toy, "seed=0")
    assert json.loads(Path("run/result.json").read_text())["error"].startswith("torchrun started 2 processes")


def test_an_error_that_was_not_foreseen_before_a_run_goes_on_leaves_its_trace_and_the_result_as_it_is(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = [*TOY, "logger=none", "val_every_n_steps=null", "run_dir=run", "max_steps=4"]
    with monkeypatch.context() as patch:
        patch.setenv("TOY_STOP_AT", "2")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        assert cli(*toy).code == 128 + signal.SIGTERM
    before = json.loads(Path("run/result.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("keygrip.training.fit.run_metadata", lambda: {}["gone"])
        assert "unexpected KeyError" in cli(*toy, "resume=true").err
    assert json.loads(Path("run/result.json").read_text()) == before
    assert "run_metadata()" in Path("run/error.txt").read_text()
    assert cli(*toy, "resume=true").code == 0
    assert not Path("run/error.txt").exists()


def test_a_refused_job_of_a_sweep_that_goes_on_records_why_beside_the_result_of_its_earlier_start(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of the sweep reads it; the launcher of this process knows only its exit code."""
    toy = [*TOY, "logger=none", "val_every_n_steps=null", "max_steps=4"]
    job = ["hydra.run.dir=sweep/0", "hydra.mode=RUN", "hydra.job.num=0"]
    with monkeypatch.context() as patch:
        patch.setenv("TOY_STOP_AT", "2")
        patch.setenv("TOY_SIGNAL", "SIGTERM")
        assert cli(*toy, "seed=3", *job).code == 128 + signal.SIGTERM
    before = Path("sweep/0/result.json").read_bytes()
    assert cli(*toy, "seed=77", "resume=true", *job).code == 1
    refusal = json.loads(Path("sweep/0/refused.json").read_text())
    assert "seed=77" in refusal["overrides"]
    assert "was made with other settings" in refusal["error"]
    assert Path("sweep/0/result.json").read_bytes() == before
    assert cli(*toy, "seed=3", "resume=true", *job).code == 0
    assert not Path("sweep/0/refused.json").exists()


@pytest.mark.parametrize("by_launcher", [False, True])
def test_a_job_of_the_processes_launcher_is_not_queued_again_by_itself(
    by_launcher: bool, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[bool] = []
    monkeypatch.setattr("keygrip.command.requeue_job", lambda: queued.append(True))
    monkeypatch.setattr("keygrip.training.fit.run_metadata", lambda: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = ["hydra.run.dir=sweep/0", "hydra.mode=RUN", "hydra.job.num=0"] if by_launcher else ["run_dir=run"]
    assert cli(*TOY, "logger=none", *job).code == 128 + signal.SIGUSR1
    assert queued == [True] * (not by_launcher)


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({"WORLD_SIZE": "4", "RANK": "2", "TORCHELASTIC_RUN_ID": "a"}, "start it without torchrun"),
        ({"WORLD_SIZE": "4"}, "unset WORLD_SIZE, which is 4 here"),
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            "srun --ntasks=1 for each command (with settings of its own, also several at once)",
        ),
    ],
)
def test_commands_whose_work_is_not_divided_refuse_several_processes(
    variables: dict[str, str], remedy: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = cli("checkpoint=run", of="evaluate")
    expected = "keygrip: evaluate is one process, and 4 were started together, each of which would do all its work: "
    assert (outcome.code, outcome.err) == (1, f"{expected}{remedy}\n")
    assert cli("--help", of="evaluate").code == 0
    outcome = cli(*TOY, "-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert outcome.code == 1
    assert "a sweep starts the processes of its jobs itself, and 4 processes were started together" in outcome.err
    assert list(Path().iterdir()) == []


def test_a_failed_command_without_a_run_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keygrip import command, prepare

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "step=validate", "root=no_such_folder"])
    with pytest.raises(SystemExit) as stop:
        command.entry_point("prepare", prepare.print_report)
    assert stop.value.code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("transformers", "pip install 'keygrip[vlm]' (in a clone: pip install -e '.[vlm]')"),
        ("foo", "pip install foo, or, if it is your own, export PYTHONPATH=<the folder that holds it>"),
        ("foo.bar", "pip install foo, or, if it is your own, export PYTHONPATH=<the folder that holds it>"),
        ("mine", "mine of the present folder is found with `export PYTHONPATH=$PWD`"),
        ("torch.no_such_part", None),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from keygrip import command

    def needs_it(cfg: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "argv", ["prepare", "step=validate", "root=x"])
    with pytest.raises(SystemExit):
        command.entry_point("prepare", needs_it)
    top = package.partition(".")[0]
    if said is None:
        expected = f"keygrip: the package {top!r} is installed and has no module {package!r}"
    else:
        expected = f"keygrip: the package {top!r} is not installed: {said}"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_signal_that_a_library_made_another_error_of_is_still_a_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example torch's `load_state_dict`, which treats every exception as weights that do not fit."""
    from keygrip import command

    def loads_weights(cfg: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise ValueError(f"the weights do not fit: {error}") from error

    monkeypatch.setattr(sys, "argv", ["prepare", "step=validate", "root=x"])
    with pytest.raises(SystemExit) as stop:
        command.entry_point("prepare", loads_weights)
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == "keygrip: stopped by SIGTERM"


@pytest.mark.parametrize("ignored", [False, True])  # by nohup
def test_a_terminal_that_is_closed_ends_a_command_in_good_order(ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts like SIGTERM: an arm is stopped and a recording is kept when the connection to the robot's computer
    breaks."""
    from keygrip import command

    left: list[str] = []

    def drives(cfg: object) -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
            left.append("went on")
        finally:
            left.append("stopped the arm")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: left.append("killed"))
    try:
        monkeypatch.setattr(sys, "argv", ["prepare", "step=validate", "root=x"])
        if ignored:
            command.entry_point("prepare", drives)
        else:
            with pytest.raises(SystemExit) as stop:
                command.entry_point("prepare", drives)
            assert stop.value.code == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    assert left == (["went on", "stopped the arm"] if ignored else ["stopped the arm"])


@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_second_signal_does_not_break_off_the_cleaning_up(
    first: signal.Signals, second: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell forwards its own SIGHUP, so it arrives twice; systemd sends one after SIGTERM."""
    from keygrip import command

    left: list[str] = []

    def drives(cfg: object) -> None:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(second)
            left.append("stopped the arm")

    def before(number: int, frame: object) -> None:
        left.append("killed")

    former = signal.signal(signal.SIGHUP, before)
    try:
        monkeypatch.setattr(sys, "argv", ["prepare", "step=validate", "root=x"])
        with pytest.raises(SystemExit) as stop:
            command.entry_point("prepare", drives)
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, former)
    assert (stop.value.code, left) == (128 + first, ["stopped the arm"])


def test_a_signal_while_the_classes_of_a_configuration_are_imported_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch alone takes seconds to import, and Hydra turns any exception of an import into an ImportError."""
    from keygrip import command
    from keygrip.setting_types import refuse_ill_typed

    (tmp_path / "slow_import.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "step=validate", "root=x"])
    with pytest.raises(SystemExit) as stop:
        command.entry_point("prepare", lambda cfg: refuse_ill_typed({"_target_": "slow_import.Thing"}))
    assert stop.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "keygrip: stopped by SIGTERM"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["root=x"],
            r"^keygrip: nothing is chosen of the group 'step': give step=NAME, one of calibrate, .*, webvid\b",
        ),
        (
            ["step=doctor", "root=no_such_folder"],
            r"^keygrip: data folder no_such_folder does not exist; .*root=PATH\)$",
        ),
        (["step=doctor", "root=.", "frames_per_demo=few"], r"^keygrip: frames_per_demo='few': must be a whole number$"),
        (["step=doctor", "root=.", "+frames_per_demos=3"], r"there is no setting 'frames_per_demos' in prepare\.yaml"),
        (["step=record", "root=x", "seed=5"], r"no setting 'seed'.*first_seed"),
        (["step=record", "rot=x", "demso=5"], r"^keygrip: there is no setting 'rot' in prepare\.yaml: .*is 'root'$"),
        (["step=import", "folder=A", "out=B"], r"^keygrip: there is no setting 'folder' in prepare\.yaml: "),
        (["-m", "step=record", "root=a,b", "demso=5"], r"^keygrip: there is no setting 'demso' .* is 'demos'$"),
    ],
)
def test_mistakes_of_a_step(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from keygrip import command, prepare

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    with pytest.raises(SystemExit):
        command.entry_point("prepare", prepare.print_report)
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("evaluate", ["evaluate=policy", "checkpoint=x", "seed=5"]),
        ("export", ["checkpoint=x", "to=y", "seed=5"]),
        ("export", ["checkpoint=x", "to=y", "run_dir=z"]),
        ("serve", ["checkpoint=x", "seed=5"]),
        ("serve", ["checkpoint=x", "run_dir=z"]),
        ("generate", ["checkpoint=x", "video=a", "question=b", "run_dir=z"]),
        ("run", ["checkpoint=x", "run_dir=z"]),
        ("bench", ["seed=5"]),
    ],
)
def test_commands_have_the_settings_that_they_read(command: str, given: list[str]) -> None:
    for name in ("evaluate", "export", "serve", "generate", "run", "bench"):
        importlib.import_module(f"keygrip.{name}")  # registers its settings
    compose(command, given[:-1])
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{given[-1].partition('=')[0]}'"):
        compose(command, given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["case=volume_loss", "part=vlm_step"], "part=vlm_step has no effect here: it is for a suite"),
        (["toy=true"], "toy=True has no effect here: it is for a suite"),
        (["minutes=3"], "minutes=3"),
        (["commit=abc"], "commit=abc"),
        (["suite=gpu", "case=volume_loss"], "case=volume_loss has no effect here: it is for a case"),
        (["suite=gpu", "record=true"], "record=True"),
        (["suite=gpu", "quick=true"], "quick=True"),
        (
            ["case=volume_loss", "cases.volume_loss.batch_size=1", "cases.inference.repetitions=1"],
            r"nothing reads the settings given for cases\.inference with case=volume_loss: give case=inference, or",
        ),
        (
            ["gpu.server.settings.clients=2"],
            r"nothing reads the settings given for gpu\.server without a suite: give suite=gpu part=server, or leave",
        ),
        (
            ["suite=gpu", "toy=true", "part=[server,vlm_step]", "+gpu.plan_vla.warm_up=1", "gpu.server.case=server"],
            r"for gpu\.plan_vla with part=\[server,vlm_step\]: give part=\[server,vlm_step,plan_vla\], or leave",
        ),
        (["suite=gpu", "toy=true", "cases.inference.warm_up=1"], r"for cases\.inference with suite=gpu: .*gpu\.PART"),
    ],
)
def test_settings_of_a_suite_and_of_a_case_are_not_mixed(given: list[str], said: str) -> None:
    from keygrip import bench

    with pytest.raises(ValueError, match=said):
        bench.run(compose("bench", given))


def test_settings_of_a_case_that_one_job_of_a_sweep_reads_are_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from keygrip import bench

    class Case:
        def run(self, quick: bool) -> dict[str, float]:
            return {"step_ms": 1.0}

    monkeypatch.setattr("keygrip.bench.instantiate", lambda node, **options: Case())
    given = ["case=volume_loss", "cases.volume_loss.batch_size=1"]
    assert bench.run(compose("bench", given))["step_ms"] == 1
    assert "nothing reads" not in caplog.text
    monkeypatch.setattr(bench, "in_sweep", lambda: True)
    assert bench.run(compose("bench", [*given, "cases.inference.repetitions=1"]))["step_ms"] == 1
    assert "nothing reads the settings given for cases.inference with case=volume_loss" in caplog.text


def test_the_process_of_a_part_has_the_settings_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from keygrip import bench
    from keygrip.benchmarks.gpu.suite import Suite

    monkeypatch.setattr("keygrip.bench.instantiate", lambda node, **options: None)
    monkeypatch.setattr(Suite, "measure", lambda self, name, part: {"part": name})
    monkeypatch.setenv(bench.PART_PROCESS, "server")
    given = ["suite=gpu", "toy=true", "commit=abc", "gpu.server.settings.clients=2", "+gpu.plan_vla.warm_up=1"]
    assert bench.run(compose("bench", [*given, "part=server"])) == {"part": "server"}


def test_a_refused_run_leaves_an_earlier_one_as_it_was(cli: Callable[..., Any]) -> None:
    toy = [*TOY, "logger=none", "run_dir=run", "max_steps=3", "val_every_n_steps=null"]
    assert cli(*toy).code == 0
    before = Path("run/result.json").read_bytes()
    outcome = cli(*toy)
    assert outcome.code == 1
    assert "run already holds a run: continue it with resume=" in outcome.err
    assert Path("run/result.json").read_bytes() == before
    for said in ("already holds a run", "belongs to a run that is still going on"):
        Path("run/result.json").write_text('{"status": "running"}')
        with run_folder.lock_folder(Path("run")) if "still" in said else contextlib.nullcontext():
            outcome = cli(*toy)
        assert said in outcome.err
        assert json.loads(Path("run/result.json").read_text()) == {"status": "running"}
        assert not Path("run/error.txt").exists()


@pytest.fixture
def anew(cli: Callable[..., Any]) -> Callable[..., Any]:
    """Return `cli` as in a new process that has not chosen a folder yet."""

    def run(*arguments: str) -> Any:
        run_folder.run_name.cache_clear()
        run_folder._claimed.cache_clear()
        return cli(*arguments)

    return run


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("max_steps=-3", "max_steps=-3: must be at least 1"),
        ("model.width=wide", "model.width='wide': must be a whole number"),
        ("optimizer.lr=-1", "lr"),
        ("resume=nowhere", "nowhere"),
    ],
)
def test_a_command_that_is_refused_before_its_work_begins_leaves_no_folder(
    anew: Callable[..., Any], wrong: str, said: str
) -> None:
    for _ in range(2):
        outcome = anew(*TOY, wrong)
        assert outcome.code != 0
        assert said in outcome.err.splitlines()[-1]
        assert list(Path.cwd().iterdir()) == []


def test_a_refused_command_leaves_the_runs_that_are_there(anew: Callable[..., Any]) -> None:
    small = [*TOY, "logger=none", "max_steps=3", "val_every_n_steps=null"]
    assert anew(*small).code == 0
    (before,) = Path("runs/toy_toy").iterdir()
    assert anew(*small, "max_steps=-3").code == 1
    assert list(Path("runs/toy_toy").iterdir()) == [before]
    assert json.loads((before / "result.json").read_text())["status"] == "finished"
    Path("empty").mkdir()
    assert anew(*small, "max_steps=-3", "run_dir=empty").code == 1
    assert json.loads(Path("empty/result.json").read_text())["status"] == "failed", "a folder of the user's stays"


def test_what_fails_when_its_work_has_begun_or_was_not_foreseen_leaves_its_trace(
    anew: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert anew(*TOY, "logger=none", "data.fail=empty").code == 1
    (folder,) = Path("runs/toy_toy").iterdir()
    assert json.loads((folder / "result.json").read_text())["error"] == "empty"
    monkeypatch.setattr("keygrip.training.fit.run_metadata", lambda: {}["gone"])
    assert anew(*TOY, "logger=none", "seed=2").code == 1
    (other,) = set(Path("runs/toy_toy").iterdir()) - {folder}
    assert "unexpected KeyError" in json.loads((other / "result.json").read_text())["error"]
    assert "run_metadata()" in (other / "error.txt").read_text()


def test_a_truncated_checkpoint_is_not_resumed(cli: Callable[..., Any]) -> None:
    toy = [*TOY, "logger=none", "run_dir=run", "max_steps=3", "val_every_n_steps=null"]
    assert cli(*toy).code == 0
    file = Path("run/checkpoints/last.ckpt")
    whole = file.read_bytes()
    file.unlink()  # step-00000003.ckpt is a hard link to it
    file.write_bytes(whole[:1000])
    outcome = cli(*toy, "resume=true")
    assert outcome.code == 1
    kept = "run/checkpoints/step-00000003.ckpt"
    said = outcome.err.splitlines()[-1]
    assert re.search(
        rf"last.ckpt is truncated or not a checkpoint \(1000 bytes\): take another one, as \S+{kept}", said
    )
    file.unlink()  # without its latest checkpoint the old run cannot continue, and no new run starts
    for given, remedy in [
        ([], rf"resume=\S+{kept}, give another run_dir, or remove \S+/run/checkpoints"),
        (["resume=true"], rf"resume=\S*{kept}"),
    ]:
        outcome = cli(*toy, *given)
        assert outcome.code == 1
        assert re.search(f"{remedy}$", outcome.err.splitlines()[-1])
    assert outcome.err.count("\n") == 1
    outcome = cli(*TOY, "logger=none", "val_every_n_steps=null", f"resume={kept}", "max_steps=4")
    assert outcome.code == 0, outcome.err
    assert file.is_file()


def test_logs_go_to_standard_error_only(cli: Callable[..., Any]) -> None:
    outcome = cli(*TOY, "logger=csv", "run_dir=run", "max_steps=3", "val_every_n_steps=2")
    assert (outcome.code, outcome.out) == (0, "")
    assert "finished 3 steps" in outcome.err


def test_import_is_light_and_help_needs_no_torch(command: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "light.py"
    script.write_text(
        "import sys, keygrip, keygrip.config, keygrip.train, keygrip.run, keygrip.serve, keygrip.demo\n"
        "heavy = {'torch', 'lightning', 'timm', 'mujoco', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.argv = ['train', '--help']\n"
        "keygrip.train.main()\n"
        "sys.argv = ['run', '--help']\n"
        "keygrip.run.main()\n"
        "heavy = {'torch', 'lightning', 'timm', 'mujoco'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = command("light")
    assert done.returncode == 0, done.stderr
    assert "model=geometry_vla" in done.stdout


def test_a_run_folder_may_be_named_by_the_overrides(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli("run_dir=all/${hydra:job.override_dirname}", "seed=3", "optimizer.lr=fast")
    assert "optimizer.lr='fast': must be a finite number" in outcome.err  # used to be a RecursionError
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["optimizer.lr=fast,seed=3"]


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    """Python ignores exceptions raised there."""

    class Closed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    hook, received = sys.unraisablehook, set[int]()
    with pytest.raises(Interrupted) as stop, _raise_on_signals(received):
        Closed()
        for _ in range(1000):
            time.sleep(0.01)
    assert stop.value.signal_number == signal.SIGTERM
    assert received == {signal.SIGTERM}
    assert sys.unraisablehook is hook


def test_other_ignored_exceptions_are_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def __del__(self) -> None:
            raise ValueError("closing failed")

    reported: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))
    with _raise_on_signals(set()):
        Closed()
    assert [str(error) for error in reported] == ["closing failed"]


def test_arguments_that_are_not_utf_8_are_refused_with_what_to_do(cli: Callable[..., Any]) -> None:
    """Python represents their bytes as halves of surrogate pairs, which no record of a run can hold."""
    outcome = cli(*TOY, "run_dir=r\udcfcn")
    assert (outcome.code, outcome.err) == (
        2,
        "keygrip: run_dir=r\\udcfcn holds bytes that are not UTF-8: rename the file or folder, and give its new name\n",
    )
    assert list(Path().iterdir()) == []

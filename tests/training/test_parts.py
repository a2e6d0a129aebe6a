"""Checkpoints are data: nothing that they name is imported or called unless it is a declared part."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_parts import write_images
from shard_sets import write_set

from keygrip import train
from keygrip.config import compose
from keygrip.models.backbone import DinoBackbone
from keygrip.training.checkpoints import load_module, read_checkpoint
from keygrip.training.parts import (
    UntrustedPartError,
    build_stored,
    external_settings,
    model_part,
    named_packages,
    without_omitted_parts,
)
from keygrip.training.saving import AtomicCheckpointIO

TRUST = ["toy_parts"]
# Each writes {file} if it is called as Hydra would call it. The first eight succeeded in an earlier version.
ATTACKS: list[dict[str, Any]] = [
    {"_target_": "torch.utils.collect_env.run", "command": "touch {file}"},
    {"_target_": "torch.load", "f": "{pickle}", "weights_only": False},
    {"_target_": "numpy.load", "file": "{pickle}", "allow_pickle": True},
    {"_target_": "torch.hub.load", "repo_or_dir": "{folder}", "model": "x", "source": "local"},
    {"_target_": "pathlib.Path.write_text", "self": {"_target_": "pathlib.Path", "_args_": ["{file}"]}, "data": "x"},
    {"_target_": "subprocess.Popen", "args": ["touch", "{file}"]},
    {"_target_": "os.system", "command": "touch {file}"},
    {"_target_": "keygrip.training.pretraining.PretrainingStage.complete", "self": {"overrides": [], "name": "x"}},
    # callables of the standard library
    {"_target_": "os.mkdir", "path": "{file}"},
    {"_target_": "builtins.eval", "_args_": ["open('{file}', 'w')"]},
    {"_target_": "builtins.exec", "_args_": ["open('{file}', 'w')"]},
    {"_target_": "builtins.open", "file": "{file}", "mode": "w"},
    {"_target_": "shutil.copy", "src": "{pickle}", "dst": "{file}"},
    {"_target_": "runpy.run_path", "path_name": "{folder}/hubconf.py"},
    {"_target_": "importlib.import_module", "name": "canary"},
    {"_target_": "canary.Anything"},
    {"_target_": "pickle.Unpickler"},
    # Hydra's and keygrip's own ways to call something
    {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.mkdir", "path": "{file}"}},
    {"_target_": "hydra.utils.get_method", "path": "canary.Anything"},
    {"_target_": "keygrip.recording.demonstrations.record", "task": None, "root": "{file}", "demos": 1},
    {"_target_": "keygrip.recording.video_text.make_texts", "root": "{file}", "options": {}},
    {"_target_": "keygrip.artifacts.write_text", "path": "{file}", "text": "x"},
    {"_target_": "keygrip.training.parts.build_stored", "config": {}, "where": "x"},
    {"_target_": "keygrip.training.pretraining.PretrainingStage", "overrides": ["max_steps=1"], "name": "x"},
    # names of other packages in modules of keygrip, and names that are no classes
    {"_target_": "keygrip.models.patch_dit.encoders.torch.load", "f": "{pickle}", "weights_only": False},
    {"_target_": "keygrip.models.volume_query.module.Path.write_text", "self": "{file}", "data": "x"},
    {"_target_": "keygrip.models.volume_query.module.LightningModule"},
    {"_target_": "keygrip.models.language.hub.from_pretrained", "kind": None, "source": "{folder}"},
    {"_target_": "keygrip.models.volume_query.module.VolumeQueryModule.load_from_checkpoint", "path": "{pickle}"},
    {"_target_": "keygrip.models.volume_query.module.VolumeQueryModule.__init__"},
    {"_target_": "keygrip.models...os.system", "command": "touch {file}"},
    {"_target_": "keygrip.models.volume_query.module.VolumeQueryModule "},
    {"_target_": "keygrip.models.volume_query.module.Volume\u0051ueryM\u03bfdule"},
    {"_target_": ["os.system"]},
    {"_target_": "keygrip"},
    {"_target_": "toy_parts.os.mkdir", "path": "{file}"},
    {"_target_": "keygrip.envs.gymnasium_environment.GymnasiumTask", "id": "canary:Anything-v0"},
    # entries that are no target at all
    {"_args_": ["{file}"]},
    {"_partial_": "yes"},
    {"text": "${{oc.env:HOME}}"},
    {"text": "${{oc.create:x}}"},
    {"text": "???"},  # a value that omegaconf treats as missing
]


def nested(attack: Any) -> list[Any]:
    """Return the attack in other places."""
    return [
        [1, [attack]],
        {"a": {"b": attack}},
        [attack | ({"_partial_": True} if "_target_" in attack else {})],
        {"_target_": "keygrip.training.optimizers.AdamW", "lr": 1e-3, "betas": [attack, 0.9]},
    ]


def filled(node: Any, **values: str) -> Any:
    if isinstance(node, dict):
        return {key: filled(child, **values) for key, child in node.items()}
    if isinstance(node, list):
        return [filled(child, **values) for child in node]
    return node.format(**values) if isinstance(node, str) else node


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    support = Path(__file__).parents[1] / "support"
    overrides = [f"hydra.searchpath=[file://{support / 'conf'}]", "model=toy", "data=toy", "strategy=cpu"]
    overrides += ["strategy.precision=32-true", "logger=none", "max_steps=2", "val_every_n_steps=2"]
    train.run(compose("train", [*overrides, f"run_dir={folder / 'run'}"]))
    return folder / "run"


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_nothing_that_a_checkpoint_names_is_called(
    number: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary_was_here"
    (tmp_path / "canary.py").write_text(f"open({str(canary)!r}, 'w')\nclass Anything: pass\n")
    (tmp_path / "hubconf.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (tmp_path / "x.pickle").write_bytes(f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode())
    monkeypatch.syspath_prepend(str(tmp_path))
    attack = filled(ATTACKS[number], file=str(canary), folder=str(tmp_path), pickle=str(tmp_path / "x.pickle"))
    content = read_checkpoint(trained)
    content["keygrip"]["config"]["model"]["extra"] = attack
    file = tmp_path / "attack.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, file)
    with pytest.raises(UntrustedPartError) as refusal:
        load_module(file, trust=TRUST)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert "extra" in sentence
    for config in nested(attack):
        with pytest.raises(UntrustedPartError):
            build_stored(config, "model", TRUST)
    assert not canary.exists()
    assert "canary" not in sys.modules


def test_the_data_of_a_run_is_built_under_the_same_rules(trained: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from keygrip.evaluation.kinds import Evaluated

    config = read_checkpoint(trained)["keygrip"]["config"]
    config["data"] = {"_target_": "os.mkdir", "path": str(tmp_path / "harm")}
    evaluated = Evaluated(None, OmegaConf.create(config), trained, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UntrustedPartError, match=r"data\._target_: os\.mkdir"):
        evaluated.stored_data()
    assert not (tmp_path / "harm").exists()


def test_a_change_of_a_source_that_is_not_there_is_refused(trained: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from keygrip.evaluation.kinds import Evaluated, _refuse_unknown_parts

    part = {"_target_": "keygrip.data.video_text.shard_source.ShardSource", "root": None}
    config = read_checkpoint(trained)["keygrip"]["config"]
    config["data"] = {
        "_target_": "keygrip.data.video_text.datamodule.VideoTexts",
        "sources": {"tours": part, "b": None},
    }
    evaluated = Evaluated(None, OmegaConf.create(config), trained, tmp_path)  # type: ignore[arg-type]
    for change in ({"root": "x"}, None):  # null would leave a source out
        with pytest.raises(ValueError, match=r"data\.sources has no 'tour': the nearest is 'data\.sources\.tours'"):
            evaluated.stored_data({"sources": {"tour": change}})
    with pytest.raises(ValueError, match=r"data\.sources has no 'zzzz'"):
        evaluated.stored_data({"sources": {"zzzz": {"root": "x"}}})
    _refuse_unknown_parts(evaluated.config.data, {"cache_dir": None, "sources": {"tours": None, "b": None}}, "data")


STORED_DATA = {
    "image_text": {
        "_target_": "keygrip.data.image_text.datamodule.ImageShards",
        "root": "{root}",
        "batch_size": 4,
        "cache_dir": "{cache}",
    },
    "video_text": {
        "_target_": "keygrip.data.video_text.datamodule.VideoTexts",
        "sources": {"tours": {"_target_": "keygrip.data.video_text.shard_source.ShardSource", "root": "{root}"}},
        "collator": {
            "_target_": "keygrip.models.foveated_vlm.conversations.ConversationCollator",
            "tokenizer": {"_target_": "keygrip.models.language.tokenizers.TrainedTokenizer"},
            "prompt_order": "visual_first",
            "supervise": "all",
        },
        "image_size": 32,
        "batch_size": 4,
        "cache_dir": "{cache}",
    },
}


@pytest.mark.parametrize("kind", STORED_DATA)
def test_an_address_and_a_cache_are_the_callers_to_name(kind: str, trained: Path, tmp_path: Path) -> None:
    """A checkpoint must not cause requests to a server, or files in a cache folder that it names."""
    from omegaconf import OmegaConf

    from keygrip.evaluation.kinds import Evaluated

    def data(root: str, changes: dict[str, Any] | None = None) -> Any:
        stored = filled(STORED_DATA[kind], root=root, cache=str(tmp_path / "cache"))
        config = OmegaConf.create(read_checkpoint(trained)["keygrip"]["config"] | {"data": stored})
        return Evaluated(None, config, trained, tmp_path).stored_data(changes)  # type: ignore[arg-type]

    def named(root: str) -> dict[str, Any]:
        return {"root": root} if kind == "image_text" else {"sources": {"tours": {"root": root}}}

    def root_of(built: Any) -> str:
        return str(built.root if kind == "image_text" else built.sources["tours"].root)

    for address in ("https://shards.example/set", "s3://bucket/set", "simplecache::file:///etc"):
        key = "data.root" if kind == "image_text" else "data.sources.tours.root"
        with pytest.raises(UntrustedPartError, match=rf"{key}: .*{address}.* nothing is fetched .*{key}=\.\.\."):
            data(address)
        assert root_of(data(address, named(address))) == address
        assert root_of(data("/data/set", named(address))) == address
    assert root_of(data("/data/set")) == "/data/set"
    assert data("/data/set").cache_dir is None
    assert data("/data/set", {"cache_dir": "/fast/disk"}).cache_dir == "/fast/disk"
    with pytest.raises(FileNotFoundError):
        built = data(str(tmp_path))
        built.prepare_data()
        built.setup("validate")
    assert not list(tmp_path.iterdir())
    if kind == "image_text":
        write_images(tmp_path / "set", train=1, val=1)
    else:
        write_set(tmp_path / "set" / "train", [2, 1, 2])
        write_set(tmp_path / "set" / "val", [2], prefix="v")
    built = data(str(tmp_path / "set"))
    built.prepare_data()
    built.setup("validate")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_stored_data_take_no_more_of_the_machine_than_by_default(trained: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from keygrip.evaluation.kinds import Evaluated

    def data(settings: dict[str, Any], changes: dict[str, Any] | None = None) -> Any:
        stored = filled(STORED_DATA["video_text"], root=str(tmp_path), cache=str(tmp_path)) | settings
        config = OmegaConf.create({"data": stored})
        return Evaluated(None, config, trained, tmp_path).stored_data(changes)  # type: ignore[arg-type]

    def taken(built: Any) -> tuple[float, ...]:
        return built.num_workers, built.prefetch_batches, built.memory_gb, built.cache_gb

    greedy = {"num_workers": 10_000, "prefetch_batches": 10_000, "memory_gb": 1e6, "cache_gb": 1e6}
    named = {"num_workers": 5, "prefetch_batches": 6, "memory_gb": 7.0, "cache_gb": 64.0}
    assert taken(data(greedy)) == (4, 4, 0, 200)
    assert taken(data(greedy, named)) == (5, 6, 7, 64)
    assert taken(data({"num_workers": 0, "prefetch_batches": 1, "memory_gb": 0.0, "cache_gb": 0.0})) == (0, 1, 0, 0)


def test_what_evaluation_takes_is_the_most_of_conf() -> None:
    """A lower limit than that of a training would be exceeded while the copies of that training are within its own
    limit."""
    from omegaconf import OmegaConf

    from keygrip.config import config_folder
    from keygrip.evaluation.kinds import MOST_TAKEN

    files = [OmegaConf.load(file) for file in (config_folder() / "data").glob("*.yaml")]
    for name in ("cache_gb", "prefetch_batches"):
        assert MOST_TAKEN[name] == max(file[name] for file in files if name in file)  # type: ignore[index]


@pytest.mark.parametrize("kind", STORED_DATA)
def test_only_a_named_limit_removes_the_copies_of_a_training(kind: str, trained: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from keygrip.evaluation.kinds import Evaluated

    stored = filled(STORED_DATA[kind], root=str(tmp_path), cache=str(tmp_path)) | {"cache_gb": 1.0}
    evaluated = Evaluated(None, OmegaConf.create({"data": stored}), trained, tmp_path)  # type: ignore[arg-type]
    assert evaluated.stored_data().spares_copies
    assert not evaluated.stored_data({"cache_gb": 0.5}).spares_copies
    assert not build_stored(stored, "data").spares_copies


def test_stored_robot_data_write_beside_their_demonstrations_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from omegaconf import OmegaConf

    from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
    from keygrip.evaluation.kinds import Evaluated

    stored: dict[str, Any] = {"_target_": "keygrip.data.robot.datamodule.RobotDemos", "root": str(tmp_path / "demos")}
    stored |= {"camera": "over", "arms": ["right"], "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    stored |= {"horizon": 4, "frame_stride": 1, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    data = build_stored(stored, "data")
    assert data.cache_dir.parent == tmp_path / "demos"
    evaluated = Evaluated(None, OmegaConf.create({"data": stored}), tmp_path, tmp_path)  # type: ignore[arg-type]
    assert evaluated.stored_data().cache_dir.parent == tmp_path / "demos"
    assert f"data.cache_dir={tmp_path / 'cache'} is left aside" in caplog.text
    caplog.clear()
    named = evaluated.stored_data({"root": str(tmp_path / "moved"), "cache_dir": str(tmp_path / "fast")})
    assert (named.root, named.cache_dir) == (tmp_path / "moved", tmp_path / "fast")
    assert not caplog.text
    with pytest.raises(FileNotFoundError):
        data.setup("validate")
    record = {"_target_": "keygrip.data.robot.recordings.Recording", "recorder": "x", "task": {"name": "reach"}}
    data = build_stored(stored | {"root": None, "record": record | {"folder": str(tmp_path / "elsewhere")}}, "data")
    with pytest.raises(FileNotFoundError, match="holds 0 of 100 demonstrations"):
        data.prepare_data()
    assert not list(tmp_path.iterdir())
    camera = CameraPose(np.array([[30.0, 0, 16], [0, 30.0, 16], [0, 0, 1]]), np.diag([1.0, -1, -1, 1]))
    for demo in ("a", "b"):
        with DemoWriter(tmp_path / "demos" / demo, "yam", "pick", "pick it up", 10.0) as writer:
            for index in range(8):
                arms = {"right": ArmPose(np.array([0.0, 0.01 * index, -1.0]), np.array([1.0, 0, 0, 0]), 0.5)}
                writer.add(index * 10**8, {"over": np.zeros((32, 32, 3), np.uint8)}, {"over": camera}, arms, arms)
    data = evaluated.stored_data({"val_fraction": 0.5, "num_workers": 0})
    data.setup("validate")
    assert len(list(data.val_dataloader())) > 0
    assert data.cache_dir.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["demos"]


def test_what_is_missing_is_made_where_the_caller_says_so_by_keygrips_own_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    from keygrip.evaluation.kinds import Evaluated

    stored: dict[str, Any] = {"_target_": "keygrip.data.robot.datamodule.RobotDemos", "root": None, "camera": "over"}
    stored |= {"arms": ["right"], "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "horizon": 4}
    stored |= {"frame_stride": 1, "batch_size": 2, "make_missing": True}
    record = {"_target_": "keygrip.data.robot.recordings.Recording", "_recursive_": False, "task": {"name": "reach"}}
    record |= {"folder": str(tmp_path), "make_missing": True}

    def data(recorder: str, changes: dict[str, Any], trust: tuple[str, ...] = ()) -> Any:
        config = OmegaConf.create({"data": stored | {"record": record | {"recorder": recorder}}})
        return Evaluated(None, config, tmp_path, tmp_path, trust).stored_data(changes)  # type: ignore[arg-type]

    own = "keygrip.recording.demonstrations.record"
    assert (data(own, {}).make_missing, data(own, {}).record.make_missing) == (False, False)
    made = data(own, {"make_missing": True, "record": {"make_missing": True}})
    assert (made.make_missing, made.record.make_missing) == (True, True)
    assert not data("os.system", {"make_missing": True}).record.make_missing
    make, trusted = {"record": {"make_missing": True}}, ("lab",)
    (tmp_path / "lab.py").write_text("import os\ndef record(**options):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    imported = "keygrip.recording.demonstrations"  # names that a module imports are not its own
    others = ["os.system", "keygrip.artifacts.write_text", "lab.os.system"]
    others += [f"{imported}.usable_cores", f"{imported}.os.system"]
    for recorder, trust in (("lab.record", ()), *((other, trusted) for other in others)):
        with pytest.raises(UntrustedPartError, match=r"data\.record\.recorder: .* is not called"):
            data(recorder, make, trust)
    assert data("lab.record", make, trusted).record.make_missing
    (tmp_path / "arms" / "tasks").mkdir(parents=True)
    (tmp_path / "arms/__init__.py").write_text("from .tasks import record\nfrom os.path import join\n")
    (tmp_path / "arms/tasks/__init__.py").write_text("from .reach import record\n")
    (tmp_path / "arms/tasks/reach.py").write_text("from os import system\ndef record(**options):\n    pass\n")
    assert data("arms.record", make, ("arms",)).record.make_missing
    for other in ("arms.join", "arms.tasks.reach.system"):
        with pytest.raises(UntrustedPartError, match=r"no such function \(give the module where its `def` stands"):
            data(other, make, ("arms",))


def test_a_package_is_trusted_by_name_alone(trained: Path) -> None:
    with pytest.raises(UntrustedPartError, match=r"toy_parts\.ToyModule .*trust=\[toy_parts\] if you do"):
        load_module(trained)
    with pytest.raises(UntrustedPartError):
        load_module(trained, trust=["toy"])
    assert type(load_module(trained, trust=TRUST)).__name__ == "ToyModule"
    with pytest.raises(ValueError, match="trust is a list"):
        load_module(trained, trust="toy_parts")
    with pytest.raises(ValueError, match="not the name of a package"):
        load_module(trained, trust=["../toy_parts"])


def test_undeclared_classes_of_a_trusted_package_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = tmp_path / "some_lab"
    lab.mkdir()
    (lab / "__init__.py").write_text("")
    (lab / "towers.py").write_text(
        "from keygrip.training.parts import model_part\n"
        "@model_part(from_checkpoint={'weights': None})\n"
        "class Tower:\n    def __init__(self, weights, size):\n        self.weights, self.size = weights, size\n"
        "class Child(Tower):\n    pass\n"
        "class Other:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tower = build_stored({"_target_": "some_lab.towers.Tower", "weights": "gone.pt", "size": 3}, "model", ["some_lab"])
    assert (tower.weights, tower.size) == (None, 3)
    for name in ("Child", "Other", "model_part", "Missing"):
        with pytest.raises(UntrustedPartError, match="declares no such part"):
            build_stored({"_target_": f"some_lab.towers.{name}"}, "model", ["some_lab"])


def test_parts_bring_no_weights_of_their_own() -> None:
    backbone = {"_target_": "keygrip.models.backbone.dino.DinoBackbone", "variant": "tiny", "image_size": 32}
    backbone |= {"width": 16, "depth": 1, "heads": 2, "weights": "pretrained", "weights_path": "/nowhere/x.pth"}
    built = build_stored({"_target_": "keygrip.training.optimizers.AdamW", "lr": 1.0}, "optimizer")
    assert built.lr == 1.0
    found = build_stored([[backbone]], "model")
    assert isinstance(found[0][0], DinoBackbone)
    assert found[0][0].loaded_weights == "random"


def test_what_made_shards_hold_stays_as_it_was() -> None:
    """The folder of a set is named by a hash of these settings: with others, evaluation would look for another
    folder."""
    backbone = {"_target_": "keygrip.models.backbone.dino.DinoBackbone", "image_size": 32, "init_from": "runs/encoder"}
    backbone |= {"variant": "tiny", "width": 16, "depth": 1, "heads": 2}
    made = {
        "_target_": "keygrip.data.image_text.bucket_folders.MadeImages",
        "maker": "m",
        "options": {"view": backbone},
    }
    kept = build_stored(made | {"_recursive_": False}, "data")
    assert kept.options == {"view": backbone}
    assert not kept.make_missing
    built = build_stored(made, "data")  # if Hydra built it, it would have no weights of its own
    assert isinstance(built.options["view"], DinoBackbone)
    assert built.options["view"].loaded_weights == "random"


def test_a_key_with_dots_is_not_taken_for_a_place_where_nothing_is_built(tmp_path: Path) -> None:
    made = {"_target_": "keygrip.data.shards.made_shards.MadeShards", "_recursive_": False, "maker": "m", "options": {}}
    source = {"_target_": "keygrip.data.video_text.shard_source.ShardSource"}
    evil = made | {"maker": "os.system", "folder": str(tmp_path), "make_missing": True}
    names = ("a.make.options.b", "a.make.options", "a")
    sources = {name: source | {"make": made if name == "a" else evil} for name in names}
    for stored in (sources, dict(reversed(sources.items()))):
        found = build_stored({"sources": stored}, "data")["sources"]
        assert [found[name].make.make_missing for name in names] == [False] * 3
    text = {"_target_": "keygrip.models.patch_dit.text_encoders.T5Text", "source": "/etc/secret", "length": 8}
    for name in ("x.options.y", "x.options"):
        for stored in ({name: text, "x": made}, {"x": made, name: text}):
            with pytest.raises(UntrustedPartError, match=rf"model\.{name}\.source: the checkpoint names files outside"):
                build_stored(stored, "model")


def test_files_outside_a_checkpoint_are_named_by_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": "keygrip.models.patch_dit.text_encoders.T5Text", "source": "/etc/secret", "length": 8}
    with pytest.raises(UntrustedPartError, match=r"external=\{encoders.text.source: PATH\}"):
        build_stored({"encoders": {"text": node}}, "model")
    with pytest.raises(ValueError, match="is no setting of this checkpoint"):
        build_stored({}, "model", external={"encoders.text.source": "x"})


def test_a_part_that_nothing_uses_is_omitted_with_the_files_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "omitting_lab.py").write_text(
        "from keygrip.training.parts import ReadWhere, model_part\n"
        "@model_part(external=['file'])\n"
        "class Tower:\n    def __init__(self, file=None):\n        self.file = file\n"
        "@model_part\n"
        "class Net:\n"
        "    read_where = {'seen': ReadWhere('looks', omitted=True), 'kept': ReadWhere('looks')}\n"
        "    def __init__(self, seen=None, kept=None, looks=True):\n        self.seen, self.kept = seen, kept\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tower, net = {"_target_": "omitting_lab.Tower"}, {"_target_": "omitting_lab.Net"}
    both = {"net": net | {"seen": tower | {"file": "a"}, "looks": False}}
    caplog.set_level("INFO")
    for external in ({}, {"net.seen.file": "a"}):
        assert build_stored(both, "model", ["omitting_lab"], external)["net"].seen is None
    assert "external.net.seen.file=a is not read: this model does not use net.seen" in caplog.text
    assert both["net"]["seen"] == tower | {"file": "a"}, "the stored settings stay as they are"
    assert without_omitted_parts(both) == {"net": net | {"seen": None, "looks": False}}
    assert external_settings({"model": both}) == {}
    looking = {"net": both["net"] | {"looks": True}}
    assert without_omitted_parts(looking) == looking
    assert external_settings(looking) == {"net.seen.file": "a"}
    with pytest.raises(UntrustedPartError, match=r"external=\{net.seen.file: PATH\}"):
        build_stored(looking, "model", ["omitting_lab"])
    assert build_stored(looking, "model", ["omitting_lab"], {"net.seen.file": "b"})["net"].seen.file == "b"
    with pytest.raises(UntrustedPartError, match="kept"):  # the class does not say that it accepts None
        build_stored({"net": net | {"kept": tower | {"file": "a"}, "looks": False}}, "model", ["omitting_lab"])
    without_files = {"net": net | {"seen": tower, "looks": False}}  # built as before: it may draw random numbers
    assert build_stored(without_files, "model", ["omitting_lab"])["net"].seen is not None
    evil = {"net": net | {"seen": {"_target_": "os.system", "command": "x"}, "looks": False}}
    with pytest.raises(UntrustedPartError, match=r"os\.system is not built"):
        build_stored(evil, "model", ["omitting_lab"])


def test_absurd_configurations_are_refused() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}
    for config in (deep, {"a": torch.zeros(1)}, {1: 2}, {"a": [[0]] * 200_000}):
        with pytest.raises(UntrustedPartError):
            build_stored(config, "model")


def test_a_declaration_is_not_inherited() -> None:
    @model_part
    class Parent:
        pass

    class Child(Parent):
        pass

    assert "__keygrip_part__" in vars(Parent)
    assert "__keygrip_part__" not in vars(Child)


def test_every_target_that_conf_names_is_declared(toy_overrides: Callable[..., list[str]]) -> None:
    """The model and the data that `keygrip.train` builds can be built again from its checkpoint."""
    from omegaconf import OmegaConf

    from keygrip.config import config_folder
    from keygrip.training.parts import _check_node, _nodes

    data = {"foveated_vlm": "robot_tours", "pooled_vlm": "robot_tours", "geometry_vla": "yam_language"}
    data |= {
        "vlm_encoder_pretraining": "robot_tours",
        "depth_reader": "yam_stills",
        "image_autoencoder": "robot_images",
        "geometry_vla_no_injection": "yam_language",
    }
    checked = 0
    for file in sorted((config_folder() / "model").glob("*.yaml")):
        choice = data.get(file.stem, "robot_images" if file.stem.startswith("patch_dit") else "yam")
        cfg = compose("train", [f"model={file.stem}", f"data={choice}", "run_dir=x"])
        plain: Any = OmegaConf.to_container(OmegaConf.create({"model": cfg.model, "data": cfg.data, **cfg}))
        for name in ("model", "data"):
            for path, node in _nodes(OmegaConf.to_container(cfg, resolve=True)[name], name):  # type: ignore[index, call-overload]
                _check_node(node, ".".join(path), ())
                checked += "_target_" in node
        assert plain
    assert checked > 60


def test_named_packages_are_those_that_trust_may_name() -> None:
    """A notebook's `__main__` is not among them; it must not lead to a refusal where no permission is needed."""
    config = {"_target_": "keygrip.A", "a": [{"_target_": "__main__.B"}, {"_target_": "_lab.C"}, {"_target_": "lab.D"}]}
    assert named_packages(config) == ("lab",)
    build_stored(
        {"_target_": "keygrip.training.optimizers.AdamW", "lr": 0.1}, "optimizer", trust=named_packages(config)
    )

"""Root configs compose and fit the code, every setting is read, and a misspelt one finds the nearest."""

from __future__ import annotations

import shlex
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from configs import assert_fits, assert_sound, composed, nodes
from hydra._internal import config_loader_impl, config_repository
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError

from keygrip.config import (
    SettingError,
    TrainSchema,
    compose,
    compose_with_choices,
    config_folder,
    group_options,
    leaves_of,
)
from keygrip.config_errors import describe_config_error, known_keys
from keygrip.models.language import PromptOrder
from keygrip.nearest_setting import nearest
from keygrip.override_values import as_typed, quoted, texts_quoted, values_of
from keygrip.training.compatibility import batch_type, data_sets_of, refuse_divided, refuse_unfit
from keygrip.unread_settings import models_with, refuse_unread

CONF = config_folder()
SUPPORT = Path(__file__).parent / "support"
ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize("root", ROOTS)
def test_root_config_composes_and_fits_the_code(root: str) -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    plain = yaml.safe_load((CONF / f"{root}.yaml").read_text()) or {}
    assert not (set(plain) - {"hydra"}) & groups, "Hydra would take name=value for the choice of a group"
    cfg = composed(root, ["step=record"] if root == "prepare" else [])
    for path, node in nodes(OmegaConf.to_container(cfg, resolve=False)):
        assert_fits(path, node)


def test_a_setting_that_nothing_reads_is_refused() -> None:
    cfg = composed("train", [])
    refuse_unread(cfg, TrainSchema)
    with open_dict(cfg):
        cfg["vlm"] = {"width": 3}
    with pytest.raises(SettingError, match=r"nothing in this run reads 'vlm.width'.*vlm is a group of model=geom"):
        refuse_unread(cfg, TrainSchema)


def test_a_value_below_a_partly_read_group_is_refused() -> None:
    parts = {"part": {"one": "${more.x}"}, "more": {"x": 1}}
    cfg = OmegaConf.create({"model": {"a": "${part.one}", "b": "${.a}"}, **parts})
    refuse_unread(cfg, TrainSchema)
    cfg["part"]["two"] = 2
    with pytest.raises(SettingError, match=r"'part.two'"):
        refuse_unread(cfg, TrainSchema)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("max_stepz", "; the nearest setting that is read is 'max_steps'"),
        ("optmizer.lr", "; the nearest setting that is read is 'optimizer.lr'"),
        ("qqqqqqqq", ""),
    ],
)
def test_a_setting_of_no_model_is_refused_with_the_nearest_that_is_read(key: str, hint: str) -> None:
    cfg = composed("train", [])
    with open_dict(cfg):
        OmegaConf.update(cfg, key, 3)
    with pytest.raises(SettingError, match=rf"^nothing in this run reads '{key}': leave it out{hint}$"):
        refuse_unread(cfg, TrainSchema)


def test_a_group_that_a_run_can_do_without_is_left_out_by_null() -> None:
    run = ["data=yam", "model=volume_query_language", "closed_loop=yam", "window=libero"]
    assert compose("train", run).model.network.instruction is not None
    without = compose("train", [*run, "instruction=null", "closed_loop=null", "shift=null", "window=null"])
    assert without.model.network.instruction is None
    assert "closed_loop" not in without.callbacks
    assert without.data.horizon == compose("train", ["data=yam"]).data.horizon


@pytest.mark.parametrize("model", ["foveated_vlm", "pooled_vlm"])
def test_video_language_models_also_keep_the_best_checkpoint(model: str) -> None:
    for more in ([], ["callbacks.checkpoint.monitor=null"]):
        checkpoint = compose("train", [f"model={model}", "data=robot_videos", *more]).callbacks.checkpoint
        assert (checkpoint.monitor, checkpoint.mode) == (None if more else "val/loss", "min")


@pytest.mark.parametrize(
    "chosen",
    [
        ["model=volume_query", "data=yam", "optimizer=muon"],
        ["experiment=vlm_stage2", "ablation=foveated_vlm/shallow_query", "data.batch_size=3"],
        ["model=toy", "data=toy", f"hydra.searchpath=[file://{SUPPORT / 'conf'}]", "+model.extra=1"],
        ["experiment=vla_yam_language", "closed_loop=yam", "logger=none"],
    ],
)
def test_what_tests_compose_once_is_what_hydra_composes(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are changed between two calls: the cached config is not the one that a test receives."""

    def read(chosen: list[str]) -> tuple[Any, ...]:
        cfg, choices = compose_with_choices("train", chosen)
        whole = OmegaConf.to_container(cfg, resolve=False)
        kinds = [(type(cfg._get_node(key)), cfg._get_node(key)._metadata.ref_type) for key in cfg]  # type: ignore[union-attr]
        with open_dict(cfg):
            cfg.max_steps = 9
            del cfg["model"]
        return whole, choices, kinds

    read(["model=coordinate_regression", "data=yam"])  # its first options are those of the others, too
    kept = [read(chosen), read([*chosen, "max_steps=7"]), read(chosen)]
    for owner, name in (
        (config_repository.ConfigRepository, "load_config"),
        (config_loader_impl, "create_defaults_list"),
        (config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    plain = [read(chosen), read([*chosen, "max_steps=7"])]
    assert kept == [*plain, plain[0]]
    assert plain[0] != plain[1]


def fitting_data(model: str) -> list[str]:
    batches = batch_type(composed("train", [f"model={model}"]).model)
    assert batches is not None
    return data_sets_of(batches)


def assert_trains(model: str, data: str, strategy: str, rotation: str | None) -> None:
    choices = [f"model={model}", f"data={data}", f"strategy={strategy}"]
    cfg = composed("train", choices if rotation is None else [*choices, f"rotation={rotation}"])
    assert_sound(cfg)
    refuse_divided(cfg.optimizer, cfg.strategy.kind)
    classes = {"kmeans": "KMeansRotation", "pca_1d": "PCARotation", None: ""}
    assert str((cfg.get("rotation") or {}).get("_target_", "")).endswith(classes[rotation])


@pytest.mark.parametrize("model", group_options("model"))
def test_every_model_trains_in_several_processes_and_with_every_rotation(model: str) -> None:
    """On one data set for each strategy; the next test has all combinations."""
    data = fitting_data(model)
    strategies = ("ddp", "fsdp")
    rotations = group_options("rotation") if model in models_with("rotation") else [None, None]
    start = group_options("model").index(model)  # so that models that train on the same data begin with different sets
    for number, (strategy, rotation) in enumerate(zip(strategies, rotations, strict=True)):
        assert_trains(model, data[(start + number) % len(data)], strategy, rotation)


@pytest.mark.slow
@pytest.mark.parametrize("model", group_options("model"))
def test_every_combination_of_model_data_strategy_and_rotation_trains_or_is_refused(model: str) -> None:
    fitting = fitting_data(model)
    rotations = group_options("rotation") if model in models_with("rotation") else [None]
    for data, strategy, rotation in product(fitting, group_options("strategy"), rotations):
        assert_trains(model, data, strategy, rotation)
    for data in set(group_options("data")) - set(fitting):
        with pytest.raises(ValueError, match=rf"choose .*data={fitting[0]}(,|$)"):
            refuse_unfit(composed("train", [f"model={model}", f"data={data}"]))
    if rotations == [None]:
        for rotation in group_options("rotation"):
            overrides = [f"model={model}", f"data={fitting[0]}", f"rotation={rotation}"]
            with pytest.raises(ConfigCompositionException) as refused:
                compose("train", overrides)
            assert "rotation is a group of model=volume" in describe_config_error(refused.value, "train", overrides)


def test_the_groups_said_to_be_a_model_s_are_those_of_its_composed_config() -> None:
    models = group_options("model")
    groups = {
        model: {name.partition("@")[0] for name in compose_with_choices("train", [f"model={model}"])[1]}
        for model in models
    }
    of_every_run = set.intersection(*groups.values())
    assert {"data", "optimizer", "strategy"} <= of_every_run
    for group in {path.name for path in CONF.iterdir() if path.is_dir()} - of_every_run:
        assert models_with(group) == [model for model in models if group in groups[model]], group


@pytest.mark.parametrize("setting", ["callbacks.checkpoint.monitor=loss", "optimizer.lr=3e-4"])
def test_a_setting_of_every_training_is_not_said_to_be_of_the_models_that_give_it_a_value(setting: str) -> None:
    for model, group in (("foveated_vlm", "callbacks"), ("patch_dit_base", "optimizer")):
        assert group in yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    overrides = ["checkpoint=run", setting]
    with pytest.raises(ConfigCompositionException) as refused:
        composed("serve", overrides)
    text = describe_config_error(refused.value, "serve", overrides)
    assert f"no setting '{setting.partition('=')[0]}' in serve.yaml" in text
    assert "model=" not in text
    assert models_with(setting.partition("=")[0].partition(".")[0]) == []


def test_the_same_setting_has_one_name_and_one_set_of_values_in_every_model() -> None:
    found: dict[str, dict[str, Any]] = {"log_images": {}, "prompt_order": {}}
    for group in ("model", "vlm"):
        for file in (CONF / group).glob("*.yaml"):
            for path, value in leaves_of(yaml.safe_load(file.read_text()), ()):
                for part, values in found.items():
                    if path[-1].startswith(part):
                        values.setdefault(path[-1], []).append(value)
    assert found["log_images"].keys() == {"log_images_every_n_steps"}
    assert len(found["log_images"]["log_images_every_n_steps"]) >= 7
    assert set(found["prompt_order"]["prompt_order"]) == set(get_args(PromptOrder))


def test_there_are_few_files() -> None:
    assert len(list(CONF.rglob("*.yaml"))) <= 110


def test_nearest_key() -> None:
    keys = known_keys("train")
    assert nearest("max_step", keys) == "max_steps"
    assert nearest("optimiser.lr", keys) == "optimizer.lr"
    assert nearest("optimizer.learning_rate", keys) == "optimizer.lr"
    assert nearest("optimizer.gradient_clip_val", keys) == "optimizer.clip_norm"
    assert nearest("batchsize", keys) == "data.batch_size"
    assert nearest("zzzzzz", keys) is None


def test_a_step_of_a_run_is_asked_for_by_step() -> None:
    import importlib

    from keygrip.config import compose

    for command in ("serve", "sample", "generate", "export", "prepare"):
        importlib.import_module(f"keygrip.{command}")  # registers its schema
    for command in ("serve", "sample", "generate", "export"):
        more = {"generate": ["video=x", "question=y"], "export": ["to=x"]}.get(command, [])
        assert compose(command, ["checkpoint=x", "step=500", *more]).checkpoint_step == 500
    assert compose("prepare", ["step=record", "root=x"]).call.root == "x"


@pytest.mark.parametrize(
    "text", ["plain", "lr=0.1", "a, b", "it's, [not] there", "a\\b", "end\\", "\\'", "ü (1) {2}: #3", ""]
)
def test_a_quoted_text_is_the_text_whatever_it_holds(text: str) -> None:
    assert composed("evaluate", ["evaluate=policy", f"checkpoint={quoted(text)}"]).checkpoint == text
    assert values_of("checkpoint", quoted(text)) == ([text] if text else [])


@pytest.mark.parametrize("folder", ["runs/a", "läufe/1.0", "Lauf, 1 (neu)", "it's", 'a "b" $c', "a\\", "x!y", " "])
def test_an_override_is_shown_as_it_can_be_typed(folder: str) -> None:
    (typed,) = shlex.split(as_typed("run_dir", Path(folder)))
    assert compose("train", [typed]).run_dir == folder
    assert as_typed("resume", "läufe/a-1") == "resume=läufe/a-1"


@pytest.mark.parametrize(
    "sentence",
    [
        *("At second 2, which digit?", "What's left, red or blue?", "Is it {x}?", "a = b\\", "Wo ist der Würfel!"),
        *('"Yes", he said', "How many? 1; 2", "x: 1", r"Is it 5 \ 3 or \(a\)?", "1.50", "007", " a "),
        *('"STOP" and "GO"', "'left' or 'right'", "[a] and [b]", "(1) a, (2) b"),
    ],
)
def test_a_sentence_needs_no_quotes_for_hydra(sentence: str) -> None:
    import keygrip.evaluate
    import keygrip.generate
    import keygrip.run
    import keygrip.sample  # noqa: F401  (registers its schema)

    assert compose("generate", ["checkpoint=x", "video=null", f"question={sentence}"]).question == sentence
    assert compose("sample", ["checkpoint=x", f"prompt={sentence}"]).prompt == sentence
    assert compose("run", ["checkpoint=x", "robot=yam", f"robot.instruction={sentence}"]).robot.instruction == sentence
    given = ["evaluate=policy", "checkpoint=x", "env=gymnasium", f"env.task.instruction={sentence}"]
    assert compose("evaluate", given).env.task.instruction == sentence
    key = "callbacks.closed_loop.env.task.instruction"
    trained = compose("train", ["model=volume_query", "data=yam", "closed_loop=gymnasium", f"{key}={sentence}"])
    assert trained.callbacks.closed_loop.env.task.instruction == sentence
    trained = compose("train", ["model=foveated_vlm", "data=robot_videos", f"collator.system={sentence}"])
    assert trained.collator.system == sentence


def test_lists_and_quotes_of_sentences_are_hydras_and_so_are_sweeps() -> None:
    given = [
        "question=[a, b]",
        "question='a, b'",
        "question=null",
        "question=choice(a,b)",
        "question=${seed}",
        "prompt=true",
    ]
    mistaken = ["question=[a!, b]", "question='it's'"]  # Hydra names the mistake
    assert texts_quoted([*given, *mistaken, "question=[a, b"], ()) == [*given, *mistaken, "question='[a, b'"]
    assert texts_quoted(["prompt=a,b", "-m"], ()) == ["prompt=a,b", "-m"]
    assert texts_quoted(["data.root=a,b"], ()) == ["data.root=a,b"]


def test_folders_may_have_letters_outside_ascii() -> None:
    given = ["run_dir=läufe/a", "data.root=/home/jürgen/数据, b", "+x.y=ä,é", "lr=1", "a='ä'", "b=[ä]", "ä", "-m"]
    assert texts_quoted(given, ("run_dir",)) == [
        *("run_dir='läufe/a'", "data.root='/home/jürgen/数据',b", "+x.y='ä','é'", "lr=1", "a='ä'", "b=[ä]", "ä", "-m"),
    ]
    for sweep in ("sweep=vlm_claims", "hydra.mode=MULTIRUN"):
        swept = texts_quoted(["data.root=/ä,/ö", "run_dir=1_0,2", sweep], ("run_dir",))
        assert swept == ["data.root='/ä','/ö'", "run_dir='1_0','2'", sweep]
    with_commas = ["run_dir=läufe, 1", "data.root=a, 1", "run_dir=out, 1"]  # Hydra's error shows them as they are
    assert texts_quoted(with_commas, ("run_dir",)) == with_commas
    cfg = compose("train", ["model=volume_query", "data=yam", "run_dir=läufe", "data.root=/home/jürgen/x y"])
    assert (cfg.run_dir, cfg.data.root) == ("läufe", "/home/jürgen/x y")


def test_values_of_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    assert values_of("checkpoint", "runs/a,'runs/b, c'") == ["runs/a", "runs/b, c"]
    assert values_of("checkpoint", "???") == values_of("checkpoint", "lr=1") == values_of("checkpoint", "null") == []
    monkeypatch.setenv("KEYGRIP_TEST_RUN", "runs/c")
    assert values_of("checkpoint", "runs/a,${oc.env:KEYGRIP_TEST_RUN}/x") == ["runs/a", "runs/c/x"]


def test_recipes_ask_for_what_they_must_be_given() -> None:
    """`???` would keep a value that is already set: a stage would begin with random weights instead of those of the
    stage before."""
    asking: dict[str, set[str]] = {}
    for file in (config_folder() / "experiment").glob("*.yaml"):
        assert "???" not in file.read_text(encoding="utf-8"), file
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, node in content.items() if file.stem == "options" else [(file.stem, content)]:
            asked = {".".join(key) for key, value in leaves_of(node, ()) if value == "${mandatory:}"}
            if asked:
                asking[name] = asked
    assert asking.keys() >= {"vlm_stage2", "vlm_long_videos", "vlm_encoder_probe", "yam_dinov3"}
    for name, settings in asking.items():
        cfg = compose("train", [f"experiment={name}"])
        for setting in settings:
            with pytest.raises(
                InterpolationResolutionError, match=f"the setting {setting} has no value: give {setting}="
            ):
                OmegaConf.select(cfg, setting)


@pytest.mark.parametrize("name", ["2025_01_02", "1.10", "007", "1e5", "12", "'1.10'", "a_1"])
def test_a_folder_whose_name_looks_like_a_number_keeps_its_letters(name: str) -> None:
    assert compose("train", [f"run_dir={name}"]).run_dir == name.strip("'")
    assert compose("train", [f"resume={name}", "run_dir=a"]).resume == name.strip("'")
    assert compose("train", ["resume=true", "run_dir=a"]).resume is True


def test_every_command_keeps_the_letters_of_such_a_folder() -> None:
    import keygrip.demo
    import keygrip.export  # noqa: F401  (registers its schema)

    assert compose("demo", ["run_dir=2025_01_02"]).run_dir == "2025_01_02"
    assert compose("export", ["checkpoint=1.10", "to=2025_01_02"]).to == "2025_01_02"


def test_numbers_stay_numbers_where_no_text_is_wanted() -> None:
    assert compose("train", ["max_steps=10_000", "run_dir=a"]).max_steps == 10_000
    given = ["run_dir=1_0,b,2.50", "hydra.sweep.dir=2024_12_31", "run_dir='a, 1'", "seed=1_0", "+run_dir=3", "-m"]
    assert texts_quoted(given, ("run_dir", "hydra.sweep.dir")) == [
        *("run_dir='1_0',b,'2.50'", "hydra.sweep.dir='2024_12_31'", "run_dir='a, 1'", "seed=1_0", "+run_dir='3'", "-m"),
    ]

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from lightning import LightningModule
from omegaconf import OmegaConf

from keygrip import artifacts, renamed_settings, train
from keygrip.config import compose
from keygrip.training import build_limits
from keygrip.training.checkpoints import find_checkpoint, load_module, read_checkpoint, trusted_packages
from keygrip.training.saving import AtomicCheckpointIO, SaveLatest

TRUST = ["toy_parts"]


@pytest.fixture
def run_folder(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> Path:
    train.run(compose("train", toy_overrides("run")))
    return tmp_path / "run"


@pytest.mark.parametrize("trust", ["my_lab", 5, None])
def test_trust_that_is_no_list_is_refused(trust: object) -> None:
    """A string would be read letter by letter."""
    with pytest.raises(ValueError, match=r"is no list of packages: trust=\[my_lab\]"):
        trusted_packages(OmegaConf.create({"trust": trust}))
    assert trusted_packages(OmegaConf.create({"trust": ["my_lab"]})) == ("my_lab",)


def test_a_module_comes_back_from_its_checkpoint_alone(run_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "alone.ckpt"
    (run_folder / "checkpoints" / "last.ckpt").rename(moved)
    module = load_module(moved, trust=TRUST)
    checkpoint = read_checkpoint(moved)
    assert not module.training
    assert module.scale == checkpoint["scale"]  # type: ignore[attr-defined]
    for name, value in checkpoint["ema"]["parameters"].items():
        assert torch.equal(module.state_dict()[name], value)
    own = load_module(moved, use_ema=False, trust=TRUST).state_dict()
    assert all(torch.equal(own[name], value) for name, value in checkpoint["state_dict"].items())
    assert any(not torch.equal(own[name], value) for name, value in module.state_dict().items())
    header = checkpoint["keygrip"]
    assert header["config"]["model"]["width"] == 8
    assert header["packages"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (lambda ema: {name: value.int() for name, value in ema.items()}, r"the EMA of \S+ is torch.int32, .*float32"),
        (lambda ema: {}, "its EMA is none"),
    ],
)
def test_a_moving_average_that_cannot_be_one_is_refused(
    damaged: Callable[[dict[str, Any]], dict[str, Any]], said: str, run_folder: Path, tmp_path: Path
) -> None:
    """Integers were rounded averages, and without entries the last step's weights were called the average."""
    checkpoint = read_checkpoint(find_checkpoint(run_folder))
    checkpoint["ema"]["parameters"] = damaged(checkpoint["ema"]["parameters"])
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=said):
        load_module(tmp_path / "other.ckpt", trust=TRUST)


def test_settings_with_former_names_are_read_with_the_new_ones(
    run_folder: Path, toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_folder / "checkpoints" / "last.ckpt"
    content = read_checkpoint(file)
    model = content["keygrip"]["config"]["model"]
    assert model.pop("width") == 8
    model["breadth"] = "small"
    AtomicCheckpointIO().save_checkpoint(content, file)
    with pytest.raises(ValueError, match="do not fit this keygrip"):
        load_module(file, trust=TRUST)
    monkeypatch.setitem(renamed_settings.STORED, model["_target_"], {"breadth": ("width", {"small": 8})})
    assert load_module(file, trust=TRUST).state_dict()["network.0.bias"].shape == (8,)
    train.run(compose("train", [*toy_overrides("run"), "max_steps=15", "resume=true"]))
    assert read_checkpoint(file)["global_step"] == 15


def test_former_names_of_stored_settings() -> None:
    stored: dict[str, Any] = {
        "model": {
            "_target_": "keygrip.models.geometry_vla.module.GeometryVLAModule",
            "network": {"vlm": {"_target_": "keygrip.models.language.qwen_vl.QwenVL", "prompt_order": "images_first"}},
            "log_images": True,
        },
        "data": {
            "_target_": "keygrip.data.image_text.datamodule.ImageShards",
            "make": {
                "_target_": "keygrip.data.image_text.bucket_folders.MadeImages",
                "options": {"train": 3, "picture": {"sizes": [[208, 192, 6]]}},
            },
        },
        "parts": [{"_target_": "keygrip.models.patch_dit.network.PatchDiT", "level_hidden": 1, "width": 2}],
        "other": {"_target_": "my_lab.Network", "log_images": True, "level_hidden": 3},
    }
    before = copy.deepcopy(stored)
    now = renamed_settings.with_new_names(stored)
    assert stored == before
    assert now["model"]["log_images_every_n_steps"] == 1
    assert now["model"]["network"]["vlm"]["prompt_order"] == "visual_first"
    assert now["data"]["make"]["options"] == {"train": 3, "image": {"sizes": [[208, 192, 6]]}}
    assert now["parts"] == [{"_target_": "keygrip.models.patch_dit.network.PatchDiT", "timestep_hidden": 1, "width": 2}]
    assert now["other"] == stored["other"], "a class of another package"
    assert renamed_settings.with_new_names(now) == now
    for target, names in renamed_settings.STORED.items():
        settings = inspect.signature(get_class(target)).parameters
        assert {new.partition(".")[0] for new, _ in names.values()} <= settings.keys(), target


def test_a_loaded_module_keeps_nothing_in_its_file(run_folder: Path) -> None:
    file = run_folder / "checkpoints" / "last.ckpt"
    module = load_module(file, trust=TRUST)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    with file.open("r+b") as handle:  # in place, as `cp` over it does
        handle.write(bytes(file.stat().st_size))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in kept.items())
    assert any(value.any() for value in kept.values())


def test_run_folder_holds_config_origin_and_result(run_folder: Path) -> None:
    import json

    import yaml

    assert yaml.safe_load((run_folder / "config.yaml").read_text())["model"]["optimizer"]["lr"] == 1e-3
    assert "torch" in json.loads((run_folder / "metadata.json").read_text())["packages"]
    result = json.loads((run_folder / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["steps"] == 13
    assert result["metrics"]["val/loss"] > 0
    assert not list(run_folder.rglob(f"*{artifacts.WRITING}*"))


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        load_module(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*looked for checkpoints/last.ckpt"):
        load_module(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoints_are_refused(share: float, run_folder: Path, tmp_path: Path) -> None:
    whole = (run_folder / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.ckpt (is truncated or not a checkpoint|has no hash at its end)"):
        load_module(cut)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pth"
    torch.save({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"is not a keygrip checkpoint; .*backbone.weights_path"):
        load_module(foreign)
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint at all")
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        load_module(text)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    file = tmp_path / "attack.ckpt"
    torch.save({"state_dict": {}, "keygrip": Attack()}, file)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        load_module(file, trust=TRUST)
    plain = tmp_path / "plain.ckpt"
    plain.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        load_module(plain)
    assert not (tmp_path / "harm").exists()


def test_checkpoint_of_another_model_is_refused(run_folder: Path) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(ValueError, match="holds a ToyModule, not a Other"):
        load_module(run_folder, expected=Other, trust=TRUST)


def test_what_other_threads_build_meanwhile_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may load two models in threads, or build a network of its own while a small one is loaded."""
    monkeypatch.setattr(build_limits, "OWN_NUMBERS", 10)  # 40 numbers of parameters in all
    stored = {"weight": torch.zeros(0)}
    with ThreadPoolExecutor(1) as other, build_limits.at_most_stored({}, stored, external=False):
        assert other.submit(torch.nn.Linear, 100, 100).result().weight.shape == (100, 100)

        def load() -> None:
            with build_limits.at_most_stored({}, stored, external=False):
                for _ in range(4):
                    torch.nn.Linear(3, 3, bias=False)

        other.submit(load).result()
        layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(4)]
        with pytest.raises(ValueError, match="builds parameters of 45 numbers"):
            layers.append(torch.nn.Linear(3, 3, bias=False))
    assert torch.nn.Linear(100, 100).weight.shape == (100, 100)


def test_weights_that_do_not_fit_are_refused(run_folder: Path) -> None:
    file = run_folder / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["keygrip"]["config"]["model"]["width"] = 9
    AtomicCheckpointIO().save_checkpoint(content, file)
    with pytest.raises(ValueError, match=r"do not fit its model: .*size mismatch for network"):
        load_module(file, trust=TRUST)


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_killed_while_saving_the_previous_checkpoint_is_whole(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": torch.tensor(1)}, file)
    child = os.fork()
    if child == 0:  # the child dies in the middle of writing the second one

        def die(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "fsync":
            os.fsync = die  # type: ignore[assignment]
        else:
            Path.replace = die  # type: ignore[assignment, method-assign]
        AtomicCheckpointIO().save_checkpoint({"n": torch.tensor(2)}, file)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert torch.load(file, weights_only=True)["n"] == 1
    monkeypatch.setattr(artifacts, "_looked", {})  # as in the process that resumes the run, some time later
    monkeypatch.setattr(artifacts, "STALE_AFTER_S", 0.0)
    AtomicCheckpointIO().save_checkpoint({"n": torch.tensor(3)}, file)
    assert torch.load(file, weights_only=True)["n"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_with_broken_weights_never_replaces_a_good_one(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_parts

    def poison(self: toy_parts.ToyModule, *args: Any) -> None:
        if self.trainer.global_step == 6:
            with torch.no_grad():
                self.network[0].weight[0, 0] = float("nan")

    monkeypatch.setattr(toy_parts.ToyModule, "on_train_batch_start", poison, raising=False)
    overrides = toy_overrides("run", "callbacks.checkpoint.every_n_steps=2", "callbacks.health=null")
    with pytest.raises(ValueError, match=r"NaN or infinite before step 8 \(network.0.weight"):
        train.run(compose("train", overrides))
    assert read_checkpoint(tmp_path / "run")["global_step"] == 6
    load_module(tmp_path / "run", trust=TRUST)


def test_a_loss_that_is_not_finite_stops_the_run(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = toy_overrides("run", "optimizer.lr=1e30", "optimizer.clip_norm=null", "optimizer.warmup_steps=0")
    with pytest.raises(ValueError, match=r"became NaN or infinite .* lower optimizer.lr"):
        train.run(compose("train", overrides))


def test_checkpoints_of_a_future_that_was_given_up_go(
    toy_overrides: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a run that continues from an earlier step would be stored next to later steps of other weights."""
    train.run(compose("train", toy_overrides("run", "callbacks.checkpoint.every_n_steps=2", "max_steps=6")))
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-review.ckpt").write_bytes(b"somebody's own copy")
    (folder / "best.ckpt").write_bytes(b"of step 6")
    (folder / "best.json").write_text(json.dumps({"val/loss": 0.0, "step": 6}))
    back = [f"resume={folder / 'step-00000004.ckpt'}", "max_steps=5"]
    train.run(compose("train", toy_overrides("run", "callbacks.checkpoint.every_n_steps=2", *back)))
    kept = [f"step-0000000{n}.ckpt" for n in (2, 4, 5)]
    assert sorted(path.name for path in folder.glob("step-*")) == [*kept, "step-review.ckpt"]
    assert not list(folder.glob("best*"))
    assert "step-00000006.ckpt is removed: training went on from an earlier step" in caplog.text


@pytest.mark.parametrize("content", ["{}", "[" * 100_000, "[]", '{"step": "6"}', '{"step": 6, "val/loss": "low"}'])
def test_a_damaged_record_of_the_best_is_named(content: str, tmp_path: Path) -> None:
    saving = SaveLatest(str(tmp_path), monitor="val/loss")
    (tmp_path / "best.json").write_text(content)
    trainer: Any = SimpleNamespace(global_step=8, is_global_zero=True, state=SimpleNamespace(fn="validate"))
    module: Any = None
    with pytest.raises(ValueError, match=r"best\.json is damaged.*: remove it, and the next validation"):
        saving.on_validation_start(trainer, module)
    (tmp_path / "best.json").write_text('{"step": 6, "val/loss": 0.5}')
    saving.on_validation_start(trainer, module)
    assert saving.best == 0.5


def of_two_processes(decision: tuple[float, bool] | None, **logged: float) -> Any:
    """Return the trainer of one of two processes.

    Args:
        decision: what the first process broadcasts; None if this is the first process.
    """
    strategy = SimpleNamespace(broadcast=lambda own: own if decision is None else decision)
    metrics = {name.replace("_", "/"): torch.tensor(value) for name, value in logged.items()}
    return SimpleNamespace(
        world_size=2,
        global_step=4,
        is_global_zero=decision is None,
        sanity_checking=False,
        callback_metrics=metrics,
        strategy=strategy,
    )


def test_the_first_process_decides_for_all_which_state_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that each process logs for itself used to let one wait for ever in a save that the other left out."""
    module: Any = None
    saved: list[int] = []

    def validated(saving: SaveLatest, trainer: Any) -> None:
        trainer.save_checkpoint = lambda path, weights_only: saved.append(trainer.is_global_zero)
        saving.on_validation_end(trainer, module)

    first, second = (SaveLatest(str(tmp_path / name), monitor="val/loss") for name in ("first", "second"))
    first.best = second.best = 1.0
    (tmp_path / "first").mkdir()
    validated(first, of_two_processes(None, val_loss=0.5))
    validated(second, of_two_processes((0.5, True), val_loss=2.0))
    assert (saved, first.best, second.best) == ([True, False], 0.5, 0.5)
    assert json.loads((tmp_path / "first" / "best.json").read_text()) == {"val/loss": 0.5, "step": 4}
    validated(first, of_two_processes(None, val_loss=float("nan")))
    validated(second, of_two_processes((float("nan"), False), val_loss=0.1))
    assert (saved, first.best, second.best) == ([True, False], 0.5, 0.5)


def test_a_metric_that_another_process_has_not_logged_is_refused_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = None
    monkeypatch.setattr("keygrip.training.saving.maximum_over_processes", lambda own: max(own, 1))
    trainer = of_two_processes(None, val_loss=0.5, train_loss=0.1)
    with pytest.raises(ValueError, match=r"'val/loss' is not logged in validation by every process; logged: val/loss$"):
        SaveLatest(str(tmp_path), monitor="val/loss").on_validation_end(trainer, module)


@pytest.mark.parametrize("name", ["train/loss", "lr-AdamW"])
def test_a_value_of_training_steps_chooses_no_best_state(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"monitor='{name}' is a value of single training steps: give a metric of"):
        SaveLatest(str(tmp_path), monitor=name)


def trainer_of_steps(step: int) -> Any:
    """Return a trainer after an optimizer step in the middle of an epoch."""
    epoch_loop = SimpleNamespace(_should_accumulate=lambda: False, batch_progress=SimpleNamespace(is_last_batch=False))
    return SimpleNamespace(
        global_step=step,
        current_epoch=0,
        max_steps=100,
        max_epochs=-1,
        should_stop=False,
        is_global_zero=True,
        lightning_module=None,
        fit_loop=SimpleNamespace(epoch_loop=epoch_loop),
    )


def test_a_save_that_is_due_on_any_process_waits_for_no_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More work than `every_n_minutes` would otherwise be lost where steps are long."""
    saved: list[int] = []
    monkeypatch.setattr(SaveLatest, "save", lambda self, trainer: saved.append(trainer.global_step))
    others = [0]
    monkeypatch.setattr("keygrip.training.saving.maximum_over_processes", lambda own: max(own, *others))
    trainer = trainer_of_steps(3)
    module: Any = None
    saving = SaveLatest(str(tmp_path), every_n_minutes=60)
    saving.on_train_batch_end(trainer, module)
    assert saved == []
    others.append(1)
    saving.on_train_batch_end(trainer, module)
    assert saved == [3]


@pytest.mark.parametrize(
    ("minutes", "save_s", "expected"),
    [
        (2, 3, [120, 240, 360, 480, 600, 720, 840, 960]),  # 3 s of 120 s are less than 5 %
        (2, 12, [120, 360, 600, 840]),
        (0.5, 12, [60, 300, 540, 780]),
        (None, 12, []),
    ],
)
def test_slow_saves_by_minutes_take_at_most_a_twentieth_of_the_time(
    minutes: float | None,
    save_s: int,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a thousand seconds of training in steps of 60 s; the time of saving is added to them."""
    caplog.set_level("INFO")
    now, trained, saved = [0.0], [0], list[int]()
    monkeypatch.setattr("keygrip.training.saving.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("keygrip.training.saving.non_finite_parameters", lambda module: [])
    trainer = trainer_of_steps(0)
    module: Any = None

    def save_checkpoint(path: Path, weights_only: bool) -> None:
        now[0] += save_s
        saved.append(trained[0])

    trainer.save_checkpoint = save_checkpoint
    saving = SaveLatest(str(tmp_path), every_n_minutes=minutes, keep=0)
    for trainer.global_step in range(1, 17):
        now[0] += 60
        trained[0] += 60
        saving.on_train_batch_end(trainer, module)
    assert saved == expected
    slow = minutes is not None and save_s == 12
    assert sum("saving takes at most 5 % of the time" in line for line in caplog.messages) == slow
    saving.on_train_end(trainer, module)  # and at the end in any case
    assert saved == [*expected, *[960][: 960 not in expected]]


def test_the_slowest_process_says_how_long_a_save_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a process that did not write the file would soon ask all of them for the next save."""
    now, saved = [0.0], list[int]()
    monkeypatch.setattr("keygrip.training.saving.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("keygrip.training.saving.non_finite_parameters", lambda module: [])
    trainer = trainer_of_steps(0)
    module: Any = None

    def save_checkpoint(path: Path, weights_only: bool) -> None:
        now[0] += 1
        saved.append(trainer.global_step)

    trainer.save_checkpoint = save_checkpoint
    saving = SaveLatest(str(tmp_path), every_n_minutes=1, keep=0)
    trainer.global_step = 1
    with monkeypatch.context() as patch:
        patch.setattr("keygrip.training.saving.maximum_over_processes", lambda own: 30.0 * own)
        saving.save(trainer)
    for trainer.global_step, now[0] in ((2, 600.0), (3, 601.0)):
        saving.on_train_batch_end(trainer, module)
    assert saved == [1, 3]


def test_the_last_checkpoints_by_step_stay(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    overrides = toy_overrides("run", "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=2")
    train.run(compose("train", overrides))
    folder = tmp_path / "run"
    names = sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))
    assert names == ["last.ckpt", "step-00000012.ckpt", "step-00000013.ckpt"]
    assert read_checkpoint(find_checkpoint(folder, 12))["global_step"] == 12
    assert torch.equal(
        load_module(find_checkpoint(folder, 13), trust=TRUST).state_dict()["network.0.weight"],
        load_module(folder, trust=TRUST).state_dict()["network.0.weight"],
    )
    with pytest.raises(FileNotFoundError, match=r"keeps no checkpoint of step 4: it has 12, 13"):
        find_checkpoint(folder, 4)

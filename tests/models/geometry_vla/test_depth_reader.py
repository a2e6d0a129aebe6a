"""A geometry encoder that is first trained on depth: it learns, another run starts from it, and it stays frozen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer
from omegaconf import OmegaConf
from policy_batches import validated_in_pieces
from torch.utils.data import DataLoader
from vla_parts import (
    CAMERAS,
    INSTRUCTIONS,
    S,
    V,
    ready_module,
    small_batch,
    small_geometry,
    small_module,
    small_statistics,
    write_demos,
)

from keygrip import train
from keygrip.config import compose
from keygrip.models.backbone import DinoBackbone
from keygrip.models.geometry_vla.depth_pretraining import DepthReaderModule
from keygrip.models.geometry_vla.geometry import DinoMultiView
from keygrip.setting_types import refuse_ill_typed
from keygrip.training.checkpoints import load_module
from keygrip.training.optimizers import AdamW
from keygrip.training.pretraining import PretrainingStage, complete_stages

START = "runs/depth_reader-x"


def trained(network: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "keygrip.models.geometry_vla.geometry.load_module", lambda path, **opening: SimpleNamespace(network=network)
    )


def test_it_learns_the_depth_of_a_batch() -> None:
    module = DepthReaderModule(small_geometry(), AdamW(lr=1e-2))
    batch = small_batch()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        losses = module.losses(module(batch), batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        errors.append(float(losses["point_cm"]))
    assert errors[-1] < 0.3 * errors[0]
    torch.testing.assert_close(losses["loss"], losses["points"] + losses["depth"])


def test_a_validation_is_the_mean_over_all_known_cells() -> None:
    module = DepthReaderModule(small_geometry(), AdamW(lr=1e-3), log_images_every_n_steps=0)
    data = small_batch(2 * INSTRUCTIONS)
    assert data.depth is not None
    data.depth[0] = 0.0
    data.depth[1, :, 8:] = 0.0
    whole, parts = (
        validated_in_pieces(module, data, each) for each in ([slice(4)], [slice(1), slice(1, 2), slice(2, 4)])
    )
    assert set(whole) == {f"val/{name}" for name in ("loss", "points", "depth", "point_cm", "depth_cm")}
    assert parts == pytest.approx(whole, rel=1e-3)
    assert whole["val/point_cm"] > 0


@pytest.mark.parametrize("reads_depth", [True, False], ids=["depth_reader", "geometry_vla"])
def test_validations_show_images_so_many_steps_apart(
    reads_depth: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = DepthReaderModule(small_geometry(), AdamW(lr=1e-3)) if reads_depth else ready_module(tmp_path)
    shown, data, step = list[int](), small_batch(), 0
    monkeypatch.setattr(type(module), "global_step", property(lambda self: step))
    monkeypatch.setattr(module, "_show", lambda *_: shown.append(step))
    assert module.log_images_every_n_steps == 1
    for every, steps in ((3, [0, 4]), (0, [])):
        shown.clear()
        module.log_images_every_n_steps, module._images_at = every, None
        for step in (0, 2, 4):  # noqa: B007, the property reads it
            validated_in_pieces(module, data, [slice(1), slice(1, None)])
        assert shown == steps, every
    parts = [module.network, AdamW(lr=1e-3)] if reads_depth else [module.network, module.actions, AdamW(lr=1e-3), None]
    with pytest.raises(ValueError, match="log_images_every_n_steps is 0"):
        type(module)(*parts, log_images_every_n_steps=-1)


def test_batches_without_depth_and_encoders_that_learn_none_are_refused() -> None:
    module = DepthReaderModule(small_geometry(), AdamW(lr=1e-3))
    batch = small_batch(depth=False)
    with pytest.raises(ValueError, match=r"set data\.depth=true"):
        module.losses(module(batch), batch)
    with pytest.raises(ValueError, match=r"set geometry\.point_weight or geometry\.depth_weight above 0"):
        DepthReaderModule(small_geometry(point_weight=0.0, depth_weight=0.0), AdamW(lr=1e-3))


def test_a_policy_begins_with_the_trained_encoder_and_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small_geometry()
    torch.nn.init.normal_(before.reduce.weight)
    trained(before, monkeypatch)
    encoder = small_geometry(init_from=START, frozen=True)
    module = ready_module(tmp_path, geometry=encoder)
    for name, value in before.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)
    batch = small_batch()
    losses = module.losses(module(batch), batch)
    assert {"point_cm", "depth_cm"} <= set(losses)
    assert not {"points", "depth"} & set(losses)
    losses["total"].backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    compressor = module.network.compressor
    assert compressor is not None
    assert all(parameter.grad is not None for parameter in compressor.parameters())
    torch.testing.assert_close(losses["total"], losses["action"])


def test_a_frozen_encoder_has_the_same_features_in_training_and_in_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: `backbone.drop_path` left blocks out in training, whose weights it cannot regularise."""

    def encoder(**options: object) -> DinoMultiView:
        backbone = DinoBackbone("tiny", S, "random", width=16, depth=3, heads=2, drop_path=0.9)
        return DinoMultiView(backbone, V, dim=16, heads=2, **options)  # type: ignore[arg-type]

    batch = small_batch()
    for frozen in (True, False):
        trained(encoder(), monkeypatch)
        built = encoder(init_from=START, frozen=frozen)
        assert any(part.training for part in built.modules()) == (not frozen), "before Lightning sets a mode"
        module = ready_module(tmp_path, geometry=built)
        features = []
        for mode in (True, False):
            module.train(mode)
            assert module.network.head.training == mode
            with torch.no_grad():
                features.append(built(batch.images, batch.view_intrinsics, batch.view_world_to_camera).tokens)
        assert torch.equal(*features) == frozen


class OneBatch(LightningDataModule):
    """A batch as data whose cameras are calibrated or not."""

    def __init__(self, calibrated: bool) -> None:
        super().__init__()
        self.cameras_are_calibrated = calibrated

    def train_dataloader(self) -> DataLoader:
        return DataLoader([small_batch()], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def test_without_calibration_a_frozen_encoder_has_no_error_of_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it was computed with placeholders, which are in place of the matrices of such a camera."""
    trained(small_geometry(), monkeypatch)
    module = ready_module(tmp_path, geometry=small_geometry(init_from=START, frozen=True))
    module.log_images_every_n_steps = 0
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for calibrated in (False, True):
        trainer = Trainer(accelerator="cpu", enable_model_summary=False, max_steps=1, **options)  # type: ignore[arg-type]
        trainer.fit(module, datamodule=OneBatch(calibrated))
        metrics = set(trainer.callback_metrics)
        assert ("train/point_cm" in metrics, "val/point_cm" in metrics) == (calibrated, calibrated)
        assert {"train/depth_cm", "val/depth_cm", "val/position_cm"} <= metrics
        (evaluated,) = trainer.validate(module, datamodule=OneBatch(not calibrated), verbose=False)
        assert ("val/point_cm" in evaluated) != calibrated, "the data that are read decide"


def test_a_start_that_cannot_be_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trained(torch.nn.Linear(2, 2), monkeypatch)
    with pytest.raises(ValueError, match=r"not of model=depth_reader"):
        small_geometry(init_from=START).take_start()
    trained(small_geometry(dim=32), monkeypatch)
    with pytest.raises(
        ValueError,
        match=r"has other sizes than this one \(view_tokens is \[2, 32\] there and \[2, 16\] here; \d+ such in all\)",
    ):
        small_geometry(init_from=START).take_start()
    with pytest.raises(ValueError, match=r"geometry\.frozen=true would keep random weights"):
        small_geometry(frozen=True).take_start()


def test_a_start_is_opened_with_the_packages_and_files_that_the_run_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def load(path: str, **opening: object) -> SimpleNamespace:
        opened.append(opening)
        return SimpleNamespace(network=small_geometry())

    monkeypatch.setattr("keygrip.models.geometry_vla.geometry.load_module", load)
    module = DepthReaderModule(small_geometry(init_from=START), AdamW(lr=1e-2))
    policy = small_module(geometry=small_geometry(init_from=START))
    statistics = small_statistics(tmp_path)
    for started in (module, policy):
        started.own_packages, started.own_files = ("own_lab",), {"backbone.source": "weights"}
        started.set_statistics(statistics)
    assert opened == [{"trust": ("own_lab",), "offered": {"backbone.source": "weights"}}] * 2
    for started in (module, policy):  # a resumed run: the checkpoint has the weights
        started.resumed = True
        started.set_statistics(statistics)
    assert len(opened) == 2


GEOMETRY = ("views=3", "dim=64", "layers=3", "heads=2", "cells=2", "camera_rays=true")
BACKBONE = ("image_size=64", "width=48", "depth=2", "heads=4", "stem=patch")


@pytest.mark.parametrize(
    "overrides",
    [[], [*(f"geometry.{each}" for each in GEOMETRY), *(f"backbone.{each}" for each in BACKBONE)]],
    ids=["as it ships", "all changed"],
)
def test_what_the_encoder_is_reaches_the_run_that_trains_it(overrides: list[str]) -> None:
    """Every setting that changes its sizes or the meaning of its values is the same in the run to start from."""
    policy = compose("train", ["experiment=vla_yam_language", *overrides])
    given = PretrainingStage(list(policy.geometry.init_from.overrides), "depth_reader").overrides
    stage = compose("train", given)
    refuse_ill_typed(OmegaConf.to_container(stage, resolve=True))
    free = {"init_from", "frozen", "backbone", "action_gradient", "point_weight", "depth_weight", "max_depth_m"}
    for name in stage.geometry.keys() - free:
        assert stage.geometry[name] == policy.geometry[name], name
    assert stage.backbone == policy.backbone


def test_another_backbone_reaches_the_run_that_trains_the_encoder() -> None:
    chosen = ["experiment=vla_yam_language", "backbone=dinov3_small", "backbone.weights=random"]
    policy = compose("train", chosen)
    stage = compose("train", PretrainingStage(list(policy.geometry.init_from.overrides), "depth_reader").overrides)
    refuse_ill_typed(OmegaConf.to_container(stage, resolve=True))
    policy.geometry.init_from = None
    with torch.device("meta"):
        there, here = (instantiate(cfg.geometry, _convert_="all").state_dict() for cfg in (stage, policy))
    assert here["backbone.net.cls_token"].shape[-1] == 384
    assert {name: value.shape for name, value in there.items()} == {name: value.shape for name, value in here.items()}


def test_the_command_trains_one_and_another_run_begins_with_it(tmp_path: Path) -> None:
    write_demos(tmp_path / "demos")
    small = [
        f"data.root={tmp_path / 'demos'}",
        f"data.cameras=[{','.join(CAMERAS)}]",
        "data.num_workers=0",
        "data.batch_size=4",
        "data.val_fraction=0.3",
        "data.horizon=4",
        "backbone.image_size=32",
        "backbone.width=16",
        "backbone.depth=1",
        "backbone.heads=2",
        "geometry.dim=16",
        "geometry.heads=2",
        "strategy=cpu",
        "strategy.precision=32-true",
        "logger=none",
        "max_steps=3",
        "val_every_n_steps=3",
        "limit_val_batches=1",
    ]
    first = [*small, "experiment=depth_reader"]
    train.run(compose("train", [*first, f"run_dir={tmp_path / 'first'}"]))
    module = load_module(tmp_path / "first")
    assert isinstance(module, DepthReaderModule)
    made = PretrainingStage(first, "depth_reader", str(tmp_path))
    (tmp_path / "first").rename(made.run_dir)
    node = {"_target_": "keygrip.training.pretraining.PretrainingStage", **vars(made)}
    ready = complete_stages({"geometry": {"init_from": node}, "model": {"init_from": node, "views": [4]}})
    assert ready["geometry"] == {"init_from": str(made.run_dir)}  # the model starts from the same run
    assert ready["model"] == {"init_from": str(made.run_dir), "views": [4]}
    encoder = small_geometry(init_from=ready["model"]["init_from"], views=4, cells=4)
    encoder.take_start()
    for name, value in module.network.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)

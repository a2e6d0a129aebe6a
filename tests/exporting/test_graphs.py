"""Exported graphs compute what the network computes, at other batch sizes too."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from keygrip.exporting.graphs import ExportGraph, fresh_inputs, write_onnx, write_torch_export
from keygrip.models.backbone import DinoBackbone
from keygrip.models.coordinate_regression.network import CoordinateRegressionGraph, CoordinateRegressionNetwork
from keygrip.models.language.instructions import WordTransformer
from keygrip.models.volume_query.export import volume_query_graph
from keygrip.models.volume_query.network import VolumeQueryNetwork

TUNED = {
    "state": ("height", "gripper"),
    "trunk_width": 32,
    "logit_scale": "learned",
    "height_head": "sinusoidal_and_linear",
    "step_features": True,
}


def backbone(variant: str = "tiny") -> DinoBackbone:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2} if variant == "tiny" else {}
    return DinoBackbone(variant=variant, image_size=64 if variant == "tiny" else 56, weights="random", **small)


def graph(variant: str = "tiny", **options: Any) -> ExportGraph:
    size = 64 if variant == "tiny" else 56
    network = VolumeQueryNetwork(
        backbone(variant), size, 6, horizon=3, pred_size=16, height_bins=8, gripper_bins=4, **options
    )
    for parameter in network.parameters():  # blocks are the identity at initialisation, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return volume_query_graph(network)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="design", marks=pytest.mark.slow),  # the ONNX export below begins with the same one
        pytest.param(TUNED | {"arms": ("left", "right")}, id="tuned, two arms", marks=pytest.mark.slow),
        pytest.param(
            {
                "coupling": "bilinear",
                "step_features": True,
                "instruction": WordTransformer(width=16, heads=2, length=8),
            },
            id="bilinear, told what to do",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_torch_export_equals_the_network(options: dict[str, Any], tmp_path: Path) -> None:
    made = graph(**options)
    assert write_torch_export(made, tmp_path / "model.pt2") < 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    for inputs in fresh_inputs(made, (1, 5)):
        with torch.no_grad():
            expected = made.network(*inputs.values())
        outputs = program(*inputs.values())
        assert len(outputs) == len(made.outputs)
        for one, other in zip(outputs, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        pytest.param("tiny", {}, id="design", marks=pytest.mark.slow),
        pytest.param("tiny", TUNED, id="tuned", marks=pytest.mark.slow),
        pytest.param("dinov2_vits14", {}, id="real backbone", marks=pytest.mark.slow),
    ],
)
def test_onnx_under_onnxruntime_equals_the_network(
    variant: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = graph(variant, **options)
    with caplog.at_level(logging.INFO):
        assert write_onnx(made, tmp_path / "model.onnx") < 1e-4
    assert [record.name for record in caplog.records if record.levelno < logging.WARNING] == []
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == list(made.outputs)
    for inputs in fresh_inputs(made, (4,)):
        with torch.no_grad():
            expected = made.network(*inputs.values())
        outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for one, other in zip(outputs, expected, strict=True):
            assert np.abs(one - other.numpy()).max() <= 1e-4 * (1 + float(other.abs().max()))


def test_the_exporters_log_of_single_nodes_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its warnings are, and a failed export leaves the loggers as they were."""
    loggers = [logging.getLogger(name) for name in ("onnxscript.optimizer", "onnx_ir.passes")]

    def export(*_: object, **__: object) -> None:
        for logger in loggers:
            logger.info("a node is folded")
            logger.warning("a node is left out")
        raise RuntimeError("the export failed")

    monkeypatch.setattr(torch.onnx, "export", export)
    with caplog.at_level(logging.INFO):
        with pytest.raises(RuntimeError, match="the export failed"):
            write_onnx(ExportGraph(Unlike(), {"x": torch.rand(2, 3)}, ("y",)), tmp_path / "model.onnx")
        assert [record.getMessage() for record in caplog.records] == ["a node is left out"] * 2
        assert [logger.getEffectiveLevel() for logger in loggers] == [logging.INFO] * 2


@pytest.mark.slow
def test_the_regression_baseline_exports_too(tmp_path: Path) -> None:
    network = CoordinateRegressionNetwork(backbone(), 64, horizon=3, width=16)
    inputs = {"image": torch.randn(2, 3, 64, 64), "state": torch.rand(2, 1, 10)}
    made = ExportGraph(CoordinateRegressionGraph(network).eval(), inputs, ("position", "rotation", "gripper"))
    assert write_torch_export(made, tmp_path / "model.pt2") < 1e-5


class Unlike(torch.nn.Module):
    """Computes something else when it is traced."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + (1.0 if torch.compiler.is_exporting() else 0.0),)


class PartlyBroken(torch.nn.Module):
    """When it is traced, the second output is NaN for batches of this size or larger."""

    def __init__(self, from_batch: int) -> None:
        super().__init__()
        self.from_batch = from_batch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_exporting():
            return x, x
        return x, x + 0 * torch.sqrt(self.from_batch - 0.5 - torch.ones_like(x).sum(0, keepdim=True))


@pytest.mark.parametrize("from_batch", [1, 2])
def test_a_graph_of_which_any_output_is_not_finite_is_not_written(from_batch: int, tmp_path: Path) -> None:
    """Also if the first output is right, or the first batch."""
    made = ExportGraph(PartlyBroken(from_batch), {"x": torch.rand(2, 3)}, ("y", "z"))
    with pytest.raises(ValueError, match="differs from the network by nan"):
        write_torch_export(made, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_is_not_written(tmp_path: Path) -> None:
    made = ExportGraph(Unlike(), {"x": torch.rand(2, 3)}, ("y",))
    with pytest.raises(ValueError, match="differs from the network"):
        write_torch_export(made, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []

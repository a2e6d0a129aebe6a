"""A network as one graph for other runtimes: torch.export programs and ONNX files.

A module that can be exported has ``export_graph()``, which returns an :class:`ExportGraph`. Every export is compared
with the eager network on new inputs of another batch size before the file is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keygrip.artifacts import atomic_write

TOLERANCE = 1e-4  # largest difference from the eager network, relative to 1 + its largest output
LARGEST_BATCH = 1024
EXPORTER_LOGGERS = ("onnxscript", "onnx_ir")  # they log each changed node as information


@dataclass(frozen=True)
class ExportGraph:
    """A network whose inputs and outputs are plain tensors.

    Attributes:
        network: in eval mode. inputs: an example of each input by name, first axis the batch, in the order of
            `forward`; the batch is dynamic. outputs: names.
    """

    network: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def export_program(graph: ExportGraph) -> torch.export.ExportedProgram:
    """Export the network as a torch.export program with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    # a batch of 1 would be treated as a constant
    two = tuple(torch.cat([value[:1]] * 2) for value in graph.inputs.values())
    with torch.no_grad():
        return torch.export.export(graph.network, two, dynamic_shapes=tuple({0: batch} for _ in two), strict=False)


def write_torch_export(graph: ExportGraph, file: Path) -> float:
    """Write a ``.pt2`` file; return the largest difference from the eager network.

    Raises:
        ValueError: The exported program differs from the network by more than 1e-4.
    """
    program = export_program(graph)
    differences = []
    for inputs in fresh_inputs(graph):
        differences.append(_measure_difference(graph, inputs, program.module()(*inputs.values())))
    difference = _check_tolerance(_largest(differences), "torch.export")
    with atomic_write(file) as target:
        torch.export.save(program, target)
    return difference


def write_onnx(graph: ExportGraph, file: Path) -> float:
    """Write an ``.onnx`` file; return the largest difference of onnxruntime from the eager network.

    Raises:
        ImportError: The extra `onnx` is not installed. ValueError: The graphs differ by more than 1e-4.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ImportError(
            f"ONNX needs a package that is not installed ({error.name}): pip install 'keygrip[onnx]'"
        ) from error
    with _suppress_output():
        program = torch.onnx.export(
            export_program(graph), dynamo=True, input_names=list(graph.inputs), output_names=list(graph.outputs)
        )
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    differences = []
    for inputs in fresh_inputs(graph):
        outputs = session.run(None, {name: inputs[name].numpy() for name in names})
        differences.append(_measure_difference(graph, inputs, [torch.from_numpy(value) for value in outputs]))
    difference = _check_tolerance(_largest(differences), "onnxruntime")
    with atomic_write(file) as target:
        target.write(content)
    return difference


def fresh_inputs(graph: ExportGraph, batches: Sequence[int] = (1, 3)) -> Iterator[dict[str, Tensor]]:
    """Yield random inputs with other batch sizes than the example's, in the range of the example's values."""
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        inputs = {}
        for name, example in graph.inputs.items():
            low, high = float(example.min()), float(example.max())
            uniform = torch.rand(batch, *example.shape[1:], generator=generator)
            inputs[name] = (low + (high - low) * uniform).to(example.dtype)
        yield inputs


@torch.no_grad()
def _measure_difference(graph: ExportGraph, inputs: dict[str, Tensor], outputs: Any) -> float:
    expected = graph.network(*inputs.values())
    if len(outputs) != len(expected):
        raise ValueError(f"the exported graph has {len(outputs)} outputs, the network {len(expected)}")
    differences = [float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(outputs, expected, strict=True)]
    return _largest(differences)


def _largest(differences: Sequence[float]) -> float:
    """Return the largest difference; NaN if any is NaN, which Python's `max` finds in the first place alone."""
    return float(torch.tensor(differences, dtype=torch.float64).max())


def _check_tolerance(difference: float, runtime: str) -> float:
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{runtime} differs from the network by {difference:.2g}, more than {TOLERANCE:g}: nothing was written"
        )
    return difference


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Suppress the progress of torch's exporter: on standard output, which carries the command's JSON, and in the log,
    where its warnings are kept."""
    levels = {name: logging.getLogger(name).level for name in EXPORTER_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

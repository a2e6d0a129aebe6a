"""Write a trained model in a format that other programs read: ``keygrip export checkpoint=RUN to=FOLDER``.

``format=safetensors`` (the default) writes a folder that `keygrip.load` reads. ``torch_export`` and ``onnx`` also write
the network as one graph (`model.pt2`, `model.onnx`), compared with the eager network to 1e-4. For a model trained with
LoRA the differences are added to the weights; ``lora`` writes only the differences, as peft does. ``diffusers`` writes
a DiT as the folder of a `DiffusionPipeline`. The last line on standard output is JSON.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import MISSING, DictConfig

from keygrip.artifacts import atomic_folder, json_text, refuse_file
from keygrip.command import entry_point
from keygrip.config import EntrySchema, register

log = logging.getLogger(__name__)

FORMATS = ("safetensors", "torch_export", "onnx", "lora", "diffusers")
# Folders of other projects, each with the function that writes it: (folder, module, content, weights, model card).
WRITERS = {
    "lora": "keygrip.inference.adapters.write_adapter",
    "diffusers": "keygrip.inference.diffusers_pipeline.write_pipeline",
}
WHERE = {"diffusers": "transformer"}  # subfolder in which `keygrip.load` finds the model
MERGED = "keygrip.models.nn.lora.merged_checkpoint"  # returns the content and weights of the model without LoRA
FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}


@dataclass
class ExportSchema(EntrySchema):
    """Root of ``conf/export.yaml``."""

    checkpoint: str = MISSING
    checkpoint_step: int | None = None
    trust: Any = ()
    external: dict[str, Any] = field(default_factory=dict)
    to: str = MISSING
    format: str = "safetensors"
    ema: bool = True


register("export_schema", ExportSchema)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Export one checkpoint; return the printed result.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, an unknown format, or a model without a graph to export.
        FileExistsError: the folder exists and is not empty.
    """
    from keygrip.exporting import folder, graphs
    from keygrip.training import checkpoints
    from keygrip.training.results import read_result

    if cfg.format not in FORMATS:
        raise ValueError(f"format={cfg.format!r}: choose {', '.join(FORMATS)}")
    refuse_file(cfg.to, "to")
    file = checkpoints.find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    content = checkpoints.read_checkpoint(file)
    module: Any = checkpoints.load_module(  # errors are raised here, before anything is written
        file, use_ema=cfg.ema, trust=checkpoints.trusted_packages(cfg), external=checkpoints.external_files(cfg)
    )
    target = Path(cfg.to)
    if cfg.format in FILES and not hasattr(module, "export_graph"):
        raise ValueError(
            f"{type(module).__name__} has no graph to export: give format=safetensors, which every model has"
        )
    weights, weights_kind = checkpoints.weights_of(content, cfg.ema)
    measured_kind = weights_kind if cfg.ema else checkpoints.weights_of(content)[1]  # the run evaluates its EMA
    content, weights = get_method(MERGED)(content, weights)
    run_folder = file.parent.parent if file.is_file() else file
    content[checkpoints.WEIGHTS_ARE] = weights_kind
    loaded = f"{target.name}/{WHERE[cfg.format]}" if cfg.format in WHERE else target.name
    figures, episodes = read_result(run_folder), read_result(run_folder / "closed_loop")
    card = folder.model_card(loaded, content, weights, weights_kind, figures, module, episodes, measured_kind)
    result: dict[str, Any] = {"folder": str(target), "format": cfg.format, "weights": weights_kind}
    if cfg.format in WRITERS:
        try:
            write = get_method(WRITERS[cfg.format])
        except ImportError as error:
            raise ImportError(f"format={cfg.format} needs a package: pip install 'keygrip[dit]' ({error})") from error
        with atomic_folder(target) as temporary_folder:
            write(temporary_folder, module, content, weights, card)
    else:

        def write_graph(where: Path) -> None:
            if cfg.format not in FILES:
                return
            write = graphs.write_onnx if cfg.format == "onnx" else graphs.write_torch_export
            result["largest_relative_difference"] = write(module.export_graph(), where / FILES[cfg.format])
            result["file"] = str(target / FILES[cfg.format])

        files, facts = module.export_files() if hasattr(module, "export_files") else ({}, {})
        folder.write_export(target, content, weights, card, write_graph, files, facts)
    log.info("exported %s to %s", file, target)
    return result | {"bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file())}


def print_result(cfg: DictConfig) -> None:
    """Export and print the result as one line of JSON."""
    print(json_text(run(cfg), ascii_only=True))


def main() -> None:
    """Command line."""
    entry_point("export", print_result)


if __name__ == "__main__":
    main()

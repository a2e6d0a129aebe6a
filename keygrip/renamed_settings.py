"""Former names of settings and options. Each is rejected with an error that contains the new name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Renamed settings and options: old dotted key or old `group=option` -> new name. A key includes all keys below it. Each
# is rejected with its new name for one version.
RENAMED: dict[str, str] = {
    "question_sets": "vqa_benchmarks",
    "control.execute_steps": "control.execute_seconds",
    "callbacks.closed_loop.closed_loop.control.execute_steps": (
        "callbacks.closed_loop.closed_loop.control.execute_seconds"
    ),
    **{
        f"callbacks.closed_loop.closed_loop.{name}": f"callbacks.closed_loop.env.{name}"
        for name in ("task", "image_size", "hz", "cameras", "python")
    },
    "level_shift": "timestep_shift",
    "sampling.level_shift": "sampling.timestep_shift",
    "model.sampling.level_shift": "model.sampling.timestep_shift",
    "model.network.level_floor": "model.network.timestep_floor",
    "model.levels": "model.timesteps",
    "model.kv_cache_gb": "model.vision_cache_gb",
    "model.vision_kv_cache_gb": "model.vision_cache_gb",
    "model.start_from": "model.init_from",
    "model.warm_start": "model.init_from",
    "model.health_every_n_steps": "model.monitor_every_n_steps",
    "model.health_from_step": "model.monitor_from_step",
    "model.pictures": "model.log_images_every_n_steps",
    "model.log_images": "model.log_images_every_n_steps",
    "model.vis_every_n_steps": "model.log_images_every_n_steps",
    "vis_every_n_steps": "model.log_images_every_n_steps",
    "vlm.prompt_order=pictures_first": "vlm.prompt_order=visual_first",
    "vlm.prompt_order=images_first": "vlm.prompt_order=visual_first",
    "vlm.prompt_order=instruction_first": "vlm.prompt_order=question_first",
    "model.network.level_hidden": "model.network.timestep_hidden",
    "model.network.level_frequencies": "model.network.timestep_frequencies",
    "data.make.options.picture": "data.make.options.image",
    "model=mark_reader": "model=vlm_encoder_pretraining",
    "experiment=mark_reader": "experiment=vlm_encoder_pretraining",
    "experiment=mark_asker": "experiment=vlm_query_pretraining",
    "ablation=foveated_vlm/frozen_encoder": "ablation=foveated_vlm/shared_query_path",
    "ablation=patch_dit/uniform_levels": "ablation=patch_dit/uniform_timesteps",
    "model.collator": "collator",
    "picture": "figure",
    "callbacks.average": "callbacks.ema",
    "callbacks.pictures": "callbacks.images",
    "cases.precompute.pictures": "cases.precompute.images",
    "cases.precompute.quick_pictures": "cases.precompute.quick_images",
    "model.encoder": "backbone.init_from",
    "geometry.start": "geometry.init_from",
    "language.tokenizer.run": "language.tokenizer.init_from",
    "shift=none": "shift=null",
    "optimizer=from_scratch": "optimizer=adamw",
    "optimizer=finetune": "optimizer=adamw with optimizer.lr=5e-5, as experiment=yam_dinov3 has it",
    "optimizer=dit": "optimizer=adamw; model=patch_dit_base has its numbers",
    "optimizer=dit_from_scratch": "optimizer=adamw; experiment=dit_robot_images has its numbers",
    "optimizer=dit_muon": "optimizer=muon",
    "optimizer=dit_warm_start": "optimizer=adamw with optimizer.lr=1.5e-4",
    "optimizer=vla": "optimizer=adamw; experiment=vla_qwen_mapanything has its numbers",
    "optimizer=vla_from_scratch": "optimizer=muon",
    "optimizer=vlm": "optimizer=adamw; experiment=vlm_stage1 has its numbers",
    "optimizer=vlm_from_scratch": "optimizer=adamw; experiment=vlm_robot_videos has its numbers",
}
# Ablations were named by a prefix: `ablation=vq_no_state` is `ablation=volume_query/no_state`.
ABLATED = {"vq": "volume_query", "vlm": "foveated_vlm", "dit": "patch_dit", "vla": "geometry_vla"}

# Renamed settings of stored configurations (checkpoints, exports), which are read with the new names: class -> old key
# -> new key, and new values by old ones.
NewNames = Mapping[str, tuple[str, Mapping[Any, Any]]]
_EVERY_N_STEPS: NewNames = {"log_images": ("log_images_every_n_steps", {False: 0, True: 1})}
STORED: dict[str, NewNames] = {
    "keygrip.models.geometry_vla.module.GeometryVLAModule": _EVERY_N_STEPS,
    "keygrip.models.geometry_vla.depth_pretraining.DepthReaderModule": _EVERY_N_STEPS,
    "keygrip.models.language.qwen_vl.QwenVL": {
        "prompt_order": ("prompt_order", {"images_first": "visual_first", "instruction_first": "question_first"}),
    },
    "keygrip.models.patch_dit.network.PatchDiT": {
        "level_hidden": ("timestep_hidden", {}),
        "level_frequencies": ("timestep_frequencies", {}),
    },
    "keygrip.data.image_text.bucket_folders.MadeImages": {"options.picture": ("options.image", {})},
}


def with_new_names(config: Any) -> Any:
    """Return a copy of a stored configuration (dictionaries, lists and scalars) with the names of `STORED`."""
    if isinstance(config, list | tuple):
        return [with_new_names(each) for each in config]
    if not isinstance(config, dict):
        return config
    copied = {key: with_new_names(value) for key, value in config.items()}
    target = copied.get("_target_")
    for old, (new, values) in STORED.get(target, {}).items() if isinstance(target, str) else ():
        *parents, former = old.split(".")
        node: Any = copied
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and former in node:
            value = node.pop(former)
            node[new.rpartition(".")[2]] = values.get(value, value) if isinstance(value, str | bool) else value
    return copied


def new_name(key: str) -> str | None:
    """Return the current name of a renamed dotted key, or None if it was not renamed."""
    for old, new in RENAMED.items():
        if "=" not in old and (key == old or key.startswith(f"{old}.")):
            return f"{new}{key.removeprefix(old)}"
    return None

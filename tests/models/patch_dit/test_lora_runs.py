"""Runs with LoRA: the base stays bit-identical, the checkpoint is all that loading needs, resuming changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dit_parts import SMALL, write_images

import keygrip
from keygrip import train
from keygrip.config import compose
from keygrip.models.nn.lora import is_difference, plain_name
from keygrip.training.checkpoints import find_checkpoint, read_checkpoint

pytestmark = pytest.mark.slow


def test_a_run_leaves_its_base_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    given = [*SMALL, f"data.root={write_images(tmp_path / 'images')}", "optimizer.schedule=constant"]
    train.run(compose("train", [*given, f"run_dir={tmp_path / 'base'}", "max_steps=2"]))
    lora = [*given, "ablation=patch_dit/lora", "model.lora.rank=2", f"model.init_from={tmp_path / 'base'}"]
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for count in steps:
            if count != steps[0]:  # a resumed run needs no other files
                (tmp_path / "base").rename(tmp_path / "away")
            options = [f"run_dir={tmp_path / name}", f"max_steps={count}", f"resume={str(count != steps[0]).lower()}"]
            train.run(compose("train", [*lora, *options]))
    (tmp_path / "away").rename(tmp_path / "base")
    whole, parts = (read_checkpoint(find_checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    for where in ("state_dict", "ema"):
        one, other = (found[where] if where == "state_dict" else found[where]["parameters"] for found in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    differences = [name for name in whole["state_dict"] if is_difference(name)]
    assert any(whole["state_dict"][name].any() for name in differences if "lora_B" in name)
    base = keygrip.load(tmp_path / "base").state_dict()  # the EMA weights, if there are any
    kept = {plain_name(name): value for name, value in whole["state_dict"].items() if not is_difference(name)}
    names = [name for name in kept if name.startswith("network.")]
    assert names
    assert all(torch.equal(kept[name], base[name]) for name in names)
    loaded = keygrip.load(tmp_path / "whole").state_dict()
    assert loaded.keys() == whole["state_dict"].keys()

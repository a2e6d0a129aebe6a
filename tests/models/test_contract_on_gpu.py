"""Every model on a pretended GPU: a training step with validation and images, its checkpoint, and its use.

Losses equal those of the CPU, approximately in bf16. A tensor, an index or a generator that was left on the CPU fails
the test, and so does a tensor whose dtype does not fit another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_parts import EVALUATE, OPTIONS, QUICK, observation
from hydra.utils import get_class
from PIL import Image
from pretended_gpu import pretended_gpu, waits

import keygrip
from keygrip import generate, sample
from keygrip.config import compose, group_options
from keygrip.evaluation.attribute_classifier import ClassifierOptions
from keygrip.models.patch_dit.module import PatchDiTModule

pytestmark = pytest.mark.slow

CASES = (
    {name: (f"model={name}",) for name in group_options("model")}
    | {
        "patch_dit_with_a_guide": (
            *("model=patch_dit", "ablation=patch_dit/early_guide", "model.guide.at_step=1"),
            "model.sampling.guide_scale=0.4",
        ),
        "patch_dit_with_alignment": ("model=patch_dit", "ablation=patch_dit/repa"),
        "patch_dit_with_a_detail_head": ("model=patch_dit", "ablation=patch_dit/detail_head"),
        "patch_dit_with_masked_patches": ("model=patch_dit", "ablation=patch_dit/masked_patches"),
    }
    | OPTIONS
)
DRAWN = (
    ("image=a.png", "samples=2"),
    ("start_image=a.png", "strength=0.5"),
    ("start_image=a.png", "redraw=mask.png", "image=b.png", "image_mask=mask.png"),
    ("image=[a.png,b.png]", "blend=true", "text_rescale=0.5", "solver=heun", "interval=[0.1,0.9]"),
    ("image=a.png", "solver=adams_bashforth", "guidance=dino_then_text"),
)
ANSWERED = (
    ("video=a.png", "question=[what,which digit?]"),
    ("video=a.png", "question=what", "temperature=1.0"),
    ("video=a.png", "question=what", "temperature=1.0", "stream=true"),
    ("video=null", "question=hello"),
    ("video=a.png", "question=what", "figure=figure.png", "mode=coarse_fine"),
)
# Per file, where a training step waits for the GPU: the computation depends on how many frames and tokens each row has.
# In qwen_vl.py transformers' vision tower reads the sizes of images.
WAITS: dict[str, dict[str, int]] = {
    "volume_query": {},
    "foveated_vlm": {"rows.py": 1, "video_language.py": 1},
    "patch_dit": {},
    "geometry_vla": {"pointing.py": 1},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of all models, with two images and a mask."""
    folder, generator = tmp_path_factory.mktemp("contract_on_gpu"), np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def use(kind: str | None, run: Path, tmp_path: Path, streams: bool) -> None:
    """Use a model according to its evaluation kind; `streams`: it answers about videos that have not ended."""
    if kind == "policy":
        policy: Any = keygrip.load_policy(run, device="cuda")
        for _ in range(2):
            plan = policy.plan(observation(policy))
        assert np.isfinite(plan.position).all()
    elif kind == "image_text":
        common = [f"checkpoint={run}", "prompt=a red cube", "steps=2"]
        for number, options in enumerate(DRAWN):
            sample.run(compose("sample", [*common, f"run_dir={tmp_path / str(number)}", *options]))
    elif kind == "video_text":
        for options in ANSWERED if streams else ANSWERED[:2]:
            generate.run(compose("generate", [f"checkpoint={run}", "max_new_tokens=4", *options]))
    if streams:
        frames = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
        module: Any = keygrip.load(run).to("cuda")
        session = module.stream("which digit?")
        for frame in frames:
            session.push(frame)
        assert session.answer() == "".join(session.stream())
    if kind is not None:
        keygrip.evaluate(run, EVALUATE[kind])


def test_images_are_evaluated_on_the_gpu(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After training, Lightning has moved the model back to the CPU, and the command loads it onto the CPU."""
    monkeypatch.setattr(ClassifierOptions.__init__, "__defaults__", (8, 2, 4, 3e-3, 0.08))
    seen, draw = [], PatchDiTModule.draw

    def drawn(self: PatchDiTModule, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.device.type)
        return draw(self, *args, **kwargs)

    run = tmp_path / "run"
    keygrip.train(["model=patch_dit", *QUICK, *PatchDiTModule.toy_overrides, "max_steps=1", f"run_dir={run}"])
    monkeypatch.setattr(PatchDiTModule, "draw", drawn)
    with pretended_gpu(bf16=False):
        keygrip.evaluate(run, EVALUATE["image_text"])
    assert set(seen) == {"cuda"}


@pytest.mark.parametrize("name", list(WAITS))
def test_a_training_step_seldom_waits_for_the_gpu(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = get_class(compose("train", [f"model={name}", "run_dir=x"]).model._target_)
    step, found = kind.training_step, []

    def counted(self: Any, *args: Any) -> Any:
        before = len(waits)
        loss = step(self, *args)
        found.append(Counter(Path(each).name.split(":")[0] for each in waits[before:]))
        return loss

    monkeypatch.setattr(kind, "training_step", counted)
    overrides = [f"model={name}", *QUICK, *kind.toy_overrides, "max_steps=2", "limit_val_batches=0"]
    overrides += ["strategy=gpu", "strategy.precision=32-true", "log_every_n_steps=100", f"run_dir={tmp_path / 'run'}"]
    with pretended_gpu():
        keygrip.train(overrides)
    assert len(found) == 2
    del found[1]["qwen_vl.py"]
    assert dict(found[1]) == WAITS[name]  # the first step reads the statistics of the data once


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_model_trains_and_works_on_a_gpu(
    name: str, bf16: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassifierOptions.__init__, "__defaults__", (8, 2, 4, 3e-3, 0.08))
    kind: Any = get_class(compose("train", [*CASES[name], "run_dir=x"]).model._target_)
    overrides = [*CASES[name], *QUICK, *kind.toy_overrides, "max_steps=2"]
    runs = home / "runs" / str(bf16)
    here = keygrip.train([*overrides, f"run_dir={runs / name}-cpu"])  # this run also creates the data
    on_gpu = runs / f"{name}-gpu"
    with pretended_gpu(bf16):
        found = keygrip.train([*overrides, "strategy=gpu", "strategy.precision=auto", f"run_dir={on_gpu}"])
        streams = kind.evaluation_kind == "video_text" and name != "pooled_vlm"
        use(kind.evaluation_kind, on_gpu, tmp_path, streams)
    losses = [key for key in here["metrics"] if "loss" in key]
    assert losses or kind.evaluation_kind == "policy"
    for key in losses:
        assert found["metrics"][key] == pytest.approx(here["metrics"][key], rel=0.1 if bf16 else 1e-3), key

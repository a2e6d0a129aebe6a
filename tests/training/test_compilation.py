"""Compiled blocks compute the same as uncompiled ones, in every system, and their checkpoints are the same.

Most tests trace without a compiler (`aot_eager`): the graphs are those that inductor receives, and take a second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import SMALL as SMALL_DIT
from dit_parts import conditions_of, stir
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from torch import Tensor
from vla_parts import ready_module, small_batch
from vlm_parts import frames_of, rows_of, small_backbone, small_language

from keygrip import train
from keygrip.config import compose
from keygrip.models.backbone import DinoBackbone
from keygrip.models.foveated_vlm.conversations import ConversationCollator
from keygrip.models.foveated_vlm.module import FoveatedVLMModule
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.geometry.rotation_codecs import PCARotation
from keygrip.models.language.tokenizers import TrainedTokenizer
from keygrip.models.nn.attention import Attention
from keygrip.models.volume_query.decoding import Decoder
from keygrip.models.volume_query.module import VolumeQueryModule
from keygrip.models.volume_query.network import VolumeQueryNetwork
from keygrip.training import compilation
from keygrip.training.checkpoints import build_module, read_checkpoint
from keygrip.training.compilation import Compilation
from keygrip.training.optimizers import AdamW

System = tuple[LightningModule, Callable[[Any], Tensor]]
TRACED = Compilation(backend="aot_eager")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def volume_query(folder: Path) -> System:
    torch.manual_seed(0)
    network = VolumeQueryNetwork(
        DinoBackbone("tiny", 32, "random", width=32, depth=2, heads=2), 32, 6, horizon=3, pred_size=8
    )
    stir(network)
    module = VolumeQueryModule(network, PCARotation(classes=6), AdamW(1e-3), Decoder())
    image, pixel = torch.randn(2, 3, 32, 32), torch.rand(2, 1, 2) * 32

    def loss(module: Any) -> Tensor:
        output = module.network(image.to(module.device), pixel.to(module.device))
        parts = (output.volume.pixel, output.volume.height, output.gripper, output.rotation)
        return torch.stack([part.float().square().mean() for part in parts]).sum()

    return module, loss


def foveated_vlm(folder: Path) -> System:
    torch.manual_seed(0)
    network = FoveatedVLM(small_backbone(), small_language())
    module = FoveatedVLMModule(
        network, ConversationCollator(TrainedTokenizer(320), "question_first", "answers"), AdamW(1e-3)
    )
    frames, rows = frames_of([3, 2]), rows_of([(0, 6, 2), (1, 4, 1), (1, 5, 0)], [3, 2])

    def loss(module: Any) -> Tensor:
        moved = replace(rows, input_ids=rows.input_ids.to(module.device))
        return module.network(frames.to(module.device), moved, "coarse_fine").hidden.float().square().mean()

    return module, loss


def patch_dit(folder: Path) -> System:
    torch.manual_seed(0)
    module: Any = build_module(OmegaConf.to_container(compose("train", SMALL_DIT), resolve=True))  # type: ignore[arg-type]
    stir(module.network)
    network = module.network
    conditions = conditions_of()
    text, dino = torch.randn(2, 8, network.text_dim), torch.randn(2, 9, network.dino_dim)
    conditions = type(conditions)(text, conditions.text_mask, torch.randn(2, network.dino_dim), dino, (3, 3))
    data, noise = torch.randn(2, network.latent_channels, 4, 4), torch.randn(2, network.latent_channels, 4, 4)

    def loss(module: Any) -> Tensor:
        device, everything = module.device, torch.ones(2, dtype=torch.bool, device=module.device)
        context = module.network.context_builder(conditions.to(device), everything, everything, 1.0)
        levels = torch.full((2,), 0.4, device=device)
        return module.noised(data.to(device), noise.to(device), levels, context)[1].mean()

    return module, loss


def geometry_vla(folder: Path) -> System:
    module, batch = ready_module(folder), small_batch()
    stir(module.network)

    def loss(module: Any) -> Tensor:
        torch.manual_seed(3)
        moved = batch.to(module.device)
        return module.losses(module(moved), moved)["total"]

    return module, loss


SYSTEMS = (volume_query, foveated_vlm, patch_dit, geometry_vla)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def step(module: LightningModule, loss: Callable[[Any], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a training step and all gradients."""
    module.train()
    module.zero_grad()
    value = loss(module)
    value.backward()
    return float(value.detach()), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "system",
    [
        volume_query,
        *(pytest.param(system, marks=pytest.mark.slow) for system in (foveated_vlm, patch_dit, geometry_vla)),
    ],
    ids=lambda system: system.__name__,
)
def test_a_compiled_step_has_the_loss_and_the_gradients_of_a_plain_one(
    system: Callable[[Path], System], tmp_path: Path
) -> None:
    module, loss = system(tmp_path)
    names = list(module.state_dict())
    expected, gradients = step(module, loss)
    count = TRACED.apply(module)
    assert count == len(module.compiled_parts())
    assert list(module.state_dict()) == names
    found, compiled = step(module, loss)
    traced = graphs()
    functions = sum(2 for part in module.modules() if isinstance(part, DinoBackbone))  # compiled once for all blocks
    assert 0 < traced <= count + functions
    if system is foveated_vlm:
        assert traced > count, "the encoder's blocks are compiled too"
    if system is not geometry_vla:  # transformers' vision attention copies its window lengths off the device
        assert not torch._dynamo.utils.counters["graph_break"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert compiled.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    step(module, loss)
    with torch.no_grad():
        assert float(loss(module.eval())) == pytest.approx(expected, rel=1e-5)
    assert graphs() == traced, "a second step and validation compile nothing"
    assert copy.deepcopy(module).state_dict().keys() == set(names)


@pytest.mark.slow
def test_compiled_and_plain_runs_continue_each_other(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """Either order ends with the weights of a plain run, up to rounding."""
    compiled = ["compile=inductor", "compile.backend=aot_eager"]

    def weights(name: str, *stages: list[str]) -> dict[str, Tensor]:
        resume: list[str] = []
        for steps, options in zip(("6", "13")[-len(stages) :], stages, strict=True):
            train.run(
                compose("train", [*toy_overrides(name, "model.dropout=0"), f"max_steps={steps}", *options, *resume])
            )
            resume = ["resume=true"]
        content = read_checkpoint(tmp_path / name)
        assert content["global_step"] == 13
        return {**content["state_dict"], **{f"ema.{n}": v for n, v in content["ema"]["parameters"].items()}}

    constant = ["optimizer.schedule=constant"]
    plain = weights("plain", constant)
    assert graphs() == 0
    for name, stages in (("first", [constant + compiled, constant]), ("then", [constant, constant + compiled])):
        found = weights(name, *stages)
        assert graphs() > 0
        assert found.keys() == plain.keys()
        for key, value in plain.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


def test_a_module_without_blocks_and_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compile has no effect: LightningModule names no blocks"):
        TRACED.apply(LightningModule())
    with pytest.raises(ValueError, match=r"compile\.backend='cuda': must be one of inductor, aot_eager"):
        Compilation(backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compile\.mode='reduce-overhead'"):
        Compilation(mode="reduce-overhead")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no effect with compile\.backend=aot_eager"):
        Compilation(backend="aot_eager", mode="max-autotune-no-cudagraphs")


def test_a_missing_compiler_is_said_before_anything_is_built(
    toy_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        assert "g++" in compilation.missing_compiler(on_gpu=False)
        with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler: apt-get install g\+\+.*compile=null"):
            train.run(compose("train", [*toy_overrides("run"), "compile=inductor"]))


def test_a_dry_run_for_another_machine_asks_this_one_for_no_compiler_and_no_gpu(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run compiles nothing; with compile= it used to require strategy=cpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reports = []
    monkeypatch.setattr("keygrip.training.fit.dry_run", lambda *_: reports.append("counted") or {})
    settings = [each for each in toy_overrides("run") if not each.startswith("strategy")]
    for strategy in (["strategy=gpu"], ["strategy=ddp", "strategy.devices=4", "strategy.num_nodes=1"]):
        train.run(compose("train", [*settings, *strategy, "compile=inductor", "dry_run=true"]))
    assert reports == ["counted"] * 2
    with pytest.raises(ValueError, match="strategy asks for a GPU and this machine has none"):
        train.run(compose("train", [*settings, "strategy=gpu", "compile=inductor"]))


@pytest.mark.slow
def test_inductor_trains_the_weights_of_a_plain_run(toy_overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    """This runs the compiler itself, which takes minutes on a slow processor."""
    if compilation.missing_compiler(on_gpu=False):
        pytest.skip("no C++ compiler")
    for name, options in (("plain", []), ("compiled", ["compile=inductor"])):
        train.run(compose("train", [*toy_overrides(name, "model.dropout=0"), *options]))
    plain, compiled = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "compiled"))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_inductor_gives_attention_in_bf16_its_gradients() -> None:
    """There are 64 tokens: for multiples of 32, inductor gives NaN for plain products on a CPU with instructions for
    bf16."""
    if compilation.missing_compiler(on_gpu=False):
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    attention, x, angles = Attention(192, 3), torch.randn(4, 64, 192), torch.rand(64, 32)

    def gradients(forward: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor | None]:
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            read = forward(x, angles=angles)
        (read.float() * torch.linspace(-1, 1, 192)).sum().backward()
        return {name: parameter.grad for name, parameter in attention.named_parameters()}

    plain, compiled = gradients(attention), gradients(torch.compile(attention))
    for name, value in plain.items():
        assert value is not None
        torch.testing.assert_close(compiled[name], value, rtol=0.1, atol=0.1 * float(value.norm()), msg=name)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)
def test_bf16_and_inductor_on_a_gpu(system: Callable[[Path], System], tmp_path: Path) -> None:
    module, loss = system(tmp_path)
    module.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected, gradients = step(module, loss)
        Compilation().apply(module)
        found, compiled = step(module, loss)
    assert found == pytest.approx(expected, rel=2e-2)
    for name, gradient in gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((compiled[name] - gradient).abs().max()) < 0.1 * scale, name

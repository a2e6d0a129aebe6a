"""Starting from other weights: names of other implementations, new patches, LoRA, a student of few steps."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_parts import CHANNELS, conditions_of, flags, small_dit, stir
from torch import Tensor

from keygrip.models.nn.flow_matching import noise_levels, seeded_noise
from keygrip.models.nn.lora import LoRA, add_lora
from keygrip.models.patch_dit.context import ConditionDropout, Conditions
from keygrip.models.patch_dit.few_steps import FewSteps
from keygrip.models.patch_dit.init_source import InitSource
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.sampler import Sampling, sample
from keygrip.models.patch_dit.warm_start import take

SIZE = (8, 8)


def velocity(network: PatchDiT, conditions: Conditions) -> Tensor:
    x, everything = seeded_noise([1, 2], (CHANNELS, *SIZE)), flags(True, True)
    context = network.context_builder(conditions, everything, everything, 1.0)
    with torch.no_grad():
        return network(x, torch.tensor([0.3, 0.8]), context).velocity


# ---- warm start ------------------------------------------------------------------------------------------------------


def by_branch(value: Tensor, parts: int) -> Tensor:
    """Return the rows of a modulation in the order of other implementations: shift, scale (and gate) of one branch,
    then those of the next."""
    kinds = value.unflatten(0, (parts // 3, 3, -1))  # ours: all shifts, then all scales, ...
    return torch.cat([kinds[kind, branch] for branch in range(3) for kind in range(parts // 3)])


def by_cell(value: Tensor) -> Tensor:
    """Return the rows of the output layer in the order of other implementations: by row and column of a token's cells,
    then by channel."""
    return torch.cat([value[cell::4] for cell in range(4)])


def foreign(network: PatchDiT) -> dict[str, Tensor]:
    """Return the network's weights with the names, the fused layers and the row order of the source's own
    transformer."""
    own, found = network.state_dict(), {}
    for name, value in own.items():
        if "modulation.linear" in name and name.startswith("blocks"):
            value = by_branch(value, 9 if network.blocks[0].gated else 6)
        if name.startswith("latent_out"):
            name, value = name.replace("latent_out", "final_proj"), by_cell(value)
        if name.startswith("final_modulation"):
            name = name.replace("final_modulation.linear", "final_layer.adaLN_modulation.1")
        name = name.replace("level_embedding", "t_embedder")
        if ".self_attention.key_value." in name:
            continue
        if ".self_attention.query." in name:
            fused = torch.cat([value, own[name.replace(".query.", ".key_value.")]])
            found[name.replace("self_attention.query", "attn.qkv")] = fused
            continue
        for ours, theirs in (
            ("self_attention.output", "attn.proj"),
            ("cross_attention.output", "cross_attn.proj"),
            ("cross_attention.query.", "cross_attn.q."),
            ("cross_attention.key_value", "cross_attn.kv"),
            ("self_attention", "attn"),
            ("cross_attention", "cross_attn"),
            ("query_norm", "q_norm"),
            ("key_norm", "k_norm"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
            (".modulation.linear", ".adaLN_modulation.1"),
            ("context_builder.", ""),
        ):
            name = name.replace(ours, theirs) if name.startswith(("blocks", "context")) else name
        if name == "latent_in.weight":
            found["x_embedder.proj.weight"] = value.reshape(len(value), CHANNELS, 2, 2)
        elif name == "latent_in.bias":
            found["x_embedder.proj.bias"] = value
        else:
            found[name] = value[None, None] if name == "null_text" else value
    return found


@pytest.mark.parametrize("options", [{}, {"adaln": "gated", "final_modulation": True}])
def test_weights_under_other_names_are_all_taken(options: dict[str, Any]) -> None:
    """With the source's names and row order, the loaded network computes the same."""
    source, network = small_dit(seed=3, **options), small_dit(seed=4, **options)
    weights = foreign(source)
    assert len(set(weights) & set(network.state_dict())) < 8  # the last norm; all others have different names
    report = take(network, weights, "there", min_share=1.0)
    assert not report.missing
    assert not report.unexpected
    conditions = conditions_of()
    assert torch.equal(velocity(network, conditions), velocity(source, conditions))


@pytest.mark.parametrize(
    ("names", "rules"),
    [
        (("to_q", "to_k", "to_v"), {}),
        (("q_proj", "k_proj", "v_proj"), {}),
        (("q", "key", "value"), {r"\.key\.": ".k.", r"\.value\.": ".v."}),
    ],
)
def test_separate_keys_and_values_are_joined(names: tuple[str, str, str], rules: dict[str, str]) -> None:
    """For the usual names, and with rules for other names."""
    source, network = small_dit(seed=3), small_dit(seed=4)
    weights: dict[str, Tensor] = {}
    for name, value in foreign(source).items():
        if ".attn.qkv." in name:
            weights |= {name.replace("qkv", new): rows for new, rows in zip(names, value.chunk(3), strict=True)}
        elif ".cross_attn.kv." in name:
            weights |= {name.replace("kv", new): rows for new, rows in zip(names[1:], value.chunk(2), strict=True)}
        else:
            weights[name] = value
    assert sum(f".{names[2]}." in name for name in weights) >= 4
    report = take(network, weights, "there", rules, min_share=1.0)
    assert not report.missing
    assert not report.unexpected
    conditions = conditions_of()
    assert torch.equal(velocity(network, conditions), velocity(source, conditions))


def test_names_of_diffusers_are_known() -> None:
    source, network = small_dit(seed=3), small_dit(seed=4)
    weights = {
        re.sub(r"^blocks\.", "transformer_blocks.", name).replace("x_embedder.proj.", "pos_embed.proj."): value
        for name, value in foreign(source).items()
    }
    assert sum(name.startswith(("transformer_blocks.", "pos_embed.")) for name in weights) > 10
    report = take(network, weights, "there", {}, min_share=0.8)
    assert {name.split(".", 2)[2] for name in report.missing} == {"modulation.linear.weight", "modulation.linear.bias"}


def test_gates_of_the_usual_transformer_are_no_shifts_and_scales(caplog: pytest.LogCaptureFixture) -> None:
    """Six vectors of a DiT block are shift, scale and gate of two branches; their shape also fits our shift and scale
    of three."""
    source, network = small_dit(seed=3), small_dit(seed=4)
    before = network.blocks[0].modulation.linear.weight.clone()
    weights = {name: value for name, value in foreign(source).items() if "dino_proj" not in name}
    report = take(network, weights, "there", min_share=0.5)
    assert torch.equal(network.blocks[0].modulation.linear.weight, before)
    assert "blocks.0.modulation.linear.weight" in report.missing
    assert "blocks.0.adaLN_modulation.1.weight" in report.unexpected
    assert "six vectors of a block are usually shift, scale and gate of two" in caplog.text
    inside = {f"dit.{name}": value for name, value in weights.items()}  # a rule that does not mention modulations
    assert "blocks.0.modulation.linear.weight" in take(network, inside, "there", {r"^dit\.": ""}, 0.5).missing
    take(network, weights, "there", {r"adaLN_modulation\.1": "modulation.linear"}, min_share=0.5)
    assert torch.equal(network.blocks[0].modulation.linear.weight, weights["blocks.0.adaLN_modulation.1.weight"])
    take(network, weights, "there", {r"adaLN_modulation\.1": "modulation.1"}, min_share=0.5)
    assert torch.equal(network.blocks[0].modulation.linear.weight, source.blocks[0].modulation.linear.weight)


def test_names_of_the_source_are_known_behind_rules() -> None:
    source, network = small_dit(seed=3), small_dit(seed=4)
    weights = {f"trunk/{name}": value for name, value in foreign(source).items()}
    report = take(network, weights, "there", {"^trunk/": ""}, min_share=1.0)
    assert not report.missing
    conditions = conditions_of()
    assert torch.equal(velocity(network, conditions), velocity(source, conditions))


def test_layers_without_bias_and_nulls_in_the_space_of_features() -> None:
    """A bias that the source lacks is set to zero instead of its initial value; a null embedding that the source
    inserts before the projection is projected."""
    source, network = small_dit(seed=3), small_dit(seed=4)
    biases = [n for n in source.state_dict() if n.endswith(".bias") and ("attention" in n or "mlp" in n)]
    biases = [name for name in biases if name.startswith("blocks")]
    dropped = torch.randn(1, 1, 10)
    with torch.no_grad():
        for name in biases:
            source.get_parameter(name).zero_()
        builder = source.context_builder
        assert builder.dino_patch_proj is not None
        assert builder.null_dino_patches is not None
        builder.null_dino_patches.copy_(builder.dino_patch_proj(dropped)[0, 0])
    weights = {name: value for name, value in source.state_dict().items() if name not in biases}
    del weights["context_builder.null_dino_patches"]
    weights["null_dino_patch_token"] = dropped
    report = take(network, weights, "there", min_share=0.9)
    assert sorted(report.zeroed) == sorted(report.missing) == sorted(biases)
    assert "biases set to zero" in " ".join(report.describe())
    conditions = conditions_of()
    torch.testing.assert_close(velocity(network, conditions), velocity(source, conditions))
    assert torch.allclose(network.context_builder.null_dino_patches, builder.null_dino_patches, atol=1e-5)  # type: ignore[arg-type]


def test_own_rules_come_first_and_too_little_is_an_error() -> None:
    source, network = small_dit(seed=3), small_dit(seed=4)
    weights = {f"trunk/{name}": value for name, value in source.state_dict().items()}
    weights["final_norm.weight"] = torch.ones(32)
    with pytest.raises(ValueError, match=r"fewer than model\.init_from_min_share=0\.5.*left over: trunk/blocks"):
        take(network, weights, "there", min_share=0.5)
    assert not torch.equal(network.latent_in.weight, source.latent_in.weight)
    take(network, weights, "there", {r"^trunk/": ""}, min_share=1.0)
    assert torch.equal(network.latent_in.weight, source.latent_in.weight)
    with pytest.raises(ValueError, match="no regular expression"):
        take(network, weights, "there", {"(": ""})


def test_own_rules_say_in_which_order_rows_stand() -> None:
    """With a usual name: in the usual order, by cell; with our name: in our order, by channel."""
    source = small_dit(seed=3)
    weights = {name: value for name, value in source.state_dict().items() if not name.startswith("latent_out")}
    for part in ("weight", "bias"):
        weights[f"head.{part}"] = by_cell(source.state_dict()[f"latent_out.{part}"])
    for name, equal in (("final_proj.", True), ("latent_out.", False)):
        network = small_dit(seed=4)
        take(network, weights, "there", {r"^head\.": name}, min_share=1.0)
        assert torch.equal(network.latent_out.weight, source.latent_out.weight) == equal
        assert torch.equal(network.latent_out.weight, weights["head.weight"]) != equal


def test_new_patches_with_their_own_attention_change_nothing_at_first() -> None:
    """Starts from a CLS-only network; in a joint context the same patches change the output."""
    source, conditions = small_dit(use_dino_patches=False), conditions_of()
    expected = velocity(source, conditions)
    for attention, equal in (("separate", True), ("joint", False)):
        network = small_dit(seed=9, stirred=False, patch_attention=attention)
        take(network, source.state_dict(), "there", min_share=0.5)
        assert torch.equal(velocity(network, conditions), expected) == equal
        if equal:  # and they are trained from the first step on
            context = network.context_builder(conditions, flags(True, True), flags(True, True), 1.0)
            network(torch.randn(2, CHANNELS, *SIZE), torch.rand(2), context).velocity.pow(2).sum().backward()
            assert network.blocks[0].patch_attention.output.weight.grad.abs().max() > 1e-6
    stir(network)


def test_the_last_norm_may_see_the_noise_level() -> None:
    plain, modulated = small_dit(stirred=False), small_dit(stirred=False, final_modulation=True)
    take(modulated, plain.state_dict(), "there", min_share=0.5)
    stir(plain)
    assert modulated.final_modulation is not None
    assert torch.equal(modulated.final_norm.weight, plain.final_norm.weight)
    conditions, x = conditions_of(), torch.randn(2, CHANNELS, *SIZE)
    torch.nn.init.normal_(modulated.latent_out.weight)
    context = modulated.context_builder(conditions, flags(True, True), flags(True, True), 1.0)
    before = modulated(x, torch.tensor([0.2, 0.2]), context).velocity
    torch.nn.init.normal_(modulated.final_modulation.linear.weight)
    assert not torch.equal(modulated(x, torch.tensor([0.2, 0.2]), context).velocity, before)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_warm_start_reaches_the_layers_that_lora_adapts() -> None:
    """Every value of the base is loaded, whatever its layer is called now; the differences do not count as missing."""
    pytest.importorskip("peft")
    source, network = small_dit(seed=3), small_dit(seed=4)
    add_lora(network, LoRA(rank=2, alpha=4.0, targets=["query", "key_value", "output"]))
    report = take(network, source.state_dict(), "there", min_share=1.0)
    assert not report.unexpected
    assert all("lora_" in name for name in report.missing)
    conditions = conditions_of()
    assert torch.equal(velocity(network, conditions), velocity(source, conditions))


# ---- few steps -------------------------------------------------------------------------------------------------------


def test_a_student_learns_its_teachers_chords() -> None:
    """The loss is zero for a network whose velocity is constant along each window, like its teacher's; after brief
    training, a student of two steps is nearer to its guided teacher's images than before."""
    teacher, conditions = small_dit(depth=1), conditions_of(batch=2)
    few = FewSteps(2, 3, Sampling(2.0, 1.5))
    few.take_teacher(teacher, InitSource("teacher", {}))
    student = small_dit(depth=1).train()
    both = ConditionDropout(0.0, 0.0, 0.0, 1.0)
    data = torch.randn(2, CHANNELS, *SIZE)
    fast = Sampling(steps=2, guidance="none")
    target = sample(teacher, conditions, SIZE, replace(few.teacher, steps=6), seeds=[1, 2])

    def off() -> float:
        return float((sample(student, conditions, SIZE, fast, seeds=[1, 2]) - target).pow(2).mean())

    before = off()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        loss = few.loss(student, data, conditions, both)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert off() < 0.6 * before
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), small_dit(depth=1).parameters(), strict=True))


def test_a_student_that_predicts_images_is_not_ruled_by_the_last_levels() -> None:
    """Near the data, a velocity error is the image error divided by a small timestep: for s = 0.001 the factor 1 / s^2
    is a million. Below `timestep_floor` errors get no larger weight, as in plain training."""
    few, conditions = FewSteps(1, 2, Sampling(2.0, 1.5)), conditions_of(batch=2)
    few.take_teacher(small_dit(depth=1), InitSource("teacher", {}))
    student, both = small_dit(depth=1, prediction="x", timestep_floor=0.2), ConditionDropout(0.0, 0.0, 0.0, 1.0)
    data = torch.randn(2, CHANNELS, *SIZE)
    losses = []
    for near in (0.001, 0.01, 0.1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, near=near, **_: torch.full(size, near))
            torch.manual_seed(0)
            losses.append(few.loss(student, data, conditions, both).item())
    assert max(losses) < 4 * min(losses)
    assert max(losses) < 1000


def test_windows_of_the_teacher_are_its_sampler_cut_in_pieces() -> None:
    teacher, conditions = small_dit(), conditions_of()
    few = FewSteps(2, 3, Sampling(2.0, 1.5, guidance="dino_then_text"))
    few.take_teacher(teacher, InitSource("teacher", {}))
    x = seeded_noise([1, 2], (CHANNELS, *SIZE))
    for high, low in ((1.0, 0.5), (0.5, 0.0)):
        x = few.teacher_end(x, conditions, high, low)
    whole = sample(teacher, conditions, SIZE, replace(few.teacher, steps=6), seeds=[1, 2])
    torch.testing.assert_close(x, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "steps", "named"),
    [
        ({"steps": 7}, 5, r"teacher\.steps=7 has no effect: it is model\.few_steps\.teacher_steps"),
        (
            {"timestep_shift": 3.0},
            5,
            r"teacher\.timestep_shift=3\.0 has no effect: it is model\.few_steps\.timestep_shift",
        ),
        ({"solver": "heun"}, 1, r"teacher\.solver=heun has no effect with teacher_steps=1"),
        ({"interval": (0.0, 1e-4)}, 5, r"teacher\.interval=\[0\.0, 0\.0001\] has none of the teacher's steps in it"),
    ],
)
def test_settings_of_a_teacher_that_nothing_reads_are_refused(teacher: dict[str, Any], steps: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FewSteps(4, steps, Sampling(**teacher))
    FewSteps(4, 2, Sampling(solver="heun", interval=(0.1, 0.2)))


def test_a_student_that_learns_another_guidance_than_its_teachers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The images of the teacher's run are then not those that the student learns to generate."""
    run = {"text_scale": 4, "dino_scale": 1.5, "guidance": "dino_then_text", "interval": [0.0, 0.9], "steps": 20}
    for way, said in (
        (Sampling(4.0, 1.5, guidance="dino_then_text", interval=(0.0, 0.9)), ""),
        (Sampling(2.0, 1.5, guidance="dino_then_text", interval=(0.0, 0.9)), "model.few_steps.teacher.text_scale=4\n"),
        (Sampling(4.0, 1.5, guidance="dino_then_text"), "is drawn with interval=[0,0.9], and its"),
        (Sampling(4.0, 1.5, interval=(0.0, 0.9)), "with guidance=dino_then_text, and its student learns from it with"),
        (Sampling(4.0, 1.5, guidance="dino_then_text", interval=(0.0, 0.9), cls_scale=2.0), "with cls_scale=null, and"),
    ):
        caplog.clear()
        FewSteps(2, 3, way).take_teacher(small_dit(), InitSource("teacher", {}, model={"sampling": run}))
        assert said in caplog.text
        assert bool(said) == ("its student learns from it" in caplog.text)


def test_a_student_is_drawn_as_it_is_trained() -> None:
    few = FewSteps(4, 5, Sampling())
    few.check(Sampling(steps=4, guidance="none"))
    for sampling in (Sampling(steps=4), Sampling(steps=5, guidance="none")):
        with pytest.raises(ValueError, match="student of 4 windows"):
            few.check(sampling)


def test_windows_of_a_student_follow_the_shift_of_the_resolution() -> None:
    assert FewSteps(4, 2, Sampling(), timestep_shift=1.5).levels(2.0) == noise_levels(4, 3.0)

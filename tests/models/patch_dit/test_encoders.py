"""Frozen encoders: exact packing, words without a vocabulary, DINO's input view, the hub's formats, fingerprints."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import write_flux
from image_sets import small_encoders
from safetensors.torch import load_file

from keygrip.config import compose
from keygrip.envs.yam.stills import palette
from keygrip.models.backbone import DinoBackbone
from keygrip.models.patch_dit.autoencoders import FluxAutoencoder, PixelPacking
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.dino_view import DinoView, grey, weights_digest
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.network import PatchDiT
from keygrip.models.patch_dit.pretrained import subfolder_of
from keygrip.models.patch_dit.text_encoders import RandomWordVectors, T5Text
from keygrip.training.parts import build_stored


def pictures(count: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


# ---- small ones ------------------------------------------------------------------------------------------------------


def test_packing_is_exact_also_in_half_precision() -> None:
    encoders, shown = small_encoders(), pictures()
    latents = encoders.encode_images(shown)
    assert latents.shape == (2, 48, 4, 6)
    assert float(latents.min()) >= -1
    back = encoders.decode_latents(latents.half().float())
    assert torch.equal((back * 255).round().to(torch.uint8), shown)
    # channel c * 16 + i * 4 + j is pixel (i, j) of colour c
    assert latents[1, 2 * 16 + 3 * 4 + 1, 2, 5] == pytest.approx(float(shown[1, 2, 2 * 4 + 3, 5 * 4 + 1]) / 127.5 - 1)


@pytest.mark.parametrize("size", [(16, 18), (18, 16)])
def test_images_that_do_not_divide_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not divide by the latent's stride of 4"):
        small_encoders().encode_images(pictures(1, *size))


def test_images_in_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="images are uint8"):
        small_encoders().encode_images(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="views are uint8"):
        small_encoders().encode_view(torch.rand(1, 3, 48, 48))


def test_words_are_known_by_themselves_and_by_their_place() -> None:
    text = RandomWordVectors(8, 16)
    states, mask = text.encode(["a red cube", "A Red  cube", "a cube red", "a zyzzyva cube", ""])
    assert torch.equal(states[0], states[1])
    assert mask.sum(dim=1).tolist() == [3, 3, 3, 3, 0]
    assert not states[~mask].any()
    assert torch.equal(states[0, 0], states[3, 0])
    assert not torch.equal(states[0, 1], states[3, 1])
    # the same word at another place differs in its position alone
    places = text.encode(["a a a"])[0][0]
    torch.testing.assert_close(states[2, 2] - states[0, 1], places[2] - places[1])


def test_word_vectors_are_the_same_ones_for_ever() -> None:
    states, _ = RandomWordVectors(2, 64).encode(["cube"])
    again = RandomWordVectors(2, 64).encode(["cube"])[0]
    assert torch.equal(states, again)
    assert RandomWordVectors(16, 64).description()["probe"] == pytest.approx(-1.085649, abs=1e-5)


def test_long_captions_are_cut_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    text = RandomWordVectors(3, 4)
    with caplog.at_level("WARNING"):
        _, mask = text.encode(["one two three four", "five six seven eight"])
    assert mask.sum(dim=1).tolist() == [3, 3]
    assert caplog.text.count("cut off") == 1


# ---- the view --------------------------------------------------------------------------------------------------------


def test_dino_is_shown_grey_images_unless_asked_otherwise() -> None:
    """A design choice: in the one comparison available (benchmarks/dit_claims.json) colour overrides the words."""
    for encoders in ("tiny", "own_autoencoder", "flux_t5_dinov3"):
        given = ["model=patch_dit", "data=robot_images", f"encoders={encoders}"]
        assert compose("train", given).encoders.dino_view == "grey"
        assert compose("train", [*given, "encoders.dino_view=colour"]).encoders.dino_view == "colour"


def test_a_grey_view_does_not_tell_the_colours_apart_and_a_coloured_one_does() -> None:
    shown = torch.stack([torch.tensor(rgb).view(3, 1, 1).expand(3, 48, 48) for rgb in palette().values()])
    views = (shown * 255 * 0.8).round().to(torch.uint8)  # under the same light
    spread = {}
    for dino_view in ("grey", "colour"):
        cls, patches = small_encoders(dino_view).encode_view(views)
        assert patches.shape == (4, 9, 16)
        spread[dino_view] = float(patches.std(dim=0).mean() + cls.std(dim=0).mean())
    assert spread["grey"] < 0.05 * spread["colour"]


def test_grey_is_the_luminance_of_linear_light() -> None:
    pixels = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = grey(pixels)
    assert torch.equal(found[:, 0], found[:, 2])
    light = (pixels.double() ** 2.2 * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(1)
    torch.testing.assert_close(found[:, 0].double() ** 2.2, light, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grey(torch.full((1, 3, 2, 2), 0.4)), torch.full((1, 3, 2, 2), 0.4))


def test_views_are_square_or_of_the_image_s_shape() -> None:
    square, aspect = small_encoders(), small_encoders(shape="aspect")
    assert square.view_size(80, 40) == (48, 48)
    assert square.dino_grid(80, 40) == (3, 3)
    assert aspect.view_size(80, 40) == (64, 32)
    assert aspect.dino_grid(80, 40) == (2, 4)
    assert aspect.encode_view(pictures(1, 32, 64))[1].shape == (1, 8, 16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 50}, "does not divide by the patch size 16"),
        ({"shape": "round"}, "must be square or aspect"),
        ({"variant": "big"}, "is not known"),
    ],
)
def test_views_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DinoView(**{"variant": "tiny", "size": 48, "weights": "random", **options})
    with pytest.raises(ValueError, match="must be grey or colour"):
        Encoders(PixelPacking(4), RandomWordVectors(), DinoView("tiny", 48, "random"), "sepia")


# ---- fingerprints and checkpoints ------------------------------------------------------------------------------------


def test_the_fingerprint_tells_encoders_apart() -> None:
    same = small_encoders()
    torch.manual_seed(123)  # random weights do not depend on earlier random numbers
    assert small_encoders().fingerprint == same.fingerprint
    others = [small_encoders("colour"), small_encoders(shape="aspect"), small_encoders(edge=8)]
    longer = Encoders(same.autoencoder, RandomWordVectors(9, 8), same.view, same.dino_view)
    found = {encoders.fingerprint for encoders in (same, longer, *others)}
    assert len(found) == 5


def test_stored_weights_come_back_wherever_they_came_from(tmp_path: Path) -> None:
    encoders = small_encoders()
    with torch.no_grad():
        encoders.view.backbone.net.norm.weight.mul_(1.5)  # different from the random weights
    state = encoders.state()
    torch.save(state, tmp_path / "state.pt")
    other = small_encoders()
    other.view.options["weights"] = str(tmp_path / "gone")  # like a run folder that was removed
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    views = pictures(1, 48, 48)
    assert torch.equal(other.encode_view(views)[1], encoders.encode_view(views)[1])
    assert other.fingerprint == encoders.fingerprint


def test_other_encoders_than_the_checkpoint_s_are_refused() -> None:
    with pytest.raises(ValueError, match="use the same encoders="):
        small_encoders("colour").load_state(small_encoders().state())


def test_nothing_is_loaded_before_it_is_used() -> None:
    from hydra.utils import instantiate

    encoders = instantiate(compose("train", ["model=patch_dit", "encoders=flux_t5_dinov3"]).encoders)
    sizes = (
        encoders.latent_channels,
        encoders.latent_stride,
        encoders.text_length,
        encoders.text_dim,
        encoders.dino_dim,
    )
    assert sizes == (16, 8, 512, 4096, 1024)
    assert encoders.dino_grid(512, 768) == (14, 14)
    assert encoders.view.state() is None  # a large DINO is identified by name, without loading it
    assert encoders.view._backbone is None


# ---- the hub's formats -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux"))


def text_of(flux: Path, length: int = 12) -> T5Text:
    return T5Text(str(flux), length, 24, "float32", "text_encoder_2", "tokenizer_2")


def test_the_autoencoder_of_a_flux_folder(flux: Path) -> None:
    autoencoder = FluxAutoencoder(str(flux), dtype="float32")
    shown = pictures(2, 32, 48)
    latents = autoencoder.encode(shown)
    assert latents.shape == (2, 16, 4, 6)
    assert torch.equal(latents, autoencoder.encode(shown))  # the mean, not a sample
    posterior = autoencoder.model.encode(shown.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(latents, (posterior.mean - 0.1159) * 0.3611)
    decoded = autoencoder.decode(latents)
    torch.testing.assert_close(decoded, (autoencoder.model.decode(posterior.mean).sample + 1) / 2, atol=1e-4, rtol=1e-4)
    own = FluxAutoencoder(str(flux / "vae"), dtype="float32")  # the folder of the part itself
    torch.testing.assert_close(own.encode(shown), latents)
    assert own.description() == autoencoder.description()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_are_decoded_in_the_autoencoder_s_own_type(dtype: torch.dtype, flux: Path) -> None:
    """Also if the network that generated them is evaluated in fewer bits; the autoencoder would overflow in float16."""
    autoencoder = FluxAutoencoder(str(flux), dtype="float32")
    with torch.no_grad():
        autoencoder.model.decoder.conv_in.weight.mul_(1e5)
    encoders = Encoders(autoencoder, RandomWordVectors(8, 8), small_encoders().view)
    latents = torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    wanted = encoders.decode_latents(latents)
    assert wanted.std() > 0.01
    with torch.autocast("cpu", dtype):
        assert torch.equal(encoders.decode_latents(latents), wanted)


@pytest.mark.parametrize("subfolder", ["../secret/vae", "{folder}/secret/vae", "vae/../../secret/vae"])
def test_a_subfolder_outside_of_the_source_is_refused(subfolder: str, tmp_path: Path) -> None:
    """A checkpoint may name a subfolder; the folder is the user's choice."""
    named = subfolder.format(folder=tmp_path)
    (tmp_path / "secret" / "vae").mkdir(parents=True)
    (tmp_path / "source").mkdir()
    with pytest.raises(ValueError, match=r"leads out of .*source: give a folder inside of it"):
        subfolder_of(str(tmp_path / "source"), named)


def test_an_autoencoder_of_another_size_is_refused(flux: Path) -> None:
    with pytest.raises(ValueError, match="latents of 16 channels and stride 8; 4 and 8 are asked for"):
        _ = FluxAutoencoder(str(flux), channels=4).model


def test_t5_states_do_not_depend_on_the_padding(flux: Path) -> None:
    text = text_of(flux)
    captions = ["a red cube", "a gold cube left of the blue block near the red cube"]
    states, mask = text.encode(captions)
    assert states.shape == (2, 12, 24)
    assert mask.sum(dim=1).tolist() == [4, 12]  # including the end of the sentence; the second is truncated
    assert not states[~mask].any()
    alone, alone_mask = text.encode(captions[:1])
    assert torch.equal(alone_mask, mask[:1])
    torch.testing.assert_close(alone, states[:1], atol=1e-5, rtol=1e-5)


def test_a_blank_caption_is_none_though_t5_ends_it_with_a_token(flux: Path) -> None:
    """The network then generates the same as without words, and not what `</s>` alone would give."""
    small = small_encoders()
    encoders = Encoders(small.autoencoder, text_of(flux), small.view)
    assert encoders.text.encode([""])[1].sum() == 1
    states, mask = encoders.encode_text(["", "a red cube", " \n"])
    assert mask.sum(dim=1).tolist() == [0, 4, 0]
    assert not states[[0, 2]].any()
    builder = PatchDiT(3, 24, 16, width=32, depth=1, heads=2, patch_size=2).context_builder
    keep = torch.ones(3, dtype=torch.bool)
    told, untold = (
        builder(Conditions(*text, None, None, (3, 3)), keep, keep, 1.0) for text in ((states, mask), (None, None))
    )
    assert told.text_mask is not None
    for row, same in enumerate((True, False, True)):
        assert torch.equal(told.text[row][told.text_mask[row]], untold.text[row]) == same


def test_t5_of_another_width_is_refused(flux: Path) -> None:
    with pytest.raises(ValueError, match=r"states of 24 numbers, encoders\.text\.width=4096"):
        T5Text(str(flux), subfolder="text_encoder_2", tokenizer_subfolder="tokenizer_2").encode(["a"])


def test_a_t5_folder_brings_no_code_and_its_tokenizer_is_checked(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the question whether to execute code gets a yes
    foreign, hostile = (shutil.copytree(flux, tmp_path / name) for name in ("foreign", "hostile"))
    folder = foreign / "tokenizer_2"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n")
    file = folder / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    with pytest.raises(ValueError, match=r"foreign needs Python code of its own, which keygrip does not execute"):
        text_of(foreign).encode(["a"])
    assert not (tmp_path / "executed").exists()
    file = hostile / "tokenizer_2" / "tokenizer.json"
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 999}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": growing}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: in encoding its normalizer .* may make \d+ characters"):
        text_of(hostile).encode(["a"])


@pytest.mark.parametrize("part", ["text_encoder_2", "vae"])
def test_weights_in_a_file_of_pytorch_are_read_and_what_else_it_holds_is_not_executed(
    part: str, flux: Path, tmp_path: Path
) -> None:
    """google/t5-v1_1-xxl has its weights in this form on the hub."""

    def described(source: Path) -> object:
        return text_of(source).encode(["a"]) if part == "text_encoder_2" else FluxAutoencoder(str(source)).description()

    folder = shutil.copytree(flux, tmp_path / "pickled")
    (file,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder_2" else "diffusion_pytorch_model.bin"
    weights = load_file(file)
    torch.save(weights, folder / part / name)
    file.unlink()
    assert str(described(folder)) == str(described(flux)).replace(str(flux), str(folder))

    class Executed:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save(weights | {"more": Executed()}, folder / part / name)
    with pytest.raises((FileNotFoundError, ValueError), match="pickled"):
        described(folder)
    assert not (tmp_path / "executed").exists()


def test_the_real_encoders_joined(flux: Path) -> None:
    view = DinoView("dinov3_vitl16", 32, "random", width=16, depth=1, heads=2)
    encoders = Encoders(FluxAutoencoder(str(flux), dtype="float32"), text_of(flux), view, "colour")
    again = Encoders(FluxAutoencoder(str(flux), dtype="float32"), text_of(flux), view, "colour")
    assert again.fingerprint == encoders.fingerprint
    cls, patches = encoders.encode_view(pictures(1, 32, 32))
    assert (cls.shape, patches.shape) == ((1, 16), (1, 4, 16))
    other = Encoders(encoders.autoencoder, text_of(flux, 13), view, "colour")
    assert other.fingerprint != encoders.fingerprint


@pytest.mark.parametrize("part", [FluxAutoencoder("nowhere/at-all"), T5Text("nowhere/at-all")])
def test_what_cannot_be_had_says_what_to_do(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"cannot be loaded from nowhere/at-all .* name a local folder"):
        part.description()


def test_without_diffusers_it_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'keygrip\[dit\]'"):
        _ = FluxAutoencoder("anywhere").model


def test_a_loaded_model_keeps_the_weights_that_its_encoders_name() -> None:
    """Loading a checkpoint sets pretrained backbones to random, since the checkpoint contains their weights; it does
    not contain those of a frozen encoder."""
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(
        compose("train", ["model=patch_dit", "encoders=flux_t5_dinov3"]).encoders, resolve=True
    )
    assert isinstance(node, dict)
    view = build_stored(node["view"], "encoders.view")
    assert view.options["weights"] == "pretrained"


def test_weights_of_the_hub_are_not_downloaded_on_a_checkpoints_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrusted checkpoint may name them: weights on this machine are read, others only if the user allows it."""
    import huggingface_hub

    node = {"_target_": "keygrip.models.patch_dit.dino_view.DinoView", "variant": "dinov3_vits16", "size": 32}
    node |= {"weights": "pretrained", "download": True}
    asked, given = list[str](), dict[str, Any]()

    def from_hub(variant: Any) -> Any:
        asked.append(variant.name)
        raise FileNotFoundError("no hub here")

    for name in ("DINO_WEIGHTS_PATH", "DINO_REPO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("keygrip.models.backbone.weights._from_hub", from_hub)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(FileNotFoundError, match=r"timm/vit_small\S+ of the hub, .*encoders\.view\.weights_path=FILE"):
        _ = build_stored(node, "encoders.view").backbone
    said = (
        r"encoders.view.download is off, .* encoders\.view\.download=true \(of a checkpoint below external: external\."
    )
    with pytest.raises(FileNotFoundError, match=said):  # the setting in a training
        _ = DinoView("dinov3_vits16", 32, "pretrained", download=False).backbone
    assert asked == []
    allowed = build_stored(node, "encoders.view", external={"download": True})
    for view in (allowed, DinoView("dinov3_vits16", 32, "pretrained")):
        with pytest.raises(FileNotFoundError, match="no hub here"):
            _ = view.backbone
    assert asked == ["dinov3_vits16"] * 2

    def backbone(**options: Any) -> torch.nn.Module:
        given.update(options)
        return torch.nn.Identity()

    monkeypatch.setattr("keygrip.models.patch_dit.dino_view.DinoBackbone", backbone)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors"))
    view = build_stored(node, "encoders.view")
    _ = view.backbone
    assert given["weights_path"] == str(tmp_path / "model.safetensors")
    assert view.options["weights_path"] is None  # the stored settings stay unchanged
    assert asked == ["dinov3_vits16"] * 2


def test_a_view_begins_with_the_backbone_of_a_file(tmp_path: Path) -> None:
    sizes = {"width": 16, "depth": 1, "heads": 2}
    trained = DinoBackbone("tiny", 48, "random", **sizes)  # type: ignore[arg-type]
    torch.save({f"network.backbone.{name}": value for name, value in trained.state_dict().items()}, tmp_path / "x.pth")
    view = DinoView("tiny", 48, "random", init_from=str(tmp_path / "x.pth"), **sizes)  # type: ignore[arg-type]
    for name, value in view.backbone.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
    other = DinoView("tiny", 48, "random", **sizes)  # type: ignore[arg-type]
    assert view.description()["weights"] != other.description()["weights"]


def test_a_stored_view_is_no_larger_than_its_weights() -> None:
    """A checkpoint may name a million blocks, which would be built before their weights are compared."""
    small = DinoView("tiny", 48, "random", width=16, depth=1, heads=2)
    state = small.state()
    for options in ({"width": 16, "depth": 1_000_000}, {"width": 1 << 16, "depth": 1}):
        with pytest.raises(ValueError, match=r"encoders\.view: depth=.* are more than the \d+ numbers stored of it"):
            DinoView("tiny", 48, "random", heads=2, **options).load_state(state)
    with pytest.raises(ValueError, match="the checkpoint holds no weights of its view"):
        DinoView("tiny", 48, "random", heads=2, width=16, depth=1_000_000).load_state(None)
    for given in ("1", 1.5, 0):
        with pytest.raises(ValueError, match=rf"encoders\.view\.depth={given!r}: a whole number from 1"):
            DinoView("tiny", 48, "random", depth=given)  # type: ignore[arg-type]
    again = DinoView("tiny", 48, "random", width=16, depth=1, heads=2)
    again.load_state(state)
    assert weights_digest(again.backbone) == weights_digest(small.backbone)

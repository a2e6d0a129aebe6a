"""Weights in the published format: the model built from them computes the same as the published model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keygrip.api import load
from keygrip.config import compose
from keygrip.inference.published_vlm import export_published
from keygrip.inference.video_chat import VideoChat
from keygrip.models.foveated_vlm.published_weights import read_published
from keygrip.models.foveated_vlm.rows import TextRows
from keygrip.models.language.tokenizers import (
    END_OF_TEXT,
    TINY_TEMPLATE,
    TURN_END,
    PretrainedTokenizer,
    TrainedTokenizer,
)
from keygrip.prepare import run

SENTENCES = ["You are a helpful AI assistant.", "Which digit is on the red cube in frame 2?", "The 3rd cube."]
WORDS, WIDTH, DIM, SCALE = 400, 48, 128, 0.14
# names of transformers 4, with which the published files were written; transformers 5 uses others
OLD_NAMES = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
)


class Published(nn.Module):
    """The published forward passes on transformers' own models, one video at a time."""

    def __init__(self, tied: bool) -> None:
        from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.encoder = nn.Module()
        self.encoder.dino = Dinov2Model(
            Dinov2Config(hidden_size=DIM, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14)
        )
        self.encoder.query_input_proj = nn.Linear(DIM, DIM, bias=False)
        self.encoder.output_proj = nn.Linear(DIM, DIM)
        self.llm = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=WORDS,
                max_position_embeddings=256,
                rms_norm_eps=1e-5,
                tie_word_embeddings=tied,
                rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
                pad_token_id=2,
            )
        )
        self.dino_to_llm, self.llm_to_query = nn.Linear(DIM, WIDTH), nn.Linear(WIDTH, DIM)
        self.q_static, self.q_init = nn.Parameter(torch.randn(1, DIM)), nn.Parameter(torch.randn(1, DIM))
        with torch.no_grad():
            for name, value in self.named_parameters():
                if "lambda1" in name:
                    value.fill_(0.7)
                elif value.ndim > 1 and "norm" not in name:
                    value.mul_(12.0 if name.startswith("llm.model.layers") else 2.0)

    def keys(self, frames: Tensor) -> list[tuple[Tensor, Tensor]]:
        tokens, found = self.encoder.dino.embeddings(frames), []
        for layer in self.encoder.dino.encoder.layer:
            normed = layer.norm1(tokens)
            found.append((layer.attention.k_proj(normed), layer.attention.v_proj(normed)))
            tokens = layer(tokens)
        return found

    def look(self, queries: Tensor, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the visual tokens [T, C] of T frames for queries [T, D]."""
        token = self.encoder.query_input_proj(queries)[:, None]
        for layer, (key, value) in zip(self.encoder.dino.encoder.layer, keys, strict=True):
            query = layer.attention.q_proj(layer.norm1(token))
            split = [each.unflatten(-1, (2, DIM // 2)).transpose(1, 2) for each in (query, key, value)]
            weights = (split[0] @ split[1].mT / (DIM // 2) ** 0.5).softmax(-1)
            seen = layer.attention.o_proj((weights @ split[2]).transpose(1, 2).flatten(2))
            token = token + layer.layer_scale1(seen)
            token = token + layer.layer_scale2(layer.mlp(layer.norm2(token)))
        embedding = self.encoder.output_proj(self.encoder.dino.layernorm(token)[:, 0])
        return self.dino_to_llm(embedding) * SCALE

    def read(self, visual: Tensor, ids: Tensor) -> Tensor:
        words = self.llm.get_input_embeddings()(ids)
        return self.llm.model(inputs_embeds=torch.cat([visual, words])[None]).last_hidden_state[0]

    def forward(self, frames: Tensor, ids: Tensor, mode: str) -> Tensor:
        """Return the hidden states [T + L, C] of frames [T, 3, S, S] and ids [L]."""
        keys = self.keys(frames)
        visual = self.look(self.q_static.expand(len(frames), -1), keys)
        if mode == "coarse_fine":
            hidden = self.llm.model(inputs_embeds=visual[None]).last_hidden_state[0]
            visual = self.look(torch.cat([self.q_init, self.llm_to_query(hidden)[:-1]]), keys)
        elif mode == "autoregressive":
            visual, query = visual[:0], self.q_init
            for frame in range(len(frames)):
                seen = self.look(query, [(key[frame : frame + 1], value[frame : frame + 1]) for key, value in keys])
                visual = torch.cat([visual, seen])
                query = self.llm_to_query(self.llm.model(inputs_embeds=visual[None]).last_hidden_state[0, -1:])
        return self.read(visual, ids)

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of each tensor under its published name; a file may not contain tied tensors as shared ones."""
        named = {}
        for name, value in self.state_dict().items():
            for new, old in OLD_NAMES if name.startswith("encoder.") else ():
                name = name.replace(new, old)
            named[name] = value.clone()
        return named


def language_folder(folder: Path, model: Published) -> Path:
    from transformers import PreTrainedTokenizerFast

    TrainedTokenizer(WORDS).load(folder / "made", SENTENCES)
    model.llm.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(TrainedTokenizer(WORDS).file_in(folder / "made")),
        eos_token=TURN_END,
        pad_token=TURN_END,
        bos_token=END_OF_TEXT,
        chat_template=TINY_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def published(tmp_path: Path) -> tuple[Published, Path, Path]:
    """The model, a folder with its weights as on the hub, and the folder of its language model."""
    torch.manual_seed(0)
    model = Published(tied=True).eval()
    (tmp_path / "fvlm").mkdir()
    save_file(model.tensors(), tmp_path / "fvlm" / "model.safetensors")
    (tmp_path / "fvlm" / "config.json").write_text('{"llm_name": "x"}')
    return model, tmp_path / "fvlm", language_folder(tmp_path / "language", model)


def converted(weights: Path, language: Path, to: Path, **options: Any) -> Path:
    export_published(str(weights), str(language), str(to), image_size=56, **options)
    return to


@pytest.mark.parametrize("mode", ["coarse_only", "coarse_fine", "autoregressive"])
def test_hidden_states_are_those_of_the_published_passes(
    mode: str, published: tuple[Published, Path, Path], tmp_path: Path
) -> None:
    theirs, weights, language = published
    chat = VideoChat.from_pretrained(converted(weights, language, tmp_path / "chat"))
    ids = torch.randint(3, 300, (11,))
    frames = torch.randn(5, 3, 56, 56)  # 4 x 4 patches; the position table of 5 x 5 is resampled
    rows = TextRows(ids[None], [11], [0], [0], [5])
    with torch.no_grad():
        wanted = theirs(frames, ids, mode)
        found = chat.module.network(frames[None], rows, mode).hidden[0]
    torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-4)  # 3.4e-5 with torch 2.10


def test_the_step_makes_a_model_that_answers_as_the_published_one(
    published: tuple[Published, Path, Path], tmp_path: Path
) -> None:
    """Frames are cropped, they come before all text, and the system turn is the published one."""
    theirs, weights, language = published
    cfg = compose(
        "prepare",
        [
            "step=published_vlm",
            f"weights={weights}",
            f"language_model={language}",
            f"to={tmp_path / 'chat'}",
            "image_size=56",
        ],
    )
    report = run(cfg)
    assert report["folder"] == str(tmp_path / "chat")
    left_out = DIM * (1 + 25 - 16)  # the mask token, which only DINO's training uses, and positions of the 5 x 5 table
    assert report["parameters"] == sum(each.numel() for each in theirs.parameters()) - left_out
    chat = VideoChat.from_pretrained(tmp_path / "chat")
    module = chat.module
    assert module.image_options == {"image_size": 56, "fit": "crop", "max_frames": 64, "image_frames": 8}
    video = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    question = "Which digit is on the cube?"
    said = module.tokenizer.render([("system", "You are a helpful AI assistant."), ("user", question)], answering=True)
    ids = module.tokenizer.encode(said)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    frames = (torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255 - mean) / std
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            hidden = theirs(frames, torch.tensor([*ids, *answer]), "autoregressive")
            likely = theirs.llm.lm_head(hidden[-1])[: module.tokenizer.size]  # the table has rows without a token
            answer.append(int(likely.argmax()))
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    found = chat.generate([{"role": "user", "content": content}], max_new_tokens=12)
    assert len(set(answer)) > 3
    assert found == module.tokenizer.decode(answer)
    card = (tmp_path / "chat" / "README.md").read_text()
    assert f"did not train it: its weights are those of {weights}" in card
    assert "trained with" not in card
    own = PretrainedTokenizer(str(tmp_path / "chat")).load(tmp_path)  # for a training run that starts from this model
    assert own.same_words(module.tokenizer, template=False)
    assert not own.same_words(module.tokenizer)  # the system turn is in its template
    assert own.render([("user", question)]) == module.tokenizer.render(
        [("system", "You are a helpful AI assistant."), ("user", question)]
    )
    again = chat.save_pretrained(tmp_path / "again")
    assert f"did not train it: its weights are those of {weights}" in (again / "README.md").read_text()
    stored = json.loads((again / "config.json").read_text())["checkpoint"]["keygrip"]["config"]["data"]
    assert [stored[name] for name in ("fit", "max_frames", "image_frames")] == ["crop", 64, 8]


def test_all_forms_of_a_file_give_the_same_model(published: tuple[Published, Path, Path], tmp_path: Path) -> None:
    """A checkpoint of the published training, one of a compiled model, one in bfloat16, one without one of the tied
    tables."""
    theirs, weights, language = published
    state = theirs.tensors()
    plain = load(converted(weights, language, tmp_path / "plain")).state_dict()
    compiled = {name.replace("llm.", "llm._orig_mod.", 1): value for name, value in state.items()}
    training = {
        "model_state_dict": compiled,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        **{"scaler_state_dict": {}, "scheduler_state_dict": {"last_epoch": 3}, "step": 3, "metric_value": 1.5},
        **{"data_position": 96, "timestamp": "2026-02-20T10:00:00", "config": {"model": {"query_dim": DIM}}},
    }
    torch.save(training, tmp_path / "best.pt")
    files = {"best.pt": plain}
    for lacking in ("llm.lm_head.weight", "llm.model.embed_tokens.weight"):
        save_file({k: v for k, v in state.items() if k != lacking}, tmp_path / f"{lacking}.safetensors")
        files[f"{lacking}.safetensors"] = plain
    for name, wanted in files.items():
        found = load(converted(tmp_path / name, language, tmp_path / f"of_{name}")).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
    parts = [dict(list(state.items())[start::2]) for start in (0, 1)]
    (tmp_path / "shards").mkdir()
    for number, part in enumerate(parts):
        save_file(part, tmp_path / "shards" / f"model-{number}.safetensors")
    where = {name: f"model-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert read_published(str(tmp_path / "shards")).keys() == state.keys()
    save_file({k: v.bfloat16() for k, v in state.items()}, tmp_path / "half.safetensors")
    half = load(converted(tmp_path / "half.safetensors", language, tmp_path / "half")).state_dict()
    words = "network.language.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(half[words], plain[words].bfloat16().float())


def test_an_output_layer_of_its_own_is_kept(tmp_path: Path) -> None:
    theirs = Published(tied=False).eval()
    language = language_folder(tmp_path / "language", theirs)
    save_file(theirs.tensors(), tmp_path / "model.safetensors")
    module: Any = load(converted(tmp_path / "model.safetensors", language, tmp_path / "chat"))
    assert torch.equal(module.network.language.head.weight, theirs.llm.lm_head.weight)
    told = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(told | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="has an output layer of its own"):
        converted(tmp_path / "model.safetensors", language, tmp_path / "tied")
    assert not (tmp_path / "tied").exists()


def test_what_is_not_the_published_model_is_refused_and_nothing_is_written(
    published: tuple[Published, Path, Path], tmp_path: Path
) -> None:
    _, weights, language = published
    state = load_file(weights / "model.safetensors")

    def refused(said: str, changed: dict[str, Tensor] | None, language: Path = language) -> None:
        file = weights / "model.safetensors"
        if changed is not None:
            file = tmp_path / "changed.safetensors"
            save_file(changed, file)
        with pytest.raises(ValueError, match=said):
            converted(file, language, tmp_path / "chat")
        assert not (tmp_path / "chat").exists()

    def without(*names: str) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name not in names}

    refused("holds no weights of fVLM .it has other.weight", state | {"other.weight": torch.zeros(2)})
    refused(
        "holds no weights of fVLM .it has dino_to_llm_more.weight", state | {"dino_to_llm_more.weight": torch.zeros(2)}
    )
    refused("it lacks q_static", without("q_static"))
    refused("q_init is of torch.int64", state | {"q_init": torch.zeros(1, DIM, dtype=torch.int64)})
    refused("it lacks dino_to_llm.bias", without("dino_to_llm.bias"))
    refused("it lacks encoder.query_input_proj.weight", without("encoder.query_input_proj.weight"))
    refused("it lacks llm.model.embed_tokens.weight", without("llm.lm_head.weight", "llm.model.embed_tokens.weight"))
    refused(r"queries \[1, 64\] and \[1, 128\] and an encoder of 128", state | {"q_static": torch.zeros(1, 64)})
    table = "encoder.dino.embeddings.position_embeddings"
    refused("it lacks encoder.dino.embeddings.position_embeddings", without(table))
    refused(r"\[1, 7, 128\], no table", state | {table: torch.zeros(1, 7, DIM)})
    refused(r"\[26, 128\], no table", state | {table: state[table][0].clone()})
    refused("does not fit backbone.variant", without("encoder.dino.encoder.layer.1.norm1.weight"))
    refused(
        "missing blocks.1.attn.qkv.bias, blocks.1.attn.qkv.weight",
        without("encoder.dino.encoder.layer.1.attention.attention.query.weight"),
    )
    patches = "encoder.dino.embeddings.patch_embeddings.projection.weight"
    refused(r"patches \[128, 3, 16, 16\] is no DINOv2", state | {patches: torch.zeros(DIM, 3, 16, 16)})
    wide = {table: torch.zeros(1, 2, 10**6)} | {name: torch.zeros(1, 10**6) for name in ("q_static", "q_init")}
    refused("is no DINOv2", state | wide)  # refused before a network of that width is built
    refused("query_projection.weight is", state | {"llm_to_query.weight": torch.zeros(DIM, 9)})
    refused("mlp.up_proj.weight", without("llm.model.layers.1.mlp.up_proj.weight"))
    for name in ("q_init", "encoder.dino.layernorm.bias", "llm.model.norm.weight"):
        refused(f"{name} holds NaN", state | {name: torch.full_like(state[name], torch.nan)})
    refused("layers 1 in place of 2", {k: v for k, v in state.items() if not k.startswith("llm.model.layers.1.")})
    told = json.loads((language / "config.json").read_text())
    for changes, said in (
        ({"vocab_size": WORDS + 1}, f"vocabulary {WORDS} in place of {WORDS + 1}"),
        ({"intermediate_size": 10**12}, f"mlp_width 96 in place of {10**12}"),
        ({"num_attention_heads": 8, "head_dim": 6, "num_key_value_heads": 2}, "kv_heads 4 in place of 2"),
        ({"num_attention_heads": 0}, "config.json has values that cannot be"),
        ({"max_position_embeddings": 100}, "a context of 100 positions, too few for max_frames=64"),
        ({"rope_parameters": 3}, "config.json has values that cannot be"),
        ({"model_type": "bert"}, "is a bert"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, here it is silu"),
    ):
        (language / "config.json").write_text(json.dumps(told | changes))
        refused(said, None)
    (language / "config.json").write_text(json.dumps(told))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError):
        converted(weights, language, tmp_path / "used")


@pytest.mark.parametrize("lacking", [None, "model-2.safetensors"])
def test_all_parts_of_sharded_weights_are_fetched_from_the_hub(
    lacking: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are downloaded into one folder, each when it is requested."""
    state = Published(tied=True).tensors()
    there = {f"model-{n}.safetensors": dict(list(state.items())[n::3]) for n in range(3)}
    where = {key: name for name, part in there.items() for key in part}

    def fetch(source: str, name: str) -> Path | None:
        assert source == "maker/fvlm"
        if name == "model.safetensors.index.json":
            (tmp_path / name).write_text(json.dumps({"weight_map": where}))
        elif name in there and name != lacking:
            save_file(there[name], tmp_path / name)
        else:
            return None
        return tmp_path / name

    monkeypatch.setattr("keygrip.models.foveated_vlm.published_weights.file_of", fetch)
    if lacking is None:
        assert read_published("maker/fvlm").keys() == state.keys()
    else:
        with pytest.raises(FileNotFoundError, match="maker/fvlm is neither a file, nor a folder, nor to be had"):
            read_published("maker/fvlm")


@pytest.mark.parametrize("source", ["nowhere.safetensors", "./nowhere", "empty", "nobody/nothing-of-this-name"])
def test_weights_that_are_not_there_are_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(source)):
        read_published(source)

"""Conversion of the weights of the published model, fVLM, to the names of `FoveatedVLM`.

Source of the names: code github.com/spsanps/nanoSmol (fVLM/model.py, encoder.py and checkpoint.py), weights
huggingface.co/sanps/fVLM-135M. A file holds the encoder as transformers' `Dinov2Model`, the language model as its
`LlamaForCausalLM`, two learned queries and four linear maps; a checkpoint of its training holds them together with the
optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keygrip.models.backbone.architectures import resample_positions
from keygrip.models.backbone.weights import State, load_state, read_file, shard_names
from keygrip.models.foveated_vlm.network import FoveatedVLM
from keygrip.models.language.hub import file_of
from keygrip.training.integrity import refuse_unfit_weights

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # in the repository of the weights
OF_TRAINING = "model_state_dict."  # prefix of the weights in a checkpoint of the published training
ENCODER, LANGUAGE, OUTPUT_LAYER = "encoder.dino.", "llm.model.", "llm.lm_head.weight"
EMBEDDINGS = "llm.model.embed_tokens.weight"
TABLE = f"{ENCODER}embeddings.position_embeddings"
PATCHES = f"{ENCODER}embeddings.patch_embeddings.projection.weight"
NAMES = {
    "q_static": "static_query",
    "q_init": "first_query",
    "llm_to_query.weight": "query_projection.weight",
    "llm_to_query.bias": "query_projection.bias",
    "encoder.query_input_proj.weight": "query_input.weight",
    "encoder.output_proj.weight": "embedding_output.weight",
    "encoder.output_proj.bias": "embedding_output.bias",
    "dino_to_llm.weight": "connector.linear.weight",
    "dino_to_llm.bias": "connector.linear.bias",
}
QUERIES = ("q_static", "q_init")
PATCH_SIZE = 14  # of every DINOv2
HEAD_WIDTH = 64  # of every DINOv2


def read_published(source: str) -> State:
    """Read the published model's tensors, under their own names.

    Args:
        source: a file (.safetensors, or .pt of its training), a folder with model.safetensors, whole or in shards, or
            a name on the Hugging Face hub.

    Raises:
        FileNotFoundError: not there. ValueError: damaged, or of another model.
    """
    raw = read_file(_find_weights_file(str(source)))
    if any(name.startswith(OF_TRAINING) for name in raw):
        raw = {name.removeprefix(OF_TRAINING): value for name, value in raw.items() if name.startswith(OF_TRAINING)}
    state = {name.replace("_orig_mod.", ""): value for name, value in raw.items()}  # of a compiled model
    unexpected = sorted(
        name for name in state if not name.startswith((ENCODER, LANGUAGE)) and name not in (OUTPUT_LAYER, *NAMES)
    )
    required = {*NAMES, TABLE, PATCHES, *({EMBEDDINGS} if OUTPUT_LAYER not in state else ())}
    missing = sorted(required - state.keys())
    if unexpected or missing:
        problems = [f"it has {', '.join(unexpected[:3])}"] if unexpected else []
        problems += [f"it lacks {', '.join(missing[:3])}"] if missing else []
        raise ValueError(
            f"{source} holds no weights of fVLM ({'; '.join(problems)}): give model.safetensors of "
            "https://huggingface.co/sanps/fVLM-135M, or a checkpoint that its code wrote; a model that keygrip trained "
            "needs no conversion"
        )
    if odd := sorted(name for name, value in state.items() if not value.is_floating_point()):
        raise ValueError(f"{source}: {odd[0]} is of {state[odd[0]].dtype}, and weights are floating-point numbers")
    return state


def encoder_sizes(state: State, source: str) -> dict[str, int]:
    """Return width, depth and heads of the encoder.

    Raises:
        ValueError: its position table or the queries have another form than the published ones, or it is no DINOv2.
    """
    table, queries = state[TABLE], [state[name] for name in QUERIES]
    positions = table.shape[1] - 1 if table.ndim == 3 else 0
    width = int(table.shape[-1]) if table.ndim else 0
    if positions < 1 or table.shape[0] != 1 or round(positions**0.5) ** 2 != positions:
        raise ValueError(f"{source}: {TABLE} is {list(table.shape)}, no table [1, 1 + M * M, D] of a square image")
    if any(list(query.shape) != [1, width] for query in queries):
        raise ValueError(
            f"{source} has queries {' and '.join(str(list(query.shape)) for query in queries)} and an encoder of "
            f"{width} channels: here a query has as many, [1, {width}], as in the published models"
        )
    depth, patches = layers_of(state, f"{ENCODER}encoder.layer."), list(state[PATCHES].shape)
    if depth == 0 or width % HEAD_WIDTH or patches != [width, 3, PATCH_SIZE, PATCH_SIZE]:
        raise ValueError(f"{source}: an encoder of {depth} blocks, {width} channels and patches {patches} is no DINOv2")
    return {"width": width, "depth": depth, "heads": width // HEAD_WIDTH}


def refuse_other_language(state: State, sizes: Mapping[str, Any], source: str, language: str) -> None:
    """Raise ValueError if the language model in the weights has other sizes than the language model that is named.

    Args:
        sizes: of the named language model, by their names in conf/language. language: its name, for the message.
    """
    table = state.get(EMBEDDINGS, state.get(OUTPUT_LAYER))
    assert table is not None
    rows, width = [*table.shape, 0, 0][:2]
    weight_sizes = {"vocabulary": rows, "width": width, "layers": layers_of(state, f"{LANGUAGE}layers.")}
    first_layer, heads = f"{LANGUAGE}layers.0.", sizes["heads"]
    if isinstance(heads, int) and heads > 0:
        weight_names = {
            "mlp_width": "mlp.up_proj.weight",
            "heads": "self_attn.q_proj.weight",
            "kv_heads": "self_attn.k_proj.weight",
        }
        lengths = {
            name: [*state[first_layer + weight_name].shape, 0][0]
            for name, weight_name in weight_names.items()
            if first_layer + weight_name in state
        }
        weight_sizes["mlp_width"] = lengths.get("mlp_width", 0)
        weight_sizes |= {name: lengths.get(name, 0) * heads // width if width else 0 for name in ("heads", "kv_heads")}
    else:
        weight_sizes["heads"] = 0
    if diffs := [
        f"{name} {weight_sizes[name]} in place of {sizes[name]}"
        for name in weight_sizes
        if weight_sizes[name] != sizes[name]
    ]:
        raise ValueError(
            f"{source} is not from the language model {language}: {', '.join(diffs)}. The published models of 135M and "
            "1.7B are from HuggingFaceTB/SmolLM2-135M-Instruct and HuggingFaceTB/SmolLM2-1.7B-Instruct: set "
            "language_model to the right one, or to a folder with its files"
        )


def layers_of(state: State, prefix: str) -> int:
    """Return the number of layers under a prefix, which ends before the layer numbers."""
    matches = (re.match(rf"{re.escape(prefix)}(\d{{1,6}})\.", name) for name in state)
    return len({int(match[1]) for match in matches if match})


def load_published(network: FoveatedVLM, state: State, source: str) -> None:
    """Load the published weights into a network with `published_projections`, strictly and in its precision.

    The encoder's position table is resampled to the network's image size as in transformers, because the published
    model was trained with the encoder of transformers; for other image sizes, the result is resampled again.

    Args:
        state: result of `read_published`. source: origin of the weights, for messages.

    Raises:
        ValueError: weights that do not fit, are not finite, or an output layer that is not the embedding table.
    """
    refuse_unfit_weights(state, {}, source)
    backbone, language = network.backbone, network.language
    encoder = {name.removeprefix(ENCODER): value for name, value in state.items() if name.startswith(ENCODER)}
    side = backbone.image_size // backbone.patch_size
    cls, positions = state[TABLE].float().split([1, state[TABLE].shape[1] - 1], dim=1)
    positions = resample_positions(positions, (side, side), offset=0.0, antialias=False)
    encoder["embeddings.position_embeddings"] = torch.cat([cls, positions], dim=1)
    load_state(backbone.net, backbone.variant, encoder, source)
    table = state.get(EMBEDDINGS, state.get(OUTPUT_LAYER))
    assert table is not None
    language_weights = {
        name.removeprefix(LANGUAGE): value for name, value in state.items() if name.startswith(LANGUAGE)
    }
    language_weights["embed_tokens.weight"] = table
    _load(language.model, language_weights, f"{source}, language model")
    output = state.get(OUTPUT_LAYER, table)
    if language.head is not None:
        _load(language.head, {"weight": output}, f"{source}, output layer")
    elif not torch.equal(output, table):
        raise ValueError(
            f"{source} has an output layer of its own, and its language model's config.json says that it is the "
            "embedding table (tie_word_embeddings): give the language model that it was trained from"
        )
    parameters = {name: value for name, value in network.named_parameters() if name in NAMES.values()}
    published = {
        own_name: state[published_name][None] if published_name in QUERIES else state[published_name]
        for published_name, own_name in NAMES.items()
    }
    _check_fit(published, parameters, source)
    with torch.no_grad():
        for name, value in published.items():
            parameters[name].copy_(value)


def _find_weights_file(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in (WEIGHTS, INDEX):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{source} holds no {WEIGHTS}: name the file with the weights")
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    file = file_of(source, WEIGHTS) or file_of(source, INDEX)
    if file is not None and file.name == INDEX:
        file = file if all(file_of(source, name) for name in shard_names(file)) else None
    if file is None:
        raise FileNotFoundError(
            f"{source} is neither a file, nor a folder, nor to be had from the hub: download {WEIGHTS} from "
            f"https://huggingface.co/{source} and give that file"
        )
    return file


def _load(module: Any, state: State, origin: str) -> None:
    module_state = module.state_dict()
    state = {
        name: value for name, value in state.items() if name in module_state or not name.endswith("rotary_emb.inv_freq")
    }
    _check_fit(state, module_state, origin)
    module.load_state_dict(state)


def _check_fit(state: State, expected: dict[str, Any], origin: str) -> None:
    """Raise ValueError if names or shapes differ from those expected by the module."""
    names = sorted(expected.keys() ^ state.keys())
    shapes = [
        f"{name} is {list(state[name].shape)} in place of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if expected[name].shape != state[name].shape
    ]
    if names or shapes:
        raise ValueError(
            f"{origin}: the weights do not fit: {'; '.join([*names[:3], *shapes[:3]])}; does the language model belong "
            "to it?"
        )

"""`DinoBackbone`: DINOv2, DINOv3 and a tiny variant behind one interface.

Shapes: B images, S side of an image, N patches on an h x w grid, R prefix tokens (CLS first), D width, H heads, E
head width, Q query tokens.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from keygrip.models.backbone.architectures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VARIANTS,
    Stem,
    build_network,
    resample_positions,
    set_rope_periods,
)
from keygrip.models.backbone.features import BlockKV, DinoFeatures
from keygrip.models.backbone.weights import adopt_position_table, find_weights, load_weights
from keygrip.models.nn.kept_buffers import KeptBuffers
from keygrip.models.nn.processor_attention import recompute_contexts
from keygrip.training.parts import ReadWhere, model_part

Trainable = Literal["frozen", "all"] | int


@model_part(from_checkpoint={"weights": "random", "init_from": None, "weights_path": None, "weights_prefix": None})
class DinoBackbone(KeptBuffers):
    """A DINO vision transformer: images in, typed features out, and keys and values by block for deep queries.

    Images are float [B, 3, H, W], already normalised with `mean` and `std` (the data module does that, never the
    network); H and W may be any multiples of `patch_size` and need not be `image_size`, which is only the size the
    configs read.

    Args:
        variant: a key of `VARIANTS` (Meta's hub names, and `tiny`).
        image_size: side S in pixels of the images that this configuration works on; a multiple of the patch size.
        weights: `random` (explicit, never a fallback) or `pretrained` (`weights.py` lists the places searched).
        init_from: weights of another run or file, in place of random ones: a run folder or checkpoint of a keygrip
            model (its EMA weights, where it has them), or a file in any known format.
        weights_path: local file for `weights=pretrained`; the environment variable DINO_WEIGHTS_PATH does the same.
        weights_prefix: which `...backbone.` of the keygrip checkpoint in `init_from` to load if it holds several that
            differ.
        trainable: `frozen` (no gradients, always in eval mode), `all`, or n for the last n blocks and the final norm.
        gradient_checkpointing: recompute the activations of trained blocks in the backward pass.
        stem: `patch` (linear embedding, as in DINO) or `conv` (`ConvStem`; tiny only). None: conv for tiny, patch
            otherwise.
        drop_path: stochastic depth rate of the last block, growing linearly from 0.
        width, depth, heads: reduced sizes of the same architecture, for training from scratch and for tests.

    Raises:
        ValueError: unknown variant or option, a size that is no multiple of the patch size, weights that do not fit.
        FileNotFoundError: weights that do not exist.
    """

    read_where: ClassVar = dict.fromkeys(
        ("drop_path", "gradient_checkpointing"), ReadWhere("trainable", unless="frozen")
    )

    def __init__(
        self,
        variant: str,
        image_size: int,
        weights: str,
        weights_path: str | None = None,
        weights_prefix: str | None = None,
        trainable: Trainable = "all",
        gradient_checkpointing: bool = False,
        stem: Stem | None = None,
        drop_path: float = 0.0,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            near = difflib.get_close_matches(variant, VARIANTS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"backbone.variant={variant!r} is not known{hint}; choose one of {', '.join(VARIANTS)}")
        self.variant = VARIANTS[variant]
        if stem is None:
            stem = "conv" if self.variant.family == "tiny" else "patch"
        if stem not in ("patch", "conv"):
            raise ValueError(f"backbone.stem={stem!r}: choose patch or conv")
        if stem == "conv" and self.variant.family != "tiny":
            raise ValueError(
                f"backbone.stem=conv is for variant tiny; {variant} has a linear patch embedding: stem=patch"
            )
        self.patch_size = self.variant.patch_size
        self._check_size(image_size, image_size, size_name="backbone.image_size")
        self.image_size = image_size
        self.mean: tuple[float, float, float] = IMAGENET_MEAN
        self.std: tuple[float, float, float] = IMAGENET_STD
        self.embed_dim = width or self.variant.width
        self.depth = depth or self.variant.depth
        self.num_heads = heads or self.variant.heads
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"backbone width {self.embed_dim} over {self.num_heads} heads: the width of a head must be a "
                "multiple of 4"
            )
        self.num_prefix_tokens = 1 + self.variant.registers
        self.gradient_checkpointing = gradient_checkpointing
        self.net: Any = build_network(
            self.variant,
            stem=stem,
            image_size=image_size,
            width=self.embed_dim,
            depth=self.depth,
            heads=self.num_heads,
            drop_path=drop_path,
        )
        reduced = (self.embed_dim, self.depth, self.num_heads) != (
            self.variant.width,
            self.variant.depth,
            self.variant.heads,
        )
        source = find_weights(self.variant, weights, weights_path, init_from)
        if source is not None and source.path is None and reduced:
            raise ValueError(f"{variant} with another width, depth or number of heads has no pretrained weights")
        if source is None and weights_prefix is not None:
            raise ValueError(f"backbone.weights_prefix={weights_prefix} has no effect with random weights")
        self.loaded_weights = (
            "random" if source is None else load_weights(self.net, self.variant, source, weights_prefix)
        )
        self.register_load_state_dict_pre_hook(_adopt_position_table)
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}  # see `compile_functions`
        self._set_trainable(trainable)

    # ------------------------------------------------------------------ modes

    def _set_trainable(self, trainable: Trainable) -> None:
        valid_count = isinstance(trainable, int) and not isinstance(trainable, bool)
        if valid_count and not 1 <= int(trainable) <= self.depth:
            raise ValueError(
                f"backbone.trainable={trainable}: {self.variant.name} has {self.depth} blocks; give 1 to "
                f"{self.depth}, all or frozen"
            )
        if not valid_count and trainable not in ("frozen", "all"):
            raise ValueError(f"backbone.trainable={trainable!r}: choose frozen, all, or a number of last blocks")
        self.trainable = trainable
        # The layer of the first parameter that is trained, counted as in `layer_of`.
        if trainable == "all":
            self._first_trained = -1
        else:
            self._first_trained = self.depth + 1 if trainable == "frozen" else self.depth - int(trainable)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.layer_of(name) >= self._first_trained)
        self.train(self.training)

    def train(self, mode: bool = True) -> DinoBackbone:
        """As `nn.Module.train`, except that frozen parts stay in eval mode."""
        super().train(mode)
        if self._first_trained >= 0:
            self.net.eval()
            for block in self._blocks[self._first_trained :]:
                block.train(mode)
        return self

    # ------------------------------------------------------------------ forward

    def forward(self, images: Tensor) -> DinoFeatures:
        """[B, 3, H, W] -> normed features. Raises ValueError: H or W is no multiple of the patch size."""
        tokens, rope, grid = self._embed(images)
        for index, block in enumerate(self._blocks):
            with self._gradients(index):
                if self._is_recomputed(index):
                    tokens = _run_checkpointed(_run_block, block, tokens, rope)
                else:
                    tokens = _run_block(block, tokens, rope)
        return self._finish(tokens, grid)

    def forward_with_kv(self, images: Tensor) -> tuple[DinoFeatures, list[BlockKV]]:
        """Return the features of `forward`, and the keys and values of all tokens at every block, for `query`."""
        tokens, rope, grid = self._embed(images)
        cache: list[BlockKV] = []
        for index in range(self.depth):
            with self._gradients(index):
                tokens, key, value = self._run_on_block(_run_block_with_kv, index, tokens, rope, self.num_prefix_tokens)
            cache.append(BlockKV(key, value))
        return self._finish(tokens, grid), cache

    def keys_and_values(self, images: Tensor) -> list[BlockKV]:
        """Return only the second output of `forward_with_kv`. The last block's attention and MLP over all tokens, which
        only the first output needs, are not computed."""
        tokens, rope, _ = self._embed(images)
        cache: list[BlockKV] = []
        for index in range(self.depth):
            with self._gradients(index):
                run = _run_block_with_kv if index < self.depth - 1 else _keys_and_values
                tokens, key, value = self._run_on_block(run, index, tokens, rope, self.num_prefix_tokens)
            cache.append(BlockKV(key, value))
        return cache

    def query(self, tokens: Tensor, kv: Sequence[BlockKV], first_block: int = 0) -> Tensor:
        """Pass query tokens through the blocks with cached keys and values: [B, Q, D] -> [B, Q, D], normed.

        At each block, each query attends to the cached tokens alone (not to other queries), with the block's own
        norm, query and output projection, LayerScale and MLP; no cached token attends to a query. A query has no
        position in the image, so no rotary embedding. For `cls_input()` the result is DINO's own CLS output.
        Gradients reach the queries in a frozen backbone too.

        Args:
            tokens: queries at the input of block `first_block`, [B, Q, D].
            kv: the second output of `forward_with_kv`, from block `first_block` on.
            first_block: 0 for the deep query; depth - 1 for a query that uses the last block only.
        """
        return self._query(tokens, kv, first_block, None)

    def query_with_attention(
        self, tokens: Tensor, kv: Sequence[BlockKV], first_block: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """As `query`; also return the attention of every block, a list of [B, H, Q, R + N] with row sums 1 (slower)."""
        attention: list[Tensor] = []
        return self._query(tokens, kv, first_block, attention), attention

    def cls_input(self) -> Tensor:
        """The CLS token as it enters block 0, [1, 1, D]."""
        token = self._parameter("cls_token")
        if self._positions_hold_cls:
            token = token + self._parameter("pos_embed")[:, :1]
        return token

    def _query(self, tokens: Tensor, kv: Sequence[BlockKV], first_block: int, attention: list[Tensor] | None) -> Tensor:
        if len(kv) != self.depth - first_block:
            raise ValueError(
                f"query from block {first_block} of {self.depth} needs {self.depth - first_block} blocks of keys, "
                f"got {len(kv)}"
            )
        if tokens.ndim != 3 or tokens.shape[0] != kv[0].key.shape[0] or tokens.shape[2] != self.embed_dim:
            raise ValueError(
                f"query tokens must be [{kv[0].key.shape[0]}, Q, {self.embed_dim}], as many as the images; got "
                f"{list(tokens.shape)}"
            )
        for block, block_kv in zip(self._blocks[first_block:], kv, strict=True):
            if attention is None:
                tokens = _query_block(block, tokens, block_kv)
            else:
                tokens, weights = _query_block_with_attention(block, tokens, block_kv)
                attention.append(weights)
        return self.net.norm(tokens)

    def _run_on_block(self, run: Callable[..., Any], index: int, *inputs: Any) -> Any:
        """Call `run` on the block of that index; its activations are recomputed in the backward pass if that is set."""
        function = self._compiled.get(run, run)
        block = self._blocks[index]
        return _run_checkpointed(function, block, *inputs) if self._is_recomputed(index) else function(block, *inputs)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Tokens at the input of block 0, the rotary embedding of the patches (or None), and the grid."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"the backbone takes images [B, 3, H, W], got {list(images.shape)}")
        self._check_size(images.shape[2], images.shape[3], size_name="image")
        with self._gradients(-1):
            patches = self.net.patch_embed(images)  # [B, h, w, D]
            grid = (patches.shape[1], patches.shape[2])
            patches = patches.flatten(1, 2)
            if (table := self.net.pos_embed) is not None:
                if self._positions_hold_cls:
                    table = table[:, 1:]
                plain = self.variant.registers == 0
                patches = patches + resample_positions(table, grid, offset=0.1 if plain else 0.0, antialias=not plain)
            prefix = self.cls_input()
            if self.variant.registers:
                prefix = torch.cat([prefix, self._parameter("reg_token")], dim=1)
            tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), patches], dim=1)
            rope = self._rope(grid)
        return tokens, rope, grid

    def _rope(self, grid: tuple[int, int]) -> Tensor | None:
        rope = getattr(self.net, "rope", None)
        if rope is None:
            return None
        if rope.periods.dtype != torch.float32:  # a wrapper (FSDP) has cast the buffers; their values fit into bfloat16
            set_rope_periods(self.net, rope.periods)
        return rope.get_embed(shape=grid)

    def _finish(self, tokens: Tensor, grid: tuple[int, int]) -> DinoFeatures:
        with self._gradients(self.depth - 1):
            tokens = self.net.norm(tokens)
        prefix, patches = tokens.split([self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens], dim=1)
        return DinoFeatures(cls=prefix[:, 0], prefix=prefix, patches=patches, grid=grid)

    def _gradients(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context without autograd for frozen parts that images pass through, whatever their requires_grad."""
        if index < self._first_trained:
            return torch.no_grad()
        return contextlib.nullcontext()

    def _is_recomputed(self, index: int) -> bool:
        return (
            self.gradient_checkpointing and index >= self._first_trained and self.training and torch.is_grad_enabled()
        )

    # ------------------------------------------------------------------ parts

    def sharded_parts(self) -> list[nn.Module]:
        """Return the blocks, for models that call `forward` only: the other methods call parts of the blocks."""
        return list(self._blocks)

    def compile_functions(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compile, with `compiled`, the functions that compute blocks together with their keys and values.

        Queries are not compiled: they are few and have many shapes and strides, each of which torch would compile
        separately."""
        self._compiled = {run: compiled(run) for run in (_run_block_with_kv, _keys_and_values)}

    @property
    def _blocks(self) -> Any:
        return self.net.blocks

    @property
    def _positions_hold_cls(self) -> bool:
        return self.net.pos_embed is not None and not self.net.no_embed_class

    def _parameter(self, name: str) -> Tensor:
        return self.net.get_parameter(name)

    def _check_size(self, height: int, width: int, size_name: str) -> None:
        patch = self.variant.patch_size
        for side in (height, width):
            if side < patch or side % patch:
                below, above = side // patch * patch, (side // patch + 1) * patch
                near = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"{size_name} {height} x {width}: {side} does not divide by the patch size {patch} of "
                    f"{self.variant.name}; the nearest sizes are {near}"
                )

    def kept(self) -> Mapping[str, Tensor]:
        """Return the rotary periods: timm recomputes them, and not with the checkpoint's values."""
        rope = getattr(self.net, "rope", None)
        return {} if rope is None else {"periods": rope.periods}

    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """See `KeptBuffers`."""
        if kept:
            set_rope_periods(self.net, kept["periods"])

    # ------------------------------------------------------------------ for optimizers

    def layer_of(self, name: str) -> int:
        """Return the layer number of a parameter of this module, for layer-wise learning rates: embeddings are -1,
        block i is i, the norm is depth."""
        parts = name.split(".")
        if parts[0] != "net" or len(parts) < 2:
            raise ValueError(f"{name!r} is not a parameter of the backbone")
        if parts[1] == "blocks":
            return int(parts[2])
        return self.depth if parts[1] == "norm" else -1


def _adopt_position_table(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    adopt_position_table(module.net, state.get(f"{prefix}net.pos_embed"))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- blocks of both families
# timm's `Block` (DINOv2) and `EvaBlock` (DINOv3, tiny) name their parts differently; these functions hide that.


def _run_checkpointed(run: Callable[..., Any], *inputs: Any) -> Any:
    """Call `run(*inputs)`; its activations are recomputed in the backward pass instead of stored."""
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=recompute_contexts)


def _run_block(block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
    return block(tokens) if rope is None else block(tokens, rope=rope)


def _run_block_with_kv(block: Any, tokens: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run the parts of a block to get its keys and values too: tokens [B, R + N, D], key and value [B, H, R + N,
    E]."""
    normed = block.norm1(tokens)
    weight, bias = _qkv(block.attn)
    query, key, value = _split_heads(functional.linear(normed, weight, bias), block.attn.num_heads, 3)
    if rope is not None:
        query, key = (_apply_rope(block, part, rope, prefix).type_as(value) for part in (query, key))
    mixed = functional.scaled_dot_product_attention(query, key, value)
    return _finish_block(block, tokens, mixed), key, value


def _keys_and_values(block: Any, tokens: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens unchanged, and the block's keys and values of them."""
    width = tokens.shape[-1]
    weight, bias = _qkv(block.attn)
    projected = functional.linear(block.norm1(tokens), weight[width:], None if bias is None else bias[width:])
    key, value = _split_heads(projected, block.attn.num_heads, 2)
    if rope is not None:
        key = _apply_rope(block, key, rope, prefix).type_as(value)
    return tokens, key, value


def _apply_rope(block: Any, part: Tensor, rope: Tensor, prefix: int) -> Tensor:
    """Queries or keys [B, H, R + N, E] with the rotary embedding on the patches."""
    rotated = apply_rot_embed_cat(part[:, :, prefix:], rope, half=block.attn.rotate_half)
    return torch.cat([part[:, :, :prefix], rotated], dim=2)


def _query_block(block: Any, tokens: Tensor, kv: BlockKV) -> Tensor:
    """Pass queries [B, Q, D] through a block; they attend only to its keys and values [B, H, R + N, E]."""
    mixed = functional.scaled_dot_product_attention(_project_queries(block, tokens), kv.key, kv.value)
    return _finish_block(block, tokens, mixed)


def _query_block_with_attention(block: Any, tokens: Tensor, kv: BlockKV) -> tuple[Tensor, Tensor]:
    """As `_query_block`; also return the attention [B, H, Q, R + N]."""
    query = _project_queries(block, tokens)
    weights = (query @ kv.key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return _finish_block(block, tokens, weights @ kv.value), weights


def _project_queries(block: Any, tokens: Tensor) -> Tensor:
    width = tokens.shape[-1]
    weight, bias = _qkv(block.attn)
    projected = functional.linear(block.norm1(tokens), weight[:width], None if bias is None else bias[:width])
    return _split_heads(projected, block.attn.num_heads, 1)[0]


def _qkv(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight [3 D, D] and bias [3 D] of the fused projection; DINOv3 stores the biases separately and has none
    on the keys."""
    bias = attention.qkv.bias
    if bias is None and getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return attention.qkv.weight, bias


def _split_heads(projected: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, L, parts * D] -> parts tensors [B, H, L, E]."""
    return projected.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _finish_block(block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
    """Output projection, LayerScale, residual and MLP: tokens [B, L, D], mixed [B, H, L, E] -> [B, L, D]."""
    eva = hasattr(block, "gamma_1")
    update = block.attn.proj_drop(block.attn.proj(block.attn.norm(mixed.transpose(1, 2).flatten(2))))
    tokens = tokens + block.drop_path1(_apply_layer_scale(update, block.gamma_1) if eva else block.ls1(update))
    update = block.mlp(block.norm2(tokens))
    return tokens + block.drop_path2(_apply_layer_scale(update, block.gamma_2) if eva else block.ls2(update))


def _apply_layer_scale(update: Tensor, gamma: Tensor | None) -> Tensor:
    return update if gamma is None else gamma * update

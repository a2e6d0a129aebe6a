"""A patch-conditioned DiT as a `DiffusionPipeline` of diffusers.

    model_index.json       names the two classes here
    transformer/           an exported keygrip folder (`keygrip.exporting.folder`): weights, configuration, statistics
    scheduler/             FlowMatchEulerDiscreteScheduler, with the shift of the model's own sampling

``keygrip export format=diffusers`` writes it. Reading it takes keygrip and diffusers (``pip install 'keygrip[dit]'``)::

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline
    image = PatchDiTPipeline.from_pretrained(FOLDER)(prompt="a red cube", image=reference).images[0]

Nothing in the folder is executed: the model is built from it under the same rules as from any checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from keygrip.artifacts import write_json
from keygrip.data.image_text.crops import Bucket, cut_out, nearest_bucket, shared_crop
from keygrip.data.image_text.decoding import upright
from keygrip.exporting.folder import model_card, read_export, write_export
from keygrip.models.nn.flow_matching import integrate, noise_levels
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.figures import as_bytes
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Velocities
from keygrip.training.checkpoints import load_module
from keygrip.training.strategies import automatic_precision

CLASS = "PatchDiTPipeline"


class PatchDiTTransformer(ModelMixin, ConfigMixin):
    """The trained module, with its frozen encoders and the statistics of its features.

    Args:
        module: as `keygrip.load` gives it. content: of the export that it was read from.

    Attributes:
        precision: in which the network computes, as `dtype` or `to` said; None: as `keygrip sample`, bfloat16 on
            a GPU that has it and float32 elsewhere.
    """

    config_name: Any = "config.json"

    def __init__(self, module: PatchDiTModule, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.content = module, dict(content)
        self.precision: torch.dtype | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,  # its name in older versions of diffusers
        **_: Any,
    ) -> Self:
        """From an exported folder. Raises FileNotFoundError, ValueError: it is none, or a byte of it has changed."""
        module = load_module(pretrained_model_name_or_path, expected=PatchDiTModule)
        assert isinstance(module, PatchDiTModule)
        found = cls(module, read_export(pretrained_model_name_or_path))
        precision = dtype or torch_dtype
        return found if precision is None else found.to(precision)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """To a device, a type, or both, as of any module; the network alone changes its type, since the statistics of
        features need float32."""
        given = [*args, kwargs.get("device"), kwargs.get("dtype")]
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        device = next((value for value in given if isinstance(value, str | int | torch.device)), None)
        if device is not None:
            self.module.to(device)
        if dtype is not None:
            self.module.network.to(dtype)
            self.precision = dtype
        return self

    def autocast(self) -> torch.autocast:
        """The context in which the network is evaluated."""
        device = self.module.device.type
        usual = torch.bfloat16 if automatic_precision(device == "cuda") == "bf16-mixed" else torch.float32
        dtype = self.precision or usual
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """As an exported folder, new or empty."""
        weights = self.module.state_dict()
        write_export(save_directory, self.content, weights, model_card(CLASS, self.content, weights, "stored", {}))


class PatchDiTPipeline(DiffusionPipeline):
    """Draws images from words, from a reference image, or from both."""

    model_cpu_offload_seq: Any = "transformer"
    transformer: Any
    scheduler: Any

    def __init__(self, transformer: PatchDiTTransformer, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        own: Any = self  # diffusers' classes are typed as bare objects
        own.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        text_scale: float | None = None,
        dino_scale: float | None = None,
        guidance: str | None = None,
        solver: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images.

        Args:
            prompt, image: one or a list; of one, as many as of the other. height, width: pixels; None: the trained size
                of the likest shape as the first image, else the most usual one.
            num_inference_steps, text_scale, dino_scale, guidance, solver: None: the model's own, see
                `keygrip.models.patch_dit.sampler.Sampling`. Steps of the solver euler are the scheduler's.
            generator, num_images_per_prompt, latents, output_type ("pil", "np" or "pt"), return_dict: as in diffusers.

        Raises:
            ValueError: neither words nor image, lists of different lengths, a size that does not divide, or a way of
                sampling that is impossible or without effect.
        """
        module: PatchDiTModule = self.transformer.module
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        images = [] if image is None else [image] if isinstance(image, Image.Image) else list(image)
        images = [upright(each) for each in images]
        count = max(len(prompts), len(images))
        if not count:
            raise ValueError("nothing to draw: give prompt, image, or both")
        if any(len(given) not in (0, 1, count) for given in (prompts, images)):
            raise ValueError(f"{len(prompts)} prompts and {len(images)} images: give as many of each, or one")
        prompts = prompts * count if len(prompts) == 1 else prompts
        images = images * count if len(images) == 1 else images
        encoders = module.ready_encoders()
        bucket = self._bucket(module, images[0] if images else None, height, width)
        changes = {"steps": num_inference_steps, "guidance": guidance, "solver": solver}
        sampling = module.sampling_with({**changes, "text_scale": text_scale, "dino_scale": dino_scale})
        if sampling.solver != "euler" and not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"solver={sampling.solver} takes steps of its own, and none of {type(self.scheduler).__name__}: give "
                "solver='euler', or leave the pipeline the scheduler that it came with"
            )
        conditions = self._conditions(module, prompts, images, bucket).interleaved(num_images_per_prompt)
        total, stride = count * num_images_per_prompt, encoders.latent_stride
        shape = (total, module.network.latent_channels, bucket.height // stride, bucket.width // stride)
        device = module.device
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()
        if tuple(x.shape) != shape:
            raise ValueError(f"latents of {list(x.shape)} where {list(shape)} are drawn")
        # Two shifts are one by their product: the scheduler has that of its own configuration, these the resolution's.
        levels = noise_levels(sampling.steps, module.shift_of(x))[:-1]
        self.scheduler.set_timesteps(sigmas=levels, device=device)
        module.eval()
        velocities = Velocities(module.network, conditions, total, bucket.width / bucket.height)
        sigmas, own = self.scheduler.sigmas.tolist(), cast(Any, self)

        def velocity_at(x: Tensor, level: float) -> Tensor:
            found = velocities(x, level, sampling.branches(conditions, level))
            return sampling.combine(found, x, level, conditions)

        with self.transformer.autocast():
            if sampling.solver == "euler":
                for time, level in zip(own.progress_bar(self.scheduler.timesteps), sigmas, strict=False):
                    x = self.scheduler.step(velocity_at(x, level), time, x, return_dict=False)[0]
            else:
                with own.progress_bar(total=sampling.steps) as bar:
                    x = integrate(velocity_at, x, sigmas, sampling.solver, lambda *_: bar.update())
            drawn = encoders.decode_latents(module.statistics.restored(x)).cpu()
        shown: Any = drawn
        if output_type == "pil":
            shown = [Image.fromarray(frame) for frame in as_bytes(drawn)]
        elif output_type == "np":
            shown = drawn.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=shown) if return_dict else (shown,)

    @staticmethod
    def _bucket(module: PatchDiTModule, image: Image.Image | None, height: int | None, width: int | None) -> Bucket:
        stride = module.encoders.latent_stride
        if height is not None or width is not None:
            bucket = Bucket(width or height or 0, height or width or 0)
            step = stride * module.network.patch_size
            if bucket.width % step or bucket.height % step:
                raise ValueError(
                    f"height={bucket.height}, width={bucket.width}: both must be multiples of {step} pixels"
                )
            return bucket
        trained = [Bucket(w * stride, h * stride) for h, w in module.statistics.latent_sizes]
        return trained[0] if image is None else nearest_bucket(*image.size, trained)

    @staticmethod
    def _conditions(
        module: PatchDiTModule, prompts: Sequence[str], images: Sequence[Image.Image], bucket: Bucket
    ) -> Conditions:
        encoders, statistics = module.encoders, module.statistics
        states = mask = cls = patches = None
        if prompts:
            states, mask = encoders.encode_text(prompts)
        if images:
            size = encoders.view_size(bucket.width, bucket.height)
            views = np.stack([cut_out(image, shared_crop(*image.size, bucket), size) for image in images])
            raw_cls, raw_patches = encoders.encode_view(torch.from_numpy(views).permute(0, 3, 1, 2).contiguous())
            cls, patches = statistics.normalised("cls", raw_cls), statistics.normalised("patch", raw_patches)
        grid = encoders.dino_grid(bucket.width, bucket.height)
        return Conditions(states, mask, cls, patches, grid).to(module.device)


def write_pipeline(
    folder: Path, module: Any, content: Mapping[str, Any], weights: Mapping[str, Tensor], card: str
) -> None:
    """The files of a pipeline, into a folder that is there. Raises ValueError: no image model."""
    if not isinstance(module, PatchDiTModule):
        raise ValueError(f"{type(module).__name__} is no image model: give format=safetensors")
    write_export(folder / "transformer", content, weights, card)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=module.sampling.timestep_shift)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": CLASS,
        "transformer": [PatchDiTTransformer.__module__, PatchDiTTransformer.__name__],
        "scheduler": ["diffusers", FlowMatchEulerDiscreteScheduler.__name__],
    }
    write_json(folder / "model_index.json", index)

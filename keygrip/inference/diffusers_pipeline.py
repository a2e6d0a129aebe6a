"""A patch-conditioned DiT as a `DiffusionPipeline` of diffusers.

    model_index.json       names the two classes of this module, and pipeline.py for diffusers' own DiffusionPipeline
    pipeline.py            imports the class of this module, nothing else
    transformer/           an exported keygrip folder (`keygrip.exporting.folder`): weights, configuration, statistics
    scheduler/             FlowMatchEulerDiscreteScheduler, with the shift of the model's own sampling

``keygrip export format=diffusers`` writes it. To read it, install keygrip and diffusers (``pip install
'keygrip[dit]'``)::

    from keygrip.inference.diffusers_pipeline import PatchDiTPipeline
    image = PatchDiTPipeline.from_pretrained(FOLDER)(prompt="a red cube", image=reference).images[0]

If the folder does not hold the encoders (``encoders=flux_t5_dinov3``), the caller gives their files, because the folder
is not trusted to choose which files are read or downloaded::

    files = {"encoders.autoencoder.source": PATH, "encoders.text.source": PATH, "encoders.view.weights_path": FILE}
    PatchDiTPipeline.from_pretrained(FOLDER, external=files)

``"encoders.view.download": True`` instead of a file allows DINO's weights to be downloaded. Neither is needed if an
earlier download has cached them. Nothing in the folder is executed: the model is built from it under the same rules as
from any checkpoint. diffusers finds the class itself with ``DiffusionPipeline.from_pretrained(FOLDER,
trust_remote_code=True)``, which executes the folder's ``pipeline.py``. Without this option it refuses, as for every
pipeline class that is not its own.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self, cast

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from keygrip.artifacts import atomic_write, write_json
from keygrip.exporting.folder import model_card, read_export, write_export
from keygrip.inference.schedulers import OWN_SCHEDULER, set_levels, take_step
from keygrip.inference.steered_images import SteeredImages, bucket_of
from keygrip.models.nn.flow_matching import integrate
from keygrip.models.patch_dit.figures import as_bytes
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import NOT_FINITE, Velocities
from keygrip.training.checkpoints import load_module
from keygrip.training.parts import UntrustedPartError
from keygrip.training.strategies import automatic_autocast

CLASS = "PatchDiTPipeline"
OUTPUTS = ("pil", "np", "pt", "latent")
STUB = "pipeline"  # the file in the folder that diffusers' own DiffusionPipeline executes if the caller allows it
STUB_TEXT = f'''"""keygrip's class, for diffusers' DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)."""

from {__name__} import {CLASS}

__all__ = ["{CLASS}"]
'''
# Keywords that diffusers passes to every model of a pipeline: how weights are loaded, which keygrip does in one way.
# Keywords that name other files are not listed, because the folder does not hold those: variant and use_flashpack.
LOADING = ("offload_folder", "offload_state_dict", "low_cpu_mem_usage", "use_safetensors", "disable_mmap")
ONE_DEVICE = "the pipeline keeps its weights on one device"
# Keywords for fetching a model from the hub, without effect on a local folder.
FETCHING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# The caller's options for the transformer: diffusers passes no keyword on to the models that it loads.
_named: ContextVar[Mapping[str, Any] | None] = ContextVar("named", default=None)
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class PatchDiTTransformer(ModelMixin, ConfigMixin):
    """The trained module, with its frozen encoders and the statistics of its features.

    Args:
        module: returned by `keygrip.load`. content: of the export that the module was read from.

    Attributes:
        precision: dtype of the network's computations, set by `dtype` or `to`. None: as in `keygrip sample`, bfloat16
            on a GPU that supports it and float32 elsewhere.
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
        external: Mapping[str, Any] | None = None,
        trust: Sequence[str] = (),
        device_map: Any = None,
        max_memory: Any = None,
        **others: Any,
    ) -> Self:
        """Load an exported folder.

        Args:
            external, trust: as in `keygrip.load`. device_map: the device of the weights; None: the CPU. max_memory:
                refused, as it is for a model on several devices. others: what diffusers passes to every model; see
                `LOADING` and `FETCHING`.

        Raises:
            FileNotFoundError, ValueError: It is not an export, a byte of it has changed, it needs files that were not
                given, images cannot be generated in this dtype, it would be on several devices, or a keyword has no
                effect.
        """
        device = _one_device(device_map, max_memory)
        idle = sorted(name for name, value in others.items() if value and name not in LOADING + FETCHING)
        if idle:
            raise ValueError(f"{', '.join(idle)}: no effect on {cls.__name__}.from_pretrained, leave it out")
        load_options = {"external": external, "trust": trust} if external or trust else _named.get() or {}
        try:
            module = load_module(pretrained_model_name_or_path, device, PatchDiTModule, **load_options)
        except UntrustedPartError as error:
            raise UntrustedPartError(
                f"{error} ({CLASS}.from_pretrained of {__name__} takes external and trust; diffusers' own "
                "DiffusionPipeline takes neither)"
            ) from error
        assert isinstance(module, PatchDiTModule)
        transformer = cls(module, read_export(pretrained_model_name_or_path))
        precision = dtype or torch_dtype
        if precision not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={precision}: the pipeline computes in float32, bfloat16 or float16")
        return transformer if precision is None else transformer.to(precision)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, a dtype, or both, as in any module. Only the network changes its dtype: the statistics of
        features need float32."""
        given = [*args, kwargs.get("device"), kwargs.get("dtype")]
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        device = next((value for value in given if isinstance(value, str | int | torch.device)), None)
        if device is not None:
            self.module.to(device)
        if dtype is not None:
            self.module.network.to(dtype)
            if self.module.guide is not None:
                self.module.guide.network.to(dtype)
            self.precision = dtype
        return self

    def half(self) -> Self:
        """Convert the network to float16 with `to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Convert the network to bfloat16 with `to`."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """Convert the network to float32 with `to`."""
        return self.to(torch.float32)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Move to a GPU with `to`."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Self:
        """Move to the CPU with `to`."""
        return self.to("cpu")

    def autocast(self) -> torch.autocast:
        """Return the context in which the network is evaluated."""
        device, dtype = self.module.device, self.precision
        if dtype is None:
            return automatic_autocast(device)
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write an export to a new or empty folder. Raises FileExistsError if the folder holds something."""
        weights = self.module.state_dict()
        write_export(save_directory, self.content, weights, model_card(CLASS, self.content, weights, "stored", {}))


class PatchDiTPipeline(DiffusionPipeline):
    """Generate images from text, from a reference image, or from both."""

    transformer: Any
    scheduler: Any

    def __init__(self, transformer: PatchDiTTransformer, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        own: Any = self  # diffusers' classes are typed as bare objects
        own.register_modules(transformer=transformer, scheduler=scheduler)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        external: Mapping[str, Any] | None = None,
        trust: Sequence[str] = (),
        **kwargs: Any,
    ) -> Self:
        """Load a folder written by ``keygrip export format=diffusers``.

        Args:
            external: files that the model needs and the folder does not hold, by dotted setting
                ("encoders.text.source"), and whether DINO's weights may be downloaded ("encoders.view.download").
            trust: as in `keygrip.load`. kwargs: as in diffusers.

        Raises:
            FileNotFoundError, ValueError: as in `PatchDiTTransformer.from_pretrained`, or files are given together with
                a transformer.
        """
        if kwargs.get("device_map") == "balanced":  # diffusers resolves it before the model is loaded
            _one_device("balanced", None)
        if (external or trust) and kwargs.get("transformer") is not None:
            raise ValueError("external and trust have no effect on a transformer that is given: leave them out")
        parent: Any = super()
        token = _named.set({"external": external, "trust": trust})
        try:
            pipeline: Self = parent.from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            _named.reset(token)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load the configuration as diffusers does, but with this class instead of the folder's `pipeline.py`.

        Raises:
            ValueError: The folder names parts that this pipeline does not have; diffusers would import their modules.
        """
        parent: Any = super()
        loaded = parent.load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        _refuse_other_parts(config)
        if isinstance(config.get("_class_name"), list | tuple):
            config["_class_name"] = CLASS
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a new or empty folder that diffusers' own `DiffusionPipeline` can read too."""
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **kwargs)
        _name_class(Path(save_directory))

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Raise ValueError: diffusers' offload hooks do not cover the calls that generate an image."""
        raise ValueError(f"{ONE_DEVICE}: give pipeline.to('cuda')")

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

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
        *,
        full_scale: float | None = None,
        cls_scale: float | None = None,
        guide_scale: float | None = None,
        text_rescale: float | None = None,
        dino_rescale: float | None = None,
        full_rescale: float | None = None,
        interval: tuple[float, float] | None = None,
        image_mask: Image.Image | Sequence[Image.Image] | None = None,
        blend: bool = False,
        start_image: Image.Image | None = None,
        strength: float | None = None,
        redraw: Image.Image | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_scale: None = None,
        negative_prompt: None = None,
    ) -> Any:
        """Generate images.

        Args:
            prompt, image: one or a list; two lists have equal lengths. height, width: pixels; None: the trained size
                closest in aspect ratio to the start image or else the first image; without images the most common.
            num_inference_steps, text_scale, dino_scale, guidance, solver, full_scale, cls_scale, guide_scale,
                text_rescale, dino_rescale, full_rescale, interval: None: the model's own, see
                `keygrip.models.patch_dit.sampler.Sampling`. The solver euler takes the scheduler's steps.
            generator, num_images_per_prompt, latents, return_dict: as in diffusers.
            output_type: "pil", "np", "pt", or "latent" for latents in the format of `latents`, not decoded.
            image_mask, blend, start_image, strength, redraw: see
                `keygrip.inference.steered_images.SteeredImages`.
            callback_on_step_end: as in diffusers: called with the pipeline, the step number from 0, its timestep
                and ``{"latents": ...}``. Latents that it returns replace the current ones, with the solver euler only.
            callback_on_step_end_tensor_inputs: only "latents" exist.
            guidance_scale, negative_prompt: of other pipelines; refused with a message that names the option to use.

        Raises:
            ValueError: Neither text nor image is given, lists have different lengths, a size is not divisible, an image
                has several frames, or a sampling option is impossible or without effect.
        """
        module: PatchDiTModule = self.transformer.module
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUTS)}")
        if guidance_scale is not None:
            raise ValueError(
                f"guidance_scale={guidance_scale!r}: words and the reference image have a scale each: give text_scale "
                "and dino_scale (see Sampling for full_scale and guidance)"
            )
        if negative_prompt is not None:
            raise ValueError(
                "negative_prompt: the model is guided away from no words, which it was trained on, not from others: "
                "leave it out; text_scale says how far"
            )
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: must be a whole number, at least 1")
        if list(callback_on_step_end_tensor_inputs) != ["latents"]:
            raise ValueError(f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs}: ['latents']")
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(f"latents are a tensor, not {type(latents).__name__}")
        options = {
            **{"steps": num_inference_steps, "guidance": guidance, "solver": solver, "interval": interval},
            **{"text_scale": text_scale, "dino_scale": dino_scale, "full_scale": full_scale, "cls_scale": cls_scale},
            **{"guide_scale": guide_scale},
            **{"text_rescale": text_rescale, "dino_rescale": dino_rescale, "full_rescale": full_rescale},
        }
        for name, value in options.items():
            kind = int if name == "steps" else float if name.endswith("scale") else None
            _refuse_type("num_inference_steps" if name == "steps" else name, value, kind)
        sampling = module.sampling_with(options)
        if sampling.solver != "euler" and not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"solver={sampling.solver} takes steps of its own, and none of {type(self.scheduler).__name__}: give "
                f"solver='euler', or {OWN_SCHEDULER}"
            )
        if sampling.solver != "euler" and self.scheduler.config.get("stochastic_sampling"):
            raise ValueError(
                f"solver={sampling.solver} takes steps of its own, without the noise of stochastic_sampling=True: give "
                f"solver='euler', or {OWN_SCHEDULER}"
            )
        if redraw is not None and output_type == "latent":
            raise ValueError("redraw keeps pixels, and output_type='latent' gives none: choose another output_type")
        steered = SteeredImages(module, prompt, image, image_mask, blend, start_image, strength, redraw)
        steered.refuse_idle({name for name, value in options.items() if value is not None}, sampling)
        bucket = bucket_of(module, steered.shown, height, width)
        encoders, device = module.ready_encoders(), module.device
        conditions = steered.conditions(bucket).interleaved(num_images_per_prompt)
        total, stride = steered.count * num_images_per_prompt, encoders.latent_stride
        generator = list(generator) if isinstance(generator, tuple) else generator
        for each in generator if isinstance(generator, list) else [generator]:
            if not isinstance(each, torch.Generator | None):
                raise ValueError(
                    f"generator={each!r}: give a torch.Generator, such as torch.Generator().manual_seed(0), or a list"
                )
        if isinstance(generator, list) and len(generator) != total:
            raise ValueError(f"{len(generator)} generators for {total} images: give one, or one for each image")
        shape = (total, module.network.latent_channels, bucket.height // stride, bucket.width // stride)
        noise = (
            randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device).float()
        )
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents of {list(noise.shape)} where {list(shape)} are drawn")
        start = steered.start(bucket, total)
        x, mask_and_latents, times = noise, None, 1.0
        if start is not None:
            times = start.edit.strength
            x = (1 - times) * start.edit.latents + times * noise
            mask_and_latents = None if start.edit.mask is None else (start.edit.mask, start.edit.latents)
        student = module.few_steps is not None
        set_levels(self.scheduler, sampling, module.shift_of(noise), times, device, student)
        module.eval()
        aspect = bucket.width / bucket.height
        velocities = Velocities(module.network, conditions, total, aspect, guide=module.guide_network)
        sigmas, pipeline = self.scheduler.sigmas.tolist(), cast(Any, self)

        def velocity_at(x: Tensor, level: float) -> Tensor:
            branch_velocities = velocities(x, level, sampling.branches(conditions, level))
            guided = sampling.combine(branch_velocities, x, level, conditions)
            if mask_and_latents is None:
                return guided
            # the velocity that leads to these latents, whatever noise a scheduler has added
            mask, latents = mask_and_latents
            return mask * guided + (1 - mask) * (x - latents) / level

        def after_step(number: int, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            time = self.scheduler.timesteps[number]
            returned = callback_on_step_end(self, number, time, {"latents": x}) or {}
            if not isinstance(returned, Mapping):
                raise ValueError(f"callback_on_step_end returns a dict, not {type(returned).__name__}")
            new_latents: Tensor = returned.get("latents", x)
            if not isinstance(new_latents, Tensor) or new_latents.shape != x.shape:
                raise ValueError(f"callback_on_step_end gives latents that are no tensor of shape {list(x.shape)}")
            if new_latents is not x and sampling.solver != "euler":
                raise ValueError(
                    f"callback_on_step_end gives other latents, and solver={sampling.solver} takes steps of its own: "
                    "give solver='euler'"
                )
            return new_latents

        with self.transformer.autocast():
            if sampling.solver == "euler":
                steps = enumerate(zip(self.scheduler.timesteps, sigmas, strict=False))
                for number, (time, level) in pipeline.progress_bar(list(steps)):
                    x = take_step(self.scheduler, velocity_at(x, level), time, x, generator)
                    x = after_step(number, x)
            else:
                with pipeline.progress_bar(total=len(sigmas) - 1) as bar:

                    def on_step(done: int, x: Tensor) -> None:
                        after_step(done - 1, x)
                        bar.update()

                    x = integrate(velocity_at, x, sigmas, sampling.solver, on_step)
            samples = x if output_type == "latent" else encoders.decode_latents(module.statistics.restored(x)).cpu()
        if not bool(torch.isfinite(samples).all()):
            raise ValueError(NOT_FINITE)
        if start is not None and start.redrawn is not None:  # pixels outside the mask are those of the start image
            samples = start.redrawn * samples + (1 - start.redrawn) * start.pixels
        output: Any = samples
        if output_type == "pil":
            output = [Image.fromarray(frame) for frame in as_bytes(samples)]
        elif output_type == "np":
            output = samples.permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=output) if return_dict else (output,)


def _one_device(device_map: Any, max_memory: Any) -> torch.device:
    """Return the device that diffusers' keyword `device_map` names; None: the CPU. Raises ValueError if it names
    several devices, or no device of torch."""
    instead = f"{ONE_DEVICE}: give device_map='cuda', or pipeline.to('cuda')"
    if max_memory is not None:
        raise ValueError(f"max_memory={max_memory!r}: {instead}")
    try:
        return torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map={device_map!r}: {instead}") from error


def _refuse_type(name: str, value: Any, kind: type | None) -> None:
    """Raise ValueError if an argument is not a number, or (`kind`: int) not a whole number."""
    if value is None or kind is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        raise ValueError(f"{name}={value!r}: must be a {'whole ' if kind is int else ''}number")


def _refuse_other_parts(config: Mapping[str, Any]) -> None:
    """Raise ValueError if model_index.json names other parts than this transformer and a diffusers scheduler."""
    for name, part in config.items():
        if name.startswith("_"):
            continue
        if name == "transformer" and part == [PatchDiTTransformer.__module__, PatchDiTTransformer.__name__]:
            continue
        if name == "scheduler" and isinstance(part, list) and len(part) == 2 and part[0] == "diffusers":
            scheduler = getattr(diffusers, part[1], None) if isinstance(part[1], str) else None
            if isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin):
                continue
        raise ValueError(
            f"model_index.json names {name}={part!r:.200}, which is no part of a {CLASS} and is not loaded"
        )


def write_pipeline(
    folder: Path, module: Any, content: Mapping[str, Any], weights: Mapping[str, Tensor], card: str
) -> None:
    """Write the files of a pipeline into an existing folder. Raises ValueError if the module is not an image model."""
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
    _name_class(folder)


def _name_class(folder: Path) -> None:
    """Write the file that imports this module's class, so that diffusers' own `DiffusionPipeline` finds it."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"_class_name": [STUB, CLASS]})
    with atomic_write(folder / f"{STUB}.py") as file:
        file.write(STUB_TEXT.encode())

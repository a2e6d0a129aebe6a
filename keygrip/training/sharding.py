"""Fully sharded training: parameters, gradients and optimizer state are sharded over the processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from keygrip.training.torch_files import copied_but_large

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class ShardedStrategy(ModelParallelStrategy):
    """Shard any LightningModule; checkpoints are a single file, as without sharding.

    All parameters are gathered for each step and freed after it, while gradients, optimizer state and EMA weights are
    never gathered completely. For a module with ``sharded_parts()`` (submodules used only through their ``forward``,
    such as transformer blocks) parameters are gathered part by part, so that they are never all gathered at once.
    Every gathering waits for all processes, so each process must call the parts the same number of times.

    Paper: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (2023).
    """

    def __init__(self, process_group_backend: str | None = None, reshard_after_forward: bool = True) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        """As in the parent class, with one data-parallel group of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """As in the parent class, with `shard` instead of a module's own `configure_model`."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        shard(self.model, self.device_mesh["data_parallel"], self.reshard_after_forward)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As in the parent class, but also for a run that was not sharded.

        The parent class reads a parameter's index in the optimizer's state as its index among all parameters of the
        module, including frozen ones, as this strategy saves it. All other strategies use the index in the groups.
        """
        assert self.model is not None
        optimizers, self.optimizers = self.optimizers, []
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            self.optimizers = optimizers
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"] if optimizers else [], strict=True):
            load_optimizer(saved, optimizer, self.model)
        return copied_but_large(checkpoint)  # what a module keeps of it would keep the whole file mapped

    def _determine_device_ids(self) -> list[int]:
        return [] if self.root_device.index is None else [self.root_device.index]


def shard(module: nn.Module, mesh: Any, reshard_after_forward: bool = True) -> None:
    """Shard ``module`` in place over a one-dimensional device mesh; its step methods gather the parameters they need.

    Args:
        reshard_after_forward: whether parts free gathered parameters between their forward and backward passes.
    """
    for part in getattr(module, "sharded_parts", list)():
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=mesh)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def load_optimizer(saved: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> None:
    """Load an optimizer's complete stored state, which every process has, into that of a sharded module.

    Parameters without stored state, because they had no gradient yet, also have no state afterwards: torch would reject
    them, or count the step of zeros with which it creates their moments.

    Args:
        saved: see `named_state`.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    named = named_state(saved, optimizer, module)
    set_optimizer_state_dict(module, optimizer, optim_state_dict=named, options=options)
    for name, parameter in module.named_parameters():
        if name not in named["state"]:
            optimizer.state.pop(parameter, None)


def named_state(saved: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return an optimizer's stored state with parameter names instead of indices.

    Args:
        saved: its groups have the same parameters as those of ``optimizer``, in the same order, with any indices.
        module: the module with the parameters' names.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    present = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    name_of = dict(zip(indices, present, strict=True))
    return {
        "state": {name_of[index]: state for index, state in saved["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[index] for index in group["params"]]} for group in saved["param_groups"]
        ],
    }


def reshard(module: nn.Module) -> None:
    """Free parameters that a step or a validation left gathered; the optimizer trains the sharded parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor (a view of it); any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_like(whole: Tensor, model: Tensor) -> Tensor:
    """Return the shard of a complete tensor that corresponds to the shard of ``model``, on its device."""
    whole = whole.to(model.device)
    if not isinstance(model, DTensor):
        return whole.clone()
    return distribute_tensor(whole, model.device_mesh, model.placements).to_local().clone()


def is_sharded(module: LightningModule) -> bool:
    """Return whether the module's parameters are sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())

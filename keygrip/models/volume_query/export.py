"""The volume-query network as a graph of plain tensors, for torch.export and ONNX.

Outputs, leading shape [B, A, T]: pixel logits [P, P], height logits [Z], gripper logits, rotation logits and, where the
coupling is bilinear, pixel factors [r, P, P] and height factors [r, Z] (without leading shape). The exact decoding of
the volume from them is :mod:`keygrip.models.volume_query.volume`'s. With `step_features` the graph reads gripper and
rotation around the most probable voxel of a step, whatever decoder its reader uses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.exporting.graphs import ExportGraph
from keygrip.models.volume_query.network import STATE_PARTS, VolumeQueryNetwork
from keygrip.models.volume_query.volume import BilinearCoupling


class VolumeQueryGraph(nn.Module):
    """Image, start pixels and (where the network reads them) the arms' state and instruction tokens in; logits out."""

    def __init__(self, network: VolumeQueryNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, image: Tensor, start_pixel: Tensor, state: Tensor | None = None, instruction: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if instruction is None and not self.network.state_parts:
            state, instruction = None, state  # inputs come by place, without those that the network does not read
        output = self.network(image, start_pixel, state, instruction=instruction)
        volume = output.volume
        logits = (volume.pixel, volume.height, output.gripper, output.rotation)
        if not isinstance(volume.voxel, BilinearCoupling):
            return logits
        return (*logits, volume.voxel.pixel_factor, volume.voxel.height_factor)


def volume_query_graph(network: VolumeQueryNetwork) -> ExportGraph:
    """What to export of a network: a normalised image [B, 3, S, S], start pixels [B, A, 2], state [B, A, n], tokens."""
    if network.world_views:
        raise ValueError("a network of several cameras (model.network.world_views=true) has no exported graph yet")
    if network.second_look is not None:
        raise ValueError("a network with a second look (model.network.second_look) has no exported graph yet")
    generator = torch.Generator().manual_seed(0)
    size, arms = network.image_size, len(network.arms)
    inputs = {
        "image": torch.randn(2, 3, size, size, generator=generator),
        "start_pixel": torch.rand(2, arms, 2, generator=generator) * size,
    }
    if network.state_parts:
        width = sum(STATE_PARTS[part] for part in network.state_parts)
        inputs["state"] = torch.rand(2, arms, width, generator=generator)
    if network.instruction_encoder is not None:
        inputs["instruction"] = network.instruction_encoder.tokens(["open the drawer", "push the red cube away"])
    outputs: tuple[str, ...] = ("pixel_logits", "height_logits", "gripper_logits", "rotation_logits")
    if network.coupling_z is not None:
        outputs = (*outputs, "pixel_factor", "height_factor")
    return ExportGraph(VolumeQueryGraph(network).eval(), inputs, outputs)

"""The volume-query network as a graph of plain tensors, for torch.export and ONNX.

Outputs, leading shape [B, A, T]: pixel logits [P, P], height logits [Z], gripper logits, rotation logits and, where the
coupling is bilinear, pixel factors [r, P, P] and height factors [r, Z] (without leading shape). The module
:mod:`keygrip.models.volume_query.volume` decodes the volume from them exactly. With `step_features` the graph reads
gripper and rotation around the most probable voxel of a step, whichever decoder is then applied to its outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.exporting.graphs import ExportGraph
from keygrip.models.volume_query.network import STATE_PARTS, VolumeQueryNetwork
from keygrip.models.volume_query.volume import BilinearCoupling


class VolumeQueryGraph(nn.Module):
    """Compute logits from image, start pixels and, if the network reads them, arm states and instruction tokens."""

    def __init__(self, network: VolumeQueryNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, image: Tensor, start_pixel: Tensor, state: Tensor | None = None, instruction: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if instruction is None and not self.network.state_parts:
            state, instruction = None, state  # inputs are positional, without those that the network does not read
        output = self.network(image, start_pixel, state, instruction=instruction)
        volume = output.volume
        logits = (volume.pixel, volume.height, output.gripper, output.rotation)
        if not isinstance(volume.voxel, BilinearCoupling):
            return logits
        return (*logits, volume.voxel.pixel_factor, volume.voxel.height_factor)


def volume_query_graph(network: VolumeQueryNetwork) -> ExportGraph:
    """Build the export graph of a network.

    Its inputs are a normalised image [B, 3, S, S], start pixels [B, A, 2], state [B, A, n] and tokens.
    """
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

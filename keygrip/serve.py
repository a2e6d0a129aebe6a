"""Serves a policy to robots on other machines: ``python -m keygrip.serve checkpoint=RUN_FOLDER``.

Prints one line of JSON on standard output when it is ready: its address and the model. It ends on SIGTERM or Ctrl-C,
after the plans that it has begun, with exit code 0.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig

from keygrip.command import entry_point
from keygrip.config import EntrySchema, register

if TYPE_CHECKING:
    from keygrip.runtime.server import PolicyServer

log = logging.getLogger(__name__)


@dataclass
class ServeSchema(EntrySchema):
    """Root of ``conf/serve.yaml``."""

    checkpoint: str = MISSING
    checkpoint_step: int | None = None
    trust: Any = ()
    external: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8421
    device: str | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    limits: Any = MISSING


register("serve_schema", ServeSchema)


def run(cfg: DictConfig, ready: Callable[[dict[str, Any]], None] = lambda about: None) -> None:
    """Serves until the process is told to stop; ``ready`` is called with address and model when it listens.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one of a model that drives no robot. OSError: the address
            cannot be had.
    """
    from keygrip.evaluation.closed_loop import changed
    from keygrip.evaluation.kinds import plain
    from keygrip.training.checkpoints import external_files, find_checkpoint, load_module

    try:
        from keygrip.runtime.server import PolicyServer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs {error.name}: pip install 'keygrip[serve]'") from error
    import torch
    from hydra.utils import instantiate

    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    file = find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    module: Any = load_module(file, map_location=device, trust=tuple(cfg.trust), external=external_files(cfg))
    if not hasattr(module, "policy"):
        raise ValueError(f"{file} holds a {type(module).__name__}, which drives no robot: nothing to serve")
    policy = changed(module.policy(), plain(cfg.policy) or {})
    about = {"model": type(module).__name__, "checkpoint": str(Path(file).resolve()), "device": device}
    server = PolicyServer(policy, policy.needs, about, instantiate(cfg.limits))
    if _reachable_from_elsewhere(cfg.host):
        log.warning(
            "listening at %s: whoever reaches this machine there can use the policy; an SSH tunnel to 127.0.0.1 keeps "
            "it to those who may log in",
            cfg.host,
        )
    asyncio.run(_serve(server, cfg.host, cfg.port, lambda url: ready({"url": url, **about})))
    log.info("stopped")


async def _serve(server: PolicyServer, host: str, port: int, ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.serve(host, port, stop, ready)


def _reachable_from_elsewhere(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def print_address(cfg: DictConfig) -> None:
    """Serves, and prints the address as one line of JSON when there is one."""
    run(cfg, lambda about: print(json.dumps(about), flush=True))


def main() -> None:
    """Command line."""
    entry_point("serve", print_address)


if __name__ == "__main__":
    main()

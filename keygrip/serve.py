"""Serve a policy to robots on other machines: ``python -m keygrip.serve checkpoint=RUN_FOLDER``.

Uses HTTP and openpi's websocket protocol at one address. When ready, it prints one line of JSON on standard output with
its address and the model. On SIGTERM or Ctrl-C it finishes the plans in progress and ends with exit code 0.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from keygrip.command import entry_point
from keygrip.config import EntrySchema, register
from keygrip.evaluation.kinds import plain
from keygrip.setting_types import refuse_ill_typed, refuse_left_out
from keygrip.training.strategies import use_tf32

if TYPE_CHECKING:
    from keygrip.runtime.server import PolicyServer
    from keygrip.runtime.service import Limits

log = logging.getLogger(__name__)


SHORTEST_TOKEN = 16  # characters
LAST_PORT = 65535
GPU_BATCH = 8  # for limits.batch=null; 1 on a CPU, where a batch is hardly faster and rounds differently


@dataclass
class TlsSchema:
    """``tls``: files in PEM format."""

    cert: str | None = None
    key: str | None = None


@dataclass
class ServeSchema(EntrySchema):
    """Root of ``conf/serve.yaml``."""

    checkpoint: str = MISSING
    checkpoint_step: int | None = None
    trust: Any = ()
    external: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8421
    token: str | None = None
    tls: TlsSchema = field(default_factory=TlsSchema)
    insecure: bool = False
    device: str | None = None
    tf32: bool = False
    policy: dict[str, Any] = field(default_factory=dict)
    limits: Any = MISSING
    bounds: Any = MISSING


register("serve_schema", ServeSchema)


def run(cfg: DictConfig, ready: Callable[[dict[str, Any]], None] = lambda about: None) -> None:
    """Serve until a signal stops the process; ``ready`` is called with address and model when the server listens.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or a model that is not a robot policy; an address that other
            machines can reach without a token. OSError: the address is not available. RuntimeError: the policy was
            stuck more often than `limits.replacements`.
    """
    refuse_left_out(cfg, "limits", "bounds")
    refuse_ill_typed(OmegaConf.to_container(cfg, resolve=True))
    if not 0 <= cfg.port <= LAST_PORT:
        raise ValueError(f"port={cfg.port}: must lie in 0 to {LAST_PORT}; 0 takes a free one")
    _refuse_openness(cfg)
    tls = tls_context(cfg.tls.cert, cfg.tls.key)
    from keygrip.evaluation.trained_policy import default_device, load_policy
    from keygrip.training.checkpoints import external_files, find_checkpoint, trusted_packages

    try:
        from keygrip.runtime.server import PolicyServer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs {error.name}: pip install 'keygrip[serve]'") from error
    device = cfg.device or default_device()
    use_tf32(cfg.tf32, device.startswith("cuda"))
    file = find_checkpoint(cfg.checkpoint, cfg.checkpoint_step)
    limits, bounds = _with_batch(instantiate(cfg.limits), device), instantiate(cfg.bounds)

    def load() -> Any:
        return load_policy(file, plain(cfg.policy) or {}, device, trusted_packages(cfg), external_files(cfg))

    policy = load()
    model = type(policy.module).__name__ if hasattr(policy, "module") else type(policy).__name__
    about = {"model": model, "checkpoint": str(Path(file).resolve()), "device": device}
    server = PolicyServer(policy, policy.needs, about, limits, bounds, make=load, token=cfg.token, tls=tls)
    asyncio.run(_serve(server, cfg.host, cfg.port, lambda url: ready({"url": url, **about})))
    log.info("stopped")


def _with_batch(limits: Limits, device: str) -> Limits:
    """Return the limits with a number of plans per batch: the given one, else the default of the device, on a GPU at
    most `waiting`."""
    if limits.batch is not None:
        return limits
    return replace(limits, batch=min(GPU_BATCH, limits.waiting) if device.startswith("cuda") else 1)


def tls_context(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return the TLS context for a certificate and its key in PEM files; None if neither is given.

    Raises:
        ValueError: only one of the two is given, or a file has the wrong content. FileNotFoundError: no such file.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ValueError("tls.cert and tls.key are given together: the certificate and its private key, PEM files")
    for name, file in (("cert", cert), ("key", key)):
        if not Path(file).is_file():
            raise FileNotFoundError(f"tls.{name}={file}: there is no such file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_refuse_encrypted_key)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"tls.cert={cert} and tls.key={key} are not a certificate and its unencrypted private key in PEM format "
            f"({error})"
        ) from error
    return context


def _refuse_encrypted_key() -> str:
    raise ValueError("the key is encrypted")


def _refuse_openness(cfg: DictConfig) -> None:
    """Raise ValueError if other machines could use the policy without a token, unless this is allowed."""
    if cfg.token is not None and (len(cfg.token) < SHORTEST_TOKEN or not cfg.token.isascii() or " " in cfg.token):
        raise ValueError(
            f"token must have at least {SHORTEST_TOKEN} ASCII characters and no spaces; one is printed by "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    if not _reachable_from_elsewhere(cfg.host):
        return
    if cfg.token is None and not cfg.insecure:
        raise ValueError(
            f"host={cfg.host} can be reached from other machines, and whoever reaches it could use the policy: set "
            "token=... (and tls.cert=... tls.key=...), or insecure=true on a network that you trust, or keep "
            "host=127.0.0.1 and use an SSH tunnel"
        )
    if cfg.token is None:
        log.warning("listening at %s without a token: whoever reaches this machine there can use the policy", cfg.host)
    elif cfg.tls.cert is None:
        log.warning("listening at %s without TLS: the token and images cross the network in clear", cfg.host)


async def _serve(server: PolicyServer, host: str, port: int, ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.serve(host, port, stop, ready)


def _reachable_from_elsewhere(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def print_address(cfg: DictConfig) -> None:
    """Serve, and print the address as one line of JSON when the server is ready."""
    run(cfg, lambda about: print(json.dumps(about), flush=True))


def main() -> None:
    """Command line."""
    entry_point("serve", print_address)


if __name__ == "__main__":
    main()

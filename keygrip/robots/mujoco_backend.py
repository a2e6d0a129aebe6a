"""Import MuJoCo with a backend that can render off screen. Every module of keygrip imports `mujoco` from here.

MuJoCo reads `MUJOCO_GL` while it is imported, once per process, and its own error message names no missing library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
from pathlib import Path

INSTALL_ADVICE = (
    "off-screen rendering needs a GL library: install EGL (`apt-get install libegl1 libgl1`) "
    "or OSMesa (`apt-get install libosmesa6`), or set MUJOCO_GL to the backend that this machine has"
)
EGL_PLATFORM_DEVICE = 0x313F


class RenderingUnavailableError(RuntimeError):
    """No GL backend can render off screen on this machine."""


def _load_library(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def egl_works() -> bool:
    """Return whether EGL is installed with a device that initialises (a library without a driver does not count)."""
    egl = _load_library("libEGL.so.1", "libEGL.so")
    if egl is None or _load_library("libGL.so.1", "libOpenGL.so.0", "libGL.so") is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query_address)
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_address)
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    if not query(16, devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for device in list(devices)[: count.value]:
        display = get_display(EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def osmesa_works() -> bool:
    """Return whether the software renderer OSMesa is installed."""
    return _load_library("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so") is not None


def choose_backend() -> str:
    """Return the value for `MUJOCO_GL`: the user's own, else egl, else osmesa, else "disable" (physics only).

    Raises:
        RenderingUnavailableError: The user requested egl or osmesa and it does not work on this machine.
    """
    requested = os.environ.get("MUJOCO_GL", "").strip().lower()
    probes = {"egl": egl_works, "osmesa": osmesa_works}
    if requested in probes and not probes[requested]():
        raise RenderingUnavailableError(f"MUJOCO_GL={requested} is set but does not work here; {INSTALL_ADVICE}")
    if requested:
        return requested
    if not sys.platform.startswith("linux"):
        return ""  # macOS and Windows have one backend each, which MuJoCo finds itself
    return next((name for name, works in probes.items() if works()), "disable")


def load_compiler_first() -> None:
    """Load triton's library, if it is installed, before Mesa is used.

    Mesa's software renderer and triton, which torch imports indirectly for `lightning`, each contain an LLVM. In this
    order both work; a process that renders first ends with a segmentation fault when triton is loaded.
    """
    if "triton" in sys.modules:
        return
    package = importlib.util.find_spec("triton")
    library = Path(package.origin or "").parent / "_C" / "libtriton.so" if package else None
    if library is not None and library.is_file():
        ctypes.CDLL(str(library))


load_compiler_first()
logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it logs at every start which accelerator is missing
if "mujoco" not in sys.modules and (_backend := choose_backend()):
    os.environ["MUJOCO_GL"] = _backend

import mujoco as mujoco  # noqa: E402  (the backend must be chosen first)

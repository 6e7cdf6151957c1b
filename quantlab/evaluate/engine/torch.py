"""PyTorch on graphics cards: detection of usable cards, and the choice of precision.

torch is imported only where it is used: the base install does without, and importing it takes seconds. What computes
is in the folder `card`.
"""

import ctypes
import platform
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from quantlab.evaluate.engine import Choice, Engine
from quantlab.files.bundled import how_to_install
from quantlab.transform.plan import parse_bytes

OLDEST = (2, 9)  # torch's version, as in pyproject.toml
INSTALL = f"Run: {how_to_install('gpu')}"


class TorchEngine(Engine):
    """The engine that finds a card; `card.engine.CardEngine` computes."""

    modes, devices = ("float", "half"), ("cuda", "mps", "cpu-torch")

    @classmethod
    def automatic(cls) -> str | None:
        """Return this machine's card that torch can use (None: no card)."""
        device = "mps" if sys.platform == "darwin" else "cuda"
        is_likely = platform.machine() == "arm64" if device == "mps" else _has_driver()
        if not is_likely or find_spec("torch") is None or _torch_version() < OLDEST:
            return None
        return device if _missing(device) is None else None

    @classmethod
    def choose(cls, mode: str, device: str, device_memory: str | int | None) -> Choice:
        """Return the choice for `mode` on `device`; see `Engine.choose`."""
        if find_spec("torch") is None:
            raise ImportError(f"device={device}: needs the package torch. {INSTALL}")
        if _torch_version() < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ImportError(f"device={device}: torch={version('torch')}, must be at least {oldest}. {INSTALL}")
        if device == "cpu-torch" and device_memory is not None:
            raise ValueError(
                f"device_memory={device_memory}, is for graphics cards, but the device is {device}. "
                f"Give memory instead."
            )
        if device_memory is not None:
            parse_bytes(device_memory, "device_memory")
        if (reason := _missing(device)) is not None:
            raise OSError(f"device={device}: {reason}")
        engine = import_module("quantlab.evaluate.engine.card.engine")  # imports torch
        try:
            precision = engine.precision(mode, device)
        except RuntimeError as error:  # a card with too little memory left
            reason = str(error).splitlines()[0]
            raise OSError(f"device={device}: {reason} Check with nvidia-smi, or use device=cpu.") from None
        options = {"device": device, "precision": precision, "device_memory": device_memory}
        versions = {"torch": version("torch")}
        return Choice(engine.CardEngine, mode, device, precision, engine.hardware(device), options, versions)


def _torch_version() -> tuple[int, int]:
    """Return major and minor version of the installed torch."""
    major, minor, *_ = version("torch").split(".")
    return int(major), int(minor)


def _has_driver() -> bool:
    """Tell whether NVIDIA's or AMD's driver is installed, without importing torch."""
    for name in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libamdhip64.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _missing(device: str) -> str | None:
    """Explain why torch cannot use `device`, with a remedy (None: it can)."""
    torch = import_module("torch")
    if device == "mps" and not torch.backends.mps.is_available():
        return "torch finds no Apple GPU. Use device=cpu."
    if device != "cuda":
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch={version('torch')} is built only for the CPU. Install torch for your card, see pytorch.org."
    with warnings.catch_warnings(record=True) as said:  # torch warns of a driver that is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            try:
                return None if torch.zeros(1, device="cuda").add_(1).item() else "does not compute."
            except RuntimeError as error:  # a card that is full, or too old for this torch
                return f"{str(error).splitlines()[0]} Check with nvidia-smi, or use device=cpu."
    reasons = [str(warning.message).splitlines()[0].split(" (Triggered")[0] for warning in said]
    return f"{reasons[0] if reasons else 'no card with a working driver'}. Check with nvidia-smi, or use device=cpu."

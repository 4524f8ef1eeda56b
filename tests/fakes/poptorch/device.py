"""The IPUs of the machine: their number, and the executables that hold them."""

from __future__ import annotations

import os
import weakref
from typing import Any, Mapping

from .errors import compiler_error
from .inspection import config

#: Limit per process.
MAX_IPUS = 64

_ALWAYS, _NEVER = 0, 2

# Weak references: an executable that is deleted has released its IPUs.
_holders: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def release_all() -> None:
    _holders.clear()


def is_model(options: Mapping[str, Any]) -> bool:
    """Return whether the IPU Model computes; the option overrides the environment."""
    if "use_model" in options:
        return bool(options["use_model"])
    return os.environ.get("POPTORCH_IPU_MODEL", "0") not in ("", "0")


def number_of_ipus(used: int, options: Mapping[str, Any]) -> int:
    """Return the number of IPUs that an executable for `used` IPUs reserves, replicas included."""
    _check_count(used)
    if is_model(options):
        if options["connection_type"] == _NEVER:
            raise compiler_error(
                "ConnectionType.Never / poptorch.Options.useOfflineIpuTarget not supported for "
                "the IPU model"
            )
        _check_cycles(options)
        return used
    if options["connection_type"] == _NEVER:
        if "ipu_id" in options:
            raise compiler_error("Offline compilation targeting a specific id not supported")
        _check_cycles(options)
        return used
    rounded = 1 << (used - 1).bit_length()
    if rounded != used and not options["auto_round_num_ipus"]:
        raise compiler_error(
            f"The model specifies the use of {used} IPUs, however PopTorch must reserve a minimum "
            f"of {rounded} in order to allow the model to run, because PopTorch must reserve a "
            "power of 2 or maximum of 64 IPUs per process. Please reconfigure your model to use a "
            "different number of IPUs or set poptorch.Options().autoRoundNumIPUs(True)."
        )
    _check_count(rounded)
    return rounded


def _check_count(count: int) -> None:
    if count > MAX_IPUS:
        raise compiler_error(
            f"Too many IPUs requested ({count}). Experiments that need more than 64 IPUs require "
            "distributed execution."
        )


def _check_cycles(options: Mapping[str, Any]) -> None:
    if options.get("instrumentWithHardwareCycleCounter"):
        raise compiler_error(
            "poptorch.Options().logCycleCount is only supported on actual IPU hardware"
        )


def acquire(executable: Any, count: int, options: Mapping[str, Any]) -> None:
    """Reserve `count` IPUs for `executable`; an IPU belongs to one executable at a time."""
    if is_model(options):
        _holders[executable] = 0
        return
    present = config().available_ipus if config().hardware_version else 0
    if sum(_holders.values()) + count > present:
        raise compiler_error(f"Failed to acquire {count} IPU(s)")
    _holders[executable] = count


def check_present(count: int, options: Mapping[str, Any]) -> None:
    """Raise if fewer than `count` IPUs exist, reserved or not (ConnectionType.OnDemand)."""
    present = config().available_ipus if config().hardware_version else 0
    if not is_model(options) and count > present:
        raise compiler_error(f"Failed to acquire {count} IPU(s)")


def release(executable: Any) -> None:
    _holders.pop(executable, None)


def holds(executable: Any) -> bool:
    return executable in _holders


def hardware_version(count: int = 1) -> int:
    """Return the version of the hardware, or 0 if there are fewer than `num_ipus` IPUs."""
    return config().hardware_version if count <= config().available_ipus else 0

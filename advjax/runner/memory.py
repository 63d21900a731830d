"""How many images a device has room for."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jaxtyping import Float, PyTree

from advjax import jaxprs
from advjax.attacks import Attack
from advjax.runner.lanes import step

_CPU_BYTES = 4 << 20  # for the lanes' states: about the size of a core's cache
_MEMORY_FRACTION = 1 / 2  # of an accelerator's memory
_COPIES = 14  # image-sized vectors in a lane: the history of 4 pairs, and 6 more
_BATCH_SIZES = (8, 512)  # the fewest and the most lanes by default


def default_batch_size(
    attack: Attack,
    state: PyTree[jax.ShapeDtypeStruct],
    x: Float[np.ndarray, "1 *shape"],
    device: jax.Device,
) -> int:
    """Choose the number of lanes on a device, by a CPU's cache or an accelerator's memory.

    Args:
        attack: The attack.
        state: The shapes of one lane's state.
        x: An image.
        device: One of the devices.

    Returns:
        The number of lanes.
    """
    # The memory of a plain function does not show in its state: assume that of a flat attack.
    lane_bytes = max(_bytes(jax.tree.leaves(state)), _COPIES * x.nbytes)
    budget = _CPU_BYTES
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        budget = int(_MEMORY_FRACTION * stats.get("bytes_limit", 8 << 30))
        lane_bytes += peak_bytes(step.trace(attack, state).jaxpr.jaxpr)
    return int(np.clip(budget // lane_bytes, *_BATCH_SIZES))


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Estimate a program's peak memory beside its arguments, as if no operations were fused."""
    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _used(eqn)}
    kept = {*jaxpr.invars, *jaxpr.constvars, *_variables(jaxpr.outvars)}
    held = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        held += _bytes(v.aval for v in eqn.outvars)
        peak = max(peak, held + max(map(peak_bytes, jaxprs.inner(eqn)), default=0))
        held -= _bytes(v.aval for v in _used(eqn) - kept if last_use[v] == i)
    return peak


def _used(eqn: core.JaxprEqn) -> set[core.Var]:
    return _variables([*eqn.invars, *eqn.outvars])


def _variables(atoms: Iterable[core.Var | core.Literal]) -> set[core.Var]:
    return {atom for atom in atoms if isinstance(atom, core.Var)}


def _bytes(shapes: Iterable[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes if hasattr(x, "dtype"))

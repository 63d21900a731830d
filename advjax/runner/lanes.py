"""The engine: a fixed number of images at a time, each replaced by the next one when it is done.

A lane is the state of one image's attack. One program of fixed shapes steps the lanes of all
devices together. After each turn the finished lanes are read and given to new images (continuous
batching), so that slow images do not stall the batch. Only these lanes are transferred between host
and devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from advjax import checks
from advjax.attacks import Attack, AttackResult
from advjax.functions import Function
from advjax.types import Box

AXIS = "images"  # the one axis of the mesh
TURNOVER = 6  # a turn ends when a sixth of the lanes have finished: a twelfth idle on average


class Arrivals(NamedTuple):
    """New images for lanes; the leading axis has equally many places for each device."""

    lanes: Int[np.ndarray, " n"]
    """The number of the lane on its device; one past the last lane if the place is empty."""
    xs: Float[np.ndarray, "n *shape"]
    targets: Int[np.ndarray, " n"]


class Departures(NamedTuple):
    """Finished images; the leading axis has equally many places for each device."""

    lanes: Int[Array, " n"]
    finished: Bool[Array, " n"]
    """Whether this place holds a result."""
    results: AttackResult


def attack_in_lanes(
    attack: Attack,
    xs: Float[np.ndarray, "n *shape"],
    targets: Int[np.ndarray, " n"],
    queue: Int[np.ndarray, " m"],
    *,
    mesh: Mesh,
    batch_size: int,
) -> Iterator[tuple[Int[np.ndarray, " k"], AttackResult]]:
    """Attack the images in the queue, and yield results as they finish.

    Args:
        attack: The attack.
        xs: All images.
        targets: The class for each.
        queue: The indices in `xs` of the images to attack.
        mesh: The devices of this process, along `AXIS`.
        batch_size: Number of lanes on each device.

    Yields:
        The indices of images that have finished, and their results along a leading axis.
    """
    if not len(queue):
        return
    places = -(-batch_size // TURNOVER)
    image_in = np.full((mesh.size, batch_size), -1)  # the index of each lane's image, or -1

    def admit() -> Arrivals:
        """Assign the next images to vacant lanes, evenly over the devices."""
        nonlocal queue
        vacant = image_in < 0
        place = np.cumsum(vacant, axis=1) - 1
        device, lane = np.nonzero(vacant & (place < places))
        order = np.argsort(place[device, lane], kind="stable")[: len(queue)]
        device, lane = device[order], lane[order]
        images, queue = np.split(queue, [len(order)])
        place = place[device, lane]
        image_in[device, lane] = images

        at = np.full((mesh.size, places), batch_size, np.int32)
        new_xs = np.zeros((*at.shape, *xs.shape[1:]), xs.dtype)
        new_targets = np.zeros(at.shape, np.int32)
        at[device, place], new_xs[device, place] = lane, xs[images]
        new_targets[device, place] = targets[images]
        flat = (array.reshape(-1, *array.shape[2:]) for array in (at, new_xs, new_targets))
        return Arrivals(*flat)

    def dismiss(departures: Departures) -> tuple[np.ndarray, AttackResult]:
        """Vacate the lanes of finished images; return the images' indices and results."""
        lane, finished, results = jax.device_get(departures)
        device = np.flatnonzero(finished) // places
        images = image_in[device, lane[finished]]
        image_in[device, lane[finished]] = -1
        return images, jax.tree.map(lambda leaf: leaf[finished], results)

    first = queue[0]
    lanes = _start(attack, xs[first], targets[first], mesh=mesh, batch_size=batch_size)
    finished: tuple[np.ndarray, AttackResult] | None = None
    while len(queue) or np.any(image_in >= 0):
        arrivals = admit()
        filling = len(queue) > 0 and np.any(image_in < 0)
        occupied = (image_in >= 0).ravel()
        wanted = np.int32(0 if filling else places)
        lanes, departures = _turn(attack, lanes, occupied, arrivals, wanted, mesh=mesh)
        if finished is not None and len(finished[0]):
            yield finished  # while the devices are at work
        finished = dismiss(departures)
    if finished is not None:
        yield finished


@jax.jit
def lane(
    attack: Attack, x: Float[Array, "*shape"], target: Int[Array, ""]
) -> tuple[PyTree[Array], AttackResult]:
    """One lane before its first step, and its result; jitted, as that caches its shapes."""
    state = attack.init(x, target)
    return state, attack.result(state)


@jax.jit
def step(attack: Attack, state: PyTree[Array]) -> PyTree[Array]:
    """One step of a lane; jitted, as that caches the trace from which its memory is estimated."""
    return attack.step(state)


@functools.partial(jax.jit, static_argnames=("mesh", "batch_size"))
def _start(
    attack: Attack,
    x: Float[Array, "*shape"],
    target: Int[Array, ""],
    *,
    mesh: Mesh,
    batch_size: int,
) -> PyTree[Array]:
    """The lanes before the first turn, all of the first image, so that their states are valid."""
    state = attack.init(x, target)
    split = NamedSharding(mesh, PartitionSpec(AXIS))

    def spread(leaf: Array) -> Array:
        lanes = jnp.broadcast_to(leaf, (batch_size * mesh.size, *leaf.shape))
        return jax.lax.with_sharding_constraint(lanes, split)

    return jax.tree.map(spread, state)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="lanes")
def _turn(
    attack: Attack,
    lanes: PyTree[Array],
    occupied: Bool[Array, " lanes"],
    arrivals: Arrivals,
    wanted: Int[Array, ""],
    *,
    mesh: Mesh,
) -> tuple[PyTree[Array], Departures]:
    """Admit new images, step until `wanted` lanes of each device have finished, and read these.

    Other lanes that have finished are read at the next turn. A device with fewer than `wanted`
    lanes occupied steps until all of them have finished.
    """

    def on_one_device(
        attack: Attack,
        lanes: PyTree[Array],
        occupied: Bool[Array, " lanes"],
        arrivals: Arrivals,
        wanted: Int[Array, ""],
    ) -> tuple[PyTree[Array], Departures]:
        new = jax.vmap(attack.init)(jnp.asarray(arrivals.xs), jnp.asarray(arrivals.targets))
        lanes = jax.tree.map(
            lambda old, some: old.at[arrivals.lanes].set(some, mode="drop"), lanes, new
        )

        def finished(lanes: PyTree[Array]) -> Bool[Array, " lanes"]:
            return occupied & jax.vmap(attack.done)(lanes)

        enough = jnp.minimum(wanted, jnp.sum(occupied))
        lanes = jax.lax.while_loop(
            lambda lanes: jnp.sum(finished(lanes)) < enough, jax.vmap(attack.step), lanes
        )
        done = finished(lanes)
        first = jnp.argsort(~done, stable=True)[: len(arrivals.lanes)].astype(jnp.int32)
        results = jax.vmap(attack.result)(jax.tree.map(lambda leaf: leaf[first], lanes))
        return lanes, Departures(first, done[first], results)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(whole, split, split, split, whole),
        out_specs=(split, split),
        check_vma=False,  # the devices' loops run independently of each other
    )(attack, lanes, occupied, arrivals, wanted)


def as_attack(attack: Attack | Callable[..., AttackResult]) -> Attack:
    """Return an attack unchanged, and wrap any other function of image and class as one step."""
    if isinstance(attack, Attack):
        return attack
    checks.model("attack", attack)
    return Attack(_no_model, Box(), _Whole(Function(attack)))


def hoist(attack: Attack, x: jax.ShapeDtypeStruct) -> Attack:
    """Return the attack on images like `x`, with all arrays that it closes over as leaves."""
    if not isinstance(attack.method, _Whole):
        return attack.hoist(x)
    target = jax.ShapeDtypeStruct((), jnp.int32)
    return dataclasses.replace(attack, method=_Whole(attack.method.fn.hoist(x, target)))


def _no_model(x: Float[Array, "*shape"]) -> Float[Array, " classes"]:
    raise AssertionError("a function of image and class has its model inside")


class _WholeState(NamedTuple):
    x: Float[Array, "*shape"]
    target: Int[Array, ""]
    result: AttackResult
    done: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Whole:
    """The method of a function `(x, target) -> AttackResult`: a single step."""

    fn: Function

    def init(
        self, attack: Attack, x: Float[Array, "*shape"], target: Int[Array, ""]
    ) -> _WholeState:
        shapes = jax.eval_shape(self.fn, x, target)
        result = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return _WholeState(x, target, result, jnp.bool_(False))

    def step(self, attack: Attack, state: _WholeState) -> _WholeState:
        new = self.fn(state.x, state.target)
        result = jax.tree.map(lambda a, b: jnp.where(state.done, a, b), state.result, new)
        # The step changes its input: XLA would move an attack whose input never changes out of the
        # loop, and run it at every turn. From the adversarial image a further step is quick.
        return _WholeState(new.x_adv, state.target, result, jnp.bool_(True))

    def done(self, attack: Attack, state: _WholeState) -> Bool[Array, ""]:
        return state.done

    def result(self, attack: Attack, state: _WholeState) -> AttackResult:
        return state.result

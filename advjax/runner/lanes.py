"""The engine: a fixed number of images at a time, each replaced by the next one when it is done.

A lane is the state of one image's attack. One program of fixed shapes steps the lanes of all
devices together. After each turn the finished lanes are read and given to new images (continuous
batching), so that slow images do not stall the batch. Only the lanes that change hands travel
between host and devices.
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
TURNOVER = 6  # a turn waits for one lane in so many; half as many are idle on average


class Arrivals(NamedTuple):
    """New images for lanes; along the leading axis as many for each device."""

    lanes: Int[np.ndarray, " n"]
    """The number of the lane on its device; one past the last for a place left empty."""
    xs: Float[np.ndarray, "n *shape"]
    targets: Int[np.ndarray, " n"]


class Departures(NamedTuple):
    """What a turn finished; along the leading axis as many for each device."""

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
    """Attack the images in the queue, in whatever order they come to an end.

    Args:
        attack: The attack.
        xs: All images.
        targets: A class for each.
        queue: Which to attack: indices into `xs`.
        mesh: The devices of this process, along `AXIS`; they share the queue.
        batch_size: The lanes on each device.

    Yields:
        The indices of images that are finished, and their results along a leading axis.
    """
    if not len(queue):
        return
    places = -(-batch_size // TURNOVER)
    image_in = np.full((mesh.size, batch_size), -1)  # lane: the image's index, or -1

    def admit() -> Arrivals:
        """The next images, as evenly over the devices as they go."""
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
    """One lane before its first step, and its result; jitted, so that its shapes are kept."""
    state = attack.init(x, target)
    return state, attack.result(state)


@jax.jit
def step(attack: Attack, state: PyTree[Array]) -> PyTree[Array]:
    """One step of a lane; jitted, so that it is traced once for what it would hold in memory."""
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
    """Lanes before the first turn, all of the same image: no state is made of nothing."""
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
    """Take new images in, step until `wanted` lanes of each device are finished, and read those.

    What else is finished is read the next time. A device that has fewer lanes occupied than are
    wanted steps until all of them are finished.
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
    """Return an attack as it is, and any other function of image and class as one of one step."""
    if isinstance(attack, Attack):
        return attack
    checks.model("attack", attack)
    return Attack(_no_model, Box(), _Whole(Function(attack)))


def hoist(attack: Attack, x: jax.ShapeDtypeStruct) -> Attack:
    """Return the attack on images like `x`, with every array that it closes over as a leaf."""
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
    """The method of a function `(x, target) -> AttackResult`: one step, which is all of it."""

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
        # The image changes, as XLA would take the attack out of a loop in which nothing does, and
        # run it at every turn; and to one that takes no time if the lane is stepped again.
        return _WholeState(new.x_adv, state.target, result, jnp.bool_(True))

    def done(self, attack: Attack, state: _WholeState) -> Bool[Array, ""]:
        return state.done

    def result(self, attack: Attack, state: _WholeState) -> AttackResult:
        return state.result

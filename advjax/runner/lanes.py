"""The engine: a fixed number of images at a time, each replaced by the next one when it is done.

A lane is the state of one image's attack. All lanes of all devices are stepped together, by a
program of fixed shapes; after each turn the finished ones are read and their lanes given to new
images (continuous batching), so that a slow image holds up nobody. A turn's traffic with the host
is that of the lanes that change hands.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from advjax import attacks
from advjax.attacks import AttackResult, Machine

AXIS = "images"  # the one axis of the mesh
TURNOVER = 6  # a turn waits for one lane in so many; half as many are idle on average

_ARRAY = object()  # stands where an array was

_MACHINES: dict[Callable, Callable[..., Machine]] = {
    attacks.lbfgs: attacks.lbfgs_machine,
    attacks.minimum_norm: attacks.minimum_norm_machine,
}


class Program(NamedTuple):
    """An attack in two parts, such that another net of the same shape needs no compilation."""

    static: Any
    """What the compiled program depends on: functions, options, the structure."""
    arrays: Sequence[Array | np.ndarray]
    """What it takes as arguments: parameters, array-valued bounds."""

    @classmethod
    def of(cls, attack: Callable[..., AttackResult] | Machine) -> "Program":
        """Takes the arrays out of an attack; `functools.partial` is looked into."""
        leaves, structure = jax.tree.flatten(_as_pytree(attack))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        rest = [_ARRAY if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves]
        return cls((structure, tuple(rest)), arrays)

    def machine(self) -> Machine:
        """The flat machine of the attack, or one whose only step is the whole attack."""
        structure, rest = self.static
        arrays = iter(self.arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in rest]
        attack = jax.tree.unflatten(structure, leaves)
        if isinstance(attack, Machine):
            return attack
        if isinstance(attack, functools.partial) and attack.func in _MACHINES:
            return _MACHINES[attack.func](*attack.args, **attack.keywords)
        return _single_step(attack)


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
    program: Program,
    xs: Float[np.ndarray, "n *shape"],
    targets: Int[np.ndarray, " n"],
    queue: Int[np.ndarray, " m"],
    *,
    devices: Sequence[jax.Device],
    batch_size: int,
) -> Iterator[tuple[Int[np.ndarray, " k"], AttackResult]]:
    """Attack the images in the queue, in whatever order they come to an end.

    Args:
        program: The attack.
        xs: All images.
        targets: A class for each.
        queue: Which to attack: indices into `xs`.
        devices: Of this process; they share the queue.
        batch_size: The lanes on each device.

    Yields:
        The indices of images that are finished, and their results along a leading axis.
    """
    if not len(queue):
        return
    mesh = Mesh(np.asarray(devices), (AXIS,))
    static = program.static
    arrays = jax.device_put(program.arrays, NamedSharding(mesh, PartitionSpec()))
    places = -(-batch_size // TURNOVER)
    image_in = np.full((len(devices), batch_size), -1)  # lane: the image's index, or -1

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

        at = np.full((len(devices), places), batch_size, np.int32)
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
    lanes = _start(static, arrays, xs[first], targets[first], mesh=mesh, batch_size=batch_size)
    finished: tuple[np.ndarray, AttackResult] | None = None
    while len(queue) or np.any(image_in >= 0):
        arrivals = admit()
        filling = len(queue) > 0 and np.any(image_in < 0)
        occupied = (image_in >= 0).ravel()
        wanted = np.int32(0 if filling else places)
        lanes, departures = _turn(static, arrays, lanes, occupied, arrivals, wanted, mesh=mesh)
        if finished is not None and len(finished[0]):
            yield finished  # while the devices are at work
        finished = dismiss(departures)
    if finished is not None:
        yield finished


@functools.partial(jax.jit, static_argnames="static")
def lane(
    static: Any,
    arrays: Sequence[Array | np.ndarray],
    x: Float[Array, "*shape"],
    target: Int[Array, ""],
) -> tuple[PyTree[Array], AttackResult]:
    """One lane before its first step, and its result; jitted, so that its shapes are kept."""
    machine = Program(static, arrays).machine()
    state = machine.init(x, target)
    return state, machine.result(state)


@functools.partial(jax.jit, static_argnames="static")
def step(static: Any, arrays: Sequence[Array | np.ndarray], state: PyTree[Array]) -> PyTree[Array]:
    """One step of a lane; jitted, so that it is traced once for what it would hold in memory."""
    return Program(static, arrays).machine().step(state)


@functools.partial(jax.jit, static_argnames=("static", "mesh", "batch_size"))
def _start(
    static: Any,
    arrays: Sequence[Array | np.ndarray],
    x: Float[Array, "*shape"],
    target: Int[Array, ""],
    *,
    mesh: Mesh,
    batch_size: int,
) -> PyTree[Array]:
    """Lanes before the first turn, all of the same image: no state is made of nothing."""
    state = Program(static, arrays).machine().init(x, target)
    split = NamedSharding(mesh, PartitionSpec(AXIS))

    def spread(leaf):
        lanes = jnp.broadcast_to(leaf, (batch_size * mesh.size, *leaf.shape))
        return jax.lax.with_sharding_constraint(lanes, split)

    return jax.tree.map(spread, state)


@functools.partial(jax.jit, static_argnames=("static", "mesh"), donate_argnames="lanes")
def _turn(
    static: Any,
    arrays: Sequence[Array | np.ndarray],
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

    def on_one_device(arrays, lanes, occupied, arrivals, wanted):
        machine = Program(static, arrays).machine()
        new = jax.vmap(machine.init)(arrivals.xs, arrivals.targets)
        lanes = jax.tree.map(
            lambda old, some: old.at[arrivals.lanes].set(some, mode="drop"), lanes, new
        )

        def finished(lanes):
            return occupied & jax.vmap(machine.done)(lanes)

        enough = jnp.minimum(wanted, jnp.sum(occupied))
        lanes = jax.lax.while_loop(
            lambda lanes: jnp.sum(finished(lanes)) < enough, jax.vmap(machine.step), lanes
        )
        done = finished(lanes)
        first = jnp.argsort(~done, stable=True)[: len(arrivals.lanes)].astype(jnp.int32)
        results = jax.vmap(machine.result)(jax.tree.map(lambda leaf: leaf[first], lanes))
        return lanes, Departures(first, done[first], results)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(whole, split, split, split, whole),
        out_specs=(split, split),
        check_vma=False,  # the devices' loops run independently of each other
    )(arrays, lanes, occupied, arrivals, wanted)


def _as_pytree(attack: Any) -> Any:
    if not isinstance(attack, functools.partial):
        return attack
    return jax.tree_util.Partial(
        attack.func,
        *map(_as_pytree, attack.args),
        **{name: _as_pytree(value) for name, value in attack.keywords.items()},
    )


class _Whole(NamedTuple):
    x: Float[Array, "*shape"]
    target: Int[Array, ""]
    result: AttackResult
    done: Bool[Array, ""]


def _single_step(attack: Callable[..., AttackResult]) -> Machine:
    def init(x, target):
        shapes = jax.eval_shape(attack, x, target)
        result = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return _Whole(x, target, result, jnp.bool_(False))

    def step(state: _Whole):
        new = attack(state.x, state.target)
        result = jax.tree.map(lambda a, b: jnp.where(state.done, a, b), state.result, new)
        # The image changes, as XLA would take the attack out of a loop in which nothing does, and
        # run it at every turn; and to one that takes no time if the lane is stepped again.
        return _Whole(new.x_adv, state.target, result, jnp.bool_(True))

    return Machine(init, step, lambda state: state.done, lambda state: state.result)

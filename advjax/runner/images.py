"""The entry point: attack any number of images."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from advjax import checks, sharding
from advjax.attacks import Attack, AttackResult
from advjax.progress import bar
from advjax.runner.checkpoint import Checkpoint, fingerprint
from advjax.runner.lanes import AXIS, as_attack, attack_in_lanes, hoist, lane
from advjax.runner.memory import default_batch_size
from advjax.types import Box

_GATHER_BYTES = 64 << 20  # of results that processes exchange at a time
_CHECK_BYTES = 64 << 20  # of images that are compared with the box at a time


def attack_images(
    attack: Attack | Callable[..., AttackResult],
    xs: Float[ArrayLike, "n *shape"],
    targets: Int[ArrayLike, " n"],
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    directory: str | os.PathLike | None = None,
    progress: bool | str = False,
) -> AttackResult:
    """Attack any number of images, on every device there is.

    One program of fixed shapes attacks a batch at a time, and an image that is finished makes room
    for the next one (continuous batching), so that slow images do not stall the batch. The result
    for an image does not depend on the batch size, the devices or its place, except for the
    rounding of matrix products.

    Args:
        attack: An `Attack`, as `attacks.minimum_norm(logits_fn)` returns; or any function
            `(x, target) -> AttackResult` that can be jitted, which runs in plain batches. The
            model's parameters are arguments of the compiled program: a second model of the same
            shapes does not compile again.
        xs: The images, `(n, *shape)`, in memory or a `np.memmap`; one batch at a time is on the
            devices.
        targets: The class to reach for each image, `(n,)` (for `attacks.untargeted` the label to
            leave).
        batch_size: Number of images that each device attacks at a time. By default, between 8 and
            512: as many as keep the attack's state in a CPU's cache, or state and gradients in half
            of an accelerator's memory.
        mesh: The devices, with all axes taken as one; by default all devices. With several
            processes (`jax.distributed`) each calls this with the same arguments, attacks an equal
            part of the images on its own devices, and gets all the results.
        directory: A directory for finished images. A run that was killed at any moment resumes from
            there when it is called again, and loses one second's work at most; the batch size and
            the devices may change. Several processes use the same directory.
        progress: Whether to show a progress bar (needs tqdm); a string is its title.

    Returns:
        An `AttackResult` of NumPy arrays with a leading axis n, in the order of `xs`.

    Raises:
        TypeError: If `xs` is not floating, `targets` are not integers, or `mesh` is not a mesh.
        ValueError: If `xs` and `targets` differ in length, an image is outside the box,
            `batch_size` is not a positive integer, `mesh` has no device of this process, or
            `directory` holds another run; the message lists the differences.
        OSError: If `directory` cannot be written. A later call resumes from what was written.
    """
    xs, targets = _examples(xs, targets)
    devices = _local_devices(mesh)
    if isinstance(attack, Attack):
        _check_inside(xs, attack.box)
    own = np.arange(len(xs))[jax.process_index() :: jax.process_count()]
    example = jax.ShapeDtypeStruct(xs.shape[1:], jax.dtypes.canonicalize_dtype(xs.dtype))
    lanes_mesh = Mesh(np.asarray(devices), (AXIS,))

    with contextlib.ExitStack() as stack:
        # The lanes have their own mesh; in the caller's, the axes may be explicit.
        stack.enter_context(sharding.no_mesh())
        replicated = NamedSharding(lanes_mesh, PartitionSpec())
        # Traced without a mesh, as the program is run under another one, in `shard_map`.
        hoisted = hoist(jax.device_put(as_attack(attack), devices[0]), example)
        spread: Attack = jax.device_put(hoisted, replicated)
        state, result = lane.eval_shape(spread, example, jax.ShapeDtypeStruct((), np.int32))
        results = jax.tree.map(lambda leaf: np.zeros((len(xs), *leaf.shape), leaf.dtype), result)
        if batch_size is None:
            batch_size = default_batch_size(spread, state, xs[:1], devices[0])
        batch_size = checks.positive_int("batch_size", batch_size)
        batch_size = max(1, min(batch_size, -(-len(own) // len(devices))))

        queue, add = own, None
        if directory is not None:
            run = fingerprint(spread, xs, targets)
            checkpoint = stack.enter_context(Checkpoint(Path(directory), run))
            queue, add = np.setdiff1d(own, checkpoint.restore(results)), checkpoint.add
        shown = None
        if progress:
            title, done = progress if isinstance(progress, str) else None, len(own) - len(queue)
            shown = bar(desc=title, total=len(own), initial=done, unit="image")
            stack.enter_context(shown)
        for images, finished in attack_in_lanes(
            spread, xs, targets, queue, mesh=lanes_mesh, batch_size=batch_size
        ):
            for field, values in zip(results, finished, strict=True):
                field[images] = values
            if add is not None:
                add(images, finished)
            if shown is not None:
                shown.update(len(images))
    return _gather(results)


def _examples(xs: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    xs, targets = np.asanyarray(xs), np.asarray(targets)
    if targets.ndim != 1 or targets.shape != xs.shape[:1]:
        raise ValueError(
            f"targets: shape {targets.shape}, expected one class per image along the leading axis "
            f"of xs, whose shape is {xs.shape}."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets: dtype {targets.dtype}, expected integer class indices.")
    checks.floating("xs", xs[:0])
    return xs, targets


def _local_devices(mesh: Mesh | None) -> list[jax.Device]:
    if not isinstance(mesh, Mesh | None):
        raise TypeError(f"mesh: {mesh!r}, expected a jax.sharding.Mesh, as jax.make_mesh makes.")
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    local = [device for device in devices if device.process_index == jax.process_index()]
    if not local:
        raise ValueError(
            f"mesh: {mesh}, expected devices of every process; process {jax.process_index()} has "
            "none in it."
        )
    return local


def _check_inside(xs: np.ndarray, box: Box) -> None:
    step = max(1, _CHECK_BYTES // max(1, xs[:1].nbytes))
    for start in range(0, len(xs), step):
        checks.inside("xs", xs[start : start + step], box)


def _gather(results: AttackResult) -> AttackResult:
    """Exchange the results among the processes, each of which has filled in its own."""
    processes, n = jax.process_count(), len(results.success)
    if processes == 1:
        return results
    rows = -(-n // processes)
    step = max(1, _GATHER_BYTES // max(1, results.x_adv[:1].nbytes))
    for start in range(0, rows, step):
        row = np.arange(start, min(start + step, rows))
        mine = np.minimum(row * processes + jax.process_index(), n - 1)
        some = AttackResult(*(field[mine] for field in results))
        blocks = multihost_utils.process_allgather(some)
        for field, block in zip(results, blocks, strict=True):
            in_order = np.swapaxes(block, 0, 1).reshape(-1, *field.shape[1:])
            place = slice(start * processes, min((start + step) * processes, n))
            field[place] = in_order[: place.stop - place.start]
    return results

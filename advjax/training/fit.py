"""Training by minimising a mean loss over batches of examples."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree, Shaped

from advjax import checks, losses
from advjax.progress import bar
from advjax.training.penalties import BATCH, Penalty


class FitResult(NamedTuple):
    """Trained parameters and how the training went.

    Attributes:
        params: The parameters after the last epoch.
        losses: For each epoch the mean loss over its batches, the penalty included, each batch
            measured just before its update.
        converged: Whether the loss had stopped falling, as `tol` and `patience` define it. False
            after a loss that is not finite, which ends the training.
    """

    params: PyTree[Array]
    losses: Float[Array, " epochs"]
    converged: bool


def fit(
    apply: Callable[[PyTree[Array], Float[Array, "*shape"]], Array],
    params: PyTree[Array],
    images: Float[ArrayLike, " n *shape"],
    labels: Shaped[ArrayLike, " n ..."],
    *,
    key: Key[Array, ""],
    loss: Callable[[Array, Array], Float[Array, ""]] = losses.cross_entropy,
    penalty: Penalty | None = None,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 60,
    batch_size: int = 256,
    tol: float = 1e-4,
    patience: int = 5,
    progress: bool = False,
) -> FitResult:
    """Minimise `mean(loss(apply(params, image), label)) + penalty(params)` over the parameters.

    Each epoch goes through the images once, in a new order; the last batch is filled up from the
    epoch's first, so that no image is left out. The paper's own full-batch L-BFGS is
    `optimizer=optax.lbfgs(), batch_size=len(images)`, one step an epoch.

    Args:
        apply: The network, of the parameters and ONE image: `model.apply` of a Flax Linen module.
        params: Where to start.
        images: The training images, floating, along the leading axis.
        labels: What `loss` takes for each image: its class, for the default loss.
        key: For the order of the images.
        loss: Of one output of the network and one label. It is mapped over the axis "batch", for
            terms of a whole batch, such as `sparsity`.
        penalty: A scalar function of the parameters, such as `weight_decay(1e-4)`.
        optimizer: Any Optax optimizer. By default Adam, its learning rate falling from 5e-3 to 0
            along a cosine over all epochs.
        epochs: The most epochs to train for.
        batch_size: How many images a step takes; at most all of them.
        tol: The training has converged, and ends, when the lowest loss of the last `patience`
            epochs is not at least this share below the lowest before them.
        patience: See `tol`.
        progress: Whether to show a progress bar, which needs tqdm.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: If the images are not floating, or the labels not what the loss takes.
        ValueError: If there is not one label for each of at least one image, or `epochs`,
            `batch_size` or `patience` is not a positive integer.
        ImportError: If `progress` is asked for without tqdm.
    """
    images, labels = checks.floating("images", images), jnp.asarray(labels)
    if images.shape[:1] != labels.shape[:1] or images.size == 0:
        raise ValueError(
            f"labels: shape {labels.shape} for images of shape {images.shape}, expected one label "
            "for each of at least one image along the leading axis."
        )
    n = len(images)
    epochs = checks.positive_int("epochs", epochs)
    batch_size = min(checks.positive_int("batch_size", batch_size), n)
    patience = checks.positive_int("patience", patience)
    steps = math.ceil(n / batch_size)
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, epochs * steps))
    # Line searches, as in optax.lbfgs, ask for the objective itself; other optimizers ignore it.
    update = optax.with_extra_args_support(optimizer).update

    # The images are arguments, not constants, so that they are not compiled in. Steps are not
    # scanned: in the body of a loop XLA's gradients of convolutions are 25 times slower on a CPU
    # (jax-ml/jax#12868), and a step takes long enough to hide what starting it costs.
    @jax.jit
    def run_step(params, state, batch, images, labels):
        def objective(params):
            outputs = jax.vmap(apply, in_axes=(None, 0))(params, images[batch])
            value = jnp.mean(jax.vmap(loss, axis_name=BATCH)(outputs, labels[batch]))
            return value if penalty is None else value + penalty(params)

        value, grad = jax.value_and_grad(objective)(params)
        updates, state = update(grad, state, params, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(params, updates), state, value

    def run_epoch(params, state, key):
        # `resize` repeats the permutation from its start until the last batch is full.
        batches = jnp.resize(jax.random.permutation(key, n), (steps, batch_size))
        values = []
        for batch in np.asarray(batches):
            params, state, value = run_step(params, state, batch, images, labels)
            values.append(value)
        return params, state, np.mean(values)

    state = optimizer.init(params)
    history: list[float] = []
    converged = False
    epoch_keys: Any = jax.random.split(key, epochs)
    if progress:
        epoch_keys = bar(epoch_keys, unit="epoch")
    for epoch_key in epoch_keys:
        params, state, value = run_epoch(params, state, epoch_key)
        history.append(float(value))
        if progress:
            epoch_keys.set_postfix(loss=history[-1])
        converged = _has_converged(history, tol, patience)
        if converged or not math.isfinite(history[-1]):
            break
    return FitResult(params, jnp.asarray(history), converged)


def _has_converged(history: list[float], tol: float, patience: int) -> bool:
    if len(history) <= patience:
        return False
    before, recent = np.min(history[:-patience]), np.min(history[-patience:])
    return bool(recent > before - tol * abs(before))  # False for NaN

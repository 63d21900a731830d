"""Training by minimising a mean loss over batches of examples."""

import functools
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
from advjax.training import variables
from advjax.training.penalties import BATCH, Penalty


class AuxiliaryLoss(NamedTuple):
    """A further term of what `fit` minimises, whose state is brought up to date before each epoch.

    Attributes:
        init: `params -> state`, any pytree of arrays.
        update: `(key, params, state) -> state`, before each epoch, and not under `jax.jit`.
        loss: `(key, params, state) -> scalar`, in each step. The state is a constant to `jax.grad`.
    """

    init: Callable[[PyTree[Array]], PyTree[Array]]
    update: Callable[[Key[Array, ""], PyTree[Array], PyTree[Array]], PyTree[Array]]
    loss: Callable[[Key[Array, ""], PyTree[Array], PyTree[Array]], Float[Array, ""]]


class FitResult(NamedTuple):
    """Trained parameters and how the training went.

    Attributes:
        params: What was passed as `params`, with the trained leaves after the last epoch.
        losses: For each epoch the mean loss over its batches, the penalty and the auxiliary loss
            included, each batch measured just before its update.
        converged: Whether the loss had stopped falling, as `tol` and `patience` define it. False
            after a loss that is not finite, which ends the training.
        auxiliary: The last state of the auxiliary loss; None without one.
    """

    params: PyTree[Array]
    losses: Float[Array, " epochs"]
    converged: bool
    auxiliary: PyTree[Array] = None


def fit(
    apply: Callable[..., Array],
    params: PyTree[Array],
    images: Float[ArrayLike, " n *shape"],
    labels: Shaped[ArrayLike, " n ..."],
    *,
    key: Key[Array, ""],
    loss: Callable[[Array, Array], Float[Array, ""]] = losses.cross_entropy,
    penalty: Penalty | None = None,
    auxiliary: AuxiliaryLoss | None = None,
    stochastic: bool = False,
    mutable: bool = False,
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

    Only parameters are trained. Of the variables of a Flax Linen module these are the collection
    "params"; others, such as "batch_stats", stay as they are, unless `mutable`. Of an NNX module or
    state they are the `nnx.Param`s; of any other pytree, all its floating arrays. A network with
    batch normalization and dropout is trained with

        def apply(variables, x, key):
            return model.apply(
                variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )

        variables = training.fit(
            apply, variables, images, labels, key=key, stochastic=True, mutable=True
        ).params
        logits_fn = functools.partial(model.apply, variables, train=False)

    where `nn.BatchNorm(use_running_average=not train, axis_name="batch")` takes its statistics over
    the batch, as `apply` is mapped over that axis.

    Args:
        apply: The network, of the parameters and ONE image: `model.apply` of a Flax Linen module.
        params: Where to start, as a pytree of arrays: the variables of a Flax Linen module, or the
            first half of `eqx.partition(model, eqx.is_inexact_array)`.
        images: The training images, floating, along the leading axis.
        labels: What `loss` takes for each image: its class, for the default loss.
        key: For the order of the images.
        loss: Of one output of the network and one label. It is mapped over the axis "batch", for
            terms of a whole batch, such as `sparsity`.
        penalty: A scalar function of the parameters, such as `weight_decay(1e-4)`.
        auxiliary: A further loss, on what is not among the images: `adversarial_pools(...)`.
        stochastic: Whether `apply` takes a random key as its third argument, another one for each
            image and step: for dropout and for random augmentations of the image.
        mutable: Whether `apply` returns a pair, `(output, updates)`, as `model.apply` of Flax Linen
            does with its own `mutable`. The updates are new values of collections that are not
            trained; their means over the batch replace the old ones after each step.
        optimizer: Any Optax optimizer. It is given `params` with None in place of what is not
            trained. By default Adam, its learning rate falling from 5e-3 to 0
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
        TypeError: If the images are not floating, the labels not what the loss takes, or a leaf of
            `params` is not an array.
        ValueError: If there is not one label for each of at least one image, `params` has nothing
            to train, an update is of anything but a collection that is not trained, or `epochs`,
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

    objective = _objective(apply, loss, penalty, auxiliary, mutable)

    # The images are arguments, not constants, so that they are not compiled in. Steps are not
    # scanned: in the body of a loop XLA's gradients of convolutions are 25 times slower on a CPU
    # (jax-ml/jax#12868), and a step takes long enough to hide what starting it costs.
    @jax.jit
    def run_step(params, state, extra, key, step, batch, images, labels):
        image_key, extra_key = jax.random.split(jax.random.fold_in(key, step))
        image_keys = (jax.random.split(image_key, batch_size),) if stochastic else ()
        trained, fixed = variables.split(params)

        def mean_loss(trained):
            params = variables.join(trained, fixed)
            return objective(params, extra, extra_key, images[batch], labels[batch], *image_keys)

        (value, collections), grad = jax.value_and_grad(mean_loss, has_aux=True)(trained)
        updates, state = update(
            grad, state, trained, value=value, grad=grad, value_fn=lambda p: mean_loss(p)[0]
        )
        params = variables.join(optax.apply_updates(trained, updates), fixed)
        return variables.replace(params, collections), state, value

    def run_epoch(params, state, extra, key, noise_key):
        # `resize` repeats the permutation from its start until the last batch is full.
        batches = jnp.resize(jax.random.permutation(key, n), (steps, batch_size))
        values = []
        for step, batch in enumerate(np.asarray(batches)):
            params, state, value = run_step(
                params, state, extra, noise_key, step, batch, images, labels
            )
            values.append(value)
        return params, state, np.mean(values)

    state = optimizer.init(variables.split(params)[0])
    extra = None if auxiliary is None else auxiliary.init(params)
    history: list[float] = []
    converged = False
    order_keys = jax.random.split(key, epochs)
    noise_keys = jax.random.split(jax.random.fold_in(key, epochs), epochs)
    epoch_keys: Any = list(zip(order_keys, noise_keys, strict=True))
    if progress:
        epoch_keys = bar(epoch_keys, unit="epoch")
    for order_key, noise_key in epoch_keys:
        if auxiliary is not None:
            extra = auxiliary.update(jax.random.fold_in(noise_key, steps), params, extra)
        params, state, value = run_epoch(params, state, extra, order_key, noise_key)
        history.append(float(value))
        if progress:
            epoch_keys.set_postfix(loss=history[-1])
        converged = _has_converged(history, tol, patience)
        if converged or not math.isfinite(history[-1]):
            break
    return FitResult(params, jnp.asarray(history), converged, extra)


def _objective(
    apply: Callable[..., Any],
    loss: Callable[[Array, Array], Float[Array, ""]],
    penalty: Penalty | None,
    auxiliary: AuxiliaryLoss | None,
    mutable: bool,
) -> Callable[..., tuple[Float[Array, ""], PyTree[Array]]]:
    """What `fit` minimises: a function of parameters and a batch, with updates of collections."""

    def example_loss(params, image, label, *key):
        output = apply(params, image, *key)
        if not mutable:
            return loss(output, label), {}
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(
                f"apply: returns a {type(output).__name__}, expected a pair (output, updates); "
                "return model.apply(..., mutable=[...]), or pass mutable=False."
            )
        return loss(output[0], label), output[1]

    def objective(params, extra, extra_key, images, labels, *keys):
        example = functools.partial(example_loss, params)
        values, updates = jax.vmap(example, axis_name=BATCH)(images, labels, *keys)
        value = jnp.mean(values)
        if penalty is not None:
            value += penalty(params)
        if auxiliary is not None:
            value += auxiliary.loss(extra_key, params, extra)
        return value, updates

    return objective


def _has_converged(history: list[float], tol: float, patience: int) -> bool:
    if len(history) <= patience:
        return False
    before, recent = np.min(history[:-patience]), np.min(history[-patience:])
    return bool(recent > before - tol * abs(before))  # False for NaN

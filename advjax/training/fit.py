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
from jaxtyping import Array, Float, Int, Key, PyTree

from advjax import checks, losses
from advjax.progress import bar
from advjax.training import variables
from advjax.training.penalties import BATCH, Penalty


class AuxiliaryLoss(NamedTuple):
    """A further term of the objective of `fit`, with a state that is updated before each epoch.

    Attributes:
        init: `params -> state`, any pytree of arrays.
        update: `(key, params, state) -> state`, called before each epoch, outside `jax.jit`.
        loss: `(key, params, state) -> scalar`, called in each step. The state is a constant to
            `jax.grad`.
    """

    init: Callable[[PyTree[Array]], PyTree[Array]]
    update: Callable[[Key[Array, ""], PyTree[Array], PyTree[Array]], PyTree[Array]]
    loss: Callable[[Key[Array, ""], PyTree[Array], PyTree[Array]], Float[Array, ""]]


class FitResult(NamedTuple):
    """Trained parameters and the course of the training.

    Attributes:
        params: What was passed as `params`, with the trained leaves after the last epoch.
        losses: For each epoch the mean over its batches of the whole objective, measured on each
            batch just before its update.
        converged: Whether the loss stopped falling, as defined by `tol` and `patience`. False after
            a loss that is not finite, which ends the training.
        auxiliary: The last state of the auxiliary loss; None without one.
    """

    params: PyTree[Array]
    losses: Float[Array, " epochs"]
    converged: bool
    auxiliary: PyTree[Array] = None


def fit(
    key: Key[Array, ""],
    apply: Callable[..., Any],
    params: PyTree,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    loss: Callable[[Any, Any], Float[Array, ""]] = losses.cross_entropy,
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

    Each epoch uses every image once, in a new random order; the last batch is filled up with images
    from the first. The paper's full-batch L-BFGS is `optimizer=optax.lbfgs(),
    batch_size=len(images)`, one step per epoch.

    Only parameters are trained. In the variables of a Flax Linen module these are the collection
    "params"; other collections, such as "batch_stats", do not change, unless `mutable`. In an NNX
    module or state they are each `nnx.Param`; in any other pytree, all floating arrays. To train a
    network with batch normalization and dropout, pass

        def apply(variables, x, key):
            return model.apply(
                variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )

        result = training.fit(
            key, apply, variables, images, labels, stochastic=True, mutable=True
        )
        logits_fn = functools.partial(model.apply, result.params, train=False)

    and in the model use `nn.BatchNorm(use_running_average=not train, axis_name="batch")`: `apply`
    is mapped over an axis of that name, so that the statistics are those of the batch.

    Args:
        key: A random key, for the order of the images, for `stochastic` and for `auxiliary`.
        apply: The network, `(params, image) -> output` of ONE image: `model.apply` of a Flax Linen
            module.
        params: The initial parameters, a pytree of arrays: the variables of a Flax Linen module, or
            the first part of `eqx.partition(model, eqx.is_inexact_array)`.
        images: The training images, `(n, *shape)`, floating.
        labels: What `loss` takes for each image, `(n, ...)`: its class, for the default loss.
        loss: `(output, label) -> scalar` of ONE image. It is mapped over the axis "batch", for
            terms that depend on the whole batch, such as `sparsity`.
        penalty: A scalar function of the parameters, such as `weight_decay(1e-4)`.
        auxiliary: A further loss that does not depend on the batch, such as
            `adversarial_pools(...)`.
        stochastic: Whether `apply` takes a random key as its third argument, a new one for each
            image and step, for dropout and random augmentation.
        mutable: Whether `apply` returns a pair `(output, updates)`, as `model.apply` of a Flax
            Linen module does with its option `mutable`. The updates are new values of collections
            other than "params"; after each step their mean over the batch replaces the old values.
        optimizer: Any Optax optimizer; it sees `params` with None in place of leaves that are not
            trained. The default is Adam with a learning rate that falls from 5e-3 to 0 along a
            cosine over all epochs.
        epochs: Largest number of epochs.
        batch_size: Number of images per step; at most all of them.
        tol: The training has converged, and ends, when the lowest loss of the last `patience`
            epochs is below the lowest loss before them by less than this fraction of it.
        patience: Number of epochs for `tol`.
        progress: Whether to show a progress bar; this needs tqdm.

    Returns:
        A `FitResult`.

    Raises:
        TypeError: If the images are not floating, the labels are not what the loss takes, or a leaf
            of `params` is not an array.
        ValueError: If there are no images or not one label per image, `params` has no leaf to
            train, an update is not of a collection other than "params", or `epochs`, `batch_size`
            or `patience` is not a positive integer.
        ImportError: If `progress` is True and tqdm is not installed.
    """
    images, labels = checks.floating("images", images), jnp.asarray(labels)
    if images.shape[:1] != labels.shape[:1] or images.size == 0:
        raise ValueError(
            f"labels: shape {labels.shape} for images of shape {images.shape}, expected one label "
            "per image along the leading axis, and at least one image."
        )
    n = len(images)
    epochs = checks.positive_int("epochs", epochs)
    batch_size = min(checks.positive_int("batch_size", batch_size), n)
    patience = checks.positive_int("patience", patience)
    steps = math.ceil(n / batch_size)
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, epochs * steps))
    # Line searches, as in optax.lbfgs, need the objective itself; other optimizers ignore it.
    update = optax.with_extra_args_support(optimizer).update
    objective = _objective(apply, loss, penalty, auxiliary, mutable)

    # The images are arguments, not constants, so that they are not compiled in. Steps are not
    # scanned: in the body of a loop XLA's gradients of convolutions are 25 times slower on a CPU
    # (jax-ml/jax#12868), and a step takes long enough to hide the cost of starting it.
    @jax.jit
    def run_step(
        params: PyTree,
        state: optax.OptState,
        extra: PyTree,
        key: Key[Array, ""],
        step: ArrayLike,
        batch: Int[ArrayLike, " batch"],
        images: Float[Array, "n *shape"],
        labels: Array,
    ) -> tuple[PyTree, optax.OptState, Float[Array, ""]]:
        image_key, extra_key = jax.random.split(jax.random.fold_in(key, step))
        image_keys = (jax.random.split(image_key, batch_size),) if stochastic else ()
        trained, fixed = variables.split(params)

        def mean_loss(trained: PyTree) -> tuple[Float[Array, ""], PyTree]:
            params = variables.join(trained, fixed)
            return objective(params, extra, extra_key, images[batch], labels[batch], *image_keys)

        (value, collections), grad = jax.value_and_grad(mean_loss, has_aux=True)(trained)
        updates, state = update(
            grad, state, trained, value=value, grad=grad, value_fn=lambda p: mean_loss(p)[0]
        )
        params = variables.join(optax.apply_updates(trained, updates), fixed)
        return variables.replace(params, collections), state, value

    def run_epoch(
        params: PyTree,
        state: optax.OptState,
        extra: PyTree,
        key: Key[Array, ""],
        noise_key: Key[Array, ""],
    ) -> tuple[PyTree, optax.OptState, float]:
        # `resize` repeats the permutation from its start until the last batch is full.
        batches = jnp.resize(jax.random.permutation(key, n), (steps, batch_size))
        values = []
        for step, batch in enumerate(np.asarray(batches)):
            params, state, value = run_step(
                params, state, extra, noise_key, step, batch, images, labels
            )
            values.append(value)
        return params, state, float(np.mean(values))

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
        history.append(value)
        if progress:
            epoch_keys.set_postfix(loss=history[-1])
        converged = _has_converged(history, tol, patience)
        if converged or not math.isfinite(history[-1]):
            break
    return FitResult(params, jnp.asarray(history), converged, extra)


def _objective(
    apply: Callable[..., Any],
    loss: Callable[[Any, Any], Float[Array, ""]],
    penalty: Penalty | None,
    auxiliary: AuxiliaryLoss | None,
    mutable: bool,
) -> Callable[..., tuple[Float[Array, ""], PyTree[Array]]]:
    """The objective of `fit` on one batch, and the updates that `apply` returned for it."""

    def example_loss(
        params: PyTree, image: Array, label: Array, *key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], PyTree]:
        output = apply(params, image, *key)
        if not mutable:
            return loss(output, label), {}
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(
                f"apply: returns a {type(output).__name__}, expected a pair (output, updates); "
                "return model.apply(..., mutable=[...]), or pass mutable=False."
            )
        return loss(output[0], label), output[1]

    def objective(
        params: PyTree,
        extra: PyTree,
        extra_key: Key[Array, ""],
        images: Float[Array, "batch *shape"],
        labels: Array,
        *keys: Key[Array, " batch"],
    ) -> tuple[Float[Array, ""], PyTree]:
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

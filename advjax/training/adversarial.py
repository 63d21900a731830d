"""Adversarial training: pools of adversarial examples, mixed into the training set."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from advjax import attacks, checks, losses, metrics
from advjax.attacks import AttackResult
from advjax.training.fit import AuxiliaryLoss
from advjax.types import LogitsFn

Distort = Callable[
    [Key[Array, ""], LogitsFn, Float[Array, "*shape"], Int[Array, ""]], Float[Array, "*shape"]
]
"""`(key, logits_fn, x, label) -> x_adv`: distorts ONE example for a pool."""


class Pool(NamedTuple):
    """Distorted examples to train on. A new pool may hold clean examples.

    Attributes:
        examples: Images, or outputs of a layer.
        labels: The true class of each.
        distortion: The RMS of each example's perturbation when it was made, in the unit of the
            examples.
    """

    examples: Float[Array, "size *shape"]
    labels: Int[Array, " size"]
    distortion: Float[Array, " size"]


class Layer(NamedTuple):
    """A network cut in two at one layer: the part below it and the part above.

    Attributes:
        below: `(params, image) -> example`, the output of the layer for ONE image.
        above: `(params, example) -> logits`, the logits for ONE output of the layer.
    """

    below: Callable[[PyTree[Array], Float[Array, "*image"]], Float[Array, "*shape"]]
    above: Callable[[PyTree[Array], Float[Array, "*shape"]], Float[Array, " classes"]]


def adversarial(
    key: Key[Array, ""],
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    label: Int[Array, ""],
    *,
    attack: Callable[..., AttackResult] = attacks.lbfgs,
) -> Float[Array, "*shape"]:
    """Perturb an example until it is classified as a random other class.

    Args:
        key: A random key, for the class.
        logits_fn: The model: logits `(classes,)` of ONE example like `x`.
        x: The example.
        label: Its true class.
        attack: `(logits_fn, x, target) -> AttackResult`: `attacks.lbfgs`, `attacks.minimum_norm`,
            or one of them with options, such as `functools.partial(attacks.lbfgs, tol=0.1)`.

    Returns:
        The adversarial example, or `x` itself if none was found.

    Raises:
        TypeError: If `attack` raises it.
        ValueError: If `attack` raises it.
    """
    classes = checks.logits(logits_fn, x).shape[0]
    target = (label + jax.random.randint(key, (), 1, classes)) % classes
    result = attack(logits_fn, x, target)
    return jnp.where(result.success, result.x_adv, x)


def refresh(
    key: Key[Array, ""],
    pool: Pool,
    logits_fn: LogitsFn,
    examples: ArrayLike,
    labels: ArrayLike,
    *,
    distort: Distort = adversarial,
    batch_size: int = 100,
) -> Pool:
    """Replace a random part of a pool by new examples, distorted for the current model.

    A pure function, for a training loop of your own:

        pool = refresh(key, pool, functools.partial(model.apply, params), images, labels)

    Args:
        key: A random key, for the part that is replaced and for `distort`.
        pool: The pool, of `size` examples.
        logits_fn: The model: logits `(classes,)` of ONE example.
        examples: The examples to distort, `(n, *shape)` with `n <= size`.
        labels: Their true classes, `(n,)`, which the new examples keep.
        distort: `(key, logits_fn, x, label) -> x_adv`, such as `adversarial` or
            `functools.partial(adversarial, attack=...)`.
        batch_size: Number of examples to distort side by side.

    Returns:
        The pool with n of its members replaced.

    Raises:
        ValueError: If there are more examples than the pool has, or of another shape, or not one
            label per example.
    """
    examples, labels = checks.floating("examples", examples), jnp.asarray(labels)
    n, size = len(examples), len(pool.labels)
    if n > size or labels.shape != (n,) or examples.shape[1:] != pool.examples.shape[1:]:
        raise ValueError(
            f"examples: shape {examples.shape}, and labels: shape {labels.shape}, for a pool of "
            f"shape {pool.examples.shape}, expected at most as many examples of the same shape, "
            "and one label per example."
        )
    batch_size = min(checks.positive_int("batch_size", batch_size), n)

    def make(
        arguments: tuple[Key[Array, ""], Float[Array, "*shape"], Int[Array, ""]],
    ) -> Pool:
        key, x, label = arguments
        distorted = distort(key, logits_fn, x, label)
        return Pool(distorted, label, metrics.distortion(x, distorted))

    place_key, distort_key = jax.random.split(key)
    places = jax.random.choice(place_key, size, (n,), replace=False)
    new = jax.lax.map(
        make, (jax.random.split(distort_key, n), examples, labels), batch_size=batch_size
    )
    return jax.tree.map(lambda old, some: old.at[places].set(some.astype(old.dtype)), pool, new)


def adversarial_pools(
    images: ArrayLike,
    labels: ArrayLike,
    layers: Sequence[Layer],
    *,
    weight: float = 0.5,
    size: int = 3000,
    count: int = 300,
    batch_size: int = 128,
    loss: Callable[[Array, Array], Float[Array, ""]] = losses.cross_entropy,
    distort: Distort = adversarial,
) -> AuxiliaryLoss:
    """Make an auxiliary loss for `fit` on adversarial examples of images or of layer outputs.

    Each layer has a pool of adversarial examples of its outputs, on which the part of the network
    above it is trained. Before each epoch a part of every pool is replaced; each step takes a batch
    from the pool of one layer, chosen at random. The image itself counts as a layer:

        image = training.Layer(lambda params, x: x, model.apply)
        hidden = training.Layer(
            lambda params, x: model.apply(params, x, method="layers")["hidden1"],
            functools.partial(model.apply, after="hidden1"),
        )
        pools = training.adversarial_pools(images, labels, [image, hidden])
        training.fit(key, model.apply, params, images, labels, auxiliary=pools)

    Args:
        images: The training images, `(n, *image)`, floating.
        labels: Their classes, `(n,)`.
        layers: The layers. The box of the attack must contain their outputs, as [0, 1] does for
            pixels and sigmoids.
        weight: Factor of the mean loss over a batch from a pool.
        size: Number of examples in each pool, at first clean ones of the first images.
        count: Number of examples to replace in each pool before each epoch.
        batch_size: Number of examples that a step takes from a pool.
        loss: `(logits, label) -> scalar` of ONE example.
        distort: How examples are made; see `refresh`.

    Returns:
        An `AuxiliaryLoss` whose state is a tuple with a `Pool` for each layer.

    Raises:
        TypeError: If the images are not floating.
        ValueError: If there are no layers, there are fewer images than `size` or not one label per
            image, `count` is larger than `size`, `weight` is negative, or `size`, `count` or
            `batch_size` is not a positive integer.

    Reference: Szegedy et al. (2013), section 4.2.
    """
    images, labels = checks.floating("images", images), jnp.asarray(labels)
    weight = checks.number("weight", weight, minimum=0)
    size = checks.positive_int("size", size)
    count = checks.positive_int("count", count)
    batch_size = checks.positive_int("batch_size", batch_size)
    if not layers:
        raise ValueError("layers: none, expected at least one; pass [training.Layer(...)].")
    if count > size:
        raise ValueError(f"count: {count}, expected at most size={size}.")
    if labels.shape != images.shape[:1] or len(images) < size:
        raise ValueError(
            f"images: shape {images.shape}, and labels: shape {labels.shape}, expected at least "
            f"size={size} images and one label per image; pass a smaller size."
        )

    def init(params: PyTree) -> tuple[Pool, ...]:
        def pool(layer: Layer) -> Pool:
            examples = jax.vmap(functools.partial(layer.below, params))(images[:size])
            return Pool(examples, labels[:size], jnp.zeros(size, examples.dtype))

        return tuple(pool(layer) for layer in layers)

    def update(key: Key[Array, ""], params: PyTree, pools: tuple[Pool, ...]) -> tuple[Pool, ...]:
        # The images are chosen outside the compiled function, which would hold all of them.
        choice_key, key = jax.random.split(key)
        chosen = jax.random.choice(choice_key, len(images), (count,), replace=False)
        return renew(key, params, pools, images[chosen], labels[chosen])

    @jax.jit
    def renew(
        key: Key[Array, ""],
        params: PyTree,
        pools: tuple[Pool, ...],
        images: Float[Array, "count *image"],
        labels: Int[Array, " count"],
    ) -> tuple[Pool, ...]:
        def one(key: Key[Array, ""], layer: Layer, pool: Pool) -> Pool:
            examples = jax.vmap(functools.partial(layer.below, params))(images)
            logits_fn = functools.partial(layer.above, params)
            return refresh(key, pool, logits_fn, examples, labels, distort=distort)

        return tuple(map(one, jax.random.split(key, len(layers)), layers, pools))

    def pool_loss(key: Key[Array, ""], params: PyTree, pools: tuple[Pool, ...]) -> Float[Array, ""]:
        def one(layer: Layer, pool: Pool) -> Float[Array, ""]:
            batch = jax.random.randint(batch_key, (batch_size,), 0, size)
            logits = jax.vmap(functools.partial(layer.above, params))(pool.examples[batch])
            return jnp.mean(jax.vmap(loss)(logits, pool.labels[batch]))

        turn_key, batch_key = jax.random.split(key)
        turn = jax.random.randint(turn_key, (), 0, len(layers))
        branches = [functools.partial(one, *each) for each in zip(layers, pools, strict=True)]
        return weight * jax.lax.switch(turn, branches)

    return AuxiliaryLoss(init, update, pool_loss)

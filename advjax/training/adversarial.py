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
"""`(key, logits_fn, x, label) -> x`: how one example for a pool is made, without its batch axis."""


class Pool(NamedTuple):
    """Distorted examples to train on. Any clean ones will do to begin with.

    Attributes:
        examples: Images, or outputs of a layer.
        labels: The true class of each.
        distortion: The RMS by which each was moved when it was made.
    """

    examples: Float[Array, "size *shape"]
    labels: Int[Array, " size"]
    distortion: Float[Array, " size"]


class Layer(NamedTuple):
    """A place in a network: the function that leads there, and the one from there to the logits.

    Attributes:
        below: `(params, image) -> example`, of ONE image.
        above: `(params, example) -> logits`.
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
    """Distort an example until it is taken for a random other class.

    Args:
        key: For the class.
        logits_fn: The model: logits `(classes,)` of ONE example like `x`.
        x: The example.
        label: Its true class.
        attack: `(logits_fn, x, target) -> AttackResult`: `attacks.lbfgs`, `attacks.minimum_norm`,
            or either with options, as `functools.partial(attacks.lbfgs, tol=0.1)`.

    Returns:
        The adversarial example, or `x` itself if none was found.

    Raises:
        TypeError: As `attack` does.
        ValueError: As `attack` does.
    """
    classes = checks.logits(logits_fn, x).shape[0]
    target = (label + jax.random.randint(key, (), 1, classes)) % classes
    result = attack(logits_fn, x, target)
    return jnp.where(result.success, result.x_adv, x)


def refresh(
    key: Key[Array, ""],
    pool: Pool,
    logits_fn: LogitsFn,
    examples: Float[ArrayLike, "n *shape"],
    labels: Int[ArrayLike, " n"],
    *,
    distort: Distort = adversarial,
    batch_size: int = 100,
) -> Pool:
    """Replace a random part of a pool by new examples, distorted for the model as it is now.

    A pure function, for a loop of one's own:

        pool = refresh(key, pool, functools.partial(model.apply, params), images, labels)

    Args:
        key: For the part that is replaced, and for `distort`.
        pool: The pool.
        logits_fn: The model: logits `(classes,)` of ONE example.
        examples: What to distort, like those in the pool, and at most as many.
        labels: Their true classes, which the new examples keep.
        distort: `(key, logits_fn, x, label) -> x`, as `adversarial` or
            `functools.partial(adversarial, attack=...)`.
        batch_size: How many to distort side by side.

    Returns:
        The pool with n of its members replaced.

    Raises:
        ValueError: If there are more examples than the pool has, not one label for each, or they
            are not like those in the pool.
    """
    examples, labels = checks.floating("examples", examples), jnp.asarray(labels)
    n, size = len(examples), len(pool.labels)
    if n > size or labels.shape != (n,) or examples.shape[1:] != pool.examples.shape[1:]:
        raise ValueError(
            f"examples: shape {examples.shape} and {labels.shape} of the labels, for a pool of "
            f"shape {pool.examples.shape}: expected at most as many, alike, and a label for each."
        )
    batch_size = min(checks.positive_int("batch_size", batch_size), n)

    def make(arguments):
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
    images: Float[ArrayLike, " n *image"],
    labels: Int[ArrayLike, " n"],
    layers: Sequence[Layer],
    *,
    weight: float = 0.5,
    size: int = 3000,
    count: int = 300,
    batch_size: int = 128,
    loss: Callable[[Array, Array], Float[Array, ""]] = losses.cross_entropy,
    distort: Distort = adversarial,
) -> AuxiliaryLoss:
    """Train the layers above each of some places of a network on adversarial outputs of it.

    For `fit`. Every place has a pool of its own, a part of which is replaced before each epoch;
    each step takes a batch from the pool of one place, chosen at random. The image is a place, too:

        image = training.Layer(lambda params, x: x, model.apply)
        hidden = training.Layer(
            lambda params, x: model.apply(params, x, method="layers")["hidden1"],
            functools.partial(model.apply, after="hidden1"),
        )
        pools = training.adversarial_pools(images, labels, [image, hidden])
        training.fit(model.apply, params, images, labels, key=key, auxiliary=pools)

    Args:
        images: The training images, floating, along the leading axis.
        labels: Their classes.
        layers: The places. An attack's box is to hold their outputs, as [0, 1] does for pixels and
            for sigmoids.
        weight: Of the mean loss over a batch from a pool, beside that of the images.
        size: How many examples each pool has: at first those of clean images.
        count: How many are replaced before each epoch.
        batch_size: How many a step takes from a pool.
        loss: Of the logits of one example and its label.
        distort: How examples are made; see `refresh`.

    Returns:
        An `AuxiliaryLoss` whose state is a tuple of a `Pool` for each place.

    Raises:
        TypeError: If the images are not floating.
        ValueError: If there is no place, there are fewer images than `size` or not as many as
            labels, `count` exceeds `size`, `weight` is negative, or one of the numbers of examples
            is not a positive integer.

    Source: Szegedy et al. (2013), section 4.2.
    """
    images, labels = checks.floating("images", images), jnp.asarray(labels)
    weight = checks.number("weight", weight, minimum=0)
    size = checks.positive_int("size", size)
    count = checks.positive_int("count", count)
    batch_size = checks.positive_int("batch_size", batch_size)
    if not layers:
        raise ValueError("layers: none, expected at least one place for a pool.")
    if count > size:
        raise ValueError(f"count: {count}, expected at most size={size}.")
    if labels.shape != images.shape[:1] or len(images) < size:
        raise ValueError(
            f"images: shape {images.shape} and {labels.shape} of the labels, expected at least "
            f"size={size} images and a label for each."
        )

    def init(params):
        def pool(layer):
            examples = jax.vmap(functools.partial(layer.below, params))(images[:size])
            return Pool(examples, labels[:size], jnp.zeros(size, examples.dtype))

        return tuple(pool(layer) for layer in layers)

    def update(key, params, pools):
        # The images are chosen outside of the compiled program, which would hold them all.
        choice_key, key = jax.random.split(key)
        chosen = jax.random.choice(choice_key, len(images), (count,), replace=False)
        return renew(key, params, pools, images[chosen], labels[chosen])

    @jax.jit
    def renew(key, params, pools, images, labels):
        def one(key, layer, pool):
            examples = jax.vmap(functools.partial(layer.below, params))(images)
            logits_fn = functools.partial(layer.above, params)
            return refresh(key, pool, logits_fn, examples, labels, distort=distort)

        return tuple(map(one, jax.random.split(key, len(layers)), layers, pools))

    def pool_loss(key, params, pools):
        def one(layer, pool):
            batch = jax.random.randint(batch_key, (batch_size,), 0, size)
            logits = jax.vmap(functools.partial(layer.above, params))(pool.examples[batch])
            return jnp.mean(jax.vmap(loss)(logits, pool.labels[batch]))

        turn_key, batch_key = jax.random.split(key)
        turn = jax.random.randint(turn_key, (), 0, len(layers))
        branches = [functools.partial(one, *place) for place in zip(layers, pools, strict=True)]
        return weight * jax.lax.switch(turn, branches)

    return AuxiliaryLoss(init, update, pool_loss)

"""An attack is a value: a function, a pytree, compiled once, at home in any mesh."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from advjax import attacks
from advjax.attacks import Attack, AttackResult
from tests.attack_list import MAKERS

each_attack = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.uniform(KEYS[0], (6,))


def parameters(key):
    return 3 * jax.random.normal(key, (6, 4))


def apply(params, x):
    return jnp.tanh(x) @ params


# A pytree


@each_attack
def test_the_leaves_are_the_model_s_arrays_and_the_box(make):
    params = parameters(KEYS[1])
    attack = make(functools.partial(apply, params))
    assert isinstance(attack, Attack)
    leaves = jax.tree.leaves((attack.logits_fn, attack.box))
    assert [np.shape(leaf) for leaf in leaves] == [(6, 4), (), ()]
    np.testing.assert_array_equal(leaves[0], params)


@each_attack
def test_an_attack_may_be_an_argument_and_a_second_model_compiles_nothing(make, compilations):
    run = jax.jit(lambda attack, x, target: attack(x, target))
    results = []
    for key in KEYS[1:4]:
        attack = make(functools.partial(apply, parameters(key)))
        count = len(compilations)
        results.append(jax.block_until_ready(run(attack, X, 2)))
    assert len(compilations) == count
    assert len({float(result.distortion) for result in results}) > 1 or make is not attacks.lbfgs
    alone = attack(X, 2)
    np.testing.assert_allclose(results[-1].x_adv, alone.x_adv, atol=1e-5)


@each_attack
def test_it_can_be_mapped_as_a_tree_and_put_on_a_device(make):
    attack = make(functools.partial(apply, parameters(KEYS[1])))
    moved = jax.device_put(jax.tree.map(jnp.asarray, attack))
    np.testing.assert_array_equal(moved(X, 1).x_adv, attack(X, 1).x_adv)
    shapes = jax.eval_shape(lambda attack: attack, attack)
    assert isinstance(shapes, Attack)


# Callable pytrees, and calls without jit


@each_attack
def test_callable_pytrees_are_models(make):
    model = eqx.nn.MLP(6, 4, 8, 1, key=KEYS[2])
    expected = make(lambda x: model(x))(X, 1)  # noqa: PLW0108 opaque on purpose
    for result in (
        make(model)(X, 1),
        eqx.filter_jit(make(model))(X, 1),
        eqx.filter_jit(lambda model, x: make(model)(x, 1))(model, X),
        make(functools.partial(model, key=None))(X, 1),
    ):
        np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-5)
    assert make(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))(X, 1).x_adv.shape == X.shape


@each_attack
@pytest.mark.parametrize("kind", ["closure", "partial", "equinox", "unhashable"])
def test_a_second_call_compiles_nothing(make, kind, compilations):
    kernel = parameters(KEYS[1])
    layer = eqx.nn.Linear(6, 4, key=KEYS[2])

    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return x @ kernel

    model = {
        "closure": lambda x: x @ kernel,
        "partial": functools.partial(apply, kernel),
        "equinox": layer,
        "unhashable": Unhashable(),
    }[kind]
    others = {
        "partial": functools.partial(apply, kernel + 1),
        "equinox": eqx.tree_at(lambda one: one.weight, layer, layer.weight + 1),
    }
    jax.block_until_ready(make(model)(X, 1))
    count = len(compilations)
    jax.block_until_ready(make(model)(X, 2))
    jax.block_until_ready(make(others.get(kind, model))(X, 2))
    assert len(compilations) == count


def test_a_model_that_has_changed_since_the_last_call_is_attacked_as_it_is(compilations):
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    attack = attacks.minimum_norm(lambda x: model(x))  # noqa: PLW0108 a closure
    before = attack(X, 1)
    count = len(compilations)
    model.kernel[...] = model.kernel[...] + 1.5 * parameters(KEYS[3])
    changed = len(compilations)
    after = attack(X, 1)
    assert len(compilations) == changed >= count, "new parameters of the same shapes"
    expected = attacks.minimum_norm(nnx.clone(model))(X, 1)
    np.testing.assert_allclose(after.x_adv, expected.x_adv, atol=1e-5)
    assert float(jnp.max(jnp.abs(after.x_adv - before.x_adv))) > 1e-3


# Meshes


def run_on_two_devices(function):
    root = Path(__file__).parents[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    code = f"from tests import test_attack_value as t; t.{function.__name__}()"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def all_kinds_of_meshes():
    """Run in a process of two devices: every way gives the results of one device."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from advjax import runner

    split, whole = PartitionSpec("d"), PartitionSpec()
    xs = np.asarray(jax.random.uniform(KEYS[4], (6, 6)))
    targets = np.arange(6, dtype=np.int32) % 4
    params = parameters(KEYS[1])
    for make in (
        *MAKERS.values(),
        functools.partial(attacks.minimum_norm, start=attacks.decoupled(num_steps=3)),
    ):
        attack = make(functools.partial(apply, params))
        expected = jax.jit(jax.vmap(attack))(xs, targets)

        def check(result: AttackResult, expected=expected) -> None:
            np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-5)
            np.testing.assert_array_equal(result.status, expected.status)

        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
            sharded = jax.device_put((xs, targets), NamedSharding(mesh, split))
            with jax.set_mesh(mesh):
                given = jax.shard_map(
                    lambda attack, x, target: jax.vmap(attack)(x, target),
                    in_specs=(whole, split, split),
                    out_specs=split,
                )
                check(jax.jit(given)(attack, *sharded))
                check(jax.vmap(attack)(*sharded))
                check(runner.attack_images(attack, xs, targets, mesh=mesh, batch_size=3))
        mapped = jax.shard_map(jax.vmap(attack), mesh=mesh, in_specs=split, out_specs=split)
        check(jax.jit(mapped)(*sharded))


def test_attacks_and_runner_work_in_shard_map_and_in_meshes_of_both_kinds():
    run_on_two_devices(all_kinds_of_meshes)

"""Many images: in refilled lanes, durable, and on as many devices and processes as there are."""

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from advjax import attacks, runner
from advjax.attacks import Attack, AttackResult, Status
from advjax.runner import checkpoint, images, lanes, memory
from tests import runner_job
from tests.attack_list import each_attack

XS, TARGETS = runner_job.XS, runner_job.TARGETS
ATTACK = runner_job.ATTACK
N = len(XS)


@functools.cache
def undisturbed():
    """All images in one run."""
    return runner.attack_images(ATTACK, XS, TARGETS, batch_size=8)


def assert_same(one, other, rtol=1e-4):
    np.testing.assert_array_equal(one.success, other.success)
    np.testing.assert_array_equal(one.prediction, other.prediction)
    np.testing.assert_array_equal(one.status, other.status)
    np.testing.assert_allclose(one.distortion, other.distortion, rtol=rtol, atol=1e-6)
    assert one.x_adv.shape == other.x_adv.shape


# Lanes


@each_attack
def test_the_results_are_those_of_the_attack_itself(attack):
    attack = attack(runner_job.LOGITS_FN)
    result = runner.attack_images(attack, XS, TARGETS, batch_size=8)
    expected = jax.jit(jax.vmap(attack))(XS, TARGETS)
    assert all(isinstance(field, np.ndarray) for field in result)
    assert_same(result, expected)
    np.testing.assert_allclose(result.num_evals.mean(), expected.num_evals.mean(), rtol=0.02)
    assert result.success.all()


def test_a_convolutional_network_is_attacked_as_any_other():
    """JAX checks the meshes of a convolution's factors, of which one comes out of a jitted relu."""

    def apply(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME")[0])
        return x.mean((1, 2))

    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(keys[0], (4, 1, 3, 3)), jax.random.normal(keys[1], (3, 4, 3, 3))]
    xs = np.asarray(jax.random.uniform(keys[2], (3, 1, 5, 5)))
    attack = attacks.fgsm(functools.partial(apply, kernels), epsilon=0.1)
    result = runner.attack_images(attack, xs, np.arange(3), batch_size=2)
    assert_same(result, jax.vmap(attack)(xs, np.arange(3)))


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), batch_size=st.sampled_from([1, 8, 50]))
def test_neither_order_nor_batch_size_changes_a_result(seed, batch_size):
    order = np.random.default_rng(seed).permutation(N)
    result = runner.attack_images(ATTACK, XS[order], TARGETS[order], batch_size=batch_size)
    assert_same(result, AttackResult(*(field[order] for field in undisturbed())))


def test_a_slow_image_holds_up_nobody():
    """The steps of ten lanes, counted where they happen, for images that take 1 step or 60."""
    steps = []
    durations = np.where(np.arange(200) % 10 == 0, 60, 1)

    @jax.tree_util.register_static
    class Counting:
        def init(self, attack, x, target):
            return jnp.array([target, 0])

        def step(self, attack, state):
            jax.debug.callback(lambda: steps.append(1))
            return state + jnp.array([0, 1])

        def done(self, attack, state):
            return state[1] >= state[0]

        def result(self, attack, state):
            return nothing(jnp.zeros(2))._replace(num_evals=state[1].astype(jnp.int32))

    counting = Attack(lambda x: x, (0, 1), Counting())
    result = runner.attack_images(
        counting, np.zeros((200, 2), np.float32), durations, batch_size=10
    )
    jax.effects_barrier()
    assert np.all(result.num_evals >= durations)
    fixed_batches = sum(max(durations[k : k + 10]) for k in range(0, 200, 10))
    assert durations.sum() / 10 <= len(steps) < fixed_batches / 4


def nothing(x):
    zero = jnp.float32(0)
    return AttackResult(x, jnp.bool_(True), zero, zero, jnp.int32(0), jnp.int32(1), jnp.int32(1))


def test_any_attack_and_any_function_of_an_image_and_a_class_can_be_run():
    untargeted = attacks.untargeted(ATTACK, k=2)
    labels = np.asarray(jax.vmap(runner_job.LOGITS_FN)(XS).argmax(1))
    result = runner.attack_images(untargeted, XS[:10], labels[:10], batch_size=4)
    assert_same(result, jax.jit(jax.vmap(untargeted))(XS[:10], labels[:10]))
    signs = attacks.fgsm(runner_job.LOGITS_FN, epsilon=0.3)
    assert_same(
        runner.attack_images(signs, XS, labels), jax.jit(jax.vmap(signs))(XS, jnp.asarray(labels))
    )
    whole = runner.attack_images(jax.jit(ATTACK), XS, TARGETS, batch_size=8)
    assert_same(whole, undisturbed())


def test_another_network_of_the_same_shape_does_not_compile_again():
    traces = []

    def apply(params, x):
        traces.append(1)
        return runner_job.apply(params, x)

    counts = []
    for seed in range(3):
        attack = attacks.lbfgs(functools.partial(apply, runner_job.parameters(seed)))
        runner.attack_images(attack, XS, TARGETS, batch_size=8)
        counts.append(len(traces))
    per_run = counts[1] - counts[0]
    assert counts[2] - counts[1] == per_run <= 3, "only the shapes of the results are asked for"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_images_keep_their_precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        attack = attacks.minimum_norm(lambda x: runner_job.LOGITS_FN(x.astype(jnp.float32)))
        xs = np.asarray(jnp.asarray(XS[:6], dtype))
        result = runner.attack_images(attack, xs, TARGETS[:6], batch_size=4)
        assert result.x_adv.dtype == xs.dtype
        assert result.success.all()


def test_trouble_of_one_image_is_told_by_its_status_and_leaves_the_others_alone():
    xs, targets = XS.copy(), TARGETS.copy()
    xs[3, 0], targets[5] = np.nan, 99
    result = runner.attack_images(ATTACK, xs, targets, batch_size=4)
    assert (result.status[3], result.status[5]) == (Status.NONFINITE, Status.INVALID_TARGET)
    assert np.isfinite(result.x_adv).all()
    others = np.delete(np.arange(N), [3, 5])
    assert_same(
        AttackResult(*(field[others] for field in result)),
        AttackResult(*(field[others] for field in undisturbed())),
    )


def test_no_image_is_in_order():
    result = runner.attack_images(ATTACK, XS[:0], TARGETS[:0])
    assert result.x_adv.shape == (0, *XS.shape[1:])
    assert result.success.shape == (0,)


@pytest.mark.parametrize(
    ("xs", "targets", "options", "error"),
    [
        (XS, TARGETS[:-1], {}, r"targets: shape \(59,\), expected one class per image"),
        (XS[0, 0], 3, {}, r"targets: shape \(\), expected one class per image"),
        (XS, TARGETS / 1, {}, "targets: dtype float64, expected integer"),
        ((255 * XS).astype(np.uint8), TARGETS, {}, r"xs: dtype uint8.*xs / 255"),
        (XS, TARGETS, {"batch_size": 0}, "batch_size: 0, expected an integer of at least 1"),
        (XS, TARGETS, {"mesh": 2}, "mesh: 2, expected a jax.sharding.Mesh"),
    ],
)
def test_a_wrong_argument_is_named(xs, targets, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        runner.attack_images(ATTACK, xs, targets, **options)


def test_what_the_attack_itself_refuses_is_refused():
    attack = attacks.lbfgs(lambda x: x.sum())
    with pytest.raises(ValueError, match=r"logits_fn: returns shape \(\)"):
        runner.attack_images(attack, XS, TARGETS)


def test_progress_counts_the_images(capsys):
    runner.attack_images(ATTACK, XS, TARGETS, batch_size=8, progress="trial")
    shown = capsys.readouterr().err
    assert "trial: 100%" in shown
    assert "60/60" in shown
    assert "image/s" in shown


def test_nothing_is_left_on_the_device():
    undisturbed()
    before = sum(array.nbytes for array in jax.live_arrays())
    runner.attack_images(ATTACK, XS, TARGETS, batch_size=8)
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1000


@pytest.mark.slow
def test_the_memory_of_a_long_run_is_flat():
    """Twenty thousand images the size of MNIST's: the process grows by their results alone."""

    def resident():
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    kernel = np.random.default_rng(0).normal(size=(784, 10)).astype(np.float32)
    attack = attacks.minimum_norm(functools.partial(jnp.matmul, b=kernel))
    xs = np.random.default_rng(1).uniform(size=(20_000, 784)).astype(np.float32)
    targets = np.arange(20_000) % 10
    runner.attack_images(attack, xs[:2000], targets[:2000])
    before = resident()
    result = runner.attack_images(attack, xs, targets)
    grown = resident() - before - sum(field.nbytes for field in result)
    assert grown < 20e6
    assert result.success.all()


# Memory


def test_a_chain_holds_two_arrays_at_a_time_and_its_gradient_one_for_each_link():
    def chain(x):
        for _ in range(10):
            x = jnp.sin(x)
        return x.sum()

    x = jnp.zeros(1000)
    forward, backward = (
        memory.peak_bytes(jax.make_jaxpr(fn)(x).jaxpr) / x.nbytes for fn in (chain, jax.grad(chain))
    )
    assert 2 <= forward < 3
    assert 10 <= backward < 14


def test_on_an_accelerator_the_default_batch_leaves_room_for_the_models_gradient():
    def batch_size(width, platform):
        def logits_fn(x):
            return jnp.tile(jnp.sin(jnp.tile(x, width)), 3)[:10]

        attack = attacks.minimum_norm(logits_fn)
        x = np.zeros((1, 1000), np.float32)
        state, _ = lanes.lane.eval_shape(attack, x[0], np.int32(0))
        device = SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": 400 << 20})
        return memory.default_batch_size(attack, state, x, device)

    on_cpu = batch_size(1, "cpu")
    assert 8 < on_cpu < 512
    assert batch_size(100, "cpu") == on_cpu
    assert batch_size(1, "gpu") == 512
    # Half of 400 MiB, and at least two arrays of 0.4 MB for each image.
    assert 40 < batch_size(100, "gpu") < 260
    assert batch_size(10_000, "gpu") == 8


# Checkpoints


def run(directory, attack=ATTACK, xs=XS, targets=TARGETS, **options):
    return runner.attack_images(attack, xs, targets, directory=directory, batch_size=8, **options)


@pytest.fixture
def writes_at_once(monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)


@pytest.fixture
def attacked(monkeypatch):
    """The indices of the images that were put into lanes."""
    indices = []

    def spy(program, xs, targets, queue, **options):
        indices.extend(queue)
        return lanes.attack_in_lanes(program, xs, targets, queue, **options)

    monkeypatch.setattr(images, "attack_in_lanes", spy)
    return indices


def finished_images(directory):
    found = []
    for path in Path(directory).glob("*.npz"):
        with np.load(path) as contents:
            found.extend(contents["images"])
    return found


def test_a_finished_run_is_read_and_not_repeated(tmp_path, attacked):
    first = run(tmp_path / "new" / "folder")
    assert len(attacked) == N
    second = run(str(tmp_path / "new" / "folder"))
    assert len(attacked) == N
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert_same(first, undisturbed())


def test_a_run_goes_on_from_whatever_a_kill_leaves_on_disk(
    tmp_path, monkeypatch, writes_at_once, attacked
):
    """The folder as it is at moments in which a file is being written, before its renaming too."""
    moments, sync, expected = [], os.fsync, undisturbed()

    def snapshot(descriptor):
        moments.append(shutil.copytree(tmp_path / "run", tmp_path / f"moment{len(moments)}"))
        sync(descriptor)

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", snapshot)
        run(tmp_path / "run")
    assert len(moments) > 8, "the first of them before there is a word about the run"
    for moment in moments:
        done = finished_images(moment)
        attacked.clear()
        assert_same(run(moment), expected)
        assert not set(attacked) & set(done)
        assert sorted(attacked + done) == list(range(N)), "each image once"
        assert sorted(finished_images(moment)) == list(range(N))


def test_a_damaged_file_is_reported_and_its_images_attacked_again(tmp_path, writes_at_once):
    run(tmp_path)
    parts = sorted(tmp_path.glob("*.npz"))
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    flipped = bytearray(parts[1].read_bytes())
    flipped[len(flipped) // 2] ^= 255
    parts[1].write_bytes(flipped)
    with pytest.warns(UserWarning, match="is damaged .* its images are attacked again"):
        assert_same(run(tmp_path), undisturbed())
    assert_same(run(tmp_path), undisturbed())


def test_a_full_disk_costs_nothing_that_was_written(tmp_path, monkeypatch, writes_at_once):
    save, saved = np.savez, []

    def full(file, **arrays):
        if len(saved) == 3:
            file.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        saved.append(1)
        save(file, **arrays)

    with monkeypatch.context() as context:
        context.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".json"}
    assert 0 < len(finished_images(tmp_path)) < N
    assert_same(run(tmp_path), undisturbed())


def test_an_interrupted_run_keeps_what_is_finished(tmp_path, monkeypatch):
    class Interrupt(BaseException):
        pass

    def interrupted(*args, **options):
        for k, batch in enumerate(lanes.attack_in_lanes(*args, **options)):
            if k == 5:
                raise Interrupt
            yield batch

    with monkeypatch.context() as context:
        context.setattr(images, "attack_in_lanes", interrupted)
        with pytest.raises(Interrupt):
            run(tmp_path)
    assert finished_images(tmp_path)
    assert_same(run(tmp_path), undisturbed())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"xs": XS / 2}, "xs is"),
        ({"targets": (TARGETS + 1) % 3}, "targets is"),
        (
            {"attack": attacks.lbfgs(runner_job.LOGITS_FN)},
            r"attack is \{.*AugmentedLagrangian.* there and \{.*PenalizedLoss.* here; program is",
        ),
        (
            {"attack": attacks.minimum_norm(runner_job.LOGITS_FN, max_evals=7)},
            r"attack is \{.*'max_evals': 500.* there and \{.*'max_evals': 7.* here; program is",
        ),
        (
            {"attack": attacks.minimum_norm(runner_job.LOGITS_FN, box=(-0.1, 1.1))},
            "parameters is",
        ),
        (
            {
                "attack": attacks.minimum_norm(
                    functools.partial(runner_job.apply, runner_job.parameters(9))
                )
            },
            "holds another run: parameters is",
        ),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, change, difference):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"directory: .*{difference}"):
        run(tmp_path, **change)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("manifest", [None, b"", b"\xff{", b"[1]"])
def test_a_folder_without_a_readable_word_about_its_run_is_refused(tmp_path, manifest):
    run(tmp_path)
    path = tmp_path / "run.json"
    path.unlink() if manifest is None else path.write_bytes(manifest)
    with pytest.raises(ValueError, match=r"directory: .*run.json is missing or damaged"):
        run(tmp_path)


def test_half_precision_survives_the_disk(tmp_path):
    attack = attacks.minimum_norm(lambda x: runner_job.LOGITS_FN(x.astype(jnp.float32)))
    xs = np.asarray(jnp.asarray(XS[:6], jnp.bfloat16))
    first, second = (run(tmp_path, attack, xs, TARGETS[:6]) for _ in range(2))
    assert second.x_adv.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first.x_adv, second.x_adv)


# Devices and processes


def job(*arguments, devices=1, wait=True):
    """`runner_job` in a process of its own."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-m", "tests.runner_job", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return finish(process) if wait else process


def finish(process):
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err.decode()
    return json.loads(out.decode().splitlines()[-1])


def saved(path):
    with np.load(path) as contents:
        return AttackResult(**contents)


def test_eight_devices_share_the_images_and_find_the_same(tmp_path):
    told = job("all", tmp_path / "out.npz", devices=8)
    assert_same(saved(tmp_path / "out.npz"), undisturbed())
    assert len(told["images"]) == 8
    assert sum(told["images"]) == N
    # Each device ends at its own pace, and takes the next image when it does.
    assert max(told["images"]) <= 2 * min(told["images"])


def test_two_processes_share_the_images_and_both_have_the_results(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "run"
    processes = [
        job("process", tmp_path / f"{k}.npz", folder, port, k, devices=2, wait=False)
        for k in range(2)
    ]
    told = [finish(process) for process in processes]
    for k in range(2):
        assert_same(saved(tmp_path / f"{k}.npz"), undisturbed())
    assert [sum(one["images"]) for one in told] == [N // 2, N // 2]
    assert sorted(finished_images(folder)) == list(range(N)), "each image once"
    assert_same(run(folder), undisturbed())


def test_the_devices_of_a_mesh_are_those_that_work():
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("hosts", "devices"))
    assert_same(runner.attack_images(ATTACK, XS, TARGETS, mesh=mesh), undisturbed())


def kill_and_resume(tmp_path, kills, wait_for):
    """What a run comes to that is killed again and again before it may end."""
    seen: set[int] = set()
    for k in range(kills):
        process = job("durable", tmp_path / "out.npz", tmp_path / "run", wait=False)
        wait_for(tmp_path / "run", len(seen))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = finished_images(tmp_path / "run")
        assert len(now) == len(set(now)), "no image twice"
        assert seen <= set(now), f"kill {k} lost images"
        seen = set(now)
    told = job("durable", tmp_path / "out.npz", tmp_path / "run")
    assert sum(told["images"]) == runner_job.MANY - len(seen)
    return saved(tmp_path / "out.npz")


def until_more_is_finished(directory, finished):
    deadline = time.monotonic() + 120
    while len(finished_images(directory)) <= finished:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_resumes_to_the_same_result(tmp_path):
    result = kill_and_resume(tmp_path, 1, until_more_is_finished)
    assert_same(result, runner_job.attack_many())


@pytest.mark.slow
def test_a_process_killed_at_twenty_random_moments_resumes_to_the_same_result(tmp_path):
    def a_moment(directory, finished):
        time.sleep(random.Random(finished).uniform(0, 6))

    result = kill_and_resume(tmp_path, 20, a_moment)
    assert_same(result, runner_job.attack_many())

"""Weights of PyTorch: files written here by hand as it writes them, honest, damaged and hostile.

The oracle of the formats is `torch.save`, whose output these imitate, byte for byte where it
matters: persistent ids for storages, which follow the pickle in the legacy format and are members
of the archive in the zip format.
"""

import collections
import contextlib
import io
import math
import pickle
import re
import struct
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import models

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Storage:
    """A storage as a pickler meets it: it writes a persistent id in its place."""

    def __init__(self, flat, size=None):
        self.flat, self.size = flat, len(flat) if size is None else size


class Call:
    """An object whose pickle is a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.fixture(scope="module", autouse=True)
def torch():
    """A stand-in for the names of PyTorch, so that the pickler finds them by reference."""
    names = {
        "torch": [*STORAGES, "QInt8Storage"],
        "torch._utils": ["_rebuild_tensor_v2", "_rebuild_parameter"],
        "torch.nn.modules.linear": ["Linear"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, members in names.items():
            stand_in = types.ModuleType(module)
            for name in members:
                made = type(name, (), {"__module__": module, "__qualname__": name})
                setattr(stand_in, name, made)
            patch.setitem(sys.modules, module, stand_in)
        yield sys.modules["torch"]


def tensor(array, *, offset=0, shape=None, strides=None, storage=None):
    """A tensor as PyTorch pickles it, by default contiguous and of a storage of its own."""
    array = np.asarray(array)
    shape = array.shape if shape is None else shape
    if strides is None:  # as PyTorch counts them, those of empty tensors too
        strides = tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
    storage = storage or Storage(array.ravel())
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
    return Call(rebuild, storage, offset, shape, strides, False, collections.OrderedDict())


def dump(state, *, legacy):
    """The pickle of a state, and its storages by their keys."""
    buffer, storages = io.BytesIO(), {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, Storage):
                return None
            key = str(next((k for k, s in storages.items() if s is thing), len(storages)))
            storages[key] = thing
            (kind,) = (name for name, dtype in STORAGES.items() if dtype == thing.flat.dtype)
            view = (None,) if legacy else ()
            return ("storage", getattr(sys.modules["torch"], kind), key, "cpu", thing.size, *view)

    Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue(), storages


def legacy(state, *, little_endian=True):
    pickled, storages = dump(state, legacy=True)
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little_endian})
    parts = [*(pickle.dumps(value, protocol=2) for value in header), pickled]
    parts.append(pickle.dumps(sorted(storages), protocol=2))
    for key in sorted(storages):
        flat = storages[key].flat
        parts += [struct.pack("<q", len(flat)), flat.tobytes()]
    return b"".join(parts)


def zipped(state, *, byteorder=b"little", leave_out=(), compression=zipfile.ZIP_STORED):
    pickled, storages = dump(state, legacy=False)
    members = {"data.pkl": pickled, "byteorder": byteorder, "version": b"3\n"}
    members |= {f"data/{key}": storage.flat.tobytes() for key, storage in storages.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in members.keys() - set(leave_out):
            archive.writestr(f"archive/{name}", members[name])
    return buffer.getvalue()


FORMATS = pytest.mark.parametrize("write", [legacy, zipped])


@pytest.fixture
def load(tmp_path):
    def load(data):
        (tmp_path / "net.pth").write_bytes(data)
        return models.load_torch_weights(tmp_path / "net.pth")

    return load


def state_dict(**arrays):
    """As `Module.state_dict` makes it, with an attribute of its own."""
    state = collections.OrderedDict((name, tensor(array)) for name, array in arrays.items())
    state._metadata = collections.OrderedDict(version=1)
    return state


ARRAYS = {
    "features.0.weight": np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32),
    "features.0.bias": np.arange(4, dtype=np.float32),
    "num_batches_tracked": np.array(7),
    "empty": np.zeros((3, 0, 2), np.float32),
}


# --- what comes back -------------------------------------------------------------------------


@FORMATS
def test_weights_come_back_bit_for_bit(write, load):
    weights = load(write(state_dict(**ARRAYS)))
    assert list(weights) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(weights[name], array, strict=True)
        assert weights[name].flags.writeable
        assert weights[name].flags.c_contiguous


@FORMATS
@pytest.mark.parametrize("dtype", STORAGES.values())
def test_every_dtype_comes_back(write, dtype, load):
    array = np.array([[0, 1, 3], [1, 1, 0]]).astype(dtype)
    np.testing.assert_array_equal(load(write({"w": tensor(array)}))["w"], array, strict=True)


@FORMATS
def test_views_of_one_storage_with_any_strides_are_told_apart(write, load):
    flat = np.arange(24, dtype=np.float32)
    storage = Storage(flat)
    state = {
        "whole": tensor(flat, storage=storage),
        "transposed": tensor(flat, storage=storage, shape=(4, 6), strides=(1, 4)),
        "part": tensor(flat, storage=storage, offset=5, shape=(2, 2), strides=(12, 3)),
        "last": tensor(flat, storage=storage, offset=23, shape=(), strides=()),
    }
    weights = load(write(state))
    np.testing.assert_array_equal(weights["whole"], flat)
    np.testing.assert_array_equal(weights["transposed"], flat.reshape(6, 4).T)
    np.testing.assert_array_equal(weights["part"], [[5, 8], [17, 20]])
    np.testing.assert_array_equal(weights["last"], 23)


@FORMATS
def test_parameters_are_tensors_too(write, load):
    rebuild = sys.modules["torch._utils"]._rebuild_parameter
    parameter = Call(rebuild, tensor(ARRAYS["features.0.bias"]), True, collections.OrderedDict())
    weights = load(write({"bias": parameter}))
    np.testing.assert_array_equal(weights["bias"], ARRAYS["features.0.bias"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_a_safetensors_file_is_read_whatever_its_name(dtype, load):
    array = jnp.arange(6).reshape(2, 3).astype(dtype)
    weight = load(safetensors.flax.save({"w": array, "scale": jnp.ones(())}))["w"]
    np.testing.assert_array_equal(weight, np.asarray(array), strict=True)
    assert weight.flags.writeable


# --- hostile files ---------------------------------------------------------------------------


@pytest.fixture
def alarm(tmp_path):
    """A path that a hostile pickle tries to make."""
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists(), "the pickle ran"


def refused(name):
    return pytest.raises(ValueError, match=rf"contains {re.escape(name)}, expected only tensors")


@FORMATS
def test_a_pickle_that_calls_something_runs_nothing_and_is_refused(write, load, alarm):
    with refused("__builtin__.exec"):
        load(write({"w": Call(exec, f"open({str(alarm)!r}, 'w')")}))


@pytest.mark.parametrize(
    ("opcodes", "name"),
    [
        (b"cos\nsystem\n(S'touch {}'\ntR.", "os.system"),
        (b"(S'touch {}'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch {}'\no.", "os.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"ctorch._utils\nos.system\n.", "torch._utils.os.system"),
        (b"ctorch\nload\n.", "torch.load"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"ccollections\ndefaultdict\n.", "collections.defaultdict"),
        (b"cfunctools\npartial\n.", "functools.partial"),
        (b"cnumpy\ndtype\n.", "numpy.dtype"),
    ],
)
def test_every_way_to_name_a_global_is_refused(opcodes, name, load, alarm):
    with refused(name):
        load(b"\x80\x04" + opcodes.replace(b"{}", str(alarm).encode()))


@pytest.mark.parametrize("legacy_part", [0, 1, 2, 4])
def test_every_part_of_a_legacy_file_is_read_with_care(legacy_part, load, alarm):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts[legacy_part] = Call(exec, f"open({str(alarm)!r}, 'w')")
    with refused("__builtin__.exec"):
        load(b"".join(pickle.dumps(part, protocol=2) for part in parts))


def test_a_pickle_cannot_change_what_the_next_one_meets(load):
    """BUILD sets attributes: of the functions that rebuild tensors, and of OrderedDict."""
    for found in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
    ):
        for state in (b"N}S'__defaults__'\nNs\x86b.", b"N}S'update'\nNs\x86b."):
            with pytest.raises(ValueError, match="cannot be read"):
                load(b"\x80\x02" + found + state)
    np.testing.assert_array_equal(load(legacy({"w": tensor(np.ones(2))}))["w"], np.ones(2))


def test_a_whole_model_is_refused_with_what_to_save_instead(load):
    linear = sys.modules["torch.nn.modules.linear"].Linear
    with pytest.raises(
        ValueError, match=r"torch\.nn\.modules\.linear\.Linear.* save model\.state_dict\(\)"
    ):
        load(zipped(linear()))


def test_a_storage_of_an_unknown_dtype_is_named(load):
    with refused("torch.QInt8Storage"):
        load(zipped({"w": sys.modules["torch"].QInt8Storage()}))


@FORMATS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (6,), (1,)),
        (0, (2, 4), (4, 1)),
        (0, (3,), (3,)),
        (-1, (2,), (1,)),
        (5, (3,), (-1,)),
        (0, (2**40,), (0,)),
        (0, (-1,), (1,)),
    ],
)
def test_a_tensor_that_reaches_out_of_its_storage_is_named(write, offset, shape, strides, load):
    view = tensor(np.ones(6, np.float32), offset=offset, shape=shape, strides=strides)
    with pytest.raises(ValueError, match=r"entry 'a\.weight': its shape .* does not fit"):
        load(write({"a.weight": view}))


def test_a_small_archive_cannot_fill_the_memory(load):
    data = zipped({"w": tensor(np.zeros(1000))}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed, which PyTorch never does"):
        load(data)


@FORMATS
def test_a_storage_that_claims_more_than_the_file_has_is_named(write, load):
    storage = Storage(np.ones(6, np.float32), size=2**60)
    with pytest.raises(ValueError, match=r"has 6 elements|has 24 bytes"):
        load(write({"w": tensor(np.ones(6, np.float32), storage=storage)}))


# --- damaged files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [legacy, zipped, lambda state: safetensors.flax.save({"w": jnp.ones(3)})]
)
def test_a_file_cut_off_anywhere_is_never_read_in_part(data, load):
    whole = data(state_dict(**ARRAYS))
    for end in {0, 1, 9, *range(10, len(whole), 37), len(whole) - 1}:
        with pytest.raises(ValueError, match=r"net\.pth cannot be read: "):
            load(whole[:end])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([legacy, zipped]))
def test_a_damaged_file_is_read_or_refused_but_raises_nothing_else(tmp_path_factory, draw, write):
    data = bytearray(write(state_dict(**ARRAYS)))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        weights = models.load_torch_weights(path)
        assert all(isinstance(array, np.ndarray) for array in weights.values())


def test_a_storage_that_is_not_there_is_named_with_its_entry(load):
    data = zipped(state_dict(a=np.ones(2), b=np.ones(3)), leave_out=["data/1"])
    with pytest.raises(ValueError, match=r"entry 'b': the archive has no data/1"):
        load(data)


def test_an_archive_of_something_else_is_refused(load):
    with pytest.raises(ValueError, match=r"a zip archive without a data\.pkl"):
        load(zipped({}, leave_out=["data.pkl"]))


@pytest.mark.parametrize("data", [pickle.dumps({"w": 1}), pickle.dumps(5)])
def test_a_pickle_of_something_else_is_refused(data, load):
    with pytest.raises(ValueError, match="cannot be read: "):
        load(data)


@pytest.mark.parametrize("data", [b"GIF89a......", b"", b"<html></html>"])
def test_a_file_of_something_else_is_refused(data, load):
    with pytest.raises(ValueError, match="not a PyTorch or safetensors file"):
        load(data)


@pytest.mark.parametrize(
    "data", [lambda s: legacy(s, little_endian=False), lambda s: zipped(s, byteorder=b"big")]
)
def test_the_other_byte_order_is_refused(data, load):
    with pytest.raises(ValueError, match="big-endian"):
        load(data(state_dict(w=np.ones(2))))


@FORMATS
@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"epoch": 3}, "entry 'epoch' is a int, expected a tensor"),
        ({"state_dict": {}}, "entry 'state_dict' is a dict"),
        ({3: None}, "entry 3 is a NoneType"),
        ([1], "holds a list, expected a dict of tensors"),
    ],
)
def test_anything_but_a_flat_dict_of_tensors_is_named(write, state, where, load):
    with pytest.raises(ValueError, match=where):
        load(write(state))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        models.load_torch_weights(tmp_path / "absent.pth")


# --- into AlexNet ----------------------------------------------------------------------------

SHRUNK = models.AlexNet(channels=(3, 4, 5, 6, 7), features=(8, 9, 10))


def alexnet_weights(model=SHRUNK):
    """Random weights by torchvision's names, in its layout."""
    rng = np.random.default_rng(0)
    kernels, features = (11, 5, 3, 3, 3), (7 * 36, *model.features)
    channels = (3, *model.channels)
    shapes = {
        f"features.{j}": (channels[i + 1], channels[i], kernels[i], kernels[i])
        for i, j in enumerate((0, 3, 6, 8, 10))
    } | {f"classifier.{j}": (features[i + 1], features[i]) for i, j in enumerate((1, 4, 6))}
    weights = {}
    for name, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        weights[f"{name}.weight"] = scale * rng.normal(size=shape).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32) / 9
    return weights


def torch_alexnet(weights, x, *, padding, normalize):
    """AlexNet as PyTorch computes it, channels first, written out."""

    def conv(x, name, stride, padding):
        padding = ((padding, padding),) * 2
        out = jax.lax.conv(x[None], weights[f"{name}.weight"], (stride, stride), padding)[0]
        return np.maximum(out + weights[f"{name}.bias"][:, None, None], 0)

    def pool(x):
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        return windows[:, ::2, ::2].max((3, 4))

    def norm(x):
        if not normalize:
            return x
        near = [np.sum(x[max(0, i - 2) : i + 3] ** 2, axis=0) for i in range(len(x))]
        return x / (2 + 1e-4 * np.stack(near)) ** 0.75

    x = pool(norm(conv(np.moveaxis(x, -1, 0), "features.0", 4, padding)))
    x = pool(norm(conv(x, "features.3", 1, 2)))
    x = conv(conv(x, "features.6", 1, 1), "features.8", 1, 1)
    x = np.ravel(pool(conv(x, "features.10", 1, 1)))
    for name in ("classifier.1", "classifier.4"):
        x = np.maximum(weights[f"{name}.weight"] @ x + weights[f"{name}.bias"], 0)
    return weights["classifier.6.weight"] @ x + weights["classifier.6.bias"]


@pytest.mark.parametrize(
    ("size", "padding", "normalize"), [(224, 2, None), (227, 0, models.local_response_norm)]
)
def test_alexnet_computes_what_the_layout_of_torchvision_and_the_papers_do(
    size, padding, normalize
):
    model = SHRUNK.clone(padding=padding, normalize=normalize)
    weights = alexnet_weights()
    x = np.random.default_rng(1).normal(size=(size, size, 3)).astype(np.float32) * 30
    params = models.alexnet_from_torch(model, weights)
    expected = torch_alexnet(weights, x, padding=padding, normalize=normalize)
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), expected, rtol=1e-3, atol=1e-3)


@FORMATS
def test_weights_travel_from_a_file_into_the_network(write, load):
    weights = alexnet_weights()
    direct = models.alexnet_from_torch(SHRUNK, weights)
    through_file = models.alexnet_from_torch(SHRUNK, load(write(state_dict(**weights))))
    jax.tree.map(np.testing.assert_array_equal, through_file, direct)
    image = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
    expected = jax.eval_shape(SHRUNK.init, jax.random.key(0), image)
    assert jax.tree.map(jnp.shape, direct) == jax.tree.map(jnp.shape, expected)


def test_missing_and_unknown_entries_are_named():
    weights = alexnet_weights()
    del weights["features.3.bias"]
    weights["features.99.weight"] = np.ones(1)
    with pytest.raises(
        ValueError, match=r"missing \['features\.3\.bias'\], unknown \['features\.99\.weight'\]"
    ):
        models.alexnet_from_torch(SHRUNK, weights)


@pytest.mark.parametrize("name", ["features.6.weight", "classifier.1.weight", "classifier.6.bias"])
def test_an_entry_of_a_wrong_shape_is_named(name):
    weights = alexnet_weights()
    weights[name] = np.moveaxis(weights[name], 0, -1)[..., :1]
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: shape .* expected \("):
        models.alexnet_from_torch(SHRUNK, weights)


def test_weights_that_are_not_floating_are_named():
    weights = alexnet_weights()
    weights["features.0.bias"] = np.ones(3, np.int32)
    with pytest.raises(TypeError, match=r"features\.0\.bias: dtype int32"):
        models.alexnet_from_torch(SHRUNK, weights)

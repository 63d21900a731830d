"""Data sets come as arrays, the same whichever way they were prepared, or with one clear error."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from advjax import data
from advjax.data import cache

PREPARED = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
full_set = pytest.mark.skipif(
    not all((PREPARED / name / "3.0.1").is_dir() for name in ("mnist", "fashion_mnist")),
    reason=f"MNIST and Fashion-MNIST are not prepared in {PREPARED}; set TFDS_DATA_DIR",
)
each_split = pytest.mark.parametrize(
    ("split", "size"),
    [("test", 10_000), pytest.param("train", 60_000, marks=pytest.mark.slow)],
)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """Keeps the cache of the user out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "advjax"


@pytest.fixture
def no_network(monkeypatch):
    def unknown_host(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)


@pytest.fixture
def tfds_mnist():
    pytest.importorskip("tensorflow_datasets")
    from advjax.data import tfds_mnist

    return tfds_mnist


# --- the arrays ------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "per_class"), [("train", 500), ("test", 100)])
def test_the_embedded_sample_is_stratified_and_in_the_documented_form(split, per_class):
    images, labels, source = data.load("mnist", split, source="embedded")
    assert images.shape == (10 * per_class, 28, 28, 1)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, per_class))
    assert source == "embedded"


@full_set
@each_split
def test_the_embedded_digits_are_digits_of_mnist_of_the_same_split(split, size):
    sample = data.load("mnist", split, source="embedded")
    everything = data.load("mnist", split, source="tfds", data_dir=PREPARED)
    known = {
        (image.tobytes(), label)
        for image, label in zip(everything.images, everything.labels, strict=True)
    }
    assert len(everything.labels) == size
    assert known.issuperset(
        (image.tobytes(), label) for image, label in zip(sample.images, sample.labels, strict=True)
    )


@full_set
@each_split
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_full_set_equals_what_tensorflow_datasets_reads(name, split, size):
    import tensorflow_datasets as tfds

    images, labels, source = data.load(name, split, source="tfds", data_dir=PREPARED)
    stock = tfds.builder(name, data_dir=PREPARED).as_data_source(split)
    assert images.shape == (size, 28, 28, 1)
    assert (images.dtype, labels.dtype, source) == (np.float32, np.int32, "tfds")
    for index in [0, 1, size // 2, size - 1]:
        np.testing.assert_array_equal(np.rint(images[index] * 255), stock[index]["image"])
        assert labels[index] == stock[index]["label"]
    np.testing.assert_array_equal(np.bincount(labels, minlength=10) > 0, True)


@full_set
def test_data_dir_defaults_to_the_environment_variable_as_it_is_now(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(OSError, match="elsewhere"):
        data.load("mnist", "test", source="tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", str(PREPARED))
    assert data.load("mnist", "test").source == "tfds"


# --- preparing -------------------------------------------------------------------------------


def stored_order(split, size):
    """The indices of the original examples as stored: TFDS sorts by a salted MD5 of the index."""
    return np.argsort([hashlib.md5(f"{split}{i}".encode()).hexdigest() for i in range(size)])


def write_idx(path, array):
    """Writes the format of http://yann.lecun.com/exdb/mnist/: magic number, shape, bytes."""
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + array.tobytes())


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code="-", size="-"):
        self.server.answered.append(self.command)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder at a local address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.answered = []
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield folder, f"http://127.0.0.1:{httpd.server_port}/", httpd.answered
        httpd.shutdown()
        thread.join()


# The first labels in the original files.
FIRST_LABELS = {
    ("mnist", "train"): [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    ("mnist", "test"): [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
    ("fashion_mnist", "train"): [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
    ("fashion_mnist", "test"): [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
}


@pytest.fixture
def original_files(tfds_mnist, server, monkeypatch):
    """Serves the original files, made from the prepared data; if asked, fewer training images."""
    folder, url, _ = server

    def serve(name, train_size):
        # A short training file has images of the test set: they are quick to decode.
        sources = {"train": "train" if train_size == 60_000 else "test", "test": "test"}
        for split, source in sources.items():
            stored = data.load(name, source, source="tfds", data_dir=PREPARED)
            original = np.argsort(stored_order(source, len(stored.labels)))
            images = np.rint(stored.images[original, ..., 0] * 255).astype(np.uint8)
            labels = stored.labels[original].astype(np.uint8)
            assert labels[:10].tolist() == FIRST_LABELS[name, source]
            size = train_size if split == "train" else len(labels)
            prefix = {"train": "train", "test": "t10k"}[split]
            write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images[:size])
            write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels[:size])
        monkeypatch.setattr(tfds_mnist.BUILDERS[name], "URL", url)
        monkeypatch.setattr(tfds_mnist.mnist, "_TRAIN_EXAMPLES", train_size)

    return serve


@full_set
@pytest.mark.parametrize(
    ("name", "train_size"),
    [
        ("mnist", 1_000),
        pytest.param("mnist", 60_000, marks=pytest.mark.slow),
        pytest.param("fashion_mnist", 60_000, marks=pytest.mark.slow),
    ],
)
def test_preparing_from_the_original_files_gives_what_tensorflow_datasets_gives(
    original_files, tmp_path, name, train_size
):
    original_files(name, train_size)
    ours = {
        split: data.load(name, split, source="tfds", data_dir=tmp_path / "prepared")
        for split in ("train", "test")
    }
    stock = {"test": data.load(name, "test", data_dir=PREPARED)}
    if train_size == 60_000:
        stock["train"] = data.load(name, "train", data_dir=PREPARED)
    for split, expected in stock.items():
        np.testing.assert_array_equal(ours[split].images, expected.images)
        np.testing.assert_array_equal(ours[split].labels, expected.labels)

    def metadata(data_dir, file):
        return json.loads((data_dir / name / "3.0.1" / file).read_text())

    def of_examples(info):
        """What remains of the metadata without the sizes of files, which depend on the encoder."""
        info.pop("downloadSize", None)
        for split in info["splits"]:
            del split["numBytes"]
        return info

    expected = of_examples(metadata(PREPARED, "dataset_info.json"))
    expected["splits"][0]["shardLengths"] = [str(train_size)]
    assert of_examples(metadata(tmp_path / "prepared", "dataset_info.json")) == expected
    assert metadata(tmp_path / "prepared", "features.json") == metadata(PREPARED, "features.json")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_downloads_are_checked_against_the_checksums_of_tensorflow_datasets(tfds_mnist, name):
    builder = tfds_mnist.BUILDERS[name]
    assert {url.removeprefix(builder.URL) for url in builder.url_infos} == {
        f"{prefix}-{kind}-ubyte.gz"
        for prefix in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    }


def test_our_builders_do_not_replace_those_of_tensorflow_datasets(tfds_mnist):
    code = (
        "import tensorflow_datasets as tfds\n"
        "from advjax.data import tfds_mnist\n"
        "assert not isinstance(tfds.builder('mnist'), tfds_mnist.BUILDERS['mnist'])"
    )
    # In a new process: in one that has looked for a builder of ImageNet it may know none of MNIST.
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_download_is_the_same_one_error(tfds_mnist, server, tmp_path, monkeypatch):
    folder, url, answered = server
    (folder / "t10k-labels-idx1-ubyte.gz").touch()  # and the other three are missing
    monkeypatch.setattr(tfds_mnist.BUILDERS["mnist"], "URL", url)
    with pytest.raises(FileNotFoundError, match=r"HTTP code: 404.*TFDS_DATA_DIR"):
        data.load("mnist", "test", source="tfds", data_dir=tmp_path / "prepared")
    # Keep the server up for the other downloads, which would go on trying for minutes.
    deadline = time.monotonic() + 10
    while answered.count("GET") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answered.count("GET") == 4


# --- no network ------------------------------------------------------------------------------


def test_without_data_and_network_the_error_comes_at_once_and_says_what_to_do(
    tfds_mnist, no_network, tmp_path
):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", "train", source="tfds", data_dir=tmp_path)
    assert time.monotonic() - start < 5
    for remedy in ["machine with a network", "TFDS_DATA_DIR", "data_dir", 'source="embedded"']:
        assert remedy in str(error.value)
    assert error.value.__suppress_context__  # no stack of retries


def test_a_network_that_never_answers_is_given_up_within_five_seconds(
    tfds_mnist, monkeypatch, tmp_path
):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: done.wait(30) and [])
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no answer"):
        data.load("mnist", "train", source="tfds", data_dir=tmp_path)
    done.set()
    assert time.monotonic() - start < 5


def test_auto_falls_back_to_the_sample_with_one_warning(tfds_mnist, no_network, tmp_path):
    with pytest.warns(UserWarning, match="sample of MNIST") as warned:
        dataset = data.load("mnist", "test", data_dir=tmp_path)
    assert dataset.source == "embedded"
    assert len(warned) == 1
    assert warned[0].filename == __file__  # it points to the caller
    assert "TFDS_DATA_DIR" in str(warned[0].message)


def test_auto_without_data_of_fashion_mnist_is_the_error(tfds_mnist, no_network, tmp_path):
    with pytest.raises(FileNotFoundError, match="fashion_mnist is not prepared") as error:
        data.load("fashion_mnist", "test", data_dir=tmp_path)
    assert "embedded" not in str(error.value)


def test_without_tensorflow_datasets_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "advjax.data.tfds_mnist", raising=False)
    monkeypatch.delattr(data, "tfds_mnist", raising=False)
    with pytest.raises(ImportError, match=r'pip install "advjax\[experiments\]"'):
        data.load("mnist", "test", source="tfds")
    with pytest.warns(UserWarning, match=r'pip install "advjax\[experiments\]"'):
        assert data.load("mnist", "test").source == "embedded"


def test_data_prepared_in_a_format_that_takes_tensorflow_are_named(tfds_mnist, tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    builder = tfds_mnist.BUILDERS["mnist"](data_dir=tmp_path)
    splits = [{"name": "test", "shardLengths": ["1"], "filepathTemplate": "{DATASET}.{FILEFORMAT}"}]
    info = {"name": "mnist", "version": "3.0.1", "fileFormat": "tfrecord", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(builder.info.features.to_json()))
    (folder / "mnist.tfrecord").touch()
    with pytest.raises(OSError, match=r"without TensorFlow.*TFRECORD"):
        data.load("mnist", "test", source="tfds", data_dir=tmp_path)


# --- the cache -------------------------------------------------------------------------------


@full_set
def test_a_second_load_reads_the_cache(tfds_mnist, monkeypatch):
    first = data.load("mnist", "test", data_dir=PREPARED)
    monkeypatch.setattr(tfds_mnist, "read", lambda *args: pytest.fail("decoded again"))
    second = data.load("mnist", "test", data_dir=PREPARED)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)


def examples():
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(50, 28, 28, 1)).astype(np.uint8), np.arange(50, dtype=np.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: b"",
        lambda contents: contents[: len(contents) // 2],
        lambda contents: contents[:9_000] + bytes([contents[9_000] ^ 1]) + contents[9_001:],
    ],
    ids=["emptied", "truncated", "one bit flipped"],
)
def test_a_damaged_cache_is_rebuilt(cache_dir, damage):
    built = examples()
    cache.arrays("some.npz", lambda: built)
    (file,) = cache_dir.iterdir()  # and nothing unfinished is left beside it
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    for read, expected in zip(cache.arrays("some.npz", lambda: built), built, strict=True):
        np.testing.assert_array_equal(read, expected)
    assert file.read_bytes() == intact


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached"):
        images, labels = cache.arrays("some.npz", examples)
    assert (len(images), len(labels)) == (50, 50)


@full_set
def test_other_contents_in_the_same_place_are_not_taken_from_the_cache(tmp_path):
    def install(name):
        folder = tmp_path / "tfds" / "mnist" / "3.0.1"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (PREPARED / name / "3.0.1").iterdir():
            target = folder / file.name.replace("fashion_mnist", "mnist")
            target.write_bytes(file.read_bytes().replace(b'"fashion_mnist"', b'"mnist"'))

    install("mnist")
    digits = data.load("mnist", "test", data_dir=tmp_path / "tfds")
    install("fashion_mnist")
    clothes = data.load("mnist", "test", data_dir=tmp_path / "tfds")
    assert not np.array_equal(digits.images, clothes.images)
    np.testing.assert_array_equal(
        clothes.images, data.load("fashion_mnist", "test", data_dir=PREPARED).images
    )


# --- bad arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar10"}, "name: 'cifar10', expected one of mnist, fashion_mnist"),
        ({"split": "validation"}, "split: 'validation', expected one of train, test"),
        ({"source": "web"}, "source: 'web', expected one of auto, tfds, embedded"),
        ({"name": "fashion_mnist", "source": "embedded"}, "not embedded, expected mnist"),
    ],
)
def test_an_unknown_choice_lists_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**{"name": "mnist", "split": "test"} | arguments)

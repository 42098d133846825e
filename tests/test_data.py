"""Datasets: their own files, downloads over a loopback URL, folders, synthetic images, splits."""

import ctypes
import fcntl
import gzip
import hashlib
import http.server
import itertools
import multiprocessing
import pickle
import queue
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import records
import train_cifar
import train_mnist

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

TRAIN_LABELS = "train-labels-idx1-ubyte"
IDX = ["train-images-idx3-ubyte", TRAIN_LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
FRESH = [train_mnist, "--data-dir", "fresh"]


def load(script, *argv, part="train"):
    """The `part` of the dataset, all its training images; with "both" they are cut in two."""
    args = script.parse_arguments([str(argument) for argument in argv])
    wanted = ("test",) if part == "test" else ("train", "val")
    if part == "train":
        args.val_size = 0
    data = common.load_data(args, script.synthetic, wanted)
    return (data.train, data.val) if part == "both" else getattr(data, part)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends one of its server's `files`, with its `fault`, and waits in the middle for its `gate`."""

    def do_GET(self):
        server = self.server
        content = self.server.files[self.path[1:]]
        if server.fault == "offline":
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.headers["Method"] != "HEAD":  # so torchvision asks whether it is sent elsewhere
            half = len(content) // 2
            self.wfile.write(content[:half])
            server.events.put(self.path[1:])
            server.gate.wait()
            self.wfile.write(b"" if server.fault == "cut" else content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch):
    """A data directory with CIFAR-10's files, of 20 images a batch."""
    batches = tmp_path / "data/cifar-10-batches-py"
    random = np.random.default_rng(0)
    batches.mkdir(parents=True)
    content = {"batches.meta": {"label_names": list("abcdefghij")}}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        content[name] = {"labels": [i % 10 for i in range(20)], "data": pixels}
    for name, value in content.items():
        (batches / name).write_bytes(pickle.dumps(value))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


@pytest.fixture
def origin(mnist_dir, monkeypatch):
    """The server from which torchvision downloads in this test what is in that directory."""
    files = {
        f"{name}.gz": gzip.compress((mnist_dir / "MNIST/raw" / name).read_bytes()) for name in IDX
    }
    md5 = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = files
        server.fault = None
        server.gate = threading.Event()
        server.events = queue.Queue()
        server.gate.set()
        server.handle_error = lambda *_: None  # of a client that was killed
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        monkeypatch.setattr(datasets.MNIST, "resources", md5)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_files_of_mnist_and_cifar_are_read_as_they_are(cifar_dir, mnist_dir):
    for script, theirs in ((train_mnist, datasets.MNIST), (train_cifar, datasets.CIFAR10)):
        for part in ("train", "test"):
            found = load(script, "--data-dir", "data", part=part)
            expected = theirs("data", train=part == "train")
            pixels = found.images.permute(0, 2, 3, 1).squeeze(3)
            assert np.array_equal(pixels, expected.data)
            assert np.array_equal(found.labels, expected.targets)
            assert found.classes == expected.classes


@pytest.mark.parametrize("name", IDX)
def test_damage_is_told_before_the_training(origin, name):
    origin.fault = "offline"
    path = Path("data/MNIST/raw", name)
    content = path.read_bytes()
    damaged = [content[:-1], content + b"0", b"<html>", None]
    if name == TRAIN_LABELS:  # one label alone, a label of 10
        damaged += [b"\0\0\x08\x01\0\0\0\x01\0", content[:-1] + b"\x0a"]
    for damage in damaged:
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(records.RunError, match="data/MNIST/raw"):
            run(train_mnist, "--data-dir", "data", "--quiet")
    assert not Path("runs").exists()


@pytest.mark.parametrize("terminal, quiet", [(True, False), (True, True), (False, False)])
def test_a_download_is_made_once_and_shown_on_a_terminal_only(
    origin, quiet, terminal, monkeypatch, capfd
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load(*FRESH, *["--quiet"] * quiet)
    out, err = capfd.readouterr()
    assert bool(err) == (terminal and not quiet)
    assert not out
    assert [origin.events.get() for _ in IDX] == [*origin.files]
    origin.fault = "offline"
    assert len(load(*FRESH, part="test")) == 50


@pytest.mark.parametrize("fault", ["cut", "offline", "killed"])
def test_what_a_failed_download_leaves_is_never_taken_for_data(origin, fault):
    origin.fault = fault
    if fault == "killed":
        origin.gate.clear()
        # Forked processes share tqdm's own lock: one that dies could hold it for ever.
        tqdm.set_lock(threading.RLock())
        process = multiprocessing.get_context("fork").Process(target=load, args=FRESH)
        process.start()
        origin.events.get(timeout=100)
        process.kill()
        process.join()
        origin.gate.set()
    else:
        with pytest.raises(records.RunError, match="fresh/"):
            run(*FRESH, "--quiet")
    origin.fault = None
    assert len(load(*FRESH)) == 200


def test_a_second_download_waits_for_the_first(origin, monkeypatch):
    def noted(*arguments):
        origin.events.put("lock")
        flock(*arguments)

    flock = fcntl.flock
    events = iter(lambda: origin.events.get(timeout=100), None)
    monkeypatch.setattr(fcntl, "flock", noted)
    origin.gate.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(load, *FRESH)
        assert [next(events), next(events)] == ["lock", f"{IDX[0]}.gz"]
        second = pool.submit(load, *FRESH)
        assert next(events) == "lock"
        origin.gate.set()
        assert len(first.result()) == len(second.result()) == 200
    assert origin.events.qsize() == 3


def pictures(root, counts, level=None):
    """Grey images, `counts[name]` in root/name: all of one `level`, or counted through from 0."""
    levels = itertools.count() if level is None else itertools.repeat(level)
    for name, count in counts.items():
        Path(root, name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), next(levels) % 256).save(Path(root, name, f"{i}.png"))


def counting_images():
    """Code for a script: it writes an x to the file `decoded` for each image that Pillow opens."""
    return f"""
from PIL import Image
opened = Image.open
def counting(*arguments, **options):
    with open({str(Path("decoded").absolute())!r}, "a") as file:
        file.write("x")
    return opened(*arguments, **options)
Image.open = counting
"""


def test_an_image_of_any_mode_comes_upright_in_its_colours_on_white():
    def as_read(name, grey=False):
        return common.read_image(Path(name), 8, grey)

    for mode, colour, expected in (
        ("I;16", 80 * 257, [80] * 3),
        ("RGBA", (9, 8, 7, 255), [9, 8, 7]),
        ("RGBA", (9, 9, 9, 0), [255] * 3),
        ("LA", (0, 51), [204] * 3),
        ("P", "red", [255, 0, 0]),
        ("P", 0, [255] * 3),
    ):
        options = {"transparency": 0} if colour == 0 else {}
        Image.new(mode, (20, 30), colour).save("a.png", **options)
        assert as_read("a.png").flatten(1).T.tolist() == [expected] * 64, mode
        assert as_read("a.png", grey=True).shape == (1, 8, 8)
    photo = Image.linear_gradient("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo.rotate(90).save("turned.png", exif=exif)
    photo.save("plain.png")
    assert torch.equal(as_read("plain.png"), as_read("turned.png"))


def test_a_jpeg_that_is_read_in_half_of_its_size_looks_as_the_whole():
    dots = np.random.default_rng(0).integers(0, 256, (240, 240), dtype=np.uint8)
    for name in ("photo.jpg", "photo.png"):
        Image.fromarray(dots).resize((960, 960)).save(name)
    half = common.read_image(Path("photo.jpg"), 240, grey=True).float()
    whole = common.read_image(Path("photo.png"), 240, grey=True).float()
    assert (half - whole).abs().mean() < 6


def test_the_parts_are_stratified_apart_and_drawn_with_the_seed_what_is_left_over_by_lot():
    # Of each class that is not divided yet, a tenth tests, and one image at least.
    pictures("many", {**{f"{label}": 5 for label in range(10)}, "large": 50})
    argv = (train_mnist, "--dataset", "many", "--image-size", 8)
    draws = set()
    lots = set()
    for seed in range(8):
        train, val = load(*argv, "--seed", seed, part="both")
        parts = (train, val, load(*argv, "--seed", seed, part="test"))
        levels = [int(level) for part in parts for level in part.images[:, 0, 0, 0]]
        labels = [int(label) for part in parts for label in part.labels]
        assert [*map(len, parts)] == [77, 8, 15]
        assert sorted(levels) == [*range(100)]
        assert labels == [min(level // 5, 10) for level in levels]
        assert labels[85:] == [*range(10), *[10] * 5]
        assert 4 <= labels[77:85].count(10) <= 5  # of 4.2
        draws.add(tuple(levels[77:85]))
        lots.add(tuple(labels[77:85]))
    assert len(draws) == 8
    assert len(lots) > 1
    assert len({level % 5 for level in levels[85:95]}) > 1, "not always the first of a class"
    limited, same = load(*argv, "--seed", 7, "--limit-train", 40, part="both")
    assert (limited.labels == 10).sum() in (21, 22)  # of 21.3
    assert torch.equal(same.images, val.images)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone counts so")
def test_a_folder_takes_little_more_than_its_pixels_while_it_is_loaded():
    def memory(kind):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{kind}:\s*(\d+)", status)[1])

    pictures("large", {"a": 150, "b": 150})
    argv = train_cifar, "--dataset", "large", "--image-size"
    load(*argv, 8)  # what this imports does not count
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    # Images so large that whatever else takes memory counts little.
    assert len(load(*argv, 640)) == 270
    assert memory("VmHWM") - before < 1.5 * 270 * 3 * 640**2


def test_the_checksum_is_of_every_pixel_and_label_in_any_layout():
    images = torch.arange(1890).view(10, 3, 9, 7).byte()
    labels = torch.arange(10)
    pixel = images.clone()
    pixel[9, 2, 8, 6] += 1
    layout = images.contiguous(memory_format=torch.channels_last)
    sets = [(images, labels), (layout, labels), (pixel, labels), (images, labels.roll(1))]
    first, *others = (common.ImageSet(*each, []).checksum for each in sets)
    assert [other == first for other in others] == [True, False, False]


def test_normalize_dataset_takes_mean_and_std_of_the_training_part(few_images):
    argv = ["--dataset", "synthetic", "--normalize", "dataset", "--model", "cnn", "--epochs", 1]
    directory, *_ = run(train_cifar, *argv, "--quiet")
    values = load(train_cifar, *argv, part="both")[0].images.double() / 255
    best = records.load_checkpoint(directory / "best.pt")
    assert best["mean"] == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-7)
    assert best["std"] == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-7)


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_synthetic_images_are_always_the_same_and_have_to_be_learnt(script):
    train = script.synthetic(True)
    test = script.synthetic(False)
    assert torch.equal(test.images, script.synthetic(False).images)
    assert not torch.equal(test.images, train.images[: len(test)])
    pixels = train.images.flatten(1).float()
    means = torch.stack([pixels[train.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(test.images.flatten(1).float(), means).argmin(1)
    # The nearest mean needs no learning.
    assert (nearest == test.labels).float().mean() < 0.67

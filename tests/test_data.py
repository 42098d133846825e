"""Datasets: their own files, downloads over a loopback URL, folders, synthetic images, splits."""

import ctypes
import functools
import gzip
import hashlib
import http.server
import itertools
import multiprocessing
import pickle
import re
import signal
import socket
import sys
import threading
import time
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
    if part == "train":
        args.val_size = 0
    wanted = ("test",) if part == "test" else ("train", "val")
    data = common.load_data(args, script.synthetic, wanted)
    if part == "both":
        return data.train, data.val
    return getattr(data, part)


# ------------------------ Datasets with a name ------------------------
def test_the_files_of_mnist_and_cifar_are_read_as_they_are(mnist_dir, monkeypatch):
    """Each image, with its label and its colours, is what torchvision reads."""
    # CIFAR-10's own files, of 20 images each.
    batches = mnist_dir / "cifar-10-batches-py"
    batches.mkdir()
    random = np.random.default_rng(0)
    classes = pickle.dumps({"label_names": list("abcdefghij")})
    (batches / "batches.meta").write_bytes(classes)
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        content = pickle.dumps({"labels": [*range(10)] * 2, "data": pixels})
        (batches / name).write_bytes(content)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)

    for script, theirs in ((train_mnist, datasets.MNIST), (train_cifar, datasets.CIFAR10)):
        for part in ("train", "test"):
            found = load(script, "--data-dir", "data", part=part)
            expected = theirs("data", train=part == "train")
            pixels = found.images.permute(0, 2, 3, 1).squeeze(3)
            assert np.array_equal(pixels, expected.data)
            assert np.array_equal(found.labels, expected.targets)
            assert found.classes == expected.classes


def test_normalize_dataset_takes_mean_and_std_of_the_training_part(few_images):
    """Those of each channel, without the images that validate."""
    argv = ["--dataset", "synthetic", "--normalize", "dataset", "--model", "cnn", "--epochs", 1]
    directory, *_ = run(train_cifar, *argv, "--quiet")
    train, _ = load(train_cifar, *argv, part="both")
    std, mean = torch.std_mean(train.images.double() / 255, (0, 2, 3), correction=0)
    best = records.load_checkpoint(directory / "best.pt")
    assert best["mean"] == pytest.approx(mean.tolist(), abs=1e-7)
    assert best["std"] == pytest.approx(std.tolist(), abs=1e-7)


def test_the_checksum_is_of_every_pixel_and_label_in_any_layout():
    """So a run is known to go on with its own images."""
    images = torch.arange(1890).view(10, 3, 9, 7).byte()
    labels = torch.arange(10)

    def checksum(images, labels=labels):
        return common.ImageSet(images, labels, []).checksum

    first = checksum(images)
    assert checksum(images.contiguous(memory_format=torch.channels_last)) == first
    assert checksum(images, labels.roll(1)) != first
    images[9, 2, 8, 6] += 1
    assert checksum(images) != first


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_the_synthetic_test_images_are_not_the_training_images(script):
    """The first of them are not the first training images drawn again."""
    train = script.synthetic(True)
    test = script.synthetic(False)
    same = train.labels[: len(test)] == test.labels
    assert same.float().mean() < 0.2


# ------------------------ Damage, downloads ------------------------
class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends a file, and in the middle of it calls its server's `in_the_middle` with the name."""

    def copyfile(self, source, output):
        if self.headers["Method"] == "HEAD":  # so torchvision asks whether it is sent elsewhere
            return
        content = source.read()
        half = len(content) // 2
        output.write(content[:half])
        self.server.in_the_middle(self.path[1:])
        output.write(content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def origin(mnist_dir, monkeypatch):
    """The server from which torchvision downloads in this test what is in that directory."""
    resources = []
    for name in IDX:
        content = gzip.compress((mnist_dir / "MNIST/raw" / name).read_bytes())
        (mnist_dir / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    handler = functools.partial(Handler, directory=mnist_dir)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.in_the_middle = lambda name: None
        server.handle_error = lambda *_: None  # of a client that was killed
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def go_offline(monkeypatch):
    """Have torchvision ask where nobody answers."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.mark.parametrize("name", IDX)
def test_damage_is_told_before_the_training(mnist_dir, monkeypatch, name):
    """A file that is cut off, too long, another or missing is named, those of the test set too."""
    go_offline(monkeypatch)
    path = mnist_dir / "MNIST/raw" / name
    content = path.read_bytes()
    damaged = [content[:-1], content + b"0", b"<html>", None]
    if name == TRAIN_LABELS:  # one label alone, a label of 10
        damaged += [b"\0\0\x08\x01\0\0\0\x01\0", content[:-1] + b"\x0a"]
    for damage in damaged:
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(records.RunError, match="data/MNIST/raw"):
            run(train_mnist, "--data-dir", "data", "--quiet")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("terminal", "flags", "is_shown"),
    [
        (True, [], True),
        (True, ["--quiet"], False),
        (False, [], False),
    ],
)
def test_a_download_is_made_once_and_shown_on_a_terminal_only(
    origin, monkeypatch, capfd, terminal, flags, is_shown
):
    """A log file does not fill with bars, and the second run needs no network."""
    socket.setdefaulttimeout(None)
    sent = []
    origin.in_the_middle = sent.append
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load(*FRESH, *flags)
    out, err = capfd.readouterr()
    assert not out
    assert bool(err) == is_shown
    assert sent == [f"{name}.gz" for name in IDX]
    assert 0 < socket.getdefaulttimeout() <= 600, "a server that falls silent holds no run for ever"
    go_offline(monkeypatch)
    assert len(load(*FRESH, part="test")) == 50


def test_what_a_failed_download_leaves_is_never_taken_for_data(origin, monkeypatch):
    """Without a network, cut off, or killed: the next run downloads it again."""
    with monkeypatch.context() as patch, pytest.raises(records.RunError, match="fresh/"):
        go_offline(patch)
        run(*FRESH, "--quiet")

    def cut_off(name):
        raise ConnectionError

    origin.in_the_middle = cut_off
    with pytest.raises(records.RunError, match="fresh/"):
        run(*FRESH, "--quiet")

    # Forked processes share tqdm's own lock: one that dies could hold it for ever.
    tqdm.set_lock(threading.RLock())
    process = multiprocessing.get_context("fork").Process(target=load, args=FRESH)
    origin.in_the_middle = lambda name: process.kill()
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    origin.in_the_middle = lambda name: None
    assert len(load(*FRESH)) == 200


def test_two_downloads_at_once_are_one(origin):
    """Two runs that are started together do not write the same files."""

    def pause(name):
        sent.append(name)
        time.sleep(0.2)

    # Both begin while the first file is under way.
    sent = []
    origin.in_the_middle = pause
    with ThreadPoolExecutor() as pool:
        parts = [pool.submit(load, *FRESH) for _ in range(2)]
        assert [len(part.result()) for part in parts] == [200, 200]
    assert sent == [f"{name}.gz" for name in IDX]


# ------------------------ Images from files ------------------------
def pictures(root, counts, level=None):
    """Grey images, `counts[name]` in root/name: all of one `level`, or counted through from 0."""
    levels = itertools.count() if level is None else itertools.repeat(level)
    for name, count in counts.items():
        Path(root, name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), next(levels) % 256).save(Path(root, name, f"{i}.png"))


def test_an_image_of_any_mode_comes_upright_in_its_colours_on_white():
    """What is transparent shows the white of a page; a photo of a phone is turned as it says."""

    def as_read(name):
        return common.read_image(Path(name), 8, grey=False)

    for mode, colour, expected in (
        ("I;16", 80 * 257, "#505050"),
        ("RGBA", (9, 9, 9, 0), "white"),
        ("LA", (0, 51), "#cccccc"),
        ("P", "red", "red"),
        ("P", 0, "white"),
    ):
        options = {"transparency": 0} if colour == 0 else {}
        Image.new(mode, (20, 30), colour).save("a.png", **options)
        wanted = np.asarray(Image.new("RGB", (8, 8), expected))
        assert np.array_equal(as_read("a.png").permute(1, 2, 0), wanted), mode

    # The two files have the same pixels when they are upright.
    photo = Image.linear_gradient("L")
    photo.save("plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo.rotate(90).save("turned.png", exif=exif)
    assert torch.equal(as_read("plain.png"), as_read("turned.png"))


@pytest.mark.parametrize(
    ("few", "all_colours"),
    [
        ("P", "RGB"),
        ("1", "L"),
    ],
)
def test_an_image_of_few_colours_gets_all_of_them_before_it_is_resized(few, all_colours):
    """A GIF, or a scan in black and white, is smoothed as any other image is."""
    noise = Image.effect_noise((48, 48), 200)
    image = Image.merge("RGB", [noise, noise.rotate(90), noise]).convert(few)
    image.save("few.png")
    found = common.read_image(Path("few.png"), 16, all_colours == "L")

    expected = image.convert(all_colours).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(found.permute(1, 2, 0).squeeze(), expected)


def test_a_jpeg_that_is_read_in_half_of_its_size_looks_as_the_whole():
    """A large photo is decoded at a smaller size, which is quicker, and seldom seen."""
    dots = np.random.default_rng(0).integers(0, 256, (240, 240), dtype=np.uint8)
    images = []
    for name in ("photo.jpg", "photo.png"):
        Image.fromarray(dots).resize((960, 960)).save(name)
        images.append(common.read_image(Path(name), 240, grey=True).float())
    half, whole = images
    assert (half - whole).abs().mean() < 6


def test_the_parts_are_stratified_apart_and_drawn_with_the_seed_what_is_left_over_by_lot():
    """Of each class that is not divided yet, a tenth tests, and one image at least."""
    # Ten classes of 5, and one of 50. No two images have the same level.
    pictures("many", {**dict.fromkeys("0123456789", 5), "large": 50})
    argv = [train_mnist, "--dataset", "many", "--image-size", 8, "--seed"]
    draws = set()
    lots = set()
    for seed in range(8):
        train, val = load(*argv, seed, part="both")
        test = load(*argv, seed, part="test")
        assert (len(train), len(val), len(test)) == (77, 8, 15)

        # Each image is in one of them, under its own class.
        levels = []
        for part in (train, val, test):
            found = part.images[:, 0, 0, 0].tolist()
            assert part.labels.tolist() == [min(level // 5, 10) for level in found]
            levels += found
        assert sorted(levels) == [*range(100)]

        # Each class has its share; that of the large one is 4.2 of those that validate.
        assert test.labels.tolist() == [*range(10), *[10] * 5]
        assert (val.labels == 10).sum() in (4, 5)
        draws.add(val.checksum)
        lots.add(tuple(val.labels.tolist()))
    assert len(draws) == 8
    assert len(lots) > 1

    # So it has of fewer training images, 21.3, and the others stay what they were.
    limited, same = load(*argv, seed, "--limit-train", 40, part="both")
    assert (limited.labels == 10).sum() in (21, 22)
    assert same.checksum == val.checksum


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone counts so")
def test_a_folder_takes_little_more_than_its_pixels_while_it_is_loaded():
    """A folder of two thirds of the memory can be trained on."""

    def memory(kind):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{kind}:\s*(\d+)", status)[1])

    pictures("large", {"a": 150, "b": 150})
    argv = [train_cifar, "--dataset", "large", "--image-size"]
    load(*argv, 8)  # what this imports does not count
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    # Images so large that whatever else takes memory counts little.
    assert len(load(*argv, 640)) == 270
    assert memory("VmHWM") - before < 1.5 * 270 * 3 * 640**2

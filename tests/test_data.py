"""Datasets: their own file formats, downloads over a loopback URL, folders, synthetic images, splits."""

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
import shutil
import sys
import tarfile
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

IDX = [
    f"{part}-ubyte"
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
]
ARCHIVES = {train_mnist: [f"{name}.gz" for name in IDX], train_cifar: ["cifar-10-python.tar.gz"]}
IMAGES = {train_mnist: 200, train_cifar: 100}
both_scripts = pytest.mark.parametrize("script", [train_mnist, train_cifar])


def load(script, *argv, part="train"):
    """The `part` of the dataset, all its training images; with "both" they are cut in two."""
    args = script.parse_arguments([str(argument) for argument in argv])
    wanted = ("test",) if part == "test" else ("train", "val")
    if part == "train":
        args.val_size = 0
    data = common.load_data(args, script.synthetic, wanted)
    return (data.train, data.val) if part == "both" else getattr(data, part)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends one of its server's `files`, with its `fault`, and waits in the middle until its `gate` is open."""

    def do_GET(self):
        server, content = self.server, bytearray(self.server.files[self.path[1:]])
        half = len(content) // 2
        content[half] ^= server.fault == "altered"
        if server.fault == "offline":
            return
        self.send_response(404 if server.fault == "404" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.headers["Method"] != "HEAD":  # so torchvision asks whether it is sent elsewhere
            self.wfile.write(content[:half])
            server.events.put(self.path[1:])
            server.gate.wait()
            self.wfile.write(b"" if server.fault == "cut" else content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def cifar_dir(tmp_path):
    """A data directory with CIFAR-10's archive, of 20 images a batch, and with what it holds."""
    batches, random = tmp_path / "origin" / "cifar-10-batches-py", np.random.default_rng(0)
    batches.mkdir(parents=True)
    content = {"batches.meta": {"label_names": list("abcdefghij")}}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        content[name] = {"labels": [i % 10 for i in range(20)], "data": pixels}
    for name, value in content.items():
        (batches / name).write_bytes(pickle.dumps(value, protocol=2))
    with tarfile.open(f"{batches.parent}/{ARCHIVES[train_cifar][0]}", "w:gz") as archive:
        archive.add(batches, batches.name)
    return batches.parent


@pytest.fixture
def origin(cifar_dir, mnist_dir, monkeypatch):
    """The server from which torchvision downloads in this test what is in these directories."""
    cifar, mnist = datasets.CIFAR10, datasets.MNIST
    files = {path.name: path.read_bytes() for path in cifar_dir.rglob("*") if path.is_file()}
    files |= {
        f"{path.name}.gz": gzip.compress(path.read_bytes())
        for path in (mnist_dir / "MNIST/raw").iterdir()
    }
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.fault, server.gate, server.events = (
            files,
            None,
            threading.Event(),
            queue.Queue(),
        )
        server.gate.set()
        server.handle_error = lambda *_: None  # of a client that was killed
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(mnist, "mirrors", [url])
        monkeypatch.setattr(
            mnist, "resources", [(name, md5[name]) for name in ARCHIVES[train_mnist]]
        )
        monkeypatch.setattr(cifar, "url", url + cifar.filename)
        monkeypatch.setattr(cifar, "tgz_md5", md5[cifar.filename])
        monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5["batches.meta"]})
        for part in ("train_list", "test_list"):
            monkeypatch.setattr(
                cifar, part, [[name, md5[name]] for name, _ in getattr(cifar, part)]
            )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_files_of_mnist_and_cifar_are_read_as_they_are(origin):
    for script, theirs, folder in (
        (train_mnist, datasets.MNIST, "data"),
        (train_cifar, datasets.CIFAR10, "origin"),
    ):
        for part, count in (
            ("train", IMAGES[script]),
            ("test", {"data": 50, "origin": 20}[folder]),
        ):
            found, expected = (
                load(script, "--data-dir", folder, part=part),
                theirs(folder, train=part == "train"),
            )
            assert (
                found.images.dtype == torch.uint8
                and found.labels.dtype == torch.int64
                and len(found) == count
            )
            assert np.array_equal(found.images.permute(0, 2, 3, 1).squeeze(3), expected.data)
            assert (
                np.array_equal(found.labels, expected.targets) and found.classes == expected.classes
            )


@pytest.mark.parametrize("name", [*IDX, "data_batch_3", "test_batch"])
def test_damage_is_told_before_the_training(origin, cifar_dir, name):
    origin.fault, mnist = "offline", name in IDX
    script, folder = (
        (train_mnist, "data/MNIST/raw") if mnist else (train_cifar, "origin/cifar-10-batches-py")
    )
    path, content = Path(folder, name), Path(folder, name).read_bytes()
    (cifar_dir / ARCHIVES[train_cifar][0]).unlink()
    damaged = [content[:-1], content + b"0", b"", b"<html>", None]
    if name == IDX[1]:
        damaged += [
            b"\0\0\x08\x01\0\0\0\x01\0",
            content[:-1] + b"\x0a",
        ]  # one label alone, a label of 10
    for damage in damaged:
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(records.RunError, match=folder):
            run(script, "--data-dir", "data" if mnist else "origin", "--quiet")
    assert not Path("runs").exists()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("quiet", [["--quiet"], []])
@both_scripts
def test_a_download_is_made_once_and_shown_on_a_terminal_only(
    origin, script, quiet, terminal, monkeypatch, capfd
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert len(load(script, "--data-dir", "fresh", *quiet)) == IMAGES[script]
    out, err = capfd.readouterr()
    assert bool(err) == (terminal and not quiet) and not out
    assert [origin.events.get() for _ in ARCHIVES[script]] == ARCHIVES[script]
    origin.fault = "offline"
    assert len(load(script, "--data-dir", "fresh", part="test")) in (50, 20)
    for path in Path("fresh").rglob("*[!z]"):  # all but the archives
        path.is_dir() or path.unlink()
    assert len(load(script, "--data-dir", "fresh")) == IMAGES[script], (
        "an archive that lies there is used"
    )


@pytest.mark.parametrize("fault", ["cut", "altered", "404", "offline", "killed"])
@both_scripts
def test_what_a_failed_download_leaves_is_never_taken_for_data(origin, script, fault):
    argv, origin.fault = (script, "--data-dir", "fresh"), fault
    if fault == "killed":
        origin.gate.clear()
        tqdm.set_lock(
            threading.RLock()
        )  # its own is shared with forked ones: one that dies could hold it for ever
        process = multiprocessing.get_context("fork").Process(target=load, args=argv)
        process.start()
        assert origin.events.get(timeout=100) == ARCHIVES[script][0]
        process.kill()
        process.join()
        origin.gate.set()
    else:
        with pytest.raises(records.RunError) as failure:
            run(*argv, "--quiet")
        assert all(
            part in str(failure.value) for part in ("fresh/", "see README", "--dataset synthetic")
        )
    origin.fault = None
    assert len(load(*argv)) == IMAGES[script]


def test_a_second_download_waits_for_the_first(origin, monkeypatch):
    flock = fcntl.flock
    monkeypatch.setattr(
        fcntl, "flock", lambda *arguments: origin.events.put("lock") or flock(*arguments)
    )
    origin.gate.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(load, train_cifar, "--data-dir", "fresh")
        events = list(iter(lambda: origin.events.get(timeout=100), ARCHIVES[train_cifar][0]))
        second = pool.submit(load, train_cifar, "--data-dir", "fresh")
        events.append(origin.events.get(timeout=100))
        origin.gate.set()
        assert len(first.result()) == len(second.result()) == 100
    assert events == ["lock", "lock"] and origin.events.empty()


def pictures(root, counts, level=None):
    """Grey images, `counts[name]` in root/name: all of one `level`, or counted through from 0."""
    levels = itertools.count() if level is None else itertools.repeat(level)
    for name, count in counts.items():
        Path(root, name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), next(levels) % 256).save(Path(root, name, f"{i}.png"))


def counting_images():
    """Code for a script: it writes an x to the file `decoded`, here, for each image that Pillow opens."""
    return f"""
from PIL import Image
opened = Image.open
def counting(*arguments, **options):
    with open({str(Path("decoded").absolute())!r}, "a") as file:
        file.write("x")
    return opened(*arguments, **options)
Image.open = counting
"""


def test_a_run_on_a_folder_skips_what_is_no_image_and_names_a_broken_one(capfd):
    pictures("photos", {"red ones": 20, "blåa/deeper": 19})
    Image.new("RGB", (64, 48)).save("photos/blåa/LAST.JPG")
    for stray in (
        "Thumbs.db",
        "red ones/notes.txt",
        "blåa/.DS_Store",
        "red ones/.cache/0.png",
        ".hidden/0.png",
    ):
        Path("photos", stray).parent.mkdir(exist_ok=True)
        Path("photos", stray).write_text("no image")
    argv = "--dataset", "photos", "--val-size", 0.2, "--epochs", 1, "--batch-size", 10, "--quiet"
    directory, record, _ = run(train_cifar, *argv)
    assert (
        record["data"].items()
        >= {"name": str(Path("photos").absolute()), "train": 29, "val": 7, "test": 4}.items()
    )
    assert records.load_checkpoint(directory / "best.pt")["classes"] == ["blåa", "red ones"]
    for path in Path("photos/red ones").glob("*.png"):
        path.write_bytes(b"\x89PNG and no more")
    with pytest.raises(
        records.RunError,
        match=r"20 of 40 files cannot be used: red ones/0.png \(cannot identify image file\), ",
    ):
        run(train_cifar, *argv)
    assert capfd.readouterr() == ("", "")


def test_the_parts_of_a_folder_are_used_and_a_class_may_be_called_train():
    def parts():
        found = [
            *load(train_mnist, "--dataset", "p", part="both"),
            load(train_mnist, "--dataset", "p", part="test"),
        ]
        return [(len(part), part.images.unique().tolist()) for part in found]

    for part, level, count in (("train", 10, 6), ("val", 20, 2), ("test", 30, 3)):
        pictures(f"p/{part}", {"a": count, "b": count}, level)
    assert parts() == [(12, [10]), (4, [20]), (6, [30])]
    shutil.rmtree("p/val")
    assert parts() == [(11, [10]), (1, [10]), (6, [30])]
    Path("p/test/b").rename("p/test/c")
    with pytest.raises(records.RunError, match="test has classes that train has not: c"):
        parts()
    shutil.rmtree("p/test")
    assert parts() == [(9, [10]), (1, [10]), (2, [10])]
    Path("p/train/b").rename("p/train/train")
    assert load(train_mnist, "--dataset", "p/train").classes == ["a", "train"]


@pytest.mark.parametrize("counts", [{}, {"a": 20}, {"a": 20, "b": 0}])
def test_a_folder_with_too_little_in_it_is_an_error(counts):
    pictures(".", counts)
    with pytest.raises(records.RunError, match="expected at least two classes"):
        load(train_cifar, "--dataset", ".")


def test_an_image_of_any_mode_comes_upright_in_its_colours_on_white():
    for mode, colour, expected, options in [
        ("RGB", (10, 20, 30), [10, 20, 30], {}),
        ("L", 80, [80] * 3, {}),
        ("I;16", 80 * 257, [80] * 3, {}),
        ("1", 1, [255] * 3, {}),
        ("RGBA", (9, 9, 9, 255), [9] * 3, {}),
        ("RGBA", (9, 9, 9, 0), [255] * 3, {}),
        ("LA", (0, 51), [204] * 3, {}),
        ("P", "red", [255, 0, 0], {}),
        ("P", 0, [255] * 3, {"transparency": 0}),
    ]:
        Image.new(mode, (20, 30), colour).save("a.png", **options)
        image = common.read_image(Path("a.png"), 5, grey=False)
        assert image.dtype == torch.uint8 and image.flatten(1).T.tolist() == [expected] * 25, mode
        assert common.read_image(Path("a.png"), 5, grey=True).shape == (1, 5, 5)
    photo, exif = Image.radial_gradient("L").crop((0, 0, 16, 16)), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo.save("plain.png")
    photo.rotate(90).save("turned.png", exif=exif)
    assert torch.equal(
        *(common.read_image(Path(name), 16, grey=True) for name in ("plain.png", "turned.png"))
    )


def test_the_parts_are_stratified_apart_and_drawn_with_the_seed_what_is_left_over_by_lot():
    def fair(part, whole):
        counts, all_counts = (torch.bincount(each, minlength=11) for each in (part, whole))
        return bool(((counts - all_counts * len(part) / len(whole)).abs() < 1).all())

    # Of each class that is not divided yet, a tenth tests, and one image at least.
    pictures("many", {**{f"{label}": 5 for label in range(10)}, "large": 50})
    argv, draws, lots = (train_mnist, "--dataset", "many", "--image-size", 8), set(), set()
    test = load(*argv, part="test")
    for seed in range(8):
        train, val = load(*argv, "--seed", seed, part="both")
        labels = torch.cat([train.labels, val.labels, test.labels])
        parts = [images.images[:, 0, 0, 0] for images in (train, val, test)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(100))
        assert [*map(len, parts)] == [77, 8, 15]
        assert torch.equal(labels, (torch.cat(parts) // 5).clamp(max=10))
        assert test.labels.bincount().tolist() == [1] * 10 + [5] and fair(val.labels, labels[:85])
        draws.add(tuple(parts[1].tolist()))
        lots.add(tuple(val.labels.tolist()))
    assert len(draws) == 8 and len(lots) > 1
    assert len(set((test.images[:10, 0, 0, 0] % 5).tolist())) > 1, "not always the first of a class"
    limited, same_val = load(*argv, "--seed", 7, "--limit-train", 40, part="both")
    assert (
        len(limited) == 40
        and fair(limited.labels, train.labels)
        and torch.equal(same_val.images, val.images)
    )
    assert set(limited.images[:, 0, 0, 0].tolist()) < set(parts[0].tolist())
    for flag, value, message in (
        ("--limit-train", 78, "only 77"),
        ("--val-size", 0.001, "leaves none for validation"),
    ):
        with pytest.raises(records.RunError, match=message):
            load(*argv, flag, value, part="both")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux counts memory so"
)
def test_a_folder_takes_little_more_than_its_pixels_while_it_is_loaded():
    def memory(kind):
        return 1024 * int(re.search(rf"{kind}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    pictures("large", {"a": 150, "b": 150})
    load(
        train_cifar, "--dataset", "large", "--image-size", 8, part="both"
    )  # what this imports does not count
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    # Images so large that whatever else takes memory counts little.
    train, val = load(train_cifar, "--dataset", "large", "--image-size", 640, part="both")
    size = (len(train) + len(val)) * 3 * 640**2
    assert len(train) + len(val) == 270 and memory("VmHWM") - before < 1.5 * size


def test_the_checksum_is_of_every_pixel_and_label_in_any_layout():
    images, labels = torch.arange(1890).view(10, 3, 9, 7).byte(), torch.arange(10)
    layout, pixel = images.contiguous(memory_format=torch.channels_last), images.clone()
    pixel[9, 2, 8, 6] += 1
    sets = [(images, labels), (layout, labels), (pixel, labels), (images, labels.roll(1))]
    same, layout, *changed = (common.ImageSet(*each, []).checksum for each in sets)
    assert same == layout and len({same, *changed}) == 3


def test_normalize_dataset_takes_mean_and_std_of_the_training_part(few_images):
    argv = (
        "--dataset",
        "synthetic",
        "--normalize",
        "dataset",
        "--model",
        "cnn",
        "--epochs",
        1,
        "--quiet",
    )
    directory, *_ = run(train_cifar, *argv)
    values = load(train_cifar, *argv, part="both")[0].images.double() / 255
    best = records.load_checkpoint(directory / "best.pt")
    assert best["mean"] == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-7)
    assert best["std"] == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-7)


@pytest.mark.parametrize("draw", [train_mnist.synthetic_digits, train_cifar.synthetic_shapes])
def test_synthetic_images_follow_from_the_seed_and_have_to_be_learnt(draw):
    train, test = draw(3000, seed=0), draw(1000, seed=1)
    assert torch.equal(train.images, draw(3000, seed=0).images) and not torch.equal(
        train.images[:1000], test.images
    )
    assert torch.bincount(train.labels).min() > 200 and len(train.classes) == 10
    assert (
        train.images.float().std((1, 2, 3)).min() > 2
        and len(train.images.flatten(1).unique(dim=0)) == 3000
    )
    means = torch.stack(
        [train.images[train.labels == c].float().mean(0) for c in range(10)]
    ).flatten(1)
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() < 0.67, (
        "the nearest mean, which needs no learning"
    )

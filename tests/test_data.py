"""Datasets: the real file formats, downloads over a loopback URL, folders, synthetic images, splits."""

import argparse
import functools
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import mnist_arrays, only_run
from PIL import Image

import common
import train_cifar
import train_mnist

QUICK = ("--epochs", 1, "--batch-size", 20, "--quiet")


class Server:
    """A file server on the loopback address, which can break off or alter what it sends."""

    def __init__(self, folder):
        self.requests, self.cut, self.altered = [], None, False
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                path = Path(self.translate_path(self.path))
                if not path.is_file():
                    return self.send_error(404)
                content = bytearray(path.read_bytes())
                if server.altered:
                    content[len(content) // 2] ^= 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: server.cut])

            def log_message(self, *arguments):
                pass

        handler = functools.partial(Handler, directory=folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(folder):
        servers.append(Server(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def arguments(script=train_mnist, *argv):
    return common.parse_arguments(script.build_parser(), [str(argument) for argument in argv])


def load(script, *argv, train=True):
    images, load_test = common.load_dataset(arguments(script, *argv), script.synthetic)
    return images if train else load_test()


def test_mnist_files_are_read_as_they_are(mnist_dir):
    for train, seed, count in ((True, 0, 200), (False, 1, 50)):
        images = load(train_mnist, "--data-dir", mnist_dir, train=train)
        expected, labels = mnist_arrays(seed, count)
        assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert np.array_equal(images.images.numpy()[:, 0], expected) and np.array_equal(images.labels.numpy(), labels)
        assert len(images.classes) == 10


@pytest.mark.parametrize("damage", ["truncated", "longer", "not IDX", "missing"])
def test_a_damaged_mnist_file_is_named(mnist_dir, damage):
    path = mnist_dir / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-1], "longer": content + b"0", "not IDX": b"<html>"}[damage])
    with pytest.raises(common.RunError, match=str(path)):
        load(train_mnist, "--data-dir", mnist_dir)


def test_images_and_labels_of_different_number_are_an_error(mnist_dir):
    raw = mnist_dir / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(common.RunError, match="200 images have 50 labels"):
        load(train_mnist, "--data-dir", mnist_dir)


def test_a_label_out_of_range_is_an_error(mnist_dir):
    path = mnist_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([10]))
    with pytest.raises(common.RunError, match="label"):
        load(train_mnist, "--data-dir", mnist_dir)


def test_cifar_is_downloaded_once_from_a_url_and_then_found(cli, tmp_path, tiny_cifar, patched_checksums, serve):
    server = serve(tiny_cifar.archive.parent)
    url = f"{server.url}/{tiny_cifar.archive.name}"
    done = cli("train_cifar.py", "--data-url", url, *QUICK, md5=tiny_cifar.md5)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    _, record, _ = only_run(tmp_path)
    assert record["data"]["train"] == 90 and record["data"]["val"] == 10 and record["data"]["test"] == 20
    assert server.requests
    server.requests.clear()
    assert len(load(train_cifar, "--data-dir", tmp_path / "data")) == 100
    assert not server.requests
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".download.lock", "cifar-10-batches-py"]


@pytest.fixture
def patched_checksums(tiny_cifar, monkeypatch):
    """torchvision with the checksums of the tiny CIFAR-10, in this process."""
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", tiny_cifar.md5[cifar.filename])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": tiny_cifar.md5["batches.meta"]})
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, name, [[file, tiny_cifar.md5[file]] for file, _ in getattr(cifar, name)])


@pytest.mark.parametrize("fault", ["cut", "altered", "404"])
def test_a_download_that_fails_leaves_nothing_and_the_next_starts_clean(
    tmp_path, tiny_cifar, patched_checksums, serve, fault
):
    stale = tmp_path / "data" / ".download-killed"
    stale.mkdir(parents=True)
    server = serve(tiny_cifar.archive.parent)
    server.cut = 1000 if fault == "cut" else None
    server.altered = fault == "altered"
    url = f"{server.url}/{tiny_cifar.archive.name}"
    missing = f"{server.url}/nothing-here"
    data = tmp_path / "data"
    with pytest.raises(common.RunError, match=r"--data-url .* --dataset synthetic"):
        load(train_cifar, "--data-dir", data, "--data-url", missing if fault == "404" else url)
    assert [path.name for path in data.iterdir()] == [".download.lock"]
    server.cut, server.altered = None, False
    assert len(load(train_cifar, "--data-dir", data, "--data-url", url)) == 100


def test_a_local_archive_and_mnists_folder_of_gz_files(
    tmp_path, tiny_cifar, patched_checksums, mnist_gz_dir, monkeypatch
):
    for number, where in enumerate((tiny_cifar.archive.as_uri(), tiny_cifar.archive, tiny_cifar.archive.parent)):
        assert len(load(train_cifar, "--data-dir", tmp_path / str(number), "--data-url", where)) == 100
    folder, md5 = mnist_gz_dir
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", list(md5.items()))
    assert len(load(train_mnist, "--data-dir", tmp_path / "fresh", "--data-url", folder)) == 200
    assert (tmp_path / "fresh" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file()


def test_a_local_archive_that_is_damaged_is_refused(tmp_path, tiny_cifar, patched_checksums):
    tiny_cifar.archive.write_bytes(tiny_cifar.archive.read_bytes()[:-1])
    with pytest.raises(common.RunError, match="another MD5"):
        load(train_cifar, "--data-dir", tmp_path / "data", "--data-url", tiny_cifar.archive)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".download.lock"]


def test_a_damaged_cifar_batch_is_named(cli, tmp_path, tiny_cifar):
    damaged = tiny_cifar.batches / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    done = cli("train_cifar.py", "--data-dir", tiny_cifar.batches.parent, *QUICK, md5=tiny_cifar.md5)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"{damaged} is damaged" in done.stderr


def test_without_files_and_network_one_line_names_the_ways_out(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("https_proxy", "http://127.0.0.1:9"), ("no_proxy", "")):
        monkeypatch.setenv(name, value)
    for script, folder in ((train_mnist, "MNIST"), (train_cifar, "cifar-10-batches-py")):
        with pytest.raises(common.RunError) as failure:
            script.main(["--quiet"])
        for part in (f"data/{folder}", "--data-url", "--dataset synthetic"):
            assert part in str(failure.value)
    assert not any((tmp_path / "runs").iterdir()) and capfd.readouterr() == ("", "")


def write_image(path, colour, mode="RGB", size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 images in two classes, of several modes and sizes."""
    for i in range(20):
        write_image(tmp_path / "photos" / "red ones" / f"{i}.png", (200 + i, 0, 0))
        write_image(tmp_path / "photos" / "blåa" / f"{i}.jpg", (0, 0, 200 + i), size=(64, 48))
    write_image(tmp_path / "photos" / "blåa" / "grey.png", 80, mode="L")
    (tmp_path / "photos" / "blåa" / ".DS_Store").write_bytes(b"not an image, and hidden")
    return tmp_path / "photos"


def test_a_folder_of_images(tmp_path, photos):
    argv = ["--dataset", photos, *QUICK, "--val-size", 0.2, "--runs-dir", tmp_path / "runs"]
    record = train_cifar.main([str(argument) for argument in argv])
    assert record["data"] | {"checksum": "", "test_checksum": ""} == {
        "name": str(photos), "train": 30, "val": 7, "test": 4, "selection": "validation split", "checksum": "",
        "test_checksum": "",
    }  # fmt: skip


def test_a_folder_without_a_test_part_sets_a_fixed_tenth_of_each_class_aside(photos):
    argv = ("--dataset", photos, "--image-size", 16)
    train, test = load(train_cifar, *argv), load(train_cifar, *argv, train=False)
    assert train.classes == ["blåa", "red ones"] and train.images.shape[1:] == (3, 16, 16)
    assert len(train) == 37 and torch.bincount(test.labels).tolist() == [2, 2]
    reds = torch.cat([s.images[s.labels == 1][:, 0, 0, 0] for s in (train, test)])
    assert sorted(reds.tolist()) == [200 + i for i in range(20)], "each image is in one of the two, in its class"


def test_a_folder_with_train_and_test_parts(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        for name in "ab":
            for i in range(count):
                write_image(tmp_path / part / name / f"{i}.png", (10, 20, 30))
    argv = ("--dataset", tmp_path)
    assert len(load(train_mnist, *argv)) == 12 and len(load(train_mnist, *argv, train=False)) == 6
    assert load(train_mnist, *argv).images.shape[1:] == (1, 28, 28)
    write_image(tmp_path / ".thumbnails" / "0.png", (1, 2, 3))
    (tmp_path / "test" / "a" / "late.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(common.RunError, match=r"late\.png"):
        load(train_mnist, *argv)
    (tmp_path / "test" / "a" / "late.png").unlink()
    write_image(tmp_path / "test" / "c" / "0.png", (1, 2, 3))
    with pytest.raises(common.RunError, match="same classes"):
        load(train_mnist, *argv)
    (tmp_path / "test").rename(tmp_path / "val")
    with pytest.raises(common.RunError, match="only one of the folders train and test"):
        load(train_mnist, *argv)


def test_a_file_that_is_not_an_image_is_named(photos):
    broken = photos / "red ones" / "notes.txt"
    broken.write_text("hello")
    with pytest.raises(common.RunError, match=r"red ones/notes\.txt is not a readable image"):
        load(train_cifar, "--dataset", photos)


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.RunError, match="<class>"):
        load(train_cifar, "--dataset", tmp_path / "empty")


@pytest.mark.parametrize("draw", [train_mnist.synthetic_digits, train_cifar.synthetic_shapes])
def test_synthetic_images_are_the_same_for_a_seed(draw):
    first = draw(3000, seed=0)
    assert torch.equal(first.images, draw(3000, seed=0).images)
    assert not torch.equal(first.images, draw(3000, seed=1).images)
    assert torch.bincount(first.labels).min() > 200 and len(first.classes) == 10
    assert first.images.float().std((1, 2, 3)).min() > 2, "no image is blank"
    assert len(first.images.flatten(1).unique(dim=0)) == 3000


@pytest.mark.parametrize("draw", [train_mnist.synthetic_digits, train_cifar.synthetic_shapes])
def test_synthetic_images_are_not_trivial(draw):
    """The nearest class mean, which needs no learning, gets less than two thirds right."""
    train, test = draw(3000, seed=0), draw(1000, seed=1)
    means = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(10)]).flatten(1)
    nearest = torch.cdist(test.images.float().flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() < 0.67


def test_the_validation_split_is_stratified_seeded_and_apart():
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 195 + [3] * 5)
    images = torch.arange(1000).view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
    images = torch.stack([images[..., 0] // 256, images[..., 1] % 256], -1).byte()
    everything = common.ImageSet(images, labels, list("abcd"))

    def split(**changes):
        args = argparse.Namespace(val_size=0.1, seed=0, limit_train=None, dataset="test")
        vars(args).update(changes)
        return common.split_off_validation(args, everything, load_test=None)

    def identities(image_set):
        return (image_set.images[:, 0, 0, 0].int() * 256 + image_set.images[:, 0, 0, 1]).tolist()

    train, val = split()
    assert torch.bincount(val.labels, minlength=4).tolist() in ([50, 30, 20, 0], [50, 30, 19, 1])
    assert sorted(identities(train) + identities(val)) == list(range(1000))
    assert identities(split()[1]) == identities(val) != identities(split(seed=1)[1])
    limited, same_val = split(limit_train=90)
    with pytest.raises(common.RunError, match="only 900"):
        split(limit_train=901)
    assert len(limited) == 90 and torch.bincount(limited.labels).tolist()[:2] == [45, 27]
    assert set(identities(limited)) <= set(identities(train)) and identities(same_val) == identities(val)


def test_mean_and_std_are_exact():
    images = common.ImageSet(torch.randint(0, 256, (50, 3, 9, 7)).byte(), torch.zeros(50).long(), ["a"])
    mean, std = images.mean_and_std()
    values = images.images.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist())


def test_val_size_zero_selects_on_the_test_set_and_says_so(tmp_path, mnist_dir, capsys):
    argv = [
        "--val-size",
        0,
        "--epochs",
        1,
        "--batch-size",
        20,
        "--data-dir",
        mnist_dir,
        "--runs-dir",
        tmp_path / "runs",
    ]
    record = train_mnist.main([str(argument) for argument in argv])
    assert "the test set selects the epoch" in capsys.readouterr().out
    assert record["data"]["selection"] == "test set" and record["data"]["train"] == 200
    assert record["test"]["acc"] == record["best"]["val_acc"]


def test_normalize_dataset_is_stored_with_the_weights(tmp_path, mnist_dir):
    record = train_mnist.main(
        ["--normalize", "dataset", "--data-dir", str(mnist_dir), "--runs-dir", str(tmp_path / "runs")]
        + [str(argument) for argument in QUICK]
    )
    best = torch.load(Path(record["directory"]) / "best.pt", weights_only=True)
    assert best["mean"] != [0.5] and len(best["std"]) == 1
    assert json.loads((Path(record["directory"]) / "run.json").read_text())["args"]["normalize"] == "dataset"

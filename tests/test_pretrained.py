"""Weights to begin with: of a file, of a run, of ImageNet; frozen, and fine-tuned."""

import shutil
import signal
from pathlib import Path
from urllib.error import URLError

import common
import evaluate
import records
import train_cifar

import pytest
import torch
from conftest import check_same, fails_with_one_line, run
from PIL import Image
from test_data import pictures
from test_files import evaluated
from torchvision import models, transforms

SMALL = "--dataset p --image-size 32 --batch-size 8 --epochs 3 --quiet"
RESNET = f"{SMALL} --model resnet18 --weights weights.pth"


@pytest.fixture(autouse=True)
def photos(undrawn):
    """Two classes of 15 small pictures, in the folder p. Others' pictures are not drawn."""
    pictures("p", {"a": 15, "b": 15})


def weights_file(name="resnet18", classes=1000):
    """Write random weights of a net of torchvision to weights.pth; returns them."""
    torch.manual_seed(7)
    state = models.get_model(name, num_classes=classes).state_dict()
    torch.save(state, "weights.pth")
    return state


def train(flags):
    """The directory, run.json and log of a run."""
    return run(train_cifar, *flags.split())


def fails(flags, **options):
    """The line with which a run ends."""
    return fails_with_one_line(*flags.split(), main=train_cifar.main, **options)


def best(directory):
    return records.load_checkpoint(Path(directory, "best.pt"))


def changed(before, after):
    """The names of the tensors that differ."""
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


# ------------------------ Frozen ------------------------
@pytest.mark.parametrize(
    ("name", "head", "key"),
    [
        ("mobilenet_v3_small", "classifier.3", "state_dict"),
        ("squeezenet1_1", "classifier.1", "model"),  # a convolution
        ("mnasnet0_5", "classifier.1", "model_state_dict"),
        ("regnet_y_400mf", "fc", "weights"),
    ],
)
def test_a_frozen_net_trains_its_last_layer_alone_resumes_and_is_evaluated(
    name, head, key, monkeypatch
):
    """It is a run as others are, but what it has not changed is saved once."""
    # The file has a level more, and the names of several GPUs.
    state = weights_file(name)
    torch.save({key: {f"_orig_mod.module.{name}": state[name] for name in state}}, "weights.pth")
    flags = f"{SMALL} --model {name} --weights weights.pth --freeze --grey"
    whole, record, _ = train(flags)

    # One that is interrupted before its first epoch, and after it, has its own.
    with monkeypatch.context() as patch:
        patch.setattr(common, "train", lambda *_: signal.raise_signal(signal.SIGTERM))
        cut, begun, _ = train(flags)
    assert (begun["status"], begun["epochs"]) == ("interrupted", 0)
    Path("weights.pth").unlink()
    train(f"--resume {cut} --quiet --stop-after 1")
    (cut / "best.pt").unlink()
    train(f"--resume {cut} --quiet")
    check_same(whole, cut)

    # All but the head are those of the file.
    weights = best(whole)["weights"]
    assert weights.keys() == state.keys()
    assert changed(state, weights) == {f"{head}.weight", f"{head}.bias"}
    sizes = {path.name: path.stat().st_size for path in whole.glob("*.pt")}
    assert sizes["best.pt"] + sizes["last.pt"] < sizes["frozen.pt"] / 10

    # What was validated on features is what comes out of pixels, of one grey channel.
    assert best(whole)["image_shape"] == [1, 32, 32]
    for part, expected in (("val", record["best"]["val_acc"]), ("test", record["test"]["acc"])):
        metrics, _ = evaluated(whole, "--split", part)
        assert metrics["accuracy"] == pytest.approx(expected)


def test_frozen_weights_that_were_changed_are_refused():
    """Neither a training nor an evaluation goes on with another run's."""
    weights_file()
    for seed in (1, 2):
        train(f"{RESNET} --freeze --stop-after 1 --run-name r{seed} --seed {seed}")
    shutil.copy("runs/r1/frozen.pt", "runs/r2/frozen.pt")
    refusal = "runs/r2/frozen.pt is not that of this run"
    assert refusal in fails("--resume runs/r2")
    assert refusal in fails_with_one_line("runs/r2", main=evaluate.main)


def test_a_frozen_net_learns_from_mirrored_images_too_but_not_at_flip_0():
    """Classes that are each other's mirror images can be told apart at --flip 0 alone."""
    for path in Path("p").glob("*/*"):
        turned = 90 if path.parent.name == "a" else 270
        Image.linear_gradient("L").rotate(turned).save(path)
    weights_file()
    flags = f"{RESNET} --freeze --epochs 20 --lr 0.01"
    _, _, rows = train(flags)
    assert rows[-1]["train_acc"] < 0.7
    _, _, rows = train(f"{flags} --flip 0")
    assert rows[-1]["train_acc"] == 1


# ------------------------ Fine-tuned ------------------------
def test_a_net_that_is_fine_tuned_learns_its_new_layer_ten_times_as_fast_and_goes_on():
    """The first and the last layer learn, and a run that goes on needs the file no more."""
    state = weights_file()
    flags = f"{RESNET} --lr 0.01 --epochs 2"
    whole, *_ = train(flags)
    cut, *_ = train(f"{flags} --stop-after 1")
    last = records.load_checkpoint(cut / "last.pt")
    rates = {}
    for optimizer in ("optimizer_0", "optimizer_1"):
        (group,) = last[optimizer]["param_groups"]
        rates[group["initial_lr"]] = len(group["params"])
    assert rates == {0.01: 2, 0.001: 60}
    assert changed(state, last["model"]) >= {"conv1.weight", "layer4.1.conv2.weight"}
    Path("weights.pth").unlink()
    train(f"--resume {cut} --quiet")
    check_same(whole, cut)


def test_muon_learns_pretrained_layers_at_a_tenth_of_both_its_rates():
    """Filters, and what is no filter."""
    first, *_ = train(f"{SMALL} --recipe fast --c1 4 --c2 4 --c3 4 --val-size 0.2 --epochs 1")
    flags = f"--dataset p --weights {first} --optimizer muon --lr 0.1 --aux-lr 0.02 --epochs 1"
    assert "not for --freeze" in fails(f"{flags} --freeze", kind=records.UsageError)
    directory, *_ = train(f"{flags} --quiet")
    last = records.load_checkpoint(directory / "last.pt")
    groups = [last[name]["param_groups"][0] for name in last if name.startswith("optimizer")]
    assert [group["initial_lr"] for group in groups] == pytest.approx([0.02, 0.01, 0.002])


def test_the_last_layer_is_new_even_where_the_number_of_classes_agrees():
    """The classes of a file have no names, so they are others."""
    state = weights_file(classes=2)
    directory, *_ = train(f"{RESNET} --freeze --lr 1e-9")
    assert changed(state, best(directory)["weights"]) == {"fc.weight", "fc.bias"}

    # Others have put several layers into its place.
    layers = {"fc.1.weight": state.pop("fc.weight"), "fc.1.bias": state.pop("fc.bias")}
    torch.save(state | layers, "weights.pth")
    directory, *_ = train(f"{RESNET} --freeze --lr 1e-9")
    assert not changed(state, {name: best(directory)["weights"][name] for name in state})


def test_a_file_that_does_not_fit_is_refused_with_the_name_of_a_tensor():
    """Whoever gave the wrong file is told what is wrong in it, before anything is made."""
    state = weights_file()
    for content, expected in (
        (state | {"layer1.0.conv1.weight": torch.ones(2)}, "mismatch for layer1.0.conv1.weight"),
        (state | {"layer9.weight": torch.ones(2)}, 'Unexpected key(s) in state_dict: "layer9'),
        ({"epoch": 3, "net": state}, 'Missing key(s) in state_dict: "conv1.weight"'),
        ([1, 2], "weights.pth is no file of weights"),
    ):
        torch.save(content, "weights.pth")
        assert expected in fails(RESNET)
    Path("weights.pth").write_text("no weights")
    assert "weights.pth is no file of weights" in fails(RESNET)
    assert not Path("runs").exists()


# ------------------------ Runs ------------------------
def test_the_weights_of_a_run_bring_their_net_and_preprocessing():
    """--weights RUN is enough. With the same classes, its last layer stays, too."""
    flags = "--model confignet --c1 4 --c2 6 --l1 5 --image-size 24"
    first, *_ = train(f"{SMALL} {flags} --grey --resize pad --normalize dataset")
    before = best(first)
    assert before["mean"] != [0.5]
    shutil.copytree("p", "q")
    Path("q/b").rename("q/c")
    for folder, weights, is_kept in (("p", first, True), ("q", first / "best.pt", False)):
        flags = f"--dataset {folder} --weights {weights} --freeze --epochs 1 --lr 1e-9 --quiet"
        after = best(train(flags)[0])
        for name in ("model", "c1", "l1", "image_shape", "resize", "mean", "std"):
            assert after[name] == before[name], name
        head = after["weights"].pop("fc2.weight")
        moved = (head - before["weights"]["fc2.weight"]).abs().max()
        assert (moved < 1e-6) == is_kept
        assert changed(before["weights"], after["weights"]) <= {"fc2.bias"}


@pytest.mark.parametrize("freeze", ["--freeze", "--no-freeze"])
def test_what_a_net_learns_before_its_first_epoch_is_kept_too(freeze):
    """The whitening stays that of the images that the weights were trained on."""
    first, *_ = train(f"{SMALL} --recipe fast --c1 4 --c2 4 --c3 4 --val-size 0.2")
    for path in Path("p").glob("*/*"):
        Image.effect_noise((8, 8), 80).save(path)
    directory, *_ = train(f"--dataset p --weights {first} {freeze} --epochs 1 --quiet")
    moved = changed(best(first)["weights"], best(directory)["weights"])
    assert "0.weight" not in moved
    assert ("2.weight" in moved) == (freeze == "--no-freeze")


def test_images_that_have_trained_the_weights_are_told(capsys):
    """What validates or tests has to be new to the whole net."""
    said = []
    folded, *_ = train(f"{SMALL} --model dense --fold 1/3")
    for flags in ("--seed 42", "--fold 1/3"):
        Path("imagenet").mkdir(exist_ok=True)  # which is no run
        train(f"{SMALL} --no-quiet --weights {folded} --epochs 1 {flags}")
        said.append(f"have trained runs/{folded.name}" in capsys.readouterr().out)
    assert said == [True, False]


# ------------------------ Nets of torchvision ------------------------
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"
IMAGENET = "--dataset p --weights imagenet --quiet"


def test_the_images_of_a_named_dataset_keep_their_pixels():
    """Weights bring mean and std; the side and the way to the square are for files."""
    weights_file()
    flags = "--dataset synthetic --model resnet18 --weights weights.pth"
    args = train_cifar.parse_arguments(flags.split())
    assert (args.image_size, args.resize) == (32, "stretch")
    assert args.mean == pytest.approx([0.485, 0.456, 0.406])


def test_imagenet_weights_bring_side_square_mean_and_std(monkeypatch):
    """What torchvision prepared their images with is done here, too."""
    state = models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(DOWNLOAD, lambda *_, **__: state)
    directory, *_ = train(f"{IMAGENET} --model mobilenet_v3_small --freeze --epochs 1")
    config = best(directory)
    assert config["image_shape"] == [3, 224, 224]
    assert config["resize"] == "crop:0.875:bilinear"
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert config["std"] == [0.229, 0.224, 0.225]


def test_without_a_network_one_line_says_what_to_put_where(monkeypatch):
    """The file can be brought by hand."""

    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(DOWNLOAD, fail)
    line = fails(IMAGENET)
    assert "(no route to host); put https://" in line
    assert "checkpoints" in line


def test_the_square_is_that_of_torchvision():
    """A photo is cut out and resized as the photos of ImageNet were for the weights."""
    noise = Image.effect_noise((45, 30), 200)
    image = noise.resize((450, 300), Image.Resampling.BICUBIC)
    image.save("wide.png")
    shorter = transforms.Resize(256, transforms.InterpolationMode.BICUBIC)
    theirs = transforms.CenterCrop(224)(shorter(image))
    theirs = transforms.functional.pil_to_tensor(theirs).float()
    ours = common.read_image(Path("wide.png"), 224, True, "crop:0.875:bicubic")
    assert (ours - theirs).abs().mean() < 1.5

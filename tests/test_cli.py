"""The command line as a user types it: exit statuses, one-line errors, signals, places."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import evaluate
import train_cifar
import train_mnist

import pytest
import torch
from conftest import EVERYTHING_ON, ROOT, exits_with_one_line, read_run, run
from forked import Forked
from test_data import pictures

DENSE = ["--model", "dense", "--schedule", "constant"]
SYNTHETIC = ["--dataset", "synthetic", *DENSE, "--runs-dir", "runs"]
SCRIPTS = {script.__name__: script for script in (train_mnist, train_cifar, evaluate)}
both_scripts = pytest.mark.parametrize("script", [train_mnist, train_cifar])

# What is typed, and what the line has to say of it. In p are images of two classes. The runs are of
# these, of a net whose images grow, and of one with all augmentations, after two of four epochs.
REFUSED = f"""
train_mnist --optimizer adamm | --optimizer
train_mnist --c1 0 | --c1
train_cifar --epochs -1 | --epochs
train_cifar --epochs {"9" * 400} | --epochs
train_cifar --epochs ten | --epochs: expected a whole number at least 1, not 'ten'
train_cifar --epoch 3 | unrecognized arguments: --epoch 3 (--epoch: did you mean --epochs?)
train_cifar --batch-size 0 | --batch-size
train_cifar --batch-size | --batch-size
train_cifar --lr nan | --lr
train_cifar --lr inf | --lr
train_cifar --lr 0 | --lr
train_cifar --val-size 1 | --val-size
train_cifar --d1 2 | --d1
train_cifar --rotation -5 | --rotation
train_cifar --seed -1 | --seed
train_cifar --run-name a/b | --run-name
train_cifar --run-name .. | --run-name
train_cifar --dataset cifra | --dataset
train_cifar --device cuda | --device
train_cifar --no-test --val-size 0 | --no-test
train_cifar --precision fp16 --device cpu | --precision
train_cifar --recipe quick | --recipe
train_cifar --recipe photos | --recipe photos is for images of your own: give --dataset PATH
train_cifar --sizes 24,x | --sizes: expected parts of the images' side
train_cifar --resume nowhere | nowhere is not a run directory
train_cifar more | unrecognized arguments: more; see --help
train_cifar --fold=0/3 | --fold: expected K/N
train_cifar --fold=4/3 | --fold: expected K/N
train_cifar --fold=1/1 | --fold: expected K/N
train_cifar --fold=x | --fold: expected K/N
train_cifar --fold=1/3/3 | --fold: expected K/N
train_cifar --dataset p --resize fit | --resize: expected stretch
train_cifar --dataset nowhere.csv | nowhere.csv is no folder
train_cifar --dataset weights.pth | weights.pth is no folder
train_cifar --resume= | --resume: expected a path
train_cifar --data-dir= | --data-dir: expected a path
train_cifar --dataset= | --dataset: expected a path
train_mnist --dataset p --model dense --c1 4 | --c1 has no effect
train_mnist --dataset p --momentum 0.9 | --momentum has no effect
train_mnist --dataset p --data-dir . | --data-dir has no effect with --dataset
train_mnist --dataset synthetic --data-dir . | --data-dir has no effect
train_mnist --dataset p --rotation 5 --no-augment | --rotation has no effect
train_mnist --dataset p --keep last --tolerance 5 | --tolerance has no effect
train_mnist --dataset p --augment --flip 0 --alternate-flip | --alternate-flip has no effect
train_mnist --dataset mnist --grey | --grey has no effect with --dataset mnist
train_mnist --dataset synthetic --image-size 8 | --image-size has no effect with --dataset
train_mnist --resize pad | --resize has no effect with --dataset mnist
train_mnist --dataset p --fold 1/3 --val-size 0.2 | has no effect beside --fold
train_mnist --dataset p --fold 1/3 --test | has no effect beside --fold
train_cifar --dataset p --model resnet19 | invalid choice: 'resnet19'
train_cifar --dataset p --model fcn_resnet50 | invalid choice
train_cifar --dataset p --weights nowhere | is no file and no run
train_cifar --dataset p --weights imagenet --model fastnet | not fastnet
train_cifar --dataset p --weights imagenet --normalize half | no effect with --weights
train_cifar --dataset p --freeze | --freeze has no effect without --weights
train_cifar --model resnet18 --weights weights.pth --freeze --shift 2 | --shift has no effect
train_cifar --model resnet18 --weights weights.pth --freeze --sizes 1/2,1 | --sizes has no effect
train_cifar --model resnet18 --weights weights.pth --freeze --alternate-flip | no effect with
train_cifar --resume runs/all --lr 0.1 | --lr cannot change
train_cifar --resume runs/all --batch-size 32 | --batch-size cannot change
train_cifar --resume runs/all --model cnn | --model cannot change
train_cifar --resume runs/all --no-augment | --augment cannot change
train_cifar --resume runs/all --run-name x | --run-name cannot change
train_cifar --resume runs/all --epochs 8 | --epochs cannot change under --schedule onecycle
train_cifar --resume runs/all --epochs 1 | the run already has 2 epochs
train_cifar --resume runs/growing --epochs 5 | --epochs cannot change under --sizes
train_cifar --resume runs/files --resize pad | --resize cannot change
train_cifar --resume runs/files --dataset synthetic | --dataset cannot change
train_cifar --resume runs/files --dataset nowhere | is no folder
train_mnist --resume runs/all | runs/all is a run of train_cifar.py
evaluate a b --predict x | take one run
evaluate a --predict x --export onnx | not allowed with
evaluate a --top 2 | goes with --predict
evaluate x --data-dir= | --data-dir: expected a path
"""


def test_bad_arguments_are_one_line_and_status_2(few_images, capsys, tmp_path, monkeypatch):
    """The line names the flag, and nothing is made or changed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pictures("p", {"a": 20, "b": 20})
    Path("weights.pth").touch()
    small = "--recipe fast --schedule constant --c1 4 --c2 4 --c3 4 --quiet --no-test"
    for name, flags in {
        "all": EVERYTHING_ON,
        "growing": f"--dataset synthetic {small}".split(),
        "files": f"--dataset p --image-size 16 --resize crop --sizes 1 {small}".split(),
    }.items():
        run(train_cifar, *flags, "--epochs", 4, "--stop-after", 2, "--run-name", name)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for case in REFUSED.strip().splitlines():
        line, expected = case.split(" | ")
        script, *argv = line.split()
        assert expected in exits_with_one_line(capsys, *argv, main=SCRIPTS[script].main), case
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@both_scripts
@pytest.mark.parametrize(("recipe", "model"), [("default", "c[a-z]+"), ("fast", "[a-z]+net")])
def test_help_shows_the_defaults_of_the_recipe(script, capsys, recipe, model):
    """So a user sees what each recipe is, and nothing of what has no default."""
    with pytest.raises(SystemExit, match="0"):
        script.main(["--recipe", recipe, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"classifier of torchvision \({model}\)", text)
    assert "(None)" not in text
    assert re.search(r"0: never \(\d\)", text)


@both_scripts
def test_an_optimiser_that_the_recipe_is_not_for_brings_its_rates(script):
    """Who asks for another optimiser need not know what learning rate it wants."""

    def settings(*argv):
        args = vars(script.parse_arguments([*argv]))
        return [args.get(name) for name in ("lr", "aux_lr", "momentum", "schedule")]

    rate, _, _, schedule = settings()
    assert settings("--optimizer=muon") == [0.12, 0.015, 0.6, "linear"]
    assert settings("--optimizer=muon", "--lr", "0.3") == [0.3, 0.015, 0.6, "linear"]
    assert settings("--optimizer=sgd") == [rate, None, 0.9, schedule]

    # A recipe for Muon keeps its own, but a tenth is far too much for Adam.
    fast = settings("--recipe=fast")
    assert settings("--recipe=fast", "--optimizer=muon") == fast
    assert settings("--recipe=fast", "--optimizer=adamw") == [0.001, None, None, "linear"]


def test_a_run_without_a_terminal_prints_a_line_per_epoch_and_last_the_directory(few_images, capfd):
    """A log file gets no bars, and with --quiet nothing."""
    directory = Path(train_mnist.main([*SYNTHETIC, "--epochs", "2"])["directory"])
    out, error = capfd.readouterr()
    assert error == ""
    assert "\r" not in out
    assert f"{read_run(directory)[0]['test']['acc']:.2%}" in out
    assert len(re.findall(r"^epoch +\d/2 ", out, re.MULTILINE)) == 2
    assert out.endswith(f"\nfinished: runs/{directory.name}\n")
    train_mnist.main([*SYNTHETIC, "--epochs", "1", "--quiet"])
    assert capfd.readouterr() == ("", "")


def started(script, *argv, **options):
    """A script in a process of its own, and what it says."""
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, script, *argv], **pipes, **options)


def test_ctrl_c_during_the_import_of_torch_ends_it_without_a_word(tmp_path):
    """Importing torch takes seconds, in which a user may think better of it."""
    Path("torch.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(300)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with started(ROOT / "train_mnist.py", env=env) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) == ("", "")
        assert process.returncode == -signal.SIGINT, "a shell calls that 130"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_is_one_line(number):
    """A run that is stopped before it began leaves no directory."""
    before = f"train_mnist.synthetic = lambda train: signal.raise_signal({number})"
    status, error = Forked("train_mnist", *SYNTHETIC, before=before).finish()
    assert status == 128 + number
    assert not Path("runs").exists()
    assert re.fullmatch(r"train_mnist\.py: error: interrupted.*\n", error)


def test_a_copy_of_a_script_runs_from_anywhere_with_nothing_but_torch_and_resumes_by_its_hint(
    mnist_dir, tmp_path
):
    """As from cron: in /, with no environment but PATH. Data and runs lie beside the scripts."""
    # A directory with a copy, the data, and packages that fail as if they were not installed.
    place = tmp_path / "my scripts"
    place.mkdir()
    for name in ("common.py", "records.py"):
        shutil.copy(ROOT / name, place)
    shutil.copy(ROOT / "train_mnist.py", place / "train_digits.py")
    for name in ("wandb", "optuna", "scipy", "matplotlib"):
        (place / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    mnist_dir.rename(place / "data")

    # Ctrl-C after the first epoch.
    options = {"cwd": "/", "env": {"PATH": "/usr/bin:/bin"}}
    with started(place / "train_digits.py", *DENSE, "--epochs", "1000", **options) as process:
        assert any(line.startswith("epoch") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error.count("\n") == 1
    (directory,) = (place / "runs").glob("train_digits-*")
    record, rows = read_run(directory)
    assert record["status"] == "interrupted"
    assert rows

    # The command that it has told goes on.
    python, *hint = shlex.split(error.split("go on with: ")[1])
    assert python == "python"
    with started(*hint, "--epochs", str(len(rows) + 1), **options) as process:
        assert process.communicate(timeout=300)[1] == ""
    record, (*before, _) = read_run(directory)
    assert record["status"] == "finished"
    assert before == rows

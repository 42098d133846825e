"""The command line as a user types it: exit statuses, one-line errors, signals, where things are put."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import train_cifar
import train_mnist

import pytest
import torch
from conftest import ROOT, read_run
from forked import Forked

DENSE = [
    "--dataset",
    "synthetic",
    "--model",
    "dense",
    "--schedule",
    "constant",
    "--runs-dir",
    "runs",
]
PIPES = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
NAMED = [
    "--optimizer adamm",
    "--c1 0",
    "--epochs -1",
    f"--epochs {'9' * 400}",
    "--batch-size 0",
    "--batch-size",
    "--lr nan",
    "--lr inf",
    "--lr 0",
    "--val-size 1",
    "--d1 2",
    "--rotation -5",
    "--seed -1",
    "--run-name a/b",
    "--run-name ..",
    "--dataset cifra",
    "--device cuda",
    "--no-test --val-size 0",
    "--precision fp16 --device cpu",
]
BAD = {argv: argv.split()[0] for argv in NAMED} | {
    "--epochs ten": "--epochs: expected a whole number at least 1, not 'ten'",
    "--epoch 3": "unrecognized arguments: --epoch 3 (--epoch: did you mean --epochs?)",
    "--sizes 24,x": "--sizes: expected parts of the images' side, as in 5/8,3/4,1, not '24,x'",
    "--recipe quick": "--recipe: invalid choice: 'quick'",
    "--resume nowhere": "nowhere is not a run directory",
    "more": "unrecognized arguments: more; see --help",
}


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_bad_arguments_are_one_line_and_status_2(script, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, expected in BAD.items():
        with pytest.raises(SystemExit, match="2"):
            script.main(argv.split())
        error = capsys.readouterr().err
        assert (
            error.startswith(f"{script.__name__}.py: error: ")
            and expected in error
            and error.count("\n") == 1
        )
    assert not list(tmp_path.iterdir()), "nothing is made"


def test_what_only_the_net_or_the_disk_tell_is_one_line_and_status_2_too():
    Path("runs/taken/file").mkdir(parents=True)
    for argv, expected in (
        (["--optimizer", "muon"], "--optimizer muon is for convolutions"),
        (["--run-name", "taken"], "--run-name taken: runs/taken exists already"),
    ):
        status, error = Forked("train_mnist", *DENSE, *argv).finish()
        assert (
            status == 2
            and error.startswith(f"train_mnist.py: error: {expected}")
            and error.count("\n") == 1
        )
    assert [str(path) for path in Path("runs").rglob("[!.]*")] == ["runs/taken", "runs/taken/file"]


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_help_shows_the_defaults_of_the_recipe(script, capsys):
    recipes = {name: recipe for name, recipe in script.RECIPES.items() if not callable(recipe)}
    for recipe, defaults in recipes.items():
        with pytest.raises(SystemExit, match="0"):
            script.main(["--recipe", recipe, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        model = {**script.RECIPES["default"], **defaults}["model"]
        assert (
            f"classifier of torchvision ({model})" in text
            and "python train_" in text
            and "(None)" not in text
        )


def test_a_run_without_a_terminal_prints_a_line_per_epoch_and_last_the_directory(few_images, capfd):
    train_mnist.main([*DENSE, "--epochs", "2"])
    (directory,) = Path("runs").iterdir()
    out, error = capfd.readouterr()
    assert error == "" and "\r" not in out and f"{read_run(directory)[0]['test']['acc']:.2%}" in out
    assert len(re.findall(r"^epoch +\d/2 ", out, re.MULTILINE)) == 2
    assert out.splitlines()[-1] == f"finished: runs/{directory.name}"
    train_mnist.main([*DENSE, "--epochs", "1", "--quiet"])
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_during_the_import_of_torch_ends_it_without_a_word(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(300)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, ROOT / "train_mnist.py"], env=env, **PIPES) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) == ("", "")
        assert process.returncode == -signal.SIGINT, "a shell calls that 130"


@pytest.mark.parametrize(("number", "status"), [(15, 143), (2, 130)])
def test_a_signal_while_loading_is_one_line(number, status):
    before = f"train_mnist.synthetic = lambda train: signal.raise_signal({number})"
    ended, error = Forked("train_mnist", *DENSE, before=before).finish()
    assert ended == status and re.fullmatch(r"train_mnist\.py: error: interrupted.*\n", error)
    assert not Path("runs").exists()


def test_a_copy_of_a_script_runs_from_anywhere_with_nothing_but_torch_and_resumes_by_its_hint(
    mnist_dir, tmp_path
):
    """As from cron: in /, with no environment but PATH. Data and runs lie beside the scripts."""
    place = tmp_path / "my scripts"
    place.mkdir()
    for name in ("common.py", "records.py"):
        shutil.copy(ROOT / name, place)
    shutil.copy(ROOT / "train_mnist.py", place / "train_digits.py")
    for name in ("wandb", "optuna", "scipy", "matplotlib"):
        (place / f"{name}.py").write_text(
            f"raise ModuleNotFoundError('not installed', name={name!r})\n"
        )
    mnist_dir.rename(place / "data")
    options = {"cwd": "/", "env": {"PATH": "/usr/bin:/bin"}, **PIPES}
    argv = ["--model", "dense", "--schedule", "constant", "--epochs", "1000"]
    with subprocess.Popen([sys.executable, place / "train_digits.py", *argv], **options) as process:
        assert any(line.startswith("epoch") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    (directory,) = (place / "runs").iterdir()
    record, rows = read_run(directory)
    assert directory.name.startswith("train_digits-") and record["status"] == "interrupted" and rows
    assert process.returncode == 130 and error.count("\n") == 1
    assert [record["args"][name] for name in ("runs_dir", "data_dir")] == [
        str(place / "runs"),
        str(place / "data"),
    ]
    python, *hint = shlex.split(error.split("go on with: ")[1])
    done = subprocess.run(
        [sys.executable, *hint, "--epochs", str(len(rows) + 1)], **options, timeout=300
    )
    record, more = read_run(directory)
    assert (python, done.returncode, done.stderr, record["status"]) == ("python", 0, "", "finished")
    assert record["test"] and len(more) == len(rows) + 1 and more[:-1] == rows

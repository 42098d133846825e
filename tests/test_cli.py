"""The command line as a user types it: exit statuses, one-line errors, signals, places."""

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

DENSE = ["--model", "dense", "--schedule", "constant"]
SYNTHETIC = ["--dataset", "synthetic", *DENSE, "--runs-dir", "runs"]
both_scripts = pytest.mark.parametrize("script", [train_mnist, train_cifar])

# What is typed, and what the line has to say of it.
WRONG = f"""
--optimizer adamm | --optimizer
--c1 0 | --c1
--epochs -1 | --epochs
--epochs {"9" * 400} | --epochs
--epochs ten | --epochs: expected a whole number at least 1, not 'ten'
--epoch 3 | unrecognized arguments: --epoch 3 (--epoch: did you mean --epochs?)
--batch-size 0 | --batch-size
--batch-size | --batch-size
--lr nan | --lr
--lr inf | --lr
--lr 0 | --lr
--val-size 1 | --val-size
--d1 2 | --d1
--rotation -5 | --rotation
--seed -1 | --seed
--run-name a/b | --run-name
--run-name .. | --run-name
--dataset cifra | --dataset
--device cuda | --device
--no-test --val-size 0 | --no-test
--precision fp16 --device cpu | --precision
--recipe quick | --recipe
--sizes 24,x | --sizes: expected parts of the images' side
--resume nowhere | nowhere is not a run directory
more | unrecognized arguments: more; see --help
"""


@both_scripts
def test_bad_arguments_are_one_line_and_status_2(script, capsys, tmp_path, monkeypatch):
    """The line names the flag; nothing is made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for case in WRONG.strip().splitlines():
        argv, expected = case.split(" | ")
        with pytest.raises(SystemExit, match="2"):
            script.main(argv.split())
        out, error = capsys.readouterr()
        assert error.startswith(f"{script.__name__}.py: error: ")
        assert expected in error
        assert error.count("\n") == 1
        assert not out
    assert not list(tmp_path.iterdir())


def test_what_only_the_disk_tells_is_one_line_and_status_2_too():
    """A new run does not take the name of another one."""
    Path("runs/taken/file").mkdir(parents=True)
    done = Forked("train_mnist", *SYNTHETIC, "--run-name", "taken").finish()
    assert done == (2, "train_mnist.py: error: --run-name taken: runs/taken exists already\n")


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

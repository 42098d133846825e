"""The command line as a user types it: exit statuses, one-line errors, signals, pipes."""

import argparse
import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, only_run

import common
import train_cifar
import train_mnist

SYNTHETIC = ("--dataset", "synthetic", "--limit-train", 300, "--model", "dense", "--schedule", "constant")

BAD = [
    (["--optimizer", "adamm"], "--optimizer"),
    (["--c1", "0"], "--c1"),
    (["--epochs", "-1"], "--epochs"),
    (["--epochs", "ten"], "--epochs"),
    (["--epochs", "9" * 400], "--epochs"),
    (["--batch-size", "0"], "--batch-size"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--lr", "0"], "--lr"),
    (["--val-size", "1.5"], "--val-size"),
    (["--val-size", "1"], "--val-size"),
    (["--d1", "2"], "--d1"),
    (["--kernel-size", "4"], "odd"),
    (["--rotation", "-5"], "--rotation"),
    (["--seed", "-1"], "--seed"),
    (["--run-name", "a/b"], "--run-name"),
    (["--run-name", ".."], "--run-name"),
    (["--epoch", "3"], "did you mean --epochs"),
    (["--dataset", "cifra"], "--dataset"),
    (["--model", "convnet", "--c1", "8"], "--c1 does not apply to --model convnet"),
    (["--model", "confignet", "--kernel-size", "13"], "--kernel-size 13"),
    (["--model", "confignet", "--batch-size", "1"], "--batch-size 1"),
    (["--val-size", "0", "--no-test"], "--no-test"),
    (["--image-size", "64"], "--image-size needs"),
    (["--no-augment", "--rotation", "15"], "--rotation needs --augment"),
    (["--momentum", "0.5"], "--momentum needs --optimizer sgd"),
    (["--aux-lr", "0.5"], "--aux-lr needs --optimizer muon"),
    (["--tta-below", "0.5"], "--tta-below needs --tta"),
    (["--no-augment", "--shift", "2"], "--shift needs --augment"),
    (["--augment", "--shift", "40"], "--shift 40: the images have only"),
    (["--model", "dense", "--optimizer", "muon"], "--optimizer muon is for convolutions"),
    (["--model", "confignet", "--sizes", "24,32"], "--sizes 24: --model confignet does not take"),
    (["--recipe", "fast", "--sizes", "20,24"], "the last has to be that of the images"),
    (["--augment", "--alternate-flip", "--flip", "0"], "--alternate-flip needs a --flip above 0"),
    (["--wandb-project", "mine"], "--wandb-project needs --wandb offline or online"),
    (["--sizes", "24,x"], "expected a whole number"),
    (["--recipe", "quick"], "invalid choice: 'quick'"),
    (["--dataset", "mnist", "--augment", "--hue", "0.1"], "grey"),
    (["--resume", "nowhere"], "--resume nowhere"),
]


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
@pytest.mark.parametrize(("argv", "expected"), BAD)
def test_bad_arguments_are_one_line_and_status_2(script, argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is made"


@pytest.mark.parametrize("script", [train_mnist, train_cifar])
def test_of_two_recipes_the_last_counts_alone(script):
    both, one = (
        common.parse_arguments(script.build_parser(), [*first, "--recipe", "tutorial", "--dataset", "synthetic"])
        for first in (["--recipe", "fast"], [])
    )
    assert {**vars(both), "argv": None} == {**vars(one), "argv": None}


def test_a_recipe_s_options_of_its_model_do_not_stand_in_the_way_of_another():
    recipe = ["--recipe", "fast996", "--dataset", "synthetic"]
    args, other = (
        common.parse_arguments(train_mnist.build_parser(), argv) for argv in (recipe, [*recipe, "--model", "patchnet"])
    )
    assert args.model_options == {"c1": 32, "c2": 64, "c3": 96} and "c3" not in other.model_options


def test_what_only_the_machine_knows_is_refused_before_anything_is_loaded(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_dataset", None)
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    for argv, expected in (
        (["--runs-dir", "file/runs"], "--runs-dir file/runs"),
        (["--run-name", "taken"], "runs/taken exists already"),
        (["--device", "cuda"], "--device cuda"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    ):
        with pytest.raises(common.UsageError, match=expected):
            train_cifar.main(argv)
    done = cli("train_cifar.py", *SYNTHETIC, "--run-name", "taken")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]
    assert not list((tmp_path / "runs" / "taken").iterdir())


def test_a_run_without_a_terminal_prints_a_line_per_epoch_and_last_the_directory(cli, tmp_path):
    done = cli("train_mnist.py", *SYNTHETIC, "--epochs", 2)
    assert done.returncode == 0 and done.stderr == ""
    directory, record, _ = only_run(tmp_path)
    lines = done.stdout.splitlines()
    assert len([line for line in lines if re.match(r"epoch +\d/2 ", line)]) == 2
    assert lines[-1] == f"finished: runs/{directory.name}"
    assert f"{record['test']['acc']:.2%}" in done.stdout and "\r" not in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_its_state_saved(cli, tmp_path, number, status):
    process = cli("train_mnist.py", *SYNTHETIC, "--epochs", 1000, "--run-name", "long", start=True)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status and len(error.splitlines()) == 1
    assert "train_mnist.py --resume runs/long" in error
    _, record, rows = only_run(tmp_path)
    assert record["status"] == "interrupted" and record["epochs"] == len(rows) >= 1
    done = cli("train_mnist.py", "--resume", "runs/long", "--epochs", len(rows) + 1)
    assert done.returncode == 0, done.stderr
    _, record, again = only_run(tmp_path)
    assert record["status"] == "finished" and again[: len(rows)] == rows and len(again) == len(rows) + 1


def test_a_signal_while_loading_ends_quietly(cli, tmp_path):
    process = cli("train_mnist.py", "--dataset", "synthetic", start=True)
    while not (tmp_path / "runs").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and len(error.splitlines()) == 1 and "interrupted" in error


def test_a_reader_that_goes_away_does_not_end_the_run(cli, tmp_path):
    process = cli("train_mnist.py", *SYNTHETIC, "--epochs", 3, start=True)
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)
    assert process.returncode == 0 and process.stderr.read() == ""
    _, record, rows = only_run(tmp_path)
    assert record["status"] == "finished" and len(rows) == 3


def test_quiet_prints_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    train_mnist.main([str(argument) for argument in (*SYNTHETIC, "--epochs", 1, "--quiet")])
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(cli, tmp_path):
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = cli("train_mnist.py", *SYNTHETIC, "--epochs", 1, start=True, stdout=terminal, stderr=terminal)
    os.close(terminal)
    screen = b""
    with contextlib.suppress(OSError):  # the terminal is gone: the process has ended
        while chunk := os.read(controller, 4096):
            screen += chunk
    assert process.wait(timeout=60) == 0
    assert b"epoch 1/1:" in screen and b"\r" in screen and b"finished: runs/" in screen


def test_twenty_runs_started_together_have_directories_of_their_own(tmp_path):
    args = argparse.Namespace(run_name=None, script="train_mnist", runs_dir=tmp_path, argv=[], resume=None, seed=0)
    with ThreadPoolExecutor(20) as pool:
        runs = list(pool.map(lambda _: common.Run.create(args, {}).directory, range(20)))
    assert len(set(runs)) == 20


def test_imports_stay_light():
    """Training works where these are missing; and what is not imported takes no time."""
    code = "import sys, train_cifar; print({'wandb', 'matplotlib', 'optuna', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

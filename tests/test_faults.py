"""What a run promises when something goes wrong: kills, failing saves, damaged files, no terminal, strange names."""

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import forked
import golden
import pytest
import torch
from conftest import EVERYTHING_ON, check_same, read_run, run
from PIL import Image

import common
import evaluate
import sweep
import train_mnist

DENSE = ["--dataset", "synthetic", "--model", "dense", "--quiet"]


# ---------------------------------------------------------------------------------------------------
# Kill -9. Each process is forked from one that has imported torch, so that dozens of them take seconds.
# ---------------------------------------------------------------------------------------------------


def check_files(directory):
    """Every file of a run is whole, whenever its process was killed. Returns the run's status."""
    for name in ("best.pt", "last.pt"):
        if (directory / name).exists():
            common.load_checkpoint(directory / name)
    if (directory / "log.jsonl").exists():
        epochs = [row["epoch"] for row in common.read_log(directory)]
        assert epochs == list(range(1, len(epochs) + 1))
    return common.read_record(directory)["status"]


def finish(process):
    """Its exit status, in a minute at most."""
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode is not None
    return process.exitcode


ARGV = [*EVERYTHING_ON, "--epochs", "6", "--run-name", "r"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, and how long it took."""
    directory = tmp_path_factory.mktemp("whole")
    finish(forked.start(directory, [*ARGV, "--stop-after", "1", "--run-name", "warm"]))
    began = time.monotonic()
    assert finish(forked.start(directory, ARGV)) == 0
    return directory / "runs" / "r", time.monotonic() - began


def go_on(directory):
    return ["--resume", "runs/r", "--quiet"] if directory.exists() else ARGV


def test_a_run_killed_at_thirty_random_moments_ends_as_an_undisturbed_one(tmp_path, whole):
    generator, kills, directory = random.Random(0), 0, tmp_path / "runs" / "r"
    while kills < 30:
        process = forked.start(tmp_path, go_on(directory))
        time.sleep(generator.uniform(0.2, 1) * whole[1])
        process.kill()
        if finish(process) == 0:
            check_same(whole[0], directory)
            shutil.rmtree(directory)
        elif directory.exists():
            kills += check_files(directory) == "running"
    assert finish(forked.start(tmp_path, go_on(directory))) == 0
    check_same(whole[0], directory)


def test_a_run_killed_at_every_step_of_its_saves_ends_as_an_undisturbed_one(tmp_path, whole):
    directory = tmp_path / "runs" / "r"
    # Each process gets a step further into its saves than the one before: a start saves three or four files, an epoch
    # as many, each in three steps.
    for steps in range(24):
        assert finish(forked.start(tmp_path, go_on(directory), steps)) == -signal.SIGKILL
        assert not directory.exists() or check_files(directory) == "running"
    assert finish(forked.start(tmp_path, go_on(directory))) == 0
    check_same(whole[0], directory)


def test_twenty_runs_started_together_do_not_mix(tmp_path):
    argv = [*EVERYTHING_ON, "--epochs", "1"]
    processes = [forked.start(tmp_path, [*argv, "--seed", str(seed)]) for seed in range(20)]
    assert all(finish(process) == 0 for process in processes)
    records = [read_run(directory)[0] for directory in (tmp_path / "runs").iterdir()]  # and nothing else is there
    assert sorted(record["seed"] for record in records) == list(range(20))
    assert {record["status"] for record in records} == {"finished"}


def test_a_second_resume_is_refused(cli, tmp_path):
    process = cli("train_mnist.py", *DENSE[:-1], "--epochs", 1000, "--run-name", "r", start=True)
    assert any(line.startswith("epoch") for line in process.stdout)
    second = cli("train_mnist.py", "--resume", "runs/r")
    assert second.returncode == 1 and second.stderr.endswith("runs/r is in use by another process\n")
    process.kill()
    process.communicate()
    assert cli("train_mnist.py", "--resume", "runs/r", "--stop-after", 1).returncode == 0  # the lock died with it


def test_a_second_signal_ends_a_run_at_once_in_one_line(cli, tmp_path):
    process = cli("train_mnist.py", *DENSE[:-1], "--epochs", 1000, "--run-name", "r", start=True)
    assert any(line.startswith("epoch") for line in process.stdout)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and len(error.splitlines()) == 1
    assert check_files(tmp_path / "runs" / "r") == "interrupted"


# ---------------------------------------------------------------------------------------------------
# Saves that fail
# ---------------------------------------------------------------------------------------------------


def no_file_larger_than(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def as_an_ordinary_user():
    """Take away root's right to write where it must not."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if os.geteuid() == 0 and libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run that has two epochs behind it and four before."""
    monkeypatch.chdir(tmp_path)
    return run(train_mnist, *DENSE, "--epochs", 6, "--stop-after", 2, "--run-name", "r")[0].absolute()


def check_one_line(done, *expected):
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert all(text in done.stderr for text in expected), done.stderr


@pytest.mark.parametrize("file", ["run.json", "best.pt", "last.pt"])
def test_a_full_disk_leaves_what_was_there(cli, interrupted, file):
    """The disk has no room for `file`, but for those that are saved before it."""
    before = {name: (interrupted / name).read_bytes() for name in ("best.pt", "last.pt")}
    size = (interrupted / file).stat().st_size - 100
    done = cli("train_mnist.py", "--resume", "runs/r", "--quiet", preexec_fn=no_file_larger_than(size))
    check_one_line(done, "File too large")
    assert (interrupted / "last.pt").read_bytes() == before["last.pt"]
    assert ((interrupted / "best.pt").read_bytes() == before["best.pt"]) == (file != "last.pt")
    check_files(interrupted)
    assert not list(interrupted.glob(".*.tmp"))
    assert len(run(train_mnist, "--resume", "runs/r", "--quiet")[2]) == 6


def test_a_run_that_finds_the_disk_full_leaves_nothing(cli, tmp_path):
    check_one_line(cli("train_mnist.py", *DENSE, preexec_fn=no_file_larger_than(200)), "File too large")
    assert not list((tmp_path / "runs").iterdir())


def test_a_directory_that_cannot_be_written_is_named_and_left_as_it_was(cli, interrupted):
    before = {path.name: path.read_bytes() for path in interrupted.iterdir()}
    interrupted.chmod(0o555)
    try:
        done = cli("train_mnist.py", "--resume", "runs/r", "--quiet", preexec_fn=as_an_ordinary_user)
    finally:
        interrupted.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "runs/r" in done.stderr
    assert {path.name: path.read_bytes() for path in interrupted.iterdir()} == before


def test_a_directory_that_cannot_be_written_any_more_ends_a_run_in_one_line(cli, tmp_path):
    flags = [*DENSE[:-1], "--epochs", 1000, "--run-name", "r"]
    directory = tmp_path / "runs" / "r"
    process = cli("train_mnist.py", *flags, start=True, preexec_fn=as_an_ordinary_user)
    assert any(line.startswith("epoch") for line in process.stdout)
    try:
        directory.chmod(0o555)
        _, error = process.communicate(timeout=60)
    finally:
        directory.chmod(0o755)
    assert process.returncode == 1 and len(error.splitlines()) == 1 and "Permission denied" in error
    check_files(directory)
    assert not list(directory.glob(".*.tmp"))


def test_an_error_inside_serialisation_leaves_what_was_there(tmp_path):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"epoch": 1})
    with pytest.raises(TypeError, match="pickle"):
        common.save_checkpoint(path, {"epoch": (number for number in ())})
    assert common.load_checkpoint(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------
# Losses and checkpoints that are not to be trusted
# ---------------------------------------------------------------------------------------------------


def test_a_diverged_run_ends_with_status_1_and_says_what_to_do(cli, tmp_path):
    done = cli("train_mnist.py", *DENSE, "--lr", "1e30", "--optimizer", "sgd", "--run-name", "r")
    check_one_line(done, "epoch 1", "lower --lr")
    assert read_run(tmp_path / "runs" / "r")[0]["status"] == "diverged"
    again = cli("train_mnist.py", "--resume", "runs/r")
    check_one_line(again, "would again")


def test_a_checkpoint_of_another_model_or_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_mnist, "synthetic", forked.few(train_mnist.synthetic_digits))
    runs = {}
    for model in ("dense", "cnn"):
        argv = ["--dataset", "synthetic", "--model", model, "--epochs", 2, "--stop-after", 1, "--quiet"]
        runs[model] = run(train_mnist, *argv)[0]
    mine = common.load_checkpoint(runs["dense"] / "last.pt")
    other = common.load_checkpoint(runs["cnn"] / "last.pt")
    for state in (
        other, {**other, "run": mine["run"]}, {**mine, "format": 2}, {**mine, "optimizer": {}},
        {**mine, "optimizer": 3}, {**mine, "history": []}, {"epoch": 1}, [1, 2],
    ):  # fmt: skip
        common.save_checkpoint(runs["dense"] / "last.pt", state)
        with pytest.raises(common.RunError, match=r"last\.pt is .*not of this version"):
            run(train_mnist, "--resume", runs["dense"], "--quiet")
    best = common.load_checkpoint(runs["dense"] / "best.pt")
    common.save_checkpoint(runs["dense"] / "last.pt", mine)
    for state in ({**best, "format": 2}, {**best, "model": "other"}, {**best, "weights": {}}, {"weights": {}}, 3):
        common.save_checkpoint(runs["dense"] / "best.pt", state)
        with pytest.raises(common.RunError, match=r"best\.pt"):
            evaluate.main([str(runs["dense"]), "--quiet"])


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"weights": torch.arange(50.0)})
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
        with pytest.raises(common.RunError, match="damaged"):
            common.load_checkpoint(path)


# ---------------------------------------------------------------------------------------------------
# No terminal, strange names, memory
# ---------------------------------------------------------------------------------------------------


def test_a_run_finishes_with_its_output_closed_no_home_and_no_term(cli, tmp_path):
    def close():
        os.close(1)
        os.close(2)

    environment = dict.fromkeys(("TERM", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")) | {"HOME": "/proc/none"}
    done = cli("train_mnist.py", *DENSE[:-1], "--epochs", 2, "--run-name", "r", preexec_fn=close, env=environment)
    assert done.returncode == 0
    record, rows = read_run(tmp_path / "runs" / "r")
    assert record["status"] == "finished" and len(rows) == 2
    done = cli("evaluate.py", "runs/r", env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr  # matplotlib speaks of its cache
    assert (tmp_path / "runs" / "r" / "confusion.png").exists()


def test_spaces_long_names_and_other_scripts_work_everywhere(cli, tmp_path, capsys):
    place = tmp_path / ("ein langer Ordner, " * 5 + "数据")
    classes = [
        "crème brûlée",
        "猫",
        "a class with a name that is much longer than any table or picture would like it to be",
    ]
    generator = random.Random(0)
    for name in classes:
        (place / "Bilder" / name).mkdir(parents=True)
        for number in range(12):
            image = Image.new("RGB", (32, 32), tuple(generator.randrange(256) for _ in range(3)))
            image.save(place / "Bilder" / name / f"ein Bild {number} ü.png")
    where = ["--runs-dir", place / "Läufe 1", "--run-name", "Lauf ñ 1"]
    done = cli("train_cifar.py", "--dataset", place / "Bilder", "--c1", 4, "--c2", 4, "--l1", 8, "--epochs", 1, *where)
    assert done.returncode == 0, done.stderr
    directory = place / "Läufe 1" / "Lauf ñ 1"
    done = cli("evaluate.py", directory, env={"PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error:Glyph"})
    assert done.returncode == 0, done.stderr
    rows = json.loads((directory / "metrics.json").read_text())["classes"]
    assert [row["name"] for row in rows] == sorted(classes)
    assert (directory / "confusion.png").stat().st_size > 10_000
    evaluate.main([str(directory), "--predict", str(place / "Bilder" / "猫")])
    assert "ein Bild 3 ü.png" in capsys.readouterr().out


def test_what_no_font_has_is_written_as_its_number_in_pictures(monkeypatch):
    monkeypatch.setattr(evaluate, "FONTS", ("DejaVu Sans",))
    for cached in (evaluate.fonts, evaluate.drawable):
        cached.cache_clear()
    assert evaluate.legible("ü 猫\n") == "ü \\u732b\n"
    for cached in (evaluate.fonts, evaluate.drawable):
        cached.cache_clear()


def test_memory_does_not_grow_from_epoch_to_epoch(tmp_path):
    argv = [*EVERYTHING_ON, "--schedule", "constant", "--tolerance", "1000", "--epochs", "60"]
    assert finish(forked.start(tmp_path, argv, sizes=tmp_path / "sizes")) == 0
    sizes = [float(line) for line in (tmp_path / "sizes").read_text().split()]
    assert len(sizes) == 61 and sizes[60] - sizes[10] < 5


PROBE = """
import train_mnist
from forked import few, resident
from train_mnist import build_parser
train_mnist.synthetic = few(train_mnist.synthetic_digits)

def main(argv):
    record = train_mnist.main(argv)
    with open("sizes.txt", "a") as file:
        print(resident(), file=file)
    return record
"""


def test_memory_does_not_grow_from_trial_to_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "report", lambda *arguments: {})
    monkeypatch.setattr(train_mnist, "synthetic", train_mnist.synthetic)  # which the probe replaces here too
    Path("probe.py").write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{PROBE}")
    space = [
        "--method",
        "random",
        "--count",
        "50",
        "--script",
        "probe.py",
        "--param",
        "lr=log:1e-4..1e-3",
        "--name",
        "s",
    ]
    sweep.main([*space, "--quiet", "--", "--dataset", "synthetic", "--model", "dense", "--epochs", "1"])
    sizes = [float(line) for line in Path("sizes.txt").read_text().split()]
    assert len(sizes) == 50 and sizes[49] - sizes[9] < 5


# ---------------------------------------------------------------------------------------------------
# What must not change by accident
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", golden.MODELS)
def test_the_first_losses_of_a_model_are_what_they_were(model):
    """Other CPUs round differently, by less than this; a change that is meant: python tests/golden.py."""
    expected = json.loads(golden.PATH.read_text())["losses"][model]
    assert len(expected) == 10 and golden.losses(model) == pytest.approx(expected, rel=2e-3)


def test_the_flags_and_their_defaults_are_what_they_were():
    assert golden.flags() == json.loads(golden.PATH.read_text())["flags"]

"""Searches: what was dropped in silence, got lost, or ended in a traceback; and what the pictures show."""

import csv
import ctypes
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import records
import sweep

import pytest
from forked import Forked
from matplotlib.figure import Figure
from test_data import counting_images, pictures
from test_details import MEMORY_IN_USE
from test_sweep import (
    BAYES,
    GRID,
    TOY,
    hold,
    lines,
    nothing_is_left_for_the_next_test,  # noqa: F401 (a fixture)
    postgresql,  # noqa: F401 (a fixture)
    refused,
    start,
    toy,  # noqa: F401 (a fixture)
    until,
)

ONE = ["--method", "grid", "--param", "k=1,2"]
FEW = """
import forked, train_mnist
from train_mnist import *
train_mnist.synthetic = synthetic = forked.few_digits
"""


def board(name="s"):
    """The rows of leaderboard.csv."""
    return list(csv.DictReader(Path("runs", name, "leaderboard.csv").read_text().splitlines()))


# ---------------- Data ----------------
def on_folder(*argv):
    """A random search of one trial on the folder p, as seen from here."""
    tiny = ["--model", "dense", "--l1", "4", "--image-size", "8", "--epochs", "1"]
    search = ["--method", "random", "--param", "lr=log:0.001..0.1", "--count", "1", "--quiet"]
    sweep.main([*search, "--name", "s", "--runs-dir", "runs", "--", "--dataset", "p", *tiny, *argv])


def checksums():
    runs = sorted(Path("runs/s").glob("trial-*"))
    return [records.read_record(run)["data"]["checksum"] for run in runs]


def test_the_data_of_a_search_are_the_same_from_wherever_it_goes_on(tmp_path, monkeypatch, toy):
    pictures("p", {"a": 20, "b": 20})
    on_folder()
    pictures("elsewhere/p", {"a": 30, "b": 30})
    monkeypatch.chdir("elsewhere")
    sweep.main(["--resume", "../runs/s", "--count", "2", "--quiet"])
    monkeypatch.chdir(tmp_path)
    assert len(checksums()) == 2 and len(set(checksums())) == 1
    assert len(list(Path("runs/s").rglob("data.csv"))) == 1
    # A folder that has moved is given anew, and other images are not taken for it.
    shutil.move("p", "moved")
    sweep.main(["--resume", "runs/s", "--count", "3", "--quiet", "--", "--dataset", "moved"])
    assert len(checksums()) == 3 and len(set(checksums())) == 1
    Path("runs/s/data.csv").unlink()
    with pytest.raises(records.RunError, match="not those that it began with"):
        sweep.main(
            ["--resume", "runs/s", "--count", "4", "--quiet", "--", "--dataset", "elsewhere/p"]
        )
    assert len(checksums()) == 3


def test_a_folder_is_decoded_once_for_all_workers(toy):
    pictures("p", {"a": 20, "b": 20})
    Path("counting.py").write_text("from train_mnist import *\n" + counting_images())
    tiny = ["--model", "dense", "--l1", "4", "--image-size", "8", "--epochs", "1", "--seed", "1"]
    argv = ["--method", "grid", "--param", "lr=0.1,0.01,0.001", "--jobs", "2", "--quiet"]
    argv += ["--script", "counting.py", "--name", "s", "--runs-dir", "runs", "--", "--dataset", "p"]
    sweep.main([*argv, *tiny[:-2]])
    assert Path("decoded").stat().st_size <= 40 + 4  # the test images once more, for the winner
    assert not list(Path("runs/s").glob(".pixels-*"))


def test_an_epoch_that_was_saved_but_not_logged_is_judged(toy):
    dying = """
import os, records
save_log = records.Run.write_results
def dying(self, parts):
    if self.record["name"] == "trial-0001" and len(self.history) == 2 and not os.path.exists(MARK):
        open(MARK, "w").close()
        os.kill(os.getpid(), 9)
    save_log(self, parts)
records.Run.write_results = dying
"""
    Path("whole.py").write_text(FEW)
    Path("dying.py").write_text(FEW + f"MARK = {str(Path('died').absolute())!r}" + dying)
    found = {}
    for name in ("whole", "dying"):
        argv = ["--script", f"{name}.py", "--name", name, "--runs-dir", "runs", "--quiet"]
        argv += ["--method", "grid", "--param", "lr=0.01,0.0000001", "--prune", "--threads", "1"]
        sweep.main([*argv, "--", "--dataset=synthetic", "--model=dense", "--l1=8", "--epochs=6"])
        rows = lines(name=name).values()
        found[name] = [(row["status"], row["epochs"], row["val_loss"]) for row in rows]
    assert Path("died").exists() and found["whole"] == found["dying"]
    assert found["whole"][1][:2] == ("pruned", 2)


def test_losses_that_cannot_be_compared_are_refused_with_what_can(capsys):
    argv = ["--method", "grid", "--script", "train_mnist.py", "--", "--dataset", "synthetic"]
    text = refused(capsys, "--param", "recipe=default,fast", *argv)
    assert "--label-smoothing" in text and "--metric val_acc" in text
    sweep.main(["--param", "recipe=default,fast", "--metric", "val_acc", "--dry-run", *argv])


# ---------------- A script of one's own ----------------
OWN = """
import json, os, pathlib, sys
import numpy as np
import common, evaluate

assert hasattr(common, "ArgumentParser") and hasattr(evaluate, "main")

def main(argv, on_epoch=None):
    flags = dict(word.split("=", 1) for word in argv if "=" in word)
    directory = pathlib.Path(argv[argv.index("--runs-dir") + 1], argv[argv.index("--run-name") + 1])
    directory.mkdir(exist_ok=True)
    x = float(flags["--x"])
    if x == 0.2 and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        (directory / "run.json").write_text(json.dumps({"status": "finished"}))
        os.kill(os.getpid(), 9)
    for epoch in (1, 2):
        row = {"epoch": np.int64(epoch), "score": np.float32(x * epoch)}
        on_epoch(row)
    best = {"score": np.float32(x)}
    return {"status": "finished", "best": best, "epochs": np.int64(2), "error": None}
"""


def test_a_script_of_ones_own_with_a_metric_of_its_own(toy, capsys):
    for name in ("common.py", "evaluate.py"):
        Path(name).write_text("raise SystemExit(name)")
    Path("own.py").write_text(OWN)
    argv = ["--script", "own.py", *toy[2:], "--method", "grid", "--param", "x=0.1,0.2,0.3"]
    assert "--goal" in refused(capsys, *argv, "--metric", "score")
    drawn = []
    Figure.savefig = lambda figure, *_, **__: drawn.append(figure)  # the fixture puts it back
    best = sweep.main([*argv, "--metric", "score", "--goal", "maximize"])["best"]
    assert Path("killed").exists() and best["params"] == {"x": 0.3}
    rows = lines()
    assert [row["status"] for row in rows.values()] == ["finished"] * 3
    assert rows[2]["score"] == pytest.approx(0.3) and rows[2]["epochs"] == 2
    assert "score" in board()[0]
    # The curves are what the script has reported.
    curves = [figure for figure in drawn if figure.axes and figure.axes[0].get_xlabel() == "epoch"]
    assert [len(line.get_xdata()) for line in curves[0].axes[0].lines] == [2, 2, 2]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def parse_arguments(argv): raise KeyError('depth')", "parse_arguments"),
        ("def parse_arguments(argv): return argparse.Namespace(epochs='many')", "many"),
        ("def parse_arguments(argv): raise SystemExit('no such net')", "no such net"),
    ],
)
def test_a_script_whose_parser_fails_is_one_line(code, expected, capsys):
    name = f"mine{abs(hash(code))}.py"
    Path(name).write_text(f"import argparse\ndef main(argv, on_epoch): ...\n{code}\n")
    text = refused(capsys, "--script", name, *ONE)
    assert expected in text and len(text.splitlines()) == 1


def test_the_parser_of_a_script_sees_every_flag_that_it_is_called_with(toy):
    needy = TOY.replace(
        'f"--{name}", type=kind', 'f"--{name}", required=name=="run-name", type=kind'
    )
    Path("toy.py").write_text(needy)
    assert needy != TOY
    sweep.main([*toy, *ONE])
    Path("toy.py").write_text(
        TOY.replace('("epochs", int, 8)', '("epochs", str, "8")').replace(
            "args.epochs + 1", "int(args.epochs) + 1"
        )
    )
    sweep.main([*toy[:-1], "text", *ONE, "--prune", "--eta", "2"])
    assert {row["epochs"] for row in lines(name="text").values()} <= {1, 2, 4, 8}


# ---------------- Failures ----------------
def test_a_damaged_trial_is_healed_by_retry_failed_and_blocks_no_report(toy, capsys):
    loud = [word for word in toy if word != "--quiet"]
    sweep.main([*loud, *ONE, "--", "--fail", "raise"])
    printed = capsys.readouterr().out
    assert "trial 1  failed" in printed and "ValueError: k is 2" in printed.split("trial  run")[0]
    assert "1 failed" in printed and "--resume runs/s --retry-failed" in printed
    assert [row["error"] for row in board()] == ["", "ValueError: k is 2"]
    assert "ValueError: k is 2" in Path("runs/s/report.html").read_text()
    Path("toy.py").write_text(TOY.replace('args.fail in ("raise", "torn")', "False"))
    (damaged,) = Path("runs/s").glob("trial-0001")
    for name in ("run.json", "log.jsonl", "last.pt"):
        (damaged / name).write_text("{")
    Path("runs/s/trial-0000/log.jsonl").write_text("{")
    sweep.main(["--resume", "runs/s", "--retry-failed", "--quiet"])
    assert [row["status"] for row in lines().values()] == ["finished"] * 2
    journal = Path("runs/s/study.journal")
    content = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([content[0], b'{"op_co\n', *content[1:]]))
    with pytest.raises(records.RunError, match=r"study\.journal is damaged"):
        sweep.main(["--resume", "runs/s", "--quiet"])


def test_failures_are_counted_in_a_row_and_diverged_trials_are_not_run_again(toy):
    # Every other trial fails: never two in a row.
    sweep.main([*toy, *GRID, "--max-failures", "2", "--", "--fail", "raise"])
    assert len(lines()) == 6
    argv = ["--method", "grid", "--param", "x=0.1,0.6,0.2"]
    sweep.main([*toy[:-1], "nan", *argv, "--", "--fail", "diverge"])
    assert [row["status"] for row in lines(name="nan").values()] == [
        "finished",
        "diverged",
        "finished",
    ]
    before = Path("runs/nan/trials.jsonl").read_bytes()
    sweep.main(["--resume", "runs/nan", "--retry-failed", "--quiet"])
    assert Path("runs/nan/trials.jsonl").read_bytes() == before


@pytest.mark.developers
def test_the_hint_how_to_go_on_has_no_password(toy, postgresql):
    url = postgresql.url.replace("sweep@", "sweep:secret@")
    with pytest.raises(
        records.RunError, match=r"--resume runs/s --storage .*sweep:\*\*\*@"
    ) as told:
        sweep.main([*toy, *GRID, "--storage", url, "--", "--fail", "all"])
    assert "secret" not in str(told.value)


# ---------------- What was dropped in silence ----------------
DROPPED = {
    "--method random --param lr=0.1,0.2 -- --lr 3": "--lr is searched",
    "--method random --param augment=true,false -- --no-augment": "--no-augment is searched",
    "--method grid --eta 2": "--eta has no effect without --prune",
    "--method grid --grace 20": "--grace has no effect without --storage",
    "--method random --param lr=1e-4...1e-1": "--param lr",
    "--method random --param momentum=0.8,0.9": "momentum",
    "--method random --param bs=32,64": "--bs: did you mean --batch-size?",
}


@pytest.mark.parametrize("argv", DROPPED)
def test_what_has_no_effect_is_refused(argv, capsys):
    text = refused(capsys, *argv.split())
    assert DROPPED[argv].replace("--param lr", "lr") in text


@pytest.mark.parametrize("url", ["postgresql://u:se@cr:e/t@h:abc/d", "postgresql://u:[s@h:abc/d"])
def test_an_odd_url_is_refused_without_its_password(url, capsys):
    text = refused(capsys, "--method", "random", "--name", "s", "--storage", url)
    assert "u:***@h" in text and len(text.splitlines()) == 1


def test_a_large_seed_and_a_smaller_count(toy, capsys):
    argv = [*toy, "--method", "bayes", "--param", "k=1,2,3", "--count", "2"]
    sweep.main([*argv, "--seed", "4294967296"])
    assert len(lines()) == 2
    for again in (
        ["--resume", "runs/s", "--count", "1"],
        [*argv, "--count", "1", "--seed", "4294967296"],
    ):
        with pytest.raises(records.UsageError, match="--count 1: the search has 2"):
            sweep.main(again)
    with pytest.raises(records.UsageError, match="its seed is 4294967296"):
        sweep.main(argv)
    sweep.main([*argv, "--count", "3", "--seed", "4294967296", "--jobs", "2"])
    assert len(lines()) == 3


# ---------------- Running ----------------
def test_the_gpus_are_dealt_out_in_turn_and_the_threads_divided(toy, monkeypatch):
    seen = f"""
    here = pathlib.Path({str(Path.cwd())!r})
    (here / f"gpu-{{os.environ['CUDA_VISIBLE_DEVICES']}}-{{torch.get_num_threads()}}").touch()
    end = time.monotonic() + 60
    while len([*here.glob("gpu-*")]) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    args, rows = parse_arguments(argv), []"""
    code = TOY.replace("import common, records", "import common, records, torch")
    Path("toy.py").write_text(code.replace("\n    args, rows = parse_arguments(argv), []", seen))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-7")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    sweep.main([*toy, *GRID, "--jobs", "4"])
    assert {path.name for path in Path().glob("gpu-*")} == {"gpu-0-2", "gpu-1-2", "gpu-GPU-7-2"}


def test_lines_come_in_the_order_of_their_ends_and_a_killed_worker_is_replaced(toy):
    (held,) = hold("runs", trial="trial-0000")
    process = start(*toy[:4], *toy[5:], *GRID, "--jobs", "2")
    path = Path("runs/s/trials.jsonl")
    until(lambda: path.exists() and len(lines()) == 5)
    held.unlink()
    assert process.finish() == (0, "")
    order = [json.loads(line)["trial"] for line in path.read_text().splitlines()]
    assert order == [1, 2, 3, 4, 5, 0]
    assert "5 of 6 trials" not in Path("sweep.out").read_text()


def test_nothing_is_written_to_the_journal_while_another_process_has_its_lock(toy):
    (held,) = hold("runs")
    process = start(*toy[:4], *toy[5:], "--method", "grid", "--param", "k=1")
    until(Path("runs/s/trial-0000/run.json").exists)
    journal = Path("runs/s/study.journal")
    with records.locked(journal, wait=True):
        before = journal.read_bytes()
        held.unlink()
        until(Path("runs/s/trial-0000/log.jsonl").exists)
        time.sleep(1)  # it would be written at once
        assert journal.read_bytes() == before
    assert process.finish() == (0, "")
    assert journal.read_bytes() != before and lines()[0]["epochs"] == 8


def test_a_resumed_trial_is_not_judged_again_at_a_band_that_it_has_passed(toy):
    # Trial 0 passes band 2 alone, and is killed at epoch 5, when better ones have passed it.
    (other,) = hold("runs", trial="trial-0001")
    config = {"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2}}
    config |= {"program": "toy.py", "method": "grid"}
    config["parameters"] = {"x": {"values": [0.9, 0.3, 0.3001]}}
    Path("sweep.json").write_text(json.dumps(config))
    Path("toy.py").write_text(
        TOY.replace(
            "        while any(",
            "        while epoch == 4 and args.x == 0.9 and pathlib.Path('wait').exists() or any(",
        )
    )
    Path("wait").touch()
    process = start("--config", "sweep.json", *toy[2:], "--jobs", "2")
    log = Path("runs/s/trial-0000/log.jsonl")
    until(lambda: log.exists() and len(log.read_text().splitlines()) == 3)
    other.unlink()
    until(lambda: Path("runs/s/trials.jsonl").exists() and len(lines()) == 2)
    process.process.kill()
    process.process.join()
    Path("wait").unlink()
    sweep.main(["--resume", "runs/s", "--quiet"])
    assert lines()[0]["epochs"] == 4  # and not 3: it ends at the next band


def test_a_search_that_is_not_complete_has_no_tested_winner(few_images):
    Path("few.py").write_text(
        FEW
        + """
import os, signal
from pathlib import Path
def main(argv, on_epoch=None):
    if "--lr=0.02" in argv and not Path("go").exists():
        os.kill(os.getppid(), 0)
        Path("reached").touch()
        import time
        time.sleep(100)
    return train_mnist.main(argv, on_epoch)
"""
    )
    argv = ["--method", "grid", "--script", "few.py", "--param", "lr=0.01,0.02", "--threads", "1"]
    argv += ["--runs-dir", "runs", "--name", "s", "--", "--dataset=synthetic", "--model=dense"]
    process = start(*argv, "--epochs=1")
    until(Path("reached").exists)
    os.kill(process.process.pid, signal.SIGINT)
    assert process.finish()[0] == 130
    assert list(lines()) == [0] and Path("runs/s/best").is_symlink()
    assert not list(Path("runs/s").glob("trial-*/metrics.json"))
    Path("go").touch()
    sweep.main(["--resume", "runs/s", "--quiet"])
    assert len(list(Path("runs/s").glob("trial-*/metrics.json"))) == 1
    # The page says what was searched, how, and what came out.
    page = Path("runs/s/report.html").read_text()
    for text in ("few.py", "lr=0.01,0.02", "on the test set, read once", "--model=dense", "--lr="):
        assert text in page
    assert "2 trials" in page


def test_several_seeds_have_a_row_with_mean_and_interval(toy):
    sweep.main([*toy, *ONE, "--seeds", "3", "--jobs", "2"])
    assert sorted((row["params"]["k"], row["seed"]) for row in lines().values()) == [
        (k, seed) for k in (1, 2) for seed in (42, 43, 44)
    ]
    first, second = board()
    mean = 0.09 + 0.1 + 1 / 8 - 0.043
    assert (first["k"], second["k"], first["run"]) == ("1", "2", "trial-0002")
    assert float(first["mean"]) == pytest.approx(mean)
    assert float(first["val_loss"]) == pytest.approx(mean - 0.001)  # of the run that is named
    assert float(first["high"]) - mean == pytest.approx(4.3027 * 0.001 / math.sqrt(3), rel=1e-3)
    assert float(first["seconds"]) == pytest.approx(0.3)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it asks glibc 2.33")
def test_the_memory_of_a_worker_does_not_grow(toy):
    told = f"""
def main(argv, on_epoch=None):
    with open({str(Path("memory").absolute())!r}, "a") as file:
        print(memory_in_use(), file=file)
    return train_mnist.main(argv, on_epoch)
"""
    Path("few.py").write_text(f"import ctypes, gc\n{MEMORY_IN_USE}{FEW}{told}")
    argv = ["--method", "random", "--script", "few.py", "--param", "lr=log:0.001..0.1"]
    argv += ["--count", "50", "--threads", "1", "--quiet", "--runs-dir", "runs", "--name", "s"]
    sweep.main([*argv, "--", "--dataset=synthetic", "--model=dense", "--l1=4", "--epochs=1"])
    sizes = [int(line) for line in Path("memory").read_text().splitlines()]
    assert len(sizes) == 50 and sizes[-1] - sizes[4] < 5e6


def test_a_target_ends_the_search(toy):
    argv = ["--method", "grid", "--param", "x=0.9,0.3,0.8,0.7,0.6", "--target", "0.3"]
    assert sweep.main([*toy, *argv])["status"] == "finished"
    assert lines()[1]["val_loss"] < 0.3 and len(lines()) < 5


def test_the_bar_shows_the_best(toy):
    terminal = "import sys; sys.stderr.isatty = lambda: True"
    loud = [word for word in toy if word != "--quiet"]
    before = f"import undrawn; undrawn.nothing_is_drawn(); {terminal}"
    (held,) = hold("runs", trial="trial-0005")
    process = Forked("sweep", *loud, *GRID, before=before)
    until(lambda: Path("err").exists() and "5 of 6 trials" in Path("err").read_text())
    held.unlink()
    assert process.finish()[0] == 0
    best = min(row["val_loss"] for row in lines().values())
    assert f"5 of 6 trials, epoch 0 of 8, best {best:.4f}" in Path("err").read_text()


# ---------------- Files in W&B's schema, as people write them ----------------
def from_file(capsys, text, *argv, name="sweep.yaml"):
    """The command lines of the trials of a configuration, and what else was said."""
    Path(name).write_text(text)
    sweep.main(["--config", name, "--dry-run", *argv])
    printed = capsys.readouterr().out.splitlines()
    commands = [line.partition("python ")[2].split()[1:] for line in printed if "python " in line]
    return commands, [line for line in printed if "python " not in line]


BASE = "program: train_mnist.py\nmethod: grid\n"


def test_names_and_numbers_are_read_as_they_are_meant(capsys):
    parameters = "parameters: {learning_rate: {values: [1e-3, 1.e-2]}, batch-size: {values: [1e2]}}"
    commands, said = from_file(
        capsys, f"sweep:\n  {BASE.replace(chr(10), chr(10) + '  ')}{parameters}"
    )
    assert commands[0][:2] == ["--lr=0.001", "--batch-size=100"] and len(commands) == 2
    assert said == ["learning_rate is read as lr"]
    quoted = "parameters: {model: {values: ['dense']}, net.l1: {values: [null, 8]}}"
    commands, _ = from_file(capsys, f"{BASE}name:\nproject: p\n{quoted}")
    assert [command[:-2] for command in commands] == [
        ["--model=dense"],
        ["--model=dense", "--l1=8"],
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("val/acc", "val_acc"),
        ("Validation_Accuracy", "val_acc"),
        ("val_accuracy", "val_acc"),
        ("epoch/val_accuracy", "val_acc"),
        ("validation_loss", "val_loss"),
        ("val/loss", "val_loss"),
        ("best_val_acc", "val_acc"),
    ],
)
def test_the_names_that_others_have_for_the_metric(written, meant, toy):
    Path("sweep.yaml").write_text(
        f"program: toy.py\nmethod: grid\nmetric: {{name: {written}}}\nparameters: {{k: {{value: 1}}}}"
    )
    sweep.main(["--config", "sweep.yaml", *toy[2:]])
    assert f'<td class="left">{meant}</td>' in Path("runs/s/report.html").read_text()


def test_an_idle_parameter_is_left_out_and_nothing_runs_twice(capsys):
    both = "{optimizer: {values: [adam, sgd]}, momentum: {values: [0.8, 0.9]}}"
    commands, said = from_file(capsys, f"{BASE}parameters: {both}")
    assert [command[:-2] for command in commands] == [
        ["--optimizer=adam"],
        ["--optimizer=sgd", "--momentum=0.8"],
        ["--optimizer=sgd", "--momentum=0.9"],
    ]
    assert len(said) == 1 and "no effect" in said[0]


def test_seeds_in_a_file_are_those_of_the_search(capsys):
    seeds = "parameters: {lr: {values: [0.1, 0.2]}, seed: {%s}}"
    commands, _ = from_file(capsys, BASE + seeds % "values: [50, 60]")
    assert [command[-1] for command in commands] == ["50", "60"] * 2
    commands, _ = from_file(capsys, BASE + seeds % "value: 7")
    assert [command[-1] for command in commands] == ["7"] * 2


def test_the_words_of_a_command(capsys, monkeypatch):
    monkeypatch.setenv("KIND", "synth")
    Path("sub").mkdir()
    (Path("sub") / "mine.py").write_text(FEW)
    words = "[uv, run, python, '${program}', '--dataset=${envvar:KIND}etic', '${args_no_hyphens}', '${args_no_boolean_flags}']"
    text = f"program: mine.py\nmethod: grid\ncommand: {words}\nparameters: {{lr: {{value: 0.1}}}}"
    Path("sub/sweep.yaml").write_text(text)
    sweep.main(["--config", "sub/sweep.yaml", "--dry-run"])
    assert "sub/mine.py --dataset=synthetic --lr=0.1" in capsys.readouterr().out
    commands, _ = from_file(
        capsys, f"{BASE}run_cap: 4\nparameters: {{l1: {{min: 4, max: 9}}}}", "--count", "2"
    )
    assert len(commands) == 2


UNUSUAL = {
    "metric: {name: f1, goal: maximize}": "val_loss, val_acc",
    "name: a/b": "sweep.yaml: sweep.py: error: argument --name",
    "parameters: {lr: {distribution: log_uniform, min: 0.001, max: 0.3}}": "log_uniform_values",
    "parameters: {lr: {values: [1, 2], probabilities: [0.1, 0.9]}}": "probabilities",
    "parameters: {lr: {distribution: beta, a: 1, b: 2}}": "beta",
    "parameters: {bs: {values: [1, 2]}}": "--bs: did you mean --batch-size?",
    "parameters: {dropout: {values: [0.1]}}": "--dropout: did you mean --d1?",
    "parameters: {lr: {value: 0.1}, seed: {min: 1, max: 9}}": "parameter seed",
    "command: ['${program}', '--x=${envvar:NO_SUCH}']": "NO_SUCH",
}


@pytest.mark.parametrize("change", UNUSUAL)
def test_what_cannot_be_read_as_meant_is_named(change, capsys):
    more = "" if change.startswith("parameters") else "parameters: {lr: {value: 0.1}}\n"
    Path("sweep.yaml").write_text(f"{BASE}{more}{change}\n")
    assert UNUSUAL[change] in refused(capsys, "--config", "sweep.yaml")


# ---------------- Pictures ----------------
@pytest.mark.parametrize("method", [GRID, [*BAYES, "--count", "10"]])
def test_one_exploded_trial_flattens_no_picture(method, monkeypatch):
    Path("toy.py").write_text(
        TOY.replace("+ 1 / epoch", "+ 1 / epoch + (1e9 if args.x == 0.2 or args.x > 0.9 else 0)")
    )
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    argv = ["--script", "toy.py", "--runs-dir", "runs", "--quiet", "--name", "s"]
    sweep.main([*argv, *method])
    assert drawn
    for figure in drawn:
        for axis in figure.axes:
            high = max(abs(limit) for limit in axis.get_ylim())
            assert high < 100, figure
    (curves,) = (f for f in drawn if f.axes and f.axes[0].get_xlabel() == "epoch")
    (thick,) = (line for line in curves.axes[0].lines if line.get_linewidth() > 2)
    best = min(row["val_loss"] for row in lines().values())
    assert min(thick.get_ydata()) == pytest.approx(best)
    if method is GRID:
        (grid,) = (figure for figure in drawn if figure.axes[0].images)
        axis = grid.axes[0]
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("k", "x")
        texts = {text.get_position(): text.get_text() for text in axis.texts}
        best = lines()[4]
        assert best["params"] == {"x": 0.3, "k": 1} and texts[0, 2] == f"{best['val_loss']:.4f}"
        assert float(texts[0, 1]) > 1e8  # its colour is cut off, and not its number

"""evaluate.py on several runs, and on runs that have been moved, changed or damaged: by its command
line and its files."""

import json
import os
import shutil
from pathlib import Path

import common
import evaluate
import records
import train_mnist

import forked
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import run
from test_evaluate import DENSE, ON_PHOTOS, draw_photos, page_of, rows_of, show

pytestmark = pytest.mark.usefixtures("few_images", "undrawn")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    argv = (
        "--dataset synthetic --model dense --l1 8 --epochs 3 --precision fp32 --quiet --run-name r"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mnist, "synthetic", forked.few_digits)
        train_mnist.main([*argv.split(), "--runs-dir", str(folder)])
    return folder / "r"


@pytest.fixture
def copy(trained):
    """Makes runs/name, a copy of a run with changes in its run.json."""

    def make(name, **changes):
        directory = Path("runs", name)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(trained, directory)
        record = records.read_record(directory)
        parts = record, record["args"], record["best"], record["data"]
        for key, value in changes.items():
            next(part for part in parts if key in part)[key] = value
        records.write_json(directory / "run.json", record)
        return directory

    return make


def evaluated(*argv):
    return evaluate.main([*map(str, argv)])


def compared(*argv):
    """The rows by the names of the runs, in order."""
    return {Path(row["run"]).name: row for row in evaluated(*argv)["runs"]}


# ------------------------ One run ------------------------
def test_each_split_has_a_directory_of_its_own_in_which_files_are_replaced_whole(copy, capsys):
    run = copy("r", threads=2, precision="fp16")
    record, before = records.read_record(run), {*run.iterdir()}
    for split, count in (("train", 270), ("val", 30)):
        metrics = evaluated(run, "--split", split, "--device", "cpu", "--csv")
        assert metrics == records.read_json(run / split / "metrics.json")
        assert metrics["images"] == count
        # What is to be known goes where no program reads it.
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 11 and "computed in fp32" in err
    assert {*run.iterdir()} == {*before, run / "train", run / "val"}
    assert metrics["accuracy"] == record["best"]["val_acc"]
    assert torch.get_num_threads() == 2
    file = run / "val" / "metrics.json"
    # It says of what the others are: so it comes last.
    assert file.stat().st_mtime_ns == max(path.stat().st_mtime_ns for path in file.parent.iterdir())
    os.link(file, "reader")
    evaluated(run, "--split", "val", "--tta", "mirror", "--quiet")
    assert json.loads(Path("reader").read_text()) == metrics != records.read_json(file)


def test_a_page_of_another_epoch_is_called_stale(copy, capsys):
    run = copy("r")
    evaluated(run, "--split", "val", "--quiet")
    evaluated(run)
    assert "another epoch" not in capsys.readouterr().out
    metrics = records.read_json(run / "val" / "metrics.json")
    records.write_json(run / "val" / "metrics.json", metrics | {"epoch": 99})
    evaluated(run)
    assert "runs/r/val/report.html is of another epoch" in capsys.readouterr().out


def test_bad_input_is_one_line_and_nothing_is_written(copy):
    def refused(expected, *argv):
        with pytest.raises(records.RunError, match=expected):
            evaluated(*argv, "--out", "out")
        assert not Path("out").exists()

    run = copy("r")
    path = run / "best.pt"
    state, content = records.load_checkpoint(path), path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    refused(r"best\.pt is damaged", run)
    path.unlink()
    refused(r"best\.pt is missing", run)
    for change in ({"weights": {}}, {"model": "other"}, {"l1": 5}):
        records.save_checkpoint(path, {**state, **change})
        refused("does not fit", run)
    for change, split, expected in (
        ({"test_checksum": "0"}, "test", "not what .* was tested on"),
        ({"checksum": "0"}, "val", "not what .* was trained on"),
        ({"val_size": 0.0}, "val", "without a validation split"),
        ({"script": "train_gone"}, "test", r"drawn by train_gone\.py"),
        ({"dataset": "mnist", "data_dir": "gone"}, "test", "gone.*; say where with --data-dir"),
    ):
        refused(expected, copy("r", **change), "--split", split)
    for name in ("name", "selection", "train", "val", "checksum"):
        record = records.read_record(copy("r"))
        del record["data"][name]
        records.write_json(run / "run.json", record)
        refused(f"run.json is damaged: data has no {name}", run)


def test_images_that_moved_are_found(copy):
    draw_photos()
    directory, *_ = run(train_mnist, *ON_PHOTOS, *DENSE)
    Path("p").rename("moved")
    with pytest.raises(records.RunError, match="p; say where with --data-dir"):
        evaluated(directory)
    assert evaluated(directory, "--data-dir", "moved", "--quiet")["images"] == 4


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("a b --predict x", "take one run"),
        ("a --predict x --export onnx", "not allowed with"),
        ("a --top 2", "goes with --predict"),
        ("a --predict ", "not an empty word"),
    ],
)
def test_flags_that_make_no_sense_are_refused_at_once(argv, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(argv.split(" "))
    assert expected in capsys.readouterr().err


def test_runs_star_skips_what_is_no_run_and_tells_the_status_of_the_others(copy, capsys):
    copy("running", status="running")
    killed = copy("killed", status="running")
    record = records.read_record(killed)
    for name in ("argv", "host", "versions", "git", "device"):  # these are only shown
        del record[name]
    records.write_json(killed / "run.json", record)
    Path("runs/empty").mkdir()
    with records.locked(Path("runs/running/.lock")):
        for _ in range(2):  # the second time, the first one's files are there
            rows = compared(*Path("runs").iterdir(), "--json")
            out, err = capsys.readouterr()
            assert json.loads(out) == [*rows.values()]
            found = {name: row["status"] for name, row in rows.items()}
            assert found == {"killed": "killed", "running": "running"}
            assert err.count("skipped") == 1 and "runs/empty is not a run" in err
        with pytest.raises(records.RunError, match="still being trained"):
            evaluated("runs/running")
    assert Path("runs/compare.html").exists()
    evaluated(killed)
    assert "runs/killed: killed after 3 epochs" in capsys.readouterr().out
    with pytest.raises(records.RunError, match="none of these"):
        evaluated("runs/empty", "runs/empty")
    for argv in (["none"], ["none", killed], ["none", "--predict", "x"]):
        with pytest.raises(records.UsageError, match="none is not a run directory"):
            evaluated(*argv)


# ------------------------ Several runs ------------------------
def test_the_runs_of_each_dataset_are_ranked(copy, trained, monkeypatch):
    monkeypatch.setattr(common, "load_data", None)  # it reads no images
    data = records.read_record(trained)["data"] | {"name": "other"}
    views = {"loss": 1.0, "acc": 0.9, "plain_loss": 1.1, "plain_acc": 0.8}
    made = [
        copy("odd", val_loss=0.1, val_checksum="1"),
        copy("smooth", label_smoothing=0.2, val_loss=1.9, val_acc=0.7654),
        copy("plain", val_loss=0.2, val_acc=0.5),
        copy("failed", status="failed", best=None, test=None),
        copy("worse", val_loss=0.3, val_acc=0.9, test={"acc": 0.85}, data=data),
        copy("better", val_loss=0.2, val_acc=0.8, test=views, tta="mirror", data=data),
    ]
    log = records.read_log(trained)
    changed = [json.dumps({**row, "val_loss": row["val_loss"] + 9}) for row in log]
    Path("runs/worse/log.jsonl").write_text("\n".join(changed))
    shown = show(Path("out"), *made, "--out", "out")
    rows = {Path(row["run"]).name: row for row in shown.result["runs"]}
    ranks = {"better": 1, "worse": 2, "smooth": 1, "plain": 2, "odd": None, "failed": None}
    assert [(name, row["rank"]) for name, row in rows.items()] == [*ranks.items()]
    assert rows["odd"]["not_ranked"] == "the runs differ in val images"
    assert "as the runs differ in val images: runs/odd" in shown.out
    # Losses with smoothed labels and without cannot be compared, accuracies can.
    assert "differ in --label-smoothing, so they are ranked by validation accuracy" in shown.out
    # Accuracies of averaged views are told from plain ones.
    found = [
        (row["test_acc"], row["plain_test_acc"], row["test_time_augmentation"])
        for row in rows.values()
    ]
    assert found[:2] == [(0.9, 0.8, "mirror"), (0.85, 0.85, None)]
    table, different, *_ = page_of(Path("out/compare.html")).tables
    assert "--label-smoothing" in different[0] and "--epochs" not in different[0]
    assert [row[0] for row in table[1:]] == [f"runs/{name}" for name in ranks]
    assert "76.54%" in table[3] and "failed" in table[6]
    lines = [[*line.get_ydata()] for line in shown.axes["compare"][0].lines]
    losses = [row["val_loss"] for row in log]
    assert lines == [losses, [loss + 9 for loss in losses]]


def test_runs_that_differ_in_their_seed_have_a_mean_with_an_interval(copy, capsys):
    def figures(*values):
        """Mean, deviation and interval of a run whose validation accuracies these are."""
        made = [
            copy(f"s{seed}", seed=seed, run_name=f"s{seed}", val_acc=value, test={"acc": value / 2})
            for seed, value in enumerate(values)
        ]
        rows = compared(*made, *others, "--json")
        assert [*rows.values()] == json.loads(capsys.readouterr().out)  # NaN is no JSON
        names = [name for name, row in rows.items() if row["seeds"] == len(values)]
        assert sorted(names) == [directory.name for directory in made]
        assert {row["seeds"] for row in rows.values()} <= {len(values), None}
        row = rows["s0"]
        assert row["test_acc_mean"] == pytest.approx(row["val_acc_mean"] / 2)
        return [row[f"val_acc_{name}"] for name in ("mean", "sd", "low", "high")]

    others = []
    assert figures(0.7, 0.7, 0.7) == pytest.approx([0.7, 0, 0.7, 0.7])
    assert figures(0.5, 0.9)[2:] == [None, None]
    assert figures(0.05, 0.6, 0.99)[2:] == [0, 1]
    # A seed counts once, by its better run; one that was killed does not, nor does another net.
    others = [copy("again", seed=2, val_loss=9.0, val_acc=0.1), copy("wider", seed=4, l1=5)]
    others.append(copy("killed", seed=5, status="killed"))
    values = 0.91, 0.94, 0.92
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    expected = [np.mean(values), np.std(values, ddof=1), *interval]
    assert figures(*values) == pytest.approx(expected)
    assert "{:.2%} to {:.2%}".format(*interval) in Path("runs/compare.html").read_text()


def keep_predictions(directory, right, **changes):
    """What an evaluation would leave, with images that are right or not, in an order of its own."""
    lines = [f"{index}.png,NA,0.5,{'NA' if yes else 'b'},0.5" for index, yes in enumerate(right)]
    np.random.default_rng(len(directory.name)).shuffle(lines)
    heading = "file,class,probability,predicted,predicted_probability"
    (directory / "predictions.csv").write_text("\n".join([heading, *lines, ""]))
    epoch = records.read_record(directory)["best"]["epoch"]
    metrics = {"epoch": epoch, "checksum": "same", "images": len(right)}
    records.write_json(directory / "metrics.json", metrics | changes)


@pytest.mark.parametrize(("one", "other"), [(0, 5), (1, 7), (16, 6), (240, 261), (0, 0)])
def test_pairs_agree_with_what_was_published_and_with_scipy(copy, one, other):
    first, second = copy("a", val_loss=0), copy("bb", val_loss=1)
    keep_predictions(first, [True] * (other + 1) + [False] * (one + 12))
    keep_predictions(second, [True] + [False] * other + [True] * one + [False] * 12)
    pair = compared(first, second, "--quiet")["bb"]
    assert (pair["pair_only_this_right"], pair["pair_only_other_right"]) == (one, other)
    p, images = 1.0, one + other + 13
    assert pair["pair_images"] == images
    assert pair["pair_difference"] == pytest.approx((one - other) / images)
    if one + other:
        exact = scipy.stats.binomtest(one, one + other).pvalue
        p = exact - scipy.stats.binom.pmf(one, one + other, 0.5)
    assert pair["pair_mid_p"] == pytest.approx(min(p, 1))
    if (one, other) == (1, 7):  # Bentur et al. in M. W. Fagerland et al. (2013)
        found = [pair[f"pair_{name}"] for name in ("mid_p", "low", "high")]
        assert found == pytest.approx([0.0391, -0.5084, -0.0134], abs=1e-4)


def test_pairs_are_of_the_same_images_and_of_the_weights_that_there_are(copy, capsys):
    made = [copy(name, val_loss=loss) for loss, name in enumerate("abcdefghi")]
    for directory in made[:-1]:
        keep_predictions(directory, [True, False])
    keep_predictions(made[1], [True, False], checksum="other")
    keep_predictions(made[2], [True, False], epoch=99)
    damages = "", "file,class\n", "\x00\x01", "file,class,predicted\na,b\n"
    for directory, damage in zip(made[3:], damages, strict=False):
        (directory / "predictions.csv").write_text(damage)
    rows = compared(*made)
    assert [name for name, row in rows.items() if row["pair_with"] == "runs/a"] == ["h"]
    reasons = [row["not_paired"] for row in rows.values()]
    assert reasons == [
        None,
        "evaluated on other test images than runs/a",
        "trained on since the evaluation",
        *(f"runs/{name}/predictions.csv is damaged" for name in "defg"),
        None,
        "not evaluated on the test images",
    ]
    assert "not compared image by image, as trained on since" in capsys.readouterr().out


def test_the_same_photos_in_two_sizes_are_a_pair():
    draw_photos()
    made = []
    for side in (8, 12):
        argv = [*ON_PHOTOS, *DENSE, "--image-size", side, "--run-name", f"side{side}"]
        made.append(run(train_mnist, *argv)[0])
        evaluated(made[-1], "--quiet")
    assert [row["pair_images"] for row in compared(*made).values()] == [None, 4]


# ------------------------ Folds ------------------------
def test_folds_give_a_mean_and_the_suspects_among_all_images(capsys, monkeypatch):
    draw_photos()
    for file, place in (("light/3", "dark"), ("dark/4", "light"), ("light/5", "dark")):
        shutil.move(f"p/{file}.png", f"p/{place}/wrong{file[-1]}.png")
    argv = [*ON_PHOTOS, *DENSE, "--epochs", 12, "--lr", 0.003, "--run-name"]
    folds = [run(train_mnist, *argv, f"f{k}", "--fold", f"{k}/5")[0] for k in range(1, 6)]
    rows, out = compared(*folds), capsys.readouterr().out
    accuracies = [records.read_record(path)["best"]["val_acc"] for path in folds]
    row = rows["f1"]
    assert (row["folds"], row["seeds"]) == (5, None)
    assert row["fold_val_acc_mean"] == pytest.approx(np.mean(accuracies))
    assert f"{np.mean(accuracies):.2%}" in out
    suspects = rows_of("runs/suspects.csv")
    names = [Path(row["file"]).name for row in suspects]
    assert {*names[:3]} == {"wrong3.png", "wrong4.png", "wrong5.png"} and len(names) <= 4
    assert all(Path(row["file"]).is_file() for row in suspects)
    page = page_of(Path("runs/compare.html"))
    assert [text.splitlines()[-1] for text in page.captions[: len(names)]] == names
    counts = {name: str(len([*Path("p", name).iterdir()])) for name in ("dark", "light")}
    assert {row[0]: row[1] for row in page.tables[-1][1:]} == counts

    # Each is ranked with its like. Where folds are missing, no images are read.
    monkeypatch.setattr(common, "load_data", None)
    record = records.read_record(folds[0])
    best = record["best"] | {"val_loss": record["best"]["val_loss"] + 1}
    changed = record | {"best": best, "args": record["args"] | {"lr": 0.1}}
    records.write_json(shutil.copytree(folds[0], Path("runs/other")) / "run.json", changed)
    rows = compared(*folds[:4], "runs/other", "--out", "out")
    out = capsys.readouterr().out
    assert "4 of 5 folds" in out and not Path("out/suspects.csv").exists()
    assert "not ranked" not in out and "image by image" not in out
    found = {name: (row["rank"], row["folds"]) for name, row in rows.items()}
    assert found == {f"f{k}": (1, 4) for k in range(1, 5)} | {"other": (2, None)}

"""evaluate.py on several runs, and on runs that have been moved, changed or damaged: by its command
line and its files."""

import json
import re
import shutil
from pathlib import Path

import common
import records
import train_mnist

import forked
import numpy as np
import pytest
import scipy.stats
import torch
from test_evaluate import DENSE, draw_photos, evaluated, on_photos, page_of, rows_of, show

pytestmark = pytest.mark.usefixtures("few_images", "undrawn")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a validation split and a test."""
    folder = tmp_path_factory.mktemp("comparison")
    argv = f"--dataset synthetic --model dense --l1 8 --epochs 3 --runs-dir {folder} --run-name r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mnist, "synthetic", forked.few_digits)
        train_mnist.main(f"{argv} --precision fp32 --quiet".split())
    return folder / "r"


@pytest.fixture
def copy(trained):
    """Makes runs/name, a copy of that run with changes in its run.json."""

    def make(name, **changes):
        directory = Path("runs", name)
        shutil.copytree(trained, directory, dirs_exist_ok=True)
        record = records.read_record(trained)
        parts = [record, record["args"], record["best"], record["data"]]
        for key, value in changes.items():
            part = next(part for part in parts if key in part)
            part[key] = value
        records.write_json(directory / "run.json", record)
        return directory

    return make


def compared(*argv):
    """The rows of a comparison by the names of the runs, in order."""
    return {Path(row["run"]).name: row for row in evaluated(*argv)["runs"]}


def in_words(rows, *names):
    """Of each run of a comparison some figures, as in "a 1, b None"."""
    texts = []
    for run, row in rows.items():
        figures = [str(row[name]) for name in names]
        texts.append(" ".join([run, *figures]))
    return ", ".join(texts)


def refused(expected, *argv, error=records.RunError):
    """evaluate.py ends with this line, and has written nothing."""
    with pytest.raises(error, match=expected):
        evaluated(*argv, "--out out")
    assert not Path("out").exists()


# ------------------------ One run ------------------------
def test_each_split_has_a_directory_of_its_own(copy, capsys):
    """The figures of the training and the validation images lie beside those of the test."""
    run = copy("r", threads=2, precision="fp16")
    before = {*run.iterdir()}
    for split, count in (("train", 270), ("val", 30)):
        metrics = evaluated(run, f"--split {split} --device cpu --csv")
        assert metrics == records.read_json(run / split / "metrics.json")
        assert metrics["images"] == count

        # What is to be known goes where no program reads it.
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 11
        assert "computed in fp32" in err
    assert {*run.iterdir()} == {*before, run / "train", run / "val"}

    # It computes as the training did.
    assert metrics["accuracy"] == records.read_record(run)["best"]["val_acc"]
    assert torch.get_num_threads() == 2


def test_metrics_json_says_of_what_the_other_files_are(copy):
    """So it comes last: a crash before it shows as an evaluation that is missing, or older."""
    run = copy("r")
    evaluated(run, "--split val")
    file = run / "val" / "metrics.json"
    written = {path: path.stat().st_mtime_ns for path in file.parent.iterdir()}
    assert written[file] == max(written.values())

    # The page says of which epoch it is.
    title = f"r, epoch {records.read_json(file)['epoch']}:"
    assert title in (run / "val" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "split", "expected"),
    [
        ({"test_checksum": "0"}, "test", "not what .* was tested on"),
        ({"checksum": "0"}, "val", "not what .* was trained on"),
        ({"val_size": 0.0}, "val", "has no val images of its own"),
        ({"script": "train_gone"}, "test", r"drawn by train_gone\.py"),
        ({"dataset": "mnist", "data_dir": "gone"}, "test", "gone.*; say where with --data-dir"),
        ({"data": {}}, "test", "run.json is damaged: it has no checksum, name"),
    ],
)
def test_a_run_is_evaluated_on_its_own_images_or_not_at_all(copy, changes, split, expected):
    """Whatever has become of the images, no figure is of others."""
    refused(expected, copy("r", **changes), "--split", split)


def test_weights_that_do_not_fit_or_are_missing_are_one_line(copy):
    """Who has changed a model of common.py is told which file does not fit it."""
    run = copy("r")
    path = run / "best.pt"
    state = records.load_checkpoint(path)
    changes = [
        {"weights": {}},
        {"model": "other"},
        {"l1": 5},
    ]
    for change in changes:
        records.save_checkpoint(path, state | change)
        refused(r"best\.pt does not fit", run)
    path.unlink()
    refused(r"best\.pt is missing", run)


def test_runs_star_skips_what_is_no_run_and_tells_the_status_of_the_others(copy, capsys):
    """`evaluate.py runs/*` works whatever lies there."""
    # A directory of something else, a picture, a run that is trained, and one that was killed, with
    # nothing in its run.json but what is needed.
    Path("runs/empty").mkdir(parents=True)
    Path("runs/picture.png").touch()
    running = copy("running", status="running")
    killed = copy("killed", status="running")
    record = records.read_record(killed)
    needed = records.RECORD | {"format"}
    records.write_json(killed / "run.json", {name: record[name] for name in needed})

    with records.locked(running / ".lock"):
        rows = compared(*Path("runs").iterdir(), "--json")
        refused("still being trained", running)
    out, err = capsys.readouterr()
    assert json.loads(out) == [*rows.values()]
    assert sorted(in_words(rows, "status").split(", ")) == ["killed killed", "running running"]
    assert err.count("skipped") == 1
    assert "runs/empty is not a run" in err
    assert Path("runs/compare.html").exists()

    # The one run alone.
    evaluated(killed)
    assert "runs/killed: killed after 3 epochs" in capsys.readouterr().out

    # A name that is mistyped is told.
    refused("none of these", "runs/empty runs/empty")
    for argv in ("none", f"none {killed}", "none --predict x"):
        refused("none is not a run directory", argv, error=records.UsageError)


# ------------------------ Several runs ------------------------
def test_the_runs_of_each_dataset_are_ranked(copy, trained, monkeypatch):
    """The best comes first, and what cannot be compared fairly has no rank."""
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
    log = [row | {"val_loss": 9} for row in records.read_log(trained)]
    Path("runs/worse/log.jsonl").write_text("\n".join(map(json.dumps, log)))
    shown = show(Path("out"), *made, "--out out")
    rows = {Path(row["run"]).name: row for row in shown.result["runs"]}
    # Each dataset has its own ranks.
    ranks = "better 1, worse 2, smooth 1, plain 2, odd None, failed None"
    assert in_words(rows, "rank") == ranks
    assert "as the runs differ in val images: runs/odd" in shown.out

    # Losses with smoothed labels and without cannot be compared, accuracies can.
    assert "differ in --label-smoothing, so they are ranked by validation accuracy" in shown.out

    # Accuracies of averaged views are told from plain ones.
    found = in_words(rows, "test_acc", "plain_test_acc", "test_time_augmentation")
    assert found.startswith("better 0.9 0.8 mirror, worse 0.85 0.85 None, ")

    # The page says it in words, with the flags that differ, and without those that do not.
    # The third and the last run stand below the heading.
    table, different, *_ = page_of(Path("out/compare.html")).tables
    assert "--label-smoothing" in different[0]
    assert "--epochs" not in different[0]
    assert "76.54%" in table[3]
    assert "failed" in table[6]

    # The picture has a line for each of the two runs, the better one first.
    _, worse = shown.axes["compare"][0].lines
    assert [*worse.get_ydata()] == [9, 9, 9]


def test_a_run_without_an_epoch_does_not_decide_how_the_others_are_ranked(copy):
    """It has no figure, so it does not matter what its loss and its images were."""
    failed = [
        copy("failed", best=None, label_smoothing=0.2),
        copy("ended", best=None, val_checksum="1"),
    ]
    others = [copy("good", val_loss=0.1), copy("sure", val_loss=0.9, val_acc=1.0)]
    for directory in failed + others:
        keep_predictions(directory, [True, False])
    for more in failed:
        rows = compared(more, *others)
        assert in_words(rows, "rank") == f"good 1, sure 2, {more.name} None"


def test_runs_that_differ_in_their_seed_have_a_mean_with_an_interval(copy):
    """It is Student's interval, of the runs that came to their end."""

    def figures(*accuracies, others=()):
        """Mean, deviation and interval of runs with these validation accuracies."""
        made = []
        for seed, value in enumerate(accuracies):
            name = f"s{seed}"
            test = {"acc": value / 2}
            made.append(copy(name, seed=seed, run_name=name, val_acc=value, test=test))
        rows = compared(*made, *others)
        counts = {name: row["seeds"] for name, row in rows.items() if row["seeds"]}
        assert counts == {directory.name: len(made) for directory in made}
        row = rows["s0"]
        assert row["test_acc_mean"] == pytest.approx(row["val_acc_mean"] / 2)
        return [row[f"val_acc_{name}"] for name in ("mean", "sd", "low", "high")]

    assert figures(0.7, 0.7, 0.7) == pytest.approx([0.7, 0, 0.7, 0.7])
    assert figures(0.5, 0.9)[2:] == [None, None]
    assert figures(0.05, 0.6, 0.99)[2:] == [0, 1]

    # A seed counts once, by its better run; one that was killed does not, nor does another net.
    others = [
        copy("again", seed=2, val_loss=9.0, val_acc=0.1),
        copy("wider", seed=4, l1=5),
        copy("killed", seed=5, status="killed"),
    ]
    values = [0.91, 0.94, 0.92]
    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    expected = [np.mean(values), np.std(values, ddof=1), *interval]
    assert figures(*values, others=others) == pytest.approx(expected)
    assert "{:.2%} to {:.2%}".format(*interval) in Path("runs/compare.html").read_text()


# ------------------------ Pairs ------------------------
def keep_predictions(directory, right, **changes):
    """What an evaluation would leave, with images that are right or not, in an order of its own."""
    lines = [f"{index}.png,NA,{'NA' if yes else 'b'}" for index, yes in enumerate(right)]
    np.random.default_rng(len(directory.name)).shuffle(lines)
    text = "\n".join(["file,class,predicted", *lines, ""])
    (directory / "predictions.csv").write_text(text)
    best = records.read_record(directory)["best"] or {"epoch": 1}
    epoch = best["epoch"]
    metrics = {"epoch": epoch, "checksum": "same", "images": len(right)} | changes
    records.write_json(directory / "metrics.json", metrics)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0, 0),
        (0, 5),
        (1, 7),
        (5, 5),
        (16, 6),
        (240, 261),
    ],
)
def test_pairs_agree_with_what_was_published_and_with_scipy(copy, one, other):
    """Whether one of two models is better by more than chance is told by McNemar's mid-p test."""
    first = copy("a", val_loss=0)
    second = copy("bb", val_loss=1)
    both, neither = 1, 12
    keep_predictions(first, [True] * (both + other) + [False] * (one + neither))
    keep_predictions(second, [True] * both + [False] * other + [True] * one + [False] * neither)
    pair = compared(first, second, "--quiet")["bb"]

    images = both + one + other + neither
    names = ("images", "only_this_right", "only_other_right")
    assert [pair[f"pair_{name}"] for name in names] == [images, one, other]
    assert pair["pair_difference"] == pytest.approx((one - other) / images)

    # The exact test, with half of the probability of what was seen. It is 1 at a tie.
    p = 1.0
    if one != other:
        exact = scipy.stats.binomtest(one, one + other).pvalue
        p = exact - scipy.stats.binom.pmf(one, one + other, 0.5)
    assert pair["pair_mid_p"] == pytest.approx(min(p, 1))

    # Bentur et al. in M. W. Fagerland et al. (2013).
    if (one, other) == (1, 7):
        found = [pair[f"pair_{name}"] for name in ("mid_p", "low", "high")]
        assert found == pytest.approx([0.0391, -0.5084, -0.0134], abs=1e-4)


def test_pairs_are_of_the_same_images_and_of_the_weights_that_there_are(copy, capsys):
    """A run that cannot be compared image by image says why."""
    changes = {
        "b": {"checksum": "other"},
        "c": {"epoch": 99},
    }
    damages = {
        "d": "",
        "e": "file,class\n",
        "f": "\x00\x01",
        "g": "file,class,predicted\na,b\n",
    }
    made = [copy(name, val_loss=loss) for loss, name in enumerate("abcdefghi")]
    for directory in made[:-1]:
        keep_predictions(directory, [True, False], **changes.get(directory.name, {}))
    for name, damage in damages.items():
        Path("runs", name, "predictions.csv").write_text(damage)

    rows = compared(*made)
    assert [name for name, row in rows.items() if row["pair_with"] == "runs/a"] == ["h"]
    assert {name: row["not_paired"] for name, row in rows.items() if row["not_paired"]} == {
        "b": "evaluated on other test images than runs/a",
        "c": "trained on since the evaluation",
        **{name: f"runs/{name}/predictions.csv is damaged" for name in damages},
        "i": "not evaluated on the test images",
    }
    assert "not compared image by image, as trained on since" in capsys.readouterr().out


def test_the_same_photos_in_two_sizes_are_a_pair():
    """Which size of images is better can be asked."""
    draw_photos()
    made = [on_photos(f"{DENSE} --image-size {side} --run-name {side}") for side in (8, 12)]
    for directory in made:
        evaluated(directory, "--quiet")
    assert [row["pair_images"] for row in compared(*made).values()] == [None, 4]


# ------------------------ Folds ------------------------
def test_folds_give_a_mean_and_the_suspects_among_all_images(capsys):
    """Each image is judged by the run that was not trained on it."""
    # Three of forty images have a wrong label.
    draw_photos()
    for file, place in (("light/3", "dark"), ("dark/4", "light"), ("light/5", "dark")):
        shutil.move(f"p/{file}.png", f"p/{place}/wrong{file[-1]}.png")
    flags = f"{DENSE} --epochs 12 --lr 0.003"
    folds = [on_photos(f"{flags} --run-name f{k} --fold {k}/5") for k in range(1, 6)]

    row = compared(*folds)["f1"]
    mean = np.mean([records.read_record(path)["best"]["val_acc"] for path in folds])
    assert (row["folds"], row["seeds"]) == (5, None)
    assert row["fold_val_acc_mean"] == pytest.approx(mean)
    assert f"{mean:.2%}" in capsys.readouterr().out

    # They are found, as files that can be opened: those whose label is least likely come first,
    # and there is a tenth of all at most.
    files = [Path(row["file"]) for row in rows_of("runs/suspects.csv")]
    names = [file.name for file in files]
    assert {*names[:3]} == {"wrong3.png", "wrong4.png", "wrong5.png"}
    assert len(names) <= 4
    assert all(file.is_file() for file in files)

    # The page shows them, and how each class does.
    page = page_of(Path("runs/compare.html"))
    for text, name in zip(page.captions, names, strict=False):
        assert text.endswith(name)
    rows = [row[:2] for row in page.tables[-1]]
    assert rows == [["class", "images"], ["dark", "21"], ["light", "19"]]

    # Where the images have gone, the rest of a comparison is as before.
    Path("p").rename("q")
    assert compared(*folds)["f1"]["fold_val_acc_mean"] == pytest.approx(mean)
    out = capsys.readouterr().out
    assert "wrong labels are not looked for: the images of runs/f1 are not in" in out


def test_folds_are_ranked_with_their_like_even_where_some_are_missing(copy, monkeypatch, capsys):
    """Two settings can be compared before all folds are trained; then no images are read."""
    monkeypatch.setattr(common, "load_data", None)
    made = [copy(f"f{k}", fold=f"{k}/5", files="data.csv") for k in range(1, 5)]
    made.append(copy("other", fold="1/5", lr=0.1, val_loss=9.0))
    rows = compared(*made)
    assert {name: (row["rank"], row["folds"]) for name, row in rows.items()} == {
        "f1": (1, 4),
        "f2": (1, 4),
        "f3": (1, 4),
        "f4": (1, 4),
        "other": (2, None),
    }
    out = capsys.readouterr().out
    assert "4 of 5 folds" in out
    assert "not ranked" not in out
    assert "image by image" not in out


def test_folds_belong_together_that_divide_the_same_images_in_the_same_way(copy):
    """Thirds and halves overlap, and a run that is no fold is none of them."""
    made = [copy(fold.replace("/", "of"), fold=fold) for fold in ("1/3", "2/3", "1/2", "2/2")]
    rows = compared(copy("whole"), *made, copy("3of3", fold="3/3", limit_train=9, val=29))
    assert {name: row["folds"] for name, row in rows.items()} == {
        "whole": None,
        "1of3": 2,
        "2of3": 2,
        "3of3": None,
        "1of2": 2,
        "2of2": 2,
    }

    # A copy of the images is the same; a label that was corrected meanwhile makes others of them.
    draw_photos()
    shutil.copytree("p", "q")
    folds = [on_photos(f"{DENSE} --fold 1/2 --run-name f1")]
    folds.append(on_photos(f"{DENSE} --fold 2/2 --dataset q --run-name f2"))
    assert compared(*folds)["f1"]["folds"] == 2
    shutil.move("q/light/3.png", "q/dark/3.png")
    folds[1] = on_photos(f"{DENSE} --fold 2/2 --dataset q --run-name other")
    assert compared(*folds)["f1"]["folds"] is None


def test_what_is_to_be_known_of_a_comparison(copy, monkeypatch, capsys):
    """A seed is a difference, and the test set may have chosen. A run named twice is one run."""
    other = copy("b", selection="test set")
    record = records.read_record(other)
    record["args"]["seed"] = 1
    records.write_json(other / "run.json", record)
    monkeypatch.chdir(copy("a"))
    rows = compared(".", "../b", "../a")
    assert [*rows] == ["a", "b"]
    out = capsys.readouterr().out
    assert re.search(r"run +--seed", out)
    assert "which flatters its figures: ../b" in out
    assert Path("../compare.html").exists()


def test_equally_likely_classes_come_in_their_order(copy):
    """--predict answers as predictions.csv does."""
    run = copy("r")
    state = records.load_checkpoint(run / "best.pt")
    state["weights"] = {name: 0 * value for name, value in state["weights"].items()}
    records.save_checkpoint(run / "best.pt", state)
    evaluated(run)
    assert {row["predicted"] for row in rows_of(run / "predictions.csv")} == {"0"}
    draw_photos()
    answers = evaluated(run, "--predict p/dark/2.png --top 10")["predictions"]
    assert [answer["class"] for answer in answers] == list("0123456789")

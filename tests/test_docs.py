"""What the documentation says can be done: its links lead somewhere, its commands have flags that
there are."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import evaluate
import records
import sweep
import train_cifar
import train_mnist

from conftest import ROOT, run
from test_data import pictures

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {script.__name__: script for script in (train_mnist, train_cifar, evaluate, sweep)}
TINY = "--dataset synthetic --c1 2 --c2 2 --l1 4 --quiet --epochs 2 --runs-dir runs"


def commands(text):
    """The scripts that are run in `text`, each with its arguments."""
    # A command between backticks may go over the end of a line.
    text = re.sub(r"(?<!`)`[^`]+`", lambda span: span[0].replace("\n", " "), text)

    # Without what only a shell, or only a reader, understands.
    text = re.sub(r"\\\n|[<>]", "", text)
    text = re.sub(r"\$\w+", "1", text)
    return re.findall(rf"python3? ({'|'.join(SCRIPTS)})\.py([^`#|;&)\n]*)", text)


def test_every_link_leads_to_a_file():
    """A reader who follows a link within the repository finds a file."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_command_is_one_that_its_script_takes(few_images):
    """Who copies a command out of the documentation is not told that there is no such flag."""
    # The runs, images and files that the commands name.
    directory, *_ = run(train_cifar, *TINY.split(), "--no-test", "--run-name", "run")
    for name in ("a", "b", "mine"):
        shutil.copytree(directory, directory.with_name(name))
    pictures(".", {"PATH/a": 3, "PATH/b": 3, "album": 1})
    shutil.copy("album/0.png", "photo.png")
    Path("FILE").touch()
    Path("sweep.yaml").write_text(
        "{program: train_mnist.py, method: grid, parameters: {lr: {values: [1, 2]}}}"
    )

    # They are found, those of each script.
    found = [command for page in PAGES for command in commands(page.read_text())]
    assert {script for script, _ in found} == {*SCRIPTS}
    assert len(found) > 30

    for script, words in found:
        try:
            SCRIPTS[script].parse_arguments(shlex.split(words))
        except SystemExit as end:
            assert end.code == 0, (script, words)  # --help


def test_the_lines_on_tensorboard_and_mlflow_do_what_they_say(few_images, monkeypatch):
    """Copied as they are, they send the figures of each epoch to the tool that they name."""
    # Stand-ins for the two packages, which are not installed, and a training of a second.
    tensorboard = MagicMock()
    mlflow = MagicMock()
    main = train_cifar.main

    def short(argv, on_epoch):
        return main([*argv, *TINY.split()], on_epoch)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(train_cifar, "main", short)

    page = (ROOT / "docs/tracking.md").read_text()
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(code, {})

    # Five figures of each of two epochs.
    writer = tensorboard.SummaryWriter.return_value.__enter__.return_value
    assert writer.add_scalar.call_count == 2 * 5

    # The last epoch's figures, and the arguments of the run.
    directory = Path(tensorboard.SummaryWriter.call_args.args[0])
    (figures,), step = mlflow.log_metrics.call_args
    assert figures["val_loss"] == records.read_log(directory)[1]["val_loss"]
    assert step == {"step": 2}
    assert mlflow.log_params.call_args.args[0]["seed"] == 42

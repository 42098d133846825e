"""What the documentation says can be done: links lead somewhere, commands have flags that there are."""

import re
import shlex
import shutil
import subprocess
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
TINY = ["--dataset", "synthetic", "--c1", "2", "--c2", "2", "--l1", "4", "--quiet"]
TINY += ["--epochs", "2", "--runs-dir", "runs"]


def blocks(text, language):
    """The content of the blocks in `text` that are in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The scripts that are run in `text`, each with its arguments."""
    text = re.sub(r"(?<!`)`[^`]+`", lambda span: span[0].replace("\n", " "), text)
    text = re.sub(r"\$\w+", "1", re.sub(r"\\\n|[<>]", "", text))
    return re.findall(rf"python3? ({'|'.join(SCRIPTS)})\.py([^`#|;&)\n]*)", text)


def test_every_link_leads_to_a_file():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), link


def test_every_command_is_one_that_its_script_takes(few_images):
    # The runs, images and files that the commands name.
    directory, *_ = run(train_cifar, *TINY, "--no-test", "--run-name", "run")
    for name in ("a", "b", "mine"):
        shutil.copytree(directory, directory.with_name(name))
    pictures(".", {"PATH/a": 3, "PATH/b": 3, "album": 1})
    shutil.copy("album/0.png", "photo.png")
    Path("FILE").touch()
    Path("sweep.yaml").write_text(
        "{program: train_mnist.py, method: grid, parameters: {lr: {values: [1, 2]}}}"
    )

    found = [command for page in PAGES for command in commands(page.read_text())]
    assert {script for script, _ in found} == {*SCRIPTS}
    assert len(found) > 30
    for script, words in found:
        try:
            SCRIPTS[script].parse_arguments(shlex.split(words))
        except SystemExit as end:
            assert end.code == 0, (script, words)  # --help


def test_the_ci_runs_the_two_commands_of_the_quick_start():
    ci = (ROOT / ".ci/run").read_text()
    function = re.search(r"^quick_start\(\) \{$.*?^\}$", ci, re.MULTILINE | re.DOTALL)[0]
    expected = blocks((ROOT / "README.md").read_text(), "sh")
    for number in (1, 2):
        shell = ["bash", "-euc", f"{function}\nquick_start {number}"]
        command = subprocess.check_output(shell, cwd=ROOT, text=True)
        assert command == expected[number - 1]
        assert command.startswith("python3 -m venv .venv && ")


def test_the_lines_on_tensorboard_and_mlflow_do_what_they_say(few_images, monkeypatch):
    """With stand-ins for the two packages, which are not installed."""
    tensorboard = MagicMock()
    mlflow = MagicMock()
    main = train_cifar.main
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(train_cifar, "main", lambda argv, on_epoch: main([*argv, *TINY], on_epoch))
    for code in blocks((ROOT / "docs/tracking.md").read_text(), "python"):
        exec(code, {})
    writer = tensorboard.SummaryWriter.return_value.__enter__.return_value
    assert writer.add_scalar.call_count == 2 * 5
    directory = tensorboard.SummaryWriter.call_args.args[0]
    numbers = mlflow.log_metrics.call_args
    assert numbers.args[0]["val_loss"] == records.read_log(Path(directory))[1]["val_loss"]
    assert numbers.kwargs == {"step": 2}
    assert mlflow.log_params.call_args.args[0]["seed"] == 42

"""What the documentation says can be done: links lead somewhere, commands have flags that there are."""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import records
import sweep
import train_cifar
import train_mnist

import pytest
from conftest import ROOT, run
from PIL import Image

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "train_mnist.py": train_mnist.parse_arguments,
    "train_cifar.py": train_cifar.parse_arguments,
    "evaluate.py": evaluate.parse_arguments,
    "sweep.py": sweep.parse_arguments,
}
all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text):
    """The content of the code blocks that are for a shell."""
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Each command of the shell blocks in `text` that runs a script, and each in the running text: lists of words."""
    found, variables = [], {}
    spans = re.findall(
        r"`(python \w+\.py[^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    for line in [*lines, *(" ".join(span.split()) for span in spans)]:
        # What stands in angle brackets is a name, and no redirection.
        lexer = shlex.shlex(re.sub(r"<(\w+)>", r"\1", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                command.append(re.sub(r"\$\{?(\w+)\}?", lambda name: variables[name[1]], word))
                continue
            if command[:1] == ["for"]:
                variables[command[1]] = command[3]
            scripts = [place for place, part in enumerate(command) if part in PARSERS]
            if scripts:
                assert Path(command[scripts[0] - 1]).name in ("python", "python3"), command
                found.append(command[scripts[0] :])
            command = []
    return found


@pytest.fixture
def what_they_name(few_images):
    """The runs, images and files that the commands name, here."""
    argv = ["--dataset", "synthetic", "--c1", 2, "--c2", 2, "--l1", 4, "--epochs", 1, "--quiet"]
    directory, *_ = run(train_cifar, *argv, "--no-test", "--run-name", "run")
    for name in ("a", "b", "mine"):
        shutil.copytree(directory, directory.with_name(name))
    for file in ("photo.png", "album/1.png", *(f"PATH/{c}/{i}.png" for c in "ab" for i in "123")):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    Path("FILE").touch()
    Path("sweep.yaml").write_text(
        "program: train_mnist.py\nmethod: grid\nparameters:\n  lr:\n    values: [0.001, 0.01]\n"
    )


@all_pages
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    places = [link.split("#")[0] for link in links if not re.match(r"https?:", link)]
    assert not [place for place in places if not (page.parent / place).exists()]


@all_pages
def test_every_command_is_one_that_its_script_takes(what_they_name, page):
    for script, *argv in commands(page.read_text()):
        try:
            PARSERS[script](argv)
        except SystemExit as end:
            assert end.code == 0, shlex.join([script, *argv])  # --help


def test_a_command_is_found_wherever_it_stands_in_a_block(capsys):
    text = """
        `python train_mnist.py --seed
        9` and `python other.py --lr`, but no `--epochs 2`.
```sh
cd x && .venv/bin/python train_mnist.py --seed 1  # --seed 2
for seed in 3 4; do python train_cifar.py --resume runs/<run> --seed $seed | tee log; done
OMP_NUM_THREADS=1 python3 sweep.py \\
    --prune --script train_cifar.py | tee log; python evaluate.py "runs/a b"
```
```python
python train_mnist.py --seed 5
```
""".replace("        ", "")
    assert commands(text) == [
        ["train_mnist.py", "--seed", "1"],
        ["train_cifar.py", "--resume", "runs/run", "--seed", "3"],
        ["sweep.py", "--prune", "--script", "train_cifar.py"],
        ["evaluate.py", "runs/a b"],
        ["train_mnist.py", "--seed", "9"],
    ]
    for script, parse in PARSERS.items():
        with pytest.raises(SystemExit, match="2"):
            parse(["--no-such-flag"])
        assert f"{script}: error: " in capsys.readouterr().err


def test_the_ci_runs_the_two_commands_of_the_quick_start():
    function = re.search(
        r"^quick_start\(\) \{$.*?^\}$", (ROOT / ".ci/run").read_text(), re.M | re.S
    )
    for number, last in ((1, "train_mnist.py --dataset synthetic --epochs 3"), (2, "-m pytest")):
        shell = ["bash", "-euc", f"{function[0]}\nquick_start {number}"]
        command = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert command == blocks((ROOT / "README.md").read_text())[number - 1]
        assert command.startswith("python3 -m venv .venv && ") and command.endswith(f"{last}\n")


def test_the_lines_on_tensorboard_and_mlflow_do_what_they_say(few_images, monkeypatch, tmp_path):
    """With stand-ins for the two packages, which are not installed."""
    told = []

    class Writer(contextlib.AbstractContextManager):
        def __init__(self, directory):
            self.directory = directory

        def __exit__(self, *error):
            told.append("closed")

        def add_scalar(self, name, value, epoch):
            told.append((self.directory, name, value, epoch))

    mlflow = SimpleNamespace(
        start_run=contextlib.nullcontext,
        log_metrics=lambda numbers, step: told.append((step, numbers)),
        log_params=told.append,
    )
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tiny = ["--dataset", "synthetic", "--c1", "2", "--c2", "2", "--l1", "4", "--quiet"]
    tiny += ["--runs-dir", str(tmp_path)]
    main = train_cifar.main
    monkeypatch.setattr(train_cifar, "main", lambda argv, on_epoch: main([*argv, *tiny], on_epoch))
    text = (ROOT / "docs" / "tracking.md").read_text()
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert len(code.splitlines()) <= 12
        told.clear()
        exec(code, {})
        directory = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
        rows = records.read_log(directory)
        if "tensorboard" in code:
            names = {name for _, name, *_ in filter(lambda one: one != "closed", told)}
            for name in names:
                wanted = [(str(directory), name, row[name], row["epoch"]) for row in rows]
                assert [one for one in told if name in one] == wanted
            assert names and told.count("closed") == 2
        else:
            *steps, params = told
            assert [step for step, _ in steps] == [1, 2]
            assert steps[1][1].items() <= rows[1].items() and "val_loss" in steps[1][1]
            assert params == records.read_record(directory)["args"]

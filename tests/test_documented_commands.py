"""The commands shown with their output in the documentation give that output, and the demo the tables of the README."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "engines.md", ROOT / "docs" / "loop-nest-to-gates.md", ROOT / "README.md")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_NEEDED = {"verify": "iverilog", "synthesise": None}
_SLOW = ("verify", "synthesise")


def shown():
    """(command, the lines shown below it) of every `$ bitwright engine` in a block of text."""
    for page in PAGES:
        for block in re.findall(r"```text\n(.*?)```", page.read_text(), re.S):
            for piece in re.split(r"^\$ ", block, flags=re.M)[1:]:
                command, _, output = piece.partition("\n")
                if command.startswith("bitwright engine"):
                    yield command, output


def printed(arguments, folder):
    """What a command prints, its errors too (a page may show one)."""
    done = subprocess.run(
        [sys.executable, "-c", "from bitwright.cli.main import main; main()", *arguments],
        cwd=folder, env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}, capture_output=True, text=True, timeout=1800,
        check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def numbers(text):
    return _NUMBER.findall(text)


def shows(item, number):
    """Whether a number of a page is `number`, rounded as the page does."""
    decimals = len(item.partition(".")[2])
    return round(float(number.replace(",", "")), decimals) == float(item.replace(",", ""))


def in_order(wanted, found):
    """Whether the numbers of `wanted` occur in `found`, in that order."""
    rest = iter(found)
    return all(any(shows(item, other) for other in rest) for item in wanted)


def cases():
    for command, output in shown():
        marks = [pytest.mark.slow, pytest.mark.eda] if command.split()[2] in _SLOW else []
        yield pytest.param(command, output, marks=marks, id=command)


@pytest.mark.parametrize(("command", "output"), list(cases()))
def test_commands_print_what_the_documentation_shows(command, output, tmp_path):
    words = shlex.split(command)
    tool = _NEEDED.get(words[2])
    if tool and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    found = printed(words[1:], tmp_path)
    wanted = numbers(re.sub(r"^\(.*\)$", "", output, flags=re.M))  # what stands in brackets is left out
    assert wanted
    assert in_order(wanted, numbers(found)), (wanted, found)


@pytest.mark.slow
@pytest.mark.eda
@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
def test_the_python_of_the_walk_through_prints_what_its_comments_say(tmp_path):
    page = (ROOT / "docs" / "loop-nest-to-gates.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    program = "\n".join(blocks)
    assert program.count("print(") >= 3
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=900,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "\n".join(re.findall(r"#(.*)$", program, re.M))
    assert in_order(numbers(said), numbers(done.stdout)), (said, done.stdout)


def test_the_python_of_the_page_on_kernels_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.S)
    assert len(blocks) >= 3
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1_000_000


def test_there_are_commands_to_compare():
    assert len(list(shown())) >= 7


@pytest.mark.slow
def test_the_demo_gives_the_tables_of_the_readme(tmp_path):
    found = printed(["evaluate", str(ROOT / "studies" / "smollm2-int8.yaml"), "-o", "out"], tmp_path)
    real = {tuple(cells(line)) for line in found.splitlines() if line.startswith("│")}
    tables = [tuple(cells(line)) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("│")]
    assert len(tables) >= 20
    assert [row for row in tables if row not in real] == [], found


def cells(line):
    return [cell.strip() for cell in line.strip("│").split("│")]

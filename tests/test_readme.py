"""What the README names exists: paths, functions with their lines, commands with their flags."""
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, definitions

README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```python\n.*?```", "", README, flags=re.DOTALL)
LINKS = re.findall(r"\[([^\]]*)\]\(([^)]*)\)", PROSE) + [("", path) for path in re.findall(r'src="([^"]*)"', README)]
COMMANDS = [
    shlex.split(command, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    for command in line.split("&&")
]


@cache
def help_of(script):
    return subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=ROOT).stdout


def test_links_lead_somewhere():
    for text, target in LINKS:
        if target.startswith("https://arxiv.org/abs/"):
            assert target.rsplit("/", 1)[1] in text
        else:
            path, _, line = target.partition("#L")
            assert (ROOT / path).is_file(), target
            if line:  # a link to a function, written [`name`](path#Lline)
                source = definitions(path)[text.strip("`")]
                lines = (ROOT / path).read_text().splitlines()
                assert "\n".join(lines[int(line) - 1 :]).startswith(source), f"{text} is not at {target}"


def test_code_is_named_as_it_is():
    names = {name for text, target in LINKS if "#L" in target for name in definitions(target.partition("#")[0])}
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README):
        if re.fullmatch(r"[\w/]+\.(py|md|txt)", span):
            assert (ROOT / span).is_file(), span
        elif re.fullmatch(r"[A-Z]\w+\.\w+", span):
            assert span in names, span


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_can_be_given(command):
    if command[:2] == ["pip", "install"]:
        assert (ROOT / command[command.index("-r") + 1]).is_file()
    elif command[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).is_dir() for path in command[3:])
    elif command[:3] == ["git", "diff", "--no-index"]:
        assert all((ROOT / path).is_file() for path in command[3:])
    elif command[0] == "torchrun":
        assert (ROOT / command[2]).is_file()
    else:
        assert command[0] == "python" and (ROOT / command[1]).is_file()
        for flag in [word for word in command[2:] if word.startswith("--")]:
            assert re.search(rf"^ +(-h, )?{flag}\b", help_of(command[1]), re.MULTILINE), flag


def test_python_blocks_run():
    """With fewer steps than a reader takes."""
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        assert "range(25)" in block and "20 * 32" in block
        block = block.replace("range(25)", "range(6)").replace("range(3)", "range(1)")
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr


def test_pictures_are_small():
    for path in (ROOT / "assets").glob("*"):
        assert path.stat().st_size < 300_000 and path.name in README

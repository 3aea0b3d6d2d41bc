"""What the README and the exercises name exists: paths, functions with their lines, commands with their flags."""
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, definitions

README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "exercises").glob("*.md"))]
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
COMMANDS = {  # in blocks, and in the tables
    command.strip(): shlex.split(command, comments=True)
    for text in TEXTS.values()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
    for line in block.splitlines()
    for command in line.split("&&")
}

each_document = pytest.mark.parametrize("document", DOCUMENTS)


def links(document):
    """(text, target) of all links and pictures outside of the code; of targets in this repository, from its root."""
    prose = re.sub(r"```python\n.*?```", "", TEXTS[document], flags=re.DOTALL)
    found = re.findall(r"\[([^\]]*)\]\(([^)]*)\)", prose) + [("", path) for path in re.findall(r'src="([^"]*)"', prose)]
    folder = (ROOT / document).parent
    for text, target in found:
        if not target.startswith("https://"):
            path, line, number = target.partition("#")
            target = (folder / path).resolve().relative_to(ROOT.resolve()).as_posix() + line + number
        yield text, target


@cache
def help_of(script):
    return subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=ROOT).stdout


@each_document
def test_links_lead_somewhere(document):
    for text, target in links(document):
        if target.startswith("https://arxiv.org/abs/"):
            assert target.rsplit("/", 1)[1] in text
        else:
            path, _, line = target.partition("#L")
            assert (ROOT / path).is_file(), target
            if line:  # a link to a function, written [`name`](path#Lline)
                source = definitions(path)[text.strip("`")]
                lines = (ROOT / path).read_text().splitlines()
                assert "\n".join(lines[int(line) - 1 :]).startswith(source), f"{text} is not at {target}"


@each_document
def test_code_is_named_as_it_is(document):
    names = {name for _, target in links("README.md") if "#L" in target for name in definitions(target.split("#")[0])}
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", TEXTS[document]):
        if re.fullmatch(r"[\w/]+/[\w/]+\.(py|md|txt)", span) and not span.startswith("runs/"):
            assert (ROOT / span).is_file(), span
        elif re.fullmatch(r"[A-Z]\w+\.\w+", span):
            assert span in names, span


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
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
            assert re.search(rf"^ +(--?\S+, )?{flag}\b", help_of(command[1]), re.MULTILINE), flag


def test_python_blocks_run():
    """With fewer steps than a reader takes."""
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        assert "range(25)" in block and "20 * 32" in block
        block = block.replace("range(25)", "range(6)").replace("range(3)", "range(1)")
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0 and done.stdout.count("\n") == 2, done.stderr


def test_pictures_are_small_and_shown():
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size < 300_000
        assert any(f"assets/{path.name}" in text for text in TEXTS.values())


def test_every_picture_has_its_command():
    """The README's table of pictures names each once, the command that makes it, and its name in the run's folder."""
    rows = re.findall(r"^\| `(.*?)` \| `assets/(.*?)` \|", README.split("## The pictures")[1], re.MULTILINE)
    assert sorted(name for _, name in rows) == sorted(path.name for path in (ROOT / "assets").iterdir())

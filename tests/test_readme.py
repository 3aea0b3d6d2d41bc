"""What the pages name exists: files, functions with their files, commands with their flags, pictures."""
import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache

import pytest
from conftest import ROOT, definitions, load

DOCUMENTS = ["README.md", "pytorch_lowlevel/README.md", "paper/README.md"]
DOCUMENTS += sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "exercises").glob("*.md"))
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}


def commands(document):
    """The command lines of a document, in blocks and in the text, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXTS[document], re.DOTALL)
    blocks += re.findall(r"`((?:python|torchrun|git) [^`\n]+)`", TEXTS[document])
    return [shlex.split(line, comments=True) for block in blocks for line in re.split(r"\n|&&", block) if line.strip()]


def links(document):
    """(text, target) of all links and pictures outside of code; targets in this repository as paths from its root."""
    prose = re.sub(r"```.*?```", "", TEXTS[document], flags=re.DOTALL)
    found = re.findall(r"\[([^\]]*)\]\(([^)]*)\)", prose) + [("", path) for path in re.findall(r'src="([^"]*)"', prose)]
    folder = (ROOT / document).parent
    for text, target in found:
        if not target.startswith("https://"):
            target, _, anchor = target.partition("#")
            headings = re.findall("^#+ (.*)", TEXTS.get(target, ""), re.MULTILINE)
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor
            target = (folder / target).resolve().relative_to(ROOT.resolve()).as_posix()
        yield text, target


@cache
def help_of(script):
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        load(script).main(["--help"])
    return text.getvalue()


def test_links_lead_somewhere():
    """A link whose text is `name` leads to a file that defines it."""
    for text, target in [link for document in DOCUMENTS for link in links(document)]:
        if target.startswith("https://"):
            assert re.fullmatch(r"https://arxiv\.org/abs/(\d{4}\.\d{5})", target) and target[-10:] in text
            continue
        assert (ROOT / target).is_file(), target
        name = text.strip("`")
        if text.startswith("`") and not name.endswith((".py", ".md", ".txt")):
            assert name in definitions(target), f"{name} is not in {target}"


def test_code_is_named_as_it_is():
    names = {name for path in ROOT.glob("p*/*.py") for name in definitions(path.relative_to(ROOT).as_posix())}
    prose = re.sub(r"```.*?```", "", "\n".join(TEXTS.values()), flags=re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if re.fullmatch(r"[\w/]+/[\w/]+\.(py|md|txt)", span) and not span.startswith("runs/"):
            assert (ROOT / span).is_file(), span
        elif re.fullmatch(r"[A-Z]\w+\.\w+", span):
            assert span in names, span


def test_commands_can_be_given():
    for page, command in [(name, words) for name in DOCUMENTS for words in commands(name)]:
        if command[0] in ("pip", "source"):
            assert "-r" not in command or (ROOT / command[command.index("-r") + 1]).is_file()
        elif command[1] == "-m":
            assert command[2] == "venv" or command[2:] == ["pytest", "tests"]
        elif command[:3] == ["git", "diff", "--no-index"]:
            assert all((ROOT / path).is_file() for path in command[3:])
        elif command[0] == "torchrun":
            assert (ROOT / command[2]).is_file()
        else:
            learners_own = command[1].startswith("my_") and page.startswith("exercises/")
            assert command[0] == "python" and (learners_own or (ROOT / command[1]).is_file()), command
            for flag in [word for word in command[2:] if word.startswith("--")]:
                assert re.search(rf"^ +(--?\S+, )?{flag}\b", help_of(command[1]), re.MULTILINE), command


def test_pages_are_short_and_pictures_are_small_and_shown():
    assert TEXTS["README.md"].count("\n") <= 130
    shown = {target for document in DOCUMENTS for _, target in links(document)}
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size < (1_000_000 if path.suffix == ".gif" else 3_000_000)
        assert path.suffix == ".pt" or f"assets/{path.name}" in shown, path.name

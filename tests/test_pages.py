"""Each page is true: its links, commands, flags, files, excerpts and numbers of parameters."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, definitions, load

CHAPTERS = ["README.md", "pytorch_lowlevel/README.md", "paper/README.md", "paper/RESULTS.md"]
CHAPTERS = [page for page in CHAPTERS if (ROOT / page).exists()]
EXERCISES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "exercises").glob("*.md"))
PAGES = CHAPTERS + EXERCISES
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}

each_page = pytest.mark.parametrize("page", PAGES)


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(page):
    """The command lines of a page, in blocks and in the text, as lists of words."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", TEXTS[page], re.DOTALL)
    blocks += re.findall(r"`((?:python|torchrun|git|pip) [^`\n]+)`", TEXTS[page])
    lines = [line for block in blocks for line in re.split(r"\n|&&", block)]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def links(page):
    """(text, target, anchor) of all links and images; targets here as paths from the root."""
    prose = without_code(TEXTS[page])
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]*)\)", prose)
    found += [("", path) for path in re.findall(r'(?:src|href)="([^"]*)"', prose)]
    for text, target in found:
        if target.startswith("https://"):
            yield text, target, ""
            continue
        target, _, anchor = target.partition("#")
        path = page
        if target:
            path = ((ROOT / page).parent / target).resolve().relative_to(ROOT).as_posix()
        yield text, path, anchor


def anchor_of(heading):
    """GitHub's name for a heading."""
    heading = re.sub(r"[`*$]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


@each_page
def test_links_lead_somewhere(page):
    """A link whose text is a `name` in code leads to a file that defines it."""
    for text, target, anchor in links(page):
        if target.startswith("https://"):
            if "arxiv.org" in target:
                assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", target), target
            continue
        assert (ROOT / target).exists(), target
        if anchor:
            headings = re.findall("^#+ (.*)", without_code(TEXTS[target]), re.MULTILINE)
            assert anchor in [anchor_of(heading) for heading in headings], anchor
        name = text.strip("`")
        if text.startswith("`") and target.endswith(".py") and re.fullmatch(r"[\w.]+", name):
            if not name.endswith(".py"):
                known = definitions(target)
                whole = {*known, *(key.split(".")[0] for key in known)}
                assert name in whole, f"{name} is not in {target}"


@each_page
def test_code_is_named_as_it_is(page):
    names = {name for script in SCRIPTS for name in definitions(script)}
    for span in re.findall(r"`([^`\n]+)`", without_code(TEXTS[page])):
        if re.fullmatch(r"[\w/]+/[\w/]+\.(py|md|txt)", span) and not span.startswith("runs/"):
            assert (ROOT / span).is_file(), span
        elif re.fullmatch(r"(Diffusion|UNet|ResBlock|Attention)\.\w+", span):
            assert span in names or span.split(".")[1] in ("beta", "alpha", "alpha_bar", "T"), span


def written_by(script):
    """The folders and files that the pages may take for granted after a command of this script."""
    return re.compile(rf"(runs/{Path(script).stem}|assets)/")


def arguments(command):
    """The arguments of a command, with * in file names replaced: the parsers do not expand it."""
    return [word for word in command if word not in ("$", ">")]


@each_page
def test_commands_can_be_given(page, tmp_path, monkeypatch):
    """Each command of ours is accepted by the script's own parser, and its files exist."""
    for command in commands(page):
        program, *words = arguments(command)
        if program == "pip":
            if "-r" in words:
                assert (ROOT / words[words.index("-r") + 1]).is_file()
            continue
        if program in ("source", "git", "cd", "npm", "tar", "mkdir", ".venv\\Scripts\\activate"):
            continue
        if program == "torchrun":
            words = words[1:]
        assert program in ("python", "python3", "torchrun"), command
        if words[0] == "-m":
            assert words[1] in ("venv", "pytest"), command
            continue
        script, *flags = words
        if script.startswith("my_"):
            assert page.startswith("exercises/")
            continue
        assert (ROOT / script).is_file(), command
        if script not in SCRIPTS:
            continue
        if "--load" in flags:
            source = flags[flags.index("--load") + 1]
            assert source.startswith("runs/") or (ROOT / source).exists(), command
        flags = [flag for flag in flags if flag != "--resume"]  # it would look for a checkpoint
        if script.endswith("fid_is.py"):
            continue
        try:
            load(script).parse_args(flags)
        except SystemExit:
            pytest.fail(f"{script} refuses: {' '.join(flags)}")


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)


@pytest.mark.parametrize("page", [page for page in CHAPTERS if page != "README.md"])
def test_excerpts_are_the_scripts_own_lines(page):
    """Each block that defines something stands in a script, line by line, at some indentation."""
    sources = {}
    for script in SCRIPTS:
        lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
        dedented = [line.removeprefix("    ") for line in lines]
        sources[script] = ["\n".join(lines), "\n".join(dedented)]
    for block in python_blocks(page):
        if not re.search(r"^\s*(def|class|@torch)", block, re.MULTILINE):
            continue
        excerpt = textwrap.dedent(block).strip("\n")
        found = [s for s, texts in sources.items() for text in texts if excerpt in text]
        assert found, f"{page}: not found in any script:\n{excerpt[:300]}"


def test_numbers_of_parameters_are_those_of_the_networks():
    """Every number of parameters on a page is the size of a network that a script builds."""
    sizes = set()
    for script in SCRIPTS:
        module = load(script)
        for settings in ("CPU", "GPU"):
            if hasattr(module, "UNet") and hasattr(module, settings):
                network = module.UNet(**getattr(module, settings)["unet"])
                sizes.add(sum(p.numel() for p in network.parameters()))
    assert 35_746_307 in sizes
    for page in CHAPTERS:
        for number in re.findall(r"([\d,]{7,})[- ]parameter", TEXTS[page]):
            assert int(number.replace(",", "")) in sizes, (page, number)


def test_pictures_are_small_and_shown():
    shown = {target for page in PAGES for _, target, _ in links(page)}
    for path in (ROOT / "assets").iterdir():
        limit = {".gif": 1_000_000, ".pt": 3_000_000}.get(path.suffix, 600_000)
        assert path.stat().st_size < limit, path.name
        if path.suffix != ".pt":
            assert f"assets/{path.name}" in shown, path.name


@each_page
def test_github_shows_the_formulas(page):
    """A `$...$` is read as Markdown first, which drops the backslash of `\\,` and may take the
    underscore of `}_` for emphasis. (A block of maths is not read in this way.)
    """
    assert "operatorname" not in TEXTS[page]  # GitHub does not allow it
    prose = re.sub(r"`[^`\n]*`", "", without_code(TEXTS[page]))
    for formula in re.findall(r"\$[^$\n]+\$", prose):
        assert not re.search(r"\\[!-/:-@\[-`{-~]|[^\w\s]_|\*", formula), formula


@each_page
def test_a_page_speaks_of_the_project_alone(page):
    assert not re.search(r"/root/|/work/|/tmp/|\bsession\b", TEXTS[page])

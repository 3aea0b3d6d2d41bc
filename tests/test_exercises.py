"""The exercises: each stub is refused in words, each solution passes, mistakes are noticed, every other block runs.

The Python blocks of an exercise begin with a comment that says what they are: `# stub NAME`, `# check NAME` and
`# solution NAME` belong together, in this order; any other block is a part of the learner's file, and runs where it
stands. So the learner's file is: all blocks from top to bottom, with the stubs filled in.
"""
import re

import matplotlib
import pytest
import torch
from conftest import ROOT

EXERCISES = sorted((ROOT / "exercises").glob("0*.md"))
SECTIONS = ["Goal", "Predict", "Build", "Draw", "Break it", "Explain"]

# What takes long in an exercise, and what the tests take in its place: {exercise: {text: text}}.
SHORTER = {}

# Wrong solutions that the check must refuse: {exercise: {function: [(right, wrong), ...]}}.
MISTAKES = {}

each_exercise = pytest.mark.parametrize("path", EXERCISES, ids=[path.stem for path in EXERCISES])


def blocks(path):
    """(kind, name, code) of the Python blocks, from top to bottom."""
    found = re.findall(r"```python\n# ([a-z]+)(?: (\w+))?[^\n]*\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(found) == path.read_text().count("```python"), "a block does not say what it is"
    return found


@each_exercise
def test_sections(path):
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert re.search(r"^Difficulty: (easy|medium|hard)\. Time: \d+ minutes", text, re.MULTILINE)
    for kind, name, code in blocks(path):
        if kind == "stub":
            assert f"<summary>Hint 1: `{name}`" in text and f"<summary>Hint 2: `{name}`" in text, name
            assert f"def {name}(" in code or f"class {name}" in code
            assert f'raise NotImplementedError("{name} is still to be written")' in code
    assert text.count("<summary>Answers") == 1


def refused(code, check, space):
    """Whether the check says in words, not by a crash, that this code is wrong."""
    space = dict(space)  # what it defines stays in here
    with pytest.raises((AssertionError, NotImplementedError)) as error:
        exec(code, space)
        exec(check, space)
    return len(str(error.value).split()) > 3


@each_exercise
def test_the_exercise_from_top_to_bottom(path, tmp_path, monkeypatch):
    """As its learner goes through it; in a folder of its own, for the blocks write pictures."""
    for name in ("pytorch_lowlevel", "paper", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib, "use", lambda name: None)
    torch.manual_seed(0)
    code_of, space, shorter = {}, {"__name__": "learner"}, dict(SHORTER.get(path.stem, {}))
    for kind, name, code in blocks(path):
        for text in [text for text in shorter if text in code]:
            code = code.replace(text, shorter.pop(text))
        code_of[kind, name] = code
        if kind not in ("stub", "check", "solution"):
            exec(code, space)
        if kind == "solution":
            stub, check = code_of["stub", name], code_of["check", name]
            assert refused(stub, check, space), f"{name}: the stub"
            mistakes = MISTAKES[path.stem][name]
            assert len(mistakes) >= 2
            for right, wrong in mistakes:
                assert code.count(right) == 1, f"{name}: {right}"
                assert refused(code.replace(right, wrong), check, space), f"{name}: {wrong}"
            exec(code + check, space)
    assert not shorter, "these texts do not occur"
    assert {name for kind, name in code_of if kind == "stub"} == set(MISTAKES[path.stem])
    assert list(tmp_path.glob("my_*.png")), "the learner's code drew nothing"

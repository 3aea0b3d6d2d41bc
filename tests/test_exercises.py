"""The exercises: a stub fails its own check, the solution passes it, the other blocks run, every section is there."""
import re
import subprocess
import sys

import pytest
from conftest import ROOT

EXERCISES = sorted((ROOT / "exercises").glob("*.md"))
SECTIONS = ["Goal", "Predict", "Build", "Check", "Run", "Compare", "Explain"]

each_exercise = pytest.mark.parametrize("path", EXERCISES, ids=[path.stem for path in EXERCISES])


def blocks(path):
    """{first line, without the #: code} of the Python blocks."""
    found = re.findall(r"```python\n# (\w+)\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(found) == path.read_text().count("```python")
    return dict(found)


@each_exercise
def test_sections(path):
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert re.findall(r"<summary>(\w+)", text) == ["Hint", "Solution", "Answers"]
    assert re.search(r"^Difficulty: (easy|medium|hard)\. Time: \d+ minutes", text, re.MULTILINE)


@each_exercise
def test_the_stub_fails_the_check_and_the_solution_passes(path, capsys):
    code = blocks(path)
    with pytest.raises(NotImplementedError):
        exec(code["stub"] + code["check"], {})
    exec(code["solution"] + code["check"], {})
    assert capsys.readouterr().out.startswith("all right: ")
    names = [re.findall(r"^def (\w+)\((.*)\):$", code[part], re.MULTILINE) for part in ("stub", "solution")]
    assert set(names[0]) <= set(names[1])


@each_exercise
def test_the_check_finds_mistakes(path):
    """Each of these changes to the solution is noticed."""
    mistakes = {
        "01_noise_schedule": [("max=0.999", "max=0.99"), ("(1 + s)", "(1 + 2 * s)"), ("- alpha_bar))", "))")],
        "02_sampling_steps": [("eta**2", "eta"), ("- sigma2)", ")"), ("(1 - a / b)", "(1 - b / a)"), ("* z", "* 0")],
        "03_guidance_scale": [("eps_null + w", "eps_y + w"), ("hat - s", "hat + s"), ("(1 - alpha_bar_t).sqrt()", "1")],
        "04_fid": [
            *[("- 2 * overlap", "- overlap"), ("root(S1) @ root(S2)", "S1 @ S2"), (".clamp(min=0)", "")],
            ("features1.T.cov(), features2.T.cov()", "features1.var(0).diag(), features2.var(0).diag()"),
        ],
    }[path.stem]
    code = blocks(path)
    for right, wrong in mistakes:
        changed = code["solution"].replace(right, wrong)
        assert changed != code["solution"], right
        with pytest.raises((AssertionError, ValueError, RuntimeError, AttributeError)):
            exec(changed + code["check"], {})


@each_exercise
def test_the_other_blocks_run(path, tmp_path):
    """In a folder of their own, for they write pictures; with less training."""
    for name in ("pytorch_lowlevel", "paper"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, code in blocks(path).items():
        if name not in ("stub", "check", "solution"):
            code = code.replace('"cpu", 300)', '"cpu", 3)')
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
            assert done.returncode == 0, done.stderr

"""Scripts never import one another: what two of them share stands in both, to the letter, under one name."""
import ast
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, definitions

# Names that may differ from script to script: what a script is about.
MAY_DIFFER = {"main", "train", "UNet.__init__", "UNet.forward"}

HEADINGS = ["1. Forward process", "2. Training objective", "3. Sampling", "4. Network", "5. Data", "6. Training"]


def sources():
    """{name: {script: source}} over all scripts."""
    found = defaultdict(dict)
    for script in SCRIPTS:
        for name, source in definitions(script).items():
            found[name][script] = source
    return found


def test_same_name_same_source():
    differ = {name for name, by_script in sources().items() if len(set(by_script.values())) > 1}
    assert differ <= MAY_DIFFER, f"one name, several sources: {sorted(differ - MAY_DIFFER)}"


def test_every_exception_is_needed():
    differ = {name for name, by_script in sources().items() if len(set(by_script.values())) > 1}
    assert differ >= MAY_DIFFER, f"no longer needed in MAY_DIFFER: {sorted(MAY_DIFFER - differ)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    others = {Path(s).stem for s in SCRIPTS} | {"pytorch_lowlevel", "paper"}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & others
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in others


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_the_order_of_the_lesson(script):
    lines = [line.strip("# -") for line in (ROOT / script).read_text().splitlines() if line.lstrip().startswith("# ")]
    assert [line for line in lines if line in HEADINGS] == HEADINGS


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_are_short(script):
    for name, source in definitions(script).items():
        if name.split(".")[-1] not in ("forward", "main"):
            assert source.count("\n") < 25, f"{name} has {source.count(chr(10)) + 1} lines"

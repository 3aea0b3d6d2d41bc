"""What the tests share: the scripts as syntax trees and as modules. Scripts are no package, so they load by path."""
import ast
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and a sum in several threads need not repeat to the bit
ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(p.relative_to(ROOT).as_posix() for d in ("pytorch_lowlevel", "paper") for p in (ROOT / d).glob("*.py"))


@cache
def load(script):
    """The module of a script, "pytorch_lowlevel/ddpm_mnist.py" say, imported once."""
    name = Path(script).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def definitions(script):
    """{"at": source, "Diffusion.p_sample": source, ...}: the functions and methods that a script defines."""
    text = (ROOT / script).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        is_class = isinstance(node, ast.ClassDef)
        for child in node.body if is_class else [node]:
            if isinstance(child, ast.FunctionDef):
                first = min([child.lineno] + [d.lineno for d in child.decorator_list])
                source = "\n".join(lines[first - 1 : child.end_lineno])
                found[f"{node.name}.{child.name}" if is_class else child.name] = source
    return found


def having(*names, without=(), once=False):
    """A decorator: run the test once for each script that defines all these names, as its argument `script`.

    without: names that the script must not define. once: for slow tests, once for each different source of the names.
    """
    scripts = [s for s in SCRIPTS if set(names) <= set(definitions(s)) and not set(without) & set(definitions(s))]
    if once:
        scripts = list({tuple(definitions(s)[name] for name in names): s for s in scripts[::-1]}.values())
    assert scripts, f"no script defines {names}"
    return pytest.mark.parametrize("script", [pytest.param(load_later(s), id=Path(s).stem) for s in scripts])


class load_later:
    """A script's module, imported at the first use of one of its names: collecting tests stays quick."""

    def __init__(self, script):
        self.path = script

    def __getattr__(self, name):
        return getattr(load(self.path), name)

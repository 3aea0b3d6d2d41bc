"""Scripts never import one another. What has the same name in two of them has the same source."""

import ast
from collections import defaultdict
from pathlib import Path

from conftest import MNIST, ROOT, SCRIPTS, each

HEADINGS = [
    "1. Forward process",
    "2. Training objective",
    "3. Sampling",
    "4. Network",
    "5. Data",
    "6. Training",
    "7. Run",
]
OWN = ("UNet", "parse_args", "main")  # these three belong to each script alone


def text_of(script):
    return (ROOT / script).read_text(encoding="utf-8")


def sources(script):
    """{name: source} of all functions and classes; of Diffusion, whose parts vary, the methods."""
    text = text_of(script)
    found = {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", None)
        if name is None or name in OWN:
            continue
        if name == "Diffusion":
            found["Diffusion's docstring"] = ast.get_docstring(node)
            for method in node.body[1:]:
                found[f"Diffusion.{method.name}"] = segment(text, method)
        else:
            found[name] = segment(text, node)
    return found


def segment(text, node):
    """The source of a function or class, with its decorators."""
    decorators = [ast.get_source_segment(text, decorator) for decorator in node.decorator_list]
    return "\n".join([*decorators, ast.get_source_segment(text, node)])


def test_same_name_same_source():
    scripts = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        for name, source in sources(script).items():
            scripts[name][source].append(script)
    differing = {name: list(found.values()) for name, found in scripts.items() if len(found) > 1}
    assert differing == {}
    for name in ("linear_beta", "Diffusion.p_sample", "ResBlock", "update_ema", "new_files"):
        assert len(scripts[name]) == 1 and len(*scripts[name].values()) > 2, name


def test_the_comparison_notices_a_difference():
    """One character more in a copy, a decorator less, or another default: each is a difference."""
    here = sources(MNIST)
    text = text_of(MNIST)
    for old, new in (
        ("z = torch.randn_like(xt)", "z = torch.rand_like(xt)"),
        ('variance="beta"):\n        """x_{t-1}', 'variance="beta_tilde"):\n        """x_{t-1}'),
        ("    @torch.no_grad()\n    def p_sample", "    def p_sample"),
    ):
        assert text.count(old) == 1
        method = text.replace(old, new)
        [diffusion] = [n for n in ast.parse(method).body if getattr(n, "name", "") == "Diffusion"]
        [p_sample] = [m for m in diffusion.body[1:] if m.name == "p_sample"]
        assert segment(method, p_sample) != here["Diffusion.p_sample"]


@each(SCRIPTS)
def test_a_script_stands_alone(path):
    others = {Path(script).stem for script in SCRIPTS} | {"pytorch_lowlevel", "paper", "conftest"}
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & others
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in others


@each(SCRIPTS)
def test_no_assert_decides_what_a_script_does(path):
    """python -O leaves asserts out, so nothing may depend on one."""
    assert not [n.lineno for n in ast.walk(ast.parse(text_of(path))) if isinstance(n, ast.Assert)]


@each(SCRIPTS)
def test_a_script_has_the_order_of_the_lesson(path):
    tree, lines = ast.parse(text_of(path)), text_of(path).splitlines()
    headings = [line.strip("# -") for line in lines if line.lstrip().startswith("# ")]
    if not path.endswith("fid_is.py"):
        assert [line for line in headings if line in HEADINGS] == HEADINGS
    assert ast.get_docstring(tree).count("\n") < 25
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-1] == "main"


@each(SCRIPTS)
def test_everything_public_has_a_docstring(path):
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.FunctionDef) and node.name not in ("main", "parse_args"):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
            if node.name == "Diffusion":
                for method in node.body[1:]:
                    assert method.name == "__init__" or ast.get_docstring(method), method.name

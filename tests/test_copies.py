"""Scripts never import one another. Their mathematics, sections 1 to 4, is one source wherever it stands."""
import ast
from collections import defaultdict
from pathlib import Path

from conftest import ROOT, SCRIPTS

HEADINGS = [
    "1. Forward process", "2. Training objective", "3. Sampling", "4. Network", "5. Data", "6. Training", "7. Run",
]  # fmt: skip
LINES = dict(
    ddpm_mnist=350, ddpm_cifar=410, ddpm_paper=500, cosine_schedule=410, ddim_sampling=410,
    classifier_free_guidance=400, classifier_guidance=430, progressive_training=400, fid_is=320,
)  # fmt: skip


def mathematics(script):
    """{name: source} of the functions and methods of sections 1 to 4, and of update_ema and autocast."""
    text, found = (ROOT / script).read_text(), {}
    before, _, _ = text.partition("\n# 5. Data")
    for node in ast.parse(text).body:
        if node.lineno > before.count("\n") + 1 and getattr(node, "name", "") not in ("update_ema", "autocast"):
            continue
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.ClassDef) and node.name != "UNet":  # the network is each script's own
            for method in [child for child in node.body if isinstance(child, ast.FunctionDef)]:
                found[f"{node.name}.{method.name}"] = ast.get_source_segment(text, method)
    return found


def test_same_name_same_source():
    sources = defaultdict(set)
    for script in SCRIPTS:
        for name, source in mathematics(script).items():
            sources[name].add(source)
    assert {"linear_beta", "Diffusion.loss", "Diffusion.p_sample", "ResBlock.forward", "update_ema"} <= set(sources)
    assert [name for name, found in sources.items() if len(found) > 1] == []


def test_a_script_stands_alone_in_the_order_of_the_lesson():
    for script in SCRIPTS:
        others, text = {Path(s).stem for s in SCRIPTS} | {"pytorch_lowlevel", "paper"}, (ROOT / script).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & others, script
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module.split(".")[0] not in others, script
        if not script.endswith("fid_is.py"):
            lines = [line.strip("# -") for line in text.splitlines() if line.lstrip().startswith("# ")]
            assert [line for line in lines if line in HEADINGS] == HEADINGS, script
        assert ast.get_docstring(ast.parse(text)).count("\n") < 25, script
        assert text.count("\n") <= LINES[Path(script).stem], script

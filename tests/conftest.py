"""What the tests share: the scripts as modules and as source, and a script run as its user runs it.

Scripts are no package, so they are loaded by path. A source that stands in several scripts is tested once:
test_copies.py proves that the copies are equal.
"""
import ast
import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and a sum in several threads need not repeat to the bit
ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(p.relative_to(ROOT).as_posix() for d in ("pytorch_lowlevel", "paper") for p in (ROOT / d).glob("*.py"))
MNIST, CIFAR = "pytorch_lowlevel/ddpm_mnist.py", "pytorch_lowlevel/ddpm_cifar.py"


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


def having(*names):
    """A decorator: run the test once for each different source of these names, with a script that has it: `script`."""
    scripts = {}
    for path in SCRIPTS[::-1]:  # the last entry stands: of equal sources, that of the first script
        if set(names) <= set(definitions(path)):
            scripts[tuple(definitions(path)[name] for name in names)] = path
    assert scripts, f"no script defines {names}"
    found = [pytest.param(load_later(path), id=Path(path).stem) for path in scripts.values()]
    return pytest.mark.parametrize("script", found)


class load_later:
    """A script's module, imported at the first use of one of its names: collecting tests stays quick."""

    def __init__(self, script):
        self.path = script

    def __getattr__(self, name):
        return getattr(load(self.path), name)


def run(path, *flags, cwd=ROOT):
    """The script in a process of its own, without a terminal -> returncode, stdout, stderr."""
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd, timeout=120)


def one_line(path, flags, capsys):
    """The one line with which the script refuses these flags (exit code 2)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(path).main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"{Path(path).name}: ") and error.count("\n") == 1, error
    return error


# Data whose ideal network is known. If every pixel is N(mu, s^2), it is
#     eps*(x, t) = sqrt(1 - alpha_bar_t) (x - sqrt(alpha_bar_t) mu) / (alpha_bar_t s^2 + 1 - alpha_bar_t),
# and every sampler that uses it is an affine map of x_t and its noise. The same for a mixture of Gaussians.
MU, S = 0.3, 0.2


def tables(T=1000):
    """alpha_bar by a route of its own: logarithms summed by numpy. Index 0 is the clean image."""
    beta = np.concatenate([[0.0], 1e-4 + (0.02 - 1e-4) * np.arange(T) / max(T - 1, 1)])
    return beta, np.exp(np.cumsum(np.log1p(-beta)))


def gaussian_eps(alpha_bar, mu=MU, s=S):
    """eps* of N(mu, s^2) as a model: callable (xt, t) for a batch of times."""
    alpha_bar = torch.as_tensor(alpha_bar)

    def model(xt, t):
        ab = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (xt - ab.sqrt() * mu) / (ab * s**2 + 1 - ab)

    return model


def mixture_eps(alpha_bar, means, s):
    """eps* of an equal mixture of N(mean_k, s^2): each component's eps*, weighted by its responsibility r_k."""
    alpha_bar = torch.as_tensor(alpha_bar)
    mean = torch.tensor(means, dtype=torch.float64)

    def model(xt, t):
        ab = alpha_bar[t].view(-1, 1, 1, 1, 1)
        x = xt.unsqueeze(-1)
        r = (-((x - ab.sqrt() * mean) ** 2) / (2 * (ab * s**2 + 1 - ab))).softmax(-1)
        return (r * (1 - ab).sqrt() * (x - ab.sqrt() * mean) / (ab * s**2 + 1 - ab)).sum(-1)

    return model


def exact(script, T=1000):
    return script.Diffusion(script.linear_beta(T), dtype=torch.float64)

"""What the tests share: the scripts as modules, ways to run them, and models whose answer is known.

Scripts are no package, so they are loaded by path. A source that stands in several scripts is
tested once, with the first script that has it: test_copies.py proves that the copies are equal.
"""

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # tests run side by side, and sums in threads vary in their bits
)
os.environ["TQDM_DISABLE"] = "1"

import ast  # noqa: E402
import importlib.util  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
MNIST, CIFAR = "pytorch_lowlevel/ddpm_mnist.py", "pytorch_lowlevel/ddpm_cifar.py"
SCRIPTS = [MNIST, CIFAR]
SCRIPTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "paper").glob("*.py"))
TRAIN = [path for path in SCRIPTS if not path.endswith("fid_is.py")]


def each(paths, name="path"):
    """A decorator: run the test once for each of these scripts."""
    return pytest.mark.parametrize(name, paths, ids=[Path(path).stem for path in paths])


def first_of(paths):
    """As `each`, but only the first script is tested within the README's two minutes."""
    first, *rest = paths
    marked = [first, *(pytest.param(path, marks=pytest.mark.slow) for path in rest)]
    return pytest.mark.parametrize("path", marked, ids=[Path(path).stem for path in paths])


@cache
def load(script):
    """The module of a script, for example of "pytorch_lowlevel/ddpm_mnist.py", imported once."""
    name = Path(script).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@cache
def definitions(script):
    """{"at": source, "Diffusion.p_sample": source, ...}: a script's functions and methods."""
    text = (ROOT / script).read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = ast.get_source_segment(text, method)
    return found


def having(*names):
    """A decorator: run the test with the first script that defines all these names, as `script`.

    UNet is each script's own, so a test of it runs with every script that has it.
    """
    found = [path for path in SCRIPTS if set(names) <= set(definitions(path))]
    assert found, f"no script defines {names}"
    if not any(name.startswith("UNet.") for name in names):
        found = found[:1]
    modules = [load(path) for path in found]
    return pytest.mark.parametrize("script", modules, ids=[Path(path).stem for path in found])


def run(path, *flags, cwd=ROOT, **environment):
    """The script in a process of its own, without a terminal -> returncode, stdout, stderr."""
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """smoke(path): the folder of a --smoke run of a script, run once as a program."""
    base = tmp_path_factory.mktemp("smoke")
    done = {}

    def folder(path):
        if path not in done:
            done[path] = run(path, "--smoke", "--seed", "3", cwd=base)
            assert done[path].returncode == 0, done[path].stderr
        return base / "runs" / Path(path).stem / "smoke"

    folder.output = lambda path: done[path]
    return folder


def one_line(path, flags, capsys):
    """The line with which the script refuses these flags: sys.exit(message) or parser.error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(path).main([str(flag) for flag in flags])
    if isinstance(stop.value.code, str):
        message = stop.value.code
    else:
        assert stop.value.code == 2
        usage, message, *rest = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: ") and usage.endswith(" [options]") and not rest
        assert ": error: " in message
    assert message and "\n" not in message.strip() and "Traceback" not in message, message
    return message


# Data whose ideal network is known. If every pixel is N(mu, s^2), it is
#     eps*(x, t) = sqrt(1 - alpha_bar_t) (x - sqrt(alpha_bar_t) mu)
#                  / (alpha_bar_t s^2 + 1 - alpha_bar_t),
# and every sampler that uses it is an affine map of x_t and its noise.
# The same holds, component by component, for a mixture of Gaussians.
MU, S = 0.3, 0.2


def tables(T=1000):
    """beta, alpha_bar by an independent route: logarithms summed by numpy. Index 0: clean image."""
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
    """eps* of an equal mixture of N(mean_k, s^2): each eps*, weighted by its responsibility r_k."""
    alpha_bar = torch.as_tensor(alpha_bar)
    mean = torch.tensor(means, dtype=torch.float64)

    def model(xt, t):
        ab = alpha_bar[t].view(-1, 1, 1, 1, 1)
        x = xt.unsqueeze(-1)
        variance = ab * s**2 + 1 - ab
        r = (-((x - ab.sqrt() * mean) ** 2) / (2 * variance)).softmax(-1)
        return (r * (1 - ab).sqrt() * (x - ab.sqrt() * mean) / variance).sum(-1)

    return model


def exact(script, T=1000):
    """The script's Diffusion with the linear schedule, in float64."""
    return script.Diffusion(script.linear_beta(T), dtype=torch.float64)


class OneConvolution(torch.nn.Module):
    """The smallest network: eps_hat = a 1x1 convolution of x_t. It writes down how it was called.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 1)
        self.calls = []

    def forward(self, xt, t, y=None):
        self.calls.append((xt.detach().clone(), t.clone(), y))
        return self.conv(xt)

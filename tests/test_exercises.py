"""The exercises: stubs are refused in words, solutions pass, mistakes are named, all blocks run.

The Python blocks of an exercise begin with a line that says what they are: `# %% stub NAME`,
`# %% check NAME` and `# %% solution NAME` belong together, in this order; any other block is a
part of the learner's file, and runs where it stands. So the learner's file is: all blocks from top
to bottom, with the stubs filled in.
"""
import re

import matplotlib
import pytest
import torch
from conftest import ROOT

EXERCISES = sorted((ROOT / "exercises").glob("0*.md"))
SECTIONS = ["Goal", "Predict", "Build", "Generate and plot", "Break it", "Explain", "Look back"]
OLD_SECTIONS = ["Goal", "Predict", "Build", "Draw", "Break it", "Explain"]

# What takes long in an exercise, and what the tests take in its place: {exercise: {text: text}}.
SHORTER = {
    "01_noise_schedule": {
        "(14, 1, 28, 28), clip=clip)": "(1, 1, 28, 28), clip=clip)",
        "unet, (14, 1, 28, 28)": "unet, (1, 1, 28, 28)",
    },
    "02_sampling_steps": {"(5, 10, 20, 50)": "(5, 10)", "linspace(0, 1, 12)": "linspace(0, 1, 2)", "N = 200": "N = 2"},
    "03_guidance_scale": {
        **{"w, 30)": "w, 2)", "-2, 30)": "-2, 2)", "draw(y, w, 20)": "draw(y, w, 1)", "28, 28), 30)": "28, 28), 2)"},
        **{"arange(100)": "arange(10)", "10), 600": "10), 3", '"mnist", "data"': '"digits", None'},
    },
    "04_fid": {
        **{'"mnist", "data"': '"digits", None', "pt\"), 1000": "pt\"), 20", "range(60)": "range(2)"},
        "(50, 100, 200, 500, 1000, 2000, 5000)": "(50, 100)",
    },
    "05_elbo": {
        "[:48]": "[:2]",
        "*range(11), *torch.logspace(1, 3, 40)": "*torch.logspace(0, 3, 4)",
        "range(T, 0, -1)": "range(2, 0, -1)",
    },
    "00_ddpm": {
        "6000, 2e-3": "30, 2e-3",
        "tables = schedule(1000)\n\n\ndef": "tables = schedule(5)\n\n\ndef",
        "[1000, 600, 300, 100, 0]].flatten": "[5, 3, 2, 1, 0]].flatten",
        "digits, 300, 1e-3": "digits, 3, 1e-3",
    },
    "06_unet": {"(script[\"linear_beta\"]())": "(script[\"linear_beta\"](3))"},
}

# Wrong solutions that the check must refuse: {exercise: {function: [(right, wrong), ...]}}.
MISTAKES = {
    "01_noise_schedule": {
        "cosine_beta": [
            ("max=0.999", "max=0.99", "beta[1000]"),
            ("max=0.999", "max=0.9999", "clipped at 0.999"),
            (".clamp(max=0.999)", "", "clipped at 0.999"),
            ("(1 + s)", "(1 + 2 * s)", "alpha_bar[500]"),
            ("(1 + s) ", "1 ", "division by 1 + s"),
            ("t / T + s", "t / T", "numerator"),
            (" ** 2", "", "square of the cosine"),
            ("f[1:] / f[:-1]", "f[:-1] / f[1:]", "upside down"),
            ("t = torch.arange(T + 1, dtype=torch.float64)", "t = torch.arange(T + 1)", "float32"),
        ],
        "log_snr": [
            ("(alpha_bar / (1 - alpha_bar))", "alpha_bar", "variance 1 - alpha_bar"),
            (".log()", ".sqrt().log()", "not of standard deviations"),
            (".log()", "", "without its logarithm"),
            ("(alpha_bar / (1 - alpha_bar))", "((1 - alpha_bar) / alpha_bar)", "upside down"),
            (".log()", ".log10()", "natural"),
            (".log()", ".log2()", "natural"),
            (".log()", ".sqrt()", "root of the ratio"),
            ("alpha_bar / (1 - alpha_bar)", "alpha_bar.sqrt() / (1 - alpha_bar)", "log_snr at"),
            ("alpha_bar / (1 - alpha_bar)", "alpha_bar / (1 - alpha_bar.sqrt())", "log_snr at"),
        ],
        "same_noise": [
            ("1 + ", "", "column 0"),
            ("argmin", "argmax", "map back"),
            ("[None, 1:]", "[None]", "map back"),
            (".abs()", "", "map back"),
            ("argmin(1)", "argmin(0)", "one t for each"),
            ("argmin(1)", "argmin()", "one t for each"),
            ("argmin(1)", "argmin(1).float()", "int64"),
            ("1 + distance.argmin(1)", "1 + distance.argmin(1).sort().values", "map back"),
            ("(alpha_bar[None, 1:]", "(linear_bar[None, 1:]", "that is given"),
        ],
        "respaced_beta": [
            ("return new", "return new[1:]", "101 entries"),
            ("return new", "return new.float()", "float64"),
            ("[:: T // S]", "[:: 10]", "(T // S)-th"),
            ("alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[1:]", "last alpha_bar"),
            ("T = len(beta) - 1", "T = 1000", "20"),
            ("(1 - beta).cumprod", "(1 - linear).cumprod", "20"),
            ("    new = torch", "    beta *= 2\n    new = torch", "not be changed"),
            ("[:: T // S]", "[T // S - 1 :: T // S]", "stopped"),
        ],
    },
    "02_sampling_steps": {
        "ddim_timesteps": [
            *[("range(S, 0, -1)", "range(S - 1, -1, -1)"), ("round(T * i / S)", "(T // S) * i")],
            *[("round(T * i / S)", "round(1 + (T - 1) * i / S)"), ("range(S, 0, -1)", "range(1, S + 1)")],
        ],
        "ddim_step": [
            *[("eta**2", "eta"), ("- sigma2)", ")"), ("(1 - a / b)", "(1 - b / a)"), ("sigma2.sqrt()", "sigma2")],
            *[("        eps_hat = (xt - a.sqrt() * x0_hat) / (1 - a).sqrt()\n", ""), ("    if clip:", "    if True:")],
            *[("        x0_hat = x0_hat.clamp(-1, 1)\n", ""), ("sigma2.sqrt() * z", "(1 - a / b).sqrt() * z")],
        ],
        "ddim_sample": [
            *[("tau[1:] + [0]", "tau[1:] + [1]"), ("torch.full((len(xt),), t)", "torch.full((len(xt),), t_next)")],
            *[("torch.full((len(xt),), t)", "t"), ("torch.randn_like(xt)", "torch.ones_like(xt)")],
            *[("torch.randn_like(xt)", "torch.sin(99 * xT)"), ("= model(xt,", "= model(xT,")],
        ],
        "slerp": [
            ("(((1 - w) * omega).sin() * x1 + (w * omega).sin() * x2) / omega.sin()", "(1 - w) * x1 + w * x2"),
            ("((1 - w) * omega).sin() * x1 + (w * omega).sin()", "(w * omega).sin() * x1 + ((1 - w) * omega).sin()"),
        ],
    },
    "03_guidance_scale": {
        "drop_labels": [
            *[("torch.rand(len(y))", "torch.rand(1)"), ("< probability", "> probability")],
            *[("torch.where(torch.rand(len(y)) < probability, -1, y)", "y.masked_fill_(torch.rand(len(y)) < 0.1, -1)")],
        ],
        "guided_eps": [
            *[("eps_null + w * (eps_y - eps_null)", "eps_y + w * (eps_null - eps_y)"), ("eps_null + w", "eps_y + w")],
            ("torch.full_like(y, -1)", "y.fill_(-1)"),
        ],
        "classifier_eps": [
            *[("eps_hat - s", "eps_hat + s"), ("(1 - alpha_bar_t).sqrt() * ", ""), (".log_softmax(1)", "")],
            *[("(1 - alpha_bar_t).sqrt()", "(1 - alpha_bar_t)"), ("torch.enable_grad()", "torch.no_grad()")],
        ],
    },
    "04_fid": {
        "inception_score": [
            *[("special.xlogy(p, p)", "mul(p, p.log())"), (".sum(1).mean()", ".mean()"), (".exp().item()", ".item()")],
            ("- mean_entropy)", "+ mean_entropy)"),
        ],
        "fid": [
            *[("- 2 * overlap", "- overlap"), (".square().sum()\n", ".abs().sum()\n")],
            ("svdvals(roots[0] @ roots[1]).sum()", "eigvals(S1 @ S2).real.sqrt().sum()"),
            ("features1.T.cov(), features2.T.cov()", "features1.var(0).diag(), features2.var(0).diag()"),
            ("svdvals(roots[0] @ roots[1]).sum()", "eigvalsh(roots[0] @ roots[1]).sum()"),
        ],
        "fid_of": [
            ("randperm(len(features))[:n]", "randint(len(features), (n,))"),
            ("randperm(len(features))[:n]", "arange(n)"),
            *[("found.mean().item(), found.std().item()", "found.mean().item()"), ("found.std()", "found.var()")],
        ],
    },
    "05_elbo": {
        "q_posterior": [
            ("at(alpha_bar, t - 1)", "at(alpha_bar, t)"),
            ("before.sqrt() * at(beta, t)", "before * at(beta, t)"),
            ("at(alpha, t).sqrt()", "at(alpha, t)"),
            ("return mean, variance", "return mean, variance.sqrt()"),
            ("return mean, variance", "return mean"),
        ],
        "chain_log_q": [
            (" + last.sum()", ""),
            ("x[1:T]", "x[2:]"),
            ("(x[1:T], mean, variance)", "(x[:T], *q_posterior(x[:1], x[1:], torch.arange(1, T + 1)))"),
            ("x[2:], torch.arange(2, T + 1)", "x[2:], torch.arange(1, T)"),
        ],
        "gaussian_kl": [
            ("variance1 / variance2", "variance2 / variance1"),
            ("0.5 * (", "("),
            ("ratio - 1 -", "ratio -"),
            ("** 2 / variance2", "** 2 / variance1"),
        ],
        "loss_weight": [
            ("at(beta, t) ** 2", "at(beta, t)"),
            ("at(alpha, t)", "at(alpha_bar, t)"),
            ("(2 * ", "("),
            ("sigma2(t, variance)", 'sigma2(t, "beta")'),
        ],
        "bound_term": [
            ("t, one = k + 1,", "t, one = max(k, 1),"),
            (".clamp(-1, 1)", ""),
            (" / math.log(2)", ""),
            (".mean((1, 2, 3))", ".sum((1, 2, 3))"),
            ('sigma2(2, "beta_tilde").sqrt()', "beta[1].sqrt()"),
            ('sigma2(2, "beta_tilde").sqrt()', 'sigma2(1, "beta_tilde").sqrt()'),
            ("q_posterior(x0_hat, xt, t)", "q_posterior(x0, xt, t)"),
            (  # break-it task 2: the KL the wrong way round
                "*q_posterior(x0, xt, t), mean, sigma2(t, variance)",
                "mean, sigma2(t, variance), *q_posterior(x0, xt, t)",
            ),
            ("1 - alpha_bar[T]", "alpha_bar[T]"),
            ("xt = signal * x0", "xt = signal**2 * x0"),
        ],
    },
    "00_ddpm": {
        "schedule": [
            (".cumprod(0)", "", "this is alpha_t alone"),
            ("(1 - beta).cumprod(0)", "1 - beta.cumsum(0)", "multiply"),
            ("(1 - beta).cumprod(0)", "(-beta.cumsum(0)).exp()", "exp of a sum"),
            ("T + 1, dtype=torch.float64", "T + 1", "float64"),
            ("0.1 / T", "0.0001", "beta_1 depends on T"),
            ("20 / T", "0.02", "beta_T depends on T"),
            ("return beta,", "return beta.sqrt(),", "root"),
            ("(1 - beta).cumprod(0)", "(1 - beta).cumprod(0)[1:]", "entries"),
            ("(1 - beta).cumprod(0)", "(1 - beta).sqrt().cumprod(0)", "coefficient of x_0"),
            ("(1 - beta).cumprod(0)", "(1 - beta).cumprod(0).sqrt()", "coefficient of x_0"),
            ("return beta, alpha_bar", "return alpha_bar, beta", "beta[0]"),
            ("return beta, alpha_bar", "return alpha_bar", "two tables"),
        ],
        "q_sample": [
            ("(1 - a).sqrt() * eps", "(1 - a) * eps", "this is the variance"),
            ("a.sqrt() * x0 +", "a * x0 +", "the root is missing"),
            ("t, x0)", "t - 1, x0)", "t - 1 was used"),
            ("a.sqrt() * x0 + (1 - a).sqrt() * eps", "a", "shape"),
            ("at(alpha_bar, t, x0)", "alpha_bar[t]", "shape (B,)"),
            ("at(alpha_bar, t, x0)", "alpha_bar[t].view(-1, 1)", "float32"),
            ("at(alpha_bar, t, x0)", "alpha_bar[t].float().view(-1, 1)", "shape"),
            ("at(alpha_bar, t, x0)", "alpha_bar[t].view(-1, *[1] * (x0.dim() - 1))", "float32"),
            ("* eps", "* torch.randn_like(x0)", "eps that is given"),
            ("(1 - a).sqrt()", "(1 - a.sqrt())", "variances must add up"),
            ("+ (1 - a).sqrt() * eps", "- (1 - a).sqrt() * eps", "coefficient of eps"),
            ("(1 - a).sqrt() * eps", "eps", "coefficient of eps"),
        ],
        "loss": [
            ("torch.randint(1,", "torch.randint(0,", "start at 1"),
            ("len(alpha_bar),", "len(alpha_bar) - 1,", "up to 50"),
            ("len(alpha_bar),", "len(alpha_bar) + 1,", "1 to T"),
            ("model(xt, t)", "model(xt, t - 1)", "start at 1"),
            ("(eps - eps_hat)", "(x0 - eps_hat)", "not with x_0"),
            (".mean()", ".sum()", "sum"),
            ("(len(x0),))", "(1,)).expand(len(x0))", "same t"),
            ("torch.randn_like(x0)", "torch.rand_like(x0)", "rand is not randn"),
            ("torch.randn_like(x0)", "torch.randn(len(x0), 1)", "both coordinates"),
            ("torch.randn_like(x0)", "torch.randn(1, 2)", "all points have the same noise"),
            ("torch.randn_like(x0)", "torch.randn_like(x0[:1])", "all points have the same noise"),
            (".mean()", ".mean().sqrt()", "root"),
        ],
        "train_step": [
            ("    optimizer.zero_grad()\n", "", "were added"),
            ("    optimizer.step()\n", "", "has not moved"),
            ("    value.backward()\n", "", "has not moved"),
            ("value.item()", "value", "float"),
            ("x0, alpha_bar)\n    opt", "spiral(256), alpha_bar)\n    opt", "batch x0"),
            ("value.backward()", "(-value).backward()", "uphill"),
            ("    optimizer.step()\n", "    optimizer.step()\n    optimizer.step()\n", "w"),
            ("return value.item()", "", "float"),
            ("loss(model,", "loss(says_zero,", "stopped"),
            ("    return", "    return -1 *", "w = 0.4"),
        ],
        "update_ema": [
            ("        average.mul_(decay)\n", "", "not multiplied by the decay"),
            ("(1 - decay) * weight", "weight", "not multiplied by 1 - decay"),
            ("@torch.no_grad()\n", "", "no_grad"),
            ("average.add_((1 - decay) * weight)", "weight.add_(0)", "ema"),
        ],
        "train": [
            ("        update_ema(ema, model, decay)\n", "", "never updated"),
            ("copy.deepcopy(model)", "model", "model itself"),
            ("min(0.999, (1 + step) / (10 + step))", "0.999", "0.999 from the start"),
            ("range(steps)", "range(steps - 1)", "30 new batches"),
            ("parameters(), lr)", "parameters(), 1e-3)", "lr"),
            ("return ema, losses", "return ema", "two things"),
            ("return ema, losses", "return model, losses", "model itself"),
            ("return ema, losses", "return ema, losses[-1]", "list"),
            ("Adam(", "SGD(", "by Adam"),
            ("model.parameters(), lr", "ema.parameters(), lr", "not moved"),
            ("update_ema(ema, model, decay)", "update_ema(ema, model, 1 - decay)", "averaged"),
            ("(1 + step) / (10 + step)", "(2 + step) / (11 + step)", "averaged"),
        ],
        "p_sample": [
            ("(len(xt),), t)", "(len(xt),), t + 1)", "must be given 25, not 26"),
            ("(len(xt),), t)", "(len(xt),), t - 1)", "not 24"),
            ("if t == 1:", "if t == 0:", "no noise"),
            ("if t == 1:", "if t <= 2:", "Only t = 1"),
            ("b.sqrt() * z", "b * z", "not by beta_t"),
            ("if clip:", "if False:", "no effect"),
            ("if clip:", "if True:", "though clip is False"),
            ("(xt - (1", "(xt + (1", "sign"),
            ("/ a.sqrt()", "/ a", "root of alpha_bar_t"),
            ("t - 1, xt)", "t, xt)", "alpha_bar_t was used"),
            ("return mean +", "mean +", "return x_"),
            ("+ b.sqrt() * z", "", "there is no noise"),
        ],
        "sample": [
            ("range(T, 0,", "range(T, 1,", "down to 1"),
            ("len(beta) - 1", "len(beta) - 2", "down to 1"),
            ("walk[::-1]", "walk", "other way"),
            ("torch.randn(shape)", "torch.zeros(shape)", "noise"),
            ("torch.stack(walk[::-1])", "walk[-1]", "the walk must be"),
            ("range(T, 0, -1)", "range(1, T + 1)", "go down"),
            ("walk[-1],", "walk[0],", "start from the result"),
            ("alpha_bar, clip)\n", "alpha_bar)\n", "pass clip on"),
            ("alpha_bar, clip)\n", "alpha_bar, True)\n", "clip is False"),
            ("T = len(beta) - 1", "T = 50", "len(beta) - 1"),
            ("torch.randn(shape)", "torch.rand(shape)", "rand is not randn"),
            ("    walk = [", "    torch.manual_seed(0)\n    walk = [", "seed"),
        ],
    },
    "06_unet": {
        "time_embedding": [("(d // 2 - 1)", "(d // 2)"), ("10_000 **", "1000 **"), ("[angle.sin(), angle.cos()]",
                           "[angle.cos(), angle.sin()]"), ("dim=1)", "dim=1)[:, :-2]"), ("dim=1)", "dim=1).long()"),
                           ("torch.cat([angle.sin(), angle.cos()], dim=1)",
                            "torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)"),
                           ("10_000 ** (-k / (d // 2 - 1))", "torch.linspace(1, 1e-4, d // 2)")],
        "ResBlock": [("h = h + self.time(e)[:, :, None, None]", ""), ("self.skip(x) + h", "h"), ("(x) + h", "(x)"),
                     ("F.silu(self.norm1(x))", "self.norm1(F.silu(x))"), ("F.silu(self.norm1(x))", "F.silu(x)"),
                     ("F.silu(self.norm2(h))", "self.norm2(h)"), ("self.skip(x)", "x"), ("c_in // 16", "c_in // 32"),
                     ("self.time(e)[:, :, None, None]", "self.time(e)[:, :, None]"), ("self.skip = nn.Identity() if "
                      "c_in == c_out else", "self.skip ="), ("(c_in, c_out, 3, padding=1)", "(c_in, c_out, 3)")],
        "Attention": [("dim=2)\n        return", "dim=1)\n        return"), (" / q.shape[2] ** 0.5", ""),
                      ("q, k, v =", "k, v, q ="), ("return x +", "return"), ("self.norm(x)", "x"),
                      (".transpose(1, 2).reshape", ".reshape"), ("flatten(2).transpose(1, 2)",
                       "reshape(len(x), -1, 128)"), (".softmax(dim=2)", "")],
        "UNet": [("skips.pop()", "torch.zeros_like(skips.pop())"), ("e = self.time(time_embedding(t, 32))",
                 "e = 0 * self.time(time_embedding(t, 32))"), ("        h = self.middle[1](h)\n", ""), ("skips.pop()",
                 "skips.pop(0)"), ("[upsample(h), skips.pop()]", "[skips.pop(), upsample(h)]"), ("(2 * c, c, 128)",
                 "(c, c, 128)"), ("(1, 32, 3, padding=1)", "(1, 32, 3)"), ("return self.last(h)", "return h"),
                 (", nn.SiLU())\n        self.first", ")\n        self.first"), ("skips.append(h)", "pass")],
    },
}

each_exercise = pytest.mark.parametrize("path", EXERCISES, ids=[path.stem for path in EXERCISES])


def blocks(path):
    """(kind, name, code) of the Python blocks, from top to bottom."""
    found = re.findall(r"```python\n# (?:%% )?([a-z]+)(?: (\w+))?[^\n]*\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(found) == path.read_text().count("```python"), "a block does not say what it is"
    return found


@each_exercise
def test_sections(path):
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) in (SECTIONS, OLD_SECTIONS)
    assert re.search(r"^Difficulty: (easy|medium|hard)\. Time: \d+ minutes", text, re.MULTILINE)
    for kind, name, code in blocks(path):
        if kind == "stub":
            assert f"<summary>Hint 1: `{name}`" in text and f"<summary>Hint 2: `{name}`" in text, name
            assert f"def {name}(" in code or f"class {name}" in code
            assert f'raise NotImplementedError("{name} is still to be written")' in code
    assert text.count("<summary>Answers") == 1


def refused(code, check, space, named=""):
    """Whether the check says in words, not by a crash, that this code is wrong."""
    space = dict(space)  # what it defines stays in here, and so does what it overwrites
    for name, value in space.items():
        if isinstance(value, torch.Tensor):
            space[name] = value.clone()
    with pytest.raises((AssertionError, NotImplementedError)) as error:
        exec(code, space)
        exec(check, space)
    return len(str(error.value).split()) > 3 and named in str(error.value)


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
            for right, wrong, *named in mistakes:  # named: a part of the message, where it matters
                assert code.count(right) == 1, f"{name}: {right}"
                broken = code.replace(right, wrong)
                assert refused(broken, check, space, *named), f"{name}: {wrong}"
            exec(code + check, space)
    assert not shorter, "these texts do not occur"
    assert {name for kind, name in code_of if kind == "stub"} == set(MISTAKES[path.stem])
    assert list(tmp_path.glob("my_*.png")), "the learner's code drew nothing"

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
OTHER_SECTIONS = {  # an exercise in which nothing is built
    "08_find_the_fault": ["Goal", "Cases 1 to 5: points", "Cases 6 to 10: digits", "Look back"],
}
OLD_SECTIONS = ["Goal", "Predict", "Build", "Draw", "Break it", "Explain"]

# What takes long in an exercise, and what the tests take in its place: {exercise: {text: text}}.
SHORTER = {
    "01_noise_schedule": {
        "(14, 1, 28, 28), clip=clip)": "(1, 1, 28, 28), clip=clip)",
        "unet, (14, 1, 28, 28)": "unet, (1, 1, 28, 28)",
    },
    "02_sampling_steps": {
        "for S in [5, 10, 20, 50]:": "for S in [5]:",
        "between, alpha_bar, 20)": "between, alpha_bar, 2)",
        "N = 200": "N = 2",
        "for S in [5, 10, 20]:": "for S in [5]:",
        "unet, xT, alpha_bar, 5),": "unet, xT, alpha_bar, 1),",
        "xT, alpha_bar, 10, eta=1.0),": "xT, alpha_bar, 1, eta=1.0),",
        "xT[1]), alpha_bar, 20)": "xT[1]), alpha_bar, 2)",
    },
    "03_guidance_scale": {
        "generate(y, w, 30) for w in [0, 1, 2, 4, 8]": "generate(y, w, 1) for w in [2]",
        "y = torch.arange(100) % 10": "y = torch.arange(10)",
        "for w in [0, 1, 2, 4, 8]:": "for w in [2]:",
        "generate(y, w, 20)": "generate(y, w, 1)",
        "\"mnist\", \"data\"": "\"mnist5k\", None",
        "steps = 600": "steps = 3",
        "for s in [0, 1, 4, 16]:": "for s in [4]:",
        "(30, 1, 28, 28), 30)": "(30, 1, 28, 28), 2)",
        "generate(y, 2, 30)": "generate(y, 2, 1)",
        "generate(y, -2, 30)": "generate(y, -2, 1)",
        "generate(y, 8, 30),": "generate(y, 8, 1),",
        "generate(y, 8, 30, clip": "generate(y, 8, 1, clip",
    },
    "04_fid": {
        "\"mnist\", \"data\"": "\"mnist5k\", None",
        "steps = 1000": "steps = 20",
        "other[:500]": "other[:50]",
        "other, y, 500)": "other, y, 50)",
        "n for n in [50, 100, 200, 500, 1000, 2000]": "n for n in [50, 100]",
        "draws=50)": "draws=2)",
        "range(60)": "range(2)",
    },
    "05_elbo": {
        "[:48]": "[:27]",
        "*range(11), *torch.logspace(1, 3, 40)": "*torch.logspace(0, 3, 4)",
        "range(T, 0, -1)": "range(2, 0, -1)",
    },
    "00_ddpm": {
        "6000, 2e-3": "30, 2e-3",
        "tables = schedule(1000)\n\n\ndef": "tables = schedule(5)\n\n\ndef",
        "[1000, 600, 300, 100, 0]].flatten": "[5, 3, 2, 1, 0]].flatten",
        "digits, 300, 1e-3": "digits, 3, 1e-3",
    },
    "06_unet": {"28, 28), 50)": "28, 28), 2)", "images[::20]": "images[::500]"},
    "07_what_to_predict": {"steps = 0, 6000": "steps = 0, 10", "(1, 4, 20, 100)": "(1, 4)"},
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
            ("1 - f[1:] / f[:-1]", "f[1:] / f[:-1]", "without '1 -'"),
            ("1 - f[1:] / f[:-1]", "f[1:]", "is this alpha_bar"),
            ("1 - f[1:] / f[:-1]", "1 - f[1:] / f[0]", "one step alone"),
            ("1 - f[1:] / f[:-1]", "(f[:-1] - f[1:]) / f[0]", "must be divided"),
            ("math.pi / 2) ** 2", "math.pi) ** 2", "not pi / 2"),
            ("/ 2) ** 2", "/ 2 ** 2)", "square the cosine"),
            ("t = torch.arange(T + 1, dtype=torch.float64)", "t = torch.arange(T + 1)", "float32"),
            ("arange(T + 1", "arange(1, T + 2", "must run from 0 to T"),
            ("(t / T + s) / (1 + s)", "(t + s) / (T + s)", "not to t"),
            ("((t / T + s) / (1 + s) * math.pi / 2) ** 2",
             "(((t / T + s) / (1 + s) * math.pi / 2) ** 2)", "not its argument"),
            ("* math.pi / 2", "/ 2", "pi is missing"),
            ("* math.pi / 2", "", "pi / 2 is missing"),
            ("torch.cos", "math.cos", "math.cos takes one number"),
        ],
        "log_snr": [
            ("(alpha_bar / (1 - alpha_bar))", "alpha_bar", "variance 1 - alpha_bar"),
            (".log()", ".sqrt().log()", "not of standard deviations"),
            (".log()", "", "without its logarithm"),
            ("(alpha_bar / (1 - alpha_bar))", "((1 - alpha_bar) / alpha_bar)", "upside down"),
            (".log()", ".log10()", "natural"),
            (".log()", ".log2()", "natural"),
            (".log()", ".log10() * 10", "decibels"),
            (".log()", ".sqrt()", "root of the ratio"),
            ("alpha_bar / (1 - alpha_bar)", "alpha_bar.sqrt() / (1 - alpha_bar)", "log_snr at"),
            ("alpha_bar / (1 - alpha_bar)", "alpha_bar / (1 - alpha_bar.sqrt())", "log_snr at"),
        ],
        "same_noise": [
            ("1 + ", "", "column 0"),
            ("argmin", "argmax", "farthest"),
            ("[None, 1:]", "[None]", "column itself"),
            (".abs()", "", "is .abs() missing"),
            ("    distance =", "    alpha_bar[0] = 2\n    distance =", "not be changed"),
            ("[None, 1:] - levels[:, None]", "[None, 1:].logit() - levels[:, None].logit()", "log"),
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
            ("alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[1:]", "returned 1 - alpha_bar"),
            ("1 - alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[1:]", "returned alpha_bar"),
            ("1 - alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[1:] / alpha_bar[:-1]", "1 minus"),
            ("1 - alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[:-1] - alpha_bar[1:]", "divided by"),
            ("alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[:-1] / alpha_bar[1:]", "upside down"),
            ("1 - alpha_bar[1:] / alpha_bar[:-1]", "beta[1:].view(S, -1).mean(1)", "the mean of"),
            ("return new", "return new.clamp(max=0.999)", "clip again"),
            ("T = len(beta) - 1", "T = 1000", "20"),
            ("(1 - beta).cumprod", "(1 - linear).cumprod", "20"),
            ("    new = torch", "    beta *= 2\n    new = torch", "not be changed"),
            ("[:: T // S]", "[T // S - 1 :: T // S]", "stopped"),
            ("(1 - beta).cumprod(0)[:: T // S]",
             "torch.cat([beta[:1] + 1, (1 - beta).cumprod(0)[T // S - 1 :: T // S]])", "t = 999"),
            ("(1 - beta).cumprod(0)[:: T // S]",
             "torch.cat([beta[:1] + 1, (1 - beta[1:]).cumprod(0)[:: T // S]])", "1, 11"),
            ("(1 - beta).cumprod", "beta.cumprod", "not of beta"),
            ("(1 - beta).cumprod", "(1 - beta).float().cumprod", "in float32"),
        ],
    },
    "02_sampling_steps": {
        "ddim_timesteps": [
            ("range(S, 0, -1)", "range(S - 1, -1, -1)", "first time must be T"),
            ("round(T * i / S)", "(T // S) * i", "first time must be T"),
            ("round(T * i / S)", "round(1 + (T - 1) * i / S)", "differ by at most 1"),
            ("range(S, 0, -1)", "range(1, S + 1)", "fall"),
            ("round(T * i / S)", "T * i / S", "Python int"),
            ("range(S, 0, -1)", "range(S, -1, -1)", "not listed"),
            ("T * i", "1000 * i", "first time must be T"),
        ],
        "ddim_step": [
            ("eta**2", "eta", "eta stands"),
            ("- sigma2)", ")", "room"),
            ("(1 - a / a_next)", "(1 - a_next / a)", "NaN"),
            ("sigma2.sqrt() * z", "sigma2 * z", "not sigma^2"),
            ("        eps_hat = (xt - a.sqrt() * x0_hat) / (1 - a).sqrt()\n", "", "computed again"),
            ("if clip:", "if True:", "clip=False"),
            ("        x0_hat = x0_hat.clamp(-1, 1)\n", "", "not clipped"),
            ("clamp(-1, 1)", "clamp(0, 1)", "[0, 1]"),
            ("clamp(-1, 1)", "clamp(max=1)", "above only"),
            ("(xt - (1 - a).sqrt() * eps_hat)", "(xt - (1 - a) * eps_hat)", "the factor of eps"),
            ("(xt - (1 - a).sqrt() * eps_hat)", "(xt + (1 - a).sqrt() * eps_hat)", "is added"),
            ("eps_hat) / a.sqrt()", "eps_hat) / a", "not by alpha_bar_t itself"),
            ("(1 - a_next) / (1 - a) *", "(1 - a) / (1 - a_next) *", "upside down"),
            ("x0_hat) / (1 - a).sqrt()", "x0_hat) / (1 - a)", "without a root"),
            ("x0_hat) / (1 - a).sqrt()", "x0_hat)", "a division is missing"),
            ("(xt - a.sqrt() * x0_hat)", "(xt - a * x0_hat)", "the root of alpha_bar_t is missing"),
            ("sigma2.sqrt() * z", "sigma2.sqrt() * torch.randn_like(xt)", "use z"),
            ("(xt - a.sqrt() * x0_hat)", "(xt - a_next.sqrt() * x0_hat)", "the new eps_hat"),
            ("- sigma2)", "- eta**2 * (1 - a_next))", "not eta^2"),
            ("(1 - a_next - sigma2).sqrt()", "math.sqrt(1 - a_next - sigma2)", "NameError"),
        ],
        "ddim_sample": [
            ("tau[1:] + [0]", "tau[1:] + [1]", "t = 0"),
            ("tau[1:] + [0], strict=True", "tau[1:]", "is the step to t = 0 missing"),
            ("    return xt", "        return xt", "belongs after it"),
            ("@torch.no_grad()\n", "", "keep @torch.no_grad()"),
            ("torch.full((len(xt),), t)", "torch.full((len(xt),), t_next)", "not the next one"),
            ("torch.full((len(xt),), t)", "t", "not of type int"),
            ("torch.full((len(xt),), t)", "torch.tensor(t)", "torch.int64 and ()"),
            ("torch.randn_like(xt)", "torch.ones_like(xt)", "two runs from one xT"),
            ("torch.randn_like(xt)", "torch.sin(99 * xT)", "two runs from one xT"),
            ("torch.randn_like(xt)", "torch.randn_like(xt[:1])", "all images get the same"),
            ("torch.randn_like(xt)", "torch.randn(len(xt), 1, 1, 1)", "all pixels get the same"),
            ("torch.randn_like(xt)", "torch.rand_like(xt)", "standard Gaussian"),
            (", eta, z)", ", 0.0, z)", "eta has no effect"),
            ("ddim_step(xt,", "ddim_step(xT,", "start from the result"),
            ("= model(xt,", "= model(xT,", "every call gets xT"),
            ("torch.full((len(xt),), t)", "torch.full((len(xt),), float(t))", "int64"),
            ("torch.full((len(xt),), t)", "torch.tensor([t])", "int64"),
            (", eta, z)", ", eta, z, clip=False)", "not clipped"),
        ],
        "slerp": [
            ("x1_weight * x1 + x2_weight * x2", "x2_weight * x1 + x1_weight * x2", "swap the ends"),
            (" / (x1.norm() * x2.norm())", "", "both lengths"),
            (".clamp(max=0.9999)", "", "equal ends"),
            ("max=0.9999", "max=0.99", "not to a smaller number"),
            (" / omega.sin()", "", "the sine of omega"),
            (".sum()", ".sum(2, keepdim=True)", "over all pixels"),
            ("(x1.norm() * x2.norm())", "x1.norm()", "both lengths"),
            ("(x1.norm() * x2.norm())", "x1.norm() ** 2", "the square of one"),
            ("(x1.norm() * x2.norm())", "x2.norm() ** 2", "the square of one"),
            (".acos()", "", "not the cosine"),
            (".acos()", ".asin()", "arc sine"),
            ("    x1_weight", "    x1 *= 1.0001\n    x1_weight", "not be changed"),
            ("    return (", "    return (w < 0.9) * (", "w = 1"),
            ("    return", "    return x1 * 0 + 1 +", "w = 0"),
        ],
    },
    "03_guidance_scale": {
        "drop_labels": [
            ("torch.rand(len(y))", "torch.rand(1)", "all together"),
            ("< probability", "> probability", "kept are dropped"),
            ("torch.where(dropped, -1, y)", "y.masked_fill_(dropped, -1)", "not be changed"),
            ("torch.rand(len(y))", "torch.randn(len(y))", "randn"),
            ("torch.where(dropped, -1, y)", "y[~dropped]", "shape"),
            ("torch.where(dropped, -1, y)", "torch.where(dropped, -1.0, y.float())", "int64"),
            ("torch.where(dropped, -1, y)", "torch.where(dropped, 0, y)", "become -1"),
            ("torch.where(dropped, -1, y)", "torch.where(dropped, 10, y)", "become -1"),
            ("< probability", "< 0.1", "use the probability that is given"),
            ("torch.rand(len(y)) <", "torch.rand_like(y) <", "stopped"),
            ("< probability", "< probability * (y > 0)", "label 0 is hardly ever"),
            ("(len(y)) <", "(len(y) // 2).repeat_interleave(2) <", "neighbours"),
            ("dropped = torch.rand(len(y)) < probability",
             "dropped = torch.isin(torch.arange(len(y)), torch.randint(len(y), (int(len(y) * "
             "probability),)))", "may repeat"),
        ],
        "guided_eps": [
            ("eps_none + w * (eps_y - eps_none)", "eps_y + w * (eps_none - eps_y)", "swapped"),
            ("eps_none + w", "eps_y + w", "start from eps without"),
            ("torch.full_like(y, -1)", "y.fill_(-1)", "not be changed"),
            ("eps_none + w * (eps_y - eps_none)", "w * eps_y", "w times"),
            ("eps_none + w * (eps_y - eps_none)", "eps_none + w * (eps_y + eps_none)", "added"),
            ("torch.full_like(y, -1)", "-1", "a tensor y"),
            ("torch.full_like(y, -1)", "torch.tensor(-1)", "a tensor y"),
            ("eps_none + w", "eps_none - w", "wrong sign"),
            ("(eps_y - eps_none)", "eps_y", "multiplies the difference"),
            ("eps_none + w", "eps_none + max(w, 0)", "use w as it is"),
            ("return eps_none + w * (eps_y - eps_none)",
             "return (eps_none + w * (eps_y - eps_none)).clamp(-10, 10)", "do not clamp it"),
            ("torch.full_like(y, -1)", "torch.zeros_like(y)", "-1 for every image"),
            ("torch.full_like(y, -1)", "-torch.ones(len(y))", "not floats"),
            ("model(xt, t, y)", "model(torch.cat([xt, xt]), t, y)", "t has 2 for 4 images"),
            ("model(xt, t, y)", "model(torch.cat([xt, xt]), t.repeat(2), y)", "y has 2 for 4"),
            ("(xt, t, y)\n", "(xt, t)\n", "stopped"),
            ("model(xt, t, none)", "model(2 * xt + 1, t, none)", "xt itself"),
        ],
        "classifier_eps": [
            ("eps_hat - s", "eps_hat + s", "sign"),
            ("(1 - alpha_bar_t).sqrt() * ", "", "multiply by the root"),
            ("(1 - alpha_bar_t).sqrt()", "(1 - alpha_bar_t)", "not by itself"),
            ("(1 - alpha_bar_t).sqrt()", "alpha_bar_t.sqrt()", "root of alpha_bar_t"),
            (".log_softmax(1)", "", "log_softmax is missing"),
            (".log_softmax(1)", ".softmax(1)", "take log p, not p"),
            (".log_softmax(1)", ".log_softmax(0)", "over the classes (dim 1)"),
            ("log_p.gather(1, y[:, None])", "log_p[:, y]", "its own y"),
            ("return eps_hat -", "return eps_hat - eps_hat -", "eps_hat has the factor 0, not 1"),
            ("return eps_hat", "return -eps_hat", "eps_hat has the factor -1.0, not 1"),
            ("* gradient", "* gradient * float('nan')", "NaN"),
            (".sum()", ".mean()", "mean over the batch"),
            (".sum()", "", "sum up first"),
            ("(log_p_y.sum()", "(-log_p_y.mean()", "And the sign is wrong"),
            ("(1 - alpha_bar_t).sqrt() *", "-1 *", "And the sign is wrong"),
            ("* (1 - alpha_bar_t).sqrt()", "/ (1 - alpha_bar_t)", "do not divide by 1"),
            ("classifier(xt)", "classifier(xt, 400)", "takes xt alone"),
            ("eps_hat - s", "eps_hat - abs(s)", "s = -2.0"),
            ("torch.enable_grad()", "torch.no_grad()", "enable_grad"),
            ("y[:, None]", "y[:, None].flip(0)", "proportional"),
        ],
    },
    "04_fid": {
        "inception_score": [
            ("torch.special.xlogy(p, p)", "torch.mul(p, p.log())", "NaN"),
            (".sum(1).mean()", ".mean()", "sum over classes"),
            (".exp().item()", ".item()", "exp is missing"),
            ("- mean_entropy)", "+ mean_entropy)", "not plus"),
            (".item()", "", "float"),
            ("(entropy - mean_entropy)", "(mean_entropy - entropy)", "sign"),
            ("(entropy - mean_entropy)", "entropy", "alone"),
            ("    p_y", "    p /= p.sum(1, keepdim=True) * 1.0001\n    p_y", "not be changed"),
            ("    p_y", "    p.clamp_(min=1e-12)\n    p_y", "not even"),
            ("xlogy(p, p).sum(1).mean()", "xlogy(p, p).sum(0).mean()", "other way round"),
            ("return (entropy", "raise NotImplementedError\n    return (entropy", "stopped with"),
            ("(entropy - mean_entropy)", "torch.nn.functional.kl_div(p, p_y + 0 * p, "
             "reduction='batchmean')", "takes a logarithm first"),
        ],
        "fid": [
            ("- 2 * overlap", "- overlap", "counts twice"),
            (".square().sum()\n", ".abs().sum()\n", "square the differences"),
            (" - 2 * overlap).item()", " - 2 * overlap).sqrt().item()", "without a root"),
            (".square().sum()\n", ".square().mean()\n", "their mean"),
            (".item()", "", "float"),
            ("means + S1", "S1", "means are missing"),
            (".clamp(min=0)", "", "NaN"),
            ("return (means +", "features1 -= 1\n    return (means +", "not be changed"),
            ("features1.T.cov()", "features1.cov()", "features.T.cov() is (D, D)"),
            ("(features1.mean(0) - ", "(features1.mean(0) + ", "do not add"),
            ("S1.trace() + S2.trace()", "(S1 + S2).sum()", "sum of all entries"),
            ("return (means", "return 1j + (means", "real part"),
            ("    return (means", "    (means", "returns nothing"),
        ],
        "kid": [
            ("k.sum() - k.diagonal().sum()", "k.sum()", "diagonals"),
            ("(N * (N - 1))", "N**2", "N^2"),
            (" / D", "", "divide by D"),
            (" + 1)", ")", "add 1"),
            ("** 3", "** 2", "third power"),
            ("N = len(x)", "N = 3", "own number"),
            ("(x @ y.T / D + 1)", "((x @ y.T + 1) / D)", "divide by D first"),
            ("(N * (N - 1))", "(2 * N * (N - 1))", "N (N - 1) / 2"),
            ("- 2 * between", "- between", "counts twice"),
            ("- 2 * between", "+ 2 * between", "subtracted"),
            (" - 2 * between).item()", " - 2 * between)", "float"),
            ("    between", "    features1 += 1\n    between", "not be changed"),
            ("(N * (N - 1))", "(N - 1)", "not N - 1"),
            ("k.sum() - k.diagonal().sum()", "k.sum() - N", "k(x, x) is not 1"),
            ("k.sum() - k.diagonal().sum()", "2 * k.tril().sum()", "keep the diagonal"),
            ("(k.sum() - k.diagonal().sum()) / (N * (N - 1))", "k.roll(1, 0).diagonal().mean()",
             "not one partner"),
            ("features2).mean()", "features2).sum()", "a mean over pairs as well"),
        ],
        "over_draws": [
            ("torch.randperm(len(features))", "torch.arange(len(features))", "other rows"),
            ("scores.mean().item(), scores.std().item()", "scores.mean().item()", "two numbers"),
            ("scores.std()", "scores.var()", "variance"),
            ("scores.std()", "(scores.std() / draws**0.5)", "standard error"),
            ("scores.mean().item(), scores.std()", "scores.std().item(), scores.mean()", "swapped"),
            ("    for _", "    torch.manual_seed(0)\n    for _", "manual_seed"),
            ("order[:n]", "(order[0] + torch.arange(n)) % len(order)", "together too often"),
            ("scores.mean().item(), scores.std().item()", "scores.mean(), scores.std()", "floats"),
            ("range(draws)", "range(10)", "6 draws"),
            ("draws=10", "draws=20", "10 draws"),
            ("[order[:n]], reference", "[order[:n]], reference[:n]", "whole"),
            ("order[:n]", "order[: n + 1]", "n = 12 rows"),
            ("[order[:n]]", "[:n]", "other rows"),
            ("randperm(len(features))", "randperm(features)", "takes the number of rows"),
            ("randperm(len(features))", "randperm(len(features), generator="
             "torch.Generator().manual_seed(len(scores)))", "makes the same draws"),
        ],
    },
    "05_elbo": {
        "q_posterior": [
            ("1 - at(alpha_bar, t - 1)", "1 - at(alpha_bar, t)", "t used for t - 1"),
            ("at(alpha_bar, t - 1).sqrt()", "at(alpha_bar, t - 1)", "t = 500: your mean"),
            ("at(alpha_bar, t - 1).sqrt()", "at(alpha_bar, t).sqrt()", "for alpha_bar_{t-1}?"),
            ("at(alpha, t).sqrt()", "at(alpha, t)", "t = 500: your mean"),
            ("variance = at(beta, t)", "variance = at(beta, t).sqrt()", "Bayes' rule"),
            ("* xt, variance", "* xt, variance.sqrt()", "standard deviation"),
            ("* xt, variance", "* xt", "two things"),
            ("* x0 + xt_weight * xt", "* xt + xt_weight * x0", "swapped"),
            ("before = 1 - at(alpha_bar, t - 1)", "before = 1 - alpha_bar[t - 1]", "at(beta, t)"),
            ("return x0_weight * x0", "x0 *= x0_weight\n    return x0", "in place"),
        ],
        "chain_log_q": [
            (" + last.sum()", "", "log q(x_T | x_0) is missing"),
            (" + last.sum()", " - last.sum()", "added, not subtracted"),
            (".sum() + last.sum()", ".mean() + last.mean()", "not a mean"),
            ("variance).sum()", "variance).mean()", "not a mean"),
            ("mean, variance)", "mean, variance.sqrt())", "not the standard deviation"),
            ("1 - alpha_bar[T])", "(1 - alpha_bar[T]).sqrt())", "not the standard deviation"),
            ("alpha_bar[T].sqrt() * x[0], 1 - alpha_bar[T]", "0, beta[1] ** 0", "log p(x_T)"),
            ("torch.arange(2, T + 1)", "torch.arange(3, T + 2).clamp(max=T)", "missing for t = 2"),
            ("x[1:T]", "x[2:]", "but got x_t"),
            ("x[1:T]", "x[: T - 1]", "forward the sum is"),
            ("x[:1], x[2:], t)", "x[:1], x[2:], t - 1)", "t = 1"),
            (  # the sum that it is to avoid
                "    mean, variance = q_posterior(x[:1], x[2:], t)",
                "    t = torch.arange(1, T + 1)\n"
                "    return log_normal(x[1:], at(alpha, t).sqrt() * x[:-1], at(beta, t)).sum()",
                "never calls q_posterior",
            ),
        ],
        "gaussian_kl": [
            ("variance1 / variance2", "variance2 / variance1", "of the variances upside down"),
            ("0.5 * (", "(", "factor 1/2"),
            ("0.5 * (", "0.5 / math.log(2) * (", "nats"),
            ("ratio - 1 -", "ratio -", "from itself"),
            ("** 2 / variance2", "** 2 / variance1", "by the other variance"),
            ("- ratio.log()", "+ ratio.log()", "in the logarithm upside down"),
            ("/ variance2 + ratio - 1", "/ variance1 + 1 - 1", "second square"),
            ("ratio - 1 -", "ratio - ratio -", "first square"),
            ("- ratio.log())", "- ratio.log()).mean()", "one number for each pair"),
            ("ratio.log()", "math.log(ratio)", "of a tensor is x.log()"),
            ("    ratio =", "    torch.nn.Module()(1)\n    ratio =", "NotImplementedError"),
        ],
        "loss_weight": [
            ("at(beta, t) ** 2", "at(beta, t)"),
            ("at(alpha, t)", "at(alpha_bar, t)"),
            ("(2 * ", "(1 * ", "2, 2, 2 times"),
            ("sigma2(t, variance)", "sigma2(t, variance).sqrt()", "not sigma"),
            ("sigma2(t, variance)", 'sigma2(t, "beta")', "the variance is ignored"),
            ("at(beta, t) ** 2", "beta[t] ** 2", "(B, 1, 1, 1)"),
        ],
        "noisy_estimate": [
            (".clamp(-1, 1)", "", "clipped"),
            (".clamp(-1, 1)", ".clamp(max=1)", "at both ends"),
            (".clamp(-1, 1)", ".clamp(0, 1)", "at both ends"),
            ("signal = at(alpha_bar, t).sqrt()", "signal = at(alpha_bar, t)", "factor does x_0"),
            ("signal = at(alpha_bar, t)", "signal = at(alpha, t)", "factor does x_0"),
            ("(1 - at(alpha_bar, t)).sqrt()", "(1 - at(alpha_bar, t))", "factor does eps"),
            ("(1 - at(alpha_bar, t)).sqrt()", "(1 - at(alpha, t)).sqrt()", "factor does eps"),
            ("(xt - noise * eps_hat)", "(xt - eps_hat)", "does not follow"),
            ("randn_like(x0)", "randn_like(x0[:1])", "its own eps"),
            ("randn_like(x0)", "randn(2, 1, 1, 1).double()", "its own eps"),
            ("torch.full((len(x0),), t)", "t", "as a tensor"),
            ("torch.full((len(x0),), t)", "torch.full((len(x0),), t - 1)", "here (301, 301)"),
            ("- noise * eps_hat", "- noise * eps", "x_0 itself"),
            ("    eps = ", "    torch.manual_seed(0)\n    eps = ", "new noise"),
        ],
        "step_term": [
            ("model, x0, t)\n", "model, x0, t - 1)\n", "about t = 2, not 1"),
            (" / math.log(2)", "", "nats"),
            (".mean((1, 2, 3))", ".sum((1, 2, 3))", "sum over the pixels"),
            ("q_posterior(x0, xt, t)", "q_posterior(xt, x0, t)", "takes x_0 first"),
            ("q_posterior(x0_hat, xt, t)", "q_posterior(xt, x0_hat, t)", "takes x0_hat first"),
            ("q_posterior(x0_hat, xt, t)", "q_posterior(x0, xt, t)", "on the network"),
            ("sigma2(t, variance)", 'sigma2(t, "beta")', "always beta_t"),
            ("sigma2(t, variance)", "beta_tilde", "always beta_tilde_t"),
            ("(mean, beta_tilde,", "(mean, sigma2(t, variance),", "C_t is missing"),
            (".mean((1, 2, 3))", ".mean().expand(len(x0))", "over the pixels only"),
            (  # the fault of break-it task 2
                "(mean, beta_tilde, mean_hat, sigma2(t, variance))",
                "(mean_hat, sigma2(t, variance), mean, beta_tilde)",
                "KL(p || q)",
            ),
        ],
        "bound_term": [
            ("k + 1, variance", "k, variance", "about t = 2, not 1"),
            ("k + 1, variance", "k + 1", "the variance is ignored"),
            (" / math.log(2)", "", "which unit"),
            (".mean((1, 2, 3))", ".mean().expand(len(x0))", "L_T: the four"),
            ("k == T:", "k == T:\n        return step_term(model, x0, T)\n    if 0:", "not ask"),
            ("1 - alpha_bar[T], zero, one", "one, zero, 1 - alpha_bar[T]", "KL(p || q)"),
            ('sigma2(2, "beta_tilde").sqrt()', "beta[1].sqrt()", "beta_tilde_2"),
            ('sigma2(2, "beta_tilde").sqrt()', 'sigma2(1, "beta_tilde").sqrt()', "L_0"),
            ("decoder_cost(x0, mean,", "decoder_cost(x0, x1,", "not depend on the network"),
            ("decoder_cost(x0, mean,", "decoder_cost(mean, x0,", "takes x_0 first"),
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
            ("T, T, dtype=torch.float64)", "T, T + 1).double()[:-1]", "one step later"),
            ("T, T, dtype=torch.float64)", "T, T + 1).double()[1:]", "not to t = 0"),
            ("(0.1 / T, 20 / T, T, dtype=torch.float64)", "(0, 20 / T, T + 1)[1:]", "not from 0"),
            ("T, T, dtype=torch.float64)", "T, T).double()", "beta was computed in float32"),
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
            ("len(alpha_bar),", "len(alpha_bar) + 1,", "T = len(alpha_bar) - 1"),
            ("model(xt, t)", "model(xt, t - 1)", "start at 1"),
            ("(eps - eps_hat)", "(x0 - eps_hat)", "not with x_0"),
            (".mean()", ".sum()", "sum"),
            ("(len(x0),))", "(1,)).expand(len(x0))", "same t"),
            ("torch.randn_like(x0)", "torch.rand_like(x0)", "rand is not randn"),
            ("torch.randn_like(x0)", "torch.randn(len(x0), 1)", "both coordinates"),
            ("torch.randn_like(x0)", "torch.randn(1, 2)", "all points have the same noise"),
            ("torch.randn_like(x0)", "torch.randn_like(x0[:1])", "all points have the same noise"),
            (".mean()", ".mean().sqrt()", "root"),
            ("model(xt, t)", "nn.Module()(xt, t)", "stopped with NotImplementedError"),
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
            ("(1 + step) / (10 + step)", "0.999", "0.999 from the start"),
            ("range(steps)", "range(steps - 1)", "30 new batches"),
            ("parameters(), lr)", "parameters(), 1e-3)", "lr"),
            ("return ema, losses", "return ema", "two things"),
            ("return ema, losses", "return model, losses", "model itself"),
            ("return ema, losses", "return ema, losses[-1]", "list"),
            ("Adam(", "SGD(", "by Adam"),
            ("model.parameters(), lr", "ema.parameters(), lr", "not moved"),
            ("update_ema(ema, model, decay)", "update_ema(ema, model, 1 - decay)", "swapped"),
            ("(1 + step) / (10 + step)", "(2 + step) / (11 + step)", "but yours is 2/11"),
            ("(1 + step) / (10 + step)", "step / (9 + step)", "but yours is 0"),
            ("(1 + step) / (10 + step)", "step / (10 + step)", "but yours is 0"),
            ("(1 + step) / (10 + step)", "(1 + step) / (11 + step)", "but yours is 1/11"),
            ("copy.deepcopy(model)", "type(model)()", "copy.deepcopy(model)"),
            ("copy.deepcopy(model)", "copy.copy(model)", "shares the model's weights"),
            ("max(1, steps // 6)", "(steps // 50)", "steps // 50 would be 0"),
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
            ("x0_weight = a_before", "x0_weight = a", "in the weight of x0_hat"),
            ("* (1 - a_before) / (1 - a)", "", "in the weight of x_t"),
            ("b / (1 - a)", "b / (1 - a_before)", "denominator next to x0_hat"),
            ("b / (1 - a)", "b", "missing next to x0_hat"),
            ("(1 - a_before) / (1 - a)", "(1 - a_before)", "missing next to x_t"),
            ("/ a.sqrt()", "* a.sqrt()", "do not multiply by it"),
            (" / a.sqrt()", "", "is missing"),
            ("(xt - (1 - a).sqrt() * eps_hat) /", "xt - (1 - a).sqrt() * eps_hat /", "brackets"),
            ("/ a.sqrt()", "/ a_before.sqrt()", "or the reverse in x0_hat"),
            ("(1 - a).sqrt() * eps_hat", "eps_hat", "factor next to eps_hat"),
            ("* b /", "* b.sqrt() /", "take beta_t itself"),
            ("(1 - a_before) /", "(1 - a_before).sqrt() /", "in the weight of x_t"),
            ("torch.randn_like(xt)", "torch.randn(2)", "all points get the same noise"),
            ("torch.randn_like(xt)", "torch.randn(len(xt), 2)", "torch.randn_like(xt)"),
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
        "time_embedding": [
            ("(d // 2 - 1)", "(d // 2)", "last frequency"),
            ("(d // 2 - 1)", "15", "for d = 8"),
            ("10_000 ** (-k / (d // 2 - 1))", "torch.linspace(1, 1e-4, d // 2)", "same factor"),
            ("[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]", "sines"),
            ("dim=1)", "dim=1).double()", "float32"),
            ("t[:, None] * frequency", "t[:, None] / 1000 * frequency", "first frequency"),
            ("    angle = ", "    t -= 1\n    angle = ", "in place"),
        ],
        "ResBlock": [
            ("h = h + self.time(e)[:, :, None, None]", "", "does not use time"),
            ("self.skip(x) + h", "h", "does not use skip"),
            ("self.skip(x) + h", "self.skip(x) + h.detach()", "no_grad, detach"),
            ("self.norm1(x))", "x)", "does not use norm1"),
            ("F.silu(self.norm2(h))", "self.norm2(h)", "Is a SiLU missing"),
            ("F.silu(self.norm2(h))", "F.relu(self.norm2(h))", "ReLU"),
            ("self.skip(x) + h", "self.skip(x.detach()) + h", "of its input"),
            ("nn.Identity()", "None", "not with c_in = c_out"),
            ("self.skip(x) + h", "self.skip(x).add_(h)", "changes its input in place"),
            ("F.silu(self.norm2(h))", "h.copy_(F.silu(self.norm2(h)))", "operation in place"),
            ("def forward", "def foward", "missing the required"),
            ("GroupNorm(c_in // 16, c_in)", "GroupNorm(16, c_in)", "norm1 gets the right input"),
            ("self.time(e)", "self.time(F.silu(e))", "a SiLU too many"),
            ("[:, :, None, None]", "[:, :, None]", "stops"),
            ("(c_in, c_out, 3, padding=1)", "(c_in, c_out, 3)", "padding"),
            ("nn.Linear(d_time, c_out)", "nn.Linear(128, c_out)", "time.weight of your ResBlock"),
        ],
        "Attention": [
            (".softmax(dim=2)", ".softmax(dim=1)", "add up to 1 over j"),
            (" / q.shape[2] ** 0.5", "", "sqrt(C)"),
            ("q.shape[2] ** 0.5", "128**0.5", "should be C"),
            ("q, k, v =", "q, v, k =", "k and v swapped"),
            ("q, k, v =", "v, k, q =", "q and v swapped"),
            ("(w @ v)", "(w.transpose(1, 2) @ v)", "the weights are transposed"),
            ("q.shape[2] ** 0.5", "q.shape[1] ** 0.5", "the root of HW"),
            ("(q @ k", "(q.detach() @ k", "qkv.weight, or a part of it"),
            ("self.norm(x).flatten(2).transpose(1, 2)",
             "self.norm(x).reshape(len(x), -1, x.shape[1])", "reshape does not exchange"),
            ("self.norm(x)", "x", "does not use norm"),
            ("return x +", "return", "added at the end"),
            (".transpose(1, 2).reshape", ".reshape", "pixel and channel"),
        ],
        "Encoder": [
            ("time_embedding(t, 32)", "time_embedding(t - 1, 32)", "what goes into time.0"),
            ("skips.append(h)", "skips.insert(0, h)", "wrong order"),
            ("stride=2, padding=1", "stride=2", "down.0.1 gets the right input"),
            ("return h, skips, e", "return h, skips", "three things"),
            ("return h, skips, e", "return h, e, skips", "in another order"),
            ("h = block(h, e)\n            skips.append(h)", "skips.append(block(h, e))",
             "what first returns"),
            ("h = block(h, e)", "h = block(h, 0 * e)", "What happens on the way"),
            ("h = block(h, e)\n            skips.append(h)",
             "skips.append(h)\n            h = block(h, e)",
             "what goes into its ResBlock"),
            ("skips.append(h)\n            h = downsample(h)",
             "h = downsample(h)\n            skips.append(h)", "before the downsampling"),
            ("skips.append(h)", "skips.append(h.detach())", "cannot be trained"),
        ],
        "Decoder": [
            ("skips.pop()", "torch.zeros_like(skips.pop())", "the second is not"),
            ("skips.pop()", "skips.pop(0)", "needed first"),
            ("skips.pop()", "skips.pop().detach()", "of its input"),
            ("ResBlock(2 * c, c, 128)", "ResBlock(c, c, 128)", "how many channels"),
            ("factor=2)", "factor=2, mode='bilinear')", "bilinear"),
            ("[h, skips.pop()]", "[skips.pop(), h]", "wrong order"),
            ("GroupNorm(2, 32)", "GroupNorm(16, 32)", "last.0 gets the right input"),
            ("return self.last(h)", "return h", "does not use last.0"),
        ],
        "UNet": [
            ("        h = self.middle[1](h)\n", "", "does not use middle.1.norm"),
            ("self.encoder(xt, t)", "self.encoder(xt / 2, t)", "encoder.first"),
            ("return self.decoder", "return xt - self.decoder", "returns"),
            ("return self", "with torch.no_grad():\n            return self", "cannot be trained"),
            ("self.middle[2](h, e)", "self.middle[2](h, e.detach())", "or a part of it"),
        ],
    },
    "07_what_to_predict": {
        "to_v": [
            ("signal * eps - noise * x0", "noise * x0 - signal * eps", "wrong sign"),
            ("signal * eps - noise * x0", "signal * x0 + noise * eps", "x_t itself"),
            ("at(alpha_bar, t, x0).sqrt()", "at(alpha_bar, t, x0)", "root of alpha_bar_t is"),
            ("signal * eps - noise * x0", "noise * eps - signal * x0", "the sine are swapped"),
            ("signal * eps - noise * x0", "signal * eps + noise * x0", "one of the two terms"),
            ("    return", "    eps *= 1.001\n    return", "changes eps in place"),
            ("at(alpha_bar, t, x0).sqrt()", "alpha_bar[t].sqrt()", "at(alpha_bar, t, xt)"),
        ],
        "to_x0_and_eps": [
            ("signal * xt - noise * prediction", "signal * xt + noise * prediction", "x0_hat"),
            ("noise * xt + signal * prediction", "noise * xt - signal * prediction", "eps_hat"),
            ("(xt - noise * prediction) / signal", "(xt - prediction) / signal", "x0_hat"),
            ("(xt - noise * prediction) / signal", "xt - noise * prediction", "division"),
            ("at(alpha_bar, t, xt).sqrt()", "at(alpha_bar, t, xt)", "square roots are missing"),
            ('kind == "eps"', 'kind == "epsilon"', "compare the names"),
            ("/ signal, prediction", "/ signal, prediction.clamp(-1, 1)", "eps_hat"),
            ("return prediction, (xt - signal * prediction) / noise",
             "return (xt - signal * prediction) / noise, prediction", "x0_hat first"),
        ],
        "implied_weight": [
            ('"v": snr + 1', '"v": snr', "that is W_t of eps"),
            ("torch.ones_like(snr)", "1 / snr", "the prediction is x0_hat itself"),
            ('"eps": snr', '"eps": 1 / snr', "inverse"),
            ('"eps": snr', '"eps": snr.sqrt()', "square root"),
            ("[kind][t]", "[kind][t][:, None]", "(B,)"),
        ],
        "loss": [
            ("torch.randint(1,", "torch.randint(0,", "1 to 1000, not 0"),
            ("torch.randn_like(x0)", "torch.randn(len(x0), 1)", "both coordinates"),
            ("torch.randn_like(x0)", "torch.randn(1, 2)", "all points of the batch"),
            ("(len(x0),))", "(1,)).expand(len(x0))", "the same t"),
            ("/ implied_weight(kind, t)", "/ 1", "not yet divided"),
            ("implied_weight(kind, t)", "snr[t]", "not by W_t"),
            ("clamp(max=gamma)", "clamp(min=gamma)", "larger"),
            ("clamp(max=gamma)", "clamp(max=5)", "takes 5 for gamma"),
            ("factor.to(x0.dtype)[:, None]", "(factor / factor.mean()).float()[:, None]", "mean"),
            ("factor.to(x0.dtype)[:, None]", "factor.to(x0.dtype)", "[:, None] it is (B, 1)"),
            ("model(xt, t)", "model(xt, t - 1)", "gets t - 1"),
            ("if gamma is not None:", "if False:", "ignored"),
            ("factor.to(x0.dtype)[:, None]", "factor.mean().to(x0.dtype)", "its own t"),
            ("factor.to(x0.dtype)[:, None]", "factor[:, None]", "float32"),
            ("return error.mean()", "return error.mean().detach()", "no gradient"),
        ],
        "v_step": [
            ("- delta.sin()", "+ delta.sin()", "the other way"),
            ("delta.cos() * xt - delta.sin() * v_hat", "xt - delta * v_hat", "tangent"),
            ("phi[t] - phi[t_next]", "phi[t] - phi[t - 1]", "arrives at t - 1"),
            ("phi[t] - phi[t_next]", "phi[t]", "by phi[t], and so"),
            ("phi[t] - phi[t_next]", "phi[t - t_next]", "by phi[t - t_next]"),
            ("delta.cos() * xt - delta.sin()", "delta.sin() * xt - delta.cos()", "are swapped"),
            ("delta.cos() * xt", "xt", "does not arrive"),
        ],
    },
    "08_find_the_fault": {},
}

# The faults of "Break it": {exercise: [(function, right, wrong)]}. Each changes what is printed.
BREAKS = {
    "00_ddpm": [
        ("p_sample", "(len(xt),), t)", "(len(xt),), t + 1)"),
        ("p_sample", "(len(xt),), t)", "(len(xt),), t - 1)"),
        ("p_sample", "if t == 1:", "if t == 0:"),
        ("p_sample", "b.sqrt() * z", "b * z"),
    ],
    "02_sampling_steps": [
        ("ddim_sample", "eta, z)", "eta, z, clip=False)"),
        ("ddim_sample", "torch.full((len(xt),), t)", "torch.full((len(xt),), max(1, t_next))"),
        ("ddim_step", "sigma2.sqrt() * z", "(1 - a / a_next).sqrt() * z"),
        ("slerp", "(x1_weight * x1 + x2_weight * x2) / omega.sin()", "(1 - w) * x1 + w * x2"),
    ],
    "03_guidance_scale": [
        ("guided_eps", "eps_none + w * (eps_y - eps_none)", "eps_y + w * (eps_none - eps_y)"),
    ],
    "04_fid": [("fid", "features1.T.cov()", "features1.var(0).diag()")],
}

each_exercise = pytest.mark.parametrize("path", EXERCISES, ids=[path.stem for path in EXERCISES])


def blocks(path):
    """(kind, name, code) of the Python blocks, from top to bottom."""
    block = r"```python\n# (?:%% )?([a-z]+)(?: (\w+))?[^\n]*\n(.*?)```"
    found = re.findall(block, path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == path.read_text().count("```python"), "a block does not say what it is"
    return found


@each_exercise
def test_sections(path):
    text = path.read_text()
    sections = OTHER_SECTIONS.get(path.stem, SECTIONS)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) in (sections, OLD_SECTIONS)
    assert re.search(r"^Difficulty: (easy|medium|hard)\. Time: \d+ minutes", text, re.MULTILINE)
    for kind, name, code in blocks(path):
        if kind == "stub":
            for hint in (1, 2):
                assert f"<summary>Hint {hint}: `{name}`" in text, name
            assert f"def {name}(" in code or f"class {name}" in code
            assert f'raise NotImplementedError("{name} is still to be written")' in code
    answers = 10 if path.stem in OTHER_SECTIONS else 1
    assert text.count("<summary>Answer") == answers


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
def test_the_exercise_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
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
            capsys.readouterr()
            exec(code, space)
            printed = capsys.readouterr().out
        if kind == "break" and "# Paste " in code:
            for function, right, wrong in BREAKS.get(path.stem, []):
                solution = code_of["solution", function]
                assert solution.count(right) == 1, f"{function}: {right}"
                exec(solution.replace(right, wrong), space)  # the later definition counts
                exec(code, space)
                assert capsys.readouterr().out != printed, f"{function}: {wrong}"
                exec(solution, space)
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
    wrote = bool(list(tmp_path.glob("my_*.png")))
    assert wrote == (path.stem not in OTHER_SECTIONS), "does the learner's code write pictures?"

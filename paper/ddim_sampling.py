"""DDIM: the same network, a tenth of the steps.

Denoising Diffusion Implicit Models (Song et al. 2020, arXiv 2010.02502). L_simple never asks how x_t came about from
x_0 step by step: it knows q(x_t | x_0) alone. So the network that DDPM trains serves a whole family of samplers, told
apart by eta, on any subset of the times. With eta = 0 no noise is added on the way: x_0 is a function of x_T. One
can skip steps, interpolate between images, and run it backwards.

    python paper/ddim_sampling.py
    python paper/ddim_sampling.py --load runs/ddim_sampling/model.pt --seed 1

writes to runs/ddim_sampling/
    steps.png           rows: S = 5, 10, 20, 50, 100 and T steps; DDPM and DDIM from the same x_T
    eta.png             S = 20 and S = 100, eta from 0 to 1
    interpolation.png   images between two images: x_T turned from one to the other
    inversion.png       real images, the x_T that DDIM finds for them, and back
    samples.png, loss.png, metrics.json (with the table that is printed) and model.pt

Measured with real MNIST on two CPU cores (AMD EPYC, bf16): 1,500 steps of 32 images in 179 s, all in 548 s.
128 samples each; FD is the Fréchet distance to 10,000 real images on the features of a small classifier, where 128
other real images are at 6.1. DDPM has sigma_t^2 = beta_t, of the long step, and eta = 1 has beta_tilde_t:

    S                   5     10     20     50    100   1000
    seconds           0.6    1.2    2.4    5.9     12    119
    FD, DDPM          304    207    100     55     46     34
    FD, eta = 1       144     61     42     37     41
    FD, DDIM          129     72     57     52     50     50
    FD, quadratic     125     77     61     53     51

The network takes 99% of the seconds. As in the paper DDIM is far ahead of DDPM when S is small, and behind it at S = T.
Unlike there, eta = 1 with the smaller variance is ahead of DDIM from S = 10 on, perhaps because its noise mends errors
of a network trained for three minutes. (Of so few samples a distance is worth about 8 either way.)

Left out: the official CIFAR-10 network (ddpm_paper.py --pretrained loads it; here it would be half the file).
"""
import argparse
import copy
import http.client
import json
import math
import os
import socket
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

# torchvision, scikit-learn and matplotlib are imported where they are used, so that --help answers at once.

# 1. Forward process -------------------------------------------------------------------------------------------


def linear_beta(T=1000):
    """The linear schedule (DDPM, Section 4): (T+1,) float64, from 1e-4 at t = 1 to 0.02 at t = T; beta[0] = 0."""
    return torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, T, dtype=torch.float64)])


def at(table, t):
    """table[t] as (B, 1, 1, 1), to multiply images (B, C, H, W). t is (B,), or one int: then (1, 1, 1, 1)."""
    return table[t].view(-1, 1, 1, 1)


class Diffusion:
    """One noise schedule, and what DDPM (arXiv 2006.11239) does with it.

    beta: (T+1,) with beta[0] = 0. Every table has T+1 entries: t in 1..T is the paper's t, and 0 is the clean image.
    model: any callable eps_hat = model(xt, t) with xt, eps_hat (B, C, H, W) and t (B,).
    """

    def __init__(self, beta, device="cpu", dtype=torch.float32):
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # alphas_cumprod elsewhere; alpha_bar[0] = 1
        beta_tilde = torch.zeros_like(beta)
        beta_tilde[1:] = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]  # DDPM, Eq. 7
        tables = (table.to(dtype).to(device) for table in (beta, alpha, alpha_bar, beta_tilde))
        self.beta, self.alpha, self.alpha_bar, self.beta_tilde = tables
        self.T = len(beta) - 1

    def q_sample(self, x0, t, eps):
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM, Eq. 4): t steps of noise at once."""
        alpha_bar = at(self.alpha_bar, t)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    # 2. Training objective --------------------------------------------------------------------------------
    def loss(self, model, x0):
        """L_simple (DDPM, Eq. 14; Algorithm 1): the mean squared error of eps_hat at random t. -> scalar"""
        # t ~ U{1..T}. Algorithm 1 draws each t on its own; here each of B equal slices of 1..T gives one (stratified
        # sampling). Every t is as likely as before, and the gradient is less noisy.
        slices = torch.arange(len(x0), device=x0.device) + torch.rand(len(x0), device=x0.device)
        t = 1 + (self.T * slices / len(x0)).long().clamp(max=self.T - 1)
        eps = torch.randn_like(x0)
        return F.mse_loss(model(self.q_sample(x0, t, eps), t), eps)

    # 3. Sampling ------------------------------------------------------------------------------------------
    def predict_x0(self, xt, t, eps_hat):
        """x0_hat: Eq. 4 solved for x_0, with eps_hat for eps (DDPM, Eq. 15)."""
        alpha_bar = at(self.alpha_bar, t)
        return (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()

    @torch.no_grad()
    def ddim_step(self, model, xt, t, t_next, eta=0.0, clip=True, variance="beta_tilde"):
        """x_{t_next} from x_t (DDIM, Eq. 12 and 16), t and t_next < t ints. eta = 1 between neighbours is DDPM.

        variance: beta with eta = 1 adds noise as DDPM does whose sigma_t^2 is beta_t (sigma-hat in the paper).
        """
        eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
        alpha_bar, alpha_bar_next = at(self.alpha_bar, t), at(self.alpha_bar, t_next)
        x0_hat = self.predict_x0(xt, t, eps_hat)
        if clip:  # and then eps_hat must be the noise that goes with the clipped x0_hat
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()
        beta = 1 - alpha_bar / alpha_bar_next  # of the one long step
        sigma2 = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * beta
        mean = alpha_bar_next.sqrt() * x0_hat + (1 - alpha_bar_next - sigma2).sqrt() * eps_hat
        if eta == 0 or t_next == 0:  # the last step adds no noise
            return mean
        return mean + {"beta": beta, "beta_tilde": sigma2}[variance].sqrt() * torch.randn_like(xt)

    @torch.no_grad()
    def ddim_sample(self, model, shape, S, eta=0.0, spacing="uniform", clip=True, xT=None, variance="beta_tilde"):
        """x_0 of that shape in S steps, from xT or else from fresh noise."""
        xt = torch.randn(shape, device=self.beta.device, dtype=self.beta.dtype) if xT is None else xT
        for t, t_next in tqdm(list(pairwise([*ddim_timesteps(self.T, S, spacing), 0])), f"S = {S}, eta = {eta:g}"):
            xt = self.ddim_step(model, xt, t, t_next, eta, clip, variance)
        return xt

    @torch.no_grad()
    def ddim_invert(self, model, x0, S):
        """The x_T that ddim_sample, with eta = 0 and no clipping, takes to x_0 (DDIM, Section 4.3): run backwards.

        The step to t_next needs eps_hat of x_{t_next}, which is not known yet. What the network says of x_t at time
        t_next stands in: the shorter the steps, the smaller the error.
        """
        xt = x0
        for t, t_next in tqdm(list(pairwise([0, *ddim_timesteps(self.T, S)[::-1]])), "backwards"):
            eps_hat = model(xt, torch.full((len(xt),), t_next, device=xt.device))
            x0_hat, alpha_bar_next = self.predict_x0(xt, t, eps_hat), at(self.alpha_bar, t_next)
            xt = alpha_bar_next.sqrt() * x0_hat + (1 - alpha_bar_next).sqrt() * eps_hat
        return xt


def ddim_timesteps(T, S, spacing="uniform"):
    """tau_S > ... > tau_1, S distinct times in 1..T (DDIM, Appendix D.2), T always the first.

    uniform: every (T/S)-th. quadratic: tau_i = T (i/S)^2, close together near 0; times that would coincide there move
    up to the next free one. (The official code ends its quadratic times at 0.8 T and lets them repeat.)
    """
    power = {"uniform": 1, "quadratic": 2}[spacing]
    return [max(i, round(T * (i / S) ** power)) for i in range(S, 0, -1)]


def slerp(x, y, u):
    """From x (u = 0) to y (u = 1) on the arc between them (DDIM, Eq. 67); on a straight line noise gets too short."""
    angle = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    return (torch.sin((1 - u) * angle) * x + torch.sin(u * angle) * y) / torch.sin(angle)


# 4. Network -----------------------------------------------------------------------------------------------


def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000 radians a step."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device) / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(c):
    """Groups of 16 channels (all in one, if fewer): over narrower groups a CPU takes several times as long."""
    return nn.GroupNorm(max(1, c // 16), c)


class ResBlock(nn.Module):
    """x (B, c_in, H, W) and the time e (B, d_time) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(d_time, c_out)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # so that the block begins as its skip, plus a constant

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention with one head: every pixel looks at every other. x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = group_norm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=2)
        out = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + out.transpose(1, 2).view(x.shape)


class UNet(nn.Module):
    """eps_hat = UNet(...)(xt, t): (B, C, H, W), (B,) -> (B, C, H, W).

    channels: C. widths: channels at each resolution, the finest first; each resolution is half the one before.
    blocks: ResBlocks at each resolution, on the way down and on the way up.
    """

    def __init__(self, channels, widths, blocks):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(self.d, d_time), nn.SiLU(), nn.Linear(d_time, d_time), nn.SiLU())
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for c, c_below in pairwise(widths):
            halve = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            double = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_below, c, 3, padding=1))
            self.down.append(nn.ModuleList([ResBlock(c, c, d_time) for _ in range(blocks)] + [halve]))
            self.up.insert(0, nn.ModuleList([double] + [ResBlock(2 * c, c, d_time) for _ in range(blocks)]))
        c = widths[-1]
        self.middle = nn.ModuleList([ResBlock(c, c, d_time), Attention(c), ResBlock(c, c, d_time)])
        self.last = nn.Sequential(group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)

    def forward(self, xt, t):
        e = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)  # (B, widths[0], H, W)
        skips = []
        for *blocks, halve in self.down:
            for block in blocks:
                h = block(h, e)
                skips.append(h)
            h = halve(h)
        block1, attention, block2 = self.middle
        h = block2(attention(block1(h, e)), e)  # (B, widths[-1], ...)
        for double, *blocks in self.up:
            h = double(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), e)
        return self.last(h).to(xt.dtype)


# The score: how far the samples are from real images, as a small classifier sees them.
class Classifier(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> logits (B, classes). features(x), (B, 64), is what they are made of."""

    def __init__(self, channels, classes):
        super().__init__()
        layers = []
        for c_in, c in pairwise([channels, 32, 64, 128]):
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, 64), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.features(x))


def frechet_distance(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)): the distance of two Gaussians (Heusel et al. 2017). -> float

    mu (D,) and S (D, D), float64. The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real
    numbers whatever the rounding, where a square root of S1 S2 can turn complex.
    """
    roots = []
    for S in (S1, S2):
        values, vectors = torch.linalg.eigh(S)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * overlap).item()


def fid(features1, features2):
    """The Fréchet distance of two sets of features (N, D), each taken for a Gaussian. -> float"""
    mu_S = [(features.double().mean(0), features.double().T.cov()) for features in (features1, features2)]
    return frechet_distance(*mu_S[0], *mu_S[1])


# 5. Data ------------------------------------------------------------------------------------------------------
SERVER_SECONDS = 10  # a server that says nothing for so long is given up


def knock(url):
    """Raise OSError or HTTPException, unless a server answers within SERVER_SECONDS."""
    socket.setdefaulttimeout(SERVER_SECONDS)
    # Asked in a thread, because looking up the server's name knows no time limit.
    ThreadPoolExecutor(1).submit(urllib.request.urlopen, url).result(timeout=SERVER_SECONDS).close()


def load_mnist(root):
    """MNIST's training images, (60000, 1, 28, 28) uint8, downloaded to root unless they are there."""
    from torchvision.datasets import mnist

    path = Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte"
    if not path.exists():
        knock(mnist.MNIST.mirrors[0] + mnist.MNIST.resources[0][0])
        mnist.MNIST(root, download=True)
    try:
        return mnist.read_image_file(path).unsqueeze(1)
    except Exception:
        fail(f"{path} is damaged: delete it, and the next run downloads it again")


def load_cifar10(root):
    """CIFAR-10's training images, (50000, 3, 32, 32) uint8, downloaded to root unless they are there."""
    from torchvision.datasets import CIFAR10

    folder = Path(root) / CIFAR10.base_folder
    if not folder.exists():
        knock(CIFAR10.url)
        CIFAR10(root, download=True)
    try:
        return torch.from_numpy(CIFAR10(root).data).permute(0, 3, 1, 2)
    except Exception:
        fail(f"{folder} is damaged: delete it, and the next run downloads it again")


def load_small_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged: (1797, 1, 28, 28) uint8."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).unsqueeze(1) / 16  # (1797, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=28, mode="bicubic").clamp(0, 1)
    return (255 * images).round().byte()


def load_photos():
    """Crops of two photographs at half their size, (6716, 3, 32, 32) uint8: a pagoda in China, and a dahlia."""
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images])  # (2, 427, 640, 3)
    small = F.avg_pool2d(photos.permute(0, 3, 1, 2).float(), 2)  # (2, 3, 213, 320)
    crops = small.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 73, 32, 32)
    return crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte()


def load_strokes():
    """What --smoke learns: the 28 diagonals, (28, 1, 28, 28) uint8."""
    return torch.stack([255 * torch.eye(28).roll(i) for i in range(28)]).unsqueeze(1).byte()


# What --data takes, and what loads it from --data-root. Where the first cannot be downloaded, the second stands in.
DATA = {
    "mnist": load_mnist,
    "digits": lambda root: load_small_digits(),
    "cifar10": load_cifar10,
    "photos": lambda root: load_photos(),
    "strokes": lambda root: load_strokes(),
}
STAND_IN = "scikit-learn's 1,797 digits of 8x8 pixels"


def load_images(data, root):
    """The training images, (N, C, H, W) uint8, and what they are. data: a name in DATA, or auto."""
    first, second = list(DATA)[:2]
    name = first if data == "auto" else data
    try:
        return DATA[name](root), name
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if data != "auto":
        fail(f"--data {data}: the images cannot be downloaded ({reason})")
    print(f"\n!!! NO {first.upper()} ({reason}).\n!!! In its place: {STAND_IN}.\n")
    return DATA[second](root), second


def load_labels(data, root):
    """The class of each image of load_images, (N,) int64. data: what load_images said."""
    if data == "mnist":
        from torchvision.datasets.mnist import read_label_file as read

        path = Path(root) / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    elif data == "cifar10":
        from torchvision.datasets import CIFAR10

        path, read = root, lambda root: torch.tensor(CIFAR10(root).targets)
    elif data == "digits":
        from sklearn.datasets import load_digits

        return torch.from_numpy(load_digits().target)
    else:  # two photographs; strokes to the left and to the right
        n = len(load_images(data, root)[0])
        return torch.arange(n) * 2 // n
    try:
        return read(path)
    except Exception:
        fail(f"{path} is damaged or not there: delete the folder, and the next run downloads it again")


def batches(images, batch_size, seed):
    """Endless batches x_0 (B, C, H, W) in [-1, 1]. Epoch after epoch shows each image once, in an order drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    leftover = torch.tensor([], dtype=torch.long, device=images.device)
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        *full, leftover = torch.cat([leftover, order]).split(batch_size)  # it begins the next epoch's first batch
        for index in full:
            yield images[index].float() / 127.5 - 1


# 6. Training --------------------------------------------------------------------------------------------------
def autocast(device):
    """A context that computes in bf16 where the hardware multiplies it, and in fp32 elsewhere."""
    bf16 = False
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def update_ema(ema, model, step):
    """ema <- decay ema + (1 - decay) model. A fixed 0.9999 would remember the random start for 10,000s of steps."""
    decay = min(0.9999, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)


def make_optimizer(model, lr, steps):
    """AdamW, and its learning rate: up to lr over the first 30th of the steps, then in a straight line down to 0."""
    # Averages over 20 squared gradients (0.95), not 1000 (0.999): in a run of 1000s of steps they are out of date.
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(30 * (i + 1), steps - i) / steps)


def train(diffusion, model, images, args):
    """Algorithm 1 -> the EMA of the model, the loss of each step. Ctrl-C ends it and keeps what was learned."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, schedule = make_optimizer(model, args.lr, args.steps)
    losses, done = torch.zeros(args.steps, device=images.device), 0  # on the device: .item() would make each step wait
    stream = islice(batches(images, args.batch_size, args.seed), args.steps)
    try:
        for x0 in (bar := tqdm(stream, "training", args.steps)):
            with autocast(images.device):
                loss = diffusion.loss(model, x0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_ema(ema, model, done)
            losses[done] = loss.detach()
            done += 1
            if done % 50 == 0:
                show_loss(bar, losses[:done])
    except KeyboardInterrupt:
        print(f"\nStopped after {done} steps: the samples show what was learned by then.")
    show_loss(bar, losses[:done])
    return ema, losses[:done].cpu()


def show_loss(bar, losses):
    """Show the mean of the last 50 losses; end the run if it is no number any more."""
    if len(losses) == 0:
        fail("stopped before the first step was done")
    mean = losses[-50:].mean().item()
    if not math.isfinite(mean):
        bar.close()
        fail(f"the loss is {mean} after {len(losses)} steps: is the learning rate too high? Try a lower --lr")
    bar.set_postfix(loss=f"{mean:.4f}")


def train_classifier(images, labels, device, steps):
    """A Classifier for images (N, C, H, W) uint8 with labels (N,), trained for that many steps of 128."""
    classifier = Classifier(images.shape[1], int(labels.max()) + 1).to(device, memory_format=torch.channels_last)
    optimizer, schedule = make_optimizer(classifier, 2e-3, steps)
    for _ in tqdm(range(steps), "training the classifier"):
        index = torch.randint(len(images), (128,))
        with autocast(device):
            logits = classifier(images[index].to(device).float() / 127.5 - 1)
            loss = F.cross_entropy(logits, labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def features_of(classifier, images):
    """The features (N, 64) of images (N, C, H, W): uint8, or in [-1, 1] and then rounded to 8 bits as in a file."""
    if images.dtype != torch.uint8:
        images = (127.5 * (images.clamp(-1, 1) + 1)).round().byte()
    device = next(classifier.parameters()).device
    with torch.autocast(device.type, enabled=False):  # in fp32, wherever the samples come from
        parts = [classifier.features(part.to(device).float() / 127.5 - 1).cpu() for part in images.split(500)]
    return torch.cat(parts).double()


# 7. Files and command line ------------------------------------------------------------------------------------
# What a flag that is left out means; what the network is, and how long it trains, depends on the device.
SETTINGS = dict(seed=0, T=1000, data="auto", classifier_steps=600)
GPU = dict(network=dict(widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4, samples=2000)
CPU = dict(network=dict(widths=[32, 64, 128], blocks=1), steps=1500, batch_size=32, lr=1.5e-3, samples=128)
SMOKE = dict(
    network=dict(widths=[8, 16], blocks=1),
    steps=3, batch_size=4, T=10, samples=8, data="strokes", classifier_steps=3,
)
CPU_MINUTES = 9  # of the default run on two cores
FLAGS = {  # besides those of every script
    "--samples": dict(type=int, help=f"images to be scored (default: {GPU['samples']}, else {CPU['samples']})"),
    "--clip": dict(action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] at each step"),
}


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    sys.exit(2)


def write(path, save):
    """save(a temporary path), then rename it: under `path` stands a whole file, the old or the new."""
    temporary = path.with_stem(f"{path.stem}.part")
    save(temporary)
    os.replace(temporary, path)
    tqdm.write(f"wrote {path}")  # where a progress bar runs, above it


def write_grid(path, images, columns):
    """Write images (N, C, H, W) in [-1, 1] as a grid at twice their size."""
    from torchvision.utils import save_image

    large = F.interpolate(images.float(), scale_factor=2)
    write(path, lambda temporary: save_image(large, temporary, nrow=columns, normalize=True, value_range=(-1, 1)))


def write_labelled(path, blocks, labels):
    """Write {title: images (rows, columns, C, H, W) in [-1, 1]} side by side, with a label for each row."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    columns = sum(images.shape[1] for images in blocks.values())
    inch = min(0.55, 6.4 / columns)  # of an image, so that the whole fits on a page
    figure = Figure(figsize=(1.2 + inch * columns, 0.4 + inch * len(labels)), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks.items(), strict=True):
        images = (images.float().clamp(-1, 1) + 1) / 2
        grid = make_grid(images.flatten(0, 1), images.shape[1], pad_value=1)
        axes.imshow(grid.permute(1, 2, 0))
        height = images.shape[3] + 2  # with the white line around
        axes.set(title=title, xticks=[], yticks=[(row + 0.5) * height for row in range(len(labels))])
        axes.set_yticklabels(labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    write(path, figure.savefig)


def write_loss(path, losses, title):
    """Plot the loss of each step, and its running mean."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    window = 1 + len(losses) // 50
    axes.semilogy(torch.arange(len(losses)) + 1, losses, color="lightgray", label="each step")
    axes.semilogy(torch.arange(window, len(losses) + 1), losses.unfold(0, window, 1).mean(1), label="running mean")
    axes.set(title=title, xlabel="step", ylabel=r"$L_{simple}$")
    axes.legend()
    write(path, axes.figure.savefig)


def find_device(name):
    """The torch.device of that name, or without one the best there is."""
    device = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.ones(1, device=device).item()  # fails where there is no such device
        device = torch.device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {device} cannot be used: {str(error).splitlines()[0]}")


def load_checkpoint(path):
    """The settings and the EMA network of a model.pt that this script wrote."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["settings"]
        ema = UNet(**settings["network"])
        ema.load_state_dict(checkpoint["ema"])
        return settings, ema.eval().requires_grad_(False)
    except Exception as error:
        fail(f"--load {path}: no model.pt of this script ({type(error).__name__})")


def parse_arguments(argv):
    """The command line; a flag that was left out is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    folder, names = Path("runs", Path(__file__).stem), [name for name in DATA if name != "strokes"]
    flag = parser.add_argument
    flag("--steps", type=int, help=f"training steps (default: {GPU['steps']} with CUDA, else {CPU['steps']})")
    flag("--batch-size", type=int, help=f"images a step (default: {GPU['batch_size']}, else {CPU['batch_size']})")
    flag("--lr", type=float, help=f"highest learning rate (default: {GPU['lr']}, else {CPU['lr']})")
    flag("--seed", type=int, help=f"(default: {SETTINGS['seed']})")
    flag("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    flag("--out", type=Path, help=f"folder for files (default: {folder}; without training: loaded/ in it)")
    flag("--data", choices=names, help=f"(default: {names[0]}, or {names[1]} where it cannot be downloaded)")
    flag("--data-root", default="data", help="folder of what is downloaded (default: data)")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    flag("--load", help="a model.pt: no training, samples with the settings of its run")
    flag("--T", type=int, help=f"diffusion steps (default: {SETTINGS['T']}; with far fewer, x_T is no pure noise)")
    for name, options in FLAGS.items():
        flag(name, **options)
    args = parser.parse_args(argv)
    trained = any(vars(args).get(name) for name in ("load", "pretrained", "source"))
    args.out = args.out or folder / ("smoke" if args.smoke else "loaded" if trained else "")
    return args


def fill_defaults(args, device, loaded):
    """Give the flags that were left out their values: those of the loaded run, or what suits the device."""
    trains = [name for name in ("steps", "batch_size", "lr", "data", "T") if getattr(args, name) is not None]
    if args.load and trains:
        fail(f"--{trains[0].replace('_', '-')} is for training, and --load does not train")
    defaults = {**SETTINGS, **(GPU if device.type == "cuda" else CPU), **(SMOKE if args.smoke else {}), **loaded}
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name, None) is None})
    for name in ("steps", "batch_size", "lr", "T", "samples"):
        if not 0 < getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} must be a finite number above 0, not {getattr(args, name)}")
    if abs(args.seed) >= 2**63:
        fail(f"--seed must be a number of 64 bits, not {args.seed}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")


def settings_of(args):
    """What the files of a run remember of it."""
    return {name: getattr(args, name) for name in (*SETTINGS, *CPU, "device")}


class Calls:
    """A network that counts its calls and adds up the seconds that they take."""

    def __init__(self, network):
        self.network, self.calls, self.seconds = network, 0, 0.0

    def __call__(self, xt, t):
        start = time.perf_counter()
        eps_hat = self.network(xt, t)
        if xt.device.type != "cpu":
            torch.accelerator.synchronize()
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
        return eps_hat


SAMPLERS = {
    "DDPM": dict(eta=1, variance="beta"),
    "eta = 1": dict(eta=1),
    "DDIM": dict(eta=0),
    "DDIM quadratic": dict(eta=0, spacing="quadratic"),
}


def seeded_sample(diffusion, network, shape, S, seed, **options):
    """x_0 (N, C, H, W) = shape by ddim_sample, in parts of 500. The seed decides x_T, whatever the options are."""
    parts = []
    for k, part in enumerate(torch.arange(shape[0]).split(500)):
        torch.manual_seed(seed + k)  # x_T comes first, and then what noise there is: so the two never coincide
        parts.append(diffusion.ddim_sample(network, (len(part), *shape[1:]), S, **options).cpu())
    return torch.cat(parts)


def compare_steps(diffusion, ema, shape, score, args):
    """Sample from the same x_T in S steps by each sampler -> rows of the table, and images {sampler: {S: x_0}}."""
    table, images = [], {name: {} for name in SAMPLERS}
    for S in [S for S in (5, 10, 20, 50, 100) if S < diffusion.T] + [diffusion.T]:
        for name, options in SAMPLERS.items():
            if S == diffusion.T and name not in ("DDPM", "DDIM"):  # there the others hardly differ from these two
                continue
            network, start = Calls(ema), time.perf_counter()
            images[name][S] = seeded_sample(diffusion, network, shape, S, args.seed, clip=args.clip, **options)
            row = dict(S=S, sampler=name, calls=network.calls, seconds=time.perf_counter() - start)
            table.append(row | {"in network": network.seconds, "FD": score(images[name][S])})
            print(*(f"{key} {value:.4g}" if key != "sampler" else f"{value:14}" for key, value in table[-1].items()))
    return table, images


def write_steps(path, images):
    """Show DDPM and DDIM, the first 8 x_T each, with a row for each S."""
    blocks = {name: torch.stack([x0[:8] for x0 in images[name].values()]) for name in ("DDPM", "DDIM")}
    write_labelled(path, blocks, [f"S = {S}" for S in images["DDPM"]])


def write_eta(path, diffusion, ema, shape, args):
    """Show what noise on the way does: eta from 0 (DDIM) to 1 (DDPM), with S = 20 and S = 100."""
    etas, blocks = [0.0, 0.25, 0.5, 0.75, 1.0], {}
    for S in sorted({min(20, diffusion.T), min(100, diffusion.T)}):
        rows = [seeded_sample(diffusion, ema, (8, *shape[1:]), S, args.seed, eta=eta, clip=args.clip) for eta in etas]
        blocks[f"S = {S}"] = torch.stack(rows)
    write_labelled(path, blocks, [f"eta = {eta:g}" for eta in etas])


def write_interpolation(path, diffusion, ema, shape, args):
    """Show the images between pairs of images: 4 rows of 11 points on the arc between two x_T."""
    torch.manual_seed(args.seed)
    left, right = torch.randn(2, 4, *shape[1:], device=diffusion.beta.device)
    between = torch.stack([slerp(x, y, k / 10) for x, y in zip(left, right, strict=True) for k in range(11)])
    write_grid(path, diffusion.ddim_sample(ema, None, min(50, diffusion.T), clip=args.clip, xT=between).cpu(), 11)


def write_inversion(path, diffusion, ema, x0):
    """Show images x_0 (N, C, H, W) in [-1, 1], the x_T that leads to them, and where it leads -> the RMS error."""
    S = min(200, diffusion.T)
    xT = diffusion.ddim_invert(ema, x0, S)
    back = diffusion.ddim_sample(ema, None, S, clip=False, xT=xT)
    write_labelled(path, {"": torch.stack([x0, xT, back]).cpu()}, ["image", "its $x_T$", "back again"])
    return (back - x0).square().mean().sqrt().item()


def show_all(diffusion, ema, images, held_out, labels, args):
    """Write every picture that comes from the network; -> {"table": [...], ...} for metrics.json."""
    device = diffusion.beta.device
    torch.manual_seed(args.seed)
    classifier = train_classifier(images, labels, device, args.classifier_steps)
    real = features_of(classifier, held_out)
    floor = fid(features_of(classifier, images[: args.samples]), real)
    print(f"FD: the Fréchet distance to {len(held_out)} real images; of {args.samples} other real ones: {floor:.3g}")
    shape = args.samples, *images.shape[1:]
    with autocast(device):
        table, drawn = compare_steps(diffusion, ema, shape, lambda x0: fid(features_of(classifier, x0), real), args)
        write_steps(args.out / "steps.png", drawn)
        write_eta(args.out / "eta.png", diffusion, ema, shape, args)
        write_interpolation(args.out / "interpolation.png", diffusion, ema, shape, args)
        error = write_inversion(args.out / "inversion.png", diffusion, ema, held_out[:8].to(device).float() / 127.5 - 1)
    write_grid(args.out / "samples.png", drawn["DDIM"][min(50, args.T)][:64], 8)
    print(f"inversion and back again: an RMS error of {error:.3f}, where pixels go from -1 to 1")
    return {"table": table, "FD of real images": floor, "inversion error": error}


def main(argv=None):
    args = parse_arguments(argv)
    device = find_device(args.device)
    args.device = device.type
    loaded, ema = load_checkpoint(args.load) if args.load else ({}, None)
    fill_defaults(args, device, loaded)
    if args.samples < 8:
        fail(f"--samples must be 8 or more, not {args.samples}")
    hardware = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    metrics = {"settings": vars(args), "hardware": hardware, "torch": torch.__version__, "seconds": {}}
    images, args.data = load_images(args.data, args.data_root)
    labels = load_labels(args.data, args.data_root)
    n = len(images) // 6
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, images, labels = images[order[:n]], images[order[n:]], labels[order[n:]]  # n images to judge by
    if args.batch_size > len(images):
        fail(f"--batch-size {args.batch_size} is more than the {len(images)} images of {args.data}")
    diffusion = Diffusion(linear_beta(args.T), device)
    if not args.load:
        args.network = {"channels": images.shape[1], **args.network}
        torch.manual_seed(args.seed)
        model = UNet(**args.network).to(device, memory_format=torch.channels_last)
        if device.type != "cuda" and not args.smoke:
            print(f"The small network for CPUs: about {CPU_MINUTES} minutes in all on two cores with bf16.")
        start = time.perf_counter()
        ema, losses = train(diffusion, model, images.to(device), args)
        metrics["seconds"]["training"] = time.perf_counter() - start
        metrics |= {"steps_done": len(losses), "loss": losses[-100:].mean().item()}
        state = {"settings": settings_of(args), "model": model.state_dict(), "ema": ema.state_dict()}
        write(args.out / "model.pt", lambda temporary: torch.save(state, temporary))
        write_loss(args.out / "loss.png", losses, f"ddim_sampling on {args.data}")
    ema = ema.to(device, memory_format=torch.channels_last)
    metrics |= show_all(diffusion, ema, images, held_out, labels, args)
    write(args.out / "metrics.json", lambda temporary: temporary.write_text(json.dumps(metrics, default=str, indent=2)))


if __name__ == "__main__":
    main()

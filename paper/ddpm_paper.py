"""Denoising Diffusion Probabilistic Models, complete: the network and the recipe of the paper.

Ho et al. 2020, arXiv 2006.11239, on CIFAR-10: the UNet of 35,746,307 parameters, Adam, 800,000 steps, and the bound on
the likelihood in bits per dimension. Read it as a diff of ddpm_cifar.py. On several GPUs, with torchrun:

    python paper/ddpm_paper.py
    torchrun --nproc_per_node=4 paper/ddpm_paper.py
    python paper/ddpm_paper.py --pretrained      # no training: the published weights, 143 MB, downloaded
    python paper/ddpm_paper.py --load runs/ddpm_paper/model.pt --nll

writes samples.png, denoising.png, loss.png, metrics.json and model.pt to runs/ddpm_paper/, during training
checkpoint.pt (for --resume) and preview.png, with --nll nll.png.

On a CPU a smaller network shows the recipe at work, no more. Measured with real CIFAR-10 on two cores (AMD EPYC,
bf16): 1,500 steps of 32 images in 509 s, 64 samples by 1,000 DDPM steps in 164 s, last loss 0.0386; smooth patches, in
colours that are still far too strong. The paper's run, 800,000 steps of 128 images, has not been made here, nor any on
a GPU. The speed of the paper's network on those cores, by --benchmark (batch 16): 50 images/s forward and 14 in
training; on a slower day 29 and 9, 82% and 73% of what the cores then reached in bf16 matrix products.

Left out: the networks for larger images. EMA: the paper's 0.9999, reached by a ramp.
"""
import argparse
import atexit
import copy
import http.client
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# torchvision, scikit-learn and matplotlib are imported where they are used, so that --help answers at once.

# 1. Forward process -------------------------------------------------------------------------------------------


def linear_beta(T=1000):
    """The linear schedule (DDPM, Section 4): (T+1,) float64, from 1e-4 at t = 1 to 0.02 at t = T; beta[0] = 0."""
    return torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, T, dtype=torch.float64)])


def cosine_beta(T=1000, s=0.008):
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17): (T+1,) float64; beta[0] = 0."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), (1 - f[1:] / f[:-1]).clamp(max=0.999)])


SCHEDULES = {"linear": linear_beta, "cosine": cosine_beta}


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

    def q_posterior(self, x0, xt, t):
        """Mean (B, C, H, W) and variance (B or 1, 1, 1, 1) of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 6-7)."""
        alpha_bar, alpha_bar_before = at(self.alpha_bar, t), at(self.alpha_bar, t - 1)
        x0_weight = alpha_bar_before.sqrt() * at(self.beta, t) / (1 - alpha_bar)
        xt_weight = at(self.alpha, t).sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar)
        return x0_weight * x0 + xt_weight * xt, at(self.beta_tilde, t)

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
    def p_sample(self, model, xt, t, clip=True, variance="beta"):
        """x_{t-1} from x_t (DDPM, Algorithm 2), t an int. sigma_t^2 is beta_t or beta_tilde_t (Section 3.2)."""
        eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
        x0_hat = self.predict_x0(xt, t, eps_hat)
        if clip:  # before the mean is taken: no image has pixels outside [-1, 1], so there x0_hat must be wrong
            x0_hat = x0_hat.clamp(-1, 1)
        mean, beta_tilde = self.q_posterior(x0_hat, xt, t)
        if t == 1:  # the last step adds no noise
            return mean
        sigma = {"beta": at(self.beta, t), "beta_tilde": beta_tilde}[variance].sqrt()
        return mean + sigma * torch.randn_like(xt)

    @torch.no_grad()
    def sample(self, model, shape, clip=True, variance="beta", keep=()):
        """x_0 of that shape out of noise, t = T..1. keep: {t: None}, where the x_t of each such t is put."""
        xt = torch.randn(shape, device=self.beta.device, dtype=self.beta.dtype)
        for t in tqdm(range(self.T, 0, -1), "sampling"):
            if t in keep:
                keep[t] = xt
            xt = self.p_sample(model, xt, t, clip, variance)
        if 0 in keep:
            keep[0] = xt
        return xt


    # The bound on the likelihood ----------------------------------------------------------------------------
    @torch.no_grad()
    def bound(self, model, x0, clip=True, variance="beta"):
        """-log2 p(x_0) <= the sum of L (DDPM, Eq. 5), in bits per dimension. -> (T+1,): L_0, ..., L_T

        x0 (B, C, H, W) holds 8-bit colours scaled to [-1, 1]. L_T compares the end of the forward process with pure
        noise, L_{t-1} each learned step back with the posterior; L_0 is the cost of the exact colours, given x_1.
        """
        L = torch.zeros(self.T + 1, device=x0.device, dtype=x0.dtype)
        zero, one = torch.zeros_like(x0), torch.ones_like(x0)
        L[self.T] = gaussian_kl(at(self.alpha_bar, self.T).sqrt() * x0, one - at(self.alpha_bar, self.T), zero, one)
        for t in tqdm(range(self.T, 0, -1), "bits per dimension"):
            xt = self.q_sample(x0, t, torch.randn_like(x0))
            eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device))
            x0_hat = self.predict_x0(xt, t, eps_hat)
            mean, _ = self.q_posterior(x0_hat.clamp(-1, 1) if clip else x0_hat, xt, t)
            if t > 1:
                true_mean, beta_tilde = self.q_posterior(x0, xt, t)
                sigma2 = {"beta": at(self.beta, t), "beta_tilde": beta_tilde}[variance]
                L[t - 1] = gaussian_kl(true_mean, beta_tilde, mean, sigma2)
            else:  # beta_tilde_1 is 0, which would make all but one colour impossible; the official code takes this
                L[0] = decoder_cost(x0, mean, at(self.beta_tilde, min(2, self.T)).sqrt())
        return L


def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in bits, the mean over all pixels. -> scalar"""
    ratio = variance1 / variance2
    return ((mean1 - mean2) ** 2 / variance2 + ratio - 1 - ratio.log()).mean() / (2 * math.log(2))


def decoder_cost(x0, mean, sigma):
    """-log2 of the probability that N(mean, sigma^2) gives x0's level of the 256 (DDPM, Eq. 13). -> scalar

    A level is an interval of width 2/255; the darkest and the brightest reach to infinity.
    """
    upper = torch.special.ndtr((x0 + 1 / 255 - mean) / sigma).where(x0 < 0.999, 1.0)
    lower = torch.special.ndtr((x0 - 1 / 255 - mean) / sigma).where(x0 > -0.999, 0.0)
    return -(upper - lower).clamp(min=1e-12).log2().mean()


# 4. Network -----------------------------------------------------------------------------------------------
SHAPE = (3, 32, 32)  # of an image


def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000 radians a step."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device) / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def layer(module, gain=1.0):
    """A convolution or a linear layer, begun as the paper's: Xavier-uniform weights, biases 0."""
    nn.init.xavier_uniform_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def norm(c):
    """32 groups, as the paper has them; in smaller networks fewer, to keep four channels in each.

    A group's mean is taken away. With a channel for itself, how red the whole image is would be lost at every norm.
    """
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


def halve(c):
    """(B, c, H, W) -> (B, c, H/2, W/2). Zeros to the right and below alone, as TensorFlow pads."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), layer(nn.Conv2d(c, c, 3, stride=2)))


def double(c):
    return nn.Sequential(nn.Upsample(scale_factor=2), layer(nn.Conv2d(c, c, 3, padding=1)))


class ResnetBlock(nn.Module):
    """x (B, c_in, H, W) and the time e (B, d_time) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, d_time, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), layer(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = layer(nn.Linear(d_time, c_out))
        self.norm2 = norm(c_out)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), layer(nn.Conv2d(c_out, c_out, 3, padding=1), gain=1e-5))
        self.skip = layer(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Self-attention with one head: every pixel looks at every other. x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv = norm(c), layer(nn.Linear(c, 3 * c), gain=math.sqrt(2))  # as three layers of c x c
        self.out = layer(nn.Linear(c, c), gain=1e-5)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=2)
        out = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + out.transpose(1, 2).view(x.shape)


class ResnetAttnBlock(ResnetBlock):
    """A ResnetBlock with an AttnBlock after it."""

    def __init__(self, c_in, c_out, d_time, dropout):
        super().__init__(c_in, c_out, d_time, dropout)
        self.attention = AttnBlock(c_out)

    def forward(self, x, e):
        return self.attention(super().forward(x, e))


class UNet(nn.Module):
    """The paper's network (DDPM, Appendix B): eps_hat = UNet()(xt, t): (B, 3, 32, 32), (B,) -> (B, 3, 32, 32).

    widths: channels at 32x32, 16x16, 8x8 and 4x4. blocks: at each resolution on the way down; one more on the way up.
    attention: the places in widths of the resolutions that have attention. 35,746,307 parameters.
    """

    def __init__(self, widths=(128, 256, 256, 256), blocks=2, attention=(1,), dropout=0.1):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        linear1, linear2 = layer(nn.Linear(self.d, d_time)), layer(nn.Linear(d_time, d_time))
        self.time = nn.Sequential(linear1, nn.SiLU(), linear2, nn.SiLU())
        self.first = layer(nn.Conv2d(SHAPE[0], widths[0], 3, padding=1))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = widths[0], [widths[0]]  # channels of h; of all that is kept for the way up
        for i, width in enumerate(widths):
            block = ResnetAttnBlock if i in attention else ResnetBlock
            level = [block(a, width, d_time, dropout) for a in [c] + [width] * (blocks - 1)]
            level += [halve(width)] if i < len(widths) - 1 else []
            skips += [width] * len(level)
            self.down.append(nn.ModuleList(level))
            c = width
        self.middle = nn.ModuleList([ResnetAttnBlock(c, c, d_time, dropout), ResnetBlock(c, c, d_time, dropout)])
        for i, width in reversed(list(enumerate(widths))):
            block = ResnetAttnBlock if i in attention else ResnetBlock
            level = [block(a + skips.pop(), width, d_time, dropout) for a in [c] + [width] * blocks]
            level += [double(width)] if i > 0 else []
            self.up.append(nn.ModuleList(level))
            c = width
        self.last = nn.Sequential(norm(c), nn.SiLU(), layer(nn.Conv2d(c, SHAPE[0], 3, padding=1), gain=1e-5))

    def forward(self, xt, t):
        e = self.time(time_embedding(t - 1, self.d))  # the official code counts t from 0
        h = self.first(xt)
        skips = [h]
        for level in self.down:
            for part in level:
                h = part(h, e) if isinstance(part, ResnetBlock) else part(h)
                skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for level in self.up:
            for part in level:
                h = part(torch.cat([h, skips.pop()], dim=1), e) if isinstance(part, ResnetBlock) else part(h)
        return self.last(h).to(xt.dtype)


OFFICIAL = "https://huggingface.co/google/ddpm-cifar10-32/resolve/main/diffusion_pytorch_model.bin"
RENAMED = [  # the published names, as regular expressions, and ours
    (r"^conv_in", "first"),
    (r"^time_embedding\.linear_1", "time.0"),
    (r"^time_embedding\.linear_2", "time.2"),
    (r"^conv_norm_out", "last.0"),
    (r"^conv_out", "last.2"),
    (r"^(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.\3"),
    (r"^(down|up)_blocks\.(\d)\.attentions\.(\d)", r"\1.\2.\3.attention"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", r"down.\1.2.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.conv", r"up.\1.3.1"),
    (r"^mid_block\.resnets\.(\d)", r"middle.\1"),
    (r"^mid_block\.attentions\.0", "middle.0.attention"),
    (r"\.time_emb_proj", ".time"),
    (r"\.conv_shortcut", ".skip"),
    (r"\.conv2", ".conv2.1"),
    (r"\.group_norm", ".norm"),
    (r"\.(to_q|query)\.", ".q."),  # two names, the newer and the older
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".out."),
]


def our_names(weights):
    """The published weights under the names of UNet; q, k and v, three layers there, are one here."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        renamed[name] = weight
    for name in [name for name in renamed if ".q." in name]:
        q, k, v = (renamed.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv")
        renamed[name.replace(".q.", ".qkv.")] = torch.cat([q, k, v])
    return renamed


def load_pretrained(source):
    """The published network of Ho et al., from "hub" (downloaded once) or from a .safetensors or .bin file."""
    try:
        if source == "hub":
            socket.setdefaulttimeout(SERVER_SECONDS)
            weights = torch.hub.load_state_dict_from_url(OFFICIAL, map_location="cpu", weights_only=True)
        elif source.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(source)
        else:
            weights = torch.load(source, map_location="cpu", weights_only=True)
        model = UNet()
        model.load_state_dict(our_names(weights))
        return model.eval().requires_grad_(False)
    except ImportError:
        fail(f"--pretrained {source}: to read this file, pip install safetensors")
    except Exception as error:
        fail(f"--pretrained {source}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


# 5. Data ------------------------------------------------------------------------------------------------------
SERVER_SECONDS = 10  # a server that says nothing for so long is given up


def knock(url):
    """Raise OSError or HTTPException, unless a server answers within SERVER_SECONDS."""
    socket.setdefaulttimeout(SERVER_SECONDS)
    # Asked in a thread, because looking up the server's name knows no time limit.
    ThreadPoolExecutor(1).submit(urllib.request.urlopen, url).result(timeout=SERVER_SECONDS).close()


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


def load_photos():
    """Crops of two photographs at half their size, (6716, 3, 32, 32) uint8: a pagoda in China, and a dahlia."""
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images])  # (2, 427, 640, 3)
    small = F.avg_pool2d(photos.permute(0, 3, 1, 2).float(), 2)  # (2, 3, 213, 320)
    crops = small.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 73, 32, 32)
    return crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte()


def load_colour_strokes():
    """What --smoke learns: diagonals of three colours, (32, 3, 32, 32) uint8."""
    stroke = torch.stack([255 * torch.eye(32).roll(i) for i in range(32)])
    return torch.stack([stroke, stroke.flip(1), stroke.roll(8)], dim=1).byte()


# What --data takes, and what loads it from --data-root. Where the first cannot be downloaded, the second stands in.
DATA = {
    "cifar10": load_cifar10,
    "photos": lambda root: load_photos(),
    "strokes": lambda root: load_colour_strokes(),
}
STAND_IN = "crops of scikit-learn's two photographs"


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


def batches(images, batch_size, seed):
    """Endless batches x_0 (B, C, H, W) in [-1, 1]. Epoch after epoch shows each image once, in an order drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    leftover = torch.tensor([], dtype=torch.long, device=images.device)
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        *full, leftover = torch.cat([leftover, order]).split(batch_size)  # it begins the next epoch's first batch
        for index in full:
            yield images[index].float() / 127.5 - 1


def flip(x0):
    """Each image (B, C, H, W) mirrored, or not, with equal chances: a mirrored horse is a horse."""
    return torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0.flip(3), x0)


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


def paper_optimizer(model, lr, warm_up):
    """The paper's: Adam, and a learning rate that rises over `warm_up` steps and then stays."""
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm_up, 1))


def train(diffusion, model, images, args, resumed=None):
    """Algorithm 1 -> the EMA of the model, the loss of each step. resumed: the checkpoint to go on from, or None."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, schedule = paper_optimizer(model, args.lr, args.warm_up)
    losses = torch.zeros(args.steps, device=images.device)  # on the device: .item() would make each step wait
    parts = dict(model=model, ema=ema, optimizer=optimizer, schedule=schedule, random=RandomOfRanks(images.device))
    done = restore(resumed, parts, losses) if resumed else 0
    stream = islice(batches(images, args.batch_size, args.seed), done, args.steps)
    together = DistributedDataParallel(model) if ranks() > 1 else model  # its backward averages the gradients
    try:
        for x0 in (bar := tqdm(stream, "training", args.steps, initial=done)):
            with autocast(images.device):
                loss = diffusion.loss(together, flip(x0[rank() :: ranks()]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_ema(ema, model, done)
            losses[done] = mean_of_ranks(loss.detach())
            done += 1
            now_and_then(bar, diffusion, parts, losses, done, args)
    except KeyboardInterrupt:
        stopped(bar, losses[:done])
    return ema, losses[:done].cpu()


def stopped(bar, losses):
    """What Ctrl-C leads to. Ranks that stop at different steps could not go on together."""
    if ranks() > 1:
        fail("stopped; --resume goes on from the last checkpoint.pt")
    show_loss(bar, losses)
    print(f"\nStopped after {len(losses)} steps: the samples show what was learned by then.")


# Ranks: the processes that torchrun starts, one a GPU. Without torchrun there is one, of rank 0.
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device):
    """Meet the other ranks, if torchrun started this process. device: the --device of the command line."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    if rank() > 0:  # rank 0 alone tells what happens
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def files_of_one_rank(args):
    """All ranks run the same code; what those above 0 write goes to a folder that is thrown away."""
    if rank() > 0:
        args.out = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, args.out)


def mean_of_ranks(value):
    """The mean of a tensor over all ranks."""
    if ranks() > 1:
        dist.all_reduce(value)
    return value / ranks()


def joined(share):
    """(N, C, H, W) of each rank -> (N * ranks, C, H, W), on every rank."""
    if ranks() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(ranks())]
    dist.all_gather(shares, share.contiguous())
    return torch.cat(shares)


def now_and_then(bar, diffusion, parts, losses, done, args):
    """What is due after `done` steps: the loss in the progress bar, checkpoint.pt, preview.png."""
    if done % 50 == 0 or done == args.steps:
        show_loss(bar, losses[:done])
    if done % args.save_every == 0 or done == args.steps:
        save_checkpoint(args.out / "checkpoint.pt", parts, losses[:done], settings_of(args))
    if done % args.preview_every == 0 and done < args.steps:
        preview(diffusion, parts["ema"], parts["random"], args)


class RandomNumbers:
    """The state of the device's random numbers, to be saved and loaded as a network's is."""

    def __init__(self, device):
        self.module = torch if device.type == "cpu" else torch.get_device_module(device)

    def state_dict(self):
        return {"state": self.module.get_rng_state()}

    def load_state_dict(self, saved):
        self.module.set_rng_state(saved["state"])


class RandomOfRanks(RandomNumbers):
    """The states of all ranks: the checkpoint of rank 0 holds every one."""

    def state_dict(self):
        states = [super().state_dict()]
        if ranks() > 1:
            states = [None] * ranks()
            dist.all_gather_object(states, super().state_dict())
        return {"ranks": states}

    def load_state_dict(self, saved):
        super().load_state_dict(saved["ranks"][rank()])


def save_checkpoint(path, parts, losses, settings):
    """Write all that decides how the run goes on. The place in the data follows from the seed and the step."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"losses": losses.cpu(), "settings": settings}
    write(path, lambda temporary: torch.save(state, temporary))


def restore(checkpoint, parts, losses):
    """Put the run back to where save_checkpoint saw it -> the number of steps done by then."""
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    done = len(checkpoint["losses"])
    losses[:done] = checkpoint["losses"]
    return done


def preview(diffusion, ema, random, args):
    """Write what the EMA draws by now. The training's random numbers go on as if nothing had happened."""
    before = random.state_dict()
    torch.manual_seed(args.seed)
    with autocast(diffusion.beta.device):
        write_grid(args.out / "preview.png", diffusion.sample(ema, (16, *SHAPE), variance=args.variance).cpu(), 4)
    random.load_state_dict(before)


def show_loss(bar, losses):
    """Show the mean of the last 50 losses; end the run if it is no number any more."""
    if len(losses) == 0:
        fail("stopped before the first step was done")
    mean = losses[-50:].mean().item()
    if not math.isfinite(mean):
        bar.close()
        fail(f"the loss is {mean} after {len(losses)} steps: is the learning rate too high? Try a lower --lr")
    bar.set_postfix(loss=f"{mean:.4f}")


# 7. Files and command line ------------------------------------------------------------------------------------
# What a flag that is left out means; what the network is, and how long it trains, depends on the device.
SETTINGS = dict(seed=0, T=1000, variance="beta", samples=64, data="auto", schedule="linear", ranks=1)
GPU = dict(
    network=dict(widths=[128, 256, 256, 256]),
    steps=800_000, batch_size=128, lr=2e-4, warm_up=5000, compile=True, save_every=5000, preview_every=20_000,
)
CPU = dict(
    network=dict(widths=[32, 64, 64, 64], blocks=1),
    steps=1500, batch_size=32, lr=1e-3, warm_up=100, compile=False, save_every=250, preview_every=1000,
)
SMOKE = dict(
    network=dict(widths=[8, 16], blocks=1, attention=[1]),
    steps=6, batch_size=4, warm_up=1, compile=False, save_every=2, preview_every=5,
    T=10, samples=4, data="strokes",
)
CPU_SECONDS = 0.32  # of a training step on two cores
FLAGS = {  # besides those of every script
    "--resume": dict(action="store_true", help="go on with the interrupted run in --out from its checkpoint.pt"),
    "--compile": dict(action=argparse.BooleanOptionalAction, help="torch.compile (default: with CUDA, where it works)"),
    "--schedule": dict(choices=list(SCHEDULES), help=f"beta_t (default: {SETTINGS['schedule']})"),
    "--pretrained": dict(nargs="?", const="hub", help="no training: the published weights, or a file of them"),
    "--nll": dict(action="store_true", help="bits per dimension of some training images, and nll.png"),
    "--benchmark": dict(action="store_true", help="nothing but the speed of the paper's network"),
    "--variance": dict(choices=["beta", "beta_tilde"], help=f"sigma_t^2 (default: {SETTINGS['variance']})"),
    "--samples": dict(type=int, help=f"images in samples.png (default: {SETTINGS['samples']})"),
}


def can_compile(device):
    """Whether torch.compile works here: it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:
        print(f"Going on without torch.compile ({type(error).__name__}).")
        return False


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


def write_denoising(path, diffusion, model, trajectory):
    """Write how 4 images come out of noise: each x_t, and below it x0_hat. trajectory: {t: x_t}, T first."""
    pairs = []
    for t, xt in trajectory.items():
        xt = xt[:4]
        eps_hat = model(xt, torch.full((len(xt),), t, device=xt.device)) if t > 0 else 0
        pairs.append(torch.stack([xt, diffusion.predict_x0(xt, t, eps_hat)], dim=1))  # (4, 2, C, H, W)
    write_grid(path, torch.stack(pairs, dim=2).flatten(0, 2), len(pairs))


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


def load_resumed(args):
    """The checkpoint.pt of the run that --resume goes on with. The flags that are given must be those of that run."""
    path = args.out / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["settings"]
    except Exception as error:
        fail(f"--resume: no checkpoint of this script in {path} ({type(error).__name__})")
    given = {name: getattr(args, name, None) for name in settings}
    differ = [name for name in settings if given[name] not in (None, settings[name])]
    if differ:
        told = ", ".join(f"{name.replace('_', '-')} was {settings[name]} and is now {given[name]}" for name in differ)
        fail(f"--resume: this is another run than the one in {path}: {told}")
    return checkpoint


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


def draw_together(diffusion, ema, args, seconds):
    """Write samples.png and denoising.png; note the time in `seconds`. Each rank draws its share of the samples."""
    torch.manual_seed(args.seed + rank())
    keep = {round(args.T * k / 10): None for k in range(10, -1, -1)}
    start = time.perf_counter()
    with autocast(diffusion.beta.device):
        shape = (math.ceil(args.samples / ranks()), *SHAPE)
        samples = joined(diffusion.sample(ema, shape, variance=args.variance, keep=keep))[: args.samples].cpu()
        seconds["sampling"] = time.perf_counter() - start
        write_grid(args.out / "samples.png", samples, math.ceil(math.sqrt(args.samples)))
        write_denoising(args.out / "denoising.png", diffusion, ema, keep)


def write_bound(diffusion, ema, images, args):
    """Write nll.png, L_t over t, from as many training images as there are samples -> bits per dimension."""
    torch.manual_seed(args.seed)
    x0 = images[torch.randperm(len(images))[: args.samples]].to(diffusion.beta.device).float() / 127.5 - 1
    with autocast(x0.device):
        L = diffusion.bound(ema, x0, variance=args.variance).cpu()
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    axes.semilogy(torch.arange(args.T), L[:-1])
    title = f"{L.sum():.2f} bits per dimension ({len(x0)} training images of {args.data})"
    axes.set(title=title, xlabel="t", ylabel="$L_t$ in bits per dimension")
    write(args.out / "nll.png", axes.figure.savefig)
    print(f"{L.sum():.3f} bits per dimension: L_0 {L[0]:.3f}, L_1 to L_(T-1) {L[1:-1].sum():.3f}, L_T {L[-1]:.4f}")
    return L.sum().item()


def fastest(run, device):
    """Seconds of the fastest of five calls of run()."""
    times = []
    for _ in range(6):  # and one to warm up, in which torch.compile compiles
        start = time.perf_counter()
        run()
        torch.ones(1, device=device).item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])


def forward_and_step(model, x0):
    """Two functions to be timed: a forward pass of x0 through the model, and a training step on it."""
    diffusion, t = Diffusion(linear_beta(), x0.device), torch.full((len(x0),), 500, device=x0.device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def forward():
        with torch.no_grad(), autocast(x0.device):
            model.eval()(x0, t)

    def step():
        with autocast(x0.device):
            loss = diffusion.loss(model.train(), x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return forward, step


def benchmark(device):
    """Print images a second of the paper's network, and their share of what the device does in bf16 matrix products."""
    n, batch = (8192, 128) if device.type == "cuda" else (2048, 16)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    peak = 2 * n**3 / fastest(lambda: a @ a, device)
    model = UNet().to(device, memory_format=torch.channels_last)
    forward, step = forward_and_step(model, torch.randn(batch, *SHAPE, device=device))
    with FlopCounterMode(display=False) as counter:
        forward()
    work = counter.get_total_flops() / batch  # floating-point operations of an image, forward
    print(f"{peak / 1e12:.2f} TFLOP/s in bf16 matrix products; {work / 1e9:.2f} GFLOP an image, forward")
    for compiled in (False, True):
        if compiled and can_compile(device):
            model.compile()
        speed = batch / fastest(forward, device), batch / fastest(step, device)
        print(f"batch {batch}, compile {compiled}:")
        print(f"    forward  {speed[0]:8.1f} images/s, {speed[0] * work / peak:.0%} of that")
        print(f"    training {speed[1]:8.1f} images/s, {3 * speed[1] * work / peak:.0%}")


def main(argv=None):
    args = parse_arguments(argv)
    join_ranks(args.device)
    device = find_device(args.device)
    args.device, args.ranks = device.type, ranks()
    if args.benchmark:
        return benchmark(device)
    if bool(args.load) + bool(args.pretrained) + args.resume > 1:
        fail("--load, --pretrained and --resume: give one of them")
    loaded, ema = load_checkpoint(args.load) if args.load else ({}, None)
    if args.pretrained:
        loaded, ema, args.load = {"network": GPU["network"]}, load_pretrained(args.pretrained), args.pretrained
    if args.load and args.schedule:
        fail("--schedule is for training: a trained network keeps its own")
    resumed = load_resumed(args) if args.resume else None
    files_of_one_rank(args)
    if args.load and args.compile is None:  # whatever the device of that run was
        args.compile = device.type == "cuda"
    fill_defaults(args, device, resumed["settings"] if resumed else loaded)
    args.compile = args.compile and can_compile(device)
    if args.batch_size % ranks():
        fail(f"--batch-size {args.batch_size} cannot be shared out to {ranks()} ranks")
    diffusion = Diffusion(SCHEDULES[args.schedule](args.T), device)
    hardware = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    metrics = {"settings": vars(args), "hardware": hardware, "torch": torch.__version__, "seconds": {}}
    if args.nll or not args.load:
        if rank() > 0:
            dist.barrier()  # until rank 0 has downloaded what the others then find
        images, args.data = load_images(args.data, args.data_root)
        if rank() == 0 and ranks() > 1:
            dist.barrier()
    if not args.load:
        if args.batch_size > len(images):
            fail(f"--batch-size {args.batch_size} is more than the {len(images)} images of {args.data}")
        torch.manual_seed(args.seed)
        model = UNet(**args.network).to(device, memory_format=torch.channels_last)
        if device.type != "cuda" and not args.smoke:
            minutes = args.steps * args.batch_size / CPU["batch_size"] * CPU_SECONDS / 60
            print(f"A SHORTENED run for CPUs: about {math.ceil(minutes)} minutes of training on two cores with bf16.")
            print("It shows the recipe at work, with a small network. The paper's run takes days of a GPU.")
        if args.compile:
            model.compile()
        torch.manual_seed(args.seed + rank())  # the same network, other noise on every rank
        start = time.perf_counter()
        ema, losses = train(diffusion, model, images.to(device), args, resumed)
        metrics["seconds"]["training"] = time.perf_counter() - start
        metrics |= {"steps_done": len(losses), "loss": losses[-100:].mean().item()}
        metrics["resumed_after"] = len(resumed["losses"]) if resumed else 0
        state = {"settings": settings_of(args), "model": model.state_dict(), "ema": ema.state_dict()}
        write(args.out / "model.pt", lambda temporary: torch.save(state, temporary))
        write_loss(args.out / "loss.png", losses, f"ddpm_paper on {args.data}")
    ema = ema.to(device, memory_format=torch.channels_last)
    if args.compile:
        ema.compile()
    draw_together(diffusion, ema, args, metrics["seconds"])
    if args.nll:
        metrics["bits_per_dimension"] = write_bound(diffusion, ema, images, args)
    write(args.out / "metrics.json", lambda temporary: temporary.write_text(json.dumps(metrics, default=str, indent=2)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

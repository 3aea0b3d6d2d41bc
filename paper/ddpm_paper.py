"""DDPM in full: the network, the recipe and the bound of the paper (Ho et al. 2020, arXiv 2006.11239).

Read it as a diff of ddpm_cifar.py. New are the UNet of 35,746,307 parameters, with dropout; Adam with a warm-up, for
800,000 steps; the bound on -log p(x_0) in bits per dimension, of test images; the cosine schedule; several GPUs.

    python paper/ddpm_paper.py                         # train, then draw; --resume goes on with a run that was stopped
    torchrun --nproc_per_node=4 paper/ddpm_paper.py    # train on 4 GPUs, which share each batch
    python paper/ddpm_paper.py --pretrained --nll      # the published weights (143 MB), and their bound

Writes samples.png, samples.npz, loss.png, model.pt (with --nll nll.png; in training checkpoint.pt and preview.png) to
runs/ddpm_paper/. Two cores need 12 minutes, for a small network that shows the recipe at work; the paper's takes days
on a GPU. On a CPU, with one rank or two, a resumed run is bit-identical to an unbroken one. Left out: larger images.
"""
import argparse
import copy
import importlib
import math
import os
import re
import signal
import socket
import sys
import time
from itertools import chain
from pathlib import Path

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


# 1. Forward process -------------------------------------------------------------------------------------------
def linear_beta(T=1000):
    """The linear schedule (DDPM, Section 4): (T+1,) float64, from 1e-4 at t = 1 to 0.02 at t = T; beta[0] = 0."""
    return torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, T, dtype=torch.float64)])


def cosine_beta(T=1000, s=0.008):
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17): (T+1,) float64; beta[0] = 0."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return torch.cat([torch.zeros(1, dtype=torch.float64), (1 - f[1:] / f[:-1]).clamp(max=0.999)])


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
        t = torch.randint(1, self.T + 1, (len(x0),), device=x0.device)
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
    def sample(self, model, shape, clip=True, variance="beta"):
        """x_0 of that shape (B, C, H, W), from noise x_T down to t = 1 (DDPM, Algorithm 2)."""
        xt = torch.randn(shape, device=self.beta.device, dtype=self.beta.dtype)
        for t in tqdm(range(self.T, 0, -1), "sampling"):
            xt = self.p_sample(model, xt, t, clip, variance)
        return xt

    # The bound on the likelihood ----------------------------------------------------------------------------
    @torch.no_grad()
    def bound(self, model, x0, clip=True, variance="beta"):
        """-log2 p(x_0) <= L_0 + ... + L_T (DDPM, Eq. 5), in bits per dimension. x0: 256 levels in [-1, 1]. -> (T+1,)"""
        # L_T compares x_T with pure noise, L_{t-1} a step back with the posterior; L_0 is the exact colours' cost.
        L = torch.zeros(self.T + 1, device=x0.device, dtype=x0.dtype)
        L[self.T] = gaussian_kl(at(self.alpha_bar, self.T).sqrt() * x0, 1 - at(self.alpha_bar, self.T), 0, 1)
        for t in tqdm(range(self.T, 0, -1), "bits per dimension"):
            xt = self.q_sample(x0, t, torch.randn_like(x0))
            x0_hat = self.predict_x0(xt, t, model(xt, torch.full((len(xt),), t, device=xt.device)))
            mean, _ = self.q_posterior(x0_hat.clamp(-1, 1) if clip else x0_hat, xt, t)
            if t > 1:
                true_mean, beta_tilde = self.q_posterior(x0, xt, t)
                sigma2 = {"beta": at(self.beta, t), "beta_tilde": beta_tilde}[variance]
                L[t - 1] = gaussian_kl(true_mean, beta_tilde, mean, sigma2)
            else:  # beta_tilde_1 is 0: all but one colour would be impossible. The official code takes beta_tilde_2
                L[0] = decoder_cost(x0, mean, at(self.beta_tilde, min(2, self.T)).sqrt())
        return L


def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in bits, the mean over all pixels. -> scalar"""
    ratio = variance1 / variance2
    return ((mean1 - mean2) ** 2 / variance2 + ratio - 1 - ratio.log()).mean() / (2 * math.log(2))


def decoder_cost(x0, mean, sigma):
    """-log2 P(N(mean, sigma^2) in x0's interval of width 2/255; the outermost are endless) (DDPM, Eq. 13). -> scalar"""
    upper = torch.special.ndtr((x0 + 1 / 255 - mean) / sigma).where(x0 < 0.999, 1.0)
    lower = torch.special.ndtr((x0 - 1 / 255 - mean) / sigma).where(x0 > -0.999, 0.0)
    return -(upper - lower).clamp(min=1e-12).log2().mean()


# 4. Network -----------------------------------------------------------------------------------------------
def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000 radians a step."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device) / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def layer(module, gain=1.0):
    """A convolution or a linear layer, initialised as in the paper: Xavier-uniform weights, biases 0."""
    nn.init.xavier_uniform_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def norm(c):
    """32 groups (DDPM), in small networks fewer: a group of one channel would lose that channel's mean."""
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class AttnBlock(nn.Module):
    """Self-attention with one head: every pixel looks at every other. x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = norm(c), layer(nn.Linear(c, 3 * c), math.sqrt(2)), layer(nn.Linear(c, c), 1e-5)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=2)  # three layers of c x c in one: so the gain of sqrt(2)
        out = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + out.transpose(1, 2).view(x.shape)


class ResnetBlock(nn.Module):
    """x (B, c_in, H, W) and the time e (B, d_time) -> (B, c_out, H, W). attention: with an AttnBlock at its end?"""

    def __init__(self, c_in, c_out, d_time, dropout, attention):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), layer(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time, self.norm2 = layer(nn.Linear(d_time, c_out)), norm(c_out)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), layer(nn.Conv2d(c_out, c_out, 3, padding=1), gain=1e-5))
        self.skip = layer(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out else nn.Identity()
        self.attention = AttnBlock(c_out) if attention else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.attention(self.skip(x) + self.conv2(F.silu(self.norm2(h))))


class UNet(nn.Module):
    """The paper's network (DDPM, Appendix B) of 35,746,307 parameters: eps_hat = UNet()(xt, t), (B, 3, 32, 32)."""

    # widths: at 32x32, 16x16, ...; attention: indices into widths. blocks: on the way down; one more on the way up.
    def __init__(self, widths=(128, 256, 256, 256), blocks=2, attention=(1,), dropout=0.1):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        self.time = nn.Sequential(layer(nn.Linear(self.d, d_time)), nn.SiLU(), layer(nn.Linear(d_time, d_time)))
        self.first = layer(nn.Conv2d(3, widths[0], 3, padding=1))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = widths[0], [widths[0]]  # channels of h; of all that is kept for the way up
        for i, width in enumerate(widths):
            level = [ResnetBlock(a, width, d_time, dropout, i in attention) for a in [c] + [width] * (blocks - 1)]
            if i < len(widths) - 1:  # downsample; zeros to the right and below alone, as TensorFlow pads
                level.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), layer(nn.Conv2d(width, width, 3, stride=2))))
            skips += [width] * len(level)
            self.down.append(nn.ModuleList(level))
            c = width
        self.middle = nn.ModuleList([ResnetBlock(c, c, d_time, dropout, attends) for attends in (True, False)])
        for i, width in reversed(list(enumerate(widths))):
            sizes = [a + skips.pop() for a in [c] + [width] * blocks]  # of a block's input: h and a skip, concatenated
            level = [ResnetBlock(a, width, d_time, dropout, i in attention) for a in sizes]
            if i > 0:  # upsample
                level.append(nn.Sequential(nn.Upsample(scale_factor=2), layer(nn.Conv2d(width, width, 3, padding=1))))
            self.up.append(nn.ModuleList(level))
            c = width
        self.last = nn.Sequential(norm(c), nn.SiLU(), layer(nn.Conv2d(c, 3, 3, padding=1), gain=1e-5))

    def forward(self, xt, t):
        e = F.silu(self.time(time_embedding(t - 1, self.d)))  # the official code counts t from 0
        h = self.first(xt)
        skips = [h]
        for part in chain(*self.down):
            h = part(h, e) if isinstance(part, ResnetBlock) else part(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for part in chain(*self.up):
            h = part(torch.cat([h, skips.pop()], dim=1), e) if isinstance(part, ResnetBlock) else part(h)
        return self.last(h).to(xt.dtype)


OFFICIAL = "https://huggingface.co/google/ddpm-cifar10-32/resolve/main/diffusion_pytorch_model.bin"
RENAMED = {  # the published names, as regular expressions, and ours; q, k, v and out have an older and a newer one
    r"^conv_in": "first", r"^conv_norm_out": "last.0", r"^conv_out": "last.2", r"\.group_norm": ".norm",
    r"^time_embedding\.linear_1": "time.0", r"^time_embedding\.linear_2": "time.2", r"\.time_emb_proj": ".time",
    r"^mid_block\.resnets": "middle", r"^mid_block\.attentions\.0": "middle.0.attention", r"\.conv2": ".conv2.1",
    r"^(down|up)_blocks\.(\d)\.resnets": r"\1.\2", r"^(down|up)_blocks\.(\d)\.attentions\.(\d)": r"\1.\2.\3.attention",
    r"^down_blocks\.(\d)\.downsamplers\.0\.conv": r"down.\1.2.1", r"\.conv_shortcut": ".skip",
    r"^up_blocks\.(\d)\.upsamplers\.0\.conv": r"up.\1.3.1", r"\.(proj_attn|to_out\.0)\.": ".out.",
    r"\.(query|to_q)\.": ".q.", r"\.(key|to_k)\.": ".k.", r"\.(value|to_v)\.": ".v.",
}  # fmt: skip


def load_official(source):
    """The published weights, as the contents of a model.pt. source: "hub", or a .bin or .safetensors file."""
    if source == "hub":  # downloaded once
        options = dict(map_location="cpu", file_name="ddpm-cifar10-32.bin", weights_only=True)
        weights = torch.hub.load_state_dict_from_url(OFFICIAL, **options)
    elif source.endswith(".safetensors"):
        weights = importlib.import_module("safetensors.torch").load_file(source)  # nothing else needs that package
    else:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    for pattern, ours in RENAMED.items():
        weights = {re.sub(pattern, ours, name): weight for name, weight in weights.items()}
    for name in [name for name in weights if ".q." in name]:  # q, k and v are three layers there, and one here
        q, k, v = (weights.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv")
        weights[name.replace(".q.", ".qkv.")] = torch.cat([q, k, v])
    return {"network": {}, "ema": weights, "settings": {"T": 1000, "schedule": "linear"}}


# 5. Data ------------------------------------------------------------------------------------------------------
def load_images(data, root, train=True):
    """The training or the test images (N, 3, 32, 32) uint8, and what they are: cifar10, or photos in its place."""
    if data == "cifar10":
        try:
            return torch.from_numpy(CIFAR10(root, train, download=True).data).permute(0, 3, 1, 2), "cifar10"
        except Exception as error:
            if (folder := Path(root, CIFAR10.base_folder)).exists():
                fail(f"{folder} cannot be read: delete it, and the next run downloads it again ({error})")
            print(f"\n!!! NO CIFAR-10: {error}\n!!! In its place: crops of scikit-learn's two photographs.\n")
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)  # (2, 3, 427, 640)
    small = F.avg_pool2d(photos.float(), 2).split([256, 64], dim=3)[0 if train else 1]  # no crop lies in both
    crops = small.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 57 or 9, 32, 32)
    return crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte(), "photos"


# 6. Training --------------------------------------------------------------------------------------------------
def autocast(device):
    """A context that computes in bf16 where the hardware supports it, and in fp32 elsewhere."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def update_ema(ema, model, step):
    """ema <- decay ema + (1 - decay) model. A fixed 0.9999 would keep the random start for 10,000s of steps."""
    decay = min(0.9999, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


def train(diffusion, model, images, args, resumed=None):
    """Algorithm 1 -> the EMA of the model, and the loss of each step. resumed: the contents of a checkpoint.pt."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)  # lr is reached by a warm-up, and stays
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / args.warm_up, 1))
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    done = len(resumed["losses"]) if resumed else 0
    losses = torch.zeros(max(args.steps, done), device=images.device)  # a tensor: .item() would make every step wait
    if resumed:
        losses[:done] = resumed["losses"]
        for name, part in parts.items():
            part.load_state_dict(resumed[name])
    network = nn.parallel.DistributedDataParallel(model) if RANKS > 1 else model  # averages the ranks' gradients
    # The first Ctrl-C lets the running step come to its end, so that --resume can go on; a second one ends at once.
    stopped, usual = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: stopped.append(signal.signal(signal.SIGINT, usual)))
    for step in (bar := tqdm(range(done, args.steps), "training", args.steps, initial=done, disable=RANK > 0)):
        torch.manual_seed(args.seed + 10**7 * (RANK + RANKS * step))  # each rank draws images and noise of its own
        index = torch.randint(len(images), (args.batch_size // RANKS,), device=images.device)
        x0 = images[index].float() / 127.5 - 1  # (B, 3, 32, 32) in [-1, 1]
        x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0.flip(3), x0)  # half are mirrored
        with autocast(images.device):
            loss = diffusion.loss(network, x0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, step)
        loss, stop = loss.detach() / RANKS, torch.tensor(len(stopped), device="cpu")
        if RANKS > 1:
            dist.all_reduce(loss)  # the mean over the ranks, on each of them: a NaN ends them all
            dist.all_reduce(stop)  # a Ctrl-C on any ends all after this step; on the CPU: no step waits for the GPU
        losses[step], done = loss, step + 1
        if done % 50 == 0 or done == args.steps:
            mean = losses[max(0, done - 50) : done].mean().item()
            bar.set_postfix(loss=f"{mean:.4f}")
            if not math.isfinite(mean):
                fail(f"the loss is {mean} after {done} steps: is the learning rate too high? Try a lower --lr")
        if RANK == 0 and (done % args.save_every == 0 or done == args.steps or stop):
            state = {name: part.state_dict() for name, part in parts.items()} | {"losses": losses[:done].clone()}
            state |= {"network": args.network, "settings": {name: getattr(args, name) for name in SETTINGS}}
            torch.save({name: state[name] for name in ("network", "ema", "settings")}, args.out / "model.pt")
            torch.save(state, args.out / "checkpoint.part")
            os.replace(args.out / "checkpoint.part", args.out / "checkpoint.pt")  # a kill never leaves half a file
        if stop:
            bar.set_description("stopped; --resume goes on from here")
            break
        if RANK == 0 and done % (4 * args.save_every) == 0:
            with autocast(images.device):
                x0 = diffusion.sample(ema, (16, 3, 32, 32), variance=args.variance)
            save_image(x0, args.out / "preview.png", nrow=4, normalize=True, value_range=(-1, 1))
    signal.signal(signal.SIGINT, usual)
    return ema, losses[:done]


# 7. Run -------------------------------------------------------------------------------------------------------
GPU = dict(network={}, steps=800_000, batch_size=128, lr=2e-4, warm_up=5000, save_every=5000, compile=True)
CPU = dict(network=dict(widths=[32, 64, 64, 64], blocks=1), steps=1500, batch_size=32, lr=1e-3, warm_up=100)
CPU |= dict(save_every=250, compile=False)
SMOKE = dict(network=dict(widths=[8, 16], blocks=1), steps=6, batch_size=4, warm_up=1, save_every=1, compile=False)
SMOKE |= dict(T=10, samples=4, data="photos")
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of the processes of torchrun
FIXED = ["T", "schedule", "batch_size", "lr", "warm_up", "data", "seed", "ranks"]  # in a run that is resumed
SETTINGS = [*FIXED, "steps", "samples", "variance"]  # what the files remember


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    socket.setdefaulttimeout(10)  # seconds, for a server to answer
    flag("--steps", type=int, help="training steps (800,000 with CUDA, else 1500)")
    flag("--batch-size", type=int, help="images in a training step of all ranks, or drawn at once (128, else 32)")
    flag("--lr", type=float, help="learning rate after the warm-up (2e-4 with CUDA, else 1e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--schedule", choices=["linear", "cosine"], default="linear", help="of beta (linear)")
    flag("--data", choices=["cifar10", "photos"], default="cifar10", help="or crops of two photographs (cifar10)")
    flag("--data-root", default="data", help="folder of CIFAR-10 (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--samples", type=int, default=64, help="images to draw (64)")
    flag("--nll", type=int, nargs="?", const=64, default=0, help="also the bound, of NLL test images (64)")
    flag("--variance", choices=["beta", "beta_tilde"], default="beta", help="sigma_t^2 (beta)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/ddpm_paper; without training or with --smoke one in it)")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--load", help="a model.pt or checkpoint.pt: draw from it, without training")
    one_of.add_argument("--pretrained", nargs="?", const="hub", metavar="FILE", help="draw with the published weights")
    one_of.add_argument("--resume", action="store_true", help="go on with the run in --out; --steps may be raised")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (with CUDA)")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    for name, least in dict(steps=1, batch_size=1, lr=1e-9, T=1, samples=1, nll=0, seed=0).items():
        if (value := getattr(args, name)) is not None and not least <= value <= 10**7:
            fail(f"--{name.replace('_', '-')} must lie between {least} and 10 million, not {value}")
    if args.pretrained and (args.T, args.schedule) != (1000, "linear"):
        fail("--pretrained: the published network was trained with --T 1000 and the linear --schedule")
    defaults = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {})
    trained, saved = args.load or args.pretrained, None
    parser.set_defaults(out=Path("runs/ddpm_paper", "loaded" if trained else "smoke" if args.smoke else ""))
    if source := trained or (args.resume and parser.parse_args(argv).out / "checkpoint.pt"):
        how = "--load" if args.load else "--pretrained" if args.pretrained else "--resume"
        try:
            saved = load_official(source) if args.pretrained else torch.load(source, "cpu", weights_only=True)
            defaults |= saved["settings"] | {"network": saved["network"]}
            UNet(**saved["network"]).load_state_dict(saved["ema"])
            assert not args.resume or "optimizer" in saved, "no checkpoint.pt"
        except Exception as error:
            what = "cannot be read" if isinstance(error, OSError) else "is no file for this network"
            fail(f"{how}: {'the published network' if source == 'hub' else source} {what} ({error!r:.200})")
    parser.set_defaults(**defaults | {"ranks": RANKS})
    args = parser.parse_args(argv)
    for name in FIXED if args.resume else FIXED[:2] if args.load else []:
        if getattr(args, name) != saved["settings"].get(name):
            fail(f"{how}: {name.replace('_', '-')} was {saved['settings'].get(name)}, not {getattr(args, name)}")
    if RANKS > 1 and (trained or args.batch_size % RANKS):
        fail(f"torchrun is for training, with a --batch-size that its {RANKS} ranks can share, not {args.batch_size}")
    try:
        if RANKS > 1 and args.device != "cpu":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each rank, whichever --device names
            torch.cuda.set_device(args.device)
        args.device = torch.ones(1, device=args.device).device
        if RANK == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "samples.png").open("ab").close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} or --out {args.out} cannot be used: {error}")

    # Training, or loading
    diffusion = Diffusion({"linear": linear_beta, "cosine": cosine_beta}[args.schedule](args.T), args.device)
    torch.manual_seed(args.seed)
    model = UNet(**args.network).to(args.device, memory_format=torch.channels_last)
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # where there is no compiler, go on without
        model.compile()
    report, start = [], time.perf_counter()
    if trained:
        model.load_state_dict(saved["ema"])
        ema = model.eval()
    else:
        loaded = [load_images(args.data, args.data_root) if RANK == 0 else None]
        if RANKS > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
            dist.broadcast_object_list(loaded)  # so that rank 0 alone downloads
        images, args.data = loaded[0]
        if args.resume and args.data != saved["settings"]["data"]:
            fail(f"--resume: the run began with {saved['settings']['data']}, which is not in {args.data_root}")
        try:
            ema, losses = train(diffusion, model, images.to(args.device), args, saved)
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            fail(f"out of memory: try a smaller --batch-size ({error})")
        if RANKS > 1:
            dist.destroy_process_group()
        if RANK > 0:
            return
        report += [f"{len(losses)} steps in {time.perf_counter() - start:.0f} s, loss {losses[-50:].mean():.4f}"]
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.semilogy(losses.unfold(0, 1 + len(losses) // 50, 1).mean(1).cpu())
        axes.set(title=f"ddpm_paper.py on {args.data}", xlabel="step", ylabel="$L_{simple}$, running mean")
        axes.figure.savefig(args.out / "loss.png")

    # The bound
    if args.nll:
        torch.manual_seed(args.seed)
        test, args.data = load_images(args.data, args.data_root, train=False)
        x0 = test[torch.randperm(len(test))[: args.nll]].to(args.device).float() / 127.5 - 1
        with autocast(args.device):
            L = [len(part) * diffusion.bound(ema, part, variance=args.variance) for part in x0.split(args.batch_size)]
        L = torch.stack(L).sum(0).cpu() / len(x0)  # (T+1,)
        report += [f"{L.sum():.3f} bits per dimension of {len(x0)} test images (L_0 {L[0]:.3f}, L_T {L[-1]:.4f})"]
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.semilogy(L[:-1])
        axes.set(title=f"{len(x0)} images of {args.data}: {L.sum():.2f} bits per dimension", xlabel="t", ylabel="$L_t$")
        axes.figure.savefig(args.out / "nll.png")

    # Sampling
    torch.manual_seed(args.seed)  # anew, so that --load draws what the run drew
    parts, start = torch.empty(args.samples, 3, 32, 32).split(args.batch_size), time.perf_counter()
    with autocast(args.device):
        x0 = torch.cat([diffusion.sample(ema, part.shape, variance=args.variance) for part in parts])
    samples = (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()  # (N, 3, 32, 32)
    np.savez(args.out / "samples.npz", samples.permute(0, 2, 3, 1).numpy())
    save_image(F.interpolate(samples / 255, scale_factor=2), args.out / "samples.png", nrow=math.isqrt(args.samples))
    print("; ".join([*report, f"{args.samples} samples in {time.perf_counter() - start:.0f} s: {args.out}"]))


if __name__ == "__main__":
    main()

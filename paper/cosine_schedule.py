"""Noise schedules: linear against cosine, all else equal.

Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal 2021, arXiv 2102.09672), Sections 3.2 and 4. The
linear schedule of DDPM destroys an image early: its last steps add noise to what is noise already. The cosine schedule
destroys it evenly, over all steps. Here two networks are trained from the same weights, on the same images, t and
noise, one under each schedule. Then both draw, starting from noise at t = T, and from noise at t = 0.8 T.

    python paper/cosine_schedule.py                               # train both, then draw: seven minutes on two cores
    python paper/cosine_schedule.py --load runs/cosine_schedule   # draw only, with the two networks in that folder

Writes to runs/cosine_schedule/: schedules.png, forward.png (one image on its way into noise), loss_by_t.png, and for
each schedule model_cosine.pt, samples_cosine.png, skipped_cosine.png (and .npz, for paper/fid_is.py); skipped.png has
some of all four. The data are MNIST, downloaded to data/, or else scikit-learn's small digits.
Left out: the learned variance and the hybrid loss, the other half of the paper.
"""
import argparse
import copy
import math
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torchvision.datasets import MNIST
from torchvision.utils import make_grid, save_image
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

def sample_respaced(model, beta, S, skip, shape, device):
    """x_0 in S of the T steps (Nichol & Dhariwal, Section 4), of which those beyond t = (1 - skip) T are left out."""
    t = torch.linspace(0, len(beta) - 1, S + 1).round().long()
    alpha_bar = (1 - beta).cumprod(0)[t]  # at the kept steps; the beta between them follow (Eq. 19)
    beta = torch.cat([torch.zeros(1), 1 - alpha_bar[1:] / alpha_bar[:-1]])
    diffusion, t = Diffusion(beta[: 1 + round(S * (1 - skip))], device), t.to(device)
    return diffusion.sample(lambda xt, step: model(xt, t[step]), shape, variance="beta_tilde")


# 4. Network -----------------------------------------------------------------------------------------------
def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000 radians a step."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device) / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """x (B, c_in, H, W) and the time e (B, d_time) -> (B, c_out, H, W). Groups of under 16 channels slow CPUs down."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c_in // 16, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(d_time, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(c_out // 16, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # so that the block begins as its skip, plus a constant

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention with one head: every pixel looks at every other. x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(c // 16, c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=2)
        out = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + out.transpose(1, 2).view(x.shape)


class UNet(nn.Module):
    """eps_hat = UNet(...)(xt, t): (B, C, H, W), (B,) -> (B, C, H, W).

    channels: C. widths: channels at each resolution, the finest first; each resolution is half of the one before.
    blocks: ResBlocks at each resolution but the coarsest, on the way down and on the way up.
    """

    def __init__(self, channels, widths, blocks):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(self.d, d_time), nn.SiLU(), nn.Linear(d_time, d_time), nn.SiLU())
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for c, c_below in pairwise(widths):
            downsample = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_below, c, 3, padding=1))
            self.down.append(nn.ModuleList([ResBlock(c, c, d_time) for _ in range(blocks)] + [downsample]))
            self.up.insert(0, nn.ModuleList([upsample] + [ResBlock(2 * c, c, d_time) for _ in range(blocks)]))
        c = widths[-1]
        self.middle = nn.ModuleList([ResBlock(c, c, d_time), Attention(c), ResBlock(c, c, d_time)])
        norm, conv = nn.GroupNorm(widths[0] // 16, widths[0]), nn.Conv2d(widths[0], channels, 3, padding=1)
        self.last = nn.Sequential(norm, nn.SiLU(), conv)
        nn.init.zeros_(conv.weight)

    def forward(self, xt, t):
        e = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)  # (B, widths[0], H, W)
        skips = []
        for *blocks, downsample in self.down:
            for block in blocks:
                h = block(h, e)
                skips.append(h)
            h = downsample(h)
        block1, attention, block2 = self.middle
        h = block2(attention(block1(h, e)), e)  # (B, widths[-1], ...)
        for upsample, *blocks in self.up:
            h = upsample(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), e)
        return self.last(h).to(xt.dtype)

# 5. Data ------------------------------------------------------------------------------------------------------
def load_images(data, root):
    """The training images (N, 1, 28, 28) uint8, and what they are: mnist, or digits in its place."""
    if data == "mnist":
        try:
            socket.setdefaulttimeout(10)  # seconds
            return MNIST(root, download=True).data[:, None], "mnist"
        except Exception as error:
            if Path(root, "MNIST/raw/train-images-idx3-ubyte").exists():
                fail(f"{root}/MNIST cannot be read: delete that folder, and the next run downloads it again ({error})")
            print(f"\n!!! NO MNIST: {error}\n!!! In its place: scikit-learn's 1,797 digits of 8x8 pixels.\n")
    images = F.interpolate(torch.from_numpy(load_digits().images)[:, None] / 16, size=28, mode="bicubic")
    return (255 * images.clamp(0, 1)).round().byte(), "digits"


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


def train(diffusion, model, images, args):
    """Algorithm 1 -> the EMA of the model, and the loss of each step. Ctrl-C ends it and keeps what was learned."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), fused=True)  # 0.999 starts slower
    # The learning rate rises to nearly lr over the first 30th of the steps, then falls in a straight line to 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(30 * (i + 1), args.steps - i) / args.steps)
    losses, done = torch.full((args.steps,), math.nan, device=images.device), 0  # .item() would make each step wait
    try:
        for step in (bar := tqdm(range(args.steps), "training")):
            index = torch.randint(len(images), (args.batch_size,), device=images.device)
            x0 = images[index].float() / 127.5 - 1  # (B, 1, 28, 28) in [-1, 1]
            with autocast(images.device):
                loss = diffusion.loss(model, x0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_ema(ema, model, step)
            losses[step], done = loss.detach(), step + 1
            if done % 50 == 0 or done == args.steps:
                mean = losses[max(0, done - 50) : done].mean().item()
                bar.set_postfix(loss=f"{mean:.4f}")
                if not math.isfinite(mean):
                    bar.close()
                    fail(f"the loss is {mean} after {done} steps: is the learning rate too high? Try a lower --lr")
    except KeyboardInterrupt:
        print(f"\nStopped after {done} steps: the samples show what was learned by then.")
    return ema, losses[: max(done, 1)].cpu()

@torch.no_grad()
def loss_by_t(diffusion, model, images, n):
    """L_simple in 20 equal bands of t: (20,). Every call takes the same n images, t and noise."""
    index = torch.arange(n, device=images.device)
    x0 = images[index % len(images)].float() / 127.5 - 1
    t = 1 + index * diffusion.T // n  # evenly over 1..T
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    xt = diffusion.q_sample(x0, t, eps)
    eps_hat = torch.cat([model(*part) for part in zip(xt.split(250), t.split(250), strict=True)])
    return (eps_hat - eps).square().view(20, -1).mean(1)


# 7. Run -------------------------------------------------------------------------------------------------------
GPU = dict(network=dict(channels=1, widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4, S=1000)
CPU = dict(network=dict(channels=1, widths=[32, 64, 128], blocks=1), steps=1200, batch_size=32, lr=1.5e-3, S=100)
SMOKE = dict(network=dict(channels=1, widths=[16, 16], blocks=1), steps=3, batch_size=4, T=10, samples=8, data="digits")
SETTINGS = ["steps", "batch_size", "lr", "T", "data", "seed", "samples", "S", "skip_last"]  # what a model.pt remembers
SCHEDULES = {"linear": linear_beta, "cosine": cosine_beta}
LINES = {"linear": dict(color="#0072B2", label="linear"), "cosine": dict(color="#D55E00", ls="--", label="cosine")}


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--steps", type=int, help="training steps of each network (6000 with CUDA, else 1200)")
    flag("--batch-size", type=int, help="images in a training step (256 with CUDA, else 32)")
    flag("--lr", type=float, help="highest learning rate (5e-4 with CUDA, else 1.5e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--data", choices=["mnist", "digits"], default="mnist", help="mnist, or scikit-learn's small digits (mnist)")
    flag("--data-root", default="data", help="folder of MNIST (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--samples", type=int, default=256, help="images to draw, with and without the last part (256)")
    flag("--skip-last", type=float, default=0.2, help="the part of 1..T that is left out (0.2)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/cosine_schedule; with --load or --smoke a folder in it)")
    flag("--load", help="a folder with model_linear.pt and model_cosine.pt: draw from them, without training")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    defaults = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {})
    saved = {}
    for name in SCHEDULES if args.load else ():
        try:
            saved[name] = torch.load(Path(args.load, f"model_{name}.pt"), map_location="cpu", weights_only=True)
            defaults |= saved[name]["settings"] | {"network": saved[name]["network"] | {"channels": 1}}
            UNet(**defaults["network"]).load_state_dict(saved[name]["ema"])
            if defaults.pop("schedule") != name:
                raise ValueError
        except Exception as error:
            fail(f"--load {args.load}: model_{name}.pt is none of this script ({error!r:.100})")
    parser.set_defaults(out=Path("runs/cosine_schedule", "loaded" if args.load else "smoke" if args.smoke else ""))
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.load and args.T != defaults["T"]:
        fail(f"--load: that network was trained with T = {defaults['T']}, not {args.T}")
    for name, least in dict(steps=1, batch_size=1, lr=1e-9, T=1, samples=1, seed=0).items():
        if not least <= getattr(args, name) <= 10**7:
            fail(f"--{name.replace('_', '-')} must lie between {least} and 10 million, not {getattr(args, name)}")
    args.S = min(args.S, args.T)
    if not (0 <= args.skip_last <= 1 and round(args.S * (1 - args.skip_last)) > 0):
        fail(f"--skip-last must be 0 or more, and leave some of the {args.S} sampling steps, not {args.skip_last}")
    try:
        args.device = torch.ones(1, device=args.device).device
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "samples_linear.png").open("ab").close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} or --out {args.out} cannot be used: {error}")

    # The schedules: their tables, and one image under each
    images, args.data = load_images(args.data, args.data_root)
    torch.manual_seed(0)  # whatever the seed, no network is judged by images that it was trained on
    images = images[torch.randperm(len(images))].to(args.device)
    held_out, images = images[: len(images) // 6], images[len(images) // 6 :]
    x0, eps = held_out[:1] / 127.5 - 1, torch.randn(1, 1, 28, 28, device=args.device)
    diffusions = {name: Diffusion(beta(args.T), args.device) for name, beta in SCHEDULES.items()}
    panels = Figure(figsize=(9, 3), layout="constrained").subplots(1, 3)
    places = Figure(figsize=(9, 2.9), layout="constrained").subplots(2, 9)
    titles = r"$\beta_t$", r"$\bar\alpha_t$", r"log-SNR: $\log\,\bar\alpha_t / (1 - \bar\alpha_t)$"
    for row, (name, diffusion) in zip(places, diffusions.items(), strict=True):
        tables = [table[1:].cpu() for table in (diffusion.beta, diffusion.alpha_bar, diffusion.alpha_bar.logit())]
        for axes, table, title in zip(panels, tables, titles, strict=True):
            axes.plot(range(1, args.T + 1), table, **LINES[name])
            axes.set(title=title, xlabel="t", yscale="log" if axes is panels[0] else "linear")
        for axes, t in zip(row, torch.linspace(0, args.T, 9).round().int().tolist(), strict=True):
            axes.imshow(diffusion.q_sample(x0, t, eps)[0, 0].cpu(), cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[], title=f"t = {t}" if name == "linear" else "")
            axes.set_xlabel(rf"$\bar\alpha_t$ = {diffusion.alpha_bar[t].item():.2g}")
        row[0].set_ylabel(name, fontsize=12)
    panels[1].legend()
    panels[0].figure.savefig(args.out / "schedules.png")
    places[0, 0].figure.savefig(args.out / "forward.png")

    # Under each of them: training, or loading; the loss over t; samples
    over_t, over_snr = Figure(figsize=(9, 3.3), layout="constrained").subplots(1, 2, sharey=True)
    rows, report, start, shape = {}, "", time.perf_counter(), (args.samples, 1, 28, 28)
    for name, diffusion in diffusions.items():
        torch.manual_seed(args.seed)  # the same initial weights, and in training the same images, t and noise
        network = UNet(**args.network).to(args.device, memory_format=torch.channels_last)
        if args.load:
            network.load_state_dict(saved[name]["ema"])
            args.steps = saved[name]["settings"]["steps"]
        else:
            print(f"The {name} schedule: {len(images):,} images of {args.data}")
            network, losses = train(diffusion, network, images, args)  # the EMA of it
            args.steps = len(losses)  # after Ctrl-C the second network has no more steps than the first
            settings = {key: getattr(args, key) for key in SETTINGS} | {"schedule": name}
            state = dict(network=args.network, ema=network.state_dict(), settings=settings)
            torch.save(state, args.out / f"model_{name}.pt")
        with autocast(args.device):
            loss = loss_by_t(diffusion, network, held_out, 100 if args.smoke else 2000).cpu()
        report += f"{name}: {args.steps} steps, loss {loss.mean():.4f}; "
        middle = (1 + (torch.arange(20) + 0.5) * args.T / 20).long()  # of each band
        over_t.plot(middle, loss, **LINES[name])
        over_snr.plot(diffusion.alpha_bar.cpu()[middle].logit(), loss, **LINES[name])
        for kind, skip in dict(samples=0, skipped=args.skip_last).items():
            torch.manual_seed(args.seed)  # the same x_T and z for both networks
            with autocast(args.device):
                x0 = sample_respaced(network, SCHEDULES[name](args.T), args.S, skip, shape, args.device)
            samples = (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()  # (N, 1, 28, 28)
            np.savez(args.out / f"{kind}_{name}.npz", samples.permute(0, 2, 3, 1).numpy())
            save_image(F.interpolate(samples[:64] / 255, scale_factor=2), args.out / f"{kind}_{name}.png")
            first_t = round(args.T * round(args.S * (1 - skip)) / args.S)
            rows[f"{name}, from t = {first_t}"] = make_grid(samples[:8] / 255, pad_value=1)
    over_t.set(xlabel="t", ylabel="$L_{simple}$ of held-out images", yscale="log")
    over_snr.set(xlabel="log-SNR (left: noise; right: the image)")
    over_t.legend()
    over_t.figure.savefig(args.out / "loss_by_t.png")
    axes = Figure(figsize=(6, 2.6), layout="constrained").subplots()
    picture = torch.cat(list(rows.values()), dim=1).permute(1, 2, 0)
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[(k + 0.5) * len(picture) / len(rows) for k in range(len(rows))], yticklabels=list(rows))
    axes.figure.savefig(args.out / "skipped.png")
    print(f"{report}4 x {args.samples} samples; {time.perf_counter() - start:.0f} s: {args.out}")


if __name__ == "__main__":
    main()

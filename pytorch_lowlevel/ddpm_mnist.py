"""DDPM on handwritten digits: the whole algorithm in one file.

Denoising Diffusion Probabilistic Models (Ho et al. 2020, arXiv 2006.11239). In T small steps the forward process
turns an image x_0 into noise x_T. A network learns to predict the noise in x_t (Algorithm 1). The sampler starts from
pure noise x_T and removes a little of it at each step, down to x_0: a new digit (Algorithm 2).

    python pytorch_lowlevel/ddpm_mnist.py                                   # train, then draw
    python pytorch_lowlevel/ddpm_mnist.py --load runs/ddpm_mnist/model.pt   # draw only

Writes to runs/ddpm_mnist/: samples.png, samples.npz (for paper/fid_is.py), denoising.png and denoising.gif (x_t, and
below it the network's estimate of x_0), loss.png and model.pt. The data are MNIST, downloaded to data/; where that
fails, the 1,797 digits of 8x8 pixels that come with scikit-learn. On two CPU cores this takes six to ten minutes; with
a GPU the network is larger and the training longer. Left out: learned variances, the variational bound, resuming.
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
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image
from tqdm import tqdm


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
            x0 = images[torch.randint(len(images), (args.batch_size,), device=images.device)] / 127.5 - 1  # in [-1, 1]
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


# 7. Run -------------------------------------------------------------------------------------------------------
GPU = dict(network=dict(channels=1, widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4)
CPU = dict(network=dict(channels=1, widths=[32, 64, 128], blocks=1), steps=2250, batch_size=32, lr=1.5e-3)
SMOKE = dict(network=dict(channels=1, widths=[16, 16], blocks=1), steps=3, batch_size=4, T=10, samples=4, data="digits")


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--steps", type=int, help="training steps (6000 with CUDA, else 2250)")
    flag("--batch-size", type=int, help="images in a training step (256 with CUDA, else 32)")
    flag("--lr", type=float, help="highest learning rate (5e-4 with CUDA, else 1.5e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--data", choices=["mnist", "digits"], default="mnist", help="mnist, or scikit-learn's small digits (mnist)")
    flag("--data-root", default="data", help="folder of MNIST (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--samples", type=int, default=64, help="images to draw (64)")
    flag("--variance", choices=["beta", "beta_tilde"], default="beta", help="sigma_t^2 (beta)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/ddpm_mnist; with --load or --smoke a folder in it)")
    flag("--load", help="a model.pt: draw from it, without training")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    defaults = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {})
    if args.load:
        try:
            saved = torch.load(args.load, map_location="cpu", weights_only=True)
            defaults |= saved["settings"] | {"network": saved["network"] | {"channels": 1}}
            UNet(**defaults["network"]).load_state_dict(saved["ema"])
            assert saved["settings"].get("schedule", "linear") == "linear"  # cosine_schedule.py has another one too
        except Exception as error:
            fail(f"--load {args.load}: no model.pt for this script ({error!r:.100})")
    parser.set_defaults(out=Path("runs/ddpm_mnist", "loaded" if args.load else "smoke" if args.smoke else ""))
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.load and args.T != defaults["T"]:
        fail(f"--load: that network was trained with T = {defaults['T']}, not {args.T}")
    for name, least in dict(steps=1, batch_size=1, lr=1e-9, T=1, samples=1, seed=0).items():
        if not least <= getattr(args, name) <= 10**7:
            fail(f"--{name.replace('_', '-')} must lie between {least} and 10 million, not {getattr(args, name)}")
    try:
        args.device = torch.ones(1, device=args.device).device
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "samples.png").open("ab").close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} or --out {args.out} cannot be used: {error}")

    # Training, or loading
    diffusion = Diffusion(linear_beta(args.T), args.device)
    torch.manual_seed(args.seed)
    model = UNet(**args.network).to(args.device, memory_format=torch.channels_last)
    start = time.perf_counter()
    if args.load:
        model.load_state_dict(saved["ema"])
        ema = model.eval()
    else:
        images, args.data = load_images(args.data, args.data_root)
        ema, losses = train(diffusion, model, images.to(args.device), args)
        print(f"{len(losses)} steps in {time.perf_counter() - start:.0f} s, loss {losses[-50:].mean():.4f}")
        settings = {name: getattr(args, name) for name in ("steps", "T", "data", "seed", "samples", "variance")}
        torch.save({"network": args.network, "ema": ema.state_dict(), "settings": settings}, args.out / "model.pt")
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.semilogy(losses.unfold(0, 1 + len(losses) // 50, 1).mean(1))
        axes.set(title=f"ddpm_mnist.py on {args.data}", xlabel="step", ylabel="$L_{simple}$, running mean")
        axes.figure.savefig(args.out / "loss.png")

    # Sampling
    trajectory = []  # at each t: x_t and x0_hat of 8 images, (2, 8, 1, 28, 28)

    def recorder(xt, t):
        eps_hat = ema(xt, t)
        trajectory.append(torch.stack([xt[:8], diffusion.predict_x0(xt, t, eps_hat)[:8]]))
        return eps_hat

    torch.manual_seed(args.seed)  # anew, so that --load draws what the run drew
    start = time.perf_counter()
    with autocast(args.device):
        x0 = diffusion.sample(recorder, (args.samples, 1, 28, 28), variance=args.variance)
    samples = (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()  # (N, 1, 28, 28)
    print(f"{args.samples} samples in {time.perf_counter() - start:.0f} s: {args.out}")
    np.savez(args.out / "samples.npz", samples.permute(0, 2, 3, 1).numpy())
    save_image(F.interpolate(samples / 255, scale_factor=2), args.out / "samples.png", nrow=math.isqrt(args.samples))
    moments = torch.stack(trajectory)[torch.linspace(0, args.T - 1, 31).long()].clamp(-1, 1) / 2 + 0.5
    grids = [make_grid(F.interpolate(pair.flatten(0, 1), scale_factor=2), nrow=pair.shape[1]) for pair in moments.cpu()]
    save_image(grids[::6], args.out / "denoising.png", nrow=1)
    first, *frames = [to_pil_image(grid) for grid in grids]
    first.save(args.out / "denoising.gif", save_all=True, append_images=frames, duration=[100] * 30 + [1500], loop=0)


if __name__ == "__main__":
    main()

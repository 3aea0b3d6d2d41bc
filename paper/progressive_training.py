"""Progressive training: does it pay to learn small images first?

A training tip of the lesson: the same network sees images of 8x8, then 16x16, then 32x32 pixels, and its weights carry
over (nothing in a UNet depends on the size). A small step costs a fraction of a large one. Here the tip is put to the
test, against training at full size alone in the same time, for a quarter, a half and all of --steps at full size.

    python paper/progressive_training.py                                    # train, then draw: ten minutes on two cores
    python paper/progressive_training.py --load runs/progressive_training   # draw only, with the networks in there

Writes to runs/progressive_training/: race.png (loss over seconds), stages.png (samples after each stage), and of the
longest run each way model_plain.pt, samples_plain.png and .npz (for paper/fid_is.py). The data are MNIST, framed to
32x32 and downloaded to data/, or else scikit-learn's small digits. Left out: networks that grow with the images.
"""
import argparse
import copy
import math
import socket
import sys
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torchvision.datasets import MNIST
from torchvision.utils import save_image
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
    def ddim_step(self, model, xt, t, t_next, eta=0.0, clip=True, variance="beta_tilde"):
        """x_{t_next} from x_t (DDIM, Eq. 12 and 16), t and t_next < t ints. eta = 1 between neighbours is DDPM.

        variance: "beta", only with eta = 1, adds noise of variance beta_t, as DDPM may (sigma-hat in the paper).
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


def ddim_timesteps(T, S, spacing="uniform"):
    """tau_S > ... > tau_1, S distinct times in 1..T (DDIM, Appendix D.2), T always the first.

    uniform: every (T/S)-th. quadratic: tau_i = T (i/S)^2, close together near 0; times that would coincide there move
    up to the next free one. (The official code ends its quadratic times at 0.8 T and lets them repeat.)
    """
    power = {"uniform": 1, "quadratic": 2}[spacing]
    return [max(i, round(T * (i / S) ** power)) for i in range(S, 0, -1)]


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


def seconds_per_step(diffusion, images, args):
    """How long a training step takes on these images: the fastest of three runs of five."""
    model = UNet(**args.network).to(images.device, memory_format=torch.channels_last)
    clock = [time.perf_counter()]
    for _ in range(3):
        _, losses = train(diffusion, model, images, argparse.Namespace(**vars(args) | {"steps": 5}))
        if len(losses) < 5:
            fail("stopped before the race began")
        clock.append(time.perf_counter())
    return min(end - start for start, end in pairwise(clock)) / 5


def plan(steps, cost):
    """Stages [(size, steps)] that take as long as `steps` steps at full size. cost: {size: seconds per step}."""
    shares = {8: 1 / 6, 16: 1 / 3, 32: 1 / 2}
    return [(size, max(1, round(share * steps * cost[32] / cost[size]))) for size, share in shares.items()]


def race(diffusion, images_of, held_out, cost, args):
    """Trains both ways at three lengths -> {way: [(seconds, held-out loss)]}, {way: {size: EMA} of its last run}."""
    points, emas = {"plain": [], "progressive": []}, {}
    for share, way in product((0.25, 0.5, 1), points):
        steps_at_32 = max(1, round(share * args.steps))
        torch.manual_seed(args.seed)  # every run begins with the same weights
        model = UNet(**args.network).to(held_out.device, memory_format=torch.channels_last)
        emas[way], start = {}, time.perf_counter()
        for size, steps in [(32, steps_at_32)] if way == "plain" else plan(steps_at_32, cost):
            print(f"{way}: {steps} steps at {size}x{size}")
            # The weights carry over. Optimizer, warm-up, fall of the learning rate and EMA begin anew.
            stage = argparse.Namespace(**vars(args) | {"steps": steps})
            emas[way][size], losses = train(diffusion, model, images_of[size], stage)
            if len(losses) < steps:  # Ctrl-C: the race ends without a point for this run
                return points, emas
        seconds = time.perf_counter() - start
        torch.manual_seed(0)  # the same t and noise for every network
        with torch.no_grad(), autocast(held_out.device):
            loss = diffusion.loss(emas[way][32], held_out.float() / 127.5 - 1).item()
        points[way].append((seconds, loss))
        print(f"{way}: {seconds:.0f} s, held-out loss {loss:.4f}")
    return points, emas


# 7. Run -------------------------------------------------------------------------------------------------------
GPU = dict(network=dict(channels=1, widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4, samples=2000)
CPU = dict(network=dict(channels=1, widths=[32, 64, 128], blocks=1), steps=800, batch_size=32, lr=1.5e-3, samples=128)
SMOKE = dict(network=dict(channels=1, widths=[16, 16], blocks=1), steps=4, batch_size=4, T=10, samples=8, data="digits")
SETTINGS = ["steps", "batch_size", "lr", "T", "data", "seed", "samples"]  # what a model.pt remembers


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--steps", type=int, help="steps of the longest run at full size (6000 with CUDA, else 800)")
    flag("--batch-size", type=int, help="images in a training step (256 with CUDA, else 32)")
    flag("--lr", type=float, help="highest learning rate (5e-4 with CUDA, else 1.5e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--data", choices=["mnist", "digits"], default="mnist", help="mnist, or scikit-learn's small digits (mnist)")
    flag("--data-root", default="data", help="folder of MNIST (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--samples", type=int, help="images to draw with each network (2000 with CUDA, else 128)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/progressive_training; with --load or --smoke one in it)")
    flag("--load", help="a folder with model_plain.pt and model_progressive.pt: draw from them, without training")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    defaults = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {})
    networks = {}
    for way in ("plain", "progressive") if args.load else ():
        try:
            saved = torch.load(Path(args.load, f"model_{way}.pt"), map_location="cpu", weights_only=True)
            defaults |= saved["settings"] | {"network": saved["network"] | {"channels": 1}}
            networks[way] = UNet(**defaults["network"])
            networks[way].load_state_dict(saved["ema"])
        except Exception as error:
            fail(f"--load {args.load}: model_{way}.pt is none of this script ({error!r:.100})")
    parser.set_defaults(out=Path("runs/progressive_training", "loaded" if args.load else "smoke" if args.smoke else ""))
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
        (args.out / "samples_plain.png").open("ab").close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} or --out {args.out} cannot be used: {error}")
    diffusion, start = Diffusion(linear_beta(args.T), args.device), time.perf_counter()

    def draw(network, n, size):
        """n images (n, 1, size, size) uint8. The same noise at each call."""
        torch.manual_seed(args.seed)
        with autocast(args.device):
            x0 = diffusion.ddim_sample(network, (n, 1, size, size), min(50, args.T), eta=1)
        return (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()

    # Training, or loading
    if not args.load:
        images, args.data = load_images(args.data, args.data_root)
        print(f"{len(images):,} images of {args.data}; first, how long a training step takes at each size")
        torch.manual_seed(0)  # whatever the seed, no network is judged by images that it was trained on
        images = F.pad(images[torch.randperm(len(images))], (2, 2, 2, 2)).to(args.device)  # (N, 1, 32, 32)
        held_out, images = images[: len(images) // 6], images[len(images) // 6 :]
        images_of = {size: F.avg_pool2d(images.float(), 32 // size).round().byte() for size in (8, 16, 32)}
        # The plan of a --smoke does not depend on the clock.
        cost = {n: 1 if args.smoke else seconds_per_step(diffusion, images_of[n], args) for n in images_of}
        points, emas = race(diffusion, images_of, held_out[:1000], cost, args)
        networks = {way: list(of_size.values())[-1] for way, of_size in emas.items()}
        for way, network in networks.items():
            settings = {name: getattr(args, name) for name in SETTINGS}
            saved = dict(network=args.network, ema=network.state_dict(), settings=settings)
            torch.save(saved, args.out / f"model_{way}.pt")
        axes = Figure(figsize=(6, 3.5), layout="constrained").subplots()
        for (way, curve), color, style in zip(points.items(), ("#0072B2", "#D55E00"), ("o-", "s--"), strict=True):
            axes.plot([x for x, _ in curve], [y for _, y in curve], style, color=color, label=way)
        axes.set(xlabel="seconds of training", ylabel="$L_{simple}$ at 32x32, held-out images")
        axes.legend()
        axes.figure.savefig(args.out / "race.png")
        stages = [draw(network, 8, size) for size, network in emas.get("progressive", emas["plain"]).items()]
        save_image(torch.cat([F.interpolate(images / 255, size=64) for images in stages]), args.out / "stages.png")

    # Sampling
    for way, network in networks.items():
        samples = draw(network.to(args.device, memory_format=torch.channels_last), args.samples, 32)
        samples = samples[:, :, 2:30, 2:30]  # without the frame: (N, 1, 28, 28)
        np.savez(args.out / f"samples_{way}.npz", samples.permute(0, 2, 3, 1).numpy())
        save_image(F.interpolate(samples[:64] / 255, scale_factor=2), args.out / f"samples_{way}.png")
    print(f"2 x {args.samples} samples; {time.perf_counter() - start:.0f} s in all: {args.out}")


if __name__ == "__main__":
    main()

"""DDIM: the same network, a tenth of the steps.

Denoising Diffusion Implicit Models (Song et al. 2020, arXiv 2010.02502). L_simple depends on q(x_t | x_0)
alone, not on the steps from x_0 to x_t. So the network that DDPM trains serves a whole family of samplers, told apart
by eta, on any subset of the times. With eta = 0 no noise is added on the way: x_0 is a function of x_T. One can skip
steps, interpolate between images, and run the sampler backwards.

    python paper/ddim_sampling.py                                               # train, then draw
    python paper/ddim_sampling.py --load runs/ddpm_mnist/model.pt               # or with the network of ddpm_mnist.py
    python paper/fid_is.py runs/ddim_sampling/loaded/*.npz --reference mnist    # score what was drawn from it

Writes to runs/ddim_sampling/ the samples of each sampler in S steps, ddim_0050.npz say (ddpm: eta = 1 with the variance
beta_t; eta1: with beta_tilde_t; quadratic: DDIM with most of its times near 0), and steps.png, eta.png,
interpolation.png (x_T turned from one to another), inversion.png (the x_T of real images), samples.png, loss.png,
model.pt. On two CPU cores this takes eleven minutes, six of them for training. With a GPU the network is larger.
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
from torchvision.utils import save_image
from tqdm import tqdm


# 1. Forward process -------------------------------------------------------------------------------------------
def linear_beta(T=1000):
    """The linear schedule (DDPM, Section 4): (T+1,) float64, 1e-4 at t = 1 to 0.02 at t = T.

    Meant for T = 1000. With T = 100 a third of the signal's variance would survive until x_T.
    """
    beta = torch.zeros(T + 1, dtype=torch.float64)
    beta[1:] = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return beta


def at(table, t):
    """table[t], shaped (B, 1, 1, 1) to broadcast over images (B, C, H, W). t: (B,), or an int."""
    return table[t].view(-1, 1, 1, 1)


class Diffusion:
    """One noise schedule, and what DDPM (arXiv 2006.11239) does with it.

    beta: (T+1,) with beta[0] = 0. Every table has T+1 entries: t in 1..T is the paper's t, and 0 is the clean image.
    model: any callable eps_hat = model(xt, t) with xt, eps_hat (B, C, H, W) and t (B,).
    """

    def __init__(self, beta, device="cpu", dtype=torch.float32):
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)  # alphas_cumprod in other code; alpha_bar[0] = 1
        beta_tilde = torch.zeros_like(beta)  # the variance of q(x_{t-1} | x_t, x_0)
        beta_tilde[1:] = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]  # DDPM, Eq. 7
        self.T = len(beta) - 1
        # All of this is computed in float64 and rounded at the end: near t = 1, alpha_bar is close
        # to 1, and 1 - alpha_bar would lose most of its digits in float32. First to dtype, then to
        # the device: MPS has no float64.
        self.beta = beta.to(dtype).to(device)
        self.alpha = alpha.to(dtype).to(device)
        self.alpha_bar = alpha_bar.to(dtype).to(device)
        self.one_minus_alpha_bar = (1 - alpha_bar).to(dtype).to(device)
        self.beta_tilde = beta_tilde.to(dtype).to(device)

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
        """x0_hat: Eq. 4 solved for x_0, with eps_hat in place of eps (DDPM, Eq. 15)."""
        signal = at(self.alpha_bar, t).sqrt()
        noise = at(self.one_minus_alpha_bar, t).sqrt()
        return (xt - noise * eps_hat) / signal

    @torch.no_grad()
    def ddim_step(self, model, xt, t, t_next, eta=0.0, clip=True, variance="beta_tilde"):
        """x_{t_next} from x_t (DDIM, Eq. 12 and 16). t and t_next: ints, with t > t_next >= 0.

        x_{t_next} = sqrt(alpha_bar_{t_next}) x0_hat
                     + sqrt(1 - alpha_bar_{t_next} - sigma^2) eps_hat + sigma z
        sigma^2 = eta^2 beta (1 - alpha_bar_{t_next}) / (1 - alpha_bar_t)
        beta = 1 - alpha_bar_t / alpha_bar_{t_next}

        beta is the variance of the noise that the forward process adds between t_next and t. With
        eta = 0 no noise is added. With eta = 1 and t_next = t - 1 this is DDPM's step with the
        variance beta_tilde_t. variance="beta" (with eta = 1) adds noise of variance beta instead,
        the other choice of DDPM (sigma-hat in the DDIM paper).
        """
        t_batch = torch.full((len(xt),), t, device=xt.device)
        eps_hat = model(xt, t_batch)
        alpha_bar = at(self.alpha_bar, t)
        alpha_bar_next = at(self.alpha_bar, t_next)
        noise_variance = at(self.one_minus_alpha_bar, t)
        noise_variance_next = at(self.one_minus_alpha_bar, t_next)
        x0_hat = self.predict_x0(xt, t, eps_hat)
        if clip:  # eps_hat must then be the noise that leads from the clipped x0_hat to x_t
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - alpha_bar.sqrt() * x0_hat) / noise_variance.sqrt()
        beta = 1 - alpha_bar / alpha_bar_next
        sigma2 = eta**2 * beta * noise_variance_next / noise_variance
        direction = (noise_variance_next - sigma2).sqrt() * eps_hat  # "pointing to x_t"
        mean = alpha_bar_next.sqrt() * x0_hat + direction
        if eta == 0 or t_next == 0:  # the last step adds no noise
            return mean
        if variance == "beta":
            sigma2 = beta
        z = torch.randn_like(xt)
        return mean + sigma2.sqrt() * z

    @torch.no_grad()
    def ddim_sample(
        self, model, shape, S, eta=0.0, spacing="uniform", clip=True, xT=None, variance="beta_tilde"
    ):
        """x_0 in S steps, from xT if it is given, else from noise of that shape (B, C, H, W)."""
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
        """The x_T that ddim_sample, with eta = 0 and no clipping, takes to x_0 (DDIM, Section 4.3): run backwards."""
        xt = x0
        for t, t_next in tqdm(list(pairwise([0, *ddim_timesteps(self.T, S)[::-1]])), "backwards"):
            # x_{t_next} is not known yet. In its place the network sees x_t: the shorter the step, the better.
            eps_hat = model(xt, torch.full((len(xt),), t_next, device=xt.device))
            x0_hat, alpha_bar_next = self.predict_x0(xt, t, eps_hat), at(self.alpha_bar, t_next)
            xt = alpha_bar_next.sqrt() * x0_hat + (1 - alpha_bar_next).sqrt() * eps_hat
        return xt


def ddim_timesteps(T, S, spacing="uniform"):
    """tau_S > ... > tau_1: S distinct times in 1..T (DDIM, Appendix D.2).

    uniform: tau_i = T i / S. quadratic: tau_i = T (i / S)^2, which lie close together near 0; where
    two would round to the same time, one moves up to the next free one. The first is always T: the
    paper asks for one close to T, and its code's 10 uniform times begin at 901.
    """
    times = []
    for i in range(S, 0, -1):
        fraction = i / S
        if spacing == "quadratic":
            fraction = fraction**2
        tau = round(T * fraction)
        times.append(max(i, tau))  # i - 1 more times must fit in below this one
    return times


def slerp(x, y, u):
    """From x (u = 0) to y (u = 1) on the arc between them (DDIM, Eq. 67); on a straight line its norm shrinks."""
    angle = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    return (torch.sin((1 - u) * angle) * x + torch.sin(u * angle) * y) / torch.sin(angle)


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
    """Images to train on (N, 1, 28, 28) uint8, 8 others to invert, and what they are: mnist, or digits in its place."""
    if data == "mnist":
        try:
            socket.setdefaulttimeout(10)  # seconds
            images, others = (MNIST(root, train, download=True).data[:, None] for train in (True, False))
            return images, others[:8], "mnist"
        except Exception as error:
            if Path(root, "MNIST/raw/train-images-idx3-ubyte").exists():
                fail(f"{Path(root, 'MNIST')} cannot be read: delete it, and the next run downloads it again ({error})")
            print(f"\n!!! NO MNIST: {error}\n!!! In its place: scikit-learn's 1,797 digits of 8x8 pixels.\n")
    images = torch.from_numpy(load_digits().images)[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    images = (255 * F.interpolate(images, size=28, mode="bicubic").clamp(0, 1)).round().byte()
    return images[:-8], images[-8:], "digits"


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
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), fused=True)
    # The learning rate rises to nearly lr over the first 30th of the steps, then falls in a straight line to 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(30 * (i + 1), args.steps - i) / args.steps)
    losses, done = torch.full((args.steps,), math.nan, device=images.device), 0  # .item() would make each step wait
    try:
        for step in (bar := tqdm(range(args.steps), "training")):
            index = torch.randint(len(images), (args.batch_size,), device=images.device)
            with autocast(images.device):
                loss = diffusion.loss(model, images[index].float() / 127.5 - 1)  # x_0 in [-1, 1]
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
                    fail(f"the loss is {mean} after {done} steps: is the learning rate too high? Try a lower --lr")
    except KeyboardInterrupt:
        print(f"\nStopped after {done} steps: the samples show what was learned by then.")
    return ema, losses[: max(done, 1)].cpu()


# 7. Run -------------------------------------------------------------------------------------------------------
SAMPLERS = dict(ddpm=dict(eta=1, variance="beta"), eta1=dict(eta=1), ddim=dict(), quadratic=dict(spacing="quadratic"))
ETAS = {f"eta = {eta}": dict(eta=eta) for eta in (0, 0.25, 0.5, 0.75, 1)}


def compare(xT, diffusion, model, steps, samplers, seed, clip):
    """Yields S, a sampler's name, and the x_0 that it draws from x_T (N, C, H, W) in S steps, for S up to T."""
    for S in sorted({min(S, diffusion.T) for S in steps}):
        for name, options in samplers.items():
            if S < diffusion.T or name not in ("eta1", "quadratic"):  # over all steps they are much like ddpm and ddim
                torch.manual_seed(seed + 1)  # all add the same noise, but not with the seed of x_T, or it repeats x_T
                parts = [diffusion.ddim_sample(model, None, S, clip=clip, xT=part, **options) for part in xT.split(500)]
                yield S, name, torch.cat(parts)


def save_labelled(path, blocks):
    """A picture of blocks {title: {label: a row of images (N, 1, 28, 28) in [-1, 1]}} side by side."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks.items(), strict=True):
        images = F.pad(torch.stack(list(rows.values())).cpu(), [1] * 4, value=1)  # (rows, N, 1, 30, 30)
        axes.imshow(images[:, :, 0].transpose(1, 2).flatten(2).flatten(0, 1).numpy(), "gray", vmin=-1, vmax=1)
        axes.set(title=title, frame_on=False, xticks=[], yticks=range(15, 30 * len(rows), 30), yticklabels=rows)
    figure.savefig(path, dpi=150, bbox_inches="tight")


GPU = dict(network=dict(channels=1, widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4, samples=2000)
CPU = dict(network=dict(channels=1, widths=[32, 64, 128], blocks=1), steps=2800, batch_size=32, lr=1.5e-3, samples=64)
SMOKE = dict(network=dict(channels=1, widths=[16, 16], blocks=1), steps=3, batch_size=4, T=10, samples=8, data="digits")
SETTINGS = ["steps", "batch_size", "lr", "T", "data", "seed", "samples", "clip"]  # what model.pt remembers


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--steps", type=int, help="training steps (6000 with CUDA, else 2800)")
    flag("--batch-size", type=int, help="images in a training step (256 with CUDA, else 32)")
    flag("--lr", type=float, help="highest learning rate (5e-4 with CUDA, else 1.5e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--data", choices=["mnist", "digits"], default="mnist", help="mnist, or scikit-learn's small digits (mnist)")
    flag("--data-root", default="data", help="folder of MNIST (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--S", type=int, nargs="+", default=[5, 10, 20, 50, 100, 1000], help="steps to draw in (5 10 20 50 100 1000)")
    flag("--samples", type=int, help="images to draw with each sampler and S (2000 with CUDA, else 64)")
    flag("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] (yes)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/ddim_sampling; with --load or --smoke a folder in it)")
    flag("--load", help="a model.pt, of ddpm_mnist.py say: draw from it, without training")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    defaults = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {})
    if args.load:
        try:
            saved = torch.load(args.load, map_location="cpu", weights_only=True)
            assert saved["settings"].get("schedule", "linear") == "linear"  # cosine_schedule.py has another
            # Of another script's file only what training fixed. Of one of this script all, to draw the same again.
            names = SETTINGS if saved["settings"].get("script") == "ddim_sampling" else ["T", "data"]
            defaults |= {name: saved["settings"][name] for name in names}
            ema = UNet(**saved["network"] | {"channels": 1})
            ema.load_state_dict(saved["ema"])
        except Exception as error:
            fail(f"--load {args.load}: no model.pt for this script ({error!r:.100})")
    folder = "loaded" if args.load else "smoke" if args.smoke else ""
    parser.set_defaults(out=Path("runs/ddim_sampling", folder), **defaults)
    args = parser.parse_args(argv)
    if args.load and args.T != defaults["T"]:
        fail(f"--load: that network was trained with T = {defaults['T']}, not {args.T}")
    for name, least in dict(steps=1, batch_size=1, lr=1e-9, T=1, samples=8, seed=0, S=1).items():
        if not all(least <= value <= 10**7 for value in np.ravel(getattr(args, name))):
            fail(f"--{name.replace('_', '-')} must lie between {least} and 10 million, not {getattr(args, name)}")
    try:
        args.device = torch.ones(1, device=args.device).device
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "samples.png").open("ab").close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} or --out {args.out} cannot be used: {error}")

    # Training, or loading
    images, others, args.data = load_images(args.data, args.data_root)
    diffusion = Diffusion(linear_beta(args.T), args.device)
    report, start = "", time.perf_counter()
    if not args.load:
        torch.manual_seed(args.seed)
        model = UNet(**args.network).to(args.device, memory_format=torch.channels_last)
        ema, losses = train(diffusion, model, images.to(args.device), args)
        report = f"{len(losses)} steps in {time.perf_counter() - start:.0f} s, loss {losses[-50:].mean():.4f}; "
        settings = {"script": "ddim_sampling"} | {name: getattr(args, name) for name in SETTINGS}
        torch.save({"network": args.network, "ema": ema.state_dict(), "settings": settings}, args.out / "model.pt")
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.semilogy(losses.unfold(0, 1 + len(losses) // 50, 1).mean(1))
        axes.set(title=f"ddim_sampling.py on {args.data}", xlabel="step", ylabel="$L_{simple}$, running mean")
        axes.figure.savefig(args.out / "loss.png")
    ema = ema.to(args.device, memory_format=torch.channels_last)

    # Sampling
    torch.manual_seed(args.seed)  # anew, so that --load draws what the run drew
    xT = torch.randn(args.samples, 1, 28, 28, device=args.device)
    steps, etas, seconds, start = {}, {}, [], time.perf_counter()
    with autocast(args.device):
        for S, name, x0 in compare(xT, diffusion, ema, args.S, SAMPLERS, args.seed, args.clip):
            samples = (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()  # (N, 1, 28, 28)
            seconds.append(time.perf_counter() - start - sum(seconds))
            print(f"{name:9} {S:6} calls of the network {seconds[-1]:9.1f} s")
            np.savez(args.out / f"{name}_{S:04}.npz", samples.permute(0, 2, 3, 1).numpy())
            steps.setdefault(name.upper(), {})[f"S = {S}"] = x0[:8]
            if name == "ddim":  # of the most steps, in the end
                save_image(F.interpolate(samples[:64] / 255, scale_factor=2), args.out / "samples.png")
        for S, name, x0 in compare(xT[:8], diffusion, ema, (20, 100), ETAS, args.seed, args.clip):
            etas.setdefault(f"S = {S}", {})[name] = x0
        arcs = {n + 1: torch.stack([slerp(xT[n], xT[n + 4], k / 10) for k in range(11)]) for n in range(4)}
        arcs = {n: diffusion.ddim_sample(ema, None, min(50, args.T), clip=args.clip, xT=arcs[n]) for n in arcs}
        x0 = others.to(args.device) / 127.5 - 1
        found = diffusion.ddim_invert(ema, x0, min(200, args.T))
        back = diffusion.ddim_sample(ema, None, min(200, args.T), clip=False, xT=found)
    save_labelled(args.out / "steps.png", {name: steps[name] for name in ("DDPM", "DDIM")})
    save_labelled(args.out / "eta.png", etas)
    save_labelled(args.out / "interpolation.png", {"": arcs})
    save_labelled(args.out / "inversion.png", {"": {"image": x0, "its $x_T$": found, "and back": back}})
    print(f"{report}{len(seconds)} x {args.samples} samples in {sum(seconds):.0f} s: {args.out}")


if __name__ == "__main__":
    main()

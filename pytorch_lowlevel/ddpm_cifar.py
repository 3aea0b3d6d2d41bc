"""DDPM on colour images: ddpm_mnist.py, and what CIFAR-10 needs besides.

Denoising Diffusion Probabilistic Models (Ho et al. 2020, arXiv 2006.11239). Sections 1 to 3 are those of ddpm_mnist.py,
word for word. New are flips (mirrored images), torch.compile, previews, attention at a second resolution (with a GPU),
and --resume: a long run can be stopped at any moment, and on a CPU the resumed run gives the same bits as an unbroken
one. With more --steps it makes a finished run longer; the learning rate then rises once more.

    python pytorch_lowlevel/ddpm_cifar.py                                   # train, then draw
    python pytorch_lowlevel/ddpm_cifar.py --resume                          # go on with a run that was stopped
    python pytorch_lowlevel/ddpm_cifar.py --load runs/ddpm_cifar/model.pt   # draw only

Writes to runs/ddpm_cifar/: samples.png, samples.npz, loss.png and model.pt, and during the training checkpoint.pt and
preview.png. The data are CIFAR-10, downloaded to data/; where that fails, crops of scikit-learn's two photographs.

On two CPU cores this takes about ten minutes, with a small network: it learns colours and textures, hardly an object.
With a GPU it trains the lesson's network (64, 128, 256 and 512 channels) for 100,000 steps.
Left out: the network and the recipe of the paper, dropout and the variational bound; paper/ddpm_paper.py has them.
"""
import argparse
import copy
import math
import os
import signal
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
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


class AttentionBlock(ResBlock):
    """A ResBlock with attention after it."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__(c_in, c_out, d_time)
        self.attention = Attention(c_out)

    def forward(self, x, e):
        return self.attention(super().forward(x, e))


class UNet(nn.Module):
    """eps_hat = UNet(...)(xt, t): (B, C, H, W), (B,) -> (B, C, H, W).

    channels: C. widths: channels at each resolution, the finest first; each resolution is half of the one before.
    blocks: ResBlocks at each resolution but the coarsest, on the way down and on the way up.
    attention: indices into widths of the resolutions with attention; the coarsest always has it.
    """

    def __init__(self, channels, widths, blocks, attention=()):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(self.d, d_time), nn.SiLU(), nn.Linear(d_time, d_time), nn.SiLU())
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (c, c_below) in enumerate(pairwise(widths)):
            block = AttentionBlock if i in attention else ResBlock
            downsample = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_below, c, 3, padding=1))
            self.down.append(nn.ModuleList([block(c, c, d_time) for _ in range(blocks)] + [downsample]))
            self.up.insert(0, nn.ModuleList([upsample] + [block(2 * c, c, d_time) for _ in range(blocks)]))
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
    """The training images (N, 3, 32, 32) uint8, and what they are: cifar10, or photos in its place."""
    if data == "cifar10":
        try:
            socket.setdefaulttimeout(10)  # seconds
            return torch.from_numpy(CIFAR10(root, download=True).data).permute(0, 3, 1, 2), "cifar10"
        except Exception as error:
            if (folder := Path(root, CIFAR10.base_folder)).exists():
                fail(f"{folder} cannot be read: delete it, and the next run downloads it again ({error})")
            print(f"\n!!! NO CIFAR-10: {error}\n!!! In its place: crops of scikit-learn's two photographs.\n")
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)  # (2, 3, 427, 640)
    small = F.avg_pool2d(photos.float(), 2)  # (2, 3, 213, 320)
    crops = small.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 73, 32, 32)
    return crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte(), "photos"


def flip(x0):
    """Each image (B, C, H, W) is mirrored with probability 1/2: a mirrored horse is a horse."""
    return torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0.flip(3), x0)


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
    """Algorithm 1 -> the EMA of the model, and the loss of each step. resumed: the contents of a checkpoint.pt.

    Writes checkpoint.pt and preview.png to args.out on the way. Ctrl-C ends it after the step that is running.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), fused=True)  # 0.999 starts slower
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    losses, done = torch.zeros(args.steps, device=images.device), 0  # .item() would make each step wait
    if resumed:
        done = len(resumed["losses"])
        losses[:done] = resumed["losses"]
        for name, part in parts.items():
            part.load_state_dict(resumed[name])
    # The learning rate rises to nearly lr over the first 30th of the steps, then falls in a straight line to 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(30 * (i + 1), args.steps - i) / args.steps, last_epoch=done - 1
    )

    def save():
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"network": args.network, "settings": {name: getattr(args, name) for name in SETTINGS}}
        torch.save(state | {"losses": losses[:done].cpu()}, args.out / "checkpoint.part")
        os.replace(args.out / "checkpoint.part", args.out / "checkpoint.pt")  # a kill never leaves half a file

    # The first Ctrl-C lets the running step come to its end, so that --resume can go on; a second one ends at once.
    stopped, usual = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: stopped.append(signal.signal(signal.SIGINT, usual)))
    for step in (bar := tqdm(range(done, args.steps), "training", args.steps, initial=done)):
        torch.manual_seed(args.seed + 10**7 * step)  # what a step draws depends on nothing before it
        index = torch.randint(len(images), (args.batch_size,), device=images.device)
        x0 = flip(images[index].float() / 127.5 - 1)  # (B, 3, 32, 32) in [-1, 1]
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
        if done % args.save_every == 0:
            save()
        if stopped:
            print(f"\nStopped after {done} steps; --resume goes on from there.")
            break
        if done % args.preview_every == 0:
            with autocast(images.device):
                x0 = diffusion.sample(ema, (16, 3, 32, 32), variance=args.variance)
            save_image(x0, args.out / "preview.png", nrow=4, normalize=True, value_range=(-1, 1))
    save()
    signal.signal(signal.SIGINT, usual)
    return ema, losses[:done].cpu()


# 7. Run -------------------------------------------------------------------------------------------------------
GPU = dict(network=dict(channels=3, widths=[64, 128, 256, 512], blocks=2, attention=[1]), compile=True)
GPU |= dict(steps=100_000, batch_size=128, lr=2e-4, save_every=2000, preview_every=10_000)
CPU = dict(network=dict(channels=3, widths=[32, 64, 128], blocks=1), compile=False)
CPU |= dict(steps=3200, batch_size=32, lr=1.5e-3, save_every=250, preview_every=1600)
SMOKE = dict(network=dict(channels=3, widths=[16, 16, 16], blocks=1, attention=[1]), compile=False, data="photos")
SMOKE |= dict(T=10, samples=4, steps=6, batch_size=4, save_every=2, preview_every=5)
SETTINGS = ["steps", "batch_size", "lr", "T", "data", "seed", "samples", "variance"]  # what the files remember


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--steps", type=int, help="training steps (100,000 with CUDA, else 3200)")
    flag("--batch-size", type=int, help="images in a training step (128 with CUDA, else 32)")
    flag("--lr", type=float, help="highest learning rate (2e-4 with CUDA, else 1.5e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--data", choices=["cifar10", "photos"], default="cifar10", help="or crops of two photographs (cifar10)")
    flag("--data-root", default="data", help="folder of CIFAR-10 (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--samples", type=int, default=64, help="images to draw (64)")
    flag("--variance", choices=["beta", "beta_tilde"], default="beta", help="sigma_t^2 (beta)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/ddpm_cifar; with --load or --smoke a folder in it)")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--load", help="a model.pt or checkpoint.pt: draw from it, without training")
    one_of.add_argument("--resume", action="store_true", help="go on with the run in --out; --steps may be raised")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (with CUDA)")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    defaults = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {})
    parser.set_defaults(out=Path("runs/ddpm_cifar", "loaded" if args.load else "smoke" if args.smoke else ""))
    saved, how = None, "--load" if args.load else "--resume"
    if source := args.load or (args.resume and parser.parse_args(argv).out / "checkpoint.pt"):
        try:
            saved = torch.load(source, map_location="cpu", weights_only=True)
            defaults |= saved["settings"] | {"network": saved["network"] | {"channels": 3}}
            UNet(**defaults["network"]).load_state_dict(saved["ema"])
            assert args.load or "optimizer" in saved
        except Exception as error:
            fail(f"{how} {source}: no file that this script can use ({error!r:.100})")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for name in ("batch_size", "lr", "T", "data", "seed") if args.resume else ("T",) if args.load else ():
        if getattr(args, name) != saved["settings"][name]:
            fail(f"{how}: --{name.replace('_', '-')} was {saved['settings'][name]}, not {getattr(args, name)}")
    fewest = len(saved["losses"]) if args.resume else 1  # the steps that are done cannot be undone
    for name, least in dict(steps=fewest, batch_size=1, lr=1e-9, T=1, samples=1, seed=0).items():
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
    report, start = "", time.perf_counter()
    if args.load:
        model.load_state_dict(saved["ema"])
        ema = model.eval()
    else:
        images, args.data = load_images(args.data, args.data_root)
        if args.resume and args.data != saved["settings"]["data"]:
            fail(f"--resume: the run began with {saved['settings']['data']}, which is not in {args.data_root}")
        print(f"{len(images):,} images of {args.data}; {sum(p.numel() for p in model.parameters()):,} parameters")
        if args.compile:
            torch._dynamo.config.suppress_errors = True  # where there is no compiler, go on without
            model.compile()
        ema, losses = train(diffusion, model, images.to(args.device), args, saved)
        report = f"{len(losses)} steps in {time.perf_counter() - start:.0f} s, loss {losses[-50:].mean():.4f}; "
        settings = {name: getattr(args, name) for name in SETTINGS}
        torch.save({"network": args.network, "ema": ema.state_dict(), "settings": settings}, args.out / "model.pt")
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.semilogy(losses.unfold(0, 1 + len(losses) // 50, 1).mean(1))
        axes.set(title=f"ddpm_cifar.py on {args.data}", xlabel="step", ylabel="$L_{simple}$, running mean")
        axes.figure.savefig(args.out / "loss.png")

    torch.manual_seed(args.seed)  # anew, so that --load draws what the run drew
    start = time.perf_counter()
    with autocast(args.device):
        x0 = diffusion.sample(ema, (args.samples, 3, 32, 32), variance=args.variance)
    samples = (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().cpu()  # (N, 3, 32, 32)
    report += f"{args.samples} samples in {time.perf_counter() - start:.0f} s"
    np.savez(args.out / "samples.npz", samples.permute(0, 2, 3, 1).numpy())
    save_image(F.interpolate(samples / 255, scale_factor=2), args.out / "samples.png", nrow=math.isqrt(args.samples))
    print(f"{report}: {args.out}")


if __name__ == "__main__":
    main()

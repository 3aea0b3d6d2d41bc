"""DDPM on handwritten digits: the whole algorithm in one file.

Denoising Diffusion Probabilistic Models (Ho et al. 2020, arXiv 2006.11239). In T small steps the forward process
turns an image x_0 into noise x_T. A network learns to predict the noise in x_t (Algorithm 1); with its help the
sampler walks back from pure noise, x_T to x_0, and a new digit appears (Algorithm 2).

    python pytorch_lowlevel/ddpm_mnist.py

writes samples.png, denoising.png, loss.png, metrics.json and model.pt to runs/ddpm_mnist/. The data are MNIST, or,
where it cannot be downloaded, the 1,797 smaller digits that come with scikit-learn.

Measured with real MNIST on two CPU cores (AMD EPYC, bf16), where the network has 1,163,553 parameters: 2,250 steps of
32 images in 283 s, the 64 samples by 1,000 DDPM steps in 67 s, 1.0 GB of memory. README.md has the scores. What a GPU
is given, a network of 5,707,521 parameters and 6,000 steps of 256 images, has not been measured yet.

Left out: the learned variance and the variational bound; colour, flips and resuming, which digits do not need.
"""
import argparse
import copy
import http.client
import json
import math
import os
import socket
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

# torchvision, scikit-learn and matplotlib are imported where they are used, so that --help answers at once.

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


# 4. Network -----------------------------------------------------------------------------------------------


def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000 radians a step."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device) / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(c):
    """Groups of 16 channels (all in one, if fewer): over narrower groups a CPU takes several times as long."""
    return nn.GroupNorm(max(1, c // 16), c)


class ResBlock(nn.Module):
    """x (B, c_in, H, W) and the time e (B, d_time) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(d_time, c_out)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # so that the block begins as its skip, plus a constant

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention with one head: every pixel looks at every other. x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = group_norm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=2)
        out = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + out.transpose(1, 2).view(x.shape)


class UNet(nn.Module):
    """eps_hat = UNet(...)(xt, t): (B, C, H, W), (B,) -> (B, C, H, W).

    channels: C. widths: channels at each resolution, the finest first; each resolution is half the one before.
    blocks: ResBlocks at each resolution, on the way down and on the way up.
    """

    def __init__(self, channels, widths, blocks):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(self.d, d_time), nn.SiLU(), nn.Linear(d_time, d_time), nn.SiLU())
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for c, c_below in pairwise(widths):
            halve = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            double = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_below, c, 3, padding=1))
            self.down.append(nn.ModuleList([ResBlock(c, c, d_time) for _ in range(blocks)] + [halve]))
            self.up.insert(0, nn.ModuleList([double] + [ResBlock(2 * c, c, d_time) for _ in range(blocks)]))
        c = widths[-1]
        self.middle = nn.ModuleList([ResBlock(c, c, d_time), Attention(c), ResBlock(c, c, d_time)])
        self.last = nn.Sequential(group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)

    def forward(self, xt, t):
        e = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)  # (B, widths[0], H, W)
        skips = []
        for *blocks, halve in self.down:
            for block in blocks:
                h = block(h, e)
                skips.append(h)
            h = halve(h)
        block1, attention, block2 = self.middle
        h = block2(attention(block1(h, e)), e)  # (B, widths[-1], ...)
        for double, *blocks in self.up:
            h = double(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), e)
        return self.last(h).to(xt.dtype)


# 5. Data ------------------------------------------------------------------------------------------------------
SHAPE = (1, 28, 28)  # of an image
SERVER_SECONDS = 10  # a server that says nothing for so long is given up


def knock(url):
    """Raise OSError or HTTPException, unless a server answers within SERVER_SECONDS."""
    socket.setdefaulttimeout(SERVER_SECONDS)
    # Asked in a thread, because looking up the server's name knows no time limit.
    ThreadPoolExecutor(1).submit(urllib.request.urlopen, url).result(timeout=SERVER_SECONDS).close()


def load_mnist(root):
    """MNIST's training images, (60000, 1, 28, 28) uint8, downloaded to root unless they are there."""
    from torchvision.datasets import mnist

    path = Path(root) / "MNIST" / "raw" / "train-images-idx3-ubyte"
    if not path.exists():
        knock(mnist.MNIST.mirrors[0] + mnist.MNIST.resources[0][0])
        mnist.MNIST(root, download=True)
    try:
        return mnist.read_image_file(path).unsqueeze(1)
    except Exception:
        fail(f"{path} is damaged: delete it, and the next run downloads it again")


def load_small_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged: (1797, 1, 28, 28) uint8."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).unsqueeze(1) / 16  # (1797, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=28, mode="bicubic").clamp(0, 1)
    return (255 * images).round().byte()


def load_strokes():
    """What --smoke learns: the 28 diagonals, (28, 1, 28, 28) uint8."""
    return torch.stack([255 * torch.eye(28).roll(i) for i in range(28)]).unsqueeze(1).byte()


# What --data takes, and what loads it from --data-root. Where the first cannot be downloaded, the second stands in.
DATA = {
    "mnist": load_mnist,
    "digits": lambda root: load_small_digits(),
    "strokes": lambda root: load_strokes(),
}
STAND_IN = "scikit-learn's 1,797 digits of 8x8 pixels"


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


def make_optimizer(model, lr, steps):
    """AdamW, and its learning rate: up to lr over the first 30th of the steps, then in a straight line down to 0."""
    # Averages over 20 squared gradients (0.95), not 1000 (0.999): in a run of 1000s of steps they are out of date.
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(30 * (i + 1), steps - i) / steps)


def train(diffusion, model, images, args):
    """Algorithm 1 -> the EMA of the model, the loss of each step. Ctrl-C ends it and keeps what was learned."""
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, schedule = make_optimizer(model, args.lr, args.steps)
    losses, done = torch.zeros(args.steps, device=images.device), 0  # on the device: .item() would make each step wait
    stream = islice(batches(images, args.batch_size, args.seed), args.steps)
    try:
        for x0 in (bar := tqdm(stream, "training", args.steps)):
            with autocast(images.device):
                loss = diffusion.loss(model, x0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_ema(ema, model, done)
            losses[done] = loss.detach()
            done += 1
            if done % 50 == 0:
                show_loss(bar, losses[:done])
    except KeyboardInterrupt:
        print(f"\nStopped after {done} steps: the samples show what was learned by then.")
    show_loss(bar, losses[:done])
    return ema, losses[:done].cpu()


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
SETTINGS = dict(seed=0, T=1000, variance="beta", samples=64, data="auto")
GPU = dict(network=dict(channels=1, widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4)
CPU = dict(network=dict(channels=1, widths=[32, 64, 128], blocks=1), steps=2250, batch_size=32, lr=1.5e-3)
SMOKE = dict(network=dict(channels=1, widths=[8, 16], blocks=1), steps=3, batch_size=4, T=10, samples=4, data="strokes")
CPU_SECONDS = 0.125  # of a training step on two cores
FLAGS = {  # besides those of every script
    "--variance": dict(choices=["beta", "beta_tilde"], help=f"sigma_t^2 (default: {SETTINGS['variance']})"),
    "--samples": dict(type=int, help=f"images in samples.png (default: {SETTINGS['samples']})"),
}


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


def draw(diffusion, ema, args, seconds):
    """Write samples.png and denoising.png; note the time of the sampling in `seconds`."""
    torch.manual_seed(args.seed)  # again, so that --load draws what the run drew
    keep = {round(args.T * k / 10): None for k in range(10, -1, -1)}
    start = time.perf_counter()
    with autocast(diffusion.beta.device):
        samples = diffusion.sample(ema, (args.samples, *SHAPE), variance=args.variance, keep=keep).cpu()
        seconds["sampling"] = time.perf_counter() - start
        write_grid(args.out / "samples.png", samples, math.ceil(math.sqrt(args.samples)))
        write_denoising(args.out / "denoising.png", diffusion, ema, keep)


def main(argv=None):
    args = parse_arguments(argv)
    device = find_device(args.device)
    args.device = device.type
    loaded, ema = load_checkpoint(args.load) if args.load else ({}, None)
    fill_defaults(args, device, loaded)
    diffusion = Diffusion(linear_beta(args.T), device)
    hardware = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    metrics = {"settings": vars(args), "hardware": hardware, "torch": torch.__version__, "seconds": {}}
    if not args.load:
        images, args.data = load_images(args.data, args.data_root)
        if args.batch_size > len(images):
            fail(f"--batch-size {args.batch_size} is more than the {len(images)} images of {args.data}")
        torch.manual_seed(args.seed)
        model = UNet(**args.network).to(device, memory_format=torch.channels_last)
        if device.type != "cuda" and not args.smoke:
            minutes = args.steps * args.batch_size / CPU["batch_size"] * CPU_SECONDS / 60
            print(f"The small network for CPUs: about {math.ceil(minutes)} minutes of training on two cores with bf16.")
        start = time.perf_counter()
        ema, losses = train(diffusion, model, images.to(device), args)
        metrics["seconds"]["training"] = time.perf_counter() - start
        metrics |= {"steps_done": len(losses), "loss": losses[-100:].mean().item()}
        state = {"settings": settings_of(args), "model": model.state_dict(), "ema": ema.state_dict()}
        write(args.out / "model.pt", lambda temporary: torch.save(state, temporary))
        write_loss(args.out / "loss.png", losses, f"ddpm_mnist on {args.data}")
    draw(diffusion, ema.to(device, memory_format=torch.channels_last), args, metrics["seconds"])
    write(args.out / "metrics.json", lambda temporary: temporary.write_text(json.dumps(metrics, default=str, indent=2)))


if __name__ == "__main__":
    main()

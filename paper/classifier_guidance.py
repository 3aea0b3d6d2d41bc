"""Classifier guidance: a second network, which knows noisy digits, steers the first.

Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol 2021, arXiv 2105.05233), Section 4. The diffusion
model knows nothing of labels. A classifier is trained on noisy images x_t of every t; the gradient of its
log p(y | x_t) says how x_t must change to look more like class y. The sampler subtracts this
gradient, times s sqrt(1 - alpha_bar_t), from eps_hat.

    python paper/classifier_guidance.py         # with --load runs/ddpm_mnist/model.pt it trains the classifier alone
    python paper/fid_is.py runs/classifier_guidance/*.npz runs/classifier_free_guidance/*.npz --plot

Writes to runs/classifier_guidance/: accuracy.png (of the classifier, over t: where it knows nothing, it cannot guide),
guidance.png (a row for each class, a block for each s, all from one x_T), s_0.npz ... (samples and labels for each s),
samples.png (s near 2), loss.png and model.pt. This takes two CPU cores seven minutes. Left out: the DDPM sampler.
"""
import argparse
import copy
import math
import socket
import sys
import time
from functools import partial
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


def classifier_loss(diffusion, classifier, x0, y):
    """The cross-entropy of the classifier on x_t, t ~ U{1..T}: it must know noisy images, for it will guide them."""
    t = torch.randint(1, diffusion.T + 1, (len(x0),), device=x0.device)
    return F.cross_entropy(classifier(diffusion.q_sample(x0, t, torch.randn_like(x0)), t), y)


def class_gradient(classifier, xt, t, y):
    """The gradient over x_t of log p(y | x_t): (B, C, H, W). classifier: callable logits = classifier(xt, t)."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = classifier(xt, t).log_softmax(1).gather(1, y[:, None]).sum()  # image by image: none sees another
        return torch.autograd.grad(log_p, xt)[0]


def classifier_eps(diffusion, model, classifier, xt, t, y, s):
    """eps_hat - s sqrt(1 - alpha_bar_t) grad log p(y | x_t) (Dhariwal & Nichol, Algorithm 2): (B, C, H, W).

    With s = 1 and a perfect classifier this is, by Bayes' rule, the eps_hat of a model that was given y.
    """
    eps_hat = model(xt, t)
    if s == 0:
        return eps_hat
    return eps_hat - s * (1 - at(diffusion.alpha_bar, t)).sqrt() * class_gradient(classifier, xt, t, y)


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


class NoisyClassifier(nn.Module):
    """logits = NoisyClassifier(...)(xt, t): (B, C, H, W), (B,) -> (B, classes). A UNet without its way up."""

    def __init__(self, channels, widths, classes):
        super().__init__()
        self.d, d_time = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(self.d, d_time), nn.SiLU(), nn.Linear(d_time, d_time), nn.SiLU())
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for c, c_below in pairwise(widths):
            self.down.append(nn.ModuleList([ResBlock(c, c, d_time), nn.Conv2d(c, c_below, 3, stride=2, padding=1)]))
        self.block, self.attention = ResBlock(widths[-1], widths[-1], d_time), Attention(widths[-1])
        last = nn.GroupNorm(widths[-1] // 16, widths[-1]), nn.SiLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        self.head = nn.Sequential(*last, nn.Linear(4 * 4 * widths[-1], classes))

    def forward(self, xt, t):
        e = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)
        for block, downsample in self.down:
            h = downsample(block(h, e))
        return self.head(self.attention(self.block(h, e))).to(xt.dtype)


# 5. Data ------------------------------------------------------------------------------------------------------
def load_images(data, root):
    """The training images (N, 1, 28, 28) uint8, their labels (N,), and what they are: mnist, or digits instead."""
    if data == "mnist":
        on_disk = Path(root, "MNIST/raw/train-images-idx3-ubyte").exists()
        try:
            socket.setdefaulttimeout(10)  # seconds
            mnist = MNIST(root, download=True)
            assert len(mnist.data) == len(mnist.targets), "not as many labels as images"
            return mnist.data[:, None], mnist.targets, "mnist"
        except Exception as error:
            if on_disk:
                fail(f"{Path(root, 'MNIST')} cannot be read: delete it, and the next run downloads it again ({error})")
            print(f"\n!!! NO MNIST: {error}\n!!! In its place: scikit-learn's 1,797 digits of 8x8 pixels.\n")
    digits = load_digits()
    images = F.interpolate(torch.from_numpy(digits.images)[:, None] / 16, size=28, mode="bicubic").clamp(0, 1)
    return (255 * images).round().byte(), torch.from_numpy(digits.target), "digits"


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


def train(network, loss_of, images, labels, steps, batch_size, lr):
    """Minimise loss_of(network, x0, y) -> the network's EMA, the loss of each step. Ctrl-C keeps what was learned."""
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(30 * (i + 1), steps - i) / steps)
    losses, done = torch.full((steps,), math.nan, device=images.device), 0  # .item() would make each step wait
    try:
        for step in (bar := tqdm(range(steps), f"training {type(network).__name__}")):
            index = torch.randint(len(images), (batch_size,), device=images.device)
            with autocast(images.device):
                loss = loss_of(network, images[index].float() / 127.5 - 1, labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            update_ema(ema, network, step)
            losses[step], done = loss.detach(), step + 1
            if done % 50 == 0 or done == steps:
                mean = losses[max(0, done - 50) : done].mean().item()
                bar.set_postfix(loss=f"{mean:.4f}")
                if not math.isfinite(mean):
                    fail(f"the loss is {mean} after {done} steps: is the learning rate too high? Try a lower --lr")
    except KeyboardInterrupt:
        print(f"\nStopped after {done} steps: the samples show what was learned by then.")
    return ema, losses[: max(done, 1)]


def accuracy_by_t(diffusion, classifier, images, labels):
    """The share of images that the classifier recognises in x_t, in 20 equal bands of t (fewer if T is small)."""
    t = 1 + torch.arange(len(images), device=images.device) * diffusion.T // len(images)  # evenly over 1..T
    xt = diffusion.q_sample(images.float() / 127.5 - 1, t, torch.randn(images.shape, device=images.device))
    logits = torch.cat([classifier(*part) for part in zip(xt.split(250), t.split(250), strict=True)])
    return torch.stack([band.mean() for band in (logits.argmax(1) == labels).float().chunk(min(20, diffusion.T))])


# 7. Run -------------------------------------------------------------------------------------------------------
GPU = dict(network=dict(channels=1, widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4, samples=2000)
CPU = dict(network=dict(channels=1, widths=[32, 64, 128], blocks=1), steps=1600, batch_size=32, lr=1.5e-3, samples=200)
SMOKE = dict(network=CPU["network"] | dict(widths=[16, 16]), steps=3, batch_size=4, T=10, samples=20, data="digits")
SETTINGS = ["steps", "batch_size", "lr", "T", "data", "seed", "samples", "s", "clip"]  # kept in model.pt


def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line: a flag counts before the settings in a loaded file, and these before the device's defaults.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--steps", type=int, help="training steps of the UNet (6000 with CUDA, else 1600); the classifier has 1200")
    flag("--batch-size", type=int, help="images in a training step (256 with CUDA, else 32)")
    flag("--lr", type=float, help="highest learning rate (5e-4 with CUDA, else 1.5e-3)")
    flag("--T", type=int, default=1000, help="diffusion steps (1000)")
    flag("--data", choices=["mnist", "digits"], default="mnist", help="mnist, or scikit-learn's small digits (mnist)")
    flag("--data-root", default="data", help="folder of MNIST (data)")
    flag("--seed", type=int, default=0, help="of all random numbers (0)")
    flag("--s", type=float, nargs="+", default=[0, 1, 2, 4, 8], help="strengths of the guidance (0 1 2 4 8)")
    flag("--samples", type=int, help="images to draw for each s (2000 with CUDA, else 200)")
    flag("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] (yes)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, help="folder for the files (runs/classifier_guidance, or a folder in it)")
    flag("--load", help="a model.pt of this script or of ddpm_mnist.py: that network is not trained again")
    flag("--smoke", action="store_true", help="a few steps of a tiny network: does everything work?")
    args = parser.parse_args(argv)
    defaults, saved = (GPU if args.device.startswith("cuda") else CPU) | (SMOKE if args.smoke else {}), {}
    if args.load:
        try:
            saved = torch.load(args.load, map_location="cpu", weights_only=True)
            names = SETTINGS if "classifier" in saved else ["steps", "T", "data"]  # another script's: how it trained
            defaults |= {"network": saved["network"] | {"channels": 1}, **{k: saved["settings"][k] for k in names}}
            UNet(**defaults["network"]).load_state_dict(saved["ema"])
            assert saved["settings"].get("schedule", "linear") == "linear"
        except Exception as error:
            fail(f"--load {args.load}: no model.pt for this script ({error!r:.100})")
    parser.set_defaults(out=Path("runs/classifier_guidance", "loaded" if args.load else "smoke" * args.smoke))
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.load and args.T != defaults["T"]:
        fail(f"--load: that network was trained with T = {defaults['T']}, not {args.T}")
    for name, least in dict(steps=1, batch_size=1, lr=1e-9, T=1, samples=10, seed=0, s=-1000).items():
        if not all(least <= value <= 10**7 for value in np.ravel(getattr(args, name))):
            fail(f"--{name.replace('_', '-')} must lie between {least} and 10 million, not {getattr(args, name)}")
    try:
        args.device = torch.ones(1, device=args.device).device
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "samples.png").open("ab").close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} or --out {args.out} cannot be used: {error}")

    # Training, or loading: the diffusion model, then the noisy classifier
    diffusion = Diffusion(linear_beta(args.T), args.device)
    torch.manual_seed(args.seed)
    networks = {"ema": UNet(**args.network), "classifier": NoisyClassifier(1, args.network["widths"], 10)}
    loss_of = {"ema": lambda model, x0, y: diffusion.loss(model, x0), "classifier": partial(classifier_loss, diffusion)}
    recipe = {"ema": (args.steps, args.batch_size, args.lr), "classifier": (3 if args.smoke else 1200, 64, 1e-3)}
    report, axes = "", Figure(figsize=(7, 3.5), layout="constrained").subplots()
    if "classifier" not in saved:
        images, labels, args.data = load_images(args.data, args.data_root)
        images, labels, n = images.to(args.device), labels.to(args.device), len(images) // 6  # n are held out
    for name, network in networks.items():
        network, start = network.to(args.device, memory_format=torch.channels_last), time.perf_counter()
        if name in saved:
            network.load_state_dict(saved[name])
        else:
            networks[name], losses = train(network, loss_of[name], images[n:], labels[n:], *recipe[name])
            axes.semilogy(losses.unfold(0, 1 + len(losses) // 50, 1).mean(1).cpu(), label=type(network).__name__)
            report += f"{len(losses)} steps in {time.perf_counter() - start:.0f} s, loss {losses[-50:].mean():.4f}; "
    if "classifier" not in saved:
        axes.set(xlabel="step", ylabel="loss, running mean")
        axes.legend()
        axes.figure.savefig(args.out / "loss.png")
        state = {"network": args.network, "settings": {name: getattr(args, name) for name in SETTINGS}}
        torch.save(state | {name: network.state_dict() for name, network in networks.items()}, args.out / "model.pt")
        accuracy = accuracy_by_t(diffusion, networks["classifier"], images[:n], labels[:n]).cpu()
        axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
        axes.plot((torch.arange(len(accuracy)) + 0.5) * args.T / len(accuracy), accuracy)
        axes.set(title="accuracy on $x_t$ of held-out images (a guess: 0.1)", xlabel="t", ylim=(0, 1.02))
        axes.figure.savefig(args.out / "accuracy.png")

    # Sampling: labels 0, 1, ..., 9, 0, 1, ..., and for every s the same x_T
    y, start = torch.arange(args.samples, device=args.device) % 10, time.perf_counter()
    draw = partial(diffusion.ddim_sample, S=min(50, args.T), clip=args.clip)
    figure, columns = Figure(figsize=(2.3 * len(args.s) + 0.5, 6), layout="constrained"), min(4, args.samples // 10)
    for s, axes in zip(args.s, figure.subplots(1, len(args.s), squeeze=False)[0], strict=True):
        print(f"s = {s:g}: {args.samples} samples, at most 500 at a time")
        torch.manual_seed(args.seed)
        eps_of = partial(classifier_eps, diffusion, *networks.values(), s=s)
        with autocast(args.device):
            parts = [draw(partial(eps_of, y=part), (len(part), 1, 28, 28)) for part in y.split(500)]
        samples = (127.5 * (torch.cat(parts).clamp(-1, 1) + 1)).round().byte().cpu()  # (N, 1, 28, 28)
        np.savez(args.out / f"s_{s:g}.npz", samples.permute(0, 2, 3, 1).numpy(), y.cpu().numpy())
        rows = [samples[y.cpu() == label][:columns] for label in range(10)]
        axes.imshow(make_grid(torch.cat(rows), columns).permute(1, 2, 0))  # an image every 30 pixels
        axes.set(title=f"s = {s:g}", xticks=[], yticks=range(16, 300, 30), yticklabels=range(10))
        if s == min(args.s, key=lambda s: abs(s - 2)):
            save_image(F.interpolate(samples[:100] / 255, scale_factor=2), args.out / "samples.png", nrow=10)
    figure.savefig(args.out / "guidance.png")
    print(f"{report}{args.samples} samples for each s in {time.perf_counter() - start:.0f} s: {args.out}")


if __name__ == "__main__":
    main()

"""DDPM on colour images: CIFAR-10, or a folder of your own images. Read ddpm_mnist.py first.

Denoising Diffusion Probabilistic Models (Ho et al. 2020, arXiv 2006.11239). Sections 1 to 3 are
identical to those of ddpm_mnist.py. This script adds random flips, attention at a second resolution
(with a GPU), torch.compile, your own images as data, and --resume, which continues a stopped run
from its last checkpoint. On a CPU, the result has the same bits as that of a run without a break.
With a larger --steps, --resume extends a finished run; the learning rate then rises again.

    python pytorch_lowlevel/ddpm_cifar.py                         # train, then generate
    python pytorch_lowlevel/ddpm_cifar.py --resume                # continue a run that was stopped
    python pytorch_lowlevel/ddpm_cifar.py --data FOLDER --no-flip  # your own images, not mirrored
    python pytorch_lowlevel/ddpm_cifar.py --load assets/ddpm_cifar.pt  # generate without training

Writes to runs/ddpm_cifar/: samples.png, samples.npz, loss.png and model.pt, and during training
checkpoint.pt and preview.png. If CIFAR-10 cannot be downloaded, it uses crops of two photographs.

On two CPU cores the default run takes about ten minutes. Its small network learns colours and
textures, but barely any objects. With a GPU, the lesson's network gets 100,000 training steps.
"""
import argparse
import copy
import io
import math
import os
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import pil_to_tensor
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


# 4. Network -----------------------------------------------------------------------------------
def time_embedding(t, d):
    """t (B,) -> (B, d): sin and cos of t at d/2 frequencies, from 1 down to 1/10000.

    The fast waves tell neighbouring t apart, the slow ones early from late.
    """
    k = torch.arange(d // 2, device=t.device)
    frequency = 10_000 ** (-k / (d // 2 - 1))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """x (B, c_in, H, W), time_emb (B, d_time), made from t by UNet -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        # 16 channels per group, because on CPUs GroupNorm is slow with smaller groups.
        self.norm1 = nn.GroupNorm(c_in // 16, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(d_time, c_out)
        self.norm2 = nn.GroupNorm(c_out // 16, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        # With these zeros, the untrained block is its skip path plus a constant (conv2's bias). A
        # deep stack then passes signals forward and gradients backward unhindered, and training is
        # stable.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, time_emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time_emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(c // 16, c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)  # for the same reason as in ResBlock

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        # A dimension for the single head, because PyTorch's fused kernels need 4-d tensors.
        qkv = self.qkv(pixels).unsqueeze(1)  # (B, 1, HW, 3C)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B, HW, C)
        out = self.out(out)
        return x + out.transpose(1, 2).reshape(x.shape)


class AttentionBlock(ResBlock):
    """A ResBlock, followed by attention."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__(c_in, c_out, d_time)
        self.attention = Attention(c_out)

    def forward(self, x, time_emb):
        h = super().forward(x, time_emb)
        return self.attention(h)


class UNet(nn.Module):
    """The network: eps_hat = unet(xt, t), with xt and eps_hat (B, C, H, W) and t (B,).

    channels: C. widths: the number of channels at each resolution, finest first. Every resolution
    after the first halves H and W, so both must be divisible by 2 ** (len(widths) - 1).
    blocks: how many ResBlocks each resolution but the coarsest has, on each side of the U.
    attention: which of these resolutions have attention, as indices into widths: [1] is the second
    finest. The coarsest resolution always has it.
    """

    def __init__(self, channels, widths, blocks, attention=()):
        super().__init__()
        d_time = 4 * widths[0]
        self.d = widths[0]  # how many sines and cosines of t
        self.time = nn.Sequential(
            nn.Linear(self.d, d_time),
            nn.SiLU(),
            nn.Linear(d_time, d_time),
            nn.SiLU()  # here once, and not in every ResBlock before its own Linear
        )
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()  # at each resolution: blocks, then the downsampling
        self.up = nn.ModuleList()  # from the coarsest: the upsampling, then blocks
        for i, (c, c_below) in enumerate(pairwise(widths)):
            block = AttentionBlock if i in attention else ResBlock
            downsample = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            level = [block(c, c, d_time) for _ in range(blocks)] + [downsample]
            self.down.append(nn.ModuleList(level))
            upsample = nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(c_below, c, 3, padding=1)
            )
            # 2 * c channels: the features so far, and the output of a block on the way down
            level = [upsample] + [block(2 * c, c, d_time) for _ in range(blocks)]
            self.up.insert(0, nn.ModuleList(level))
        c = widths[-1]
        self.middle = nn.ModuleList([ResBlock(c, c, d_time), Attention(c), ResBlock(c, c, d_time)])
        self.last = nn.Sequential(
            nn.GroupNorm(widths[0] // 16, widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], channels, 3, padding=1)
        )
        nn.init.zeros_(self.last[2].weight)  # at first, eps_hat is the same for every image

    def forward(self, xt, t):
        time_emb = self.time(time_embedding(t, self.d))  # (B, d_time)
        h = self.first(xt)  # (B, widths[0], H, W)
        skips = []
        for level in self.down:
            *res_blocks, downsample = level
            for block in res_blocks:
                h = block(h, time_emb)
                skips.append(h)
            h = downsample(h)
        block1, attention, block2 = self.middle  # at the coarsest resolution
        h = block1(h, time_emb)
        h = attention(h)
        h = block2(h, time_emb)
        for level in self.up:
            upsample, *res_blocks = level
            h = upsample(h)
            for block in res_blocks:
                h = torch.cat([h, skips.pop()], dim=1)
                h = block(h, time_emb)
        return self.last(h).to(xt.dtype)  # under autocast, the convolution returns bf16


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


def square_image(path):
    """An image file as (3, 32, 32) uint8: cropped to the largest central square, then resized."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)  # turned upright, as the camera was held
    if image.mode.startswith("I"):  # 16 bits per pixel: convert() would make all above 255 white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")  # transparent parts become white
    return pil_to_tensor(ImageOps.fit(image, (32, 32)))


def load_folder(folder):
    """The images in a folder and its subfolders, in alphabetical order: (N, 3, 32, 32) uint8."""
    if not folder.is_dir():
        sys.exit(f"--data {folder}: there is no such folder (nor a data set of that name)")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES)
    if not paths:
        sys.exit(f"--data {folder}: no image in this folder ({' '.join(IMAGE_FILES)})")
    images = []
    for path in tqdm(paths, "reading images"):
        try:
            images.append(square_image(path))
        except Exception as error:
            sys.exit(f"--data {folder}: {path} cannot be read: {error}")
    return torch.stack(images)


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


def lr_factor(step, steps):
    """The learning rate as a fraction of --lr: a short warm-up, then a straight line to 0.

    Adam's first estimates of the gradient's magnitude are poor, so the first updates must be small.
    Towards the end, smaller and smaller updates average out the noise of the batches.
    """
    warm_up = 30 * (step + 1) / steps  # reaches cool_down after about a thirtieth of training
    cool_down = 1 - step / steps
    return min(warm_up, cool_down)


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


def train_resumable(diffusion, model, images, args):
    """Algorithm 1, with checkpoints. Returns the EMA of the model, and the losses (steps,).

    The random numbers of a training step depend only on args.seed and on the number of that step.
    Therefore a run that continues from a checkpoint repeats the unbroken run exactly. Ctrl-C stops
    early. images: (N, 3, 32, 32) uint8, on the model's device.
    """
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # As in ddpm_mnist.py: the usual 0.999 is too slow for a run of a few thousand training steps.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    losses = []
    if args.checkpoint:
        model.load_state_dict(args.checkpoint["model"])
        ema.load_state_dict(args.checkpoint["ema"])
        optimizer.load_state_dict(args.checkpoint["optimizer"])
        losses = list(args.checkpoint["losses"].to(images.device))
    done = len(losses)
    try:
        with tqdm(range(done, args.steps), "training", args.steps, initial=done) as bar:
            for step in bar:
                seed_everything(args.seed, step)
                optimizer.param_groups[0]["lr"] = args.lr * lr_factor(step, args.steps)
                # No epochs: each training step draws a batch x_0 ~ q(x_0), the data distribution.
                index = torch.randint(len(images), (args.batch_size,), device=images.device)
                x0 = images[index].float() / 127.5 - 1  # from 0-255 to [-1, 1]
                if args.flip:
                    x0 = flip(x0)
                with autocast(images.device):
                    loss = diffusion.loss(model, x0)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # for rare extreme batches
                optimizer.step()
                update_ema(ema, model, step)
                losses.append(loss.detach())  # .item() here would make every step wait for the GPU
                done = step + 1
                save_now = done % args.save_every == 0 or done == args.steps
                if save_now or done % 50 == 0:
                    mean = torch.stack(losses[-50:]).mean().item()
                    bar.set_postfix(loss=f"{mean:.4f}")
                    if not math.isfinite(mean):
                        sys.exit(f"The loss is {mean} after {done} steps. Try a lower --lr.")
                if done % args.preview_every == 0:
                    with autocast(images.device):
                        x0 = diffusion.sample(ema, (16, 3, 32, 32), variance=args.variance)
                    with new_files(args.out) as folder:
                        save_grid(to_bytes(x0), folder / "preview.png")
                # After the preview, because a run that is killed in between makes it again.
                if save_now:
                    save_checkpoint(model, ema, optimizer, losses, args)
    except KeyboardInterrupt:
        if not losses:
            sys.exit("Stopped before the first training step was complete.")
        print(
            f"Stopped after {len(losses)} training steps. Going on with what has been learned.\n"
            f"A checkpoint is saved every {args.save_every} steps. --resume goes on from the last."
        )
    return ema, torch.stack(losses).cpu()


# 7. Run ---------------------------------------------------------------------------------------
CPU = dict(
    unet=dict(channels=3, widths=[32, 64, 128], blocks=1, attention=[]),
    steps=3200,  # ten minutes on two cores
    batch_size=32,  # as in ddpm_mnist.py: many updates matter more than precise ones
    lr=1.5e-3,
    T=1000,
    samples=64,
    variance="beta",
    data="cifar10",
    data_root="data",
    flip=True,
    compile=False,  # compiling pays off in long runs only
    save_every=500,  # training steps from one checkpoint to the next, which take 90 seconds
    preview_every=2000,  # a preview takes half a minute
    resume=False,
    seed=0
)
GPU = CPU | dict(  # informed guesses: these scripts have not yet been run on a GPU
    unet=dict(channels=3, widths=[64, 128, 256, 512], blocks=2, attention=[1]),  # as in lesson 33
    steps=100_000,
    batch_size=128,  # the paper's batch size and learning rate
    lr=2e-4,
    compile=True,
    save_every=2000,
    preview_every=10_000
)
SMOKE = dict(  # a quick self-test: the samples are noise
    unet=dict(channels=3, widths=[16, 16, 16], blocks=1, attention=[1]),
    steps=6,
    T=10,
    data="photos",
    compile=False,
    save_every=2,
    preview_every=5
)
# Saved in model.pt, so that load_model can refuse a network that was trained for another task.
TASK = "32x32 colour images with the linear schedule"
TRAINING_FLAGS = ["steps", "batch_size", "lr", "T", "data", "flip", "compile", "resume"]
# With --resume, the settings in FIXED cannot change. Those in KEPT change if a flag says so.
FIXED = ["T", "batch_size", "lr", "data", "flip", "seed"]
KEPT = ["steps", "samples", "variance", "data_root", "save_every", "preview_every"]
IMAGE_FILES = ".png .jpg .jpeg .bmp .webp .gif .tif .tiff".split()


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
        epilog=f"defaults on a CPU: {CPU}\n\ndefaults with CUDA: {GPU}"
    )
    add_common_flags(parser)
    flag = parser.add_argument
    flag("--data", type=os.path.normpath, help="cifar10, photos (no download) or your own folder")
    flag("--variance", choices=["beta", "beta_tilde"], help="sigma_t^2 in sampling")
    flag("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for training")
    flag("--resume", action="store_true", help="continue the run in --out")
    args = merge_settings(parser, argv)
    args.checkpoint = None
    if args.resume:
        args.checkpoint = load_checkpoint(args.out / "checkpoint.pt")
        take_over_settings(parser, args)
    return args


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


def save_model(ema, args, data, path):
    """Save what --load needs, and some facts about the training."""
    settings = dict(task=TASK, T=args.T, steps=args.steps, data=data)
    # In memory first, because torch.save reports a full disk as a RuntimeError, and new_files only
    # expects an OSError.
    buffer = io.BytesIO()
    torch.save(dict(network=args.unet, ema=ema.state_dict(), settings=settings), buffer)
    path.write_bytes(buffer.getvalue())


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


def load_model(path):
    """The network in a model.pt, with its averaged weights, and the T that it was trained with.

    A model.pt from another script works too if its network and its task are the same.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        unet = saved["network"]  # the arguments of UNet
        settings = saved["settings"]
        T = settings["T"]
    except OSError as error:
        sys.exit(f"--load {path}: {error.strerror}")
    except Exception as error:  # torch.load's own message would suggest weights_only=False
        sys.exit(f"--load {path}: empty, damaged or not a model.pt ({type(error).__name__})")
    # The file's UNet and ours must take the same arguments: ^ gives the names that only one of them
    # has. ("attention" does not count, because it is optional where it exists, in ddpm_cifar.py.)
    other_arguments = (unet.keys() ^ CPU["unet"].keys()) - {"attention"}
    if other_arguments or unet["channels"] != CPU["unet"]["channels"]:
        sys.exit(f"--load {path}: its network is of a different kind from the UNet in this script")
    if settings.get("task", TASK) != TASK:  # early files name no task
        sys.exit(f"--load {path}: trained for {settings['task']}, but this script is for {TASK}")
    model = UNet(**unet)
    model.load_state_dict(saved["ema"])
    return model.eval(), T


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


def main(argv=None):
    args = parse_args(argv)
    with new_files(args.out):
        pass  # if the folder cannot be written to, stop now and not after the training
    torch.manual_seed(args.seed)
    if args.load:
        model, args.T = load_model(args.load)
    else:
        model = UNet(**args.unet)
    model = model.to(args.device, memory_format=torch.channels_last)  # faster convolutions
    diffusion = Diffusion(linear_beta(args.T), args.device)
    report = ""

    if not args.load:
        if args.data in ["cifar10", "photos"]:
            images, args.data = load_images(args.data, args.data_root)
        else:
            images = load_folder(Path(args.data))
        print(f"{len(images):,} images ({args.data})")
        if args.resume and len(images) != args.image_count:
            sys.exit(f"--resume: the run in {args.out} began with {args.image_count:,} images")
        args.image_count = len(images)
        if args.compile:
            torch._dynamo.config.suppress_errors = True  # without a compiler, train uncompiled
            model.compile()
        began = time.perf_counter()
        # From here on, `model` is the averaged model (EMA).
        model, losses = train_resumable(diffusion, model, images.to(args.device), args)
        args.steps = len(losses)  # fewer than asked for, after Ctrl-C
        report = f"{args.steps} training steps in {time.perf_counter() - began:.0f} s, "
        report += f"loss {losses[-50:].mean():.4f}; "
        with new_files(args.out) as folder:
            save_model(model, args, args.data, folder / "model.pt")
            plot_loss(losses, folder / "loss.png")

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

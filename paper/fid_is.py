"""FID and Inception Score, written out, and with them what a score needs to be trusted.

FID: Heusel et al. 2017, arXiv 1706.08500. Inception Score: Salimans et al. 2016, arXiv 1606.03498. Both look at images
through a network trained to classify. FID treats the features of the samples and those of real images as two Gaussians,
and measures the distance between them; IS asks whether each image is clearly of one class, and all of them of many.

    python paper/fid_is.py                                              # trains a small model and scores it
    python paper/fid_is.py --samples runs/ddpm_mnist/model.pt           # or scores what another script has trained
    python paper/fid_is.py --samples FOLDER --reference cifar10 --features inception

--samples: a folder of images, an .npz file (N, H, W, C), or a model.pt of ddpm_mnist.py, ddpm_cifar.py or this script.
--reference: mnist, cifar10, digits, photos, a folder or an .npz file. --features: `inception` is the network behind all
published numbers (torch-fidelity's copy, 91 MB, downloaded once); `classifier` is trained here in a minute on the
reference's labels, for digits, of which Inception knows nothing, and for work without a network. Scores by different
features cannot be compared.

Beside each score stand its known answers: the score of real images against other real images (the floor: no model can
do better at this number of samples), and the score of a half, a quarter, an eighth of the samples, which shows the
bias: FID falls as their number grows. Published FIDs are those of 50,000 samples. All this goes to metrics.json and
fid.png in runs/fid_is/; samples.png and loss.png are written too where a model is sampled or trained.

Measured with real MNIST on two CPU cores (AMD EPYC, bf16): 1,500 steps of 32 images in 178 s, twice 1,000 samples by 50
steps with eta = 1 in 120 s, all in 340 s. Features of the classifier, 1,000 images each:

                   FID   of 500   Inception Score
    EMA           25.3     27.4   6.13 +- 0.20
    raw weights   27.2     29.1   6.04 +- 0.18
    real images   0.84      3.3   9.58 +- 0.02

Left out: KID, precision and recall; torch-fidelity has them.
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

# torchvision, torch_fidelity and others are imported where they are used, so that --help answers at once.

# The scores ---------------------------------------------------------------------------------------------------


def frechet_distance(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)): the distance of two Gaussians (Heusel et al. 2017). -> float

    mu (D,) and S (D, D), float64. The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real
    numbers whatever the rounding, where a square root of S1 S2 can turn complex.
    """
    roots = []
    for S in (S1, S2):
        values, vectors = torch.linalg.eigh(S)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * overlap).item()


def fid(features1, features2):
    """The Fréchet distance of two sets of features (N, D), each taken for a Gaussian. -> float"""
    mu_S = [(features.double().mean(0), features.double().T.cov()) for features in (features1, features2)]
    return frechet_distance(*mu_S[0], *mu_S[1])


class Moments:
    """Mean and covariance of features that come in batches: the memory does not grow with their number."""

    def __init__(self, d):
        self.n, self.mean, self.scatter = 0, torch.zeros(d).double(), torch.zeros(d, d).double()

    def update(self, features):
        """Take in features (B, d)."""
        mean = features.double().mean(0)
        centred = features.double() - mean
        self.merge(len(features), mean, centred.T @ centred)

    def merge(self, n, mean, scatter):
        """Take in n features of that mean and that sum of squares around it (Chan et al. 1979)."""
        delta, total = mean - self.mean, self.n + n
        self.scatter = self.scatter + scatter + delta.outer(delta) * self.n * n / total
        self.mean, self.n = self.mean + delta * n / total, total

    def gaussian(self):
        """Mean (d,) and covariance (d, d)."""
        return self.mean, self.scatter / (self.n - 1)


class Splits:
    """Sums for the Inception Score over images that come in batches, each image in one of several splits."""

    def __init__(self, splits, classes):
        self.n, self.p = torch.zeros(splits).double(), torch.zeros(splits, classes).double()
        self.p_log_p = torch.zeros(splits).double()

    def update(self, logits, split):
        """Take in logits (B, classes) of images in the splits (B,)."""
        log_p = logits.double().log_softmax(1)
        self.n.index_add_(0, split, torch.ones(len(split)).double())
        self.p.index_add_(0, split, log_p.exp())
        self.p_log_p.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def score(self):
        """exp E KL(p(y | x) || p(y)) of each split -> its mean and standard deviation over the splits."""
        p_y = self.p / self.n[:, None]
        scores = (self.p_log_p / self.n - torch.special.xlogy(p_y, p_y).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def inception_score(logits, splits=10):
    """The Inception Score of images with these logits (N, classes), in so many splits, in their order -> mean, std"""
    sums = Splits(splits, logits.shape[1])
    sums.update(logits, torch.arange(len(logits)) * splits // len(logits))
    return sums.score()


def score_images(images, extractor, marks, splits=10):
    """Gaussians {n: (mean, covariance)} of the first n images, the Inception Score (mean, std), and the Moments of all.

    images: (N, C, H, W) uint8, or something that is sliced like it; they are taken in a random order, the same at each
    call. extractor: callable features (B, d), logits (B, classes) = extractor(images). marks: the n, up to N.
    """
    N, gaussians, moments = len(images), {}, None
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    ends = sorted({*marks, *range(250, N, 250), N})
    for start, end in tqdm(list(pairwise([0, *ends])), "features"):
        features, logits = extractor(images[order[start:end]])
        if moments is None:
            moments, sums = Moments(features.shape[1]), Splits(min(splits, N), logits.shape[1])
        moments.update(features)
        sums.update(logits, torch.arange(start, end) * len(sums.n) // N)
        if end in marks:
            gaussians[end] = moments.gaussian()
    return gaussians, sums.score(), moments


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
    def ddim_step(self, model, xt, t, t_next, eta=0.0, clip=True, variance="beta_tilde"):
        """x_{t_next} from x_t (DDIM, Eq. 12 and 16), t and t_next < t ints. eta = 1 between neighbours is DDPM.

        variance: beta with eta = 1 adds noise as DDPM does whose sigma_t^2 is beta_t (sigma-hat in the paper).
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


def seeded_sample(diffusion, network, shape, S, seed, **options):
    """x_0 (N, C, H, W) = shape by ddim_sample, in parts of 500. The seed decides x_T, whatever the options are."""
    parts = []
    for k, part in enumerate(torch.arange(shape[0]).split(500)):
        torch.manual_seed(seed + k)  # x_T comes first, and then what noise there is: so the two never coincide
        parts.append(diffusion.ddim_sample(network, (len(part), *shape[1:]), S, **options).cpu())
    return torch.cat(parts)


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


class AttentionBlock(ResBlock):
    """A ResBlock with attention after it."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__(c_in, c_out, d_time)
        self.attention = Attention(c_out)

    def forward(self, x, e):
        return self.attention(super().forward(x, e))


class UNet(nn.Module):
    """eps_hat = UNet(...)(xt, t): (B, C, H, W), (B,) -> (B, C, H, W).

    channels: C. widths: channels at each resolution, the finest first; each resolution is half the one before.
    blocks: ResBlocks at each resolution, on the way down and on the way up.
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
            halve = nn.Conv2d(c, c_below, 3, stride=2, padding=1)
            double = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_below, c, 3, padding=1))
            self.down.append(nn.ModuleList([block(c, c, d_time) for _ in range(blocks)] + [halve]))
            self.up.insert(0, nn.ModuleList([double] + [block(2 * c, c, d_time) for _ in range(blocks)]))
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


class Classifier(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> logits (B, classes). features(x), (B, 64), is what they are made of."""

    def __init__(self, channels, classes):
        super().__init__()
        layers = []
        for c_in, c in pairwise([channels, 32, 64, 128]):
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, 64), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.features(x))


# 5. Data ------------------------------------------------------------------------------------------------------
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


def load_small_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged: (1797, 1, 28, 28) uint8."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).unsqueeze(1) / 16  # (1797, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=28, mode="bicubic").clamp(0, 1)
    return (255 * images).round().byte()


def load_photos():
    """Crops of two photographs at half their size, (6716, 3, 32, 32) uint8: a pagoda in China, and a dahlia."""
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images])  # (2, 427, 640, 3)
    small = F.avg_pool2d(photos.permute(0, 3, 1, 2).float(), 2)  # (2, 3, 213, 320)
    crops = small.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 73, 32, 32)
    return crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte()


def load_strokes():
    """What --smoke learns: the 28 diagonals, (28, 1, 28, 28) uint8."""
    return torch.stack([255 * torch.eye(28).roll(i) for i in range(28)]).unsqueeze(1).byte()


# What --data takes, and what loads it from --data-root. Where the first cannot be downloaded, the second stands in.
DATA = {
    "mnist": load_mnist,
    "digits": lambda root: load_small_digits(),
    "cifar10": load_cifar10,
    "photos": lambda root: load_photos(),
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


def load_labels(data, root):
    """The class of each image of load_images, (N,) int64. data: what load_images said."""
    if data == "mnist":
        from torchvision.datasets.mnist import read_label_file as read

        path = Path(root) / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    elif data == "cifar10":
        from torchvision.datasets import CIFAR10

        path, read = root, lambda root: torch.tensor(CIFAR10(root).targets)
    elif data == "digits":
        from sklearn.datasets import load_digits

        return torch.from_numpy(load_digits().target)
    else:  # two photographs; strokes to the left and to the right
        n = len(load_images(data, root)[0])
        return torch.arange(n) * 2 // n
    try:
        return read(path)
    except Exception:
        fail(f"{path} is damaged or not there: delete the folder, and the next run downloads it again")


def batches(images, batch_size, seed):
    """Endless batches x_0 (B, C, H, W) in [-1, 1]. Epoch after epoch shows each image once, in an order drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    leftover = torch.tensor([], dtype=torch.long, device=images.device)
    while True:
        order = torch.randperm(len(images), generator=generator).to(images.device)
        *full, leftover = torch.cat([leftover, order]).split(batch_size)  # it begins the next epoch's first batch
        for index in full:
            yield images[index].float() / 127.5 - 1


class Folder:
    """The images of a folder, read when they are asked for: folder[index] is (B, C, H, W) uint8. C: 1 or 3."""

    def __init__(self, path, channels):
        from PIL import Image

        kinds = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
        self.mode, self.paths = {1: "L", 3: "RGB"}[channels], []
        for p in sorted(p for p in Path(path).iterdir() if p.suffix.lower() in kinds):
            try:
                with Image.open(p) as image:  # its header alone, which says how large it is
                    size = image.size
            except Exception as error:
                fail(f"{p} is no image that can be read ({type(error).__name__})")
            if self.paths and size != self.size:
                fail(f"{p} is of {size[0]}x{size[1]} pixels, {self.paths[0]} of {self.size[0]}x{self.size[1]}")
            self.size = size
            self.paths.append(p)
        if not self.paths:
            fail(f"{path}: no images (png, jpg, bmp, webp) in this folder")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        images = []
        for i in index.tolist():
            try:
                with Image.open(self.paths[i]) as image:
                    images.append(pil_to_tensor(image.convert(self.mode)))
            except Exception as error:
                print(file=sys.stderr)  # below the progress bar
                fail(f"{self.paths[i]} is damaged ({type(error).__name__})")
        return torch.stack(images)


def to_bytes(images, source):
    """Images (N, C, H, W) of the range [-1, 1] or [0, 255] as uint8, rounded as a file rounds them."""
    if images.dtype == torch.uint8:
        return images
    low, high = images.min().item(), images.max().item()
    if not math.isfinite(low + high):
        fail(f"{source}: some pixels are no numbers")
    if -1 <= low < 0 and high <= 1:
        images = 127.5 * (images + 1)
    elif not (0 <= low and 1 < high <= 255):
        fail(f"{source}: pixels go from {low:.3g} to {high:.3g}, where [-1, 1] or [0, 255] is wanted")
    return images.round().byte()


def open_images(source, channels):
    """A folder or an .npz file as images (N, C, H, W) uint8, or something that is sliced like them. channels: C."""
    import numpy as np

    if Path(source).is_dir():
        return Folder(source, channels)
    try:
        with np.load(source) as file:
            images = torch.from_numpy(file[file.files[0]])
    except Exception as error:
        fail(f"{source} is neither a folder nor an .npz file that can be read ({type(error).__name__})")
    if images.dim() != 4 or images.shape[3] != channels:
        fail(f"{source}: an array of shape {list(images.shape)}, where (N, H, W, {channels}) is wanted")
    return to_bytes(images.permute(0, 3, 1, 2), source)


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


def train_classifier(images, labels, device, steps):
    """A Classifier for images (N, C, H, W) uint8 with labels (N,), trained for that many steps of 128."""
    classifier = Classifier(images.shape[1], int(labels.max()) + 1).to(device, memory_format=torch.channels_last)
    optimizer, schedule = make_optimizer(classifier, 2e-3, steps)
    for _ in tqdm(range(steps), "training the classifier"):
        index = torch.randint(len(images), (128,))
        with autocast(device):
            logits = classifier(images[index].to(device).float() / 127.5 - 1)
            loss = F.cross_entropy(logits, labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def inception(weights, device):
    """The extractor behind published numbers: the Inception of 2015 (torch-fidelity), with a file of its weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        if weights:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle holds
        else:
            socket.setdefaulttimeout(SERVER_SECONDS)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
    except Exception as error:
        fail(f"--features inception: no weights: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
    network = network.to(device, memory_format=torch.channels_last)

    def extractor(images):
        return [x.cpu() for x in network(images.expand(-1, 3, -1, -1).to(device))]

    return extractor


def from_classifier(classifier, device):
    """An extractor with the features and logits of a Classifier."""

    def extractor(images):
        features = classifier.features(images.to(device).float() / 127.5 - 1)
        return features.cpu(), classifier.head(features).cpu()

    return extractor


# 7. Files and command line ------------------------------------------------------------------------------------
# What a flag that is left out means; what the network is, and how long it trains, depends on the device.
SETTINGS = dict(seed=0, T=1000, data="auto", classifier_steps=600, S=50)
GPU = dict(network=dict(widths=[64, 128, 256], blocks=2), steps=6000, batch_size=256, lr=5e-4, samples=10_000)
CPU = dict(network=dict(widths=[32, 64, 128], blocks=1), steps=1500, batch_size=32, lr=1.5e-3, samples=1000)
SMOKE = dict(
    network=dict(widths=[8, 16], blocks=1),
    steps=3, batch_size=4, T=10, S=5, samples=12, data="strokes", classifier_steps=3,
)
CPU_MINUTES = 6  # of the default run on two cores
FLAGS = {  # besides those of every script
    "--samples": dict(dest="source", help="what to score: a folder, an .npz file, a model.pt (default: train a model)"),
    "--reference": dict(help="the real images: a data set, a folder, an .npz file (default: the model's data)"),
    "--features": dict(choices=["inception", "classifier"], help="(default: inception for a folder or .npz file)"),
    "--inception-weights": dict(help="a file of them, for work without a network"),
    "--count": dict(dest="samples", type=int, help=f"images drawn (default: {GPU['samples']}, else {CPU['samples']})"),
}
ENOUGH = 10_000  # samples, below which FID is mostly bias


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


def write_fid(path, curves, title):
    """Plot {name: {n: FID}}: the score over the number of samples."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes = Figure(figsize=(7, 3.5), layout="constrained").subplots()
    *models, _ = curves  # real images come last
    styles = [("o-", "#0072B2"), ("s--", "#D55E00")][: len(models)] + [("^:", "black")]
    for (name, curve), (style, color) in zip(curves.items(), styles, strict=True):
        axes.plot(list(curve), list(curve.values()), style, color=color, label=name)
    axes.set(title=title, xlabel="number of samples", ylabel="FID", xscale="log", yscale="log")
    numbers = FixedLocator(sorted({n for curve in curves.values() for n in curve}))
    axes.xaxis.set(major_locator=numbers, minor_locator=NullLocator(), major_formatter="{x:g}")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    axes.legend()
    axes.grid(alpha=0.3)
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


def load_both(path):
    """The settings of a model.pt, and its networks {"EMA": ..., "raw weights": ...}."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings, networks = checkpoint["settings"], {}
        for name, key in (("EMA", "ema"), ("raw weights", "model")):
            networks[name] = UNet(**settings["network"])
            networks[name].load_state_dict(checkpoint[key])
            networks[name].eval().requires_grad_(False)
        own = "S" in settings  # the other scripts' settings are not about scoring
        return {name: settings[name] for name in (settings if own else ("network", "T", "data"))}, networks
    except Exception as error:
        fail(f"--load {path}: no model.pt of this script, ddpm_mnist.py or ddpm_cifar.py ({type(error).__name__})")


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


def draw_sets(diffusion, networks, shape, args):
    """{name: images (N, C, H, W) uint8}: what each network draws in S steps of DDPM's noise (eta = 1); samples.png."""
    drawn = {}
    for name, network in networks.items():
        network = network.to(diffusion.beta.device, memory_format=torch.channels_last)
        with autocast(diffusion.beta.device):
            x0 = seeded_sample(diffusion, network, (args.samples, *shape), min(args.S, args.T), args.seed, eta=1)
        drawn[name] = to_bytes(x0.clamp(-1, 1), name)
    first = next(iter(drawn.values()))[:64]
    write_grid(args.out / "samples.png", first.float() / 127.5 - 1, 8)
    return drawn


def find_reference(args, images):
    """The real images, their labels (or None), and their name."""
    name = args.reference or args.data
    if name in DATA:
        if name != args.data or images is None:
            images, name = load_images(name, args.data_root)
        return images, load_labels(name, args.data_root), name
    return open_images(name, 3), None, name


def find_extractor(kind, args, reference, labels, name, device):
    """The network whose features are compared. kind: inception or classifier."""
    if kind == "inception":
        return inception(args.inception_weights, device)
    if labels is None:
        fail(f"--features classifier needs labels, and {name} has none: take --reference mnist or cifar10")
    torch.manual_seed(args.seed)
    return from_classifier(train_classifier(reference, labels, device, args.classifier_steps), device)


@torch.no_grad()
def score_all(sets, reference, extractor):
    """Score the sets against the reference, and one half of the reference against the other -> rows of the table."""
    curves, rows = {}, {}
    halves = torch.randperm(len(reference), generator=torch.Generator().manual_seed(1)).chunk(2)
    n = min(max(len(images) for images in sets.values()), len(halves[0]))
    marks = {k for k in (n // 8, n // 4, n // 2, n) if k > 1}
    first, real_score, moments = score_images(Part(reference, halves[0]), extractor, marks)
    _, _, other = score_images(Part(reference, halves[1]), extractor, ())
    real = Moments(len(moments.mean))
    for half in (moments, other):
        real.merge(half.n, half.mean, half.scatter)
    for name, images in sets.items():
        N = len(images)
        marks = {k for k in (N // 8, N // 4, N // 2, N) if k > 1}
        gaussians, score, _ = score_images(images, extractor, marks)
        curves[name] = {k: frechet_distance(*gaussian, *real.gaussian()) for k, gaussian in gaussians.items()}
        rows[name] = dict(n=N, FID=curves[name][N], half=curves[name].get(N // 2), IS=score)
    curves["real images"] = {k: frechet_distance(*gaussian, *other.gaussian()) for k, gaussian in first.items()}
    floor = curves["real images"]
    rows["real images"] = dict(n=n, FID=floor[n], half=floor.get(n // 2), IS=real_score)
    return rows, curves


class Part:
    """Those images of a set that an index names."""

    def __init__(self, images, index):
        self.images, self.index = images, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, index):
        return self.images[self.index[index]]


def print_table(rows, kind, reference):
    print(f"\nReference: {reference}. Features: {kind}; scores by other features cannot be compared with these.")
    print(f"{'':14}{'samples':>8}{'FID':>12}{'of half':>12}   Inception Score")
    for name, row in rows.items():
        half = "" if row["half"] is None else f"{row['half']:.4g}"
        print(f"{name:14}{row['n']:8}{row['FID']:12.4g}{half:>12}   {row['IS'][0]:.3f} +- {row['IS'][1]:.3f}")
    print("real images: one half of the reference, as many as there are samples, against the other half (the floor).")
    if min(row["n"] for row in rows.values()) < ENOUGH:
        print(f"!!! Fewer than {ENOUGH:,} samples: much of these FIDs is bias, and they do not compare with others.")


def main(argv=None):
    args = parse_arguments(argv)
    if args.source and args.source.endswith(".pt"):
        args.load, args.source = args.source, None
    device = find_device(args.device)
    args.device = device.type
    if args.source and not Path(args.source).exists():
        fail(f"--samples {args.source}: there is no such folder or file")
    loaded, networks = load_both(args.load) if args.load else ({}, {})
    fill_defaults(args, device, loaded)
    hardware = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    metrics = {"settings": vars(args), "hardware": hardware, "torch": torch.__version__, "seconds": {}}
    images = None
    if not args.source:
        images, args.data = load_images(args.data, args.data_root)
        if args.batch_size > len(images) and not args.load:
            fail(f"--batch-size {args.batch_size} is more than the {len(images)} images of {args.data}")
    reference, labels, name = find_reference(args, images)
    shape = list(reference[torch.tensor([0])].shape[1:])
    sets = {"samples": open_images(args.source, shape[0])} if args.source else {}
    for what, some, least in (("samples", sets.get("samples", reference), 2), ("reference", reference, 4)):
        if len(some) < least:
            fail(f"--{what}: a score needs {least} images or more")
    found = list(sets["samples"][torch.tensor([0])].shape[1:]) if args.source else list(images.shape[1:])
    kind = args.features or ("inception" if labels is None or args.source else "classifier")
    if found != shape and kind != "inception":
        fail(f"--samples are {found}, the images of {name} {shape}: only --features inception takes several sizes")
    if args.samples < 2:
        fail(f"--count must be 2 or more, not {args.samples}")
    if not args.source:
        diffusion = Diffusion(linear_beta(args.T), device)
        if not args.load:
            args.network = {"channels": images.shape[1], **args.network}
            torch.manual_seed(args.seed)
            model = UNet(**args.network).to(device, memory_format=torch.channels_last)
            if device.type != "cuda" and not args.smoke:
                print(f"The small network for CPUs: about {CPU_MINUTES} minutes in all on two cores with bf16.")
            start = time.perf_counter()
            ema, losses = train(diffusion, model, images.to(device), args)
            metrics["seconds"]["training"] = time.perf_counter() - start
            metrics |= {"steps_done": len(losses), "loss": losses[-100:].mean().item()}
            state = {"settings": settings_of(args), "model": model.state_dict(), "ema": ema.state_dict()}
            write(args.out / "model.pt", lambda temporary: torch.save(state, temporary))
            write_loss(args.out / "loss.png", losses, f"fid_is on {args.data}")
            networks = {"EMA": ema, "raw weights": model.eval()}
        start = time.perf_counter()
        sets = draw_sets(diffusion, networks, images.shape[1:], args)
        metrics["seconds"]["sampling"] = time.perf_counter() - start
        print(f"{args.samples} samples each, by {min(args.S, args.T)} steps with eta = 1.")
    start = time.perf_counter()
    extractor = find_extractor(kind, args, reference, labels, name, device)
    metrics["table"], curves = score_all(sets, reference, extractor)
    metrics["seconds"]["scoring"] = time.perf_counter() - start
    print_table(metrics["table"], kind, name)
    write_fid(args.out / "fid.png", curves, f"{kind} features, against {name}")
    write(args.out / "metrics.json", lambda temporary: temporary.write_text(json.dumps(metrics, default=str, indent=2)))


if __name__ == "__main__":
    main()

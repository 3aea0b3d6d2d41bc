"""The scripts beside diffusers and denoising-diffusion-pytorch: speed and digits, as ratios
measured in one run.

    pip install diffusers denoising-diffusion-pytorch
    python tests/benchmark.py                   # everything; --parts a c: the speeds alone; --smoke: does it work?

(a) ddpm_paper.py's network against diffusers' of the same size: a forward pass and a training step. diffusers runs as
    its example does (fp32) and at its best (bf16 where the hardware multiplies it, channels_last, fused optimiser and
    EMA). FLOP/s are compared with those of a large matrix product in the same dtype.
(b) Digits after some --minutes of training, by ddpm_mnist.py and by each package with its own network and settings.
    Each draws by its own DDIM in 50 steps; fid_is.py scores. The samples go to runs/benchmark/.
(c) The speed of that sampling.

In (a) and (c) the contenders take turns (ABCABC...), and a ratio is the median over the rounds, since a machine's speed
changes from minute to minute; in (b) they train one after the other. With CUDA, (a) and (c) also run compiled.
"""

import argparse
import copy
import os
import sys
import time
from argparse import Namespace
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "pytorch_lowlevel"), str(ROOT / "paper")]
try:
    import ddim_sampling
    import ddpm_mnist
    import ddpm_paper
    import fid_is
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from ema_pytorch import EMA
except ImportError as error:
    print(
        f"benchmark.py: pip install diffusers denoising-diffusion-pytorch ({error})",
        file=sys.stderr,
    )
    sys.exit(2)

CPU = dict(
    batch=16, matmul=4096, rounds=15, calls=1, draw=16, samples=128, S=50, minutes=5, smoke=False
)
GPU = CPU | dict(batch=128, matmul=8192, calls=10, draw=250, samples=5000)
SMOKE = dict(
    batch=2, matmul=64, rounds=2, calls=1, draw=4, samples=8, S=3, minutes=0.02, smoke=True
)


# 1. Measuring
# -------------------------------------------------------------------------------------------------
def take_turns(functions, device, rounds, calls=1):
    """Seconds of a call (functions, rounds). They take turns, ABCABC..., after two rounds that are
    not counted.
    """
    seconds = torch.zeros(rounds + 2, len(functions), dtype=torch.float64)
    for own in seconds:
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            own[i] = (time.perf_counter() - start) / calls
    return seconds[2:].T


def row(what, name, seconds, ours, note):
    """A line of the table. seconds, ours (rounds,): the ratio of each pair, as its median and
    quartiles.
    """
    low, ratio, high = (seconds / ours).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return f"| {what} | {name} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {seconds.median():.3g} | {note} |"


def training_step(model, context, loss, optimizer, after, log=True):
    """step(x0), in the order in which all three train. log: wait for the loss, which both packages
    show at each step
    """

    def step(x0):
        with context:
            value = loss(x0)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()
        if log:
            value.item()

    return step


# 2. The network of 35.7 million parameters
# --------------------------------------------------------------------
def paper_network(size, device):
    """The network of ddpm_paper.py, and a step of its `train` -> name, network, context, step(x0)
    """
    model = ddpm_paper.UNet(**ddpm_paper.SMOKE["network"] if size.smoke else {})
    model, context = (
        model.to(device, memory_format=torch.channels_last),
        ddpm_paper.autocast(device),
    )
    ema, diffusion = copy.deepcopy(model), ddpm_paper.Diffusion(ddpm_paper.linear_beta(), device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5000, 1))

    def after():
        schedule.step()
        ddpm_paper.update_ema(ema, model, schedule.last_epoch)

    step = training_step(
        model, context, partial(diffusion.loss, model), optimizer, after, log=False
    )
    return "ddpm_paper.py", model, context, step


def unet2d(widths, attention, **more):
    """diffusers' network, with attention at one of its levels."""
    down = ["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(len(widths))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    types = dict(block_out_channels=widths, down_block_types=down, up_block_types=up)
    return UNet2DModel(
        sample_size=32, layers_per_block=2, norm_num_groups=min(32, widths[0] // 2), **types, **more
    )


def diffusers_network(size, device, best):
    """The network of google/ddpm-cifar10-32, and a step of diffusers' example -> name, network,
    context, step(x0)
    """
    more = dict(
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    model = unet2d([8, 8, 16, 16] if size.smoke else [128, 256, 256, 256], 1, **more)
    model = model.to(device, memory_format=torch.channels_last if best else torch.contiguous_format)
    context = ddpm_paper.autocast(device) if best else torch.autocast(device.type, enabled=False)
    step, _ = diffusers_training(model, context, best)
    return "diffusers, at its best" if best else "diffusers, as its example", model, context, step


def diffusers_training(model, context, best=False):
    """diffusers' examples/unconditional_image_generation, with its defaults and --use_ema ->
    step(x0), EMA
    """
    scheduler, settings = (
        DDPMScheduler(num_train_timesteps=1000),
        dict(betas=(0.95, 0.999), weight_decay=1e-6),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, **settings, fused=best or None)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=375_000
    )  # 100 epochs
    ema = EMAModel(
        model.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        foreach=best,
    )

    def loss(x0):
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=x0.device)
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).sample, noise)

    def after():
        schedule.step()
        ema.step(model.parameters())

    return training_step(model, context, loss, optimizer, after, log=not best), ema


def part_a(size, device, compiled):
    """A forward pass and a training step."""
    x0, t = (
        torch.rand(size.batch, 3, 32, 32, device=device) * 2 - 1,
        torch.full((size.batch,), 500, device=device),
    )
    with ddpm_paper.autocast(device):
        dtypes = [torch.float32] + [torch.bfloat16] * torch.is_autocast_enabled(device.type)
    matrices = [torch.randn(size.matmul, size.matmul, device=device).to(dtype) for dtype in dtypes]
    contenders, rows = (
        [paper_network(size, device), *(diffusers_network(size, device, x) for x in (True, False))],
        [],
    )

    def multiply(
        x,
    ):  # fp32 as TF32 where there is such a thing, since CUDA computes fp32 convolutions in it
        torch.backends.cuda.matmul.allow_tf32 = True
        x @ x
        torch.backends.cuda.matmul.allow_tf32 = False

    def forward(model, context):
        with torch.no_grad(), context:
            model(x0, t)

    work, flops = (
        {"forward pass": [partial(forward, model, context) for _, model, context, _ in contenders]},
        {},
    )
    work["training step"] = [partial(step, x0) for *_, step in contenders]
    for what, functions in work.items():
        with FlopCounterMode(display=False) as counter:
            functions[0]()  # ours; diffusers' network has as many
        flops[what] = counter.get_total_flops()
    for _, model, *_ in contenders if compiled else []:
        model.compile()
    for what, functions in work.items():
        for _, model, *_ in contenders:
            model.train(what == "training step")
        products = [partial(multiply, x) for x in matrices]
        seconds = take_turns(functions + products, device, size.rounds, size.calls)
        for (name, *_), own in zip(contenders, seconds, strict=False):
            i = 0 if name.endswith("example") else -1
            peak = 2 * size.matmul**3 / seconds[len(functions) :][i]  # FLOP/s
            share = (flops[what] / own / peak).median()
            note = f"{share:.0%} of {peak.median() / 1e12:.3g} TFLOP/s in {str(dtypes[i])[6:]}"
            rows.append(row(f"{what}, batch {size.batch}", name, own, seconds[0], note))
    return rows


# 3. Digits: functions (size, device) -> network, train(images, seconds) -> steps, sample(n) -> (n,
# 1, H, W) in [0, 1]
def our_digits(size, device):
    """ddpm_mnist.py's network and recipe, and the sampler of ddim_sampling.py."""
    recipe = ddpm_mnist.GPU if device.type == "cuda" else ddpm_mnist.CPU
    recipe = Namespace(**recipe | (ddpm_mnist.SMOKE if size.smoke else {}))
    network = ddpm_mnist.UNet(**recipe.network).to(device, memory_format=torch.channels_last)
    diffusion = ddim_sampling.Diffusion(ddim_sampling.linear_beta(), device)

    def train(images, seconds):
        """The learning rate falls until the last step, so a trial finds how many steps the time
        that is left allows.
        """
        start, recipe.steps = time.perf_counter(), (trial := min(50, recipe.steps))
        ddpm_mnist.train(diffusion, copy.deepcopy(network), images, recipe)
        spent = time.perf_counter() - start
        recipe.steps = max(1, int(trial * (seconds - spent) / spent))
        ema, _ = ddpm_mnist.train(diffusion, network, images, recipe)
        network.load_state_dict(ema.state_dict())
        return recipe.steps

    def sample(n):
        with ddpm_mnist.autocast(device):
            return diffusion.ddim_sample(network, (n, 1, 28, 28), size.S) / 2 + 0.5

    return network, train, sample


def train_for(step, images, seconds):
    """Steps of 16 images, the default of both packages, until the time is over. x0 (16, 1, 32, 32)
    in [0, 1].
    """
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        x0 = images[torch.randint(len(images), (16,), device=images.device)] / 255
        step(F.pad(x0, (2, 2, 2, 2)))
        steps += 1
    return steps


def denoising_diffusion_digits(size, device):
    """denoising-diffusion-pytorch: its README's network and mixed precision (bf16 for fp16), its
    Trainer's defaults.
    """
    model = (
        Unet(8, dim_mults=(1, 2), channels=1)
        if size.smoke
        else Unet(64, dim_mults=(1, 2, 4, 8), channels=1)
    )
    diffusion = GaussianDiffusion(model, image_size=32, sampling_timesteps=size.S).to(device)
    ema = EMA(diffusion, beta=0.995, update_every=10).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, betas=(0.9, 0.99))
    step = training_step(diffusion, ddpm_mnist.autocast(device), diffusion, optimizer, ema.update)
    return ema.ema_model.model, partial(train_for, step), ema.ema_model.sample


def diffusers_digits(size, device):
    """diffusers: network and defaults of its examples/unconditional_image_generation, with one
    channel.
    """
    widths = [8] * 6 if size.smoke else [128, 128, 256, 256, 512, 512]
    network = unet2d(widths, 4, in_channels=1, out_channels=1).to(device)
    pipeline = DDIMPipeline(network, DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def train(images, seconds):
        step, ema = diffusers_training(network.train(), torch.autocast(device.type, enabled=False))
        steps = train_for(lambda x0: step(2 * x0 - 1), images, seconds)
        ema.copy_to(network.parameters())
        return steps

    def sample(n):
        drawn = pipeline(batch_size=n, num_inference_steps=size.S, output_type="np").images
        return torch.from_numpy(drawn).permute(0, 3, 1, 2)

    return network, train, sample


DIGITS = {
    "ddpm_mnist.py": our_digits,
    "denoising-diffusion-pytorch": denoising_diffusion_digits,
    "diffusers": diffusers_digits,
}


def part_b(size, device, compiled):
    """Digits after some minutes of training, which is not compiled."""
    images, data = ddpm_mnist.load_images("digits" if size.smoke else "mnist", size.root)
    rows, sets, about, folder = [], [], [], ROOT / "runs/benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in DIGITS.items():
        network, train, sample = make(size, device)
        start = time.perf_counter()
        steps, parameters = (
            train(images.to(device), 60 * size.minutes),
            sum(p.numel() for p in network.parameters()),
        )
        seconds = time.perf_counter() - start
        about.append((f"{seconds:.0f}", f"; {steps:,} steps; {parameters / 1e6:.3g} M parameters"))
        network.eval()
        x0 = torch.cat(
            [sample(len(part)).cpu() for part in torch.empty(size.samples).split(size.draw)]
        )
        x0 = x0[:, :, 2:-2, 2:-2] if x0.shape[2] == 32 else x0  # without the margin
        sets.append((name, (255 * x0.clamp(0, 1)).round().byte(), None))
        np.savez(folder / f"{Path(name).stem}.npz", sets[-1][1].permute(0, 2, 3, 1).numpy())
    real, labels, data, (n_train, _, n_floor) = fid_is.load_real(data, size.root)
    path = (
        size.root / f"classifier_{data}{'_smoke' * size.smoke}.pt"
    )  # the one that fid_is.py makes
    network = fid_is.find_classifier(
        real[:n_train], labels[:n_train], path, device, 3 if size.smoke else 1000
    )
    found, _ = fid_is.score_all(network, sets, real[n_train:], labels, n_floor)
    for (name, score, _), (seconds, note) in zip(found, [*about, ("", "")], strict=False):
        what, ratio = f"FD of {score['n']:,} images ({data})", score["FD"] / found[0][1]["FD"]
        note = f"FD {score['FD']:.4g}; {score['sure']:.1%} above 0.9{note}"
        rows.append(f"| {what} | {name} | {ratio:.2f} | {seconds} | {note} |")
    return rows


def part_c(size, device, compiled):
    """The time that sampling takes; it does not depend on what the network has learned."""
    functions = []
    for make in DIGITS.values():
        network, _, sample = make(size, device)
        network.eval()
        if compiled:
            network.compile()
        functions.append(partial(sample, size.draw))
    seconds, what = (
        take_turns(functions, device, size.rounds),
        f"{size.S} DDIM steps, batch {size.draw}",
    )
    notes = [f"{size.draw / own.median():.3g} images/s" for own in seconds]
    return [
        row(what, name, own, seconds[0], note)
        for name, own, note in zip(DIGITS, seconds, notes, strict=True)
    ]


# 4. Run -------------------------------------------------------------------------------------------
# ------------
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, parts, rows = parser.add_argument, dict(a=part_a, b=part_b, c=part_c), []
    flag("--parts", nargs="+", choices=list(parts), default=list(parts), help="which (a b c)")
    flag("--minutes", type=float, help="of each training of part b (5)")
    flag("--data-root", type=Path, default=ROOT / "data", help="folder of MNIST (data)")
    flag(
        "--device",
        type=torch.device,
        default=str(torch.accelerator.current_accelerator(True) or "cpu"),
    )
    flag("--smoke", action="store_true", help="tiny networks, some seconds: does everything work?")
    args = parser.parse_args(argv)
    cuda = args.device.type == "cuda"
    size = Namespace(**SMOKE if args.smoke else GPU if cuda else CPU)
    size.minutes, size.root = args.minutes or size.minutes, args.data_root
    for part, compiled in [(part, compiled) for part in args.parts for compiled in (False, True)]:
        if not compiled or cuda and part != "b":
            mark = f"({part}{', compiled' * compiled})"
            print(f"{mark} ...", file=sys.stderr)
            torch.manual_seed(0)
            torch.compiler.reset()
            rows += [f"| {mark} {line[2:]}" for line in parts[part](size, args.device, compiled)]
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    packages = [
        f"{name} {version(name)}" for name in ("torch", "diffusers", "denoising-diffusion-pytorch")
    ]
    print(
        f"\n{args.device}, {machine}; {', '.join(packages)}. Ratio: seconds (a, c) or FD (b) over ours.\n"
    )
    print(
        "| what | by | ratio (quartiles) | seconds | besides |\n|---|---|---|---|---|",
        *rows,
        sep="\n",
    )


if __name__ == "__main__":
    main()

